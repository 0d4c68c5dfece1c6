# SPDX-License-Identifier: Apache-2.0
"""Draws gap_closed.png, the README's figure, from the tables of results.md.

    python docs/results/gap_closed.py
"""

import pathlib
import re

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

FOLDER = pathlib.Path(__file__).parent
METHODS = ('SFT', 'supervised KD', 'ImitKD', 'on-policy GKD, forward KL')
SECTIONS = {
  'Few words': 'Spelling to sound, 1,000 words',
  'Chains of thought': 'Chains of thought, 2,000 problems',
}


def gap_closed(section: str) -> dict[str, tuple[float, float]]:
  """Returns {method: (mean, standard error)} of a section's first table."""
  text = (FOLDER.parent / 'results.md').read_text(encoding='utf-8')
  table = text.split(f'## {section}\n')[1].split('\n\n![')[0]
  rows = [
    [cell.strip(' *') for cell in line.strip('|').split('|')]
    for line in table.splitlines()
    if line.startswith('|')
  ]
  column = rows[0].index('gap closed %')
  values = {row[0]: row[column].replace('*', '') for row in rows[2:]}
  return {
    method: tuple(map(float, re.findall(r'-?[\d.]+', values[method])))
    for method in METHODS
  }


def main() -> None:
  """Writes the figure."""
  figure, panels = plt.subplots(1, 2, figsize=(8.5, 2.3), sharey=True)
  for panel, (section, title) in zip(panels, SECTIONS.items(), strict=True):
    values = gap_closed(section)
    panel.barh(
      list(values),
      [mean for mean, _ in values.values()],
      xerr=[error for _, error in values.values()],
      color=['#9aa5b1', '#9aa5b1', '#56a0d3', '#0072b2'],
      error_kw={'elinewidth': 1.2, 'capsize': 3},
      height=0.6,
    )
    panel.axvline(0.0, color='black', linewidth=0.8)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel('gap to the teacher closed, %', fontsize=9)
    panel.tick_params(labelsize=9, length=0)
    for side in ('top', 'right', 'left'):
      panel.spines[side].set_visible(False)
    panel.grid(axis='x', color='#dddddd', linewidth=0.6)
    panel.set_axisbelow(True)
  panels[0].invert_yaxis()  # both share it
  figure.tight_layout()
  figure.savefig(FOLDER / 'gap_closed.png', dpi=150)


if __name__ == '__main__':
  main()
