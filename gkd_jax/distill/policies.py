# SPDX-License-Identifier: Apache-2.0
"""Policies: who writes the outputs y on which student and teacher are compared.

A policy is traced into the step and called once, before the loss. Its result is
data: no gradient flows through it. To add one, write a function that returns a
`Policy` and name it in a gin file.

Source: Agarwal et al. (2024), arXiv:2306.13649, Algorithm 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import Batch, Outputs
from gkd_jax.decoding import sampler

# Values of `Rollouts.author`.
DATASET, STUDENT, TEACHER = range(3)


class Rollouts(NamedTuple):
  """The outputs of one step and their origin.

  Attributes:
    outputs: y, and the weight of each token in the loss.
    author: [B, T] int8, who wrote each token: DATASET, STUDENT or TEACHER.
    log_probs: [B, T] float32 nats, log-probability of each token under the
      distribution that it was drawn from; 0 for tokens that were not drawn.
    batch: the examples that the outputs belong to; None: the step's batch. Both
      models and the reward read these inputs and targets.
    carried: the policy's state after this step; () if it has none.
  """

  outputs: Outputs
  author: jax.Array
  log_probs: jax.Array
  batch: Batch | None = None
  carried: Any = ()

  @property
  def by_student_B(self) -> jax.Array:
    """[B] bool: rows in which the student wrote every token."""
    return jnp.all(self.author == STUDENT, axis=1)

  @property
  def student_share_B(self) -> jax.Array:
    """[B] float32: share of a row's weighted tokens that the student wrote."""
    counts_BT = self.outputs.weights != 0.0
    by_student_B = jnp.sum(
      counts_BT & (self.author == STUDENT), axis=1, dtype=jnp.float32
    )
    length_B = jnp.sum(counts_BT, axis=1, dtype=jnp.float32)
    return by_student_B / jnp.maximum(length_B, 1.0)


Sample = Callable[[], sampler.Rollout]


class Draw(NamedTuple):
  """The inputs of a policy. Functions that it does not call cost nothing.

  Attributes:
    rng: key of this step's policy.
    batch: the step's examples, with the dataset's own outputs.
    row_ids_B: [B] int32 number of each row in the global batch.
    sample_student: () -> one output per input, drawn from the student.
    sample_teacher: () -> one output per input, drawn from the teacher.
    carried: the policy's state; () if it has none.
  """

  rng: jax.Array
  batch: Batch
  row_ids_B: jax.Array
  sample_student: Sample
  sample_teacher: Sample
  carried: Any = ()


@dataclasses.dataclass(frozen=True)
class Policy:
  """A way to obtain outputs.

  Attributes:
    write: Draw -> Rollouts.
    student_data_fraction: expected fraction of outputs that the student writes,
      lambda in the paper.
    needs_teacher: whether `write` may call `sample_teacher`.
    init: shapes of a batch -> initial state of the policy. `write` reads it in
      `Draw.carried` and returns the next one in `Rollouts.carried`. None: the
      policy has no state.
  """

  write: Callable[[Draw], Rollouts]
  student_data_fraction: float
  needs_teacher: bool = False
  init: Callable[[Batch], Any] | None = None


def rollouts(
  outputs: Outputs, author: int | jax.Array, log_probs: jax.Array | None = None
) -> Rollouts:
  """Returns rollouts of outputs with known authors.

  Args:
    outputs: [B, T].
    author: a scalar, [B] one per row, or [B, T] one per token.
    log_probs: [B, T] of the draw; None: the outputs were not drawn.
  """
  shape = outputs.tokens.shape
  author = jnp.asarray(author, jnp.int8)
  if author.ndim == 1:
    author = author[:, None]
  if log_probs is None:
    log_probs = jnp.zeros(shape, jnp.float32)
  return Rollouts(outputs, jnp.broadcast_to(author, shape), log_probs)


def drawn_by(author: int, drawn: sampler.Rollout) -> Rollouts:
  """Returns the rollouts of samples that one author drew."""
  outputs = Outputs(drawn.tokens, drawn.weights)
  return rollouts(outputs, author, drawn.log_probs)


def dataset() -> Policy:
  """The dataset's own outputs: supervised distillation, lambda = 0."""
  return Policy(lambda draw: rollouts(draw.batch.outputs, DATASET), 0.0)


def student() -> Policy:
  """Outputs drawn from the student's current weights: lambda = 1."""
  return Policy(lambda draw: drawn_by(STUDENT, draw.sample_student()), 1.0)


def teacher() -> Policy:
  """Outputs drawn from the teacher, during training."""
  return Policy(
    lambda draw: drawn_by(TEACHER, draw.sample_teacher()),
    0.0,
    needs_teacher=True,
  )


def mixture(
  student_data_fraction: float,
  per: str = 'batch',
  otherwise: Callable[[], Policy] = dataset,
) -> Policy:
  """The student with probability lambda, another policy otherwise.

  Args:
    student_data_fraction: lambda. At 0 the result is the policy `otherwise`, at
      1 it is `student`.
    per: 'batch', one random choice per step as in Algorithm 1 (steps that do
      not sample skip its cost), or 'sequence', one random choice per row.
    otherwise: `dataset`, `teacher`, or another function that returns a policy
      for the step's own batch.

  Raises:
    ValueError: lambda is outside [0, 1], or `per` is invalid.
  """
  if not 0.0 <= student_data_fraction <= 1.0:
    raise ValueError(
      'student_data_fraction (lambda of the paper) must be in [0, 1], got '
      f'{student_data_fraction}: it is the fraction of outputs that the '
      'student writes.'
    )
  if per not in ('batch', 'sequence'):
    raise ValueError(f"mixture.per must be 'batch' or 'sequence', got {per!r}.")
  other = otherwise()
  if student_data_fraction == 0.0:
    return other
  if student_data_fraction == 1.0:
    return student()

  def by_student(draw):
    return student().write(draw)._replace(carried=draw.carried)

  def write_batch(draw):
    sampled = jax.random.uniform(draw.rng) < student_data_fraction
    return jax.lax.cond(
      sampled, lambda: by_student(draw), lambda: other.write(draw)
    )

  def write_sequence(draw):
    sampled_B = (
      jax.vmap(
        lambda row: jax.random.uniform(jax.random.fold_in(draw.rng, row))
      )(draw.row_ids_B)
      < student_data_fraction
    )
    ours, theirs = by_student(draw), other.write(draw)
    per_token = jax.tree.map(
      lambda a, b: jnp.where(sampled_B[:, None], a, b),
      (ours.outputs, ours.author, ours.log_probs),
      (theirs.outputs, theirs.author, theirs.log_probs),
    )
    return Rollouts(*per_token, carried=theirs.carried)

  return Policy(
    write_batch if per == 'batch' else write_sequence,
    student_data_fraction,
    other.needs_teacher,
    other.init,
  )
