# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from gkd_jax.distill import divergences, objectives, policies
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.methods import Method
from gkd_jax.models.params import abstract_params, init_params
from gkd_jax.models.t5 import T5
from gkd_jax.parallel import partitioning
from tests import tiny

# t5x/partitioning.py, standard_logical_axis_rules, called with
# (activation_partitioning_dims, parameter_partitioning_dims); without the axes
# that no T5 here has.
OF_T5X = {
  (1, 1): [('embed', None)],
  (1, 2): [('embed', 'data')],
  (2, 1): [('embed', 'model')],
  (2, 2): [('embed', 'model'), ('embed', 'data')],
}


@pytest.mark.parametrize('error', [AssertionError(), RuntimeError('no GPU')])
def test_no_devices_are_refused_with_the_platform(monkeypatch, error):
  def devices(platform=None):
    raise error

  monkeypatch.setattr(jax, 'devices', devices)
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')

  with pytest.raises(
    ValueError, match='no cuda devices.* JAX_PLATFORMS is cud'
  ):
    partitioning.make_mesh()


@pytest.mark.parametrize(('activations', 'parameters'), OF_T5X, ids=str)
def test_rules_are_those_of_t5x(activations, parameters):
  rules = partitioning.standard_logical_axis_rules(parameters, activations)

  # Nothing is left for a name's last rule, None, that T5X does not write.
  embed = [rule for rule in rules if rule[0] == 'embed']
  expected = OF_T5X[activations, parameters]
  assert embed == [*expected, *([] if None in expected[-1] else [embed[-1]])]
  assert embed[-1] == ('embed', None)
  assert {name: axis for name, axis in rules if name != 'embed'} == {
    'batch': 'data',
    'vocab': 'model',
    'mlp': 'model',
    'heads': 'model',
    'kv': None,
    'joined_kv': 'model',
    'relpos_buckets': None,
    'length': None,
  }


@pytest.mark.parametrize('dims', [(3, 1), (1, 0), (0, 2), ('1', 1)], ids=str)
def test_rules_that_there_are_not_are_refused(dims):
  with pytest.raises(ValueError, match='parameter_partitioning_dims must be'):
    partitioning.standard_logical_axis_rules(*dims)


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
def test_mesh_that_does_not_match_the_devices_is_refused(shape):
  with pytest.raises(ValueError, match='devices of this run. Set data=-1'):
    partitioning.make_mesh(**shape)


def test_mesh_takes_all_devices_by_default():
  mesh = partitioning.make_mesh()

  assert mesh.shape == {'data': jax.device_count(), 'model': 1}


def test_mesh_takes_the_devices_it_is_given():
  mesh = partitioning.make_mesh(model=2, devices=['a', 'b', 'c', 'd', 'e', 'f'])

  assert mesh.shape == {'data': 3, 'model': 2}
  assert mesh.devices.tolist() == [['a', 'b'], ['c', 'd'], ['e', 'f']]


# No device is needed to say who holds what.
FOUR = jax.sharding.AbstractMesh((2, 2), ('data', 'model'))


def placement_of(*dims, mesh=FOUR):
  return partitioning.Placement(
    mesh, partitioning.standard_logical_axis_rules(*dims)
  )


KERNEL = "['encoder']['layers_0']['mlp']['wi_0']['kernel']"
OUT = "['encoder']['layers_0']['attention']['out']['kernel']"
TABLE = "['token_embedder']['embedding']"
LOGITS = "['decoder']['logits_dense']['kernel']"
BIAS = "['encoder']['relpos_bias']['rel_embedding']"
NORM = "['encoder']['encoder_norm']['scale']"


@pytest.mark.parametrize(
  ('dims', 'expected'),
  [
    (
      (1, 1),
      {
        TABLE: ('model', None),
        KERNEL: (None, 'model'),
        OUT: ('model', None),
        LOGITS: (None, 'model'),
        BIAS: ('model', None),
        NORM: (None,),
      },
    ),
    (
      (2, 1),
      {
        TABLE: ('model', 'data'),
        KERNEL: ('data', 'model'),
        OUT: ('model', 'data'),
        LOGITS: ('data', 'model'),
        BIAS: ('model', None),
        NORM: ('data',),
      },
    ),
    ((0, 1), {TABLE: (None, None), KERNEL: (None, None), BIAS: (None, None)}),
  ],
  ids=str,
)
def test_every_parameter_is_spread_by_its_logical_axes(dims, expected):
  t5 = T5(tiny.config(), placement_of(*dims))

  shardings = {
    jax.tree_util.keystr(path): x.sharding.spec
    for path, x in jax.tree_util.tree_leaves_with_path(abstract_params(t5))
  }

  assert expected == {name: (*shardings[name],) for name in expected}


@pytest.mark.parametrize(
  ('dims', 'spec'),
  [
    ((1, 1), ('data', None, None)),
    ((2, 1), ('data', None, None)),
    ((1, 2), ('data', None, 'model')),
    ((2, 2), ('data', None, 'model')),
  ],
  ids=str,
)
def test_activations_are_spread_over_data_and_in_two_dims_over_model(
  dims, spec
):
  sharding = placement_of(*dims).sharding('batch', 'length', 'embed')

  assert (*sharding.spec,) == spec


def test_gathered_parameters_are_whole_in_each_part_of_data():
  gathered = placement_of(2, 2).replicated_over_data()

  assert (*gathered.sharding('embed', 'mlp').spec,) == (None, 'model')


def shardings_of_state(optimizer, *dims):
  """{name: (shape of a device's part, shape)} of what an optimizer keeps."""
  t5 = T5(tiny.config(emb_dim=128, mlp_dim=256), placement_of(*dims))
  state = state_lib.abstract_state(abstract_params(t5), optimizer, FOUR)
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
@pytest.mark.parametrize(
  ('dims', 'parts'),
  [((1, 1), ((128, 128), (128, 12))), ((2, 1), ((64, 128), (64, 12)))],
  ids=str,
)
def test_an_optimizers_moments_lie_as_their_parameters(
  optimizer, where, dims, parts
):
  state = shardings_of_state(optimizer, *dims)

  for name, part, whole in (
    (KERNEL, parts[0], (128, 256)),
    (LOGITS, parts[1], (128, 24)),
  ):
    assert state[where + name] == state['.params' + name] == (part, whole)


def test_what_a_device_holds_falls_as_the_mesh_grows():
  def bytes_on_a_device(data, over_model):
    mesh = jax.sharding.AbstractMesh((data, over_model), ('data', 'model'))
    t5 = T5(tiny.config(emb_dim=128, mlp_dim=256), placement_of(2, mesh=mesh))
    state = state_lib.abstract_state(
      abstract_params(t5), optax.adamw(1.0), mesh
    )
    return sum(
      4 * np.prod(x.sharding.shard_shape(x.shape))
      for x in jax.tree.leaves(state)
    )

  sizes = [
    bytes_on_a_device(*mesh) for mesh in ((1, 1), (2, 1), (2, 2), (8, 2))
  ]

  # But for the tables of relative positions, which 'data' does not spread.
  for larger, smaller, factor in zip(sizes, sizes[1:], (2, 2, 4), strict=False):
    assert smaller == pytest.approx(larger / factor, rel=0.01)


def test_adafactors_rows_and_columns_and_all_counts_are_on_every_device():
  state = shardings_of_state(optax.adafactor(1.0))

  rest = {k: v for k, v in state.items() if not k.startswith('.params')}
  assert rest['.step'] == ((), ())
  assert rest[f'.opt_state[0].v_row{KERNEL}'] == ((128,), (128,))
  assert rest[f'.opt_state[0].v_col{KERNEL}'] == ((256,), (256,))
  # What is too small to be factored lies as its parameter.
  assert rest[f'.opt_state[0].v{LOGITS}'] == ((128, 12), (128, 24))


def test_an_abstract_state_is_what_is_made():
  mesh = partitioning.make_mesh()
  t5 = T5(tiny.config(), partitioning.Placement(mesh))
  optimizer = optax.adafactor(1.0)

  abstract = state_lib.abstract_state(abstract_params(t5), optimizer, mesh)

  made = state_lib.init_state(tiny.params(t5, 0), optimizer)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
    lambda x: (x.shape, x.dtype), made
  )


@pytest.mark.parametrize(
  ('shape', 'dims', 'said'),
  [
    (
      (1, 4),
      (1, 1),
      r'MeshConfig.model 4 does not divide \w+/.*_embedding .*2, 32',
    ),
    ((3, 1), (2, 1), 'the data axis, 3 here, must divide the width'),
  ],
  ids=str,
)
def test_a_mesh_that_does_not_divide_a_parameter_is_refused(shape, dims, said):
  mesh = jax.sharding.AbstractMesh(shape, ('data', 'model'))

  with pytest.raises(ValueError, match=said):
    abstract_params(T5(tiny.config(), placement_of(*dims, mesh=mesh)))


def test_abstract_params_are_what_initialisation_makes():
  t5 = T5(tiny.config(), placement_of(1))

  abstract = abstract_params(t5)

  made = jax.eval_shape(lambda: init_params(t5, jax.random.key(0)))
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(
      (a.shape, a.dtype), (b.shape, b.dtype)
    ),
    abstract,
    made,
  )


def test_put_batch_spreads_rows_over_the_data_axis():
  batch = jax.tree.map(np.asarray, tiny.batch())

  placed = partitioning.put_batch(batch, partitioning.make_mesh(), 4)

  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert {x.sharding.spec for x in jax.tree.leaves(placed)} == {
    PartitionSpec('data')
  }


# --- The same numbers everywhere ---------------------------------------------

# (data, model): (parameter and activation dims of the student, of the teacher)
MESHES = {
  (1, 1): ((1, 1), (1, 1)),
  (2, 2): ((1, 1), (1, 1)),
  (1, 4): ((0, 1), (1, 1)),
  (8, 1): ((1, 1), (2, 1)),
  (4, 2): ((2, 1), (2, 2)),
  (2, 4): ((2, 2), (1, 2)),
  (1, 8): ((1, 2), (1, 1)),
}


def steps_on_each_mesh():
  """Runs in a separate process, see `tiny.on_simulated_devices`."""
  shape = {'num_heads': 8, 'head_dim': 2, 'mlp_dim': 24}
  _, params = tiny.model_and_params(0, **shape)
  _, teacher_params = tiny.model_and_params(1, '1.0', emb_dim=24, **shape)
  batch = tiny.batch(0, (7, 3, 5, 6) * 4, (5, 2, 6, 4) * 4)
  optimizer = optax.sgd(1.0)  # the parameters' change is the gradient
  written = []

  def write(draw):
    drawn = policies.student().write(draw)
    jax.debug.callback(
      lambda x: written.append(np.asarray(x)), drawn.outputs[0]
    )
    return drawn

  def run(mesh_shape, student_dims, teacher_dims):
    mesh = partitioning.make_mesh(
      *mesh_shape, devices=jax.devices()[: mesh_shape[0] * mesh_shape[1]]
    )
    student = T5(tiny.config(**shape), placement_of(*student_dims, mesh=mesh))
    teacher = T5(
      tiny.config('1.0', emb_dim=24, **shape),
      placement_of(*teacher_dims, mesh=mesh),
    )

    train_step = step_lib.make_train_step(
      student=student,
      teacher=teacher,
      method=Method(
        policy=policies.Policy(write, 1.0),
        objective=objectives.Objective(
          functools.partial(divergences.generalized_jsd, beta=0.5)
        ),
      ),
      optimizer=optimizer,
      ids=tiny.IDS,
      seed=0,
      num_microbatches=2 if min(mesh_shape) > 1 else 1,
    )
    abstract = (
      state_lib.abstract_state(abstract_params(student), optimizer, mesh),
      abstract_params(teacher),
    )
    lies = jax.tree.map(lambda x: x.sharding, abstract)
    state = state_lib.init_state(jax.tree.map(jnp.copy, params), optimizer)
    state, placed_params = jax.device_put((state, teacher_params), lies)
    parts = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, state)
    state, metrics = jax.jit(
      train_step, donate_argnums=0, out_shardings=(lies[0], None)
    )(
      state,
      state_lib.Frozen(placed_params),
      partitioning.put_global_batch(batch, mesh),
    )
    jax.effects_barrier()
    return {
      'parts': parts.params['encoder']['layers_0']['mlp']['wi_0']['kernel'],
      'params': jax.tree.map(np.asarray, state.params),
      'metrics': {name: float(value) for name, value in metrics.items()},
      'written': written.pop(0),
    }

  return {mesh: run(mesh, *dims) for mesh, dims in MESHES.items()}


@pytest.fixture(scope='module')
def on_each_mesh():
  return tiny.on_simulated_devices(8, __name__, steps_on_each_mesh.__name__)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [m for m in MESHES if m != (1, 1)], ids=str)
def test_every_mesh_gives_what_one_device_gives(on_each_mesh, mesh):
  one, spread = on_each_mesh[1, 1], on_each_mesh[mesh]

  # An MLP of [16, 24] was spread as asked: the test would pass else anyhow.
  student_dims, _ = MESHES[mesh]
  data, over = mesh
  assert spread['parts'] == (
    16 // data if student_dims[0] == 2 else 16,
    24 // over if student_dims[0] > 0 else 24,
  )
  np.testing.assert_array_equal(spread['written'], one['written'])
  for name in ('metrics', 'params'):
    tiny.assert_equal_but_for_rounding(spread[name], one[name])
