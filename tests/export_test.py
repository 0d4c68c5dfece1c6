# SPDX-License-Identifier: Apache-2.0
import shutil

import jax
import numpy as np
import pytest

from gkd_jax import export, partitioning, pretrained
from gkd_jax.model import T5, T5Config, abstract_params
from tests import conftest

CONFIG = T5Config(264, 12, 2, 4, 10, 1, 1)
HUGGING_FACE = conftest.ROOT / 'tests/interop/huggingface_fixtures'


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory, compile_once):
  folder = tmp_path_factory.mktemp('run')
  conftest.save_model(folder, CONFIG)
  return folder


def params_of(path):
  found = pretrained.open_checkpoint(path)
  mesh = partitioning.make_mesh()
  return found.load(abstract_params(T5(found.config), mesh), None)


@pytest.mark.parametrize(
  'export_format, called', [('huggingface', 'Hugging Face'), ('t5x', 'T5X')]
)
def test_a_run_comes_back_from_another_format_as_it_was(
  run_dir, tmp_path, export_format, called
):
  export.export(str(run_dir), export_format, str(tmp_path / 'out'))

  found = pretrained.open_checkpoint(tmp_path / 'out')
  assert found.format.startswith(called)
  assert found.config == CONFIG
  jax.tree.map(
    np.testing.assert_array_equal,
    params_of(tmp_path / 'out'),
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

  pretrained.keep_side_files(pretrained.open_checkpoint(given), run_dir)
  export.export(str(run_dir), 'huggingface', str(tmp_path / 'out'))

  assert (tmp_path / 'out' / 'spiece.model').read_bytes() == b'pieces'


@pytest.mark.parametrize(
  'changes, said',
  [
    ({'export_format': 'pytorch'}, 'EXPORT_FORMAT must be one of huggingface'),
    ({'dtype': 'float16'}, "EXPORT_DTYPE must be 'float32' or 'bfloat16'"),
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

  with pytest.raises(ValueError, match='OUTPUT_DIR .* is not empty'):
    export.export(str(run_dir), 'huggingface', str(tmp_path))
  assert [path.name for path in tmp_path.iterdir()] == ['mine']
