# SPDX-License-Identifier: Apache-2.0
"""An experiment: all settings of a training run, as one object.

Each part checks its own values in `__post_init__`. `RULES` check values of
several parts; `check` applies them without files and devices. Settings that
depend on files, the vocabulary or the devices are checked where these are
opened.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from gkd_jax.checkpoints import pretrained
from gkd_jax.data import datasets
from gkd_jax.decoding import beam_search, sampler, speculative
from gkd_jax.distill import rewards, rules, teachers
from gkd_jax.distill.methods import Method
from gkd_jax.models.interface import ModelConfig
from gkd_jax.parallel import partitioning
from gkd_jax.runtime import metrics as metrics_lib

Decoding = sampler.SamplerConfig | beam_search.BeamConfig
DECODINGS: Mapping[str, Decoding] = {
  'greedy': sampler.GREEDY,
  'sampled': sampler.ANCESTRAL,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
  """The model that is trained.

  Attributes:
    config: its shape and execution (dtype, remat, scan).
    initial_checkpoint_path: initial parameters; see
      `pretrained.open_checkpoint`. None: random initialisation.
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
  """The teacher: distilled from, or only compared with in evaluations.

  Of several teachers `checkpoint_path` is {name: path}. Every other setting is
  then one value for all of them, or {name: value}.

  Attributes:
    checkpoint_path: its parameters; None: no teacher, or in planning parameters
      of the shape of `config`.
    config: the shape that the checkpoint must have; None: any.
    dtype: of its parameters, 'float32' or 'bfloat16'; None: as saved.
    parameter_partitioning_dims: see `partitioning.standard_logical_axis_rules`.
    activation_partitioning_dims: likewise. Both also apply to the reward model,
      if they are not {name: value}.
  """

  checkpoint_path: str | Mapping[str, str | None] | None = None
  config: ModelConfig | Mapping[str, ModelConfig | None] | None = None
  dtype: str | Mapping[str, str | None] | None = None
  parameter_partitioning_dims: int | Mapping[str, int] = 1
  activation_partitioning_dims: int | Mapping[str, int] = 1

  def __post_init__(self):
    for name, value in vars(self).items():
      if isinstance(value, Mapping) and sorted(value) != self.names:
        raise ValueError(
          f'experiment.Teacher.{name} has the names '
          f'{", ".join(sorted(value)) or "(none)"}, but '
          'TEACHER_CHECKPOINT_PATH has '
          f'{", ".join(self.names) or "none: it must be {name: path}"}.'
        )
    for name in self.names:
      if not re.fullmatch(r'[\w.-]+', name):
        raise ValueError(
          f'TEACHER_CHECKPOINT_PATH has a teacher named {name!r}: a name '
          'consists of letters, digits and any of _.- because metrics have it.'
        )
      try:
        self._settings_of(name)
      except ValueError as e:
        raise ValueError(f'Teacher {name!r}: {e}') from e
    if self.names:
      return
    if not isinstance(self.checkpoint_path, str | None):
      raise ValueError(
        'TEACHER_CHECKPOINT_PATH must be a path, or {name: path} of several '
        f'teachers, got {self.checkpoint_path!r}.'
      )
    pretrained.check_dtype('experiment.Teacher.dtype', self.dtype)
    _ = self.axis_rules  # raises

  @property
  def names(self) -> list[str]:
    """The names of several teachers, sorted; empty for one teacher or none."""
    is_several = isinstance(self.checkpoint_path, Mapping)
    return sorted(self.checkpoint_path) if is_several else []

  @property
  def named(self) -> dict[str, 'Teacher']:
    """{name: settings of one teacher}; one teacher has the name ''."""
    if not self.names:
      return {'': self}
    return {name: self._settings_of(name) for name in self.names}

  def _settings_of(self, name: str) -> 'Teacher':
    return Teacher(
      **{
        setting: value[name] if isinstance(value, Mapping) else value
        for setting, value in vars(self).items()
      }
    )

  @property
  def of_the_reward(self) -> 'Teacher':
    """Settings with the sharding rules of the reward model."""
    names = ('parameter_partitioning_dims', 'activation_partitioning_dims')
    values = {name: getattr(self, name) for name in names}
    return Teacher(
      **{k: v for k, v in values.items() if not isinstance(v, Mapping)}
    )

  @property
  def axis_rules(self) -> partitioning.AxisRules:
    """The mesh axes that the arrays of one teacher are sharded over."""
    return _axis_rules(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel:
  """The model of a reward such as `entailment.entailment`.

  Attributes:
    checkpoint_path: its parameters; it must have the task's vocabulary.
    config: the shape that the checkpoint must have; None: any.
    dtype: of its parameters, 'float32' or 'bfloat16'; None: as saved.
  """

  checkpoint_path: str | None = None
  config: ModelConfig | None = None
  dtype: str | None = None

  def __post_init__(self):
    pretrained.check_dtype('experiment.RewardModel.dtype', self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
  """A smaller model that drafts the outputs of an evaluation or inference.

  Attributes:
    checkpoint_path: its parameters; it must have the task's vocabulary. None:
      no draft.
    drafting: how tokens are drafted and accepted; None: `Drafting()`.
    compared_batches: the first so many batches are also written without the
      draft, to measure the speed-up.
    measures_student: whether an evaluation measures its checkpoint as the draft
      of its teacher; see `agreement.Agreement`.
  """

  checkpoint_path: str | None = None
  drafting: speculative.Drafting | None = None
  compared_batches: int = 2
  measures_student: bool = False

  def __post_init__(self):
    if self.checkpoint_path is None and self.drafting is not None:
      raise ValueError(
        f'A draft of {self.drafting.length} tokens is set (DRAFT_LENGTH), but '
        'DRAFT_CHECKPOINT_PATH is not. Set it to a run, Hugging Face or T5X '
        'folder, or leave out gin/decoding/speculative.gin.'
      )
    if self.drafting is None:
      object.__setattr__(self, 'drafting', speculative.Drafting())
    _check_int('experiment.Draft.compared_batches', self.compared_batches, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """The training data.

  Attributes:
    train: task, split and batch.
    num_shards: number of shards of the data; determines the order of examples.
      None: one shard per host that has rows of the batch. To resume on another
      number of hosts, set a multiple of both numbers of hosts.
  """

  train: datasets.DatasetConfig
  num_shards: int | None = None

  def __post_init__(self):
    if self.num_shards is not None:
      _check_int('experiment.Data.num_shards', self.num_shards, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
  """The optimizer, the learning rate schedule, and gradient accumulation.

  By default the learning rate has a linear warm-up to its peak, then a cosine
  decay to `final_learning_rate` at the last step. With a cooldown it stays at
  its peak, then decays linearly to 0, as in the GKD paper.

  Attributes:
    optimizer: called with learning_rate=...; the default has T5X's settings:
      decay 0.8, update clipping 1, steps scaled by the parameters' RMS.
    learning_rate: the peak; None with a `schedule`.
    warmup_steps: of the linear warm-up.
    final_learning_rate: after the last step; not with a cooldown.
    cooldown_start: the last step with the peak rate; None: cosine decay.
    cooldown_steps: from the peak to 0.
    schedule: step -> learning rate; replaces the five settings above.
    max_grad_norm: gradients are clipped to this global norm.
    num_microbatches: of a batch, to save memory; see `step.make_train_step`.
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
        'experiment.Optimization: set both cooldown_start and cooldown_steps, '
        f'or neither; got {self.cooldown_start} and {self.cooldown_steps}.'
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
    """Returns step -> learning rate for a run of `total_steps`."""
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
    """Returns the optimizer, with gradient clipping if it is set.

    Raises:
      ValueError: `optimizer` does not return an optax optimizer.
    """
    rule = (
      'experiment.Optimization.optimizer must return an optax optimizer for '
      'learning_rate=..., as @optax.adafactor does; it '
    )
    try:
      made = self.optimizer(learning_rate=self.make_schedule(total_steps))
    except TypeError as e:
      raise ValueError(f'{rule}raises TypeError: {e}.') from e
    if not (hasattr(made, 'init') and hasattr(made, 'update')):
      raise ValueError(f'{rule}returns {made!r}.')
    if self.max_grad_norm is None:
      return made
    return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), made)


class Due(NamedTuple):
  """Whether an evaluation and a checkpoint are due after a step."""

  step: int
  evaluation: bool
  checkpoint: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """The length of the run, its seed, and its periods.

  Attributes:
    total_steps: number of steps of this run.
    seed: determines initialisation, data order, sampling and dropout.
    eval_period: in steps; 0: only after the last step.
    checkpoint_period: in steps; 0: only after the last step.
    log_period: number of steps that are averaged into one line of metrics.
    max_skipped_steps: a step whose loss or gradient is not finite is skipped:
      it changes neither the parameters nor the optimizer. After this many
      consecutive skipped steps the run stops.
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
    """Returns whether an evaluation and a checkpoint are due after a step."""
    last = step == self.total_steps
    return Due(
      step,
      evaluation=last or _is_multiple(step, self.eval_period),
      checkpoint=last or _is_multiple(step, self.checkpoint_period),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
  """The evaluations of a run.

  Attributes:
    validation: evaluated every `Schedule.eval_period` steps and after the last
      step; None: no evaluation during training.
    test: evaluated once after training, into eval_<split>.json and
      samples_<split>.json; None: no evaluation after training.
    decodings: {name: sampler or beam search}.
    as_draft: whether the student is measured as its teacher's draft; see
      `agreement.Agreement`. The predicted speed-up is measured on `test` alone.
  """

  validation: datasets.DatasetConfig | None = None
  test: datasets.DatasetConfig | None = None
  decodings: Mapping[str, Decoding] = dataclasses.field(
    default_factory=lambda: DECODINGS
  )
  as_draft: bool = False

  def __post_init__(self):
    check_decodings(self.decodings)

  @property
  def all_datasets(self) -> list[datasets.DatasetConfig]:
    """The validation and test datasets that are set."""
    return [x for x in (self.validation, self.test) if x is not None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
  """Which checkpoints are kept.

  Attributes:
    last: number of most recent checkpoints.
    best_metric: a validation metric; the best checkpoint by this metric is
      also kept. None: no best checkpoint.
    best_mode: 'min' or 'max', which is better; None: that of the metric, see
      `metrics.better`. Needed only for metrics unknown there.
  """

  last: int = 2
  best_metric: str | None = None
  best_mode: str | None = None

  def __post_init__(self):
    _check_int('experiment.Keep.last', self.last, 1)
    if self.best_mode not in (None, 'min', 'max'):
      raise ValueError(
        f"BEST_MODE must be 'min', 'max' or None, got {self.best_mode!r}."
      )
    known = self.best_metric and metrics_lib.better(self.best_metric)
    if known and self.best_mode not in (None, known):
      raise ValueError(
        f'BEST_MODE is {self.best_mode!r}, but of BEST_METRIC '
        f'{self.best_metric!r} a {"low" if known == "min" else "high"} value '
        'is better. Leave BEST_MODE = None, or give a metric of your own '
        'another name.'
      )

  @property
  def mode(self) -> str | None:
    """'min' or 'max', which is better of `best_metric`; None: unknown."""
    return self.best_mode or metrics_lib.better(self.best_metric or '')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """The device mesh of a run.

  Attributes:
    data: number of devices that a batch is sharded over; -1: all devices,
      divided by `model`.
    model: number of devices that a parameter is sharded over.
  """

  data: int = -1
  model: int = 1

  def make(self, devices: Sequence[jax.Device] | None = None):
    """Returns the mesh; see `partitioning.make_mesh`."""
    return partitioning.make_mesh(self.data, self.model, devices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """All settings of a training run; argument of `train` and `precompile`."""

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


# --- Rules about values of several parts --------------------------------------


def parts_of_the_method_fit_together(experiment: Experiment) -> None:
  """The method satisfies the rules of `distill.rules`."""
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


def drafts_are_shorter_than_outputs(experiment: Experiment) -> None:
  """The teacher writes the last token of each round."""
  drafting = experiment.method.teacher_drafting
  if drafting is not None:
    drafting.check_fits(experiment.data.train.task_feature_lengths['targets'])


def microbatches_divide_the_batch(experiment: Experiment) -> None:
  """All microbatches have the same shape."""
  batch_size = experiment.data.train.batch_size
  parts = experiment.optimization.num_microbatches
  if batch_size % parts:
    raise ValueError(
      f'BATCH_SIZE {batch_size} must be divisible by '
      f'experiment.Optimization.num_microbatches {parts}.'
    )


def warmup_ends_before_the_run(experiment: Experiment) -> None:
  """The cosine decay starts before the last step."""
  optimization, total = experiment.optimization, experiment.schedule.total_steps
  is_cosine = optimization.schedule is None
  is_cosine = is_cosine and optimization.cooldown_start is None
  if is_cosine and optimization.warmup_steps >= total:
    raise ValueError(
      f'WARMUP_STEPS is {optimization.warmup_steps}, but TRAIN_STEPS is '
      f'{total}: the warm-up must end before the run does.'
    )


def learning_rates_are_numbers_from_zero(experiment: Experiment) -> None:
  """A schedule returns a non-negative number for each step."""
  total = experiment.schedule.total_steps
  schedule = experiment.optimization.make_schedule(total)
  for step in (0, total // 2, total):
    try:
      rate = rate_at(schedule, step)
    except (TypeError, ValueError) as e:
      raise ValueError(
        'experiment.Optimization.schedule must return a number for each step, '
        f'as @optax.constant_schedule() does: {e}.'
      ) from e
    if rate < 0.0:
      raise ValueError(
        f'The learning rate of step {step} is {rate}: '
        'experiment.Optimization.schedule must not be negative.'
      )


def best_metric_is_measured(experiment: Experiment) -> None:
  """A best checkpoint needs a validation split."""
  best = experiment.keep.best_metric
  if best is not None and experiment.evaluation.validation is None:
    raise ValueError(
      f'BEST_METRIC is {best!r}, but EVAL = None: there is no evaluation '
      'during training. Set EVAL, or set BEST_METRIC = None.'
    )


def shares_of_the_policy_are_in_0_and_1(experiment: Experiment) -> None:
  """A function of the step that the policy reads returns shares."""
  last = experiment.schedule.total_steps - 1
  for name, schedule in experiment.method.policy.schedules.items():
    for step in (0, last // 2, last):
      try:
        share = rate_at(schedule, step)
      except (TypeError, ValueError) as e:
        raise ValueError(
          f'{name} must return a number for each step, as '
          f'@optax.linear_schedule() does: {e}.'
        ) from e
      if not 0.0 <= share <= 1.0:
        raise ValueError(
          f'{name} is {share} after step {step}, but must be in [0, 1]: it is '
          'a share of the steps or outputs.'
        )


def evaluations_that_the_policy_reads_are_made(experiment: Experiment) -> None:
  """A policy that adapts to the validation split needs one."""
  names = experiment.method.policy.reads_metrics
  if names and experiment.evaluation.validation is None:
    raise ValueError(
      f'POLICY reads the validation metrics {", ".join(names)}, but EVAL = '
      'None: there is no evaluation during training. Set EVAL, or a policy '
      'that does not adapt (replay.increment = 0.0).'
    )


def the_methods_teachers_are_those_of_the_run(experiment: Experiment) -> None:
  """Checkpoints, inputs and routes are those that the method combines."""
  check_teachers(
    experiment.method.teacher,
    experiment.teacher.names,
    [experiment.data.train, *experiment.evaluation.all_datasets],
  )


RULES: tuple[Callable[[Experiment], None], ...] = (
  parts_of_the_method_fit_together,
  divergence_compares_logits_of_the_students_size,
  drafts_are_shorter_than_outputs,
  microbatches_divide_the_batch,
  warmup_ends_before_the_run,
  learning_rates_are_numbers_from_zero,
  best_metric_is_measured,
  shares_of_the_policy_are_in_0_and_1,
  evaluations_that_the_policy_reads_are_made,
  the_methods_teachers_are_those_of_the_run,
)


# --- Rules about checkpoints, which apply to a run but not to planning --------


def needed_teacher_has_a_checkpoint(experiment: Experiment) -> None:
  """A divergence, and a policy with teacher outputs, need a teacher."""
  check_paths(experiment.teacher)
  path = experiment.teacher.checkpoint_path
  if experiment.method.needs_teacher_checkpoint and path is None:
    raise ValueError(
      'This method needs a teacher: set TEACHER_CHECKPOINT_PATH to a run, '
      'Hugging Face or T5X folder.'
    )


def settings_of_the_teacher_have_a_checkpoint(experiment: Experiment) -> None:
  """The teacher's shape and dtype have no effect without a checkpoint."""
  for name, one in experiment.teacher.named.items():
    for setting in ('config', 'dtype'):
      if getattr(one, setting) is not None and one.checkpoint_path is None:
        raise ValueError(
          f'experiment.Teacher.{setting} is set, but '
          f'{setting_of("TEACHER_CHECKPOINT_PATH", name)} is not.'
        )


def pairs_are_read_where_they_are_compared(experiment: Experiment) -> None:
  """The policy reads pairs of outputs, and the training data has them."""
  has_pairs = experiment.data.train.pairs
  reads_pairs = experiment.method.policy.reads_pairs
  if reads_pairs and not has_pairs:
    raise ValueError(
      'POLICY = @policies.pairs() reads two outputs of each input. Set '
      'TRAIN_ON_PREDICTIONS to a file of pairs, and '
      'train/datasets.DatasetConfig.pairs = True.'
    )
  if has_pairs and not reads_pairs:
    raise ValueError(
      'train/datasets.DatasetConfig.pairs is set, but POLICY does not read the '
      'worse outputs. Set POLICY = @policies.pairs(), or unset it.'
    )


def reward_model_is_set_where_needed(experiment: Experiment) -> None:
  """A reward model is set if and only if the reward needs one."""
  check_reward_model(experiment.method.reward, experiment.reward_model)


def a_draft_is_measured_with_one_teacher(experiment: Experiment) -> None:
  """Acceptance is measured on outputs of one teacher."""
  check_as_draft(
    'experiment.EvaluationPlan.as_draft',
    experiment.evaluation.as_draft,
    experiment.teacher.checkpoint_path,
  )


CHECKPOINT_RULES: tuple[Callable[[Experiment], None], ...] = (
  a_draft_is_measured_with_one_teacher,
  needed_teacher_has_a_checkpoint,
  settings_of_the_teacher_have_a_checkpoint,
  pairs_are_read_where_they_are_compared,
  reward_model_is_set_where_needed,
)


def check(experiment: Experiment, *, with_checkpoints: bool = True) -> None:
  """Raises ValueError if parts of an experiment contradict each other.

  Uses no files, no devices and no TensorFlow.

  Args:
    experiment: to check.
    with_checkpoints: whether to apply also the rules about checkpoints.
  """
  for rule in RULES:
    rule(experiment)
  for rule in CHECKPOINT_RULES if with_checkpoints else ():
    rule(experiment)


# --- Helpers ------------------------------------------------------------------


def check_decodings(decodings: Mapping[str, Any]) -> None:
  """Raises ValueError unless all values are samplers or beam searches."""
  if not decodings:
    raise ValueError(
      'DECODINGS is empty. Set at least one sampler or beam search, e.g. '
      "{'greedy': @greedy/sampler.SamplerConfig()}."
    )
  for name, decoding in decodings.items():
    if not isinstance(decoding, Decoding):
      raise ValueError(
        f'DECODINGS: {name!r} must be @sampler.SamplerConfig() or '
        f'@beam_search.BeamConfig(), got {decoding!r}.'
      )


def check_drafted(draft: Draft, decodings: Mapping[str, Decoding]) -> None:
  """Raises ValueError if a draft is set for a decoding that cannot have one."""
  if draft.checkpoint_path is None:
    return
  for name, decoding in decodings.items():
    of = f'{name!r}' if name else 'DECODING'
    if isinstance(decoding, beam_search.BeamConfig):
      raise ValueError(
        f'DRAFT_CHECKPOINT_PATH is set, but {of} is a beam search, which '
        'cannot have a draft. Use a sampler.SamplerConfig, or leave '
        'DRAFT_CHECKPOINT_PATH unset.'
      )
    if decoding.calculator:
      raise ValueError(
        f'DRAFT_CHECKPOINT_PATH is set, but {of} has a calculator, which '
        'replaces tokens after they were drawn. Set CALCULATOR = False, or '
        'leave DRAFT_CHECKPOINT_PATH unset.'
      )


def check_as_draft(
  setting: str,
  as_draft: bool,
  teacher_checkpoint_path: str | Mapping[str, str] | None,
) -> None:
  """Raises ValueError if a draft is measured without one teacher."""
  if as_draft and not isinstance(teacher_checkpoint_path, str):
    raise ValueError(
      f'{setting} is True, but TEACHER_CHECKPOINT_PATH is '
      f'{teacher_checkpoint_path!r}: a model is measured as the draft of one '
      f'teacher. Set one path, or {setting.rpartition(".")[2]} = False.'
    )


def check_best_metric(keep: Keep, names: Sequence[str]) -> None:
  """Checks which checkpoint is the best one.

  Args:
    keep: its best_metric is set.
    names: of the validation metrics.

  Raises:
    ValueError: best_metric is none of these, or its best_mode is missing.
  """
  name = keep.best_metric
  if name not in names:
    near = difflib.get_close_matches(name, names, n=1)
    raise ValueError(
      f'BEST_METRIC {name!r} is not a validation metric.'
      + (f' Did you mean {near[0]!r}?' if near else '')
      + f' Validation metrics: {", ".join(names)}.'
    )
  if keep.mode is None:
    raise ValueError(
      f'BEST_METRIC is {name!r}: whether high or low values of this metric are '
      "better is unknown. Set BEST_MODE to 'max' or 'min' (its full name is "
      'experiment.Keep.best_mode).'
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


def check_paths(teacher: Teacher) -> None:
  """Raises ValueError unless each of several teachers has a checkpoint."""
  for name in teacher.names:
    if teacher.checkpoint_path[name] is None:
      raise ValueError(
        f'{setting_of("TEACHER_CHECKPOINT_PATH", name)} is None: set it to a '
        'run, Hugging Face or T5X folder.'
      )


def check_reward_model(
  reward: rewards.Reward | None, model: RewardModel
) -> None:
  """Raises ValueError unless a model is set exactly if the reward needs one."""
  for name in ('config', 'dtype'):
    if getattr(model, name) is not None and model.checkpoint_path is None:
      raise ValueError(
        f'experiment.RewardModel.{name} is set, but REWARD_CHECKPOINT_PATH is '
        'not.'
      )
  rewards.check_model(reward, model.checkpoint_path)


def check_teachers(
  teacher: teachers.Teacher | teachers.Several,
  names: Sequence[str],
  all_datasets: Sequence[datasets.DatasetConfig],
) -> None:
  """Checks several teachers against their checkpoints and the data.

  Args:
    teacher: of the method.
    names: of TEACHER_CHECKPOINT_PATH = {name: path}; empty for one path.
    all_datasets: that the teachers grade.

  Raises:
    ValueError: the names differ, the examples name other teachers, or members
      that differ in what they read would read the same.
  """
  is_several = isinstance(teacher, teachers.Several)
  needed = teachers.checkpoint_names(teacher)
  if names and needed in ([], [None]):
    raise ValueError(
      f'TEACHER_CHECKPOINT_PATH names several teachers, {", ".join(names)}, '
      'but the method has one. Set how they are combined, e.g. by '
      'gin/methods/multi_teacher.gin or mopd.gin; or set one path.'
    )
  if needed not in ([], [None]) and sorted(needed) != sorted(names):
    raise ValueError(
      f'The method combines the teachers {", ".join(sorted(needed))}, but '
      f'TEACHER_CHECKPOINT_PATH has {", ".join(names) or "no names"}. Set '
      "TEACHER_CHECKPOINT_PATH = {'name': path, ...} with these names."
    )
  for dataset in all_datasets:
    if is_several and teacher.reads_both and not dataset.has_teacher_inputs:
      raise ValueError(
        'The method combines readings of teacher_inputs and of the inputs, but '
        'the data has no teacher_inputs: both would be equal. Set '
        'datasets.DatasetConfig.teacher_inputs, as '
        'gin/methods/cfg_distillation.gin does.'
      )
    routes = sorted(teacher.members) if is_several and teacher.is_routed else []
    if sorted(dataset.teachers or ()) != routes:
      raise ValueError(
        'datasets.DatasetConfig.teachers must be the teachers that the method '
        f'routes examples to, {", ".join(routes) or "none"}; got '
        f'{", ".join(sorted(dataset.teachers or ())) or "none"}. See '
        'gin/methods/mopd.gin.'
      )


def setting_of(setting: str, name: str) -> str:
  """Returns the name of a setting of one of several teachers, for errors.

  Args:
    setting: {name: value}, or a value.
    name: of the teacher; '' if there is one.
  """
  return f'{setting}[{name!r}]' if name else setting


def _axis_rules(part) -> partitioning.AxisRules:
  return partitioning.standard_logical_axis_rules(
    part.parameter_partitioning_dims, part.activation_partitioning_dims
  )
