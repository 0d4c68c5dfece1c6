# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest
import seqio

from gkd_jax.data import datasets, iterators
from gkd_jax.data.tasks import json_lines

pytestmark = pytest.mark.slow  # reads data through seqio

LENGTHS = {'inputs': 16, 'targets': 8}


@pytest.fixture
def file(tmp_path):
  """Writes {inputs, targets} to a file, and returns its path."""

  def file(name, *examples):
    path = tmp_path / f'{name}.jsonl'
    path.write_text(
      '\n'.join(
        json.dumps({'inputs': x, 'targets': y, 'id': i})
        for i, (x, y) in enumerate(examples)
      )
    )
    return str(path)

  return file


def config(files, split):
  return datasets.DatasetConfig(
    'json_lines',
    LENGTHS,
    batch_size=2,
    split=split,
    shuffle=False,
    vocabulary=seqio.ByteVocabulary(),
    task_arguments={'files': files},
  )


def test_each_split_is_read_from_its_file(file):
  files = {
    'train': file('one', ('ab', 'cd'), ('e', 'f')),
    'test': file('two', ('gh', 'i')),
  }

  batch = next(iterators.TrainIterator(config(files, 'train'), seed=0))
  test = iterators.EvalDataset(config(files, 'test'))

  ids = [[c + 3 for c in text.encode()] + [1] for text in ('ab', 'e')]
  assert batch.encoder_input_tokens.tolist() == [
    row + [0] * (16 - len(row)) for row in ids
  ]
  assert [example['inputs'] for example in test.examples()] == ['gh']
  with pytest.raises(ValueError, match="no split 'validation'.*EVAL = None"):
    datasets.get_vocabulary(config(files, 'validation'))


def test_outputs_are_scored_by_exact_match_and_rouge(file):
  files = {'test': file('test', ('x', 'one two'), ('y', 'three'))}
  dataset = iterators.EvalDataset(config(files, 'test'))

  tokens = dataset.predict(lambda _, batch: batch.decoder_target_tokens)

  values = dataset.metrics(tokens)
  assert values['exact_match'] == values['rougeL'] == 100


@pytest.mark.parametrize(
  'files, message',
  [
    ({}, 'must be {.train.: file'),
    ('train.jsonl', "got 'train.jsonl'"),
    ({'dev': 'x'}, "got {'dev': 'x'}"),
    ({'train': 'nowhere'}, 'JSON_LINES_FILES: nowhere is not there'),
    ({'train': ['a', 'b']}, r"must be a text, .* not \['a', 'b'\]"),
    ({'train': 3}, 'must be a text, .* not 3'),
  ],
)
def test_files_that_cannot_be_read_are_refused(files, message):
  with pytest.raises(ValueError, match=message):
    json_lines.make_task('mine', files)


@pytest.mark.parametrize('num_examples', [None, 2])
def test_fewer_examples_than_shards_are_refused(file, num_examples):
  rows = [('a', 'x'), ('b', 'y'), ('c', 'z')]
  dataset = dataclasses.replace(
    config({'train': file('train', *rows)}, 'train'), num_examples=num_examples
  )
  enough = num_examples or 3

  datasets.check_not_empty(dataset, num_shards=enough)
  with pytest.raises(
    ValueError, match=f'has {enough} examples, but .* {enough + 1} shards'
  ):
    datasets.check_not_empty(dataset, num_shards=enough + 1)


def test_a_line_that_lacks_a_field_is_named(tmp_path):
  path = tmp_path / 'train.jsonl'
  path.write_text('{"inputs": "a", "targets": "b"}\n{"input": "c"}\n')

  with pytest.raises(ValueError, match=r"\['train'\]: line 2 .* no .inputs"):
    next(iterators.TrainIterator(config({'train': str(path)}, 'train'), seed=0))


# --- Weights of rows ----------------------------------------------------------


def weighted(tmp_path, weights, output='targets', **settings):
  """A dataset of an example for each weight; None: the line has none."""
  path = tmp_path / 'weighted.jsonl'
  lines = [
    {'inputs': f'in {i}', output: f'out {i}'}
    | ({} if weight is None else {'weight': weight})
    for i, weight in enumerate(weights)
  ]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return dataclasses.replace(
    config({'train': str(path)}, 'train'), row_weights=True, **settings
  )


def test_a_row_has_the_weight_of_its_line(tmp_path):
  dataset = weighted(tmp_path, [0.5, -2])
  datasets.check_row_weights(dataset)

  batch = next(iterators.TrainIterator(dataset, seed=0))
  without = next(
    iterators.TrainIterator(
      dataclasses.replace(dataset, row_weights=False), seed=0
    )
  )

  assert batch.row_weights.tolist() == [0.5, -2.0]
  assert batch.row_weights.dtype.name == 'float32'
  assert without.row_weights is None
  for name in ('encoder_input_tokens', 'decoder_target_tokens'):
    assert (getattr(batch, name) == getattr(without, name)).all()


def test_a_row_has_the_weight_of_its_prediction(tmp_path):
  dataset = weighted(tmp_path, [0.5, -2], 'prediction')
  files = dataset.task_arguments['files']
  (tmp_path / 'other.jsonl').write_text('{"inputs": "a", "targets": "b"}')
  dataset = dataclasses.replace(
    dataset,
    predictions=files['train'],
    task_arguments={'files': {'train': str(tmp_path / 'other.jsonl')}},
  )
  datasets.check_row_weights(dataset)

  batch = next(iterators.TrainIterator(dataset, seed=0))

  assert batch.row_weights.tolist() == [0.5, -2.0]


@pytest.mark.parametrize('value', [None, float('nan'), 'high', True])
def test_a_weight_that_is_no_number_is_refused(tmp_path, value):
  dataset = weighted(tmp_path, [0.5, value])

  with pytest.raises(ValueError, match='"weight" of example 2 .* is missing'):
    datasets.check_row_weights(dataset)
  with pytest.raises(ValueError, match='"weight" of an example of task'):
    next(iterators.TrainIterator(dataset, seed=0))


def test_examples_without_weights_are_refused(tmp_path):
  dataset = weighted(tmp_path, [None, None])

  with pytest.raises(ValueError, match="have no number 'weight'. They have"):
    datasets.check_row_weights(dataset)
