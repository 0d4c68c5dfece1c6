# SPDX-License-Identifier: Apache-2.0
"""A calculator at decoding time: it replaces the number that follows `48/2=`.

If the model begins a number after an expression and `=`, the correct result is
written instead. Small models learn the steps of a solution before they learn
arithmetic, and accuracy on GSM8K is reported with such a calculator. Two forms
are parsed:

- plain text: `Natalia sold 48/2 = `. The expression is the longest suffix of
  the line that is a complete expression with an operator. If the text before
  may be part of it, as in `3 apples * 4 =` and `x + 5 + 3 =`, nothing is
  replaced.
- GSM8K's annotations: `<<48/2=`. The expression is everything after `<<`, also
  a single number; `>>` is written after the result.

The replacement starts where the number begins, not at the `=`: the model writes
what is between them (` `, `$`, or `<<` if annotations follow the plain form).
After a result the model continues, but cannot append digits to it. Results are
exact. Nothing is replaced if the expression cannot be parsed, is too long,
divides by zero, or has no finite decimal form (`10/3`). The number after `=` is
assumed to be the result, which is wrong for `2*3 + 4 = 6 + 4`.

Source: the calculator of GSM8K, Cobbe et al. (2021), arXiv:2110.14168. It calls
Python's `eval`; this module has a parser with limits and exact arithmetic.
"""

import re
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.batch import MASKED_LOGIT, SpecialIds

_MAX_EXPRESSION = 120  # characters; also bounds the parser's recursion
_MAX_DIGITS = 15  # of a number in an expression, and of a result
_MAX_DECIMALS = 12  # of a result
_NO_TOKEN = -1  # no token is forced
_MAX_FORCED = 24  # tokens; a result has at most 15 digits, sign, commas, `>>`
_WINDOW = 128  # tokens that are passed to the host
_MAX_PART = 16_384  # elements of int32: 64 KiB

_NUMBER = (
  r'[$€£]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?'
  r'|\.[0-9]+)%?'
)
_TOKEN = re.compile(
  rf'[ \t]*(?:(?P<number>{_NUMBER})'
  r'|(?P<times>\*|(?<![A-Za-z])[xX](?![A-Za-z]))'
  r'|(?P<divide>//?)'
  r'|(?P<sign>[-+])'
  r'|(?P<bracket>[()])'
  r'|(?P<other>.))',
  re.DOTALL,
)
_ASCII = str.maketrans({'−': '-', '–': '-', '×': '*', '÷': '/'})

# Text before an expression that may be part of it: an operator
# (`apples * 4 + 2`), a character without a space (`x5 + 3`, `6:00+48`), or a
# number (`1 1/2 * 60`, `80 000 * 2`).
_MORE_BEFORE = re.compile(
  r'(?:[-+*/^√]|(?<![A-Za-z])[xX])[ \t(]*$'
  r'|[\w.,$€£!)%]$|[0-9]:$|[0-9](?: and)?[ \t]+$'
)
# A number directly after `=` is a result, not part of it: `38-57=-19 -19-10=`.
_RESULT = re.compile(rf'[ \t]*-?{_NUMBER}[ \t]+')
# `2000 / 2/3`: the spaces suggest a division by the fraction 2/3.
_FRACTION_BY_SPACING = re.compile(r'/[ \t]+[0-9.,]+/')


def compute(text: str) -> str | None:
  """Returns the result of the expression that a text ends with.

  Numbers may have `$`, thousands commas and `%` (a hundredth); operators are
  + - * x × / ÷, // (rounded down), brackets and a sign before a number. There
  are no powers, so the time is at most some milliseconds for any text.

  Args:
    text: the text before the `=`.

  Returns:
    The result, e.g. '24' (or '24>>' if the expression follows `<<`), in the
    notation of the expression: with thousands commas if it has any; in percent
    if all its numbers are and it has no division (`40%/10%` is 4), or if it
    ends with `* 100%`. None: there is no expression, or no result.
  """
  window = text[-_MAX_EXPRESSION:].translate(_ASCII)
  annotation = re.search('<<([^<>=\n]*)$', window)
  try:
    if annotation:
      tokens = _tokens(annotation[1])
      value, end = _sum(tokens, 0)
      return _format(value) + '>>' if end == len(tokens) else None
    return _compute_plain(window, is_cut=len(text) > len(window))
  except (_NoExpression, _NoResult, ZeroDivisionError):
    return None


class _NoExpression(Exception):
  """The text is not an expression."""


class _NoResult(Exception):
  """The expression has no result within the limits."""


class _Token(NamedTuple):
  kind: str
  text: str
  start: int
  end: int


_END = _Token('end', '', -1, -1)


def _compute_plain(window: str, *, is_cut: bool) -> str | None:
  """Returns the result of the longest expression that a text ends with."""
  begin = max(window.rfind('\n'), window.rfind('=')) + 1
  line = window[begin:]
  tokens = _tokens(line)
  others = [i for i, token in enumerate(tokens) if token.kind == 'other']
  for first in range(others[-1] + 1 if others else 0, len(tokens)):
    try:
      value, end = _sum(tokens, first)
    except _NoExpression:
      continue
    if end == len(tokens) and tokens[first].text != '+':
      break
  else:
    return None
  tokens = tokens[first:]
  before, expression = line[: tokens[0].start], line[tokens[0].start :]
  numbers = [token.text for token in tokens if token.kind == 'number']
  is_after_result = window[:begin].endswith('=') and _RESULT.fullmatch(before)
  if (
    len(numbers) == 1
    or (is_cut and begin == 0 and not before)
    or (_MORE_BEFORE.search(before) and not is_after_result)
    or (expression[0] == '-' and before.rstrip().endswith((')', '%')))
    or _FRACTION_BY_SPACING.search(expression)
  ):
    return None
  in_percent = [number for number in numbers if number.endswith('%')]
  if (in_percent == numbers and '/' not in expression) or (
    in_percent == ['100%'] == numbers[-1:] and tokens[-2].kind == 'times'
  ):
    return _format(100 * value) + '%'
  return _format(value, commas=any(',' in number for number in numbers))


def _tokens(text: str) -> list[_Token]:
  return [
    _Token(kind, match[kind], *match.span(kind))
    for match in _TOKEN.finditer(text.rstrip())
    if (kind := match.lastgroup)
  ]


# The grammar. Each function parses from tokens[i] on, and returns the value and
# the index of the next token:
#   sum = product {(+|-) product};  product = factor {(*|x|/|//) factor};
#   factor = [+|-] (number | '(' sum ')').


def _at(tokens: list[_Token], i: int) -> _Token:
  return tokens[i] if i < len(tokens) else _END


def _sum(tokens: list[_Token], i: int) -> tuple[Fraction, int]:
  value, i = _product(tokens, i)
  while _at(tokens, i).kind == 'sign':
    sign, after = tokens[i], _at(tokens, i + 1)
    # ` -19`, with a space before and none after the sign, begins the next
    # expression.
    if sign.text == '-' and tokens[i - 1].end < sign.start == after.start - 1:
      break
    term, i = _product(tokens, i + 1)
    value = value + term if sign.text == '+' else value - term
  return value, i


def _product(tokens: list[_Token], i: int) -> tuple[Fraction, int]:
  value, i = _factor(tokens, i)
  while _at(tokens, i).kind in ('times', 'divide'):
    operator = tokens[i].text
    # In `6x-240` the x is a variable, not an operator.
    if operator in 'xX' and _at(tokens, i + 1).kind == 'sign':
      raise _NoExpression
    factor, i = _factor(tokens, i + 1)
    if operator == '/':
      value /= factor
    elif operator == '//':
      value = Fraction(value // factor)
    else:
      value *= factor
  return value, i


def _factor(tokens: list[_Token], i: int) -> tuple[Fraction, int]:
  token = _at(tokens, i)
  if token.kind == 'sign':
    if _at(tokens, i + 1).start != token.end:
      raise _NoExpression
    value, i = _unsigned(tokens, i + 1)
    return (-value if token.text == '-' else value), i
  return _unsigned(tokens, i)


def _unsigned(tokens: list[_Token], i: int) -> tuple[Fraction, int]:
  token = _at(tokens, i)
  if token.kind == 'number':
    return _value(token.text), i + 1
  if token.text != '(':
    raise _NoExpression
  value, i = _sum(tokens, i + 1)
  if _at(tokens, i).text != ')':
    raise _NoExpression
  return value, i + 1


def _value(number: str) -> Fraction:
  digits = number.strip('$€£%').replace(',', '').rstrip('.')
  # `0900` is a time of day, and `000` is part of `80 000`.
  if len(digits) > _MAX_DIGITS or re.match('0[0-9]', digits):
    raise _NoResult
  return Fraction(digits) / (100 if number.endswith('%') else 1)


def _format(value: Fraction, *, commas: bool = False) -> str:
  """Formats a number with all its decimals, without trailing zeros."""
  for decimals in range(_MAX_DECIMALS + 1):
    scaled = abs(value) * 10**decimals
    if scaled.denominator == 1:
      break
  else:
    raise _NoResult
  digits = str(scaled.numerator).zfill(decimals + 1)
  if len(digits) > _MAX_DIGITS:
    raise _NoResult
  point = len(digits) - decimals
  whole = f'{int(digits[:point]):,}' if commas else digits[:point]
  sign, dot = '-' * (value < 0), '.' * (decimals > 0)
  return sign + whole + dot + digits[point:]


# --- In the sampling loop -----------------------------------------------------

# Kinds of tokens.
_OTHER, _EQUALS, _BETWEEN, _NUMBER_BEGINS, _EQUALS_AND_NUMBER = range(5)
_FILLER = '[ \t$€£]*'
_BEGIN = r'(?:[-−–]?\.?[0-9]|[-−–]$)'
_KINDS = (
  (_EQUALS, re.compile(f'={_FILLER}$')),
  (_EQUALS_AND_NUMBER, re.compile(f'={_FILLER}{_BEGIN}')),
  (_NUMBER_BEGINS, re.compile(f'^{_FILLER}{_BEGIN}')),
  (_BETWEEN, re.compile(f'^{_FILLER}$')),
)
_FROM_EQUALS_TO_NUMBER = re.compile(f'{_FILLER}(?={_BEGIN})')
_GOES_ON = re.compile('^[.,]?[0-9]')  # continues a number


class CalculatorState(NamedTuple):
  """The state of the calculator in the sampling loop."""

  after_equals_B: jax.Array  # [B] bool: a number now would follow `=`
  after_result_B: jax.Array  # [B] bool: a digit now would extend a result
  tokens_BF: jax.Array  # [B, F] int32, tokens to force next, then _NO_TOKEN


class Calculator:
  """Replaces numbers during sampling; see the top of this module.

  A table on the device has the kind of each token: whether it ends with `=` or
  begins a number. The host is called only in steps in which some row begins a
  number after `=`. It decodes the row, computes the result and returns tokens.
  The result of a row depends only on that row.
  """

  def __init__(self, vocabulary, ids: SpecialIds):
    """Computes the tables of a vocabulary.

    Args:
      vocabulary: of seqio, or any object with `vocab_size`, `encode(text)` and
        `decode(ids)`.
      ids: a result whose tokens include EOS or one of `never_written` is not
        written.
    """
    self._vocabulary = vocabulary
    self._special = {*ids.never_written, ids.eos}
    # Decoded after another token, because SentencePiece drops the leading space
    # of the first token.
    anchor = list(vocabulary.encode('='))
    num_chars = len(vocabulary.decode(anchor))
    texts = [
      vocabulary.decode([*anchor, token])[num_chars:]
      for token in range(vocabulary.vocab_size)
    ]
    self._kinds_V = np.array(
      [
        next((kind for kind, regex in _KINDS if regex.search(text)), _OTHER)
        for text in texts
      ],
      np.int8,
    )
    self._goes_on_V = np.array([bool(_GOES_ON.match(text)) for text in texts])
    self._is_point_V = np.array([text in {'.', ','} for text in texts])
    self._ends_in_digit_V = np.array([text[-1:].isdigit() for text in texts])

  def start(self, batch_size: int) -> CalculatorState:
    """Returns the state before the first token."""
    return CalculatorState(
      jnp.zeros(batch_size, bool),
      jnp.zeros(batch_size, bool),
      jnp.full((batch_size, _MAX_FORCED), _NO_TOKEN, jnp.int32),
    )

  def keep_result(
    self, queue: CalculatorState, logits_BV: jax.Array
  ) -> jax.Array:
    """Masks tokens that would append digits to a result."""
    goes_on_V = np.zeros(logits_BV.shape[1], bool)
    goes_on_V[: len(self._goes_on_V)] = self._goes_on_V
    return jnp.where(
      queue.after_result_B[:, None] & goes_on_V, MASKED_LOGIT, logits_BV
    )

  def correct(
    self,
    queue: CalculatorState,
    tokens_BT: jax.Array,
    step: jax.Array,
    drawn_B: jax.Array,
    alive_B: jax.Array,
  ) -> tuple[jax.Array, jax.Array, CalculatorState]:
    """Replaces drawn tokens that begin a number after an expression and `=`.

    Args:
      queue: the state after the previous step.
      tokens_BT: [B, T] int32; the first `step` of each row are written.
      step: [] int32.
      drawn_B: [B] int32, the tokens that were drawn.
      alive_B: [B] bool, rows that have not ended.

    Returns:
      The tokens to write, [B] int32; whether they were forced, [B] bool; and
      the new state.
    """
    kind_B = jnp.asarray(self._kinds_V)[drawn_B]
    begins_number_B = (kind_B == _EQUALS_AND_NUMBER) | (
      queue.after_equals_B & (kind_B == _NUMBER_BEGINS)
    )
    was_forced_B = queue.tokens_BF[:, 0] != _NO_TOKEN
    needs_result_B = begins_number_B & alive_B & ~was_forced_B
    tokens_BF = jax.lax.cond(
      jnp.any(needs_result_B),
      lambda: self._call_host(
        queue.tokens_BF, tokens_BT, step, drawn_B, needs_result_B
      ),
      lambda: queue.tokens_BF,
    )
    is_forced_B = tokens_BF[:, 0] != _NO_TOKEN
    after_equals_B = ~is_forced_B & (
      (kind_B == _EQUALS) | (queue.after_equals_B & (kind_B == _BETWEEN))
    )
    token_B = jnp.where(is_forced_B, tokens_BF[:, 0], drawn_B)
    tokens_BF = jnp.pad(
      tokens_BF[:, 1:], ((0, 0), (0, 1)), constant_values=_NO_TOKEN
    )
    is_last_B = is_forced_B & (tokens_BF[:, 0] == _NO_TOKEN)
    after_result_B = (
      is_last_B & jnp.asarray(self._ends_in_digit_V)[token_B]
    ) | (queue.after_result_B & jnp.asarray(self._is_point_V)[token_B])
    rest = CalculatorState(after_equals_B, after_result_B, tokens_BF)
    return token_B, is_forced_B, rest

  def _call_host(self, tokens_BF, tokens_BT, step, drawn_B, needs_result_B):
    """Returns the forced tokens, with results where `needs_result_B`."""
    batch_size, length = tokens_BT.shape
    window = min(length, _WINDOW)
    tokens_BW = jax.lax.dynamic_slice_in_dim(
      tokens_BT, jnp.maximum(step - window, 0), window, axis=1
    )
    # In parts: XLA's CPU client copies arrays of more than 100 KiB in worker
    # threads. If all of them wait for this device, a callback with larger
    # arguments deadlocks.
    width = max(1, _MAX_PART // batch_size)
    parts = [tokens_BW[:, i : i + width] for i in range(0, window, width)]
    answers_BF = jax.pure_callback(
      self._answers,
      jax.ShapeDtypeStruct(tokens_BF.shape, tokens_BF.dtype),
      step,
      drawn_B,
      needs_result_B,
      *parts,
    )
    return jnp.where(needs_result_B[:, None], answers_BF, tokens_BF)

  def _answers(self, step, drawn_B, needs_result_B, *parts):
    """Returns the tokens to write, [B, F] int32. Runs on the host."""
    tokens_BW = np.concatenate([np.asarray(part) for part in parts], axis=1)
    num_written = min(int(step), tokens_BW.shape[1])
    drawn_B = np.asarray(drawn_B)
    answers_BF = np.full((len(drawn_B), _MAX_FORCED), _NO_TOKEN, np.int32)
    for row in np.flatnonzero(np.asarray(needs_result_B)):
      answer = self.replace(
        tokens_BW[row, :num_written].tolist(),
        int(drawn_B[row]),
        is_cut=num_written < int(step),
      )
      answers_BF[row, : len(answer)] = answer
    return answers_BF

  def replace(
    self, written: list[int], drawn: int, *, is_cut: bool = False
  ) -> list[int]:
    """Returns the tokens that replace a drawn token; [] if it is not replaced.

    Their text is that of the drawn token up to its number, then the result.

    Args:
      written: the ids before the drawn token.
      drawn: the id that was drawn.
      is_cut: whether `written` lacks the beginning of the output.
    """
    before = self._vocabulary.decode(written)
    after = self._vocabulary.decode([*written, drawn])
    equals = after.rfind('=')
    lead = _FROM_EQUALS_TO_NUMBER.match(after, equals + 1)
    if (
      equals < 0
      or lead is None
      or lead.end() < len(before)
      or not after.startswith(before)
    ):
      return []
    # `^` marks a cut: no expression may begin there.
    result = compute('^' * is_cut + after[:equals])
    if result is None:
      return []
    return self._encode(
      written, before, after[len(before) : lead.end()] + result
    )

  def _encode(self, written: list[int], before: str, text: str) -> list[int]:
    """Returns ids that append `text` to the written ids; [] if none do."""
    encode = self._vocabulary.encode
    # The ids of a text depend on the text before: SentencePiece adds a space at
    # the beginning, and may join characters. Most results follow `=`.
    for anchor in ('=', '$', 'a'):
      head, ids = list(encode(anchor)), list(encode(anchor + text))
      added = ids[len(head) :]
      if (
        ids[: len(head)] == head
        and len(added) <= _MAX_FORCED
        and not self._special & {*added}
        and self._vocabulary.decode([*written, *added]) == before + text
      ):
        return added
    return []
