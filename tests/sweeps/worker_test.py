# SPDX-License-Identifier: Apache-2.0
"""Real processes: what a worker of the real gkd_jax.main does."""

import subprocess
import sys

from gkd_jax.sweeps import worker
from tests import conftest, run_folders
from tests.run_folders import SFT


def test_commands_are_run_as_new_processes_would(tmp_path):
  run_folders.write(tmp_path / 'run', {'greedy/wer': 50.0}, **SFT)

  def report(name, *flags, runs='run'):
    arguments = (
      '--run_mode=report',
      f'--gin.RUNS={tmp_path}/{runs}',
      f'--gin.OUTPUT_DIR={tmp_path}/{name}',
      *flags,
    )
    return worker.command(arguments, tmp_path / f'{name}.log')

  commands = [
    report('first', '--gin.TITLE=A title', '--gin.METRIC=greedy/wer'),
    report('second'),
    report('third', runs='nowhere'),
    report('fourth'),
  ]
  finished = subprocess.run(
    [sys.executable, '-m', 'gkd_jax.main', '--run_mode=worker'],
    input=b''.join(commands),
    stdout=subprocess.PIPE,
    cwd=conftest.ROOT,
  )

  logs = {path.stem: path.read_text() for path in tmp_path.glob('*.log')}
  assert 'A title' in logs['first']
  # Neither flags nor settings of the command before are left.
  assert 'Distillation on cmudict_g2p' in logs['second']
  # A failure ends the process.
  assert 'Error: RUNS matches no run folder' in logs['third']
  assert 'fourth' not in logs
  assert finished.returncode == 1
  assert finished.stdout == 2 * worker.DONE
