# SPDX-License-Identifier: Apache-2.0
import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkd_jax.decoding import rollout as rollout_lib
from gkd_jax.decoding import sampler, speculative
from gkd_jax.distill import credit, divergences, policies
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.methods import Method
from gkd_jax.distill.objectives import Objective
from gkd_jax.distill.policies import dataset, mixture, student, teacher
from gkd_jax.distill.state import Frozen
from gkd_jax.models.t5 import T5
from tests import t5_reference, tiny

pytestmark = pytest.mark.slow  # compiles models

# Two models that share nothing but their vocabulary.
STUDENT, STUDENT_PARAMS = tiny.model_and_params(0, '1.1')
TEACHER, TEACHER_PARAMS = tiny.model_and_params(1, '1.0', emb_dim=12)

BETA = 0.9
JSD = functools.partial(divergences.generalized_jsd, beta=BETA)

# The parameters' change is the gradient itself.
GRADIENT = optax.sgd(1.0)


FROZEN = Frozen(TEACHER_PARAMS)


def make_step(policy, objective=None, samplers=None, method=None, **changes):
  settings = {
    'student': STUDENT,
    'teacher': TEACHER,
    'method': method
    or Method(
      policy=policy, objective=objective or Objective(JSD), **(samplers or {})
    ),
    'optimizer': GRADIENT,
    'ids': tiny.IDS,
    'seed': 0,
  }
  return step_lib.make_train_step(**(settings | changes))


def start(params=STUDENT_PARAMS, optimizer=GRADIENT, step=0):
  state = state_lib.init_state(params, optimizer)
  return state._replace(step=jnp.int32(step))


def recording(policy, written):
  """The same policy; its outputs are also appended to a list."""

  def write(draw):
    rollouts = policy.write(draw)
    jax.debug.callback(
      lambda x: written.append(jax.tree.map(np.asarray, x)), rollouts
    )
    return rollouts

  return dataclasses.replace(policy, write=write)


def difference(a, b):
  """On the host: nothing is compiled."""
  return np.asarray(a) - np.asarray(b)


Run = collections.namedtuple('Run', 'gradient metrics outputs by_student')


class Recorder:
  """A compiled step that also returns its gradient and the outputs."""

  def __init__(self, policy, **changes):
    self._written = []
    policy = recording(policy, self._written)
    self._step = jax.jit(
      lambda seed, *arguments: make_step(policy, seed=seed, **changes)(
        *arguments
      )
    )

  def __call__(
    self,
    params=STUDENT_PARAMS,
    teacher_params=TEACHER_PARAMS,
    batch=None,
    step=0,
    seed=0,
  ) -> Run:
    self._written.clear()
    batch = tiny.batch() if batch is None else batch
    state = start(params, step=step)
    state, metrics = self._step(seed, state, Frozen(teacher_params), batch)
    jax.effects_barrier()
    (written,) = self._written
    return Run(
      jax.tree.map(difference, params, state.params),
      {name: float(value) for name, value in metrics.items()},
      written.outputs,
      written.author[:, 0] == policies.STUDENT,
    )


@functools.cache
def recorder(policy, **changes) -> Recorder:
  """Compiles a step once for all tests."""
  return Recorder(policy(), **changes)


def softmax(logits):
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def kl(a, b):
  return (a * np.log(a / b)).sum(axis=-1)


def reference_terms(params, outputs, teacher_temperature=1.0):
  """JSD(0.9) and negative log-likelihood: float64, one array a sequence."""
  jsd, nll = [], []
  inputs = np.asarray(tiny.batch().encoder_input_tokens)
  for x, y, weights in zip(inputs, *outputs, strict=True):
    x, y = x[x != 0], np.asarray(y)[np.asarray(weights) > 0]
    usable = slice(1, tiny.NUM_IDS)  # neither pad nor the embedding's filling
    p, q = (
      softmax(
        t5_reference.logits(w, x, y, num_heads=2)[:, usable] / temperature
      )
      for w, temperature in (
        (TEACHER_PARAMS, teacher_temperature),
        (params, 1.0),
      )
    )
    m = BETA * p + (1 - BETA) * q
    jsd.append(BETA * kl(p, m) + (1 - BETA) * kl(q, m))
    nll.append(-np.log(q[np.arange(len(y)), y - 1]))
  return jsd, nll


def eq_2(terms):
  """The mean over a sequence's own tokens, then over sequences."""
  return np.mean([np.mean(sequence) for sequence in terms])


POLICIES = pytest.mark.parametrize(
  'policy', [dataset, student], ids=['dataset', 'student']
)


@POLICIES
def test_loss_equals_the_float64_reference(policy):
  run = recorder(policy)()

  jsd, nll = reference_terms(STUDENT_PARAMS, run.outputs)
  # float32 logits are off by about 1e-6.
  assert run.metrics['loss'] == pytest.approx(eq_2(jsd), rel=1e-5)
  assert run.metrics['divergence'] == pytest.approx(eq_2(jsd), rel=1e-5)
  assert run.metrics['nll'] == pytest.approx(eq_2(nll), rel=1e-5)
  assert run.metrics['target_tokens'] == sum(len(row) for row in nll)
  assert len({len(row) for row in nll}) > 1  # or Eq. 2 were the token mean


def test_loss_with_all_its_settings_equals_the_float64_reference():
  objective = Objective(
    JSD,
    divergence_weight=2.0,
    likelihood_weight=0.5,
    teacher_temperature=0.7,
    reduction='token',
    chunk_tokens=4,
  )

  run = Recorder(dataset(), objective=objective)()

  jsd, nll = map(
    np.concatenate, reference_terms(STUDENT_PARAMS, run.outputs, 0.7)
  )
  # float32 logits are off by about 1e-6.
  assert run.metrics['loss'] == pytest.approx(
    np.mean(2.0 * jsd + 0.5 * nll), rel=1e-5
  )


@POLICIES
def test_gradient_is_that_of_the_reference_on_the_outputs_written(policy):
  # Outputs are data: how likely the student was to write them has no part in
  # the gradient, so the reference keeps them fixed.
  run = recorder(policy)()

  leaves, treedef = jax.tree.flatten(jax.tree.map(np.float64, STUDENT_PARAMS))
  rng = np.random.default_rng(0)
  for _ in range(3):
    direction = [rng.standard_normal(x.shape) for x in leaves]

    def loss(distance, direction=direction):
      moved = [x + distance * d for x, d in zip(leaves, direction, strict=True)]
      return eq_2(
        reference_terms(jax.tree.unflatten(treedef, moved), run.outputs)[0]
      )

    want = (loss(1e-5) - loss(-1e-5)) / 2e-5
    got = sum(
      np.vdot(g, d)
      for g, d in zip(jax.tree.leaves(run.gradient), direction, strict=True)
    )
    # The gradient is a difference of parameters near 1: 6e-8 off in each of
    # 2,000 numbers. The finite difference is far more accurate.
    assert got == pytest.approx(want, abs=2e-5)
    assert abs(want) > 1e-2


# Of the rows of `tiny.batch`; the second has no part in the gradient.
ROW_WEIGHTS = np.float32([8.0, 0.0, -2.0, 4.0])


def weighted(row_weights=ROW_WEIGHTS):
  return tiny.batch()._replace(row_weights=jnp.asarray(row_weights))


def test_row_weights_scale_the_loss_and_gradient_of_their_rows():
  run = recorder(dataset)(batch=weighted())

  def reference(params):
    jsd, _ = reference_terms(params, run.outputs)
    return np.mean(ROW_WEIGHTS * [row.mean() for row in jsd])

  # float32 logits are off by about 1e-6.
  assert run.metrics['loss'] == pytest.approx(
    reference(STUDENT_PARAMS), rel=1e-5
  )
  leaves, treedef = jax.tree.flatten(jax.tree.map(np.float64, STUDENT_PARAMS))
  rng = np.random.default_rng(1)
  direction = [rng.standard_normal(x.shape) for x in leaves]

  def moved(distance):
    of = [x + distance * d for x, d in zip(leaves, direction, strict=True)]
    return reference(jax.tree.unflatten(treedef, of))

  want = (moved(1e-5) - moved(-1e-5)) / 2e-5
  got = sum(
    np.vdot(g, d)
    for g, d in zip(jax.tree.leaves(run.gradient), direction, strict=True)
  )
  # The gradient is a difference of parameters near 1: 6e-8 off in each.
  assert got == pytest.approx(want, abs=2e-5)
  assert abs(want) > 1e-2


def test_weights_of_1_change_no_bit():
  run = recorder(dataset)

  plain, ones = run(), run(batch=weighted(np.ones(4, np.float32)))

  assert ones.metrics == plain.metrics
  jax.tree.map(np.testing.assert_array_equal, ones.gradient, plain.gradient)


@pytest.mark.parametrize(
  'method',
  [
    Method(
      policy=student(),
      objective=Objective(divergences.reverse_kl),
      credit=credit.minillm_long_term(),
    ),
    # Two outputs for each input.
    Method(policy=policies.paired(dataset), objective=Objective(JSD)),
  ],
  ids=['credit', 'two outputs'],
)
def test_row_weights_scale_all_that_a_row_contributes(method):
  step = jax.jit(make_step(None, method=method))

  norms = [
    step(start(), FROZEN, weighted(np.full(4, w, np.float32)))[1]['grad_norm']
    for w in (1.0, 2.0, -4.0)
  ]

  # Multiplied by powers of two, all digits stay.
  assert norms[1:] == [2.0 * norms[0], 4.0 * norms[0]]


def test_no_gradient_reaches_the_teacher():
  step = make_step(dataset())

  gradient = jax.jit(
    jax.grad(lambda p: step(start(), Frozen(p), tiny.batch())[1]['loss'])
  )(TEACHER_PARAMS)

  assert not any(g.any() for g in jax.tree.leaves(gradient))


def test_microbatches_change_nothing_and_agree_on_who_writes():
  whole, halves = (
    Recorder(  # it accepts one writing a step
      mixture(0.5),
      # Halves of a batch differ in their numbers of tokens.
      objective=Objective(JSD, reduction='token'),
      num_microbatches=num_microbatches,
    )
    for num_microbatches in (1, 2)
  )

  shares = set()
  for i in range(8):
    got, want = halves(step=i), whole(step=i)

    shares.add(got.metrics['on_policy'])
    tiny.assert_equal_but_for_rounding(
      (got.gradient, got.metrics), (want.gradient, want.metrics)
    )
    np.testing.assert_array_equal(got.outputs.tokens, want.outputs.tokens)
  assert shares == {0.0, 1.0}


def test_metrics_count_what_the_student_wrote_and_what_did_not_end():
  batch = tiny.batch()
  unended = np.array(batch.decoder_target_tokens)
  unended[2, -1] = 5  # the one row that is full, now without an EOS
  batch = batch._replace(decoder_target_tokens=jnp.asarray(unended))
  run = Recorder(mixture(0.5, per='sequence'))

  for i in range(4):
    _, metrics, outputs, by_student = run(batch=batch, step=i)

    ended = (outputs.tokens == 1).any(axis=1)
    assert metrics['on_policy'] == by_student.mean()
    assert metrics['truncated'] == (~ended).mean()
    assert metrics['target_tokens'] == outputs.weights.sum()
    if not by_student[2]:
      assert not ended[2]


class Spy:
  """A model that counts how often its methods are traced."""

  def __init__(self, model, traced):
    self._model = model
    self._traced = traced

  def apply(self, *args, method, **kwargs):
    dropout = not kwargs.get('deterministic', True)
    self._traced[method + (' with dropout' if dropout else '')] += 1
    return self._model.apply(*args, method=method, **kwargs)

  def __getattr__(self, name):
    return getattr(self._model, name)


def traced_calls(policy, dropout_rate):
  traced = collections.Counter()
  model = T5(tiny.config(dropout_rate=dropout_rate))
  step = make_step(policy, student=Spy(model, traced))
  jax.eval_shape(step, start(), FROZEN, tiny.batch())
  return traced


@pytest.mark.parametrize(
  'policy', [dataset(), student(), mixture(0.5)], ids=['0', '1', '0.5']
)
def test_without_dropout_the_students_encoder_runs_once(policy):
  assert traced_calls(policy, dropout_rate=0.0)['encode'] == 1


def test_with_dropout_the_student_samples_without_it():
  # Sampling encodes without dropout, the loss with it: twice in all.
  traced = traced_calls(student(), dropout_rate=0.1)

  assert traced['encode'] == 1
  assert traced['encode with dropout'] == 1
  assert traced['decode with dropout'] == 1
  assert traced['decode'] == 0
  assert traced['decode_step'] > 0
  assert traced['decode_step with dropout'] == 0


def test_dropout_changes_the_loss_but_not_the_samples():
  plain = recorder(student)

  run = Recorder(student(), student=T5(tiny.config(dropout_rate=0.5)))()

  np.testing.assert_array_equal(run.outputs.tokens, plain().outputs.tokens)
  assert abs(run.metrics['loss'] - plain().metrics['loss']) > 1e-3


@pytest.mark.parametrize(
  'policy, loops',
  [
    (dataset(), 0),
    (mixture(0.0), 0),
    (mixture(0.5), 1),
    (mixture(0.5, 'sequence'), 1),
    (student(), 1),
    (teacher(), 1),
  ],
  ids=['dataset', '0', '0.5', '0.5 per sequence', 'student', 'teacher'],
)
def test_a_sampler_is_compiled_only_for_those_who_may_write(policy, loops):
  program = jax.make_jaxpr(make_step(policy))(start(), FROZEN, tiny.batch())

  assert str(program).count(' while[') == loops


def test_at_lambda_1_the_targets_are_not_read():
  batch = tiny.batch()
  garbage = batch._replace(
    decoder_target_tokens=jnp.full_like(batch.decoder_target_tokens, -(10**9)),
    decoder_loss_weights=jnp.full_like(batch.decoder_loss_weights, jnp.nan),
  )
  run = recorder(student)

  got, want = run(batch=garbage), run(batch=batch)

  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert np.isfinite(got.metrics['loss'])


def test_a_step_can_be_repeated_and_no_other_has_its_draws():
  run = recorder(student)

  runs = [run(step=i) for i in (0, 1, 2, 1)]

  jax.tree.map(np.testing.assert_array_equal, runs[1], runs[3])
  tokens = [r.outputs.tokens for r in runs]
  for a, b in ((0, 1), (1, 2), (0, 2)):
    assert (tokens[a] != tokens[b]).any(axis=1).mean() > 0.5


def test_draws_depend_on_the_seed():
  run = recorder(student)

  tokens, other_tokens = (run(seed=i).outputs.tokens for i in (0, 1))

  assert (tokens != other_tokens).any(axis=1).mean() > 0.5


def test_each_writer_draws_in_its_own_way():
  def greedy(model, params):
    inputs = tiny.batch().encoder_input_tokens
    return jax.jit(
      lambda: (
        rollout_lib.rollout(
          rollout_lib.Writer(model, params, inputs, sampler.GREEDY),
          jax.random.key(0),
          row_ids_B=jnp.arange(4),
          max_decode_len=6,
          ids=tiny.IDS,
        ).tokens
      )
    )()

  run = Recorder(
    mixture(0.5, per='sequence', otherwise=teacher),
    samplers={
      'student_sampler': sampler.GREEDY,
      # Greedy, too, in its own way.
      'teacher_sampler': sampler.SamplerConfig(top_k=1),
    },
  )(step=4)  # in which two rows fall to each

  by_student = greedy(STUDENT, STUDENT_PARAMS)
  by_teacher = greedy(TEACHER, TEACHER_PARAMS)
  np.testing.assert_array_equal(
    run.outputs.tokens,
    np.where(run.by_student[:, None], by_student, by_teacher),
  )
  assert 0 < run.by_student.sum() < 4
  assert (by_student != by_teacher).any(axis=1).all()


def test_a_teacher_whose_outputs_are_drafted_writes_the_same():
  greedy = {'teacher_sampler': sampler.GREEDY}

  alone, drafted = (
    Recorder(teacher(), samplers=greedy | drafting)()
    for drafting in ({}, {'teacher_drafting': speculative.Drafting(2)})
  )

  np.testing.assert_array_equal(drafted.outputs.tokens, alone.outputs.tokens)
  np.testing.assert_array_equal(drafted.outputs.weights, alone.outputs.weights)
  tiny.assert_equal_but_for_rounding(drafted.gradient, alone.gradient)
  assert not drafted.by_student.any()


class Training:
  """A jitted step, as a run uses it, that counts its traces."""

  def __init__(self, optimizer):
    self.num_traces = 0
    self._optimizer = optimizer
    step = make_step(mixture(0.5), optimizer=optimizer)

    def counted(*arguments):
      self.num_traces += 1
      return step(*arguments)

    self.step = jax.jit(counted, donate_argnums=0)

  def start(self):
    copy = jax.tree.map(jnp.copy, STUDENT_PARAMS)
    return start(copy, self._optimizer)


@pytest.fixture(
  scope='module',
  params=[
    optax.adafactor(0.03),
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01)),
  ],
  ids=['adafactor', 'adamw with clipping'],
)
def training(request):
  return Training(request.param)


def test_one_program_trains_on_either_branch_of_a_mixture(training):
  state, history = training.start(), []

  for _ in range(20):
    state, metrics = training.step(state, FROZEN, tiny.batch())
    history.append({name: float(value) for name, value in metrics.items()})

  assert training.num_traces == 1
  assert int(state.step) == 20
  for branch in (0.0, 1.0):
    loss = [m['loss'] for m in history if m['on_policy'] == branch]
    assert len(loss) > 3
    assert loss[-1] < 0.7 * loss[0]


def test_state_is_updated_in_place_and_the_teacher_is_left_alone(training):
  def arrays(tree):
    # Adafactor keeps numbers in places that it does not use; nobody reads them.
    return [x for x in jax.tree.leaves(tree) if x.size > 1]

  def memory(tree):
    return {x.unsafe_buffer_pointer() for x in arrays(tree)}

  state = training.start()
  teacher_before = jax.tree.map(np.array, TEACHER_PARAMS)
  memory_before = memory(state)

  new_state, _ = training.step(state, FROZEN, tiny.batch())

  assert all(x.is_deleted() for x in arrays(state))
  assert memory(new_state) == memory_before
  jax.tree.map(np.testing.assert_array_equal, TEACHER_PARAMS, teacher_before)


def test_grad_norm_is_taken_before_clipping_and_param_norm_after_the_update():
  clipping = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
  step = jax.jit(make_step(dataset(), optimizer=clipping))

  state, metrics = step(start(optimizer=clipping), FROZEN, tiny.batch())

  def norm(tree):
    return np.sqrt(
      sum((np.float64(x) ** 2).sum() for x in jax.tree.leaves(tree))
    )

  plain = recorder(dataset)()
  # Sums of 2,000 squares in float32; parameters' differences are 6e-8 off.
  assert metrics['grad_norm'] == pytest.approx(norm(plain.gradient), rel=1e-4)
  assert metrics['grad_norm'] > 0.01
  assert metrics['param_norm'] == pytest.approx(norm(state.params), rel=1e-6)
  moved = jax.tree.map(difference, state.params, STUDENT_PARAMS)
  assert norm(moved) == pytest.approx(1e-3, rel=1e-2)


def test_likelihood_of_the_dataset_needs_no_teacher():
  sft = Objective(divergence_weight=0.0, likelihood_weight=1.0)

  step = jax.jit(make_step(dataset(), teacher=None, objective=sft))
  _, metrics = step(start(), Frozen(), tiny.batch())

  _, nll = reference_terms(STUDENT_PARAMS, tiny.batch().outputs)
  # float32 logits are off by about 1e-6.
  assert metrics['loss'] == pytest.approx(eq_2(nll), rel=1e-5)
  assert 'divergence' not in metrics


@pytest.mark.parametrize('policy', [teacher(), dataset()])
def test_a_method_that_needs_a_teacher_must_get_one(policy):
  with pytest.raises(ValueError, match='needs a teacher, and `teacher` is No'):
    make_step(policy, teacher=None)
