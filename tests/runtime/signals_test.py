# SPDX-License-Identifier: Apache-2.0
import errno
import os
import signal
import subprocess
import sys

import pytest

from gkd_jax.runtime import run_folder
from gkd_jax.runtime import signals as signals_lib


def send(number):
  os.kill(os.getpid(), number)


def test_a_signal_is_noted_and_the_work_goes_on():
  signals = signals_lib.Signals()

  with signals.recorded():
    assert signals.received is None
    send(signal.SIGTERM)
    assert signals.received == signal.SIGTERM


@pytest.mark.parametrize(
  ('number', 'code'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_check_after_a_signal_raises_with_the_code_to_end_with(number, code):
  signals = signals_lib.Signals()

  with pytest.raises(signals_lib.Interrupted) as error:
    with signals.recorded():
      signals.check()
      send(number)
      signals.check()

  assert error.value.exit_code == code


def test_a_second_ctrl_c_does_not_wait():
  signals = signals_lib.Signals()

  with signals.recorded():
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      send(signal.SIGINT)


def test_afterwards_signals_do_what_they_did():
  before = signal.getsignal(signal.SIGTERM)

  with signals_lib.Signals().recorded():
    assert signal.getsignal(signal.SIGTERM) != before

  assert signal.getsignal(signal.SIGTERM) == before


def test_a_folder_has_one_writer(tmp_path):
  with run_folder.locked(tmp_path, 'MODEL_DIR'):
    with pytest.raises(ValueError, match='MODEL_DIR .* another process'):
      with run_folder.locked(tmp_path, 'MODEL_DIR'):
        pass

  with run_folder.locked(tmp_path, 'MODEL_DIR'):
    pass


def test_a_killed_process_keeps_no_lock(tmp_path):
  program = (
    'import pathlib, os, signal\n'
    'from gkd_jax.runtime import run_folder\n'
    f'with run_folder.locked(pathlib.Path({str(tmp_path)!r}), "MODEL_DIR"):\n'
    '  os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  killed = subprocess.run([sys.executable, '-c', program], check=False)
  assert killed.returncode == -signal.SIGKILL

  with run_folder.locked(tmp_path, 'MODEL_DIR'):
    pass


# --- What cannot be written ---------------------------------------------------


def full(file=None):
  return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)


@pytest.mark.parametrize(
  'error, where',
  [
    (full(), 'MODEL_DIR /data/run'),
    (full('/data/run/checkpoint_1'), 'MODEL_DIR /data/run'),
    (full('/home/me/tfds/x'), '/home/me/tfds/x'),
    (ValueError('RESOURCE: No space left on device'), 'MODEL_DIR /data/run'),
  ],
)
def test_a_full_disk_is_named(error, where):
  with pytest.raises(OSError) as told:
    with run_folder.explained_write_errors('/data/run', 'MODEL_DIR'):
      raise error

  assert str(told.value).startswith(f'{where}: the disk is full')


def test_a_file_of_the_folder_that_cannot_be_written_is_named():
  with pytest.raises(OSError, match='MODEL_DIR /data/run/x: Is a directory.'):
    with run_folder.explained_write_errors('/data/run', 'MODEL_DIR'):
      raise IsADirectoryError(errno.EISDIR, 'Is a directory', '/data/run/x')


@pytest.mark.parametrize('file', ['/data/run2/x', None])
def test_other_errors_are_left_as_they_are(file):
  error = FileNotFoundError(errno.ENOENT, 'No such file', file)

  with pytest.raises(FileNotFoundError) as told:
    with run_folder.explained_write_errors('/data/run', 'MODEL_DIR'):
      raise error

  assert told.value is error
