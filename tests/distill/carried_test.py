# SPDX-License-Identifier: Apache-2.0
"""Methods with state: one small example of each kind, in one step.

A policy that counts, a teacher that is a moving average of the student, a
divergence with a running mean, and a head that is learnt beside the student.
"""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkd_jax.batch import Batch
from gkd_jax.checkpoints import checkpoint
from gkd_jax.distill import divergences, policies, teachers
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.credit import Credit, Worth
from gkd_jax.distill.methods import Method
from gkd_jax.distill.objectives import Objective
from gkd_jax.models.params import abstract_params
from gkd_jax.models.t5 import T5
from gkd_jax.parallel import partitioning
from tests import conftest, tiny

pytestmark = pytest.mark.slow  # compiles models

NUM_STEPS = 5
DECAY = 0.75
RATE = 0.05
STUDENT, PARAMS = tiny.model_and_params(0)
OPTIMIZER = optax.sgd(RATE)
BATCH = tiny.batch(0, (7, 3, 5, 6) * 2, (5, 2, 6, 4) * 2)


def counting() -> policies.Policy:
  """The dataset and the student write alternately; the dataset is first."""

  def write(draw):
    is_odd = draw.carried % 2 == 1
    rollouts = jax.lax.cond(
      is_odd,
      lambda: policies.student().write(draw),
      lambda: policies.dataset().write(draw),
    )
    return rollouts._replace(carried=draw.carried + 1)

  return policies.Policy(write, 0.5, init=lambda batch: jnp.int32(0))


def average() -> teachers.Teacher:
  """A moving average that starts from parameters unlike the student's."""

  def update(carried, params):
    return jax.tree.map(
      lambda a, p: DECAY * a + (1.0 - DECAY) * p, carried, params
    )

  return teachers.Teacher(
    params=lambda frozen, student, carried: carried,
    needs_checkpoint=False,
    init=lambda params: jax.tree.map(lambda x: 0.8 * x, params),
    update=update,
  )


def scaled_kl(*, teacher_logits, student_logits, author, carried, heads):
  kl = divergences.forward_kl(
    teacher_logits=teacher_logits * jnp.exp(heads['scale']),
    student_logits=student_logits,
  )
  return kl * (1.0 + carried) * jnp.where(author == policies.STUDENT, 1.0, 0.5)


SCALED_KL = divergences.Divergence(
  scaled_kl,
  reads=('author',),
  init=lambda: jnp.float32(0.0),
  update=lambda carried, means: 0.9 * carried + 0.1 * means['divergence'],
  init_heads=lambda rng: {'scale': 0.1 * jax.random.normal(rng)},
)
METHOD = Method(
  policy=counting(), objective=Objective(SCALED_KL), teacher=average()
)


def make_step(student=STUDENT, method=METHOD, num_microbatches=1):
  return step_lib.make_train_step(
    student=student,
    teacher=None,
    method=method,
    optimizer=OPTIMIZER,
    ids=tiny.IDS,
    seed=0,
    num_microbatches=num_microbatches,
  )


@functools.cache
def compiled_step(num_microbatches=1):
  return jax.jit(make_step(num_microbatches=num_microbatches))


def start(method=METHOD):
  return state_lib.init_state(PARAMS, OPTIMIZER, method, batch=BATCH)


@functools.cache
def history(num_microbatches=1):
  """[(state, metrics)] of some steps; the first has no metrics."""
  states = [(start(), None)]
  for _ in range(NUM_STEPS):
    states.append(
      compiled_step(num_microbatches)(states[-1][0], state_lib.Frozen(), BATCH)
    )
  return jax.device_get(states)


def assert_close(got, want, **tolerances):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerances), got, want
  )


def test_the_policy_counts_and_writes_by_its_count():
  counts = [int(state.carried.policy) for state, _ in history()]
  by_student = [metrics['on_policy'] for _, metrics in history()[1:]]

  assert counts == [0, 1, 2, 3, 4, 5]
  assert by_student == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_the_teacher_is_the_average_of_the_students_after_each_step():
  want = jax.tree.map(lambda x: 0.8 * np.float64(x), PARAMS)
  for state, _ in history()[1:]:
    want = jax.tree.map(
      lambda a, p: DECAY * a + (1.0 - DECAY) * np.float64(p),
      want,
      state.params,
    )

    # float32 sums of two numbers near 1.
    assert_close(state.carried.teacher, want, atol=1e-6)
    assert {x.dtype.name for x in jax.tree.leaves(state.carried.teacher)} == {
      'float32'
    }


def test_the_divergence_is_scaled_by_its_running_mean():
  want = 0.0
  for state, metrics in history()[1:]:
    want = 0.9 * want + 0.1 * float(metrics['divergence'])

    assert float(state.carried.divergence) == pytest.approx(want, rel=1e-5)
  assert want > 1e-3


def test_the_head_gets_the_gradient_of_the_loss():
  state, (_, metrics) = history()[1][0], history()[2]
  step = compiled_step()

  def loss(scale):
    moved = state._replace(heads={'scale': jnp.float32(scale)})
    return float(step(moved, state_lib.Frozen(), BATCH)[1]['loss'])

  scale = float(state.heads['scale'])
  want = (loss(scale + 1e-2) - loss(scale - 1e-2)) / 2e-2

  after = float(history()[2][0].heads['scale'])
  # float32 losses near 1 are 1e-7 off, and the curvature adds 1e-4.
  assert (scale - after) / RATE == pytest.approx(want, rel=1e-2, abs=1e-4)
  assert abs(want) > 1e-3
  assert loss(scale) == pytest.approx(float(metrics['loss']), rel=1e-6)


def test_the_heads_gradient_counts_in_the_norm():
  state, after = history()[0][0], history()[1][0]
  moved = jax.tree.map(
    lambda a, b: (a - b) / RATE,
    (state.params, state.heads),
    (after.params, after.heads),
  )

  # Differences of float32 parameters near 1, divided by the rate.
  assert history()[1][1]['grad_norm'] == pytest.approx(
    float(optax.tree.norm(moved)), rel=1e-3
  )


def test_microbatches_change_no_state():
  # The same numbers are added in another order.
  for (got, got_metrics), (want, metrics) in zip(
    history(2)[1:], history()[1:], strict=True
  ):
    assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert_close(got_metrics, metrics, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('num_microbatches', [1, 2])
def test_a_skipped_step_changes_no_state_but_its_number(num_microbatches):
  state = history(num_microbatches)[2][0]  # the dataset writes next
  weights = BATCH.decoder_loss_weights.at[0, 0].set(jnp.nan)
  spoilt = BATCH._replace(decoder_loss_weights=weights)

  after, metrics = compiled_step(num_microbatches)(
    state, state_lib.Frozen(), spoilt
  )

  assert not np.isfinite(metrics['loss'])
  assert int(after.step) == int(state.step) + 1
  jax.tree.map(np.testing.assert_array_equal, after[1:], state[1:])


def test_a_state_without_leaves_is_what_it_was():
  method = Method(
    policy=policies.student(), objective=Objective(divergences.forward_kl)
  )

  state = state_lib.init_state(PARAMS, optax.adamw(1.0), method)

  assert jax.tree.leaves((state.heads, state.carried)) == []
  want = optax.adamw(1.0).init(PARAMS)
  assert jax.tree.structure(state.opt_state) == jax.tree.structure(want)


def test_no_two_arrays_of_a_state_share_memory():
  method = Method(
    policy=policies.student(),
    objective=Objective(divergences.forward_kl),
    teacher=teachers.Teacher(
      params=lambda frozen, student, carried: carried,
      needs_checkpoint=False,
      init=lambda params: params,
      update=lambda carried, params: carried,
    ),
  )

  state = jax.jit(lambda p: state_lib.init_state(p, OPTIMIZER, method))(PARAMS)

  arrays = jax.tree.leaves(state)
  assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)


def test_a_state_that_changes_its_shape_is_refused():
  method = Method(
    policy=policies.Policy(
      lambda draw: policies.rollouts(draw.batch.outputs, 0)._replace(
        carried=jnp.zeros(3)
      ),
      0.0,
      init=lambda batch: jnp.zeros(2),
    ),
    objective=Objective(divergence_weight=0.0, likelihood_weight=1.0),
  )
  with pytest.raises(ValueError, match='state of the policy must keep its'):
    jax.eval_shape(
      make_step(method=method), start(method), state_lib.Frozen(), BATCH
    )


def test_a_policy_with_state_needs_the_shapes_of_a_batch():
  with pytest.raises(ValueError, match='pass `batch` .* to init_state'):
    state_lib.init_state(PARAMS, OPTIMIZER, METHOD)


def test_another_trainers_loss_has_no_place_for_state():
  with pytest.raises(ValueError, match='needs a `TrainState`'):
    step_lib.make_batch_loss(
      student=STUDENT, teacher=None, method=METHOD, ids=tiny.IDS
    )


# --- A policy that brings its own inputs --------------------------------------


def replay() -> policies.Policy:
  """Trains on the batch of the previous step (the first step on its own)."""

  def write(draw):
    is_first = draw.carried['step'] == 0
    kept = jax.tree.map(
      functools.partial(jnp.where, is_first), draw.batch, draw.carried['batch']
    )
    rollouts = policies.rollouts(kept.outputs, policies.DATASET)
    carried = {'step': draw.carried['step'] + 1, 'batch': draw.batch}
    return rollouts._replace(batch=kept, carried=carried)

  def init(batch):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    return {'step': jnp.int32(0), 'batch': zeros}

  return policies.Policy(write, 0.0, init=init)


def test_outputs_are_graded_on_the_inputs_they_bring():
  likelihood = Objective(divergence_weight=0.0, likelihood_weight=1.0)
  first, second = BATCH, tiny.batch(7, (7, 3, 5, 6) * 2, (5, 2, 6, 4) * 2)

  def losses(policy, batches, num_microbatches):
    method = Method(policy=policy, objective=likelihood)
    step = jax.jit(make_step(method=method, num_microbatches=num_microbatches))
    state, metrics = start(method), []
    for batch in batches:
      state, of_step = step(state, state_lib.Frozen(), batch)
      metrics.append(float(of_step['loss']))
    return metrics

  got = losses(replay(), [first, second, second], 2)

  want = losses(policies.dataset(), [first, first, second], 1)
  # Another program: the same sums in another order.
  np.testing.assert_allclose(got, want, rtol=1e-5)


# --- What a credit reads ------------------------------------------------------


def test_a_credit_reads_log_probabilities_of_the_draw_and_of_both_models():
  seen = {}

  def assign(evidence):
    jax.debug.callback(
      lambda *x: seen.update(zip(('drawn', 'now', 'tokens'), x, strict=True)),
      evidence.rollouts.log_probs,
      evidence.log_probs(),
      evidence.rollouts.outputs,
    )
    return Worth(None, jnp.float32(0.0), {'rows': jnp.float32(8.0)})

  teacher, teacher_params = tiny.model_and_params(1, '1.0')
  step = step_lib.make_train_step(
    student=STUDENT,
    teacher=teacher,
    method=Method(
      policy=policies.student(),
      objective=Objective(divergences.forward_kl, chunk_tokens=16),
      credit=Credit(assign),
    ),
    optimizer=OPTIMIZER,
    ids=tiny.IDS,
    seed=0,
  )

  state = state_lib.init_state(PARAMS, OPTIMIZER)
  _, metrics = jax.jit(step)(state, state_lib.Frozen(teacher_params), BATCH)
  jax.effects_barrier()

  seen = jax.device_get(seen)
  weights = seen['tokens'].weights
  now = jax.tree.map(lambda x: x * weights, seen['now'])
  # Cached and full forward pass differ by rounding.
  np.testing.assert_allclose(now.student, seen['drawn'], atol=1e-4)
  nll = -(now.student.sum(axis=1) / weights.sum(axis=1)).mean()
  assert metrics['nll'] == pytest.approx(nll, rel=1e-5)
  assert (now.teacher <= 0.0).all() and now.teacher.min() < -1.0
  assert metrics['rows'] == 1.0  # a mean over rows


# --- Eight devices, a kill and a resume ---------------------------------------


_steps = {}


def step_on(mesh_shape, student, shardings):
  """Returns the jitted step on a mesh, the same to a run that goes on."""
  if mesh_shape not in _steps:
    _steps[mesh_shape] = jax.jit(
      make_step(student, num_microbatches=2),
      donate_argnums=0,
      out_shardings=(shardings, None),
    )
  return _steps[mesh_shape]


def train(folder, kill_after=None, mesh_shape=(4, 2)):
  """Runs to NUM_STEPS on a mesh; goes on from what the folder holds.

  Args:
    folder: saved into after the second step.
    kill_after: step after which the process ends by SIGKILL.
    mesh_shape: (data, model).

  Returns:
    The state, on the host; and where its parts lie.
  """
  mesh = partitioning.make_mesh(*mesh_shape)
  student = T5(tiny.config(), partitioning.Placement(mesh))
  abstract = state_lib.abstract_state(
    abstract_params(student), OPTIMIZER, mesh, METHOD, batch=BATCH
  )
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  batch = partitioning.put_global_batch(BATCH, mesh)
  step = step_on(mesh_shape, student, shardings)
  state = jax.device_put(start(), shardings)
  checkpoints = checkpoint.Checkpoints(
    folder, checkpoint.ModelDescription(student.config, 'none')
  )
  if saved := checkpoints.restore(abstract, tiny.NoData()):
    state = saved.state
  first = int(state.step)
  for number in range(first + 1, NUM_STEPS + 1):
    before = state
    state, _ = step(before, state_lib.Frozen(), Batch(*batch))
    if number != 3:  # Orbax may still read what was saved after step 2
      assert all(x.is_deleted() for x in jax.tree.leaves(before))
    if number == 2:
      checkpoints.save(state, tiny.NoData(), train_seconds=0.0)
    if number == kill_after:
      while not (pathlib.Path(folder) / 'checkpoint_2').exists():
        time.sleep(0.01)
      os.kill(os.getpid(), signal.SIGKILL)
  checkpoints.close()
  assert step._cache_size() == 1
  parts = jax.tree.map(
    lambda x: (x.shape, x.sharding.shard_shape(x.shape)), state
  )
  return first, jax.device_get(state), parts


def killed_and_whole(folder):
  """Runs in a separate process, see `tiny.on_simulated_devices`."""
  return train(folder / 'killed'), train(folder / 'whole')


@pytest.fixture(scope='module')
def of_8_devices(tmp_path_factory):
  folder = tmp_path_factory.mktemp('carried')
  code = (
    f'from {__name__} import train; '
    f'train({str(folder / "killed")!r}, kill_after=4)'
  )
  killed = subprocess.run(
    [sys.executable, '-c', code],
    env=tiny.environ_of_simulated_devices(8),
    cwd=conftest.ROOT,
    check=False,
  )
  assert killed.returncode == -signal.SIGKILL
  return tiny.on_simulated_devices(
    8, __name__, killed_and_whole.__name__, folder
  )


def test_a_killed_run_ends_where_one_ends_that_was_not(of_8_devices):
  (first, resumed, _), (_, whole, _) = of_8_devices

  assert first == 2
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_eight_devices_give_what_one_gives(of_8_devices):
  _, (first, whole, _) = of_8_devices

  want, _ = history(2)[-1]
  assert first == 0
  # The same sums, spread over devices: rounding only.
  assert_close(whole, want, atol=2e-5, rtol=2e-5)


def test_a_teachers_state_lies_as_the_students_parameters(of_8_devices):
  _, (_, _, parts) = of_8_devices

  assert parts.carried.teacher == parts.params
  kernel = parts.params['decoder']['layers_0']['mlp']['wi_0']['kernel']
  assert kernel == ((16, 20), (16, 10))
