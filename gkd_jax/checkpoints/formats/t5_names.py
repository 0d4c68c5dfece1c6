# SPDX-License-Identifier: Apache-2.0
"""The family `t5` in Hugging Face's folders: its config.json and tensor names.

Source: transformers, `models/t5`, `models/mt5` and `models/umt5`.
"""

from collections.abc import Mapping
from typing import Any

from etils import epath

from gkd_jax.checkpoints.formats import tensors as tensors_lib
from gkd_jax.checkpoints.formats.tensors import Tensor
from gkd_jax.models import registry
from gkd_jax.models.interface import ModelConfig
from gkd_jax.runtime import files

# Fields of config.json that do not describe the model; an export copies them.
# All others are written from our config, because transformers accepts files
# whose fields contradict each other.
_KEPT_FIELDS = ('task_specific_params', 'tokenizer_class', 'n_positions')
MODEL_TYPES = ('t5', 'mt5', 'umt5')
# Prefixes of tensors that our model does not have; an export copies them.
PASSED_THROUGH = ()
# feed_forward_proj -> our activations. In gated-gelu, GELU is the tanh form.
_ACTIVATIONS = {
  'relu': ('relu',),
  'gated-relu': ('relu', 'linear'),
  'gated-gelu': ('gelu', 'linear'),
  'gated-silu': ('silu', 'linear'),
}
# Names of the same matrix; a file holds one or more of them.
_EMBEDDINGS = (
  'shared.weight',
  'encoder.embed_tokens.weight',
  'decoder.embed_tokens.weight',
)
_HEAD = 'lm_head.weight'
# A table in the files of T5 1.0 that the model does not use.
_UNUSED = (
  'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
)


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
    ValueError: it is no encoder-decoder T5.
  """
  tie = files.field(values, 'tie_word_embeddings', bool, path, True)
  embedding = next((name for name in _EMBEDDINGS if name in stored), None)
  if embedding is None:
    embedding = _HEAD if tie and _HEAD in stored else _EMBEDDINGS[0]
  _check_sizes(path, values, stored, embedding)
  _check_one_embedding(path, stored, embedding)
  tied = tie and (
    _HEAD not in stored
    or embedding == _HEAD
    or tensors_lib.equal(stored[_HEAD], stored[embedding])
  )
  ids = {'pad_id': 0, 'eos_id': 1} | ids  # of transformers' T5Config
  ids = {'start_id': ids['pad_id']} | ids
  config = _config(path, values, ids, tied=tied, num_tensors=len(stored))
  embedding_name = {'token_embedder/embedding': (embedding, False)}
  unused = {*_EMBEDDINGS, _HEAD, _UNUSED}
  return config, tensor_names(config) | embedding_name, unused


def _check_one_embedding(
  path: epath.Path, stored: Mapping[str, Tensor], embedding: str
) -> None:
  """Raises ValueError if encoder and decoder have different embeddings."""
  for other in _EMBEDDINGS:
    if other in stored and not tensors_lib.equal(
      stored[embedding], stored[other]
    ):
      raise ValueError(
        f'{path.parent}: {other} differs from {embedding}. A T5 has one '
        'embedding for encoder and decoder; gkd_jax does not support two.'
      )


def _check_sizes(
  path: epath.Path,
  values: Mapping[str, Any],
  stored: Mapping[str, Tensor],
  embedding: str,
) -> None:
  """Raises ValueError, with the field, if a size is not that of the weights.

  It compares the sizes that one tensor shows; `check_shapes` compares the rest.
  """
  layer = 'encoder.block.0.layer.0.SelfAttention'
  mlp = 'encoder.block.0.layer.1.DenseReluDense'
  sizes = (
    ('vocab_size', embedding, 0),
    ('vocab_size', _HEAD, 0),
    ('d_model', embedding, 1),
    ('d_ff', f'{mlp}.wo.weight', 1),
    ('num_heads', f'{layer}.relative_attention_bias.weight', 1),
    (
      'relative_attention_num_buckets',
      f'{layer}.relative_attention_bias.weight',
      0,
    ),
  )
  for field, name, axis in sizes:
    if field not in values or name not in stored:
      continue
    says, shape = files.field(values, field, int, path), stored[name].shape
    if len(shape) == 2 and shape[axis] != says:
      raise ValueError(
        f'{path}: {field} is {says}, but the weights have {shape[axis]}: '
        f'{name} is {shape}. If the model was resized, set {field} to '
        f'{shape[axis]}.'
      )


def _activations(path: epath.Path, values: Mapping[str, Any]) -> str:
  """Returns the key of `_ACTIVATIONS` that a config.json describes.

  `dense_act_fn` and `is_gated_act` say the same as `feed_forward_proj`, and
  override it in transformers.
  """
  default = 'relu' if values['model_type'] == 't5' else 'gated-gelu'
  proj = files.field(values, 'feed_forward_proj', str, path, default)
  gated = files.field(
    values, 'is_gated_act', bool, path, proj.startswith('gated-')
  )
  act = files.field(
    values, 'dense_act_fn', str, path, proj.removeprefix('gated-')
  )
  kind = ('gated-' if gated else '') + act
  if kind == 'gated-gelu_new':
    kind = 'gated-gelu'
  known = kind in _ACTIVATIONS
  if not known or (
    'feed_forward_proj' in values and proj.replace('gelu_new', 'gelu') != kind
  ):
    raise ValueError(
      f'{path}: feed_forward_proj is {proj!r}'
      + (
        '' if not known and kind == proj else f', with {kind!r} in other fields'
      )
      + f'; gkd_jax supports {", ".join(_ACTIVATIONS)}.'
    )
  return kind


def _config(
  path: epath.Path,
  values: Mapping[str, Any],
  ids: Mapping[str, int],
  *,
  tied: bool,
  num_tensors: int,
) -> ModelConfig:
  """Returns the config that a config.json describes."""

  def number(name, default=files.REQUIRED):
    return files.field(values, name, int, path, default)

  kind = values['model_type']
  if not files.field(values, 'is_encoder_decoder', bool, path, True):
    raise ValueError(
      f'{path} describes a {kind} encoder or decoder alone; gkd_jax needs both.'
    )
  proj = _activations(path, values)
  epsilon = files.field(values, 'layer_norm_epsilon', float, path, 1e-6)
  if epsilon != 1e-6:
    raise ValueError(
      f'{path}: layer_norm_epsilon is {epsilon}; gkd_jax supports only 1e-06, '
      'the value of every published T5.'
    )
  # transformers 4 scales the hidden states if the head is tied. transformers 5
  # ties the head if the weights are equal, and has a separate field for the
  # scale of T5; mT5 is never scaled. (It always scales umT5, also models that
  # were trained, and run by transformers 4, without a scale.)
  scale = files.field(
    values,
    'scale_decoder_outputs',
    bool,
    path,
    kind != 'mt5'
    and files.field(values, 'tie_word_embeddings', bool, path, True),
  )
  num_layers = number('num_layers')
  num_decoder_layers = number('num_decoder_layers', None)
  if num_decoder_layers is None:
    num_decoder_layers = num_layers
  for name, layers in (
    ('num_layers', num_layers),
    ('num_decoder_layers', num_decoder_layers),
  ):
    if layers > num_tensors:
      raise ValueError(
        f'{path}: {name} is {layers}, but the weights have {num_tensors} '
        'tensors.'
      )
  sizes = {
    'vocab_size': number('vocab_size'),
    'emb_dim': number('d_model'),
    'num_heads': number('num_heads'),
    'head_dim': number('d_kv'),
    'mlp_dim': number('d_ff'),
    'num_encoder_layers': num_layers,
    'num_decoder_layers': num_decoder_layers,
    'relpos_buckets': number('relative_attention_num_buckets', 32),
    'relpos_max_distance': number('relative_attention_max_distance', 128),
  }
  try:
    return registry.make_config(
      't5',
      **sizes,
      mlp_activations=_ACTIVATIONS[proj],
      logits_via_embedding=tied,
      scale_decoder_outputs=scale,
      relpos_bias_per_layer=kind == 'umt5',
      **ids,
    )
  except ValueError as e:
    raise ValueError(f'{path}: {e}') from e


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, bool]]:
  """Returns {our name: (their name, whether it is the transpose)}."""
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


def check_can_hold(config: ModelConfig) -> None:
  """Raises ValueError if transformers cannot represent the model."""
  if config.mlp_activations not in _ACTIVATIONS.values():
    raise ValueError(
      f'transformers has no T5 with mlp_activations {config.mlp_activations}; '
      f'it has {", ".join(map(str, _ACTIVATIONS.values()))}.'
    )


def config_to_json(
  config: ModelConfig, was: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the fields of config.json except special ids and dtype.

  Args:
    config: of the model.
    was: config.json of the folder that the model was loaded from, whose
      `_KEPT_FIELDS` are copied.
  """
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
    # transformers 4 reads the first field, 5 the second; only T5 has it.
    'tie_word_embeddings': scale or config.logits_via_embedding,
    **({'scale_decoder_outputs': scale} if kind == 't5' else {}),
  }


def export_note(config: ModelConfig, passed_through: bool) -> str | None:
  """Returns what differs in transformers from the model here; None: nothing.

  Args:
    config: of the model.
    passed_through: whether the folder has tensors of PASSED_THROUGH.
  """
  del passed_through  # a T5 has none
  if config.relpos_bias_per_layer and not config.scales_decoder_outputs:
    return (
      'transformers 5 scales the outputs of every umT5, this one was trained '
      'without. What it samples there will differ from here; greedy and beam '
      'outputs do not.'
    )
  return None
