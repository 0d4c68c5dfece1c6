# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: checks, lock, manifest, and errors of a full disk."""

import contextlib
import dataclasses
import difflib
import errno
import fcntl
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping

import jax
from etils import epath

from gkd_jax.parallel import hosts
from gkd_jax.runtime import console, metrics, paths
from gkd_jax.runtime import files as files_lib

_CONFIG = 'config.gin'
_VERSIONS = 'versions.json'
# Settings that may change when a run resumes: its folder, which may be moved,
# whether it may start anew, and the number of data shards, which
# `TrainIterator.restore` checks. gin puts a long value on the following,
# indented lines.
_FREE_SETTINGS = re.compile(
  r'^(?:MODEL_DIR|OVERWRITE|run_folder\.Run\.overwrite'
  r'|experiment\.Data\.num_shards) = .*(?:\n .*)*',
  re.MULTILINE,
)
CHECKPOINT = 'checkpoint'  # what the folders of checkpoints are named after
# Files that a run without a checkpoint would replace: its measurements.
_METRICS = 'metrics.jsonl'
_RESULTS = re.compile(r'(eval|samples)_.+\.json')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """The folder of a run, its configuration, and when its process started.

  Attributes:
    model_dir: the run's folder; created if it does not exist.
    config_text: returns the resolved configuration, which is saved with the run
      and must not change when the run resumes.
    overwrite: start anew if the folder has the results of this run, but no
      checkpoint; see `check_results`.
    started: `time.monotonic` at the start of the process; None: unknown.
    import_seconds: time spent on imports so far.
  """

  model_dir: str
  config_text: Callable[[], str] = str
  overwrite: bool = False
  started: float | None = None
  import_seconds: float = 0.0

  @property
  def folder(self) -> pathlib.Path:
    """The run's folder, absolute."""
    return paths.resolve(self.model_dir, 'MODEL_DIR')


def step_of(folder: str | os.PathLike) -> int | None:
  """Returns <step> of a folder checkpoint_<step>; None for another name."""
  name = os.path.basename(os.fspath(folder))
  match = re.fullmatch(rf'{CHECKPOINT}_(\d+)', name, re.ASCII)
  return int(match[1]) if match else None


def checkpoint_steps(folder: str | os.PathLike) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder, unsorted."""
  folder = epath.Path(folder)
  steps = map(step_of, folder.iterdir() if folder.is_dir() else ())
  return [step for step in steps if step is not None]


def has_run(folder: pathlib.Path) -> bool:
  """Whether a folder holds a run, finished or not."""
  return (folder / _CONFIG).exists()


def check_same_config(folder: pathlib.Path, config: str) -> None:
  """Raises ValueError if a folder holds a run with another configuration.

  Args:
    folder: of the run; may not exist.
    config: the resolved configuration.
  """
  path = folder / _CONFIG
  if not path.exists():
    if folder.exists() and any(folder.glob('[!.]*')):
      raise ValueError(
        f'MODEL_DIR {folder} is not empty and has no {_CONFIG}: it is not a '
        'run of gkd_jax. Use another MODEL_DIR.'
      )
    return
  was = _comparable(path.read_text(errors='replace', encoding='utf-8'))
  now = _comparable(config)
  if was == now:
    return
  changes = [
    line
    for line in difflib.unified_diff(was, now, lineterm='', n=0)
    if line[0] in '+-' and line[:3] not in ('+++', '---')
  ]
  raise ValueError(
    f'MODEL_DIR {folder} holds another run. Its {_CONFIG} (-) differs from '
    'this one (+):\n  '
    + '\n  '.join(changes[:10])
    + '\nUse another MODEL_DIR, or restore the old settings to resume that '
    'run.'
  )


def check_results(
  folder: pathlib.Path, past: Callable[[Mapping[str, float]], bool]
) -> None:
  """Raises ValueError if a run without checkpoints has results to lose.

  Such a run starts at step 0. If it was interrupted before its first
  checkpoint, this loses nothing; if its checkpoints were removed, the
  measurements of the run that was would be replaced.

  Args:
    folder: of the run; it has no checkpoint.
    past: whether a line of metrics.jsonl is later than the first checkpoint.
  """
  if any('.orbax-checkpoint-tmp' in path.name for path in _entries(folder)):
    return  # interrupted while it saved its first checkpoint
  there = _results(folder)
  last = metrics.last(folder)
  if last is not None and past(last):
    there.append(folder / _METRICS)
  if not there:
    return
  raise ValueError(
    f'MODEL_DIR {folder} has {there[0].name}, but no checkpoint: the run would '
    'start anew and replace its results. Use another MODEL_DIR, put the '
    'checkpoints back, or set --gin.OVERWRITE=True.'
  )


def remove_results(folder: pathlib.Path) -> None:
  """Removes the measurements of a run that starts anew. First host only."""
  if hosts.is_first_host():
    for path in (*_results(folder), folder / _METRICS):
      path.unlink(missing_ok=True)
  hosts.barrier('old results removed')


def _results(folder: pathlib.Path) -> list[pathlib.Path]:
  return [path for path in _entries(folder) if _RESULTS.fullmatch(path.name)]


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.iterdir()) if folder.is_dir() else []


def _comparable(config: str) -> list[str]:
  """Returns the lines that must not change when a run resumes."""
  return [
    line
    for line in _FREE_SETTINGS.sub('', config).splitlines()
    if line and not line.startswith('#')
  ]


def save_manifest(
  folder: pathlib.Path, config: str, versions: Mapping[str, str]
) -> None:
  """Writes config.gin and versions.json.

  Args:
    folder: of the run; must exist.
    config: the resolved configuration.
    versions: {package: version}.

  Raises:
    ValueError: this host does not see the first host's files.
  """
  # First, because `has_run` detects a run by this file.
  files_lib.write_atomically(folder / _CONFIG, config)
  manifest = {**versions, 'command': sys.argv}
  files_lib.write_atomically(
    folder / _VERSIONS, json.dumps(manifest, indent=2) + '\n'
  )
  hosts.barrier('manifest saved')
  if not (folder / _CONFIG).exists():
    raise ValueError(
      f'Host {jax.process_index()} does not see the files that the first host '
      f'wrote to MODEL_DIR {folder}. Use a folder that all hosts share.'
    )


def check_folder(path: str, setting: str) -> None:
  """Raises ValueError if a run cannot write to a folder.

  Args:
    path: of the folder, which may not exist.
    setting: name of the path in gin, for messages.
  """
  if paths.is_remote(path):
    raise ValueError(
      f'{setting} {path}: a run folder must be on a file system. Mount the '
      'bucket, e.g. with gcsfuse, and use the path of the mount.'
    )
  existing = paths.resolve(path, setting)
  for folder in (existing, *existing.parents):
    if step_of(folder) is not None and has_run(folder.parent):
      raise ValueError(
        f'{setting} {path}: {folder} is a checkpoint of a run, which removes '
        'it when it has newer ones. Use another folder.'
      )
  paths.for_libraries(existing)  # raises if a link is needed, but not possible
  while not os.path.lexists(existing):
    existing = existing.parent
  if not existing.is_dir():
    what = 'is a file, not a folder'
    if not existing.exists():
      what = paths.missing(existing)
    raise ValueError(f'{setting} {path}: {existing} {what}.')
  if not os.access(existing, os.W_OK | os.X_OK):
    raise ValueError(f'{setting} {path}: {existing} is not writable.')


@contextlib.contextmanager
def explained_write_errors(folder: str, setting: str) -> Iterator[None]:
  """Replaces errors of writing to a folder by errors that name its setting.

  Args:
    folder: to which the code in the context writes.
    setting: name of its path in gin, for messages.

  Raises:
    OSError: the disk is full, or a file is not writable.
  """
  try:
    yield
  except Exception as e:
    folder = pathlib.Path(os.path.expanduser(folder)).absolute()
    files = [
      (_absolute(error.filename), error)
      for error in _chain(e)
      if isinstance(error, OSError) and error.filename
    ]
    if is_full(e):
      elsewhere = [f for f, _ in files if not f.is_relative_to(folder)]
      where = elsewhere[0] if elsewhere else f'{setting} {folder}'
      raise OSError(
        f'{where}: the disk is full, or the quota or the limit of file sizes '
        '(ulimit -f) is exceeded. Free some space '
        'and run the same command again: it resumes from the last complete '
        'checkpoint.'
      ) from e
    for file, error in files if isinstance(e, OSError) else ():
      if file.is_relative_to(folder) or folder.is_relative_to(file):
        raise OSError(f'{setting} {file}: {error.strerror}.') from e
    raise


def _absolute(file: str | bytes) -> pathlib.Path:
  return pathlib.Path(paths.as_given(os.fsdecode(file))).absolute()


def is_full(error: BaseException) -> bool:
  """Whether an error, or one of its causes, is that of a full disk."""
  # Errors of TensorFlow and Orbax have the text without the errno.
  numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  return any(
    getattr(e, 'errno', None) in numbers
    or any(os.strerror(number) in str(e) for number in numbers)
    for e in _chain(error)
  )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error and its causes."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


@contextlib.contextmanager
def locked(folder: pathlib.Path, setting: str) -> Iterator[None]:
  """Locks a folder, which must exist, against other processes.

  The first host holds the lock for all hosts. The kernel releases it when the
  process ends.

  Args:
    folder: to lock.
    setting: name of its path in gin, for messages.

  Raises:
    ValueError: another process holds the lock.
  """
  if not hosts.is_first_host():
    yield
    return
  # A file in it, because network file systems cannot lock folders.
  descriptor = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ValueError(
        f'{setting} {folder} is in use by another process. Wait until it ends, '
        f'or use another folder: --gin.{setting}=...'
      ) from e
    except OSError as e:  # some network file systems do not support locks
      console.log(
        f'{folder} cannot be locked ({e}): do not start a second process in it.'
      )
    yield
  finally:
    os.close(descriptor)
