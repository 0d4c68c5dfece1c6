# SPDX-License-Identifier: Apache-2.0
"""Registers `arithmetic_cot`: sums and differences, worked out step by step.

Input `38-57-10+5`, target `38-57=-19 -19-10=-29 -29+5=-24 #### -24`: a small
substitute for GSM8K with the same answer format, in which every step can be
checked. The examples are generated from a fixed seed; nothing is downloaded.

Importing this module imports TensorFlow; the examples are generated when the
first dataset is built.
"""

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

NUM_EXAMPLES: Mapping[str, int] = {
  'train': 50_000,
  'validation': 1_000,
  'test': 2_000,
}

# At most nine digits: true answers are far smaller, and int() raises an error
# for more than 4300 digits.
_INTEGER = '-?[0-9]{1,9}'
_EQUATION = f'({_INTEGER})([+-][0-9]{{1,9}})=({_INTEGER})'


def chain_of_thought(expression: str) -> str:
  """Adds terms from left to right: one equation per term, then the answer."""
  first, *rest = re.findall('[+-]?[0-9]+', expression)
  total = int(first)
  steps = []
  for term in rest:
    steps.append(f'{total}{term}={total + int(term)}')
    total += int(term)
  return ' '.join([*steps, f'#### {total}'])


@functools.cache
def expressions() -> Mapping[str, tuple[str, ...]]:
  """Maps each split to its expressions; all expressions are distinct.

  The splits are slices of one list sorted by hash, so they are equally hard. If
  they were drawn one after another, later splits would have longer expressions,
  because the short ones run out.
  """
  rng = random.Random(0)
  distinct = set()
  while len(distinct) < sum(NUM_EXAMPLES.values()):
    distinct.add(_draw(rng))
  ordered = iter(
    sorted(distinct, key=lambda e: hashlib.sha256(e.encode()).digest())
  )
  return {
    split: tuple(itertools.islice(ordered, num_examples))
    for split, num_examples in NUM_EXAMPLES.items()
  }


def _draw(rng: random.Random) -> str:
  """Draws 2, 3 or 4 terms of 1 or 2 digits, with equal probabilities.

  Among the distinct expressions 16% have two terms, 41% three and 43% four.
  """

  def below(n: int) -> int:
    # Python guarantees reproducible results of random() only.
    return int(n * rng.random())

  def term() -> str:
    return str(below(10) if below(2) == 0 else 10 + below(90))

  return term() + ''.join('+-'[below(2)] + term() for _ in range(1 + below(3)))


def _dataset(
  split: str, shuffle_files: bool, seed: int | None = None
) -> tf.data.Dataset:
  """Yields `inputs` and `targets`."""
  del shuffle_files, seed  # one fixed order; seqio shuffles after tokenizing
  chosen = expressions()[split]
  # Without tf.constant, tf.data converts the lists element by element: ten
  # times slower.
  return tf.data.Dataset.from_tensor_slices(
    {
      'inputs': tf.constant(chosen),
      'targets': tf.constant([chain_of_thought(e) for e in chosen]),
    }
  )


def final_answer(text: str) -> int | None:
  """Returns the integer after the last `####`, None if there is none."""
  _, marker, answer = text.rpartition('####')
  answer = answer.strip()  # also strips control characters; int() does not
  if marker and re.fullmatch(_INTEGER, answer):
    return int(answer)
  return None


def equations(text: str) -> list[bool]:
  """Returns whether each word with a `=` is a true `a+b=c` or `a-b=c`.

  A malformed equation, such as `1+2=` or `1+2=3+4=7`, is not true.
  """
  return [_is_true(word) for word in text.split() if '=' in word]


def _is_true(equation: str) -> bool:
  match = re.fullmatch(_EQUATION, equation)
  if match is None:
    return False
  total, term, result = map(int, match.groups())
  return total + term == result


def accuracies(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Scores the final answers and the steps that lead to them.

  Returns:
    accuracy: percent of the predictions whose final answer is the target's. A
      prediction without a readable answer is wrong.
    steps_correct: percentage of the equations in the predictions that are
      arithmetically true, whether or not they belong to the problem; 0 without
      equations.
  """
  answers = [final_answer(p) for p in predictions]
  right = sum(
    answer is not None and answer == final_answer(target)
    for answer, target in zip(answers, targets, strict=True)
  )
  steps = [is_true for p in predictions for is_true in equations(p)]
  return {
    'accuracy': 100 * right / len(targets),
    'steps_correct': 100 * sum(steps) / max(1, len(steps)),
  }


_FEATURE = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)

seqio.TaskRegistry.add(
  'arithmetic_cot',
  source=seqio.FunctionDataSource(
    _dataset, splits=list(NUM_EXAMPLES), num_input_examples=NUM_EXAMPLES
  ),
  preprocessors=[
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos_after_trim,
  ],
  output_features={'inputs': _FEATURE, 'targets': _FEATURE},
  metric_fns=[accuracies],
)
