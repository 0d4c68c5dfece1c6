# SPDX-License-Identifier: Apache-2.0
"""Self-BLEU: the diversity of the outputs for one input.

The paper's Fig. 4 plots the task's metric against Self-BLEU of the same
outputs, over temperatures.

Source: Zhu et al. (2018), arXiv:1802.01886; Agarwal et al. (2024),
arXiv:2306.13649, Fig. 4.
"""

from collections.abc import Iterable, Sequence

from etils import epy

with epy.lazy_imports():
  import sacrebleu

WORDS = '13a'  # tokenizes like mteval; sacreBLEU's default

# Other tokenizers of sacreBLEU download a model or need another package.
_TOKENIZERS = ('13a', 'char', 'intl', 'none', 'zh')


def self_bleu(outputs: Iterable[Sequence[str]], tokenize: str = WORDS) -> float:
  """Returns Self-BLEU: 100 if all outputs are equal, 0 at maximal diversity.

  The other outputs for the same input are an output's references. The mean is
  taken over the outputs of an input, then over inputs. Each score is
  sacreBLEU's sentence score: n-grams of 1 to 4 tokens up to the output's length
  (effective order), exponential smoothing, brevity penalty. An output that
  equals another scores 100, also if it is empty.

  Args:
    outputs: for each input, two or more texts.
    tokenize: a tokenizer of sacreBLEU: '13a' for words; 'char' if an output is
      a single word.

  Raises:
    ValueError: an input has fewer than two outputs, or there is no input.
  """
  bleu = sacrebleu.BLEU(tokenize=tokenize, effective_order=True)
  means = []
  for texts in outputs:
    if len(texts) < 2:
      raise ValueError(
        f'Self-BLEU needs at least 2 outputs for each input, got {len(texts)}.'
      )
    scores = []
    for i, text in enumerate(texts):
      others = [*texts[:i], *texts[i + 1 :]]
      is_repeated = text in others
      scores.append(
        100.0 if is_repeated else bleu.sentence_score(text, others).score
      )
    means.append(sum(scores) / len(scores))
  if not means:
    raise ValueError('Self-BLEU needs at least one input.')
  return sum(means) / len(means)


def check_tokenizer(name: str) -> None:
  """Raises ValueError unless `name` is a supported tokenizer."""
  if name not in _TOKENIZERS:
    raise ValueError(
      f'SELF_BLEU_TOKENIZE must be one of {", ".join(_TOKENIZERS)}, got '
      f'{name!r}.'
    )
