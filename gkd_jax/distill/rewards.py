# SPDX-License-Identifier: Apache-2.0
"""How good an output is: r(x, y), what the objective's third term maximises.

A reward is traced into the step; no gradient flows through it. To add one,
write a function that returns a `Reward` and name it in a gin file. Any Python
function over texts can be one (`python_function`), at the price of a round trip
to the host.

Source: Agarwal et al. (2024), arXiv:2306.13649, Eq. 5.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.batch import Batch, Outputs, SpecialIds

Params = Any
# seqio's: encode(text) -> ids, decode(ids) -> text, unk_id, vocab_size
Vocabulary = Any
# (batch, outputs, parameters of the reward's model or None) -> [B]
Score = Callable[[Batch, Outputs, Params], jax.Array]
TextReward = Callable[[list[str], list[str], list[str]], Sequence[float]]

# Stands where there is no token, so that it equals none; _NEITHER likewise, in
# what is compared with it.
_NOTHING, _NEITHER = -1, -2

# XLA's CPU client copies less than 100 KiB at once, and leaves more to threads
# of its own. Where several CPU devices wait for each other none is left, and a
# callback would wait for its arguments for ever.
_CALLBACK_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Reward:
  """One way to say how good an output is.

  Attributes:
    make_score: (vocabulary of the task, special ids, model or None) -> Score.
      It raises ValueError where a setting does not suit the vocabulary.
    needs_model: whether a model scores; its parameters are the step's argument.
    raise_failure: raises what has gone wrong on the host, if anything has. A
      step cannot: where devices wait for each other, it would never end.
  """

  make_score: Callable[[Vocabulary, SpecialIds, Any], Score]
  needs_model: bool = False
  raise_failure: Callable[[], None] = lambda: None


def check_model(
  reward: Reward | None, checkpoint_path: str | None, dtype: str | None
) -> None:
  """Raises ValueError unless there is a model just where one is asked."""
  needs_model = reward is not None and reward.needs_model
  if needs_model and checkpoint_path is None:
    raise ValueError(
      'This REWARD is given by a model: set REWARD_CHECKPOINT_PATH to a run, '
      'Hugging Face or T5X folder.'
    )
  if checkpoint_path is not None and not needs_model:
    raise ValueError(
      'REWARD_CHECKPOINT_PATH is set, but no model is asked for a reward. Set '
      'it to None, or REWARD = @rewards.entailment().'
    )
  if dtype is not None and checkpoint_path is None:
    raise ValueError('REWARD_DTYPE is set, but no REWARD_CHECKPOINT_PATH.')


def score(
  function: Score, batch: Batch, outputs: Outputs, params: Params
) -> jax.Array:
  """Returns the reward of each output, a constant: [B] float32.

  Args:
    function: what `Reward.make_score` returned.
    batch: inputs, and the dataset's own outputs.
    outputs: to be judged.
    params: of the reward's model; None if it has none.

  Raises:
    ValueError: it is not one number an output.
  """
  rewards_B = jnp.asarray(function(batch, outputs, params))
  batch_size = outputs.tokens.shape[0]
  if rewards_B.shape != (batch_size,):
    raise ValueError(
      f'REWARD must give one number an output, an array of shape '
      f'({batch_size},), but gives {rewards_B.shape}.'
    )
  return jax.lax.stop_gradient(rewards_B.astype(jnp.float32))


def check_score(
  function: Score,
  params: Params,
  *,
  batch_size: int,
  lengths: Mapping[str, int],
) -> None:
  """Traces a reward, so that what it refuses is refused before a compilation.

  Args:
    function: what `Reward.make_score` returned.
    params: of the reward's model, as arrays or shapes; None if it has none.
    batch_size: rows that are to be judged at a time.
    lengths: {'inputs': S, 'targets': T} of these.

  Raises:
    ValueError: see `score`.
  """
  inputs, tokens, weights = (
    jax.ShapeDtypeStruct((batch_size, lengths[name]), dtype)
    for name, dtype in (
      ('inputs', jnp.int32),
      ('targets', jnp.int32),
      ('targets', jnp.float32),
    )
  )
  jax.eval_shape(
    functools.partial(score, function),
    Batch(inputs, tokens, weights),
    Outputs(tokens, weights),
    params,
  )


def leave_one_out_mean(rewards_B: jax.Array, counts_B: jax.Array) -> jax.Array:
  """Returns, for each output, the mean reward of the others.

  Leaving the own reward out makes the baseline independent of the output it is
  subtracted from, hence the gradient unbiased. With it in, the gradient of B
  outputs would be too small by the factor 1 - 1/B.

  Args:
    rewards_B: [B].
    counts_B: [B] bool, which of them are averaged.

  Returns:
    [B]; 0 where there is no other.
  """
  others_B = jnp.sum(counts_B) - counts_B
  sum_B = jnp.sum(jnp.where(counts_B, rewards_B, 0.0)) - jnp.where(
    counts_B, rewards_B, 0.0
  )
  return jnp.where(others_B > 0, sum_B / jnp.maximum(others_B, 1), 0.0)


def exact_match(marker: str | Sequence[int] | None = None) -> Reward:
  """1 for an output that is the dataset's, token by token; 0 for any other.

  EOS is a token here: what was cut off before its end is no match.

  Args:
    marker: only what comes after its last occurrence counts, in output and
      target, as for the answer that ends a chain of thought: '#### ' in
      arithmetic_cot. Without it in both there is no match. Text, or ids where
      the vocabulary writes it in another way between other tokens. None: all
      tokens count.
  """

  def make_score(vocabulary, ids, model):
    del model
    marker_ids = None
    if marker is not None:
      marker_ids = _token_ids(vocabulary, marker, ids, 'exact_match.marker')

    def score(batch, outputs, params):
      del params
      got_BT, want_BT = map(_tokens_or_nothing, (outputs, batch.outputs))
      found_B = True
      if marker_ids is not None:
        got_BT, found_B = _after_last(got_BT, marker_ids)
        want_BT, in_target_B = _after_last(want_BT, marker_ids)
        found_B &= in_target_B
      return (jnp.all(got_BT == want_BT, axis=1) & found_B).astype(jnp.float32)

    return score

  return Reward(make_score)


def _tokens_or_nothing(outputs: Outputs) -> jax.Array:
  return jnp.where(outputs.weights > 0.0, outputs.tokens, _NOTHING)


def _after_last(
  tokens_BT: jax.Array, marker: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
  """Returns what follows the last marker [B, T], and whether there is one."""
  length = tokens_BT.shape[1]
  # Position t of the k-th array is token t + k.
  grams_BTN = _grams(tokens_BT, len(marker))
  is_marker_BT = jnp.all(grams_BTN == jnp.asarray(marker), axis=-1)
  last_B = jnp.max(jnp.where(is_marker_BT, jnp.arange(length), -1), axis=1)
  at_BT = last_B[:, None] + len(marker) + jnp.arange(length)
  rest_BT = jnp.take_along_axis(
    tokens_BT, jnp.minimum(at_BT, length - 1), axis=1
  )
  return jnp.where(at_BT < length, rest_BT, _NOTHING), last_B >= 0


def _grams(tokens_BT: jax.Array, n: int) -> jax.Array:
  """Returns tokens t to t + n - 1 at position t: [B, T, n]."""
  length = tokens_BT.shape[1]
  padded = jnp.pad(tokens_BT, ((0, 0), (0, n)), constant_values=_NOTHING)
  return jnp.stack([padded[:, k : k + length] for k in range(n)], axis=-1)


def rouge_n(n: int = 2) -> Reward:
  """ROUGE-N of output and target, F1 between 0 and 1, of token ids.

  Counts n-grams of tokens as ROUGE counts those of words: no stemming, and
  EOS is no word. Makes arrays of [B, T, T] bits.

  Args:
    n: tokens in an n-gram.

  Raises:
    ValueError: n is no positive whole number.

  Source: Lin (2004), "ROUGE", ACL workshop Text Summarization Branches Out.
  """
  if not isinstance(n, int) or n < 1:
    raise ValueError(f'rouge_n.n must be a positive whole number, got {n!r}.')

  def score(batch, outputs, params, *, eos):
    del params
    got_BT, want_BT = (_words(y, eos) for y in (outputs, batch.outputs))
    got_BTN, want_BTN = _grams(got_BT, n), _grams(want_BT, n)
    in_got_BT, in_want_BT = (
      jnp.all(grams != _NOTHING, axis=-1) for grams in (got_BTN, want_BTN)
    )

    def equal_BTT(a_BTN, b_BTN):
      return jnp.all(a_BTN[:, :, None] == b_BTN[:, None], axis=-1)

    # The k-th time that an n-gram occurs counts if the target has it k times.
    in_want_BTT = equal_BTT(got_BTN, want_BTN) & in_want_BT[:, None]
    before_BTT = jnp.tril(equal_BTT(got_BTN, got_BTN), k=-1)
    counts_BT = before_BTT.sum(axis=2) < in_want_BTT.sum(axis=2)
    return _f1(
      (counts_BT & in_got_BT).sum(axis=1),
      in_got_BT.sum(axis=1),
      in_want_BT.sum(axis=1),
    )

  return Reward(
    lambda vocabulary, ids, model: functools.partial(score, eos=ids.eos)
  )


def rouge_l() -> Reward:
  """ROUGE-L of output and target, F1 between 0 and 1, of token ids.

  By the longest common subsequence of all tokens but EOS; no stemming.

  Source: Lin (2004), "ROUGE", ACL workshop Text Summarization Branches Out.
  """

  def score(batch, outputs, params, *, eos):
    del params
    got_BT, want_BT = (_words(y, eos) for y in (outputs, batch.outputs))
    lengths = [(words != _NOTHING).sum(axis=1) for words in (got_BT, want_BT)]
    want_BT = jnp.where(want_BT == _NOTHING, _NEITHER, want_BT)

    def add_token(best_BT, token_B):
      # best[j]: of the tokens so far and the first j + 1 of the target. It is
      # the largest of best[j], best[j - 1] + 1 where the two tokens are equal,
      # and the new best[j - 1]: a running maximum.
      shorter_BT = jnp.pad(best_BT[:, :-1], ((0, 0), (1, 0)))
      longer_BT = shorter_BT + (want_BT == token_B[:, None])
      return jax.lax.cummax(jnp.maximum(best_BT, longer_BT), axis=1), None

    best_BT, _ = jax.lax.scan(add_token, jnp.zeros_like(want_BT), got_BT.T)
    return _f1(best_BT[:, -1], *lengths)

  return Reward(
    lambda vocabulary, ids, model: functools.partial(score, eos=ids.eos)
  )


def _words(outputs: Outputs, eos: int) -> jax.Array:
  """Returns the tokens but EOS: [B, T]."""
  tokens_BT = _tokens_or_nothing(outputs)
  return jnp.where(tokens_BT == eos, _NOTHING, tokens_BT)


def _f1(common_B, got_B, want_B) -> jax.Array:
  """2 PR / (P + R), where P = common / got and R = common / want."""
  return 2.0 * common_B / jnp.maximum(got_B + want_B, 1)


def entailment(
  task_prefix: str = '',
  premise: str = 'premise: ',
  hypothesis: str = ' hypothesis: ',
  entailed: str | int = '1',
  not_entailed: str | int = '0',
  max_input_len: int | None = None,
  log_probability: bool = False,
) -> Reward:
  """How surely the input entails the output, says a T5 trained to tell.

  The model (REWARD_CHECKPOINT_PATH) shares the task's vocabulary. It reads
  `premise: <input> hypothesis: <output>`, put together from tokens, and its
  first token decides: the reward is the probability of `entailed` where only
  `entailed` and `not_entailed` can be said. By default the two are between 0
  and 1, as bounded as JSD is; logarithms punish what is surely not entailed
  without bound. An output without any word is judged as all others are.

  Args:
    task_prefix: dropped from the start of inputs that begin with it, e.g.
      'summarize: '.
    premise: what the model expects before the input.
    hypothesis: and before the output.
    entailed: its answer if the input entails the output: text, of which the
      first token counts, or an id.
    not_entailed: likewise, if not.
    max_input_len: tokens the model may read; the premise is cut at its end to
      fit, the hypothesis never. None: as many as there can be.
    log_probability: use the natural logarithm of the probability.

  Source: Roit et al. (2023), arXiv:2306.00186; the texts are those of Honovich
  et al. (2022), arXiv:2204.04991, in google/t5_xxl_true_nli_mixture.
  """

  def make_score(vocabulary, ids, model):
    def encode(text, name):
      return _token_ids(vocabulary, text, ids, f'entailment.{name}')

    prefix_ids = encode(task_prefix, 'task_prefix') if task_prefix else []
    premise_ids = encode(premise, 'premise')
    hypothesis_ids = encode(hypothesis, 'hypothesis')
    answers = [
      _known_id(vocabulary, answer, f'entailment.{name}')
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
        f'begin with the same token, {answers[0]}. Give the ids of tokens that '
        'tell them apart.'
      )

    def score(batch, outputs, params):
      inputs = premise_and_hypothesis(
        batch.encoder_input_tokens,
        outputs,
        prefix_ids=prefix_ids,
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

    return score

  return Reward(make_score, needs_model=True)


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
  """Puts the input of an entailment model together, from tokens.

  Args:
    encoder_input_tokens: [B, S] int32 the premise, with EOS and pad after it.
    outputs: [B, T] the hypothesis, likewise.
    prefix_ids: not part of the premise, where it begins with them.
    premise_ids: go before the premise.
    hypothesis_ids: go between the two.
    max_input_len: L at most; the premise is cut to fit.
    ids: of the model that reads it, and of the outputs.

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
        f'{output_len} tokens long and is never cut, and {fixed_len} tokens '
        f'surround it: at least {fixed_len + output_len} are needed.'
      )
    total_len = min(total_len, max_input_len)

  is_word = (encoder_input_tokens != ids.pad) & (
    encoder_input_tokens != ids.eos
  )
  premise_end_B = jnp.cumprod(is_word, axis=1).sum(axis=1)
  premise_start_B = jnp.zeros(batch_size, jnp.int32)
  if 0 < len(prefix_ids) <= input_len:
    has_prefix_B = jnp.all(
      encoder_input_tokens[:, : len(prefix_ids)] == jnp.asarray(prefix_ids),
      axis=1,
    )
    premise_start_B = len(prefix_ids) * has_prefix_B
  hypothesis_len_B = (_words(outputs, ids.eos) != _NOTHING).sum(axis=1)
  premise_len_B = jnp.minimum(
    premise_end_B - premise_start_B, total_len - fixed_len - hypothesis_len_B
  )

  def of_all_rows(tokens):
    return jnp.broadcast_to(jnp.int32(tokens), (batch_size, len(tokens)))

  # Each part is a stretch of one of these, put where the part before it ends.
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


def python_function(function: TextReward) -> Reward:
  """Any Python function over texts; every step waits for it, on the host.

  It is called once a microbatch with all of its rows, whichever devices they
  are on (by the first host; several were not tried). It must depend on its
  arguments alone, for it may be called again with the same ones, and must not
  use JAX. If it raises, the run ends at the next step.

  Args:
    function: (inputs, outputs, targets), lists of equally many texts -> one
      finite number for each output. Texts are what the task's vocabulary makes
      of the tokens before EOS.
  """
  name = f'{function.__module__}.{function.__qualname__}'
  failures = []

  def raise_failure():
    if failures:
      e = failures[0]
      raise RuntimeError(
        f'REWARD: {name} failed: {type(e).__name__}: {e}'
      ) from e

  def make_score(vocabulary, ids, model):
    del model

    def texts(words_BT):
      return [
        vocabulary.decode([int(word) for word in row if word != _NOTHING])
        for row in words_BT
      ]

    def score(batch, outputs, params):
      del params
      inputs = batch.encoder_input_tokens
      words = [
        _words(Outputs(inputs, inputs != ids.pad), ids.eos),
        _words(outputs, ids.eos),
        _words(batch.outputs, ids.eos),
      ]
      batch_size, input_len = inputs.shape
      output_len = outputs.tokens.shape[1]

      def call(*pieces):
        try:
          rows = np.concatenate([np.asarray(piece) for piece in pieces])
          split = np.split(rows, [input_len, input_len + output_len], axis=1)
          values = np.asarray(function(*map(texts, split)), np.float32)
          if values.shape != (batch_size,) or not np.isfinite(values).all():
            raise ValueError(
              f'{batch_size} finite numbers are wanted, one for each output, '
              f'but it returned {values}'
            )
          return values
        except Exception as e:
          failures.append(e)
          return np.full(batch_size, np.nan, np.float32)

      rows = jnp.concatenate(words, axis=1)
      rows_a_piece = max(1, _CALLBACK_BYTES * batch_size // rows.nbytes)
      return jax.pure_callback(
        call,
        jax.ShapeDtypeStruct((batch_size,), jnp.float32),
        *jnp.split(rows, [*range(rows_a_piece, batch_size, rows_a_piece)]),
      )

    return score

  return Reward(make_score, raise_failure=raise_failure)


def _token_ids(
  vocabulary: Vocabulary,
  text: str | Sequence[int],
  ids: SpecialIds,
  setting: str,
) -> list[int]:
  """Returns the ids of a text, or the ids that were given.

  Raises:
    ValueError: the vocabulary has no tokens for it.
  """
  if isinstance(text, str):
    tokens = vocabulary.encode(text)
  else:
    tokens = [_known_id(vocabulary, token_id, setting) for token_id in text]
  if not tokens or {*ids.never_written, ids.eos, vocabulary.unk_id} & {*tokens}:
    raise ValueError(
      f"{setting} is {text!r}, in the task's vocabulary {tokens}: it must be "
      'at least one token, and none of pad, EOS and unknown.'
    )
  return tokens


def _known_id(vocabulary: Vocabulary, token_id: int, setting: str) -> int:
  """Returns an id; ValueError if the vocabulary does not have it."""
  # JAX would take the last id there is for one beyond it.
  if not 0 <= token_id < vocabulary.vocab_size:
    raise ValueError(
      f"{setting}: there is no id {token_id} in the task's vocabulary of "
      f'{vocabulary.vocab_size} ids.'
    )
  return token_id
