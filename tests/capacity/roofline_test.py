# SPDX-License-Identifier: Apache-2.0
import pytest

from gkd_jax.capacity import costs, roofline
from gkd_jax.capacity.collectives import Collective
from gkd_jax.capacity.costs import Cost
from gkd_jax.models.t5 import T5Config

STUDENT = T5Config(256, 16, 4, 8, 32, 2, 2)
TEACHER = T5Config(256, 32, 4, 8, 64, 2, 2)
LENGTHS = {'input_length': 12, 'target_length': 6}
CHIP = roofline.Chip(1.0, 1.0, flops=100.0, bandwidth=10.0, interconnect=1.0)


def on_a_device(**changes):
  arguments = {
    'batch_size': 16,
    **LENGTHS,
    'num_microbatches': 1,
    'data': 1,
    'student_model': 1,
    'teacher_model': 1,
    'teacher_weight_bytes': 4,
  }
  return roofline.on_a_device(STUDENT, TEACHER, **arguments | changes)


def of_step(**sizes):
  cost = costs.of_step(STUDENT, TEACHER, **LENGTHS, **sizes)
  return {name: c for name, c in cost.items() if name != 'optimizer'}


def test_a_device_alone_does_the_whole_step():
  assert on_a_device() == of_step(batch_size=16)


def test_over_data_each_has_a_part_of_the_rows_and_reads_all_weights():
  assert on_a_device(data=4) == of_step(batch_size=4)


def test_over_model_each_has_a_part_of_every_product():
  whole, part = on_a_device(), on_a_device(student_model=4, teacher_model=2)

  assert part['sampling'] == whole['sampling'].times(1 / 4)
  assert part['teacher'] == whole['teacher'].times(1 / 2)


def test_the_teacher_may_read_a_longer_input():
  cost, longer = (
    on_a_device(teacher_input_length=40),
    on_a_device(input_length=40),
  )

  assert cost['teacher'] == longer['teacher']
  assert {**cost, 'teacher': None} == {**on_a_device(), 'teacher': None}


def test_weights_are_read_again_for_each_microbatch():
  whole, parts = on_a_device(), on_a_device(num_microbatches=4)

  assert parts['teacher'] == Cost(
    pytest.approx(whole['teacher'].flops), 4 * whole['teacher'].bytes
  )


def test_outputs_are_written_for_all_microbatches_together():
  whole, parts = on_a_device(), on_a_device(num_microbatches=4)

  assert parts['sampling'] == whole['sampling']


def test_without_a_teacher_there_is_no_such_phase():
  cost = roofline.on_a_device(
    STUDENT,
    None,
    batch_size=16,
    **LENGTHS,
    num_microbatches=1,
    data=1,
    student_model=1,
    teacher_model=1,
    teacher_weight_bytes=4,
  )

  assert 'teacher' not in cost
  assert cost['student'].flops < on_a_device()['student'].flops


@pytest.mark.parametrize(
  ('cost', 'received', 'seconds', 'bound_by'),
  [
    (Cost(300.0, 20.0), 1.0, 3.0, 'compute'),
    (Cost(100.0, 20.0), 1.0, 2.0, 'memory'),
    (Cost(100.0, 20.0), 4.0, 4.0, 'interconnect'),
  ],
)
def test_a_phase_takes_as_long_as_the_slowest_of_three(
  cost, received, seconds, bound_by
):
  gather = Collective(
    'all-gather', 'jit(f)/teacher/dot', False, 2, received / 2
  )

  phase = roofline.of_phases({'teacher': cost}, [gather], CHIP)['teacher']

  assert (phase['seconds'], phase['bound_by']) == (seconds, bound_by)


@pytest.mark.parametrize(
  ('op_name', 'phase'),
  [
    ('jit(train_step)/jvp(teacher)/T5.decode/dot_general', 'teacher'),
    ('jit(train_step)/while/body/jvp(student_encoder)/dot', 'student_encoder'),
    ('jit(train_step)/transpose(jvp(student_encoder))/dot', 'student'),
    ('jit(train_step)/jvp(sampling)/while/cond/reduce_or', 'sampling'),
    ('jit(train_step)/jvp(reward)/T5.encode/dot_general', 'reward'),
    ('jit(train_step)/while/body/compare/T5.decode/dot_general', 'compare'),
    ('jit(train_step)/reduce_sum', 'other'),
    ('', 'other'),
  ],
)
def test_a_collective_belongs_to_the_scope_it_stands_in(op_name, phase):
  one = Collective('all-reduce', op_name, False, 1, 1.0)

  assert roofline.phase_of(one, dict.fromkeys(roofline.PHASES)) == phase


def test_collectives_are_summed_up_by_phase_and_kind():
  one = Collective('all-gather', 'jit(f)/teacher/a', False, 3, 10.0)
  other = one._replace(times=1, received=5.0)
  token = Collective('all-reduce', 'jit(f)/sampling/b', True, 64, 1.0)

  summed = roofline.summary([token, one, other], dict.fromkeys(roofline.PHASES))

  assert summed == [
    {
      'phase': 'sampling',
      'kind': 'all-reduce',
      'in_decode_loop': True,
      'times': 64,
      'received': 64.0,
    },
    {
      'phase': 'teacher',
      'kind': 'all-gather',
      'in_decode_loop': False,
      'times': 4,
      'received': 35.0,
    },
  ]
