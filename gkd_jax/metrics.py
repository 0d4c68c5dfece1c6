# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: JSON lines, TensorBoard, and the terminal."""

import json
import os
import pathlib
import shutil
import sys
import time

import tqdm
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from gkd_jax import hosts

_FLUSH_SECONDS = 120.0


class MetricWriter:
  """Appends scalars to a folder's `metrics.jsonl` and TensorBoard file.

  The first host does.
  """

  def __init__(self, run_dir: str | os.PathLike, first_step: int):
    """Opens both.

    Args:
      run_dir: of the run.
      first_step: the run goes on after this step: what an interrupted run
        wrote beyond it will be written again, and is dropped.
    """
    self._file = self._board = None
    if not hosts.is_first():
      return
    path = pathlib.Path(run_dir) / 'metrics.jsonl'
    if path.exists():
      _keep_through_step(path, first_step)
    # Nothing is kept back that would be written when the file is closed.
    self._file = path.open('ab', buffering=0)
    # tensorboardX's SummaryWriter has a thread that writes. It would die of a
    # full disk, and whoever writes next would wait for it without end.
    self._board = event_file_writer.EventsWriter(
      os.path.join(run_dir, 'events')
    )
    self._flush_at = 0.0
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(step=first_step + 1, session_log=start)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Writes the scalars of a step, at once visible to others."""
    if self._file is None:
      return
    line = (json.dumps({'step': step, **scalars}) + '\n').encode()
    while line:
      line = line[self._file.write(line) :]
    for name, value in scalars.items():
      self._add(step=step, summary=summary.scalar(name, value))

  def text(self, step: int, name: str, markdown: str) -> None:
    """Writes a text to TensorBoard."""
    if self._board is not None:
      self._add(step=step, summary=summary.text(name, markdown))

  def _add(self, **fields):
    """Writes an event to TensorBoard, visible after a while."""
    self._board.write_event(event_pb2.Event(wall_time=time.time(), **fields))
    if time.monotonic() >= self._flush_at:
      self._board.flush()
      self._flush_at = time.monotonic() + _FLUSH_SECONDS

  def close(self) -> None:
    """Closes both."""
    if self._file is not None:
      self._file.close()
      self._board.close()


def _keep_through_step(path: pathlib.Path, step: int) -> None:
  """Drops later lines, and one that was cut off while it was written."""
  kept, damaged = [], 0
  *whole, _ = path.read_text(errors='replace').split('\n')
  for line in whole:
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line + '\n')
    except (ValueError, TypeError, KeyError):
      damaged += 1
  if damaged:
    aside = path.with_name(f'damaged_{path.name}')
    shutil.copy(path, aside)
    say(
      f'{path} has {damaged} lines that cannot be read. They are left out; as '
      f'it was, it is in {aside.name}.'
    )
  write_whole(path, ''.join(kept))


def read(run_dir: str | os.PathLike) -> list[dict[str, float]]:
  """Returns the lines of a run's `metrics.jsonl`; none if there is none."""
  path = pathlib.Path(run_dir) / 'metrics.jsonl'
  if not path.exists():
    return []
  # The last line may be cut off: by the end of a run, or half written now.
  *whole, _ = path.read_text().split('\n')
  return [json.loads(line) for line in whole]


def write_whole(path: str | os.PathLike, text: str) -> None:
  """Writes a file whole or not at all, and makes its folder.

  The first host does.
  """
  if not hosts.is_first():
    return
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.partial')
  try:
    partial.write_text(text)
  except OSError:
    partial.unlink(missing_ok=True)
    raise
  partial.rename(path)


class Progress:
  """Shows how far training is: a bar on a terminal, plain lines elsewhere."""

  def __init__(self, total_steps: int, first_step: int, every_seconds: float):
    """Args: steps in all, steps done, and how often a plain line is due."""
    self._total = total_steps
    self._first = self._step = first_step
    self._every = every_seconds
    self._start = self._last = time.monotonic()
    self._bar = None
    if sys.stderr.isatty() and hosts.is_first():
      self._bar = tqdm.tqdm(
        total=total_steps, initial=first_step, unit='step', dynamic_ncols=True
      )

  def update(
    self, step: int, *, loss: float, on_policy: float, tokens_per_second: float
  ) -> None:
    """Shows the state after `step`: loss in nats, on-policy share so far."""
    figures = (
      f'loss {loss:.4f}  on-policy {on_policy:.0%}  '
      f'{tokens_per_second:,.0f} target tokens/s'
    )
    if self._bar is not None:
      self._bar.set_description_str(figures, refresh=False)
      self._bar.update(step - self._step)
      self._step = step
      return
    now = time.monotonic()
    self._step = step
    if step == self._total or now - self._last >= self._every:
      self._last = now
      left = (now - self._start) / max(1, step - self._first)
      left *= self._total - step
      say(f'step {step}/{self._total}  {figures}  {minutes(left)} left')

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()


def say(text: str) -> None:
  """Prints a line for the person who waits, without breaking the bar.

  The first host does.
  """
  if not hosts.is_first():
    return
  tqdm.tqdm.write(text, file=sys.stderr)
  sys.stderr.flush()


def minutes(seconds: float) -> str:
  """Returns a duration as minutes:seconds."""
  whole, rest = divmod(round(seconds), 60)
  return f'{whole}:{rest:02d}'
