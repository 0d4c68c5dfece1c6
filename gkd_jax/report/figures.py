# SPDX-License-Identifier: Apache-2.0
"""The figures of `report`: the data and the caption of each.

Each function takes a section and returns `Figure`s, or one line that states
which runs are missing. `plots` draws the figures.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gkd_jax.report import plots, sections, tables
from gkd_jax.report import runs as runs_lib
from gkd_jax.report.plots import Bars, HeatMap, Line, Panel, Plot, Point
from gkd_jax.report.sections import Group, Section


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure with title and caption.

  Attributes:
    name: of its file, without suffix.
    title: a few words.
    caption: full sentences.
    data: that `plots` draws.
  """

  name: str
  title: str
  caption: str
  data: Bars | Plot | HeatMap


def as_json(figure: Figure) -> dict[str, Any]:
  """Returns title, caption and data as plain dictionaries and lists."""
  return dataclasses.asdict(figure) | {'kind': type(figure.data).__name__}


# --- Figures ------------------------------------------------------------------


def make_all(section: Section) -> tuple[list[Figure], list[str]]:
  """Returns the possible figures, and why the others are left out."""
  found, left_out = [], []
  for make in (
    method_bars,
    acceptance_bars,
    heat_maps,
    data_efficiency,
    quality_and_diversity,
    reward_trade_off,
    curves,
  ):
    made = make(section)
    if isinstance(made, str):
      left_out.append(made)
    else:
      found += made
  return found, left_out


def method_bars(section: Section) -> list[Figure] | str:
  """Returns each method's main metric, with the teacher's line."""
  methods = _on_most_examples(section)
  less = ''
  if len(methods) < len(section.methods):
    less = ' Runs on fewer training examples are omitted.'
  name = section.metric.rpartition('/')[2]
  found = []
  for origin, of_origin in _by_origin(section, methods).items():
    panels = []
    for decoding in section.usual_decodings():
      metric = f'{decoding}/{name}'
      bars = {group.name: group.means.get(metric) for group in of_origin}
      if any(bars.values()):
        base, lines = _reference_lines(section, metric, of_origin)
        panels.append(Panel(tables.axis_label(metric), bars, base, lines))
    begin = ' Bars start at the initial student.' if panels[0].base else ''
    found.append(
      Figure(
        _numbered('methods', found),
        f'Methods{origin}',
        f'{tables.metric_label(name)} of each method at the end of training, '
        f'on {section.split}{_direction(section)}.{begin}'
        f'{_errors(of_origin)}{less}',
        Bars(panels[:2]),
      )
    )
  return found or 'Method bars: no method has been trained.'


def acceptance_bars(section: Section) -> list[Figure] | str:
  """Returns the acceptance of each method's student as its teacher's draft."""
  metrics = {
    f'as_draft/acceptance_{name}': f'acceptance, {name}'
    for name in ('greedy', 'sampled')
  }
  used = [g for g in section.methods if metrics.keys() & g.means.keys()]
  if not used:
    return (
      'Acceptance of drafts: needs runs or evaluations that measure the '
      'student as a draft (experiment.EvaluationPlan.as_draft, AS_DRAFT).'
    )
  panels = []
  for metric, label in metrics.items():
    bars = {group.name: group.means.get(metric) for group in used}
    base, lines = _reference_lines(section, metric, used)
    panels.append(Panel(label, bars, base, lines))
  return [
    Figure(
      'acceptance',
      'Students as drafts',
      "Share of the teacher's tokens that each student would have drafted "
      'and the teacher accepted, in greedy decoding and at temperature 1, on '
      f'{section.split}; higher is better.{_errors(used)}',
      Bars(panels),
    )
  ]


def _by_origin(
  section: Section, groups: Sequence[Group]
) -> dict[str, list[Group]]:
  """Groups methods by their initial student.

  Returns:
    {suffix of a title: methods}; the suffix is empty if all methods have the
    same initial student.
  """
  owner = {run.folder: g.name for g in section.groups for run in g.runs}
  divided: dict[str, list[Group]] = {}
  for group in groups:
    name = owner.get(group.runs[0].initial, '')
    divided.setdefault(f' from {name}' if name else '', []).append(group)
  if len(divided) - ('' in divided) < 2:
    return {'': list(groups)} if groups else {}
  return divided


def _numbered(name: str, found: Sequence[Figure]) -> str:
  return f'{name}{len(found) + 1}' if found else name


def _on_most_examples(section: Section) -> list[Group]:
  """Returns the methods, without runs on a part of the training data."""
  vary = ('TRAIN_NUM_EXAMPLES', *section.tuned)
  together = sections.strata(section.methods, vary, lambda g: g.method)
  most = {max(groups, key=_num_examples).name for groups in together.values()}
  return [group for group in section.methods if group.name in most]


def _num_examples(group: Group) -> float:
  return group.settings.get('TRAIN_NUM_EXAMPLES') or math.inf


def heat_maps(section: Section) -> list[Figure] | str:
  """Returns the main metric by lambda and divergence."""
  eligible = [
    group
    for group in section.methods
    if runs_lib.divergence(group.settings)
    and runs_lib.student_data_fraction(group.settings) is not None
  ]
  vary = ('STUDENT_DATA_FRACTION', 'DIVERGENCE', 'BETA', *section.tuned)
  found, seen = [], set()
  for name, groups in sections.strata(eligible, vary, lambda g: '').items():
    cells = {
      (
        runs_lib.divergence(group.settings),
        runs_lib.student_data_fraction(group.settings),
      ): group
      for group in groups
    }
    rows = sorted({row for row, _ in cells}, key=sections.divergence_order)
    columns = sorted({column for _, column in cells})
    seen |= cells.keys()
    # Cells that share neither row nor column cannot be compared.
    if len(rows) < 2 or len(columns) < 2 or len(cells) < 3:
      continue
    within = f' ({name.strip(", ")})' if name else ''
    found.append(
      Figure(
        _numbered('lambda_divergence', found),
        f'Student data and divergence{within}',
        f'{tables.axis_label(section.metric)} by the share λ of outputs that '
        'the student writes (0: the dataset, 1: on-policy) and the divergence'
        f'{_direction(section, "; brighter is better")}.{_errors(groups)}',
        HeatMap(
          tables.axis_label(section.metric),
          'λ, share of outputs written by the student',
          [f'{column:g}' for column in columns],
          {
            row: [
              cells[row, column].means[section.metric]
              if (row, column) in cells
              else None
              for column in columns
            ]
            for row in rows
          },
          section.mode,
        ),
      )
    )
  if found:
    return found
  rows = sorted({row for row, _ in seen}, key=sections.divergence_order)
  columns = ', '.join(f'{x:g}' for x in sorted({column for _, column in seen}))
  return (
    'λ × divergence: needs two λ and two divergences with all other settings '
    f'equal; the runs have λ = {columns or "none"}; '
    f'{", ".join(rows) or "no divergence"}.'
  )


def data_efficiency(section: Section) -> list[Figure] | str:
  """Returns the main metric by the number of training examples."""
  macro = 'TRAIN_NUM_EXAMPLES'
  vary = (macro, *section.tuned)
  series = {}
  for name, groups in sections.strata(
    section.methods, vary, lambda g: g.method, before=(macro,)
  ).items():
    by_number = {g.settings.get(macro): g for g in groups}
    if len(by_number) > 1:
      series[name] = by_number
  if not series:
    return (
      'Data efficiency: needs a method trained on two or more numbers of '
      'examples (TRAIN_NUM_EXAMPLES).'
    )
  numbers = sorted({n for by in series.values() for n in by if n is not None})
  ticks = {float(n): f'{n:,}' for n in numbers}
  # Runs do not record the size of the training split. Draw it one step beyond
  # the largest number.
  of_all = numbers[-1] * (numbers[-1] / numbers[0]) ** (
    1 / max(1, len(numbers) - 1)
  )
  of_all = max(of_all, 2.0 * numbers[-1])
  if any(None in by for by in series.values()):
    ticks[of_all] = 'all'
  used = [g for by in series.values() for g in by.values()]
  base, lines = _reference_lines(section, section.metric, used)
  # Initial students trained on several numbers of examples are also a curve.
  if base is None:
    initial = _of_role(section, 'initial student', used)
    of_initial = {g.settings.get(macro): g for g in initial}
    if len(of_initial) == len(initial) > 1:
      series = {'initial student': of_initial} | series
      names = {group.name for group in initial}
      lines = [line for line in lines if line.name not in names]
  return [
    Figure(
      'data_efficiency',
      'Data efficiency',
      f'{tables.axis_label(section.metric)} by the number of training examples'
      f'{_direction(section)}; "all" is the full training split, not to scale.'
      f'{_errors(used)}',
      Plot(
        'training examples',
        tables.axis_label(section.metric),
        {
          name: [
            Point(
              plots.exact(of_all if n is None else n), g.means[section.metric]
            )
            for n, g in by.items()  # in the order of the tables: ascending
          ]
          for name, by in series.items()
        },
        [*([base] if base else []), *lines],
        ticks,
        log_x=True,
      ),
    )
  ]


def quality_and_diversity(section: Section) -> list[Figure] | str:
  """Returns the main metric against Self-BLEU, over sampling temperatures."""
  name = section.metric.rpartition('/')[2]
  series = {}
  for group in section.groups:
    points = {}
    for decoding in section.decodings():
      temperature = tables.temperature_of(decoding)
      both = [group.means.get(f'{decoding}/{m}') for m in ('self_bleu', name)]
      if temperature is not None and None not in both:
        points[temperature] = Point(*both, f'T={temperature:g}')
    if len(points) > 1:
      series[group.name] = [points[t] for t in sorted(points)]
  if not series:
    return (
      'Quality and diversity: needs a run evaluated at two or more sampling '
      'temperatures, with Self-BLEU ("sampled_0.5/self_bleu").'
    )
  return [
    Figure(
      'quality_diversity',
      'Quality and diversity',
      f'{tables.metric_label(name)} of sampled outputs{_direction(section)}, '
      'against Self-BLEU between the outputs for one input: 100 if they are '
      'identical, 0 if they share nothing. Along a line the evaluation '
      'temperature T changes.'
      f'{_errors([g for g in section.groups if g.name in series])}',
      Plot(
        'Self-BLEU (less is more diverse)',
        f'{tables.metric_label(name)}, sampled',
        series,
      ),
    )
  ]


def reward_trade_off(section: Section) -> list[Figure] | str:
  """Returns the main metric against the reward, over alpha of Eq. 5."""
  eligible = [
    g for g in section.methods if runs_lib.alpha(g.settings) is not None
  ]
  weights = ('ALPHA', 'DIVERGENCE_WEIGHT', 'REWARD_WEIGHT', *section.tuned)
  with_divergence = [g for g in eligible if runs_lib.divergence(g.settings)]
  series = {}
  for name, groups in sections.strata(
    with_divergence, weights, lambda g: re.sub(' α=[^,]*', '', g.method)
  ).items():
    # At alpha = 0 the divergence has no effect.
    vary = (*weights, 'DIVERGENCE', 'BETA')
    alone = [
      g
      for g in eligible
      if g not in with_divergence
      and sections.other_settings(g, vary)
      == sections.other_settings(groups[0], vary)
    ]
    by_alpha = {runs_lib.alpha(g.settings): g for g in (*alone, *groups)}
    if len(by_alpha) > 1:
      series[name] = [by_alpha[alpha] for alpha in sorted(by_alpha)]
  if not series:
    return 'Reward and distillation: needs RL+GKD runs of two or more ALPHA.'
  used = [g for groups in series.values() for g in groups]
  metric, label = _reward_metric(section, used)
  # Without the teacher, whose level is far from the points.
  base, _ = _reference_lines(section, section.metric, used)
  return [
    Figure(
      'reward_trade_off',
      'Reward and distillation',
      f'{tables.axis_label(section.metric)}{_direction(section)} against '
      f'{label}, for each weight α of the distillation (paper, Eq. 5): α = 1 '
      f'is distillation only, α = 0 is reward only.{_errors(used)}',
      Plot(
        label,
        tables.axis_label(section.metric),
        {
          name: [
            Point(
              g.means[metric],
              g.means[section.metric],
              f'α={runs_lib.alpha(g.settings):g}',
            )
            for g in groups
          ]
          for name, groups in series.items()
        },
        [base] if base else [],
      ),
    )
  ]


def _reward_metric(
  section: Section, groups: Sequence[Group]
) -> tuple[str, str]:
  """Returns the metric that measures the reward, and its label."""
  decoding = section.metric.rpartition('/')[0]
  choices = {
    f'{decoding}/reward': 'reward',
    f'{decoding}/entailment': 'entailment',
    runs_lib.REWARD: 'reward of its samples, end of training',
    sections.KL: 'KL(student‖teacher), nats per token',
  }
  for metric, label in choices.items():
    if all(metric in group.means for group in groups):
      return metric, label
  return section.metric, tables.axis_label(section.metric)


def curves(section: Section) -> list[Figure] | str:
  """Returns the main metric on the validation split, during training."""
  methods = _on_most_examples(section)
  found = []
  for origin, of_origin in _by_origin(section, methods).items():
    series = {group.name: _curve(section, group) for group in of_origin}
    series = {name: points for name, points in series.items() if points[1:]}
    if not series:
      continue
    most = ''
    if len(series) > plots.MAX_SERIES:
      which = f'{plots.MAX_SERIES} of {len(series)} methods'
      most = f' Shows the {which} with the best final metric.'
      if section.mode is None:
        most = f' Shows the first {which}.'
      series = _best_at_the_end(series, section.mode)
    shown = [group for group in of_origin if group.name in series]
    lines = [
      Line(group.name, mean)
      for group in _of_role(section, 'teacher', shown)
      if (
        mean := tables.mean(
          [
            sections.last_on_validation(run, section.metric)
            for run in group.runs
          ]
        )
      )
    ]
    found.append(
      Figure(
        _numbered('training', found),
        f'During training{origin}',
        f'{tables.axis_label(section.metric)} on the validation split'
        f'{_direction(section)}. Step 0 is the initial student.{most}'
        f'{_errors(shown)}',
        Plot(
          'steps of the method',
          f'{tables.axis_label(section.metric)}, validation',
          series,
          lines,
        ),
      )
    )
  return found or (
    'During training: needs a method with two or more evaluations during '
    f'training ("validation/{section.metric}").'
  )


def _best_at_the_end(
  series: Mapping[str, Sequence[Point]], mode: str | None
) -> dict[str, Sequence[Point]]:
  """Returns the best `plots.MAX_SERIES` series, in their order."""
  names = list(series)
  if mode is not None:
    names.sort(key=lambda name: series[name][-1].y.value, reverse=mode == 'max')
  kept = names[: plots.MAX_SERIES]
  return {name: series[name] for name in series if name in kept}


def _curve(section: Section, group: Group) -> list[Point]:
  """Returns the means over seeds, at the steps that all seeds share."""
  key = f'validation/{section.metric}'
  by_seed = []
  for run in group.runs:
    at = {line['step']: line[key] for line in run.curve if key in line}
    for other in section.runs:
      if other.folder == run.initial:
        start = sections.last_on_validation(other, section.metric)
        if start is not None:
          at[0] = start
    by_seed.append(at)
  return plots.mean_curve(by_seed)


def _reference_lines(
  section: Section, metric: str, methods: Sequence[Group]
) -> tuple[Line | None, list[Line]]:
  """Returns the level of the initial student, and the other levels.

  The first is None if the methods have several initial students. The other
  levels are the teachers and, in that case, the initial students.
  """
  initial, teachers = (
    [
      Line(group.name, group.means[metric])
      for group in _of_role(section, role, methods)
      if metric in group.means
    ]
    for role in ('initial student', 'teacher')
  )
  if len(initial) == 1:
    return initial[0], teachers
  return None, [*initial, *teachers]


def _of_role(
  section: Section, role: str, methods: Sequence[Group]
) -> list[Group]:
  """Returns the initial students or teachers of some methods."""
  named = {
    run.teacher if role == 'teacher' else run.initial
    for group in methods
    for run in group.runs
  }
  groups = section.of_role(role)
  theirs = [
    group
    for group in groups
    if not group.runs or any(run.folder in named for run in group.runs)
  ]
  return theirs or groups


def _direction(section: Section, add: str = '') -> str:
  words = {'min': ' (lower is better', 'max': ' (higher is better'}
  return f'{words[section.mode]}{add})' if section.mode else ''


def _errors(groups: Sequence[Group]) -> str:
  counts = sorted({len(g.runs) for g in groups if g.runs})
  if not counts or counts[-1] == 1:
    return ' One seed each.'
  seeds = '–'.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
  return f' Means over {seeds} seeds; error bars are standard errors.'
