# SPDX-License-Identifier: Apache-2.0
"""Similarities of an output and a reference: 1 if equal, 0 without overlap.

They are utilities of minimum Bayes risk decoding and metrics of outputs; see
`select`. A plain function (output, reference) -> number may take their place.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence

UNITS = ('words', 'characters')
_CHRF_ORDER = 6


@dataclasses.dataclass(frozen=True)
class Similarity:
  """A function of two texts.

  Attributes:
    description: its name and settings; files that it selects record it.
    function: (output, reference) -> similarity.
  """

  description: str
  function: Callable[[str, str], float]


def rouge_l(unit: str | None = None) -> Similarity:
  """ROUGE-L: F1 of the longest common subsequence.

  Args:
    unit: 'words', separated by spaces, or 'characters'; None: words as
      rouge_score finds them, in lower case and stemmed. These are of the
      letters a to z and digits: other scripts need one of the two units.

  Source: Lin (2004), "ROUGE", ACL workshop Text Summarization Branches Out.
  """
  split = _rouge_words if unit is None else _splitter('rouge_l', unit)

  def function(output, reference):
    got, want = split(output), split(reference)
    if not got or not want:
      return float(got == want and output == reference)
    common = longest_common_subsequence(got, want)
    return 2.0 * common / (len(got) + len(want))

  return Similarity(_call('rouge_l', unit=unit), function)


def chrf() -> Similarity:
  """chrF as sacreBLEU computes it, between 0 and 1.

  F2 of the n-grams of 1 to 6 characters, without spaces: precision and recall
  are means over the orders that both texts have.

  Source: Popovic (2015), WMT.
  """

  def function(output, reference):
    if output == reference:  # also if both are empty
      return 1.0
    precision = recall = num_orders = 0
    for got, want in zip(_grams(output), _grams(reference), strict=False):
      common = sum(min(got[x], want[x]) for x in got.keys() & want.keys())
      precision += common / got.total()
      recall += common / want.total()
      num_orders += 1
    if not precision + recall:
      return 0.0
    precision, recall = precision / num_orders, recall / num_orders
    return 5.0 * precision * recall / (4.0 * precision + recall)

  return Similarity('chrf()', function)


@functools.lru_cache(maxsize=1024)  # each output is compared with many
def _grams(text: str) -> list[Counter[str]]:
  """Returns the n-grams of characters, for each n that the text has."""
  text = ''.join(text.split())
  return [
    Counter(text[i : i + n] for i in range(len(text) - n + 1))
    for n in range(1, min(_CHRF_ORDER, len(text)) + 1)
  ]


def exact_match(marker: str | None = None) -> Similarity:
  """1 if both texts are equal but for spaces around them, 0 otherwise.

  As a utility of MBR this is a vote of the majority.

  Args:
    marker: compare only what follows its last occurrence, such as the answer
      after a chain of thought. Without a marker in either there is no match.
  """

  def answer(text):
    if marker is None:
      return text.strip()
    _, found, after = text.rpartition(marker)
    return after.strip() if found else None

  def function(output, reference):
    got, want = answer(output), answer(reference)
    return float(got is not None and got == want)

  return Similarity(_call('exact_match', marker=marker), function)


def edit_distance(unit: str = 'words') -> Similarity:
  """1 - (Levenshtein distance / length of the longer text).

  Args:
    unit: 'words', separated by spaces, or 'characters'.
  """
  split = _splitter('edit_distance', unit)

  def function(output, reference):
    got, want = split(output), split(reference)
    longer = max(len(got), len(want))
    return 1.0 - levenshtein(got, want) / longer if longer else 1.0

  return Similarity(_call('edit_distance', unit=unit), function)


def of(metric: Similarity | Callable[[str, str], float]) -> Similarity:
  """Returns a similarity; a plain function becomes one.

  Raises:
    ValueError: it is neither.
  """
  if isinstance(metric, Similarity):
    return metric
  if not callable(metric):
    raise ValueError(
      'A utility or metric must be a similarity such as @similarity.rouge_l(), '
      f'or a function (output, reference) -> number, got {metric!r}.'
    )
  name = f'{metric.__module__}.{metric.__qualname__}'

  def function(output, reference):
    value = float(metric(output, reference))
    if not math.isfinite(value):
      raise ValueError(
        f'{name} must return a finite number, but returned {value} for '
        f'{output!r} and {reference!r}.'
      )
    return value

  return Similarity(name, function)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
  """Returns the length of the longest common subsequence.

  Bits of one integer are a row of the table: a zero at bit i means that the
  length grows at a[i].

  Source: Hyyro (2004), "Bit-parallel LCS-length computation revisited".
  """
  places = _places(a)
  everywhere = (1 << len(a)) - 1
  row = everywhere
  for unit in b:
    matches = row & places.get(unit, 0)
    row = ((row + matches) | (row - matches)) & everywhere
  return len(a) - row.bit_count()


def levenshtein(a: Sequence[str], b: Sequence[str]) -> int:
  """Returns the least number of insertions, deletions and substitutions.

  Bits of two integers are the differences +1 and -1 between neighbours in a
  column of the table.

  Source: Myers (1999), J. ACM 46(3), in the form of Hyyro (2003).
  """
  if not a:
    return len(b)
  places = _places(a)
  everywhere, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
  plus, minus, distance = everywhere, 0, len(a)
  for unit in b:
    equal = places.get(unit, 0)
    diagonal = ((((equal & plus) + plus) ^ plus) | equal | minus) & everywhere
    grows = minus | (everywhere & ~(diagonal | plus))
    shrinks = diagonal & plus
    distance += bool(grows & last) - bool(shrinks & last)
    grows = (grows << 1 | 1) & everywhere
    shrinks = shrinks << 1 & everywhere
    plus = shrinks | (everywhere & ~(diagonal | grows))
    minus = diagonal & grows
  return distance


def _places(units: Sequence[str]) -> dict[str, int]:
  """Returns {unit: an integer with the bits of its places}."""
  places = {}
  for i, unit in enumerate(units):
    places[unit] = places.get(unit, 0) | 1 << i
  return places


def split(text: str, unit: str) -> Sequence[str]:
  """Returns the words or characters of a text."""
  return text.split() if unit == 'words' else text


def check_unit(setting: str, unit: str) -> None:
  """Raises ValueError unless `unit` is one of UNITS."""
  if unit not in UNITS:
    raise ValueError(f'{setting} must be one of {UNITS}, got {unit!r}.')


def _splitter(name: str, unit: str) -> Callable[[str], Sequence[str]]:
  check_unit(f'similarity.{name}.unit', unit)
  return functools.partial(split, unit=unit)


@functools.lru_cache(maxsize=4096)  # each output is compared with many
def _rouge_words(text: str) -> list[str]:
  return _rouge_tokenizer().tokenize(text)


@functools.cache
def _rouge_tokenizer():
  from rouge_score import tokenizers  # NLTK: a second to import

  return tokenizers.DefaultTokenizer(use_stemmer=True)


def _call(name: str, **settings) -> str:
  """Returns a call as text: 'chrf(word_order=2)'."""
  return f'{name}({", ".join(f"{k}={v!r}" for k, v in settings.items())})'
