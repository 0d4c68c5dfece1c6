# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import pwd
import sys

import pytest

from gkd_jax.runtime import paths
from tests.conftest import ODD_NAME

# --- Paths of settings --------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  return tmp_path / 'home'


def test_a_tilde_is_the_home_folder(home):
  user = pwd.getpwuid(os.getuid())

  assert paths.resolve('~/a/~b', 'X') == home / 'a' / '~b'
  assert paths.resolve(f'~{user.pw_name}/a', 'X') == (
    pathlib.Path(user.pw_dir) / 'a'
  )


def test_a_path_is_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)

  assert paths.resolve('-a/../b', 'X') == tmp_path / '-a/../b'
  assert paths.resolve('./~nobody', 'X') == tmp_path / '~nobody'


@pytest.mark.parametrize(
  'path, said',
  [
    ('', "X is empty. Set it to a path; '.' is the working directory."),
    ('~nobody_has_this_name/a', 'is not the home folder of a user.*./~nobody'),
    ('gs://bucket/a', 'X gs://bucket/a must be a path on the file system'),
    ('a\nb', r"contains '\\n', a control character"),
    ('a\x7fb', 'a control character'),
    ('a\udcffb', 'a byte that is not UTF-8'),
    ('/gs/a', 'libraries treat /gs as a bucket'),
  ],
)
def test_a_path_that_cannot_be_used_is_refused(path, said):
  with pytest.raises(ValueError, match=said):
    paths.resolve(path, 'X')


def test_a_locale_that_lacks_a_character_is_named(monkeypatch):
  monkeypatch.setattr(sys, 'getfilesystemencoding', lambda: 'ascii')

  with pytest.raises(ValueError, match='not ASCII. .*LC_ALL=C.UTF-8'):
    paths.resolve('a\udcc3\udcb6', 'X')


def test_an_empty_home_is_not_the_root(monkeypatch):
  monkeypatch.setenv('HOME', '')

  with pytest.raises(ValueError, match='~ is not the home folder of a user'):
    paths.resolve('~/a', 'X')


def test_the_working_directory_counts(tmp_path, monkeypatch):
  (tmp_path / 'a\tb').mkdir()
  monkeypatch.chdir(tmp_path / 'a\tb')

  with pytest.raises(ValueError, match=r"contains '\\t'"):
    paths.resolve('run', 'X')


def test_a_broken_link_is_named(tmp_path):
  (tmp_path / 'link').symlink_to('nowhere')

  why = 'is a symbolic link to nowhere, which is not there'
  assert paths.missing(tmp_path / 'other') == 'is not there'
  assert paths.missing(tmp_path / 'link') == why
  assert paths.missing(tmp_path / 'link/run') == f'{tmp_path}/link {why}'


# --- Globs --------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path, monkeypatch):
  """A folder with an odd name, and some files in it; it is entered."""
  folder = tmp_path / ODD_NAME
  for name in ('a[1]', 'a1', 'b/c/a1'):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
  monkeypatch.chdir(folder)
  return folder


def test_a_name_that_exists_is_no_pattern(odd):
  assert paths.find('a[1]') == ['a[1]']
  assert paths.find(f'{odd}/a[1]') == [f'{odd}/a[1]']


def test_a_pattern_may_follow_a_name_that_looks_like_one(odd):
  assert paths.find(f'{odd}/a?') == [f'{odd}/a1']
  assert paths.find('a*') == ['a1', 'a[1]']
  assert paths.find('**/a1') == ['a1', 'b/c/a1']
  assert paths.find('c*') == []


def test_a_pattern_may_begin_at_home(odd, monkeypatch):
  monkeypatch.setenv('HOME', str(odd))

  assert paths.find('~/a?') == [f'{odd}/a1']


# --- Files of gkd_jax ---------------------------------------------------------


@pytest.mark.parametrize('where', ['.', 'gkd_jax/_assets'])
def test_gin_files_are_in_the_clone_or_in_the_package(
  tmp_path, monkeypatch, where
):
  monkeypatch.setattr(paths, '_PACKAGE', tmp_path / 'gkd_jax')
  (tmp_path / 'gin').mkdir()  # gin-config's, beside an installed package
  (tmp_path / where / 'gin' / 'runs').mkdir(parents=True)

  (found,) = paths.gin_folders()

  assert pathlib.Path(found) == tmp_path / where


# --- Links for libraries ------------------------------------------------------


def test_a_harmless_path_is_left_as_it_is():
  for path in ('/data/run-1.5/seed=0,lr=1e-3', 'gs://bucket/a b'):
    assert paths.for_libraries(path) == path


def test_libraries_get_a_link_of_a_plain_name(tmp_path):
  folder = tmp_path / ODD_NAME

  link = paths.for_libraries(folder)
  folder.mkdir()  # later
  (folder / 'x').touch()

  assert os.listdir(link) == ['x']
  assert link.isascii() and not {*link} & {*'[]*?\\ '}
  assert paths.for_libraries(folder) == link
  assert paths.as_given(f'{link}/x is bad, not {link}1') == (
    f'{folder}/x is bad, not {link}1'
  )


def test_a_folder_for_links_with_such_a_name_itself_is_not_used(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(
    paths.tempfile, 'gettempdir', lambda: str(tmp_path / ODD_NAME)
  )

  folder = paths._links.__wrapped__(0)

  assert folder.startswith('/tmp/gkd_jax_links_')
  os.rmdir(folder)
  monkeypatch.setattr(paths.os, 'access', lambda *_: False)
  with pytest.raises(OSError, match='Set TMPDIR to another'):
    paths._links.__wrapped__(0)
