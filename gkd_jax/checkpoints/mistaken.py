# SPDX-License-Identifier: Apache-2.0
"""Explains what a path is that was given for a checkpoint and is none."""

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from gkd_jax.runtime import paths

_ADAPTER = 'adapter_config.json'
_WEIGHTS = ('model.safetensors', 'model.safetensors.index.json')
_ARCHIVES = ('.zip', '.tar', '.tgz', '.gz', '.bz2', '.xz', '.7z')


def explain_address(path: str) -> str | None:
  """Returns why an address is no path of a checkpoint; None if it may be one.

  Args:
    path: as the user gave it.
  """
  path = str(path)
  match = re.match(r'([A-Za-z][A-Za-z0-9+.-]*):/', path)
  if not match or path.startswith('gs://'):
    return None
  hub = re.search(r'(?:huggingface\.co|hf\.co|hf:/)/([\w.-]+/[\w.-]+)', path)
  if hub:
    return (
      f'{path} is an address of the Hugging Face hub; gkd_jax downloads '
      f'nothing. {_download(hub[1])}'
    )
  if match[1] == 'file':
    return f'{path} is a URL. Use the path: {path.partition("://")[2]}'
  how = {
    's3': f'aws s3 cp --recursive {path} FOLDER',
    'az': f'az storage copy --recursive -s {path} -d FOLDER',
  }.get(match[1])
  return (
    f'{path} is an address of {match[1]}://, which gkd_jax does not read. '
    'Copy it to a folder first'
    + (f': {how}' if how else '')
    + ', and use that folder.'
  )


def explain(path: str | os.PathLike, setting: str) -> str | None:
  """Returns what a path is, and what to give instead; None if unknown.

  Args:
    path: of no checkpoint.
    setting: its name in gin, for errors.
  """
  if paths.is_remote(path):
    return None
  folder = paths.resolve(path, setting)
  try:
    if folder.is_file():
      return _explain_file(folder)
    if folder.is_dir():
      return _explain_folder(folder)
    return _explain_name(str(path), folder)
  except OSError:  # it cannot be listed
    return None


def _explain_file(file: pathlib.Path) -> str:
  if file.suffix in _ARCHIVES:
    return f'{file} is an archive. Unpack it, and give the folder.'
  return (
    f'{file} is a file. Give the folder of the checkpoint: did you mean '
    f'{file.parent}?'
  )


def _explain_name(path: str, folder: pathlib.Path) -> str | None:
  # Names of the hub are OWNER/MODEL; 'runs/teacher' with a folder 'runs' is a
  # path. Old models have no owner.
  is_name = re.fullmatch(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*', path)
  is_old = re.fullmatch(r'(by|m|um|flan-)?t5-[\w.-]+', path)
  if not is_old and (not is_name or folder.parent.is_dir()):
    return None
  return (
    f'{path} does not exist in {pathlib.Path.cwd()}. If it is the name of a '
    'model on the Hugging Face hub: gkd_jax downloads nothing. '
    f'{_download(path)}'
  )


def _download(name: str) -> str:
  folder = f'models/{name.rpartition("/")[2]}'
  return (
    f'Download it first, hf download {name} --local-dir {folder}, and use '
    f'that folder: {folder}.'
  )


def _explain_folder(folder: pathlib.Path) -> str | None:
  if (folder / _ADAPTER).is_file():
    return explain_adapter(folder)
  if snapshots := _subfolders(folder / 'snapshots', '*'):
    return (
      f'{folder} is a folder of the Hugging Face cache. Give one of its '
      f'snapshots: did you mean {_snapshot(folder, snapshots)}?'
    )
  if cached := _subfolders(folder, 'models--*'):
    of_one = _subfolders(cached[0] / 'snapshots', '*')
    where = _snapshot(cached[0], of_one) if of_one else cached[0]
    return (
      f'{folder} is the Hugging Face cache. Give a snapshot of one model, such '
      f'as {where}.'
    )
  steps = [
    f
    for f in _subfolders(folder, 'checkpoint-*')
    if re.fullmatch(r'checkpoint-\d+', f.name)
  ]
  if steps:
    newest = max(steps, key=lambda f: int(f.name.rpartition('-')[2]))
    return (
      f"{folder} is the output folder of transformers' Trainer, without a "
      f'model of its own. Did you mean its newest checkpoint, {newest}?'
    )
  if any((folder / name).is_file() for name in _WEIGHTS):
    return (
      f'{folder} has weights, but no config.json, which describes the model. '
      'Copy it there.'
    )
  if (folder / 'config.gin').is_file():
    return (
      f'{folder} is a run that has no checkpoint. Wait until it has saved one, '
      'or use another run.'
    )
  if list(folder.glob('*.index')) and (folder / 'checkpoint').is_file():
    return (
      f"{folder} is a TensorFlow checkpoint, such as the T5 library's, which "
      'gkd_jax does not read. T5X and Hugging Face have the same models.'
    )
  inner = [
    f
    for f in _subfolders(folder, '*')
    if (f / 'config.json').is_file() or list(f.glob('checkpoint_*'))
  ]
  if len(inner) == 1:
    return f'{folder} holds no checkpoint. Did you mean {inner[0]}?'
  return None


def explain_adapter(folder: os.PathLike) -> str | None:
  """Returns what to do with a folder of a PEFT adapter; None for others."""
  file = pathlib.Path(folder) / _ADAPTER
  if not file.is_file():
    return None
  try:
    values: Any = json.loads(file.read_bytes())
    kind, base = values.get('peft_type'), values.get('base_model_name_or_path')
  except (ValueError, AttributeError, RecursionError):
    kind = base = None
  return (
    f'{folder} is an adapter ({kind or "of PEFT"}) of '
    f'{base or "another model"}, not a whole model. Merge it first: '
    f'PeftModel.from_pretrained(BASE_MODEL, {str(folder)!r})'
    '.merge_and_unload().save_pretrained(NEW_FOLDER), and use NEW_FOLDER.'
  )


def _subfolders(folder: pathlib.Path, pattern: str) -> Sequence[pathlib.Path]:
  return sorted(f for f in folder.glob(pattern) if f.is_dir())


def _snapshot(
  folder: pathlib.Path, snapshots: Sequence[pathlib.Path]
) -> pathlib.Path:
  """Returns the snapshot of `main`, or the last one."""
  main = folder / 'refs' / 'main'
  if main.is_file():
    named = (
      folder
      / 'snapshots'
      / main.read_text(encoding='utf-8', errors='replace').strip()
    )
    if named.is_dir():
      return named
  return snapshots[-1]
