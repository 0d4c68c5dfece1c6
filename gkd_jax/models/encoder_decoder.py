# SPDX-License-Identifier: Apache-2.0
"""What the models of all families have in common."""

from typing import Any

import jax
from flax import linen as nn

from gkd_jax.batch import shift_right
from gkd_jax.models import interface, layer_stack
from gkd_jax.parallel import partitioning


class EncoderDecoder(nn.Module):
  """The methods of `interface.Model` that are the same in every family.

  A family adds `setup`, with `token_embedder`, `encoder` and `decoder`; and
  `encode`, `unembed` and `head_params`.

  Attributes:
    config: its shape, an `interface.ModelConfig`.
    placement: the sharding of parameters and activations; None: one device.
  """

  config: Any
  placement: partitioning.Placement | None = None

  def __call__(
    self, encoder_input_tokens, decoder_target_tokens, *, deterministic=True
  ):
    """Returns teacher-forced logits.

    Args:
      encoder_input_tokens: [B, S] int32, pad after the end.
      decoder_target_tokens: [B, T] int32; this method shifts them to the right.
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

  def decode(
    self,
    encoded,
    encoder_input_tokens,
    decoder_target_tokens,
    *,
    deterministic=True,
    num_microbatches=1,
  ):
    """Returns hidden states [B, T, D]; position t sees the targets before t.

    Args:
      encoded: [B, S, D].
      encoder_input_tokens: [B, S] int32.
      decoder_target_tokens: [B, T] int32.
      deterministic: False applies dropout.
      num_microbatches: each layer loops over this many parts of the batch; see
        `interface.Model`.
    """
    return self.decoder(
      self.token_embedder(
        shift_right(decoder_target_tokens, self.config.start_id)
      ),
      encoded,
      self._encoder_mask(encoder_input_tokens),
      deterministic,
      num_microbatches,
    )

  def start_cache(
    self, encoded, encoder_input_tokens, max_decode_len
  ) -> interface.Cache:
    """Returns the cache for `decode_step`, before the first token."""
    return self.decoder.start_cache(
      encoded, self._encoder_mask(encoder_input_tokens), max_decode_len
    )

  def decode_step(
    self, cache: interface.Cache, tokens_B
  ) -> tuple[jax.Array, interface.Cache]:
    """Returns logits [B, V] of the next token, given the last token."""
    hidden, cache = self.decoder.step(
      cache, self.token_embedder(tokens_B[:, None])
    )
    return self.unembed(hidden[:, 0]), cache

  def decode_block(
    self, cache: interface.Cache, offsets_B, tokens_BN
  ) -> tuple[jax.Array, interface.Cache]:
    """Returns logits [B, N, V] after each token; see `interface.Model`."""
    hidden, cache = self.decoder.block(
      cache, offsets_B, self.token_embedder(tokens_BN)
    )
    return self.unembed(hidden), cache

  def _encoder_mask(self, encoder_input_tokens: jax.Array) -> jax.Array:
    return (encoder_input_tokens != self.config.pad_id)[:, None, None, :]

  def param_specs(self) -> interface.Params:
    """Returns the sharding of each parameter, a `PartitionSpec`."""
    return layer_stack.param_specs(self)

  def gather_params(self, params: interface.Params) -> interface.Params:
    """Returns the parameters replicated over the mesh axis 'data'."""
    return layer_stack.gather_params(self, params)
