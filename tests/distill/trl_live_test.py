# SPDX-License-Identifier: Apache-2.0
"""Divergences, gradients and the token mean against TRL's GKD loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.distill import divergences, objectives

torch = pytest.importorskip('torch', reason='needs torch: the extra [interop]')
gkd = pytest.importorskip(
  'trl.experimental.gkd',
  reason='needs trl: the extra [interop]',
  exc_type=ImportError,
)

pytestmark = pytest.mark.interop

VOCAB_SIZE = 300
# TRL's beta: 0 is the forward KL, 1 the reverse.
BETAS = {0.0: divergences.forward_kl, 1.0: divergences.reverse_kl} | {
  beta: functools.partial(divergences.generalized_jsd, beta=beta)
  for beta in (0.1, 0.5, 0.9)
}
each = pytest.mark.parametrize('beta', BETAS)


@pytest.fixture(scope='module')
def logits():
  """Logits of student and teacher [3, 5, V], as different as initially."""
  rng = np.random.default_rng(0)
  return [
    np.float32(3 * rng.standard_normal((3, 5, VOCAB_SIZE))) for _ in range(2)
  ]


@pytest.fixture(scope='module')
def weights():
  """Rows of 5, 3 and 1 tokens."""
  return np.float32([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def trl_loss(student, teacher, beta, weights=None, **keywords):
  labels = None
  if weights is not None:
    labels = torch.where(torch.tensor(weights) > 0, 5, -100)
  return gkd.GKDTrainer.generalized_jsd_loss(
    student, torch.tensor(teacher), labels, beta=beta, **keywords
  )


@each
def test_a_divergence_is_trls_summed_over_the_vocabulary(logits, beta):
  student, teacher = logits

  ours = BETAS[beta](student_logits=student, teacher_logits=teacher)

  theirs = trl_loss(torch.tensor(student), teacher, beta, reduction='none')
  # float32 on both sides, values up to 20.
  np.testing.assert_allclose(ours, theirs.sum(-1), rtol=1e-5, atol=1e-6)


@each
def test_the_token_mean_and_its_gradient_are_trls(logits, weights, beta):
  student, teacher = logits

  def loss(student):
    per_token = BETAS[beta](student_logits=student, teacher_logits=teacher)
    weights_BT, count = objectives.coefficients(jnp.asarray(weights), 'token')
    return (per_token * weights_BT).sum() / count

  value, grad = jax.value_and_grad(loss)(jnp.asarray(student))

  leaf = torch.tensor(student, requires_grad=True)
  theirs = trl_loss(leaf, teacher, beta, weights)
  theirs.backward()
  np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
  # Single entries are differences of probabilities near 1e-3.
  np.testing.assert_allclose(grad, leaf.grad, rtol=1e-4, atol=1e-7)
