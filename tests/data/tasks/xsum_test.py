# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest
import seqio
from rouge_score import rouge_scorer

from gkd_jax.data import datasets, iterators
from gkd_jax.data.tasks import xsum
from tests import conftest, tfds

pytestmark = pytest.mark.slow  # reads data through seqio

ROWS = {
  'train': [
    {'document': f'Rain fell on day {i}.', 'summary': f'Day {i} was wet.'}
    for i in range(6)
  ],
  'validation': [
    {
      'document': 'A cat sat on a mat.\nNobody objected.',
      'summary': 'A cat has been sitting. It was on a mat.',
    },
    {'document': 'Prices rose.', 'summary': 'Prices are higher.'},
    {'document': 'Trains ran late.', 'summary': 'Delays on railways.'},
  ],
  'test': [{'document': 'Snow.', 'summary': 'It snowed.'}],
}
LENGTHS = {'inputs': 64, 'targets': 48}
ZEROS = {'rouge1': 0.0, 'rouge2': 0.0, 'rougeLsum': 0.0}


@pytest.fixture(scope='module')
def config(tfds_dir, small_vocabulary):
  tfds.prepare_like('xsum:1.1.0', tfds_dir, ROWS)
  return datasets.DatasetConfig(
    'xsum',
    LENGTHS,
    batch_size=2,
    split='validation',
    shuffle=False,
    vocabulary=small_vocabulary,
  )


@pytest.fixture(scope='module')
def validation(config):
  return iterators.EvalDataset(config)


def numbers(scores):
  return {k: v for k, v in scores.items() if isinstance(v, float)}


def rouge_score_means(pairs):
  """Returns ROUGE of (target, prediction) pairs by rouge_score."""
  types = ['rouge1', 'rouge2', 'rougeLsum']
  scorer = rouge_scorer.RougeScorer(types, use_stemmer=True)
  scores = [scorer.score(target, prediction) for target, prediction in pairs]
  return {t: 100 * np.mean([s[t].fmeasure for s in scores]) for t in types}


def test_the_prompt_is_t5s_and_the_target_is_the_summary(validation):
  # SentencePiece makes a space of the end of a line.
  assert sorted(e['inputs'] for e in validation.examples()) == [
    'summarize: A cat sat on a mat. Nobody objected.',
    'summarize: Prices rose.',
    'summarize: Trains ran late.',
  ]
  assert sorted(e['targets'] for e in validation.examples()) == sorted(
    row['summary'] for row in ROWS['validation']
  )


def test_training_reads_the_training_split(config):
  train = dataclasses.replace(config, split='train', batch_size=6)

  batch = next(iterators.TrainIterator(train, seed=0))

  inputs = [config.vocabulary.decode(r.tolist()) for r in batch[0]]
  targets = [config.vocabulary.decode(r.tolist()) for r in batch[1]]
  days = [text.removeprefix('summarize: Rain fell on day ') for text in inputs]
  assert [f'Day {d.removesuffix(".")} was wet.' for d in days] == targets


def test_outputs_are_scored_as_rouge_score_does(validation):
  written = ['A cat sat on a mat.', 'Higher prices', 'Railways delayed']
  targets = [e['targets'] for e in validation.examples()]

  got = validation.metrics(
    conftest.as_tokens(validation.vocabulary, written, 48)
  )

  # rougeLsum wants a sentence a line.
  lines = [target.replace('. ', '.\n') for target in targets]
  want = rouge_score_means(zip(lines, written, strict=True))
  # The aggregator's mean is NumPy's, over the same float64 scores.
  assert got == pytest.approx(want, rel=1e-12)
  assert all(value > 0 for value in got.values())


def test_the_references_are_the_whole_summaries(config):
  # Though the targets are cut at 8 tokens.
  short = dataclasses.replace(
    config, task_feature_lengths={'inputs': 64, 'targets': 8}
  )
  dataset = iterators.EvalDataset(short)

  got = dataset.metrics(
    dataset.predict(lambda _, batch: batch.decoder_target_tokens)
  )

  assert 0 < got['rouge1'] < 60


def test_scores_of_hand_worked_examples():
  got = xsum.rouge(
    ['the cat sat', 'a b. c d.'],
    ['the cat ran', 'c d. a b.'],
  )

  # First: 2 of 3 words, 1 of 2 pairs, the longest common part is `the cat`.
  # Second: all words; a-b and c-d of three pairs; both sentences.
  assert numbers(got) == pytest.approx(
    {
      'rouge1': 100 * (2 / 3 + 1) / 2,
      'rouge2': 100 * (1 / 2 + 2 / 3) / 2,
      'rougeLsum': 100 * (2 / 3 + 1) / 2,
    }
  )


def test_words_are_compared_by_their_stems():
  assert xsum.rouge(['He is jumping'], ['he jumps is'])['rouge1'] == 100.0


def test_empty_predictions_score_nothing():
  got = xsum.rouge(['a b', 'c'], ['', ' '])

  assert numbers(got) == ZEROS
  assert all(type(v) is float for v in numbers(got).values())  # for JSON


def test_the_interval_is_the_same_each_time_and_holds_the_mean():
  targets = [f'the {i} of {i % 3}' for i in range(40)]
  predictions = [f'the {i} of 1' for i in range(40)]

  np.random.seed(7)
  first = xsum.rouge(targets, predictions)
  np.random.seed(8)
  before = np.random.get_state()[1].copy()
  second = xsum.rouge(targets, predictions)

  assert first == second
  low, high = first['rouge_95_percent_interval']['rouge1']
  assert low < first['rouge1'] < high
  # Nobody else's draws change.
  np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_data_that_is_not_prepared_is_an_error_that_says_what_to_do(
  config, tfds_dir, tmp_path
):
  loader = seqio.TaskRegistry.get('xsum').source.tfds_dataset
  loader.override_data_dir(str(tmp_path))
  datasets._num_first.cache_clear()  # a process reads a split once
  try:
    with pytest.raises(ValueError, match='TFDS has no xsum:1.1.0 in') as error:
      datasets.check_not_empty(config)
  finally:
    loader.override_data_dir(str(tfds_dir))

  for part in (
    'put xsum-extracts-from-downloads.tar.gz (',
    f'into {tmp_path}/downloads/manual',
    f"tfds.builder('xsum:1.1.0', data_dir='{tmp_path}').download_and_prepare()",
    '--tfds_data_dir=FOLDER',
  ):
    assert part in str(error.value)


def test_the_fragment_names_the_task(config, run_main, tmp_path):
  finished = run_main(
    '--run_mode=eval',
    '--gin_file=gin/runs/eval.gin',
    '--gin_file=gin/tasks/xsum.gin',
    '--gin_file=gin/vocabularies/sentencepiece.gin',
    f'--gin.VOCABULARY_PATH={config.vocabulary.sentencepiece_model_file}',
    f'--gin.CHECKPOINT_PATH={tmp_path}/nowhere',
    f'--gin.EVAL_OUTPUT_DIR={tmp_path}',
  )

  # All that comes before the model is there.
  assert f'{tmp_path}/nowhere is not there' in finished.err
