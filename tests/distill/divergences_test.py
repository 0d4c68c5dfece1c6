# SPDX-License-Identifier: Apache-2.0
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.distill import divergences
from tests import references


def jsd(beta):
  return functools.partial(divergences.generalized_jsd, beta=beta)


# All that are reported, and more of the JSD.
DIVERGENCES = divergences.REPORTED | {'jsd_0.1': jsd(0.1), 'jsd_0.9': jsd(0.9)}
REFERENCES = {name: references.twin(d) for name, d in DIVERGENCES.items()}
GRADIENTS = {
  name: references.twin(d, '_gradient') for name, d in DIVERGENCES.items()
}

each_divergence = pytest.mark.parametrize('name', DIVERGENCES)
# Logits of an untrained model, and of one that is nearly always sure.
each_scale = pytest.mark.parametrize('scale', [1.0, 30.0])


def random_logits(scale, shape=(3, 4, 11)):
  """Returns a teacher's and a student's logits, as float32 can hold them.

  In the first row the models nearly agree: two that are sure of different ids
  have next to no gradient of a bounded divergence.
  """
  rng = np.random.default_rng(0)
  teacher, student = scale * rng.standard_normal((2, *shape))
  student[0] = teacher[0] + rng.standard_normal(shape[1:])
  return teacher.astype(np.float32), student.astype(np.float32)


def rounding(name, scale):
  """Returns what float32 may add to a value or gradient of random_logits.

  A few roundings of 6e-8: of log-probabilities of some `scale` nats in a KL; of
  numbers below 1 in the bounded divergences.
  """
  return 4e-7 * (scale if name.endswith('kl') else 1.0)


def value_and_grad(name, teacher_logits, student_logits):
  """Returns the divergence [...] and its gradient [..., V]."""
  teacher_logits = jnp.asarray(teacher_logits)

  def total(student_logits):
    value = DIVERGENCES[name](
      teacher_logits=teacher_logits, student_logits=student_logits
    )
    return value.sum(), value

  grad, value = jax.grad(total, has_aux=True)(jnp.asarray(student_logits))
  return np.asarray(value), np.asarray(grad)


def log_of(probs):
  with np.errstate(divide='ignore'):
    return np.log(np.asarray(probs)).astype(np.float32)


# ---------------------------------------------------------------- definitions

# Teacher, student. Not one is a permutation of the other: where it is, forward
# and reverse KL are equal and a swap of the models would not be seen.
PAIRS = {
  'A': ((0.7, 0.2, 0.1), (0.1, 0.3, 0.6)),
  'C': ((0.55, 0.25, 0.15, 0.05), (0.35, 0.4, 0.05, 0.2)),
  'D': ((0.4, 0.35, 0.15, 0.1), (0.2, 0.1, 0.3, 0.4)),
}
# Of the pairs above, computed in float64 outside this repository.
VALUES = {
  'forward_kl': (1.101868135794281, 0.226568035991470, 0.473124398001376),
  'reverse_kl': (1.002104199063751, 0.252134916178797, 0.498556165654414),
  'jsd_0.1': (0.092673940230354, 0.020294717371902, 0.041915615573155),
  'jsd_0.5': (0.230645487904113, 0.057111054421979, 0.114692741532649),
  'jsd_0.9': (0.086496500775969, 0.022009429773397, 0.043598625334183),
  'total_variation': (0.6, 0.3, 0.45),
}
KNOWN_GRADIENTS = {
  ('forward_kl', 'A'): (-0.6, 0.1, 0.5),
  ('reverse_kl', 'A'): (-0.294801434812, -0.178991727287, 0.473793162099),
  ('jsd_0.1', 'A'): (-0.043684250222, 0.005001648184, 0.038682602038),
  ('jsd_0.5', 'A'): (-0.081287964624, -0.008571506186, 0.089859470810),
  ('jsd_0.9', 'A'): (-0.026094472912, -0.011894230706, 0.037988703618),
  ('total_variation', 'A'): (-0.09, 0.03, 0.06),
  ('forward_kl', 'C'): (-0.2, 0.15, -0.1, 0.15),
  ('reverse_kl', 'C'): (
    *(-0.246442013973, 0.087147485227),
    *(-0.067537360242, 0.226831888988),
  ),
  ('jsd_0.1', 'C'): (
    *(-0.018233812432, 0.012926140251),
    *(-0.008308657101, 0.013616329282),
  ),
}


@pytest.mark.parametrize('pair', PAIRS)
@each_divergence
def test_divergence_has_its_known_value(name, pair):
  teacher, student = map(log_of, PAIRS[pair])

  got = DIVERGENCES[name](teacher_logits=teacher, student_logits=student)

  want = VALUES[name][list(PAIRS).index(pair)]
  # Four terms near 1: a few float32 roundings of 6e-8. Conventions differ by
  # 1e-3 and more.
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(('name', 'pair'), KNOWN_GRADIENTS)
def test_gradient_has_its_known_value(name, pair):
  teacher, student = map(log_of, PAIRS[pair])

  _, got = value_and_grad(name, teacher, student)

  # As above.
  np.testing.assert_allclose(
    got, KNOWN_GRADIENTS[name, pair], rtol=0, atol=1e-6
  )


@each_scale
@each_divergence
def test_divergence_matches_its_float64_definition(name, scale):
  teacher, student = random_logits(scale)

  got = DIVERGENCES[name](teacher_logits=teacher, student_logits=student)

  want = REFERENCES[name](teacher_logits=teacher, student_logits=student)
  assert got.shape == want.shape == (3, 4)
  np.testing.assert_allclose(got, want, rtol=0, atol=rounding(name, scale))


@each_scale
@each_divergence
def test_gradient_matches_its_float64_formula(name, scale):
  teacher, student = random_logits(scale)

  _, got = value_and_grad(name, teacher, student)

  want = GRADIENTS[name](teacher_logits=teacher, student_logits=student)
  np.testing.assert_allclose(got, want, rtol=0, atol=rounding(name, scale))


@pytest.mark.parametrize(
  ('beta', 'want'), [(0.1, 0.04786), (0.5, 0.13292), (0.9, 0.05100)]
)
def test_jsd_equals_trls(beta, want):
  # TRL's own numbers for this pair, rounded to 5 digits.
  teacher, student = log_of([0.2, 0.5, 0.3]), log_of([0.7, 0.2, 0.1])

  got = divergences.generalized_jsd(
    teacher_logits=teacher, student_logits=student, beta=beta
  )

  np.testing.assert_allclose(got, want, rtol=0, atol=6e-6)


def test_forward_and_reverse_kl_equal_trls_ends_of_beta():
  teacher, student = log_of([0.2, 0.5, 0.3]), log_of([0.7, 0.2, 0.1])
  logits = {'teacher_logits': teacher, 'student_logits': student}

  # As above. TRL's beta=0 is KL(P || Q), its beta=1 KL(Q || P).
  np.testing.assert_allclose(
    divergences.forward_kl(**logits), 0.53718, rtol=0, atol=6e-6
  )
  np.testing.assert_allclose(
    divergences.reverse_kl(**logits), 0.58381, rtol=0, atol=6e-6
  )


# ----------------------------------------------------------------- properties


@each_scale
@each_divergence
def test_divergence_lies_between_its_bounds(name, scale):
  teacher, student = random_logits(scale, shape=(200, 11))
  most = {
    'forward_kl': math.inf,
    'reverse_kl': math.inf,
    'jsd_0.1': references.largest_jsd(0.1),
    'jsd_0.5': math.log(2.0),
    'jsd_0.9': references.largest_jsd(0.9),
    'total_variation': 1.0,
  }[name]

  got = DIVERGENCES[name](teacher_logits=teacher, student_logits=student)

  # 1e-6: rounding may carry a value over a bound that it touches.
  assert got.min() >= -1e-6
  assert got.max() <= most + 1e-6


@each_scale
@each_divergence
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(name, scale):
  logits, _ = random_logits(scale)

  value, grad = value_and_grad(name, logits, logits)

  # The log-probabilities are equal, or, of M, equal up to a rounding: what is
  # left does not grow with the scale.
  np.testing.assert_allclose(value, 0.0, atol=2e-7)
  np.testing.assert_allclose(grad, 0.0, atol=2e-7)


@each_divergence
def test_adding_a_constant_to_all_logits_changes_nothing(name):
  teacher, student = random_logits(1.0)

  value, grad = value_and_grad(name, teacher, student)
  shifted = value_and_grad(name, teacher + 64.0, student - 32.0)

  # Logits near 64 are rounded by 4e-6, and 11 of them add up.
  np.testing.assert_allclose(shifted[0], value, rtol=0, atol=2e-5)
  np.testing.assert_allclose(shifted[1], grad, rtol=0, atol=2e-5)


@pytest.mark.parametrize('beta', [0.1, 0.5, 0.7])
def test_jsd_of_swapped_models_is_jsd_of_one_minus_beta(beta):
  a, b = random_logits(1.0)

  got = divergences.generalized_jsd(
    teacher_logits=a, student_logits=b, beta=beta
  )
  swapped = divergences.generalized_jsd(
    teacher_logits=b, student_logits=a, beta=1.0 - beta
  )

  # JSD < 1: a few roundings of 6e-8.
  np.testing.assert_allclose(got, swapped, rtol=0, atol=1e-6)


@pytest.mark.parametrize('pair', PAIRS)
def test_jsd_of_beta_and_of_one_minus_beta_are_not_interchangeable(pair):
  teacher, student = map(log_of, PAIRS[pair])

  low, low_grad = value_and_grad('jsd_0.1', teacher, student)
  high, high_grad = value_and_grad('jsd_0.9', teacher, student)

  # The known values differ by 4 to 8 %, the directions of the gradients by 13
  # degrees and more.
  assert abs(low / high - 1.0) > 0.03
  cosine = (
    (low_grad * high_grad).sum()
    / np.linalg.norm(low_grad)
    / np.linalg.norm(high_grad)
  )
  assert 0.0 < cosine < math.cos(math.radians(12.0))


BETA = 1e-3  # near an end, and JSD still well above float32's roundings
# The remainder is of the order of beta: 0.2 % on pair A, whose KLs differ by
# 10 %. A rounding of 1e-7 of the value, over beta, is 1e-4.
NEAR = {'rtol': 0.01, 'atol': 2e-4}


@pytest.mark.parametrize('pair', PAIRS)
def test_jsd_over_beta_tends_to_forward_kl(pair):
  teacher, student = map(log_of, PAIRS[pair])
  logits = {'teacher_logits': teacher, 'student_logits': student}

  got = divergences.generalized_jsd(**logits, beta=BETA) / BETA

  np.testing.assert_allclose(got, references.forward_kl(**logits), **NEAR)


@pytest.mark.parametrize('pair', PAIRS)
def test_jsd_over_one_minus_beta_tends_to_reverse_kl(pair):
  teacher, student = map(log_of, PAIRS[pair])
  logits = {'teacher_logits': teacher, 'student_logits': student}

  got = divergences.generalized_jsd(**logits, beta=1.0 - BETA) / BETA

  np.testing.assert_allclose(got, references.reverse_kl(**logits), **NEAR)


@pytest.mark.parametrize(
  ('beta', 'want'),
  [
    (BETA, references.forward_kl_gradient),
    (1.0 - BETA, references.reverse_kl_gradient),
  ],
)
def test_jsd_near_an_end_has_the_gradient_of_a_kl_times_the_distance(
  beta, want
):
  teacher, student = map(log_of, PAIRS['C'])

  def jsd(student_logits):
    return divergences.generalized_jsd(
      teacher_logits=teacher, student_logits=student_logits, beta=beta
    )

  got = jax.grad(jsd)(student) / BETA

  np.testing.assert_allclose(
    got, want(teacher_logits=teacher, student_logits=student), **NEAR
  )


@pytest.mark.parametrize('beta', [1e-9, 1.0 - 1e-9])
def test_jsd_is_0_and_never_nan_where_float32_takes_beta_for_an_end(beta):
  teacher, student = map(jnp.asarray, random_logits(30.0))

  def total(student_logits):
    return divergences.generalized_jsd(
      teacher_logits=teacher, student_logits=student_logits, beta=beta
    ).sum()

  value, grad = jax.value_and_grad(total)(student)

  # 12 values of 1e-9 times a KL of at most 200.
  np.testing.assert_allclose(value, 0.0, atol=1e-5)
  np.testing.assert_allclose(grad, 0.0, atol=1e-5)


# ---------------------------------------------------- masked ids, hard inputs

each_mask = pytest.mark.parametrize('mask', [-1e9, -np.inf])


@each_mask
@each_divergence
def test_ids_that_both_models_mask_do_not_exist(name, mask):
  teacher, student = random_logits(1.0)
  masked_teacher, masked_student = teacher.copy(), student.copy()
  masked_teacher[..., [0, 7]] = masked_student[..., [0, 7]] = mask
  used = [i for i in range(11) if i not in (0, 7)]

  value, grad = value_and_grad(name, masked_teacher, masked_student)

  want = value_and_grad(name, teacher[..., used], student[..., used])
  # The same sums with zeros in them, so rounded in another order.
  np.testing.assert_allclose(value, want[0], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(grad[..., used], want[1], rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(grad[..., [0, 7]], 0.0)


@each_mask
@each_divergence
def test_an_id_that_only_the_student_masks_costs_a_finite_amount(name, mask):
  teacher, student = random_logits(1.0)
  student[..., 7] = mask

  value, grad = value_and_grad(name, teacher, student)

  want = REFERENCES[name](
    teacher_logits=teacher,
    student_logits=np.where(student == mask, -np.inf, student),
  )
  if name == 'forward_kl':
    assert np.isinf(want).all()
    # log Q is -1e9 there: 1e9 nats times what the teacher gives the id.
    want = 1e9 * references.softmax(teacher)[..., 7]
  # Rounding: 1e9 is kept to 64.
  np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-6)
  assert np.isfinite(grad).all()


@each_mask
@each_divergence
def test_an_id_that_only_the_teacher_masks_costs_a_finite_amount(name, mask):
  teacher, student = random_logits(1.0)
  teacher[..., 7] = mask

  value, grad = value_and_grad(name, teacher, student)

  want = REFERENCES[name](
    teacher_logits=np.where(teacher == mask, -np.inf, teacher),
    student_logits=student,
  )
  q = references.softmax(student)
  if name == 'reverse_kl':
    assert np.isinf(want).all()
    want = 1e9 * q[..., 7]
    # The student is told, with a gradient of the same size, to stop saying it.
    np.testing.assert_allclose(
      grad[..., 7], 1e9 * (q * (1.0 - q))[..., 7], rtol=1e-5
    )
  # Rounding: 1e9 is kept to 64.
  np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-6)
  assert np.isfinite(grad).all()


@each_mask
@pytest.mark.parametrize(
  ('name', 'want'),
  [
    ('jsd_0.1', 0.325082973391448),
    ('jsd_0.5', 0.693147180559945),
    ('jsd_0.9', 0.325082973391448),
    ('total_variation', 1.0),
    ('forward_kl', 1e9),  # infinite; 1e9 stands for it
    ('reverse_kl', 1e9),
  ],
)
def test_models_that_share_no_id_are_finitely_far_apart(name, want, mask):
  teacher = np.array([0.0, mask], np.float32)
  student = np.array([mask, 0.0], np.float32)

  value, grad = value_and_grad(name, teacher, student)

  # One rounding or two.
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert np.isfinite(grad).all()


@each_divergence
def test_bfloat16_logits_are_compared_in_float32(name):
  # Near one another: bfloat16 arithmetic would leave nothing of the value.
  teacher, _ = random_logits(1.0)
  student = teacher + 0.1 * random_logits(1.0)[1]
  teacher, student = jnp.bfloat16(teacher), jnp.bfloat16(student)

  got = DIVERGENCES[name](teacher_logits=teacher, student_logits=student)

  want = DIVERGENCES[name](
    teacher_logits=teacher.astype(jnp.float32),
    student_logits=student.astype(jnp.float32),
  )
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)


# ------------------------------------------------------------------- refusals


@pytest.mark.parametrize('beta', [0, 1, 0.0, 1.0, -0.1, 1.1, math.nan, None])
def test_jsd_refuses_a_beta_that_is_no_mixture_and_names_the_kls(beta):
  logits = jnp.zeros(3)

  with pytest.raises(ValueError, match='0 < beta < 1') as error:
    divergences.generalized_jsd(
      teacher_logits=logits, student_logits=logits, beta=beta
    )

  assert f'beta={beta}' in str(error.value)
  assert 'forward_kl, KL(teacher || student)' in str(error.value)
  assert 'reverse_kl, KL(student || teacher)' in str(error.value)


@each_divergence
def test_logits_must_be_named_so_that_models_cannot_be_swapped(name):
  with pytest.raises(TypeError, match='positional'):
    DIVERGENCES[name](jnp.zeros(3), jnp.ones(3))


# ------------------------------------------- bugs that users of TRL had to find


@pytest.mark.parametrize('beta', [0.1, 0.9])
def test_trl_bug_mixture_weights_swapped(beta):
  """TRL pull request 3043: M was beta Q + (1 - beta) P for half a year."""
  teacher, student = random_logits(1.0)
  p, q = references.softmax(teacher), references.softmax(student)

  got = divergences.generalized_jsd(
    teacher_logits=teacher, student_logits=student, beta=beta
  )

  m = beta * q + (1.0 - beta) * p
  bug = beta * references.kl(p, m) + (1.0 - beta) * references.kl(q, m)
  # M lies near the model of little weight there: several times the value.
  assert (bug > 2.0 * np.asarray(got)).all()


def test_trl_bug_mixture_of_log_probabilities():
  """TRL issue 2202: M was exp(beta log P + (1 - beta) log Q), unnormalised.

  Then one id that one model rules out is ruled out of M, and costs 1e9.
  """
  teacher = np.array([0.0, 0.0, -1e9], np.float32)
  student = np.array([-1e9, 0.0, 0.0], np.float32)

  got = divergences.generalized_jsd(
    teacher_logits=teacher, student_logits=student, beta=0.5
  )

  # Half of each model's mass is shared. A rounding or two.
  np.testing.assert_allclose(got, 0.5 * math.log(2.0), rtol=1e-6)


def test_trl_bug_nan_gradient_of_reverse_kl_with_infinite_logits():
  """TRL pull request 5594: 0 * inf in the backward pass."""
  teacher = np.array([-np.inf, 1.0, 0.5, 0.0, -np.inf], np.float32)
  student = np.array([-np.inf, 0.0, 0.5, 1.0, -np.inf], np.float32)

  _, grad = value_and_grad('reverse_kl', teacher, student)

  want = references.reverse_kl_gradient(
    teacher_logits=teacher, student_logits=student
  )
  # Three terms below 1: a few roundings of 6e-8.
  np.testing.assert_allclose(grad, want, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- names


def mine(*, teacher_logits, student_logits, scale=1.0):
  return scale * (teacher_logits - student_logits).max(axis=-1)


def test_reported_names_are_those_that_the_functions_have():
  assert {name: divergences.name_of(d) for name, d in DIVERGENCES.items()} == {
    name: name for name in DIVERGENCES
  }


@pytest.mark.parametrize(
  ('function', 'name'),
  [
    (mine, 'mine'),
    (functools.partial(mine, scale=0.3), 'mine_0.3'),
    # As gin wraps a function whose settings it has bound.
    (
      functools.wraps(divergences.generalized_jsd)(
        lambda **logits: divergences.generalized_jsd(beta=0.7, **logits)
      ),
      'jsd_0.7',
    ),
  ],
)
def test_a_divergence_is_reported_under_its_own_name(function, name):
  own = divergences.Divergence(function)

  assert divergences.reported(own) == {name: function} | divergences.REPORTED


def test_a_divergence_may_be_given_a_name():
  own = divergences.Divergence(mine, name='yours')

  assert list(divergences.reported(own)) == ['yours', *divergences.REPORTED]


@pytest.mark.parametrize(
  'settings',
  [
    {'reads': ('author',)},
    {'init': dict, 'update': lambda carried, means: carried},
    {'init_heads': lambda rng: {}},
  ],
)
def test_what_needs_more_than_logits_is_measured_in_training_alone(settings):
  own = divergences.Divergence(mine, **settings)

  assert divergences.reported(own) == divergences.REPORTED


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    (
      {'reads': ('logits',)},
      r"Divergence.reads may contain .* got \['logits'\]",
    ),
    ({'init': dict}, 'init and Divergence.update must be set together'),
  ],
)
def test_parts_of_a_divergence_that_do_not_fit_are_refused(settings, text):
  with pytest.raises(ValueError, match=text):
    divergences.Divergence(mine, **settings)
