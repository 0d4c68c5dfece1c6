# SPDX-License-Identifier: Apache-2.0
"""One device mesh for student and teacher, and the sharding of their arrays.

A model names the axes of its parameters and activations. The rules of its
`Placement` map these logical axes to mesh axes, and XLA inserts the
communication. Teacher and student share the mesh, but have different rules.

Source: T5X, `t5x/partitioning.py`, standard_logical_axis_rules.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AxisRules = tuple[tuple[str, str | None], ...]


def make_mesh(
  data: int = -1,
  model: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns a mesh of all devices with the axes 'data' and 'model'.

  Args:
    data: number of devices that a batch is sharded over; -1: all devices,
      divided by `model`.
    model: number of devices that a parameter is sharded over.
    devices: None: the devices of this run, on all hosts.

  Raises:
    ValueError: data x model is not the number of devices.
  """
  if devices is None:
    devices = available_devices()
  num_devices = len(devices)
  if data == -1 and model > 0:
    data = num_devices // model
  if data * model != num_devices or data < 1:
    raise ValueError(
      f'A mesh of data={data} x model={model} does not match the '
      f'{num_devices} devices of this run. Set data=-1 and model to a divisor '
      f'of {num_devices}.'
    )
  return Mesh(np.asarray(devices).reshape(data, model), ('data', 'model'))


def available_devices(platform: str | None = None) -> list[jax.Device]:
  """Returns the devices of all hosts.

  Args:
    platform: e.g. 'cpu'; None: JAX's default.

  Raises:
    ValueError: there are none.
  """
  try:
    return jax.devices(platform)
  except (RuntimeError, AssertionError) as e:  # JAX raises both
    chosen = os.environ.get('JAX_PLATFORMS')
    raise ValueError(
      f'JAX finds no {platform or chosen or ""} devices'.replace('  ', ' ')
      + (f': {e}'.rstrip('.') if str(e) else '')
      + '.'
      + (
        f' JAX_PLATFORMS is {chosen}: unset it, or set it to the devices of '
        'this machine, e.g. cpu.'
        if chosen
        else ''
      )
    ) from e


def cpu_mesh() -> Mesh:
  """Returns a mesh of one CPU device, for work that needs no accelerator."""
  devices = np.asarray(available_devices('cpu')[:1]).reshape(1, 1)
  return Mesh(devices, ('data', 'model'))


def standard_logical_axis_rules(
  parameter_partitioning_dims: int = 1, activation_partitioning_dims: int = 1
) -> AxisRules:
  """Returns T5X's rules: (logical axis, mesh axis).

  If a logical axis has several rules, flax applies the first one whose mesh
  axis the array does not use yet.

  Args:
    parameter_partitioning_dims: 1 shards parameters over 'model'. 2 shards
      them over 'data' as well (FSDP); each layer gathers its parameters before
      use. 0, which T5X does not have, replicates parameters and computation
      over 'model'.
    activation_partitioning_dims: 1 shards activations over 'data'. 2 shards
      the hidden states between layers over 'model' as well.

  Raises:
    ValueError: the combination is not supported.
  """
  dims = (parameter_partitioning_dims, activation_partitioning_dims)
  if dims not in ((0, 1), (1, 1), (1, 2), (2, 1), (2, 2)):
    raise ValueError(
      'parameter_partitioning_dims must be 0, 1 or 2; '
      'activation_partitioning_dims must be 1 or 2, and 1 if '
      'parameter_partitioning_dims is 0. Got '
      f'{parameter_partitioning_dims!r} and {activation_partitioning_dims!r}.'
    )
  model = 'model' if parameter_partitioning_dims else None
  embed: AxisRules = (('embed', None),)
  if parameter_partitioning_dims == 2:
    embed = (('embed', 'data'), *embed)
  if activation_partitioning_dims == 2:
    embed = (('embed', 'model'), *embed)
  return (
    ('batch', 'data'),
    ('vocab', model),
    ('mlp', model),
    ('heads', model),
    ('kv', None),
    ('joined_kv', model),
    *embed,
    ('relpos_buckets', None),
    ('length', None),
  )


STANDARD_RULES = standard_logical_axis_rules()


class Placement(NamedTuple):
  """How a model's arrays are sharded.

  Attributes:
    mesh: of all devices.
    rules: (logical axis, mesh axis); see `standard_logical_axis_rules`.
  """

  mesh: Mesh
  rules: AxisRules = STANDARD_RULES

  def sharding(self, *axes: str | None) -> NamedSharding:
    """Returns the sharding of an array with these logical axes."""
    return NamedSharding(self.mesh, nn.logical_to_mesh_axes(axes, self.rules))

  def shardings(self, logical_axes: Any) -> Any:
    """Returns the shardings of a tree of arrays, given their logical axes."""
    return nn.logical_to_mesh_sharding(logical_axes, self.mesh, self.rules)

  def num_shards(self, axis: str) -> int:
    """Returns the number of shards of a logical axis."""
    (over,) = self.sharding(axis).spec
    return 1 if over is None else self.mesh.shape[over]

  @property
  def shards_params_over_data(self) -> bool:
    return ('embed', 'data') in self.rules and self.mesh.shape['data'] > 1

  def replicated_over_data(self) -> 'Placement':
    """Returns this placement with parameters replicated over 'data'."""
    rules = (rule for rule in self.rules if rule != ('embed', 'data'))
    return self._replace(rules=tuple(rules))


def constrain(
  x: jax.Array, placement: Placement | None, *axes: str | None
) -> jax.Array:
  """Constrains the sharding of an activation; does nothing on one device.

  Args:
    x: an activation.
    placement: of its model; None: no constraint.
    axes: the logical axes of x.
  """
  if placement is None or placement.mesh.size == 1:
    return x
  sharding = placement.sharding(*axes)
  here = jax.sharding.get_abstract_mesh()
  if here.manual_axes:  # within a shard_map: XLA shards the other axes alone
    spec = (None if a in here.manual_axes else a for a in sharding.spec)
    sharding = NamedSharding(here, PartitionSpec(*spec))
  return jax.lax.with_sharding_constraint(x, sharding)


def shard_as_params(tree: Any, params: Any, mesh: Mesh) -> Any:
  """Adds a sharding to each leaf of an abstract tree.

  A leaf that has the shape of a parameter, and whose path ends with the
  parameter's path, is sharded like the parameter, such as AdamW's moments. All
  other leaves are small and replicated: counts, Adafactor's row and column
  statistics.

  Args:
    tree: shapes and dtypes.
    params: abstract parameters with their shardings.
    mesh: of these shardings.
  """
  param_at = dict(jax.tree_util.tree_leaves_with_path(params))

  def place(path, leaf):
    suffixes = (path[start:] for start in range(len(path)))
    param = next((param_at[s] for s in suffixes if s in param_at), None)
    own = param is not None and param.shape == leaf.shape
    sharding = param.sharding if own else replicated(mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: rows over 'data'."""
  return NamedSharding(mesh, PartitionSpec('data'))


def check_rows_divide(setting: str, batch_size: int, mesh: Mesh) -> None:
  """Raises ValueError unless the data axis divides a batch."""
  num_shards = mesh.shape['data']
  if batch_size % num_shards:
    raise ValueError(
      f'{setting} {batch_size} must be divisible by the {num_shards} devices '
      'of the data axis.'
    )


def rows_of_host(batch_size: int, mesh: Mesh) -> tuple[int, int]:
  """Returns the rows of a batch that this host's devices hold: [first, end).

  Raises:
    ValueError: these rows are not contiguous.
  """
  parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  spans = sorted({rows.indices(batch_size)[:2] for (rows,) in parts.values()})
  if any(end != start for (_, end), (start, _) in itertools.pairwise(spans)):
    raise ValueError(
      f'The rows of a batch on the devices of host {jax.process_index()} are '
      f'not contiguous: {spans}. Set experiment.MeshConfig.model to a divisor '
      'or a multiple of the number of devices per host.'
    )
  return spans[0][0], spans[-1][1]


def is_first_host_of_rows(batch_size: int, mesh: Mesh) -> bool:
  """Whether this is the first of the hosts that hold the same rows."""
  parts = batch_sharding(mesh).devices_indices_map((batch_size,))
  own = jax.process_index()
  rows = {
    rows.indices(batch_size)[:2]
    for device, (rows,) in parts.items()
    if device.process_index == own
  }
  return own == min(
    device.process_index
    for device, (other,) in parts.items()
    if other.indices(batch_size)[:2] in rows
  )


def put_batch(batch: Any, mesh: Mesh, batch_size: int) -> Any:
  """Copies this host's rows of a batch to its devices, asynchronously.

  Args:
    batch: arrays of this host's rows.
    mesh: of all devices.
    batch_size: number of rows on all hosts.
  """
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      sharding, x, (batch_size, *x.shape[1:])
    ),
    batch,
  )


def put_global_batch(batch: Any, mesh: Mesh) -> Any:
  """Shards a batch of which every host has all rows, asynchronously."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      x.shape, sharding, lambda index: x[index]
    ),
    batch,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device has in full."""
  return NamedSharding(mesh, PartitionSpec())
