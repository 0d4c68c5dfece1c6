# SPDX-License-Identifier: Apache-2.0
"""Parameters of any model: initialization, shapes, names and axes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax.models.interface import Model, Params


def init_params(model: Model, rng: jax.Array) -> Params:
  """Returns random float32 parameters, with T5X's names and initializers."""
  return nn.unbox(_boxed_params(model, rng))


def logical_axes(model: Model) -> Params:
  """Returns, for each parameter, the names of its axes: a PartitionSpec."""
  return nn.get_partition_spec(_boxed_shapes(model))


def abstract_params(model: Model) -> Params:
  """Returns shape, dtype and sharding of each parameter; allocates nothing.

  Args:
    model: with a placement.

  Raises:
    ValueError: the mesh does not divide an axis of a parameter.
  """
  shapes = jax.eval_shape(nn.unbox, _boxed_shapes(model))
  shardings = model.placement.shardings(logical_axes(model))
  named_shardings = named_params(shardings)
  for name, x in named_params(shapes).items():
    try:
      named_shardings[name].shard_shape(x.shape)
    except ValueError as e:
      mesh = model.placement.mesh.shape
      raise ValueError(
        f'experiment.MeshConfig.model {mesh["model"]} does not divide {name} '
        f'of shape {x.shape}: it must divide heads, feed-forward width and '
        'vocabulary of student and teacher. (With parameter_partitioning_dims '
        f'= 2 the data axis, {mesh["data"]} here, must divide the width; with '
        '= 0 the model is replicated on every device.)'
      ) from e
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


@functools.lru_cache(maxsize=32)
def _boxed_shapes(model: Model) -> Params:
  """Returns the abstract result of `_boxed_params`: traced once a process."""
  return jax.eval_shape(lambda: _boxed_params(model, jax.random.key(0)))


def _boxed_params(model: Model, rng: jax.Array) -> Params:
  one_token = jnp.ones((1, 1), jnp.int32)
  return model.init(rng, one_token, one_token)['params']


def named_params(params: Params) -> dict[str, Any]:
  """Returns {'encoder/layers_0/mlp/wo/kernel': leaf} of a tree."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def param_shapes(model: Model) -> dict[str, tuple[int, ...]]:
  """Returns {name: shape} of all parameters of a model; allocates nothing."""
  abstract = jax.eval_shape(nn.unbox, _boxed_shapes(model))
  return {name: x.shape for name, x in named_params(abstract).items()}


def count_params(params: Params) -> int:
  """Returns the number of parameters."""
  return sum(x.size for x in jax.tree.leaves(params))
