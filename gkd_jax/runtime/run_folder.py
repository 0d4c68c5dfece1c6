# SPDX-License-Identifier: Apache-2.0
"""The folder that a run writes to: checked, locked, and full disks named."""

import contextlib
import errno
import fcntl
import os
import pathlib
from collections.abc import Iterator

from gkd_jax.parallel import hosts
from gkd_jax.runtime import console


def check_folder(path: str, setting: str) -> None:
  """Raises ValueError if a run cannot write to a folder, which may be absent.

  Args:
    path: of it.
    setting: that names it, for messages.
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
def written(folder: str, setting: str) -> Iterator[None]:
  """Names the folder, where what fails within it could not write there.

  Args:
    folder: that is written to.
    setting: that names it, for messages.

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
        f'{where}: no space is left on its disk, or the quota is used up. Make '
        'room and give the same command again: it goes on from what was whole '
        'before.'
      ) from e
    for file, error in files if isinstance(e, OSError) else ():
      if file.is_relative_to(folder) or folder.is_relative_to(file):
        raise OSError(f'{setting} {file}: {error.strerror}.') from e
    raise


def is_full(error: BaseException) -> bool:
  """Whether an error, or what led to it, is that of a full disk."""
  # TensorFlow and Orbax say it in words alone.
  numbers = (errno.ENOSPC, errno.EDQUOT)
  return any(
    getattr(e, 'errno', None) in numbers
    or any(os.strerror(number) in str(e) for number in numbers)
    for e in _chain(error)
  )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error and what led to it; gin raises another in its place."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


@contextlib.contextmanager
def locked(folder: pathlib.Path, setting: str) -> Iterator[None]:
  """Keeps every other process out of a folder, which must be there.

  One of several hosts keeps it for all.

  Args:
    folder: the lock ends with the process, however that ends.
    setting: that names it, for messages.

  Raises:
    ValueError: another process has it.
  """
  if not hosts.is_first():
    yield
    return
  # A network file system locks no folders.
  descriptor = os.open(folder / '.lock', os.O_RDWR | os.O_CREAT)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ValueError(
        f'{setting} {folder} is being written by another process. Wait for it, '
        f'or give this one a folder of its own: --gin.{setting}=...'
      ) from e
    except OSError as e:  # some network file systems have no locks
      console.log(f'{folder} cannot be locked ({e}): write to it only once.')
    yield
  finally:
    os.close(descriptor)
