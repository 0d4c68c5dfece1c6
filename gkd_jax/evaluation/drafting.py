# SPDX-License-Identifier: Apache-2.0
"""Writes a model's outputs with a draft, and reports what that saved."""

import collections
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from gkd_jax import build
from gkd_jax.batch import SpecialIds
from gkd_jax.checkpoints import pretrained
from gkd_jax.data import datasets
from gkd_jax.decoding import sampler, speculative
from gkd_jax.evaluation import programs
from gkd_jax.experiment import Draft
from gkd_jax.models.interface import Model, Params
from gkd_jax.runtime import pins as pins_lib

_SETTING = 'DRAFT_CHECKPOINT_PATH'


class Drafter(NamedTuple):
  """A draft that is ready to propose tokens.

  Attributes:
    model: with its parameters.
    settings: how it drafts.
    pins: of its checkpoint.
  """

  model: build.Model
  settings: Draft
  pins: pins_lib.Pins

  @property
  def provenance(self) -> dict[str, Any]:
    """What a file of outputs records about the draft."""
    drafting = self.settings.drafting
    return {
      'draft_checkpoint': str(self.model.folder),
      'drafting': repr(drafting),
      'outputs_are_of_the_targets_distribution': drafting.is_exact,
    }


class Drafts(NamedTuple):
  """What an evaluation does with drafts.

  Attributes:
    drafter: drafts the student's outputs; None: it writes them alone.
    as_draft: whether the student is measured as its teacher's draft.
    is_timed: whether that includes times.
  """

  drafter: Drafter | None = None
  as_draft: bool = False
  is_timed: bool = True


NO_DRAFTS = Drafts()


def open_drafter(
  settings: Draft,
  task: build.Task,
  dataset: datasets.DatasetConfig,
  mesh: Mesh,
  started_with: pins_lib.Pins | None = None,
) -> Drafter | None:
  """Loads the draft of an evaluation; None if no checkpoint is set.

  Args:
    settings: of the draft.
    task: whose vocabulary it must have.
    dataset: with the lengths of outputs.
    mesh: of its parameters.
    started_with: pins of an interrupted run that is resumed.

  Raises:
    ValueError: the checkpoint is missing, has another vocabulary, or the draft
      is as long as the outputs.
  """
  if settings.checkpoint_path is None:
    return None
  settings.drafting.check_fits(dataset.task_feature_lengths['targets'])
  path = pins_lib.pinned_path(started_with, _SETTING, settings.checkpoint_path)
  source = build.open_source(path, task, _SETTING)
  pinned = {_SETTING: pretrained.pin(source, settings.checkpoint_path)}
  return Drafter(build.load_model(source, mesh), settings, pinned)


def make_write(
  model: Model,
  decoding: programs.Decoding,
  drafter: Drafter | None,
  *,
  vocabulary: Any,
  **shape: Any,
) -> Callable[[Params, np.ndarray, np.ndarray], np.ndarray]:
  """Returns `programs.make_write`, or a `Writer` if there is a draft.

  Args:
    model: writes outputs.
    decoding: of the outputs; with a draft, a SamplerConfig.
    drafter: proposes tokens; None: the model writes alone.
    vocabulary: of the task.
    **shape: the other arguments of both.
  """
  if drafter is None:
    return programs.make_write(model, decoding, vocabulary=vocabulary, **shape)
  return Writer(model, drafter, decoding, **shape)


class Writer:
  """Writes outputs with a draft, as the function of `programs.make_write` does.

  The first batches are also written without the draft, to compare the times.

  Attributes:
    settings: of the draft.
  """

  def __init__(
    self,
    target: Model,
    drafter: Drafter,
    config: sampler.SamplerConfig,
    *,
    num_outputs: int,
    max_decode_len: int,
    ids: SpecialIds,
    seed: int,
    mesh: Mesh,
  ):
    """Compiles nothing yet.

    Args:
      target: whose outputs are written.
      drafter: proposes their tokens.
      config: how to draw.
      num_outputs: n, outputs per row.
      max_decode_len: T.
      ids: the special ids of both models and their vocabulary.
      seed: of sampling.
      mesh: of devices.

    Raises:
      ValueError: the decoding cannot produce n different outputs.
    """
    shape = {
      'num_outputs': num_outputs,
      'max_decode_len': max_decode_len,
      'ids': ids,
      'seed': seed,
      'mesh': mesh,
    }
    self._plain = programs.make_write(target, config, **shape)
    self._drafted = programs.make_drafted_write(
      target, drafter.model.module, config, drafter.settings.drafting, **shape
    )
    self._draft_params = drafter.model.params
    self.settings = drafter.settings
    self._is_greedy = config.temperature == 0.0
    self._pad = ids.pad
    self._tally = _Tally()

  def __call__(
    self, params: Params, row_ids_B: np.ndarray, inputs_BS: np.ndarray
  ) -> np.ndarray:
    """Returns tokens [B, n, T], and counts how they came about."""
    both = (params, self._draft_params)
    tokens_BNT, counts = self._drafted(both, row_ids_B, inputs_BS)
    # Rows that only pad the batch have no inputs.
    is_example_B = (inputs_BS != self._pad).any(axis=1)
    self._tally.add(tokens_BNT != self._pad, counts, is_example_B)
    if self._tally.num_compared < self.settings.compared_batches:
      if not self._tally.num_compared:  # compile
        self._plain(params, row_ids_B, inputs_BS)
      # Both in turn, so that what else the machine does slows down both.
      start = time.perf_counter()
      plain_BNT = self._plain(params, row_ids_B, inputs_BS)
      between = time.perf_counter()
      self._drafted(both, row_ids_B, inputs_BS)
      end = time.perf_counter()
      self._tally.compare(
        between - start,
        end - between,
        int((tokens_BNT != self._pad)[is_example_B].sum()),
        int((plain_BNT != self._pad)[is_example_B].sum()),
        (tokens_BNT == plain_BNT).all(axis=(1, 2))[is_example_B],
      )
    return tokens_BNT

  def names(self) -> list[str]:
    """Returns the names of `take_metrics`."""
    names = [
      'acceptance_rate',
      'block_efficiency',
      'target_calls_per_token',
    ]
    if self.settings.compared_batches:
      names += ['tokens_per_second', 'speedup']
      if self._is_greedy:
        names.append('same_as_without_draft')
    return names

  def take_metrics(self) -> dict[str, float]:
    """Returns what was measured since the last call; times since the first.

    acceptance_rate: accepted drafted tokens, of those that were tested.
    block_efficiency: tokens that an output gains from one call of the target.
    target_calls_per_token: calls of the program, of those without a draft.
    tokens_per_second: of the compared batches.
    speedup: time without the draft, as a multiple of that with it, per token.
    same_as_without_draft: share of equal greedy outputs; below 1 only by
      rounding, or if `Drafting.lenience` is set.
    """
    values = self._tally.metrics()
    self._tally.forget_counts()
    return {name: values[name] for name in self.names()}


class _Tally:
  """Sums over batches."""

  def __init__(self):
    self.num_compared = 0
    self._counts = collections.Counter()
    self._compared = collections.Counter()

  def forget_counts(self) -> None:
    """Starts anew, but for the compared batches, which are compared once."""
    self._counts.clear()

  def add(
    self,
    is_token_BNT: np.ndarray,
    counts: list[speculative.Counts],
    is_example_B: np.ndarray,
  ) -> None:
    """Adds a batch."""
    lengths_NB = is_token_BNT.sum(axis=2).T
    for lengths_B, of_output in zip(lengths_NB, counts, strict=True):
      self._counts.update(
        tokens=lengths_B[is_example_B].sum(),
        rounds=of_output.rounds[is_example_B].sum(),
        tested=of_output.tested[is_example_B].sum(),
        accepted=of_output.accepted[is_example_B].sum(),
        calls=of_output.target_calls,
        plain_calls=lengths_B.max(),
      )

  def compare(
    self,
    plain_seconds: float,
    seconds: float,
    num_tokens: int,
    num_plain_tokens: int,
    is_same_B: np.ndarray,
  ) -> None:
    """Adds a batch that was also written without the draft."""
    self.num_compared += 1
    self._compared.update(
      plain_seconds=plain_seconds,
      seconds=seconds,
      compared_tokens=num_tokens,
      plain_tokens=num_plain_tokens,
      same=is_same_B.sum(),
      compared=len(is_same_B),
    )

  def metrics(self) -> dict[str, float]:
    """Returns all values; NaN where nothing was measured."""

    sums = self._counts + self._compared

    def share(name: str, of: str) -> float:
      return float(sums[name] / sums[of]) if sums[of] else float('nan')

    per_second = share('compared_tokens', 'seconds')
    return {
      'acceptance_rate': share('accepted', 'tested'),
      'block_efficiency': share('tokens', 'rounds'),
      'target_calls_per_token': share('calls', 'plain_calls'),
      'tokens_per_second': per_second,
      'speedup': per_second * share('plain_seconds', 'plain_tokens'),
      'same_as_without_draft': share('same', 'compared'),
    }


def describe(values: dict[str, float], settings: Draft) -> str:
  """Returns the results of `Writer.take_metrics` in one line, for the log."""
  text = (
    f"Drafted: {values['acceptance_rate']:.1%} of the draft's tokens accepted, "
    f'{values["block_efficiency"]:.2f} tokens per call of the target'
  )
  if 'speedup' in values:
    text += (
      f', {values["tokens_per_second"]:,.0f} tokens/s, '
      f'{values["speedup"]:.2f} times as fast as without a draft'
    )
  if not settings.drafting.is_exact:
    text += f'. {not_exact(settings)}'
  return text


def not_exact(settings: Draft) -> str:
  """Returns the sentence about outputs of a lenient draft."""
  return (
    f'Drafting.lenience is {settings.drafting.lenience}: outputs do not have '
    "the target's distribution"
  )
