# SPDX-License-Identifier: Apache-2.0
"""Finds a seqio task, and makes others of it.

With another vocabulary, with a model's outputs for examples, with the first
examples alone. seqio knows tasks by name: each of these has one of its own, and
is registered once. seqio and TensorFlow are imported when they are first used;
see `data`.
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
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epy

from gkd_jax.data import predictions, vocabularies
from gkd_jax.runtime import console

with epy.lazy_imports():
  import seqio
  import tensorflow as tf

FEATURES = ('inputs', 'targets')


def set_tfds_data_dir(folder: str) -> None:
  """Sets the folder in which TFDS finds its data."""
  seqio.set_tfds_data_dir_override(folder)


def find(
  name: str, module: str | None, arguments: Mapping[str, Any] | None
) -> seqio.Task | seqio.Mixture:
  """Returns a task or mixture, after importing what registers it.

  Args:
    name: of the task.
    module: imported first; None for the tasks that come with gkd_jax.
    arguments: of the function make_task in the module; None if it has none.

  Raises:
    ValueError: it is not registered, there is no such module, or its make_task
      does not take these arguments.
  """
  imported = _import_module(name, module)
  registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
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
  """Imports the task's module; None if nothing says which it is."""
  if module is None:
    if name in _bundled_tasks():
      return importlib.import_module(f'gkd_jax.data.tasks.{name}')
    return None
  if not all(part.isidentifier() for part in module.split('.')):
    raise ValueError(
      f'MIXTURE_OR_TASK_MODULE: {module!r} is no name of a Python module, such '
      'as my_project.tasks.'
    )
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as e:
    if e.name is None or not f'{module}.'.startswith(f'{e.name}.'):
      raise  # it is there, and lacks something itself
    raise ValueError(
      f'MIXTURE_OR_TASK_MODULE: there is no Python module {module!r}. It is '
      'looked for where Python is started, on PYTHONPATH, and among the '
      'installed packages.'
    ) from e


def _make_task(
  module: types.ModuleType | None, name: str, arguments: Mapping[str, Any]
) -> seqio.Task | seqio.Mixture:
  """Returns make_task(name, **arguments), registered under a name of its own.

  seqio's evaluator knows tasks by name, so other arguments need another name.
  """
  make_task = getattr(module, 'make_task', None)
  if make_task is None:
    raise ValueError(
      f'TASK_ARGUMENTS is set, but task {name!r} takes none: its module has no '
      'function make_task.'
    )
  signature = inspect.signature(make_task)
  try:
    signature.bind(name, **arguments)
  except TypeError as e:
    raise ValueError(
      f'TASK_ARGUMENTS of task {name!r}: {e}. It takes '
      f'{", ".join([*signature.parameters][1:])}; where there is a '
      f'gin/tasks/{name}.gin, its macros set them.'
    ) from e
  if arguments:
    name += f'__{_digest(json.dumps(arguments, sort_keys=True, default=str))}'
  if name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
    return seqio.get_mixture_or_task(name)
  return _register(make_task(name, **arguments))


def with_vocabulary(
  task: seqio.Task | seqio.Mixture, vocabulary: seqio.Vocabulary
) -> seqio.Task | seqio.Mixture:
  """Returns it with another vocabulary, registered under a new name.

  A mixture keeps its rates, and how it samples.
  """
  name = f'{task.name}__vocabulary_{_digest(vocabularies.describe(vocabulary))}'
  if name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
    return seqio.get_mixture_or_task(name)
  if isinstance(task, seqio.Mixture):
    parts = {part.name: part for part in task.tasks}
    changed = []
    for part_name, rate in task.rate_per_task_name.items():
      part = parts.get(part_name) or seqio.MixtureRegistry.get(part_name)
      # A rate may be a function of the task: of the one it was written for.
      if callable(rate):
        rate = functools.partial(_rate_of, rate, part)
      changed.append((with_vocabulary(part, vocabulary), rate))
    # seqio has no accessor for how a mixture samples.
    return _register(seqio.Mixture(name, changed, sample_fn=task._sample_fn))
  features = {
    feature: dataclasses.replace(value, vocabulary=vocabulary)
    for feature, value in task.output_features.items()
  }
  return _register(task.replace(name=name, output_features=features))


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
) -> seqio.Task:
  """Returns a task of a model's outputs, registered under a name of its own.

  Args:
    task: whose features it has.
    pattern: of the files, see `predictions`.
    task_name: that the predictions must be of, as a configuration has it.
    split: its only one.
    lengths: {'inputs': S, 'targets': T}, at most.

  Raises:
    ValueError: the predictions are of no use for the task.
  """
  files = [
    (path, os.stat(path).st_size, os.stat(path).st_mtime_ns)
    for path in predictions.find(pattern)
  ]
  what = repr((files, split, sorted(lengths.items())))
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
  )
  console.log(f'Trains on {examples.summary}')

  def dataset(split, shuffle_files, seed=None):
    del split
    order = np.arange(len(examples.offsets['inputs']) - 1)
    if shuffle_files:
      # Predictions for one input lie side by side: farther apart than seqio's
      # buffer, which shuffles after this, would take them.
      order = np.random.default_rng(seed).permutation(order)
    ids = {name: tf.constant(x) for name, x in examples.ids.items()}
    offsets = {name: tf.constant(x) for name, x in examples.offsets.items()}

    def row(i):
      return {
        name: ids[name][offsets[name][i] : offsets[name][i + 1]]
        for name in FEATURES
      }

    return tf.data.Dataset.from_tensor_slices(order).map(row)

  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(dataset, splits=[split]),
    preprocessors=[],
    output_features=features,
  )
  return seqio.TaskRegistry.get(name)


def first_examples(
  task: seqio.Task | seqio.Mixture, num_examples: int, use_cached: bool
) -> seqio.Task:
  """Returns the task with the first examples alone, under a new name.

  Raises:
    ValueError: they are mixed from several tasks, or come from a cache.
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
    del shuffle_files, seed  # in their own order: these are always the same
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
