# SPDX-License-Identifier: Apache-2.0
"""The policies of the field in the step: what each adds to it.

What holds for every method is in method_fragments_test.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from gkd_jax.distill import divergences, policies
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.methods import Method
from gkd_jax.distill.objectives import Objective
from tests import tiny

pytestmark = pytest.mark.slow  # compiles models

CHUNK_TOKENS = 16
STUDENT, STUDENT_PARAMS = tiny.model_and_params(0, '1.1')
TEACHER, TEACHER_PARAMS = tiny.model_and_params(1, '1.0', emb_dim=12)
BATCH = tiny.batch(0, (7, 3, 5, 6) * 2, (5, 2, 6, 4) * 2)
B = BATCH.decoder_target_tokens.shape[0]
OPTIMIZER = optax.sgd(0.1)


def make_step(policy, student=STUDENT, num_microbatches=1):
  """Returns a step and its method."""
  method = Method(
    policy=policy,
    objective=Objective(divergences.by_author(), chunk_tokens=CHUNK_TOKENS),
  )
  step = step_lib.make_train_step(
    student=student,
    teacher=TEACHER,
    method=method,
    optimizer=OPTIMIZER,
    ids=tiny.IDS,
    seed=3,
    num_microbatches=num_microbatches,
  )
  return step, method


class Counting:
  """A model that records the number of rows of each call of the encoder."""

  def __init__(self, model):
    self._model, self.encoded = model, []

  def __getattr__(self, name):
    return getattr(self._model, name)

  def apply(self, variables, *args, method, **kwargs):
    if method == 'encode':
      self.encoded.append(args[0].shape[0])
    return self._model.apply(variables, *args, method=method, **kwargs)


@pytest.mark.parametrize('num_microbatches', [1, 2])
def test_a_pair_of_outputs_encodes_its_input_once(num_microbatches):
  student = Counting(STUDENT)
  step, method = make_step(
    policies.paired(policies.dataset), student, num_microbatches
  )
  state = state_lib.init_state(STUDENT_PARAMS, OPTIMIZER, method)

  _, metrics = jax.eval_shape(
    step, state, state_lib.Frozen(TEACHER_PARAMS), BATCH
  )

  # In microbatches once for sampling, and in each part of the loss, which is
  # traced twice: for its shapes and for its values.
  want = {1: [B], 2: [B, B // 2, B // 2]}
  assert student.encoded == want[num_microbatches]
  assert metrics['on_policy'].shape == ()


def test_two_outputs_are_compared_on_the_input_that_they_belong_to():
  def twice():
    """The dataset's outputs, each of them two times."""
    policy = policies.paired(policies.dataset)

    def write(draw):
      written = policies.dataset().write(draw)
      return jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), written)

    return dataclasses.replace(policy, write=write)

  def metrics(policy):
    step, method = make_step(policy)
    state = state_lib.init_state(STUDENT_PARAMS, OPTIMIZER, method)
    _, of_step = jax.jit(step)(state, state_lib.Frozen(TEACHER_PARAMS), BATCH)
    return of_step

  got, want = metrics(twice()), metrics(policies.dataset())

  for name in ('loss', 'divergence', 'nll', 'grad_norm', 'truncated'):
    # float32 sums in another order.
    assert got[name] == pytest.approx(float(want[name]), rel=1e-5), name
  assert got['target_tokens'] == 2 * want['target_tokens']


def test_an_evaluation_reaches_the_policys_state():
  policy = policies.replay(12, 0.5)
  _, method = make_step(policy)
  state = state_lib.init_state(STUDENT_PARAMS, OPTIMIZER, method, batch=BATCH)

  for loss in (1.0, 1.2):
    values = {name: loss for name in policy.reads_metrics}
    before, state = state, state_lib.after_evaluation(method, state, values)

  of_policy = state.carried.policy
  assert float(of_policy.fraction) == pytest.approx(0.6)
  assert float(of_policy.level) == pytest.approx(1.2)
  assert of_policy.fraction.dtype == jnp.float32
  assert of_policy.cursor is before.carried.policy.cursor
  assert state.params is before.params
