# SPDX-License-Identifier: Apache-2.0
"""Inference: writes a model's outputs for a split, or scores given outputs."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gkd_jax import build
from gkd_jax.batch import SpecialIds
from gkd_jax.checkpoints import checkpoint, pretrained
from gkd_jax.data import (
  datasets,
  iterators,
  predictions,
  tokenization,
  vocabularies,
)
from gkd_jax.decoding import sampler
from gkd_jax.distill.rewards import Reward
from gkd_jax.evaluation import drafting, programs, score
from gkd_jax.experiment import Draft, check_drafted
from gkd_jax.parallel import hosts, partitioning
from gkd_jax.runtime import console, files, paths, pins, run_folder

_STATUS_SECONDS = 10.0
_NO_DRAFT = Draft()


def infer(
  checkpoint_path: str,
  output_dir: str,
  dataset: datasets.DatasetConfig,
  decoding: programs.Decoding = sampler.GREEDY,
  num_samples: int = 1,
  seed: int = 0,
  draft: Draft = _NO_DRAFT,
  overwrite: bool = False,
  scored_path: str | None = None,
  score_field: str = 'nll',
  reward: Reward | None = None,
) -> None:
  """Writes `<output_dir>/predictions_<split>.jsonl`; see `predictions`.

  An interrupted run resumes at the first missing batch and produces the same
  file, byte for byte: samples depend only on the seed, the example's number and
  the sample's number.

  Args:
    checkpoint_path: see `pretrained.open_checkpoint`.
    output_dir: created if it does not exist.
    dataset: task and split.
    decoding: a SamplerConfig or a BeamConfig.
    num_samples: outputs per example: independent samples, or the best
      hypotheses of a beam that reached EOS.
    seed: of sampling.
    draft: a smaller model that drafts the outputs; what it saved is logged and
      written beside the file.
    overwrite: replace a complete file, and one of other settings.
    scored_path: path or glob of predictions: they are scored, and none are
      written; see `score.score`. None: none.
    score_field: name of their new field.
    reward: scores them instead of their NLL; the checkpoint is its model.

  Raises:
    ValueError: settings do not fit the checkpoint or the task, or the file is
      already complete.
  """
  if scored_path is not None:
    if draft.checkpoint_path is not None:
      raise ValueError(
        'DRAFT_CHECKPOINT_PATH is set, but with PREDICTIONS no outputs are '
        'written that it could draft. Leave out one of them.'
      )
    score.score(
      checkpoint_path,
      scored_path,
      output_dir,
      dataset,
      field=score_field,
      reward=reward,
      overwrite=overwrite,
    )
    return
  if reward is not None:
    raise ValueError(
      'REWARD is set, but PREDICTIONS, the outputs that it scores, is not.'
    )
  folder = paths.resolve(output_dir, predictions.OUTPUT_SETTING)
  path = folder / f'predictions_{dataset.split}.jsonl'
  files.check_free([path], predictions.OUTPUT_SETTING, overwrite)
  check_drafted(draft, {'': decoding})
  mesh = partitioning.make_mesh()
  partitioning.check_rows_divide('INFER_BATCH_SIZE', dataset.batch_size, mesh)
  lengths = dict(dataset.task_feature_lengths)
  started_with = None if overwrite else predictions.pins_of_partial(path)
  source, task = build.open_model_and_task(
    pins.pinned_path(started_with, 'CHECKPOINT_PATH', checkpoint_path), dataset
  )
  inputs = iterators.InferenceDataset(dataset, task.ids.pad)
  tokenization.log(dataset)
  drafter = drafting.open_drafter(draft, task, dataset, mesh, started_with)
  module = build.make_model(source.config, mesh)
  write = drafting.make_write(
    module,
    decoding,
    drafter,
    vocabulary=task.vocabulary,
    num_outputs=num_samples,
    max_decode_len=lengths['targets'],
    ids=task.ids,
    seed=seed,
    mesh=mesh,
  )
  provenance = _provenance(source, task, dataset, checkpoint_path, drafter) | {
    'decoding': repr(decoding),
    'num_samples': num_samples,
    'seed': seed,
  }
  # All hosts compute the outputs; the first one writes them.
  writer = None
  if hosts.is_first_host():
    writer = predictions.Writer(path, provenance, dataset.batch_size, overwrite)
  first = hosts.broadcast_from_first(writer.num_examples if writer else 0)
  params = build.load_model(source, mesh).params
  if first:
    console.log(f'Resuming after {first:,} examples.')
  _write_from(first, write, params, inputs, writer, task.ids)
  if writer is None:
    return
  results = {}
  if drafter is not None and writer.num_examples > first:
    results['drafted'] = write.take_metrics()
    console.log(drafting.describe(results['drafted'], draft))
  writer.close(results=results)
  console.log(f'{writer.num_predictions:,} predictions written: {path}')


def _write_from(
  first: int,
  write: Callable[..., np.ndarray],
  params: Any,
  inputs: iterators.InferenceDataset,
  writer: predictions.Writer | None,
  ids: SpecialIds,
) -> None:
  """Writes the outputs of the examples from `first` on."""
  total = inputs.size()
  logged = start = time.monotonic()
  for row_ids_B, inputs_BS, examples in inputs.batches(first):
    tokens_BNT = write(params, row_ids_B, inputs_BS)
    if writer is None:
      continue
    writer.append(_lines(inputs, examples, tokens_BNT, ids))
    if (now := time.monotonic()) - logged > _STATUS_SECONDS:
      logged = now
      console.log(_progress(writer.num_examples, first, total, now - start))


def _provenance(
  source: pretrained.Pretrained,
  task: build.Task,
  dataset: datasets.DatasetConfig,
  checkpoint_path: str,
  drafter: drafting.Drafter | None,
) -> dict[str, Any]:
  """Returns what is recorded beside the outputs, but for the decoding."""
  return {
    'checkpoint': str(source.folder),
    'step': run_folder.step_of(source.folder),
    'task': dataset.mixture_or_task_name,
    'task_arguments': dataset.task_arguments,
    'split': dataset.split,
    'max_examples': dataset.num_examples,
    'vocabulary': task.description,
    'task_feature_lengths': dict(dataset.task_feature_lengths),
    'batch_size': dataset.batch_size,
    'versions': checkpoint.versions(),
    'pins': pins.to_json(
      build.pin_data(task, dataset)
      | {'CHECKPOINT_PATH': pretrained.pin(source, checkpoint_path)}
      | (drafter.pins if drafter else {})
    ),
    **(drafter.provenance if drafter else {}),
  }


def _lines(
  inputs: iterators.InferenceDataset,
  examples: list[dict[str, Any]],
  tokens_BNT: np.ndarray,
  ids: SpecialIds,
) -> list[list[dict[str, Any]]]:
  """Returns the lines of each example; outputs of padding alone are none."""
  return [
    [
      _line(inputs, example, tokens, ids)
      for tokens in of_one
      if (tokens != ids.pad).any()
    ]
    for example, of_one in zip(examples, tokens_BNT, strict=False)
  ]


def _line(
  inputs: iterators.InferenceDataset,
  example: dict[str, Any],
  tokens: np.ndarray,
  ids: SpecialIds,
) -> dict[str, Any]:
  """Returns the JSON fields of one output [T]; pad ids are removed."""
  return {
    'inputs': example['inputs'],
    'targets': example['targets'],
    'prediction': vocabularies.decode(inputs.vocabulary, tokens),
    'input_ids': example['input_ids'],
    'prediction_ids': tokens[tokens != ids.pad].tolist(),
  }


def _progress(
  num_done: int, first: int, total: int | None, seconds: float
) -> str:
  per_second = (num_done - first) / seconds
  if total is None or num_done > total:  # preprocessors can add examples
    return f'{num_done:,} examples  {per_second:,.0f}/s'
  left = console.minutes((total - num_done) / per_second)
  return f'{num_done:,} of {total:,} examples  {per_second:,.0f}/s  {left} left'
