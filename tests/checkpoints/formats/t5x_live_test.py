# SPDX-License-Identifier: Apache-2.0
"""Against T5X itself: its networks, its checkpointers, its test data."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.checkpoints.formats import t5x, tensors
from gkd_jax.models.t5 import T5, T5Config
from tests import tiny
from tests.checkpoints.formats import make_t5x_fixtures as fixtures
from tests.checkpoints.formats.make_t5x_fixtures import STEP, V1_0, V1_1, flat

pytestmark = pytest.mark.interop
checkpoints = pytest.importorskip(
  't5x.checkpoints', reason='T5X cannot be imported'
)

TESTDATA = pathlib.Path(checkpoints.__file__).parent / 'testdata'
VERSIONS = {'v1_0': V1_0, 'v1_1': V1_1}
# Those of T5 1.1 small.
REAL_WIDTHS = {
  'emb_dim': 512,
  'num_heads': 6,
  'head_dim': 64,
  'mlp_dim': 1024,
  'num_encoder_layers': 8,
  'num_decoder_layers': 8,
  'vocab_size': 32128,
}
# So large that T5X's Adafactor factors some matrices and not others.
FACTORED = {'emb_dim': 128, 'mlp_dim': 160, 'vocab_size': 256}
# All sums are float32, in another order; logits are of the size 1 to 10.
LOGITS_ATOL = 1e-4


def config(version, *, scanned=False, **changes) -> T5Config:
  return T5Config(
    **(fixtures.SHAPE | VERSIONS[version] | changes),
    relpos_bias_per_layer=scanned,
  )


def read(folder) -> dict[str, np.ndarray]:
  return {
    name: tensors.read_all(tensor)
    for name, tensor in t5x.open_folder(folder)[1].items()
  }


def assert_same(got, want):
  assert got.keys() == want.keys()
  for name, array in got.items():
    np.testing.assert_array_equal(array, want[name], err_msg=name)


# --- Logits -----------------------------------------------------------------


def params_for(ours: T5):
  """Random ones, queries of the size that T5's initializer gives them.

  Larger ones make attention so sharp that eight layers amplify the last bit to
  1e-3.
  """

  def scaled(path, leaf):
    is_query = any(key.key == 'query' for key in path)
    return leaf * ours.config.head_dim**-0.5 if is_query else leaf

  return jax.tree_util.tree_map_with_path(scaled, tiny.params(ours, 0))


def assert_same_logits(ours: T5, our_params, theirs, their_params):
  """Returns teacher-forced logits at positions with a target."""
  inputs = tiny.tokens(1, (24, 9, 17), 24)
  targets = tiny.tokens(2, (20, 20, 6), 20)
  decoder_inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  want = jax.jit(
    lambda p, *tokens: theirs.apply(
      {'params': p}, *tokens, enable_dropout=False
    )
  )(their_params, inputs, decoder_inputs, targets)

  got = tiny.logits(ours, our_params, inputs, targets)

  assert float(jnp.abs(want).max()) > 1.0
  difference = float(jnp.abs(got - want)[targets != 0].max())
  print(f'largest difference of logits: {difference:.1e}')
  assert difference < LOGITS_ATOL


@pytest.mark.parametrize('version', VERSIONS)
def test_our_t5_has_the_logits_of_t5x_at_real_widths(version):
  ours = T5(config(version, **REAL_WIDTHS))
  params = params_for(ours)
  theirs = fixtures.transformer(**VERSIONS[version], **REAL_WIDTHS)

  assert_same_logits(ours, params, theirs, params)


@pytest.mark.parametrize('version', VERSIONS)
def test_a_bias_per_layer_has_the_logits_of_scalable_t5(version, tmp_path):
  sizes = REAL_WIDTHS | {
    'num_encoder_layers': 3,
    'num_decoder_layers': 2,
    'vocab_size': 1000,
  }
  ours = T5(config(version, scanned=True, **sizes))
  params = params_for(ours)
  theirs = fixtures.transformer(scanned=True, **VERSIONS[version], **sizes)

  folder = t5x.save(tmp_path, ours.config, flat(params))

  restored = checkpoints.load_t5x_checkpoint(str(folder))
  assert_same_logits(ours, params, theirs, restored['target'])


# --- From T5X ---------------------------------------------------------------

WRITERS = {
  'legacy': fixtures.write_legacy,
  'orbax': fixtures.write_orbax,
  'orbax_without_ocdbt': fixtures.write_orbax_without_ocdbt,
}
LAYOUTS = {
  't5': {},
  'stacked along 1': {'scanned': True},
  'stacked along 0': {'scanned': True, 'param_scan_axis': 0},
  'scalable_t5, not stacked': {'scanned': True, 'scan_layers': False},
}


@pytest.mark.parametrize(
  'version, writer, layout',
  [('v1_1', 'legacy', layout) for layout in LAYOUTS]
  + [('v1_1', 'orbax', layout) for layout in LAYOUTS]
  + [
    ('v1_1', 'orbax_without_ocdbt', 't5'),
    ('v1_0', 'legacy', 't5'),
    ('v1_0', 'orbax', 'stacked along 1'),
  ],
)
def test_what_t5x_writes_now_is_read(version, writer, layout, tmp_path):
  state = fixtures.train_state(
    VERSIONS[version], train=False, **LAYOUTS[layout]
  )
  WRITERS[writer](state, tmp_path)
  folder = tmp_path / f'checkpoint_{STEP}'

  got = read(folder)

  scanned = 'scanned' in LAYOUTS[layout]
  assert t5x.open_folder(folder)[0] == config(version, scanned=scanned)
  stored = flat(state.params.unfreeze())
  axis = LAYOUTS[layout].get('param_scan_axis', 1)
  for name, array in got.items():
    stack, layer, *of_layer = name.split('/')
    whole = stored.get('/'.join((stack, stack, *of_layer)))
    if not layer.startswith('layers_') or whole is None:
      want = stored[name]
    else:
      want = np.moveaxis(whole, axis, 0)[int(layer.removeprefix('layers_'))]
    np.testing.assert_array_equal(array, want.reshape(array.shape), name)


# --- To T5X -----------------------------------------------------------------


def restored_by_t5x(how, state, folder: pathlib.Path):
  if how == 'orbax':  # T5X's default; it finds out that this is the other form
    manager = checkpoints.OrbaxCheckpointManagerInterface(
      str(folder.parent), state, fixtures.partitioner()
    )
    return manager.restore(path=str(folder))
  return checkpoints.Checkpointer(
    state, fixtures.partitioner(), str(folder.parent)
  ).restore(path=str(folder))


@pytest.mark.parametrize('how', ['legacy', 'orbax'])
@pytest.mark.parametrize('train', [True, False], ids=['train', 'infer'])
@pytest.mark.parametrize(
  'version, scanned',
  [('v1_0', False), ('v1_1', False), ('v1_1', True)],
  ids=['t5 1.0', 't5 1.1', 'scalable_t5'],
)
def test_t5x_restores_what_we_write(version, scanned, train, how, tmp_path):
  ours = config(version, scanned=scanned, **FACTORED)
  params = flat(tiny.params(T5(ours), 0))
  folder = t5x.save(tmp_path / 'ours', ours, params, step=1234)
  blank = fixtures.train_state(
    VERSIONS[version], train=train, scanned=scanned, **FACTORED
  )

  restored = restored_by_t5x(how, blank, folder)

  assert int(restored.step) == 1234
  fixtures.write_legacy(restored, tmp_path / 'theirs')
  assert_same(read(tmp_path / 'theirs' / 'checkpoint_1234'), params)
  if not train:
    return
  assert jax.tree.map(jnp.shape, restored.param_states) == jax.tree.map(
    jnp.shape, blank.param_states
  )
  trained = restored.apply_gradient(
    jax.tree.map(jnp.ones_like, restored.params), learning_rate=1e-3
  )
  assert int(trained.step) == 1235
  jax.tree.map(
    lambda was, now: np.testing.assert_array_less(now, was),
    restored.params,
    trained.params,
  )


def test_t5x_restores_bfloat16(tmp_path):
  ours = config('v1_1')
  params = {
    name: fixtures.numbers(name, array.shape)
    for name, array in flat(tiny.params(T5(ours), 0)).items()
  }
  folder = t5x.save(tmp_path, ours, params, dtype='bfloat16')

  restored = checkpoints.load_t5x_checkpoint(str(folder))['target']

  assert {leaf.dtype for leaf in jax.tree.leaves(restored)} == {
    np.dtype(jnp.bfloat16)
  }
  assert_same(flat(restored), params)


# --- T5X's own test data ----------------------------------------------------


@pytest.fixture
def testdata() -> pathlib.Path:
  if not TESTDATA.is_dir():
    pytest.skip(f'this T5X came without its test data: no {TESTDATA}')
  return TESTDATA


def test_the_t5_in_t5xs_test_data_is_read(testdata, tmp_path):
  shutil.copy(testdata / 'test_t5_tiny.checkpoint_0', tmp_path / 'checkpoint')

  got, opened = t5x.open_folder(tmp_path)

  assert got == dataclasses.replace(
    config('v1_1'),
    vocab_size=32128,
    emb_dim=8,
    num_heads=4,
    head_dim=3,
    mlp_dim=16,
    num_encoder_layers=2,
    num_decoder_layers=2,
  )
  want = checkpoints.load_t5x_checkpoint(str(tmp_path))['target']
  assert_same({n: tensors.read_all(x) for n, x in opened.items()}, flat(want))


@pytest.mark.parametrize(
  'name, said',
  [
    ('tiny_t5/checkpoint_1', "'target' of its tree is empty"),
    ('tiny_orbax/1', "'target' of its tree is empty"),
    ('mtf_tiny_t5', 'a checkpoint of TensorFlow'),
  ],
)
def test_what_holds_no_t5_in_t5xs_test_data_is_refused(name, said, testdata):
  with pytest.raises(ValueError, match=said):
    t5x.open_folder(testdata / name)
