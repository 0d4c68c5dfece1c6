# SPDX-License-Identifier: Apache-2.0
"""Writes text files, never over what is there; reads JSON with checks."""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gkd_jax.parallel import hosts


def check_free(
  files: Iterable[str | os.PathLike], setting: str, overwrite: bool
) -> None:
  """Raises ValueError if results would replace files.

  Every command that writes results calls it, before it computes them.

  Args:
    files: that will be written.
    setting: name of their folder in gin, for errors.
    overwrite: whether OVERWRITE allows it.
  """
  there = [file for file in files if os.path.lexists(file)]
  if there and not overwrite:
    raise ValueError(
      f'{setting}: {os.fspath(there[0])} exists and would be overwritten. '
      f'Choose another {setting}, remove the file, or set --gin.OVERWRITE=True.'
    )


def write_atomically(path: str | os.PathLike, text: str) -> None:
  """Writes a file atomically and creates its folder. First host only."""
  if not hosts.is_first_host():
    return
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.partial')
  try:
    partial.write_text(text, encoding='utf-8')
  except OSError:
    partial.unlink(missing_ok=True)
    raise
  partial.rename(path)


LFS_POINTER = b'version https://git-lfs'


def explain_pointer(path: os.PathLike) -> str:
  """Returns what to do with a pointer of Git LFS; '' for another file.

  A clone of a Hugging Face repository without Git LFS has them for its weights.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    return ''
  with path.open('rb') as file:
    if file.read(len(LFS_POINTER)) != LFS_POINTER:
      return ''
  return (
    f'{path} is a pointer of Git LFS, not the file. Get it: cd {path.parent} '
    '&& git lfs install && git lfs pull.'
  )


class CheckpointMismatch(ValueError):
  """A checkpoint is intact but belongs to a run with other settings."""


# --- JSON files ---------------------------------------------------------------

REQUIRED = object()
_KINDS = {
  int: 'a whole number',
  float: 'a number',
  str: 'a text',
  bool: 'true or false',
  list: 'a list [...]',
  dict: 'an object {...}',
}


def parse_json(
  text: str | bytes, make_object: Callable[[list], Any] | None = None
) -> Any:
  """Returns the value that a JSON text represents.

  Args:
    text: JSON.
    make_object: [(name, value)] -> object; None: a dict.

  Raises:
    ValueError: it is not JSON, or not UTF-8, or is nested too deeply.
  """
  try:
    return json.loads(text, object_pairs_hook=make_object)
  except RecursionError:
    raise ValueError('it is nested too deeply') from None
  except UnicodeDecodeError as e:
    raise ValueError(f'it is not UTF-8: {e}') from e


def is_unicode(text: str) -> bool:
  """Whether a text can be encoded: it has no half of a surrogate pair."""
  if text.isascii():
    return True
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def parse_printable_json(text: bytes) -> Any:
  """Returns the value of a JSON text whose texts can be encoded.

  Raises:
    ValueError: see `parse_json`; or an escape stands for half of a surrogate
      pair.
  """
  values = parse_json(text)
  if b'\\ud' in text.lower() and not is_unicode(
    json.dumps(values, ensure_ascii=False)
  ):
    raise ValueError('it has half of a surrogate pair, which is no character')
  return values


def read_json(path: os.PathLike) -> dict[str, Any]:
  """Returns the object of a JSON file.

  Args:
    path: of the file; any path with `read_bytes`.

  Raises:
    ValueError: the file cannot be read, or does not hold a JSON object.
  """
  try:
    values = parse_printable_json(path.read_bytes())
  except OSError as e:
    raise ValueError(f'{path} cannot be read: {e.strerror or e}.') from e
  except ValueError as e:
    raise ValueError(
      f'{path} is not valid JSON: {e}. If it is incomplete, copy it again.'
    ) from e
  if not isinstance(values, dict):
    raise ValueError(
      f'{path} holds {type(values).__name__}, not an object {{...}}.'
    )
  return values


def field(
  values: Mapping[str, Any],
  name: str,
  kind: type,
  path: str | os.PathLike,
  default: Any = REQUIRED,
) -> Any:
  """Returns a field of a JSON object, checked.

  Args:
    values: the object.
    name: of the field.
    kind: int, float, str, bool, list or dict; float accepts whole numbers, and
      no number accepts true or false.
    path: of the file, for errors.
    default: for an absent field; a `None` default accepts null, too.

  Raises:
    ValueError: the field is absent and has no default, or has another type.
  """
  if name not in values:
    if default is REQUIRED:
      raise ValueError(f'{path} has no {name!r}.')
    return default
  value = values[name]
  if value is None and default is None:
    return None
  accepted = (int, float) if kind is float else kind
  if not isinstance(value, accepted) or (
    isinstance(value, bool) and kind is not bool
  ):
    raise ValueError(
      f'{path}: {name} must be {_KINDS[kind]}, not {_shown(value)}.'
    )
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f'{path}: {name} must be finite, not {value}.')
  return value


def _shown(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
