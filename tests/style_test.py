# SPDX-License-Identifier: Apache-2.0
"""Limits that keep the package and its configurations readable."""

import ast
import re

import pytest

from tests import conftest

PACKAGE = conftest.ROOT / 'gkd_jax'
MAX_LINES, MAX_PARAMETERS = 110, 12

CONFIGS = sorted((conftest.ROOT / 'configs').rglob('*.gin'))
MAX_CONFIGS, MAX_FILES, MAX_LEVELS = 66, 5, 2
INCLUDE = re.compile(r"^include '(.+)'", re.MULTILINE)


def functions():
  for path in sorted(PACKAGE.rglob('*.py')):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield f'{path.relative_to(PACKAGE)}: {node.name}', node


def test_no_function_is_too_long():
  too_long = {
    name: lines
    for name, node in functions()
    if (lines := node.end_lineno - node.lineno + 1) > MAX_LINES
  }

  assert too_long == {}


def test_no_function_has_too_many_parameters():
  too_many = {
    name: number
    for name, node in functions()
    if (
      number := sum(
        argument.arg not in ('self', 'cls')
        for argument in (
          *node.args.posonlyargs,
          *node.args.args,
          *node.args.kwonlyargs,
        )
      )
    )
    > MAX_PARAMETERS
  }

  assert too_many == {}


def is_text_in_the_locales_encoding(call: ast.Call) -> bool:
  """Whether a call opens, reads or writes a text without `encoding`."""
  keywords = {keyword.arg: keyword.value for keyword in call.keywords}
  function = ast.unparse(call.func)
  name = function.rpartition('.')[2]
  if 'encoding' in keywords or function in ('os.open', 'ts.open'):
    return False
  if name != 'open':
    return name in ('read_text', 'write_text') or 'text' in keywords
  modes = call.args[1:2] if function == 'open' else call.args[:1]
  modes += [keywords['mode']] if 'mode' in keywords else []
  return not any('b' in ast.unparse(mode) for mode in modes)


def test_texts_are_utf_8_whatever_the_locale():
  files = [*PACKAGE.rglob('*.py'), *(conftest.ROOT / 'scripts').glob('*.py')]
  wrong = [
    f'{path.relative_to(conftest.ROOT)}:{node.lineno}'
    for path in files
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
    if isinstance(node, ast.Call) and is_text_in_the_locales_encoding(node)
  ]

  assert wrong == []


@pytest.mark.parametrize(
  'code, is_wrong',
  [
    ('path.read_text()', True),
    ("path.write_text(x, encoding='utf-8')", False),
    ('open(x)', True),
    ("open(x, 'ab')", False),
    ("path.open('rb')", False),
    ("path.open(mode='a')", True),
    ('subprocess.run(x, text=True)', True),
    ('os.open(x, 0)', False),
  ],
)
def test_a_text_in_the_locales_encoding_is_found(code, is_wrong):
  (statement,) = ast.parse(code).body

  assert is_text_in_the_locales_encoding(statement.value) == is_wrong


def includes(path, level=1):
  """Yields (file, level) of all that a gin file includes, directly or not."""
  for name in INCLUDE.findall(path.read_text()):
    yield name, level
    yield from includes(conftest.ROOT / name, level + 1)


def test_the_base_of_training_is_read_at_a_glance():
  lines = (conftest.ROOT / 'gin/runs/train.gin').read_text().splitlines()

  assert len(lines) <= 60


def test_there_are_not_too_many_configs():
  assert len(CONFIGS) <= MAX_CONFIGS


@pytest.mark.parametrize(
  'path', CONFIGS, ids=lambda path: str(path.relative_to(conftest.ROOT))
)
def test_a_config_includes_few_files_in_few_levels(path):
  included = list(includes(path))

  assert len({name for name, _ in included}) <= MAX_FILES
  assert max((level for _, level in included), default=0) <= MAX_LEVELS
