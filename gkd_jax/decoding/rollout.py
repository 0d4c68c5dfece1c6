# SPDX-License-Identifier: Apache-2.0
"""Samples one output of a model for each input, inside a compiled step."""

import jax

from gkd_jax.batch import SpecialIds, mask_unused_ids
from gkd_jax.decoding import sampler
from gkd_jax.decoding.calculator import Calculator
from gkd_jax.models.interface import Model, Params


@jax.named_scope('sampling')
def rollout(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  rng: jax.Array,
  config: sampler.SamplerConfig,
  *,
  row_ids_B: jax.Array,
  max_decode_len: int,
  ids: SpecialIds,
  encoded: jax.Array | None = None,
  calculator: Calculator | None = None,
) -> sampler.Rollout:
  """Samples one output of a model for each input; no gradient.

  Args:
    model: generates the outputs.
    params: its parameters.
    encoder_input_tokens: [B, S] int32.
    rng: key of this batch.
    config: how to draw.
    row_ids_B: [B] number of each row in the global batch.
    max_decode_len: T.
    ids: the special ids of model and vocabulary.
    encoded: [B, S, D] encoder output; None: the encoder runs here.
    calculator: required if `config.calculator` is set.

  Returns:
    A `sampler.Rollout` of shapes [B, T].
  """
  params = jax.lax.stop_gradient(params)
  if encoded is None:
    encoded = model.apply(
      {'params': params}, encoder_input_tokens, method='encode'
    )
  # Once, not for each token.
  variables = {'params': model.gather_params(params)}
  cache = model.apply(
    variables,
    jax.lax.stop_gradient(encoded),
    encoder_input_tokens,
    max_decode_len,
    method='start_cache',
  )

  def decode_step(cache, tokens_B):
    logits, cache = model.apply(
      variables, cache, tokens_B, method='decode_step'
    )
    return mask_unused_ids(logits, ids), cache

  return sampler.sample(
    decode_step,
    cache,
    rng,
    config,
    row_ids_B=row_ids_B,
    max_decode_len=max_decode_len,
    ids=ids,
    calculator=calculator,
  )
