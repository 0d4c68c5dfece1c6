# SPDX-License-Identifier: Apache-2.0
"""Registers `instruction`: a mixture of instruction-tuning data.

The mixture follows FLAN (Wei et al., 2022). Data: collections of TFDS, which
must be prepared in advance, and JSON lines of {inputs, targets}. Mixing rates
are proportional to the number of examples, up to a maximum.

natural_instructions contains questions of MMLU (its tasks named `mmmlu`) and a
task of BIG-Bench. They are removed, so that MMLU and BIG-Bench Hard remain
valid evaluations.

Importing this module imports TensorFlow; data is read when the first dataset
is built.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import seqio
import tensorflow as tf

from gkd_jax.data.tasks import _common

# FLAN's maximum is 3,000 examples per data set, but each source here is a
# collection of up to 1,600 data sets.
MAXIMUM = 500_000
_VALIDATION_PERCENT = 1


def _joined(*texts: tf.Tensor) -> tf.Tensor:
  """Joins two texts with an empty line if the second is not empty."""
  first, second = (tf.strings.strip(text) for text in texts)
  separator = tf.where(tf.equal(second, ''), '', '\n\n')
  return tf.strings.join([first, separator, second])


def _natural_instructions(dataset: tf.data.Dataset) -> tf.data.Dataset:
  def is_no_test(example):
    return tf.logical_not(
      tf.strings.regex_full_match(example['task_name'], '.*(mmmlu|bigbench).*')
    )

  return dataset.filter(is_no_test).map(
    lambda example: {
      'inputs': _joined(example['definition'], example['input']),
      'targets': example['output'],
    },
    num_parallel_calls=tf.data.AUTOTUNE,
  )


def _unnatural_instructions(dataset: tf.data.Dataset) -> tf.data.Dataset:
  def examples(row):
    """Returns the inputs of an instruction, then those of its paraphrases."""
    parts = (row['instances'], row['reformulations'])
    return tf.data.Dataset.from_tensor_slices(
      {
        'inputs': tf.concat([p['instruction_with_input'] for p in parts], 0),
        'targets': tf.concat([p['output'] for p in parts], 0),
      }
    )

  return dataset.flat_map(examples)


def _databricks_dolly(dataset: tf.data.Dataset) -> tf.data.Dataset:
  return dataset.map(
    lambda example: {
      'inputs': _joined(example['instruction'], example['context']),
      'targets': example['response'],
    },
    num_parallel_calls=tf.data.AUTOTUNE,
  )


# Source (TFDS's name) -> version, and the function that makes its examples.
_TFDS: Mapping[str, tuple[str, Callable]] = {
  'natural_instructions': ('1.0.1', _natural_instructions),
  'unnatural_instructions': ('0.0.1', _unnatural_instructions),
  'databricks_dolly': ('1.0.0', _databricks_dolly),
}


def _not_empty(dataset: tf.data.Dataset) -> tf.data.Dataset:
  return dataset.filter(
    lambda example: tf.logical_and(
      tf.not_equal(tf.strings.strip(example['inputs']), ''),
      tf.not_equal(tf.strings.strip(example['targets']), ''),
    )
  )


def _task(name, source, *preprocessors) -> seqio.Task:
  return seqio.Task(
    name,
    source=source,
    preprocessors=[*preprocessors, _not_empty, *_common.TOKENIZE],
    output_features=_common.T5_FEATURES,
    metric_fns=[_common.exact_match_and_rouge],
  )


def make_task(
  name: str,
  sources: Sequence[str] = tuple(_TFDS),
  files: Mapping[str, str] | None = None,
  maximum: int = MAXIMUM,
) -> seqio.Mixture:
  """Returns the mixture.

  Args:
    name: of the mixture; its tasks are <name>_<source>.
    sources: any of natural_instructions, unnatural_instructions and
      databricks_dolly; the last percent of each is `validation`.
    files: {name: file}, JSON lines of {inputs, targets}; each is a further
      source and is read into memory.
    maximum: number of examples at which the mixing rate of a source is capped.
  """
  files = dict(files or {})
  if isinstance(sources, str):
    raise ValueError(
      f'INSTRUCTION_SOURCES must be a list of names, got {sources!r}.'
    )
  if unknown := set(sources) - set(_TFDS):
    raise ValueError(
      f'INSTRUCTION_SOURCES: {sorted(unknown)} is none of {", ".join(_TFDS)}. '
      'Add your own JSON lines to INSTRUCTION_FILES.'
    )
  if both := set(sources) & set(files):
    raise ValueError(
      f'INSTRUCTION_FILES: {sorted(both)} is also in INSTRUCTION_SOURCES.'
    )
  if not sources and not files:
    raise ValueError(
      'The mixture is empty: set INSTRUCTION_SOURCES or INSTRUCTION_FILES.'
    )
  if not isinstance(maximum, int) or maximum < 1:
    raise ValueError(
      f'INSTRUCTION_MAXIMUM must be a positive whole number, got {maximum!r}.'
    )
  _common.check_files('INSTRUCTION_FILES', files)
  tasks = []
  for source in sources:
    version, layout = _TFDS[source]
    cut = f'{100 - _VALIDATION_PERCENT}%'
    tfds = _common.TfdsSource(
      f'{source}:{version}',
      {'train': f'train[:{cut}]', 'validation': f'train[{cut}:]'},
    )
    tasks.append(_task(f'{name}_{source}', tfds, layout))
  for file_name, path in files.items():
    read = functools.partial(
      _common.read_json_lines,
      f'INSTRUCTION_FILES[{file_name!r}]',
      path,
      ('inputs', 'targets'),
    )
    rows = _common.RowsSource(lambda split, read=read: read(), ['train'])
    tasks.append(_task(f'{name}_{file_name}', rows))
  rate = functools.partial(seqio.mixing_rate_num_examples, maximum=maximum)
  return seqio.Mixture(name, tasks, default_rate=rate)


seqio.MixtureRegistry.add_provider('instruction', make_task('instruction'))
