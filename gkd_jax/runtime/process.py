# SPDX-License-Identifier: Apache-2.0
"""Process-wide settings: logs of libraries, memory, compilation cache."""

import ctypes
import importlib.util
import logging
import os
import signal
import sys
import threading
import traceback
import types

_END_ON = (signal.SIGTERM, signal.SIGHUP)
_ending = threading.Lock()


def end_on_signals() -> None:
  """Makes SIGTERM and SIGHUP end the process with 75, "try again".

  That is for all that is not training, which saves first: see
  `signals.Signals`. A signal that is ignored, as SIGHUP under nohup, stays so.

  Python calls a handler between two instructions of the main thread, which may
  compile for minutes. Therefore a thread waits for signals, too.
  """
  for number in _END_ON:
    if signal.getsignal(number) == signal.SIG_DFL:
      signal.signal(number, _end_by_signal)
  received, wake = os.pipe()
  os.set_blocking(wake, False)
  signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

  def watch():
    while number := os.read(received, 1):
      if signal.getsignal(number[0]) is _end_by_signal:
        _end_by_signal(number[0])

  threading.Thread(target=watch, name='signals', daemon=True).start()


def _end_by_signal(number: int, frame: types.FrameType | None = None) -> None:
  del frame
  end(
    f'{signal.Signals(number).name}: stopped. The same command resumes the run '
    'from its last checkpoint, or starts it again.',
    os.EX_TEMPFAIL,
  )


def end(message: str, exit_code: int) -> None:
  """Prints a line and ends the process without waiting for its threads."""
  if _ending.acquire(blocking=False):
    # Unbuffered: the thread that was interrupted may hold the buffer's lock.
    os.write(2, f'{message}\n'.encode())
    os._exit(exit_code)


def quiet_libraries() -> None:
  """Silences TensorFlow, absl and Orbax, except for errors."""
  # TensorFlow only reads data here: its logs and its search for GPUs are noise.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  from absl import logging as absl_logging

  absl_logging.set_verbosity(absl_logging.ERROR)
  # Orbax writes in many tasks, each of which logs a full disk with a traceback.
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(_is_not_about_a_full_disk)


def _is_not_about_a_full_disk(record: logging.LogRecord) -> bool:
  from gkd_jax.runtime import run_folder

  return not (record.exc_info and run_folder.is_full(record.exc_info[1]))


def enable_compilation_cache() -> None:
  """Enables JAX's persistent compilation cache.

  JAX's own variables take precedence: JAX_COMPILATION_CACHE_DIR, and
  JAX_ENABLE_COMPILATION_CACHE=false.
  """
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = os.path.join(home, 'gkd_jax', 'compiled')
    try:
      os.makedirs(folder, exist_ok=True)
    except OSError as e:
      print(f'The compilation cache is disabled: {e}', file=sys.stderr)
      return
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
  # JAX's default skips programs that compile in under a second, but a run has
  # many of them.
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')


def retain_freed_memory() -> None:
  """Makes glibc retain freed memory when JAX computes on the CPU.

  By default glibc returns a step's large buffers to the kernel, which zeroes
  them again for the next step: a fifth of the step time of T5 small. On an
  accelerator these buffers are in device memory.
  """
  accelerators = ('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin')
  if os.environ.get('JAX_PLATFORMS') != 'cpu' and any(
    map(importlib.util.find_spec, accelerators)
  ):
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:  # not glibc
    return
  trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
  mallopt(arena_max, 1)  # secondary arenas ignore the settings below
  mallopt(mmap_max, 0)
  mallopt(trim_threshold, 2**31 - 1)
  mallopt(top_pad, 2**26)


def exit_if_multihost(error: BaseException) -> None:
  """Exits immediately if this is one of several hosts.

  A normal exit would block in JAX's shutdown barrier, which the other hosts
  never reach. They detect the lost host and also exit.
  """
  hosts = sys.modules.get('gkd_jax.parallel.hosts')
  if hosts is None or not hosts.is_multihost():
    return
  if isinstance(error, SystemExit):
    if error.code == os.EX_TEMPFAIL:  # all hosts have saved and exit normally
      return
    print(error.code, file=sys.stderr)
  else:
    traceback.print_exception(error)
  sys.stderr.flush()
  os._exit(1)
