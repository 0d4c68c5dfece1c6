# SPDX-License-Identifier: Apache-2.0
"""Reads JSON lines files of users, with checks."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gkd_jax.runtime import files, paths

# First bytes of a file -> its format.
_BINARY = {
  b'\x1f\x8b': 'compressed (gunzip it)',
  b'PK\x03\x04': 'a zip archive (unpack it)',
  b'BZh': 'compressed (bunzip2 it)',
  b'\xfd7zXZ': 'compressed (unxz it)',
  b'\x28\xb5\x2f\xfd': 'compressed (unzstd it)',
  b'PAR1': 'Parquet',
  b'ARROW1': 'Arrow',
  b'\x89HDF': 'HDF5',
  b'\x93NUMPY': 'a NumPy array',
  b'SQLite format 3': 'an SQLite database',
  files.LFS_POINTER: 'a pointer of Git LFS (git lfs pull gets the file)',
}
# Share of the first bytes of UTF-16 that are NUL, at the least.
_MIN_UTF_16_NULS = 0.3


def find(pattern: str, setting: str) -> list[str]:
  """Returns the files that a pattern matches, sorted by name.

  Args:
    pattern: a path or a glob, see `paths.find`.
    setting: name of the pattern in gin, for errors.

  Raises:
    ValueError: no file matches, or the pattern is no text.
  """
  if not isinstance(pattern, str):
    raise ValueError(
      f'{setting}: a file must be a text, its path or a glob, not {pattern!r}.'
    )
  path = paths.resolve(pattern, setting)
  found = [file for file in paths.find(pattern) if os.path.isfile(file)]
  if not found:
    what = 'is a folder, not a file'
    if not path.is_dir():
      what = f'{paths.missing(path)}, and as a glob it matches no file'
    raise ValueError(f'{setting}: {pattern} {what}.')
  return found


def read(
  path: str, fields: Mapping[str, type], setting: str
) -> Iterator[dict[str, Any]]:
  """Yields the parsed lines of a file; skips blank lines.

  Args:
    path: of the file, in UTF-8.
    fields: that each line must have, e.g. {'inputs': str, 'targets': str}.
    setting: name of the path in gin, for errors.

  Raises:
    ValueError: the file cannot be read; or a line is not a JSON object, has a
      name twice, lacks a field, or has a field of another type.
  """
  try:
    # Binary, because text mode also splits lines at \r.
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield _parse(line, number, path, fields, setting)
  except OSError as e:
    raise ValueError(f'{setting}: {path} cannot be read: {e.strerror}.') from e


def _parse(
  line: bytes,
  number: int,
  path: str,
  fields: Mapping[str, type],
  setting: str,
) -> dict[str, Any]:
  """Returns the object of a line; raises ValueError if it is not one."""
  where = f'line {number} of {path}'
  try:
    values = files.parse_json(_decode(line, number), _unique)
    problem = None if isinstance(values, dict) else 'a JSON object {...}.'
    cause = None
  except ValueError as e:
    problem, cause = f'JSON: {_reason(e)}', e
  if problem:
    other = _other_format(line) if number == 1 else None
    raise ValueError(
      f'{setting}: {path} is {other}'
      if other
      else f'{setting}: {where} is not {problem}'
    ) from cause
  for name, kind in fields.items():
    if name not in values:
      raise ValueError(
        f'{setting}: {where} has no "{name}". It has: '
        f'{printable(", ".join(values))}.'
      )
    value = values[name]
    if not isinstance(value, kind):
      raise ValueError(
        f'{setting}: "{name}" in {where} is {type(value).__name__}, not '
        f'{kind.__name__}.'
      )
    if kind is str and not files.is_unicode(value):
      raise ValueError(
        f'{setting}: "{name}" in {where} has half of a surrogate pair, such as '
        '\\ud83d alone, which is no character: the text was probably cut '
        'within an emoji. Remove it.'
      )
  return values


def _reason(error: ValueError) -> str:
  """Returns the message of an error, with the place within the line."""
  if isinstance(error, json.JSONDecodeError):
    return f'{error.msg} at character {error.pos + 1}'
  return str(error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object; raises ValueError if a name occurs twice."""
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'an object has "{twice}" twice')
  return values


def _decode(line: bytes, number: int) -> str:
  try:
    # A byte order mark may precede the first line.
    return line.decode('utf-8-sig' if number == 1 else 'utf-8')
  except UnicodeDecodeError as e:
    raise ValueError(f'it is not UTF-8: {e}') from e


def printable(text: str) -> str:
  """Returns a text with escapes for what cannot be encoded."""
  return text.encode(errors='backslashreplace').decode()


def _other_format(line: bytes) -> str | None:
  """Returns the format of a file and the way out, from its first line."""
  for start, name in _BINARY.items():
    if line.startswith(start):
      return f'{name}, not JSON lines.'
  if _is_utf_16(line):
    return 'UTF-16. Convert it: iconv -f UTF-16 -t UTF-8.'
  if b'\x00' in line[:64]:
    return 'a binary file, not JSON lines.'
  text = line.lstrip(b'\xef\xbb\xbf').strip()
  if text.startswith(b'['):
    return (
      'a JSON array, not JSON lines: one object {...} a line. Convert it: '
      "jq -c '.[]' FILE."
    )
  if text == b'{':
    return (
      'JSON with an object over several lines, not JSON lines: one object '
      '{...} a line. Convert it: jq -c . FILE.'
    )
  if text.startswith(b'<'):
    return 'HTML or XML, perhaps an error page of a download, not JSON lines.'
  if not text.startswith(b'{') and re.search(rb'[,\t]', text):
    return (
      'not JSON lines; it looks like a table (CSV or TSV). Convert it to one '
      'object {...} a line.'
    )
  return None


def _is_utf_16(line: bytes) -> bool:
  """Whether a line has a byte order mark of UTF-16, or its NULs."""
  start = line[:64]
  # Of characters below U+0100 every other byte is NUL, always the same one.
  nuls = sorted(start[i::2].count(0) for i in (0, 1))
  return start.startswith((b'\xff\xfe', b'\xfe\xff')) or (
    nuls[0] <= 1 and nuls[1] > _MIN_UTF_16_NULS * len(start)
  )
