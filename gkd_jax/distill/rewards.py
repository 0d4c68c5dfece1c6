# SPDX-License-Identifier: Apache-2.0
"""Rewards r(x, y) of outputs, which a credit maximises.

A reward is traced into the step; no gradient flows through it. To add one,
write a function that returns a `Reward` and name it in a gin file. A Python
function over texts becomes a reward with `python_function`, at the cost of a
round trip to the host.

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
RewardFn = Callable[[Batch, Outputs, Params], jax.Array]
TextReward = Callable[[list[str], list[str], list[str]], Sequence[float]]

# Fill positions without a token. NO_TOKEN equals no token; _NO_TARGET replaces
# it in targets, so that empty positions of output and target also differ.
NO_TOKEN, _NO_TARGET = -1, -2

# XLA's CPU client copies arrays below 100 KiB at once, larger ones in worker
# threads. If several CPU devices wait for each other, all worker threads are
# busy, and a callback with larger arguments deadlocks.
_CALLBACK_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Reward:
  """A reward, before the vocabulary is known.

  Attributes:
    make_reward_fn: (vocabulary of the task, special ids, model or None) -> the
      reward function. It raises ValueError if a setting does not fit the
      vocabulary.
    needs_model: whether it needs a model, with parameters `Frozen.reward`.
    raise_failure: raises the error that occurred on the host, if any. A step
      cannot raise it: other devices would wait for the failed one forever.
  """

  make_reward_fn: Callable[[Vocabulary, SpecialIds, Any], RewardFn]
  needs_model: bool = False
  raise_failure: Callable[[], None] = lambda: None


def check_model(reward: Reward | None, checkpoint_path: str | None) -> None:
  """Raises ValueError unless a checkpoint is set exactly if one is needed."""
  needs_model = reward is not None and reward.needs_model
  if needs_model and checkpoint_path is None:
    raise ValueError(
      'This REWARD needs a model: set REWARD_CHECKPOINT_PATH to a run, Hugging '
      'Face or T5X folder.'
    )
  if checkpoint_path is not None and not needs_model:
    raise ValueError(
      'REWARD_CHECKPOINT_PATH is set, but REWARD uses no model. Set it to '
      'None, or REWARD = @entailment.entailment().'
    )


def compute(
  reward_fn: RewardFn, batch: Batch, outputs: Outputs, params: Params
) -> jax.Array:
  """Returns the reward of each output, a constant: [B] float32.

  Args:
    reward_fn: from `Reward.make_reward_fn`.
    batch: inputs, and the dataset's own outputs.
    outputs: the outputs to evaluate.
    params: of the reward's model; None if it has none.

  Raises:
    ValueError: the reward is not one number per output.
  """
  rewards_B = jnp.asarray(reward_fn(batch, outputs, params))
  batch_size = outputs.tokens.shape[0]
  if rewards_B.shape != (batch_size,):
    raise ValueError(
      f'REWARD must return one number per output, an array of shape '
      f'({batch_size},), but returns shape {rewards_B.shape}.'
    )
  return jax.lax.stop_gradient(rewards_B.astype(jnp.float32))


def check_reward_fn(
  reward_fn: RewardFn,
  params: Params,
  *,
  batch_size: int,
  lengths: Mapping[str, int],
) -> None:
  """Traces a reward, so that it fails before the step is compiled.

  Args:
    reward_fn: from `Reward.make_reward_fn`.
    params: arrays or shapes of the reward's model; None if it has none.
    batch_size: rows per call.
    lengths: {'inputs': S, 'targets': T}.

  Raises:
    ValueError: see `compute`.
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
    functools.partial(compute, reward_fn),
    Batch(inputs, tokens, weights),
    Outputs(tokens, weights),
    params,
  )


def exact_match(marker: str | Sequence[int] | None = None) -> Reward:
  """1 if output and target have the same tokens, 0 otherwise.

  EOS is also compared: a truncated output does not match.

  Args:
    marker: compare only the tokens after its last occurrence in output and
      target, such as the answer after a chain of thought ('#### ' in
      arithmetic_cot). If either has no marker, there is no match. A text, or
      ids if the vocabulary encodes the text differently in context. None:
      compare all tokens.
  """

  def make_reward_fn(vocabulary, ids, model):
    del model
    marker_ids = None
    if marker is not None:
      marker_ids = token_ids(vocabulary, marker, ids, 'exact_match.marker')

    def reward_fn(batch, outputs, params):
      del params
      got_BT, want_BT = map(_tokens_or_nothing, (outputs, batch.outputs))
      found_B = True
      if marker_ids is not None:
        got_BT, found_B = _after_last(got_BT, marker_ids)
        want_BT, in_target_B = _after_last(want_BT, marker_ids)
        found_B &= in_target_B
      return (jnp.all(got_BT == want_BT, axis=1) & found_B).astype(jnp.float32)

    return reward_fn

  return Reward(make_reward_fn)


def _tokens_or_nothing(outputs: Outputs) -> jax.Array:
  return jnp.where(outputs.weights > 0.0, outputs.tokens, NO_TOKEN)


def _after_last(
  tokens_BT: jax.Array, marker: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
  """Returns the tokens after the last marker [B, T], and whether it occurs."""
  length = tokens_BT.shape[1]
  # Position t of the k-th array is token t + k.
  grams_BTN = _grams(tokens_BT, len(marker))
  is_marker_BT = jnp.all(grams_BTN == jnp.asarray(marker), axis=-1)
  last_B = jnp.max(jnp.where(is_marker_BT, jnp.arange(length), -1), axis=1)
  at_BT = last_B[:, None] + len(marker) + jnp.arange(length)
  rest_BT = jnp.take_along_axis(
    tokens_BT, jnp.minimum(at_BT, length - 1), axis=1
  )
  return jnp.where(at_BT < length, rest_BT, NO_TOKEN), last_B >= 0


def _grams(tokens_BT: jax.Array, n: int) -> jax.Array:
  """Returns tokens t to t + n - 1 at position t: [B, T, n]."""
  length = tokens_BT.shape[1]
  padded = jnp.pad(tokens_BT, ((0, 0), (0, n)), constant_values=NO_TOKEN)
  return jnp.stack([padded[:, k : k + length] for k in range(n)], axis=-1)


def rouge_n(n: int = 2) -> Reward:
  """ROUGE-N of output and target over token ids: F1 between 0 and 1.

  It counts n-grams of tokens in place of words, without stemming and without
  EOS. It needs boolean arrays of shape [B, T, T].

  Args:
    n: tokens per n-gram.

  Raises:
    ValueError: n is not a positive whole number.

  Source: Lin (2004), "ROUGE", ACL workshop Text Summarization Branches Out.
  """
  if not isinstance(n, int) or n < 1:
    raise ValueError(f'rouge_n.n must be a positive whole number, got {n!r}.')

  def reward_fn(batch, outputs, params, *, eos):
    del params
    got_BT, want_BT = (words(y, eos) for y in (outputs, batch.outputs))
    got_BTN, want_BTN = _grams(got_BT, n), _grams(want_BT, n)
    in_got_BT, in_want_BT = (
      jnp.all(grams != NO_TOKEN, axis=-1) for grams in (got_BTN, want_BTN)
    )

    def equal_BTT(a_BTN, b_BTN):
      return jnp.all(a_BTN[:, :, None] == b_BTN[:, None], axis=-1)

    # The k-th occurrence of an n-gram counts if the target has k of them.
    in_want_BTT = equal_BTT(got_BTN, want_BTN) & in_want_BT[:, None]
    before_BTT = jnp.tril(equal_BTT(got_BTN, got_BTN), k=-1)
    counts_BT = before_BTT.sum(axis=2) < in_want_BTT.sum(axis=2)
    return _f1(
      (counts_BT & in_got_BT).sum(axis=1),
      in_got_BT.sum(axis=1),
      in_want_BT.sum(axis=1),
    )

  return Reward(
    lambda vocabulary, ids, model: functools.partial(reward_fn, eos=ids.eos)
  )


def rouge_l() -> Reward:
  """ROUGE-L of output and target over token ids: F1 between 0 and 1.

  The longest common subsequence of tokens, without stemming and without EOS.

  Source: Lin (2004), "ROUGE", ACL workshop Text Summarization Branches Out.
  """

  def reward_fn(batch, outputs, params, *, eos):
    del params
    got_BT, want_BT = (words(y, eos) for y in (outputs, batch.outputs))
    lengths = [(x != NO_TOKEN).sum(axis=1) for x in (got_BT, want_BT)]
    want_BT = jnp.where(want_BT == NO_TOKEN, _NO_TARGET, want_BT)

    def add_token(best_BT, token_B):
      # best[j] is the length of the longest common subsequence of the tokens so
      # far and the target's first j + 1. The new best[j] is the maximum of the
      # old best[j], of best[j - 1] + 1 if the two tokens are equal, and of the
      # new best[j - 1]: a running maximum.
      shorter_BT = jnp.pad(best_BT[:, :-1], ((0, 0), (1, 0)))
      longer_BT = shorter_BT + (want_BT == token_B[:, None])
      return jax.lax.cummax(jnp.maximum(best_BT, longer_BT), axis=1), None

    best_BT, _ = jax.lax.scan(add_token, jnp.zeros_like(want_BT), got_BT.T)
    return _f1(best_BT[:, -1], *lengths)

  return Reward(
    lambda vocabulary, ids, model: functools.partial(reward_fn, eos=ids.eos)
  )


def words(outputs: Outputs, eos: int) -> jax.Array:
  """Returns the tokens [B, T], with NO_TOKEN at EOS and padding."""
  tokens_BT = _tokens_or_nothing(outputs)
  return jnp.where(tokens_BT == eos, NO_TOKEN, tokens_BT)


def _f1(common_B, got_B, want_B) -> jax.Array:
  """2 PR / (P + R), where P = common / got and R = common / want."""
  return 2.0 * common_B / jnp.maximum(got_B + want_B, 1)


def python_function(function: TextReward) -> Reward:
  """A Python function over texts; it runs on the host, and each step waits.

  It is called once per microbatch with the rows of all devices (on the first
  host; not tested with several hosts). It must be a pure function, since XLA
  may call it again, and must not use JAX. If it raises, the run ends at the
  next step.

  Args:
    function: (inputs, outputs, targets), lists of texts of equal length -> one
      finite number per output. The task's vocabulary decodes the texts; tokens
      from EOS on are left out.
  """
  name = f'{function.__module__}.{function.__qualname__}'
  failures = []

  def raise_failure():
    if failures:
      e = failures[0]
      raise RuntimeError(
        f'REWARD: {name} failed: {type(e).__name__}: {e}'
      ) from e

  def make_reward_fn(vocabulary, ids, model):
    del model

    def texts(words_BT):
      return [
        vocabulary.decode([int(word) for word in row if word != NO_TOKEN])
        for row in words_BT
      ]

    def reward_fn(batch, outputs, params):
      del params
      inputs = batch.encoder_input_tokens
      texts_BT = [
        words(Outputs(inputs, inputs != ids.pad), ids.eos),
        words(outputs, ids.eos),
        words(batch.outputs, ids.eos),
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
              f'it must return {batch_size} finite numbers, one per output, '
              f'but returned {values}'
            )
          return values
        except Exception as e:
          failures.append(e)
          return np.full(batch_size, np.nan, np.float32)

      rows = jnp.concatenate(texts_BT, axis=1)
      rows_a_piece = max(1, _CALLBACK_BYTES * batch_size // rows.nbytes)
      return jax.pure_callback(
        call,
        jax.ShapeDtypeStruct((batch_size,), jnp.float32),
        *jnp.split(rows, [*range(rows_a_piece, batch_size, rows_a_piece)]),
      )

    return reward_fn

  return Reward(make_reward_fn, raise_failure=raise_failure)


def token_ids(
  vocabulary: Vocabulary,
  text: str | Sequence[int],
  ids: SpecialIds,
  setting: str,
) -> list[int]:
  """Returns the ids of a text; checks and returns ids.

  Raises:
    ValueError: there is no token, or one is unknown, EOS or never written.
  """
  if isinstance(text, str):
    tokens = vocabulary.encode(text)
  else:
    tokens = [known_id(vocabulary, token_id, setting) for token_id in text]
  if not tokens or {*ids.never_written, ids.eos, vocabulary.unk_id} & {*tokens}:
    raise ValueError(
      f"{setting} is {text!r}, in the task's vocabulary {tokens}: it must be "
      'at least one token, and none of pad, EOS and unknown.'
    )
  return tokens


def known_id(vocabulary: Vocabulary, token_id: int, setting: str) -> int:
  """Returns the id; raises ValueError if it is outside the vocabulary."""
  # JAX clips indices: an id out of range would silently become the last id.
  if not 0 <= token_id < vocabulary.vocab_size:
    raise ValueError(
      f"{setting} is {token_id}, but the task's vocabulary has ids from 0 to "
      f'{vocabulary.vocab_size - 1}.'
    )
  return token_id
