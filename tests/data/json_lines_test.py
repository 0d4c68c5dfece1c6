# SPDX-License-Identifier: Apache-2.0
import pytest

from gkd_jax.data import json_lines

FIELDS = {'inputs': str, 'targets': str}


def read(path, text, fields=FIELDS):
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return list(json_lines.read(str(path), fields, 'MY_FILES'))


def test_each_line_is_an_example(tmp_path):
  text = (
    '{"inputs": "a", "targets": "b"}\n\n{"inputs": "ü", "targets": "", "n": 1}'
  )

  assert read(tmp_path / 'x.jsonl', text) == [
    {'inputs': 'a', 'targets': 'b'},
    {'inputs': 'ü', 'targets': '', 'n': 1},
  ]


def test_other_ends_of_lines_within_a_text_do_not_end_the_line(tmp_path):
  text = '{"inputs": "a\u2028b\u0085c", "targets": "d\\ne"}\n'

  (line,) = read(tmp_path / 'x.jsonl', text)

  assert line == {'inputs': 'a\u2028b\x85c', 'targets': 'd\ne'}


@pytest.mark.parametrize(
  ['text', 'said'],
  [
    ('{"inputs": "a"}', 'has no "targets". It has: inputs'),
    ('{"inputs": "a", "targets": 3}', '"targets" in line 2 .* is int, not str'),
    (
      '{"inputs": "a", "inputs": "b", "targets": ""}',
      'line 2 of .* an object has "inputs" twice',
    ),
    ('["a", "b"]', 'line 2 of .* is not a JSON object'),
    ('{"inputs": "a", "tar', 'line 2 of .* is not JSON'),
    (b'{"inputs": "\xff", "targets": ""}', 'line 2 of .* is not JSON'),
  ],
)
def test_what_is_wrong_is_refused_with_its_line(tmp_path, text, said):
  good = b'{"inputs": "", "targets": ""}\n'
  bad = text if isinstance(text, bytes) else text.encode()

  with pytest.raises(ValueError, match='MY_FILES: .*' + said):
    read(tmp_path / 'x.jsonl', good + bad)


def test_a_glob_finds_files_in_the_order_of_their_names(tmp_path):
  for name in ('b.jsonl', 'a.jsonl', 'c.json'):
    (tmp_path / name).touch()
  (tmp_path / 'folder.jsonl').mkdir()

  found = json_lines.find(f'{tmp_path}/*.jsonl', 'MY_FILES')

  assert found == [f'{tmp_path}/a.jsonl', f'{tmp_path}/b.jsonl']


@pytest.mark.parametrize(
  'pattern, said',
  [
    ('', 'MY_FILES is empty'),
    ('{}/*.json', 'is not there, and as a glob it matches no file'),
    ('{}/link', 'is a symbolic link to nowhere, which is not there'),
    ('{}', 'is a folder, not a file'),
    (['a.jsonl'], "its path or a glob, not .'a.jsonl'"),
  ],
)
def test_what_is_no_file_is_refused(tmp_path, pattern, said):
  (tmp_path / 'link').symlink_to('nowhere')
  if isinstance(pattern, str):
    pattern = pattern.format(tmp_path)

  with pytest.raises(ValueError, match=said):
    json_lines.find(pattern, 'MY_FILES')


def test_a_name_with_brackets_is_a_file_and_no_pattern(tmp_path):
  path = tmp_path / 'predictions_train[:10%].jsonl'
  path.touch()

  assert json_lines.find(str(path), 'MY_FILES') == [str(path)]


def test_no_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match='MY_FILES: .*nothing. is not there'):
    json_lines.find(f'{tmp_path}/nothing*', 'MY_FILES')
