# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

from gkd_jax.checkpoints import checkpoint
from gkd_jax.distill.state import TrainState
from gkd_jax.models.t5 import T5
from gkd_jax.runtime import files
from tests import conftest, tiny

pytestmark = pytest.mark.slow  # compiles models

DESCRIPTION = checkpoint.ModelDescription(tiny.config(), 'letters, 19 ids')


class Counter:
  """A fake data iterator; its position is a number in a file."""

  def __init__(self, position=0):
    self.position = position

  def save(self, directory):
    (pathlib.Path(directory) / 'position').write_text(str(self.position))

  def restore(self, directory):
    self.position = int((pathlib.Path(directory) / 'position').read_text())


def state_at(step: int, seed: int = 0, **changes) -> TrainState:
  """A state; its optimizer's arrays are not zeros, and differ by step."""
  params = tiny.params(T5(tiny.config(**changes)), seed)
  opt_state = jax.tree.map(
    lambda x: x + step, optax.adamw(1e-3).init(jax.tree.map(jnp.sin, params))
  )
  return TrainState(jnp.int32(step), params, opt_state)


def abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def save_steps(run_dir, metrics_by_step, description=DESCRIPTION, **keep):
  keep = {'best_mode': 'min'} | keep
  checkpoints = checkpoint.Checkpoints(run_dir, description, **keep)
  for step, metrics in metrics_by_step.items():
    checkpoints.save(
      state_at(step), Counter(step), train_seconds=1.5 * step, metrics=metrics
    )
  checkpoints.close()


def assert_equal(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  """A run with one checkpoint, of step 7."""
  folder = tmp_path_factory.mktemp('run') / conftest.ODD_NAME
  save_steps(folder, {7: None})
  return folder


def folders(run_dir):
  return sorted(path.name for path in run_dir.iterdir())


# --- A run that goes on -----------------------------------------------------


def test_all_of_a_state_comes_back(run_dir):
  want = state_at(7)
  iterator = Counter()

  saved = checkpoint.Checkpoints(run_dir, DESCRIPTION).restore(
    abstract(state_at(0, seed=1)), iterator
  )

  assert_equal(saved.state, want)
  assert jax.tree.structure(saved.state) == jax.tree.structure(want)
  assert iterator.position == 7
  assert saved.train_seconds == 10.5


def test_the_newest_checkpoint_is_restored(tmp_path):
  save_steps(tmp_path, {9: {'wer': 1.0}, 10: {'wer': 2.0}}, best_metric='wer')

  checkpoints = checkpoint.Checkpoints(tmp_path, DESCRIPTION)
  saved = checkpoints.restore(abstract(state_at(0)), Counter())

  assert folders(tmp_path) == ['checkpoint_10', 'checkpoint_9']
  assert checkpoints.latest_step() == 10
  assert saved.state.step == 10


def test_a_new_run_has_nothing_to_restore(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path / 'new', DESCRIPTION)

  assert checkpoints.latest_step() is None
  assert checkpoints.restore(abstract(state_at(0)), Counter()) is None


def test_a_step_that_is_saved_already_is_not_saved_again(run_dir):
  checkpoints = checkpoint.Checkpoints(run_dir, DESCRIPTION)

  checkpoints.save(state_at(7, seed=5), Counter(99), train_seconds=0.0)
  checkpoints.close()

  iterator = Counter()
  saved = checkpoint.Checkpoints(run_dir, DESCRIPTION).restore(
    abstract(state_at(0)), iterator
  )
  assert iterator.position == 7
  assert_equal(saved.state.params, state_at(7).params)


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
  save_steps(tmp_path, {2: None})
  whole = tmp_path / 'checkpoint_2'
  # Orbax writes under such a name, and renames at the end.
  shutil.copytree(whole, tmp_path / 'checkpoint_3.orbax-checkpoint-tmp')

  assert checkpoint.find(tmp_path) == whole
  assert checkpoint.Checkpoints(tmp_path, DESCRIPTION).latest_step() == 2


# --- Damage -------------------------------------------------------------------


def cut_off(folder):
  """Truncates each file to half."""
  for path in folder.rglob('*'):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
  'part', ['', 'params', 'opt_state', 'data', 'description']
)
def test_the_one_before_a_damaged_checkpoint_is_restored(
  tmp_path, part, capsys
):
  save_steps(tmp_path, {1: None, 2: None}, keep=2)
  cut_off(tmp_path / 'checkpoint_2' / part)

  iterator = Counter()
  saved = checkpoint.Checkpoints(tmp_path, DESCRIPTION).restore(
    abstract(state_at(0)), iterator
  )

  assert_equal(saved.state, state_at(1))
  assert iterator.position == 1
  # Nothing is lost, and step 2 can be saved again.
  assert folders(tmp_path) == ['checkpoint_1', 'damaged_checkpoint_2']
  assert 'checkpoint_2 cannot be read' in capsys.readouterr().err


def flip_a_bit(folder):
  """Flips one bit in the middle of the largest file, of arrays if any are."""
  names = json.loads((folder / 'crc32.json').read_text())
  names = [name for name in names if '/d/' in name] or names
  path = max(
    (folder / name for name in names), key=lambda path: path.stat().st_size
  )
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)
  return path


@pytest.mark.parametrize('part', ['params', 'opt_state', 'data', 'description'])
def test_a_flipped_bit_is_damage(tmp_path, part, capsys):
  save_steps(tmp_path, {1: None, 2: None}, keep=2)
  path = flip_a_bit(tmp_path / 'checkpoint_2' / part)

  saved = checkpoint.Checkpoints(tmp_path, DESCRIPTION).restore(
    abstract(state_at(0)), Counter()
  )

  assert saved.state.step == 1
  said = capsys.readouterr().err
  assert f'{path} is damaged' in said or part == 'description'


def test_parameters_with_a_flipped_bit_are_refused(tmp_path):
  save_steps(tmp_path, {1: None})
  path = flip_a_bit(tmp_path / 'checkpoint_1' / 'params')

  with pytest.raises(ValueError) as error:
    load(tmp_path / 'checkpoint_1')

  assert f'{path} is damaged' in str(error.value)


@pytest.mark.parametrize('part', ['', 'params'])
def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_afresh(
  tmp_path, part
):
  save_steps(tmp_path, {1: None, 2: None}, keep=2)
  for name in folders(tmp_path):
    cut_off(tmp_path / name / part)

  with pytest.raises(ValueError, match='No checkpoint of this run can be read'):
    checkpoint.Checkpoints(tmp_path, DESCRIPTION).restore(
      abstract(state_at(0)), Counter()
    )

  assert folders(tmp_path) == ['checkpoint_1', 'checkpoint_2']


def test_a_step_may_be_damaged_again(tmp_path):
  for _ in range(2):
    save_steps(tmp_path, {1: None, 2: None}, keep=2)
    cut_off(tmp_path / 'checkpoint_2')
    checkpoint.Checkpoints(tmp_path, DESCRIPTION)

  assert folders(tmp_path) == [
    'checkpoint_1',
    'damaged_checkpoint_2',
    'damaged_checkpoint_2_again',
  ]


@pytest.mark.parametrize(
  'error',
  [
    files.CheckpointMismatch('the data of another'),
    RuntimeError('RESOURCE_EXHAUSTED: no memory'),
    OSError(24, 'Too many open files'),
    MemoryError(),
  ],
  ids=lambda error: str(error)[:9],
)
def test_a_checkpoint_is_not_called_damaged_for_another_reason(tmp_path, error):
  save_steps(tmp_path, {1: None, 2: None}, keep=2)

  class Refusing(Counter):
    def restore(self, directory):
      raise error

  with pytest.raises(type(error)):
    checkpoint.Checkpoints(tmp_path, DESCRIPTION).restore(
      abstract(state_at(0)), Refusing()
    )

  assert folders(tmp_path) == ['checkpoint_1', 'checkpoint_2']


def test_saving_does_not_ask_jax_where_to_stop(tmp_path, monkeypatch):
  # It would ask with a step, and the training loop asks with another number.
  def asked(step):
    raise AssertionError(f'asked with {step}')

  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', asked)

  save_steps(tmp_path, {1: None, 2: None}, keep=2)

  assert folders(tmp_path) == ['checkpoint_1', 'checkpoint_2']


def test_an_evaluation_that_was_made_up_for_is_not_asked_for_again(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, DESCRIPTION)
  checkpoints.save(state_at(1), Counter(1), train_seconds=0.0, to_evaluate=True)
  checkpoints.close()

  def restored():
    checkpoints = checkpoint.Checkpoints(tmp_path, DESCRIPTION)
    saved = checkpoints.restore(abstract(state_at(0)), Counter())
    return checkpoints, (saved.to_evaluate, saved.late_metrics)

  checkpoints, before = restored()
  checkpoints.add_metrics(1, {'wer': 3.0})

  # The saved state does not know them yet.
  assert (before, restored()[1]) == ((True, None), (False, {'wer': 3.0}))


def test_metrics_that_come_later_count(tmp_path):
  save_steps(tmp_path, {1: {'wer': 30.0}, 2: None}, keep=2, best_metric='wer')

  checkpoints = checkpoint.Checkpoints(
    tmp_path, DESCRIPTION, keep=1, best_metric='wer', best_mode='min'
  )
  checkpoints.add_metrics(2, {'wer': 10.0})
  for step in (3, 4):
    checkpoints.save(
      state_at(step), Counter(step), train_seconds=0.0, metrics={'wer': 20.0}
    )
  checkpoints.close()

  assert folders(tmp_path) == ['checkpoint_2', 'checkpoint_4']


# --- Which checkpoints are kept ---------------------------------------------


WER = {1: {'wer': 30.0}, 2: {'wer': 10.0}, 3: {'wer': 40.0}, 4: {'wer': 20.0}}


@pytest.mark.parametrize('keep', [1, 3])
def test_the_last_ones_alone_are_kept_without_a_metric(tmp_path, keep):
  save_steps(tmp_path, WER, keep=keep)

  assert folders(tmp_path) == [f'checkpoint_{i}' for i in range(5 - keep, 5)]


@pytest.mark.parametrize('mode, best', [('min', 2), ('max', 3)])
def test_the_last_and_the_best_are_kept(tmp_path, mode, best):
  save_steps(tmp_path, WER, best_metric='wer', best_mode=mode)

  assert folders(tmp_path) == [f'checkpoint_{best}', 'checkpoint_4']


def test_a_checkpoint_that_was_not_evaluated_is_not_the_best(tmp_path):
  save_steps(tmp_path, {1: None, **WER, 5: None}, best_metric='wer')

  assert folders(tmp_path) == ['checkpoint_2', 'checkpoint_5']


@pytest.mark.parametrize('mode', ['min', 'max'])
def test_a_metric_that_is_nan_is_not_the_best(tmp_path, mode):
  nan = {'wer': math.nan}
  steps = {1: nan, 2: {'wer': 20.0}, 3: nan, 4: nan}

  save_steps(tmp_path, steps, best_metric='wer', best_mode=mode)

  assert folders(tmp_path) == ['checkpoint_2', 'checkpoint_4']


def test_the_best_is_remembered_by_a_run_that_goes_on(tmp_path):
  save_steps(tmp_path, WER, best_metric='wer')

  save_steps(tmp_path, {5: {'wer': 15.0}}, best_metric='wer')

  assert folders(tmp_path) == ['checkpoint_2', 'checkpoint_5']


# --- Where a checkpoint is --------------------------------------------------


def test_a_run_folder_means_its_newest_checkpoint(tmp_path):
  save_steps(tmp_path, {9: {'wer': 1.0}, 10: {'wer': 2.0}}, best_metric='wer')

  assert checkpoint.find(tmp_path) == tmp_path / 'checkpoint_10'


def test_a_checkpoint_folder_means_itself(run_dir):
  folder = run_dir / 'checkpoint_7'

  assert checkpoint.find(str(folder)) == folder


def test_a_relative_path_is_found(run_dir, monkeypatch):
  monkeypatch.chdir(run_dir.parent)

  assert checkpoint.find(run_dir.name) == run_dir / 'checkpoint_7'


def test_a_path_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(ValueError, match='nowhere is not there. Give a run fold'):
    checkpoint.find(tmp_path / 'nowhere')


def test_a_folder_without_checkpoints_is_refused(tmp_path):
  with pytest.raises(ValueError, match='holds no checkpoint. Give a run fold'):
    checkpoint.find(tmp_path)


# --- Parameters for another run ---------------------------------------------


def load(path, **changes):
  wanted = abstract(state_at(0, **changes).params)
  return checkpoint.load_params(checkpoint.find(path), wanted)


def test_the_parameters_of_another_run_come_as_they_were(run_dir):
  assert_equal(load(run_dir), state_at(7).params)


def test_a_checkpoint_says_which_model_it_holds(run_dir):
  assert checkpoint.describe(checkpoint.find(run_dir)) == DESCRIPTION


def test_a_checkpoint_is_complete_in_itself(run_dir, tmp_path):
  # Of all files of the run, only the one folder, under another name.
  shutil.copytree(run_dir / 'checkpoint_7', tmp_path / 'my_teacher')

  assert checkpoint.describe(tmp_path / 'my_teacher') == DESCRIPTION
  assert_equal(load(tmp_path / 'my_teacher'), state_at(7).params)


def test_parameters_of_other_shapes_are_refused_first_differences_first(
  run_dir,
):
  # What is wanted has a layer more, and wider ones.
  with pytest.raises(ValueError) as error:
    load(run_dir, num_encoder_layers=2, mlp_dim=21)

  first, *rest, last = str(error.value).splitlines()[1:]
  assert first == (
    '  decoder/layers_0/mlp/wi_0/kernel: (16, 20) in the checkpoint, '
    '(16, 21) wanted'
  )
  assert len(rest) == 4
  # 6 kernels of the layers there were, and the 9 parameters of the new one.
  assert last == '  and 10 more'


def test_parameters_that_are_absent_are_named(run_dir):
  with pytest.raises(
    ValueError, match=r'encoder/layers_1/\S+: absent in the checkpoint, \(16'
  ):
    load(run_dir, num_encoder_layers=2)


def test_a_run_with_another_model_cannot_go_on_from_a_checkpoint(run_dir):
  checkpoints = checkpoint.Checkpoints(run_dir, DESCRIPTION)

  with pytest.raises(ValueError, match=r'\(16, 20\) in the checkpoint'):
    checkpoints.restore(abstract(state_at(0, mlp_dim=21)), Counter())
