# SPDX-License-Identifier: Apache-2.0
"""The pass of the teachers over given outputs, up to their logits.

One teacher is one model with one input. Several are combined into one
distribution where their logits are computed, chunk by chunk.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import Batch, SpecialIds, align_logits
from gkd_jax.distill.chunked_sums import Unembed
from gkd_jax.distill.teachers import READS, Combine, Several, Teacher, Weighted

Params = Any


def unembed(model) -> Unembed:
  """Returns (head parameters, hidden [..., D]) -> logits [..., V]."""

  def apply(head, hidden):
    return model.apply({'params': head}, hidden, method='unembed')

  return apply


def hidden_states(
  model,
  params: Params,
  encoder_input_tokens: jax.Array,
  target_tokens: jax.Array,
  *,
  encoded: jax.Array | None = None,
  dropout_rng: jax.Array | None = None,
  num_microbatches: int = 1,
) -> jax.Array:
  """Returns a model's hidden states before the projection, of each target row.

  Args:
    model: encoder-decoder.
    params: its parameters.
    encoder_input_tokens: [B, S] int32.
    target_tokens: [B, T] int32; or [n B, T], n rows for each input in turn.
    encoded: [B, S, D] encoder output; None: the encoder runs here, on B rows.
    dropout_rng: enables dropout; None: no dropout.
    num_microbatches: each layer processes the rows in this many parts.
  """
  keywords = {'deterministic': dropout_rng is None}
  keywords |= microbatches_keyword(num_microbatches)
  if dropout_rng is not None:
    encoder_rng, decoder_rng = jax.random.split(dropout_rng)
  apply = functools.partial(model.apply, {'params': params})
  if encoded is None:
    rngs = None if dropout_rng is None else {'dropout': encoder_rng}
    encoded = apply(
      encoder_input_tokens, method='encode', rngs=rngs, **keywords
    )
  encoded, encoder_input_tokens = repeat_rows(
    (encoded, encoder_input_tokens), target_tokens
  )
  rngs = None if dropout_rng is None else {'dropout': decoder_rng}
  return apply(
    encoded,
    encoder_input_tokens,
    target_tokens,
    method='decode',
    rngs=rngs,
    **keywords,
  )


def repeat_rows(of_inputs, outputs: jax.Array):
  """Repeats arrays [B, ...] of the inputs for each row of outputs [n B, T]."""

  def repeat(x):
    number = outputs.shape[0] // x.shape[0]
    return x if number == 1 else jnp.repeat(x, number, axis=0)

  return jax.tree.map(repeat, of_inputs)


def microbatches_keyword(number: int) -> dict[str, int]:
  """Returns the keyword of a model's methods; none for 1 microbatch."""
  return {'num_microbatches': number} if number > 1 else {}


class Reading(NamedTuple):
  """A model and what it reads.

  Attributes:
    name: of the member.
    model: see `models.interface`.
    source: name of its parameters; None: there are no others.
    reads: a property of `Batch`, one of `teachers.READS`.
  """

  name: str
  model: Any
  source: str | None
  reads: str

  def params_of(self, params: Params) -> Params:
    return params if self.source is None else params[self.source]


class OfSeveral(NamedTuple):
  """Hidden states of several teachers, or of one that a row names.

  Attributes:
    hidden: of each reading: [B, T, D].
    route_BT: [B, T] int32, the reading that grades the row, from 1; 0, which
      also fills chunks up: none. None: all grade all rows.
  """

  hidden: tuple[jax.Array, ...]
  route_BT: jax.Array | None = None


class Graded(NamedTuple):
  """Logits of several teachers on the same tokens.

  Attributes:
    combined: [..., V] of their combination, or of each row's own teacher.
    members: {name: [..., V]} of each; empty for one teacher, and if routed.
    own_rows: if routed, {name: [...]}: whether the row is the teacher's own.
  """

  combined: jax.Array | Weighted
  members: Mapping[str, jax.Array] = {}
  own_rows: Mapping[str, jax.Array] = {}


@dataclasses.dataclass(frozen=True)
class Grader:
  """The teachers of a step, as one.

  Attributes:
    readings: sorted by the members' names.
    combine: see `teachers.Several`; None: one reading, or one per row.
  """

  readings: tuple[Reading, ...]
  combine: Combine | None = None

  @property
  def is_single(self) -> bool:
    return self.combine is None and len(self.readings) == 1

  @property
  def is_routed(self) -> bool:
    return self.combine is None and not self.is_single

  @property
  def names(self) -> list[str]:
    """The members of several teachers; of one teacher: none."""
    return [] if self.is_single else [x.name for x in self.readings]

  def hidden_states(
    self,
    params: Params,
    batch: Batch,
    tokens: jax.Array,
    num_microbatches: int = 1,
  ) -> jax.Array | OfSeveral:
    """Returns the hidden states of outputs.

    Args:
      params: of the teacher, or {name: parameters} of several.
      batch: the inputs, and the teacher of each row if it is routed.
      tokens: [B, T] outputs; or [n B, T], n rows for each input in turn.
      num_microbatches: each layer processes the rows in this many parts.

    Returns:
      An array [B, T, D], or those of several teachers. A routed teacher that no
      row names is not run: its hidden states are 0.

    Raises:
      ValueError: the teachers are routed, and the batch names none.
    """

    def run(reading):
      return hidden_states(
        reading.model,
        reading.params_of(params),
        getattr(batch, reading.reads),
        tokens,
        num_microbatches=num_microbatches,
      )

    if self.is_single:
      return run(self.readings[0])
    if not self.is_routed:
      return OfSeveral(tuple(run(reading) for reading in self.readings))
    if batch.teacher_ids is None:
      raise ValueError(
        f'Each row names one of the teachers {", ".join(self.names)}, but the '
        'batch has no teacher_ids.'
      )

    def run_if_named(i, reading):
      shape = jax.eval_shape(functools.partial(run, reading))
      return jax.lax.cond(
        (batch.teacher_ids == i).any(),
        functools.partial(run, reading),
        lambda: jnp.zeros(shape.shape, shape.dtype),
      )

    route_B = 1 + repeat_rows(batch.teacher_ids, tokens)
    return OfSeveral(
      tuple(run_if_named(i, x) for i, x in enumerate(self.readings)),
      jnp.broadcast_to(route_B[:, None], tokens.shape),
    )

  def heads(self, params: Params, *, gather: bool = False) -> Params:
    """Returns the parameters of the projection to the vocabulary.

    Args:
      params: see `hidden_states`.
      gather: whether to gather them over the mesh first.
    """

    def head(reading):
      own = reading.params_of(params)
      if gather:
        own = reading.model.gather_params(own)
      return reading.model.head_params(own)

    heads = tuple(head(reading) for reading in self.readings)
    return heads[0] if self.is_single else heads

  def unembed(self, ids: SpecialIds) -> Callable[..., jax.Array | Weighted]:
    """Returns (heads, hidden states) -> logits of the combination [..., V]."""
    if self.is_single:
      return unembed(self.readings[0].model)
    each = self.unembed_each(ids)
    return lambda heads, hidden: each(heads, hidden).combined

  def unembed_each(self, ids: SpecialIds) -> Callable[..., 'Graded']:
    """Returns (heads, hidden states) -> logits; see `Graded`."""

    def apply(heads, hidden):
      if self.is_single:
        return Graded(unembed(self.readings[0].model)(heads, hidden))
      if self.is_routed:
        own_rows = {
          name: hidden.route_BT == i for i, name in enumerate(self.names, 1)
        }
        return Graded(self._unembed_routed(heads, hidden), own_rows=own_rows)
      logits = self._unembed_all(ids, heads, hidden)
      members = dict(zip(self.names, logits, strict=True))
      return Graded(self.combine(logits), members)

    return apply

  def _unembed_all(self, ids, heads, hidden):
    """Returns the logits of each reading, masked and of the same width."""
    all_logits = [
      unembed(reading.model)(head, x).astype(jnp.float32)
      for reading, head, x in zip(
        self.readings, heads, hidden.hidden, strict=True
      )
    ]
    return align_logits(all_logits, ids)

  def _unembed_routed(self, heads, hidden):
    """Returns the logits of each row's own teacher, without running others."""

    def logits_of(reading, head, x):
      return unembed(reading.model)(head, x).astype(jnp.float32)

    own = [
      functools.partial(logits_of, *of_reading)
      for of_reading in zip(self.readings, heads, hidden.hidden, strict=True)
    ]
    shapes = [jax.eval_shape(function).shape for function in own]
    width = min(shape[-1] for shape in shapes)
    logits = jnp.zeros((*shapes[0][:-1], width), jnp.float32)
    for i, function in enumerate(own, 1):
      is_own = hidden.route_BT == i

      def select(others, function=function, is_own=is_own):
        return jnp.where(is_own[..., None], function()[..., :width], others)

      logits = jax.lax.cond(is_own.any(), select, lambda others: others, logits)
    return logits


def make_grader(teacher: Teacher | Several, student, models: Any) -> Grader:
  """Returns the grader of a teacher.

  Args:
    teacher: of the method.
    student: the student's model: that of teachers without a checkpoint.
    models: the model of the only checkpoint, or {name: model}.
  """

  def model_of(one):
    if not one.needs_checkpoint:
      return student
    return (
      models if one.checkpoint_name is None else models[one.checkpoint_name]
    )

  if not isinstance(teacher, Several):
    return Grader((Reading('', model_of(teacher), None, READS[0]),))
  return Grader(
    tuple(
      Reading(name, model_of(teacher.teachers[x.teacher]), x.teacher, x.reads)
      # Sorted, as the data numbers the teachers of its examples.
      for name, x in sorted(teacher.members.items())
    ),
    teacher.combine,
  )
