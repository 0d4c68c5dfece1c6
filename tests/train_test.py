# SPDX-License-Identifier: Apache-2.0
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from gkd_jax.checkpoints import checkpoint
from gkd_jax.data import iterators
from gkd_jax.decoding import sampler
from gkd_jax.distill import (
  divergences,
  objectives,
  policies,
  rewards,
  teachers,
)
from gkd_jax.evaluation import evaluate, infer
from gkd_jax.models.params import param_shapes
from gkd_jax.models.t5 import T5, T5Config
from gkd_jax.runtime import metrics as metrics_lib
from gkd_jax.runtime.signals import Interrupted
from tests import conftest, experiments

pytestmark = pytest.mark.slow

# How fast it went is not the same twice.
TIMING = {
  'train/steps_per_second',
  'train/target_tokens_per_second',
  'train_seconds',
}
NUM_STEPS = 6
RATE = optax.linear_schedule(3e-2, 1e-2, NUM_STEPS)


def without_timing(line):
  return {name: line[name] for name in line if name not in TIMING}


def arrays(run_dir, item):
  """The arrays of a checkpoint, as stored on disk."""
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(checkpoint.find(run_dir) / item)


@pytest.fixture(scope='module')
def distil(train_letters, teacher_run):
  """A run that uses every source of randomness."""
  return functools.partial(
    train_letters,
    student=experiments.STUDENT,
    # Which rows the student writes is drawn, and what it writes is.
    policy=policies.mixture(0.5, per='sequence'),
    objective=objectives.Objective(divergences.forward_kl),
    teacher_checkpoint_path=str(teacher_run),
    learning_rate=RATE,
    total_steps=NUM_STEPS,
    eval_dataset=train_letters.dataset('validation'),
    final_eval_dataset=train_letters.dataset('test'),
    eval_period=3,
    checkpoint_period=3,
    # A checkpoint lies within the steps of a line.
    log_period=2,
    keep_checkpoints=1,
    # It is what is minimised: its highest value is not the last.
    best_metric='on_dataset_outputs/forward_kl',
    best_mode='max',
    config_text=lambda: 'SEED = 0\n',
  )


@pytest.fixture(scope='module')
def whole(distil, tmp_path_factory):
  """A complete run: its folder, its log, and the compiled programs."""
  folder = tmp_path_factory.mktemp('whole')
  with conftest.names_of_compiled() as compiled:
    said = distil(folder)
  return types.SimpleNamespace(folder=folder, said=said, compiled=compiled)


def kill(distil, folder):
  """Ends a run in its fifth step as SIGKILL would."""

  def die():
    raise KeyboardInterrupt

  with in_step(5, die), pytest.raises(KeyboardInterrupt):
    distil(folder)
  # What a killed process leaves: a line beyond its checkpoint, one cut off.
  lines = metrics_lib.read(folder)
  assert max(line['step'] for line in lines) == 3
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "train/loss": 99.0}\n{"step": 6, "tra')
  wait_for(folder / 'checkpoint_3')


def terminate(distil, folder):
  """Sends SIGTERM to a run in its fifth step."""
  with in_step(5, send_sigterm), pytest.raises(Interrupted) as error:
    distil(folder)
  assert error.value.exit_code == 75
  assert 'after step 5, which is saved' in str(error.value)


def terminate_in_evaluation(distil, folder):
  """Sends SIGTERM to a run that evaluates after its third step."""

  predict = iterators.EvalDataset.predict

  def predict_and_terminate(self, write):
    send_sigterm()
    return predict(self, write)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(iterators.EvalDataset, 'predict', predict_and_terminate)
    with pytest.raises(Interrupted):
      distil(folder)
  last = metrics_lib.read(folder)[-1]
  assert last['step'] == 2
  assert not any(name.startswith('validation/') for name in last)


def damage(distil, folder):
  """Truncates the files of a run's last checkpoint to half."""
  for path in (folder / 'checkpoint_6').rglob('*'):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)
  for name in ('eval_test.json', 'samples_test.json'):
    (folder / name).unlink()


def damage_data_position(distil, folder):
  """Truncates the data position in a run's last checkpoint."""
  (path,) = (folder / 'checkpoint_6' / 'data').glob('*.data-*')
  os.truncate(path, path.stat().st_size // 2)
  for name in ('eval_test.json', 'samples_test.json'):
    (folder / name).unlink()


@contextlib.contextmanager
def in_step(number, action):
  """Calls a function when a run reads the batch of a step."""
  batches = []
  take = iterators.TrainIterator.__next__

  def take_and_act(self):
    batches.append(None)
    if len(batches) == number:
      action()
    return take(self)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(iterators.TrainIterator, '__next__', take_and_act)
    yield


def send_sigterm():
  os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(
  scope='module',
  params=[
    (kill, 3),
    (terminate, 5),
    (terminate_in_evaluation, 3),
    (damage, 3),
    (damage_data_position, 3),
  ],
  ids=lambda param: param[0].__name__,
)
def resumed(request, distil, whole, tmp_path_factory):
  """The same run, interrupted and resumed."""
  end, step = request.param
  folder = tmp_path_factory.mktemp('resumed')
  if end in (damage, damage_data_position):
    shutil.copytree(whole.folder, folder, dirs_exist_ok=True)
  end(distil, folder)
  return types.SimpleNamespace(folder=folder, said=distil(folder), step=step)


def wait_for(folder, seconds=30.0):
  """Orbax writes in the background, and renames the folder at the end."""
  deadline = time.monotonic() + seconds
  while not folder.exists():
    assert time.monotonic() < deadline, f'{folder} did not appear'
    time.sleep(0.05)


# --- A run that was interrupted equals one that was not -----------------------


def test_a_resumed_run_says_where_it_goes_on(resumed):
  assert f'Resuming after step {resumed.step}.' in resumed.said


@pytest.mark.parametrize('item', ['params', 'opt_state'])
def test_a_resumed_run_ends_with_the_same_arrays_bit_for_bit(
  whole, resumed, item
):
  want, got = arrays(whole.folder, item), arrays(resumed.folder, item)

  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_resumed_run_ends_at_the_same_place_in_the_data(
  whole, resumed, train_letters
):
  iterator = iterators.TrainIterator(train_letters.dataset('train'), seed=0)
  batches = []
  for folder in (whole.folder, resumed.folder):
    iterator.restore(checkpoint.find(folder) / 'data')
    batches.append(next(iterator))

  for want, got in zip(*batches, strict=True):
    np.testing.assert_array_equal(got, want)


def test_a_resumed_run_writes_the_same_metrics(whole, resumed):
  want, got = (
    [without_timing(line) for line in metrics_lib.read(run.folder)]
    for run in (whole, resumed)
  )

  assert [line['step'] for line in want] == [2, 3, 4, 6, 6]
  assert got == want


def test_a_resumed_run_has_the_same_final_evaluation(whole, resumed):
  want, got = (
    without_timing(json.loads((run.folder / 'eval_test.json').read_text()))
    for run in (whole, resumed)
  )

  assert want['step'] == NUM_STEPS
  assert got == want


def test_the_final_evaluation_keeps_what_a_metric_says_beside_numbers(whole):
  results = json.loads((whole.folder / 'eval_test.json').read_text())

  assert results['greedy/error_of'] == 'whole words'


def test_what_student_and_teacher_write_is_kept_token_by_token(whole, resumed):
  want, got = (
    json.loads((run.folder / 'samples_test.json').read_text())
    for run in (whole, resumed)
  )

  assert got == want
  assert len(want['examples']) == conftest.NUM_LETTERS['test']
  for example in want['examples']:
    assert example['student'] == ''.join(t['text'] for t in example['tokens'])
    assert all(token['kl'] >= 0.0 for token in example['tokens'])


def test_a_resumed_run_keeps_the_same_checkpoints(whole, resumed):
  want, got = (
    sorted(path.name for path in run.folder.glob('checkpoint_*'))
    for run in (whole, resumed)
  )

  assert got == want


def test_the_comparison_above_is_of_steps_that_differ(whole):
  lines = [m for m in metrics_lib.read(whole.folder) if 'train/loss' in m]

  assert len({line['train/loss'] for line in lines}) == NUM_STEPS // 2
  # Some sequences were the student's, some the dataset's.
  shares = [line['train/on_policy'] for line in lines]
  assert 0.0 < min(shares) and max(shares) < 1.0


def test_a_finished_run_says_so_and_changes_nothing(whole, distil):
  before = conftest.tree_of(whole.folder)

  said = distil(whole.folder)

  assert 'Compiled' not in said
  assert said.splitlines()[-1] == f'Done: {whole.folder}'
  after = conftest.tree_of(whole.folder)
  assert after == before


def test_a_run_folder_may_be_moved(whole, distil, tmp_path):
  shutil.copytree(whole.folder, tmp_path / 'moved')
  config = "# another day\nSEED = 0\nMODEL_DIR = 'moved'\n"

  said = distil(tmp_path / 'moved', config_text=lambda: config)

  assert 'Resuming after step 6.' in said
  assert 'Compiled' not in said


# --- What a run does and leaves -----------------------------------------------


def test_every_program_is_compiled_once_a_run(whole):
  times = collections.Counter(whole.compiled)

  assert times['train_step'] == 1
  # Of the two splits the first is evaluated twice, but compiled once. For the
  # second the teacher writes samples alone.
  assert 1 <= times['measure_batch'] <= 2
  assert times['sample'] <= 4
  assert times['disagreement'] == 1


def test_a_run_leaves_the_documented_files(whole):
  there = {path.name for path in whole.folder.iterdir()}

  assert there - {path.name for path in whole.folder.glob('events.*')} == {
    '.lock',
    'checkpoint_3',
    'checkpoint_6',
    'config.gin',
    'eval_test.json',
    'metrics.jsonl',
    'pins.json',
    'samples_test.json',
    'versions.json',
  }


def test_the_checkpoint_that_is_best_by_the_chosen_metric_is_kept(whole):
  key = 'validation/on_dataset_outputs/forward_kl'
  values = {
    m['step']: m[key] for m in metrics_lib.read(whole.folder) if key in m
  }

  assert sorted(values) == [3, 6]
  assert values[3] > values[6]  # the highest was asked for; 6 is the last
  assert (whole.folder / 'checkpoint_3').is_dir()


def test_layers_as_a_loop_change_no_metric(distil, tmp_path):
  def metrics_of(scan_layers):
    folder = tmp_path / str(scan_layers)
    config = dataclasses.replace(
      experiments.STUDENT, dropout_rate=0.0, scan_layers=scan_layers
    )
    distil(
      folder,
      student=config,
      policy=policies.dataset(),  # evaluation writes, too
      total_steps=2,
      final_eval_dataset=None,
    )
    return [without_timing(line) for line in metrics_lib.read(folder)]

  for got, want in zip(metrics_of(True), metrics_of(False), strict=True):
    assert got == pytest.approx(want, rel=1e-4)  # rounding


def test_the_learning_rate_that_is_logged_is_the_one_of_that_step(whole):
  lines = [m for m in metrics_lib.read(whole.folder) if 'train/loss' in m]

  # The first update is made at the schedule's step 0.
  np.testing.assert_allclose(
    [line['train/learning_rate'] for line in lines],
    [RATE(step) for step in range(1, NUM_STEPS, 2)],
    rtol=1e-6,
  )


def test_the_metrics_are_on_tensorboard_too(whole):
  board = conftest.read_board(whole.folder)

  for line in metrics_lib.read(whole.folder):
    for name in line.keys() - {'step'}:
      # TensorBoard keeps 4 bytes.
      assert (line['step'], name, np.float32(line[name])) in board, name


def test_samples_are_shown_beside_references_and_the_teachers(whole):
  head = '| input | reference | teacher | student |'
  words = conftest.letter_words('validation')

  lines = whole.said.splitlines()
  start = lines.index(head)
  row = lines[start + 2].strip('|').split('|')

  assert [cell.strip() for cell in row[:2]] == [words[0], words[0][::-1]]
  assert len(row) == 4
  assert lines.count(head) == 2  # one an evaluation
  texts = [v for *_, v in conftest.read_board(whole.folder) if head in str(v)]
  assert len(texts) == 2


def test_an_evaluation_has_task_metrics_and_divergences(whole):
  (line, _) = (
    m for m in metrics_lib.read(whole.folder) if 'train/loss' not in m
  )

  assert line.keys() >= {
    'validation/greedy/error',
    'validation/teacher/greedy/error',
    'validation/on_dataset_outputs/forward_kl',
    'validation/on_student_outputs/reverse_kl',
  }


def test_a_part_of_a_split_now_and_then_and_the_whole_at_the_end(
  train_letters, tmp_path, monkeypatch
):
  evaluated = []

  class Evaluation(evaluate.Evaluation):
    def __init__(self, config, *args, **kwargs):
      self.config = config
      super().__init__(config, *args, **kwargs)

    def __call__(self, *args, **kwargs):
      evaluated.append(self.config.num_examples)
      return super().__call__(*args, **kwargs)

  monkeypatch.setattr(evaluate, 'Evaluation', Evaluation)
  whole = train_letters.dataset('validation')

  train_letters(
    tmp_path / 'run',
    total_steps=1,
    eval_dataset=dataclasses.replace(whole, num_examples=3),
    final_eval_dataset=whole,
  )

  assert evaluated == [3, None]


def test_the_student_starts_from_the_checkpoint_it_is_given(
  train_letters, teacher_run, tmp_path
):
  said = train_letters(
    tmp_path / 'run',
    initial_checkpoint_path=str(teacher_run),
    learning_rate=optax.constant_schedule(0.0),
  )

  assert f'parameters, gkd_jax: {teacher_run}/checkpoint_0\n' in said
  want, got = arrays(teacher_run, 'params'), arrays(tmp_path / 'run', 'params')
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_student_is_trained_on_what_its_teacher_wrote(
  train_letters, teacher_run, tmp_path, monkeypatch
):
  """SeqKD: the student is trained on exactly the ids that the teacher wrote."""
  infer.infer(
    str(teacher_run),
    str(tmp_path / 'outputs'),
    train_letters.dataset('train', shuffle=False),
    sampler.ANCESTRAL,
    num_samples=2,
  )
  path = tmp_path / 'outputs' / 'predictions_train.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  batches = []
  next_batch = iterators.TrainIterator.__next__

  def watch(iterator):
    batches.append(next_batch(iterator))
    return batches[-1]

  monkeypatch.setattr(iterators.TrainIterator, '__next__', watch)
  said = train_letters(
    tmp_path / 'run',
    train_dataset=train_letters.dataset('train', predictions=str(path)),
    total_steps=60,
  )

  num_empty, num_unended = (
    sum(f(line['prediction_ids']) for line in lines)
    for f in (lambda ids: ids == [1], lambda ids: ids[-1] != 1)
  )
  assert (
    f'Training data: 96 predictions, {num_empty} of them empty and '
    f'{num_unended} without EOS: {teacher_run}/checkpoint_0 with '
    'SamplerConfig(temperature=1.0'
  ) in said
  trained_on = {
    (tuple(x[x > 0].tolist()), tuple(y[w > 0].tolist()))
    for batch in batches
    for x, y, w in zip(*batch[:3], strict=True)
  }
  assert trained_on == {
    (tuple(line['input_ids']), tuple(line['prediction_ids'])) for line in lines
  }


# --- What is not finite -------------------------------------------------------


@contextlib.contextmanager
def spoilt_batches(*numbers):
  """Batches whose loss is NaN."""
  count = itertools.count(1)
  take = iterators.TrainIterator.__next__

  def take_and_spoil(self):
    batch = take(self)
    if next(count) not in numbers:
      return batch
    return batch._replace(
      decoder_loss_weights=np.nan * batch.decoder_loss_weights
    )

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(iterators.TrainIterator, '__next__', take_and_spoil)
    yield


def skipped(folder):
  lines = (folder / 'skipped_steps.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_step_that_is_not_finite_is_skipped_and_its_batch_written_down(
  train_letters, tmp_path
):
  batches = conftest.take(
    iterators.TrainIterator(train_letters.dataset('train'), seed=0), 3
  )

  with spoilt_batches(2):
    said = train_letters(tmp_path, total_steps=3)

  (line,) = skipped(tmp_path)
  assert line['step'] == 2
  assert line['loss'] == 'nan'
  assert line['inputs'] == batches[1].encoder_input_tokens.tolist()
  assert 'Step 2 was skipped: loss nan' in said
  steps = [line['step'] for line in metrics_lib.read(tmp_path)]
  assert steps == [1, 3]


def test_a_run_of_skipped_steps_ends_with_the_last_good_state(
  train_letters, tmp_path
):
  train_letters(tmp_path / 'good', total_steps=1)

  with spoilt_batches(*range(2, 10)):
    with pytest.raises(FloatingPointError, match='4 consecutive steps'):
      train_letters(tmp_path / 'run', total_steps=9, max_skipped_steps=3)

  assert [line['step'] for line in skipped(tmp_path / 'run')][:3] == [2, 3, 4]
  for item in ('params', 'opt_state'):
    jax.tree.map(
      np.testing.assert_array_equal,
      arrays(tmp_path / 'run', item),
      arrays(tmp_path / 'good', item),
    )


def test_a_run_of_skipped_steps_that_ends_when_it_would_evaluate_is_saved(
  train_letters, tmp_path
):
  with spoilt_batches(*range(3, 10)):
    with pytest.raises(FloatingPointError):
      train_letters(
        tmp_path,
        total_steps=9,
        max_skipped_steps=3,
        eval_dataset=train_letters.dataset('validation'),
        eval_period=5,
        checkpoint_period=0,
      )

  assert [path.name for path in tmp_path.glob('checkpoint_*')] == [
    'checkpoint_5'
  ]


def test_parameters_that_are_not_finite_end_the_run_unsaved(
  train_letters, tmp_path
):
  with pytest.raises(FloatingPointError, match='Step 1: .* LEARNING_RATE'):
    train_letters(
      tmp_path,
      optimizer=optax.sgd,
      learning_rate=optax.constant_schedule(np.float32(np.inf)),
      total_steps=4,
    )

  assert not list(tmp_path.glob('checkpoint_*'))


def test_a_schedule_may_be_infinite_but_in_a_minimum(train_letters, tmp_path):
  def inverse_square_root(step):
    return 0.01 * jnp.minimum(step**-0.5, step * 4**-1.5)  # 0 ** -0.5

  train_letters(tmp_path, learning_rate=inverse_square_root, total_steps=1)

  assert metrics_lib.read(tmp_path)[0]['train/learning_rate'] == 0.0


def test_teacher_and_student_may_fill_their_embeddings_up_differently(
  train_letters, tmp_path
):
  conftest.save_model(tmp_path / 'teacher', T5Config(260, 8, 1, 4, 8, 1, 1))

  train_letters(
    tmp_path / 'run',
    student=T5Config(288, 12, 2, 4, 10, 1, 1),
    objective=objectives.Objective(divergences.forward_kl),
    teacher_checkpoint_path=str(tmp_path / 'teacher'),
    eval_dataset=train_letters.dataset('validation'),
  )

  (last,) = [
    line
    for line in metrics_lib.read(tmp_path / 'run')
    if 'validation/on_student_outputs/forward_kl' in line
  ]
  assert 0.0 < last['validation/on_student_outputs/forward_kl'] < 10.0


def test_several_teachers_of_other_shapes_grade_one_run(
  train_letters, tmp_path
):
  names = {
    'a': T5Config(260, 8, 1, 4, 8, 1, 1),
    'b': T5Config(264, 10, 2, 4, 12, 1, 2),
  }
  for seed, (name, config) in enumerate(names.items()):
    conftest.save_model(tmp_path / name, config, seed=seed)

  said = train_letters(
    tmp_path / 'run',
    policy=policies.student(),
    objective=objectives.Objective(divergences.forward_kl),
    teacher_checkpoint_path={name: str(tmp_path / name) for name in names},
    method_teacher=teachers.averaged(names),
    total_steps=2,
    eval_dataset=train_letters.dataset('validation'),
  )

  for name in names:
    assert f'parameters, gkd_jax: {tmp_path / name}/checkpoint_0\n' in said
  *_, evaluated = metrics_lib.read(tmp_path / 'run')
  of_all, of_a, of_b = (
    evaluated[f'validation/on_student_outputs/{which}forward_kl']
    for which in ('', 'a/', 'b/')
  )
  # KL from a mean is at most the mean of the KLs, as it is convex.
  assert 0.0 < of_all < (of_a + of_b) / 2
  assert {f'validation/teacher/{name}/greedy/error' for name in names} <= {
    *evaluated
  }


# --- Rewards ------------------------------------------------------------------


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
  """An entailment model of another shape than the student's."""
  folder = tmp_path_factory.mktemp('judge')
  conftest.save_model(folder, T5Config(260, 8, 1, 4, 8, 1, 1))
  return folder


def test_a_model_that_gives_rewards_is_read_and_neither_trained_nor_saved(
  train_letters, judge, tmp_path
):
  before = conftest.tree_of(judge)

  with conftest.names_of_compiled() as compiled:
    said = train_letters(
      tmp_path / 'run',
      **experiments.learning_from(experiments.NLI()),
      reward_checkpoint_path=str(judge),
      total_steps=3,
      eval_dataset=train_letters.dataset('validation'),
      best_metric='greedy/reward',
      best_mode='max',
    )

  assert f'parameters, gkd_jax: {judge}/checkpoint_0\n' in said
  assert 'Reward: T5 1.1 of width 8' in said
  assert collections.Counter(compiled)['train_step'] == 1
  *lines, evaluated = metrics_lib.read(tmp_path / 'run')
  assert 0.0 < evaluated['validation/greedy/reward'] < 1.0
  assert len({line['train/reward'] for line in lines}) == 3
  assert all(0.0 < line['train/reward'] < 1.0 for line in lines)
  assert all('train/reward_baseline' in line for line in lines)
  assert conftest.tree_of(judge) == before
  saved = checkpoint.saved_shapes(checkpoint.find(tmp_path / 'run'))
  assert saved == param_shapes(T5(experiments.STUDENT))


def shorter_is_better(inputs, outputs, targets):
  return [-len(text) for text in outputs]


def test_a_python_function_of_texts_gives_rewards(train_letters, tmp_path):
  seen = []

  def reward(inputs, outputs, targets):
    seen.append((inputs, targets))
    return shorter_is_better(inputs, outputs, targets)

  train_letters(
    tmp_path / 'run',
    **experiments.learning_from(rewards.python_function(reward)),
    total_steps=2,
  )

  assert len(seen) == 2
  words = set(conftest.letter_words('train'))
  for inputs, targets in seen:
    assert len(inputs) == 8 and set(inputs) <= words
    assert targets == [word[::-1] for word in inputs]
  for line in metrics_lib.read(tmp_path / 'run'):
    assert line['train/reward'] <= 0.0
    assert line['train/loss'] == pytest.approx(-line['train/reward'])


@pytest.mark.parametrize('left', ['metrics.jsonl', 'eval_test.json'])
def test_results_of_a_run_whose_checkpoints_were_removed_are_kept(
  distil, whole, tmp_path, left
):
  (tmp_path / 'config.gin').write_text('SEED = 0\n')
  shutil.copy(whole.folder / left, tmp_path)
  before = conftest.tree_of(tmp_path)

  with pytest.raises(ValueError, match=f'has {left}, but no checkpoint'):
    distil(tmp_path)

  assert conftest.tree_of(tmp_path) == before


def test_a_python_function_that_fails_ends_the_run_and_is_named(
  train_letters, tmp_path
):
  calls = itertools.count()

  def fails(inputs, outputs, targets):
    if next(calls) == 1:
      raise LookupError('no dictionary here')
    return shorter_is_better(inputs, outputs, targets)

  with pytest.raises(RuntimeError) as error:
    train_letters(
      tmp_path / 'run',
      **experiments.learning_from(rewards.python_function(fails)),
      total_steps=9,
      checkpoint_period=1,
    )

  assert 'REWARD: ' in str(error.value)
  assert '<locals>.fails failed' in str(error.value)
  assert 'LookupError: no dictionary here' in str(error.value)
  # What came of it was not saved.
  wait_for(tmp_path / 'run' / 'checkpoint_1')
  assert not list((tmp_path / 'run').glob('checkpoint_2*'))


def test_a_reward_is_the_mean_over_the_steps_that_have_one(
  train_letters, tmp_path
):
  settings = experiments.learning_from(
    rewards.rouge_l(),
    policy=policies.mixture(0.5),
    total_steps=8,
  )

  train_letters(tmp_path / 'each', **settings)
  train_letters(tmp_path / 'four', **settings, log_period=4)

  each = metrics_lib.read(tmp_path / 'each')
  for line in each:
    assert ('train/reward' in line) == (line['train/on_policy'] == 1.0)
  assert {line['train/on_policy'] for line in each} == {0.0, 1.0}
  for i, line in enumerate(metrics_lib.read(tmp_path / 'four')):
    values = [
      step['train/reward']
      for step in each[4 * i : 4 * i + 4]
      if 'train/reward' in step
    ]
    assert line['train/reward'] == pytest.approx(np.mean(values), rel=1e-5)
