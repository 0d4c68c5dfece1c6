# SPDX-License-Identifier: Apache-2.0
"""Generates a model's outputs outside of a training step."""

import functools

import jax
import jax.numpy as jnp

from gkd_jax.batch import SpecialIds, mask_unused_ids
from gkd_jax.decoding import beam_search, sampler
from gkd_jax.decoding.rollout import Writer, rollout
from gkd_jax.models.interface import Model, Params


def generate(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  config: sampler.SamplerConfig | beam_search.BeamConfig,
  *,
  rng: jax.Array | None = None,
  max_decode_len: int,
  num_ids: int | None = None,
) -> sampler.Rollout | beam_search.Beams:
  """Generates outputs; compiled once for each model, config and shape.

  Args:
    model: any.
    params: its parameters.
    encoder_input_tokens: [B, S] int32, the model's pad id after the end.
    config: a `SamplerConfig`, or a `BeamConfig` for beam search.
    rng: a key; not used by beam search and at temperature 0.
    max_decode_len: T, at most.
    num_ids: ids of the tokenizer; None: the rows of the model's embedding.

  Returns:
    For a sampler: `Rollout`, one output per row, of shapes [B, T]. For beam
    search: `Beams`, the hypotheses [B, num_beams, T], best first.

  Raises:
    ValueError: the config has a calculator, or it samples and there is no rng.
  """
  if isinstance(config, sampler.SamplerConfig):
    if config.calculator:
      raise ValueError(
        'SamplerConfig.calculator needs a vocabulary: evaluate with '
        '--run_mode=eval, or pass a Calculator to decoding.rollout.'
      )
    if rng is None and config.temperature > 0.0:
      raise ValueError('Sampling needs rng, e.g. jax.random.key(0).')
  ids = model.config.special_ids(num_ids or model.config.vocab_size)
  if rng is None:
    rng = jax.random.key(0)
  tokens = jnp.asarray(encoder_input_tokens, jnp.int32)
  return _generate(model, params, tokens, config, rng, max_decode_len, ids)


@functools.partial(jax.jit, static_argnums=(0, 3, 5, 6))
def _generate(model, params, tokens, config, rng, max_decode_len, ids):
  if isinstance(config, beam_search.BeamConfig):
    return search(
      model, params, tokens, config, max_decode_len=max_decode_len, ids=ids
    )
  return rollout(
    Writer(model, params, tokens, config),
    rng,
    row_ids_B=jnp.arange(tokens.shape[0]),
    max_decode_len=max_decode_len,
    ids=ids,
  )


def search(
  model: Model,
  params: Params,
  encoder_input_tokens: jax.Array,
  config: beam_search.BeamConfig,
  *,
  max_decode_len: int,
  ids: SpecialIds,
) -> beam_search.Beams:
  """Runs beam search with a model.

  Args:
    model: any.
    params: its parameters.
    encoder_input_tokens: [B, S] int32.
    config: width and length penalty.
    max_decode_len: T.
    ids: the special ids of model and vocabulary.
  """
  width = config.num_beams
  encoded = model.apply(
    {'params': params}, encoder_input_tokens, method='encode'
  )
  encoded = jnp.repeat(encoded, width, axis=0)
  params = model.gather_params(params)  # once, not for each token
  apply = functools.partial(model.apply, {'params': params})
  inputs = jnp.repeat(encoder_input_tokens, width, axis=0)
  cache = apply(encoded, inputs, max_decode_len, method='start_cache')

  def decode_step(cache, tokens):
    logits, cache = apply(cache, tokens, method='decode_step')
    return mask_unused_ids(logits, ids), cache

  return beam_search.beam_search(
    decode_step,
    cache,
    config,
    batch_size=encoder_input_tokens.shape[0],
    max_decode_len=max_decode_len,
    ids=ids,
  )
