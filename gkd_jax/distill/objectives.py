# SPDX-License-Identifier: Apache-2.0
"""What is minimised on the outputs y, and how it is summed.

    loss = divergence_weight * D(P, Q) - likelihood_weight * log Q(y)
         - reward_weight * r(y)

The first two are given per token, then reduced over a sequence and a batch; r
is given per sequence. No `[B, T, V]` array exists: hidden states are projected
to the vocabulary, compared and differentiated chunk by chunk.

A reward depends on the student only through what it writes, so its gradient is
that of an expectation, estimated by REINFORCE: (r - b) grad log Q(y), with a
baseline b that takes away variance and adds no bias.

Source: Agarwal et al. (2024), arXiv:2306.13649, Eq. 2 to 5.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax.batch import SpecialIds, mask_unused_ids

Divergence = Callable[..., jax.Array]
Head = Any  # parameters of a projection to the vocabulary
Unembed = Callable[[Head, jax.Array], jax.Array]  # (head, [..., D]) -> [..., V]
# Named quantities of each token: student logits [..., V], teacher logits
# [..., V] or None, tokens [...] -> {name: [...]}. 'loss' is differentiated.
Terms = Callable[[jax.Array, jax.Array | None, jax.Array], dict[str, jax.Array]]

REDUCTIONS = ('sequence', 'token')
REWARD_BASELINES = ('self_critical', 'batch_mean', 'none')
REWARD_NORMALIZATIONS = ('sequence', 'token')


@dataclasses.dataclass(frozen=True)
class Objective:
  """The weighted sum that is minimised.

  Attributes:
    divergence: one of `divergences`, its settings bound; None with weight 0.
    divergence_weight: of D(P, Q); 0 needs no teacher.
    likelihood_weight: of the negative log-likelihood of the outputs.
    teacher_temperature: divides the teacher's logits before D: below 1 its
      distribution is sharpened. The student is always compared at 1.
    reduction: 'sequence', the paper's Eq. 2: the mean over a sequence's own
      tokens, then over sequences; or 'token': the mean over all tokens of the
      batch, in which long sequences weigh more. A reward is added once a
      sequence in either: to the mean of its tokens' terms, or to their sum.
    reward_weight: of the reward; None without one. With 0 the reward is
      measured, and nothing is learnt from it.
    reward_baseline: b. 'batch_mean': the mean reward of the other outputs that
      the student wrote (in the same microbatch), which costs nothing;
      'self_critical': the reward of the greedy output, which costs one more
      rollout and knows how hard the input is; or 'none'.
    reward_normalization: 'sequence': the log-probabilities of an output's
      tokens are summed, the exact gradient of the expected reward; or 'token':
      they are averaged, so that an output's gradient does not grow with its
      length.
    chunk_tokens: how many tokens' logits exist at a time.

  With 'sequence' for both settings a reward of 1 weighs as much as a divergence
  of 1 nat at every token. An output that was cut off has the log-probability of
  the tokens that are there.
  """

  divergence: Divergence | None = None
  divergence_weight: float = 1.0
  likelihood_weight: float = 0.0
  teacher_temperature: float = 1.0
  reduction: str = 'sequence'
  reward_weight: float | None = None
  reward_baseline: str = 'batch_mean'
  reward_normalization: str = 'sequence'
  chunk_tokens: int = 1024

  def __post_init__(self):
    weights = ('divergence_weight', 'likelihood_weight', 'reward_weight')
    for name in weights:
      if (getattr(self, name) or 0.0) < 0.0:
        raise ValueError(
          f'Objective.{name} must not be negative: {getattr(self, name)}.'
        )
    if not any(getattr(self, name) for name in weights):
      raise ValueError(
        f'Objective has nothing to minimise: {", ".join(weights)} are all 0.'
      )
    if self.divergence_weight and self.divergence is None:
      raise ValueError(
        f'Objective.divergence_weight is {self.divergence_weight}, but '
        'Objective.divergence is not set. Name one, e.g. '
        '@divergences.forward_kl, or set the weight to 0.'
      )
    if self.divergence is not None and not callable(self.divergence):
      raise ValueError(
        'Objective.divergence must be a function, such as '
        f'@divergences.forward_kl, got {self.divergence!r}.'
      )
    if self.teacher_temperature <= 0.0:
      raise ValueError(
        'Objective.teacher_temperature must be positive, got '
        f'{self.teacher_temperature}.'
      )
    for name, choices in (
      ('reduction', REDUCTIONS),
      ('reward_baseline', REWARD_BASELINES),
      ('reward_normalization', REWARD_NORMALIZATIONS),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(
          f'Objective.{name} must be one of {choices}, got '
          f'{getattr(self, name)!r}.'
        )
    if self.chunk_tokens < 1:
      raise ValueError(
        f'Objective.chunk_tokens must be positive, got {self.chunk_tokens}.'
      )
    if self.divergence_weight:
      # A divergence refuses bad settings (beta, say) when it is called. Call
      # it now rather than in the middle of a compilation.
      logits = jax.ShapeDtypeStruct((2,), jnp.float32)
      try:
        jax.eval_shape(
          lambda p, q: self.divergence(teacher_logits=p, student_logits=q),
          logits,
          logits,
        )
      except TypeError as e:
        raise ValueError(
          'Objective.divergence must be a function of teacher_logits and '
          f'student_logits, such as @divergences.forward_kl: {e}.'
        ) from e

  @property
  def needs_teacher(self) -> bool:
    return self.divergence_weight > 0.0

  @property
  def learns_from_reward(self) -> bool:
    return bool(self.reward_weight)

  def terms(self, ids: SpecialIds) -> Terms:
    """Returns 'loss' and its parts for each token, in nats; not the reward."""

    def terms(student_logits, teacher_logits, tokens):
      if self.needs_teacher:
        student_logits, teacher_logits = comparable_logits(
          student_logits, teacher_logits, ids
        )
      else:
        student_logits = mask_unused_ids(student_logits, ids)
      out = {'nll': negative_log_likelihood(student_logits, tokens)}
      loss = self.likelihood_weight * out['nll']
      if self.needs_teacher:
        out['divergence'] = self.divergence(
          teacher_logits=teacher_logits / self.teacher_temperature,
          student_logits=student_logits,
        )
        loss += self.divergence_weight * out['divergence']
      return {'loss': loss, **out}

    return terms


def reward_share(alpha: float) -> float:
  """Returns 1 - alpha, the weight of the reward in the paper's Eq. 5.

  Args:
    alpha: weight of the divergence: 1 is distillation alone, 0 reward alone.

  Raises:
    ValueError: alpha is outside [0, 1].
  """
  if not 0.0 <= alpha <= 1.0:
    raise ValueError(
      f'ALPHA must be in [0, 1], got {alpha}: the loss is ALPHA times the '
      'divergence, less 1 - ALPHA times the reward.'
    )
  return 1.0 - alpha


def comparable_logits(
  student_logits: jax.Array, teacher_logits: jax.Array, ids: SpecialIds
) -> tuple[jax.Array, jax.Array]:
  """Masks the unused ids of both, and cuts them to one width.

  Embeddings of one vocabulary may be padded to different sizes (T5's 32100 ids
  to 32100 or 32128); what is cut off has probability 0.

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V'].
    ids: with `num_ids` at most V and V'.

  Returns:
    Both, [..., min(V, V')].
  """
  width = min(student_logits.shape[-1], teacher_logits.shape[-1])
  return (
    mask_unused_ids(student_logits[..., :width], ids),
    mask_unused_ids(teacher_logits[..., :width], ids),
  )


def negative_log_likelihood(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns -log Q(token) in nats: logits [..., V], tokens [...] -> [...]."""
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.take_along_axis(log_q, tokens[..., None], axis=-1)[..., 0]


def coefficients(
  weights_BT: jax.Array, reduction: str
) -> tuple[jax.Array, jax.Array]:
  """Returns what each token counts, and the number to divide their sum by.

  Apart, so that sums over microbatches can be added before the division. Both
  come from the outputs trained on, not from the dataset's.

  Args:
    weights_BT: [B, T], 0 where there is no token.
    reduction: 'sequence' or 'token', see `Objective`.

  Returns:
    [B, T] coefficients and [] count: of sequences that have tokens, or of
    tokens.
  """
  if reduction == 'token':
    return weights_BT, weights_BT.sum()
  length_B = weights_BT.sum(axis=1)
  # A row without tokens only fills a batch up.
  return weights_BT / jnp.maximum(length_B, 1.0)[:, None], (length_B > 0.0).sum(
    dtype=jnp.float32
  )


def advantages(
  objective: Objective, advantages_B: jax.Array, weights_BT: jax.Array
) -> jax.Array:
  """Returns what it is worth to make each token likelier: [B, T], per nat.

  Args:
    objective: weight and normalization of the reward.
    advantages_B: [B] reward of each output, less its baseline.
    weights_BT: [B, T], 0 where there is no token.
  """
  worth_BT = objective.reward_weight * advantages_B[:, None] * weights_BT
  if objective.reward_normalization == 'token':
    worth_BT /= jnp.maximum(weights_BT.sum(axis=1, keepdims=True), 1.0)
  return worth_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def weighted_sums(
  terms: Terms,
  student_unembed: Unembed,
  teacher_unembed: Unembed | None,
  chunk_tokens: int,
  student_head: Head,
  student_hidden: jax.Array,
  teacher_head: Head | None,
  teacher_hidden: jax.Array | None,
  tokens: jax.Array,
  coefficients: jax.Array,
  advantages: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """Sums each term over all tokens, without ever holding all logits.

  Differentiable by the student's head and hidden states, through 'loss' alone.
  Loss and gradient of a chunk are computed while its logits are there, in one
  pass: the backward pass only scales what the forward pass has kept, which is
  as large as the hidden states and the head, not as the logits.

  Args:
    terms: what to sum.
    student_unembed: (head, hidden) -> logits.
    teacher_unembed: likewise; None without a teacher.
    chunk_tokens: tokens whose logits exist at a time, at least B of them:
      chunks are cut along T so that a batch stays spread over the devices.
    student_head: parameters of `student_unembed`.
    student_hidden: [B, T, D].
    teacher_head: constant.
    teacher_hidden: [B, T, D'] constant; None without a teacher.
    tokens: [B, T] int32.
    coefficients: [B, T] what each token counts.
    advantages: [B, T] what each nat of a token's log-likelihood is worth beyond
      that, constant; None without a reward. They are in the gradient alone: no
      sum has them. The terms have 'nll' then.

  Returns:
    {name: [] float32}.
  """

  def add_chunk(sums, chunk):
    new = _chunk_sums(
      terms, student_unembed, teacher_unembed, teacher_head, chunk
    )(student_head, chunk['student_hidden'])
    return _add(sums, new), None

  chunks = _chunks(
    chunk_tokens,
    student_hidden=student_hidden,
    tokens=tokens,
    coefficients=coefficients,
    teacher_hidden=teacher_hidden,
    advantages=advantages,
  )
  sums, _ = _scan(add_chunk, chunks)
  return sums


def _weighted_sums_fwd(
  terms,
  student_unembed,
  teacher_unembed,
  chunk_tokens,
  student_head,
  student_hidden,
  teacher_head,
  teacher_hidden,
  tokens,
  coefficients,
  advantages,
):
  def add_chunk(total, chunk):
    def loss(head, hidden):
      sums = _chunk_sums(
        terms, student_unembed, teacher_unembed, teacher_head, chunk
      )(head, hidden)
      return sums['loss'], sums

    (_, sums), (d_head, d_hidden) = jax.value_and_grad(
      loss, argnums=(0, 1), has_aux=True
    )(student_head, chunk['student_hidden'])
    return _add(total, (sums, d_head)), d_hidden

  chunks = _chunks(
    chunk_tokens,
    student_hidden=student_hidden,
    tokens=tokens,
    coefficients=coefficients,
    teacher_hidden=teacher_hidden,
    advantages=advantages,
  )
  (sums, d_head), d_hidden = _scan(add_chunk, chunks)
  # [chunks, B, chunk_len, D] -> [B, T, D], less what filled the last chunk.
  d_hidden = d_hidden.swapaxes(0, 1).reshape(
    student_hidden.shape[0], -1, student_hidden.shape[2]
  )[:, : student_hidden.shape[1]]
  return sums, (d_head, d_hidden)


def _weighted_sums_bwd(
  terms, student_unembed, teacher_unembed, chunk_tokens, kept, cotangents
):
  del terms, student_unembed, teacher_unembed, chunk_tokens
  scale = cotangents['loss']
  d_head, d_hidden = jax.tree.map(lambda x: (scale * x).astype(x.dtype), kept)
  return d_head, d_hidden, None, None, None, None, None


weighted_sums.defvjp(_weighted_sums_fwd, _weighted_sums_bwd)


def _chunk_sums(terms, student_unembed, teacher_unembed, teacher_head, chunk):
  def sums(student_head, student_hidden):
    teacher_logits = None
    if teacher_unembed is not None:
      teacher_logits = teacher_unembed(teacher_head, chunk['teacher_hidden'])
    values = terms(
      student_unembed(student_head, student_hidden),
      teacher_logits,
      chunk['tokens'],
    )
    totals = {
      name: jnp.sum(value * chunk['coefficients'])
      for name, value in values.items()
    }
    if 'advantages' in chunk:
      # 0, with the gradient of nll.
      nll = values['nll'] - jax.lax.stop_gradient(values['nll'])
      totals['loss'] += jnp.sum(nll * chunk['advantages'])
    return totals

  return sums


def _chunks(chunk_tokens, **arrays):
  """Cuts [B, T, ...] along T: {name: [num_chunks, B, chunk_len, ...]}.

  Those that are None are left out.
  """
  batch_size, length = arrays['tokens'].shape
  chunk_len = min(length, max(1, chunk_tokens // batch_size))
  num_chunks = -(-length // chunk_len)
  # Even chunks: 17 positions in chunks of 16 would be 32 positions of work.
  chunk_len = -(-length // num_chunks)

  def cut(x):
    fill = num_chunks * chunk_len - length
    x = jnp.pad(x, ((0, 0), (0, fill)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(batch_size, num_chunks, chunk_len, *x.shape[2:])
    return x.swapaxes(0, 1)

  return {name: cut(x) for name, x in arrays.items() if x is not None}


def _scan(add_chunk, chunks):
  """Runs add_chunk(None or total, chunk) over all chunks."""
  first = jax.tree.map(lambda x: x[0], chunks)
  total, kept = add_chunk(None, first)
  if chunks['tokens'].shape[0] == 1:
    return total, jax.tree.map(lambda x: x[None], kept)
  rest = jax.tree.map(lambda x: x[1:], chunks)
  total, more = jax.lax.scan(add_chunk, total, rest)
  kept = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), kept, more)
  return total, kept


def _add(total, new):
  return new if total is None else jax.tree.map(jnp.add, total, new)
