# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders of T5, FLAN-T5, mT5, umT5 and ByT5.

`config.json` beside `model.safetensors`, in one file or in shards with an
index. A torch Linear holds the transpose of a Flax kernel.

Source: transformers, `models/t5`, `models/mt5` and `models/umt5`.
"""

import collections
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from gkd_jax.checkpoints import checkpoint
from gkd_jax.checkpoints.formats import tensors as tensors_lib
from gkd_jax.checkpoints.formats.tensors import Tensor
from gkd_jax.models.t5 import T5Config, param_shapes

FORMAT = 'Hugging Face'
CONFIG = 'config.json'
_GENERATION = 'generation_config.json'
# What says how text becomes ids and how outputs are generated. It goes with a
# model from where it was loaded to where it is exported.
SIDE_FILES = (
  'spiece.model',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  _GENERATION,
)
_WEIGHTS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_MAX_SHARD_BYTES = 5 * 10**9  # the limit that transformers uses
# Fields of config.json that do not say what the model is. (All others are
# written anew; transformers lets some contradict each other.)
_KEPT_FIELDS = ('task_specific_params', 'tokenizer_class', 'n_positions')
_MODEL_TYPES = ('t5', 'mt5', 'umt5')
# feed_forward_proj -> our activations. Its gelu is the tanh form when gated.
_ACTIVATIONS = {
  'relu': ('relu',),
  'gated-relu': ('relu', 'linear'),
  'gated-gelu': ('gelu', 'linear'),
  'gated-silu': ('silu', 'linear'),
}
_DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}
# All are one matrix; a file may hold any of them, or several.
_EMBEDDINGS = (
  'shared.weight',
  'encoder.embed_tokens.weight',
  'decoder.embed_tokens.weight',
)
_HEAD = 'lm_head.weight'
# T5 1.0's files have a table that no model uses.
_UNUSED = (
  'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
)


# --- Reading ------------------------------------------------------------------


def is_checkpoint(folder: epath.Path) -> bool:
  """Whether a folder looks like one of Hugging Face's."""
  return (folder / CONFIG).exists()


def open_folder(folder: epath.Path) -> tuple[T5Config, dict[str, Tensor]]:
  """Returns the model's shape, and its arrays under our parameters' names.

  Only headers are read.

  Raises:
    ValueError: it is no encoder-decoder T5, its files are not whole, or its
      arrays have other shapes than it says.
  """
  if str(folder).startswith('gs://'):
    raise ValueError(
      f'{folder}: safetensors files are read from a local disk only. Copy the '
      f'folder first: gcloud storage cp -r {folder} .'
    )
  values = _read_json(folder / CONFIG)
  stored = _stored_tensors(folder)
  embedding = next((name for name in _EMBEDDINGS if name in stored), None)
  if embedding is None:
    embedding = _HEAD if _HEAD in stored else _EMBEDDINGS[0]
  tie = values.get('tie_word_embeddings', True) is not False
  tied = tie and (
    _HEAD not in stored
    or embedding == _HEAD
    or _equal(stored[_HEAD], stored[embedding])
  )
  config = _config(folder / CONFIG, values, tied=tied)
  names = _names(config) | {'token_embedder/embedding': (embedding, False)}
  wanted = {name for name, _ in names.values()}
  missing = sorted(wanted - stored.keys())
  unexpected = sorted(stored.keys() - wanted - {*_EMBEDDINGS, _HEAD, _UNUSED})
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
    folder, {n: x.shape for n, x in tensors.items()}, param_shapes(config)
  )
  return config, tensors


def vocabulary(folder: epath.Path) -> str | None:
  """Returns what the tokenizer's files say, as `vocabularies.describe` does.

  It is a part of that line: 'model sha256 ...', 'ByteVocabulary', or
  'SentencePieceVocabulary' where the model's file is not there. None where no
  file says anything.
  """
  model = folder / 'spiece.model'
  if model.is_file():
    return f'model sha256 {hashlib.sha256(model.read_bytes()).hexdigest()}'
  config = folder / 'tokenizer_config.json'
  if config.is_file():
    if 'ByT5' in str(_read_json(config).get('tokenizer_class')):
      return 'ByteVocabulary'
    # A tokenizer.json alone: whose pieces they are cannot be told from it.
    return 'SentencePieceVocabulary'
  return None


def _config(path: epath.Path, values: Mapping[str, Any], *, tied) -> T5Config:
  """Returns the shape that a config.json describes."""
  kind = values.get('model_type')
  if kind not in _MODEL_TYPES:
    raise ValueError(
      f'{path} describes a model of type {kind!r}; gkd_jax reads the '
      f'encoder-decoders {", ".join(_MODEL_TYPES)}.'
    )
  if values.get('is_encoder_decoder') is False:
    raise ValueError(
      f'{path} describes a {kind} encoder or decoder alone; gkd_jax needs both.'
    )
  proj = values.get(
    'feed_forward_proj', 'relu' if kind == 't5' else 'gated-gelu'
  )
  proj = 'gated-gelu' if proj == 'gated-gelu_new' else proj
  if proj not in _ACTIVATIONS:
    raise ValueError(
      f'{path}: feed_forward_proj is {proj!r}; gkd_jax knows '
      f'{", ".join(_ACTIVATIONS)}.'
    )
  if (epsilon := values.get('layer_norm_epsilon', 1e-6)) != 1e-6:
    raise ValueError(
      f'{path}: layer_norm_epsilon is {epsilon}; every published T5 has 1e-6, '
      'and gkd_jax knows no other.'
    )
  # transformers 4 scales what goes into a tied head. 5 ties where the weights
  # are equal, and T5 says apart whether it scales; mT5 never does. (Its umT5
  # always does, even where the model was trained, and used by 4, without.)
  scale = values.get(
    'scale_decoder_outputs',
    kind != 'mt5' and values.get('tie_word_embeddings') is not False,
  )
  try:
    return T5Config(
      vocab_size=values['vocab_size'],
      emb_dim=values['d_model'],
      num_heads=values['num_heads'],
      head_dim=values['d_kv'],
      mlp_dim=values['d_ff'],
      num_encoder_layers=values['num_layers'],
      num_decoder_layers=values.get('num_decoder_layers')
      or values['num_layers'],
      mlp_activations=_ACTIVATIONS[proj],
      logits_via_embedding=tied,
      scale_decoder_outputs=scale,
      relpos_buckets=values.get('relative_attention_num_buckets', 32),
      relpos_max_distance=values.get('relative_attention_max_distance', 128),
      relpos_bias_per_layer=kind == 'umt5',
    )
  except KeyError as e:
    raise ValueError(f'{path} does not say {e}.') from e


def _names(config: T5Config) -> dict[str, tuple[str, bool]]:
  """Maps our parameters to theirs, and says whether it is the transpose."""
  names = {'token_embedder/embedding': (_EMBEDDINGS[0], False)}
  if not config.logits_via_embedding:
    names['decoder/logits_dense/kernel'] = (_HEAD, True)
  gates = len(config.mlp_activations)
  wi = ['wi'] if gates == 1 else [f'wi_{i}' for i in range(gates)]
  attention = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
  stacks = {
    'encoder': (
      config.num_encoder_layers,
      [('attention', 'pre_attention_layer_norm', 'SelfAttention')],
    ),
    'decoder': (
      config.num_decoder_layers,
      [
        ('self_attention', 'pre_self_attention_layer_norm', 'SelfAttention'),
        (
          'encoder_decoder_attention',
          'pre_cross_attention_layer_norm',
          'EncDecAttention',
        ),
      ],
    ),
  }
  for stack, (num_layers, attentions) in stacks.items():
    names[f'{stack}/{stack}_norm/scale'] = (
      f'{stack}.final_layer_norm.weight',
      False,
    )
    for i in range(num_layers):
      ours, theirs = f'{stack}/layers_{i}', f'{stack}.block.{i}.layer'
      if i == 0 or config.relpos_bias_per_layer:
        of_layer = ours if config.relpos_bias_per_layer else stack
        names[f'{of_layer}/relpos_bias/rel_embedding'] = (
          f'{theirs}.0.SelfAttention.relative_attention_bias.weight',
          True,
        )
      for j, (block, norm, block_theirs) in enumerate(attentions):
        names[f'{ours}/{norm}/scale'] = (
          f'{theirs}.{j}.layer_norm.weight',
          False,
        )
        for part, letter in attention.items():
          names[f'{ours}/{block}/{part}/kernel'] = (
            f'{theirs}.{j}.{block_theirs}.{letter}.weight',
            True,
          )
      j = len(attentions)
      names[f'{ours}/pre_mlp_layer_norm/scale'] = (
        f'{theirs}.{j}.layer_norm.weight',
        False,
      )
      for part in (*wi, 'wo'):
        names[f'{ours}/mlp/{part}/kernel'] = (
          f'{theirs}.{j}.DenseReluDense.{part}.weight',
          True,
        )
  return names


def _stored_tensors(folder: epath.Path) -> dict[str, Tensor]:
  """Opens all safetensors files of a folder: {their name: Tensor}."""
  names_of = _names_by_file(folder)
  tensors = {}
  for file, names in names_of.items():
    try:
      opened = safetensors.safe_open(file, framework='numpy')
    except (safetensors.SafetensorError, OSError) as e:
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
  """{file: the tensors that the index places in it}; [] stands for all."""
  if (folder / _WEIGHTS).is_file():
    return {folder / _WEIGHTS: []}
  if not (folder / _INDEX).is_file():
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
  weight_map = _read_json(folder / _INDEX).get('weight_map')
  if not weight_map:
    raise ValueError(f'{folder / _INDEX} has no weight_map. Copy it again.')
  names_of = collections.defaultdict(list)
  for name, file in weight_map.items():
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


def _equal(a: Tensor, b: Tensor) -> bool:
  if a.shape != b.shape or a.dtype != b.dtype:
    return False
  rows = 4096  # of an embedding; never two whole ones in memory
  return all(
    np.array_equal(a.read(part), b.read(part))
    for start in range(0, a.shape[0], rows)
    for part in [
      (slice(start, min(start + rows, a.shape[0])), slice(0, a.shape[1]))
    ]
  )


def _read_json(path: epath.Path) -> dict[str, Any]:
  try:
    values = json.loads(path.read_text())
  except json.JSONDecodeError as e:
    raise ValueError(f'{path} is no valid JSON: {e}.') from e
  if not isinstance(values, dict):
    raise ValueError(f'{path} holds {type(values).__name__}, not {{...}}.')
  return values


# --- Writing ------------------------------------------------------------------


def save(
  folder: epath.Path,
  config: T5Config,
  params: Mapping[str, Any],
  *,
  dtype: str = 'float32',
  source: epath.Path | None = None,
  max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
  """Writes a folder that `transformers` loads.

  Args:
    folder: there and empty.
    config: the model's shape.
    params: {our name: array}; one shard's worth of copies is made at a time.
    dtype: of the weights, 'float32' or 'bfloat16'.
    source: a folder whose `SIDE_FILES` and config.json's other fields are
      taken over.
    max_shard_bytes: of one file.
  """
  was = {}
  if source is not None and (source / CONFIG).exists():
    was = _read_json(source / CONFIG)
  values = _to_json(config, was, dtype)
  names = _names(config)
  kept = np.dtype(dtype)
  shards = list(
    _shards({n: params[n].size * kept.itemsize for n in names}, max_shard_bytes)
  )
  weight_map = {}
  for i, ours in enumerate(shards):
    file = _WEIGHTS
    if len(shards) > 1:
      file = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    arrays = {}
    for name in ours:
      theirs, transpose = names[name]
      array = np.asarray(params[name]).astype(kept, copy=False)
      arrays[theirs] = np.ascontiguousarray(array.T if transpose else array)
      weight_map[theirs] = file
    safetensors.numpy.save_file(arrays, folder / file, {'format': 'pt'})
    del arrays
  if len(shards) > 1:
    total = sum(params[n].size for n in names)
    index = {
      'metadata': {
        'total_parameters': total,
        'total_size': total * kept.itemsize,
      },
      'weight_map': dict(sorted(weight_map.items())),
    }
    _write_json(folder / _INDEX, index)
  if source is not None:
    for name in SIDE_FILES:
      if (source / name).exists():
        (source / name).copy(folder / name)
  _write_json(folder / CONFIG, values)
  if not (folder / _GENERATION).exists():
    _write_json(
      folder / _GENERATION,
      {'decoder_start_token_id': 0, 'eos_token_id': 1, 'pad_token_id': 0},
    )


def tokenizer_files(folder: epath.Path) -> list[str]:
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
  """Fills files in order, each up to the limit or with one array alone."""
  shard, used = [], 0
  for name, size in sizes.items():
    if shard and used + size > limit:
      yield shard
      shard, used = [], 0
    shard.append(name)
    used += size
  yield shard


def check_can_hold(config: T5Config) -> None:
  """Raises ValueError where transformers has no such model."""
  if config.mlp_activations not in _ACTIVATIONS.values():
    raise ValueError(
      f'transformers has no T5 with mlp_activations {config.mlp_activations}; '
      f'it has {", ".join(map(str, _ACTIVATIONS.values()))}.'
    )


def _to_json(config: T5Config, was: Mapping[str, Any], dtype: str):
  """Returns config.json. Of what there was, it keeps `_KEPT_FIELDS`."""
  scale = config.scales_decoder_outputs
  kind = 'umt5' if config.relpos_bias_per_layer else 't5'
  if was.get('model_type') == 'mt5' and kind == 't5' and not scale:
    kind = 'mt5'
  architecture = {'t5': 'T5', 'mt5': 'MT5', 'umt5': 'UMT5'}[kind]
  proj = {v: k for k, v in _ACTIVATIONS.items()}[config.mlp_activations]
  return {name: was[name] for name in _KEPT_FIELDS if name in was} | {
    'architectures': [f'{architecture}ForConditionalGeneration'],
    'model_type': kind,
    'is_encoder_decoder': True,
    'vocab_size': config.vocab_size,
    'd_model': config.emb_dim,
    'd_kv': config.head_dim,
    'd_ff': config.mlp_dim,
    'num_layers': config.num_encoder_layers,
    'num_decoder_layers': config.num_decoder_layers,
    'num_heads': config.num_heads,
    'relative_attention_num_buckets': config.relpos_buckets,
    'relative_attention_max_distance': config.relpos_max_distance,
    'dropout_rate': was.get('dropout_rate', 0.1),
    'layer_norm_epsilon': 1e-6,
    'feed_forward_proj': proj,
    # transformers 4 reads the first, 5 the second, which T5 alone has.
    'tie_word_embeddings': scale or config.logits_via_embedding,
    **({'scale_decoder_outputs': scale} if kind == 't5' else {}),
    'pad_token_id': 0,
    'eos_token_id': 1,
    'decoder_start_token_id': 0,
    'dtype': dtype,
  }


def _write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + '\n')
