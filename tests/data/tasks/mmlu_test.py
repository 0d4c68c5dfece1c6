# SPDX-License-Identifier: Apache-2.0
import csv
import dataclasses

import pytest

from gkd_jax.data import datasets, iterators
from gkd_jax.data.tasks import mmlu
from tests import conftest

pytestmark = pytest.mark.slow  # reads data through seqio

LENGTHS = {'inputs': 1024, 'targets': 8}
FIRST = 'abstract_algebra'
PROMPT = """\
The following are multiple choice questions (with answers) about abstract \
algebra.

dev 0, "quoted"?
A. a0
B. b0
C. c0
D. d0
Answer: A

dev 1, "quoted"?
A. a1
B. b1
C. c1
D. d1
Answer: B

dev 2, "quoted"?
A. a2
B. b2
C. c2
D. d2
Answer: C

dev 3, "quoted"?
A. a3
B. b3
C. c3
D. d3
Answer: D

dev 4, "quoted"?
A. a4
B. b4
C. c4
D. d4
Answer: A

test 0, "quoted"?
A. a0
B. b0
C. c0
D. d0
Answer:"""


def num_test_questions(subject):
  return 2 if subject == FIRST else 1


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Writes questions in the layout of the authors' archive."""
  root = tmp_path_factory.mktemp('mmlu')
  for part in ('dev', 'val', 'test'):
    (root / part).mkdir()
    for subject in mmlu.SUBJECTS:
      n = 5 if part == 'dev' else num_test_questions(subject)
      with (root / part / f'{subject}_{part}.csv').open('w') as file:
        csv.writer(file).writerows(
          [f'{part} {i}, "quoted"?', f'a{i}', f'b{i}', f'c{i}', f'd{i}', letter]
          for i, letter in enumerate('ABCDA'[:n])
        )
  return root


@pytest.fixture(scope='module')
def config(folder, small_vocabulary):
  return datasets.DatasetConfig(
    'mmlu',
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


def prompts(config, lengths=LENGTHS):
  ds = datasets.get_task(config).get_dataset(
    lengths, split=config.split, shuffle=False
  )
  return [e['inputs_pretokenized'].decode() for e in ds.as_numpy_iterator()]


def test_there_are_57_subjects():
  assert len(set(mmlu.SUBJECTS)) == 57


def test_a_prompt_is_that_of_the_authors(config):
  assert prompts(config)[0] == PROMPT


def test_batches_hold_the_prompt_and_the_letter(dataset):
  example = dataset.examples()[0]

  # SentencePiece makes spaces of line ends.
  assert example == {'inputs': ' '.join(PROMPT.split()), 'targets': 'A'}


def test_the_first_questions_are_of_all_subjects(config):
  heads = [p.splitlines()[0].partition(' about ')[2] for p in prompts(config)]

  assert len(heads) == 58
  assert heads[:57] == [s.replace('_', ' ') + '.' for s in mmlu.SUBJECTS]
  assert heads[57] == 'abstract algebra.'


def test_validation_is_the_val_folder(config):
  got = prompts(dataclasses.replace(config, split='validation'))

  assert len(got) == 58
  assert all('\n\nval ' in prompt for prompt in got)


def test_shots_that_do_not_fit_are_left_out(config):
  got = prompts(config, {'inputs': 300, 'targets': 8})[0]

  assert 0 < got.count('Answer: ') < 5
  assert got.startswith('The following are')
  assert got.endswith(PROMPT[-40:])
  # One token a character, one for what stands before the first, and EOS; one
  # more question would have been too many.
  assert len(' '.join(got.split())) + 2 <= 300
  assert len(' '.join(got.split())) + 2 + 50 > 300


@pytest.mark.parametrize('text', ['B', ' B\n', '(B)', 'B.', '(B).'])
def test_ways_to_write_a_letter(text):
  assert mmlu.letter(text) == 'B'


@pytest.mark.parametrize('text', ['', 'b', 'E', 'BC', 'A or B', 'B because'])
def test_what_is_no_letter(text):
  assert mmlu.letter(text) not in {'A', 'B', 'C', 'D'}


def test_accuracy_is_the_mean_over_subjects(dataset):
  # Right: one of the two questions on the first subject, and 40 of the others.
  written = ['B', *(['A'] * 40), *(['C'] * 16), '(B)']

  numbers, notes = dataset.metrics_and_notes(
    conftest.as_tokens(dataset.vocabulary, written, 8)
  )

  assert numbers == {'accuracy': pytest.approx((50 + 40 * 100) / 57)}
  by_subject = notes['accuracy_by_subject']
  assert len(by_subject) == 57
  assert by_subject[FIRST] == 50.0
  assert by_subject['anatomy'] == 100.0
  assert by_subject['world_religions'] == 0.0


def test_empty_predictions_are_wrong():
  got = mmlu.accuracy([('anatomy', 'A')], [mmlu.letter('')])

  assert got['accuracy'] == 0.0


def test_a_missing_file_is_told_with_where_to_get_it(folder, config, tmp_path):
  with pytest.raises(ValueError, match='lacks 171 of 171 files') as error:
    datasets.get_task(
      dataclasses.replace(config, task_arguments={'folder': str(tmp_path)})
    )

  assert f'MMLU_DIR {tmp_path} lacks' in str(error.value)
  assert f'{tmp_path}/dev/abstract_algebra_dev.csv' in str(error.value)
  assert 'data.tar' in str(error.value)


@pytest.mark.parametrize(
  'row', ['question,a,b,c,A', 'question,a,b,c,d,E', 'question,a,b,c,d,']
)
def test_a_row_that_is_no_question_is_told(tmp_path, row):
  path = tmp_path / 'x.csv'
  path.write_text(f'q,a,b,c,d,D\n{row}\n')

  with pytest.raises(ValueError, match='x.csv: row 2 is not a question, four'):
    mmlu._read(path)


@pytest.mark.parametrize(
  ('flags', 'want'),
  [
    ((), 'MMLU_DIR must be set: --gin.MMLU_DIR=VALUE.'),
    (('--gin.MMLU_DIR=no/where',), 'MMLU_DIR no/where lacks 171 of 171 files'),
  ],
)
def test_the_fragment_names_the_folder(run_main, flags, want):
  finished = run_main(
    '--run_mode=eval',
    '--gin_file=gin/runs/eval.gin',
    '--gin_file=gin/tasks/mmlu.gin',
    f'--gin.CHECKPOINT_PATH={conftest.BYT5}',
    '--gin.EVAL_OUTPUT_DIR=x',
    *flags,
  )

  assert finished.code == 1
  assert want in finished.err
