# SPDX-License-Identifier: Apache-2.0
import dataclasses
import time

import numpy as np
import pytest
import seqio

from gkd_jax.data import datasets, iterators, vocabularies
from tests import conftest
from tests.conftest import LENGTHS, take, words

pytestmark = pytest.mark.slow  # reads data by TensorFlow


def of_host(config, i):
  """Returns the rows that the i-th of two hosts reads."""
  return iterators.TrainIterator(config, seed=0, shards=[i], num_shards=2)


@pytest.fixture(scope='module')
def train_config(letters):
  return datasets.DatasetConfig(letters, LENGTHS, batch_size=8)


# --- Finding a task -----------------------------------------------------------


def test_an_unregistered_task_is_refused_with_the_nearest_name():
  config = datasets.DatasetConfig('cmudict_gp2', LENGTHS, batch_size=8)

  with pytest.raises(ValueError, match="Did you mean 'cmudict_g2p'") as error:
    iterators.TrainIterator(config, seed=0)

  # It says which there are, even those not imported yet, and what to do.
  assert 'arithmetic_cot' in str(error.value)
  assert 'MIXTURE_OR_TASK_MODULE' in str(error.value)


def test_a_module_that_is_not_there_is_refused_by_name(letters):
  config = datasets.DatasetConfig(
    letters, LENGTHS, batch_size=8, mixture_or_task_module='my_tasks.riddles'
  )

  with pytest.raises(ValueError, match="MIXTURE_OR_TASK_MODULE.*'my_tasks"):
    datasets.get_task(config)


def test_an_error_inside_the_module_is_not_hidden(
  letters, tmp_path, monkeypatch
):
  (tmp_path / 'tasks_with_a_bug.py').write_text('import no_such_package')
  monkeypatch.syspath_prepend(tmp_path)
  config = datasets.DatasetConfig(
    letters, LENGTHS, batch_size=8, mixture_or_task_module='tasks_with_a_bug'
  )

  with pytest.raises(ModuleNotFoundError, match='no_such_package'):
    datasets.get_task(config)


def test_the_module_of_ones_own_task_is_imported(tmp_path, monkeypatch):
  (tmp_path / 'my_own_tasks.py').write_text(
    'from tests import conftest\n'
    "conftest.register('my_own', conftest.letter_words)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  config = datasets.DatasetConfig(
    'my_own', LENGTHS, batch_size=8, mixture_or_task_module='my_own_tasks'
  )

  batch = next(iterators.TrainIterator(config, seed=0))

  assert set(words([batch])) <= set(conftest.letter_words('train'))


# --- Tasks that must be told something ----------------------------------------


@pytest.fixture(scope='module')
def module_with_make_task(tmp_path_factory):
  """A module whose task 'repeated' is made by a function with arguments."""
  folder = tmp_path_factory.mktemp('modules')
  (folder / 'repeated_tasks.py').write_text(
    'import seqio\n'
    'from tests import conftest\n'
    'def make_task(name, letter, times=2):\n'
    '  if times < 1:\n'
    "    raise ValueError('TIMES must be 1 or more.')\n"
    "  conftest.register(f'{name}_template', lambda split: [letter * times])\n"
    "  task = seqio.TaskRegistry.get(f'{name}_template')\n"
    '  return task.replace(name=name)\n'
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    yield 'repeated_tasks'


@pytest.fixture
def repeated(module_with_make_task):
  def config(arguments):
    return datasets.DatasetConfig(
      'repeated',
      LENGTHS,
      batch_size=1,
      mixture_or_task_module=module_with_make_task,
      task_arguments=arguments,
    )

  return config


def first_word(config):
  return words(take(iterators.TrainIterator(config, seed=0), 1))[0]


def test_a_task_is_made_with_its_arguments(repeated):
  assert first_word(repeated({'letter': 'a'})) == 'aa'
  assert first_word(repeated({'letter': 'a', 'times': 3})) == 'aaa'
  assert first_word(repeated({'letter': 'b'})) == 'bb'
  assert first_word(repeated({'letter': 'a'})) == 'aa'


def test_a_task_that_was_made_can_be_evaluated(repeated):
  config = dataclasses.replace(repeated({'letter': 'c'}), split='test')

  dataset = iterators.EvalDataset(config)

  assert dataset.examples() == [{'inputs': 'cc', 'targets': 'cc'}]
  assert dataset.metric_names() == ['error']


def test_a_wrong_argument_is_refused_with_the_right_ones(repeated):
  with pytest.raises(ValueError, match="'repeated'.*'tims'.*letter, times"):
    datasets.get_task(repeated({'letter': 'a', 'tims': 3}))


def test_a_task_that_is_not_told_what_it_needs_is_refused(repeated):
  with pytest.raises(ValueError, match="task_arguments.*argument: 'letter'"):
    datasets.get_task(repeated(None))


def test_what_the_task_itself_refuses_is_told(repeated):
  with pytest.raises(ValueError, match='^TIMES must be 1 or more.$'):
    datasets.get_task(repeated({'letter': 'a', 'times': 0}))


def test_arguments_for_a_task_that_takes_none_are_refused():
  config = datasets.DatasetConfig(
    'cmudict_g2p', LENGTHS, batch_size=4, task_arguments={'language': 'de'}
  )

  with pytest.raises(ValueError, match="'cmudict_g2p' takes no arguments"):
    datasets.get_task(config)


# --- Another vocabulary than the task's ---------------------------------------


@pytest.fixture(scope='module')
def with_extra_ids(letters):
  return datasets.DatasetConfig(
    letters,
    conftest.LENGTHS,
    batch_size=4,
    split='validation',
    vocabulary=vocabularies.byte(extra_ids=100),
  )


def test_a_task_can_be_given_another_vocabulary(with_extra_ids):
  assert datasets.get_vocabulary(with_extra_ids).vocab_size == 359
  assert iterators.EvalDataset(with_extra_ids).vocabulary.vocab_size == 359


def test_the_task_itself_keeps_its_own(with_extra_ids, letters):
  datasets.get_task(with_extra_ids)

  task = seqio.get_mixture_or_task(letters)
  assert task.output_features['inputs'].vocabulary.vocab_size == 259


def test_batches_are_in_the_ids_of_the_vocabulary(
  letters, sentencepiece_models
):
  vocabulary = vocabularies.sentencepiece(sentencepiece_models[0])
  config = datasets.DatasetConfig(
    letters, conftest.LENGTHS, batch_size=4, vocabulary=vocabulary
  )

  tokens = next(iterators.TrainIterator(config, seed=0)).encoder_input_tokens

  rows = {tuple(row[row > 1].tolist()) for row in tokens}
  assert rows <= {
    tuple(vocabulary.encode(word)) for word in conftest.letter_words('train')
  }


@pytest.fixture(scope='module')
def mixtures():
  """A mixture of one `a` to three `b`s, and one of two tasks and of it."""

  def task(letter):
    return conftest.register(f'only_{letter}', lambda split: [letter * 3])

  a, b, c = (task(letter) for letter in 'abc')
  seqio.MixtureRegistry.add('a_and_b', [(a, 1.0), (b, lambda task: 3.0)])
  seqio.MixtureRegistry.add('with_c', [(c, 4.0), ('a_and_b', 4.0)])


def letters_drawn(config, num_batches):
  """Returns the percentage of rows that have each letter as input."""
  drawn = words(take(iterators.TrainIterator(config, seed=0), num_batches))
  return {
    letter: 100 * drawn.count(3 * letter) / len(drawn) for letter in 'abc'
  }


@pytest.mark.parametrize(
  ('name', 'want'),
  [
    ('a_and_b', {'a': 25, 'b': 75, 'c': 0}),
    ('with_c', {'a': 12.5, 'b': 37.5, 'c': 50}),
  ],
)
def test_a_mixture_with_another_vocabulary_keeps_its_rates(
  mixtures, name, want
):
  config = datasets.DatasetConfig(
    name,
    LENGTHS,
    batch_size=100,
    vocabulary=vocabularies.byte(extra_ids=100),
  )

  assert datasets.get_vocabulary(config).vocab_size == 359
  # 2000 rows: a share of 50% has a standard error of 1.1. Four of them.
  assert letters_drawn(config, 20) == pytest.approx(want, abs=4.5)


def test_a_mixture_with_another_vocabulary_samples_as_before():
  def last_alone(datasets, rates, seed):
    del rates, seed
    return datasets[-1]

  tasks = [
    (conftest.register(f'just_{letter}', lambda split, x=letter: [x * 3]), 1.0)
    for letter in 'ab'
  ]
  seqio.MixtureRegistry.add('last_alone', tasks, sample_fn=last_alone)
  config = datasets.DatasetConfig(
    'last_alone',
    LENGTHS,
    batch_size=4,
    vocabulary=vocabularies.byte(extra_ids=100),
  )

  assert letters_drawn(config, 2) == {'a': 0, 'b': 100, 'c': 0}


def test_a_mixture_itself_keeps_its_vocabulary(mixtures):
  config = datasets.DatasetConfig('a_and_b', LENGTHS, batch_size=4)
  changed = dataclasses.replace(
    config, vocabulary=vocabularies.byte(extra_ids=100)
  )

  datasets.get_task(changed)

  assert datasets.get_vocabulary(config).vocab_size == 259


# --- The first examples alone -------------------------------------------------


def test_training_on_a_number_of_examples_takes_the_first(train_config):
  few = dataclasses.replace(train_config, num_examples=5)

  seen = set(words(take(iterators.TrainIterator(few, seed=0), 20)))

  assert seen == set(conftest.letter_words('train')[:5])


def test_the_seed_does_not_choose_the_examples(train_config):
  few = dataclasses.replace(train_config, num_examples=5)

  one, other = (
    words(take(iterators.TrainIterator(few, seed=seed), 10)) for seed in (1, 2)
  )

  assert one != other
  assert set(one) == set(other)


def test_more_examples_than_there_are_are_all(train_config):
  many = dataclasses.replace(train_config, num_examples=1000)

  seen = set(words(take(iterators.TrainIterator(many, seed=0), 60)))

  assert seen == set(conftest.letter_words('train'))


def test_shards_share_the_examples_out(train_config):
  few = dataclasses.replace(train_config, num_examples=6)
  first, second = (
    set(
      words(
        take(iterators.TrainIterator(few, seed=0, shards=[i], num_shards=2), 30)
      )
    )
    for i in range(2)
  )

  assert not first & second
  assert first | second == set(conftest.letter_words('train')[:6])


def test_a_share_of_a_mixture_is_refused(letters):
  seqio.MixtureRegistry.add('only_letters', [letters], default_rate=1.0)
  config = datasets.DatasetConfig('only_letters', LENGTHS, 8, num_examples=5)

  with pytest.raises(ValueError, match='TRAIN_NUM_EXAMPLES is 5.*mixed'):
    iterators.TrainIterator(config, seed=0)


def test_a_share_of_a_cache_is_refused(train_config):
  config = dataclasses.replace(train_config, num_examples=5, use_cached=True)

  with pytest.raises(ValueError, match='TRAIN_NUM_EXAMPLES is 5.*cache'):
    iterators.TrainIterator(config, seed=0)


# --- Training on what a model wrote -------------------------------------------


def random_rows(num_rows, num_ids, seed=0):
  """Different rows of random ids, most of which are not valid text."""
  rng = np.random.default_rng(seed)
  return [
    (
      [2 + i, *rng.integers(2, num_ids, rng.integers(0, 4)).tolist(), 1],
      rng.integers(2, num_ids, rng.integers(0, 7)).tolist() + [1],
    )
    for i in range(num_rows)
  ]


@pytest.fixture(scope='module')
def written(train_config, tmp_path_factory):
  """40 rows of bytes, most of which are not valid UTF-8."""
  path = tmp_path_factory.mktemp('written') / 'predictions_train.jsonl'
  return conftest.write_predictions(path, random_rows(40, 259), train_config)


def pairs(batches):
  """(ids of inputs, ids of targets) of each row, without padding."""
  return [
    (x[x > 0].tolist(), y[w > 0].tolist())
    for batch in batches
    for x, y, w in zip(*batch[:3], strict=True)
  ]


def test_a_student_is_trained_on_the_very_ids_the_teacher_wrote(written):
  ordered = dataclasses.replace(written, shuffle=False)

  rows = pairs(take(iterators.TrainIterator(ordered, seed=0), 5))

  assert rows == random_rows(40, 259)
  text = seqio.ByteVocabulary()  # the texts would not have done
  assert any(text.encode(text.decode(y))[: len(y)] != y for _, y in rows)


def test_with_any_vocabulary(sentencepiece_models, letters, tmp_path):
  vocabulary = vocabularies.sentencepiece(sentencepiece_models[0])
  config = datasets.DatasetConfig(
    letters, LENGTHS, batch_size=4, shuffle=False, vocabulary=vocabulary
  )
  # Pieces in an order in which no encoder cuts, spaces, unknown pieces.
  rows = random_rows(4, vocabulary.vocab_size, seed=1)
  written = conftest.write_predictions(tmp_path / 'x.jsonl', rows, config)

  assert pairs([next(iterators.TrainIterator(written, seed=0))]) == rows


def test_each_of_several_predictions_is_an_example(train_config, tmp_path):
  rows = [([5, 1], [6 + i, 1]) for i in range(8)]
  written = conftest.write_predictions(tmp_path / 'x.jsonl', rows, train_config)
  ordered = dataclasses.replace(written, shuffle=False)

  assert pairs(take(iterators.TrainIterator(ordered, seed=0), 1)) == rows


def test_predictions_are_shuffled_by_the_seed(written):
  first, again, other = (
    pairs(take(iterators.TrainIterator(written, seed=seed), 5))
    for seed in (1, 1, 2)
  )

  assert first == again
  assert first != other
  assert first != random_rows(40, 259)


def test_predictions_for_one_input_come_far_apart(train_config, tmp_path):
  rows = [([5, 1], [6, 1])] * 2000 + [([7, 1], [8, 1])] * 2000
  written = conftest.write_predictions(tmp_path / 'x.jsonl', rows, train_config)

  batch = pairs(take(iterators.TrainIterator(written, seed=0), 4))

  # seqio's buffer of 1000 alone would give the first 1032 of the file.
  assert {tuple(x) for x, _ in batch} == {(5, 1), (7, 1)}


def test_hosts_share_predictions(written):
  shards = [
    iterators.TrainIterator(written, seed=0, shards=[i], num_shards=2)
    for i in range(2)
  ]

  first, second = (
    {str(pair) for pair in pairs(take(shard, 60))} for shard in shards
  )

  assert not first & second
  assert first | second == {str(pair) for pair in random_rows(40, 259)}


def test_the_position_in_predictions_is_saved(written, tmp_path):
  saved = iterators.TrainIterator(written, seed=0)
  take(saved, 3)
  time.sleep(0.2)
  saved.save(tmp_path)

  restored = iterators.TrainIterator(written, seed=0)
  restored.restore(tmp_path)

  assert pairs(take(restored, 8)) == pairs(take(saved, 8))


def test_the_first_predictions_alone_can_be_taken(written):
  few = dataclasses.replace(written, num_examples=8)

  rows = pairs(take(iterators.TrainIterator(few, seed=0), 12))

  assert {str(row) for row in rows} == {
    str(r) for r in random_rows(40, 259)[:8]
  }


def test_predictions_that_are_written_again_are_read_again(
  train_config, tmp_path
):
  path = tmp_path / 'x.jsonl'
  for rows in (random_rows(8, 259), random_rows(8, 259, seed=1)):
    path.unlink(missing_ok=True)
    written = conftest.write_predictions(path, rows, train_config)
    ordered = dataclasses.replace(written, shuffle=False)
    assert pairs([next(iterators.TrainIterator(ordered, seed=0))]) == rows


def test_two_predictions_of_an_input_are_one_example(train_config, tmp_path):
  # The worse output reaches the maximum length in one pair, and not in another.
  rows = [
    ([5, 6, 1], [7, 1]),
    ([5, 6, 1], [8, 9, 10, 11]),
    ([4, 1], [8, 1]),
    ([4, 1], [9, 1]),
  ]
  written = conftest.write_predictions(
    tmp_path / 'pairs.jsonl', rows, train_config
  )
  paired = dataclasses.replace(written, pairs=True, shuffle=False, batch_size=2)

  batch = next(iterators.TrainIterator(paired, seed=0))

  assert pairs([batch]) == rows[::2]
  worse = batch.rejected
  assert [
    tokens[weights > 0].tolist()
    for tokens, weights in zip(worse.tokens, worse.weights, strict=True)
  ] == [outputs for _, outputs in rows[1::2]]


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'pairs': True}, 'but TRAIN_ON_PREDICTIONS is not'),
    (
      {'pairs': True, 'predictions': 'x', 'row_weights': True},
      'a pair has no weight',
    ),
  ],
)
def test_pairs_are_predictions_without_weights(train_config, changes, said):
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(train_config, **changes)


def test_the_task_keeps_its_other_splits(written):
  validation = dataclasses.replace(
    written, split='validation', predictions=None, shuffle=False
  )

  assert len(iterators.EvalDataset(validation)) == 10


@pytest.mark.parametrize(
  ['changes', 'said'],
  [
    (
      {'vocabulary': seqio.ByteVocabulary(100)},
      "vocabulary 'ByteVocabulary 25",
    ),
    ({'mixture_or_task_name': 'cmudict_g2p'}, "for task 'letters'; this run"),
    ({'predictions': 'nowhere/*.jsonl'}, 'nowhere.*is not there'),
  ],
)
def test_predictions_of_no_use_are_refused_before_training(
  written, changes, said
):
  with pytest.raises(ValueError, match=f'TRAIN_ON_PREDICTIONS: .*{said}'):
    datasets.get_vocabulary(dataclasses.replace(written, **changes))
