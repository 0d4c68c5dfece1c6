# SPDX-License-Identifier: Apache-2.0
import dataclasses
import hashlib
import sys
import time

import pytest
import seqio

from gkd_jax.data import datasets, vocabularies
from gkd_jax.runtime import files
from tests import conftest
from tests.conftest import LENGTHS

# --- Descriptions -------------------------------------------------------------


def test_equal_vocabularies_have_equal_descriptions(sentencepiece_models):
  one, same, _ = (
    seqio.SentencePieceVocabulary(str(path)) for path in sentencepiece_models
  )

  assert vocabularies.describe(one) == vocabularies.describe(same)


def test_different_vocabularies_of_one_size_have_different_descriptions(
  sentencepiece_models,
):
  one, _, other = (
    seqio.SentencePieceVocabulary(str(path)) for path in sentencepiece_models
  )

  assert one.vocab_size == other.vocab_size
  assert vocabularies.describe(one) != vocabularies.describe(other)


def test_vocabularies_of_different_sizes_have_different_descriptions():
  bytes_alone = vocabularies.describe(seqio.ByteVocabulary())

  assert bytes_alone == 'ByteVocabulary 259 ids'
  assert bytes_alone != vocabularies.describe(
    seqio.ByteVocabulary(extra_ids=100)
  )


def test_a_sentencepiece_model_is_described_by_its_files_digest(
  sentencepiece_models,
):
  # As other systems' folders are, which hold the file: huggingface.vocabulary.
  path = sentencepiece_models[0]
  digest = hashlib.sha256(path.read_bytes()).hexdigest()

  described = vocabularies.describe(vocabularies.sentencepiece(path))

  assert described.endswith(f'model sha256 {digest}')


# --- What is refused ----------------------------------------------------------


def test_a_tasks_vocabulary_that_cannot_be_read_is_refused(tmp_path):
  path = tmp_path / 'x.model'
  feature = seqio.Feature(seqio.SentencePieceVocabulary(str(path)))
  name = conftest.register(
    'lost_vocabulary',
    conftest.letter_words,
    output_features={'inputs': feature, 'targets': feature},
  )
  config = datasets.DatasetConfig(name, LENGTHS, batch_size=4)

  with pytest.raises(ValueError, match="'lost_vocabulary', .*x.model, cannot"):
    datasets.check_not_empty(config)

  # Another one helps.
  datasets.check_not_empty(
    dataclasses.replace(config, vocabulary=vocabularies.byte())
  )


def test_t5s_vocabulary_out_of_reach_is_told_in_time(monkeypatch):
  vocabularies._check_google_storage_answers.cache_clear()
  monkeypatch.setenv('https_proxy', 'http://127.0.0.1:1')  # nobody listens
  config = datasets.DatasetConfig('xsum', LENGTHS, batch_size=4)

  start = time.monotonic()
  with pytest.raises(ValueError, match='gs://t5-data.*refused') as error:
    datasets.get_task(config)

  assert time.monotonic() - start < 12
  assert 'gin/vocabularies/sentencepiece.gin' in str(error.value)
  assert '--gin.VOCABULARY_PATH=FILE' in str(error.value)


def test_a_vocabulary_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(ValueError, match='x.model is not there'):
    vocabularies.sentencepiece(tmp_path / 'x.model')


@pytest.mark.parametrize(
  'name, content, said',
  [
    ('x.model', b'hello', 'x.model is not a SentencePiece model'),
    ('tokenizer.json', b'{}', 'tokenizer.json is JSON. .*spiece.model'),
    ('folder', None, 'folder is a folder. .* as .*/folder/spiece.model'),
    ('x.model', files.LFS_POINTER + b'/spec/v1', 'a pointer of Git LFS'),
  ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, name, content, said):
  if content is None:
    (tmp_path / name).mkdir()
  else:
    (tmp_path / name).write_bytes(content)

  with pytest.raises(ValueError, match=f'VOCABULARY_PATH .*{said}'):
    vocabularies.sentencepiece(tmp_path / name)


def test_ids_of_unused_pieces_are_found(tmp_path):
  path = tmp_path / 'tokenizer.model'
  conftest.train_sentencepiece(
    path,
    ['abc'] * 9,
    vocab_size=9,
    user_defined_symbols=['<unused0>', '<unused1>'],
  )

  vocabulary = vocabularies.sentencepiece(path, 0)

  assert vocabularies.unused_ids(vocabulary) == (3, 4)
  assert vocabularies.unused_ids(vocabularies.byte()) == ()


def test_a_tokenizer_json_needs_its_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  (tmp_path / 'tokenizer.json').write_text('{}')

  with pytest.raises(ValueError, match='pip install .tokenizers'):
    vocabularies.tokenizer_json(tmp_path / 'tokenizer.json')


@pytest.mark.parametrize(
  'name, said',
  [
    ('x/tokenizer.json', 'is not there'),
    ('folder', 'must be a file tokenizer.json, got .*folder.'),
    ('spiece.model', 'use gin/vocabularies/sentencepiece.gin'),
    ('gs://b/tokenizer.json', 'is read from a local disk only'),
  ],
)
def test_what_is_no_tokenizer_json_is_refused(tmp_path, name, said):
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'spiece.model').write_bytes(b'')
  path = name if '://' in name else str(tmp_path / name)

  with pytest.raises(ValueError, match=f'VOCABULARY_PATH .*{said}'):
    vocabularies.tokenizer_json(path)
