# SPDX-License-Identifier: Apache-2.0
"""Runs methods side by side, each with its own command, and reports.

A comparison is: one teacher; for each seed one initial student, and from it
every method. Each is a run of its own (see `jobs`); this module says which
there are, and reads what they wrote.
"""

import json
import math
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gkd_jax import jobs as jobs_lib
from gkd_jax import metrics as metrics_lib
from gkd_jax.jobs import Job

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

  Raises:
    ValueError: a run failed, or the folder holds another comparison.
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
  jobs_lib.check_gin_files(
    (teacher, initial_student, evaluation, *methods.values()), 'compare'
  )
  jobs = _jobs(
    folder, teacher, initial_student, evaluation, methods, settings, seeds
  )
  jobs_lib.check_same(folder / 'comparison.json', jobs)
  start = time.monotonic()
  jobs_lib.run(jobs, folder, num_parallel)
  results = collect(folder, list(methods), metrics, seeds)
  results['seconds'] = round(time.monotonic() - start, 1)
  jobs_lib.write(folder / 'results.json', json.dumps(results, indent=2) + '\n')
  plots = _plot(folder, results, list(methods), metrics[0], seeds)
  table = format_table(results, metrics)
  jobs_lib.write(
    folder / 'report.md',
    _report(title, results, table, plots, jobs, metrics, seeds),
  )
  print(f'\n{title}\n\n{table}\n')
  print(f'Report:      {folder / "report.md"}')
  print(f'Results:     {folder / "results.json"}')
  for plot in plots:
    print(f'Plot:        {plot}')
  print(f'Checkpoints: {folder}/<run>/checkpoint_<step>')


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
    values = [run[name] for run in runs]
    if None in values:  # there was no gap to close
      row[name] = None
      continue
    row[name] = statistics.fmean(values)
    if len(values) > 1:
      row[f'{name}_se'] = statistics.stdev(values) / math.sqrt(len(values))
  return row


def format_table(results: Mapping[str, Any], metrics: Sequence[str]) -> str:
  """Returns the table in Markdown, its columns aligned."""
  columns = [('method', 'method', '{}', 1)]
  for name in metrics:
    columns.append((f'{name.upper()} %', name, '{:.2f}', 1))
    columns.append((f'{name.upper()} % at T=1', f'sampled_{name}', '{:.2f}', 1))
  columns += [
    ('gap closed %', 'gap_closed', '{:.1f}', 100),
    ('KL(student‖teacher)', 'kl_on_student_outputs', '{:.4f}', 1),
    ('steps', 'steps', '{:.0f}', 1),
    ('seconds', 'seconds', '{:.0f}', 1),
  ]
  with_error = {*metrics, *(f'sampled_{m}' for m in metrics), 'gap_closed'}
  with_error.add('kl_on_student_outputs')
  rows = [[head for head, *_ in columns]]
  for row in results['methods']:
    cells = []
    for _, name, form, scale in columns:
      if row.get(name) is None:
        cells.append('')
        continue
      value = row[name]
      cell = form.format(value if name == 'method' else value * scale)
      if name in with_error and f'{name}_se' in row:
        cell += ' ± ' + form.format(row[f'{name}_se'] * scale)
      cells.append(cell)
    rows.append(cells)
  widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
  lines = [
    '| '
    + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))
    + ' |'
    for row in rows
  ]
  lines.insert(1, '|' + '|'.join('-' * (w + 2) for w in widths) + '|')
  return '\n'.join(lines)


def _plot(folder, results, methods, metric, seeds) -> list[pathlib.Path]:
  """Draws the metric against the step, and its final values."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  def of(method):
    return next(r for r in results['methods'] if r['method'] == method)

  key = f'validation/greedy/{metric}'
  figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
  for i, method in enumerate(methods):
    curves = []
    for seed in seeds:
      at_start = [
        line[key]
        for line in metrics_lib.read(folder / f'seed_{seed}' / _INITIAL)
        if key in line
      ][-1]
      lines = metrics_lib.read(folder / f'seed_{seed}' / method)
      points = [(line['step'], line[key]) for line in lines if key in line]
      curves.append([(0, at_start), *points])
    steps = [step for step, _ in curves[0]]
    means = [
      statistics.fmean(curve[j][1] for curve in curves)
      for j in range(len(steps))
    ]
    axes.plot(steps, means, marker='o', color=f'C{i}', label=method)
  teacher_lines = metrics_lib.read(folder / _TEACHER)
  at_end = [line[key] for line in teacher_lines if key in line][-1]
  axes.axhline(at_end, color='black', linestyle='--', label=_TEACHER)
  axes.set(
    xlabel='steps of the method',
    ylabel=f'{metric.upper()} %, greedy, validation',
    title='On the validation split, during training',
  )
  axes.legend()
  axes.grid(alpha=0.3)
  curves_path = folder / f'{metric}_by_step.png'
  figure.savefig(curves_path, dpi=120)
  plt.close(figure)

  figure, axes = plt.subplots(figsize=(10, 5), layout='constrained')
  names = [_INITIAL, *methods]
  for offset, (name, label) in zip(
    (-0.2, 0.2),
    ((metric, 'greedy'), (f'sampled_{metric}', 'sampled, T=1')),
    strict=True,
  ):
    bars = axes.bar(
      [i + offset for i in range(len(names))],
      [of(n)[name] for n in names],
      0.38,
      yerr=[of(n).get(f'{name}_se', 0.0) for n in names],
      label=label,
    )
    axes.bar_label(bars, fmt='%.1f', fontsize=7)
    axes.axhline(
      of(_TEACHER)[name],
      color=bars[0].get_facecolor(),
      linestyle='--',
      label=f'teacher, {label}',
    )
  axes.set_xticks(range(len(names)), names, rotation=20, ha='right')
  axes.set(ylabel=f'{metric.upper()} %, test', title='At the end, test split')
  figure.legend(fontsize=8, loc='outside right upper')
  bars_path = folder / f'{metric}_final.png'
  figure.savefig(bars_path, dpi=120)
  plt.close(figure)
  return [curves_path, bars_path]


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
