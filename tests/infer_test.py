# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import json

import pytest

from gkd_jax import data, infer, sampler
from gkd_jax.model import T5Config
from tests import conftest

WORDS = conftest.letter_words('test')


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory, compile_once):
  folder = tmp_path_factory.mktemp('model')
  conftest.save_model(folder, T5Config(264, 12, 2, 4, 10, 1, 1))
  return folder


@pytest.fixture(scope='module')
def dataset(letters):
  """7 examples in batches of 4."""
  return data.DatasetConfig(
    letters, conftest.LENGTHS, batch_size=4, split='test', shuffle=False
  )


@pytest.fixture(scope='module')
def sample(model_dir, dataset):
  """Writes samples into a folder."""
  return functools.partial(
    infer.infer, str(model_dir), dataset=dataset, decoding=sampler.ANCESTRAL
  )


def lines_of(folder):
  text = (folder / 'predictions_test.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_there_is_a_line_for_each_example_in_order(sample, tmp_path):
  sample(str(tmp_path / 'new' / 'folder'))

  lines = lines_of(tmp_path / 'new' / 'folder')
  assert [(x['inputs'], x['targets']) for x in lines] == [
    (word, word[::-1]) for word in WORDS
  ]
  assert all(isinstance(line['prediction'], str) for line in lines)


def test_the_file_beside_it_says_who_wrote_it_and_how(
  sample, model_dir, tmp_path
):
  sample(str(tmp_path))

  about = json.loads((tmp_path / 'predictions_test.json').read_text())
  assert about == {
    'checkpoint': f'{model_dir}/checkpoint_0',
    'num_examples': len(WORDS),
    'task': 'letters',
    'split': 'test',
    'decoding': 'SamplerConfig(temperature=1.0, top_k=0, top_p=1.0)',
    'seed': 0,
  }
  assert len(list(tmp_path.iterdir())) == 2  # and nothing half-written


def test_the_seed_determines_samples(sample, tmp_path):
  for folder, seed in (('a', 1), ('b', 1), ('c', 2)):
    sample(str(tmp_path / folder), seed=seed)

  assert lines_of(tmp_path / 'a') == lines_of(tmp_path / 'b')
  assert lines_of(tmp_path / 'a') != lines_of(tmp_path / 'c')


def test_a_checkpoint_of_another_vocabulary_is_refused(
  dataset, tmp_path, compile_once
):
  config = T5Config(264, 12, 2, 4, 10, 1, 1)
  conftest.save_model(tmp_path / 'model', config, 'SentencePiece 264 ids')

  with pytest.raises(ValueError, match='vocabulary: SentencePiece 264 ids in'):
    infer.infer(str(tmp_path / 'model'), str(tmp_path / 'out'), dataset)

  assert not (tmp_path / 'out').exists()


def test_an_empty_split_is_refused(model_dir, dataset, tmp_path):
  empty = dataclasses.replace(dataset, split='empty')

  with pytest.raises(ValueError, match="'empty' of task 'letters' is empty"):
    infer.infer(str(model_dir), str(tmp_path / 'out'), empty)


def test_predictions_are_not_overwritten(sample, tmp_path):
  sample(str(tmp_path))
  before = (tmp_path / 'predictions_test.jsonl').read_bytes()

  with pytest.raises(ValueError, match='is there already, and would be lost'):
    sample(str(tmp_path), seed=1)
  assert (tmp_path / 'predictions_test.jsonl').read_bytes() == before
