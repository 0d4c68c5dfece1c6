# SPDX-License-Identifier: Apache-2.0
import hashlib
import itertools
import re
import runpy

import numpy as np
import pytest
import seqio

from gkd_jax.data.tasks import arithmetic_cot

pytestmark = pytest.mark.slow  # reads data through seqio

LENGTHS = {'inputs': 16, 'targets': 48}


@pytest.fixture(scope='module')
def rows():
  """Returns all examples: split -> [(expression, target)]."""
  source = seqio.get_mixture_or_task('arithmetic_cot').source
  return {
    split: [
      (expression.decode(), target.decode())
      for batch in source.get_dataset(split, shuffle=False)
      .batch(4096)
      .as_numpy_iterator()
      for expression, target in zip(
        batch['inputs'], batch['targets'], strict=True
      )
    ]
    for split in ('train', 'validation', 'test')
  }


def model_batches(split, lengths=LENGTHS, **kwargs):
  return seqio.get_dataset(
    'arithmetic_cot',
    lengths,
    dataset_split=split,
    feature_converter=seqio.EncDecFeatureConverter(pack=False),
    **kwargs,
  ).as_numpy_iterator()


def test_chain_of_thought_of_the_documented_example():
  got = arithmetic_cot.chain_of_thought('38-57-10+5')

  assert got == '38-57=-19 -19-10=-29 -29+5=-24 #### -24'


def test_every_chain_of_thought_is_true_and_leads_to_the_answer(rows):
  for split in rows:
    for expression, target in rows[split][::50]:
      steps, answer = target.split(' #### ')
      total = int(re.match(r'\d+', expression)[0])
      for step in steps.split(' '):
        left, result = step.split('=')
        assert left.startswith(str(total)), target
        assert eval(left) == int(result), target
        total = int(result)
      assert len(steps.split(' ')) == len(re.findall('[+-]', expression))
      assert int(answer) == total == eval(expression), (expression, target)


def test_expressions_have_two_to_four_terms_of_one_or_two_digits(rows):
  num_terms = set()
  for expression, _ in itertools.chain(*rows.values()):
    assert re.fullmatch(r'(0|[1-9]\d?)([+-](0|[1-9]\d?)){1,3}', expression)
    num_terms.add(len(re.split('[+-]', expression)))

  assert num_terms == {2, 3, 4}


def test_no_expression_occurs_twice_within_or_across_splits(rows):
  expressions = [expression for split in rows for expression, _ in rows[split]]

  assert len(set(expressions)) == len(expressions)


def test_splits_have_the_declared_sizes(rows):
  num_examples = {split: len(rows[split]) for split in rows}
  source = seqio.get_mixture_or_task('arithmetic_cot').source

  assert num_examples == {'train': 50_000, 'validation': 1_000, 'test': 2_000}
  for split in rows:
    assert source.num_input_examples(split) == num_examples[split]


def test_splits_are_equally_long(rows):
  mean = {
    split: np.mean([len(target) for _, target in rows[split]]) for split in rows
  }

  # A target has 27 +- 7 characters: a mean of 1000 has a standard error of
  # 0.22, one of 2000 has 0.16. Four of them.
  assert mean['validation'] == pytest.approx(mean['train'], abs=0.9)
  assert mean['test'] == pytest.approx(mean['train'], abs=0.65)


def test_examples_are_the_same_on_every_machine(rows):
  text = '\n'.join(f'{e} {t}' for split in rows for e, t in rows[split])

  # Changes only together with every published result on this task.
  golden = '75471d4b07213006b83c5949fc34969158eabdc9ca50c083bc52238f985516d8'
  assert hashlib.sha256(text.encode()).hexdigest() == golden


def test_importing_the_module_generates_nothing(monkeypatch):
  added = []
  monkeypatch.setattr(
    seqio.TaskRegistry, 'add', lambda name, *args, **kwargs: added.append(name)
  )

  module = runpy.run_path(arithmetic_cot.__file__)

  assert added == ['arithmetic_cot']
  assert module['expressions'].cache_info().misses == 0


def test_encoded_targets_are_bytes_then_eos_then_padding(rows):
  example = next(model_batches('test', shuffle=False))

  want = [ord(c) + 3 for c in rows['test'][0][1]] + [1]
  got = example['decoder_target_tokens']
  np.testing.assert_array_equal(got[: len(want)], want)
  np.testing.assert_array_equal(got[len(want) :], 0)


def test_lengths_16_and_48_truncate_nothing(rows):
  everything = [row for split in rows for row in rows[split]]

  # One more for EOS.
  assert max(len(expression) for expression, _ in everything) + 1 == 12
  assert max(len(target) for _, target in everything) + 1 == 45


@pytest.mark.slow
def test_the_same_seed_gives_the_same_order():
  def first_50(seed):
    batches = model_batches('train', shuffle=True, seed=seed)
    return [
      tuple(example['encoder_input_tokens'])
      for example in itertools.islice(batches, 50)
    ]

  order = first_50(0)

  assert order == first_50(0)
  assert order != first_50(1)


def test_accuracies_of_a_hand_computed_example():
  answers_and_predictions = [
    ('-24', '38-57=-19 -19-10=-29 -29+5=-24 #### -24'),  # right; 3 of 3 steps
    ('3', '1+2=4 #### 3'),  # right in spite of its step; 0 of 1
    ('-2', '5-7=-2 #### 2'),  # the sign is lost at the end; 1 of 1
    ('18', '9+9=18'),  # no answer; 1 of 1
    ('7', 'seven'),  # no answer, no step
  ]
  targets = [f'1+1=2 #### {answer}' for answer, _ in answers_and_predictions]
  predictions = [prediction for _, prediction in answers_and_predictions]

  got = arithmetic_cot.accuracies(targets, predictions)

  assert got == {'accuracy': 40.0, 'steps_correct': 100 * 5 / 6}
  assert all(type(value) is float for value in got.values())  # for JSON


@pytest.mark.parametrize(
  'text',
  [
    '',
    '####',
    '#### ',
    '3',
    '#### three',
    '#### 3.0',
    '#### 3 4',
    '#### --3',
    '#### \N{SUPERSCRIPT THREE}',
    '#### \N{ARABIC-INDIC DIGIT THREE}',
    '#### 3 ####',
    '#### ' + 5000 * '3',  # int() raises
  ],
)
def test_an_unreadable_answer_is_wrong(text):
  assert arithmetic_cot.accuracies(['#### 3'], [text])['accuracy'] == 0.0


@pytest.mark.parametrize(
  'text',
  ['#### 3', '####3', '#### 03\n', '#### 4 #### 3', '#### \x1f3'],
)
def test_the_last_answer_counts_as_a_number(text):
  assert arithmetic_cot.accuracies(['#### 3'], [text])['accuracy'] == 100.0


def test_an_unreadable_target_is_never_matched():
  got = arithmetic_cot.accuracies(['three'], ['three'])

  assert got == {'accuracy': 0.0, 'steps_correct': 0.0}


@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('1+2=3 3-4=-1', [True, True]),
    ('1+2=3 3-4=1', [True, False]),
    ('-1-2=-3 -1+2=-3', [True, False]),
    ('1+2=3+4=7', [False]),
    ('1+2= 3', [False]),
    ('=3', [False]),
    ('1+1+1=3', [False]),
    ('3=3', [False]),
    ('1*3=3', [False]),
    (5000 * '1' + '+0=1', [False]),  # int() raises
    ('0+' + 5000 * '1' + '=1', [False]),
    ('0+1=' + 5000 * '1', [False]),
    ('#### 3', []),
  ],
)
def test_equations_are_true_only_if_well_formed(text, want):
  assert arithmetic_cot.equations(text) == want


def test_evaluator_reports_the_accuracies():
  evaluator = seqio.Evaluator(
    'arithmetic_cot',
    feature_converter=seqio.EncDecFeatureConverter(pack=False),
    eval_split='validation',
    sequence_length=LENGTHS,
    num_examples=40,
    async_compute_metrics=False,
  )

  def predict_target_but_ten_times_nothing(dataset):
    return [
      (i, example['decoder_target_tokens'] * (i >= 10))
      for i, example in dataset.as_numpy_iterator()
    ]

  metrics, _ = evaluator.evaluate(
    compute_metrics=True, predict_fn=predict_target_but_ten_times_nothing
  )

  assert metrics.result()['arithmetic_cot'] == {
    'accuracy': 75.0,
    'steps_correct': 100.0,
  }
