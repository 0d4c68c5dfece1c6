# SPDX-License-Identifier: Apache-2.0
"""Trains a student: checks settings, builds the run, and runs the loop."""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import optax

from gkd_jax import build
from gkd_jax.batch import Batch
from gkd_jax.checkpoints import checkpoint, pretrained
from gkd_jax.data import datasets, iterators, tokenization, vocabularies
from gkd_jax.distill import rewards, teachers
from gkd_jax.distill import state as state_lib
from gkd_jax.distill.state import Frozen, TrainState
from gkd_jax.distill.step import TrainStep
from gkd_jax.evaluation import drafting, evaluate, programs
from gkd_jax.experiment import (
  Due,
  Experiment,
  Schedule,
  check,
  check_best_metric,
  rate_at,
)
from gkd_jax.parallel import hosts, partitioning
from gkd_jax.runtime import console, metrics, pins, run_folder, train_log
from gkd_jax.runtime.signals import Interrupted, Signals


def train(experiment: Experiment, run: run_folder.Run) -> None:
  """Trains a student and evaluates it. Resumes an interrupted run.

  Args:
    experiment: settings of the method, models, data and evaluation.
    run: folder and start time.

  Raises:
    ValueError: settings contradict each other, the files or the devices.
      Raised before anything is compiled or written.
    Interrupted: SIGTERM or Ctrl-C was received; the run is saved.
    FloatingPointError: too many steps were skipped; the run is saved.
  """
  started = time.monotonic() if run.started is None else run.started
  check(experiment)
  mesh = experiment.mesh.make()
  plan = build.make_plan(experiment, mesh)
  import_seconds = run.import_seconds + vocabularies.import_libraries()
  task = build.open_task(experiment.data.train, experiment.student.config)
  shards = build.data_shards(experiment.data, mesh)
  build.check_data(experiment, task, shards['num_shards'])
  run_folder.check_same_config(run.folder, run.config_text())
  has_checkpoint = bool(run_folder.checkpoint_steps(run.folder))
  if not has_checkpoint and not run.overwrite:
    run_folder.check_results(
      run.folder, functools.partial(_is_past_first_checkpoint, experiment)
    )
  starts_anew = run.overwrite and not has_checkpoint
  started_with = None if starts_anew else pins.read(run.folder)
  sources = build.open_sources(
    build.with_pinned_steps(experiment, started_with), task
  )
  pinned = build.pin(experiment, task, sources)
  pins.check_same(run.folder, started_with, pinned)
  reward_fn = build.plan_reward_fn(experiment, task, sources, mesh)

  lost = tokenization.log(experiment.data.train).scalars()
  for dataset in experiment.evaluation.all_datasets:
    tokenization.log(dataset)

  # From here on parameters are loaded and the run's folder is written.
  models = build.load_models(experiment, plan, sources, mesh)
  side_files, sources = sources.folders, None  # frees their memory
  signals = Signals()
  validation, test = _evaluations(
    experiment, plan, task, models, reward_fn, mesh, signals.check
  )
  train_step = build.make_train_step(
    experiment,
    plan,
    teacher=models.teacher.module,
    ids=task.ids,
    reward_fn=reward_fn,
  )
  iterator = iterators.TrainIterator(
    experiment.data.train,
    seed=experiment.schedule.seed,
    pad_id=task.ids.pad,
    **shards,
  )
  hosts.barrier('settings checked')
  run.folder.mkdir(parents=True, exist_ok=True)
  with run_folder.locked(run.folder, 'MODEL_DIR'):
    resumes = run_folder.has_run(run.folder)
    if starts_anew:
      run_folder.remove_results(run.folder)
    run_folder.save_manifest(
      run.folder, run.config_text(), checkpoint.versions()
    )
    if started_with is None:
      pins.save(run.folder, pinned)
    pretrained.keep_side_files(side_files, run.folder)
    checkpoints = build.open_checkpoints(experiment, task, run.folder)
    initial = build.initial_state(experiment, plan, models.student_params, mesh)
    saved = _restore(checkpoints, plan, initial, iterator, resumes)
    # The first step donates these arrays: drop the other references to them.
    models, initial = models._replace(student_params=None), None
    state, train_seconds = _loop(
      _Training(
        schedule=experiment.schedule,
        run_dir=run.folder,
        train_step=train_step,
        frozen=models.frozen,
        iterator=iterator,
        put_batch=functools.partial(
          partitioning.put_batch,
          mesh=mesh,
          batch_size=experiment.data.train.batch_size,
        ),
        evaluation=validation,
        checkpoints=checkpoints,
        signals=signals,
        lost=lost,
        log=_log_settings(experiment, started, import_seconds),
        after_evaluation=functools.partial(
          state_lib.after_evaluation, experiment.method
        ),
      ),
      saved,
    )
    checkpoints.close()
    if test is not None:
      _evaluate_test(
        test, experiment.evaluation.test.split, state, train_seconds, run.folder
      )
    console.log(f'Done: {run.folder}')


def _is_past_first_checkpoint(
  experiment: Experiment, line: Mapping[str, float]
) -> bool:
  """Returns whether a run had saved its first checkpoint at a line."""
  schedule, step = experiment.schedule, line['step']
  if any(schedule.due(earlier).checkpoint for earlier in range(1, step)):
    return True
  # A finished run. Its last evaluation precedes its last checkpoint.
  is_evaluated = any(name.startswith('validation/') for name in line)
  return step == schedule.total_steps and (
    is_evaluated or experiment.evaluation.validation is None
  )


class _Training(NamedTuple):
  """Inputs of the training loop.

  Attributes:
    schedule: of the run.
    run_dir: folder of the run.
    train_step: not compiled yet.
    frozen: parameters that the step does not change.
    iterator: of the training data.
    put_batch: copies this host's rows of a batch to the devices.
    evaluation: of the validation split; None: no evaluation.
    checkpoints: of the run.
    signals: that stop the run.
    lost: shares of the training data that tokenizing lost, {metric: value}.
    log: settings of the metrics.
    after_evaluation: (state, values) -> state.
  """

  schedule: Schedule
  run_dir: pathlib.Path
  train_step: TrainStep
  frozen: Frozen
  iterator: iterators.TrainIterator
  put_batch: Callable[[Batch], Batch]
  evaluation: evaluate.Evaluation | None
  checkpoints: checkpoint.Checkpoints
  signals: Signals
  lost: Mapping[str, float]
  log: train_log.LogSettings
  after_evaluation: Callable[[TrainState, dict[str, float]], TrainState]


def _loop(
  training: _Training, saved: checkpoint.Saved
) -> tuple[TrainState, float]:
  """Runs the remaining steps; returns the state and the training seconds.

  Dispatch is asynchronous: the host reads the metrics of a step while the
  device computes the next step. The seconds exclude compilation and evaluation.
  """
  state, train_seconds, to_evaluate, saved_log, values = saved
  first_step, total_steps = int(state.step), training.schedule.total_steps
  if first_step == total_steps and not to_evaluate:
    return state, train_seconds
  writer = metrics.MetricWriter(training.run_dir, first_step)
  if first_step == 0 and training.lost:
    writer.write(0, dict(training.lost))
  if to_evaluate:  # the run was interrupted during this evaluation
    values = _evaluate(training, writer, state, first_step)
    training.checkpoints.add_metrics(first_step, values)
  if values is not None:  # the saved state does not know them
    state = training.after_evaluation(state, values)
  if first_step == total_steps:
    writer.close()
    return state, train_seconds

  batch = training.put_batch(next(training.iterator))
  compiled = _compile(training, state, batch)
  log = train_log.TrainLog(
    training.log, writer, training.run_dir, first_step, saved_log
  )
  clock = time.monotonic()
  with training.signals.recorded():
    for step in range(first_step + 1, total_steps + 1):
      if batch is None:
        batch = training.put_batch(next(training.iterator))
      state, step_metrics = compiled(state, training.frozen, batch)
      log.dispatched(step, step_metrics, batch)
      batch = None
      due = training.schedule.due(step)
      stops = training.signals.should_stop() or log.too_many_skipped
      if not (stops or due.checkpoint or _is_evaluation_due(training, due)):
        continue
      log.flush()
      log.stop_clock()
      train_seconds += time.monotonic() - clock
      state, stops = _evaluate_and_save(
        training, due, state, train_seconds, log, writer, stops
      )
      if stops:
        _stop(training, log, step)
      clock = time.monotonic()
      log.start_clock()
  log.close()
  return state, train_seconds


def _compile(
  training: _Training, state: TrainState, batch: Batch
) -> jax.stages.Compiled:
  """Compiles the step, and logs how long it took."""
  start = time.monotonic()
  compiled = build.compile_step(
    training.train_step, state, training.frozen, batch
  )
  console.log(f'Compiled the step in {time.monotonic() - start:.1f} s.')
  return compiled


def _is_evaluation_due(training: _Training, due: Due) -> bool:
  return due.evaluation and training.evaluation is not None


def _evaluate(
  training: _Training,
  writer: metrics.MetricWriter,
  state: TrainState,
  step: int,
) -> dict[str, float]:
  """Measures the student on the validation split, and logs the result."""
  values, table = training.evaluation(state.params)
  writer.write(step, {f'validation/{k}': v for k, v in values.items()})
  writer.text(step, 'samples', table)
  console.log(f'step {step}  {evaluate.format_metrics(values)}\n{table}')
  return values


def _evaluate_and_save(
  training: _Training,
  due: Due,
  state: TrainState,
  train_seconds: float,
  log: train_log.TrainLog,
  writer: metrics.MetricWriter,
  stops: bool,
) -> tuple[TrainState, bool]:
  """Evaluates and saves if due after a step.

  A run that stops skips the evaluation. Its checkpoint records that the
  evaluation is pending.

  Returns:
    The state, and whether the run stops.
  """
  stops = stops or log.too_many_skipped
  values, to_evaluate = None, _is_evaluation_due(training, due)
  if to_evaluate and not stops:
    try:
      with training.signals.raised_immediately():
        values = _evaluate(training, writer, state, due.step)
        to_evaluate = False
    except Interrupted:
      stops = True
    if not to_evaluate:
      state = training.after_evaluation(state, values)
  if due.checkpoint or stops:
    training.checkpoints.save(
      state,
      training.iterator,
      train_seconds=train_seconds,
      metrics=values,
      to_evaluate=to_evaluate,
      log=log.state(),
    )
  return state, stops or training.signals.received is not None


def _stop(training: _Training, log: train_log.TrainLog, step: int) -> None:
  """Closes the checkpoints and the log, and raises the reason for the stop."""
  training.checkpoints.close()
  log.close()
  log.raise_if_too_many_skipped()
  raise Interrupted(
    f'Stopped after step {step}, which is saved. The same command resumes the '
    'run from there.',
    training.signals.exit_code,
  )


def _restore(
  checkpoints: checkpoint.Checkpoints,
  plan: build.Plan,
  initial: TrainState,
  iterator: iterators.TrainIterator,
  resumes: bool,
) -> checkpoint.Saved:
  """Returns the last checkpoint of the run, or its initial state.

  Args:
    checkpoints: of the run.
    plan: of the run.
    initial: state before the first step.
    iterator: restored to its position at the checkpoint.
    resumes: whether the run was started before.
  """
  saved = checkpoints.restore(plan.state, iterator)
  if saved:
    console.log(f'Resuming after step {int(saved.state.step)}.')
    return saved
  if resumes:
    console.log('The run was interrupted before its first checkpoint.')
  return checkpoint.Saved(initial, 0.0, False, None)


def _evaluations(
  experiment: Experiment,
  plan: build.Plan,
  task: build.Task,
  models: build.Models,
  reward_fn: rewards.RewardFn | None,
  mesh: jax.sharding.Mesh,
  before_batch: Callable[[], None],
) -> tuple[evaluate.Evaluation | None, evaluate.Evaluation | None]:
  """Makes the evaluations of the validation and the test split.

  Raises:
    ValueError: BEST_METRIC, or a value that the policy reads, is not a
      validation metric, or BEST_MODE is missing.
  """
  mean_reward = None
  if reward_fn is not None:
    mean_reward = programs.make_mean_reward(
      experiment.method.reward,
      reward_fn,
      models.reward.params,
      ids=task.ids,
      mesh=mesh,
    )

  def make(dataset: datasets.DatasetConfig | None, is_timed: bool):
    return dataset and evaluate.Evaluation(
      dataset,
      plan.student,
      models.teacher,
      experiment.evaluation.decodings,
      seed=experiment.schedule.seed,
      mesh=mesh,
      # Times in metrics.jsonl would differ after a resume.
      drafts=drafting.Drafts(
        as_draft=experiment.evaluation.as_draft, is_timed=is_timed
      ),
      mean_reward=mean_reward,
      divergence=experiment.method.objective.divergence,
      grades=teachers.without_student(
        experiment.method.teacher, experiment.teacher.names
      ),
      before_batch=before_batch,
    )

  validation = make(experiment.evaluation.validation, is_timed=False)
  test = make(experiment.evaluation.test, is_timed=True)
  if experiment.keep.best_metric is not None:
    check_best_metric(experiment.keep, validation.names())
  for name in experiment.method.policy.reads_metrics:
    if name not in validation.names():
      raise ValueError(
        f'POLICY reads {name!r}, which is not a validation metric. Validation '
        f'metrics: {", ".join(validation.names())}.'
      )
  return validation, test


def _evaluate_test(
  evaluation: evaluate.Evaluation,
  split: str,
  state: TrainState,
  train_seconds: float,
  run_dir: pathlib.Path,
) -> None:
  """Evaluates the trained student, unless its results exist already."""
  if (run_dir / f'eval_{split}.json').exists():
    return
  # Without the teacher: its own run has its test metrics.
  values, _ = evaluation(state.params, with_teacher=False)
  evaluate.write_samples(run_dir, split, evaluation.samples(state.params))
  evaluate.write_results(
    run_dir,
    split,
    {
      'step': int(state.step),
      'train_seconds': train_seconds,
      **values,
      **evaluation.notes,
    },
  )
  console.log(f'{split}: {evaluate.format_metrics(values)}')


def _log_settings(
  experiment: Experiment, started: float, import_seconds: float
) -> train_log.LogSettings:
  schedule, reward = experiment.schedule, experiment.method.reward
  rates: optax.Schedule = experiment.optimization.make_schedule(
    schedule.total_steps
  )

  def log_first_step():
    console.log(
      f'First step done after {time.monotonic() - started:.1f} s, of which '
      f'{import_seconds:.1f} s are imports.'
    )

  return train_log.LogSettings(
    total_steps=schedule.total_steps,
    period=schedule.log_period,
    max_skipped_steps=schedule.max_skipped_steps,
    learning_rate=functools.partial(rate_at, rates),
    raise_failure=reward.raise_failure if reward else lambda: None,
    after_first_step=log_first_step,
  )
