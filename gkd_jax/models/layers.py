# SPDX-License-Identifier: Apache-2.0
"""The blocks of a T5, with T5X's parameter names and logical axes.

Weights are float32; `dtype` is that of the activations. RMSNorm's statistics
and the attention softmax are always computed in float32.

Source: Raffel et al. (2020), arXiv:1910.10683; T5X, `t5x/examples/t5`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.layout import Layout, with_layout_constraint

from gkd_jax.batch import MASKED_LOGIT

Dtype = Any
Initializer = Any

_fan_in_normal = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
_fan_in_truncated = nn.initializers.variance_scaling(
  1.0, 'fan_in', 'truncated_normal'
)


class Dense(nn.Module):
  """A linear map of the last axis, without bias."""

  features: int
  axes: tuple[str, str]
  dtype: Dtype
  init: Initializer = _fan_in_normal

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., features]."""
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(self.init, self.axes),
      (x.shape[-1], self.features),
      jnp.float32,
    )
    return matmul(x.astype(self.dtype), kernel).astype(self.dtype)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Multiplies in the type of x and sums in float32, also in the gradient.

  CPUs are slow at a product whose operands differ in type or whose result is
  bfloat16. JAX's own gradient has both.

  Args:
    x: [..., D].
    kernel: [D, F], float32.

  Returns:
    [..., F] float32.
  """
  return _product(x, kernel.astype(x.dtype))


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  # With one row axis, the gradient of the kernel needs no transposed copy of
  # the activations on CPU: an MLP's backward pass takes 0.6 of the time.
  rows = x.reshape(-1, x.shape[-1])
  out = jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)
  return out.reshape(*x.shape[:-1], kernel.shape[-1])


def _matmul_fwd(x, kernel):
  operand = kernel.astype(x.dtype)
  return _product(x, operand), (x, operand)


def _matmul_bwd(operands, d_out):
  x, kernel = operands
  d_out = d_out.astype(x.dtype)
  rows, d_rows = (a.reshape(-1, a.shape[-1]) for a in (x, d_out))
  d_kernel = jnp.matmul(
    _transpose(rows), d_rows, preferred_element_type=jnp.float32
  )
  # In float32 the product is as fast with a transposed view of the kernel.
  kernel_T = kernel.T if x.dtype == jnp.float32 else _transpose(kernel)
  return _product(d_out, kernel_T).astype(x.dtype), d_kernel


def _transpose(x: jax.Array) -> jax.Array:
  """Returns x.T; on CPU, a copy in row-major order.

  On CPU a product of bfloat16 operands is fast only if both are in row-major
  order: 850 instead of 300 to 430 GFLOP/s, which is worth the copy. XLA does
  not make it.
  """
  if jax.device_count() > 1:
    return x.T  # a layout constraint would gather a sharded array

  def by_rows(x_T):
    return with_layout_constraint(x_T, Layout((0, 1)))

  return jax.lax.platform_dependent(x.T, cpu=by_rows, default=lambda x_T: x_T)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns an einsum of two arrays of one type, computed as in `matmul`.

  Args:
    equation: of einsum; each index is in at least two of the three arrays.
    x: first array.
    y: second array.

  Returns:
    The result in float32. The gradients have the type of x and y.
  """
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _contract_fwd(equation, x, y):
  return contract(equation, x, y), (x, y)


def _contract_bwd(equation, operands, d_out):
  x, y = operands
  of_operands, of_out = equation.split('->')
  of_x, of_y = of_operands.split(',')
  d_out = d_out.astype(x.dtype)
  d_x = contract(f'{of_out},{of_y}->{of_x}', d_out, y)
  d_y = contract(f'{of_out},{of_x}->{of_y}', d_out, x)
  return d_x.astype(x.dtype), d_y.astype(y.dtype)


contract.defvjp(_contract_fwd, _contract_bwd)


class RMSNorm(nn.Module):
  """Scales to unit root mean square; no mean is subtracted, no bias added."""

  dtype: Dtype
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.param(
      'scale',
      nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
      (x.shape[-1],),
      jnp.float32,
    )
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + self.epsilon) * scale_D).astype(
      self.dtype
    )


class Embed(nn.Module):
  """The token embedding, shared by encoder and decoder."""

  num_embeddings: int
  features: int
  dtype: Dtype

  def setup(self):
    self.embedding = self.param(
      'embedding',
      nn.with_logical_partitioning(
        nn.initializers.normal(stddev=1.0), ('vocab', 'embed')
      ),
      (self.num_embeddings, self.features),
      jnp.float32,
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Returns the embeddings [..., D] of tokens [...]."""
    return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

  def attend(self, x: jax.Array) -> jax.Array:
    """Maps hidden states [..., D] to float32 logits [..., V]."""
    return matmul(x.astype(self.dtype), self.embedding.T)


class LogitsDense(nn.Module):
  """The output projection of an untied model: [..., D] -> [..., V] float32."""

  vocab_size: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel_DV = self.param(
      'kernel',
      nn.with_logical_partitioning(_fan_in_truncated, ('embed', 'vocab')),
      (x.shape[-1], self.vocab_size),
      jnp.float32,
    )
    # Logits are differences of large sums, so they are float32.
    return matmul(x.astype(self.dtype), kernel_DV)


def relative_position_bucket(
  relative_position: np.ndarray,
  *,
  bidirectional: bool,
  num_buckets: int,
  max_distance: int,
) -> np.ndarray:
  """Returns the bucket of each relative position.

  Half of the buckets hold one distance each. The others grow logarithmically up
  to `max_distance`; all larger distances share the last bucket. The encoder
  uses half of all buckets for each sign; in the decoder, keys after the query
  are masked.

  Args:
    relative_position: [...] int, key position - query position.
    bidirectional: True in the encoder.
    num_buckets: number of all buckets.
    max_distance: the smallest distance of the last bucket.

  Returns:
    [...] int32 bucket numbers.
  """
  bucket = np.zeros(relative_position.shape, np.int32)
  distance = -relative_position
  if bidirectional:
    num_buckets //= 2
    bucket += (distance < 0).astype(np.int32) * num_buckets
    distance = np.abs(distance)
  else:
    distance = np.maximum(distance, 0)
  num_exact = num_buckets // 2
  # The small constant avoids log(0); those entries are not used.
  far = num_exact + (
    np.log(distance.astype(np.float32) / num_exact + np.finfo(np.float32).eps)
    / np.log(max_distance / num_exact)
    * (num_buckets - num_exact)
  ).astype(np.int32)
  far = np.minimum(far, num_buckets - 1)
  return bucket + np.where(distance < num_exact, distance, far)


class DistanceBias(NamedTuple):
  """A bias of attention logits that depends on the distance alone.

  It stands for the array [1, H, Q, L] where that is too large.
  """

  # [H, N] float32, with N >= Q + L - 1. The last L entries are those of query
  # 0; each later query's are one entry earlier.
  by_distance: jax.Array

  def rows(self, start: jax.Array, num_queries: int, key_len: int) -> jax.Array:
    """Returns the bias [1, H, num_queries, L] of queries from `start` on."""
    num_heads, n = self.by_distance.shape
    width = num_queries + key_len - 1
    first = n - width - start
    x_HW = jax.lax.dynamic_slice_in_dim(self.by_distance, first, width, axis=1)
    # Rows of width + 1 entries, read as rows of width entries, move each row to
    # the right by one more. A gather would be slow on TPUs.
    x_HW = jnp.pad(x_HW, ((0, 0), (0, 1)))
    x_HQW = jnp.broadcast_to(x_HW[:, None], (num_heads, num_queries, width + 1))
    flat = x_HQW.reshape(num_heads, -1)[:, : num_queries * width]
    return flat.reshape(1, num_heads, num_queries, width)[
      ..., num_queries - 1 :
    ]


class RelativePositionBias(nn.Module):
  """A learnt bias of attention logits: one number for each head and bucket.

  There is one table per stack, shared by its layers (T5), or one per layer
  (umT5, and T5X's scalable_t5).
  """

  num_heads: int
  bidirectional: bool
  dtype: Dtype
  num_buckets: int = 32
  max_distance: int = 128

  def setup(self):
    self.rel_embedding = self.param(
      'rel_embedding',
      nn.with_logical_partitioning(
        nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform'),
        ('heads', 'relpos_buckets'),
      ),
      (self.num_heads, self.num_buckets),
      jnp.float32,
    )

  def __call__(self, query_len: int, key_len: int) -> jax.Array:
    """Returns the bias [1, H, query_len, key_len]."""
    return self._look_up(
      np.arange(key_len)[None, :] - np.arange(query_len)[:, None]
    )[None]

  def by_distance(self, query_len: int, key_len: int) -> DistanceBias:
    """Returns the same bias, of which rows are made when they are needed."""
    bias_HN = self._look_up(np.arange(1 - query_len, key_len))
    return DistanceBias(bias_HN.astype(jnp.float32))

  def _look_up(self, relative_position: np.ndarray) -> jax.Array:
    buckets = relative_position_bucket(
      relative_position,
      bidirectional=self.bidirectional,
      num_buckets=self.num_buckets,
      max_distance=self.max_distance,
    )
    return jnp.take(self.rel_embedding.astype(self.dtype), buckets, axis=1)


Bias = jax.Array | DistanceBias | None


class Attention(nn.Module):
  """Multi-head attention without scaling by the root of the head dimension.

  T5 includes that factor in the initial query weights. Keys and values are not
  computed in `attend`, so that a decoder can cache them.

  Attributes:
    num_heads: H.
    head_dim: K.
    emb_dim: D.
    dtype: of the activations.
    dropout_rate: of the attention weights.
    query_block: more queries than these are processed in blocks of this size,
      each of which is computed again in the backward pass.
  """

  num_heads: int
  head_dim: int
  emb_dim: int
  dtype: Dtype
  dropout_rate: float = 0.0
  query_block: int = 256

  def setup(self):
    joined_kv = self.num_heads * self.head_dim
    axes = ('embed', 'joined_kv')

    def query_init(*args):
      return _fan_in_normal(*args) / np.sqrt(self.head_dim)

    self.query = Dense(joined_kv, axes, self.dtype, query_init)
    self.key = Dense(joined_kv, axes, self.dtype)
    self.value = Dense(joined_kv, axes, self.dtype)
    self.out = Dense(self.emb_dim, axes[::-1], self.dtype)
    # As in T5X, the same keys are dropped for every query.
    self.dropout = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))

  def keys_values(self, kv_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values, [B, H, L, K] each."""
    return self._split(self.key(kv_BLD)), self._split(self.value(kv_BLD))

  def attend(
    self,
    x_BQD: jax.Array,
    key_BHLK: jax.Array,
    value_BHLK: jax.Array,
    *,
    bias: Bias,
    mask: jax.Array | None,
    deterministic: bool,
    causal: bool = False,
  ) -> jax.Array:
    """Attends from x to keys and values.

    Args:
      x_BQD: [B, Q, D], from which the queries are computed.
      key_BHLK: [B, H, L, K].
      value_BHLK: [B, H, L, K].
      bias: added to the attention logits; an array is [1, H, Q, L].
      mask: bool, broadcastable to [B, H, Q, L], or to [B, H, 1, L] if there are
        more than `query_block` queries; False excludes a key.
      deterministic: True disables dropout.
      causal: whether query i sees the keys up to i only.

    Returns:
      [B, Q, D].
    """
    query_BHQK = self._split(self.query(x_BQD))
    is_dropping = self.dropout_rate > 0.0 and not deterministic
    attend = functools.partial(
      _attend, bias=bias, mask=mask, causal=causal, dtype=self.dtype
    )
    if query_BHQK.shape[2] <= self.query_block:
      drop = functools.partial(self.dropout, deterministic=deterministic)
      out_BHQK = attend(0, query_BHQK, (key_BHLK, value_BHLK), drop=drop)
    else:
      kept_BH1L = None
      if is_dropping:
        shape = (*key_BHLK.shape[:2], 1, key_BHLK.shape[2])
        kept_BH1L = self.dropout(jnp.ones(shape, self.dtype), False)
      attend = functools.partial(
        attend, drop=lambda p: p if kept_BH1L is None else p * kept_BH1L
      )
      out_BHQK = in_query_blocks(
        attend, query_BHQK, (key_BHLK, value_BHLK), self.query_block
      )
    out_BQHK = out_BHQK.swapaxes(1, 2)
    return self.out(out_BQHK.reshape(*x_BQD.shape[:2], -1))

  def __call__(
    self, x_BQD: jax.Array, kv_BLD: jax.Array, **kwargs
  ) -> jax.Array:
    """Attends from x [B, Q, D] to kv [B, L, D]; see `attend`."""
    return self.attend(x_BQD, *self.keys_values(kv_BLD), **kwargs)

  def _split(self, x_BLJ: jax.Array) -> jax.Array:
    x_BLHK = x_BLJ.reshape(*x_BLJ.shape[:2], self.num_heads, self.head_dim)
    return x_BLHK.swapaxes(1, 2)


def write_block(
  cached_BHLK: jax.Array, block_BHNK: jax.Array, offsets_B: jax.Array
) -> jax.Array:
  """Returns cached keys or values with a block at its position in each row.

  Args:
    cached_BHLK: [B, H, L, K].
    block_BHNK: [B, H, N, K].
    offsets_B: [B] int32, at most L - N.
  """
  if cached_BHLK.shape[0] == 1:  # XLA updates it in place
    at = (0, 0, offsets_B[0], 0)
    return jax.lax.dynamic_update_slice(cached_BHLK, block_BHNK, at)
  return jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))(
    cached_BHLK, block_BHNK, offsets_B, 1
  )


def _attend(
  start,
  query_BHQK,
  keys_values,
  *,
  bias: Bias,
  mask,
  causal: bool,
  dtype,
  drop,
) -> jax.Array:
  """Returns [B, H, Q, K] float32 for the queries from position `start` on."""
  key_BHLK, value_BHLK = keys_values
  num_queries, num_keys = query_BHQK.shape[2], key_BHLK.shape[2]
  logits_BHQL = contract('BHQK,BHLK->BHQL', query_BHQK, key_BHLK)
  if isinstance(bias, DistanceBias):
    logits_BHQL += bias.rows(start, num_queries, num_keys)
  elif bias is not None:
    logits_BHQL += bias.astype(jnp.float32)
  if mask is not None:
    logits_BHQL = jnp.where(mask, logits_BHQL, MASKED_LOGIT)
  if causal:
    at_Q = start + jnp.arange(num_queries)
    is_seen_QL = jnp.arange(num_keys) <= at_Q[:, None]
    logits_BHQL = jnp.where(is_seen_QL, logits_BHQL, MASKED_LOGIT)
  probs_BHQL = drop(jax.nn.softmax(logits_BHQL).astype(dtype))
  return contract('BHQL,BHLK->BHQK', probs_BHQL, value_BHLK)


def in_query_blocks(
  attend: Callable[..., jax.Array],
  query_BHQK: jax.Array,
  keys_values: Any,
  block: int,
) -> jax.Array:
  """Calls `attend` for one block of queries after the other.

  No array has all queries and all keys: the backward pass computes the
  attention of each block again.

  Args:
    attend: (position of the first query, queries [B, H, block, K], keys_values)
      -> [B, H, block, K] float32.
    query_BHQK: [B, H, Q, K].
    keys_values: a tree of arrays of the queries' dtype.
    block: number of queries of a block. The last block is padded.

  Returns:
    [B, H, Q, K] float32.
  """
  batch_size, num_heads, num_queries, head_dim = query_BHQK.shape
  num_blocks = -(-num_queries // block)
  padding = num_blocks * block - num_queries
  blocks = jnp.pad(query_BHQK, ((0, 0), (0, 0), (0, padding), (0, 0)))
  blocks = blocks.reshape(batch_size, num_heads, num_blocks, block, head_dim)
  # In float32, because their gradients are sums over the blocks.
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), keys_values)

  @jax.checkpoint
  def attend_block(start, query_BHqK):
    narrow = jax.tree.map(lambda x: x.astype(query_BHQK.dtype), wide)
    return attend(start, query_BHqK, narrow)

  out = jax.lax.map(
    lambda x: attend_block(*x),
    (jnp.arange(num_blocks) * block, jnp.moveaxis(blocks, 2, 0)),
  )
  out = jnp.moveaxis(out, 0, 2).reshape(batch_size, num_heads, -1, head_dim)
  return out[:, :, :num_queries]


class Mlp(nn.Module):
  """The feed-forward block: (product of act_i(x W_i)) W_o, no biases.

  T5 1.0 has one activation, ('relu',), and one kernel `wi`; T5 1.1 has two,
  ('gelu', 'linear'), and the kernels `wi_0` and `wi_1`.
  """

  mlp_dim: int
  emb_dim: int
  activations: tuple[str, ...]
  dtype: Dtype
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(self, x_BTD: jax.Array, deterministic: bool) -> jax.Array:
    hidden_BTF = 1.0
    for i, activation in enumerate(self.activations):
      name = 'wi' if len(self.activations) == 1 else f'wi_{i}'
      wi = Dense(
        self.mlp_dim, ('embed', 'mlp'), self.dtype, _fan_in_truncated, name=name
      )
      act = (lambda x: x) if activation == 'linear' else getattr(nn, activation)
      hidden_BTF *= act(wi(x_BTD))
    hidden_BTF = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
      hidden_BTF, deterministic=deterministic
    )
    wo = Dense(
      self.emb_dim, ('mlp', 'embed'), self.dtype, _fan_in_truncated, name='wo'
    )
    return wo(hidden_BTF)
