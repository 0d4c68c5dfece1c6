# SPDX-License-Identifier: Apache-2.0
"""Makes experiments from flat settings, which tests change one at a time."""

import contextlib
import dataclasses
import functools
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import gin
import jax
import pytest

from gkd_jax import build
from gkd_jax import experiment as experiment_lib
from gkd_jax.decoding import sampler
from gkd_jax.distill import credit, entailment, objectives, policies
from gkd_jax.models.t5 import T5Config

# The student of runs that a teacher of its shape teaches.
STUDENT = T5Config(264, 12, 2, 4, 10, 1, 1, dropout_rate=0.1)

# Setting -> (part of an experiment, its field).
FIELDS = {
  'student': ('student', 'config'),
  'initial_checkpoint_path': ('student', 'initial_checkpoint_path'),
  'teacher': ('teacher', 'config'),
  'teacher_checkpoint_path': ('teacher', 'checkpoint_path'),
  'teacher_dtype': ('teacher', 'dtype'),
  'reward_model': ('reward_model', 'config'),
  'reward_checkpoint_path': ('reward_model', 'checkpoint_path'),
  'reward_dtype': ('reward_model', 'dtype'),
  'policy': ('method', 'policy'),
  'method_teacher': ('method', 'teacher'),
  'objective': ('method', 'objective'),
  'credit': ('method', 'credit'),
  'student_sampler': ('method', 'student_sampler'),
  'teacher_sampler': ('method', 'teacher_sampler'),
  'teacher_drafting': ('method', 'teacher_drafting'),
  'train_dataset': ('data', 'train'),
  'num_data_shards': ('data', 'num_shards'),
  'optimizer': ('optimization', 'optimizer'),
  'learning_rate': ('optimization', 'schedule'),
  'max_grad_norm': ('optimization', 'max_grad_norm'),
  'num_microbatches': ('optimization', 'num_microbatches'),
  'total_steps': ('schedule', 'total_steps'),
  'seed': ('schedule', 'seed'),
  'eval_period': ('schedule', 'eval_period'),
  'checkpoint_period': ('schedule', 'checkpoint_period'),
  'log_period': ('schedule', 'log_period'),
  'max_skipped_steps': ('schedule', 'max_skipped_steps'),
  'eval_dataset': ('evaluation', 'validation'),
  'final_eval_dataset': ('evaluation', 'test'),
  'decodings': ('evaluation', 'decodings'),
  'as_draft': ('evaluation', 'as_draft'),
  'keep_checkpoints': ('keep', 'last'),
  'best_metric': ('keep', 'best_metric'),
  'best_mode': ('keep', 'best_mode'),
}


@dataclasses.dataclass(frozen=True)
class GivenMesh:
  """A mesh of devices that a test chooses."""

  mesh: jax.sharding.Mesh

  def make(self, devices=None):
    del devices
    return self.mesh


def experiment(
  mesh: Callable[[], jax.sharding.Mesh] | None = None,
  optimization: experiment_lib.Optimization | None = None,
  **settings: Any,
) -> experiment_lib.Experiment:
  """Makes an experiment that evaluates with greedy decoding alone.

  Args:
    mesh: () -> mesh; None: of all devices.
    optimization: in place of the settings that it has.
    settings: names as in FIELDS.
  """
  parts = {name: {} for name in experiment_lib.PARTS}
  parts['evaluation']['decodings'] = {'greedy': sampler.GREEDY}
  for name, value in settings.items():
    part, field = FIELDS[name]
    parts[part][field] = value
  made = {
    name: kind(**parts[name]) for name, kind in experiment_lib.PARTS.items()
  }
  if optimization is not None:
    made['optimization'] = optimization
  if mesh is not None:
    made['mesh'] = GivenMesh(mesh())
  return experiment_lib.Experiment(**made)


_compiled = {}  # what determines a step -> the compiled step
_kept = []  # objects that are known by their id
# Settings of gin that no step depends on.
NOT_OF_THE_STEP = re.compile(
  r'#|$|import |MODEL_DIR|EVAL|FINAL_EVAL|CHECKPOINT_PERIOD|BEST_|TRAIN_NUM_'
  r'|(INITIAL|TEACHER)_CHECKPOINT_PATH|(final_)?eval/|experiment.Keep|run_folder.'
)


@contextlib.contextmanager
def steps_compiled_once(*, made_by_gin: bool) -> Iterator[None]:
  """Within it no step is compiled again that an equal experiment had.

  Tracing takes most of the time of a tiny run.

  Args:
    made_by_gin: whether gin makes the experiments, else Python does.
  """
  of_the_step = _settings_of_the_step if made_by_gin else _parts_of_the_step
  make_train_step, compile_step = build.make_train_step, build.compile_step
  keys = {}

  def make_and_remember(experiment, plan, *, reward_fn, **settings):
    step = make_train_step(experiment, plan, reward_fn=reward_fn, **settings)
    keys[step] = (*of_the_step(experiment), plan.student, str(settings))
    return step

  def compile_or_find(train_step, *arguments):
    if train_step not in keys:
      return compile_step(train_step, *arguments)
    kinds = jax.tree.map(
      lambda x: (x.shape, x.dtype.name, x.sharding), arguments
    )
    key = (*keys[train_step], str(kinds))
    if key not in _compiled:
      _compiled[key] = compile_step(train_step, *arguments)
    return _compiled[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, 'make_train_step', make_and_remember)
    patch.setattr(build, 'compile_step', compile_or_find)
    yield


@contextlib.contextmanager
def all_steps_compiled() -> Iterator[None]:
  """Within it `steps_compiled_once` finds nothing."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys.modules[__name__], '_compiled', {})
    yield


def _settings_of_the_step(experiment: experiment_lib.Experiment) -> tuple:
  """Returns gin's settings that determine a step: equal if the step is.

  The functions that gin makes read their settings when they are called.
  """
  del experiment
  lines = gin.config_str(max_line_length=10**6).splitlines()
  assert lines, 'gin made no experiment'
  return tuple(x for x in lines if not NOT_OF_THE_STEP.match(x))


def _parts_of_the_step(experiment: experiment_lib.Experiment) -> tuple:
  """Returns the parts of an experiment that determine its step."""
  schedule, optimization = experiment.schedule, experiment.optimization
  return _description(
    (
      experiment.method,
      experiment.reward_model,
      optimization,
      schedule.seed,
      optimization.schedule or schedule.total_steps,
    )
  )


def _description(x: Any) -> Any:
  """Returns a key of a setting; equal keys are of settings that do the same."""
  if isinstance(x, types.FunctionType):
    cells = [cell.cell_contents for cell in x.__closure__ or ()]
    keywords = tuple((x.__kwdefaults__ or {}).items())
    return x.__code__, _description((*cells, x.__defaults__, keywords))
  if isinstance(x, functools.partial):
    return _description((x.func, x.args, *x.keywords.items()))
  if dataclasses.is_dataclass(x) and not isinstance(x, type):
    return type(x), _description(tuple(vars(x).values()))
  if isinstance(x, tuple):
    return type(x), *map(_description, x)
  if isinstance(x, type(None) | bool | int | float | str):
    return type(x), x
  _kept.append(x)
  return id(x)


NLI = functools.partial(
  entailment.entailment, premise='p:', hypothesis=' h:', entailed='1'
)


def learning_from(reward, **changes):
  """Settings of a run with a reward and no divergence."""
  settings = {
    'student': dataclasses.replace(STUDENT, dropout_rate=0.0),
    'policy': policies.student(),
    'objective': objectives.Objective(divergence_weight=0.0),
    'credit': credit.reinforce(reward, 1.0),
  }
  return settings | changes
