# SPDX-License-Identifier: Apache-2.0
"""Lower bounds of the FLOPs and memory traffic of an on-policy step.

They are computed from shapes, because XLA's cost analysis counts the body of a
loop once for any number of iterations. A multiplication and an addition
are two FLOPs. Only matrix products are counted; all other operations are less
than 1 % of them. Bytes are the memory traffic that remains with a perfect
cache: each array that a phase needs is read or written once.
"""

from typing import NamedTuple

from gkd_jax.models.interface import ModelConfig


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
    num_microbatches: parts of the batch; every phase but sampling reads the
      weights once per part.
    weight_bytes: bytes per weight in the student's products, 2 for bfloat16.
    teacher_weight_bytes: bytes per weight in the teacher's products.
    moments: float32 numbers that the optimizer keeps per parameter; 2 for Adam.

  Returns:
    {'student_encoder', 'sampling', 'teacher', 'student', 'optimizer': cost}.
    'student' is the student's decoder, the objective (with the teacher's
    projection to the vocabulary) and the backward pass. Each phase is the named
    scope of that name in `step`.
  """
  rows = batch_size // num_microbatches
  encoder = _encoder(student, rows, input_length, weight_bytes)
  decoder = _decoder(student, rows, input_length, target_length, weight_bytes)
  heads = _head(student, rows * target_length, weight_bytes).times(3)
  of_part = {}
  if teacher is not None:
    heads += _head(teacher, rows * target_length, teacher_weight_bytes)
    read = teacher_input_length or input_length
    of_part['teacher'] = _encoder(
      teacher, rows, read, teacher_weight_bytes
    ) + _decoder(teacher, rows, read, target_length, teacher_weight_bytes)
  # The backward pass has two products for each of the forward pass.
  again = 1 if student.remat else 0
  shared = num_microbatches == 1 and student.dropout_rate == 0.0
  of_encoder = 2 + again + (0 if shared else 1)
  body = decoder.times(3 + again) + encoder.times(of_encoder)
  of_part |= {'student_encoder': encoder, 'student': body + heads}
  num_params = count_weights(student)
  return {
    **{name: c.times(num_microbatches) for name, c in of_part.items()},
    'sampling': _sampling(
      student, batch_size, input_length, target_length, weight_bytes
    ),
    # Reads gradient, parameter and moments, writes the latter two.
    'optimizer': Cost(0.0, 4.0 * num_params * (3 + 2 * moments)),
  }


def count_weights(config: ModelConfig) -> int:
  """Returns the number of parameters in matrices, without norms and biases."""
  c = config
  encoder = c.num_encoder_layers * (_attention(c) + _mlp(c))
  decoder = c.num_decoder_layers * (2 * _attention(c) + _mlp(c))
  tables = 1 if c.logits_via_embedding else 2
  return encoder + decoder + tables * c.vocab_size * c.emb_dim


def cache_bytes(
  config: ModelConfig, *, batch_size: int, input_length: int, target_length: int
) -> int:
  """Returns the bytes of the KV cache of sampling."""
  c = config
  width = {'float32': 4, 'bfloat16': 2}[c.dtype]
  tokens = batch_size * (input_length + target_length)
  return 2 * c.num_decoder_layers * tokens * c.num_heads * c.head_dim * width


def _attention(c: ModelConfig) -> int:
  return 4 * c.emb_dim * c.num_heads * c.head_dim


def _mlp(c: ModelConfig) -> int:
  return (len(c.mlp_activations) + 1) * c.emb_dim * c.mlp_dim


def _products(
  num_layers: int, weights: float, rows: float, pairs: float, c, weight_bytes
) -> Cost:
  """Returns the cost of the matrix products of a stack of layers.

  Args:
    num_layers: number of layers.
    weights: weights per layer, each multiplied with each token.
    rows: tokens in the batch.
    pairs: pairs of query and key in the batch.
    c: the model's shape.
    weight_bytes: bytes per weight.
  """
  attended = 4.0 * pairs * c.num_heads * c.head_dim  # scores, then values
  return Cost(
    num_layers * (2.0 * rows * weights + attended),
    float(num_layers * weights * weight_bytes),
  )


def _encoder(c: ModelConfig, B: int, S: int, weight_bytes: int) -> Cost:
  weights = _attention(c) + _mlp(c)
  return _products(
    c.num_encoder_layers, weights, B * S, B * S * S, c, weight_bytes
  )


def _decoder(c: ModelConfig, B: int, S: int, T: int, weight_bytes: int) -> Cost:
  """The decoder, teacher-forced, with the cross-attention's keys and values."""
  # The cross-attention applies half of its weights to the inputs (keys and
  # values) and half to the targets (queries and outputs).
  targets = 1.5 * _attention(c) + _mlp(c)
  return _products(
    c.num_decoder_layers, targets, B * T, B * T * (T + S), c, weight_bytes
  ) + _cross(c, B, S, weight_bytes)


def _cross(c: ModelConfig, B: int, S: int, weight_bytes: int) -> Cost:
  """The cross-attention's keys and values, once for all tokens."""
  return _products(
    c.num_decoder_layers, 0.5 * _attention(c), B * S, 0, c, weight_bytes
  )


def _head(c: ModelConfig, tokens: int, weight_bytes: int) -> Cost:
  size = c.emb_dim * c.vocab_size
  return Cost(2.0 * tokens * size, float(size * weight_bytes))


def _sampling(
  c: ModelConfig, B: int, S: int, T: int, weight_bytes: int
) -> Cost:
  """Sampling T tokens; each step reads all decoder weights and the KV cache."""
  weights = 1.5 * _attention(c) + _mlp(c)
  seen = (T + 1) / 2  # keys of the self-attention, on average
  one = _products(
    c.num_decoder_layers, weights, B, B * (seen + S), c, weight_bytes
  ) + _head(c, B, weight_bytes)
  cached = 2.0 * c.num_decoder_layers * c.num_heads * c.head_dim * weight_bytes
  caches = Cost(0.0, B * (seen + S) * cached)
  return (one + caches).times(T) + _cross(c, B, S, weight_bytes)
