# SPDX-License-Identifier: Apache-2.0
import gzip

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
    (b'{"inputs": "\xff", "targets": ""}', 'line 2 of .* it is not UTF-8'),
    ('{"inputs": "\\ud83d", "targets": ""}', '"inputs" in line 2 .* surrogate'),
    ('{"inputs": "x", "targets": "\\udc00a"}', '"targets" in line 2 .* surr'),
    ('{"\\ud800": ""}', r'It has: \\ud800.$'),
    ('[' * 10**5, 'line 2 of .* is nested too deeply'),
    ('{"a":' * 10**5, 'line 2 of .* is nested too deeply'),
    ('1' * 5000, 'line 2 of .* is not JSON'),
  ],
)
def test_what_is_wrong_is_refused_with_its_line(tmp_path, text, said):
  good = b'{"inputs": "", "targets": ""}\n'
  bad = text if isinstance(text, bytes) else text.encode()

  with pytest.raises(ValueError, match='MY_FILES: .*' + said):
    read(tmp_path / 'x.jsonl', good + bad)


LINE = '{"inputs": "", "targets": ""}\n'


@pytest.mark.parametrize(
  'content, said',
  [
    (f'[\n{LINE},\n{LINE}]'.encode(), 'a JSON array, not JSON lines.* jq'),
    (f'[{LINE.strip()}]'.encode(), 'a JSON array, not JSON lines.* jq'),
    (LINE.encode('utf-16'), 'UTF-16. Convert it: iconv'),
    (LINE.encode('utf-16-le'), 'UTF-16. Convert it: iconv'),
    (gzip.compress(LINE.encode(), mtime=0), r'compressed \(gunzip it\)'),
    (b'PAR1\x15\x04', 'Parquet, not JSON lines'),
    (b'PK\x03\x04', 'a zip archive'),
    (b'\x80\x04\x95\x00\x00\x07\x00', 'a binary file, not JSON lines'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'a pointer of Git LFS'),
    (b'<!DOCTYPE html>\n', 'HTML or XML'),
    (b'inputs,targets\na,b\n', 'not JSON lines; .*CSV'),
    (b'{\n "inputs": "",\n "targets": ""\n}', 'JSON with an object over'),
  ],
)
def test_another_format_is_refused_by_its_name(tmp_path, content, said):
  with pytest.raises(ValueError, match=f'MY_FILES: .*x.jsonl is {said}'):
    read(tmp_path / 'x.jsonl', content)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
  (line,) = read(tmp_path / 'x.jsonl', b'\xef\xbb\xbf' + LINE.encode())

  assert line == {'inputs': '', 'targets': ''}


def test_a_pair_of_surrogates_is_a_character(tmp_path):
  text = '{"inputs": "\\ud83d\\ude00", "targets": ""}'

  assert read(tmp_path / 'x.jsonl', text)[0]['inputs'] == '😀'


def test_a_file_that_cannot_be_read_is_named(tmp_path):
  with pytest.raises(ValueError, match='MY_FILES: .*x.jsonl cannot be read: N'):
    list(json_lines.read(str(tmp_path / 'x.jsonl'), FIELDS, 'MY_FILES'))


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
