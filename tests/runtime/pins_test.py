# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import shutil

import pytest
from etils import epath

from gkd_jax.runtime import pins


@pytest.fixture
def large(tmp_path) -> pathlib.Path:
  """A file that is sampled: 3 MiB of zeros."""
  path = tmp_path / 'checkpoint' / 'weights'
  path.parent.mkdir()
  path.write_bytes(bytes(3 * 2**20))
  return path


def pin(path: pathlib.Path, names=('',)) -> dict[str, pins.Pin]:
  return {'TEACHER': pins.of_checkpoint(str(path), epath.Path(path), names)}


def test_a_copy_has_the_same_pin(large, tmp_path):
  was = pin(large.parent)
  shutil.copytree(large.parent, tmp_path / 'copy')
  os.utime(tmp_path / 'copy' / 'weights', (0, 0))

  assert pins.differences(was, pin(tmp_path / 'copy')) == []


@pytest.mark.parametrize('place', [0, 3 * 2**20 - 1])
def test_a_change_at_either_end_of_a_large_file_differs(large, place):
  was = pin(large.parent)
  with large.open('r+b') as file:
    file.seek(place)
    file.write(b'x')

  (line,) = pins.differences(was, pin(large.parent))

  assert f'TEACHER: {large} was 3,145,728 bytes, sampled ' in line


def test_a_change_of_size_differs(large):
  was = pin(large.parent)
  os.truncate(large, 2**21)

  (line,) = pins.differences(was, pin(large.parent))

  assert ', is 2,097,152 bytes, sampled ' in line


def test_any_changed_byte_of_a_data_file_differs(large):
  was = {'data': pins.of_files([str(large)])}
  with large.open('r+b') as file:
    file.seek(1_000_001)  # not sampled in a checkpoint
    file.write(b'x')

  (line,) = pins.differences(was, {'data': pins.of_files([str(large)])})

  assert f'data: {large} was ' in line


def test_a_file_may_be_copied_to_another_folder(large, tmp_path):
  was = {'VOCABULARY_PATH': pins.of_file(str(large))}
  copy = shutil.copy(large, tmp_path / 'weights')

  assert not pins.differences(was, {'VOCABULARY_PATH': pins.of_file(str(copy))})
  assert pins.changes_since([was]) == []


def test_files_that_come_and_go_differ(tmp_path):
  (tmp_path / 'a').touch()
  was = {'data': pins.of_files([str(tmp_path)])}
  (tmp_path / 'a').rename(tmp_path / 'b')

  lines = pins.differences(was, {'data': pins.of_files([str(tmp_path)])})

  assert [line.split(' was ')[0] for line in lines] == [
    f'data: {tmp_path}/a',
    f'data: {tmp_path}/b',
  ]
  assert lines[0].endswith('is absent')


def test_files_that_no_model_is_read_from_may_change(large):
  was = pin(large.parent, ['weights', 'config'])
  (large.parent / 'README').touch()

  assert pins.differences(was, pin(large.parent, ['weights', 'config'])) == []


# --- A run --------------------------------------------------------------------


def test_a_run_keeps_the_pins_of_its_start(tmp_path, large):
  assert pins.read(tmp_path) is None
  was = pin(large.parent)
  pins.save(tmp_path, was)

  assert pins.read(tmp_path) == was


def test_a_run_with_other_files_is_refused(tmp_path):
  was = {'data': pins.Pin({f'{i}.jsonl': '1 bytes, ab' for i in range(7)})}

  pins.check_same(tmp_path, None, was)
  pins.check_same(tmp_path, was, was)
  with pytest.raises(ValueError) as error:
    pins.check_same(tmp_path, was, {})

  text = str(error.value)
  assert 'data: 0.jsonl was 1 bytes, ab, is absent\n' in text
  assert '  and 2 more\n' in text and 'use another MODEL_DIR' in text


def test_damaged_pins_are_refused(tmp_path):
  (tmp_path / 'pins.json').write_text('{"data": 3}')

  with pytest.raises(ValueError, match=r'pins.json is damaged .* or remove it'):
    pins.read(tmp_path)


# --- Runs that are trained on -------------------------------------------------


@pytest.fixture
def live(tmp_path) -> pathlib.Path:
  """A run with two checkpoints."""
  for step in (2, 10):
    (tmp_path / 'run' / f'checkpoint_{step}').mkdir(parents=True)
    (tmp_path / 'run' / f'checkpoint_{step}' / 'weights').write_text(f'{step}')
  return tmp_path / 'run'


def pin_newest(run: pathlib.Path) -> dict[str, pins.Pin]:
  folder = epath.Path(run / pins.newest_step(str(run)))
  return {'TEACHER': pins.of_checkpoint(str(run), folder, [''])}


def test_a_run_goes_on_with_the_checkpoint_it_started_with(live):
  was = pin_newest(live)
  assert was['TEACHER'].step == 'checkpoint_10'
  (live / 'checkpoint_11').mkdir()

  path = pins.pinned_path(was, 'TEACHER', str(live))

  assert path == f'{live}/checkpoint_10'
  assert pins.pinned_path(None, 'TEACHER', str(live)) == str(live)
  assert pins.pinned_path(was, 'OTHER', str(live)) == str(live)
  assert pins.pinned_path(was, 'TEACHER', None) is None


def test_a_checkpoint_that_is_gone_is_refused(live):
  was = pin_newest(live)
  shutil.rmtree(live / 'checkpoint_10')

  with pytest.raises(ValueError) as error:
    pins.pinned_path(was, 'TEACHER', str(live))

  assert f'TEACHER: this run was started with checkpoint_10 of {live}' in str(
    error.value
  )
  assert 'the newest is checkpoint_2' in str(error.value)


def test_a_checkpoint_that_is_named_itself_has_no_step(live):
  folder = live / 'checkpoint_2'

  made = pins.of_checkpoint(str(folder), epath.Path(folder), [''])

  assert made.step is None and [*made.files] == ['weights']


# --- What has changed since ---------------------------------------------------


def test_all_changes_since_are_found(live, large):
  data = {'data': pins.of_files([str(large)])}
  teacher = pin_newest(live)
  assert pins.changes_since([data, teacher]) == []

  large.write_text('shorter')
  (live / 'checkpoint_11').mkdir()
  changed, newer = pins.changes_since([data, teacher, teacher])

  assert f'data: {large} was 3,145,728 bytes' in changed
  assert newer == (
    f'TEACHER: of {live} checkpoint_10 was used; its newest is checkpoint_11'
  )


def test_what_is_removed_has_changed(live, large):
  was = [{'data': pins.of_files([str(large)])}, pin_newest(live)]
  shutil.rmtree(live)
  large.unlink()

  gone, newest = pins.changes_since(was)

  assert gone.endswith('is absent') and newest.endswith('its newest is absent')
