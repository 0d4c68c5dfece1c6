# SPDX-License-Identifier: Apache-2.0
"""One device mesh for student and teacher, and who holds which part of what.

A model names the axes of its parameters and activations; the rules of its
`Placement` map those names to mesh axes; XLA inserts the communication. Teacher
and student share the mesh, each under rules of its own.

Source: T5X, `t5x/partitioning.py`, standard_logical_axis_rules.
"""

import itertools
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
    data: devices a batch is spread over; -1 takes all there are.
    model: devices a parameter is spread over.
    devices: that there are; None: those of this run, on all hosts.

  Raises:
    ValueError: the two do not multiply to the number of devices.
  """
  if devices is None:
    devices = jax.devices()
  num_devices = len(devices)
  if data == -1 and model > 0:
    data = num_devices // model
  if data * model != num_devices or data < 1:
    raise ValueError(
      f'A mesh of data={data} x model={model} does not use the '
      f'{num_devices} devices there are. Set data=-1 and model to a divisor of '
      f'{num_devices}.'
    )
  return Mesh(np.asarray(devices).reshape(data, model), ('data', 'model'))


def cpu_mesh() -> Mesh:
  """Returns a mesh of the host's CPU alone, for what needs no accelerator."""
  devices = np.asarray(jax.devices('cpu')[:1]).reshape(1, 1)
  return Mesh(devices, ('data', 'model'))


def standard_logical_axis_rules(
  parameter_partitioning_dims: int = 1, activation_partitioning_dims: int = 1
) -> AxisRules:
  """Returns T5X's rules; of two for a name, the first that is free holds.

  Args:
    parameter_partitioning_dims: 1 spreads parameters over 'model'; 2 over
      'data', too, at rest: who uses them gathers them. 0, which T5X has not,
      leaves them, and all that is computed with them, whole on every device of
      'model'.
    activation_partitioning_dims: 1 spreads activations over 'data'; 2 the
      hidden states between the layers over 'model', too.

  Raises:
    ValueError: there are no such rules.
  """
  dims = (parameter_partitioning_dims, activation_partitioning_dims)
  if dims not in ((0, 1), (1, 1), (1, 2), (2, 1), (2, 2)):
    raise ValueError(
      'parameter_partitioning_dims must be 1 or 2, or 0, and '
      'activation_partitioning_dims 1 or 2 (with 0 only 1); got '
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
  """Which devices hold which part of a model's arrays.

  Attributes:
    mesh: of all devices.
    rules: names of axes -> axes of the mesh.
  """

  mesh: Mesh
  rules: AxisRules = STANDARD_RULES

  def sharding(self, *axes: str | None) -> NamedSharding:
    """Returns where an array with axes of these names lies."""
    return NamedSharding(self.mesh, nn.logical_to_mesh_axes(axes, self.rules))

  def shardings(self, logical_axes: Any) -> Any:
    """Returns where arrays lie, given the names of their axes: a tree."""
    return nn.logical_to_mesh_sharding(logical_axes, self.mesh, self.rules)

  def num_shards(self, axis: str) -> int:
    """Returns over how many devices an axis of this name is spread."""
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
  """Returns x with a constraint on its sharding, if there is a placement.

  Args:
    x: an activation.
    placement: of its model.
    axes: the names of its axes.
  """
  if placement is None or placement.mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, placement.sharding(*axes))


def shard_as_params(tree: Any, params: Any, mesh: Mesh) -> Any:
  """Returns an abstract tree with a sharding at each leaf.

  What belongs to a parameter and has its shape, such as AdamW's moments, lies
  as the parameter does: its path ends with the parameter's. Every device has
  all of the rest, which is small: counts, Adafactor's rows and columns.

  Args:
    tree: shapes and dtypes.
    params: abstract parameters, with their shardings.
    mesh: that these lie on.
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
  """Rows of a batch are spread over 'data'."""
  return NamedSharding(mesh, PartitionSpec('data'))


def check_rows_divide(setting: str, batch_size: int, mesh: Mesh) -> None:
  """Raises ValueError if the devices would not get equally many rows."""
  spread = mesh.shape['data']
  if batch_size % spread:
    raise ValueError(
      f'{setting} {batch_size} must be divisible by the {spread} devices of '
      'the data axis.'
    )


def rows_of_host(batch_size: int, mesh: Mesh) -> tuple[int, int]:
  """Returns which rows of a batch this host's devices hold: (first, end).

  Raises:
    ValueError: there are others between them.
  """
  parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  spans = sorted({rows.indices(batch_size)[:2] for (rows,) in parts.values()})
  if any(end != start for (_, end), (start, _) in itertools.pairwise(spans)):
    raise ValueError(
      f'The rows of a batch on the devices of host {jax.process_index()} are '
      f'not one after the other: {spans}. Choose '
      'experiment.MeshConfig.model so that it divides the devices of a host, '
      'or is a multiple of their number.'
    )
  return spans[0][0], spans[-1][1]


def is_first_host_of_rows(batch_size: int, mesh: Mesh) -> bool:
  """Whether no host before this one holds the same rows of a batch."""
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
  """Places this host's rows of a batch on its devices; does not wait.

  Args:
    batch: arrays of these rows.
    mesh: of all devices.
    batch_size: rows of all hosts.
  """
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      sharding, x, (batch_size, *x.shape[1:])
    ),
    batch,
  )


def put_global_batch(batch: Any, mesh: Mesh) -> Any:
  """Places a batch that every host has all rows of; does not wait."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(
      x.shape, sharding, lambda index: x[index]
    ),
    batch,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device, hence every host, has all of it."""
  return NamedSharding(mesh, PartitionSpec())
