# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.batch import mask_unused_ids
from gkd_jax.decoding import rollout as rollout_lib
from gkd_jax.decoding import sampler
from gkd_jax.distill import policies
from tests import tiny

# Three writers whose tokens give them away; the dataset writes ids below 20.
STUDENT, TEACHER = 100, 200


def outputs_of(writer, batch_size=4, length=6):
  shape = (batch_size, length)
  return sampler.Rollout(
    jnp.full(shape, writer, jnp.int32), jnp.ones(shape), jnp.full(shape, -0.5)
  )


def may_not_write():
  raise AssertionError(
    'This policy asked somebody to write whom it should not.'
  )


def write(
  policy, rng, batch=None, *, student=may_not_write, teacher=may_not_write
):
  return policy.write(
    policies.Draw(rng, batch, jnp.arange(4), student, teacher)
  )


def student_writes():
  return outputs_of(STUDENT)


def teacher_writes():
  return outputs_of(TEACHER)


@pytest.mark.parametrize(
  'policy',
  [
    policies.dataset(),
    policies.mixture(0.0),
    policies.mixture(0.0, 'sequence'),
  ],
  ids=['dataset', 'mixture(0)', 'mixture(0) per sequence'],
)
def test_at_lambda_0_the_dataset_writes_and_nobody_samples(policy):
  batch = tiny.batch()

  written = write(policy, jax.random.key(0), batch)

  assert written.outputs.tokens is batch.decoder_target_tokens
  assert written.outputs.weights is batch.decoder_loss_weights
  assert not written.by_student_B.any()
  assert policy.student_data_fraction == 0.0
  assert not policy.needs_teacher


@pytest.mark.parametrize(
  'policy',
  [
    policies.student(),
    policies.mixture(1.0),
    policies.mixture(1.0, 'sequence'),
  ],
  ids=['student', 'mixture(1)', 'mixture(1) per sequence'],
)
def test_at_lambda_1_the_student_writes_and_no_batch_is_read(policy):
  written = write(policy, jax.random.key(0), batch=None, student=student_writes)

  assert (written.outputs.tokens == STUDENT).all()
  assert written.by_student_B.all()
  assert policy.student_data_fraction == 1.0
  assert not policy.needs_teacher


@pytest.mark.parametrize(
  'policy',
  [policies.teacher(), policies.mixture(0.0, otherwise=policies.teacher)],
  ids=['teacher', 'mixture(0, otherwise=teacher)'],
)
def test_teacher_writes_and_no_batch_is_read(policy):
  written = write(policy, jax.random.key(0), batch=None, teacher=teacher_writes)

  assert (written.outputs.tokens == TEACHER).all()
  assert not written.by_student_B.any()
  assert policy.student_data_fraction == 0.0
  assert policy.needs_teacher


def written_with_many_keys(policy, num_keys, **writers):
  keys = jax.random.split(jax.random.key(0), num_keys)
  written = jax.jit(
    jax.vmap(lambda rng: write(policy, rng, tiny.batch(), **writers))
  )(keys)
  return jax.tree.map(np.asarray, written)


@pytest.mark.parametrize('fraction', [0.5, 0.1])
def test_mixture_per_batch_draws_once_for_all_rows(fraction):
  policy = policies.mixture(fraction)

  written = written_with_many_keys(policy, 10_000, student=student_writes)

  sampled = written.author[:, 0, 0] == policies.STUDENT
  assert ((written.author == policies.STUDENT) == sampled[:, None, None]).all()
  dataset = np.asarray(tiny.batch().decoder_target_tokens)
  np.testing.assert_array_equal(written.outputs.tokens[sampled], STUDENT)
  assert (written.outputs.tokens[~sampled] == dataset).all()
  # 3 standard errors of the mean of 10,000 draws.
  margin = 3 * np.sqrt(fraction * (1 - fraction) / 10_000)
  assert abs(sampled.mean() - fraction) < margin
  assert policy.student_data_fraction == fraction


def test_mixture_per_sequence_draws_for_each_row():
  policy = policies.mixture(0.3, per='sequence')

  written = written_with_many_keys(policy, 10_000, student=student_writes)

  sampled = written.author[:, :, 0] == policies.STUDENT
  batch = tiny.batch()
  np.testing.assert_array_equal(
    written.outputs.tokens,
    np.where(sampled[:, :, None], STUDENT, batch.decoder_target_tokens),
  )
  np.testing.assert_array_equal(
    written.outputs.weights,
    np.where(sampled[:, :, None], 1.0, batch.decoder_loss_weights),
  )
  # 3 standard errors; of 4 rows 0.3 ** 4 + 0.7 ** 4 = 25% are all alike.
  assert abs(sampled.mean() - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 40_000)
  alike = (sampled == sampled[:, :1]).all(axis=1).mean()
  assert abs(alike - 0.248) < 3 * np.sqrt(0.248 * 0.752 / 10_000)


def test_a_row_is_sampled_or_not_whatever_the_other_rows_are():
  policy = policies.mixture(0.5, per='sequence')

  def by_student(row_ids):
    lengths = [4] * len(row_ids)
    outputs = outputs_of(STUDENT, len(row_ids))
    return policy.write(
      policies.Draw(
        jax.random.key(0),
        tiny.batch(input_lengths=lengths, target_lengths=lengths),
        jnp.asarray(row_ids),
        lambda: outputs,
        may_not_write,
      )
    ).by_student_B

  everywhere = by_student(np.arange(64))
  part = np.array([50, 3, 17])
  np.testing.assert_array_equal(by_student(part), everywhere[part])
  assert 0 < everywhere.sum() < 64


@pytest.mark.parametrize('per', ['batch', 'sequence'])
def test_teacher_may_write_what_the_student_does_not(per):
  policy = policies.mixture(0.5, per=per, otherwise=policies.teacher)

  written = written_with_many_keys(
    policy, 100, student=student_writes, teacher=teacher_writes
  )

  np.testing.assert_array_equal(
    written.outputs.tokens,
    np.broadcast_to(
      np.where(written.author == policies.STUDENT, STUDENT, TEACHER),
      (100, 4, 6),
    ),
  )
  assert 0 < (written.author == policies.STUDENT).mean() < 1
  assert {*written.author.flat} == {policies.STUDENT, policies.TEACHER}
  assert policy.needs_teacher


@pytest.mark.parametrize('fraction', [-0.1, 1.1, float('nan')])
def test_mixture_refuses_a_fraction_outside_0_and_1(fraction):
  with pytest.raises(ValueError, match='student_data_fraction.*lambda'):
    policies.mixture(fraction)


@pytest.mark.parametrize('fraction', [0.0, 0.5, 1.0])
def test_mixture_refuses_an_unknown_unit(fraction):
  with pytest.raises(ValueError, match="'batch' or 'sequence', got 'token'"):
    policies.mixture(fraction, per='token')


@functools.partial(jax.jit, static_argnames=('model', 'config', 'with_encoded'))
def rollout(model, params, inputs, config, with_encoded=False):
  encoded = None
  if with_encoded:
    encoded = model.apply({'params': params}, inputs, method='encode')
  return rollout_lib.rollout(
    model,
    params,
    inputs,
    jax.random.key(0),
    config,
    row_ids_B=jnp.arange(inputs.shape[0]),
    max_decode_len=6,
    ids=tiny.IDS,
    encoded=encoded,
  )


INPUTS = tiny.tokens(1, [7, 4, 5, 3, 6, 2, 7, 7], 7)


def test_rollout_draws_from_the_model_as_it_is():
  model, params = tiny.model_and_params(0)

  drawn = rollout(model, params, INPUTS, sampler.ANCESTRAL)

  logits = tiny.logits(model, params, INPUTS, drawn.tokens)
  log_p = jax.nn.log_softmax(mask_unused_ids(logits, tiny.IDS))
  want = jnp.take_along_axis(log_p, drawn.tokens[..., None], 2)[..., 0]
  # Cached and full forward pass differ by rounding.
  np.testing.assert_allclose(
    drawn.log_probs, want * drawn.weights, rtol=0, atol=1e-4
  )
  assert len(np.unique(drawn.tokens, axis=0)) == 8
  lengths = drawn.weights.sum(axis=1)
  assert lengths.min() < 6


def test_greedy_rollout_is_the_argmax_of_the_full_forward_pass():
  model, params = tiny.model_and_params(0)

  drawn = rollout(model, params, INPUTS, sampler.GREEDY)

  logits = tiny.logits(model, params, INPUTS, drawn.tokens)
  best = mask_unused_ids(logits, tiny.IDS).argmax(axis=-1)
  np.testing.assert_array_equal(
    drawn.tokens, jnp.where(drawn.weights > 0, best, 0)
  )


def test_rollout_never_writes_pad_or_unused_ids():
  model, params = tiny.model_and_params(0)
  head = params['decoder']['logits_dense']['kernel']
  unusable = jnp.array([0, *range(tiny.NUM_IDS, tiny.VOCAB_SIZE)])
  # Their logits are now near +-1000: in most positions one is the largest.
  params['decoder']['logits_dense']['kernel'] = head.at[:, unusable].mul(1000.0)

  drawn = rollout(model, params, INPUTS, sampler.ANCESTRAL)

  tokens = drawn.tokens[drawn.weights > 0]
  assert tokens.min() >= 1
  assert tokens.max() < tiny.NUM_IDS


def test_rollout_takes_an_encoder_output_that_is_known():
  model, params = tiny.model_and_params(0)

  drawn = rollout(model, params, INPUTS, sampler.ANCESTRAL, with_encoded=True)

  want = rollout(model, params, INPUTS, sampler.ANCESTRAL)
  np.testing.assert_array_equal(drawn.tokens, want.tokens)


def test_rollout_has_no_gradient():
  model, params = tiny.model_and_params(0)

  # Fails to differentiate its loop, too, if a parameter's gradient gets there.
  gradient = jax.jit(
    jax.grad(
      lambda p: rollout.__wrapped__(
        model, p, INPUTS, sampler.ANCESTRAL, with_encoded=True
      ).log_probs.sum()
    )
  )(params)

  assert not any(g.any() for g in jax.tree.leaves(gradient))
