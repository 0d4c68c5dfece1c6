# SPDX-License-Identifier: Apache-2.0
"""Runs methods side by side, each with its own command, and reports.

A comparison is: one teacher; for each seed one initial student, and from it
every method. Each is a run of its own (see `jobs`); this module says which
there are, and reads what they wrote.
"""

import json
import pathlib
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gkd_jax.report import plots as plots_lib
from gkd_jax.report import tables
from gkd_jax.report.plots import Bars, Line, Panel, Plot
from gkd_jax.report.tables import Column, Mean
from gkd_jax.runtime import files, run_folder
from gkd_jax.runtime import metrics as metrics_lib
from gkd_jax.sweeps import jobs as jobs_lib
from gkd_jax.sweeps.jobs import Job

_TEACHER = 'teacher'
_INITIAL = 'initial_student'


def compare(
  output_dir: str,
  teacher: str,
  initial_student: str,
  evaluation: str,
  methods: Mapping[str, str],
  metrics: Sequence[str],
  title: str,
  settings: Mapping[str, Mapping[str, Any]] | None = None,
  seeds: Sequence[int] = (0,),
  num_parallel: int = 2,
  check: Callable[[Sequence[str], str], None] | None = None,
  flags: Sequence[str] = (),
) -> None:
  """Runs a comparison, or what is left of it, and writes its report.

  Writes `results.json`, `report.md` and two plots into `output_dir`, and
  prints the table. What is done is not run again.

  Args:
    output_dir: made if it is not there.
    teacher: gin file that trains the teacher.
    initial_student: gin file that trains the student all methods start from.
    evaluation: gin file that evaluates the initial student.
    methods: {name: gin file}, in the order of the table.
    metrics: of the task, e.g. ('wer', 'per'); the share of the gap that is
      closed is measured on the first.
    title: of the report.
    settings: {'teacher', 'initial_student' or 'methods': {macro: value}},
      overrides for those runs.
    seeds: of the students. The teacher is trained once, with the first.
    num_parallel: processes at a time.
    check: see `jobs.check_arguments`.
    flags: of gkd_jax.main, that all runs get.

  Raises:
    ValueError: a setting cannot be, gin does not take those of a run, a run
      failed or lacks a metric, or the folder holds another comparison.
  """
  folder = pathlib.Path(output_dir)
  settings = settings or {}
  if unknown := set(settings) - {_TEACHER, _INITIAL, 'methods'}:
    raise ValueError(
      f'compare.settings may name {_TEACHER}, {_INITIAL} and methods, not '
      f'{sorted(unknown)}.'
    )
  if num_parallel < 1:
    raise ValueError(f'NUM_PARALLEL must be 1 or more, got {num_parallel}.')
  _check_names(methods, metrics, seeds)
  jobs_lib.check_gin_files(
    (teacher, initial_student, evaluation, *methods.values()), 'compare'
  )
  jobs = _jobs(
    folder, teacher, initial_student, evaluation, methods, settings, seeds
  )
  jobs = jobs_lib.add_flags(jobs, flags)
  if check is not None:
    jobs_lib.check_arguments(jobs, check)
  jobs_lib.check_same(folder / 'comparison.json', jobs)
  start = time.monotonic()
  with run_folder.locked(folder, 'MODEL_DIR'):
    jobs_lib.run(jobs, num_parallel)
  results = collect(folder, list(methods), metrics, seeds)
  results['seconds'] = round(time.monotonic() - start, 1)
  files.write_whole(
    folder / 'results.json', json.dumps(results, indent=2) + '\n'
  )
  plots = _plot(folder, results, list(methods), metrics[0], seeds)
  table = format_table(results, metrics)
  files.write_whole(
    folder / 'report.md',
    _report(title, results, table, plots, jobs, metrics, seeds),
  )
  print(f'\n{title}\n\n{table}\n')
  print(f'Report:      {folder / "report.md"}')
  print(f'Results:     {folder / "results.json"}')
  for plot in plots:
    print(f'Plot:        {plot}')
  print(f'Checkpoints: {folder}/<run>/checkpoint_<step>')
  print(
    'Samples, token by token: python -m gkd_jax.main --run_mode=report '
    f'--gin.RUNS={shlex.quote(str(folder))}'
  )


def _check_names(methods, metrics, seeds) -> None:
  """Raises ValueError for what could not be told apart, or is none."""
  if not isinstance(methods, Mapping) or not methods:
    raise ValueError(f'METHODS must be {{name: gin file}}, got {methods!r}.')
  for name in methods:
    if not re.fullmatch(r'[\w.+-]+', name) or name in (_TEACHER, _INITIAL):
      raise ValueError(
        f'METHODS: {name!r} cannot be the name of a method. It becomes a '
        "folder's: letters, digits, '_', '.', '+' and '-', and neither "
        f'{_TEACHER} nor {_INITIAL}.'
      )
  if not isinstance(metrics, list | tuple) or not metrics:
    raise ValueError(f"METRICS must be like ('wer',), got {metrics!r}.")
  if (
    not isinstance(seeds, list | tuple)
    or not seeds
    or not all(isinstance(seed, int) for seed in seeds)
    or len({*seeds}) < len(seeds)
  ):
    raise ValueError(
      f'SEEDS must be whole numbers, each once, like (0, 1, 2), got {seeds!r}.'
    )


def _jobs(
  folder, teacher, initial_student, evaluation, methods, settings, seeds
) -> list[Job]:
  teacher_dir = folder / _TEACHER

  def train(name, file, overrides, needs=()):
    overrides = {'MODEL_DIR': folder / name, **overrides}
    result = folder / name / 'eval_test.json'
    return Job(
      name, jobs_lib.arguments('train', [file], overrides), result, needs
    )

  jobs = [
    train(
      _TEACHER,
      teacher,
      {'RANDOM_SEED': seeds[0], **settings.get(_TEACHER, {})},
    )
  ]
  later = []
  for seed in seeds:
    initial = f'seed_{seed}/{_INITIAL}'
    jobs.append(
      train(
        initial,
        initial_student,
        {'RANDOM_SEED': seed, **settings.get(_INITIAL, {})},
      )
    )
    both = {
      'CHECKPOINT_PATH': folder / initial,
      'TEACHER_CHECKPOINT_PATH': teacher_dir,
      'EVAL_OUTPUT_DIR': folder / initial / 'with_teacher',
    }
    later.append(
      Job(
        f'{initial}/with_teacher',
        jobs_lib.arguments('eval', [evaluation], both),
        folder / initial / 'with_teacher' / 'eval_test.json',
        (_TEACHER, initial),
      )
    )
    for name, file in methods.items():
      overrides = {
        'INITIAL_CHECKPOINT_PATH': folder / initial,
        'TEACHER_CHECKPOINT_PATH': teacher_dir,
        'RANDOM_SEED': seed,
        **settings.get('methods', {}),
      }
      needs = (_TEACHER, initial)
      later.append(train(f'seed_{seed}/{name}', file, overrides, needs))
  return jobs + later


def collect(
  folder: pathlib.Path,
  methods: Sequence[str],
  metrics: Sequence[str],
  seeds: Sequence[int],
) -> dict[str, Any]:
  """Reads what the runs wrote.

  Returns:
    {'methods': one entry a row of the table, 'runs': one entry a run}. With
    several seeds a row holds means, and standard errors as '<name>_se'. Where
    the student began as good as the teacher, 'gap_closed' is None.
  """
  runs = [_read_run(folder / _TEACHER, _TEACHER, None, metrics)]
  teacher = runs[0]
  for seed in seeds:
    initial_dir = folder / f'seed_{seed}' / _INITIAL
    initial = _read_run(initial_dir, _INITIAL, seed, metrics)
    with_teacher = json.loads(
      (initial_dir / 'with_teacher' / 'eval_test.json').read_text()
    )
    initial |= _divergences(with_teacher)
    rows = [initial] + [
      _read_run(folder / f'seed_{seed}' / method, method, seed, metrics)
      for method in methods
    ]
    for row in rows:
      gap = initial[metrics[0]] - teacher[metrics[0]]
      row['gap_closed'] = (
        (initial[metrics[0]] - row[metrics[0]]) / gap if gap else None
      )
    runs += rows
  table = []
  for method in (_TEACHER, _INITIAL, *methods):
    of_method = [run for run in runs if run['method'] == method]
    table.append(_mean_row(method, of_method))
  return {'methods': table, 'runs': runs}


def _read_run(folder, method, seed, metrics) -> dict[str, Any]:
  values = json.loads((folder / 'eval_test.json').read_text())
  row = {'method': method, 'seed': seed}
  for name in metrics:
    for key in (f'greedy/{name}', f'sampled/{name}'):
      if key not in values:
        raise ValueError(
          f'METRICS: {folder}/eval_test.json has no {key!r}. It has: '
          f'{", ".join(values)}.'
        )
    row[name] = values[f'greedy/{name}']
    row[f'sampled_{name}'] = values[f'sampled/{name}']
  return {
    **row,
    **_divergences(values),
    'steps': values['step'],
    'seconds': values['train_seconds'],
  }


def _divergences(values: Mapping[str, float]) -> dict[str, float]:
  """KL(student || teacher), nats per token, by who wrote the outputs."""
  return {
    name: values[key]
    for name, key in (
      ('kl_on_student_outputs', 'on_student_outputs/reverse_kl'),
      ('kl_on_dataset_outputs', 'on_dataset_outputs/reverse_kl'),
    )
    if key in values
  }


def _mean_row(method: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  row: dict[str, Any] = {'method': method, 'seeds': len(runs)}
  for name in runs[0]:
    if name in ('method', 'seed'):
      continue
    mean = tables.mean([run[name] for run in runs])
    row[name] = None if mean is None else mean.value  # no gap to close: None
    if mean is not None and mean.error is not None:
      row[f'{name}_se'] = mean.error
  return row


def _mean(row: Mapping[str, Any], name: str) -> Mean | None:
  """Returns a mean of a row."""
  if row.get(name) is None:
    return None
  return Mean(row[name], row.get(f'{name}_se'), row['seeds'])


def format_table(results: Mapping[str, Any], metrics: Sequence[str]) -> str:
  """Returns the table in Markdown, its columns aligned."""
  columns = []
  for name in metrics:
    columns.append(Column(tables.head(f'greedy/{name}'), name))
    columns.append(Column(tables.head(f'sampled/{name}'), f'sampled_{name}'))
  columns += [
    Column('gap closed %', 'gap_closed', '{:.1f}', 100.0),
    Column('KL(student‖teacher)', 'kl_on_student_outputs', '{:.4f}'),
    Column('steps', 'steps', '{:.0f}', with_error=False),
    Column('seconds', 'seconds', '{:.0f}', with_error=False),
  ]
  named = []
  for row in results['methods']:
    means = {c.metric: _mean(row, c.metric) for c in columns}
    named.append((row['method'], means))
  return tables.markdown(tables.cells(columns, named))


def _plot(folder, results, methods, metric, seeds) -> list[pathlib.Path]:
  """Draws the metric against the step, and its final values."""
  rows = {row['method']: row for row in results['methods']}
  key = f'validation/greedy/{metric}'

  def curve(run):
    lines = metrics_lib.read(folder / run)
    return {line['step']: line[key] for line in lines if key in line}

  def at_end(run):
    *_, last = curve(run).values()
    return last

  series = {}
  for method in methods:
    by_seed = [
      {
        0: at_end(f'seed_{seed}/{_INITIAL}'),
        **curve(f'seed_{seed}/{method}'),
      }
      for seed in seeds
    ]
    series[method] = plots_lib.mean_curve(by_seed)
  label = tables.axis_label(f'greedy/{metric}')
  by_step = Plot(
    'steps of the method',
    f'{label}, validation',
    series,
    [Line(_TEACHER, tables.mean([at_end(_TEACHER)]))],
  )
  final = Bars(
    [
      Panel(
        tables.axis_label(f'{decoding}/{metric}'),
        {method: _mean(rows[method], name) for method in methods},
        Line(_INITIAL, _mean(rows[_INITIAL], name)),
        [Line(_TEACHER, _mean(rows[_TEACHER], name))],
      )
      for decoding, name in (
        ('greedy', metric),
        ('sampled', f'sampled_{metric}'),
      )
    ]
  )
  paths = []
  for name, data in (('by_step', by_step), ('final', final)):
    paths.append(folder / f'{metric}_{name}.png')
    plots_lib.save(plots_lib.draw(data), paths[-1])
  return paths


def _report(title, results, table, plots, jobs, metrics, seeds) -> str:
  primary = metrics[0].upper()
  spread = (
    f'Means over {len(seeds)} seeds ± standard errors; one teacher. '
    if len(seeds) > 1
    else 'One seed: differences of a point or so are noise. '
  )
  pictures = '\n\n'.join(f'![{plot.stem}]({plot.name})' for plot in plots)
  commands = '\n'.join(job.command for job in jobs)
  return f"""# {title}

{table}

{spread}Test split. Greedy decoding, but for the columns at T=1, which are
sampled at temperature 1. Gap closed: (initial student - after) / (initial
student - teacher), on greedy {primary}. KL(student‖teacher): nats per token, on
outputs that the student sampled itself (mean over an output's tokens, then over
outputs). Seconds: of training steps, without compilation and evaluation, while
other runs may have shared the machine.

{pictures}

## The commands

Each run can be repeated, or changed, by itself:

```
{commands}
```
"""
