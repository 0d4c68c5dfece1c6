# SPDX-License-Identifier: Apache-2.0
"""Lets a run save before it stops, and keeps its folder in order."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from gkd_jax.parallel import hosts
from gkd_jax.runtime import console


class Interrupted(KeyboardInterrupt):
  """A signal asked the run to stop.

  Attributes:
    exit_code: that the process ends with: 75 (EX_TEMPFAIL, "try again") after
      SIGTERM, as a scheduler sends it; 130 after Ctrl-C, as shells have it.
  """

  def __init__(self, message: str, exit_code: int):
    """Keeps what to say and how to end."""
    super().__init__(message)
    self.exit_code = exit_code


class Signals:
  """Notes SIGTERM and Ctrl-C; a second Ctrl-C ends the process as usual.

  With several hosts JAX notes SIGTERM, and all hosts agree on where to stop:
  see `hosts.reached_preemption`.

  Attributes:
    received: the first one's number; None: there was none.
  """

  def __init__(self):
    """Nothing was received yet, and nothing is noted."""
    self.received: int | None = None
    self._at_once = False

  @property
  def exit_code(self) -> int:
    return 130 if self.received == signal.SIGINT else os.EX_TEMPFAIL

  @contextlib.contextmanager
  def noted(self) -> Iterator[None]:
    """Within it signals are noted; outside they end the process."""
    is_main = threading.current_thread() is threading.main_thread()
    if hosts.are_several() or not is_main:
      yield  # Python lets no other thread handle signals
      return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, self._note) for number in numbers]
    try:
      yield
    finally:
      for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """Within it a signal raises `Interrupted`, one that came before, too.

    With several hosts none does: they `check`.
    """
    self._at_once = True
    try:
      self._raise_if_received()
      yield
    finally:
      self._at_once = False

  def stops(self) -> bool:
    """Whether the run is to stop; all hosts ask, equally often."""
    if hosts.reached_preemption():
      self.received = signal.SIGTERM
    return self.received is not None

  def check(self) -> None:
    """Raises `Interrupted` if the run is to stop; see `stops`."""
    self.stops()
    self._raise_if_received()

  def _note(self, number, frame):
    del frame
    if self.received is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    if self.received is None:
      self.received = number
      name = signal.Signals(number).name
      console.log(f'{name}: saving what there is, then stopping.')
    if self._at_once:
      self._raise_if_received()

  def _raise_if_received(self):
    if self.received is not None:
      raise Interrupted(
        'Interrupted. The same command goes on from there.', self.exit_code
      )
