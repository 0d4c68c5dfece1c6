# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from gkd_jax.data import datasets, iterators
from gkd_jax.data.tasks import bbh
from tests import conftest

pytestmark = pytest.mark.slow  # reads data through seqio

LENGTHS = {'inputs': 1024, 'targets': 64}
THINK = "Let's think step by step."
FIRST = 'boolean_expressions'
DIRECT = """\
Ours: boolean_expressions.

Two paragraphs.

Q: shot 0?
Options:
(A) 0
A: (A)

Q: shot 1?
Options:
(A) 1
A: (A)

Q: shot 2?
Options:
(A) 2
A: (A)

Q: asked 0?
A:"""


def cot_prompt(file):
  shots = [
    f'Q: shot {i}?\nOptions:\n(A) {i}\nA: {THINK}\nOf course {i} is {i}.\n'
    f'So the answer is (A).'
    for i in range(3)
  ]
  return '\n\n'.join([f'Ours: {file}.\n\nTwo paragraphs.', *shots])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Writes questions in the layout of the authors' repository."""
  root = tmp_path_factory.mktemp('bbh')
  (root / 'bbh').mkdir()
  (root / 'cot-prompts').mkdir()
  for file in bbh.FILES:
    examples = [
      {'input': f'asked {i}?', 'target': '(A)' if i == 0 else 'oak  elm'}
      for i in range(2 if file == FIRST else 1)
    ]
    (root / 'bbh' / f'{file}.json').write_text(
      json.dumps({'canary': 'do not train', 'examples': examples})
    )
    (root / 'cot-prompts' / f'{file}.txt').write_text(
      f'Do not train on this.\n-----\n{cot_prompt(file)}'
    )
  return root


@pytest.fixture(scope='module')
def config(folder, small_vocabulary):
  return datasets.DatasetConfig(
    'bbh',
    LENGTHS,
    batch_size=16,
    split='test',
    shuffle=False,
    vocabulary=small_vocabulary,
    task_arguments={'folder': str(folder)},
  )


@pytest.fixture(scope='module')
def dataset(config):
  return iterators.EvalDataset(config)


def first_prompt(config):
  ds = datasets.get_task(config).get_dataset(
    LENGTHS, split='test', shuffle=False
  )
  return next(ds.as_numpy_iterator())['inputs_pretokenized'].decode()


def test_the_files_are_23_tasks_two_of_them_in_three_sizes():
  assert len(set(bbh.FILES)) == 27
  by_task = bbh.accuracy([(file, 'x') for file in bbh.FILES], ['x'] * 27)
  assert by_task['accuracy'] == 100.0


def test_a_direct_prompt_has_the_answers_alone(config):
  assert first_prompt(config) == DIRECT


def test_a_prompt_with_chains_of_thought_is_the_authors_own(config, folder):
  thinking = dataclasses.replace(
    config, task_arguments={'folder': str(folder), 'chain_of_thought': True}
  )

  assert first_prompt(thinking) == (
    f'{cot_prompt(FIRST)}\n\nQ: asked 0?\nA: {THINK}'
  )


def test_batches_hold_the_prompt_and_the_answer(dataset):
  first, *_, last = dataset.examples()

  # SentencePiece makes spaces of line ends.
  assert first == {'inputs': ' '.join(DIRECT.split()), 'targets': '(A)'}
  assert len(dataset) == 28
  assert last['targets'] == 'oak elm'


@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('(A)', '(A)'),
    (' oak\n elm ', 'oak elm'),
    ('Both are true. So the answer is True.', 'True'),
    ('The answer is 4, no: the answer is 5.', '5'),
    ('So the answer is ] ) >.', '] ) >'),
    ('', ''),
  ],
)
def test_answers_of_texts(text, want):
  assert bbh.answer(text) == want


def test_accuracy_is_the_mean_over_tasks_not_files():
  # Right: one of three sizes of one task, half of another, nothing else.
  right = {'logical_deduction_five_objects': [1], 'navigate': [1, 0]}
  targets, predictions = [], []
  for file in bbh.FILES:
    for is_right in right.get(file, [0]):
      targets.append((file, 'yes'))
      predictions.append('yes' if is_right else '')

  got = bbh.accuracy(targets, predictions)

  assert got['accuracy'] == pytest.approx((100 / 3 + 50) / 23)
  assert got['accuracy_by_task']['logical_deduction_five_objects'] == 100.0
  assert len(got['accuracy_by_task']) == 27


def test_outputs_are_scored_by_what_they_answer(dataset):
  written = ['So the answer is (A).', *(['(A)'] * 26), 'elm oak']

  got = dataset.metrics(conftest.as_tokens(dataset.vocabulary, written, 64))

  assert got == {'accuracy': pytest.approx((22 * 100 + 50) / 23)}


def test_a_missing_file_is_told_with_where_to_get_it(config, tmp_path):
  with pytest.raises(ValueError, match='lacks 54 of 54 files') as error:
    datasets.get_task(
      dataclasses.replace(config, task_arguments={'folder': str(tmp_path)})
    )

  assert f'BBH_DIR {tmp_path} lacks' in str(error.value)
  assert f'{tmp_path}/bbh/boolean_expressions.json' in str(error.value)
  assert 'https://github.com/suzgunmirac/BIG-Bench-Hard' in str(error.value)


@pytest.mark.parametrize(
  'text', ['', '{}', '{"examples": [{"input": "x"}]}', '[]']
)
def test_a_file_without_examples_is_told(tmp_path, text):
  path = tmp_path / 'navigate.json'
  path.write_text(text)

  with pytest.raises(
    ValueError, match='navigate.json does not hold "examples"'
  ):
    bbh._read_examples(path)


def test_a_prompt_without_three_shots_is_told(tmp_path):
  path = tmp_path / 'navigate.txt'
  path.write_text('-----\n' + cot_prompt('x').replace('\n\nQ: shot 2', '\n2'))

  with pytest.raises(ValueError, match='navigate.txt does not hold a descr'):
    bbh._read_prompt(path, chain_of_thought=False)


def test_a_shot_whose_answer_cannot_be_told_is_refused(tmp_path):
  path = tmp_path / 'navigate.txt'
  path.write_text('-----\n' + cot_prompt('x').replace('answer is', 'result:'))

  with pytest.raises(ValueError, match='navigate.txt has a shot without'):
    bbh._read_prompt(path, chain_of_thought=False)
  bbh._read_prompt(path, chain_of_thought=True)


def test_the_fragment_names_the_folder(run_main):
  finished = run_main(
    '--run_mode=eval',
    '--gin_file=gin/runs/eval.gin',
    '--gin_file=gin/tasks/bbh.gin',
    '--gin.BBH_DIR=no/where',
    f'--gin.CHECKPOINT_PATH={conftest.BYT5}',
    '--gin.EVAL_OUTPUT_DIR=x',
  )

  assert finished.code == 1
  assert 'BBH_DIR no/where lacks 54 of 54 files' in finished.err
