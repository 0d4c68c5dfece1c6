# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from gkd_jax.evaluation import similarity

TEXTS = [
  'the cat sat on the mat',
  'the cats sat, on a mat.',
  'on the mat sat the cat',
  'a dog',
  '',
  'the the the the',
]
PAIRS = [(a, b) for a in TEXTS for b in TEXTS]


def table(a, b):
  """Of every prefix of both: common subsequence and edit distance."""
  common = np.zeros((len(a) + 1, len(b) + 1), int)
  edits = np.add.outer(np.arange(len(a) + 1), np.arange(len(b) + 1))
  for i, x in enumerate(a, 1):
    for j, y in enumerate(b, 1):
      common[i, j] = max(
        common[i - 1, j], common[i, j - 1], common[i - 1, j - 1] + (x == y)
      )
      edits[i, j] = min(
        edits[i - 1, j] + 1, edits[i, j - 1] + 1, edits[i - 1, j - 1] + (x != y)
      )
  return common[-1, -1], edits[-1, -1]


@pytest.fixture(params=range(60))
def words(request):
  """Two sequences of up to 80 letters of a small alphabet."""
  draw = random.Random(request.param)
  letters = 'abcd'[: draw.randint(1, 4)]
  return [
    draw.choices(letters, k=draw.randint(0, draw.choice((3, 80))))
    for _ in range(2)
  ]


def test_subsequences_and_edits_are_those_of_the_whole_table(words):
  got = (
    similarity.longest_common_subsequence(*words),
    similarity.levenshtein(*words),
  )

  assert got == table(*words)


@pytest.mark.parametrize(('output', 'reference'), PAIRS)
def test_rouge_l_is_that_of_rouge_score(output, reference):
  scorer = rouge_scorer.RougeScorer(['rougeL'], use_stemmer=True)
  want = scorer.score(reference, output)['rougeL'].fmeasure
  if output == reference == '':
    want = 1.0  # there 0

  assert similarity.rouge_l().function(output, reference) == pytest.approx(want)


def test_rouge_l_of_other_scripts_needs_a_unit():
  output, reference = 'кот спит', 'кот ест'

  assert similarity.rouge_l().function(output, reference) == 0.0
  assert similarity.rouge_l('words').function(output, reference) == 0.5
  # All of the reference but its letter е.
  by_letter = similarity.rouge_l('characters').function(output, reference)
  assert by_letter == 2 * 6 / (8 + 7)


@pytest.mark.parametrize(('output', 'reference'), [*PAIRS, ('é ü', 'üé x')])
def test_chrf_is_that_of_sacrebleu(output, reference):
  want = sacrebleu.sentence_chrf(output, [reference]).score / 100.0
  if output == reference == '':
    want = 1.0  # there 0

  assert similarity.chrf().function(output, reference) == pytest.approx(want)


def test_edit_distance_is_relative_to_the_longer_text():
  of = similarity.edit_distance

  assert of('words').function('a b c', 'a x c d') == 0.5
  assert of('characters').function('kitten', 'sitting') == 1.0 - 3.0 / 7.0
  assert of('words').function('', '') == 1.0


@pytest.mark.parametrize(
  ('marker', 'output', 'reference', 'want'),
  [
    (None, ' a b', 'a b\n', 1.0),
    (None, 'a', 'b', 0.0),
    ('#### ', '1 + 1 #### 2', '3 - 1 #### 2 ', 1.0),
    ('#### ', '#### 2 then #### 3', '#### 2', 0.0),
    ('#### ', '2', '2', 0.0),
  ],
)
def test_exact_match_may_be_of_the_answer_alone(
  marker, output, reference, want
):
  assert similarity.exact_match(marker).function(output, reference) == want


def test_a_function_of_a_user_is_named_and_checked():
  def length(output, reference):
    return len(output) / len(reference) if reference != '?' else float('nan')

  made = similarity.of(length)

  assert made.function('ab', 'abcd') == 0.5
  assert made.description.endswith('length')
  with pytest.raises(ValueError, match=r'must return a finite number.*nan'):
    made.function('ab', '?')


@pytest.mark.parametrize(
  ('make', 'said'),
  [
    (lambda: similarity.rouge_l('tokens'), 'rouge_l.unit must be one of'),
    (lambda: similarity.edit_distance('x'), 'edit_distance.unit must be'),
    (lambda: similarity.of('chrf'), 'A utility or metric must be'),
  ],
)
def test_what_is_no_similarity_is_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()
