# SPDX-License-Identifier: Apache-2.0
"""Runs methods side by side, each with its own command, and reports.

A comparison is: one teacher; for each seed one initial student, and from it
every method. Each is a run of `gkd_jax.main` in a process of its own, with the
command that a person would type; this module only starts them, skips what is
done, and reads what they wrote.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gkd_jax import metrics as metrics_lib

_TEACHER = 'teacher'
_INITIAL = 'initial_student'
_STATUS_SECONDS = 20.0
_ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Job:
  """One process: a command, and the file that is there when it is done."""

  name: str
  arguments: tuple[str, ...]  # of gkd_jax.main
  result: pathlib.Path
  needs: tuple[str, ...] = ()  # jobs that must be done before

  @property
  def folder(self) -> pathlib.Path:
    return self.result.parent

  @property
  def command(self) -> str:
    return shlex.join(('python', '-m', 'gkd_jax.main', *self.arguments))


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
  for file in (teacher, initial_student, evaluation, *methods.values()):
    if not (_ROOT / file).is_file() and not pathlib.Path(file).is_file():
      raise ValueError(f'compare: there is no gin file {file}.')
  jobs = _jobs(
    folder, teacher, initial_student, evaluation, methods, settings, seeds
  )
  _check_same_comparison(folder, jobs)
  start = time.monotonic()
  _run(jobs, folder, num_parallel)
  results = collect(folder, list(methods), metrics, seeds)
  results['seconds'] = round(time.monotonic() - start, 1)
  _write(folder / 'results.json', json.dumps(results, indent=2) + '\n')
  plots = _plot(folder, results, list(methods), metrics[0], seeds)
  table = format_table(results, metrics)
  _write(
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

  def arguments(mode, file, overrides):
    flags = [f'--gin.{name}={value}' for name, value in overrides.items()]
    return (f'--run_mode={mode}', f'--gin_file={file}', *flags)

  def train(name, file, overrides, needs=()):
    overrides = {'MODEL_DIR': folder / name, **overrides}
    result = folder / name / 'eval_test.json'
    return Job(name, arguments('train', file, overrides), result, needs)

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
        arguments('eval', evaluation, both),
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


def _run(jobs: Sequence[Job], folder: pathlib.Path, num_parallel: int) -> None:
  """Runs all jobs whose result is not there, in order, some at a time."""
  done = {job.name for job in jobs if job.result.exists()}
  waiting = [job for job in jobs if job.name not in done]
  if done:
    metrics_lib.say(f'{len(done)} of {len(jobs)} runs are done already.')
  environment = {
    # Runs of one comparison compile much the same programs.
    'JAX_COMPILATION_CACHE_DIR': str(folder.absolute() / 'compilation_cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    **os.environ,
  }
  running: dict[subprocess.Popen, Job] = {}
  start = said = time.monotonic()
  try:
    while waiting or running:
      for job in list(waiting):
        if len(running) < num_parallel and done.issuperset(job.needs):
          waiting.remove(job)
          running[_start(job, environment)] = job
          metrics_lib.say(f'[{_clock(start)}] {job.command}')
      for process in [p for p in running if p.poll() is not None]:
        job = running.pop(process)
        if process.returncode or not job.result.exists():
          raise ValueError(
            f'{job.name} failed. Its log, {job.folder}.log, ends:\n'
            + '\n'.join(_log_lines(job)[-20:])
          )
        done.add(job.name)
        metrics_lib.say(f'[{_clock(start)}] {job.name} is done.')
      if time.monotonic() - said > _STATUS_SECONDS:
        said = time.monotonic()
        for job in running.values():
          if lines := _log_lines(job):
            metrics_lib.say(f'[{_clock(start)}] {job.name}: {lines[-1]}')
      time.sleep(0.2)
  finally:
    for process in running:
      process.terminate()
    for process in running:
      process.wait()


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen:
  job.folder.mkdir(parents=True, exist_ok=True)
  with open(f'{job.folder}.log', 'a') as log:
    return subprocess.Popen(
      [sys.executable, '-m', 'gkd_jax.main', *job.arguments],
      stdout=log,
      stderr=log,
      stdin=subprocess.DEVNULL,
      env={**environment},
    )


def _log_lines(job: Job) -> list[str]:
  text = pathlib.Path(f'{job.folder}.log').read_text(errors='replace')
  # Less tables, and TensorFlow's own chatter, which no setting silences.
  noise = re.compile(r'\s*$|\||[IWE]\d{4} |WARNING: All log messages before')
  return [line for line in text.splitlines() if not noise.match(line)]


def _check_same_comparison(folder: pathlib.Path, jobs: Sequence[Job]) -> None:
  """Refuses to mix runs of different settings in one table."""
  path = folder / 'comparison.json'
  now = {job.name: [job.command, _digest(job)] for job in jobs}
  if path.exists():
    was = json.loads(path.read_text())
    changed = [
      name
      for name in now
      if name in was and was[name] != now[name] and (folder / name).exists()
    ]
    if changed:
      raise ValueError(
        f'{folder} holds runs of other settings or gin files: '
        f'{", ".join(changed)}. Remove {folder}, or use another MODEL_DIR.'
      )
    now = {**was, **now}
  folder.mkdir(parents=True, exist_ok=True)
  _write(path, json.dumps(now, indent=2) + '\n')


def _digest(job: Job) -> str:
  """Returns a hash of the gin files that a job reads."""
  seen: dict[str, str] = {}

  def read(file):
    if file in seen:
      return
    path = pathlib.Path(file)
    seen[file] = (path if path.is_file() else _ROOT / file).read_text()
    for included in re.findall(r"^include '(.+)'", seen[file], re.MULTILINE):
      read(included)

  for argument in job.arguments:
    if argument.startswith('--gin_file='):
      read(argument.removeprefix('--gin_file='))
  return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


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


def _write(path: pathlib.Path, text: str) -> None:
  partial = path.with_suffix('.partial')
  partial.write_text(text)
  partial.rename(path)


def _clock(start: float) -> str:
  minutes, seconds = divmod(int(time.monotonic() - start), 60)
  return f'{minutes:2d}:{seconds:02d}'
