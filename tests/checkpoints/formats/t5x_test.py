# SPDX-License-Identifier: Apache-2.0
"""Reads t5x_fixtures/, which make_t5x_fixtures.py wrote with T5X."""

import dataclasses
import json
import pathlib
import shutil
import tarfile
import tempfile

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from gkd_jax.checkpoints.formats import t5x, tensors
from gkd_jax.models.params import abstract_params
from gkd_jax.models.t5 import T5, T5Config
from gkd_jax.parallel import partitioning
from tests import conftest, tiny
from tests.checkpoints.formats import make_t5x_fixtures as fixtures
from tests.checkpoints.formats.make_t5x_fixtures import STEP, flat, numbers

pytestmark = pytest.mark.slow  # compiles models

V1_1 = T5Config(**fixtures.SHAPE, **fixtures.V1_1)
V1_0 = T5Config(**fixtures.SHAPE, **fixtures.V1_0)
SCANNED = dataclasses.replace(V1_1, relpos_bias_per_layer=True)
CONFIGS = {
  'legacy_v1_1': V1_1,
  'legacy_v1_0': V1_0,
  'legacy_bfloat16': V1_1,
  'legacy_inference': V1_1,
  'scanned': SCANNED,
  'orbax': V1_1,
  'orbax_without_ocdbt': V1_1,
}
UNSCANNED = [name for name in CONFIGS if name != 'scanned']
QUERY = 'encoder/layers_1/attention/query/kernel'
OUT = 'encoder/layers_1/attention/out/kernel'


def unpacked(name: str, folder) -> pathlib.Path:
  with tarfile.open(fixtures.FOLDER / f'{name}.tar.xz') as tar:
    tar.extractall(folder, filter='data')
  return pathlib.Path(folder) / f'checkpoint_{STEP}'


@pytest.fixture(scope='module')
def written_by_t5x(tmp_path_factory):
  """{name: folder}; not to be changed."""
  return {
    name: unpacked(name, tmp_path_factory.mktemp(name)) for name in CONFIGS
  }


def read(folder) -> dict[str, np.ndarray]:
  return {
    name: tensors.read_all(tensor)
    for name, tensor in t5x.open_folder(folder)[1].items()
  }


def params(config, seed: int = 0) -> dict[str, np.ndarray]:
  """Random parameters under their names."""
  return flat(tiny.params(T5(config), seed))


def assert_same(got, want):
  """Asserts that arrays have the same type and the same bits."""
  assert got.keys() == want.keys()
  for name, array in got.items():
    assert array.dtype == want[name].dtype, name
    np.testing.assert_array_equal(array, want[name], err_msg=name)


def contents(folder):
  data = (pathlib.Path(folder) / 'checkpoint').read_bytes()
  return flax.serialization.msgpack_restore(data)


def write_contents(folder, values):
  folder.mkdir(exist_ok=True)
  (folder / 'checkpoint').write_bytes(
    flax.serialization.msgpack_serialize(values)
  )
  return folder


def write_inline(folder, arrays):
  """The legacy form; arrays that T5X does not partition are in the msgpack."""
  tree = {}
  for name, array in arrays.items():
    *path, last = name.split('/')
    node = tree
    for key in path:
      node = node.setdefault(key, {})
    node[last] = array
  return write_contents(folder, {'version': 3, 'optimizer': {'target': tree}})


def map_leaves(change, tree, name=()):
  """Changes the leaves of a msgpack's tree; a spec is a leaf."""
  if isinstance(tree, dict) and 'kvstore' not in tree:
    return {k: map_leaves(change, v, (*name, k)) for k, v in tree.items()}
  return change('.'.join(name), tree)


# --- What T5X has written ---------------------------------------------------


@pytest.mark.parametrize('name', CONFIGS)
def test_what_t5x_wrote_is_recognised(name, written_by_t5x):
  assert t5x.is_checkpoint(written_by_t5x[name])


@pytest.mark.parametrize('name', CONFIGS)
def test_the_config_is_found_in_names_and_shapes(name, written_by_t5x):
  config, _ = t5x.open_folder(written_by_t5x[name])

  assert config == CONFIGS[name]


@pytest.mark.parametrize('name', UNSCANNED)
def test_every_number_that_t5x_wrote_is_read(name, written_by_t5x):
  dtype = ml_dtypes.bfloat16 if name == 'legacy_bfloat16' else np.float32
  shapes = {n: a.shape for n, a in params(CONFIGS[name]).items()}

  got = read(written_by_t5x[name])

  assert_same(got, {n: numbers(n, s).astype(dtype) for n, s in shapes.items()})


def test_every_number_of_stacked_layers_is_read(written_by_t5x):
  c = SCANNED
  heads = (c.num_heads, c.head_dim)
  want = {
    'token_embedder/embedding': numbers('token_embedder/embedding', (24, 8)),
    'decoder/logits_dense/kernel': numbers(
      'decoder/logits_dense/kernel', (8, 24)
    ),
  }
  for stack, depth, blocks in (
    ('encoder', 3, {'': 'attention'}),
    ('decoder', 2, {'self_': 'self_attention', 'cross_': 'encoder_decoder_at'}),
  ):
    norm = f'{stack}/{stack}_norm/scale'
    want[norm] = numbers(norm, (8,))

    def stacked(of_layer, shape, stack=stack, depth=depth):
      whole = numbers(
        f'{stack}/{stack}/{of_layer}', (shape[0], depth, *shape[1:])
      )
      return [whole[:, i] for i in range(depth)]

    of_layers = {
      'relpos_bias/rel_embedding': stacked('relpos_bias/rel_embedding', (2, 32))
    }
    for part in ('wi_0', 'wi_1'):
      name = f'mlp/{part}/kernel'
      of_layers[name] = stacked(name, (8, 10))
    of_layers['mlp/wo/kernel'] = stacked('mlp/wo/kernel', (10, 8))
    for which, block in blocks.items():
      block = block.replace('encoder_decoder_at', 'encoder_decoder_attention')
      name = f'pre_{which}attention_layer_norm/scale'
      of_layers[name] = stacked(name, (8,))
      for part in ('query', 'key', 'value'):
        name = f'{block}/{part}/kernel'
        of_layers[name] = [x.reshape(8, 6) for x in stacked(name, (8, *heads))]
      name = f'{block}/out/kernel'
      of_layers[name] = [x.reshape(6, 8) for x in stacked(name, (*heads, 8))]
    name = 'pre_mlp_layer_norm/scale'
    of_layers[name] = stacked(name, (8,))
    for name, arrays in of_layers.items():
      for i, array in enumerate(arrays):
        want[f'{stack}/layers_{i}/{name}'] = array

  assert_same(read(written_by_t5x['scanned']), want)


def test_arrays_of_stacked_layers_follow_each_other(written_by_t5x):
  # Whoever reads in this order decodes each chunk once.
  names = list(t5x.open_folder(written_by_t5x['scanned'])[1])

  first = names.index('encoder/layers_0/mlp/wo/kernel')
  assert names[first : first + 3] == [
    f'encoder/layers_{i}/mlp/wo/kernel' for i in range(3)
  ]


@pytest.mark.parametrize('driver', ['gfile', 'gcs'])
def test_the_driver_of_the_machine_that_wrote_it_does_not_matter(
  driver, written_by_t5x, tmp_path
):
  folder = unpacked('legacy_v1_1', tmp_path)

  def moved(name, leaf):
    if isinstance(leaf, dict):
      leaf['kvstore']['driver'] = driver
      if driver == 'gcs':
        leaf['kvstore']['bucket'] = 't5x-dummy-bucket'
    return leaf

  write_contents(folder, map_leaves(moved, contents(folder)))

  assert_same(read(folder), read(written_by_t5x['legacy_v1_1']))


def test_a_path_beside_kvstore_is_one_of_an_old_tensorstore(
  written_by_t5x, tmp_path
):
  folder = unpacked('legacy_v1_1', tmp_path)

  def aged(name, leaf):
    if isinstance(leaf, dict):
      leaf['path'] = leaf['kvstore'].pop('path').rstrip('/')
    return leaf

  write_contents(folder, map_leaves(aged, contents(folder)))

  assert_same(read(folder), read(written_by_t5x['legacy_v1_1']))


def test_version_2_has_bfloat16_as_uint16(written_by_t5x, tmp_path):
  folder = unpacked('legacy_bfloat16', tmp_path)
  want = read(folder)

  def aged(name, leaf):
    if not name.startswith('optimizer.target.'):
      return leaf
    place = {
      'driver': 'file',
      'path': str(folder / leaf['kvstore']['path']),
    }
    spec = {'driver': 'zarr', 'kvstore': place}
    bits = ts.open(spec).result().read().result().view(np.uint16)
    leaf['dtype'] = 'uint16'
    ts.open(
      leaf | {'kvstore': place}, create=True, delete_existing=True
    ).result().write(bits).result()
    return leaf

  aged_contents = map_leaves(aged, contents(folder))
  write_contents(folder, aged_contents | {'version': 2})

  assert_same(read(folder), want)
  dtypes = {tensor.dtype for tensor in t5x.open_folder(folder)[1].values()}
  assert dtypes == {np.dtype(ml_dtypes.bfloat16)}


def test_arrays_in_the_msgpack_are_read(written_by_t5x, tmp_path):
  want = read(written_by_t5x['legacy_v1_1'])

  assert_same(read(write_inline(tmp_path / 'checkpoint_1', want)), want)


@pytest.mark.parametrize('place', ['.', 'state'])
def test_an_old_orbax_tree_is_a_msgpack_with_placeholders(
  place, written_by_t5x, tmp_path
):
  old = tmp_path / 'checkpoint_7'
  shutil.copytree(written_by_t5x['orbax_without_ocdbt'] / 'state', old / place)
  (old / place / '_METADATA').unlink()
  tree = contents(written_by_t5x['legacy_v1_1'])['optimizer']

  def placeholder(name, leaf):
    return f'PLACEHOLDER://{name}'

  write_contents(old / place, map_leaves(placeholder, tree))

  assert t5x.is_checkpoint(old)
  assert_same(read(old), read(written_by_t5x['legacy_v1_1']))


def test_layers_that_are_stacked_along_the_first_axis_are_found(
  written_by_t5x, tmp_path
):
  want = read(written_by_t5x['scanned'])
  stored = {
    name: np.array(tensors.read_all(tensor))
    for name, tensor in t5x._stored(written_by_t5x['scanned']).items()
  }
  first = {
    name: np.moveaxis(a, 1, 0)
    if name.split('/')[0] == name.split('/')[1]
    else a
    for name, a in stored.items()
  }

  assert_same(read(write_inline(tmp_path / 'checkpoint_1', first)), want)


def test_layers_of_scalable_t5_need_not_be_stacked(written_by_t5x, tmp_path):
  want = read(written_by_t5x['scanned'])

  def apart(name, a):
    if name.endswith('/out/kernel'):
      return a.reshape(2, 3, 8)
    if name.endswith(('/query/kernel', '/key/kernel', '/value/kernel')):
      return a.reshape(8, 2, 3)
    return a

  stored = {name: apart(name, a) for name, a in want.items()}
  folder = write_inline(tmp_path / 'checkpoint_1', stored)

  assert t5x.open_folder(folder)[0] == SCANNED
  assert_same(read(folder), want)


def test_a_bucket_is_read_from_where_the_folder_is():
  # Without the network this is as far as it goes.
  assert t5x._files('gs://mine/runs/checkpoint_7', 'target.x/') == {
    'driver': 'gcs',
    'bucket': 'mine',
    'path': 'runs/checkpoint_7/target.x/',
  }


def test_a_relative_folder_stays_where_it_was_opened(
  written_by_t5x, tmp_path, monkeypatch
):
  folder = written_by_t5x['orbax_without_ocdbt']
  monkeypatch.chdir(folder.parent)
  _, opened = t5x.open_folder(folder.name)
  monkeypatch.chdir(tmp_path)

  got = {name: tensors.read_all(tensor) for name, tensor in opened.items()}

  assert_same(got, read(folder))


def test_a_run_of_ours_is_not_taken_for_one_of_t5x(tmp_path):
  conftest.save_model(tmp_path, tiny.config())

  assert not t5x.is_checkpoint(tmp_path / 'checkpoint_0')
  assert not t5x.is_checkpoint(tmp_path)
  assert not t5x.is_checkpoint(tmp_path / 'nowhere')


# --- Reading parts ----------------------------------------------------------


@pytest.mark.parametrize('config', [V1_1, SCANNED], ids=['t5', 'scalable_t5'])
def test_any_part_is_what_the_whole_has_there(config, tmp_path):
  folder = t5x.save(tmp_path, config, params(config))
  _, opened = t5x.open_folder(folder)

  for name in (QUERY, OUT):
    whole = tensors.read_all(opened[name])
    for rows in (slice(0, 1), slice(2, 5), slice(3, 6)):
      for columns in (slice(0, 6), slice(1, 3), slice(4, 5)):
        np.testing.assert_array_equal(
          opened[name].read((rows, columns)), whole[rows, columns]
        )


def chunk_files(folder, of):
  stack, layer, *rest = of.split('/')
  for array in (of, '/'.join((stack, stack, *rest))):
    if (path := folder / f'target.{array.replace("/", ".")}').is_dir():
      return path
  raise AssertionError(f'{folder} has no array of {of}')


def test_a_part_reads_only_the_chunks_that_it_touches(tmp_path, monkeypatch):
  monkeypatch.setattr(t5x, '_CHUNK_BYTES', 48)  # [8, 6] becomes four [4, 3]
  want = params(V1_1)
  folder = t5x.save(tmp_path, V1_1, want)
  query = t5x.open_folder(folder)[1][QUERY]
  (chunk_files(folder, QUERY) / '1.1').unlink()

  np.testing.assert_array_equal(
    query.read((slice(0, 4), slice(0, 6))), want[QUERY][:4]
  )
  np.testing.assert_array_equal(
    query.read((slice(4, 8), slice(0, 3))), want[QUERY][4:, :3]
  )
  with pytest.raises(ValueError, match='1.1" is missing'):
    query.read((slice(4, 8), slice(3, 6)))


def test_a_layer_reads_only_the_chunks_of_its_own(tmp_path):
  want = params(SCANNED)
  folder = t5x.save(tmp_path, SCANNED, want)
  _, opened = t5x.open_folder(folder)
  (chunk_files(folder, QUERY) / '0.1.0.0').unlink()

  for layer in ('layers_0', 'layers_2'):
    name = QUERY.replace('layers_1', layer)
    np.testing.assert_array_equal(tensors.read_all(opened[name]), want[name])
  with pytest.raises(ValueError, match='0.1.0.0" is missing'):
    tensors.read_all(opened[QUERY])


def test_a_part_reads_only_the_heads_that_it_touches():
  heads_DHK = np.arange(8 * 4 * 3).reshape(8, 4, 3)
  asked = []

  def read_part(index):
    asked.append(index[1])
    return heads_DHK[index]

  query = t5x._joined(
    QUERY, tensors.Tensor(heads_DHK.shape, heads_DHK.dtype, read_part)
  )

  query.read((slice(0, 8), slice(3, 6)))
  query.read((slice(0, 8), slice(5, 10)))

  assert asked == [slice(1, 2), slice(1, 4)]


def placed_on_four_devices():
  """Returns the shard of each device, and the slices that were read for it."""
  with tempfile.TemporaryDirectory() as folder:
    config, opened = t5x.open_folder(unpacked('scanned', folder))
    asked = {QUERY: [], OUT: []}

    def recorded(name):
      def read_part(index):
        asked[name].append(index)
        return opened[name].read(index)

      return opened[name]._replace(read=read_part)

    mesh = partitioning.make_mesh(2, 2, devices=jax.devices()[:4])
    placed = tensors.place(
      opened | {name: recorded(name) for name in asked},
      abstract_params(T5(config, partitioning.Placement(mesh))),
    )
    attention = placed['encoder']['layers_1']['attention']
    held = {
      name: [
        (shard.index, np.asarray(shard.data))
        for shard in attention[part]['kernel'].addressable_shards
      ]
      for name, part in ((QUERY, 'query'), (OUT, 'out'))
    }
    return asked, held


def test_each_device_reads_its_part_alone(written_by_t5x):
  asked, held = tiny.on_simulated_devices(
    8, __name__, placed_on_four_devices.__name__
  )

  whole = read(written_by_t5x['scanned'])
  assert {(i.start, i.stop) for _, i in asked[QUERY]} == {(0, 3), (3, 6)}
  assert {(i.start, i.stop) for i, _ in asked[OUT]} == {(0, 3), (3, 6)}
  assert len(held[QUERY]) == len(held[OUT]) == 4
  for name, shards in held.items():
    for index, data in shards:
      np.testing.assert_array_equal(data, whole[name][index])


# --- Writing ----------------------------------------------------------------


@pytest.mark.parametrize(
  'name', ['legacy_v1_1', 'legacy_v1_0', 'legacy_bfloat16', 'scanned']
)
def test_what_is_read_and_written_again_is_what_t5x_wrote(
  name, written_by_t5x, tmp_path
):
  folder = written_by_t5x[name]
  dtype = 'bfloat16' if name == 'legacy_bfloat16' else 'float32'

  again = t5x.save(
    tmp_path, CONFIGS[name], read(folder), step=STEP, dtype=dtype
  )

  got, want = t5x._stored(again), t5x._stored(folder)
  assert_same(
    {name: tensors.read_all(tensor) for name, tensor in got.items()},
    {name: tensors.read_all(tensor) for name, tensor in want.items()},
  )


@pytest.mark.parametrize('name', ['legacy_v1_1', 'legacy_v1_0', 'scanned'])
def test_the_optimizer_starts_afresh_in_the_shapes_of_t5x(
  name, written_by_t5x, tmp_path
):
  folder = written_by_t5x[name]

  again = t5x.save(tmp_path, CONFIGS[name], read(folder), step=STEP)

  got, want = (contents(f)['optimizer']['state'] for f in (again, folder))
  assert got['step'] == want['step'] == STEP

  def shape(_, leaf):
    if isinstance(leaf, dict):
      return tuple(leaf['metadata']['shape']), leaf['dtype']
    return leaf.shape, leaf.dtype.name

  assert map_leaves(shape, got) == map_leaves(shape, want)
  assert all(not leaf.any() for leaf in jax.tree.leaves(got['param_states']))


@pytest.mark.parametrize(
  'shape, v_row, v_col, v',
  [
    ((128, 256), (128,), (256,), (1,)),
    ((256, 128), (128,), (256,), (1,)),
    ((128, 128), (128,), (128,), (1,)),
    ((127, 256), (1,), (1,), (127, 256)),
    ((256,), (1,), (1,), (256,)),
  ],
)
def test_large_matrices_have_a_factored_state(shape, v_row, v_col, v):
  # t5x/adafactor.py, _factored_dims; t5x_live_test.py compares with it.
  state = t5x._adafactor_zeros('decoder/logits_dense/kernel', shape)

  assert {key: array.shape for key, array in state.items()} == {
    'v_row': v_row,
    'v_col': v_col,
    'v': v,
    'm': (1,),
  }


def test_the_tree_is_that_of_t5x(written_by_t5x, tmp_path):
  folder = written_by_t5x['legacy_v1_1']

  again = t5x.save(tmp_path, V1_1, read(folder), step=STEP)

  def spec(name, leaf):
    return (leaf['driver'], leaf['dtype'], leaf['kvstore'], leaf['metadata'])

  got, want = contents(again), contents(folder)
  assert got['version'] == want['version'] == 3
  assert map_leaves(spec, got['optimizer']['target']) == map_leaves(
    spec, want['optimizer']['target']
  )


def test_a_moved_checkpoint_is_still_whole(tmp_path):
  want = params(V1_1)
  folder = t5x.save(tmp_path / 'here', V1_1, want)

  shutil.move(folder, tmp_path / 'my_teacher')

  assert_same(read(tmp_path / 'my_teacher'), want)


@pytest.mark.parametrize('config', [V1_0, V1_1, SCANNED], ids=str)
def test_parameters_come_back_as_they_were(config, tmp_path):
  want = params(config)

  folder = t5x.save(tmp_path, config, want, step=12)

  assert folder.name == 'checkpoint_12'
  assert t5x.is_checkpoint(folder)
  assert t5x.open_folder(folder)[0] == config
  assert_same(read(folder), want)


def test_parameters_on_devices_are_written(tmp_path):
  want = params(V1_1)
  on_device = {name: jax.numpy.asarray(a) for name, a in want.items()}

  assert_same(read(t5x.save(tmp_path, V1_1, on_device)), want)


def test_large_arrays_are_cut_into_chunks(tmp_path, monkeypatch):
  monkeypatch.setattr(t5x, '_CHUNK_BYTES', 48)
  want = params(SCANNED)

  folder = t5x.save(tmp_path, SCANNED, want)

  zarray = json.loads((chunk_files(folder, QUERY) / '.zarray').read_text())
  assert zarray['chunks'] == [2, 1, 2, 3]
  assert_same(read(folder), want)


def test_nothing_of_an_attempt_that_failed_is_left_or_taken(tmp_path):
  old = tmp_path / 'checkpoint_0.tmp-gkd_jax'
  (old / 'target.encoder').mkdir(parents=True)

  t5x.save(tmp_path, V1_1, params(V1_1))

  assert [path.name for path in tmp_path.iterdir()] == ['checkpoint_0']
  assert not (tmp_path / 'checkpoint_0' / 'target.encoder').exists()


def test_a_checkpoint_that_is_there_is_not_written_over(tmp_path):
  t5x.save(tmp_path, V1_1, params(V1_1))

  with pytest.raises(ValueError, match='checkpoint_0 is there already'):
    t5x.save(tmp_path, V1_1, params(V1_1, seed=1))


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'scale_decoder_outputs': True}, 'scale_decoder_outputs is True'),
    ({'relpos_buckets': 16}, 'relpos_buckets is 16, theirs is always 32'),
    ({'relpos_max_distance': 64}, 'relpos_max_distance is 64'),
  ],
)
def test_a_model_that_t5x_has_no_network_for_is_refused(
  changes, said, tmp_path
):
  config = dataclasses.replace(V1_1, **changes)

  with pytest.raises(ValueError, match=said):
    t5x.save(tmp_path, config, params(config))

  assert list(tmp_path.iterdir()) == []


def test_parameters_of_another_config_are_refused(tmp_path):
  with pytest.raises(ValueError, match='not those of the config') as error:
    t5x.save(tmp_path, dataclasses.replace(V1_1, mlp_dim=11), params(V1_1))

  assert str(error.value).splitlines()[1] == (
    '  decoder/layers_0/mlp/wi_0/kernel: (8, 10), but the config has (8, 11)'
  )
  assert str(error.value).splitlines()[-1] == '  and 10 more'


# --- What is not read -------------------------------------------------------


def refused(folder) -> str:
  with pytest.raises(ValueError) as error:
    t5x.open_folder(folder)
  assert str(folder) in str(error.value)
  return str(error.value)


def test_a_folder_of_something_else_is_refused(tmp_path):
  assert 'has neither a file checkpoint nor a folder state' in refused(tmp_path)


def test_a_msgpack_that_is_cut_short_is_refused(tmp_path):
  folder = unpacked('legacy_v1_1', tmp_path)
  data = (folder / 'checkpoint').read_bytes()
  (folder / 'checkpoint').write_bytes(data[: len(data) // 2])

  assert 'checkpoint is cut short, or no msgpack' in refused(folder)


@pytest.mark.parametrize('data', [b'', b'hello', b'\x05'], ids=repr)
def test_a_file_that_is_no_msgpack_of_a_tree_is_refused(data, tmp_path):
  (tmp_path / 'checkpoint').write_bytes(data)

  assert 'checkpoint is' in refused(tmp_path)


def test_a_checkpoint_of_tensorflow_is_refused_with_the_way_out(tmp_path):
  (tmp_path / 'checkpoint').write_text('model_checkpoint_path: "model.ckpt-0"')

  assert 'Convert it with t5x/scripts/convert_tf_' in refused(tmp_path)


def test_descriptions_that_are_cut_short_are_refused(tmp_path):
  folder = unpacked('orbax', tmp_path)
  text = (folder / 'state' / '_METADATA').read_text()
  (folder / 'state' / '_METADATA').write_text(text[: len(text) // 2])

  assert "_METADATA is not Orbax's description" in refused(folder)


@pytest.mark.parametrize('name', ['legacy_v1_1', 'orbax_without_ocdbt'])
def test_missing_arrays_are_named(name, tmp_path):
  folder = unpacked(name, tmp_path)
  base = folder / 'state' if 'orbax' in name else folder
  for array in ('target.decoder.decoder_norm.scale', f'target.{QUERY}'):
    shutil.rmtree(base / array.replace('/', '.'))

  message = refused(folder)

  assert 'is not whole: 2 of its 61 arrays cannot be opened' in message
  assert 'decoder/decoder_norm/scale: NOT_FOUND' in message
  assert f'{QUERY}: NOT_FOUND' in message


def test_a_missing_part_of_the_store_is_an_error(tmp_path):
  folder = unpacked('orbax', tmp_path)
  shutil.rmtree(folder / 'state' / 'd')

  assert 'is not whole: 61 of its 61 arrays' in refused(folder)


def test_a_missing_chunk_is_not_read_as_zeros(tmp_path):
  folder = unpacked('legacy_v1_1', tmp_path)
  (folder / 'target.decoder.decoder_norm.scale' / '0').unlink()

  with pytest.raises(ValueError, match='decoder_norm/scale cannot be read'):
    read(folder)


def test_a_checkpoint_without_parameters_is_refused(tmp_path):
  assert "'target' of its tree is empty" in refused(write_inline(tmp_path, {}))


def test_a_decoder_only_model_is_refused(tmp_path):
  arrays = {n: a for n, a in params(V1_1).items() if n.startswith('decoder')}

  message = refused(write_inline(tmp_path, arrays))

  assert 'decoder-only model' in message
  assert 'decoder/decoder_norm/scale' in message


def test_an_embedding_that_is_absent_is_named(tmp_path):
  arrays = params(V1_1)
  del arrays['token_embedder/embedding']

  assert (
    'token_embedder/embedding should have 2 axes, but is absent'
    in refused(write_inline(tmp_path, arrays))
  )


def test_parameters_that_no_t5_has_are_named(tmp_path):
  arrays = params(V1_1)
  for i in range(2):
    arrays[f'decoder/layers_{i}/adapter/kernel'] = np.zeros((8, 4), np.float32)

  assert refused(write_inline(tmp_path, arrays)).splitlines()[1:] == [
    f'  decoder/layers_{i}/adapter/kernel: (8, 4) in the checkpoint, unknown '
    'in such a T5'
    for i in range(2)
  ]


def test_parameters_that_are_absent_or_of_other_shapes_are_named(tmp_path):
  arrays = params(V1_1)
  del arrays['decoder/layers_1/mlp/wo/kernel']
  arrays[OUT] = arrays[OUT].T

  assert refused(write_inline(tmp_path, arrays)).splitlines()[1:] == [
    '  decoder/layers_1/mlp/wo/kernel: absent in the checkpoint, (10, 8) in '
    'such a T5',
    f'  {OUT}: (8, 6) in the checkpoint, (6, 8) in such a T5',
  ]


def test_a_spec_of_something_else_is_refused(tmp_path):
  folder = unpacked('legacy_v1_1', tmp_path)

  def other(name, leaf):
    if name.endswith('decoder_norm.scale'):
      leaf['driver'] = 'n5'
    return leaf

  write_contents(folder, map_leaves(other, contents(folder)))

  assert 'decoder/decoder_norm/scale is neither an array nor' in refused(folder)
