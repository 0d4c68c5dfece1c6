# SPDX-License-Identifier: Apache-2.0
"""T5Gemma 1 and 2. Their values: checkpoints/formats/huggingface_test.py."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.models import t5gemma
from gkd_jax.models.params import abstract_params
from gkd_jax.models.t5gemma import T5Gemma
from gkd_jax.parallel import partitioning
from tests import tiny
from tests.models.t5_test import start_cache

pytestmark = pytest.mark.slow  # compiles models

VERSIONS = pytest.mark.parametrize('version', [1, 2])
# The cache of a layer with a window of 3 wraps around in 14 positions, twice.
MAX_BLOCK, LENGTH = 3, 14


@pytest.mark.parametrize(
  'wrong',
  [
    {'version': 3},
    {'dtype': 'float16'},
    {'head_dim': 5},
    {'num_kv_heads': 3},
    {'window': 0},
    {'start_id': 24},
    {'final_soft_cap': 0.0},
  ],
  ids=str,
)
def test_config_refuses_what_it_cannot_mean(wrong):
  with pytest.raises(ValueError, match=f'T5GemmaConfig.{next(iter(wrong))}'):
    dataclasses.replace(tiny.t5gemma_config(2), **wrong)


def test_the_stacks_of_version_2_have_one_shape():
  with pytest.raises(ValueError, match='encoder_mlp_dim must be None in ver'):
    tiny.t5gemma_config(2, encoder_mlp_dim=14)


def test_start_and_image_ids_are_never_written():
  ids = tiny.t5gemma_config(2, never_written=(17, 18)).special_ids(19)

  assert ids.never_written == (0, 2, 17, 18)
  assert (ids.start, ids.eos) == (2, 1)


def test_an_embedding_starts_with_unit_variance_and_so_do_its_logits():
  embed = t5gemma.Embed(512, 64, 'float32')
  params = embed.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
  hidden = jax.random.normal(jax.random.key(1), (64, 64))

  rows = embed.apply(params, jnp.arange(512))
  logits = embed.apply(params, hidden, method='attend')

  # 32,768 numbers each: a standard error of 0.4%.
  assert float(rows.std()) == pytest.approx(1.0, rel=0.03)
  assert float(logits.std()) == pytest.approx(1.0, rel=0.03)


@VERSIONS
def test_cached_decoding_equals_the_full_forward_pass(version, monkeypatch):
  monkeypatch.setattr(t5gemma, 'MAX_BLOCK', MAX_BLOCK)
  model, params = tiny.t5gemma_and_params(0, version)
  inputs = tiny.tokens(1, [7, 4, 5], 7)
  targets = tiny.tokens(2, [LENGTH] * 3, LENGTH)
  cache = start_cache(model, params, inputs, max_decode_len=LENGTH)

  @jax.jit
  def decode_step(cache, tokens):
    return model.apply({'params': params}, cache, tokens, method='decode_step')

  got, last = [], jnp.full(3, model.config.start_id, jnp.int32)
  for t in range(LENGTH):
    logits, cache = decode_step(cache, last)
    got.append(logits)
    last = targets[:, t]

  # The layer with a window keeps what blocks need, the other everything.
  assert [x.shape[2] for x in cache.self_keys] == [3 + MAX_BLOCK - 1, LENGTH]
  want = tiny.logits(model, params, inputs, targets)
  # The same sums in another order.
  np.testing.assert_allclose(np.stack(got, 1), want, rtol=0, atol=1e-5)


@VERSIONS
def test_blocks_of_positions_equal_the_full_forward_pass(version, monkeypatch):
  monkeypatch.setattr(t5gemma, 'MAX_BLOCK', MAX_BLOCK)
  model, params = tiny.t5gemma_and_params(0, version)
  inputs = tiny.tokens(1, [7, 4], 7)
  targets = tiny.tokens(2, [LENGTH] * 2, LENGTH)
  fed = np.pad(targets, ((0, 0), (1, 0)), constant_values=2)
  cache = start_cache(model, params, inputs, max_decode_len=LENGTH)

  @jax.jit
  def decode_block(cache, offsets, tokens):
    return model.apply(
      {'params': params}, cache, offsets, tokens, method='decode_block'
    )

  want = tiny.logits(model, params, inputs, targets)
  offsets, rows = np.array([0, 0]), np.arange(2)[:, None]
  # Rows move on at different speeds; what they do not keep is decoded again,
  # after other tokens were there.
  for kept in ([3, 1], [1, 2], [2, 3], [3, 3], [1, 2], [1, 0]):
    at = offsets[:, None] + np.arange(MAX_BLOCK)
    wrong = np.where(np.arange(MAX_BLOCK) < np.array(kept)[:, None], 0, 3)
    tokens = np.where(wrong, 3 + (fed[rows, at] % 11), fed[rows, at])
    logits, cache = decode_block(cache, jnp.asarray(offsets), tokens)
    for row, num in enumerate(kept):
      np.testing.assert_allclose(
        logits[row, :num], want[row, at[row, :num]], rtol=0, atol=1e-5
      )
    offsets = offsets + kept
  assert offsets.tolist() == [11, 11]


def test_a_block_longer_than_the_cache_allows_is_refused(monkeypatch):
  monkeypatch.setattr(t5gemma, 'MAX_BLOCK', MAX_BLOCK)
  model, params = tiny.t5gemma_and_params(0, 2)
  cache = start_cache(model, params, tiny.tokens(1, [7], 7), LENGTH)

  with pytest.raises(ValueError, match='at most 3 positions at once, got 4'):
    model.apply(
      {'params': params},
      cache,
      jnp.array([0]),
      jnp.full((1, 4), 3),
      method='decode_block',
    )


@VERSIONS
def test_the_end_of_an_image_has_its_own_embedding_in_version_2(version):
  model, params = tiny.t5gemma_and_params(0, version)
  inputs = np.array([[5, 18, 6, 1]])
  changed = jax.tree.map(jnp.copy, params)
  table = changed['token_embedder']['embedding']
  changed['token_embedder']['embedding'] = table.at[18].add(1.0)

  encode = jax.jit(functools.partial(model.apply, method='encode'))
  # The encoder of version 1 has another table.
  np.testing.assert_array_equal(
    encode({'params': changed}, inputs), encode({'params': params}, inputs)
  )
  if version == 2:
    own = {**params['token_embedder'], 'eoi_embedding': jnp.zeros(16)}
    changed = params | {'token_embedder': own}
    assert not np.allclose(
      encode({'params': changed}, inputs), encode({'params': params}, inputs)
    )


# --- Ways to run it -----------------------------------------------------------


CHANGES = {
  'loop': {'scan_layers': True, 'remat': True},
  'microbatches': {},
  'blocks of queries': {'query_block': 4},
}


@VERSIONS
@pytest.mark.parametrize('way', CHANGES)
def test_each_way_to_run_the_layers_gives_the_same(version, way):
  plain, params = tiny.t5gemma_and_params(0, version)
  inputs = tiny.tokens(1, [7, 5, 6, 3], 7)
  targets = tiny.tokens(2, [6, 6, 4, 5], 6)
  other = T5Gemma(tiny.t5gemma_config(version, **CHANGES[way]))
  num = 2 if way == 'microbatches' else 1

  def loss(model, num, params):
    apply = functools.partial(
      model.apply, {'params': params}, num_microbatches=num
    )
    encoded = apply(inputs, method='encode')
    hidden = apply(encoded, inputs, targets, method='decode')
    return jnp.mean(jnp.square(hidden) * jnp.arange(16)), encoded

  got, want = (
    jax.jit(
      jax.value_and_grad(functools.partial(loss, model, n), has_aux=True)
    )(params)
    for model, n in ((other, num), (plain, 1))
  )

  tiny.assert_equal_but_for_rounding(got, want)


def run_on_mesh(version, num_kv_heads, mesh_shape):
  """Returns shardings, logits and cached logits on a mesh of 8 devices."""
  mesh = partitioning.make_mesh(
    *mesh_shape, jax.devices()[: math.prod(mesh_shape)]
  )
  config = tiny.t5gemma_config(
    version,
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_heads=4,
    num_kv_heads=num_kv_heads,
    encoder_num_heads=None,
    encoder_num_kv_heads=None,
    mlp_dim=24,
    encoder_mlp_dim=None,
  )
  model = T5Gemma(config, partitioning.Placement(mesh))
  abstract = abstract_params(model)
  params = jax.device_put(
    tiny.params(T5Gemma(config), 0),
    jax.tree.map(lambda x: x.sharding, abstract),
  )
  inputs = jnp.asarray(tiny.tokens(1, [7, 5, 6, 3] * 2, 7))
  targets = jnp.asarray(tiny.tokens(2, [6, 6, 4, 5] * 2, 6))

  @jax.jit
  def run(params, inputs, targets):
    apply = functools.partial(model.apply, {'params': params})
    encoded = apply(inputs, method='encode')
    cache = apply(encoded, inputs, 6, method='start_cache')
    logits, cache = apply(
      cache, jnp.full(8, config.start_id), method='decode_step'
    )
    return apply(inputs, targets), logits

  rows = partitioning.batch_sharding(mesh)
  inputs, targets = jax.device_put((inputs, targets), rows)
  attention = abstract['decoder']['layers_0']['self_attention']
  specs = {
    name: tuple(attention[name]['kernel'].sharding.spec)
    for name in ('query', 'key')
  }
  return specs, jax.device_get(run(params, inputs, targets))


@pytest.mark.parametrize(
  ('version', 'num_kv_heads', 'mesh_shape', 'query', 'key'),
  [
    (1, 4, (2, 4), 'model', 'model'),
    (2, 1, (2, 4), 'model', None),
    # More devices than heads: the rest of the model is sharded.
    (2, 4, (1, 8), None, None),
  ],
)
def test_heads_that_a_mesh_does_not_divide_are_replicated(
  version, num_kv_heads, mesh_shape, query, key
):
  call = functools.partial(
    tiny.on_simulated_devices, 8, __name__, 'run_on_mesh', version, num_kv_heads
  )

  specs, got = call(mesh_shape)

  assert specs == {'query': (None, query), 'key': (None, key)}
  _, want = call((1, 1))
  tiny.assert_equal_but_for_rounding(got, want)
