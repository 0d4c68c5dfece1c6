# SPDX-License-Identifier: Apache-2.0
"""Writes metrics to JSON lines and TensorBoard."""

import contextlib
import json
import os
import pathlib
import shutil
import time
from typing import Any

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from gkd_jax.parallel import hosts
from gkd_jax.runtime import console, files

_FLUSH_SECONDS = 120.0
# Common names of metrics. The first two kinds are in percent.
ERRORS = ('wer', 'per', 'cer', 'error')
SHARES_RIGHT = ('accuracy', 'exact_match')
_SCORES = ('bleu', 'chrf', 'f1', 'reward', 'entailment')
# Prefixes of the names of scores.
_KINDS_OF_SCORES = ('rouge', 'acceptance', 'block_efficiency')


def better(name: str) -> str | None:
  """Returns 'min' or 'max', which is better for a metric; None: unknown.

  Args:
    name: with or without its decoding: 'greedy/wer', 'wer'.
  """
  name = name.rpartition('/')[2]
  if name in ERRORS:
    return 'min'
  known = name in (*SHARES_RIGHT, *_SCORES)
  known = known or name.startswith(_KINDS_OF_SCORES)
  return 'max' if known else None


class MetricWriter:
  """Appends scalars to a folder's `metrics.jsonl` and TensorBoard file.

  Only the first host of a run writes.
  """

  def __init__(self, run_dir: str | os.PathLike, first_step: int):
    """Opens both files.

    Args:
      run_dir: folder of the run.
      first_step: the run resumes after this step. Lines of later steps, which
        an interrupted run wrote, are dropped: the run repeats these steps.
    """
    self._file = self._board = None
    if not hosts.is_first_host():
      return
    path = pathlib.Path(run_dir) / 'metrics.jsonl'
    if path.exists():
      # A run that starts anew writes its line of step 0 again.
      keep_through_step(path, first_step or -1)
    # Unbuffered, so that `close` writes nothing and cannot fail on a full disk.
    self._file = path.open('ab', buffering=0)
    # Not tensorboardX's SummaryWriter: it writes in a thread. A full disk kills
    # the thread, and the next write blocks forever.
    self._board = event_file_writer.EventsWriter(
      os.path.join(run_dir, 'events')
    )
    self._flush_at = 0.0
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(step=first_step + 1, session_log=start)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Writes the scalars of a step, unbuffered."""
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
    """Writes an event to TensorBoard; flushes every `_FLUSH_SECONDS`."""
    self._board.write_event(event_pb2.Event(wall_time=time.time(), **fields))
    if time.monotonic() >= self._flush_at:
      self._board.flush()
      self._flush_at = time.monotonic() + _FLUSH_SECONDS

  def close(self) -> None:
    """Closes both files."""
    if self._file is not None:
      self._file.close()
      self._board.close()


def keep_through_step(path: pathlib.Path, step: int) -> None:
  """Drops the lines of later steps, and an incomplete last line, of a file."""
  kept, damaged = [], 0
  *whole, _ = path.read_text(errors='replace', encoding='utf-8').split('\n')
  for line in whole:
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line + '\n')
    except (ValueError, TypeError, KeyError):
      damaged += 1
  if damaged:
    aside = path.with_name(f'damaged_{path.name}')
    shutil.copy(path, aside)
    console.log(
      f'{path} has {damaged} unreadable lines. They are dropped; the original '
      f'file is kept as {aside.name}.'
    )
  files.write_atomically(path, ''.join(kept))


def read(run_dir: str | os.PathLike) -> list[dict[str, float]]:
  """Returns the lines of a run's `metrics.jsonl`; [] if it does not exist.

  Raises:
    ValueError: a line is damaged.
  """
  path = pathlib.Path(run_dir) / 'metrics.jsonl'
  if not path.exists():
    return []
  # The last line may be incomplete: truncated, or being written by a run.
  *whole, _ = path.read_bytes().split(b'\n')
  lines = []
  for number, text in enumerate(whole, 1):
    try:
      line = files.parse_printable_json(text)
      if not isinstance(line, dict) or type(line.get('step')) is not int:
        raise ValueError('it has no step')
      for name, value in line.items():
        if not is_number(value):
          raise ValueError(f'{name} is no number')
    except ValueError as e:
      raise ValueError(f'line {number} of {path} is damaged: {e}') from e
    lines.append(line)
  return lines


def is_number(value: Any) -> bool:
  """Whether a value of a JSON file is a number that float can represent."""
  return isinstance(value, float) or (
    isinstance(value, int) and abs(value) < 2**1000
  )


def last(run_dir: str | os.PathLike) -> dict[str, float] | None:
  """Returns the last readable line of a run's `metrics.jsonl`, if any."""
  path = pathlib.Path(run_dir) / 'metrics.jsonl'
  if not path.is_file():
    return None
  for text in reversed(path.read_bytes().split(b'\n')[:-1]):
    with contextlib.suppress(ValueError):
      line = json.loads(text)
      if isinstance(line, dict) and isinstance(line.get('step'), int):
        return line
  return None
