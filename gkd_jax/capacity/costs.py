# SPDX-License-Identifier: Apache-2.0
"""Lower bounds of the FLOPs and memory traffic of an on-policy step.

They are computed from shapes, because XLA's cost analysis counts the body of a
loop once for any number of iterations. A multiplication and an addition
are two FLOPs. Only matrix products are counted; all other operations are less
than 1 % of them. Bytes are the memory traffic that remains with a perfect
cache: each array that a phase needs is read or written once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from gkd_jax.models.interface import ModelConfig, StackShape

WIDTHS = {'float32': 4, 'bfloat16': 2}  # bytes of a number


class Cost(NamedTuple):
  """FLOPs and bytes of a phase, on all devices together."""

  flops: float
  bytes: float

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(self.flops + other.flops, self.bytes + other.bytes)

  def times(self, n: float) -> 'Cost':
    """Returns n times this cost."""
    return Cost(n * self.flops, n * self.bytes)

  def seconds(self, peak_flops: float, bandwidth: float) -> float:
    """Returns the minimum time.

    Args:
      peak_flops: FLOPs per second for the dtype of the products.
      bandwidth: memory bytes per second.
    """
    return max(self.flops / peak_flops, self.bytes / bandwidth)


def of_step(
  student: ModelConfig,
  teacher: ModelConfig | None,
  *,
  batch_size: int,
  input_length: int,
  target_length: int,
  teacher_input_length: int | None = None,
  num_outputs: int = 1,
  num_microbatches: int = 1,
  weight_bytes: int = 4,
  teacher_weight_bytes: int = 4,
  moments: int = 2,
) -> dict[str, Cost]:
  """Returns the cost of each phase of an on-policy step.

  All outputs are assumed to have full length. Without dropout and microbatches
  sampling and loss share one run of the student's encoder.

  Args:
    student: the student's shape.
    teacher: the teacher's shape; None: there is no teacher.
    batch_size: B.
    input_length: S.
    target_length: T.
    teacher_input_length: tokens of the inputs that the teacher reads; None: S.
    num_outputs: outputs that are compared for each input; the encoders run once
      for all of them.
    num_microbatches: parts of the batch; every phase but sampling reads the
      weights once per part.
    weight_bytes: bytes per weight in the student's products, 2 for bfloat16.
    teacher_weight_bytes: bytes per weight in the teacher's products.
    moments: float32 numbers that the optimizer keeps per parameter; 2 for Adam.

  Returns:
    {'student_encoder', 'sampling', 'teacher', 'student', 'optimizer': cost}.
    'sampling' is one rollout of the student. 'student' is the student's
    decoder, the objective (with the teacher's projection to the vocabulary) and
    the backward pass. Each phase is the named scope of that name in `step`.
  """
  rows = batch_size // num_microbatches
  outputs = rows * num_outputs
  encoder = _encoder(student, rows, input_length, weight_bytes)
  decoder = _decoder(
    student, outputs, input_length, target_length, weight_bytes
  )
  heads = _head(student, outputs * target_length, weight_bytes).times(3)
  of_part = {}
  if teacher is not None:
    heads += _head(teacher, outputs * target_length, teacher_weight_bytes)
    read = teacher_input_length or input_length
    of_part['teacher'] = _encoder(
      teacher, rows, read, teacher_weight_bytes
    ) + _decoder(teacher, outputs, read, target_length, teacher_weight_bytes)
  # The backward pass has two products for each of the forward pass.
  again = 1 if student.remat else 0
  shared = num_microbatches == 1 and student.dropout_rate == 0.0
  of_encoder = 2 + again + (0 if shared else 1)
  body = decoder.times(3 + again) + encoder.times(of_encoder)
  of_part |= {'student_encoder': encoder, 'student': body + heads}
  num_params = count_weights(student)
  return {
    **{name: c.times(num_microbatches) for name, c in of_part.items()},
    'sampling': of_rollout(
      student,
      batch_size=batch_size,
      input_length=input_length,
      target_length=target_length,
      weight_bytes=weight_bytes,
    ),
    # Reads gradient, parameter and moments, writes the latter two.
    'optimizer': Cost(0.0, 4.0 * num_params * (3 + 2 * moments)),
  }


def of_rollout(
  model: ModelConfig,
  *,
  batch_size: int,
  input_length: int,
  target_length: int,
  weight_bytes: int = 4,
  with_encoder: bool = False,
) -> Cost:
  """Returns the cost of sampling one output of full length for each input.

  Args:
    model: the shape of the model that writes.
    batch_size: B.
    input_length: S.
    target_length: T.
    weight_bytes: bytes per weight, and per number in the KV cache.
    with_encoder: whether the encoder runs for it.
  """
  cost = _sampling(model, batch_size, input_length, target_length, weight_bytes)
  if with_encoder:
    cost += _encoder(model, batch_size, input_length, weight_bytes)
  return cost


def of_drafted(
  target: ModelConfig,
  draft: ModelConfig,
  *,
  batch_size: int,
  input_length: int,
  target_length: int,
  draft_length: int,
  block_efficiency: float,
) -> Cost:
  """Returns the cost of sampling as `of_rollout`, but with a draft.

  Args:
    target: the shape of the model that writes.
    draft: of the model that drafts.
    batch_size: B.
    input_length: S, of both.
    target_length: T.
    draft_length: tokens that are drafted in a round, one position a call.
    block_efficiency: tokens that an output gains in a round.
  """
  B, S, T = batch_size, input_length, target_length
  rounds = T / block_efficiency
  of_target = _call(target, B, S, T, draft_length + 1, 4).times(rounds)
  of_draft = _call(draft, B, S, T, 1, 4).times(rounds * draft_length)
  return of_target + of_draft + _cross(target, B, S, 4) + _cross(draft, B, S, 4)


def of_forward(
  model: ModelConfig,
  *,
  batch_size: int,
  input_length: int,
  target_length: int,
  weight_bytes: int = 4,
  with_encoder: bool = True,
) -> Cost:
  """Returns the cost of the logits of given outputs; args as `of_rollout`."""
  B, S, T = batch_size, input_length, target_length
  cost = _decoder(model, B, S, T, weight_bytes)
  cost += _head(model, B * T, weight_bytes)
  if with_encoder:
    cost += _encoder(model, B, S, weight_bytes)
  return cost


def of_unembed(model: ModelConfig, tokens: int, weight_bytes: int = 4) -> Cost:
  """Returns the cost of projecting hidden states of tokens to logits."""
  return _head(model, tokens, weight_bytes)


def of_call(
  model: ModelConfig,
  method: str,
  shapes: Sequence[Sequence[int]],
  weight_bytes: int = 4,
) -> Cost | None:
  """Returns the cost of one call of a method of a model.

  Args:
    model: its shape.
    method: of `models.interface.Model`.
    shapes: of the arrays that it is called with, without the parameters.
    weight_bytes: bytes per weight.

  Returns:
    None for a method other than 'encode', 'decode' and 'unembed'.
  """
  if method == 'encode':
    (B, S), *_ = shapes
    return _encoder(model, B, S, weight_bytes)
  if method == 'decode':
    _, (_, S), (B, T), *_ = shapes
    return _decoder(model, B, S, T, weight_bytes)
  if method == 'unembed':
    (*tokens, _), *_ = shapes
    return _head(model, math.prod(tokens), weight_bytes)
  return None


def count_weights(config: ModelConfig) -> int:
  """Returns the number of parameters in matrices, without norms and biases."""
  c = config
  encoder = c.encoder.num_layers * (
    _attention(c, c.encoder) + _mlp(c, c.encoder)
  )
  own = _attention(c, c.decoder) + _mlp(c, c.decoder)
  cross = 0
  if c.has_cross_attention:
    cross = _queries(c, c.decoder) + _keys(c, c.decoder, c.encoder.emb_dim)
  decoder = c.decoder.num_layers * (own + cross)
  # The first table is the output projection.
  tables = c.decoder.emb_dim + (c.num_tables - 1) * c.encoder.emb_dim
  return encoder + decoder + c.vocab_size * tables


def cache_bytes(
  config: ModelConfig, *, batch_size: int, input_length: int, target_length: int
) -> int:
  """Returns the bytes of the KV cache of sampling, without windows."""
  width = WIDTHS[config.dtype]
  tokens = batch_size * (input_length + target_length)
  return tokens * _cached(config) * width


def _cached(c: ModelConfig) -> int:
  """Returns how many numbers the decoder caches of a token."""
  stack = c.decoder
  return 2 * stack.num_layers * stack.num_kv_heads * c.head_dim


def _queries(c: ModelConfig, stack: StackShape) -> int:
  """Returns the weights of queries and outputs of an attention."""
  return 2 * stack.emb_dim * stack.num_heads * c.head_dim


def _keys(c: ModelConfig, stack: StackShape, emb_dim: int) -> int:
  """Returns the weights of keys and values of an attention.

  Args:
    c: the model's shape.
    stack: of the attention.
    emb_dim: width of what it attends to.
  """
  return 2 * emb_dim * stack.num_kv_heads * c.head_dim


def _attention(c: ModelConfig, stack: StackShape) -> int:
  return _queries(c, stack) + _keys(c, stack, stack.emb_dim)


def _mlp(c: ModelConfig, stack: StackShape) -> int:
  return (len(c.mlp_activations) + 1) * stack.emb_dim * stack.mlp_dim


def _products(
  stack: StackShape,
  weights: float,
  rows: float,
  pairs: float,
  c: ModelConfig,
  weight_bytes: int,
) -> Cost:
  """Returns the cost of the matrix products of a stack of layers.

  Args:
    stack: the shape of its layers.
    weights: weights per layer, each multiplied with each token.
    rows: tokens in the batch.
    pairs: pairs of query and key in the batch; windows are not counted.
    c: the model's shape.
    weight_bytes: bytes per weight.
  """
  # Scores, then values.
  attended = 4.0 * pairs * stack.num_heads * c.head_dim
  return Cost(
    stack.num_layers * (2.0 * rows * weights + attended),
    float(stack.num_layers * weights * weight_bytes),
  )


def _encoder(c: ModelConfig, B: int, S: int, weight_bytes: int) -> Cost:
  weights = _attention(c, c.encoder) + _mlp(c, c.encoder)
  return _products(c.encoder, weights, B * S, B * S * S, c, weight_bytes)


def _of_targets(c: ModelConfig) -> int:
  """Returns the weights of a decoder layer that multiply the targets.

  In the attention to the encoder these are queries and outputs.
  """
  weights = _attention(c, c.decoder) + _mlp(c, c.decoder)
  if c.has_cross_attention:
    weights += _queries(c, c.decoder)
  return weights


def _decoder(c: ModelConfig, B: int, S: int, T: int, weight_bytes: int) -> Cost:
  """The decoder, teacher-forced, with keys and values of the inputs."""
  return _products(
    c.decoder, _of_targets(c), B * T, B * T * (T + S), c, weight_bytes
  ) + _cross(c, B, S, weight_bytes)


def _cross(c: ModelConfig, B: int, S: int, weight_bytes: int) -> Cost:
  """The decoder's keys and values of the inputs, once for all tokens."""
  weights = _keys(c, c.decoder, c.encoder.emb_dim)
  cost = _products(c.decoder, weights, B * S, 0, c, weight_bytes)
  # Kernels that the decoder's self-attention also uses are counted there.
  return cost if c.has_cross_attention else cost._replace(bytes=0.0)


def _head(c: ModelConfig, tokens: int, weight_bytes: int) -> Cost:
  size = c.decoder.emb_dim * c.vocab_size
  return Cost(2.0 * tokens * size, float(size * weight_bytes))


def _sampling(
  c: ModelConfig, B: int, S: int, T: int, weight_bytes: int
) -> Cost:
  """Sampling T tokens, one position a call."""
  one = _call(c, B, S, T, 1, weight_bytes)
  return one.times(T) + _cross(c, B, S, weight_bytes)


def _call(
  c: ModelConfig, B: int, S: int, T: int, num_positions: int, weight_bytes: int
) -> Cost:
  """One cached call; it reads all decoder weights and the KV cache."""
  seen = (T + 1) / 2  # keys of the self-attention, on average
  rows = B * num_positions
  one = _products(
    c.decoder, _of_targets(c), rows, rows * (seen + S), c, weight_bytes
  ) + _head(c, rows, weight_bytes)
  return one + Cost(0.0, B * (seen + S) * float(_cached(c) * weight_bytes))
