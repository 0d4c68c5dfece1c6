# SPDX-License-Identifier: Apache-2.0
import dataclasses
import time

import numpy as np
import pytest
import seqio
import tensorflow as tf

from gkd_jax.batch import Batch
from gkd_jax.data import datasets, iterators, vocabularies
from gkd_jax.data.tasks import _common, cmudict_g2p
from gkd_jax.runtime import files
from tests import conftest, tiny
from tests.conftest import LENGTHS, take, words

pytestmark = pytest.mark.slow  # reads data by TensorFlow


@pytest.fixture(scope='module')
def train_config(letters):
  return datasets.DatasetConfig(letters, LENGTHS, batch_size=8)


@pytest.fixture(scope='module')
def batch(train_config):
  return next(iterators.TrainIterator(train_config, seed=0))


@pytest.fixture(scope='module')
def validation(letters):
  """10 examples in batches of 4."""
  config = datasets.DatasetConfig(
    letters, LENGTHS, batch_size=4, split='validation', shuffle=False
  )
  return iterators.EvalDataset(config)


def assert_equal(batches, others):
  for batch, other in zip(batches, others, strict=True):
    for x, y in zip(batch, other, strict=True):
      np.testing.assert_array_equal(x, y)


# --- Training batches ---------------------------------------------------------


def test_a_batch_has_the_shapes_and_dtypes_it_is_documented_with(batch):
  shapes = {
    name: (x.shape, x.dtype.name)
    for name, x in batch._asdict().items()
    if x is not None
  }
  assert shapes == {
    'encoder_input_tokens': ((8, 6), 'int32'),
    'decoder_target_tokens': ((8, 7), 'int32'),
    'decoder_loss_weights': ((8, 7), 'float32'),
  }


def test_inputs_and_targets_are_the_tasks_texts_with_eos(batch):
  vocabulary = seqio.ByteVocabulary()
  for inputs, targets, word in zip(
    batch.encoder_input_tokens,
    batch.decoder_target_tokens,
    words([batch]),
    strict=True,
  ):
    want = [*vocabulary.encode(word), 1]
    assert inputs.tolist() == want + [0] * (6 - len(want))
    want = [*vocabulary.encode(word[::-1]), 1]
    assert targets.tolist() == want + [0] * (7 - len(want))


def test_weights_cover_eos_and_nothing_after(batch):
  for targets, weights in zip(
    batch.decoder_target_tokens, batch.decoder_loss_weights, strict=True
  ):
    length = targets.tolist().index(1) + 1
    assert weights.tolist() == [1.0] * length + [0.0] * (7 - length)


def test_too_long_targets_are_cut_and_still_end_in_eos(train_config):
  short = dataclasses.replace(
    train_config, task_feature_lengths={'inputs': 6, 'targets': 3}
  )

  batch = next(iterators.TrainIterator(short, seed=0))

  assert (batch.decoder_target_tokens == 1).sum(axis=1).tolist() == [1] * 8
  assert batch.decoder_loss_weights.all(axis=1).any()  # some were cut


def test_the_seed_determines_the_order(train_config):
  first, again, other = (
    words(take(iterators.TrainIterator(train_config, seed=seed), 8))
    for seed in (3, 3, 4)
  )

  assert first == again
  assert first != other


def test_without_shuffling_the_order_is_the_sources(train_config):
  config = dataclasses.replace(train_config, shuffle=False)

  rows = words(take(iterators.TrainIterator(config, seed=0), 6))

  assert rows == conftest.letter_words('train')


def test_shards_are_disjoint_and_complete(train_config):
  shards = [
    iterators.TrainIterator(train_config, seed=0, shards=[i], num_shards=2)
    for i in range(2)
  ]

  # seqio repeats the data before it shuffles: no epoch is exact, so take enough
  # to have seen all 24 examples of each.
  first, second = (words(take(shard, 100)) for shard in shards)

  assert not set(first) & set(second)
  assert {*first, *second} == set(conftest.letter_words('train'))


def test_a_shard_has_its_share_of_the_rows_of_the_global_batch(train_config):
  shard = iterators.TrainIterator(
    train_config, seed=0, shards=[3], num_shards=4
  )

  assert next(shard).encoder_input_tokens.shape == (2, 6)


def of_two(train_config, *shards):
  return iterators.TrainIterator(
    train_config, seed=0, shards=shards, num_shards=2
  )


def test_the_batches_are_the_same_however_the_shards_are_dealt(train_config):
  one = take(of_two(train_config, 0, 1), 4)
  parts = [take(of_two(train_config, i), 4) for i in range(2)]

  both = [
    Batch(*map(np.concatenate, zip(a[:3], b[:3], strict=True)))
    for a, b in zip(*parts, strict=True)
  ]
  assert_equal(one, both)


def test_one_host_may_go_on_with_the_shards_of_two(train_config, tmp_path):
  parts = [of_two(train_config, i) for i in range(2)]
  for part in parts:
    take(part, 3)
    part.save(tmp_path)

  one = of_two(train_config, 0, 1)
  one.restore(tmp_path)

  rows = [next(part).encoder_input_tokens for part in parts]
  np.testing.assert_array_equal(
    next(one).encoder_input_tokens, np.concatenate(rows)
  )


# --- Saving the position ------------------------------------------------------


@pytest.mark.parametrize('num_before', [0, 2, 7])  # 6 are an epoch
def test_a_restored_iterator_goes_on_as_the_saved_one(
  train_config, tmp_path, num_before
):
  saved = iterators.TrainIterator(train_config, seed=0)
  take(saved, num_before)
  time.sleep(0.2)  # let it read ahead: that must neither be lost nor repeated
  saved.save(tmp_path)

  restored = iterators.TrainIterator(train_config, seed=0)
  take(restored, 1)
  restored.restore(tmp_path)

  assert_equal(take(restored, 8), take(saved, 8))


def test_a_position_of_another_number_of_shards_is_refused(
  train_config, tmp_path
):
  iterators.TrainIterator(train_config, seed=0).save(tmp_path)
  one_of_two = iterators.TrainIterator(
    train_config, seed=0, shards=[0], num_shards=2
  )

  with pytest.raises(
    files.CheckpointMismatch, match='Set experiment.Data.num_shards'
  ):
    one_of_two.restore(tmp_path)


def test_a_task_whose_position_cannot_be_saved_is_refused_at_once():
  import tensorflow as tf

  def shout(dataset):
    def upper(text):
      text = tf.py_function(lambda x: x.numpy().upper(), [text], tf.string)
      return tf.ensure_shape(text, [])

    return dataset.map(lambda x: {**x, 'inputs': upper(x['inputs'])})

  rows = _common.RowsSource(
    lambda split: {'inputs': ['a'], 'targets': ['b']}, ['train']
  )
  features = dict.fromkeys(LENGTHS, seqio.Feature(seqio.ByteVocabulary()))
  name = 'with_python'
  seqio.TaskRegistry.add(
    name,
    source=rows,
    preprocessors=[shout, *_common.TOKENIZE],
    output_features=features,
    metric_fns=[],
  )

  with pytest.raises(
    ValueError, match="'with_python' cannot be saved.*EagerPy"
  ):
    next(
      iterators.TrainIterator(
        datasets.DatasetConfig(name, LENGTHS, batch_size=1), seed=0
      )
    )


# --- Inputs for a model that writes -------------------------------------------


def test_inputs_are_read_in_batches_of_one_shape(letters):
  config = datasets.DatasetConfig(letters, LENGTHS, batch_size=4, split='test')

  rows, inputs, examples = zip(
    *iterators.InferenceDataset(config).batches(), strict=True
  )

  assert [x.tolist() for x in rows] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert [x.shape for x in inputs] == [(4, 6), (4, 6)]
  assert not inputs[1][3].any()  # 7 examples: the last row is filled up
  told = [example for part in examples for example in part]
  assert [x['inputs'] for x in told] == conftest.letter_words('test')
  for example, row in zip(told, np.concatenate(inputs), strict=False):
    assert example['input_ids'] == row[row > 0].tolist()


def test_reading_can_begin_anywhere(letters):
  config = datasets.DatasetConfig(letters, LENGTHS, batch_size=4, split='train')
  dataset = iterators.InferenceDataset(config)

  late = list(dataset.batches(8))

  for x, y in zip(late, list(dataset.batches())[2:], strict=True):
    np.testing.assert_array_equal(x[0], y[0])
    np.testing.assert_array_equal(x[1], y[1])
    assert x[2] == y[2]


def test_rows_are_those_that_are_evaluated(validation, letters):
  config = datasets.DatasetConfig(letters, LENGTHS, 4, split='validation')

  for (rows, batch), (same_rows, inputs, _) in zip(
    validation.batches(),
    iterators.InferenceDataset(config).batches(),
    strict=True,
  ):
    np.testing.assert_array_equal(rows, same_rows)
    np.testing.assert_array_equal(batch.encoder_input_tokens, inputs)


@pytest.mark.parametrize('num_examples', [None, 96])
def test_the_number_of_inputs_is_known_where_the_task_tells(num_examples):
  config = datasets.DatasetConfig(
    'cmudict_g2p', LENGTHS, 4, split='validation', num_examples=num_examples
  )

  assert iterators.InferenceDataset(config).size() == (num_examples or 3444)


def test_the_number_of_inputs_is_not_made_up(letters):
  config = datasets.DatasetConfig(letters, LENGTHS, 4, split='validation')

  assert iterators.InferenceDataset(config).size() is None


# --- Evaluation ---------------------------------------------------------------


def test_the_last_batch_is_filled_up_with_rows_of_weight_0(validation):
  rows, batches = zip(*validation.batches(), strict=True)

  assert [batch.decoder_target_tokens.shape for batch in batches] == [
    (4, 7)
  ] * 3
  assert np.concatenate(rows).tolist() == list(range(12))
  has_weight = [b.decoder_loss_weights.any(axis=1).tolist() for b in batches]
  assert has_weight == [[True] * 4, [True] * 4, [True, True, False, False]]


def test_all_examples_are_there_in_order(validation):
  want = conftest.letter_words('validation')

  assert len(validation) == 10
  assert validation.examples() == [
    {'inputs': word, 'targets': word[::-1]} for word in want
  ]


def test_what_is_written_for_the_filling_is_dropped(validation):
  def write(rows, batch):
    assert len(rows) == len(batch.encoder_input_tokens) == 4
    return np.repeat(rows[:, None], 7, axis=1)

  tokens = validation.predict(write)

  assert tokens[:, 0].tolist() == list(range(10))


def test_perfect_outputs_have_perfect_metrics(validation):
  tokens = validation.predict(lambda _, batch: batch.decoder_target_tokens)

  assert validation.metrics(tokens) == {'error': 0.0}


def test_what_a_metric_says_beside_numbers_is_a_note(validation):
  tokens = validation.predict(lambda _, batch: batch.decoder_target_tokens)

  numbers, notes = validation.metrics_and_notes(tokens)

  assert numbers == {'error': 0.0}
  assert notes == {'error_of': 'whole words'}
  assert validation.metric_names() == ['error']


def test_each_output_is_scored_against_its_own_target(validation):
  tokens = validation.predict(lambda _, batch: batch.decoder_target_tokens)

  # The words differ: moved by one row, all are wrong; 3 of 10 spoilt, 3 are.
  moved = validation.metrics(np.roll(tokens, 1, axis=0))
  spoilt = tokens.copy()
  spoilt[[0, 4, 9], 0] = 50
  some = validation.metrics(spoilt)

  assert moved == {'error': 100.0}
  assert some == {'error': 30.0}


def test_what_follows_eos_does_not_count(validation):
  tokens = validation.predict(lambda _, batch: batch.decoder_target_tokens)
  ended = (tokens == 1).cumsum(axis=1) > 0

  junk = np.where(ended & (tokens != 1), 50, tokens)

  assert (junk != tokens).any()
  assert validation.metrics(junk) == {'error': 0.0}


def test_num_examples_takes_the_first(letters):
  config = datasets.DatasetConfig(
    letters, LENGTHS, batch_size=4, split='validation', num_examples=3
  )

  examples = iterators.EvalDataset(config).examples()

  assert [e['inputs'] for e in examples] == conftest.letter_words('validation')[
    :3
  ]


def test_runs_of_one_process_read_a_split_once(letters, monkeypatch):
  read = []
  evaluator = seqio.Evaluator

  def recorded(name, **settings):
    read.append(settings['num_examples'])
    return evaluator(name, **settings)

  monkeypatch.setattr(seqio, 'Evaluator', recorded)
  for num_examples in (3, 3, 2):
    config = datasets.DatasetConfig(
      letters,
      {'inputs': 9, 'targets': 9},  # of no other test
      batch_size=4,
      split='validation',
      num_examples=num_examples,
    )
    assert len(iterators.EvalDataset(config)) == num_examples

  assert read == [3, 2]


def test_any_of_several_references_is_right():
  config = datasets.DatasetConfig(
    'cmudict_g2p',
    {'inputs': 16, 'targets': 16},
    batch_size=32,
    split='validation',
    num_examples=96,
  )
  dataset = iterators.EvalDataset(config)
  of = cmudict_g2p.pronunciations()
  told = [e['inputs'] for e in dataset.examples()]
  several = sum(len(of[word]) > 1 for word in told)
  assert several > 3

  last = [dataset.vocabulary.encode(of[word][-1]) + [1] for word in told]
  tokens = np.array([row + [0] * (16 - len(row)) for row in last])
  metrics = dataset.metrics(tokens)

  assert metrics == {'wer': 0.0, 'per': 0.0}
  # They are not the targets, which are the first ones.
  targets = dataset.predict(lambda _, batch: batch.decoder_target_tokens)
  assert (tokens != targets).any(axis=1).sum() == several


# --- Texts of tokens ----------------------------------------------------------


def byte_ids(text):
  return [*seqio.ByteVocabulary().encode(text), 1]


def test_a_letter_of_several_bytes_comes_with_the_last(validation):
  pieces = validation.pieces(byte_ids('añ b€'))

  assert pieces == ['a', '', 'ñ', ' ', 'b', '', '', '€', '']


def test_what_one_more_byte_adds(validation):
  before = byte_ids('añ')[:2]  # the first byte of two

  assert validation.piece_after(before, byte_ids('añ')[2]) == 'ñ'
  assert validation.piece_after(before[:1], before[1]) == '\\xc3'
  assert validation.piece_after(before[:1], byte_ids('b')[0]) == 'b'
  assert validation.piece_after(before[:1], 1) == ''
  assert validation.piece_after(before[:1], 2) == '<2>'  # unknown, no byte


@pytest.fixture(scope='module')
def in_pieces(letters, tmp_path_factory):
  """A split with a SentencePiece vocabulary that has byte fallback."""
  path = tmp_path_factory.mktemp('pieces') / 'pieces.model'
  conftest.train_sentencepiece(
    path,
    ['the cat and the dog and the end'] * 99,
    model_type='bpe',
    byte_fallback=True,
    vocab_size=300,
    hard_vocab_limit=False,
  )
  return iterators.EvalDataset(
    datasets.DatasetConfig(
      letters,
      LENGTHS,
      batch_size=4,
      split='validation',
      vocabulary=vocabularies.sentencepiece(path, extra_ids=0),
    )
  )


@pytest.mark.parametrize('text', ['the cat and the dog', 'cat € dog ñ', ''])
def test_pieces_joined_are_the_text(in_pieces, text):
  ids = [*in_pieces.vocabulary.encode(text), 1]

  pieces = in_pieces.pieces(ids)

  assert ''.join(pieces) == in_pieces.decode([ids])[0] == text
  assert len(pieces) == len(ids)
  assert pieces[-1] == ''


def test_pieces_keep_the_spaces_before_words(in_pieces):
  ids = in_pieces.vocabulary.encode('the cat')

  assert in_pieces.pieces(ids) == ['the', ' cat']
  assert in_pieces.piece_after(ids[:1], ids[1]) == ' cat'


# --- What is refused ----------------------------------------------------------


def test_a_split_that_is_not_there_is_refused_with_those_that_are(letters):
  config = datasets.DatasetConfig(letters, LENGTHS, batch_size=8, split='valid')

  with pytest.raises(
    ValueError, match="no split 'valid'.*empty, test, train, validation"
  ):
    iterators.EvalDataset(config)


def test_an_empty_split_is_refused(letters):
  config = datasets.DatasetConfig(letters, LENGTHS, batch_size=8, split='empty')

  with pytest.raises(ValueError, match="'empty' of task 'letters' is empty"):
    datasets.check_not_empty(config)
  with pytest.raises(ValueError, match="'empty' of task 'letters' is empty"):
    iterators.EvalDataset(config)


def test_a_split_with_examples_is_not_called_empty(train_config):
  datasets.check_not_empty(train_config)


def test_a_task_without_metrics_cannot_be_evaluated():
  name = conftest.register('no_metrics', conftest.letter_words, metric_fns=[])
  config = datasets.DatasetConfig(
    name, LENGTHS, batch_size=8, split='validation'
  )

  with pytest.raises(ValueError, match="'no_metrics' has no metric_fns"):
    iterators.EvalDataset(config)


def test_a_mixture_of_tasks_can_be_trained_on_but_not_evaluated(letters):
  other = conftest.register('more_letters', conftest.letter_words)
  seqio.MixtureRegistry.add('both', [letters, other], default_rate=1.0)
  config = datasets.DatasetConfig(
    'both', LENGTHS, batch_size=8, split='validation'
  )

  next(iterators.TrainIterator(config, seed=0))
  with pytest.raises(ValueError, match='mixture of several tasks'):
    iterators.EvalDataset(config)


def test_different_vocabularies_for_inputs_and_targets_are_refused():
  features = {
    'inputs': seqio.Feature(seqio.ByteVocabulary(extra_ids=7)),
    'targets': seqio.Feature(seqio.ByteVocabulary()),
  }
  name = conftest.register(
    'two_vocabularies', conftest.letter_words, output_features=features
  )
  config = datasets.DatasetConfig(name, LENGTHS, batch_size=8)

  with pytest.raises(ValueError, match='different vocabularies'):
    datasets.get_vocabulary(config)


def test_a_vocabulary_whose_eos_is_not_the_models_is_refused():
  feature = seqio.Feature(seqio.PassThroughVocabulary(size=9, eos_id=3))
  name = conftest.register(
    'odd_eos',
    conftest.letter_words,
    output_features={'inputs': feature, 'targets': feature},
  )
  config = datasets.DatasetConfig(name, LENGTHS, batch_size=8)

  vocabulary = datasets.get_vocabulary(config)

  with pytest.raises(ValueError, match='EOS id 3, but the model has EOS id 1'):
    datasets.special_ids(config, vocabulary, tiny.config())
  ids = datasets.special_ids(config, vocabulary, tiny.config(eos_id=3))
  assert (ids.eos, ids.num_ids) == (3, 9)


def test_a_task_without_targets_is_refused():
  feature = seqio.Feature(seqio.ByteVocabulary())
  name = conftest.register(
    'no_targets', conftest.letter_words, output_features={'inputs': feature}
  )
  config = datasets.DatasetConfig(name, LENGTHS, batch_size=8)

  with pytest.raises(ValueError, match=r"no output feature \['targets'\]"):
    datasets.get_task(config)


@pytest.mark.parametrize(
  'lengths',
  [
    {'inputs': 6},
    {'inputs': 6, 'targets': 7, 'hints': 8},
    {'inputs': 6, 'targets': 0},
    {'inputs': 6, 'targets': '7'},
    {'inputs': 6, 'targets': None},
  ],
)
def test_wrong_feature_lengths_are_refused(lengths):
  with pytest.raises(ValueError, match='TASK_FEATURE_LENGTHS must be'):
    datasets.DatasetConfig('letters', lengths, batch_size=8)


@pytest.mark.parametrize('batch_size', [0, -8, '64', 6.4])
def test_a_batch_size_that_is_no_positive_whole_number_is_refused(batch_size):
  with pytest.raises(ValueError, match='BATCH_SIZE must be'):
    datasets.DatasetConfig('letters', LENGTHS, batch_size=batch_size)


@pytest.mark.parametrize('num_examples', [0, -1, 2.5, '5'])
def test_a_wrong_number_of_examples_is_refused(num_examples):
  with pytest.raises(ValueError, match='train: the number of examples'):
    datasets.DatasetConfig('letters', LENGTHS, 8, num_examples=num_examples)


def test_arguments_that_are_no_mapping_are_refused():
  with pytest.raises(ValueError, match='task_arguments must be'):
    datasets.DatasetConfig('x', LENGTHS, batch_size=4, task_arguments='folder')


# --- What the teacher reads ---------------------------------------------------

TEMPLATE = '{inputs} = {targets}'


def with_teacher_inputs(config, length=12, **settings):
  return dataclasses.replace(
    config,
    teacher_inputs=datasets.TeacherInputs(length, **settings),
  )


def teacher_texts(batch):
  vocabulary = seqio.ByteVocabulary()
  return [
    vocabulary.decode([int(t) for t in row])
    for row in batch.teacher_input_tokens
  ]


def test_the_teachers_inputs_are_made_from_an_examples_texts(train_config):
  config = with_teacher_inputs(train_config, template=TEMPLATE)

  batch = next(iterators.TrainIterator(config, seed=0))

  assert batch.teacher_input_tokens.shape == (8, 12)
  inputs = words([batch])
  # 12 tokens are 11 bytes and EOS.
  assert teacher_texts(batch) == [f'{x} = {x[::-1]}'[:11] for x in inputs]
  assert (batch.teacher_input_tokens[:, -1] <= 1).all()
  other = next(iterators.TrainIterator(train_config, seed=0))
  assert_equal([batch[:3]], [other[:3]])


def test_an_evaluation_has_the_teachers_inputs(letters):
  config = datasets.DatasetConfig(
    letters, LENGTHS, batch_size=4, split='validation'
  )
  dataset = iterators.EvalDataset(with_teacher_inputs(config))

  *_, (_, last) = dataset.batches()

  assert teacher_texts(last)[:2] == words([last])[:2]
  assert not last.teacher_input_tokens[2:].any()  # rows that fill the batch up


def test_exemplars_are_the_same_for_all_rows_and_drawn_with_a_seed(
  train_config,
):
  def lines(seed):
    config = with_teacher_inputs(
      train_config,
      length=64,
      template='{exemplars}{inputs}',
      num_exemplars=2,
      exemplar='{inputs}>{targets};',
      seed=seed,
    )
    batch = next(iterators.TrainIterator(config, seed=0))
    texts = [text.split(';') for text in teacher_texts(batch)]
    assert [text[-1] for text in texts] == words([batch])
    (exemplars,) = {tuple(text[:-1]) for text in texts}
    return exemplars

  first, second = lines(0), lines(1)

  assert len(first) == 2 and first == lines(0) and first != second
  known = {f'{x}>{x[::-1]}' for x in conftest.letter_words('train')}
  assert {*first, *second} <= known


def test_a_mixture_has_the_teachers_inputs(letters):
  seqio.MixtureRegistry.add('letters_with_context', [(letters, 1.0)])
  config = datasets.DatasetConfig(
    'letters_with_context', LENGTHS, batch_size=8, num_examples=None
  )

  batch = next(iterators.TrainIterator(with_teacher_inputs(config), seed=0))

  assert teacher_texts(batch) == words([batch])


def test_a_template_with_an_unknown_name_is_refused(train_config):
  config = with_teacher_inputs(train_config, template='{inputs} {answer}')

  with pytest.raises(ValueError, match='{answer}.*have the texts inputs, targ'):
    iterators.TrainIterator(config, seed=0)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'length': 0}, 'length must be a positive whole number'),
    ({'template': '{inputs'}, "template is '{inputs': expected '}'"),
    ({'template': '{0} {inputs!r}'}, 'only names may stand in braces'),
    ({'template': '{exemplars}'}, 'set both {exemplars} and their number'),
    ({'num_exemplars': 2}, 'set both {exemplars} and their number'),
    ({'num_exemplars': -1}, 'num_exemplars must be a whole number'),
  ],
)
def test_a_template_without_a_meaning_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    datasets.TeacherInputs(**({'length': 8} | settings))


def test_a_task_that_does_not_tokenize_texts_is_refused():
  name = conftest.register(
    'letters_of_ids', conftest.letter_words, preprocessors=[]
  )
  config = datasets.DatasetConfig(name, LENGTHS, batch_size=8)

  with pytest.raises(ValueError, match='does not tokenize its texts with'):
    datasets.get_task(with_teacher_inputs(config))


def test_without_a_template_the_task_must_have_the_feature(train_config):
  with pytest.raises(ValueError, match="no output feature 'teacher_inputs'"):
    datasets.get_task(with_teacher_inputs(train_config, template=None))


def test_predictions_have_no_texts_for_a_template(train_config):
  config = dataclasses.replace(train_config, predictions='x.jsonl')

  with pytest.raises(ValueError, match='without texts for the template'):
    with_teacher_inputs(config)


# --- Special ids --------------------------------------------------------------


@pytest.fixture(scope='module')
def other_ids():
  """A task whose vocabulary ends with 2, and has a token 0; 1 is in no row."""
  import tensorflow as tf

  feature = seqio.Feature(seqio.PassThroughVocabulary(40, eos_id=2))
  rows = {'inputs': [[0, 5], [6, 7]], 'targets': [[8], [0]]}

  def dataset(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices(
      {name: np.int32(ids) for name, ids in rows.items()}
    )

  seqio.TaskRegistry.add(
    'other_ids',
    source=seqio.FunctionDataSource(dataset, splits=['train']),
    preprocessors=[seqio.preprocessors.append_eos],
    output_features={'inputs': feature, 'targets': feature},
    metric_fns=[conftest.error_rate],
  )
  return datasets.DatasetConfig(
    'other_ids', {'inputs': 4, 'targets': 3}, batch_size=2, shuffle=False
  )


def test_rows_are_padded_with_the_models_pad_id(other_ids):
  train = next(iterators.TrainIterator(other_ids, seed=0, pad_id=1))
  ((_, inputs, _),) = iterators.InferenceDataset(other_ids, 1).batches()

  np.testing.assert_array_equal(
    train.encoder_input_tokens, [[0, 5, 2, 1], [6, 7, 2, 1]]
  )
  np.testing.assert_array_equal(inputs, train.encoder_input_tokens)
  np.testing.assert_array_equal(
    train.decoder_target_tokens, [[8, 2, 1], [0, 2, 1]]
  )
  np.testing.assert_array_equal(
    train.decoder_loss_weights, [[1.0, 1.0, 0.0]] * 2
  )


def test_the_last_batch_of_an_evaluation_is_filled_up_with_padding(other_ids):
  config = dataclasses.replace(other_ids, batch_size=3)

  ((_, batch),) = iterators.EvalDataset(config, pad_id=1).batches()

  np.testing.assert_array_equal(batch.encoder_input_tokens[2], [1, 1, 1, 1])
  np.testing.assert_array_equal(batch.decoder_target_tokens[2], [1, 1, 1])
  np.testing.assert_array_equal(batch.decoder_loss_weights[2], [0.0] * 3)


def test_rows_with_the_pad_id_before_other_ids_are_refused(other_ids):
  said = "A row of task 'other_ids' has the id 0 before other ids"

  with pytest.raises(ValueError, match=said):
    next(iterators.TrainIterator(other_ids, seed=0, pad_id=0))
  with pytest.raises(ValueError, match=said):
    iterators.EvalDataset(other_ids, pad_id=0)
  with pytest.raises(ValueError, match=said):
    next(iterators.InferenceDataset(other_ids, 0).batches())


# --- What a run depends on ----------------------------------------------------


def test_the_files_of_a_task_are_those_that_its_arguments_name(tmp_path):
  paths = {split: f'{tmp_path}/{split}.jsonl' for split in ('train', 'test')}
  for split in paths:
    (tmp_path / f'{split}.jsonl').touch()
  config = datasets.DatasetConfig(
    'json_lines',
    LENGTHS,
    batch_size=1,
    vocabulary=seqio.ByteVocabulary(),
    task_arguments={'files': paths},
  )

  assert datasets.files_of(config) == sorted(paths.values())


def test_the_files_of_a_task_are_those_of_its_source(tmp_path):
  (tmp_path / 'a.txt').touch()
  feature = seqio.Feature(seqio.ByteVocabulary())
  seqio.TaskRegistry.add(
    'of_text_files',
    source=seqio.TextLineDataSource({'train': f'{tmp_path}/*.txt'}),
    preprocessors=[],
    output_features={'inputs': feature, 'targets': feature},
  )
  config = datasets.DatasetConfig('of_text_files', LENGTHS, batch_size=1)

  assert datasets.files_of(config) == [f'{tmp_path}/a.txt']


def test_a_task_without_files_has_none(letters):
  config = datasets.DatasetConfig(letters, LENGTHS, batch_size=1)

  assert datasets.files_of(config) == []


# --- The teacher of an example ------------------------------------------------

TEACHERS = {'short': 'a path', 'long': 'a path'}


def with_a_teacher(ds):
  def add(features):
    is_long = tf.strings.length(features['inputs']) > 3
    return {**features, 'teacher': tf.where(is_long, 'long', 'short')}

  return ds.map(add)


@pytest.fixture(scope='module')
def routed_config():
  name = conftest.register(
    'letters_of_two_teachers',
    conftest.letter_words,
    preprocessors=[
      with_a_teacher,
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
  )
  return datasets.DatasetConfig(name, LENGTHS, batch_size=8, teachers=TEACHERS)


def numbers_of(texts):
  """The places of their teachers among the sorted names, long and short."""
  return [0 if len(text) > 3 else 1 for text in texts]


def test_a_row_has_the_number_of_the_teacher_that_its_example_names(
  routed_config,
):
  datasets.check_teachers(routed_config)

  batch = next(iterators.TrainIterator(routed_config, seed=0))

  assert {*batch.teacher_ids.tolist()} == {0, 1}
  assert batch.teacher_ids.tolist() == numbers_of(words([batch]))


def test_a_row_that_fills_a_batch_up_has_no_teacher(routed_config):
  config = dataclasses.replace(routed_config, split='validation', batch_size=4)
  dataset = iterators.EvalDataset(config)

  *_, (_, last) = dataset.batches()

  rows = len(dataset) % 4
  assert last.teacher_ids[:rows].tolist() == numbers_of(words([last])[:rows])
  assert last.teacher_ids[rows:].tolist() == [-1] * (4 - rows)


def test_a_mixture_has_the_teachers_of_its_examples(routed_config):
  name = 'mixture_of_two_teachers'
  task = routed_config.mixture_or_task_name
  seqio.MixtureRegistry.add(name, [(task, 1.0)])
  config = dataclasses.replace(routed_config, mixture_or_task_name=name)
  datasets.check_teachers(config)

  batch = next(iterators.TrainIterator(config, seed=0))

  assert batch.teacher_ids.tolist() == numbers_of(words([batch]))


def test_an_unknown_teacher_is_named_with_the_known_ones(routed_config):
  config = dataclasses.replace(routed_config, teachers=('long', 'longer'))

  with pytest.raises(ValueError, match="'short', but the.* are long, longer:"):
    datasets.check_teachers(config)
  with pytest.raises(ValueError, match='names a teacher that is not in'):
    next(iterators.TrainIterator(config, seed=0))


def test_examples_without_a_teacher_are_refused(train_config):
  config = dataclasses.replace(train_config, teachers=TEACHERS)

  with pytest.raises(ValueError, match="no text 'teacher'.* inputs, targets"):
    datasets.check_teachers(config)


@pytest.mark.parametrize(
  'settings', [{'teachers': 'x'}, {'teachers': ['a'], 'predictions': 'x'}]
)
def test_settings_of_teachers_without_a_meaning_are_refused(
  train_config, settings
):
  with pytest.raises(ValueError, match='DatasetConfig.teachers'):
    dataclasses.replace(train_config, **settings)
