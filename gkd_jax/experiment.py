# SPDX-License-Identifier: Apache-2.0
"""An experiment: what a training run is, as one object.

Each part checks its own values when it is made. `RULES` are facts about values
of several parts; `check` reads no file and no device. Settings that depend on
files, the vocabulary or the devices are checked where those are opened.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gkd_jax.checkpoints import pretrained
from gkd_jax.data import datasets
from gkd_jax.decoding import beam_search, sampler
from gkd_jax.distill import rewards, rules
from gkd_jax.distill.methods import Method
from gkd_jax.models.interface import ModelConfig
from gkd_jax.parallel import partitioning

Decoding = sampler.SamplerConfig | beam_search.BeamConfig
DECODINGS: Mapping[str, Decoding] = {
  'greedy': sampler.GREEDY,
  'sampled': sampler.ANCESTRAL,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
  """The model that learns.

  Attributes:
    config: its shape, and how it is executed (dtype, remat, scan).
    initial_checkpoint_path: the parameters that it starts from; see
      `pretrained.open_checkpoint`. None: random ones.
    parameter_partitioning_dims: see `partitioning.standard_logical_axis_rules`.
    activation_partitioning_dims: likewise.
  """

  config: ModelConfig
  initial_checkpoint_path: str | None = None
  parameter_partitioning_dims: int = 1
  activation_partitioning_dims: int = 1

  def __post_init__(self):
    _ = self.axis_rules  # raises

  @property
  def axis_rules(self) -> partitioning.AxisRules:
    """The mesh axes that its arrays are sharded over."""
    return _axis_rules(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
  """The model that is imitated, or only compared with.

  Attributes:
    checkpoint_path: its parameters; None: there is no teacher.
    config: the shape that the checkpoint must have; None: any.
    dtype: of its parameters, 'float32' or 'bfloat16'; None: as saved.
    parameter_partitioning_dims: see `partitioning.standard_logical_axis_rules`.
    activation_partitioning_dims: likewise. Both also hold for the model of the
      reward.
  """

  checkpoint_path: str | None = None
  config: ModelConfig | None = None
  dtype: str | None = None
  parameter_partitioning_dims: int = 1
  activation_partitioning_dims: int = 1

  def __post_init__(self):
    pretrained.check_dtype('experiment.Teacher.dtype', self.dtype)
    _ = self.axis_rules  # raises

  @property
  def axis_rules(self) -> partitioning.AxisRules:
    """The mesh axes that its arrays are sharded over."""
    return _axis_rules(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel:
  """The model of a reward that has one, such as `rewards.entailment`.

  Attributes:
    checkpoint_path: its parameters; it has the task's vocabulary.
    config: the shape that the checkpoint must have; None: any.
    dtype: of its parameters, 'float32' or 'bfloat16'; None: as saved.
  """

  checkpoint_path: str | None = None
  config: ModelConfig | None = None
  dtype: str | None = None

  def __post_init__(self):
    pretrained.check_dtype('experiment.RewardModel.dtype', self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """What the student is trained on.

  Attributes:
    train: task, split and batch.
    num_shards: that the data is divided into, which determines its order; None:
      as many as hosts that have rows of their own. To resume on another number
      of hosts, use one that both divide.
  """

  train: datasets.DatasetConfig
  num_shards: int | None = None

  def __post_init__(self):
    if self.num_shards is not None:
      _check_int('experiment.Data.num_shards', self.num_shards, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
  """The optimizer, its learning rate, and how a batch is worked through.

  By default the rate rises linearly from 0 to its peak, then falls on a cosine
  to `final_learning_rate` at the last step. With a cooldown it stays at its
  peak, then falls linearly to 0, as in the GKD paper.

  Attributes:
    optimizer: called with learning_rate=...; the default has T5X's settings:
      decay 0.8, update clipping 1, steps scaled by the parameters' size.
    learning_rate: the peak; None with a `schedule`.
    warmup_steps: of the linear rise.
    final_learning_rate: after the last step; not with a cooldown.
    cooldown_start: the last step with the peak rate; None: a cosine.
    cooldown_steps: from the peak to 0.
    schedule: step -> rate, in place of the five settings above.
    max_grad_norm: gradients of a larger global norm are scaled down to it.
    num_microbatches: parts that a batch is worked through in, to save memory;
      see `step.make_train_step`.
  """

  optimizer: Callable[..., optax.GradientTransformation] = optax.adafactor
  learning_rate: float | None = None
  warmup_steps: int = 0
  final_learning_rate: float = 0.0
  cooldown_start: int | None = None
  cooldown_steps: int | None = None
  schedule: optax.Schedule | None = None
  max_grad_norm: float | None = None
  num_microbatches: int = 1

  def __post_init__(self):
    if (self.learning_rate is None) == (self.schedule is None):
      raise ValueError(
        'Set either LEARNING_RATE, the peak, or '
        'experiment.Optimization.schedule.'
      )
    for name, rate in (
      ('LEARNING_RATE', self.learning_rate or 0.0),
      (
        'experiment.Optimization.final_learning_rate',
        self.final_learning_rate,
      ),
    ):
      if rate < 0.0:
        raise ValueError(f'{name} must not be negative, got {rate}.')
    _check_int('WARMUP_STEPS', self.warmup_steps, 0)
    if (self.cooldown_start is None) != (self.cooldown_steps is None):
      raise ValueError(
        'experiment.Optimization: cooldown_start and cooldown_steps belong '
        f'together, got {self.cooldown_start} and {self.cooldown_steps}.'
      )
    if self.max_grad_norm is not None and self.max_grad_norm <= 0.0:
      raise ValueError(
        'experiment.Optimization.max_grad_norm must be above 0, or None for no '
        f'clipping; got {self.max_grad_norm}.'
      )
    _check_int(
      'experiment.Optimization.num_microbatches', self.num_microbatches, 1
    )

  def make_schedule(self, total_steps: int) -> optax.Schedule:
    """Returns step -> rate for a run of so many steps."""
    if self.schedule is not None:
      return self.schedule
    if self.cooldown_start is None:
      return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=self.learning_rate,
        warmup_steps=self.warmup_steps,
        decay_steps=total_steps,
        end_value=self.final_learning_rate,
      )
    return optax.join_schedules(
      [
        optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps),
        optax.constant_schedule(self.learning_rate),
        optax.linear_schedule(self.learning_rate, 0.0, self.cooldown_steps),
      ],
      [self.warmup_steps, self.cooldown_start],
    )

  def make_optimizer(self, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer, after the clipping of gradients, if any.

    Raises:
      ValueError: `optimizer` makes no optax optimizer of a learning rate.
    """
    wanted = (
      'experiment.Optimization.optimizer must make an optax optimizer of a '
      'learning rate, as @optax.adafactor does; it '
    )
    try:
      made = self.optimizer(learning_rate=self.make_schedule(total_steps))
    except TypeError as e:
      raise ValueError(f'{wanted}raises TypeError: {e}.') from e
    if not (hasattr(made, 'init') and hasattr(made, 'update')):
      raise ValueError(f'{wanted}returns {made!r}.')
    if self.max_grad_norm is None:
      return made
    return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), made)


class Due(NamedTuple):
  """What happens after a step."""

  step: int
  evaluation: bool
  checkpoint: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """How long the run is, and what happens when.

  Attributes:
    total_steps: of this run, from 0.
    seed: determines initialisation, data order, sampling and dropout.
    eval_period: steps; 0: only after the last one.
    checkpoint_period: steps; 0: only after the last one.
    log_period: steps whose metrics are averaged into one line.
    max_skipped_steps: a step whose loss or gradient is not finite changes
      nothing, and the learning rate's schedule waits. After so many in a row
      the run stops.
  """

  total_steps: int
  seed: int = 0
  eval_period: int = 1000
  checkpoint_period: int = 1000
  log_period: int = 10
  max_skipped_steps: int = 10

  def __post_init__(self):
    for name, value, least in (
      ('TRAIN_STEPS', self.total_steps, 1),
      ('RANDOM_SEED', self.seed, 0),
      ('EVAL_PERIOD', self.eval_period, 0),
      ('CHECKPOINT_PERIOD', self.checkpoint_period, 0),
      ('experiment.Schedule.log_period', self.log_period, 1),
      ('experiment.Schedule.max_skipped_steps', self.max_skipped_steps, 1),
    ):
      _check_int(name, value, least)

  def due(self, step: int) -> Due:
    """Returns what is due after a step."""
    last = step == self.total_steps
    return Due(
      step,
      evaluation=last or _is_multiple(step, self.eval_period),
      checkpoint=last or _is_multiple(step, self.checkpoint_period),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
  """What is measured on which examples.

  Attributes:
    validation: evaluated every `Schedule.eval_period` steps and after the last;
      None: nothing is evaluated during training.
    test: evaluated once, at the end, into eval_<split>.json and
      samples_<split>.json; None: nothing is.
    decodings: {name: how outputs are drawn}.
  """

  validation: datasets.DatasetConfig | None = None
  test: datasets.DatasetConfig | None = None
  decodings: Mapping[str, Decoding] = dataclasses.field(
    default_factory=lambda: DECODINGS
  )

  def __post_init__(self):
    check_decodings(self.decodings)

  @property
  def all_datasets(self) -> list[datasets.DatasetConfig]:
    """The datasets that are evaluated."""
    return [x for x in (self.validation, self.test) if x is not None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
  """Which checkpoints are kept.

  Attributes:
    last: how many of the last ones.
    best_metric: name of a validation metric; the checkpoint that is best by it
      is kept as well.
    best_mode: 'min' or 'max'.
  """

  last: int = 2
  best_metric: str | None = None
  best_mode: str = 'min'

  def __post_init__(self):
    _check_int('experiment.Keep.last', self.last, 1)
    if self.best_mode not in ('min', 'max'):
      raise ValueError(
        f"BEST_MODE must be 'min' or 'max', got {self.best_mode!r}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """The device mesh of a run.

  Attributes:
    data: devices that a batch is sharded over; -1: all.
    model: devices that a parameter is sharded over.
  """

  data: int = -1
  model: int = 1

  def make(self, devices: Sequence[jax.Device] | None = None):
    """Returns the mesh; see `partitioning.make_mesh`."""
    return partitioning.make_mesh(self.data, self.model, devices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What a training run is. `train` and the planning tools take it whole."""

  student: Student
  method: Method
  data: Data
  optimization: Optimization
  schedule: Schedule
  teacher: Teacher = dataclasses.field(default_factory=Teacher)
  reward_model: RewardModel = dataclasses.field(default_factory=RewardModel)
  evaluation: EvaluationPlan = dataclasses.field(default_factory=EvaluationPlan)
  keep: Keep = dataclasses.field(default_factory=Keep)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


PARTS = {field.name: field.type for field in dataclasses.fields(Experiment)}


# --- Facts about values of several parts --------------------------------------


def parts_of_the_method_fit_together(experiment: Experiment) -> None:
  """The rules of methods hold; see `distill.rules`."""
  rules.check(
    rules.Setup(
      experiment.method,
      experiment.student.config.dropout_rate,
      experiment.data.train.batch_size,
      experiment.optimization.num_microbatches,
    )
  )


def divergence_compares_logits_of_the_students_size(
  experiment: Experiment,
) -> None:
  """The divergence maps logits of the vocabulary to a number per token."""
  rules.check_divergence(
    experiment.method, experiment.student.config.vocab_size
  )


def microbatches_divide_the_batch(experiment: Experiment) -> None:
  """All microbatches have one shape."""
  batch_size = experiment.data.train.batch_size
  parts = experiment.optimization.num_microbatches
  if batch_size % parts:
    raise ValueError(
      f'BATCH_SIZE {batch_size} must be divisible by '
      f'experiment.Optimization.num_microbatches {parts}.'
    )


def warmup_ends_before_the_run(experiment: Experiment) -> None:
  """The cosine begins after the warm-up."""
  optimization, total = experiment.optimization, experiment.schedule.total_steps
  is_cosine = optimization.schedule is None
  is_cosine = is_cosine and optimization.cooldown_start is None
  if is_cosine and optimization.warmup_steps >= total:
    raise ValueError(
      f'WARMUP_STEPS is {optimization.warmup_steps}, but TRAIN_STEPS is '
      f'{total}: the warm-up must end before the run does.'
    )


def learning_rates_are_numbers_from_zero(experiment: Experiment) -> None:
  """A schedule gives a number for each step, and never a negative one."""
  total = experiment.schedule.total_steps
  schedule = experiment.optimization.make_schedule(total)
  for step in (0, total // 2, total):
    try:
      rate = rate_at(schedule, step)
    except (TypeError, ValueError) as e:
      raise ValueError(
        'experiment.Optimization.schedule must give a number for each step, as '
        f'@optax.constant_schedule() does: {e}.'
      ) from e
    if rate < 0.0:
      raise ValueError(
        f'The learning rate of step {step} is {rate}: '
        'experiment.Optimization.schedule must not be negative.'
      )


def best_metric_is_measured(experiment: Experiment) -> None:
  """The best checkpoint is chosen among those that were evaluated."""
  best = experiment.keep.best_metric
  if best is not None and experiment.evaluation.validation is None:
    raise ValueError(
      f'BEST_METRIC is {best!r}, but nothing is evaluated during training: '
      'leave EVAL as it is, or set BEST_METRIC = None.'
    )


RULES: tuple[Callable[[Experiment], None], ...] = (
  parts_of_the_method_fit_together,
  divergence_compares_logits_of_the_students_size,
  microbatches_divide_the_batch,
  warmup_ends_before_the_run,
  learning_rates_are_numbers_from_zero,
  best_metric_is_measured,
)


# --- Facts about checkpoints that a run reads, and planning does not ----------


def needed_teacher_has_a_checkpoint(experiment: Experiment) -> None:
  """A divergence, and a policy that lets the teacher write, need a teacher."""
  path = experiment.teacher.checkpoint_path
  if experiment.method.needs_teacher_checkpoint and path is None:
    raise ValueError(
      'This method needs a teacher: set TEACHER_CHECKPOINT_PATH to a run, '
      'Hugging Face or T5X folder.'
    )


def settings_of_the_teacher_have_a_checkpoint(experiment: Experiment) -> None:
  """Without a checkpoint nothing reads the teacher's shape and dtype."""
  teacher = experiment.teacher
  for name in ('config', 'dtype'):
    if getattr(teacher, name) is not None and teacher.checkpoint_path is None:
      raise ValueError(
        f'experiment.Teacher.{name} is set, but no TEACHER_CHECKPOINT_PATH.'
      )


def reward_model_is_there_where_one_is_read(experiment: Experiment) -> None:
  """A reward has a model just where it needs one."""
  model = experiment.reward_model
  for name in ('config', 'dtype'):
    if getattr(model, name) is not None and model.checkpoint_path is None:
      raise ValueError(
        f'experiment.RewardModel.{name} is set, but no REWARD_CHECKPOINT_PATH.'
      )
  rewards.check_model(experiment.method.reward, model.checkpoint_path, None)


CHECKPOINT_RULES: tuple[Callable[[Experiment], None], ...] = (
  needed_teacher_has_a_checkpoint,
  settings_of_the_teacher_have_a_checkpoint,
  reward_model_is_there_where_one_is_read,
)


def check(experiment: Experiment, *, with_checkpoints: bool = True) -> None:
  """Raises ValueError if parts of an experiment contradict each other.

  Args:
    experiment: read without files, devices and TensorFlow.
    with_checkpoints: whether the checkpoints must be named, as for a run.
  """
  for rule in RULES:
    rule(experiment)
  for rule in CHECKPOINT_RULES if with_checkpoints else ():
    rule(experiment)


# --- Helpers ------------------------------------------------------------------


def check_decodings(decodings: Mapping[str, Any]) -> None:
  """Raises ValueError if a value is no way to draw outputs."""
  if not decodings:
    raise ValueError(
      'DECODINGS is empty: name at least one way to draw outputs, e.g. '
      "{'greedy': @greedy/sampler.SamplerConfig()}."
    )
  for name, decoding in decodings.items():
    if not isinstance(decoding, Decoding):
      raise ValueError(
        f'DECODINGS: {name!r} must be @sampler.SamplerConfig() or '
        f'@beam_search.BeamConfig(), got {decoding!r}.'
      )


def rate_at(schedule: optax.Schedule, step: int) -> float:
  """Returns the learning rate of a step."""
  with np.errstate(divide='ignore'):
    return float(schedule(np.int32(step)))


def _check_int(name: str, value: Any, least: int) -> None:
  if not isinstance(value, int) or value < least:
    raise ValueError(
      f'{name} must be a whole number, {least} or more, got {value!r}.'
    )


def _is_multiple(step: int, period: int) -> bool:
  return period > 0 and step % period == 0


def _axis_rules(part) -> partitioning.AxisRules:
  return partitioning.standard_logical_axis_rules(
    part.parameter_partitioning_dims, part.activation_partitioning_dims
  )
