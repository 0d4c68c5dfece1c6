# SPDX-License-Identifier: Apache-2.0
import json
import math
import resource
import subprocess

import PIL.Image
import pytest

from tests import conftest

METHODS = [
  'teacher',
  'initial_student',
  'sft',
  'supervised_kd',
  'imitkd',
  'on_policy_gkd_forward_kl',
]
# As the table has them.
NAMES = [
  'teacher',
  'initial student',
  'SFT',
  'supervised KD',
  'ImitKD',
  'on-policy GKD, forward KL',
]

pytestmark = pytest.mark.slow


def run(*command):
  return subprocess.run(
    command, cwd=conftest.ROOT, capture_output=True, text=True
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('quickstart')


@pytest.fixture(scope='module')
def command(folder):
  return ('scripts/quickstart', '--smoke', f'--gin.MODEL_DIR={folder}')


@pytest.fixture(scope='module')
def finished(command):
  """The quickstart with few steps; creates .venv if it does not exist."""
  setup = run('scripts/setup.sh')
  if setup.returncode:
    pytest.skip(f'.venv cannot be made here: {setup.stderr[-300:]}')
  return run(*command)


@pytest.fixture(scope='module')
def results(finished, folder):
  assert finished.returncode == 0, finished.stderr

  def refuse(constant):
    raise AssertionError(f'results.json holds {constant}')

  text = (folder / 'results.json').read_text()
  return json.loads(text, parse_constant=refuse)


def table_of(finished):
  """Returns the cells of the printed table, without the line of dashes."""
  rows = [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in finished.stdout.splitlines()
    if line.startswith('|')
  ]
  return [rows[0], *rows[2:]]


def test_the_quickstart_ends_well(finished):
  assert finished.returncode == 0, finished.stderr


def test_results_have_a_row_for_each_method(results):
  assert [row['method'] for row in results['methods']] == METHODS


def test_a_row_has_error_rates_and_the_share_of_the_gap(results):
  for row in results['methods']:
    assert 0.0 <= row['wer'] <= 100.0
    assert 0.0 <= row['sampled_wer'] <= 100.0
    # Too long pronunciations can have more errors than phonemes.
    assert 0.0 <= row['per'] < 1000.0
    if row['method'] == 'teacher':
      continue
    assert row['kl_on_student_outputs'] > 0.0
    assert row['gap_closed'] is None or math.isfinite(row['gap_closed'])


def test_the_table_is_printed(finished, results):
  head, *rows = table_of(finished)

  assert head[0] == 'method' and head[-1] == 'seconds'
  # After so few steps there may be no gap to close.
  assert {'WER %', 'PER %', 'KL(student‖teacher)'} <= {*head}
  assert [row[0] for row in rows] == NAMES
  wer = head.index('WER %')
  assert [row[wer] for row in rows] == [
    f'{row["wer"]:.2f}' for row in results['methods']
  ]


def test_the_page_is_printed_first_and_the_finding_last(finished, folder):
  first, *_, last = finished.stdout.splitlines()

  assert first == f'Report:  {folder / "report.html"}'
  assert last.startswith('Found: ') and '(one seed)' in last


def test_report_figures_and_checkpoints_are_there(finished, folder):
  assert finished.returncode == 0, finished.stderr
  for name in ('report.md', 'report.html', 'report.json'):
    assert (folder / name).is_file()
  with PIL.Image.open(folder / 'methods.png') as picture:
    picture.verify()
  assert list(folder.glob('method=imitkd/seed_0/checkpoint_*'))


def test_without_a_terminal_there_is_a_short_line_a_minute(finished):
  lines = finished.stderr.splitlines()

  assert all(len(line) < 200 for line in lines)
  assert not any('validation/' in line for line in lines)


def test_run_again_it_skips_everything_and_shows_the_same(
  finished, results, command
):
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  again = run(*command)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)

  assert again.returncode == 0, again.stderr
  assert '6 of 6 runs are done already.' in again.stderr
  assert table_of(again) == table_of(finished)
  # Of the processor: the machine may be busy.
  seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  assert seconds < 20.0


def test_help_says_what_it_does_and_how_long_it_takes():
  shown = run('scripts/quickstart', '--help')

  assert shown.returncode == 0
  assert 'minutes' in shown.stdout
  assert 'runs/quickstart' in shown.stdout
