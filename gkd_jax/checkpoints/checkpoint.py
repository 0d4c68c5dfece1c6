# SPDX-License-Identifier: Apache-2.0
"""Saves and restores a run, and loads the parameters of another.

A run folder holds `checkpoint_<step>` folders. Each is complete in itself:
parameters, optimizer state, the data iterator's position, and a description of
the model and its vocabulary. Orbax writes a checkpoint under another name and
renames it when all of it is there.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from gkd_jax.checkpoints import checksums
from gkd_jax.distill.state import TrainState
from gkd_jax.models import registry
from gkd_jax.models.interface import ModelConfig
from gkd_jax.models.params import named_params
from gkd_jax.parallel import hosts
from gkd_jax.runtime import console, files, paths
from gkd_jax.runtime.run_folder import CHECKPOINT, checkpoint_steps

_METRICS = 'metrics/metrics'
# Of a checkpoint: what another run reads.
MODEL_FILES = ('description', 'params')
_MAX_DIFFERENCES = 5


# A truncated or overwritten file can raise any exception, also a plain
# Exception from Orbax. These errors, however, are not caused by damage.
_NO_DAMAGE = (files.CheckpointMismatch, MemoryError, ImportError, NameError)
_SAYS_NO_DAMAGE = re.compile(
  'RESOURCE_EXHAUSTED|Too many open files|No space left'
)


# Packages whose versions can change a result.
_VERSIONS_OF = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'seqio',
  'tensorflow',
  'numpy',
)


class ModelDescription(NamedTuple):
  """The model config and vocabulary that belong to saved parameters."""

  config: ModelConfig
  vocabulary: str

  def to_json(self) -> dict[str, Any]:
    return {
      'config': registry.config_to_json(self.config),
      'vocabulary': self.vocabulary,
    }

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> 'ModelDescription':
    config = registry.config_from_json(values['config'])
    return cls(config, values['vocabulary'])


def versions() -> dict[str, str]:
  """Returns the versions of software and the devices of this process."""
  return {
    **{name: importlib.metadata.version(name) for name in _VERSIONS_OF},
    'python': platform.python_version(),
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
  }


class Saved(NamedTuple):
  """A restored run."""

  state: TrainState
  train_seconds: float
  to_evaluate: bool  # the run was interrupted while it evaluated this state
  log: Mapping[str, Any] | None  # see `TrainLog.state`
  # Of an evaluation of this state that ended after it was saved; None: none.
  late_metrics: dict[str, float] | None = None


class _Checksummed:
  """Makes an Orbax handler write checksums before its files count."""

  def finalize(self, directory):
    # The first host calls it in the thread that saves, when all files exist.
    super().finalize(directory)
    checksums.write(directory)


class _ArraysHandler(_Checksummed, ocp.StandardCheckpointHandler):
  pass


@ocp.args.register_with_handler(_ArraysHandler, for_save=True)
@dataclasses.dataclass
class _SaveArrays(ocp.args.StandardSave):
  pass


@ocp.args.register_with_handler(_ArraysHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreArrays(ocp.args.StandardRestore):
  pass


class _DescriptionHandler(_Checksummed, ocp.JsonCheckpointHandler):
  pass


@ocp.args.register_with_handler(_DescriptionHandler, for_save=True)
@dataclasses.dataclass
class _SaveDescription(ocp.args.JsonSave):
  pass


@ocp.args.register_with_handler(_DescriptionHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreDescription(ocp.args.JsonRestore):
  pass


class _IteratorHandler(_Checksummed, ocp.CheckpointHandler):
  """Adapts an object with save(folder) and restore(folder) to Orbax."""

  def save(self, directory, args):
    args.item.save(os.fspath(directory))

  def restore(self, directory, args):
    args.item.restore(os.fspath(directory))
    return args.item


@ocp.args.register_with_handler(_IteratorHandler, for_save=True)
@dataclasses.dataclass
class _SaveIterator(ocp.args.CheckpointArgs):
  item: Any


@ocp.args.register_with_handler(_IteratorHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreIterator(ocp.args.CheckpointArgs):
  item: Any


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    """Returns False: `hosts.reached_preemption` detects preemption.

    JAX agrees on a future call by the number that each call passes. Orbax
    passes steps; mixed with our counter, the agreed call might never come.
    """
    return False


class Checkpoints:
  """The checkpoints of one run; keeps the latest ones and the best."""

  def __init__(
    self,
    run_dir: str | os.PathLike,
    model: ModelDescription,
    *,
    keep: int = 1,
    best_metric: str | None = None,
    best_mode: str | None = None,
  ):
    """Opens the folder; creates it if it does not exist.

    Args:
      run_dir: the run's folder.
      model: saved with each checkpoint.
      keep: number of latest checkpoints to keep.
      best_metric: also keeps the checkpoint that is best by this metric.
      best_mode: 'min' or 'max'; needed with best_metric.
    """
    self._model = model
    self._folder = epath.Path(run_dir).absolute()
    # Orbax reads the descriptions of all checkpoints when it opens a folder.
    _set_aside(self._folder, _damaged_descriptions(self._folder))
    policies = [checkpoint_managers.LatestN(n=keep)]
    value = None
    if best_metric is not None:
      value = functools.partial(_rank, best_metric, best_mode)
      policies.append(
        checkpoint_managers.BestN(
          get_metric_fn=value,
          reverse=best_mode == 'min',
          n=1,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._folder.mkdir(parents=True, exist_ok=True)
    self._manager = _Manager(
      paths.for_libraries(self._folder),
      options=ocp.CheckpointManagerOptions(
        step_prefix=CHECKPOINT,
        # Orbax saves metrics only with best_fn; a resumed run needs them to
        # find the best checkpoint. The policy decides what is kept.
        best_fn=value,
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
      ),
    )

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(
    self,
    state: TrainState,
    data_iterator: Any,
    *,
    train_seconds: float,
    metrics: dict[str, float] | None = None,
    to_evaluate: bool = False,
    log: Mapping[str, Any] | None = None,
  ) -> None:
    """Saves a state: copies the arrays, then writes in the background.

    Args:
      state: to save.
      data_iterator: with its position.
      train_seconds: of the run so far.
      metrics: of the state; None: not evaluated.
      to_evaluate: whether its evaluation was interrupted.
      log: see `TrainLog.state`.
    """
    step = int(state.step)
    if step == self.latest_step():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        **{name: _SaveArrays(part) for name, part in _parts(state).items()},
        data=_SaveIterator(data_iterator),
        description=_SaveDescription(
          {
            'step': step,
            'train_seconds': train_seconds,
            'to_evaluate': to_evaluate,
            'log': log,
            'model': self._model.to_json(),
          }
        ),
      ),
      metrics=metrics,
    )

  def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
    """Adds metrics to a checkpoint saved without; it may become the best."""
    files.write_atomically(
      self._folder / f'{CHECKPOINT}_{step}' / _METRICS, json.dumps(metrics)
    )
    hosts.barrier('metrics added')
    self._manager.reload()

  def restore(
    self, abstract_state: TrainState, data_iterator: Any
  ) -> Saved | None:
    """Restores the newest checkpoint, and the iterator's position in place.

    Args:
      abstract_state: shapes, dtypes and shardings of the state.
      data_iterator: of this run's data.

    If the newest is damaged, the previous one is restored and the damaged one
    is renamed. With several hosts, arrays that cannot be read in spite of
    their checksums end the run, since other hosts may have read theirs.

    Returns:
      The restored run; None if there is no checkpoint.

    Raises:
      ValueError: the checkpoint is of another model or data, or all are
        damaged.
    """
    damaged = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      folder = self._folder / f'{CHECKPOINT}_{step}'
      error = _error_of(lambda folder=folder: _check_whole(folder))
      if hosts.any_host(error is not None):
        damaged.append((folder, error or _ELSEWHERE))
        continue
      check_shapes(folder, saved_shapes(folder), shapes(abstract_state.params))
      try:
        restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
            **{
              name: _RestoreArrays(part)
              for name, part in _parts(abstract_state).items()
            },
            data=_RestoreIterator(data_iterator),
            description=_RestoreDescription(),
          ),
        )
      except Exception as e:
        if hosts.is_multihost() or not is_damage(e):
          raise
        damaged.append((folder, e))
        continue
      _set_aside(self._folder, damaged)
      if damaged:
        self._manager.reload()
      state = abstract_state._replace(
        step=jax.device_put(
          jax.numpy.int32(step), abstract_state.step.sharding
        ),
        **{name: getattr(restored, name) for name in _parts(abstract_state)},
      )
      to_evaluate = restored.description.get('to_evaluate', False)
      late_metrics = None
      if to_evaluate and (folder / _METRICS).exists():  # added since
        to_evaluate = False
        late_metrics = json.loads(
          (folder / _METRICS).read_text(encoding='utf-8')
        )
      return Saved(
        state,
        restored.description['train_seconds'],
        to_evaluate,
        restored.description.get('log'),
        late_metrics,
      )
    _set_aside(self._folder, damaged)  # raises, if these are all
    return None

  def close(self) -> None:
    """Waits until all checkpoints are written."""
    self._manager.close()


def _parts(state: TrainState) -> dict[str, Any]:
  """Returns {name: part} of a state to save: all parts that have leaves."""
  parts = state._asdict()
  del parts['step']  # the checkpoint's name and description have it
  return {
    name: part for name, part in parts.items() if jax.tree.leaves(part)
  } | {'params': state.params, 'opt_state': state.opt_state}


Damaged = Sequence[tuple[epath.Path, Exception]]
_ELSEWHERE = ValueError('another host cannot read it')


def is_damage(error: Exception) -> bool:
  """Returns whether an error of reading indicates damaged files."""
  return not (
    isinstance(error, _NO_DAMAGE) or _SAYS_NO_DAMAGE.search(str(error))
  )


def _error_of(read: Callable[[], Any]) -> Exception | None:
  """Returns the error if `read` meets damaged files, or None."""
  try:
    read()
  except Exception as e:
    if not is_damage(e):
      raise
    return e
  return None


def _check_whole(folder: epath.Path) -> None:
  """Raises an error if a checkpoint is damaged, as far as can be seen."""
  saved_shapes(folder)
  for item in folder.iterdir():
    if item.is_dir():
      checksums.check(item)


def _damaged_descriptions(run_dir: epath.Path) -> Damaged:
  """Returns the checkpoints with unreadable descriptions, with the errors."""

  def read(folder):
    names = ['_CHECKPOINT_METADATA', 'description/metadata']
    if (folder / _METRICS).parent.is_dir():
      names.append(_METRICS)
    for name in names:
      json.loads((folder / name).read_text(encoding='utf-8'))

  damaged = []
  for step in sorted(checkpoint_steps(run_dir)):
    folder = run_dir / f'{CHECKPOINT}_{step}'
    error = _error_of(lambda folder=folder: read(folder))
    if hosts.any_host(error is not None):
      damaged.append((folder, error or _ELSEWHERE))
  return damaged


def _rank(name: str, mode: str | None, metrics: Mapping[str, float]) -> float:
  """Returns a metric, by which checkpoints are sorted; NaN is the worst."""
  value = metrics[name]
  if not math.isnan(value):
    return value
  return math.inf if mode == 'min' else -math.inf


def _set_aside(run_dir: epath.Path, damaged: Damaged) -> None:
  """Renames checkpoints that cannot be read: their steps are saved again.

  Raises:
    ValueError: there are no others.
  """
  if not damaged:
    return
  reasons = {folder: first_line(error) for folder, error in damaged}
  num_there = len(checkpoint_steps(run_dir))
  hosts.barrier('checkpoints counted')  # before one of them has another name
  if len(reasons) == num_there:
    raise ValueError(
      'No checkpoint of this run can be read:'
      + ''.join(f'\n  {folder}: {why}' for folder, why in reasons.items())
      + '\nTo start afresh remove them, or choose another MODEL_DIR.'
    )
  for folder, why in reasons.items():
    name = f'damaged_{folder.name}'
    while (run_dir / name).exists():  # of an earlier time
      name += '_again'
    console.log(
      f'{folder} cannot be read ({why}). It is called {name} now; the run goes '
      'on from the one before.'
    )
    if hosts.is_first_host():
      folder.rename(run_dir / name)
  hosts.barrier('damaged checkpoints set aside')


def first_line(error: Exception) -> str:
  """Returns an error's type and the first line of its message."""
  text = paths.as_given(str(error)).strip().split('\n')[0]
  return f'{type(error).__name__}: {text[:200]}'


def is_checkpoint(folder: epath.Path) -> bool:
  """Whether a folder is one of our checkpoints."""
  return (folder / 'description').is_dir()


def find(
  path: str | os.PathLike,
  is_one: Callable[[epath.Path], bool] = is_checkpoint,
  setting: str = 'CHECKPOINT_PATH',
) -> epath.Path:
  """Returns the checkpoint folder at a path.

  Args:
    path: a checkpoint folder, or one with `checkpoint_<step>` folders: the
      newest of these.
    is_one: whether a folder is a checkpoint.
    setting: name of the path in gin, for errors.

  Raises:
    ValueError: there is none.
  """
  if paths.is_remote(path):
    folder = epath.Path(path)
  else:
    folder = epath.Path(paths.resolve(path, setting))
  if is_one(folder):
    return folder
  if not folder.is_dir():
    what = paths.missing(folder)
    if folder.exists():
      what = 'is a file, not a folder'
  elif there := checkpoint_steps(folder):
    newest = folder / f'{CHECKPOINT}_{max(there)}'
    if is_one(newest):
      return newest
    what = f'has a {newest.name} that is no checkpoint'
  else:
    what = 'holds no checkpoint'
  raise ValueError(
    f'{setting}: {path} {what}. Give a run folder (a MODEL_DIR that has been '
    f'trained), one {CHECKPOINT}_<step> folder in it, a Hugging Face folder '
    '(config.json, model.safetensors) or a T5X checkpoint.'
  )


def describe(folder: epath.Path) -> ModelDescription:
  """Returns the description of a checkpoint's model."""
  text = (folder / 'description' / 'metadata').read_text(encoding='utf-8')
  return ModelDescription.from_json(json.loads(text)['model'])


def load_params(
  folder: epath.Path, abstract_params: Any, dtype: str = 'float32'
) -> Any:
  """Loads a checkpoint's parameters.

  Args:
    folder: see `find`.
    abstract_params: shapes and shardings wanted.
    dtype: wanted.

  Raises:
    ValueError: they have other shapes; the first differences are listed. Or a
      file is damaged.
  """
  check_shapes(folder, saved_shapes(folder), shapes(abstract_params))
  checksums.check(folder / 'params')
  wanted = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
    abstract_params,
  )
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(_of_library(folder, 'params'), wanted)


def _of_library(folder: epath.Path, item: str) -> epath.Path:
  """Returns the path of a part of a checkpoint for Orbax."""
  return epath.Path(paths.for_libraries(folder)) / item


def saved_shapes(folder: epath.Path) -> dict[str, tuple[int, ...]]:
  """Returns {name: shape} of a checkpoint's parameters; reads none."""
  with ocp.StandardCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(
      _of_library(folder, 'params')
    ).item_metadata
  if metadata is None:
    raise OSError(f'{folder / "params"} does not say what it holds')
  return shapes(metadata.tree)


def check_shapes(
  folder: epath.Path,
  saved: Mapping[str, tuple[int, ...]],
  wanted: Mapping[str, tuple[int, ...]],
) -> None:
  """Raises ValueError, with the first differences, unless shapes agree."""
  differences = [
    f'{name}: {saved.get(name, "absent")} in the checkpoint, '
    f'{wanted.get(name, "absent")} wanted'
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  ]
  raise_differences(folder, differences)


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns {'encoder/layers_0/mlp/wo/kernel': its shape} of parameters."""
  return {name: tuple(x.shape) for name, x in named_params(tree).items()}


def raise_differences(folder: epath.Path, differences: Sequence[str]) -> None:
  """Raises ValueError with the first differences, if there are any."""
  if not differences:
    return
  shown = list(differences[:_MAX_DIFFERENCES])
  if len(differences) > len(shown):
    shown.append(f'and {len(differences) - len(shown)} more')
  raise ValueError(
    f'The checkpoint {folder} does not fit the model:\n  ' + '\n  '.join(shown)
  )
