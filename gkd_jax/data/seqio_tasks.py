# SPDX-License-Identifier: Apache-2.0
"""Finds seqio tasks, and derives tasks from them.

A derived task has another vocabulary, a model's outputs as its examples, or
only the first examples. seqio identifies tasks by name, so each derived task is
registered once under its own name. seqio and TensorFlow are imported on first
use; see `datasets`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import os
import string
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epy

from gkd_jax.data import predictions, vocabularies
from gkd_jax.runtime import console, paths

with epy.lazy_imports():
  import seqio
  import tensorflow as tf

FEATURES = ('inputs', 'targets')
TEACHER_INPUTS = 'teacher_inputs'  # the feature that only a teacher reads
TEACHER_IDS = 'teacher_ids'  # the number of the example's teacher
ROW_WEIGHTS = 'row_weights'  # the weight of the example
REJECTED = 'rejected'  # the worse output of a pair
_WEIGHT = 'weight'  # the number of an example that is its weight
_TEACHER = 'teacher'  # the text of an example that names its teacher
# Suffix of a feature that is true if a row of predictions was cut to length.
CUT = '_cut'


def set_tfds_data_dir(folder: str) -> None:
  """Sets the data folder of TFDS, which may be at gs://."""
  if not paths.is_remote(folder):
    folder = paths.resolve(folder, '--tfds_data_dir')
  seqio.set_tfds_data_dir_override(paths.for_libraries(folder))


def find(
  name: str, module: str | None, arguments: Mapping[str, Any] | None
) -> seqio.Task | seqio.Mixture:
  """Imports the module that registers a task or mixture, and returns the task.

  Args:
    name: of the task.
    module: to import; None for the tasks of gkd_jax.
    arguments: of the function make_task in the module; None: no arguments.

  Raises:
    ValueError: the task is not registered, the module does not exist, or its
      make_task does not accept the arguments.
  """
  imported = _import_module(name, module)
  registered = _registered()
  if arguments is not None or (
    name not in registered and hasattr(imported, 'make_task')
  ):
    return _make_task(imported, name, arguments or {})
  if name in registered:
    return seqio.get_mixture_or_task(name)
  names = sorted({*registered, *_bundled_tasks()})
  near = difflib.get_close_matches(name, names, n=1)
  raise ValueError(
    f'MIXTURE_OR_TASK_NAME: no task or mixture {name!r} is registered.'
    + (f' Did you mean {near[0]!r}?' if near else '')
    + f' Registered: {", ".join(names)}. To use your own, set '
    'MIXTURE_OR_TASK_MODULE to the Python module that registers it.'
  )


def _import_module(name: str, module: str | None) -> types.ModuleType | None:
  """Imports the task's module; returns None for an unknown task without one."""
  if module is None:
    if name in _bundled_tasks():
      return importlib.import_module(f'gkd_jax.data.tasks.{name}')
    return None
  if not all(part.isidentifier() for part in module.split('.')):
    raise ValueError(
      f'MIXTURE_OR_TASK_MODULE: {module!r} is not the name of a Python module, '
      'such as my_project.tasks.'
    )
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as e:
    if e.name is None or not f'{module}.'.startswith(f'{e.name}.'):
      raise  # an import inside the module fails
    raise ValueError(
      f'MIXTURE_OR_TASK_MODULE: there is no Python module {module!r} in the '
      'working directory, on PYTHONPATH, or among the installed packages.'
    ) from e


def _make_task(
  module: types.ModuleType | None, name: str, arguments: Mapping[str, Any]
) -> seqio.Task | seqio.Mixture:
  """Returns make_task(name, **arguments), registered under its own name.

  The name contains a hash of the arguments, because seqio's evaluator
  identifies tasks by name.
  """
  make_task = getattr(module, 'make_task', None)
  if make_task is None:
    raise ValueError(
      f'datasets.DatasetConfig.task_arguments is set, but task {name!r} takes '
      'no arguments: its module has no function make_task.'
    )
  signature = inspect.signature(make_task)
  try:
    signature.bind(name, **arguments)
  except TypeError as e:
    raise ValueError(
      f'datasets.DatasetConfig.task_arguments of task {name!r}: {e}. Its '
      f'arguments are {", ".join([*signature.parameters][1:])}. If '
      f'gin/tasks/{name}.gin exists, its macros set them.'
    ) from e
  if arguments:
    name += f'__{_digest(json.dumps(arguments, sort_keys=True, default=str))}'
  if name in _registered():
    return seqio.get_mixture_or_task(name)
  return _register(make_task(name, **arguments))


def with_vocabulary(
  task: seqio.Task | seqio.Mixture, vocabulary: seqio.Vocabulary
) -> seqio.Task | seqio.Mixture:
  """Returns the task with another vocabulary, registered under a new name.

  A mixture keeps its rates and its sampling function.
  """

  def change(part):
    features = {
      feature: dataclasses.replace(value, vocabulary=vocabulary)
      for feature, value in part.output_features.items()
    }
    return {'output_features': features}

  suffix = f'vocabulary_{_digest(vocabularies.describe(vocabulary))}'
  return _derived(task, suffix, change)


def _derived(
  task: seqio.Task | seqio.Mixture,
  suffix: str,
  change: Callable[[seqio.Task], dict[str, Any]],
) -> seqio.Task | seqio.Mixture:
  """Returns a changed task, registered once under a new name.

  Args:
    task: of a mixture each part is changed; its rates stay.
    suffix: of the name; it identifies the change.
    change: task -> arguments of `seqio.Task.replace`.
  """
  name = f'{task.name}__{suffix}'
  if name in _registered():
    return seqio.get_mixture_or_task(name)
  if not isinstance(task, seqio.Mixture):
    return _register(task.replace(name=name, **change(task)))
  parts = {part.name: part for part in task.tasks}
  changed = []
  for part_name, rate in task.rate_per_task_name.items():
    part = parts.get(part_name) or seqio.MixtureRegistry.get(part_name)
    # A rate may be a function of the task: call it with the original task.
    if callable(rate):
      rate = functools.partial(_rate_of, rate, part)
    changed.append((_derived(part, suffix, change), rate))
  # seqio has no public accessor for the sampling function.
  return _register(seqio.Mixture(name, changed, sample_fn=task._sample_fn))


def _registered() -> set[str]:
  """Returns the names of all tasks and mixtures."""
  return {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def _rate_of(rate: Callable, original: seqio.Task, changed: seqio.Task):
  del changed
  return rate(original)


def with_predictions(
  task: seqio.Task | seqio.Mixture,
  pattern: str,
  *,
  task_name: str,
  split: str,
  lengths: Mapping[str, int],
  row_weights: bool = False,
  pairs: bool = False,
) -> seqio.Task:
  """Returns a task of a model's outputs, registered under its own name.

  Args:
    task: whose features it has.
    pattern: path or glob of the files, see `predictions`.
    task_name: MIXTURE_OR_TASK_NAME that the files must record.
    split: the only split of the new task.
    lengths: maximum lengths {'inputs': S, 'targets': T}.
    row_weights: whether it has the feature `row_weights`, too.
    pairs: whether two adjacent lines are one example: the second is the feature
      `rejected`.

  Raises:
    ValueError: the predictions do not fit the task; see `predictions.read`.
  """
  files = [
    (path, os.stat(path).st_size, os.stat(path).st_mtime_ns)
    for path in predictions.find(pattern)
  ]
  what = repr((files, split, sorted(lengths.items()), row_weights, pairs))
  name = f'{task.name}__predictions_{_digest(what)}'
  if name in seqio.TaskRegistry.names():
    return seqio.TaskRegistry.get(name)
  features = {name: task.output_features[name] for name in FEATURES}
  vocabulary = features['targets'].vocabulary
  examples = predictions.read(
    pattern,
    task=task_name,
    vocabulary=vocabularies.describe(vocabulary),
    num_ids=vocabulary.vocab_size,
    eos_id=vocabulary.eos_id,
    encode=vocabulary.encode,
    lengths=lengths,
    add_eos={name: feature.add_eos for name, feature in features.items()},
    with_weights=row_weights,
    pairs=pairs,
  )
  console.log(f'Training data: {examples.summary}')

  def dataset(split, shuffle_files, seed=None):
    del split
    order = np.arange(0, len(examples.offsets['inputs']) - 1, 1 + pairs)
    if shuffle_files:
      # seqio shuffles in a small buffer only, which would leave the predictions
      # for one input close together.
      order = np.random.default_rng(seed).permutation(order)
    ids = {name: tf.constant(x) for name, x in examples.ids.items()}
    offsets = {name: tf.constant(x) for name, x in examples.offsets.items()}
    cut = {name: tf.constant(x) for name, x in examples.cut.items()}
    weights = None
    if examples.weights is not None:
      weights = tf.constant(examples.weights)

    def feature(name, i):
      return ids[name][offsets[name][i] : offsets[name][i + 1]]

    def row(i):
      rows = {name: feature(name, i) for name in FEATURES}
      rows |= {f'{name}{CUT}': cut[name][i] for name in FEATURES}
      if pairs:
        rows[REJECTED] = feature('targets', i + 1)
      if weights is not None:
        rows[ROW_WEIGHTS] = weights[i][None]
      return rows

    return tf.data.Dataset.from_tensor_slices(order).map(row)

  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(dataset, splits=[split]),
    preprocessors=[],
    output_features={
      **features,
      **(_row_weights() if row_weights else {}),
      **({REJECTED: features['targets']} if pairs else {}),
    },
  )
  return seqio.TaskRegistry.get(name)


def with_teacher_inputs(
  task: seqio.Task | seqio.Mixture, template: str
) -> seqio.Task | seqio.Mixture:
  """Returns the task with a feature `teacher_inputs`, under a new name.

  Args:
    task: tokenizes with `seqio.preprocessors.tokenize`.
    template: text with the names of an example's texts in braces, such as
      '{inputs} Answer: {targets}'. They are filled in before tokenization.

  Raises:
    ValueError: the task does not tokenize in this way; or, when its data is
      read, the template has a name that the examples do not have.
  """

  def change(part):
    before, after = split_at_tokenization(part)
    fill_in = functools.partial(_fill_in, part.name, template)
    features = part.output_features
    return {
      'preprocessors': [*before, fill_in, *after],
      'output_features': {**features, TEACHER_INPUTS: features['inputs']},
    }

  return _derived(task, f'teacher_inputs_{_digest(template)}', change)


def _fill_in(task_name: str, template: str, ds: tf.data.Dataset):
  """Adds the teacher's inputs, as text, to each example."""
  parts = []  # pairs: is it a name? and the name, or a text of the template
  for text, field, *_ in string.Formatter().parse(template):
    parts.append((False, text))
    if field is not None:
      _check_has_text(
        ds, field, f'datasets.TeacherInputs.template has {{{field}}}', task_name
      )
      parts.append((True, field))

  def add(features):
    texts = [features[part] if is_name else part for is_name, part in parts]
    return {**features, TEACHER_INPUTS: tf.strings.join(texts)}

  return ds.map(add)


def _check_has_text(
  ds: tf.data.Dataset, name: str, reason: str, task_name: str
) -> None:
  """Raises ValueError unless the examples have a text of this name."""
  spec = ds.element_spec.get(name)
  if spec is None or spec.dtype != tf.string:
    texts = (k for k, v in ds.element_spec.items() if v.dtype == tf.string)
    raise ValueError(
      f'{reason}, but the examples of task {task_name!r} have the texts '
      f'{", ".join(sorted(texts))}.'
    )


def with_teacher_ids(
  task: seqio.Task | seqio.Mixture, names: Sequence[str]
) -> seqio.Task | seqio.Mixture:
  """Returns the task with a feature `teacher_ids`, under a new name.

  It is [1] int32: the place in `names` of the text `teacher` of the example; -1
  if it is not among them.

  Raises:
    ValueError: when its data is read: the examples have no text `teacher`.
  """

  def number(task_name, ds):
    _check_names_a_teacher(task_name, ds)

    def add(features):
      is_name = tf.equal(tf.constant(names), features[_TEACHER])
      place = tf.argmax(is_name, output_type=tf.int32)
      place = tf.where(tf.reduce_any(is_name), place, -1)
      return {**features, TEACHER_IDS: place[None]}

    return ds.map(add)

  feature = seqio.Feature(
    seqio.PassThroughVocabulary(size=len(names)), add_eos=False
  )

  def change(part):
    before, after = _split_where_known(part)
    return {
      'preprocessors': [
        *before,
        functools.partial(number, part.name),
        *after,
      ],
      'output_features': {**part.output_features, TEACHER_IDS: feature},
    }

  return _derived(task, f'teachers_{_digest(json.dumps(names))}', change)


def with_row_weights(
  task: seqio.Task | seqio.Mixture,
) -> seqio.Task | seqio.Mixture:
  """Returns the task with a feature `row_weights`, under a new name.

  It is [1] float32: the number `weight` of the example.

  Raises:
    ValueError: when its data is read: the examples have no number `weight`.
  """

  def add(task_name, ds):
    _check_has_weight(task_name, ds)
    return ds.map(
      lambda features: {
        **features,
        ROW_WEIGHTS: tf.cast(features[_WEIGHT], tf.float32)[None],
      }
    )

  def change(part):
    before, after = _split_where_known(part)
    return {
      'preprocessors': [*before, functools.partial(add, part.name), *after],
      'output_features': {**part.output_features, **_row_weights()},
    }

  return _derived(task, ROW_WEIGHTS, change)


def check_row_weights(
  task: seqio.Task | seqio.Mixture, split: str, num_examples: int | None
) -> None:
  """Raises ValueError unless all weights are finite. Reads all examples.

  Args:
    task: whose examples have a number `weight`.
    split: of the task.
    num_examples: only the first examples of each task; None: all.
  """
  for part in seqio.get_subtasks(task):
    before, _ = _split_where_known(part)
    ds = _preprocessed(part, split, num_examples, before)
    _check_has_weight(part.name, ds)
    weights = ds.map(lambda features: features[_WEIGHT])
    for number, weight in enumerate(weights.as_numpy_iterator(), 1):
      if not np.isfinite(weight):
        raise ValueError(
          f'datasets.DatasetConfig.row_weights: the "{_WEIGHT}" of example '
          f'{number} of task {part.name!r}, split {split!r}, is missing or not '
          'a finite number.'
        )


def _check_has_weight(name: str, ds: tf.data.Dataset) -> None:
  spec = ds.element_spec.get(_WEIGHT)
  is_number = spec is not None and (
    spec.dtype.is_floating or spec.dtype.is_integer
  )
  if not is_number or spec.shape.rank != 0:
    raise ValueError(
      'datasets.DatasetConfig.row_weights is True, but the examples of task '
      f'{name!r} have no number {_WEIGHT!r}. They have '
      f'{", ".join(sorted(ds.element_spec))}.'
    )


def _row_weights() -> dict[str, seqio.Feature]:
  vocabulary = seqio.PassThroughVocabulary(size=0)
  return {
    ROW_WEIGHTS: seqio.Feature(vocabulary, add_eos=False, dtype=tf.float32)
  }


def teachers_of(
  task: seqio.Task | seqio.Mixture, split: str, num_examples: int | None
) -> set[str]:
  """Returns the teachers that the examples of a split name. Reads all of them.

  Args:
    task: whose examples have a text `teacher`.
    split: of the task.
    num_examples: only the first examples of each task; None: all.
  """
  found = set()
  for part in seqio.get_subtasks(task):
    before, _ = _split_where_known(part)
    ds = _preprocessed(part, split, num_examples, before)
    _check_names_a_teacher(part.name, ds)
    names = ds.map(lambda features: features[_TEACHER]).unique()
    found |= {
      name.decode(errors='replace') for name in names.as_numpy_iterator()
    }
  return found


def _preprocessed(
  task: seqio.Task, split: str, num_examples: int | None, steps: Sequence
) -> tf.data.Dataset:
  """Returns the first examples of a split, after some preprocessors."""
  ds = task.source.get_dataset(split, shuffle=False)
  if num_examples is not None:
    ds = ds.take(num_examples)
  # seqio has no public function for this.
  return task._preprocess_dataset(ds, steps)


def _split_where_known(task: seqio.Task) -> tuple[list, list]:
  """Returns the preprocessors before tokenization, and the rest.

  Where tokenization is not known, all are before it.
  """
  try:
    return split_at_tokenization(task)
  except ValueError:
    return [*task.preprocessors], []


def _check_names_a_teacher(name: str, ds: tf.data.Dataset) -> None:
  spec = ds.element_spec.get(_TEACHER)
  if spec is None or spec.dtype != tf.string or spec.shape.rank != 0:
    texts = (k for k, v in ds.element_spec.items() if v.dtype == tf.string)
    raise ValueError(
      'datasets.DatasetConfig.teachers is set, but the examples of task '
      f'{name!r} have no text {_TEACHER!r} that names their teacher. They have '
      f'the texts {", ".join(sorted(texts))}. For JSON lines list it in '
      'other_fields of datasets.DatasetConfig.task_arguments.'
    )


def exemplars(
  task: seqio.Task | seqio.Mixture, template: str, number: int, seed: int
) -> str:
  """Returns examples of the train split, each filled into a template.

  They are drawn from the first 1,000 examples. Training reads them, too: an
  example may be its own exemplar.

  Raises:
    ValueError: the task is a mixture, has too few examples, or its examples
      lack a name of the template.
  """
  if isinstance(task, seqio.Mixture):
    raise ValueError(
      'datasets.TeacherInputs.num_exemplars: the examples of '
      f'{task.name!r} are mixed from several tasks. Write the exemplars into '
      'datasets.TeacherInputs.template.'
    )
  before, _ = split_at_tokenization(task)
  rows = [*_preprocessed(task, 'train', 1000, before).as_numpy_iterator()]
  if len(rows) < number:
    raise ValueError(
      f'datasets.TeacherInputs.num_exemplars is {number}, but the train split '
      f'of {task.name!r} has {len(rows)} examples.'
    )
  chosen = np.random.default_rng(seed).choice(len(rows), number, replace=False)
  texts = []
  for i in chosen:
    fields = {
      name: value.decode(errors='replace')
      for name, value in rows[i].items()
      if isinstance(value, bytes)
    }
    try:
      texts.append(template.format_map(fields))
    except KeyError as e:
      raise ValueError(
        f'datasets.TeacherInputs.exemplar has {{{e.args[0]}}}, but the '
        f'examples of task {task.name!r} have the texts '
        f'{", ".join(sorted(fields))}.'
      ) from e
  return ''.join(texts)


def split_at_tokenization(task: seqio.Task) -> tuple[list, list]:
  """Returns the preprocessors before `seqio.preprocessors.tokenize`, the rest.

  Raises:
    ValueError: it is not among them.
  """
  steps = [*task.preprocessors]
  for i, step in enumerate(steps):
    while isinstance(step, functools.partial):
      step = step.func
    if step is seqio.preprocessors.tokenize:
      return steps[:i], steps[i:]
  raise ValueError(
    f'datasets.DatasetConfig.teacher_inputs: task {task.name!r} does not '
    'tokenize its texts with seqio.preprocessors.tokenize, before which the '
    'template is filled in. Give the task an output feature '
    f'{TEACHER_INPUTS!r} of its own, and set template = None.'
  )


def first_examples(
  task: seqio.Task | seqio.Mixture, num_examples: int, use_cached: bool
) -> seqio.Task:
  """Returns a task of the first examples, registered under a new name.

  Raises:
    ValueError: the task is a mixture, or is read from a cache.
  """
  if isinstance(task, seqio.Mixture) or use_cached:
    raise ValueError(
      f'TRAIN_NUM_EXAMPLES is {num_examples}, but the examples of '
      f'{task.name!r} '
      + (
        'come from a cache (datasets.DatasetConfig.use_cached).'
        if use_cached
        else 'are mixed from several tasks.'
      )
      + ' Register a task that has the examples you want.'
    )
  name = f'{task.name}__first_{num_examples}'
  if name in seqio.TaskRegistry.names():
    return seqio.TaskRegistry.get(name)

  def dataset(split, shuffle_files, seed=None):
    del shuffle_files, seed  # unshuffled: always the same examples
    return task.source.get_dataset(split, shuffle=False).take(num_examples)

  source = seqio.FunctionDataSource(
    dataset,
    splits=task.splits,
    num_input_examples={
      split: min(num_examples, task.num_input_examples(split) or num_examples)
      for split in task.splits
    },
  )
  return _register(task.replace(name=name, source=source))


def _register(task: seqio.Task | seqio.Mixture) -> seqio.Task | seqio.Mixture:
  is_mixture = isinstance(task, seqio.Mixture)
  registry = seqio.MixtureRegistry if is_mixture else seqio.TaskRegistry
  registry.add_provider(task.name, task)
  return task


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _bundled_tasks() -> Sequence[str]:
  folder = os.path.join(os.path.dirname(__file__), 'tasks')
  return [
    name[:-3]
    for name in sorted(os.listdir(folder))
    if name.endswith('.py') and not name.startswith('_')
  ]
