# SPDX-License-Identifier: Apache-2.0
"""Trains a student: checks and builds everything, then runs the loop."""

import dataclasses
import difflib
import functools
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gkd_jax.batch import Batch
from gkd_jax.checkpoints import checkpoint, pretrained
from gkd_jax.data import datasets, iterators, predictions, vocabularies
from gkd_jax.decoding import sampler
from gkd_jax.distill import methods, rewards, rules
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.evaluation import evaluate, programs
from gkd_jax.models import registry
from gkd_jax.models.interface import Model, ModelConfig
from gkd_jax.models.layer_stack import stack_layers
from gkd_jax.models.params import (
  abstract_params,
  count_params,
  init_params,
)
from gkd_jax.parallel import hosts, partitioning
from gkd_jax.runtime import console, files, run_folder
from gkd_jax.runtime import metrics as metrics_lib
from gkd_jax.runtime import signals as signals_lib


def train(
  *,
  model_dir: str,
  student: ModelConfig,
  train_dataset: datasets.DatasetConfig,
  method: methods.Method,
  optimizer: Callable[..., optax.GradientTransformation],
  learning_rate: optax.Schedule,
  total_steps: int,
  seed: int,
  initial_checkpoint_path: str | None = None,
  teacher: ModelConfig | None = None,
  teacher_checkpoint_path: str | None = None,
  teacher_dtype: str | None = None,
  max_grad_norm: float | None = None,
  num_microbatches: int = 1,
  num_data_shards: int | None = None,
  reward_model: ModelConfig | None = None,
  reward_checkpoint_path: str | None = None,
  reward_dtype: str | None = None,
  max_decode_len: int | None = None,
  mesh: Callable[[], jax.sharding.Mesh] = partitioning.make_mesh,
  student_rules: partitioning.AxisRules = partitioning.STANDARD_RULES,
  teacher_rules: partitioning.AxisRules = partitioning.STANDARD_RULES,
  eval_dataset: datasets.DatasetConfig | None = None,
  final_eval_dataset: datasets.DatasetConfig | None = None,
  decodings: Mapping[str, programs.Decoding] | None = None,
  eval_period: int = 1000,
  checkpoint_period: int = 1000,
  log_period: int = 10,
  max_skipped_steps: int = 10,
  keep_checkpoints: int = 2,
  best_metric: str | None = None,
  best_mode: str = 'min',
  config_text: Callable[[], str] = str,
  started: float | None = None,
  import_seconds: float = 0.0,
) -> None:
  """Trains a student and evaluates it. A run that was interrupted goes on.

  Args:
    model_dir: the run's folder; made if it is not there.
    student: shape of the model that learns.
    train_dataset: what it learns on.
    method: policy, teacher, divergence and credit; see `methods`.
    optimizer: called with learning_rate=...; e.g. optax.adafactor.
    learning_rate: schedule, step -> rate.
    total_steps: of this run, from 0.
    seed: determines initialisation, data order, sampling and dropout.
    initial_checkpoint_path: the student starts from these parameters (see
      `pretrained.open_checkpoint`); None: from random ones.
    teacher: shape that the teacher's checkpoint must have; None: any.
    teacher_checkpoint_path: the teacher, as its checkpoint describes it.
      Without a need for one in the method it only serves evaluation.
    teacher_dtype: of its parameters, 'float32' or 'bfloat16'; None: as saved.
    max_grad_norm: gradients of a larger global norm are scaled down to it.
    num_microbatches: parts a batch is worked through in, to save memory; see
      `step.make_train_step`.
    num_data_shards: that the data is dealt to, which decides its order; None:
      as many as hosts that have rows of their own. A run that is to go on with
      another number of hosts names one that both divide.
    reward_model: shape that the reward's checkpoint must have; None: any.
    reward_checkpoint_path: the model that says so, if the reward has one; of
      the task's vocabulary.
    reward_dtype: of its parameters, like `teacher_dtype`.
    max_decode_len: length of sampled outputs; None: as the task's targets.
    mesh: makes the device mesh.
    student_rules: which of its axes the student's arrays are spread over.
    teacher_rules: likewise, of the teacher and of the reward's model.
    eval_dataset: evaluated every `eval_period` steps and at the end; the
      training metrics' name for it is its split.
    final_eval_dataset: evaluated once, at the end, into eval_<split>.json and
      samples_<split>.json.
    decodings: {name: SamplerConfig or BeamConfig} to evaluate with.
    eval_period: steps; 0: only at the end.
    checkpoint_period: steps; one more is saved at the end; 0: only that.
    log_period: steps whose metrics are averaged into one line.
    max_skipped_steps: a step whose loss or gradient is not finite changes
      nothing (the learning rate's schedule waits, too); after so many in a row,
      and the one under way, the run stops.
    keep_checkpoints: the last ones that are kept.
    best_metric: name of a validation metric; its best checkpoint is kept
      beside the last.
    best_mode: 'min' or 'max'.
    config_text: returns the resolved configuration, which is saved with the
      run and must be the same when it goes on.
    started: when the process did, by `time.monotonic`; None: now. To be told.
    import_seconds: that its imports took until now.

  Raises:
    ValueError: something does not fit together. All such errors come before
      anything is compiled or written.
    signals_lib.Interrupted: SIGTERM or Ctrl-C came; the run is saved.
    FloatingPointError: too many steps were skipped; the run is saved.
  """
  started = time.monotonic() if started is None else started
  run_dir = pathlib.Path(model_dir).absolute()
  device_mesh = mesh()
  for dataset in (eval_dataset, final_eval_dataset):
    if dataset is not None:
      partitioning.check_spread(
        'EVAL_BATCH_SIZE', dataset.batch_size, device_mesh
      )
  plan = make_plan(
    mesh=device_mesh,
    student_rules=student_rules,
    student=student,
    train_dataset=train_dataset,
    method=method,
    optimizer=optimizer,
    learning_rate=learning_rate,
    seed=seed,
    max_grad_norm=max_grad_norm,
    num_microbatches=num_microbatches,
    max_decode_len=max_decode_len,
  )
  if plan.needs_teacher and teacher_checkpoint_path is None:
    raise ValueError(
      'This method needs a teacher: set TEACHER_CHECKPOINT_PATH to a run, '
      'Hugging Face or T5X folder.'
    )
  pretrained.check_dtype('TEACHER_DTYPE', teacher_dtype)
  for name, value in (('TEACHER', teacher), ('TEACHER_DTYPE', teacher_dtype)):
    if value is not None and teacher_checkpoint_path is None:
      raise ValueError(f'{name} is set, but no TEACHER_CHECKPOINT_PATH.')
  reward = method.reward
  if reward_model is not None and reward_checkpoint_path is None:
    raise ValueError('REWARD_MODEL is set, but no REWARD_CHECKPOINT_PATH.')
  rewards.check_model(reward, reward_checkpoint_path, reward_dtype)
  pretrained.check_dtype('REWARD_DTYPE', reward_dtype)
  for name, value, least in (
    ('TRAIN_STEPS', total_steps, 1),
    ('RANDOM_SEED', seed, 0),
    ('EVAL_PERIOD', eval_period, 0),
    ('CHECKPOINT_PERIOD', checkpoint_period, 0),
    ('LOG_PERIOD', log_period, 1),
    ('MAX_SKIPPED_STEPS', max_skipped_steps, 1),
    ('KEEP_CHECKPOINTS', keep_checkpoints, 1),
    ('NUM_DATA_SHARDS', 1 if num_data_shards is None else num_data_shards, 1),
  ):
    if not isinstance(value, int) or value < least:
      raise ValueError(
        f'{name} must be a whole number, {least} or more, got {value!r}.'
      )
  if best_mode not in ('min', 'max'):
    raise ValueError(f"BEST_MODE must be 'min' or 'max', got {best_mode!r}.")
  evaluate.check_decodings(decodings or {})
  if best_metric is not None and eval_dataset is None:
    raise ValueError(
      f'BEST_METRIC is {best_metric!r}, but nothing is evaluated during '
      'training: leave EVAL as it is, or set BEST_METRIC = None.'
    )
  import_seconds += vocabularies.import_libraries()
  vocabulary = datasets.get_vocabulary(train_dataset)
  ids = datasets.special_ids(train_dataset, vocabulary, student)
  if ids.num_ids > student.vocab_size:
    raise ValueError(
      f'The student embeds {student.vocab_size} ids, but the vocabulary of '
      f'task {train_dataset.mixture_or_task_name!r} has {ids.num_ids}. Set '
      'VOCAB_SIZE to that or more (or, where a checkpoint gives the shape, '
      'VOCABULARY_EXTRA_IDS to fewer).'
    )
  description = checkpoint.ModelDescription(
    student, vocabularies.describe(vocabulary)
  )
  for dataset in (train_dataset, eval_dataset, final_eval_dataset):
    if dataset is not None:
      datasets.check_not_empty(dataset)
  _check_not_trained_on(
    train_dataset, [d for d in (eval_dataset, final_eval_dataset) if d]
  )
  dealt = _deal_data(num_data_shards, train_dataset.batch_size, device_mesh)
  _check_same_config(run_dir, config_text())
  sources = {}
  for role, path, setting, shape, shape_setting in (
    (
      'teacher',
      teacher_checkpoint_path,
      'TEACHER_CHECKPOINT_PATH',
      teacher,
      'TEACHER (None takes any)',
    ),
    (
      'student',
      initial_checkpoint_path,
      'INITIAL_CHECKPOINT_PATH',
      student,
      'STUDENT',
    ),
    (
      'reward',
      reward_checkpoint_path,
      'REWARD_CHECKPOINT_PATH',
      reward_model,
      'REWARD_MODEL (None takes any)',
    ),
  ):
    if path is not None:
      sources[role] = pretrained.open_checkpoint(path, setting)
      pretrained.check_fits(
        sources[role], description.vocabulary, ids, shape, shape_setting
      )
  placement = partitioning.Placement(device_mesh, teacher_rules)
  score = scorer = reward_params = None
  if reward is not None:
    if 'reward' in sources:
      scorer = like_student(sources['reward'].config, student, placement)
      reward_params = abstract_params(scorer)
    score = reward.make_score(vocabulary, ids, scorer)
    rewards.check_score(
      score,
      reward_params,
      batch_size=train_dataset.batch_size,
      lengths=train_dataset.task_feature_lengths,
    )

  _check_rates(learning_rate, total_steps)

  # From here on files are read whole, and the run's folder is written.
  teacher_model = teacher_params = None
  if 'teacher' in sources:
    teacher_model = like_student(sources['teacher'].config, student, placement)
    teacher_params = _load(sources['teacher'], teacher_model, teacher_dtype)
    console.log(f'Teacher: {sources["teacher"]}')
  if 'reward' in sources:
    reward_params = _load(sources['reward'], scorer, reward_dtype)
    console.log(f'Reward: {sources["reward"]}')
  if 'student' in sources:
    params = sources['student'].load(plan.state.params, 'float32')
    console.log(f'Student: {sources["student"]}')
  else:
    params = jax.jit(
      lambda: init_params(plan.student, jax.random.key(seed)),
      out_shardings=_shardings(plan.state.params),
    )()
    console.log(
      f'Student: {registry.describe(student)}, {count_params(params):,} '
      'float32 parameters, from random initialisation'
    )
  train_step = plan.make_train_step(teacher=teacher_model, ids=ids, score=score)
  mean_reward = None
  if reward is not None:
    mean_reward = programs.make_mean_reward(
      reward, score, reward_params, ids=ids, mesh=device_mesh
    )

  signals = signals_lib.Signals()

  def make_evaluation(split):
    return split and evaluate.Evaluation(
      split,
      plan.student,
      teacher_model,
      teacher_params,
      decodings or {'greedy': sampler.GREEDY},
      seed=seed,
      mesh=device_mesh,
      mean_reward=mean_reward,
      divergence=method.objective.divergence,
      before_batch=signals.check,
    )

  evaluation = make_evaluation(eval_dataset)
  final_evaluation = make_evaluation(final_eval_dataset)
  if best_metric is not None:
    _check_best_metric(best_metric, evaluation.names())
  iterator = iterators.TrainIterator(
    train_dataset,
    seed=seed,
    pad_id=ids.pad,
    **dealt,
  )

  hosts.wait('all is checked')
  run_dir.mkdir(parents=True, exist_ok=True)
  with run_folder.locked(run_dir, 'MODEL_DIR'):
    was_there = (run_dir / 'config.gin').exists()
    _save_manifest(run_dir, config_text())
    # One vocabulary serves both; the student's own files come first.
    folders = [
      sources[k].folder for k in ('student', 'teacher') if k in sources
    ]
    pretrained.keep_side_files(folders, run_dir)
    del sources  # they may hold what was read
    state = jax.jit(
      functools.partial(
        state_lib.init_state,
        optimizer=plan.optimizer,
        method=method,
        batch=abstract_batch(train_dataset, device_mesh),
        seed=seed,
      ),
      out_shardings=_shardings(plan.state),
    )(params)
    del params  # the state owns them now, and will be donated
    checkpoints = checkpoint.Checkpoints(
      run_dir,
      description,
      keep=keep_checkpoints,
      best_metric=best_metric,
      best_mode=best_mode,
    )
    train_seconds, to_evaluate = 0.0, False
    if saved := checkpoints.restore(plan.state, iterator):
      state, train_seconds, to_evaluate = saved
      console.log(f'Resuming after step {int(state.step)}.')
    elif was_there:
      console.log('The run was interrupted before its first checkpoint.')
    first_step = int(state.step)
    if first_step < total_steps or to_evaluate:
      state, train_seconds = _loop(
        train_step,
        state,
        state_lib.Frozen(teacher_params, reward_params),
        iterator,
        raise_failure=reward.raise_failure if reward else lambda: None,
        signals=signals,
        writer=metrics_lib.MetricWriter(run_dir, first_step),
        checkpoints=checkpoints,
        evaluation=evaluation,
        put_batch=functools.partial(
          partitioning.put_batch,
          mesh=device_mesh,
          batch_size=train_dataset.batch_size,
        ),
        learning_rate=learning_rate,
        total_steps=total_steps,
        say_started=functools.partial(_say_started, started, import_seconds),
        train_seconds=train_seconds,
        eval_period=eval_period or total_steps,
        checkpoint_period=checkpoint_period or total_steps,
        log_period=log_period,
        max_skipped_steps=max_skipped_steps,
        to_evaluate=to_evaluate,
        run_dir=run_dir,
      )
    checkpoints.close()
    if final_evaluation is not None:
      path = run_dir / f'eval_{final_eval_dataset.split}.json'
      if not path.exists():
        # The teacher's own test metrics are those of its own run.
        values, _ = final_evaluation(state.params, with_teacher=False)
        evaluate.write_samples(
          run_dir,
          final_eval_dataset.split,
          final_evaluation.samples(state.params),
        )
        evaluate.write_results(
          run_dir,
          final_eval_dataset.split,
          {
            'step': int(state.step),
            'train_seconds': train_seconds,
            **values,
            **final_evaluation.notes,
          },
        )
        console.log(
          f'{final_eval_dataset.split}: {evaluate.format_metrics(values)}'
        )
    console.log(f'Done: {run_dir}')


class Plan(NamedTuple):
  """What a run compiles, as far as its settings tell; no file was read.

  Attributes:
    student: the model that learns.
    optimizer: clips the gradients first, where that is asked for.
    state: shapes, dtypes and shardings of the training state.
    make_train_step: `step.make_train_step`, but for the arguments that depend
      on files: teacher and ids.
    needs_teacher: whether there is no step without a teacher.
  """

  student: Model
  optimizer: optax.GradientTransformation
  state: state_lib.TrainState
  make_train_step: Callable[..., step_lib.TrainStep]
  needs_teacher: bool


def make_plan(
  *,
  mesh: jax.sharding.Mesh,
  student_rules: partitioning.AxisRules,
  student: ModelConfig,
  train_dataset: datasets.DatasetConfig,
  method: methods.Method,
  optimizer: Callable[..., optax.GradientTransformation],
  learning_rate: optax.Schedule,
  seed: int,
  max_grad_norm: float | None,
  num_microbatches: int,
  max_decode_len: int | None,
) -> Plan:
  """Checks settings against each other, and builds what needs nothing else.

  Args: see `train`; the mesh is made already.

  Raises:
    ValueError: they do not fit together.
  """
  rules.check(
    rules.Setup(
      method, student.dropout_rate, train_dataset.batch_size, num_microbatches
    )
  )
  rules.check_divergence(method, student.vocab_size)
  target_len = train_dataset.task_feature_lengths['targets']
  if max_decode_len not in (None, target_len):
    raise ValueError(
      'Sampled and dataset outputs must have one length, because one compiled '
      f'step trains on either: MAX_DECODE_LEN is {max_decode_len}, but '
      f"TASK_FEATURE_LENGTHS['targets'] is {target_len}. Make them equal, or "
      'set MAX_DECODE_LEN = None.'
    )
  _check_batch(train_dataset.batch_size, num_microbatches, mesh)
  model = registry.make_model(
    student, partitioning.Placement(mesh, student_rules)
  )
  wanted = (
    'OPTIMIZER must make an optax optimizer of a learning rate, as '
    '@optax.adafactor does; it '
  )
  try:
    tx = optimizer(learning_rate=learning_rate)
  except TypeError as e:
    raise ValueError(f'{wanted}raises TypeError: {e}.') from e
  if not (hasattr(tx, 'init') and hasattr(tx, 'update')):
    raise ValueError(f'{wanted}gives {tx!r}.')
  if max_grad_norm is not None:
    if max_grad_norm <= 0.0:
      raise ValueError(
        'MAX_GRAD_NORM must be above 0, or None for gradients as they are; got '
        f'{max_grad_norm}.'
      )
    tx = optax.chain(optax.clip_by_global_norm(max_grad_norm), tx)
  return Plan(
    student=model,
    optimizer=tx,
    state=state_lib.abstract_state(
      abstract_params(model),
      tx,
      mesh,
      method,
      batch=abstract_batch(train_dataset, mesh),
    ),
    make_train_step=functools.partial(
      step_lib.make_train_step,
      student=model,
      method=method,
      optimizer=tx,
      seed=seed,
      num_microbatches=num_microbatches,
    ),
    needs_teacher=method.needs_teacher_checkpoint,
  )


def like_student(
  config: ModelConfig, student: ModelConfig, placement: partitioning.Placement
) -> Model:
  """Returns a model that computes in the student's type of numbers.

  And is compiled as the student is.
  """
  config = dataclasses.replace(
    config, dtype=student.dtype, scan_layers=student.scan_layers
  )
  return registry.make_model(config, placement)


def _load(
  source: pretrained.Pretrained, model: Model, dtype: str | None
) -> step_lib.Params:
  """Loads what no step changes."""
  params = source.load(abstract_params(model), dtype)
  return stack_layers(params) if model.config.scan_layers else params


def abstract_batch(
  dataset: datasets.DatasetConfig, mesh: jax.sharding.Mesh
) -> Batch:
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


def compile_step(
  train_step: step_lib.TrainStep,
  state: state_lib.TrainState,
  frozen: state_lib.Frozen,
  batch: Batch,
) -> jax.stages.Compiled:
  """Compiles a step for the devices that its arguments lie on.

  Args: those of the step, as arrays, or as shapes, dtypes and shardings. The
    state is donated.
  """
  jitted = jax.jit(
    train_step, donate_argnums=0, out_shardings=(_shardings(state), None)
  )
  return jitted.lower(state, frozen, batch).compile()


def _shardings(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, tree)


def _loop(
  train_step,
  state,
  frozen,
  iterator,
  *,
  raise_failure,
  signals,
  writer,
  checkpoints,
  evaluation,
  put_batch,
  learning_rate,
  total_steps,
  say_started,
  train_seconds,
  eval_period,
  checkpoint_period,
  log_period,
  max_skipped_steps,
  to_evaluate,
  run_dir,
):
  """Runs steps up to total_steps; returns the state and the seconds spent.

  The device is never waited for but to read the metrics of the step before
  the one it works on. `train_seconds` counts neither compilation nor
  evaluation. `raise_failure` is that of the reward. `say_started` is called
  after the first step. `to_evaluate`: the evaluation of the given state was
  interrupted.
  """
  first_step = int(state.step)

  def evaluate_now(step):
    values, table = evaluation(state.params)
    writer.write(step, {f'validation/{k}': v for k, v in values.items()})
    writer.text(step, 'samples', table)
    console.log(f'step {step}  {evaluate.format_metrics(values)}\n{table}')
    return values

  if to_evaluate:
    checkpoints.add_metrics(first_step, evaluate_now(first_step))
  if first_step == total_steps:
    writer.close()
    return state, train_seconds

  batch = put_batch(next(iterator))
  start = time.monotonic()
  compiled = compile_step(train_step, state, frozen, batch)
  console.log(f'Compiled the step in {time.monotonic() - start:.1f} s.')

  log = _Log(
    writer,
    learning_rate,
    total_steps,
    first_step,
    log_period,
    raise_failure,
    max_skipped_steps,
    run_dir / 'skipped_steps.jsonl',
    say_started,
  )
  clock = time.monotonic()
  with signals.noted():
    for step in range(first_step + 1, total_steps + 1):
      if batch is None:
        batch = put_batch(next(iterator))
      state, step_metrics = compiled(state, frozen, batch)
      log.dispatched(step, step_metrics, batch)
      batch = None
      last = step == total_steps
      stops = signals.stops() or log.too_many_skipped
      evaluates = evaluation is not None and (last or step % eval_period == 0)
      saves = last or stops or step % checkpoint_period == 0
      if not (evaluates or saves):
        continue

      log.flush()
      stops = stops or log.too_many_skipped
      train_seconds += time.monotonic() - clock
      values, evaluated = None, not evaluates
      if evaluates and not stops:
        try:
          with signals.at_once():
            values, evaluated = evaluate_now(step), True
        except signals_lib.Interrupted:
          stops = True
      if saves or stops:
        checkpoints.save(
          state,
          iterator,
          train_seconds=train_seconds,
          metrics=values,
          to_evaluate=not evaluated,
        )
      stops = stops or signals.received is not None
      if stops:
        checkpoints.close()
        writer.close()
        log.close()
        log.raise_if_too_many_skipped()
        raise signals_lib.Interrupted(
          f'Stopped after step {step}, which is saved. The same command goes '
          'on from there.',
          signals.exit_code,
        )
      clock = time.monotonic()
      log.restart_clock()
  log.close()
  writer.close()
  return state, train_seconds


class _Log:
  """Reads the metrics of a step after the next one was dispatched."""

  def __init__(
    self,
    writer,
    learning_rate,
    total_steps,
    first_step,
    period,
    raise_failure,
    max_skipped_steps,
    skipped_path,
    say_started,
  ):
    self._writer = writer
    self._learning_rate = learning_rate
    self._period = period
    self._raise_failure = raise_failure
    self._max_skipped_steps = max_skipped_steps
    self._skipped_path = skipped_path
    self._say_started = say_started
    self._skipped = []  # messages, of the steps just before
    self._progress = console.Progress(total_steps, first_step, 10.0)
    self._pending = None
    self._window = []
    self._on_policy = []
    self.restart_clock()

  def restart_clock(self):
    self._clock = time.monotonic()

  @property
  def too_many_skipped(self) -> bool:
    return len(self._skipped) >= self._max_skipped_steps

  def raise_if_too_many_skipped(self):
    if self.too_many_skipped:
      raise FloatingPointError(
        f'{len(self._skipped)} steps in a row were skipped, and '
        f'MAX_SKIPPED_STEPS is {self._max_skipped_steps}. They changed '
        'nothing, and the run is saved. Lower LEARNING_RATE or set '
        'MAX_GRAD_NORM, and start again, in another MODEL_DIR; '
        f'{self._skipped_path} has the batches.'
      )

  def dispatched(self, step, step_metrics, batch):
    self.flush()
    self._pending = (step, step_metrics, batch)

  def flush(self):
    """Waits for the pending step, if any, and logs it."""
    if self._pending is None:
      return
    step, device_metrics, batch = self._pending
    self._pending = None
    values = {k: float(v) for k, v in jax.device_get(device_metrics).items()}
    self._raise_failure()
    if self._say_started is not None:
      self._say_started()
      self._say_started = None
    if not math.isfinite(values['param_norm']):
      raise FloatingPointError(
        f'Step {step}: the parameters are not finite any more. Lower '
        'LEARNING_RATE or set MAX_GRAD_NORM, and start again: the run goes on '
        'from its last checkpoint.'
      )
    if math.isfinite(values['loss']) and math.isfinite(values['grad_norm']):
      self._skipped = []
      self._window.append(values)
    else:
      self._skip(step, values, batch)
    self._on_policy.append(values['on_policy'])
    if step % self._period:
      return
    now = time.monotonic()
    seconds, self._clock = now - self._clock, now
    window, self._window = self._window, []
    if not window:
      return
    mean = {}
    for name in window[0]:
      # There is no reward in a step in which the student wrote nothing.
      known = [v[name] for v in window if not math.isnan(v[name])]
      if known:
        mean[name] = sum(known) / len(known)
    tokens_per_second = mean['target_tokens'] * len(window) / seconds
    self._writer.write(
      step,
      {
        **{f'train/{k}': v for k, v in mean.items()},
        'train/learning_rate': _rate(self._learning_rate, step - 1),
        'train/steps_per_second': len(window) / seconds,
        'train/target_tokens_per_second': tokens_per_second,
      },
    )
    self._progress.update(
      step,
      loss=mean['loss'],
      on_policy=sum(self._on_policy) / len(self._on_policy),
      tokens_per_second=tokens_per_second,
    )

  def _skip(self, step, values, batch):
    """Reports a step that was skipped, and writes down its batch."""
    message = (
      f'Step {step} was skipped: loss {values["loss"]}, gradient norm '
      f'{values["grad_norm"]}.'
    )
    self._skipped.append(message)
    console.log(message)
    line = {'step': step}
    for name in ('loss', 'grad_norm'):
      line[name] = str(values[name])
    line['inputs'] = hosts.allgather(batch.encoder_input_tokens).tolist()
    line['targets'] = hosts.allgather(batch.decoder_target_tokens).tolist()
    if hosts.is_first():
      with open(self._skipped_path, 'a') as file:
        file.write(json.dumps(line) + '\n')

  def close(self):
    self._progress.close()


def _say_started(started: float, import_seconds: float) -> None:
  console.log(
    f'First step done after {time.monotonic() - started:.1f} s, of which '
    f'imports took {import_seconds:.1f} s.'
  )


def _check_batch(batch_size: int, num_microbatches: int, mesh) -> None:
  spread = mesh.shape['data']
  if num_microbatches < 1 or batch_size % (num_microbatches * spread):
    raise ValueError(
      f'BATCH_SIZE {batch_size} must be divisible by NUM_MICROBATCHES '
      f'{num_microbatches} times the {spread} devices of the data axis.'
    )


def _deal_data(num_shards: int | None, batch_size: int, mesh) -> dict[str, Any]:
  """Returns which part of the data this host reads, for `TrainIterator`."""
  first, end = partitioning.rows_of_host(batch_size, mesh)
  if num_shards is None:
    num_shards = batch_size // (end - first)
  rows = batch_size // num_shards
  if batch_size % num_shards or first % rows or end % rows:
    raise ValueError(
      f'NUM_DATA_SHARDS {num_shards} must divide BATCH_SIZE {batch_size} into '
      f'parts of which each host has whole ones; this one has rows {first} to '
      f'{end - 1}.'
    )
  return {
    'shards': range(first // rows, end // rows),
    'num_shards': num_shards,
    'saves': partitioning.is_first_of_rows(batch_size, mesh),
  }


def _check_not_trained_on(
  train_dataset: datasets.DatasetConfig,
  evaluated: Sequence[datasets.DatasetConfig],
) -> None:
  """Refuses a teacher's outputs for the split that will be evaluated."""
  if train_dataset.predictions is None:
    return
  for split in predictions.splits_of(train_dataset.predictions):
    if split in [dataset.split for dataset in evaluated]:
      raise ValueError(
        f'TRAIN_ON_PREDICTIONS {train_dataset.predictions} was written for the '
        f'split {split!r}, on which this run is evaluated. Let the teacher '
        'write for the training split: INFER_SPLIT.'
      )


def _check_rates(learning_rate: optax.Schedule, total_steps: int) -> None:
  """Refuses what is no schedule, and one that would climb."""
  for step in (0, total_steps // 2, total_steps):
    try:
      rate = _rate(learning_rate, step)
    except (TypeError, ValueError) as e:
      raise ValueError(
        'LEARNING_RATE_SCHEDULE must give a number for each step, as '
        f'@optax.constant_schedule() does: {e}.'
      ) from e
    if rate < 0.0:
      raise ValueError(
        f'The learning rate of step {step} is {rate}: LEARNING_RATE and '
        'FINAL_LEARNING_RATE must not be negative.'
      )


def _rate(learning_rate: optax.Schedule, step: int) -> float:
  """Returns the rate of a step, which the schedule gets as an array."""
  with np.errstate(divide='ignore'):
    return float(learning_rate(np.int32(step)))


def _check_best_metric(name: str, names: Sequence[str]) -> None:
  if name not in names:
    near = difflib.get_close_matches(name, names, n=1)
    raise ValueError(
      f'BEST_METRIC {name!r} is none of the validation metrics.'
      + (f' Did you mean {near[0]!r}?' if near else '')
      + f' They are: {", ".join(names)}.'
    )


def _check_same_config(run_dir: pathlib.Path, config: str) -> None:
  """Refuses a folder that another experiment has written."""
  path = run_dir / 'config.gin'
  if not path.exists():
    if run_dir.exists() and any(run_dir.glob('[!.]*')):
      raise ValueError(
        f'MODEL_DIR {run_dir} holds files but no config.gin: it is not a run '
        'of gkd_jax. Use another MODEL_DIR.'
      )
    return
  was = _comparable(path.read_text(errors='replace'))
  now = _comparable(config)
  if was != now:
    changes = [
      line
      for line in difflib.unified_diff(was, now, lineterm='', n=0)
      if line[0] in '+-' and line[:3] not in ('+++', '---')
    ]
    raise ValueError(
      f'MODEL_DIR {run_dir} holds another run. Its config.gin (-) differs from '
      'this one (+):\n  ' + '\n  '.join(changes[:10]) + '\nUse another '
      'MODEL_DIR, or the same settings to go on with that run.'
    )


def _comparable(config: str) -> list[str]:
  """Lines that must not change: all but comments, and what is checked apart.

  Where the run lies; and how its data is dealt, which its checkpoints say.
  """
  # A long path begins on the next line, and goes on while lines are indented.
  free = re.compile(
    r'^(?:MODEL_DIR|NUM_DATA_SHARDS) = .*(?:\n .*)*', re.MULTILINE
  )
  return [
    line
    for line in free.sub('', config).splitlines()
    if line and not line.startswith('#')
  ]


def _save_manifest(run_dir: pathlib.Path, config: str) -> None:
  """Writes config.gin and versions.json beside the checkpoints.

  Raises:
    ValueError: this host does not see what the first one wrote.
  """
  # The first file of all: without it the folder is not known to be a run.
  files.write_whole(run_dir / 'config.gin', config)
  versions = {**checkpoint.versions(), 'command': sys.argv}
  files.write_whole(
    run_dir / 'versions.json', json.dumps(versions, indent=2) + '\n'
  )
  hosts.wait('the folder is there')
  if not (run_dir / 'config.gin').exists():
    raise ValueError(
      f'MODEL_DIR {run_dir} is another folder on host {jax.process_index()}: '
      'it must be one that all hosts share.'
    )
