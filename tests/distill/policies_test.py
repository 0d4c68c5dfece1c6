# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.batch import mask_unused_ids
from gkd_jax.decoding import pair, sampler
from gkd_jax.decoding import rollout as rollout_lib
from gkd_jax.distill import policies
from tests import tiny

pytestmark = pytest.mark.slow  # compiles models

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


def student_writes(**_):
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
        lambda num_outputs: outputs,
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


@pytest.mark.parametrize('per', ['batch', 'sequence'])
def test_lambda_may_be_a_function_of_the_step(per):
  policy = policies.mixture(lambda step: step / 10, per)

  @jax.jit
  def share(step):
    def by_student(rng):
      draw = policies.Draw(
        rng,
        tiny.batch(),
        jnp.arange(4),
        student_writes,
        may_not_write,
        step=step,
      )
      return policy.write(draw).by_student_B

    return jax.vmap(by_student)(jax.random.split(jax.random.key(0), 1000))

  shares = [share(jnp.int32(step)).mean() for step in (0, 3, 10)]
  # 3 standard errors of 1000 draws.
  np.testing.assert_allclose(shares, [0.0, 0.3, 1.0], atol=0.045)
  assert shares[::2] == [0.0, 1.0]
  assert policy.student_may_write
  assert policy.schedules.keys() == {'STUDENT_DATA_FRACTION'}


@pytest.mark.parametrize('otherwise', [policies.replay, policies.paired])
@pytest.mark.parametrize(
  'make', [functools.partial(policies.mixture, 0.5), policies.paired]
)
def test_a_part_of_a_policy_writes_for_the_inputs_of_the_step(make, otherwise):
  with pytest.raises(ValueError, match='otherwise must be a policy with one'):
    make(otherwise=otherwise)


@pytest.mark.parametrize(
  ('make', 'text'),
  [
    (lambda: policies.interleaved(0), 'top_k must be 1 or more, got 0'),
    (lambda: policies.mixed_tokens(1.1), r'must be in \[0, 1\], got 1.1'),
    (lambda: policies.mixed_tokens(0.5, 'token'), "'coin', got 'token'"),
    (lambda: policies.corrected(0), 'num_corrections must be 1 or more'),
    (lambda: policies.paired(policies.student), "not the student's"),
    (lambda: policies.replay(0), 'capacity must be 1 or more, got 0'),
    (lambda: policies.replay(8, 1.5), r'fraction must be in \[0, 1\], got 1.5'),
    (lambda: policies.replay(8, 0.5, -1.0), 'fresh_share must be in'),
    (lambda: policies.replay(8, increment=0.0), 'the student never writes'),
  ],
)
def test_a_policy_refuses_what_it_cannot_be(make, text):
  with pytest.raises(ValueError, match=text):
    make()


def test_mixed_tokens_of_one_writer_are_that_writers_policy():
  alone = policies.mixed_tokens(0.0)
  assert (alone.student_data_fraction, alone.needs_teacher) == (1.0, False)
  assert policies.mixed_tokens(1.0).student_data_fraction == 0.0


# --- One correction -----------------------------------------------------------

# The vectors' example; a row that agrees everywhere; one whose last token is
# the worst; and one that ended.
BY_STUDENT = np.array([[3, 5, 7, 1], [3, 6, 2, 1], [3, 6, 2, 5], [3, 1, 0, 0]])
BY_TEACHER = np.array([[3, 6, 2, 1], [3, 6, 2, 1], [3, 6, 2, 1], [2, 1, 8, 8]])
KL = np.array([[0.2, 0.1, 0.9, 0.4]] * 3 + [[0.1, 0.5, 0.9, 0.9]])


def correct(num_corrections=1):
  """Corrects; a continuation is 9s with log-probability -9."""
  weights = np.float32(BY_STUDENT != 0)
  position = np.arange(4)

  def sample_student(*, prefix=None, rng=None):
    if prefix is None:
      assert rng is None
      return sampler.Rollout(jnp.int32(BY_STUDENT), weights, -weights)
    is_given = position < prefix.lengths[:, None]
    tokens = jnp.where(is_given, prefix.tokens, 9)
    ended = jnp.cumsum(tokens == 1, axis=1) - (tokens == 1) > 0
    return sampler.Rollout(
      jnp.where(ended, 0, tokens).astype(jnp.int32),
      jnp.float32(~ended),
      jnp.where(is_given | ended, 0.0, -9.0),
    )

  return policies.corrected(num_corrections).write(
    policies.Draw(
      jax.random.key(0),
      None,
      jnp.arange(4),
      sample_student,
      may_not_write,
      compare=lambda outputs: policies.Comparison(
        jnp.float32(KL), jnp.int32(BY_TEACHER)
      ),
    )
  )


def test_the_worst_token_that_differs_is_corrected_and_the_student_goes_on():
  written = correct()

  want = [[3, 5, 2, 9], [3, 6, 2, 1], [3, 6, 2, 1], [2, 9, 9, 9]]
  np.testing.assert_array_equal(written.outputs.tokens, want)
  t, s = policies.TEACHER, policies.STUDENT
  np.testing.assert_array_equal(
    written.author, [[s, s, t, s], [s] * 4, [s, s, s, t], [t, s, s, s]]
  )
  np.testing.assert_array_equal(
    written.log_probs,
    [[-1, -1, 0, -9], [-1] * 4, [-1, -1, -1, 0], [0, -9, -9, -9]],
  )


def test_a_second_correction_starts_from_the_first():
  written = correct(2)

  # The 9 differs most in the first row; in the last one, all 9s after the
  # correction differ, and the third is the worst.
  want = [[3, 5, 2, 1], [3, 6, 2, 1], [3, 6, 2, 1], [2, 9, 8, 9]]
  np.testing.assert_array_equal(written.outputs.tokens, want)
  t, s = policies.TEACHER, policies.STUDENT
  np.testing.assert_array_equal(
    written.author, [[s, s, t, t], [s] * 4, [s, s, s, t], [t, s, t, s]]
  )


# --- Two outputs for each input -----------------------------------------------


@pytest.mark.parametrize('otherwise', [policies.teacher, policies.dataset])
def test_a_pair_is_the_other_writers_output_and_the_students(otherwise):
  policy, batch = policies.paired(otherwise), tiny.batch()

  written = write(
    policy,
    jax.random.key(0),
    batch,
    student=student_writes,
    teacher=teacher_writes,
  )

  theirs = otherwise().write(
    policies.Draw(None, batch, None, may_not_write, teacher_writes)
  )
  for got, want in zip(
    (*written.outputs, written.author, written.log_probs),
    (*theirs.outputs, theirs.author, theirs.log_probs),
    strict=True,
  ):
    np.testing.assert_array_equal(got[::2], want)
  assert (written.outputs.tokens[1::2] == STUDENT).all()
  np.testing.assert_array_equal(written.by_student_B, [False, True] * 4)
  assert policy.student_data_fraction == 0.5
  assert policy.needs_teacher == (otherwise is policies.teacher)


# --- Replay -------------------------------------------------------------------


def replayed(policy, num_steps, batch_size=2):
  """Runs a policy; at step i the student writes i, for inputs of 100 + i.

  Returns:
    [(Rollouts, state after the step)], on the host.
  """
  shape = (batch_size, 3)
  examples = tiny.batch(0, (3,) * batch_size, (2,) * batch_size, 3, 3)

  @jax.jit
  def one(state, step):
    rows = step + 100 * jnp.arange(batch_size)[:, None]
    outputs = sampler.Rollout(
      jnp.broadcast_to(rows, shape).astype(jnp.int32),
      jnp.ones(shape),
      -jnp.broadcast_to(rows, shape).astype(jnp.float32),
    )
    written = policy.write(
      policies.Draw(
        jax.random.fold_in(jax.random.key(7), step),
        examples._replace(
          encoder_input_tokens=1000 + jnp.broadcast_to(rows, shape)
        ),
        jnp.arange(batch_size),
        lambda: outputs,
        may_not_write,
        carried=state,
        step=step,
      )
    )
    return written._replace(carried=()), written.carried

  state, history = policy.init(examples), []
  for step in range(num_steps):
    written, state = one(state, jnp.int32(step))
    history.append(jax.device_get((written, state)))
  return history


def test_the_buffer_keeps_the_newest_outputs():
  history = replayed(policies.replay(5, 1.0, fresh_share=1.0), 4)

  _, state = history[-1]
  # Pushes of 2 rows, of which the second is 100 more.
  kept = state.rows[1].tokens[:, 0]
  assert sorted(kept.tolist()) == [2, 3, 101, 102, 103]
  assert (int(state.size), int(state.cursor)) == (5, 3)
  assert [int(s.size) for _, s in history] == [2, 4, 5, 5]


def test_a_replayed_batch_brings_its_inputs_and_has_no_row_twice():
  history = replayed(policies.replay(6, 1.0, fresh_share=0.0), 60)

  written = [w for w, _ in history]
  sampled = [bool(w.metrics['sampled']) for w in written]
  assert sampled == [True] * 3 + [False] * 57  # until the buffer is full
  drawn = []
  for w in written:
    tokens = w.outputs.tokens[:, 0]
    np.testing.assert_array_equal(
      w.batch.encoder_input_tokens[:, 0], 1000 + tokens
    )
    np.testing.assert_array_equal(w.log_probs[:, 0], -tokens)
    assert w.by_student_B.all()
    assert len({*tokens.tolist()}) == 2
    drawn += tokens.tolist()
  counts = np.unique(drawn[6:], return_counts=True)[1]
  # 57 draws of 2 of 6: 19 of each; 3.6 is a standard deviation.
  assert len(counts) == 6 and abs(counts - 19).max() < 4 * 3.6


def test_a_step_samples_replays_or_reads_the_dataset_by_its_shares():
  policy = policies.replay(2, 0.6, fresh_share=lambda step: step < 600)

  history = replayed(policy, 1200)

  kinds = np.array(
    [
      (w.metrics['sampled'], w.metrics['replayed'], not w.by_student_B.any())
      for w, _ in history
    ]
  )
  assert (kinds.sum(axis=1) == 1).all()
  # 4 standard errors of 600 steps.
  np.testing.assert_allclose(kinds[:600].mean(axis=0), [0.6, 0, 0.4], atol=0.08)
  np.testing.assert_allclose(kinds[600:].mean(axis=0), [0, 0.6, 0.4], atol=0.08)
  of_dataset = next(w for w, _ in history if not w.by_student_B.any())
  assert (of_dataset.outputs.tokens[:, 0] < 100).all()


def test_the_fraction_rises_with_the_validation_loss():
  policy = policies.replay(2)
  state = policy.init(tiny.batch(0, (3, 3), (2, 2), 3, 3))
  fractions = []

  # The first one sets the level.
  for loss in (2.0, 2.0, 1.9, 2.05, 2.11, 2.15, 2.21, 2.35):
    state = policy.evaluated(
      state, {name: loss for name in policy.reads_metrics}
    )
    fractions.append(float(state.fraction))

  np.testing.assert_allclose(
    fractions, [0, 0, 0, 0, 0.1, 0.1, 0.2, 0.3], atol=1e-7
  )


def test_a_fraction_that_is_fixed_reads_no_evaluation():
  policy = policies.replay(2, 0.5, increment=0.0)

  assert policy.evaluated is None
  assert policy.reads_metrics == ()


@pytest.mark.parametrize('fraction', [-0.1, 1.1, float('nan')])
def test_mixture_refuses_a_fraction_outside_0_and_1(fraction):
  with pytest.raises(ValueError, match='student_data_fraction.*lambda'):
    policies.mixture(fraction)


@pytest.mark.parametrize('fraction', [0.0, 0.5, 1.0])
def test_mixture_refuses_an_unknown_unit(fraction):
  with pytest.raises(ValueError, match="'batch' or 'sequence', got 'token'"):
    policies.mixture(fraction, per='token')


@functools.partial(jax.jit, static_argnames=('model', 'config', 'with_encoded'))
def rollout(model, params, inputs, config, with_encoded=False, prefix=None):
  encoded = None
  if with_encoded:
    encoded = model.apply({'params': params}, inputs, method='encode')
  return rollout_lib.rollout(
    rollout_lib.Writer(model, params, inputs, config, encoded),
    jax.random.key(0),
    row_ids_B=jnp.arange(inputs.shape[0]),
    max_decode_len=6,
    ids=tiny.IDS,
    prefix=prefix,
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


def test_with_all_ids_accepted_the_student_writes_alone():
  student, params = tiny.model_and_params(0)
  teacher, teacher_params = tiny.model_and_params(1, '1.0', emb_dim=12)
  writers = [
    rollout_lib.Writer(model, params, INPUTS, sampler.ANCESTRAL)
    for model, params in ((student, params), (teacher, teacher_params))
  ]

  drawn = jax.jit(
    lambda: rollout_lib.rollout_pair(
      *writers,
      jax.random.key(0),
      pair.interleave(tiny.VOCAB_SIZE),
      row_ids_B=jnp.arange(8),
      max_decode_len=6,
      ids=tiny.IDS,
    )
  )()

  want = rollout(student, params, INPUTS, sampler.ANCESTRAL)
  np.testing.assert_array_equal(drawn.rollout.tokens, want.tokens)
  np.testing.assert_array_equal(drawn.rollout.weights, want.weights)
  # Another program: rounding.
  np.testing.assert_allclose(
    drawn.rollout.log_probs, want.log_probs, rtol=0, atol=1e-5
  )
  np.testing.assert_array_equal(drawn.by_student, want.weights > 0)


def test_a_prefix_fills_the_cache():
  model, params = tiny.model_and_params(0)
  want = rollout(model, params, INPUTS, sampler.ANCESTRAL)

  drawn = rollout(
    model,
    params,
    INPUTS,
    sampler.ANCESTRAL,
    prefix=sampler.Prefix(want.tokens[:, :4], jnp.arange(8) % 5),
  )

  np.testing.assert_array_equal(drawn.tokens, want.tokens)
  was_drawn = np.arange(6) >= np.arange(8)[:, None] % 5
  np.testing.assert_array_equal(drawn.log_probs, want.log_probs * was_drawn)


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
