# SPDX-License-Identifier: Apache-2.0
"""Folders of T5Gemma as they are published and saved, with other names.

What the models compute: huggingface_test.py.
"""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from gkd_jax.checkpoints import export, pretrained
from gkd_jax.checkpoints.formats import huggingface, tensors
from tests import conftest
from tests.checkpoints.formats.huggingface_test import (
  FIXTURES,
  change_config,
  rewrite,
  stored,
)

VERSIONS = pytest.mark.parametrize('name', ['t5gemma', 't5gemma2'])
PREFIX = 'model.encoder.'
HEAD = 'lm_head.out_proj.weight'


@pytest.fixture
def copy(tmp_path):
  """Copies a fixture, so that a test can change it."""

  def copy(name):
    return epath.Path(shutil.copytree(FIXTURES / name, tmp_path / name))

  return copy


def change_stack(folder, stack, **changes):
  """Changes fields of a stack in config.json; None removes one."""
  path = folder / 'config.json'
  values = json.loads(path.read_text())
  own = values[stack]
  if 'text_config' in own:
    own = own['text_config']
  own |= {name: value for name, value in changes.items() if value is not None}
  for name, value in changes.items():
    if value is None:
      del own[name]
  path.write_text(json.dumps(values))


def read(folder):
  """Returns the config and the arrays of a folder."""
  config, arrays = huggingface.open_folder(folder)
  return config, {name: tensors.read_all(x) for name, x in arrays.items()}


def assert_the_same(folder, name):
  config, arrays = read(folder)
  want_config, want = read(FIXTURES / name)
  assert config == want_config
  assert arrays.keys() == want.keys()
  for key in want:
    np.testing.assert_array_equal(arrays[key], want[key])


# --- Names of tensors ---------------------------------------------------------


def test_the_text_model_may_have_a_prefix_of_its_own(copy):
  folder = copy('t5gemma2')

  def add_prefix(arrays):
    for name in [*arrays]:
      is_text = name.startswith(PREFIX) and not name.startswith(
        (f'{PREFIX}vision', f'{PREFIX}multi')
      )
      if is_text:
        longer = name.replace(PREFIX, f'{PREFIX}text_model.')
        arrays[longer] = arrays.pop(name)

  rewrite(folder, add_prefix)

  assert_the_same(folder, 't5gemma2')


@VERSIONS
def test_tied_tensors_may_have_one_of_their_names_or_all(copy, name):
  folder = copy(name)
  tied = {
    't5gemma': 'model.decoder.embed_tokens.weight',
    't5gemma2': 'model.encoder.embed_tokens.weight',
  }[name]
  rewrite(folder, lambda x: x.update({HEAD: x[tied]}))
  assert_the_same(folder, name)

  rewrite(folder, lambda x: x.pop(tied))
  assert_the_same(folder, name)


@VERSIONS
def test_a_head_of_its_own_is_refused(copy, name):
  folder = copy(name)
  table = 'model.decoder.embed_tokens.weight'
  rewrite(
    folder,
    lambda x: x.update(
      {
        table: x.get(table, x[f'{PREFIX}embed_tokens.weight']),
        HEAD: x[f'{PREFIX}embed_tokens.weight'] + 1,
      }
    ),
  )

  with pytest.raises(ValueError, match=f'{HEAD} differs from model'):
    huggingface.open_folder(folder)


@VERSIONS
def test_a_resized_vocabulary_must_be_that_of_the_config(copy, name):
  folder = copy(name)
  change_stack(folder, 'decoder', vocab_size=37)
  change_stack(folder, 'encoder', vocab_size=37)

  with pytest.raises(ValueError, match='is 37, but the weights have 40'):
    huggingface.open_folder(folder)


# --- Fields of config.json ----------------------------------------------------


@VERSIONS
def test_old_fields_of_the_rotary_positions_are_read(copy, name):
  folder = copy(name)
  old = {'rope_theta': 10_000.0}
  if name == 't5gemma2':
    old = {
      'rope_theta': 1_000_000.0,
      'rope_local_base_freq': 10_000.0,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
    }
  for stack in ('encoder', 'decoder'):
    change_stack(folder, stack, rope_parameters=None, **old)

  assert_the_same(folder, name)


def test_fields_that_are_missing_have_the_defaults_of_transformers(copy):
  folder = copy('t5gemma')
  for stack in ('encoder', 'decoder'):
    change_stack(
      folder,
      stack,
      sliding_window=None,
      layer_types=None,
      final_logit_softcapping=None,
      query_pre_attn_scalar=None,
    )

  config, _ = huggingface.open_folder(folder)

  assert (config.window, config.full_period) == (4096, 2)
  assert (config.final_soft_cap, config.query_pre_attn_scalar) == (30.0, 256)


def test_the_pattern_of_layers_may_be_a_number(copy):
  folder = copy('t5gemma2')
  for stack in ('encoder', 'decoder'):
    change_stack(folder, stack, layer_types=None, _sliding_window_pattern=2)

  assert_the_same(folder, 't5gemma2')


@pytest.mark.parametrize(
  ('stack', 'changes', 'said'),
  [
    ('decoder', {'rms_norm_eps': 1e-5}, 'rms_norm_eps of the decoder is 1e-05'),
    ('encoder', {'hidden_activation': 'silu'}, 'hidden_activation of the enc'),
    ('decoder', {'attention_bias': True}, 'attention_bias of the decoder'),
    ('encoder', {'sliding_window': 5}, 'window is 5 in the encoder and 4 in'),
    ('encoder', {'intermediate_size': 24}, 'mlp_dim is 24 in the encoder and'),
    (
      'decoder',
      {'layer_types': [*2 * ['full_attention'], 'sliding_attention']},
      'layer_types of the decoder is .* as every n-th layer',
    ),
    (
      'decoder',
      {'rope_parameters': {'full_attention': {'rope_type': 'yarn'}}},
      "rope_type is 'yarn'; gkd_jax supports default, linear",
    ),
    ('encoder', {'num_hidden_layers': 10**6}, 'num_hidden_layers of the enc'),
    ('encoder', {'num_key_value_heads': 3}, 'num_kv_heads is 3 in the enc'),
    ('decoder', {'head_dim': 'x'}, 'head_dim must be'),
  ],
)
def test_another_architecture_is_refused(copy, stack, changes, said):
  folder = copy('t5gemma2')
  change_stack(folder, stack, **changes)

  with pytest.raises(ValueError, match=said) as error:
    huggingface.open_folder(folder)
  assert str(error.value).startswith(str(folder / 'config.json'))


def test_several_eos_ids_are_refused_with_the_way_out(copy):
  folder = copy('t5gemma')
  path = folder / 'generation_config.json'
  values = json.loads(path.read_text()) | {'eos_token_id': [1, 7]}
  path.write_text(json.dumps(values))

  with pytest.raises(ValueError, match=r'is \[1, 7\]; .*ends the targets'):
    huggingface.open_folder(folder)


def test_decoding_starts_with_another_id_if_the_files_say_so(copy):
  folder = copy('t5gemma')
  change_config(folder, decoder_start_token_id=5)

  config, _ = huggingface.open_folder(folder)

  assert config.special_ids(40).never_written == (0, 5)


# --- Writing ------------------------------------------------------------------


@pytest.mark.slow  # compiles the copies of the parameters
def test_the_image_encoder_goes_from_a_folder_to_its_export(tmp_path):
  out = tmp_path / 'out'

  export.export(str(FIXTURES / 't5gemma2'), 'huggingface', str(out))

  was, now = stored(FIXTURES / 't5gemma2'), stored(epath.Path(out))
  assert was.keys() == now.keys()
  assert any('vision_tower' in name for name in now)
  for name in was:
    np.testing.assert_array_equal(was[name], now[name])


@pytest.mark.slow
def test_an_export_of_a_run_says_that_the_image_encoder_is_left_out(
  tmp_path, capsys
):
  config, _ = read(FIXTURES / 't5gemma2')
  conftest.save_model(tmp_path / 'run', config)
  pretrained.keep_side_files([FIXTURES / 't5gemma2'], tmp_path / 'run')
  out = epath.Path(tmp_path) / 'out'

  export.export(str(tmp_path / 'run'), 'huggingface', str(out))

  assert (
    'image encoder of this T5Gemma 2 is left out' in capsys.readouterr().err
  )
  assert not any('vision_tower' in name for name in stored(out))
  values = json.loads((out / 'config.json').read_text())
  was = json.loads((FIXTURES / 't5gemma2' / 'config.json').read_text())
  assert values['encoder']['vision_config'] == was['encoder']['vision_config']
  assert huggingface.open_folder(out)[0] == config


def test_a_t5gemma_is_not_exported_for_t5x(tmp_path):
  with pytest.raises(ValueError, match='T5X has T5 alone.*huggingface'):
    export.export(str(FIXTURES / 't5gemma'), 't5x', str(tmp_path / 'out'))


@VERSIONS
def test_shards_have_an_index_of_all_tensors(name, tmp_path):
  config, arrays = read(FIXTURES / name)
  folder = epath.Path(tmp_path)

  huggingface.save(
    folder, config, arrays, source=FIXTURES / name, max_shard_bytes=30_000
  )

  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  assert index['weight_map'].keys() == stored(FIXTURES / name).keys()
  for tensor, file in index['weight_map'].items():
    assert tensor in safetensors.numpy.load_file(folder / file)
  assert_the_same(folder, name)
