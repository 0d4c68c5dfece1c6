# SPDX-License-Identifier: Apache-2.0
"""Credit: a second gradient on the tokens of y, added to the objective's.

    gradient = sum over tokens of  -worth * grad log Q(y_t)

A credit computes the constant `worth` [B, T] from arrays of shape [B, T] and
[B]: log-probabilities, rewards, row numbers. It is called once per microbatch,
so baselines and comparisons never cross microbatches. To add one, write a
function that returns a `Credit` and name it in a gin file.

REINFORCE is a credit. The reward r depends on the student only through the
outputs that it samples, so the gradient of the expected reward is estimated by
(r - b) grad log Q(y). The baseline b lowers the variance and adds no bias.

Source: Agarwal et al. (2024), arXiv:2306.13649, Eq. 5.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import Outputs
from gkd_jax.distill.policies import DATASET, Rollouts
from gkd_jax.distill.rewards import Reward

BASELINES = ('self_critical', 'batch_mean', 'none')
NORMALIZATIONS = ('sequence', 'token')


class LogProbs(NamedTuple):
  """Log-probabilities of y in nats, at temperature 1; no gradient."""

  student: jax.Array  # [B, T] float32
  teacher: jax.Array | None  # [B, T] float32; None without a teacher


class Evidence(NamedTuple):
  """The inputs of a credit. Functions that it does not call cost nothing.

  Attributes:
    rollouts: the outputs of this microbatch.
    row_ids_B: [B] int32 number of each row in the global batch.
    log_probs: () -> LogProbs; costs one more pass over the vocabulary.
    compute_rewards: outputs -> [B] float32 rewards. Requires `Credit.reward`.
    sample_greedy: () -> the student's greedy outputs.
    all_by_student: whether the student writes every output under this policy.
    coefficients_BT: [B, T] weight of each token in the objective, before the
      division by the number of outputs or tokens.
  """

  rollouts: Rollouts
  row_ids_B: jax.Array
  log_probs: Callable[[], LogProbs]
  compute_rewards: Callable[[Outputs], jax.Array]
  sample_greedy: Callable[[], Outputs]
  all_by_student: bool
  coefficients_BT: jax.Array


class Worth(NamedTuple):
  """The result of a credit.

  Attributes:
    per_token: [B, T] constant weights of grad log Q(y_t); None: no gradient.
    total: [] the maximised quantity, subtracted from the reported loss.
    sums: {name: []} metrics, summed over rows that the student wrote.
  """

  per_token: jax.Array | None
  total: jax.Array
  sums: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Credit:
  """A credit and what it requires of the method.

  Attributes:
    assign: Evidence -> Worth.
    reward: the reward that `assign` reads; None: it reads none.
    student_outputs_only: whether it applies only to rows that the student
      wrote.
    learns: whether it contributes a gradient; False: it is only measured.
    is_policy_gradient: whether its gradient is that of an expectation over
      outputs, so that outputs must be drawn from the student's distribution.
    min_rows: the least number of rows in a microbatch, which it compares.
    needs_teacher: whether `assign` reads the teacher's log-probabilities.
  """

  assign: Callable[[Evidence], Worth]
  reward: Reward | None = None
  student_outputs_only: bool = False
  learns: bool = True
  is_policy_gradient: bool = False
  min_rows: int = 1
  needs_teacher: bool = False


def reinforce(
  reward: Reward | None = None,
  weight: float | None = None,
  baseline: str = 'batch_mean',
  normalization: str = 'sequence',
) -> Credit | None:
  """REINFORCE: maximises the expected reward of the student's outputs.

  The reward counts once per sequence under either `Objective.reduction`. If
  reduction and normalization are both 'sequence', a reward of 1 weighs as much
  as a divergence of 1 nat at every token. A truncated output is rewarded as it
  is, with the log-probability of its tokens.

  Args:
    reward: the reward of an output; None, together with `weight`, disables it.
    weight: of the reward in the loss. At 0 the reward is only measured.
    baseline: b. 'batch_mean': the mean reward of the student's other outputs in
      the microbatch, at no cost; 'self_critical': the reward of the greedy
      output, which adapts to each input and costs one more rollout; or 'none'.
    normalization: 'sequence': sums the log-probabilities of an output's tokens,
      the exact gradient of the expected reward; or 'token': averages them, so
      that the gradient does not grow with the length.

  Raises:
    ValueError: a value is invalid, or only one of reward and weight is set.
  """
  for name, value, choices in (
    ('REWARD_BASELINE', baseline, BASELINES),
    ('credit.reinforce.normalization', normalization, NORMALIZATIONS),
  ):
    if value not in choices:
      raise ValueError(f'{name} must be one of {choices}, got {value!r}.')
  if weight is not None and weight < 0.0:
    raise ValueError(f'REWARD_WEIGHT must not be negative: {weight}.')
  if (reward is None) != (weight is None):
    raise ValueError(
      'REWARD and REWARD_WEIGHT must be set together, but '
      + (
        'REWARD_WEIGHT is None. Set it (0.0 measures the reward only), or set '
        'REWARD = None.'
        if weight is None
        else f'REWARD_WEIGHT is {weight} and REWARD is None. Set REWARD, e.g. '
        'to @rewards.exact_match(), or set REWARD_WEIGHT = None.'
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
    student_outputs_only=True,
    learns=learns,
    is_policy_gradient=learns,
    min_rows=2 if learns and baseline == 'batch_mean' else 1,
  )


def minillm_long_term(weight: float = 1.0) -> Credit:
  """The part of MiniLLM's gradient that looks beyond the next token.

      R_t  = mean over t' > t of ln P(y_t') - ln Q(y_t')
      loss gradient = -w_t R_t grad ln Q(y_t)

  It complements an objective with `divergences.reverse_kl`, whose gradient is
  MiniLLM's exact one-token part. w_t = Q(y_t) / (probability at which y_t was
  drawn) is the importance weight: 1 for tokens that the student drew. Tokens of
  the dataset have no gradient.

  Args:
    weight: of this part; 0 measures it only.

  Raises:
    ValueError: weight is negative.

  Source: Gu et al. (2024), arXiv:2306.08543, Eq. 3 to 7, with its length
  normalization; the reward is not clipped. The paper's code sums from t' = t,
  which counts the current token twice.
  """
  if weight < 0.0:
    raise ValueError(
      f'credit.minillm_long_term.weight must not be negative: {weight}.'
    )

  def assign(evidence: Evidence) -> Worth:
    log_probs = evidence.log_probs()
    rollouts = evidence.rollouts
    is_token_BT = rollouts.outputs.weights > 0.0
    reward_BT = jnp.where(
      is_token_BT, log_probs.teacher - log_probs.student, 0.0
    )
    later_BT = mean_of_later(reward_BT, is_token_BT)
    is_drawn_BT = is_token_BT & (rollouts.author != DATASET)
    importance_BT = jnp.exp(log_probs.student - rollouts.log_probs)
    worth_BT = jnp.where(
      is_drawn_BT, importance_BT * later_BT * evidence.coefficients_BT, 0.0
    )
    length_B = jnp.maximum(is_token_BT.sum(axis=1), 1)
    sums = {'log_ratio': jnp.sum(reward_BT.sum(axis=1) / length_B)}
    per_token = weight * worth_BT if weight > 0.0 else None
    return Worth(per_token, jnp.float32(0.0), sums)

  return Credit(
    assign,
    learns=weight > 0.0,
    is_policy_gradient=weight > 0.0,
    needs_teacher=True,
  )


def mean_of_later(values_BT: jax.Array, counts_BT: jax.Array) -> jax.Array:
  """Returns, for each token, the mean over the later tokens of its row.

  Args:
    values_BT: [B, T].
    counts_BT: [B, T] bool, the tokens to average.

  Returns:
    [B, T]; 0 where there is no later token.
  """

  def later(x):
    return jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1] - x

  values_BT = jnp.where(counts_BT, values_BT, 0.0)
  number_BT = later(counts_BT.astype(values_BT.dtype))
  return jnp.where(
    number_BT > 0.0, later(values_BT) / jnp.maximum(number_BT, 1.0), 0.0
  )


def _rewards_and_baselines(evidence, baseline):
  """Returns reward [B] and baseline [B], 0 for rows the student did not write.

  The reward is not computed for a batch without such rows.
  """
  outputs, by_student_B = (
    evidence.rollouts.outputs,
    evidence.rollouts.by_student_B,
  )

  def compute():
    rewards_B = evidence.compute_rewards(outputs)
    baselines_B = jnp.zeros_like(rewards_B)
    if baseline == 'self_critical':
      baselines_B = evidence.compute_rewards(evidence.sample_greedy())
    elif baseline == 'batch_mean':
      baselines_B = leave_one_out_mean(rewards_B, by_student_B)
    return rewards_B, baselines_B

  def zeros():
    return (jnp.zeros(by_student_B.shape, jnp.float32),) * 2

  if evidence.all_by_student:
    values = compute()
  else:
    values = jax.lax.cond(by_student_B.any(), compute, zeros)
  return tuple(jnp.where(by_student_B, x, 0.0) for x in values)


def leave_one_out_mean(rewards_B: jax.Array, counts_B: jax.Array) -> jax.Array:
  """Returns, for each output, the mean reward of the other outputs.

  Excluding the output's own reward makes the baseline independent of it and
  the gradient unbiased. Including it would shrink the gradient of B outputs by
  the factor 1 - 1/B.

  Args:
    rewards_B: [B].
    counts_B: [B] bool, the rewards to average.

  Returns:
    [B]; 0 where there is no other output.
  """
  others_B = jnp.sum(counts_B) - counts_B
  sum_B = jnp.sum(jnp.where(counts_B, rewards_B, 0.0)) - jnp.where(
    counts_B, rewards_B, 0.0
  )
  return jnp.where(others_B > 0, sum_B / jnp.maximum(others_B, 1), 0.0)


def reward_share(alpha: float) -> float:
  """Returns 1 - alpha, the weight of the reward in the paper's Eq. 5.

  Args:
    alpha: weight of the divergence: 1 is only distillation, 0 only the reward.

  Raises:
    ValueError: alpha is outside [0, 1].
  """
  if not 0.0 <= alpha <= 1.0:
    raise ValueError(
      f'ALPHA must be in [0, 1], got {alpha}: the loss is ALPHA * divergence - '
      '(1 - ALPHA) * reward.'
    )
  return 1.0 - alpha
