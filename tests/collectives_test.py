# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (a line of HLO is a line)
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax import collectives, partitioning
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


def test_a_loop_of_unknown_length_is_one_that_samples(found):
  (one,) = found['permute_in_loop_of_unknown_length']

  assert (one.kind, one.times) == ('collective-permute', 7)
  assert one.in_decode_loop
  assert one.received == PART


def test_a_program_without_has_none(found):
  assert found['nothing'] == []


# As libtpu writes them.
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


def test_groups_may_be_axes_of_a_mesh():
  (one,) = collectives.find(MESH_GROUPS, 7)

  assert one.received == 3 * 4 * 8 * 2
  assert one.op_name == 'jit(f)/teacher/mul'


def test_one_that_is_started_and_waited_for_counts_once():
  (one,) = collectives.find(STARTED, 7)

  assert (one.kind, one.received) == ('all-gather', 3 * 4 * 4)


def test_a_loop_that_was_unrolled_runs_less_often():
  assert [one.times for one in collectives.find(UNROLLED, 7)] == [5, 5]


def test_the_parts_of_one_in_a_loop_beside_it_are_one():
  parts = UNROLLED.replace('channel_id=2', 'channel_id=1').replace(
    'ROOT %w',
    '%b = f32[4]{0} all-reduce(%a), channel_id=1, '
    'replica_groups={{0,1},{2,3}}, to_apply=%sum\n  ROOT %w',
  )

  assert [one.times for one in collectives.find(parts, 7)] == [1]
