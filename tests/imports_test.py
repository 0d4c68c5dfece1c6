# SPDX-License-Identifier: Apache-2.0
import ast
import subprocess
import sys

import pytest

from tests import conftest

# Who may import whom: a module the ones of the layers before its own, and of
# its own layer those in SAME_LAYER. WORKSPACE.md says why.
LAYERS = (
  {
    'batch',
    'divergences',
    'diversity',
    'partitioning',
    'calculator',
    'collectives',
    'hosts',
    'settings',
  },
  {'layers', 'sampler', 'beam_search', 'objectives'},
  {'model', 'policies', 'rewards'},
  {
    'step',
    'checkpoint',
    'metrics',
    'interruption',
    'interop',
    'json_lines',
    'costs',
  },
  {'pretrained', 'predictions', 'jobs', 'vocabularies', 'report', 'roofline'},
  {'seqio_tasks', 'data', 'programs', 'evaluate', 'infer', 'tasks'},
  {'train', 'precompile', 'compare', 'sweep', 'export', 't5x_bridge'},
  {'main'},
)
SAME_LAYER = {
  ('divergences', 'batch'),
  ('calculator', 'batch'),
  ('beam_search', 'sampler'),
  ('checkpoint', 'step'),
  ('checkpoint', 'metrics'),
  ('interruption', 'metrics'),
  ('interop', 'interop'),
  ('interop', 'checkpoint'),
  ('report', 'report'),
  ('tasks', 'tasks'),
  ('data', 'seqio_tasks'),
  ('programs', 'data'),
  ('evaluate', 'data'),
  ('evaluate', 'programs'),
  ('infer', 'data'),
  ('infer', 'programs'),
  ('precompile', 'train'),
}
# Within report/: each may import those before it.
REPORT = ('tables', 'runs', 'plots', 'sections', 'figures', 'page', 'report')
LAYER_OF = {name: i for i, layer in enumerate(LAYERS) for name in layer}

PACKAGE = conftest.ROOT / 'gkd_jax'
FILES = sorted(PACKAGE.rglob('*.py'))


def module_of(path):
  """'sampler' for gkd_jax/sampler.py, 'tasks' for gkd_jax/tasks/x.py."""
  if path.stem == 't5x_bridge':  # it stands above all that T5X's trainer uses
    return path.stem
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
    module_of(path)
    for path in FILES
    if any(f'{name}.'.startswith(f'{package}.') for name in imported(path))
  }


def test_every_module_has_a_layer():
  assert {module_of(path) for path in FILES} == {*LAYER_OF, '__init__'}


def test_imports_run_downwards_only():
  upwards = []
  for path in FILES:
    importer = module_of(path)
    for name in imported(path):
      if not name.startswith('gkd_jax.'):
        continue
      what = name.split('.')[1]
      allowed = (
        LAYER_OF[what] < LAYER_OF[importer] or (importer, what) in SAME_LAYER
      )
      if not allowed:
        upwards.append(f'{importer} imports {what}')

  assert upwards == []


def test_the_exceptions_within_a_layer_are_all_needed():
  used = {
    (module_of(path), name.split('.')[1])
    for path in FILES
    for name in imported(path)
    if name.startswith('gkd_jax.')
  }

  assert used >= SAME_LAYER


def test_imports_within_the_report_run_in_its_order():
  files = {path.stem: path for path in (PACKAGE / 'report').glob('[!_]*.py')}

  assert files.keys() == {*REPORT}
  for i, importer in enumerate(REPORT):
    for name in imported(files[importer]):
      if name.startswith('gkd_jax.report.'):
        assert name.split('.')[2] in REPORT[:i], f'{importer} imports {name}'


def test_gin_is_imported_in_main_alone():
  assert who_imports('gin') == {'main'}


def test_tensorflow_is_imported_where_data_are_read_alone():
  assert who_imports('tensorflow') == {'data', 'seqio_tasks', 'tasks'}


def test_seqio_is_imported_there_for_vocabularies_and_for_a_flag_of_main():
  assert who_imports('seqio') == {
    *('data', 'seqio_tasks', 'tasks'),
    'vocabularies',
    'main',
  }


def test_the_gin_folder_holds_no_python():
  # A gin/__init__.py would hide the package gin from whoever runs here.
  assert list((conftest.ROOT / 'gin').rglob('*.gin'))
  assert list((conftest.ROOT / 'gin').rglob('*.py')) == []


@pytest.fixture(scope='module')
def loaded():
  """Names of all modules that are there once all of ours is imported.

  Less the tasks, and the bridge, which is for whoever has T5X.
  """
  ours = [
    '.'.join(path.relative_to(conftest.ROOT).with_suffix('').parts)
    for path in FILES
    if module_of(path) not in ('__init__', 'tasks', 't5x_bridge')
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
