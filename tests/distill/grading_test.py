# SPDX-License-Identifier: Apache-2.0
"""Several teachers: their combinations, vectors, routing.

Vectors were computed in float64 with NumPy outside this repository, gradients
analytically and by central differences.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.batch import Batch, SpecialIds
from gkd_jax.distill import chunked_sums, grading, teachers
from gkd_jax.distill.divergences import forward_kl, reverse_kl
from gkd_jax.distill.objectives import Objective

pytestmark = pytest.mark.slow  # compiles models

NAMES = {'a': None, 'b': None}
PAD = 9.0  # logit of an id that no output has
log = np.log


class Table:
  """A model whose hidden states are its logits; notes what it runs on."""

  config = types.SimpleNamespace(vocab_size=None)

  def __init__(self, scale=1.0):
    self.scale = scale
    self.runs = []

  def apply(self, variables, *arguments, method, **keywords):
    del variables, keywords
    result = jnp.float32(arguments[0]) + 0.0
    if method == 'decode':
      encoded, _, tokens = arguments
      result = self.scale * jax.nn.one_hot(tokens, 4) + encoded.mean()
    if not isinstance(result, jax.core.Tracer):  # not for its shape alone
      self.runs.append(method)
    return result

  def gather_params(self, params):
    return params

  def head_params(self, params):
    return params


def grader_of(teacher, *models):
  named = dict(zip(sorted(NAMES), models or (Table(), Table()), strict=True))
  return grading.make_grader(teacher, None, named)


def rows(*all_logits):
  """[1, 2, 1 + V]: the logits at two places, with a pad id in front."""
  return [
    np.broadcast_to(np.float32([PAD, *x]), (1, 2, 1 + len(x)))
    for x in all_logits
  ]


def loss_and_gradient(teacher, divergence, student, *of_teachers):
  """Returns the mean loss over two chunks of one token, and its gradient."""
  grader = grader_of(teacher)
  (student,) = rows(student)
  ids = SpecialIds(0, 0, 1, (0,), num_ids=student.shape[-1])

  def loss(student):
    return chunked_sums.weighted_sums(
      Objective(divergence).terms(ids),
      grading.unembed(Table()),
      grader.unembed(ids),
      1,
      {},
      student,
      grader.heads({'a': {}, 'b': {}, 'teacher': {}}),
      grading.OfSeveral(tuple(rows(*of_teachers))),
      jnp.ones((1, 2), jnp.int32),
      jnp.full((1, 2), 0.5),
    )['loss']

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(student))
  return value, 2.0 * gradient[0, 1, 1:]


T1, T2, Q = log([0.7, 0.2, 0.1]), log([0.2, 0.2, 0.6]), log([0.3, 0.3, 0.4])
GEO = (0.456792843248, 0.244166045166, 0.299041111586)
DPO, REVERSE = (2.0, 1.0, 0.0, -1.0), (1.0, 1.5, 0.5, -1.0)
ALIGNED = (0.5, 0.5, 0.5, -0.5)


def reverse_kl_gradient(log_p, log_q):
  """Of KL(Q || P) by the student's logits."""
  q, ratio = np.exp(log_q), log_q - log_p
  return q * (ratio - (q * ratio).sum())


GUIDED = log([0.950330211697, 0.047314155222, 0.002355633081])
EXTRAPOLATED = teachers.extrapolated('a', 'b', 3.0)
VECTORS = {
  'mean of probabilities': (
    teachers.averaged(NAMES),
    forward_kl,
    (Q, T1, T2),
    0.05463028960845816,
    (-0.15, 0.1, 0.05),
  ),
  'mean of log-probabilities': (
    teachers.averaged(NAMES, 'log_probabilities'),
    reverse_kl,
    (Q, T1, T2),
    0.051999329914721545,
    # the mean of the teachers' gradients
    (reverse_kl_gradient(T1, Q) + reverse_kl_gradient(T2, Q)) / 2.0,
  ),
  'mean of log-probabilities, forward KL': (
    teachers.averaged(NAMES, 'log_probabilities'),
    forward_kl,
    (Q, T1, T2),
    0.05478921290721861,
    np.exp(Q) - GEO,
  ),
  'extrapolation': (
    EXTRAPOLATED,
    reverse_kl,
    (Q, (2.0, 1.0, 0.0), (1.0, 1.0, 1.0)),
    2.2620457881777747,
    reverse_kl_gradient(GUIDED, Q),
  ),
  'AlignDistil, scale 10': (
    teachers.adaptively_extrapolated('a', 'b', scale=10.0),
    reverse_kl,
    (ALIGNED, DPO, REVERSE),
    0.09849596101697715,
    (-0.034410436698, 0.014381515337, 0.018635056001, 0.001393865359),
  ),
  'AlignDistil, scale 15': (
    teachers.adaptively_extrapolated('a', 'b'),
    reverse_kl,
    (ALIGNED, DPO, REVERSE),
    0.09899669534783603,
    (-0.032837866087, 0.014536374475, 0.017372203665, 0.000929287948),
  ),
}


@pytest.mark.parametrize('name', VECTORS)
def test_a_combination_has_the_value_and_gradient_of_its_vector(name):
  teacher, divergence, logits, value, gradient = VECTORS[name]

  found = loss_and_gradient(teacher, divergence, *logits)

  # float32; the vectors have 12 digits.
  np.testing.assert_allclose(found[0], value, rtol=3e-6)
  np.testing.assert_allclose(found[1], gradient, rtol=3e-5, atol=3e-7)


@pytest.mark.parametrize(
  'teacher',
  [
    teachers.averaged(NAMES),
    teachers.averaged(NAMES, 'log_probabilities'),
    EXTRAPOLATED,
  ],
)
def test_the_same_teacher_twice_has_its_logits(teacher):
  (z,) = rows(np.random.default_rng(0).normal(size=7))

  combined = teacher.combine([z, z])

  np.testing.assert_array_equal(combined, z)


def test_a_guided_teacher_reads_with_and_without_context():
  model = Table()
  grader = grading.make_grader(teachers.guided(3.0), None, model)
  batch = Batch(
    jnp.ones((1, 2), jnp.int32),
    jnp.ones((1, 2), jnp.int32),
    jnp.ones((1, 2)),
    teacher_input_tokens=jnp.full((1, 3), 2, jnp.int32),
  )

  hidden = grader.hidden_states({'teacher': {}}, batch, jnp.int32([[1, 2]]))

  with_context, without = hidden.hidden
  np.testing.assert_array_equal(with_context - without, np.ones((1, 2, 4)))
  assert grader.names == ['with_context', 'without_context']


# --- Routing ------------------------------------------------------------------

TOKENS = jnp.int32([[1, 2], [3, 1], [2, 2]])
BATCH = Batch(TOKENS, TOKENS, jnp.float32(TOKENS > 0))
IDS = SpecialIds(0, 0, 1, (0,), num_ids=4)


def routed_logits(teacher_ids):
  """Returns the logits of rows, and what each model ran."""
  models = Table(1.0), Table(2.0)
  grader = grader_of(teachers.routed(NAMES), *models)
  batch = BATCH._replace(teacher_ids=jnp.int32(teacher_ids))
  params = {'a': {}, 'b': {}}
  with jax.disable_jit():  # a branch that is not taken does not run
    hidden = grader.hidden_states(params, batch, TOKENS)
    logits = grader.unembed(IDS)(grader.heads(params), hidden)
  return logits, [model.runs for model in models]


def test_each_row_has_the_logits_of_its_own_teacher():
  alone = [routed_logits([i] * 3)[0] for i in range(2)]

  logits, _ = routed_logits([1, 0, 1])

  assert np.abs(alone[0] - alone[1]).max() == 1.0
  for row, i in enumerate([1, 0, 1]):
    np.testing.assert_array_equal(logits[row], alone[i][row])


def test_a_teacher_that_no_row_names_does_not_run():
  _, runs = routed_logits([1, 1, 1])

  assert runs == [[], ['encode', 'decode', 'unembed']]


def test_the_rows_of_each_teacher_are_known():
  grader = grader_of(teachers.routed(NAMES))
  route = jnp.int32([[2, 0], [1, 0]])  # chunks are filled up with 0
  hidden = grading.OfSeveral((jnp.ones((2, 2, 4)),) * 2, route)

  graded = grader.unembed_each(IDS)(({}, {}), hidden)

  np.testing.assert_array_equal(graded.own_rows['a'], route == 1)
  np.testing.assert_array_equal(graded.own_rows['b'], route == 2)


# --- Parameters ---------------------------------------------------------------


def test_several_teachers_may_be_checkpoints_and_students():
  several = teachers.Several(
    {'old': teachers.checkpoint('a'), 'mean': teachers.ema(0.5)},
    {'old': teachers.Member('old'), 'mean': teachers.Member('mean')},
    teachers.mean_of_probabilities,
  )
  student = {'w': jnp.float32(2.0)}

  carried = several.update(several.init(student), {'w': jnp.float32(4.0)})

  assert carried == {'mean': {'w': 3.0}}
  params = several.params({'a': 'A'}, student, carried)
  assert params == {'old': 'A', 'mean': {'w': 3.0}}
  assert teachers.checkpoint_names(several) == ['a']
  in_evaluations = teachers.without_student(several, ['a'])
  assert [*in_evaluations.teachers] == ['a']


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda: teachers.averaged('x'),
      r'two or more teachers: set TEACHER_CHECK',
    ),
    (lambda: teachers.routed({'a': 'x'}), 'two or more teachers'),
    (lambda: teachers.averaged(NAMES, 'median'), 'mean must be one of'),
    (
      lambda: teachers.adaptively_extrapolated('a', 'b', scale=0.0),
      'scale must be above 0',
    ),
    (
      lambda: teachers.extrapolated('a', 'a'),
      r"teachers\.extrapolated needs two checkpoints.* both 'a'",
    ),
    (
      lambda: teachers.adaptively_extrapolated('a', 'a'),
      r'adaptively_extrapolated needs two checkpoints',
    ),
    (
      lambda: teachers.Several({}, {'m': teachers.Member('x')}, None),
      "The member 'm' must",
    ),
  ],
)
def test_teachers_without_a_meaning_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
