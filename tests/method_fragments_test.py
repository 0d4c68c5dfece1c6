# SPDX-License-Identifier: Apache-2.0
"""What holds for every method of gin/methods/, as main makes it.

The same metrics, state and parameters on one device and on a mesh of eight
with two microbatches; a resumed run that does what one does that was not
interrupted; one program, which sends nothing to the host and has no [B, T, V].
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gkd_jax import experiment as experiment_lib
from gkd_jax.checkpoints import checkpoint
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill import teachers
from gkd_jax.models.params import abstract_params
from gkd_jax.models.registry import make_model
from gkd_jax.parallel import partitioning
from tests import conftest, tiny

pytestmark = pytest.mark.slow  # compiles models

FRAGMENTS = sorted((conftest.ROOT / 'gin/methods').glob('*.gin'))
NUM_STEPS, SAVED_AFTER = 4, 2
CHUNK_TOKENS = 8
MESH, NUM_MICROBATCHES = (4, 2), 2
# What a fragment leaves to the experiment, and sizes; values are gin's.
SETTINGS = {
  # Per row, over time, and otherwise token by token.
  'gkd': {
    'STUDENT_DATA_FRACTION': '@share/optax.linear_schedule()',
    'share/optax.linear_schedule.init_value': 0.2,
    'share/optax.linear_schedule.end_value': 0.8,
    'share/optax.linear_schedule.transition_steps': NUM_STEPS,
    'MIXTURE_PER': 'sequence',
    'policies.mixture.otherwise': '@policies.mixed_tokens',
    'DIVERGENCE': '@divergences.generalized_jsd',
    'BETA': 0.5,
  },
  'on_policy_gkd': {'DIVERGENCE': '@divergences.forward_kl'},
  # With tokens of both models, which have importance weights.
  'minillm': {
    'STUDENT_DATA_FRACTION': 0.0,
    'policies.mixture.otherwise': '@policies.mixed_tokens',
  },
  # A baseline that compares no rows: microbatches would change it.
  'rl_gkd': {
    'ALPHA': 0.5,
    'DIVERGENCE': '@divergences.reverse_kl',
    'REWARD': '@rewards.rouge_l()',
    'REWARD_BASELINE': 'self_critical',
  },
  'rlef': {
    'INITIAL_CHECKPOINT_PATH': 'x',
    'REWARD': '@rewards.rouge_l()',
    'REWARD_BASELINE': 'none',
  },
  'sampled_reverse_kl': {'OUTPUTS_PER_INPUT': 2},
  # Its baseline compares rows, but not the part that imitates.
  'j_bond': {
    'REWARD': '@rewards.rouge_l()',
    'credit.j_bond.forward_weight': 1.0,
    'REGULARIZATION': 0.5,
  },
  'multi_teacher': {'TEACHER_CHECKPOINT_PATH': {'a': 'x', 'b': 'y'}},
  'mopd': {'TEACHER_CHECKPOINT_PATH': {'a': 'x', 'b': 'y'}},
  'aligndistil': {'TEACHER_CHECKPOINT_PATH': {'dpo': 'x', 'reverse_dpo': 'y'}},
  'seqkd': {'TRAIN_ON_PREDICTIONS': 'x'},
  'dpo': {'TRAIN_ON_PREDICTIONS': 'x'},
  'redi': {'TRAIN_ON_PREDICTIONS': 'x'},
  # Of 18 ids: with the paper's 25 the teacher would never draw.
  'skd': {'TOP_K': 3},
  # Two steps fill the buffer; the others mostly replay.
  'distillm': {'REPLAY_CAPACITY': 12, 'STUDENT_DATA_FRACTION': 0.9},
}
# The parts of the carried state that steps change. opsd's teacher, the initial
# student, is one that they do not.
MOVING = {
  'distillm': 'policy',
  'j_bond': 'teacher',
  'sdft': 'teacher',
  'taid': 'divergence',
}
# Methods that sample in some of their steps.
SAMPLES_SOMETIMES = ('distillm', 'f_distill', 'imitkd')
# With momentum: the optimizer's state matters. Not Adam, which divides by the
# gradients, and so by the rounding of small ones.
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
# Its start id is none of the tokenizer's.
T5GEMMA = {
  'num_heads': 2,
  'num_kv_heads': 1,
  'num_encoder_layers': 1,
  'num_decoder_layers': 1,
  'start_id': 20,
}
STUDENTS = {
  't5': tiny.config(),
  't5gemma': tiny.t5gemma_config(2, **T5GEMMA),
}
# Of the second family: models write alone, and two in one loop.
OF_T5GEMMA = ('gkd', 'skd')
BATCHES = [
  tiny.batch(seed, (7, 3, 5, 6) * 2, (5, 2, 6, 4) * 2) for seed in (0, 2)
]
B, T = BATCHES[0].decoder_target_tokens.shape


class Run(NamedTuple):
  """What a run of NUM_STEPS did, on the host.

  Attributes:
    start: the carried state before the first step.
    history: [(carried state, metrics)] after each step.
    state: after the last step.
    resumed: history and state of a run that was restored after SAVED_AFTER
      steps.
    program: of the step.
    num_loops: in the program, outside branches.
    student_may_write: whether the method samples the student.
    metrics: names of the policy's.
    num_outputs: for each input.
  """

  start: Any
  history: list
  state: Any
  resumed: tuple | None
  program: str
  num_loops: int
  student_may_write: bool
  metrics: tuple[str, ...]
  num_outputs: int


def runs_of(name, family, folder):
  """Runs in a separate process, see `tiny.on_simulated_devices`.

  Args:
    name: of a fragment.
    family: of student and teachers.
    folder: to save into.

  Returns:
    The `Run` on one device, and on MESH in microbatches.
  """
  runs = []

  def train(experiment, run):
    experiment_lib.check(experiment)
    assert run.config_text()  # every override is read
    # Here, because functions that gin made read their settings when called.
    runs.append(run_on(experiment, family, (1, 1), 1))
    runs.append(run_on(experiment, family, MESH, NUM_MICROBATCHES, folder))

  base = 'arithmetic_cot/rl_gkd' if name == 'rlef' else 'cmudict_g2p/gkd'
  settings = {
    'MODEL_DIR': 'x',
    'TRAIN_STEPS': NUM_STEPS,
    'WARMUP_STEPS': 0,
    'BATCH_SIZE': B,
    'TEACHER_CHECKPOINT_PATH': 'x',
    'INITIAL_CHECKPOINT_PATH': None,
    **SETTINGS.get(name, {}),
  }
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('gkd_jax.train.train', train)
    finished = conftest.call_main(
      f'--gin_file=configs/{base}.gin',
      f'--gin_file=gin/methods/{name}.gin',
      *conftest.gin_flags(**settings),
    )
  assert finished.code == 0, finished.err
  return runs


def run_on(
  experiment, family, mesh_shape, num_microbatches, folder=None
) -> Run:
  """Trains tiny models with a method; with a folder, also resumes."""
  method = experiment.method
  method = dataclasses.replace(
    method,
    objective=dataclasses.replace(method.objective, chunk_tokens=CHUNK_TOKENS),
  )
  mesh = partitioning.make_mesh(
    *mesh_shape, jax.devices()[: math.prod(mesh_shape)]
  )
  placement = partitioning.Placement(mesh)
  student = make_model(STUDENTS[family], placement)
  teacher, teacher_params = teachers_of(method, family, placement)
  ids = student.config.special_ids(tiny.NUM_IDS)
  reward_fn = method.reward and method.reward.make_reward_fn(None, ids, None)
  batches = batches_of(experiment, mesh)
  abstract = state_lib.abstract_state(
    abstract_params(student), OPTIMIZER, mesh, method, batch=batches[0]
  )
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  params = tiny.params(make_model(student.config), 0)
  state = state_lib.init_state(params, OPTIMIZER, method, batch=batches[0])
  # Donated: a copy, each time.
  state = jax.device_put(jax.tree.map(jnp.copy, state), shardings)
  frozen = state_lib.Frozen(
    jax.device_put(teacher_params, partitioning.replicated(mesh))
  )
  traced = jax.jit(
    step_lib.make_train_step(
      student=student,
      teacher=teacher,
      method=method,
      optimizer=OPTIMIZER,
      ids=ids,
      seed=3,
      num_microbatches=num_microbatches,
      reward_fn=reward_fn,
    ),
    donate_argnums=0,
    out_shardings=(shardings, None),
  ).trace(state, frozen, batches[0])
  compiled = traced.lower().compile()  # one program for all steps

  def train(state, save=lambda state: None):
    history = []
    for number in range(int(state.step), NUM_STEPS):
      batch = batches[number % len(batches)]
      state, metrics = compiled(state, frozen, batch)
      history.append(jax.device_get((state.carried, metrics)))
      if number + 1 == SAVED_AFTER:
        save(state)
    return history, jax.device_get(state)

  start, resumed = jax.device_get(state.carried), None
  if folder is None:
    history, state = train(state)
  else:
    description = checkpoint.ModelDescription(student.config, 'none')
    checkpoints = checkpoint.Checkpoints(folder, description)
    history, state = train(
      state, lambda x: checkpoints.save(x, tiny.NoData(), train_seconds=0.0)
    )
    checkpoints.close()
    checkpoints = checkpoint.Checkpoints(folder, description)
    resumed = train(checkpoints.restore(abstract, tiny.NoData()).state)
  return Run(
    start,
    history,
    state,
    resumed,
    str(traced.jaxpr),
    loops_outside_branches(traced.jaxpr),
    method.policy.student_may_write,
    method.policy.metrics,
    method.policy.num_outputs,
  )


def teachers_of(method, family, placement):
  """Returns the model and parameters of a method's checkpoint, or several."""
  names = teachers.checkpoint_names(method.teacher)
  if not method.needs_teacher_checkpoint:
    names = []
  models, params = {}, {}
  for i, name in enumerate(names):
    width = {'emb_dim': 12 + 4 * i}
    config = tiny.config('1.0', **width)
    if family == 't5gemma':
      config = tiny.t5gemma_config(1, **T5GEMMA, **width)
    models[name] = make_model(config, placement)
    params[name] = tiny.params(make_model(config), 1 + i)
  if len(names) < 2:
    return models.get(None), params.get(None)
  return models, params


def batches_of(experiment, mesh):
  """Returns the batches of a method on a mesh."""
  batches = BATCHES
  if experiment.data.train.teacher_inputs is not None:
    lengths = (9, 4, 6, 8) * 2
    batches = [
      batch._replace(teacher_input_tokens=tiny.tokens(10 + i, lengths, 9))
      for i, batch in enumerate(batches)
    ]
  if experiment.method.is_routed:
    batches = [
      batch._replace(teacher_ids=jnp.arange(B) // 3 % 2) for batch in batches
    ]
  if experiment.data.train.pairs:
    batches = [
      batch._replace(rejected=other.outputs)
      for batch, other in zip(batches, batches[::-1], strict=True)
    ]
  return [partitioning.put_global_batch(batch, mesh) for batch in batches]


def loops_outside_branches(jaxpr) -> int:
  """Counts the sampling loops that run in every step."""
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  number = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'cond':
      continue
    number += equation.primitive.name == 'while'
    for value in equation.params.values():
      if hasattr(getattr(value, 'jaxpr', value), 'eqns'):
        number += loops_outside_branches(value)
  return number


@pytest.mark.parametrize(
  ('name', 'family'),
  [
    *((path.stem, 't5') for path in FRAGMENTS),
    *((name, 't5gemma') for name in OF_T5GEMMA),
  ],
)
def test_a_method_keeps_what_holds_for_every_step(name, family, tmp_path):
  one, eight = tiny.on_simulated_devices(
    8, __name__, runs_of.__name__, name, family, tmp_path
  )

  check_that_it_trains(name, one)
  tiny.assert_equal_but_for_rounding(
    (eight.history, eight.state), (one.history, one.state)
  )
  whole = eight.history[SAVED_AFTER:], eight.state
  jax.tree.map(np.testing.assert_array_equal, eight.resumed, whole)
  num_rows = B * one.num_outputs
  check_the_program(one, num_rows)
  check_the_program(eight, num_rows // NUM_MICROBATCHES)


def check_that_it_trains(name, run: Run) -> None:
  assert int(run.state.step) == NUM_STEPS
  metrics = [of_step for _, of_step in run.history]
  assert all(np.isfinite(m['loss']) for m in metrics)
  assert min(m['grad_norm'] for m in metrics) > 0.0
  assert {*run.metrics} <= metrics[0].keys()
  for policy_metric in {*run.metrics} - {'phi'}:
    assert max(m[policy_metric] for m in metrics) > 0.0
  assert (max(m['on_policy'] for m in metrics) > 0.0) == run.student_may_write
  for part, before, after in zip(
    run.start._fields, run.start, run.state.carried, strict=True
  ):
    moved = any(
      np.any(a != b)
      for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
    )
    assert moved == (MOVING.get(name) == part), part
  samples_always = run.student_may_write and name not in SAMPLES_SOMETIMES
  assert (run.num_loops > 0) == samples_always


def check_the_program(run: Run, num_rows: int) -> None:
  """Checks a step whose loss reads so many rows at once."""
  assert 'callback' not in run.program  # nothing goes to the host
  shapes = [
    [int(n) for n in dims.split(',')]
    for dims in re.findall(r'\w\[([\d,]+)\]', run.program)
  ]
  # The logits of one position or of a chunk, and the weights.
  sizes = [math.prod(s) for s in shapes if s[-1] == tiny.VOCAB_SIZE]
  assert CHUNK_TOKENS * tiny.VOCAB_SIZE <= max(sizes)
  assert max(sizes) < num_rows * T * tiny.VOCAB_SIZE
