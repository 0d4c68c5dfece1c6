# SPDX-License-Identifier: Apache-2.0
"""Pins the files that a run depends on: data, predictions, checkpoints.

A pin has a fingerprint of each file. It is written into the run's folder when
the run starts, and compared when the run resumes. A fingerprint depends on the
content alone, so that files may be copied.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from gkd_jax.runtime import files, run_folder

_FILE = 'pins.json'
_SAMPLED = 'sampled'
# Of a file that is sampled: whole up to this size, else blocks of it.
_WHOLE_BYTES = 2**20
_BLOCK_BYTES = 2**12
_BYTES_PER_BLOCK = 2**20
_MAX_BLOCKS = 256
_MAX_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Pin:
  """What one setting of a run refers to.

  Attributes:
    files: {path relative to `path` and `step`: fingerprint}.
    path: as the setting has it; '' if `files` are paths themselves.
    step: 'checkpoint_<step>', the newest one in `path` when the run started;
      None: `path` is no folder of checkpoints.
  """

  files: Mapping[str, str]
  path: str = ''
  step: str | None = None


Pins = Mapping[str, Pin]  # {setting: pin}


# --- Fingerprints -------------------------------------------------------------


def of_files(paths: Iterable[str]) -> Pin:
  """Pins files by all of their content; a folder stands for all files in it."""
  return Pin({name: _fingerprint(name, False) for name in _walk(paths)})


def of_file(path: str) -> Pin:
  """Pins a file by all of its content; its folder may have another name."""
  folder, name = os.path.split(path)
  return Pin({name: _fingerprint(path, False)}, folder)


def of_checkpoint(path: str, folder: epath.Path, names: Iterable[str]) -> Pin:
  """Pins a checkpoint by the sizes of its files and samples of their content.

  Args:
    path: the setting: the checkpoint, or a folder of checkpoints.
    folder: of the checkpoint.
    names: its files, or folders of files, that a model is read from; those that
      do not exist are left out.
  """
  found = _walk(
    str(folder / name) for name in names if (folder / name).exists()
  )
  is_step = run_folder.step_of(folder) is not None
  is_step &= _at(path).name != folder.name
  return Pin(
    {
      name.removeprefix(f'{folder}/'): _fingerprint(name, True)
      for name in found
    },
    path,
    folder.name if is_step else None,
  )


def _at(path: str) -> epath.Path:
  return epath.Path(os.path.expanduser(path))


def _walk(paths: Iterable[str]) -> list[str]:
  """Returns the files among paths, and those below the folders among them."""
  found = []
  for path in paths:
    if epath.Path(path).is_dir():
      below = sorted(child.name for child in epath.Path(path).iterdir())
      found += _walk(os.path.join(path, name) for name in below)
    else:
      found.append(path)
  return found


def _fingerprint(path: str, sampled: bool) -> str:
  """Returns the size of a file and a hash of its content, or of samples."""
  size = epath.Path(path).stat().length
  digest = hashlib.blake2b(digest_size=8)
  with epath.Path(path).open('rb') as file:
    if not sampled or size <= _WHOLE_BYTES:
      while block := file.read(_WHOLE_BYTES):
        digest.update(block)
      return f'{size:,} bytes, {digest.hexdigest()}'
    num_blocks = min(_MAX_BLOCKS, size // _BYTES_PER_BLOCK + 1)
    for i in range(num_blocks + 1):
      file.seek((size - _BLOCK_BYTES) * i // num_blocks)
      digest.update(file.read(_BLOCK_BYTES))
  return f'{size:,} bytes, {_SAMPLED} {digest.hexdigest()}'


# --- Comparisons --------------------------------------------------------------


def differences(was: Pins, now: Pins) -> list[str]:
  """Returns a line for each file that differs: setting, file, was and is."""
  lines = []
  for setting in sorted({*was, *now}):
    old, new = was.get(setting, _NOTHING), now.get(setting, _NOTHING)
    for name in sorted({*old.files, *new.files}):
      before, after = old.files.get(name), new.files.get(name)
      if before != after:
        where = os.path.join(new.path or old.path, new.step or '', name)
        lines.append(
          f'{setting}: {where} was {before or "absent"}, is {after or "absent"}'
        )
  return lines


_NOTHING = Pin({})


def changes_since(all_pins: Iterable[Pins]) -> list[str]:
  """Returns the `differences` of the files that pins name from those now."""
  fingerprint = functools.cache(_fingerprint)
  lines = [line for was in all_pins for line in _changes(was, fingerprint)]
  return list(dict.fromkeys(lines))


def _changes(was: Pins, fingerprint: Callable[[str, bool], str]) -> list[str]:
  now, lines = {}, []
  for setting, pin in was.items():
    newest = newest_step(pin.path) if pin.step else None
    if newest != pin.step:
      lines.append(
        f'{setting}: of {pin.path} {pin.step} was used; its newest is '
        f'{newest or "absent"}'
      )
      now[setting] = pin
      continue
    folder = os.path.join(os.path.expanduser(pin.path), pin.step or '')
    now[setting] = dataclasses.replace(
      pin,
      files={
        name: fingerprint(path, _SAMPLED in before)
        for name, before in pin.files.items()
        if epath.Path(path := os.path.join(folder, name)).is_file()
      },
    )
  return lines + differences(was, now)


def shown(lines: list[str]) -> str:
  """Returns the first differences, each on a line of its own."""
  more = len(lines) - _MAX_SHOWN
  first = [*lines[:_MAX_SHOWN], *([f'and {more} more'] if more > 0 else [])]
  return ''.join(f'\n  {line}' for line in first)


def check_same(folder: pathlib.Path, was: Pins | None, now: Pins) -> None:
  """Raises ValueError if a run was started with other files.

  Args:
    folder: of the run, for the error.
    was: see `read`; None: the run starts now.
    now: what the run would use.
  """
  if was is None:
    return
  if lines := differences(was, now):
    raise ValueError(
      f'The run in MODEL_DIR {folder} was started with other files:'
      f'{shown(lines)}\nRestore these to resume the run, or use another '
      'MODEL_DIR.'
    )


# --- Steps of run folders that are trained on ---------------------------------


def newest_step(path: str) -> str | None:
  """Returns the newest 'checkpoint_<step>' of a folder, None if none exists."""
  steps = run_folder.checkpoint_steps(_at(path))
  return f'{run_folder.CHECKPOINT}_{max(steps)}' if steps else None


def pinned_path(
  pins: Pins | None, setting: str, path: str | None
) -> str | None:
  """Returns the path of the checkpoint that a run was started with.

  Args:
    pins: of the run; None: it starts now.
    setting: name of the path in gin.
    path: a checkpoint or a folder of them; None: not set.

  Raises:
    ValueError: that checkpoint has been removed since.
  """
  pin = (pins or {}).get(setting)
  if path is None or pin is None or pin.step is None:
    return path
  pinned = _at(path) / pin.step
  if not pinned.is_dir():
    raise ValueError(
      f'{setting}: this run was started with {pin.step} of {path}, which does '
      f'not exist any more (the newest is {newest_step(path)}). Restore it, or '
      'start a new run.'
    )
  return str(pinned)


# --- On disk ------------------------------------------------------------------


def to_json(pins: Pins) -> dict[str, Any]:
  """Returns pins as JSON represents them."""
  return {name: dataclasses.asdict(pin) for name, pin in pins.items()}


def from_json(values: Mapping[str, Any]) -> dict[str, Pin]:
  """Returns the pins of `to_json`."""
  return {name: Pin(**fields) for name, fields in values.items()}


def save(folder: pathlib.Path, pins: Pins) -> None:
  """Writes the pins of a run that starts."""
  text = json.dumps(to_json(pins), indent=1) + '\n'
  files.write_atomically(folder / _FILE, text)


def read_all(folder: pathlib.Path) -> Iterator[Pins]:
  """Yields the pins of a run, and of all predictions written to a folder."""
  if (pins := read(folder)) is not None:
    yield pins
  for path in sorted(folder.glob('predictions_*.json')):
    yield from_json(files.read_json(path).get('pins', {}))


def read(folder: pathlib.Path) -> dict[str, Pin] | None:
  """Returns the pins of a run; None if it has none.

  Raises:
    ValueError: the file is damaged.
  """
  path = folder / _FILE
  if not path.exists():
    return None
  try:
    return from_json(json.loads(path.read_text(encoding='utf-8')))
  except (ValueError, TypeError, AttributeError) as e:
    raise ValueError(
      f'{path} is damaged ({e}): it records the files that the run depends on. '
      'Restore it, or remove it to resume the run with the present files.'
    ) from e
