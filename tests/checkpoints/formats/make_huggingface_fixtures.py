# SPDX-License-Identifier: Apache-2.0
"""Makes huggingface_fixtures: tiny models, and what they say.

    python -m tests.checkpoints.formats.make_huggingface_fixtures [NAME...]

Makes those named, or all. Needs torch and transformers (the extra `interop`);
the tests that read the fixtures do not.
"""

import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / 'huggingface_fixtures'
NUM_IDS = 40
SHAPE = {
  'vocab_size': NUM_IDS,
  'd_model': 16,
  'd_kv': 6,
  'd_ff': 20,
  'num_heads': 2,
  'num_layers': 2,
  'num_decoder_layers': 2,
  'decoder_start_token_id': 0,
}
UNTIED = {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}
KINDS = {
  't5': (transformers.T5Config, transformers.T5ForConditionalGeneration),
  'mt5': (transformers.MT5Config, transformers.MT5ForConditionalGeneration),
  'umt5': (transformers.UMT5Config, transformers.UMT5ForConditionalGeneration),
}
# Widths of a T5Gemma's stack; more numbers below that differ by version.
GEMMA_SHAPE = {
  'vocab_size': NUM_IDS,
  'hidden_size': 16,
  'head_dim': 6,
  'query_pre_attn_scalar': 5,
  'intermediate_size': 20,
  'num_attention_heads': 4,
  'num_hidden_layers': 3,
  # Less than the lengths of inputs and targets.
  'sliding_window': 4,
}
# name: (kind, changes of its shape, how it is saved)
MODELS = {
  't5_1_0': ('t5', {'feed_forward_proj': 'relu'}, {}),
  't5_1_1': ('t5', UNTIED, {}),
  'byt5': ('t5', UNTIED | {'num_layers': 3, 'num_decoder_layers': 1}, {}),
  'mt5': ('mt5', UNTIED, {}),
  'umt5': ('umt5', {'feed_forward_proj': 'gated-gelu'}, {}),
  'sharded': ('t5', UNTIED, {'max_shard_size': '8KB'}),
  'bfloat16': ('t5', UNTIED, {'dtype': torch.bfloat16}),
  # The special ids of MADLAD-400 and of FRED-T5.
  'madlad': ('t5', UNTIED | {'pad_token_id': 1, 'eos_token_id': 2}, {}),
  'fred': ('t5', UNTIED | {'eos_token_id': 2}, {}),
  # Seeds whose greedy outputs have many tokens, and EOS.
  't5gemma': ('t5gemma', {'num_key_value_heads': 4}, {'seed': 4}),
  't5gemma2': ('t5gemma2', {'num_key_value_heads': 1}, {'seed': 2}),
}
# Begin and end of an image and its soft tokens, of the tiny T5Gemma 2.
IMAGE_IDS = (37, 38, 39)
NUM_BEAMS = 3
MAX_NEW_TOKENS = 12


def make(kind, changes, seed=1, as_initialised=False):
  """Returns a model whose outputs vary, and whose head is its own if untied.

  A wide model must keep the weights that transformers gives it: with larger
  ones its attention saturates, and rounding decides what it attends to.
  """
  torch.manual_seed(seed)
  if kind.startswith('t5gemma'):
    return make_t5gemma(kind, changes, as_initialised)
  config_class, model_class = KINDS[kind]
  config = config_class(**(SHAPE | changes))
  model = model_class(config).eval()
  if changes.get('tie_word_embeddings') is False:
    model.lm_head.weight = torch.nn.Parameter(
      torch.empty_like(model.lm_head.weight)
    )
  # A tied model with large embeddings would only repeat its last token.
  tied = changes.get('tie_word_embeddings') is not False
  with torch.no_grad():
    for name, weight in model.named_parameters():
      noise = torch.randn_like(weight)
      if as_initialised and name != 'lm_head.weight':
        continue
      if 'layer_norm' in name:
        weight.copy_((3.0 if tied else 1.0) * (1 + 0.2 * noise))
      else:
        # Large enough that attention and positions matter, for every width.
        weight.copy_(1.5 * noise * weight.shape[-1] ** -0.5)
    if not as_initialised:
      model.shared.weight.copy_(
        (0.3 if tied else 1.0) * torch.randn_like(model.shared.weight)
      )
  return model


def make_t5gemma(kind, changes, as_initialised):
  """Returns a T5Gemma; see `make`. The stacks of version 1 differ in width."""
  shape = GEMMA_SHAPE | changes
  image_ids = shape.pop('image_ids', IMAGE_IDS)
  num_layers = shape['num_hidden_layers']
  if kind == 't5gemma':
    encoder = {**shape, 'hidden_size': shape['hidden_size'] + 4}
    if as_initialised:
      encoder = dict(shape)
    config = transformers.T5GemmaConfig(
      encoder=encoder, decoder=dict(shape), vocab_size=shape['vocab_size']
    )
    model = transformers.T5GemmaForConditionalGeneration(config)
  else:
    types = ['sliding_attention', 'full_attention'] * num_layers
    shape |= {
      'layer_types': shape.get('layer_types', types[:num_layers]),
      'rope_parameters': {
        'full_attention': {
          'rope_type': 'linear',
          'rope_theta': 1e6,
          'factor': 8.0,
        },
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
      },
    }
    begin, end, soft = image_ids
    vision = {
      'model_type': 'siglip_vision_model',
      'hidden_size': 4,
      'intermediate_size': 4,
      'num_hidden_layers': 1,
      'num_attention_heads': 1,
      'image_size': 16,
      'patch_size': 16,
      'vision_use_head': False,
    }
    encoder = {
      'text_config': dict(shape),
      'vision_config': vision,
      'mm_tokens_per_image': 1,
      'boi_token_index': begin,
      'eoi_token_index': end,
    }
    config = transformers.T5Gemma2Config(
      encoder=encoder, decoder=dict(shape), image_token_index=soft
    )
    model = transformers.T5Gemma2ForConditionalGeneration(config)
  model = model.eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'vision' in name or 'projector' in name:
        continue
      noise = torch.randn_like(weight)
      if 'norm' in name:
        # Large after a block, so that outputs are not only those of the last
        # token's embedding.
        weight.copy_((1.0 if 'post' in name else 0.0) + 0.3 * noise)
      elif not as_initialised:
        scale = 0.3 if 'embed_tokens' in name else 1.0
        weight.copy_(scale * noise * weight.shape[-1] ** -0.5)
    model.model.decoder.norm.weight.add_(0.0 if as_initialised else 2.0)
  return model


def never_written(config):
  """Returns the ids that no output may hold."""
  ids = [config.pad_token_id]
  if config.model_type.startswith('t5gemma'):
    ids.append(config.bos_token_id)
  if config.model_type == 't5gemma2':
    images = config.encoder
    ids += [
      images.boi_token_index,
      images.eoi_token_index,
      images.image_token_index,
    ]
  return ids


def inputs(num_rows=4, length=9, num_ids=NUM_IDS, seed=0, eos=1, pad=0):
  """Returns tokens [num_rows, length], of different lengths, padded."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(max(eos, pad) + 1, num_ids, (num_rows, length))
  if pad != 0:
    tokens[:, 0] = 0  # a token like others there
  for row, end in enumerate(rng.integers(2, length + 1, num_rows)):
    tokens[row, end - 1] = eos
    tokens[row, end:] = pad
  return tokens


def what_it_says(model, tokens, targets, max_new_tokens=MAX_NEW_TOKENS):
  """Returns {'logits', 'greedy', 'beam'} of a model."""
  pad = model.config.pad_token_id
  given = {
    'input_ids': torch.tensor(tokens),
    'attention_mask': torch.tensor(tokens != pad),
  }
  # Pad and others are no outputs of ours, at any place.
  length = {
    'max_new_tokens': max_new_tokens,
    'do_sample': False,
    'suppress_tokens': never_written(model.config),
    'renormalize_logits': True,
  }
  labels = torch.tensor(targets)
  with torch.no_grad():
    return {
      'logits': model(
        **given, labels=labels, decoder_attention_mask=torch.ones_like(labels)
      ).logits.numpy(),
      'greedy': padded(model.generate(**given, **length), max_new_tokens, pad),
      'beam': padded(
        model.generate(
          **given,
          **length,
          num_beams=NUM_BEAMS,
          length_penalty=0.0,
          early_stopping='never',
        ),
        max_new_tokens,
        pad,
      ),
    }


def padded(tokens, length, pad):
  """Removes the start token, and pads to a length."""
  tokens = tokens.numpy()[:, 1:]
  fill = ((0, 0), (0, length - tokens.shape[1]))
  return np.pad(tokens, fill, constant_values=pad)


def main(names):
  for name in names or MODELS:
    kind, changes, saving = MODELS[name]
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    saving = dict(saving)
    model = make(kind, changes, seed=saving.pop('seed', 1))
    ids = {
      'eos': model.config.eos_token_id,
      'pad': model.config.pad_token_id,
    }
    tokens, targets = inputs(**ids), inputs(length=7, seed=1, **ids)
    if dtype := saving.pop('dtype', None):
      model = model.to(dtype)
    model.save_pretrained(FOLDER / name, **saving)
    if dtype:
      model = model.to(torch.float32)
    np.savez(
      FOLDER / name / 'expected.npz',
      inputs=tokens,
      targets=targets,
      **what_it_says(model, tokens, targets),
    )


if __name__ == '__main__':
  main(sys.argv[1:])
