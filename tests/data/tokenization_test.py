# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import seqio

from gkd_jax.data import datasets, tokenization, vocabularies
from tests import conftest

WORDS = ['ab', 'abc', 'abcdefg', 'abcdefgh', 'x' * 20, 'ü']


def backwards(split):
  return WORDS if split == 'train' else []


@pytest.fixture(scope='module')
def config():
  """A task whose inputs and targets have 2 to 20 bytes."""
  name = conftest.register('words_to_lose', backwards)
  return datasets.DatasetConfig(
    name, {'inputs': 30, 'targets': 30}, batch_size=2
  )


def measure(config, inputs=30, targets=30, **changes):
  lengths = {'inputs': inputs, 'targets': targets}
  return tokenization.measure(
    dataclasses.replace(config, task_feature_lengths=lengths, **changes)
  )


def test_nothing_is_said_of_nothing_lost(config):
  losses = measure(config)

  assert losses.lines() == []
  assert losses.scalars() == {}


@pytest.mark.parametrize(
  'length, num_cut',
  # With EOS the words have 3, 4, 8, 9, 21 and 3 ids.
  [(21, 0), (20, 1), (9, 1), (8, 2), (3, 4), (2, 6)],
)
def test_a_row_that_is_longer_with_eos_is_cut(config, length, num_cut):
  assert measure(config, inputs=length).num_cut['inputs'] == num_cut
  assert measure(config, targets=length).num_cut['targets'] == num_cut


def test_inputs_and_targets_are_reported_apart(config):
  losses = measure(config, inputs=8, targets=3)

  assert losses.lines() == [
    'Cut by TASK_FEATURE_LENGTHS: the inputs of 2 (to 8 tokens) and the '
    'targets of 4 (to 3 tokens) of the 6 examples of the train split.'
  ]
  assert losses.scalars() == {
    'data/inputs_cut': 2 / 6,
    'data/targets_cut': 4 / 6,
    'data/inputs_unknown': 0.0,
    'data/targets_unknown': 0.0,
  }


def test_unknown_tokens_are_counted_without_eos(config, tmp_path):
  conftest.train_sentencepiece(
    tmp_path / 'x.model', ['abcdefgh'] * 9, vocab_size=12
  )
  losses = measure(
    config, vocabulary=vocabularies.sentencepiece(tmp_path / 'x.model', 0)
  )

  # Each word begins with a space; x and ü are unknown, a run of x is one token.
  assert losses.unknown['inputs'] == pytest.approx(2 / (3 + 4 + 8 + 9 + 2 + 2))
  (line,) = losses.lines()
  assert line.startswith('Unknown to the vocabulary: 7.14% of the tokens of th')


@pytest.mark.parametrize('limit, is_all', [(5, False), (6, True)])
def test_only_the_first_examples_are_looked_at(
  config, monkeypatch, limit, is_all
):
  monkeypatch.setattr(tokenization, 'NUM_EXAMPLES', limit)

  losses = measure(config, inputs=2)

  assert (losses.num_examples, losses.is_all) == (limit, is_all)
  assert ('of the first 5 examples' in losses.lines()[0]) == (not is_all)


def test_no_example_is_looked_at_that_is_not_used(config):
  assert measure(config, inputs=8, num_examples=4).num_cut['inputs'] == 1


def test_of_a_mixture_all_tasks_are_looked_at(config):
  name = 'mixture_to_lose'
  seqio.MixtureRegistry.add(name, [(config.mixture_or_task_name, 1.0)])

  losses = measure(config, inputs=8, mixture_or_task_name=name)

  assert losses.num_cut['inputs'] == 2


def test_rows_without_their_text_are_not_called_cut(config):
  name = conftest.register(
    'words_without_text',
    backwards,
    preprocessors=[
      lambda ds, output_features: seqio.preprocessors.tokenize(
        ds, output_features, copy_pretokenized=False
      ),
      seqio.preprocessors.append_eos_after_trim,
    ],
  )

  losses = measure(config, inputs=8, mixture_or_task_name=name)

  assert 'inputs' not in losses.num_cut
  assert losses.num_cut['targets'] == 0


def test_predictions_that_are_cut_are_counted(config, tmp_path):
  written = conftest.write_predictions(
    tmp_path / 'predictions_train.jsonl',
    [([5, 6, 1], [7, 8, 9, 1]), ([5, 1], [7, 1])],
    config,
  )

  assert measure(written, targets=3).num_cut == {'inputs': 0, 'targets': 1}


def test_the_number_of_an_examples_teacher_is_no_text(config):
  name = conftest.register(
    'words_of_two_teachers',
    backwards,
    preprocessors=[
      lambda ds: ds.map(lambda features: {**features, 'teacher': 'a'}),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
  )

  losses = measure(
    config, inputs=8, mixture_or_task_name=name, teachers=('a', 'b')
  )

  assert losses.num_cut == {'inputs': 2, 'targets': 0}
  assert {*losses.unknown} == {'inputs', 'targets'}
