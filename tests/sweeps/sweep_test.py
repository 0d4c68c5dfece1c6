# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from gkd_jax.sweeps import jobs, sweep
from tests import conftest

GKD = 'configs/cmudict_g2p/gkd.gin'
SFT = 'configs/cmudict_g2p/sft.gin'
IMITKD = 'configs/cmudict_g2p/imitkd.gin'
TEACHER = 'configs/cmudict_g2p/teacher.gin'
STUDENT = 'configs/cmudict_g2p/student.gin'
OUTPUTS = 'configs/cmudict_g2p/teacher_outputs.gin'
LAMBDA = {'STUDENT_DATA_FRACTION': (0.0, 0.5)}


def make_jobs(folder, grid, experiment=GKD, seeds=(0,), settings=(), before=()):
  return sweep.make_jobs(
    folder, grid, experiment, seeds, dict(settings), dict(before)
  )


def names(made):
  return [job.name for job in made]


def flags_of(job):
  """{flag: value, or values}, without where the run lies."""
  flags = {}
  for argument in job.arguments:
    name, value = re.sub('^--(gin[.])?', '', argument).split('=', 1)
    flags[name] = f'{flags[name]}, {value}' if name in flags else value
  return flags


# --- Which runs there are -----------------------------------------------------


def test_every_point_of_the_grid_is_run_with_every_seed(tmp_path):
  grid = {
    **LAMBDA,
    'divergence': {
      'jsd_0.9': {
        'DIVERGENCE': '@divergences.generalized_jsd',
        'BETA': 0.9,
      },
      'reverse_kl': {'DIVERGENCE': '@divergences.reverse_kl'},
    },
  }

  made = make_jobs(tmp_path, grid, seeds=(1, 2))

  assert names(made) == [
    f'student_data_fraction={fraction},divergence={divergence}/seed_{seed}'
    for fraction in (0.0, 0.5)
    for divergence in ('jsd_0.9', 'reverse_kl')
    for seed in (1, 2)
  ]
  folder = tmp_path / 'student_data_fraction=0.5,divergence=jsd_0.9' / 'seed_2'
  assert made[5].result == folder / 'eval_test.json'
  assert flags_of(made[5]) == {
    'run_mode': 'train',
    'gin_file': GKD,
    'MODEL_DIR': str(folder),
    'STUDENT_DATA_FRACTION': '0.5',
    'DIVERGENCE': '@divergences.generalized_jsd',
    'BETA': '0.9',
    'RANDOM_SEED': '2',
  }
  assert 'BETA' not in flags_of(made[-1])


def test_a_point_may_have_a_gin_file_of_its_own(tmp_path):
  grid = {'method': {'sft': SFT, 'imitkd': {'gin_file': IMITKD, 'BETA': 3}}}

  sft, imitkd = make_jobs(tmp_path, grid, experiment=None)

  assert sft.name == 'method=sft/seed_0'
  assert flags_of(sft)['gin_file'] == SFT
  assert flags_of(imitkd)['gin_file'] == IMITKD
  assert flags_of(imitkd)['BETA'] == '3'


def test_files_of_points_come_after_the_experiments(tmp_path):
  grid = {'task': {'b': {'gin_file': ('gin/tasks/cmudict_g2p.gin', SFT)}}}

  (job,) = make_jobs(tmp_path, grid)

  files = flags_of(job)['gin_file']
  assert files == f'{GKD}, gin/tasks/cmudict_g2p.gin, {SFT}'


def test_some_points_may_replace_what_is_set_for_all(tmp_path):
  grid = {'a': {'x': {'BETA': 0.5}, 'y': {}}}

  x, y = make_jobs(tmp_path, grid, settings={'BETA': 0.1})

  assert (flags_of(x)['BETA'], flags_of(y)['BETA']) == ('0.5', '0.1')


def test_what_is_set_for_all_is_set_beside_what_a_point_sets(tmp_path):
  for job in make_jobs(tmp_path, LAMBDA, settings={'TRAIN_STEPS': 7}):
    flags = flags_of(job)
    assert flags['STUDENT_DATA_FRACTION'] in ('0.0', '0.5')
    assert flags['TRAIN_STEPS'] == '7'


@pytest.mark.parametrize(
  ['mode', 'folder_is', 'result'],
  [
    ('eval', 'EVAL_OUTPUT_DIR', 'eval_test.json'),
    ('infer', 'INFER_OUTPUT_DIR', 'predictions_train.jsonl'),
  ],
)
def test_a_run_may_be_of_another_mode(tmp_path, mode, folder_is, result):
  experiment = {'gin_file': OUTPUTS, 'run_mode': mode}

  job, _ = make_jobs(tmp_path, {'TEMPERATURE': (0.5, 1.0)}, experiment)

  assert flags_of(job)['run_mode'] == mode
  folder = tmp_path / 'temperature=0.5' / 'seed_0'
  assert flags_of(job)[folder_is] == str(folder)
  assert job.result == folder / result


def test_a_run_may_leave_another_result(tmp_path):
  experiment = {'gin_file': GKD, 'result': 'eval_validation.json'}

  job, _ = make_jobs(tmp_path, LAMBDA, experiment)

  assert job.result.name == 'eval_validation.json'
  assert 'result' not in flags_of(job)


# --- Seeds --------------------------------------------------------------------

A_SEED = {'RANDOM_SEED': 7}


@pytest.mark.parametrize(
  'changes, folders',
  [
    ({'grid': {'RANDOM_SEED': (1, 2)}}, ['seed_1', 'seed_2']),
    (
      {'grid': {'RANDOM_SEED': (1, 2), 'BETA': (0.5,)}},
      ['beta=0.5/seed_1', 'beta=0.5/seed_2'],
    ),
    ({'settings': A_SEED, 'grid': {'BETA': (0.5,)}}, ['beta=0.5/seed_7']),
    (
      {'experiment': {'gin_file': GKD, **A_SEED}, 'grid': {'BETA': (0.5,)}},
      ['beta=0.5/seed_7'],
    ),
    ({'grid': {'a': {'x': A_SEED, 'y': {'RANDOM_SEED': 8}}}}, ['a=x', 'a=y']),
  ],
)
def test_seeds_may_be_given_as_any_setting_is(tmp_path, changes, folders):
  made = make_jobs(tmp_path, **changes)

  assert names(made) == folders
  seeds = ['7', '8'] if folders == ['a=x', 'a=y'] else [f[-1] for f in folders]
  assert [flags_of(job)['RANDOM_SEED'] for job in made] == seeds


def test_a_run_before_has_the_seeds_of_the_grid(tmp_path):
  made = make_jobs(tmp_path, {'RANDOM_SEED': (3, 4)}, before=BEFORE)

  by_name = {job.name: flags_of(job) for job in made}
  assert by_name['initial_student/seed_4']['RANDOM_SEED'] == '4'
  assert 'RANDOM_SEED' not in by_name['teacher']


# --- What comes before --------------------------------------------------------

BEFORE = {
  'teacher': TEACHER,
  'initial_student': {'gin_file': STUDENT, 'for_each': ('seed',)},
  'outputs': {
    'gin_file': OUTPUTS,
    'run_mode': 'infer',
    'CHECKPOINT_PATH': '{teacher}',
  },
}
SETTINGS = {
  'TEACHER_CHECKPOINT_PATH': '{teacher}',
  'INITIAL_CHECKPOINT_PATH': '{initial_student}',
  'TRAIN_ON_PREDICTIONS': '{outputs}/predictions_train.jsonl',
}


def test_runs_get_the_folders_of_what_came_before(tmp_path):
  made = make_jobs(
    tmp_path, LAMBDA, seeds=(3, 4), settings=SETTINGS, before=BEFORE
  )

  by_name = {job.name: job for job in made}
  assert list(by_name)[:4] == [
    'teacher',
    'initial_student/seed_3',
    'initial_student/seed_4',
    'outputs',
  ]
  job = by_name['student_data_fraction=0.5/seed_4']
  flags = flags_of(job)
  assert flags['TEACHER_CHECKPOINT_PATH'] == f'{tmp_path}/teacher'
  path = f'{tmp_path}/initial_student/seed_4'
  assert flags['INITIAL_CHECKPOINT_PATH'] == path
  path = f'{tmp_path}/outputs/predictions_train.jsonl'
  assert flags['TRAIN_ON_PREDICTIONS'] == path
  assert set(job.needs) == {'teacher', 'initial_student/seed_4', 'outputs'}
  assert by_name['outputs'].needs == ('teacher',)
  assert str(by_name['outputs'].result) == path
  assert by_name['teacher'].needs == ()


def test_folders_may_stand_within_a_setting(tmp_path):
  paths = {
    'TEACHER_CHECKPOINT_PATH': {'a': '{teacher}', 'b': ['x', '{teacher}']}
  }

  (job,) = make_jobs(
    tmp_path,
    {'method': {'m': paths}},
    before={'teacher': BEFORE['teacher']},
  )[1:]

  folder = f'{tmp_path}/teacher'
  assert flags_of(job)['TEACHER_CHECKPOINT_PATH'] == str(
    {'a': folder, 'b': ['x', folder]}
  )
  assert job.needs == ('teacher',)


def test_a_template_keeps_its_braces(tmp_path):
  point = {'TEACHER_INPUTS': '{{inputs}} = {{targets}}'}

  (job,) = make_jobs(tmp_path, {'inputs': {'both': point}})

  assert flags_of(job)['TEACHER_INPUTS'] == '{inputs} = {targets}'


def test_a_run_before_has_a_seed_if_there_is_one_for_each(tmp_path):
  made = make_jobs(tmp_path, LAMBDA, seeds=(3, 4), before=BEFORE)

  by_name = {job.name: flags_of(job) for job in made}
  assert by_name['initial_student/seed_4']['RANDOM_SEED'] == '4'
  assert 'RANDOM_SEED' not in by_name['teacher']


def test_a_run_before_can_be_of_each_point_of_an_axis(tmp_path):
  grid = {'size': {'s': {'EMB_DIM': 8}, 'l': {'EMB_DIM': 64}}, **LAMBDA}
  before = {'student': {'gin_file': STUDENT, 'for_each': ('size', 'seed')}}

  settings = {'INITIAL_CHECKPOINT_PATH': '{student}'}

  made = make_jobs(tmp_path, grid, settings=settings, before=before)

  assert names(made)[:2] == ['student/size=s/seed_0', 'student/size=l/seed_0']
  assert flags_of(made[1])['EMB_DIM'] == '64'
  assert 'STUDENT_DATA_FRACTION' not in flags_of(made[1])
  assert made[-1].name == 'size=l,student_data_fraction=0.5/seed_0'
  assert made[-1].needs == ('student/size=l/seed_0',)


def test_what_is_there_already_is_not_run(tmp_path):
  (tmp_path / 'teacher').mkdir()
  for seed in (3, 4):
    (tmp_path / f'students/seed_{seed}').mkdir(parents=True)
  before = BEFORE | {
    'teacher': f'{tmp_path}/teacher',
    'initial_student': f'{tmp_path}/students/seed_{{seed}}',
  }

  made = make_jobs(
    tmp_path / 'out', LAMBDA, seeds=(3, 4), settings=SETTINGS, before=before
  )

  assert names(made)[0] == 'outputs' and len(made) == 5
  flags = flags_of(made[-1])
  assert flags['TEACHER_CHECKPOINT_PATH'] == f'{tmp_path}/teacher'
  assert flags['INITIAL_CHECKPOINT_PATH'] == f'{tmp_path}/students/seed_4'
  assert made[-1].needs == ('outputs',)
  assert made[0].needs == ()


def test_labels_can_be_parts_of_settings(tmp_path):
  grid = {'method': {'sft': SFT, 'imitkd': IMITKD}}
  settings = {'CHECKPOINT_PATH': 'runs/{method}/seed_{seed}/checkpoint_7'}

  job, _ = make_jobs(tmp_path, grid, None, settings=settings)

  path = 'runs/sft/seed_0/checkpoint_7'
  assert flags_of(job)['CHECKPOINT_PATH'] == path


# --- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ['changes', 'said'],
  [
    ({'grid': {}}, 'GRID is empty'),
    ({'grid': {'LAMBDA': ()}}, "GRID 'LAMBDA' is empty"),
    ({'grid': {'method': {}}}, "GRID 'method' is empty"),
    ({'seeds': ()}, 'SEEDS is empty'),
    ({'seeds': (1, 1)}, 'SEEDS has 1 twice'),
    ({'seeds': 1}, 'SEEDS must be a tuple'),
    ({'grid': {'BETA': (0.1, 0.1)}}, "GRID 'BETA' has 0.1 twice"),
    ({'grid': {'BETA': (1, 1.0)}}, "GRID 'BETA' has 1.0 twice"),
    ({'seeds': (0, -1)}, 'SEEDS: a seed must not be negative, got -1'),
    ({'grid': {'BETA': 0.1}}, "GRID 'BETA' must be a tuple of values or"),
    ({'grid': {'BETA': 'abc'}}, "GRID 'BETA' must be a tuple of values or"),
    (
      {'grid': {'BETA': (1,), 'beta': (2,)}},
      "'beta': this name is already taken",
    ),
    ({'grid': {'seed': (1,)}}, "GRID 'seed': this name is already taken"),
    ({'grid': {'a/b.c': (1,)}}, "GRID 'a/b.c': a name may only have letters"),
    (
      {'grid': {'DIVERGENCE': ('@divergences.forward_kl',)}},
      "'@divergences.forward_kl' cannot be part of a folder name",
    ),
    ({'grid': {'d': {'a,b=c': {}}}}, "'a,b=c' cannot be part of a folder name"),
    ({'grid': {'d': {'a': 3}}}, "GRID 'd' must be a gin file or"),
    (
      {'grid': {'d': {'a': {'ginfile': SFT}}}},
      "GRID 'd': 'ginfile' is no macro .* none of gin_file, run_mode, result",
    ),
    (
      {'settings': {'MODEL_DIR': 'x'}},
      'seed_0: MODEL_DIR must not be set; the sweep sets it',
    ),
    (
      {'grid': {'a': {'x': {'BETA': 1}}, 'BETA': (2,)}},
      "a=x,beta=2/seed_0: GRID 'a' and GRID 'BETA' both give BETA, 1 and 2",
    ),
    ({'settings': {'STUDENT_DATA_FRACTION': 1}}, "SETTINGS and GRID 'STUDENT_"),
    (
      {'experiment': {'gin_file': GKD, 'X': 1}, 'settings': {'X': 2}},
      'EXPERIMENT and SETTINGS both give X',
    ),
    (
      {
        'experiment': {'gin_file': GKD, 'run_mode': 'eval'},
        'grid': {'a': {'x': {'run_mode': 'infer'}}},
      },
      "EXPERIMENT and GRID 'a' both give run_mode",
    ),
    (
      {'before': {'a': {'gin_file': SFT, 'for_each': 'seed', **A_SEED}}},
      "a/seed_0: BEFORE 'a' and SEEDS both give RANDOM_SEED, 7 and 0",
    ),
    (
      {'grid': {'RANDOM_SEED': (1, 2)}, 'seeds': (3,)},
      "SEEDS and GRID 'RANDOM_SEED' both give RANDOM_SEED",
    ),
    ({'settings': A_SEED, 'seeds': (0, 1)}, 'SEEDS and SETTINGS both give'),
    (
      {'settings': A_SEED, 'grid': {'RANDOM_SEED': (1,)}},
      "SETTINGS and GRID 'RANDOM_SEED' both give",
    ),
    ({'experiment': None}, '=0.0/seed_0 has no gin file: set EXPERIMENT'),
    ({'experiment': 'my.gin'}, 'there is no gin file my.gin'),
    (
      {'experiment': {'gin_file': GKD, 'run_mode': 'export'}},
      "run_mode may be train, eval, infer, not 'export'",
    ),
    (
      {'settings': {'X': '{techer}/a'}, 'before': {'teacher': TEACHER}},
      r"\{techer\} in '\{techer\}/a' is undefined.* seed, teacher\.",
    ),
    ({'before': {'teacher': 'runs/gone'}}, "'teacher': runs/gone is not there"),
    (
      {'before': {'t': 'runs/{size}'}},
      r"\{size\} in 'runs/\{size\}' is undefined",
    ),
    (
      {'before': {'t': {'gin_file': TEACHER, 'for_each': ('size',)}}},
      "for_each may name STUDENT_DATA_FRACTION, seed, not \\['size'\\]",
    ),
    (
      {'before': {'seed': TEACHER}},
      "BEFORE 'seed': this name is already taken",
    ),
    (
      # One for all seeds cannot go on from one that there is for each.
      {'before': {**BEFORE, 'a': {'gin_file': SFT, 'X': '{initial_student}'}}},
      r'\{initial_student\} in .* there is one for each seed. Add this to',
    ),
    (
      # What comes later is not there yet.
      {'before': {'a': {'gin_file': SFT, 'X': '{b}'}, 'b': TEACHER}},
      r"\{b\} in '\{b\}' is undefined",
    ),
  ],
)
def test_a_grid_that_makes_no_sense_is_refused(tmp_path, changes, said):
  with pytest.raises(ValueError, match=said):
    make_jobs(tmp_path, **({'grid': LAMBDA} | changes))


@pytest.mark.parametrize('setting', ['num_parallel', 'runs_per_process'])
def test_no_run_at_a_time_is_refused(tmp_path, setting):
  message = f'{setting.upper()} must be 1 or more'
  with pytest.raises(ValueError, match=message):
    sweep.sweep(str(tmp_path / 'out'), LAMBDA, GKD, **{setting: 0})

  assert not (tmp_path / 'out').exists()


def test_settings_that_gin_does_not_take_are_refused_before_any_run(
  tmp_path, run_main
):
  config = tmp_path / 'sweep.gin'
  config.write_text(
    f"""include 'gin/runs/sweep.gin'
EXPERIMENT = '{GKD}'
SETTINGS = {{'INITIAL_CHECKPOINT_PATH': 'x', 'TEACHER_CHECKPOINT_PATH': 'y'}}
GRID = {{'a': {{'good': {{'BETA': 0.5}}, 'bad': {{'BETTA': 0.5}}}}}}
"""
  )
  command = (
    '--run_mode=sweep',
    f'--gin_file={config}',
    f'--gin.MODEL_DIR={tmp_path}/out',
  )

  refused = run_main(*command)

  assert refused.code == 1
  assert (
    'Error: a=bad/seed_0 cannot be run: BETTA has no effect: no setting of '
    'this experiment reads it. Did you mean BETA?'
  ) in refused.err
  assert not (tmp_path / 'out').exists()
  grid = "{'a': {'bad': {'DIVERGENCE': '@divergences.jsd'}}}"
  refused = run_main(*command, f'--gin.GRID={grid}')
  assert (
    'a=bad/seed_0 cannot be run: divergences.jsd does not exist' in refused.err
  )


@pytest.mark.parametrize(
  ['settings', 'message'],
  [
    ({'FINAL_EVAL': None}, 'the run writes no such file'),
    (
      {'final_eval/datasets.DatasetConfig.split': 'validation'},
      'the run writes eval_validation.json',
    ),
  ],
)
def test_a_run_that_would_never_be_done_is_refused_before_any_run(
  tmp_path, run_main, settings, message
):
  config = tmp_path / 'sweep.gin'
  config.write_text(
    f"""include 'gin/runs/sweep.gin'
EXPERIMENT = '{GKD}'
SETTINGS = {{'INITIAL_CHECKPOINT_PATH': 'x', 'TEACHER_CHECKPOINT_PATH': 'y'}}
GRID = {{'a': {{'b': {settings}}}}}
"""
  )

  refused = run_main(
    '--run_mode=sweep',
    f'--gin_file={config}',
    f'--gin.MODEL_DIR={tmp_path}/out',
  )

  assert refused.code == 1
  assert 'a=b/seed_0 cannot be run: the sweep waits for' in (refused.err)
  assert message in refused.err
  assert not (tmp_path / 'out').exists()


def test_a_file_of_another_mode_is_refused_before_any_run(tmp_path, run_main):
  config = tmp_path / 'sweep.gin'
  config.write_text(
    """include 'gin/runs/sweep.gin'
EXPERIMENT = 'configs/quickstart.gin'
GRID = {'NUM_PARALLEL': (1,)}
"""
  )

  refused = run_main(
    '--run_mode=sweep',
    f'--gin_file={config}',
    f'--gin.MODEL_DIR={tmp_path}/out',
  )

  assert refused.code == 1
  assert (
    'num_parallel=1/seed_0 cannot be run: RANDOM_SEED has no effect'
  ) in refused.err


# --- Running them -------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path):
  """Runs a sweep whose processes do nothing but leave their result."""

  class Worker:
    num_jobs = 0
    started = 0.0

    def __init__(self, log):
      pass

    def start(self, job):
      self.job = job
      run.started.append(job.name)
      job.log.write_text('its last line')
      if job.name not in run.exit_codes:
        job.result.write_text('{}')

    def poll(self):
      return run.exit_codes.get(self.job.name, 0)

    def end(self):
      pass

    wait = end

  def run(**changes):
    settings = {
      'grid': LAMBDA,
      'experiment': GKD,
      'settings': SETTINGS,
      'before': BEFORE,
    }
    sweep.sweep(str(tmp_path / 'out'), **(settings | changes))

  run.started, run.exit_codes = [], {}
  monkeypatch.setattr(jobs, 'Worker', Worker)
  monkeypatch.setattr(jobs.time, 'sleep', lambda seconds: None)
  return run


STAGES = ['teacher', 'initial_student/seed_0', 'outputs']
POINTS = [f'student_data_fraction={x}/seed_0' for x in (0.0, 0.5)]


def test_a_sweep_runs_what_is_left(run, tmp_path):
  run()
  assert run.started == STAGES + POINTS
  (tmp_path / 'out' / POINTS[0] / 'eval_test.json').unlink()
  run.started.clear()

  run()

  assert run.started == POINTS[:1]


@pytest.fixture
def reported(monkeypatch):
  """The arguments that the report is called with."""
  calls = []
  monkeypatch.setattr(
    sweep.report_lib,
    'report',
    lambda *args, **settings: calls.append((args, settings)),
  )
  return calls


def test_when_all_are_done_they_are_reported_with_what_was_there(
  run, reported, tmp_path
):
  before = BEFORE | {'teacher': f'{tmp_path}/my_teacher'}
  (tmp_path / 'my_teacher').mkdir()

  run(before=before, report={'title': 'A title'})

  out = f'{tmp_path}/out'
  runs = (out, f'{tmp_path}/my_teacher')
  assert reported == [((runs, out), {'title': 'A title'})]


def test_there_is_no_report_unless_it_is_set_and_all_runs_are_done(
  run, reported
):
  run()
  run.exit_codes['initial_student/seed_1'] = 1
  with pytest.raises(ValueError, match='3 of 8 runs failed'):
    run(seeds=(0, 1), report={})

  assert reported == []


def test_a_setting_that_the_report_lacks_is_refused_before_any_run(run):
  message = r"REPORT may set title, metric, .*, not \['titel'\]"
  with pytest.raises(ValueError, match=message):
    run(report={'titel': 'A title'})

  assert run.started == []


def test_a_point_can_be_added_later(run):
  run()
  run.started.clear()

  run(grid={'STUDENT_DATA_FRACTION': (0.0, 0.25, 0.5)}, seeds=(0, 1))

  assert run.started == [
    'initial_student/seed_1',
    'student_data_fraction=0.0/seed_1',
    'student_data_fraction=0.25/seed_0',
    'student_data_fraction=0.25/seed_1',
    'student_data_fraction=0.5/seed_1',
  ]


def test_runs_of_other_settings_are_not_mixed(run):
  run()
  run.started.clear()

  with pytest.raises(ValueError, match='other settings') as error:
    run(settings={**SETTINGS, 'TRAIN_STEPS': 9})

  assert f': {", ".join(POINTS)}. Remove these' in str(error.value)
  assert run.started == []


def test_one_that_fails_is_told_and_the_others_go_on(run, capsys):
  run.exit_codes[POINTS[0]] = 1

  with pytest.raises(ValueError, match='1 of 5 runs failed') as error:
    run()

  assert run.started == STAGES + POINTS
  assert POINTS[0] in str(error.value) and POINTS[1] not in str(error.value)
  assert f'{POINTS[0]} failed.' in capsys.readouterr().err
  run.exit_codes.clear()
  run.started.clear()
  run()
  assert run.started == POINTS[:1]


def test_all_runs_look_for_data_where_the_sweep_is_told_to(tmp_path, run_main):
  printed = run_main(
    '--run_mode=sweep',
    '--gin_file=configs/sweeps/cmudict_g2p/lambda.gin',
    f'--gin.MODEL_DIR={tmp_path}',
    '--gin.PRINT_COMMANDS=True',
    '--tfds_data_dir=/my/data',
  )

  lines = printed.out.splitlines()
  assert len(lines) == 4  # a teacher, three students
  assert all(line.endswith(' --tfds_data_dir=/my/data') for line in lines)


def test_what_gin_takes_is_asked_of_the_runs_that_are_left(run):
  asked = []

  def check(arguments, result):
    del arguments
    asked.append(result)

  run(check=check)
  assert set(asked) == {'predictions_train.jsonl', 'eval_test.json'}
  assert len(asked) == 5

  asked.clear()
  run(check=check)

  assert asked == []


def test_commands_that_need_nothing_else_are_printed(run, tmp_path, capsys):
  def printed():
    run(print_commands=True)
    out = capsys.readouterr()
    return [shlex.split(line) for line in out.out.splitlines()], out.err

  lines, said = printed()
  assert [line[:3] for line in lines] == [['python', '-m', 'gkd_jax.main']] * 2
  assert f'--gin.MODEL_DIR={tmp_path}/out/teacher' in lines[0]
  assert '0 of 5 runs are done; 2 can be run now; 3 depend on these' in said

  for stage in STAGES:
    (tmp_path / 'out' / stage).mkdir(parents=True)
  (tmp_path / 'out/teacher/eval_test.json').touch()
  lines, said = printed()
  assert '1 of 5 runs are done; 2 can be run now; 2 depend on these' in said
  assert '--run_mode=infer' in lines[1]

  (tmp_path / 'out/initial_student/seed_0/eval_test.json').touch()
  (tmp_path / 'out/outputs/predictions_train.jsonl').touch()
  lines, said = printed()
  folders = {flag for line in lines for flag in line if 'MODEL_DIR' in flag}
  assert folders == {
    f'--gin.MODEL_DIR={tmp_path}/out/{name}' for name in POINTS
  }
  assert run.started == []


# --- All of it ----------------------------------------------------------------

LITTLE = """from __gin__ import dynamic_registration

from gkd_jax.data import datasets

EMB_DIM = 8
NUM_HEADS = 1
HEAD_DIM = 8
MLP_DIM = 8
NUM_ENCODER_LAYERS = 1
NUM_DECODER_LAYERS = 1
TRAIN_STEPS = 2
WARMUP_STEPS = 0
BATCH_SIZE = 4
EVALUATOR_NUM_EXAMPLES = 4
EVAL_BATCH_SIZE = 4
final_eval/datasets.DatasetConfig.num_examples = 4
"""


@pytest.mark.slow
def test_a_student_learns_from_its_teachers_outputs_in_a_sweep(
  run_main, tmp_path
):
  """Teacher, outputs, SeqKD: printed and pasted, then run; real processes."""
  little = tmp_path / 'little.gin'
  little.write_text(LITTLE)
  config = tmp_path / 'sweep.gin'
  config.write_text(
    f"""include 'gin/runs/sweep.gin'
BEFORE = {{
    'teacher': {{'gin_file': ('{TEACHER}', '{little}')}},
    'outputs': {{
        'gin_file': '{OUTPUTS}',
        'run_mode': 'infer',
        'CHECKPOINT_PATH': '{{teacher}}',
        'INFER_NUM_EXAMPLES': 10,
        'INFER_BATCH_SIZE': 4,
        'NUM_SAMPLES': 2,
    }},
}}
EXPERIMENT = {{'gin_file': ('configs/cmudict_g2p/seqkd.gin', '{little}')}}
SETTINGS = {{
    'TEACHER_CHECKPOINT_PATH': None,
    'INITIAL_CHECKPOINT_PATH': None,
    'TRAIN_ON_PREDICTIONS': '{{outputs}}/predictions_train.jsonl',
}}
GRID = {{'LEARNING_RATE': (1e-2,)}}
"""
  )
  command = (
    *('--run_mode=sweep', f'--gin_file={config}'),
    f'--gin.MODEL_DIR={tmp_path}/out',
  )

  (printed,) = run_main(*command, '--gin.PRINT_COMMANDS=True').out.splitlines()
  python, pasted = shlex.split(printed)[:3], shlex.split(printed)[3:]
  assert python == ['python', '-m', 'gkd_jax.main']
  assert run_main(*pasted).code == 0
  assert (tmp_path / 'out' / 'teacher' / 'eval_test.json').exists()

  finished = subprocess.run(
    [sys.executable, '-m', 'gkd_jax.main', *command],
    cwd=conftest.ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr
  said = finished.stderr

  assert '1 of 3 runs are done already' in said
  assert 'All 3 runs are done' in said
  run = tmp_path / 'out' / 'learning_rate=0.01' / 'seed_0'
  log = (run.parent / 'seed_0.log').read_text()
  about = json.loads(
    (tmp_path / 'out/outputs/predictions_train.json').read_text()
  )
  assert 10 < about['num_predictions'] <= 20
  assert f'Training data: {about["num_predictions"]} predictions' in log
  assert f'{tmp_path}/out/teacher/checkpoint_2 with BeamConfig' in log
  for name in ('config.gin', 'eval_test.json', 'metrics.jsonl'):
    assert (run / name).exists()
