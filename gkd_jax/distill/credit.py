# SPDX-License-Identifier: Apache-2.0
"""Credit: what makes a token of y more or less likely besides the objective.

    gradient = sum over tokens of  -worth * grad log Q(y_t)

A credit computes `worth` [B, T], a constant, from arrays of shape [B, T] and
[B]: log-probabilities, rewards, rows. It is called for each microbatch:
baselines and comparisons are within it. To add one, write a function that
returns a `Credit` and name it in a gin file.

REINFORCE is such a credit. A reward r depends on the student only through what
it writes, so its gradient is that of an expectation, estimated by
(r - b) grad log Q(y), with a baseline b that lowers the variance and adds no
bias.

Source: Agarwal et al. (2024), arXiv:2306.13649, Eq. 5.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import Outputs
from gkd_jax.distill.policies import Rollouts
from gkd_jax.distill.rewards import Reward

BASELINES = ('self_critical', 'batch_mean', 'none')
NORMALIZATIONS = ('sequence', 'token')


class LogProbs(NamedTuple):
  """Log-probabilities of y in nats, at temperature 1 and without gradient."""

  student: jax.Array  # [B, T] float32
  teacher: jax.Array | None  # [B, T] float32; None without a teacher


class Evidence(NamedTuple):
  """What a credit may use. What it does not use is not compiled.

  Attributes:
    rollouts: the outputs of this microbatch.
    row_ids_B: [B] int32 number of each row in the global batch.
    log_probs: () -> LogProbs, in one more pass over the vocabulary.
    score: outputs -> [B] float32, their reward. Only with `Credit.reward`.
    sample_greedy: () -> outputs that the student writes at temperature 0.
    all_by_student: whether the policy has the student write every output.
  """

  rollouts: Rollouts
  row_ids_B: jax.Array
  log_probs: Callable[[], LogProbs]
  score: Callable[[Outputs], jax.Array]
  sample_greedy: Callable[[], Outputs]
  all_by_student: bool


class Worth(NamedTuple):
  """What a credit returns.

  Attributes:
    per_token: [B, T] nats' worth, constant; None: nothing is learnt from it.
    total: [] what `per_token` raises, subtracted from the sum of the losses.
    sums: {name: []} metrics, summed over rows by the student.
  """

  per_token: jax.Array | None
  total: jax.Array
  sums: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Credit:
  """One way to give credit.

  Attributes:
    assign: Evidence -> Worth.
    reward: that `assign` reads; None: it reads none.
    judges_student: whether it is about outputs of the student alone.
    learns: whether anything is learnt from it; False: it is only measured.
    differentiates_draw: whether its gradient is that of an expectation over
      outputs, hence needs them drawn from the student's own distribution.
    min_rows: outputs that it compares with each other, at least.
  """

  assign: Callable[[Evidence], Worth]
  reward: Reward | None = None
  judges_student: bool = False
  learns: bool = True
  differentiates_draw: bool = False
  min_rows: int = 1


def reinforce(
  reward: Reward | None = None,
  weight: float | None = None,
  baseline: str = 'batch_mean',
  normalization: str = 'sequence',
) -> Credit | None:
  """REINFORCE: maximises the expected reward of the student's outputs.

  Whatever the reduction, the reward is added once a sequence: to the mean of
  its tokens' terms, or to their sum. With 'sequence' for reduction and
  normalization a reward of 1 weighs as much as a divergence of 1 nat at every
  token. A truncated output has the log-probability of the tokens it has.

  Args:
    reward: of an output; None without `weight`: there is no credit.
    weight: of the reward in the loss. With 0 the reward is measured, and
      nothing is learnt from it.
    baseline: b. 'batch_mean': the mean reward of the student's other outputs in
      the microbatch, which costs nothing; 'self_critical': the reward of the
      greedy output, which costs one more rollout and depends on how hard the
      input is; or 'none'.
    normalization: 'sequence': the log-probabilities of an output's tokens are
      summed, the exact gradient of the expected reward; or 'token': they are
      averaged, so that an output's gradient does not grow with its length.

  Raises:
    ValueError: a setting has no meaning, or reward and weight are not both set.
  """
  for name, value, choices in (
    ('REWARD_BASELINE', baseline, BASELINES),
    ('REWARD_NORMALIZATION', normalization, NORMALIZATIONS),
  ):
    if value not in choices:
      raise ValueError(f'{name} must be one of {choices}, got {value!r}.')
  if weight is not None and weight < 0.0:
    raise ValueError(f'REWARD_WEIGHT must not be negative: {weight}.')
  if (reward is None) != (weight is None):
    raise ValueError(
      'REWARD and REWARD_WEIGHT belong together, but '
      + (
        'REWARD_WEIGHT is None. Set it, to 0.0 if the reward is only to be '
        'measured, or set REWARD = None.'
        if weight is None
        else f'REWARD_WEIGHT is {weight} and there is no REWARD. Name one, '
        'e.g. @rewards.exact_match(), or set REWARD_WEIGHT = None.'
      )
    )
  if reward is None:
    return None
  learns = weight > 0.0

  def assign(evidence: Evidence) -> Worth:
    rewards_B, baselines_B = _rewards_and_baselines(
      evidence, baseline if learns else 'none'
    )
    sums = {'reward': rewards_B.sum()}
    if not learns:
      return Worth(None, jnp.float32(0.0), sums)
    advantages_B = rewards_B - baselines_B
    sums |= {
      'reward_baseline': baselines_B.sum(),
      'reward_advantage_squared': jnp.square(advantages_B).sum(),
    }
    weights_BT = evidence.rollouts.outputs.weights
    worth_BT = weight * advantages_B[:, None] * weights_BT
    if normalization == 'token':
      worth_BT /= jnp.maximum(weights_BT.sum(axis=1, keepdims=True), 1.0)
    return Worth(worth_BT, weight * sums['reward'], sums)

  return Credit(
    assign,
    reward,
    judges_student=True,
    learns=learns,
    differentiates_draw=learns,
    min_rows=2 if learns and baseline == 'batch_mean' else 1,
  )


def _rewards_and_baselines(evidence, baseline):
  """Returns reward and baseline of each row [B], 0 for rows by others.

  A batch of which the student wrote no row is not scored.
  """
  outputs, by_student_B = (
    evidence.rollouts.outputs,
    evidence.rollouts.by_student_B,
  )

  def scored():
    rewards_B = evidence.score(outputs)
    baselines_B = jnp.zeros_like(rewards_B)
    if baseline == 'self_critical':
      baselines_B = evidence.score(evidence.sample_greedy())
    elif baseline == 'batch_mean':
      baselines_B = leave_one_out_mean(rewards_B, by_student_B)
    return rewards_B, baselines_B

  def not_scored():
    return (jnp.zeros(by_student_B.shape, jnp.float32),) * 2

  if evidence.all_by_student:
    values = scored()
  else:
    values = jax.lax.cond(by_student_B.any(), scored, not_scored)
  return tuple(jnp.where(by_student_B, x, 0.0) for x in values)


def leave_one_out_mean(rewards_B: jax.Array, counts_B: jax.Array) -> jax.Array:
  """Returns, for each output, the mean reward of the others.

  Leaving the output's own reward out makes the baseline independent of it,
  hence the gradient unbiased. With it in, the gradient of B outputs would be
  too small by the factor 1 - 1/B.

  Args:
    rewards_B: [B].
    counts_B: [B] bool, which of them are averaged.

  Returns:
    [B]; 0 where there is no other.
  """
  others_B = jnp.sum(counts_B) - counts_B
  sum_B = jnp.sum(jnp.where(counts_B, rewards_B, 0.0)) - jnp.where(
    counts_B, rewards_B, 0.0
  )
  return jnp.where(others_B > 0, sum_B / jnp.maximum(others_B, 1), 0.0)


def reward_share(alpha: float) -> float:
  """Returns 1 - alpha, the weight of the reward in the paper's Eq. 5.

  Args:
    alpha: weight of the divergence: 1 is distillation alone, 0 reward alone.

  Raises:
    ValueError: alpha is outside [0, 1].
  """
  if not 0.0 <= alpha <= 1.0:
    raise ValueError(
      f'ALPHA must be in [0, 1], got {alpha}: the loss is ALPHA times the '
      'divergence, less 1 - ALPHA times the reward.'
    )
  return 1.0 - alpha
