# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole process: libraries' logs, memory, compiled programs."""

import ctypes
import importlib.util
import logging
import os
import sys
import traceback

from absl import logging as absl_logging


def quiet_libraries() -> None:
  """Silences TensorFlow, absl and Orbax, except for what users must act on."""
  # TensorFlow only reads data here: it need not log, nor look for GPUs.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  absl_logging.set_verbosity(absl_logging.ERROR)
  # Orbax writes in many tasks, and each would log a full disk at length.
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(_is_not_about_a_full_disk)


def _is_not_about_a_full_disk(record: logging.LogRecord) -> bool:
  from gkd_jax.runtime import run_folder

  return not (record.exc_info and run_folder.is_full(record.exc_info[1]))


def enable_compilation_cache() -> None:
  """Makes JAX cache compiled programs on disk, for later and parallel runs.

  JAX's own variables take precedence: JAX_COMPILATION_CACHE_DIR, and
  JAX_ENABLE_COMPILATION_CACHE=false.
  """
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = os.path.join(home, 'gkd_jax', 'compiled')
    try:
      os.makedirs(folder, exist_ok=True)
    except OSError as e:
      print(f'Compiled programs are not cached: {e}', file=sys.stderr)
      return
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
  # By default programs that compile in under a second are not cached; there are
  # many of them.
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')


def retain_freed_memory() -> None:
  """Makes the C library keep freed memory, where the CPU does the work.

  A step's buffers are large. The C library would return them to the system
  after each step, and the system would fill them with zeros again: a fifth of
  the time of a step of T5 small. With an accelerator they lie on the device.
  """
  accelerators = ('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin')
  if os.environ.get('JAX_PLATFORMS') != 'cpu' and any(
    map(importlib.util.find_spec, accelerators)
  ):
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:  # only glibc has it
    return
  trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
  mallopt(arena_max, 1)  # other arenas return large buffers regardless
  mallopt(mmap_max, 0)
  mallopt(trim_threshold, 2**31 - 1)
  mallopt(top_pad, 2**26)


def exit_if_multihost(error: BaseException) -> None:
  """Exits immediately when one of several hosts fails.

  A normal exit blocks in JAX's shutdown barrier until the others reach it; they
  detect the lost host and end.
  """
  hosts = sys.modules.get('gkd_jax.parallel.hosts')
  if hosts is None or not hosts.is_multihost():
    return
  if isinstance(error, SystemExit):
    if error.code == os.EX_TEMPFAIL:  # all hosts have saved and end, too
      return
    print(error.code, file=sys.stderr)
  else:
    traceback.print_exception(error)
  sys.stderr.flush()
  os._exit(1)
