# SPDX-License-Identifier: Apache-2.0
"""Registers `wmt14_ende`: translation from English to German.

Data: TFDS's wmt14_translate/de-en:1.0.0, which must be prepared in advance;
newstest2013 is `validation`, newstest2014 `test`. Prompt: T5's. Metric:
sacreBLEU.

Importing this module imports TensorFlow; data is read when the first dataset
is built.
"""

from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.data.tasks import _common

# Metric -> tokenization of sacreBLEU: its default, and that of T5's published
# results.
_TOKENIZERS = {'bleu': '13a', 'bleu_intl': 'intl'}


def _prompt(dataset: tf.data.Dataset) -> tf.data.Dataset:
  return dataset.map(
    lambda example: {
      'inputs': tf.strings.join(
        ['translate English to German: ', example['en']]
      ),
      'targets': example['de'],
    },
    num_parallel_calls=tf.data.AUTOTUNE,
  )


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, Any]:
  """Returns corpus BLEU, 0 to 100, and sacreBLEU's signatures as notes.

  Args:
    targets: one reference per example, not tokenized.
    predictions: not tokenized.
  """
  from sacrebleu import metrics  # takes a moment to import

  results = {}
  for name, tokenizer in _TOKENIZERS.items():
    metric = metrics.BLEU(tokenize=tokenizer)
    score = metric.corpus_score(list(predictions), [list(targets)])
    results[name] = float(score.score)
    results[f'{name}_signature'] = str(metric.get_signature())
  return results


seqio.TaskRegistry.add(
  'wmt14_ende',
  source=_common.TfdsSource(
    'wmt14_translate/de-en:1.0.0',
    splits={split: split for split in ('train', 'validation', 'test')},
  ),
  preprocessors=[_prompt, *_common.TOKENIZE],
  output_features=_common.T5_FEATURES,
  metric_fns=[bleu],
)
