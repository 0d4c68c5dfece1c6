# SPDX-License-Identifier: Apache-2.0
"""Rules between the parts of a method; each function is named for its rule.

Single values are checked by the part that owns them.
"""

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.decoding import sampler
from gkd_jax.distill import policies
from gkd_jax.distill.credit import SEVERAL
from gkd_jax.distill.divergences import Divergence
from gkd_jax.distill.methods import Method
from gkd_jax.distill.teachers import Several


class Setup(NamedTuple):
  """The values that the rules check.

  Attributes:
    method: policy, teacher, objective and credit.
    dropout_rate: of the student.
    batch_size: outputs per step; None: not known yet.
    num_microbatches: microbatches per batch.
  """

  method: Method
  dropout_rate: float
  batch_size: int | None = None
  num_microbatches: int = 1


def check(setup: Setup) -> None:
  """Raises ValueError if a rule is violated. Reads and compiles nothing."""
  for rule in RULES:
    rule(setup)


def something_is_minimised(setup: Setup) -> None:
  """A weight of the objective is positive, or the credit has a gradient."""
  objective, credit = setup.method.objective, setup.method.credit
  learns = credit is not None and credit.learns
  if not (objective.divergence_weight or objective.likelihood_weight or learns):
    raise ValueError(
      'This method has nothing to minimise: DIVERGENCE_WEIGHT and '
      'LIKELIHOOD_WEIGHT are 0, and no reward has a positive REWARD_WEIGHT.'
    )


def likelihood_is_not_of_the_students_outputs(setup: Setup) -> None:
  """The likelihood term excludes outputs that the student wrote."""
  weight = setup.method.objective.likelihood_weight
  policy = setup.method.policy
  if weight > 0.0 and policy.student_may_write:
    fraction = policy.student_data_fraction
    who = (
      'the student writes tokens under this policy'
      if fraction is None
      else f'STUDENT_DATA_FRACTION is {fraction}'
    )
    raise ValueError(
      f'LIKELIHOOD_WEIGHT is {weight} and {who}: '
      "maximising the likelihood of the student's own outputs would reinforce "
      'its mistakes. Set LIKELIHOOD_WEIGHT = 0.0, or STUDENT_DATA_FRACTION = '
      "0.0 to train on the dataset's outputs alone."
    )


def reward_is_of_the_students_outputs(setup: Setup) -> None:
  """A reward needs outputs that the student writes."""
  credit = setup.method.credit
  student_outputs_only = credit is not None and credit.student_outputs_only
  if student_outputs_only and setup.method.policy.student_data_fraction == 0.0:
    raise ValueError(
      "A reward scores the student's outputs, but STUDENT_DATA_FRACTION is "
      '0.0: the student writes none. Set STUDENT_DATA_FRACTION = 1.0, or '
      'REWARD = None and REWARD_WEIGHT = None.'
    )


def rewarded_outputs_are_samples_of_the_student(setup: Setup) -> None:
  """A reward needs outputs that the current student wrote alone."""
  credit = setup.method.credit
  student_outputs_only = credit is not None and credit.student_outputs_only
  if student_outputs_only and not setup.method.policy.samples_student:
    raise ValueError(
      "A reward scores samples of the student's current distribution, but "
      'POLICY replays outputs of earlier steps or lets the teacher write parts '
      'of them. Set POLICY = @policies.student(), or REWARD = None and '
      'REWARD_WEIGHT = None.'
    )


def reinforce_draws_ancestrally(setup: Setup) -> None:
  """REINFORCE needs samples from the student's own distribution."""
  credit, config = setup.method.credit, setup.method.student_sampler
  if credit is None or not credit.is_policy_gradient:
    return
  if config != sampler.ANCESTRAL:
    raise ValueError(
      'REINFORCE differentiates the distribution that outputs are drawn from, '
      "so they must be drawn from the student's unmodified distribution, but "
      f'student_sampler is {config}. Set SAMPLING_TEMPERATURE = 1.0, without '
      'top_k, top_p, min_p and epsilon.'
    )


def reinforce_trains_without_dropout(setup: Setup) -> None:
  """REINFORCE differentiates the distribution that outputs are drawn from."""
  credit = setup.method.credit
  if credit is None or not credit.is_policy_gradient:
    return
  if setup.dropout_rate > 0.0:
    raise ValueError(
      f'DROPOUT_RATE is {setup.dropout_rate}: the student samples without '
      'dropout, so REINFORCE with dropout would differentiate a different '
      'distribution. To learn from a reward set DROPOUT_RATE = 0.0.'
    )


def training_outputs_are_drawn_from_a_model(setup: Setup) -> None:
  """Training does not use the calculator."""
  for name in ('student_sampler', 'teacher_sampler'):
    if getattr(setup.method, name).calculator:
      raise ValueError(
        f'{name}.calculator is set, but tokens of the calculator are not drawn '
        'from the model: the student would be trained on outputs that are '
        "neither its own nor the teacher's. Leave it unset for training; "
        'CALCULATOR = True is for evaluation.'
      )


def drafted_outputs_are_the_teachers(setup: Setup) -> None:
  """A draft serves a teacher that writes, and changes no distribution."""
  method = setup.method
  if method.teacher_drafting is None:
    return
  if not method.policy.needs_teacher:
    raise ValueError(
      'methods.Method.teacher_drafting is set, but the teacher writes no '
      'outputs with this POLICY. Leave it out, or use @policies.teacher().'
    )
  if not method.teacher_drafting.is_exact:
    raise ValueError(
      'methods.Method.teacher_drafting has the lenience '
      f'{method.teacher_drafting.lenience}, so outputs would not be the '
      "teacher's. Set speculative.Drafting.lenience = 1.0."
    )


def a_live_teacher_has_no_dropout(setup: Setup) -> None:
  """Student and live teacher are equal if they read the same."""
  if setup.method.teacher.is_live and setup.dropout_rate > 0.0:
    raise ValueError(
      f'DROPOUT_RATE is {setup.dropout_rate} and the teacher is the live '
      'student, which runs without dropout: loss and gradient would not be 0 '
      'where the two agree, and the student would be trained towards its own '
      'outputs without dropout. Set DROPOUT_RATE = 0.0, or '
      'methods.Method.teacher = @teachers.ema().'
    )


def compared_outputs_are_of_one_input(setup: Setup) -> None:
  """A credit that compares outputs of one input needs several of them."""
  credit, policy = setup.method.credit, setup.method.policy
  if credit is None:
    return
  num, wanted = policy.num_outputs, credit.outputs_per_input
  if wanted == SEVERAL and num < 2:
    raise ValueError(
      "REWARD_BASELINE = 'group_mean' and 'group_normalized' compare several "
      f'outputs of each input, but POLICY writes {num}. Set OUTPUTS_PER_INPUT '
      'to 2 or more.'
    )
  if wanted not in (None, SEVERAL, num):
    raise ValueError(
      f'The credit compares {wanted} outputs of each input, but POLICY writes '
      f"{num}. Set the credit's own policy, such as POLICY = "
      '@policies.with_anchor() for @credit.j_bond().'
    )


def one_teacher_writes(setup: Setup) -> None:
  """Only one teacher can write outputs; several grade them."""
  method = setup.method
  if isinstance(method.teacher, Several) and method.policy.needs_teacher:
    raise ValueError(
      'POLICY lets the teacher write outputs, but the method has several '
      f'teachers, {", ".join(method.teacher.members)}, which only grade '
      'outputs. Set POLICY to a policy of dataset and student, such as '
      '@policies.student().'
    )


def compared_outputs_are_in_one_microbatch(setup: Setup) -> None:
  """A microbatch has at least as many rows as the credit compares."""
  credit, batch_size = setup.method.credit, setup.batch_size
  if credit is None or batch_size is None:
    return
  rows = batch_size // setup.num_microbatches
  if rows < credit.min_rows:
    raise ValueError(
      f'The credit needs at least {credit.min_rows} outputs per microbatch '
      "(REWARD_BASELINE = 'batch_mean' is the mean reward of the other "
      f'outputs), but BATCH_SIZE {batch_size} in {setup.num_microbatches} '
      f'microbatches leaves {rows}. Use fewer microbatches, or set '
      "REWARD_BASELINE to 'self_critical' or 'none'."
    )


def the_policys_buffer_holds_a_batch(setup: Setup) -> None:
  """A replayed batch has as many rows as any other."""
  buffer_rows = setup.method.policy.buffer_rows
  if buffer_rows is not None and setup.batch_size is not None:
    policies.check_buffer(buffer_rows, setup.batch_size)


RULES = (
  something_is_minimised,
  likelihood_is_not_of_the_students_outputs,
  reward_is_of_the_students_outputs,
  rewarded_outputs_are_samples_of_the_student,
  reinforce_draws_ancestrally,
  reinforce_trains_without_dropout,
  training_outputs_are_drawn_from_a_model,
  drafted_outputs_are_the_teachers,
  a_live_teacher_has_no_dropout,
  compared_outputs_are_of_one_input,
  one_teacher_writes,
  compared_outputs_are_in_one_microbatch,
  the_policys_buffer_holds_a_batch,
)


def check_divergence(method: Method, vocab_size: int) -> None:
  """Traces the method's divergence on logits of the real vocabulary size.

  Exceptions of the divergence itself pass through with their traceback.

  Args:
    method: its objective has the divergence.
    vocab_size: width of the compared logits.

  Raises:
    ValueError: the divergence has a wrong signature, or does not return one
      float per token.
  """
  if not method.objective.needs_teacher:
    return
  divergence = method.objective.divergence
  check_signature(divergence)
  shape = (1, 2)
  logits = jax.ShapeDtypeStruct((*shape, vocab_size), jnp.float32)
  dtypes = {'tokens': jnp.int32, 'author': jnp.int8, 'log_probs': jnp.float32}
  keywords = {
    name: jax.ShapeDtypeStruct(shape, dtypes[name]) for name in divergence.reads
  }
  keywords |= {'teacher_logits': logits, 'student_logits': logits}
  if divergence.init is not None:
    keywords['carried'] = jax.eval_shape(divergence.init)
  if divergence.init_heads is not None:
    keywords['heads'] = jax.eval_shape(
      lambda: divergence.init_heads(jax.random.key(0))
    )
  # A new function each time: JAX would not trace the same one twice, but gin
  # may have bound other settings to it since, and records what is read.
  value = jax.eval_shape(lambda **kw: divergence.function(**kw), **keywords)
  if getattr(value, 'shape', None) != shape or not jnp.issubdtype(
    value.dtype, jnp.floating
  ):
    raise ValueError(
      f'Objective.divergence {divergence.reported_name} must map logits '
      f'[..., V] to [...] floats, but maps {logits.shape} to {value}.'
    )


def check_signature(divergence: Divergence) -> None:
  """Raises ValueError unless a divergence accepts its keywords."""
  try:
    signature = inspect.signature(divergence.function)
  except (TypeError, ValueError):
    return  # not a Python function: calling it raises its own error
  try:
    # bind_partial, because gin may bind the other parameters invisibly.
    signature.bind_partial(**dict.fromkeys(divergence.keywords))
  except TypeError as e:
    wanted = ' and '.join(divergence.keywords)
    raise ValueError(
      f'Objective.divergence must be a function of {wanted}, such as '
      f'@divergences.forward_kl: {e}.'
    ) from e
