# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders of encoder-decoders.

A folder holds `config.json` and `model.safetensors`, in one file or in shards
with an index. The weight of a torch Linear is the transpose of a Flax kernel.
The names of a family's tensors and config fields are in a module of their own,
such as `t5_names`.
"""

import collections
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from gkd_jax.checkpoints import checkpoint, mistaken
from gkd_jax.checkpoints.formats import t5_names, t5gemma_names
from gkd_jax.checkpoints.formats import tensors as tensors_lib
from gkd_jax.checkpoints.formats.tensors import Tensor
from gkd_jax.data import tokenizer_files
from gkd_jax.data.tokenizer_files import TokenizerFiles
from gkd_jax.models import registry
from gkd_jax.models.interface import ModelConfig
from gkd_jax.models.params import param_shapes
from gkd_jax.runtime import files

FORMAT = 'Hugging Face'
# Family of models -> module with its names.
_FAMILIES = {'t5': t5_names, 't5gemma': t5gemma_names}
CONFIG = 'config.json'
_GENERATION = 'generation_config.json'
# Files of the tokenizer and of generation settings. An export copies them from
# the folder that the model was loaded from.
SIDE_FILES = (
  'spiece.model',
  'tokenizer.model',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  _GENERATION,
)
# Field of our config -> field of config.json and generation_config.json.
_ID_NAMES = {
  'pad_id': 'pad_token_id',
  'eos_id': 'eos_token_id',
  'start_id': 'decoder_start_token_id',
}
# Fields by which transformers writes other outputs than the model's own
# distribution has.
_CONSTRAINTS = (
  'forced_bos_token_id',
  'forced_decoder_ids',
  'suppress_tokens',
  'begin_suppress_tokens',
  'bad_words_ids',
  'sequence_bias',
)
_WEIGHTS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_WEIGHT_FILES = r'model(-\d+-of-\d+)?\.safetensors'
_MAX_SHARD_BYTES = 5 * 10**9  # the limit that transformers uses
_DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}


def is_checkpoint(folder: epath.Path) -> bool:
  """Whether a folder has the config.json of a Hugging Face model."""
  return (folder / CONFIG).exists()


def is_weights(name: str) -> bool:
  """Whether a file name is one of a folder's weights or their index."""
  return name == _INDEX or re.fullmatch(_WEIGHT_FILES, name) is not None


def open_folder(folder: epath.Path) -> tuple[ModelConfig, dict[str, Tensor]]:
  """Returns the model's shape, and its arrays under our parameters' names.

  Only headers are read.

  Raises:
    ValueError: it is no encoder-decoder of a known family, a file is
      incomplete, or an array does not have the shape that the config implies.
  """
  if str(folder).startswith('gs://'):
    raise ValueError(
      f'{folder}: safetensors files are read from a local disk only. Copy the '
      f'folder first: gcloud storage cp -r {folder} .'
    )
  values = files.read_json(folder / CONFIG)
  if values.get('quantization_config') is not None:
    raise ValueError(
      f'{folder}: {CONFIG} has a quantization_config; gkd_jax reads float32, '
      'float16 and bfloat16 weights. Use the original model, or save it '
      'without quantization: model.dequantize().save_pretrained(NEW_FOLDER).'
    )
  stored = _stored_tensors(folder)
  family = _family_of(folder / CONFIG, values)
  config, names, unused = family.read_layout(
    folder / CONFIG, values, _special_ids(folder, values), stored
  )
  wanted = {name for name, _ in names.values()}
  missing = sorted(wanted - stored.keys())
  unexpected = sorted(stored.keys() - wanted - unused)
  for what, which in (('lacks', missing), ('has, unexpectedly,', unexpected)):
    if which:
      raise ValueError(
        f'{folder}: the model that {CONFIG} describes does not fit the '
        f'weights: the file {what} {len(which)} tensors: {", ".join(which[:5])}'
        + (', ...' if len(which) > 5 else '.')
      )
  tensors = {
    ours: tensors_lib.transposed(stored[name]) if transpose else stored[name]
    for ours, (name, transpose) in names.items()
  }
  checkpoint.check_shapes(
    folder,
    {n: x.shape for n, x in tensors.items()},
    param_shapes(registry.make_model(config)),
  )
  return config, tensors


def model_files(folder: epath.Path) -> list[str]:
  """Returns the names of the files of a model and its tokenizer."""
  weights = [f.name for f in folder.iterdir() if f.suffix == '.safetensors']
  return [CONFIG, _INDEX, *SIDE_FILES, *sorted(weights)]


def _family_of(path: epath.Path, values: Mapping[str, Any]) -> Any:
  """Returns the module with the names of the model in a config.json."""
  kind = files.field(values, 'model_type', str, path, None)
  types = {
    model_type: family
    for family in _FAMILIES.values()
    for model_type in family.MODEL_TYPES
  }
  if kind not in types:
    raise ValueError(
      f'{path} describes a model of type {kind!r}; gkd_jax reads the '
      f'encoder-decoders {", ".join(types)}.'
    )
  return types[kind]


def _special_ids(
  folder: epath.Path, values: Mapping[str, Any]
) -> dict[str, int]:
  """Returns the special ids in a folder's files: {field of our config: id}.

  Args:
    folder: may also have a generation_config.json.
    values: contents of its config.json.

  Raises:
    ValueError: the two files disagree, or a field has several ids; or a file
      constrains the outputs.
  """
  generation = {}
  if (folder / _GENERATION).exists():
    generation = files.read_json(folder / _GENERATION)
  _check_no_constraints(folder, {CONFIG: values, _GENERATION: generation})
  ids = {}
  for ours, theirs in _ID_NAMES.items():
    for file, contents in ((CONFIG, values), (_GENERATION, generation)):
      value = contents.get(theirs)
      if isinstance(value, list) and len(value) == 1:
        (value,) = value
      if value is None:
        continue
      if type(value) is not int:
        raise ValueError(
          f'{folder / file}: {theirs} is {value}; gkd_jax needs one id.'
          + (
            ' Leave the one that ends the targets, EOS of the vocabulary.'
            if ours == 'eos_id'
            else ''
          )
        )
      if ids.setdefault(ours, value) != value:
        raise ValueError(
          f'{folder}: {theirs} is {ids[ours]} in {CONFIG}, but {value} in '
          f'{file}. Correct the one that differs from the tokenizer.'
        )
  return ids


def _check_no_constraints(
  folder: epath.Path, contents: Mapping[str, Mapping[str, Any]]
) -> None:
  """Raises ValueError if a file forces or forbids tokens of the outputs."""
  for file, values in contents.items():
    for name in _CONSTRAINTS:
      value = values.get(name)
      if value is not None and value not in ([], {}):
        raise ValueError(
          f'{folder / file}: {name} is {json.dumps(value)[:60]}: transformers '
          "then writes other outputs than the model's probabilities give. "
          'gkd_jax has no such constraints. To use the model without it, '
          f'remove {name} from the file.'
        )


def vocabulary(tokenizer: TokenizerFiles | None) -> str | None:
  """Returns a folder's tokenizer in the form of `vocabularies.describe`.

  Returns:
    'model sha256 ...', 'ByteVocabulary', 'SentencePieceVocabulary' if the file
    of the SentencePiece model is missing, or `json_vocabulary` if there is
    another model; None without a tokenizer, or with one that
    `vocabularies.check_tokenizer` refuses.
  """
  if tokenizer is None:
    return None
  if tokenizer.kind == tokenizer_files.SENTENCEPIECE:
    if tokenizer.digest is None:
      return 'SentencePieceVocabulary'
    return f'model sha256 {tokenizer.digest}'
  if tokenizer.kind == tokenizer_files.BYTES:
    return 'ByteVocabulary'
  return json_vocabulary(tokenizer)


def json_vocabulary(tokenizer: TokenizerFiles | None) -> str | None:
  """Returns a folder's tokenizer.json as in `vocabularies.describe`."""
  if tokenizer is None or tokenizer.json_digest is None:
    return None
  return f'{tokenizer_files.FAST} sha256 {tokenizer.json_digest}'


def _stored_tensors(folder: epath.Path) -> dict[str, Tensor]:
  """Opens all safetensors files of a folder: {their name: Tensor}."""
  names_of = _names_by_file(folder)
  tensors = {}
  for file, names in names_of.items():
    try:
      opened = safetensors.safe_open(file, framework='numpy')
    except (safetensors.SafetensorError, OSError) as e:
      if pointer := files.explain_pointer(file):
        raise ValueError(pointer) from e
      raise ValueError(
        f'{file} is not a whole safetensors file: {e}. Copy it again.'
      ) from e
    there = set(opened.keys())
    if absent := sorted(set(names or there) - there):
      raise ValueError(
        f'{file} lacks {len(absent)} tensors that {_INDEX} places there, the '
        f'first is {absent[0]}.'
      )
    for name in names or there:
      tensors[name] = _tensor(file, opened.get_slice(name))
  return tensors


def _names_by_file(folder: epath.Path) -> dict[epath.Path, list[str]]:
  """Returns {file: names of its tensors by the index}; [] means all."""
  if (folder / _WEIGHTS).is_file():
    return {folder / _WEIGHTS: []}
  if not (folder / _INDEX).is_file():
    if adapter := mistaken.explain_adapter(folder):
      raise ValueError(adapter)
    others = [
      name
      for name in ('pytorch_model.bin', 'tf_model.h5', 'flax_model.msgpack')
      if (folder / name).exists() or (folder / f'{name}.index.json').exists()
    ]
    raise ValueError(
      f'{folder} has a {CONFIG}, but no {_WEIGHTS}.'
      + (
        f' Its {others[0]} is not read: unpickling a file can run any code in '
        'it. Convert it where you trust it: '
        f"AutoModelForSeq2SeqLM.from_pretrained('{folder}')"
        '.save_pretrained(NEW_FOLDER).'
        if others
        else ''
      )
    )
  index = files.read_json(folder / _INDEX)
  weight_map = files.field(index, 'weight_map', dict, folder / _INDEX, None)
  if not weight_map:
    raise ValueError(f'{folder / _INDEX} has no weight_map. Copy it again.')
  names_of = collections.defaultdict(list)
  for name in weight_map:
    file = files.field(weight_map, name, str, folder / _INDEX)
    names_of[folder / file].append(name)
  for file, names in names_of.items():
    if not file.is_file():
      raise ValueError(
        f'{file} is missing. {_INDEX} places {len(names)} tensors in it, the '
        f'first is {min(names)}.'
      )
  return names_of


def _tensor(file: epath.Path, view: Any) -> Tensor:
  kind = view.get_dtype()
  if kind not in _DTYPES:
    raise ValueError(
      f'{file} holds numbers of type {kind}; gkd_jax reads '
      f'{", ".join(_DTYPES)}.'
    )
  return Tensor(
    tuple(view.get_shape()), _DTYPES[kind], lambda index: view[index]
  )


# --- Writing ------------------------------------------------------------------


def save(
  folder: epath.Path,
  config: ModelConfig,
  params: Mapping[str, Any],
  *,
  dtype: str = 'float32',
  source: epath.Path | None = None,
  max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> str | None:
  """Writes a folder that `transformers` loads.

  Args:
    folder: an existing, empty folder.
    config: the model's shape.
    params: {our name: array}; the arrays of one shard are copied at a time.
    dtype: of the weights, 'float32' or 'bfloat16'.
    source: a folder to copy `SIDE_FILES`, the other fields of config.json and
      tensors that our model does not have (of images) from.
    max_shard_bytes: the maximum size of a file.

  Returns:
    What differs in `transformers` from the model here; None: nothing.
  """
  was, others = {}, {}
  family = _FAMILIES[config.family]
  if source is not None and (source / CONFIG).exists():
    was = files.read_json(source / CONFIG)
    others = _passed_through(source, family)
  ids = {theirs: getattr(config, ours) for ours, theirs in _ID_NAMES.items()}
  values = family.config_to_json(config, was) | ids | {'dtype': dtype}
  _save_weights(
    folder,
    family.tensor_names(config),
    params,
    np.dtype(dtype),
    others,
    max_shard_bytes,
  )
  if source is not None:
    for name in SIDE_FILES:
      if (source / name).exists():
        (source / name).copy(folder / name)
  _write_json(folder / CONFIG, values)
  if not (folder / _GENERATION).exists():
    _write_json(folder / _GENERATION, ids)
  return family.export_note(config, bool(others))


def _passed_through(source: epath.Path, family: Any) -> dict[str, Tensor]:
  """Returns {name: Tensor} of a folder's tensors that our model lacks."""
  if not family.PASSED_THROUGH or not any(
    is_weights(file.name) for file in source.iterdir()
  ):
    return {}
  return {
    name: tensor
    for name, tensor in _stored_tensors(source).items()
    if name.startswith(family.PASSED_THROUGH)
  }


def _save_weights(
  folder: epath.Path,
  names: Mapping[str, tuple[str, bool]],
  params: Mapping[str, Any],
  dtype: np.dtype,
  others: Mapping[str, Tensor],
  max_shard_bytes: int,
) -> None:
  """Writes the safetensors files, and their index if there are several.

  Args:
    folder: to write into.
    names: {our name: (tensor name, whether it is the transpose)}.
    params: {our name: array}.
    dtype: of the parameters in the files.
    others: tensors that are copied as they are.
    max_shard_bytes: the maximum size of a file.
  """
  sizes = {n: params[n].size * dtype.itemsize for n in names}
  sizes |= {n: math.prod(x.shape) * x.dtype.itemsize for n, x in others.items()}
  shards = list(_shards(sizes, max_shard_bytes))
  weight_map, num_params = {}, 0
  for i, of_shard in enumerate(shards):
    file = _WEIGHTS
    if len(shards) > 1:
      file = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    arrays = {}
    for name in of_shard:
      if name in others:
        theirs, array = name, tensors_lib.read_all(others[name])
      else:
        theirs, transpose = names[name]
        array = np.asarray(params[name]).astype(dtype, copy=False)
        array = array.T if transpose else array
      arrays[theirs] = np.ascontiguousarray(array)
      weight_map[theirs] = file
      num_params += array.size
    safetensors.numpy.save_file(arrays, folder / file, {'format': 'pt'})
    del arrays
  if len(shards) > 1:
    index = {
      'metadata': {
        'total_parameters': num_params,
        'total_size': sum(sizes.values()),
      },
      'weight_map': dict(sorted(weight_map.items())),
    }
    _write_json(folder / _INDEX, index)


def tokenizer_file_names(folder: epath.Path) -> list[str]:
  """Returns the names of the tokenizer's files in a folder."""
  return [
    name
    for name in SIDE_FILES
    if name != _GENERATION and (folder / name).exists()
  ]


def write_byte_tokenizer(folder: epath.Path, vocab_size: int) -> None:
  """Writes the tokenizer of a model that reads and writes bytes."""
  num_ids = 3 + 256  # pad, EOS, unknown
  _write_json(
    folder / 'tokenizer_config.json',
    {'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': vocab_size - num_ids},
  )


def _shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
  """Yields the names for each file, up to the limit; at least one a file."""
  shard, used = [], 0
  for name, size in sizes.items():
    if shard and used + size > limit:
      yield shard
      shard, used = [], 0
    shard.append(name)
    used += size
  yield shard


def check_can_hold(config: ModelConfig) -> None:
  """Raises ValueError if transformers cannot represent the model."""
  _FAMILIES[config.family].check_can_hold(config)


def _write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
