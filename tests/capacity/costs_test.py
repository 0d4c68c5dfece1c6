# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import extend

from gkd_jax.batch import Batch
from gkd_jax.capacity import costs
from gkd_jax.distill import divergences, objectives, policies
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.methods import Method
from gkd_jax.models.params import init_params, param_shapes
from gkd_jax.models.registry import SIZES, make_model
from gkd_jax.models.t5 import T5
from tests import tiny

pytestmark = pytest.mark.slow  # compiles models

B, S, T = 3, 5, 4
STUDENTS = {
  'T5 1.1': tiny.config(num_encoder_layers=2, num_decoder_layers=3),
  'T5 1.0': tiny.config('1.0', num_encoder_layers=3, num_decoder_layers=2),
  # Windows as long as the rows: they are not counted.
  'T5Gemma 1': tiny.t5gemma_config(1, num_decoder_layers=3, window=9),
  'T5Gemma 2': tiny.t5gemma_config(2, num_encoder_layers=3, window=9),
}
TEACHER = tiny.config(emb_dim=20, num_heads=3, mlp_dim=28)


def flops_of(jaxpr) -> int:
  """FLOPs of all matrix products, counted as often as they are done."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      summed = [equation.invars[0].aval.shape[i] for i in contracted]
      total += 2 * equation.outvars[0].aval.size * math.prod(summed)
    times = equation.params.get('length', 1)  # of a scan
    for inner in extend.core.jaxprs_in_params(equation.params):
      total += times * flops_of(inner)
  return total


def flops(function, *args) -> int:
  return flops_of(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.fixture(params=STUDENTS)
def student(request):
  return make_model(STUDENTS[request.param])


@pytest.fixture
def cost(student):
  return costs.of_step(
    student.config, TEACHER, batch_size=B, input_length=S, target_length=T
  )


def shapes(student):
  return jax.eval_shape(lambda: init_params(student, jax.random.key(0)))


INPUTS = jax.ShapeDtypeStruct((B, S), jnp.int32)
TARGETS = jax.ShapeDtypeStruct((B, T), jnp.int32)


def test_encoder_has_the_products_that_are_in_the_program(student, cost):
  encode = functools.partial(student.apply, method='encode')

  got = flops(encode, {'params': shapes(student)}, INPUTS)

  assert cost['student_encoder'].flops == got


def test_teacher_has_the_products_that_are_in_the_program(cost):
  teacher = T5(TEACHER)

  got = flops(
    functools.partial(step_lib.hidden_states, teacher),
    shapes(teacher),
    INPUTS,
    TARGETS,
  )

  assert cost['teacher'].flops == got


def test_step_has_the_products_that_are_in_the_program(student, cost):
  optimizer = optax.adamw(1e-3)
  teacher = T5(TEACHER)
  train_step = step_lib.make_train_step(
    student=student,
    teacher=teacher,
    method=Method(
      policy=policies.dataset(),
      objective=objectives.Objective(divergences.forward_kl),
    ),
    optimizer=optimizer,
    ids=tiny.IDS,
    seed=0,
  )
  state = jax.eval_shape(
    lambda p: state_lib.init_state(p, optimizer), shapes(student)
  )
  weights = jax.ShapeDtypeStruct((B, T), jnp.float32)

  got = flops(
    train_step,
    state,
    state_lib.Frozen(shapes(teacher)),
    Batch(INPUTS, TARGETS, weights),
  )

  without_sampling = [
    cost[phase].flops
    for phase in ('student_encoder', 'teacher', 'student', 'optimizer')
  ]
  assert sum(without_sampling) == got


def test_sampling_has_the_products_of_its_loop_over_tokens(student, cost):
  def start(params, encoded, inputs):
    return student.apply(
      {'params': params}, encoded, inputs, T, method='start_cache'
    )

  def one_token(params, cache, tokens):
    return student.apply(
      {'params': params}, cache, tokens, method='decode_step'
    )

  encoded = jax.eval_shape(
    lambda p, x: student.apply({'params': p}, x, method='encode'),
    shapes(student),
    INPUTS,
  )
  arguments = (shapes(student), encoded, INPUTS)
  cache = jax.eval_shape(start, *arguments)
  tokens = jax.ShapeDtypeStruct((B,), jnp.int32)

  got = flops(start, *arguments)
  got += T * flops(one_token, shapes(student), cache, tokens)

  # The program attends to the whole cache, which is not full yet.
  c = student.config
  empty = T * T - T * (T + 1) // 2
  got -= 4 * B * empty * c.num_decoder_layers * c.num_heads * c.head_dim
  assert cost['sampling'].flops == got


def test_a_weight_of_two_bytes_halves_what_sampling_reads():
  of = functools.partial(
    costs.of_step,
    STUDENTS['T5 1.1'],
    TEACHER,
    batch_size=B,
    input_length=S,
    target_length=T,
  )

  assert of()['sampling'].bytes == 2 * of(weight_bytes=2)['sampling'].bytes


@pytest.mark.parametrize(
  'size',
  ['t5_1_1_small', 't5_1_0_base', 't5gemma_9b_2b', 't5gemma_2_270m_270m'],
)
def test_weights_are_all_parameters_but_norms_and_biases(size):
  # Layers are alike: to trace all of them takes long.
  config = dataclasses.replace(
    SIZES[size], num_encoder_layers=2, num_decoder_layers=3
  )

  got = costs.count_weights(config)

  matrices = [
    math.prod(shape)
    for name, shape in param_shapes(make_model(config)).items()
    if len(shape) > 1 and 'rel_embedding' not in name
  ]
  assert got == sum(matrices)


def test_the_least_time_is_that_of_products_or_of_memory():
  cost = costs.Cost(flops=6.0, bytes=10.0)

  assert cost.seconds(peak_flops=2.0, bandwidth=10.0) == 3.0
  assert cost.seconds(peak_flops=6.0, bandwidth=5.0) == 2.0


def test_small_from_base_costs_what_was_counted_by_hand():
  cost = costs.of_step(
    SIZES['t5_1_1_small'],
    SIZES['t5_1_1_base'],
    batch_size=8,
    input_length=128,
    target_length=64,
  )

  giga = {name: c.flops / 1e9 for name, c in cost.items()}
  assert giga['teacher'] == pytest.approx(313, abs=0.5)
  assert giga['student_encoder'] + giga['student'] == pytest.approx(
    76 + 211, abs=1
  )
  assert cost['sampling'].bytes / 1e9 == pytest.approx(11.9, abs=0.05)
  assert cost['optimizer'].bytes / 1e9 == pytest.approx(2.15, abs=0.01)


def test_an_accepted_draft_divides_the_targets_calls():
  target, draft = tiny.config(), tiny.config(emb_dim=8)
  shape = {'batch_size': 2, 'input_length': 7}

  got = costs.of_drafted(
    target,
    draft,
    draft_length=3,
    block_efficiency=4.0,
    target_length=12,
    **shape,
  )

  def parts(config):
    """The calls for 12 tokens, and what is done once."""
    once = costs.of_rollout(config, target_length=0, **shape)
    both = costs.of_rollout(config, target_length=12, **shape)
    return np.subtract(both, once), np.array(once)

  of_target, once = parts(target)
  of_draft, once_of_draft = parts(draft)
  # As many positions in a fourth of the calls; the draft writes 9 of 12 tokens.
  flops, num_bytes = of_target / (1, 4) + once + 0.75 * of_draft + once_of_draft
  assert got == pytest.approx((flops, num_bytes))
