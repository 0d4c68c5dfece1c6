# SPDX-License-Identifier: Apache-2.0
"""The reward's part in a step: the paper's Eq. 5, by REINFORCE."""

import collections
import functools
import itertools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkd_jax.batch import Batch, Outputs, mask_unused_ids
from gkd_jax.distill import credit as credit_lib
from gkd_jax.distill import divergences, entailment, policies, rewards
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.objectives import Objective
from gkd_jax.distill.state import Frozen
from gkd_jax.models.params import logical_axes
from tests import references, tiny

pytestmark = pytest.mark.slow  # compiles models

BETA = 0.9
JSD = functools.partial(divergences.generalized_jsd, beta=BETA)
NUM_IDS = 4  # EOS and two words; the rest fills the embedding up
IDS = tiny.special_ids(NUM_IDS)
# Those of one output per input.
each_baseline = pytest.mark.parametrize(
  'baseline', ['self_critical', 'batch_mean', 'none']
)


class Aim(NamedTuple):
  """The objective and the credit of a Method, hashable."""

  objective: Objective
  credit: credit_lib.Credit | None = None


# Any reward: tests pass the reward function to the step.
ANY_REWARD = rewards.Reward(lambda vocabulary, ids, model: None)


def of_reward(
  weight=1.0, baseline='batch_mean', normalization='sequence', **settings
):
  """A reward alone."""
  return Aim(
    Objective(divergence_weight=0.0, **settings),
    credit_lib.reinforce(ANY_REWARD, weight, baseline, normalization),
  )


def eq_5(alpha, baseline='batch_mean'):
  """The paper's Eq. 5, to be minimised."""
  weight = credit_lib.reward_share(alpha)
  return Aim(
    Objective(JSD, divergence_weight=alpha),
    credit_lib.reinforce(ANY_REWARD, weight, baseline),
  )


def writes(outputs, by_student=None):
  """A policy that returns given outputs."""

  def write(draw):
    del draw
    author = policies.STUDENT
    if by_student is not None:
      author = jnp.where(by_student, author, policies.DATASET)
    return policies.rollouts(outputs, author)

  fraction = 1.0 if by_student is None else 0.5
  return policies.Policy(write, fraction)


def settings_of(**settings):
  """Arguments of a step and its loss; the student writes the outputs."""
  return tiny.with_method({'policy': policies.student(), 'ids': IDS} | settings)


def all_outputs(length):
  """Returns tokens and weights of all outputs of a maximum length."""
  rows = []
  for n in range(1, length + 1):
    for words in itertools.product((2, 3), repeat=n - 1):
      rows.append([*words, 1])
  rows += itertools.product((2, 3), repeat=length)  # cut off
  tokens = np.array([[*row] + [0] * (length - len(row)) for row in rows])
  return tokens.astype(np.int32), np.float32(tokens != 0)


def expected_gradient(loss_sums, params, all_tokens, probability_of):
  """Of the loss, over all pairs of outputs that two rows can have: exact.

  Args:
    loss_sums: outputs -> function of the student's parameters, as a step has.
    params: of the student.
    all_tokens: tokens and weights of all outputs.
    probability_of: [2, number of outputs] for each row.

  Returns:
    The gradient's expectation, and that of the loss.
  """
  tokens, weights = map(jnp.asarray, all_tokens)
  pairs = jnp.array(list(itertools.product(range(len(tokens)), repeat=2)))

  def of_pair(pair):
    outputs = Outputs(tokens[pair], weights[pair])
    gradient, sums = jax.grad(loss_sums(outputs), has_aux=True)(params)
    chance = probability_of[0, pair[0]] * probability_of[1, pair[1]]
    return jax.tree.map(
      lambda x: chance * x / sums['count'], (gradient, sums['loss'])
    )

  total = jax.lax.map(of_pair, pairs)
  return jax.tree.map(lambda x: x.sum(axis=0), total)


# --------------------------------------------------- one token: known numbers


class OneToken:
  """A model whose parameters are its logits: it reads nothing, writes one id.

  It has what `models.interface` asks for.
  """

  placement = None

  def __init__(self, dropout_rate=0.0):
    self.config = types.SimpleNamespace(dropout_rate=dropout_rate)

  def apply(self, variables, *args, method, **kwargs):
    del kwargs
    return getattr(self, method)(variables['params'], *args)

  def encode(self, params, inputs):
    return jnp.zeros((*inputs.shape, 1))

  def decode(self, params, encoded, inputs, targets):
    return jnp.broadcast_to(params['logits'], (*targets.shape, NUM_IDS))

  def unembed(self, params, hidden):
    return hidden

  def start_cache(self, params, encoded, inputs, max_decode_len):
    return jnp.int32(0)

  def decode_step(self, params, cache, tokens_B):
    logits = jnp.broadcast_to(params['logits'], (len(tokens_B), NUM_IDS))
    return logits, cache

  def head_params(self, params):
    return {}

  def gather_params(self, params):
    return params


def one_token(p):
  return {'logits': jnp.float32([9.0, *np.log(p)])}  # the pad's logit first


P, Q = (0.7, 0.2, 0.1), (0.1, 0.3, 0.6)
REWARD_OF_ID = jnp.float32([np.nan, 1.0, 0.0, 0.5])


def reward_of_first_id(batch, outputs, params):
  del batch, params
  return REWARD_OF_ID[outputs.tokens[:, 0]]


def one_token_batch(num_rows):
  tokens = jnp.full((num_rows, 1), 2, jnp.int32)
  return Batch(tokens, tokens, jnp.ones((num_rows, 1)))


def one_token_step(aim, **changes):
  """A step of a batch: (state, batch, parameters of the reward) -> ..."""
  settings = {
    'student': OneToken(),
    'teacher': OneToken(),
    **aim._asdict(),
    'reward_fn': reward_of_first_id,
    'optimizer': optax.sgd(1.0),
    'seed': 0,
  }
  step = step_lib.make_train_step(**settings_of(**settings | changes))
  return lambda state, batch, params=None: step(
    state, Frozen(one_token(P), params), batch
  )


def one_token_state(step=0):
  state = state_lib.init_state(one_token(Q), optax.sgd(1.0))
  return state._replace(step=jnp.int32(step))


@functools.partial(jax.jit, static_argnums=0)
def expected_with_one_token(aim):
  batch = one_token_batch(2)

  def loss_sums(outputs):
    function = step_lib.make_batch_loss(
      **settings_of(
        student=OneToken(),
        teacher=OneToken(),
        **aim._asdict(),
        reward_fn=reward_of_first_id,
        policy=writes(outputs),
      )
    )
    keys = step_lib.Rngs(*jax.random.split(jax.random.key(0), 3))
    return lambda params: function(params, Frozen(one_token(P)), batch, keys)

  return expected_gradient(
    loss_sums,
    one_token(Q),
    (np.int32([[1], [2], [3]]), np.ones((3, 1), np.float32)),
    jnp.float32([Q, Q]),
  )


@each_baseline
@pytest.mark.parametrize(
  ('alpha', 'want'),
  [
    (0.0, -0.4),
    (0.25, -0.278375874806008),
    (0.5, -0.156751749612015),
    (1.0, 0.086496500775969),
  ],
)
def test_loss_and_gradient_of_one_token_are_those_known(alpha, want, baseline):
  aim = eq_5(alpha, baseline=baseline)

  gradient, loss = expected_with_one_token(aim)

  of_reward = np.array([0.06, -0.12, 0.06])
  of_jsd = np.array([-0.026094472912, -0.011894230706, 0.037988703618])
  want_gradient = alpha * of_jsd - (1 - alpha) * of_reward
  # Sums of 9 float32 numbers below 1.
  np.testing.assert_allclose(loss, want, atol=1e-6)
  np.testing.assert_allclose(gradient['logits'][1:], want_gradient, atol=1e-6)
  assert gradient['logits'][0] == 0.0  # the pad


# ------------------------------- a T5, and all that it could have written


LENGTH = 3
OUTPUTS = all_outputs(LENGTH)
STUDENT, STUDENT_PARAMS = tiny.model_and_params(0, vocab_size=6)
TEACHER, TEACHER_PARAMS = tiny.model_and_params(1, '1.0', vocab_size=6)
INPUTS = jnp.int32([[2, 3, 1], [3, 1, 0]])
KEYS = step_lib.Rngs(*jax.random.split(jax.random.key(0), 3))


def dataset_of(num_rows):
  tokens, weights = (jnp.asarray(x[:num_rows]) for x in OUTPUTS)
  return Batch(jnp.resize(INPUTS, (num_rows, 3)), tokens, weights)


def reward_of_tokens(batch, outputs, params):
  """A number near 1 for each input and output."""
  del params
  at = jnp.arange(1.0, 1.0 + LENGTH)
  x = (batch.encoder_input_tokens * at).sum(axis=1)
  y = (outputs.tokens * at).sum(axis=1)
  return 1.0 + jnp.sin(x + 2.0 * y)


def log_probs(params, inputs, tokens, weights):
  """[B] log-probability of outputs, from the logits of a plain forward pass."""
  logits = mask_unused_ids(
    STUDENT.apply({'params': params}, inputs, tokens), IDS
  )
  log_q = jax.nn.log_softmax(logits)
  return (
    jnp.take_along_axis(log_q, tokens[..., None], 2)[..., 0] * weights
  ).sum(axis=1)


def all_log_probs(params, x):
  """[number of outputs] for one input."""
  inputs = jnp.tile(x, (len(OUTPUTS[0]), 1))
  return log_probs(params, inputs, *OUTPUTS)


@functools.cache
def probabilities():
  return np.stack(
    [np.exp(jax.jit(all_log_probs)(STUDENT_PARAMS, x)) for x in INPUTS]
  )


@functools.partial(jax.jit, static_argnums=0)
def expected_with_t5(aim, probability_of):
  def loss_sums(outputs):
    function = step_lib.make_batch_loss(
      **settings_of(
        student=STUDENT,
        teacher=TEACHER,
        **aim._asdict(),
        reward_fn=reward_of_tokens,
        policy=writes(outputs),
      )
    )
    return lambda params: function(
      params, Frozen(TEACHER_PARAMS), dataset_of(2), KEYS
    )

  return expected_gradient(loss_sums, STUDENT_PARAMS, OUTPUTS, probability_of)


@jax.jit
def exact_gradient(alpha):
  """Returns JAX's gradient of Eq. 5, summed over all outputs of two inputs."""
  tokens, weights = OUTPUTS

  def jsd(params, inputs):
    """[number of outputs] mean over the tokens, Eq. 2."""
    p, q = (
      model.apply({'params': w}, inputs, tokens)
      for model, w in ((TEACHER, TEACHER_PARAMS), (STUDENT, params))
    )
    value = JSD(
      teacher_logits=mask_unused_ids(p, IDS),
      student_logits=mask_unused_ids(q, IDS),
    )
    return (value * weights).sum(axis=1) / weights.sum(axis=1)

  def loss(params):
    total = 0.0
    for x in INPUTS:
      inputs = jnp.tile(x, (len(tokens), 1))
      chances = jnp.exp(log_probs(params, inputs, tokens, weights))
      r = reward_of_tokens(
        Batch(inputs, None, None), Outputs(tokens, weights), None
      )
      # Who wrote the outputs is differentiated in the first sum alone.
      total -= (1 - alpha) * (chances * r).sum()
      total += (
        alpha * (jax.lax.stop_gradient(chances) * jsd(params, inputs)).sum()
      )
    return total / len(INPUTS)

  value, gradient = jax.value_and_grad(loss)(STUDENT_PARAMS)
  return gradient, value


def assert_trees_close(got, want, *, atol, rtol=0.0):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    got,
    want,
  )


def norm(tree):
  return float(optax.tree.norm(tree))


def test_the_outputs_enumerated_are_all_there_are():
  assert len(OUTPUTS[0]) == 15
  np.testing.assert_allclose(probabilities().sum(axis=1), 1.0, rtol=1e-5)
  assert probabilities().min() > 1e-4


@each_baseline
def test_expected_gradient_is_that_of_eq_5(baseline):
  aim = eq_5(0.3, baseline=baseline)

  gradient, loss = expected_with_t5(aim, probabilities())

  want_gradient, want_loss = exact_gradient(0.3)
  # Sums of 225 gradients of norm 1, weighted by chances: float32 rounding.
  assert_trees_close(gradient, want_gradient, atol=3e-6)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)


def test_both_parts_of_the_expectation_above_matter():
  for alpha in (0.0, 1.0):
    assert norm(exact_gradient(alpha)[0]) > 0.1


# ------------------------------------------------- what each output contributes


def make_step(aim, **changes):
  settings = {
    'student': STUDENT,
    'teacher': TEACHER,
    **aim._asdict(),
    'reward_fn': reward_of_tokens,
    'optimizer': optax.sgd(1.0),  # the parameters' change is the gradient
    'seed': 0,
  }
  return step_lib.make_train_step(**settings_of(**settings | changes))


def run(aim, batch=None, **changes):
  """One compiled step: its gradient, its metrics."""
  state = state_lib.init_state(STUDENT_PARAMS, optax.sgd(1.0))
  state, metrics = jax.jit(make_step(aim, **changes))(
    state,
    Frozen(TEACHER_PARAMS),
    dataset_of(6) if batch is None else batch,
  )
  gradient = jax.tree.map(
    lambda a, b: np.asarray(a) - np.asarray(b), STUDENT_PARAMS, state.params
  )
  return gradient, {name: float(value) for name, value in metrics.items()}


def rows(*which):
  """Returns outputs by their index among all outputs."""
  return Outputs(*(jnp.asarray(x[list(which)]) for x in OUTPUTS))


def reinforce(outputs, coefficients_B):
  """Returns the gradient of -sum coefficients * log Q(y), without chunks."""
  inputs = dataset_of(len(outputs.tokens)).encoder_input_tokens
  coefficients_B = np.broadcast_to(np.float32(coefficients_B), len(inputs))
  return _reinforce(STUDENT_PARAMS, inputs, outputs, coefficients_B)


@jax.jit
@jax.grad
def _reinforce(params, inputs, outputs, coefficients_B):
  return -(log_probs(params, inputs, *outputs) * coefficients_B).sum()


WRITTEN = rows(0, 2, 6, 14, 5, 9)
LENGTHS = np.array([1.0, 2.0, 3.0, 3.0, 3.0, 3.0])
# Parameters near 1 are 6e-8 off, and their change is the gradient.
CLOSE = {'atol': 2e-6}


def rewards_of(outputs):
  return np.asarray(
    reward_of_tokens(dataset_of(len(outputs.tokens)), outputs, None)
  )


@pytest.mark.parametrize(
  ('reduction', 'normalization', 'count', 'per_token'),
  [
    ('sequence', 'token', 6, LENGTHS),
    ('token', 'sequence', LENGTHS.sum(), 1.0),
  ],
)
def test_an_output_counts_by_reduction_and_normalization(
  reduction, normalization, count, per_token
):
  aim = of_reward(
    weight=0.7,
    baseline='none',
    normalization=normalization,
    reduction=reduction,
  )

  gradient, metrics = run(aim, policy=writes(WRITTEN))

  np.testing.assert_array_equal(WRITTEN.weights.sum(axis=1), LENGTHS)
  r = rewards_of(WRITTEN)
  want = reinforce(WRITTEN, 0.7 * r / per_token / count)
  assert_trees_close(gradient, want, **CLOSE)
  assert metrics['loss'] == pytest.approx(-0.7 * r.sum() / count, rel=1e-5)
  # Two that were cut off have the likelihood of the tokens that are there.
  assert metrics['truncated'] == pytest.approx(2 / 6)
  assert norm(want) > 0.05


def test_chunks_of_tokens_change_nothing():
  aim = of_reward(
    weight=1.0,
    baseline='none',
    chunk_tokens=6,
  )

  gradient, _ = run(aim, policy=writes(WRITTEN))

  want = reinforce(WRITTEN, rewards_of(WRITTEN) / 6)
  assert_trees_close(gradient, want, **CLOSE)


def test_batch_mean_is_over_the_other_outputs_of_the_student():
  by_student = jnp.array([True, True, False, True, False, False])
  aim = of_reward(
    weight=1.0,
  )

  gradient, metrics = run(aim, policy=writes(WRITTEN, by_student))

  r = rewards_of(WRITTEN)
  baseline = np.zeros(6)
  for i in (0, 1, 3):
    baseline[i] = np.mean([r[j] for j in (0, 1, 3) if j != i])
  advantages = np.where(by_student, r - baseline, 0.0)
  # Divided by all rows: those of others have no reward, but are there.
  assert_trees_close(gradient, reinforce(WRITTEN, advantages / 6), **CLOSE)
  mine = r[[0, 1, 3]]
  assert metrics['loss'] == pytest.approx(-mine.sum() / 6, rel=1e-5)
  assert metrics['reward'] == pytest.approx(mine.mean(), rel=1e-5)
  assert metrics['reward_baseline'] == pytest.approx(mine.mean(), rel=1e-5)
  assert metrics['reward_advantage_rms'] == pytest.approx(
    np.sqrt((advantages**2).sum() / 3), rel=1e-5
  )


def test_self_critical_takes_off_the_reward_of_the_greedy_output():
  aim = of_reward(weight=1.0, baseline='self_critical')

  gradient, metrics = run(aim, policy=writes(WRITTEN))

  best = np.array([OUTPUTS[0][p.argmax()] for p in greedy_probabilities()])
  greedy = rewards_of(Outputs(jnp.resize(best, (6, LENGTH)), None))
  want = reinforce(WRITTEN, (rewards_of(WRITTEN) - greedy) / 6)
  assert_trees_close(gradient, want, **CLOSE)
  assert metrics['reward_baseline'] == pytest.approx(greedy.mean(), rel=1e-5)
  assert len(set(greedy)) == 2


def greedy_probabilities():
  """Returns [2, outputs]: 1 for the greedy output, 0 otherwise."""
  tokens, weights = OUTPUTS
  chosen = np.zeros((2, len(tokens)))
  for row, x in enumerate(INPUTS):
    logits = tiny.logits(
      STUDENT, STUDENT_PARAMS, jnp.tile(x, (len(tokens), 1)), tokens
    )
    best = mask_unused_ids(logits, IDS).argmax(axis=-1)
    chosen[row] = np.all((best == tokens) | (weights == 0.0), axis=1)
  np.testing.assert_array_equal(chosen.sum(axis=1), 1.0)
  return chosen


def test_microbatches_change_nothing():
  # What a token counts is known for the whole batch alone.
  aim = of_reward(weight=1.0, baseline='self_critical', reduction='token')

  got = run(aim, num_microbatches=3)

  want = run(aim)
  tiny.assert_equal_but_for_rounding(got, want)
  assert want[1]['reward_advantage_rms'] > 0.1


def test_batch_mean_is_over_a_microbatch():
  aim = of_reward(
    weight=1.0,
  )

  gradient, metrics = run(
    aim,
    policy=_of_the_batch(),
    batch=_batch_of(WRITTEN),
    num_microbatches=3,
  )

  r = rewards_of(WRITTEN)
  others = r[[3, 4, 5, 0, 1, 2]]  # row i is in microbatch i % 3
  assert_trees_close(gradient, reinforce(WRITTEN, (r - others) / 6), **CLOSE)
  assert metrics['reward'] == pytest.approx(r.mean(), rel=1e-5)


@pytest.mark.parametrize('baseline', ['group_mean', 'self_critical'])
def test_microbatches_do_not_separate_the_outputs_of_an_input(baseline):
  aim = of_reward(weight=1.0, baseline=baseline)
  policy = policies.student(outputs_per_input=2)

  got = run(aim, policy=policy, num_microbatches=3)

  want = run(aim, policy=policy)
  tiny.assert_equal_but_for_rounding(got, want)
  assert want[1]['reward_advantage_rms'] > 0.1


def _of_the_batch():
  """A policy that marks the dataset's outputs as the student's."""

  def write(draw):
    return policies.rollouts(draw.batch.outputs, policies.STUDENT)

  return policies.Policy(write, 1.0)


def _batch_of(outputs):
  return Batch(dataset_of(len(outputs.tokens)).encoder_input_tokens, *outputs)


def test_with_weight_0_the_reward_is_measured_and_nothing_is_learnt_from_it():
  # Nothing of it is differentiated, so dropout may be on.
  settings = {'student': OneToken(dropout_rate=0.1)}
  step = jax.jit(
    one_token_step(
      Aim(Objective(JSD), credit_lib.reinforce(ANY_REWARD, 0.0)), **settings
    )
  )

  state, metrics = step(one_token_state(), one_token_batch(50))

  plain_step = jax.jit(
    one_token_step(Aim(Objective(JSD)), reward_fn=None, **settings)
  )
  want_state, want = plain_step(one_token_state(), one_token_batch(50))
  np.testing.assert_array_equal(
    state.params['logits'], want_state.params['logits']
  )
  reward = metrics.pop('reward')
  jax.tree.map(np.testing.assert_array_equal, metrics, want)
  # 0.4 with a standard deviation of 0.3: three standard errors of 50.
  assert reward == pytest.approx(0.4, abs=0.13)


def test_the_parameters_of_the_reward_get_no_gradient():
  def scaled(batch, outputs, params):
    return params['scale'] * reward_of_first_id(batch, outputs, None)

  step = one_token_step(eq_5(0.5), reward_fn=scaled)

  def loss(params):
    return step(one_token_state(), one_token_batch(6), params)[1]['loss']

  value, gradient = jax.jit(jax.value_and_grad(loss))({'scale': 2.0})
  assert gradient['scale'] == 0.0
  assert value != jax.jit(loss)({'scale': 3.0})


# ---------------------------------------------------------- outputs of others


def test_a_batch_that_the_student_did_not_write_is_not_judged():
  judged = []

  def reward(inputs, outputs, targets):
    judged.append(outputs)
    return [1.0] * len(outputs)

  vocabulary = types.SimpleNamespace(decode=lambda ids: str(ids), unk_id=2)
  step = jax.jit(
    one_token_step(
      eq_5(0.5),
      reward_fn=rewards.python_function(reward).make_reward_fn(
        vocabulary, IDS, None
      ),
      policy=policies.mixture(0.5),
    )
  )

  by_share = collections.defaultdict(list)
  for i in range(8):
    judged.clear()
    _, metrics = step(one_token_state(step=i), one_token_batch(6))
    jax.block_until_ready(metrics)
    by_share[float(metrics['on_policy'])].append(
      (len(judged), float(metrics['reward']), float(metrics['loss']))
    )

  assert set(by_share) == {0.0, 1.0}
  for calls, mean, loss in by_share[0.0]:
    assert (calls, str(mean)) == (0, 'nan')
    assert np.isfinite(loss)
  for calls, mean, _ in by_share[1.0]:
    assert (calls, mean) == (1, 1.0)


# ----------------------------------------------------------------- the program


class Spy:
  """A model that counts how often its methods are traced."""

  def __init__(self, model, traced):
    self._model = model
    self._traced = traced

  def apply(self, *args, method, **kwargs):
    self._traced[method] += 1
    return self._model.apply(*args, method=method, **kwargs)

  def __getattr__(self, name):
    return getattr(self._model, name)


@pytest.mark.parametrize(
  ('baseline', 'loops'), [('self_critical', 2), ('batch_mean', 1), ('none', 1)]
)
def test_only_self_critical_writes_twice_and_all_encode_once(baseline, loops):
  traced = collections.Counter()
  step = make_step(eq_5(0.5, baseline=baseline), student=Spy(STUDENT, traced))

  program = jax.make_jaxpr(step)(
    state_lib.init_state(STUDENT_PARAMS, optax.sgd(1.0)),
    Frozen(TEACHER_PARAMS),
    dataset_of(4),
  )

  assert str(program).count(' while[') == loops
  assert traced['encode'] == 1


def test_a_reward_that_is_learnt_raises_itself():
  """24 inputs; the target is a copy of their first two ids."""
  num_ids, rng = 8, np.random.default_rng(0)
  model, params = tiny.model_and_params(2)
  inputs = rng.integers(2, num_ids, (24, 2))
  tokens = np.concatenate([inputs, np.ones((24, 1))], axis=1).astype(np.int32)
  batch = Batch(
    jnp.asarray(tokens), jnp.asarray(tokens), jnp.ones(tokens.shape)
  )
  optimizer = optax.adam(1e-2)
  train_step = jax.jit(
    step_lib.make_train_step(
      **settings_of(
        student=model,
        teacher=None,
        **of_reward()._asdict(),
        reward_fn=rewards.rouge_n(1).make_reward_fn(None, IDS, None),
        ids=tiny.special_ids(num_ids),
      ),
      optimizer=optimizer,
      seed=0,
    )
  )
  state, history = state_lib.init_state(params, optimizer), []

  for _ in range(120):
    state, metrics = train_step(state, Frozen(), batch)
    history.append(float(metrics['reward']))

  first, last = np.mean(history[:10]), np.mean(history[-10:])
  # ROUGE-1 of 24 outputs varies by 0.05 between steps.
  assert first < 0.4
  assert last > first + 0.3
  assert train_step._cache_size() == 1


def steps_on_one_and_on_all_devices():
  """Runs in a separate process, see `tiny.on_simulated_devices`."""
  from gkd_jax.parallel import partitioning

  mesh = partitioning.make_mesh(2, 2, devices=jax.devices()[:4])
  judge, judge_params = tiny.model_and_params(3)

  def place(t5, params):
    placement = partitioning.Placement(mesh)
    return jax.device_put(params, placement.shardings(logical_axes(t5)))

  def entails(batch, outputs, params):
    reward_fn = entailment.entailment('', [2], [3, 2], 2, 3).make_reward_fn(
      types.SimpleNamespace(
        unk_id=-1, vocab_size=tiny.NUM_IDS, encode=lambda text: []
      ),
      tiny.IDS,
      judge,
    )
    return reward_fn(batch, outputs, params)

  vocabulary = types.SimpleNamespace(decode=lambda ids: str(ids), unk_id=2)
  python = rewards.python_function(
    lambda x, y, z: [len(text) / 9 for text in y]
  ).make_reward_fn(vocabulary, IDS, None)

  def both(batch, outputs, params):
    return 5.0 * entails(batch, outputs, params) + python(
      batch, outputs, params
    )

  step = jax.jit(make_step(eq_5(0.5), reward_fn=both))

  def run(place, batch):
    state = state_lib.init_state(place(STUDENT, STUDENT_PARAMS), optax.sgd(1.0))
    state, metrics = step(
      state,
      Frozen(place(TEACHER, TEACHER_PARAMS), place(judge, judge_params)),
      batch,
    )
    return jax.device_get((state.params, metrics))

  one = run(lambda _, params: params, dataset_of(8))
  four = run(place, partitioning.put_global_batch(dataset_of(8), mesh))
  return one, four


@pytest.mark.slow
def test_a_2_by_2_mesh_gives_what_one_device_gives():
  # The mean of the other rows is one over all devices.
  one, four = tiny.on_simulated_devices(
    8, __name__, steps_on_one_and_on_all_devices.__name__
  )

  tiny.assert_equal_but_for_rounding(four, one)
  assert one[1]['reward_advantage_rms'] > 0.1


# ------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
  ('settings', 'text'),
  [
    ({'reward': ANY_REWARD}, 'REWARD_WEIGHT is None. Set it'),
    ({'weight': 0.5}, 'REWARD_WEIGHT is 0.5 and REWARD is None. Set REWARD'),
    ({'reward': ANY_REWARD, 'weight': -1.0}, 'must not be negative: -1.0'),
    ({'baseline': 'mean'}, "REWARD_BASELINE must be one of .* got 'mean'"),
    ({'normalization': 'no'}, "reinforce.normalization must be .* got 'no'"),
  ],
)
def test_settings_without_a_meaning_are_refused(settings, text):
  with pytest.raises(ValueError, match=text):
    credit_lib.reinforce(**settings)


def test_without_a_reward_there_is_no_credit():
  assert credit_lib.reinforce() is None


@pytest.mark.parametrize('alpha', [-0.1, 1.1, float('nan')])
def test_alpha_is_a_share(alpha):
  with pytest.raises(ValueError, match=r'ALPHA must be in \[0, 1\], got'):
    credit_lib.reward_share(alpha)


def test_at_alpha_1_and_0_one_of_the_two_is_left():
  assert eq_5(1.0).objective.needs_teacher and not eq_5(1.0).credit.learns
  assert eq_5(0.0).credit.learns and not eq_5(0.0).objective.needs_teacher


def test_the_reference_of_one_token_is_the_float64_one():
  jsd = references.generalized_jsd(
    teacher_logits=np.log(P), student_logits=np.log(Q), beta=BETA
  )

  assert jsd == pytest.approx(0.086496500775969, rel=1e-12)
