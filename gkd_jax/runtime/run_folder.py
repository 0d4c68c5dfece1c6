# SPDX-License-Identifier: Apache-2.0
"""The folder that a run writes to: checked, locked, and full disks named."""

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

from gkd_jax.parallel import hosts
from gkd_jax.runtime import console
from gkd_jax.runtime import files as files_lib

_CONFIG = 'config.gin'
_VERSIONS = 'versions.json'
# Settings that may change when a run is resumed: where its folder lies; and the
# division of its data, which its checkpoints record. A long value begins on the
# next line, and continues while lines are indented.
_FREE_SETTINGS = re.compile(
  r'^(?:MODEL_DIR|experiment\.Data\.num_shards) = .*(?:\n .*)*', re.MULTILINE
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """Where an experiment is run, and what started it.

  Attributes:
    model_dir: the run's folder; made if it does not exist.
    config_text: returns the resolved configuration, which is saved with the run
      and must be the same when it is resumed.
    started: when the process started, by `time.monotonic`; None: not known.
    import_seconds: time that its imports have taken so far.
  """

  model_dir: str
  config_text: Callable[[], str] = str
  started: float | None = None
  import_seconds: float = 0.0

  @property
  def folder(self) -> pathlib.Path:
    """The run's folder, absolute."""
    return pathlib.Path(self.model_dir).absolute()


def has_run(folder: pathlib.Path) -> bool:
  """Whether a run was started in a folder."""
  return (folder / _CONFIG).exists()


def check_same_config(folder: pathlib.Path, config: str) -> None:
  """Raises ValueError if another experiment has written a folder.

  Args:
    folder: of the run; need not exist.
    config: the resolved configuration.
  """
  path = folder / _CONFIG
  if not path.exists():
    if folder.exists() and any(folder.glob('[!.]*')):
      raise ValueError(
        f'MODEL_DIR {folder} holds files but no {_CONFIG}: it is not a run of '
        'gkd_jax. Use another MODEL_DIR.'
      )
    return
  was = _comparable(path.read_text(errors='replace'))
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
    + '\nUse another MODEL_DIR, or '
    'the same settings to resume that run.'
  )


def _comparable(config: str) -> list[str]:
  """Returns the lines that must not change, without comments."""
  return [
    line
    for line in _FREE_SETTINGS.sub('', config).splitlines()
    if line and not line.startswith('#')
  ]


def save_manifest(
  folder: pathlib.Path, config: str, versions: Mapping[str, str]
) -> None:
  """Writes config.gin and versions.json beside the checkpoints.

  Args:
    folder: of the run, which exists.
    config: the resolved configuration.
    versions: {package: version}.

  Raises:
    ValueError: this host does not see what the first one wrote.
  """
  # Written first: without it the folder is not recognised as a run.
  files_lib.write_atomically(folder / _CONFIG, config)
  manifest = {**versions, 'command': sys.argv}
  files_lib.write_atomically(
    folder / _VERSIONS, json.dumps(manifest, indent=2) + '\n'
  )
  hosts.barrier('the folder is there')
  if not (folder / _CONFIG).exists():
    raise ValueError(
      f'MODEL_DIR {folder} is another folder on host {jax.process_index()}: '
      'all hosts must share it.'
    )


def check_folder(path: str, setting: str) -> None:
  """Raises ValueError if a run cannot write to a folder, which need not exist.

  Args:
    path: of the folder.
    setting: name of the path in gin, for messages.
  """
  if '://' in str(path):
    raise ValueError(
      f'{setting} {path}: a run folder must be on a file system. Mount the '
      'bucket, e.g. with gcsfuse, and give the path where it is mounted.'
    )
  there = pathlib.Path(path).absolute()
  while not os.path.lexists(there):
    there = there.parent
  if not there.is_dir():
    raise ValueError(f'{setting} {path}: {there} is a file, not a folder.')
  if not os.access(there, os.W_OK | os.X_OK):
    raise ValueError(f'{setting} {path}: {there} cannot be written to.')


@contextlib.contextmanager
def explained_write_errors(folder: str, setting: str) -> Iterator[None]:
  """Raises errors of writing to a folder as one line that names it.

  Args:
    folder: that is written to.
    setting: name of its path in gin, for messages.

  Raises:
    OSError: the disk is full, or a file cannot be written.
  """
  try:
    yield
  except Exception as e:
    folder = pathlib.Path(folder).absolute()
    files = [
      (pathlib.Path(os.fsdecode(error.filename)).absolute(), error)
      for error in _chain(e)
      if isinstance(error, OSError) and error.filename
    ]
    if is_full(e):
      elsewhere = [f for f, _ in files if not f.is_relative_to(folder)]
      where = elsewhere[0] if elsewhere else f'{setting} {folder}'
      raise OSError(
        f'{where}: no space is left on its disk, or the quota is used up. Free '
        'some and run the same command again: it resumes from the last '
        'complete checkpoint.'
      ) from e
    for file, error in files if isinstance(e, OSError) else ():
      if file.is_relative_to(folder) or folder.is_relative_to(file):
        raise OSError(f'{setting} {file}: {error.strerror}.') from e
    raise


def is_full(error: BaseException) -> bool:
  """Whether an error, or one that caused it, is that of a full disk."""
  # TensorFlow and Orbax have no errno, only the text.
  numbers = (errno.ENOSPC, errno.EDQUOT)
  return any(
    getattr(e, 'errno', None) in numbers
    or any(os.strerror(number) in str(e) for number in numbers)
    for e in _chain(error)
  )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error and those that caused it."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


@contextlib.contextmanager
def locked(folder: pathlib.Path, setting: str) -> Iterator[None]:
  """Locks a folder, which must exist, against other processes.

  The first of several hosts holds the lock for all. It ends with the process.

  Args:
    folder: to lock.
    setting: name of its path in gin, for messages.

  Raises:
    ValueError: another process holds the lock.
  """
  if not hosts.is_first_host():
    yield
    return
  # Network file systems cannot lock folders.
  descriptor = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ValueError(
        f'{setting} {folder} is in use by another process. Wait for it to end, '
        f'or use another folder: --gin.{setting}=...'
      ) from e
    except OSError as e:  # some network file systems have no locks
      console.log(
        f'{folder} cannot be locked ({e}): start only one process there.'
      )
    yield
  finally:
    os.close(descriptor)
