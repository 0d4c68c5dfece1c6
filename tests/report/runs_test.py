# SPDX-License-Identifier: Apache-2.0
import pathlib
import shutil

import pytest

from gkd_jax.report import runs
from tests import conftest, run_folders
from tests.run_folders import SFT, gkd

TEST = ('cmudict_g2p', 'test')


def only(found):
  (run,), left_out = found
  assert left_out == []
  return run


# --- Settings -----------------------------------------------------------------


def test_settings_are_those_that_gin_wrote(run_main):
  import gin

  shown = run_main(
    '--gin_file=configs/cmudict_g2p/on_policy_jsd_0.9.gin',
    f'--gin.MODEL_DIR=runs/{"long/" * 20}',
    '--gin.INITIAL_CHECKPOINT_PATH=None',
    '--gin.TEACHER_CHECKPOINT_PATH=it\'s "here"',
    '--dry_run',
  )
  assert shown.code == 0, shown.err

  settings = runs.read_settings(shown.out)

  gin.clear_config()
  gin.add_config_file_search_path(str(conftest.ROOT))
  gin.parse_config(shown.out)
  macros = [name for name in settings if runs.is_macro(name)]
  assert len(macros) > 20
  for name in macros:
    value = gin.query_parameter(f'{name}/macro.value')
    if isinstance(settings[name], str) and '@' in settings[name]:
      if not isinstance(value, str):  # gin wraps what is long
        assert ''.join(repr(value).split()) == ''.join(settings[name].split())
    elif not isinstance(value, gin.config.ConfigurableReference):
      assert settings[name] == value
  assert settings['MODEL_DIR'] == f'runs/{"long/" * 20}'  # on a line of its own
  assert settings['DIVERGENCE'] == '@divergences.generalized_jsd'
  assert settings['experiment.Schedule.seed'] == '%RANDOM_SEED'


def test_a_macro_may_stand_for_another():
  settings = runs.read_settings(
    run_folders.config(ALPHA=0.25, DIVERGENCE_WEIGHT='%ALPHA', OTHER='%GONE')
  )

  assert settings['DIVERGENCE_WEIGHT'] == 0.25
  assert settings['OTHER'] == '%GONE'


# --- Which runs there are -----------------------------------------------------


def test_a_glob_names_runs(tmp_path):
  for name in ('a', 'b', 'c'):
    run_folders.write(tmp_path / name, {'greedy/wer': 50.0})

  found, left_out = runs.find(f'{tmp_path}/[ab]')

  assert [run.folder.name for run in found] == ['a', 'b']
  assert left_out == []


def test_a_folder_stands_for_the_runs_below_it(tmp_path):
  run_folders.write(tmp_path / 'seed_0' / 'a', {'greedy/wer': 50.0})
  run_folders.write(tmp_path / 'seed_1' / 'a', {'greedy/wer': 50.0})

  found, _ = runs.find(str(tmp_path))

  assert [run.folder.parent.name for run in found] == ['seed_0', 'seed_1']


def test_several_globs_name_a_run_once(tmp_path):
  run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0})

  found, _ = runs.find((f'{tmp_path}/*', f'{tmp_path}/a'))

  assert len(found) == 1


def test_checkpoints_are_not_searched(tmp_path):
  run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0})
  shutil.copytree(tmp_path / 'a', tmp_path / 'a' / 'checkpoint_1000' / 'data')

  assert only(runs.find(str(tmp_path))).folder == tmp_path / 'a'


def test_what_was_measured_is_read(tmp_path):
  folder = run_folders.write(
    tmp_path / 'a',
    {'greedy/wer': 50.0, 'note': 'a text', 'sampled/wer': float('nan')},
    {500: 61.0, 1000: 52.0},
    samples=run_folders.samples(('x', [run_folders.token('y')])),
    RANDOM_SEED=7,
  )

  run = only(runs.find(str(folder)))

  assert run.seed == 7
  assert run.results == {
    TEST: {'step': 1000, 'train_seconds': 9.5, 'greedy/wer': 50.0}
  }
  assert [line['validation/greedy/wer'] for line in run.curve] == [61.0, 52.0]
  assert run.samples[TEST]['examples'][0]['input'] == 'x'


def test_without_a_final_evaluation_the_last_on_validation_counts(tmp_path):
  run_folders.write(tmp_path / 'a', None, {500: 61.0, 1000: 52.0})

  run = only(runs.find(str(tmp_path)))

  assert run.results == {
    ('cmudict_g2p', 'validation'): {'step': 1000, 'greedy/wer': 52.0}
  }


def test_a_run_that_is_not_done_is_left_out_with_the_reason(tmp_path):
  run_folders.write(tmp_path / 'done', {'greedy/wer': 50.0})
  run_folders.write(tmp_path / 'running', None, {500: 61.0})

  found, left_out = runs.find(str(tmp_path))

  assert [run.folder.name for run in found] == ['done']
  ((folder, why),) = left_out
  assert folder == tmp_path / 'running'
  assert 'evaluated last after step 500 of 1000' in why


def test_the_reward_is_that_of_the_last_tenth(tmp_path):
  lines = [
    {'step': 10 * i, 'train/reward': float(i), 'train/loss': 1.0}
    for i in range(1, 21)
  ]
  run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0}, lines=lines)

  run = only(runs.find(str(tmp_path)))

  assert run.results[TEST]['train/reward'] == 19.5  # of 19 and 20


def test_a_glob_that_matches_nothing_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='RUNS matches no run folder') as error:
    runs.find(f'{tmp_path}/nothing/*')

  assert f'{tmp_path}/nothing/*' in str(error.value)


def test_without_a_run_that_is_done_the_error_says_how_far_they_are(tmp_path):
  run_folders.write(tmp_path / 'running', None, {500: 61.0})

  with pytest.raises(ValueError, match='none of these runs is done') as error:
    runs.find(str(tmp_path))

  assert f'{tmp_path}/running: not done: evaluated last after' in str(
    error.value
  )


# --- Who began from whom ------------------------------------------------------


def began(tmp_path, **paths):
  """A run with a teacher; its folder, and its resolved settings."""
  folder = tmp_path / 'runs' / 'method'
  run_folders.write(folder, {'greedy/wer': 50.0}, **paths)
  return only(runs.find(str(folder)))


@pytest.mark.parametrize('step', ['', '/checkpoint_1000'])
def test_a_teacher_is_found_by_its_path_or_a_step_in_it(tmp_path, step):
  teacher = run_folders.write(tmp_path / 'teacher', {'greedy/wer': 30.0})

  run = began(tmp_path, TEACHER_CHECKPOINT_PATH=f'{teacher}{step}')

  assert run.teacher == teacher
  assert run.initial is None


def test_a_path_may_be_relative_to_where_the_run_was_started(tmp_path):
  teacher = run_folders.write(tmp_path / 'runs/teacher', {'greedy/wer': 30.0})

  run = began(
    tmp_path,
    MODEL_DIR='runs/method',
    TEACHER_CHECKPOINT_PATH='runs/teacher/',
    INITIAL_CHECKPOINT_PATH='runs/teacher/checkpoint_1000',
  )

  assert run.teacher == run.initial == teacher


def test_runs_that_were_moved_find_each_other(tmp_path):
  old = tmp_path / 'old'
  run_folders.write(old / 'teacher', {'greedy/wer': 30.0})
  run_folders.write(
    old / 'method',
    {'greedy/wer': 50.0},
    TEACHER_CHECKPOINT_PATH=old / 'teacher',
  )
  shutil.copytree(old, tmp_path / 'new')

  run = only(runs.find(f'{tmp_path}/new/method'))

  # Beside it, though the old one is still there.
  assert run.teacher == tmp_path / 'new' / 'teacher'


def test_a_model_that_is_not_there_keeps_its_name(tmp_path):
  run = began(tmp_path, TEACHER_CHECKPOINT_PATH='gone/models/flan-t5-xl')

  assert run.teacher == pathlib.Path('gone/models/flan-t5-xl')


def test_several_teachers_are_found_by_their_names(tmp_path):
  teacher = run_folders.write(tmp_path / 'runs/math', {'greedy/wer': 30.0})

  run = began(
    tmp_path,
    MODEL_DIR='runs/method',
    TEACHER_CHECKPOINT_PATH={'math': 'runs/math', 'code': 'gone/code'},
    **run_folders.gkd(1.0, 'reverse_kl'),
  )

  assert run.teacher is None
  assert run.teachers == {'code': pathlib.Path('gone/code'), 'math': teacher}
  assert runs.method(run) == 'on-policy GKD, reverse KL, teachers code, math'


# --- Evaluations apart from the run -------------------------------------------


def test_an_evaluation_in_a_runs_folder_adds_what_is_not_known(tmp_path):
  folder = run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0})
  run_folders.evaluation(
    folder / 'with_teacher',
    {
      'checkpoint': 'moved/a/checkpoint_1000',
      'teacher_checkpoint': '/models/teacher/checkpoint_7',
      'greedy/wer': 99.0,
      'on_student_outputs/reverse_kl': 0.25,
    },
    samples=run_folders.samples(('x', [run_folders.token('y')])),
  )

  run = only(runs.find(str(tmp_path)))

  assert run.results[TEST]['greedy/wer'] == 50.0
  assert run.results[TEST]['on_student_outputs/reverse_kl'] == 0.25
  assert run.samples[TEST]['examples'][0]['input'] == 'x'
  assert run.teacher == pathlib.Path('/models/teacher')


def test_an_evaluation_elsewhere_belongs_to_its_checkpoints_run(tmp_path):
  folder = run_folders.write(tmp_path / 'runs/a', {'greedy/wer': 50.0})
  run_folders.evaluation(
    tmp_path / 'evaluations/a',
    {
      'checkpoint': f'{folder}/checkpoint_1000',
      'task': 'mmlu',
      'greedy/accuracy': 35.0,
    },
  )

  run = only(runs.find((f'{tmp_path}/runs/*', f'{tmp_path}/evaluations/*')))

  assert run.results[TEST]['greedy/wer'] == 50.0
  assert run.results['mmlu', 'test'] == {'greedy/accuracy': 35.0}


def test_an_evaluation_of_a_model_that_is_no_run_is_one_of_its_own(tmp_path):
  run_folders.evaluation(
    tmp_path / 'xl',
    {'checkpoint': '/models/xl', 'task': 'gsm8k', 'greedy/accuracy': 27.9},
  )

  run = only(runs.find(str(tmp_path)))

  assert run.folder == pathlib.Path('/models/xl')
  assert run.settings == {}
  assert run.results == {('gsm8k', 'test'): {'greedy/accuracy': 27.9}}


def test_an_evaluation_in_the_middle_of_a_run_is_not_its_result(tmp_path):
  folder = run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0})
  run_folders.evaluation(
    folder / 'early',
    {'checkpoint': f'{folder}/checkpoint_500', 'sampled/wer': 70.0},
  )

  (run,), ((left_out, why),) = runs.find(str(tmp_path))

  assert 'sampled/wer' not in run.results[TEST]
  assert left_out == folder / 'early'
  assert 'checkpoint_500' in why


def test_an_evaluation_of_an_unknown_task_is_not_used(tmp_path):
  run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0})
  run_folders.evaluation(
    tmp_path / 'xl', {'checkpoint': '/models/xl', 'greedy/wer': 20.0}
  )

  found, ((left_out, why),) = runs.find(str(tmp_path))

  assert [run.folder.name for run in found] == ['a']
  assert left_out == tmp_path / 'xl'
  assert 'has no task' in why


# --- What is the same experiment ----------------------------------------------


def kinds(tmp_path, first, second):
  """The kinds of two runs that differ in some macros."""
  for name, macros in (('first', first), ('second', second)):
    run_folders.write(tmp_path / name, {'greedy/wer': 50.0}, **macros)
  found, _ = runs.find(str(tmp_path))
  return [runs.experiment_key(run) for run in found]


@pytest.mark.parametrize(
  'first, second',
  [
    ({'RANDOM_SEED': 0}, {'RANDOM_SEED': 1}),
    ({'EVAL_PERIOD': 10}, {'EVAL_PERIOD': 20}),
    ({'EVAL_BATCH_SIZE': 1}, {'EVAL_BATCH_SIZE': 4}),
    # Runs from before a setting was there, and after.
    ({}, {'TRAIN_NUM_EXAMPLES': None}),
    (
      {'RANDOM_SEED': 0, 'INITIAL_CHECKPOINT_PATH': 'gone/jsd_0.1/seed_0/a'},
      {'RANDOM_SEED': 1, 'INITIAL_CHECKPOINT_PATH': 'gone/jsd_0.1/seed_1/a'},
    ),
    # A number in a path is not always the seed.
    (
      {'RANDOM_SEED': 0, 'INITIAL_CHECKPOINT_PATH': 'models/t5_1_1_base'},
      {'RANDOM_SEED': 1, 'INITIAL_CHECKPOINT_PATH': 'models/t5_1_1_base'},
    ),
    (
      {'RANDOM_SEED': 0, 'TRAIN_ON_PREDICTIONS': 'runs/1/predictions.jsonl'},
      {'RANDOM_SEED': 1, 'TRAIN_ON_PREDICTIONS': 'runs/1/predictions.jsonl'},
    ),
  ],
)
def test_these_are_seeds_of_one_experiment(tmp_path, first, second):
  one, other = kinds(tmp_path, first, second)

  assert one == other


@pytest.mark.parametrize(
  'first, second',
  [
    ({'LEARNING_RATE': 0.01}, {'LEARNING_RATE': 0.03}),
    ({}, {'TRAIN_NUM_EXAMPLES': 100}),
    ({'BETA': 0.1}, {'BETA': 0.9}),
    (
      {'TEACHER_CHECKPOINT_PATH': 'gone/xl'},
      {'TEACHER_CHECKPOINT_PATH': 'gone/xxl'},
    ),
    (
      {'RANDOM_SEED': 1, 'INITIAL_CHECKPOINT_PATH': 'gone/jsd_0.1/seed_1'},
      {'RANDOM_SEED': 2, 'INITIAL_CHECKPOINT_PATH': 'gone/jsd_0.2/seed_2'},
    ),
  ],
)
def test_these_are_different_experiments(tmp_path, first, second):
  one, other = kinds(tmp_path, first, second)

  assert one != other


def test_students_of_equal_origin_are_of_one_experiment(tmp_path):
  for seed in (0, 1):
    run_folders.write(
      tmp_path / f'student_{"ab"[seed]}', {'greedy/wer': 60.0}, RANDOM_SEED=seed
    )
  one, other = kinds(
    tmp_path / 'methods',
    {'RANDOM_SEED': 0, 'INITIAL_CHECKPOINT_PATH': tmp_path / 'student_a'},
    {'RANDOM_SEED': 1, 'INITIAL_CHECKPOINT_PATH': tmp_path / 'student_b'},
  )

  assert one == other


def test_students_of_different_origin_are_not(tmp_path):
  for name, width in (('a', 16), ('b', 32)):
    run_folders.write(
      tmp_path / f'student_{name}', {'greedy/wer': 60.0}, EMB_DIM=width
    )
  one, other = kinds(
    tmp_path / 'methods',
    {'INITIAL_CHECKPOINT_PATH': tmp_path / 'student_a'},
    {'INITIAL_CHECKPOINT_PATH': tmp_path / 'student_b'},
  )

  assert one != other


# --- What methods are called --------------------------------------------------

RL = {
  **gkd(1.0, 'generalized_jsd', 0.9),
  'DIVERGENCE_WEIGHT': '%ALPHA',
  'REWARD_WEIGHT': '@objectives.reward_share()',
}


@pytest.mark.parametrize(
  'macros, name',
  [
    (SFT, 'SFT'),
    ({**SFT, 'TRAIN_ON_PREDICTIONS': 'outputs/train.jsonl'}, 'SeqKD'),
    ({**SFT, 'POLICY': '@policies.teacher()'}, 'SeqKD'),
    (gkd(0.0), 'supervised KD'),
    (gkd(0.0, 'reverse_kl'), 'supervised KD, reverse KL'),
    (
      gkd(0.0) | {'TRAIN_ON_PREDICTIONS': 'outputs/train.jsonl'},
      "supervised KD on the teacher's outputs",
    ),
    (gkd(0.5), 'ImitKD'),
    (
      gkd(0.5) | {'TRAIN_ON_PREDICTIONS': 'outputs/train.jsonl'},
      "ImitKD on the teacher's outputs",
    ),
    (
      gkd(1.0) | {'TRAIN_ON_PREDICTIONS': 'outputs/train.jsonl'},
      'on-policy GKD, forward KL',
    ),
    (gkd(0.5, 'total_variation'), 'f-distill'),
    (gkd(0.5, 'generalized_jsd', 0.1), 'GKD λ=0.5, JSD(0.1)'),
    (gkd(0.25), 'GKD λ=0.25, forward KL'),
    (gkd(1.0), 'on-policy GKD, forward KL'),
    (gkd(1.0, 'generalized_jsd', 0.9), 'on-policy GKD, JSD(0.9)'),
    (gkd(1.0, 'total_variation'), 'on-policy GKD, total variation'),
    (gkd(1.0, 'my_own'), 'on-policy GKD, my own'),
    (gkd(1.0) | {'POLICY': '@policies.student()'}, 'on-policy GKD, forward KL'),
    (
      gkd(0.0) | {'LIKELIHOOD_WEIGHT': 0.5},
      'supervised KD + 0.5 likelihood',
    ),
    (RL | {'ALPHA': 0.25}, 'RL+GKD α=0.25, JSD(0.9)'),
    (RL | {'ALPHA': 0.0}, 'RL'),
    (
      gkd(1.0, 'reverse_kl') | {'REWARD_WEIGHT': 3.0},
      'RL+GKD α=0.25, reverse KL',
    ),
    (gkd(1.0) | {'REWARD_WEIGHT': 0.0}, 'on-policy GKD, forward KL'),
    (gkd('@optax.linear_schedule()'), 'GKD λ(step), forward KL'),
    (gkd(0.5) | {'POLICY': '@policies.replay()'}, 'DistiLLM, forward KL'),
    (gkd(0.5) | {'POLICY': '@policies.interleaved()'}, 'SKD, forward KL'),
    (
      gkd(1.0) | {'methods.Method.credit': '@credit.minillm_long_term()'},
      'MiniLLM',
    ),
  ],
)
def test_a_method_has_its_name_from_its_settings(tmp_path, macros, name):
  run_folders.write(
    tmp_path / 'a',
    {'greedy/wer': 50.0},
    TEACHER_CHECKPOINT_PATH='teacher',
    INITIAL_CHECKPOINT_PATH='student',
    **macros,
  )

  assert runs.method(only(runs.find(str(tmp_path)))) == name


def test_held_close_to_its_own_beginning_it_is_rlef(tmp_path):
  run_folders.write(
    tmp_path / 'a',
    {'greedy/wer': 50.0},
    INITIAL_CHECKPOINT_PATH='student',
    TEACHER_CHECKPOINT_PATH='%INITIAL_CHECKPOINT_PATH',
    **(RL | {'ALPHA': 0.25}),
  )

  run = only(runs.find(str(tmp_path)))

  assert runs.method(run) == 'RLEF* α=0.25, JSD(0.9)'
