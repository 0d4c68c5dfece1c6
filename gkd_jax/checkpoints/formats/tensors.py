# SPDX-License-Identifier: Apache-2.0
"""Arrays in files; each device reads only its own shard.

A format (`huggingface`, `t5x`) lists its arrays as `Tensor`s under our
parameters' names. Transposed and stacked arrays are views, so nothing is read
before `place`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gkd_jax.models.params import named_params

Params = Any
Index = tuple[slice, ...]


class Tensor(NamedTuple):
  """An array in a file."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray]  # one slice with bounds for each axis


def in_memory(array: np.ndarray) -> Tensor:
  """Wraps an array in memory."""
  return Tensor(array.shape, array.dtype, lambda index: array[index])


def transposed(tensor: Tensor) -> Tensor:
  """Returns the transpose of a matrix."""
  return Tensor(
    tensor.shape[::-1], tensor.dtype, lambda index: tensor.read(index[::-1]).T
  )


def entry(tensor: Tensor, axis: int, i: int) -> Tensor:
  """Returns the i-th of the arrays that are stacked along an axis."""

  def read(index):
    whole = (*index[:axis], slice(i, i + 1), *index[axis:])
    return tensor.read(whole).squeeze(axis)

  shape = (*tensor.shape[:axis], *tensor.shape[axis + 1 :])
  return Tensor(shape, tensor.dtype, read)


def read_all(tensor: Tensor) -> np.ndarray:
  """Returns the complete array."""
  return tensor.read(tuple(slice(0, n) for n in tensor.shape))


def equal(a: Tensor, b: Tensor) -> bool:
  """Whether two arrays are equal; they are read in parts."""
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  rows = 4096  # of an embedding: two complete ones may not fit into memory
  rest = tuple(slice(0, n) for n in a.shape[1:])
  return all(
    np.array_equal(a.read(part), b.read(part))
    for start in range(0, a.shape[0], rows)
    for part in [(slice(start, min(start + rows, a.shape[0])), *rest)]
  )


def place(
  tensors: Mapping[str, Tensor],
  abstract_params: Params,
  dtype: str | None = 'float32',
) -> Params:
  """Reads arrays onto the devices.

  Each device's shard is read separately, so no host holds a sharded model in
  full.

  Args:
    tensors: {'encoder/layers_0/mlp/wo/kernel': ...}, with the names and shapes
      of the parameters.
    abstract_params: the tree of parameters, with shapes and shardings.
    dtype: of the result; None: that of the file.
  """
  wanted = named_params(abstract_params)
  # In the order of the files: layers that are stacked in one array share its
  # compressed chunks.
  placed = {
    name: _place(tensor, wanted[name].sharding, dtype)
    for name, tensor in tensors.items()
  }
  return jax.tree.unflatten(
    jax.tree.structure(abstract_params), [placed[name] for name in wanted]
  )


def _place(tensor: Tensor, sharding: jax.sharding.Sharding, dtype: str | None):
  kept = np.dtype(dtype) if dtype else tensor.dtype

  def part(index):
    # JAX gives slice(None) for an axis that is not sharded.
    bounds = zip(index, tensor.shape, strict=True)
    return tensor.read(
      tuple(slice(*s.indices(n)[:2]) for s, n in bounds)
    ).astype(kept, copy=False)

  return jax.make_array_from_callback(tensor.shape, sharding, part, dtype=kept)
