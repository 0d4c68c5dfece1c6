# SPDX-License-Identifier: Apache-2.0
"""Rules of experiments: no TensorFlow, no files, nothing compiled."""

import dataclasses
import functools
import subprocess
import sys

import optax
import pytest

from gkd_jax import experiment as experiment_lib
from gkd_jax.data import datasets
from gkd_jax.decoding.speculative import Drafting
from gkd_jax.distill import (
  credit,
  divergences,
  entailment,
  objectives,
  policies,
  rewards,
  teachers,
)
from gkd_jax.models.t5 import T5Config
from tests import conftest, experiments

STUDENT = T5Config(264, 12, 2, 4, 10, 1, 1)
DATASET = datasets.DatasetConfig('none', conftest.LENGTHS, batch_size=8)
FORWARD_KL = objectives.Objective(divergences.forward_kl)
NO_DIVERGENCE = objectives.Objective(divergence_weight=0.0)
# On-policy distillation with a reward: every rule holds.
SETTINGS = {
  'student': STUDENT,
  'teacher_checkpoint_path': 'teacher',
  'policy': policies.student(),
  'objective': FORWARD_KL,
  'credit': credit.reinforce(rewards.exact_match(), 1.0),
  'train_dataset': DATASET,
  'eval_dataset': dataclasses.replace(DATASET, split='validation'),
  'learning_rate': optax.constant_schedule(1e-2),
  'total_steps': 4,
  'best_metric': 'greedy/error',
}
rules = {
  rule.__name__: rule
  for rule in (*experiment_lib.RULES, *experiment_lib.CHECKPOINT_RULES)
}

STEEP = experiment_lib.Optimization(learning_rate=1.0, warmup_steps=4)

# Rule, what breaks it, what the error names.
BROKEN = [
  # One of the rules of methods: tests/distill/rules_test.py has the others.
  (
    'parts_of_the_method_fit_together',
    {'student': dataclasses.replace(STUDENT, dropout_rate=0.1)},
    'DROPOUT_RATE is 0.1',
  ),
  (
    'parts_of_the_method_fit_together',
    {'num_microbatches': 8},
    'BATCH_SIZE 8 in 8',
  ),
  (
    'divergence_compares_logits_of_the_students_size',
    {'objective': objectives.Objective(lambda **logits: 0.0)},
    'must map logits [..., V] to [...] floats',
  ),
  (
    'a_draft_is_measured_with_one_teacher',
    {'as_draft': True, 'teacher_checkpoint_path': None},
    'as_draft is True, but TEACHER_CHECKPOINT_PATH is None',
  ),
  (
    'drafts_are_shorter_than_outputs',
    {'policy': policies.teacher(), 'teacher_drafting': Drafting(7)},
    'DRAFT_LENGTH is 7, but outputs have 7 tokens at most',
  ),
  (
    'microbatches_divide_the_batch',
    {'num_microbatches': 3},
    'BATCH_SIZE 8 must be divisible by',
  ),
  (
    'the_methods_teachers_are_those_of_the_run',
    {'method_teacher': teachers.averaged({'math': 'm', 'code': 'c'})},
    'the teachers code, math, but TEACHER_CHECKPOINT_PATH has no names',
  ),
  (
    'learning_rates_are_numbers_from_zero',
    {'learning_rate': optax.constant_schedule},
    'must return a number for each step',
  ),
  (
    'learning_rates_are_numbers_from_zero',
    {'learning_rate': lambda step: 1.5 - step},
    'The learning rate of step 2 is -0.5',
  ),
  (
    'warmup_ends_before_the_run',
    {'optimization': STEEP},
    'WARMUP_STEPS is 4, but TRAIN_STEPS is 4',
  ),
  ('best_metric_is_measured', {'eval_dataset': None}, 'BEST_METRIC = None'),
  (
    'shares_of_the_policy_are_in_0_and_1',
    {'policy': policies.mixture(lambda step: 0.5 * step)},
    'STUDENT_DATA_FRACTION is 1.5 after step 3',
  ),
  (
    'shares_of_the_policy_are_in_0_and_1',
    {'policy': policies.replay(8, fresh_share=optax.constant_schedule)},
    'replay.fresh_share must return a number',
  ),
  (
    'evaluations_that_the_policy_reads_are_made',
    {'policy': policies.replay(8), 'eval_dataset': None, 'best_metric': None},
    'EVAL = None',
  ),
  (
    'needed_teacher_has_a_checkpoint',
    {'teacher_checkpoint_path': None},
    'needs a teacher: set TEACHER_CHECKPOINT_PATH',
  ),
  (
    'needed_teacher_has_a_checkpoint',
    {
      'teacher_checkpoint_path': None,
      'policy': policies.teacher(),
      'objective': NO_DIVERGENCE,
    },
    'needs a teacher: set TEACHER_CHECKPOINT_PATH',
  ),
  (
    'settings_of_the_teacher_have_a_checkpoint',
    {'teacher_checkpoint_path': None, 'teacher': STUDENT},
    'experiment.Teacher.config is set',
  ),
  (
    'settings_of_the_teacher_have_a_checkpoint',
    {'teacher_checkpoint_path': None, 'teacher_dtype': 'bfloat16'},
    'experiment.Teacher.dtype is set',
  ),
  (
    'pairs_are_read_where_they_are_compared',
    {'policy': policies.pairs(), 'objective': NO_DIVERGENCE},
    'Set TRAIN_ON_PREDICTIONS to a file of pairs',
  ),
  (
    'reward_model_is_set_where_needed',
    {'credit': credit.reinforce(entailment.entailment(), 1.0)},
    'set REWARD_CHECKPOINT_PATH to a run',
  ),
  (
    'reward_model_is_set_where_needed',
    {'reward_checkpoint_path': 'x'},
    'REWARD uses no model',
  ),
  (
    'reward_model_is_set_where_needed',
    {'reward_model': STUDENT},
    'experiment.RewardModel.config is set',
  ),
  (
    'reward_model_is_set_where_needed',
    {'reward_dtype': 'bfloat16'},
    'but REWARD_CHECKPOINT_PATH is not',
  ),
]


def test_an_experiment_that_breaks_no_rule_is_accepted():
  experiment_lib.check(experiments.experiment(**SETTINGS))


@pytest.mark.parametrize(
  ('rule', 'changes', 'text'), BROKEN, ids=lambda x: x if type(x) is str else ''
)
def test_a_broken_rule_is_named(rule, changes, text):
  experiment = experiments.experiment(**(SETTINGS | changes))

  with pytest.raises(ValueError) as of_rule:
    rules[rule](experiment)
  with pytest.raises(ValueError):
    experiment_lib.check(experiment)

  assert text in str(of_rule.value)


def test_every_rule_is_broken_above():
  assert {rule for rule, _, _ in BROKEN} == rules.keys()


def test_planning_needs_no_checkpoint():
  settings = SETTINGS | {'teacher_checkpoint_path': None, 'teacher': STUDENT}

  experiment_lib.check(
    experiments.experiment(**settings), with_checkpoints=False
  )


# --- What a part refuses by itself --------------------------------------------


@pytest.mark.parametrize(
  ('changes', 'text'),
  [
    ({'total_steps': 1e3}, 'TRAIN_STEPS must be a whole number, 1 or more'),
    ({'total_steps': 0}, 'TRAIN_STEPS must be a whole number, 1 or more'),
    ({'seed': -1}, 'RANDOM_SEED must be a whole number, 0 or more'),
    ({'eval_period': -1}, 'EVAL_PERIOD must be a whole number, 0 or more'),
    ({'checkpoint_period': 0.5}, 'CHECKPOINT_PERIOD must be a whole'),
    ({'log_period': 0}, 'experiment.Schedule.log_period must be'),
    ({'max_skipped_steps': 0}, 'experiment.Schedule.max_skipped_steps must'),
    ({'keep_checkpoints': 0}, 'experiment.Keep.last must be'),
    ({'num_data_shards': 0}, 'experiment.Data.num_shards must be'),
    ({'num_data_shards': 2.0}, 'experiment.Data.num_shards must be'),
    ({'num_microbatches': 0}, 'experiment.Optimization.num_microbatches must'),
    ({'max_grad_norm': 0.0}, 'experiment.Optimization.max_grad_norm must be'),
    ({'best_mode': 'least'}, "BEST_MODE must be 'min', 'max' or None"),
    (
      {'best_metric': 'greedy/wer', 'best_mode': 'max'},
      "BEST_MODE is 'max', but of BEST_METRIC 'greedy/wer' a low value is",
    ),
    (
      {'best_metric': 'beam/rouge2', 'best_mode': 'min'},
      "'beam/rouge2' a high value is better",
    ),
    ({'policy': policies.student}, 'POLICY must be a policy'),
    ({'decodings': {'greedy': 1}}, "DECODINGS: 'greedy' must be @sampler"),
    ({'decodings': {}}, 'DECODINGS is empty'),
    ({'teacher_dtype': 'bf16'}, 'experiment.Teacher.dtype must be'),
    ({'reward_dtype': 'bf16'}, 'experiment.RewardModel.dtype must be'),
  ],
)
def test_a_part_refuses_what_it_cannot_be(changes, text):
  with pytest.raises(ValueError) as error:
    experiments.experiment(**(SETTINGS | changes))

  assert text in str(error.value)


@pytest.mark.parametrize(
  'metric, mode, want',
  [
    ('greedy/exact_match', None, 'max'),
    ('greedy/error', 'min', 'min'),
    ('greedy/mine', 'max', 'max'),
    ('greedy/mine', None, None),
    (None, None, None),
  ],
)
def test_a_metric_determines_which_checkpoint_is_best(metric, mode, want):
  keep = experiment_lib.Keep(best_metric=metric, best_mode=mode)

  assert keep.mode == want


def test_a_metric_of_unknown_direction_needs_a_mode():
  keep = experiment_lib.Keep(best_metric='greedy/mine')

  with pytest.raises(ValueError, match="Set BEST_MODE to 'max' or 'min'"):
    experiment_lib.check_best_metric(keep, ['greedy/mine'])


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    ({}, 'either LEARNING_RATE'),
    ({'learning_rate': 1.0, 'schedule': lambda step: 1.0}, 'either LEARNING'),
    ({'learning_rate': -1.0}, 'LEARNING_RATE must not be negative'),
    ({'learning_rate': 1.0, 'warmup_steps': -1}, 'WARMUP_STEPS must be'),
    ({'learning_rate': 1.0, 'cooldown_start': 5}, 'or neither'),
  ],
)
def test_an_optimization_refuses_rates_that_mean_nothing(settings, text):
  with pytest.raises(ValueError) as error:
    experiment_lib.Optimization(**settings)

  assert text in str(error.value)


@pytest.mark.parametrize(
  'optimizer', [lambda learning_rate: None, functools.partial(dict, 1)]
)
def test_an_optimizer_that_is_none_is_refused(optimizer):
  optimization = experiment_lib.Optimization(
    optimizer=optimizer, learning_rate=1.0
  )

  with pytest.raises(ValueError, match='as @optax.adafactor does; it'):
    optimization.make_optimizer(total_steps=4)


# --- What parts compute -------------------------------------------------------


@pytest.mark.parametrize(
  ('settings', 'rates'),
  [
    ({'warmup_steps': 2}, [0.0, 0.5, 1.0, 0.75, 0.25, 0.0]),
    (
      {'warmup_steps': 2, 'cooldown_start': 3, 'cooldown_steps': 2},
      [0.0, 0.5, 1.0, 1.0, 0.5, 0.0],
    ),
    ({'final_learning_rate': 1.0}, [1.0] * 6),
  ],
)
def test_the_learning_rate_rises_and_falls(settings, rates):
  optimization = experiment_lib.Optimization(learning_rate=1.0, **settings)

  schedule = optimization.make_schedule(total_steps=5)

  assert [
    experiment_lib.rate_at(schedule, step) for step in range(6)
  ] == pytest.approx(rates)


def test_what_is_due_after_a_step():
  schedule = experiment_lib.Schedule(
    total_steps=7, eval_period=2, checkpoint_period=0
  )

  due = [schedule.due(step) for step in range(1, 8)]

  assert [x.step for x in due if x.evaluation] == [2, 4, 6, 7]
  assert [x.step for x in due if x.checkpoint] == [7]


def test_rules_need_no_tensorflow():
  code = (
    'import sys, tests.experiment_test as t; '
    't.test_an_experiment_that_breaks_no_rule_is_accepted(); '
    "print({'tensorflow', 'seqio'} & set(sys.modules))"
  )

  finished = subprocess.run(
    [sys.executable, '-c', code],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    check=True,
  )

  assert finished.stdout.strip() == 'set()'


# --- Several teachers ---------------------------------------------------------

PATHS = {'math': 'm', 'code': 'c'}
AVERAGED = teachers.averaged(PATHS)


def test_a_setting_of_several_teachers_is_shared_or_has_their_names():
  teacher = experiment_lib.Teacher(
    checkpoint_path=PATHS,
    dtype={'math': 'bfloat16', 'code': None},
    parameter_partitioning_dims=2,
  )

  assert teacher.names == ['code', 'math']
  assert teacher.named['math'] == experiment_lib.Teacher(
    checkpoint_path='m', dtype='bfloat16', parameter_partitioning_dims=2
  )
  assert teacher.named['code'].dtype is None
  assert teacher.of_the_reward.parameter_partitioning_dims == 2


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'dtype': {'math': None}}, 'Teacher.dtype has the names math, but'),
    (
      {'dtype': {'math': 'int8', 'code': None}},
      "Teacher 'math': .*dtype must be",
    ),
    ({'checkpoint_path': {'a/b': 'x'}}, "a teacher named 'a/b'"),
    ({'checkpoint_path': {'a': 3}}, "Teacher 'a': .* must be a path, .* 3"),
    ({'checkpoint_path': {}}, 'must be a path, .* got {}'),
    ({'checkpoint_path': 'x', 'dtype': {'a': None}}, 'must be {name: path}'),
  ],
)
def test_settings_of_several_teachers_that_do_not_fit(settings, message):
  with pytest.raises(ValueError, match=message):
    experiment_lib.Teacher(**({'checkpoint_path': PATHS} | settings))


@pytest.mark.parametrize(
  ('teacher', 'names', 'changes', 'message'),
  [
    (
      teachers.checkpoint(),
      ['a', 'b'],
      {},
      'names several teachers, a, b, but',
    ),
    (teachers.ema(), ['a', 'b'], {}, 'names several teachers, a, b, but'),
    (AVERAGED, [], {}, 'TEACHER_CHECKPOINT_PATH has no names'),
    (AVERAGED, ['code'], {}, 'combines the teachers code, math, but'),
    (teachers.guided(3.0), [], {}, 'both would be equal'),
    (teachers.routed(PATHS), [*PATHS], {}, 'examples to, code, math; got none'),
    (AVERAGED, [*PATHS], {'teachers': PATHS}, 'none; got code, math'),
  ],
)
def test_teachers_that_do_not_fit_the_run(teacher, names, changes, message):
  dataset = dataclasses.replace(DATASET, **changes)

  with pytest.raises(ValueError, match=message):
    experiment_lib.check_teachers(teacher, names, [dataset])


def test_each_of_several_teachers_needs_a_checkpoint():
  experiment = experiments.experiment(
    **SETTINGS
    | {
      'method_teacher': AVERAGED,
      'teacher_checkpoint_path': {'math': 'm', 'code': None},
    }
  )

  experiment_lib.check(experiment, with_checkpoints=False)
  with pytest.raises(ValueError, match=r"TEACHER_CHECKPOINT_PATH\['code'\]"):
    experiment_lib.check(experiment)
