# SPDX-License-Identifier: Apache-2.0
"""Renders a report as one self-contained HTML page without scripts.

Sample outputs are rows of tokens, coloured by the divergence between student
and teacher at each token. Hovering over a token or clicking it shows details.
"""

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from gkd_jax.report import figures as figures_lib
from gkd_jax.report import plots

# Upper bounds, in nats, of the token colours; the last colour is unbounded.
_NATS = (0.05, 0.2, 0.5, 1.0, 2.0)
_OPEN_EXAMPLES = 5  # the others are folded
_MAX_TOKENS = 20_000  # in the page: about 4 MB
_LONG = 400  # characters; longer texts are folded
_LONG_STRIP = 40  # characters of an output that fill a line


@dataclasses.dataclass(frozen=True)
class DrawnFigure:
  """A figure, the name of its file without suffix, and its drawing."""

  figure: figures_lib.Figure
  file: str
  drawn: Any  # what plots.draw returned


@dataclasses.dataclass(frozen=True)
class Part:
  """The part of a report on one task and split; all texts are plain text.

  Attributes:
    heading: empty if the report has one part only.
    summary: sentences on the comparison and its result.
    table: rows of cells, header first.
    best: (row, column) of the best means, not counting header and names.
    notes: on the table.
    also_run: a table like the first; may be empty.
    figures: with sufficient runs.
    left_out: why the other figures are missing.
    samples: (experiment, content of samples_<split>.json).
    runs: a table of all runs, header first.
  """

  heading: str
  summary: Sequence[str]
  table: Sequence[Sequence[str]]
  best: set[tuple[int, int]]
  notes: Sequence[str]
  also_run: Sequence[Sequence[str]]
  figures: Sequence[DrawnFigure]
  left_out: Sequence[str]
  samples: Sequence[tuple[str, Mapping[str, Any]]]
  runs: Sequence[Sequence[str]]


def render(title: str, parts: Sequence[Part], not_used: Sequence[str]) -> str:
  """Returns the page.

  Args:
    title: of the report.
    parts: one per task and split.
    not_used: lines on folders that RUNS matches but the report does not use.
  """
  body = [f'<header><h1>{escape(title)}</h1>{_contents(parts)}</header>']
  for i, part in enumerate(parts):
    body.append(f'<section id="part-{i}">{_part(part, i)}</section>')
  if not_used:
    body.append(f'<section><h2>Not used</h2>{_list(not_used)}</section>')
  content = '\n'.join(body)
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{content}
</main>
</body>
</html>
"""


def _contents(parts: Sequence[Part]) -> str:
  if len(parts) == 1:
    return ''
  links = ''.join(
    f'<li><a href="#part-{i}">{escape(part.heading)}</a></li>'
    for i, part in enumerate(parts)
  )
  return f'<nav aria-label="Tasks"><ul>{links}</ul></nav>'


def _part(part: Part, number: int) -> str:
  blocks = []
  if part.heading:
    blocks.append(f'<h2>{escape(part.heading)}</h2>')
  blocks.append(f'<p class="summary">{escape(" ".join(part.summary))}</p>')
  blocks.append(_table(part.table, 'Results', part.best))
  blocks.append(f'<p class="note">{escape(" ".join(part.notes))}</p>')
  if part.also_run:
    table = _table(part.also_run, 'Also run')
    blocks.append(f'<details><summary>Also run</summary>{table}</details>')
  if part.figures:
    drawn = '\n'.join(_figure(shown) for shown in part.figures)
    blocks.append(f'<h3>Figures</h3><div class="figures">{drawn}</div>')
  if part.left_out:
    blocks.append(
      f'<div class="note"><p>Left out:</p>{_list(part.left_out)}</div>'
    )
  if part.samples:
    blocks.append(_samples(part.samples))
  table = _table(part.runs, 'Runs')
  blocks.append(f'<details><summary>All runs</summary>{table}</details>')
  return '\n'.join(blocks)


def _table(
  rows: Sequence[Sequence[str]],
  label: str,
  best: set[tuple[int, int]] = frozenset(),
) -> str:
  """Returns a table that scrolls horizontally if it is too wide."""
  head = ''.join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
  body = []
  for y, (name, *cells) in enumerate(rows[1:]):
    row = [f'<th scope="row">{escape(name)}</th>']
    for x, cell in enumerate(cells):
      text = escape(cell)
      row.append(f'<td>{f"<b>{text}</b>" if (y, x) in best else text}</td>')
    body.append(f'<tr>{"".join(row)}</tr>')
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
    f'<table><thead><tr>{head}</tr></thead>'
    f'<tbody>{"".join(body)}</tbody></table></div>'
  )


def _figure(shown: DrawnFigure) -> str:
  figure = shown.figure
  svg = plots.svg(shown.drawn, shown.file)
  svg = svg.replace(
    '<svg', f'<svg role="img" aria-label="{escape(figure.title)}"', 1
  )
  numbers = _table(plots.rows(figure.data), figure.title)
  wide = ' class="wide"' if isinstance(figure.data, plots.Bars) else ''
  return (
    f'<figure{wide}><h4>{escape(figure.title)}</h4>'
    f'<div class="scroll">{svg}</div>'
    f'<figcaption>{escape(figure.caption)}</figcaption>'
    f'<details><summary>Numbers</summary>{numbers}</details></figure>'
  )


def _list(lines: Sequence[str]) -> str:
  return f'<ul>{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


# --- Sample outputs -----------------------------------------------------------


def _samples(samples: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
  """Returns the outputs for the first examples, one row per experiment."""
  first = samples[0][1]['examples']
  cards, num_tokens, num_shown = [], 0, 0
  for i, example in enumerate(first):
    strips = []
    for name, of_run in samples:
      if i >= len(of_run['examples']):
        continue
      written = of_run['examples'][i]
      if written['input'] == example['input'] and 'tokens' in written:
        strips.append(_strip(name, written['tokens'], of_run['eos_id']))
        num_tokens += len(written['tokens'])
    if cards and num_tokens > _MAX_TOKENS:
      break
    cards.append(_example(i, example, strips))
    num_shown += 1
  shown, folded = cards[:_OPEN_EXAMPLES], cards[_OPEN_EXAMPLES:]
  more = ''
  if folded:
    more = (
      f'<details><summary>{len(folded)} more examples</summary>'
      f'{"".join(folded)}</details>'
    )
  hidden = len(first) - num_shown
  rest = f' samples_*.json has {hidden} more examples.' if hidden else ''
  decodings = sorted({of_run['decoding'] for _, of_run in samples})
  return f"""<h3>Where student and teacher disagree</h3>
<p>Each student's own output ({escape(', '.join(decodings))} decoding), token by
token. The colour of a token is KL(student‖teacher) at its position, in nats,
over the full vocabulary at temperature 1, given the student's previous tokens.
Tokens are underlined if the teacher's most likely token is another one. Hover
over a token or click it for the probabilities. ∎ is the end of the
output.{rest}</p>
{_legend()}
{''.join(shown)}
{more}"""


def _legend() -> str:
  """Returns the legend of the token colours."""
  ends = [f'{nats:g}' for nats in _NATS]
  ranges = [
    f'below {ends[0]}',
    *(f'{a}–{b}' for a, b in zip(ends, ends[1:], strict=False)),
    f'{ends[-1]} or more',
  ]
  keys = ''.join(
    f'<li><span class="token k{i}">&nbsp;&nbsp;&nbsp;</span> {text}</li>'
    for i, text in enumerate(ranges)
  )
  return (
    f'<ul class="legend" aria-label="Colours, in nats">{keys}<li>nats</li>'
    '<li><span class="token k0 other">abc</span> the teacher prefers another '
    'token</li></ul>'
  )


def _example(
  number: int, example: Mapping[str, Any], strips: Sequence[str]
) -> str:
  texts = ''.join(
    f'<div><dt>{name}</dt><dd>{_text(example[name])}</dd></div>'
    for name in ('input', 'reference', 'teacher')
  )
  return (
    f'<article><h4>Example {number + 1}</h4><dl>'
    f'{texts}</dl><dl class="strips">{"".join(strips)}</dl></article>'
  )


def _text(text: str) -> str:
  """Returns a text, folded if it is long.

  The folded form shows start and end: a few-shot prompt ends with the question.
  """
  if len(text) <= _LONG:
    return f'<span class="text">{escape(text)}</span>'
  short = f'{text[: _LONG // 4]} … {text[-_LONG * 3 // 4 :]}'
  return (
    f'<details class="text"><summary>{escape(short)}</summary>'
    f'{escape(text)}</details>'
  )


def _strip(name: str, tokens: Sequence[Mapping[str, Any]], eos_id: int) -> str:
  """Returns one output, and a note on its token with the largest KL."""
  spans = ''.join(_token(token, eos_id) for token in tokens)
  mean = sum(token['kl'] for token in tokens) / len(tokens)
  detail = f'mean {mean:.2f} nats'
  worst = max(tokens, key=lambda token: token['kl'])
  if worst['id'] != worst['teacher_id']:
    detail += (
      f'; most at {_name(worst["text"], worst["id"], eos_id)} '
      f'({worst["kl"]:.2f}), for which the teacher prefers '
      f'{_name(worst["teacher_text"], worst["teacher_id"], eos_id)}'
    )
  is_long = sum(len(token['text']) for token in tokens) > _LONG_STRIP
  below = ' below' if is_long else ''
  return (
    f'<div><dt>{escape(name)}</dt><dd><span class="strip">{spans}</span>'
    f'<span class="detail{below}">{escape(detail)}</span></dd></div>'
  )


def _token(token: Mapping[str, Any], eos_id: int) -> str:
  color = bisect.bisect_right(_NATS, token['kl'])
  agrees = token['id'] == token['teacher_id']
  text = token['text']
  if token['id'] == eos_id:
    text = '∎'
  elif not text:
    text = '·'  # a byte of a character, or a token without text
  text = text.replace('\n', '↵\n')
  detail = (
    f'{_name(token["text"], token["id"], eos_id)}: '
    f'student {token["student_probability"]:.3f}, '
    f'teacher {token["teacher_probability"]:.3f}. '
  )
  if agrees:
    detail += 'The teacher also prefers it. '
  else:
    other = _name(token['teacher_text'], token['teacher_id'], eos_id)
    detail += (
      f'The teacher prefers {other}: {token["teacher_id_probability"]:.3f}. '
    )
  detail += f'KL {token["kl"]:.3f} nats.'
  return (
    f'<span class="token k{color}{"" if agrees else " other"}" tabindex="-1" '
    f'title="{escape(detail)}">{escape(text)}</span>'
  )


def _name(text: str, id: int, eos_id: int) -> str:
  """Returns the name of a token in a sentence."""
  if id == eos_id:
    return 'the end'
  return f'“{text}”'.replace('\n', '↵') if text else f'token {id}'


# Token colours have one hue and differ in opacity: readers with colour
# blindness can distinguish them, and text stays legible (contrast above 4.5).
_STYLE = """
:root {
  --ground: #fff; --panel: #f6f7f8; --ink: #1b1f24; --muted: #59636e;
  --line: #d5dade; --accent: #005a9c; --heat: 213 94 0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --panel: #1d2126; --ink: #e6e8eb; --muted: #9aa4af;
    --line: #363c44; --accent: #6cb6ff; --heat: 205 84 0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word;
}
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 0.5rem; }
h3 { font-size: 1.15rem; margin: 2.5rem 0 0.75rem; }
h4 { font-size: 1rem; margin: 0 0 0.5rem; }
a, summary { color: var(--accent); }
summary { cursor: pointer; margin: 0.5rem 0; }
.summary { max-width: 46rem; font-size: 1.05rem; }
.note, figcaption, .detail { color: var(--muted); font-size: 0.875rem; }
.note { max-width: 46rem; }
div.note { margin-top: 1rem; }
.note p { margin: 0; }
.note ul { margin: 0; padding-left: 1.25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; }
th, td { padding: 0.35rem 0.6rem; text-align: right; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
th:first-child {
  text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--ground);
}
figure th:first-child { background: var(--panel); }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 500; }
.figures {
  display: grid; gap: 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr));
}
figure, article {
  margin: 0; padding: 1rem; background: var(--panel); border-radius: 0.5rem;
  min-width: 0;
}
figure svg {
  display: block; width: 100%; min-width: 26rem; max-width: 52rem; height: auto;
}
figure.wide { grid-column: 1 / -1; }
figure.wide svg { min-width: 36rem; }
figcaption { margin-top: 0.5rem; }
article { margin-top: 1rem; }
dl { margin: 0; }
dl > div {
  display: grid; grid-template-columns: 14rem minmax(0, 1fr); gap: 0.5rem;
  padding: 0.25rem 0; align-items: baseline;
}
dt { color: var(--muted); font-size: 0.875rem; }
dd {
  margin: 0; display: flex; flex-wrap: wrap; align-items: baseline;
  gap: 0 1.5rem;
}
.text, .strip { font-family: ui-monospace, monospace; white-space: pre-wrap; }
.text, .token { overflow-wrap: anywhere; }
.text summary { color: inherit; margin: 0; }
.below { flex-basis: 100%; }
.strips { margin-top: 0.5rem; border-top: 1px solid var(--line); }
.token {
  padding: 0.1em 0.12em; margin-right: 1px; border-radius: 2px;
  border-bottom: 2px solid transparent; cursor: help;
  background: rgb(var(--heat) / var(--share));
}
.k0 { --share: 0; } .k1 { --share: 0.12; } .k2 { --share: 0.26; }
.k3 { --share: 0.42; } .k4 { --share: 0.6; } .k5 { --share: 0.8; }
.other { border-bottom-color: var(--ink); }
.token:focus { outline: 2px solid var(--accent); }
.token:focus::after {
  content: attr(title); position: fixed; inset: auto 0 0; z-index: 1;
  padding: 0.75rem 1rem; background: var(--ink); color: var(--ground);
  font: 1rem/1.4 system-ui, sans-serif; white-space: normal;
}
.legend {
  display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; padding: 0;
  list-style: none; font-size: 0.875rem;
}
.legend .k0 { outline: 1px solid var(--line); }
@media (max-width: 40rem) {
  dl > div { grid-template-columns: minmax(0, 1fr); gap: 0; }
  tbody th { white-space: normal; min-width: 8rem; }
}
@media print {
  :root {
    --ground: #fff; --panel: #fff; --ink: #000; --muted: #444;
    --line: #bbb; --accent: #000; --heat: 213 94 0;
  }
  main { max-width: none; padding: 0; }
  .token { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, article, tr { break-inside: avoid; }
  figure svg, figure.wide svg { min-width: 0; }
  .figures { display: block; }
  .scroll { overflow: visible; }
}
"""
