# SPDX-License-Identifier: Apache-2.0
"""Measures what tokenizing loses: examples cut to length, unknown tokens.

seqio and TensorFlow are imported on first use; see `datasets`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epy

from gkd_jax.data import datasets, seqio_tasks
from gkd_jax.runtime import console

with epy.lazy_imports():
  import seqio

# Examples of a split that are looked at. The share of a loss that is 1 % of all
# examples is then known to 0.2 %.
NUM_EXAMPLES = 2000


class Losses(NamedTuple):
  """What tokenizing lost of the examples of a split.

  Attributes:
    split: of the task.
    num_examples: that were looked at.
    is_all: whether these are all examples.
    lengths: {feature: maximum length in tokens}.
    num_cut: {feature: examples that were longer}; a feature whose text the task
      does not keep is absent.
    unknown: {feature: share of its tokens that are the unknown id}.
  """

  split: str
  num_examples: int
  is_all: bool
  lengths: Mapping[str, int]
  num_cut: Mapping[str, int]
  unknown: Mapping[str, float]

  def lines(self) -> list[str]:
    """Returns a sentence for each kind of loss; [] if nothing was lost."""
    of = f'{"" if self.is_all else "first "}{self.num_examples:,}'
    of = f'of the {of} examples of the {self.split} split'
    lines = []
    if any(self.num_cut.values()):
      cut = ' and '.join(
        f'the {name} of {n:,} (to {self.lengths[name]} tokens)'
        for name, n in self.num_cut.items()
        if n
      )
      lines.append(f'Cut by TASK_FEATURE_LENGTHS: {cut} {of}.')
    if any(self.unknown.values()):
      shares = ' and '.join(
        f'{share:.2%} of the tokens of the {name}'
        for name, share in self.unknown.items()
        if share
      )
      lines.append(f'Unknown to the vocabulary: {shares} {of}.')
    return lines

  def scalars(self) -> dict[str, float]:
    """Returns {metric: share from 0 to 1}; {} if nothing was lost."""
    if not self.lines():
      return {}
    cut = {
      f'data/{name}_cut': n / self.num_examples
      for name, n in self.num_cut.items()
    }
    unknown = {
      f'data/{name}_unknown': share for name, share in self.unknown.items()
    }
    return cut | unknown


def measure(config: datasets.DatasetConfig) -> Losses:
  """Measures the first examples of a split; cached in the process.

  Args:
    config: of the dataset; the split is not empty.
  """
  return _measure(
    datasets.get_task(config).name,
    config.split,
    tuple(config.lengths.items()),
    config.use_cached,
    min(NUM_EXAMPLES, config.num_examples or NUM_EXAMPLES),
  )


def log(config: datasets.DatasetConfig) -> Losses:
  """Measures a split, and logs what was lost."""
  losses = measure(config)
  for line in losses.lines():
    console.log(line)
  return losses


@functools.lru_cache(maxsize=16)
def _measure(
  name: str,
  split: str,
  lengths: Sequence[tuple[str, int]],
  use_cached: bool,
  limit: int,
) -> Losses:
  tasks = [
    task
    for task in seqio.get_subtasks(seqio.get_mixture_or_task(name))
    if split in task.splits
  ]
  of_task = -(-limit // len(tasks))
  counts = {
    feature: _Count(length)
    for feature, length in lengths
    # Others are numbers, which were no text.
    if feature not in (seqio_tasks.TEACHER_IDS, seqio_tasks.ROW_WEIGHTS)
  }
  num_examples, is_all = 0, True
  for task in tasks:
    rows = task.get_dataset(
      dict(lengths),
      split=split,
      shuffle=False,
      use_cached=use_cached,
      seed=42,  # of random preprocessors, as in seqio.Evaluator
    )
    # One more, to detect that there are more.
    for i, row in enumerate(rows.take(of_task + 1).as_numpy_iterator()):
      if i == of_task:
        is_all = False
        break
      num_examples += 1
      for feature, count in counts.items():
        if feature in row:
          count.add(feature, row, task.output_features[feature])
  return Losses(
    split,
    num_examples,
    is_all,
    dict(lengths),
    {
      feature: count.num_cut
      for feature, count in counts.items()
      if count.num_cut is not None
    },
    {
      feature: count.num_unknown / max(1, count.num_tokens)
      for feature, count in counts.items()
    },
  )


class _Count:
  """Counts the losses of one feature.

  Attributes:
    num_cut: None if it is not known of some rows.
    num_tokens: without EOS.
    num_unknown: of these.
  """

  def __init__(self, length: int):
    self._length = length
    self.num_cut: int | None = 0
    self.num_tokens = self.num_unknown = 0

  def add(
    self, name: str, row: Mapping[str, Any], feature: seqio.Feature
  ) -> None:
    """Counts a row, whose ids are at most `length`."""
    vocabulary, ids = feature.vocabulary, row[name]
    tokens = ids[ids != vocabulary.eos_id]
    self.num_tokens += len(tokens)
    if vocabulary.unk_id is not None:
      self.num_unknown += int((tokens == vocabulary.unk_id).sum())
    if len(ids) < self._length or self.num_cut is None:
      return
    is_cut = row.get(f'{name}{seqio_tasks.CUT}')
    text = row.get(f'{name}_pretokenized')
    if is_cut is None and isinstance(text, bytes):
      # seqio keeps the text before tokenization. A row that is not the
      # beginning of its tokens was changed after tokenization.
      whole = list(vocabulary.encode(text.decode(errors='replace')))
      is_cut = len(whole) + feature.add_eos > self._length and (
        whole[: len(tokens)] == tokens.tolist()
      )
    self.num_cut = None if is_cut is None else self.num_cut + bool(is_cut)
