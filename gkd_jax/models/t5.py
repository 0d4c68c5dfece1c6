# SPDX-License-Identifier: Apache-2.0
"""The family `t5` and its published sizes.

It has T5 1.0 and 1.1, FLAN-T5, mT5, umT5, ByT5, MADLAD-400 and FRED-T5.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gkd_jax.batch import SpecialIds
from gkd_jax.models import encoder_decoder, layer_stack, layers
from gkd_jax.models.interface import StackShape
from gkd_jax.parallel import partitioning

Params = Any


@dataclasses.dataclass(frozen=True)
class T5Config:
  """The shape of a T5.

  Attributes:
    vocab_size: rows of the embedding, at least the tokenizer's number of ids.
    emb_dim: D, width of the residual stream.
    num_heads: H.
    head_dim: K; H * K need not equal D.
    mlp_dim: F.
    num_encoder_layers: depth of the encoder.
    num_decoder_layers: depth of the decoder.
    mlp_activations: ('relu',) is T5 1.0, ('gelu', 'linear') T5 1.1.
    logits_via_embedding: True ties the output projection to the embedding
      (T5 1.0).
    scale_decoder_outputs: whether hidden states are scaled by D ** -0.5 before
      the output projection; None: if the projection is tied (T5 1.0).
    dropout_rate: in training, at the same places as in T5X.
    dtype: of the activations, 'float32' or 'bfloat16'; weights are float32.
    remat: whether the backward pass recomputes each layer, to save memory.
    scan_layers: whether a stack of layers is compiled as one loop, except in
      decoding. It compiles faster, and holds a copy of the weights while it
      runs. The parameters and their names are the same.
    query_block: attention over more positions than these is computed in blocks
      of so many queries, forwards and backwards: less memory.
    relpos_buckets: number of buckets of the relative position bias.
    relpos_max_distance: all larger distances share a bucket.
    relpos_bias_per_layer: whether each layer has its own bias (umT5, and T5X's
      scalable_t5), or the layers of a stack share one (T5).
    pad_id: pads the encoder's input; never sampled.
    start_id: the decoder's first input; pad in almost every T5.
    eos_id: ends an output.
  """

  family: ClassVar[str] = 't5'
  has_cross_attention: ClassVar[bool] = True

  vocab_size: int
  emb_dim: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  num_encoder_layers: int
  num_decoder_layers: int
  mlp_activations: tuple[str, ...] = ('gelu', 'linear')
  logits_via_embedding: bool = False
  scale_decoder_outputs: bool | None = None
  dropout_rate: float = 0.0
  dtype: str = 'float32'
  remat: bool = False
  scan_layers: bool = False
  query_block: int = 256
  relpos_buckets: int = 32
  relpos_max_distance: int = 128
  relpos_bias_per_layer: bool = False
  pad_id: int = 0
  start_id: int = 0
  eos_id: int = 1

  def __post_init__(self):
    # gin and JSON write lists; a config must be hashable.
    object.__setattr__(self, 'mlp_activations', tuple(self.mlp_activations))
    if self.scale_decoder_outputs == self.logits_via_embedding:
      # Normalized, so that equal configs compare as equal.
      object.__setattr__(self, 'scale_decoder_outputs', None)
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(
        f"T5Config.dtype must be 'float32' or 'bfloat16', got {self.dtype!r}."
      )
    for name in ('emb_dim', 'num_heads', 'head_dim', 'mlp_dim', 'query_block'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'T5Config.{name} must be 1 or more, got {getattr(self, name)}.'
        )
    for name in ('pad_id', 'start_id', 'eos_id'):
      if not 0 <= getattr(self, name) < self.vocab_size:
        raise ValueError(
          f'T5Config.{name} must be an id of the embedding, from 0 to '
          f'{self.vocab_size - 1}, got {getattr(self, name)}.'
        )
    for name in ('num_encoder_layers', 'num_decoder_layers'):
      if getattr(self, name) < 0:
        raise ValueError(
          f'T5Config.{name} must be 0 or more, got {getattr(self, name)}.'
        )
    # Distances from num_buckets / 2 on (the decoder's) are on a log scale.
    if not 4 <= self.relpos_buckets < 2 * self.relpos_max_distance:
      raise ValueError(
        'T5Config.relpos_buckets must be from 4 to less than twice '
        f'relpos_max_distance {self.relpos_max_distance}, got '
        f'{self.relpos_buckets}.'
      )
    if not 0.0 <= self.dropout_rate < 1.0:
      raise ValueError(
        f'T5Config.dropout_rate must be in [0, 1), got {self.dropout_rate}.'
      )

  def special_ids(self, num_ids: int) -> SpecialIds:
    """Returns the special ids for a vocabulary of `num_ids` ids."""
    return SpecialIds(
      pad=self.pad_id,
      start=self.start_id,
      eos=self.eos_id,
      never_written=(self.pad_id,),
      num_ids=num_ids,
    )

  def describe(self) -> str:
    """Returns a short description, such as 'T5 1.1 of width 64 ...'."""
    kind = 'T5 1.0' if self.mlp_activations == ('relu',) else 'T5 1.1'
    if self.relpos_bias_per_layer:
      kind = 'umT5'
    return (
      f'{kind} of width {self.emb_dim} with {self.num_encoder_layers} + '
      f'{self.num_decoder_layers} layers'
    )

  @property
  def encoder(self) -> StackShape:
    """The shape of the encoder."""
    return StackShape(
      self.num_encoder_layers,
      self.emb_dim,
      self.num_heads,
      self.num_heads,
      self.mlp_dim,
    )

  @property
  def decoder(self) -> StackShape:
    """The shape of the decoder."""
    return self.encoder._replace(num_layers=self.num_decoder_layers)

  @property
  def num_tables(self) -> int:
    """The embedding, and the output projection of an untied model."""
    return 1 if self.logits_via_embedding else 2

  @property
  def scales_decoder_outputs(self) -> bool:
    """Whether hidden states are scaled before the output projection."""
    if self.scale_decoder_outputs is None:
      return self.logits_via_embedding
    return self.scale_decoder_outputs


def _v1_0(emb_dim, num_heads, head_dim, mlp_dim, num_layers) -> T5Config:
  return T5Config(
    vocab_size=32128,
    emb_dim=emb_dim,
    num_heads=num_heads,
    head_dim=head_dim,
    mlp_dim=mlp_dim,
    num_encoder_layers=num_layers,
    num_decoder_layers=num_layers,
    mlp_activations=('relu',),
    logits_via_embedding=True,
  )


def _v1_1(*shape) -> T5Config:
  return dataclasses.replace(
    _v1_0(*shape),
    mlp_activations=('gelu', 'linear'),
    logits_via_embedding=False,
  )


def _mt5(*shape) -> T5Config:
  return dataclasses.replace(_v1_1(*shape), vocab_size=250_112)


# Source: t5x/examples/t5/{t5_1_0,t5_1_1,mt5}/*.gin; UL2's config.json. FLAN-T5
# has the 1.1 shapes, mT0 and Aya-101 those of mT5, FLAN-UL2 that of UL2.
SIZES: dict[str, T5Config] = {
  't5_1_0_small': _v1_0(512, 8, 64, 2048, 6),
  't5_1_0_base': _v1_0(768, 12, 64, 3072, 12),
  't5_1_0_large': _v1_0(1024, 16, 64, 4096, 24),
  't5_1_0_3b': _v1_0(1024, 32, 128, 16384, 24),
  't5_1_0_11b': _v1_0(1024, 128, 128, 65536, 24),
  't5_1_1_small': _v1_1(512, 6, 64, 1024, 8),
  't5_1_1_base': _v1_1(768, 12, 64, 2048, 12),
  't5_1_1_large': _v1_1(1024, 16, 64, 2816, 24),
  't5_1_1_xl': _v1_1(2048, 32, 64, 5120, 24),
  't5_1_1_xxl': _v1_1(4096, 64, 64, 10240, 24),
  'mt5_small': _mt5(512, 6, 64, 1024, 8),
  'mt5_base': _mt5(768, 12, 64, 2048, 12),
  'mt5_large': _mt5(1024, 16, 64, 2816, 24),
  'mt5_xl': _mt5(2048, 32, 64, 5120, 24),
  'mt5_xxl': _mt5(4096, 64, 64, 10240, 24),
  'ul2': dataclasses.replace(
    _v1_0(4096, 16, 256, 16384, 32), mlp_activations=('silu', 'linear')
  ),
}


class Cache(NamedTuple):
  """The state of cached decoding; tuples have one entry per layer."""

  step: jax.Array  # [] int32, position of the next token
  self_keys: tuple[jax.Array, ...]  # [B, H, T, K]
  self_values: tuple[jax.Array, ...]
  cross_keys: tuple[jax.Array, ...]  # [B, H, S, K], computed once
  cross_values: tuple[jax.Array, ...]
  encoder_mask: jax.Array  # [B, 1, 1, S] bool


class _Layer(nn.Module):
  """Base of encoder and decoder layers."""

  config: T5Config

  def _attention(self) -> layers.Attention:
    c = self.config
    return layers.Attention(
      num_heads=c.num_heads,
      head_dim=c.head_dim,
      emb_dim=c.emb_dim,
      dtype=c.dtype,
      dropout_rate=c.dropout_rate,
      query_block=c.query_block,
    )

  def _mlp(self) -> layers.Mlp:
    c = self.config
    return layers.Mlp(
      mlp_dim=c.mlp_dim,
      emb_dim=c.emb_dim,
      activations=c.mlp_activations,
      dtype=c.dtype,
      dropout_rate=c.dropout_rate,
    )


class EncoderLayer(_Layer):
  """Self-attention and feed-forward, each with pre-norm and residual."""

  def setup(self):
    dtype = self.config.dtype
    if self.config.relpos_bias_per_layer:
      self.relpos_bias = _relpos_bias(self.config, bidirectional=True)
    self.pre_attention_layer_norm = layers.RMSNorm(dtype)
    self.attention = self._attention()
    self.pre_mlp_layer_norm = layers.RMSNorm(dtype)
    self.mlp = self._mlp()
    self.dropout = _dropout(self.config)

  def __call__(self, x_BSD, deterministic, *, bias, mask):
    """Returns [B, S, D]; bias is None if each layer has its own."""
    if self.config.relpos_bias_per_layer:
      bias = _bias(self.relpos_bias, x_BSD.shape[1], self.config)
    h = self.pre_attention_layer_norm(x_BSD)
    h = self.attention(h, h, bias=bias, mask=mask, deterministic=deterministic)
    x_BSD += self.dropout(h, deterministic=deterministic)
    h = self.mlp(self.pre_mlp_layer_norm(x_BSD), deterministic)
    return x_BSD + self.dropout(h, deterministic=deterministic)


class DecoderLayer(_Layer):
  """Causal self-attention, attention to the encoder, feed-forward."""

  def setup(self):
    dtype = self.config.dtype
    if self.config.relpos_bias_per_layer:
      self.relpos_bias = _relpos_bias(self.config, bidirectional=False)
    self.pre_self_attention_layer_norm = layers.RMSNorm(dtype)
    self.self_attention = self._attention()
    self.pre_cross_attention_layer_norm = layers.RMSNorm(dtype)
    self.encoder_decoder_attention = self._attention()
    self.pre_mlp_layer_norm = layers.RMSNorm(dtype)
    self.mlp = self._mlp()
    self.dropout = _dropout(self.config)

  def __call__(self, x_BTD, deterministic, *, encoded, bias, encoder_mask):
    """Returns [B, T, D], for all positions at once."""
    if self.config.relpos_bias_per_layer:
      bias = _bias(self.relpos_bias, x_BTD.shape[1], self.config)
    h = self.pre_self_attention_layer_norm(x_BTD)
    keys, values = self.self_attention.keys_values(h)
    return self._after_keys_values(
      x_BTD,
      h,
      (keys, values),
      self.encoder_decoder_attention.keys_values(encoded),
      bias=bias,
      self_mask=None,
      causal=True,
      encoder_mask=encoder_mask,
      deterministic=deterministic,
    )

  def cached(
    self,
    x_BND,
    write,
    keys,
    values,
    cross,
    *,
    bias,
    bias_of,
    self_mask,
    encoder_mask,
  ):
    """Returns N positions [B, N, D], and keys and values with those of them.

    Args:
      x_BND: [B, N, D].
      write: (cached keys or values, those of x) -> all of them.
      keys: [B, H, T, K].
      values: likewise.
      cross: keys and values of the encoder outputs.
      bias: of the positions; None if each layer has its own.
      bias_of: relative position bias of a layer -> bias of the positions.
      self_mask: see `layers.Attention.attend`.
      encoder_mask: likewise.
    """
    if self.config.relpos_bias_per_layer:
      bias = bias_of(self.relpos_bias)
    h = self.pre_self_attention_layer_norm(x_BND)
    key, value = self.self_attention.keys_values(h)
    own = write(keys, key), write(values, value)
    x_BND = self._after_keys_values(
      x_BND,
      h,
      own,
      cross,
      bias=bias,
      self_mask=self_mask,
      encoder_mask=encoder_mask,
      deterministic=True,
    )
    return x_BND, *own

  def _after_keys_values(
    self,
    x,
    h,
    own,
    cross,
    *,
    bias,
    self_mask,
    encoder_mask,
    deterministic,
    causal=False,
  ):
    h = self.self_attention.attend(
      h,
      *own,
      bias=bias,
      mask=self_mask,
      deterministic=deterministic,
      causal=causal,
    )
    x += self.dropout(h, deterministic=deterministic)
    h = self.encoder_decoder_attention.attend(
      self.pre_cross_attention_layer_norm(x),
      *cross,
      bias=None,
      mask=encoder_mask,
      deterministic=deterministic,
    )
    x += self.dropout(h, deterministic=deterministic)
    h = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
    return x + self.dropout(h, deterministic=deterministic)


class Encoder(nn.Module):
  """Maps embedded tokens [B, S, D] to encoder outputs [B, S, D]."""

  config: T5Config
  placement: partitioning.Placement | None

  def setup(self):
    c = self.config
    if not c.relpos_bias_per_layer:
      self.relpos_bias = _relpos_bias(c, bidirectional=True)
    self.layers = layer_stack.make_layers(EncoderLayer, c, c.num_encoder_layers)
    self.encoder_norm = layers.RMSNorm(c.dtype)
    self.dropout = _dropout(c)

  def __call__(self, x_BSD, mask, deterministic, num_microbatches):
    """Returns [B, S, D]; mask is [B, 1, 1, S] bool."""
    bias = None
    if not self.config.relpos_bias_per_layer:
      bias = _bias(self.relpos_bias, x_BSD.shape[1], self.config)
    x_BSD = self.dropout(x_BSD, deterministic=deterministic)
    x_BSD = layer_stack.run_layers(
      self,
      EncoderLayer,
      x_BSD,
      deterministic,
      per_row={'mask': mask},
      shared={'bias': bias},
      num_microbatches=num_microbatches,
    )
    x_BSD = self.encoder_norm(x_BSD)
    return self.dropout(x_BSD, deterministic=deterministic)


class Decoder(nn.Module):
  """Maps embedded tokens to hidden states, all at once or one by one."""

  config: T5Config
  placement: partitioning.Placement | None

  def setup(self):
    c = self.config
    if not c.relpos_bias_per_layer:
      self.relpos_bias = _relpos_bias(c, bidirectional=False)
    self.layers = layer_stack.make_layers(DecoderLayer, c, c.num_decoder_layers)
    self.decoder_norm = layers.RMSNorm(c.dtype)
    self.dropout = _dropout(c)
    if not c.logits_via_embedding:
      self.logits_dense = layers.LogitsDense(c.vocab_size, c.dtype)

  def __call__(
    self, x_BTD, encoded_BSD, encoder_mask, deterministic, num_microbatches
  ):
    """Returns teacher-forced hidden states [B, T, D], after the last norm."""
    bias = None
    if not self.config.relpos_bias_per_layer:
      bias = _bias(self.relpos_bias, x_BTD.shape[1], self.config)
    x_BTD = self.dropout(x_BTD, deterministic=deterministic)
    x_BTD = layer_stack.run_layers(
      self,
      DecoderLayer,
      x_BTD,
      deterministic,
      per_row={'encoded': encoded_BSD, 'encoder_mask': encoder_mask},
      shared={'bias': bias},
      num_microbatches=num_microbatches,
    )
    x_BTD = self.decoder_norm(x_BTD)
    return self.dropout(x_BTD, deterministic=deterministic)

  def start_cache(self, encoded_BSD, encoder_mask, max_decode_len) -> Cache:
    """Returns a cache with cross-attention keys and values; others are zero."""
    c = self.config
    cross = [
      layer.encoder_decoder_attention.keys_values(encoded_BSD)
      for layer in self.layers
    ]
    shape = (encoded_BSD.shape[0], c.num_heads, max_decode_len, c.head_dim)
    empty = tuple(
      self._constrain(jnp.zeros(shape, c.dtype)) for _ in self.layers
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
    step, max_decode_len = cache.step, cache.self_keys[0].shape[2]
    hidden, cache = self._advance(
      cache,
      x_B1D,
      lambda cached, new: jax.lax.dynamic_update_slice(
        cached, new, (0, 0, step, 0)
      ),
      lambda relpos_bias: _bias_of_step(relpos_bias, step, max_decode_len),
      (jnp.arange(max_decode_len) <= step)[None, None, None],
    )
    return hidden, cache._replace(step=step + 1)

  def block(self, cache: Cache, offsets_B, x_BND) -> tuple[jax.Array, Cache]:
    """Returns hidden states [B, N, D] of N positions, and the cache."""
    num, max_decode_len = x_BND.shape[1], cache.self_keys[0].shape[2]
    positions_BN1 = _positions(offsets_B, num)[:, :, None]
    return self._advance(
      cache,
      x_BND,
      lambda cached, new: layers.write_block(cached, new, offsets_B),
      lambda relpos_bias: _bias_of_block(
        relpos_bias, offsets_B, num, max_decode_len
      ),
      (jnp.arange(max_decode_len) <= positions_BN1)[:, None],
    )

  def _advance(self, cache, x_BND, write, bias_of, self_mask):
    """Runs the layers on some positions; see `DecoderLayer.cached`."""
    bias = None
    if not self.config.relpos_bias_per_layer:
      bias = bias_of(self.relpos_bias)
    keys, values = [], []
    for i, layer in enumerate(self.layers):
      x_BND, key, value = layer.cached(
        x_BND,
        write,
        cache.self_keys[i],
        cache.self_values[i],
        (cache.cross_keys[i], cache.cross_values[i]),
        bias=bias,
        bias_of=bias_of,
        self_mask=self_mask,
        encoder_mask=cache.encoder_mask,
      )
      x_BND = layer_stack.constrain(x_BND, self.placement)
      keys.append(self._constrain(key))
      values.append(self._constrain(value))
    cache = cache._replace(self_keys=tuple(keys), self_values=tuple(values))
    return self.decoder_norm(x_BND), cache

  def _constrain(self, keys_or_values_BHLK: jax.Array) -> jax.Array:
    return partitioning.constrain(
      keys_or_values_BHLK, self.placement, 'batch', 'heads', 'length', 'kv'
    )


class T5(encoder_decoder.EncoderDecoder):
  """The encoder-decoder; its methods are those of `interface.Model`.

  Attributes:
    config: its shape.
    placement: the sharding of parameters and activations; None: one device.
  """

  config: T5Config
  placement: partitioning.Placement | None = None

  def setup(self):
    c = self.config
    self.token_embedder = layers.Embed(c.vocab_size, c.emb_dim, c.dtype)
    self.encoder = Encoder(c, self.placement)
    self.decoder = Decoder(c, self.placement)

  def encode(
    self, encoder_input_tokens, *, deterministic=True, num_microbatches=1
  ):
    """Returns encoder outputs [B, S, D]; see `decode` for the keywords."""
    return self.encoder(
      self.token_embedder(encoder_input_tokens),
      self._encoder_mask(encoder_input_tokens),
      deterministic,
      num_microbatches,
    )

  def unembed(self, hidden):
    """Maps hidden states [..., D] to logits [..., V] in float32."""
    if self.config.scales_decoder_outputs:
      hidden *= self.config.emb_dim**-0.5
    if self.config.logits_via_embedding:
      return self.token_embedder.attend(hidden)
    return self.decoder.logits_dense(hidden)

  def head_params(self, params: Params) -> Params:
    """Returns the part of the parameters that `unembed` reads."""
    if self.config.logits_via_embedding:
      return {'token_embedder': params['token_embedder']}
    return {'decoder': {'logits_dense': params['decoder']['logits_dense']}}


def _dropout(config: T5Config) -> nn.Dropout:
  # Broadcast over length, as in T5X.
  return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


def _relpos_bias(
  config: T5Config, *, bidirectional: bool
) -> layers.RelativePositionBias:
  return layers.RelativePositionBias(
    num_heads=config.num_heads,
    bidirectional=bidirectional,
    dtype=config.dtype,
    num_buckets=config.relpos_buckets,
    max_distance=config.relpos_max_distance,
  )


def _bias(
  relpos_bias: layers.RelativePositionBias, length: int, config: T5Config
) -> layers.Bias:
  """Returns the bias of self-attention over `length` positions."""
  if length > config.query_block:
    # The last block is padded.
    num_blocks = -(-length // config.query_block)
    return relpos_bias.by_distance(num_blocks * config.query_block, length)
  return relpos_bias(length, length)


def _bias_of_step(
  relpos_bias: layers.RelativePositionBias, step: jax.Array, max_len: int
) -> jax.Array:
  """Returns the bias of one query position, [1, H, 1, max_len]."""
  bias_1HTT = relpos_bias(max_len, max_len)
  return jax.lax.dynamic_slice_in_dim(bias_1HTT, step, 1, axis=2)


def _bias_of_block(
  relpos_bias: layers.RelativePositionBias,
  offsets_B: jax.Array,
  num: int,
  max_len: int,
) -> jax.Array:
  """Returns the bias of `num` query positions per row, [B, H, num, max_len]."""
  bias_HTT = relpos_bias(max_len, max_len)[0]
  bias_HBNT = jnp.take(bias_HTT, _positions(offsets_B, num), axis=1)
  return bias_HBNT.swapaxes(0, 1)


def _positions(offsets_B: jax.Array, num: int) -> jax.Array:
  """Returns the positions [B, num] from each row's offset on."""
  return offsets_B[:, None] + jnp.arange(num)
