# SPDX-License-Identifier: Apache-2.0
"""Selects outputs to learn from, of several that were written for an input.

Rules are applied to the outputs of an input one after another; what the last
one leaves is written, for a student to train on (TRAIN_ON_PREDICTIONS). To add
a rule or a score, write a function that returns a `Rule` or a `Score` and name
it in a gin file.
"""

import array
import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gkd_jax.data import json_lines, predictions
from gkd_jax.evaluation import similarity
from gkd_jax.runtime import console, files, pins

_SETTING = 'PREDICTIONS'
_OUTPUT_SETTING = 'SELECT_OUTPUT_DIR'
_STATUS_SECONDS = 10.0

# (inputs, outputs, targets), texts of equal number -> a number for each output.
TextScore = Callable[[list[str], list[str], list[str]], Sequence[float]]
Metric = similarity.Similarity | Callable[[str, str], float]


class Outputs(NamedTuple):
  """The outputs for one input that rules choose from.

  Attributes:
    inputs: the text of the input.
    lines: JSON objects of the outputs; `prediction` is the text.
    where: description of the input, for errors.
  """

  inputs: str
  lines: Sequence[Mapping[str, Any]]
  where: str

  @property
  def texts(self) -> list[str]:
    return [line['prediction'] for line in self.lines]

  @property
  def targets(self) -> str:
    """The reference; raises ValueError if the file has none."""
    targets = self.lines[0].get('targets')
    if not isinstance(targets, str):
      raise ValueError(
        f'{_SETTING}: {self.where} has no text "targets" to compare outputs '
        'with.'
      )
    return targets


@dataclasses.dataclass(frozen=True)
class Score:
  """A number for each output.

  Attributes:
    description: its name and settings; selected files record it.
    function: Outputs -> one finite number per output.
    needs_several: whether it is of a group of outputs.
  """

  description: str
  function: Callable[[Outputs], Sequence[float]]
  needs_several: bool = False

  def __call__(self, outputs: Outputs) -> list[float]:
    values = [float(x) for x in self.function(outputs)]
    if len(values) != len(outputs.lines) or not all(map(math.isfinite, values)):
      raise ValueError(
        f'{self.description} must give a finite number for each of the '
        f'{len(outputs.lines)} outputs of {outputs.where}, but gave {values}.'
      )
    return values


# Outputs -> the lines to keep, which it may change.
Choose = Callable[[Outputs], Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Rule:
  """A choice among the outputs of an input.

  Attributes:
    description: its name and settings; selected files record it.
    choose: Outputs -> lines to keep, which it may change. It is not called for
      an input without outputs.
    needs_several: whether it is of no use with one output for each input.
    prepare: (outputs of all inputs, as the rules before leave them) -> choose,
      for a rule that depends on all of them, whose `choose` is None; the files
      are read once more.
  """

  description: str
  choose: Choose | None
  needs_several: bool = False
  prepare: Callable[[Iterator[Outputs]], Choose] | None = None


# --- Scores -------------------------------------------------------------------


def to_targets(metric: Metric) -> Score:
  """Returns the similarity of outputs and reference.

  Args:
    metric: such as @similarity.rouge_l(), or a function (output, reference) ->
      number.
  """
  metric = similarity.of(metric)

  def function(outputs):
    return [metric.function(text, outputs.targets) for text in outputs.texts]

  return Score(f'to_targets({metric.description})', function)


def field(name: str, minus: str | None = None) -> Score:
  """Returns a number that each line has, such as a model's NLL.

  Args:
    name: of the field.
    minus: another field, which is subtracted; None: none.
  """

  def function(outputs):
    values = [_number(line, name, outputs.where) for line in outputs.lines]
    if minus is None:
      return values
    return [
      value - _number(line, minus, outputs.where)
      for value, line in zip(values, outputs.lines, strict=True)
    ]

  return Score(f'field({name!r}, minus={minus!r})', function)


def length_ratio(to: str = 'inputs', unit: str = 'words') -> Score:
  """Returns the length of outputs, divided by that of another text.

  Args:
    to: 'inputs' or 'targets'; an empty one counts as one unit.
    unit: 'words', separated by spaces, or 'characters'.
  """
  if to not in ('inputs', 'targets'):
    raise ValueError(
      f"select.length_ratio.to must be 'inputs' or 'targets', got {to!r}."
    )
  similarity.check_unit('select.length_ratio.unit', unit)

  def length(text):
    return len(similarity.split(text, unit))

  def function(outputs):
    other = max(1, length(getattr(outputs, to)))
    return [length(text) / other for text in outputs.texts]

  return Score(f'length_ratio(to={to!r}, unit={unit!r})', function)


def repetition(n: int = 3, unit: str = 'words') -> Score:
  """Returns the share of an output's n-grams that occurred in it before.

  Args:
    n: length of the n-grams. Outputs shorter than that have none: 0.
    unit: 'words', separated by spaces, or 'characters'.
  """
  _check_positive('repetition.n', n)
  similarity.check_unit('select.repetition.unit', unit)

  def of(text):
    units = similarity.split(text, unit)
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0

  def function(outputs):
    return [of(text) for text in outputs.texts]

  return Score(f'repetition(n={n}, unit={unit!r})', function)


def pass_rate(score: Score, at_least: float = 1.0) -> Score:
  """Returns the share of an input's outputs that pass, the same for all.

  Args:
    score: such as @select.to_targets() with @similarity.exact_match().
    at_least: the score of an output that passes.
  """
  _check_score('pass_rate.score', score)

  def function(outputs):
    passes = [value >= at_least for value in score(outputs)]
    return [sum(passes) / len(passes)] * len(passes)

  return Score(
    f'pass_rate({score.description}, at_least={at_least})',
    function,
    needs_several=True,
  )


def python_function(function: TextScore) -> Score:
  """Returns the score of a Python function over texts.

  Args:
    function: (inputs, outputs, targets), lists of texts of equal length -> a
      number for each output. It is called once for each input.
  """
  name = f'{function.__module__}.{function.__qualname__}'

  def of(outputs):
    number = len(outputs.lines)
    return function(
      [outputs.inputs] * number, outputs.texts, [outputs.targets] * number
    )

  return Score(f'python_function({name})', of)


def _number(line: Mapping[str, Any], name: str, where: str) -> float:
  value = line.get(name)
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(
      f'{_SETTING}: "{name}" of an output of {where} must be a number, got '
      f'{json_lines.printable(repr(value))[:60]}. Its line has: '
      f'{json_lines.printable(", ".join(line))}.'
    )
  if not math.isfinite(value):
    raise ValueError(
      f'{_SETTING}: "{name}" of an output of {where} is {value}: it must be '
      'finite.'
    )
  return float(value)


# --- Rules --------------------------------------------------------------------


def mbr(utility: Metric, keep: int = 1) -> Rule:
  """Minimum Bayes risk: the outputs that are most similar to all others.

  The score of an output is its mean utility, with each output of the input as
  the reference, itself included. Outputs that were written several times are
  as many references and one hypothesis. The cost is quadratic in their number.

  Args:
    utility: such as @similarity.chrf(), or a function (output, reference) ->
      number.
    keep: n, the number of outputs to keep; of equal scores the first.

  Source: Wang et al. (2024), MBR-n, arXiv:2407.10456; Kumar and Byrne (2004).
  """
  _check_positive('mbr.keep', keep)
  utility = similarity.of(utility)

  def choose(outputs):
    times = Counter(outputs.texts)
    number = len(outputs.lines)
    distinct = _distinct(outputs.lines)
    scores = [
      math.fsum(
        n * utility.function(line['prediction'], reference)
        for reference, n in times.items()
      )
      / number
      for line in distinct
    ]
    return _highest(distinct, scores, keep)

  return Rule(
    f'mbr({utility.description}, keep={keep})', choose, needs_several=True
  )


def best(score: Score, keep: int = 1) -> Rule:
  """Best of n: the outputs with the highest scores, each text once.

  Args:
    score: such as @select.to_targets().
    keep: the number of outputs to keep; of equal scores the first.
  """
  _check_positive('best.keep', keep)
  _check_score('best.score', score)

  def choose(outputs):
    distinct = _distinct(outputs.lines)
    scores = score(outputs._replace(lines=distinct))
    return _highest(distinct, scores, keep)

  return Rule(
    f'best({score.description}, keep={keep})', choose, needs_several=True
  )


def within(
  score: Score, at_least: float | None = None, at_most: float | None = None
) -> Rule:
  """A filter: outputs whose score is within bounds.

  Args:
    score: such as @select.to_targets().
    at_least: lower bound, included; None: there is none.
    at_most: upper bound, included; None: there is none.

  Raises:
    ValueError: there is no bound, or no score is within them.
  """
  _check_score('within.score', score)
  if at_least is None and at_most is None:
    raise ValueError('select.within needs at_least, at_most or both.')
  low = -math.inf if at_least is None else at_least
  high = math.inf if at_most is None else at_most
  if not low <= high:
    raise ValueError(
      f'select.within.at_least is {at_least} and at_most is {at_most}: no '
      'score is within them.'
    )

  def choose(outputs):
    return [
      line
      for line, value in zip(outputs.lines, score(outputs), strict=True)
      if low <= value <= high
    ]

  return Rule(
    f'within({score.description}, at_least={at_least}, at_most={at_most})',
    choose,
    needs_several=score.needs_several,
  )


def top_share(score: Score, share: float = 0.5) -> Rule:
  """The outputs with the highest scores of all inputs together.

  Outputs that tie with the last one are kept, too. One number for each output
  is in memory.

  Args:
    score: such as @select.field() with the NLL under a small model minus that
      under a large one.
    share: of the outputs, above 0 and at most 1.

  Raises:
    ValueError: the share is invalid.

  Source: MiniPLM, arXiv:2410.17215, difference sampling, with share 0.5.
  """
  _check_score('top_share.score', score)
  if not 0.0 < share <= 1.0:
    raise ValueError(
      f'select.top_share.share must be above 0 and at most 1, got {share}.'
    )

  def prepare(all_outputs):
    values = array.array('d')
    for outputs in all_outputs:
      values.extend(score(outputs))
    if not values:
      return lambda outputs: []
    number = max(1, round(share * len(values)))
    least = np.partition(values, len(values) - number)[len(values) - number]
    return within(score, at_least=float(least)).choose

  return Rule(
    f'top_share({score.description}, share={share})',
    None,
    needs_several=score.needs_several,
    prepare=prepare,
  )


def distinct() -> Rule:
  """Each text once: the first of equal outputs."""
  return Rule('distinct()', lambda outputs: _distinct(outputs.lines))


# Of a pair, which output is worse.
REJECTED = ('worst', 'two_sigma')


def pairs(
  score: Score,
  rejected: str = 'two_sigma',
  rejected_weight: float | None = None,
) -> Rule:
  """Two outputs, the better one first: the best, and one with a lower score.

  Their field `preference` is 'chosen' and 'rejected'. An input whose outputs
  have equal scores, or whose texts are equal, loses them.

  Args:
    score: such as @select.to_targets().
    rejected: 'worst': the lowest score; 'two_sigma': the score nearest to mean
      - 2 (standard deviation) of the input's outputs. With many outputs the
      worst is a poor choice. Of equal scores the first.
    rejected_weight: field `weight` of the second output; the first one has 1.
      REDI trains on the likelihood with -alpha, e.g. -0.8. None: no weights.

  Raises:
    ValueError: `rejected` is invalid.

  Source: arXiv:2502.16825, the sweet spot of preference pairs.
  """
  _check_score('pairs.score', score)
  if rejected not in REJECTED:
    raise ValueError(
      f'select.pairs.rejected must be one of {REJECTED}, got {rejected!r}.'
    )

  def choose(outputs):
    scores = score(outputs)
    best = max(range(len(scores)), key=scores.__getitem__)
    texts = outputs.texts
    worse = [
      i
      for i, value in enumerate(scores)
      if value < scores[best] and texts[i] != texts[best]
    ]
    if not worse:
      return []
    goal = min(scores)
    if rejected == 'two_sigma':
      goal = statistics.fmean(scores) - 2.0 * statistics.pstdev(scores)
    second = min(worse, key=lambda i: abs(scores[i] - goal))
    pair = []
    for i, preference, weight in (
      (best, 'chosen', 1.0),
      (second, 'rejected', rejected_weight),
    ):
      line = {**outputs.lines[i], 'score': scores[i], 'preference': preference}
      if rejected_weight is not None:
        line['weight'] = weight
      pair.append(line)
    return pair

  return Rule(
    f'pairs({score.description}, rejected={rejected!r}, '
    f'rejected_weight={rejected_weight})',
    choose,
    needs_several=True,
  )


def weigh(
  score: Score, a: float = 1.0, b: float = 1.0, normalized: bool = False
) -> Rule:
  """Gives each output the weight p^a (1 - p)^b, which scales its gradient.

  It is high for inputs that are neither easy nor out of reach. Outputs of
  weight 0 stay.

  Args:
    score: p, between 0 and 1, such as @select.pass_rate().
    a: exponent of p, 0 or more.
    b: exponent of 1 - p, 0 or more.
    normalized: divide by the largest possible weight, so that it is 1.

  Raises:
    ValueError: a or b is negative.

  Source: PACED, arXiv:2603.11178; normalized with a = b = 1 it is 4 p (1 - p).
  """
  _check_score('weigh.score', score)
  for name, value in (('a', a), ('b', b)):
    if value < 0.0:
      raise ValueError(f'select.weigh.{name} must not be negative: {value}.')
  largest = 1.0
  if normalized and a + b > 0.0:
    largest = (a / (a + b)) ** a * (b / (a + b)) ** b

  def choose(outputs):
    lines = []
    for line, p in zip(outputs.lines, score(outputs), strict=True):
      if not 0.0 <= p <= 1.0:
        raise ValueError(
          f'select.weigh.score must be between 0 and 1, but '
          f'{score.description} is {p} for {outputs.where}.'
        )
      lines.append({**line, 'weight': p**a * (1.0 - p) ** b / largest})
    return lines

  return Rule(
    f'weigh({score.description}, a={a}, b={b}, normalized={normalized})',
    choose,
    needs_several=score.needs_several,
  )


def _distinct(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Returns the first of the lines with each text."""
  first = {}
  for line in lines:
    first.setdefault(line['prediction'], line)
  return list(first.values())


def _highest(
  lines: Sequence[Mapping[str, Any]], scores: Sequence[float], number: int
) -> list[dict[str, Any]]:
  """Returns the lines of the highest scores, with their scores, best first."""
  order = sorted(range(len(lines)), key=lambda i: -scores[i])  # stable
  return [{**lines[i], 'score': scores[i]} for i in order[:number]]


def _check_positive(setting: str, value: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(
      f'select.{setting} must be a positive whole number, got {value!r}.'
    )


def _check_score(setting: str, score: Any) -> None:
  if not isinstance(score, Score):
    raise ValueError(
      f'select.{setting} must be a score, such as @select.to_targets() or '
      f'@select.python_function(), got {score!r}.'
    )


# --- The run mode -------------------------------------------------------------


def select(
  predictions_path: str,
  output_dir: str,
  rules: Sequence[Rule],
  overwrite: bool = False,
) -> None:
  """Writes `<output_dir>/predictions_<split>.jsonl`; see `predictions`.

  Files are streamed: one input is in memory. An interrupted run resumes, and
  produces the same file. Lines keep their fields and numbers.

  Args:
    predictions_path: path or glob of files of predictions of the same inputs.
    output_dir: created if it does not exist.
    rules: applied in this order.
    overwrite: replace a complete file, and one of other settings.

  Raises:
    ValueError: the files do not fit each other or the rules, or the file is
      already complete.
  """
  _check_rules(rules)
  sources = predictions.find(predictions_path, _SETTING)
  about = predictions.shared_provenance(sources, _SETTING)
  path = predictions.output_path(
    sources, about, output_dir, _SETTING, _OUTPUT_SETTING
  )
  files.check_free([path], _OUTPUT_SETTING, overwrite)
  first = next(predictions.examples(sources, _SETTING), None)
  if first is None:
    raise ValueError(f'{_SETTING}: {predictions_path} holds no predictions.')
  if any(rule.needs_several for rule in rules):
    _check_several(sources, rules)
  prepared = _prepared(rules, sources)
  _apply(prepared, first)  # what a rule refuses, before anything is written
  provenance = about or {'vocabulary': None}
  selected = [rule.description for rule in rules]
  pinned = predictions.files_of(predictions_path, _SETTING)
  writer = predictions.Writer(
    path,
    {
      **provenance,
      'selected': [*provenance.get('selected', []), *selected],
      'pins': pins.to_json({_SETTING: pins.of_files(pinned)}),
    },
    batch_size=1,
    overwrite=overwrite,
    setting=_OUTPUT_SETTING,
  )
  if writer.num_examples:
    console.log(f'Resuming at example {writer.num_examples:,}.')
  num_examples = num_outputs = 0
  logged = time.monotonic()
  start = writer.num_examples
  for example in predictions.examples(sources, _SETTING):
    num_examples += 1
    num_outputs += len(example.lines)
    if example.number >= start:
      writer.append([_apply(prepared, example)])
    if (now := time.monotonic()) - logged > _STATUS_SECONDS:
      logged = now
      console.log(f'{num_examples:,} inputs')
  writer.close(num_examples)
  console.log(
    f'{writer.num_predictions:,} of {num_outputs:,} outputs selected: {path}'
  )
  if lost := num_examples - writer.num_with_output:
    console.log(f'{lost:,} of {num_examples:,} inputs lost all outputs.')


def _prepared(rules: Sequence[Rule], sources: Sequence[str]) -> list[Rule]:
  """Returns the rules, all with `choose`."""
  ready = []
  for rule in rules:
    if rule.prepare is not None:
      examples = predictions.examples(sources, _SETTING)
      left = ((_apply(ready, one), one.number) for one in examples)
      choose = rule.prepare(
        _outputs(lines, number) for lines, number in left if lines
      )
      rule = dataclasses.replace(rule, choose=choose)
    ready.append(rule)
  return ready


def _outputs(lines: Sequence[Mapping[str, Any]], number: int) -> Outputs:
  return Outputs(lines[0]['inputs'], lines, f'example {number}')


def _apply(
  rules: Sequence[Rule], example: predictions.Example
) -> Sequence[Mapping[str, Any]]:
  """Returns the lines that all rules leave, with their numbers."""
  lines = [
    {'example': example.number, 'sample': i, **line}
    for i, line in enumerate(example.lines)
  ]
  for rule in rules:
    if not lines:
      break
    lines = rule.choose(_outputs(lines, example.number))
  return lines


def _check_rules(rules: Any) -> None:
  is_list = isinstance(rules, Sequence) and not isinstance(rules, str)
  if not is_list or not rules or not all(isinstance(x, Rule) for x in rules):
    raise ValueError(
      f'RULES must be a list of rules, such as [@select.mbr()], got {rules!r}.'
    )


def _check_several(sources: Sequence[str], rules: Sequence[Rule]) -> None:
  """Raises ValueError unless some input has several outputs."""
  examples: Iterator[predictions.Example] = predictions.examples(
    sources, _SETTING
  )
  if not any(len(example.lines) > 1 for example in examples):
    rule = next(rule for rule in rules if rule.needs_several)
    raise ValueError(
      f'{_SETTING}: {", ".join(sources)} has one output for each input, but '
      f'{rule.description} chooses among several. Write more with '
      '--run_mode=infer and NUM_SAMPLES, or name files of several models.'
    )
