# SPDX-License-Identifier: Apache-2.0
"""Runs of gkd_jax.main, each in a process of its own.

Each has the command that a person would type; this module only starts them,
skips what is done, and says which failed.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from gkd_jax.runtime import console, files
from gkd_jax.runtime import signals as signals_lib

_STATUS_SECONDS = 20.0
_ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Job:
  """One process: a command, and the file that is there when it is done."""

  name: str
  arguments: tuple[str, ...]  # of gkd_jax.main
  result: pathlib.Path
  needs: tuple[str, ...] = ()  # jobs that must be done before

  @property
  def folder(self) -> pathlib.Path:
    return self.result.parent

  @property
  def command(self) -> str:
    return shlex.join(('python', '-m', 'gkd_jax.main', *self.arguments))


def arguments(
  mode: str, files: Sequence[str], settings: Mapping[str, object]
) -> tuple[str, ...]:
  """Returns the arguments of gkd_jax.main."""
  return (
    f'--run_mode={mode}',
    *(f'--gin_file={file}' for file in files),
    *(f'--gin.{name}={value}' for name, value in settings.items()),
  )


def add_flags(jobs: Sequence[Job], flags: Sequence[str]) -> list[Job]:
  """Returns the jobs with more arguments."""
  return [
    dataclasses.replace(job, arguments=(*job.arguments, *flags)) for job in jobs
  ]


def check_gin_files(files: Iterable[str], setting: str) -> None:
  """Raises ValueError if one is not there.

  Args:
    files: paths as on the command line.
    setting: that names them.
  """
  for file in files:
    if not _find(file).is_file():
      raise ValueError(f'{setting}: there is no gin file {file}.')


def check_arguments(
  jobs: Iterable[Job], check: Callable[[Sequence[str], str], None]
) -> None:
  """Raises ValueError if a job that is not done could not be run.

  Args:
    jobs: to be run.
    check: (arguments, name of the result) -> None; raises ValueError if gin
      does not take them, or a run with them would not write that file.
  """
  for job in jobs:
    if job.result.exists():
      continue
    try:
      check(job.arguments, job.result.name)
    except ValueError as e:
      raise ValueError(f'{job.name} cannot be run: {e}') from e


def check_same(path: pathlib.Path, jobs: Sequence[Job]) -> None:
  """Refuses to mix runs of different settings in one folder.

  Args:
    path: of the file in that folder that says what they are; it is written.
    jobs: to be run.

  Raises:
    ValueError: the folder of one was made with another command, or other gin
      files, or after another job.
  """
  now: dict[str, list[str]] = {}
  for job in jobs:
    needs = [now[name] for name in job.needs]
    now[job.name] = [job.command, _digest(job, needs)]
  if path.exists():
    was = json.loads(path.read_text())
    changed = [
      job.name
      for job in jobs
      if job.name in was
      and was[job.name] != now[job.name]
      and job.folder.exists()
    ]
    if changed:
      raise ValueError(
        f'{path.parent} holds runs of other settings or gin files: '
        f'{", ".join(changed)}. Remove these, or use another MODEL_DIR.'
      )
    now = {**was, **now}
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_whole(path, json.dumps(now, indent=2) + '\n')


def _digest(job: Job, needs: Sequence[Sequence[str]]) -> str:
  """Returns a hash of the gin files that a job reads, and of what it needs."""
  seen: dict[str, str] = {}

  def read(file):
    if file in seen:
      return
    seen[file] = _find(file).read_text()
    for included in re.findall(r"^include '(.+)'", seen[file], re.MULTILINE):
      read(included)

  for argument in job.arguments:
    if argument.startswith('--gin_file='):
      read(argument.removeprefix('--gin_file='))
  text = json.dumps([seen, needs], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _find(file: str) -> pathlib.Path:
  path = pathlib.Path(file)
  return path if path.is_file() else _ROOT / file


def run(
  jobs: Sequence[Job],
  num_parallel: int,
  *,
  keep_going: bool = False,
) -> None:
  """Runs all jobs whose result is not there, in order, some at a time.

  Args:
    jobs: each after those that it needs.
    num_parallel: processes at a time.
    keep_going: where one fails, run those that do not need it.

  Raises:
    ValueError: at least one failed. Without `keep_going`, those beside it are
      ended.
    signals_lib.Interrupted: SIGTERM or Ctrl-C came; those that run were ended.
  """
  done = {job.name for job in jobs if job.result.exists()}
  waiting = [job for job in jobs if job.name not in done]
  if done:
    console.log(f'{len(done)} of {len(jobs)} runs are done already.')
  running: dict[subprocess.Popen, Job] = {}
  failed: dict[str, str] = {}
  start = said = time.monotonic()
  signals = signals_lib.Signals()
  try:
    with signals.noted(), signals.at_once():
      while waiting or running:
        for job in list(waiting):
          if broken := [name for name in job.needs if name in failed]:
            waiting.remove(job)
            failed[job.name] = f'{job.name} was not run: it needs {broken[0]}.'
          elif len(running) < num_parallel and done.issuperset(job.needs):
            waiting.remove(job)
            running[_start(job)] = job
            console.log(f'[{_clock(start)}] {job.command}')
        for process in [p for p in running if p.poll() is not None]:
          job = running.pop(process)
          if process.returncode or not job.result.exists():
            failed[job.name] = _how_it_failed(job, process.returncode)
            if not keep_going:
              raise ValueError(failed[job.name])
            console.log(f'[{_clock(start)}] {failed[job.name]}')
            continue
          done.add(job.name)
          console.log(
            f'[{_clock(start)}] {job.name} is done, {len(done)} of {len(jobs)}.'
          )
        if time.monotonic() - said > _STATUS_SECONDS:
          said = time.monotonic()
          for job in running.values():
            if lines := _log_lines(job):
              console.log(f'[{_clock(start)}] {job.name}: {lines[-1]}')
        time.sleep(0.2)
  finally:
    for process in running:
      process.terminate()
    for process in running:
      process.wait()
  if failed:
    # The ends of their logs were shown when they failed.
    raise ValueError(
      f'{len(failed)} of {len(jobs)} runs failed; the same command tries them '
      'again:\n  '
      + '\n  '.join(text.split('\n')[0] for text in failed.values())
    )


def _start(job: Job) -> subprocess.Popen:
  job.folder.mkdir(parents=True, exist_ok=True)
  with open(f'{job.folder}.log', 'a') as log:
    return subprocess.Popen(
      [sys.executable, '-m', 'gkd_jax.main', *job.arguments],
      stdout=log,
      stderr=log,
      stdin=subprocess.DEVNULL,
    )


def _how_it_failed(job: Job, code: int) -> str:
  what = 'failed' if code else f'failed: it left no {job.result.name}'
  lines = '\n'.join(_log_lines(job)[-20:])
  return f'{job.name} {what}. Its log, {job.folder}.log, ends:\n{lines}'


def _log_lines(job: Job) -> list[str]:
  text = pathlib.Path(f'{job.folder}.log').read_text(errors='replace')
  # Less tables, and TensorFlow's own chatter, which no setting silences.
  noise = re.compile(r'\s*$|\||[IWE]\d{4} |WARNING: All log messages before')
  return [line for line in text.splitlines() if not noise.match(line)]


def _clock(start: float) -> str:
  return f'{console.minutes(time.monotonic() - start):>5}'
