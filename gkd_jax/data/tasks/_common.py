# SPDX-License-Identifier: Apache-2.0
"""Shared by several tasks: T5's features, sources of examples, ROUGE."""

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from gkd_jax.data import json_lines
from gkd_jax.runtime import paths

# 32,000 pieces and 100 extra ids. The file is read on first use.
T5_VOCABULARY_PATH = (
  'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'
)
_FEATURE = seqio.Feature(
  seqio.SentencePieceVocabulary(T5_VOCABULARY_PATH, extra_ids=100),
  add_eos=True,
)
T5_FEATURES: Mapping[str, seqio.Feature] = {
  'inputs': _FEATURE,
  'targets': _FEATURE,
}

SPLITS = ('train', 'validation', 'test')

# The last preprocessors of every task.
TOKENIZE = (
  seqio.preprocessors.tokenize,
  seqio.preprocessors.append_eos_after_trim,
)


class TfdsSource(seqio.TfdsDataSource):
  """A TFDS data set that is already prepared; a run downloads nothing.

  Args:
    name: of the TFDS data set, with its version.
    splits: {split of the task: TFDS's split or slice}.
    manual: files that TFDS cannot download and the user must provide.
  """

  def __init__(
    self, name: str, splits: Mapping[str, str], manual: str | None = None
  ):
    super().__init__(name, splits=dict(splits), read_only=True)
    self._manual = manual

  def get_dataset(self, *args, **kwargs) -> tf.data.Dataset:
    self._check_prepared()
    return super().get_dataset(*args, **kwargs)

  def num_input_examples(self, split: str) -> int | None:
    self._check_prepared()
    return super().num_input_examples(split)

  def _check_prepared(self) -> None:
    name, builder = self.tfds_dataset.name, self.tfds_dataset.builder
    if builder.is_prepared():
      return
    folder = paths.as_given(str(builder.data_path)).removesuffix(
      f'/{builder.info.full_name}'
    )
    by_hand = ''
    if self._manual:
      by_hand = f' put {self._manual} into {folder}/downloads/manual, and'
    # Not `tfds build`, which needs Apache Beam.
    raise ValueError(
      f'TFDS has no {name} in {folder}. If it is in another folder, set '
      f'--tfds_data_dir=FOLDER. To prepare it, on a machine with a network,'
      f'{by_hand} run: python -c "import tensorflow_datasets as tfds; '
      f"tfds.builder('{name}', data_dir='{folder}').download_and_prepare()\""
    )


class RowsSource(seqio.FunctionDataSource):
  """Examples in memory, in one fixed order.

  Args:
    columns: split -> {feature: one text, or list of texts, per example; or an
      array of numbers}; called once per split.
    splits: names of the splits.
  """

  def __init__(
    self,
    columns: Callable[[str], Mapping[str, Sequence[Any]]],
    splits: Collection[str],
  ):
    self._columns = functools.cache(columns)

    def dataset(split, shuffle_files, seed=None):
      del shuffle_files, seed  # seqio shuffles after tokenizing
      # Without tf.constant, tf.data converts the lists element by element: ten
      # times slower. Without a dtype, an empty list would have floats.
      return tf.data.Dataset.from_tensor_slices(
        {
          name: tf.constant(
            column, None if isinstance(column, np.ndarray) else tf.string
          )
          for name, column in self._columns(split).items()
        }
      )

    super().__init__(dataset, splits=tuple(splits))

  def num_input_examples(self, split: str) -> int:
    return len(next(iter(self._columns(split).values())))


def check_splits(setting: str, files: Mapping[str, str]) -> None:
  """Raises ValueError unless `files` maps one or more of SPLITS to a file."""
  if not isinstance(files, Mapping) or not files or set(files) - {*SPLITS}:
    raise ValueError(
      f"{setting} must be {{'train': file, 'validation': file, 'test': file}} "
      f'or a part of it, got {files!r}.'
    )


def check_files(setting: str, files: Mapping[str, str]) -> None:
  """Raises ValueError if a file does not exist. Reads no file."""
  for pattern in files.values():
    json_lines.find(pattern, setting)


def read_json_lines(
  setting: str, pattern: str, fields: Sequence[str], number: str | None = None
) -> dict[str, Any]:
  """Reads JSON lines files into memory.

  Args:
    setting: name of the path in gin, for errors.
    pattern: path or glob of the files; empty lines are skipped.
    fields: texts that each object must have; other fields are dropped.
    number: a field that may be a number.

  Returns:
    {field: one text per line}. If any line has the number, also its array
    [lines], NaN where it is missing.

  Raises:
    ValueError: a line is not such an object, or the files are empty.
  """
  columns = {field: [] for field in fields}
  numbers = []
  for path in json_lines.find(pattern, setting):
    for row in json_lines.read(path, dict.fromkeys(fields, str), setting):
      for field, column in columns.items():
        column.append(row[field])
      value = row.get(number)
      is_number = isinstance(value, int | float) and not isinstance(value, bool)
      numbers.append(value if is_number else math.nan)
  if not columns[fields[0]]:
    raise ValueError(f'{setting}: {pattern} is empty.')
  numbers = np.asarray(numbers, np.float32)
  if not np.isnan(numbers).all():
    columns[number] = numbers
  return columns


def exact_match_and_rouge(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, Any]:
  """Returns exact match and ROUGE-L in percent: natural_instructions' metrics.

  A note has the bounds of ROUGE-L's 95% confidence interval.
  """
  exact = sum(
    t.strip() == p.strip() for t, p in zip(targets, predictions, strict=True)
  )
  means, bounds = rouge(targets, predictions, ['rougeL'])
  return {
    'exact_match': 100 * exact / len(targets),
    **means,
    'rouge_95_percent_interval': bounds,
  }


def rouge(
  targets: Sequence[str], predictions: Sequence[str], types: Sequence[str]
) -> tuple[dict[str, float], dict[str, list[float]]]:
  """ROUGE of rouge_score, with its Porter stemmer.

  Args:
    targets: references.
    predictions: one text per target; may be empty.
    types: rouge_score's names, e.g. 'rouge2'.

  Returns:
    {type: mean F-measure in percent}, and {type: [low, high]}, the bounds of
    its 95% confidence interval by bootstrap, from a fixed seed.
  """
  from rouge_score import rouge_scorer, scoring  # NLTK: a second to import

  scorer = rouge_scorer.RougeScorer(list(types), use_stemmer=True)
  aggregator = scoring.BootstrapAggregator()
  for target, prediction in zip(targets, predictions, strict=True):
    aggregator.add_scores(
      scorer.score(_sentence_a_line(target), _sentence_a_line(prediction))
    )
  # The aggregator uses NumPy's global generator: restore its state afterwards.
  state = np.random.get_state()
  np.random.seed(0)
  try:
    scores = aggregator.aggregate()
  finally:
    np.random.set_state(state)
  return (
    {t: 100 * float(scores[t].mid.fmeasure) for t in types},
    {
      t: [100 * float(x.fmeasure) for x in (scores[t].low, scores[t].high)]
      for t in types
    },
  )


def _sentence_a_line(text: str) -> str:
  """Returns the text with one sentence per line, as rougeLsum expects."""
  return re.sub(r'(?<=[.!?])\s+', '\n', text)
