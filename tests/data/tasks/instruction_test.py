# SPDX-License-Identifier: Apache-2.0
import collections
import dataclasses
import json

import pytest
import seqio

from gkd_jax.data import datasets, iterators, vocabularies
from gkd_jax.data.tasks import _common
from tests import conftest, tfds

pytestmark = pytest.mark.slow  # reads data through seqio

LENGTHS = {'inputs': 96, 'targets': 32}
NUM_DOLLY = 200  # of which the last percent, 2, are validation


def natural(i, task_name='task001_ours', output='yes'):
  return {
    'id': str(i),
    'input': f'Is {i} a number?',
    'output': output,
    'source': 'ours',
    'task_name': task_name,
    'definition': 'Answer yes or no.',
  }


NATURAL = [
  *(natural(i) for i in range(97)),
  natural(97, 'task664_mmmlu_answer_generation_anatomy'),
  natural(98, 'task062_bigbench_repeat_copy_logic'),
  natural(99, output=''),
]
UNNATURAL = [
  {
    'id': str(i),
    'instruction': 'Repeat {INPUT}.',
    'instances': [
      {
        'input': f'{i}',
        'constraints': 'None.',
        'instruction_with_input': f'Repeat {i}.',
        'output': f'{i}',
      }
    ],
    'reformulations': [
      {
        'input': f'{i}',
        'instruction': 'Say again.',
        'instruction_with_input': f'Say {way}: {i}.',
        'output': f'{i}',
      }
      for way in ('again', 'twice')[: i % 3]  # none, one or two
    ],
  }
  for i in range(120)
]
DOLLY = [
  {
    'instruction': f'Name a fruit ({i}).',
    'context': 'Apples are fruits.' if i % 2 else '',
    'response': 'An apple.',
    'category': 'open_qa',
  }
  for i in range(NUM_DOLLY)
]


@pytest.fixture(scope='module')
def prepared(tfds_dir):
  for name, rows in (
    ('natural_instructions:1.0.1', NATURAL),
    ('unnatural_instructions:0.0.1', UNNATURAL),
    ('databricks_dolly:1.0.0', DOLLY),
  ):
    tfds.prepare_like(name, tfds_dir, {'train': rows})


@pytest.fixture(scope='module')
def config(prepared):
  def config(**arguments):
    return datasets.DatasetConfig(
      'instruction',
      LENGTHS,
      batch_size=50,
      vocabulary=vocabularies.byte(),
      task_arguments=arguments or None,
    )

  return config


def examples(config, split='train'):
  """All (inputs, targets) of the only source."""
  (task,) = datasets.get_task(config).tasks
  return [
    (e['inputs_pretokenized'].decode(), e['targets_pretokenized'].decode())
    for e in task.get_dataset(
      LENGTHS, split=split, shuffle=False
    ).as_numpy_iterator()
  ]


def shares(config, num_batches=24):
  """Percent of the training rows that come from each source."""
  iterator = iterators.TrainIterator(config, seed=0)
  count = collections.Counter()
  for _ in range(num_batches):
    for row in next(iterator).encoder_input_tokens:
      count[config.vocabulary.decode(row.tolist()).split()[0]] += 1
  count['Repeat'] += count.pop('Say', 0)
  total = sum(count.values())
  names = {'Answer': 'natural', 'Repeat': 'unnatural', 'Name': 'dolly'}
  return {names.get(k, k): 100 * n / total for k, n in count.items() if n}


def write_json_lines(path, num_rows):
  path.write_text(
    ''.join(
      json.dumps({'inputs': f'Mine {i}', 'targets': f'{i}', 'id': i}) + '\n'
      for i in range(num_rows)
    )
  )
  return str(path)


def test_natural_instructions_are_definition_and_input(config):
  got = examples(config(sources=['natural_instructions']))

  want = {(f'Answer yes or no.\n\nIs {i} a number?', 'yes') for i in range(97)}
  assert set(got) < want
  # 99 rows are train, and three of all 100 are left out: those of the two
  # benchmarks, and the one without an output.
  assert 96 <= len(got) <= 97


def test_mmlu_and_big_bench_are_not_trained_on(config):
  got = examples(config(sources=['natural_instructions']))
  got += examples(config(sources=['natural_instructions']), 'validation')

  asked = {inputs.split('Is ')[1] for inputs, _ in got}
  assert not asked & {'97 a number?', '98 a number?'}
  assert len(asked) == 97


def test_unnatural_instructions_are_all_ways_to_say_them(config):
  got = examples(config(sources=['unnatural_instructions']))

  by_number = collections.defaultdict(set)
  for inputs, targets in got:
    by_number[int(targets)].add(inputs)
  assert len(by_number) == 118 or len(by_number) == 119
  for i, ways in by_number.items():
    all_ways = (f'Repeat {i}.', f'Say again: {i}.', f'Say twice: {i}.')
    assert ways == set(all_ways[: 1 + i % 3])


def test_dolly_is_instruction_and_context_if_there_is_one(config):
  got = dict(examples(config(sources=['databricks_dolly'])))

  for i, row in enumerate(DOLLY):
    asked = row['instruction'] + (i % 2) * '\n\nApples are fruits.'
    assert got.pop(asked, 'An apple.') == 'An apple.'
  assert got == {}


def test_the_last_percent_is_validation(config):
  dolly = config(sources=['databricks_dolly'])
  train, validation = (examples(dolly, s) for s in ('train', 'validation'))

  assert (len(train), len(validation)) == (198, 2)
  assert not set(train) & set(validation)


@pytest.mark.slow
def test_sources_are_drawn_from_in_proportion_to_their_examples(config):
  # 99, 119 and 198 examples; the shares of 1200 rows have standard errors of
  # up to 1.5. Four of them.
  want = {'natural': 23.8, 'unnatural': 28.6, 'dolly': 47.6}
  assert shares(config()) == pytest.approx(want, abs=6)


@pytest.mark.slow
def test_a_source_counts_as_the_maximum_at_most(config, tmp_path):
  few = write_json_lines(tmp_path / 'few.jsonl', 25)

  got = shares(
    config(
      sources=['natural_instructions', 'databricks_dolly'],
      files={'mine': few},
      maximum=50,
    )
  )

  want = {'natural': 40, 'dolly': 40, 'Mine': 20}
  assert got == pytest.approx(want, abs=6)


def test_json_lines_alone_are_enough(config, tmp_path, monkeypatch):
  path = write_json_lines(tmp_path / 'mine.jsonl', 3)
  # No data of TFDS is there.
  monkeypatch.setattr('seqio.utils._TFDS_DATA_DIR_OVERRIDE', str(tmp_path))

  mine = config(sources=[], files={'mine': path})

  assert examples(mine) == [(f'Mine {i}', f'{i}') for i in range(3)]
  datasets.check_not_empty(mine)
  next(iterators.TrainIterator(mine, seed=0))


def test_a_single_source_can_be_evaluated(config):
  dolly = dataclasses.replace(
    config(sources=['databricks_dolly']), split='validation', batch_size=2
  )
  dataset = iterators.EvalDataset(dolly)

  got = dataset.metrics(
    conftest.as_tokens(dataset.vocabulary, ['An apple.', 'One apple'], 32)
  )

  # ROUGE-L of the second: one of two words on either side.
  assert got == {'exact_match': 50.0, 'rougeL': pytest.approx(75.0)}


def test_metrics_of_empty_predictions():
  got = _common.exact_match_and_rouge(['a', 'b'], ['', ''])

  assert got['exact_match'] == got['rougeL'] == 0.0


def test_the_task_of_a_source_keeps_the_mixtures_t5_vocabulary():
  mixture = seqio.MixtureRegistry.get('instruction')

  assert len(mixture.tasks) == 3
  (vocabulary,) = {
    feature.vocabulary.sentencepiece_model_file
    for task in mixture.tasks
    for feature in task.output_features.values()
  }
  assert vocabulary.startswith('gs://t5-data/')


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [
    (
      {'sources': ['dolly']},
      r"INSTRUCTION_SOURCES: \['dolly'\] is none of nat",
    ),
    ({'sources': 'databricks_dolly'}, 'INSTRUCTION_SOURCES must be a list'),
    ({'sources': []}, 'The mixture is empty: set INSTRUCTION_SOURCES'),
    ({'files': {'mine': 'no.jsonl'}}, 'FILES: no.jsonl is not there'),
    ({'files': {'databricks_dolly': 'x'}}, 'is also in INSTRUCTION_SOURCES'),
    ({'maximum': 0}, 'INSTRUCTION_MAXIMUM must be a positive whole number'),
  ],
)
def test_wrong_arguments_are_refused(config, arguments, match):
  with pytest.raises(ValueError, match=match):
    datasets.get_task(config(**arguments))


def test_a_line_without_targets_is_refused(config, tmp_path):
  path = tmp_path / 'bad.jsonl'
  path.write_text('{"inputs": "x"}\n')

  with pytest.raises(
    ValueError, match=r"INSTRUCTION_FILES\['mine'\]: line 1.*no \"targets\""
  ):
    datasets.check_not_empty(config(sources=[], files={'mine': str(path)}))


def test_a_source_that_tfds_has_not_prepared(config, tmp_path, monkeypatch):
  monkeypatch.setattr('seqio.utils._TFDS_DATA_DIR_OVERRIDE', str(tmp_path))
  fresh = config(sources=['databricks_dolly'], maximum=7)

  with pytest.raises(ValueError, match='TFDS has no databricks_dolly:1.0.0 in'):
    datasets.check_not_empty(fresh)


def test_the_fragment_chooses_sources(run_main):
  finished = run_main(
    '--run_mode=eval',
    '--gin_file=gin/runs/eval.gin',
    '--gin_file=gin/tasks/instruction.gin',
    "--gin.INSTRUCTION_SOURCES=['flan']",
    f'--gin.CHECKPOINT_PATH={conftest.BYT5}',
    '--gin.EVAL_OUTPUT_DIR=x',
  )

  assert finished.code == 1
  assert "INSTRUCTION_SOURCES: ['flan'] is none of" in finished.err
