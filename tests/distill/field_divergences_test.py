# SPDX-License-Identifier: Apache-2.0
"""The divergences beside GKD's: vectors, properties, masked ids, bad settings.

Vectors were computed in float64 with NumPy outside this repository, gradients
analytically and by central differences.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.batch import MASKED_LOGIT
from gkd_jax.distill import divergences
from gkd_jax.distill.divergences import (
  adaptive_kl,
  alpha_beta,
  by_author,
  clipped_forward_kl,
  entropy_gated,
  forward_kl,
  logit_difference,
  reverse_kl,
  skew_forward_kl,
  skew_reverse_kl,
  taid,
  todi,
)
from gkd_jax.distill.policies import DATASET, STUDENT, TEACHER

TEACHER_LOGITS = np.float32([2.0, 1.0, 0.5, -0.5, -2.0])
STUDENT_LOGITS = np.float32([0.5, 1.5, -1.0, 1.0, 0.0])
# A teacher whose two most probable ids have less than half of the mass apart.
FLAT_TEACHER = np.log(np.float32([0.35, 0.3, 0.2, 0.1, 0.05]))
partial = functools.partial

# name: (function, value, gradient or None)
VECTORS = {
  'skew forward KL .1': (
    partial(skew_forward_kl, alpha=0.1),
    0.5255915143,
    (-0.2945741678, 0.1352917972, -0.0657283812, 0.1595236668, 0.0654870851),
  ),
  'skew forward KL .3': (
    partial(skew_forward_kl, alpha=0.3),
    0.3079615041,
    (-0.1467508860, 0.0470141573, -0.0327445487, 0.0923040250, 0.0401772524),
  ),
  'skew reverse KL .1': (
    partial(skew_reverse_kl, alpha=0.1),
    0.5358015040,
    (-0.2505085279, 0.0533948128, -0.0558960080, 0.1736679217, 0.0793418013),
  ),
  'skew reverse KL .3': (
    partial(skew_reverse_kl, alpha=0.3),
    0.3045828709,
    (-0.1570574413, 0.0682444286, -0.0350442520, 0.0882862112, 0.0355710534),
  ),
  'adaptive KL, official head': (
    partial(adaptive_kl, head='official'),
    0.7034352186,
    (-0.3682601975, 0.0857132055, -0.0821699568, 0.2433776680, 0.1213392808),
  ),
  'adaptive KL, smallest head': (
    partial(adaptive_kl, head='smallest'),
    0.7034352186,
    (-0.3682601975, 0.0857132055, -0.0821699568, 0.2433776680, 0.1213392808),
  ),
  'ToDi': (todi, 1.3996267133, None),
  'alpha-beta .2 .7': (
    partial(alpha_beta, alpha=0.2, beta=0.7),
    0.8264117615,
    None,
  ),
  'alpha-beta .5 0': (
    partial(alpha_beta, alpha=0.5, beta=0.0),
    1.7162625674,
    None,
  ),
  'alpha-divergence .5': (
    partial(alpha_beta, alpha=0.5, beta=0.5),
    0.6684810918,
    None,
  ),
  'alpha-divergence .3': (
    partial(alpha_beta, alpha=0.3, beta=0.7),
    0.6806000238,
    None,
  ),
  'logit difference 3, T=3': (
    partial(logit_difference, k=3, temperature=3.0),
    0.2978316226,
    (-0.1626920101, 0.0770496363, -0.0589037887, 0.1445461627, 0.0),
  ),
  'logit difference 5, T=3': (
    partial(logit_difference, k=5, temperature=3.0),
    0.4244271357,
    (-0.1217518974, 0.0546588521, -0.1593478272, 0.0773467125, 0.1490941602),
  ),
  'logit difference 3, T=1': (
    partial(logit_difference, k=3, temperature=1.0),
    1.8049099440,
    (-1.1636358581, 0.5571171078, -0.2855966553, 0.8921154057, 0.0),
  ),
  'entropy gated': (partial(entropy_gated, top_k=3), 1.6168617682, None),
}
# Every function at its defaults, and every limit of the alpha-beta divergence.
ALL = {
  'skew_forward_kl': skew_forward_kl,
  'skew_reverse_kl': skew_reverse_kl,
  'adaptive_kl': adaptive_kl,
  'adaptive_kl_smallest': partial(adaptive_kl, head='smallest'),
  'todi': todi,
  'alpha_beta': alpha_beta,
  **{
    f'alpha_beta_{a}_{b}': partial(alpha_beta, alpha=a, beta=b)
    for a, b in ((1, 0), (0, 1), (0.5, 0), (0, 0.5), (0.5, -0.5), (0, 0))
  },
  'logit_difference': partial(logit_difference, k=4),
  'entropy_gated': entropy_gated,
  **{
    f'clipped_{clip}': partial(clipped_forward_kl, clip=clip)
    for clip in divergences.CLIPS
  },
}
each = pytest.mark.parametrize('name', ALL)


@partial(jax.jit, static_argnums=0)
def value_and_grad(function, teacher_logits, student_logits):
  """Returns a divergence [...] and its gradient by the student's logits."""

  def total(student_logits):
    value = function(
      teacher_logits=teacher_logits, student_logits=student_logits
    )
    return value.sum(), value

  gradient, value = jax.grad(total, has_aux=True)(student_logits)
  return value, gradient


@pytest.mark.parametrize('name', VECTORS)
def test_value_and_gradient_are_the_known_ones(name):
  function, want, want_gradient = VECTORS[name]

  value, gradient = value_and_grad(function, TEACHER_LOGITS, STUDENT_LOGITS)

  # Sums of five float32 terms near 1; differences of conventions are above
  # 1e-3.
  assert value == pytest.approx(want, abs=3e-6)
  if want_gradient is not None:
    np.testing.assert_allclose(gradient, want_gradient, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
  ('head', 'want'), [('official', 0.3227875386), ('smallest', 0.3350440208)]
)
def test_the_heads_of_adaptive_kl_differ_where_an_id_crosses_mu(head, want):
  value, _ = value_and_grad(
    partial(adaptive_kl, head=head), FLAT_TEACHER, STUDENT_LOGITS
  )

  assert value == pytest.approx(want, abs=3e-6)


def test_adaptive_kl_of_equal_models_is_0():
  value, gradient = value_and_grad(adaptive_kl, TEACHER_LOGITS, TEACHER_LOGITS)

  assert value == 0.0
  assert not gradient.any()


@pytest.mark.parametrize(
  ('clip', 'pair', 'value', 'gradient'),
  [
    ('entry', 'A', -0.21026896854443836, (0.03, -0.11, 0.08)),
    ('entry_nonnegative', 'A', 0.11890697837836714, (-0.01, 0.07, -0.06)),
    ('token', 'A', 0.05, (0.0, 0.0, 0.0)),
  ],
)
def test_clipped_forward_kl_has_its_known_values(clip, pair, value, gradient):
  teacher, student = np.log(np.float32([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]))

  got = value_and_grad(partial(clipped_forward_kl, clip=clip), teacher, student)

  assert got[0] == pytest.approx(value, abs=1e-6)
  np.testing.assert_allclose(got[1], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize('clip', divergences.CLIPS)
def test_nothing_is_cut_off_below_the_threshold(clip):
  function = partial(clipped_forward_kl, clip=clip, threshold=100.0)

  got = value_and_grad(function, TEACHER_LOGITS, STUDENT_LOGITS)
  want = value_and_grad(forward_kl, TEACHER_LOGITS, STUDENT_LOGITS)

  # The terms P and Q of entry_nonnegative cancel to a rounding.
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ('alpha', 'beta', 'other'), [(1, 0, forward_kl), (0, 1, reverse_kl)]
)
def test_the_kls_are_limits_of_the_alpha_beta_divergence(alpha, beta, other):
  limit = partial(alpha_beta, alpha=alpha, beta=beta)

  got = value_and_grad(limit, TEACHER_LOGITS, STUDENT_LOGITS)
  want = value_and_grad(other, TEACHER_LOGITS, STUDENT_LOGITS)

  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ('at', 'near'),
  [
    ((0.5, 0.0), (0.5, 1e-3)),
    ((0.0, 0.5), (1e-3, 0.5)),
    ((0.5, -0.5), (0.5, -0.499)),
    ((0.0, 0.0), (1e-3, 1e-3)),
  ],
  ids=str,
)
def test_each_limit_of_alpha_beta_is_that_of_values_nearby(at, near):
  got, want = (
    _alpha_beta_float64(*at),
    float(
      alpha_beta(
        teacher_logits=TEACHER_LOGITS,
        student_logits=STUDENT_LOGITS,
        alpha=at[0],
        beta=at[1],
      )
    ),
  )
  # 1e-3 away from the limit the value differs by about that share.
  assert _alpha_beta_float64(*near) == pytest.approx(want, rel=1e-2)
  assert got is None or got == pytest.approx(want, rel=1e-5)


def _alpha_beta_float64(a, b):
  """The general formula; None where a denominator is 0."""
  if not a * b * (a + b):
    return None
  p, q = (
    np.exp(x.astype(float)) / np.exp(x.astype(float)).sum()
    for x in (TEACHER_LOGITS, STUDENT_LOGITS)
  )
  terms = p**a * q**b - (a * p ** (a + b) + b * q ** (a + b)) / (a + b)
  return -terms.sum() / (a * b)


@each
def test_no_divergence_but_a_clip_by_entry_is_negative(name):
  rng = np.random.default_rng(0)
  teacher, student = rng.normal(0.0, 3.0, (2, 64, 12)).astype(np.float32)

  value, _ = value_and_grad(ALL[name], teacher, student)

  assert value.shape == (64,)
  if name != 'clipped_entry':
    assert float(value.min()) > -1e-5  # rounding


@each
def test_equal_models_have_neither_value_nor_gradient(name):
  rng = np.random.default_rng(0)
  logits = rng.normal(0.0, 3.0, (64, 12)).astype(np.float32)

  value, gradient = value_and_grad(ALL[name], logits, logits)

  # The clip by entry is no divergence, and the top k of `entropy_gated`
  # renormalised is another distribution than Q.
  if name in ('clipped_entry', 'entropy_gated'):
    pytest.skip('not 0 by definition')
  np.testing.assert_allclose(value, 0.0, atol=3e-6)  # rounding
  np.testing.assert_allclose(gradient, 0.0, atol=3e-6)


@pytest.mark.parametrize('mask', [MASKED_LOGIT, -np.inf])
@each
def test_masked_ids_leave_value_and_gradient_as_if_they_were_not_there(
  name, mask
):
  rng = np.random.default_rng(0)
  teacher, student = rng.normal(0.0, 2.0, (2, 8, 12)).astype(np.float32)
  masked = [
    np.pad(x, ((0, 0), (0, 3)), constant_values=mask)
    for x in (teacher, student)
  ]

  got = value_and_grad(ALL[name], *masked)
  want = value_and_grad(ALL[name], teacher, student)

  # Sums over 15 ids instead of 12.
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got[1][:, :12], want[1], rtol=1e-5, atol=1e-6)
  assert not got[1][:, 12:].any()


@pytest.mark.parametrize('masked', ['teacher', 'student'])
@each
def test_an_id_that_one_model_masks_leaves_everything_finite(name, masked):
  rng = np.random.default_rng(0)
  logits = dict(
    zip(
      ('teacher', 'student'),
      rng.normal(0.0, 2.0, (2, 8, 12)).astype(np.float32),
      strict=True,
    )
  )
  logits[masked][:, 3] = -np.inf

  value, gradient = value_and_grad(
    ALL[name], logits['teacher'], logits['student']
  )

  assert np.isfinite(value).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize(
  ('function', 'message'),
  [
    (partial(skew_forward_kl, alpha=0.0), 'skew_forward_kl needs 0 < alpha'),
    (partial(skew_reverse_kl, alpha=1.0), 'skew_reverse_kl needs 0 < alpha'),
    (partial(adaptive_kl, mu=1.0), r'adaptive_kl.mu must be in \(0, 1\)'),
    (partial(adaptive_kl, head='first'), "'official' or 'smallest'"),
    (partial(logit_difference, k=6), 'k must be between 2 and the vocabulary'),
    (partial(logit_difference, k=3, temperature=0), 'must be above 0'),
    (partial(entropy_gated, top_k=0), 'top_k must be 1 or more'),
    (partial(clipped_forward_kl, clip='sum'), 'clip must be one of'),
    (partial(clipped_forward_kl, threshold=0.0), 'must be above 0'),
  ],
)
def test_settings_without_a_meaning_are_refused(function, message):
  with pytest.raises(ValueError, match=message):
    function(teacher_logits=TEACHER_LOGITS, student_logits=STUDENT_LOGITS)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({}, 'total_steps must be the number of steps'),
    ({'total_steps': 9, 't_start': 0.8, 't_end': 0.5}, 't_start <= t_end'),
    ({'total_steps': 9, 'momentum': 1.0}, r'momentum must be in \[0, 1\)'),
  ],
)
def test_taid_refuses_settings_without_a_meaning(settings, message):
  with pytest.raises(ValueError, match=message):
    taid(**settings)


@pytest.mark.parametrize(
  ('function', 'name'),
  [
    (skew_forward_kl, 'skew_forward_kl_0.1'),
    (partial(adaptive_kl, mu=0.4), 'adaptive_kl_0.4'),
    (alpha_beta, 'alpha_beta_0.2_0.7'),
    (logit_difference, 'logit_difference_8_3.0'),
    (entropy_gated, 'entropy_gated_0.8_16'),
    (clipped_forward_kl, 'clipped_forward_kl_token_0.05'),
    (todi, 'todi'),
  ],
)
def test_a_divergence_is_reported_with_its_settings(function, name):
  assert divergences.name_of(function) == name


# ------------------------------------------------------------------- by author


def test_each_author_has_a_divergence():
  own = by_author(student_wrote=reverse_kl, teacher_wrote=forward_kl)
  logits = {
    'teacher_logits': np.stack([TEACHER_LOGITS] * 3),
    'student_logits': np.stack([STUDENT_LOGITS] * 3),
  }

  value = own.function(author=jnp.int8([STUDENT, TEACHER, DATASET]), **logits)

  reverse, forward = reverse_kl(**logits)[0], forward_kl(**logits)[0]
  np.testing.assert_array_equal(value, [reverse, forward, forward])
  assert own.reported_name == 'by_author_reverse_kl_forward_kl'


# ----------------------------------------------------------- importance weights


def test_tokens_that_a_mixture_drew_are_weighted():
  own = divergences.importance_weighted(reverse_kl)
  log_p, log_q = (
    jax.nn.log_softmax(x) for x in (TEACHER_LOGITS, STUDENT_LOGITS)
  )
  token, share = 1, 0.2
  drawn_at = jnp.logaddexp(
    jnp.log(share) + log_p[token], jnp.log1p(-share) + log_q[token]
  )

  value, gradient = value_and_grad(
    partial(
      own.function,
      tokens=jnp.int32([token, token]),
      author=jnp.int8([STUDENT, DATASET]),
      log_probs=jnp.float32([drawn_at, 0.0]),
    ),
    np.stack([TEACHER_LOGITS] * 2),
    np.stack([STUDENT_LOGITS] * 2),
  )

  want, want_gradient = value_and_grad(
    reverse_kl, TEACHER_LOGITS, STUDENT_LOGITS
  )
  weight = 0.4386685907 / (0.2 * 0.2174986486 + 0.8 * 0.4386685907)
  np.testing.assert_allclose(value, [weight * want, want], rtol=1e-5)
  np.testing.assert_allclose(gradient[0], weight * want_gradient, atol=1e-6)


# ------------------------------------------------------------------------ TAID


def run_taid(divergence, losses):
  """Returns the state after each loss."""
  states, carried = [], divergence.init()
  for loss in losses:
    carried = divergence.update(carried, {'divergence': jnp.float32(loss)})
    states.append(carried)
  return states


@pytest.mark.parametrize(
  ('t', 'value', 'gradient'),
  [
    (
      0.4,
      0.1189107565,
      (-0.1621755206, 0.0434804591, -0.0361862499, 0.1053944455, 0.0494868658),
    ),
    (0.7, 0.3655413599, None),
  ],
)
def test_taid_compares_with_a_constant_interpolation(t, value, gradient):
  own = taid(total_steps=10, t_start=t)

  got = value_and_grad(
    partial(own.function, carried=own.init()), TEACHER_LOGITS, STUDENT_LOGITS
  )

  assert got[0] == pytest.approx(value, abs=1e-6)
  if gradient is not None:
    np.testing.assert_allclose(got[1], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ('total_steps', 'want'),
  [
    (1000, (0.4, 0.4006, 0.4012, 0.4018, 0.4024)),
    (
      100_000,
      (0.4, 0.4001500375, 0.4003001160, 0.4004501118, 0.4006000901),
    ),
  ],
)
def test_the_adaptive_schedule_of_taid_is_the_papers(total_steps, want):
  states = run_taid(
    taid(total_steps=total_steps, adaptive=True), (2.0, 1.9, 1.7, 1.8, 1.75)
  )

  # t is near 1: a rounding is 6e-8.
  np.testing.assert_allclose([s.t for s in states], want, rtol=0, atol=2e-7)
  np.testing.assert_allclose(
    [s.momentum for s in states],
    (0.0, 0.0005, 0.001547631579, 0.000943919969, 0.001212258547),
    rtol=1e-4,  # differences of losses in float32
  )


def test_the_closed_form_of_taid_is_what_the_adaptive_one_comes_to():
  losses = [2.0 * 0.9999**i for i in range(200)]

  closed, adaptive = (
    float(run_taid(taid(total_steps=10_000, adaptive=x), losses)[-1].t)
    for x in (False, True)
  )

  assert closed == pytest.approx(1.0 - 0.6 * np.exp(-2.5e-4 * 200), rel=1e-6)
  assert adaptive == pytest.approx(closed, rel=1e-3)


def test_a_short_run_of_taid_follows_the_line():
  last = run_taid(taid(total_steps=10), [1.0] * 10)[-1]

  assert float(last.t) == pytest.approx(1.0, rel=1e-6)
