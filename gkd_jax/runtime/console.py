# SPDX-License-Identifier: Apache-2.0
"""Messages and progress on stderr."""

import sys
import time

import tqdm

from gkd_jax.parallel import hosts


class Progress:
  """Shows the progress of training: a bar on a terminal, lines elsewhere."""

  def __init__(self, total_steps: int, first_step: int, every_seconds: float):
    """Starts the clock.

    Args:
      total_steps: of the run.
      first_step: number of steps already done.
      every_seconds: interval between lines if stderr is not a terminal.
    """
    self._total = total_steps
    self._first = self._step = first_step
    self._every = every_seconds
    self._start = self._last = time.monotonic()
    self._bar = None
    if sys.stderr.isatty() and hosts.is_first_host():
      self._bar = tqdm.tqdm(
        total=total_steps, initial=first_step, unit='step', dynamic_ncols=True
      )

  def update(
    self, step: int, *, loss: float, on_policy: float, tokens_per_second: float
  ) -> None:
    """Shows the metrics after a step.

    Args:
      step: the last step that is done.
      loss: in nats.
      on_policy: fraction of on-policy outputs so far.
      tokens_per_second: target tokens.
    """
    figures = (
      f'loss {loss:.4f}  on-policy {on_policy:.0%}  '
      f'{tokens_per_second:,.0f} target tokens/s'
    )
    if self._bar is not None:
      self._bar.set_description_str(figures, refresh=False)
      self._bar.update(step - self._step)
      self._step = step
      return
    now = time.monotonic()
    self._step = step
    if step == self._total or now - self._last >= self._every:
      self._last = now
      left = (now - self._start) / max(1, step - self._first)
      left *= self._total - step
      log(f'step {step}/{self._total}  {figures}  {minutes(left)} left')

  def close(self) -> None:
    """Closes the progress bar."""
    if self._bar is not None:
      self._bar.close()


def log(text: str) -> None:
  """Prints a line on the first host, above the progress bar if there is one."""
  if not hosts.is_first_host():
    return
  tqdm.tqdm.write(text, file=sys.stderr)
  sys.stderr.flush()


def minutes(seconds: float) -> str:
  """Returns a duration as minutes:seconds."""
  whole, rest = divmod(round(seconds), 60)
  return f'{whole}:{rest:02d}'
