# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from gkd_jax.runtime import console
from gkd_jax.runtime import metrics as metrics_lib
from tests import conftest


def write_steps(run_dir, steps, first_step=0, offset=0.0):
  writer = metrics_lib.MetricWriter(run_dir, first_step)
  for step in steps:
    writer.write(step, {'loss': step + offset})
  writer.close()


# --- JSON lines -------------------------------------------------------------


def test_what_was_written_is_read_back(tmp_path):
  writer = metrics_lib.MetricWriter(tmp_path, 0)
  writer.write(10, {'train/loss': 0.5})
  writer.write(10, {'validation/wer': 40.0, 'validation/per': 9.0})
  writer.close()

  assert metrics_lib.read(tmp_path) == [
    {'step': 10, 'train/loss': 0.5},
    {'step': 10, 'validation/wer': 40.0, 'validation/per': 9.0},
  ]


def test_a_line_can_be_read_before_the_writer_is_closed(tmp_path):
  writer = metrics_lib.MetricWriter(tmp_path, 0)

  writer.write(1, {'loss': 2.0})

  assert metrics_lib.read(tmp_path) == [{'step': 1, 'loss': 2.0}]
  writer.close()


def test_a_run_without_metrics_has_none(tmp_path):
  assert metrics_lib.read(tmp_path) == []


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(tmp_path):
  write_steps(tmp_path, [1, 2, 3, 4, 5])

  write_steps(tmp_path, [4, 5, 6], first_step=3, offset=0.25)

  assert [(m['step'], m['loss']) for m in metrics_lib.read(tmp_path)] == [
    (1, 1.0),
    (2, 2.0),
    (3, 3.0),
    (4, 4.25),
    (5, 5.25),
    (6, 6.25),
  ]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
  write_steps(tmp_path, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 2, "lo')

  write_steps(tmp_path, [3], first_step=2)

  assert [m['step'] for m in metrics_lib.read(tmp_path)] == [1, 2, 3]


def test_a_line_that_was_cut_off_is_not_read(tmp_path):
  write_steps(tmp_path, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 3, "lo')

  assert [m['step'] for m in metrics_lib.read(tmp_path)] == [1, 2]


@pytest.mark.parametrize('garbage', [b'\xff\x00', b'\x0b', b'\xe2\x80\xa8'])
def test_a_line_in_the_middle_that_was_damaged_is_left_out(
  tmp_path, capsys, garbage
):
  write_steps(tmp_path, [1, 2, 3])
  path = tmp_path / 'metrics.jsonl'
  damaged = path.read_bytes().replace(b'"step": 2', b'"st' + garbage)
  path.write_bytes(damaged)

  write_steps(tmp_path, [4], first_step=3)

  assert [m['step'] for m in metrics_lib.read(tmp_path)] == [1, 3, 4]
  assert (tmp_path / 'damaged_metrics.jsonl').read_bytes() == damaged
  assert '1 unreadable lines' in capsys.readouterr().err


def test_a_whole_last_line_without_its_newline_counts_as_cut_off(tmp_path):
  # Otherwise the next line would be appended to it.
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n{"step": 2}')

  write_steps(tmp_path, [2], first_step=2)

  assert metrics_lib.read(tmp_path) == [{'step': 1}, {'step': 2, 'loss': 2.0}]


# --- TensorBoard ------------------------------------------------------------


def test_tensorboard_gets_the_same_scalars_and_the_texts(tmp_path):
  writer = metrics_lib.MetricWriter(tmp_path, 0)
  writer.write(10, {'train/loss': 0.5, 'train/grad_norm': 2.0})
  writer.text(20, 'samples', '| input |')
  writer.close()

  board = conftest.read_board(tmp_path)

  assert (10, 'train/loss', 0.5) in board
  assert (10, 'train/grad_norm', 2.0) in board
  (text,) = [v for step, tag, v in board if 'samples' in tag and step == 20]
  assert text == '| input |'


def test_tensorboard_is_told_to_forget_what_will_be_written_again(tmp_path):
  from tensorboardX.proto import event_pb2

  write_steps(tmp_path, [4], first_step=3)

  # An event with this status makes TensorBoard drop its step and all after it.
  (path,) = tmp_path.glob('events.out.tfevents.*')
  starts = [
    event.step
    for event in conftest.board_events(path)
    if event.session_log.status == event_pb2.SessionLog.START
  ]
  assert starts == [4]


# --- Progress ---------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
  """Time that the test sets, in seconds."""
  now = [100.0]
  monkeypatch.setattr(metrics_lib.time, 'monotonic', lambda: now[0])
  return now


def update(progress, step):
  progress.update(step, loss=0.5, on_policy=0.25, tokens_per_second=12345.6)


def test_without_a_terminal_progress_is_plain_lines(clock, capsys):
  progress = console.Progress(100, 0, every_seconds=10)
  clock[0] += 20
  update(progress, 10)
  progress.close()

  # 20 s for 10 steps, so 180 s for the other 90.
  assert capsys.readouterr().err == (
    'step 10/100  loss 0.5000  on-policy 25%  12,346 target tokens/s  3:00 left'
    '\n'
  )


def test_plain_lines_are_not_written_more_often_than_asked(clock, capsys):
  progress = console.Progress(100, 0, every_seconds=10)
  for step in range(1, 31):  # one a second
    clock[0] += 1
    update(progress, step)

  lines = capsys.readouterr().err.splitlines()
  assert [line.split()[1] for line in lines] == ['10/100', '20/100', '30/100']


def test_the_last_step_always_has_its_line(clock, capsys):
  progress = console.Progress(7, 0, every_seconds=10)
  for step in range(1, 8):
    update(progress, step)

  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('step 7/7 ') and line.endswith(' 0:00 left')


def test_time_left_counts_from_where_the_run_goes_on(clock, capsys):
  progress = console.Progress(100, 80, every_seconds=10)
  clock[0] += 15
  update(progress, 90)

  # 15 s for 10 steps, so as much for the other 10.
  assert capsys.readouterr().err.endswith(' 0:15 left\n')


def test_on_a_terminal_progress_is_a_bar(monkeypatch, capsys):
  monkeypatch.setattr('sys.stderr.isatty', lambda: True)
  progress = console.Progress(100, 40, every_seconds=0)
  update(progress, 50)
  progress.close()

  written = capsys.readouterr().err
  assert not re.search('^step ', written, re.MULTILINE)
  last = written.split('\r')[-1]
  for part in (
    'loss 0.5000',
    'on-policy 25%',
    '12,346 target',
    '50/100',
    '50%',
  ):
    assert part in last, last


def test_text_said_meanwhile_goes_to_stderr_on_lines_of_its_own(
  monkeypatch, capsys
):
  monkeypatch.setattr('sys.stderr.isatty', lambda: True)
  progress = console.Progress(100, 0, every_seconds=0)
  console.log('hello')
  progress.close()

  written = capsys.readouterr()
  assert written.out == ''
  assert 'hello' in re.split('[\r\n]', written.err)


@pytest.mark.parametrize(
  'name, mode',
  [
    ('wer', 'min'),
    ('accuracy', 'max'),
    ('rouge2', 'max'),
    ('bleu', 'max'),
    ('greedy/wer', 'min'),
    ('sampled/rougeL', 'max'),
    ('my_metric', None),
    ('greedy/my_metric', None),
  ],
)
def test_which_way_is_better_is_known_of_common_metrics(name, mode):
  assert metrics_lib.better(name) == mode
