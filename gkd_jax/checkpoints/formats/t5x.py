# SPDX-License-Identifier: Apache-2.0
"""T5X checkpoints of T5, T5 1.1, FLAN-T5, mT5, umT5 and ByT5, without t5x.

A checkpoint is a folder `checkpoint_<step>` in one of two forms:

- legacy, the form of all published checkpoints: a flax msgpack file
  `checkpoint`, in which most arrays are replaced by TensorStore specs of zarr
  arrays beside it;
- Orbax, T5X's default today: a folder `state`, whose arrays are zarr arrays
  in one OCDBT store or, in older checkpoints, each in its own folder.

Parameters have the names of one of T5X's two networks. `examples/t5` has our
names. `examples/scalable_t5` stacks the layers of encoder and decoder along an
axis, keeps heads and head dimension as separate axes, and has a relative
position bias in every layer. Only parameters are read, no optimizer state.

Source: T5X, `t5x/checkpoints.py`, `t5x/adafactor.py` and `t5x/examples`.
"""

import collections
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from gkd_jax.checkpoints.formats import tensors as tensors_lib
from gkd_jax.checkpoints.formats.tensors import Tensor
from gkd_jax.models import registry
from gkd_jax.models.interface import ModelConfig
from gkd_jax.models.params import param_shapes
from gkd_jax.runtime import paths

FORMAT = 'T5X'
PREFIX = 'checkpoint'
_FILE = 'checkpoint'  # the msgpack file
_STATE = 'state'  # the folder that Orbax writes
_ORBAX_METADATA = '_METADATA'
_OCDBT = 'manifest.ocdbt'
_PLACEHOLDER = 'PLACEHOLDER://'  # old Orbax: refers to an array in a folder
_VERSION = 3
_STACKS = ('encoder', 'decoder')
_MAX_DIFFERENCES = 5
_CHUNK_BYTES = 64 * 2**20  # T5X's chunk size
# Each chunk of a stacked array holds parts of all layers. Decoded chunks are
# cached until the other layers have been read, up to this size: the largest
# array of a model of 13B parameters.
_CACHE_BYTES = 5 * 10**9
_TABLE = 'relpos_bias/rel_embedding'
_ATTENTION_KERNELS = tuple(
  f'/{part}/kernel' for part in ('query', 'key', 'value', 'out')
)


# --- Reading ------------------------------------------------------------------


def is_checkpoint(folder: os.PathLike | str) -> bool:
  """Whether a folder has the files of one T5X checkpoint, in any form."""
  folder = epath.Path(folder)
  return any(
    file.is_file()
    for file in (
      folder / _FILE,
      folder / _STATE / _FILE,
      folder / _STATE / _ORBAX_METADATA,
    )
  )


def open_folder(
  folder: os.PathLike | str,
) -> tuple[ModelConfig, dict[str, Tensor]]:
  """Returns the model's shape, and its arrays under our parameters' names.

  Only headers are read. Layers that are stacked in one array are adjacent in
  the result: if they are read in that order, each chunk is decoded once.

  A checkpoint has only names and shapes. All other fields of the config are
  those of T5X's own configurations: one `wi` means ('relu',), two mean ('gelu',
  'linear'); without `logits_dense` the embedding is tied and decoder outputs
  are scaled; the maximum distance of the position bias is 128; EOS is 1.

  Args:
    folder: `checkpoint_<step>`, local or gs://.

  Raises:
    ValueError: it is no T5X checkpoint of an encoder-decoder T5, or incomplete.
  """
  folder = epath.Path(folder)
  tensors = _per_layer(_stored(folder))
  config = _config(folder, tensors)
  shapes = param_shapes(registry.make_model(config))
  differences = [
    f'{name}: {_shape(tensors, name)} in the checkpoint, '
    f'{shapes.get(name, "unknown")} in such a T5'
    for name in sorted(shapes.keys() | tensors.keys())
    if name not in tensors or tensors[name].shape != shapes.get(name)
  ]
  if differences:
    raise ValueError(
      f'{folder} is not a T5 that gkd_jax knows. What differs from '
      f"T5X's networks t5 and scalable_t5:\n  {_shortened(differences)}"
    )
  return config, tensors


def _stored(folder: epath.Path) -> dict[str, Tensor]:
  """Opens all parameters of a checkpoint: {T5X's name: Tensor}."""
  arrays, futures = {}, {}
  context = ts.Context({'cache_pool': {'total_bytes_limit': _CACHE_BYTES}})
  for name, leaf in _leaves(folder).items():
    if isinstance(leaf, np.ndarray):
      arrays[name] = tensors_lib.in_memory(_as_bfloat16(leaf))
      continue
    arrays[name] = None  # keeps the order
    futures[name] = ts.open(
      {
        'driver': 'zarr',
        'kvstore': leaf,
        # By default TensorStore reads missing files as zeros.
        'fill_missing_data_reads': False,
        'recheck_cached_data': 'open',
      },
      open=True,
      read=True,
      # Only stacked arrays are read in parts.
      context=context if _is_stacked(name) else None,
    )
  absent = []
  for name, future in futures.items():
    try:
      arrays[name] = _in_store(folder, name, future.result())
    except ValueError as e:
      absent.append(f'{name}: {e}')
  if absent:
    raise ValueError(
      f'{folder} is not whole: {len(absent)} of its {len(arrays)} arrays '
      f'cannot be opened. Copy it again.\n  {_shortened(absent)}'
    )
  return arrays


def _in_store(folder: epath.Path, name: str, store: ts.TensorStore) -> Tensor:
  dtype = np.dtype(store.dtype.numpy_dtype)
  if dtype == np.uint16:
    dtype = np.dtype(ml_dtypes.bfloat16)

  def read(index):
    try:
      return _as_bfloat16(store[index].read().result())
    except ValueError as e:
      raise ValueError(
        f'{folder} is not whole: {name} cannot be read. Copy it again. {e}'
      ) from e

  return Tensor(tuple(store.shape), dtype, read)


def _as_bfloat16(array: np.ndarray) -> np.ndarray:
  """Returns bfloat16 for uint16: version 2 of the legacy form stores it so."""
  return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def _leaves(folder: epath.Path) -> dict[str, np.ndarray | dict[str, Any]]:
  """Returns {T5X's name: the array, or the kvstore spec of its files}."""
  state = folder / _STATE
  if (state / _ORBAX_METADATA).is_file():
    place_of = _orbax_place(state)
    return {
      '/'.join(keys[1:]): place_of('.'.join(keys))
      for keys in _orbax_keys(state / _ORBAX_METADATA)
      if keys[0] == 'target'
    }
  base = state if (state / _FILE).is_file() else folder
  contents = _read_msgpack(base / _FILE)
  # Orbax files have no version; some of them name the key `_optimizer`.
  for key in ('optimizer', '_optimizer'):
    contents = contents.get(key, contents)
  place_of = _orbax_place(base)
  leaves = {}
  for name, leaf in _flat(contents.get('target', {})):
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
      leaf = place_of(leaf.removeprefix(_PLACEHOLDER))
    elif not isinstance(leaf, np.ndarray):
      leaf = _legacy_place(base, name, leaf)
    leaves[name] = leaf
  return leaves


def _orbax_keys(path: epath.Path) -> Iterator[list[str]]:
  """Yields the path of each leaf of Orbax's tree, as a list of keys."""
  try:
    tree = json.loads(path.read_text(encoding='utf-8'))['tree_metadata']
    for leaf in tree.values():
      yield [str(key['key']) for key in leaf['key_metadata']]
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
      f"{path} is not Orbax's description of a tree: {e!r}. Copy it again."
    ) from e


def _read_msgpack(path: epath.Path) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(
      f'{path.parent} is no T5X checkpoint: it has neither a file {_FILE} nor '
      f'a folder {_STATE} that Orbax wrote. Give a folder checkpoint_<step>.'
    )
  data = path.read_bytes()
  if data.startswith(b'model_checkpoint_path'):
    raise ValueError(
      f'{path.parent} is a checkpoint of TensorFlow (of the T5 before T5X). '
      'Convert it with t5x/scripts/convert_tf_checkpoint.py.'
    )
  try:
    contents = flax.serialization.msgpack_restore(data)
  except ValueError as e:
    raise ValueError(
      f'{path} is cut short, or no msgpack file: {e}. Copy it again.'
    ) from e
  if not isinstance(contents, dict):
    raise ValueError(f'{path} is no T5X checkpoint: it holds {type(contents)}.')
  return contents


def _flat(tree: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yields (name, leaf); a leaf is an array, a spec or a placeholder."""
  if isinstance(tree, dict) and 'kvstore' not in tree:
    for key, value in tree.items():
      yield from _flat(value, f'{prefix}/{key}' if prefix else key)
  elif tree is not None:
    yield prefix, tree


def _legacy_place(base: epath.Path, name: str, spec: Any) -> dict[str, Any]:
  """Returns the kvstore spec of an array, given the spec in the msgpack file.

  The driver in the file is that of the machine that wrote it, so it is
  replaced. The path is relative. Before TensorStore 0.1.14 it was beside
  'kvstore', not in it.
  """
  if isinstance(spec, dict) and spec.get('driver') == 'zarr':
    for place in (spec['kvstore'], spec):
      if isinstance(place, dict) and 'path' in place:
        return _files(base, place['path'])
  raise ValueError(
    f'{base / _FILE}: {name} is neither an array nor the TensorStore spec of '
    f'a zarr array: {str(spec)[:200]}'
  )


def _orbax_place(base: epath.Path) -> Callable[[str], dict[str, Any]]:
  """Returns a function: name of an array -> kvstore spec of its files."""
  if (base / _OCDBT).is_file():
    store = {'driver': 'ocdbt', 'base': _files(base, '')}
    return lambda name: store | {'path': name}
  return lambda name: _files(base, name)


def _files(base: epath.Path, path: str) -> dict[str, Any]:
  """Returns the kvstore spec of a path in a folder, local or gs://."""
  folder = os.fspath(base)
  if folder.startswith('gs://'):
    bucket, _, folder = folder.removeprefix('gs://').partition('/')
    return {
      'driver': 'gcs',
      'bucket': bucket,
      'path': f'{folder}/{path}'.lstrip('/'),
    }
  folder = paths.for_libraries(os.path.abspath(folder))
  return {'driver': 'file', 'path': f'{folder}/{path}'}


# --- Names and shapes ---------------------------------------------------------


def _is_stacked(name: str) -> bool:
  stack, _, rest = name.partition('/')
  return stack in _STACKS and rest.startswith(f'{stack}/')


def _per_layer(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """Splits stacked arrays by layer, and joins heads and head dimension."""
  tensors = {}
  axis_of = {stack: _scan_axis(stored, stack) for stack in _STACKS}
  for name, tensor in stored.items():
    if not _is_stacked(name):
      tensors[name] = _joined(name, tensor)
      continue
    stack, _, of_layer = name.split('/', 2)
    axis = axis_of[stack]
    for i in range(_length(tensor, axis)):
      ours = f'{stack}/layers_{i}/{of_layer}'
      tensors[ours] = _joined(ours, tensors_lib.entry(tensor, axis, i))
  return tensors


def _scan_axis(stored: Mapping[str, Tensor], stack: str) -> int:
  """Returns the axis of the layers, which has the same length in all arrays.

  It is 1, T5X's default, or 0: the scale of a norm has only these two axes.
  """
  stacked = [
    tensor
    for name, tensor in stored.items()
    if name.startswith(f'{stack}/{stack}/')
  ]
  for axis in (1, 0):
    if len({_length(tensor, axis) for tensor in stacked}) == 1:
      return axis
  return 1


def _length(tensor: Tensor, axis: int) -> int:
  return tensor.shape[axis] if axis < len(tensor.shape) else 0


def _joined(name: str, tensor: Tensor) -> Tensor:
  """Joins the axes of heads and head dimension, which scalable_t5 separates.

  They are the last two axes of query, key and value, and the first two of out.
  A slice of the joined axis reads only the heads that it overlaps.
  """
  if len(tensor.shape) != 3 or not name.endswith(_ATTENTION_KERNELS):
    return tensor
  at = 0 if name.endswith('/out/kernel') else 1
  heads, head_dim = tensor.shape[at : at + 2]

  def read(index):
    start, stop = index[at].start, index[at].stop
    first = start // head_dim
    whole_heads = (slice(first, -(-stop // head_dim)), slice(0, head_dim))
    part = tensor.read((*index[:at], *whole_heads, *index[at + 1 :]))
    part = part.reshape(*part.shape[:at], -1, *part.shape[at + 2 :])
    start, stop = start - first * head_dim, stop - first * head_dim
    return part[start:stop] if at == 0 else part[:, start:stop]

  shape = (*tensor.shape[:at], heads * head_dim, *tensor.shape[at + 2 :])
  return Tensor(shape, tensor.dtype, read)


def _config(folder: epath.Path, tensors: Mapping[str, Tensor]) -> ModelConfig:
  """Returns the config that the shapes of the parameters imply."""
  if not tensors:
    raise ValueError(
      f"{folder} holds no parameters: the 'target' of its tree is empty."
    )
  if not any(name.startswith('encoder/') for name in tensors):
    raise ValueError(
      f'{folder} holds a decoder-only model, or no T5: no parameter is one of '
      f'encoder/. gkd_jax needs an encoder-decoder. It has '
      f'{_shortened(sorted(tensors), ", ")}.'
    )
  per_layer = f'encoder/layers_0/{_TABLE}' in tensors
  table = f'encoder/layers_0/{_TABLE}' if per_layer else f'encoder/{_TABLE}'
  sizes = {}
  for name, rank in (
    ('token_embedder/embedding', 2),
    (table, 2),
    ('encoder/layers_0/attention/query/kernel', 2),
    ('encoder/layers_0/mlp/wo/kernel', 2),
  ):
    if name not in tensors or len(tensors[name].shape) != rank:
      raise ValueError(
        f'{folder} is not a T5 that gkd_jax knows: {name} should have {rank} '
        f'axes, but is {_shape(tensors, name)}. It has '
        f'{_shortened(sorted(tensors), ", ")}.'
      )
    sizes[name.split('/')[-2]] = tensors[name].shape
  num_heads, relpos_buckets = sizes['relpos_bias']
  gates = sum(
    f'encoder/layers_0/mlp/wi_{i}/kernel' in tensors for i in range(2)
  )
  return registry.make_config(
    't5',
    vocab_size=sizes['token_embedder'][0],
    emb_dim=sizes['token_embedder'][1],
    num_heads=num_heads,
    head_dim=sizes['query'][1] // num_heads,
    mlp_dim=sizes['wo'][0],
    num_encoder_layers=_num_layers(tensors, 'encoder'),
    num_decoder_layers=_num_layers(tensors, 'decoder'),
    mlp_activations=('gelu', 'linear') if gates else ('relu',),
    logits_via_embedding='decoder/logits_dense/kernel' not in tensors,
    relpos_buckets=relpos_buckets,
    relpos_bias_per_layer=per_layer,
  )


def _num_layers(tensors: Mapping[str, Tensor], stack: str) -> int:
  prefix = f'{stack}/layers_'
  return len(
    {name.split('/')[1] for name in tensors if name.startswith(prefix)}
  )


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
  return str(tensors[name].shape) if name in tensors else 'absent'


def _shortened(lines: list[str], separator: str = '\n  ') -> str:
  shown = lines[:_MAX_DIFFERENCES]
  if len(lines) > len(shown):
    shown = [*shown, f'and {len(lines) - len(shown)} more']
  return separator.join(shown)


# --- Writing ------------------------------------------------------------------

# How Adafactor factors each axis of a stacked parameter: R rows, C columns, L
# layers, which are factored separately. Source: T5X,
# `adafactor.standard_logical_factor_rules`.
_STACKED_AXES = {
  'query/kernel': 'RLCC',
  'key/kernel': 'RLCC',
  'value/kernel': 'RLCC',
  'out/kernel': 'CLCR',
  'wi/kernel': 'RLC',
  'wi_0/kernel': 'RLC',
  'wi_1/kernel': 'RLC',
  'wo/kernel': 'CLR',
}


def save(
  folder: os.PathLike | str,
  config: ModelConfig,
  params: Mapping[str, Any],
  *,
  step: int = 0,
  dtype: str = 'float32',
) -> epath.Path:
  """Writes a checkpoint in the legacy form, which every T5X restores.

  A model with a position bias in every layer is written with the names and
  shapes of scalable_t5 with stacked layers, any other with those of
  examples/t5.

  T5X restores it for inference, and for training with Adafactor. The state of
  Adafactor in the checkpoint is all zeros.

  Args:
    folder: where `checkpoint_<step>` is created; it is renamed to this name
      when it is complete.
    config: the model's shape.
    params: {our name: array}; they are copied one at a time.
    step: the step at which T5X continues; its TRAIN_STEPS counts from 0.
    dtype: of the parameters, 'float32' or 'bfloat16'.

  Returns:
    The new folder.

  Raises:
    ValueError: the checkpoint exists, T5X's networks cannot represent the
      model, or the parameters do not match the config.
  """
  final = epath.Path(folder) / f'{PREFIX}_{step}'
  if final.exists():
    raise ValueError(f'{final} is there already. Give another folder or step.')
  check_can_hold(config)
  _check_params(config, params)
  unfinished = final.parent / f'{final.name}.tmp-gkd_jax'
  if unfinished.exists():
    unfinished.rmtree()
  unfinished.mkdir(parents=True)
  target, states = {}, {}
  for name, shape, parts in _arrays_to_write(config, params):
    target[name] = _write_array(unfinished, name, shape, parts, dtype)
    states[name] = _adafactor_zeros(name, shape)
  contents = {
    'version': _VERSION,
    'optimizer': {
      'state': {
        'step': np.asarray(step, np.int32),
        'param_states': flax.traverse_util.unflatten_dict(states, sep='/'),
      },
      'target': flax.traverse_util.unflatten_dict(target, sep='/'),
    },
  }
  (unfinished / _FILE).write_bytes(
    flax.serialization.msgpack_serialize(contents)
  )
  return unfinished.rename(final)


def check_can_hold(config: ModelConfig) -> None:
  """Raises ValueError if T5X's networks cannot represent the model."""
  if config.family != 't5':
    raise ValueError(
      f'T5X has T5 alone; this model is {config.describe()}. Export it with '
      "EXPORT_FORMAT='huggingface'."
    )
  if config.mlp_activations not in (('relu',), ('gelu', 'linear')):
    raise ValueError(
      'A T5X checkpoint does not say its activations, and its readers take a '
      f'gate to be GELU; this model has {config.mlp_activations}. Export it in '
      'another format.'
    )
  for field, theirs in (
    ('scale_decoder_outputs', None),
    ('relpos_buckets', 32),
    ('relpos_max_distance', 128),
    ('pad_id', 0),
    ('start_id', 0),
  ):
    if (ours := getattr(config, field)) != theirs:
      raise ValueError(
        f"T5X's networks cannot hold this model: its {field} is {ours}, "
        f'theirs is always {theirs}. Export it in another format.'
      )


def _check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
  shapes = param_shapes(registry.make_model(config))
  differences = [
    f'{name}: {params[name].shape if name in params else "absent"}, but the '
    f'config has {shapes.get(name, "no such parameter")}'
    for name in sorted(shapes.keys() | params.keys())
    if name not in params or tuple(params[name].shape) != shapes.get(name)
  ]
  if differences:
    raise ValueError(
      f'These parameters are not those of the config:\n  '
      f'{_shortened(differences)}'
    )


# (T5X's name, shape, [(where to write, array)]).
_ToWrite = tuple[
  str, tuple[int, ...], list[tuple[tuple[slice | int, ...], Any]]
]


def _arrays_to_write(
  config: ModelConfig, params: Mapping[str, Any]
) -> Iterator[_ToWrite]:
  """Yields T5X's arrays; a stacked array has one part per layer."""
  layers = collections.defaultdict(dict)
  for name, shape in param_shapes(registry.make_model(config)).items():
    stack, layer, *of_layer = name.split('/')
    if config.relpos_bias_per_layer and layer.startswith('layers_'):
      i = int(layer.removeprefix('layers_'))
      layers['/'.join((stack, stack, *of_layer))][i] = params[name]
    else:
      yield name, shape, [((...,), params[name])]
  for name, arrays in layers.items():
    shape = _split_heads(config, name, arrays[0].shape)
    parts = [((slice(None), i), arrays[i]) for i in sorted(arrays)]
    yield name, (shape[0], len(arrays), *shape[1:]), parts


def _split_heads(config: ModelConfig, name: str, shape: tuple[int, ...]):
  if not name.endswith(_ATTENTION_KERNELS):
    return shape
  heads = (config.num_heads, config.head_dim)
  if name.endswith('/out/kernel'):
    return (*heads, shape[1])
  return (shape[0], *heads)


def _write_array(folder: epath.Path, name, shape, parts, dtype: str):
  """Writes an array as zarr; returns its spec for the msgpack file."""
  kind = np.dtype(dtype)
  # Each chunk has one layer, so that layers can be written one at a time.
  chunk = _chunk(shape, kind.itemsize, layers_at=1 if len(parts) > 1 else None)
  spec = {
    'driver': 'zarr',
    'dtype': kind.name,
    'metadata': {
      'shape': list(shape),
      'chunks': chunk,
      'compressor': {'id': 'gzip', 'level': 1},
    },
  }
  path = f'target.{name.replace("/", ".")}/'
  store = ts.open(
    spec | {'kvstore': _files(folder, path)}, create=True
  ).result()
  for where, array in parts:
    view = store[where]
    array = np.asarray(array).astype(kind, copy=False).reshape(view.shape)
    view.write(array).result()
  return spec | {'kvstore': {'driver': 'file', 'path': path}}


def _chunk(shape, itemsize: int, layers_at: int | None) -> list[int]:
  """Halves the longest axis until a chunk is at most as large as T5X's."""
  chunk = list(shape)
  if layers_at is not None:
    chunk[layers_at] = 1
  while math.prod(chunk) * itemsize > _CHUNK_BYTES:
    longest = chunk.index(max(chunk))
    chunk[longest] = -(-chunk[longest] // 2)
  return chunk


def _adafactor_zeros(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
  """Returns the state of T5X's Adafactor before the first step.

  Matrices of at least 128 x 128 are factored by rows and columns; the larger
  axis is that of the columns. Stacked kernels of any size are factored by
  `_STACKED_AXES`. All other parameters are not factored.
  """
  unused = np.zeros((1,), np.float32)
  state = dict.fromkeys(('m', 'v', 'v_row', 'v_col'), unused)
  axes = None
  if _is_stacked(name):
    axes = _STACKED_AXES.get('/'.join(name.split('/')[-2:]))
  elif len(shape) == 2 and min(shape) >= 128:
    axes = 'CR' if shape[0] > shape[1] else 'RC'
  if axes is None:
    return state | {'v': np.zeros(shape, np.float32)}
  for key, averaged in (('v_row', 'C'), ('v_col', 'R')):
    kept = [n for n, a in zip(shape, axes, strict=True) if a != averaged]
    state[key] = np.zeros(kept, np.float32)
  return state
