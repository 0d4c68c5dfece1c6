# SPDX-License-Identifier: Apache-2.0
"""A method: policy, teacher, divergence and credit, and the two samplers."""

import dataclasses

from gkd_jax.decoding import sampler, speculative
from gkd_jax.distill import credit as credit_lib
from gkd_jax.distill import objectives, policies, teachers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """The train step's method, without models and optimizer.

  Attributes:
    policy: who writes the outputs.
    objective: the divergence from the teacher, the likelihood, their weights
      and their reduction.
    teacher: who grades the outputs: one teacher, or `teachers.Several`.
    credit: an additional gradient on the outputs, such as REINFORCE; None:
      there is none.
    student_sampler: draws outputs from the student; in the paper at
      temperature 1.
    teacher_sampler: draws outputs from the teacher.
    teacher_drafting: the student drafts what the teacher writes: the same
      distribution, in less time where a draft pays (docs/speculative.md). None:
      the teacher writes alone. Outputs that continue a prefix, or that both
      models write token by token, are never drafted.
  """

  policy: policies.Policy
  objective: objectives.Objective
  teacher: teachers.Teacher | teachers.Several = teachers.checkpoint()
  credit: credit_lib.Credit | None = None
  student_sampler: sampler.SamplerConfig = sampler.ANCESTRAL
  teacher_sampler: sampler.SamplerConfig = sampler.ANCESTRAL
  teacher_drafting: speculative.Drafting | None = None

  def __post_init__(self):
    if not isinstance(self.policy, policies.Policy):
      raise ValueError(
        'POLICY must be a policy, such as @policies.student(), got '
        f'{self.policy!r}.'
      )

  @property
  def needs_grades(self) -> bool:
    """Whether objective or credit reads the teacher's logits of the outputs."""
    credit = self.credit
    return self.objective.needs_teacher or (
      credit is not None and credit.needs_teacher
    )

  @property
  def needs_teacher(self) -> bool:
    """Whether the policy, the objective or the credit uses the teacher."""
    return self.policy.needs_teacher or self.needs_grades

  @property
  def needs_teacher_checkpoint(self) -> bool:
    return self.needs_teacher and self.teacher.needs_checkpoint

  @property
  def is_routed(self) -> bool:
    """Whether each row of a batch names its teacher."""
    several = isinstance(self.teacher, teachers.Several)
    return several and self.teacher.is_routed

  @property
  def reward(self):
    """The reward that the credit reads; None if there is none."""
    return None if self.credit is None else self.credit.reward
