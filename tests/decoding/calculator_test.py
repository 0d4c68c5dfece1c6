# SPDX-License-Identifier: Apache-2.0
import functools
import io
import itertools
import json
import random
import re
import time
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax.decoding import calculator, sampler
from gkd_jax.decoding.calculator import compute
from gkd_jax.parallel import partitioning
from tests import conftest, tiny

GSM8K = conftest.ROOT.parent / 'shared' / 'data' / 'gsm8k_train.jsonl'
T5_PIECES = conftest.ROOT.parent / 'shared' / 'data' / 't5_sentencepiece.model'


class Bytes:
  """Like seqio.ByteVocabulary, without TensorFlow."""

  vocab_size = 259

  def encode(self, text):
    return [byte + 3 for byte in text.encode()]

  def decode(self, ids):
    return bytes(i - 3 for i in ids if 3 <= i).decode(errors='ignore')


BYTES = Bytes()


# --- What is computed ---------------------------------------------------------


@pytest.mark.parametrize(
  'text, result',
  [
    ('48/2', '24'),
    ('48 / 2 ', '24'),
    ('2+3*4', '14'),
    ('2*3+4', '10'),
    ('10-4-3', '3'),
    ('24/4/2', '3'),
    ('24/4*2', '12'),
    ('(2+3)*4', '20'),
    ('2*(3+(4-1))', '12'),
    ('((5)) + 1', '6'),
    ('9//2', '4'),
    ('-9//2', '-5'),
    ('3 x 4', '12'),
    ('3x4', '12'),
    ('3 × 4 ÷ 6', '2'),
    ('30 – 12 − 3', '15'),
    ('-19-10', '-29'),
    ('5*-3', '-15'),
    ('5--3', '8'),
    ('-(2+3)*2', '-10'),
    ('5 + (-8)', '-3'),
    ('.5+0.25', '0.75'),
    ('12.+1', '13'),
    ('0.1+0.2', '0.3'),
    ('1/8', '0.125'),
    ('-1/8', '-0.125'),
    ('3-3', '0'),
    ('2.50*2', '5'),
    ('$12 / 60', '0.2'),
    ('€27 + £3', '30'),
    ('1200*10', '12000'),
    ('1,200*10', '12,000'),
    ('1,200*10.5-0.25', '12,599.75'),
    ('1,000-2,000', '-1,000'),
    ('1,000/4', '250'),
    ('500*10%', '50'),
    ('$120 * (1-20%)', '96'),
    ('40%/10%', '4'),
    ('100% - 40%', '60%'),
    ('30% * 20%', '6%'),
    ('13/25 x 100%', '52%'),
  ],
)
def test_result_of_plain_text(text, result):
  assert compute(text) == result


@pytest.mark.parametrize(
  'text, result',
  [
    # The longest end of the line that is an expression.
    ('Natalia sold 48/2 ', '24'),
    ('a total of 20 + 30 ', '50'),
    ('He has 5. 3 + 4 ', '7'),
    ('On day 2, 3 + 4', '7'),
    ('because (40 - 10) / 2 ', '15'),
    ('2x-10\n3 + 4', '7'),
    ('so (5 + 3 ', '8'),
    ('5*4=20+3', '23'),
    ('x = -5+3', '-2'),
    ('it is -5+3', '-2'),
    # A number after `=` is the result of the equation before.
    ('38-57=-19 -19-10', '-29'),
    ('57-10=47 47+5', '52'),
    ('7+5=12 12-20=-8 -8-8', '-16'),
    ('⁇ 12/60', '0.2'),
  ],
)
def test_the_expression_is_cut_out_of_its_line(text, result):
  assert compute(text) == result


@pytest.mark.parametrize(
  'text',
  [
    '',
    ' ',
    'x ',
    'x = 5 ',
    '5',
    '(5)',
    '-5',
    '50% ',
    '2 + 3 = 5 ',
    # Units and words: what is left of it is not the expression.
    '3 apples * 4 ',
    '8 apples + 5 + 3',
    '3 trays * 4 cakes ',
    'boxes x 4 + 2',
    '(3 apples) * 4 + 2',
    # Variables.
    'x + 5 + 20',
    'x+5+20',
    '6x-240',
    '4x+20',
    'x5 + 3',
    '(x+1)(3+4)',
    '2(3+4)',
    # Other notation.
    '2**3+1',
    '2^3+1',
    '9**9**9',
    '√25+1',
    '5! + 3',
    '6:00+48',
    '0900-0130',
    # Numbers that go on to the left.
    '1 1/2 * 60',
    '8 x 1 1/2',
    '12 x 1 and 1/4',
    '80 000 x 20/100',
    '1,00,000 + 1',
    '3,4 + 5',
    '20 -5*2',
    '(8) -5*2',
    '28 / 1/5',
    # No result.
    '5/0',
    '5/0+3+4',
    '1/(2-2)',
    '7//0',
    '10/3',
    '1/1024/1024',
    # Not of the grammar.
    '3 + ',
    '3 + * 4',
    '3 + 4)',
    '2*(3 + 4',
    '5---3',
    '+5+3',
    '2 + 3 and then',
  ],
)
def test_nothing_is_computed_where_it_might_be_wrong(text):
  assert compute(text) is None


@pytest.mark.parametrize(
  'text, result',
  [
    ('<<48/2', '24>>'),
    ('48/2 = <<48/2', '24>>'),
    ('$<<12/60', '0.2>>'),
    ('a <<1+2=3>>3 and <<3*4', '12>>'),
    # All of it is the expression, and it need not have an operator.
    ('<<12', '12>>'),
    ('<<+12+3', '15>>'),
    ('<<3*+6', '18>>'),
    ('<<560//10', '56>>'),
    ('<<1000*12', '12000>>'),
    ('<<', None),
    ('<<5+', None),
    ('<<3 apples*4', None),
    ('<<1/0', None),
    ('<<10/3', None),
    # Of an annotation that is closed, nothing is left.
    ('<<1+2>>3+4', '7'),
  ],
)
def test_result_of_an_annotation(text, result):
  assert compute(text) == result


@pytest.mark.parametrize(
  'text, result',
  [
    (f'{"9" * 15}*1', '9' * 15),
    (f'{"9" * 15}+1', None),
    (f'{"9" * 16}-{"9" * 16}', None),
    ('100000000*100000000', None),
    ('0.000001*0.000001', '0.000000000001'),
    ('0.000001*0.0000001', None),
    ('+'.join('1' * 60), '60'),  # 119 characters
    ('+'.join('1' * 61), None),
    ('12' + '+1' * 59, '71'),  # 120 characters
    ('112' + '+1' * 59, None),
    (f'{"(" * 50}1+1{")" * 50}', '2'),
    (f'{"(" * 60}1+1{")" * 60}', None),
    (f'{"x " * 1000}1+1', None),
    (f'{"y " * 1000}1+1', '2'),
    ('9' * 5000 + '*1', None),
  ],
)
def test_limits_on_size(text, result):
  assert compute(text) == result


def test_no_text_makes_it_fail_or_slow():
  rng = random.Random(0)
  pieces = [*'0123456789.,+-*/x×÷–()%$€^=<> \n', '<<', '>>', '1,000', ' - ']
  pieces += ['9' * 40, '((((', '1/3', '⁇', '٣', 'é', '\x00', 'apples']
  texts = [
    ''.join(rng.choices(pieces, k=rng.randint(0, 60))) for _ in range(3000)
  ]
  texts += [c * n for c in pieces for n in (119, 120, 121, 10_000)]
  texts += ['(1' * 200, '-(' * 200, '1+' * 200, '<<' + '(' * 118, '1/3+' * 30]
  slowest = 0.0
  num_results = 0
  for text in texts:
    start = time.thread_time()
    result = compute(text)
    slowest = max(slowest, time.thread_time() - start)
    if result is not None:
      num_results += 1
      assert re.fullmatch(r'-?[0-9][0-9,]*(\.[0-9]+)?%?(>>)?', result), text
      assert len(result) <= 24, text
  assert num_results > 30
  assert slowest < 0.5  # seconds of CPU time; measured: 0.02


def test_a_result_is_pythons_exact_one():
  rng = random.Random(1)

  def number():
    return rng.choice(['7', '12', '0.5', '.25', '1.20', '100', '3.', '64'])

  def expression(depth):
    if depth == 0 or rng.random() < 0.2:
      return number()
    a, b = expression(depth - 1), expression(depth - 1)
    space = rng.choice(['', ' '])
    text = f'{a}{space}{rng.choice("+-*/")}{space}{b}'
    return f'({text})' if rng.random() < 0.4 else text

  num_results = 0
  for _ in range(2000):
    text = expression(3)
    in_fractions = re.sub(r'[0-9]*\.?[0-9]+\.?', r"Fraction('\g<0>')", text)
    try:
      want = eval(in_fractions, {'Fraction': Fraction})
    except ZeroDivisionError:
      want = None
    result = compute(text)
    if result is not None:
      num_results += 1
      assert Fraction(result) == want, text
    elif want is not None and len(re.findall(r'[0-9.]+', text)) > 1:
      # Left alone: no short decimal, or `a / b/c`.
      short = (want * 10**12).denominator == 1 and abs(want) < 10**8
      assert not short or re.search(r'/ [0-9.]+/', text), text
  assert num_results > 500


@pytest.fixture(scope='module')
def gsm8k_answers():
  if not GSM8K.exists():
    pytest.skip(f'{GSM8K} is not there')
  rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
  assert len(rows) == 7473
  return [row['answer'] for row in rows]


def test_every_annotation_of_gsm8k_is_reproduced(gsm8k_answers):
  annotations = 0
  same_text = 0
  other_notation = set()
  for answer in gsm8k_answers:
    for match in re.finditer('=([^=<>]*)>>', answer):
      result = compute(answer[: match.start()])
      assert result is not None, match[0]
      assert result.endswith('>>')
      assert Fraction(result[:-2]) == Fraction(match[1]), match[0]
      annotations += 1
      same_text += result[:-2] == match[1]
      if result[:-2] != match[1]:
        other_notation.add(re.sub('[0-9]+', '9', match[1]))
  assert annotations == 23_716
  assert same_text == 23_049
  assert other_notation == {'9.9', '.9'}  # 144.00 and .5


@pytest.mark.slow
def test_plain_text_of_gsm8k_is_computed_as_its_authors_did(gsm8k_answers):
  # What follows `=` is not always the result: `2 * 2 + 6 = 4 + 6 = 10`.
  equations = computed = equal = 0
  for answer in gsm8k_answers:
    text = re.sub('<<.*?>>', '', answer)
    for match in re.finditer('=', text):
      equations += 1
      result = compute(text[: match.start()])
      if result is None:
        continue
      computed += 1
      line = text[match.end() :].split('\n')[0].replace(',', '')
      written = re.match(r' *\(?-?[$€]?(-?[0-9]*\.?[0-9]+(?:%|))', line)
      value = Fraction(result.rstrip('%').replace(',', ''))
      equal += bool(written) and value == Fraction(written[1].rstrip('%'))
  assert (equations, computed) == (26_384, 20_192)
  assert equal == 20_031


# --- What is written ----------------------------------------------------------


@pytest.fixture(scope='module')
def byte_vocabulary():
  import seqio

  return seqio.ByteVocabulary()


@pytest.fixture(scope='module')
def small_vocabulary(tmp_path_factory):
  """SentencePiece of a few sums; `=1` and ` $` are pieces, digits single."""
  import sentencepiece
  import seqio

  rng = random.Random(0)
  texts = [
    f'{a} {op} {b} = ${rng.randint(0, 99)} and {a}{op}{b}={a} clips'
    for op in '+-*/'
    for a, b in ((rng.randint(0, 99), rng.randint(0, 99)) for _ in range(50))
  ]
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_writer=model,
    vocab_size=300,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    byte_fallback=True,
    split_digits=True,
    user_defined_symbols=['<<', '>>', '=1'],
    num_threads=1,
    minloglevel=2,
    hard_vocab_limit=False,
  )
  path = tmp_path_factory.mktemp('vocabulary') / 'small.model'
  path.write_bytes(model.getvalue())
  return seqio.SentencePieceVocabulary(str(path), 0)


@pytest.fixture(scope='module')
def t5_vocabulary():
  import seqio

  if not T5_PIECES.exists():
    pytest.skip(f'{T5_PIECES} is not there')
  return seqio.SentencePieceVocabulary(str(T5_PIECES), 100)


@pytest.fixture(scope='module', params=['byte', 'small', 't5'])
def vocabulary(request):
  return request.getfixturevalue(f'{request.param}_vocabulary')


@pytest.fixture(scope='module')
def replace(vocabulary):
  return calculator.Calculator(vocabulary, tiny.IDS).replace


@pytest.fixture(scope='module')
def replace_t5(t5_vocabulary):
  return calculator.Calculator(t5_vocabulary, tiny.IDS).replace


def written_and_drawn(vocabulary, text, drawn):
  """Ids of a text, and one id that adds `drawn` to it."""
  written = list(vocabulary.encode(text))
  ends = (text + drawn, f'={drawn}', drawn)
  for token in itertools.chain.from_iterable(map(vocabulary.encode, ends)):
    if vocabulary.decode([*written, token]) == text + drawn:
      return written, token
  raise AssertionError(f'no token adds {drawn!r} to {text!r}')


@pytest.mark.parametrize(
  'text, drawn, forced',
  [
    ('48/2=', '3', '24'),
    ('48/2=', '-', '24'),
    ('3-20=', '1', '-17'),
    ('12/60=', '0', '0.2'),
    ('<<12/60=', '5', '0.2>>'),
    ('1,000*12=', '9', '12,000'),
    ('100%-40%=', '9', '60%'),
    ('38-57=-19 -19-10=', '4', '-29'),
  ],
)
def test_a_number_is_replaced_from_its_first_token_on(
  vocabulary, replace, text, drawn, forced
):
  if '<' in text and vocabulary.decode(vocabulary.encode(text)) != text:
    pytest.skip('T5 has no <')
  written, token = written_and_drawn(vocabulary, text, drawn)

  ids = replace(written, token)

  assert vocabulary.decode([*written, *ids]) == text + forced


@pytest.mark.parametrize(
  'text, drawn',
  [('x=', '3'), ('10/3=', '3'), ('48/2', '3'), ('48/2=2', '4'), ('48/2=', 'x')],
)
def test_other_tokens_stay(vocabulary, replace, text, drawn):
  written, token = written_and_drawn(vocabulary, text, drawn)

  assert replace(written, token) == []


@pytest.mark.parametrize(
  'text, drawn, forced',
  [
    ('sold 48/2 =', ' 3', ' 24'),  # a piece may bring the space along
    ('sold 48/2 =', ' $5', ' $24'),
    ('sold 48/2 = $', '5', '24'),
    ('sold 7 - 26 =', ' 3', ' -19'),
    ('sold 1,000 * 48 =', ' 5', ' 48,000'),
  ],
)
def test_what_a_piece_has_before_its_number_is_kept(
  t5_vocabulary, replace_t5, text, drawn, forced
):
  written, token = written_and_drawn(t5_vocabulary, text, drawn)

  ids = replace_t5(written, token)

  assert t5_vocabulary.decode([*written, *ids]) == text + forced


def test_pieces_are_those_that_the_tokenizer_would_choose(
  t5_vocabulary, replace_t5
):
  text = 'She sold 48 / 2 = 24'
  *written, last = t5_vocabulary.encode(text)

  (wrong,) = t5_vocabulary.encode('25')
  ids = replace_t5(written, wrong)

  assert ids == [last]


def test_a_piece_may_hold_both_the_equals_sign_and_a_digit(small_vocabulary):
  fused = [small_vocabulary.tokenizer.PieceToId('=1')]
  written = list(small_vocabulary.encode('48/2'))
  assert small_vocabulary.decode([*written, *fused]) == '48/2=1'

  ids = calculator.Calculator(small_vocabulary, tiny.IDS).replace(
    written, *fused
  )

  assert small_vocabulary.decode([*written, *ids]) == '48/2=24'


def test_where_the_text_is_cut_an_expression_may_have_more_before():
  calculate = calculator.Calculator(BYTES, tiny.IDS)

  def replace(text):
    return calculate.replace(
      BYTES.encode(text), BYTES.encode('9')[0], is_cut=True
    )

  assert replace('48/2=') == []
  assert replace('-48/2=') == []
  assert replace('a 48/2=') == BYTES.encode('24')


# --- In the loop --------------------------------------------------------------

EOS = 1
NEXT = '?'  # in a script: the letter after the one that was written last


def script_of(*lines, length):
  """[len(lines), length] ids; `\n` ends a row, `?` stays."""
  rows = np.zeros((len(lines), length), np.int32)
  for row, line in zip(rows, lines, strict=True):
    ids = [EOS if c == '\n' else BYTES.encode(c)[0] for c in line]
    row[: len(ids)] = ids
  return rows


def decode_scripted(script_BT):
  """A model that writes fixed texts, and records the tokens that it reads."""
  next_of = BYTES.encode(NEXT)[0]

  def decode_step(step, token_B):
    wanted_B = script_BT[:, step]
    wanted_B = jnp.where(wanted_B == next_of, token_B + 1, wanted_B)
    return jax.nn.one_hot(wanted_B, BYTES.vocab_size) * 1e9, step + 1

  return decode_step


def sample_scripted(script_BT, config, **settings):
  return sampler.sample(
    decode_scripted(script_BT),
    jnp.int32(0),
    jax.random.key(0),
    config,
    row_ids_B=jnp.arange(script_BT.shape[0]),
    max_decode_len=script_BT.shape[1],
    ids=tiny.IDS,
    **settings,
  )


@functools.cache
def compiled():
  return jax.jit(
    functools.partial(
      sample_scripted,
      config=sampler.SamplerConfig(calculator=True),
      calculator=calculator.Calculator(BYTES, tiny.IDS),
    )
  )


def write(*lines):
  """Samples 6 rows of 17 tokens; all calls share one compiled program."""
  lines += ('\n',) * (6 - len(lines))
  rollout = compiled()(script_of(*lines, length=17))
  return jax.tree.map(np.asarray, rollout)


def texts(rollout):
  return [
    BYTES.decode(row[(weights > 0) & (row != EOS)])
    for row, weights in zip(rollout.tokens, rollout.weights, strict=True)
  ]


def test_results_are_written_in_place_of_what_was_drawn():
  rollout = write(
    '3*4=99 a\n',
    '7-9=99 b\n',
    '4/5 = $999 c\n',
    '<<6/4=99999 d\n',
    'x=5 3+4=9\n',
    '1-8=99 -7-2=99?',  # the model reads what was written for it
  )

  assert texts(rollout) == [
    '3*4=12 a',
    '7-9=-2 b',
    '4/5 = $0.8 c',
    '<<6/4=1.5>> d',
    'x=5 3+4=7',
    '1-8=-7 -7-2=-9:',
  ]


def test_no_digits_are_added_to_a_result():
  rollout = write(
    '3+4=99 \n',  # 7, and then not 9
    '3+4=9.9 \n',
    '3+4=9,9 \n',
    '3+4=9. 9 \n',
    '<<3+4=9999 \n',  # >> ends the number
    '10/3=3.3 \n',  # there is no result
  )

  written = texts(rollout)
  assert re.match('3[+]4=7[^0-9]', written[0])
  assert re.match('3[+]4=7[.][^0-9]', written[1])
  assert re.match('3[+]4=7,[^0-9]', written[2])
  assert written[3:] == ['3+4=7. 9 ', '<<3+4=7>>9 ', '10/3=3.3 ']


def test_a_result_is_finished_where_the_model_would_end():
  rollout = write('9*9=9\n\nabc', '9*9=9\n abc\n')

  assert texts(rollout)[:2] == ['9*9=81', '9*9=81 abc']


def test_a_result_is_cut_at_the_last_place():
  rollout = write('10*1000000=9')

  assert texts(rollout)[0] == '10*1000000=100000'
  assert rollout.weights[0].all()


class BytesAndOne(Bytes):
  """Also has a piece `=1`."""

  vocab_size = 260

  def decode(self, ids):
    spelled = [BYTES.encode('=1') if i == 259 else [i] for i in ids]
    return BYTES.decode([*itertools.chain.from_iterable(spelled)])


def test_a_piece_with_the_equals_sign_in_it_is_replaced_whole():
  # What the model draws while it is forced, another such piece say, is nothing.
  script = script_of('48/2===a\n', length=9)
  script[:, 4:6] = 259

  @jax.jit
  def write(script_BT):
    return sampler.sample(
      lambda step, _: (
        1e9 * jax.nn.one_hot(script_BT[:, step], BytesAndOne.vocab_size),
        step + 1,
      ),
      jnp.int32(0),
      jax.random.key(0),
      sampler.SamplerConfig(calculator=True),
      row_ids_B=jnp.arange(1),
      max_decode_len=9,
      ids=tiny.IDS,
      calculator=calculator.Calculator(BytesAndOne(), tiny.IDS),
    )

  assert texts(jax.tree.map(np.asarray, write(script))) == ['48/2=24a']


def test_weights_cover_results_and_nothing_after_the_end():
  # What the model would go on to write after its end must not matter.
  rollout = write('3*4=99\n', 'a\n3*4=99\n', '5\n', 'bcd\n')

  weights = rollout.weights.sum(axis=1)
  np.testing.assert_array_equal(weights, [7, 2, 2, 4, 1, 1])
  assert texts(rollout)[:4] == ['3*4=12', 'a', '5', 'bcd']
  assert (rollout.tokens[rollout.weights == 0] == 0).all()


def test_rows_are_independent():
  lines = ['3*4=99 a\n', '<<6/4=99999\n', 'b\n', '10/3=99\n', '2+2=', '1']

  rollout = write(*lines)
  turned = write(*lines[::-1])

  for a, b in zip(rollout, turned, strict=True):
    np.testing.assert_array_equal(a, b[::-1])


class Recorder(calculator.Calculator):
  """Records the rows for which the host was called."""

  def __init__(self):
    super().__init__(BYTES, tiny.IDS)
    self.asked = []

  def _answers(self, step, drawn_B, asks_B, *parts):
    self.asked.append((int(step), np.flatnonzero(asks_B).tolist()))
    return super()._answers(step, drawn_B, asks_B, *parts)


def test_the_host_is_asked_only_for_rows_that_begin_a_number_after_equals():
  recorder = Recorder()
  script = script_of(
    'a=b 12, 3+4=9\n',
    'x=77\n',
    'a\n1+1=3\n',
    '12\n=3',
    length=14,
  )

  rollout = jax.jit(
    functools.partial(
      sample_scripted,
      config=sampler.SamplerConfig(calculator=True),
      calculator=recorder,
    )
  )(script)

  assert texts(rollout) == ['a=b 12, 3+4=7', 'x=77', 'a', '12']
  assert recorder.asked == [(2, [1]), (12, [0])]


def test_forced_tokens_have_log_probability_0():
  def decode_step(step, token_B):
    script_BT = jnp.asarray(script_of('3*4=99 a\n', length=9))
    # The others have 1e-9 each: no draw is certain, all are as good as that.
    return 20.0 * jax.nn.one_hot(script_BT[:, step], 259), step + 1

  rollout = jax.jit(
    lambda: sampler.sample(
      decode_step,
      jnp.int32(0),
      jax.random.key(0),
      sampler.SamplerConfig(calculator=True),
      row_ids_B=jnp.arange(1),
      max_decode_len=9,
      ids=tiny.IDS,
      calculator=calculator.Calculator(BYTES, tiny.IDS),
    )
  )()

  assert texts(rollout) == ['3*4=12 a']
  is_forced = [False] * 4 + [True] * 2 + [False] * 3
  np.testing.assert_array_equal(rollout.log_probs[0] == 0.0, is_forced)
  np.testing.assert_array_equal(rollout.weights[0], np.ones(9))


def test_without_a_calculator_the_program_is_as_if_there_were_none():
  script = script_of('3*4=99 a\n', length=9)

  def program(config, **settings):
    sample = functools.partial(sample_scripted, config=config, **settings)
    return jax.jit(sample).lower(script).as_text()

  without = program(sampler.ANCESTRAL)
  with_one = {'calculator': calculator.Calculator(BYTES, tiny.IDS)}

  assert program(sampler.ANCESTRAL, **with_one) == without
  assert 'callback' not in without
  assert 'callback' in program(
    sampler.SamplerConfig(calculator=True), **with_one
  )


def test_a_calculator_that_is_not_there_is_missed():
  with pytest.raises(ValueError, match='SamplerConfig.calculator is set, but'):
    sample_scripted(
      script_of('1+1=3', length=5), sampler.SamplerConfig(calculator=True)
    )


def test_the_host_sees_the_end_of_a_long_text():
  # 128 tokens; what begins before them is cut off.
  lines = ['a' * 150 + ' 3*4=99\n', '1' * 10 + '+1' * 70 + '=9\n']
  lines += ['1' * 39 + ' ' + '+1' * 55 + '=99\n']
  script = script_of(*lines, length=160)

  rollout = jax.jit(
    functools.partial(
      sample_scripted,
      config=sampler.SamplerConfig(calculator=True),
      calculator=calculator.Calculator(BYTES, tiny.IDS),
    )
  )(script)

  written = texts(jax.tree.map(np.asarray, rollout))
  assert written[0].endswith(' 3*4=12')
  assert written[1:] == [line[:-1] for line in lines[1:]]


def texts_on_all_devices():
  """Runs in a process of its own, see `tiny.on_simulated_devices`.

  So many rows that the tokens of all are more than XLA copies at once.
  """
  lines = [
    f'{i}*7=999 <<{i}-40={"9" * len(f"{i - 40}>>")}\n' for i in range(20, 72)
  ]
  script = script_of(*lines * 4, length=128)
  mesh = partitioning.make_mesh()
  rows = partitioning.batch_sharding(mesh)
  rollout = compiled()(jax.device_put(script, rows))
  return len(rollout.tokens.sharding.device_set), texts(
    jax.tree.map(np.asarray, rollout)
  )


def test_rows_may_be_spread_over_devices():
  num_devices, written = tiny.on_simulated_devices(
    8, __name__, texts_on_all_devices.__name__
  )

  assert num_devices == 8
  assert len(written) == 208
  for i, text in zip([*range(20, 72)] * 4, written, strict=True):
    assert text.startswith(f'{i}*7={i * 7}')
    assert text.endswith(f'<<{i}-40={i - 40}>>')


# --- A model that cannot calculate --------------------------------------------


@pytest.fixture(scope='module')
def miscalculator(tmp_path_factory):
  """A run's folder; its model knows four problems of arithmetic_cot by heart.

  But for their results: after `=` it was taught to write 7, which begins none.
  """
  import optax

  from gkd_jax.batch import Batch
  from gkd_jax.checkpoints import checkpoint
  from gkd_jax.data import datasets, iterators
  from gkd_jax.distill import objectives, policies
  from gkd_jax.distill import state as state_lib
  from gkd_jax.distill import step as step_lib
  from gkd_jax.distill.methods import Method
  from gkd_jax.models.t5 import T5, T5Config

  dataset = iterators.EvalDataset(
    datasets.DatasetConfig(
      'arithmetic_cot',
      {'inputs': 16, 'targets': 48},
      batch_size=4,
      split='validation',
      num_examples=4,
    )
  )
  ((_, examples),) = dataset.batches()
  rows = []
  for inputs, example in zip(
    examples.encoder_input_tokens, dataset.examples(), strict=True
  ):
    text = example['targets'] + '\n'
    weights = np.ones(48)
    weights[len(text) :] = 0.0
    for result in re.finditer('=(-?[0-9]+)', text):
      assert not result[1].startswith('7')
      weights[slice(*result.span(1))] = 0.0
      wrong = np.zeros(48)
      wrong[result.start(1)] = 1.0
      rows.append((inputs, text[: result.start(1)] + '7', wrong))
    rows.append((inputs, text, weights))
  inputs, texts, weights = zip(*rows, strict=True)
  batch = Batch(
    np.stack(inputs),
    script_of(*texts, length=48),
    np.stack(weights).astype(np.float32),
  )
  config = T5Config(264, 32, 2, 16, 64, 1, 1)
  model, optimizer = T5(config), optax.adam(3e-3)
  train_step = jax.jit(
    step_lib.make_train_step(
      student=model,
      teacher=None,
      method=Method(
        policy=policies.dataset(),
        objective=objectives.Objective(
          divergence_weight=0.0, likelihood_weight=1.0
        ),
      ),
      optimizer=optimizer,
      ids=tiny.special_ids(259),
      seed=0,
    )
  )
  state = state_lib.init_state(tiny.params(model, 0), optimizer)
  for _ in range(500):
    state, _ = train_step(state, state_lib.Frozen(), batch)

  folder = tmp_path_factory.mktemp('miscalculator')
  checkpoints = checkpoint.Checkpoints(
    folder, checkpoint.ModelDescription(config, 'ByteVocabulary 259 ids')
  )
  checkpoints.save(state, tiny.NoData(), train_seconds=0.0)
  checkpoints.close()
  return folder


@pytest.mark.slow
def test_a_model_that_cannot_calculate_is_right_with_a_calculator(
  miscalculator, run_main, tmp_path
):
  def evaluate(name, *settings):
    finished = run_main(
      '--run_mode=eval',
      '--gin_file=configs/arithmetic_cot/eval.gin',
      f'--gin.CHECKPOINT_PATH={miscalculator}',
      f'--gin.EVAL_OUTPUT_DIR={tmp_path / name}',
      '--gin.EVAL_SPLIT=validation',
      '--gin.EVALUATOR_NUM_EXAMPLES=4',
      '--gin.EVAL_BATCH_SIZE=4',
      '--gin.EVAL_TEMPERATURES=(0.1,)',
      '--gin.NUM_SAMPLES=2',
      *settings,
    )
    assert finished.code == 0, finished.err
    return json.loads((tmp_path / name / 'eval_validation.json').read_text())

  without = evaluate('without')
  with_one = evaluate('with', '--gin.CALCULATOR=True')

  assert without.keys() == with_one.keys()
  assert {name for name in with_one if name.startswith('sampled')} == {
    'sampled_0.1/accuracy',
    'sampled_0.1/steps_correct',
    'sampled_0.1/self_bleu',
  }
  for decoding in ('greedy', 'sampled_0.1'):
    assert without[f'{decoding}/steps_correct'] < 10.0
    assert with_one[f'{decoding}/steps_correct'] > 90.0
  assert without['greedy/accuracy'] < 50.0 < with_one['greedy/accuracy']


@pytest.mark.slow
def test_predictions_are_written_with_a_calculator(
  miscalculator, run_main, tmp_path
):
  from gkd_jax.data.tasks import arithmetic_cot

  finished = run_main(
    '--run_mode=infer',
    '--gin_file=gin/runs/infer.gin',
    '--gin_file=gin/tasks/arithmetic_cot.gin',
    f'--gin.CHECKPOINT_PATH={miscalculator}',
    f'--gin.INFER_OUTPUT_DIR={tmp_path}',
    '--gin.INFER_SPLIT=validation',
    '--gin.INFER_NUM_EXAMPLES=4',
    '--gin.INFER_BATCH_SIZE=4',
    '--gin.CALCULATOR=True',
  )

  assert finished.code == 0, finished.err
  lines = (tmp_path / 'predictions_validation.jsonl').read_text().splitlines()
  predictions = [json.loads(line)['prediction'] for line in lines]
  steps = [arithmetic_cot.equations(text) for text in predictions]
  assert sum(map(sum, steps)) >= 8  # of the 9 that there are
