# SPDX-License-Identifier: Apache-2.0
"""Credits as functions of arrays; step_reward_test has their part in a step."""

import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.batch import Outputs
from gkd_jax.distill import credit
from gkd_jax.distill.policies import DATASET, STUDENT, TEACHER, Rollouts

# MiniLLM on three tokens; the last row has two, then padding.
TEACHER_PROBS = np.float32([[0.5, 0.2, 0.8], [0.5, 0.2, 1.0]])
STUDENT_PROBS = np.float32([[0.25, 0.4, 0.8], [0.25, 0.4, 1.0]])
WEIGHTS = np.float32([[1, 1, 1], [1, 1, 0]])


def evidence(author=STUDENT, drawn_at=STUDENT_PROBS):
  rollouts = Rollouts(
    Outputs(jnp.zeros((2, 3), jnp.int32), jnp.asarray(WEIGHTS)),
    jnp.full((2, 3), author, jnp.int8),
    jnp.log(drawn_at) * WEIGHTS,
  )
  log_probs = credit.LogProbs(jnp.log(STUDENT_PROBS), jnp.log(TEACHER_PROBS))
  return credit.Evidence(
    rollouts,
    jnp.arange(2),
    lambda: log_probs,
    compute_rewards=None,
    sample_greedy=None,
    all_by_student=True,
    coefficients_BT=WEIGHTS / WEIGHTS.sum(axis=1, keepdims=True),
  )


def test_a_token_is_worth_the_mean_log_ratio_of_later_tokens():
  worth = credit.minillm_long_term().assign(evidence())

  # ln .5/.25 = .6931, ln .2/.4 = -.6931, ln .8/.8 = 0; Eq. 2 divides by length.
  want = [[-0.3465735903 / 3, 0.0, 0.0], [-0.6931471806 / 2, 0.0, 0.0]]
  np.testing.assert_allclose(worth.per_token, want, rtol=1e-5, atol=1e-8)
  # Means of (.6931 - .6931 + 0) / 3 and of (.6931 - .6931) / 2, summed.
  np.testing.assert_allclose(worth.sums['log_ratio'], 0.0, atol=1e-6)


def test_the_long_term_part_completes_the_gradient_of_the_sequence_kl():
  """Two tokens of three ids: all outputs are enumerated, in float64."""
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((4, 3))  # first token; second after each first

  def probs(logits):
    e = np.exp(logits)
    return e / e.sum(axis=-1, keepdims=True)

  p, q = probs(rng.standard_normal((4, 3))), probs(logits)
  second = (q[1:] * np.log(q[1:] / p[1:])).sum(axis=1)  # KL after each first

  def of_later_tokens(first_logits):
    # The part of KL(Q || P) that depends on the first token by what follows.
    return (probs(first_logits) * second).sum()

  want = [
    (of_later_tokens(logits[0] + h) - of_later_tokens(logits[0] - h)) / 2e-6
    for h in 1e-6 * np.eye(3)
  ]
  first, then = np.divmod(np.arange(9), 3)
  chosen = [np.stack([x[0, first], x[1 + first, then]], 1) for x in (q, p)]
  log_probs = credit.LogProbs(*(jnp.log(jnp.float32(x)) for x in chosen))
  everywhere = jnp.ones((9, 2), jnp.float32)
  outputs = Outputs(jnp.int32(np.stack([first, then], 1)), everywhere)
  author = jnp.full((9, 2), STUDENT, jnp.int8)
  worth = (
    credit.minillm_long_term()
    .assign(
      credit.Evidence(
        Rollouts(outputs, author, log_probs.student),
        jnp.arange(9),
        lambda: log_probs,
        compute_rewards=None,
        sample_greedy=None,
        all_by_student=True,
        coefficients_BT=everywhere,
      )
    )
    .per_token[:, 0]
  )

  grad_log_q = np.eye(3)[first] - q[0]
  probability = chosen[0].prod(axis=1)
  got = -(probability * np.float64(worth)) @ grad_log_q
  # float32 log-ratios near 1, and central differences of 1e-6.
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_tokens_of_a_mixture_have_importance_weights():
  mixture = 0.2 * TEACHER_PROBS + 0.8 * STUDENT_PROBS

  worth = credit.minillm_long_term(2.0).assign(
    evidence(author=TEACHER, drawn_at=mixture)
  )

  # Q / (a P + (1 - a) Q) of the first token is .25 / .3 = .8333.
  np.testing.assert_allclose(
    worth.per_token[:, 0],
    2.0 * 0.8333333333 * np.float64([-0.3465735903 / 3, -0.6931471806 / 2]),
    rtol=1e-5,
  )


def test_tokens_of_the_dataset_have_no_long_term_gradient():
  worth = credit.minillm_long_term().assign(evidence(author=DATASET))

  assert not worth.per_token.any()


def test_at_weight_0_the_log_ratio_is_measured_only():
  made = credit.minillm_long_term(0.0)

  assert made.assign(evidence()).per_token is None
  assert not made.learns


def test_a_negative_weight_is_refused():
  with pytest.raises(ValueError, match='weight must not be negative'):
    credit.minillm_long_term(-1.0)


def test_the_mean_of_later_tokens_ignores_what_does_not_count():
  mean = credit.mean_of_later(
    jnp.float32([[1.0, 2.0, 4.0, 100.0]]), jnp.bool_([[1, 1, 1, 0]])
  )

  np.testing.assert_array_equal(mean, [[3.0, 4.0, 0.0, 0.0]])
