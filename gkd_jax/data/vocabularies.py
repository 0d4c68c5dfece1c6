# SPDX-License-Identifier: Apache-2.0
"""Vocabularies: constructors, descriptions and decoding.

seqio is imported on first use; see `datasets`.
"""

from __future__ import annotations

import functools
import hashlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable

from etils import epath, epy

from gkd_jax.data import added_tokens, tokenizer_files
from gkd_jax.data import tokenizer_json as tokenizer_json_lib
from gkd_jax.runtime import files, paths

with epy.lazy_imports():
  import seqio

# The special tokens of ByT5.
_OF_BYTES = ('<pad>', '</s>', '<unk>')


@functools.cache
def import_libraries() -> float:
  """Imports seqio and TensorFlow; returns the seconds of the first call."""
  start = time.monotonic()
  _ = seqio.Vocabulary  # triggers the lazy import
  return time.monotonic() - start


def sentencepiece(path: str, extra_ids: int = 100) -> seqio.Vocabulary:
  """Returns the vocabulary of a SentencePiece model.

  Tokens that tokenizer files in the model's folder add to its pieces are added.

  Args:
    path: of the `.model` file, spiece.model in Hugging Face repositories.
    extra_ids: number of sentinels after the model's pieces; 100 in T5.

  Raises:
    ValueError: the file does not exist, or is not a SentencePiece model; or the
      tokenizer files beside it do not fit it.
  """
  if not paths.is_remote(path):
    path = paths.resolve(path, 'VOCABULARY_PATH')
  if not epath.Path(path).exists():
    raise ValueError(f'VOCABULARY_PATH {path} {paths.missing(path)}.')
  import_libraries()
  vocabulary = _load(str(path), extra_ids)
  tokenizer = tokenizer_files.read(epath.Path(path).parent)
  if tokenizer is None or tokenizer.kind == tokenizer_files.BYTES:
    return vocabulary
  _check_sentinels(vocabulary, tokenizer)
  added = _check_ids(vocabulary, tokenizer, 'VOCABULARY_PATH')
  _check_special(vocabulary, tokenizer, 'VOCABULARY_PATH')
  if not added:
    return vocabulary
  return added_tokens.make(str(path), extra_ids, added)


def tokenizer_json(path: str) -> seqio.Vocabulary:
  """Returns the vocabulary of a `tokenizer.json` of Hugging Face.

  Args:
    path: of the file. The files beside it name its special tokens.

  Raises:
    ValueError: the file does not exist or is none, no file names EOS, or the
      package `tokenizers` is not installed.
  """
  if paths.is_remote(path):
    raise ValueError(
      f'VOCABULARY_PATH {path}: a {tokenizer_files.FAST} is read from a local '
      'disk only. Copy it and the files beside it.'
    )
  path = epath.Path(paths.resolve(path, 'VOCABULARY_PATH'))
  if not path.exists():
    raise ValueError(f'VOCABULARY_PATH {path} {paths.missing(path)}.')
  if path.is_dir() or path.name != tokenizer_files.FAST:
    raise ValueError(
      f'VOCABULARY_PATH must be a file {tokenizer_files.FAST}, got {path}. For '
      'a SentencePiece model use gin/vocabularies/sentencepiece.gin.'
    )
  import_libraries()
  return tokenizer_json_lib.make(str(path))


def unused_ids(vocabulary: seqio.Vocabulary) -> tuple[int, ...]:
  """Returns the ids of pieces that no text has, such as Gemma's <unused0>."""
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return _unused_pieces(str(vocabulary.sentencepiece_model_file))
  pieces = getattr(vocabulary, 'pieces', {})
  return tuple(sorted(n for piece, n in pieces.items() if _is_unused(piece)))


@functools.cache
def _unused_pieces(path: str) -> tuple[int, ...]:
  plain = seqio.SentencePieceVocabulary(path)
  plain.load_model()
  model = plain.tokenizer
  return tuple(
    n
    for n in range(model.get_piece_size())
    if model.is_unused(n) or _is_unused(model.id_to_piece(n))
  )


def _is_unused(piece: str) -> bool:
  return re.fullmatch(r'<unused\d+>', piece) is not None


def _load(path: str, extra_ids: int) -> seqio.SentencePieceVocabulary:
  try:
    plain = seqio.SentencePieceVocabulary(path)
    plain.load_model()
  except Exception as e:  # protobuf's and sentencepiece's, of many types
    raise ValueError(f'VOCABULARY_PATH {_explain(epath.Path(path), e)}') from e
  if not extra_ids:
    return plain
  pieces = plain.tokenizer
  for sentinel in ('▁<extra_id_0>', '<extra_id_0>'):
    if pieces.piece_to_id(sentinel) != pieces.unk_id():
      raise ValueError(
        f'VOCABULARY_PATH {path} has sentinels among its pieces, such as '
        f'{sentinel!r} with id {pieces.piece_to_id(sentinel)}, as the model of '
        'mT5 has. Set VOCABULARY_EXTRA_IDS=0.'
      )
  vocabulary = seqio.SentencePieceVocabulary(path, extra_ids)
  vocabulary.load_model()
  return vocabulary


def _explain(path: epath.Path, error: Exception) -> str:
  """Returns what a path is that is no SentencePiece model."""
  if path.is_dir():
    return (
      f'{path} is a folder. Give the file of the SentencePiece model in it, '
      f'such as {path / tokenizer_files.MODEL}.'
    )
  if path.suffix == '.json':
    return (
      f'{path} is JSON. This setting takes the SentencePiece model, '
      f'{tokenizer_files.MODEL} in Hugging Face repositories. To read a '
      f'{tokenizer_files.FAST}, add --gin_file=gin/vocabularies/'
      'tokenizer_json.gin instead of sentencepiece.gin.'
    )
  if not paths.is_remote(path) and (pointer := files.explain_pointer(path)):
    return pointer
  return f'{path} is not a SentencePiece model: {error}'


# --- A vocabulary and the tokenizer files of a folder -------------------------


def check_tokenizer(
  vocabulary: seqio.Vocabulary, tokenizer: tokenizer_files.TokenizerFiles | None
) -> None:
  """Raises ValueError unless a vocabulary is that of a folder's tokenizer.

  `pretrained.check_fits` compares the files of the models. A vocabulary of a
  class that seqio does not have is the user's, and is not compared.

  Args:
    vocabulary: of the task.
    tokenizer: of a checkpoint; None: it has no tokenizer files.
  """
  is_pieces = isinstance(vocabulary, seqio.SentencePieceVocabulary)
  is_bytes = isinstance(vocabulary, seqio.ByteVocabulary)
  if digest := getattr(vocabulary, 'json_digest', None):
    _check_json(vocabulary, digest, tokenizer)
    return
  if tokenizer is None or not (is_pieces or is_bytes):
    return
  if tokenizer.kind not in (
    tokenizer_files.SENTENCEPIECE,
    tokenizer_files.BYTES,
  ):
    raise ValueError(
      f'{tokenizer.folder} has the tokenizer {tokenizer.kind}, which gkd_jax '
      "does not read: the model's ids are not those of the task's vocabulary, "
      f'{describe(vocabulary)}. '
      + (
        'Use its file: --gin_file=gin/vocabularies/tokenizer_json.gin '
        f'--gin.VOCABULARY_PATH={tokenizer.folder}/{tokenizer_files.FAST}.'
        if tokenizer.json_digest
        else 'Use a checkpoint with a SentencePiece model, a tokenizer.json or '
        "bytes (ByT5's tokenizer), or write a seqio.Vocabulary and a task that "
        'uses it.'
      )
    )
  if is_bytes != (tokenizer.kind == tokenizer_files.BYTES):
    return  # `check_fits` refuses it
  if is_bytes:
    names = [
      *(token.content for token in tokenizer.added if token.id > 2),
      # Those without an id: transformers adds them to the end.
      *(token for token in tokenizer.special if token not in _OF_BYTES),
    ]
    names = [n for n in names if not tokenizer_files.is_sentinel(n)]
    if names := list(dict.fromkeys(names)):
      raise ValueError(
        f'{tokenizer.folder}: its tokenizer adds {_listed(names)} to the '
        'bytes; gkd_jax adds tokens to SentencePiece models alone.'
      )
    return
  if tokenizer.digest is None:
    _check_pieces(vocabulary, tokenizer)
  missing = _check_ids(vocabulary, tokenizer, tokenizer.folder)
  _check_special(vocabulary, tokenizer, tokenizer.folder)
  if missing:
    raise ValueError(
      f"{tokenizer.folder}: its tokenizer adds tokens that the task's "
      f'vocabulary lacks: {_listed(t.content for t in missing)}. Set '
      'VOCABULARY_PATH to the spiece.model in this folder: the tokens that '
      'files beside it add are read, too.'
    )
  has = {token.content for token in tokenizer.added}
  extra = [t for t in getattr(vocabulary, 'added_tokens', ()) if t not in has]
  if extra:
    raise ValueError(
      f"{tokenizer.folder}: its tokenizer lacks tokens that the task's "
      f'vocabulary adds: {_listed(extra)}. Student and teacher must have the '
      'same tokens.'
    )


def _check_json(
  vocabulary: seqio.Vocabulary,
  digest: str,
  tokenizer: tokenizer_files.TokenizerFiles | None,
) -> None:
  """Raises ValueError unless a tokenizer.json is that of a folder."""
  if tokenizer is None or tokenizer.json_digest == digest:
    return
  raise ValueError(
    f"{tokenizer.folder}: its tokenizer is not that of the task's vocabulary, "
    f'{vocabulary}: it has '
    + (
      f'another {tokenizer_files.FAST}.'
      if tokenizer.json_digest
      else f'no {tokenizer_files.FAST}. If a file in the folder is its '
      'SentencePiece model, use gin/vocabularies/sentencepiece.gin.'
    )
  )


def _check_pieces(
  vocabulary: seqio.SentencePieceVocabulary,
  tokenizer: tokenizer_files.TokenizerFiles,
) -> None:
  """Raises ValueError unless tokenizer.json has the vocabulary's pieces."""
  size, model = vocabulary.tokenizer.get_piece_size(), vocabulary.tokenizer
  for number, piece in enumerate(tokenizer.pieces or ()):
    has = model.id_to_piece(number) if number < size else None
    if tokenizer_files.is_sentinel(piece) and (
      has is None or has.removeprefix('▁') == piece.removeprefix('▁')
    ):
      continue
    if has != piece:
      raise ValueError(
        f"{tokenizer.folder}/tokenizer.json is not the task's vocabulary, "
        f'{describe(vocabulary)}: the piece {number} is {piece!r}, not {has!r}.'
      )


def _check_sentinels(
  vocabulary: seqio.SentencePieceVocabulary,
  tokenizer: tokenizer_files.TokenizerFiles,
) -> None:
  """Raises ValueError if the number of sentinels is another than the folder's.

  0 is always possible: without sentinels, the pieces keep their ids.
  """
  there = tokenizer.extra_ids
  if vocabulary.extra_ids and there not in (None, vocabulary.extra_ids):
    raise ValueError(
      f'VOCABULARY_EXTRA_IDS is {vocabulary.extra_ids}, but '
      f'{tokenizer.folder}/tokenizer_config.json has extra_ids {there}, so '
      f'<extra_id_0> would get another id. Set VOCABULARY_EXTRA_IDS={there}.'
    )


def _check_ids(
  vocabulary: seqio.SentencePieceVocabulary,
  tokenizer: tokenizer_files.TokenizerFiles,
  where: object,
) -> list[tokenizer_files.AddedToken]:
  """Returns the tokens of a folder that a vocabulary lacks; checks the others.

  Sentinels that the vocabulary lacks are left out, unless other tokens follow.

  Args:
    vocabulary: with or without added tokens.
    tokenizer: of the folder.
    where: path or setting, for errors.

  Raises:
    ValueError: a token has another id in the vocabulary, or an id that no
      vocabulary of this model can give it.
  """
  model, lacking = vocabulary.tokenizer, []
  size = model.get_piece_size()
  ours = getattr(vocabulary, 'added_tokens', {})
  of_id = {number: token for token, number in ours.items()}
  for token in tokenizer.added:
    has = of_id.get(token.id)
    if token.id < size:
      has = model.id_to_piece(token.id)
    if has is None:
      lacking.append(token)
    elif has.removeprefix('▁') != token.content.removeprefix('▁'):
      raise ValueError(
        f'{where}: the token {token.content!r} of the tokenizer files in '
        f'{tokenizer.folder} has the id {token.id}, but that is {has!r} in the '
        f'vocabulary {describe(vocabulary)}.'
        + (
          f' VOCABULARY_EXTRA_IDS is {vocabulary.extra_ids}; these files need '
          'another number of sentinels.'
          if tokenizer_files.is_sentinel(has)
          else ''
        )
      )
  others = [t for t in lacking if not tokenizer_files.is_sentinel(t.content)]
  if not others:
    return []
  if len(others) < len(lacking) and lacking.index(others[-1]) >= len(others):
    sentinels = len(lacking) - len(others)
    raise ValueError(
      f'{where}: the tokenizer files in {tokenizer.folder} add '
      f'{_listed(t.content for t in others)} after {sentinels} sentinels. Set '
      f'VOCABULARY_EXTRA_IDS={vocabulary.extra_ids + sentinels}.'
    )
  first = size + len(ours)
  if [t.id for t in others] != [*range(first, first + len(others))]:
    raise ValueError(
      f'{where}: the tokenizer files in {tokenizer.folder} add '
      f'{_listed(f"{t.content} (id {t.id})" for t in others)}; after the '
      f'{first} ids of the vocabulary {describe(vocabulary)}, their ids must '
      f'be {first}, {first + 1}, ... Check VOCABULARY_EXTRA_IDS.'
    )
  if words := [t.content for t in others if t.single_word]:
    raise ValueError(
      f'{where}: the tokenizer files in {tokenizer.folder} add '
      f'{_listed(words)} as single words (single_word: true), which gkd_jax '
      'does not support.'
    )
  return others


def _check_special(
  vocabulary: seqio.SentencePieceVocabulary,
  tokenizer: tokenizer_files.TokenizerFiles,
  where: object,
) -> None:
  """Raises ValueError if a special token of a folder has no id.

  Args:
    vocabulary: with or without added tokens.
    tokenizer: of the folder.
    where: path or setting, for errors.
  """
  model = vocabulary.tokenizer
  placed = {token.content for token in tokenizer.added}
  unplaced = [
    token
    for token in tokenizer.special
    if token not in placed
    and not tokenizer_files.is_sentinel(token)
    and model.id_to_piece(model.piece_to_id(token)) != token
  ]
  if unplaced:
    raise ValueError(
      f'{where}: the tokenizer files in {tokenizer.folder} name the '
      f'special tokens {_listed(unplaced)}, which are no pieces of the model, '
      'and give them no id. Save them again with transformers: AutoTokenizer.'
      f"from_pretrained('{tokenizer.folder}').save_pretrained(NEW_FOLDER)."
    )


def _listed(names: Iterable[str]) -> str:
  """Returns the first names of a list, for errors."""
  names = list(names)
  shown = ', '.join(map(repr, names[:5]))
  return shown if len(names) <= 5 else f'{shown} and {len(names) - 5} more'


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
    text = f'{kind} {size} ids, model sha256 {digest}'
    if added := getattr(vocabulary, 'added_tokens', None):
      digest = hashlib.sha256(repr(added).encode()).hexdigest()
      text += f', {len(added)} added tokens {digest[:8]}'
    return text
  if digest := getattr(vocabulary, 'json_digest', None):
    return f'{kind} {size} ids, {tokenizer_files.FAST} sha256 {digest}'
  return f'{kind} {size} ids'


def file_of(vocabulary: seqio.Vocabulary) -> str | None:
  """Returns the file that a vocabulary is read from; None if there is none."""
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return str(vocabulary.sentencepiece_model_file)
  return getattr(vocabulary, 'json_path', None)


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
