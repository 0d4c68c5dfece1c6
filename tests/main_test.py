# SPDX-License-Identifier: Apache-2.0
import contextlib
import functools
import json
import math
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gkd_jax.checkpoints import checkpoint
from gkd_jax.data.tasks import cmudict_g2p
from gkd_jax.models.t5 import T5Config
from gkd_jax.runtime import metrics as metrics_lib
from tests import conftest, experiments
from tests.conftest import gin_flags

TEACHER = '--gin_file=configs/cmudict_g2p/teacher.gin'
STUDENT = '--gin_file=configs/cmudict_g2p/student.gin'
FORWARD_KL = '--gin_file=configs/cmudict_g2p/on_policy_forward_kl.gin'
JSD = '--gin_file=configs/cmudict_g2p/on_policy_jsd_0.9.gin'
EVAL = '--gin_file=configs/cmudict_g2p/eval.gin'
INFER = '--gin_file=configs/cmudict_g2p/infer.gin'
DRAFTED = '--gin_file=gin/decoding/speculative.gin'
NUM_STEPS = 40
NUM_EXAMPLES = 48


# The real experiments, but small: what their files say may change.
# These need no files to be refused.
NO_FILES = gin_flags(INITIAL_CHECKPOINT_PATH=None, TEACHER_CHECKPOINT_PATH='x')
SMALL = (
  *gin_flags(
    EMB_DIM=16,
    NUM_HEADS=2,
    HEAD_DIM=8,
    MLP_DIM=32,
    NUM_ENCODER_LAYERS=1,
    NUM_DECODER_LAYERS=1,
    TRAIN_STEPS=NUM_STEPS,
    BATCH_SIZE=32,
    LEARNING_RATE=0.03,
    WARMUP_STEPS=5,
    EVAL_PERIOD=20,
    EVAL_BATCH_SIZE=32,  # 48 examples: the second batch is filled up
    EVALUATOR_NUM_EXAMPLES=NUM_EXAMPLES,
  ),
  f'--gin.final_eval/datasets.DatasetConfig.num_examples={NUM_EXAMPLES}',
)


def run_python(*arguments, **keywords):
  """Runs what a person would type."""
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=conftest.ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    **keywords,
  )


def read_json(path):
  """Reads JSON; NaN and Infinity are none."""

  def refuse(constant):
    raise AssertionError(f'{path} holds {constant}')

  return json.loads(path.read_text(), parse_constant=refuse)


# --- A whole run on the real task -------------------------------------------


@pytest.fixture(scope='module')
def teacher(run_main, tmp_path_factory):
  folder = tmp_path_factory.mktemp('teacher')
  run = run_main(TEACHER, *SMALL, *gin_flags(MODEL_DIR=folder, EVAL_PERIOD=0))
  assert run.code == 0, run.err
  return folder


@pytest.fixture(scope='module')
def command(teacher, tmp_path_factory):
  """On-policy distillation of a student that starts from nothing."""
  return (
    '--run_mode=train',
    FORWARD_KL,
    *SMALL,
    *gin_flags(
      MODEL_DIR=tmp_path_factory.mktemp('runs') / 'on_policy',
      TEACHER_CHECKPOINT_PATH=teacher,
      INITIAL_CHECKPOINT_PATH=None,
    ),
  )


@pytest.fixture(scope='module')
def run(command, start_main, tmp_path_factory):
  """A finished process: its folder and what it logged."""
  process = start_main(command, tmp_path_factory.mktemp('log') / 'log')
  assert process.wait() == 0, process.text()
  (folder,) = (f for f in command if f.startswith('--gin.MODEL_DIR='))
  return types.SimpleNamespace(
    folder=pathlib.Path(folder.partition('=')[2]), log=process.text()
  )


@pytest.mark.slow
def test_the_loss_of_on_policy_distillation_falls(run):
  losses = [
    m['train/loss'] for m in metrics_lib.read(run.folder) if 'train/loss' in m
  ]

  assert len(losses) == NUM_STEPS // 10
  assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_all_outputs_of_on_policy_distillation_are_the_students(run):
  lines = [m for m in metrics_lib.read(run.folder) if 'train/loss' in m]

  assert {line['train/on_policy'] for line in lines} == {1.0}


@pytest.mark.slow
def test_the_run_leaves_its_files(run):
  assert checkpoint.find(run.folder).name == f'checkpoint_{NUM_STEPS}'
  there = {path.name for path in run.folder.iterdir()}
  assert there >= {
    'config.gin',
    'eval_test.json',
    'metrics.jsonl',
    'versions.json',
  }
  assert (NUM_STEPS, 'samples/text_summary') in {
    (step, tag) for step, tag, _ in conftest.read_board(run.folder)
  }


@pytest.mark.slow
def test_the_results_are_finite_numbers(run):
  results = read_json(run.folder / 'eval_test.json')

  assert results['step'] == NUM_STEPS
  assert results.keys() >= {
    'greedy/wer',
    'sampled/per',
    'on_student_outputs/reverse_kl',
    'train_seconds',
  }
  assert all(math.isfinite(value) for value in results.values())


@pytest.mark.slow
def test_the_config_that_is_saved_is_the_one_that_was_run(run):
  config = (run.folder / 'config.gin').read_text()

  assert f'\nTRAIN_STEPS = {NUM_STEPS}\n' in config
  assert '\nSTUDENT_DATA_FRACTION = 1.0\n' in config
  assert 'run_folder.Run.model_dir = %MODEL_DIR' in config


@pytest.mark.slow
def test_the_versions_and_the_command_are_saved(run, command):
  versions = read_json(run.folder / 'versions.json')

  assert versions['jax'] == jax.__version__
  assert versions['numpy'] == np.__version__
  flags = [re.sub('^--gin_bindings=', '--gin.', a) for a in versions['command']]
  assert flags[1:] == list(command)


@pytest.mark.slow
def test_samples_and_progress_are_shown(run):
  lines = run.log.splitlines()

  assert lines.count('| input | reference | teacher | student |') == 2
  (last,) = (line for line in lines if line.startswith(f'step {NUM_STEPS}/'))
  assert re.search(
    r'loss \d+\.\d+  on-policy 100%  [\d,]+ target tokens/s  0:00 left', last
  )


@pytest.mark.slow
def test_the_same_command_again_does_nothing_but_say_so(run, command, run_main):
  before = conftest.tree_of(run.folder)

  again = run_main(*command)

  assert again.code == 0
  assert f'Resuming after step {NUM_STEPS}.' in again.err
  assert f'Done: {run.folder}' in again.err
  assert 'Compiled' not in again.err
  after = conftest.tree_of(run.folder)
  changed = {path.name for path in after if after[path] != before.get(path)}
  assert changed <= {'versions.json'}  # it has the command
  assert after.keys() == before.keys()


@pytest.fixture(scope='module')
def refused_process(tmp_path_factory):
  """A process whose gin file is not there; and its user's folder."""
  home = tmp_path_factory.mktemp('home')
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv('JAX_COMPILATION_CACHE_DIR')
    patch.setenv('XDG_CACHE_HOME', str(home))
    return run_python('-m', 'gkd_jax.main', '--gin_file=nowhere.gin'), home


def test_an_error_of_ours_is_one_line_and_not_a_traceback(refused_process):
  finished, _ = refused_process

  assert finished.returncode == 1
  assert finished.stdout == ''
  (line,) = finished.stderr.splitlines()
  assert line.startswith('Error: --gin_file=nowhere.gin')


def test_compiled_programs_are_kept_at_home(refused_process):
  _, home = refused_process

  assert (home / 'gkd_jax' / 'compiled').is_dir()


@pytest.mark.parametrize('kept', [True, False])
def test_memory_that_was_freed_is_kept_for_the_next_step(kept):
  program = f"""
import pathlib, threading
import numpy as np
from gkd_jax.runtime import process

def resident():  # in MiB
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * 4096 / 2**20

if {kept}:
  process.retain_freed_memory()
before = resident()
thread = threading.Thread(target=lambda: bool(np.ones(2**27, np.uint8)[0]))
thread.start()
thread.join()
print(resident() - before)
"""

  grown = float(run_python('-c', program).stdout)

  assert (grown > 100.0) == kept  # of 128


# --- Ended from outside -------------------------------------------------------


@pytest.fixture
def start_and_end(start_main, tmp_path):
  """Starts main, and sends it a signal some seconds after its first step.

  Returns:
    The process; it may have ended by itself before.
  """

  def start_and_end(arguments, number, seconds):
    process = start_main(arguments, tmp_path / 'log')
    while process.poll() is None and 'First step' not in process.text():
      time.sleep(0.05)
    time.sleep(seconds)
    process.send_signal(number)
    process.wait()
    return process

  return start_and_end


def same_end(folder, other):
  """Whether two runs ended with the same state and results."""
  states = []
  for run in (folder, other):
    with ocp.StandardCheckpointer() as checkpointer:
      newest = checkpoint.find(run)
      states.append(
        {
          item: checkpointer.restore(newest / item)
          for item in ('params', 'opt_state')
        }
      )
  jax.tree.map(np.testing.assert_array_equal, *states)
  results = [read_json(run / 'eval_test.json') for run in (folder, other)]
  for values in results:
    del values['train_seconds']
  return results[0] == results[1]


@pytest.fixture
def elsewhere(command, run, tmp_path):
  """The same run in another folder, and that folder."""
  folder = tmp_path / 'ended'
  return (*command, f'--gin.MODEL_DIR={folder}'), folder


@pytest.mark.slow
def test_sigterm_saves_and_says_that_the_run_is_to_be_started_again(
  elsewhere, run, run_main, start_and_end
):
  arguments, folder = elsewhere

  ended = start_and_end(arguments, signal.SIGTERM, 0.0)

  assert ended.poll() == 75, ended.text()
  stopped = re.search(r'Stopped after step (\d+), which is saved', ended.text())
  step = int(stopped[1])
  assert checkpoint.find(folder).name == f'checkpoint_{step}'
  again = run_main(*arguments)
  assert f'Resuming after step {step}.' in again.err
  assert same_end(folder, run.folder)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
  elsewhere, run, run_main, start_and_end
):
  arguments, folder = elsewhere
  # Saving as often as this, a run is mostly killed while it saves.
  arguments = (*arguments, '--gin.CHECKPOINT_PERIOD=4')
  moments = random.Random(0)

  codes = [
    start_and_end(arguments, signal.SIGKILL, moments.uniform(0.0, 1.0)).poll()
    for _ in range(2)
  ]

  assert -signal.SIGKILL in codes
  again = run_main(*arguments)
  assert again.code == 0, again.err
  assert same_end(folder, run.folder)


def test_other_settings_for_the_same_folder_are_refused(run, command, run_main):
  before = conftest.tree_of(run.folder)

  other = run_main(*command, '--gin.RANDOM_SEED=7', '--gin.TRAIN_STEPS=70')

  assert other.code == 1
  assert 'holds another run' in other.err
  assert f'-TRAIN_STEPS = {NUM_STEPS}' in other.err
  assert '+TRAIN_STEPS = 70' in other.err
  assert '-RANDOM_SEED = 0' in other.err and '+RANDOM_SEED = 7' in other.err
  assert conftest.tree_of(run.folder) == before


@pytest.mark.slow
def test_eval_measures_what_training_measured_at_its_end(
  run, teacher, run_main, tmp_path
):
  finished = run_main(
    '--run_mode=eval',
    EVAL,
    *gin_flags(
      CHECKPOINT_PATH=run.folder,
      TEACHER_CHECKPOINT_PATH=teacher,
      EVAL_OUTPUT_DIR=tmp_path,
      EVALUATOR_NUM_EXAMPLES=NUM_EXAMPLES,
      EVAL_BATCH_SIZE=32,
    ),
  )

  assert finished.code == 0, finished.err
  results = read_json(tmp_path / 'eval_test.json')
  assert results['checkpoint'] == f'{run.folder}/checkpoint_{NUM_STEPS}'
  at_the_end = read_json(run.folder / 'eval_test.json')
  of_both = results.keys() & at_the_end.keys()
  assert of_both >= {'sampled/wer', 'on_student_outputs/forward_kl'}
  assert {k: results[k] for k in of_both} == {k: at_the_end[k] for k in of_both}
  # Here the teacher is measured, too.
  assert results['teacher/greedy/per'] > 0.0


@pytest.fixture(scope='module')
def predictions(run, run_main, tmp_path_factory):
  """What the student wrote for the test split, by decoding."""

  @functools.cache
  def infer(**decoding):
    folder = tmp_path_factory.mktemp('infer')
    finished = run_main(
      '--run_mode=infer',
      INFER,
      *gin_flags(
        CHECKPOINT_PATH=run.folder,
        INFER_OUTPUT_DIR=folder,
        INFER_NUM_EXAMPLES=NUM_EXAMPLES,
        INFER_BATCH_SIZE=32,
        **decoding,
      ),
    )
    assert finished.code == 0, finished.err
    lines = (folder / 'predictions_test.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines], folder

  return infer


@pytest.mark.slow
def test_infer_writes_what_eval_scored(run, predictions):
  lines, folder = predictions()

  assert len(lines) == NUM_EXAMPLES
  assert [line['example'] for line in lines] == list(range(NUM_EXAMPLES))
  words = [line['inputs'] for line in lines]
  assert words == list(cmudict_g2p.words()['test'][:NUM_EXAMPLES])
  scores = cmudict_g2p.error_rates(
    [cmudict_g2p.pronunciations()[word] for word in words],
    [line['prediction'] for line in lines],
  )
  at_the_end = read_json(run.folder / 'eval_test.json')
  assert scores['per'] == pytest.approx(at_the_end['greedy/per'])
  assert scores['wer'] == pytest.approx(at_the_end['greedy/wer'])
  about = read_json(folder / 'predictions_test.json')
  assert about['checkpoint'] == f'{run.folder}/checkpoint_{NUM_STEPS}'


@pytest.mark.slow
def test_infer_can_search_with_a_beam(predictions):
  greedy, _ = predictions()
  beam, folder = predictions(DECODING='@beam_search.BeamConfig()')

  assert 'BeamConfig' in (folder / 'predictions_test.json').read_text()
  assert [b['inputs'] for b in beam] == [g['inputs'] for g in greedy]
  assert [b['prediction'] for b in beam] != [g['prediction'] for g in greedy]


# --- The command line -------------------------------------------------------


def test_help_is_quick_and_imports_no_jax():
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  shown = run_python('-X', 'importtime', '-m', 'gkd_jax.main', '--help')
  after = resource.getrusage(resource.RUSAGE_CHILDREN)

  assert 'Runs an experiment that gin files describe.' in shown.stdout
  for flag in ('--run_mode', '--gin_file', '--gin_search_paths', 'dry_run'):
    assert flag in shown.stdout
  modules = {
    line.rpartition('|')[2].strip() for line in shown.stderr.splitlines()
  }
  assert 'absl' in modules  # so these are the modules
  assert not modules & {'jax', 'numpy', 'tensorflow'}
  # Of the processor: the machine may be busy.
  seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  assert seconds < 3.0


def test_dry_run_prints_the_resolved_config_and_writes_nothing(
  run_main, tmp_path
):
  folder = tmp_path / 'run'

  shown = run_main(
    STUDENT, *gin_flags(MODEL_DIR=folder, TRAIN_STEPS=7), '--dry_run'
  )

  assert shown.code == 0
  # What is long, gin writes on a line of its own.
  assert f"MODEL_DIR = '{folder}'\n" in shown.out.replace('\\\n    ', '')
  assert 'TRAIN_STEPS = 7\n' in shown.out
  assert "MIXTURE_OR_TASK_NAME = 'cmudict_g2p'\n" in shown.out
  assert 'run_folder.Run.model_dir = %MODEL_DIR\n' in shown.out
  assert list(tmp_path.iterdir()) == []


# --- Models of other systems --------------------------------------------------


def export(run_main, checkpoint_path, folder, export_format='huggingface'):
  finished = run_main(
    '--run_mode=export',
    *gin_flags(
      CHECKPOINT_PATH=checkpoint_path,
      EXPORT_FORMAT=export_format,
      OUTPUT_DIR=folder,
    ),
  )
  assert finished.code == 0, finished.err
  return folder


@contextlib.contextmanager
def programs_not_in_the_cache():
  """Gives a list that grows with each program that is compiled, not found."""
  misses = []

  def count(event, **_):
    if event == '/jax/compilation_cache/cache_misses':
      misses.append(event)

  jax.monitoring.register_event_listener(count)
  yield misses
  jax.monitoring.unregister_event_listener(count)


@pytest.fixture(scope='module')
def same_run(run, command, teacher, run_main, tmp_path_factory):
  """The run once more: its folder, and what was not in the cache.

  Its teacher comes from a checkpoint of T5X.
  """
  folder = tmp_path_factory.mktemp('same')
  elsewhere = export(run_main, teacher, folder / 'teacher', 't5x')
  with programs_not_in_the_cache() as misses, experiments.all_steps_compiled():
    again = run_main(
      *command,
      *gin_flags(MODEL_DIR=folder / 'run', TEACHER_CHECKPOINT_PATH=elsewhere),
    )
  assert again.code == 0, again.err
  return folder / 'run', misses


@pytest.mark.slow
def test_a_teacher_teaches_the_same_from_another_systems_checkpoint(
  run, same_run
):
  folder, _ = same_run

  for line, same in zip(
    metrics_lib.read(run.folder), metrics_lib.read(folder), strict=True
  ):
    assert same.get('train/loss') == line.get('train/loss')


@pytest.mark.slow
def test_a_second_start_compiles_nothing(same_run):
  _, misses = same_run

  assert not misses


def test_a_program_that_is_compiled_is_seen():
  with programs_not_in_the_cache() as misses:
    jax.jit(lambda x: x * random.random())(1.0)

  assert misses


@pytest.mark.slow
def test_an_exported_student_measures_the_same(run, run_main, tmp_path):
  student = export(run_main, run.folder, tmp_path / 'student')

  finished = run_main(
    '--run_mode=eval',
    EVAL,
    *gin_flags(
      CHECKPOINT_PATH=student,
      EVAL_OUTPUT_DIR=tmp_path,
      EVAL_BATCH_SIZE=32,
      EVALUATOR_NUM_EXAMPLES=NUM_EXAMPLES,
    ),
  )

  assert finished.code == 0, finished.err
  assert 'Hugging Face' in finished.err
  got = read_json(tmp_path / 'eval_test.json')
  want = read_json(run.folder / 'eval_test.json')
  for name in ('greedy/wer', 'greedy/per', 'sampled/wer', 'sampled/per'):
    assert got[name] == want[name]


@pytest.mark.slow
def test_a_students_shape_can_be_that_of_its_checkpoint(run_main, tmp_path):
  config = T5Config(384, 8, 1, 4, 8, 1, 1)
  conftest.save_model(tmp_path / 'start', config)
  start = export(run_main, tmp_path / 'start', tmp_path / 'folder')

  finished = run_main(
    STUDENT,
    '--gin_file=gin/models/from_checkpoint.gin',
    *gin_flags(
      INITIAL_CHECKPOINT_PATH=start,
      MODEL_DIR=tmp_path / 'run',
      BATCH_SIZE=32,
      WARMUP_STEPS=1,
      TRAIN_STEPS=2,
      EVAL=None,
      FINAL_EVAL=None,
      BEST_METRIC=None,
    ),
  )

  assert finished.code == 0, finished.err
  assert (
    'Student: T5 1.1 of width 8 with 1 + 1 layers, 7,032 float32 parameters, '
    f'Hugging Face: {start}\n' in finished.err
  )


@pytest.mark.parametrize(
  'arguments, said',
  [
    ([], 'CHECKPOINT_PATH must be set'),
    (
      gin_flags(CHECKPOINT_PATH='x', EXPORT_FORMAT='onnx', OUTPUT_DIR='y'),
      "EXPORT_FORMAT must be one of huggingface, t5x, got 'onnx'",
    ),
    (
      gin_flags(CHECKPOINT_PATH='x', EXPORT_FORMAT='t5x', OUTPUT_DIR='y'),
      'x is not there. Give a run folder',
    ),
    (
      gin_flags(
        CHECKPOINT_PATH='x', EXPORT_FORMAT='t5x', OUTPUT_DIR='/dev/null/y'
      ),
      'OUTPUT_DIR /dev/null/y: /dev/null is a file, not a folder',
    ),
    (
      gin_flags(CHECKPOINT_PATH="''", EXPORT_FORMAT='t5x', OUTPUT_DIR='y'),
      'CHECKPOINT_PATH is empty',
    ),
  ],
)
def test_an_export_that_cannot_be_is_refused(run_main, arguments, said):
  finished = run_main('--run_mode=export', *arguments)

  assert finished.code == 1
  assert finished.err.startswith('Error: ') and said in finished.err


# --- What is refused --------------------------------------------------------


def test_an_unknown_flag_is_refused_with_the_nearest_right_one():
  finished = run_python('-m', 'gkd_jax.main', '--gin_fiel=x')

  assert finished.returncode == 1
  assert "Unknown command line flag 'gin_fiel'" in finished.stderr
  assert 'Did you mean: gin_file' in finished.stderr
  assert 'Traceback' not in finished.stderr


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], '--gin_file is missing'),
    ([STUDENT, '--gin.TRAIN_STEPS'], "'TRAIN_STEPS' is not of the form NAME"),
    ([STUDENT, 'stray'], "Unexpected arguments ['stray']"),
    (
      [STUDENT, '--run_mode=eval'],
      'no parameter of evaluate.evaluate_checkpoint. It is for '
      '--run_mode=train',
    ),
    ([STUDENT, '--run_mode=eval'], 'this mode include gin/runs/eval.gin.'),
  ],
)
def test_a_command_line_that_makes_no_sense_is_refused(
  refused, arguments, message
):
  assert message in refused(*arguments)


@pytest.mark.parametrize(
  'arguments, parts',
  [
    (
      [FORWARD_KL, *NO_FILES, '--gin.BETA=0.5'],
      ['BETA has no effect in this experiment'],
    ),
    (
      [FORWARD_KL, *NO_FILES, '--gin.STUDENT_DATA_FRACTION=1.5'],
      ['student_data_fraction', 'must be in [0, 1], got 1.5'],
    ),
    (
      [FORWARD_KL, *NO_FILES, '--gin.STUDENT_DATA_FRACTION=-0.1'],
      ['must be in [0, 1], got -0.1'],
    ),
    (
      [JSD, *NO_FILES, '--gin.BETA=1.0'],
      ['0 < beta < 1, got beta=1.0', 'forward_kl', 'reverse_kl'],
    ),
    (
      [JSD, *NO_FILES, '--gin.BETA=high'],
      ["BETA must be a finite number or None, got 'high'"],
    ),
    (
      [JSD, *NO_FILES, '--gin.BETA=0'],
      ['0 < beta < 1, got beta=0', 'forward_kl', 'reverse_kl'],
    ),
    (
      [STUDENT, '--gin.MIXTURE_OR_TASK_NAME=cmudict_g2q'],
      ["no task or mixture 'cmudict_g2q'", "Did you mean 'cmudict_g2p'?"],
    ),
    (
      [STUDENT, '--gin.MIXTURE_OR_TASK_MODULE=my.tasks'],
      ["there is no Python module 'my.tasks'"],
    ),
    (
      [STUDENT, '--gin.experiment.Optimization.num_microbatches=5'],
      ['BATCH_SIZE 64 must be divisible by', 'num_microbatches 5'],
    ),
    (
      [STUDENT, '--gin.eval/datasets.DatasetConfig.split=valid'],
      ["no split 'valid'", 'test, train, validation'],
    ),
    (
      [STUDENT, '--gin.VOCAB_SIZE=100'],
      ['embeds 100 ids', 'cmudict_g2p', '259'],
    ),
    (
      [JSD, *NO_FILES],
      ['TEACHER_CHECKPOINT_PATH: x is not there', 'MODEL_DIR that has been'],
    ),
    (
      [FORWARD_KL, *NO_FILES, '--gin.DIVERGENCE=reverse_kl'],
      ['DIVERGENCE must be a function', '@divergences.forward_kl'],
    ),
    (
      [FORWARD_KL, *NO_FILES, '--gin.POLICY=student'],
      ["POLICY must be a policy, such as @policies.student(), got 'student'"],
    ),
    (
      [STUDENT, '--gin.LEARNING_RATE=1e-2x'],
      ["LEARNING_RATE must be a finite number or None, got '1e-2x'"],
    ),
    (
      [STUDENT, '--gin.TRAIN_STEPS=abc'],
      ["TRAIN_STEPS must be a whole number, got 'abc'"],
    ),
    (
      [JSD, *NO_FILES, '--gin.experiment.Teacher.dtype=bf16'],
      [
        "experiment.Teacher.dtype must be 'float32', 'bfloat16' or None, got "
        "'bf16'"
      ],
    ),
    (
      [STUDENT, '--gin.experiment.Teacher.dtype=bfloat16'],
      ['experiment.Teacher.dtype is set, but TEACHER_CHECKPOINT_PATH is not'],
    ),
    (
      [STUDENT, DRAFTED, '--gin.DRAFT_CHECKPOINT_PATH=x'],
      ['DRAFT_CHECKPOINT_PATH has no effect: no setting of this experiment'],
    ),
    (
      [STUDENT, '--gin.BEST_MODE=least'],
      ["BEST_MODE must be 'min', 'max' or None, got 'least'"],
    ),
  ],
)
def test_settings_that_do_not_fit_are_refused(refused, arguments, parts):
  message = refused(*arguments)

  for part in parts:
    assert part in message
  assert message.count('\n') == 1


def test_an_interruption_is_one_line(run_main, monkeypatch):
  def interrupt(config):
    raise KeyboardInterrupt

  monkeypatch.setattr('gkd_jax.data.datasets.get_vocabulary', interrupt)

  finished = run_main(STUDENT, '--gin.MODEL_DIR=x')

  assert 'Interrupted. The same command resumes' in finished.err
  assert 'Traceback' not in finished.err


@pytest.mark.slow
def test_a_metric_that_is_not_measured_cannot_choose_the_best(refused, letters):
  message = refused(
    STUDENT,
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 6, 'targets': 7}",
    *gin_flags(MIXTURE_OR_TASK_NAME=letters, BEST_METRIC='greedy/eror'),
  )

  assert "BEST_METRIC 'greedy/eror' is not a validation metric" in message
  assert "Did you mean 'greedy/error'?" in message


def test_an_error_that_is_nobodys_intention_has_its_traceback(
  run_main, monkeypatch
):
  # Such as a ValueError that some library raises deep inside.
  def broken(config):
    raise ValueError('shapes (3,) and (4,) do not match')

  monkeypatch.setattr('gkd_jax.data.datasets.get_vocabulary', broken)
  with pytest.raises(ValueError, match='do not match'):
    run_main(STUDENT, '--gin.MODEL_DIR=x')
