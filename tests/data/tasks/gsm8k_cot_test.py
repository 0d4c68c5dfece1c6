# SPDX-License-Identifier: Apache-2.0
import dataclasses
import decimal
import json
import re

import pytest

from gkd_jax.data import datasets, iterators, vocabularies
from gkd_jax.data.tasks import gsm8k_cot
from tests import conftest, tfds

pytestmark = pytest.mark.slow  # reads data through seqio

LENGTHS = {'inputs': 1024, 'targets': 96}


def row(i):
  """A question like GSM8K's; every fourth's solution is too long for a shot."""
  so = 'so it follows that ' * 12 if i % 4 == 0 else ''
  return {
    'question': f'Ann has {i} pens and buys {i} more. Bob has 2. In all?',
    'answer': (
      f'{so}Ann has {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i} pens.\n'
      f'In all {2 * i}+2 = <<{2 * i}+2={2 * i + 2}>>{2 * i + 2}.\n'
      f'#### {2 * i + 2}'
    ),
  }


TRAIN = [row(i) for i in range(80)]
TEST = [row(i) for i in range(1001, 1004)]


def write_json_lines(path, rows):
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return str(path)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp('gsm8k')
  return {
    'train': write_json_lines(folder / 'train.jsonl', TRAIN),
    'test': write_json_lines(folder / 'test.jsonl', TEST),
  }


@pytest.fixture(scope='module')
def config(files, small_vocabulary):
  return datasets.DatasetConfig(
    'gsm8k_cot',
    LENGTHS,
    batch_size=2,
    split='test',
    shuffle=False,
    vocabulary=small_vocabulary,
    task_arguments={'files': files},
  )


@pytest.fixture(scope='module')
def tfds_config(tfds_dir, config):
  def as_tfds(rows):
    for r in rows:
      rationale, answer = r['answer'].split('#### ')
      yield {**r, 'annotation': rationale, 'short_answer': answer}

  tfds.prepare_like(
    'gsm8k:1.0.0',
    tfds_dir,
    {'train': list(as_tfds(TRAIN)), 'test': list(as_tfds(TEST))},
  )
  return dataclasses.replace(config, task_arguments=None)


def texts(config, split, lengths=LENGTHS):
  """(prompt, target) of each example before it is tokenized."""
  task = datasets.get_task(dataclasses.replace(config, split=split))
  return [
    (e['inputs_pretokenized'].decode(), e['targets_pretokenized'].decode())
    for e in task.get_dataset(
      lengths, split=split, shuffle=False
    ).as_numpy_iterator()
  ]


def questions(prompts):
  """Returns the last question of each prompt, without the shots."""
  return [prompt.rpartition('Q: ')[2] for prompt, _ in prompts]


def stripped(text):
  return re.sub('<<.*?>>', '', text)


# --- The prompt ---------------------------------------------------------------


def test_a_prompt_is_four_worked_examples_and_the_question(config):
  prompt, target = texts(config, 'test')[0]

  *worked, last = prompt.split('\n\n')
  assert last == f'Q: {TEST[0]["question"]}\nA:'
  assert target == stripped(TEST[0]['answer'])
  assert len(set(worked)) == 4
  solved = {f'Q: {r["question"]}\nA: {stripped(r["answer"])}' for r in TRAIN}
  assert set(worked) < solved


def test_batches_hold_the_prompt_and_the_steps(config):
  dataset = iterators.EvalDataset(config)

  # SentencePiece makes spaces of line ends.
  assert dataset.examples() == [
    {
      'inputs': re.sub(r'\s+', ' ', prompt),
      'targets': target.replace('\n', ' '),
    }
    for prompt, target in texts(config, 'test')
  ]


def test_worked_examples_are_short(config):
  (prompt, _), *_ = texts(config, 'test')

  assert 'so it follows' not in prompt
  for worked in prompt.split('\n\n')[:-1]:
    assert len(worked.removeprefix('Q: ').replace('\nA: ', '')) <= 250


def test_worked_examples_do_not_depend_on_the_order_of_the_rows():
  rows = [(r['question'], r['answer']) for r in TRAIN]

  assert gsm8k_cot.draw_shots(rows) == gsm8k_cot.draw_shots(rows[::-1])


def test_worked_examples_have_two_to_four_steps():
  def solved_in(num_steps):
    return (f'In {num_steps}?', 'step\n' * num_steps + '#### 1')

  shots = gsm8k_cot.draw_shots([solved_in(n) for n in range(1, 7)])

  assert {answer.count('step') for _, answer in shots} == {2, 3, 4}


def test_worked_examples_are_not_trained_on(config):
  train = texts(config, 'train')
  worked = set(train[0][0].split('\n\n')[:-1])

  assert len(worked) == 4
  assert not {q.removesuffix('\nA:') for q in questions(train)} & {
    w.removeprefix('Q: ').partition('\nA:')[0] for w in worked
  }


def test_where_four_examples_do_not_fit_there_are_fewer(config):
  (prompt, _), *_ = texts(config, 'test')
  *worked, last = prompt.split('\n\n')
  three = '\n\n'.join([*worked[:3], last])
  # One token a character, one for what stands before the first, and EOS. Two
  # line ends become one space.
  length = len(re.sub(r'\s+', ' ', three)) + 2

  fits = texts(config, 'test', {'inputs': length, 'targets': 96})
  does_not = texts(config, 'test', {'inputs': length - 1, 'targets': 96})
  nothing_does = texts(config, 'test', {'inputs': 8, 'targets': 96})

  assert fits[0][0] == three
  assert does_not[0][0] == '\n\n'.join([*worked[:2], last])
  assert nothing_does[0][0] == last


def test_worked_examples_can_be_read_from_a_file(config, tmp_path):
  path = write_json_lines(
    tmp_path / 'mine.jsonl',
    [{'question': 'One?', 'answer': 'It is.\n#### 1'}],
  )
  arguments = {**config.task_arguments, 'shots_file': path}
  mine = dataclasses.replace(config, task_arguments=arguments)

  (prompt, _), *_ = texts(mine, 'test')

  assert prompt == (
    f'Q: One?\nA: It is.\n#### 1\n\nQ: {TEST[0]["question"]}\nA:'
  )


def test_annotations_stay_where_the_vocabulary_can_write_them(config):
  in_bytes = dataclasses.replace(config, vocabulary=vocabularies.byte())

  (prompt, target), *_ = texts(in_bytes, 'test')

  assert target == TEST[0]['answer']
  assert prompt.count('<<') == 8


# --- The splits ---------------------------------------------------------------


def test_validation_is_held_out_of_train(config):
  train, validation = (
    questions(texts(config, split)) for split in ('train', 'validation')
  )

  assert not set(train) & set(validation)
  # Of 80 one in 20, 4 +- 2; and 4 worked examples.
  assert 1 <= len(validation) <= 10
  assert len(train) + len(validation) + 4 == 80


def test_a_validation_file_is_taken_as_it_is(config, files):
  arguments = {'files': {**files, 'validation': files['test']}}
  own = dataclasses.replace(config, task_arguments=arguments)

  assert len(questions(texts(own, 'validation'))) == 3
  assert len(questions(texts(own, 'train'))) == 76


def test_tfds_and_json_lines_give_the_same_examples(config, tfds_config):
  for split in ('train', 'validation', 'test'):
    # TFDS has an order of its own.
    want = sorted(texts(config, split))
    assert sorted(texts(tfds_config, split)) == want
    assert want


def test_training_shows_every_training_question(config):
  train = dataclasses.replace(config, split='train')
  iterator = iterators.TrainIterator(train, seed=0)

  seen = set()
  for _ in range(40):
    for tokens in next(iterator).encoder_input_tokens:
      seen.add(config.vocabulary.decode(tokens.tolist()).rpartition('Q: ')[2])

  assert seen == {
    q.replace('\n', ' ') for q in questions(texts(config, 'train'))
  }


# --- Answers ------------------------------------------------------------------


@pytest.mark.parametrize(
  'text',
  [
    '#### 1000',
    '#### 1,000',
    '#### 1000.0',
    '#### $1000',
    '#### $1,000.00',
    '####1000.',
    '#### 1000 apples',
    '#### 1000%',
    '#### 12 #### 1000',
    'so 2*500=1000 #### 1000\nQ: 7?',
  ],
)
def test_answers_that_are_a_thousand(text):
  assert gsm8k_cot.final_answer(text) == 1000
  assert gsm8k_cot.accuracy(['#### 1000'], [text]) == {'accuracy': 100.0}


@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('#### -5', '-5'),
    ('#### -$5', '-5'),
    ('#### $-5', '-5'),
    ('#### .5', '0.5'),
  ]
  + [('#### 0.50', '0.5'), ('#### 12345678901234567890', 12345678901234567890)],
)
def test_answers_are_read_exactly(text, want):
  assert gsm8k_cot.final_answer(text) == decimal.Decimal(want)


@pytest.mark.parametrize(
  'text',
  ['', '1000', '####', '#### a thousand', '#### 1/1000', '#### 1 000']
  + ['#### 1,00', '#### 1000, 2', '#### --1000', '#### 1e3', '#### 10,00,0']
  + ['#### \N{ARABIC-INDIC DIGIT ONE}', '#### 1000\N{ARABIC-INDIC DIGIT ONE}'],
)
def test_an_unreadable_answer_is_wrong(text):
  assert gsm8k_cot.accuracy(['#### 1000'], [text]) == {'accuracy': 0.0}


def test_an_unreadable_target_is_never_matched():
  assert gsm8k_cot.accuracy(['none'], ['none']) == {'accuracy': 0.0}


def test_accuracy_of_what_was_written(config):
  dataset = iterators.EvalDataset(config)
  right = [
    e['targets'].rpartition('####')[2].strip() for e in dataset.examples()
  ]
  written = [f'I guess #### ${right[0]}.00', f'#### {right[0]}', '']

  got = dataset.metrics(conftest.as_tokens(dataset.vocabulary, written, 96))

  assert got == {'accuracy': pytest.approx(100 / 3)}


# --- What is refused ----------------------------------------------------------


def refused(config, match, **arguments):
  wrong = dataclasses.replace(config, task_arguments=arguments)
  with pytest.raises(ValueError, match=match):
    datasets.check_not_empty(wrong)


def test_a_file_that_is_not_there(config):
  files = {'train': 'no.jsonl'}
  refused(config, 'GSM8K_FILES: no.jsonl is not there', files=files)
  refused(config, 'GSM8K_SHOTS_FILE: no is not there', shots_file='no')


def test_a_split_that_does_not_exist(config, files):
  refused(config, "GSM8K_FILES must be {'train'", files={'dev': files['test']})
  refused(config, "GSM8K_FILES must be {'train'", files={})


def test_nothing_to_take_worked_examples_from(config, files):
  only_test = {'test': files['test']}
  refused(config, "GSM8K_FILES has no 'train'.*SHOTS_FILE", files=only_test)


def test_too_few_short_questions_for_worked_examples(config, files, tmp_path):
  few = write_json_lines(tmp_path / 'few.jsonl', TRAIN[:3])
  refused(
    config,
    'has only 2 such training questions.*Set GSM8K_SHOTS_FILE',
    files={**files, 'train': few},
  )


@pytest.mark.parametrize(
  ('line', 'match'),
  [
    ('{"question": "1?", "answer"', 'line 2 of .* is not JSON'),
    ('{"question": "1?"}', 'line 2 of .* has no "answer"'),
    ('{"question": "1?", "answer": 1}', '"answer" in line 2 of .* is int, not'),
    ('[1]', 'line 2 of .* is not a JSON object'),
  ],
)
def test_a_line_that_is_no_question_and_answer(
  config, files, tmp_path, line, match
):
  path = tmp_path / 'bad.jsonl'
  path.write_text(json.dumps(TEST[0]) + '\n' + line + '\n')

  refused(config, f'GSM8K_FILES: .*{match}', files={**files, 'test': str(path)})


def test_data_that_tfds_has_not_prepared(tmp_path, config, monkeypatch):
  monkeypatch.setattr('seqio.utils._TFDS_DATA_DIR_OVERRIDE', str(tmp_path))
  shots = write_json_lines(tmp_path / 'shots.jsonl', TRAIN[:1])

  refused(
    config,
    f'TFDS has no gsm8k:1.0.0 in {tmp_path}.*run: python -c ',
    shots_file=shots,
  )


def test_the_fragment_takes_files(run_main, tmp_path):
  finished = run_main(
    '--run_mode=eval',
    '--gin_file=gin/runs/eval.gin',
    '--gin_file=gin/tasks/gsm8k_cot.gin',
    "--gin.GSM8K_FILES={'test': 'nowhere.jsonl'}",
    f'--gin.CHECKPOINT_PATH={conftest.BYT5}',
    '--gin.EVAL_OUTPUT_DIR=x',
  )

  assert finished.code == 1
  assert "GSM8K_FILES has no 'train', from which the worked" in finished.err


# --- The real questions, with T5's own vocabulary -----------------------------


@pytest.fixture(scope='module')
def real(t5_vocabulary):
  if not conftest.GSM8K_TRAIN.is_file():
    pytest.skip(f'{conftest.GSM8K_TRAIN} is not there')
  return datasets.DatasetConfig(
    'gsm8k_cot',
    {'inputs': 512, 'targets': 320},
    batch_size=8,
    split='validation',
    shuffle=False,
    vocabulary=t5_vocabulary,
    task_arguments={'files': {'train': str(conftest.GSM8K_TRAIN)}},
  )


@pytest.fixture(scope='module')
def real_rows(real):
  lines = conftest.GSM8K_TRAIN.read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_every_final_answer_of_gsm8k_is_read(real_rows):
  answers = [gsm8k_cot.final_answer(r['answer']) for r in real_rows]

  assert len(answers) == 7473
  for answer, r in zip(answers, real_rows, strict=True):
    written = r['answer'].split('#### ')[1]
    assert answer == int(written.replace(',', ''))


def test_every_final_answer_survives_t5s_vocabulary(real_rows, t5_vocabulary):
  for r in real_rows[::10]:
    text = gsm8k_cot.strip_annotations(r['answer'])
    decoded = t5_vocabulary.decode(t5_vocabulary.encode(text))
    assert gsm8k_cot.final_answer(decoded) == gsm8k_cot.final_answer(text)


def test_every_annotation_of_gsm8k_is_stripped(real_rows):
  for r in real_rows:
    text = gsm8k_cot.strip_annotations(r['answer'])
    assert '<<' not in text and '>>' not in text
    kept = re.split('<<[^<>]*>>', r['answer'])
    assert text == ''.join(kept)


@pytest.mark.slow
def test_no_prompt_and_no_answer_of_gsm8k_is_cut_at_512_and_320(
  real, real_rows, tmp_path
):
  rows = [(row['question'], row['answer']) for row in real_rows]
  shots = gsm8k_cot.draw_shots(
    [row for row in rows if not gsm8k_cot._is_held_out(row)]
  )
  # Beside these the longest suffice: the others are much shorter.
  chosen = {*shots}
  for i in range(2):
    chosen.update(sorted(rows, key=lambda row, i=i: len(row[i]))[-250:])
  path = tmp_path / 'longest.jsonl'
  path.write_text(
    ''.join(json.dumps({'question': q, 'answer': a}) + '\n' for q, a in chosen)
  )
  longest = dataclasses.replace(
    real, task_arguments={'files': {'train': str(path)}}
  )
  examples = [
    example
    for split in ('train', 'validation')
    for example in datasets.get_task(dataclasses.replace(longest, split=split))
    .get_dataset(real.task_feature_lengths, split=split, shuffle=False)
    .as_numpy_iterator()
  ]

  assert len(examples) == len(chosen) - 4
  # What is cut has these lengths.
  assert max(len(example['inputs']) for example in examples) < 512
  assert max(len(example['targets']) for example in examples) < 320
  num_shots = [
    example['inputs_pretokenized'].count(b'Q: ') - 1 for example in examples
  ]
  assert sorted(set(num_shots)) == [3, 4]
  assert num_shots.count(3) == 1
