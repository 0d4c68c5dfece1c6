# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkd_jax.distill import divergences, policies, teachers
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.methods import Method
from gkd_jax.distill.objectives import Objective
from gkd_jax.distill.state import Frozen
from tests import t5_reference, tiny

PARAMS = {'a': jnp.float32([1.0, 2.0]), 'b': jnp.bfloat16(4.0)}
LATER = {'a': jnp.float32([2.0, 0.0]), 'b': jnp.bfloat16(8.0)}


def test_an_average_moves_by_its_rate_from_the_students_start():
  teacher = teachers.ema(rate=0.25)

  carried = teacher.init(PARAMS)
  for _ in range(2):
    carried = teacher.update(carried, LATER)

  # 1 -> 1.25 -> 1.4375, 2 -> 1.5 -> 1.125, 4 -> 5 -> 5.75: exact in float32.
  np.testing.assert_array_equal(carried['a'], [1.4375, 1.125])
  assert carried['b'] == 5.75
  assert carried['b'].dtype == jnp.float32
  assert teacher.params(None, LATER, carried) is carried


def test_the_initial_student_stays():
  teacher = teachers.initial()

  carried = teacher.update(teacher.init(PARAMS), LATER)

  jax.tree.map(np.testing.assert_array_equal, carried, PARAMS)
  assert teacher.params(None, LATER, carried) is carried


def test_the_live_student_has_no_state():
  teacher = teachers.live()

  assert teacher.init is None
  assert teacher.params(None, LATER, ()) is LATER


@pytest.mark.parametrize('rate', [-0.1, 1.5])
def test_a_rate_outside_0_to_1_is_refused(rate):
  with pytest.raises(ValueError, match=r'rate must be in \[0, 1\]'):
    teachers.ema(rate=rate)


# ------------------------------------------------------------- other inputs

STUDENT, STUDENT_PARAMS = tiny.model_and_params(0)
TEACHER, TEACHER_PARAMS = tiny.model_and_params(1, '1.0', emb_dim=12)
BATCH = tiny.batch()
OTHER_INPUTS = tiny.tokens(7, (9, 4, 2, 6), 9)


def run_step(batch, method=None, teacher=TEACHER):
  """Returns the metrics of a step, and the parameters after it."""
  optimizer = optax.sgd(1.0)
  method = method or Method(
    policy=policies.dataset(), objective=Objective(divergences.forward_kl)
  )
  step = jax.jit(
    step_lib.make_train_step(
      student=STUDENT,
      teacher=teacher,
      method=method,
      optimizer=optimizer,
      ids=tiny.IDS,
      seed=0,
    )
  )
  state = state_lib.init_state(STUDENT_PARAMS, optimizer, method, batch=batch)
  state, metrics = step(state, Frozen(TEACHER_PARAMS), batch)
  return metrics, state.params


def reference_loss(teacher_inputs):
  """Forward KL on the dataset's outputs, float64 (Eq. 2)."""
  of_rows = []
  for x, x_teacher, y in zip(
    *map(np.asarray, (BATCH.encoder_input_tokens, teacher_inputs)),
    np.asarray(BATCH.decoder_target_tokens),
    strict=True,
  ):
    y = y[y != 0]
    log_p, log_q = (
      logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
      for logits in (
        t5_reference.logits(params, inputs[inputs != 0], y, num_heads=2)[
          :, 1 : tiny.NUM_IDS
        ]
        for params, inputs in (
          (TEACHER_PARAMS, x_teacher),
          (STUDENT_PARAMS, x),
        )
      )
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    of_rows.append(kl.mean())
  return np.mean(of_rows)


@pytest.mark.slow
def test_the_teacher_grades_what_follows_from_its_own_inputs():
  batch = BATCH._replace(teacher_input_tokens=jnp.asarray(OTHER_INPUTS))

  metrics, _ = run_step(batch)

  # float32 logits are off by about 1e-6.
  want = reference_loss(OTHER_INPUTS)
  assert float(metrics['loss']) == pytest.approx(want, rel=1e-5)
  assert abs(want - reference_loss(BATCH.encoder_input_tokens)) > 1e-2


@pytest.mark.slow
def test_equal_inputs_change_no_bit():
  same = BATCH._replace(teacher_input_tokens=BATCH.encoder_input_tokens)

  jax.tree.map(np.testing.assert_array_equal, run_step(same), run_step(BATCH))


@pytest.mark.slow
def test_the_live_student_with_equal_inputs_has_neither_loss_nor_gradient():
  method = Method(
    policy=policies.student(),
    objective=Objective(divergences.forward_kl),
    teacher=teachers.live(),
  )

  metrics, _ = run_step(BATCH, method, teacher=None)

  # Rounding: the two run through the same operations.
  assert float(metrics['loss']) == pytest.approx(0.0, abs=1e-6)
  assert float(metrics['grad_norm']) == pytest.approx(0.0, abs=1e-5)
  assert metrics['on_policy'] == 1.0


@pytest.mark.slow
def test_an_average_and_other_inputs_train_the_student_against_itself():
  batch = BATCH._replace(teacher_input_tokens=jnp.asarray(OTHER_INPUTS))
  method = Method(
    policy=policies.student(),
    objective=Objective(divergences.forward_kl),
    teacher=teachers.ema(),
  )

  metrics, _ = run_step(batch, method, teacher=None)

  assert float(metrics['loss']) > 1e-3
  assert float(metrics['grad_norm']) > 1e-3
