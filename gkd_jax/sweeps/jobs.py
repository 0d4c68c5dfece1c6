# SPDX-License-Identifier: Apache-2.0
"""Runs of gkd_jax.main: which are done, which can start, which failed.

Each has the command that a person would type, a folder, and a log beside it.
They run in workers (see `worker`), one after another in each.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from gkd_jax.runtime import console, files, paths, pins
from gkd_jax.runtime import signals as signals_lib
from gkd_jax.sweeps import progress, worker

_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Job:
  """A run: its command, and the file that exists when it is done."""

  name: str
  arguments: tuple[str, ...]  # of gkd_jax.main
  result: pathlib.Path
  needs: tuple[str, ...] = ()  # jobs that must be done before

  @property
  def folder(self) -> pathlib.Path:
    return self.result.parent

  @property
  def log(self) -> pathlib.Path:
    return pathlib.Path(f'{self.folder}.log')

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
  """Raises ValueError if one does not exist.

  Args:
    files: paths as on the command line.
    setting: that lists them.
  """
  for file in files:
    if not _find(file).is_file():
      raise ValueError(f'{setting}: there is no gin file {file}.')


def check_arguments(
  jobs: Iterable[Job], check: Callable[[Sequence[str], str], None]
) -> None:
  """Raises ValueError if a job that is not done cannot run.

  Args:
    jobs: to be run.
    check: (arguments, name of the result) -> None; raises ValueError if gin
      rejects them, or if a run with them would not write that file.
  """
  for job in jobs:
    if job.result.exists():
      continue
    try:
      check(job.arguments, job.result.name)
    except ValueError as e:
      raise ValueError(f'{job.name} cannot be run: {e}') from e


def check_same_settings(path: pathlib.Path, jobs: Sequence[Job]) -> None:
  """Refuses to mix runs of different settings in one folder.

  Args:
    path: of the file in that folder that records them; it is written.
    jobs: to be run.

  Raises:
    ValueError: the folder of a job was made by another command, from other gin
      files, or after another job.
  """
  now: dict[str, list[str]] = {}
  for job in jobs:
    needs = [now[name] for name in job.needs]
    now[job.name] = [job.command, _digest(job, needs)]
  if path.exists():
    was = json.loads(path.read_text(encoding='utf-8'))
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
  files.write_atomically(path, json.dumps(now, indent=2) + '\n')


def check_same_files(jobs: Sequence[Job]) -> None:
  """Refuses to add runs to those that depended on other files.

  Args:
    jobs: to be run; if all are done, nothing is checked.

  Raises:
    ValueError: data, predictions or checkpoints of runs that have been started
      have changed since.
  """
  if not all(job.result.exists() for job in jobs):
    if error := _other_files(jobs):
      raise ValueError(error)


def _other_files(jobs: Sequence[Job]) -> str | None:
  """Returns an error if files that runs depend on have changed since."""
  of_runs = (pins.read_all(job.folder) for job in jobs)
  lines = pins.changes_since(one for of_run in of_runs for one in of_run)
  if not lines:
    return None
  return (
    f'Runs of this sweep were started with other files:{pins.shown(lines)}\n'
    'Restore these, or use another MODEL_DIR. Name a checkpoint of a run that '
    'is trained on by its step, as in runs/teacher/checkpoint_100.'
  )


def _digest(job: Job, needs: Sequence[Sequence[str]]) -> str:
  """Returns a hash of the gin files that a job reads, and of what it needs."""
  seen: dict[str, str] = {}

  def read(file):
    if file in seen:
      return
    seen[file] = _find(file).read_text(encoding='utf-8')
    for included in re.findall(r"^include '(.+)'", seen[file], re.MULTILINE):
      read(included)

  for argument in job.arguments:
    if argument.startswith('--gin_file='):
      read(argument.removeprefix('--gin_file='))
  text = json.dumps([seen, needs], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _find(file: str) -> pathlib.Path:
  path = pathlib.Path(os.path.expanduser(file))
  candidates = [
    path,
    *(f / path for f in map(pathlib.Path, paths.gin_folders())),
  ]
  return next((c for c in candidates if c.is_file()), path)


class Worker:
  """A process that runs jobs one after another; see `worker.serve`.

  Attributes:
    job: that runs; None: there is none.
    num_jobs: that were started.
    started: when the last one was, by `time.monotonic`.
  """

  def __init__(self, log: pathlib.Path):
    """Starts the process; `log` gets what it prints before its first job."""
    self.job: Job | None = None
    self.num_jobs = 0
    self.started = 0.0
    with open(log, 'a', encoding='utf-8') as file:
      self._process = subprocess.Popen(
        [sys.executable, '-m', 'gkd_jax.main', '--run_mode=worker'],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=file,
      )
    os.set_blocking(self._process.stdout.fileno(), False)

  def start(self, job: Job) -> None:
    """Starts a job; there must be none."""
    self.job = job
    self.num_jobs += 1
    self.started = time.monotonic()
    try:
      self._process.stdin.write(worker.command(job.arguments, job.log))
    except BrokenPipeError:
      pass  # it has died: poll returns its exit status

  def poll(self) -> int | None:
    """Returns None while the job runs, 0 if it has ended well.

    Otherwise the exit status of the process, which has also ended; minus the
    signal's number if one ended it.
    """
    # The status first: what the process wrote before it ended is there then.
    status = self._process.poll()
    if self._process.stdout.read() == worker.DONE:
      self.job = None
      return 0
    # It must not end before its job does, even with status 0.
    return status or 1 if status is not None else None

  def end(self) -> None:
    """Ends the process, and the job in it as SIGTERM does."""
    self._process.terminate()

  def wait(self) -> None:
    """Waits for the end of the process."""
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


def run(
  jobs: Sequence[Job], num_parallel: int, runs_per_process: int | None = None
) -> None:
  """Runs all jobs without a result, in order, up to num_parallel at a time.

  If one fails, all jobs that do not need it still run.

  Args:
    jobs: each after those that it needs.
    num_parallel: processes at a time.
    runs_per_process: jobs that a process runs before another takes its place;
      None: any number.

  Raises:
    ValueError: at least one failed.
    signals_lib.Interrupted: SIGTERM or Ctrl-C was received. The jobs under way
      have been ended by SIGTERM.
  """
  done = {job.name for job in jobs if job.result.exists()}
  waiting = [job for job in jobs if job.name not in done]
  if done:
    console.log(f'{len(done)} of {len(jobs)} runs are done already.')
  busy: list[Worker] = []
  idle: list[Worker] = []
  failed: dict[str, str] = {}
  width = max((len(job.name) for job in waiting), default=0)
  shown = progress.Progress(len(jobs), len(done), width)
  signals = signals_lib.Signals()
  try:
    with signals.recorded(), signals.raised_immediately():
      while waiting or busy:
        for job in list(waiting):
          if broken := [name for name in job.needs if name in failed]:
            waiting.remove(job)
            failed[job.name] = f'{job.name} was not run: it needs {broken[0]}.'
          elif len(busy) < num_parallel and done.issuperset(job.needs):
            waiting.remove(job)
            if error := _other_files(jobs):  # edited while the sweep runs
              failed[job.name] = f'{job.name} was not run: {error}'
              shown.log(failed[job.name])
              continue
            job.folder.mkdir(parents=True, exist_ok=True)
            busy.append(idle.pop() if idle else Worker(job.log))
            busy[-1].start(job)
        for one in list(busy):
          job = one.job
          status = one.poll()
          if status is None:
            continue
          busy.remove(one)
          if status or one.num_jobs == runs_per_process:
            one.wait()
          else:
            idle.append(one)
          if status or not job.result.exists():
            failed[job.name] = _failure_message(job, status)
            shown.log(failed[job.name])
          else:
            done.add(job.name)
            seconds = time.monotonic() - one.started
            shown.done(job.name, job.result, seconds)
        shown.update({one.job.name: one.job.folder for one in busy})
        time.sleep(_POLL_SECONDS)
  finally:
    shown.close()
    for one in busy:
      one.end()
    for one in (*busy, *idle):
      one.wait()
  if failed:
    # The end of each log was printed when its run failed.
    raise ValueError(
      f'{len(failed)} of {len(jobs)} runs failed; the same command runs them '
      'again:\n  '
      + '\n  '.join(text.split('\n')[0] for text in failed.values())
    )


def _failure_message(job: Job, status: int) -> str:
  what = 'failed'
  if status == 0:
    what = f'failed: it left no {job.result.name}'
  elif status < 0:
    what = f'failed: {signal.Signals(-status).name} ended its process'
    if status == -signal.SIGKILL:
      what += ' (as the kernel does when memory runs out)'
  lines = '\n'.join(_log_lines(job)[-20:])
  return f'{job.name} {what}. Its log, {job.log}, ends:\n{lines}'


def _log_lines(job: Job) -> list[str]:
  text = job.log.read_text(errors='replace', encoding='utf-8')
  # Without tables, and without TensorFlow's logs, which no setting silences.
  noise = re.compile(r'\s*$|\||[IWE]\d{4} |WARNING: All log messages before')
  return [line for line in text.splitlines() if not noise.match(line)]
