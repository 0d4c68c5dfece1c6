# SPDX-License-Identifier: Apache-2.0
"""A vocabulary read from a `tokenizer.json` of Hugging Face.

Any model of such a file works: BPE, WordPiece, Unigram, with its normalizer and
its added tokens. T5Gemma 2 has no other file. The package `tokenizers` computes
the tokens, in Python: in functions without state, so that the position in the
data can be saved. Like seqio it is imported on first use.
"""

from __future__ import annotations

import functools
from typing import Any

from etils import epath, epy

from gkd_jax.data import tokenizer_files

with epy.lazy_imports():
  import numpy as np
  import seqio
  import tensorflow as tf


def make(path: str) -> seqio.Vocabulary:
  """Returns the vocabulary of a file.

  Args:
    path: of a tokenizer.json; the files beside it name its special tokens.

  Raises:
    ValueError: the package `tokenizers` is not installed, the file is none, or
      no file names EOS.
  """
  try:
    import tokenizers
  except ImportError as e:
    raise ValueError(
      f'VOCABULARY_PATH {path}: reading a tokenizer.json needs the package '
      "tokenizers: pip install 'tokenizers>=0.22,<1'."
    ) from e
  folder = epath.Path(path).parent
  described = tokenizer_files.read(folder)
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as e:  # tokenizers raises plain Exceptions
    raise ValueError(
      f'VOCABULARY_PATH {path} is not a tokenizer.json: {e}'
    ) from e
  ids = {
    name: tokenizer.token_to_id(token)
    for name, token in described.named.items()
  }
  if ids.get('eos') is None:
    raise ValueError(
      f'VOCABULARY_PATH {path}: no tokenizer_config.json or '
      'special_tokens_map.json beside it names an eos_token of it. Copy these '
      'files, too.'
    )
  # A text is cut to TASK_FEATURE_LENGTHS, nowhere else.
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return _class()(str(path), tokenizer, ids, described.json_digest)


@functools.cache
def _class() -> type:
  """Defines the class, whose base is imported lazily."""

  class TokenizerJsonVocabulary(seqio.Vocabulary):
    """See the module."""

    def __init__(self, path, tokenizer, ids, digest):
      super().__init__()
      self.json_path, self.json_digest = path, digest
      self._tokenizer, self._ids = tokenizer, ids
      numbers = tokenizer.get_vocab(with_added_tokens=True)
      self._size = max(numbers.values()) + 1
      self.pieces = numbers
      # They are no text: `decode` leaves them out, as SentencePiece does.
      self._silent = {ids.get(name) for name in ('pad', 'bos', 'eos')}

    @property
    def bos_id(self):
      return self._ids.get('bos')

    @property
    def eos_id(self):
      return self._ids['eos']

    @property
    def unk_id(self):
      return self._ids.get('unk')

    @property
    def _base_vocab_size(self):
      return self._size

    def _encode(self, s):
      return self._tokenizer.encode(s, add_special_tokens=False).ids

    def _decode(self, ids):
      ids = [int(i) for i in ids if int(i) not in self._silent]
      return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _encode_tf(self, s):
      def encode(texts: np.ndarray):
        rows = [self._encode(text.decode('utf-8')) for text in texts]
        flat = [number for row in rows for number in row]
        return np.int32(flat), np.int64([len(row) for row in rows])

      flat, lengths = tf.numpy_function(
        encode, [tf.reshape(s, [-1])], [tf.int32, tf.int64], stateful=False
      )
      flat.set_shape([None])
      lengths.set_shape([None])
      if s.shape.rank == 0:
        return flat
      return tf.RaggedTensor.from_row_lengths(flat, lengths)

    def _decode_tf(self, ids):
      def decode(ids: np.ndarray):
        rows = ids.reshape(-1, ids.shape[-1])
        texts = [self._decode(row).encode('utf-8') for row in rows]
        return np.array(texts, object).reshape(ids.shape[:-1])

      text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
      text.set_shape(ids.shape[:-1])
      return text

    def __eq__(self, other: Any) -> bool:
      return (
        isinstance(other, type(self)) and self.json_digest == other.json_digest
      )

    def __hash__(self):
      return hash(self.json_digest)

    def __str__(self):
      return f'TokenizerJsonVocabulary({self.json_path})'

  return TokenizerJsonVocabulary
