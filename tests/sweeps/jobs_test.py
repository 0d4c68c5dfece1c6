# SPDX-License-Identifier: Apache-2.0
"""Real processes, of a gkd_jax.main that does what its arguments say."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from gkd_jax.runtime import signals as signals_lib
from gkd_jax.sweeps import jobs

MAIN = """
  import pathlib, sys, time
  arguments = dict(a.removeprefix('--gin.').split('=', 1) for a in sys.argv[2:])
  folder = pathlib.Path(arguments['MODEL_DIR'])
  with open('trace', 'a') as file:
    file.write(f'begin {folder.name}\\n')
  print('one')
  print('I0000 00:00:1795356102.3 chatter of a library')
  print('| a | table |')
  print('two', file=sys.stderr)
  time.sleep(float(arguments.get('SECONDS', 0)))
  with open('trace', 'a') as file:
    file.write(f'end {folder.name}\\n')
  if 'EXIT' in arguments:
    sys.exit(int(arguments['EXIT']))
  if arguments.get('RESULT') != 'none':
    (folder / 'result').write_text('done')
"""


@pytest.fixture(autouse=True)
def main(tmp_path, monkeypatch):
  """Puts another gkd_jax.main before ours, for processes started here."""
  package = tmp_path / 'package' / 'gkd_jax'
  package.mkdir(parents=True)
  (package / '__init__.py').touch()
  (package / 'main.py').write_text(textwrap.dedent(MAIN))
  monkeypatch.setenv('PYTHONPATH', str(package.parent))
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def job(tmp_path):
  def job(name, needs=(), **settings):
    folder = tmp_path / 'out' / name
    return jobs.Job(
      name,
      jobs.arguments('train', [], {'MODEL_DIR': folder, **settings}),
      folder / 'result',
      needs,
    )

  return job


def trace():
  path = pathlib.Path('trace')
  return path.read_text().splitlines() if path.exists() else []


def begun():
  return [line.split()[1] for line in trace() if line.startswith('begin')]


def run(all_jobs, num_parallel=1, **settings):
  jobs.run(all_jobs, num_parallel, **settings)


def test_jobs_are_run_in_order_and_leave_their_results(job):
  three = [job('a'), job('b'), job('c')]

  run(three)

  assert trace() == [f'{w} {n}' for n in 'abc' for w in ('begin', 'end')]
  assert all(job.result.read_text() == 'done' for job in three)


def test_a_job_waits_for_those_it_needs(job):
  late = job('late', needs=('early', 'earlier'))

  run([job('earlier'), job('early', SECONDS=0.5), late], num_parallel=3)

  assert trace()[-2:] == ['begin late', 'end late']


@pytest.mark.parametrize('num_parallel', [1, 2])
def test_so_many_run_at_a_time_and_no_more(job, num_parallel):
  run([job(name, SECONDS=0.5) for name in 'abcd'], num_parallel)

  running = most = 0
  for line in trace():
    running += 1 if line.startswith('begin') else -1
    most = max(most, running)
  assert most == num_parallel


def test_what_is_done_is_not_run_again(job, capsys):
  run([job('a')])

  run([job('a'), job('b', needs=('a',))])

  assert begun() == ['a', 'b']
  assert '1 of 2 runs are done already' in capsys.readouterr().err


def test_the_log_of_a_run_lies_beside_its_folder(job, tmp_path):
  run([job('a')])

  log = (tmp_path / 'out' / 'a.log').read_text()
  assert {'one', 'two'} <= set(log.splitlines())  # both streams


# --- Failures -----------------------------------------------------------------


def test_a_failure_is_shown_with_the_end_of_its_log(job, tmp_path):
  with pytest.raises(ValueError) as error:
    run([job('a', EXIT=3), job('b')])

  message = str(error.value)
  assert message.startswith(f'a failed. Its log, {tmp_path}/out/a.log, ends:\n')
  # Without what says nothing.
  assert message.endswith('\none\ntwo')
  assert begun() == ['a']


def test_those_beside_a_failure_are_ended(job):
  start = time.monotonic()

  with pytest.raises(ValueError, match='^b failed'):
    run([job('a', SECONDS=60), job('b', EXIT=1)], num_parallel=2)

  assert time.monotonic() - start < 30
  assert 'end a' not in trace()


def test_a_run_that_leaves_no_result_has_failed(job):
  with pytest.raises(ValueError, match='^a failed: it left no result'):
    run([job('a', RESULT='none')])


def test_the_others_go_on_if_they_shall(job, capsys):
  four = [
    job('a', EXIT=1),
    job('b'),
    job('c', needs=('a',)),
    job('d', needs=('c',)),
    job('e', needs=('b',)),
  ]

  with pytest.raises(ValueError) as error:
    run(four, keep_going=True)

  assert begun() == ['a', 'b', 'e']
  first, *rest = str(error.value).splitlines()
  assert first.startswith('3 of 5 runs failed')
  assert [line.strip().split('. ')[0] for line in rest] == [
    'a failed',
    'c was not run: it needs a.',
    'd was not run: it needs c.',
  ]
  # It was told when it happened, with the end of its log.
  assert re.search(r'a failed\. .*ends:\none\ntwo', capsys.readouterr().err)


def test_a_failed_run_is_tried_again(job):
  with pytest.raises(ValueError, match='^a failed'):
    run([job('a', EXIT=1)])

  run([job('a')])

  assert begun() == ['a', 'a']


# --- Commands -----------------------------------------------------------------


def test_a_command_can_be_pasted(job, tmp_path):
  odd = job('a b', SECONDS=0, LENGTHS={'inputs': 16, 'targets': "it's"})
  odd.folder.mkdir(parents=True)
  command = odd.command.replace('python', shlex.quote(sys.executable), 1)

  subprocess.run(['bash', '-c', command], check=True)

  assert odd.result.exists()
  arguments = shlex.split(odd.command)[3:]
  assert arguments == list(odd.arguments)


def test_gin_files_are_named_in_their_order():
  assert jobs.arguments('eval', ['a.gin', 'b.gin'], {'SEEDS': (0, 1)}) == (
    '--run_mode=eval',
    '--gin_file=a.gin',
    '--gin_file=b.gin',
    '--gin.SEEDS=(0, 1)',
  )


# --- Runs of other settings ---------------------------------------------------


def with_gin(job, file, **settings):
  return jobs.Job(
    job.name,
    jobs.arguments('train', [str(file)], settings),
    job.result,
    job.needs,
  )


@pytest.fixture
def two(job, tmp_path):
  """`a`, and `b` that needs it; each has a gin file and then a folder."""

  def two(a='X = 1\n', b='Y = 1\n', **settings_of_a):
    (tmp_path / 'a.gin').write_text(a)
    (tmp_path / 'b.gin').write_text(b)
    both = [
      with_gin(job('a'), tmp_path / 'a.gin', **settings_of_a),
      with_gin(job('b', needs=('a',)), tmp_path / 'b.gin'),
    ]
    jobs.check_same(tmp_path / 'out' / 'runs.json', both)
    for one in both:
      one.folder.mkdir(parents=True, exist_ok=True)

  return two


def test_the_same_runs_again_are_the_same(two):
  two()
  two()


@pytest.mark.parametrize(
  ['changes', 'changed'],
  [
    ({'b': 'Y = 2\n'}, 'b'),
    # What was made after another run is another run.
    ({'a': 'X = 2\n'}, 'a, b'),
    ({'TRAIN_STEPS': 7}, 'a, b'),
  ],
)
def test_runs_of_other_settings_are_not_mixed(two, changes, changed):
  two()

  with pytest.raises(ValueError, match=f'other settings .*: {changed}. Remove'):
    two(**changes)
  two()  # what was known is still known


def test_a_file_that_is_included_counts(two, tmp_path):
  (tmp_path / 'size.gin').write_text('EMB_DIM = 8\n')
  two(b=f"include '{tmp_path}/size.gin'\n")
  (tmp_path / 'size.gin').write_text('EMB_DIM = 16\n')

  with pytest.raises(ValueError, match='other settings .*: b. Remove'):
    two(b=f"include '{tmp_path}/size.gin'\n")


def test_runs_that_are_left_out_for_once_are_still_known(two, job, tmp_path):
  two()
  a = with_gin(job('a'), tmp_path / 'a.gin')
  jobs.check_same(tmp_path / 'out' / 'runs.json', [a])

  with pytest.raises(ValueError, match='other settings .*: b. Remove'):
    two(b='Y = 2\n')


def test_a_run_whose_folder_was_removed_may_change(two, job):
  two()
  job('b').folder.rmdir()

  two(b='Y = 2\n')


def test_a_gin_file_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match='METHODS: there is no gin file my.gin'):
    jobs.check_gin_files(['configs/quickstart.gin', 'my.gin'], 'METHODS')


def test_sigterm_ends_what_runs_with_a_code_to_try_again(job, tmp_path):
  def terminate_when_begun():
    while begun() != ['long']:
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=terminate_when_begun)
  thread.start()
  with pytest.raises(signals_lib.Interrupted) as error:
    run([job('long', SECONDS=60), job('next')])
  thread.join()

  assert error.value.exit_code == 75
  assert trace() == ['begin long']
