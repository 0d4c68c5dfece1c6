# SPDX-License-Identifier: Apache-2.0
import dataclasses
import hashlib
import io
import itertools
import time

import numpy as np
import pytest
import sentencepiece
import seqio

from gkd_jax import data
from gkd_jax.tasks import cmudict_g2p
from tests import conftest

LENGTHS = conftest.LENGTHS


@pytest.fixture(scope='module')
def train_config(letters):
  return data.DatasetConfig(letters, LENGTHS, batch_size=8)


@pytest.fixture(scope='module')
def batch(train_config):
  return next(data.TrainIterator(train_config, seed=0))


@pytest.fixture(scope='module')
def validation(letters):
  """10 examples in batches of 4."""
  config = data.DatasetConfig(
    letters, LENGTHS, batch_size=4, split='validation', shuffle=False
  )
  return data.EvalDataset(config)


def take(iterator, num_batches):
  return list(itertools.islice(iterator, num_batches))


def words(batches):
  """What the inputs of some batches say, row by row."""
  vocabulary = seqio.ByteVocabulary()
  return [
    vocabulary.decode([int(t) for t in row])
    for batch in batches
    for row in batch.encoder_input_tokens
  ]


def assert_equal(batches, others):
  for batch, other in zip(batches, others, strict=True):
    for x, y in zip(batch, other, strict=True):
      np.testing.assert_array_equal(x, y)


# --- Training batches -------------------------------------------------------


def test_a_batch_has_the_shapes_and_dtypes_it_is_documented_with(batch):
  shapes = {
    name: (x.shape, x.dtype.name) for name, x in batch._asdict().items()
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

  batch = next(data.TrainIterator(short, seed=0))

  assert (batch.decoder_target_tokens == 1).sum(axis=1).tolist() == [1] * 8
  assert batch.decoder_loss_weights.all(axis=1).any()  # some were cut


def test_the_seed_determines_the_order(train_config):
  first, again, other = (
    words(take(data.TrainIterator(train_config, seed=seed), 8))
    for seed in (3, 3, 4)
  )

  assert first == again
  assert first != other


def test_without_shuffling_the_order_is_the_sources(train_config):
  config = dataclasses.replace(train_config, shuffle=False)

  rows = words(take(data.TrainIterator(config, seed=0), 6))

  assert rows == conftest.letter_words('train')


def test_shards_are_disjoint_and_complete(train_config):
  shards = [
    data.TrainIterator(train_config, seed=0, shard=i, num_shards=2)
    for i in range(2)
  ]

  # seqio repeats the data before it shuffles: no epoch is exact, so take enough
  # to have seen all 24 examples of each.
  first, second = (words(take(shard, 100)) for shard in shards)

  assert not set(first) & set(second)
  assert {*first, *second} == set(conftest.letter_words('train'))


def test_a_shard_has_its_share_of_the_rows_of_the_global_batch(train_config):
  shard = data.TrainIterator(train_config, seed=0, shard=3, num_shards=4)

  assert next(shard).encoder_input_tokens.shape == (2, 6)


# --- A share of the training data ------------------------------------------


def test_training_on_a_number_of_examples_takes_the_first(train_config):
  few = dataclasses.replace(train_config, num_examples=5)

  seen = set(words(take(data.TrainIterator(few, seed=0), 20)))

  assert seen == set(conftest.letter_words('train')[:5])


def test_the_seed_does_not_choose_the_examples(train_config):
  few = dataclasses.replace(train_config, num_examples=5)

  one, other = (
    words(take(data.TrainIterator(few, seed=seed), 10)) for seed in (1, 2)
  )

  assert one != other
  assert set(one) == set(other)


def test_more_examples_than_there_are_are_all(train_config):
  many = dataclasses.replace(train_config, num_examples=1000)

  seen = set(words(take(data.TrainIterator(many, seed=0), 60)))

  assert seen == set(conftest.letter_words('train'))


def test_shards_share_the_examples_out(train_config):
  few = dataclasses.replace(train_config, num_examples=6)
  first, second = (
    set(words(take(data.TrainIterator(few, seed=0, shard=i, num_shards=2), 30)))
    for i in range(2)
  )

  assert not first & second
  assert first | second == set(conftest.letter_words('train')[:6])


def test_a_share_of_a_mixture_is_refused(letters):
  seqio.MixtureRegistry.add('only_letters', [letters], default_rate=1.0)
  config = data.DatasetConfig('only_letters', LENGTHS, 8, num_examples=5)

  with pytest.raises(ValueError, match='TRAIN_NUM_EXAMPLES is 5.*mixed'):
    data.TrainIterator(config, seed=0)


def test_a_share_of_a_cache_is_refused(train_config):
  config = dataclasses.replace(train_config, num_examples=5, use_cached=True)

  with pytest.raises(ValueError, match='TRAIN_NUM_EXAMPLES is 5.*cache'):
    data.TrainIterator(config, seed=0)


@pytest.mark.parametrize('num_examples', [0, -1, 2.5, '5'])
def test_a_wrong_number_of_examples_is_refused(num_examples):
  with pytest.raises(ValueError, match='train: the number of examples'):
    data.DatasetConfig('letters', LENGTHS, 8, num_examples=num_examples)


# --- Saving the position ----------------------------------------------------


@pytest.mark.parametrize('num_before', [0, 2, 7])  # 6 are an epoch
def test_a_restored_iterator_goes_on_as_the_saved_one(
  train_config, tmp_path, num_before
):
  saved = data.TrainIterator(train_config, seed=0)
  take(saved, num_before)
  time.sleep(0.2)  # let it read ahead: that must neither be lost nor repeated
  saved.save(tmp_path)

  restored = data.TrainIterator(train_config, seed=0)
  take(restored, 1)
  restored.restore(tmp_path)

  assert_equal(take(restored, 8), take(saved, 8))


def test_a_position_of_another_number_of_hosts_is_refused(
  train_config, tmp_path
):
  data.TrainIterator(train_config, seed=0).save(tmp_path)
  one_of_two = data.TrainIterator(train_config, seed=0, shard=0, num_shards=2)

  with pytest.raises(ValueError, match='another number of hosts'):
    one_of_two.restore(tmp_path)


# --- Training on what a model wrote -------------------------------------------


def random_rows(num_rows, num_ids, seed=0):
  """Different rows of any ids, most of which no text has."""
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
  """40 rows of bytes that are no UTF-8, for the most part."""
  path = tmp_path_factory.mktemp('written') / 'predictions_train.jsonl'
  return conftest.write_predictions(path, random_rows(40, 259), train_config)


def pairs(batches):
  """(ids of inputs, ids of targets) of each row, without padding."""
  return [
    (x[x > 0].tolist(), y[w > 0].tolist())
    for batch in batches
    for x, y, w in zip(*batch, strict=True)
  ]


def test_a_student_is_trained_on_the_very_ids_the_teacher_wrote(written):
  ordered = dataclasses.replace(written, shuffle=False)

  rows = pairs(take(data.TrainIterator(ordered, seed=0), 5))

  assert rows == random_rows(40, 259)
  text = seqio.ByteVocabulary()  # the texts would not have done
  assert any(text.encode(text.decode(y))[: len(y)] != y for _, y in rows)


def test_with_any_vocabulary(sentencepiece_models, letters, tmp_path):
  vocabulary = data.sentencepiece_vocabulary(sentencepiece_models[0])
  config = data.DatasetConfig(
    letters, LENGTHS, batch_size=4, shuffle=False, vocabulary=vocabulary
  )
  # Pieces in an order in which no encoder cuts, spaces, unknown pieces.
  rows = random_rows(4, vocabulary.vocab_size, seed=1)
  written = conftest.write_predictions(tmp_path / 'x.jsonl', rows, config)

  assert pairs([next(data.TrainIterator(written, seed=0))]) == rows


def test_each_of_several_predictions_is_an_example(train_config, tmp_path):
  rows = [([5, 1], [6 + i, 1]) for i in range(8)]
  written = conftest.write_predictions(tmp_path / 'x.jsonl', rows, train_config)
  ordered = dataclasses.replace(written, shuffle=False)

  assert pairs(take(data.TrainIterator(ordered, seed=0), 1)) == rows


def test_predictions_are_shuffled_by_the_seed(written):
  first, again, other = (
    pairs(take(data.TrainIterator(written, seed=seed), 5)) for seed in (1, 1, 2)
  )

  assert first == again
  assert first != other
  assert first != random_rows(40, 259)


def test_predictions_for_one_input_come_far_apart(train_config, tmp_path):
  rows = [([5, 1], [6, 1])] * 2000 + [([7, 1], [8, 1])] * 2000
  written = conftest.write_predictions(tmp_path / 'x.jsonl', rows, train_config)

  batch = pairs(take(data.TrainIterator(written, seed=0), 4))

  # seqio's buffer of 1000 alone would give the first 1032 of the file.
  assert {tuple(x) for x, _ in batch} == {(5, 1), (7, 1)}


def test_hosts_share_predictions(written):
  shards = [
    data.TrainIterator(written, seed=0, shard=i, num_shards=2) for i in range(2)
  ]

  first, second = (
    {str(pair) for pair in pairs(take(shard, 60))} for shard in shards
  )

  assert not first & second
  assert first | second == {str(pair) for pair in random_rows(40, 259)}


def test_the_position_in_predictions_is_saved(written, tmp_path):
  saved = data.TrainIterator(written, seed=0)
  take(saved, 3)
  time.sleep(0.2)
  saved.save(tmp_path)

  restored = data.TrainIterator(written, seed=0)
  restored.restore(tmp_path)

  assert_equal(take(restored, 8), take(saved, 8))


def test_the_first_predictions_alone_can_be_taken(written):
  few = dataclasses.replace(written, num_examples=8)

  rows = pairs(take(data.TrainIterator(few, seed=0), 12))

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
    assert pairs([next(data.TrainIterator(ordered, seed=0))]) == rows


def test_the_task_keeps_its_other_splits(written):
  validation = dataclasses.replace(
    written, split='validation', predictions=None, shuffle=False
  )

  assert len(data.EvalDataset(validation)) == 10


@pytest.mark.parametrize(
  ['changes', 'said'],
  [
    (
      {'vocabulary': seqio.ByteVocabulary(100)},
      "vocabulary 'ByteVocabulary 25",
    ),
    ({'mixture_or_task_name': 'cmudict_g2p'}, "for task 'letters'; this run"),
    ({'predictions': 'nowhere/*.jsonl'}, 'there is no file nowhere'),
  ],
)
def test_predictions_of_no_use_are_refused_before_training(
  written, changes, said
):
  with pytest.raises(ValueError, match=f'TRAIN_ON_PREDICTIONS: .*{said}'):
    data.get_vocabulary(dataclasses.replace(written, **changes))


# --- Inputs for a model that writes -------------------------------------------


def test_inputs_are_read_in_batches_of_one_shape(letters):
  config = data.DatasetConfig(letters, LENGTHS, batch_size=4, split='test')

  rows, inputs, examples = zip(
    *data.InferenceDataset(config).batches(), strict=True
  )

  assert [x.tolist() for x in rows] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert [x.shape for x in inputs] == [(4, 6), (4, 6)]
  assert not inputs[1][3].any()  # 7 examples: the last row is filled up
  told = [example for part in examples for example in part]
  assert [x['inputs'] for x in told] == conftest.letter_words('test')
  for example, row in zip(told, np.concatenate(inputs), strict=False):
    assert example['input_ids'] == row[row > 0].tolist()


def test_reading_can_begin_anywhere(letters):
  config = data.DatasetConfig(letters, LENGTHS, batch_size=4, split='train')
  dataset = data.InferenceDataset(config)

  late = list(dataset.batches(8))

  for x, y in zip(late, list(dataset.batches())[2:], strict=True):
    np.testing.assert_array_equal(x[0], y[0])
    np.testing.assert_array_equal(x[1], y[1])
    assert x[2] == y[2]


def test_rows_are_those_that_are_evaluated(validation, letters):
  config = data.DatasetConfig(letters, LENGTHS, 4, split='validation')

  for (rows, batch), (same_rows, inputs, _) in zip(
    validation.batches(), data.InferenceDataset(config).batches(), strict=True
  ):
    np.testing.assert_array_equal(rows, same_rows)
    np.testing.assert_array_equal(batch.encoder_input_tokens, inputs)


@pytest.mark.parametrize('num_examples', [None, 96])
def test_the_number_of_inputs_is_known_where_the_task_tells(num_examples):
  config = data.DatasetConfig(
    'cmudict_g2p', LENGTHS, 4, split='validation', num_examples=num_examples
  )

  assert data.InferenceDataset(config).size() == (num_examples or 3444)


def test_the_number_of_inputs_is_not_made_up(letters):
  config = data.DatasetConfig(letters, LENGTHS, 4, split='validation')

  assert data.InferenceDataset(config).size() is None


# --- Evaluation -------------------------------------------------------------


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
  config = data.DatasetConfig(
    letters, LENGTHS, batch_size=4, split='validation', num_examples=3
  )

  examples = data.EvalDataset(config).examples()

  assert [e['inputs'] for e in examples] == conftest.letter_words('validation')[
    :3
  ]


def test_any_of_several_references_is_right():
  config = data.DatasetConfig(
    'cmudict_g2p',
    {'inputs': 16, 'targets': 16},
    batch_size=32,
    split='validation',
    num_examples=96,
  )
  dataset = data.EvalDataset(config)
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


# --- Texts of tokens --------------------------------------------------------


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
  """A split whose vocabulary is of SentencePiece, with bytes for the rest."""
  path = tmp_path_factory.mktemp('pieces') / 'pieces.model'
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the cat and the dog and the end'] * 99),
    model_writer=model,
    model_type='bpe',
    byte_fallback=True,
    vocab_size=300,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  path.write_bytes(model.getvalue())
  return data.EvalDataset(
    data.DatasetConfig(
      letters,
      LENGTHS,
      batch_size=4,
      split='validation',
      vocabulary=data.sentencepiece_vocabulary(path, extra_ids=0),
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


# --- What is refused --------------------------------------------------------


def test_an_unregistered_task_is_refused_with_the_nearest_name():
  config = data.DatasetConfig('cmudict_gp2', LENGTHS, batch_size=8)

  with pytest.raises(ValueError, match="Did you mean 'cmudict_g2p'") as error:
    data.TrainIterator(config, seed=0)

  # It says which there are, even those not imported yet, and what to do.
  assert 'arithmetic_cot' in str(error.value)
  assert 'MIXTURE_OR_TASK_MODULE' in str(error.value)


def test_a_module_that_is_not_there_is_refused_by_name(letters):
  config = data.DatasetConfig(
    letters, LENGTHS, batch_size=8, mixture_or_task_module='my_tasks.riddles'
  )

  with pytest.raises(ValueError, match="MIXTURE_OR_TASK_MODULE.*'my_tasks"):
    data.get_task(config)


def test_an_error_inside_the_module_is_not_hidden(
  letters, tmp_path, monkeypatch
):
  (tmp_path / 'tasks_with_a_bug.py').write_text('import no_such_package')
  monkeypatch.syspath_prepend(tmp_path)
  config = data.DatasetConfig(
    letters, LENGTHS, batch_size=8, mixture_or_task_module='tasks_with_a_bug'
  )

  with pytest.raises(ModuleNotFoundError, match='no_such_package'):
    data.get_task(config)


def test_the_module_of_ones_own_task_is_imported(tmp_path, monkeypatch):
  (tmp_path / 'my_own_tasks.py').write_text(
    'from tests import conftest\n'
    "conftest.register('my_own', conftest.letter_words)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  config = data.DatasetConfig(
    'my_own', LENGTHS, batch_size=8, mixture_or_task_module='my_own_tasks'
  )

  batch = next(data.TrainIterator(config, seed=0))

  assert set(words([batch])) <= set(conftest.letter_words('train'))


def test_a_split_that_is_not_there_is_refused_with_those_that_are(letters):
  config = data.DatasetConfig(letters, LENGTHS, batch_size=8, split='valid')

  with pytest.raises(
    ValueError, match="no split 'valid'.*empty, test, train, validation"
  ):
    data.EvalDataset(config)


def test_an_empty_split_is_refused(letters):
  config = data.DatasetConfig(letters, LENGTHS, batch_size=8, split='empty')

  with pytest.raises(ValueError, match="'empty' of task 'letters' is empty"):
    data.check_not_empty(config)
  with pytest.raises(ValueError, match="'empty' of task 'letters' is empty"):
    data.EvalDataset(config)


def test_a_split_with_examples_is_not_called_empty(train_config):
  data.check_not_empty(train_config)


def test_a_task_without_metrics_cannot_be_evaluated():
  name = conftest.register('no_metrics', conftest.letter_words, metric_fns=[])
  config = data.DatasetConfig(name, LENGTHS, batch_size=8, split='validation')

  with pytest.raises(ValueError, match="'no_metrics' has no metric_fns"):
    data.EvalDataset(config)


def test_a_mixture_of_tasks_can_be_trained_on_but_not_evaluated(letters):
  other = conftest.register('more_letters', conftest.letter_words)
  seqio.MixtureRegistry.add('both', [letters, other], default_rate=1.0)
  config = data.DatasetConfig('both', LENGTHS, batch_size=8, split='validation')

  next(data.TrainIterator(config, seed=0))
  with pytest.raises(ValueError, match='mixture of several tasks'):
    data.EvalDataset(config)


def test_different_vocabularies_for_inputs_and_targets_are_refused():
  features = {
    'inputs': seqio.Feature(seqio.ByteVocabulary(extra_ids=7)),
    'targets': seqio.Feature(seqio.ByteVocabulary()),
  }
  name = conftest.register(
    'two_vocabularies', conftest.letter_words, output_features=features
  )
  config = data.DatasetConfig(name, LENGTHS, batch_size=8)

  with pytest.raises(ValueError, match='different vocabularies'):
    data.get_vocabulary(config)


def test_a_vocabulary_whose_eos_is_not_t5s_is_refused():
  feature = seqio.Feature(seqio.PassThroughVocabulary(size=9, eos_id=3))
  name = conftest.register(
    'odd_eos',
    conftest.letter_words,
    output_features={'inputs': feature, 'targets': feature},
  )
  config = data.DatasetConfig(name, LENGTHS, batch_size=8)

  with pytest.raises(ValueError, match=r'ids \(0, 3\); T5 needs \(0, 1\)'):
    data.get_vocabulary(config)


def test_a_task_without_targets_is_refused():
  feature = seqio.Feature(seqio.ByteVocabulary())
  name = conftest.register(
    'no_targets', conftest.letter_words, output_features={'inputs': feature}
  )
  config = data.DatasetConfig(name, LENGTHS, batch_size=8)

  with pytest.raises(ValueError, match=r"no output feature \['targets'\]"):
    data.get_task(config)


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
    data.DatasetConfig('letters', lengths, batch_size=8)


@pytest.mark.parametrize('batch_size', [0, -8, '64', 6.4])
def test_a_batch_size_that_is_no_positive_whole_number_is_refused(batch_size):
  with pytest.raises(ValueError, match='BATCH_SIZE must be'):
    data.DatasetConfig('letters', LENGTHS, batch_size=batch_size)


# --- Descriptions of vocabularies -------------------------------------------


@pytest.fixture(scope='module')
def sentencepiece_models(tmp_path_factory):
  """Three vocabularies of one size; the first two are equal."""
  folder = tmp_path_factory.mktemp('vocabularies')
  paths = []
  for i, text in enumerate(('ab', 'ab', 'cd')):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([text] * 9),
      model_writer=model,
      model_type='char',
      vocab_size=6,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      minloglevel=2,
    )
    paths.append(folder / f'{i}.model')
    paths[-1].write_bytes(model.getvalue())
  return paths


def test_equal_vocabularies_have_equal_descriptions(sentencepiece_models):
  one, same, _ = (
    seqio.SentencePieceVocabulary(str(path)) for path in sentencepiece_models
  )

  assert data.describe_vocabulary(one) == data.describe_vocabulary(same)


def test_different_vocabularies_of_one_size_have_different_descriptions(
  sentencepiece_models,
):
  one, _, other = (
    seqio.SentencePieceVocabulary(str(path)) for path in sentencepiece_models
  )

  assert one.vocab_size == other.vocab_size
  assert data.describe_vocabulary(one) != data.describe_vocabulary(other)


def test_vocabularies_of_different_sizes_have_different_descriptions():
  bytes_alone = data.describe_vocabulary(seqio.ByteVocabulary())

  assert bytes_alone == 'ByteVocabulary 259 ids'
  assert bytes_alone != data.describe_vocabulary(
    seqio.ByteVocabulary(extra_ids=100)
  )


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
    return data.DatasetConfig(
      'repeated',
      LENGTHS,
      batch_size=1,
      mixture_or_task_module=module_with_make_task,
      task_arguments=arguments,
    )

  return config


def first_word(config):
  return words(take(data.TrainIterator(config, seed=0), 1))[0]


def test_a_task_is_made_with_its_arguments(repeated):
  assert first_word(repeated({'letter': 'a'})) == 'aa'
  assert first_word(repeated({'letter': 'a', 'times': 3})) == 'aaa'
  assert first_word(repeated({'letter': 'b'})) == 'bb'
  assert first_word(repeated({'letter': 'a'})) == 'aa'


def test_a_task_that_was_made_can_be_evaluated(repeated):
  config = dataclasses.replace(repeated({'letter': 'c'}), split='test')

  dataset = data.EvalDataset(config)

  assert dataset.examples() == [{'inputs': 'cc', 'targets': 'cc'}]
  assert dataset.metric_names() == ['error']


def test_a_wrong_argument_is_refused_with_the_right_ones(repeated):
  with pytest.raises(ValueError, match="'repeated'.*'tims'.*letter, times"):
    data.get_task(repeated({'letter': 'a', 'tims': 3}))


def test_a_task_that_is_not_told_what_it_needs_is_refused(repeated):
  with pytest.raises(ValueError, match="TASK_ARGUMENTS.*argument: 'letter'"):
    data.get_task(repeated(None))


def test_what_the_task_itself_refuses_is_told(repeated):
  with pytest.raises(ValueError, match='^TIMES must be 1 or more.$'):
    data.get_task(repeated({'letter': 'a', 'times': 0}))


def test_arguments_for_a_task_that_takes_none_are_refused():
  config = data.DatasetConfig(
    'cmudict_g2p', LENGTHS, batch_size=4, task_arguments={'language': 'de'}
  )

  with pytest.raises(ValueError, match="'cmudict_g2p' takes none"):
    data.get_task(config)


def test_arguments_that_are_no_mapping_are_refused():
  with pytest.raises(ValueError, match='TASK_ARGUMENTS must be'):
    data.DatasetConfig('x', LENGTHS, batch_size=4, task_arguments='folder')


# --- Another vocabulary than the task's ---------------------------------------


@pytest.fixture(scope='module')
def with_extra_ids(letters):
  return data.DatasetConfig(
    letters,
    conftest.LENGTHS,
    batch_size=4,
    split='validation',
    vocabulary=data.byte_vocabulary(extra_ids=100),
  )


def test_a_task_can_be_given_another_vocabulary(with_extra_ids):
  assert data.get_vocabulary(with_extra_ids).vocab_size == 359
  assert data.EvalDataset(with_extra_ids).vocabulary.vocab_size == 359


def test_the_task_itself_keeps_its_own(with_extra_ids, letters):
  data.get_task(with_extra_ids)

  task = seqio.get_mixture_or_task(letters)
  assert task.output_features['inputs'].vocabulary.vocab_size == 259


def test_batches_are_in_the_ids_of_the_vocabulary(
  letters, sentencepiece_models
):
  vocabulary = data.sentencepiece_vocabulary(sentencepiece_models[0])
  config = data.DatasetConfig(
    letters, conftest.LENGTHS, batch_size=4, vocabulary=vocabulary
  )

  tokens = next(data.TrainIterator(config, seed=0)).encoder_input_tokens

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
  """How often each letter is the input of a batch's row, in percent."""
  drawn = words(take(data.TrainIterator(config, seed=0), num_batches))
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
  config = data.DatasetConfig(
    name,
    LENGTHS,
    batch_size=100,
    vocabulary=data.byte_vocabulary(extra_ids=100),
  )

  assert data.get_vocabulary(config).vocab_size == 359
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
  config = data.DatasetConfig(
    'last_alone',
    LENGTHS,
    batch_size=4,
    vocabulary=data.byte_vocabulary(extra_ids=100),
  )

  assert letters_drawn(config, 2) == {'a': 0, 'b': 100, 'c': 0}


def test_a_mixture_itself_keeps_its_vocabulary(mixtures):
  config = data.DatasetConfig('a_and_b', LENGTHS, batch_size=4)
  changed = dataclasses.replace(
    config, vocabulary=data.byte_vocabulary(extra_ids=100)
  )

  data.get_task(changed)

  assert data.get_vocabulary(config).vocab_size == 259


def test_a_tasks_vocabulary_that_cannot_be_read_is_refused(tmp_path):
  path = tmp_path / 'x.model'
  feature = seqio.Feature(seqio.SentencePieceVocabulary(str(path)))
  name = conftest.register(
    'lost_vocabulary',
    conftest.letter_words,
    output_features={'inputs': feature, 'targets': feature},
  )
  config = data.DatasetConfig(name, LENGTHS, batch_size=4)

  with pytest.raises(ValueError, match="'lost_vocabulary', .*x.model, cannot"):
    data.check_not_empty(config)

  # Another one helps.
  data.check_not_empty(
    dataclasses.replace(config, vocabulary=data.byte_vocabulary())
  )


def test_t5s_vocabulary_out_of_reach_is_told_in_time(monkeypatch):
  data._check_google_storage_answers.cache_clear()
  monkeypatch.setenv('https_proxy', 'http://127.0.0.1:1')  # nobody listens
  config = data.DatasetConfig('xsum', LENGTHS, batch_size=4)

  start = time.monotonic()
  with pytest.raises(ValueError, match='gs://t5-data.*refused') as error:
    data.get_task(config)

  assert time.monotonic() - start < 12
  assert 'gin/vocabularies/sentencepiece.gin' in str(error.value)
  assert '--gin.VOCABULARY_PATH=FILE' in str(error.value)


def test_a_vocabulary_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(ValueError, match='VOCABULARY_PATH .*x.model is not ther'):
    data.sentencepiece_vocabulary(tmp_path / 'x.model')


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path):
  (tmp_path / 'x.model').write_bytes(b'hello')

  with pytest.raises(ValueError, match='x.model is no SentencePiece model'):
    data.sentencepiece_vocabulary(tmp_path / 'x.model')


def test_a_sentencepiece_model_is_described_by_its_files_digest(
  sentencepiece_models,
):
  # As other systems' folders are, which hold the file: huggingface.vocabulary.
  path = sentencepiece_models[0]
  digest = hashlib.sha256(path.read_bytes()).hexdigest()

  described = data.describe_vocabulary(data.sentencepiece_vocabulary(path))

  assert described.endswith(f'model sha256 {digest}')
