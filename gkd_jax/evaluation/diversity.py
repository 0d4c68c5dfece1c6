# SPDX-License-Identifier: Apache-2.0
"""How much the outputs for one input differ: Self-BLEU.

The paper draws its quality-against-diversity figure with it: the task's metric
and Self-BLEU of the same outputs, over temperatures.

Source: Zhu et al. (2018), arXiv:1802.01886; Agarwal et al. (2024),
arXiv:2306.13649, Fig. 4.
"""

from collections.abc import Iterable, Sequence

from etils import epy

with epy.lazy_imports():
  import sacrebleu

WORDS = '13a'  # mteval's words, sacreBLEU's own default

# Sacrebleu's others download a model, or need another package.
_TOKENIZERS = ('13a', 'char', 'intl', 'none', 'zh')


def self_bleu(outputs: Iterable[Sequence[str]], tokenize: str = WORDS) -> float:
  """Returns Self-BLEU: 100 where all outputs are equal, 0 at most diversity.

  Each output is compared with the others for its input as references; the mean
  is taken over the outputs of an input, then over inputs. The comparison is
  sacreBLEU's for sentences: n-grams of 1 to 4 tokens, as far as the output has
  any (effective order), exponential smoothing, brevity penalty. An output that
  equals another, an empty one too, counts 100.

  Args:
    outputs: for each input, two or more texts.
    tokenize: sacreBLEU's name of what a token is: '13a' for words; 'char'
      where an output is a single word.

  Raises:
    ValueError: an input has fewer than two outputs, or there is no input.
  """
  bleu = sacrebleu.BLEU(tokenize=tokenize, effective_order=True)
  means = []
  for texts in outputs:
    if len(texts) < 2:
      raise ValueError(
        f'Self-BLEU compares outputs for one input; there are {len(texts)}.'
      )
    scores = []
    for i, text in enumerate(texts):
      others = [*texts[:i], *texts[i + 1 :]]
      is_there = text in others
      scores.append(
        100.0 if is_there else bleu.sentence_score(text, others).score
      )
    means.append(sum(scores) / len(scores))
  if not means:
    raise ValueError('Self-BLEU of no outputs.')
  return sum(means) / len(means)


def check_tokenizer(name: str) -> None:
  """Raises ValueError if it is none of those that can be used."""
  if name not in _TOKENIZERS:
    raise ValueError(
      f'SELF_BLEU_TOKENIZE must be one of {", ".join(_TOKENIZERS)}, got '
      f'{name!r}.'
    )
