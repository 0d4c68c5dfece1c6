# SPDX-License-Identifier: Apache-2.0
"""Samples outputs from a model, token by token, in one traced loop.

Independent of the model class: `decode_step` takes the cache and the last token
of every row and returns the next token's logits, in which ids that may not
occur are masked (see `batch.mask_unused_ids`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import MASKED_LOGIT, SpecialIds
from gkd_jax.decoding.calculator import Calculator, CalculatorState

Cache = Any
DecodeStep = Callable[[Cache, jax.Array], tuple[jax.Array, Cache]]

# Block size of the search in `invert_cumulative`, near sqrt(V) for V = 32k.
_BLOCK = 128
# A token at the limit of min_p or epsilon is kept: nats of rounding.
_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How outputs are drawn.

  Attributes:
    temperature: divides the logits; 1 is the model's own distribution, 0 takes
      the most probable token (greedy).
    top_k: keep only the k most probable tokens; 0 keeps all.
    top_p: keep only the smallest set of most probable tokens that has at least
      this probability; 1 keeps all.
    min_p: keep only tokens with at least this share of the most probable
      token's probability; 0 keeps all.
    epsilon: keep only tokens of at least this probability; 0 keeps all.
    calculator: results of arithmetic are computed, not drawn; see `calculator`.
      For evaluation and inference only, not for training.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  epsilon: float = 0.0
  calculator: bool = False

  def __post_init__(self):
    if self.temperature < 0.0:
      raise ValueError(
        f'SamplerConfig.temperature must not be negative: {self.temperature}. '
        'Use 0 for greedy decoding, 1 for the model as it is.'
      )
    if self.top_k < 0:
      raise ValueError(
        f'SamplerConfig.top_k must be 0 (off) or more, got {self.top_k}.'
      )
    if not 0.0 < self.top_p <= 1.0:
      raise ValueError(
        f'SamplerConfig.top_p must be in (0, 1], got {self.top_p}. 1 is off.'
      )
    if not 0.0 <= self.min_p <= 1.0:
      raise ValueError(
        f'SamplerConfig.min_p must be in [0, 1], got {self.min_p}. 0 is off.'
      )
    if not 0.0 <= self.epsilon < 1.0:
      raise ValueError(
        f'SamplerConfig.epsilon must be in [0, 1), got {self.epsilon}. 0 is '
        'off.'
      )


ANCESTRAL = SamplerConfig()  # from the model's own distribution
GREEDY = SamplerConfig(temperature=0.0)


class Rollout(NamedTuple):
  """Sampled outputs."""

  tokens: jax.Array  # [B, T] int32, pad after EOS
  weights: jax.Array  # [B, T] float32, 1 up to and including EOS, then 0
  # [B, T] float32 nats: log-probability of each token under the distribution
  # it was drawn from, with all settings of the sampler applied; so 0 if greedy.
  # 0 where the weight is 0, and where the token was not drawn: a calculator
  # wrote it, or it belongs to a prefix.
  log_probs: jax.Array


class Prefix(NamedTuple):
  """The first tokens of outputs, which a writer continues.

  The loop decodes them like drawn tokens, which fills the cache. They have
  weight 1, log-probability 0, and an EOS among them ends the row.
  """

  tokens: jax.Array  # [B, P] int32
  lengths: jax.Array  # [B] int32, number of given tokens of each row, at most P


class Drawn(NamedTuple):
  """What is drawn at one position."""

  token_B: jax.Array  # [B] int32
  log_prob_B: jax.Array  # [B] float32
  by_student_B: jax.Array | None = None  # [B] bool; None: not recorded


class Loop(NamedTuple):
  """The state of the loop over positions."""

  step: jax.Array  # []
  token_B: jax.Array
  alive_B: jax.Array
  rollout: Rollout
  by_student: jax.Array | None  # [B, T] bool; None: not recorded
  cache: Cache
  queue: CalculatorState | None  # None: no calculator


# (logits, loop) -> (Drawn, queue)
Draw = Callable[[Any, Loop], tuple[Drawn, CalculatorState | None]]


def sample(
  decode_step: DecodeStep,
  cache: Cache,
  rng: jax.Array,
  config: SamplerConfig,
  *,
  row_ids_B: jax.Array,
  max_decode_len: int,
  ids: SpecialIds,
  calculator: Calculator | None = None,
  prefix: Prefix | None = None,
  vocab_shards: int = 1,
) -> Rollout:
  """Draws one output per row; stops when every row has ended.

  Args:
    decode_step: (cache, tokens [B]) -> (logits [B, V], cache).
    cache: what `decode_step` needs before its first token.
    rng: key of this batch.
    config: how to draw.
    row_ids_B: [B] int32 number of each row in the global batch. Samples depend
      only on the key, the row's number and the position, not on the device or
      the other rows of a microbatch.
    max_decode_len: T, at most; a row that has not ended by then has no EOS.
    ids: what begins, ends and pads a row; the ids that may not occur are masked
      by `decode_step`.
    calculator: writes results where `config.calculator` is set.
    prefix: tokens to continue; None: outputs start at their first token. The
      draw at a position is the same with and without a prefix.
    vocab_shards: number of devices that the logits' last axis is sharded over;
      see `draw_tokens`.

  Returns:
    A `Rollout`.

  Raises:
    ValueError: `config.calculator` is set, but there is no calculator, or there
      is a prefix.
  """
  if config.calculator and calculator is None:
    raise ValueError(
      'SamplerConfig.calculator is set, but no calculator was passed. Only '
      'evaluation and inference have one.'
    )
  if config.calculator and prefix is not None:
    raise ValueError('SamplerConfig.calculator cannot continue a prefix.')
  uniform = uniforms(rng, row_ids_B)

  def draw(logits_BV, s: Loop):
    queue = s.queue
    if queue is not None:
      logits_BV = calculator.keep_result(queue, logits_BV)
    drawn_B, log_prob_B = draw_tokens(
      logits_BV, config, lambda: uniform(s.step), vocab_shards
    )
    if queue is not None:
      drawn_B, is_forced_B, queue = calculator.correct(
        queue, s.rollout.tokens, s.step, drawn_B, s.alive_B
      )
      log_prob_B = jnp.where(is_forced_B, 0.0, log_prob_B)
    return Drawn(drawn_B, log_prob_B), queue

  batch_size = row_ids_B.shape[0]
  end = run(
    decode_step,
    cache,
    draw,
    batch_size=batch_size,
    max_decode_len=max_decode_len,
    ids=ids,
    queue=calculator.start(batch_size) if config.calculator else None,
    prefix=prefix,
  )
  return end.rollout


def run(
  decode_step: Callable[[Cache, jax.Array], tuple[Any, Cache]],
  cache: Cache,
  draw: Draw,
  *,
  batch_size: int,
  max_decode_len: int,
  ids: SpecialIds,
  queue: CalculatorState | None = None,
  prefix: Prefix | None = None,
  records_author: bool = False,
) -> Loop:
  """Writes one token of each row per iteration, until every row has ended.

  Args:
    decode_step: (cache, tokens [B]) -> (logits, cache); of one model, or of
      several that read the same tokens.
    cache: what `decode_step` needs before its first token.
    draw: chooses the tokens of a position from these logits.
    batch_size: B.
    max_decode_len: T.
    ids: what begins, ends and pads a row.
    queue: state of the calculator.
    prefix: tokens to continue.
    records_author: whether `draw` returns `by_student_B`, which is False in a
      prefix.
  """

  def body(s: Loop) -> Loop:
    logits, cache = decode_step(s.cache, s.token_B)
    drawn, queue = draw(logits, s)
    if prefix is not None:
      drawn = _force(drawn, prefix, s.step)

    # Weights come from `alive_B`, not from the token's id: an id alone does not
    # determine whether the row had ended.
    token_B = jnp.where(s.alive_B, drawn.token_B, ids.pad)
    rollout = Rollout(
      tokens=s.rollout.tokens.at[:, s.step].set(token_B),
      weights=s.rollout.weights.at[:, s.step].set(
        s.alive_B.astype(jnp.float32)
      ),
      log_probs=s.rollout.log_probs.at[:, s.step].set(
        jnp.where(s.alive_B, drawn.log_prob_B, 0.0)
      ),
    )
    by_student = s.by_student
    if by_student is not None:
      by_student = by_student.at[:, s.step].set(s.alive_B & drawn.by_student_B)
    alive_B = s.alive_B & (token_B != ids.eos)
    return Loop(s.step + 1, token_B, alive_B, rollout, by_student, cache, queue)

  def keep_going(s: Loop) -> jax.Array:
    return (s.step < max_decode_len) & jnp.any(s.alive_B)

  shape = (batch_size, max_decode_len)
  start = Loop(
    step=jnp.int32(0),
    token_B=jnp.full(batch_size, ids.start, jnp.int32),
    alive_B=jnp.ones(batch_size, bool),
    rollout=Rollout(
      tokens=jnp.full(shape, ids.pad, jnp.int32),
      weights=jnp.zeros(shape, jnp.float32),
      log_probs=jnp.zeros(shape, jnp.float32),
    ),
    by_student=jnp.zeros(shape, bool) if records_author else None,
    cache=cache,
    queue=queue,
  )
  return jax.lax.while_loop(keep_going, body, start)


def _force(drawn: Drawn, prefix: Prefix, step: jax.Array) -> Drawn:
  """Replaces what was drawn by the prefix, in rows whose prefix goes on."""
  is_given_B = step < prefix.lengths
  last = prefix.tokens.shape[1] - 1
  given_B = prefix.tokens[:, jnp.minimum(step, last)]
  by_student_B = drawn.by_student_B
  if by_student_B is not None:
    by_student_B &= ~is_given_B
  return Drawn(
    jnp.where(is_given_B, given_B, drawn.token_B),
    jnp.where(is_given_B, 0.0, drawn.log_prob_B),
    by_student_B,
  )


def uniforms(rng: jax.Array, row_ids_B: jax.Array) -> Callable[..., jax.Array]:
  """Returns (step, stream=0) -> [B] uniform numbers in [0, 1).

  They depend only on the key, the row's number, the step and the stream. The
  step is that of all rows, or [B].

  Args:
    rng: key of this batch.
    row_ids_B: [B] int32 number of each row in the global batch.
  """
  row_rngs = jax.vmap(lambda row: jax.random.fold_in(rng, row))(row_ids_B)

  def uniform(step: jax.Array, stream: int = 0) -> jax.Array:
    def of_row(key, step):
      key = jax.random.fold_in(key, step)
      return jax.random.uniform(
        jax.random.fold_in(key, stream) if stream else key
      )

    step_axis = 0 if jnp.ndim(step) else None
    return jax.vmap(of_row, in_axes=(0, step_axis))(row_rngs, step)

  return uniform


def draw_tokens(
  logits_BV: jax.Array,
  config: SamplerConfig,
  uniform: Callable[[], jax.Array],
  vocab_shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Draws one token per row.

  Args:
    logits_BV: [B, V] in which ids that may not occur are masked.
    config: how to draw.
    uniform: () -> [B] uniform numbers; not called if greedy.
    vocab_shards: number of devices that V is sharded over. Each of them draws
      from its own part, so that logits are gathered for top_k and top_p only.
      The tokens are the same, up to the rounding of sums.

  Returns:
    [B] int32 tokens, and [B] float32 their log-probabilities.
  """
  logits_BV = filter_logits(logits_BV, config)
  if config.temperature == 0.0:
    drawn_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return drawn_B, jnp.zeros(logits_BV.shape[0], jnp.float32)
  uniform_B = uniform()
  log_p_BV = jax.nn.log_softmax(logits_BV)
  if vocab_shards > 1:
    drawn_B = _draw_from_shards(uniform_B, jnp.exp(log_p_BV), vocab_shards)
    is_drawn_BV = jnp.arange(log_p_BV.shape[-1]) == drawn_B[:, None]
    return drawn_B, jnp.sum(log_p_BV, axis=-1, where=is_drawn_BV)
  drawn_B = invert_cumulative(uniform_B, jnp.exp(log_p_BV))
  return drawn_B, jnp.take_along_axis(log_p_BV, drawn_B[:, None], 1)[:, 0]


def log_probs_of(
  logits_BV: jax.Array, config: SamplerConfig, tokens_B: jax.Array
) -> jax.Array:
  """Returns [B] log-probabilities of tokens under a sampler's distribution.

  Args:
    logits_BV: [B, V].
    config: greedy decoding has probability 1 for one token.
    tokens_B: [B] int32.
  """
  logits_BV = filter_logits(logits_BV, config)
  if config.temperature == 0.0:
    best_B = jnp.argmax(logits_BV, axis=-1)
    return jnp.where(tokens_B == best_B, 0.0, MASKED_LOGIT)
  log_p_BV = jax.nn.log_softmax(logits_BV)
  return jnp.take_along_axis(log_p_BV, tokens_B[:, None], 1)[:, 0]


def filter_logits(logits: jax.Array, config: SamplerConfig) -> jax.Array:
  """Applies temperature, then top-k, top-p, min-p and epsilon, in this order.

  Each cut-off reads the distribution that the one before left, renormalised.
  The most probable token is always kept.

  Args:
    logits: [..., V].
    config: greedy decoding filters nothing.

  Returns:
    [..., V] float32 logits of the distribution that is drawn from; entries
    equal to the last one kept are kept too.
  """
  logits = logits.astype(jnp.float32)
  if config.temperature == 0.0:
    return logits
  logits = logits / config.temperature
  if 0 < config.top_k < logits.shape[-1]:
    least_kept = jax.lax.top_k(logits, config.top_k)[0][..., -1:]
    logits = jnp.where(logits < least_kept, MASKED_LOGIT, logits)
  if config.top_p < 1.0:
    falling = -jnp.sort(-logits, axis=-1)
    p = jax.nn.softmax(falling)
    mass_before = jnp.cumsum(p, axis=-1) - p
    # The first entry is always kept: nothing comes before it.
    num_kept = jnp.sum(mass_before < config.top_p, axis=-1, keepdims=True)
    least_kept = jnp.take_along_axis(falling, num_kept - 1, axis=-1)
    logits = jnp.where(logits < least_kept, MASKED_LOGIT, logits)
  if config.min_p > 0.0:
    highest = jnp.max(logits, axis=-1, keepdims=True)
    least_kept = highest + math.log(config.min_p) - _ROUNDING
    logits = jnp.where(logits < least_kept, MASKED_LOGIT, logits)
  if config.epsilon > 0.0:
    log_p = jax.nn.log_softmax(logits)
    highest = jnp.max(log_p, axis=-1, keepdims=True)
    least_kept = jnp.minimum(math.log(config.epsilon) - _ROUNDING, highest)
    logits = jnp.where(log_p < least_kept, MASKED_LOGIT, logits)
  return logits


def invert_cumulative(uniform_B: jax.Array, p_BV: jax.Array) -> jax.Array:
  """Draws one id per row by inverting the cumulative distribution.

  It needs one uniform number per row instead of a Gumbel draw's V.

  Args:
    uniform_B: [B] in [0, 1).
    p_BV: [B, V] probabilities; rows need to sum to 1 only roughly.

  Returns:
    [B] int32 ids, each of positive probability.
  """
  p_BNW = _in_blocks(p_BV)
  mass_BN = p_BNW.sum(axis=-1)
  return _search(uniform_B * mass_BN.sum(axis=-1), p_BNW, mass_BN)


def _in_blocks(p_BV: jax.Array) -> jax.Array:
  """Returns [B, N, W] probabilities, 0 after the V-th."""
  batch_size, vocab_size = p_BV.shape
  p_BV = jnp.pad(p_BV, ((0, 0), (0, -vocab_size % _BLOCK)))
  return p_BV.reshape(batch_size, -1, _BLOCK)


def _search(
  target_B: jax.Array, p_BNW: jax.Array, mass_BN: jax.Array
) -> jax.Array:
  """Returns the first ids [B] whose cumulative probability exceeds the target.

  The search first finds a block, then an id within it: the sums stay short and
  accurate, and no [B, V] cumulative sum is computed.
  """
  block_B, before_B = _find(target_B, mass_BN)
  p_BW = jnp.take_along_axis(p_BNW, block_B[:, None, None], axis=1)[:, 0]
  within_B, _ = _find(target_B - before_B, p_BW)
  return (block_B * _BLOCK + within_B).astype(jnp.int32)


def _draw_from_shards(
  uniform_B: jax.Array, p_BV: jax.Array, num_shards: int
) -> jax.Array:
  """Draws as `invert_cumulative` does; the search first finds the shard of V.

  Each device searches its own shard with the same target; the token of the
  shard that was found counts. Only numbers [B, shards] are exchanged.
  """
  p_BMV = p_BV.reshape(p_BV.shape[0], num_shards, -1)
  p_BMNW = jax.vmap(_in_blocks, 1, 1)(p_BMV)
  mass_BMN = p_BMNW.sum(axis=-1)
  mass_BM = mass_BMN.sum(axis=-1)
  target_B = uniform_B * mass_BM.sum(axis=-1)
  shard_B, before_B = _find(target_B, mass_BM)
  within_BM = jax.vmap(_search, (None, 1, 1), 1)(
    target_B - before_B, p_BMNW, mass_BMN
  )
  is_found_BM = jnp.arange(num_shards) == shard_B[:, None]
  within_B = jnp.sum(within_BM, axis=-1, where=is_found_BM)
  return shard_B.astype(jnp.int32) * p_BMV.shape[-1] + within_B


def _find(target_B: jax.Array, p_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the first index whose cumulative sum exceeds the target.

  Returns only entries of positive probability. If rounding makes the target
  exceed every sum, returns the most probable entry.
  """
  sum_BN = jnp.cumsum(p_BN, axis=-1)
  found_BN = (sum_BN > target_B[:, None]) & (p_BN > 0.0)
  index_B = jnp.where(
    found_BN.any(axis=-1), found_BN.argmax(axis=-1), p_BN.argmax(axis=-1)
  )
  through_B = jnp.take_along_axis(sum_BN, index_B[:, None], axis=-1)[:, 0]
  at_B = jnp.take_along_axis(p_BN, index_B[:, None], axis=-1)[:, 0]
  return index_B, through_B - at_B
