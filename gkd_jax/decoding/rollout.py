# SPDX-License-Identifier: Apache-2.0
"""Samples one output for each input, inside a compiled step; no gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import SpecialIds, mask_unused_ids
from gkd_jax.decoding import pair, sampler, speculative
from gkd_jax.decoding.calculator import Calculator
from gkd_jax.models.interface import Model, Params


class Writer(NamedTuple):
  """A model that writes outputs for given inputs.

  Attributes:
    model: generates the outputs.
    params: its parameters.
    encoder_input_tokens: [B, S] int32.
    config: how to draw.
    encoded: [B, S, D] encoder output; None: the encoder runs here.
  """

  model: Model
  params: Params
  encoder_input_tokens: jax.Array
  config: sampler.SamplerConfig
  encoded: jax.Array | None = None


@jax.named_scope('sampling')
def rollout(
  writer: Writer,
  rng: jax.Array,
  *,
  row_ids_B: jax.Array,
  max_decode_len: int,
  ids: SpecialIds,
  calculator: Calculator | None = None,
  prefix: sampler.Prefix | None = None,
  num_outputs: int = 1,
) -> sampler.Rollout:
  """Samples outputs of a model for each input.

  Args:
    writer: model, parameters, inputs, and how to draw.
    rng: key of this batch.
    row_ids_B: [B] number of each row in the global batch.
    max_decode_len: T.
    ids: the special ids of model and vocabulary.
    calculator: required if `writer.config.calculator` is set.
    prefix: tokens to continue, of each output; None: none.
    num_outputs: n, outputs for each input. The encoder and the keys and values
      of its outputs are computed once for an input.

  Returns:
    A `sampler.Rollout` of shapes [n B, T]; rows n i to n i + n - 1 belong to
    input i.
  """
  decode_step, cache = _start(writer, max_decode_len, ids)
  if num_outputs > 1:
    cache = jax.tree.map(
      lambda x: jnp.repeat(x, num_outputs, axis=0) if x.ndim else x, cache
    )
    row_ids_B = jnp.repeat(row_ids_B, num_outputs) * num_outputs + jnp.tile(
      jnp.arange(num_outputs), row_ids_B.shape[0]
    )
  return sampler.sample(
    decode_step,
    cache,
    rng,
    writer.config,
    row_ids_B=row_ids_B,
    max_decode_len=max_decode_len,
    ids=ids,
    calculator=calculator,
    prefix=prefix,
    vocab_shards=_vocab_shards(writer.model),
  )


@jax.named_scope('sampling')
def rollout_pair(
  student: Writer,
  teacher: Writer,
  rng: jax.Array,
  choose: pair.Choose,
  *,
  row_ids_B: jax.Array,
  max_decode_len: int,
  ids: SpecialIds,
) -> pair.PairRollout:
  """Samples one output for each input, which two models write together.

  Args:
    student: model, parameters and inputs.
    teacher: likewise; its inputs may be longer.
    rng: key of this batch.
    choose: chooses the token of each row; see `pair`.
    row_ids_B: [B] number of each row in the global batch.
    max_decode_len: T.
    ids: the special ids of both models and their vocabulary.
  """
  writers = (student, teacher)
  starts = [_start(writer, max_decode_len, ids) for writer in writers]
  decode_steps, caches = zip(*starts, strict=True)
  return pair.sample(
    decode_steps,
    caches,
    rng,
    (student.config, teacher.config),
    choose,
    row_ids_B=row_ids_B,
    max_decode_len=max_decode_len,
    ids=ids,
  )


@jax.named_scope('sampling')
def rollout_drafted(
  target: Writer,
  draft: Writer,
  rng: jax.Array,
  drafting: speculative.Drafting,
  *,
  row_ids_B: jax.Array,
  max_decode_len: int,
  ids: SpecialIds,
) -> speculative.Drafted:
  """Samples one output of a model for each input, drafted by another.

  Args:
    target: model, parameters, inputs, and how to draw.
    draft: model, parameters and inputs; it draws as the target does.
    rng: key of this batch.
    drafting: how to draft.
    row_ids_B: [B] number of each row in the global batch.
    max_decode_len: T.
    ids: the special ids of both models and their vocabulary.

  Raises:
    ValueError: the draft draws in another way, or there is a calculator.
  """
  if draft.config != target.config:
    raise ValueError(
      f'The draft must draw as the target does, {target.config}; got '
      f'{draft.config}.'
    )
  length = speculative.cache_length(max_decode_len, drafting)
  starts = [
    _start(writer, length, ids, method='decode_block')
    for writer in (target, draft)
  ]
  decode_blocks, caches = zip(*starts, strict=True)
  return speculative.sample(
    *decode_blocks,
    caches,
    rng,
    target.config,
    drafting,
    row_ids_B=row_ids_B,
    max_decode_len=max_decode_len,
    ids=ids,
  )


def _vocab_shards(model: Model) -> int:
  """Returns the number of devices that a row of logits is sharded over."""
  return 1 if model.placement is None else model.placement.num_shards('vocab')


def _start(
  writer: Writer,
  max_decode_len: int,
  ids: SpecialIds,
  method: str = 'decode_step',
) -> tuple[Callable[..., tuple[jax.Array, Any]], Any]:
  """Returns a writer's method that decodes, and its cache before it."""
  model, inputs = writer.model, writer.encoder_input_tokens
  params = jax.lax.stop_gradient(writer.params)
  encoded = writer.encoded
  if encoded is None:
    encoded = model.apply({'params': params}, inputs, method='encode')
  # Once, not for each token.
  variables = {'params': model.gather_params(params)}
  cache = model.apply(
    variables,
    jax.lax.stop_gradient(encoded),
    inputs,
    max_decode_len,
    method='start_cache',
  )

  def decode(cache, *tokens):
    logits, cache = model.apply(variables, cache, *tokens, method=method)
    return mask_unused_ids(logits, ids), cache

  return decode, cache
