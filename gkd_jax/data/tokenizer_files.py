# SPDX-License-Identifier: Apache-2.0
"""Reads the tokenizer files of a Hugging Face folder, without transformers.

They name the class of the tokenizer, tokens that were added to its pieces, and
special tokens. What they name is used or refused: see `vocabularies`.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from gkd_jax.runtime import files

MODEL = 'spiece.model'
FAST = 'tokenizer.json'
SENTENCEPIECE = 'SentencePiece'
BYTES = 'bytes'

# Names of the file of the SentencePiece model; the second is Gemma's.
_MODELS = (MODEL, 'tokenizer.model')
_CONFIG = 'tokenizer_config.json'
_ADDED = 'added_tokens.json'
_SPECIAL = 'special_tokens_map.json'
# Class of the tokenizer, without 'Fast' -> kind.
_KINDS = {
  'T5Tokenizer': SENTENCEPIECE,
  'MT5Tokenizer': SENTENCEPIECE,
  'UMT5Tokenizer': SENTENCEPIECE,
  'ByT5Tokenizer': BYTES,
}
# Its tokenizer.json, if there is one, has the SentencePiece model as a BPE.
_GEMMA = 'GemmaTokenizer'
# Classes that may hold any kind of model.
_GENERIC = (None, 'PreTrainedTokenizer', 'TokenizersBackend')
# Files of other kinds of tokenizers.
_OTHERS = {'merges.txt': 'BPE', 'vocab.json': 'BPE', 'vocab.txt': 'WordPiece'}
_NAMED_TOKENS = ('pad', 'bos', 'eos', 'unk', 'sep', 'cls', 'mask')
_LISTED_TOKENS = ('additional_special_tokens', 'extra_special_tokens')


class AddedToken(NamedTuple):
  """A token that a text is split at, before the pieces are searched."""

  id: int
  content: str
  lstrip: bool = False  # it takes the spaces before it
  rstrip: bool = False  # and after it
  single_word: bool = False  # it is not found within words


class TokenizerFiles(NamedTuple):
  """The tokenizer of a folder.

  Attributes:
    folder: of the files.
    kind: SENTENCEPIECE, BYTES, or the name of another class or model.
    digest: sha256 of the SentencePiece model; None without this file.
    added: the tokens with an id of their own in these files, by id; some may be
      pieces of the model.
    special: all special tokens that the files name.
    extra_ids: number of sentinels, if a file has it.
    pieces: of tokenizer.json's Unigram model, by id; None without it.
    named: special tokens by their names, such as {'eos': '</s>'}.
    json_digest: sha256 of what tokenizer.json says of tokens and texts; None
      without this file.
  """

  folder: epath.Path
  kind: str
  digest: str | None
  added: Sequence[AddedToken]
  special: Sequence[str]
  extra_ids: int | None
  pieces: Sequence[str] | None
  named: Mapping[str, str]
  json_digest: str | None


def is_sentinel(token: str) -> bool:
  """Whether a token is one of T5's sentinels, such as <extra_id_0>."""
  return bool(re.fullmatch(r'▁?<extra_id_\d+>', token))


def read(folder: str | os.PathLike) -> TokenizerFiles | None:
  """Returns the tokenizer of a folder; None without tokenizer files.

  Raises:
    ValueError: a file is damaged, or two files contradict each other.
  """
  folder = epath.Path(folder)
  config, fast, added, special = (
    _read_json(folder / name) for name in (_CONFIG, FAST, _ADDED, _SPECIAL)
  )
  kind, pieces = _kind_and_pieces(folder, config, fast)
  if kind is None:
    return None
  digest = None
  if model := _model(folder):
    digest = hashlib.sha256((folder / model).read_bytes()).hexdigest()
  return TokenizerFiles(
    folder,
    kind,
    digest,
    _merged(
      itertools.chain(
        _of_config(folder / _CONFIG, config),
        _of_fast(folder / FAST, fast),
        _of_added(folder / _ADDED, added),
      )
    ),
    list(
      dict.fromkeys(
        [
          *_special(folder / _CONFIG, config),
          *_special(folder / _SPECIAL, special),
        ]
      )
    ),
    files.field(config, 'extra_ids', int, folder / _CONFIG, None),
    pieces,
    dict(
      itertools.chain(
        _named(folder / _SPECIAL, special), _named(folder / _CONFIG, config)
      )
    ),
    _json_digest(fast) if fast else None,
  )


def _model(folder: epath.Path) -> str | None:
  """Returns the name of the SentencePiece model in a folder."""
  return next((name for name in _MODELS if _has(folder, name)), None)


def _json_digest(fast: Mapping[str, Any]) -> str:
  """Returns a hash of tokenizer.json without what is set for each use."""
  kept = {
    name: value
    for name, value in fast.items()
    if name not in ('version', 'truncation', 'padding', 'post_processor')
  }
  text = json.dumps(kept, sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(text.encode()).hexdigest()


def _kind_and_pieces(
  folder: epath.Path,
  config: Mapping[str, Any],
  fast: Mapping[str, Any],
) -> tuple[str | None, list[str] | None]:
  name = files.field(config, 'tokenizer_class', str, folder / _CONFIG, None)
  if name is None:
    names = (_CONFIG, FAST, *_MODELS, *_OTHERS)
    there = [n for n in names if _has(folder, n)]
    if not there:
      return None, None
    if there in (
      [name] for name in _MODELS
    ):  # any folder; its config.json may be of anything
      return SENTENCEPIECE, None
    path = folder / 'config.json'
    name = files.field(_read_json(path), 'tokenizer_class', str, path, None)
  pieces, kind_of_model = None, None
  if fast:
    of = files.field(fast, 'model', dict, folder / FAST)
    kind_of_model = files.field(of, 'type', str, folder / FAST, 'unknown type')
    if kind_of_model == 'Unigram':
      pieces = _pieces(folder / FAST, of)
  of_class = name and name.removesuffix('Fast')
  if of_class not in _GENERIC:
    if of_class == _GEMMA and _model(folder):
      return SENTENCEPIECE, None
    kind = _KINDS.get(of_class, name)
    if kind_of_model and kind not in (SENTENCEPIECE, BYTES):
      kind = f'{name} with a model of type {kind_of_model}'
    if kind == SENTENCEPIECE and fast and pieces is None:
      kind = f'{name} with a model of type {kind_of_model}'
    return kind, pieces
  if pieces is not None or _model(folder):
    return SENTENCEPIECE, pieces
  if kind_of_model is None:
    kind_of_model = next(
      (kind for file, kind in _OTHERS.items() if _has(folder, file)), None
    )
  if kind_of_model is None:  # a tokenizer_config.json alone
    return name or SENTENCEPIECE, None
  return f'{name or "tokenizer"} with a model of type {kind_of_model}', None


def _read_json(path: epath.Path) -> dict[str, Any]:
  return files.read_json(path) if path.is_file() else {}


def _has(folder: epath.Path, name: str) -> bool:
  return (folder / name).is_file()


def _pieces(path: epath.Path, model: Mapping[str, Any]) -> list[str]:
  pieces = []
  for entry in files.field(model, 'vocab', list, path):
    match entry:
      case [str(piece), _]:
        pieces.append(piece)
      case _:
        raise ValueError(
          f'{path}: model.vocab must be pairs of a piece and its score.'
        )
  return pieces


# --- Tokens of each file ------------------------------------------------------


def _of_config(
  path: epath.Path, config: Mapping[str, Any]
) -> Iterator[tuple[epath.Path, AddedToken]]:
  decoder = files.field(config, 'added_tokens_decoder', dict, path, {})
  for number, values in decoder.items():
    if not number.isdecimal():
      raise ValueError(
        f'{path}: added_tokens_decoder has the id {number!r}, which is no '
        'whole number.'
      )
    yield path, _token(path, 'added_tokens_decoder', int(number), values)


def _of_fast(
  path: epath.Path, fast: Mapping[str, Any]
) -> Iterator[tuple[epath.Path, AddedToken]]:
  for values in files.field(fast, 'added_tokens', list, path, []):
    number = values.get('id') if isinstance(values, Mapping) else None
    yield path, _token(path, 'added_tokens', number, values)


def _of_added(
  path: epath.Path, added: Mapping[str, Any]
) -> Iterator[tuple[epath.Path, AddedToken]]:
  for content in added:
    number = files.field(added, content, int, path)
    yield path, _token(path, content, number, {'content': content})


def _token(path: epath.Path, where: str, number: Any, values: Any):
  if not isinstance(values, Mapping):
    raise ValueError(f'{path}: {where} must hold objects {{...}}.')
  if type(number) is not int or not 0 <= number < 2**31:
    raise ValueError(f'{path}: {where} has the id {number!r}.')
  content = files.field(values, 'content', str, path)
  if not content:
    raise ValueError(f'{path}: {where} has an empty token.')
  return AddedToken(
    number,
    content,
    *(
      files.field(values, name, bool, path, False)
      for name in AddedToken._fields[2:]
    ),
  )


def _merged(
  tokens: Iterator[tuple[epath.Path, AddedToken]],
) -> list[AddedToken]:
  """Returns the tokens of all files, by id; the first file's options count.

  Raises:
    ValueError: a token has two ids, or an id has two tokens.
  """
  by_id, by_content = {}, {}
  for path, token in tokens:
    known = by_id.setdefault(token.id, token)
    same = by_content.setdefault(token.content, token)
    if known.content != token.content or same.id != token.id:
      other = known if known.content != token.content else same
      raise ValueError(
        f'{path}: the token {token.content!r} has the id {token.id}, but '
        f'{other.content!r} has the id {other.id} in these tokenizer files. '
        'Copy the folder again, or correct the file.'
      )
  return [by_id[number] for number in sorted(by_id)]


def _special(path: epath.Path, values: Mapping[str, Any]) -> Iterator[str]:
  """Yields the special tokens that a file names."""
  for _, token in _named(path, values):
    yield token
  for name in _LISTED_TOKENS:
    value = values.get(name)
    if isinstance(value, Mapping):
      value = list(value.values())
    if not isinstance(value, list | None):
      raise ValueError(f'{path}: {name} must be a list of tokens.')
    for token in value or ():
      yield _content(path, name, token)


def _named(
  path: epath.Path, values: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
  """Yields (name, token) of special tokens such as EOS."""
  for name in _NAMED_TOKENS:
    value = values.get(f'{name}_token')
    if value is not None:
      yield name, _content(path, f'{name}_token', value)


def _content(path: epath.Path, name: str, value: Any) -> str:
  if isinstance(value, Mapping):
    value = value.get('content')
  if not isinstance(value, str):
    raise ValueError(f'{path}: {name} must be a token, not {value!r}.')
  return value
