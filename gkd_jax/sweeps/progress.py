# SPDX-License-Identifier: Apache-2.0
"""How far the runs of a sweep are: a live table, or a line a minute."""

import functools
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from gkd_jax.report import runs as runs_lib
from gkd_jax.report import sections, tables
from gkd_jax.runtime import console

_LIVE_SECONDS = 0.5
_PLAIN_SECONDS = 60.0
_BAR_WIDTH = 8  # a line then fits into 80 columns
_TAIL_BYTES = 65536  # of metrics.jsonl: more than its longest line


class Progress:
  """Shows the runs of a sweep on stderr.

  On a terminal each run has one line, which is rewritten while it runs and
  stays when it is done. Elsewhere one short line a minute is printed.
  """

  def __init__(self, num_runs: int, num_done: int, name_width: int):
    """Args: runs in all, those done before, and the width of their names."""
    self._num_runs = num_runs
    self._num_done = num_done
    self._width = name_width
    self._is_live = sys.stderr.isatty()
    self._num_live = 0  # lines that the next ones replace
    self._start = self._last = time.monotonic()

  def log(self, text: str) -> None:
    """Prints lines that stay."""
    self._clear()
    console.log(f'[{self._clock()}] {text}')

  def done(self, name: str, result: pathlib.Path, seconds: float) -> None:
    """Counts a run as done; on a terminal its line stays."""
    self._num_done += 1
    if self._is_live:
      self._clear()
      words = ['done', *measured(result), console.minutes(seconds)]
      console.log(self._line(name, '  '.join(words)))

  def update(self, running: Mapping[str, pathlib.Path]) -> None:
    """Shows the runs under way, if it is time to.

    Args:
      running: {name: folder}.
    """
    now = time.monotonic()
    every = _LIVE_SECONDS if self._is_live else _PLAIN_SECONDS
    if now - self._last < every:
      return
    self._last = now
    read = {name: _read(folder) for name, folder in running.items()}
    if not self._is_live:
      words = [f'{name} {", ".join(_words(*of))}' for name, of in read.items()]
      console.log(
        f'[{self._clock()}] {self._num_done} of {self._num_runs} runs done; '
        f'{"; ".join(words)}'
      )
      return
    lines = []
    for name, (line, total) in read.items():
      step = line.get('step', 0)
      filled = round(_BAR_WIDTH * step / total) if total else 0
      bar = '█' * filled + '·' * (_BAR_WIDTH - filled)
      words = '  '.join(_words(line, total))
      lines.append(self._line(name, f'{bar}  {words}'))
    self._clear()
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write(''.join(line[:width] + '\n' for line in lines))
    sys.stderr.flush()
    self._num_live = len(lines)

  def close(self) -> None:
    """Removes the lines of runs under way."""
    self._clear()

  def _line(self, name: str, text: str) -> str:
    return f'{name:{self._width}}  {text}'

  def _clear(self) -> None:
    if self._num_live:
      # Move up by the number of lines, then clear to the end of the screen.
      sys.stderr.write(f'\x1b[{self._num_live}F\x1b[J')
      sys.stderr.flush()
      self._num_live = 0

  def _clock(self) -> str:
    return f'{console.minutes(time.monotonic() - self._start):>5}'


def state(folder: pathlib.Path) -> list[str]:
  """Returns where a run is, in words: step, loss, time left."""
  return _words(*_read(folder))


def steps(folder: pathlib.Path) -> tuple[int, int | None]:
  """Returns the last step logged and the number of steps, None if not known."""
  line, total = _read(folder)
  return line.get('step', 0), total


def _words(line: Mapping[str, Any], total: int | None) -> list[str]:
  if not line or total is None:
    return ['starting']
  step = line['step']
  if step >= total:
    return [f'step {step}/{total}', 'evaluating']
  words = [f'step {step}/{total}', f'loss {line["train/loss"]:.4f}']
  if rate := line.get('train/steps_per_second'):
    words.append(f'{console.minutes((total - step) / rate)} left')
  return words


def _read(folder: pathlib.Path) -> tuple[Mapping[str, Any], int | None]:
  """Returns the last line with a loss, {} if there is none, and TRAIN_STEPS."""
  config = folder / 'config.gin'
  if not config.is_file():
    return {}, None
  total = _num_steps(config, config.stat().st_mtime_ns)
  return _last_training_line(folder), total


@functools.lru_cache
def _num_steps(config: pathlib.Path, changed: int) -> int | None:
  """Returns TRAIN_STEPS; a file is read again when it has `changed`."""
  del changed
  return runs_lib.read_settings(config.read_text(encoding='utf-8')).get(
    'TRAIN_STEPS'
  )


def measured(result: pathlib.Path) -> list[str]:
  """Returns the main metric of a finished run and its KL from the teacher."""
  config = result.parent / 'config.gin'
  if result.suffix != '.json' or not config.is_file():
    return []
  values = json.loads(result.read_text(encoding='utf-8'))
  settings = runs_lib.read_settings(config.read_text(encoding='utf-8'))
  first = next((name for name in values if name.startswith('greedy/')), None)
  main = settings.get('BEST_METRIC') or first
  words = []
  if main in values:
    words.append(f'{tables.head(main)} {values[main]:.2f}')
  if sections.KL in values:
    words.append(f'KL(student‖teacher) {values[sections.KL]:.4f}')
  return words


def _last_training_line(folder: pathlib.Path) -> Mapping[str, Any]:
  """Returns the last complete line of metrics.jsonl that has a loss."""
  path = folder / 'metrics.jsonl'
  if not path.is_file():
    return {}
  with path.open('rb') as file:
    file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
    *whole, _ = file.read().split(b'\n')
  return _with_loss(reversed(whole))


def _with_loss(lines: Iterable[bytes]) -> Mapping[str, Any]:
  for text in lines:
    try:
      line = json.loads(text)
    except ValueError:  # the tail began within it
      continue
    if 'train/loss' in line:
      return line
  return {}
