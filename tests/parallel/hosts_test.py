# SPDX-License-Identifier: Apache-2.0
"""Several hosts: real processes on this machine, one per host."""

import glob
import importlib.util
import json
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest

from gkd_jax.checkpoints import pretrained
from gkd_jax.models.params import abstract_params
from gkd_jax.models.t5 import T5, T5Config
from gkd_jax.parallel import hosts, partitioning
from gkd_jax.runtime import metrics as metrics_lib
from tests import conftest

NUM_STEPS = 8
# Batches are the same for one host and for two.
ARGUMENTS = conftest.gin_flags(
  **{
    'EMB_DIM': 16,
    'NUM_HEADS': 2,
    'HEAD_DIM': 8,
    'MLP_DIM': 32,
    'NUM_ENCODER_LAYERS': 1,
    'NUM_DECODER_LAYERS': 1,
    'TRAIN_STEPS': NUM_STEPS,
    'BATCH_SIZE': 32,
    'experiment.Data.num_shards': 4,
    'LEARNING_RATE': 0.01,
    'WARMUP_STEPS': 2,
    'experiment.Schedule.log_period': 1,
    'CHECKPOINT_PERIOD': 2,
    'EVAL_BATCH_SIZE': 32,
    'INITIAL_CHECKPOINT_PATH': None,
    'experiment.Student.parameter_partitioning_dims': 2,
    'final_eval/datasets.DatasetConfig.num_examples': 40,
  }
)


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


class Processes:
  """The processes of one run, with a number of devices each."""

  def __init__(self, start_main, arguments, folder, logs, *, count, devices):
    address = f'127.0.0.1:{free_port()}'
    self.logs = [logs / f'{folder.name}_{i}.log' for i in range(count)]
    self._processes = []
    for i, log in enumerate(self.logs):
      meeting = (
        f'--coordinator_address={address}',
        f'--process_count={count}',
        f'--process_index={i}',
      )
      self._processes.append(
        start_main(
          (
            *arguments,
            f'--gin.MODEL_DIR={folder}',
            *(meeting if count > 1 else ()),
          ),
          log,
          devices,
        )
      )

  def send(self, number, *which):
    for i in which:
      self._processes[i].send_signal(number)

  def wait_for(self, is_so):
    while not is_so():
      for process, log in zip(self._processes, self.logs, strict=True):
        assert process.poll() is None, log.read_text()
      time.sleep(0.02)

  def wait(self):
    """Waits for their ends; returns their exit codes."""
    try:
      return [process.wait() for process in self._processes]
    finally:
      for process in self._processes:
        process.kill()


@pytest.fixture(scope='module')
def start(start_main, tmp_path_factory):
  folder = tmp_path_factory.mktemp('hosts')

  def start(name, *arguments, count, devices):
    return folder / name, Processes(
      start_main,
      (*ARGUMENTS, *arguments),
      folder / name,
      folder,
      count=count,
      devices=devices,
    )

  return start


@pytest.fixture(scope='module')
def on_policy(tmp_path_factory):
  """The arguments of on-policy distillation."""
  teacher = tmp_path_factory.mktemp('hosts') / 'teacher'
  conftest.save_model(teacher, T5Config(384, 24, 4, 8, 32, 1, 1))
  return (
    '--gin_file=configs/cmudict_g2p/on_policy_forward_kl.gin',
    *conftest.gin_flags(
      TEACHER_CHECKPOINT_PATH=teacher, EVAL=None, BEST_METRIC=None
    ),
  )


@pytest.fixture(scope='module')
def two(start, on_policy):
  """A run of two hosts with two devices each: its folder, and their logs."""
  folder, started = start('two', *on_policy, count=2, devices=2)
  assert started.wait() == [0, 0], started.logs[0].read_text()
  return folder, [log.read_text() for log in started.logs]


@pytest.fixture(scope='module')
def killed(start, on_policy):
  """A run of two hosts, one of which was killed; one host resumed it."""
  folder, started = start('killed', *on_policy, count=2, devices=1)
  started.wait_for((folder / 'checkpoint_4').exists)
  started.send(signal.SIGKILL, 1)
  time.sleep(0.5)
  started.send(signal.SIGKILL, 0)  # as a scheduler does
  started.wait()

  _, started = start('killed', *on_policy, count=1, devices=4)
  assert started.wait() == [0], started.logs[0].read_text()
  return folder, started.logs[0].read_text()


def params_of(folder):
  found = pretrained.open_checkpoint(str(folder))
  placement = partitioning.Placement(partitioning.cpu_mesh())
  return found.load(abstract_params(T5(found.config, placement)), None)


@pytest.mark.slow
def test_killed_hosts_go_on_in_another_number_and_end_as_others(two, killed):
  folder, log = killed

  assert re.search(r'Resuming after step [2468]\.', log)
  # The same sums, but for the order of their parts.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
    params_of(folder),
    params_of(two[0]),
  )


@pytest.mark.slow
def test_several_hosts_measure_what_one_does(two, killed):
  for path in ('eval_test.json', 'samples_test.json'):
    results = [
      json.loads((folder / path).read_text()) for folder, _ in (two, killed)
    ]
    for values in results:
      values.pop('train_seconds', None)
    if path == 'eval_test.json':
      assert results[0] == pytest.approx(results[1], rel=1e-4)
    else:
      outputs = [[e['student'] for e in r['examples']] for r in results]
      assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_one_host_alone_writes_metrics_and_speaks(two, killed):
  folder, (first, second) = two

  steps = [line['step'] for line in metrics_lib.read(folder)]
  # The line of step 0 has what tokenizing lost.
  assert steps == list(range(NUM_STEPS + 1))
  assert 'Done: ' in first and 'Done: ' not in second
  assert len(list(folder.glob('events.*'))) == 1
  # One each time it started.
  assert len(list(killed[0].glob('events.*'))) == 2
  assert [line['step'] for line in metrics_lib.read(killed[0])] == steps


# How a run ends does not depend on the method: the one that compiles least.
TERMINATED = (
  '--gin_file=configs/cmudict_g2p/student.gin',
  '--gin.TRAIN_STEPS=100000',
  '--gin.experiment.MeshConfig.model=2',  # both have all rows
)


def saved_last(folder, started):
  """Returns the step after which all hosts saved and stopped, by their logs."""
  assert started.wait() == [75, 75]
  stopped = [
    re.search(r'Stopped after step (\d+), which is saved', log.read_text())[1]
    for log in started.logs
  ]
  assert stopped[0] == stopped[1]
  assert (folder / f'checkpoint_{stopped[0]}').is_dir()
  return int(stopped[0])


@pytest.mark.slow
def test_sigterm_on_one_host_saves_on_all(start):
  folder, started = start(
    'terminated',
    *TERMINATED,
    # Whatever else asks JAX, or counts: it stops in time.
    '--gin.CHECKPOINT_PERIOD=1',
    '--gin.EVAL_PERIOD=2',
    '--gin.EVALUATOR_NUM_EXAMPLES=40',
    count=2,
    devices=1,
  )
  started.wait_for((folder / 'checkpoint_5').is_dir)

  started.send(signal.SIGTERM, 1)

  assert saved_last(folder, started) < 20


@pytest.mark.slow
def test_sigterm_on_one_host_ends_an_evaluation_on_all(start):
  folder, started = start(
    'terminated_in_evaluation',
    *TERMINATED,
    '--gin.EVAL_PERIOD=1',
    '--gin.EVAL_BATCH_SIZE=8',
    '--gin.EVALUATOR_NUM_EXAMPLES=800',  # 100 batches
    '--gin.CHECKPOINT_PERIOD=0',
    count=2,
    devices=1,
  )
  started.wait_for(lambda: 'First step' in started.logs[0].read_text())

  started.send(signal.SIGTERM, 1)

  assert saved_last(folder, started) == 1
  for line in metrics_lib.read(folder):
    assert not any(name.startswith('validation/') for name in line)


@pytest.mark.parametrize(
  ('given', 'said'),
  [
    (('10.0.0.1:80', 2, None), 'Set --coordinator_address'),
    ((None, None, 0), 'Set --coordinator_address'),
    (('10.0.0.1', 2, 0), 'has no port'),
    (
      ('10.0.0.1:80', 2, 2),
      'from 0 to --process_count - 1 = 1',
    ),
    (('10.0.0.1:80', 2, -1), 'must be from 0'),
  ],
)
def test_processes_that_do_not_fit_together_are_refused(given, said):
  with pytest.raises(ValueError, match=said):
    hosts.initialize(*given)


@pytest.mark.parametrize(
  'setting, value',
  [
    ('jax_enable_x64', True),
    ('jax_numpy_rank_promotion', 'raise'),
    ('jax_numpy_dtype_promotion', 'strict'),
  ],
)
def test_settings_of_jax_that_are_not_supported_are_refused(setting, value):
  hosts.check_jax_settings()
  before = getattr(jax.config, setting)
  jax.config.update(setting, value)
  try:
    with pytest.raises(ValueError, match=f'{setting.upper()}={value} is not'):
      hosts.check_jax_settings()
  finally:
    jax.config.update(setting, before)


def test_a_process_alone_is_the_first_and_waits_for_nobody():
  hosts.initialize(None, None, None)

  assert hosts.is_first_host()
  assert not hosts.is_multihost()
  hosts.barrier('here')
  assert [hosts.any_host(x) for x in (True, False)] == [True, False]
  assert hosts.broadcast_from_first(3) == 3


def test_on_a_tpu_the_others_are_looked_for(monkeypatch):
  asked = []
  monkeypatch.setenv('JAX_PLATFORMS', '')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
  monkeypatch.setattr(glob, 'glob', lambda pattern: [pattern])
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *a: asked.append(a))

  hosts.initialize(None, None, None)

  assert asked == [()]
