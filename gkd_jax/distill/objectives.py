# SPDX-License-Identifier: Apache-2.0
"""The objective: the loss on the outputs y and its reduction.

    loss = divergence_weight * D(P, Q) - likelihood_weight * log Q(y)

Both terms are computed per token, then reduced over the sequence and the batch.
Rewards are not part of the objective; see `credit`.

Source: Agarwal et al. (2024), arXiv:2306.13649, Eq. 2 to 5.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gkd_jax.batch import SpecialIds, align_logits, mask_unused_ids
from gkd_jax.distill.chunked_sums import LSE, Extras, Terms
from gkd_jax.distill.divergences import Divergence
from gkd_jax.distill.teachers import Weighted

REDUCTIONS = ('sequence', 'token')


@dataclasses.dataclass(frozen=True)
class Objective:
  """The weighted sum to minimise.

  Attributes:
    divergence: a function of `divergences` with its settings bound, or a
      `divergences.Divergence`; a function is wrapped into one. None requires
      weight 0.
    divergence_weight: of D(P, Q); 0 needs no teacher.
    likelihood_weight: of the negative log-likelihood of the outputs.
    teacher_temperature: divides the teacher's logits before D; below 1 sharpens
      the teacher.
    student_temperature: divides the student's logits before D, not in the
      likelihood. There is no factor temperature^2.
    reduction: 'sequence', the paper's Eq. 2: the mean over the tokens of each
      sequence, then over sequences; or 'token': the mean over all tokens of the
      batch, which gives long sequences more weight.
    chunk_tokens: number of tokens whose logits are in memory at once.
  """

  divergence: Callable[..., jax.Array] | Divergence | None = None
  divergence_weight: float = 1.0
  likelihood_weight: float = 0.0
  teacher_temperature: float = 1.0
  student_temperature: float = 1.0
  reduction: str = 'sequence'
  chunk_tokens: int = 1024

  def __post_init__(self):
    for name in ('divergence_weight', 'likelihood_weight'):
      if getattr(self, name) < 0.0:
        raise ValueError(
          f'Objective.{name} must not be negative: {getattr(self, name)}.'
        )
    if self.divergence_weight and self.divergence is None:
      raise ValueError(
        f'Objective.divergence_weight is {self.divergence_weight}, but '
        'Objective.divergence is not set. Set it, e.g. to '
        '@divergences.forward_kl, or set the weight to 0.'
      )
    if self.divergence is not None and not isinstance(
      self.divergence, Divergence
    ):
      if not callable(self.divergence):
        raise ValueError(
          'Objective.divergence must be a function, such as '
          f'@divergences.forward_kl, got {self.divergence!r}.'
        )
      object.__setattr__(self, 'divergence', Divergence(self.divergence))
    for name in ('teacher_temperature', 'student_temperature'):
      if getattr(self, name) <= 0.0:
        raise ValueError(
          f'Objective.{name} must be positive, got {getattr(self, name)}.'
        )
    if self.reduction not in REDUCTIONS:
      raise ValueError(
        f'Objective.reduction must be one of {REDUCTIONS}, got '
        f'{self.reduction!r}.'
      )
    if self.chunk_tokens < 1:
      raise ValueError(
        f'Objective.chunk_tokens must be positive, got {self.chunk_tokens}.'
      )

  @property
  def needs_teacher(self) -> bool:
    return self.divergence_weight > 0.0

  def terms(self, ids: SpecialIds, *, with_lse: bool = False) -> Terms:
    """Returns the per-token function of logits: 'loss' and its parts, nats.

    Args:
      ids: the special ids of both models and their vocabulary.
      with_lse: whether 'lse' is returned as well, ln sum exp of the student's
        logits.
    """

    def terms(student_logits, teacher_logits, tokens, extras=None):
      weight = None
      if self.needs_teacher:
        if isinstance(teacher_logits, Weighted):
          weight = teacher_logits.weight
        student_logits, teacher_logits = comparable_logits(
          student_logits, teacher_logits, ids
        )
      else:
        student_logits = mask_unused_ids(student_logits, ids)
      out = {'nll': negative_log_likelihood(student_logits, tokens)}
      loss = self.likelihood_weight * out['nll']
      if self.needs_teacher:
        out['divergence'] = self.divergence.function(
          teacher_logits=teacher_logits / self.teacher_temperature,
          student_logits=student_logits / self.student_temperature,
          **self._keywords(tokens, extras or Extras()),
        )
        divergence = out['divergence']
        if weight is not None:
          divergence *= weight
        loss += self.divergence_weight * divergence
      if with_lse:
        out[LSE] = jax.nn.logsumexp(student_logits.astype(jnp.float32), axis=-1)
      return {'loss': loss, **out}

    return terms

  def _keywords(self, tokens, extras):
    known = {'tokens': tokens, **extras.per_token}
    known |= {'carried': extras.carried, 'heads': extras.heads}
    return {
      name: known[name]
      for name in self.divergence.keywords
      if not name.endswith('_logits')
    }


def comparable_logits(
  student_logits: jax.Array,
  teacher_logits: jax.Array | Weighted,
  ids: SpecialIds,
) -> tuple[jax.Array, jax.Array]:
  """Returns student and teacher logits, [..., min(V, V')]; see `align_logits`.

  Args:
    student_logits: [..., V].
    teacher_logits: [..., V']; weights of tokens are dropped.
    ids: with `num_ids` at most V and V'.
  """
  if isinstance(teacher_logits, Weighted):
    teacher_logits = teacher_logits.logits
  return tuple(align_logits((student_logits, teacher_logits), ids))


def negative_log_likelihood(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns -log Q(token) in nats: logits [..., V], tokens [...] -> [...]."""
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.take_along_axis(log_q, tokens[..., None], axis=-1)[..., 0]


def coefficients(
  weights_BT: jax.Array, reduction: str
) -> tuple[jax.Array, jax.Array]:
  """Returns each token's coefficient and the divisor of the weighted sum.

  They are separate because microbatches are summed before the division. Both
  are computed from the outputs trained on, for every author.

  Args:
    weights_BT: [B, T], 0 where there is no token.
    reduction: 'sequence' or 'token', see `Objective`.

  Returns:
    [B, T] coefficients and [] count: of non-empty sequences, or of tokens.
  """
  if reduction == 'token':
    return weights_BT, weights_BT.sum()
  length_B = weights_BT.sum(axis=1)
  # A row without tokens is batch padding.
  return weights_BT / jnp.maximum(length_B, 1.0)[:, None], (length_B > 0.0).sum(
    dtype=jnp.float32
  )
