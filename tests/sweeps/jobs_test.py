# SPDX-License-Identifier: Apache-2.0
"""Real processes, of a gkd_jax.main that does what its arguments say."""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from gkd_jax.runtime import pins
from gkd_jax.runtime import signals as signals_lib
from gkd_jax.sweeps import jobs
from tests import conftest

MAIN = """
  import os, pathlib, sys, time

  import gkd_jax

  gkd_jax.__path__.append('{package}')
  from gkd_jax.sweeps import worker

  def run(arguments):
    arguments = dict(a.removeprefix('--gin.').split('=', 1) for a in arguments)
    folder = pathlib.Path(arguments['MODEL_DIR'])
    trace = pathlib.Path('trace')
    with trace.open('a') as file:
      file.write(f'begin {{folder.name}} {{os.getpid()}}\\n')
    print('one')
    print('I0000 00:00:1795356102.3 chatter of a library')
    print('| a | table |')
    print('two', file=sys.stderr)
    time.sleep(float(arguments.get('SECONDS', 0)))
    with trace.open('a') as file:
      file.write(f'end {{folder.name}}\\n')
    if 'EXIT' in arguments:
      sys.exit(int(arguments['EXIT']))
    if 'SIGNAL' in arguments:
      os.kill(os.getpid(), int(arguments['SIGNAL']))
    if 'RAISE' in arguments:
      raise RuntimeError('a bug')
    if arguments.get('RESULT') != 'none':
      (folder / 'result').write_text('done')

  worker.serve(run) if sys.argv[1] == '--run_mode=worker' else run(sys.argv[2:])
"""


@pytest.fixture(autouse=True)
def main(tmp_path, monkeypatch):
  """Puts another gkd_jax.main before ours, for processes started here."""
  package = tmp_path / 'package' / 'gkd_jax'
  package.mkdir(parents=True)
  (package / '__init__.py').touch()
  main = MAIN.format(package=conftest.ROOT / 'gkd_jax')
  (package / 'main.py').write_text(textwrap.dedent(main))
  monkeypatch.setenv('PYTHONPATH', str(package.parent))
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def job(tmp_path):
  def job(name, needs=(), **settings):
    folder = tmp_path / 'out' / name
    _, *arguments = jobs.arguments(
      'train', [], {'MODEL_DIR': folder, **settings}
    )
    return jobs.Job(
      name,
      tuple(arguments),
      folder / 'result',
      needs,
    )

  return job


def trace():
  """['begin a', 'end a', ...]."""
  path = pathlib.Path('trace')
  lines = path.read_text().splitlines() if path.exists() else []
  return [' '.join(line.split()[:2]) for line in lines]


def begun():
  return [line.split()[1] for line in trace() if line.startswith('begin')]


def processes():
  """{job: id of the process that ran it}."""
  lines = pathlib.Path('trace').read_text().splitlines()
  return dict(line.split()[1:] for line in lines if line.startswith('begin'))


def run(all_jobs, num_parallel=1, **settings):
  jobs.run(all_jobs, num_parallel, **settings)


def test_jobs_are_run_in_order_and_leave_their_results(job):
  three = [job('a'), job('b'), job('c')]

  run(three)

  assert trace() == [f'{w} {n}' for n in 'abc' for w in ('begin', 'end')]
  assert all(job.result.read_text() == 'done' for job in three)


def test_one_process_runs_all_jobs_each_with_its_own_log(job, tmp_path):
  run([job('a'), job('b', needs=('a',))])

  assert len({*processes().values()}) == 1
  for name in 'ab':
    log = (tmp_path / 'out' / f'{name}.log').read_text()
    assert log.splitlines().count('one') == 1
    assert log.splitlines().count('two') == 1  # both streams


@pytest.mark.parametrize(['limit', 'count'], [(1, 3), (2, 2)])
def test_a_process_can_have_a_limit_of_runs(job, limit, count):
  run([job(name) for name in 'abc'], runs_per_process=limit)

  assert len({*processes().values()}) == count


def test_as_many_run_at_a_time_as_is_set_each_after_those_it_needs(job):
  late = job('late', needs=('a', 'b'))

  run([job('a'), job('b', SECONDS=0.5), job('c'), late], num_parallel=2)

  running = most = 0
  for line in trace():
    running += 1 if line.startswith('begin') else -1
    most = max(most, running)
  assert most == 2
  assert trace()[-2:] == ['begin late', 'end late']
  assert len({*processes().values()}) == 2


def test_what_is_done_is_not_run_again(job, capsys):
  run([job('a')])

  run([job('a'), job('b', needs=('a',))])

  assert begun() == ['a', 'b']
  assert '1 of 2 runs are done already' in capsys.readouterr().err


# --- Failures -----------------------------------------------------------------


@pytest.mark.parametrize(
  ['how', 'reason', 'logged'],
  [
    ({'EXIT': 3}, 'a failed', 'two'),
    ({'RAISE': 1}, 'a failed', 'RuntimeError: a bug'),
    (
      {'SIGNAL': 9},
      'a failed: SIGKILL ended its process (as the kernel does when memory '
      'runs out)',
      'two',
    ),
    ({'RESULT': 'none'}, 'a failed: it left no result', 'two'),
  ],
)
def test_a_failure_is_shown_with_its_log_and_the_others_go_on(
  job, tmp_path, capsys, how, reason, logged
):
  with pytest.raises(ValueError) as error:
    run([job('a', **how), job('b')])

  shown = capsys.readouterr().err
  assert f'{reason}. Its log, {tmp_path}/out/a.log, ends:\none\n' in shown
  assert f'\n{logged}\n' in shown
  assert 'chatter' not in shown
  assert str(error.value).startswith('1 of 2 runs failed')
  assert f'\n  {reason}.' in str(error.value)
  assert begun() == ['a', 'b']
  assert job('b').result.exists()


def test_what_needs_a_failed_run_is_not_run(job):
  five = [
    job('a', EXIT=1),
    job('b'),
    job('c', needs=('a',)),
    job('d', needs=('c',)),
    job('e', needs=('b',)),
  ]

  with pytest.raises(ValueError) as error:
    run(five)

  assert begun() == ['a', 'b', 'e']
  first, *rest = str(error.value).splitlines()
  assert first.startswith('3 of 5 runs failed')
  assert [line.strip().split('. ')[0] for line in rest] == [
    'a failed',
    'c was not run: it needs a.',
    'd was not run: it needs c.',
  ]


def test_a_failed_run_is_tried_again(job):
  with pytest.raises(ValueError, match='a failed'):
    run([job('a', EXIT=1)])

  run([job('a')])

  assert begun() == ['a', 'a']


# --- Commands -----------------------------------------------------------------


def test_a_command_can_be_pasted(job, tmp_path):
  odd = job('a b', SECONDS=0, LENGTHS={'inputs': 16, 'targets': "it's"})
  odd = dataclasses.replace(odd, arguments=('--run_mode=train', *odd.arguments))
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
    jobs.check_same_settings(tmp_path / 'out' / 'runs.json', both)
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
  jobs.check_same_settings(tmp_path / 'out' / 'runs.json', [a])

  with pytest.raises(ValueError, match='other settings .*: b. Remove'):
    two(b='Y = 2\n')


def test_a_run_whose_folder_was_removed_may_change(two, job):
  two()
  job('b').folder.rmdir()

  two(b='Y = 2\n')


@pytest.mark.parametrize('kind', ['training', 'predictions'])
def test_runs_are_not_added_to_runs_of_other_files(job, tmp_path, kind):
  both = [job('a'), job('b')]
  (tmp_path / 'data.jsonl').write_text('{}')
  pinned = {'data': pins.of_files([str(tmp_path / 'data.jsonl')])}
  both[0].folder.mkdir(parents=True)
  if kind == 'training':
    pins.save(both[0].folder, pinned)
  else:
    text = json.dumps({'pins': pins.to_json(pinned)})
    (both[0].folder / 'predictions_train.json').write_text(text)
  jobs.check_same_files(both)
  (tmp_path / 'data.jsonl').write_text('[]')

  with pytest.raises(ValueError, match='started with other files:\n  data: '):
    jobs.check_same_files(both)
  for done in both:
    done.folder.mkdir(exist_ok=True)
    done.result.touch()
  jobs.check_same_files(both)  # nothing is left to be run


def test_a_run_is_not_started_with_files_that_changed_meanwhile(
  job, tmp_path, monkeypatch
):
  first, second = job('a'), job('b')
  monkeypatch.setattr(
    pins, 'changes_since', lambda _: ['x'] if first.result.exists() else []
  )

  with pytest.raises(
    ValueError, match='b was not run: Runs of this sweep were'
  ):
    run([first, second])

  assert trace() == ['begin a', 'end a']


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
