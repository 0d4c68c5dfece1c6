# SPDX-License-Identifier: Apache-2.0
"""Loads a model from a checkpoint of any format.

A path is a run folder of ours or a step in it, a Hugging Face folder, or a T5X
checkpoint. The format is detected from the files.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from gkd_jax.batch import SpecialIds
from gkd_jax.checkpoints import checkpoint, mistaken
from gkd_jax.checkpoints.formats import huggingface, t5x, tensors
from gkd_jax.data import tokenizer_files
from gkd_jax.data.tokenizer_files import TokenizerFiles
from gkd_jax.models import registry
from gkd_jax.models.interface import EXECUTION_FIELDS, Model, ModelConfig
from gkd_jax.models.params import abstract_params
from gkd_jax.parallel import hosts, partitioning
from gkd_jax.parallel.partitioning import Placement
from gkd_jax.runtime import paths, pins

Params = Any

_PACKAGE = pathlib.Path(__file__).parents[1]
# In a run folder: the tokenizer and configs of a Hugging Face checkpoint.
_SIDE_FOLDER = 'huggingface_files'


class Pretrained(NamedTuple):
  """An open checkpoint; its arrays are not read yet.

  Attributes:
    folder: of the checkpoint.
    format: 'gkd_jax', 'Hugging Face' or 'T5X'.
    config: the model's shape.
    vocabulary: the line of `vocabularies.describe`, or a part of it; None if no
      file describes it.
    dtype: of its parameters.
    num_params: number of parameters.
    load: (abstract parameters, dtype or None) -> parameters; None keeps the
      checkpoint's dtype.
    tokenizer: its tokenizer files, if it is a Hugging Face folder with some.
  """

  folder: epath.Path
  format: str
  config: ModelConfig
  vocabulary: str | None
  dtype: str
  num_params: int
  load: Callable[[Params, str | None], Params]
  tokenizer: TokenizerFiles | None = None

  def __str__(self) -> str:
    vocabulary = '' if self.vocabulary else ' (its vocabulary is not known)'
    return (
      f'{registry.describe(self.config)}, {self.num_params:,} {self.dtype} '
      f'parameters, {self.format}: {self.folder}{vocabulary}'
    )


def open_checkpoint(path: str, setting: str = 'CHECKPOINT_PATH') -> Pretrained:
  """Opens a checkpoint, of any format. Reads descriptions and headers only.

  Args:
    path: a run folder, a step in it, a Hugging Face folder, a T5X checkpoint or
      a folder of those; local or gs://.
    setting: its name in gin, for errors.

  Raises:
    ValueError: it is none of these, or is not whole.
  """
  if reason := mistaken.explain_address(path):
    raise ValueError(f'{setting}: {reason}')
  try:
    folder = checkpoint.find(path, _is_checkpoint, setting)
  except ValueError as e:
    if reason := mistaken.explain(path, setting):
      raise ValueError(f'{setting}: {reason}') from e
    raise
  except Exception as e:  # of the libraries that read gs://, of many types
    if not paths.is_remote(path):
      raise
    raise ValueError(
      f'{setting}: {path} cannot be reached: {checkpoint.first_line(e)}'
    ) from e
  with _named(setting, folder):
    found = _open(folder)

  def load(abstract_params, dtype):
    with _named(setting, folder):
      return found.load(abstract_params, dtype)

  return found._replace(load=load)


def pin(source: Pretrained, path: str) -> pins.Pin:
  """Pins the files that a model is read from.

  Args:
    source: the open checkpoint.
    path: that `open_checkpoint` was given.
  """
  names = {
    'gkd_jax': checkpoint.MODEL_FILES,
    huggingface.FORMAT: huggingface.model_files(source.folder),
  }.get(source.format, [''])
  return pins.of_checkpoint(path, source.folder, names)


@contextlib.contextmanager
def _named(setting: str, folder: epath.Path) -> Iterator[None]:
  """Names the setting and the checkpoint in errors of the libraries."""
  try:
    yield
  except Exception as e:  # a damaged file can raise anything
    if not checkpoint.is_damage(e):
      raise
    if not folder.exists():
      raise ValueError(
        f'{setting}: {folder} was removed while it was read: a run that trains '
        'on removes its old checkpoints. Run the same command again, or copy '
        'the checkpoint first.'
      ) from e
    *_, last = traceback.extract_tb(e.__traceback__)
    is_ours = pathlib.Path(last.filename).is_relative_to(_PACKAGE)
    if is_ours and isinstance(e, ValueError):
      raise ValueError(f'{setting}: {e}') from e
    raise ValueError(
      f'{setting}: {folder} cannot be read ({checkpoint.first_line(e)}). If it '
      'is not whole, copy it again, or name another.'
    ) from e


def _open(folder: epath.Path) -> Pretrained:
  if checkpoint.is_checkpoint(folder):
    saved = checkpoint.describe(folder)
    return Pretrained(
      folder,
      'gkd_jax',
      saved.config,
      saved.vocabulary,
      'float32',
      _count(checkpoint.saved_shapes(folder)),
      lambda abstract, dtype: checkpoint.load_params(
        folder, abstract, dtype or 'float32'
      ),
    )
  module = huggingface if huggingface.is_checkpoint(folder) else t5x
  config, arrays = module.open_folder(folder)
  tokenizer = None
  if module is huggingface:
    tokenizer = tokenizer_files.read(folder)
  dtypes = sorted({x.dtype.name for x in arrays.values()})
  return Pretrained(
    folder,
    module.FORMAT,
    config,
    huggingface.vocabulary(tokenizer),
    ' and '.join(dtypes),
    _count({name: x.shape for name, x in arrays.items()}),
    lambda abstract, dtype: tensors.place(arrays, abstract, dtype),
    tokenizer,
  )


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
  return sum(math.prod(shape) for shape in shapes.values())


def check_fits(
  source: Pretrained,
  vocabulary: str,
  ids: SpecialIds,
  config: ModelConfig | None = None,
  setting: str = 'STUDENT',
) -> None:
  """Raises ValueError unless a model fits; lists the first differences.

  Args:
    source: what `open_checkpoint` found.
    vocabulary: the task's, see `vocabularies.describe`.
    ids: of the run: those of its student and its vocabulary.
    config: the shape it must have; None: any.
    setting: the name of that shape in gin, for errors.
  """
  differences = []
  # A foreign tokenizer is known in part: its model, not how many extra ids. A
  # folder may have the same tokenizer in two files.
  known = (
    source.vocabulary,
    huggingface.json_vocabulary(source.tokenizer),
  )
  if source.vocabulary is not None and not any(
    line in vocabulary for line in known if line is not None
  ):
    differences.append(
      f'vocabulary: {source.vocabulary} in the checkpoint, {vocabulary} wanted'
    )
  if config is not None:
    differences += [
      f'{field}: {was} in the checkpoint, {want} in {setting}'
      for field, was in dataclasses.asdict(source.config).items()
      if field not in EXECUTION_FIELDS
      and was != (want := getattr(config, field))
    ]
  has = source.config.special_ids(ids.num_ids)
  if config is None:
    differences += [
      f'{name} id: {was} in the checkpoint, {want} of the student'
      for name, was in dataclasses.asdict(has).items()
      if was != (want := getattr(ids, name))
      # The student determines what is never written.
      and name != 'never_written'
    ]
  checkpoint.raise_differences(source.folder, differences)
  if ids.num_ids > source.config.vocab_size:
    raise ValueError(
      f'The checkpoint {source.folder} embeds {source.config.vocab_size} ids, '
      f"but the task's vocabulary has {ids.num_ids}: {vocabulary}. A "
      'SentencePiece model that has its sentinels already needs '
      'VOCABULARY_EXTRA_IDS = 0.'
    )


def check_dtype(setting: str, dtype: str | None) -> None:
  """Raises ValueError unless a setting is a supported dtype or None."""
  if dtype not in (None, 'float32', 'bfloat16'):
    raise ValueError(
      f"{setting} must be 'float32', 'bfloat16' or None, got {dtype!r}."
    )


def load_model(path: str, dtype: str | None = None) -> tuple[Model, Params]:
  """Loads a model and its parameters from any checkpoint, onto all devices.

  Args:
    path: see `open_checkpoint`.
    dtype: of the parameters, 'float32' or 'bfloat16'; None: as saved.

  Returns:
    The model, on one mesh of all devices, and its parameters.

  Raises:
    ValueError: there is no whole checkpoint, or no such dtype.
  """
  check_dtype('dtype', dtype)
  source = open_checkpoint(path, 'path')
  model = registry.make_model(
    source.config, Placement(partitioning.make_mesh())
  )
  return model, source.load(abstract_params(model), dtype)


def config_of(path: str, **changes) -> ModelConfig:
  """Returns the shape of a checkpoint's model, with some fields changed.

  Args:
    path: see `open_checkpoint`.
    **changes: fields out of `interface.EXECUTION_FIELDS`, e.g.
      dropout_rate=0.1.
  """
  if path is None:
    raise ValueError(
      "The student's shape is to be that of INITIAL_CHECKPOINT_PATH, which is "
      'not set. Set it, or give the shape by gin/models/published.gin.'
    )
  if fixed := set(changes) - {*EXECUTION_FIELDS}:
    raise ValueError(
      f'The checkpoint {path} says what {", ".join(sorted(fixed))} is; only '
      f'{", ".join(EXECUTION_FIELDS)} can be chosen.'
    )
  config = open_checkpoint(path, 'INITIAL_CHECKPOINT_PATH').config
  return dataclasses.replace(config, **changes)


def side_files(folder: epath.Path) -> epath.Path | None:
  """Returns the folder with a checkpoint's tokenizer, if it has one."""
  if huggingface.is_checkpoint(folder):
    return folder
  kept = folder.parent / _SIDE_FOLDER
  return kept if kept.is_dir() else None


def keep_side_files(
  folders: Sequence[epath.Path], run_dir: str | os.PathLike
) -> None:
  """Copies tokenizer and configuration into a run folder, for its export.

  Args:
    folders: checkpoints of one vocabulary; the first that has these files.
    run_dir: of the run.
  """
  where = next(filter(None, map(side_files, folders)), None)
  if where is None or not hosts.is_first_host():
    return
  kept = epath.Path(run_dir) / _SIDE_FOLDER
  kept.mkdir(parents=True, exist_ok=True)
  for name in (*huggingface.SIDE_FILES, huggingface.CONFIG):
    if (where / name).exists():
      (where / name).copy(kept / name, overwrite=True)


def _is_checkpoint(folder: epath.Path) -> bool:
  return (
    checkpoint.is_checkpoint(folder)
    or huggingface.is_checkpoint(folder)
    or t5x.is_checkpoint(folder)
  )
