# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.batch import Batch
from gkd_jax.data import iterators
from gkd_jax.decoding import beam_search, sampler
from gkd_jax.decoding import rollout as rollout_lib
from gkd_jax.distill import (
  divergences,
  grading,
  objectives,
  rewards,
  teachers,
)
from gkd_jax.evaluation import programs
from tests import references
from tests.letter_models import (
  IDS,
  SETTINGS,
  STUDENT,
  TEACHER,
  logits_of,
  make_write,
  write_all,
  write_one,
)

pytestmark = pytest.mark.slow  # compiles models


def test_evaluations_of_one_model_share_their_programs():
  make_write(sampler.GREEDY)
  before = programs._write_program.cache_info()

  make_write(sampler.GREEDY)

  after = programs._write_program.cache_info()
  assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@pytest.fixture(scope='module')
def greedy(dataset, student_params):
  return write_all(dataset, write_one(sampler.GREEDY), student_params)


@pytest.fixture(scope='module')
def sampled(dataset, student_params):
  return write_all(dataset, write_one(sampler.ANCESTRAL), student_params)


# --- What a model writes ------------------------------------------------------


def test_greedy_outputs_are_the_most_probable_token_each_time(
  greedy, examples, student_params
):
  logits = logits_of(
    STUDENT, student_params, examples.encoder_input_tokens, greedy
  )

  # Given what it wrote so far, up to the end.
  upto_end = np.cumsum(np.cumsum(greedy == 1, axis=1), axis=1) <= 1
  assert (greedy == logits.argmax(axis=-1))[upto_end].all()
  assert len(set(map(tuple, greedy.tolist()))) > 1  # it reads its inputs


def test_samples_do_not_depend_on_the_size_of_the_batches(
  config, sampled, student_params
):
  larger = iterators.EvalDataset(dataclasses.replace(config, batch_size=5))

  again = write_all(larger, write_one(sampler.ANCESTRAL), student_params)

  np.testing.assert_array_equal(again, sampled)


def test_rows_are_sampled_independently(student_params, dataset):
  # The same input in every row, which the student writes to differently.
  (_, batch), *_ = dataset.batches()
  same = Batch(*(np.repeat(x[:1], 4, axis=0) for x in batch[:3]))
  write = write_one(sampler.ANCESTRAL)

  rows = write(student_params, np.arange(4, dtype=np.int32), same)

  assert len(set(map(tuple, rows.tolist()))) == 4


def test_a_beam_of_one_is_greedy(greedy, dataset, student_params):
  beam = beam_search.BeamConfig(num_beams=1, alpha=0.0)

  tokens = write_all(dataset, write_one(beam), student_params)

  np.testing.assert_array_equal(tokens, greedy)


def test_a_wide_beam_finds_more_probable_outputs_than_greedy(
  greedy, dataset, examples, student_params
):
  beam = beam_search.BeamConfig(num_beams=4, alpha=0.0)

  tokens = write_all(dataset, write_one(beam), student_params)

  def log_prob(outputs):
    inputs = examples.encoder_input_tokens
    logits = logits_of(STUDENT, student_params, inputs, outputs)
    log_q = references.log_softmax(logits)
    log_q = np.take_along_axis(log_q, outputs[..., None], axis=-1)[..., 0]
    return np.where(outputs == 0, 0.0, log_q).sum(axis=-1)

  assert (log_prob(tokens) - log_prob(greedy)).mean() > 0.0


@pytest.fixture(scope='module')
def draws(dataset, student_params):
  written = write_all(
    dataset, make_write(sampler.ANCESTRAL, num_outputs=3), student_params
  )
  return list(written.swapaxes(0, 1))


def test_the_first_draw_is_that_of_the_seed_itself(
  draws, examples, student_params
):
  @jax.jit
  def rollout(params, inputs):
    return rollout_lib.rollout(
      rollout_lib.Writer(STUDENT, params, inputs, sampler.ANCESTRAL),
      jax.random.key(SETTINGS['seed']),
      row_ids_B=np.arange(len(draws[0])),
      max_decode_len=7,
      ids=IDS,
    )

  drawn = rollout(student_params, examples.encoder_input_tokens)

  np.testing.assert_array_equal(draws[0], drawn.tokens)


def test_draws_for_one_input_differ(draws):
  for a, b in itertools.combinations(draws, 2):
    assert (a != b).any(axis=1).mean() > 0.9


# --- Divergences --------------------------------------------------------------


def largest_ratio(*, teacher_logits, student_logits):
  """A user's divergence: the largest log-ratio of the teacher's top 5 ids."""
  log_p, log_q = map(jax.nn.log_softmax, (teacher_logits, student_logits))
  best, ids = jax.lax.top_k(log_p, 5)
  return jnp.max(best - jnp.take_along_axis(log_q, ids, axis=-1), axis=-1)


def largest_ratio_reference(*, teacher_logits, student_logits):
  log_p, log_q = map(references.log_softmax, (teacher_logits, student_logits))
  ids = np.argsort(-log_p, axis=-1)[..., :5]
  ratios = np.take_along_axis(log_p - log_q, ids, axis=-1)
  return ratios.max(axis=-1)


GRADER = grading.make_grader(teachers.checkpoint(), STUDENT, TEACHER)
OWN = divergences.Divergence(largest_ratio)


@pytest.fixture(scope='module')
def measured(dataset, student_params, teacher_params):
  measure = programs.make_divergences(
    STUDENT, GRADER, own=OWN, ids=IDS, **SETTINGS
  )
  return measure(student_params, teacher_params, dataset)


@pytest.mark.parametrize(
  'name, divergence',
  [
    *((name, references.twin(d)) for name, d in divergences.REPORTED.items()),
    ('largest_ratio', largest_ratio_reference),
  ],
)
@pytest.mark.parametrize('on', ['on_dataset_outputs', 'on_student_outputs'])
def test_divergences_are_those_of_the_float64_reference(
  measured,
  examples,
  sampled,
  student_params,
  teacher_params,
  on,
  name,
  divergence,
):
  inputs = examples.encoder_input_tokens
  outputs = {
    'on_dataset_outputs': examples.decoder_target_tokens,
    'on_student_outputs': sampled,  # the same draws: same seed, same rows
  }[on]
  # Up to and including the first EOS.
  weights = np.cumsum(np.cumsum(outputs == 1, axis=1), axis=1) <= 1

  per_token = divergence(
    teacher_logits=logits_of(TEACHER, teacher_params, inputs, outputs),
    student_logits=logits_of(STUDENT, student_params, inputs, outputs),
  )
  per_output = (per_token * weights).sum(axis=1) / weights.sum(axis=1)

  # float32 logits of size 10, and sums of 7 x 259 terms.
  np.testing.assert_allclose(
    measured[f'{on}/{name}'], per_output.mean(), rtol=1e-4
  )


def test_the_likelihood_of_the_datasets_outputs_is_measured(
  measured, examples, student_params
):
  outputs = examples.decoder_target_tokens
  logits = logits_of(
    STUDENT, student_params, examples.encoder_input_tokens, outputs
  )

  log_q = references.log_softmax(logits)
  nll = -np.take_along_axis(log_q, outputs[..., None], axis=-1)[..., 0]
  weights = outputs != 0
  per_output = (nll * weights).sum(axis=1) / weights.sum(axis=1)

  np.testing.assert_allclose(
    measured['on_dataset_outputs/nll'], per_output.mean(), rtol=1e-4
  )


def test_several_teachers_are_compared_together_and_each(
  dataset, student_params, teacher_params, measured
):
  several = teachers.averaged({'a': None, 'b': None})
  grader = grading.make_grader(several, STUDENT, {'a': TEACHER, 'b': STUDENT})
  measure = programs.make_divergences(STUDENT, grader, ids=IDS, **SETTINGS)

  found = measure(
    student_params, {'a': teacher_params, 'b': student_params}, dataset
  )

  assert {*found} == {*programs.divergence_names(None, ['a', 'b'])}
  for on in ('on_dataset_outputs', 'on_student_outputs'):
    of_a = found[f'{on}/a/reverse_kl']
    np.testing.assert_allclose(of_a, measured[f'{on}/reverse_kl'], rtol=1e-5)
    assert abs(found[f'{on}/b/reverse_kl']) < 1e-6  # the student itself
    # KL is convex: half of the way is less than half of the divergence.
    assert 0.0 < found[f'{on}/reverse_kl'] < of_a / 2.0


def test_logits_exist_for_one_place_at_a_time(
  student_params, teacher_params, examples, greedy, monkeypatch
):
  shapes = []

  def comparable_logits(student_logits, teacher_logits, ids):
    shapes.append((student_logits.shape, teacher_logits.shape))
    return kept(student_logits, teacher_logits, ids)

  kept = objectives.comparable_logits
  monkeypatch.setattr(objectives, 'comparable_logits', comparable_logits)
  compare = programs.make_disagreement(
    STUDENT, GRADER, ids=IDS, mesh=SETTINGS['mesh']
  )
  values = compare(student_params, teacher_params, examples, greedy)

  assert values['kl'].shape == greedy.shape == (10, 7)
  assert set(shapes) == {((10, 264), (10, 264))}


# --- Rewards ------------------------------------------------------------------


def test_a_function_that_gives_rewards_sees_examples_alone(dataset, greedy):
  seen = []

  def by_length(inputs, outputs, targets):
    del outputs, targets
    seen.extend(inputs)
    return [1.0 / len(text) for text in inputs]  # refuses an empty one

  reward = rewards.python_function(by_length)
  reward_fn = reward.make_reward_fn(dataset.vocabulary, IDS, None)
  mean_reward = programs.make_mean_reward(
    reward, reward_fn, None, ids=IDS, mesh=SETTINGS['mesh']
  )

  mean = mean_reward(dataset, greedy)

  texts = [example['inputs'] for example in dataset.examples()]
  assert set(seen) == set(texts)
  want = np.mean([1.0 / len(text) for text in texts])
  assert mean == pytest.approx(want, rel=1e-5)  # a sum of 10 float32 numbers


def test_a_function_that_fails_to_give_rewards_ends_an_evaluation(
  dataset, greedy
):
  def fails(inputs, outputs, targets):
    raise LookupError('no dictionary here')

  reward = rewards.python_function(fails)
  reward_fn = reward.make_reward_fn(dataset.vocabulary, IDS, None)
  mean_reward = programs.make_mean_reward(
    reward, reward_fn, None, ids=IDS, mesh=SETTINGS['mesh']
  )

  with pytest.raises(RuntimeError, match='fails failed: LookupError'):
    mean_reward(dataset, greedy)
