# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from gkd_jax.checkpoints import checkpoint
from gkd_jax.checkpoints.formats import tensors
from gkd_jax.checkpoints.formats.tensors import Tensor
from gkd_jax.models.params import abstract_params
from gkd_jax.models.t5 import T5
from gkd_jax.parallel import partitioning
from tests import tiny

ARRAY = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
PART = (slice(0, 2), slice(1, 3), slice(2, 4))


def recorded(array, indices):
  """A tensor that records the slices that are read."""

  def read(index):
    indices.append(index)
    return array[index]

  return Tensor(array.shape, array.dtype, read)


@pytest.mark.parametrize(
  'view, array',
  [
    (tensors.in_memory(ARRAY), ARRAY),
    (tensors.transposed(tensors.in_memory(ARRAY[0])), ARRAY[0].T),
    (tensors.entry(tensors.in_memory(ARRAY), 1, 2), ARRAY[:, 2]),
  ],
)
def test_a_view_reads_as_the_array_it_stands_for(view, array):
  part = tuple(slice(1, n) for n in array.shape)

  assert view.shape == array.shape
  np.testing.assert_array_equal(tensors.read_all(view), array)
  np.testing.assert_array_equal(view.read(part), array[part])


def test_a_transpose_reads_no_more_than_is_asked_for():
  indices = []

  tensors.transposed(recorded(ARRAY[0], indices)).read(
    (slice(2, 4), slice(0, 1))
  )

  assert indices == [(slice(0, 1), slice(2, 4))]


def test_an_entry_reads_itself_alone():
  indices = []

  tensors.entry(recorded(ARRAY, indices), 1, 2).read((slice(0, 1), slice(0, 4)))

  assert indices == [(slice(0, 1), slice(2, 3), slice(0, 4))]


def test_each_device_reads_its_own_part_and_no_more():
  read, same = tiny.on_simulated_devices(
    8, __name__, place_on_two_devices.__name__
  )

  assert same
  # An MLP of 20 units, 10 on each device; its other axis is whole.
  assert read['encoder/layers_0/mlp/wo/kernel'] == [
    ((0, 10), (0, 16)),
    ((10, 20), (0, 16)),
  ]


def place_on_two_devices():
  """Returns the slices that were read of each array, and checks the values."""
  mesh = partitioning.make_mesh(1, 2, devices=jax.devices()[:2])
  placement = partitioning.Placement(mesh)
  model = T5(tiny.config(), placement)
  abstract = abstract_params(model)
  params = tiny.params(model, 0)
  indices = {name: [] for name in checkpoint.shapes(params)}
  leaves = zip(indices, jax.tree.leaves(params), strict=True)
  placed = tensors.place(
    {n: recorded(np.asarray(x), indices[n]) for n, x in leaves}, abstract
  )
  same = jax.tree.map(lambda x, y: bool((x == y).all()), placed, params)
  read = {
    name: sorted(tuple((s.start, s.stop) for s in index) for index in parts)
    for name, parts in indices.items()
  }
  return read, all(jax.tree.leaves(same))
