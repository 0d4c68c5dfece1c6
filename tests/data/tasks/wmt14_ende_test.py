# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import sacrebleu

from gkd_jax.data import datasets, iterators, vocabularies
from gkd_jax.data.tasks import wmt14_ende
from tests import conftest, tfds

pytestmark = pytest.mark.slow  # reads data through seqio

NAME = 'wmt14_translate/de-en:1.0.0'
ROWS = {
  'train': [{'en': f'Give me {i}.', 'de': f'Gib mir {i}.'} for i in range(4)],
  'validation': [
    {'en': 'The house is red.', 'de': 'Das Haus ist rot.'},
    {'en': 'We came too late.', 'de': 'Wir sind zu spät gekommen.'},
  ],
  'test': [
    {'en': 'The dog sleeps.', 'de': 'Der Hund schläft (immer noch).'},
    {'en': 'I see 3.5 cats.', 'de': 'Ich sehe 3,5 Katzen.'},
  ],
}
LENGTHS = {'inputs': 64, 'targets': 48}


@pytest.fixture(scope='module')
def config(tfds_dir):
  tfds.prepare_like(NAME, tfds_dir, ROWS)
  return datasets.DatasetConfig(
    'wmt14_ende',
    LENGTHS,
    batch_size=2,
    split='test',
    shuffle=False,
    vocabulary=vocabularies.byte(),
  )


@pytest.fixture(scope='module')
def test_split(config):
  return iterators.EvalDataset(config)


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_the_prompt_is_t5s_and_the_target_is_german(config, split):
  dataset = iterators.EvalDataset(dataclasses.replace(config, split=split))

  got = {(e['inputs'], e['targets']) for e in dataset.examples()}

  assert got == {
    (f'translate English to German: {row["en"]}', row['de'])
    for row in ROWS[split]
  }


def test_training_reads_the_training_split(config):
  train = dataclasses.replace(config, split='train', batch_size=4)

  batch = next(iterators.TrainIterator(train, seed=0))

  vocabulary = vocabularies.byte()
  texts = {vocabulary.decode(row.tolist()) for row in batch[1]}
  assert texts == {row['de'] for row in ROWS['train']}


def test_outputs_are_scored_as_sacrebleu_does(test_split):
  written = ['Der Hund schläft immer.', 'Ich sehe 3,5 Katze.']
  references = [e['targets'] for e in test_split.examples()]

  got, notes = test_split.metrics_and_notes(
    conftest.as_tokens(test_split.vocabulary, written, 48)
  )

  want = {
    name: sacrebleu.corpus_bleu(written, [references], tokenize=tokenizer).score
    for name, tokenizer in (('bleu', '13a'), ('bleu_intl', 'intl'))
  }
  assert got == want  # the same code on the same texts
  assert all(type(value) is float for value in got.values())  # for JSON
  version = sacrebleu.__version__
  assert notes == {
    'bleu_signature': (
      f'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}'
    ),
    'bleu_intl_signature': (
      f'nrefs:1|case:mixed|eff:no|tok:intl|smooth:exp|version:{version}'
    ),
  }


def test_perfect_outputs_have_100_and_others_less():
  targets = [row['de'] for row in ROWS['test']]

  assert wmt14_ende.bleu(targets, targets)['bleu'] == pytest.approx(100)
  assert wmt14_ende.bleu(targets, targets[::-1])['bleu'] < 10


def test_bleu_of_a_hand_worked_example():
  got = wmt14_ende.bleu(['a b c d e f'], ['a b c d x f'])

  # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples, no penalty.
  want = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
  assert got['bleu'] == pytest.approx(want)


def test_empty_predictions_score_nothing():
  assert wmt14_ende.bleu(['ja', 'nein'], ['', ''])['bleu'] == 0.0


def test_the_fragment_names_the_task(config, run_main, tmp_path):
  finished = run_main(
    '--run_mode=eval',
    '--gin_file=gin/runs/eval.gin',
    '--gin_file=gin/tasks/wmt14_ende.gin',
    '--gin_file=gin/vocabularies/bytes.gin',
    f'--gin.CHECKPOINT_PATH={tmp_path}/nowhere',
    f'--gin.EVAL_OUTPUT_DIR={tmp_path}',
  )

  # All that comes before the model is there.
  assert f'{tmp_path}/nowhere is not there' in finished.err
