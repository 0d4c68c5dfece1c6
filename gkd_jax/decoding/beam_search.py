# SPDX-License-Identifier: Apache-2.0
"""Beam search with T5X's length penalty, over the sampler's `decode_step`.

Source: Wu et al. (2016), arXiv:1609.08144, Eq. 14; agrees with
`t5x.decoding.beam_search` in its penalty and its rule of stopping.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import MASKED_LOGIT, SpecialIds
from gkd_jax.decoding.sampler import Cache, DecodeStep


@dataclasses.dataclass(frozen=True)
class BeamConfig:
  """Width and length penalty.

  Attributes:
    num_beams: hypotheses kept per row.
    alpha: exponent of the length penalty ((5 + length) / 6) ** alpha by which
      a log-probability is divided; 0 is no penalty, 0.6 is T5X's default.
  """

  num_beams: int = 4
  alpha: float = 0.6

  def __post_init__(self):
    if self.num_beams < 1:
      raise ValueError(
        f'BeamConfig.num_beams must be at least 1, got {self.num_beams}.'
      )
    if self.alpha < 0.0:
      # The stopping rule assumes that the penalty grows with the length.
      raise ValueError(
        f'BeamConfig.alpha must not be negative, got {self.alpha}. Use 0 for '
        'no length penalty.'
      )


class Beams(NamedTuple):
  """The hypotheses found, best first."""

  tokens: jax.Array  # [B, num_beams, T] int32, pad after EOS
  scores: jax.Array  # [B, num_beams] float32, log-probability / penalty


class _Loop(NamedTuple):
  step: jax.Array  # []
  live: Beams  # unended, with plain log-probabilities as scores
  done: Beams  # ended, with penalised scores
  cache: Cache


def length_penalty(alpha: float, length: jax.Array) -> jax.Array:
  """Returns ((5 + length) / 6) ** alpha."""
  return jnp.power((5.0 + length) / 6.0, alpha)


def beam_search(
  decode_step: DecodeStep,
  cache: Cache,
  config: BeamConfig,
  *,
  batch_size: int,
  max_decode_len: int,
  ids: SpecialIds,
) -> Beams:
  """Finds the outputs of highest penalised log-probability.

  Args:
    decode_step: (cache, tokens [B * num_beams]) -> (logits [B * num_beams, V],
      cache). Rows of one example stand side by side.
    cache: built for B * num_beams rows; every leaf but scalars has them first.
    config: width and penalty.
    batch_size: B.
    max_decode_len: T.
    ids: the special ids; start, EOS and pad are used.

  Returns:
    `Beams`, best first. If no hypothesis of a row reached EOS within T, the row
    has unfinished ones. If fewer than `num_beams` did, the scores of the others
    are near MASKED_LOGIT.
  """
  width = config.num_beams

  def merge(x):
    return x.reshape(batch_size * width, *x.shape[2:])

  def gather(tree, index_BK):
    return jax.tree.map(
      lambda x: jnp.take_along_axis(
        x, index_BK.reshape(index_BK.shape + (1,) * (x.ndim - 2)), axis=1
      ),
      tree,
    )

  def gather_cache(cache, index_BK):
    rows = merge(index_BK + width * jnp.arange(batch_size)[:, None])
    return jax.tree.map(lambda x: x[rows] if x.ndim else x, cache)

  def best(beams: Beams) -> Beams:
    scores, index = jax.lax.top_k(beams.scores, width)
    return Beams(gather(beams.tokens, index), scores)

  def body(s: _Loop) -> _Loop:
    last_BK = jnp.where(
      s.step > 0, s.live.tokens[:, :, jnp.maximum(s.step - 1, 0)], ids.start
    )
    logits, cache = decode_step(s.cache, merge(last_BK))
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    vocab_size = log_p.shape[-1]
    total_BKV = s.live.scores[:, :, None] + log_p.reshape(
      batch_size, width, vocab_size
    )
    # At most `width` of 2 * width candidates end here (one EOS per hypothesis),
    # so at least `width` stay live.
    score_BC, flat_BC = jax.lax.top_k(
      total_BKV.reshape(batch_size, -1), 2 * width
    )
    parent_BC, token_BC = flat_BC // vocab_size, flat_BC % vocab_size
    tokens_BCT = gather(s.live.tokens, parent_BC).at[:, :, s.step].set(token_BC)
    ends_BC = token_BC == ids.eos

    live_score, chosen = jax.lax.top_k(
      jnp.where(ends_BC, MASKED_LOGIT, score_BC), width
    )
    live = Beams(gather(tokens_BCT, chosen), live_score)
    penalised = score_BC / length_penalty(config.alpha, s.step + 1)
    done = best(
      Beams(
        jnp.concatenate([s.done.tokens, tokens_BCT], axis=1),
        jnp.concatenate(
          [s.done.scores, jnp.where(ends_BC, penalised, MASKED_LOGIT)], axis=1
        ),
      )
    )
    cache = gather_cache(cache, gather(parent_BC, chosen))
    return _Loop(s.step + 1, live, done, cache)

  def keep_going(s: _Loop) -> jax.Array:
    # Log-probabilities only decrease and the penalty is largest at full length:
    # this bounds the score of every live hypothesis.
    reachable_B = s.live.scores[:, 0] / length_penalty(
      config.alpha, max_decode_len
    )
    can_improve = jnp.any(reachable_B > s.done.scores[:, -1])
    return (s.step < max_decode_len) & can_improve

  tokens = jnp.full((batch_size, width, max_decode_len), ids.pad, jnp.int32)
  masked = jnp.full((batch_size, width), MASKED_LOGIT, jnp.float32)
  start = _Loop(
    step=jnp.int32(0),
    # All beams start equal, so only the first may branch.
    live=Beams(tokens, masked.at[:, 0].set(0.0)),
    done=Beams(tokens, masked),
    cache=cache,
  )
  end = jax.lax.while_loop(keep_going, body, start)
  unended = end.live.scores / length_penalty(config.alpha, max_decode_len)
  # Masked hypotheses were divided by at most the penalty of full length.
  impossible = MASKED_LOGIT / length_penalty(config.alpha, max_decode_len) / 2
  none_done = end.done.scores[:, :1] <= impossible
  return Beams(
    jnp.where(none_done[:, :, None], end.live.tokens, end.done.tokens),
    jnp.where(none_done, unended, end.done.scores),
  )
