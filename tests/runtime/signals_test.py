# SPDX-License-Identifier: Apache-2.0
import errno
import os
import signal
import subprocess
import sys

import pytest

from gkd_jax.runtime import paths, run_folder
from gkd_jax.runtime import signals as signals_lib


@pytest.fixture(autouse=True)
def as_without_nohup():
  """Tests that nohup started would inherit that SIGHUP is ignored."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


def send(number):
  os.kill(os.getpid(), number)


def test_a_signal_is_noted_and_the_work_goes_on():
  signals = signals_lib.Signals()

  with signals.recorded():
    assert signals.received is None
    send(signal.SIGTERM)
    assert signals.received == signal.SIGTERM


@pytest.mark.parametrize(
  ('number', 'code'),
  [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)],
)
def test_a_check_after_a_signal_raises_with_the_code_to_end_with(number, code):
  signals = signals_lib.Signals()

  with pytest.raises(signals_lib.Interrupted) as error:
    with signals.recorded():
      signals.check()
      send(number)
      signals.check()

  assert error.value.exit_code == code


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
  ended = []
  monkeypatch.setattr(
    signals_lib.process, 'end', lambda *args: ended.append(args)
  )

  with signals_lib.Signals().recorded():
    send(signal.SIGINT)
    assert not ended
    send(signal.SIGINT)

  ((message, code),) = ended
  assert message.startswith('Interrupted again') and code == 130


def test_what_nohup_ignores_stays_ignored(monkeypatch):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  signals = signals_lib.Signals()

  with signals.recorded():
    send(signal.SIGHUP)
  signal.signal(signal.SIGHUP, before)

  assert signals.received is None


def test_with_several_hosts_sighup_counts_as_sigterm(monkeypatch):
  monkeypatch.setattr(signals_lib.hosts, 'is_multihost', lambda: True)
  got = []
  before = signal.signal(signal.SIGTERM, lambda *args: got.append(args[0]))

  with signals_lib.Signals().recorded():
    send(signal.SIGHUP)
  signal.signal(signal.SIGTERM, before)

  assert got == [signal.SIGTERM]


# --- Before and after training ------------------------------------------------


def ended_by(number, program):
  """Sends a signal to a program once it is ready; how did it end?"""
  running = subprocess.Popen(
    [
      sys.executable,
      '-c',
      'import os, signal, threading\n'
      'from gkd_jax.runtime import process\n'
      f'{program}\n'
      'os.write(1, b"ready")\n'
      'threading.Event().wait(20)',
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert running.stdout.read(5) == 'ready'
  running.send_signal(number)
  _, said = running.communicate(timeout=20)
  return running.returncode, said


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_training_ends_the_process_with_75(number):
  code, said = ended_by(number, 'process.end_on_signals()')

  assert code == 75
  (line,) = said.splitlines()
  assert line.startswith(f'{signal.Signals(number).name}: stopped. The same')


def test_a_signal_is_obeyed_while_the_main_thread_compiles():
  # Stands for compiling: the main thread runs no handler of Python's.
  code, _ = ended_by(
    signal.SIGTERM,
    'process.end_on_signals()\n'
    'signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})',
  )

  assert code == 75


def test_before_training_nohup_is_obeyed_too():
  code, said = ended_by(
    signal.SIGHUP,
    'signal.signal(signal.SIGHUP, signal.SIG_IGN)\n'
    'process.end_on_signals()\n'
    'threading.Timer(0.5, os._exit, [3]).start()',
  )

  assert (code, said) == (3, '')


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


def test_a_folder_through_a_broken_link_is_refused(tmp_path):
  (tmp_path / 'link').symlink_to('nowhere')

  with pytest.raises(ValueError, match='link is a symbolic link to nowhere'):
    run_folder.check_folder(str(tmp_path / 'link' / 'run'), 'MODEL_DIR')


@pytest.mark.parametrize('name', ['checkpoint_2', 'checkpoint_2/eval'])
def test_a_checkpoint_is_no_folder_for_results(tmp_path, name):
  (tmp_path / 'config.gin').touch()

  run_folder.check_folder(str(tmp_path / 'eval'), 'EVAL_OUTPUT_DIR')
  with pytest.raises(ValueError, match='EVAL_OUTPUT_DIR .*is a checkpoint of'):
    run_folder.check_folder(str(tmp_path / name), 'EVAL_OUTPUT_DIR')


def test_a_full_disk_is_named_also_behind_a_link_for_libraries(tmp_path):
  folder = str(tmp_path / 'a[1]')
  file = f'{paths.for_libraries(folder)}/checkpoint_1'

  with pytest.raises(OSError, match='^MODEL_DIR .*a.1.: the disk is full'):
    with run_folder.explained_write_errors(folder, 'MODEL_DIR'):
      raise full(file)


# --- A run that has no checkpoint ---------------------------------------------


def leave(folder, *names, step=3):
  """Leaves what a run without checkpoints may have left."""
  for name in names:
    (folder / name).touch()
  (folder / 'metrics.jsonl').write_text(f'{{"step": 1}}\n{{"step": {step}}}\n')


def is_past(line):
  return line['step'] > 2


@pytest.mark.parametrize('name', ['eval_test.json', 'samples_test.json'])
def test_results_without_a_checkpoint_are_not_replaced(tmp_path, name):
  leave(tmp_path, name, step=1)

  with pytest.raises(ValueError, match=f'{name}, but no checkpoint: '):
    run_folder.check_results(tmp_path, is_past)


def test_metrics_beyond_the_first_checkpoint_are_not_replaced(tmp_path):
  leave(tmp_path)

  with pytest.raises(ValueError, match='has metrics.jsonl, but no checkpoint'):
    run_folder.check_results(tmp_path, is_past)


def test_a_run_that_was_killed_early_starts_anew(tmp_path):
  run_folder.check_results(tmp_path / 'new', is_past)
  leave(tmp_path, step=2)
  run_folder.check_results(tmp_path, is_past)
  leave(tmp_path, 'checkpoint_2.orbax-checkpoint-tmp')  # while it saved

  run_folder.check_results(tmp_path, is_past)


def test_old_results_are_removed_for_a_run_that_starts_anew(tmp_path):
  leave(tmp_path, 'eval_test.json', 'samples_test.json', 'config.gin')

  run_folder.remove_results(tmp_path)

  assert [path.name for path in tmp_path.iterdir()] == ['config.gin']
