# SPDX-License-Identifier: Apache-2.0
"""The finding of a comparison, as one sentence computed from its numbers."""

from collections.abc import Sequence

from gkd_jax.report import runs as runs_lib
from gkd_jax.report import tables
from gkd_jax.report.sections import Group, Section

_MAX_NAMED = 5  # methods, the best first


def describe(section: Section) -> str:
  """Returns the finding of a section; empty if methods cannot be ranked.

  Methods are ranked by the gap they close, else by the main metric. Where they
  differ in the share of outputs that the student writes, the sentence states
  whether a larger share was better, as in the GKD paper.
  """
  ranked = _ranked(section)
  if len(ranked) < 2:
    return ''
  if _have_gap(ranked):
    metric, form, scale, unit = 'gap_closed', '{:.1f}', 100.0, ' %'
  else:
    metric, form, scale, unit = section.metric, '{:.2f}', 1.0, ''
  values = [
    tables.format_mean(group.means[metric], form, scale) + unit
    for group in ranked[:_MAX_NAMED]
  ]
  names = [group.name for group in ranked[:_MAX_NAMED]]
  others = [f'{n} {v}' for n, v in zip(names[1:], values[1:], strict=True)]
  if len(ranked) > _MAX_NAMED:
    others.append(f'{len(ranked) - _MAX_NAMED} more are behind')
  if metric == 'gap_closed':
    first = (
      f'{names[0]} closes {values[0]} of the gap between the initial student '
      'and the teacher'
    )
  else:
    first = f'{names[0]} ends at {values[0]} ({tables.axis_label(metric)})'
  seeds = sorted({len(group.runs) for group in ranked})
  count = f'{seeds[0]} to {seeds[-1]}' if len(seeds) > 1 else f'{seeds[0]}'
  count = 'one seed' if seeds == [1] else f'{count} seeds'
  return f'Found: {", ".join([first, *others])} ({count}){_trend(ranked)}.'


def _ranked(section: Section) -> list[Group]:
  """Returns the methods, best first; [] if a method lacks the metric."""
  methods = section.methods
  if _have_gap(methods):
    return sorted(methods, key=lambda g: -g.means['gap_closed'].value)
  if section.mode is None or not all(
    section.metric in group.means for group in methods
  ):
    return []
  return sorted(
    methods,
    key=lambda g: g.means[section.metric].value,
    reverse=section.mode == 'max',
  )


def _have_gap(groups: Sequence[Group]) -> bool:
  """Whether all have a gap to close; those of several teachers have none."""
  return all('gap_closed' in group.means for group in groups)


def _trend(ranked: Sequence[Group]) -> str:
  """Returns a clause on whether a larger share of student outputs was better.

  Compares the methods with a divergence. Empty for fewer than two of them, or
  if two have the same share.
  """
  shares = [
    runs_lib.student_data_fraction(group.settings)
    for group in ranked
    if runs_lib.divergence(group.settings) is not None
  ]
  if None in shares or len(shares) < 2 or len({*shares}) < len(shares):
    return ''
  if shares == sorted(shares, reverse=True):
    return (
      ': the larger the share of outputs that the student writes, the better, '
      'as in the GKD paper'
    )
  return (
    ': a larger share of outputs that the student writes was not always better '
    'here, unlike in the GKD paper'
  )
