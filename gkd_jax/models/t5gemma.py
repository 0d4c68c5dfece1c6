# SPDX-License-Identifier: Apache-2.0
"""The family `t5gemma`: T5Gemma 1 and the text model of T5Gemma 2.

Both are encoder-decoders made of Gemma's layers: grouped-query attention with
rotary positions, norms before and after each block, gated MLPs, and layers that
see a window beside layers that see everything.

T5Gemma 1 (Gemma 2) has cross-attention, an embedding for each stack, and soft
caps on logits. T5Gemma 2 (Gemma 3) has one attention in each decoder layer, to
the targets and the encoder outputs at once, norms of queries and keys, and one
embedding.

Source: Zhang et al. (2025), arXiv:2504.06225 and arXiv:2512.14856;
transformers, `models/t5gemma` and `models/t5gemma2`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gkd_jax.batch import MASKED_LOGIT, SpecialIds
from gkd_jax.models import encoder_decoder, layer_stack, layers
from gkd_jax.models.interface import StackShape
from gkd_jax.parallel import partitioning
from gkd_jax.parallel.partitioning import Placement

Params = Any

# Logical axis of the keys and values of all heads. T5's is 'joined_kv', but
# here there are fewer of them than of queries.
_KEY_AXIS = 'joined_kv_heads'
_KEY_HEADS = 'kv_heads'  # of the cache
_QUERY_AXIS = 'joined_kv'
# What may differ between encoder and decoder, beside their depths.
_OF_STACK = ('emb_dim', 'num_heads', 'num_kv_heads', 'mlp_dim')
MAX_BLOCK = 32  # positions that are decoded at once


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig:
  """The shape of a T5Gemma.

  Attributes:
    version: 1 or 2.
    vocab_size: rows of the embedding, at least the tokenizer's number of ids.
    emb_dim: D, width of the residual stream of the decoder.
    num_heads: H, heads of the queries; H * K need not equal D.
    num_kv_heads: heads of keys and values, which H / num_kv_heads heads of
      queries share.
    head_dim: K, of both stacks.
    mlp_dim: F.
    num_encoder_layers: depth of the encoder.
    num_decoder_layers: depth of the decoder.
    window: W. Of the layers with a window, a decoder's position sees itself and
      the W - 1 targets before it. An encoder's sees the W positions on each
      side (version 1), or W in all (version 2).
    full_period: of so many layers the last has no window.
    encoder_emb_dim: D of the encoder; None: that of the decoder. Version 2 has
      stacks of one shape.
    encoder_num_heads: likewise.
    encoder_num_kv_heads: likewise.
    encoder_mlp_dim: likewise.
    query_pre_attn_scalar: attention logits are divided by its root; None: K.
    attention_soft_cap: c of c * tanh(logit / c); None: no cap.
    final_soft_cap: likewise, of the output logits.
    rope_theta: base of the rotary positions in layers without window.
    rope_factor: positions in layers without window are divided by it.
    window_rope_theta: base in layers with a window.
    dropout_rate: in training, at the same places as in transformers, with
      one draw for all positions.
    dtype: of the activations, 'float32' or 'bfloat16'; weights are float32.
    remat: whether the backward pass recomputes each layer, to save memory.
    scan_layers: whether a stack of layers is compiled as one loop, except in
      decoding.
    query_block: attention over more positions than these is computed in blocks
      of so many queries, forwards and backwards: less memory.
    pad_id: pads the encoder's input.
    start_id: the decoder's first input, BOS.
    eos_id: ends an output.
    eoi_id: in version 2 this id, the end of an image, has an embedding of its
      own, which is not scaled.
    never_written: ids that no output may hold, beside pad and start.
  """

  family: ClassVar[str] = 't5gemma'
  mlp_activations: ClassVar[tuple[str, ...]] = ('gelu', 'linear')

  version: int
  vocab_size: int
  emb_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  num_encoder_layers: int
  num_decoder_layers: int
  window: int
  full_period: int
  encoder_emb_dim: int | None = None
  encoder_num_heads: int | None = None
  encoder_num_kv_heads: int | None = None
  encoder_mlp_dim: int | None = None
  query_pre_attn_scalar: float | None = None
  attention_soft_cap: float | None = None
  final_soft_cap: float | None = None
  rope_theta: float = 10_000.0
  rope_factor: float = 1.0
  window_rope_theta: float = 10_000.0
  dropout_rate: float = 0.0
  dtype: str = 'float32'
  remat: bool = False
  scan_layers: bool = False
  query_block: int = 256
  pad_id: int = 0
  start_id: int = 2
  eos_id: int = 1
  eoi_id: int = 256_000
  never_written: tuple[int, ...] = ()

  def __post_init__(self):
    # gin and JSON write lists; a config must be hashable.
    object.__setattr__(self, 'never_written', tuple(self.never_written))
    # Normalized, so that equal configs compare as equal.
    for name in _OF_STACK:
      if getattr(self, f'encoder_{name}') == getattr(self, name):
        object.__setattr__(self, f'encoder_{name}', None)
    if self.query_pre_attn_scalar == self.head_dim:
      object.__setattr__(self, 'query_pre_attn_scalar', None)
    _check(self)

  def special_ids(self, num_ids: int) -> SpecialIds:
    """Returns the special ids for a vocabulary of `num_ids` ids."""
    never = {self.pad_id, self.start_id, *self.never_written} - {self.eos_id}
    return SpecialIds(
      pad=self.pad_id,
      start=self.start_id,
      eos=self.eos_id,
      never_written=tuple(sorted(never)),
      num_ids=num_ids,
    )

  def describe(self) -> str:
    """Returns a short description, such as 'T5Gemma 2 of width 640 ...'."""
    width = str(self.emb_dim)
    if self.encoder_emb_dim is not None:
      width = f'{self.encoder_emb_dim} + {width}'
    return (
      f'T5Gemma {self.version} of width {width} with '
      f'{self.num_encoder_layers} + {self.num_decoder_layers} layers'
    )

  @property
  def encoder(self) -> StackShape:
    """The shape of the encoder."""
    own = {name: getattr(self, f'encoder_{name}') for name in _OF_STACK}
    changes = {name: value for name, value in own.items() if value is not None}
    return self.decoder._replace(num_layers=self.num_encoder_layers, **changes)

  @property
  def decoder(self) -> StackShape:
    """The shape of the decoder."""
    shape = {name: getattr(self, name) for name in _OF_STACK}
    return StackShape(num_layers=self.num_decoder_layers, **shape)

  @property
  def has_cross_attention(self) -> bool:
    """Whether the attention to the encoder has kernels of its own."""
    return self.version == 1

  @property
  def num_tables(self) -> int:
    """One embedding, or one of each stack; the output projection is tied."""
    return 2 if self.version == 1 else 1

  def is_full(self, num_layers: int) -> np.ndarray:
    """Returns, for each layer of a stack, 1 if it has no window, else 0."""
    period = self.full_period
    return np.asarray([int((i + 1) % period == 0) for i in range(num_layers)])


def _check(c: T5GemmaConfig) -> None:
  """Raises ValueError unless a config describes a model."""

  def check(name, is_right, rule):
    if not is_right:
      raise ValueError(
        f'T5GemmaConfig.{name} must be {rule}, got {getattr(c, name)!r}.'
      )

  check('version', c.version in (1, 2), '1 or 2')
  check('dtype', c.dtype in ('float32', 'bfloat16'), "'float32' or 'bfloat16'")
  sizes = ('vocab_size', *_OF_STACK, 'window', 'full_period', 'query_block')
  for name in sizes:
    check(name, getattr(c, name) >= 1, '1 or more')
  check(
    'head_dim', c.head_dim >= 2 and c.head_dim % 2 == 0, 'even and 2 or more'
  )
  for name in ('num_encoder_layers', 'num_decoder_layers'):
    check(name, getattr(c, name) >= 0, '0 or more')
  for name in (f'encoder_{name}' for name in _OF_STACK):
    value = getattr(c, name)
    check(name, value is None or value >= 1, '1 or more, or None')
    check(
      name,
      value is None or c.version == 1,
      "None in version 2, whose encoder has the decoder's shape",
    )
  for prefix, shape in (('', c.decoder), ('encoder_', c.encoder)):
    if shape.num_heads % shape.num_kv_heads:
      raise ValueError(
        f'T5GemmaConfig.{prefix}num_kv_heads must divide {prefix}num_heads '
        f'{shape.num_heads}, got {shape.num_kv_heads}.'
      )
  for name in ('pad_id', 'start_id', 'eos_id'):
    check(
      name,
      0 <= getattr(c, name) < c.vocab_size,
      f'an id of the embedding, from 0 to {c.vocab_size - 1}',
    )
  for name in ('query_pre_attn_scalar', 'attention_soft_cap', 'final_soft_cap'):
    value = getattr(c, name)
    check(name, value is None or value > 0.0, 'above 0, or None')
  for name in ('rope_theta', 'rope_factor', 'window_rope_theta'):
    check(name, getattr(c, name) > 0.0, 'above 0')
  check('dropout_rate', 0.0 <= c.dropout_rate < 1.0, 'in [0, 1)')


def _v1(emb_dim, num_heads, num_kv_heads, head_dim, mlp_dim, num_layers):
  return T5GemmaConfig(
    version=1,
    vocab_size=256_000,
    emb_dim=emb_dim,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=head_dim,
    mlp_dim=mlp_dim,
    num_encoder_layers=num_layers,
    num_decoder_layers=num_layers,
    window=4096,
    full_period=2,
    attention_soft_cap=50.0,
    final_soft_cap=30.0,
  )


def _v2(emb_dim, num_heads, num_kv_heads, mlp_dim, num_layers, window):
  return T5GemmaConfig(
    version=2,
    vocab_size=262_144,
    emb_dim=emb_dim,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads,
    head_dim=256,
    mlp_dim=mlp_dim,
    num_encoder_layers=num_layers,
    num_decoder_layers=num_layers,
    window=window,
    full_period=6,
    rope_theta=1_000_000.0,
    rope_factor=8.0,
    # The begin and end of an image, and its soft tokens.
    never_written=(255_999, 256_000, 256_001),
  )


# Source: the papers, and the config.json files of the published models. A name
# has the size of the encoder, then that of the decoder.
_V1_9B = _v1(3584, 16, 8, 256, 14336, 42)
_V1_2B = _v1(2304, 8, 4, 256, 9216, 26)
SIZES: dict[str, T5GemmaConfig] = {
  't5gemma_s_s': _v1(512, 8, 8, 64, 1024, 8),
  't5gemma_b_b': _v1(768, 12, 12, 64, 2048, 12),
  't5gemma_l_l': _v1(1024, 16, 16, 64, 2816, 24),
  't5gemma_ml_ml': _v1(1152, 4, 4, 256, 6912, 26),
  't5gemma_xl_xl': _v1(2048, 32, 32, 64, 5120, 24),
  't5gemma_2b_2b': _V1_2B,
  't5gemma_9b_2b': dataclasses.replace(
    _V1_2B,
    num_encoder_layers=_V1_9B.num_encoder_layers,
    **{f'encoder_{name}': getattr(_V1_9B, name) for name in _OF_STACK},
  ),
  't5gemma_9b_9b': _V1_9B,
  't5gemma_2_270m_270m': _v2(640, 4, 1, 2048, 18, 512),
  't5gemma_2_1b_1b': _v2(1152, 4, 1, 6912, 26, 512),
  't5gemma_2_4b_4b': _v2(2560, 8, 4, 10240, 34, 1024),
}


# --- Blocks -------------------------------------------------------------------


class RMSNorm(nn.Module):
  """Scales to unit root mean square, then by 1 + scale.

  The parameter is stored without the 1, as in Gemma's files: in bfloat16 the
  sum would be rounded.
  """

  dtype: Any
  axis: str = 'embed'
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns x of the same shape; the last axis is that of the vectors."""
    scale = self.param(
      'scale',
      nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,)),
      (x.shape[-1],),
      jnp.float32,
    )
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(mean_square + self.epsilon)
    return (x * (1.0 + scale)).astype(self.dtype)


class Embed(layers.Embed):
  """An embedding whose rows are scaled by the root of their length.

  Attributes:
    eoi_id: this id has an embedding of its own, not scaled; None: none has.
  """

  eoi_id: int | None = None

  def setup(self):
    # Of unit variance once they are scaled, and so are the tied logits.
    stddev = self.features**-0.5
    self.embedding = self.param(
      'embedding',
      nn.with_logical_partitioning(
        nn.initializers.normal(stddev=stddev), ('vocab', 'embed')
      ),
      (self.num_embeddings, self.features),
      jnp.float32,
    )
    if self.eoi_id is not None:
      self.eoi_embedding = self.param(
        'eoi_embedding',
        nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)),
        (self.features,),
        jnp.float32,
      )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Returns the embeddings [..., D] of tokens [...]."""
    # The factor is rounded to the type of the activations, as in Gemma.
    factor = jnp.asarray(self.features**0.5, self.dtype)
    x = super().__call__(tokens) * factor
    if self.eoi_id is None:
      return x
    is_eoi = (tokens == self.eoi_id)[..., None]
    return jnp.where(is_eoi, self.eoi_embedding.astype(self.dtype), x)


def rotary(config: T5GemmaConfig, positions: jax.Array) -> jax.Array:
  """Returns cosines and sines of the rotary positions.

  Args:
    config: with the bases of layers with and without window.
    positions: [..., L] int.

  Returns:
    [2, 2, ..., L, K / 2] float32: layers with a window, without; cosine, sine.
  """
  c = config
  exponents = np.arange(0, c.head_dim, 2, dtype=np.float32) / c.head_dim
  frequencies = np.stack(
    [
      1.0 / np.float32(c.window_rope_theta) ** exponents,
      1.0 / np.float32(c.rope_theta) ** exponents / c.rope_factor,
    ]
  ).astype(np.float32)
  angles = jnp.stack(
    [positions.astype(jnp.float32)[..., None] * x for x in frequencies]
  )
  return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)


def rotate(x: jax.Array, rope: jax.Array) -> jax.Array:
  """Rotates each pair (i, i + K / 2) of x [..., L, K] by its position's angle.

  Args:
    x: queries or keys.
    rope: [2, ..., L, K / 2] cosines and sines.
  """
  cos, sin = rope
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  ).astype(x.dtype)


class Seen(NamedTuple):
  """Keys and values that queries attend to.

  Attributes:
    keys: [B, G, L, K], G heads.
    values: likewise.
    mask: bool, broadcastable to [B, 1, Q, L], or to [B, 1, 1, L] if there are
      more than `query_block` queries; False excludes a key.
    reach: [2] int32, how many positions before and after its own a query sees;
      None: queries and keys have no common positions.
  """

  keys: jax.Array
  values: jax.Array
  mask: jax.Array
  reach: jax.Array | None = None


class Attention(nn.Module):
  """Grouped-query attention: R = H / G heads of queries share keys and values.

  Attributes:
    shape: of the stack.
    head_dim: K.
    dtype: of the activations.
    scale: factor of the attention logits.
    soft_cap: see `T5GemmaConfig`.
    has_norms: whether queries and keys have norms (version 2).
    query_block: see `T5GemmaConfig`.
  """

  shape: StackShape
  head_dim: int
  dtype: Any
  scale: float
  soft_cap: float | None
  has_norms: bool
  query_block: int

  def setup(self):
    queries = self.shape.num_heads * self.head_dim
    keys = self.shape.num_kv_heads * self.head_dim
    self.query = layers.Dense(queries, ('embed', _QUERY_AXIS), self.dtype)
    self.key = layers.Dense(keys, ('embed', _KEY_AXIS), self.dtype)
    self.value = layers.Dense(keys, ('embed', _KEY_AXIS), self.dtype)
    self.out = layers.Dense(
      self.shape.emb_dim, (_QUERY_AXIS, 'embed'), self.dtype
    )
    if self.has_norms:
      self.query_norm = RMSNorm(self.dtype, 'kv')
      self.key_norm = RMSNorm(self.dtype, 'kv')

  def keys_values(
    self, x_BLD: jax.Array, rope: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values, [B, G, L, K] each; rope None: not rotated."""
    keys = self._split(self.key(x_BLD))
    if self.has_norms:
      keys = self.key_norm(keys)
    if rope is not None:
      keys = rotate(keys, rope)
    return keys, self._split(self.value(x_BLD))

  def attend(
    self, x_BQD: jax.Array, seen: Sequence[Seen], rope: jax.Array | None
  ) -> jax.Array:
    """Attends from x to keys and values, with one softmax over all of them.

    Args:
      x_BQD: [B, Q, D], from which the queries are computed.
      seen: keys and values in one or several parts.
      rope: cosines and sines of the queries' positions; None: not rotated.

    Returns:
      [B, Q, D].
    """
    query_BHQK = self._split(self.query(x_BQD))
    if self.has_norms:
      query_BHQK = self.query_norm(query_BHQK)
    if rope is not None:
      query_BHQK = rotate(query_BHQK, rope)
    attend = functools.partial(
      _attend, seen=seen, scale=self.scale, soft_cap=self.soft_cap
    )
    keys_values = [(part.keys, part.values) for part in seen]
    if query_BHQK.shape[2] <= self.query_block:
      out_BHQK = attend(0, query_BHQK, keys_values)
    else:
      out_BHQK = layers.in_query_blocks(
        attend, query_BHQK, keys_values, self.query_block
      )
    return self.out(out_BHQK.swapaxes(1, 2).reshape(*x_BQD.shape[:2], -1))

  def _split(self, x_BLJ: jax.Array) -> jax.Array:
    x_BLHK = x_BLJ.reshape(*x_BLJ.shape[:2], -1, self.head_dim)
    return x_BLHK.swapaxes(1, 2)


def _attend(
  start,
  query_BHQK: jax.Array,
  keys_values: Sequence[tuple[jax.Array, jax.Array]],
  *,
  seen: Sequence[Seen],
  scale: float,
  soft_cap: float | None,
) -> jax.Array:
  """Returns [B, H, Q, K] float32 for the queries from position `start` on."""
  B, _, Q, K = query_BHQK.shape

  def logits_of(query, keys, part):
    logits = layers.contract('BGRQK,BGLK->BGRQL', query, keys)
    logits = soft_capped(logits * scale, soft_cap)
    mask = part.mask
    if part.reach is not None:
      before, after = part.reach
      at_Q1 = start + jnp.arange(Q)[:, None]
      ahead_QL = jnp.arange(keys.shape[2]) - at_Q1
      mask &= (-before <= ahead_QL) & (ahead_QL <= after)
    return jnp.where(mask[:, :, None], logits, MASKED_LOGIT)

  query = query_BHQK.reshape(B, keys_values[0][0].shape[1], -1, Q, K)
  logits = [
    logits_of(query, keys, part)
    for (keys, _), part in zip(keys_values, seen, strict=True)
  ]
  probs = jax.nn.softmax(jnp.concatenate(logits, axis=-1))
  ends = np.cumsum([x.shape[-1] for x in logits])[:-1]
  out_BGRQK = sum(
    layers.contract('BGRQL,BGLK->BGRQK', probs_of_part, values)
    for probs_of_part, (_, values) in zip(
      jnp.split(probs.astype(query.dtype), ends, axis=-1),
      keys_values,
      strict=True,
    )
  )
  return out_BGRQK.reshape(B, -1, Q, K)


def soft_capped(logits: jax.Array, cap: float | None) -> jax.Array:
  """Returns cap * tanh(logits / cap), or the logits if there is no cap."""
  return logits if cap is None else cap * jnp.tanh(logits / cap)


# --- Layers -------------------------------------------------------------------


class _Layer(nn.Module):
  """Base of encoder and decoder layers."""

  config: T5GemmaConfig

  def _attention(self, shape: StackShape) -> Attention:
    c = self.config
    return Attention(
      shape=shape,
      head_dim=c.head_dim,
      dtype=c.dtype,
      scale=(c.query_pre_attn_scalar or c.head_dim) ** -0.5,
      soft_cap=c.attention_soft_cap,
      has_norms=c.version == 2,
      query_block=c.query_block,
    )

  def _mlp(self, shape: StackShape) -> layers.Mlp:
    c = self.config
    return layers.Mlp(
      mlp_dim=shape.mlp_dim,
      emb_dim=shape.emb_dim,
      activations=c.mlp_activations,
      dtype=c.dtype,
      dropout_rate=c.dropout_rate,
    )

  def _norm(self) -> RMSNorm:
    return RMSNorm(self.config.dtype)


class EncoderLayer(_Layer):
  """Self-attention and feed-forward, with norms before and after each."""

  def setup(self):
    shape = self.config.encoder
    self.pre_attention_layer_norm = self._norm()
    self.attention = self._attention(shape)
    self.post_attention_layer_norm = self._norm()
    self.pre_mlp_layer_norm = self._norm()
    self.mlp = self._mlp(shape)
    self.post_mlp_layer_norm = self._norm()
    self.dropout = _dropout(self.config)

  def __call__(self, x_BSD, deterministic, *, mask, reach, rope, is_full):
    """Returns [B, S, D].

    Args:
      x_BSD: [B, S, D].
      deterministic: False applies dropout.
      mask: [B, 1, 1, S] bool, True where the inputs are not padding.
      reach: [2, 2], of layers with a window, and without; see `Seen`.
      rope: see `rotary`.
      is_full: 1 if the layer has no window, else 0.
    """
    rope = rope[is_full]
    h = self.pre_attention_layer_norm(x_BSD)
    keys_values = self.attention.keys_values(h, rope)
    seen = Seen(*keys_values, mask, reach[is_full])
    h = self.post_attention_layer_norm(self.attention.attend(h, [seen], rope))
    x_BSD += self.dropout(h, deterministic=deterministic)
    h = self.mlp(self.pre_mlp_layer_norm(x_BSD), deterministic)
    h = self.post_mlp_layer_norm(h)
    return x_BSD + self.dropout(h, deterministic=deterministic)


class DecoderLayer(_Layer):
  """Attention to targets and encoder outputs, and feed-forward.

  Version 1 attends to the encoder outputs in a block of its own. Version 2 has
  one block: queries, keys and values of both come from the same kernels, and
  there is one softmax. Keys of encoder outputs are not rotated.
  """

  def setup(self):
    shape = self.config.decoder
    self.pre_self_attention_layer_norm = self._norm()
    self.self_attention = self._attention(shape)
    self.post_self_attention_layer_norm = self._norm()
    if self.config.has_cross_attention:
      self.pre_cross_attention_layer_norm = self._norm()
      self.encoder_decoder_attention = self._attention(shape)
      self.post_cross_attention_layer_norm = self._norm()
    self.pre_mlp_layer_norm = self._norm()
    self.mlp = self._mlp(shape)
    self.post_mlp_layer_norm = self._norm()
    self.dropout = _dropout(self.config)

  def __call__(
    self,
    x_BTD,
    deterministic,
    *,
    encoded,
    encoder_mask,
    reach,
    rope,
    is_full,
  ):
    """Returns [B, T, D], for all positions at once.

    Args:
      x_BTD: [B, T, D].
      deterministic: False applies dropout.
      encoded: [B, S, D].
      encoder_mask: [B, 1, 1, S] bool, True where the inputs are not padding.
      reach: [2, 2], of layers with a window, and without; see `Seen`.
      rope: see `rotary`.
      is_full: 1 if the layer has no window, else 0.
    """
    rope = rope[is_full]
    h = self.pre_self_attention_layer_norm(x_BTD)
    keys_values = self.self_attention.keys_values(h, rope)
    own = Seen(*keys_values, jnp.ones((1, 1, 1, 1), bool), reach[is_full])
    cross = Seen(*self.cross_keys_values(encoded), encoder_mask)
    return self._after_keys_values(x_BTD, h, own, cross, rope, deterministic)

  def cross_keys_values(self, encoded_BSD) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values of the encoder outputs, [B, G, S, K] each."""
    attention = self.self_attention
    if self.config.has_cross_attention:
      attention = self.encoder_decoder_attention
    return attention.keys_values(encoded_BSD, rope=None)

  def cached(self, x_BND, write, keys, values, mask, cross: Seen, rope):
    """Returns N positions [B, N, D], and keys and values with those of them.

    Args:
      x_BND: [B, N, D].
      write: (cached keys or values, those of x) -> all of them.
      keys: [B, G, L, K].
      values: likewise.
      mask: see `Seen`, of all keys.
      cross: of the encoder outputs.
      rope: cosines and sines of the positions.
    """
    h = self.pre_self_attention_layer_norm(x_BND)
    new_keys, new_values = self.self_attention.keys_values(h, rope)
    own = Seen(write(keys, new_keys), write(values, new_values), mask)
    x_BND = self._after_keys_values(x_BND, h, own, cross, rope, True)
    return x_BND, own.keys, own.values

  def _after_keys_values(self, x, h, own, cross, rope, deterministic):
    if self.config.has_cross_attention:
      h = self.self_attention.attend(h, [own], rope)
      h = self.post_self_attention_layer_norm(h)
      x += self.dropout(h, deterministic=deterministic)
      h = self.encoder_decoder_attention.attend(
        self.pre_cross_attention_layer_norm(x), [cross], rope=None
      )
      h = self.post_cross_attention_layer_norm(h)
    else:
      h = self.self_attention.attend(h, [own, cross], rope)
      h = self.post_self_attention_layer_norm(h)
    x += self.dropout(h, deterministic=deterministic)
    h = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
    h = self.post_mlp_layer_norm(h)
    return x + self.dropout(h, deterministic=deterministic)


def _dropout(config: T5GemmaConfig) -> nn.Dropout:
  return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


# --- Stacks -------------------------------------------------------------------


class Cache(NamedTuple):
  """The state of cached decoding; tuples have one entry per layer."""

  step: jax.Array  # [] int32, position of the next token
  # [B, G, L, K]; L is T, or less if the layer has a window
  self_keys: tuple[jax.Array, ...]
  self_values: tuple[jax.Array, ...]
  cross_keys: tuple[jax.Array, ...]  # [B, G, S, K], computed once
  cross_values: tuple[jax.Array, ...]
  encoder_mask: jax.Array  # [B, 1, 1, S] bool


class Encoder(nn.Module):
  """Maps embedded tokens [B, S, D] to encoder outputs [B, S, D]."""

  config: T5GemmaConfig
  placement: Placement | None

  def setup(self):
    c = self.config
    self.layers = layer_stack.make_layers(EncoderLayer, c, c.num_encoder_layers)
    self.encoder_norm = RMSNorm(c.dtype)
    self.dropout = _dropout(c)

  def __call__(self, x_BSD, mask, deterministic, num_microbatches):
    """Returns [B, S, D]; mask is [B, 1, 1, S] bool."""
    c = self.config
    x_BSD = self.dropout(x_BSD, deterministic=deterministic)
    x_BSD = layer_stack.run_layers(
      self,
      EncoderLayer,
      x_BSD,
      deterministic,
      per_row={'mask': mask},
      shared={
        'reach': _encoder_reach(c, x_BSD.shape[1]),
        'rope': rotary(c, jnp.arange(x_BSD.shape[1])),
      },
      per_layer={'is_full': c.is_full(c.num_encoder_layers)},
      num_microbatches=num_microbatches,
    )
    x_BSD = self.encoder_norm(x_BSD)
    return self.dropout(x_BSD, deterministic=deterministic)


def _encoder_reach(config: T5GemmaConfig, length: int) -> jax.Array:
  """Returns [2, 2], of layers with a window, and without; see `Seen`."""
  W = config.window
  windowed = (W, W) if config.version == 1 else ((W - 1) // 2, W // 2)
  return jnp.int32([windowed, (length, length)])


class Decoder(nn.Module):
  """Maps embedded tokens to hidden states, all at once or one by one."""

  config: T5GemmaConfig
  placement: Placement | None

  def setup(self):
    c = self.config
    self.layers = layer_stack.make_layers(DecoderLayer, c, c.num_decoder_layers)
    self.decoder_norm = RMSNorm(c.dtype)
    self.dropout = _dropout(c)

  def __call__(
    self, x_BTD, encoded_BSD, encoder_mask, deterministic, num_microbatches
  ):
    """Returns teacher-forced hidden states [B, T, D], after the last norm."""
    c = self.config
    length = x_BTD.shape[1]
    x_BTD = self.dropout(x_BTD, deterministic=deterministic)
    x_BTD = layer_stack.run_layers(
      self,
      DecoderLayer,
      x_BTD,
      deterministic,
      per_row={'encoded': encoded_BSD, 'encoder_mask': encoder_mask},
      shared={
        'reach': jnp.int32([(c.window - 1, 0), (length, 0)]),
        'rope': rotary(c, jnp.arange(length)),
      },
      per_layer={'is_full': c.is_full(c.num_decoder_layers)},
      num_microbatches=num_microbatches,
    )
    x_BTD = self.decoder_norm(x_BTD)
    return self.dropout(x_BTD, deterministic=deterministic)

  def start_cache(self, encoded_BSD, encoder_mask, max_decode_len) -> Cache:
    """Returns a cache with cross-attention keys and values; others are zero."""
    c = self.config
    cross = [layer.cross_keys_values(encoded_BSD) for layer in self.layers]
    windowed = min(c.window + MAX_BLOCK - 1, max_decode_len)
    empty = tuple(
      self._constrain(
        jnp.zeros(
          (
            encoded_BSD.shape[0],
            c.num_kv_heads,
            max_decode_len if is_full else windowed,
            c.head_dim,
          ),
          c.dtype,
        )
      )
      for is_full in c.is_full(c.num_decoder_layers)
    )
    return Cache(
      step=jnp.int32(0),
      self_keys=empty,
      self_values=empty,
      cross_keys=tuple(self._constrain(key) for key, _ in cross),
      cross_values=tuple(self._constrain(value) for _, value in cross),
      encoder_mask=encoder_mask,
    )

  def step(self, cache: Cache, x_B1D) -> tuple[jax.Array, Cache]:
    """Returns the next position's hidden state [B, 1, D], and the cache."""
    hidden, cache = self._advance(cache, cache.step[None, None], x_B1D)
    return hidden, cache._replace(step=cache.step + 1)

  def block(self, cache: Cache, offsets_B, x_BND) -> tuple[jax.Array, Cache]:
    """Returns hidden states [B, N, D] of N positions, and the cache."""
    positions_BN = offsets_B[:, None] + jnp.arange(x_BND.shape[1])
    return self._advance(cache, positions_BN, x_BND)

  def _advance(self, cache, positions, x_BND):
    """Runs positions [B, N], or [1, 1] if all rows have the same."""
    c = self.config
    rope = rotary(c, positions[:, None])
    keys, values = [], []
    for i, is_full in enumerate(c.is_full(c.num_decoder_layers)):
      size = cache.self_keys[i].shape[2]
      window = size if is_full else c.window
      x_BND, key, value = self.layers[i].cached(
        x_BND,
        functools.partial(_write, positions, is_ring=size > window),
        cache.self_keys[i],
        cache.self_values[i],
        _cached_mask(positions, size, window),
        Seen(cache.cross_keys[i], cache.cross_values[i], cache.encoder_mask),
        rope[is_full],
      )
      x_BND = layer_stack.constrain(x_BND, self.placement)
      keys.append(self._constrain(key))
      values.append(self._constrain(value))
    cache = cache._replace(self_keys=tuple(keys), self_values=tuple(values))
    return self.decoder_norm(x_BND), cache

  def _constrain(self, keys_or_values_BGLK: jax.Array) -> jax.Array:
    return partitioning.constrain(
      keys_or_values_BGLK, self.placement, 'batch', _KEY_HEADS, 'length', 'kv'
    )


# A layer with a window caches its last L = window + MAX_BLOCK - 1 positions,
# position t at t % L. A block of that many positions replaces none that a later
# query sees, also if some of the block are then decoded again.


def _write(
  positions: jax.Array, cached: jax.Array, new: jax.Array, *, is_ring: bool
) -> jax.Array:
  """Returns cached keys or values with those of some positions.

  Args:
    positions: [B, N], consecutive in each row, or [1, 1].
    cached: [B, G, L, K].
    new: [B, G, N, K].
    is_ring: whether L may be less than the number of positions.
  """
  size = cached.shape[2]
  if positions.shape == (1, 1):
    at = (0, 0, positions[0, 0] % size, 0)
    return jax.lax.dynamic_update_slice(cached, new, at)
  if not is_ring:
    return layers.write_block(cached, new, positions[:, 0])
  num = positions.shape[1]
  if num > MAX_BLOCK:
    raise ValueError(
      f'T5Gemma decodes at most {MAX_BLOCK} positions at once, got {num}.'
    )
  rows = jnp.arange(cached.shape[0])[:, None]
  # The indexed axes come first: [B, N, G, K].
  return cached.at[rows, :, positions % size].set(new.swapaxes(1, 2))


def _cached_mask(positions: jax.Array, size: int, window: int) -> jax.Array:
  """Returns which cached positions are seen from some, [B, 1, N, size].

  Args:
    positions: [B, N] of the queries.
    size: number of cached positions, L; position t is at t % L.
    window: the last so many are seen.
  """
  age = (positions[:, :, None] - jnp.arange(size)) % size
  return (age <= jnp.minimum(positions, window - 1)[:, :, None])[:, None]


# --- The model ----------------------------------------------------------------


def placed(
  config: T5GemmaConfig, placement: Placement | None
) -> Placement | None:
  """Returns a placement with rules for heads of queries, keys and values.

  They are sharded like T5's heads if the mesh divides their number, and
  otherwise replicated: 1 or 4 heads of keys and values are fewer than the
  devices of most meshes.
  """
  if placement is None:
    return None
  shards = placement.num_shards(_QUERY_AXIS)

  def over(numbers):
    divides = all(number % shards == 0 for number in numbers)
    return 'model' if shards > 1 and divides else None

  queries = over((config.num_heads, config.encoder.num_heads))
  keys = over((config.num_kv_heads, config.encoder.num_kv_heads))
  own = {_QUERY_AXIS: queries, _KEY_AXIS: keys, _KEY_HEADS: keys}
  rules = tuple(rule for rule in placement.rules if rule[0] not in own)
  return placement._replace(rules=(*own.items(), *rules))


class T5Gemma(encoder_decoder.EncoderDecoder):
  """The encoder-decoder; its methods are those of `interface.Model`.

  `decode_block` takes at most MAX_BLOCK positions if a window is shorter than
  `max_decode_len`, and a row may then go back by one block.

  Attributes:
    config: its shape.
    placement: the sharding of parameters and activations, with rules for heads
      (see `placed`); None: one device.
  """

  config: T5GemmaConfig
  placement: Placement | None = None

  def __post_init__(self):
    object.__setattr__(self, 'placement', placed(self.config, self.placement))
    super().__post_init__()

  def setup(self):
    c = self.config
    eoi_id = c.eoi_id if c.version == 2 else None
    self.token_embedder = Embed(c.vocab_size, c.emb_dim, c.dtype, eoi_id)
    if c.version == 1:
      self.encoder_embedder = Embed(c.vocab_size, c.encoder.emb_dim, c.dtype)
    self.encoder = Encoder(c, self.placement)
    self.decoder = Decoder(c, self.placement)

  def encode(
    self, encoder_input_tokens, *, deterministic=True, num_microbatches=1
  ):
    """Returns encoder outputs [B, S, D]; see `decode` for the keywords."""
    embedder = self.token_embedder
    if self.config.version == 1:
      embedder = self.encoder_embedder
    return self.encoder(
      embedder(encoder_input_tokens),
      self._encoder_mask(encoder_input_tokens),
      deterministic,
      num_microbatches,
    )

  def unembed(self, hidden):
    """Maps hidden states [..., D] to logits [..., V] in float32."""
    logits = self.token_embedder.attend(hidden)
    return soft_capped(logits, self.config.final_soft_cap)

  def head_params(self, params: Params) -> Params:
    """Returns the part of the parameters that `unembed` reads."""
    return {'token_embedder': params['token_embedder']}
