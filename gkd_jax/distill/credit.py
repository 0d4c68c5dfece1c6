# SPDX-License-Identifier: Apache-2.0
"""Credit: a second gradient on the tokens of y, added to the objective's.

    gradient = sum over tokens of  -worth * grad log Q(y_t)

A credit computes the constant `worth` [B, T] from arrays of shape [B, T] and
[B]: log-probabilities, rewards, row numbers. It is called once per microbatch,
so baselines and comparisons never cross microbatches; the outputs of one input
are always in the same one. To add one, write a function that returns a `Credit`
and name it in a gin file.

REINFORCE is a credit. The reward r depends on the student only through the
outputs that it samples, so the gradient of the expected reward is estimated by
(r - b) grad log Q(y). The baseline b lowers the variance and adds no bias.

Source: Agarwal et al. (2024), arXiv:2306.13649, Eq. 5.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import Outputs
from gkd_jax.distill.policies import DATASET, Rollouts
from gkd_jax.distill.rewards import Reward

BASELINES = (
  'self_critical',
  'batch_mean',
  'group_mean',
  'group_normalized',
  'none',
)
NORMALIZATIONS = ('sequence', 'token')
# Of `Credit.outputs_per_input`: any number but one.
SEVERAL = 'several'
# Added to the standard deviation of the rewards of a group.
_SMALLEST_DEVIATION = 1e-6
# J-BOND's reward of an output below both of the anchor's, nats. At this value
# its mean over the anchor is ln u at the median, u = 1/2 (arXiv:2407.14622).
_J_BOND_REWARD = -math.log(16.0)


class LogProbs(NamedTuple):
  """Log-probabilities of y in nats, at temperature 1; no gradient."""

  student: jax.Array  # [B, T] float32
  teacher: jax.Array | None  # [B, T] float32; None without a teacher
  # [B, T] float32, ln sum exp of the student's logits; None unless the credit
  # needs it
  lse: jax.Array | None = None


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
    outputs_per_input: n; rows n i to n i + n - 1 are outputs of one input.
  """

  rollouts: Rollouts
  row_ids_B: jax.Array
  log_probs: Callable[[], LogProbs]
  compute_rewards: Callable[[Outputs], jax.Array]
  sample_greedy: Callable[[], Outputs]
  all_by_student: bool
  coefficients_BT: jax.Array
  outputs_per_input: int = 1


class Worth(NamedTuple):
  """The result of a credit.

  Attributes:
    per_token: [B, T] constant weights of grad log Q(y_t); None: no gradient.
    total: [] the maximised quantity, subtracted from the reported loss.
    sums: {name: []} metrics, summed over rows that the student wrote.
    per_lse: likewise of the gradient of ln sum exp of the student's logits.
  """

  per_token: jax.Array | None
  total: jax.Array
  sums: dict[str, jax.Array]
  per_lse: jax.Array | None = None

  def times(self, factor_B1: jax.Array) -> 'Worth':
    """Returns it with the gradient of each row scaled."""
    scaled = {
      name: factor_B1 * x
      for name in ('per_token', 'per_lse')
      if (x := getattr(self, name)) is not None
    }
    return self._replace(**scaled)

  def gradient(self) -> dict[str, jax.Array] | None:
    """Returns {term of the objective: [B, T] constant that scales it}."""
    found = {}
    if self.per_token is not None:
      found['nll'] = self.per_token
    if self.per_lse is not None:
      found['lse'] = -self.per_lse
    return found or None


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
    needs_lse: whether it reads `LogProbs.lse`.
    outputs_per_input: how many outputs of each input it compares: a number,
      SEVERAL, or None if it compares none.
  """

  assign: Callable[[Evidence], Worth]
  reward: Reward | None = None
  student_outputs_only: bool = False
  learns: bool = True
  is_policy_gradient: bool = False
  min_rows: int = 1
  needs_teacher: bool = False
  needs_lse: bool = False
  outputs_per_input: int | str | None = None


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
      output, which adapts to each input and costs one more rollout;
      'group_mean': the mean reward of the other outputs of the same input
      (RLOO); 'group_normalized': the mean of all outputs of the same input, and
      the difference is divided by their standard deviation (GRPO); or 'none'.
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
    if baseline == 'group_normalized':
      deviation_B = _of_groups(
        lambda rewards: jnp.std(rewards, ddof=1), evidence, rewards_B
      )
      advantages_B /= deviation_B + _SMALLEST_DEVIATION
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
    outputs_per_input=(
      SEVERAL if learns and baseline.startswith('group') else None
    ),
  )


def sampled_reverse_kl(
  weight: float = 1.0, discount: float = 0.0, reports: str = 'k1'
) -> Credit:
  """KL(Q || P), estimated from the student's own tokens alone.

      r_t = ln P(y_t) - ln Q(y_t)
      loss gradient = -R_t grad ln Q(y_t),  R_t = sum over t' >= t of
                      discount^(t' - t) r_t'

  The teacher's probability of one token is needed, not its distribution. With
  discount 0 the expectation is the gradient of `divergences.reverse_kl`, which
  has no variance; with discount 1 it is that of the outputs' KL. The reported
  loss is an estimate of the KL without gradient. Differentiating k2 with y
  fixed gives the gradient above, differentiating k3 that of KL(P || Q), and
  differentiating k1 zero (docs/methods.md).

  Source: arXiv:2306.08543, Eq. 3, without its length normalization; Schulman
  (2020), "Approximating KL divergence".

  Args:
    weight: of this part in the loss.
    discount: of later tokens, in [0, 1].
    reports: 'k1' reports -r_t, 'k2' r_t^2 / 2.

  Raises:
    ValueError: a value is invalid.
  """
  if weight <= 0.0:
    raise ValueError(
      f'credit.sampled_reverse_kl.weight must be positive: {weight}.'
    )
  if not 0.0 <= discount <= 1.0:
    raise ValueError(
      f'credit.sampled_reverse_kl.discount must be in [0, 1], got {discount}.'
    )
  if reports not in ('k1', 'k2'):
    raise ValueError(
      "credit.sampled_reverse_kl.reports must be 'k1' or 'k2', got "
      f'{reports!r}.'
    )

  def assign(evidence: Evidence) -> Worth:
    log_probs = evidence.log_probs()
    is_token_BT = evidence.rollouts.outputs.weights > 0.0
    ratio_BT = jnp.where(
      is_token_BT, log_probs.teacher - log_probs.student, 0.0
    )
    coefficients_BT = evidence.coefficients_BT
    at = jnp.arange(ratio_BT.shape[1])
    ahead_TT = at[None, :] - at[:, None]
    # 0 ** 0 is 1: without discounting only the token itself counts.
    factor_TT = jnp.where(
      ahead_TT >= 0, discount ** jnp.maximum(ahead_TT, 0).astype(jnp.float32), 0
    )
    returns_BT = jnp.einsum('bu,tu->bt', ratio_BT, factor_TT)
    value_BT = -ratio_BT if reports == 'k1' else jnp.square(ratio_BT) / 2
    length_B = jnp.maximum(is_token_BT.sum(axis=1), 1)
    sums = {'sampled_reverse_kl': jnp.sum(-ratio_BT.sum(axis=1) / length_B)}
    total = -weight * jnp.sum(coefficients_BT * value_BT)
    return Worth(weight * coefficients_BT * returns_BT, total, sums)

  return Credit(assign, is_policy_gradient=True, needs_teacher=True)


def iq_learn(weight: float = 0.1, discount: float = 1.0) -> Credit:
  """A temporal difference of the logits, added to the likelihood (IQLearn).

      loss = weight * mean over t of (z_t[y_t] - discount * v_(t+1))^2

  with z the student's logits, v = ln sum exp z, and v = 0 after the last token.
  The gradient flows through v_(t+1), too. Two passes over the vocabulary give
  it exactly: the first computes the differences, the second scales the
  gradients of ln Q(y_t) and v_t by them.

  Source: Wulfmeier et al. (2024), arXiv:2409.01369, Eq. 14.

  Args:
    weight: lambda of the paper; 0 is maximum likelihood.
    discount: gamma of the paper.

  Raises:
    ValueError: weight is not positive, or discount is outside [0, 1].
  """
  if weight <= 0.0:
    raise ValueError(
      f'credit.iq_learn.weight must be positive, got {weight}. Without it use '
      'gin/methods/sft.gin.'
    )
  if not 0.0 <= discount <= 1.0:
    raise ValueError(
      f'credit.iq_learn.discount must be in [0, 1], got {discount}.'
    )

  def assign(evidence: Evidence) -> Worth:
    log_probs = evidence.log_probs()
    is_token_BT = evidence.rollouts.outputs.weights > 0.0
    value_BT = jnp.where(is_token_BT, log_probs.lse, 0.0)
    next_BT = jnp.pad(value_BT[:, 1:], ((0, 0), (0, 1)))
    chosen_BT = log_probs.student + log_probs.lse
    difference_BT = jnp.where(is_token_BT, chosen_BT - discount * next_BT, 0.0)
    # z_t[y_t] = ln Q(y_t) + v_t; v_(t+1) belongs to the token after t.
    of_chosen_BT = 2.0 * evidence.coefficients_BT * difference_BT
    of_next_BT = discount * jnp.pad(of_chosen_BT[:, :-1], ((0, 0), (1, 0)))
    of_next_BT = jnp.where(is_token_BT, of_next_BT, 0.0)
    squared_BT = jnp.square(difference_BT)
    length_B = jnp.maximum(is_token_BT.sum(axis=1), 1)
    return Worth(
      -weight * of_chosen_BT,
      -weight * jnp.sum(evidence.coefficients_BT * squared_BT),
      {'td_error_squared': jnp.sum(squared_BT.sum(axis=1) / length_B)},
      per_lse=-weight * (of_chosen_BT - of_next_BT),
    )

  return Credit(assign, needs_lse=True)


def j_bond(
  reward: Reward, forward_weight: float = 0.5, regularization: float = 0.0
) -> Credit:
  """J-BOND: the student learns the best of several outputs of an anchor.

  Of the three outputs of each input that `policies.with_anchor` writes, y is
  the student's and y1, y2 are the anchor's, of which y' is the better one. With
  b = 1 - forward_weight and R = r_J - (ln Q(y) - ln A(y)), the gradient is

      -(1 - b) grad ln Q(y') - b (R - B) grad ln Q(y)
      + regularization * (ln Q(y) - ln A(y)) grad ln Q(y)

  r_J is -ln 16 if y is worse than both, else 0; B is the mean R of the other
  inputs of the microbatch. The last line descends KL(Q || A); the paper's
  Algorithm 2 prints it with the opposite sign, against its Eq. 19.

  Source: Sessa et al. (2024), arXiv:2407.14622, Algorithm 2.

  Args:
    reward: the reward of an output.
    forward_weight: 1 - b, of the part that imitates y'.
    regularization: of KL(Q || A).

  Raises:
    ValueError: a value is invalid.
  """
  if not 0.0 <= forward_weight <= 1.0:
    raise ValueError(
      f'credit.j_bond.forward_weight must be in [0, 1], got {forward_weight}.'
    )
  if regularization < 0.0:
    raise ValueError(
      f'credit.j_bond.regularization must not be negative: {regularization}.'
    )

  def assign(evidence: Evidence) -> Worth:
    log_probs, outputs = evidence.log_probs(), evidence.rollouts.outputs
    weights_BT = outputs.weights
    ratio_B = jnp.sum(weights_BT * (log_probs.student - log_probs.teacher), 1)
    likelihood_B = jnp.sum(weights_BT * log_probs.student, axis=1)
    rewards_I3 = evidence.compute_rewards(outputs).reshape(-1, 3)
    ratio_I = ratio_B.reshape(-1, 3)[:, 0]
    likelihood_I3 = likelihood_B.reshape(-1, 3)
    is_worse_I = rewards_I3[:, 0] < rewards_I3[:, 1:].min(axis=1)
    return_I = jnp.where(is_worse_I, _J_BOND_REWARD, 0.0) - ratio_I
    advantage_I = return_I - leave_one_out_mean(return_I)
    is_second_better_I = rewards_I3[:, 2] > rewards_I3[:, 1]
    b = 1.0 - forward_weight
    worth_I3 = jnp.stack(
      [
        b * advantage_I - regularization * ratio_I,
        jnp.where(is_second_better_I, 0.0, forward_weight),
        jnp.where(is_second_better_I, forward_weight, 0.0),
      ],
      axis=1,
    )
    best_I = jnp.where(
      is_second_better_I, likelihood_I3[:, 2], likelihood_I3[:, 1]
    )
    maximised_I = (
      forward_weight * best_I + b * return_I - regularization * ratio_I
    )
    # The loss is a mean over rows, of which each input has three.
    worth_BT = 3.0 * worth_I3.reshape(-1, 1) * weights_BT
    sums = {
      'reward': 3.0 * rewards_I3[:, 0].sum(),
      'reward_of_anchor': 1.5 * rewards_I3[:, 1:].sum(),
      'log_ratio_to_anchor': 3.0 * ratio_I.sum(),
    }
    return Worth(worth_BT, 3.0 * maximised_I.sum(), sums)

  return Credit(
    assign,
    reward,
    is_policy_gradient=True,
    min_rows=2,
    needs_teacher=True,
    outputs_per_input=3,
  )


def dpo(beta: float = 0.1) -> Credit:
  """Direct preference optimization on the pairs of `policies.pairs`.

      h = (ln Q(y+) - ln R(y+)) - (ln Q(y-) - ln R(y-))
      loss = -ln sigmoid(beta h), a mean over pairs

  R is the teacher, usually the student's start: `teachers.initial()`.

  Source: Rafailov et al. (2023), arXiv:2305.18290, Eq. 7.

  Args:
    beta: strength of the reference; small values allow the student to leave it.

  Raises:
    ValueError: beta is not positive.
  """
  if beta <= 0.0:
    raise ValueError(f'credit.dpo.beta must be positive, got {beta}.')

  def assign(evidence: Evidence) -> Worth:
    log_probs, outputs = evidence.log_probs(), evidence.rollouts.outputs
    ratio_B = jnp.sum(
      outputs.weights * (log_probs.student - log_probs.teacher), axis=1
    )
    ratio_I2 = ratio_B.reshape(-1, 2)
    margin_I = beta * (ratio_I2[:, 0] - ratio_I2[:, 1])
    slope_I = beta * jax.nn.sigmoid(-margin_I)
    # The loss is a mean over rows, of which each pair has two.
    worth_B = 2.0 * jnp.stack([slope_I, -slope_I], axis=1).reshape(-1)
    sums = {
      'margin': 2.0 * margin_I.sum(),
      'margin_is_positive': 2.0 * jnp.sum(margin_I > 0.0, dtype=jnp.float32),
    }
    total = 2.0 * jax.nn.log_sigmoid(margin_I).sum()
    return Worth(worth_B[:, None] * outputs.weights, total, sums)

  return Credit(assign, needs_teacher=True, outputs_per_input=2)


def redi(alpha: float = 0.8) -> Credit:
  """Likelihood of the better output of a pair, less that of the worse one.

      loss = -mean over t of ln Q(y+_t) + alpha * mean over t of ln Q(y-_t)

  It has no lower bound: use a small learning rate and few steps.

  Source: REDI, arXiv:2505.24850.

  Args:
    alpha: of the worse outputs; 0 is SFT on the better ones.

  Raises:
    ValueError: alpha is outside [0, 1].
  """
  if not 0.0 <= alpha <= 1.0:
    raise ValueError(f'credit.redi.alpha must be in [0, 1], got {alpha}.')

  def assign(evidence: Evidence) -> Worth:
    student_BT = evidence.log_probs().student
    sign_2 = jnp.array([1.0, -alpha])
    sign_B = jnp.tile(sign_2, student_BT.shape[0] // 2)
    weights_BT = evidence.rollouts.outputs.weights
    length_B1 = jnp.maximum(weights_BT.sum(axis=1, keepdims=True), 1.0)
    # The loss is a mean over rows, of which each pair has two.
    worth_BT = 2.0 * sign_B[:, None] * weights_BT / length_B1
    means_B = jnp.sum(weights_BT * student_BT / length_B1, axis=1)
    better, worse = means_B[::2].sum(), means_B[1::2].sum()
    sums = {
      'nll_of_better': -2.0 * better,
      'nll_of_worse': -2.0 * worse,
    }
    return Worth(worth_BT, jnp.sum(worth_BT * student_BT), sums)

  return Credit(assign, outputs_per_input=2)


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
    elif baseline == 'group_mean':
      baselines_B = _of_groups(leave_one_out_mean, evidence, rewards_B)
    elif baseline == 'group_normalized':
      baselines_B = _of_groups(jnp.mean, evidence, rewards_B)
    return rewards_B, baselines_B

  def zeros():
    return (jnp.zeros(by_student_B.shape, jnp.float32),) * 2

  if evidence.all_by_student:
    values = compute()
  else:
    values = jax.lax.cond(by_student_B.any(), compute, zeros)
  return tuple(jnp.where(by_student_B, x, 0.0) for x in values)


def _of_groups(function, evidence: Evidence, values_B: jax.Array) -> jax.Array:
  """Returns [B], a function of the values of all outputs of the same input."""
  values_IN = values_B.reshape(-1, evidence.outputs_per_input)
  of_groups = jax.vmap(function)(values_IN)
  if of_groups.ndim == 1:
    of_groups = jnp.broadcast_to(of_groups[:, None], values_IN.shape)
  return of_groups.reshape(-1)


def leave_one_out_mean(
  rewards_B: jax.Array, counts_B: jax.Array | None = None
) -> jax.Array:
  """Returns, for each output, the mean reward of the other outputs.

  Excluding the output's own reward makes the baseline independent of it and
  the gradient unbiased. Including it would shrink the gradient of B outputs by
  the factor 1 - 1/B.

  Args:
    rewards_B: [B].
    counts_B: [B] bool, the rewards to average; None: all.

  Returns:
    [B]; 0 where there is no other output.
  """
  if counts_B is None:
    counts_B = jnp.ones(rewards_B.shape, bool)
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
