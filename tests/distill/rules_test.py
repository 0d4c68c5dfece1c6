# SPDX-License-Identifier: Apache-2.0
"""Each rule between the parts of a method, broken once; nothing compiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from gkd_jax.decoding.sampler import SamplerConfig
from gkd_jax.decoding.speculative import Drafting
from gkd_jax.distill import (
  credit,
  divergences,
  policies,
  rewards,
  rules,
  teachers,
)
from gkd_jax.distill.methods import Method
from gkd_jax.distill.objectives import Objective

JSD = functools.partial(divergences.generalized_jsd, beta=0.5)
REWARD = rewards.Reward(lambda vocabulary, ids, model: None)
REINFORCE = credit.reinforce(REWARD, 0.5)
MEASURED = credit.reinforce(REWARD, 0.0)
ON_POLICY = Method(policy=policies.student(), objective=Objective(JSD))
LIKELIHOOD = Objective(divergence_weight=0.0, likelihood_weight=1.0)

# rule: (what breaks it, as changes of a method; of the setup; message)
BROKEN = {
  'the_policys_buffer_holds_a_batch': [
    (
      {'policy': policies.replay(8)},
      {'batch_size': 9},
      'capacity is 8, but BATCH_SIZE is 9',
    )
  ],
  'something_is_minimised': [
    (
      {'objective': Objective(divergence_weight=0.0)},
      {},
      'nothing to minimise',
    ),
    (
      {'objective': Objective(divergence_weight=0.0), 'credit': MEASURED},
      {},
      'nothing to minimise',
    ),
  ],
  'likelihood_is_not_of_the_students_outputs': [
    ({'policy': policy, 'objective': objective}, {}, 'reinforce its mistakes')
    for policy in (
      policies.student(),
      policies.mixture(0.1),
      policies.mixture(0.1, 'sequence', policies.teacher),
      policies.interleaved(),
      policies.mixed_tokens(),
      policies.mixture(lambda step: 0.1 * step),
      policies.corrected(),
      policies.paired(),
      policies.replay(),
    )
    for objective in (LIKELIHOOD, Objective(JSD, likelihood_weight=0.5))
  ],
  'reward_is_of_the_students_outputs': [
    (
      {'policy': policy, 'credit': learns},
      {},
      'is 0.0: the student writes none',
    )
    for policy in (policies.dataset(), policies.teacher())
    for learns in (REINFORCE, MEASURED)
  ],
  'rewarded_outputs_are_samples_of_the_student': [
    ({'policy': policy, 'credit': learns}, {}, 'lets the teacher write parts')
    for policy in (
      policies.interleaved(),
      policies.mixed_tokens(0.5, 'coin'),
      policies.corrected(),
      policies.replay(),
      policies.mixture(0.5, otherwise=policies.interleaved),
    )
    for learns in (REINFORCE, MEASURED)
  ],
  'reinforce_draws_ancestrally': [
    (
      {'credit': REINFORCE, 'student_sampler': SamplerConfig(**settings)},
      {},
      'Set SAMPLING_TEMPERATURE = 1.0, without top_k, top_p, min_p and eps',
    )
    for settings in (
      {'temperature': 0.7},
      {'top_k': 5},
      {'top_p': 0.9},
      {'min_p': 0.1},
      {'epsilon': 0.1},
    )
  ],
  'reinforce_trains_without_dropout': [
    ({'credit': REINFORCE}, {'dropout_rate': 0.1}, 'set DROPOUT_RATE = 0.0')
  ],
  'training_outputs_are_drawn_from_a_model': [
    ({name: SamplerConfig(calculator=True)}, {}, f'{name}.calculator is set')
    for name in ('student_sampler', 'teacher_sampler')
  ],
  'drafted_outputs_are_the_teachers': [
    (
      {'teacher_drafting': Drafting(2)},
      {},
      'teacher_drafting is set, but the teacher writes no outputs',
    ),
    (
      {
        'policy': policies.teacher(),
        'teacher_drafting': Drafting(2, lenience=0.9),
      },
      {},
      'lenience 0.9',
    ),
  ],
  'a_live_teacher_has_no_dropout': [
    (
      {'teacher': teachers.live()},
      {'dropout_rate': 0.1},
      'Set DROPOUT_RATE = 0.0',
    )
  ],
  'compared_outputs_are_of_one_input': [
    (
      {'credit': credit.reinforce(rewards.rouge_l(), 1.0, 'group_mean')},
      {},
      'Set OUTPUTS_PER_INPUT to 2 or more',
    ),
    (
      {
        'credit': credit.j_bond(rewards.rouge_l()),
        'policy': policies.student(outputs_per_input=2),
      },
      {},
      'compares 3 outputs of each input, but POLICY writes 2',
    ),
  ],
  'one_teacher_writes': [
    (
      {'teacher': teachers.guided(3.0), 'policy': policies.teacher()},
      {},
      'several teachers, with_context, without_context, which only grade',
    )
  ],
  'compared_outputs_are_in_one_microbatch': [
    (
      {'credit': REINFORCE},
      {'batch_size': 4, 'num_microbatches': 4},
      'microbatches leaves 1',
    )
  ],
}


def setup_of(changes, settings):
  method = dataclasses.replace(ON_POLICY, **changes)
  return rules.Setup(method, **({'dropout_rate': 0.0} | settings))


def test_each_rule_is_broken_below():
  assert BROKEN.keys() == {rule.__name__ for rule in rules.RULES}


@pytest.mark.parametrize(
  ('rule', 'changes', 'settings', 'text'),
  [(rule, *case) for rule, cases in BROKEN.items() for case in cases],
)
def test_a_broken_rule_is_refused(rule, changes, settings, text):
  setup = setup_of(changes, settings)

  with pytest.raises(ValueError, match=text):
    rules.check(setup)

  with pytest.raises(ValueError, match=text):
    getattr(rules, rule)(setup)


@pytest.mark.parametrize(
  ('changes', 'settings'),
  [
    ({}, {'dropout_rate': 0.1}),
    ({'teacher': teachers.live()}, {}),
    ({'teacher': teachers.ema()}, {'dropout_rate': 0.1}),
    ({'credit': REINFORCE}, {'batch_size': 4, 'num_microbatches': 2}),
    (
      {'credit': credit.reinforce(REWARD, 1.0, 'self_critical')},
      {'batch_size': 4, 'num_microbatches': 4},
    ),
    # Only measured: nothing is differentiated.
    (
      {'credit': MEASURED, 'student_sampler': SamplerConfig(top_k=5)},
      {'dropout_rate': 0.1, 'batch_size': 1},
    ),
    ({'policy': policies.dataset(), 'objective': LIKELIHOOD}, {}),
    (
      {
        'policy': policies.teacher(),
        'objective': Objective(JSD, likelihood_weight=0.5),
      },
      {},
    ),
  ],
)
def test_what_keeps_the_rules_is_allowed(changes, settings):
  rules.check(setup_of(changes, settings))


# --- A divergence is tried on the logits it will have -------------------------


def check(divergence, vocab_size=24):
  method = dataclasses.replace(ON_POLICY, objective=Objective(divergence))
  rules.check_divergence(method, vocab_size)


def of_the_5_likeliest(*, teacher_logits, student_logits):
  best, ids = jax.lax.top_k(teacher_logits, 5)
  return jnp.sum(best - jnp.take_along_axis(student_logits, ids, -1), axis=-1)


def of_id_20(*, teacher_logits, student_logits):
  return teacher_logits[..., 20] - student_logits[..., 20]


@pytest.mark.parametrize('divergence', [of_the_5_likeliest, of_id_20])
def test_top_k_and_single_ids_are_accepted(divergence):
  check(divergence)


def test_what_a_divergence_raises_is_not_changed():
  class Mine(Exception):
    pass

  def raises(*, teacher_logits, student_logits):
    raise Mine(teacher_logits.shape[-1])

  with pytest.raises(Mine, match='^24'):
    check(raises)


def test_a_type_error_inside_a_divergence_is_its_own():
  def raises(*, teacher_logits, student_logits):
    return len(teacher_logits, student_logits)

  with pytest.raises(TypeError, match='len'):
    check(raises)


@pytest.mark.parametrize(
  ('divergence', 'text'),
  [
    (lambda p, q: p[..., 0], 'a function of teacher_logits and student_logits'),
    (
      lambda *, teacher_logits, student_logits: student_logits,
      r'must map logits \[..., V\] to \[...\]',
    ),
    (
      lambda *, teacher_logits, student_logits: student_logits.argmax(-1),
      r'must map logits \[..., V\] to \[...\]',
    ),
    (functools.partial(divergences.generalized_jsd, beta=1.0), '0 < beta < 1'),
  ],
)
def test_a_function_that_is_no_divergence_is_refused(divergence, text):
  with pytest.raises(ValueError, match=text):
    check(divergence)
