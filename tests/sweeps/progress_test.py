# SPDX-License-Identifier: Apache-2.0
import io
import json

import pytest

from gkd_jax.sweeps import progress
from tests import run_folders


def line(step, loss=0.5, rate=2.0):
  return {
    'step': step,
    'train/loss': loss,
    'train/steps_per_second': rate,
  }


@pytest.fixture
def folder(tmp_path):
  """A run of 1000 steps after its 600th; it was evaluated after its 500th."""
  return run_folders.write(
    tmp_path / 'run',
    lines=[line(500), line(600, 0.25)],
    curve={500: 60.0},
  )


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """Sets the time, in seconds."""
  times = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: times[0])

  def set_to(seconds):
    times[0] = seconds

  return set_to


def shown_on(stream, monkeypatch):
  monkeypatch.setattr('sys.stderr', stream)
  return progress.Progress(3, 1, 5)


def test_a_run_is_shown_by_its_step_loss_and_time_left(folder):
  assert progress.state(folder) == [
    'step 600/1000',
    'loss 0.2500',
    '3:20 left',
  ]
  assert progress.steps(folder) == (600, 1000)


def test_a_run_that_has_only_begun_is_starting(tmp_path):
  assert progress.state(tmp_path) == ['starting']
  run_folders.write(tmp_path / 'run')
  assert progress.state(tmp_path / 'run') == ['starting']


def test_after_its_last_step_a_run_is_evaluated(tmp_path):
  folder = run_folders.write(tmp_path / 'run', lines=[line(1000)])

  assert progress.state(folder) == ['step 1000/1000', 'evaluating']


def test_a_line_that_is_being_written_is_not_read(folder):
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 610, "train/lo')

  assert progress.steps(folder) == (600, 1000)


@pytest.mark.parametrize('best', ['greedy/wer', None])
def test_a_finished_run_is_shown_by_its_main_metric_and_kl(tmp_path, best):
  values = {
    'greedy/wer': 61.234,
    'greedy/per': 20.0,
    'on_student_outputs/reverse_kl': 0.3355,
  }
  folder = run_folders.write(tmp_path / 'run', values, BEST_METRIC=best)

  assert progress.measured(folder / 'eval_test.json') == [
    'WER % 61.23',
    'KL(student‖teacher) 0.3355',
  ]


def test_predictions_have_no_metrics(folder):
  assert progress.measured(folder / 'predictions_train.jsonl') == []


def test_without_a_terminal_a_short_line_a_minute_is_printed(
  folder, monkeypatch, clock
):
  stream = io.StringIO()
  shown = shown_on(stream, monkeypatch)

  for seconds in range(0, 130, 5):
    clock(seconds)
    if seconds == 70:
      shown.done('b', folder / 'eval_test.json', 60.0)
    shown.update({'a': folder})
  shown.close()

  assert stream.getvalue().splitlines() == [
    '[ 1:00] 1 of 3 runs done; a step 600/1000, loss 0.2500, 3:20 left',
    '[ 2:00] 2 of 3 runs done; a step 600/1000, loss 0.2500, 3:20 left',
  ]


def screen(text):
  """What a terminal shows after these characters: lines up, and clear."""
  lines = []
  for part in text.split('\x1b['):
    if part.startswith('J'):
      part = part[1:]
    elif part[1:] == 'F':
      del lines[-int(part[0]) :]
      continue
    lines += part.splitlines()
  return lines


def test_on_a_terminal_each_run_has_one_line(folder, monkeypatch, clock):
  stream = Terminal()
  shown = shown_on(stream, monkeypatch)

  for seconds in range(3):
    clock(seconds)
    shown.update({'a': folder, 'b': folder.parent})
  result = folder / 'eval_test.json'
  result.write_text(json.dumps({'greedy/wer': 50.0}))
  shown.done('a', result, 2.0)
  clock(3)
  shown.update({'b': folder.parent})

  first, second = screen(stream.getvalue())
  assert first == 'a      done  WER % 50.00  0:02'
  assert second == 'b      ········  starting'
  assert '█████···' in stream.getvalue()


def test_lines_are_not_longer_than_the_terminal(folder, monkeypatch, clock):
  monkeypatch.setenv('COLUMNS', '30')
  stream = Terminal()
  shown = shown_on(stream, monkeypatch)

  clock(1)
  shown.update({'a': folder})

  (only,) = screen(stream.getvalue())
  assert len(only) == 29


def test_messages_do_not_break_the_lines(folder, monkeypatch, clock):
  stream = Terminal()
  shown = shown_on(stream, monkeypatch)

  clock(1)
  shown.update({'a': folder})
  shown.log('b failed.')
  shown.close()

  assert screen(stream.getvalue()) == ['[ 0:01] b failed.']
