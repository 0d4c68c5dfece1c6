# SPDX-License-Identifier: Apache-2.0
"""The Python interface: `import gkd_jax` and its names."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import gkd_jax
from tests import conftest, tiny

FIXTURES = conftest.ROOT / 'tests/checkpoints/formats/huggingface_fixtures'
README = conftest.ROOT / 'README.md'


def python_of_readme():
  """The lines under "Use from Python"."""
  section = README.read_text(encoding='utf-8').split('## Use from Python\n')[1]
  return re.search(r'```python\n(.*?)```', section, re.DOTALL)[1]


def run(code, folder=conftest.ROOT):
  """Runs Python in a process of its own; returns what it printed."""
  return subprocess.run(
    [sys.executable, '-c', code],
    cwd=folder,
    env=os.environ | {'PYTHONPATH': str(conftest.ROOT)},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  ).stdout


def test_importing_the_package_imports_nothing_else():
  imported = run(
    'import importlib, sys\n'
    'before = {*sys.modules}\n'
    'import gkd_jax\n'
    'print(*({*sys.modules} - before))'
  )

  assert imported.split() == ['gkd_jax']


@pytest.mark.parametrize('name', gkd_jax.__all__)
def test_every_name_is_there(name):
  assert name in dir(gkd_jax)
  assert getattr(gkd_jax, name) is getattr(gkd_jax, name)


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'divergence'"):
    _ = gkd_jax.divergence


@pytest.mark.slow
def test_the_step_of_the_readme_runs_without_tensorflow(tmp_path):
  shutil.copytree(FIXTURES / 't5_1_1', tmp_path / 'student')
  shutil.copytree(FIXTURES / 'byt5', tmp_path / 'teacher')

  printed = run(
    f'{python_of_readme()}\nimport sys\n'
    "print('loaded:', *{'tensorflow', 'seqio', 'gin'} & {*sys.modules})",
    tmp_path,
  )

  losses = [float(x) for x in re.findall(r'step \d: loss (\S+)', printed)]
  assert len(losses) == 3
  assert min(losses) > 0.0
  assert losses[0] != losses[1]
  assert printed.endswith('loaded:\n')


@pytest.mark.slow
def test_generated_outputs_are_those_of_evaluation():
  model, params = gkd_jax.load_model(FIXTURES / 'madlad')
  want = np.load(FIXTURES / 'madlad/expected.npz')

  greedy = gkd_jax.generate(
    model,
    params,
    want['inputs'],
    gkd_jax.SamplerConfig(temperature=0.0),
    max_decode_len=12,
  )

  np.testing.assert_array_equal(greedy.tokens, want['greedy'])


def test_a_beam_gives_its_hypotheses_best_first():
  model, params = tiny.model_and_params(0)
  inputs = tiny.tokens(1, [5, 3], 5)

  beams = gkd_jax.generate(
    model, params, inputs, gkd_jax.BeamConfig(num_beams=3), max_decode_len=4
  )

  assert beams.tokens.shape == (2, 3, 4)
  assert (np.diff(beams.scores, axis=1) <= 0.0).all()


def test_sampling_needs_a_key():
  model, params = tiny.model_and_params(0)

  with pytest.raises(ValueError, match='needs rng'):
    gkd_jax.generate(
      model,
      params,
      tiny.tokens(1, [5], 5),
      gkd_jax.SamplerConfig(),
      max_decode_len=4,
    )
