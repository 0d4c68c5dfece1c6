# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import json

import numpy as np
import pytest

from gkd_jax.checkpoints import pretrained
from gkd_jax.data import datasets, predictions, vocabularies
from gkd_jax.distill import rewards
from gkd_jax.evaluation import infer, programs
from gkd_jax.models.t5 import T5Config
from tests import conftest, t5_reference

pytestmark = pytest.mark.slow  # compiles models

CONFIG = T5Config(264, 12, 2, 4, 10, 1, 1)
NUM_IDS = 259  # of bytes
FILE = 'predictions_train.jsonl'
# Outputs of four inputs, with EOS and without it.
ROWS = [
  ([70, 71, 1], [[80, 1], [81, 82, 83, 84, 85, 86, 87]]),
  ([72, 1], [[1], [90, 91, 1], [92]]),
  ([73, 74, 75, 1], [[93, 94, 1]]),
  ([76, 1], [[95, 1], [96, 97, 1]]),
]


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('model')
  conftest.save_model(folder, CONFIG)
  return folder


@pytest.fixture(scope='module')
def dataset(letters):
  return datasets.DatasetConfig(letters, conftest.LENGTHS, batch_size=2)


def write(folder, rows=ROWS, **provenance):
  path = folder / FILE
  writer = predictions.Writer(
    path,
    {
      'vocabulary': 'ByteVocabulary 259 ids',
      'split': 'train',
      'checkpoint': 'other',
      **provenance,
    },
    batch_size=2,
  )
  writer.append(
    [
      [
        {
          'inputs': f'{inputs}',
          'prediction': f'{output}',
          'input_ids': inputs,
          'prediction_ids': output,
        }
        for output in outputs
      ]
      for inputs, outputs in rows
    ]
  )
  writer.close()
  return path


@pytest.fixture
def source(tmp_path):
  return write(tmp_path)


@pytest.fixture
def score(model_dir, dataset, source, tmp_path):
  """Scores the source; returns the lines."""

  def score(folder='out', path=source, **settings):
    settings = {'dataset': dataset} | settings
    out = tmp_path / folder
    infer.infer(str(model_dir), str(out), scored_path=str(path), **settings)
    text = next(out.glob('*.jsonl')).read_text()
    return [json.loads(line) for line in text.splitlines()]

  return score


@functools.cache
def reference(folder, inputs, outputs):
  _, params = pretrained.load_model(folder)
  logits = t5_reference.logits(params, inputs, outputs, num_heads=2)
  usable = logits[:, 1:NUM_IDS]
  log_sums = np.log(np.exp(usable).sum(axis=1))
  places = np.arange(len(outputs))
  return np.mean(log_sums - logits[places, list(outputs)])


def test_the_score_is_the_float64_references_mean_nll(score, model_dir):
  lines = score()

  got = [line['nll'] for line in lines]
  want = [
    reference(
      model_dir, tuple(line['input_ids']), tuple(line['prediction_ids'])
    )
    for line in lines
  ]
  # float32 logits are off by about 1e-6.
  assert got == pytest.approx(want, rel=1e-5)
  assert len({*got}) == len(got)


def test_lines_keep_their_fields_and_order(score, source):
  before = [json.loads(line) for line in source.read_text().splitlines()]

  after = score(score_field='nll_teacher')

  assert [{**line, 'nll_teacher': None} for line in after] == [
    {**line, 'nll_teacher': None} for line in before
  ]


def test_the_file_beside_it_says_which_models_scored(
  score, model_dir, tmp_path
):
  score()
  score('again', path=tmp_path / 'out' / FILE, score_field='nll_2')

  about = json.loads(
    (tmp_path / 'again' / 'predictions_train.json').read_text()
  )
  scored = f'NLL under {model_dir}/checkpoint_0'
  assert about['scores'] == {'nll': scored, 'nll_2': scored}
  assert about['checkpoint'] == 'other'
  assert about['pins'].keys() == {'CHECKPOINT_PATH', 'PREDICTIONS'}


def test_texts_are_tokenized_as_the_task_does(score, model_dir, tmp_path):
  path = tmp_path / 'mine.jsonl'
  path.write_text('{"inputs": "ab", "prediction": "c"}\n')

  (line,) = score(path=path)

  encode = vocabularies.byte().encode
  ids = [(*encode(text), 1) for text in ('ab', 'c')]
  assert line['nll'] == pytest.approx(reference(model_dir, *ids), rel=1e-5)


def test_a_reward_scores_outputs_and_references(score, tmp_path):
  path = tmp_path / 'mine.jsonl'
  path.write_text(
    ''.join(
      json.dumps({'inputs': 'ab', 'targets': want, 'prediction': got}) + '\n'
      for want, got in [('abcd', 'abxd'), ('a', 'a'), ('a', 'b')]
    )
  )

  lines = score(path=path, score_field='r', reward=rewards.rouge_l())

  assert [line['r'] for line in lines] == [0.75, 1.0, 0.0]
  about = json.loads((tmp_path / 'out' / 'mine.json').read_text())
  assert about['scores'] == {'r': 'reward'}


def test_a_rewards_model_is_the_checkpoint(score, model_dir):
  def make_reward_fn(vocabulary, ids, model):
    def reward_fn(batch, outputs, params):
      del batch
      return params['token_embedder']['embedding'][outputs.tokens[:, 0], 0]

    return reward_fn

  _, params = pretrained.load_model(model_dir)
  embedding = params['token_embedder']['embedding'][:, 0]

  lines = score(reward=rewards.Reward(make_reward_fn, needs_model=True))

  assert [line['nll'] for line in lines] == [
    float(embedding[line['prediction_ids'][0]]) for line in lines
  ]


def test_a_reward_without_outputs_is_refused(model_dir, dataset, tmp_path):
  with pytest.raises(ValueError, match='REWARD is set, but PREDICTIONS'):
    infer.infer(
      str(model_dir), str(tmp_path), dataset, reward=rewards.rouge_l()
    )


@pytest.mark.parametrize('stop_at', [0, 2])
def test_an_interrupted_run_goes_on_and_writes_the_same(
  score, tmp_path, monkeypatch, stop_at
):
  score('whole')
  whole = (tmp_path / 'whole' / FILE).read_bytes()
  make = programs.make_mean_nll

  def make_stopping(*arguments, **keywords):
    measure, calls = make(*arguments, **keywords), iter(range(100))

    def stopping(*arrays):
      if next(calls) == stop_at + 1:
        raise InterruptedError
      return measure(*arrays)

    return stopping

  with monkeypatch.context() as patch:
    patch.setattr(programs, 'make_mean_nll', make_stopping)
    with pytest.raises(InterruptedError):
      score('part')

  score('part')

  assert (tmp_path / 'part' / FILE).read_bytes() == whole


@pytest.mark.parametrize(
  ('rows', 'provenance', 'said'),
  [
    (ROWS, {'vocabulary': 'another'}, "of the vocabulary 'another'; task"),
    ([([70, 1], [[80] * 8])], {}, 'example 0 has 8 tokens of outputs, but'),
    ([*ROWS, ([70] * 7, [[1]])], {}, 'example 4 has 7 tokens of inputs, but'),
    ([([70, 1], [[300, 1]])], {}, 'has ids from 1 to 300 in its outputs'),
    ([([70, 1], [[]])], {}, 'example 0 has an output without tokens'),
    ([([70, 1], [None])], {}, 'example 0 has no list "prediction_ids"'),
  ],
)
def test_what_cannot_be_scored_is_refused(
  score, tmp_path, rows, provenance, said
):
  (tmp_path / 'other').mkdir()
  path = write(tmp_path / 'other', rows, **provenance)

  with pytest.raises(ValueError, match=said):
    score(path=path)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('field', ['prediction', 'example', 'mine', ''])
def test_a_field_that_the_lines_have_is_not_replaced(score, tmp_path, field):
  path = tmp_path / 'mine.jsonl'
  path.write_text('{"inputs": "ab", "prediction": "c", "mine": 1}\n')

  with pytest.raises(ValueError, match='SCORE_FIELD is'):
    score(path=path, score_field=field)


def test_a_batch_must_be_divisible_by_the_devices(score, dataset, monkeypatch):
  def refuse(setting, batch_size, mesh):
    raise ValueError(f'{setting} {batch_size}')

  monkeypatch.setattr('gkd_jax.parallel.partitioning.check_rows_divide', refuse)

  with pytest.raises(ValueError, match='INFER_BATCH_SIZE 3'):
    score(dataset=dataclasses.replace(dataset, batch_size=3))
