# SPDX-License-Identifier: Apache-2.0
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.models import layers
from gkd_jax.models.params import count_params, init_params, logical_axes
from gkd_jax.models.t5 import T5, T5Config
from gkd_jax.parallel import partitioning
from tests import t5_reference, tiny

pytestmark = pytest.mark.slow  # compiles models

VERSIONS = pytest.mark.parametrize('version', ['1.0', '1.1'])

# Both depths above 1 and unequal: a table of positions that was made for each
# layer, or layers mixed up, would show.
DEPTHS = {'num_encoder_layers': 2, 'num_decoder_layers': 3}


def shapes_of(model: T5):
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def t5x_parameters(c: T5Config) -> dict:
  """{name: (shape, logical axes)}, as T5X documents them."""
  V, D, H, F = c.vocab_size, c.emb_dim, c.num_heads, c.mlp_dim
  J = H * c.head_dim
  norm = ((D,), ('embed',))
  mlp_in = ((D, F), ('embed', 'mlp'))
  to_heads = ((D, J), ('embed', 'joined_kv'))
  table = ((H, c.relpos_buckets), ('heads', 'relpos_buckets'))

  def attention(name):
    return {
      f'{name}/query/kernel': to_heads,
      f'{name}/key/kernel': to_heads,
      f'{name}/value/kernel': to_heads,
      f'{name}/out/kernel': ((J, D), ('joined_kv', 'embed')),
    }

  def mlp():
    inputs = ['wi'] if len(c.mlp_activations) == 1 else ['wi_0', 'wi_1']
    return {
      'pre_mlp_layer_norm/scale': norm,
      **{f'mlp/{name}/kernel': mlp_in for name in inputs},
      'mlp/wo/kernel': ((F, D), ('mlp', 'embed')),
    }

  encoder_layer = {
    'pre_attention_layer_norm/scale': norm,
    **attention('attention'),
    **mlp(),
  }
  decoder_layer = {
    'pre_self_attention_layer_norm/scale': norm,
    **attention('self_attention'),
    'pre_cross_attention_layer_norm/scale': norm,
    **attention('encoder_decoder_attention'),
    **mlp(),
  }
  names = {
    'token_embedder/embedding': ((V, D), ('vocab', 'embed')),
    'encoder/relpos_bias/rel_embedding': table,
    'encoder/encoder_norm/scale': norm,
    'decoder/relpos_bias/rel_embedding': table,
    'decoder/decoder_norm/scale': norm,
  }
  if not c.logits_via_embedding:
    names['decoder/logits_dense/kernel'] = ((D, V), ('embed', 'vocab'))
  for stack, layer, number in (
    ('encoder', encoder_layer, c.num_encoder_layers),
    ('decoder', decoder_layer, c.num_decoder_layers),
  ):
    for i in range(number):
      names |= {f'{stack}/layers_{i}/{k}': v for k, v in layer.items()}
  return names


@VERSIONS
@pytest.mark.parametrize(
  'changes', [{}, {'remat': True}, {'scan_layers': True}]
)
def test_parameters_have_t5x_names_shapes_and_logical_axes(version, changes):
  config = tiny.config(version, **changes, **DEPTHS)
  model = T5(config)

  params = shapes_of(model)
  params = flax.traverse_util.flatten_dict(params, sep='/')
  axes = flax.traverse_util.flatten_dict(logical_axes(model), sep='/')

  got = {name: (x.shape, tuple(axes[name])) for name, x in params.items()}
  assert got == t5x_parameters(config)
  assert {x.dtype for x in params.values()} == {jnp.dtype('float32')}


@pytest.mark.parametrize(
  'wrong', [{'dtype': 'float16'}, {'dropout_rate': 1.0}, {'dropout_rate': -0.1}]
)
def test_config_refuses_what_it_cannot_mean(wrong):
  with pytest.raises(ValueError, match=f'T5Config.{next(iter(wrong))}'):
    tiny.config(**wrong)


def test_config_read_from_json_is_hashable():
  config = tiny.config(mlp_activations=['gelu', 'linear'])

  assert hash(config) == hash(tiny.config())


def test_initial_weights_have_t5x_standard_deviations():
  # Wide enough for a sample standard deviation within 5% of the true one.
  config = tiny.config(
    vocab_size=128, emb_dim=64, num_heads=4, head_dim=25, mlp_dim=144
  )

  params = jax.jit(lambda: init_params(T5(config), jax.random.key(0)))()

  D, H, K, F = 64, 4, 25, 144
  want = {
    'token_embedder/embedding': 1.0,
    'decoder/relpos_bias/rel_embedding': ((H + 32) / 2) ** -0.5,
    # The 1 / sqrt(K) of attention is in here, and nowhere else.
    'decoder/layers_0/self_attention/query/kernel': (D * K) ** -0.5,
    'decoder/layers_0/self_attention/key/kernel': D**-0.5,
    'decoder/layers_0/self_attention/value/kernel': D**-0.5,
    'decoder/layers_0/self_attention/out/kernel': (H * K) ** -0.5,
    'decoder/layers_0/mlp/wi_0/kernel': D**-0.5,
    'decoder/layers_0/mlp/wo/kernel': F**-0.5,
    'decoder/logits_dense/kernel': D**-0.5,
  }
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  got = {name: float(flat[name].std()) for name in want}
  # The table of positions has 128 numbers only: 4 standard errors of 6%.
  assert got.pop('decoder/relpos_bias/rel_embedding') == pytest.approx(
    want.pop('decoder/relpos_bias/rel_embedding'), rel=0.25
  )
  assert got == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize(
  'version, relpos',
  [
    # T5's own: exact up to distance 8 in the encoder, 16 in the decoder.
    ('1.0', {'relpos_buckets': 32, 'relpos_max_distance': 128}),
    # All distances from 20 on alike, so that the last bucket is met, too.
    ('1.1', {'relpos_buckets': 8, 'relpos_max_distance': 20}),
  ],
)
def test_logits_equal_the_float64_reference(version, relpos):
  model, params = tiny.model_and_params(0, version, **DEPTHS, **relpos)
  inputs = tiny.tokens(1, [40, 23], 40)
  targets = tiny.tokens(2, [30, 30], 30)

  got = tiny.logits(model, params, inputs, targets)

  for row, length in enumerate([40, 23]):
    want = t5_reference.logits(
      params,
      inputs[row, :length],
      targets[row],
      num_heads=model.config.num_heads,
      num_buckets=relpos['relpos_buckets'],
      max_distance=relpos['relpos_max_distance'],
    )
    # float32 through five layers: rounding errors near 1e-6, logits near 1.
    np.testing.assert_allclose(got[row], want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
  'changes',
  [
    {'relpos_buckets': 8, 'relpos_max_distance': 10},
    {'relpos_bias_per_layer': True, 'remat': True, 'scan_layers': True},
    {'dropout_rate': 0.3},
  ],
  ids=str,
)
def test_attention_in_blocks_changes_neither_values_nor_gradients(changes):
  at_once, params = tiny.model_and_params(0, **changes)
  in_blocks = T5(tiny.config(query_block=5, **changes))
  inputs, targets = tiny.tokens(1, [17, 9], 17), tiny.tokens(2, [13, 11], 13)

  def loss(params, model):
    logits = model.apply(
      {'params': params},
      inputs,
      targets,
      deterministic=not model.config.dropout_rate,
      rngs={'dropout': jax.random.key(0)},
    )
    return jnp.mean(jnp.square(logits)), logits

  values_and_gradients = jax.jit(
    jax.value_and_grad(loss, has_aux=True), static_argnums=1
  )
  tiny.assert_equal_but_for_rounding(
    values_and_gradients(params, in_blocks),
    values_and_gradients(params, at_once),
  )


def test_the_gradients_of_blocks_are_summed_in_float32():
  # The same key in 512 blocks: sums in bfloat16 would end at 256.
  x_B1QK, one = jnp.zeros((1, 1, 512, 1), 'bfloat16'), jnp.ones((1, 1, 1, 1))

  def total(value):
    return layers.in_query_blocks(
      lambda start, query, value: (query + value).astype(jnp.float32),
      *(x_B1QK, value.astype('bfloat16'), 1),
    ).sum()

  assert jax.grad(total)(one) == 512.0


def test_logits_do_not_depend_on_targets_from_their_position_on():
  model, params = tiny.model_and_params(0, num_decoder_layers=2)
  inputs = tiny.tokens(1, [7], 7)
  targets = tiny.tokens(2, [10], 10)

  before = tiny.logits(model, params, inputs, targets)[0]
  for t in range(10):
    changed = targets.copy()
    changed[0, t:] = 2 + (changed[0, t:] - 1) % (tiny.NUM_IDS - 2)
    after = tiny.logits(model, params, inputs, changed)[0]

    # To the last bit: a masked key has probability 0, not nearly 0.
    np.testing.assert_array_equal(after[: t + 1], before[: t + 1])
    assert (np.abs(after[t + 1 :] - before[t + 1 :]).max(axis=-1) > 1e-4).all()


def test_padding_of_inputs_changes_nothing():
  model, params = tiny.model_and_params(0, num_encoder_layers=2)
  inputs = tiny.tokens(1, [7, 5], 7)
  targets = tiny.tokens(2, [6, 6], 6)
  padded = np.pad(inputs, ((0, 0), (0, 9)))

  got = tiny.logits(model, params, padded, targets)

  want = tiny.logits(model, params, inputs, targets)
  # Masked keys have probability 0; sums may be taken in another order.
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@functools.partial(jax.jit, static_argnames=('model', 'max_decode_len'))
def start_cache(model, params, inputs, max_decode_len):
  variables = {'params': params}
  encoded = model.apply(variables, inputs, method='encode')
  return model.apply(
    variables, encoded, inputs, max_decode_len, method='start_cache'
  )


@pytest.mark.parametrize(
  'changes',
  [{'version': '1.0'}, {'version': '1.1', 'remat': True}],
  ids=['1.0', '1.1 with remat'],
)
def test_cached_decoding_equals_the_full_forward_pass(changes):
  model, params = tiny.model_and_params(
    0, num_decoder_layers=2, relpos_buckets=8, relpos_max_distance=10, **changes
  )
  inputs = tiny.tokens(1, [7, 4, 5], 7)
  targets = tiny.tokens(2, [12, 12, 12], 12)
  cache = start_cache(model, params, inputs, max_decode_len=12)
  num_traces = 0

  @jax.jit
  def decode_step(cache, tokens):
    nonlocal num_traces
    num_traces += 1
    return model.apply({'params': params}, cache, tokens, method='decode_step')

  got, last = [], jnp.zeros(3, jnp.int32)
  for t in range(12):
    logits, cache = decode_step(cache, last)
    got.append(logits)
    last = targets[:, t]

  want = tiny.logits(model, params, inputs, targets)
  # The same sums in another order.
  np.testing.assert_allclose(np.stack(got, 1), want, rtol=0, atol=1e-5)
  # Position and cache are data: one program serves them all.
  assert num_traces == 1


@pytest.mark.parametrize(
  'changes',
  [
    {'version': '1.0', 'remat': True},
    {'version': '1.1', 'scan_layers': True},
    {'relpos_bias_per_layer': True},
  ],
  ids=['1.0 with remat', '1.1 with scan', 'umT5'],
)
def test_a_block_at_each_rows_position_equals_single_steps(changes):
  model, params = tiny.model_and_params(
    0, num_decoder_layers=2, relpos_buckets=8, relpos_max_distance=10, **changes
  )
  inputs = tiny.tokens(1, [7, 4, 5], 7)
  targets = tiny.tokens(2, [12, 12, 12], 12)
  given = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  cache = start_cache(model, params, inputs, max_decode_len=12)

  @jax.jit
  def decode_block(cache, offsets):
    at = offsets[:, None] + jnp.arange(3)
    tokens = jnp.take_along_axis(jnp.asarray(given), at, axis=1)
    return model.apply(
      {'params': params}, cache, offsets, tokens, method='decode_block'
    )

  got = np.full((3, 12, tiny.VOCAB_SIZE), np.nan, np.float32)
  # Rows advance by 1, 2 or 3, as many as were accepted; or go back.
  for offsets in ([0, 0, 0], [1, 3, 2], [4, 5, 1], [6, 8, 4], [9, 7, 7]):
    logits, cache = decode_block(cache, jnp.array(offsets))
    for row, offset in enumerate(offsets):
      got[row, offset : offset + 3] = logits[row]

  want = tiny.logits(model, params, inputs, targets)
  written = ~np.isnan(got)
  assert written.mean() > 0.9
  # The same sums in another order.
  np.testing.assert_allclose(got[written], want[written], rtol=0, atol=1e-5)


def blocks_on_one_and_on_all_devices():
  """Runs in a separate process, see `tiny.on_simulated_devices`."""
  mesh = partitioning.make_mesh(4, 2)
  rules = partitioning.standard_logical_axis_rules(2, 1)
  config = tiny.config(vocab_size=24, num_decoder_layers=2)
  rows = partitioning.batch_sharding(mesh)
  inputs = tiny.tokens(1, [7, 4] * 4, 7)
  tokens, offsets = tiny.tokens(2, [3] * 8, 3), np.arange(8) % 3
  logits = []
  for placement in (None, partitioning.Placement(mesh, rules)):
    model = T5(config, placement)
    params = tiny.params(T5(config), 0)
    given = inputs, offsets, tokens
    if placement is not None:
      params = jax.device_put(params, placement.shardings(logical_axes(model)))
      given = jax.device_put(given, rows)

    @jax.jit
    def decode(params, inputs, offsets, tokens, model=model):
      params = model.gather_params(params)
      cache = start_cache(model, params, inputs, max_decode_len=7)
      logits = []
      for i in (0, 2):  # from the start on, and after it
        new, cache = model.apply(
          {'params': params}, cache, offsets + i, tokens, method='decode_block'
        )
        logits.append(new)
      return jnp.stack(logits)

    logits.append(decode(params, *given))
  num_devices = [len(x.sharding.device_set) for x in logits]
  return num_devices, *map(np.asarray, logits)


def test_a_block_does_not_depend_on_the_mesh():
  num_devices, one, all_ = tiny.on_simulated_devices(
    8, __name__, blocks_on_one_and_on_all_devices.__name__
  )

  assert num_devices == [1, 8]
  tiny.assert_equal_but_for_rounding(all_, one)


def test_cross_attention_keys_are_not_computed_in_a_decode_step():
  model, params = tiny.model_and_params(0)
  inputs = tiny.tokens(1, [7, 4], 7)
  cache = start_cache(model, params, inputs, max_decode_len=5)
  cross = params['decoder']['layers_0']['encoder_decoder_attention']
  unusable = jax.tree.map(lambda x: x, params)
  unusable['decoder']['layers_0']['encoder_decoder_attention'] = {
    **cross,
    'key': {'kernel': jnp.full_like(cross['key']['kernel'], jnp.nan)},
    'value': {'kernel': jnp.full_like(cross['value']['kernel'], jnp.nan)},
  }

  logits, _ = model.apply(
    {'params': unusable}, cache, jnp.zeros(2, jnp.int32), method='decode_step'
  )

  assert np.isfinite(logits).all()


@VERSIONS
def test_bfloat16_logits_are_close_to_those_of_float32(version):
  model, params = tiny.model_and_params(0, version)
  half = T5(tiny.config(version, dtype='bfloat16'))
  inputs = tiny.tokens(1, [7, 5], 7)
  targets = tiny.tokens(2, [6, 6], 6)
  hidden = jax.eval_shape(
    lambda: half.apply({'params': params}, inputs, method='encode')
  )

  got = tiny.logits(half, params, inputs, targets)

  assert hidden.dtype == jnp.bfloat16
  assert got.dtype == jnp.float32
  # Rounded to bfloat16 they would be equal to their rounding.
  assert (got != got.astype(jnp.bfloat16)).mean() > 0.9
  want = tiny.logits(model, params, inputs, targets)
  # 8 bits are errors of 0.4% an operation, of logits up to 5.
  np.testing.assert_allclose(got, want, rtol=0, atol=0.1)
  assert np.abs(got - want).max() > 1e-4  # it was computed in bfloat16 at all


def test_dropout_happens_only_when_asked_for():
  model, params = tiny.model_and_params(0)
  dropping = T5(tiny.config(dropout_rate=0.5))
  inputs = tiny.tokens(1, [7, 5], 7)
  targets = tiny.tokens(2, [6, 6], 6)

  got = tiny.logits(dropping, params, inputs, targets)

  want = tiny.logits(model, params, inputs, targets)
  np.testing.assert_array_equal(got, want)


def test_dropout_changes_with_its_rng_and_with_nothing_else():
  model, params = tiny.model_and_params(0, dropout_rate=0.5)
  inputs = tiny.tokens(1, [7, 5], 7)
  targets = tiny.tokens(2, [6, 6], 6)

  @jax.jit
  def logits(seed):
    return model.apply(
      {'params': params},
      inputs,
      targets,
      deterministic=False,
      rngs={'dropout': jax.random.key(seed)},
    )

  assert np.abs(logits(0) - logits(1)).max() > 0.1
  np.testing.assert_array_equal(logits(0), logits(0))


def test_dropout_needs_an_rng():
  model, params = tiny.model_and_params(0, dropout_rate=0.5)
  inputs, targets = tiny.tokens(1, [7], 7), tiny.tokens(2, [6], 6)

  with pytest.raises(flax.errors.InvalidRngError, match='dropout'):
    model.apply({'params': params}, inputs, targets, deterministic=False)


@pytest.mark.parametrize('stack', ['encoder', 'decoder'])
def test_dropout_drops_the_same_features_at_all_positions(stack):
  model, params = tiny.model_and_params(0, dropout_rate=0.5)
  inputs, targets = tiny.tokens(1, [7, 7], 7), tiny.tokens(2, [6, 6], 6)
  keywords = {'deterministic': False, 'rngs': {'dropout': jax.random.key(0)}}

  @jax.jit
  def hidden_states(params):
    apply = functools.partial(model.apply, {'params': params})
    encoded = apply(inputs, method='encode', **keywords)
    if stack == 'encoder':
      return encoded
    return apply(encoded, inputs, targets, method='decode', **keywords)

  hidden = hidden_states(params)

  dropped_BTD = np.asarray(hidden) == 0.0
  assert 0.2 < dropped_BTD.mean() < 0.8
  np.testing.assert_array_equal(
    dropped_BTD, np.broadcast_to(dropped_BTD[:, :1], dropped_BTD.shape)
  )
  assert (dropped_BTD[0, 0] != dropped_BTD[1, 0]).any()  # but not in all rows


@VERSIONS
def test_head_params_are_all_that_unembed_reads(version):
  model, params = tiny.model_and_params(0, version)
  hidden = jax.random.normal(jax.random.key(0), (3, 4, 16))

  head = model.head_params(params)
  got = model.apply({'params': head}, hidden, method='unembed')

  want = model.apply({'params': params}, hidden, method='unembed')
  np.testing.assert_array_equal(got, want)
  assert count_params(head) == tiny.VOCAB_SIZE * 16


def test_outputs_can_be_scaled_without_being_tied():
  plain, params = tiny.model_and_params(0)
  scaled = T5(tiny.config(scale_decoder_outputs=True))
  tokens = tiny.tokens(0, (5, 3), 6)

  got = tiny.logits(scaled, params, tokens, tokens)

  # 16 ** -0.5 is a power of two: nothing is rounded.
  want = tiny.logits(plain, params, tokens, tokens) / 4
  np.testing.assert_allclose(got, want, rtol=1e-6)
