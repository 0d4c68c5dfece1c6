# SPDX-License-Identifier: Apache-2.0
"""The T5 encoder-decoder, its sizes, and what the rest asks of a model.

Sampler, policies, objectives and step know a model by these methods alone, so
that another encoder-decoder can take its place:

    encode(encoder_input_tokens)               -> encoded [B, S, D]
    decode(encoded, encoder_input_tokens,
           decoder_target_tokens)              -> hidden [B, T, D]
    unembed(hidden [..., D])                   -> logits [..., V] float32
    start_cache(encoded, encoder_input_tokens,
                max_decode_len)                -> cache
    decode_step(cache, tokens [B])             -> logits [B, V], cache

and by `head_params`, the parameters that `unembed` reads, and `gather_params`,
the parameters as whole as each device needs them. The five are called as
`model.apply({'params': params}, ..., method='encode')`; the first two also get
`deterministic` and, with microbatches, `num_parts`: see `T5.decode`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from gkd_jax.batch import SpecialIds, merge_rows, shift_right, split_rows
from gkd_jax.models import layers
from gkd_jax.parallel import partitioning

Params = Any


@dataclasses.dataclass(frozen=True)
class T5Config:
  """The shape of a T5.

  Attributes:
    vocab_size: rows of the embedding; at least the tokenizer's ids.
    emb_dim: D, width of the residual stream.
    num_heads: H.
    head_dim: K; H * K need not equal D.
    mlp_dim: F.
    num_encoder_layers: depth of the encoder.
    num_decoder_layers: depth of the decoder.
    mlp_activations: ('relu',) is T5 1.0, ('gelu', 'linear') T5 1.1.
    logits_via_embedding: True ties the output projection to the embedding
      (T5 1.0).
    scale_decoder_outputs: hidden states are scaled by D ** -0.5 before the
      output projection; None: where that is tied (T5 1.0).
    dropout_rate: in training, everywhere T5X has it.
    dtype: of the activations, 'float32' or 'bfloat16'; weights are float32.
    remat: recompute each layer in the backward pass, to save memory.
    scan_layers: a stack of layers is compiled as one loop, where all positions
      are computed at once. Compiles faster; takes a copy of the weights while
      it runs. The parameters, and their names, are the same.
    relpos_buckets: of the relative position bias.
    relpos_max_distance: from which on all distances share a bucket.
    relpos_bias_per_layer: each layer has its own bias (umT5, and T5X's
      scalable_t5); False: the layers of a stack share one (T5).
    pad_id: of padding in the encoder's input; never sampled.
    start_id: the decoder's first input; pad for almost every T5.
    eos_id: ends an output.
  """

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
      # One way to say the same thing, so that configs can be compared.
      object.__setattr__(self, 'scale_decoder_outputs', None)
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(
        f"T5Config.dtype must be 'float32' or 'bfloat16', got {self.dtype!r}."
      )
    for name in ('emb_dim', 'num_heads', 'head_dim', 'mlp_dim'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'T5Config.{name} must be 1 or more, got {getattr(self, name)}.'
        )
    for name in ('num_encoder_layers', 'num_decoder_layers'):
      if getattr(self, name) < 0:
        raise ValueError(
          f'T5Config.{name} must be 0 or more, got {getattr(self, name)}.'
        )
    if not 0.0 <= self.dropout_rate < 1.0:
      raise ValueError(
        f'T5Config.dropout_rate must be in [0, 1), got {self.dropout_rate}.'
      )

  def special_ids(self, num_ids: int) -> SpecialIds:
    """Returns the special ids of this model with a vocabulary of so many."""
    return SpecialIds(
      pad=self.pad_id,
      start=self.start_id,
      eos=self.eos_id,
      never_written=(self.pad_id,),
      num_ids=num_ids,
    )

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


# Source: t5x/examples/t5/{t5_1_0,t5_1_1}/*.gin. FLAN-T5 has the 1.1 shapes.
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
}


def published(size: str, **changes) -> T5Config:
  """Returns a published size, with some fields changed.

  Args:
    size: a key of SIZES, e.g. 't5_1_1_small'.
    **changes: fields of T5Config, e.g. dropout_rate=0.1.

  Raises:
    ValueError: there is no such size.
  """
  if size not in SIZES:
    raise ValueError(f'No T5 of size {size!r}. There are: {", ".join(SIZES)}.')
  return dataclasses.replace(SIZES[size], **changes)


class Cache(NamedTuple):
  """What decoding keeps between two tokens; one entry a layer in tuples."""

  step: jax.Array  # [] int32, position of the token to come
  self_keys: tuple[jax.Array, ...]  # [B, H, T, K]
  self_values: tuple[jax.Array, ...]
  cross_keys: tuple[jax.Array, ...]  # [B, H, S, K], computed once
  cross_values: tuple[jax.Array, ...]
  encoder_mask: jax.Array  # [B, 1, 1, S] bool


class _Layer(nn.Module):
  """What encoder and decoder layers share."""

  config: T5Config

  def _attention(self) -> layers.Attention:
    c = self.config
    return layers.Attention(
      num_heads=c.num_heads,
      head_dim=c.head_dim,
      emb_dim=c.emb_dim,
      dtype=c.dtype,
      dropout_rate=c.dropout_rate,
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
  """Self-attention and feed-forward, each normalised before and added."""

  def setup(self):
    dtype = self.config.dtype
    if self.config.relpos_bias_per_layer:
      self.relpos_bias = _relpos_bias(self.config, bidirectional=True)
    self.pre_attention_layer_norm = layers.RMSNorm(dtype)
    self.attention = self._attention()
    self.pre_mlp_layer_norm = layers.RMSNorm(dtype)
    self.mlp = self._mlp()
    self.dropout = _dropout(self.config)

  def __call__(self, x_BSD, bias, mask, deterministic):
    """Returns [B, S, D]; a layer with a bias of its own gets None."""
    if self.config.relpos_bias_per_layer:
      bias = self.relpos_bias(x_BSD.shape[1], x_BSD.shape[1])
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

  def __call__(
    self, x_BTD, encoded_BSD, bias, causal_mask, encoder_mask, deterministic
  ):
    """All positions at once: [B, T, D]."""
    if self.config.relpos_bias_per_layer:
      bias = self.relpos_bias(x_BTD.shape[1], x_BTD.shape[1])
    h = self.pre_self_attention_layer_norm(x_BTD)
    keys, values = self.self_attention.keys_values(h)
    return self._after_keys_values(
      x_BTD,
      h,
      (keys, values),
      self.encoder_decoder_attention.keys_values(encoded_BSD),
      bias=bias,
      self_mask=causal_mask,
      encoder_mask=encoder_mask,
      deterministic=deterministic,
    )

  def step(
    self, x_B1D, step, keys, values, cross, *, bias, self_mask, encoder_mask
  ):
    """One position: [B, 1, D] and the caches with its key and value in."""
    if self.config.relpos_bias_per_layer:
      bias = _bias_of_step(self.relpos_bias, step, keys.shape[2])
    h = self.pre_self_attention_layer_norm(x_B1D)
    key, value = self.self_attention.keys_values(h)
    at = (0, 0, step, 0)
    keys = jax.lax.dynamic_update_slice(keys, key, at)
    values = jax.lax.dynamic_update_slice(values, value, at)
    x_B1D = self._after_keys_values(
      x_B1D,
      h,
      (keys, values),
      cross,
      bias=bias,
      self_mask=self_mask,
      encoder_mask=encoder_mask,
      deterministic=True,
    )
    return x_B1D, keys, values

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
  ):
    h = self.self_attention.attend(
      h, *own, bias=bias, mask=self_mask, deterministic=deterministic
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
  """Embedded tokens [B, S, D] to encoded [B, S, D]."""

  config: T5Config
  placement: partitioning.Placement | None

  def setup(self):
    c = self.config
    if not c.relpos_bias_per_layer:
      self.relpos_bias = _relpos_bias(c, bidirectional=True)
    layer = (
      nn.remat(EncoderLayer, static_argnums=(4,)) if c.remat else EncoderLayer
    )
    self.layers = [layer(c) for _ in range(c.num_encoder_layers)]
    self.encoder_norm = layers.RMSNorm(c.dtype)
    self.dropout = _dropout(c)

  def __call__(self, x_BSD, mask, deterministic, num_parts):
    """Encodes; mask is [B, 1, 1, S] bool."""
    bias = None
    if not self.config.relpos_bias_per_layer:
      bias = self.relpos_bias(x_BSD.shape[1], x_BSD.shape[1])
    x_BSD = self.dropout(x_BSD, deterministic=deterministic)
    x_BSD = _run_layers(
      self,
      EncoderLayer,
      x_BSD,
      bias,
      mask,
      deterministic,
      num_parts=num_parts,
    )
    x_BSD = self.encoder_norm(x_BSD)
    return self.dropout(x_BSD, deterministic=deterministic)


class Decoder(nn.Module):
  """Embedded tokens to hidden states, all at once or one by one."""

  config: T5Config
  placement: partitioning.Placement | None

  def setup(self):
    c = self.config
    if not c.relpos_bias_per_layer:
      self.relpos_bias = _relpos_bias(c, bidirectional=False)
    layer = (
      nn.remat(DecoderLayer, static_argnums=(6,)) if c.remat else DecoderLayer
    )
    self.layers = [layer(c) for _ in range(c.num_decoder_layers)]
    self.decoder_norm = layers.RMSNorm(c.dtype)
    self.dropout = _dropout(c)
    if not c.logits_via_embedding:
      self.logits_dense = layers.LogitsDense(c.vocab_size, c.dtype)

  def __call__(
    self, x_BTD, encoded_BSD, encoder_mask, deterministic, num_parts
  ):
    """Teacher-forced hidden states [B, T, D], after the last norm."""
    length = x_BTD.shape[1]
    bias = None
    if not self.config.relpos_bias_per_layer:
      bias = self.relpos_bias(length, length)
    causal_mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
    x_BTD = self.dropout(x_BTD, deterministic=deterministic)
    x_BTD = _run_layers(
      self,
      DecoderLayer,
      x_BTD,
      encoded_BSD,
      bias,
      causal_mask,
      encoder_mask,
      deterministic,
      num_parts=num_parts,
    )
    x_BTD = self.decoder_norm(x_BTD)
    return self.dropout(x_BTD, deterministic=deterministic)

  def start_cache(self, encoded_BSD, encoder_mask, max_decode_len) -> Cache:
    """Computes the cross-attention's keys and values; the rest is empty."""
    c = self.config
    cross = [
      layer.encoder_decoder_attention.keys_values(encoded_BSD)
      for layer in self.layers
    ]
    shape = (encoded_BSD.shape[0], c.num_heads, max_decode_len, c.head_dim)
    empty = tuple(self._spread(jnp.zeros(shape, c.dtype)) for _ in self.layers)
    return Cache(
      step=jnp.int32(0),
      self_keys=empty,
      self_values=empty,
      cross_keys=tuple(self._spread(key) for key, _ in cross),
      cross_values=tuple(self._spread(value) for _, value in cross),
      encoder_mask=encoder_mask,
    )

  def step(self, cache: Cache, x_B1D) -> tuple[jax.Array, Cache]:
    """Hidden state [B, 1, D] of the next position, and the cache with it."""
    max_decode_len = cache.self_keys[0].shape[2]
    bias_1H1T = None
    if not self.config.relpos_bias_per_layer:
      bias_1H1T = _bias_of_step(self.relpos_bias, cache.step, max_decode_len)
    self_mask = (jnp.arange(max_decode_len) <= cache.step)[None, None, None]
    keys, values = [], []
    for i, layer in enumerate(self.layers):
      x_B1D, key, value = layer.step(
        x_B1D,
        cache.step,
        cache.self_keys[i],
        cache.self_values[i],
        (cache.cross_keys[i], cache.cross_values[i]),
        bias=bias_1H1T,
        self_mask=self_mask,
        encoder_mask=cache.encoder_mask,
      )
      x_B1D = _spread(x_B1D, self.placement)
      keys.append(self._spread(key))
      values.append(self._spread(value))
    cache = cache._replace(
      step=cache.step + 1, self_keys=tuple(keys), self_values=tuple(values)
    )
    return self.decoder_norm(x_B1D), cache

  def _spread(self, keys_or_values_BHLK: jax.Array) -> jax.Array:
    return partitioning.constrain(
      keys_or_values_BHLK, self.placement, 'batch', 'heads', 'length', 'kv'
    )


def _spread(x_BLD: jax.Array, placement) -> jax.Array:
  return partitioning.constrain(x_BLD, placement, 'batch', 'length', 'embed')


def _run_layers(stack, layer_class, x, *args, num_parts=1):
  """Runs the layers of an encoder or decoder on x.

  Args:
    stack: that has them.
    layer_class: of each.
    x: [B, L, D].
    *args: of a layer; the last is `deterministic`.
    num_parts: that each layer works through the rows in; without dropout alone.

  Returns:
    [B, L, D].
  """
  c = stack.config
  x = _spread(x, stack.placement)
  is_loop = c.scan_layers and stack.layers
  if stack.is_initializing() or not (is_loop or num_parts > 1):
    for layer in stack.layers:
      x = _spread(layer(x, *args), stack.placement)
    return x

  def run_layer(x, layer):
    params, rng = layer
    x = layer_class(c, parent=None).apply(
      {'params': params},
      x,
      *args,
      rngs=None if rng is None else {'dropout': rng},
    )
    return _spread(x, stack.placement), None

  if num_parts > 1:
    assert c.dropout_rate == 0.0 or args[-1]
    run_layer = _in_parts(stack, layer_class, x, args, num_parts)
    x = split_rows(x, num_parts)
  elif c.remat:
    run_layer = jax.checkpoint(run_layer, prevent_cse=False)

  if is_loop:
    params = stack.variables['params'].get('layers')
    if params is None:
      # The state keeps a name for each layer, as T5X's checkpoints do, and the
      # optimizer sees each by itself.
      each, _ = _split_layers(stack.variables['params'])
      params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    rngs = None
    if c.dropout_rate > 0.0 and not args[-1]:
      rngs = jax.random.split(stack.make_rng('dropout'), len(stack.layers))
    x, _ = jax.lax.scan(run_layer, x, (params, rngs))
  else:
    for layer in stack.layers:
      x, _ = run_layer(x, (layer.variables['params'], None))
  return x if num_parts == 1 else merge_rows(x)


def _in_parts(stack, layer_class, x_BLD, args, num_parts):
  """Returns (x [num_parts, rows, L, D], (params, None)) -> (the same, None).

  A layer's parameters are gathered once for all parts.
  """
  c, placement = stack.config, stack.placement
  # Masks and biases that all rows share have one row.
  is_of_rows = [
    getattr(arg, 'shape', ())[:1] == x_BLD.shape[:1] for arg in args
  ]
  parts = [
    split_rows(arg, num_parts)
    for arg, of_rows in zip(args, is_of_rows, strict=True)
    if of_rows
  ]
  layer = layer_class(c, parent=None)

  def run_layer(x, layer_params):
    params, _ = layer_params
    if placement is not None and placement.spreads_params_over_data:
      boxed = jax.eval_shape(
        lambda: layer.init(jax.random.key(0), x_BLD, *args)['params']
      )
      params = jax.lax.with_sharding_constraint(
        params, placement.gathered().shardings(nn.get_partition_spec(boxed))
      )

    def run_part(part):
      x, *of_rows = part
      of_rows = iter(of_rows)
      part_args = [
        next(of_rows) if split else arg
        for arg, split in zip(args, is_of_rows, strict=True)
      ]
      return _spread(layer.apply({'params': params}, x, *part_args), placement)

    return jax.lax.map(run_part, (x, *parts)), None

  return run_layer


def stack_layers(params: Params) -> Params:
  """Returns parameters as `T5Config.scan_layers` reads them.

  The layers of the encoder are one tree of arrays [layers, ...], named
  'layers', and so are the decoder's. A program that is given them one by one
  makes that first: a second copy of the weights.

  Args:
    params: of a T5; arrays, which are gone then (there is never a second copy
      of them all), or shapes with shardings.
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
  for name in ('encoder', 'decoder'):
    each, others = _split_layers(params[name])
    if each:
      params[name] = {**others, 'layers': jax.tree.map(stack, *each)}
  return params


def _unstack_layers(params: Params) -> Params:
  """Returns parameters with a name for each layer, whatever they have."""
  params = dict(params)
  for name in ('encoder', 'decoder'):
    others = dict(params[name])
    if stacked := others.pop('layers', None):
      num = jax.tree.leaves(stacked)[0].shape[0]
      each = {
        f'layers_{i}': jax.tree.map(lambda x, i=i: x[i], stacked)
        for i in range(num)
      }
      params[name] = {**others, **each}
  return params


def _split_layers(stack_params: Params) -> tuple[list[Params], Params]:
  """Returns the layers of an encoder or decoder in order, and what is left."""
  others, each = dict(stack_params), []
  while (layer := others.pop(f'layers_{len(each)}', None)) is not None:
    each.append(layer)
  return each, others


class T5(nn.Module):
  """The encoder-decoder; see the module's docstring for its methods.

  Attributes:
    config: its shape.
    placement: where its parameters and activations lie; None: on one device.
  """

  config: T5Config
  placement: partitioning.Placement | None = None

  def setup(self):
    c = self.config
    self.token_embedder = layers.Embed(c.vocab_size, c.emb_dim, c.dtype)
    self.encoder = Encoder(c, self.placement)
    self.decoder = Decoder(c, self.placement)

  def __call__(
    self, encoder_input_tokens, decoder_target_tokens, *, deterministic=True
  ):
    """Teacher-forced logits.

    Args:
      encoder_input_tokens: [B, S] int32, pad after the end.
      decoder_target_tokens: [B, T] int32; the shift to the right is done here.
      deterministic: False applies dropout and needs an rng named 'dropout'.

    Returns:
      [B, T, V] float32; entry t predicts decoder_target_tokens[:, t].
    """
    encoded = self.encode(encoder_input_tokens, deterministic=deterministic)
    hidden = self.decode(
      encoded,
      encoder_input_tokens,
      decoder_target_tokens,
      deterministic=deterministic,
    )
    return self.unembed(hidden)

  def encode(self, encoder_input_tokens, *, deterministic=True, num_parts=1):
    """Returns encoded inputs [B, S, D]; `decode` says what the keywords do."""
    return self.encoder(
      self.token_embedder(encoder_input_tokens),
      self._encoder_mask(encoder_input_tokens),
      deterministic,
      num_parts,
    )

  def decode(
    self,
    encoded,
    encoder_input_tokens,
    decoder_target_tokens,
    *,
    deterministic=True,
    num_parts=1,
  ):
    """Returns hidden states [B, T, D]; t sees the targets before t.

    Args:
      encoded: [B, S, D].
      encoder_input_tokens: [B, S] int32.
      decoder_target_tokens: [B, T] int32.
      deterministic: False applies dropout.
      num_parts: that each layer works through the rows in, to save memory. Its
        parameters are gathered once for all. Without dropout alone.
    """
    return self.decoder(
      self.token_embedder(
        shift_right(decoder_target_tokens, self.config.start_id)
      ),
      encoded,
      self._encoder_mask(encoder_input_tokens),
      deterministic,
      num_parts,
    )

  def unembed(self, hidden):
    """Maps hidden states [..., D] to logits [..., V] in float32."""
    if self.config.scales_decoder_outputs:
      hidden *= self.config.emb_dim**-0.5
    if self.config.logits_via_embedding:
      return self.token_embedder.attend(hidden)
    return self.decoder.logits_dense(hidden)

  def start_cache(self, encoded, encoder_input_tokens, max_decode_len) -> Cache:
    """Returns the cache for `decode_step`, before the first token."""
    return self.decoder.start_cache(
      encoded, self._encoder_mask(encoder_input_tokens), max_decode_len
    )

  def decode_step(self, cache: Cache, tokens_B) -> tuple[jax.Array, Cache]:
    """Returns logits [B, V] of the next token, given the last."""
    hidden, cache = self.decoder.step(
      cache, self.token_embedder(tokens_B[:, None])
    )
    return self.unembed(hidden[:, 0]), cache

  def _encoder_mask(self, encoder_input_tokens: jax.Array) -> jax.Array:
    return (encoder_input_tokens != self.config.pad_id)[:, None, None, :]

  def head_params(self, params: Params) -> Params:
    """Returns the part of the parameters that `unembed` reads."""
    if self.config.logits_via_embedding:
      return {'token_embedder': params['token_embedder']}
    return {'decoder': {'logits_dense': params['decoder']['logits_dense']}}

  def gather_params(self, params: Params) -> Params:
    """Returns the parameters with nothing left spread over 'data'.

    For those who read them again and again, a loop or a whole step. The others
    stay as they are: then each layer's are gathered when it is their turn.
    Each layer has a name of its own then; see `stack_layers`.
    """
    params = _unstack_layers(params)
    if self.placement is None or not self.placement.spreads_params_over_data:
      return params
    return jax.lax.with_sharding_constraint(
      params, self.placement.gathered().shardings(logical_axes(self))
    )


def init_params(model: T5, rng: jax.Array) -> Params:
  """Returns fresh float32 parameters, with T5X's names and initializers."""
  return nn.unbox(_boxed_params(model, rng))


def logical_axes(model: T5) -> Params:
  """Returns, for each parameter, the names of its axes: a PartitionSpec."""
  boxed = jax.eval_shape(lambda: _boxed_params(model, jax.random.key(0)))
  return nn.get_partition_spec(boxed)


def abstract_params(model: T5) -> Params:
  """Returns shape, dtype and sharding of each parameter, without making it.

  Args:
    model: with a placement.

  Raises:
    ValueError: the mesh does not divide one of them.
  """
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  shardings = model.placement.shardings(logical_axes(model))
  named_shardings = named_params(shardings)
  for name, x in named_params(shapes).items():
    try:
      named_shardings[name].shard_shape(x.shape)
    except ValueError as e:
      mesh = model.placement.mesh.shape
      raise ValueError(
        f'MESH_MODEL {mesh["model"]} does not divide {name} of shape '
        f'{x.shape}: it must divide heads, feed-forward width and vocabulary '
        'of student and teacher. (Of a model with PARAMETER_PARTITIONING_DIMS '
        f'= 2 the data axis, {mesh["data"]} here, must divide the width; with '
        '= 0 it lies whole on every device.)'
      ) from e
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def _boxed_params(model: T5, rng: jax.Array) -> Params:
  one_token = jnp.ones((1, 1), jnp.int32)
  return model.init(rng, one_token, one_token)['params']


def named_params(params: Params) -> dict[str, Any]:
  """Returns {'encoder/layers_0/mlp/wo/kernel': leaf} of a tree."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def param_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
  """Returns {name: shape} of all parameters of a model, without making any."""
  model = T5(config)
  abstract = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return {name: x.shape for name, x in named_params(abstract).items()}


def count_params(params: Params) -> int:
  """Returns how many numbers the parameters hold."""
  return sum(x.size for x in jax.tree.leaves(params))


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


def _bias_of_step(
  relpos_bias: layers.RelativePositionBias, step: jax.Array, max_len: int
) -> jax.Array:
  """The bias of one query position, [1, H, 1, max_len]."""
  bias_1HTT = relpos_bias(max_len, max_len)
  return jax.lax.dynamic_slice_in_dim(bias_1HTT, step, 1, axis=2)
