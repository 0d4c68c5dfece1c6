# SPDX-License-Identifier: Apache-2.0
import json
import math

import numpy as np
import pytest

from gkd_jax.batch import Batch
from gkd_jax.runtime import metrics, train_log

TIMING = ('train/steps_per_second', 'train/target_tokens_per_second')
BATCH = Batch(*(np.zeros((1, 2), np.int32) for _ in range(3)))


def run(folder, steps, saved=None, loss=lambda step: float(step), limit=10):
  """Logs steps, three to a line; returns the state of the log."""
  settings = train_log.LogSettings(
    total_steps=99,
    period=3,
    max_skipped_steps=limit,
    learning_rate=lambda step: 0.5,
  )
  writer = metrics.MetricWriter(folder, steps[0] - 1)
  log = train_log.TrainLog(settings, writer, folder, steps[0] - 1, saved)
  for step in steps:
    values = {'loss': loss(step), 'reward': math.nan if step % 2 else 1.5}
    values |= {'grad_norm': 1.0, 'param_norm': 1.0, 'on_policy': 0.0}
    log.dispatched(step, {**values, 'target_tokens': 7.0}, BATCH)
  log.flush()
  log.stop_clock()
  state = json.loads(json.dumps(log.state()))  # as a checkpoint holds it
  log.close()
  return state


def lines(folder):
  return [
    {name: line[name] for name in line if name not in TIMING}
    for line in metrics.read(folder)
  ]


@pytest.mark.parametrize('last_saved', [1, 3, 4, 5])
def test_a_log_goes_on_within_the_steps_of_a_line(tmp_path, last_saved):
  (tmp_path / 'whole').mkdir()
  (tmp_path / 'parts').mkdir()
  run(tmp_path / 'whole', range(1, 10))

  state = run(tmp_path / 'parts', range(1, last_saved + 1))
  run(tmp_path / 'parts', range(last_saved + 1, 8))  # lost: not saved
  run(tmp_path / 'parts', range(last_saved + 1, 10), state)

  assert lines(tmp_path / 'parts') == lines(tmp_path / 'whole')
  assert [line['step'] for line in lines(tmp_path / 'whole')] == [3, 6, 9]
  assert lines(tmp_path / 'whole')[0]['train/loss'] == 2.0


def test_the_time_of_a_line_is_that_of_all_its_steps(tmp_path):
  state = run(tmp_path, range(1, 3))
  run(tmp_path, range(3, 4), state | {'seconds': 30.0})

  (line,) = metrics.read(tmp_path)
  assert 0.0 < line['train/steps_per_second'] <= 3 / 30.0


def test_skipped_steps_are_counted_on_and_kept_once(tmp_path):
  def skipped(step):
    return math.nan if step > 1 else 1.0

  state = run(tmp_path, range(1, 4), loss=skipped)
  run(tmp_path, range(4, 6), state, loss=skipped)
  assert len(state['skipped']) == 2

  again = run(tmp_path, range(4, 6), state, loss=skipped)

  assert len(again['skipped']) == 4
  steps = (tmp_path / train_log.SKIPPED_STEPS).read_text().splitlines()
  assert [json.loads(line)['step'] for line in steps] == [2, 3, 4, 5]


def test_a_run_that_stopped_for_skipped_steps_tries_again(tmp_path):
  state = run(tmp_path, range(1, 4), loss=lambda step: math.nan, limit=3)

  assert state['skipped'] == []
