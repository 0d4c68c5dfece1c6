# SPDX-License-Identifier: Apache-2.0
"""Runs a stack of equal layers unrolled, as a loop, rematerialized or in
microbatches; names, stacks and gathers its parameters.

A stack is a Flax module, an encoder or a decoder, with `config`, `placement`
and `layers`, made by `make_layers`. A layer is a Flax module called as

    layer(x, deterministic, **arguments)

with x [B, L, D] and arguments that are arrays or None. All ways to run a stack
use the same parameters with the same names.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax.batch import merge_rows, split_rows
from gkd_jax.models.interface import Model, ModelConfig, Params
from gkd_jax.models.params import logical_axes
from gkd_jax.parallel import partitioning

# The stacks of an encoder-decoder, by their name in the parameters.
_STACKS = ('encoder', 'decoder')
# In each stack, layers are named `layers_<i>`, or `layers` if they are stacked.
_LAYER, _STACKED = 'layers_', 'layers'
_DETERMINISTIC = 2  # position of this argument, after self and x

Arguments = Mapping[str, jax.Array | None]


def make_layers(
  layer_class: type[nn.Module], config: ModelConfig, num_layers: int
) -> list[nn.Module]:
  """Returns the layers, for a stack's `setup` to assign to `self.layers`."""
  if config.remat:
    layer_class = nn.remat(layer_class, static_argnums=(_DETERMINISTIC,))
  return [layer_class(config) for _ in range(num_layers)]


def constrain(
  x_BLD: jax.Array, placement: partitioning.Placement | None
) -> jax.Array:
  """Returns hidden states with a constraint on their sharding."""
  return partitioning.constrain(x_BLD, placement, 'batch', 'length', 'embed')


def run_layers(
  stack: nn.Module,
  layer_class: type[nn.Module],
  x_BLD: jax.Array,
  deterministic: bool,
  *,
  per_row: Arguments,
  shared: Arguments,
  per_layer: Arguments | None = None,
  num_microbatches: int = 1,
) -> jax.Array:
  """Runs the layers of an encoder or decoder on x.

  Args:
    stack: with the layers.
    layer_class: the class of its layers.
    x_BLD: [B, L, D].
    deterministic: False applies dropout.
    per_row: arguments of every layer whose first axis is the batch.
    shared: arguments of every layer that all rows share.
    per_layer: arguments whose first axis is that of the layers.
    num_microbatches: each layer loops over this many parts of the batch. Must
      be 1 with dropout.

  Returns:
    [B, L, D].
  """
  c = stack.config
  x = constrain(x_BLD, stack.placement)
  per_layer = per_layer or {}
  is_loop = c.scan_layers and stack.layers
  if stack.is_initializing() or not (is_loop or num_microbatches > 1):
    for i, layer in enumerate(stack.layers):
      own = _of_layer(per_layer, i)
      x = layer(x, deterministic, **per_row, **shared, **own)
      x = constrain(x, stack.placement)
    return x

  def run_layer(x, layer):
    params, rng, own = layer
    x = layer_class(c, parent=None).apply(
      {'params': params},
      x,
      deterministic,
      **per_row,
      **shared,
      **own,
      rngs=None if rng is None else {'dropout': rng},
    )
    return constrain(x, stack.placement), None

  if num_microbatches > 1:
    assert c.dropout_rate == 0.0 or deterministic
    run_layer = _in_microbatches(
      stack, layer_class, x, per_row, shared, num_microbatches
    )
    x = split_rows(x, num_microbatches)
  elif c.remat:
    run_layer = jax.checkpoint(run_layer, prevent_cse=False)

  if is_loop:
    params = stack.variables['params'].get(_STACKED)
    if params is None:
      # State and optimizer keep one entry per layer, like T5X's checkpoints.
      each, _ = _split_layers(stack.variables['params'])
      params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    rngs = None
    if c.dropout_rate > 0.0 and not deterministic:
      rngs = jax.random.split(stack.make_rng('dropout'), len(stack.layers))
    x, _ = jax.lax.scan(run_layer, x, (params, rngs, per_layer))
  else:
    for i, layer in enumerate(stack.layers):
      own = _of_layer(per_layer, i)
      x, _ = run_layer(x, (layer.variables['params'], None, own))
  return x if num_microbatches == 1 else merge_rows(x)


def _of_layer(per_layer: Arguments, i: int) -> Arguments:
  return {name: x[i] for name, x in per_layer.items()}


def _in_microbatches(
  stack, layer_class, x_BLD, per_row, shared, num_microbatches
):
  """Returns a function that runs a layer on all microbatches, for `scan`.

  It maps (x, (params, None, own arguments)) to (x, None), with x
  [microbatches, rows, L, D]. A layer's parameters are gathered once for all
  microbatches.
  """
  placement = stack.placement
  layer = layer_class(stack.config, parent=None)
  parts = {
    name: split_rows(x, num_microbatches)
    for name, x in per_row.items()
    if x is not None
  }

  def run_layer(x, layer_params):
    params, _, own = layer_params
    if placement is not None and placement.shards_params_over_data:
      boxed = jax.eval_shape(
        lambda: layer.init(
          jax.random.key(0), x_BLD, True, **per_row, **shared, **own
        )['params']
      )
      params = jax.lax.with_sharding_constraint(
        params,
        placement.replicated_over_data().shardings(
          nn.get_partition_spec(boxed)
        ),
      )

    def run_microbatch(microbatch):
      x, rows = microbatch
      x = layer.apply(
        {'params': params}, x, True, **{**per_row, **rows}, **shared, **own
      )
      return constrain(x, placement)

    return jax.lax.map(run_microbatch, (x, parts)), None

  return run_layer


def stack_layers(params: Params) -> Params:
  """Returns parameters stacked for a model with `scan_layers`.

  The layers of the encoder become one tree of arrays [layers, ...], named
  'layers', and likewise those of the decoder. If they are not stacked here, the
  compiled program stacks them and holds a second copy of the weights.

  Args:
    params: of a model: arrays, which are deleted one by one to save memory, or
      shapes with shardings.
  """

  def stack(*leaves):
    mesh, spec = leaves[0].sharding.mesh, leaves[0].sharding.spec
    sharding = NamedSharding(mesh, PartitionSpec(None, *spec))
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
      shape = (len(leaves), *leaves[0].shape)
      return jax.ShapeDtypeStruct(shape, leaves[0].dtype, sharding=sharding)
    make = jax.jit(lambda *leaves: jnp.stack(leaves), out_shardings=sharding)
    stacked = jax.block_until_ready(make(*leaves))
    for leaf in leaves:
      leaf.delete()
    return stacked

  params = dict(params)
  for name in _STACKS:
    each, others = _split_layers(params[name])
    if each:
      params[name] = {**others, _STACKED: jax.tree.map(stack, *each)}
  return params


def param_specs(model: Model) -> Params:
  """Returns the sharding of each parameter, a `PartitionSpec`.

  See `interface.Model.param_specs`.
  """
  shardings = model.placement.shardings(logical_axes(model))
  return jax.tree.map(lambda sharding: sharding.spec, shardings)


def gather_params(model: Model, params: Params) -> Params:
  """Returns the parameters replicated over the mesh axis 'data'.

  See `interface.Model.gather_params`. It requires that the model rounds every
  matrix to `config.dtype` before it is used.
  """
  params = _unstack_layers(params)
  placement = model.placement
  if placement is None or not placement.shards_params_over_data:
    return params
  dtype = model.config.dtype

  def gather(x, sharding):
    # Vectors, the scales of norms, are multiplied in float32.
    sent = x.astype(dtype) if x.ndim > 1 else x
    return jax.lax.with_sharding_constraint(sent, sharding).astype(x.dtype)

  shardings = placement.replicated_over_data().shardings(logical_axes(model))
  return jax.tree.map(gather, params, shardings)


def _unstack_layers(params: Params) -> Params:
  """Returns parameters with one entry per layer, from either form."""
  params = dict(params)
  for name in _STACKS:
    others = dict(params[name])
    if stacked := others.pop(_STACKED, None):
      num = jax.tree.leaves(stacked)[0].shape[0]
      each = {
        f'{_LAYER}{i}': jax.tree.map(lambda x, i=i: x[i], stacked)
        for i in range(num)
      }
      params[name] = {**others, **each}
  return params


def _split_layers(stack_params: Params) -> tuple[list[Params], Params]:
  """Returns the layers of an encoder or decoder in order, and the others."""
  others, each = dict(stack_params), []
  while (layer := others.pop(f'{_LAYER}{len(each)}', None)) is not None:
    each.append(layer)
  return each, others
