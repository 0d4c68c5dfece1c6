# SPDX-License-Identifier: Apache-2.0
import collections
import functools
import hashlib
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.batch import Batch, Outputs
from gkd_jax.distill import credit, entailment, rewards
from gkd_jax.models.t5 import T5
from tests import conftest, tiny

pytestmark = pytest.mark.slow  # compiles models


class Words:
  """A vocabulary of ids for whole words; 0 is pad, 1 EOS, 2 unknown."""

  unk_id = 2

  def __init__(self, words: str):
    self._words = ['<pad>', '</s>', '<unk>', *words.split()]
    self.vocab_size = len(self._words)

  def encode(self, text):
    return [
      self._words.index(word) if word in self._words else self.unk_id
      for word in text.split()
    ]

  def decode(self, ids):
    return ' '.join(self._words[i] for i in ids)


VOCABULARY = Words(
  'a b c d e = #### -24 24 summarize: premise: hypothesis: yes no'
)
LENGTH = 9


def outputs(*texts: str, vocabulary=VOCABULARY) -> Outputs:
  """Texts as outputs of LENGTH tokens; a text ending in '...' has no EOS."""
  tokens = np.zeros((len(texts), LENGTH), np.int32)
  weights = np.zeros((len(texts), LENGTH), np.float32)
  for row, text in enumerate(texts):
    ids = vocabulary.encode(text.removesuffix('...'))
    if not text.endswith('...'):
      ids.append(1)
    tokens[row, : len(ids)] = ids
    weights[row, : len(ids)] = 1.0
  return Outputs(jnp.asarray(tokens), jnp.asarray(weights))


def batch(targets, inputs=None) -> Batch:
  inputs = [''] * len(targets) if inputs is None else inputs
  return Batch(outputs(*inputs).tokens, *outputs(*targets))


def rewards_of(reward, pairs, vocabulary=VOCABULARY, inputs=None) -> np.ndarray:
  """Rewards of {output: target} pairs."""
  got, want = zip(*pairs, strict=True)
  return np.asarray(
    rewards.compute(
      reward.make_reward_fn(vocabulary, tiny.IDS, None),
      batch(want, inputs),
      outputs(*got),
      None,
    )
  )


# ----------------------------------------------------------------- exact match


@pytest.mark.parametrize(
  ('output', 'target', 'want'),
  [
    ('a b c', 'a b c', 1.0),
    ('a b c', 'a b d', 0.0),
    ('a b', 'a b c', 0.0),
    ('a b c', 'a b', 0.0),
    ('', '', 1.0),
    ('a b c...', 'a b c', 0.0),  # it did not end
    ('a b c...', 'a b c...', 1.0),
  ],
)
def test_exact_match_compares_all_tokens_and_the_end(output, target, want):
  np.testing.assert_array_equal(
    rewards_of(rewards.exact_match(), [(output, target)]), [want]
  )


@pytest.mark.parametrize(
  ('output', 'target', 'want'),
  [
    ('a = b #### -24', 'c d = e #### -24', 1.0),  # at other positions
    ('#### -24', 'a b c d #### -24', 1.0),
    ('a = b #### 24', 'a = b #### -24', 0.0),
    ('a #### 24 #### -24', 'a #### -24', 1.0),  # the last one counts
    ('a #### -24 #### 24', 'a #### -24', 0.0),
    ('a #### -24 a', 'a #### -24', 0.0),  # something after the answer
    ('a #### -24...', 'a #### -24', 0.0),  # something may come after it
    ('a -24', 'a #### -24', 0.0),
    ('a b', 'a b', 0.0),  # no marker: no answer
    ('#### -24', '-24', 0.0),
    ('a b c d e a b #### -24...', 'a #### -24', 0.0),  # full to the end
    ('a b c d e a b c ####...', 'a b c d e a b c ####...', 1.0),
  ],
)
def test_after_a_marker_the_answer_alone_counts(output, target, want):
  reward = rewards.exact_match(marker='####')

  np.testing.assert_array_equal(rewards_of(reward, [(output, target)]), [want])


def test_a_marker_may_be_several_tokens_or_ids():
  pairs = [('a b b c d', 'e b c d'), ('a b d', 'e b c d')]

  for marker in ('b c', VOCABULARY.encode('b c')):
    got = rewards_of(rewards.exact_match(marker), pairs)

    np.testing.assert_array_equal(got, [1.0, 0.0])


def test_what_lies_after_the_end_is_not_compared():
  want, got = batch(['a b']), outputs('a b')
  noise = jnp.where(got.weights > 0.0, got.tokens, 7)

  value = rewards.compute(
    rewards.exact_match().make_reward_fn(VOCABULARY, tiny.IDS, None),
    want,
    got._replace(tokens=noise),
    None,
  )

  np.testing.assert_array_equal(value, [1.0])


@pytest.mark.parametrize('marker', ['', 'nowhere', [], [1], [0, 5]])
def test_a_marker_that_the_vocabulary_cannot_write_is_refused(marker):
  with pytest.raises(ValueError, match='exact_match.marker is'):
    rewards.exact_match(marker).make_reward_fn(VOCABULARY, tiny.IDS, None)


def test_a_marker_of_ids_that_are_not_there_is_refused():
  with pytest.raises(ValueError, match='marker is 99, but'):
    rewards.exact_match([3, 99]).make_reward_fn(VOCABULARY, tiny.IDS, None)


def test_the_answers_of_arithmetic_cot_are_found():
  seqio = pytest.importorskip('seqio')
  from gkd_jax.data.tasks import arithmetic_cot

  vocabulary = seqio.ByteVocabulary()
  target = arithmetic_cot.chain_of_thought('38-57-10+5')
  texts = [
    target,
    '38-57=-19 -19-10=-30 -30+5=-24 #### -24',  # a wrong step, a right answer
    target.replace('#### -24', '#### 24'),
    target + '0',
    target.replace('####', '###'),
  ]
  tokens = np.zeros((len(texts), 64), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    ids = [*vocabulary.encode(text), 1]
    row[: len(ids)] = ids
  written = Outputs(jnp.asarray(tokens), jnp.float32(tokens != 0))
  targets = Outputs(*(jnp.tile(x[:1], (len(texts), 1)) for x in written))

  got = rewards.compute(
    rewards.exact_match('#### ').make_reward_fn(vocabulary, tiny.IDS, None),
    Batch(targets.tokens, *targets),
    written,
    None,
  )

  right = [
    arithmetic_cot.final_answer(text) == arithmetic_cot.final_answer(target)
    for text in texts
  ]
  assert right == [True, True, False, False, False]
  np.testing.assert_array_equal(got, np.float32(right))


# ----------------------------------------------------------------------- ROUGE


def rouge_n(got, want, n):
  """F1 by counting, as in Lin (2004)."""
  a, b = (
    collections.Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1))
    for x in (got, want)
  )
  common = sum((a & b).values())
  if not common:
    return 0.0
  precision, recall = common / sum(a.values()), common / sum(b.values())
  return 2 * precision * recall / (precision + recall)


def rouge_l(got, want):
  """F1 of the longest common subsequence, by its recurrence."""
  best = np.zeros((len(got) + 1, len(want) + 1))
  for i, j in itertools.product(range(len(got)), range(len(want))):
    if got[i] == want[j]:
      best[i + 1, j + 1] = best[i, j] + 1
    else:
      best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j])
  common = best[-1, -1]
  if not common:
    return 0.0
  precision, recall = common / len(got), common / len(want)
  return 2 * precision * recall / (precision + recall)


ROUGE = {
  'rouge1': (rewards.rouge_n(1), functools.partial(rouge_n, n=1)),
  'rouge2': (rewards.rouge_n(2), functools.partial(rouge_n, n=2)),
  'rougeL': (rewards.rouge_l(), rouge_l),
}


@functools.cache
def random_pairs():
  """Texts of 0 to 8 of five words: n-grams occur several times."""
  rng = np.random.default_rng(0)

  def text():
    return ' '.join(rng.choice(list('abcde'), rng.integers(0, LENGTH)))

  return [
    ('a a a b', 'a b a a'),  # clipped counts
    ('a b c d', 'a b c d'),
    ('a b c d', 'd c b a'),
    ('', 'a b'),
    ('a b', ''),
    ('', ''),
    ('a', 'a'),
    ('a b c d e a b c d...', 'a b c d e a b c d...'),
    *((text(), text()) for _ in range(200)),
  ]


def words(text):
  return text.removesuffix('...').split()


@pytest.mark.parametrize('name', ROUGE)
def test_rouge_is_that_of_a_plain_count(name):
  reward, reference = ROUGE[name]

  got = rewards_of(reward, random_pairs())

  want = [reference(words(a), words(b)) for a, b in random_pairs()]
  # One division in float32.
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert len(set(want)) > 10


@pytest.mark.parametrize('name', ROUGE)
def test_rouge_of_one_token_a_word_is_that_of_the_library(name):
  rouge_scorer = pytest.importorskip('rouge_score.rouge_scorer')
  scorer = rouge_scorer.RougeScorer([name], use_stemmer=False)

  got = rewards_of(ROUGE[name][0], random_pairs())

  want = [
    scorer.score(b.removesuffix('...'), a.removesuffix('...'))[name].fmeasure
    for a, b in random_pairs()
  ]
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize('name', ROUGE)
def test_rouge_reads_nothing_after_the_end(name):
  reward, _ = ROUGE[name]
  got, want = outputs('a b d', 'a b'), batch(['a c b d', 'b a'])
  reward_fn = reward.make_reward_fn(VOCABULARY, tiny.IDS, None)
  noisy = got._replace(tokens=jnp.where(got.weights > 0, got.tokens, 4))
  noisy_want = want._replace(
    decoder_target_tokens=jnp.where(
      want.decoder_loss_weights > 0, want.decoder_target_tokens, 4
    )
  )

  np.testing.assert_array_equal(
    rewards.compute(reward_fn, noisy_want, noisy, None),
    rewards.compute(reward_fn, want, got, None),
  )


@pytest.mark.parametrize('n', [0, 1.5, -1])
def test_rouge_n_refuses_what_is_no_n(n):
  with pytest.raises(ValueError, match='rouge_n.n must be'):
    rewards.rouge_n(n)


# ------------------------------------------------------------------ entailment


def nli_inputs(inputs, *texts, max_input_len=None):
  """Returns the prompts of an entailment model, and their length."""
  joined = entailment.premise_and_hypothesis(
    outputs(*inputs).tokens,
    outputs(*texts),
    prefix_ids=VOCABULARY.encode('summarize:'),
    premise_ids=VOCABULARY.encode('premise:'),
    hypothesis_ids=VOCABULARY.encode('hypothesis:'),
    max_input_len=max_input_len,
    ids=tiny.IDS,
  )
  return [VOCABULARY.decode(row) for row in np.asarray(joined)], joined.shape[1]


def test_premise_and_hypothesis_are_joined_without_prefix_end_and_pad():
  got, length = nli_inputs(
    ['summarize: a b c', 'd summarize:', 'summarize:', ''],
    'd e',
    'a...',
    '',
    'a b c d e a b c',
  )

  # 9 of input, 9 of output, premise:, hypothesis: and EOS.
  assert length == 21
  pad = ' <pad>'
  assert got == [
    'premise: a b c hypothesis: d e </s>' + 13 * pad,
    'premise: d summarize: hypothesis: a </s>' + 15 * pad,
    'premise: hypothesis: </s>' + 18 * pad,
    'premise: hypothesis: a b c d e a b c </s>' + 10 * pad,
  ]


def test_the_premise_is_cut_to_fit_and_the_hypothesis_never_is():
  got, length = nli_inputs(
    ['summarize: a b c d e a b', 'a b'],
    'a b c d e a b c',
    'e',
    max_input_len=13,
  )

  assert length == 13
  assert got == [
    'premise: a b hypothesis: a b c d e a b c </s>',
    'premise: a b hypothesis: e </s>' + 7 * ' <pad>',
  ]


def test_a_limit_that_would_cut_the_hypothesis_is_refused():
  nli_inputs(['a'], 'a', max_input_len=12)

  with pytest.raises(ValueError, match='is 11, but an output can be 9 tokens'):
    nli_inputs(['a'], 'a', max_input_len=11)


def test_the_parts_joined_are_the_tokens_of_the_joined_text():
  """Uses T5's vocabulary if its file exists."""
  path = conftest.ROOT.parent / 'shared/data/t5_sentencepiece.model'
  if not path.exists():
    pytest.skip(f'{path} is not there')
  seqio = pytest.importorskip('seqio')
  vocabulary = seqio.SentencePieceVocabulary(str(path), 100)
  document = 'The match was abandoned after 20 minutes. Heavy rain fell.'
  summary = 'Rain has stopped a match.'

  def padded(text, length):
    ids = [*vocabulary.encode(text), 1]
    return jnp.int32([ids + [0] * (length - len(ids))])

  written = padded(summary, 20)
  got = entailment.premise_and_hypothesis(
    padded(f'summarize: {document}', 30),
    Outputs(written, jnp.float32(written != 0)),
    prefix_ids=vocabulary.encode('summarize: '),
    premise_ids=vocabulary.encode('premise: '),
    hypothesis_ids=vocabulary.encode(' hypothesis: '),
    max_input_len=None,
    ids=tiny.IDS,
  )[0]

  want = vocabulary.encode(f'premise: {document} hypothesis: {summary}')
  assert [int(t) for t in got if t != 0] == [*want, 1]
  # '1' is one token; '0' is two, of which the first is not that of '1'.
  entailment.entailment().make_reward_fn(vocabulary, tiny.IDS, None)


ENTAILMENT = functools.partial(
  entailment.entailment,
  task_prefix='summarize:',
  premise='premise:',
  hypothesis='hypothesis:',
  entailed='yes',
  not_entailed='no',
)


@functools.cache
def entailment_model():
  return tiny.model_and_params(3)


def entailment_rewards(reward):
  model, params = entailment_model()
  return np.asarray(
    jax.jit(
      functools.partial(
        rewards.compute, reward.make_reward_fn(VOCABULARY, tiny.IDS, model)
      )
    )(batch(['a', 'b'], ['summarize: a b c', 'd']), outputs('d e', 'a'), params)
  )


@pytest.mark.parametrize('version', ['text', 'ids', 'reverse'])
def test_entailment_is_the_chance_of_the_first_answer_against_the_second(
  version,
):
  yes, no = (VOCABULARY.encode(word)[0] for word in ('yes', 'no'))
  answers = {'entailed': yes, 'not_entailed': no} if version == 'ids' else {}

  reverse = version == 'reverse'

  got = entailment_rewards(ENTAILMENT(**answers, reverse=reverse))

  model, params = entailment_model()
  for row, pair in enumerate([('a b c', 'd e'), ('d', 'a')]):
    premise, hypothesis = reversed(pair) if reverse else pair
    text = f'premise: {premise} hypothesis: {hypothesis}'
    ids = jnp.int32([[*VOCABULARY.encode(text), 1]])
    logits = np.float64(
      tiny.logits(model, params, ids, jnp.zeros((1, 1), jnp.int32))
    )[0, 0]
    p_yes, p_no = np.exp(logits[[yes, no]])
    # float32 logits are off by about 1e-6.
    assert got[row] == pytest.approx(p_yes / (p_yes + p_no), rel=1e-5)
  assert abs(got[0] - got[1]) > 1e-3


def test_entailment_may_be_a_logarithm():
  got = entailment_rewards(ENTAILMENT(log_probability=True))

  np.testing.assert_allclose(
    got, np.log(entailment_rewards(ENTAILMENT())), rtol=1e-5
  )


def test_entailment_needs_answers_that_begin_differently():
  with pytest.raises(ValueError, match='begin with the same token'):
    ENTAILMENT(not_entailed='yes no').make_reward_fn(VOCABULARY, tiny.IDS, None)


@pytest.mark.parametrize('answer', [-1, VOCABULARY.vocab_size])
def test_entailment_refuses_answers_that_are_no_ids(answer):
  with pytest.raises(ValueError, match=f'.entailed is {answer}, but'):
    ENTAILMENT(entailed=answer).make_reward_fn(VOCABULARY, tiny.IDS, None)


def test_entailment_refuses_texts_that_the_vocabulary_cannot_write():
  with pytest.raises(ValueError, match='entailment.premise is'):
    ENTAILMENT(premise='document:').make_reward_fn(VOCABULARY, tiny.IDS, None)


def test_only_entailment_needs_a_model():
  assert ENTAILMENT().needs_model
  assert not rewards.exact_match().needs_model
  assert not rewards.python_function(len).needs_model


# ------------------------------------------------------------- Python function


def test_a_python_function_gets_texts_and_gives_rewards():
  seen = []

  def reward(inputs, outputs, targets):
    seen.append((inputs, outputs, targets))
    return [len(o.split()) for o in outputs]

  got = rewards_of(
    rewards.python_function(reward),
    [('a b c', 'c'), ('', 'd e'), ('a...', '')],
    inputs=['b', 'summarize: d', ''],
  )

  np.testing.assert_array_equal(got, [3.0, 0.0, 1.0])
  assert seen == [
    (['b', 'summarize: d', ''], ['a b c', '', 'a'], ['c', 'd e', ''])
  ]


def fails(inputs, outputs, targets):
  raise KeyError('no such word')


@pytest.mark.parametrize(
  ('function', 'text'),
  [
    (fails, r"rewards_test.fails failed: KeyError: 'no such word'"),
    (lambda x, y, z: [1.0], r'lambda> failed: .*must return 2 finite numbers'),
    (lambda x, y, z: [1.0, np.nan], r'2 finite numbers.* returned \[ 1. nan'),
    (lambda x, y, z: ['good', 'bad'], r'failed: ValueError: could not convert'),
  ],
)
def test_a_python_function_that_fails_is_named(function, text):
  reward = rewards.python_function(function)

  got = rewards_of(reward, [('a', 'a'), ('b', 'b')])

  assert np.isnan(got).all()
  with pytest.raises(RuntimeError, match=text):
    reward.raise_failure()


def test_nothing_is_raised_where_nothing_failed():
  reward = rewards.python_function(lambda x, y, z: [0.0])
  rewards_of(reward, [('a', 'a')])

  reward.raise_failure()
  rewards.exact_match().raise_failure()


def rewards_of_spread_rows():
  """Runs in a separate process, see `tiny.on_simulated_devices`."""
  from gkd_jax.parallel import partitioning

  mesh = partitioning.make_mesh(data=4, model=2)
  rng = np.random.default_rng(0)
  # 480 kB: more than XLA's CPU client would copy while it is waited for.
  tokens = rng.integers(2, 200, (16, 2500), np.int32)
  calls = []

  def reward(inputs, outputs, targets):
    calls.append(len(outputs))
    return [_digest(text) for text in outputs]

  vocabulary = types.SimpleNamespace(
    decode=lambda ids: ' '.join(map(str, ids)), unk_id=2
  )
  reward_fn = rewards.python_function(reward).make_reward_fn(
    vocabulary, tiny.IDS, None
  )

  @jax.jit
  def mean_and_each(batch, outputs):
    rewards_B = rewards.compute(reward_fn, batch, outputs, None)
    return rewards_B.mean(), rewards_B

  written = Outputs(tokens, np.ones(tokens.shape, np.float32))
  placed = partitioning.put_global_batch(
    (Batch(tokens, *written), written), mesh
  )
  runs = [jax.device_get(mean_and_each(*placed)) for _ in range(5)]
  want = [_digest(' '.join(map(str, row))) for row in tokens]
  return runs, want, calls


def _digest(text):
  return hashlib.sha256(text.encode()).digest()[0]


@pytest.mark.slow
def test_a_python_function_sees_all_rows_wherever_they_lie():
  runs, want, calls = tiny.on_simulated_devices(
    8, __name__, rewards_of_spread_rows.__name__
  )

  for mean, each in runs:
    np.testing.assert_array_equal(each, want)
    np.testing.assert_allclose(mean, np.mean(want), rtol=1e-6)
  assert calls == [16] * 5


# -------------------------------------------------------------------- together


def test_a_reward_that_is_not_one_number_an_output_is_refused():
  with pytest.raises(
    ValueError, match=re.escape('(2,), but returns shape (2, 1)')
  ):
    rewards.compute(
      lambda batch, outputs, params: jnp.ones((2, 1)),
      batch(['a', 'b']),
      outputs('a', 'b'),
      None,
    )


def test_a_reward_is_a_float32_constant():
  def reward_fn(batch, outputs, params):
    return jnp.bfloat16(params['scale'] * jnp.ones(1))

  value, gradient = jax.value_and_grad(
    lambda params: rewards.compute(
      reward_fn, batch(['a']), outputs('a'), params
    )[0]
  )({'scale': 3.0})

  assert value == 3.0 and value.dtype == jnp.float32
  assert gradient == {'scale': 0.0}


def test_leave_one_out_mean_is_that_of_the_others_that_count():
  got = credit.leave_one_out_mean(
    jnp.float32([1.0, 2.0, 30.0, 6.0]), jnp.array([True, True, False, True])
  )

  # The row that does not count has others, too.
  np.testing.assert_allclose(got, [4.0, 3.5, 3.0, 1.5], rtol=1e-6)


def test_leave_one_out_mean_is_0_where_there_is_no_other():
  got = credit.leave_one_out_mean(
    jnp.float32([5.0, 7.0]), jnp.array([True, False])
  )

  assert got[0] == 0.0


def test_a_model_that_gives_rewards_may_be_any_t5():
  model = T5(tiny.config('1.0'))
  params = tiny.params(model, 0)
  reward_fn = ENTAILMENT().make_reward_fn(VOCABULARY, tiny.IDS, model)

  got = jax.jit(functools.partial(rewards.compute, reward_fn))(
    batch(['a'], ['a b']), outputs('a'), params
  )

  assert 0.0 < got[0] < 1.0
