# SPDX-License-Identifier: Apache-2.0
"""Paths that users give, and paths that libraries can read.

A name that the file system accepts may have another meaning elsewhere: etils
and Orbax treat `[ ] * ?` as a pattern, TensorStore treats a backslash as a
slash. `resolve` checks every path of a setting; `for_libraries` gives such a
library a link whose name has letters and digits only.
"""

import atexit
import functools
import glob
import os
import pathlib
import re
import shutil
import sys
import tempfile

_PLAIN = re.compile(r'[\w./+=,@-]*', re.ASCII)
_REMOTE = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*://')
# etils takes these folders of the root for buckets.
_BUCKETS = re.compile(r'/+(gs|s3|az|hf)(/|$)')

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]

# {link: the folder it stands for}.
_folder_of: dict[str, str] = {}


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path is a URL, such as gs://bucket/folder."""
  return _REMOTE.match(os.fspath(path)) is not None


def resolve(path: str | os.PathLike, setting: str) -> pathlib.Path:
  """Returns the absolute path on the file system that a setting names.

  Args:
    path: as the user wrote it; `~` and `~user` are expanded.
    setting: its name, for errors.

  Raises:
    ValueError: the path is empty or a URL, there is no such user, or a name on
      the absolute path has a control character or is not UTF-8.
  """
  given = os.fspath(path)
  if not given:
    raise ValueError(
      f"{setting} is empty. Set it to a path; '.' is the working directory."
    )
  if is_remote(given):
    raise ValueError(f'{setting} {given} must be a path on the file system.')
  expanded = os.path.expanduser(given)
  if given[0] == '~' and (expanded == given or not _has_home(given)):
    home = given.partition('/')[0]
    raise ValueError(
      f'{setting} {given}: {home} is not the home folder of a user. For a '
      f'file of this name write ./{given}.'
    )
  absolute = pathlib.Path(expanded).absolute()
  odd = re.search(r'[\x00-\x1f\x7f\ud800-\udfff]', os.fspath(absolute))
  if odd:
    what, how = f'{odd[0]!r}, a control character', 'Use another path'
    if odd[0] > '\x7f':
      encoding = sys.getfilesystemencoding().upper()
      what = f'a byte that is not {encoding}'
      if encoding != 'UTF-8':
        how += ', or a UTF-8 locale: LC_ALL=C.UTF-8'
    raise ValueError(
      f'{setting} {os.fspath(absolute)!r} contains {what}. {how}.'
    )
  if _BUCKETS.match(os.fspath(absolute)):
    raise ValueError(
      f'{setting} {absolute}: libraries treat /{absolute.parts[1]} as a bucket.'
      ' Use another path.'
    )
  return absolute


def _has_home(path: str) -> bool:
  """Whether ~ has a meaning: an empty HOME would make it the root."""
  return path.partition('/')[0] != '~' or os.environ.get('HOME') != ''


def missing(path: str | os.PathLike) -> str:
  """Returns why a path leads nowhere: it is not there, or a link is broken."""
  path = pathlib.Path(path)
  for part in (path, *path.parents):
    if part.is_symlink() and not part.exists():
      what = '' if part == path else f'{part} '
      return (
        f'{what}is a symbolic link to {os.readlink(part)}, which is not there'
      )
  return 'is not there'


def find(pattern: str) -> list[str]:
  """Returns the paths that a pattern matches, sorted.

  Names that exist as they are written count as names, not as patterns: of
  `runs [v2]/*` only `*` is a pattern if there is a folder `runs [v2]`.

  Args:
    pattern: a path, or a glob, which may contain `**`; `~` is expanded.
  """
  *parts, last = os.path.expanduser(pattern).split('/')
  parts = [f'{part}/' for part in parts] + [last]
  there = ''
  while parts and os.path.lexists(there + parts[0]):
    there += parts.pop(0)
  if not ''.join(parts):
    return [there]
  below = glob.glob(''.join(parts), root_dir=there or None, recursive=True)
  return sorted(there + name for name in below)


def gin_folders() -> list[str]:
  """Returns the folders that hold gin/ and configs/ of gkd_jax.

  In a clone that is its root; a wheel installs them in the package.
  """
  return [
    str(folder)
    for folder in (_PACKAGE.parent, _PACKAGE / '_assets')
    if (folder / 'gin' / 'runs').is_dir()
  ]


def for_libraries(path: str | os.PathLike) -> str:
  """Returns a path to the same place that no library misreads.

  Args:
    path: absolute, or remote. It need not exist yet.

  Returns:
    The path itself if its characters are harmless, else a symbolic link to it
    in the folder of temporary files, which is removed when the process ends.

  Raises:
    OSError: a link is needed, but cannot be made.
  """
  given = os.fspath(path)
  if is_remote(given) or _PLAIN.fullmatch(given):
    return given
  return _link(given)


@functools.cache
def _link(path: str) -> str:
  link = os.path.join(_links(os.getpid()), str(len(_folder_of)))
  os.symlink(path, link)
  _folder_of[link] = path
  return link


@functools.cache
def _links(process: int) -> str:
  """Makes the folder of a process's links."""
  for parent in (tempfile.gettempdir(), '/tmp', '/var/tmp'):
    if _PLAIN.fullmatch(parent) and os.access(parent, os.W_OK):
      folder = tempfile.mkdtemp(prefix='gkd_jax_links_', dir=parent)
      atexit.register(_remove, folder, process)
      return folder
  raise OSError(
    'Paths with special characters need a link in the folder of temporary '
    f'files, but {tempfile.gettempdir()} has them, too. Set TMPDIR to another.'
  )


def _remove(folder: str, process: int) -> None:
  if os.getpid() == process:  # a forked process uses the links of its parent
    shutil.rmtree(folder, ignore_errors=True)


def as_given(text: str) -> str:
  """Returns a message with the links of `for_libraries` replaced."""
  for link, path in reversed(_folder_of.items()):
    text = re.sub(rf'{re.escape(link)}\b', lambda _, path=path: path, text)
  return text
