# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from gkd_jax.checkpoints import export, pretrained
from gkd_jax.models.params import abstract_params
from gkd_jax.models.t5 import T5, T5Config
from gkd_jax.parallel import partitioning
from tests import conftest

pytestmark = pytest.mark.slow  # compiles models

CONFIG = T5Config(264, 12, 2, 4, 10, 1, 1)
HUGGING_FACE = conftest.ROOT / 'tests/checkpoints/formats/huggingface_fixtures'


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  conftest.save_model(folder, CONFIG)
  return folder


def params_of(path):
  found = pretrained.open_checkpoint(path)
  placement = partitioning.Placement(partitioning.make_mesh())
  return found.load(abstract_params(T5(found.config, placement)), None)


@pytest.mark.parametrize(
  'export_format, called', [('huggingface', 'Hugging Face'), ('t5x', 'T5X')]
)
def test_a_run_comes_back_from_another_format_as_it_was(
  run_dir, tmp_path, export_format, called
):
  folder = tmp_path / conftest.ODD_NAME

  export.export(str(run_dir), export_format, str(folder))

  found = pretrained.open_checkpoint(folder)
  assert found.format.startswith(called)
  assert found.config == CONFIG
  jax.tree.map(
    np.testing.assert_array_equal,
    params_of(folder),
    params_of(run_dir),
  )


def test_parameters_can_be_written_in_bfloat16(run_dir, tmp_path):
  export.export(str(run_dir), 'huggingface', str(tmp_path / 'out'), 'bfloat16')

  assert pretrained.open_checkpoint(tmp_path / 'out').dtype == 'bfloat16'


def test_a_folder_of_another_system_can_be_exported_too(tmp_path):
  export.export(
    str(HUGGING_FACE / 'sharded'), 'huggingface', str(tmp_path / 'out')
  )

  jax.tree.map(
    np.testing.assert_array_equal,
    params_of(tmp_path / 'out'),
    params_of(HUGGING_FACE / 'sharded'),
  )


def test_the_tokenizer_goes_from_the_checkpoint_to_the_run_to_the_export(
  run_dir, tmp_path
):
  given = shutil.copytree(HUGGING_FACE / 'mt5', tmp_path / 'given')
  (given / 'spiece.model').write_bytes(b'pieces')
  run = shutil.copytree(run_dir, tmp_path / 'run')

  folder = pretrained.open_checkpoint(given).folder
  pretrained.keep_side_files([run / 'checkpoint_0', folder], run)
  export.export(str(run), 'huggingface', str(tmp_path / 'out'))

  assert (tmp_path / 'out' / 'spiece.model').read_bytes() == b'pieces'


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'export_format': 'pytorch'}, 'EXPORT_FORMAT must be one of huggingface'),
    ({'dtype': 'float16'}, "EXPORT_DTYPE must be 'float32', 'bfloat16' or"),
    ({'checkpoint_path': 'nowhere'}, 'nowhere is not there'),
  ],
)
def test_bad_settings_are_refused_before_anything_is_written(
  run_dir, tmp_path, changes, said
):
  settings = {
    'checkpoint_path': str(run_dir),
    'export_format': 'huggingface',
    'output_dir': str(tmp_path / 'out'),
  }

  with pytest.raises(ValueError, match=said):
    export.export(**(settings | changes))
  assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(run_dir, tmp_path):
  (tmp_path / 'mine').write_text('precious')

  with pytest.raises(ValueError, match='/mine exists and would be overwritten'):
    export.export(str(run_dir), 'huggingface', str(tmp_path))
  assert [path.name for path in tmp_path.iterdir()] == ['mine']


@pytest.mark.parametrize('export_format', ['huggingface', 't5x'])
def test_an_export_can_replace_an_earlier_one(run_dir, tmp_path, export_format):
  export.export(str(run_dir), export_format, str(tmp_path))
  (tmp_path / 'mine').write_text('precious')
  (tmp_path / 'model-00001-of-00002.safetensors').touch()  # of a larger one

  export.export(
    str(run_dir), export_format, str(tmp_path), 'bfloat16', overwrite=True
  )

  assert pretrained.open_checkpoint(tmp_path).dtype == 'bfloat16'
  assert (tmp_path / 'mine').read_text() == 'precious'
  assert not list(tmp_path.glob('model-*'))
  assert not list(tmp_path.parent.glob('*.partial'))


def test_a_byte_model_gets_the_tokenizer_of_bytes(run_dir, tmp_path):
  export.export(
    str(run_dir / 'checkpoint_0'), 'huggingface', str(tmp_path / 'out')
  )

  # 264 ids: 3 special ones, 256 bytes, and 5 to fill up.
  assert json.loads((tmp_path / 'out/tokenizer_config.json').read_text()) == {
    'tokenizer_class': 'ByT5Tokenizer',
    'extra_ids': 5,
  }
  found = pretrained.open_checkpoint(tmp_path / 'out')
  assert found.vocabulary == 'ByteVocabulary'


def test_the_type_of_numbers_is_kept(tmp_path):
  export.export(
    str(HUGGING_FACE / 'bfloat16'), 'huggingface', str(tmp_path / 'out')
  )

  assert pretrained.open_checkpoint(tmp_path / 'out').dtype == 'bfloat16'


def test_a_model_that_t5x_does_not_have_is_refused(tmp_path):
  config = T5Config(264, 12, 2, 4, 10, 1, 1, mlp_activations=('silu', 'linear'))
  conftest.save_model(tmp_path / 'run', config)

  with pytest.raises(ValueError, match='take a gate to be GELU'):
    export.export(str(tmp_path / 'run'), 't5x', str(tmp_path / 'out'))
  assert [path.name for path in tmp_path.iterdir()] == ['run']


def test_a_model_that_transformers_does_not_have_is_refused(tmp_path):
  config = T5Config(264, 12, 2, 4, 10, 1, 1, mlp_activations=('silu',))
  conftest.save_model(tmp_path / 'run', config)

  with pytest.raises(ValueError, match='transformers has no T5 with'):
    export.export(str(tmp_path / 'run'), 'huggingface', str(tmp_path / 'out'))
  assert [path.name for path in tmp_path.iterdir()] == ['run']


def test_a_students_config_says_nothing_of_its_teachers(run_dir, tmp_path):
  # The student has the tokenizer of its teacher, a relu model.
  pretrained.keep_side_files(
    [epath.Path(HUGGING_FACE / 't5_1_0')], tmp_path / 'run'
  )
  shutil.copytree(run_dir / 'checkpoint_0', tmp_path / 'run' / 'checkpoint_0')

  export.export(str(tmp_path / 'run'), 'huggingface', str(tmp_path / 'out'))

  values = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert values['feed_forward_proj'] == 'gated-gelu'
  assert not {'is_gated_act', 'dense_act_fn'} & values.keys()


def test_a_bucket_is_refused_for_hugging_face(run_dir):
  with pytest.raises(ValueError, match='written to a local disk only'):
    export.export(str(run_dir), 'huggingface', 'gs://bucket/model')


def test_a_file_is_not_overwritten(run_dir, tmp_path):
  (tmp_path / 'out').write_text('precious')

  with pytest.raises(ValueError, match='is a file, not a folder'):
    export.export(str(run_dir), 'huggingface', str(tmp_path / 'out'))
