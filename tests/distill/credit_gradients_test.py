# SPDX-License-Identifier: Apache-2.0
"""The gradient of each credit against float64 differences of what it descends.

A credit returns constants; here they scale the gradients of ln Q(y_t) and of
ln sum exp, and the sum is compared with central differences of the loss, with
its expectation, or with test vectors.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.batch import Outputs
from gkd_jax.distill import credit, rewards
from gkd_jax.distill.policies import STUDENT, TEACHER, Rollouts

# Five ids: the student's and the teacher's distribution of one token.
STUDENT_LOGITS = np.array([0.5, -1.0, 0.2, 1.5, -0.3])
TEACHER_LOGITS = np.array([1.0, 0.4, -0.6, 0.3, -1.2])


def log_softmax(logits):
  return logits - lse(logits)[..., None]


def lse(logits):
  highest = logits.max(axis=-1, keepdims=True)
  return highest[..., 0] + np.log(np.exp(logits - highest).sum(axis=-1))


def differences(function, x, step=1e-5):
  """Returns central differences, float64, of a function of x."""
  found = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    h = np.zeros_like(x)
    h[i] = step
    found[i] = (function(x + h) - function(x - h)) / (2 * step)
  return found


def evidence(
  logits, tokens, weights, *, teacher=None, author=STUDENT, rewards=None, n=1
):
  """Returns what a credit sees of tokens [B, T] with logits [B, T, V]."""

  def of_tokens(x):
    return np.take_along_axis(log_softmax(x), tokens[..., None], -1)[..., 0]

  weights = np.float32(weights)
  log_probs = credit.LogProbs(
    *(
      None if x is None else jnp.float32(x * (weights > 0))
      for x in (
        of_tokens(logits),
        None if teacher is None else of_tokens(teacher),
        lse(logits),
      )
    )
  )
  outputs = Outputs(jnp.asarray(tokens), jnp.asarray(weights))
  author = jnp.broadcast_to(jnp.int8(author), tokens.shape)
  return credit.Evidence(
    Rollouts(outputs, author, log_probs.student),
    jnp.arange(len(tokens)),
    lambda: log_probs,
    lambda outputs: jnp.float32(rewards),
    sample_greedy=None,
    all_by_student=True,
    coefficients_BT=weights / np.maximum(weights.sum(1, keepdims=True), 1.0),
    outputs_per_input=n,
  )


def loss_gradient(worth, logits, tokens):
  """Returns the gradient [B, T, V] of the loss in the logits, float64."""
  q = np.exp(log_softmax(logits))
  is_token = np.eye(logits.shape[-1])[tokens]
  gradient = -np.float64(worth.per_token)[..., None] * (is_token - q)
  if worth.per_lse is not None:
    gradient -= np.float64(worth.per_lse)[..., None] * q
  return gradient


# --- IQLearn ------------------------------------------------------------------

# methods2, section 10: three tokens of three ids.
IQ_LOGITS = np.array([[[1.0, 0, -1], [0.5, 0.5, 0], [2, -1, 0]]])
IQ_TOKENS = np.array([[0, 2, 1]])


def iq_loss(logits, tokens, weights, *, weight, discount):
  """Without the likelihood, float64: mean over tokens, summed over rows."""
  total = 0.0
  for z, y, w in zip(logits, tokens, weights, strict=True):
    length = int(sum(w))
    v = np.append(lse(z[:length]), 0.0)
    chosen = z[np.arange(length), y[:length]]
    total += weight * np.mean((chosen - discount * v[1:]) ** 2)
  return total


@pytest.mark.parametrize(
  ('discount', 'want'), [(1.0, 1.8757578289674754), (0.9, 1.842195618825994)]
)
def test_iq_learn_adds_the_known_loss_to_the_likelihood(discount, want):
  seen = evidence(IQ_LOGITS, IQ_TOKENS, np.ones((1, 3)))

  worth = credit.iq_learn(0.1, discount).assign(seen)

  nll = -np.mean(np.float64(seen.log_probs().student))
  # float32 sums of three terms near 1.
  assert nll - worth.total == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize('discount', [0.0, 0.7, 1.0])
def test_iq_learn_has_the_gradient_of_its_loss(discount):
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((2, 4, 5))
  tokens = rng.integers(0, 5, (2, 4))
  weights = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])

  worth = credit.iq_learn(0.3, discount).assign(
    evidence(logits, tokens, weights)
  )

  got = loss_gradient(worth, logits, tokens)
  want = differences(
    lambda z: iq_loss(z, tokens, weights, weight=0.3, discount=discount),
    logits,
  )
  # The constants are float32, the differences exact to 1e-9.
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert -worth.total == pytest.approx(
    iq_loss(logits, tokens, weights, weight=0.3, discount=discount), rel=1e-5
  )


# --- Sampled reverse KL -------------------------------------------------------


def each_id(logits):
  """Returns (logits [V, 1, V], tokens [V, 1]): every id as an output."""
  num = len(logits)
  return np.tile(logits, (num, 1, 1)), np.arange(num)[:, None]


@pytest.mark.parametrize('reports', ['k1', 'k2'])
def test_sampled_reverse_kl_has_the_gradient_of_reverse_kl_on_average(reports):
  logits, tokens = each_id(STUDENT_LOGITS)
  seen = evidence(
    logits,
    tokens,
    np.ones((5, 1)),
    teacher=np.broadcast_to(TEACHER_LOGITS, logits.shape),
  )

  worth = credit.sampled_reverse_kl(reports=reports).assign(seen)

  def reverse_kl(z):
    log_q, log_p = log_softmax(z), log_softmax(TEACHER_LOGITS)
    return np.sum(np.exp(log_q) * (log_q - log_p))

  q = np.exp(log_softmax(STUDENT_LOGITS))
  got = np.einsum('b,bv->v', q, loss_gradient(worth, logits, tokens)[:, 0])
  np.testing.assert_allclose(
    got, differences(reverse_kl, STUDENT_LOGITS), atol=1e-6
  )


def test_discounted_returns_have_the_gradient_of_the_kl_of_whole_outputs():
  """Two tokens of three ids: all outputs are enumerated."""
  rng = np.random.default_rng(0)
  theirs = rng.standard_normal((4, 3))  # first token; second after each first
  ours = rng.standard_normal((4, 3))
  first, second = np.divmod(np.arange(9), 3)
  tokens = np.stack([first, second], axis=1)

  def of_outputs(z):  # [9, 2, 3]: the logits along each output
    return np.stack([z[0][None].repeat(9, 0), z[1:][first]], axis=1)

  def log_prob(z):
    chosen = np.take_along_axis(
      log_softmax(of_outputs(z)), tokens[..., None], 2
    )
    return chosen[..., 0].sum(axis=1)

  seen = evidence(
    of_outputs(ours), tokens, np.ones((9, 2)), teacher=of_outputs(theirs)
  )
  # The loss is a mean over two tokens.
  worth = credit.sampled_reverse_kl(2.0, discount=1.0).assign(seen)

  per_output = loss_gradient(worth, of_outputs(ours), tokens)
  q = np.exp(log_prob(ours))
  got = np.zeros((4, 3))
  for i in range(9):
    got[0] += q[i] * per_output[i, 0]
    got[1 + first[i]] += q[i] * per_output[i, 1]
  want = differences(
    lambda z: np.sum(np.exp(log_prob(z)) * (log_prob(z) - log_prob(theirs))),
    ours,
  )
  np.testing.assert_allclose(got, want, atol=1e-6)


ESTIMATES = {
  'k1': lambda r: -r,
  'k2': lambda r: r * r / 2,
  'k3': lambda r: np.exp(r) - 1 - r,
}


def kl_gradients():
  """Returns the gradients of KL(Q || P) and KL(P || Q) in the student."""
  log_p = log_softmax(TEACHER_LOGITS)

  def reverse(z):
    return np.sum(np.exp(log_softmax(z)) * (log_softmax(z) - log_p))

  def forward(z):
    return np.sum(np.exp(log_p) * (log_p - log_softmax(z)))

  return (differences(kl, STUDENT_LOGITS) for kl in (reverse, forward))


def ratio(z):
  return log_softmax(TEACHER_LOGITS) - log_softmax(z)


# The table of docs/methods.md; central differences are exact to 1e-8.
def test_what_differentiated_estimates_of_the_kl_descend():
  q = np.exp(log_softmax(STUDENT_LOGITS))
  reverse, forward = kl_gradients()

  def gradient(estimate):  # with y fixed, its mean over y
    return sum(
      q[y] * differences(lambda z, y=y: estimate(ratio(z)[y]), STUDENT_LOGITS)
      for y in range(5)
    )

  k1, k2, k3 = map(gradient, ESTIMATES.values())
  np.testing.assert_allclose(k1, 0.0, atol=1e-8)
  np.testing.assert_allclose(k2, reverse, atol=1e-8)
  np.testing.assert_allclose(k3, forward, atol=1e-8)


def test_what_estimates_of_the_kl_descend_as_costs():
  q = np.exp(log_softmax(STUDENT_LOGITS))
  score = np.eye(5) - q  # grad ln Q(y)
  reverse, forward = kl_gradients()

  k1, k2, k3 = (
    (q * estimate(ratio(STUDENT_LOGITS))) @ score
    for estimate in ESTIMATES.values()
  )

  np.testing.assert_allclose(k1, reverse, atol=1e-8)
  np.testing.assert_allclose(k3, reverse - forward, atol=1e-8)
  for of_either in (reverse, forward):
    assert np.abs(k2 - of_either).max() > 0.01


# --- Pairs --------------------------------------------------------------------

PAIR_TOKENS = np.array([[0, 2, 1], [1, 1, 0], [2, 0, 0], [0, 1, 2]])
PAIR_WEIGHTS = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])


def log_probs_of_pairs(logits):
  """Returns the log-probabilities [pairs, 2] of whole outputs."""
  chosen = np.take_along_axis(log_softmax(logits), PAIR_TOKENS[..., None], -1)
  return (chosen[..., 0] * PAIR_WEIGHTS).sum(axis=1).reshape(2, 2)


def check_gradient_of_pairs(of_credit, loss, teacher=None):
  """Compares with a loss that is a mean over two pairs."""
  logits = np.random.default_rng(0).standard_normal((4, 3, 3))
  worth = of_credit.assign(
    evidence(logits, PAIR_TOKENS, PAIR_WEIGHTS, teacher=teacher, n=2)
  )

  # The step divides by the number of rows.
  got = loss_gradient(worth, logits, PAIR_TOKENS) / 4
  np.testing.assert_allclose(got, differences(loss, logits), atol=1e-6)
  assert -worth.total / 4 == pytest.approx(loss(logits), rel=1e-5)


def test_dpo_has_the_gradient_of_its_loss():
  teacher = np.random.default_rng(1).standard_normal((4, 3, 3))

  def loss(logits):
    ratio = log_probs_of_pairs(logits) - log_probs_of_pairs(teacher)
    margin = 0.7 * (ratio[:, 0] - ratio[:, 1])
    return np.mean(np.log1p(np.exp(-margin)))

  check_gradient_of_pairs(credit.dpo(0.7), loss, teacher)


def test_redi_has_the_gradient_of_its_loss():
  def loss(logits):
    mean = log_probs_of_pairs(logits) / PAIR_WEIGHTS.sum(1).reshape(2, 2)
    return np.mean(-mean[:, 0] + 0.8 * mean[:, 1])

  check_gradient_of_pairs(credit.redi(0.8), loss)


def test_dpo_gives_the_outputs_of_a_pair_their_known_worth():
  # methods2, section 7.4: ln Q = (-10, -12), ln R = (-11, -12.5), beta = 0.1.
  seen = evidence(np.zeros((2, 1, 2)), np.zeros((2, 1), int), np.ones((2, 1)))
  log_probs = credit.LogProbs(
    jnp.float32([[-10.0], [-12.0]]), jnp.float32([[-11.0], [-12.5]])
  )

  worth = credit.dpo(0.1).assign(seen._replace(log_probs=lambda: log_probs))

  # Twice, because two rows share a mean over rows. Tolerance: float32.
  np.testing.assert_allclose(
    worth.per_token,
    2 * 0.048750260351578964 * np.array([[1.0], [-1.0]]),
    rtol=1e-6,
  )


# --- Groups -------------------------------------------------------------------


def advantages(baseline, rewards_B, n):
  worth = credit.reinforce(
    rewards.rouge_l(), 1.0, baseline, normalization='sequence'
  ).assign(
    evidence(
      np.zeros((len(rewards_B), 1, 3)),
      np.zeros((len(rewards_B), 1), int),
      np.ones((len(rewards_B), 1)),
      rewards=rewards_B,
      n=n,
    )
  )
  return np.asarray(worth.per_token)[:, 0]


def test_group_mean_is_over_the_other_outputs_of_the_same_input():
  got = advantages('group_mean', [1.0, 0.0, 2.0, 5.0, 5.0, 5.0], n=3)

  np.testing.assert_allclose(got, [0.0, -1.5, 1.5, 0.0, 0.0, 0.0], atol=1e-6)


def test_group_normalized_divides_by_the_deviation_within_a_group():
  got = advantages('group_normalized', [1.0, 0.0, 2.0, 5.0, 5.0, 5.0], n=3)

  # Standard deviation 1 (n - 1 in the denominator); equal rewards: nothing.
  np.testing.assert_allclose(got, [0.0, -1.0, 1.0, 0.0, 0.0, 0.0], atol=1e-5)


# --- J-BOND -------------------------------------------------------------------


def j_bond_worth(**settings):
  """methods2, section 8: three inputs; R = (-3.2726, 0.2, -0.6)."""
  ours = np.array([-4.0, -5.0, -3.0])
  anchors = np.array([-4.5, -4.8, -3.6])
  # Of each input: the student's output, and two of the anchor.
  student = np.stack([ours, [-1.0, -2.0, -3.0], [-2.0, -1.0, -1.5]], axis=1)
  teacher = np.stack([anchors, [-1.0] * 3, [-1.0] * 3], axis=1)
  log_probs = credit.LogProbs(
    *(jnp.float32(x.reshape(9, 1)) for x in (student, teacher))
  )
  rewards_ = [0.5, 1.0, 3.0, 2.0, 1.0, 3.0, 4.0, 3.0, 1.0]
  outputs = Outputs(jnp.zeros((9, 1), jnp.int32), jnp.ones((9, 1)))
  author = jnp.tile(jnp.int8([[STUDENT], [TEACHER], [TEACHER]]), (3, 1))
  return credit.j_bond(rewards.rouge_l(), **settings).assign(
    credit.Evidence(
      Rollouts(outputs, author, log_probs.student),
      jnp.arange(9),
      lambda: log_probs,
      lambda outputs: jnp.float32(rewards_),
      sample_greedy=None,
      all_by_student=False,
      coefficients_BT=jnp.ones((9, 1)),
      outputs_per_input=3,
    )
  )


def test_j_bond_gives_each_output_its_known_worth():
  worth = j_bond_worth(forward_weight=0.5, regularization=0.25)

  # b (R - B) - g (ln Q - ln A), then 1 - b for the better one; three rows an
  # input share a mean over rows.
  advantage = np.array([-3.07258872224, 2.13629436112, 0.93629436112])
  log_ratio = np.array([0.5, -0.2, 0.6])
  want = np.stack(
    [0.5 * advantage - 0.25 * log_ratio, [0.0, 0.0, 0.5], [0.5, 0.5, 0.0]],
    axis=1,
  )
  np.testing.assert_allclose(
    np.asarray(worth.per_token).reshape(3, 3), 3.0 * want, atol=1e-5
  )


def test_the_regulariser_of_j_bond_descends_the_kl_to_the_anchor():
  logits, tokens = each_id(STUDENT_LOGITS)
  log_p = log_softmax(TEACHER_LOGITS)
  regularized, without = (
    j_bond_worth(forward_weight=1.0, regularization=g).per_token
    for g in (1.0, 0.0)
  )

  # What it adds is -(ln Q - ln A) for the student's outputs, which on average
  # is the gradient of -KL(Q || A): see the test of the sampled reverse KL.
  np.testing.assert_allclose(
    np.asarray(regularized - without).reshape(3, 3)[:, 0],
    -3.0 * np.array([0.5, -0.2, 0.6]),
    atol=1e-5,
  )
  q = np.exp(log_softmax(STUDENT_LOGITS))
  worth = credit.Worth(
    jnp.float32(-(np.log(q) - log_p))[:, None], jnp.float32(0.0), {}
  )
  got = np.einsum('b,bv->v', q, loss_gradient(worth, logits, tokens)[:, 0])
  want = differences(
    lambda z: np.sum(np.exp(log_softmax(z)) * (log_softmax(z) - log_p)),
    STUDENT_LOGITS,
  )
  np.testing.assert_allclose(got, want, atol=1e-6)
