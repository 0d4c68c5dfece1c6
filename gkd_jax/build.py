# SPDX-License-Identifier: Apache-2.0
"""Builds the models of an experiment from checkpoints, and the training step.

Training, evaluation, inference and planning share these functions.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from gkd_jax.batch import Batch, Outputs, SpecialIds
from gkd_jax.checkpoints import checkpoint, pretrained
from gkd_jax.data import datasets, predictions, seqio_tasks, vocabularies
from gkd_jax.distill import rewards
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.state import Frozen, TrainState
from gkd_jax.experiment import Data, Experiment, Teacher, setting_of
from gkd_jax.models import interface, registry
from gkd_jax.models.interface import ModelConfig
from gkd_jax.models.layer_stack import stack_layers
from gkd_jax.models.params import (
  abstract_params,
  count_params,
  init_params,
)
from gkd_jax.parallel import partitioning
from gkd_jax.runtime import console, pins

Params = Any

_TEACHER = 'TEACHER_CHECKPOINT_PATH'
_INITIAL = 'INITIAL_CHECKPOINT_PATH'
_REWARD = 'REWARD_CHECKPOINT_PATH'


class Task(NamedTuple):
  """The vocabulary of a task, and the special ids of a model that uses it.

  Attributes:
    vocabulary: a seqio vocabulary.
    description: of the vocabulary, in one line; see `vocabularies.describe`.
    ids: special ids of the model.
  """

  vocabulary: Any
  description: str
  ids: SpecialIds


class Model(NamedTuple):
  """A model and its parameters.

  Of several teachers all three are {name: ...}.

  Attributes:
    module: see `models.interface`.
    params: arrays; in planning: shapes, dtypes and shardings.
    folder: of the checkpoint.
  """

  module: interface.Model
  params: Params
  folder: epath.Path | None = None


NO_MODEL = Model(None, None)


def together(models: Mapping[str, Model]) -> Model:
  """Returns several teachers as one; the only teacher has the name ''."""
  if [*models] == ['']:
    return models['']
  parts = zip(*models.values(), strict=True)
  return Model(*(dict(zip(models, part, strict=True)) for part in parts))


def apart(model: Model) -> dict[str, Model]:
  """Returns {name: model}, the argument of `together`."""
  if not isinstance(model.module, Mapping):
    return {'': model}
  return {name: Model(*(part[name] for part in model)) for name in model.module}


# --- The task -----------------------------------------------------------------


def open_task(dataset: datasets.DatasetConfig, config: ModelConfig) -> Task:
  """Opens a task's vocabulary.

  Args:
    dataset: of the task.
    config: of the model that reads and writes it.

  Raises:
    ValueError: the task does not exist, or its EOS id is not the model's.
  """
  vocabulary = datasets.get_vocabulary(dataset)
  return Task(
    vocabulary,
    vocabularies.describe(vocabulary),
    datasets.special_ids(dataset, vocabulary, config),
  )


def check_data(experiment: Experiment, task: Task, num_shards: int) -> None:
  """Checks the data of an experiment. Reads the first examples of each split.

  Args:
    experiment: all its settings.
    task: of the experiment.
    num_shards: into which the training data is split. If the examples name
      their teachers or have weights, all examples are read.

  Raises:
    ValueError: the vocabulary is larger than the student's embedding, a split
      is empty or has fewer examples than shards, an example names an unknown
      teacher or has no weight, or the student would be evaluated on the split
      for which its training outputs (TRAIN_ON_PREDICTIONS) were written.
  """
  train, evaluated = experiment.data.train, experiment.evaluation.all_datasets
  embeds = experiment.student.config.vocab_size
  if task.ids.num_ids > embeds:
    raise ValueError(
      f'The student embeds {embeds} ids, but the vocabulary of task '
      f'{train.mixture_or_task_name!r} has {task.ids.num_ids}. Set VOCAB_SIZE '
      'to that or more. If a checkpoint determines the shape, reduce '
      'VOCABULARY_EXTRA_IDS instead.'
    )
  datasets.check_not_empty(train, num_shards)
  for dataset in evaluated:
    datasets.check_not_empty(dataset)
  for dataset in (train, *evaluated):
    datasets.check_teachers(dataset)
  datasets.check_row_weights(train)
  if train.predictions is None:
    return
  for split in predictions.splits_of(train.predictions):
    if split in [dataset.split for dataset in evaluated]:
      raise ValueError(
        f'TRAIN_ON_PREDICTIONS {train.predictions} was written for the split '
        f'{split!r}, on which this run is evaluated. Run --run_mode=infer on '
        'the training split (INFER_SPLIT).'
      )


def data_shards(data: Data, mesh: Mesh) -> dict[str, Any]:
  """Returns the arguments of `TrainIterator` that select this host's shards.

  Raises:
    ValueError: the shards do not divide the batch, or one spans two hosts.
  """
  batch_size, num_shards = data.train.batch_size, data.num_shards
  first, end = partitioning.rows_of_host(batch_size, mesh)
  if num_shards is None:
    num_shards = batch_size // (end - first)
  rows = batch_size // num_shards
  if batch_size % num_shards or first % rows or end % rows:
    raise ValueError(
      f'experiment.Data.num_shards {num_shards} must divide BATCH_SIZE '
      f'{batch_size} into shards that each lie on one host; this host has rows '
      f'{first} to {end - 1}.'
    )
  return {
    'shards': range(first // rows, end // rows),
    'num_shards': num_shards,
    'saves': partitioning.is_first_host_of_rows(batch_size, mesh),
  }


# --- Checkpoints --------------------------------------------------------------


class Sources(NamedTuple):
  """The open checkpoints of an experiment; only their headers are read.

  Attributes:
    student: None: random initialisation.
    teachers: {name: checkpoint}; the only teacher has the name ''.
    reward: None: no reward model.
  """

  student: pretrained.Pretrained | None
  teachers: Mapping[str, pretrained.Pretrained]
  reward: pretrained.Pretrained | None

  @property
  def folders(self) -> list[epath.Path]:
    """Folders that hold the student's tokenizer files, the student's first."""
    found = (self.student, *self.teachers.values())
    return [x.folder for x in found if x is not None]


def open_sources(experiment: Experiment, task: Task) -> Sources:
  """Opens the checkpoints of an experiment; reads only their headers.

  Raises:
    ValueError: a checkpoint is missing, or has another shape or vocabulary.
  """

  def source(path, setting, config, config_setting):
    if path is None:
      return None
    return open_source(path, task, setting, config, config_setting)

  student, reward = experiment.student, experiment.reward_model
  # The teachers first, because errors in their settings are the most likely.
  opened = {
    name: source(
      one.checkpoint_path,
      setting_of(_TEACHER, name),
      one.config,
      'experiment.Teacher.config (None takes any)',
    )
    for name, one in experiment.teacher.named.items()
    if one.checkpoint_path is not None
  }
  return Sources(
    teachers=opened,
    student=source(
      student.initial_checkpoint_path,
      _INITIAL,
      student.config,
      'STUDENT',
    ),
    reward=source(
      reward.checkpoint_path,
      _REWARD,
      reward.config,
      'experiment.RewardModel.config (None takes any)',
    ),
  )


def with_pinned_steps(
  experiment: Experiment, pinned: pins.Pins | None
) -> Experiment:
  """Returns an experiment with the checkpoints that its run started with.

  A teacher may be a run that is trained on meanwhile.

  Args:
    experiment: of the run.
    pinned: see `pins.read`; None: the run starts now.

  Raises:
    ValueError: such a checkpoint has been removed.
  """

  def at(setting, path):
    return pins.pinned_path(pinned, setting, path)

  student, teacher = experiment.student, experiment.teacher
  reward = experiment.reward_model
  paths = {
    name: at(setting_of(_TEACHER, name), one.checkpoint_path)
    for name, one in teacher.named.items()
  }
  return dataclasses.replace(
    experiment,
    student=dataclasses.replace(
      student,
      initial_checkpoint_path=at(_INITIAL, student.initial_checkpoint_path),
    ),
    teacher=dataclasses.replace(
      teacher, checkpoint_path=paths if teacher.names else paths['']
    ),
    reward_model=dataclasses.replace(
      reward, checkpoint_path=at(_REWARD, reward.checkpoint_path)
    ),
  )


def pin(
  experiment: Experiment, task: Task, sources: Sources
) -> dict[str, pins.Pin]:
  """Pins the files that an experiment depends on; see `runtime.pins`.

  Args:
    experiment: with the paths that its settings have.
    task: of the experiment.
    sources: of the experiment.
  """
  train = experiment.data.train
  teachers = experiment.teacher.named
  checkpoints = (
    *(
      (setting_of(_TEACHER, name), source, teachers[name].checkpoint_path)
      for name, source in sources.teachers.items()
    ),
    (_INITIAL, sources.student, experiment.student.initial_checkpoint_path),
    (_REWARD, sources.reward, experiment.reward_model.checkpoint_path),
  )
  pinned = pin_data(task, train, *experiment.evaluation.all_datasets)
  return pinned | {
    setting: pretrained.pin(source, path)
    for setting, source, path in checkpoints
    if source is not None
  }


def pin_data(
  task: Task, *all_datasets: datasets.DatasetConfig
) -> dict[str, pins.Pin]:
  """Pins the files of datasets of a task, and its vocabulary."""
  pinned = {}
  if (file := vocabularies.file_of(task.vocabulary)) is not None:
    pinned['VOCABULARY_PATH'] = pins.of_file(file)
  data = {path for one in all_datasets for path in datasets.files_of(one)}
  if data:
    name = all_datasets[0].mixture_or_task_name
    pinned[f'data of task {name}'] = pins.of_files(sorted(data))
  for dataset in all_datasets:
    if dataset.predictions is not None:
      paths = predictions.files_of(dataset.predictions)
      pinned['TRAIN_ON_PREDICTIONS'] = pins.of_files(paths)
  return pinned


def open_source(
  path: str,
  task: Task,
  setting: str = 'CHECKPOINT_PATH',
  config: ModelConfig | None = None,
  config_setting: str = 'STUDENT',
) -> pretrained.Pretrained:
  """Opens a checkpoint with a task's vocabulary; reads only its header.

  Args:
    path: see `pretrained.open_checkpoint`.
    task: whose vocabulary the checkpoint must have.
    setting: name of the path in gin, for errors.
    config: shape that the checkpoint must have; None: any.
    config_setting: name of this shape in gin, for errors.

  Raises:
    ValueError: the checkpoint is missing, or has another shape or vocabulary.
  """
  source = pretrained.open_checkpoint(path, setting)
  _check_fits(source, task, config, config_setting)
  return source


def open_model_and_task(
  path: str, dataset: datasets.DatasetConfig
) -> tuple[pretrained.Pretrained, Task]:
  """Opens a checkpoint for evaluation or inference, and its task.

  Args:
    path: see `pretrained.open_checkpoint`.
    dataset: of the task.

  Raises:
    ValueError: the checkpoint or the task does not exist, or their
      vocabularies differ.
  """
  source = pretrained.open_checkpoint(path)
  task = open_task(dataset, source.config)
  _check_fits(source, task)
  return source, task


def _check_fits(
  source: pretrained.Pretrained,
  task: Task,
  config: ModelConfig | None = None,
  config_setting: str = 'STUDENT',
) -> None:
  """Raises ValueError unless a checkpoint has a task's vocabulary and shape."""
  # The tokenizer first: ids that differ follow from another tokenizer.
  vocabularies.check_tokenizer(task.vocabulary, source.tokenizer)
  pretrained.check_fits(
    source, task.description, task.ids, config, config_setting
  )


def make_model(config: ModelConfig, mesh: Mesh) -> interface.Model:
  """Makes a model on a mesh, with the standard sharding rules."""
  return registry.make_model(config, partitioning.Placement(mesh))


def load_model(
  source: pretrained.Pretrained, mesh: Mesh, dtype: str | None = None
) -> Model:
  """Loads a model with the shape of its checkpoint, and logs its description.

  Args:
    source: see `open_source`.
    mesh: of the parameters.
    dtype: of the parameters; None: as saved.
  """
  console.log(f'Model: {source}')
  module = make_model(source.config, mesh)
  params = source.load(abstract_params(module), dtype)
  return Model(module, params, source.folder)


# --- Models beside the student ------------------------------------------------


def _make_frozen_model(
  config: ModelConfig, experiment: Experiment, mesh: Mesh, like: Teacher
) -> interface.Model:
  """Makes a teacher or reward model that is run as the student is."""
  student = experiment.student.config
  config = dataclasses.replace(
    config,
    dtype=student.dtype,
    scan_layers=student.scan_layers,
    query_block=student.query_block,
  )
  return registry.make_model(
    config, partitioning.Placement(mesh, like.axis_rules)
  )


def load_frozen(
  source: pretrained.Pretrained | None,
  dtype: str | None,
  experiment: Experiment,
  mesh: Mesh,
  like: Teacher,
) -> Model:
  """Loads a frozen model: a teacher, or the model of the reward.

  Args:
    source: its checkpoint; None: no such model.
    dtype: of the parameters; None: as saved.
    experiment: determines the model's dtype and layer scan.
    mesh: of the parameters.
    like: one teacher, with the model's sharding rules.
  """
  if source is None:
    return NO_MODEL
  module = _make_frozen_model(source.config, experiment, mesh, like)
  params = source.load(abstract_params(module), dtype)
  if module.config.scan_layers:
    params = stack_layers(params)
  return Model(module, params, source.folder)


def plan_frozen(
  config: ModelConfig | None,
  dtype: str | None,
  experiment: Experiment,
  mesh: Mesh,
  like: Teacher,
) -> Model:
  """Returns the result of `load_frozen` with abstract parameters.

  Args:
    config: of the model; None: no such model.
    dtype: of the parameters; None: float32.
    experiment: determines the model's dtype and layer scan.
    mesh: of the parameters.
    like: one teacher, with the model's sharding rules.
  """
  if config is None:
    return NO_MODEL
  module = _make_frozen_model(config, experiment, mesh, like)
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
  """Loads the parameters of all models of a run, and logs their sources."""
  teachers = {}
  for name, one in experiment.teacher.named.items():
    source = sources.teachers.get(name)
    teachers[name] = load_frozen(source, one.dtype, experiment, mesh, one)
    if source is not None:
      console.log(f'Teacher{" " * bool(name)}{name}: {source}')
  reward = load_frozen(
    sources.reward,
    experiment.reward_model.dtype,
    experiment,
    mesh,
    experiment.teacher.of_the_reward,
  )
  if sources.reward is not None:
    console.log(f'Reward: {sources.reward}')
  student_params = _initial_params(experiment, plan, sources.student)
  return Models(student_params, together(teachers), reward)


def plan_reward_fn(
  experiment: Experiment, task: Task, sources: Sources, mesh: Mesh
) -> rewards.RewardFn | None:
  """Makes the reward function before its model is loaded."""
  model = NO_MODEL
  if sources.reward is not None:
    model = plan_frozen(
      sources.reward.config,
      experiment.reward_model.dtype,
      experiment,
      mesh,
      experiment.teacher.of_the_reward,
    )
  return make_reward_fn(
    experiment.method.reward, task, model, experiment.data.train
  )


def make_reward_fn(
  reward: rewards.Reward | None,
  task: Task,
  model: Model,
  dataset: datasets.DatasetConfig,
) -> rewards.RewardFn | None:
  """Makes the reward function for a task, and traces it once.

  Args:
    reward: None: no reward.
    task: the task of the run.
    model: of the reward; `NO_MODEL` if it has none.
    dataset: determines the shape of a batch.

  Raises:
    ValueError: the reward does not support the vocabulary, or does not return
      one number per output.
  """
  if reward is None:
    return None
  reward_fn = reward.make_reward_fn(task.vocabulary, task.ids, model.module)
  rewards.check_reward_fn(
    reward_fn,
    model.params,
    batch_size=dataset.batch_size,
    lengths=dataset.task_feature_lengths,
  )
  return reward_fn


# --- The student, and its step ------------------------------------------------


class Plan(NamedTuple):
  """What a run compiles, as far as its settings determine it.

  Attributes:
    student: the student's module.
    optimizer: of its parameters.
    state: shapes, dtypes and shardings of the training state.
  """

  student: interface.Model
  optimizer: optax.GradientTransformation
  state: TrainState


def make_plan(experiment: Experiment, mesh: Mesh) -> Plan:
  """Makes the student and its optimizer.

  Raises:
    ValueError: the mesh does not divide a batch, or the optimizer is not an
      optax optimizer.
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
  """Raises ValueError unless the mesh divides all batches and microbatches."""
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
  teacher: interface.Model | Mapping[str, interface.Model] | None,
  ids: SpecialIds,
  reward_fn: rewards.RewardFn | None,
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
    reward_fn=reward_fn,
  )


def abstract_batch(dataset: datasets.DatasetConfig, mesh: Mesh) -> Batch:
  """Returns shapes, dtypes and shardings of a global batch."""
  sharding = partitioning.batch_sharding(mesh)

  def rows(feature, dtype):
    shape = (dataset.batch_size, dataset.lengths[feature])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  return Batch(
    encoder_input_tokens=rows('inputs', jnp.int32),
    decoder_target_tokens=rows('targets', jnp.int32),
    decoder_loss_weights=rows('targets', jnp.float32),
    teacher_input_tokens=(
      rows(seqio_tasks.TEACHER_INPUTS, jnp.int32)
      if dataset.has_teacher_inputs
      else None
    ),
    teacher_ids=(
      jax.ShapeDtypeStruct((dataset.batch_size,), jnp.int32, sharding=sharding)
      if dataset.teachers is not None
      else None
    ),
    row_weights=(
      jax.ShapeDtypeStruct(
        (dataset.batch_size,), jnp.float32, sharding=sharding
      )
      if dataset.row_weights
      else None
    ),
    rejected=(
      Outputs(rows('targets', jnp.int32), rows('targets', jnp.float32))
      if dataset.pairs
      else None
    ),
  )


def _initial_params(
  experiment: Experiment, plan: Plan, source: pretrained.Pretrained | None
) -> Params:
  """Loads or initialises the student's parameters, and logs their source."""
  if source is not None:
    params = source.load(plan.state.params, 'float32')
    console.log(f'Student: {source}')
    return params
  params = _init_program(plan.student, experiment.schedule.seed)()
  console.log(
    f'Student: {registry.describe(experiment.student.config)}, '
    f'{count_params(params):,} float32 parameters, from random initialisation'
  )
  return params


@functools.lru_cache(maxsize=4)
def _init_program(student: interface.Model, seed: int) -> Callable[[], Params]:
  """Returns the jitted initialisation, shared by a process's runs."""
  return jax.jit(
    lambda: init_params(student, jax.random.key(seed)),
    out_shardings=shardings(abstract_params(student)),
  )


def initial_state(
  experiment: Experiment, plan: Plan, params: Params, mesh: Mesh
) -> TrainState:
  """Returns the state before the first step. It contains `params`."""
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
  """Compiles a step for the devices of its arguments. The state is donated.

  Args:
    train_step: see `make_train_step`.
    state: arrays, or shapes, dtypes and shardings.
    frozen: likewise.
    batch: likewise.
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
    best_mode=keep.mode,
  )
