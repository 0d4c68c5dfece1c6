# SPDX-License-Identifier: Apache-2.0
"""Processes that run gkd_jax.main, forked from one that has imported all.

Imports and the default task's words take longer than a tiny run does. A start
with nothing imported is tested in quickstart_test.
"""

import atexit
import functools
import multiprocessing
import multiprocessing.context
import os
import pathlib
import runpy
import sys
import threading
from multiprocessing import forkserver

import pytest

from tests import conftest


class Process:
  """A process that runs main with some arguments, and logs to a file."""

  def __init__(self, arguments, log: pathlib.Path, devices: int = 1):
    """Starts the process with a number of CPU devices."""
    self.log = log
    log.write_text('')
    flags = f'--xla_force_host_platform_device_count={devices}'
    environ = {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flags}',
    }
    self._process = _context().Process(
      target=_run_main, args=([*arguments], str(log), environ)
    )
    self._process.start()

  def text(self) -> str:
    """Returns its log."""
    return self.log.read_text()

  def poll(self) -> int | None:
    """Returns its exit code; None while it runs."""
    return self._process.exitcode

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self._process.pid, number)

  def kill(self) -> None:
    self._process.kill()

  def wait(self, timeout: float = 1200.0) -> int:
    """Waits for its end; returns its exit code, as subprocess does."""
    self._process.join(timeout)
    code = self.poll()
    assert code is not None, f'still running: {self.text()}'
    return code


def stop() -> None:
  """Ends the process from which others are forked, if there is one."""
  forkserver._forkserver._stop()


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['tests.preloaded'])
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PYTHONPATH', str(conftest.ROOT))
    forkserver.ensure_running()
  return context


def _run_main(arguments, log, environ) -> None:
  """Runs `python -m gkd_jax.main` in a process of multiprocessing."""
  os.environ.update(environ)
  file = os.open(log, os.O_WRONLY | os.O_APPEND)
  os.dup2(file, sys.stdout.fileno())
  os.dup2(file, sys.stderr.fileno())
  os.chdir(conftest.ROOT)
  sys.argv = ['gkd_jax.main', *arguments]
  try:
    runpy.run_module('gkd_jax.main', run_name='__main__', alter_sys=True)
  finally:
    # multiprocessing would leave out what Python does at a process's end.
    threading._shutdown()
    atexit._run_exitfuncs()
