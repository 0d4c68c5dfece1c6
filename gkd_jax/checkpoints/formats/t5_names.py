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

# Fields of config.json that do not describe the model; an export copies them.
# All others are written from our config, because transformers accepts files
# whose fields contradict each other.
_KEPT_FIELDS = ('task_specific_params', 'tokenizer_class', 'n_positions')
MODEL_TYPES = ('t5', 'mt5', 'umt5')
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
  embedding = next((name for name in _EMBEDDINGS if name in stored), None)
  if embedding is None:
    embedding = _HEAD if _HEAD in stored else _EMBEDDINGS[0]
  tie = values.get('tie_word_embeddings', True) is not False
  tied = tie and (
    _HEAD not in stored
    or embedding == _HEAD
    or tensors_lib.equal(stored[_HEAD], stored[embedding])
  )
  ids = {'pad_id': 0, 'eos_id': 1} | ids  # of transformers' T5Config
  ids = {'start_id': ids['pad_id']} | ids
  config = _config(path, values, ids, tied=tied)
  embedding_name = {'token_embedder/embedding': (embedding, False)}
  unused = {*_EMBEDDINGS, _HEAD, _UNUSED}
  return config, tensor_names(config) | embedding_name, unused


def _config(
  path: epath.Path,
  values: Mapping[str, Any],
  ids: Mapping[str, int],
  *,
  tied: bool,
) -> ModelConfig:
  """Returns the config that a config.json describes."""
  kind = values['model_type']
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
  # transformers 4 scales the hidden states if the head is tied. transformers 5
  # ties the head if the weights are equal, and has a separate field for the
  # scale of T5; mT5 is never scaled. (It always scales umT5, also models that
  # were trained, and run by transformers 4, without a scale.)
  scale = values.get(
    'scale_decoder_outputs',
    kind != 'mt5' and values.get('tie_word_embeddings') is not False,
  )
  try:
    return registry.make_config(
      't5',
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
      **ids,
    )
  except KeyError as e:
    raise ValueError(f'{path} does not say {e}.') from e


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
