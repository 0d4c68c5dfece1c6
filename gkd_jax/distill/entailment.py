# SPDX-License-Identifier: Apache-2.0
"""A reward model: the probability that the input entails the output.

Source: Roit et al. (2023), arXiv:2306.00186.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gkd_jax.batch import Outputs, SpecialIds
from gkd_jax.distill import rewards


def entailment(
  task_prefix: str = '',
  premise: str = 'premise: ',
  hypothesis: str = ' hypothesis: ',
  entailed: str | int = '1',
  not_entailed: str | int = '0',
  max_input_len: int | None = None,
  log_probability: bool = False,
  reverse: bool = False,
) -> rewards.Reward:
  """The probability that the input entails the output, by a T5 trained for it.

  The model (REWARD_CHECKPOINT_PATH) shares the task's vocabulary. It reads
  `premise: <input> hypothesis: <output>`, joined as tokens. The reward is the
  probability that its first token is `entailed`, normalised over `entailed` and
  `not_entailed`, so it is between 0 and 1; its logarithm has no lower bound.
  Empty outputs are treated like all others.

  Args:
    task_prefix: removed from the start of inputs, e.g. 'summarize: '.
    premise: the text before the input in the model's prompt.
    hypothesis: the text before the output in the model's prompt.
    entailed: the model's answer for entailment: a text, whose first token is
      used, or an id.
    not_entailed: the model's answer otherwise: a text or an id.
    max_input_len: the prompt's maximum length in tokens; the end of the premise
      is cut to fit, never the hypothesis. None: no limit.
    log_probability: use the natural logarithm of the probability.
    reverse: the probability that the output entails the input. The output then
      is the premise, and the input the hypothesis.

  Source: Roit et al. (2023), arXiv:2306.00186; the texts are those of Honovich
  et al. (2022), arXiv:2204.04991, in google/t5_xxl_true_nli_mixture.
  """

  def make_reward_fn(vocabulary, ids, model):
    def encode(text, name):
      return rewards.token_ids(vocabulary, text, ids, f'entailment.{name}')

    prefix_ids = encode(task_prefix, 'task_prefix') if task_prefix else []
    premise_ids = encode(premise, 'premise')
    hypothesis_ids = encode(hypothesis, 'hypothesis')
    answers = [
      rewards.known_id(vocabulary, answer, f'entailment.{name}')
      if isinstance(answer, int)
      else encode(answer, name)[0]
      for answer, name in (
        (entailed, 'entailed'),
        (not_entailed, 'not_entailed'),
      )
    ]
    if answers[0] == answers[1]:
      raise ValueError(
        f'entailment.entailed {entailed!r} and .not_entailed {not_entailed!r} '
        f'begin with the same token, {answers[0]}. Give the ids of different '
        'tokens.'
      )

    def reward_fn(batch, outputs, params):
      premise_tokens, hypotheses = batch.encoder_input_tokens, outputs
      if reverse:
        premise_tokens = jnp.where(
          outputs.weights > 0.0, outputs.tokens, ids.pad
        )
        hypotheses = _without_prefix(
          batch.encoder_input_tokens, prefix_ids, ids
        )
      inputs = premise_and_hypothesis(
        premise_tokens,
        hypotheses,
        prefix_ids=[] if reverse else prefix_ids,
        premise_ids=premise_ids,
        hypothesis_ids=hypothesis_ids,
        max_input_len=max_input_len,
        ids=ids,
      )
      variables = {'params': params}
      hidden = model.apply(
        variables,
        model.apply(variables, inputs, method='encode'),
        inputs,
        # The first token depends on the start id alone.
        jnp.full((inputs.shape[0], 1), ids.pad, jnp.int32),
        method='decode',
      )
      logits_BV = model.apply(variables, hidden[:, 0], method='unembed')
      margin_B = logits_BV[:, answers[0]] - logits_BV[:, answers[1]]
      log_p_B = jax.nn.log_sigmoid(margin_B.astype(jnp.float32))
      return log_p_B if log_probability else jnp.exp(log_p_B)

    return reward_fn

  return rewards.Reward(make_reward_fn, needs_model=True)


def premise_and_hypothesis(
  encoder_input_tokens: jax.Array,
  outputs: Outputs,
  *,
  prefix_ids: Sequence[int],
  premise_ids: Sequence[int],
  hypothesis_ids: Sequence[int],
  max_input_len: int | None,
  ids: SpecialIds,
) -> jax.Array:
  """Builds the input of an entailment model from tokens.

  Args:
    encoder_input_tokens: [B, S] int32 the premise, followed by EOS and pad.
    outputs: [B, T] the hypothesis, followed by EOS and pad.
    prefix_ids: removed from the start of premises that begin with them.
    premise_ids: placed before the premise.
    hypothesis_ids: placed between premise and hypothesis.
    max_input_len: maximum of L; the premise is cut to fit.
    ids: of the entailment model and of the outputs.

  Returns:
    [B, L] int32: premise_ids, premise, hypothesis_ids, hypothesis, EOS, pad.

  Raises:
    ValueError: the longest hypothesis does not fit.
  """
  batch_size, input_len = encoder_input_tokens.shape
  output_len = outputs.tokens.shape[1]
  fixed_len = len(premise_ids) + len(hypothesis_ids) + 1  # EOS
  total_len = fixed_len + input_len + output_len
  if max_input_len is not None:
    if max_input_len < fixed_len + output_len:
      raise ValueError(
        f'entailment.max_input_len is {max_input_len}, but an output can be '
        f'{output_len} tokens long and is never cut, and the prompt adds '
        f'{fixed_len} tokens. Set at least {fixed_len + output_len}.'
      )
    total_len = min(total_len, max_input_len)

  premise_start_B, premise_end_B = _words(encoder_input_tokens, prefix_ids, ids)
  hypothesis_len_B = (rewards.words(outputs, ids.eos) != rewards.NO_TOKEN).sum(
    axis=1
  )
  premise_len_B = jnp.minimum(
    premise_end_B - premise_start_B, total_len - fixed_len - hypothesis_len_B
  )

  def of_all_rows(tokens):
    return jnp.broadcast_to(jnp.int32(tokens), (batch_size, len(tokens)))

  # (tokens, start, length): each slice is placed after the previous one.
  parts = (
    (of_all_rows(premise_ids), 0, len(premise_ids)),
    (encoder_input_tokens, premise_start_B, premise_len_B),
    (of_all_rows(hypothesis_ids), 0, len(hypothesis_ids)),
    (outputs.tokens, 0, hypothesis_len_B),
    (of_all_rows([ids.eos]), 0, 1),
  )
  at_BL = jnp.broadcast_to(jnp.arange(total_len), (batch_size, total_len))
  joined_BL = jnp.full((batch_size, total_len), ids.pad, jnp.int32)
  end_B1 = jnp.zeros((batch_size, 1), jnp.int32)
  for tokens, start_B, length_B in parts:
    start_B1, length_B1 = (
      jnp.broadcast_to(jnp.asarray(x), (batch_size,))[:, None]
      for x in (start_B, length_B)
    )
    offset_BL = at_BL - end_B1
    here_BL = (offset_BL >= 0) & (offset_BL < length_B1)
    source_BL = jnp.clip(start_B1 + offset_BL, 0, tokens.shape[1] - 1)
    taken_BL = jnp.take_along_axis(tokens, source_BL, axis=1)
    joined_BL = jnp.where(here_BL, taken_BL, joined_BL)
    end_B1 += length_B1
  return joined_BL


def _words(
  tokens_BS: jax.Array, prefix_ids: Sequence[int], ids: SpecialIds
) -> tuple[jax.Array, jax.Array]:
  """Returns where the words of each row start, after its prefix, and end."""
  batch_size, length = tokens_BS.shape
  is_word = (tokens_BS != ids.pad) & (tokens_BS != ids.eos)
  end_B = jnp.cumprod(is_word, axis=1).sum(axis=1)
  start_B = jnp.zeros(batch_size, jnp.int32)
  if 0 < len(prefix_ids) <= length:
    has_prefix_B = jnp.all(
      tokens_BS[:, : len(prefix_ids)] == jnp.asarray(prefix_ids), axis=1
    )
    start_B = len(prefix_ids) * has_prefix_B
  return start_B, end_B


def _without_prefix(
  tokens_BS: jax.Array, prefix_ids: Sequence[int], ids: SpecialIds
) -> Outputs:
  """Returns the words of inputs as outputs, without prefix, EOS and padding."""
  start_B, end_B = _words(tokens_BS, prefix_ids, ids)
  at_BS = start_B[:, None] + jnp.arange(tokens_BS.shape[1])
  is_word_BS = at_BS < end_B[:, None]
  last = tokens_BS.shape[1] - 1
  words_BS = jnp.take_along_axis(tokens_BS, jnp.minimum(at_BS, last), axis=1)
  return Outputs(
    jnp.where(is_word_BS, words_BS, ids.pad), is_word_BS.astype(jnp.float32)
  )
