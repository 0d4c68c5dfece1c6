# SPDX-License-Identifier: Apache-2.0
import ast
import subprocess
import sys

import pytest

from tests import conftest

# The import rule: a module imports its own folder, and what stands to the left
# of it. WORKSPACE.md says why.
ORDER = (
  *('batch', 'parallel', 'models', 'decoding', 'distill', 'runtime', 'data'),
  *('checkpoints', 'config', 'report', 'experiment', 'build', 'sweeps'),
  *('evaluation', 'train', 'capacity', 'interop', 'main'),
)
# Within report/: each may import those before it.
REPORT = (
  *('tables', 'runs', 'plots', 'sections', 'findings', 'results'),
  *('figures', 'page', 'report'),
)

PACKAGE = conftest.ROOT / 'gkd_jax'
FILES = sorted(PACKAGE.rglob('*.py'))


def place_of(path):
  """'batch' for gkd_jax/batch.py, 'data' for gkd_jax/data/tasks/x.py."""
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imported(path) -> set[str]:
  """Full names of what a file imports, also inside its functions."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: a relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def who_imports(package):
  return {
    str(path.relative_to(PACKAGE).with_suffix('')).removesuffix('/__init__')
    for path in FILES
    if any(f'{name}.'.startswith(f'{package}.') for name in imported(path))
  }


def test_every_module_has_a_place_in_the_order():
  assert {place_of(path) for path in FILES} <= {*ORDER, '__init__'}


def test_imports_run_to_the_left_only():
  wrong = [
    f'{path.relative_to(PACKAGE)} imports {name}'
    for path in FILES
    for name in imported(path)
    if name.startswith('gkd_jax.')
    and ORDER.index(name.split('.')[1]) > ORDER.index(place_of(path))
  ]

  assert wrong == []


def test_decoding_and_methods_know_models_by_their_protocol_alone():
  wrong = [
    f'{path.relative_to(PACKAGE)} imports {name}'
    for path in FILES
    for name in imported(path)
    if place_of(path) in ('decoding', 'distill')
    and name.startswith('gkd_jax.models')
    and not name.startswith('gkd_jax.models.interface')
  ]

  assert wrong == []


def test_a_family_of_models_is_known_to_the_registry_alone():
  assert who_imports('gkd_jax.models.t5') == {'models/registry'}


def test_modules_of_a_folder_do_not_import_each_other_in_a_circle():
  module = {
    '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts): path
    for path in FILES
  }
  needs = {
    name: {
      other
      for what in imported(path)
      for other in (what, what.rpartition('.')[0])
      if other in module and other != name
    }
    for name, path in module.items()
  }
  while free := [name for name, others in needs.items() if not others]:
    needs = {
      name: others - {*free}
      for name, others in needs.items()
      if name not in free
    }

  assert needs == {}


def test_imports_within_the_report_run_in_its_order():
  files = {path.stem: path for path in (PACKAGE / 'report').glob('[!_]*.py')}

  assert files.keys() == {*REPORT}
  for i, importer in enumerate(REPORT):
    for name in imported(files[importer]):
      if name.startswith('gkd_jax.report.'):
        assert name.split('.')[2] in REPORT[:i], f'{importer} imports {name}'


def test_gin_is_imported_in_config_and_main_alone():
  assert {name.split('/')[0] for name in who_imports('gin')} <= {
    'config',
    'main',
  }


def test_tensorflow_and_seqio_are_imported_in_data_and_the_bridge_alone():
  users = who_imports('tensorflow') | who_imports('seqio')

  assert {name.split('/')[0] for name in users} == {'data'}


def test_the_gin_folder_holds_no_python():
  # A gin/__init__.py would hide the package gin from whoever runs here.
  assert list((conftest.ROOT / 'gin').rglob('*.gin'))
  assert list((conftest.ROOT / 'gin').rglob('*.py')) == []


@pytest.fixture(scope='module')
def loaded():
  """Names of all modules that are there once all of ours is imported.

  Except the tasks, the bridge, which needs T5X, and what parses gin files.
  """
  ours = [
    '.'.join(path.relative_to(conftest.ROOT).with_suffix('').parts)
    for path in FILES
    if path.stem not in ('__init__', 't5x_bridge', 'main')
    and path.parent.name not in ('tasks', 'config')
  ]
  code = '\n'.join(
    ['import sys', *(f'import {name}' for name in ours), 'print(*sys.modules)']
  )
  return subprocess.run(
    [sys.executable, '-c', code],
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()


@pytest.mark.parametrize(
  'package',
  [
    'tensorflow',
    'seqio',
    'tensorflow_datasets',
    'gin',
    'matplotlib',
    'sacrebleu',
  ],
)
def test_importing_the_package_does_not_load(package, loaded):
  assert 'gkd_jax.train' in loaded and 'jax' in loaded
  assert package not in loaded
