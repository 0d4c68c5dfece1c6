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
variation as in f-distill, Wen et al. (2023), arXiv:2307.15190. Each further
divergence names its source.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import MASKED_LOGIT
from gkd_jax.distill.policies import DATASET, STUDENT

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
  binds; or what `_named` declares, which includes arguments bound by gin.
  """
  if getattr(inspect.unwrap(_unbound(function)), 'names_itself', False):
    return function(teacher_logits=None, student_logits=None)
  settings = []
  while isinstance(function, functools.partial):
    settings = [*function.args, *function.keywords.values(), *settings]
    function = function.func
  name = getattr(function, '__name__', type(function).__name__)
  return '_'.join([name, *map(str, settings)])


def _named(name: str) -> Callable[[Callable], Callable]:
  """Decorates a divergence that is reported with its settings.

  Arguments bound by gin are visible only inside the function. Therefore the
  decorated function returns its name if `teacher_logits` is None.

  Args:
    name: with settings in braces, such as 'jsd_{beta}'.
  """

  def decorate(function):
    signature = inspect.signature(function)
    function.names_itself = True  # found by `inspect.unwrap`

    @functools.wraps(function)
    def named(**keywords):
      if keywords.get('teacher_logits', ...) is not None:
        return function(**keywords)
      bound = signature.bind(**keywords)
      bound.apply_defaults()
      return name.format_map(bound.arguments)

    # gin reads the parameters from it.
    named.__signature__ = signature
    return named

  return decorate


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


@_named('jsd_{beta}')
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
  if not isinstance(beta, int | float) or not 0.0 < beta < 1.0:
    raise ValueError(
      f'generalized_jsd needs 0 < beta < 1, got beta={beta}. At beta=0 and '
      'beta=1 it is 0 for every pair of models. For these limits use '
      'forward_kl, KL(teacher || student), or reverse_kl, '
      'KL(student || teacher).'
    )
  log_p, log_q = _log_probs(teacher_logits), _log_probs(student_logits)
  log_m = _log_mixture(log_p, log_q, beta)
  return beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)


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


@_named('skew_forward_kl_{alpha}')
def skew_forward_kl(
  *,
  teacher_logits: jax.Array,
  student_logits: jax.Array,
  alpha: float = 0.1,
) -> jax.Array:
  """KL(P || alpha P + (1 - alpha) Q): forward KL with a bound.

  Args:
    teacher_logits: [..., V] logits of P.
    student_logits: [..., V] logits of Q.
    alpha: weight of the teacher in the mixture, strictly between 0 and 1.

  Returns:
    [...] float32 nats, at most -ln(alpha).

  Raises:
    ValueError: alpha is not strictly between 0 and 1.

  Source: DistiLLM, Ko et al. (2024), arXiv:2402.03898. Its code returns this
  plus the entropy of P; the gradient is the same.
  """
  _check_skew('skew_forward_kl', alpha)
  log_p, log_q = _log_probs(teacher_logits), _log_probs(student_logits)
  return _kl(log_p, _log_mixture(log_p, log_q, alpha))


@_named('skew_reverse_kl_{alpha}')
def skew_reverse_kl(
  *,
  teacher_logits: jax.Array,
  student_logits: jax.Array,
  alpha: float = 0.1,
) -> jax.Array:
  """KL(Q || (1 - alpha) P + alpha Q): reverse KL with a bound.

  Args:
    teacher_logits: [..., V] logits of P.
    student_logits: [..., V] logits of Q.
    alpha: weight of the student in the mixture, strictly between 0 and 1.

  Returns:
    [...] float32 nats, at most -ln(alpha).

  Raises:
    ValueError: alpha is not strictly between 0 and 1.

  Source: DistiLLM, Ko et al. (2024), arXiv:2402.03898. The student in the
  mixture has a gradient, as in the paper and its code; DistiLLM-2's code
  detaches it, which its paper does not mention.
  """
  _check_skew('skew_reverse_kl', alpha)
  log_p, log_q = _log_probs(teacher_logits), _log_probs(student_logits)
  return _kl(log_q, _log_mixture(log_q, log_p, alpha))


@_named('adaptive_kl_{mu}')
def adaptive_kl(
  *,
  teacher_logits: jax.Array,
  student_logits: jax.Array,
  mu: float = 0.5,
  head: str = 'official',
) -> jax.Array:
  """AKL: w KL(P || Q) + (1 - w) KL(Q || P), with w from where they differ.

  The ids are sorted by P and split into a head and a tail. w is the share of
  the head in sum |P - Q|; it is constant in the gradient, and 1/2 where P = Q.

  Args:
    teacher_logits: [..., V] logits of P.
    student_logits: [..., V] logits of Q.
    mu: probability of the head, strictly between 0 and 1.
    head: 'official', as in the authors' code: the ids whose cumulative
      probability is at most mu, and always the first; or 'smallest': the
      smallest set of most probable ids with probability mu or more.

  Returns:
    [...] float32 nats.

  Raises:
    ValueError: mu or head is invalid.

  Source: Wu et al. (2024), arXiv:2404.02657.
  """
  if head not in ('official', 'smallest'):
    raise ValueError(
      f"adaptive_kl.head must be 'official' or 'smallest', got {head!r}."
    )
  if not 0.0 < mu < 1.0:
    raise ValueError(f'adaptive_kl.mu must be in (0, 1), got {mu}.')
  log_p, log_q = _log_probs(teacher_logits), _log_probs(student_logits)
  p, gap = jax.lax.stop_gradient(
    (jnp.exp(log_p), jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)))
  )
  falling, gap = jax.lax.sort((-p, gap), num_keys=1)
  through = jnp.cumsum(-falling, axis=-1)
  is_head = through <= mu if head == 'official' else through + falling < mu
  is_head = is_head.at[..., 0].set(True)
  head_gap, all_gap = jnp.sum(gap, -1, where=is_head), jnp.sum(gap, -1)
  w = jnp.where(all_gap > 0.0, head_gap / jnp.maximum(all_gap, 1e-30), 0.5)
  return w * _kl(log_p, log_q) + (1.0 - w) * _kl(log_q, log_p)


def todi(*, teacher_logits: jax.Array, student_logits: jax.Array) -> jax.Array:
  """ToDi: forward and reverse KL mixed for each id of the vocabulary.

      sum_v  a_v P_v ln(P_v / Q_v) + (1 - a_v) Q_v ln(Q_v / P_v)
      a_v = P_v / (P_v + Q_v), constant in the gradient

  Args:
    teacher_logits: [..., V] logits of P.
    student_logits: [..., V] logits of Q.

  Returns:
    [...] float32 nats, at least 0.

  Source: Jung et al. (2025), arXiv:2505.16297, read in its abstract.
  """
  log_p, log_q = _log_probs(teacher_logits), _log_probs(student_logits)
  ratio = log_p - log_q
  a = jax.lax.stop_gradient(jax.nn.sigmoid(ratio))
  per_id = a * jnp.exp(log_p) - (1.0 - a) * jnp.exp(log_q)
  return jnp.sum(per_id * ratio, axis=-1)


@_named('alpha_beta_{alpha}_{beta}')
def alpha_beta(
  *,
  teacher_logits: jax.Array,
  student_logits: jax.Array,
  alpha: float = 0.2,
  beta: float = 0.7,
) -> jax.Array:
  """The alpha-beta divergence, with its limits where a denominator is 0.

      -1/(a b) sum_v [ P^a Q^b - a/(a+b) P^(a+b) - b/(a+b) Q^(a+b) ]

  (1, 0) is forward KL, (0, 1) reverse KL, and alpha + beta = 1 the
  alpha-divergence (1 - sum P^a Q^(1-a)) / (a (1-a)) of f-distill; f-distill's
  Jensen-Shannon divergence is `generalized_jsd` with beta = 0.5.

  Args:
    teacher_logits: [..., V] logits of P.
    student_logits: [..., V] logits of Q.
    alpha: exponent of P.
    beta: exponent of Q.

  Returns:
    [...] float32, at least 0. Ids that both models mask contribute 0.

  Source: Cichocki et al. (2011); for distillation ABKD, Wang et al. (2025). The
  code of ABKD divides by alpha instead of alpha^2 at beta = 0, and likewise at
  alpha = 0.
  """
  log_p, log_q = _log_probs(teacher_logits), _log_probs(student_logits)
  is_masked = jnp.maximum(log_p, log_q) < 0.5 * MASKED_LOGIT
  # Negative exponents: masked ids would be infinite.
  log_p, log_q = (jnp.where(is_masked, 0.0, x) for x in (log_p, log_q))
  total = alpha + beta

  def power(a, b):
    return jnp.exp(jnp.minimum(a * log_p + b * log_q, 80.0))

  if alpha == 0.0 and beta == 0.0:
    per_id = 0.5 * jnp.square(log_p - log_q)
  elif beta == 0.0:
    p, q = power(alpha, 0.0), power(0.0, alpha)
    per_id = (p * alpha * (log_p - log_q) - p + q) / alpha**2
  elif alpha == 0.0:
    p, q = power(beta, 0.0), power(0.0, beta)
    per_id = (q * beta * (log_q - log_p) - q + p) / beta**2
  elif total == 0.0:
    ratio = alpha * (log_q - log_p)
    per_id = (ratio + power(alpha, -alpha) - 1.0) / alpha**2
  else:
    own = (alpha * power(total, 0.0) + beta * power(0.0, total)) / total
    per_id = (own - power(alpha, beta)) / (alpha * beta)
  return jnp.sum(jnp.where(is_masked, 0.0, per_id), axis=-1)


@_named('logit_difference_{k}_{temperature}')
def logit_difference(
  *,
  teacher_logits: jax.Array,
  student_logits: jax.Array,
  k: int = 8,
  temperature: float = 3.0,
) -> jax.Array:
  """BiLD: compares the differences between the largest logits.

  A leader's k largest logits, in descending order, have k (k - 1) / 2 pairwise
  differences. The loss is KL(softmax of the teacher's differences || softmax of
  the student's), once with the teacher as leader and once with the student. The
  choice of ids has no gradient. It is 0 also for models that agree on these ids
  alone.

  Args:
    teacher_logits: [..., V].
    student_logits: [..., V].
    k: number of ids, at least 2 and at most the ids of the tokenizer.
    temperature: divides the logits of both.

  Returns:
    [...] float32 nats, at least 0. There is no factor temperature^2.

  Raises:
    ValueError: k or temperature is invalid.

  Source: Li et al. (2024), arXiv:2406.13555.
  """
  width = teacher_logits.shape[-1]
  if not 2 <= k <= width:
    raise ValueError(
      f'logit_difference.k must be between 2 and the vocabulary size {width}, '
      f'got {k}.'
    )
  _check_positive('logit_difference.temperature', temperature)
  logits = [
    jnp.maximum(x.astype(jnp.float32), MASKED_LOGIT) / temperature
    for x in (teacher_logits, student_logits)
  ]
  first, second = jnp.triu_indices(k, 1)
  total = 0.0
  for leader in logits:
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(leader), k)
    of_teacher, of_student = (
      jax.nn.log_softmax(chosen[..., first] - chosen[..., second])
      for chosen in (jnp.take_along_axis(x, ids, axis=-1) for x in logits)
    )
    total += _kl(of_teacher, of_student)
  return total


@_named('entropy_gated_{threshold}_{top_k}')
def entropy_gated(
  *,
  teacher_logits: jax.Array,
  student_logits: jax.Array,
  threshold: float = 0.8,
  top_k: int = 16,
) -> jax.Array:
  """EOPD: reverse KL, plus forward KL where the teacher is uncertain.

      KL(Q || P) + [H(P) > threshold] KL(P's top k, renormalised || Q)

  Args:
    teacher_logits: [..., V] logits of P.
    student_logits: [..., V] logits of Q.
    threshold: of the teacher's entropy, in nats.
    top_k: number of the teacher's ids in the forward KL, at least 1.

  Returns:
    [...] float32 nats, at least 0.

  Raises:
    ValueError: top_k is below 1.

  Source: arXiv:2603.07079, as a replication describes it.
  """
  if top_k < 1:
    raise ValueError(f'entropy_gated.top_k must be 1 or more, got {top_k}.')
  log_p, log_q = _log_probs(teacher_logits), _log_probs(student_logits)
  entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
  top_log_p, ids = jax.lax.top_k(log_p, min(top_k, log_p.shape[-1]))
  top_log_q = jnp.take_along_axis(log_q, ids, axis=-1)
  forward = _kl(jax.nn.log_softmax(top_log_p), top_log_q)
  return _kl(log_q, log_p) + jnp.where(entropy > threshold, forward, 0.0)


CLIPS = ('entry', 'token', 'entry_nonnegative')


@_named('clipped_forward_kl_{clip}_{threshold}')
def clipped_forward_kl(
  *,
  teacher_logits: jax.Array,
  student_logits: jax.Array,
  threshold: float = 0.05,
  clip: str = 'token',
) -> jax.Array:
  """Forward KL whose large parts are cut off.

  Args:
    teacher_logits: [..., V] logits of P.
    student_logits: [..., V] logits of Q.
    threshold: in nats, above 0.
    clip: 'token': min(KL, threshold), whose gradient is 0 above the threshold.
      'entry': sum of min(P ln(P/Q), threshold) over the vocabulary, as the code
      of OPSD has it. This is no divergence: it may be negative, its minimum is
      not at Q = P, and where the models differ it lowers the teacher's most
      probable token. 'entry_nonnegative': sum of min(P ln(P/Q) - P + Q,
      threshold), which is forward KL if nothing is cut off, at least 0, and 0
      at Q = P.

  Returns:
    [...] float32 nats.

  Raises:
    ValueError: threshold or clip is invalid.

  Source: OPSD, arXiv:2601.18734 ('entry').
  """
  if clip not in CLIPS:
    raise ValueError(
      f'clipped_forward_kl.clip must be one of {CLIPS}, got {clip!r}.'
    )
  _check_positive('clipped_forward_kl.threshold', threshold)
  log_p, log_q = _log_probs(teacher_logits), _log_probs(student_logits)
  if clip == 'token':
    return jnp.minimum(_kl(log_p, log_q), threshold)
  p = jnp.exp(log_p)
  entries = p * (log_p - log_q)
  if clip == 'entry_nonnegative':
    entries += jnp.exp(log_q) - p
  return jnp.sum(jnp.minimum(entries, threshold), axis=-1)


def by_author(
  student_wrote: Callable[..., jax.Array] = skew_reverse_kl,
  teacher_wrote: Callable[..., jax.Array] = skew_forward_kl,
) -> Divergence:
  """One divergence for tokens of the student, another for all other tokens.

  Args:
    student_wrote: a function of logits, for tokens that the student wrote.
    teacher_wrote: for tokens of the teacher and of the dataset, whose outputs
      may be a teacher's predictions.

  Returns:
    A divergence that reads the author of each token. Both functions are
    computed for every token.

  Source: DistiLLM-2, Ko et al. (2025), arXiv:2503.07067, Eq. 5.
  """

  def function(*, teacher_logits, student_logits, author):
    ours, theirs = (
      of(teacher_logits=teacher_logits, student_logits=student_logits)
      for of in (student_wrote, teacher_wrote)
    )
    return jnp.where(author == STUDENT, ours, theirs)

  name = f'by_author_{name_of(student_wrote)}_{name_of(teacher_wrote)}'
  return Divergence(function, name, reads=('author',))


def importance_weighted(
  divergence: Callable[..., jax.Array] = reverse_kl,
) -> Divergence:
  """A divergence on tokens that a mixture of both models drew.

      D(P, Q) Q(y_t) / (probability at which y_t was drawn)

  The weight is constant in the gradient, and 1 for tokens of the dataset.

  Args:
    divergence: a function of logits.

  Returns:
    A divergence that reads the tokens, their authors and log-probabilities.

  Source: MiniLLM, Gu et al. (2024), arXiv:2306.08543, Eq. 7.
  """

  def function(*, teacher_logits, student_logits, tokens, author, log_probs):
    value = divergence(
      teacher_logits=teacher_logits, student_logits=student_logits
    )
    log_q = jnp.take_along_axis(
      _log_probs(student_logits), tokens[..., None], axis=-1
    )[..., 0]
    weight = jnp.exp(jax.lax.stop_gradient(log_q) - log_probs)
    return jnp.where(author == DATASET, 1.0, weight) * value

  return Divergence(
    function,
    f'importance_weighted_{name_of(divergence)}',
    reads=('tokens', 'author', 'log_probs'),
  )


class TaidState(NamedTuple):
  """State of `taid`: all [] float32."""

  step: jax.Array  # number of updates
  t: jax.Array  # weight of the teacher in the next step
  loss: jax.Array  # the last step's divergence; `adaptive` alone
  momentum: jax.Array  # average relative decrease of the loss; likewise


def taid(
  total_steps: int | None = None,
  t_start: float = 0.4,
  t_end: float = 1.0,
  adaptive: bool = False,
  rate: float = 5e-4,
  momentum: float = 0.99,
) -> Divergence:
  """TAID: forward KL from an interpolation of student and teacher.

      KL(p_t || Q),  p_t = softmax((1 - t) z_Q + t z_P), constant

  The teacher's weight t rises during training. With n the step and N the
  number of steps, t is at least t_start + (t_end - t_start) n / N.

  Args:
    total_steps: N.
    t_start: t of the first step, in [0, 1].
    t_end: the largest t, in [t_start, 1].
    adaptive: True: t grows by rate * sigmoid(m) (1 - t) a step, where m is a
      moving average of the relative decrease of the loss. False: t follows the
      closed form 1 - (1 - t_start) exp(-rate n / 2), which the adaptive rule
      equals within 0.3 % in practice, because m stays near 0.
    rate: alpha of the paper.
    momentum: beta of the paper.

  Returns:
    A divergence whose state changes once per step by the step's mean, but
    neither by evaluations nor by skipped steps.

  Raises:
    ValueError: a value is invalid.

  Source: Shing et al. (2025), arXiv:2501.16937. The loss of the rule is the
  paper's KL; the code uses the cross-entropy.
  """
  if not isinstance(total_steps, int) or total_steps < 1:
    raise ValueError(
      f'taid.total_steps must be the number of steps, got {total_steps!r}. Set '
      'it to %TRAIN_STEPS.'
    )
  if not 0.0 <= t_start <= t_end <= 1.0:
    raise ValueError(
      'taid needs 0 <= t_start <= t_end <= 1, got '
      f't_start={t_start}, t_end={t_end}.'
    )
  if not 0.0 <= momentum < 1.0:
    raise ValueError(f'taid.momentum must be in [0, 1), got {momentum}.')
  _check_positive('taid.rate', rate)

  def function(*, teacher_logits, student_logits, carried):
    teacher_logits, own = (
      jnp.maximum(x.astype(jnp.float32), MASKED_LOGIT)
      for x in (teacher_logits, jax.lax.stop_gradient(student_logits))
    )
    target = (1.0 - carried.t) * own + carried.t * teacher_logits
    return forward_kl(teacher_logits=target, student_logits=student_logits)

  def init():
    return TaidState(*(jnp.float32(x) for x in (0.0, t_start, 0.0, 0.0)))

  def floor(step):
    return t_start + (t_end - t_start) * step / total_steps

  def follow_loss(carried, means):
    loss = means['divergence'].astype(jnp.float32)
    decrease = (carried.loss - loss) / (carried.loss + 1e-15)
    average = momentum * carried.momentum + (1.0 - momentum) * decrease
    grown = carried.t + rate * jax.nn.sigmoid(average) * (1.0 - carried.t)
    # As in the paper's code: the first step only stores its loss, and n of the
    # floor is the step that ends now.
    is_first = carried.step == 0.0
    return TaidState(
      carried.step + 1.0,
      jnp.where(is_first, carried.t, bounded(grown, carried.step)),
      loss,
      jnp.where(is_first, carried.momentum, average),
    )

  def follow_schedule(carried, means):
    step = carried.step + 1.0
    grown = 1.0 - (1.0 - t_start) * jnp.exp(-0.5 * rate * step)
    return carried._replace(step=step, t=bounded(grown, step))

  def bounded(t, step):
    return jnp.minimum(t_end, jnp.maximum(floor(step), t))

  update = follow_loss if adaptive else follow_schedule
  return Divergence(function, f'taid_{t_start}', init=init, update=update)


def _check_skew(name, alpha):
  if not isinstance(alpha, int | float) or not 0.0 < alpha < 1.0:
    raise ValueError(
      f'{name} needs 0 < alpha < 1, got alpha={alpha}. At 0 it is the KL '
      'without a bound, at 1 it is 0 for every pair of models.'
    )


def _check_positive(name, value):
  if not value > 0.0:
    raise ValueError(f'{name} must be above 0, got {value}.')


def _log_mixture(log_a, log_b, weight):
  """Returns the log of weight A + (1 - weight) B."""
  return jnp.logaddexp(log_a + jnp.log(weight), log_b + jnp.log1p(-weight))


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
