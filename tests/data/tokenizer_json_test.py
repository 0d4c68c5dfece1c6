# SPDX-License-Identifier: Apache-2.0
"""tokenizer.json as a vocabulary, against transformers itself."""

import json

import numpy as np
import pytest

from gkd_jax.data import tokenizer_files, vocabularies

tokenizers = pytest.importorskip(
  'tokenizers', reason='needs tokenizers: the extra [tokenizers]'
)
pytestmark = pytest.mark.interop

# Of bytes outside the letters of the training text, one an emoji.
TEXTS = (
  'the fox  dog',
  ' over',
  'Zürich 🦊',
  'the\nfox',
  '<start>fox<start>',
  '',
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizer')
  write_gemma_tokenizer(folder, ['the fox jumps over the dog'] * 9)
  return folder


def write_gemma_tokenizer(folder, texts):
  """Writes a tokenizer like Gemma's: BPE with bytes, spaces as ▁."""
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(unk_token='<unk>', byte_fallback=True)
  )
  tokenizer.normalizer = tokenizers.normalizers.Replace(' ', '▁')
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace('▁', ' '),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
    ]
  )
  special = ['<pad>', '<eos>', '<bos>', '<unk>', '<unused0>', '<unused1>']
  of_bytes = [f'<0x{i:02X}>' for i in range(256)]
  tokenizer.train_from_iterator(
    texts,
    tokenizers.trainers.BpeTrainer(
      vocab_size=310, special_tokens=[*special, '<start>', *of_bytes]
    ),
  )
  # Bytes are no special tokens.
  values = json.loads(tokenizer.to_str())
  values['added_tokens'] = values['added_tokens'][:7]
  (folder / 'tokenizer.json').write_text(json.dumps(values))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps(
      {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        **{f'{n}_token': f'<{n}>' for n in ('pad', 'eos', 'bos', 'unk')},
      }
    )
  )


@pytest.fixture(scope='module')
def vocabulary(folder):
  return vocabularies.tokenizer_json(folder / 'tokenizer.json')


def test_texts_have_the_tokens_of_transformers(folder, vocabulary):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoTokenizer.from_pretrained(folder)

  assert vocabulary.vocab_size == len(theirs)
  assert (vocabulary.pad_id, vocabulary.eos_id) == (0, 1)
  assert (vocabulary.bos_id, vocabulary.unk_id) == (2, 3)
  for text in TEXTS:
    ids = theirs(text, add_special_tokens=False).input_ids
    assert [*vocabulary.encode(text)] == ids
    assert vocabulary.decode(ids) == text
    # Up to EOS, without it.
    assert vocabulary.decode([2, *ids, 1, 7, 0]) == text


def test_tensorflow_has_the_same_tokens(vocabulary):
  import tensorflow as tf

  together = vocabulary.encode_tf(tf.constant(TEXTS))

  for text, row in zip(TEXTS, together, strict=True):
    ids = vocabulary.encode_tf(tf.constant(text))
    assert ids.dtype == tf.int32
    assert ids.numpy().tolist() == row.numpy().tolist()
    assert row.numpy().tolist() == [*vocabulary.encode(text)]
    assert vocabulary.decode_tf(ids).numpy().decode() == text
  fox = [*vocabulary.encode('fox'), 1]
  rows = np.array([fox, [1] * len(fox)], np.int32)
  assert vocabulary.decode_tf(tf.constant(rows)).numpy().tolist() == [
    b'fox',
    b'',
  ]


def test_unused_tokens_are_found(vocabulary):
  assert vocabularies.unused_ids(vocabulary) == (4, 5)


def test_a_checkpoint_must_have_the_same_tokenizer(
  folder, vocabulary, tmp_path
):
  values = json.loads((folder / 'tokenizer.json').read_text())
  # Other settings of its use are the same tokenizer; another token is not.
  values['truncation'] = {
    'max_length': 5,
    'strategy': 'LongestFirst',
    'direction': 'Right',
    'stride': 0,
  }
  (tmp_path / 'tokenizer.json').write_text(json.dumps(values))
  vocabularies.check_tokenizer(vocabulary, tokenizer_files.read(tmp_path))

  values['added_tokens'][4]['content'] = '<other>'
  (tmp_path / 'tokenizer.json').write_text(json.dumps(values))

  with pytest.raises(ValueError, match='it has another tokenizer.json'):
    vocabularies.check_tokenizer(vocabulary, tokenizer_files.read(tmp_path))
  with pytest.raises(ValueError, match='gin/vocabularies/tokenizer_json.gin'):
    vocabularies.check_tokenizer(
      vocabularies.byte(), tokenizer_files.read(tmp_path)
    )


def test_a_file_that_does_not_name_eos_is_refused(folder, tmp_path):
  (tmp_path / 'tokenizer.json').write_bytes(
    (folder / 'tokenizer.json').read_bytes()
  )

  with pytest.raises(
    ValueError, match='names an eos_token. Copy|eos_token of it'
  ):
    vocabularies.tokenizer_json(tmp_path / 'tokenizer.json')


def test_a_damaged_file_is_refused(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{"model": {"type": "BPE"}}')

  with pytest.raises(ValueError, match='is not a tokenizer.json: '):
    vocabularies.tokenizer_json(tmp_path / 'tokenizer.json')


def test_the_position_in_data_of_its_tokens_is_saved(vocabulary, tmp_path):
  import tensorflow as tf

  def iterator():
    data = tf.data.Dataset.from_tensor_slices(['the', 'fox', 'over'])
    return iter(data.map(vocabulary.encode_tf))

  position = iterator()
  next(position)
  path = tf.train.Checkpoint(position=position).write(str(tmp_path / 'at'))
  resumed = iterator()
  tf.train.Checkpoint(position=resumed).read(path).assert_consumed()

  assert next(resumed).numpy().tolist() == [*vocabulary.encode('fox')]
