# SPDX-License-Identifier: Apache-2.0
"""The policies of the field, and several teachers, in the compiled step.

What holds for each: the same outputs and gradients on one device and on
a mesh in microbatches, one compilation, nothing to the host, and no [B, T, V].
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkd_jax.batch import Batch
from gkd_jax.distill import divergences, policies, teachers
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.methods import Method
from gkd_jax.distill.objectives import Objective
from gkd_jax.models.params import abstract_params
from gkd_jax.models.t5 import T5
from gkd_jax.parallel import partitioning
from tests import tiny

pytestmark = pytest.mark.slow  # compiles models

NUM_STEPS = 4
CHUNK_TOKENS = 16
STUDENT, STUDENT_PARAMS = tiny.model_and_params(0, '1.1')
TEACHER, TEACHER_PARAMS = tiny.model_and_params(1, '1.0', emb_dim=12)
BATCH = tiny.batch(0, (7, 3, 5, 6) * 2, (5, 2, 6, 4) * 2)
B, T = BATCH.decoder_target_tokens.shape
OPTIMIZER = optax.sgd(0.1)

POLICIES = {
  'interleaved': functools.partial(policies.interleaved, 3),
  'corrected': policies.corrected,
  'paired': policies.paired,
  # Two steps fill the buffer; of the others about half replay.
  'replay': functools.partial(policies.replay, 12, 0.9, lambda step: 0.3),
  # Mixed tokens, and lambda over time.
  'mixture': functools.partial(
    policies.mixture,
    lambda step: step / NUM_STEPS,
    'sequence',
    functools.partial(policies.mixed_tokens, 0.5),
  ),
  # Several teachers, with other weights each; see `METHOD_TEACHERS`.
  'routed teachers': policies.student,
}
NAMES = {'a': None, 'b': None}
METHOD_TEACHERS = {'routed teachers': teachers.routed(NAMES)}


def make_step(
  policy,
  student=STUDENT,
  num_microbatches=1,
  teacher=TEACHER,
  several=None,
):
  """Returns a step and its method."""
  method = Method(
    policy=policy,
    teacher=several or teachers.checkpoint(),
    objective=Objective(divergences.by_author(), chunk_tokens=CHUNK_TOKENS),
  )
  step = step_lib.make_train_step(
    student=student,
    teacher=teacher,
    method=method,
    optimizer=OPTIMIZER,
    ids=tiny.IDS,
    seed=3,
    num_microbatches=num_microbatches,
  )
  return step, method


def run(name, mesh_shape, num_microbatches):
  """Trains on a mesh.

  Returns:
    [(carried state, metrics)] of the steps, the last parameters, and of the
    program its text and the number of loops outside branches.
  """
  mesh = partitioning.make_mesh(
    *mesh_shape, jax.devices()[: math.prod(mesh_shape)]
  )
  placement = partitioning.Placement(mesh)
  student = T5(STUDENT.config, placement)
  teacher, params = T5(TEACHER.config, placement), TEACHER_PARAMS
  batch, several = BATCH, METHOD_TEACHERS.get(name)
  if several is not None:
    teacher = {'a': teacher, 'b': student}
    params = {'a': params, 'b': tiny.params(STUDENT, 2)}
    batch = batch._replace(teacher_ids=jnp.arange(B) // 3 % 2)
  step, method = make_step(
    POLICIES[name](),
    student,
    num_microbatches,
    teacher,
    several,
  )
  abstract = state_lib.abstract_state(
    abstract_params(student), OPTIMIZER, mesh, method, batch=BATCH
  )
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
  state = state_lib.init_state(STUDENT_PARAMS, OPTIMIZER, method, batch=BATCH)
  # Donated: a copy, each time.
  state = jax.device_put(jax.tree.map(jnp.copy, state), shardings)
  frozen = state_lib.Frozen(
    jax.device_put(params, partitioning.replicated(mesh))
  )
  batch = Batch(*partitioning.put_global_batch(batch, mesh))
  traced = step.trace(state, frozen, batch)
  compiled = traced.lower().compile()  # one program for all steps
  history = []
  for _ in range(NUM_STEPS):
    state, metrics = compiled(state, frozen, batch)
    history.append(jax.device_get((state.carried, metrics)))
  program = (str(traced.jaxpr), loops_outside_branches(traced.jaxpr))
  return history, jax.device_get(state.params), program


def loops_outside_branches(jaxpr) -> int:
  """Counts the sampling loops that run in every step."""
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  number = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'cond':
      continue
    number += equation.primitive.name == 'while'
    for value in equation.params.values():
      if hasattr(getattr(value, 'jaxpr', value), 'eqns'):
        number += loops_outside_branches(value)
  return number


def on_one_and_on_eight(name):
  """Runs in a separate process, see `tiny.on_simulated_devices`."""
  return run(name, (1, 1), 1), run(name, (4, 2), 2)


@pytest.mark.parametrize('name', POLICIES)
def test_a_method_is_the_same_on_every_mesh_and_in_microbatches(name):
  one, eight = tiny.on_simulated_devices(
    8, __name__, on_one_and_on_eight.__name__, name
  )

  for (carried, metrics), (want_carried, want) in zip(
    eight[0], one[0], strict=True
  ):
    # Outputs in a buffer are the same; log-probabilities are rounded.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
      carried,
      want_carried,
    )
    for key, value in metrics.items():
      # The same sums in another order.
      np.testing.assert_allclose(value, want[key], rtol=1e-4, err_msg=key)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), eight[1], one[1]
  )
  for _, _, (program, num_loops) in (one, eight):
    # Of these, replay alone does not sample in every step.
    assert (num_loops > 0) == (name != 'replay')
    assert 'callback' not in program  # nothing goes to the host
    shapes = [
      [int(n) for n in dims.split(',')]
      for dims in re.findall(r'f32\[([\d,]+)\]', program)
    ]
    # The logits of one position or of a chunk, and the weights.
    sizes = [math.prod(s) for s in shapes if tiny.VOCAB_SIZE in s]
    assert CHUNK_TOKENS * tiny.VOCAB_SIZE <= max(sizes)
    assert max(sizes) < B * T * tiny.VOCAB_SIZE
  assert any(m['on_policy'] > 0 for _, m in one[0])
  assert {*POLICIES[name]().metrics} <= one[0][0][1].keys()


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
