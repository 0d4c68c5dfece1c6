# SPDX-License-Identifier: Apache-2.0
"""Links, paths, macros and settings in pages and in comments of gin files."""

import ast
import re

from tests import conftest

ROOT = conftest.ROOT
PAGES = [
  ROOT / 'README.md',
  ROOT / 'WORKSPACE.md',
  *sorted((ROOT / 'docs').glob('*.md')),
]
GIN_FILES = sorted(
  path
  for folder in ('gin', 'configs')
  for path in (ROOT / folder).rglob('*.gin')
)
MACROS = {
  name
  for path in GIN_FILES
  for name in re.findall(r'^([A-Z]\w+) = ', path.read_text(), re.MULTILINE)
}
MODULES = {path.stem: path for path in (ROOT / 'gkd_jax').rglob('*.py')}

LINK = re.compile(r'\]\(([^)\s]+)\)')
# Files and folders of the repository; not those with <name> or * in them.
PATH = re.compile(
  r'(?<![\w/.-])((?:gin|configs|scripts|docs|tests|gkd_jax)/[\w./-]*\w/?)(?![\w<*])'
)
MACRO = re.compile(
  r'--gin\.([A-Z]\w+)=(?!VALUE)|`([A-Z][A-Z0-9]*_[A-Z0-9_]+)(?:=[^`]*)?`'
)
SETTING = re.compile(r'(?:--gin\.|`)([a-z]\w*)\.([A-Z]\w+)\.([a-z]\w+)')


def relative(path):
  return str(path.relative_to(ROOT))


def comments(path) -> str:
  """The prose of a file: a page, or the comments of a gin file."""
  text = path.read_text(encoding='utf-8')
  if path.suffix == '.gin':
    return '\n'.join(re.findall('#(.*)', text))
  return text


def anchor(heading: str) -> str:
  return re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')


def anchors(page) -> set[str]:
  text = page.read_text(encoding='utf-8')
  return {anchor(h) for h in re.findall('^#+ (.+)$', text, re.MULTILINE)}


def is_setting(module: str, owner: str, name: str) -> bool:
  """Whether gkd_jax's `module.owner` has a field or an argument `name`."""
  if module not in MODULES:
    return False
  for node in ast.parse(MODULES[module].read_text()).body:
    if isinstance(node, ast.ClassDef) and node.name == owner:
      return any(
        isinstance(field, ast.AnnAssign) and field.target.id == name
        for field in node.body
      )
  return False


def not_found(files, find) -> dict[str, set]:
  """Returns {file: what `find` returns for it}, where it returns something."""
  found = {relative(file): find(file) for file in files}
  return {file: names for file, names in found.items() if names}


def test_links_lead_to_files_and_headings():
  def broken(page):
    return {
      target
      for target in LINK.findall(comments(page))
      if not target.startswith('https://') and not is_there(page, target)
    }

  def is_there(page, target):
    file, _, heading = target.partition('#')
    linked = page.parent / file if file else page
    return linked.exists() and (not heading or heading in anchors(linked))

  assert not_found(PAGES, broken) == {}


def test_paths_exist():
  def missing(file):
    return {p for p in PATH.findall(comments(file)) if not (ROOT / p).exists()}

  assert not_found(PAGES + GIN_FILES, missing) == {}


def test_macros_are_defined():
  def undefined(file):
    names = {a or b for a, b in MACRO.findall(comments(file))}
    return {name for name in names - MACROS if not name.startswith('JAX_')}

  assert not_found(PAGES + GIN_FILES, undefined) == {}


def test_settings_are_fields():
  def unknown(file):
    return {s for s in SETTING.findall(comments(file)) if not is_setting(*s)}

  assert not_found(PAGES + GIN_FILES, unknown) == {}
