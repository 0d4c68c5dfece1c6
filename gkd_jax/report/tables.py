# SPDX-License-Identifier: Apache-2.0
"""Means over seeds, and tables of means, for `report`."""

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gkd_jax.runtime import metrics as metrics_lib


class Mean(NamedTuple):
  """A mean over seeds.

  Attributes:
    value: the mean.
    error: standard error of the mean; None for a single value.
    count: number of values.
  """

  value: float
  error: float | None
  count: int


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of a table of results.

  Attributes:
    head: header, with unit.
    metric: of the means in the column.
    form: format of a number.
    scale: factor of the numbers.
    with_error: whether to show standard errors.
    better: 'min' or 'max', which is better; None: neither, or unknown.
  """

  head: str
  metric: str
  form: str = '{:.2f}'
  scale: float = 1.0
  with_error: bool = True
  better: str | None = None


def mean(values: Sequence[float | None]) -> Mean | None:
  """Returns the mean of a metric over runs; None if a run lacks the metric.

  A mean over fewer runs than the other columns of the table would mislead.
  """
  if not values or None in values:
    return None
  error = None
  if len(values) > 1:
    error = statistics.stdev(values) / math.sqrt(len(values))
  return Mean(statistics.fmean(values), error, len(values))


def format_mean(mean: Mean | None, form: str, scale: float = 1.0) -> str:
  """Returns '12.3 ± 0.4', or '12.3' without an error, or '' without a mean."""
  if mean is None:
    return ''
  text = form.format(mean.value * scale)
  if mean.error is not None:
    text += f' ± {form.format(mean.error * scale)}'
  return text


def cells(
  columns: Sequence[Column],
  named: Sequence[tuple[str, Mapping[str, Mean | None]]],
) -> list[list[str]]:
  """Returns the rows of a table: the header, then one row per name."""
  rows = [['method', *(column.head for column in columns)]]
  for name, means in named:
    row = [name]
    for column in columns:
      mean = means.get(column.metric)
      if mean is not None and not column.with_error:
        mean = mean._replace(error=None)
      row.append(format_mean(mean, column.form, column.scale))
    rows.append(row)
  return rows


def best(
  column: Column, named: Sequence[tuple[str, Mapping[str, Mean]]]
) -> str | None:
  """Returns the name with the best mean in a column; None if it is a tie."""
  values = {
    name: means[column.metric].value
    for name, means in named
    if column.metric in means
  }
  if column.better is None or len(values) < 2:
    return None
  top = (min if column.better == 'min' else max)(values.values())
  names = [name for name, value in values.items() if value == top]
  return names[0] if len(names) == 1 else None


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """Returns a table in Markdown with aligned columns; header first."""
  cells = [[cell.replace('|', '\\|') for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = [
    '| '
    + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))
    + ' |'
    for row in cells
  ]
  lines.insert(1, '|' + '|'.join('-' * (w + 2) for w in widths) + '|')
  return '\n'.join(lines)


def metric_label(name: str) -> str:
  """Returns the label of a task's metric: 'WER %', 'ROUGE-2'."""
  short = name.removeprefix('rouge')
  label = f'ROUGE-{short}' if short != name else name
  if name in ('wer', 'per', 'cer', 'bleu', 'f1'):
    label = name.upper()
  in_percent = (*metrics_lib.ERRORS, *metrics_lib.SHARES_RIGHT)
  return f'{label} %' if name in in_percent else label


def head(metric: str) -> str:
  """Returns the header of a metric's column: 'WER %' or 'WER % at T=1'."""
  decoding, _, name = metric.rpartition('/')
  if decoding == 'greedy':
    return metric_label(name)
  if (temperature := temperature_of(decoding)) is not None:
    return f'{metric_label(name)} at T={temperature:g}'
  return f'{metric_label(name)}, {decoding.replace("_", " ")}'


def axis_label(metric: str) -> str:
  """Returns the label of a metric's axis: 'WER %, sampled at T=1'."""
  decoding, _, name = metric.rpartition('/')
  if (temperature := temperature_of(decoding)) is not None:
    decoding = f'sampled at T={temperature:g}'
  return f'{metric_label(name)}, {decoding.replace("_", " ")}'


def temperature_of(decoding: str) -> float | None:
  """Returns the temperature in a decoding's name, such as sampled_0.5."""
  match = re.fullmatch(r'sampled(?:_([\d.]+))?', decoding)
  return float(match[1] or 1.0) if match else None
