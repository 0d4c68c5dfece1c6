# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.batch import Batch, Outputs, shift_right
from gkd_jax.distill import chunked_sums, divergences, objectives
from tests import references, tiny

pytestmark = pytest.mark.slow  # compiles models


def _jsd(module, beta, suffix=''):
  function = getattr(module, 'generalized_jsd' + suffix)
  return functools.partial(function, beta=beta)


DIVERGENCES = divergences.REPORTED | {'jsd_0.1': _jsd(divergences, 0.1)}
# Whatever can be minimised, alone and together.
OBJECTIVES = {
  **{
    name: objectives.Objective(divergence)
    for name, divergence in DIVERGENCES.items()
  },
  'likelihood': objectives.Objective(
    divergence_weight=0.0, likelihood_weight=1.0
  ),
  'both': objectives.Objective(
    divergences.forward_kl, divergence_weight=0.7, likelihood_weight=0.3
  ),
}
# The same in float64: (value, gradient by the student's logits).
REFERENCES = {
  name: (references.twin(d), references.twin(d, '_gradient'))
  for name, d in DIVERGENCES.items()
}


def reference_of(name, tokens, **logits):
  """Returns the terms of OBJECTIVES[name] per token, and their gradient."""
  if name == 'both':
    kl = reference_of('forward_kl', tokens, **logits)
    nll = reference_of('likelihood', tokens, **logits)
    return tuple(0.7 * a + 0.3 * b for a, b in zip(kl, nll, strict=True))
  if name == 'likelihood':
    student = (logits['student_logits'], tokens)
    return (
      references.negative_log_likelihood(*student),
      references.negative_log_likelihood_gradient(*student),
    )
  return tuple(function(**logits) for function in REFERENCES[name])


each_objective = pytest.mark.parametrize('name', OBJECTIVES)
each_divergence = pytest.mark.parametrize('name', DIVERGENCES)
each_reduction = pytest.mark.parametrize('reduction', objectives.REDUCTIONS)


def tied_unembed(head, hidden):
  """The head of T5 1.0: scaling, then the transposed embedding."""
  return hidden * hidden.shape[-1] ** -0.5 @ head['embedding'].T


def untied_unembed(head, hidden):
  """The head of T5 1.1: a separate matrix."""
  return hidden @ head['kernel']


def no_unembed(head, hidden):
  """The identity: hidden states are the logits."""
  del head
  return hidden


class Example(NamedTuple):
  """Two small models' last layers, and outputs: the arrays of weighted_sums."""

  student_head: Any
  student_hidden: np.ndarray
  teacher_head: Any
  teacher_hidden: np.ndarray
  tokens: np.ndarray
  coefficients: np.ndarray


NUM_IDS = 11  # of 13: two fill the vocabulary up
IDS = tiny.special_ids(NUM_IDS)


def example(tied=False) -> Example:
  """B=3, T=7, V=13; the student's D=5, the teacher's 6."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  def head(dim):
    kernel = normal(dim, 13)
    return {'embedding': kernel.T} if tied else {'kernel': kernel}

  return Example(
    head(5),
    normal(3, 7, 5),
    head(6),
    normal(3, 7, 6),
    rng.integers(1, NUM_IDS, (3, 7), np.int32),
    rng.random((3, 7), np.float32),
  )


def random_batch():
  """Outputs of 6, 2, 0 and 4 tokens, and logits [4, 6, 13] of two models."""
  rng = np.random.default_rng(0)
  weights = np.float32(np.arange(6) < np.array([[6], [2], [0], [4]]))
  tokens = rng.integers(2, NUM_IDS, (4, 6)) * np.int32(weights)
  student, teacher = rng.standard_normal((2, 4, 6, 13), np.float32)
  return Outputs(tokens, weights), student, teacher


def log_of(*probs):
  """Logits of a distribution over the first ids after pad, of 11."""
  # The pad's own logit is of no consequence.
  rest = NUM_IDS - 1 - len(probs)
  return np.float32([3.0, *np.log(probs), *rest * [-1e9]])


def sums_of(objective, arrays, unembed=untied_unembed):
  return chunked_sums.weighted_sums(
    objective.terms(IDS), unembed, unembed, objective.chunk_tokens, *arrays
  )


def plain_sums_of(objective, arrays, unembed=untied_unembed):
  """The same sums with all logits at once, differentiated by JAX."""
  values = objective.terms(IDS)(
    unembed(arrays.student_head, arrays.student_hidden),
    unembed(arrays.teacher_head, arrays.teacher_hidden),
    arrays.tokens,
  )
  return {
    name: (value * arrays.coefficients).sum() for name, value in values.items()
  }


def with_chunks(objective, chunk_tokens):
  return dataclasses.replace(objective, chunk_tokens=chunk_tokens)


def compiled(function, **keywords):
  """jax.jit, returning NumPy arrays.

  Nearly all the time of this file goes into compiling: so there is little
  optimisation, and what is static is compiled once for all tests sharing it.
  """
  options = {'xla_backend_optimization_level': 0}
  jitted = jax.jit(function, compiler_options=options, **keywords)
  return lambda *arguments: jax.device_get(jitted(*arguments))


@functools.partial(compiled, static_argnums=(0, 1, 3))
def value_and_grads(sums_of, objective, arrays, unembed=untied_unembed):
  """Returns all sums, and the gradient of 'loss' by the student's arrays."""

  def loss(head, hidden):
    sums = sums_of(
      objective,
      arrays._replace(student_head=head, student_hidden=hidden),
      unembed,
    )
    return sums['loss'], sums

  (_, sums), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
    arrays.student_head, arrays.student_hidden
  )
  return sums, grads


@functools.partial(compiled, static_argnums=0)
def mean_loss(objective, outputs, student, teacher):
  """The loss of a batch as a step computes it, and its gradient by logits."""

  def loss(student_logits):
    weights_BT, count = objectives.coefficients(
      outputs.weights, objective.reduction
    )
    arrays = Example(
      {}, student_logits, {}, teacher, outputs.tokens, weights_BT
    )
    return sums_of(objective, arrays, no_unembed)['loss'] / count

  return jax.value_and_grad(loss)(student)


coefficients = compiled(objectives.coefficients, static_argnums=1)


USABLE = slice(1, NUM_IDS)

# A few float32 roundings of 6e-8, of means near 1 over some ten ids.
CLOSE = {'rtol': 1e-6, 'atol': 1e-6}
# The same of sums of 21 tokens, near 50, added up in another order.
SUM = {'rtol': 2e-6, 'atol': 1e-5}


# ------------------------------------------------------------- the objective


@each_objective
def test_loss_is_eq_2_of_the_usable_ids_in_float64(name):
  outputs, student, teacher = random_batch()

  got, got_grad = mean_loss(OBJECTIVES[name], outputs, student, teacher)

  values, gradients = reference_of(
    name,
    student_logits=student[..., USABLE],
    teacher_logits=teacher[..., USABLE],
    tokens=np.maximum(outputs.tokens - 1, 0),
  )
  want = references.sequence_mean(values, outputs.weights)
  lengths = np.array([6.0, 2.0, 1.0, 4.0])[:, None, None]  # 1: of nothing
  per_token = outputs.weights[..., None] / lengths / 3.0  # rows with tokens
  np.testing.assert_allclose(got, want, **CLOSE)
  np.testing.assert_allclose(
    got_grad[..., USABLE], gradients * per_token, **CLOSE
  )


def test_likelihood_is_the_mean_negative_log_likelihood_of_the_tokens():
  outputs, student, teacher = random_batch()
  objective = objectives.Objective(
    divergence_weight=0.0, likelihood_weight=1.0, reduction='token'
  )

  got, _ = mean_loss(objective, outputs, student, teacher)

  q = references.softmax(student[..., USABLE])
  at = [(b, t) for b, n in enumerate([6, 2, 0, 4]) for t in range(n)]
  want = -np.mean([np.log(q[b, t, outputs.tokens[b, t] - 1]) for b, t in at])
  np.testing.assert_allclose(got, want, **CLOSE)


def test_divergence_and_likelihood_are_added_with_their_weights():
  outputs, student, teacher = random_batch()

  values = compiled(OBJECTIVES['both'].terms(IDS))(
    student, teacher, outputs.tokens
  )

  at = outputs.weights > 0.0
  divergence = references.forward_kl(
    teacher_logits=teacher[at][:, USABLE], student_logits=student[at][:, USABLE]
  )
  nll = references.negative_log_likelihood(
    student[at][:, USABLE], outputs.tokens[at] - 1
  )
  np.testing.assert_allclose(values['divergence'][at], divergence, **CLOSE)
  np.testing.assert_allclose(values['nll'][at], nll, **CLOSE)
  np.testing.assert_allclose(
    values['loss'][at], 0.7 * divergence + 0.3 * nll, **CLOSE
  )


def test_likelihood_alone_needs_no_teacher():
  objective = OBJECTIVES['likelihood']
  arrays = example()._replace(teacher_head=None, teacher_hidden=None)

  sums = compiled(
    lambda arrays: chunked_sums.weighted_sums(
      objective.terms(IDS), untied_unembed, None, 6, *arrays
    )
  )(arrays)

  want, _ = value_and_grads(plain_sums_of, objective, example())
  assert not objective.needs_teacher
  assert set(sums) == {'loss', 'nll'}
  np.testing.assert_allclose(sums['loss'], want['loss'], **SUM)


def test_log_likelihood_is_computed_in_float32():
  outputs, student, _ = random_batch()
  logits = jnp.bfloat16(student)

  got = objectives.negative_log_likelihood(logits, outputs.tokens)

  want = objectives.negative_log_likelihood(
    logits.astype(jnp.float32), outputs.tokens
  )
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  ('temperature', 'want'),
  [
    (0.1, 2.302531992872435),
    (0.5, 1.833196665466804),
    (1.0, 1.101868135794281),
    (2.0, 0.625670693361385),
  ],
)
def test_teacher_temperature_sharpens_the_teacher_alone(temperature, want):
  objective = objectives.Objective(
    divergences.forward_kl, teacher_temperature=temperature
  )

  got = objective.terms(IDS)(
    log_of(0.1, 0.3, 0.6), log_of(0.7, 0.2, 0.1), jnp.int32(1)
  )['loss']

  np.testing.assert_allclose(got, want, **CLOSE)


@each_objective
def test_logits_of_ids_that_do_not_occur_change_nothing(name):
  outputs, student, teacher = random_batch()
  unused = [0, 11, 12]  # the pad, and what fills 11 ids up to 13
  loud_student, loud_teacher = student.copy(), teacher.copy()
  loud_student[..., unused] += 40.0
  loud_teacher[..., unused[1:]] += 40.0

  loss, grad = mean_loss(OBJECTIVES[name], outputs, loud_student, loud_teacher)

  want = mean_loss(OBJECTIVES[name], outputs, student, teacher)
  # Bit for bit: a masked logit is replaced before anything reads it.
  np.testing.assert_array_equal(loss, want[0])
  np.testing.assert_array_equal(grad, want[1])
  np.testing.assert_array_equal(grad[..., unused], 0.0)


@pytest.mark.parametrize(('student_size', 'teacher_size'), [(11, 13), (13, 11)])
def test_vocabularies_may_be_filled_up_to_different_sizes(
  student_size, teacher_size
):
  outputs, student, teacher = random_batch()

  loss, grad = mean_loss(
    OBJECTIVES['both'],
    outputs,
    student[..., :student_size],
    teacher[..., :teacher_size],
  )

  want = mean_loss(OBJECTIVES['both'], outputs, student, teacher)
  # The same terms, maybe summed in another order.
  np.testing.assert_allclose(loss, want[0], **CLOSE)
  np.testing.assert_allclose(grad, want[1][..., :student_size], **CLOSE)


# ---------------------------------------------------------------- reductions


def reduced(reduction):
  return objectives.Objective(
    divergences.reverse_kl, likelihood_weight=1.0, reduction=reduction
  )


@pytest.mark.parametrize(
  ('reduction', 'want'),
  [('sequence', 0.600662055809672), ('token', 0.650993083714508)],
)
def test_reduction_has_its_known_value(reduction, want):
  # KL(P || Q), KL(Q || P) and KL(P || P) of a pair; then one token of 0.5.
  p, q = log_of(0.7, 0.2, 0.1), log_of(0.1, 0.3, 0.6)
  sure, half = log_of(1.0), log_of(math.exp(-0.5), 1.0 - math.exp(-0.5))
  teacher = np.stack([[p, q, p], [sure, q, p]])
  student = np.stack([[q, p, p], [half, p, q]])
  weights = np.float32([[1, 1, 1], [1, 0, 0]])

  got, _ = mean_loss(
    objectives.Objective(divergences.forward_kl, reduction=reduction),
    Outputs(np.ones((2, 3), np.int32), weights),
    student,
    teacher,
  )

  np.testing.assert_allclose(got, want, **CLOSE)


@each_reduction
def test_coefficients_give_the_mean_of_the_reduction(reduction):
  outputs, *_ = random_batch()
  losses = np.random.default_rng(1).uniform(size=(4, 6))

  weights_BT, count = coefficients(outputs.weights, reduction)

  want = references.REDUCTIONS[reduction](losses, outputs.weights)
  np.testing.assert_allclose((weights_BT * losses).sum() / count, want, **CLOSE)


@each_reduction
def test_rows_without_tokens_count_for_nothing(reduction):
  outputs, student, teacher = random_batch()
  used = np.array([0, 1, 3])  # row 2 has no tokens
  objective = reduced(reduction)

  loss, grad = mean_loss(objective, outputs, student, teacher)

  want = mean_loss(
    objective,
    Outputs(outputs.tokens[used], outputs.weights[used]),
    student[used],
    teacher[used],
  )
  np.testing.assert_allclose(loss, want[0], **CLOSE)
  np.testing.assert_allclose(grad[used], want[1], **CLOSE)
  np.testing.assert_array_equal(grad[2], 0.0)


@each_reduction
def test_a_batch_without_any_token_is_no_nan(reduction):
  weights_BT, count = coefficients(np.zeros((2, 3)), reduction)

  np.testing.assert_array_equal(weights_BT, np.zeros((2, 3)))
  assert count == 0.0


@each_reduction
def test_more_padding_changes_neither_loss_nor_gradient(reduction):
  outputs, student, teacher = random_batch()
  longer = Outputs(*(np.pad(x, ((0, 0), (0, 3))) for x in outputs))
  # Models say something at every position.
  more = np.random.default_rng(1).standard_normal((2, 4, 3, 13))
  longer_student, longer_teacher = (
    np.concatenate([logits, noise], axis=1, dtype=np.float32)
    for logits, noise in zip((student, teacher), more, strict=True)
  )

  loss, grad = mean_loss(
    reduced(reduction), longer, longer_student, longer_teacher
  )

  want = mean_loss(reduced(reduction), outputs, student, teacher)
  np.testing.assert_allclose(loss, want[0], **CLOSE)
  np.testing.assert_allclose(grad[:, :6], want[1], **CLOSE)
  np.testing.assert_array_equal(grad[:, 6:], 0.0)


@each_reduction
def test_microbatches_add_up_to_the_batch(reduction):
  weights = random_batch()[0].weights
  losses = np.random.default_rng(1).uniform(size=(4, 6))

  parts = [coefficients(w, reduction) for w in np.split(weights, 2)]

  weights_BT, count = coefficients(weights, reduction)
  np.testing.assert_allclose(
    (np.concatenate([w for w, _ in parts]) * losses).sum()
    / sum(c for _, c in parts),
    (weights_BT * losses).sum() / count,
    **CLOSE,
  )


# ------------------------------------------------ sums without all the logits


# 7 positions of 3 rows, in chunks of 1, 2, 3 and 4 positions, of which only 1
# divides 7, and all at once. 1 token is less than a position holds.
@pytest.mark.parametrize('chunk_tokens', [1, 6, 11, 15, 1000])
def test_chunks_change_neither_sums_nor_gradients(chunk_tokens):
  arrays, objective = example(), OBJECTIVES['both']

  got = value_and_grads(sums_of, with_chunks(objective, chunk_tokens), arrays)

  want = value_and_grads(plain_sums_of, objective, arrays)
  assert set(got[0]) == {'loss', 'divergence', 'nll'}
  jax.tree.map(functools.partial(np.testing.assert_allclose, **SUM), got, want)


def test_an_embedding_used_again_gets_the_plain_gradient():
  arrays, objective = example(tied=True), OBJECTIVES['both']

  got = value_and_grads(
    sums_of, with_chunks(objective, 6), arrays, tied_unembed
  )

  want = value_and_grads(plain_sums_of, objective, arrays, tied_unembed)
  jax.tree.map(functools.partial(np.testing.assert_allclose, **SUM), got, want)


@each_objective
def test_sums_and_gradients_in_chunks_are_the_plain_ones_in_float64(name):
  arrays = example()

  sums, (d_head, d_hidden) = value_and_grads(
    sums_of, with_chunks(OBJECTIVES[name], 6), arrays
  )

  a = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
  student_kernel = a.student_head['kernel'][:, USABLE]
  values, d_logits = reference_of(
    name,
    student_logits=a.student_hidden @ student_kernel,
    teacher_logits=a.teacher_hidden @ a.teacher_head['kernel'][:, USABLE],
    tokens=arrays.tokens - 1,
  )
  d_logits = d_logits * a.coefficients[..., None]
  want = np.zeros((5, 13))
  want[:, USABLE] = np.einsum('btd,btv->dv', a.student_hidden, d_logits)
  np.testing.assert_allclose(
    sums['loss'], (values * a.coefficients).sum(), **SUM
  )
  np.testing.assert_allclose(d_head['kernel'], want, **SUM)
  np.testing.assert_allclose(d_hidden, d_logits @ student_kernel.T, **SUM)


def test_value_alone_is_the_value_that_comes_with_the_gradient():
  # They are two functions, told apart by JAX.
  objective = with_chunks(OBJECTIVES['both'], 6)

  alone = compiled(functools.partial(sums_of, objective))(example())

  with_gradient, _ = value_and_grads(sums_of, objective, example())
  for name in ('loss', 'divergence', 'nll'):
    np.testing.assert_allclose(alone[name], with_gradient[name], **SUM)


def chunked_grad(name, total, by):
  """Returns the gradient of total(sums) by the named arrays of `example`."""
  arrays = example()

  def loss(some):
    objective = with_chunks(OBJECTIVES[name], 6)
    return total(sums_of(objective, arrays._replace(**some)))

  return jax.grad(loss), {field: getattr(arrays, field) for field in by}


@pytest.mark.slow
def test_gradient_is_the_same_with_and_without_jit():
  grad, student = chunked_grad(
    'likelihood', lambda sums: sums['loss'], by=('student_head',)
  )

  np.testing.assert_allclose(
    grad(student)['student_head']['kernel'],
    compiled(grad)(student)['student_head']['kernel'],
    **SUM,
  )


def test_what_is_done_with_the_loss_scales_its_gradient():
  grad, student = chunked_grad(
    'forward_kl',
    lambda sums: -3.0 * sums['loss'],
    by=('student_head', 'student_hidden'),
  )

  got = compiled(grad)(student)

  _, (d_head, d_hidden) = value_and_grads(
    sums_of, with_chunks(OBJECTIVES['forward_kl'], 6), example()
  )
  np.testing.assert_allclose(
    got['student_head']['kernel'], -3.0 * d_head['kernel'], **SUM
  )
  np.testing.assert_allclose(got['student_hidden'], -3.0 * d_hidden, **SUM)


def test_only_the_loss_is_differentiated():
  grad, student = chunked_grad(
    'both', lambda sums: sums['nll'] + sums['divergence'], ('student_hidden',)
  )

  np.testing.assert_array_equal(compiled(grad)(student)['student_hidden'], 0.0)


def test_the_teacher_gets_no_gradient():
  grad, teacher = chunked_grad(
    'forward_kl',
    lambda sums: sums['loss'],
    by=('teacher_head', 'teacher_hidden'),
  )

  jax.tree.map(
    lambda g: np.testing.assert_array_equal(g, 0.0), compiled(grad)(teacher)
  )


def array_sizes(jaxpr):
  """Sizes of all arrays a program makes, inside its loops and calls too."""
  for eqn in jaxpr.eqns:
    yield from (math.prod(v.aval.shape) for v in eqn.outvars)
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(inner, 'jaxpr', inner)  # closed or not
      if hasattr(inner, 'eqns'):
        yield from array_sizes(inner)


def largest_array(chunk_tokens, differentiated):
  """Of a loss with B=2, T=24, V=50 and D=6."""
  head, hidden = {'kernel': np.zeros((6, 50))}, np.zeros((2, 24, 6))
  tokens, coefficients = np.ones((2, 24), np.int32), np.ones((2, 24))
  objective = with_chunks(OBJECTIVES['both'], chunk_tokens)

  def loss(student_head, student_hidden):
    arrays = (student_head, student_hidden, head, hidden, tokens, coefficients)
    return sums_of(objective, arrays)['loss']

  if differentiated:
    loss = jax.value_and_grad(loss, argnums=(0, 1))
  program = jax.make_jaxpr(loss)(head, hidden)
  return max(array_sizes(program.jaxpr))


@pytest.mark.parametrize('differentiated', [False, True])
# 5 positions do not divide 24.
@pytest.mark.parametrize(('chunk_tokens', 'positions'), [(8, 4), (10, 5)])
def test_no_array_holds_all_logits(chunk_tokens, positions, differentiated):
  largest = largest_array(chunk_tokens, differentiated)

  # A chunk's logits are the largest thing there is. That they are found shows
  # that the search looks into loops.
  assert largest == 2 * positions * 50 < 2 * 24 * 50


@pytest.mark.parametrize('differentiated', [False, True])
def test_one_chunk_holds_all_logits(differentiated):
  # The search of the test above does find them.
  assert largest_array(1000, differentiated) == 2 * 24 * 50


def test_accumulators_are_float32_where_hidden_states_are_bfloat16():
  # 1024 times the same token, one a chunk. A bfloat16 sum of ones stops at 256.
  objective = objectives.Objective(
    divergences.forward_kl, likelihood_weight=1.0, chunk_tokens=1
  )
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((4, NUM_IDS), np.float32)
  student, teacher = jnp.bfloat16(rng.standard_normal((2, 1, 1, 4)))

  def arrays(length):
    return Example(
      {'kernel': kernel},
      np.tile(student, (1, length, 1)),
      {'kernel': kernel},
      np.tile(teacher, (1, length, 1)),
      np.full((1, length), 3),
      np.ones((1, length), np.float32),
    )

  def unembed(head, hidden):  # as a bfloat16 model does
    return hidden @ head['kernel'].astype(jnp.bfloat16)

  sums, (d_head, d_hidden) = value_and_grads(
    sums_of, objective, arrays(1024), unembed
  )

  one_sum, (one_d_head, _) = value_and_grads(
    sums_of, objective, arrays(1), unembed
  )
  assert {s.dtype for s in sums.values()} == {jnp.dtype(jnp.float32)}
  assert d_head['kernel'].dtype == jnp.float32
  assert d_hidden.dtype == jnp.bfloat16
  # 1024 roundings of at most 6e-8 each.
  np.testing.assert_allclose(sums['loss'], 1024 * one_sum['loss'], rtol=6e-5)
  np.testing.assert_allclose(
    d_head['kernel'], 1024 * one_d_head['kernel'], rtol=6e-5
  )


# ------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    ({'divergence_weight': -0.5}, 'divergence_weight must not be negative'),
    ({'likelihood_weight': -1.0}, 'likelihood_weight must not be negative'),
    ({'divergence': None}, '(?s)divergence is not set.*forward_kl'),
    ({'teacher_temperature': 0.0}, 'teacher_temperature must be positive'),
    ({'teacher_temperature': -1.0}, 'teacher_temperature must be positive'),
    ({'reduction': 'mean'}, r"\('sequence', 'token'\), got 'mean'"),
    ({'chunk_tokens': 0}, 'chunk_tokens must be positive, got 0'),
  ],
)
def test_settings_that_mean_nothing_are_refused_at_once(settings, text):
  with pytest.raises(ValueError, match=text):
    objectives.Objective(**{'divergence': divergences.forward_kl, **settings})


# ------------------------------------------- bugs that users of TRL had to find


@pytest.mark.parametrize(
  ('beta', 'divergence'),
  [
    (0, DIVERGENCES['forward_kl']),
    (0.1, DIVERGENCES['jsd_0.1']),
    (0.9, _jsd(divergences, 0.9)),
    (1, DIVERGENCES['reverse_kl']),
  ],
)
def test_token_mean_of_a_divergence_is_trls_loss(beta, divergence):
  outputs, student, teacher = random_batch()
  objective = objectives.Objective(divergence, reduction='token')

  got, _ = mean_loss(objective, outputs, student, teacher)

  want = references.trl_generalized_jsd_loss(
    # TRL knows of no ids that cannot occur.
    student_logits=student[..., USABLE],
    teacher_logits=teacher[..., USABLE],
    labels=np.where(outputs.weights > 0.0, outputs.tokens, -100),
    beta=beta,
  )
  np.testing.assert_allclose(got, want, **CLOSE)


@each_reduction
def test_trl_bug_padding_counted_in_the_loss(reduction):
  """TRL pull request 2058: positions after the end were trained on."""
  outputs, student, teacher = random_batch()
  after_end = outputs.weights == 0.0
  other_student, other_teacher = student.copy(), teacher.copy()
  other_student[after_end] = 5.0 * student[after_end][:, ::-1]
  other_teacher[after_end] = -3.0 * teacher[after_end]

  got = mean_loss(reduced(reduction), outputs, other_student, other_teacher)

  want = mean_loss(reduced(reduction), outputs, student, teacher)
  # Bit for bit: 0 times anything.
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])


def test_trl_bug_eos_masked_where_padding_is_eos():
  """TRL pull request 6357: EOS was not trained on."""
  _, student, teacher = random_batch()
  weights = np.tile(np.float32([1, 1, 1, 0, 0, 0]), (4, 1))
  padded_with_eos = np.tile([5, 6] + 4 * [1], (4, 1))
  padded = np.tile([5, 6, 1] + 3 * [0], (4, 1))

  loss, grad = mean_loss(
    reduced('sequence'), Outputs(padded_with_eos, weights), student, teacher
  )

  want, _ = mean_loss(
    reduced('sequence'), Outputs(padded, weights), student, teacher
  )
  learnt_from = np.abs(grad).max(axis=-1) > 0.0
  np.testing.assert_array_equal(learnt_from, weights > 0.0)
  np.testing.assert_array_equal(loss, want)


def test_trl_bug_logits_and_labels_one_position_apart():
  """As in ms-swift pull request 8436. Logits t are those of token t.

  The model: after token i comes token i + 1, for certain; EOS comes after 5.
  """
  tokens = np.array([[2, 3, 4, 5, 1, 0]])
  follows = np.array([2, 0, 3, 4, 5, 1])
  logits = (
    50.0 * np.eye(NUM_IDS, dtype=np.float32)[follows[shift_right(tokens, 0)]]
  )
  weights = np.float32([[1, 1, 1, 1, 1, 0]])

  loss, _ = mean_loss(
    OBJECTIVES['likelihood'], Outputs(tokens, weights), logits, logits
  )

  # All other ids have e^-50. One position off costs 50 a token.
  np.testing.assert_allclose(loss, 0.0, atol=1e-6)


@each_reduction
def test_trl_bug_divided_by_the_count_of_other_outputs(reduction):
  """TRL issue 4719: sums were divided by the count of the dataset's tokens.

  The mean of what is 1 for each token is 1, whoever wrote how many of them.
  """
  dataset = Batch(np.ones((2, 3)), np.ones((2, 6)), np.ones((2, 6))).outputs
  sampled = random_batch()[0]

  for outputs in (dataset, sampled):
    weights_BT, count = coefficients(outputs.weights, reduction)

    # One rounding for each of 12 tokens.
    np.testing.assert_allclose(weights_BT.sum() / count, 1.0, rtol=1e-6)


def test_trl_bug_cross_entropy_mixed_in_unasked():
  """TRL pull request 5731: half the loss was likelihood, in silence."""
  outputs, student, teacher = random_batch()
  others = outputs._replace(tokens=np.where(outputs.tokens == 5, 6, 5))
  objective = OBJECTIVES['jsd_0.1']

  got = mean_loss(objective, others, student, teacher)

  want = mean_loss(objective, outputs, student, teacher)
  # Bit for bit: the divergence is one of distributions, whatever was drawn.
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])
