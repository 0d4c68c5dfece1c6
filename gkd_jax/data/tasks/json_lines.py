# SPDX-License-Identifier: Apache-2.0
"""Registers `json_lines`: your own inputs and targets, one JSON object a line.

    {"inputs": "translate English to German: Hello.", "targets": "Hallo."}

A number `weight` of each line is read if `DatasetConfig.row_weights` is set.
Metrics: exact match and ROUGE-L. For others, register a task of your own.

Importing this module imports TensorFlow; data is read when the first dataset
is built.
"""

from collections.abc import Mapping, Sequence

import seqio

from gkd_jax.data.tasks import _common


def make_task(
  name: str, files: Mapping[str, str], other_fields: Sequence[str] = ()
) -> seqio.Task:
  """Returns the task.

  Args:
    name: of the task.
    files: {split: file} of train, validation and test; any may be left out. The
      files are read into memory.
    other_fields: names of texts that each line also has, for a template of
      `datasets.TeacherInputs`. Further fields are ignored.
  """
  _common.check_splits('JSON_LINES_FILES', files)
  _common.check_files('JSON_LINES_FILES', files)

  def columns(split):
    return _common.read_json_lines(
      f'JSON_LINES_FILES[{split!r}]',
      files[split],
      ('inputs', 'targets', *other_fields),
      number='weight',
    )

  return seqio.Task(
    name,
    source=_common.RowsSource(
      columns, [s for s in _common.SPLITS if s in files]
    ),
    preprocessors=[*_common.TOKENIZE],
    output_features=_common.T5_FEATURES,
    metric_fns=[_common.exact_match_and_rouge],
  )
