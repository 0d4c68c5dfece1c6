# SPDX-License-Identifier: Apache-2.0
"""The family `t5gemma` in Hugging Face's folders: config.json, tensor names.

Files differ: `text_model.` may be part of the encoder's names, tied tensors may
be absent, and the rotary positions have old and new fields.

Source: transformers, `models/t5gemma` and `models/t5gemma2`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from gkd_jax.checkpoints.formats import tensors as tensors_lib
from gkd_jax.checkpoints.formats.tensors import Tensor
from gkd_jax.models import registry
from gkd_jax.models.interface import ModelConfig
from gkd_jax.runtime import files

_VERSIONS = {'t5gemma': 1, 't5gemma2': 2}
MODEL_TYPES = tuple(_VERSIONS)
# Prefixes of tensors that our model does not have, of the image encoder of
# T5Gemma 2; an export copies them.
PASSED_THROUGH = (
  'model.encoder.vision_tower.',
  'model.encoder.multi_modal_projector.',
)
_TEXT = 'text_model.'
_HEAD = 'lm_head.out_proj.weight'
# Names of the same array; a file holds one or more of them.
_TIED = {
  1: {
    'token_embedder/embedding': ('model.decoder.embed_tokens.weight', _HEAD),
  },
  2: {
    'token_embedder/embedding': (
      'model.encoder.embed_tokens.weight',
      'model.decoder.embed_tokens.weight',
      _HEAD,
    ),
    'token_embedder/eoi_embedding': (
      'model.encoder.embed_tokens.eoi_embedding',
      'model.decoder.embed_tokens.eoi_embedding',
    ),
  },
}
_SLIDING, _FULL = 'sliding_attention', 'full_attention'
_EPSILON = 1e-6
# Fields of a stack that set nothing of ours, for files we write from scratch.
_MAX_LENGTHS = {1: 8192, 2: 131_072}
# Of T5Gemma2Config: begin and end of an image, and its soft tokens.
_IMAGE_FIELDS = ('boi_token_index', 'eoi_token_index', 'image_token_index')
_IMAGE_IDS = (255_999, 256_000, 256_001)
# transformers builds an image encoder for every T5Gemma 2. A model that was
# never one of a folder's gets the smallest.
_NO_VISION = {
  'model_type': 'siglip_vision_model',
  'hidden_size': 2,
  'intermediate_size': 2,
  'num_hidden_layers': 1,
  'num_attention_heads': 1,
  'image_size': 16,
  'patch_size': 16,
  'vision_use_head': False,
}


class _Stack(NamedTuple):
  """What config.json says of the encoder or the decoder."""

  vocab_size: int
  emb_dim: int
  mlp_dim: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  query_pre_attn_scalar: float
  window: int
  full_period: int
  attention_soft_cap: float | None
  final_soft_cap: float | None
  rope_theta: float
  rope_factor: float
  window_rope_theta: float


# Fields of config.json and transformers' defaults. T5Gemma's are those of 2B.
_NUMBERS = {
  'vocab_size': ('vocab_size', int, {1: 256_000, 2: 262_208}),
  'emb_dim': ('hidden_size', int, 2304),
  'mlp_dim': ('intermediate_size', int, 9216),
  'num_layers': ('num_hidden_layers', int, 26),
  'num_heads': ('num_attention_heads', int, 8),
  'num_kv_heads': ('num_key_value_heads', int, 4),
  'head_dim': ('head_dim', int, 256),
  'query_pre_attn_scalar': ('query_pre_attn_scalar', float, 256),
  'window': ('sliding_window', int, 4096),
}
_SOFT_CAPS = {
  'attention_soft_cap': ('attn_logit_softcapping', {1: 50.0, 2: None}),
  'final_soft_cap': ('final_logit_softcapping', {1: 30.0, 2: None}),
}
# What both stacks must have in common; the final soft cap is the decoder's.
_OF_EACH = ('emb_dim', 'mlp_dim', 'num_layers', 'num_heads', 'num_kv_heads')


# --- Reading ------------------------------------------------------------------


def read_layout(
  path: epath.Path,
  values: Mapping[str, Any],
  ids: Mapping[str, int],
  stored: Mapping[str, Tensor],
) -> tuple[ModelConfig, dict[str, tuple[str, bool]], set[str]]:
  """Returns the config and the tensor names of a folder.

  Args:
    path: of config.json.
    values: its contents.
    ids: the special ids in the folder's files, {field of our config: id}.
    stored: {tensor name: Tensor} of the weights.

  Returns:
    The config; {our name: (tensor name, whether it is the transpose)}; and the
    names of tensors that the files may hold but the model does not use.

  Raises:
    ValueError: it is no encoder-decoder T5Gemma.
  """
  config = _config(path, values, ids, num_tensors=len(stored))
  tied = {
    ours: [_spelling(name, stored) for name in names]
    for ours, names in _TIED[config.version].items()
  }
  names = {
    ours: (_spelling(theirs, stored), transpose)
    for ours, (theirs, transpose) in tensor_names(config).items()
  }
  for ours, spellings in tied.items():
    names[ours] = (_one_of(path, spellings, stored), False)
  _check_vocab_size(path, values, stored, names)
  unused = {name for spellings in tied.values() for name in spellings}
  unused |= {name for name in stored if name.startswith(PASSED_THROUGH)}
  return config, names, unused


def _spelling(name: str, stored: Mapping[str, Tensor]) -> str:
  """Returns a name as a file has it."""
  prefix = 'model.encoder.'
  longer = name.replace(prefix, prefix + _TEXT, 1)
  return longer if longer in stored else name


def _one_of(
  path: epath.Path, names: list[str], stored: Mapping[str, Tensor]
) -> str:
  """Returns the first name of tied tensors that a file has."""
  found = [name for name in names if name in stored]
  for other in found[1:]:
    if not tensors_lib.equal(stored[found[0]], stored[other]):
      raise ValueError(
        f'{path.parent}: {other} differs from {found[0]}. They are one array '
        'in every T5Gemma; gkd_jax does not support two.'
      )
  return found[0] if found else names[0]


def _check_vocab_size(path, values, stored, names) -> None:
  """Raises ValueError, with the field, if a vocabulary was resized."""
  for stack, ours in (
    ('encoder', 'encoder_embedder/embedding'),
    ('decoder', 'token_embedder/embedding'),
  ):
    if ours not in names or (tensor := names[ours][0]) not in stored:
      continue
    says = _stack_values(path, values, stack).get('vocab_size')
    has = stored[tensor].shape[0]
    if says is not None and says != has:
      raise ValueError(
        f'{path}: vocab_size of the {stack} is {says}, but the weights have '
        f'{has}: {tensor} is {stored[tensor].shape}. If the model was resized, '
        f'set vocab_size to {has}.'
      )


def _stack_values(
  path: epath.Path, values: Mapping[str, Any], stack: str
) -> Mapping[str, Any]:
  """Returns the fields of encoder or decoder."""
  own = files.field(values, stack, dict, path, {})
  if stack == 'encoder' and _VERSIONS[values['model_type']] == 2:
    return files.field(own, 'text_config', dict, path, {})
  return own


def _config(
  path: epath.Path,
  values: Mapping[str, Any],
  ids: Mapping[str, int],
  *,
  num_tensors: int,
) -> ModelConfig:
  """Returns the config that a config.json describes."""
  version = _VERSIONS[values['model_type']]
  if not files.field(values, 'is_encoder_decoder', bool, path, True):
    raise ValueError(
      f'{path} describes the encoder of a T5Gemma alone; gkd_jax needs both '
      'stacks.'
    )
  stacks = {
    stack: _stack(path, _stack_values(path, values, stack), stack, version)
    for stack in ('encoder', 'decoder')
  }
  encoder, decoder = stacks.values()
  for stack, shape in stacks.items():
    if shape.num_layers > num_tensors:
      raise ValueError(
        f'{path}: num_hidden_layers of the {stack} is {shape.num_layers}, but '
        f'the weights have {num_tensors} tensors.'
      )
  common = [n for n in _Stack._fields if n not in (*_OF_EACH, 'final_soft_cap')]
  for name in common if version == 1 else (*common, *_OF_EACH):
    theirs, ours = getattr(encoder, name), getattr(decoder, name)
    if theirs != ours:
      raise ValueError(
        f'{path}: {name} is {theirs} in the encoder and {ours} in the decoder; '
        f'gkd_jax supports T5Gemma {version} with one for both.'
      )
  of_decoder = _stack_values(path, values, 'decoder')
  ids = {
    'pad_id': files.field(of_decoder, 'pad_token_id', int, path, 0),
    'eos_id': files.field(of_decoder, 'eos_token_id', int, path, 1),
    # Which transformers starts with unless another id is set.
    'start_id': files.field(of_decoder, 'bos_token_id', int, path, 2),
  } | ids
  if version == 2:
    images = _image_ids(path, values)
    ids |= {'eoi_id': images[1], 'never_written': tuple(sorted(images))}
  shape = decoder._asdict()
  num_decoder_layers = shape.pop('num_layers')
  try:
    return registry.make_config(
      't5gemma',
      version=version,
      **shape,
      num_encoder_layers=encoder.num_layers,
      num_decoder_layers=num_decoder_layers,
      **{
        f'encoder_{name}': getattr(encoder, name)
        for name in _OF_EACH
        if name != 'num_layers'
      },
      **ids,
    )
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from e


def _image_ids(path: epath.Path, values: Mapping[str, Any]) -> tuple[int, ...]:
  """Returns the ids of begin and end of an image, and of its soft tokens."""
  encoder = files.field(values, 'encoder', dict, path, {})
  return tuple(
    files.field(encoder, name, int, path, default)
    for name, default in zip(_IMAGE_FIELDS, _IMAGE_IDS, strict=True)
  )


def _stack(
  path: epath.Path, own: Mapping[str, Any], stack: str, version: int
) -> _Stack:
  """Returns the shape of encoder or decoder; checks what has one value."""
  numbers = {}
  for name, (theirs, kind, default) in _NUMBERS.items():
    default = default[version] if isinstance(default, dict) else default
    numbers[name] = files.field(own, theirs, kind, path, default)
  for name, (theirs, default) in _SOFT_CAPS.items():
    value = default[version]
    if theirs in own:  # a null is no cap
      value = files.field(own, theirs, float, path, None)
    numbers[name] = value
  for name, kind, only in (
    ('hidden_activation', str, 'gelu_pytorch_tanh'),
    ('rms_norm_eps', float, _EPSILON),
    ('attention_bias', bool, False),
  ):
    value = files.field(own, name, kind, path, only)
    if value != only:
      raise ValueError(
        f'{path}: {name} of the {stack} is {value}; gkd_jax supports only '
        f'{only}, the value of every published T5Gemma.'
      )
  return _Stack(
    **numbers,
    **_rope(path, own, version),
    full_period=_full_period(
      path, own, stack, {1: 2, 2: 6}[version], numbers['num_layers']
    ),
  )


def _full_period(
  path: epath.Path,
  own: Mapping[str, Any],
  stack: str,
  default: int,
  num_layers: int,
) -> int:
  """Returns the period of the layers without a window."""
  for name in ('_sliding_window_pattern', 'sliding_window_pattern'):
    default = files.field(own, name, int, path, default)
    if default < 1:
      raise ValueError(f'{path}: {name} must be 1 or more, not {default}.')
  types = files.field(own, 'layer_types', list, path, None)
  if types is None:
    return default

  if len(types) != num_layers:
    raise ValueError(
      f'{path}: num_hidden_layers of the {stack} is {num_layers}, but its '
      f'layer_types has {len(types)} entries.'
    )
  # The default first: a stack of few layers may fit several.
  for period in (default, *range(1, num_layers + 2)):
    if types == [
      _SLIDING if (i + 1) % period else _FULL for i in range(num_layers)
    ]:
      return period
  raise ValueError(
    f'{path}: layer_types of the {stack} is {types}; gkd_jax supports '
    f'{_SLIDING} and, as every n-th layer, {_FULL}.'
  )


def _rope(
  path: epath.Path, own: Mapping[str, Any], version: int
) -> dict[str, float]:
  """Returns the fields of the rotary positions, from old or new files."""

  def number(values, name, default):
    return float(files.field(values, name, float, path, default))

  new = files.field(own, 'rope_parameters', dict, path, None) or {}
  if version == 1:
    _check_rope_type(path, new, ('default',))
    theta = number(new, 'rope_theta', number(own, 'rope_theta', 10_000.0))
    return {
      'rope_theta': theta,
      'rope_factor': 1.0,
      'window_rope_theta': theta,
    }
  full = files.field(new, _FULL, dict, path, None) or {}
  scaling = files.field(own, 'rope_scaling', dict, path, None) or {}
  full = {**full, **scaling}
  windowed = files.field(new, _SLIDING, dict, path, None) or {}
  kind = _check_rope_type(path, full, ('default', 'linear'))
  _check_rope_type(path, windowed, ('default',))
  return {
    'rope_theta': number(full, 'rope_theta', number(own, 'rope_theta', 1e6)),
    'rope_factor': number(full, 'factor', 1.0) if kind == 'linear' else 1.0,
    'window_rope_theta': number(
      windowed, 'rope_theta', number(own, 'rope_local_base_freq', 1e4)
    ),
  }


def _check_rope_type(path, values, known) -> str:
  name = 'rope_type' if 'rope_type' in values else 'type'
  kind = files.field(values, name, str, path, 'default')
  if kind not in known:
    raise ValueError(
      f'{path}: rope_type is {kind!r}; gkd_jax supports {", ".join(known)}.'
    )
  return kind


# --- Names --------------------------------------------------------------------


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, bool]]:
  """Returns {our name: (their name, whether it is the transpose)}."""
  names = {
    ours: (theirs[0], False) for ours, theirs in _TIED[config.version].items()
  }
  if config.version == 1:
    names['encoder_embedder/embedding'] = (
      'model.encoder.embed_tokens.weight',
      False,
    )
  self_attention = {'encoder': 'attention', 'decoder': 'self_attention'}
  for stack in ('encoder', 'decoder'):
    names[f'{stack}/{stack}_norm/scale'] = (f'model.{stack}.norm.weight', False)
    blocks = {self_attention[stack]: 'self_attn'}
    if stack == 'decoder' and config.has_cross_attention:
      blocks['encoder_decoder_attention'] = 'cross_attn'
    norms = {
      'attention': 'self_attn',
      'self_attention': 'self_attn',
      'encoder_decoder_attention': 'cross_attn',
      'mlp': 'feedforward',
    }
    for i in range(getattr(config, stack).num_layers):
      of_layer = _layer_names(blocks, norms, has_norms=config.version == 2)
      for ours, (theirs, transpose) in of_layer.items():
        names[f'{stack}/layers_{i}/{ours}'] = (
          f'model.{stack}.layers.{i}.{theirs}.weight',
          transpose,
        )
  return names


def _layer_names(
  blocks: Mapping[str, str], norms: Mapping[str, str], *, has_norms: bool
) -> dict[str, tuple[str, bool]]:
  """Returns the names in a layer, without '.weight'.

  Args:
    blocks: {our name: theirs} of its attentions.
    norms: {our name of a block: theirs in the names of its norms}.
    has_norms: whether queries and keys have norms.
  """
  names = {}
  projections = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
  for ours, theirs in blocks.items():
    for part, letter in projections.items():
      names[f'{ours}/{part}/kernel'] = (f'{theirs}.{letter}_proj', True)
    if has_norms:
      for part in ('query', 'key'):
        names[f'{ours}/{part}_norm/scale'] = (
          f'{theirs}.{projections[part]}_norm',
          False,
        )
  for part, theirs in (
    ('wi_0', 'gate_proj'),
    ('wi_1', 'up_proj'),
    ('wo', 'down_proj'),
  ):
    names[f'mlp/{part}/kernel'] = (f'mlp.{theirs}', True)
  for block in (*blocks, 'mlp'):
    ours = 'cross_attention' if block.startswith('encoder_') else block
    for place in ('pre', 'post'):
      names[f'{place}_{ours}_layer_norm/scale'] = (
        f'{place}_{norms[block]}_layernorm',
        False,
      )
  return names


# --- Writing ------------------------------------------------------------------


def check_can_hold(config: ModelConfig) -> None:
  """Raises ValueError if transformers cannot represent the model."""
  for stack, shape in (
    ('encoder', config.encoder),
    ('decoder', config.decoder),
  ):
    if shape.emb_dim % shape.num_heads:
      raise ValueError(
        f'transformers has no T5Gemma whose {stack} has emb_dim '
        f'{shape.emb_dim} and num_heads {shape.num_heads}: the heads must '
        'divide the width.'
      )
  if config.version == 1 and (
    config.rope_factor != 1.0 or config.rope_theta != config.window_rope_theta
  ):
    raise ValueError(
      'transformers has no T5Gemma 1 with rope_factor '
      f'{config.rope_factor}, rope_theta {config.rope_theta} and '
      f'window_rope_theta {config.window_rope_theta}: all layers have one base.'
    )


def config_to_json(
  config: ModelConfig, was: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the fields of config.json except special ids and dtype.

  Args:
    config: of the model.
    was: config.json of the folder that the model was loaded from. What it says
      of images and of fields that set nothing of ours is copied.
  """
  kind = {version: kind for kind, version in _VERSIONS.items()}[config.version]
  if was.get('model_type') != kind:
    was = {}
  encoder, decoder = (
    _stack_to_json(config, stack, was) for stack in ('encoder', 'decoder')
  )
  values = {
    'architectures': [
      f'T5Gemma{"" if config.version == 1 else 2}ForConditionalGeneration'
    ],
    'model_type': kind,
    'is_encoder_decoder': True,
    'tie_word_embeddings': True,
    'vocab_size': config.vocab_size,
    'dropout_rate': was.get('dropout_rate', 0.0),
    'attention_dropout': was.get('attention_dropout', 0.0),
    'bos_token_id': config.start_id,
  }
  if config.version == 1:
    values['encoder'] = encoder
  else:
    old = was.get('encoder', {})
    images = dict(zip(_IMAGE_FIELDS, _IMAGE_IDS, strict=True))
    values['encoder'] = {
      'model_type': 't5gemma2_encoder',
      'text_config': encoder,
      'vision_config': old.get('vision_config', _NO_VISION),
      'mm_tokens_per_image': old.get('mm_tokens_per_image', 1),
      'tie_word_embeddings': True,
      **{name: old.get(name, image) for name, image in images.items()},
      'eoi_token_index': config.eoi_id,
    }
    values |= {
      name: values['encoder'][name]
      for name in ('eoi_token_index', 'image_token_index')
    }
  values['decoder'] = decoder
  return values


def _stack_to_json(
  config: ModelConfig, stack: str, was: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the fields of encoder or decoder."""
  version = config.version
  kinds = {
    (1, 'encoder'): 't5_gemma_module',
    (1, 'decoder'): 't5_gemma_module',
    (2, 'encoder'): 't5gemma2_text',
    (2, 'decoder'): 't5gemma2_decoder',
  }
  old = was.get(stack, {})
  if version == 2 and stack == 'encoder':
    old = old.get('text_config', {})
  shape = getattr(config, stack)
  full = {'rope_type': 'default', 'rope_theta': config.rope_theta}
  if config.rope_factor != 1.0:
    full |= {'rope_type': 'linear', 'factor': config.rope_factor}
  rope = full
  if version == 2:
    windowed = {'rope_type': 'default', 'rope_theta': config.window_rope_theta}
    rope = {_FULL: full, _SLIDING: windowed}
  values = {
    'model_type': kinds[version, stack],
    'vocab_size': config.vocab_size,
    'hidden_size': shape.emb_dim,
    'intermediate_size': shape.mlp_dim,
    'num_hidden_layers': shape.num_layers,
    'num_attention_heads': shape.num_heads,
    'num_key_value_heads': shape.num_kv_heads,
    'head_dim': config.head_dim,
    'query_pre_attn_scalar': _whole(
      config.query_pre_attn_scalar or config.head_dim
    ),
    'sliding_window': config.window,
    'layer_types': [
      _FULL if is_full else _SLIDING
      for is_full in config.is_full(shape.num_layers)
    ],
    'attn_logit_softcapping': config.attention_soft_cap,
    'final_logit_softcapping': config.final_soft_cap,
    'rope_parameters': rope,
    'rms_norm_eps': _EPSILON,
    'hidden_activation': 'gelu_pytorch_tanh',
    'attention_bias': False,
    'tie_word_embeddings': True,
    'max_position_embeddings': old.get(
      'max_position_embeddings', _MAX_LENGTHS[version]
    ),
    'pad_token_id': config.pad_id,
    'bos_token_id': config.start_id,
    'eos_token_id': config.eos_id,
  }
  if version == 1:
    values['is_decoder'] = stack == 'decoder'
    if stack == 'decoder':
      values['cross_attention_hidden_size'] = config.encoder.emb_dim
  return values


def _whole(number: float) -> int | float:
  """Returns a number as transformers requires it: an int if it is whole."""
  return int(number) if number == int(number) else number


def export_note(config: ModelConfig, passed_through: bool) -> str | None:
  """Returns what differs in transformers from the model here; None: nothing.

  Args:
    config: of the model.
    passed_through: whether the folder has tensors of PASSED_THROUGH.
  """
  if config.version == 1 or passed_through:
    return None
  return (
    'the image encoder of this T5Gemma 2 is left out: gkd_jax trains on texts. '
    'transformers reports its tensors as missing and initialises them; texts '
    'do not depend on them.'
  )
