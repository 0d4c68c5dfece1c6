# SPDX-License-Identifier: Apache-2.0
"""One device mesh for student and teacher, and who holds which part of what.

The model names the axes of its parameters (`model.logical_axes`); the rules
map those names to mesh axes; XLA inserts the communication.

Source: T5X, `t5x/partitioning.py`, standard_logical_axis_rules.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AxisRules = Sequence[tuple[str, str | None]]


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


def host_mesh() -> Mesh:
  """Returns a mesh of the host's CPU alone, for what needs no accelerator."""
  devices = np.asarray(jax.devices('cpu')[:1]).reshape(1, 1)
  return Mesh(devices, ('data', 'model'))


def standard_logical_axis_rules() -> AxisRules:
  """Returns T5X's rules: parameters over 'model', activations over 'data'."""
  return (
    ('batch', 'data'),
    ('vocab', 'model'),
    ('embed', None),
    ('mlp', 'model'),
    ('heads', 'model'),
    ('kv', None),
    ('joined_kv', 'model'),
    ('relpos_buckets', None),
    ('length', None),
  )


def param_shardings(
  mesh: Mesh, logical_axes: Any, rules: AxisRules | None = None
) -> Any:
  """Returns the sharding of each parameter, given the names of its axes."""
  return nn.logical_to_mesh_sharding(
    logical_axes, mesh, rules or standard_logical_axis_rules()
  )


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
  everywhere = NamedSharding(mesh, PartitionSpec())

  def place(path, leaf):
    suffixes = (path[start:] for start in range(len(path)))
    param = next((param_at[s] for s in suffixes if s in param_at), None)
    own = param is not None and param.shape == leaf.shape
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=param.sharding if own else everywhere
    )

  return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch are spread over 'data'."""
  return NamedSharding(mesh, PartitionSpec('data'))


def check_spread(setting: str, batch_size: int, mesh: Mesh) -> None:
  """Raises ValueError if the devices would not get equally many rows."""
  spread = mesh.shape['data']
  if batch_size % spread:
    raise ValueError(
      f'{setting} {batch_size} must be divisible by the {spread} devices of '
      'the data axis.'
    )


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Places this host's rows of a batch on its devices; does not wait."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
