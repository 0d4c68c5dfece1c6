# SPDX-License-Identifier: Apache-2.0
"""Sums of gradients over the microbatches of a step, and over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gkd_jax.batch import split_rows

Tree = Any


def sum_over_microbatches(
  function: Callable[[Tree, jax.Array | int], Tree],
  rows: Tree,
  num_microbatches: int,
  num_inputs: int,
) -> Tree:
  """Returns the sum of function(microbatch, i) over the microbatches.

  Args:
    function: (rows of a microbatch, its number) -> tree of arrays to sum.
    rows: tree of arrays [n * num_inputs, ...], with n outputs of each input.
    num_microbatches: number of parts.
    num_inputs: B.
  """
  if num_microbatches == 1:
    return function(rows, 0)
  parts = jax.tree.map(
    lambda x: split_rows(x, num_microbatches, x.shape[0] // num_inputs), rows
  )
  shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts), 0)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def add(total, part):
    i, rows = part
    return jax.tree.map(jnp.add, total, function(rows, i)), None

  total, _ = jax.lax.scan(add, zeros, (jnp.arange(num_microbatches), parts))
  return total


def sum_over_devices(
  function: Callable[..., tuple[Tree, Tree]],
  rows: Tree,
  *others: Tree,
  mesh: jax.sharding.Mesh,
  specs: Tree,
) -> tuple[Tree, Tree]:
  """Sums what each device computes from its rows, after `function` is done.

  Without it, XLA sums gradients over the devices wherever a product contracts
  the rows, which within a loop is once for each iteration.

  Args:
    function: (rows, *others) -> (gradients, other sums). It runs on the rows of
      one index of the mesh axis 'data', and must not draw random numbers that
      depend on the shape of its arrays.
    rows: tree of arrays whose first axis is sharded over 'data'.
    *others: trees of arrays that are replicated over 'data'.
    mesh: with the axes 'data' and 'model'.
    specs: the sharding of the gradients.

  Returns:
    The sums over all rows, the gradients sharded as `specs` says.
  """

  def of_device(rows, *others):
    gradients, sums = function(rows, *others)
    return jax.tree.map(_reduce, gradients, specs), jax.lax.psum(sums, 'data')

  return jax.shard_map(
    of_device,
    mesh=mesh,
    in_specs=(PartitionSpec('data'), *(PartitionSpec() for _ in others)),
    out_specs=(jax.tree.map(_over_data_alone, specs), PartitionSpec()),
    # XLA shards the rest, over 'model', as it does outside.
    axis_names={'data'},
    check_vma=False,
  )(rows, *others)


def _reduce(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
  if 'data' in spec:
    return jax.lax.psum_scatter(
      gradient, 'data', scatter_dimension=spec.index('data'), tiled=True
    )
  return jax.lax.psum(gradient, 'data')


def _over_data_alone(spec: PartitionSpec) -> PartitionSpec:
  return PartitionSpec(*(axis if axis == 'data' else None for axis in spec))
