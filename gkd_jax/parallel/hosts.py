# SPDX-License-Identifier: Apache-2.0
"""One run on several hosts: one process per host, all run the same program.

All hosts compute on one mesh of all devices. The first host writes files and
messages; all hosts write checkpoints.
"""

import glob
import importlib.util
import itertools
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

# Cached, because `jax.process_index` would initialize the devices.
_index = 0
_count = 1
_num_calls = itertools.count()


# {setting of JAX: a value for which gkd_jax is not written}.
_NOT_SUPPORTED = {
  'jax_enable_x64': True,
  'jax_numpy_rank_promotion': 'raise',
  'jax_numpy_dtype_promotion': 'strict',
}


def check_jax_settings() -> None:
  """Raises ValueError if a setting of JAX is not supported."""
  for name, value in _NOT_SUPPORTED.items():
    if getattr(jax.config, name) == value:
      raise ValueError(
        f'{name.upper()}={value} is not supported: gkd_jax computes in float32 '
        'and bfloat16, and combines arrays of different ranks and dtypes. '
        'Unset it.'
      )


def initialize(
  coordinator_address: str | None,
  process_count: int | None,
  process_index: int | None,
) -> None:
  """Connects this process to the processes of the other hosts, if any.

  Must be called before JAX initializes its devices. Without arguments, JAX
  detects the other hosts on TPU; on other devices the run has one host.

  Args:
    coordinator_address: host:port of the first process.
    process_count: number of hosts.
    process_index: index of this host, from 0.

  Raises:
    ValueError: only some of the three are given, or a value is invalid.
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
      'Set --coordinator_address, --process_count and --process_index '
      'together, for each process; or none of them for a run on one host.'
    )
  if ':' not in coordinator_address:
    raise ValueError(
      f'--coordinator_address={coordinator_address} has no port. Set it to '
      'host:port of the process with --process_index=0, such as 10.0.0.1:8476.'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'--process_index={process_index} must be from 0 to --process_count - 1 '
      f'= {process_count - 1}.'
    )


def _is_on_tpu() -> bool:
  return (
    'tpu' in (os.environ.get('JAX_PLATFORMS') or 'tpu').split(',')
    and importlib.util.find_spec('libtpu') is not None
    and bool(glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*'))
  )


def is_first_host() -> bool:
  """Whether this is the host that writes files and messages."""
  return _index == 0


def is_multihost() -> bool:
  """Whether the run has several hosts."""
  return _count > 1


def barrier(name: str) -> None:
  """Blocks until all hosts have reached this point.

  Args:
    name: of the barrier; the same on all hosts.
  """
  if is_multihost():
    multihost_utils.sync_global_devices(name)


def any_host(value: bool) -> bool:
  """Returns whether `value` is true on any host. All hosts must call it."""
  if not is_multihost():
    return value
  return bool(multihost_utils.process_allgather(int(value)).any())


def broadcast_from_first(value: int) -> int:
  """Returns the first host's value. All hosts must call it."""
  if not is_multihost():
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def allgather(x: jax.Array) -> np.ndarray:
  """Returns a global array on every host. All hosts must call it."""
  if not is_multihost():
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)


def reached_preemption() -> bool:
  """Returns whether all hosts must stop now because one received SIGTERM.

  After the signal JAX chooses a future call and returns True in that call, on
  all hosts, once. All hosts must call it equally often. With one host it
  returns False.
  """
  return is_multihost() and multihost_utils.reached_preemption_sync_point(
    next(_num_calls)
  )
