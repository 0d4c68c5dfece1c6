# SPDX-License-Identifier: Apache-2.0
"""Policies: who writes the outputs y on which student and teacher are compared.

A policy is traced into the step and called once, before the loss. Its result is
data: no gradient flows through it. To add one, write a function that returns a
`Policy` and name it in a gin file.

Source: Agarwal et al. (2024), arXiv:2306.13649, Algorithm 1.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.batch import Batch, Outputs
from gkd_jax.decoding import pair, sampler

# Values of `Rollouts.author`.
DATASET, STUDENT, TEACHER = range(3)

Schedule = Callable[[jax.Array], jax.Array]  # number of steps done -> share


class Rollouts(NamedTuple):
  """The outputs of one step and their origin.

  Attributes:
    outputs: y, and the weight of each token in the loss. With n outputs for
      each input, [n B, T]: rows n i to n i + n - 1 belong to input i. The
      encoders then run on B rows.
    author: [B, T] int8, who wrote each token: DATASET, STUDENT or TEACHER.
    log_probs: [B, T] float32 nats, log-probability of each token under the
      distribution that it was drawn from; 0 for tokens that were not drawn.
    batch: the examples that the outputs belong to; None: the step's batch. Both
      models and the reward read these inputs and targets.
    carried: the policy's state after this step; () if it has none.
    metrics: {name: []}, one for each of `Policy.metrics`, of the full batch;
      NaN where it is not defined.
  """

  outputs: Outputs
  author: jax.Array
  log_probs: jax.Array
  batch: Batch | None = None
  carried: Any = ()
  metrics: dict[str, jax.Array] = {}

  @property
  def by_student_B(self) -> jax.Array:
    """[B] bool: rows in which the student wrote every token."""
    return jnp.all(self.author == STUDENT, axis=1)

  @property
  def student_share_B(self) -> jax.Array:
    """[B] float32: share of a row's weighted tokens that the student wrote."""
    counts_BT = self.outputs.weights != 0.0
    by_student_B = jnp.sum(
      counts_BT & (self.author == STUDENT), axis=1, dtype=jnp.float32
    )
    length_B = jnp.sum(counts_BT, axis=1, dtype=jnp.float32)
    return by_student_B / jnp.maximum(length_B, 1.0)


class Sample(Protocol):
  """Draws outputs from a model, one per input unless `num_outputs` is given."""

  def __call__(
    self,
    *,
    prefix: sampler.Prefix | None = None,
    config: sampler.SamplerConfig | None = None,
    rng: jax.Array | None = None,
    num_outputs: int = 1,
  ) -> sampler.Rollout:
    """Returns the outputs.

    Args:
      prefix: tokens to continue; None: none.
      config: how to draw; None: as the method's sampler of this model.
      rng: a key; None: the key of this step. Outputs that must be independent
        of each other need different keys.
      num_outputs: n, outputs for each input: rows n i to n i + n - 1.
    """
    ...


class Comparison(NamedTuple):
  """Student and teacher on the same outputs, at each position."""

  kl: jax.Array  # [B, T] float32 nats, KL(P || Q)
  teacher_token: jax.Array  # [B, T] int32, the teacher's most probable token


class Draw(NamedTuple):
  """The inputs of a policy. Functions that it does not call cost nothing.

  Attributes:
    rng: key of this step's policy.
    batch: the step's examples, with the dataset's own outputs.
    row_ids_B: [B] int32 number of each row in the global batch.
    sample_student: () -> one output per input, drawn from the student.
    sample_teacher: () -> one output per input, drawn from the teacher.
    carried: the policy's state; () if it has none.
    sample_pair: a function of `decoding.pair` -> one output per input, written
      by student and teacher together.
    step: [] int32 number of steps done; None in a trainer that has no step.
    compare: outputs -> Comparison; costs a forward pass of both models.
  """

  rng: jax.Array
  batch: Batch
  row_ids_B: jax.Array
  sample_student: Sample
  sample_teacher: Sample
  carried: Any = ()
  sample_pair: Callable[[pair.Choose], pair.PairRollout] | None = None
  step: jax.Array | None = None
  compare: Callable[[Outputs], Comparison] | None = None


@dataclasses.dataclass(frozen=True)
class Policy:
  """A way to obtain outputs.

  Attributes:
    write: Draw -> Rollouts.
    student_data_fraction: expected fraction of outputs that the student writes,
      lambda in the paper. None: it is not 0, and it changes during training or
      models write outputs together.
    needs_teacher: whether `write` may call `sample_teacher`, `sample_pair` or
      `compare`.
    init: shapes of a batch -> initial state of the policy. `write` reads it in
      `Draw.carried` and returns the next one in `Rollouts.carried`. None: the
      policy has no state.
    metrics: names of `Rollouts.metrics`.
    samples_student: whether rows with STUDENT as the only author are samples of
      the student's current distribution. False: a reward is refused.
    schedules: {setting: function of the step}; their values must be in [0, 1].
    num_outputs: n, outputs for each input.
    buffer_rows: rows of earlier steps that the policy keeps and may return with
      their inputs, at least a batch. None: it keeps none.
    evaluated: (carried, {name: value} of an evaluation during training) ->
      carried. It runs on the host, with the same values on each. None: the
      state does not depend on evaluations.
    reads_metrics: names of the values that `evaluated` reads.
    reads_pairs: whether `write` reads the batch's pairs of outputs.
  """

  write: Callable[[Draw], Rollouts]
  student_data_fraction: float | None
  needs_teacher: bool = False
  init: Callable[[Batch], Any] | None = None
  metrics: tuple[str, ...] = ()
  samples_student: bool = True
  schedules: Mapping[str, Schedule] = dataclasses.field(
    default_factory=dict, hash=False
  )
  num_outputs: int = 1
  buffer_rows: int | None = None
  evaluated: Callable[[Any, Mapping[str, float]], Any] | None = None
  reads_metrics: tuple[str, ...] = ()
  reads_pairs: bool = False

  @property
  def student_may_write(self) -> bool:
    """Whether the student writes outputs, or parts of them, at any step."""
    return self.student_data_fraction != 0.0


def rollouts(
  outputs: Outputs, author: int | jax.Array, log_probs: jax.Array | None = None
) -> Rollouts:
  """Returns rollouts of outputs with known authors.

  Args:
    outputs: [B, T].
    author: a scalar, [B] one per row, or [B, T] one per token.
    log_probs: [B, T] of the draw; None: the outputs were not drawn.
  """
  shape = outputs.tokens.shape
  author = jnp.asarray(author, jnp.int8)
  if author.ndim == 1:
    author = author[:, None]
  if log_probs is None:
    log_probs = jnp.zeros(shape, jnp.float32)
  return Rollouts(outputs, jnp.broadcast_to(author, shape), log_probs)


def drawn_by(author: int, drawn: sampler.Rollout) -> Rollouts:
  """Returns the rollouts of samples that one author drew."""
  outputs = Outputs(drawn.tokens, drawn.weights)
  return rollouts(outputs, author, drawn.log_probs)


def dataset() -> Policy:
  """The dataset's own outputs: supervised distillation, lambda = 0."""
  return Policy(lambda draw: rollouts(draw.batch.outputs, DATASET), 0.0)


def student(outputs_per_input: int = 1) -> Policy:
  """Outputs drawn from the student's current weights: lambda = 1.

  Args:
    outputs_per_input: n, independent outputs for each input of the batch. The
      encoder runs once for an input, and credits may compare the outputs.

  Raises:
    ValueError: outputs_per_input is below 1.
  """
  if outputs_per_input < 1:
    raise ValueError(
      f'OUTPUTS_PER_INPUT must be 1 or more, got {outputs_per_input}.'
    )

  def write(draw):
    drawn = draw.sample_student(num_outputs=outputs_per_input)
    return drawn_by(STUDENT, drawn)

  return Policy(write, 1.0, num_outputs=outputs_per_input)


def pairs() -> Policy:
  """Two outputs of the dataset for each input: the better one, the worse one.

  They are read from a file of predictions, `datasets.DatasetConfig.pairs`.
  """

  def write(draw):
    better, worse = draw.batch.outputs, draw.batch.rejected
    return rollouts(Outputs(*map(_alternate, better, worse)), DATASET)

  return Policy(write, 0.0, num_outputs=2, reads_pairs=True)


def teacher() -> Policy:
  """Outputs drawn from the teacher, during training."""
  return Policy(
    lambda draw: drawn_by(TEACHER, draw.sample_teacher()),
    0.0,
    needs_teacher=True,
  )


def mixture(
  student_data_fraction: float | Schedule,
  per: str = 'batch',
  otherwise: Callable[[], Policy] = dataset,
  outputs_per_input: int = 1,
) -> Policy:
  """The student with probability lambda, another policy otherwise.

  Args:
    student_data_fraction: lambda. At 0 the result is the policy `otherwise`, at
      1 it is `student`. Or a function of the number of steps done, such as
      @optax.linear_schedule(), with values in [0, 1].
    per: 'batch', one random choice per step as in Algorithm 1 (steps that do
      not sample skip its cost), or 'sequence', one random choice per row.
    otherwise: `dataset`, `teacher`, or another function that returns a policy
      for the step's own batch.
    outputs_per_input: see `student`; above 1 only if lambda is 1.

  Raises:
    ValueError: lambda is outside [0, 1], `per` is invalid, `otherwise` does not
      write one output for each input of the step's batch, or there are several
      outputs per input and lambda is not 1.
  """
  is_schedule = callable(student_data_fraction)
  if not is_schedule and not 0.0 <= student_data_fraction <= 1.0:
    raise ValueError(
      'student_data_fraction (lambda of the paper) must be in [0, 1], got '
      f'{student_data_fraction}: it is the fraction of outputs that the '
      'student writes.'
    )
  if per not in ('batch', 'sequence'):
    raise ValueError(f"mixture.per must be 'batch' or 'sequence', got {per!r}.")
  other = otherwise()
  _check_is_of_the_batch('mixture.otherwise', other)
  if outputs_per_input != 1 and student_data_fraction != 1.0:
    raise ValueError(
      f'OUTPUTS_PER_INPUT is {outputs_per_input}, but the dataset has one '
      'output per input: set STUDENT_DATA_FRACTION = 1.0, so that the student '
      'writes all of them, or OUTPUTS_PER_INPUT = 1.'
    )
  if student_data_fraction == 0.0:
    return other
  if student_data_fraction == 1.0:
    return student(outputs_per_input)

  def fraction(draw):
    return _share_at(student_data_fraction, draw.step)

  def by_student(draw):
    undefined = {name: jnp.float32(jnp.nan) for name in other.metrics}
    return (
      student().write(draw)._replace(carried=draw.carried, metrics=undefined)
    )

  def write_batch(draw):
    sampled = jax.random.uniform(draw.rng) < fraction(draw)
    return jax.lax.cond(
      sampled, lambda: by_student(draw), lambda: other.write(draw)
    )

  def write_sequence(draw):
    sampled_B = jax.vmap(
      lambda row: jax.random.uniform(jax.random.fold_in(draw.rng, row))
    )(draw.row_ids_B) < fraction(draw)
    ours, theirs = by_student(draw), other.write(draw)
    per_token = jax.tree.map(
      lambda a, b: jnp.where(sampled_B[:, None], a, b),
      (ours.outputs, ours.author, ours.log_probs),
      (theirs.outputs, theirs.author, theirs.log_probs),
    )
    return Rollouts(*per_token, carried=theirs.carried, metrics=theirs.metrics)

  schedules = dict(other.schedules)
  if is_schedule:
    schedules['STUDENT_DATA_FRACTION'] = student_data_fraction
  return dataclasses.replace(
    other,
    write=write_batch if per == 'batch' else write_sequence,
    student_data_fraction=None if is_schedule else student_data_fraction,
    schedules=schedules,
  )


def _share_at(share: float | Schedule, step: jax.Array) -> float | jax.Array:
  """Returns the value at a step of a constant or a schedule."""
  return share(step) if callable(share) else share


def _check_is_of_the_batch(setting: str, policy: Policy) -> None:
  """Raises ValueError unless a policy writes one output for each input."""
  if policy.buffer_rows is not None or policy.num_outputs != 1:
    raise ValueError(
      f'{setting} must be a policy with one output for each input of the '
      "step's batch, such as @policies.dataset or @policies.teacher; this one "
      'replays earlier inputs or writes several outputs.'
    )


def interleaved(top_k: int = 25) -> Policy:
  """Student and teacher write each output together, token by token.

  The student draws a token; if it is not among the teacher's top k, the teacher
  draws one instead. With as many ids as the vocabulary has this is the policy
  `student`. The metric 'accepted' is the share of the student's tokens that
  stand. Ranks are those of the teacher's logits before temperature and
  cut-offs; the official code ranks after them, where few ids are left.

  Source: Xu et al. (2024), speculative knowledge distillation,
  arXiv:2410.11325, Algorithm 1.

  Args:
    top_k: the rank that the student's tokens need.

  Raises:
    ValueError: top_k is below 1.
  """
  if top_k < 1:
    raise ValueError(
      f'interleaved.top_k must be 1 or more, got {top_k}. Without accepted '
      'tokens the teacher writes all: use @policies.teacher().'
    )

  def write(draw):
    drawn = draw.sample_pair(pair.interleave(top_k))
    weights = drawn.rollout.weights
    accepted = jnp.sum(drawn.by_student * weights) / weights.sum()
    return _together(drawn)._replace(metrics={'accepted': accepted})

  return Policy(
    write,
    None,
    needs_teacher=True,
    metrics=('accepted',),
    samples_student=False,
  )


def mixed_tokens(teacher_share: float = 0.2, mode: str = 'mixture') -> Policy:
  """Each token is drawn from a P + (1 - a) Q.

  The model that draws a token is its author. Both modes draw the same tokens;
  they differ in `Rollouts.log_probs`. In the mode 'mixture' a credit finds
  MiniLLM's importance weight Q / (a P + (1 - a) Q) of each token as exp(log Q -
  log_probs).

  Source: Gu et al. (2023), MiniLLM, arXiv:2306.08543 (mode 'mixture', a = 0.2);
  Liu et al. (2023), online speculative decoding, arXiv:2310.07177 (mode 'coin',
  a = 0.5).

  Args:
    teacher_share: a, the probability that the teacher draws a token. At 0 the
      result is the policy `student`, at 1 it is `teacher`.
    mode: 'mixture': log-probabilities of a P + (1 - a) Q; 'coin': those of the
      model that drew the token.

  Raises:
    ValueError: teacher_share is outside [0, 1], or `mode` is invalid.
  """
  if not 0.0 <= teacher_share <= 1.0:
    raise ValueError(
      f'mixed_tokens.teacher_share must be in [0, 1], got {teacher_share}.'
    )
  if mode not in ('mixture', 'coin'):
    raise ValueError(
      f"mixed_tokens.mode must be 'mixture' or 'coin', got {mode!r}."
    )
  if teacher_share == 0.0:
    return student()
  if teacher_share == 1.0:
    return teacher()
  choose = pair.mix(teacher_share, of_mixture=mode == 'mixture')
  return Policy(
    lambda draw: _together(draw.sample_pair(choose)),
    None,
    needs_teacher=True,
    samples_student=False,
  )


def _together(drawn: pair.PairRollout) -> Rollouts:
  """Returns the rollouts of samples that both models drew."""
  tokens, weights, log_probs = drawn.rollout
  # Padding has no author; then rows without the teacher's tokens have one.
  by_student = drawn.by_student | (weights == 0.0)
  author = jnp.where(by_student, STUDENT, TEACHER)
  return rollouts(Outputs(tokens, weights), author, log_probs)


def corrected(num_corrections: int = 1) -> Policy:
  """The student's output, corrected by the teacher at its worst token.

  The student samples an output. Where the divergence KL(P || Q) is largest,
  among the positions at which the student's token is not the teacher's most
  probable one, the teacher's token is put, and the student continues from
  there. An output without such a position is kept. A step costs one more
  forward pass of both models, and one more rollout, for each correction.

  Source: MGSR, arXiv:2407.10068, "SCRG" (self-correcting regeneration).

  Args:
    num_corrections: how often an output is corrected. A later correction may
      change an earlier position, which discards the earlier correction.

  Raises:
    ValueError: num_corrections is below 1.
  """
  if num_corrections < 1:
    raise ValueError(
      f'corrected.num_corrections must be 1 or more, got {num_corrections}. '
      'Without corrections use @policies.student().'
    )

  def write(draw):
    def correct(written, number):
      rng = jax.random.fold_in(draw.rng, number)
      return _correct(draw, rng, written), None

    drawn = draw.sample_student()
    written = _Written(drawn, jnp.zeros(drawn.tokens.shape, bool))
    written, _ = jax.lax.scan(correct, written, jnp.arange(num_corrections))
    author = jnp.where(written.by_teacher, TEACHER, STUDENT)
    outputs = Outputs(written.drawn.tokens, written.drawn.weights)
    return rollouts(outputs, author, written.drawn.log_probs)

  return Policy(write, None, needs_teacher=True, samples_student=False)


def with_anchor() -> Policy:
  """Three outputs for each input: one by the student, two by the teacher.

  The teacher is the anchor of `credit.j_bond`, a moving average of the student:
  `methods.Method.teacher = @teachers.ema()`.
  """

  def write(draw):
    ours = drawn_by(
      STUDENT, draw.sample_student(rng=jax.random.fold_in(draw.rng, 0))
    )
    theirs = drawn_by(TEACHER, draw.sample_teacher(num_outputs=2))

    return Rollouts(
      *jax.tree.map(
        _alternate,
        (ours.outputs, ours.author, ours.log_probs),
        (theirs.outputs, theirs.author, theirs.log_probs),
      )
    )

  return Policy(write, 1 / 3, needs_teacher=True, num_outputs=3)


class _Written(NamedTuple):
  drawn: sampler.Rollout
  by_teacher: jax.Array  # [B, T] bool


def _correct(draw: Draw, rng: jax.Array, written: _Written) -> _Written:
  """Corrects each row once; the student continues with the key `rng`."""
  tokens, weights, log_probs = written.drawn
  compared = draw.compare(Outputs(tokens, weights))
  differs = (compared.teacher_token != tokens) & (weights > 0.0)
  worst_B = jnp.argmax(jnp.where(differs, compared.kl, -jnp.inf), axis=1)
  position = jnp.arange(tokens.shape[1])
  is_worst = differs.any(axis=1)[:, None] & (position == worst_B[:, None])
  # Without a difference the prefix is the output itself.
  lengths_B = jnp.where(differs.any(axis=1), worst_B + 1, tokens.shape[1])
  corrected_tokens = jnp.where(is_worst, compared.teacher_token, tokens)
  again = draw.sample_student(
    prefix=sampler.Prefix(corrected_tokens, lengths_B), rng=rng
  )
  is_kept = (position < lengths_B[:, None]) & ~is_worst
  return _Written(
    again._replace(log_probs=jnp.where(is_kept, log_probs, again.log_probs)),
    is_worst | (is_kept & written.by_teacher),
  )


def paired(otherwise: Callable[[], Policy] = teacher) -> Policy:
  """Two outputs for each input: another writer's, then the student's.

  With `divergences.by_author` each is compared by its own divergence. The loss
  is a mean over both, which is the paper's Eq. 5 with beta = 0.5.

  Source: Ko et al. (2025), DistiLLM-2, arXiv:2503.07067, Algorithm 1. There
  both are written before each epoch; here in the step, or the teacher's are
  read from a file of predictions (TRAIN_ON_PREDICTIONS).

  Args:
    otherwise: `teacher`, which samples in the step; or `dataset`, whose outputs
      may be a teacher's predictions.

  Raises:
    ValueError: `otherwise` does not write one output for each input of the
      step's batch, or the student writes them.
  """
  other = otherwise()
  _check_is_of_the_batch('paired.otherwise', other)
  if other.student_may_write:
    raise ValueError(
      "paired.otherwise must write outputs that are not the student's: use "
      '@policies.teacher, or @policies.dataset.'
    )

  def write(draw):
    # Independent of the teacher's draws, which have the step's key.
    ours = drawn_by(
      STUDENT, draw.sample_student(rng=jax.random.fold_in(draw.rng, 0))
    )
    theirs = other.write(draw)
    outputs, author, log_probs = jax.tree.map(
      _alternate,
      (theirs.outputs, theirs.author, theirs.log_probs),
      (ours.outputs, ours.author, ours.log_probs),
    )
    return theirs._replace(outputs=outputs, author=author, log_probs=log_probs)

  return dataclasses.replace(
    other, write=write, student_data_fraction=0.5, num_outputs=2
  )


def _alternate(first: jax.Array, second: jax.Array) -> jax.Array:
  """Returns the row of each input in `first`, then those in `second`.

  Args:
    first: [B, T].
    second: [n B, T], rows n i to n i + n - 1 of input i.
  """
  num_inputs, *shape = first.shape
  rows = [x.reshape(num_inputs, -1, *shape) for x in (first, second)]
  return jnp.concatenate(rows, axis=1).reshape(-1, *shape)


class ReplayState(NamedTuple):
  """State of `replay`."""

  rows: tuple[Batch, Outputs, jax.Array]  # examples, outputs, log_probs: [C, .]
  cursor: jax.Array  # [] int32, the next row to replace
  size: jax.Array  # [] int32, rows filled
  fraction: jax.Array  # [] float32, phi
  level: jax.Array  # [] float32, validation loss when phi was raised last


# Of the student on the references of the validation split.
_VALIDATION_LOSS = 'on_dataset_outputs/nll'


def replay(
  capacity: int = 1000,
  student_data_fraction: float = 0.0,
  fresh_share: float | Schedule = 0.5,
  increment: float = 0.1,
  tolerance: float = 0.1,
) -> Policy:
  """Student outputs of this and of earlier steps, and the dataset's outputs.

  With phi the fraction of steps on the student's outputs, s the fresh share and
  u uniform in [0, 1), a step
    samples the student, if u < phi s, or u < phi and the buffer is not full;
    replays outputs from the buffer, if u < phi otherwise;
    trains on the dataset's outputs, if u >= phi.
  Sampled outputs are trained on and enter the buffer, where they replace the
  oldest. Replayed ones are drawn uniformly without replacement, and are
  trained on with their own inputs. Only steps that sample pay for it.

  This is the order of the official code; in the paper's Algorithm 1 a step that
  samples may train on the buffer's outputs. phi is raised by `increment` when
  an evaluation during training finds the validation loss above its level at the
  last raise by `tolerance`. The first evaluation sets the level, whereas the
  official code evaluates before training.

  Metrics: 'sampled' and 'replayed', the shares of these steps, and 'phi'.

  Source: Ko et al. (2024), DistiLLM, arXiv:2402.03898, Algorithm 1 and section
  3.2.

  Args:
    capacity: rows of the buffer, at least a batch. It is replicated on all
      devices.
    student_data_fraction: phi at first.
    fresh_share: s, a number, or a function of the number of steps done with
      values in [0, 1], such as @optax.linear_schedule() from 1 to 0.
    increment: of phi, which is at most 1; 0: phi is constant.
    tolerance: in nats.

  Raises:
    ValueError: a value is outside its range.
  """
  for name, value in (
    ('student_data_fraction', student_data_fraction),
    ('fresh_share', 0.0 if callable(fresh_share) else fresh_share),
    ('increment', increment),
  ):
    if not 0.0 <= value <= 1.0:
      raise ValueError(f'replay.{name} must be in [0, 1], got {value}.')
  if capacity < 1:
    raise ValueError(f'replay.capacity must be 1 or more, got {capacity}.')
  if student_data_fraction == increment == 0.0:
    raise ValueError(
      'replay.student_data_fraction and replay.increment are 0: the student '
      'never writes. Set one of them, or use @policies.dataset().'
    )

  def init(batch):
    check_buffer(capacity, batch.decoder_target_tokens.shape[0])
    rows = (batch, batch.outputs, batch.decoder_loss_weights)
    return ReplayState(
      jax.tree.map(
        lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), rows
      ),
      cursor=jnp.int32(0),
      size=jnp.int32(0),
      fraction=jnp.float32(student_data_fraction),
      level=jnp.float32(jnp.inf),
    )

  def write(draw):
    state = draw.carried
    u = jax.random.uniform(draw.rng)
    is_fresh = u < state.fraction * _share_at(fresh_share, draw.step)
    is_fresh |= (u < state.fraction) & (state.size < capacity)
    kind = jnp.where(is_fresh, 0, jnp.where(u < state.fraction, 1, 2))
    written = jax.lax.switch(
      kind,
      (
        lambda: _sample_and_push(draw),
        lambda: _redraw(draw),
        lambda: rollouts(draw.batch.outputs, DATASET)._replace(
          batch=draw.batch, carried=state
        ),
      ),
    )
    metrics = {
      'sampled': jnp.float32(kind == 0),
      'replayed': jnp.float32(kind == 1),
      'phi': state.fraction,
    }
    return written._replace(metrics=metrics)

  def evaluated(state, values):
    return _raise_fraction(state, values, increment, tolerance)

  is_schedule = callable(fresh_share)
  adapts = increment > 0.0
  return Policy(
    write,
    None,
    init=init,
    metrics=('sampled', 'replayed', 'phi'),
    samples_student=False,
    schedules={'replay.fresh_share': fresh_share} if is_schedule else {},
    buffer_rows=capacity,
    evaluated=evaluated if adapts else None,
    reads_metrics=(_VALIDATION_LOSS,) if adapts else (),
  )


def _raise_fraction(
  state: ReplayState,
  values: Mapping[str, float],
  increment: float,
  tolerance: float,
) -> ReplayState:
  """Raises phi if the validation loss is above its level; see `replay`."""
  loss, level = values[_VALIDATION_LOSS], float(state.level)
  if level == math.inf:  # the first evaluation
    return state._replace(level=np.float32(loss))
  if loss < level + tolerance:
    return state
  fraction = min(float(state.fraction) + increment, 1.0)
  return state._replace(fraction=np.float32(fraction), level=np.float32(loss))


def check_buffer(buffer_rows: int, batch_size: int) -> None:
  """Raises ValueError if a policy's buffer is smaller than a batch."""
  if buffer_rows < batch_size:
    raise ValueError(
      f'replay.capacity is {buffer_rows}, but BATCH_SIZE is {batch_size}: a '
      'step replays a batch, so the buffer must hold at least one. Raise '
      'replay.capacity.'
    )


def _sample_and_push(draw: Draw) -> Rollouts:
  """Samples the student, and replaces the oldest rows of the buffer."""
  written, state = drawn_by(STUDENT, draw.sample_student()), draw.carried
  capacity, num_rows = state.rows[2].shape[0], draw.row_ids_B.shape[0]
  index = (state.cursor + jnp.arange(num_rows)) % capacity
  rows = jax.tree.map(
    lambda kept, new: kept.at[index].set(new.astype(kept.dtype)),
    state.rows,
    (draw.batch, written.outputs, written.log_probs),
  )
  state = state._replace(
    rows=rows,
    cursor=(state.cursor + num_rows) % capacity,
    size=jnp.minimum(state.size + num_rows, capacity),
  )
  return written._replace(batch=draw.batch, carried=state)


def _redraw(draw: Draw) -> Rollouts:
  """Draws a batch from the buffer, uniformly and without replacement."""
  state = draw.carried
  capacity, num_rows = state.rows[2].shape[0], draw.row_ids_B.shape[0]
  rng = jax.random.fold_in(draw.rng, 0)
  is_filled = jnp.arange(capacity) < state.size
  score = jnp.where(is_filled, jax.random.uniform(rng, (capacity,)), -1.0)
  _, index = jax.lax.top_k(score, num_rows)
  batch, outputs, log_probs = jax.tree.map(lambda x: x[index], state.rows)
  written = rollouts(outputs, STUDENT, log_probs)
  return written._replace(batch=batch, carried=state)
