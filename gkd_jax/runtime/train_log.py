# SPDX-License-Identifier: Apache-2.0
"""Averages, writes, displays and checks the metrics of training steps."""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gkd_jax.batch import Batch
from gkd_jax.parallel import hosts
from gkd_jax.runtime import console, metrics

SKIPPED_STEPS = 'skipped_steps.jsonl'
_PROGRESS_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSettings:
  """Settings of `TrainLog`.

  Attributes:
    total_steps: of the run.
    period: number of steps that are averaged into one line.
    max_skipped_steps: consecutive skipped steps after which the run must stop.
    learning_rate: step -> learning rate.
    raise_failure: raises the exception of a host callback during a step, if
      there was one; see `rewards.Reward`.
    after_first_step: called once, after the first step.
  """

  total_steps: int
  period: int
  max_skipped_steps: int
  learning_rate: Callable[[int], float]
  raise_failure: Callable[[], None] = lambda: None
  after_first_step: Callable[[], None] = lambda: None


class TrainLog:
  """Reads the metrics of a step after the next step was dispatched.

  Thus the device computes the next step while the host waits for metrics.
  """

  def __init__(
    self,
    settings: LogSettings,
    writer: metrics.MetricWriter,
    run_dir: pathlib.Path,
    first_step: int,
    saved: Mapping[str, Any] | None = None,
  ):
    """Opens the log of a run that starts, or resumes, after `first_step`.

    Args:
      settings: of the log.
      writer: of the lines.
      run_dir: folder of the run.
      first_step: see above. Batches of later steps that were skipped are
        dropped from their file: the run repeats these steps.
      saved: the `state` after `first_step`; None: that of a run that starts.
    """
    self._settings = settings
    self._writer = writer
    self._skipped_path = run_dir / SKIPPED_STEPS
    self._progress = console.Progress(
      settings.total_steps, first_step, _PROGRESS_SECONDS
    )
    self._after_first_step = settings.after_first_step
    self._pending = None
    self._on_policy: list[float] = []
    state = saved or {'window': [], 'seconds': 0.0, 'skipped': []}
    self._window: list[dict[str, float]] = list(state['window'])
    # Of the steps in the window, without the time since the clock was started.
    self._seconds: float = state['seconds']
    # Messages of consecutive skipped steps.
    self._skipped: list[str] = list(state['skipped'])
    if hosts.is_first_host() and self._skipped_path.exists():
      metrics.keep_through_step(self._skipped_path, first_step)
    self.start_clock()

  def start_clock(self) -> None:
    """Starts to measure the time of steps."""
    self._clock = time.monotonic()

  def stop_clock(self) -> None:
    """Excludes the time from here to `start_clock` from the steps' time."""
    self._seconds += time.monotonic() - self._clock

  def state(self) -> dict[str, Any]:
    """Returns what a checkpoint must hold for the log to go on, as JSON.

    Call `flush` and `stop_clock` before.
    """
    # Copies: a checkpoint is written while training goes on.
    return {
      'window': list(self._window),
      'seconds': self._seconds,
      # A run that has stopped for them tries as many again.
      'skipped': [] if self.too_many_skipped else list(self._skipped),
    }

  @property
  def too_many_skipped(self) -> bool:
    """Whether `max_skipped_steps` consecutive steps were skipped."""
    return len(self._skipped) >= self._settings.max_skipped_steps

  def raise_if_too_many_skipped(self) -> None:
    """Raises FloatingPointError if `too_many_skipped`."""
    if self.too_many_skipped:
      raise FloatingPointError(
        f'{len(self._skipped)} consecutive steps were skipped; '
        'experiment.Schedule.max_skipped_steps is '
        f'{self._settings.max_skipped_steps}. Skipped steps do not change the '
        'parameters; the run is saved. Lower LEARNING_RATE or set '
        'experiment.Optimization.max_grad_norm, and start again in another '
        f'MODEL_DIR. Their batches are in {self._skipped_path}.'
      )

  def dispatched(
    self, step: int, step_metrics: dict[str, jax.Array], batch: Batch
  ) -> None:
    """Logs the previous step, and stores this step to be logged later.

    Args:
      step: that was dispatched.
      step_metrics: of this step, not computed yet.
      batch: of this step.
    """
    self.flush()
    self._pending = (step, step_metrics, batch)

  def flush(self) -> None:
    """Waits for the pending step, if any, and logs it."""
    if self._pending is None:
      return
    step, device_metrics, batch = self._pending
    self._pending = None
    values = {k: float(v) for k, v in jax.device_get(device_metrics).items()}
    self._settings.raise_failure()
    if self._after_first_step is not None:
      self._after_first_step()
      self._after_first_step = None
    if not math.isfinite(values['param_norm']):
      raise FloatingPointError(
        f'Step {step}: the parameters are not finite. Lower LEARNING_RATE or '
        'set experiment.Optimization.max_grad_norm, and start again in another '
        'MODEL_DIR.'
      )
    if math.isfinite(values['loss']) and math.isfinite(values['grad_norm']):
      self._skipped = []
      self._window.append(values)
    else:
      self._skip(step, values, batch)
    self._on_policy.append(values['on_policy'])
    if step % self._settings.period == 0:
      self._write(step)

  def close(self) -> None:
    """Logs the pending step, and closes the writer and the progress bar."""
    self.flush()
    self._progress.close()
    self._writer.close()

  def _write(self, step: int) -> None:
    """Writes the means over the steps since the last line."""
    self.stop_clock()
    seconds, self._seconds = self._seconds, 0.0
    self.start_clock()
    window, self._window = self._window, []
    if not window:
      return
    mean = _means(window)
    tokens_per_second = mean['target_tokens'] * len(window) / seconds
    self._writer.write(
      step,
      {
        **{f'train/{k}': v for k, v in mean.items()},
        'train/learning_rate': self._settings.learning_rate(step - 1),
        'train/steps_per_second': len(window) / seconds,
        'train/target_tokens_per_second': tokens_per_second,
      },
    )
    self._progress.update(
      step,
      loss=mean['loss'],
      on_policy=sum(self._on_policy) / len(self._on_policy),
      tokens_per_second=tokens_per_second,
    )

  def _skip(self, step: int, values: dict[str, float], batch: Batch) -> None:
    """Logs a skipped step, and appends its batch to a file."""
    message = (
      f'Step {step} was skipped: loss {values["loss"]}, gradient norm '
      f'{values["grad_norm"]}.'
    )
    self._skipped.append(message)
    console.log(message)
    line: dict[str, Any] = {'step': step}
    for name in ('loss', 'grad_norm'):
      line[name] = str(values[name])
    line['inputs'] = hosts.allgather(batch.encoder_input_tokens).tolist()
    line['targets'] = hosts.allgather(batch.decoder_target_tokens).tolist()
    if hosts.is_first_host():
      with open(self._skipped_path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(line) + '\n')


def _means(window: list[dict[str, float]]) -> dict[str, float]:
  """Returns the mean of each metric over the steps in which it is not NaN.

  The reward is NaN in a step without outputs of the student.
  """
  mean = {}
  for name in window[0]:
    known = [v[name] for v in window if not math.isnan(v[name])]
    if known:
      mean[name] = sum(known) / len(known)
  return mean
