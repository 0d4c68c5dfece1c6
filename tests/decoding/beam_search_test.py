# SPDX-License-Identifier: Apache-2.0
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.batch import mask_unused_ids
from gkd_jax.decoding import beam_search, sampler
from gkd_jax.decoding.beam_search import BeamConfig
from tests import tiny

pytestmark = pytest.mark.slow  # compiles models

EOS = 1
IMPOSSIBLE = -1e8  # scores below it belong to what cannot occur


def random_log_p(seed, *shape):
  """Next-token log-probabilities [*shape, V]; id 0 is pad and impossible."""
  logits = np.random.default_rng(seed).standard_normal(shape)
  logits[..., 0] = -1e9
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


class History:
  """A model whose next token depends on all tokens before, through its cache.

  The tokens of a hypothesis are kept in the cache alone, so a cache that does
  not move with its hypothesis gives wrong probabilities.
  """

  def __init__(self, seed, batch_size, max_decode_len, vocab_size):
    self.max_decode_len = max_decode_len
    self.log_p = random_log_p(
      seed, batch_size, *[vocab_size] * max_decode_len, vocab_size
    )

  def next_log_p(self, row, prefix):
    """Returns log-probabilities [V] after these tokens, by definition."""
    padded = prefix + (0,) * (self.max_decode_len - len(prefix))
    return self.log_p[(row, *padded)]

  def search(self, config):
    """Runs the beam search under test."""
    batch_size = self.log_p.shape[0]
    table = jnp.float32(self.log_p)

    def decode_step(cache, tokens):
      step, history, rows = cache
      # The first token given is BOS, which is no part of the history.
      written = history.at[:, step - 1].set(tokens)
      history = jnp.where(step > 0, written, history)
      index = (rows, *(history[:, t] for t in range(self.max_decode_len)))
      return table[index], (step + 1, history, rows)

    rows = jnp.repeat(jnp.arange(batch_size), config.num_beams)
    history = jnp.zeros((rows.size, self.max_decode_len), jnp.int32)
    found = jax.jit(
      lambda: beam_search.beam_search(
        decode_step,
        (jnp.int32(0), history, rows),
        config,
        batch_size=batch_size,
        max_decode_len=self.max_decode_len,
        ids=tiny.IDS,
      )
    )()
    return [
      [
        (cut(tokens), float(score))
        for tokens, score in zip(*row, strict=True)
        if score > IMPOSSIBLE
      ]
      for row in zip(
        np.asarray(found.tokens), np.asarray(found.scores), strict=True
      )
    ]


def cut(tokens):
  """Returns the tokens up to EOS, if there is one."""
  tokens = tuple(int(t) for t in tokens)
  return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def penalised(log_p, length, alpha):
  return log_p / ((5 + length) / 6) ** alpha


def exhaustive(model, row, alpha):
  """All outputs that end, with their scores, best first."""
  found = []

  def extend(prefix, total):
    if prefix[-1:] == (EOS,):
      found.append((prefix, penalised(total, len(prefix), alpha)))
    elif len(prefix) < model.max_decode_len:
      for token, log_p in enumerate(model.next_log_p(row, prefix)):
        if log_p > IMPOSSIBLE:
          extend((*prefix, token), total + log_p)

  extend((), 0.0)
  return sorted(found, key=lambda output: -output[1])


def plain_beam_search(model, row, config):
  """Beam search by its definition, in lists, without early stopping."""
  live, done = [((), 0.0)], []
  for _ in range(model.max_decode_len):
    candidates = [
      ((*prefix, token), total + log_p)
      for prefix, total in live
      for token, log_p in enumerate(model.next_log_p(row, prefix))
      if log_p > IMPOSSIBLE
    ]
    candidates.sort(key=lambda output: -output[1])
    candidates = candidates[: 2 * config.num_beams]
    live = [c for c in candidates if c[0][-1] != EOS][: config.num_beams]
    done += [
      (tokens, penalised(total, len(tokens), config.alpha))
      for tokens, total in candidates
      if tokens[-1] == EOS
    ]
  return sorted(done, key=lambda output: -output[1])[: config.num_beams]


def assert_same_hypotheses(got, want):
  assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
  # Sums of a few float32 log-probabilities.
  np.testing.assert_allclose(
    [score for _, score in got], [score for _, score in want], atol=1e-5
  )


@pytest.mark.parametrize('alpha', [0.0, 0.6])
def test_a_wide_beam_finds_all_outputs_in_order(alpha):
  model = History(0, batch_size=3, max_decode_len=3, vocab_size=5)

  # 36 candidates at the last step, and 40 are looked at: nothing is pruned.
  got = model.search(BeamConfig(num_beams=20, alpha=alpha))

  for row in range(3):
    assert_same_hypotheses(got[row], exhaustive(model, row, alpha))


@pytest.mark.parametrize('alpha', [0.0, 0.6, 2.0])
@pytest.mark.parametrize('num_beams', [1, 2, 3])
def test_a_narrow_beam_prunes_and_stops_without_loss(num_beams, alpha):
  # Many rows, each its own model: among them are rows in which a hypothesis
  # overtakes those that ended before it, and rows whose beams cross.
  model = History(1, batch_size=60, max_decode_len=5, vocab_size=4)
  config = BeamConfig(num_beams, alpha)

  got = model.search(config)

  for row in range(60):
    assert_same_hypotheses(got[row], plain_beam_search(model, row, config))


def decode_step_of(logits_TV):
  logits_TV = jnp.float32(logits_TV)

  def decode_step(step, tokens):
    return jnp.tile(logits_TV[step], (tokens.shape[0], 1)), step + 1

  return decode_step


def chain(log_p_TV, config, counter=None):
  """Searches a chain in which the next token depends only on the position."""
  log_p_TV = jnp.asarray(log_p_TV, jnp.float32)

  def decode_step(step, tokens):
    if counter is not None:
      jax.debug.callback(lambda: counter.append(1))
    return decode_step_of(log_p_TV)(step, tokens)

  found = jax.jit(
    lambda: beam_search.beam_search(
      decode_step,
      jnp.int32(0),
      config,
      batch_size=1,
      max_decode_len=log_p_TV.shape[0],
      ids=tiny.IDS,
    )
  )()
  jax.effects_barrier()
  return [cut(tokens) for tokens in found.tokens[0]], found.scores[0]


def test_search_stops_when_nothing_better_can_come():
  p_TV = np.tile([1e-30, 0.98, 0.01, 0.01], (50, 1))
  calls = []

  tokens, _ = chain(np.log(p_TV), BeamConfig(num_beams=1), calls)

  assert tokens == [(EOS,)]
  assert len(calls) == 1


def test_length_penalty_is_that_of_wu_et_al():
  # ((5 + length) / 6) ** alpha, at lengths where the base is a whole number.
  assert beam_search.length_penalty(0.6, 1) == 1.0
  assert beam_search.length_penalty(1.0, 7) == 2.0
  assert beam_search.length_penalty(2.0, 13) == 9.0
  assert beam_search.length_penalty(0.0, 100) == 1.0


def test_alpha_decides_between_a_short_and_a_long_output():
  # EOS at once has log-probability ln 0.45 = -0.80. Seven tokens, all but the
  # first of them nearly certain, have ln 0.55 * 0.8 = -0.82.
  p_TV = np.full((7, 3), 1e-30)
  p_TV[0, EOS], p_TV[0, 2] = 0.45, 0.55
  p_TV[1:6, 2] = 0.8 ** (1 / 5)
  p_TV[1:6, EOS] = 1 - 0.8 ** (1 / 5)
  p_TV[6, EOS] = 1.0
  short, long = (EOS,), (2,) * 6 + (EOS,)

  without, _ = chain(np.log(p_TV), BeamConfig(num_beams=2, alpha=0.0))
  with_penalty, scores = chain(np.log(p_TV), BeamConfig(num_beams=2, alpha=1.0))

  assert without[0] == short
  assert with_penalty[0] == long
  # Its log-probability is divided by (5 + 7) / 6 = 2.
  assert scores[0] == pytest.approx(np.log(0.55 * 0.8) / 2, abs=1e-5)


def test_width_1_without_penalty_is_greedy_decoding():
  # Where EOS is never a close second, that is: a beam keeps an output that has
  # ended, although greedy decoding went on.
  rng = np.random.default_rng(0)
  for end in (1, 4, 6):
    logits_TV = rng.standard_normal((6, 8))
    logits_TV[:, 0] = -1e9
    logits_TV[:, EOS] = -20.0
    if end < 6:
      logits_TV[end, EOS] = 20.0

    found, _ = chain(logits_TV, BeamConfig(num_beams=1, alpha=0.0))

    greedy = sampler.sample(
      decode_step_of(logits_TV),
      jnp.int32(0),
      jax.random.key(0),
      sampler.GREEDY,
      row_ids_B=jnp.arange(1),
      max_decode_len=6,
      ids=tiny.IDS,
    )
    assert found == [cut(greedy.tokens[0])]


def test_without_any_end_the_unended_are_returned():
  log_p_TV = random_log_p(0, 4, 6)
  log_p_TV[:, EOS] = -1e9

  got, scores = chain(log_p_TV, BeamConfig(num_beams=3, alpha=0.6))

  every = itertools.product(range(2, 6), repeat=4)
  total = {
    y: sum(log_p_TV[t, token] for t, token in enumerate(y)) for y in every
  }
  # chain() normalises anew, now that EOS is out: compare differences.
  want = sorted(total, key=lambda y: -total[y])[:3]
  assert got == want
  rest = np.log(np.exp(log_p_TV).sum(axis=1)).sum()
  np.testing.assert_allclose(
    scores, [penalised(total[y] - rest, 4, 0.6) for y in want], atol=1e-5
  )


def test_pad_and_unused_ids_never_occur():
  logits_TV = np.random.default_rng(0).standard_normal((5, 12))
  logits_TV[:, 0] = logits_TV[:, 9:] = 1e4

  masked_TV = mask_unused_ids(jnp.float32(logits_TV), tiny.special_ids(9))
  found, _ = chain(masked_TV, BeamConfig(num_beams=4))

  ids = {token for tokens in found for token in tokens}
  assert len(ids) > 2
  assert ids <= set(range(1, 9))


def test_scores_are_those_of_the_full_forward_pass():
  model, params = tiny.model_and_params(0, num_decoder_layers=2)
  inputs = tiny.tokens(1, [7, 4, 5], 7)
  width, max_decode_len = 3, 6
  apply = functools.partial(model.apply, {'params': params})

  @jax.jit
  def search(inputs):
    inputs = jnp.repeat(inputs, width, axis=0)
    encoded = apply(inputs, method='encode')
    cache = apply(encoded, inputs, max_decode_len, method='start_cache')

    def decode_step(cache, tokens):
      logits, cache = apply(cache, tokens, method='decode_step')
      return mask_unused_ids(logits, tiny.IDS), cache

    return beam_search.beam_search(
      decode_step,
      cache,
      BeamConfig(width, alpha=0.6),
      batch_size=3,
      max_decode_len=max_decode_len,
      ids=tiny.IDS,
    )

  tokens, scores = search(inputs)

  tokens = np.asarray(tokens).reshape(3 * width, max_decode_len)
  scores = np.asarray(scores).reshape(3 * width)
  logits = tiny.logits(model, params, np.repeat(inputs, width, 0), tokens)
  log_p = jax.nn.log_softmax(mask_unused_ids(logits, tiny.IDS))
  log_p = np.take_along_axis(np.asarray(log_p), tokens[..., None], 2)[..., 0]
  want = [
    penalised(row[: len(cut(y))].sum(), len(cut(y)), 0.6)
    for row, y in zip(log_p, tokens, strict=True)
  ]
  found = scores > IMPOSSIBLE  # a row may have fewer outputs than beams
  assert found.sum() > 5
  # Cached and full pass differ by rounding, 1e-5 a token at most.
  np.testing.assert_allclose(scores[found], np.array(want)[found], atol=1e-4)


@pytest.mark.parametrize('wrong', [{'num_beams': 0}, {'alpha': -0.1}])
def test_config_refuses_what_it_cannot_mean(wrong):
  with pytest.raises(ValueError, match=f'BeamConfig.{next(iter(wrong))}'):
    BeamConfig(**wrong)
