# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (a line of HLO is a line)
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax.capacity import collectives
from gkd_jax.decoding import sampler
from gkd_jax.distill import divergences, objectives, policies
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.methods import Method
from gkd_jax.models import t5
from gkd_jax.models.params import abstract_params, count_params
from gkd_jax.parallel import partitioning
from tests import tiny


def programs():
  """Texts of programs with known collectives, for 8 devices as 4 x 2."""
  mesh = partitioning.make_mesh(4, 2)
  spread = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=PartitionSpec('data'), check_vma=False
  )

  @functools.partial(spread, out_specs=PartitionSpec('data'))
  def gather(x):  # float32 [8, 16] on each device
    whole = jax.lax.all_gather(x, 'data', tiled=True)
    return x + whole.reshape(4, *x.shape).sum(0)

  @functools.partial(spread, out_specs=PartitionSpec('data'))
  def reduce_in_scan(x):
    def body(x, _):
      return jnp.tanh(jax.lax.psum(x, 'model')), None

    return jax.lax.scan(body, x, None, length=5)[0]

  @functools.partial(spread, out_specs=PartitionSpec('data'))
  def permute_in_loop_of_unknown_length(x):
    def body(x):
      return jax.lax.ppermute(x, 'data', [(i, (i + 1) % 4) for i in range(4)])

    with jax.named_scope('sampling'):
      return jax.lax.while_loop(lambda x: x[0, 0] < 3.0, body, x)

  def nothing(x):
    return 2.0 * x

  x = jax.ShapeDtypeStruct(
    (32, 16),
    jnp.float32,
    sharding=NamedSharding(mesh, PartitionSpec('data')),
  )
  return {
    f.__name__: jax.jit(f).lower(x).compile().as_text()
    for f in (
      gather,
      reduce_in_scan,
      permute_in_loop_of_unknown_length,
      nothing,
    )
  }


@pytest.fixture(scope='module')
def found():
  texts = tiny.on_simulated_devices(8, __name__, programs.__name__)
  return {name: collectives.find(t, 7) for name, t in texts.items()}


PART = 8 * 16 * 4  # bytes


def test_a_gather_receives_what_the_others_of_its_axis_have(found):
  (one,) = found['gather']

  assert (one.kind, one.times, one.in_decode_loop) == ('all-gather', 1, False)
  assert one.received == 3 * PART


def test_what_stands_in_a_scan_happens_as_often_as_it_runs(found):
  (one,) = found['reduce_in_scan']

  assert (one.kind, one.times, one.in_decode_loop) == ('all-reduce', 5, False)
  # Of two devices each gets half of the sum's parts, and half of the sum.
  assert one.received == PART


def test_a_loop_of_unknown_length_that_samples_runs_for_each_token(found):
  (one,) = found['permute_in_loop_of_unknown_length']

  assert (one.kind, one.times) == ('collective-permute', 7)
  assert one.in_decode_loop
  assert one.received == PART


def test_a_program_without_has_none(found):
  assert found['nothing'] == []


# --- As libtpu writes them ----------------------------------------------------


HEAD = 'HloModule jit_f\n\n'
MESH_GROUPS = (
  HEAD
  + """ENTRY %main (a: bf16[4,8]) -> bf16[16,8] {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%a), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, metadata={op_name="jit(f)/teacher/mul"}
}
"""
)
STARTED = (
  HEAD
  + """ENTRY %main (a: f32[4]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %s = (f32[4]{0}, f32[16]{0}, u32[]) all-gather-start(%a), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %d = f32[16]{0} all-gather-done(%s)
}
"""
)
UNROLLED = (
  HEAD
  + """%body (p: (f32[4], s32[])) -> (f32[4], s32[]) {
  %p = (f32[4]{0}, s32[]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=0
  %i = s32[]{:T(128)} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %once = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%sum
  %twice = f32[4]{0} all-reduce(%once), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%sum
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %t = (f32[4]{0}, s32[]) tuple(%twice, %next)
}

%condition (p: (f32[4], s32[])) -> pred[] {
  %p = (f32[4]{0}, s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=1
  %limit = s32[]{:T(128)} constant(9)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: (f32[4], s32[])) -> (f32[4], s32[]) {
  %a = (f32[4]{0}, s32[]) parameter(0)
  ROOT %w = (f32[4]{0}, s32[]) while(%a), condition=%condition, body=%body
}
"""
)


def test_collectives_of_a_shard_map_are_several_although_their_channel_is_one():
  found = collectives.find(
    HEAD
    + """ENTRY %main (a: f32[4], b: f32[8]) -> f32[2] {
  %a = f32[4]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %x = f32[1]{0} reduce-scatter(%a), channel_id=1, replica_groups={{0,1,2,3}}, metadata={op_name="jit(f)/shard_map/reduce_scatter"}
  ROOT %y = f32[2]{0} reduce-scatter(%b), channel_id=1, replica_groups={{0,1,2,3}}, metadata={op_name="jit(f)/shard_map/reduce_scatter"}
}
""",
    7,
  )

  assert [one.received for one in found] == [3 * 4, 3 * 8]


def test_groups_may_be_axes_of_a_mesh():
  (one,) = collectives.find(MESH_GROUPS, 7)

  assert one.received == 3 * 4 * 8 * 2
  assert one.op_name == 'jit(f)/teacher/mul'


def test_one_that_is_started_and_waited_for_counts_once():
  (one,) = collectives.find(STARTED, 7)

  assert (one.kind, one.received) == ('all-gather', 3 * 4 * 4)


def one_of(instruction):
  """Bytes that the only instruction of a program for 8 devices receives."""
  (one,) = collectives.find(
    'HloModule jit_f, num_partitions=8\n\n'
    'ENTRY %main (a: f32[4]) -> f32[4] {\n'
    f'  %s = {instruction}\n'
    '}\n',
    7,
  )
  return one.received


@pytest.mark.parametrize(
  ('instruction', 'received'),
  [
    # The sum, then its parts: twice 3/4 of both arrays.
    (
      '(f32[8], f32[4]) all-reduce-start(%a, %b), replica_groups=[2,4]<=[8]',
      2 * 12 * 4 * 3 / 4,
    ),
    (
      '((f32[2], f32[1]), (f32[8], f32[4])) all-gather-start(%a, %b), '
      'replica_groups=[2,4]<=[8]',
      12 * 4 * 3 / 4,
    ),
    (
      '(f32[8], f32[8], u32[], u32[]) collective-permute-start(%a)',
      8 * 4,
    ),
    ('f32[2] reduce-scatter(%a), replica_groups={{0,1,2,3},{4,5,6,7}}', 24),
    # Among all devices.
    ('f32[8] all-gather(%a), replica_groups={}', 8 * 4 * 7 / 8),
  ],
)
def test_what_is_received_is_what_the_others_have(instruction, received):
  assert one_of(instruction) == received


def test_a_loop_that_was_unrolled_runs_less_often():
  assert [one.times for one in collectives.find(UNROLLED, 7)] == [5, 5]


def test_the_parts_of_one_in_a_loop_beside_it_are_one():
  parts = UNROLLED.replace('channel_id=2', 'channel_id=1').replace(
    'ROOT %w',
    '%b = f32[4]{0} all-reduce(%a), channel_id=1, '
    'replica_groups={{0,1},{2,3}}, to_apply=%sum\n  ROOT %w',
  )

  assert [one.times for one in collectives.find(parts, 7)] == [1]


# --- Of the step --------------------------------------------------------------

SHAPE = {
  'emb_dim': 64,
  'num_heads': 4,
  'head_dim': 16,
  'mlp_dim': 128,
}
NUM_TOKENS = 5
# (data, model, parameter partitioning dims, microbatches)
PLACEMENTS = {
  'over data': (8, 1, 2, 1),
  'over data, in parts': (8, 1, 2, 2),
  'over model': (2, 4, 1, 1),
}


def steps():
  """Collectives of an on-policy step for 8 devices, and the models' bytes."""
  batch = tiny.batch(
    0, (7, 3, 5, 6) * 4, (5, 2, 5, 4) * 4, max_target_len=NUM_TOKENS
  )

  def of(data, over_model, dims, num_microbatches):
    mesh = partitioning.make_mesh(data, over_model)
    placement = partitioning.Placement(
      mesh, partitioning.standard_logical_axis_rules(dims)
    )
    student = t5.T5(tiny.config(**SHAPE), placement)
    teacher = t5.T5(tiny.config('1.0', **SHAPE), placement)
    optimizer = optax.sgd(1.0)
    train_step = step_lib.make_train_step(
      student=student,
      teacher=teacher,
      method=Method(
        policy=policies.student(),
        objective=objectives.Objective(divergences.forward_kl, chunk_tokens=16),
      ),
      optimizer=optimizer,
      ids=tiny.IDS,
      seed=0,
      num_microbatches=num_microbatches,
    )
    params, teacher_params = map(abstract_params, (student, teacher))
    state = state_lib.abstract_state(params, optimizer, mesh)
    rows = partitioning.batch_sharding(mesh)
    compiled = jax.jit(
      train_step,
      out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    ).lower(
      state,
      state_lib.Frozen(teacher_params),
      jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch
      ),
    )
    return {
      'found': collectives.find(compiled.compile().as_text(), NUM_TOKENS),
      'student': 4 * count_params(params),
      'teacher': 4 * count_params(teacher_params),
    }

  return {name: of(*where) for name, where in PLACEMENTS.items()}


@pytest.fixture(scope='module')
def of_step():
  return tiny.on_simulated_devices(8, __name__, steps.__name__)


def gathered(found, is_teachers):
  return sum(
    one.times * one.received
    for one in found
    if one.kind == 'all-gather' and ('teacher' in one.op_name) == is_teachers
  )


@pytest.mark.slow
@pytest.mark.parametrize('where', ['over data', 'over data, in parts'])
@pytest.mark.parametrize('role', ['student', 'teacher'])
def test_parameters_spread_over_data_are_gathered_once_a_step(
  of_step, role, where
):
  over_data = of_step[where]

  received = gathered(over_data['found'], role == 'teacher')

  # Each device has an eighth already; tokens and the like are little.
  assert 0.8 * over_data[role] < received < 0.95 * over_data[role]


@pytest.mark.slow
@pytest.mark.parametrize('where', ['over data', 'over data, in parts'])
def test_gradients_are_summed_over_the_devices_once_a_step(of_step, where):
  found, student = of_step[where]['found'], of_step[where]['student']

  summed = sum(
    one.times * one.received
    for one in found
    if one.kind in ('all-reduce', 'reduce-scatter', 'all-to-all')
  )

  # A scattered sum; as two operations, one of all gradients, twice that.
  assert 0.8 * student < summed < 2.0 * student


@pytest.mark.slow
def test_nothing_but_whether_all_have_ended_is_exchanged_for_a_token(of_step):
  in_loop = [one for one in of_step['over data']['found'] if one.in_decode_loop]

  assert {one.kind for one in in_loop} == {'all-reduce'}
  assert max(one.received for one in in_loop) < 8


@pytest.mark.slow
def test_over_model_activations_alone_are_exchanged_for_a_token(of_step):
  in_loop = [
    one for one in of_step['over model']['found'] if one.in_decode_loop
  ]

  # Rows of a device, by the widest of what a layer passes on.
  widest = 4 * (16 // 2) * 2 * SHAPE['emb_dim']
  assert in_loop
  assert max(one.received for one in in_loop) <= widest
  # A product's smallest weights are larger: it is none of them.
  assert widest < 4 * SHAPE['emb_dim'] * SHAPE['emb_dim']


def drawing():
  """Collectives of a draw from logits that are sharded over 'model'."""
  mesh = partitioning.make_mesh(2, 4)
  logits = jax.ShapeDtypeStruct(
    (8, 1024),
    jnp.float32,
    sharding=NamedSharding(mesh, PartitionSpec('data', 'model')),
  )

  def draw(logits, shards, config):
    uniform = jnp.full(logits.shape[0], 0.5)
    return sampler.draw_tokens(logits, config, lambda: uniform, shards)

  return {
    name: collectives.find(
      jax.jit(draw, static_argnums=(1, 2))
      .lower(logits, shards, config)
      .compile()
      .as_text(),
      1,
    )
    for name, shards, config in (
      ('as if on one device', 1, sampler.ANCESTRAL),
      ('drawn', 4, sampler.ANCESTRAL),
      ('with cut-offs', 4, sampler.SamplerConfig(min_p=0.1, epsilon=1e-3)),
      ('greedy', 4, sampler.GREEDY),
    )
  }


@pytest.fixture(scope='module')
def of_draw():
  return tiny.on_simulated_devices(8, __name__, drawing.__name__)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['drawn', 'with cut-offs', 'greedy'])
def test_a_draw_from_a_sharded_vocabulary_exchanges_numbers_of_rows(
  of_draw, how
):
  row_of_logits = 4 * 1024 * 3 / 4

  assert max(one.received for one in of_draw['as if on one device']) > (
    row_of_logits
  )
  assert sum(one.received for one in of_draw[how]) < 0.2 * row_of_logits


@pytest.mark.slow
def test_parameters_spread_over_model_are_not_gathered(of_step):
  over_model = of_step['over model']

  received = sum(gathered(over_model['found'], x) for x in (True, False))

  assert received < 0.1 * over_model['teacher']
