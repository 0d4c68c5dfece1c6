# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece vocabulary with tokens that were added to its model.

transformers first splits a text at the added tokens, then searches the pieces
in each part. `SentencePieceProcessor` would need a model that has them, and
would write a piece for the space before each. seqio is imported on first use.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from etils import epy

from gkd_jax.data.tokenizer_files import AddedToken

with epy.lazy_imports():
  import seqio
  import tensorflow as tf

_SPACE = '▁'
# Surrounds added tokens before the text is split; no tokenizer has it.
_MARK = '\x00'


def make(
  path: str, extra_ids: int, added: Sequence[AddedToken]
) -> seqio.SentencePieceVocabulary:
  """Returns the vocabulary.

  Args:
    path: of the SentencePiece model.
    extra_ids: number of sentinels after the model's pieces.
    added: tokens after these, with consecutive ids.
  """
  return _class()(path, extra_ids, added)


@functools.cache
def _class() -> type:
  """Defines the class, whose base is imported lazily."""

  class SentencePieceVocabulary(seqio.SentencePieceVocabulary):
    """See the module."""

    def __init__(self, path, extra_ids, added):
      super().__init__(path, extra_ids)
      self.added_tokens = {token.content: token.id for token in added}
      longest_first = sorted(self.added_tokens, key=len, reverse=True)
      self._pattern = '|'.join(map(re.escape, longest_first))

    @property
    def _base_vocab_size(self):
      return super()._base_vocab_size + len(self.added_tokens)

    def _encode(self, s):
      marked = re.sub(self._pattern, rf'{_MARK}\g<0>{_MARK}', s)
      ids = []
      for part in marked.split(_MARK):
        if part in self.added_tokens:
          ids.append(self.added_tokens[part])
        else:
          ids += super()._encode(part)
      return ids

    def _encode_tf(self, s):
      # RE2 quotes as Python does, but for characters that are not ASCII.
      marked = tf.strings.regex_replace(s, self._pattern, rf'{_MARK}\0{_MARK}')
      parts = tf.strings.split(marked, _MARK)
      is_ragged = isinstance(parts, tf.RaggedTensor)
      flat = parts.flat_values if is_ragged else parts
      same = tf.equal(flat[:, None], list(self.added_tokens))
      is_added = tf.reduce_any(same, axis=1)
      ids = tf.constant(list(self.added_tokens.values()), tf.int32)
      added = tf.ragged.boolean_mask(tf.broadcast_to(ids, tf.shape(same)), same)
      pieces = self.tf_tokenizer.tokenize(tf.where(is_added, '', flat))
      # One of the two is empty in each part.
      together = tf.concat([pieces, added], axis=1)
      if not is_ragged:
        return together.flat_values
      return parts.with_flat_values(together).merge_dims(-2, -1)

    def _decode(self, ids):
      tokens = {number: token for token, number in self.added_tokens.items()}
      text, run = '', []
      for number in [*map(int, ids), None]:
        if number is not None and number not in tokens:
          run.append(number)
          continue
        if run:
          # SentencePiece drops the first space.
          if text and self.tokenizer.id_to_piece(run[0]).startswith(_SPACE):
            text += ' '
          text += super()._decode(run)
          run = []
        text += tokens.get(number, '')
      return text

    def __str__(self):
      return f'{super().__str__()} with {self.added_tokens}'

  return SentencePieceVocabulary
