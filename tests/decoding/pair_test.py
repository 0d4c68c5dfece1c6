# SPDX-License-Identifier: Apache-2.0
"""The laws of tokens that student and teacher write together, enumerated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.decoding import pair
from gkd_jax.decoding.sampler import ANCESTRAL, GREEDY, SamplerConfig

pytestmark = pytest.mark.slow  # compiles models

TEACHER_LOGITS = np.array([2.0, 1.0, 0.5, -0.5, -2.0])
STUDENT_LOGITS = np.array([0.5, 1.5, -1.0, 1.0, 0.0])


def softmax(logits):
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


P, Q = softmax(TEACHER_LOGITS), softmax(STUDENT_LOGITS)


def midpoints(p):
  """A uniform number for each id, for which the id is drawn."""
  return np.cumsum(p) - p / 2


def choices(choose, shares=(1.0,), configs=(ANCESTRAL, ANCESTRAL)):
  """Returns all choices, in each of which one id or side is drawn by each.

  Args:
    choose: of `pair`.
    shares: probabilities of the cases of the third uniform number.
    configs: of student and teacher.

  Returns:
    Drawn, one row for each case, and the probability of each.
  """
  grids = [midpoints(Q), midpoints(P), midpoints(np.array(shares))]
  uniforms = [x.ravel() for x in np.meshgrid(*grids, indexing='ij')]
  cases = np.meshgrid(Q, P, shares, indexing='ij')
  probability = functools.reduce(np.multiply, cases).ravel()

  def side(logits, config):
    rows = jnp.broadcast_to(jnp.float32(logits), (len(probability), 5))
    return pair.Side(rows, config)

  drawn = jax.jit(
    lambda: choose(
      side(STUDENT_LOGITS, configs[0]),
      side(TEACHER_LOGITS, configs[1]),
      lambda i: jnp.float32(uniforms[i]),
    )
  )()
  return jax.tree.map(np.asarray, drawn), probability


def law(drawn, probability):
  return np.bincount(drawn.token_B, weights=probability, minlength=5)


@pytest.mark.parametrize(
  ('top_k', 'accepted', 'want'),
  [
    (
      1,
      0.1613771560,
      (0.6571899545, 0.1823993353, 0.1106307891, 0.0406987929, 0.0090811282),
    ),
    (
      2,
      0.6000457467,
      (0.3978391592, 0.5256581003, 0.0527618046, 0.0194099832, 0.0043309527),
    ),
    (
      3,
      0.6360538574,
      (0.3765503495, 0.5178263849, 0.0840197398, 0.0176624913, 0.0039410345),
    ),
    (5, 1.0, Q),
  ],
)
def test_interleaved_tokens_have_the_law_of_the_paper(top_k, accepted, want):
  drawn, probability = choices(pair.interleave(top_k))

  # Vectors of 10 digits.
  np.testing.assert_allclose(law(drawn, probability), want, atol=1e-9)
  share = (drawn.by_student_B * probability).sum()
  assert share == pytest.approx(accepted, abs=1e-9)
  of_author = np.where(
    drawn.by_student_B, np.log(Q)[drawn.token_B], np.log(P)[drawn.token_B]
  )
  # float32 log-softmax.
  np.testing.assert_allclose(drawn.log_prob_B, of_author, atol=1e-6)


def test_ranks_are_those_before_the_teachers_cut_offs():
  # They leave the teacher one id, and the student's first choice is another.
  cold = SamplerConfig(temperature=0.2, top_p=0.5)

  drawn, _ = choices(pair.interleave(2), configs=(GREEDY, cold))

  assert (drawn.token_B == STUDENT_LOGITS.argmax()).all()
  assert drawn.by_student_B.all()


def test_ids_that_tie_with_the_last_rank_are_accepted():
  logits = jnp.zeros((4, 5))
  side = pair.Side(logits, ANCESTRAL)

  drawn = pair.interleave(1)(side, side, lambda i: jnp.full(4, 0.5))

  assert drawn.by_student_B.all()


@pytest.mark.parametrize('share', [0.2, 0.5])
@pytest.mark.parametrize('of_mixture', [True, False])
def test_mixed_tokens_have_the_law_of_the_mixture(share, of_mixture):
  # The third number is the student's if it is at least the teacher's share.
  drawn, probability = choices(
    pair.mix(share, of_mixture), (share, 1.0 - share)
  )

  mixture = share * P + (1 - share) * Q
  np.testing.assert_allclose(law(drawn, probability), mixture, atol=1e-12)
  assert (drawn.by_student_B * probability).sum() == pytest.approx(1 - share)
  want = np.where(drawn.by_student_B, Q[drawn.token_B], P[drawn.token_B])
  if of_mixture:
    want = mixture[drawn.token_B]
  # float32 log-softmax.
  np.testing.assert_allclose(drawn.log_prob_B, np.log(want), atol=1e-6)


def test_importance_weights_of_the_mixture():
  p, q, share = [np.array(x) for x in ([0.5, 0.2, 0.8], [0.25, 0.4, 0.8], 0.2)]
  sides = [
    pair.Side(jnp.log(jnp.stack([x, 1 - x], axis=1)), ANCESTRAL) for x in (q, p)
  ]

  drawn = pair.mix(float(share), True)(*sides, lambda i: jnp.zeros(3))

  assert (drawn.token_B == 0).all()
  weights = q / np.exp(drawn.log_prob_B)
  # float32.
  np.testing.assert_allclose(
    weights, [0.8333333333, 1.1111111111, 1.0], rtol=1e-6
  )


def test_a_mixture_with_a_greedy_side_has_its_probability():
  drawn, _ = choices(
    pair.mix(0.25, True), (0.25, 0.75), configs=(ANCESTRAL, GREEDY)
  )

  want = 0.75 * Q + 0.25 * (np.arange(5) == P.argmax())
  np.testing.assert_allclose(
    drawn.log_prob_B, np.log(want)[drawn.token_B], atol=1e-6
  )
