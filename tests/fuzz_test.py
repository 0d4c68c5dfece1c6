# SPDX-License-Identifier: Apache-2.0
"""Bad values, damaged folders and full disks, drawn with a seed.

Whatever is drawn: a run is accepted, or it is refused with a message of ours;
and nothing that was there is lost.
"""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gkd_jax.checkpoints import checkpoint
from gkd_jax.data import iterators
from gkd_jax.models.t5 import T5Config
from gkd_jax.runtime import metrics as metrics_lib
from gkd_jax.runtime import run_folder
from tests import conftest
from tests.conftest import gin_flags

# Reading what Orbax wrote is done in many tasks, which all fail.
pytestmark = [
  pytest.mark.slow,  # hundreds of damaged settings and runs
  pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
]

GKD = '--gin_file=configs/cmudict_g2p/on_policy_forward_kl.gin'
STUDENT = '--gin_file=configs/cmudict_g2p/student.gin'


SMALL = gin_flags(
  EMB_DIM=8,
  NUM_HEADS=2,
  HEAD_DIM=4,
  MLP_DIM=8,
  MIXTURE_OR_TASK_NAME=conftest.LETTERS,
  TASK_FEATURE_LENGTHS=conftest.LENGTHS,
  BATCH_SIZE=8,
  EVAL_BATCH_SIZE=8,
  WARMUP_STEPS=1,
  EVAL_PERIOD=3,
  CHECKPOINT_PERIOD=1,
  TRAIN_STEPS=3,
  BEST_METRIC=None,
  **{
    'experiment.Schedule.log_period': 1,
    'experiment.Keep.last': 1,
  },
)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  folder = tmp_path_factory.mktemp('teacher')
  conftest.save_model(folder, T5Config(384, 8, 2, 4, 8, 1, 1))
  return folder


# --- Values of settings -------------------------------------------------------

# What a person, or a script that makes commands, may give any setting.
VALUES = (
  *('None', 'True', '-1', '0', '2', '1.5', '-0.5', '1e400', str(10**30)),
  *('x', "''", '[]', '{}', '(1, 2)', "{'a': 1}", "('a', None)", '1+2j'),
  *("float('nan')", 'nowhere/at/all', 'a_file', '/dev/null/x', 'gs://a/b'),
  *('@unknown', '@unknown.name()', '%UNKNOWN', '@optax.constant_schedule'),
  *('@policies.student', 'é\u2028', '9' * 400),
)


class Accepted(Exception):
  """Raised after all checks, where the run would write its first file."""


@pytest.fixture
def start(run_main, letters, teacher, tmp_path, monkeypatch):
  """Starts a run, and ends it before it writes its first file."""

  def stop(*args):
    raise Accepted

  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a_file').touch()
  monkeypatch.setattr(run_folder, 'save_manifest', stop)
  monkeypatch.setattr(
    iterators.TrainIterator, '__init__', lambda *_, **__: None
  )
  command = (
    GKD,
    *(flag for flag in SMALL if not re.search('(TRAIN|WARMUP)_STEPS', flag)),
    *gin_flags(
      MODEL_DIR=tmp_path / 'run',
      INITIAL_CHECKPOINT_PATH=teacher,
      TEACHER_CHECKPOINT_PATH=teacher,
    ),
  )
  return lambda *arguments: run_main(*command, *arguments)


@pytest.fixture(scope='module')
def macros(run_main):
  """The names of all settings of an experiment."""
  shown = run_main(
    GKD,
    *gin_flags(MODEL_DIR='x'),
    *gin_flags(INITIAL_CHECKPOINT_PATH='x', TEACHER_CHECKPOINT_PATH='x'),
    '--dry_run',
  )
  names = re.findall(r'^([A-Z][A-Z_0-9]*) =', shown.out, re.MULTILINE)
  assert {'TRAIN_STEPS', 'STUDENT_DATA_FRACTION', 'EMB_DIM'} < {*names}
  return names


def is_told(finished, name, value):
  """Whether a run ended with one message that names the wrong setting."""
  before, message = re.split('^Error: ', finished.err, flags=re.MULTILINE)
  # The parameter that takes it may be called otherwise: T5Config.dtype.
  words = [word for word in name.split('_') if len(word) > 3]
  unknown = value.strip('@%()').split('.')[0]
  parts = [name, *words, *(part for part in (value, unknown) if len(part) > 3)]
  return (
    finished.code == 1
    and 'Traceback' not in finished.err
    and any(part.lower() in message.lower() for part in parts)
  )


@pytest.mark.parametrize('seed', range(2))
def test_any_value_of_any_setting_is_accepted_or_refused_by_name(
  start, macros, seed, tmp_path
):
  rng = random.Random(seed)

  for name in macros:
    value = rng.choice(VALUES)
    try:
      finished = start(f'--gin.{name}={value}')
    except Accepted:
      for made in {*tmp_path.iterdir()} - {tmp_path / 'a_file'}:
        shutil.rmtree(made)
      continue
    assert is_told(finished, name, value), (name, value, finished.err)
    assert os.listdir(tmp_path) == ['a_file']


@pytest.mark.parametrize(
  'bindings',
  [
    (
      'experiment.Optimization.optimizer=@optax.adamw',
      'optax.adamw.mu_dtype="bfloat16"',
    ),
    ('mine/rate=0.1', 'LEARNING_RATE=%mine/rate'),
  ],
)
def test_what_gin_allows_and_the_function_takes_is_accepted(start, bindings):
  with pytest.raises(Accepted):
    start(*(f'--gin.{binding}' for binding in bindings))


@pytest.mark.parametrize(
  'binding, message',
  [
    ('BATCH_SIZE=True', 'BATCH_SIZE must be a whole number, got True.'),
    ('EVAL_PERIOD=1.5', 'EVAL_PERIOD must be a whole number, got 1.5.'),
    (
      'LEARNING_RATE=x',
      "LEARNING_RATE must be a finite number or None, got 'x'.",
    ),
    ('DROPOUT_RATE=1e400', 'DROPOUT_RATE must be a finite number, got inf.'),
    ('MODEL_DIR=3', 'MODEL_DIR must be a text, got 3.'),
    ('TRAIN_STEPS=%TRAIN_STEPS', 'TRAIN_STEPS is set to itself: %TRAIN_STEPS.'),
    ('EMB_DIM=0', 'T5Config.emb_dim must be 1 or more, got 0.'),
    ('NUM_DECODER_LAYERS=-1', 'T5Config.num_decoder_layers must be 0 or more'),
    (
      'experiment.Optimization.max_grad_norm=0',
      'experiment.Optimization.max_grad_norm must be above 0, or None for',
    ),
    ('RANDOM_SEED=-1', 'RANDOM_SEED must be a whole number, 0 or more, got -1'),
    (
      'DIVERGENCE=@policies.student',
      'Objective.divergence must be a function of teacher_logits and student_l',
    ),
    (
      'experiment.Optimization.optimizer=@experiment.Keep',
      'experiment.Optimization.optimizer must return an optax optimizer',
    ),
    (
      'MIXTURE_OR_TASK_MODULE=./my.py',
      "MIXTURE_OR_TASK_MODULE: './my.py' is not the name of a Python module",
    ),
    ('TRAIN_STEPS=1+2j', '--gin.TRAIN_STEPS=1+2j is not a gin value'),
    ('STUDENT=3', 'STUDENT must be the shape of a model, such as @t5.T5C'),
  ],
)
def test_what_a_setting_cannot_be_is_refused(start, binding, message):
  finished = start(f'--gin.{binding}')

  assert finished.code == 1
  # A line before it may name the flag that is replaced.
  assert f'\nError: {message}' in f'\n{finished.err}'


@pytest.mark.parametrize(
  'folder, said',
  [
    ('gs://bucket/run', 'a run folder must be on a file system. Mount the'),
    ('/dev/null/run', '/dev/null is a file, not a folder.'),
    ('/proc/nobody/run', '/proc/nobody: No such file or directory.'),
    ('x' * 300, 'File name too long.'),
    ("''", 'is empty.'),
    ('~nobody_has_this_name/run', 'is not the home folder of a user.'),
    ('a\nb', 'a control character'),
  ],
)
def test_a_folder_that_cannot_be_written_is_refused(start, folder, said):
  finished = start(f'--gin.MODEL_DIR={folder}')

  assert finished.code == 1
  *_, message = finished.err.splitlines()
  assert message.startswith('Error: MODEL_DIR ') and said in message
  assert not os.path.exists('gs:')


# --- Damaged folders ----------------------------------------------------------


def emptied(path, rng):
  os.truncate(path, 0)


def cut_off(path, rng):
  os.truncate(path, path.stat().st_size // 2)


def garbage(path, rng):
  path.write_bytes(rng.randbytes(path.stat().st_size + 1))


def one_bit_flipped(path, rng):
  content = bytearray(path.read_bytes() or b'x')
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def removed(path, rng):
  path.unlink()


def a_folder(path, rng):
  path.unlink()
  path.mkdir()


DAMAGES = (emptied, cut_off, garbage, one_bit_flipped, removed, a_folder)


@pytest.fixture(scope='module')
def train_six(train_letters):
  def run(folder):
    return train_letters(
      folder,
      total_steps=6,
      checkpoint_period=2,
      keep_checkpoints=3,
      eval_dataset=train_letters.dataset('validation'),
      eval_period=2,
      best_metric='greedy/error',
      config_text=lambda: 'SEED = 0\n',
    )

  return run


@pytest.fixture(scope='module')
def interrupted(train_six, tmp_path_factory):
  """The folder of a run killed in its fifth step, and the complete run."""
  batches = []
  take = iterators.TrainIterator.__next__

  def take_or_die(self):
    batches.append(None)
    if len(batches) == 5:
      raise KeyboardInterrupt
    return take(self)

  folder = tmp_path_factory.mktemp('interrupted')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(iterators.TrainIterator, '__next__', take_or_die)
    with pytest.raises(KeyboardInterrupt):
      train_six(folder)
  wait_for(folder / 'checkpoint_4')
  whole = tmp_path_factory.mktemp('whole')
  train_six(whole)
  return folder, arrays(whole)


def wait_for(folder, seconds=30.0):
  """Orbax writes in the background, and renames the folder at the end."""
  deadline = time.monotonic() + seconds
  while not folder.exists():
    assert time.monotonic() < deadline, f'{folder} did not appear'
    time.sleep(0.05)


def arrays(run_dir):
  """The arrays of a run's newest checkpoint."""
  with ocp.StandardCheckpointer() as checkpointer:
    return {
      item: checkpointer.restore(checkpoint.find(run_dir) / item)
      for item in ('params', 'opt_state')
    }


def contents_of_checkpoints(folder):
  return {
    path.read_bytes()
    for path in folder.glob('*checkpoint_*/**/*')
    if path.is_file()
  }


def start_damaged(train_six, interrupted, folder, name, damage, rng):
  """Damages a file of the run, and starts it again; returns what it said.

  It must end as the whole run did, or be refused by name.
  """
  before, want = interrupted
  shutil.copytree(before, folder)
  damage(folder / name, rng)
  there = contents_of_checkpoints(folder)
  what = f'{damage.__name__}: {name}'
  try:
    said = train_six(folder)
  except (ValueError, OSError) as e:
    assert str(folder) in str(e), what
    said = str(e)
  else:
    jax.tree.map(np.testing.assert_array_equal, arrays(folder), want)
  assert contents_of_checkpoints(folder) >= there, what
  return said


@pytest.mark.parametrize('seed', range(1))
def test_a_run_goes_on_from_what_is_whole_or_says_what_is_not(
  train_six, interrupted, tmp_path, seed
):
  rng = random.Random(seed)
  files = sorted(
    path.relative_to(interrupted[0])
    for path in interrupted[0].rglob('*')
    if path.is_file()
  )

  for i, damage in enumerate(DAMAGES):
    name = rng.choice(files)
    if damage is one_bit_flipped and 'ocdbt.process_0' in name.parts:
      continue  # there are no checksums of arrays
    start_damaged(train_six, interrupted, tmp_path / str(i), name, damage, rng)


# Parts of a checkpoint that is read: array data, and what describes them.
PARTS = (
  'params/ocdbt.process_0/d/*',
  'params/manifest.ocdbt',
  'params/_METADATA',
  'description/metadata',
)


def damage_each(damage, files, rng):
  """Damages files; of a pattern of array data all that it matches."""
  assert files
  for path in files:
    damage(path, rng)


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('damage', [garbage])
def test_a_damaged_newest_checkpoint_is_set_aside(
  train_six, interrupted, tmp_path, part, damage
):
  before, want = interrupted
  shutil.copytree(before, tmp_path / 'run')
  newest = tmp_path / 'run' / 'checkpoint_4'
  damage_each(damage, list(newest.glob(part)), random.Random(0))

  said = train_six(tmp_path / 'run')

  assert 'Resuming after step 2.' in said
  assert (tmp_path / 'run' / 'damaged_checkpoint_4').is_dir()
  jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / 'run'), want)


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('damage', [emptied, garbage])
def test_a_damaged_teacher_is_refused(start, teacher, tmp_path, part, damage):
  shutil.copytree(teacher, tmp_path / 'damaged')
  files = list((tmp_path / 'damaged' / 'checkpoint_0').glob(part))
  damage_each(damage, files, random.Random(0))

  finished = start(f'--gin.TEACHER_CHECKPOINT_PATH={tmp_path}/damaged')

  assert finished.code == 1
  (message,) = re.findall('^Error: .*', finished.err, re.MULTILINE)
  assert f'TEACHER_CHECKPOINT_PATH: {tmp_path}/damaged/checkpoint' in message
  assert 'cannot be read (' in message or 'is damaged: ' in message
  assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def exported(run_main, teacher, tmp_path_factory):
  """The teacher as a Hugging Face folder."""
  folder = tmp_path_factory.mktemp('exported') / 'model'
  finished = run_main(
    '--run_mode=export',
    *gin_flags(
      CHECKPOINT_PATH=teacher, EXPORT_FORMAT='huggingface', OUTPUT_DIR=folder
    ),
  )
  assert finished.code == 0, finished.err
  return folder


@pytest.mark.parametrize('damage', [emptied, cut_off, garbage, removed])
@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
def test_a_damaged_hugging_face_folder_is_refused(
  start, exported, tmp_path, file, damage
):
  shutil.copytree(exported, tmp_path / 'damaged')
  damage(tmp_path / 'damaged' / file, random.Random(0))

  finished = start(f'--gin.TEACHER_CHECKPOINT_PATH={tmp_path}/damaged')

  assert finished.code == 1
  (message,) = re.findall('^Error: .*', finished.err, re.MULTILINE)
  assert f'{tmp_path}/damaged' in message
  assert not (tmp_path / 'run').exists()


# --- A full disk --------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
  """A folder on a disk of 4 MiB."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', folder],
    capture_output=True,
    text=True,
  )
  if mounted.returncode:
    pytest.skip(f'no small disk can be mounted here: {mounted.stderr.strip()}')
  yield folder
  subprocess.run(['umount', '--lazy', folder], check=True)


def fill(path, left):
  """Fills the disk of a file except for a number of bytes."""
  with path.open('wb', buffering=0) as file:
    with contextlib.suppress(OSError):
      while True:
        file.write(bytes(4096))
  os.truncate(path, max(0, path.stat().st_size - left))


@pytest.fixture(scope='module')
def finish(run_main, letters, tmp_path_factory):
  """Runs an experiment until it ends or fails."""

  def finish(folder):
    return run_main(STUDENT, *SMALL, *gin_flags(MODEL_DIR=folder))

  return finish


@pytest.fixture(scope='module')
def undisturbed(finish, tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  finished = finish(folder / 'run')
  assert finished.code == 0, finished.err
  return folder / 'run'


def results(run_dir):
  """Returns the metrics of a run, except times."""
  lines = metrics_lib.read(run_dir)
  lines.append(json.loads((run_dir / 'eval_test.json').read_text()))
  return [
    {name: line[name] for name in line if 'second' not in name}
    for line in lines
  ]


@pytest.mark.parametrize(
  'batch, left',
  [
    (3, 0),  # before the metrics of the second step
    (3, 60_000),  # in the checkpoint of the second step, or the third
  ],
)
def test_a_run_whose_disk_was_full_ends_as_if_it_had_not_been(
  finish, undisturbed, small_disk, monkeypatch, batch, left
):
  batches = []
  take = iterators.TrainIterator.__next__

  def take_and_fill(self):
    batches.append(None)
    if len(batches) == batch:
      fill(small_disk / 'others', left)
    return take(self)

  monkeypatch.setattr(iterators.TrainIterator, '__next__', take_and_fill)

  failed = finish(small_disk / 'run')

  assert failed.code == 1
  *_, message = failed.err.splitlines()
  assert message.startswith(
    f'Error: MODEL_DIR {small_disk}/run: the disk is full'
  )
  assert 'Traceback' not in failed.err
  (small_disk / 'others').unlink()
  again = finish(small_disk / 'run')
  assert again.code == 0, again.err
  assert 'Resuming after step' in again.err
  jax.tree.map(
    np.testing.assert_array_equal,
    arrays(small_disk / 'run'),
    arrays(undisturbed),
  )
  assert results(small_disk / 'run') == results(undisturbed)


def test_a_run_whose_disk_is_full_from_the_start_can_be_started_later(
  finish, small_disk
):
  fill(small_disk / 'others', 0)

  failed = finish(small_disk / 'run')

  assert failed.code == 1
  assert f'Error: MODEL_DIR {small_disk}/run: the disk is full' in failed.err
  (small_disk / 'others').unlink()
  assert finish(small_disk / 'run').code == 0
