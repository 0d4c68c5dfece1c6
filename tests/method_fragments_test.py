# SPDX-License-Identifier: Apache-2.0
"""Every method of gin/methods/ resolves, and its step trains tiny models."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkd_jax import experiment as experiment_lib
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill import teachers
from gkd_jax.distill.state import Frozen
from tests import conftest, tiny

pytestmark = pytest.mark.slow  # compiles models

FRAGMENTS = sorted((conftest.ROOT / 'gin/methods').glob('*.gin'))
# What a fragment leaves to the experiment; values are gin's.
MISSING = {
  'gkd': {'STUDENT_DATA_FRACTION': 0.5, 'DIVERGENCE': '@divergences.todi'},
  'on_policy_gkd': {'DIVERGENCE': '@divergences.forward_kl'},
  'rl_gkd': {
    'ALPHA': 0.5,
    'DIVERGENCE': '@divergences.reverse_kl',
    'REWARD': '@rewards.rouge_l()',
  },
  'rlef': {'INITIAL_CHECKPOINT_PATH': 'x'},
  'multi_teacher': {'TEACHER_CHECKPOINT_PATH': {'a': 'x', 'b': 'y'}},
  'mopd': {'TEACHER_CHECKPOINT_PATH': {'a': 'x', 'b': 'y'}},
  'aligndistil': {'TEACHER_CHECKPOINT_PATH': {'dpo': 'x', 'reverse_dpo': 'y'}},
  'seqkd': {'TRAIN_ON_PREDICTIONS': 'x'},
}
OPTIMIZER = optax.adam(1e-3)


@pytest.fixture
def method_of(run_main, monkeypatch):
  """Returns the Method of a fragment, as a run would get it."""
  experiments = []

  def train(experiment, run):
    experiment_lib.check(experiment)
    assert run.config_text()  # every override is read
    experiments.append(experiment)

  monkeypatch.setattr('gkd_jax.train.train', train)

  def method_of(name):
    base = 'arithmetic_cot/rl_gkd' if name == 'rlef' else 'cmudict_g2p/gkd'
    settings = {
      'MODEL_DIR': 'x',
      'TEACHER_CHECKPOINT_PATH': 'x',
      'INITIAL_CHECKPOINT_PATH': None,
      **MISSING.get(name, {}),
    }
    finished = run_main(
      f'--gin_file=configs/{base}.gin',
      f'--gin_file=gin/methods/{name}.gin',
      *conftest.gin_flags(**settings),
    )
    assert finished.code == 0, finished.err
    return experiments[-1].method

  return method_of


def teachers_of(method):
  """Returns the model and parameters of a method's checkpoint, or several."""
  made = {
    name: tiny.model_and_params(1 + i, '1.0', emb_dim=12 + 4 * i)
    for i, name in enumerate(teachers.checkpoint_names(method.teacher))
  }
  if len(made) < 2:
    return made.get(None, (None, None))
  models, params = zip(*made.values(), strict=True)
  return dict(zip(made, models, strict=True)), dict(
    zip(made, params, strict=True)
  )


@pytest.mark.parametrize('name', [path.stem for path in FRAGMENTS])
def test_a_method_trains_tiny_models_in_one_program(method_of, name):
  method = method_of(name)
  if method.reward is not None:
    pytest.skip('the reward needs a vocabulary; see train_test')
  # Chunks of 2 positions of each row.
  objective = dataclasses.replace(method.objective, chunk_tokens=8)
  method = dataclasses.replace(method, objective=objective)
  student, params = tiny.model_and_params(0)
  teacher, teacher_params = teachers_of(method)
  batch = tiny.batch()
  if method.is_routed:
    batch = batch._replace(teacher_ids=jnp.int32([0, 1, 1, 0]))
  step = jax.jit(
    step_lib.make_train_step(
      student=student,
      teacher=teacher,
      method=method,
      optimizer=OPTIMIZER,
      ids=tiny.IDS,
      seed=0,
    ),
    donate_argnums=0,
  )
  state = state_lib.init_state(params, OPTIMIZER, method, batch=batch)

  program = step.lower(state, Frozen(teacher_params), batch)
  history = []
  for _ in range(10):
    state, metrics = step(state, Frozen(teacher_params), batch)
    history.append({name: float(value) for name, value in metrics.items()})

  assert step._cache_size() == 1
  assert int(state.step) == 10
  assert all(np.isfinite(m['loss']) for m in history)
  assert min(m['grad_norm'] for m in history) > 0.0
  text = program.as_text()
  assert 'callback' not in text  # nothing goes back to the host
  rows, length = batch.decoder_target_tokens.shape
  assert not re.search(rf'<{rows}x{length}x{tiny.VOCAB_SIZE}xf32>', text)
