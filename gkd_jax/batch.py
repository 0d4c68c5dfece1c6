# SPDX-License-Identifier: Apache-2.0
"""The data of a step: special ids, a batch of examples, outputs y to train on.

Shape letters used in names throughout the package: B batch, S encoder length,
T decoder length, V vocabulary, D embedding, H heads, K head dim, F mlp.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that 0 * (log p - log q) stays 0 where an id is masked; far below
# any real logit, so that its probability is exactly 0 in float32.
MASKED_LOGIT = -1e9


@dataclasses.dataclass(frozen=True)
class SpecialIds:
  """The token ids with a meaning of their own, and how many ids there are.

  Model families differ in them, so they are arguments, never constants: a
  model's config gives pad, start and EOS, the vocabulary the number of ids.

  Attributes:
    pad: fills rows after their end.
    start: the decoder's first input.
    eos: ends an output, and is a token of it.
    never_written: ids that no output may hold; pad is one of them.
    num_ids: ids of the tokenizer; ids from there on only fill the embedding.
  """

  pad: int
  start: int
  eos: int
  never_written: tuple[int, ...]
  num_ids: int

  def __post_init__(self):
    object.__setattr__(self, 'never_written', tuple(self.never_written))
    if self.pad not in self.never_written:
      raise ValueError(
        f'SpecialIds.never_written must have the pad id {self.pad}, got '
        f'{self.never_written}.'
      )
    if self.eos in self.never_written or not 0 <= self.eos < self.num_ids:
      raise ValueError(
        'SpecialIds.eos must be an id that outputs may hold: below '
        f'{self.num_ids} and not in {self.never_written}, got {self.eos}.'
      )


class Outputs(NamedTuple):
  """Outputs y, one a row: the dataset's, the student's or the teacher's."""

  tokens: jax.Array  # [B, T] int32, pad after the end
  weights: jax.Array  # [B, T] float32, 1 up to and including EOS, then 0


class Batch(NamedTuple):
  """One batch of a task, named as seqio's EncDecFeatureConverter names it."""

  encoder_input_tokens: jax.Array  # [B, S] int32, pad after the end
  decoder_target_tokens: jax.Array  # [B, T] int32
  decoder_loss_weights: jax.Array  # [B, T] float32
  # [B, S'] int32 inputs of the teacher; None: those of the student
  teacher_input_tokens: jax.Array | None = None
  # [B] int32, which of several teachers grades the row; None: all or the only
  teacher_ids: jax.Array | None = None
  # [B] float32, scales the gradient of the row; may be negative. None: 1
  row_weights: jax.Array | None = None
  # the worse output of each input, where examples are pairs of outputs
  rejected: Outputs | None = None

  @property
  def teacher_inputs(self) -> jax.Array:
    """[B, S'] int32, what the teacher's encoder reads."""
    if self.teacher_input_tokens is None:
      return self.encoder_input_tokens
    return self.teacher_input_tokens

  @property
  def outputs(self) -> Outputs:
    """The dataset's own outputs."""
    return Outputs(self.decoder_target_tokens, self.decoder_loss_weights)


def shift_right(tokens_BT: jax.Array, start: int) -> jax.Array:
  """Returns decoder inputs: the start id, then all tokens but the last."""
  return jnp.pad(tokens_BT[:, :-1], ((0, 0), (1, 0)), constant_values=start)


def split_rows(
  x: jax.Array, num_microbatches: int, group: int = 1
) -> jax.Array:
  """Returns rows [B, ...] as [num_microbatches, rows, ...].

  Row i goes to microbatch i % num_microbatches: each has rows of every device.
  With groups of rows, which stay together, group i does.
  """
  if group > 1:
    x = split_rows(x.reshape(-1, group, *x.shape[1:]), num_microbatches)
    return x.reshape(num_microbatches, -1, *x.shape[3:])
  return x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)


def merge_rows(microbatches: jax.Array) -> jax.Array:
  """Returns the argument of the `split_rows` that made the microbatches."""
  return microbatches.swapaxes(0, 1).reshape(-1, *microbatches.shape[2:])


def align_logits(
  all_logits: Sequence[jax.Array], ids: SpecialIds
) -> list[jax.Array]:
  """Masks the unused ids of several models, at the smallest of their widths.

  Embeddings of one vocabulary may be padded to different sizes (T5's 32100 ids
  to 32100 or 32128); the ids that are cut off have probability 0.

  Args:
    all_logits: [..., V] of each model.
    ids: with `num_ids` at most each V.
  """
  width = min(x.shape[-1] for x in all_logits)
  return [mask_unused_ids(x[..., :width], ids) for x in all_logits]


def mask_unused_ids(logits: jax.Array, ids: SpecialIds) -> jax.Array:
  """Removes from a distribution the ids that no output may hold.

  These are `ids.never_written` (a sampled pad would read as "nothing here" to
  everything downstream) and the ids from `ids.num_ids` on, which only fill the
  embedding up to a size that suits the hardware. Student and teacher are masked
  alike, before they are normalised.

  Args:
    logits: [..., V].
    ids: with `num_ids` at most V.

  Returns:
    [..., V] logits with MASKED_LOGIT at the ids that may not occur.
  """
  numbers = jnp.arange(logits.shape[-1])
  usable = numbers < ids.num_ids
  for first, last in _runs(ids.never_written):
    if first == last:
      usable &= numbers != first
    else:
      usable &= (numbers < first) | (numbers > last)
  return jnp.where(usable, logits, MASKED_LOGIT)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
  """Returns the first and the last of each run of consecutive numbers."""
  runs = []
  for number in sorted(numbers):
    if runs and number <= runs[-1][1] + 1:
      runs[-1] = (runs[-1][0], number)
    else:
      runs.append((number, number))
  return runs
