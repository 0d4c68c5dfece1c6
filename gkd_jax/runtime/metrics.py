# SPDX-License-Identifier: Apache-2.0
"""Where numbers go: JSON lines, TensorBoard, and the terminal."""

import json
import os
import pathlib
import shutil
import time

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from gkd_jax.parallel import hosts
from gkd_jax.runtime import console, files

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
    console.log(
      f'{path} has {damaged} lines that cannot be read. They are left out; as '
      f'it was, it is in {aside.name}.'
    )
  files.write_whole(path, ''.join(kept))


def read(run_dir: str | os.PathLike) -> list[dict[str, float]]:
  """Returns the lines of a run's `metrics.jsonl`; none if there is none."""
  path = pathlib.Path(run_dir) / 'metrics.jsonl'
  if not path.exists():
    return []
  # The last line may be cut off: by the end of a run, or half written now.
  *whole, _ = path.read_text().split('\n')
  return [json.loads(line) for line in whole]
