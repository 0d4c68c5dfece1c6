# SPDX-License-Identifier: Apache-2.0
import math
import re
import xml.etree.ElementTree as ET

import PIL.Image
import pytest

from gkd_jax.report import plots
from gkd_jax.report.plots import Bars, HeatMap, Line, Panel, Plot, Point
from gkd_jax.report.tables import Mean


def of_two(value, error):
  return Mean(value, error, 2)


INITIAL = Line('initial student', of_two(61.0, 1.0))
TEACHER = Line('teacher', Mean(20.0, None, 1))
DATA = {
  'bars': Bars(
    [
      Panel(
        'WER %, greedy',
        {'SFT': of_two(60.0, 0.5), 'ImitKD': of_two(54.5, 0.5)},
        INITIAL,
        [TEACHER],
      ),
      Panel(
        'WER %, sampled at T=1',
        {'SFT': None, 'ImitKD': of_two(64.5, 0.5)},
        Line('initial student', of_two(71.0, 1.0)),
      ),
    ]
  ),
  'curves': Plot(
    'steps of the method',
    'WER %, greedy, validation',
    {
      'ImitKD': [
        Point(plots.exact(0), of_two(62.0, 1.0)),
        Point(plots.exact(500), of_two(59.5, 0.5), 'half'),
      ]
    },
    [TEACHER],
    {0.0: 'start'},
  ),
  'heat_map': HeatMap(
    'WER %, greedy',
    'λ',
    ['0', '0.5', '1'],
    {
      'forward KL': [of_two(56.0, 1.0), of_two(54.5, 0.5), None],
      'JSD(0.9)': [of_two(52.5, 0.5), None, of_two(48.5, 0.5)],
    },
    'min',
  ),
}


def test_a_mean_curve_has_the_steps_of_all_seeds():
  points = plots.mean_curve([{0: 1.0, 5: 2.0, 9: 4.0}, {0: 3.0, 9: 8.0}])

  # Of two seeds: the standard error is half the difference.
  assert [(p.x.value, p.y) for p in points] == [
    (0.0, Mean(2.0, pytest.approx(1.0), 2)),
    (9.0, Mean(6.0, pytest.approx(2.0), 2)),
  ]


# --- The numbers, as rows -----------------------------------------------------


def test_the_numbers_of_bars_have_the_levels_first():
  assert plots.rows(DATA['bars']) == [
    ['', 'WER %, greedy', 'WER %, sampled at T=1'],
    ['initial student', '61 ± 1', '71 ± 1'],
    ['teacher', '20', ''],
    ['SFT', '60 ± 0.5', ''],
    ['ImitKD', '54.5 ± 0.5', '64.5 ± 0.5'],
  ]


def test_the_numbers_of_curves_are_a_row_a_point():
  assert plots.rows(DATA['curves']) == [
    ['', 'steps of the method', 'WER %, greedy, validation'],
    ['ImitKD', 'start', '62 ± 1'],
    ['ImitKD half', '500', '59.5 ± 0.5'],
    ['teacher', '', '20'],
  ]


def test_the_numbers_of_a_heat_map_lie_as_its_cells():
  assert plots.rows(DATA['heat_map']) == [
    ['λ', '0', '0.5', '1'],
    ['forward KL', '56 ± 1', '54.5 ± 0.5', ''],
    ['JSD(0.9)', '52.5 ± 0.5', '', '48.5 ± 0.5'],
  ]


# --- Pictures -----------------------------------------------------------------


@pytest.fixture(scope='module')
def drawn():
  return {name: plots.draw(data) for name, data in DATA.items()}


@pytest.mark.parametrize('name', DATA)
def test_a_picture_is_not_blank(drawn, tmp_path, name):
  plots.save(drawn[name], tmp_path / 'figure.png')

  with PIL.Image.open(tmp_path / 'figure.png') as picture:
    assert picture.format == 'PNG'
    assert min(picture.size) > 300
    assert len(picture.convert('RGB').getcolors(1 << 20)) > 10


@pytest.mark.parametrize('name', DATA)
def test_an_svg_needs_nothing_else_and_has_the_pages_colour(drawn, name):
  code = plots.svg(drawn[name], 'p')

  root = ET.fromstring(code)
  assert root.tag == '{http://www.w3.org/2000/svg}svg'
  assert 'viewBox' in root.attrib and 'width' not in root.attrib
  assert not re.search(r'(?:href|src)="(?!#|data:)|url\((?!#)|@import', code)
  assert 'currentColor' in code
  assert plots._INK not in code


def test_names_in_two_svgs_differ(drawn):
  codes = [plots.svg(drawn['bars'], prefix) for prefix in ('a', 'b')]
  ids = [set(re.findall(r'\bid="([^"]+)"', code)) for code in codes]

  assert ids[0] and not ids[0] & ids[1]
  for code, there in zip(codes, ids, strict=True):
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', code)
    assert used and {a or b for a, b in used} <= there


def test_an_svg_is_the_same_each_time():
  first, second = (plots.svg(plots.draw(DATA['heat_map']), 'p') for _ in 'ab')

  assert first == second


def text_of(drawn_figure):
  return [
    text.get_text()
    for axes in drawn_figure.axes
    for text in [*axes.texts, *axes.get_xticklabels(), axes.xaxis.label]
  ]


def test_bars_reach_from_the_initial_student_to_the_mean(drawn):
  _, bar = drawn['bars'].axes[0].patches[:2]

  assert bar.get_x() == pytest.approx(61.0)
  assert bar.get_x() + bar.get_width() == pytest.approx(54.5)


def test_cells_are_written_and_coloured_by_their_means(drawn):
  texts = text_of(drawn['heat_map'])

  assert '54.5 ± 0.5' in texts and '–' in texts
  image = drawn['heat_map'].axes[0].images[0]
  assert image.get_array()[0, 1] == 54.5
  assert math.isnan(image.get_array().filled(math.nan)[0, 2])
  assert image.get_cmap().name == 'cividis_r'  # less is better, so brighter
