# SPDX-License-Identifier: Apache-2.0
"""Against what transformers wrote and computed, kept in huggingface_fixtures.

`make_huggingface_fixtures.py` made them; `huggingface_live_test.py` asks
transformers itself.
"""

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from gkd_jax.batch import mask_unused_ids
from gkd_jax.checkpoints import pretrained
from gkd_jax.checkpoints.formats import huggingface, tensors
from gkd_jax.data import tokenizer_files
from gkd_jax.decoding import beam_search, sampler
from gkd_jax.evaluation import programs
from gkd_jax.models import registry
from gkd_jax.models.params import abstract_params
from gkd_jax.parallel import partitioning
from gkd_jax.runtime import files
from tests import conftest

pytestmark = pytest.mark.slow  # compiles models

FIXTURES = epath.Path(
  conftest.ROOT / 'tests/checkpoints/formats/huggingface_fixtures'
)
NUM_IDS = 40
NUM_BEAMS = 3
# (name, what its model is, in the words of our config)
ARCHITECTURES = {
  't5_1_0': {'mlp_activations': ('relu',), 'logits_via_embedding': True},
  't5_1_1': {'mlp_activations': ('gelu', 'linear')},
  'byt5': {'num_encoder_layers': 3, 'num_decoder_layers': 1},
  'mt5': {'logits_via_embedding': False, 'scales_decoder_outputs': False},
  'umt5': {'relpos_bias_per_layer': True, 'scales_decoder_outputs': True},
  'sharded': {'num_encoder_layers': 2},
  'bfloat16': {'logits_via_embedding': False},
  'madlad': {'pad_id': 1, 'start_id': 0, 'eos_id': 2},
  'fred': {'pad_id': 0, 'start_id': 0, 'eos_id': 2},
  't5gemma': {
    'version': 1,
    'encoder_emb_dim': 20,
    'num_kv_heads': 4,
    'full_period': 2,
    'final_soft_cap': 30.0,
    'start_id': 2,
  },
  't5gemma2': {
    'version': 2,
    'num_kv_heads': 1,
    'window': 4,
    'rope_factor': 8.0,
    'eoi_id': 38,
    'never_written': (37, 38, 39),
  },
}
each = pytest.mark.parametrize('name', ARCHITECTURES)


@functools.cache
def load(folder, dtype='float32'):
  """Returns a folder's model and parameters, shared by all tests."""
  config, arrays = huggingface.open_folder(epath.Path(folder))
  placement = partitioning.Placement(partitioning.make_mesh())
  model = registry.make_model(config, placement)
  abstract = abstract_params(model)
  return model, tensors.place(arrays, abstract, dtype)


def expected(name):
  return np.load(FIXTURES / name / 'expected.npz')


def write(model, params, decoding, inputs, length):
  write = programs.make_write(
    model,
    decoding,
    max_decode_len=length,
    ids=model.config.special_ids(NUM_IDS),
    seed=0,
    mesh=partitioning.make_mesh(),
  )
  rows = np.arange(len(inputs), dtype=np.int32)
  return write(params, rows, inputs.astype(np.int32))[:, 0]


def until_eos(tokens, eos):
  """Returns rows up to their first EOS; transformers pads in several ways."""
  rows = []
  for row in tokens.tolist():
    rows.append(row[: row.index(eos) + 1] if eos in row else row)
  return rows


@pytest.fixture
def copy(tmp_path):
  """Copies a fixture, so that a test can damage it."""

  def copy(name):
    return epath.Path(shutil.copytree(FIXTURES / name, tmp_path / name))

  return copy


# --- The model ----------------------------------------------------------------


@each
def test_the_shape_is_that_of_the_config(name):
  config, _ = huggingface.open_folder(FIXTURES / name)

  for field, value in ARCHITECTURES[name].items():
    assert getattr(config, field) == value
  num_heads = 4 if name.startswith('t5gemma') else 2
  assert (config.emb_dim, config.head_dim) == (16, 6)
  assert config.num_heads == num_heads


@each
def test_logits_are_those_of_transformers(name):
  model, params = load(FIXTURES / name)
  want = expected(name)

  logits = jax.jit(model.apply)(
    {'params': params},
    jnp.asarray(want['inputs']),
    jnp.asarray(want['targets']),
  )

  # float32 in another order of summation, logits up to 11: seen at most 1e-5.
  tolerance = 1e-4 if name != 'bfloat16' else 5e-4
  np.testing.assert_allclose(logits, want['logits'], atol=tolerance)


@each
def test_greedy_outputs_are_those_of_transformers(name):
  model, params = load(FIXTURES / name)
  want = expected(name)

  written = write(model, params, sampler.GREEDY, want['inputs'], 12)

  assert until_eos(written, model.config.eos_id) == until_eos(
    want['greedy'], model.config.eos_id
  )


@each
def test_beam_outputs_are_those_of_transformers_or_more_probable(name):
  # transformers lets a hypothesis end only if that is among the num_beams best
  # continuations; T5X and we look at twice as many, and may find a better one.
  model, params = load(FIXTURES / name)
  want = expected(name)
  beam = beam_search.BeamConfig(NUM_BEAMS, alpha=0.0)

  written = write(model, params, beam, want['inputs'], 12)

  ours, theirs = (
    until_eos(x, model.config.eos_id) for x in (written, want['beam'])
  )
  differ = [row for row, x in enumerate(ours) if x != theirs[row]]
  assert len(differ) <= len(ours) // 2
  if differ:
    our_score, their_score = (
      log_probs(model, params, want['inputs'], rows, length=12)
      for rows in (ours, theirs)
    )
    assert (our_score > their_score)[differ].all()


def log_probs(model, params, inputs, rows, length):
  """Of outputs, pad and what fills the embedding up being impossible."""
  tokens, weights = np.zeros((2, len(rows), length))
  for i, row in enumerate(rows):
    tokens[i, : len(row)], weights[i, : len(row)] = row, 1.0
  tokens = jnp.int32(tokens)

  @jax.jit
  def score(params, tokens, weights):
    logits = model.apply({'params': params}, inputs, tokens)
    logits = mask_unused_ids(logits, model.config.special_ids(NUM_IDS))
    chosen = jnp.take_along_axis(
      jax.nn.log_softmax(logits), tokens[..., None], axis=-1
    )
    return jnp.sum(chosen[..., 0] * weights, axis=-1, where=weights > 0.0)

  return np.asarray(score(params, tokens, weights))


# --- There and back -----------------------------------------------------------


def save(folder, name, **settings):
  """Loads a fixture's model, and exports it."""
  folder.mkdir()
  config, arrays = huggingface.open_folder(FIXTURES / name)
  params = {ours: tensors.read_all(x) for ours, x in arrays.items()}
  huggingface.save(folder, config, params, **settings)
  return folder


def stored(folder):
  """Returns {name in the file: tensor} of all files of a folder."""
  return {
    name: array
    for file in sorted(folder.glob('*.safetensors'))
    for name, array in safetensors.numpy.load_file(file).items()
  }


@each
def test_a_round_trip_changes_no_bit(name, tmp_path):
  dtype = 'bfloat16' if name == 'bfloat16' else 'float32'

  folder = save(
    epath.Path(tmp_path) / 'out', name, dtype=dtype, source=FIXTURES / name
  )

  was, now = stored(FIXTURES / name), stored(folder)
  assert was.keys() == now.keys()
  for key in was:
    assert was[key].dtype == now[key].dtype
    np.testing.assert_array_equal(was[key], now[key])


@each
def test_what_was_written_is_read_as_the_same_model(name, tmp_path):
  folder = save(epath.Path(tmp_path) / 'out', name, source=FIXTURES / name)

  assert (
    huggingface.open_folder(folder)[0]
    == huggingface.open_folder(FIXTURES / name)[0]
  )


def test_large_models_are_written_in_shards_with_an_index(tmp_path):
  folder = save(epath.Path(tmp_path) / 'out', 't5_1_1', max_shard_bytes=9_000)

  files = sorted(file.name for file in folder.glob('*.safetensors'))
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  assert len(files) > 2
  assert files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  assert {*index['weight_map'].values()} == {*files}
  sizes = [
    sum(x.nbytes for x in safetensors.numpy.load_file(folder / f).values())
    for f in files
  ]
  assert max(sizes) <= 9_000
  assert index['metadata']['total_size'] == sum(sizes)
  assert stored(folder).keys() == stored(FIXTURES / 't5_1_1').keys()


def test_what_the_source_said_beside_the_shape_is_kept(copy, tmp_path):
  source = copy('mt5')
  values = json.loads((source / 'config.json').read_text())
  (source / 'config.json').write_text(
    json.dumps(values | {'task_specific_params': {'x': 1}, 'num_heads': 2})
  )
  (source / 'spiece.model').write_bytes(b'pieces')

  folder = save(epath.Path(tmp_path) / 'out', 'mt5', source=source)

  written = json.loads((folder / 'config.json').read_text())
  assert written['model_type'] == 'mt5'
  assert written['task_specific_params'] == {'x': 1}
  assert (folder / 'spiece.model').read_bytes() == b'pieces'


def test_generation_starts_with_pad_and_ends_with_eos(tmp_path):
  folder = save(epath.Path(tmp_path) / 'out', 't5_1_1')

  assert json.loads((folder / 'generation_config.json').read_text()) == {
    'decoder_start_token_id': 0,
    'eos_token_id': 1,
    'pad_token_id': 0,
  }


# --- Types of numbers ---------------------------------------------------------


def test_numbers_are_cast_on_request_or_kept():
  _, kept = load(FIXTURES / 'bfloat16', dtype=None)
  _, cast = load(FIXTURES / 'bfloat16', dtype='float32')

  leaf, cast_leaf = (
    p['encoder']['encoder_norm']['scale'] for p in (kept, cast)
  )
  assert leaf.dtype == ml_dtypes.bfloat16
  assert cast_leaf.dtype == np.float32
  np.testing.assert_array_equal(leaf.astype(np.float32), cast_leaf)


def test_half_the_bytes_are_written_on_request(tmp_path):
  folder = save(epath.Path(tmp_path) / 'out', 't5_1_1', dtype='bfloat16')

  for name, array in stored(FIXTURES / 't5_1_1').items():
    np.testing.assert_array_equal(
      stored(folder)[name], array.astype(ml_dtypes.bfloat16)
    )


def test_parameters_kept_in_bfloat16_give_the_logits_of_the_same_in_float32():
  want = expected('bfloat16')
  logits = []
  for dtype in (None, 'float32'):
    model, params = load(FIXTURES / 'bfloat16', dtype)
    apply = jax.jit(model.apply)
    logits.append(apply({'params': params}, want['inputs'], want['targets']))

  # A bfloat16 number is a float32 number: nothing is rounded on the way.
  np.testing.assert_array_equal(*logits)


# --- The tokenizer ------------------------------------------------------------


def vocabulary(folder):
  return huggingface.vocabulary(tokenizer_files.read(folder))


def test_a_sentencepiece_model_is_told_by_its_digest(copy):
  folder = copy('t5_1_1')
  (folder / 'spiece.model').write_bytes(b'abc')

  # sha256 of 'abc', FIPS 180-4.
  assert vocabulary(folder) == (
    'model sha256 '
    'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
  )


def test_bytes_are_told_by_the_tokenizers_class(copy):
  folder = copy('byt5')
  (folder / 'tokenizer_config.json').write_text(
    '{"tokenizer_class": "ByT5Tokenizer"}'
  )

  assert vocabulary(folder) == 'ByteVocabulary'


def test_without_a_tokenizer_the_vocabulary_is_not_known():
  assert vocabulary(FIXTURES / 't5_1_1') is None


# --- What is no such folder ---------------------------------------------------


def change_config(folder, **changes):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'model_type': 'bert'}, "a model of type 'bert'; gkd_jax reads the enc"),
    ({'model_type': 'gpt2'}, "a model of type 'gpt2'"),
    ({'is_encoder_decoder': False}, 'encoder or decoder alone'),
    ({'feed_forward_proj': 'gated-mish'}, "feed_forward_proj is 'gated-mish'"),
    ({'layer_norm_epsilon': 1e-5}, 'layer_norm_epsilon is 1e-05'),
  ],
)
def test_another_architecture_is_refused(copy, changes, said):
  folder = copy('t5_1_1')
  change_config(folder, **changes)

  with pytest.raises(ValueError, match=said) as error:
    huggingface.open_folder(folder)
  assert str(folder / 'config.json') in str(error.value)


def test_a_quantized_model_is_refused(copy):
  path = copy('byt5') / 'config.json'
  values = json.loads(path.read_text()) | {'quantization_config': {'bits': 8}}
  path.write_text(json.dumps(values))

  with pytest.raises(ValueError, match='has a quantization_config; '):
    huggingface.open_folder(path.parent)


@pytest.mark.parametrize('file', ['config.json', 'generation_config.json'])
@pytest.mark.parametrize(
  'name, value',
  [('forced_bos_token_id', 7), ('suppress_tokens', [3]), ('bad_words_ids', [])],
)
def test_a_constraint_of_the_outputs_is_refused(copy, file, name, value):
  path = copy('byt5') / file
  path.write_text(
    json.dumps(
      json.loads((path.parent / 'config.json').read_text()) | {name: value}
    )
  )
  if not value:
    huggingface.open_folder(path.parent)
    return

  with pytest.raises(ValueError, match=f'{file}: {name} is .*remove {name}'):
    huggingface.open_folder(path.parent)


def test_a_field_that_is_missing_is_named(copy):
  folder = copy('t5_1_1')
  values = json.loads((folder / 'config.json').read_text())
  del values['d_kv']
  (folder / 'config.json').write_text(json.dumps(values))

  with pytest.raises(ValueError, match="config.json has no 'd_kv'"):
    huggingface.open_folder(folder)


def test_a_config_that_is_no_json_is_refused(copy):
  folder = copy('t5_1_1')
  (folder / 'config.json').write_text('{"d_model": 16,')

  with pytest.raises(ValueError, match='config.json is not valid JSON'):
    huggingface.open_folder(folder)


@pytest.mark.parametrize('size', [4, 60, 9_000])
def test_a_file_that_was_cut_short_is_refused(copy, size):
  folder = copy('t5_1_1')
  file = folder / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:size])

  with pytest.raises(ValueError, match='not a whole safetensors file') as error:
    huggingface.open_folder(folder)
  assert str(file) in str(error.value)


def test_a_pointer_of_git_lfs_is_refused_with_the_way_out(copy):
  folder = copy('t5_1_1')
  (folder / 'model.safetensors').write_bytes(files.LFS_POINTER + b'/spec/v1')

  with pytest.raises(ValueError, match='pointer of Git LFS, .* git lfs pull'):
    huggingface.open_folder(folder)


def test_a_missing_shard_is_named(copy):
  folder = copy('sharded')
  (folder / 'model-00002-of-00006.safetensors').unlink()

  with pytest.raises(
    ValueError, match=r'model-00002-of-00006.safetensors is missing. \S+ places'
  ):
    huggingface.open_folder(folder)


def test_a_shard_that_lacks_what_the_index_places_there_is_refused(copy):
  folder = copy('sharded')
  first, second = sorted(folder.glob('*.safetensors'))[:2]
  first.copy(second, overwrite=True)

  with pytest.raises(
    ValueError, match='lacks .* tensors that model.safetensor'
  ):
    huggingface.open_folder(folder)


def test_pickled_weights_are_refused_with_the_way_out(copy):
  folder = copy('t5_1_1')
  (folder / 'model.safetensors').unlink()
  (folder / 'pytorch_model.bin').write_bytes(b'\x80\x04')

  with pytest.raises(
    ValueError, match='pytorch_model.bin is not read'
  ) as error:
    huggingface.open_folder(folder)
  assert 'save_pretrained' in str(error.value)


def test_a_folder_without_weights_is_refused(copy):
  folder = copy('t5_1_1')
  (folder / 'model.safetensors').unlink()

  with pytest.raises(ValueError, match='but no model.safetensors.$'):
    huggingface.open_folder(folder)


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'num_decoder_layers': 3}, 'the file lacks 14 tensors: decoder.block.2'),
    ({'num_decoder_layers': 1}, 'the file has, unexpectedly, 14 tensors: deco'),
    (
      {'tie_word_embeddings': False, 'feed_forward_proj': 'relu'},
      "feed_forward_proj is 'relu', with 'gated-gelu' in other fields",
    ),
  ],
)
def test_weights_that_do_not_fit_the_config_are_named(copy, changes, said):
  folder = copy('t5_1_1')
  change_config(folder, **changes)

  with pytest.raises(ValueError, match=said):
    huggingface.open_folder(folder)


def test_a_folder_in_a_bucket_is_refused_with_the_way_out():
  with pytest.raises(
    ValueError, match='gcloud storage cp -r gs://bucket/model'
  ):
    huggingface.open_folder(epath.Path('gs://bucket/model'))


def test_an_untied_model_without_a_head_is_refused(copy):
  folder = copy('t5_1_0')
  change_config(folder, tie_word_embeddings=False)

  with pytest.raises(ValueError, match='lacks 1 tensors: lm_head.weight'):
    huggingface.open_folder(folder)


def test_shapes_that_do_not_fit_the_config_are_named(copy):
  folder = copy('t5_1_1')
  change_config(folder, d_kv=5)

  with pytest.raises(ValueError) as error:
    pretrained.open_checkpoint(folder)
  assert str(error.value).splitlines()[1] == (
    '  decoder/layers_0/encoder_decoder_attention/key/kernel: (16, 12) in the '
    'checkpoint, (16, 10) wanted'
  )


@pytest.mark.parametrize(
  'field, value, found',
  [
    ('vocab_size', 41, 40),
    ('d_model', 24, 16),
    ('d_ff', 21, 20),
    ('num_heads', 3, 2),
    ('relative_attention_num_buckets', 16, 32),
  ],
)
def test_a_size_that_is_not_the_weights_is_named(copy, field, value, found):
  folder = copy('t5_1_1')
  change_config(folder, **{field: value})

  with pytest.raises(
    ValueError,
    match=f'config.json: {field} is {value}, but the weights have {found}: ',
  ):
    pretrained.open_checkpoint(folder)


@pytest.mark.parametrize(
  'field, value, said',
  [
    ('d_model', '16', 'd_model must be a whole number, not "16"'),
    ('vocab_size', 40.0, 'vocab_size must be a whole number, not 40.0'),
    ('num_layers', True, 'num_layers must be a whole number, not true'),
    ('d_kv', None, 'd_kv must be a whole number, not null'),
    ('d_ff', [20], 'd_ff must be a whole number, not [20]'),
    ('num_heads', {}, 'num_heads must be a whole number, not {}'),
    (
      'relative_attention_max_distance',
      None,
      'relative_attention_max_distance must be a whole number, not null',
    ),
    ('tie_word_embeddings', 'no', 'tie_word_embeddings must be true or false'),
    ('feed_forward_proj', 1, 'feed_forward_proj must be a text, not 1'),
    ('layer_norm_epsilon', '1e-6', 'layer_norm_epsilon must be a number'),
    ('model_type', ['t5'], 'model_type must be a text, not ["t5"]'),
    ('is_encoder_decoder', 1, 'is_encoder_decoder must be true or false'),
    ('eos_token_id', True, 'eos_token_id is True; gkd_jax needs one id'),
    ('eos_token_id', 40, 'eos_id must be an id of the embedding, from 0 to 39'),
    ('relative_attention_max_distance', 0, 'than twice relpos_max_distance 0'),
    ('dense_act_fn', 'relu', "'gated-relu' in other fields"),
  ],
)
def test_a_field_of_a_wrong_type_or_value_is_named_with_its_file(
  copy, field, value, said
):
  folder = copy('t5_1_1')
  (folder / 'generation_config.json').unlink()
  change_config(folder, **{field: value})

  with pytest.raises(ValueError, match=re.escape(said)) as error:
    pretrained.open_checkpoint(folder)
  assert str(folder / 'config.json') in str(error.value)
  assert 'copy it again' not in str(error.value)


def test_no_decoder_layers_are_no_decoder_layers(copy):
  folder = copy('t5_1_1')
  change_config(folder, num_decoder_layers=0)

  with pytest.raises(ValueError, match='unexpectedly, 29 tensors: decoder.bl'):
    huggingface.open_folder(folder)


def test_null_decoder_layers_are_as_many_as_in_the_encoder(copy):
  folder = copy('t5_1_1')
  change_config(folder, num_decoder_layers=None)

  config, _ = huggingface.open_folder(folder)

  assert config.num_decoder_layers == config.num_encoder_layers


@pytest.mark.parametrize('field', ['torch_dtype', 'dtype'])
def test_weights_of_a_fine_tuned_model_may_be_float16(copy, field):
  folder = copy('t5_1_1')
  was = stored(folder)
  rewrite(
    folder,
    lambda x: x.update({k: v.astype(np.float16) for k, v in x.items()}),
  )
  change_config(folder, **{field: 'float16'})

  _, arrays = huggingface.open_folder(folder)

  embedding = arrays['token_embedder/embedding']
  assert embedding.dtype == np.float16
  np.testing.assert_array_equal(
    tensors.read_all(embedding), was['shared.weight'].astype(np.float16)
  )


def test_a_vocabulary_may_have_grown(copy):
  folder = copy('t5_1_1')

  def grow(arrays):
    for name in ('shared.weight', 'lm_head.weight'):
      arrays[name] = np.pad(arrays[name], ((0, 3), (0, 0)))

  rewrite(folder, grow)
  change_config(folder, vocab_size=43)

  config, arrays = huggingface.open_folder(folder)

  assert config.vocab_size == 43
  assert arrays['decoder/logits_dense/kernel'].shape == (16, 43)


def test_a_head_that_is_no_embedding_unties_what_the_config_ties(copy):
  folder = copy('t5_1_1')
  change_config(folder, tie_word_embeddings=True)

  config, _ = huggingface.open_folder(folder)

  assert not config.logits_via_embedding


# --- Where an old file says the same in another way ---------------------------


def rewrite(folder, change):
  """Saves a folder's tensors again, after change(tensors)."""
  arrays = stored(folder)
  change(arrays)
  safetensors.numpy.save_file(arrays, folder / 'model.safetensors')


def test_a_head_equal_to_the_embedding_is_tied(copy):
  folder = copy('t5_1_0')
  rewrite(folder, lambda x: x.update({'lm_head.weight': x['shared.weight']}))

  config, arrays = huggingface.open_folder(folder)

  assert config.logits_via_embedding
  assert 'decoder/logits_dense/kernel' not in arrays


def test_the_embedding_may_be_saved_under_its_other_names(copy):
  folder = copy('t5_1_1')
  embedding = stored(folder)['shared.weight']
  rewrite(
    folder,
    lambda x: x.update({'encoder.embed_tokens.weight': x.pop('shared.weight')}),
  )

  _, arrays = huggingface.open_folder(folder)

  np.testing.assert_array_equal(
    tensors.read_all(arrays['token_embedder/embedding']), embedding
  )


@pytest.mark.parametrize('name', ['encoder', 'decoder'])
def test_a_second_embedding_is_refused_unless_it_is_the_same(copy, name):
  folder, second = copy('t5_1_1'), f'{name}.embed_tokens.weight'
  rewrite(folder, lambda x: x.update({second: x['shared.weight'].copy()}))
  huggingface.open_folder(folder)

  rewrite(folder, lambda x: x.update({second: x['shared.weight'] + 1}))
  with pytest.raises(ValueError, match=f'{second} differs from shared.weight'):
    huggingface.open_folder(folder)


def test_a_head_is_no_embedding_of_an_untied_model(copy):
  folder = copy('t5_1_1')
  rewrite(folder, lambda x: x.pop('shared.weight'))
  change_config(folder, tie_word_embeddings=False)

  with pytest.raises(ValueError, match='lacks 1 tensors: shared.weight'):
    huggingface.open_folder(folder)


def test_the_table_of_old_t5_that_no_model_uses_is_ignored(copy):
  folder = copy('t5_1_0')
  unused = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias'
  rewrite(
    folder, lambda x: x.update({f'{unused}.weight': np.zeros((32, 2), 'f4')})
  )

  assert (
    huggingface.open_folder(folder)[0]
    == (huggingface.open_folder(FIXTURES / 't5_1_0')[0])
  )


def test_a_config_of_transformers_4_scales_where_it_ties(copy):
  # It has no scale_decoder_outputs.
  scales = []
  for name, tie in (('t5_1_0', True), ('t5_1_1', False)):
    folder = copy(name)
    values = json.loads((folder / 'config.json').read_text())
    del values['scale_decoder_outputs']
    (folder / 'config.json').write_text(
      json.dumps(values | {'tie_word_embeddings': tie})
    )
    scales.append(huggingface.open_folder(folder)[0].scales_decoder_outputs)

  assert scales == [True, False]


def test_an_index_without_a_map_is_refused(copy):
  folder = copy('sharded')
  (folder / 'model.safetensors.index.json').write_text('{}')

  with pytest.raises(ValueError, match='index.json has no weight_map'):
    huggingface.open_folder(folder)


def test_a_config_that_is_no_object_is_refused(copy):
  folder = copy('t5_1_1')
  (folder / 'config.json').write_text('[]')

  with pytest.raises(ValueError, match='config.json holds list'):
    huggingface.open_folder(folder)


def test_a_tokenizer_without_its_model_is_at_least_no_byte_tokenizer(copy):
  folder = copy('t5_1_1')
  (folder / 'tokenizer_config.json').write_text(
    '{"tokenizer_class": "T5Tokenizer"}'
  )

  assert vocabulary(folder) == 'SentencePieceVocabulary'
