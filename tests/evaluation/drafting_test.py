# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from gkd_jax import build
from gkd_jax.data import datasets
from gkd_jax.decoding import beam_search, sampler
from gkd_jax.decoding.speculative import Drafting
from gkd_jax.evaluation import drafting, evaluate, infer
from gkd_jax.experiment import Draft
from gkd_jax.models.t5 import T5Config
from tests import conftest, tiny
from tests.letter_models import (
  IDS,
  SETTINGS,
  STUDENT,
  TEACHER,
)

pytestmark = pytest.mark.slow  # compiles models

FILE = 'predictions_test.jsonl'
GREEDY = {'greedy': sampler.GREEDY}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Folders of a target and of a draft, with embeddings of two sizes."""
  folder = tmp_path_factory.mktemp('runs')
  conftest.save_model(folder / 'target', TEACHER.config)
  conftest.save_model(folder / 'draft', T5Config(259, 8, 1, 4, 10, 1, 1))
  return folder


@pytest.fixture(scope='module')
def dataset(letters):
  """7 examples in batches of 4."""
  return datasets.DatasetConfig(
    letters, conftest.LENGTHS, batch_size=4, split='test', shuffle=False
  )


@pytest.fixture(scope='module')
def write(runs, dataset):
  """Writes outputs of the target into a folder."""

  def write(folder, **settings):
    infer.infer(
      str(runs / 'target'), str(folder), **({'dataset': dataset} | settings)
    )
    about = json.loads((folder / 'predictions_test.json').read_text())
    return (folder / FILE).read_text(), about

  return write


def draft_of(runs, length=3, **settings):
  return Draft(
    checkpoint_path=str(runs / 'draft'),
    drafting=Drafting(length, **settings),
  )


def test_infer_with_a_draft_writes_the_same_greedy_outputs(
  write, runs, tmp_path, capsys
):
  plain, _ = write(tmp_path / 'plain')

  drafted, about = write(tmp_path / 'drafted', draft=draft_of(runs))

  assert drafted == plain
  assert about['draft_checkpoint'] == f'{runs}/draft/checkpoint_0'
  assert about['pins'].keys() >= {'CHECKPOINT_PATH', 'DRAFT_CHECKPOINT_PATH'}
  assert about['outputs_are_of_the_targets_distribution'] is True
  values = about['drafted']
  assert values['same_as_without_draft'] == 1.0
  assert values['speedup'] > 0.0
  said = capsys.readouterr().err
  assert (
    f'{values["block_efficiency"]:.2f} tokens per call of the target' in said
  )
  assert 'times as fast as without a draft' in said


def test_several_samples_are_different_and_do_not_depend_on_their_number(
  write, runs, tmp_path
):
  settings = {'decoding': sampler.ANCESTRAL, 'draft': draft_of(runs)}
  one, _ = write(tmp_path / '1', **settings)

  three, _ = write(tmp_path / '3', num_samples=3, **settings)

  lines = [json.loads(line) for line in three.splitlines()]
  first = [line for line in lines if line['sample'] == 0]
  assert first == [json.loads(line) for line in one.splitlines()]
  assert len({str(line['prediction_ids']) for line in lines}) > 14


def test_lenient_outputs_are_marked_wherever_they_are(
  write, runs, dataset, tmp_path, capsys
):
  lenient = draft_of(runs, lenience=0.5)

  _, about = write(tmp_path / 'outputs', draft=lenient)
  evaluate.evaluate_checkpoint(
    str(runs / 'target'), str(tmp_path / 'eval'), dataset, GREEDY, draft=lenient
  )

  assert about['outputs_are_of_the_targets_distribution'] is False
  said = capsys.readouterr().err
  assert said.count("do not have the target's distribution") == 2
  results = json.loads((tmp_path / 'eval' / 'eval_test.json').read_text())
  assert results['outputs_are_of_the_targets_distribution'] is False
  assert 'lenience=0.5' in results['drafting']


def test_an_evaluation_with_a_draft_measures_the_same_and_what_it_saved(
  config, dataset, student_params, teacher_params, runs
):
  decodings = GREEDY | {'sampled': sampler.ANCESTRAL}
  drafter = drafting.Drafter(
    build.Model(STUDENT, student_params), draft_of(runs), {}
  )

  evaluation = evaluate.Evaluation(
    config,
    TEACHER,
    build.NO_MODEL,
    decodings,
    drafts=drafting.Drafts(drafter),
    **SETTINGS,
  )
  values, _ = evaluation(teacher_params)

  plain = evaluate.Evaluation(
    config, TEACHER, build.NO_MODEL, GREEDY, **SETTINGS
  )
  assert values['greedy/error'] == plain(teacher_params)[0]['greedy/error']
  assert values.keys() == {*evaluation.names()}
  for decoding in decodings:
    # Random models seldom have the same most probable token.
    assert 0.0 <= values[f'{decoding}/acceptance_rate'] < 1.0
    assert 1.0 <= values[f'{decoding}/block_efficiency'] < 4.0
    assert 0.25 <= values[f'{decoding}/target_calls_per_token'] <= 1.0
  assert values['sampled/acceptance_rate'] > 0.0
  assert 'sampled/same_as_without_draft' not in values


def test_rows_that_fill_up_a_batch_are_not_counted(
  student_params, teacher_params, runs
):
  writer = drafting.Writer(
    TEACHER,
    drafting.Drafter(build.Model(STUDENT, student_params), draft_of(runs), {}),
    sampler.ANCESTRAL,
    num_outputs=1,
    max_decode_len=7,
    ids=IDS,
    **SETTINGS,
  )
  inputs = tiny.tokens(0, [3, 5, 4], 6)

  writer(teacher_params, np.arange(3), inputs)
  want = writer.take_metrics()
  writer(teacher_params, np.arange(4), np.pad(inputs, ((0, 1), (0, 0))))

  got = writer.take_metrics()
  for name in ('acceptance_rate', 'block_efficiency'):
    assert got[name] == want[name]


@pytest.mark.parametrize(
  ('draft', 'settings', 'said'),
  [
    ({'length': 7}, {}, 'DRAFT_LENGTH is 7, but outputs have 7 tokens'),
    (
      {},
      {'decoding': sampler.SamplerConfig(0.0, calculator=True)},
      'DECODING has a calculator',
    ),
    (
      {},
      {'decoding': beam_search.BeamConfig(2)},
      'DECODING is a beam search, which cannot have a draft',
    ),
  ],
  ids=['length', 'calculator', 'beam search'],
)
def test_a_draft_that_cannot_be_is_refused_before_anything_is_written(
  write, runs, tmp_path, draft, settings, said
):
  with pytest.raises(ValueError, match=said):
    write(tmp_path / 'new', draft=draft_of(runs, **draft), **settings)

  assert not (tmp_path / 'new').exists()


def test_an_evaluation_names_the_decoding_that_cannot_have_a_draft(
  runs, dataset, tmp_path
):
  decodings = GREEDY | {'beam': beam_search.BeamConfig(2)}
  with pytest.raises(ValueError, match="'beam' is a beam search"):
    evaluate.evaluate_checkpoint(
      str(runs / 'target'),
      str(tmp_path),
      dataset,
      decodings,
      draft=draft_of(runs),
    )


def test_a_draft_of_another_vocabulary_is_refused(write, runs, tmp_path):
  conftest.save_model(
    tmp_path / 'other', STUDENT.config, 'ByteVocabulary 260 ids'
  )
  conftest.save_model(tmp_path / 'small', T5Config(200, 8, 1, 4, 10, 1, 1))

  for name, said in (
    ('other', 'vocabulary: ByteVocabulary 260 ids in the checkpoint'),
    ('small', "embeds 200 ids, but the task's vocabulary has 259"),
  ):
    draft = Draft(checkpoint_path=str(tmp_path / name))
    with pytest.raises(ValueError, match=said):
      write(tmp_path / 'new', draft=draft)


def test_a_draft_length_without_a_draft_is_refused():
  with pytest.raises(ValueError, match='DRAFT_CHECKPOINT_PATH is not'):
    Draft(drafting=Drafting(4))
