# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: a small model drafts, the target checks, in one loop.

In each round the draft proposes some tokens one by one, and the target computes
its distributions at all these positions in one call. Tokens are accepted from
the left until one is rejected, which is drawn anew from what the draft's
distribution lacks; if all are accepted, the target draws one more. Outputs have
exactly the target's distribution, whatever the draft is.

Source: Leviathan et al. (2023), arXiv:2211.17192, Algorithm 1; Zhou et al.
(2024), arXiv:2310.08461.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import SpecialIds
from gkd_jax.decoding import sampler

Cache = Any
# (cache, offsets [B], tokens [B, N]) -> (logits [B, N, V], cache); see
# `interface.Model.decode_block`. Ids that may not occur are masked.
DecodeBlock = Callable[[Cache, jax.Array, jax.Array], tuple[jax.Array, Cache]]

# Streams of random numbers. The target draws from the one that `sampler.sample`
# uses. A position that is drafted again after a rejection before it gets the
# same numbers: nothing that was kept depends on them.
_OF_TARGET, _OF_DRAFT, _OF_TEST = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Drafting:
  """How tokens are drafted and accepted.

  Attributes:
    length: the tokens that the draft proposes in a round, at most.
    min_probability: the draft stops after a token to which it gives a lower
      probability; 0: it always proposes `length` tokens.
    lenience: l: a token is accepted with probability min(1, p / (l q)), in
      greedy decoding if its probability is at least l times the highest one.
      1 is exact. Below 1 more tokens are accepted, but outputs no longer have
      the target's distribution: a token can have the probability p / l.
  """

  length: int = 5
  min_probability: float = 0.0
  lenience: float = 1.0

  def __post_init__(self):
    if not isinstance(self.length, int) or self.length < 1:
      raise ValueError(
        'DRAFT_LENGTH must be a whole number, 1 or more: the tokens that the '
        f'draft proposes in a round; got {self.length!r}.'
      )
    if not 0.0 <= self.min_probability < 1.0:
      raise ValueError(
        'Drafting.min_probability must be in [0, 1), got '
        f'{self.min_probability}. 0 always drafts DRAFT_LENGTH tokens.'
      )
    if not 0.0 < self.lenience <= 1.0:
      raise ValueError(
        f'Drafting.lenience must be in (0, 1], got {self.lenience}. 1 is exact.'
      )

  @property
  def is_exact(self) -> bool:
    """Whether outputs have the target's distribution."""
    return self.lenience == 1.0

  def check_fits(self, max_decode_len: int) -> None:
    """Raises ValueError if a draft is longer than all outputs."""
    if self.length >= max_decode_len:
      raise ValueError(
        f'DRAFT_LENGTH is {self.length}, but outputs have {max_decode_len} '
        'tokens at most (TASK_FEATURE_LENGTHS), of which the target writes the '
        f'last one of a round. Set it to {max(1, max_decode_len - 1)} or less.'
      )


class Counts(NamedTuple):
  """What the rounds of a batch did.

  `calls` are those of the programs: they end with the slowest row.
  """

  rounds: jax.Array  # [B] int32, until the row ended
  tested: jax.Array  # [B] int32 drafted tokens that were accepted or rejected
  accepted: jax.Array  # [B] int32
  target_calls: jax.Array  # [] int32
  draft_calls: jax.Array  # [] int32


class Drafted(NamedTuple):
  """Sampled outputs, and how they came about."""

  rollout: sampler.Rollout
  counts: Counts


class _Proposal(NamedTuple):
  """The draft's proposal of a round, while it grows."""

  step: jax.Array  # [], number of tokens so far
  tokens: jax.Array  # [B, G] int32
  probs: jax.Array | None  # [B, G, V] drawn from; None: greedy
  num: jax.Array  # [B] int32, the tokens that each row proposes
  goes_on: jax.Array  # [B] bool
  cache: Cache


class _Loop(NamedTuple):
  """The state of the loop over rounds."""

  position: jax.Array  # [B] int32, number of tokens written
  alive: jax.Array  # [B] bool
  inputs: jax.Array  # [B, T + G + 2] of the decoder: start id, then the tokens
  log_probs: jax.Array  # [B, T + G + 1]
  target_cache: Cache
  draft_cache: Cache
  counts: Counts


class _Round(NamedTuple):
  """What a target writes in a round: tokens up to `num_accepted` stand."""

  tokens: jax.Array  # [B, G + 1] int32
  log_probs: jax.Array  # [B, G + 1]
  num_accepted: jax.Array  # [B] int32


def cache_length(max_decode_len: int, drafting: Drafting) -> int:
  """Returns the positions that the caches of `sample` need."""
  return max_decode_len + drafting.length + 1


def sample(
  target: DecodeBlock,
  draft: DecodeBlock,
  caches: tuple[Cache, Cache],
  rng: jax.Array,
  config: sampler.SamplerConfig,
  drafting: Drafting,
  *,
  row_ids_B: jax.Array,
  max_decode_len: int,
  ids: SpecialIds,
) -> Drafted:
  """Draws one output per row; stops when every row has ended.

  Args:
    target: whose outputs are drawn.
    draft: its embedding may have another size.
    caches: of both, of `cache_length` positions, before the first token.
    rng: key of this batch.
    config: how to draw, for target and draft alike; not with a calculator.
    drafting: how to draft.
    row_ids_B: [B] int32 number of each row in the global batch. Samples depend
      only on the key, the row's number and the settings.
    max_decode_len: T, at most.
    ids: what begins, ends and pads a row.

  Raises:
    ValueError: `config` has a calculator.
  """
  if config.calculator:
    raise ValueError(
      'A draft cannot be used with a calculator, which replaces tokens after '
      'they were drawn. Set CALCULATOR = False (SamplerConfig.calculator), or '
      'decode without a draft.'
    )
  uniform = sampler.uniforms(rng, row_ids_B)
  batch_size, length = row_ids_B.shape[0], drafting.length

  def body(s: _Loop) -> _Loop:
    proposal, draft_calls = _propose(
      draft, s, config, drafting, uniform, max_decode_len
    )
    last_B1 = jnp.take_along_axis(s.inputs, s.position[:, None], axis=1)
    logits_BNV, target_cache = target(
      s.target_cache,
      s.position,
      jnp.concatenate([last_B1, proposal.tokens], axis=1),
    )
    decide = _decide_greedy if config.temperature == 0.0 else _decide
    written = decide(
      logits_BNV, proposal, s.position, config, drafting.lenience, uniform
    )

    # The row ends with the first EOS that stands.
    numbers_N = jnp.arange(length + 1)
    stands_BN = numbers_N <= written.num_accepted[:, None]
    is_end_BN = stands_BN & (written.tokens == ids.eos)
    ended_B = is_end_BN.any(axis=1)
    num_B = (
      jnp.where(ended_B, is_end_BN.argmax(axis=1), written.num_accepted) + 1
    )
    num_B = jnp.where(s.alive, num_B, 0)
    position_B = s.position + num_B
    is_tested_B = written.num_accepted + (written.num_accepted < proposal.num)
    counts = Counts(
      rounds=s.counts.rounds + s.alive,
      tested=s.counts.tested + jnp.minimum(is_tested_B, num_B),
      accepted=s.counts.accepted + jnp.minimum(written.num_accepted, num_B),
      target_calls=s.counts.target_calls + 1,
      draft_calls=s.counts.draft_calls + draft_calls,
    )
    return _Loop(
      position_B,
      s.alive & ~ended_B & (position_B < max_decode_len),
      # What is written after a row's position is replaced in its next round.
      _write(s.inputs, written.tokens, s.position + 1),
      _write(s.log_probs, written.log_probs, s.position),
      target_cache,
      proposal.cache,
      counts,
    )

  zeros_B = jnp.zeros(batch_size, jnp.int32)
  inputs = jnp.full((batch_size, max_decode_len + length + 2), ids.pad)
  end = jax.lax.while_loop(
    lambda s: s.alive.any(),
    body,
    _Loop(
      position=zeros_B,
      alive=jnp.ones(batch_size, bool),
      inputs=inputs.astype(jnp.int32).at[:, 0].set(ids.start),
      log_probs=jnp.zeros((batch_size, max_decode_len + length + 1)),
      target_cache=caches[0],
      draft_cache=caches[1],
      counts=Counts(*[zeros_B] * 3, jnp.int32(0), jnp.int32(0)),
    ),
  )
  is_written_BT = jnp.arange(max_decode_len) < end.position[:, None]
  rollout = sampler.Rollout(
    tokens=jnp.where(
      is_written_BT, end.inputs[:, 1 : max_decode_len + 1], ids.pad
    ),
    weights=is_written_BT.astype(jnp.float32),
    log_probs=jnp.where(is_written_BT, end.log_probs[:, :max_decode_len], 0.0),
  )
  return Drafted(rollout, end.counts)


def _propose(
  draft: DecodeBlock,
  s: _Loop,
  config: sampler.SamplerConfig,
  drafting: Drafting,
  uniform: Callable[..., jax.Array],
  max_decode_len: int,
) -> tuple[_Proposal, jax.Array]:
  """Returns the tokens that the draft proposes, and the number of its calls."""
  batch_size, length = s.position.shape[0], drafting.length

  def draw(logits_BV, so_far: _Proposal) -> _Proposal:
    step = so_far.step
    position_B = s.position + step
    probs, q_BV = so_far.probs, None
    if config.temperature == 0.0:
      token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
      q_BV = jax.nn.softmax(sampler.filter_logits(logits_BV, config))
      token_B = sampler.invert_cumulative(uniform(position_B, _OF_DRAFT), q_BV)
      probs = probs.at[:, step].set(q_BV)
    # The last token of an output is the target's.
    goes_on_B = so_far.goes_on & (position_B + 2 < max_decode_len)
    if drafting.min_probability > 0.0:
      # It depends on the token, so that this token must be tested: a row that
      # goes on or not does not change the distribution of what it has.
      if q_BV is None:
        q_BV = jax.nn.softmax(logits_BV.astype(jnp.float32))
      q_of_B = jnp.take_along_axis(q_BV, token_B[:, None], axis=1)[:, 0]
      goes_on_B &= q_of_B >= drafting.min_probability
    return so_far._replace(
      step=step + 1,
      tokens=so_far.tokens.at[:, step].set(token_B),
      probs=probs,
      num=so_far.num + so_far.goes_on,
      goes_on=goes_on_B,
    )

  # The cache lacks the last token if all proposals were accepted: two tokens
  # are read, and the first one may be known. At position 0 it is the second
  # that counts for nothing; the next call replaces it.
  first_B = jnp.maximum(s.position - 1, 0)
  two_B2 = jnp.take_along_axis(
    s.inputs, first_B[:, None] + jnp.arange(2), axis=1
  )
  logits_B2V, cache = draft(s.draft_cache, first_B, two_B2)
  at_B = s.position - first_B
  logits_BV = jnp.take_along_axis(logits_B2V, at_B[:, None, None], axis=1)[:, 0]
  start = _Proposal(
    step=jnp.int32(0),
    tokens=jnp.zeros((batch_size, length), jnp.int32),
    probs=None
    if config.temperature == 0.0
    else jnp.zeros((batch_size, length, logits_BV.shape[-1])),
    num=jnp.zeros(batch_size, jnp.int32),
    goes_on=s.alive & (s.position + 1 < max_decode_len),
    cache=cache,
  )

  def decode_and_draw(so_far: _Proposal) -> _Proposal:
    last_B1 = jax.lax.dynamic_slice_in_dim(
      so_far.tokens, so_far.step - 1, 1, axis=1
    )
    logits_B1V, cache = draft(so_far.cache, s.position + so_far.step, last_B1)
    return draw(logits_B1V[:, 0], so_far._replace(cache=cache))

  proposal = jax.lax.while_loop(
    lambda so_far: (so_far.step < length) & so_far.goes_on.any(),
    decode_and_draw,
    draw(logits_BV, start),
  )
  return proposal, proposal.step


def _decide(
  logits_BNV: jax.Array,
  proposal: _Proposal,
  position_B: jax.Array,
  config: sampler.SamplerConfig,
  lenience: float,
  uniform: Callable[..., jax.Array],
) -> _Round:
  """Accepts and rejects drafted tokens, and draws the one after them.

  Args:
    logits_BNV: the target's, N = G + 1.
    proposal: the draft's.
    position_B: of the first token.
    config: how to draw.
    lenience: see `Drafting`.
    uniform: (positions [B], stream) -> [B].
  """
  width = min(logits_BNV.shape[-1], proposal.probs.shape[-1])
  q_BGV, tokens_BG = proposal.probs[..., :width], proposal.tokens
  length = tokens_BG.shape[1]
  logits_BNV = sampler.filter_logits(logits_BNV[..., :width], config)
  log_p_BNV = jax.nn.log_softmax(logits_BNV)
  log_p_BG = _take(log_p_BNV[:, :length], tokens_BG)
  q_BG = _take(q_BGV, tokens_BG)
  positions_BG = position_B[:, None] + jnp.arange(length)
  test_BG = jax.vmap(
    functools.partial(uniform, stream=_OF_TEST), in_axes=1, out_axes=1
  )(positions_BG)
  num_B = _num_leading(
    (test_BG * q_BG < jnp.exp(log_p_BG) / lenience)
    & (jnp.arange(length) < proposal.num[:, None])
  )

  # At the rejected token, or after the last one.
  at_B11 = num_B[:, None, None]
  log_p_BV = jnp.take_along_axis(log_p_BNV, at_B11, axis=1)[:, 0]
  q_BV = jnp.take_along_axis(q_BGV, jnp.minimum(at_B11, length - 1), axis=1)[
    :, 0
  ]
  is_rejected_B1 = (num_B < proposal.num)[:, None]
  p_BV = jnp.exp(log_p_BV)
  missing_BV = jnp.where(
    is_rejected_B1, jnp.maximum(p_BV / lenience - q_BV, 0.0), p_BV
  )
  # If p and q are equal but for rounding, nothing is missing.
  is_empty_B1 = missing_BV.sum(axis=1, keepdims=True) <= 0.0
  token_B = sampler.invert_cumulative(
    uniform(position_B + num_B, _OF_TARGET),
    jnp.where(is_empty_B1, p_BV, missing_BV),
  )
  log_p_B1 = jnp.take_along_axis(log_p_BV, token_B[:, None], axis=1)
  is_last_BN = jnp.arange(length + 1) == num_B[:, None]
  return _Round(
    jnp.where(is_last_BN, token_B[:, None], _one_more(tokens_BG)),
    jnp.where(is_last_BN, log_p_B1, _one_more(log_p_BG)),
    num_B,
  )


def _decide_greedy(
  logits_BNV: jax.Array,
  proposal: _Proposal,
  position_B: jax.Array,
  config: sampler.SamplerConfig,
  lenience: float,
  uniform: Callable[..., jax.Array],
) -> _Round:
  """Accepts drafted tokens that are the target's most probable ones."""
  del position_B, config, uniform
  tokens_BG = proposal.tokens
  length = tokens_BG.shape[1]
  best_BN = jnp.argmax(logits_BNV, axis=-1).astype(jnp.int32)
  accepts_BG = tokens_BG == best_BN[:, :length]
  if lenience < 1.0:
    logit_BG = _take(logits_BNV[:, :length], tokens_BG)
    highest_BG = logits_BNV[:, :length].max(axis=-1)
    accepts_BG |= logit_BG >= highest_BG + math.log(lenience)
  num_B = _num_leading(
    accepts_BG & (jnp.arange(length) < proposal.num[:, None])
  )
  is_accepted_BN = jnp.arange(length + 1) < num_B[:, None]
  return _Round(
    jnp.where(is_accepted_BN, _one_more(tokens_BG), best_BN),
    jnp.zeros(best_BN.shape),
    num_B,
  )


def _take(x_BGV: jax.Array, tokens_BG: jax.Array) -> jax.Array:
  return jnp.take_along_axis(x_BGV, tokens_BG[..., None], axis=-1)[..., 0]


def _num_leading(is_true_BG: jax.Array) -> jax.Array:
  """Returns how many entries precede the first False of each row, [B]."""
  return jnp.cumprod(is_true_BG.astype(jnp.int32), axis=1).sum(axis=1)


def _one_more(x_BG: jax.Array) -> jax.Array:
  return jnp.pad(x_BG, ((0, 0), (0, 1)))


def _write(
  rows_BL: jax.Array, new_BN: jax.Array, offsets_B: jax.Array
) -> jax.Array:
  """Returns rows with a block at each row's offset."""
  return jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))(
    rows_BL, new_BN, offsets_B, 0
  )
