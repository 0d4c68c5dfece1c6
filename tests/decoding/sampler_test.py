# SPDX-License-Identifier: Apache-2.0
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.batch import MASKED_LOGIT, mask_unused_ids
from gkd_jax.decoding import rollout as rollout_lib
from gkd_jax.decoding import sampler
from gkd_jax.decoding.sampler import GREEDY, SamplerConfig
from gkd_jax.parallel import partitioning
from tests import tiny

pytestmark = pytest.mark.slow  # compiles models

EOS = 1
V, T = 5, 3  # of the scripted and random chains below; id 0 is pad
NUM_ROWS = 20_480


@pytest.fixture(scope='module')
def chain():
  """Random next-token logits [position, last token, next token], float64."""
  logits = 1.5 * np.random.default_rng(3).standard_normal((T, V, V))
  logits[..., 0] = -1e9  # as `mask_unused_ids` leaves the pad id
  return logits


def draw(
  logits_TVV, config, *, seed=0, row_ids=None, max_decode_len=T, prefix=None
):
  """Samples from a chain whose cache is the position."""
  logits_TVV = jnp.float32(logits_TVV)
  if row_ids is None:
    row_ids = np.arange(NUM_ROWS)

  @jax.jit
  def sample(rng, row_ids_B, prefix):
    return sampler.sample(
      lambda step, token_B: (logits_TVV[step, token_B], step + 1),
      jnp.int32(0),
      rng,
      config,
      row_ids_B=row_ids_B,
      max_decode_len=max_decode_len,
      ids=tiny.IDS,
      prefix=prefix,
    )

  drawn = sample(jax.random.key(seed), row_ids, prefix)
  return jax.tree.map(np.asarray, drawn)


def scripted(script_TB):
  """A decode step that depends on the row, unlike a chain [T, V, V]."""
  script = jnp.asarray(script_TB)

  def decode_step(step, token_B):
    del token_B
    return jnp.where(jax.nn.one_hot(script[step], 12) > 0, 0.0, -1e9), step + 1

  return jax.jit(
    lambda: sampler.sample(
      decode_step,
      jnp.int32(0),
      jax.random.key(0),
      sampler.ANCESTRAL,
      row_ids_B=jnp.arange(script.shape[1]),
      max_decode_len=script.shape[0],
      ids=tiny.IDS,
    )
  )()


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
  """Returns the sampling distribution by its definition, in float64 loops."""
  p = np.exp((logits - logits.max()) / temperature)
  p /= p.sum()
  order = np.argsort(-p)
  if top_k:
    p[order[top_k:]] = 0.0
    p /= p.sum()
  mass = 0.0
  for i in order:
    if mass >= top_p:
      p[i] = 0.0
    mass += p[i]
  return p / p.sum()


def enumerate_outputs(logits_TVV, **config):
  """{tokens, cut after EOS: probability} of all outputs of a chain."""
  outputs = {}

  def extend(prefix, probability):
    if len(prefix) == T or prefix[-1:] == (EOS,):
      outputs[prefix] = probability
      return
    last = prefix[-1] if prefix else 0
    p = probabilities(logits_TVV[len(prefix), last], **config)
    for token in np.flatnonzero(p):
      extend((*prefix, int(token)), probability * p[token])

  extend((), 1.0)
  return outputs


@pytest.mark.parametrize(
  'config',
  [
    {},
    {'temperature': 0.5},
    {'temperature': 2.0},
    {'top_k': 2},
    {'top_p': 0.9},
    {'temperature': 1.5, 'top_k': 3, 'top_p': 0.8},
  ],
  ids=str,
)
def test_outputs_occur_as_often_as_their_probability_says(chain, config):
  expected = enumerate_outputs(chain, **config)

  rollout = draw(chain, SamplerConfig(**config))

  counts = dict.fromkeys(expected, 0)
  rows = np.where(rollout.weights > 0, rollout.tokens, -1)
  for row, count in zip(
    *np.unique(rows, axis=0, return_counts=True), strict=True
  ):
    # KeyError: an output of probability 0 was drawn.
    counts[tuple(row[row >= 0].tolist())] += count
  n = NUM_ROWS * np.array(list(expected.values()))
  k = np.array(list(counts.values()))
  # Chi-square over all outputs; its mean is the degrees of freedom, its
  # standard deviation sqrt of twice that. 4 of them leave 1 in 10,000.
  rare = n < 5
  n = np.append(n[~rare], n[rare].sum() + 1e-9)
  k = np.append(k[~rare], k[rare].sum())
  freedom = (n > 1e-3).sum() - 1
  statistic = ((k - n) ** 2 / n).sum()
  assert statistic < freedom + 4 * np.sqrt(2 * freedom)
  assert freedom > 5


@pytest.mark.parametrize(
  'config',
  [{}, {'temperature': 0.7}, {'temperature': 1.5, 'top_k': 3, 'top_p': 0.8}],
  ids=str,
)
def test_log_probs_are_those_of_the_distribution_drawn_from(chain, config):
  rollout = draw(chain, SamplerConfig(**config), row_ids=np.arange(500))

  expected = enumerate_outputs(chain, **config)
  for row, weights, log_probs in zip(*rollout, strict=True):
    want = np.log(expected[tuple(row[weights > 0].tolist())])
    # At most 3 terms of float32 log-softmax.
    assert log_probs.sum() == pytest.approx(want, abs=2e-6)
  assert (rollout.log_probs[rollout.weights == 0] == 0).all()
  assert (rollout.weights == 0).any()


def test_greedy_takes_the_most_probable_token(chain):
  rollout = draw(chain, GREEDY, row_ids=np.arange(3))

  want, last = [], 0
  for t in range(T):
    last = 0 if last == EOS and t else int(chain[t, last].argmax())
    want.append(last)
    if last == EOS:
      want += [0] * (T - len(want))
      break
  np.testing.assert_array_equal(rollout.tokens, [want] * 3)
  np.testing.assert_array_equal(rollout.log_probs, np.zeros((3, T)))


def test_weight_covers_eos_and_nothing_after():
  # Rows are positions. What the script says after an EOS must not matter.
  script = np.array([[5, 2, 6], [1, 7, 1], [8, 1, 1], [9, 9, 9]])

  rollout = scripted(script)

  np.testing.assert_array_equal(
    rollout.tokens, [[5, 1, 0, 0], [2, 7, 1, 0], [6, 1, 0, 0]]
  )
  np.testing.assert_array_equal(
    rollout.weights, [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]
  )


def test_weight_comes_from_what_was_drawn_not_from_the_id():
  # Only a broken model draws pad (nothing masks it here): it is a token.
  rollout = scripted(np.array([[0, 5], [3, 1]]))

  np.testing.assert_array_equal(rollout.tokens, [[0, 3], [5, 1]])
  np.testing.assert_array_equal(rollout.weights, [[1, 1], [1, 1]])


def test_rows_that_never_end_are_full():
  rollout = scripted(np.array([[5, 5], [6, 1], [7, 7]]))

  np.testing.assert_array_equal(rollout.tokens, [[5, 6, 7], [5, 1, 0]])
  np.testing.assert_array_equal(rollout.weights, [[1, 1, 1], [1, 1, 0]])


def test_loop_ends_with_the_last_row():
  steps = []
  script = jnp.array([[5, 2], [1, 7], [8, 1], [9, 9], [9, 9], [9, 9]])

  def decode_step(step, token_B):
    del token_B
    jax.debug.callback(lambda s: steps.append(int(s)), step)
    return jnp.where(jax.nn.one_hot(script[step], 12) > 0, 0.0, -1e9), step + 1

  jax.jit(
    lambda: sampler.sample(
      decode_step,
      jnp.int32(0),
      jax.random.key(0),
      sampler.ANCESTRAL,
      row_ids_B=jnp.arange(2),
      max_decode_len=6,
      ids=tiny.IDS,
    )
  )()

  jax.effects_barrier()
  assert sorted(steps) == [0, 1, 2]


@pytest.mark.parametrize(
  'config',
  [
    {},
    {'temperature': 0.0},
    {'temperature': 100.0},
    {'top_k': 40_000},
    {'top_p': 0.999999},
  ],
  ids=str,
)
def test_pad_and_unused_ids_are_never_drawn(config):
  # T5's vocabulary: 32100 pieces in 32128 rows.
  logits_BV = jax.random.normal(jax.random.key(0), (16, 32_128))
  logits_BV = logits_BV.at[:, 0].set(1e4).at[:, 32_100:].set(1e4)

  rollout = jax.jit(
    lambda: sampler.sample(
      lambda cache, token_B: (
        mask_unused_ids(logits_BV, tiny.special_ids(32_100)),
        cache,
      ),
      (),
      jax.random.key(1),
      SamplerConfig(**config),
      row_ids_B=jnp.arange(16),
      max_decode_len=8,
      ids=tiny.IDS,
    )
  )()

  tokens = np.asarray(rollout.tokens)[np.asarray(rollout.weights) > 0]
  assert tokens.size > 100
  assert tokens.min() >= 1
  assert tokens.max() < 32_100


LARGEST_UNIFORM = 1.0 - 2.0**-24  # below 1 in float32


@pytest.mark.parametrize('uniform', [0.0, 2.0**-24, LARGEST_UNIFORM])
@pytest.mark.parametrize('num_ids', [32_100, 32_128, 300])
def test_only_ids_of_positive_probability_are_drawn(uniform, num_ids):
  rng = np.random.default_rng(0)
  p = rng.random((20, num_ids)) ** 8
  p[rng.random(p.shape) < 0.9] = 0.0  # both ends of most rows, too
  p[0] = 1.0
  p[1:3] = 0.0
  p[1, 0] = p[2, -1] = 1.0
  # Rounding: the sum of a row differs from 1 in its last digits.
  p = np.float32(p / p.sum(axis=1, keepdims=True))

  drawn = jax.jit(sampler.invert_cumulative)(
    np.full(20, uniform, np.float32), p
  )

  assert (p[np.arange(20), drawn] > 0).all()
  if uniform == 0.0:
    np.testing.assert_array_equal(drawn, (p > 0).argmax(axis=1))


@pytest.mark.parametrize('vocab_size', [5, 127, 128, 129, 300, 1000])
def test_draw_inverts_the_cumulative_distribution_exactly(vocab_size):
  # Probabilities are multiples of 2**-20 that sum to 1, and the numbers of
  # 2**-23: all sums are exact in float32, so there is one right answer.
  rng = np.random.default_rng(vocab_size)
  cuts = np.sort(rng.integers(0, 2**20, (400, vocab_size - 1)), axis=1)
  counts = np.diff(cuts, axis=1, prepend=0, append=2**20)
  uniform = rng.integers(0, 2**23, 400)
  uniform[::4] = 8 * cuts[::4, rng.integers(0, vocab_size - 1)]  # on a border

  got = jax.jit(sampler.invert_cumulative)(
    jnp.float32(uniform / 2**23), jnp.float32(counts / 2**20)
  )

  want = [
    np.searchsorted(np.cumsum(row) * 8, u, side='right')
    for row, u in zip(counts, uniform, strict=True)
  ]
  np.testing.assert_array_equal(got, want)


def test_draw_is_accurate_for_a_large_vocabulary():
  rng = np.random.default_rng(0)
  p = rng.random((100, 32_100)) ** 8
  p = np.float32(p / p.sum(axis=1, keepdims=True))
  uniform = np.float32(rng.random(100))

  got = np.asarray(jax.jit(sampler.invert_cumulative)(uniform, p))

  cumulative = np.cumsum(np.float64(p), axis=1)
  through = cumulative[np.arange(100), got]
  before = through - p[np.arange(100), got]
  target = uniform * cumulative[:, -1]
  # Sums of about 250 float32 numbers: 1e-6 is 16 roundings at 1.
  assert (before - 1e-6 <= target).all()
  assert (target <= through + 1e-6).all()


@pytest.mark.parametrize('vocab_size', [12, 1000])
def test_shards_of_the_vocabulary_draw_the_same_tokens(vocab_size):
  rng = np.random.default_rng(0)
  logits = np.float32(2 * rng.standard_normal((64, vocab_size)))
  logits[:, vocab_size // 4 : vocab_size // 2] = MASKED_LOGIT  # a whole shard
  uniform = np.float32(rng.uniform(size=64))
  uniform[:2] = 0.0, 1.0 - 2.0**-24

  def draw(vocab_shards):
    return jax.jit(
      lambda logits, uniform: sampler.draw_tokens(
        logits, sampler.ANCESTRAL, lambda: uniform, vocab_shards
      )
    )(logits, uniform)

  (got, got_log_probs), (want, want_log_probs) = draw(4), draw(1)
  np.testing.assert_array_equal(got, want)
  # One of them sums zeros as well.
  np.testing.assert_allclose(got_log_probs, want_log_probs, rtol=1e-6)


def test_filter_keeps_what_ties_with_the_last_one_kept():
  logits = jnp.log(jnp.array([0.4, 0.2, 0.2, 0.2]))

  kept = sampler.filter_logits(logits, SamplerConfig(top_k=2)) > -1e8

  np.testing.assert_array_equal(kept, [True] * 4)


def test_top_p_keeps_the_most_probable_token_whatever_its_probability():
  logits = jnp.log(jnp.array([0.3, 0.4, 0.2, 0.1]))

  kept = sampler.filter_logits(logits, SamplerConfig(top_p=0.01)) > -1e8

  np.testing.assert_array_equal(kept, [False, True, False, False])


@pytest.mark.parametrize(
  ('config', 'want'),
  [
    # Hewitt et al. 2022, and Nguyen et al. 2024.
    (
      {'epsilon': 0.02},
      (0.606060606061, 0.303030303030, 0.070707070707, 0.02020202020202, 0),
    ),
    (
      {'epsilon': 0.05},
      (0.6185567010309, 0.30927835051546, 0.07216494845361, 0, 0),
    ),
    ({'epsilon': 0.7}, (1, 0, 0, 0, 0)),
    ({'min_p': 0.5}, (2 / 3, 1 / 3, 0, 0, 0)),
    (
      {'min_p': 0.1},
      (0.6185567010309, 0.30927835051546, 0.07216494845361, 0, 0),
    ),
    ({'min_p': 1.0}, (1, 0, 0, 0, 0)),
    # 0.3 of the two that top_k leaves is above 0.3.
    ({'top_k': 2, 'epsilon': 0.3}, (2 / 3, 1 / 3, 0, 0, 0)),
    ({'temperature': 0.5, 'epsilon': 0.05}, (0.8, 0.2, 0, 0, 0)),
  ],
  ids=str,
)
def test_cut_offs_by_probability_drop_and_renormalise(config, want):
  logits = jnp.log(jnp.array([0.6, 0.3, 0.07, 0.02, 0.01]))

  kept = sampler.filter_logits(logits, SamplerConfig(**config))

  # float32 softmax.
  np.testing.assert_allclose(jax.nn.softmax(kept), want, atol=1e-6)


def test_a_prefix_is_continued_as_if_it_had_been_drawn(chain):
  rows = np.arange(200)
  tokens, weights, log_probs = draw(chain, sampler.ANCESTRAL, row_ids=rows)
  lengths = np.minimum(rows % 4, weights.sum(axis=1)).astype(np.int32)

  again = draw(
    chain,
    sampler.ANCESTRAL,
    row_ids=rows,
    prefix=sampler.Prefix(tokens, lengths),
  )

  np.testing.assert_array_equal(again.tokens, tokens)
  np.testing.assert_array_equal(again.weights, weights)
  was_drawn = np.arange(T) >= lengths[:, None]
  np.testing.assert_array_equal(again.log_probs, log_probs * was_drawn)


def test_an_eos_in_a_prefix_ends_the_row(chain):
  prefix = sampler.Prefix(np.array([[3, 2], [EOS, 2]]), np.array([2, 2]))

  drawn = draw(chain, sampler.ANCESTRAL, row_ids=np.arange(2), prefix=prefix)

  assert drawn.tokens[0, :2].tolist() == [3, 2]
  assert drawn.tokens[0, 2] != 0
  assert drawn.tokens[1].tolist() == [EOS, 0, 0]
  assert drawn.weights.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
  'wrong',
  [
    {'temperature': -1.0},
    {'top_k': -1},
    {'top_p': 0.0},
    {'top_p': 1.1},
    {'min_p': -0.1},
    {'min_p': 1.1},
    {'epsilon': -0.1},
    {'epsilon': 1.0},
  ],
)
def test_config_refuses_what_it_cannot_mean(wrong):
  with pytest.raises(ValueError, match=f'SamplerConfig.{next(iter(wrong))}'):
    SamplerConfig(**wrong)


def test_draws_differ_by_key_and_by_row(chain):
  config = SamplerConfig(temperature=3.0)
  rows = np.arange(200)

  tokens = draw(chain, config, seed=0, row_ids=rows).tokens

  other = draw(chain, config, seed=1, row_ids=rows).tokens
  # Independent draws agree in a row with a probability far below 1/2.
  for a, b in ((tokens, other), (tokens[1:], tokens[:-1])):
    assert (a == b).all(axis=1).mean() < 0.5
  np.testing.assert_array_equal(
    tokens, draw(chain, config, seed=0, row_ids=rows).tokens
  )


def test_draws_do_not_depend_on_the_other_rows_of_a_batch(chain):
  tokens = draw(chain, sampler.ANCESTRAL, row_ids=np.arange(200)).tokens

  part = np.array([150, 3, 77, 42])
  np.testing.assert_array_equal(
    draw(chain, sampler.ANCESTRAL, row_ids=part).tokens, tokens[part]
  )


def tokens_on_one_and_on_all_devices():
  """Runs in a separate process, see `tiny.on_simulated_devices`."""
  model, params = tiny.model_and_params(0)
  inputs = tiny.tokens(1, list(itertools.islice(itertools.cycle([7, 4]), 8)), 7)

  @jax.jit
  def rollout(params, inputs, row_ids_B):
    return rollout_lib.rollout(
      rollout_lib.Writer(model, params, inputs, sampler.ANCESTRAL),
      jax.random.key(0),
      row_ids_B=row_ids_B,
      max_decode_len=6,
      ids=tiny.IDS,
    )

  mesh = partitioning.make_mesh()
  rows = partitioning.batch_sharding(mesh)
  everywhere = jax.NamedSharding(mesh, jax.P())
  one = rollout(params, inputs, row_ids_B=jnp.arange(8))
  all_ = rollout(
    jax.device_put(params, everywhere),
    jax.device_put(inputs, rows),
    row_ids_B=jax.device_put(jnp.arange(8), rows),
  )
  num_devices = [len(x.tokens.sharding.device_set) for x in (one, all_)]
  return num_devices, np.asarray(one.tokens), np.asarray(all_.tokens)


@pytest.mark.slow  # compiles models
def test_several_outputs_of_an_input_are_as_if_it_were_repeated():
  model, params = tiny.model_and_params(0)
  inputs = tiny.tokens(1, [7, 4, 5], 7)

  @functools.partial(jax.jit, static_argnames='num_outputs')
  def rollout(inputs, row_ids_B, num_outputs):
    return rollout_lib.rollout(
      rollout_lib.Writer(model, params, inputs, sampler.ANCESTRAL),
      jax.random.key(0),
      row_ids_B=row_ids_B,
      max_decode_len=6,
      ids=tiny.IDS,
      num_outputs=num_outputs,
    )

  several = rollout(inputs, jnp.arange(3), num_outputs=2)

  repeated = rollout(np.repeat(inputs, 2, axis=0), jnp.arange(6), num_outputs=1)
  np.testing.assert_array_equal(several.tokens, repeated.tokens)
  # Outputs of one input differ.
  assert (several.tokens[::2] != several.tokens[1::2]).any()


def test_draws_do_not_depend_on_the_number_of_devices():
  num_devices, one, all_ = tiny.on_simulated_devices(
    8, __name__, tokens_on_one_and_on_all_devices.__name__
  )

  assert num_devices == [1, 8]
  np.testing.assert_array_equal(all_, one)
  assert len(np.unique(one, axis=0)) == 8
