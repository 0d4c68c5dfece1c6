# SPDX-License-Identifier: Apache-2.0
"""What travels through a step: a batch of examples, and outputs y to train on.

Shape letters used in names throughout the package: B batch, S encoder length,
T decoder length, V vocabulary, D embedding, H heads, K head dim, F mlp.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# T5's ids. Pad is also the decoder's first input (beginning of sequence).
PAD_ID = 0
EOS_ID = 1

# Finite, so that 0 * (log p - log q) stays 0 where an id is masked; far below
# any real logit, so that its probability is exactly 0 in float32.
MASKED_LOGIT = -1e9


class Outputs(NamedTuple):
  """Outputs y, one a row, whoever wrote them."""

  tokens: jax.Array  # [B, T] int32, pad after the end
  weights: jax.Array  # [B, T] float32, 1 up to and including EOS, then 0


class Batch(NamedTuple):
  """One batch of a task, named as seqio's EncDecFeatureConverter names it."""

  encoder_input_tokens: jax.Array  # [B, S] int32, pad after the end
  decoder_target_tokens: jax.Array  # [B, T] int32
  decoder_loss_weights: jax.Array  # [B, T] float32

  @property
  def outputs(self) -> Outputs:
    """The dataset's own outputs."""
    return Outputs(self.decoder_target_tokens, self.decoder_loss_weights)


def shift_right(tokens_BT: jax.Array) -> jax.Array:
  """Returns decoder inputs: BOS (the pad id), then all tokens but the last."""
  return jnp.pad(tokens_BT[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)


def split_rows(x: jax.Array, num_parts: int) -> jax.Array:
  """Returns rows [B, ...] as [num_parts, B / num_parts, ...].

  Row i goes to part i % num_parts: a part has rows of every device.
  """
  return x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)


def merge_rows(parts: jax.Array) -> jax.Array:
  """Returns what `split_rows` was given."""
  return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])


def mask_unused_ids(logits: jax.Array, num_ids: int) -> jax.Array:
  """Removes from a distribution the ids that no output may hold.

  These are the pad id (it is the decoder's BOS too: a sampled pad would read as
  "nothing here" to everything downstream) and the ids from `num_ids` on, which
  only fill the embedding up to a size that suits the hardware. Student and
  teacher are masked alike, before they are normalised.

  Args:
    logits: [..., V].
    num_ids: size of the tokenizer's vocabulary, at most V.

  Returns:
    [..., V] logits with MASKED_LOGIT at the ids that may not occur.
  """
  ids = jnp.arange(logits.shape[-1])
  usable = (ids != PAD_ID) & (ids < num_ids)
  return jnp.where(usable, logits, MASKED_LOGIT)
