# SPDX-License-Identifier: Apache-2.0
"""Lower bounds of the step time on a TPU slice, phase by phase.

A chip computes, accesses memory and receives data in parallel, each at its
published peak rate, so the slowest of the three bounds the phase. FLOPs and
bytes are computed from shapes (`costs`), received bytes from the compiled
program (`collectives`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gkd_jax.capacity import costs
from gkd_jax.capacity.collectives import Collective
from gkd_jax.capacity.costs import Cost
from gkd_jax.models.interface import ModelConfig


class Chip(NamedTuple):
  """A TPU generation.

  Attributes:
    hbm: memory of a chip in GiB, as published.
    available: GiB that libtpu's compiler (0.0.42) leaves to a program.
    flops: bfloat16 FLOPs per second; TPUs compute float32 products in bfloat16
      by default.
    bandwidth: bytes per second of the chip's memory.
    interconnect: bytes per second that a chip receives over all its links.
    config: libtpu's configuration of the chip's cores; None: its default.
  """

  hbm: float
  available: float
  flops: float
  bandwidth: float
  interconnect: float
  config: str | None = None


# From cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, which list v5p's 96 GiB as 95
# GB, and the interconnect as the sum of both directions or as Gbit/s of one.
# The two cores of a v4 or v5p chip are one JAX device.
CHIPS = {
  'v4': Chip(32, 30.75, 275e12, 1228e9, 300e9, 'megacore'),
  'v5e': Chip(16, 15.75, 197e12, 819e9, 200e9),
  'v5p': Chip(96, 95.74, 459e12, 2765e9, 600e9, 'megacore'),
  'v6e': Chip(32, 31.25, 918e12, 1638e9, 400e9),
}

# Named scopes of a step. Only those that it has are phases of a report.
PHASES = (
  'student_encoder',
  'teacher_encoder',  # before the teacher writes
  'sampling',
  'compare',
  'teacher',
  'credit',
  'reward',
  'student',
  'optimizer',
)
_PHASE = re.compile(rf'\b({"|".join(PHASES)})\b')


def on_a_device(
  student: ModelConfig,
  teacher: ModelConfig | None,
  *,
  batch_size: int,
  input_length: int,
  target_length: int,
  num_microbatches: int,
  data: int,
  student_model: int,
  teacher_model: int,
  teacher_weight_bytes: int,
  teacher_input_length: int | None = None,
  num_outputs: int = 1,
) -> dict[str, Cost]:
  """Returns the cost of each phase of `costs.of_step` on one device.

  The optimizer is left out: its state may be sharded in another way.

  Args:
    student: the student's shape.
    teacher: the teacher's shape; None: there is no teacher.
    batch_size: global batch size.
    input_length: S.
    target_length: T.
    num_microbatches: parts of the batch.
    data: devices that the batch is sharded over.
    student_model: devices that each matrix product of the student is sharded
      over, and in phase 'student' the teacher's projection to the vocabulary.
    teacher_model: devices that each matrix product of the teacher is sharded
      over.
    teacher_weight_bytes: bytes per weight of the teacher.
    teacher_input_length: tokens of the inputs that the teacher reads; None: S.
    num_outputs: outputs that are compared for each input.
  """
  cost = costs.of_step(
    student,
    teacher,
    batch_size=batch_size // data,
    num_microbatches=num_microbatches,
    input_length=input_length,
    target_length=target_length,
    teacher_input_length=teacher_input_length,
    num_outputs=num_outputs,
    weight_bytes=costs.WIDTHS[student.dtype],
    teacher_weight_bytes=teacher_weight_bytes,
  )
  shared = {'teacher': teacher_model}
  return {
    phase: cost[phase].times(1 / shared.get(phase, student_model))
    for phase in PHASES
    if phase in cost and phase != 'optimizer'
  }


def of_phases(
  cost: Mapping[str, Cost],
  collectives: Sequence[Collective] | None,
  chip: Chip | None,
) -> dict[str, dict[str, Any]]:
  """Returns the figures of each phase, for JSON.

  Args:
    cost: {phase: cost on one device}.
    collectives: of the program; phase 'other' collects those outside all
      phases. None: the program was not compiled.
    chip: the TPU generation; None: no times are returned.

  Returns:
    {phase: {'flops', 'bytes': memory traffic, 'received': bytes from other
    devices, 'seconds', 'bound_by': 'compute', 'memory' or 'interconnect'}}.
    Without collectives 'received' is None and 'seconds' is absent.
  """
  received = dict.fromkeys([*cost, 'other'], 0.0)
  for one in collectives or ():
    received[phase_of(one, cost)] += one.times * one.received
  phases = {}
  for phase, num_bytes in received.items():
    of_phase = cost.get(phase, Cost(0.0, 0.0))
    phases[phase] = {
      'flops': of_phase.flops,
      'bytes': of_phase.bytes,
      'received': None if collectives is None else num_bytes,
    }
    if chip is not None and collectives is not None:
      seconds = {
        'compute': of_phase.flops / chip.flops,
        'memory': of_phase.bytes / chip.bandwidth,
        'interconnect': num_bytes / chip.interconnect,
      }
      slowest = max(seconds, key=seconds.__getitem__)
      phases[phase] |= {'seconds': seconds[slowest], 'bound_by': slowest}
  return phases


def phase_of(collective: Collective, phases: Mapping[str, Any]) -> str:
  """Returns the phase that a collective belongs to, or 'other'."""
  match = _PHASE.search(collective.op_name)
  phase = match[1] if match else 'other'
  if phase == 'student_encoder' and 'transpose(' in collective.op_name:
    phase = 'student'  # its backward pass
  return phase if phase in phases else 'other'


def summary(
  collectives: Sequence[Collective], phases: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Returns the collectives by phase and kind, most bytes first, for JSON.

  `times` and `received` (bytes) are totals per step.
  """
  sums: dict[tuple, dict[str, Any]] = {}
  for one in collectives:
    key = (phase_of(one, phases), one.kind, one.in_decode_loop)
    entry = sums.setdefault(
      key,
      {
        'phase': key[0],
        'kind': one.kind,
        'in_decode_loop': one.in_decode_loop,
        'times': 0,
        'received': 0.0,
      },
    )
    entry['times'] += one.times
    entry['received'] += one.times * one.received
  return sorted(sums.values(), key=lambda entry: -entry['received'])
