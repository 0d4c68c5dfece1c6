# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gkd_jax.models import layer_stack
from gkd_jax.models.layer_stack import stack_layers
from gkd_jax.models.params import init_params
from gkd_jax.models.t5 import T5
from gkd_jax.parallel import partitioning
from tests import tiny

pytestmark = pytest.mark.slow  # compiles models

# Unequal, so that layers mixed up would show.
DEPTHS = {'num_encoder_layers': 2, 'num_decoder_layers': 3}


@pytest.mark.parametrize(
  'changes',
  [{'remat': True, 'relpos_bias_per_layer': True}, {'version': '1.0'}],
  ids=str,
)
def test_layers_in_a_loop_change_neither_values_nor_gradients(changes):
  depths = {'num_encoder_layers': 3, 'num_decoder_layers': 2}
  plain, params = tiny.model_and_params(0, **depths, **changes)
  scanned = T5(tiny.config(scan_layers=True, **depths, **changes))
  inputs, targets = tiny.tokens(1, [7, 5], 7), tiny.tokens(2, [6, 6], 6)

  def loss(model, params):
    logits = model.apply({'params': params}, inputs, targets)
    return jnp.mean(jnp.square(logits))

  traces = [
    jax.jit(jax.value_and_grad(functools.partial(loss, model))).trace(params)
    for model in (scanned, plain)
  ]

  in_loop, unrolled = (str(x.jaxpr).count('dot_general') for x in traces)
  assert in_loop < 0.6 * unrolled
  tiny.assert_equal_but_for_rounding(
    *(x.lower().compile()(params) for x in traces)
  )


@pytest.fixture
def stacked():
  """A model with scan_layers, its parameters, and the stacked parameters."""
  depths = {'num_encoder_layers': 3, 'num_decoder_layers': 2}
  model, params = tiny.model_and_params(0, scan_layers=True, **depths)
  mesh = partitioning.make_mesh(devices=jax.devices()[:1])
  everywhere = partitioning.replicated(mesh)
  copies = jax.tree.map(lambda x: jax.device_put(x + 0.0, everywhere), params)
  return model, params, copies, stack_layers(copies)


def test_stacked_layers_give_what_each_layer_gives(stacked):
  model, params, _, stacked_params = stacked
  inputs, targets = tiny.tokens(1, [7, 5], 7), tiny.tokens(2, [6, 6], 6)

  def logits(params):
    return model.apply({'params': params}, inputs, targets)

  np.testing.assert_array_equal(
    jax.jit(logits)(stacked_params), jax.jit(logits)(params)
  )


def test_gather_params_unstacks_layers(stacked):
  model, params, _, stacked_params = stacked

  again = model.gather_params(stacked_params)

  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_what_is_multiplied_in_bfloat16_is_gathered_in_bfloat16():
  placement = partitioning.Placement(
    jax.sharding.AbstractMesh((2, 1), ('data', 'model')),
    partitioning.standard_logical_axis_rules(2),
  )
  model = T5(tiny.config(dtype='bfloat16'), placement)
  params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

  program = jax.make_jaxpr(model.gather_params)(params)

  sent = [
    eqn.invars[0].aval
    for eqn in program.eqns
    if eqn.primitive.name == 'sharding_constraint'
  ]
  assert len(sent) == len(jax.tree.leaves(params))
  # The scales of the norms are multiplied in float32.
  assert {(x.ndim, x.dtype.name) for x in sent} == {
    (1, 'float32'),
    (2, 'bfloat16'),
  }
  assert {x.dtype.name for x in program.out_avals} == {'float32'}


def test_stacking_deletes_the_layers(stacked):
  _, _, given, stacked_params = stacked

  assert given['encoder']['layers_1']['mlp']['wo']['kernel'].is_deleted()
  stacked_kernel = stacked_params['encoder']['layers']['mlp']['wo']['kernel']
  assert stacked_kernel.shape[0] == 3


def test_a_program_keeps_no_second_copy_of_stacked_layers(stacked):
  model, params, _, stacked_params = stacked
  inputs = tiny.tokens(1, [1], 1)

  def temporaries(params):
    def encode(params):
      return model.apply({'params': params}, inputs, method='encode')

    compiled = tiny.jit_as_users_do(encode).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  layer = stacked_params['encoder']['layers']
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(layer))
  assert temporaries(params) > num_bytes
  assert temporaries(stacked_params) < num_bytes


@pytest.mark.parametrize(
  ('scan_layers', 'changes'),
  [(False, {}), (True, {'relpos_bias_per_layer': True})],
)
def test_microbatches_give_what_the_whole_batch_gives(scan_layers, changes):
  model, params = tiny.model_and_params(
    0, scan_layers=scan_layers, **DEPTHS, **changes
  )
  inputs = tiny.tokens(1, [7, 5, 3, 6, 2, 7], 7)
  targets = tiny.tokens(2, [6, 1, 5, 6, 4, 2], 6)

  def encoded_and_hidden(**keywords):
    apply = functools.partial(model.apply, {'params': params}, **keywords)
    encoded = apply(inputs, method='encode')
    return encoded, apply(encoded, inputs, targets, method='decode')

  microbatches = jax.jit(
    functools.partial(encoded_and_hidden, num_microbatches=3)
  )()
  tiny.assert_equal_but_for_rounding(
    microbatches, jax.jit(encoded_and_hidden)()
  )


def test_layers_in_a_loop_have_dropout():
  model, params = tiny.model_and_params(0, scan_layers=True, dropout_rate=0.5)
  inputs = tiny.tokens(1, [7, 5], 7)

  @functools.partial(jax.jit, static_argnums=0)
  def encode(deterministic, seed=0):
    return model.apply(
      {'params': params},
      inputs,
      method='encode',
      deterministic=deterministic,
      rngs={'dropout': jax.random.key(seed)},
    )

  assert not jnp.array_equal(encode(False), encode(True))
  assert jnp.array_equal(encode(False), encode(False))
  assert not jnp.array_equal(encode(False), encode(False, seed=1))


def test_remat_changes_neither_values_nor_gradients():
  plain, params = tiny.model_and_params(0, dropout_rate=0.2)
  remat = T5(tiny.config(dropout_rate=0.2, remat=True))
  inputs, targets = tiny.tokens(1, [7, 5], 7), tiny.tokens(2, [6, 6], 6)

  def loss(model, params):
    logits = model.apply(
      {'params': params},
      inputs,
      targets,
      deterministic=False,
      rngs={'dropout': jax.random.key(0)},
    )
    return jnp.mean(jnp.square(logits))

  traces = [
    jax.jit(jax.value_and_grad(functools.partial(loss, model))).trace(params)
    for model in (plain, remat)
  ]

  assert [str(x.jaxpr).count('remat2') for x in traces] == [0, 2]
  tiny.assert_equal_but_for_rounding(
    *(x.lower().compile()(params) for x in traces)
  )


class Scaled(nn.Module):
  """A layer with one argument per row and one shared argument."""

  config: object

  @nn.compact
  def __call__(self, x_BLD, deterministic, *, offset_B, weights_N):
    kernel = self.param('kernel', nn.initializers.ones, (x_BLD.shape[-1],))
    return x_BLD * kernel * weights_N.sum() + offset_B[:, None, None]


class Stack(nn.Module):
  config: object
  num_microbatches: int = 1
  placement = None

  def setup(self):
    self.layers = layer_stack.make_layers(Scaled, self.config, 2)

  def __call__(self, x_BLD, offset_B, weights_N):
    return layer_stack.run_layers(
      self,
      Scaled,
      x_BLD,
      True,
      per_row={'offset_B': offset_B},
      shared={'weights_N': weights_N},
      num_microbatches=self.num_microbatches,
    )


@pytest.mark.parametrize('scan_layers', [False, True])
def test_shared_arguments_stay_whole_even_if_as_long_as_the_batch(scan_layers):
  config = tiny.config(scan_layers=scan_layers)
  x, offset, weights = np.ones((4, 3, 2)), np.arange(4.0), np.arange(4.0)
  params = Stack(config).init(jax.random.key(0), x, offset, weights)

  got = Stack(config, num_microbatches=2).apply(params, x, offset, weights)

  want = (x * 6.0 + offset[:, None, None]) * 6.0 + offset[:, None, None]
  np.testing.assert_allclose(got, want)
