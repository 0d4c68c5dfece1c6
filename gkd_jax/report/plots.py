# SPDX-License-Identifier: Apache-2.0
"""Bars, curves and heat maps: their data, and drawing with matplotlib.

`draw` makes a matplotlib figure of `Bars`, a `Plot` or a `HeatMap`; `save` and
`svg` write the figure. matplotlib is imported on first use.
"""

import dataclasses
import io
import math
import pathlib
import re
from collections.abc import Mapping, Sequence

from gkd_jax.report import tables
from gkd_jax.report.tables import Mean

# Distinguishable with all common kinds of colour blindness, on light and dark
# background (after Paul Tol's 'vibrant'). Markers are also distinct.
_COLORS = (
  '#0077bb',
  '#ee7733',
  '#009988',
  '#cc3311',
  '#33aadd',
  '#ee3377',
  '#8877bb',
  '#998800',
)
_MARKERS = 'os^DvPX*'
MAX_SERIES = len(_MARKERS)  # that are distinguishable
# Of text and lines. `svg` replaces it by the page's text colour.
_INK = '#1b1f24'
_STYLE = {
  'axes.edgecolor': _INK,
  'axes.labelcolor': _INK,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlesize': 'medium',
  'font.size': 10,
  'legend.frameon': False,
  'savefig.facecolor': 'white',
  'svg.fonttype': 'none',  # text stays text
  'svg.hashsalt': 'gkd_jax',  # deterministic ids
  'text.color': _INK,
  'xtick.color': _INK,
  'ytick.color': _INK,
}


@dataclasses.dataclass(frozen=True)
class Line:
  """A reference level, of a teacher or an initial student."""

  name: str
  mean: Mean


@dataclasses.dataclass(frozen=True)
class Panel:
  """Bars of one metric.

  Attributes:
    label: of the metric's axis.
    bars: {name: mean, or None if not measured}.
    base: start of the bars, the initial student's level; None: 0.
    lines: reference levels.
  """

  label: str
  bars: Mapping[str, Mean | None]
  base: Line | None = None
  lines: Sequence[Line] = ()


@dataclasses.dataclass(frozen=True)
class Bars:
  """Panels side by side, whose bars have the same names."""

  panels: Sequence[Panel]


@dataclasses.dataclass(frozen=True)
class Point:
  """One point of a series, with an optional label."""

  x: Mean
  y: Mean
  name: str = ''


@dataclasses.dataclass(frozen=True)
class Plot:
  """Series of points, joined by lines.

  Attributes:
    x_label: with unit.
    y_label: with unit.
    series: {name: points, in order}.
    lines: horizontal reference levels.
    x_ticks: {position: text}; None: matplotlib's.
    log_x: whether x is logarithmic.
  """

  x_label: str
  y_label: str
  series: Mapping[str, Sequence[Point]]
  lines: Sequence[Line] = ()
  x_ticks: Mapping[float, str] | None = None
  log_x: bool = False


@dataclasses.dataclass(frozen=True)
class HeatMap:
  """Means by row and column; None for a cell without runs.

  Attributes:
    label: of the metric.
    x_label: of the columns.
    columns: names of the columns.
    rows: {name: means, one per column}.
    mode: 'min' or 'max': better values are brighter; None: unknown.
  """

  label: str
  x_label: str
  columns: Sequence[str]
  rows: Mapping[str, Sequence[Mean | None]]
  mode: str | None


def mean_curve(by_seed: Sequence[Mapping[int, float]]) -> list[Point]:
  """Returns the mean at each step that all seeds share.

  Args:
    by_seed: {step: value} of each seed.
  """
  steps = set.intersection(*(set(at) for at in by_seed))
  return [
    Point(exact(step), tables.mean([at[step] for at in by_seed]))
    for step in sorted(steps)
  ]


def exact(value: float) -> Mean:
  """Returns a number without error."""
  return Mean(float(value), None, 1)


# --- The numbers, as rows -----------------------------------------------------


def rows(data: Bars | Plot | HeatMap) -> list[list[str]]:
  """Returns the numbers as a table, header first."""
  if isinstance(data, Bars):
    lines = [
      line
      for line in (data.panels[0].base, *data.panels[0].lines)
      if line is not None
    ]
    levels = [
      {
        line.name: line.mean
        for line in (panel.base, *panel.lines)
        if line is not None
      }
      for panel in data.panels
    ]
    return [
      ['', *(panel.label for panel in data.panels)],
      *(
        [line.name, *(_number(level.get(line.name)) for level in levels)]
        for line in lines
      ),
      *(
        [name, *(_number(panel.bars[name]) for panel in data.panels)]
        for name in data.panels[0].bars
      ),
    ]
  if isinstance(data, HeatMap):
    return [
      [data.x_label, *data.columns],
      *([name, *map(_number, means)] for name, means in data.rows.items()),
    ]
  return [
    ['', data.x_label, data.y_label],
    *(
      [
        ' '.join(filter(None, (name, point.name))),
        (data.x_ticks or {}).get(point.x.value) or _number(point.x),
        _number(point.y),
      ]
      for name, points in data.series.items()
      for point in points
    ),
    *([line.name, '', _number(line.mean)] for line in data.lines),
  ]


def _number(mean: Mean | None) -> str:
  return tables.format_mean(mean, '{:.4g}')


# --- Drawing ------------------------------------------------------------------


def draw(data: Bars | Plot | HeatMap):
  """Returns a matplotlib figure."""
  import matplotlib

  of_kind = {Bars: _draw_bars, HeatMap: _draw_heat_map, Plot: _draw_plot}
  with matplotlib.rc_context(_STYLE):
    return of_kind[type(data)](data)


def save(drawn, path: pathlib.Path) -> None:
  """Writes a result of `draw` to a file; the suffix determines the format."""
  import matplotlib

  with matplotlib.rc_context(_STYLE):
    drawn.savefig(path, dpi=150)


def svg(drawn, prefix: str) -> str:
  """Returns a result of `draw` as SVG, with the page's text colour.

  Args:
    drawn: the figure.
    prefix: of the ids in the SVG, which must be unique in a page.
  """
  import matplotlib

  text = io.StringIO()
  with matplotlib.rc_context(_STYLE):
    drawn.savefig(
      text,
      format='svg',
      transparent=True,
      metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')),
    )
  # Removes the XML declaration, and the size, which the page's style sets.
  code = re.sub(r'^.*?(?=<svg)', '', text.getvalue(), flags=re.DOTALL)
  code = re.sub(r' (?:width|height)="[\d.]+pt"', '', code, count=2)
  code = code.replace(_INK, 'currentColor')
  return re.sub(r'(\bid="|href="#|url\(#)', rf'\g<1>{prefix}-', code)


def _axes(width: float, height: float, columns: int = 1):
  from matplotlib.figure import Figure as Canvas

  canvas = Canvas(figsize=(width, height), layout='constrained')
  return canvas, canvas.subplots(1, columns, sharey=True, squeeze=False)[0]


def _draw_bars(data: Bars):
  names = list(data.panels[0].bars)
  canvas, all_axes = _axes(7.4, 1.7 + 0.3 * len(names), len(data.panels))
  for axes, panel in zip(all_axes, data.panels, strict=True):
    start = panel.base.mean.value if panel.base else 0.0
    for place, name in enumerate(names):
      mean = panel.bars[name]
      if mean is None:
        continue
      axes.barh(
        place,
        mean.value - start,
        left=start,
        height=0.62,
        color=_COLORS[0],
        xerr=mean.error,
        error_kw={'ecolor': _INK, 'elinewidth': 1.2, 'capsize': 3},
      )
      # Beyond the end of the bar or of its error bar.
      out = -1 if mean.value < start else 1
      axes.annotate(
        f'{mean.value:.1f}',
        (mean.value + out * (mean.error or 0.0), place),
        xytext=(out * 4, 0),
        textcoords='offset points',
        ha='right' if out < 0 else 'left',
        va='center',
        fontsize=8,
      )
    _draw_levels(axes.axvline, axes.axvspan, (panel.base, *panel.lines))
    axes.set_xlabel(panel.label)
    axes.margins(x=0.16)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first is on top
    axes.grid(axis='x', alpha=0.25)
    axes.set_axisbelow(True)
  _legend(canvas, all_axes[0])
  return canvas


def _draw_levels(line, span, levels) -> None:
  """Draws reference levels with their standard errors, in distinct styles."""
  styles = iter((':', '--', '-.', (0, (3, 1, 1, 1, 1, 1))) * 3)
  for level in levels:
    if level is None:
      continue
    style = '--' if level.name == 'teacher' else next(styles)
    line(
      level.mean.value, color=_INK, linestyle=style, lw=1.3, label=level.name
    )
    if level.mean.error:
      value, error = level.mean.value, level.mean.error
      span(value - error, value + error, color=_INK, alpha=0.12, lw=0)


def _draw_plot(data: Plot):
  canvas, (axes,) = _axes(6.4, 4.4 + 0.1 * len(data.series))
  for i, (name, points) in enumerate(data.series.items()):
    axes.errorbar(
      [point.x.value for point in points],
      [point.y.value for point in points],
      xerr=_error_sizes(point.x for point in points),
      yerr=_error_sizes(point.y for point in points),
      color=_COLORS[i % len(_COLORS)],
      marker=_MARKERS[i % len(_MARKERS)],
      linestyle='-' if i < len(_COLORS) else '--',
      markersize=5,
      lw=1.5,
      capsize=2,
      label=name,
    )
    for point in points:
      axes.annotate(
        point.name,
        (point.x.value, point.y.value),
        xytext=(5, 5),
        textcoords='offset points',
        fontsize=8,
      )
  _draw_levels(axes.axhline, axes.axhspan, data.lines)
  axes.set(xlabel=data.x_label, ylabel=data.y_label)
  if data.log_x:
    axes.set_xscale('log')
  if data.x_ticks:
    axes.set_xticks(list(data.x_ticks), list(data.x_ticks.values()))
    axes.minorticks_off()
  axes.margins(0.08)
  axes.grid(alpha=0.25)
  _legend(canvas, axes)
  return canvas


def _error_sizes(means) -> list[float] | None:
  sizes = [mean.error or 0.0 for mean in means]
  return sizes if any(sizes) else None


def _draw_heat_map(data: HeatMap):
  import matplotlib

  canvas, (axes,) = _axes(
    2.2 + 1.0 * len(data.columns), 1.3 + 0.55 * len(data.rows)
  )
  values = [
    [math.nan if mean is None else mean.value for mean in row]
    for row in data.rows.values()
  ]
  colors = matplotlib.colormaps[
    'cividis_r' if data.mode == 'min' else 'cividis'
  ]
  image = axes.imshow(values, cmap=colors, aspect='auto')
  for y, row in enumerate(data.rows.values()):
    for x, mean in enumerate(row):
      if mean is None:
        axes.text(x, y, '–', ha='center', va='center')
        continue
      red, green, blue, _ = colors(image.norm(mean.value))
      is_light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
      axes.text(
        x,
        y,
        tables.format_mean(mean, '{:.1f}'),
        ha='center',
        va='center',
        fontsize=9,
        color='#000000' if is_light else '#ffffff',
      )
  axes.set_xticks(range(len(data.columns)), data.columns)
  axes.set_yticks(range(len(data.rows)), list(data.rows))
  axes.set_xlabel(data.x_label)
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  canvas.colorbar(image, ax=axes, label=data.label).outline.set_visible(False)
  return canvas


def _legend(canvas, axes) -> None:
  handles, labels = axes.get_legend_handles_labels()
  if labels:
    canvas.legend(
      handles,
      labels,
      loc='outside lower center',
      ncols=2 if len(labels) > 3 else len(labels),
      fontsize=9,
    )
