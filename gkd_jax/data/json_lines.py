# SPDX-License-Identifier: Apache-2.0
"""Reads JSON lines files of users, with checks."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from gkd_jax.runtime import paths


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
  files = [file for file in paths.find(pattern) if os.path.isfile(file)]
  if not files:
    what = 'is a folder, not a file'
    if not path.is_dir():
      what = f'{paths.missing(path)}, and as a glob it matches no file'
    raise ValueError(f'{setting}: {pattern} {what}.')
  return files


def read(
  path: str, fields: Mapping[str, type], setting: str
) -> Iterator[dict[str, Any]]:
  """Yields the parsed lines of a file; skips blank lines.

  Args:
    path: of the file, in UTF-8.
    fields: that each line must have, e.g. {'inputs': str, 'targets': str}.
    setting: name of the path in gin, for errors.

  Raises:
    ValueError: a line is not a JSON object, has a name twice, lacks a field, or
      has a field of another type.
  """
  # Binary, because text mode also splits lines at \r.
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        values = json.loads(line, object_pairs_hook=_unique)
      except ValueError as e:
        raise ValueError(
          f'{setting}: line {number} of {path} is not JSON: {e}'
        ) from e
      if not isinstance(values, dict):
        raise ValueError(
          f'{setting}: line {number} of {path} is not a JSON object {{...}}.'
        )
      for name, kind in fields.items():
        if name not in values:
          raise ValueError(
            f'{setting}: line {number} of {path} has no "{name}". It has: '
            f'{", ".join(values)}.'
          )
        if not isinstance(values[name], kind):
          raise ValueError(
            f'{setting}: "{name}" in line {number} of {path} is '
            f'{type(values[name]).__name__}, not {kind.__name__}.'
          )
      yield values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object; raises ValueError if a name occurs twice."""
  values = dict(pairs)
  if len(values) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'an object has "{twice}" twice')
  return values
