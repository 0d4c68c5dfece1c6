# SPDX-License-Identifier: Apache-2.0
"""Registers `xsum`: one-sentence summaries of BBC articles.

Data: TFDS's xsum:1.1.0 (Narayan et al., 2018), which must be prepared in
advance from an archive that the user makes. Prompt: T5's. Metric: ROUGE.

Importing this module imports TensorFlow; data is read when the first dataset
is built.
"""

from collections.abc import Sequence
from typing import Any

import seqio
import tensorflow as tf

from gkd_jax.data.tasks import _common


def _prompt(dataset: tf.data.Dataset) -> tf.data.Dataset:
  return dataset.map(
    lambda example: {
      'inputs': tf.strings.join(['summarize: ', example['document']]),
      'targets': example['summary'],
    },
    num_parallel_calls=tf.data.AUTOTUNE,
  )


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, Any]:
  """Returns ROUGE-1, ROUGE-2 and ROUGE-Lsum, mean F-measures in percent.

  A note has the bounds of their 95% confidence intervals by bootstrap.
  """
  types = ('rouge1', 'rouge2', 'rougeLsum')
  means, bounds = _common.rouge(targets, predictions, types)
  return {**means, 'rouge_95_percent_interval': bounds}


seqio.TaskRegistry.add(
  'xsum',
  source=_common.TfdsSource(
    'xsum:1.1.0',
    splits={split: split for split in ('train', 'validation', 'test')},
    manual=(
      'xsum-extracts-from-downloads.tar.gz (the folder that the scripts of '
      'https://github.com/EdinburghNLP/XSum extract, packed)'
    ),
  ),
  preprocessors=[_prompt, *_common.TOKENIZE],
  output_features=_common.T5_FEATURES,
  metric_fns=[rouge],
)
