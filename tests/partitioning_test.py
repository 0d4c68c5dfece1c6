# SPDX-License-Identifier: Apache-2.0
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from gkd_jax import (
  divergences,
  model,
  objectives,
  partitioning,
  policies,
  sampler,
  step,
)
from gkd_jax.model import T5
from tests import tiny


def test_rules_are_those_of_t5x():
  # t5x/partitioning.py, standard_logical_axis_rules with one dimension each
  # for parameters and activations; without the axes that no T5 here has.
  assert dict(partitioning.standard_logical_axis_rules()) == {
    'batch': 'data',
    'vocab': 'model',
    'embed': None,
    'mlp': 'model',
    'heads': 'model',
    'kv': None,
    'joined_kv': 'model',
    'relpos_buckets': None,
    'length': None,
  }


@pytest.mark.parametrize(
  'shape',
  [
    {'data': 1000},
    {'data': 0},
    {'data': -2},
    {'model': 1000},
    {'model': 0},
    {'model': -1},
    {'data': 1000, 'model': 1000},
    {'data': -1, 'model': -1},
  ],
  ids=str,
)
def test_mesh_that_does_not_use_the_devices_there_are_is_refused(shape):
  with pytest.raises(ValueError, match='devices there are. Set data=-1'):
    partitioning.make_mesh(**shape)


def test_mesh_takes_all_devices_by_default():
  mesh = partitioning.make_mesh()

  assert mesh.shape == {'data': jax.device_count(), 'model': 1}


def test_mesh_takes_the_devices_it_is_given():
  mesh = partitioning.make_mesh(model=2, devices=['a', 'b', 'c', 'd', 'e', 'f'])

  assert mesh.shape == {'data': 3, 'model': 2}
  assert mesh.devices.tolist() == [['a', 'b'], ['c', 'd'], ['e', 'f']]


def specs(logical_axes, **keywords):
  shardings = partitioning.param_shardings(
    partitioning.make_mesh(), logical_axes, **keywords
  )
  return jax.tree.map(lambda s: s.spec, shardings)


def test_every_parameter_is_spread_by_its_logical_axes():
  got = specs(model.logical_axes(T5(tiny.config())))

  attention = got['decoder']['layers_0']['self_attention']
  mlp = got['encoder']['layers_0']['mlp']
  assert got['token_embedder']['embedding'] == PartitionSpec('model', None)
  assert attention['query']['kernel'] == PartitionSpec(None, 'model')
  assert attention['out']['kernel'] == PartitionSpec('model', None)
  assert mlp['wi_0']['kernel'] == PartitionSpec(None, 'model')
  assert mlp['wo']['kernel'] == PartitionSpec('model', None)
  assert got['decoder']['logits_dense']['kernel'] == PartitionSpec(
    None, 'model'
  )
  assert got['encoder']['relpos_bias']['rel_embedding'] == PartitionSpec(
    'model', None
  )
  assert got['encoder']['encoder_norm']['scale'] == PartitionSpec(None)


def test_rules_can_be_changed():
  rules = (('embed', 'data'), ('mlp', 'model'))

  got = specs({'kernel': PartitionSpec('embed', 'mlp')}, rules=rules)

  assert got == {'kernel': PartitionSpec('data', 'model')}


# No device is needed to say who holds what.
FOUR = jax.sharding.AbstractMesh((2, 2), ('data', 'model'))


def shardings_of_state(optimizer):
  """(name, shape of a device's part, shape) of all that an optimizer keeps."""
  t5 = T5(tiny.config(emb_dim=128, mlp_dim=256))
  state = step.abstract_state(model.abstract_params(t5, FOUR), optimizer, FOUR)
  return {
    jax.tree_util.keystr(path): (x.sharding.shard_shape(x.shape), x.shape)
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  }


@pytest.mark.parametrize(
  'optimizer, where',
  [
    (optax.adamw(1.0), '.opt_state[0].mu'),
    (
      optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0)),
      '.opt_state[1][0].nu',
    ),
    (
      optax.masked(
        optax.adamw(1.0), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
      ),
      '.opt_state.inner_state[0].mu',
    ),
  ],
  ids=['adamw', 'clipped adamw', 'adamw of some'],
)
def test_an_optimizers_moments_lie_as_their_parameters(optimizer, where):
  state = shardings_of_state(optimizer)

  for names, want in {
    "['encoder']['layers_0']['mlp']['wi_0']['kernel']": (
      (128, 128),
      (128, 256),
    ),
    "['encoder']['layers_0']['mlp']['wo']['kernel']": ((128, 128), (256, 128)),
    "['decoder']['logits_dense']['kernel']": ((128, 12), (128, 24)),
  }.items():
    assert state[where + names] == state['.params' + names] == want


def test_adafactors_rows_and_columns_and_all_counts_are_on_every_device():
  state = shardings_of_state(optax.adafactor(1.0))

  rest = {k: v for k, v in state.items() if not k.startswith('.params')}
  kernel = "['encoder']['layers_0']['mlp']['wi_0']['kernel']"
  assert rest['.step'] == ((), ())
  assert rest[f'.opt_state[0].v_row{kernel}'] == ((128,), (128,))
  assert rest[f'.opt_state[0].v_col{kernel}'] == ((256,), (256,))
  # What is too small to be factored lies as its parameter.
  out = "['decoder']['logits_dense']['kernel']"
  assert rest[f'.opt_state[0].v{out}'] == ((128, 12), (128, 24))


def test_an_abstract_state_is_what_is_made():
  t5 = T5(tiny.config())
  optimizer = optax.adafactor(1.0)
  mesh = partitioning.make_mesh()

  abstract = step.abstract_state(
    model.abstract_params(t5, mesh), optimizer, mesh
  )

  made = step.init_state(tiny.params(t5, 0), optimizer)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
    lambda x: (x.shape, x.dtype), made
  )


def test_a_mesh_that_does_not_divide_the_heads_is_refused():
  mesh = jax.sharding.AbstractMesh((1, 4), ('data', 'model'))

  with pytest.raises(ValueError) as error:
    model.abstract_params(T5(tiny.config()), mesh)

  assert re.match(
    r'MESH_MODEL 4 does not divide \w+/relpos_bias/rel_embedding of shape '
    r'\(2, 32\): ',
    str(error.value),
  )


def test_abstract_params_are_what_initialisation_makes():
  t5 = T5(tiny.config())

  abstract = model.abstract_params(t5, partitioning.make_mesh())

  made = jax.eval_shape(lambda: model.init_params(t5, jax.random.key(0)))
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(
      (a.shape, a.dtype), (b.shape, b.dtype)
    ),
    abstract,
    made,
  )
  wo = abstract['encoder']['layers_0']['mlp']['wo']['kernel']
  assert wo.sharding.spec == PartitionSpec('model', None)


def test_put_batch_spreads_rows_over_the_data_axis():
  batch = jax.tree.map(np.asarray, tiny.batch())

  placed = partitioning.put_batch(batch, partitioning.make_mesh())

  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert {x.sharding.spec for x in placed} == {PartitionSpec('data')}


def steps_on_one_and_on_all_devices():
  """Runs in a process of its own, see `tiny.on_simulated_devices`."""
  student, params = tiny.model_and_params(0)
  teacher, teacher_params = tiny.model_and_params(1, '1.0', emb_dim=12)
  optimizer = optax.sgd(1.0)  # the parameters' change is the gradient
  written = []

  def write(*arguments):
    drawn = policies.student().write(*arguments)
    jax.debug.callback(
      lambda x: written.append(np.asarray(x)), drawn.outputs[0]
    )
    return drawn

  train_step = tiny.jit(
    step.make_train_step(
      student=student,
      teacher=teacher,
      policy=policies.Policy(write, 1.0),
      objective=objectives.Objective(
        functools.partial(divergences.generalized_jsd, beta=0.5)
      ),
      optimizer=optimizer,
      student_sampler=sampler.ANCESTRAL,
      teacher_sampler=sampler.ANCESTRAL,
      num_ids=tiny.NUM_IDS,
      seed=0,
      num_microbatches=2,
    ),
    donate_argnums=0,
  )

  def run(place_student, place_teacher, place_batch):
    state = step.init_state(
      place_student(jax.tree.map(jnp.copy, params)), optimizer
    )
    batch = place_batch(tiny.batch())
    rows = batch.encoder_input_tokens.addressable_shards[0].data.shape[0]
    state, metrics = train_step(state, place_teacher(teacher_params), batch)
    jax.effects_barrier()
    mlp = state.params['encoder']['layers_0']['mlp']['wi_0']['kernel']
    return {
      'rows on a device': rows,
      'mlp on a device': mlp.addressable_shards[0].data.shape[1],
      'params': jax.tree.map(np.asarray, state.params),
      'metrics': {name: float(value) for name, value in metrics.items()},
      'written': np.concatenate([written.pop(0), written.pop(0)]),
    }

  mesh = partitioning.make_mesh(data=2, model=2)

  def spread(t5):
    shardings = jax.tree.map(
      lambda x: x.sharding, model.abstract_params(t5, mesh)
    )
    return lambda params: jax.device_put(params, shardings)

  one = run(*[lambda x: x] * 3)
  four = run(
    spread(student),
    spread(teacher),
    lambda batch: partitioning.put_batch(batch, mesh),
  )
  return one, four


@pytest.mark.slow
def test_a_2_by_2_mesh_gives_what_one_device_gives():
  one, four = tiny.on_simulated_devices(
    4, __name__, steps_on_one_and_on_all_devices.__name__
  )

  # Rows of the batch lie on 'data', columns of the weights on 'model'.
  assert (one['rows on a device'], four['rows on a device']) == (4, 2)
  assert (one['mlp on a device'], four['mlp on a device']) == (20, 10)
  np.testing.assert_array_equal(four['written'], one['written'])
  # The same sums, spread over devices: rounding only.
  assert four['metrics'] == pytest.approx(one['metrics'], rel=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    four['params'],
    one['params'],
  )
