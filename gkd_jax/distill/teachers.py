# SPDX-License-Identifier: Apache-2.0
"""Teachers: the parameters that the student is compared with.

A teacher returns its parameters at each step: those of a checkpoint, or
parameters derived from the student's, such as their moving average. Several
teachers are combined into one distribution per token, or each row of a batch
has one of them. No gradient flows through a teacher.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any

# What a member of several teachers reads: names of properties of `Batch`.
READS = ('teacher_inputs', 'encoder_input_tokens')


class Weighted(NamedTuple):
  """Logits of a combination that also weights its tokens.

  Attributes:
    logits: [..., V].
    weight: [...] multiplies the divergence of each token in the loss.
  """

  logits: jax.Array
  weight: jax.Array


# Logits [..., V] of each member, sorted by name -> their combination. They are
# float32, masked and of the same width.
Combine = Callable[[Sequence[jax.Array]], jax.Array | Weighted]


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
    checkpoint_name: of several checkpoints the one with this name.
  """

  params: Callable[[Params, Params, Any], Params] = _frozen
  needs_checkpoint: bool = True
  init: Callable[[Params], Any] | None = None
  update: Callable[[Any, Params], Any] | None = None
  is_live: bool = False
  checkpoint_name: str | None = None

  def __post_init__(self):
    if (self.init is None) != (self.update is None):
      raise ValueError('Teacher.init and Teacher.update must be set together.')


class Member(NamedTuple):
  """One of several teachers that are combined.

  Attributes:
    teacher: its parameters, by their name in `Several.teachers`.
    reads: one of READS: `teacher_inputs`, or the student's inputs.
  """

  teacher: str
  reads: str = READS[0]


@dataclasses.dataclass(frozen=True)
class Several:
  """Several teachers; has the attributes of a `Teacher`.

  Attributes:
    teachers: {name: teacher}. Each is in memory once.
    members: {name: what is combined}; several members may share a teacher and
      differ in what they read.
    combine: the members' logits -> their combination; None: each row of a batch
      has the member that `Batch.teacher_ids` numbers. Both sort the members by
      their names.
  """

  teachers: Mapping[str, Teacher]
  members: Mapping[str, Member]
  combine: Combine | None

  def __post_init__(self):
    for name, member in self.members.items():
      if member.reads not in READS or member.teacher not in self.teachers:
        raise ValueError(
          f'The member {name!r} must read one of {READS} and be one of the '
          f'teachers {sorted(self.teachers)}, got {member}.'
        )

  @property
  def is_routed(self) -> bool:
    """Whether each row of a batch names its teacher."""
    return self.combine is None

  @property
  def needs_checkpoint(self) -> bool:
    return any(x.needs_checkpoint for x in self.teachers.values())

  @property
  def is_live(self) -> bool:
    return any(x.is_live for x in self.teachers.values())

  @property
  def reads_both(self) -> bool:
    """Whether the members differ in what they read."""
    return len({member.reads for member in self.members.values()}) > 1

  def params(
    self, frozen: Params, student: Params, carried: Any
  ) -> dict[str, Params]:
    """Returns {name: parameters}; see `Teacher.params`."""
    return {
      name: x.params(frozen, student, carried[name] if x.init else ())
      for name, x in self.teachers.items()
    }

  @property
  def init(self) -> Callable[[Params], dict[str, Any]] | None:
    """See `Teacher.init`."""
    stateful = {name: x for name, x in self.teachers.items() if x.init}
    if not stateful:
      return None
    return lambda student: {
      name: x.init(student) for name, x in stateful.items()
    }

  @property
  def update(self) -> Callable[[Any, Params], dict[str, Any]]:
    """See `Teacher.update`."""
    return lambda carried, student: {
      name: self.teachers[name].update(x, student)
      for name, x in carried.items()
    }


def checkpoint_names(teacher: Teacher | Several) -> list[str | None]:
  """Returns the names of the checkpoints that a teacher needs.

  None stands for the only checkpoint of a run.
  """
  several = isinstance(teacher, Several)
  teachers = teacher.teachers.values() if several else [teacher]
  return [x.checkpoint_name for x in teachers if x.needs_checkpoint]


def without_student(
  teacher: Teacher | Several, names: Sequence[str]
) -> Teacher | Several:
  """Returns the teacher of evaluations, which has checkpoints alone.

  Args:
    teacher: of the method.
    names: of the checkpoints; empty if there is one without a name.

  Returns:
    `teacher`, if it is of checkpoints alone; else the only checkpoint, or the
    mean of the probabilities of several.
  """
  if isinstance(teacher, Several) and all(
    x.needs_checkpoint for x in teacher.teachers.values()
  ):
    return teacher
  if names:
    return _of_checkpoints(sorted(names), mean_of_probabilities)
  return checkpoint()


def checkpoint(name: str | None = None) -> Teacher:
  """The frozen parameters of TEACHER_CHECKPOINT_PATH.

  Args:
    name: the key of a TEACHER_CHECKPOINT_PATH = {name: path}; None: it is one
      path.
  """
  if name is None:
    return Teacher()
  return Teacher(
    params=lambda frozen, student, carried: frozen[name], checkpoint_name=name
  )


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


# --- Several teachers ---------------------------------------------------------


def averaged(
  checkpoints: Mapping[str, Any], mean: str = 'probabilities'
) -> Several:
  """The mean of several teachers' distributions, at each token.

  Args:
    checkpoints: {name: path}, as TEACHER_CHECKPOINT_PATH; the names are read.
    mean: 'probabilities', P = 1/K sum_k P_k; or 'log_probabilities', P
      proportional to the product of P_k^(1/K). The gradient of the forward KL
      is the mean of the teachers' gradients in the first case, that of the
      reverse KL in the second.

  Raises:
    ValueError: there are not two or more names, or another `mean`.
  """
  means = {
    'probabilities': mean_of_probabilities,
    'log_probabilities': mean_of_log_probabilities,
  }
  if mean not in means:
    raise ValueError(
      f'teachers.averaged.mean must be one of {", ".join(means)}, got {mean!r}.'
    )
  return _of_checkpoints(_names(checkpoints, 'teachers.averaged'), means[mean])


def routed(checkpoints: Mapping[str, Any]) -> Several:
  """Each example names its teacher in a field; see `datasets.DatasetConfig`.

  A teacher that no row of a batch names is not run. A teacher that any row
  names is run on all rows.

  Args:
    checkpoints: {name: path}, as TEACHER_CHECKPOINT_PATH; the names are read.

  Raises:
    ValueError: there are not two or more names.

  Source: MOPD, arXiv:2601.02780.
  """
  return _of_checkpoints(_names(checkpoints, 'teachers.routed'), None)


def extrapolated(
  towards: str, away_from: str, strength: float = 2.0
) -> Several:
  """The extrapolation of two checkpoints' logits at each token.

      z = z_b + strength (z_a - z_b)

  Args:
    towards: name of checkpoint a in TEACHER_CHECKPOINT_PATH = {name: path}.
    away_from: name of checkpoint b.
    strength: 1 is a, 0 is b; above 1 extrapolates.

  Raises:
    ValueError: both names are the same.
  """
  return _of_two(
    'extrapolated',
    towards,
    away_from,
    lambda a, b: extrapolate(a, b, strength),
  )


def adaptively_extrapolated(
  towards: str, away_from: str, scale: float = 15.0, weight: float = 0.1
) -> Several:
  """An extrapolation that is stronger where the two checkpoints differ.

      w = scale sum_v |P_a(v) - P_b(v)| + 0.001,   z = z_a + w (z_a - z_b)

  The divergence of a token is weighted by weight / w.

  Args:
    towards: name of checkpoint a in TEACHER_CHECKPOINT_PATH = {name: path}.
    away_from: name of checkpoint b.
    scale: above 0; the paper has 15 on the student's outputs and 10 on the
      dataset's.
    weight: above 0.

  Raises:
    ValueError: scale or weight is not above 0, or both names are the same.

  Source: AlignDistil, arXiv:2503.02832, with a = the model trained by DPO and
  b = the one trained by DPO with chosen and rejected exchanged.
  """
  for name, value in (('scale', scale), ('weight', weight)):
    if value <= 0.0:
      raise ValueError(
        f'teachers.adaptively_extrapolated.{name} must be above 0, got {value}.'
      )

  def combine(a, b):
    distance = jnp.abs(jax.nn.softmax(a) - jax.nn.softmax(b)).sum(axis=-1)
    w = scale * distance + 1e-3
    # z_a + w (z_a - z_b), so that masked logits stay masked.
    return Weighted(a + w[..., None] * (a - b), weight / w)

  return _of_two('adaptively_extrapolated', towards, away_from, combine)


def guided(strength: float, weights: Teacher | None = None) -> Several:
  """A teacher guided by its context, as in classifier-free guidance.

      z = z_without + strength (z_with - z_without)

  The teacher reads `teacher_inputs` (with) and the student's inputs (without).
  Its parameters are in memory once.

  Args:
    strength: 1 is the teacher with the context; above 1 sharpens what the
      context adds.
    weights: which parameters; None: `checkpoint`.

  Source: arXiv:2410.06084.
  """
  members = {
    'with_context': Member('teacher', READS[0]),
    'without_context': Member('teacher', READS[1]),
  }
  return Several(
    {'teacher': weights or checkpoint()},
    members,
    lambda logits: extrapolate(*logits, strength),
  )


def mean_of_probabilities(logits: Sequence[jax.Array]) -> jax.Array:
  """Returns logits of 1/K sum_k P_k: K arrays [..., V] -> [..., V]."""
  # Each normalised as the first, so that equal logits stay as they are.
  sums = [jax.nn.logsumexp(x, axis=-1, keepdims=True) for x in logits]
  same = jnp.stack(
    [x + (sums[0] - total) for x, total in zip(logits, sums, strict=True)]
  )
  largest = same.max(axis=0)
  return largest + jnp.log(jnp.exp(same - largest).mean(axis=0))


def mean_of_log_probabilities(logits: Sequence[jax.Array]) -> jax.Array:
  """Returns logits of prod_k P_k^(1/K): K arrays [..., V] -> [..., V]."""
  return jnp.stack(logits).mean(axis=0)


def extrapolate(
  towards: jax.Array, away_from: jax.Array, strength: float | jax.Array
) -> jax.Array:
  """Returns z_b + strength (z_a - z_b): [..., V] and [..., V] -> [..., V]."""
  return away_from + strength * (towards - away_from)


def _of_checkpoints(names: Sequence[str], combine: Combine | None) -> Several:
  return Several(
    {name: checkpoint(name) for name in names},
    {name: Member(name) for name in names},
    combine,
  )


def _of_two(
  function: str,
  towards: str,
  away_from: str,
  combine: Callable[[jax.Array, jax.Array], jax.Array | Weighted],
) -> Several:
  """Returns two checkpoints, combined by a function of their logits a and b."""
  if towards == away_from:
    raise ValueError(
      f'teachers.{function} needs two checkpoints, but towards and away_from '
      f'are both {towards!r}: set them to different names of '
      'TEACHER_CHECKPOINT_PATH = {name: path}.'
    )
  names = sorted((towards, away_from))

  def combine_sorted(logits):
    of = dict(zip(names, logits, strict=True))
    return combine(of[towards], of[away_from])

  return _of_checkpoints(names, combine_sorted)


def _names(checkpoints: Mapping[str, Any], function: str) -> list[str]:
  """Returns the names, sorted: gin sorts them when it writes a config."""
  is_mapping = isinstance(checkpoints, Mapping)
  if not is_mapping or len(checkpoints) < 2:
    raise ValueError(
      f'{function} needs two or more teachers: set TEACHER_CHECKPOINT_PATH = '
      f"{{'name': path, 'other name': path}}, got {checkpoints!r}."
    )
  return sorted(checkpoints)
