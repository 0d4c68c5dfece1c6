# SPDX-License-Identifier: Apache-2.0
"""What the numbers should be: float64 NumPy, written from the paper.

Nothing here imports gkd_jax, and nothing is clever: probabilities are formed
and the definitions are summed. P is the teacher, Q the student. Divergences
and their gradients by the student's logits take logits [..., V], -inf allowed;
0 log 0 is 0, and a KL with an id that only the left side uses is inf.

Source: Agarwal et al. (2024), arXiv:2306.13649, section 2, Eq. 1 and 2.
"""

import functools

import numpy as np


def twin(divergence, suffix=''):
  """Returns what a divergence of gkd_jax should be, with the same settings.

  Args:
    divergence: a function, or a functools.partial of one.
    suffix: '_gradient' for its gradient by the student's logits.
  """
  if isinstance(divergence, functools.partial):
    return functools.partial(
      twin(divergence.func, suffix), **divergence.keywords
    )
  return globals()[divergence.__name__ + suffix]


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(logits):
  return np.exp(log_softmax(logits))


def log_ratio(a, b):
  """Returns ln(a / b), and 0 where a is 0, because such an id has no weight."""
  with np.errstate(divide='ignore', invalid='ignore'):
    return np.where(a > 0.0, np.log(a) - np.log(b), 0.0)


def kl(a, b):
  """KL(a || b) of probabilities."""
  return (a * log_ratio(a, b)).sum(axis=-1)


def forward_kl(*, teacher_logits, student_logits):
  return kl(softmax(teacher_logits), softmax(student_logits))


def reverse_kl(*, teacher_logits, student_logits):
  return kl(softmax(student_logits), softmax(teacher_logits))


def generalized_jsd(*, teacher_logits, student_logits, beta):
  p, q = softmax(teacher_logits), softmax(student_logits)
  m = beta * p + (1.0 - beta) * q
  return beta * kl(p, m) + (1.0 - beta) * kl(q, m)


def largest_jsd(beta):
  """Returns the maximum of JSD(beta), for distributions that share no id."""
  return -(beta * np.log(beta) + (1.0 - beta) * np.log(1.0 - beta))


def total_variation(*, teacher_logits, student_logits):
  p, q = softmax(teacher_logits), softmax(student_logits)
  return 0.5 * np.abs(p - q).sum(axis=-1)


def forward_kl_gradient(*, teacher_logits, student_logits):
  return softmax(student_logits) - softmax(teacher_logits)


def reverse_kl_gradient(*, teacher_logits, student_logits):
  p, q = softmax(teacher_logits), softmax(student_logits)
  return _through_softmax(q, log_ratio(q, p))


def generalized_jsd_gradient(*, teacher_logits, student_logits, beta):
  p, q = softmax(teacher_logits), softmax(student_logits)
  m = beta * p + (1.0 - beta) * q
  return (1.0 - beta) * _through_softmax(q, log_ratio(q, m))


def total_variation_gradient(*, teacher_logits, student_logits):
  p, q = softmax(teacher_logits), softmax(student_logits)
  return 0.5 * _through_softmax(q, np.sign(q - p))


def _through_softmax(q, slope):
  """q_k (slope_k - sum_j q_j slope_j)."""
  return q * (slope - (q * slope).sum(axis=-1, keepdims=True))


def negative_log_likelihood(logits, tokens):
  log_q = log_softmax(logits)
  return -np.take_along_axis(log_q, tokens[..., None], axis=-1)[..., 0]


def negative_log_likelihood_gradient(logits, tokens):
  return softmax(logits) - np.eye(np.shape(logits)[-1])[tokens]


def sequence_mean(losses_BT, weights_BT):
  """Eq. 2: the mean over each sequence's own tokens, then over sequences."""
  means = [
    (loss_T * weight_T).sum() / weight_T.sum()
    for loss_T, weight_T in zip(losses_BT, weights_BT, strict=True)
    if weight_T.sum() > 0.0
  ]
  return sum(means) / len(means)


def token_mean(losses_BT, weights_BT):
  """The mean over all tokens of the batch, whichever sequence they are in."""
  return (losses_BT * weights_BT).sum() / weights_BT.sum()


REDUCTIONS = {'sequence': sequence_mean, 'token': token_mean}


def trl_generalized_jsd_loss(
  *, student_logits, teacher_logits, labels, beta, temperature=1.0
):
  """TRL's GKD loss with reduction='batchmean', for an encoder-decoder.

  As in huggingface/trl f2cd577, trl/experimental/gkd/gkd_trainer.py, from which
  the special cases at the ends, log-space mixing and label -100 for "no token"
  are taken. There is no shift: a decoder's inputs are shifted already.
  """
  log_q = log_softmax(np.asarray(student_logits, np.float64) / temperature)
  log_p = log_softmax(np.asarray(teacher_logits, np.float64) / temperature)
  if beta == 0:
    jsd = np.exp(log_p) * (log_p - log_q)
  elif beta == 1:
    jsd = np.exp(log_q) * (log_q - log_p)
  else:
    log_m = np.logaddexp(log_q + np.log1p(-beta), log_p + np.log(beta))
    teacher = np.exp(log_p) * (log_p - log_m)
    student = np.exp(log_q) * (log_q - log_m)
    jsd = beta * teacher + (1 - beta) * student
  valid = labels != -100
  return jsd[valid].sum() / max(valid.sum(), 1)
