# SPDX-License-Identifier: Apache-2.0
"""A method: the four choices made together, and how outputs are drawn."""

import dataclasses

from gkd_jax.decoding import sampler
from gkd_jax.distill import credit as credit_lib
from gkd_jax.distill import objectives, policies, teachers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """What a train step does, apart from models and optimizer.

  Attributes:
    policy: who writes the outputs.
    objective: the divergence from the teacher, the likelihood, their weights
      and their reduction.
    teacher: who grades the outputs.
    credit: what else makes tokens more or less likely; None: nothing.
    student_sampler: how outputs are drawn from the student; in the paper from
      its own distribution.
    teacher_sampler: how outputs are drawn from the teacher.
  """

  policy: policies.Policy
  objective: objectives.Objective
  teacher: teachers.Teacher = teachers.checkpoint()
  credit: credit_lib.Credit | None = None
  student_sampler: sampler.SamplerConfig = sampler.ANCESTRAL
  teacher_sampler: sampler.SamplerConfig = sampler.ANCESTRAL

  def __post_init__(self):
    if not isinstance(self.policy, policies.Policy):
      raise ValueError(
        'POLICY must be a policy, such as @policies.student(), got '
        f'{self.policy!r}.'
      )

  @property
  def needs_teacher(self) -> bool:
    """Whether the teacher writes or grades."""
    return self.policy.needs_teacher or self.objective.needs_teacher

  @property
  def needs_teacher_checkpoint(self) -> bool:
    return self.needs_teacher and self.teacher.needs_checkpoint

  @property
  def reward(self):
    """The reward that the credit reads; None if there is none."""
    return None if self.credit is None else self.credit.reward
