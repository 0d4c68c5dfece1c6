# SPDX-License-Identifier: Apache-2.0
"""Scores given outputs: their negative log-likelihood under a model."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gkd_jax import build
from gkd_jax.checkpoints import checkpoint, pretrained
from gkd_jax.data import datasets, predictions
from gkd_jax.evaluation import programs
from gkd_jax.parallel import hosts, partitioning
from gkd_jax.runtime import console, files, pins

_SETTING = 'PREDICTIONS'
_STATUS_SECONDS = 10.0


def score(
  checkpoint_path: str,
  predictions_path: str,
  output_dir: str,
  dataset: datasets.DatasetConfig,
  field: str = 'nll',
  overwrite: bool = False,
) -> None:
  """Writes predictions again, with their mean NLL in nats per token.

  The mean is over the tokens of an output, EOS included if the model wrote it.
  `select.field` reads it. An interrupted run resumes and produces the same
  file, byte for byte.

  Args:
    checkpoint_path: see `pretrained.open_checkpoint`.
    predictions_path: path or glob of files of predictions of the same inputs.
    output_dir: created if it does not exist.
    dataset: task, split, lengths and batch size; its examples are not read.
    field: name of the new field of each line.
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
  features = datasets.get_task(dataset).output_features
  texts = predictions.Texts(
    task.vocabulary.encode,
    {
      name: [task.ids.eos] if features[name].add_eos else []
      for name in ('inputs', 'targets')
    },
  )
  examples = _Examples(
    sources, None if about else texts, dataset, task.ids.num_ids
  )
  for _ in examples.rows():  # all fit, before anything is compiled or written
    pass
  provenance = about or {'vocabulary': None}
  # All hosts compute the scores; the first one writes them.
  writer = None
  if hosts.is_first_host():
    writer = predictions.Writer(
      path,
      {
        **provenance,
        'scores': {**provenance.get('scores', {}), field: str(source.folder)},
        'batch_size': dataset.batch_size,
        'versions': checkpoint.versions(),
        'pins': pins.to_json(
          {
            'CHECKPOINT_PATH': pretrained.pin(source, checkpoint_path),
            _SETTING: pins.of_files(
              predictions.files_of(predictions_path, _SETTING)
            ),
          }
        ),
      },
      dataset.batch_size,
      overwrite,
    )
  first = hosts.broadcast_from_first(writer.num_examples if writer else 0)
  model = build.load_model(source, mesh)
  measure = programs.make_mean_nll(model.module, ids=task.ids, mesh=mesh)
  if first:
    console.log(f'Resuming at example {first:,}.')
  logged = started = time.monotonic()
  num_scored = num_examples = 0
  for group in examples.groups():
    num_examples += len(group)
    if group[0].number < first:
      continue
    rows = [row for example in group for row in example.rows]
    values = []
    for start in range(0, len(rows), dataset.batch_size):
      some = rows[start : start + dataset.batch_size]
      batch = _batch(some, dataset, task.ids.pad)
      values += measure(model.params, *batch)[: len(some)].tolist()
    num_scored += len(values)
    if writer is None:
      continue
    scores = iter(values)
    writer.append(
      [
        [
          {'example': one.number, 'sample': i, **line, field: next(scores)}
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
  console.log(f'{writer.num_predictions:,} outputs scored: {path}')


class _Row(NamedTuple):
  """Token ids of an input and of an output."""

  inputs: Sequence[int]
  outputs: Sequence[int]


class _Example(NamedTuple):
  """An input with its lines, and their ids."""

  number: int
  lines: Sequence[Mapping[str, Any]]
  rows: Sequence[_Row]


class _Examples(NamedTuple):
  """The examples of files.

  Attributes:
    sources: paths of the files.
    texts: how texts are tokenized; None: the lines have ids.
    dataset: lengths and batch size.
    num_ids: size of the vocabulary.
  """

  sources: Sequence[str]
  texts: predictions.Texts | None
  dataset: datasets.DatasetConfig
  num_ids: int

  def groups(self) -> Iterator[list[_Example]]:
    """Yields examples whose numbers are of the same batch of an uncut file.

    A batch of rows then has the same rows also where a run resumes.
    """
    size = self.dataset.batch_size
    for _, group in itertools.groupby(self.rows(), lambda x: x.number // size):
      yield list(group)

  def rows(self) -> Iterator[_Example]:
    """Yields examples; raises ValueError if a row does not fit."""
    for example in predictions.examples(self.sources, _SETTING):
      where = f'example {example.number}'
      rows = [
        _Row(*predictions.ids_of_line(line, self.texts, where, _SETTING))
        for line in example.lines
      ]
      for row in rows:
        self._check(row, f'{_SETTING}: {where}')
      yield _Example(example.number, example.lines, rows)

  def _check(self, row: _Row, where: str) -> None:
    if not row.outputs:
      raise ValueError(f'{where} has an output without tokens.')
    for name, ids in (('inputs', row.inputs), ('targets', row.outputs)):
      length = self.dataset.task_feature_lengths[name]
      if len(ids) > length:
        raise ValueError(
          f'{where} has {len(ids)} tokens of {name}, but TASK_FEATURE_LENGTHS '
          f'has {length}: to be scored they must not be cut. Raise it.'
        )
      if ids and not 0 <= min(ids) <= max(ids) < self.num_ids:
        raise ValueError(
          f'{where} has ids from {min(ids)} to {max(ids)} in its {name}; those '
          f'of the vocabulary are 0 to {self.num_ids - 1}.'
        )


def _batch(
  rows: Sequence[_Row], dataset: datasets.DatasetConfig, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns inputs [B, S], outputs [B, T] and their weights [B, T].

  The rows after the last one repeat it.
  """
  lengths, size = dataset.task_feature_lengths, dataset.batch_size
  inputs = np.full((size, lengths['inputs']), pad, np.int32)
  outputs = np.full((size, lengths['targets']), pad, np.int32)
  weights = np.zeros(outputs.shape, np.float32)
  for i in range(size):
    row = rows[min(i, len(rows) - 1)]
    inputs[i, : len(row.inputs)] = row.inputs
    outputs[i, : len(row.outputs)] = row.outputs
    weights[i, : len(row.outputs)] = 1.0
  return inputs, outputs, weights


def _check_field(sources: Sequence[str], field: str) -> None:
  """Raises ValueError unless the field has a name of its own."""
  example = next(predictions.examples(sources, _SETTING), None)
  taken = {'example', 'sample', *predictions.FIELDS}
  if example is not None:
    taken |= {*example.lines[0]}
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
