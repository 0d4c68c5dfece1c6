# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from gkd_jax.evaluation import diversity


def test_equal_outputs_have_100():
  outputs = [['the cat sat on the mat'] * 4, ['yes'] * 2, [''] * 3]

  assert diversity.self_bleu(outputs) == 100.0


def test_outputs_without_a_common_word_have_0():
  outputs = [['one two', 'three four', 'five'], ['', 'six']]

  assert diversity.self_bleu(outputs) == 0.0


def test_two_outputs_that_share_all_words_but_the_last():
  # n-gram precisions 3/4, 2/3, 1/2 and, of the one 4-gram, none: smoothed to
  # 1 / (2 * 1). Equal lengths: no penalty. The same the other way round.
  want = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4)

  got = diversity.self_bleu([['a b c d', 'a b c e']])

  assert got == pytest.approx(want, rel=1e-12)


def test_short_outputs_are_compared_as_far_as_they_go():
  # Two words have no 3-grams; `a` has words alone. `a b` of `a`: 1/2 and, of
  # the one pair, none: 1/2 of 1. `a` of `a b`: all, with a penalty for half
  # the length.
  ab_of_a = 100 * math.sqrt(1 / 2 * 1 / 2)
  a_of_ab = 100 * math.exp(1 - 2)

  got = diversity.self_bleu([['a b', 'a']])

  assert got == pytest.approx((ab_of_a + a_of_ab) / 2, rel=1e-12)


def test_an_output_is_compared_with_all_others_for_its_input():
  # The third has one word of each of the others; either has one of its two.
  # And each pair `b c`, `a c`, `a b` of words is in none.
  texts = ['a b', 'c d', 'a d']
  one = 100 * math.sqrt(1 / 2 * 1 / 2)  # a | d of the third; no pair
  third = 100 * math.sqrt(1 * 1 / 2)  # both words; no pair

  got = diversity.self_bleu([texts])

  assert got == pytest.approx((one + one + third) / 3, rel=1e-12)


def test_it_is_the_mean_over_inputs():
  equal, different = ['a b', 'a b', 'a b'], ['c', 'd']

  assert diversity.self_bleu([equal, different, different]) == (
    pytest.approx(100 / 3)
  )


def test_words_may_be_compared_letter_by_letter():
  # abc, abd: 2/3, 1/2, and no 3-gram: 1/2 of 1.
  want = 100 * (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)

  assert diversity.self_bleu([['abc', 'abd']], 'char') == pytest.approx(want)
  assert diversity.self_bleu([['abc', 'abd']]) == 0.0


@pytest.mark.parametrize('outputs', [[], [['one']], [['a', 'b'], []]])
def test_fewer_than_two_outputs_cannot_be_compared(outputs):
  with pytest.raises(ValueError, match='Self-BLEU'):
    diversity.self_bleu(outputs)


def test_an_unknown_tokenizer_is_refused():
  with pytest.raises(ValueError, match=r"SELF_BLEU_TOKENIZE .*, got 'word'"):
    diversity.check_tokenizer('word')
