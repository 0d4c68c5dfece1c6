# SPDX-License-Identifier: Apache-2.0
"""Errors of a run before anything is compiled or written."""

import dataclasses
import re
import shutil
import types

import pytest

from gkd_jax import build
from gkd_jax.checkpoints import pretrained
from gkd_jax.data import datasets
from gkd_jax.distill import (
  divergences,
  objectives,
  policies,
  rewards,
  teachers,
)
from gkd_jax.models.t5 import T5Config
from gkd_jax.runtime import pins
from tests import conftest, experiments


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
  """An entailment model of another shape than the student's."""
  folder = tmp_path_factory.mktemp('judge')
  conftest.save_model(folder, T5Config(260, 8, 1, 4, 8, 1, 1))
  return folder


@pytest.fixture
def refused(train_letters, tmp_path):
  """Calls train, which must fail; returns its message."""

  def refused(**changes):
    folder = tmp_path / 'run'
    before = conftest.tree_of(folder)
    with conftest.names_of_compiled() as compiled:
      with pytest.raises(ValueError) as error:
        train_letters(folder, **changes)
    assert compiled == []
    assert conftest.tree_of(folder) == before
    return str(error.value)

  return refused


@pytest.mark.parametrize('num_data_shards', [3, 16])
def test_the_shards_of_the_data_have_equal_parts_of_a_batch(
  refused, num_data_shards
):
  message = refused(num_data_shards=num_data_shards)

  assert (
    f'experiment.Data.num_shards {num_data_shards} must divide BATCH_SIZE 8'
    in message
  )


def test_a_batch_must_be_divisible_by_the_devices(refused):
  three = types.SimpleNamespace(shape={'data': 3, 'model': 1})

  assert 'times the 3 devices of the data axis' in refused(mesh=lambda: three)


@pytest.mark.parametrize('split', ['eval_dataset', 'final_eval_dataset'])
def test_an_evaluated_batch_must_be_divisible_by_the_devices(
  refused, train_letters, split
):
  two = types.SimpleNamespace(shape={'data': 2, 'model': 1})
  odd = train_letters.dataset('validation', batch_size=5)

  message = refused(mesh=lambda: two, **{split: odd})

  assert 'EVAL_BATCH_SIZE 5 must be divisible by the 2 devices' in message


def test_a_batch_that_two_devices_share_must_have_even_parts(refused):
  two = types.SimpleNamespace(shape={'data': 2, 'model': 1})

  message = refused(num_microbatches=8, mesh=lambda: two)

  assert 'num_microbatches 8 times the 2' in message


def test_the_student_must_embed_the_whole_vocabulary(refused):
  small = dataclasses.replace(experiments.STUDENT, vocab_size=256)

  message = refused(student=small)

  assert (
    "embeds 256 ids, but the vocabulary of task 'letters' has 259" in message
  )
  assert 'VOCAB_SIZE' in message


@pytest.mark.parametrize(
  'dataset', ['train_dataset', 'eval_dataset', 'final_eval_dataset']
)
def test_an_empty_split_is_refused(refused, train_letters, dataset):
  message = refused(**{dataset: train_letters.dataset('empty')})

  assert message == "Split 'empty' of task 'letters' is empty."


def test_a_teachers_outputs_for_what_is_evaluated_are_refused(
  refused, train_letters, tmp_path
):
  written = conftest.write_predictions(
    tmp_path / 'predictions_test.jsonl',
    [([5, 1], [6, 1])],
    train_letters.dataset('train'),
    split='test',
  )

  message = refused(
    train_dataset=written, final_eval_dataset=train_letters.dataset('test')
  )

  assert "was written for the split 'test', on which this run is eva" in message


def test_predictions_of_another_task_are_refused(
  refused, train_letters, tmp_path
):
  written = conftest.write_predictions(
    tmp_path / 'predictions_train.jsonl',
    [([5, 1], [6, 1])],
    dataclasses.replace(
      train_letters.dataset('train'), mixture_or_task_name='arithmetic_cot'
    ),
  )

  message = refused(
    train_dataset=train_letters.dataset(
      'train', predictions=written.predictions
    )
  )

  assert "written for task 'arithmetic_cot'; this run has 'letters'" in message


def test_a_checkpoint_path_where_nothing_is(refused, tmp_path):
  message = refused(initial_checkpoint_path=str(tmp_path / 'nowhere'))

  assert message.startswith('INITIAL_CHECKPOINT_PATH: ')
  assert 'nowhere is not there' in message


def test_an_initial_checkpoint_of_another_shape(refused, teacher_run):
  message = refused(
    initial_checkpoint_path=str(teacher_run),
    student=dataclasses.replace(experiments.STUDENT, mlp_dim=11),
  )

  assert 'mlp_dim: 10 in the checkpoint, 11 in STUDENT' in message


def test_a_teacher_of_another_shape_than_said(refused, teacher_run):
  message = refused(
    teacher_checkpoint_path=str(teacher_run),
    teacher=dataclasses.replace(
      experiments.STUDENT, mlp_dim=11, dtype='bfloat16'
    ),
  )

  # Its type of numbers is the student's, whatever is said.
  assert message.endswith(
    'does not fit the model:\n  mlp_dim: 10 in the checkpoint, 11 in '
    'experiment.Teacher.config (None takes any)'
  )


def test_a_teacher_with_another_vocabulary(refused, tmp_path):
  conftest.save_model(
    tmp_path / 'other', experiments.STUDENT, 'SentencePiece 264 ids'
  )

  message = refused(teacher_checkpoint_path=str(tmp_path / 'other'))

  assert (
    'vocabulary: SentencePiece 264 ids in the checkpoint, ByteVocabulary 259 '
    'ids wanted' in message
  )


def test_the_folder_of_another_run_is_refused_with_what_differs(
  refused, tmp_path
):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.gin').write_text('SEED = 0\nBATCH_SIZE = 8\n')

  message = refused(config_text=lambda: 'SEED = 1\nBATCH_SIZE = 8\n')

  assert 'holds another run' in message
  assert '  -SEED = 0\n  +SEED = 1\n' in message
  assert 'BATCH_SIZE' not in message


def test_a_long_path_to_the_run_is_no_difference(refused, tmp_path):
  def config(seed, folder):
    return f"MODEL_DIR = \\\n    '/{folder}/of/runs'\nSEED = {seed}\n"

  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.gin').write_text(config(0, 'old'))

  message = refused(config_text=lambda: config(1, 'new'))

  assert '  -SEED = 0\n  +SEED = 1\n' in message
  assert 'of/runs' not in message


_MODEL = 'description/metadata'


def pinned(folder, teacher, step, files):
  """Writes a run that was started with a checkpoint of a teacher's run."""
  folder.mkdir()
  (folder / 'config.gin').touch()
  pin = pins.Pin(files, str(teacher), step)
  pins.save(folder, {'TEACHER_CHECKPOINT_PATH': pin})


def test_a_teacher_that_changed_since_the_run_started_is_refused(
  refused, teacher_run, tmp_path
):
  pinned(tmp_path / 'run', teacher_run, 'checkpoint_0', {_MODEL: 'old'})

  message = refused(teacher_checkpoint_path=str(teacher_run))

  assert f'MODEL_DIR {tmp_path}/run was started with other files' in message
  file = f'{teacher_run}/checkpoint_0/{_MODEL}'
  assert f'TEACHER_CHECKPOINT_PATH: {file} was old, is ' in message


def test_a_teachers_checkpoint_that_was_removed_is_refused(
  refused, teacher_run, tmp_path
):
  pinned(tmp_path / 'run', teacher_run, 'checkpoint_7', {})

  message = refused(teacher_checkpoint_path=str(teacher_run))

  assert f'started with checkpoint_7 of {teacher_run}, which does' in message


def test_a_run_keeps_the_checkpoint_of_a_teacher_that_is_trained_on(
  teacher_run, tmp_path
):
  run = shutil.copytree(teacher_run, tmp_path / 'teacher')
  shutil.copytree(run / 'checkpoint_0', run / 'checkpoint_9')
  experiment = experiments.experiment(
    student=experiments.STUDENT,
    train_dataset=datasets.DatasetConfig('letters', conftest.LENGTHS, 8),
    policy=policies.dataset(),
    objective=objectives.Objective(divergences.forward_kl),
    learning_rate=1e-3,
    total_steps=2,
    teacher_checkpoint_path=str(run),
  )
  at_start = {'TEACHER_CHECKPOINT_PATH': pins.Pin({}, str(run), 'checkpoint_0')}

  resumed = build.with_pinned_steps(experiment, at_start)

  assert resumed.teacher.checkpoint_path == f'{run}/checkpoint_0'
  assert build.with_pinned_steps(experiment, None) == experiment

  several = dataclasses.replace(
    experiment.teacher, checkpoint_path={'a': str(run), 'b': str(run)}
  )
  resumed = build.with_pinned_steps(
    dataclasses.replace(experiment, teacher=several),
    {"TEACHER_CHECKPOINT_PATH['b']": pins.Pin({}, str(run), 'checkpoint_0')},
  )

  assert resumed.teacher.checkpoint_path == {
    'a': str(run),
    'b': f'{run}/checkpoint_0',
  }


def test_a_pin_of_our_checkpoint_is_of_what_a_model_is_read_from(teacher_run):
  source = pretrained.open_checkpoint(str(teacher_run))

  pin = pretrained.pin(source, str(teacher_run))

  assert pin.step == 'checkpoint_0'
  assert 'description/metadata' in pin.files
  assert {name.split('/')[0] for name in pin.files} == {'description', 'params'}


def test_a_folder_of_checkpoints_of_nobody_knows_what(refused, tmp_path):
  (tmp_path / 'run' / 'checkpoint_5').mkdir(parents=True)
  (tmp_path / 'run' / 'checkpoint_5' / 'precious').write_text('x')

  assert 'is not empty and has no config.gin' in refused()


@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    (
      experiments.learning_from(rewards.exact_match('')),
      'exact_match.marker is',
    ),
    (
      experiments.learning_from(
        rewards.Reward(lambda v, i, m: lambda b, y, p: y.weights)
      ),
      r'shape \(8,\), but returns shape \(8, 7\)',
    ),
  ],
)
def test_a_reward_that_cannot_be_learnt_from(refused, changes, text):
  message = refused(
    **experiments.learning_from(rewards.exact_match()) | changes
  )

  assert re.search(text, message)


def test_a_limit_that_would_cut_an_output_that_is_to_be_judged(refused, judge):
  message = refused(
    **experiments.learning_from(experiments.NLI(max_input_len=12)),
    reward_checkpoint_path=str(judge),
  )

  assert 'max_input_len is 12, but an output can be 7 tokens' in message


def test_a_model_that_gives_rewards_with_another_vocabulary(refused, tmp_path):
  conftest.save_model(
    tmp_path / 'other', experiments.STUDENT, 'SentencePiece 264 ids'
  )

  message = refused(
    **experiments.learning_from(experiments.NLI()),
    reward_checkpoint_path=str(tmp_path / 'other'),
  )

  assert 'vocabulary: SentencePiece 264 ids in the checkpoint' in message


def test_several_teachers_of_different_vocabularies(refused, judge, tmp_path):
  conftest.save_model(
    tmp_path / 'other', experiments.STUDENT, 'SentencePiece 264 ids'
  )
  paths = {'math': str(judge), 'code': str(tmp_path / 'other')}

  message = refused(
    teacher_checkpoint_path=paths, method_teacher=teachers.averaged(paths)
  )

  assert f'{paths["code"]}/checkpoint_0 does not fit' in message
  assert 'SentencePiece 264 ids in the checkpoint, ByteVocab' in message


def test_settings_of_several_teachers_are_apart():
  model = build.Model({'a': 'A', 'b': 'B'}, {'a': 1, 'b': 2}, {'a': 3, 'b': 4})

  found = build.apart(model)

  assert found['b'] == ('B', 2, 4)
  assert build.together(found) == model
  assert build.together({'': found['a']}) == found['a']
