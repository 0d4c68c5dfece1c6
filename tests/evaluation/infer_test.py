# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import json
import re
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest

from gkd_jax.batch import mask_unused_ids
from gkd_jax.checkpoints import pretrained
from gkd_jax.data import datasets, iterators, vocabularies
from gkd_jax.decoding import beam_search, sampler
from gkd_jax.evaluation import infer, programs
from gkd_jax.models.t5 import T5Config
from gkd_jax.parallel import partitioning
from tests import conftest, tiny

pytestmark = pytest.mark.slow  # compiles models

WORDS = conftest.letter_words('test')
FILE = 'predictions_test.jsonl'


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('model')
  # With this seed one to three hypotheses of a beam of three end in time.
  conftest.save_model(folder, T5Config(264, 12, 2, 4, 10, 1, 1), seed=28)
  return folder


@pytest.fixture(scope='module')
def dataset(letters):
  """7 examples in batches of 4."""
  return datasets.DatasetConfig(
    letters, conftest.LENGTHS, batch_size=4, split='test', shuffle=False
  )


@pytest.fixture(scope='module')
def sample(model_dir, dataset):
  """Writes samples into a folder."""
  return functools.partial(
    infer.infer, str(model_dir), dataset=dataset, decoding=sampler.ANCESTRAL
  )


class Whole(NamedTuple):
  lines: bytes
  about: str


@pytest.fixture(scope='module')
def whole(sample, tmp_path_factory):
  """The outputs of an uninterrupted run, 2 samples per input."""
  folder = tmp_path_factory.mktemp('whole')
  sample(str(folder), num_samples=2)
  return Whole(
    (folder / FILE).read_bytes(),
    (folder / 'predictions_test.json').read_text(),
  )


def lines_of(folder):
  text = (folder / FILE).read_text()
  return [json.loads(line) for line in text.splitlines()]


def texts_of(folder):
  return [line['prediction'] for line in lines_of(folder)]


def test_there_is_a_line_for_each_example_in_order(sample, tmp_path):
  sample(str(tmp_path / 'new' / 'folder'))

  lines = lines_of(tmp_path / 'new' / 'folder')
  assert [(x['example'], x['inputs'], x['targets']) for x in lines] == [
    (i, word, word[::-1]) for i, word in enumerate(WORDS)
  ]
  assert all(isinstance(line['prediction'], str) for line in lines)


def test_a_line_has_the_ids_that_were_read_and_written(sample, tmp_path):
  sample(str(tmp_path), num_samples=5)

  vocabulary = vocabularies.byte()
  ended = 0
  for line in lines_of(tmp_path):
    assert line['input_ids'] == [*vocabulary.encode(line['inputs']), 1]
    ids = line['prediction_ids']
    assert 0 not in ids and 1 not in ids[:-1]
    assert ids[-1] == 1 or len(ids) == conftest.LENGTHS['targets']
    assert line['prediction'] == vocabulary.decode(ids)
    ended += ids[-1] == 1
  assert 0 < ended < 5 * len(WORDS)  # both cases were there


def test_inputs_that_were_cut_keep_their_text_and_lose_ids(
  sample, dataset, tmp_path
):
  short = dataclasses.replace(
    dataset, task_feature_lengths={'inputs': 3, 'targets': 7}
  )
  sample(str(tmp_path), dataset=short)

  for word, line in zip(WORDS, lines_of(tmp_path), strict=True):
    assert line['inputs'] == word
    assert line['input_ids'] == [*vocabularies.byte().encode(word)[:2], 1]


def test_the_file_beside_it_says_who_wrote_it_and_how(
  sample, model_dir, tmp_path
):
  sample(str(tmp_path))

  about = json.loads((tmp_path / 'predictions_test.json').read_text())
  versions, pins = about.pop('versions'), about.pop('pins')
  assert pins['CHECKPOINT_PATH']['step'] == 'checkpoint_0'
  assert versions['devices'] == '1 x cpu' and versions['jax'] == jax.__version__
  assert about == {
    'checkpoint': f'{model_dir}/checkpoint_0',
    'step': 0,
    'num_examples': len(WORDS),
    'num_predictions': len(WORDS),
    'task': 'letters',
    'task_arguments': None,
    'split': 'test',
    'max_examples': None,
    'vocabulary': 'ByteVocabulary 259 ids',
    'task_feature_lengths': conftest.LENGTHS,
    'decoding': repr(sampler.ANCESTRAL),
    'num_samples': 1,
    'seed': 0,
    'batch_size': 4,
  }
  assert len(list(tmp_path.iterdir())) == 2  # and nothing half-written


def test_the_seed_determines_samples(sample, tmp_path):
  for folder, seed in (('a', 1), ('b', 1), ('c', 2)):
    sample(str(tmp_path / folder), seed=seed)

  assert lines_of(tmp_path / 'a') == lines_of(tmp_path / 'b')
  assert texts_of(tmp_path / 'a') != texts_of(tmp_path / 'c')


def test_num_examples_takes_the_first(sample, dataset, tmp_path):
  sample(str(tmp_path), dataset=dataclasses.replace(dataset, num_examples=5))

  assert [x['inputs'] for x in lines_of(tmp_path)] == WORDS[:5]


# --- Several outputs for each example -----------------------------------------


def test_several_samples_are_different_draws(sample, tmp_path):
  sample(str(tmp_path), num_samples=3)

  lines = lines_of(tmp_path)
  assert [(x['example'], x['sample']) for x in lines] == [
    (i, j) for i in range(len(WORDS)) for j in range(3)
  ]
  texts = texts_of(tmp_path)
  first, second, third = (texts[i::3] for i in range(3))
  assert first != second and second != third and first != third


def test_the_first_samples_are_those_of_a_single_one(sample, tmp_path, whole):
  sample(str(tmp_path / '1'))
  sample(str(tmp_path / '3'), num_samples=3)

  two = [json.loads(line)['prediction'] for line in whole.lines.splitlines()]
  three = texts_of(tmp_path / '3')
  assert texts_of(tmp_path / '1') == two[0::2] == three[0::3]
  assert two[1::2] == three[1::3]


def test_of_a_beam_the_best_come_first(model_dir, dataset, tmp_path):
  def search(folder, **settings):
    infer.infer(
      str(model_dir),
      str(tmp_path / folder),
      dataset,
      beam_search.BeamConfig(num_beams=3),
      **settings,
    )
    return [
      [
        x['prediction_ids']
        for x in lines_of(tmp_path / folder)
        if x['example'] == i
      ]
      for i in range(len(WORDS))
    ]

  three = search('3', num_samples=3)

  # Another search of the same width, of which the best alone is wanted.
  assert [found[:1] for found in three] == search('1')
  # Where fewer than 3 ended in time, there are fewer.
  numbers = [len(found) for found in three]
  assert min(numbers) == 1 and max(numbers) == 3
  scores = _scores(model_dir, dataset, three)
  assert all(of_word == sorted(of_word, reverse=True) for of_word in scores)


def _scores(model_dir, dataset, found):
  """Log-probabilities of the outputs for each word, over the length penalty.

  Computed by teacher forcing, which knows nothing of beams.
  """
  model, params = pretrained.load_model(model_dir)
  inputs = np.zeros((len(WORDS), 3, 6), np.int32)
  outputs = np.zeros((len(WORDS), 3, 7), np.int32)
  for i, word in enumerate(WORDS):
    ids = [*vocabularies.byte().encode(word), 1]
    inputs[i, :, : len(ids)] = ids
    for j, row in enumerate(found[i]):
      outputs[i, j, : len(row)] = row
  inputs, outputs = inputs.reshape(-1, 6), outputs.reshape(-1, 7)
  logits = mask_unused_ids(
    tiny.logits(model, params, inputs, outputs),
    tiny.special_ids(259),
  )
  log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
  token_log_p = np.take_along_axis(log_p, outputs[:, :, None], 2)[:, :, 0]
  is_token = outputs != 0
  penalty = ((5 + is_token.sum(axis=1)) / 6) ** 0.6
  scores = (token_log_p * is_token).sum(axis=1) / penalty
  return [
    scores[3 * i : 3 * i + len(of_word)].tolist()
    for i, of_word in enumerate(found)
  ]


@pytest.mark.parametrize(
  ['decoding', 'num_samples', 'said'],
  [
    (sampler.GREEDY, 2, 'NUM_SAMPLES is 2, but greedy decoding has one'),
    (
      beam_search.BeamConfig(3),
      4,
      'NUM_SAMPLES is 4, but BeamConfig.num_beams is',
    ),
    (sampler.ANCESTRAL, 0, 'NUM_SAMPLES must be 1 or more, got 0'),
  ],
)
def test_more_than_there_are_is_refused(
  model_dir, dataset, tmp_path, decoding, num_samples, said
):
  with pytest.raises(ValueError, match=said):
    infer.infer(
      str(model_dir), str(tmp_path / 'out'), dataset, decoding, num_samples
    )

  assert not (tmp_path / 'out').exists()


# --- Interrupted --------------------------------------------------------------


@pytest.fixture
def interrupted(whole, tmp_path):
  """Truncates the outputs to a number of bytes, as an interrupted run would."""

  def interrupt(num_bytes):
    (tmp_path / f'{FILE}.partial').write_bytes(whole.lines[:num_bytes])
    about = json.loads(whole.about)
    del about['num_examples'], about['num_predictions']
    (tmp_path / 'predictions_test.json').write_text(json.dumps(about))
    return tmp_path

  return interrupt


def line_ends(text):
  return [i + 1 for i, byte in enumerate(text) if byte == ord('\n')]


# 14 lines: 8 of the first batch, 6 of the second.
@pytest.mark.parametrize(
  ['line', 'more_bytes'],
  [(0, 0), (3, 60), (8, 0), (8, 1), (9, 0), (13, 60), (14, 0)],
)
def test_an_interrupted_run_goes_on_and_writes_the_same(
  sample, interrupted, whole, line, more_bytes
):
  folder = interrupted(([0] + line_ends(whole.lines))[line] + more_bytes)

  sample(str(folder), num_samples=2)

  assert (folder / FILE).read_bytes() == whole.lines
  about = json.loads((folder / 'predictions_test.json').read_text())
  assert (about['num_examples'], about['num_predictions']) == (7, 14)
  assert sorted(p.name for p in folder.iterdir()) == [
    'predictions_test.json',
    FILE,
  ]


def test_what_is_written_is_not_written_again(
  sample, interrupted, whole, monkeypatch
):
  folder = interrupted(line_ends(whole.lines)[8])  # in the second batch
  begun_at = []
  batches = iterators.InferenceDataset.batches

  def watch(self, first_example):
    begun_at.append(first_example)
    return batches(self, first_example)

  monkeypatch.setattr(iterators.InferenceDataset, 'batches', watch)
  sample(str(folder), num_samples=2)

  assert begun_at == [4]


def test_a_run_that_is_killed_can_go_on(
  model_dir, dataset, tmp_path, whole, monkeypatch
):
  """Interrupts a run; the outputs that it had written remain."""
  make = programs.make_write

  def make_and_die(*arguments, **settings):
    write = make(*arguments, **settings)
    calls = []

    def write_once(*of_batch):
      if calls:
        raise KeyboardInterrupt
      calls.append(1)
      return write(*of_batch)

    return write_once

  settings = {'decoding': sampler.ANCESTRAL, 'num_samples': 2}
  with monkeypatch.context() as patch:
    patch.setattr(programs, 'make_write', make_and_die)
    with pytest.raises(KeyboardInterrupt):
      infer.infer(str(model_dir), str(tmp_path), dataset, **settings)
  partial = (tmp_path / f'{FILE}.partial').read_bytes()
  # The first batch, as soon as it was there.
  assert partial == whole.lines[: line_ends(whole.lines)[7]]

  infer.infer(str(model_dir), str(tmp_path), dataset, **settings)

  assert (tmp_path / FILE).read_bytes() == whole.lines


@pytest.mark.parametrize(
  ['changes', 'said'],
  [
    ({'seed': 3}, 'seed: 0 there, 3 here'),
    ({'num_samples': 3}, 'num_samples: 2 there, 3 here'),
    (
      {'decoding': sampler.SamplerConfig(0.5)},
      'decoding: .*temperature=1.0.* there, .*temperature=0.5.* here',
    ),
  ],
)
def test_a_run_with_other_settings_does_not_go_on(
  sample, interrupted, whole, changes, said
):
  folder = interrupted(line_ends(whole.lines)[9])
  before = (folder / f'{FILE}.partial').read_bytes()

  with pytest.raises(ValueError, match='was started with other settings') as e:
    sample(str(folder), **({'num_samples': 2} | changes))

  assert re.search(said, str(e.value))
  assert (folder / f'{FILE}.partial').read_bytes() == before


def test_a_run_does_not_go_on_with_other_files(sample, interrupted, whole):
  folder = interrupted(line_ends(whole.lines)[9])
  side_file = folder / 'predictions_test.json'
  about = json.loads(side_file.read_text())
  about['pins']['CHECKPOINT_PATH']['files']['description/metadata'] = 'old'
  side_file.write_text(json.dumps(about))

  with pytest.raises(ValueError, match='with other settings or files') as e:
    sample(str(folder), num_samples=2)

  assert 'checkpoint_0/description/metadata was old, is' in str(e.value)


def test_another_machine_may_go_on(sample, interrupted, whole):
  folder = interrupted(line_ends(whole.lines)[9])
  side_file = folder / 'predictions_test.json'
  about = json.loads(side_file.read_text())
  about['versions']['devices'] = '4 x TPU v4'
  side_file.write_text(json.dumps(about))

  sample(str(folder), num_samples=2)

  assert json.loads(side_file.read_text())['versions']['devices'] == '1 x cpu'


# --- Which tasks and models ---------------------------------------------------


def test_a_task_needs_no_metrics(sample, dataset, tmp_path):
  name = conftest.register('unmeasured', conftest.letter_words, metric_fns=[])
  unmeasured = dataclasses.replace(dataset, mixture_or_task_name=name)

  sample(str(tmp_path), dataset=unmeasured)

  assert [x['inputs'] for x in lines_of(tmp_path)] == WORDS


def test_a_mixture_of_tasks_is_refused(sample, dataset, tmp_path):
  import seqio

  other = conftest.register('other_letters', conftest.letter_words)
  seqio.MixtureRegistry.add(
    'two_tasks', [dataset.mixture_or_task_name, other], default_rate=1.0
  )
  mixed = dataclasses.replace(dataset, mixture_or_task_name='two_tasks')

  with pytest.raises(ValueError, match="'two_tasks' is a mixture of several"):
    sample(str(tmp_path / 'out'), dataset=mixed)


def test_a_checkpoint_of_another_vocabulary_is_refused(dataset, tmp_path):
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
  before = (tmp_path / FILE).read_bytes()

  with pytest.raises(ValueError, match='exists and would be overwritten'):
    sample(str(tmp_path), seed=1)
  assert (tmp_path / FILE).read_bytes() == before


def test_a_batch_must_be_divisible_by_the_devices(
  model_dir, dataset, tmp_path, monkeypatch
):
  three = types.SimpleNamespace(shape={'data': 3, 'model': 1})
  monkeypatch.setattr(partitioning, 'make_mesh', lambda: three)

  with pytest.raises(ValueError, match='INFER_BATCH_SIZE 4 .* the 3 devices'):
    infer.infer(str(model_dir), str(tmp_path), dataset)
