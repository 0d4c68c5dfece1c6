# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from gkd_jax.report import tables
from gkd_jax.report.tables import Column, Mean


def test_a_mean_has_the_standard_error_of_the_sample():
  mean = tables.mean([50.0, 52.0, 57.0])

  # Mean 53; squared deviations 9 + 1 + 16 over n - 1 = 2: 13; over n = 3.
  assert mean.value == pytest.approx(53.0)
  assert mean.error == pytest.approx(math.sqrt(13.0 / 3.0))
  assert mean.count == 3


def test_one_value_has_no_standard_error():
  assert tables.mean([4.0]) == Mean(4.0, None, 1)


def test_a_run_that_lacks_a_metric_leaves_no_mean():
  assert tables.mean([4.0, None]) is None
  assert tables.mean([]) is None


@pytest.mark.parametrize(
  'mean, text',
  [
    (Mean(12.345, 0.567, 3), '12.35 ± 0.57'),
    (Mean(12.345, None, 1), '12.35'),
    (None, ''),
  ],
)
def test_a_mean_is_written_with_its_error(mean, text):
  assert tables.format_mean(mean, '{:.2f}') == text


def test_cells_are_scaled_and_without_what_was_not_measured():
  columns = [
    Column('gap %', 'gap', '{:.1f}', 100.0),
    Column('steps', 'step', '{:.0f}', with_error=False),
  ]
  named = [('a', {'gap': Mean(0.25, 0.015, 2), 'step': Mean(7.0, 1.0, 2)})]

  assert tables.cells(columns, [*named, ('b', {})]) == [
    ['method', 'gap %', 'steps'],
    ['a', '25.0 ± 1.5', '7'],
    ['b', '', ''],
  ]


def test_the_best_is_the_least_or_the_most():
  named = [
    ('a', {'wer': Mean(9.0, None, 1)}),
    ('b', {'wer': Mean(7.0, None, 1)}),
    ('c', {}),
  ]

  assert tables.best(Column('', 'wer', better='min'), named) == 'b'
  assert tables.best(Column('', 'wer', better='max'), named) == 'a'
  assert tables.best(Column('', 'wer'), named) is None


def test_of_two_that_are_equal_none_is_the_best():
  named = [('a', {'wer': Mean(9.0, 0.1, 2)}), ('b', {'wer': Mean(9.0, 2.0, 2)})]

  assert tables.best(Column('', 'wer', better='min'), named) is None


def test_one_alone_is_not_the_best():
  named = [('a', {'wer': Mean(9.0, None, 1)})]

  assert tables.best(Column('', 'wer', better='min'), named) is None


def test_a_markdown_table_is_aligned_and_bars_do_not_break_it():
  table = tables.markdown([['method', 'n'], ['a|b', '12']])

  assert table.splitlines() == [
    '| method | n  |',
    '|--------|----|',
    '| a\\|b   | 12 |',
  ]


@pytest.mark.parametrize(
  'metric, head, axis',
  [
    ('greedy/wer', 'WER %', 'WER %, greedy'),
    ('sampled/wer', 'WER % at T=1', 'WER %, sampled at T=1'),
    (
      'sampled_0.5/accuracy',
      'accuracy % at T=0.5',
      'accuracy %, sampled at T=0.5',
    ),
    ('beam/bleu', 'BLEU, beam', 'BLEU, beam'),
    ('greedy/rougeLsum', 'ROUGE-Lsum', 'ROUGE-Lsum, greedy'),
    ('greedy/my_metric', 'my_metric', 'my_metric, greedy'),
    (
      'on_student_outputs/nll',
      'nll, on student outputs',
      'nll, on student outputs',
    ),
  ],
)
def test_metrics_are_called_by_their_usual_names(metric, head, axis):
  assert tables.head(metric) == head
  assert tables.axis_label(metric) == axis
