# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from gkd_jax.report import results, runs, sections
from tests import run_folders
from tests.run_folders import SFT, gkd

# Greedy WER by seed; the teacher's is 20.
WER = {
  'teacher': 20.0,
  'initial': (SFT, [60.0, 70.0, 80.0]),
  'sft': (SFT, [50.0, 50.0, 65.0]),
  'on_policy': (gkd(1.0), [30.0, 40.0, 20.0]),
}


def of_seed(seed):
  return {
    name: value if name == 'teacher' else (value[0], [value[1][seed]])
    for name, value in WER.items()
  }


def rows_of(folder, wer):
  run_folders.study(folder, wer)
  return read(folder)


def read(folder):
  found, _ = runs.find(str(folder))
  made = results.rows(sections.make(found))
  return {row['method']: row for row in made['methods']}, made['runs']


@pytest.fixture(scope='module')
def of_seeds(tmp_path_factory):
  return rows_of(tmp_path_factory.mktemp('three'), WER)


def test_a_row_has_what_its_run_measured(tmp_path):
  rows, _ = rows_of(tmp_path, of_seed(0))

  assert list(rows) == [
    'teacher',
    'initial_student',
    'sft',
    'on_policy_gkd_forward_kl',
  ]
  assert rows['on_policy_gkd_forward_kl'] == {
    'method': 'on_policy_gkd_forward_kl',
    'task': 'cmudict_g2p',
    'split': 'test',
    'seeds': 1,
    'wer': 30.0,
    'sampled_wer': 40.0,
    'kl_on_student_outputs': 0.3,
    'steps': 1000,
    'seconds': 9.5,
    'gap_closed': (60 - 30) / 40,
  }


def test_the_gap_is_the_initial_students_and_the_teacher_has_none(tmp_path):
  rows, _ = rows_of(tmp_path, of_seed(0))

  assert rows['initial_student']['gap_closed'] == 0.0
  assert rows['sft']['gap_closed'] == (60 - 50) / 40
  assert 'gap_closed' not in rows['teacher']


def test_a_method_that_does_harm_closes_less_than_nothing(tmp_path):
  rows, _ = rows_of(tmp_path, of_seed(0) | {'sft': (SFT, [70.0])})

  assert rows['sft']['gap_closed'] == -0.25


def test_without_a_gap_there_is_no_share_of_it(tmp_path):
  rows, _ = rows_of(tmp_path, of_seed(0) | {'teacher': 60.0})

  assert rows['sft']['gap_closed'] is None


def test_several_seeds_give_means_and_standard_errors(of_seeds):
  rows, _ = of_seeds
  row = rows['on_policy_gkd_forward_kl']

  assert row['seeds'] == 3
  # 30, 40, 20: mean 30, squared deviations 0 + 100 + 100 over n - 1 = 2.
  assert row['wer'] == 30.0
  assert row['wer_se'] == pytest.approx(10.0 / math.sqrt(3))
  # Shares are taken seed by seed.
  shares = [30 / 40, 30 / 50, 60 / 60]
  assert row['gap_closed'] == pytest.approx(sum(shares) / 3)
  assert row['gap_closed_se'] > 0.0
  assert rows['teacher']['seeds'] == 1


def test_every_single_run_is_in_the_results_too(of_seeds):
  _, of_runs = of_seeds

  assert [(r['method'], r['seed'], r['wer']) for r in of_runs] == [
    ('teacher', 0, 20.0),
    ('initial_student', 0, 60.0),
    ('initial_student', 1, 70.0),
    ('initial_student', 2, 80.0),
    ('sft', 0, 50.0),
    ('sft', 1, 50.0),
    ('sft', 2, 65.0),
    ('on_policy_gkd_forward_kl', 0, 30.0),
    ('on_policy_gkd_forward_kl', 1, 40.0),
    ('on_policy_gkd_forward_kl', 2, 20.0),
  ]


def test_the_initial_students_divergence_is_from_an_evaluation_of_it(tmp_path):
  run_folders.study(tmp_path, of_seed(0))
  initial = tmp_path / 'seed_0' / 'initial'
  run_folders.evaluation(
    tmp_path / 'with_teacher',
    {
      'checkpoint': f'{initial}/checkpoint_1000',
      'task': 'cmudict_g2p',
      'greedy/wer': 60.0,
      'on_student_outputs/reverse_kl': 0.6,
      'on_dataset_outputs/reverse_kl': 0.4,
    },
  )

  rows, _ = read(tmp_path)

  assert rows['initial_student']['kl_on_student_outputs'] == 0.6
  assert rows['initial_student']['kl_on_dataset_outputs'] == 0.4
  assert 'kl_on_student_outputs' not in rows['teacher']


@pytest.mark.parametrize(
  ['name', 'expected'],
  [
    ('supervised KD, JSD(0.9)', 'supervised_kd_jsd_0.9'),
    ('initial student', 'initial_student'),
    ('SFT', 'sft'),
  ],
)
def test_a_method_is_named_by_an_identifier(name, expected):
  assert results.identifier(name) == expected
