# SPDX-License-Identifier: Apache-2.0
"""Handles SIGTERM and Ctrl-C: a run saves a checkpoint before it stops."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from gkd_jax.parallel import hosts
from gkd_jax.runtime import console


class Interrupted(KeyboardInterrupt):
  """A signal stops the run.

  Attributes:
    exit_code: of the process: 75 (EX_TEMPFAIL, "try again") after SIGTERM, 130
      after Ctrl-C, as in shells.
  """

  def __init__(self, message: str, exit_code: int):
    """Sets the message and the exit code."""
    super().__init__(message)
    self.exit_code = exit_code


class Signals:
  """Records SIGTERM and Ctrl-C; a second Ctrl-C raises KeyboardInterrupt.

  With several hosts JAX handles SIGTERM and stops all hosts after the same
  step: see `hosts.reached_preemption`.

  Attributes:
    received: number of the first signal; None: no signal yet.
  """

  def __init__(self):
    """Installs no handler; see `recorded`."""
    self.received: int | None = None
    self._raises_immediately = False

  @property
  def exit_code(self) -> int:
    return 130 if self.received == signal.SIGINT else os.EX_TEMPFAIL

  @contextlib.contextmanager
  def recorded(self) -> Iterator[None]:
    """Records signals within the context, instead of ending the process."""
    is_main = threading.current_thread() is threading.main_thread()
    if hosts.is_multihost() or not is_main:
      yield  # Python allows signal handlers in the main thread only
      return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, self._record) for number in numbers]
    try:
      yield
    finally:
      for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)

  @contextlib.contextmanager
  def raised_immediately(self) -> Iterator[None]:
    """Raises `Interrupted` within the context, also for an earlier signal.

    With several hosts it has no effect on later signals: call `check`.
    """
    self._raises_immediately = True
    try:
      self._raise_if_received()
      yield
    finally:
      self._raises_immediately = False

  def should_stop(self) -> bool:
    """Whether the run must stop. All hosts must call it equally often."""
    if hosts.reached_preemption():
      self.received = signal.SIGTERM
    return self.received is not None

  def check(self) -> None:
    """Raises `Interrupted` if the run must stop; see `should_stop`."""
    self.should_stop()
    self._raise_if_received()

  def _record(self, number, frame):
    del frame
    if self.received is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    if self.received is None:
      self.received = number
      name = signal.Signals(number).name
      console.log(f'{name}: saving, then stopping.')
    if self._raises_immediately:
      self._raise_if_received()

  def _raise_if_received(self):
    if self.received is not None:
      raise Interrupted(
        'Interrupted. The same command resumes the run.', self.exit_code
      )
