# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest

from gkd_jax import checkpoint, metrics
from gkd_jax.model import T5Config
from tests import conftest

TEACHER = '--gin_file=configs/cmudict_g2p/teacher.gin'
STUDENT = '--gin_file=configs/cmudict_g2p/student.gin'
FORWARD_KL = '--gin_file=configs/cmudict_g2p/on_policy_forward_kl.gin'
JSD = '--gin_file=configs/cmudict_g2p/on_policy_jsd_0.9.gin'
EVAL = '--gin_file=configs/cmudict_g2p/eval.gin'
INFER = '--gin_file=configs/cmudict_g2p/infer.gin'
NUM_STEPS = 60
NUM_EXAMPLES = 48


def gin_flags(**macros):
  return tuple(f'--gin.{name}={value}' for name, value in macros.items())


# The real experiments, but small: what their files say may change.
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
    EVAL_PERIOD=30,
    CHECKPOINT_PERIOD=30,
    EVAL_BATCH_SIZE=32,  # 48 examples: the second batch is filled up
    EVALUATOR_NUM_EXAMPLES=NUM_EXAMPLES,
  ),
  f'--gin.final_eval/data.DatasetConfig.num_examples={NUM_EXAMPLES}',
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


def tree_of(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def read_json(path):
  """Reads JSON; NaN and Infinity are none."""

  def refuse(constant):
    raise AssertionError(f'{path} holds {constant}')

  return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope='module')
def teacher(run_main, tmp_path_factory):
  folder = tmp_path_factory.mktemp('teacher')
  run = run_main(
    TEACHER, *SMALL, *gin_flags(MODEL_DIR=folder, EVAL_PERIOD=0, FINAL_EVAL=None)
  )
  assert run.code == 0, run.err
  return folder


@pytest.fixture(scope='module')
def command(teacher, tmp_path_factory):
  """On-policy distillation; the student starts from nothing."""
  folder = tmp_path_factory.mktemp('runs') / 'on_policy'
  return (
    '--run_mode=train',
    FORWARD_KL,
    *SMALL,
    *gin_flags(
      MODEL_DIR=folder,
      TEACHER_CHECKPOINT_PATH=teacher,
      INITIAL_CHECKPOINT_PATH=None,
    ),
  )


@pytest.fixture(scope='module')
def finished(command):
  """The run, in a process of its own."""
  return run_python('-m', 'gkd_jax.main', *command)


@pytest.fixture(scope='module')
def run_dir(finished, command):
  assert finished.returncode == 0, finished.stderr
  return next(
    conftest.pathlib.Path(flag.partition('=')[2])
    for flag in command
    if flag.startswith('--gin.MODEL_DIR=')
  )
