# SPDX-License-Identifier: Apache-2.0
"""Makes the paper's tables and figures of finished runs.

`report.html` is one self-contained page, with sample outputs token by token;
`report.md` has the same table, and its figures are files beside it. For
programs: `report.json` has everything, `results.json` has one flat row per
method and per run.
"""

import json
import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from gkd_jax.report import (
  figures,
  findings,
  page,
  plots,
  results,
  sections,
  tables,
)
from gkd_jax.report import runs as runs_lib
from gkd_jax.report.runs import Run
from gkd_jax.report.sections import Group, Section
from gkd_jax.report.tables import Column
from gkd_jax.runtime import files, paths
from gkd_jax.runtime import metrics as metrics_lib

_CONTENT = 'report.json'
_NOTED_LOSS = 0.01
# Metrics of `data.tokenization` -> what they are shares of.
_LOSSES = {
  'data/inputs_cut': 'the examples have their inputs cut to length',
  'data/targets_cut': 'the examples have their targets cut to length',
  'data/inputs_unknown': "the inputs' tokens are unknown to the vocabulary",
  'data/targets_unknown': "the targets' tokens are unknown to the vocabulary",
}
_MAX_METRICS = 4  # of a task in the table; report.json has all


def report(
  runs: str | Sequence[str],
  output_dir: str | None = None,
  title: str | None = None,
  metric: str | None = None,
  mode: str | None = None,
  tuned: Sequence[str] = ('LEARNING_RATE',),
  overwrite: bool = False,
) -> None:
  """Writes the report of all finished runs that a glob matches.

  Prints the path of the page, the table of methods, and the finding in one
  sentence.

  Args:
    runs: see `runs.find`.
    output_dir: created if it does not exist; None: `report`, beside the runs.
    title: of the report; None: derived from the names of the tasks.
    metric: see `sections.make`.
    mode: see `sections.make`.
    tuned: see `sections.make`.
    overwrite: replace files that are not of an earlier report; those of one
      are always replaced.

  Raises:
    ValueError: `runs` matches no run folder, no run is done, no run has the
      metric, or files of another program would be replaced.
  """
  if mode not in (None, 'min', 'max'):
    raise ValueError(f"MODE must be 'min', 'max' or None, got {mode!r}.")
  found, unused = runs_lib.find(runs)
  all_sections = sections.make(found, metric, mode, tuned)
  if title is None:
    tasks = dict.fromkeys(section.task for section in all_sections)
    title = f'Distillation on {", ".join(tasks)}'
  folder = _beside(found)
  if output_dir is not None:
    folder = paths.resolve(output_dir, 'OUTPUT_DIR')
  parts = [_part(section, len(all_sections) > 1) for section in all_sections]
  not_used = [f'{_relative_path(path)}: {why}.' for path, why in unused]
  content = {
    _CONTENT: json.dumps(
      {
        'title': title,
        'sections': [
          _as_json(section, part)
          for section, part in zip(all_sections, parts, strict=True)
        ],
        'not_used': not_used,
      },
      indent=2,
      allow_nan=False,
    )
    + '\n',
    'results.json': json.dumps(
      results.rows(all_sections), indent=2, allow_nan=False
    )
    + '\n',
    'report.md': _markdown(title, parts, not_used),
    'report.html': page.render(title, parts, not_used),
  }
  drawn = {
    f'{shown.file}.png': shown.drawn for part in parts for shown in part.figures
  }
  if not _is_report(folder):
    new = [folder / name for name in (*content, *drawn)]
    files.check_free(new, 'OUTPUT_DIR', overwrite)
  folder.mkdir(parents=True, exist_ok=True)
  for name, figure in drawn.items():
    plots.save(figure, folder / name)
  for name, text in content.items():
    files.write_atomically(folder / name, text)
  print(f'Report:  {folder / "report.html"}')
  print(f'In Markdown: {folder / "report.md"}')
  print(f'For programs: {folder / _CONTENT}, {folder / "results.json"}')
  for section, part in zip(all_sections, parts, strict=True):
    print(f'\n{part.heading or title}\n\n{tables.markdown(part.table)}\n')
    if finding := findings.describe(section):
      print(finding)
  for line in not_used:
    print(f'Not used: {line}')


def _is_report(folder: pathlib.Path) -> bool:
  """Whether a folder holds an earlier report."""
  try:
    content = json.loads((folder / _CONTENT).read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return False
  return isinstance(content, dict) and {'sections', 'not_used'} <= {*content}


def _beside(found: Sequence[Run]) -> pathlib.Path:
  common = pathlib.Path(os.path.commonpath([run.folder for run in found]))
  return (common.parent if len(found) == 1 else common) / 'report'


# --- Parts of a report --------------------------------------------------------


def _part(section: Section, one_of_several: bool) -> page.Part:
  """Returns the part of a report on a section."""
  prefix = f'{section.task}_{section.split}_' if one_of_several else ''
  of_section, left_out = figures.make_all(section)
  columns = _columns(section)
  named = [(group.name, group.means) for group in section.groups]
  methods = [(group.name, group.means) for group in section.methods]
  names = [name for name, _ in named]
  if methods and not any('gap_closed' in means for _, means in methods):
    left_out.append(
      '"gap closed": needs the runs of the initial student and of the teacher. '
      'Add their folders to RUNS.'
    )
  return page.Part(
    heading=f'{section.task}, {section.split} split' if one_of_several else '',
    summary=_summary(section),
    table=tables.cells(columns, named),
    best={
      (names.index(name), i)
      for i, column in enumerate(columns)
      if (name := tables.best(column, methods)) is not None
    },
    notes=_notes(section, columns),
    also_run=tables.cells(
      columns, [(group.name, group.means) for group in section.also_run]
    )
    if section.also_run
    else [],
    figures=[
      page.DrawnFigure(
        figure, f'{prefix}{figure.name}', plots.draw(figure.data)
      )
      for figure in of_section
    ],
    left_out=left_out,
    samples=_samples(section),
    runs=[
      ['experiment', 'seed', 'folder', 'command'],
      *(
        [group.name, '' if run.seed is None else str(run.seed)]
        + [_relative_path(run.folder), _command(run)]
        for group in (*section.groups, *section.also_run)
        for run in group.runs
      ),
    ],
  )


def _columns(section: Section) -> list[Column]:
  """Returns the columns of the main table, the main metric first."""
  base = section.metric.rpartition('/')[2]
  measured = {*_measured(section)}
  columns = []
  for name in _task_metrics(section)[:_MAX_METRICS]:
    for decoding in section.usual_decodings():
      metric = f'{decoding}/{name}'
      if metric not in measured:
        continue
      better = section.mode if name == base else metrics_lib.better(name)
      means = [g.means[metric] for g in section.groups if metric in g.means]
      small = all(abs(mean.value) < 2.0 for mean in means)
      form = '{:.4f}' if small else '{:.2f}'
      columns.append(Column(tables.head(metric), metric, form, better=better))
  columns += [
    Column('gap closed %', 'gap_closed', '{:.1f}', 100.0, better='max'),
    Column('KL(student‖teacher)', sections.KL, '{:.4f}', better='min'),
    Column('steps', 'step', '{:.0f}', with_error=False),
    Column('seconds', 'train_seconds', '{:.0f}', with_error=False),
  ]
  return [column for column in columns if column.metric in measured]


def _measured(section: Section) -> dict[str, None]:
  """Returns the names of all metrics of all groups, in order."""
  groups = (*section.groups, *section.also_run)
  return {name: None for group in groups for name in group.means}


def _task_metrics(section: Section) -> list[str]:
  """Returns the task's metrics, the main one first."""
  decoding, _, main = section.metric.rpartition('/')
  names = {main: None}
  for name in _measured(section):
    prefix, _, base = name.rpartition('/')
    if prefix == decoding and base != 'self_bleu':
      names[base] = None
  return list(names)


def _summary(section: Section) -> list[str]:
  """Returns sentences on the comparison and its result."""
  num_runs = len(section.runs)
  label = tables.axis_label(section.metric)
  which = {'min': ', lower is better', 'max': ', higher is better', None: ''}
  seeds = sorted({len(group.runs) for group in section.methods})
  sentences = [
    f'{num_runs} {"run" if num_runs == 1 else "runs"} of {section.task}, '
    f'measured on its {section.split} split.',
    f'Main metric: {label}{which[section.mode]}.',
  ]
  if seeds and seeds[-1] > 1:
    span = f'{seeds[0]} to {seeds[-1]}' if len(seeds) > 1 else f'{seeds[-1]}'
    sentences.append(f'Means ± standard errors over {span} seeds.')
  elif seeds:
    sentences.append('One seed each: small differences may be noise.')
  if finding := findings.describe(section):
    sentences.append(finding)
  return sentences


def _notes(section: Section, columns: Sequence[Column]) -> list[str]:
  """Returns explanations of the columns that the table has."""
  metrics = {column.metric for column in columns}
  notes = []
  if any(column.head.endswith('at T=1') for column in columns):
    notes.append(
      'At T=1: outputs sampled at temperature 1. Other columns: greedy.'
    )
  if 'gap_closed' in metrics:
    notes.append(
      'Gap closed: (initial student - student) / (initial student - teacher) '
      f'on {tables.axis_label(section.metric)}, with the initial student and '
      'the teacher of each run.'
    )
  if sections.KL in metrics:
    notes.append(
      'KL(student‖teacher): nats per token on outputs sampled from the '
      'student; mean over the tokens of an output, then over outputs.'
    )
  if 'train_seconds' in metrics:
    notes.append('Seconds: training steps, without compilation and evaluation.')
  notes += _losses(section)
  if more := _task_metrics(section)[_MAX_METRICS:]:
    notes.append(f'Only in report.json: {", ".join(more)}.')
  return [*notes, *section.notes]


def _losses(section: Section) -> list[str]:
  """Returns a note for each group whose training data tokenizing changed."""
  of_text = {}
  for group in (*section.groups, *section.also_run):
    lost = {}
    for run in group.runs:
      for name, share in run.lost.items():
        lost[name] = max(share, lost.get(name, 0.0))
    parts = [
      f'{share:.1%} of {_LOSSES[name]}'
      for name, share in lost.items()
      if name in _LOSSES and share > _NOTED_LOSS
    ]
    if parts:
      of_text.setdefault(', '.join(parts), []).append(group.name)
  everywhere = len(section.groups) + len(section.also_run)
  return [
    f'Lost by tokenizing the training data: {text}'
    + ('.' if len(names) == everywhere else f' ({"; ".join(names)}).')
    for text, names in of_text.items()
  ]


def _samples(section: Section) -> list[tuple[str, Mapping[str, Any]]]:
  """Returns (name, samples of the first seed) of each group with samples."""
  found = []
  for group in section.groups:
    for run in sorted(group.runs, key=lambda run: run.seed or 0):
      samples = run.samples.get((section.task, section.split))
      if samples and any('tokens' in e for e in samples['examples']):
        found.append((group.name, samples))
        break
  return found


def _relative_path(folder: pathlib.Path) -> str:
  """Returns a path, relative to the working directory if it is below it."""
  here = pathlib.Path.cwd()
  return str(folder.relative_to(here) if here in folder.parents else folder)


def _command(run: Run) -> str:
  """Returns the command that started the run; empty if unknown."""
  path = run.folder / 'versions.json'
  try:
    _, *arguments = files.field(files.read_json(path), 'command', list, path)
  except ValueError:  # it does not exist, or is damaged
    return ''
  command = ('python', '-m', 'gkd_jax.main', *map(str, arguments))
  return shlex.join(command)


# --- JSON and Markdown --------------------------------------------------------


def _as_json(section: Section, part: page.Part) -> dict[str, Any]:
  def of_group(group: Group):
    return {
      'name': group.name,
      'role': group.role,
      'method': group.method,
      'runs': [
        {
          'folder': str(run.folder),
          'seed': run.seed,
          'values': dict(section.values(run)),
        }
        for run in group.runs
      ],
      'means': {
        name: {
          'mean': mean.value,
          'standard_error': mean.error,
          'runs': mean.count,
        }
        for name, mean in group.means.items()
      },
      'settings': {
        name: value
        for name, value in group.settings.items()
        if runs_lib.is_macro(name)
      },
    }

  return {
    'task': section.task,
    'split': section.split,
    'metric': section.metric,
    'mode': section.mode,
    'groups': [of_group(group) for group in section.groups],
    'also_run': [of_group(group) for group in section.also_run],
    'notes': part.notes,
    'figures': [figures.as_json(shown.figure) for shown in part.figures],
    'left_out': part.left_out,
  }


def _markdown(
  title: str, parts: Sequence[page.Part], not_used: Sequence[str]
) -> str:
  blocks = [f'# {title}']
  for part in parts:
    if part.heading:
      blocks.append(f'## {part.heading}')
    blocks.append(' '.join(part.summary))
    rows = [
      part.table[0],
      *(
        [
          f'**{cell}**' if cell and (y, x - 1) in part.best else cell
          for x, cell in enumerate(row)
        ]
        for y, row in enumerate(part.table[1:])
      ),
    ]
    blocks += [tables.markdown(rows), ' '.join(part.notes)]
    if part.also_run:
      blocks += ['Also run:', tables.markdown(part.also_run)]
    for shown in part.figures:
      figure = shown.figure
      blocks += [
        f'### {figure.title}',
        f'![{figure.title}]({shown.file}.png)',
        figure.caption,
      ]
    if part.left_out:
      blocks.append('Left out:')
      blocks.append('\n'.join(f'- {line}' for line in part.left_out))
    if part.samples:
      blocks.append(
        'Sample outputs, token by token: [report.html](report.html).'
      )
    blocks.append('### Runs')
    blocks.append(tables.markdown([row[:3] for row in part.runs]))
  if not_used:
    blocks += ['Not used:', '\n'.join(f'- {line}' for line in not_used)]
  return '\n\n'.join(filter(None, blocks)) + '\n'
