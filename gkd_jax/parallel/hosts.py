# SPDX-License-Identifier: Apache-2.0
"""One run on several hosts: one process on each, and all do the same.

Numbers are computed together, on one mesh of all devices. Files and messages
are the first host's; checkpoints are written by all.
"""

import glob
import importlib.util
import itertools
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

# Known without asking for devices, which would take them.
_index = 0
_count = 1
_num_calls = itertools.count()


def initialize(
  coordinator_address: str | None,
  process_count: int | None,
  process_index: int | None,
) -> None:
  """Connects this process to those of the other hosts, if there are any.

  Call it before JAX initializes its devices. Without arguments on a TPU's host
  the others are found automatically; elsewhere there are none.

  Args:
    coordinator_address: host:port of the first process, where all meet.
    process_count: of all hosts.
    process_index: of this one, from 0.

  Raises:
    ValueError: only some of the three are given, or they do not fit.
  """
  given = (coordinator_address, process_count, process_index)
  if given == (None, None, None):
    if not _is_on_tpu():
      return
    jax.distributed.initialize()
  else:
    _check(*given)
    jax.distributed.initialize(
      coordinator_address, process_count, process_index
    )
  global _index, _count
  _index, _count = jax.process_index(), jax.process_count()


def _check(coordinator_address, process_count, process_index):
  if None in (coordinator_address, process_count, process_index):
    raise ValueError(
      '--coordinator_address, --process_count and --process_index belong '
      'together; give each process all three, or none where there is one.'
    )
  if ':' not in coordinator_address:
    raise ValueError(
      f'--coordinator_address={coordinator_address} has no port: host:port, '
      'such as 10.0.0.1:8476, of the process with --process_index=0.'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'--process_index={process_index} must be from 0 to --process_count - 1, '
      f'which is {process_count - 1}.'
    )


def _is_on_tpu() -> bool:
  return (
    'tpu' in (os.environ.get('JAX_PLATFORMS') or 'tpu').split(',')
    and importlib.util.find_spec('libtpu') is not None
    and bool(glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'))
  )


def is_first_host() -> bool:
  """Whether this process writes the files that there is one of."""
  return _index == 0


def is_multihost() -> bool:
  """Whether there are others."""
  return _count > 1


def barrier(name: str) -> None:
  """Waits until all hosts have reached this point.

  Args:
    name: of the point; the same on all hosts.
  """
  if is_multihost():
    multihost_utils.sync_global_devices(name)


def any_host(value: bool) -> bool:
  """Returns whether it is true on any host; all must call."""
  if not is_multihost():
    return value
  return bool(multihost_utils.process_allgather(int(value)).any())


def broadcast_from_first(value: int) -> int:
  """Returns the first host's value; all must call."""
  if not is_multihost():
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def allgather(x: jax.Array) -> np.ndarray:
  """Returns all of an array, also the parts of other hosts; all must call."""
  if not is_multihost():
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)


def reached_preemption() -> bool:
  """Returns whether all hosts are to stop here, because one got SIGTERM.

  JAX agrees on a common future call and returns True there, once; every host
  must call this equally often. False where there is one host.
  """
  return is_multihost() and multihost_utils.reached_preemption_sync_point(
    next(_num_calls)
  )
