# SPDX-License-Identifier: Apache-2.0
"""Measures a student as the draft of its teacher, on outputs of the teacher.

Source: Zhou et al. (2024), arXiv:2310.08461, Eq. 3.
"""

import time
from collections.abc import Mapping

import numpy as np
from jax.sharding import Mesh

from gkd_jax import build
from gkd_jax.batch import SpecialIds
from gkd_jax.data import iterators
from gkd_jax.decoding import sampler
from gkd_jax.distill.grading import Grader
from gkd_jax.evaluation import programs
from gkd_jax.models.interface import Model, Params

LENGTHS = (3, 5, 7)  # of drafts
_DECODINGS = {'greedy': sampler.GREEDY, 'sampled': sampler.ANCESTRAL}
_PREFIX = 'as_draft/'
_NUM_TIMED = 3


def names(*, is_timed: bool) -> list[str]:
  """Returns the metric names of `Agreement`."""
  of_lengths = ['block_efficiency', *(['predicted_speedup'] * is_timed)]
  return [
    f'{_PREFIX}{name}_{decoding}'
    for decoding in _DECODINGS
    for name in (
      'acceptance',
      *(f'{name}_{length}' for name in of_lengths for length in LENGTHS),
    )
  ]


class Agreement:
  """The student as a draft of its teacher; compiled at the first call."""

  def __init__(
    self,
    student: Model,
    teacher: build.Model,
    grader: Grader,
    *,
    max_decode_len: int,
    ids: SpecialIds,
    seed: int,
    mesh: Mesh,
    is_timed: bool,
  ):
    """Runs nothing yet.

    Args:
      student: the draft.
      teacher: one, which writes the outputs.
      grader: of this teacher.
      max_decode_len: T.
      ids: the special ids of both models and their vocabulary.
      seed: of sampling.
      mesh: of devices.
      is_timed: whether to predict the speed-up from the models' times.
    """
    shape = {'max_decode_len': max_decode_len, 'ids': ids}
    self._writes = {
      name: programs.make_write(
        teacher.module, decoding, seed=seed, mesh=mesh, **shape
      )
      for name, decoding in _DECODINGS.items()
    }
    self._agreement = programs.make_agreement(
      student, grader, ids=ids, mesh=mesh
    )
    self._student, self._teacher = student, teacher
    self._max_decode_len, self._pad, self._mesh = max_decode_len, ids.pad, mesh
    self._is_timed = is_timed
    self._written: dict[str, np.ndarray] = {}
    self._seconds: Mapping[int, float] | None = None

  def __call__(
    self, params: Params, dataset: iterators.EvalDataset
  ) -> dict[str, float]:
    """Returns the values of `names`.

    acceptance: the mean over the teacher's tokens of 1 - TVD; greedy, the share
      of tokens that are the student's most probable ones, too.
    block_efficiency_<n>: expected tokens per call of the teacher, if n tokens
      are drafted.
    predicted_speedup_<n>: of one row at a time, from the times that the two
      models take for one or several positions.

    Args:
      params: of the student.
      dataset: the inputs.
    """
    values = {}
    for decoding, write in self._writes.items():
      if decoding not in self._written:  # the teacher is frozen
        self._written[decoding] = dataset.predict(
          lambda rows, batch, write=write: write(
            self._teacher.params, rows, batch.teacher_inputs
          )[:, 0]
        )
      tokens_NT = self._written[decoding]
      accepts_NT, overlap_NT = self._compare(params, dataset, decoding)
      is_token_NT = tokens_NT != self._pad
      lengths_N = is_token_NT.sum(axis=1)
      name = f'{_PREFIX}acceptance_{decoding}'
      values[name] = float(overlap_NT[is_token_NT].mean())
      for length in LENGTHS:
        rounds_N = expected_rounds(accepts_NT, lengths_N, length)
        efficiency = float(lengths_N.sum() / rounds_N.sum())
        of_length = f'_{length}_{decoding}'
        values[f'{_PREFIX}block_efficiency{of_length}'] = efficiency
        if self._is_timed:
          values[f'{_PREFIX}predicted_speedup{of_length}'] = (
            efficiency / self._seconds_of_rounds(params, dataset)[length]
          )
    return {name: values[name] for name in names(is_timed=self._is_timed)}

  def _compare(self, params, dataset, decoding):
    """Returns acceptances of the teacher's tokens, and of any, [N, T] each."""
    tokens_NT, values = self._written[decoding], []
    for row_ids_B, batch in dataset.batches():
      rows_B = np.minimum(row_ids_B, len(tokens_NT) - 1)
      values.append(
        self._agreement(params, self._teacher.params, batch, tokens_NT[rows_B])
      )
    of_all = {
      name: np.concatenate([one[name] for one in values])[: len(tokens_NT)]
      for name in values[0]
    }
    if decoding == 'greedy':
      return (np.float64(of_all['agrees']),) * 2
    return np.float64(of_all['accepts']), np.float64(of_all['overlap'])

  def _seconds_of_rounds(self, params, dataset) -> Mapping[int, float]:
    """Returns {n: time of a round, as a multiple of one plain step}."""
    if self._seconds is None:
      _, batch = next(iter(dataset.batches()))
      num_rows = self._mesh.shape['data']

      def seconds(model, params, inputs, num_positions):
        return _seconds_of_block(
          programs.make_decode_blocks(
            model, num_positions, self._max_decode_len, self._mesh
          ),
          params,
          inputs[:num_rows],
        )

      teacher = self._teacher.module, self._teacher.params, batch.teacher_inputs
      student = self._student, params, batch.encoder_input_tokens
      plain, first, other = (
        seconds(*teacher, 1),
        seconds(*student, 2),
        seconds(*student, 1),
      )
      self._seconds = {
        length: (first + (length - 1) * other + seconds(*teacher, length + 1))
        / plain
        for length in LENGTHS
      }
    return self._seconds


def expected_rounds(
  accepts_NT: np.ndarray, lengths_N: np.ndarray, draft_length: int
) -> np.ndarray:
  """Returns how many calls of the teacher an output is expected to take, [N].

  Args:
    accepts_NT: probability that each token, if it is drafted, is accepted.
    lengths_N: of the outputs.
    draft_length: tokens that are drafted in a round.
  """
  num, max_len = accepts_NT.shape
  rounds = np.zeros((num, max_len + draft_length + 1))  # from a position on
  for position in reversed(range(max_len)):
    stands_N, expected_N = np.ones(num), np.ones(num)
    for drafted in range(draft_length + 1):
      at = position + drafted
      accepts_N = 0.0
      if drafted < draft_length and at < max_len:
        accepts_N = accepts_NT[:, at]
      # This many are accepted, and the teacher writes the next one.
      expected_N = expected_N + stands_N * (1 - accepts_N) * rounds[:, at + 1]
      stands_N = stands_N * accepts_N
    rounds[:, position] = np.where(position < lengths_N, expected_N, 0.0)
  return rounds[:, 0]


def _seconds_of_block(decode_blocks, params, inputs) -> float:
  """Returns the time of one call of `decode_block`; the least of several."""

  def seconds(num_calls):
    start = time.perf_counter()
    decode_blocks(params, inputs, num_calls)
    return time.perf_counter() - start

  seconds(1)  # compile
  more = 8
  return min(
    max(seconds(1 + more) - seconds(1), 1e-9) / more for _ in range(_NUM_TIMED)
  )
