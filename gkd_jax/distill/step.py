# SPDX-License-Identifier: Apache-2.0
"""The train step: write outputs, run the teacher, compare, update. One program.

Source: Agarwal et al. (2024), arXiv:2306.13649, Algorithm 1 and Eq. 5.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from gkd_jax.batch import Batch, Outputs, SpecialIds
from gkd_jax.decoding import rollout as rollout_lib
from gkd_jax.decoding import sampler
from gkd_jax.distill import (
  chunked_sums,
  divergences,
  microbatches,
  objectives,
  rewards,
  rules,
)
from gkd_jax.distill import credit as credit_lib
from gkd_jax.distill import state as state_lib
from gkd_jax.distill.grading import (
  Grader,
  OfSeveral,
  hidden_states,
  make_grader,
  microbatches_keyword,
  repeat_rows,
  unembed,
)
from gkd_jax.distill.methods import Method
from gkd_jax.distill.policies import Comparison, Draw, Rollouts
from gkd_jax.distill.state import Carried, Frozen, Trained, TrainState

Params = Any
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]


class Models(NamedTuple):
  """Both models, with the method and the ids of a step.

  Attributes:
    student: model that learns; see `models.interface`.
    teacher: model of the teacher; None if the method needs none; of several
      checkpoints {name: model}.
    method: policy, teacher, objective and credit.
    ids: the special ids of both models and their vocabulary.
    reward_fn: of the method's reward, from `Reward.make_reward_fn`.
  """

  student: Any
  teacher: Any
  method: Method
  ids: SpecialIds
  reward_fn: rewards.RewardFn | None = None

  @property
  def has_dropout(self) -> bool:
    return self.student.config.dropout_rate > 0.0

  @property
  def grader(self) -> Grader:
    """The teacher, or several, that the objective compares the student with."""
    return make_grader(self.method.teacher, self.student, self.teacher)


class Rngs(NamedTuple):
  """The keys of one step."""

  policy: jax.Array
  sample: jax.Array
  dropout: jax.Array


class Rows(NamedTuple):
  """The loss's inputs that are split into microbatches.

  Arrays of the batch have rows [B, ...], all others [n B, ...]: n outputs for
  each input, see `Rollouts.outputs`.
  """

  batch: Batch
  rollouts: Rollouts
  teacher_hidden: jax.Array | OfSeveral | None  # [B, T, D'] on the rollouts
  row_ids_B: jax.Array


class Shared(NamedTuple):
  """The loss's inputs that all microbatches share."""

  frozen: Frozen
  teacher_head: Params  # parameters of the projection to the vocabulary
  rngs: Rngs
  carried: Any = ()  # the divergence's state


class OfPolicy(NamedTuple):
  """What a policy returns beside the outputs."""

  carried: Any  # its next state
  metrics: Metrics


def make_train_step(
  *,
  student,
  teacher,
  method: Method,
  optimizer: optax.GradientTransformation,
  ids: SpecialIds,
  seed: int,
  num_microbatches: int = 1,
  reward_fn: rewards.RewardFn | None = None,
) -> TrainStep:
  """Returns `train_step(state, frozen, batch) -> (state, metrics)`.

  It is pure and not yet jitted; donate `state`, not `frozen`. A step with a
  non-finite loss or gradient changes only `state.step`.

  Args:
    student: model that learns; see `models.interface`.
    teacher: model of the teacher's checkpoint, or None if the method needs no
      checkpoint; of several checkpoints {name: model}. Its parameters are
      `frozen.teacher`, of several {name: parameters}.
    method: policy, teacher, divergence and credit.
    optimizer: any optax optimizer; it receives the batch's mean gradient.
    ids: the special ids of both models and their vocabulary.
    seed: seeds dropout, sampling and the policy, together with `state.step`.
    num_microbatches: splits the batch to save memory. Results differ only by
      rounding and dropout masks, except that a credit compares outputs within a
      microbatch. Sampling and the teacher run on the full batch, so that each
      token reads the student's weights once and the teacher is gathered once:
      only the sampling KV cache and the encoder outputs of both models are held
      for the full batch.
    reward_fn: the method's reward function, from `Reward.make_reward_fn`. The
      parameters of its model are `frozen.reward`.

  Raises:
    ValueError: parts of the method contradict each other, see `rules`, or the
      divergence is not a function of logits.
  """
  if not method.teacher.needs_checkpoint:
    teacher = student
  models = _check(Models(student, teacher, method, ids, reward_fn))
  sum_gradients = _make_sum_gradients(models, num_microbatches)
  shares_encoder = (
    not models.has_dropout
    and num_microbatches == 1
    and method.policy.buffer_rows is None
  )

  def train_step(state, frozen, batch):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    rngs = Rngs(*jax.random.split(rng, 3))
    # Gathered once for sampling and for all microbatches.
    with jax.named_scope('student'):
      params = student.gather_params(state.params)
    encoded = None
    if shares_encoder:  # sampling and loss use the same encoder output
      encoded, encoder_vjp = jax.vjp(
        lambda params: _encode(models, params, batch), params
      )
    rows, shared, encoded, of_policy = _write_and_grade(
      models,
      params,
      frozen,
      batch,
      rngs,
      encoded,
      state.carried,
      num_microbatches,
      state.step,
    )

    (grads, d_encoded), sums = sum_gradients(
      Trained(params, state.heads), encoded, rows, shared
    )
    if d_encoded is not None:
      (d_params,) = encoder_vjp(d_encoded)
      d_params = jax.tree.map(jnp.add, grads.params, d_params)
      grads = grads._replace(params=d_params)
    count = jnp.maximum(sums.pop('count'), 1.0)
    grads = jax.tree.map(lambda g: g / count, state_lib.trained(*grads))
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(sums['loss']) & jnp.isfinite(grad_norm)
    means = _means(sums, count, method.credit) | of_policy.metrics
    # A non-finite update would corrupt all later steps.
    with jax.named_scope('optimizer'):
      params, opt_state, heads, carried = jax.lax.cond(
        is_finite,
        lambda: _update(
          method, optimizer, state, grads, of_policy.carried, means
        ),
        lambda: tuple(state[1:]),
      )
    norms = {'grad_norm': grad_norm, 'param_norm': optax.tree.norm(params)}
    state = TrainState(state.step + 1, params, opt_state, heads, carried)
    return state, means | norms

  return train_step


def make_batch_loss(
  *, student, teacher, method: Method, ids: SpecialIds, reward_fn=None
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Returns the loss of a full batch as one function of the parameters.

  For trainers that differentiate the loss themselves. They have no place for
  state or heads, so methods with either are refused.

  Args: see `make_train_step`.

  Returns:
    (student params, frozen, batch, Rngs) -> (loss, sums). `sums` contains the
    loss and its parts. The caller divides them by sums['count'], and
    'on_policy' and 'truncated' by sums['sequences'].

  Raises:
    ValueError: see `make_train_step`; or a part has state.
  """
  check_no_state(method)
  if not method.teacher.needs_checkpoint:
    teacher = student
  models = _check(Models(student, teacher, method, ids, reward_fn))
  loss_sums = _make_loss_sums(models)

  def batch_loss(params, frozen, batch, rngs):
    encoded = None if models.has_dropout else _encode(models, params, batch)
    rows, shared, encoded, _ = _write_and_grade(
      models, params, frozen, batch, rngs, encoded, Carried()
    )
    return loss_sums(Trained(params), encoded, rows, shared)

  return batch_loss


def _check(models: Models) -> Models:
  """Returns `models` unchanged; raises ValueError as in `make_train_step`."""
  student, teacher, method = models.student, models.teacher, models.method
  rules.check(rules.Setup(method, student.config.dropout_rate))
  if method.needs_teacher and teacher is None:
    raise ValueError('This method needs a teacher, and `teacher` is None.')
  if method.objective.needs_teacher:
    graders = (reading.model for reading in models.grader.readings)
    widths = (
      getattr(model.config, 'vocab_size', models.ids.num_ids)
      for model in (student, *graders)
    )
    rules.check_divergence(method, min(widths))
  return models


def _encode(models: Models, params: Params, batch: Batch) -> jax.Array:
  with jax.named_scope('student_encoder'):
    return models.student.apply(
      {'params': params}, batch.encoder_input_tokens, method='encode'
    )


def _write_and_grade(
  models: Models,
  params: Params,
  frozen: Frozen,
  batch: Batch,
  rngs: Rngs,
  encoded: jax.Array | None,
  carried: Carried,
  num_microbatches: int = 1,
  step: jax.Array | None = None,
) -> tuple[Rows, Shared, jax.Array | None, OfPolicy]:
  """Calls the policy once and runs the teacher on its outputs, no gradient.

  Args:
    models: both models.
    params: the student's parameters.
    frozen: parameters of the teacher's checkpoint and of the reward's model.
    batch: the step's batch.
    rngs: the step's keys.
    encoded: [B, S, D] the student's encoder output on the batch, or None.
    carried: the method's state.
    num_microbatches: each layer processes the rows in this many parts.
    step: [] int32 number of steps done; None: not known.

  Returns:
    The inputs of the loss; `encoded`, or None if the rollouts have other
    inputs; and the rest of what the policy returns.
  """
  method = models.method
  teacher_params = jax.lax.stop_gradient(
    method.teacher.params(frozen.teacher, params, carried.teacher)
  )
  row_ids_B = jnp.arange(batch.encoder_input_tokens.shape[0])
  rollouts = jax.lax.stop_gradient(
    method.policy.write(
      _draw(
        models,
        *jax.lax.stop_gradient((params, encoded)),
        teacher_params,
        batch,
        row_ids_B,
        rngs,
        carried.policy,
        num_microbatches,
        step,
      )
    )
  )
  of_policy = OfPolicy(rollouts.carried, rollouts.metrics)
  if rollouts.batch is not None:
    batch, encoded = rollouts.batch, None
  rollouts = rollouts._replace(batch=None, carried=(), metrics={})
  teacher_hidden = teacher_head = None
  if method.needs_grades:
    grader = models.grader
    with jax.named_scope('teacher'):
      teacher_hidden = grader.hidden_states(
        teacher_params, batch, rollouts.outputs.tokens, num_microbatches
      )
      # Gathered once, because each chunk of tokens reads it.
      teacher_head = grader.heads(teacher_params, gather=True)
  return (
    Rows(
      batch,
      rollouts,
      teacher_hidden,
      jnp.arange(rollouts.outputs.tokens.shape[0]),
    ),
    Shared(frozen, teacher_head, rngs, carried.divergence),
    encoded,
    of_policy,
  )


def _draw(
  models,
  params,
  encoded,
  teacher_params,
  batch,
  row_ids_B,
  rngs,
  carried,
  num_microbatches,
  step,
) -> Draw:
  """Returns the inputs of the policy; see `policies.Draw`."""
  method = models.method
  shape = {
    'row_ids_B': row_ids_B,
    'max_decode_len': batch.decoder_target_tokens.shape[1],
    'ids': models.ids,
  }

  def encode(model, params, inputs, scope):
    with jax.named_scope(scope):
      return model.apply(
        {'params': params},
        inputs,
        method='encode',
        **microbatches_keyword(num_microbatches),
      )

  def student(config=None):
    model, inputs, known = models.student, batch.encoder_input_tokens, encoded
    if known is None:
      known = encode(model, params, inputs, 'student_encoder')
    config = config or method.student_sampler
    return rollout_lib.Writer(model, params, inputs, config, known)

  def teacher(config=None):
    model, inputs = models.teacher, batch.teacher_inputs
    known = encode(model, teacher_params, inputs, 'teacher_encoder')
    config = config or method.teacher_sampler
    return rollout_lib.Writer(model, teacher_params, inputs, config, known)

  def sampler_of(writer):
    def sample(*, prefix=None, config=None, rng=None, num_outputs=1):
      rng = rngs.sample if rng is None else rng
      return rollout_lib.rollout(
        writer(config), rng, prefix=prefix, num_outputs=num_outputs, **shape
      )

    return sample

  def sample_teacher(*, prefix=None, config=None, rng=None, num_outputs=1):
    drafting = method.teacher_drafting
    if drafting is None or prefix is not None or num_outputs > 1:
      return sampler_of(teacher)(
        prefix=prefix, config=config, rng=rng, num_outputs=num_outputs
      )
    config = config or method.teacher_sampler
    drafted = rollout_lib.rollout_drafted(
      teacher(config),
      student(config),
      rngs.sample if rng is None else rng,
      drafting,
      **shape,
    )
    return drafted.rollout

  def sample_pair(choose):
    return rollout_lib.rollout_pair(
      student(), teacher(), rngs.sample, choose, **shape
    )

  return Draw(
    rngs.policy,
    batch,
    row_ids_B,
    sampler_of(student),
    sample_teacher,
    carried,
    sample_pair,
    step,
    functools.partial(
      _compare,
      models,
      params,
      teacher_params,
      batch,
      encoded,
      num_microbatches,
    ),
  )


@jax.named_scope('compare')
def _compare(
  models, params, teacher_params, batch, encoded, num_microbatches, outputs
) -> Comparison:
  """Returns student and teacher on outputs; see `policies.Comparison`."""
  teacher, ids = models.teacher, models.ids
  hidden = functools.partial(
    hidden_states,
    target_tokens=outputs.tokens,
    num_microbatches=num_microbatches,
  )
  of_student = hidden(
    models.student, params, batch.encoder_input_tokens, encoded=encoded
  )
  of_teacher = hidden(teacher, teacher_params, batch.teacher_inputs)

  def values(student_logits, teacher_logits, tokens):
    del tokens
    student_logits, teacher_logits = objectives.comparable_logits(
      student_logits, teacher_logits, ids
    )
    return {
      'kl': divergences.forward_kl(
        teacher_logits=teacher_logits, student_logits=student_logits
      ),
      'token': jnp.argmax(teacher_logits, axis=-1).astype(jnp.int32),
    }

  found = chunked_sums.token_values(
    values,
    unembed(models.student),
    unembed(teacher),
    models.method.objective.chunk_tokens,
    models.student.head_params(params),
    of_student,
    teacher.head_params(teacher.gather_params(teacher_params)),
    of_teacher,
    outputs.tokens,
  )
  return Comparison(found['kl'], found['token'])


def _make_sum_gradients(models: Models, num_microbatches: int):
  """Returns the gradient of the loss, summed over microbatches and devices.

  (Trained, encoded, Rows, Shared) -> ((gradient of Trained, of encoded), sums);
  see `_make_loss_sums`.
  """
  gradient = jax.grad(_make_loss_sums(models), argnums=(0, 1), has_aux=True)

  def of_rows(rows, trained, encoded, shared):
    def of_microbatch(rows, i):
      dropout = jax.random.fold_in(shared.rngs.dropout, i)
      rngs = shared.rngs._replace(dropout=dropout)
      return gradient(trained, encoded, rows, shared._replace(rngs=rngs))

    num_inputs = rows.batch.encoder_input_tokens.shape[0]
    return microbatches.sum_over_microbatches(
      of_microbatch, rows, num_microbatches, num_inputs
    )

  def sum_gradients(trained, encoded, rows, shared):
    if num_microbatches == 1 or not _sums_are_local(models):
      return of_rows(rows, trained, encoded, shared)
    student = models.student
    replicated = jax.tree.map(lambda _: PartitionSpec(), trained)
    return microbatches.sum_over_devices(
      of_rows,
      rows,
      trained,
      encoded,
      shared._replace(frozen=Frozen()),
      mesh=student.placement.mesh,
      specs=(replicated._replace(params=student.param_specs()), None),
    )

  return sum_gradients


def _sums_are_local(models: Models) -> bool:
  """Whether a loss's sums over the rows of one device make sense.

  Dropout masks are drawn for the whole microbatch, and some credits compare its
  rows or read the reward's parameters, which are sharded over 'data'.
  """
  placement, credit = models.student.placement, models.method.credit
  return (
    placement is not None
    and placement.mesh.shape['data'] > 1
    and not models.has_dropout
    and (credit is None or (credit.reward is None and credit.min_rows == 1))
  )


def _make_loss_sums(models: Models):
  """Returns the function that a step differentiates.

  (Trained, encoded, Rows, Shared) -> (loss, sums). `encoded` is the student's
  encoder output [B, S, D]; None: the encoder runs inside. The loss is a sum, to
  be divided by sums['count'].
  """
  student, method, ids = models.student, models.method, models.ids
  objective, credit = method.objective, method.credit
  unembeds = (
    unembed(student),
    models.grader.unembed(ids) if method.needs_grades else None,
  )

  def loss_sums(trained, encoded, rows, shared):
    params, rollouts = trained.params, rows.rollouts
    outputs = rollouts.outputs
    with jax.named_scope('student'):
      student_hidden = hidden_states(
        student,
        params,
        rows.batch.encoder_input_tokens,
        outputs.tokens,
        encoded=encoded,
        dropout_rng=shared.rngs.dropout if models.has_dropout else None,
      )
    arrays = (
      student.head_params(params),
      student_hidden,
      shared.teacher_head,
      rows.teacher_hidden,
      outputs.tokens,
    )
    coefficients_BT, count = objectives.coefficients(
      outputs.weights, objective.reduction
    )
    row_weights_B1 = None
    if rows.batch.row_weights is not None:
      of_rows_B = repeat_rows(rows.batch.row_weights, outputs.tokens)
      row_weights_B1 = of_rows_B[:, None]
    worth = None
    if credit is not None:
      log_probs = functools.partial(
        _log_probs,
        ids,
        credit.needs_lse,
        *unembeds,
        objective.chunk_tokens,
        *arrays,
      )
      worth = jax.lax.stop_gradient(
        credit.assign(
          _evidence(
            models,
            log_probs,
            params,
            repeat_rows(encoded, outputs.tokens),
            rows._replace(batch=repeat_rows(rows.batch, outputs.tokens)),
            shared,
            coefficients_BT,
          )
        )
      )
    if row_weights_B1 is not None:
      coefficients_BT *= row_weights_B1
      if worth is not None:
        worth = worth.times(row_weights_B1)
    with jax.named_scope('student'):
      sums = chunked_sums.weighted_sums(
        objective.terms(
          ids, with_lse=worth is not None and worth.per_lse is not None
        ),
        *unembeds,
        objective.chunk_tokens,
        *arrays,
        coefficients_BT,
        None if worth is None else worth.gradient(),
        _extras(objective, trained.heads, shared.carried, rollouts),
      )
    if worth is not None and worth.gradient() is not None:
      sums['loss'] -= worth.total
    ended_B = jnp.any(outputs.tokens == ids.eos, axis=1)
    counts = {
      'count': count,
      'sequences': jnp.float32(outputs.tokens.shape[0]),
      'target_tokens': outputs.weights.sum(),
      'on_policy': rollouts.student_share_B.sum(),
      'truncated': (~ended_B).sum(dtype=jnp.float32),
    }
    if worth is not None:
      counts['credit'] = worth.sums
    return sums['loss'], {**sums, **counts}

  return loss_sums


def _extras(objective, heads, carried, rollouts) -> chunked_sums.Extras | None:
  """Returns the divergence's inputs other than logits; None: it has none."""
  divergence = objective.divergence
  if not objective.needs_teacher or divergence.needs_logits_alone:
    return None
  per_token = {'author': rollouts.author, 'log_probs': rollouts.log_probs}
  return chunked_sums.Extras(
    heads,
    carried,
    {name: x for name, x in per_token.items() if name in divergence.reads},
  )


def _evidence(
  models, log_probs, params, encoded, rows, shared, coefficients_BT
) -> credit_lib.Evidence:
  """Returns the inputs of the credit; see `credit.Evidence`."""
  method, rollouts = models.method, rows.rollouts

  num = method.policy.num_outputs

  def sample_greedy():
    inputs, known, row_ids = jax.tree.map(
      lambda x: x[::num],
      (rows.batch.encoder_input_tokens, encoded, rows.row_ids_B),
    )
    drawn = rollout_lib.rollout(
      rollout_lib.Writer(models.student, params, inputs, sampler.GREEDY, known),
      shared.rngs.sample,
      row_ids_B=row_ids,
      max_decode_len=rollouts.outputs.tokens.shape[1],
      ids=models.ids,
    )
    return repeat_rows(
      Outputs(drawn.tokens, drawn.weights), rollouts.outputs.tokens
    )

  @jax.named_scope('reward')
  def compute_rewards(outputs):
    return rewards.compute(
      models.reward_fn, rows.batch, outputs, shared.frozen.reward
    )

  return credit_lib.Evidence(
    rollouts,
    rows.row_ids_B,
    log_probs,
    compute_rewards,
    sample_greedy,
    method.policy.student_data_fraction == 1.0,
    coefficients_BT,
    num,
  )


@jax.named_scope('credit')
def _log_probs(
  ids, with_lse, student_unembed, teacher_unembed, chunk_tokens, *arrays
) -> credit_lib.LogProbs:
  """Returns the outputs' log-probabilities, in one pass over the vocabulary."""

  def values(student_logits, teacher_logits, tokens):
    if teacher_logits is None:
      logits = {'student': objectives.mask_unused_ids(student_logits, ids)}
    else:
      both = objectives.comparable_logits(student_logits, teacher_logits, ids)
      logits = dict(zip(('student', 'teacher'), both, strict=True))
    found = {
      name: -objectives.negative_log_likelihood(x, tokens)
      for name, x in logits.items()
    }
    if with_lse:
      found['lse'] = jax.nn.logsumexp(
        logits['student'].astype(jnp.float32), axis=-1
      )
    return found

  found = chunked_sums.token_values(
    values, student_unembed, teacher_unembed, chunk_tokens, *arrays
  )
  return credit_lib.LogProbs(
    found['student'], found.get('teacher'), found.get('lse')
  )


def _means(sums, count, credit) -> Metrics:
  """Returns the metrics of a step from its sums.

  Metrics of a credit are means over the rows that it applies to, NaN without
  such rows; `<name>_squared` becomes `<name>_rms`.
  """
  sums = dict(sums)
  sequences = sums.pop('sequences')
  of_credit = {
    name: total
    / (sums['on_policy'] if credit.student_outputs_only else sequences)
    for name, total in sums.pop('credit', {}).items()
  }
  for name in [name for name in of_credit if name.endswith('_squared')]:
    rms = jnp.sqrt(of_credit.pop(name))
    of_credit[name.removesuffix('_squared') + '_rms'] = rms
  per_sequence = {
    name: sums.pop(name) / sequences for name in ('on_policy', 'truncated')
  }
  return {
    'target_tokens': sums.pop('target_tokens'),
    **{name: total / count for name, total in sums.items()},
    **per_sequence,
    **of_credit,
  }


def check_no_state(method: Method) -> None:
  """Raises ValueError if a part has state, heads or a schedule."""
  if method.policy.schedules:
    raise ValueError(
      f'{next(iter(method.policy.schedules))} is a function of the step, which '
      'is not known here: set it to a number, or train with gkd_jax.main.'
    )
  divergence = method.objective.divergence
  inits = [method.policy.init, method.teacher.init]
  if divergence is not None:
    inits += [divergence.init, divergence.init_heads]
  if any(init is not None for init in inits):
    raise ValueError(
      'A policy, teacher or divergence with state or heads needs a '
      '`TrainState`; train with gkd_jax.main.'
    )


def _update(method, optimizer, state, grads, policy_carried, means):
  """Returns the fields of the state after a finite step, without `step`."""
  old = state_lib.trained(state.params, state.heads)
  updates, opt_state = optimizer.update(grads, state.opt_state, old)
  new = optax.apply_updates(old, updates)
  params, heads = new if isinstance(new, Trained) else (new, state.heads)
  carried = _next_carried(method, state.carried, policy_carried, params, means)
  return params, opt_state, heads, carried


def _next_carried(method, carried, policy_carried, params, means) -> Carried:
  """Returns the carried state after a finite step.

  Raises:
    ValueError: a part changes the shapes of its state.
  """
  new = Carried()
  if method.policy.init is not None:
    new = new._replace(policy=policy_carried)
  if method.teacher.init is not None:
    new = new._replace(teacher=method.teacher.update(carried.teacher, params))
  divergence = method.objective.divergence
  if divergence is not None and divergence.init is not None:
    new = new._replace(divergence=divergence.update(carried.divergence, means))
  for name, before, after in zip(Carried._fields, carried, new, strict=True):
    before, after = (
      jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), x)
      for x in (before, after)
    )
    if before != after:
      raise ValueError(
        f'The state of the {name} must keep its structure, shapes and dtypes: '
        f'{before} became {after}.'
      )
  return new
