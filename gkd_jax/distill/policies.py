# SPDX-License-Identifier: Apache-2.0
"""Who writes the outputs y that student and teacher are compared on.

A policy is traced into the step. It returns data: no gradient flows through
what it does. To add one, write a function that returns a `Policy` and name it
in a gin file.

Source: Agarwal et al. (2024), arXiv:2306.13649, Algorithm 1.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import Batch, Outputs


class Written(NamedTuple):
  """Outputs, and which of them the student wrote."""

  outputs: Outputs
  by_student: jax.Array  # [B] bool


Sample = Callable[[], Outputs]
Write = Callable[[jax.Array, Batch, jax.Array, Sample, Sample], Written]


@dataclasses.dataclass(frozen=True)
class Policy:
  """One way to obtain outputs.

  Attributes:
    write: (rng, batch, row_ids [B], sample_student, sample_teacher) -> Written.
      What it does not call or read is not compiled.
    student_data_fraction: expected share of outputs that the student writes,
      lambda in the paper.
    needs_teacher: whether the teacher may be asked to write.
  """

  write: Write
  student_data_fraction: float
  needs_teacher: bool = False


def dataset() -> Policy:
  """The dataset wrote the outputs: supervised distillation, lambda = 0."""

  def write(rng, batch, row_ids_B, sample_student, sample_teacher):
    del rng, sample_student, sample_teacher
    return Written(batch.outputs, jnp.zeros(row_ids_B.shape, bool))

  return Policy(write, 0.0)


def student() -> Policy:
  """The student writes them, with its current weights: lambda = 1."""

  def write(rng, batch, row_ids_B, sample_student, sample_teacher):
    del rng, batch, sample_teacher
    return Written(sample_student(), jnp.ones(row_ids_B.shape, bool))

  return Policy(write, 1.0)


def teacher() -> Policy:
  """The teacher writes them, during training."""

  def write(rng, batch, row_ids_B, sample_student, sample_teacher):
    del rng, batch, sample_student
    return Written(sample_teacher(), jnp.zeros(row_ids_B.shape, bool))

  return Policy(write, 0.0, needs_teacher=True)


def mixture(
  student_data_fraction: float,
  per: str = 'batch',
  otherwise: Callable[[], Policy] = dataset,
) -> Policy:
  """The student with probability lambda, somebody else otherwise.

  Args:
    student_data_fraction: lambda. At 0 and 1 nothing is drawn: the policy is
      then `otherwise` or `student` itself.
    per: 'batch', one draw a step as in Algorithm 1 (a step that does not sample
      does not pay for it), or 'sequence', one draw a row.
    otherwise: `dataset` or `teacher`.

  Raises:
    ValueError: lambda is outside [0, 1], or `per` is neither of the two.
  """
  if not 0.0 <= student_data_fraction <= 1.0:
    raise ValueError(
      'student_data_fraction (lambda of the paper) must be in [0, 1], got '
      f'{student_data_fraction}: it is the share of outputs that the student '
      'writes.'
    )
  if per not in ('batch', 'sequence'):
    raise ValueError(f"mixture.per must be 'batch' or 'sequence', got {per!r}.")
  other = otherwise()
  if student_data_fraction == 0.0:
    return other
  if student_data_fraction == 1.0:
    return student()

  def write_batch(rng, batch, row_ids_B, *sample):
    sampled = jax.random.uniform(rng) < student_data_fraction
    arguments = (rng, batch, row_ids_B, *sample)
    return jax.lax.cond(
      sampled,
      lambda: student().write(*arguments),
      lambda: other.write(*arguments),
    )

  def write_sequence(rng, batch, row_ids_B, *sample):
    sampled_B = (
      jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(rng, row)))(
        row_ids_B
      )
      < student_data_fraction
    )
    arguments = (rng, batch, row_ids_B, *sample)
    ours, theirs = student().write(*arguments), other.write(*arguments)
    return Written(
      jax.tree.map(
        lambda a, b: jnp.where(sampled_B[:, None], a, b),
        ours.outputs,
        theirs.outputs,
      ),
      sampled_B,
    )

  return Policy(
    write_batch if per == 'batch' else write_sequence,
    student_data_fraction,
    other.needs_teacher,
  )
