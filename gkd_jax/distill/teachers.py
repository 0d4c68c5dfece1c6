# SPDX-License-Identifier: Apache-2.0
"""Teachers: the parameters that the student is compared with.

A teacher returns its parameters at each step: those of a checkpoint, or
parameters derived from the student's, such as their moving average. No gradient
flows through it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

Params = Any


def _frozen(frozen: Params, student: Params, carried: Any) -> Params:
  del student, carried
  return frozen


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
  """

  params: Callable[[Params, Params, Any], Params] = _frozen
  needs_checkpoint: bool = True
  init: Callable[[Params], Any] | None = None
  update: Callable[[Any, Params], Any] | None = None

  def __post_init__(self):
    if (self.init is None) != (self.update is None):
      raise ValueError('Teacher.init and Teacher.update must be set together.')


def checkpoint() -> Teacher:
  """The frozen parameters of TEACHER_CHECKPOINT_PATH."""
  return Teacher()
