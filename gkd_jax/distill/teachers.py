# SPDX-License-Identifier: Apache-2.0
"""Teachers: the parameters that the student is compared with.

A teacher returns its parameters at each step: those of a checkpoint, or
parameters derived from the student's, such as their moving average. No gradient
flows through it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Params = Any


def _frozen(frozen: Params, student: Params, carried: Any) -> Params:
  del student, carried
  return frozen


def _carried(frozen: Params, student: Params, carried: Any) -> Params:
  del frozen, student
  return carried


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A way to obtain the teacher's parameters.

  Attributes:
    params: (parameters of the teacher's checkpoint or None, the student's
      parameters, carried) -> the teacher's parameters at this step.
    needs_checkpoint: True: the teacher is the model of a checkpoint. False: it
      is the student's model, run without dropout.
    init: the student's parameters -> initial state of the teacher; None: it
      has no state.
    update: (carried, the student's parameters after this step) -> carried.
    is_live: whether its parameters are always the student's own, so that both
      models are equal but for dropout and inputs.
  """

  params: Callable[[Params, Params, Any], Params] = _frozen
  needs_checkpoint: bool = True
  init: Callable[[Params], Any] | None = None
  update: Callable[[Any, Params], Any] | None = None
  is_live: bool = False

  def __post_init__(self):
    if (self.init is None) != (self.update is None):
      raise ValueError('Teacher.init and Teacher.update must be set together.')


def checkpoint() -> Teacher:
  """The frozen parameters of TEACHER_CHECKPOINT_PATH."""
  return Teacher()


def initial() -> Teacher:
  """The student's parameters at the start of the run.

  They are kept in the train state: one more copy of the parameters.
  """
  return Teacher(
    params=_carried,
    needs_checkpoint=False,
    init=lambda student: student,
    update=lambda carried, student: carried,
  )


def live() -> Teacher:
  """The student's parameters at each step, without a copy of them.

  Student and teacher then differ only in what they read (see
  `datasets.TeacherInputs`); with equal inputs loss and gradient are 0.
  """
  return Teacher(
    params=lambda frozen, student, carried: student,
    needs_checkpoint=False,
    is_live=True,
  )


def ema(rate: float = 0.01) -> Teacher:
  """The exponential moving average of the student's parameters.

      teacher <- (1 - rate) teacher + rate student

  It starts at the student's initial parameters and changes after each step of
  the optimizer, but not in a skipped step. It is float32 and sharded like the
  parameters.

  Args:
    rate: in [0, 1]; 0 is `initial`, 1 the student after the last step.

  Raises:
    ValueError: rate is outside [0, 1].

  Source: SDFT, arXiv:2601.19897, with rate 0.01.
  """
  if not 0.0 <= rate <= 1.0:
    raise ValueError(
      f'teachers.ema.rate must be in [0, 1], got {rate}: it is the weight of '
      'the student in each step, such as 0.01.'
    )

  def update(carried, student):
    return jax.tree.map(
      lambda t, s: (1.0 - rate) * t + rate * s.astype(t.dtype), carried, student
    )

  return Teacher(
    params=_carried,
    needs_checkpoint=False,
    init=lambda student: jax.tree.map(lambda x: x.astype(jnp.float32), student),
    update=update,
  )
