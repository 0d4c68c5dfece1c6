# SPDX-License-Identifier: Apache-2.0
"""Damaged files, drawn with a seed.

Whatever is drawn: a file is read, or it is refused with one message that names
it; and of several runs in a report, the others are shown.
"""

import json
import random
import shutil

import pytest

from gkd_jax.checkpoints import pretrained
from gkd_jax.config import gin_errors
from gkd_jax.data import json_lines, predictions, vocabularies
from gkd_jax.report import runs, sections
from tests import conftest, run_folders

pytestmark = pytest.mark.slow  # reads hundreds of files

NUM_DAMAGES = 60  # of each file and each kind

# --- Damages ------------------------------------------------------------------

VALUES = (
  *(None, True, False, 0, -1, 1, 3, 10**6, 10**400, 0.5, 1e308, '', 'x', '0'),
  *('\ud800', 'a\0b', 'é' * 50, [], {}, [[]], [None], {'a': 1}, ['x'] * 3),
  *(float('nan'), float('inf'), -float('inf'), 'none', '</s>', '<extra_id_0>'),
)
DEEP = b'[' * 20_000


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
  """Returns a file cut off, with parts lost, repeated or overwritten."""
  start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
  start = max(start, end - 40)
  flipped = bytearray(content)
  flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  return rng.choice(
    [
      b'',
      content[:end],
      content[:start] + content[end:],
      content[:end] + content[start:],
      content[:start] + rng.randbytes(end - start) + content[end:],
      content[:start] + b'\0' * (end - start) + content[end:],
      content[:start] + b'\\ud83d' + content[end:],
      content[:start] + DEEP + content[end:],
      content.decode('latin-1').encode('utf-16'),
      bytes(flipped),
      bytes(flipped),
      bytes(flipped),
    ]
  )


def damaged_json(content: bytes, rng: random.Random) -> bytes:
  """Returns a JSON file, or one of its lines, with one value changed."""
  lines = content.split(b'\n')
  number = 0
  try:
    values = json.loads(content)
  except ValueError:
    number = rng.choice([i for i, line in enumerate(lines) if line])
    values = json.loads(lines[number])
    lines[number] = json.dumps(changed(values, rng)).encode()
    return b'\n'.join(lines)
  return json.dumps(changed(values, rng)).encode()


def changed(values, rng: random.Random):
  """Returns a value of which one part is lost, renamed or another."""
  items = (
    list(values.items())
    if isinstance(values, dict)
    else list(enumerate(values))
    if isinstance(values, list)
    else []
  )
  if not items or rng.random() < 0.05:
    return rng.choice(VALUES)
  key, value = rng.choice(items)
  if isinstance(value, dict | list) and value and rng.random() < 0.8:
    new = changed(value, rng)
  else:
    new = rng.choice(VALUES)
  copy = values.copy()
  kind = rng.random()
  if kind < 0.7:
    copy[key] = new
  elif isinstance(values, dict):
    del copy[key]
    if kind < 0.85:
      copy[rng.choice(['\ud800', '', 'x', '3'])] = value
  elif kind < 0.85:
    del copy[key]
  else:
    copy.append(new)
  return copy


def damages(path, seed: int):
  """Damages a file in many ways, one after the other; yields a description."""
  content = path.read_bytes()
  for damage in (damaged_bytes, damaged_json):
    rng = random.Random(f'{seed} {path.name} {damage.__name__}')
    for i in range(NUM_DAMAGES):
      bad = damage(content, rng)
      path.write_bytes(bad)
      yield f'{damage.__name__} {i}: {bad[:2000]!r}'
  path.write_bytes(content)


def check_read(read, names, what):
  """Reads; a refusal must be one message that names one of the files."""
  try:
    return read()
  except ValueError as e:
    # Such an error is printed without a traceback.
    assert conftest.ROOT / 'gkd_jax' in gin_errors.raised_in(e).parents, what
    assert any(str(name) in str(e) for name in names), (str(e), what)
    return None


# --- What is read -------------------------------------------------------------


def test_json_lines_are_read_or_refused_by_their_name(tmp_path):
  path = tmp_path / 'train.jsonl'
  row = {'inputs': 'é', 'targets': 'b', 'more': {'deep': [1, {'x': None}]}}
  path.write_text((json.dumps(row) + '\n') * 3)
  fields = {'inputs': str, 'targets': str}

  for what in damages(path, seed=0):
    rows = check_read(
      lambda: list(json_lines.read(str(path), fields, 'FILES')), [path], what
    )
    for row in rows or ():
      assert (row['inputs'] + row['targets']).encode() is not None


PROVENANCE = {
  'checkpoint': 'teacher',
  'task': 'mine',
  'split': 'train',
  'vocabulary': 'ByteVocabulary 259 ids',
  'task_feature_lengths': {'inputs': 8, 'targets': 8},
  'decoding': 'greedy',
}


@pytest.mark.parametrize('file', ['p.jsonl', 'p.json'])
@pytest.mark.parametrize('has_ids', [True, False])
def test_predictions_are_read_or_refused_by_their_name(tmp_path, file, has_ids):
  row = {'inputs': 'a', 'prediction': 'b'}
  if has_ids:
    row |= {'input_ids': [5, 1], 'prediction_ids': [6, 7, 1]}
  (tmp_path / 'p.jsonl').write_text((json.dumps(row) + '\n') * 3)
  (tmp_path / 'p.json').write_text(json.dumps(PROVENANCE))

  def read():
    predictions.splits_of(str(tmp_path / 'p.jsonl'))
    return predictions.read(
      str(tmp_path / 'p.jsonl'),
      task='mine',
      vocabulary=PROVENANCE['vocabulary'],
      num_ids=259,
      eos_id=1,
      encode=lambda text: [byte + 3 for byte in text.encode()],
      lengths={'inputs': 8, 'targets': 8},
      add_eos={'inputs': True, 'targets': True},
    )

  for what in damages(tmp_path / file, seed=1):
    check_read(read, [tmp_path / 'p.json'], what)


@pytest.mark.parametrize('file', ['p.jsonl', 'p.json'])
def test_outputs_of_inputs_are_read_or_refused_by_their_name(tmp_path, file):
  rows = [
    {
      **{'example': i // 2, 'inputs': f'{i // 2}', 'prediction': 'b'},
      **{'input_ids': [5, 1], 'prediction_ids': [6, 7, 1]},
    }
    for i in range(4)
  ]
  path = tmp_path / 'p.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (tmp_path / 'p.json').write_text(json.dumps(PROVENANCE))

  def read():
    about = predictions.shared_provenance([str(path)], 'PREDICTIONS')
    for example in predictions.examples([str(path)], 'PREDICTIONS'):
      for line in example.lines:
        if about is not None:
          predictions.ids_of_line(line, None, str(path), 'PREDICTIONS')

  for what in damages(tmp_path / file, seed=4):
    check_read(read, [path, tmp_path / 'p.json'], what)


def test_interrupted_predictions_go_on_or_are_refused(tmp_path):
  path = tmp_path / 'p.jsonl'
  partial = tmp_path / 'p.jsonl.partial'
  lines = [{'example': i, 'sample': 0, 'inputs': 'a'} for i in range(6)]
  partial.write_text(''.join(json.dumps(line) + '\n' for line in lines))

  for file in (partial, tmp_path / 'p.json'):
    (tmp_path / 'p.json').write_text(json.dumps(PROVENANCE))
    content = partial.read_bytes()
    for what in damages(file, seed=2):
      writer = check_read(
        lambda: predictions.Writer(path, PROVENANCE, batch_size=2),
        [partial, tmp_path / 'p.json'],
        what,
      )
      if writer is not None:
        assert writer.num_examples in (0, 2, 4)
        writer._file.close()
      partial.write_bytes(content)


TOKENIZER = {
  'config.json': None,  # that of the model
  'generation_config.json': {'pad_token_id': 0, 'eos_token_id': 1},
  'tokenizer_config.json': {
    'tokenizer_class': 'T5Tokenizer',
    'extra_ids': 0,
    'eos_token': '</s>',
    'added_tokens_decoder': {
      '1': {'content': '</s>', 'special': True},
      '12': {'content': '<sep>', 'lstrip': False, 'single_word': False},
      '13': {'content': '{'},
    },
  },
  'added_tokens.json': {'<sep>': 12, '{': 13},
  'special_tokens_map.json': {
    'eos_token': {'content': '</s>'},
    'additional_special_tokens': ['<sep>'],
  },
  'tokenizer.json': {
    'added_tokens': [{'id': 12, 'content': '<sep>', 'lstrip': False}],
    'model': {'type': 'Unigram', 'vocab': [['<pad>', 0.0], ['</s>', 0.0]]},
  },
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A model with added tokens."""
  folder = tmp_path_factory.mktemp('hugging') / 'model'
  shutil.copytree(conftest.BYT5.parent / 't5_1_1', folder)
  conftest.train_sentencepiece(
    folder / 'spiece.model', ['abcdefgh'] * 9, vocab_size=12
  )
  for name, content in TOKENIZER.items():
    if content is not None:
      (folder / name).write_text(json.dumps(content))
  return folder


@pytest.mark.parametrize('file', TOKENIZER)
def test_a_folder_of_another_system_is_read_or_refused_by_name(
  folder, file, monkeypatch
):
  # What is read before the shapes are compared, which takes long.
  monkeypatch.setattr(
    'gkd_jax.checkpoints.checkpoint.check_shapes', lambda *_: None
  )
  monkeypatch.setattr(
    'gkd_jax.checkpoints.formats.huggingface.param_shapes', lambda _: {}
  )

  def read():
    source = pretrained.open_checkpoint(folder, 'TEACHER_CHECKPOINT_PATH')
    vocabulary = vocabularies.sentencepiece(folder / 'spiece.model', 0)
    vocabularies.check_tokenizer(vocabulary, source.tokenizer)
    return source

  assert read() is not None
  for what in damages(folder / file, seed=3):
    check_read(read, [folder], what)


# --- The report ---------------------------------------------------------------


@pytest.mark.parametrize(
  'file',
  ['metrics.jsonl', 'eval_test.json', 'samples_test.json', 'versions.json'],
)
def test_a_damaged_run_is_left_out_by_its_name_and_the_others_shown(
  tmp_path, file
):
  for seed in range(3):
    run_folders.write(
      tmp_path / f'run_{seed}',
      {'greedy/wer': 20.0 + seed, 'checkpoint': 'c', 'task': 'cmudict_g2p'},
      {500: 30.0, 1000: 25.0},
      samples=run_folders.samples(('x', [run_folders.token('t')])),
      lines=[{'step': 10, 'train/reward': 0.5}],
      RANDOM_SEED=seed,
      **run_folders.SFT,
    )

  for what in damages(tmp_path / 'run_1' / file, seed=4):
    found, left_out = runs.find(f'{tmp_path}/run_*')
    names = [run.folder.name for run in found]
    assert {'run_0', 'run_2'} <= {*names}, what
    for path, why in left_out:
      assert path.name == 'run_1' and (file in why or 'not done' in why), what
    sections.make(found, None, None, ('LEARNING_RATE',))
