# SPDX-License-Identifier: Apache-2.0
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from gkd_jax.report import figures, page, plots
from gkd_jax.report.tables import Mean
from tests import run_folders
from tests.run_folders import token

NASTY = '<script>alert("1")</script> & \'quoted\' </span>'
# A sharp letter of two bytes, a line end, the end of the output.
TOKENS = [
  token('<b>', kl=0.01, id=5),
  token('', kl=0.3, id=198, teacher_text='\\xc4', teacher_id=199),
  token('é\n', kl=0.7, id=172, teacher_text='"&', teacher_id=9),
  token('"&', kl=1.5, id=9, teacher_text='', teacher_id=1),
  token('', kl=7.0, id=1, teacher_text=' <i>', teacher_id=8),
]
EMPTY = {
  'heading': '',
  'summary': ['What was compared.'],
  'table': [['method', 'WER %'], ['SFT', '50.0'], ['ImitKD', '40.0']],
  'best': {(1, 0)},
  'notes': ['A note.'],
  'also_run': [],
  'figures': [],
  'left_out': [],
  'samples': [],
  'runs': [['experiment', 'seed', 'folder', 'command'], ['SFT', '0', 'a', 'b']],
}
VOID = {'meta', 'link', 'br', 'img', 'input', 'hr'}


def part(**changes):
  return page.Part(**(EMPTY | changes))


def bars():
  figure = figures.Figure(
    'methods',
    'Methods <1>',
    'Caption & more.',
    plots.Bars([plots.Panel('WER %', {'SFT': Mean(50.0, 1.0, 2)})]),
  )
  return page.DrawnFigure(figure, 'methods', plots.draw(figure.data))


@pytest.fixture(scope='module')
def full():
  """A page with all parts, and with texts that need escaping."""
  samples = run_folders.samples(
    (NASTY, TOKENS), *[(f'x{i}', TOKENS[:1]) for i in range(9)]
  )
  more = run_folders.samples(*[('other', TOKENS[:1])], (NASTY, TOKENS))
  everything = part(
    heading=f'one {NASTY}',
    summary=[NASTY],
    table=[['method', NASTY], [NASTY, '1 < 2'], ['b', '3']],
    notes=[NASTY],
    also_run=[['method', 'x'], [NASTY, '1']],
    figures=[bars()],
    left_out=[NASTY],
    samples=[(f'SFT {NASTY}', samples), ('ImitKD', more)],
  )
  return page.render(NASTY, [everything, part(heading='two')], [NASTY])


class Tree(html.parser.HTMLParser):
  """Checks that tags are closed in order; keeps tags and texts."""

  def __init__(self, code):
    super().__init__()
    self.open, self.tags, self.texts = [], [], []
    self.feed(code)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    assert len(dict(attrs)) == len(attrs), f'{tag} has an attribute twice'
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append((self.open[-1] if self.open else None, data))

  def all(self, tag, **attrs):
    return [
      found
      for name, found in self.tags
      if name == tag and attrs.items() <= found.items()
    ]

  def tokens(self):
    return [
      found
      for _, found in self.tags
      if 'token' in found.get('class', '').split() and 'title' in found
    ]


@pytest.fixture(scope='module')
def tree(full):
  return Tree(full)


# --- The page as a whole ------------------------------------------------------


def test_the_page_is_well_formed_and_names_are_unique(tree):
  ids = [attrs['id'] for _, attrs in tree.tags if 'id' in attrs]

  assert len(ids) == len(set(ids))
  assert tree.tags[0][0] == 'html'


def test_the_page_loads_nothing_and_runs_nothing(full, tree):
  for tag, attrs in tree.tags:
    assert tag not in ('script', 'link', 'iframe', 'object', 'base')
    for name in ('src', 'href', 'xlink:href', 'srcset', 'action', 'data'):
      assert attrs.get(name, '#').startswith(('#', 'data:')), (tag, attrs)
    assert not any(name.startswith('on') for name in attrs)
  (style,) = [
    text for tag, text in tree.texts if tag == 'style' and '.token' in text
  ]
  assert '@import' not in style and 'url(' not in style


def test_texts_are_shown_as_they_are(full, tree):
  shown = [text for _, text in tree.texts]

  assert NASTY not in full
  # Title twice, heading, summary, table, notes, ...
  assert sum(NASTY in text for text in shown) >= 8
  assert f'one {NASTY}' in shown


def test_one_task_needs_no_list_of_contents():
  tree = Tree(page.render('Title', [part()], []))

  assert tree.all('nav') == []
  assert [text for tag, text in tree.texts if tag == 'h1'] == ['Title']


def test_several_tasks_have_one_with_links_that_lead_there(tree):
  links = [attrs['href'] for attrs in tree.all('a')]

  assert links == ['#part-0', '#part-1']
  assert {
    f'#{attrs["id"]}' for attrs in tree.all('section') if 'id' in attrs
  } == {*links}


def test_the_best_mean_stands_out():
  tree = Tree(page.render('Title', [part()], []))

  assert [text for tag, text in tree.texts if tag == 'b'] == ['40.0']


def test_wide_tables_scroll_also_by_keyboard(tree):
  regions = tree.all('div', role='region')

  assert len(regions) >= len(tree.all('table')) > 0
  assert all(attrs['tabindex'] == '0' for attrs in regions)
  assert all(attrs['aria-label'] for attrs in regions)


def test_a_figure_has_words_and_numbers_beside_it(tree):
  (svg,) = tree.all('svg')

  assert svg['role'] == 'img' and svg['aria-label'] == 'Methods <1>'
  texts = [text for _, text in tree.texts]
  assert 'Caption & more.' in texts
  assert '50 ± 1' in texts


# --- Tokens -------------------------------------------------------------------


def strip_of(tokens, eos_id=1):
  return Tree(page._strip('SFT', tokens, eos_id))


@pytest.mark.parametrize(
  'kl, color',
  [
    (0.0, 'k0'),
    (0.049, 'k0'),
    (0.05, 'k1'),
    (0.3, 'k2'),
    (0.99, 'k3'),
    (1.0, 'k4'),
    (2.0, 'k5'),
    (50.0, 'k5'),
  ],
)
def test_the_colour_is_the_divergence(kl, color):
  (found,) = strip_of([token('a', kl=kl)]).tokens()

  assert found['class'] == f'token {color}'


def test_the_legend_has_every_colour_and_the_underline(tree):
  legend = page._legend()

  assert re.findall(r'token (k\d)"', legend) == [f'k{i}' for i in range(6)]
  words = ' '.join(text for _, text in Tree(legend).texts)
  for text in ('below 0.05', '0.05–0.2', '1–2', '2 or more', 'nats'):
    assert text in words
  for i in range(6):
    assert f'.k{i} {{' in page._STYLE


def test_what_the_teacher_would_not_have_written_is_underlined():
  found = strip_of(TOKENS).tokens()

  assert ['other' in t['class'].split() for t in found] == [
    False,
    True,
    True,
    True,
    True,
  ]


def test_a_token_says_both_probabilities_and_what_the_teacher_prefers():
  titles = [found['title'] for found in strip_of(TOKENS).tokens()]

  assert titles[0] == (
    '“<b>”: student 0.625, teacher 0.125. The teacher also prefers it. '
    'KL 0.010 nats.'
  )
  assert titles[2] == (
    '“é↵”: student 0.625, teacher 0.125. The teacher prefers “"&”: 0.750. '
    'KL 0.700 nats.'
  )
  assert 'The teacher prefers the end: 0.750' in titles[3]
  assert titles[4].startswith('the end: student')


def test_tokens_joined_are_the_output():
  texts = [text for tag, text in strip_of(TOKENS).texts if tag == 'span']
  *shown, said = texts

  # What adds no text is marked: a part of a letter, the end.
  assert shown == ['<b>', '·', 'é↵\n', '"&', '∎']
  assert said.startswith('mean 1.90 nats')


def test_the_worst_token_is_said_in_words():
  (*_, said) = [text for _, text in strip_of(TOKENS[:4]).texts]

  assert said == (
    'mean 0.63 nats; most at “"&” (1.50), for which the teacher prefers the end'
  )


def test_the_same_example_is_shown_of_every_run_or_not_at_all(tree):
  names = [text for tag, text in tree.texts if tag == 'dt']

  first = names[: names.index('input', 1)]
  assert first == ['input', 'reference', 'teacher', f'SFT {NASTY}']
  # The second run has it in another place: it is another example there.
  assert 'ImitKD' not in names


def test_runs_are_side_by_side():
  of_two = [
    (name, run_folders.samples(('x', [token('a')]), ('y', [token('b')])))
    for name in ('SFT', 'ImitKD')
  ]

  tree = Tree(page._samples(of_two))

  names = [text for tag, text in tree.texts if tag == 'dt']
  assert names == ['input', 'reference', 'teacher', 'SFT', 'ImitKD'] * 2


def test_many_examples_are_folded(tree):
  summaries = [text for tag, text in tree.texts if tag == 'summary']

  assert '5 more examples' in summaries
  assert len(tree.all('article')) == 10


def test_too_many_tokens_are_left_in_their_files():
  long = [token('a')] * (page._MAX_TOKENS // 2)
  of_one = [('SFT', run_folders.samples(*[(f'x{i}', long) for i in range(5)]))]

  code = page._samples(of_one)

  assert code.count('<article>') == 2
  assert 'samples_*.json has 3 more examples.' in code


def test_a_long_input_is_folded_and_whole():
  text = f'example & {"word " * 300}<question>?'

  tree = Tree(page._text(text))

  assert tree.tags[0][0] == 'details'
  assert tree.texts[-1][1] == text
  assert len(tree.texts[0][1]) < len(text) / 2
  assert tree.texts[0][1].startswith('example &')
  assert tree.texts[0][1].endswith('<question>?')
  assert Tree(page._text('short')).all('details') == []


# --- In a browser -------------------------------------------------------------

in_a_browser = pytest.mark.slow  # a browser takes seconds to start

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


@pytest.fixture(scope='module')
def browser():
  """Runs a headless browser; returns its stdout."""
  found = next(filter(None, map(shutil.which, BROWSERS)), None)
  if found is None:
    pytest.skip(f'no browser on PATH: looked for {", ".join(BROWSERS)}')

  def run(*arguments):
    done = subprocess.run(
      [found, '--headless', '--no-sandbox', '--disable-gpu', *arguments],
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  return run


# What a browser makes of the page, told by a script that the test adds. It
# cannot be seen in the code alone: colours, widths, what a click shows.
PROBE = """
<pre id="probe"></pre>
<script>
const style = (e, p) => getComputedStyle(e, p);
const token = document.querySelector('article .k5');
const plain = document.querySelector('article .k0');
token.focus();
document.getElementById('probe').textContent = JSON.stringify({
  focused: token.matches(':focus'),
  shown: style(token, '::after').content,
  place: style(token, '::after').position,
  hot: style(token).backgroundColor,
  cold: style(plain).backgroundColor,
  line: style(token).borderBottomColor,
  ground: style(document.body).backgroundColor,
  ink: style(document.body).color,
  overflow: document.documentElement.scrollWidth - innerWidth,
  svg: document.querySelector('svg').getBoundingClientRect().height,
  svgText: style(document.querySelector('svg text')).fill,
  strip: document.querySelector('.strip').textContent,
  scripts: document.scripts.length,
});
</script>
</body>"""


def probe(browser, code, tmp_path, *flags):
  path = tmp_path / 'page.html'
  path.write_text(code.replace('</body>', PROBE))
  dom = browser(*flags, '--dump-dom', f'file://{path}')
  (found,) = re.findall(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
  return json.loads(html.unescape(found))


def luminance(color):
  """Relative luminance of WCAG, of 'rgb(r, g, b)'."""
  channels = [float(x) / 255 for x in re.findall(r'[\d.]+', color)[:3]]
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    for c in channels
  ]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
  low, high = sorted((luminance(one), luminance(other)))
  return (high + 0.05) / (low + 0.05)


def over(color, ground):
  """Returns the color of 'rgba(r, g, b, a)' on an opaque background."""
  *rgb, alpha = [float(x) for x in re.findall(r'[\d.]+', color)]
  below = [float(x) for x in re.findall(r'[\d.]+', ground)[:3]]
  mixed = [a * alpha + b * (1 - alpha) for a, b in zip(rgb, below, strict=True)]
  return f'rgb({mixed[0]}, {mixed[1]}, {mixed[2]})'


LIGHT, DARK = (f'--blink-settings=preferredColorScheme={i}' for i in (1, 0))


@in_a_browser
@pytest.mark.parametrize('scheme', [LIGHT, DARK], ids=['light', 'dark'])
def test_a_browser_shows_it_legibly(browser, full, tmp_path, scheme):
  seen = probe(browser, full, tmp_path, scheme, '--window-size=1280,900')

  assert (luminance(seen['ground']) > 0.5) == (scheme == LIGHT)
  # WCAG AA: 4.5 for text. On the darkest of the tokens' colours, too.
  assert contrast(seen['ink'], seen['ground']) > 7.0
  assert contrast(seen['ink'], over(seen['hot'], seen['ground'])) > 4.5
  assert seen['svgText'] == seen['ink']
  assert seen['svg'] > 100
  # The colours of tokens differ, and the underline is there.
  assert seen['hot'] != seen['cold']
  assert seen['line'] == seen['ink']
  assert seen['scripts'] == 1  # the probe alone: no text became a script


@in_a_browser
def test_a_click_on_a_token_shows_what_it_says(browser, full, tmp_path):
  # A browser may not have given its window the focus yet when the page is done.
  for _ in range(5):
    seen = probe(browser, full, tmp_path)
    if seen['focused']:
      break

  assert seen['focused']
  assert seen['place'] == 'fixed'
  assert 'the end: student 0.625' in seen['shown']
  assert '“ <i>”' in seen['shown']
  assert seen['strip'] == '<b>·é↵\n"&∎'


@in_a_browser
def test_on_a_phone_the_page_does_not_scroll_sideways(browser, full, tmp_path):
  (tmp_path / 'inner.html').write_text(full)
  frame = (
    '<iframe id="f" src="inner.html" style="width:360px;height:900px;border:0">'
    '</iframe><pre id="probe"></pre><script>f.onload = () => {'
    'const d = f.contentDocument.documentElement;'
    'probe.textContent = d.scrollWidth + " " + d.clientWidth;}</script>'
  )
  (tmp_path / 'frame.html').write_text(f'<!DOCTYPE html><body>{frame}</body>')

  dom = browser(
    '--allow-file-access-from-files',
    '--virtual-time-budget=5000',
    '--dump-dom',
    f'file://{tmp_path}/frame.html',
  )

  (found,) = re.findall(r'<pre id="probe">(\d+) (\d+)</pre>', dom)
  assert found[0] == found[1]  # what it needs, what there is
  assert 300 < int(found[0]) <= 360


@in_a_browser
def test_it_prints(browser, full, tmp_path):
  (tmp_path / 'page.html').write_text(full)

  browser(f'--print-to-pdf={tmp_path}/page.pdf', f'file://{tmp_path}/page.html')

  assert (tmp_path / 'page.pdf').read_bytes().startswith(b'%PDF')
