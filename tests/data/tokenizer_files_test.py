# SPDX-License-Identifier: Apache-2.0
"""What the tokenizer files of a folder name is used, or refused by name."""

import copy
import json

import pytest

from gkd_jax.data import tokenizer_files, vocabularies
from tests import conftest


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('model') / 'spiece.model'
  conftest.train_sentencepiece(path, ['the fox dog'] * 9, vocab_size=12)
  return path.read_bytes()


NUM_PIECES = 12  # pad, EOS, unknown, space, and 8 letters


@pytest.fixture
def folder(tmp_path, model):
  """Makes a folder of {file: content}."""

  def make(files, with_model=True):
    if with_model:
      (tmp_path / 'spiece.model').write_bytes(model)
    for name, content in files.items():
      text = content if isinstance(content, str) else json.dumps(content)
      (tmp_path / name).write_text(text)
    return tmp_path

  return make


def config(tokens=(), first=NUM_PIECES, **fields):
  """A tokenizer_config.json that adds tokens."""
  added = {
    str(number): {'content': token, 'special': False}
    for number, token in enumerate(tokens, first)
  }
  return {'tokenizer_class': 'T5Tokenizer', 'added_tokens_decoder': added} | (
    fields
  )


def vocabulary(folder, extra_ids=0):
  return vocabularies.sentencepiece(folder / 'spiece.model', extra_ids)


# --- Added tokens are used ----------------------------------------------------


def added_in(form, tokens):
  """The files in which the versions of transformers keep added tokens."""
  ids = {token: NUM_PIECES + i for i, token in enumerate(tokens)}
  return {
    'added_tokens.json': {'added_tokens.json': ids},
    'tokenizer_config.json': {'tokenizer_config.json': config(tokens)},
    'tokenizer.json': {
      'tokenizer.json': {
        'added_tokens': [{'id': n, 'content': t} for t, n in ids.items()],
        'model': {'type': 'Unigram', 'vocab': []},
      }
    },
  }[form]


@pytest.mark.parametrize(
  'form', ['added_tokens.json', 'tokenizer_config.json', 'tokenizer.json']
)
def test_added_tokens_are_ids_of_the_vocabulary(folder, form):
  made = vocabulary(folder(added_in(form, ['<sep>', '{', '\n'])))

  assert made.vocab_size == NUM_PIECES + 3
  assert made.added_tokens == {
    '<sep>': NUM_PIECES,
    '{': NUM_PIECES + 1,
    '\n': NUM_PIECES + 2,
  }


@pytest.mark.parametrize(
  'text, tokens, decoded',
  [
    # As transformers 5.23 with T5Tokenizer splits and joins.
    ('the fox <sep> { dog }', '▁the▁fox|<sep>|{|▁dog|}', 'the fox<sep>{ dog}'),
    ('{x}', '{|▁x|}', '{ x}'),
    ('the<sep>dog', '▁the|<sep>|▁dog', 'the<sep> dog'),
    ('x  {  e\n f', '▁x|{|▁e|\n|▁f', 'x{ e\n f'),
    (' <sep>', '<sep>', '<sep>'),
    ('<sep><sep2>', '<sep>|<sep2>', '<sep><sep2>'),
    ('é{é', '▁?|{|▁?', ' ⁇ {  ⁇ '),
    ('ü', 'ü', 'ü'),
    ('', '', ''),
  ],
)
def test_a_text_is_split_at_added_tokens_first(folder, text, tokens, decoded):
  import tensorflow as tf

  made = vocabulary(
    folder(
      {
        'tokenizer_config.json': config(
          ['<sep>', '{', '}', '\n', '<sep2>', 'ü']
        )
      }
    )
  )

  ids = made.encode(text)

  assert made.encode_tf(tf.constant(text)).numpy().tolist() == ids
  assert made.encode_tf(tf.constant([text, text])).to_list() == [ids, ids]
  pieces = []
  for part in filter(None, tokens.split('|')):
    if part in made.added_tokens:
      pieces.append(made.added_tokens[part])
    else:
      pieces += [2 if c == '?' else made.tokenizer.piece_to_id(c) for c in part]
  assert ids == pieces
  assert made.decode(ids) == decoded
  assert made.decode([*ids, 1, 5]) == decoded


def test_a_vocabulary_with_added_tokens_is_another_one(folder):
  made = vocabulary(folder({'tokenizer_config.json': config(['{'])}))
  other = vocabulary(folder({'tokenizer_config.json': config(['}'])}))
  plain = vocabulary(folder({'tokenizer_config.json': config()}))

  assert len({vocabularies.describe(v) for v in (made, other, plain)}) == 3
  assert made != other and made != plain
  # gin copies a vocabulary.
  assert copy.deepcopy(made) == made


def test_added_tokens_may_follow_sentinels(folder):
  tokens = ['<extra_id_1>', '<extra_id_0>', '{']
  made = vocabulary(
    folder({'tokenizer_config.json': config(tokens, extra_ids=2)}), extra_ids=2
  )

  assert made.encode('<extra_id_0> {') == [NUM_PIECES + 1, NUM_PIECES + 2]


@pytest.mark.parametrize('extra_ids', [0, 2])
def test_sentinels_may_be_left_out(folder, extra_ids):
  tokens = ['<extra_id_1>', '<extra_id_0>']
  made = vocabulary(
    folder({'tokenizer_config.json': config(tokens, extra_ids=2)}), extra_ids
  )

  assert made.vocab_size == NUM_PIECES + extra_ids


# --- Or refused by name -------------------------------------------------------


@pytest.mark.parametrize(
  'files, extra_ids, said',
  [
    (config(['{'], first=20), 0, r"'\{ \(id 20\)'; after the 12 ids"),
    (config(['{'], first=5), 0, r"'\{' of the tokenizer files .* has the id 5"),
    (config(['{']), 2, "but that is '▁<extra_id_1>' .* another number of sent"),
    (
      config(['<extra_id_0>', '{']),
      0,
      r"'\{' after 1 sentinels. Set VOCABULARY_EXTRA_IDS=1",
    ),
    (config(extra_ids=3), 2, 'has extra_ids 3, .* VOCABULARY_EXTRA_IDS=3'),
    (config(sep_token='<s>'), 0, "name the special tokens '<s>', which are no"),
    (config(additional_special_tokens=['<u>']), 0, "special tokens '<u>'"),
    (
      config()
      | {'added_tokens_decoder': {'12': {'content': 'a', 'single_word': True}}},
      0,
      "add 'a' as single words",
    ),
  ],
)
def test_what_a_vocabulary_cannot_have_is_refused_by_name(
  folder, files, extra_ids, said
):
  with pytest.raises(ValueError, match=said):
    vocabulary(folder({'tokenizer_config.json': files}), extra_ids)


def test_two_ids_of_a_token_are_refused_with_the_file(folder):
  files = {
    'tokenizer_config.json': config(['{', '}']),
    'added_tokens.json': {'}': NUM_PIECES},
  }

  with pytest.raises(
    ValueError, match=r"added_tokens.json: the token '\}' has"
  ):
    tokenizer_files.read(folder(files))


def test_sentinels_in_the_model_need_no_extra_ids(tmp_path):
  path = tmp_path / 'spiece.model'
  conftest.train_sentencepiece(
    path,
    ['abc'] * 9,
    vocab_size=9,
    user_defined_symbols=['▁<extra_id_1>', '▁<extra_id_0>'],
  )

  with pytest.raises(ValueError, match='Set VOCABULARY_EXTRA_IDS=0'):
    vocabularies.sentencepiece(path)
  assert vocabularies.sentencepiece(path, 0).encode('<extra_id_0>') == [4]


# --- The tokenizer of a checkpoint --------------------------------------------


def check(folder, of):
  vocabularies.check_tokenizer(of, tokenizer_files.read(folder))


@pytest.mark.parametrize(
  'files, name',
  [
    (
      {'tokenizer_config.json': {'tokenizer_class': 'RobertaTokenizer'}},
      'RobertaTokenizer',
    ),
    (
      {'tokenizer_config.json': {'tokenizer_class': 'LlamaTokenizerFast'}},
      'LlamaTokenizerFast',
    ),
    ({'vocab.json': {}, 'merges.txt': ''}, 'a model of type BPE'),
    ({'vocab.txt': ''}, 'a model of type WordPiece'),
    (
      {
        'tokenizer_config.json': {'tokenizer_class': 'PreTrainedTokenizerFast'},
        'tokenizer.json': {'model': {'type': 'BPE'}},
      },
      'PreTrainedTokenizerFast with a model of type BPE',
    ),
    (
      {
        'tokenizer_config.json': {},
        'config.json': {'tokenizer_class': 'BertTokenizer'},
      },
      'BertTokenizer',
    ),
  ],
)
@pytest.mark.parametrize('kind', ['pieces', 'bytes'])
def test_another_tokenizer_is_refused_by_its_class(
  folder, sentencepiece_models, files, name, kind
):
  of = vocabularies.byte()
  if kind == 'pieces':
    of = vocabularies.sentencepiece(sentencepiece_models[0], 0)

  with pytest.raises(ValueError, match=f'has the tokenizer .*{name}, which'):
    check(folder(files, with_model=False), of)


@pytest.mark.parametrize(
  'name', ['T5Tokenizer', 'T5TokenizerFast', 'MT5Tokenizer', None]
)
def test_sentencepiece_tokenizers_are_accepted(folder, name):
  made = folder({'tokenizer_config.json': {'tokenizer_class': name}})

  check(made, vocabulary(made))


def test_gemma_is_accepted_with_its_sentencepiece_model(
  folder, tmp_path, model
):
  plain = tmp_path / 'plain'
  plain.mkdir()
  (plain / 'tokenizer.model').write_bytes(model)
  of = vocabularies.sentencepiece(plain / 'tokenizer.model', 0)
  made = folder(
    {
      'tokenizer_config.json': {'tokenizer_class': 'GemmaTokenizer'},
      'tokenizer.json': {'model': {'type': 'BPE'}},
    },
    with_model=False,
  )

  with pytest.raises(
    ValueError, match='GemmaTokenizer with a model of type BPE.*tokenizer_json'
  ):
    check(made, of)
  (made / 'tokenizer.model').write_bytes(model)
  check(made, of)


def test_tokens_that_only_one_side_adds_are_refused(folder, tmp_path, model):
  added = folder({'tokenizer_config.json': config(['{', '}'])})
  plain = tmp_path / 'plain'
  plain.mkdir()
  (plain / 'spiece.model').write_bytes(model)

  check(added, vocabulary(added))
  with pytest.raises(
    ValueError, match=r"vocabulary lacks: '\{', '\}'. Set VOC"
  ):
    check(added, vocabulary(plain))
  with pytest.raises(ValueError, match=r"lacks tokens .* adds: '\{', '\}'"):
    check(plain, vocabulary(added))


def test_special_tokens_without_an_id_are_refused(folder, tmp_path, model):
  plain = tmp_path / 'plain'
  plain.mkdir()
  (plain / 'spiece.model').write_bytes(model)
  tokens = {'additional_special_tokens': ['<extra_id_0>', '<sep>']}
  made = folder({'special_tokens_map.json': tokens})

  with pytest.raises(ValueError, match="special tokens '<sep>', which are no"):
    check(made, vocabulary(plain))


@pytest.mark.parametrize('has_id', [True, False])
def test_tokens_added_to_bytes_are_refused(folder, has_id):
  tokens = ['<extra_id_0>', '<sep>']
  fields = (
    config(tokens, first=259)
    if has_id
    else {'additional_special_tokens': tokens}
  )
  made = folder(
    {'tokenizer_config.json': fields | {'tokenizer_class': 'ByT5Tokenizer'}},
    with_model=False,
  )

  with pytest.raises(ValueError, match="adds '<sep>' to the bytes"):
    check(made, vocabularies.byte())


def test_the_pieces_of_a_tokenizer_json_are_compared(folder, tmp_path, model):
  (tmp_path / 'plain').mkdir()
  (tmp_path / 'plain' / 'spiece.model').write_bytes(model)
  of = vocabulary(tmp_path / 'plain')
  pieces = [of.tokenizer.id_to_piece(i) for i in range(NUM_PIECES)]

  def of_pieces(pieces):
    vocab = [[piece, 0.0] for piece in pieces]
    return folder(
      {'tokenizer.json': {'model': {'type': 'Unigram', 'vocab': vocab}}},
      with_model=False,
    )

  check(of_pieces([*pieces, '<extra_id_0>']), of)
  with pytest.raises(ValueError, match="the piece 4 is '-', not"):
    check(of_pieces([*pieces[:4], '-', *pieces[5:]]), of)


# --- Damaged files ------------------------------------------------------------


@pytest.mark.parametrize(
  'name, content, said',
  [
    ('tokenizer_config.json', '{', 'is not valid JSON'),
    ('tokenizer_config.json', '[]', 'holds list'),
    ('tokenizer_config.json', {'tokenizer_class': 3}, 'must be a text, not 3'),
    ('tokenizer_config.json', {'extra_ids': '100'}, 'extra_ids must be a whol'),
    (
      'tokenizer_config.json',
      {'added_tokens_decoder': []},
      'must be an object',
    ),
    (
      'tokenizer_config.json',
      {'added_tokens_decoder': {'x': {}}},
      "the id 'x'",
    ),
    ('tokenizer_config.json', {'eos_token': 1}, 'eos_token must be a token'),
    ('added_tokens.json', {'x': '3'}, 'x must be a whole number'),
    ('added_tokens.json', {'x': -3}, 'x has the id -3'),
    (
      'tokenizer.json',
      {'model': {'type': 'Unigram', 'vocab': [3]}},
      'pairs of',
    ),
    ('tokenizer.json', {'model': {}, 'added_tokens': [3]}, 'must hold objects'),
    ('special_tokens_map.json', {'additional_special_tokens': 3}, 'be a list'),
    ('special_tokens_map.json', '[' * 10**5, 'is nested too deeply'),
  ],
)
def test_a_damaged_file_is_named(folder, name, content, said):
  made = folder({name: content, 'spiece.model': ''}, with_model=False)

  with pytest.raises(ValueError, match=said) as error:
    tokenizer_files.read(made)
  assert str(error.value).startswith(f'{made / name}')
