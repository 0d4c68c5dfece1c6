# SPDX-License-Identifier: Apache-2.0
"""The train step: write outputs, score them, compare, update. One program.

Source: Agarwal et al. (2024), arXiv:2306.13649, Algorithm 1 and Eq. 5.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gkd_jax.batch import Outputs, SpecialIds, split_rows
from gkd_jax.decoding import rollout as rollout_lib
from gkd_jax.decoding import sampler
from gkd_jax.distill import objectives, policies, rewards
from gkd_jax.parallel import partitioning

Params = Any
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
  """All that changes from step to step. Nothing random is stored."""

  step: jax.Array  # [] int32, updates done
  params: Params
  opt_state: optax.OptState


# (state, teacher params, batch[, params of the reward's model])
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def init_state(
  params: Params, optimizer: optax.GradientTransformation
) -> TrainState:
  """Returns the state before the first step."""
  return TrainState(jnp.int32(0), params, optimizer.init(params))


def abstract_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> TrainState:
  """Returns shapes, dtypes and shardings of a state, without making it.

  Args:
    params: abstract, with their shardings; see `model.abstract_params`.
    optimizer: its state is sharded as the parameters are.
    mesh: that these lie on.
  """
  state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
  return partitioning.shard_as_params(state, params, mesh)


def make_train_step(
  *,
  student,
  teacher,
  policy: policies.Policy,
  objective: objectives.Objective,
  optimizer: optax.GradientTransformation,
  student_sampler: sampler.SamplerConfig,
  teacher_sampler: sampler.SamplerConfig,
  ids: SpecialIds,
  seed: int,
  num_microbatches: int = 1,
  reward: rewards.Score | None = None,
) -> TrainStep:
  """Returns `train_step(state, teacher_params, batch) -> (state, metrics)`.

  It is pure and not yet jitted; donate `state`, not the teacher. A reward with
  a model of its own gets that model's parameters as a fourth argument. Where
  loss or gradient is not finite, only `state.step` changes.

  Args:
    student: model that learns; `model` says what is asked of a model.
    teacher: model that is imitated, or None if nothing needs one.
    policy: who writes the outputs.
    objective: what is minimised on them.
    optimizer: any optax optimizer; it gets the mean gradient of the batch.
    student_sampler: how the student's outputs are drawn; the paper: as it is.
    teacher_sampler: how the teacher's are.
    ids: the special ids of both models and their vocabulary.
    seed: of dropout, sampling and the policy's draws. Together with
      `state.step` it determines them all.
    num_microbatches: parts the batch is worked through in, to save memory.
      Changes nothing else, up to rounding and dropout masks; but the baseline
      'batch_mean' is the mean over a part. What needs no gradient is done for
      all parts together, so that sampling reads the student's weights once for
      a token, and the teacher's are gathered once: the keys and values that
      sampling keeps, and both models' encoded inputs, are of the whole batch.
    reward: how good the student's outputs are; None: the objective has none.

  Raises:
    ValueError: the likelihood of outputs that the student writes would be
      maximised, a calculator would write part of them, or the reward's gradient
      would not be that of its expectation.
  """
  settings = {
    'student': student,
    'teacher': teacher,
    'policy': policy,
    'objective': objective,
    'student_sampler': student_sampler,
    'teacher_sampler': teacher_sampler,
    'ids': ids,
  }
  loss_sums = make_loss_sums(**settings, reward=reward)
  prepare = _make_prepare(**settings, num_parts=num_microbatches)

  def train_step(state, teacher_params, batch, reward_params=None):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    policy_rng, sample_rng, dropout_rng = jax.random.split(rng, 3)
    # Once for sampling, both passes, and all microbatches.
    with jax.named_scope('student'):
      params = student.gather_params(state.params)

    row_ids_B = jnp.arange(batch.encoder_input_tokens.shape[0])
    prepared = teacher_head = None
    if num_microbatches > 1:
      prepared = prepare(
        params, teacher_params, batch, row_ids_B, policy_rng, sample_rng
      )
      teacher_head = prepared.teacher_head
      prepared = prepared._replace(teacher_head=None)  # the rest has rows

    def grads_and_sums(batch, prepared, row_ids_B, microbatch):
      if prepared is not None:
        prepared = prepared._replace(teacher_head=teacher_head)
      rngs = (
        policy_rng,  # the same for all: one draw a step, as in Algorithm 1
        sample_rng,  # the same for all: draws are told apart by row_ids
        jax.random.fold_in(dropout_rng, microbatch),
      )
      return jax.grad(loss_sums, has_aux=True)(
        params, teacher_params, batch, row_ids_B, rngs, reward_params, prepared
      )

    grads, sums = _over_microbatches(
      grads_and_sums, (batch, prepared, row_ids_B), num_microbatches
    )
    count = jnp.maximum(sums.pop('count'), 1.0)
    grads = jax.tree.map(lambda g: g / count, grads)
    grad_norm = optax.tree.norm(grads)

    def update():
      updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params
      )
      return optax.apply_updates(state.params, updates), opt_state

    # What is not finite would spoil every step to come.
    finite = jnp.isfinite(sums['loss']) & jnp.isfinite(grad_norm)
    with jax.named_scope('optimizer'):
      params, opt_state = jax.lax.cond(
        finite, update, lambda: (state.params, state.opt_state)
      )

    of_rewards = _reward_metrics(sums)
    sequences = sums.pop('sequences')
    per_sequence = {
      name: sums.pop(name) / sequences for name in ('on_policy', 'truncated')
    }
    metrics = {
      'target_tokens': sums.pop('target_tokens'),
      **{name: total / count for name, total in sums.items()},
      **per_sequence,
      **of_rewards,
      'grad_norm': grad_norm,
      'param_norm': optax.tree.norm(params),
    }
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def make_loss_sums(
  *,
  student,
  teacher,
  policy: policies.Policy,
  objective: objectives.Objective,
  student_sampler: sampler.SamplerConfig,
  teacher_sampler: sampler.SamplerConfig,
  ids: SpecialIds,
  reward: rewards.Score | None = None,
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Makes the function that a step takes the gradient of.

  Args: see `make_train_step`.

  Returns:
    (student params, teacher params, batch, row numbers [B], rngs, params of the
    reward's model or None, `Prepared` or None: it is to be done now) -> (loss,
    sums), where rngs are the keys of policy, sampling and dropout. The sums
    have the loss and its parts, too; all are still to be divided by
    sums['count'], those of sequences by sums['sequences'], those of rewards by
    sums['on_policy'].

  Raises:
    ValueError: see `make_train_step`.
  """
  check_objective(policy, objective)
  check_reward(
    policy,
    objective,
    student_sampler,
    has_reward=reward is not None,
    dropout_rate=student.config.dropout_rate,
  )
  check_samplers(
    student_sampler=student_sampler, teacher_sampler=teacher_sampler
  )

  prepare = _make_prepare(
    student=student,
    teacher=teacher,
    policy=policy,
    objective=objective,
    student_sampler=student_sampler,
    teacher_sampler=teacher_sampler,
    ids=ids,
  )
  has_dropout = student.config.dropout_rate > 0.0

  def loss_sums(
    params,
    teacher_params,
    batch,
    row_ids_B,
    rngs,
    reward_params=None,
    prepared=None,
  ):
    policy_rng, sample_rng, dropout_rng = rngs
    encoded = None
    if prepared is None:
      if not has_dropout:  # sampling and loss see the same
        with jax.named_scope('student_encoder'):
          encoded = student.apply(
            {'params': params}, batch.encoder_input_tokens, method='encode'
          )
      prepared = prepare(
        params,
        teacher_params,
        batch,
        row_ids_B,
        policy_rng,
        sample_rng,
        encoded=encoded,
      )
    written, teacher_hidden, teacher_head = prepared
    outputs = written.outputs
    with jax.named_scope('student'):
      student_hidden = hidden_states(
        student,
        params,
        batch.encoder_input_tokens,
        outputs.tokens,
        encoded=encoded,
        dropout_rng=dropout_rng if has_dropout else None,
      )
    weights_BT, count = objectives.coefficients(
      outputs.weights, objective.reduction
    )
    advantages_BT, reward_sums = None, {}
    if reward is not None:

      def sample_greedy():
        return rollout_lib.rollout(
          student,
          params,
          batch.encoder_input_tokens,
          sample_rng,
          sampler.GREEDY,
          encoded=encoded,
          row_ids_B=row_ids_B,
          max_decode_len=outputs.tokens.shape[1],
          ids=ids,
        )

      advantages_B, reward_sums = _judge(
        functools.partial(rewards.score, reward, batch, params=reward_params),
        written,
        objective,
        sample_greedy,
        always=policy.student_data_fraction == 1.0,
      )
      if objective.learns_from_reward:
        advantages_BT = objectives.advantages(
          objective, advantages_B, outputs.weights
        )
    with jax.named_scope('student'):
      sums = objectives.weighted_sums(
        objective.terms(ids),
        unembed(student),
        unembed(teacher) if objective.needs_teacher else None,
        objective.chunk_tokens,
        student.head_params(params),
        student_hidden,
        teacher_head,
        teacher_hidden,
        outputs.tokens,
        weights_BT,
        advantages_BT,
      )
    if objective.learns_from_reward:
      sums['loss'] -= objective.reward_weight * reward_sums['reward']
    ended_B = jnp.any(outputs.tokens == ids.eos, axis=1)
    counts = {
      'count': count,
      'sequences': jnp.float32(outputs.tokens.shape[0]),
      'target_tokens': outputs.weights.sum(),
      'on_policy': written.by_student.sum(dtype=jnp.float32),
      'truncated': (~ended_B).sum(dtype=jnp.float32),
    }
    return sums['loss'], {**sums, **counts, **reward_sums}

  return loss_sums


def check_objective(
  policy: policies.Policy, objective: objectives.Objective
) -> None:
  """Raises ValueError if the likelihood of what the student writes counts."""
  if objective.likelihood_weight > 0.0 and policy.student_data_fraction > 0.0:
    raise ValueError(
      f'likelihood_weight is {objective.likelihood_weight}, and '
      f'student_data_fraction {policy.student_data_fraction}: to make outputs '
      'likely that the student wrote would teach it its own mistakes. Set '
      'LIKELIHOOD_WEIGHT = 0.0, or STUDENT_DATA_FRACTION = 0.0 to learn from '
      "the dataset's outputs alone."
    )


def check_reward(
  policy: policies.Policy,
  objective: objectives.Objective,
  student_sampler: sampler.SamplerConfig,
  *,
  has_reward: bool,
  dropout_rate: float,
) -> None:
  """Raises ValueError if the reward's gradient would be of something else.

  REINFORCE differentiates the distribution that the outputs were drawn from.
  """
  if has_reward != (objective.reward_weight is not None):
    raise ValueError(
      'REWARD and REWARD_WEIGHT belong together, but '
      + (
        'REWARD_WEIGHT is None. Set it, to 0.0 if the reward is only to be '
        'measured, or set REWARD = None.'
        if has_reward
        else f'REWARD_WEIGHT is {objective.reward_weight} and there is no '
        'REWARD. Name one, e.g. @rewards.exact_match(), or set '
        'REWARD_WEIGHT = None.'
      )
    )
  if not has_reward:
    return
  if policy.student_data_fraction == 0.0:
    raise ValueError(
      'A reward judges what the student writes, but STUDENT_DATA_FRACTION is '
      '0.0: it writes nothing. Set STUDENT_DATA_FRACTION = 1.0, or REWARD = '
      'None and REWARD_WEIGHT = None.'
    )
  if not objective.learns_from_reward:
    return
  if student_sampler != sampler.ANCESTRAL:
    raise ValueError(
      'To learn from a reward, the student must write with its own '
      f'distribution, but its outputs are drawn by {student_sampler}. Set '
      'SAMPLING_TEMPERATURE = 1.0, without top_k and top_p.'
    )
  if dropout_rate > 0.0:
    raise ValueError(
      f'DROPOUT_RATE is {dropout_rate}: the student writes without dropout, so '
      'what it learns with dropout would not be the distribution that wrote. '
      'To learn from a reward set DROPOUT_RATE = 0.0.'
    )


def check_samplers(**samplers: sampler.SamplerConfig) -> None:
  """Raises ValueError if one of them has a calculator."""
  for name, config in samplers.items():
    if config.calculator:
      raise ValueError(
        f'{name}.calculator is set, but what the calculator writes is not '
        'drawn from the model: the student would be trained on outputs that '
        "are neither its own nor the teacher's. Leave it unset there; "
        'CALCULATOR = True is for evaluation.'
      )


def unembed(model) -> objectives.Unembed:
  """Returns (head parameters, hidden [..., D]) -> logits [..., V]."""

  def apply(head, hidden):
    return model.apply({'params': head}, hidden, method='unembed')

  return apply


def hidden_states(
  model,
  params: Params,
  encoder_input_tokens: jax.Array,
  target_tokens: jax.Array,
  *,
  encoded: jax.Array | None = None,
  dropout_rng: jax.Array | None = None,
  num_parts: int = 1,
) -> jax.Array:
  """Runs a model on inputs and outputs, up to the projection: [B, T, D].

  Args:
    model: encoder-decoder.
    params: its parameters.
    encoder_input_tokens: [B, S] int32.
    target_tokens: [B, T] int32.
    encoded: [B, S, D], where the encoder's output is known already.
    dropout_rng: switches dropout on.
    num_parts: that each layer works through the rows in.
  """
  keywords = {'deterministic': dropout_rng is None, **_in_parts(num_parts)}
  if dropout_rng is not None:
    encoder_rng, decoder_rng = jax.random.split(dropout_rng)
  apply = functools.partial(model.apply, {'params': params})
  if encoded is None:
    rngs = None if dropout_rng is None else {'dropout': encoder_rng}
    encoded = apply(
      encoder_input_tokens, method='encode', rngs=rngs, **keywords
    )
  rngs = None if dropout_rng is None else {'dropout': decoder_rng}
  return apply(
    encoded,
    encoder_input_tokens,
    target_tokens,
    method='decode',
    rngs=rngs,
    **keywords,
  )


def _in_parts(num_parts: int) -> dict[str, int]:
  """Keywords of a model's methods."""
  return {'num_parts': num_parts} if num_parts > 1 else {}


class Prepared(NamedTuple):
  """What no gradient flows through."""

  written: policies.Written
  teacher_hidden: jax.Array | None  # [B, T, D], on what was written
  teacher_head: Any  # parameters that make them logits


def _make_prepare(
  *,
  student,
  teacher,
  policy,
  objective,
  student_sampler,
  teacher_sampler,
  ids,
  num_parts: int = 1,
) -> Callable[..., Prepared]:
  """Makes the function that has outputs written, and the teacher read them.

  Args: see `make_train_step`; and
    num_parts: that each layer works through the rows in, to save memory.

  Returns:
    (student params, teacher params, batch, row numbers [B], keys of policy and
    sampling, encoded=[B, S, D] by the student, where it is known) -> Prepared.
  """

  def prepare(
    params,
    teacher_params,
    batch,
    row_ids_B,
    policy_rng,
    sample_rng,
    *,
    encoded=None,
  ):
    params, teacher_params = jax.lax.stop_gradient((params, teacher_params))
    inputs = batch.encoder_input_tokens

    def sample(model, params, config, encoded):
      if encoded is None:
        scope = 'student_encoder' if model is student else 'sampling'
        with jax.named_scope(scope):
          encoded = model.apply(
            {'params': params}, inputs, method='encode', **_in_parts(num_parts)
          )
      drawn = rollout_lib.rollout(
        model,
        params,
        inputs,
        sample_rng,
        config,
        encoded=encoded,
        row_ids_B=row_ids_B,
        max_decode_len=batch.decoder_target_tokens.shape[1],
        ids=ids,
      )
      return Outputs(drawn.tokens, drawn.weights)

    written = policy.write(
      policy_rng,
      batch,
      row_ids_B,
      lambda: sample(student, params, student_sampler, encoded),
      lambda: sample(teacher, teacher_params, teacher_sampler, None),
    )
    if not objective.needs_teacher:
      return Prepared(written, None, None)
    with jax.named_scope('teacher'):
      hidden = hidden_states(
        teacher,
        teacher_params,
        inputs,
        written.outputs.tokens,
        num_parts=num_parts,
      )
      # Gathered, for each chunk of tokens needs it.
      head = teacher.head_params(teacher.gather_params(teacher_params))
    return Prepared(written, hidden, head)

  return prepare


def _judge(
  score, written, objective, sample_greedy, *, always
) -> tuple[jax.Array, Metrics]:
  """Returns reward less baseline [B], 0 for others' outputs; and their sums.

  Args:
    score: outputs -> [B].
    written: what the policy wrote.
    objective: says which baseline.
    sample_greedy: () -> what the student writes at temperature 0.
    always: whether the student writes all outputs. If not, a batch of which it
      wrote none is not judged.
  """
  by_student_B = written.by_student

  def judge():
    rewards_B = score(written.outputs)
    baseline_B = jnp.zeros_like(rewards_B)
    if not objective.learns_from_reward:
      pass
    elif objective.reward_baseline == 'self_critical':
      greedy = sample_greedy()
      baseline_B = score(Outputs(greedy.tokens, greedy.weights))
    elif objective.reward_baseline == 'batch_mean':
      baseline_B = rewards.leave_one_out_mean(rewards_B, by_student_B)
    return rewards_B, baseline_B

  def nothing():
    return (jnp.zeros(by_student_B.shape, jnp.float32),) * 2

  if always:
    rewards_B, baseline_B = judge()
  else:
    rewards_B, baseline_B = jax.lax.cond(by_student_B.any(), judge, nothing)
  rewards_B, baseline_B = (
    jnp.where(by_student_B, x, 0.0) for x in (rewards_B, baseline_B)
  )
  advantages_B = rewards_B - baseline_B
  sums = {'reward': rewards_B.sum()}
  if objective.learns_from_reward:
    sums |= {
      'reward_baseline': baseline_B.sum(),
      'reward_advantage_squared': jnp.square(advantages_B).sum(),
    }
  return advantages_B, sums


def _reward_metrics(sums: Metrics) -> Metrics:
  """Takes the sums of rewards out: their means over the student's outputs.

  NaN where it wrote none.
  """
  names = [name for name in sums if name.startswith('reward')]
  means = {name: sums.pop(name) / sums['on_policy'] for name in names}
  if 'reward_advantage_squared' in means:
    means['reward_advantage_rms'] = jnp.sqrt(
      means.pop('reward_advantage_squared')
    )
  return means


def _over_microbatches(grads_and_sums, rows, num_microbatches):
  """Adds up grads_and_sums(*rows, i) over parts of what has rows [B, ...]."""
  if num_microbatches == 1:
    return grads_and_sums(*rows, 0)
  parts = jax.tree.map(lambda x: split_rows(x, num_microbatches), rows)
  shapes = jax.eval_shape(
    grads_and_sums, *jax.tree.map(lambda x: x[0], parts), 0
  )
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def add(total, part):
    i, rows = part
    return jax.tree.map(jnp.add, total, grads_and_sums(*rows, i)), None

  total, _ = jax.lax.scan(add, zeros, (jnp.arange(num_microbatches), parts))
  return total
