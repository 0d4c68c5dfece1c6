# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from gkd_jax.batch import Batch
from gkd_jax.capacity import calls
from gkd_jax.distill import credit, policies, rewards

B, S, T = 4, 5, 3


def shape(*sizes, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(sizes, dtype)


BATCH = Batch(shape(B, S), shape(B, T), shape(B, T, dtype=jnp.float32))
TEACHER_IS_DEARER = {'sample_student': 1, 'sample_teacher': 3}


def weigh(number):
  return sum(n * TEACHER_IS_DEARER.get(name, 1) for name, n in number.items())


@pytest.mark.parametrize(
  ('policy', 'want'),
  [
    (policies.dataset(), {}),
    (policies.student(), {'sample_student': 1}),
    (policies.teacher(), {'sample_teacher': 1}),
    (policies.interleaved(), {'sample_pair': 1}),
    (policies.paired(), {'sample_student': 1, 'sample_teacher': 1}),
    # The student again after each correction, in a loop.
    (policies.corrected(3), {'sample_student': 4, 'compare': 3}),
    # One of the two writes; the teacher costs more.
    (policies.mixture(0.5, otherwise=policies.teacher), {'sample_teacher': 1}),
    (policies.mixture(0.5), {'sample_student': 1}),
    (
      policies.mixture(0.5, per='sequence', otherwise=policies.teacher),
      {'sample_student': 1, 'sample_teacher': 1},
    ),
    (policies.replay(capacity=8), {'sample_student': 1}),
  ],
)
def test_a_policy_calls_who_writes(policy, want):
  carried = ()
  if policy.init is not None:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), BATCH)
    carried = jax.eval_shape(policy.init, zeros)

  assert calls.of_policy(policy, BATCH, carried, weigh) == Counter(want)


@pytest.mark.parametrize(
  ('of', 'want'),
  [
    (
      credit.reinforce(rewards.rouge_l(), 0.5, 'self_critical'),
      {'compute_rewards': 2, 'sample_greedy': 1},
    ),
    (credit.reinforce(rewards.rouge_l(), 0.5), {'compute_rewards': 1}),
    (credit.minillm_long_term(), {'log_probs': 1}),
  ],
)
@pytest.mark.parametrize('all_by_student', [True, False])
def test_a_credit_calls_what_it_reads(of, want, all_by_student):
  got = calls.of_credit(
    of, B, T, all_by_student=all_by_student, has_teacher=True, weigh=weigh
  )

  assert got == Counter(want)
