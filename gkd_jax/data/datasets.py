# SPDX-License-Identifier: Apache-2.0
"""The configuration of a dataset, its seqio task, and its vocabulary.

seqio and TensorFlow are imported on first use, here and in `seqio_tasks` and
`vocabularies`: the import takes 10 seconds, and errors in settings are reported
before it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epy

from gkd_jax.batch import Batch, SpecialIds
from gkd_jax.data import seqio_tasks, vocabularies
from gkd_jax.runtime import paths

with epy.lazy_imports():
  import seqio


@dataclasses.dataclass(frozen=True)
class TeacherInputs:
  """What the teacher reads in place of the student's inputs.

  Attributes:
    length: in tokens, EOS included; longer inputs are truncated.
    template: text with the names of an example's texts in braces, e.g.
      '{inputs} An answer: {targets}'. '{exemplars}' is replaced by examples of
      the train split. None: the task has a feature `teacher_inputs`.
    num_exemplars: number of examples in '{exemplars}'.
    exemplar: template of each of them.
    seed: draws them; they are the same for all rows.
  """

  length: int
  template: str | None = '{inputs}'
  num_exemplars: int = 0
  exemplar: str = '{inputs}\n{targets}\n\n'
  seed: int = 0

  def __post_init__(self):
    prefix = 'datasets.TeacherInputs.'
    if not isinstance(self.length, int) or self.length < 1:
      raise ValueError(
        f'{prefix}length must be a positive whole number, got {self.length!r}.'
      )
    if not isinstance(self.num_exemplars, int) or self.num_exemplars < 0:
      raise ValueError(
        f'{prefix}num_exemplars must be a whole number, 0 or more, got '
        f'{self.num_exemplars!r}.'
      )
    has_place = self.template is not None and (
      'exemplars' in names_in(self.template, f'{prefix}template')
    )
    names_in(self.exemplar, f'{prefix}exemplar')
    if has_place != (self.num_exemplars > 0):
      raise ValueError(
        f'{prefix}template is {self.template!r} and {prefix}num_exemplars is '
        f'{self.num_exemplars}: set both {{exemplars}} and their number, or '
        'neither.'
      )


def names_in(template: str, setting: str) -> list[str]:
  """Returns the names in braces of a template.

  Raises:
    ValueError: the braces do not match, or enclose more than a name.
  """
  try:
    parts = list(string.Formatter().parse(template))
  except (ValueError, TypeError) as e:
    raise ValueError(
      f'{setting} is {template!r}: {e}. Write {{{{ and }}}} for braces in the '
      'text.'
    ) from e
  names = [name for _, name, *_ in parts if name is not None]
  for _, name, form, conversion in parts:
    if name is not None and (not name.isidentifier() or form or conversion):
      raise ValueError(
        f'{setting} is {template!r}: only names may stand in braces, such as '
        '{inputs}. Write {{ and }} for braces in the text.'
      )
  return names


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
  """A split of a task, and the shape of its batches. Names as in T5X.

  Attributes:
    mixture_or_task_name: a seqio task or mixture.
    task_feature_lengths: {'inputs': S, 'targets': T} in tokens, EOS included;
      longer examples are truncated.
    batch_size: rows of the global batch.
    split: of the task, e.g. 'train'.
    shuffle: whether to shuffle; the seed determines the order.
    mixture_or_task_module: module that registers the task; None for the tasks
      of gkd_jax.
    use_cached: read seqio's offline cache of the task.
    num_examples: use only the first examples of the split; None: all. For
      training they are counted before preprocessing.
    vocabulary: of inputs and targets; None: the task's own.
    task_arguments: of the function make_task in the task's module, e.g. the
      paths of its files.
    predictions: path or glob of files with outputs of a model (see
      `predictions`); they and their inputs replace the examples of the split.
    teacher_inputs: what the teacher reads; None: the inputs.
    teachers: names of several teachers; the text `teacher` of each example
      names its own. Of {name: value} the names are read. None: examples name
      none.
    row_weights: whether each example has a number `weight`, which scales its
      gradient: in JSON lines, in predictions, or as a feature of the task's
      examples before tokenization. It may be negative.
    pairs: whether two adjacent predictions are one example, the better output
      first, for a credit that compares them.
  """

  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  batch_size: int
  split: str = 'train'
  shuffle: bool = True
  mixture_or_task_module: str | None = None
  use_cached: bool = False
  num_examples: int | None = None
  vocabulary: seqio.Vocabulary | None = None
  task_arguments: Mapping[str, Any] | None = None
  predictions: str | None = None
  teacher_inputs: TeacherInputs | None = None
  teachers: Sequence[str] | Mapping[str, Any] | None = None
  row_weights: bool = False
  pairs: bool = False

  def __post_init__(self):
    if isinstance(self.teachers, str) or self.teachers == ():
      raise ValueError(
        'datasets.DatasetConfig.teachers must be a list of names or '
        f"{{'name': path}}, got {self.teachers!r}."
      )
    if self.teachers is not None and self.predictions is not None:
      raise ValueError(
        'datasets.DatasetConfig.teachers is set together with '
        'TRAIN_ON_PREDICTIONS, whose rows name no teacher. Unset one of them.'
      )
    if self.teacher_inputs is not None and self.predictions is not None:
      raise ValueError(
        'datasets.DatasetConfig.teacher_inputs is set together with '
        'TRAIN_ON_PREDICTIONS, whose rows are token ids without texts for the '
        'template. Unset one of them.'
      )
    if self.pairs and (self.predictions is None or self.row_weights):
      raise ValueError(
        'datasets.DatasetConfig.pairs is set, '
        + (
          'but TRAIN_ON_PREDICTIONS is not: pairs of outputs are lines of such '
          'a file. Set it.'
          if self.predictions is None
          else 'and so is row_weights: a pair has no weight. Unset one of them.'
        )
      )
    lengths = dict(self.task_feature_lengths)
    if sorted(lengths) != sorted(seqio_tasks.FEATURES) or not all(
      isinstance(n, int) and n > 0 for n in lengths.values()
    ):
      raise ValueError(
        "TASK_FEATURE_LENGTHS must be {'inputs': tokens, 'targets': tokens} "
        f'with positive whole numbers, got {lengths}.'
      )
    if not isinstance(self.batch_size, int) or self.batch_size < 1:
      raise ValueError(
        f'BATCH_SIZE must be a positive whole number, got {self.batch_size!r}.'
      )
    arguments = self.task_arguments
    if arguments is not None and not isinstance(arguments, Mapping):
      raise ValueError(
        'datasets.DatasetConfig.task_arguments must be {name: value}, or '
        f'None; got {arguments!r}.'
      )
    n = self.num_examples
    if n is not None and (not isinstance(n, int) or n < 1):
      raise ValueError(
        f'{self.split}: the number of examples must be a positive whole '
        f'number, or None for all of them; got {n!r}.'
      )

  @property
  def has_teacher_inputs(self) -> bool:
    return self.teacher_inputs is not None

  @property
  def lengths(self) -> dict[str, int]:
    """{feature: tokens}, with the features that are not in every batch."""
    lengths = dict(self.task_feature_lengths)
    if self.teacher_inputs is not None:
      lengths[seqio_tasks.TEACHER_INPUTS] = self.teacher_inputs.length
    if self.teachers is not None:
      lengths[seqio_tasks.TEACHER_IDS] = 1
    if self.row_weights:
      lengths[seqio_tasks.ROW_WEIGHTS] = 1
    if self.pairs:
      lengths[seqio_tasks.REJECTED] = lengths['targets']
    return lengths


def get_task(config: DatasetConfig) -> seqio.Task | seqio.Mixture:
  """Imports the module that registers the task, and returns the task.

  Raises:
    ValueError: the module does not exist; the task is not registered, or lacks
      the split, inputs or targets; the vocabulary file is unreadable; or the
      predictions were written for another task or vocabulary.
  """
  name = config.mixture_or_task_name
  task = seqio_tasks.find(
    name, config.mixture_or_task_module, config.task_arguments
  )
  if config.split not in task.splits:
    raise ValueError(
      f'Task {name!r} has no split {config.split!r}. It has: '
      f'{", ".join(sorted(task.splits))}. To skip an evaluation, set EVAL = '
      'None (during training) or FINAL_EVAL = None (after training).'
    )
  if missing := set(seqio_tasks.FEATURES) - set(task.output_features):
    raise ValueError(
      f'Task {name!r} has no output feature {sorted(missing)}; an '
      'encoder-decoder needs inputs and targets.'
    )
  if config.vocabulary is not None:
    task = seqio_tasks.with_vocabulary(task, config.vocabulary)
  else:
    for feature in task.output_features.values():
      vocabularies.check_can_be_read(name, feature.vocabulary)
  if config.predictions is not None:
    task = seqio_tasks.with_predictions(
      task,
      config.predictions,
      task_name=name,
      split=config.split,
      lengths=dict(config.task_feature_lengths),
      row_weights=config.row_weights,
      pairs=config.pairs,
    )
  elif config.row_weights:
    task = seqio_tasks.with_row_weights(task)
  if config.teacher_inputs is not None:
    task = _with_teacher_inputs(task, config.teacher_inputs)
  if config.teachers is not None:
    task = seqio_tasks.with_teacher_ids(task, sorted(config.teachers))
  return task


def _with_teacher_inputs(task, config: TeacherInputs):
  """Returns the task with the feature `teacher_inputs`."""
  if config.template is None:
    if seqio_tasks.TEACHER_INPUTS not in task.output_features:
      raise ValueError(
        f'datasets.TeacherInputs.template is None, but task {task.name!r} has '
        f'no output feature {seqio_tasks.TEACHER_INPUTS!r}.'
      )
    return task
  template = config.template
  if config.num_exemplars:
    texts = seqio_tasks.exemplars(
      task, config.exemplar, config.num_exemplars, config.seed
    )
    # Braces in the examples are text.
    texts = texts.replace('{', '{{').replace('}', '}}')
    template = template.replace('{exemplars}', texts)
  return seqio_tasks.with_teacher_inputs(task, template)


def files_of(config: DatasetConfig) -> list[str]:
  """Returns the local files and folders that the examples are read from.

  Those that the task's arguments name or match, and those of seqio's file
  sources; data of TFDS and of other sources has a version of its own.
  """
  task = get_task(dataclasses.replace(config, predictions=None))
  parts = task.tasks if isinstance(task, seqio.Mixture) else [task]
  named = [path for path in _texts(config.task_arguments) if path]
  for part in parts:
    if isinstance(part.source, seqio.FileDataSource):
      named += part.source.list_shards(config.split)
  found = itertools.chain.from_iterable(map(paths.find, named))
  return sorted({path for path in found if os.path.exists(path)})


def _texts(values: Any) -> Iterator[str]:
  """Yields the texts in nested lists and dicts."""
  if isinstance(values, str):
    yield values
  elif isinstance(values, Mapping):
    yield from _texts([*values.values()])
  elif isinstance(values, Sequence):
    for value in values:
      yield from _texts(value)


def check_teachers(config: DatasetConfig) -> None:
  """Raises ValueError if an example names an unknown teacher.

  Reads the texts of all examples of the split, once per process.
  """
  if config.teachers is None:
    return
  names = sorted(config.teachers)
  task = get_task(config).name
  found = _teachers_of(task, config.split, config.num_examples)
  if unknown := sorted(found - {*names}):
    raise ValueError(
      f'Examples of task {config.mixture_or_task_name!r}, split '
      f'{config.split!r}, name the teacher '
      f'{", ".join(map(repr, unknown))}, but the teachers are '
      f'{", ".join(names)}: add it to TEACHER_CHECKPOINT_PATH = '
      '{\'name\': path}, or correct the field "teacher" of the examples.'
    )


def check_row_weights(config: DatasetConfig) -> None:
  """Raises ValueError if the weight of an example is missing or not finite.

  Reads the weights of all examples of the split, once per process; those of
  predictions were checked when they were read.
  """
  if config.row_weights and config.predictions is None:
    _check_row_weights(get_task(config).name, config.split, config.num_examples)


@functools.lru_cache
def _check_row_weights(name: str, split: str, num_examples: int | None) -> None:
  task = seqio.get_mixture_or_task(name)
  seqio_tasks.check_row_weights(task, split, num_examples)


@functools.lru_cache
def _teachers_of(name: str, split: str, num_examples: int | None) -> set[str]:
  task = seqio.get_mixture_or_task(name)
  return seqio_tasks.teachers_of(task, split, num_examples)


def check_not_empty(config: DatasetConfig, num_shards: int = 1) -> None:
  """Raises ValueError if the split has fewer examples than shards.

  Reads the first `num_shards` examples.

  Args:
    config: of the dataset.
    num_shards: into which it is split; each repeats its examples.
  """
  num_read = _num_first(
    get_task(config).name,
    config.split,
    tuple(config.lengths.items()),
    config.use_cached,
    num_shards,
  )
  num_used = min(num_read, config.num_examples or num_read)
  split = f'Split {config.split!r} of task {config.mixture_or_task_name!r}'
  if num_used == 0:
    raise ValueError(f'{split} is empty.')
  if num_used < num_shards:
    raise ValueError(
      f'{split} has {num_used} examples, but the data of this run is split '
      f'into {num_shards} shards. Set experiment.Data.num_shards to {num_used} '
      'or less; it must be a multiple of the number of hosts.'
    )


@functools.lru_cache
def _num_first(
  name: str,
  split: str,
  lengths: Sequence[tuple[str, int]],
  use_cached: bool,
  limit: int,
) -> int:
  """Counts a registered task's examples up to a limit; cached."""
  ds = seqio.get_mixture_or_task(name).get_dataset(
    sequence_length=dict(lengths),
    split=split,
    shuffle=False,
    use_cached=use_cached,
  )
  return sum(1 for _ in ds.take(limit))


def get_vocabulary(config: DatasetConfig) -> seqio.Vocabulary:
  """Returns the vocabulary of the task's inputs and targets.

  Raises:
    ValueError: they differ.
  """
  features = get_task(config).output_features
  vocabulary = features['targets'].vocabulary
  if features['inputs'].vocabulary != vocabulary:
    raise ValueError(
      f'Task {config.mixture_or_task_name!r} has different vocabularies for '
      'inputs and targets; the model embeds both with one table.'
    )
  return vocabulary


def special_ids(
  config: DatasetConfig, vocabulary: seqio.Vocabulary, model_config: Any
) -> SpecialIds:
  """Returns the special ids of a model for a task's vocabulary.

  Args:
    config: of the task, for errors.
    vocabulary: of the task, see `get_vocabulary`.
    model_config: see `models.interface`.

  Raises:
    ValueError: vocabulary and model have different EOS ids, or the start of
      the model is an unknown token of the vocabulary.
  """
  if vocabulary.eos_id != model_config.eos_id:
    raise ValueError(
      f'The vocabulary of task {config.mixture_or_task_name!r} has EOS id '
      f'{vocabulary.eos_id}, but the model has EOS id {model_config.eos_id}: '
      'it was trained with another tokenizer. If that is a SentencePiece '
      'model, set --gin_file=gin/vocabularies/sentencepiece.gin and '
      '--gin.VOCABULARY_PATH to its file; gkd_jax does not read BPE and '
      'WordPiece tokenizers.'
    )
  ids = model_config.special_ids(vocabulary.vocab_size)
  if (
    ids.start != ids.pad
    and ids.start in ids.never_written
    and ids.start == vocabulary.unk_id
    and not isinstance(vocabulary, seqio.ByteVocabulary)  # it has no such token
  ):
    raise ValueError(
      f'The decoder of the model, {model_config.describe()}, starts with id '
      f'{ids.start}, which no output may hold. In the vocabulary of task '
      f'{config.mixture_or_task_name!r} it is the unknown token, which targets '
      'hold. Use the vocabulary that the model was trained with.'
    )
  never = {*ids.never_written, *vocabularies.unused_ids(vocabulary)}
  return dataclasses.replace(ids, never_written=tuple(sorted(never)))


# Rows of a batch [n, ...] -> tokens written for them [n, T].
Predict = Callable[[Batch], np.ndarray]
