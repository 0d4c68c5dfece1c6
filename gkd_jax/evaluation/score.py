# SPDX-License-Identifier: Apache-2.0
"""Scores given outputs: by their likelihood under a model, or by a reward."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from gkd_jax import build
from gkd_jax.batch import Batch, Outputs
from gkd_jax.checkpoints import checkpoint, pretrained
from gkd_jax.data import datasets, predictions
from gkd_jax.distill import rewards
from gkd_jax.evaluation import programs
from gkd_jax.parallel import hosts, partitioning
from gkd_jax.runtime import console, files, pins

_SETTING = 'PREDICTIONS'
_STATUS_SECONDS = 10.0

Measure = Callable[[Sequence['_Row']], list[float]]


def score(
  checkpoint_path: str,
  predictions_path: str,
  output_dir: str,
  dataset: datasets.DatasetConfig,
  *,
  field: str = 'nll',
  reward: rewards.Reward | None = None,
  overwrite: bool = False,
) -> None:
  """Writes predictions again, with a score of each output.

  It is the mean negative log-likelihood in nats per token, EOS included if the
  model wrote it; or a reward. `select.field` reads it. An interrupted run
  resumes and produces the same file, byte for byte.

  Args:
    checkpoint_path: see `pretrained.open_checkpoint`.
    predictions_path: path or glob of files of predictions of the same inputs.
    output_dir: created if it does not exist.
    dataset: task, split, lengths and batch size; its examples are not read.
    field: name of the new field of each line.
    reward: its model, if it needs one, is the checkpoint; None: the NLL.
    overwrite: replace a complete file, and one of other settings.

  Raises:
    ValueError: the predictions do not fit the checkpoint or the task, are
      longer than its lengths, or have the field; or the file is complete.
  """
  sources = predictions.find(predictions_path, _SETTING)
  about = predictions.shared_provenance(sources, _SETTING)
  path = predictions.output_path(
    sources, about, output_dir, _SETTING, predictions.OUTPUT_SETTING
  )
  files.check_free([path], predictions.OUTPUT_SETTING, overwrite)
  _check_field(sources, field)
  mesh = partitioning.make_mesh()
  partitioning.check_rows_divide('INFER_BATCH_SIZE', dataset.batch_size, mesh)
  started_with = None if overwrite else predictions.pins_of_partial(path)
  source, task = build.open_model_and_task(
    pins.pinned_path(started_with, 'CHECKPOINT_PATH', checkpoint_path), dataset
  )
  _check_about(about, task, dataset)
  examples = _Examples(
    sources,
    _texts(task, dataset),
    dataset,
    task.ids.num_ids,
    has_ids=about is not None,
    has_targets=reward is not None,
  )
  for _ in examples.read():  # all fit, before anything is compiled or written
    pass
  measure = _make_measure(source, task, dataset, reward, mesh)
  # All hosts compute the scores; the first one writes them.
  writer = None
  if hosts.is_first_host():
    provenance = about or {'vocabulary': None}
    scores = provenance.get('scores', {})
    data = pins.of_files(predictions.files_of(predictions_path, _SETTING))
    model = pretrained.pin(source, checkpoint_path)
    writer = predictions.Writer(
      path,
      {
        **provenance,
        'scores': {**scores, field: _describe(source, reward)},
        'batch_size': dataset.batch_size,
        'versions': checkpoint.versions(),
        'pins': pins.to_json({'CHECKPOINT_PATH': model, _SETTING: data}),
      },
      dataset.batch_size,
      overwrite,
    )
  _write(writer, examples, measure, field)


def _texts(task: build.Task, dataset: datasets.DatasetConfig):
  """Returns how the task tokenizes texts."""
  features = datasets.get_task(dataset).output_features
  return predictions.Texts(
    task.vocabulary.encode,
    {
      name: [task.ids.eos] if features[name].add_eos else []
      for name in ('inputs', 'targets')
    },
  )


def _describe(
  source: pretrained.Pretrained, reward: rewards.Reward | None
) -> str:
  """Returns what scores, for the file beside the predictions."""
  if reward is None:
    return f'NLL under {source.folder}'
  return f'reward of {source.folder}' if reward.needs_model else 'reward'


def _make_measure(
  source: pretrained.Pretrained,
  task: build.Task,
  dataset: datasets.DatasetConfig,
  reward: rewards.Reward | None,
  mesh: Mesh,
) -> Measure:
  """Returns the function that scores rows; loads its model."""
  model = build.NO_MODEL
  if reward is None or reward.needs_model:
    model = build.load_model(source, mesh)
  if reward is None:
    scores = programs.make_mean_nll(model.module, ids=task.ids, mesh=mesh)
  else:
    scores = programs.make_rewards(
      reward, build.make_reward_fn(reward, task, model, dataset), mesh=mesh
    )

  def measure(rows):
    values = []
    for start in range(0, len(rows), dataset.batch_size):
      some = rows[start : start + dataset.batch_size]
      batch, outputs = _batch(some, dataset, task.ids.pad)
      values += scores(model.params, batch, outputs)[: len(some)].tolist()
    return values

  return measure


def _write(
  writer: predictions.Writer | None,
  examples: '_Examples',
  measure: Measure,
  field: str,
) -> None:
  """Scores the examples that are missing in a file, and writes them."""
  first = hosts.broadcast_from_first(writer.num_examples if writer else 0)
  if first:
    console.log(f'Resuming at example {first:,}.')
  logged = started = time.monotonic()
  num_scored = num_examples = 0
  for group in examples.groups():
    num_examples += len(group)
    if group[0].number < first:
      continue
    scores = measure([row for example in group for row in example.rows])
    num_scored += len(scores)
    if writer is None:
      continue
    of_lines = iter(scores)
    writer.append(
      [
        [
          {'example': one.number, 'sample': i, **line, field: next(of_lines)}
          for i, line in enumerate(one.lines)
        ]
        for one in group
      ]
    )
    if (now := time.monotonic()) - logged > _STATUS_SECONDS:
      logged = now
      per_second = num_scored / (now - started)
      console.log(f'{num_examples:,} inputs  {per_second:,.0f} outputs/s')
  if writer is None:
    return
  writer.close(num_examples)
  console.log(f'{writer.num_predictions:,} outputs scored: {writer.path}')


class _Row(NamedTuple):
  """Token ids of an input, of an output, and of the reference."""

  inputs: Sequence[int]
  outputs: Sequence[int]
  targets: Sequence[int]


class _Example(NamedTuple):
  """An input with its lines, and their ids."""

  number: int
  lines: Sequence[Mapping[str, Any]]
  rows: Sequence[_Row]


class _Examples(NamedTuple):
  """The examples of files.

  Attributes:
    sources: paths of the files.
    texts: how texts are tokenized.
    dataset: lengths and batch size.
    num_ids: size of the vocabulary.
    has_ids: whether the lines have ids; else their texts are tokenized.
    has_targets: whether the references are read; lines without one have ''.
  """

  sources: Sequence[str]
  texts: predictions.Texts
  dataset: datasets.DatasetConfig
  num_ids: int
  has_ids: bool
  has_targets: bool

  def groups(self) -> Iterator[list[_Example]]:
    """Yields examples whose numbers are of the same batch of an uncut file.

    A batch of rows then has the same rows also where a run resumes.
    """
    size = self.dataset.batch_size
    for _, group in itertools.groupby(self.read(), lambda x: x.number // size):
      yield list(group)

  def read(self) -> Iterator[_Example]:
    """Yields examples; raises ValueError if a row does not fit."""
    for example in predictions.examples(self.sources, _SETTING):
      where = f'example {example.number}'
      rows = [self._row(line, where) for line in example.lines]
      yield _Example(example.number, example.lines, rows)

  def _row(self, line: Mapping[str, Any], where: str) -> _Row:
    inputs, outputs = predictions.ids_of_line(
      line, None if self.has_ids else self.texts, where, _SETTING
    )
    if not outputs:
      raise ValueError(f'{_SETTING}: {where} has an output without tokens.')
    targets = []
    if self.has_targets:
      text = line.get('targets', '')
      if not isinstance(text, str):
        raise ValueError(f'{_SETTING}: "targets" of {where} must be a text.')
      targets = [*self.texts.encode(text), *self.texts.end['targets']]
    row = _Row(inputs, outputs, targets)
    for name, feature in zip(_Row._fields, _FEATURES, strict=True):
      self._check(getattr(row, name), name, feature, where)
    return row

  def _check(
    self, ids: Sequence[int], name: str, feature: str, where: str
  ) -> None:
    length = self.dataset.task_feature_lengths[feature]
    if len(ids) > length:
      raise ValueError(
        f'{_SETTING}: {where} has {len(ids)} tokens of {name}, but '
        f"TASK_FEATURE_LENGTHS['{feature}'] is {length}: what is scored must "
        'not be cut. Raise it.'
      )
    if ids and not 0 <= min(ids) <= max(ids) < self.num_ids:
      raise ValueError(
        f'{_SETTING}: {where} has ids from {min(ids)} to {max(ids)} in its '
        f'{name}; those of the vocabulary are 0 to {self.num_ids - 1}.'
      )


# Which length the fields of a `_Row` have.
_FEATURES = ('inputs', 'targets', 'targets')


def _batch(
  rows: Sequence[_Row], dataset: datasets.DatasetConfig, pad: int
) -> tuple[Batch, Outputs]:
  """Returns inputs with references, and outputs; the last row is repeated."""
  size = dataset.batch_size
  rows = [*rows, *[rows[-1]] * (size - len(rows))]

  def padded(name, feature):
    length = dataset.task_feature_lengths[feature]
    tokens = np.full((size, length), pad, np.int32)
    weights = np.zeros((size, length), np.float32)
    for i, row in enumerate(rows):
      ids = getattr(row, name)
      tokens[i, : len(ids)] = ids
      weights[i, : len(ids)] = 1.0
    return tokens, weights

  (inputs, _), outputs, targets = map(padded, _Row._fields, _FEATURES)
  return Batch(inputs, *targets), Outputs(*outputs)


def _check_field(sources: Sequence[str], field: str) -> None:
  """Raises ValueError unless there are lines, and none has the field."""
  example = next(predictions.examples(sources, _SETTING), None)
  if example is None:
    raise ValueError(f'{_SETTING}: {", ".join(sources)} holds no predictions.')
  taken = {'example', 'sample', *predictions.FIELDS, *example.lines[0]}
  if not isinstance(field, str) or not field or field in taken:
    raise ValueError(
      f'SCORE_FIELD is {field!r}: it must be a name that the lines of '
      f'{", ".join(sources)} do not have, such as nll_reference.'
    )


def _check_about(
  about: Mapping[str, Any] | None,
  task: build.Task,
  dataset: datasets.DatasetConfig,
) -> None:
  """Raises ValueError if the ids are of another vocabulary."""
  if about is not None and about.get('vocabulary') != task.description:
    raise ValueError(
      f'{_SETTING}: the files have ids of the vocabulary '
      f'{about.get("vocabulary")!r}; task {dataset.mixture_or_task_name!r} has '
      f'{task.description!r}.'
    )
