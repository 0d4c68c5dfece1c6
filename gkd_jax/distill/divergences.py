# SPDX-License-Identifier: Apache-2.0
"""Divergences between the next-token distributions of teacher and student.

P is the teacher, Q the student. A divergence maps logits `[..., V]` to `[...]`
float32 nats, one value per position; temperatures, weights and reductions are
in `objectives`. To add one, write a function with this signature and name it in
a gin file.

A divergence that carries state, has learnt parameters or reads more than the
logits is a `Divergence`. It receives these arrays as arguments: the sum over
tokens has a custom gradient (see `chunked_sums`), so a divergence must not
close over arrays of the step.

Logits may be masked by a large negative number or by -inf: the id then has
probability 0, and value and gradient stay finite. If only one model masks an
id, a KL that would be infinite is about 1e9 times the id's probability.

Source: Agarwal et al. (2024), arXiv:2306.13649, section 2 and Eq. 1; total
variation as in f-distill, Wen et al. (2023), arXiv:2307.15190.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax.batch import MASKED_LOGIT

# Per-token arrays that a divergence may read; see `chunked_sums`.
PER_TOKEN = ('tokens', 'author', 'log_probs')


@dataclasses.dataclass(frozen=True)
class Divergence:
  """A divergence with its per-token inputs, state and learnt parameters.

  Attributes:
    function: (*, teacher_logits, student_logits, ...) -> [...], with one more
      keyword for each name in `reads`, `carried` if it has state, and `heads`
      if it has parameters.
    name: its name in metrics and reports; None: the function's name.
    reads: names from PER_TOKEN: [...] arrays of the tokens of y, their authors,
      and the log-probabilities at which they were drawn.
    init: () -> initial state; None: it has no state.
    update: (carried, {metric: value of this step}) -> carried.
    init_heads: key -> parameters that are learnt beside the student's.
  """

  function: Callable[..., jax.Array]
  name: str | None = None
  reads: tuple[str, ...] = ()
  init: Callable[[], Any] | None = None
  update: Callable[[Any, dict[str, jax.Array]], Any] | None = None
  init_heads: Callable[[jax.Array], Any] | None = None

  def __post_init__(self):
    object.__setattr__(self, 'reads', tuple(self.reads))
    if unknown := {*self.reads} - {*PER_TOKEN}:
      raise ValueError(
        f'Divergence.reads may contain {PER_TOKEN}, got {sorted(unknown)}.'
      )
    if (self.init is None) != (self.update is None):
      raise ValueError(
        'Divergence.init and Divergence.update must be set together.'
      )

  @property
  def reported_name(self) -> str:
    return self.name or name_of(self.function)

  @property
  def needs_logits_alone(self) -> bool:
    """Whether it can be evaluated outside a train step."""
    return not (self.reads or self.init or self.init_heads)

  @property
  def keywords(self) -> tuple[str, ...]:
    """The keywords that the function is called with."""
    names = ['teacher_logits', 'student_logits', *self.reads]
    if self.init is not None:
      names.append('carried')
    if self.init_heads is not None:
      names.append('heads')
    return tuple(names)


def name_of(function: Callable[..., Any]) -> str:
  """Returns the name of a divergence in reports, e.g. 'jsd_0.9'.

  It is the function's name, followed by the arguments that functools.partial
  binds. Arguments bound by gin are visible only inside the function: a function
  with the attribute `names_itself` returns its name when both logits are None.
  """
  if getattr(inspect.unwrap(_unbound(function)), 'names_itself', False):
    return function(teacher_logits=None, student_logits=None)
  settings = []
  while isinstance(function, functools.partial):
    settings = [*function.args, *function.keywords.values(), *settings]
    function = function.func
  name = getattr(function, '__name__', type(function).__name__)
  return '_'.join([name, *map(str, settings)])


def _unbound(function):
  while isinstance(function, functools.partial):
    function = function.func
  return function


def forward_kl(
  *, teacher_logits: jax.Array, student_logits: jax.Array
) -> jax.Array:
  """KL(P || Q): mode-covering; the student must cover all of P.

  Its gradient with respect to the student's logits is Q - P, as in maximum
  likelihood with the teacher's distribution as soft labels.

  Args:
    teacher_logits: [..., V] logits of P.
    student_logits: [..., V] logits of Q.

  Returns:
    [...] float32 nats, at least 0.
  """
  return _kl(_log_probs(teacher_logits), _log_probs(student_logits))


def reverse_kl(
  *, teacher_logits: jax.Array, student_logits: jax.Array
) -> jax.Array:
  """KL(Q || P): mode-seeking; the student must stay within the modes of P.

  Args:
    teacher_logits: [..., V] logits of P.
    student_logits: [..., V] logits of Q.

  Returns:
    [...] float32 nats, at least 0.
  """
  return _kl(_log_probs(student_logits), _log_probs(teacher_logits))


def generalized_jsd(
  *,
  teacher_logits: jax.Array,
  student_logits: jax.Array,
  beta: float | None,
) -> jax.Array:
  """Generalized Jensen-Shannon divergence, JSD(beta).

      JSD(beta) = beta KL(P || M) + (1 - beta) KL(Q || M)
              M = beta P + (1 - beta) Q

  Its gradient resembles that of forward KL for small beta and that of reverse
  KL for large beta. Its value tends to 0 at both ends (JSD(beta) / beta tends
  to KL(P || Q)), so beta = 0 and beta = 1 are refused.

  Args:
    teacher_logits: [..., V] logits of P.
    student_logits: [..., V] logits of Q.
    beta: weight of the teacher in M, strictly between 0 and 1. None, the
      default of BETA, is refused.

  Returns:
    [...] float32 nats, at most -(beta ln beta + (1 - beta) ln(1 - beta)).

  Raises:
    ValueError: beta is not strictly between 0 and 1.

  Source: Eq. 1 of arXiv:2306.13649; equals TRL's for 0 < beta < 1.
  """
  if teacher_logits is None:
    return f'jsd_{beta}'
  if not isinstance(beta, int | float) or not 0.0 < beta < 1.0:
    raise ValueError(
      f'generalized_jsd needs 0 < beta < 1, got beta={beta}. At beta=0 and '
      'beta=1 it is 0 for every pair of models. For these limits use '
      'forward_kl, KL(teacher || student), or reverse_kl, '
      'KL(student || teacher).'
    )
  log_p, log_q = _log_probs(teacher_logits), _log_probs(student_logits)
  log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
  return beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)


generalized_jsd.names_itself = True


def total_variation(
  *, teacher_logits: jax.Array, student_logits: jax.Array
) -> jax.Array:
  """Total variation distance, 1/2 sum |P - Q|.

  Args:
    teacher_logits: [..., V] logits of P.
    student_logits: [..., V] logits of Q.

  Returns:
    [...] float32 between 0 and 1: one minus the probability that speculative
    decoding for the teacher accepts a token drawn from the student.
  """
  p = jnp.exp(_log_probs(teacher_logits))
  q = jnp.exp(_log_probs(student_logits))
  return 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)


def _log_probs(logits: jax.Array) -> jax.Array:
  # bfloat16 has 8 bits of precision: too few for differences of
  # log-probabilities. The floor replaces -inf by a number whose exp is also 0,
  # because 0 * inf is nan.
  logits = jnp.maximum(logits.astype(jnp.float32), MASKED_LOGIT)
  return jax.nn.log_softmax(logits)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
  return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)


# Every evaluation measures these in nats per token and reports these names.
REPORTED: dict[str, Callable[..., jax.Array]] = {
  'forward_kl': forward_kl,
  'reverse_kl': reverse_kl,
  'jsd_0.5': functools.partial(generalized_jsd, beta=0.5),
  'total_variation': total_variation,
}


def reported(own: Divergence | None = None) -> dict[str, Callable[..., Any]]:
  """Returns {name: function} of the divergences that an evaluation measures.

  Args:
    own: the method's divergence; measured too, under its own name, if it needs
      only the logits.
  """
  if own is None or not own.needs_logits_alone:
    return REPORTED
  return {own.reported_name: own.function} | REPORTED
