# SPDX-License-Identifier: Apache-2.0
"""Outputs of draft and verify have the law of the target alone, enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.decoding import rollout as rollout_lib
from gkd_jax.decoding import sampler, speculative
from gkd_jax.decoding.sampler import ANCESTRAL, GREEDY, SamplerConfig
from gkd_jax.decoding.speculative import Drafting
from gkd_jax.parallel import partitioning
from tests import tiny
from tests.decoding.sampler_test import probabilities

pytestmark = pytest.mark.slow  # compiles models

EOS = 1
V, T = 5, 4  # of the random chains below; id 0 is pad
NUM_ROWS = 10_240


def random_chain(seed, num_ids=V):
  """Random next-token logits [position, last token, next token], float64."""
  rng = np.random.default_rng(seed)
  logits = 1.5 * rng.standard_normal((T, num_ids, num_ids))
  logits[..., 0] = -1e9  # as `mask_unused_ids` leaves the pad id
  return logits


_TWO = Drafting(2)
TARGET, DRAFT = random_chain(3), random_chain(4)


def block_of(logits_TVV):
  """A chain's `decode_block`: the cache counts the calls."""
  logits_TVV = jnp.float32(logits_TVV)

  def decode_block(calls, offsets_B, tokens_BN):
    at_BN = offsets_B[:, None] + jnp.arange(tokens_BN.shape[1])
    # After the last position comes what must not matter.
    logits = logits_TVV[jnp.minimum(at_BN, len(logits_TVV) - 1), tokens_BN]
    return logits, calls + 1

  return decode_block


def draw(
  config=ANCESTRAL,
  drafting=_TWO,
  *,
  target=TARGET,
  draft=DRAFT,
  seed=0,
  row_ids=None,
  max_decode_len=T,
  ids=tiny.IDS,
):
  if row_ids is None:
    row_ids = np.arange(NUM_ROWS)

  @jax.jit
  def sample(rng, row_ids_B):
    return speculative.sample(
      block_of(target),
      block_of(draft),
      (jnp.int32(0), jnp.int32(0)),
      rng,
      config,
      drafting,
      row_ids_B=row_ids_B,
      max_decode_len=max_decode_len,
      ids=ids,
    )

  drawn = sample(jax.random.key(seed), row_ids)
  return jax.tree.map(np.asarray, drawn)


def enumerate_outputs(next_logits, length=T, **config):
  """{tokens, cut after EOS: probability} of all outputs.

  Args:
    next_logits: tokens so far -> logits.
    length: of outputs that do not end.
    **config: of the sampler.
  """
  outputs = {}

  def extend(prefix, probability):
    if len(prefix) == length or prefix[-1:] == (EOS,):
      outputs[prefix] = probability
      return
    p = probabilities(next_logits(prefix), **config)
    for token in np.flatnonzero(p):
      extend((*prefix, int(token)), probability * p[token])

  extend((), 1.0)
  return outputs


def after(logits_TVV):
  """tokens so far -> logits of a chain."""
  return lambda prefix: logits_TVV[len(prefix), prefix[-1] if prefix else 0]


def assert_law(rollout, expected):
  """Chi-square of the outputs that were drawn and their probabilities."""
  counts = dict.fromkeys(expected, 0)
  rows = np.where(rollout.weights > 0, rollout.tokens, -1)
  for row, count in zip(
    *np.unique(rows, axis=0, return_counts=True), strict=True
  ):
    # KeyError: an output of probability 0 was drawn.
    counts[tuple(row[row >= 0].tolist())] += count
  n = len(rows) * np.array(list(expected.values()))
  k = np.array(list(counts.values()))
  # Its mean is the degrees of freedom, its standard deviation sqrt of twice
  # that. 4 of them leave 1 in 10,000.
  rare = n < 5
  n = np.append(n[~rare], n[rare].sum() + 1e-9)
  k = np.append(k[~rare], k[rare].sum())
  freedom = (n > 1e-3).sum() - 1
  statistic = ((k - n) ** 2 / n).sum()
  assert statistic < freedom + 4 * np.sqrt(2 * freedom)
  assert freedom > 5


LAWS = pytest.mark.parametrize(
  'config',
  [
    {},
    {'temperature': 0.5},
    {'temperature': 2.0},
    {'top_k': 2},
    {'top_p': 0.8},
    {'temperature': 1.5, 'top_k': 3, 'top_p': 0.8},
  ],
  ids=str,
)


@LAWS
def test_outputs_have_the_law_of_the_target(config):
  drawn = draw(SamplerConfig(**config))

  assert_law(drawn.rollout, enumerate_outputs(after(TARGET), **config))
  # And not because all or none were accepted.
  assert 0.1 < drawn.counts.accepted.sum() / drawn.counts.tested.sum() < 0.9


@pytest.mark.parametrize(
  'drafting',
  [Drafting(1), Drafting(3), Drafting(3, min_probability=0.5)],
  ids=str,
)
def test_the_law_does_not_depend_on_how_many_tokens_are_drafted(drafting):
  drawn = draw(drafting=drafting)

  assert_law(drawn.rollout, enumerate_outputs(after(TARGET)))


def test_log_probs_are_the_targets():
  config = {'temperature': 1.5, 'top_k': 3}
  tokens, weights, log_probs = draw(
    SamplerConfig(**config), row_ids=np.arange(500)
  ).rollout

  expected = enumerate_outputs(after(TARGET), **config)
  for row, weight, of_row in zip(tokens, weights, log_probs, strict=True):
    want = np.log(expected[tuple(row[weight > 0].tolist())])
    # At most 4 terms of float32 log-softmax.
    assert of_row.sum() == pytest.approx(want, abs=3e-6)
  assert (log_probs[weights == 0] == 0).all() and (weights == 0).any()


def test_the_acceptance_rate_is_one_minus_the_total_variation():
  # Every position has the same pair of distributions, without EOS.
  logits_P = np.array([-1e9, -1e9, 2.0, 1.0, 0.5, -0.5, -2.0])
  logits_Q = np.array([-1e9, -1e9, 0.5, 1.5, -1.0, 1.0, 0.0])
  shape = (40, 7, 7)

  counts = draw(
    drafting=Drafting(3),
    target=np.broadcast_to(logits_P, shape),
    draft=np.broadcast_to(logits_Q, shape),
    row_ids=np.arange(400),
    max_decode_len=40,
  ).counts

  # 13,000 tests: a standard error of 0.004.
  rate = counts.accepted.sum() / counts.tested.sum()
  assert rate == pytest.approx(0.4742430437, abs=0.02)
  # Block efficiency of 3 drafted tokens; the last round of a row is cut.
  efficiency = 40 * 400 / counts.rounds.sum()
  assert 0.95 * 1.80581 < efficiency < 1.80581


def test_greedy_outputs_are_those_of_the_target():
  drawn = draw(GREEDY, row_ids=np.arange(3))

  want = []
  while len(want) < T and EOS not in want:
    want.append(int(TARGET[len(want), want[-1] if want else 0].argmax()))
  want += [0] * (T - len(want))
  np.testing.assert_array_equal(drawn.rollout.tokens, [want] * 3)
  np.testing.assert_array_equal(drawn.rollout.log_probs, np.zeros((3, T)))


def scripted(tokens):
  """A chain [T, V, V] that writes these tokens, whatever came before."""
  return np.broadcast_to(
    np.where(np.eye(12)[tokens] > 0, 0.0, -1e9)[:, None], (len(tokens), 12, 12)
  )


@pytest.mark.parametrize('config', [GREEDY, ANCESTRAL], ids=['greedy', 'T=1'])
@pytest.mark.parametrize(
  ('target', 'draft', 'tokens', 'rounds', 'tested', 'accepted'),
  [
    # All three proposals stand, and the target's own token after them.
    ([5, 6, 7, 8, 1], [5, 6, 7, 9, 9], [5, 6, 7, 8, 1], 2, 3, 3),
    # EOS is the second of the proposals that stand.
    ([5, 1, 9, 9, 9], [5, 1, 8, 8, 8], [5, 1, 0, 0, 0], 1, 2, 2),
    # EOS is a correction, EOS is the target's own token.
    ([5, 1, 9, 9, 9], [5, 8, 9, 9, 9], [5, 1, 0, 0, 0], 1, 2, 1),
    ([5, 6, 7, 1, 9], [5, 6, 7, 9, 9], [5, 6, 7, 1, 0], 1, 3, 3),
    # EOS that the draft proposes does not stand.
    ([5, 6, 1, 9, 9], [5, 1, 1, 9, 9], [5, 6, 1, 0, 0], 2, 3, 2),
    # No EOS: outputs are cut.
    ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9], 2, 3, 3),
    ([5, 6, 7, 8, 9], [4, 4, 4, 4, 4], [5, 6, 7, 8, 9], 5, 4, 0),
  ],
)
def test_a_row_ends_where_the_targets_output_does(
  config, target, draft, tokens, rounds, tested, accepted
):
  drawn = draw(
    config,
    Drafting(3),
    target=scripted(target),
    draft=scripted(draft),
    row_ids=np.arange(2),
    max_decode_len=5,
  )

  np.testing.assert_array_equal(drawn.rollout.tokens, [tokens] * 2)
  np.testing.assert_array_equal(drawn.rollout.weights, [np.sign(tokens)] * 2)
  counts = drawn.counts
  assert counts.rounds.tolist() == [rounds] * 2 == [counts.target_calls] * 2
  assert counts.tested.tolist() == [tested] * 2
  assert counts.accepted.tolist() == [accepted] * 2


def test_rows_that_ended_wait_for_the_others():
  # The first token decides when a row ends, which the draft does not know.
  target = np.broadcast_to(
    np.where(np.eye(12)[[5] * 9] > 0, 0.0, -1e9)[:, None], (9, 12, 12)
  ).copy()
  target[0, :, 3:8] = 0.0  # five tokens of probability 0.2
  target[1:, 3] = np.where(np.arange(12) == EOS, 0.0, -1e9)

  tokens, weights, _ = draw(
    drafting=Drafting(4),
    target=target,
    draft=scripted([6] * 9),
    row_ids=np.arange(40),
    max_decode_len=9,
  ).rollout

  is_short = tokens[:, 0] == 3
  assert 2 < is_short.sum() < 20
  np.testing.assert_array_equal(
    tokens[is_short, 1:], [[EOS, *[0] * 7]] * is_short.sum()
  )
  np.testing.assert_array_equal(weights.sum(1), np.where(is_short, 2, 9))
  assert (tokens[~is_short, 1:] == 5).all()


def test_a_residual_that_rounds_to_zero_is_drawn_from_the_target():
  # The draft's token is rejected, but p - q has no positive entry.
  p = jnp.float32([[0.0, 0.0, 0.5, 0.25, 0.25]])
  rows = 4000

  @jax.jit
  def decide():
    proposal = speculative._Proposal(
      step=jnp.int32(1),
      tokens=jnp.full((rows, 1), 2, jnp.int32),
      probs=jnp.broadcast_to(p[:, None] * (1 + 2**-20), (rows, 1, 5)),
      num=jnp.ones(rows, jnp.int32),
      goes_on=jnp.ones(rows, bool),
      cache=None,
    )
    draws = sampler.uniforms(jax.random.key(0), jnp.arange(rows))

    def uniform(step, stream):
      if stream == speculative._OF_TEST:
        return jnp.full(rows, 1 - 2.0**-24)
      return draws(step, stream)

    return speculative._decide(
      jnp.log(jnp.broadcast_to(p[:, None], (rows, 2, 5))),
      proposal,
      jnp.zeros(rows, jnp.int32),
      ANCESTRAL,
      1.0,
      uniform,
    )

  tokens = np.asarray(decide().tokens)[:, 0]
  assert (np.asarray(decide().num_accepted) == 0).all()
  share = np.bincount(tokens, minlength=5) / rows
  np.testing.assert_allclose(share, p[0], atol=0.04)  # 5 standard errors


def test_a_token_can_be_lenient_times_as_probable_but_no_more():
  # One position, from which the law is computed exactly.
  lenience = 0.8
  logits_P = np.array([-1e9, -1e9, 2.0, 1.0, 0.5, -0.5, -2.0])
  logits_Q = np.array([-1e9, -1e9, 0.5, 1.5, -1.0, 1.0, 0.0])

  drawn = draw(
    drafting=Drafting(1, lenience=lenience),
    target=np.broadcast_to(logits_P, (2, 7, 7)),
    draft=np.broadcast_to(logits_Q, (2, 7, 7)),
    max_decode_len=2,
  )

  p, q = probabilities(logits_P), probabilities(logits_Q)
  accepted = np.minimum(q, p / lenience)
  rate = drawn.counts.accepted.sum() / drawn.counts.tested.sum()
  assert rate == pytest.approx(accepted.sum(), abs=0.015)
  assert accepted.sum() == pytest.approx(0.5434574879)
  rest = np.maximum(p / lenience - q, 0)
  law = accepted + (1 - accepted.sum()) * rest / rest.sum()
  share = np.bincount(drawn.rollout.tokens[:, 0], minlength=7) / NUM_ROWS
  np.testing.assert_allclose(share, law, atol=0.015)  # 4 standard errors
  assert (law <= p / lenience + 1e-12).all()


def test_greedy_leniently_accepts_what_is_nearly_as_probable():
  target = np.log(np.array([1e-9, 1e-9, 0.5, 0.42, 0.08, 1e-9]))
  draft = np.log(np.array([1e-9, 1e-9, 0.1, 0.8, 0.1, 1e-9]))
  chains = {
    'target': np.broadcast_to(target, (4, 6, 6)),
    'draft': np.broadcast_to(draft, (4, 6, 6)),
    'row_ids': np.arange(1),
  }

  exact = draw(GREEDY, Drafting(2), **chains)
  lenient = draw(GREEDY, Drafting(2, lenience=0.8), **chains)

  assert exact.rollout.tokens.tolist() == [[2, 2, 2, 2]]
  assert lenient.rollout.tokens.tolist() == [[3, 3, 2, 2]]


def test_pad_and_unused_ids_are_never_written():
  # Models of two sizes; the tokenizer has 19 ids.
  drawn = draw_from_models(SamplerConfig(temperature=50.0), 200).rollout

  tokens = drawn.tokens[drawn.weights > 0]
  assert set(tokens) == set(range(1, tiny.NUM_IDS))


def test_a_draft_that_is_unsure_stops():
  sure = np.log(np.array([1e-9, 1e-9, 0.97, 0.01, 0.01, 0.01]))
  unsure = np.log(np.array([1e-9, 1e-9, 0.28, 0.24, 0.24, 0.24]))
  logits = np.broadcast_to(
    np.stack([sure, unsure, sure, sure, sure, sure])[:, None], (6, 6, 6)
  )

  counts = draw(
    GREEDY,
    Drafting(4, min_probability=0.6),
    target=logits,
    draft=logits,
    row_ids=np.arange(2),
    max_decode_len=6,
  ).counts

  # Positions 0 and 1; then 3 and 4: the last one is the target's.
  assert counts.tested.tolist() == [4, 4]
  assert counts.draft_calls == 4
  assert counts.target_calls == 2


def test_draws_differ_by_key_and_by_row_and_depend_on_nothing_else():
  config, rows = SamplerConfig(temperature=3.0), np.arange(200)
  tokens = draw(config, row_ids=rows).rollout.tokens

  other = draw(config, seed=1, row_ids=rows).rollout.tokens
  for a, b in ((tokens, other), (tokens[1:], tokens[:-1])):
    assert (a == b).all(axis=1).mean() < 0.5
  part = np.array([150, 3, 77, 42])
  for drafting in (Drafting(2), Drafting(3, min_probability=0.4)):
    np.testing.assert_array_equal(
      draw(config, drafting, row_ids=part).rollout.tokens,
      draw(config, drafting, row_ids=rows).rollout.tokens[part],
    )


TARGET_MODEL = tiny.model_and_params(0, num_decoder_layers=2)
DRAFT_MODEL = tiny.model_and_params(
  1, version='1.0', vocab_size=20, emb_dim=12, num_heads=1
)
INPUTS = tiny.tokens(1, [7, 4], 7)


def writer_of(model_and_params, config, inputs):
  return rollout_lib.Writer(*model_and_params, jnp.asarray(inputs), config)


def draw_from_models(
  config, num_rows, drafting=_TWO, ids=tiny.IDS, max_decode_len=6
):
  inputs = np.tile(INPUTS, (num_rows // 2, 1))

  @jax.jit
  def sample(row_ids_B):
    return rollout_lib.rollout_drafted(
      writer_of(TARGET_MODEL, config, inputs),
      writer_of(DRAFT_MODEL, config, inputs),
      jax.random.key(0),
      drafting,
      row_ids_B=row_ids_B,
      max_decode_len=max_decode_len,
      ids=ids,
    )

  return jax.tree.map(np.asarray, sample(np.arange(num_rows)))


def test_outputs_of_models_have_the_law_of_the_target():
  ids = tiny.special_ids(5)
  config = {'temperature': 2.0}

  drawn = draw_from_models(
    SamplerConfig(**config), 2 * 2048, Drafting(2), ids, max_decode_len=4
  ).rollout

  model, params = TARGET_MODEL
  for row, inputs in enumerate(INPUTS):
    # Logits after each of the 4 ** 3 prefixes.
    prefixes = np.array([*itertools.product(range(1, 5), repeat=3)])
    targets = np.pad(prefixes, ((0, 0), (0, 1)))
    logits = np.float64(
      tiny.logits(model, params, np.tile(inputs, (len(targets), 1)), targets)
    )
    logits[..., [0, *range(5, logits.shape[-1])]] = -1e9

    def next_logits(prefix, logits=logits, prefixes=prefixes):
      starts = (prefixes[:, : len(prefix)] == prefix).all(axis=1)
      return logits[starts.argmax(), len(prefix)]

    of_row = jax.tree.map(lambda x, row=row: x[row::2], drawn)
    assert_law(of_row, enumerate_outputs(next_logits, **config))


@pytest.mark.parametrize('length', [1, 3, 5])
def test_greedy_outputs_of_models_equal_plain_greedy(length):
  inputs = tiny.tokens(5, [7, 4, 6, 3, 5, 2, 7, 7], 7)
  kwargs = {
    'row_ids_B': jnp.arange(8),
    'max_decode_len': 12,
    'ids': tiny.IDS,
  }
  # A draft that is the target but for noise is right in part.
  model, params = TARGET_MODEL
  noise = tiny.params(model, 7)
  near = jax.tree.map(lambda p, n: p + 0.15 * n, params, noise)

  drawn = jax.jit(
    lambda: rollout_lib.rollout_drafted(
      writer_of(TARGET_MODEL, GREEDY, inputs),
      writer_of((model, near), GREEDY, inputs),
      jax.random.key(0),
      Drafting(length),
      **kwargs,
    )
  )()

  plain = jax.jit(
    lambda: rollout_lib.rollout(
      writer_of(TARGET_MODEL, GREEDY, inputs), jax.random.key(0), **kwargs
    )
  )()
  np.testing.assert_array_equal(drawn.rollout.tokens, plain.tokens)
  np.testing.assert_array_equal(drawn.rollout.weights, plain.weights)
  rate = drawn.counts.accepted.sum() / drawn.counts.tested.sum()
  assert 0.2 < rate < 0.95


def test_the_target_as_its_own_draft_is_always_accepted():
  inputs = tiny.tokens(5, [7, 4, 6, 3], 7)

  counts = jax.jit(
    lambda: rollout_lib.rollout_drafted(
      writer_of(TARGET_MODEL, GREEDY, inputs),
      writer_of(TARGET_MODEL, GREEDY, inputs),
      jax.random.key(0),
      Drafting(3),
      row_ids_B=jnp.arange(4),
      max_decode_len=13,
      ids=tiny.IDS,
    )
  )().counts

  # Also after a round in which all were: the draft has read its last token.
  np.testing.assert_array_equal(counts.accepted, counts.tested)
  assert counts.target_calls > 2


def drawn_on_one_and_on_all_devices():
  """Runs in a separate process, see `tiny.on_simulated_devices`."""
  inputs = tiny.tokens(1, [7, 4] * 4, 7)
  mesh = partitioning.make_mesh()
  rows = partitioning.batch_sharding(mesh)
  everywhere = jax.NamedSharding(mesh, jax.P())

  @jax.jit
  def sample(params, inputs, row_ids_B):
    target, draft = (
      rollout_lib.Writer(model, one, inputs, ANCESTRAL)
      for (model, _), one in zip(
        (TARGET_MODEL, DRAFT_MODEL), params, strict=True
      )
    )
    return rollout_lib.rollout_drafted(
      target,
      draft,
      jax.random.key(0),
      Drafting(3),
      row_ids_B=row_ids_B,
      max_decode_len=9,
      ids=tiny.IDS,
    )

  params = TARGET_MODEL[1], DRAFT_MODEL[1]
  one = sample(params, inputs, jnp.arange(8))
  all_ = sample(
    jax.device_put(params, everywhere),
    jax.device_put(inputs, rows),
    jax.device_put(jnp.arange(8), rows),
  )
  num_devices = [len(x.rollout.tokens.sharding.device_set) for x in (one, all_)]
  return num_devices, *(jax.tree.map(np.asarray, x) for x in (one, all_))


def test_draws_do_not_depend_on_the_number_of_devices():
  num_devices, one, all_ = tiny.on_simulated_devices(
    8, __name__, drawn_on_one_and_on_all_devices.__name__
  )

  assert num_devices == [1, 8]
  np.testing.assert_array_equal(all_.rollout.tokens, one.rollout.tokens)
  jax.tree.map(np.testing.assert_array_equal, all_.counts, one.counts)
  assert len(np.unique(one.rollout.tokens, axis=0)) > 4


def test_a_calculator_is_refused():
  with pytest.raises(ValueError, match='draft cannot .* calculator'):
    draw(SamplerConfig(calculator=True))


def test_a_draft_that_draws_otherwise_is_refused():
  with pytest.raises(ValueError, match='draft must draw as the target'):
    rollout_lib.rollout_drafted(
      writer_of(TARGET_MODEL, GREEDY, INPUTS),
      writer_of(DRAFT_MODEL, ANCESTRAL, INPUTS),
      jax.random.key(0),
      Drafting(),
      row_ids_B=jnp.arange(2),
      max_decode_len=9,
      ids=tiny.IDS,
    )


@pytest.mark.parametrize(
  'wrong',
  [
    {'length': 0},
    {'length': 2.0},
    {'min_probability': 1.0},
    {'lenience': 0.0},
    {'lenience': 1.5},
  ],
  ids=str,
)
def test_drafting_refuses_what_it_cannot_mean(wrong):
  name = 'DRAFT_LENGTH' if 'length' in wrong else next(iter(wrong))
  with pytest.raises(ValueError, match=name):
    Drafting(**wrong)


def test_a_draft_as_long_as_the_outputs_is_refused():
  with pytest.raises(
    ValueError, match='DRAFT_LENGTH is 7, .* 7 tokens at most'
  ):
    Drafting(7).check_fits(7)
  Drafting(6).check_fits(7)
