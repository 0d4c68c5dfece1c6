# SPDX-License-Identifier: Apache-2.0
"""Vocabularies: constructors, descriptions and decoding.

seqio is imported on first use; see `datasets`.
"""

from __future__ import annotations

import functools
import hashlib
import time
import urllib.error
import urllib.request
from collections.abc import Iterable

from etils import epath, epy

from gkd_jax.runtime import paths

with epy.lazy_imports():
  import seqio


@functools.cache
def import_libraries() -> float:
  """Imports seqio and TensorFlow; returns the seconds of the first call."""
  start = time.monotonic()
  _ = seqio.Vocabulary  # triggers the lazy import
  return time.monotonic() - start


def sentencepiece(path: str, extra_ids: int = 100) -> seqio.Vocabulary:
  """Returns the vocabulary of a SentencePiece model.

  Args:
    path: of the `.model` file, spiece.model in Hugging Face repositories.
    extra_ids: number of sentinels after the model's pieces; 100 in T5.

  Raises:
    ValueError: the file does not exist, or is not a SentencePiece model.
  """
  if not paths.is_remote(path):
    path = paths.resolve(path, 'VOCABULARY_PATH')
  if not epath.Path(path).exists():
    raise ValueError(f'VOCABULARY_PATH {path} {paths.missing(path)}.')
  import_libraries()
  vocabulary = seqio.SentencePieceVocabulary(str(path), extra_ids)
  try:
    vocabulary.load_model()
  except Exception as e:  # protobuf's and sentencepiece's, of many types
    raise ValueError(
      f'VOCABULARY_PATH {path} is not a SentencePiece model: {e}'
    ) from e
  return vocabulary


def byte(extra_ids: int = 0) -> seqio.Vocabulary:
  """Returns ByT5's vocabulary: pad, EOS, unknown, and the 256 bytes."""
  import_libraries()
  return seqio.ByteVocabulary(extra_ids)


def describe(vocabulary: seqio.Vocabulary) -> str:
  """Returns a one-line fingerprint of a vocabulary; saved with checkpoints."""
  kind, size = type(vocabulary).__name__, vocabulary.vocab_size
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    # Hash of the file itself, because other systems can also compute it.
    model = epath.Path(vocabulary.sentencepiece_model_file).read_bytes()
    digest = hashlib.sha256(model).hexdigest()
    return f'{kind} {size} ids, model sha256 {digest}'
  return f'{kind} {size} ids'


def file_of(vocabulary: seqio.Vocabulary) -> str | None:
  """Returns the file that a vocabulary is read from; None if there is none."""
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return str(vocabulary.sentencepiece_model_file)
  return None


def decode(vocabulary: seqio.Vocabulary, tokens: Iterable[int]) -> str:
  """Returns the text of a row of tokens, up to its EOS."""
  return str(vocabulary.decode([int(t) for t in tokens]))


def check_can_be_read(task_name: str, vocabulary: seqio.Vocabulary) -> None:
  """Raises ValueError if a task's SentencePiece model cannot be read."""
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
      'you have the file (spiece.model in Hugging Face repositories), add '
      '--gin_file=gin/vocabularies/sentencepiece.gin '
      '--gin.VOCABULARY_PATH=FILE.'
    ) from e


@functools.cache
def _check_google_storage_answers() -> None:
  """Raises OSError within seconds; TensorFlow would retry for minutes."""
  try:
    urllib.request.urlopen('https://storage.googleapis.com', timeout=10)
  except urllib.error.HTTPError:
    pass  # any response means that the server is reachable
