# SPDX-License-Identifier: Apache-2.0
import pytest
from etils import epath

from gkd_jax.checkpoints import checksums


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'd').mkdir()
  (tmp_path / 'd' / 'array').write_bytes(bytes(range(256)))
  (tmp_path / 'empty').touch()
  checksums.write(epath.Path(tmp_path))
  return tmp_path


def test_whole_files_are_accepted(folder):
  checksums.check(epath.Path(folder))
  checksums.write(epath.Path(folder))  # not of its own file
  checksums.check(epath.Path(folder))


@pytest.mark.parametrize('place', [0, 100, 255])
def test_any_flipped_bit_is_found(folder, place):
  content = bytearray((folder / 'd' / 'array').read_bytes())
  content[place] ^= 1
  (folder / 'd' / 'array').write_bytes(content)

  with pytest.raises(ValueError, match=f'{folder}/d/array is damaged'):
    checksums.check(epath.Path(folder))


def test_a_missing_file_is_found(folder):
  (folder / 'empty').unlink()

  with pytest.raises(ValueError, match='/empty is damaged'):
    checksums.check(epath.Path(folder))


def test_a_checkpoint_without_checksums_is_accepted(folder):
  (folder / 'crc32.json').unlink()
  (folder / 'empty').unlink()

  checksums.check(epath.Path(folder))
