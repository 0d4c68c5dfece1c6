# SPDX-License-Identifier: Apache-2.0
"""Runs every point of a grid with every seed, each with its own command.

A grid has axes, an axis has points. An axis that is a macro lists its values in
a tuple. Any other axis is a dict from the label of a point to its settings:

    {'STUDENT_DATA_FRACTION': (0.0, 1.0),
     'divergence': {'reverse_kl': {'DIVERGENCE': '@divergences.reverse_kl'},
                    ...}}

The folder of a run is named after its point:
`student_data_fraction=1.0,divergence=reverse_kl/seed_0`.

Seeds are an axis, given by `seeds` or, under its own name, as RANDOM_SEED: of
the grid, the settings or the experiment. Only one axis may give a setting. What
the experiment, or the settings, gives is a default for those points of an axis
that do not; it is refused if all do.

A run is described by a gin file, or by a dict (of a point, of the experiment,
of a run before the grid) with these keys, all optional:

    gin_file  a file, or a tuple of files; later ones override earlier ones
    run_mode  'train' (the default), 'infer' or 'eval'
    result    file in the run's folder that exists when the run is done; by
              default eval_test.json, or predictions_train.jsonl of 'infer'
    for_each  ('seed', an axis, ...): one run for each of their points, with the
              settings of that point. Only of runs before the grid
    MACRO     any other key is a setting, as after --gin.

In a text, {seed}, {axis} and {name of a run before the grid} are replaced by
the seed, the label of the point, and the folder of that run.
"""

import itertools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gkd_jax.report import report as report_lib
from gkd_jax.runtime import console, paths, run_folder
from gkd_jax.sweeps import jobs as jobs_lib

Spec = str | Mapping[str, Any]
Point = Mapping[str, str]  # {axis: label}

_SEED = 'seed'  # the axis of SEEDS
_DEFAULT_SEEDS = (0,)
_SHARED = ('EXPERIMENT', 'SETTINGS')
_RANDOM_SEED = 'RANDOM_SEED'
# Run mode -> the macro of its folder, and what it leaves there in the end.
_MODES = {
  'train': ('MODEL_DIR', 'eval_test.json'),
  'eval': ('EVAL_OUTPUT_DIR', 'eval_test.json'),
  'infer': ('INFER_OUTPUT_DIR', 'predictions_train.jsonl'),
}
_KEYS = ('gin_file', 'run_mode', 'result')
_REPORT_KEYS = ('title', 'metric', 'mode', 'tuned')


def sweep(
  output_dir: str,
  grid: Mapping[str, Mapping[str, Spec] | Sequence[Any]],
  experiment: Spec | None = None,
  seeds: Sequence[int] = _DEFAULT_SEEDS,
  settings: Mapping[str, Any] | None = None,
  before: Mapping[str, Spec] | None = None,
  num_parallel: int = 1,
  runs_per_process: int | None = None,
  report: Mapping[str, Any] | None = None,
  print_commands: bool = False,
  check: Callable[[Sequence[str], str], None] | None = None,
  flags: Sequence[str] = (),
) -> None:
  """Runs the points of a grid that are not done.

  Args:
    output_dir: of all runs; made if it is not there.
    grid: {axis: values of the macro, or {label: settings of the point}}.
    experiment: of all points; None if an axis has a gin file for each point.
    seeds: RANDOM_SEED of the runs of each point. The default, (0,), leaves it
      to others to give a RANDOM_SEED.
    settings: {macro: value} of all points.
    before: {name: a run, or the path of an existing one}, each after the runs
      that it uses.
    num_parallel: processes at a time.
    runs_per_process: runs that a process does one after another; 1: each run
      has its own process; None: any number.
    report: compare the runs in `output_dir` when all are done, with these
      settings of `report.report`: 'title', 'metric', 'mode', 'tuned'. None:
      no report.
    print_commands: print the commands that can run now, in any order, one a
      line, and stop.
    check: see `jobs.check_arguments`.
    flags: of gkd_jax.main, for all runs.

  Raises:
    ValueError: the grid is not valid; a setting is given twice; gin rejects a
      point's settings; the folder holds other runs, or runs of other files; or,
      after all others are done, a run failed.
  """
  paths.resolve(output_dir, 'MODEL_DIR')  # raises; commands get it as given
  folder = pathlib.Path(os.path.expanduser(output_dir))
  if num_parallel < 1:
    raise ValueError(f'NUM_PARALLEL must be 1 or more, got {num_parallel}.')
  if runs_per_process is not None and runs_per_process < 1:
    raise ValueError(
      f'RUNS_PER_PROCESS must be 1 or more, or None, got {runs_per_process}.'
    )
  if unknown := {*(report or {})} - {*_REPORT_KEYS}:
    raise ValueError(
      f'REPORT may set {", ".join(_REPORT_KEYS)}, not {sorted(unknown)}.'
    )
  jobs = make_jobs(
    folder, grid, experiment, seeds, settings or {}, before or {}
  )
  jobs = jobs_lib.add_flags(jobs, flags)
  if check is not None:
    jobs_lib.check_arguments(jobs, check)
  jobs_lib.check_same_files(jobs)
  jobs_lib.check_same_settings(folder / 'sweep.json', jobs)
  if print_commands:
    waiting = [job for job in jobs if not job.result.exists()]
    left = {job.name for job in waiting}
    ready = [job for job in waiting if left.isdisjoint(job.needs)]
    for job in ready:
      print(job.command)
    console.log(
      f'{len(jobs) - len(left)} of {len(jobs)} runs are done; {len(ready)} can '
      f'be run now; {len(left) - len(ready)} depend on these: run the same '
      'command again afterwards.'
    )
    return
  with run_folder.locked(folder, 'MODEL_DIR'):
    jobs_lib.run(jobs, num_parallel, runs_per_process)
  console.log(f'All {len(jobs)} runs are done: {folder}')
  if report is not None:
    axes, _ = _axes_and_common(grid, experiment, seeds, settings or {})
    runs = _all_runs(folder, axes, before or {})
    report_lib.report(runs, output_dir, **report)


def _all_runs(folder, axes, before) -> tuple[str, ...]:
  """Returns the folders of all runs, those that were there before included."""
  there = {
    _fill(value, point, {}): None
    for value in before.values()
    if isinstance(value, str) and not value.endswith('.gin')
    for point in _product(axes)
  }
  return (str(folder), *there)


def make_jobs(
  folder: pathlib.Path,
  grid: Mapping[str, Mapping[str, Spec] | Sequence[Any]],
  experiment: Spec | None,
  seeds: Sequence[int],
  settings: Mapping[str, Any],
  before: Mapping[str, Spec],
) -> list[jobs_lib.Job]:
  """Returns the runs of a sweep, each after those it needs; see `sweep`."""
  axes, common = _axes_and_common(grid, experiment, seeds, settings)
  stages: dict[str, _Stage] = {}
  jobs = []
  for name, value in before.items():
    where = f'BEFORE {name!r}'
    _check_name(name, where, [*axes, *stages])
    if isinstance(value, str) and not value.endswith('.gin'):
      stages[name] = _Stage(value, None)
      for path in {_fill(value, point, {}) for point in _product(axes)}:
        if paths.is_remote(path):
          continue
        there = paths.resolve(path, where)
        if not there.exists():
          raise ValueError(f'{where}: {path} {paths.missing(there)}.')
      continue
    spec = _spec(value, where, 'for_each')
    for_each = spec.pop('for_each', ())
    for_each = (for_each,) if isinstance(for_each, str) else for_each
    if unknown := set(for_each) - set(axes):
      raise ValueError(
        f'{where}: for_each may name {", ".join(axes)}, not {sorted(unknown)}.'
      )
    own_axes = {axis: axes[axis] for axis in axes if axis in for_each}
    pattern = '/'.join([name, *_folders({a: f'{{{a}}}' for a in own_axes})])
    jobs += [
      _job(
        folder,
        _fill(pattern, point, {}),
        {where: spec} | _specs(own_axes, point),
        point,
        stages,
      )
      for point in _product(own_axes)
    ]
    stages[name] = _Stage(pattern, pattern, folder)
  return jobs + [
    _job(
      folder,
      '/'.join(_folders(point)),
      common | _specs(axes, point),
      point,
      stages,
    )
    for point in _product(axes)
  ]


class _Stage(NamedTuple):
  """What comes before the grid. `path` and `job` may hold {axis}."""

  path: str
  job: str | None  # its name; None: it is there already
  folder: pathlib.Path | None = None  # of the sweep, if it is a run of it


_Specs = Mapping[str, Mapping[str, Any]]  # {where it is given: what it sets}
_Axes = Mapping[str, Mapping[str, Mapping[str, Any]]]  # {axis: {label: spec}}


def _axes_and_common(
  grid, experiment, seeds, settings
) -> tuple[_Axes, dict[str, Mapping[str, Any]]]:
  """Returns the axes, and what all points share, without its RANDOM_SEED.

  The seed is the last axis. There is none if the labels of another axis give
  RANDOM_SEED.
  """
  if not grid:
    raise ValueError('GRID is empty: name an axis, and its points.')
  axes = {}
  for axis, points in grid.items():
    where = f'GRID {axis!r}'
    _check_name(axis, where, [*axes, _SEED])
    if isinstance(points, Mapping):
      labels = list(points)
      specs = [_spec(value, where) for value in points.values()]
    else:
      labels, specs = _values(points, axis, where)
    axes[axis] = _labelled(labels, specs, where)
  common = {
    'EXPERIMENT': _spec(experiment or {}, 'EXPERIMENT'),
    'SETTINGS': _spec(settings, 'SETTINGS'),
  }
  seed_axis = _labelled(*_values(seeds, _RANDOM_SEED, 'SEEDS'), 'SEEDS')
  given = [] if tuple(seeds) == _DEFAULT_SEEDS else ['SEEDS']
  for where, spec in common.items():
    if _RANDOM_SEED in spec:
      given.append(where)
      value = spec.pop(_RANDOM_SEED)
      seed_axis = _labelled(*_values([value], _RANDOM_SEED, where), where)
  for axis, points in list(axes.items()):
    if any(_RANDOM_SEED in spec for spec in points.values()):
      given.append(_where(axis))
      seed_axis = axes.pop(axis) if axis == _RANDOM_SEED else None
  _check_shared(common, axes)
  if len(given) > 1:
    raise ValueError(
      f'{given[0]} and {given[1]} both give {_RANDOM_SEED}. Remove one of them'
      + (': SEEDS = (0,) counts as not given.' if 'SEEDS' in given else '.')
    )
  return axes | ({_SEED: seed_axis} if seed_axis else {}), common


def _check_shared(shared: _Specs, axes: _Axes) -> None:
  """Raises ValueError if all points of an axis replace a shared setting."""
  for where, spec in shared.items():
    for axis, points in axes.items():
      for key in spec.keys() - {'gin_file'}:
        if all(key in point for point in points.values()):
          raise ValueError(
            f'{where} and {_where(axis)} both give {key}. Remove one of them.'
          )


def _where(axis: str) -> str:
  return 'SEEDS' if axis == _SEED else f'GRID {axis!r}'


def _specs(axes: _Axes, point: Point) -> dict[str, Mapping[str, Any]]:
  """Returns what a point sets on each axis."""
  return {_where(axis): axes[axis][point[axis]] for axis in axes}


def _values(values, macro, where):
  if isinstance(values, str) or not isinstance(values, Sequence):
    raise ValueError(
      f'{where} must be a tuple of values or {{label: what it sets}}, not '
      f'{values!r}.'
    )
  for i, value in enumerate(values):
    if value in values[:i] and not isinstance(value, bool):
      raise ValueError(f'{where} has {value!r} twice.')
    if macro == _RANDOM_SEED and isinstance(value, int) and value < 0:
      raise ValueError(f'{where}: a seed must not be negative, got {value}.')
  return [str(value) for value in values], [{macro: value} for value in values]


def _labelled(labels, specs, where) -> dict[str, Mapping[str, Any]]:
  """Returns {label: spec}; the labels are parts of folders' names."""
  if not labels:
    raise ValueError(f'{where} is empty: there is nothing to run.')
  for label in labels:
    if not isinstance(label, str) or not re.fullmatch(r'[\w.+-]+', label):
      raise ValueError(
        f'{where}: {label!r} cannot be part of a folder name. Use a label of '
        "letters, digits, '_', '.', '+' and '-': {'label': {...}}."
      )
    if labels.count(label) > 1:
      raise ValueError(f'{where} has {label} twice.')
  return dict(zip(labels, specs, strict=True))


def _check_name(name, where, taken) -> None:
  if not isinstance(name, str) or not re.fullmatch(r'\w+', name):
    raise ValueError(
      f'{where}: a name may only have letters, digits and _. For a full '
      'setting name use labels: {name: {label: {setting: value}}}.'
    )
  if name.lower() in [other.lower() for other in taken]:
    raise ValueError(f'{where}: this name is already taken.')


def _spec(value, where, *more_keys) -> dict[str, Any]:
  """Returns what a run is, as a dict."""
  if isinstance(value, str):
    value = {'gin_file': value}
  if not isinstance(value, Mapping):
    raise ValueError(
      f'{where} must be a gin file or {{macro: value}}, not {value!r}.'
    )
  for key in value:
    if re.fullmatch('[a-z_]+', key) and key not in (*_KEYS, *more_keys):
      raise ValueError(
        f'{where}: {key!r} is no macro (those are CAPITALS), and none of '
        f'{", ".join((*_KEYS, *more_keys))}.'
      )
  return dict(value)


def _product(axes: Mapping[str, Mapping[str, Any]]) -> list[Point]:
  return [
    dict(zip(axes, labels, strict=True))
    for labels in itertools.product(*axes.values())
  ]


def _folders(point: Point) -> list[str]:
  """Returns the parts of a run's name: `axis=label,...` and `seed_0`."""
  labels = [f'{a.lower()}={label}' for a, label in point.items() if a != _SEED]
  parts = [','.join(labels)] if labels else []
  return parts + ([f'seed_{point[_SEED]}'] if _SEED in point else [])


def _job(
  folder: pathlib.Path,
  name: str,
  specs: _Specs,
  point: Point,
  stages: Mapping[str, _Stage],
) -> jobs_lib.Job:
  """Returns the run of a point.

  Raises:
    ValueError: the specs are not those of a run, or two give one setting.
  """
  files, merged, places = [], {}, {}
  for where, spec in specs.items():
    own = spec.get('gin_file', ())
    files += [own] if isinstance(own, str) else own
    for key in spec:
      # What all points share is the default of a point; see `_check_shared`.
      is_default = places.get(key) in _SHARED and where not in _SHARED
      if key in places and key != 'gin_file' and not is_default:
        raise ValueError(
          f'{name}: {places[key]} and {where} both give {key}, '
          f'{merged[key]!r} and {spec[key]!r}. Remove one of them.'
        )
      places[key] = where
    merged |= spec
  merged.pop('gin_file', None)
  mode = merged.pop('run_mode', 'train')
  if mode not in _MODES:
    raise ValueError(
      f'{name}: run_mode may be {", ".join(_MODES)}, not {mode!r}.'
    )
  macro, result = _MODES[mode]
  result = merged.pop('result', result)
  if macro in merged:
    raise ValueError(f'{name}: {macro} must not be set; the sweep sets it.')
  needs: dict[str, None] = {}

  def fill(value):
    if isinstance(value, str):
      return _fill(value, point, stages, needs)
    if isinstance(value, Mapping):  # such as {name: path} of several teachers
      return {key: fill(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
      return type(value)(map(fill, value))
    return value

  files = [fill(file) for file in files]
  if not files:
    raise ValueError(f'{name} has no gin file: set EXPERIMENT.')
  jobs_lib.check_gin_files(files, name)
  settings = {key: fill(value) for key, value in merged.items()}
  return jobs_lib.Job(
    name,
    jobs_lib.arguments(mode, files, {macro: folder / name, **settings}),
    folder / name / result,
    tuple(needs),
  )


def _fill(
  text: str,
  point: Point,
  stages: Mapping[str, _Stage],
  needs: dict[str, None] | None = None,
) -> str:
  """Replaces {axis} and {stage}; notes the jobs of the latter in `needs`.

  {{name}} becomes {name}, for templates such as TEACHER_INPUTS.
  """

  def value(match):
    name = match[2]
    if name is None:
      return f'{{{match[1]}}}'
    if name in point:
      return point[name]
    if name not in stages:
      raise ValueError(
        f'{match[0]} in {text!r} is undefined. Defined names: '
        f'{", ".join((*point, *stages)) or "none"}. (A run before the grid may '
        'use the axes of its for_each, and earlier runs.) Write '
        f'{{{match[0]}}} for the text {match[0]}.'
      )
    stage = stages[name]
    own_axes = re.findall(r'\{(\w+)\}', stage.path)
    if missing := [axis for axis in own_axes if axis not in point]:
      raise ValueError(
        f'{match[0]} in {text!r}: there is one for each {", ".join(missing)}. '
        'Add this to the for_each of the run that uses it.'
      )
    if stage.job is not None:
      needs[_fill(stage.job, point, {})] = None
    path = _fill(stage.path, point, {})
    # The folder's own name may have braces.
    return path if stage.job is None else f'{stage.folder}/{path}'

  return re.sub(r'\{\{(\w+)\}\}|\{(\w+)\}', value, text)
