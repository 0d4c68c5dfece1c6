# SPDX-License-Identifier: Apache-2.0
"""Limits that keep the package and its configurations readable."""

import ast
import re

import pytest

from tests import conftest

PACKAGE = conftest.ROOT / 'gkd_jax'
MAX_LINES, MAX_PARAMETERS = 110, 12

CONFIGS = sorted((conftest.ROOT / 'configs').rglob('*.gin'))
MAX_CONFIGS, MAX_FILES, MAX_LEVELS = 60, 5, 2
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
