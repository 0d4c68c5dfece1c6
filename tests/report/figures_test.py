# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from gkd_jax.report import figures, plots, runs, sections
from gkd_jax.report.tables import Mean
from tests import run_folders
from tests.run_folders import SFT, gkd

INITIAL = {'teacher': 20.0, 'initial': (SFT, [60.0, 62.0])}
GRID = INITIAL | {
  'skd': (gkd(0.0), [55.0, 57.0]),
  'skd_jsd': (gkd(0.0, 'generalized_jsd', 0.9), [52.0, 53.0]),
  'imitkd': (gkd(0.5), [54.0, 55.0]),
  'on_policy_rkl': (gkd(1.0, 'reverse_kl'), [50.0, 54.0]),
  'on_policy_jsd': (gkd(1.0, 'generalized_jsd', 0.9), [48.0, 49.0]),
}


def section_of(folder):
  found, _ = runs.find(str(folder))
  (section,) = sections.make(found)
  return section


def study(folder, wer, **shared):
  return section_of(run_folders.study(folder, wer, **shared))


@pytest.fixture(scope='module')
def grid(tmp_path_factory):
  return study(tmp_path_factory.mktemp('grid'), GRID)


def mean_of(a, b):
  """Two seeds; the standard errors are half of the difference."""
  return Mean((a + b) / 2, pytest.approx(abs(a - b) / 2), 2)


def of_one(value):
  return Mean(value, None, 1)


def test_acceptance_is_shown_for_students_measured_as_drafts(tmp_path):
  metrics = {'greedy/wer': 50.0, 'as_draft/acceptance_greedy': 0.8}
  run_folders.write(tmp_path / 'a', metrics, **SFT)
  run_folders.write(
    tmp_path / 'b',
    metrics | {'as_draft/acceptance_sampled': 0.7},
    **gkd(0.5),
  )

  (figure,) = figures.acceptance_bars(section_of(tmp_path))

  greedy, sampled = figure.data.panels
  assert greedy.bars == {'SFT': of_one(0.8), 'ImitKD': of_one(0.8)}
  assert sampled.bars == {'SFT': None, 'ImitKD': of_one(0.7)}
  plots.draw(figure.data)


# --- Method bars --------------------------------------------------------------


def test_bars_show_each_method_from_the_initial_student(grid):
  (figure,) = figures.method_bars(grid)
  greedy, sampled = figure.data.panels

  assert greedy.label == 'WER %, greedy'
  assert list(greedy.bars)[:2] == ['supervised KD', 'supervised KD, JSD(0.9)']
  assert greedy.bars['ImitKD'] == mean_of(54.0, 55.0)
  assert greedy.base == plots.Line('initial student', mean_of(60.0, 62.0))
  assert greedy.lines == [plots.Line('teacher', of_one(20.0))]
  assert sampled.label == 'WER %, sampled at T=1'
  assert sampled.bars['ImitKD'] == mean_of(64.0, 65.0)
  assert sampled.lines == []  # the teacher was not sampled from
  assert 'lower is better' in figure.caption
  assert 'Means over 2 seeds' in figure.caption


def test_a_method_without_a_decoding_has_no_bar_there(tmp_path):
  run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0}, **SFT)
  run_folders.write(
    tmp_path / 'b', {'greedy/wer': 40.0, 'beam/wer': 39.0}, **gkd(0.5)
  )

  (figure,) = figures.method_bars(section_of(tmp_path))

  assert figure.data.panels[1].bars == {'SFT': None, 'ImitKD': of_one(39.0)}
  assert figure.data.panels[0].base is None
  assert 'start at' not in figure.caption
  plots.draw(figure.data)


def test_each_initial_student_has_its_own_bars(tmp_path):
  wer = {
    'teacher': 20.0,
    'initial': (SFT | {'EMB_DIM': 16}, [60.0, 62.0]),
    'imitkd': (gkd(0.5) | {'EMB_DIM': 16}, [54.0, 55.0]),
  }
  run_folders.study(tmp_path / 'small', wer)
  for seed in (0, 1):
    student = run_folders.write(
      tmp_path / f'base_{seed}',
      {'greedy/wer': 40.0},
      RANDOM_SEED=seed,
      EMB_DIM=32,
      **SFT,
    )
    run_folders.write(
      tmp_path / f'base_{seed}_imitkd',
      {'greedy/wer': 35.0},
      RANDOM_SEED=seed,
      EMB_DIM=32,
      INITIAL_CHECKPOINT_PATH=student,
      TEACHER_CHECKPOINT_PATH=tmp_path / 'small' / 'teacher',
      **gkd(0.5),
    )

  small, base = figures.method_bars(section_of(tmp_path))

  assert small.title == 'Methods from initial student, width 16'
  assert base.title == 'Methods from initial student, width 32'
  assert small.name != base.name
  for figure, level, bar in ((small, 61.0, 54.5), (base, 40.0, 35.0)):
    panel = figure.data.panels[0]
    assert panel.base.mean.value == level
    assert [mean.value for mean in panel.bars.values()] == [bar]
    assert [line.mean.value for line in panel.lines] == [20.0]


def test_runs_on_a_part_of_the_data_have_no_bar(tmp_path):
  for number in (None, 100):
    run_folders.write(
      tmp_path / f'run_{number}',
      {'greedy/wer': 50.0},
      TRAIN_NUM_EXAMPLES=number,
      **gkd(0.5),
    )

  (figure,) = figures.method_bars(section_of(tmp_path))

  assert list(figure.data.panels[0].bars) == ['ImitKD, all examples']
  assert 'fewer training examples are omitted' in figure.caption


def test_without_a_method_there_are_no_bars(tmp_path):
  section = study(tmp_path, INITIAL)
  section = dataclasses.replace(section, groups=section.of_role('teacher'))

  assert figures.method_bars(section).startswith('Method bars: no method')


# --- lambda x divergence ------------------------------------------------------


def test_the_heat_map_has_lambda_and_divergence(grid):
  (figure,) = figures.heat_maps(grid)

  assert figure.data.columns == ['0', '0.5', '1']
  assert figure.data.rows == {
    'forward KL': [mean_of(55.0, 57.0), mean_of(54.0, 55.0), None],
    'JSD(0.9)': [mean_of(52.0, 53.0), None, mean_of(48.0, 49.0)],
    'reverse KL': [None, None, mean_of(50.0, 54.0)],
  }
  assert figure.data.mode == 'min'


def test_a_tuned_learning_rate_does_not_divide_the_heat_map(tmp_path):
  wer = {
    name: entry
    if name in INITIAL
    else (entry[0] | {'LEARNING_RATE': 0.001 * i}, entry[1])
    for i, (name, entry) in enumerate(GRID.items())
  }

  (figure,) = figures.heat_maps(study(tmp_path, wer))

  assert len(figure.data.rows) == 3


def test_other_settings_do(tmp_path):
  more = {
    f'{name}_{batch}': (entry[0] | {'BATCH_SIZE': batch}, entry[1])
    for name, entry in GRID.items()
    if name not in INITIAL
    for batch in (32, 64)
  }

  found = figures.heat_maps(study(tmp_path, INITIAL | more))

  assert [figure.title for figure in found] == [
    'Student data and divergence (batches of 32)',
    'Student data and divergence (batches of 64)',
  ]
  assert len({figure.name for figure in found}) == 2


@pytest.mark.parametrize(
  'left, there',
  [
    (('skd', 'imitkd'), 'λ = 0, 0.5; forward KL'),
    (('on_policy_rkl', 'on_policy_jsd'), 'λ = 1; JSD(0.9), reverse KL'),
    ((), 'λ = none; no divergence'),
  ],
)
def test_a_heat_map_needs_two_of_each(tmp_path, left, there):
  methods = {name: GRID[name] for name in left}

  why = figures.heat_maps(
    study(tmp_path, INITIAL | methods | {'sft': (SFT | {'X': 1}, [50.0])})
  )

  assert 'needs two λ and two divergences' in why
  assert there in why


def test_two_cells_that_share_nothing_are_no_heat_map(tmp_path):
  methods = {name: GRID[name] for name in ('skd', 'on_policy_rkl')}

  why = figures.heat_maps(study(tmp_path, INITIAL | methods))

  assert 'λ = 0, 1; forward KL, reverse KL' in why


def test_rewards_and_likelihood_are_no_part_of_the_heat_map(tmp_path):
  wer = GRID | {
    'rl': (gkd(1.0) | {'ALPHA': 0.5}, [40.0, 41.0]),
    'both': (gkd(1.0) | {'LIKELIHOOD_WEIGHT': 0.5}, [40.0, 41.0]),
  }

  (figure,) = figures.heat_maps(study(tmp_path, wer))

  assert figure.data.rows['forward KL'][2] is None


# --- Data efficiency ----------------------------------------------------------


def test_data_efficiency_is_by_number_of_examples_all_last(tmp_path):
  wer = INITIAL | {
    f'{name}_{number}': (
      macros | {'TRAIN_NUM_EXAMPLES': number},
      [start - (number or 10_000) / 1000, start],
    )
    for number in (None, 1000, 100)
    for name, macros, start in (('on', gkd(1.0), 55.0), ('skd', gkd(0.0), 58.0))
  }
  wer['imitkd'] = (gkd(0.5), [50.0, 50.0])  # on all examples alone: no line

  (figure,) = figures.data_efficiency(study(tmp_path, wer))

  data = figure.data
  assert {*data.series} == {'supervised KD', 'on-policy GKD, forward KL'}
  points = data.series['supervised KD']
  assert [data.x_ticks[p.x.value] for p in points] == ['100', '1,000', 'all']
  assert [p.y for p in points] == [
    mean_of(57.9, 58.0),
    mean_of(57.0, 58.0),
    mean_of(48.0, 58.0),
  ]
  places = [p.x.value for p in points]
  assert places == sorted(places) and data.log_x
  assert [line.name for line in data.lines] == ['initial student', 'teacher']
  assert '"all" is the full training split' in figure.caption


def test_initial_students_of_as_few_examples_are_a_line_of_their_own(tmp_path):
  run_folders.write(tmp_path / 'teacher', {'greedy/wer': 20.0}, **SFT)
  for number, wer in ((100, 80.0), (1000, 60.0)):
    few = {'TRAIN_NUM_EXAMPLES': number}
    initial = run_folders.write(
      tmp_path / f'initial_{number}', {'greedy/wer': wer}, **SFT, **few
    )
    run_folders.write(
      tmp_path / f'skd_{number}',
      {'greedy/wer': wer - 5.0},
      INITIAL_CHECKPOINT_PATH=initial,
      TEACHER_CHECKPOINT_PATH=tmp_path / 'teacher',
      **gkd(0.0),
      **few,
    )

  (figure,) = figures.data_efficiency(section_of(tmp_path))

  lines = {
    name: [(figure.data.x_ticks[p.x.value], p.y) for p in points]
    for name, points in figure.data.series.items()
  }
  assert lines == {
    'initial student': [('100', of_one(80.0)), ('1,000', of_one(60.0))],
    'supervised KD': [('100', of_one(75.0)), ('1,000', of_one(55.0))],
  }
  assert [line.name for line in figure.data.lines] == ['teacher']


def test_students_that_began_otherwise_are_no_line_of_data_efficiency(tmp_path):
  for number, width in ((100, 16), (1000, 32)):
    initial = run_folders.write(
      tmp_path / f'initial_{number}', {'greedy/wer': 60.0}, **SFT, EMB_DIM=width
    )
    run_folders.write(
      tmp_path / f'skd_{number}',
      {'greedy/wer': 55.0},
      INITIAL_CHECKPOINT_PATH=initial,
      TRAIN_NUM_EXAMPLES=number,
      **gkd(0.0),
    )

  assert 'needs a method' in figures.data_efficiency(section_of(tmp_path))


def test_data_efficiency_needs_two_numbers_of_examples(grid):
  assert 'TRAIN_NUM_EXAMPLES' in figures.data_efficiency(grid)


# --- Quality and diversity ----------------------------------------------------


def test_quality_and_diversity_is_over_temperatures(tmp_path):
  for seed in (0, 1):
    values = {'greedy/wer': 50.0}
    for name, wer, self_bleu in (
      ('sampled_0.1', 51.0, 90.0),
      ('sampled_0.5', 55.0, 70.0),
      ('sampled', 65.0, 30.0),
    ):
      values[f'{name}/wer'] = wer + 2 * seed
      values[f'{name}/self_bleu'] = self_bleu + 4 * seed
    values['sampled_0.3/wer'] = 53.0  # its diversity was not measured
    run_folders.write(
      tmp_path / f'run_{seed}', values, RANDOM_SEED=seed, **gkd(1.0)
    )
  run_folders.write(tmp_path / 'other', {'greedy/wer': 50.0}, **gkd(0.0))

  (figure,) = figures.quality_and_diversity(section_of(tmp_path))

  ((name, points),) = figure.data.series.items()
  assert name == 'on-policy GKD, forward KL'
  assert [(p.name, p.x, p.y) for p in points] == [
    ('T=0.1', mean_of(90.0, 94.0), mean_of(51.0, 53.0)),
    ('T=0.5', mean_of(70.0, 74.0), mean_of(55.0, 57.0)),
    ('T=1', mean_of(30.0, 34.0), mean_of(65.0, 67.0)),
  ]


def test_quality_and_diversity_needs_two_temperatures(grid):
  assert 'Self-BLEU' in figures.quality_and_diversity(grid)


# --- Reward -------------------------------------------------------------------


def rl(alpha, divergence='generalized_jsd', beta=0.9):
  macros = gkd(1.0, divergence, beta) | {
    'ALPHA': alpha,
    'DIVERGENCE_WEIGHT': '%ALPHA',
    'REWARD_WEIGHT': '@objectives.reward_share()',
  }
  if alpha == 0.0:
    del macros['BETA']  # nothing read it
  return macros


ALPHAS = {
  f'a{alpha}': (rl(alpha), [40.0 + 10 * alpha, 42.0 + 10 * alpha])
  for alpha in (0.5, 0.0, 0.25)
}


def test_the_trade_off_is_over_alpha(tmp_path):
  (figure,) = figures.reward_trade_off(study(tmp_path, INITIAL | ALPHAS))

  ((name, points),) = figure.data.series.items()
  assert name == 'RL+GKD, JSD(0.9)'
  assert [(p.name, p.y) for p in points] == [
    ('α=0', mean_of(40.0, 42.0)),
    ('α=0.25', mean_of(42.5, 44.5)),
    ('α=0.5', mean_of(45.0, 47.0)),
  ]


def test_each_divergence_has_its_own_trade_off(tmp_path):
  more = {
    'r0.5': (rl(0.5, 'reverse_kl', None), [44.0, 44.0]),
    'r0.25': (rl(0.25, 'reverse_kl', None), [43.0, 43.0]),
  }

  (figure,) = figures.reward_trade_off(study(tmp_path, INITIAL | ALPHAS | more))

  assert {
    name: [point.name for point in points]
    for name, points in figure.data.series.items()
  } == {
    'RL+GKD, JSD(0.9)': ['α=0', 'α=0.25', 'α=0.5'],
    'RL+GKD, reverse KL': ['α=0', 'α=0.25', 'α=0.5'],
  }


@pytest.mark.parametrize(
  'extra, label',
  [
    ({}, 'KL(student‖teacher), nats per token'),
    ({'train/reward': 0.5}, 'reward of its samples, end of training'),
    ({'train/reward': 0.5, 'greedy/entailment': 0.9}, 'entailment'),
  ],
)
def test_the_reward_is_the_best_measure_that_all_have(tmp_path, extra, label):
  for alpha in (0.25, 0.5):
    run_folders.write(
      tmp_path / str(alpha),
      {'greedy/wer': 50.0, 'on_student_outputs/reverse_kl': 0.2, **extra},
      **rl(alpha),
    )

  (figure,) = figures.reward_trade_off(section_of(tmp_path))

  assert figure.data.x_label == label


def test_a_trade_off_needs_two_alphas(tmp_path):
  run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0}, **rl(0.5))

  why = figures.reward_trade_off(section_of(tmp_path))

  assert 'two or more ALPHA' in why


# --- During training ----------------------------------------------------------


def test_curves_begin_at_the_initial_student(grid):
  (figure,) = figures.curves(grid)

  points = figure.data.series['ImitKD']
  assert [(p.x.value, p.y) for p in points] == [
    (0.0, mean_of(61.0, 63.0)),  # the initial students at their end
    (500.0, mean_of(59.0, 60.0)),
    (1000.0, mean_of(55.0, 56.0)),
  ]


def test_of_many_methods_the_best_are_shown(tmp_path):
  for i in range(11):
    run_folders.write(
      tmp_path / str(i),
      {'greedy/wer': 50.0},
      {500: 70.0, 1000: 60.0 - i},
      TRAIN_STEPS=1000 + i,
      **SFT,
    )

  (figure,) = figures.curves(section_of(tmp_path))

  assert (
    'Shows the 8 of 11 methods with the best final metric.' in figure.caption
  )
  at_the_end = [points[-1].y.value for points in figure.data.series.values()]
  assert at_the_end == [57.0 - i for i in range(8)]


def test_a_curve_needs_two_points(tmp_path):
  run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0}, {1000: 51.0}, **SFT)

  assert 'two or more evaluations' in figures.curves(section_of(tmp_path))


# --- All of them --------------------------------------------------------------


def test_what_is_left_out_is_said_in_a_line_each(grid):
  found, left_out = figures.make_all(grid)

  assert [figure.name for figure in found] == [
    'methods',
    'lambda_divergence',
    'training',
  ]
  assert [line.partition(':')[0] for line in left_out] == [
    'Acceptance of drafts',
    'Data efficiency',
    'Quality and diversity',
    'Reward and distillation',
  ]
  assert all('\n' not in line for line in left_out)


def test_the_data_of_figures_are_plain(grid):
  for figure in figures.make_all(grid)[0]:
    read = json.loads(json.dumps(figures.as_json(figure), allow_nan=False))
    assert read['kind'] in ('Bars', 'HeatMap', 'Plot')
    assert read['title'] == figure.title
