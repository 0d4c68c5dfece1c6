# SPDX-License-Identifier: Apache-2.0
"""Makes experiments from flat settings, which tests change one at a time."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

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


_compiled = {}


@contextlib.contextmanager
def compiled_once(experiment: experiment_lib.Experiment) -> Iterator[None]:
  """Within it a step is not compiled again that an equal experiment had.

  Tracing takes most of the time of a tiny run. Equal are parts made of the same
  objects: `policies.student()` is another one each time.
  """
  compile_step = build.compile_step

  def compile_or_find(train_step, *arguments):
    parts = {
      field.name: getattr(experiment, field.name)
      for field in dataclasses.fields(experiment)
      if field.name not in ('data', 'schedule', 'evaluation', 'keep')
    }
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), arguments)
    schedule = experiment.schedule
    key = (*parts.values(), schedule.seed, schedule.total_steps, str(shapes))
    if key not in _compiled:
      _compiled[key] = compile_step(train_step, *arguments)
    return _compiled[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, 'compile_step', compile_or_find)
    yield


STUDENT = T5Config(264, 12, 2, 4, 10, 1, 1)
NLI = functools.partial(
  entailment.entailment, premise='p:', hypothesis=' h:', entailed='1'
)


def learning_from(reward, **changes):
  """Settings of a run with a reward and no divergence."""
  settings = {
    'student': STUDENT,
    'policy': policies.student(),
    'objective': objectives.Objective(divergence_weight=0.0),
    'credit': credit.reinforce(reward, 1.0),
  }
  return settings | changes
