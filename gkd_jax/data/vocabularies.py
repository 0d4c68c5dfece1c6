# SPDX-License-Identifier: Apache-2.0
"""Vocabularies of tokens: made, described, and a row of tokens as text.

seqio is imported when it is first used; see `data`.
"""

from __future__ import annotations

import functools
import hashlib
import time
import urllib.error
import urllib.request
from collections.abc import Iterable

from etils import epath, epy

with epy.lazy_imports():
  import seqio


@functools.cache
def import_libraries() -> float:
  """Imports what reads data, where nobody did; returns the seconds it took.

  Whenever it is called again, it returns the same.
  """
  start = time.monotonic()
  _ = seqio.Vocabulary  # the first use imports it, and TensorFlow with it
  return time.monotonic() - start


def sentencepiece(path: str, extra_ids: int = 100) -> seqio.Vocabulary:
  """Returns the vocabulary of a SentencePiece model.

  Args:
    path: of the `.model` file; Hugging Face calls it spiece.model.
    extra_ids: sentinels after the model's pieces; 100 in T5.

  Raises:
    ValueError: the file is not there, or is no SentencePiece model.
  """
  if not epath.Path(path).exists():
    raise ValueError(f'VOCABULARY_PATH {path} is not there.')
  import_libraries()
  vocabulary = seqio.SentencePieceVocabulary(str(path), extra_ids)
  try:
    vocabulary.load_model()
  except Exception as e:  # protobuf's and sentencepiece's, of many types
    raise ValueError(
      f'VOCABULARY_PATH {path} is no SentencePiece model: {e}'
    ) from e
  return vocabulary


def byte(extra_ids: int = 0) -> seqio.Vocabulary:
  """Returns ByT5's vocabulary: pad, EOS, unknown, and the 256 bytes."""
  import_libraries()
  return seqio.ByteVocabulary(extra_ids)


def describe(vocabulary: seqio.Vocabulary) -> str:
  """Returns a line that is equal for equal vocabularies; saved with models."""
  kind, size = type(vocabulary).__name__, vocabulary.vocab_size
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    # Of the file, not of what seqio makes of it: other systems have the file.
    model = epath.Path(vocabulary.sentencepiece_model_file).read_bytes()
    digest = hashlib.sha256(model).hexdigest()
    return f'{kind} {size} ids, model sha256 {digest}'
  return f'{kind} {size} ids'


def decode(vocabulary: seqio.Vocabulary, tokens: Iterable[int]) -> str:
  """Returns the text of a row of tokens, up to its EOS."""
  return str(vocabulary.decode([int(t) for t in tokens]))


def check_can_be_read(task_name: str, vocabulary: seqio.Vocabulary) -> None:
  """Raises ValueError if a task's SentencePiece model is out of reach."""
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return
  path = vocabulary.sentencepiece_model_file
  try:
    if str(path).startswith('gs://'):
      _check_google_storage_answers()
    vocabulary.load_model()
  except Exception as e:  # of TensorFlow, protobuf, sentencepiece, urllib
    raise ValueError(
      f'The vocabulary of task {task_name!r}, {path}, cannot be read: {e}. If '
      'you have the file (Hugging Face calls it spiece.model), add --gin_file='
      'gin/vocabularies/sentencepiece.gin --gin.VOCABULARY_PATH=FILE.'
    ) from e


@functools.cache
def _check_google_storage_answers() -> None:
  """Raises OSError after seconds, where TensorFlow would try for minutes."""
  try:
    urllib.request.urlopen('https://storage.googleapis.com', timeout=10)
  except urllib.error.HTTPError:
    pass  # an answer: it is there
