# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.models import layers
from tests import t5_reference, tiny

pytestmark = pytest.mark.slow  # compiles models


def softmax(logits):
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def product_and_gradients(function, x, y, d_out):
  out, gradients = jax.vjp(function, x, y)
  return out, *gradients(d_out)


@pytest.mark.parametrize('num_devices', [1, 2])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_matmul_rounds_operands_only_backwards_as_forwards(
  dtype, num_devices, monkeypatch
):
  # With one device transposes are written out on CPU, with more they are not.
  monkeypatch.setattr(jax, 'device_count', lambda: num_devices)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 3, 40)), dtype)
  kernel = jnp.asarray(rng.standard_normal((40, 50)), jnp.float32)
  d_out = jnp.asarray(rng.standard_normal((2, 3, 50)), jnp.float32)

  got = product_and_gradients(layers.matmul, x, kernel, d_out)

  x64, kernel64, d_out64 = (
    np.float64(jnp.asarray(a, dtype)) for a in (x, kernel, d_out)
  )
  want = (
    x64 @ kernel64,
    np.float64(jnp.asarray(d_out64 @ kernel64.T, dtype)),
    np.einsum('btd,btf->df', x64, d_out64),
  )
  assert [a.dtype for a in got] == [jnp.float32, x.dtype, jnp.float32]
  # Sums of 6 to 50 terms near 1 in float32. Where the result is bfloat16, an
  # error of that size may turn its last rounding the other way.
  last_bit = {'float32': 0.0, 'bfloat16': 2.0**-7}[dtype]
  for a, b, rtol in zip(got, want, (0.0, last_bit, 0.0), strict=True):
    np.testing.assert_allclose(np.float64(a), b, atol=1e-5, rtol=rtol)


@pytest.mark.parametrize('equation', ['bqk,blk->bql', 'bql,blk->bqk'])
def test_contract_has_the_gradients_of_einsum(equation):
  sizes = {'b': 2, 'q': 3, 'l': 5, 'k': 4}
  operands, result = equation.split('->')
  rng = np.random.default_rng(0)
  x, y, d_out = (
    rng.standard_normal([sizes[i] for i in indices]).astype(np.float32)
    for indices in (*operands.split(','), result)
  )

  got = product_and_gradients(
    lambda *xy: layers.contract(equation, *xy), x, y, d_out
  )

  want = product_and_gradients(
    lambda *xy: jnp.einsum(equation, *xy), x, y, d_out
  )
  tiny.assert_equal_but_for_rounding(got, want)


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize('num_buckets, max_distance', [(32, 128), (8, 20)])
def test_relative_position_bucket_equals_exact_integer_arithmetic(
  bidirectional, num_buckets, max_distance
):
  distances = np.arange(-300, 301)
  setting = {
    'bidirectional': bidirectional,
    'num_buckets': num_buckets,
    'max_distance': max_distance,
  }

  got = layers.relative_position_bucket(distances, **setting)

  want = [t5_reference.bucket(int(d), **setting) for d in distances]
  np.testing.assert_array_equal(got, want)


def test_rms_norm_rounds_to_bfloat16_only_once():
  norm = layers.RMSNorm('bfloat16')
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((8, 100)), jnp.bfloat16)
  scale = jnp.float32(rng.uniform(0.5, 2.0, 100))

  got = norm.apply({'params': {'scale': scale}}, x)

  x = np.float64(x)
  rms = np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
  want = jnp.asarray(x / rms * np.float64(scale), jnp.bfloat16)
  # Exactly: statistics in bfloat16 would be off by many roundings.
  np.testing.assert_array_equal(got, want)


def test_rms_norm_does_not_subtract_the_mean():
  norm = layers.RMSNorm('float32')

  got = norm.apply({'params': {'scale': jnp.ones(2)}}, jnp.array([3.0, 4.0]))

  # The root mean square of (3, 4) is sqrt(12.5). Tolerance: float32 rounding.
  np.testing.assert_allclose(got, np.array([3, 4]) / 12.5**0.5, rtol=1e-6)


def test_attention_softmax_is_float32_under_bfloat16():
  one_dim = layers.Attention(
    num_heads=1, head_dim=1, emb_dim=1, dtype='bfloat16'
  )
  kernels = {
    name: {'kernel': jnp.ones((1, 1))}
    for name in ('query', 'key', 'value', 'out')
  }
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.uniform(5, 10, 50), jnp.bfloat16)
  key = jnp.array([1.0, 1.0625], jnp.bfloat16)  # exact

  got = one_dim.apply(
    {'params': kernels},
    x[None, :, None],
    key[None, None, :, None],
    jnp.array([1.0, 0.0], jnp.bfloat16)[None, None, :, None],
    bias=None,
    mask=None,
    deterministic=True,
    method='attend',
  )

  # What is attended to is 1 and 0, so the output is the first probability: it
  # must be rounded once. Logits near 10 rounded to bfloat16 would be off by
  # up to 1/32, and the probability by several of its last digits.
  want = softmax(np.outer(np.float64(x), np.float64(key)))[:, 0]
  np.testing.assert_array_equal(got[0, :, 0], jnp.asarray(want, jnp.bfloat16))


def test_attention_logits_are_not_scaled_and_the_bias_is_added():
  attention = layers.Attention(
    num_heads=1, head_dim=4, emb_dim=4, dtype='float32'
  )
  identity = {
    name: {'kernel': jnp.eye(4)} for name in ('query', 'key', 'value', 'out')
  }
  rng = np.random.default_rng(0)
  x, kv = rng.standard_normal((2, 3, 4))
  bias = rng.standard_normal((3, 3))

  got = attention.apply(
    {'params': identity},
    jnp.float32(x[None]),
    jnp.float32(kv[None]),
    bias=jnp.float32(bias[None, None]),
    mask=None,
    deterministic=True,
  )

  want = softmax(x @ kv.T + bias) @ kv
  # Sums of a few terms near 1: float32 rounding stays below 1e-6.
  np.testing.assert_allclose(got[0], want, atol=1e-6)


def test_masked_keys_get_probability_exactly_0():
  attention = layers.Attention(
    num_heads=1, head_dim=4, emb_dim=4, dtype='float32'
  )
  x = jax.random.normal(jax.random.key(0), (1, 5, 4))
  params = attention.init(
    jax.random.key(1), x, x, bias=None, mask=None, deterministic=True
  )
  mask = jnp.array([1, 1, 0, 1, 0], bool)[None, None, None]

  def attend_to(kv):
    return attention.apply(
      params, x, kv, bias=None, mask=mask, deterministic=True
    )

  other = x.at[:, [2, 4]].set(1e4)
  np.testing.assert_array_equal(attend_to(x), attend_to(other))


def test_attention_dropout_drops_the_same_keys_for_every_query():
  attention = layers.Attention(
    num_heads=1, head_dim=6, emb_dim=6, dtype='float32', dropout_rate=0.5
  )
  identity = {
    name: {'kernel': jnp.eye(6)} for name in ('query', 'key', 'value', 'out')
  }
  x = jax.random.normal(jax.random.key(0), (1, 4, 6))
  one_hot_keys = jnp.eye(6)[None]

  got = attention.apply(
    {'params': identity},
    x,
    one_hot_keys,
    bias=None,
    mask=None,
    deterministic=False,
    rngs={'dropout': jax.random.key(1)},
  )

  # The keys are one-hot, so the output is the probabilities themselves.
  dropped_QL = np.asarray(got[0] == 0.0)
  assert 0 < dropped_QL[0].sum() < 6
  np.testing.assert_array_equal(dropped_QL, np.tile(dropped_QL[0], (4, 1)))


def test_logits_are_summed_in_float32_under_bfloat16():
  dense = layers.LogitsDense(vocab_size=3, dtype='bfloat16')
  # bfloat16 has 8 bits: 256 + 1 would be 256 again.
  params = {'kernel': jnp.ones((2, 3))}

  got = dense.apply({'params': params}, jnp.array([256.0, 1.0]))

  np.testing.assert_array_equal(got, [257.0, 257.0, 257.0])
  assert got.dtype == jnp.float32
