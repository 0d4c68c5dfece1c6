# SPDX-License-Identifier: Apache-2.0
import math
import statistics

import pytest

from gkd_jax.report import runs, sections
from tests import run_folders
from tests.run_folders import SFT, gkd

# Greedy WER by seed. The teacher's is 20.
WER = {
  'teacher': 20.0,
  'initial': (SFT, [60.0, 70.0, 80.0]),
  'sft': (SFT | {'LEARNING_RATE': 0.003}, [50.0, 50.0, 65.0]),
  'imitkd': (gkd(0.5), [30.0, 40.0, 20.0]),
}


def sections_of(folder, **settings):
  found, _ = runs.find(str(folder))
  return sections.make(found, **settings)


def section_of(folder, **settings):
  (section,) = sections_of(folder, **settings)
  return section


def by_name(section):
  return {group.name: group for group in section.groups}


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  return section_of(run_folders.study(tmp_path_factory.mktemp('study'), WER))


# --- Groups and their means ---------------------------------------------------


def test_runs_that_differ_in_their_seed_are_one_group(study):
  assert [
    (group.name, group.role, len(group.runs)) for group in study.groups
  ] == [
    ('teacher', 'teacher', 1),
    ('initial student', 'initial student', 3),
    ('SFT', 'method', 3),
    ('ImitKD', 'method', 3),
  ]


def test_means_and_standard_errors_are_over_seeds(study):
  mean = by_name(study)['ImitKD'].means['greedy/wer']

  # 30, 40, 20: mean 30, squared deviations 0 + 100 + 100 over n - 1 = 2.
  assert mean.value == 30.0
  assert mean.error == pytest.approx(10.0 / math.sqrt(3.0))
  assert mean.count == 3


def test_the_gap_is_that_of_each_run_to_its_own_beginning(study):
  gap = by_name(study)['ImitKD'].means['gap_closed']

  shares = [30 / 40, 30 / 50, 60 / 60]
  assert gap.value == pytest.approx(statistics.fmean(shares))
  assert gap.error == pytest.approx(statistics.stdev(shares) / math.sqrt(3))
  assert 'gap_closed' not in by_name(study)['teacher'].means
  assert 'gap_closed' not in by_name(study)['initial student'].means


def test_without_a_gap_there_is_no_share_of_it(tmp_path):
  wer = WER | {'teacher': 60.0, 'initial': (SFT, [60.0, 70.0, 80.0])}

  section = section_of(run_folders.study(tmp_path, wer))

  assert 'gap_closed' not in by_name(section)['SFT'].means


def test_other_settings_are_another_group_and_said(tmp_path):
  for name, steps in (('short', 500), ('long', 1000)):
    run_folders.write(
      tmp_path / name, {'greedy/wer': 50.0}, TRAIN_STEPS=steps, **gkd(0.5)
    )

  section = section_of(tmp_path)

  assert {*by_name(section)} == {'ImitKD, 500 steps', 'ImitKD, 1,000 steps'}


def test_a_run_that_was_copied_is_not_counted_twice(tmp_path):
  for name in ('run', 'copy', 'other_seed'):
    seed = int(name == 'other_seed')
    run_folders.write(
      tmp_path / name, {'greedy/wer': 50.0 + seed}, RANDOM_SEED=seed, **SFT
    )

  section = section_of(tmp_path)

  assert len(section.methods[0].runs) == 2
  assert any('repeats' in note and 'run' in note for note in section.notes)


def test_a_study_that_was_run_again_adds_no_seeds(tmp_path):
  run_folders.study(tmp_path / 'one', WER)
  again = WER | {'skd': (gkd(0.0), [57.0, 56.0, 70.0])}
  run_folders.study(tmp_path / 'two', again)

  groups = by_name(section_of(tmp_path))

  assert {name: len(group.runs) for name, group in groups.items()} == {
    'teacher': 1,
    'initial student': 3,
    'SFT': 3,
    'ImitKD': 3,
    'supervised KD': 3,
  }


def test_what_began_from_a_repeat_is_measured_against_the_run_that_is_kept(
  tmp_path,
):
  run_folders.study(tmp_path / 'one', WER)
  again = WER | {'skd': (gkd(0.0), [40.0, 45.0, 50.0])}
  run_folders.study(tmp_path / 'two', again)

  means = by_name(section_of(tmp_path))['supervised KD'].means

  assert means['gap_closed'].value == pytest.approx(0.5)


def test_several_tasks_and_splits_are_several_sections(tmp_path):
  for task in ('xsum', 'gsm8k'):
    run_folders.write(
      tmp_path / task, {'greedy/wer': 50.0}, MIXTURE_OR_TASK_NAME=task, **SFT
    )
  run_folders.write(
    tmp_path / 'more',
    {'greedy/wer': 40.0},
    split='validation',
    MIXTURE_OR_TASK_NAME='xsum',
    **SFT,
  )

  found = sections_of(tmp_path)

  assert [(section.task, section.split) for section in found] == [
    ('gsm8k', 'test'),
    ('xsum', 'test'),
    ('xsum', 'validation'),
  ]
  assert found[2].groups[0].means['greedy/wer'].value == 40.0


def test_the_order_is_that_of_the_paper(tmp_path):
  methods = {
    'a': gkd(1.0, 'reverse_kl'),
    'b': gkd(1.0, 'generalized_jsd', 0.9),
    'c': gkd(1.0, 'generalized_jsd', 0.1),
    'd': gkd(1.0),
    'e': gkd(0.5),
    'f': gkd(0.0),
    'g': SFT,
    'h': gkd(1.0) | {'ALPHA': 0.5},
  }
  for name, macros in methods.items():
    run_folders.write(tmp_path / name, {'greedy/wer': 50.0}, **macros)

  assert [*by_name(section_of(tmp_path))] == [
    'SFT',
    'supervised KD',
    'ImitKD',
    'on-policy GKD, forward KL',
    'on-policy GKD, JSD(0.1)',
    'on-policy GKD, JSD(0.9)',
    'on-policy GKD, reverse KL',
    'RL+GKD α=0.5, forward KL',
  ]


# --- Who is whose -------------------------------------------------------------


def test_whoever_starts_from_a_student_is_a_method_also_in_a_chain(tmp_path):
  def write(name, initial=None, teacher=None, **macros):
    return run_folders.write(
      tmp_path / name,
      {'greedy/wer': 50.0},
      INITIAL_CHECKPOINT_PATH=initial,
      TEACHER_CHECKPOINT_PATH=teacher,
      **macros,
    )

  teacher = write('t', **SFT, EMB_DIM=192)
  student = write('s', **SFT)
  distilled = write('d', student, teacher, **gkd(1.0))
  write('r', distilled, teacher, **gkd(1.0), ALPHA=0.5)

  roles = {g.name: g.role for g in section_of(tmp_path).groups}

  assert roles == {
    'teacher': 'teacher',
    'initial student': 'initial student',
    'on-policy GKD, forward KL': 'method',
    'RL+GKD α=0.5, forward KL': 'method',
  }


def test_a_student_held_close_to_itself_is_no_teacher(tmp_path):
  student = run_folders.write(tmp_path / 's', {'greedy/wer': 60.0}, **SFT)
  run_folders.write(
    tmp_path / 'r',
    {'greedy/wer': 50.0},
    INITIAL_CHECKPOINT_PATH=student,
    TEACHER_CHECKPOINT_PATH=student,
    ALPHA=0.5,
    **gkd(1.0),
  )

  roles = {g.name: g.role for g in section_of(tmp_path).groups}

  assert roles['initial student'] == 'initial student'
  assert 'teacher' not in roles.values()


def test_a_student_nobody_started_from_yet_is_one_like_its_other_seeds(
  tmp_path,
):
  wer = WER | {'sft': (SFT | {'LEARNING_RATE': 0.003}, [50.0, 50.0])}
  del wer['imitkd']

  section = section_of(run_folders.study(tmp_path, wer))

  assert len(by_name(section)['initial student'].runs) == 3


def test_a_teacher_that_is_no_run_is_known_from_beside_a_student(tmp_path):
  student = run_folders.write(tmp_path / 's', {'greedy/wer': 60.0}, **SFT)
  run_folders.evaluation(
    student / 'with_teacher',
    {
      'checkpoint': f'{student}/checkpoint_1000',
      'task': 'cmudict_g2p',
      'teacher_checkpoint': '/models/xl',
      'teacher/greedy/wer': 20.0,
    },
  )
  run_folders.write(
    tmp_path / 'm',
    {'greedy/wer': 50.0},
    INITIAL_CHECKPOINT_PATH=student,
    TEACHER_CHECKPOINT_PATH='/models/xl',
    **gkd(1.0),
  )

  groups = by_name(section_of(tmp_path))

  assert groups['teacher'].means['greedy/wer'].value == 20.0
  method = groups['on-policy GKD, forward KL']
  assert method.means['gap_closed'].value == pytest.approx(10 / 40)


def test_several_teachers_that_are_no_runs_are_groups_of_their_own(tmp_path):
  run_folders.write(
    tmp_path / 'm',
    {
      'greedy/wer': 50.0,
      'teacher/math/greedy/wer': 20.0,
      'teacher/code/greedy/wer': 30.0,
    },
    TEACHER_CHECKPOINT_PATH={'math': '/models/m', 'code': '/models/c'},
    **gkd(1.0),
  )

  groups = by_name(section_of(tmp_path))

  assert groups['teacher m'].means['greedy/wer'].value == 20.0
  assert groups['teacher c'].means['greedy/wer'].value == 30.0


def test_pretrained_models_that_were_evaluated_are_teacher_and_student(
  tmp_path,
):
  for name, wer in (('xl', 20.0), ('small', 60.0)):
    run_folders.evaluation(
      tmp_path / name,
      {
        'checkpoint': f'/models/{name}',
        'task': 'cmudict_g2p',
        'greedy/wer': wer,
      },
    )
  run_folders.write(
    tmp_path / 'm',
    {'greedy/wer': 50.0},
    INITIAL_CHECKPOINT_PATH='/models/small',
    TEACHER_CHECKPOINT_PATH='/models/xl',
    **gkd(1.0),
  )

  groups = by_name(section_of(tmp_path))

  assert groups['teacher'].means['greedy/wer'].value == 20.0
  assert groups['initial student'].means['greedy/wer'].value == 60.0
  method = groups['on-policy GKD, forward KL']
  assert method.means['gap_closed'].value == pytest.approx(10 / 40)


def test_a_teacher_of_another_task_closes_no_gap(tmp_path):
  teacher = run_folders.write(
    tmp_path / 't', {'greedy/wer': 20.0}, MIXTURE_OR_TASK_NAME='xsum', **SFT
  )
  student = run_folders.write(tmp_path / 's', {'greedy/wer': 60.0}, **SFT)
  run_folders.write(
    tmp_path / 'm',
    {'greedy/wer': 50.0},
    INITIAL_CHECKPOINT_PATH=student,
    TEACHER_CHECKPOINT_PATH=teacher,
    **gkd(1.0),
  )

  section = sections_of(tmp_path)[0]

  assert section.task == 'cmudict_g2p'
  assert 'gap_closed' not in section.methods[0].means


# --- Settings that were tuned -------------------------------------------------


def tune(tmp_path, scores, **settings):
  """Runs of one method; {learning rate: (validation, test)}."""
  for rate, (validation, test) in scores.items():
    run_folders.write(
      tmp_path / str(rate),
      {'greedy/wer': test},
      {1000: validation} if validation else None,
      LEARNING_RATE=rate,
      **gkd(0.5),
    )
  return section_of(tmp_path, **settings)


def test_the_best_on_validation_stands_for_all(tmp_path):
  scores = {0.01: (52.0, 50.0), 0.03: (51.0, 58.0), 0.1: (70.0, 49.0)}

  section = tune(tmp_path, scores)

  (group,) = section.methods
  assert group.name == 'ImitKD'
  assert group.settings['LEARNING_RATE'] == 0.03  # though not on the test split
  assert [group.name for group in section.also_run] == [
    'ImitKD, learning rate 0.01',
    'ImitKD, learning rate 0.1',
  ]
  (note,) = section.notes
  assert note.startswith('ImitKD: shows learning rate 0.03, the best of 3')


def test_more_is_better_where_the_runs_say_so(tmp_path):
  scores = {0.01: (52.0, 50.0), 0.03: (51.0, 58.0)}

  section = tune(tmp_path, scores, mode='max')

  assert section.methods[0].settings['LEARNING_RATE'] == 0.01


def test_settings_are_chosen_by_the_seeds_that_all_have(tmp_path):
  # With seed 0 the lower rate is better; seed 1 is hard for both.
  for rate, seed, value in ((0.01, 0, 50.0), (0.01, 1, 90.0), (0.03, 0, 60.0)):
    run_folders.write(
      tmp_path / f'{rate}_{seed}',
      {'greedy/wer': value},
      {1000: value},
      LEARNING_RATE=rate,
      RANDOM_SEED=seed,
      **gkd(0.5),
    )

  (group,) = section_of(tmp_path).groups

  assert group.settings['LEARNING_RATE'] == 0.01


def test_without_a_validation_metric_none_is_chosen(tmp_path):
  section = tune(tmp_path, {0.01: (None, 50.0), 0.03: (51.0, 58.0)})

  assert [group.name for group in section.methods] == [
    'ImitKD, learning rate 0.01',
    'ImitKD, learning rate 0.03',
  ]
  assert 'no validation metric' in section.notes[0]
  assert section.tuned == ()


def test_what_was_tuned_can_be_said(tmp_path):
  section = tune(tmp_path, {0.01: (52.0, 50.0), 0.03: (51.0, 58.0)}, tuned=())

  assert len(section.methods) == 2


# --- The main metric ----------------------------------------------------------


def one_run(tmp_path, values, **macros):
  run_folders.write(tmp_path / 'a', values, **SFT, **macros)
  return tmp_path


@pytest.mark.parametrize(
  'metric, want',
  [
    (None, ('greedy/wer', 'min')),
    ('sampled/wer', ('sampled/wer', 'min')),
    ('per', ('greedy/per', 'min')),
    ('accuracy', ('beam/accuracy', 'max')),
    ('greedy/own', ('greedy/own', None)),
  ],
)
def test_the_main_metric_is_the_runs_own_or_chosen(tmp_path, metric, want):
  values = {
    'greedy/per': 9.0,
    'greedy/wer': 50.0,
    'greedy/own': 1.0,
    'sampled/wer': 60.0,
    'beam/accuracy': 50.0,
  }

  section = section_of(one_run(tmp_path, values), metric=metric)

  assert (section.metric, section.mode) == want


def test_runs_that_name_no_best_metric_have_their_first(tmp_path):
  folder = one_run(
    tmp_path, {'greedy/bleu': 20.0, 'greedy/chrf': 40.0}, BEST_METRIC=None
  )

  section = section_of(folder)

  assert (section.metric, section.mode) == ('greedy/bleu', 'max')


def test_the_usual_decodings_have_each_temperature_once(tmp_path):
  values = {
    f'{decoding}/wer': 50.0
    for decoding in ('sampled_0.5', 'sampled', 'greedy', 'sampled_1.0', 'beam')
  }

  section = section_of(one_run(tmp_path, values))

  assert section.decodings()[0] == 'greedy'
  assert section.usual_decodings() == ['greedy', 'beam', 'sampled']


def test_the_mode_can_be_chosen(tmp_path):
  section = section_of(one_run(tmp_path, {'greedy/wer': 5.0}), mode='max')

  assert section.mode == 'max'


def test_a_metric_that_nobody_measured_is_an_error_that_lists_them(tmp_path):
  folder = one_run(tmp_path, {'greedy/wer': 5.0})

  with pytest.raises(ValueError, match="No run has METRIC 'bleu'"):
    section_of(folder, metric='bleu')
  with pytest.raises(ValueError, match='Their metrics: .*greedy/wer'):
    section_of(folder, metric='greedy/bleu')
