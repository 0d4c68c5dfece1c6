# SPDX-License-Identifier: Apache-2.0
"""Handles SIGTERM, SIGHUP and Ctrl-C: a run saves before it stops."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from gkd_jax.parallel import hosts
from gkd_jax.runtime import console, process


class Interrupted(KeyboardInterrupt):
  """A signal stops the run.

  Attributes:
    exit_code: of the process: 75 (EX_TEMPFAIL, "try again") after SIGTERM and
      SIGHUP, 130 after Ctrl-C, as in shells.
  """

  def __init__(self, message: str, exit_code: int):
    """Sets the message and the exit code."""
    super().__init__(message)
    self.exit_code = exit_code


class Signals:
  """Records SIGTERM, SIGHUP and Ctrl-C; a second Ctrl-C ends the process.

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
    handlers = dict.fromkeys(
      (signal.SIGTERM, signal.SIGHUP, signal.SIGINT), self._record
    )
    if hosts.is_multihost():  # JAX handles SIGTERM
      handlers = {signal.SIGHUP: _send_sigterm}
    if threading.current_thread() is not threading.main_thread():
      handlers = {}  # Python allows them in the main thread only
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
      handlers.pop(signal.SIGHUP, None)
    before = {
      number: signal.signal(number, handler)
      for number, handler in handlers.items()
    }
    try:
      yield
    finally:
      for number, handler in before.items():
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
      process.end(
        'Interrupted again: stopped without waiting for what is being saved. '
        'The same command resumes the run from its last whole checkpoint.',
        130,
      )
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


def _send_sigterm(number, frame):
  """Treats a signal as SIGTERM."""
  del number, frame
  os.kill(os.getpid(), signal.SIGTERM)
