# SPDX-License-Identifier: Apache-2.0
"""Reads JSON lines files that people and other programs write."""

import glob
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any


def find(pattern: str, setting: str) -> list[str]:
  """Returns the files that a pattern matches, in the order of their names.

  Args:
    pattern: a path, or a glob of several.
    setting: what it is called in gin.

  Raises:
    ValueError: there is none.
  """
  # A name may hold [ and ], which a glob would take for a set of letters.
  paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
  paths = [path for path in paths if os.path.isfile(path)]
  if not paths:
    raise ValueError(f'{setting}: there is no file {pattern}.')
  return paths


def read(
  path: str, fields: Mapping[str, type], setting: str
) -> Iterator[dict[str, Any]]:
  """Yields the lines of a file; those that are blank are left out.

  Args:
    path: of the file, in UTF-8.
    fields: that each line must have, e.g. {'inputs': str, 'targets': str}.
    setting: what the path is called in gin.

  Raises:
    ValueError: a line is no JSON object, or lacks a field, or one is of
      another type.
  """
  # In binary, lines end at \n alone; a text may hold other ends of lines.
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        values = json.loads(line)
      except ValueError as e:
        raise ValueError(
          f'{setting}: line {number} of {path} is no JSON: {e}'
        ) from e
      if not isinstance(values, dict):
        raise ValueError(
          f'{setting}: line {number} of {path} is no JSON object {{...}}.'
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
