# SPDX-License-Identifier: Apache-2.0
"""Fragments that no config includes still work behind one."""

import pytest

SFT = '--gin_file=configs/cmudict_g2p/sft.gin'
METHODS = '--gin_file=configs/sweeps/xsum/methods.gin'


@pytest.mark.parametrize(
  ('arguments', 'line'),
  [
    (
      [SFT, '--gin_file=gin/optimizers/adamw.gin', '--gin.WEIGHT_DECAY=0.1'],
      'experiment.Optimization.optimizer = @optax.adamw',
    ),
    (
      [SFT, '--gin_file=gin/methods/seqkd.gin', '--gin.TRAIN_ON_PREDICTIONS=x'],
      'train/datasets.DatasetConfig.predictions = %TRAIN_ON_PREDICTIONS',
    ),
    (
      [
        '--gin_file=configs/arithmetic_cot/rl_gkd.gin',
        '--gin_file=gin/methods/rlef.gin',
      ],
      'TEACHER_CHECKPOINT_PATH = %INITIAL_CHECKPOINT_PATH',
    ),
    (
      ['--gin_file=configs/xsum/gkd.gin', '--gin_file=gin/methods/imitkd.gin'],
      'STUDENT_DATA_FRACTION = 0.5',
    ),
    ([METHODS, '--gin_file=gin/grids/lambda.gin'], 'BEFORE = '),
    ([METHODS, '--gin_file=gin/grids/lambda_by_divergence.gin'], 'BEFORE = '),
    ([METHODS, '--gin_file=gin/grids/student_size.gin'], 'BEFORE = '),
  ],
)
def test_a_fragment_behind_a_config_replaces_a_part(run_main, arguments, line):
  paths = ['MODEL_DIR', 'INITIAL_CHECKPOINT_PATH', 'TEACHER_CHECKPOINT_PATH']
  if METHODS in arguments:
    paths = ['MODEL_DIR', 'VOCABULARY_PATH']
  if '--gin_file=gin/methods/rlef.gin' in arguments:
    paths.remove('TEACHER_CHECKPOINT_PATH')

  shown = run_main(*arguments, *(f'--gin.{p}=x' for p in paths), '--dry_run')

  assert shown.code == 0, shown.err
  assert f'\n{line}' in shown.out
