# SPDX-License-Identifier: Apache-2.0
"""Builds what an experiment names: models from checkpoints, and the step.

Training, evaluation, inference and planning open checkpoints and make models
here alone.
"""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from gkd_jax.batch import Batch, SpecialIds
from gkd_jax.checkpoints import checkpoint, pretrained
from gkd_jax.data import datasets, predictions, vocabularies
from gkd_jax.distill import rewards
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.state import Frozen, TrainState
from gkd_jax.experiment import Data, Experiment
from gkd_jax.models import interface, registry
from gkd_jax.models.interface import ModelConfig
from gkd_jax.models.layer_stack import stack_layers
from gkd_jax.models.params import (
  abstract_params,
  count_params,
  init_params,
)
from gkd_jax.parallel import partitioning
from gkd_jax.runtime import console

Params = Any


class Task(NamedTuple):
  """What models need to know of a task.

  Attributes:
    vocabulary: seqio's.
    description: of the vocabulary, in one line; see `vocabularies.describe`.
    ids: the special ids of a model with this vocabulary.
  """

  vocabulary: Any
  description: str
  ids: SpecialIds


class Model(NamedTuple):
  """A model and its parameters.

  Attributes:
    module: that computes.
    params: arrays; or, in planning, shapes, dtypes and shardings.
    folder: that the parameters came from.
  """

  module: interface.Model
  params: Params
  folder: epath.Path | None = None


NO_MODEL = Model(None, None)


# --- The task -----------------------------------------------------------------


def open_task(dataset: datasets.DatasetConfig, config: ModelConfig) -> Task:
  """Opens a task's vocabulary.

  Args:
    dataset: of the task.
    config: of the model that reads and writes it.

  Raises:
    ValueError: there is no such task, or the model's ids are others.
  """
  vocabulary = datasets.get_vocabulary(dataset)
  return Task(
    vocabulary,
    vocabularies.describe(vocabulary),
    datasets.special_ids(dataset, vocabulary, config),
  )


def check_data(experiment: Experiment, task: Task) -> None:
  """Checks the data of an experiment, of which it reads the first examples.

  Raises:
    ValueError: the student has too few embeddings for the task's vocabulary, a
      split is empty, or the student would be evaluated on what a model wrote
      for its training.
  """
  train, evaluated = experiment.data.train, experiment.evaluation.all_datasets
  embeds = experiment.student.config.vocab_size
  if task.ids.num_ids > embeds:
    raise ValueError(
      f'The student embeds {embeds} ids, but the vocabulary of task '
      f'{train.mixture_or_task_name!r} has {task.ids.num_ids}. Set VOCAB_SIZE '
      'to that or more (or, where a checkpoint gives the shape, '
      'VOCABULARY_EXTRA_IDS to fewer).'
    )
  for dataset in (train, *evaluated):
    datasets.check_not_empty(dataset)
  if train.predictions is None:
    return
  for split in predictions.splits_of(train.predictions):
    if split in [dataset.split for dataset in evaluated]:
      raise ValueError(
        f'TRAIN_ON_PREDICTIONS {train.predictions} was written for the split '
        f'{split!r}, on which this run is evaluated. Let the teacher write for '
        'the training split: INFER_SPLIT.'
      )


def data_shards(data: Data, mesh: Mesh) -> dict[str, Any]:
  """Returns which part of the data this host reads, for `TrainIterator`.

  Raises:
    ValueError: the shards do not divide the batch into whole parts of hosts.
  """
  batch_size, num_shards = data.train.batch_size, data.num_shards
  first, end = partitioning.rows_of_host(batch_size, mesh)
  if num_shards is None:
    num_shards = batch_size // (end - first)
  rows = batch_size // num_shards
  if batch_size % num_shards or first % rows or end % rows:
    raise ValueError(
      f'experiment.Data.num_shards {num_shards} must divide BATCH_SIZE '
      f'{batch_size} into parts of which each host has whole ones; this one '
      f'has rows {first} to {end - 1}.'
    )
  return {
    'shards': range(first // rows, end // rows),
    'num_shards': num_shards,
    'saves': partitioning.is_first_host_of_rows(batch_size, mesh),
  }


# --- Checkpoints --------------------------------------------------------------


class Sources(NamedTuple):
  """Checkpoints of an experiment, of which the headers were read.

  Attributes:
    student: None: it starts from random parameters.
    teacher: None: there is none.
    reward: None: the reward has no model.
  """

  student: pretrained.Pretrained | None
  teacher: pretrained.Pretrained | None
  reward: pretrained.Pretrained | None

  @property
  def folders(self) -> list[epath.Path]:
    """Folders whose tokenizer is the student's, its own first."""
    return [x.folder for x in (self.student, self.teacher) if x is not None]


def open_sources(experiment: Experiment, task: Task) -> Sources:
  """Opens the checkpoints of an experiment; reads their headers alone.

  Raises:
    ValueError: one is missing, or its shape or vocabulary does not fit.
  """

  def source(path, setting, config, config_setting):
    if path is None:
      return None
    return open_source(path, task, setting, config, config_setting)

  student, teacher = experiment.student, experiment.teacher
  reward = experiment.reward_model
  # The teacher first: its error is the most likely one.
  opened = source(
    teacher.checkpoint_path,
    'TEACHER_CHECKPOINT_PATH',
    teacher.config,
    'experiment.Teacher.config (None takes any)',
  )
  return Sources(
    teacher=opened,
    student=source(
      student.initial_checkpoint_path,
      'INITIAL_CHECKPOINT_PATH',
      student.config,
      'STUDENT',
    ),
    reward=source(
      reward.checkpoint_path,
      'REWARD_CHECKPOINT_PATH',
      reward.config,
      'experiment.RewardModel.config (None takes any)',
    ),
  )


def open_source(
  path: str,
  task: Task,
  setting: str = 'CHECKPOINT_PATH',
  config: ModelConfig | None = None,
  config_setting: str = 'STUDENT',
) -> pretrained.Pretrained:
  """Opens a checkpoint of a task's vocabulary; reads its header alone.

  Args:
    path: see `pretrained.open_checkpoint`.
    task: whose vocabulary it must have.
    setting: name of the path in gin.
    config: shape that it must have; None: any.
    config_setting: name of this shape in gin.

  Raises:
    ValueError: there is no checkpoint, or it does not fit.
  """
  source = pretrained.open_checkpoint(path, setting)
  pretrained.check_fits(
    source, task.description, task.ids, config, config_setting
  )
  return source


def open_model_and_task(
  path: str, dataset: datasets.DatasetConfig
) -> tuple[pretrained.Pretrained, Task]:
  """Opens the checkpoint of a model that is evaluated, and its task.

  Args:
    path: see `pretrained.open_checkpoint`.
    dataset: of the task.

  Raises:
    ValueError: there is no checkpoint or task, or they do not fit each other.
  """
  source = pretrained.open_checkpoint(path)
  task = open_task(dataset, source.config)
  pretrained.check_fits(source, task.description, task.ids)
  return source, task


def make_model(config: ModelConfig, mesh: Mesh) -> interface.Model:
  """Makes a model that is placed on a mesh by the standard rules."""
  return registry.make_model(config, partitioning.Placement(mesh))


def load_model(
  source: pretrained.Pretrained, mesh: Mesh, dtype: str | None = None
) -> Model:
  """Loads a model as its checkpoint describes it, and logs what it is.

  Args:
    source: see `open_source`.
    mesh: that it is placed on.
    dtype: of the parameters; None: as saved.
  """
  console.log(f'Model: {source}')
  module = make_model(source.config, mesh)
  params = source.load(abstract_params(module), dtype)
  return Model(module, params, source.folder)


# --- Models beside the student ------------------------------------------------


def _make_frozen_model(
  config: ModelConfig, experiment: Experiment, mesh: Mesh
) -> interface.Model:
  """Returns a model that computes in the student's dtype, compiled as it is."""
  student = experiment.student.config
  config = dataclasses.replace(
    config, dtype=student.dtype, scan_layers=student.scan_layers
  )
  return registry.make_model(
    config, partitioning.Placement(mesh, experiment.teacher.axis_rules)
  )


def load_frozen(
  source: pretrained.Pretrained | None,
  dtype: str | None,
  experiment: Experiment,
  mesh: Mesh,
) -> Model:
  """Loads a model that no step changes: teacher or the reward's.

  Args:
    source: its checkpoint; None: there is no such model.
    dtype: of the parameters; None: as saved.
    experiment: whose student it computes beside.
    mesh: that it is placed on.
  """
  if source is None:
    return NO_MODEL
  module = _make_frozen_model(source.config, experiment, mesh)
  params = source.load(abstract_params(module), dtype)
  if module.config.scan_layers:
    params = stack_layers(params)
  return Model(module, params, source.folder)


def plan_frozen(
  config: ModelConfig | None,
  dtype: str | None,
  experiment: Experiment,
  mesh: Mesh,
) -> Model:
  """Returns what `load_frozen` does, with shapes for parameters.

  Args:
    config: of the model; None: there is no such model.
    dtype: of the parameters; None: float32.
    experiment: whose student it computes beside.
    mesh: that it is placed on.
  """
  if config is None:
    return NO_MODEL
  module = _make_frozen_model(config, experiment, mesh)
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, dtype or 'float32', sharding=x.sharding
    ),
    abstract_params(module),
  )
  if module.config.scan_layers:
    params = stack_layers(params)
  return Model(module, params)


class Models(NamedTuple):
  """The models of a run."""

  student_params: Params
  teacher: Model
  reward: Model

  @property
  def frozen(self) -> Frozen:
    """The parameters that no step changes."""
    return Frozen(self.teacher.params, self.reward.params)


def load_models(
  experiment: Experiment, plan: 'Plan', sources: Sources, mesh: Mesh
) -> Models:
  """Loads the parameters of all models of a run, and logs what they are."""
  teacher = load_frozen(
    sources.teacher, experiment.teacher.dtype, experiment, mesh
  )
  if sources.teacher is not None:
    console.log(f'Teacher: {sources.teacher}')
  reward = load_frozen(
    sources.reward, experiment.reward_model.dtype, experiment, mesh
  )
  if sources.reward is not None:
    console.log(f'Reward: {sources.reward}')
  student_params = _initial_params(experiment, plan, sources.student)
  return Models(student_params, teacher, reward)


def plan_score(
  experiment: Experiment, task: Task, sources: Sources, mesh: Mesh
) -> rewards.Score | None:
  """Makes the reward's function, before its model is loaded."""
  model = NO_MODEL
  if sources.reward is not None:
    model = plan_frozen(
      sources.reward.config, experiment.reward_model.dtype, experiment, mesh
    )
  return make_score(
    experiment.method.reward, task, model, experiment.data.train
  )


def make_score(
  reward: rewards.Reward | None,
  task: Task,
  model: Model,
  dataset: datasets.DatasetConfig,
) -> rewards.Score | None:
  """Makes a reward's function for a task, and traces it once.

  Args:
    reward: None: there is none.
    task: whose outputs it scores.
    model: of the reward; `NO_MODEL` where it has none.
    dataset: gives the shape of a batch.

  Raises:
    ValueError: the reward does not suit the vocabulary, or returns no scores.
  """
  if reward is None:
    return None
  score = reward.make_score(task.vocabulary, task.ids, model.module)
  rewards.check_score(
    score,
    model.params,
    batch_size=dataset.batch_size,
    lengths=dataset.task_feature_lengths,
  )
  return score


# --- The student, and its step ------------------------------------------------


class Plan(NamedTuple):
  """What a run compiles, as far as no file need be read.

  Attributes:
    student: the model that learns.
    optimizer: of its parameters.
    state: shapes, dtypes and shardings of the training state.
  """

  student: interface.Model
  optimizer: optax.GradientTransformation
  state: TrainState


def make_plan(experiment: Experiment, mesh: Mesh) -> Plan:
  """Makes the student and its optimizer.

  Raises:
    ValueError: the batch cannot be sharded over the mesh, or the optimizer is
      none.
  """
  check_mesh(experiment, mesh)
  student = experiment.student
  module = registry.make_model(
    student.config, partitioning.Placement(mesh, student.axis_rules)
  )
  optimizer = experiment.optimization.make_optimizer(
    experiment.schedule.total_steps
  )
  state = state_lib.abstract_state(
    abstract_params(module),
    optimizer,
    mesh,
    experiment.method,
    batch=abstract_batch(experiment.data.train, mesh),
  )
  return Plan(module, optimizer, state)


def check_mesh(experiment: Experiment, mesh: Mesh) -> None:
  """Raises ValueError if devices would get different numbers of rows."""
  for dataset in experiment.evaluation.all_datasets:
    partitioning.check_rows_divide('EVAL_BATCH_SIZE', dataset.batch_size, mesh)
  batch_size = experiment.data.train.batch_size
  parts = experiment.optimization.num_microbatches
  if batch_size % (parts * mesh.shape['data']):
    raise ValueError(
      f'BATCH_SIZE {batch_size} must be divisible by '
      f'experiment.Optimization.num_microbatches {parts} times the '
      f'{mesh.shape["data"]} devices of the data axis.'
    )


def make_train_step(
  experiment: Experiment,
  plan: Plan,
  *,
  teacher: interface.Model | None,
  ids: SpecialIds,
  score: rewards.Score | None,
) -> step_lib.TrainStep:
  """Makes the step of an experiment; see `step.make_train_step`."""
  return step_lib.make_train_step(
    student=plan.student,
    teacher=teacher,
    method=experiment.method,
    optimizer=plan.optimizer,
    ids=ids,
    seed=experiment.schedule.seed,
    num_microbatches=experiment.optimization.num_microbatches,
    score=score,
  )


def abstract_batch(dataset: datasets.DatasetConfig, mesh: Mesh) -> Batch:
  """Returns shapes, dtypes and shardings of a global batch."""
  sharding = partitioning.batch_sharding(mesh)

  def rows(feature, dtype):
    shape = (dataset.batch_size, dataset.task_feature_lengths[feature])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  return Batch(
    encoder_input_tokens=rows('inputs', jnp.int32),
    decoder_target_tokens=rows('targets', jnp.int32),
    decoder_loss_weights=rows('targets', jnp.float32),
  )


def _initial_params(
  experiment: Experiment, plan: Plan, source: pretrained.Pretrained | None
) -> Params:
  """Loads or initialises the student's parameters, and logs which."""
  if source is not None:
    params = source.load(plan.state.params, 'float32')
    console.log(f'Student: {source}')
    return params
  params = jax.jit(
    lambda: init_params(plan.student, jax.random.key(experiment.schedule.seed)),
    out_shardings=shardings(plan.state.params),
  )()
  console.log(
    f'Student: {registry.describe(experiment.student.config)}, '
    f'{count_params(params):,} float32 parameters, from random initialisation'
  )
  return params


def initial_state(
  experiment: Experiment, plan: Plan, params: Params, mesh: Mesh
) -> TrainState:
  """Returns the state before the first step. It holds `params`."""
  init = functools.partial(
    state_lib.init_state,
    optimizer=plan.optimizer,
    method=experiment.method,
    batch=abstract_batch(experiment.data.train, mesh),
    seed=experiment.schedule.seed,
  )
  return jax.jit(init, out_shardings=shardings(plan.state))(params)


def compile_step(
  train_step: step_lib.TrainStep,
  state: TrainState,
  frozen: Frozen,
  batch: Batch,
) -> jax.stages.Compiled:
  """Compiles a step for the devices that its arguments lie on.

  Args: those of the step, as arrays, or as shapes, dtypes and shardings. The
    state is donated.
  """
  jitted = jax.jit(
    train_step, donate_argnums=0, out_shardings=(shardings(state), None)
  )
  return jitted.lower(state, frozen, batch).compile()


def shardings(tree: Any) -> Any:
  """Returns the sharding of each leaf."""
  return jax.tree.map(lambda x: x.sharding, tree)


def open_checkpoints(
  experiment: Experiment, task: Task, run_dir: pathlib.Path
) -> checkpoint.Checkpoints:
  """Opens the checkpoints of a run."""
  keep = experiment.keep
  return checkpoint.Checkpoints(
    run_dir,
    checkpoint.ModelDescription(experiment.student.config, task.description),
    keep=keep.last,
    best_metric=keep.best_metric,
    best_mode=keep.best_mode,
  )
