# SPDX-License-Identifier: Apache-2.0
"""The protocol that an encoder-decoder implements.

Sampler, policies, objectives and the step use models only through this
protocol, so other encoder-decoders can replace T5. A model is a Flax module.
Methods that compute are called as

    model.apply({'params': params}, *args, method='encode')

A family of models is a module in this folder, listed in `registry`.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import jax

from gkd_jax.batch import SpecialIds
from gkd_jax.parallel.partitioning import Placement

Params = Any  # nested dicts of arrays, with T5X's names
Cache = Any  # a tree whose leaves are scalars, or have the rows as first axis

# Fields of a config that set how a model is run, not its parameters.
EXECUTION_FIELDS = (
  'dropout_rate',
  'dtype',
  'remat',
  'scan_layers',
  'query_block',
)
# Fields of a config that name the special ids; see `SpecialIds`.
ID_FIELDS = ('pad_id', 'start_id', 'eos_id')


class StackShape(NamedTuple):
  """The shape of an encoder or a decoder.

  Attributes:
    num_layers: its depth.
    emb_dim: D, width of the residual stream.
    num_heads: H, heads of queries.
    num_kv_heads: heads of keys and values, at most H.
    mlp_dim: F.
  """

  num_layers: int
  emb_dim: int
  num_heads: int
  num_kv_heads: int
  mlp_dim: int


class ModelConfig(Protocol):
  """The shape of a model and how it is run: a frozen, hashable dataclass.

  Attributes:
    family: its key in `registry.FAMILIES`.
    vocab_size: rows of the embedding, at least the tokenizer's number of ids.
    encoder: shape of the encoder.
    decoder: shape of the decoder.
    head_dim: K.
    has_cross_attention: whether decoder layers have kernels of their own for
      the attention to the encoder, or use those of their self-attention.
    num_tables: [V, D] arrays, of embeddings and output projection.
    mlp_activations: one activation, or several whose product is a gated MLP.
    dropout_rate: in training.
    dtype: of the activations, 'float32' or 'bfloat16'; weights are float32.
    remat: whether the backward pass recomputes each layer, to save memory.
    scan_layers: whether a stack of layers is compiled as one loop.
    query_block: attention over more positions is computed in blocks of so many
      queries.
    pad_id: pads the encoder's input.
    start_id: the decoder's first input.
    eos_id: ends an output.
  """

  family: ClassVar[str]
  vocab_size: int
  encoder: StackShape
  decoder: StackShape
  head_dim: int
  has_cross_attention: bool
  num_tables: int
  mlp_activations: tuple[str, ...]
  dropout_rate: float
  dtype: str
  remat: bool
  scan_layers: bool
  query_block: int
  pad_id: int
  start_id: int
  eos_id: int

  def special_ids(self, num_ids: int) -> SpecialIds:
    """Returns the special ids for a vocabulary of `num_ids` ids."""
    ...

  def describe(self) -> str:
    """Returns a short description, such as 'T5 1.1 of width 64'."""
    ...


class Model(Protocol):
  """An encoder-decoder.

  Attributes:
    config: its shape.
    placement: the sharding of parameters and activations; None: one device.
  """

  config: ModelConfig
  placement: Placement | None

  def apply(
    self, variables: Any, *args: Any, method: str, **kwargs: Any
  ) -> Any:
    """Calls a method with parameters, as every Flax module does."""
    ...

  def init(self, rngs: jax.Array, *args: Any) -> Any:
    """Returns {'params': random parameters}, given the arguments of a call."""
    ...

  # Called through `apply`.

  def __call__(
    self,
    encoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    """Returns teacher-forced logits [B, T, V] float32.

    Args:
      encoder_input_tokens: see `encode`.
      decoder_target_tokens: see `decode`; entry t predicts the t-th of them.
      deterministic: see `decode`.
    """
    ...

  def encode(
    self,
    encoder_input_tokens: jax.Array,
    *,
    deterministic: bool = True,
    num_microbatches: int = 1,
  ) -> jax.Array:
    """Returns encoded inputs [B, S, D]; `decode` explains the keywords.

    Args:
      encoder_input_tokens: [B, S] int32, pad after the end.
      deterministic: see `decode`.
      num_microbatches: see `decode`.
    """
    ...

  def decode(
    self,
    encoded: jax.Array,
    encoder_input_tokens: jax.Array,
    decoder_target_tokens: jax.Array,
    *,
    deterministic: bool = True,
    num_microbatches: int = 1,
  ) -> jax.Array:
    """Returns hidden states [B, T, D]; position t sees the targets before t.

    Args:
      encoded: [B, S, D].
      encoder_input_tokens: [B, S] int32; pad positions are masked.
      decoder_target_tokens: [B, T] int32; the model shifts them to the right.
      deterministic: False applies dropout, and needs an rng named 'dropout'.
      num_microbatches: each layer loops over this many parts of the batch,
        which saves memory and gathers the layer's parameters only once. Must be
        1 with dropout.
    """
    ...

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Maps hidden states [..., D] to logits [..., V] float32."""
    ...

  def start_cache(
    self,
    encoded: jax.Array,
    encoder_input_tokens: jax.Array,
    max_decode_len: int,
  ) -> Cache:
    """Returns the cache for `decode_step`, before the first token."""
    ...

  def decode_step(
    self, cache: Cache, tokens: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Returns logits [B, V] of the next token, and the cache.

    Args:
      cache: from `start_cache` or the step before.
      tokens: [B] int32, the last token of each row; the start id at first.
    """
    ...

  def decode_block(
    self, cache: Cache, offsets: jax.Array, tokens: jax.Array
  ) -> tuple[jax.Array, Cache]:
    """Returns logits [B, N, V] of several positions, and the cache.

    Equals N calls of `decode_step`, but each row has a position of its own. To
    go back, pass a smaller offset: entries from a row's offset on are replaced
    or, after the block, not read. The position of `decode_step` stays.

    Args:
      cache: from `start_cache`, with the entries before each row's offset.
      offsets: [B] int32, the position of each row's first token here; at most
        `max_decode_len` - N.
      tokens: [B, N] int32; the start id is the token of position 0.
    """
    ...

  # Called directly.

  def head_params(self, params: Params) -> Params:
    """Returns the part of the parameters that `unembed` reads."""
    ...

  def param_specs(self) -> Params:
    """Returns the sharding of each parameter, a `PartitionSpec`.

    Called if there is a placement.
    """
    ...

  def gather_params(self, params: Params) -> Params:
    """Returns the parameters replicated over the mesh axis 'data'.

    Loops that read the parameters repeatedly use it. The result has one entry
    per layer, also if the layers were stacked.
    """
    ...
