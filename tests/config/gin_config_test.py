# SPDX-License-Identifier: Apache-2.0
"""Parsing of gin files and flags, and its errors."""

import pytest

from gkd_jax.models import registry
from tests.conftest import gin_flags

SFT = '--gin_file=configs/cmudict_g2p/sft.gin'
METHODS = '--gin_file=configs/sweeps/xsum/methods.gin'
STUDENT = '--gin_file=configs/cmudict_g2p/student.gin'
FORWARD_KL = '--gin_file=configs/cmudict_g2p/on_policy_forward_kl.gin'
JSD = '--gin_file=configs/cmudict_g2p/on_policy_jsd_0.9.gin'
OPTIMIZER = '--gin.experiment.Optimization.optimizer'


NO_FILES = gin_flags(INITIAL_CHECKPOINT_PATH=None, TEACHER_CHECKPOINT_PATH='x')


@pytest.mark.parametrize(
  'value, want',
  [
    ('/tmp/runs/a b', "'/tmp/runs/a b'"),
    ('gs://bucket/me@home/run-1', "'gs://bucket/me@home/run-1'"),
    ('100%done', "'100%done'"),
    ("'quoted'", "'quoted'"),
    ('run=3', "'run=3'"),
  ],
)
def test_a_path_needs_no_quotes(run_main, value, want):
  shown = run_main(STUDENT, f'--gin.MODEL_DIR={value}', '--dry_run')

  assert shown.code == 0, shown.err
  assert f'MODEL_DIR = {want}\n' in shown.out


@pytest.mark.parametrize(
  'binding, want',
  [
    ('TRAIN_STEPS=1_000', 'TRAIN_STEPS = 1000'),
    ('LEARNING_RATE=1e-3', 'LEARNING_RATE = 0.001'),
    ('BEST_METRIC=None', 'BEST_METRIC = None'),
    (
      "TASK_FEATURE_LENGTHS={'inputs': 9, 'targets': 8}",
      "TASK_FEATURE_LENGTHS = {'inputs': 9, 'targets': 8}",
    ),
    ('POLICY=@policies.dataset()', 'POLICY = @policies.dataset()'),
    ('LEARNING_RATE=%WARMUP_STEPS', 'LEARNING_RATE = %WARMUP_STEPS'),
  ],
)
def test_numbers_and_references_are_no_strings(run_main, binding, want):
  shown = run_main(
    STUDENT, '--gin.MODEL_DIR=x', f'--gin.{binding}', '--dry_run'
  )

  assert shown.code == 0, shown.err
  assert f'\n{want}\n' in shown.out


def test_a_list_may_hold_references(run_main, tmp_path):
  shown = run_main(
    FORWARD_KL,
    *NO_FILES,
    '--gin.MODEL_DIR=x',
    '--gin.experiment.EvaluationPlan.decodings='
    "{'best': @greedy/sampler.SamplerConfig()}",
    '--dry_run',
  )

  assert "{'best': @greedy/sampler.SamplerConfig()}" in shown.out


def test_a_flag_may_name_what_no_file_of_the_experiment_names(run_main):
  shown = run_main(
    STUDENT, '--gin.MODEL_DIR=x', f'{OPTIMIZER}=@optax.lion', '--dry_run'
  )

  assert shown.code == 0, shown.err
  assert 'experiment.Optimization.optimizer = @optax.lion\n' in shown.out


def test_a_later_flag_replaces_an_earlier_one_which_is_printed(run_main):
  shown = run_main(
    STUDENT,
    *gin_flags(MODEL_DIR='x'),
    *gin_flags(MODEL_DIR='y'),
    '--dry_run',
  )

  assert "MODEL_DIR = 'y'\n" in shown.out
  assert "--gin.MODEL_DIR='y' replaces --gin.MODEL_DIR='x'.\n" in shown.err


@pytest.mark.parametrize(
  'flags, message',
  [
    (
      ('RANDOM_SEED=1', 'experiment.Schedule.seed=2'),
      '--gin.RANDOM_SEED=1 and --gin.experiment.Schedule.seed=2 set the same',
    ),
    (
      ('train/datasets.DatasetConfig.batch_size=4', 'BATCH_SIZE=8'),
      '--gin.BATCH_SIZE=8 and --gin.train/datasets.DatasetConfig.batch_size=4',
    ),
  ],
)
def test_a_parameter_and_its_macro_cannot_both_be_set(refused, flags, message):
  flags = [f'--gin.{flag}' for flag in flags]

  assert message in refused(STUDENT, '--gin.MODEL_DIR=x', *flags, '--dry_run')


@pytest.mark.parametrize(
  'flags',
  [
    # The default of the first is the second.
    ('CHECKPOINT_PERIOD=5', 'EVAL_PERIOD=7'),
    ('EVAL_BATCH_SIZE=4', 'eval/datasets.DatasetConfig.batch_size=8'),
  ],
)
def test_a_setting_and_its_default_can_both_be_set(run_main, flags):
  flags = [f'--gin.{flag}' for flag in flags]

  shown = run_main(STUDENT, '--gin.MODEL_DIR=x', *flags, '--dry_run')

  assert shown.code == 0, shown.err


def test_a_later_file_wins(run_main, tmp_path):
  (tmp_path / 'mine.gin').write_text('TRAIN_STEPS = 5\n')

  shown = run_main(
    STUDENT, f'--gin_file={tmp_path}/mine.gin', '--gin.MODEL_DIR=x', '--dry_run'
  )

  assert 'TRAIN_STEPS = 5\n' in shown.out


def test_gin_search_paths_say_where_files_and_what_they_include_are(
  run_main, tmp_path
):
  (tmp_path / 'sizes').mkdir()
  (tmp_path / 'sizes' / 'huge.gin').write_text('EMB_DIM = 4321\n')
  (tmp_path / 'mine.gin').write_text(
    "include 'configs/cmudict_g2p/student.gin'\ninclude 'sizes/huge.gin'\n"
  )

  shown = run_main(
    '--gin_file=mine.gin',
    f'--gin_search_paths={tmp_path}',
    '--gin.MODEL_DIR=x',
    '--dry_run',
  )

  assert shown.code == 0, shown.err
  assert 'EMB_DIM = 4321\n' in shown.out


@pytest.mark.parametrize('file', ['cmudict_g2p/student', 'smoke'])
def test_the_experiments_are_found_from_anywhere(
  run_main, tmp_path, monkeypatch, file
):
  monkeypatch.chdir(tmp_path)

  shown = run_main(
    f'--gin_file=configs/{file}.gin', '--gin.MODEL_DIR=x', '--dry_run'
  )

  assert shown.code == 0, shown.err


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
    ([METHODS, '--gin_file=gin/grids/field_methods.gin'], 'BEFORE = '),
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


# --- What is refused --------------------------------------------------------


@pytest.mark.parametrize(
  'arguments, nearest',
  [
    (['--gin.TRAIN_STPES=3'], 'TRAIN_STEPS'),
    (['--gin.train_steps=3'], 'TRAIN_STEPS'),
    (['--gin.t5.T5Config.emb_dmi=3'], 'emb_dim'),
    (['--gin.optax.adafactor.min_dim_size=3'], 'min_dim_size_to_factor'),
    (['--gin.experiment.Schedule.sede=3'], 'seed'),
    (['--gin.t5.T5Confg.emb_dim=3'], 'T5Config'),
    (['--gin.t5x.T5Config.emb_dim=3'], 't5'),
    (['--gin.POLICY=@policies.datset()'], 'dataset'),
    ([f'{OPTIMIZER}=@optax.adafactr'], 'adafactor'),
    ([f'{OPTIMIZER}=@optx.adafactor'], 'optax'),
    (['--gin.LEARNING_RATE=%WARMUP_STEP'], 'WARMUP_STEPS'),
    (['--gin.EPOCHS=3'], 'TRAIN_STEPS'),
    (['--gin.seed=3'], 'RANDOM_SEED'),
    (['--gin.LOG_PERIOD=3'], 'experiment.Schedule.log_period'),
    (['--gin.LOGGING_STEPS=3'], 'experiment.Schedule.log_period'),
    (['--gin.TEACHER_DTYPE=bfloat16'], 'experiment.Teacher.dtype'),
    (['--gin.NUM_DATA_SHARDS=2'], 'experiment.Data.num_shards'),
    (['--gin.SAVE_TOTAL_LIMIT=3'], 'experiment.Keep.last'),
    (['--gin.POLICY=@dataset()'], '@policies.dataset'),
    (['--gin.POLICY=@datset()'], '@policies.dataset'),
    (['--run_mode=trian'], 'train'),
  ],
)
def test_a_misspelt_name_is_refused_with_the_nearest_right_one(
  refused, arguments, nearest
):
  message = refused(STUDENT, *arguments)

  assert message.endswith(f' Did you mean {nearest}?\n')


def test_a_parameter_that_no_file_sets_is_found_by_its_name(refused):
  message = refused(
    *(f'--gin_file=gin/{name}.gin' for name in _NO_BEST_METRIC),
    '--gin.MODEL_DIR=x',
    "--gin.JSON_LINES_FILES={'train': 'x'}",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 9, 'targets': 9}",
    *('--gin.TRAIN_STEPS=2', '--gin.LEARNING_RATE=1', '--gin.BATCH_SIZE=4'),
    *('--gin.EVAL=None', '--gin.BEST_METRIC=greedy/wer'),
  )

  assert message.endswith(' Did you mean experiment.Keep.best_metric?\n')


_NO_BEST_METRIC = (
  *('runs/train', 'models/t5', 'methods/sft'),
  *('vocabularies/bytes', 'tasks/json_lines'),
)


def test_a_misspelt_file_is_refused_with_the_nearest_right_one(refused):
  message = refused('--gin_file=configs/cmudict_g2p/studnt.gin')

  assert message.startswith(
    'Error: --gin_file=configs/cmudict_g2p/studnt.gin does not exist'
  )
  assert message.endswith(' Did you mean configs/cmudict_g2p/student.gin?\n')


def test_a_misspelt_macro_in_a_file_is_refused(refused, tmp_path):
  (tmp_path / 'mine.gin').write_text(
    "include 'configs/cmudict_g2p/student.gin'\nTRAIN_STPES = 3\n"
  )

  message = refused(f'--gin_file={tmp_path}/mine.gin')

  assert message.startswith('Error: TRAIN_STPES has no effect')


def test_a_misspelt_name_in_a_file_is_refused(refused, tmp_path):
  (tmp_path / 'mine.gin').write_text(
    'from __gin__ import dynamic_registration\n'
    'from gkd_jax.distill import policies\n'
    "include 'configs/cmudict_g2p/student.gin'\n"
    'POLICY = @policies.datset()\n'
  )

  message = refused(f'--gin_file={tmp_path}/mine.gin')

  assert message == (
    'Error: policies.datset does not exist. Did you mean dataset?\n'
  )


def test_a_file_that_is_cut_off_is_refused(refused, tmp_path):
  (tmp_path / 'mine.gin').write_text('METRICS = (1,\n')

  assert 'EOF in multi-line' in refused(f'--gin_file={tmp_path}/mine.gin')


def test_a_file_that_is_no_text_is_refused(refused, tmp_path):
  (tmp_path / 'mine.gin').write_bytes(b'TRAIN_STEPS = \xff\x00')

  message = refused(f'--gin_file={tmp_path}/mine.gin')

  assert f'The gin file {tmp_path}/mine.gin cannot be read: ' in message


def test_a_line_that_gin_cannot_read_is_refused_with_its_number(
  refused, tmp_path
):
  (tmp_path / 'mine.gin').write_text('METRICS = (1)\nSEEDS 3\n')

  message = refused(f'--gin_file={tmp_path}/mine.gin')

  assert 'mine.gin' in message and 'line 2' in message


def test_a_missing_include_is_refused(refused, tmp_path):
  (tmp_path / 'mine.gin').write_text("include 'gin/methods/stf.gin'\n")

  assert 'gin/methods/stf.gin' in refused(f'--gin_file={tmp_path}/mine.gin')


def test_a_required_setting_that_is_missing_is_refused_by_name(run_main):
  finished = run_main(STUDENT)

  assert finished.code == 1
  assert (
    finished.err == 'Error: MODEL_DIR must be set: --gin.MODEL_DIR=VALUE.\n'
  )


def test_what_the_paper_calls_a_setting_leads_to_our_name(refused):
  message = refused(FORWARD_KL, *NO_FILES, '--gin.LAMBDA=1')

  assert 'Did you mean STUDENT_DATA_FRACTION?' in message


def test_a_name_that_is_like_no_other_leads_to_the_list(refused):
  message = refused(STUDENT, '--gin.GRADIENT_ACCUMULATION=3')

  assert 'Did you mean' not in message
  assert 'Valid names: ACTIVATION_DTYPE, ' in message


def test_of_a_module_only_what_it_offers_is_suggested(refused):
  message = refused(JSD, *NO_FILES, '--gin.DIVERGENCE=@divergences.jsd')

  *_, offered = message.strip().rstrip('.').split('Valid names: ')
  assert {'forward_kl', 'generalized_jsd'} < {*offered.split(', ')}
  assert 'partial' not in offered and 'jnp' not in offered


def test_what_a_library_refuses_while_the_parts_are_built_is_an_error_too(
  refused,
):
  message = refused(
    STUDENT,
    *gin_flags(TRAIN_STEPS=1, LEARNING_RATE=None),
    '--gin.experiment.Optimization.schedule=@optax.cosine_decay_schedule()',
    '--gin.optax.cosine_decay_schedule.init_value=1.0',
    '--gin.optax.cosine_decay_schedule.decay_steps=%EVAL_PERIOD',
    '--gin.EVAL_PERIOD=0',
  )

  assert 'requires positive decay_steps' in message
  assert 'cosine_decay_schedule gets ' in message
  assert 'EVAL_PERIOD = 0' in message
  assert message.count('\n') == 1


@pytest.mark.parametrize(
  'settings, error',
  [
    # POLICY = @policies.mixture(): gin lists what it read as POLICY/...
    ({'policies.mixture.otherwise': '@policies.teacher'}, None),
    (
      {
        'policies.mixture.otherwise': '@policies.teacher',
        'POLICY/policies.mixture.otherwise': '@policies.dataset',
      },
      'policies.mixture.otherwise has no effect',
    ),
    (
      {'policies.replay.capacity': 2000},
      'policies.replay.capacity has no effect',
    ),
  ],
)
def test_a_flag_may_set_what_a_macro_makes(
  run_main, monkeypatch, settings, error
):
  said = []

  def train(experiment, run):
    try:
      assert run.config_text()
    except ValueError as e:
      said.append(str(e))

  monkeypatch.setattr('gkd_jax.train.train', train)

  finished = run_main(
    '--gin_file=configs/cmudict_g2p/gkd.gin',
    *gin_flags(MODEL_DIR='x', STUDENT_DATA_FRACTION=0.5, **settings),
    *NO_FILES,
  )

  assert finished.code == 0, finished.err
  if error is None:
    assert said == []
  else:
    assert said[0].startswith(error)


@pytest.mark.parametrize(
  'flags, described',
  [
    (
      ('gin/models/t5gemma.gin', {'VERSION': 1, 'EMB_DIM': 24}),
      'T5Gemma 1 of width 24 with 1 + 1 layers',
    ),
    # The vocabulary is that of the size, not of T5.
    (('gin/models/published.gin', {'SIZE': 'mt5_base'}), 'mt5_base'),
    (
      ('gin/models/published.gin', {'SIZE': 't5gemma_2_1b_1b'}),
      't5gemma_2_1b_1b',
    ),
  ],
)
def test_a_fragment_replaces_the_model_of_a_config(
  run_main, monkeypatch, flags, described
):
  found = []

  def train(experiment, run):
    assert run.config_text()
    found.append(registry.describe(experiment.student.config))

  monkeypatch.setattr('gkd_jax.train.train', train)
  fragment, settings = flags

  finished = run_main(
    '--gin_file=configs/xsum/gkd.gin',
    f'--gin_file={fragment}',
    *gin_flags(MODEL_DIR='x', **settings),
    *NO_FILES,
  )

  assert finished.code == 0, finished.err
  assert found == [described]
