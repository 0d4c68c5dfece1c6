# SPDX-License-Identifier: Apache-2.0
"""Sums over tokens of functions of both models' logits, chunk by chunk.

No `[B, T, V]` array exists: each chunk of tokens is projected to the
vocabulary, compared and differentiated before the next. `weighted_sums` has a
custom gradient (jax.custom_vjp), so its functions must not close over traced
arrays: all arrays that they read are arguments.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Head = Any  # parameters of a projection to the vocabulary
Unembed = Callable[[Head, jax.Array], jax.Array]  # (head, [..., D]) -> [..., V]


class Extras(NamedTuple):
  """Further inputs of the functions of logits.

  Attributes:
    heads: parameters that are learnt beside the student; differentiable.
    carried: state of the method; constant.
    per_token: {name: [B, T]} constants; in a chunk [B, chunk_len].
  """

  heads: Any = ()
  carried: Any = ()
  per_token: dict[str, jax.Array] = {}


# (student logits [..., V], teacher logits [..., V] or None, tokens [...],
# extras) -> {name: [...]}: named quantities of each token.
Terms = Callable[..., dict[str, jax.Array]]
# A term that has a gradient by `worth`, but no sum.
LSE = 'lse'


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def weighted_sums(
  terms: Terms,
  student_unembed: Unembed,
  teacher_unembed: Unembed | None,
  chunk_tokens: int,
  student_head: Head,
  student_hidden: jax.Array,
  teacher_head: Head | None,
  teacher_hidden: jax.Array | None,
  tokens: jax.Array,
  coefficients: jax.Array,
  worth: dict[str, jax.Array] | None = None,
  extras: Extras | None = None,
) -> dict[str, jax.Array]:
  """Sums each term over all tokens without holding all logits in memory.

  Differentiable through 'loss' with respect to `student_head`,
  `student_hidden` and `extras.heads`. The forward pass computes loss and
  gradient of each chunk and keeps the gradients, which are as large as these
  arguments, not as the logits; the backward pass only scales them.

  Args:
    terms: the terms to sum. It receives `extras` only if they are given.
    student_unembed: (head, hidden) -> logits.
    teacher_unembed: (head, hidden) -> logits; None without a teacher.
    chunk_tokens: number of tokens whose logits are in memory at once, at least
      B: chunks are cut along T, so that a batch stays sharded over devices.
    student_head: parameters of `student_unembed`.
    student_hidden: [B, T, D].
    teacher_head: constant.
    teacher_hidden: [B, T, D'] constant; None without a teacher.
    tokens: [B, T] int32.
    coefficients: [B, T] weight of each token's terms, constant.
    worth: {name of a term: [B, T] constants}: adds `worth * grad term` to the
      gradient and nothing to the sums. None: nothing.
    extras: further inputs of `terms`.

  Returns:
    {name: [] float32}.
  """
  arrays = (tokens, coefficients, worth, teacher_hidden, extras)

  def add_chunk(sums, chunk):
    new = _chunk_sums(
      terms, student_unembed, teacher_unembed, teacher_head, chunk
    )(student_head, chunk['student_hidden'], chunk['extras'].heads)
    return _add(sums, new), None

  sums, _ = _scan(add_chunk, chunk_tokens, student_hidden, *arrays)
  return sums


def _weighted_sums_fwd(
  terms,
  student_unembed,
  teacher_unembed,
  chunk_tokens,
  student_head,
  student_hidden,
  teacher_head,
  teacher_hidden,
  tokens,
  coefficients,
  worth,
  extras,
):
  arrays = (tokens, coefficients, worth, teacher_hidden, extras)

  def add_chunk(total, chunk):
    def loss(head, hidden, heads):
      sums = _chunk_sums(
        terms, student_unembed, teacher_unembed, teacher_head, chunk
      )(head, hidden, heads)
      return sums['loss'], sums

    (_, sums), (d_head, d_hidden, d_heads) = jax.value_and_grad(
      loss, argnums=(0, 1, 2), has_aux=True
    )(student_head, chunk['student_hidden'], chunk['extras'].heads)
    return _add(total, (sums, d_head, d_heads)), d_hidden

  (sums, d_head, d_heads), d_hidden = _scan(
    add_chunk, chunk_tokens, student_hidden, *arrays
  )
  d_hidden = _join(d_hidden, student_hidden.shape[1])
  d_extras = None if extras is None else Extras(d_heads, None, None)
  return sums, (d_head, d_hidden, d_extras)


def _weighted_sums_bwd(
  terms, student_unembed, teacher_unembed, chunk_tokens, kept, cotangents
):
  del terms, student_unembed, teacher_unembed, chunk_tokens
  scale = cotangents['loss']
  d_head, d_hidden, d_extras = jax.tree.map(
    lambda x: (scale * x).astype(x.dtype), kept
  )
  return d_head, d_hidden, None, None, None, None, None, d_extras


weighted_sums.defvjp(_weighted_sums_fwd, _weighted_sums_bwd)


def token_values(
  values: Terms,
  student_unembed: Unembed,
  teacher_unembed: Unembed | None,
  chunk_tokens: int,
  student_head: Head,
  student_hidden: jax.Array,
  teacher_head: Head | None,
  teacher_hidden: jax.Array | None,
  tokens: jax.Array,
) -> dict[str, jax.Array]:
  """Returns named quantities of each token: {name: [B, T]}, no gradient.

  Args: see `weighted_sums`; `values` returns the quantities of a chunk.
  """
  student_head, student_hidden = jax.lax.stop_gradient(
    (student_head, student_hidden)
  )

  def values_of(_, chunk):
    return 0, values(
      student_unembed(student_head, chunk['student_hidden']),
      _teacher_logits(teacher_unembed, teacher_head, chunk),
      chunk['tokens'],
    )

  _, chunks = _scan(
    values_of, chunk_tokens, student_hidden, tokens, None, None, teacher_hidden
  )
  return {name: _join(x, tokens.shape[1]) for name, x in chunks.items()}


def _teacher_logits(teacher_unembed, teacher_head, chunk):
  if teacher_unembed is None:
    return None
  return teacher_unembed(teacher_head, chunk['teacher_hidden'])


def _chunk_sums(terms, student_unembed, teacher_unembed, teacher_head, chunk):
  def sums(student_head, student_hidden, heads):
    arguments = (
      student_unembed(student_head, student_hidden),
      _teacher_logits(teacher_unembed, teacher_head, chunk),
      chunk['tokens'],
    )
    if chunk['has_extras']:
      arguments = (*arguments, chunk['extras']._replace(heads=heads))
    values = terms(*arguments)
    totals = {
      name: jnp.sum(value * chunk['coefficients'])
      for name, value in values.items()
      if name != LSE
    }
    for name, worth in chunk.get('worth', {}).items():
      # Its value is 0, its gradient that of the term.
      term = values[name] - jax.lax.stop_gradient(values[name])
      totals['loss'] += jnp.sum(term * worth)
    return totals

  return sums


def _scan(
  add_chunk,
  chunk_tokens,
  student_hidden,
  tokens,
  coefficients,
  worth,
  teacher_hidden,
  extras=None,
):
  """Runs add_chunk(total, chunk) over chunks along T; the first total is None.

  Returns:
    The last total, and each chunk's second result, stacked: [chunks, ...].
  """
  batch_size, length = tokens.shape
  chunk_len = min(length, max(1, chunk_tokens // batch_size))
  num_chunks = -(-length // chunk_len)
  # Equal chunks: 17 positions in chunks of 16 would compute 32 positions.
  chunk_len = -(-length // num_chunks)

  def cut(x):
    fill = num_chunks * chunk_len - length
    x = jnp.pad(x, ((0, 0), (0, fill)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(batch_size, num_chunks, chunk_len, *x.shape[2:])
    return x.swapaxes(0, 1)

  whole = Extras() if extras is None else extras
  arrays = {
    'student_hidden': student_hidden,
    'tokens': tokens,
    'coefficients': coefficients,
    'teacher_hidden': teacher_hidden,
    'worth': worth,
    'per_token': whole.per_token,
  }
  chunks = {
    name: jax.tree.map(cut, x) for name, x in arrays.items() if x is not None
  }

  def add(total, chunk):
    per_token = chunk['per_token']
    chunk = chunk | {
      'extras': whole._replace(per_token=per_token),
      'has_extras': extras is not None,
    }
    return add_chunk(total, chunk)

  total, kept = add(None, jax.tree.map(lambda x: x[0], chunks))
  if num_chunks == 1:
    return total, jax.tree.map(lambda x: x[None], kept)
  rest = jax.tree.map(lambda x: x[1:], chunks)
  total, more = jax.lax.scan(add, total, rest)
  kept = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), kept, more)
  return total, kept


def _join(chunks, length):
  """[chunks, B, chunk_len, ...] -> [B, T, ...], without the padding."""
  x = chunks.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _add(total, new):
  return new if total is None else jax.tree.map(jnp.add, total, new)
