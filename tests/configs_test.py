# SPDX-License-Identifier: Apache-2.0
import re
import shlex

import pytest

from gkd_jax import experiment as experiment_lib
from gkd_jax.sweeps import jobs as jobs_lib
from tests import conftest

FRAGMENTS = sorted((conftest.ROOT / 'gin').rglob('*.gin'))
CONFIGS = sorted((conftest.ROOT / 'configs').rglob('*.gin'))
FIRST_COMMENT = re.compile('(#.*\n)+')


def relative(path):
  return str(path.relative_to(conftest.ROOT))


def header(path) -> str:
  """Returns the first comment of a file, without the marks."""
  match = FIRST_COMMENT.match(path.read_text())
  assert match, f'{relative(path)} does not begin with a comment'
  return re.sub('^# ?', '', match[0], flags=re.MULTILINE)


def documented_command(path) -> list[str]:
  """The arguments of gkd_jax.main in the command of a config's header."""
  text = header(path).replace('\\\n', ' ')
  if match := re.search(r'^Run: +scripts/quickstart (--\w+)$', text, re.M):
    assert match[1] == '--smoke'
    return [
      '--run_mode=sweep',
      f'--gin_file={relative(path)}',
      '--gin.MODEL_DIR=runs/smoke',
    ]
  match = re.search(r'python -m gkd_jax\.main (.*)', text)
  assert match, f'the header of {relative(path)} has no command'
  return shlex.split(match[1])


def all_files(parametrized):
  return pytest.mark.parametrize('path', parametrized, ids=relative)


@all_files(FRAGMENTS)
def test_a_fragment_begins_with_what_it_is_for(path):
  assert len(header(path)) > 20


@all_files(FRAGMENTS + CONFIGS)
def test_what_is_included_is_there(path):
  included = re.findall(r"^include '(.+)'", path.read_text(), re.MULTILINE)

  for file in included:
    assert (conftest.ROOT / file).is_file(), f'{file} in {relative(path)}'


@all_files(CONFIGS)
def test_the_command_in_the_header_runs_this_file(path):
  arguments = documented_command(path)

  assert f'--gin_file={relative(path)}' in arguments


def mode_of(arguments):
  modes = [a for a in arguments if a.startswith('--run_mode=')]
  return modes[-1].removeprefix('--run_mode=') if modes else 'train'


@pytest.fixture
def build(run_main, small_vocabulary, monkeypatch):
  """Builds all parts of an experiment, and does nothing with them.

  So every macro is set and read, every name exists, and every value is
  accepted. No task is opened: TensorFlow is not imported.
  """

  class Built(Exception):
    pass

  def train(experiment, run):
    experiment_lib.check(experiment)
    assert run.config_text()  # every override is read
    raise Built

  def precompile(experiment, **_):
    experiment_lib.check(experiment, with_checkpoints=False)
    raise Built

  def find(*_):
    raise Built

  monkeypatch.setattr('gkd_jax.train.train', train)
  monkeypatch.setattr('gkd_jax.capacity.precompile.precompile', precompile)
  # What evaluates or writes outputs first opens its checkpoint.
  monkeypatch.setattr('gkd_jax.checkpoints.pretrained.open_checkpoint', find)

  def substitute(argument):
    argument = re.sub(r'=models/byt5\S*', f'={conftest.BYT5}', argument)
    return argument.replace(
      '=models/spiece.model', f'={small_vocabulary.sentencepiece_model_file}'
    )

  def build(arguments):
    with pytest.raises(Built):
      finished = run_main(*map(substitute, arguments))
      raise AssertionError(finished.err)

  return build


def configs_of(*modes):
  return all_files(
    [p for p in CONFIGS if mode_of(documented_command(p)) in modes]
  )


@configs_of('train', 'eval', 'infer')
def test_the_command_in_the_header_builds_all_parts(path, build):
  build(documented_command(path))


@configs_of('train')
def test_what_trains_can_be_compiled_for_a_slice_too(path, build):
  build(
    [*documented_command(path), '--run_mode=precompile', '--topology=cpu:1']
  )


@pytest.fixture
def jobs_of(run_main, tmp_path, monkeypatch):
  """Returns the runs of a command without starting them."""

  class Stop(Exception):
    pass

  def jobs_of(arguments):
    kept = []

    def keep_and_stop(jobs, *rest, **settings):
      kept.extend(jobs)
      raise Stop

    def check_one_of_each(jobs, check):
      # All points are built anyway: of those with the same files one is enough.
      of_files = {
        tuple(a for a in job.arguments if a.startswith('--gin_file')): job
        for job in jobs
      }
      check_arguments(of_files.values(), check)

    check_arguments = jobs_lib.check_arguments
    monkeypatch.setattr(jobs_lib, 'check_arguments', check_one_of_each)
    monkeypatch.setattr(jobs_lib, 'run', keep_and_stop)
    with pytest.raises(Stop):
      run_main(
        *(
          re.sub(r'=models/byt5\S*', f'={conftest.BYT5}', a) for a in arguments
        ),
        f'--gin.MODEL_DIR={tmp_path}',
      )
    return kept

  return jobs_of


@pytest.mark.slow
@configs_of('sweep')
def test_all_points_of_a_sweep_build_all_their_parts(path, build, jobs_of):
  arguments = [*documented_command(path), '--gin.SEEDS=(0,)']
  if 'VOCABULARY_PATH' in header(path):  # the models are there before
    arguments += [
      f'--gin.TEACHER={conftest.BYT5}',
      f'--gin.INITIAL_STUDENT={conftest.BYT5}',
    ]
  if 'STUDENTS = ' in path.read_text():  # so are the students
    arguments.append(f'--gin.STUDENTS={conftest.BYT5}')
  jobs = jobs_of(arguments)

  assert len(jobs) >= 4
  for job in jobs:
    build(job.arguments)
