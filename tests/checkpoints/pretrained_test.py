# SPDX-License-Identifier: Apache-2.0
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from gkd_jax.checkpoints import pretrained
from gkd_jax.models import registry
from gkd_jax.models.params import abstract_params
from gkd_jax.models.registry import SIZES
from gkd_jax.models.t5 import T5, T5Config
from gkd_jax.parallel import partitioning
from tests import conftest, tiny

CONFIG = T5Config(264, 12, 2, 4, 10, 1, 1)
BYTES = 'ByteVocabulary 259 ids'
MESH = partitioning.make_mesh()
PLACEMENT = partitioning.Placement(MESH)
HUGGING_FACE = conftest.ROOT / 'tests/checkpoints/formats/huggingface_fixtures'


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  conftest.save_model(folder, CONFIG)
  return folder


def load(path, config=CONFIG, vocabulary=BYTES, dtype=None):
  source = pretrained.open_checkpoint(path)
  pretrained.check_fits(source, vocabulary, tiny.special_ids(33), config)
  return source.load(abstract_params(T5(config, PLACEMENT)), dtype)


# --- What a path means --------------------------------------------------------


def test_a_run_is_found_out(run_dir):
  found = pretrained.open_checkpoint(run_dir)

  assert found.format == 'gkd_jax'
  assert found.config == CONFIG
  assert found.vocabulary == BYTES
  assert found.folder == epath.Path(run_dir / 'checkpoint_0')


def test_a_hugging_face_folder_is_found_out():
  found = pretrained.open_checkpoint(HUGGING_FACE / 'umt5')

  assert found.format == 'Hugging Face'
  assert found.dtype == 'float32'
  assert found.config.relpos_bias_per_layer
  assert found.vocabulary is None


def test_it_is_described_in_one_line(run_dir):
  assert str(pretrained.open_checkpoint(run_dir)) == (
    'T5 1.1 of width 12 with 1 + 1 layers, 8,420 float32 parameters, gkd_jax: '
    f'{run_dir}/checkpoint_0'
  )


@pytest.mark.parametrize('size', SIZES)
def test_a_published_size_is_called_by_its_name(size):
  config = dataclasses.replace(SIZES[size], dtype='bfloat16')

  assert registry.describe(config) == size


def test_a_published_size_with_another_vocabulary_is_called_by_its_name():
  config = dataclasses.replace(SIZES['t5_1_1_small'], vocab_size=384)

  assert registry.describe(config) == 't5_1_1_small'


@pytest.mark.parametrize('content', [None, 'README.md'])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, content):
  if content:
    (tmp_path / content).write_text('hello')

  with pytest.raises(ValueError, match='holds no checkpoint. Give a run'):
    pretrained.open_checkpoint(tmp_path)


def test_a_path_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(ValueError, match='nowhere is not there. Give a run'):
    pretrained.open_checkpoint(tmp_path / 'nowhere')


def test_the_setting_that_names_a_wrong_path_is_said(tmp_path):
  nowhere = tmp_path / 'nowhere'

  with pytest.raises(ValueError, match='^INITIAL_CHECKPOINT_PATH: .*nowhere'):
    pretrained.config_of(nowhere)
  with pytest.raises(ValueError, match='^TEACHER_CHECKPOINT_PATH: .*nowhere'):
    pretrained.open_checkpoint(nowhere, 'TEACHER_CHECKPOINT_PATH')


# --- Whether it fits ----------------------------------------------------------


@pytest.mark.parametrize(
  'changes', [{'dropout_rate': 0.1}, {'dtype': 'bfloat16'}, {'remat': True}]
)
def test_what_does_not_change_the_parameters_may_differ(run_dir, changes):
  changed = load(run_dir, dataclasses.replace(CONFIG, **changes))

  jax.tree.map(np.testing.assert_array_equal, changed, load(run_dir))


def test_another_vocabulary_is_refused_with_both(run_dir):
  with pytest.raises(ValueError, match='does not fit the model') as error:
    load(run_dir, vocabulary='SentencePieceVocabulary 259 ids')

  assert str(error.value).splitlines()[1:] == [
    '  vocabulary: ByteVocabulary 259 ids in the checkpoint, '
    'SentencePieceVocabulary 259 ids wanted'
  ]
  assert str(run_dir / 'checkpoint_0') in str(error.value)


def test_another_architecture_is_refused_with_what_differs(run_dir):
  with pytest.raises(ValueError) as error:
    load(
      run_dir,
      dataclasses.replace(CONFIG, mlp_dim=11, logits_via_embedding=True),
    )

  assert str(error.value).splitlines()[1:] == [
    '  mlp_dim: 10 in the checkpoint, 11 in STUDENT',
    '  logits_via_embedding: False in the checkpoint, True in STUDENT',
  ]


def test_the_tokenizer_of_a_hugging_face_folder_must_be_the_tasks(tmp_path):
  folder = shutil.copytree(HUGGING_FACE / 't5_1_1', tmp_path / 'model')
  (folder / 'spiece.model').write_bytes(b'pieces')
  config = pretrained.open_checkpoint(folder).config

  with pytest.raises(
    ValueError, match='vocabulary: model sha256 [0-9a-f]{64} '
  ):
    load(folder, config, BYTES)


def test_a_model_with_fewer_ids_than_the_task_is_refused():
  source = pretrained.open_checkpoint(HUGGING_FACE / 't5_1_1')

  with pytest.raises(ValueError, match='embeds 40 ids, but .* has 259'):
    pretrained.check_fits(source, BYTES, tiny.special_ids(259))


def test_a_model_may_have_more_ids_than_the_task():
  source = pretrained.open_checkpoint(HUGGING_FACE / 't5_1_1')

  pretrained.check_fits(source, 'x', tiny.special_ids(33))

  assert source.config.vocab_size == 40


# --- Loading ------------------------------------------------------------------


@pytest.mark.parametrize(
  'name, kept', [('t5_1_1', 'float32'), ('bfloat16', 'bfloat16')]
)
@pytest.mark.parametrize('dtype', [None, 'float32', 'bfloat16'])
def test_parameters_come_in_the_type_that_is_asked_for(name, kept, dtype):
  _, params = pretrained.load_model(HUGGING_FACE / name, dtype)

  assert {x.dtype for x in jax.tree.leaves(params)} == {
    jnp.dtype(dtype or kept)
  }


def test_a_checkpoint_that_is_removed_before_it_is_read_is_named(
  run_dir, tmp_path
):
  shutil.copytree(run_dir, tmp_path / 'run')
  source = pretrained.open_checkpoint(tmp_path / 'run')
  shutil.rmtree(source.folder)

  with pytest.raises(ValueError, match='checkpoint_0 was removed while it was'):
    source.load(abstract_params(T5(CONFIG, PLACEMENT)), None)


def test_our_own_parameters_come_in_the_type_that_is_asked_for(run_dir):
  half = load(run_dir, dtype='bfloat16')

  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)),
    half,
    load(run_dir),
  )


# --- A student of the checkpoint's shape --------------------------------------


def test_a_students_shape_is_its_checkpoints(run_dir):
  config = pretrained.config_of(run_dir, dropout_rate=0.1)

  assert config == dataclasses.replace(CONFIG, dropout_rate=0.1)


def test_what_the_checkpoint_says_cannot_be_chosen(run_dir):
  with pytest.raises(ValueError, match='says what emb_dim is; only dropout'):
    pretrained.config_of(run_dir, emb_dim=3)
