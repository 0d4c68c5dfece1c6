# SPDX-License-Identifier: Apache-2.0
"""Results as flat rows, for programs: results.json."""

import re
from collections.abc import Sequence
from typing import Any

from gkd_jax.report import sections as sections_lib
from gkd_jax.report.sections import Group, Section

_NAMES = {
  'step': 'steps',
  'train_seconds': 'seconds',
  'gap_closed': 'gap_closed',
  sections_lib.KL: 'kl_on_student_outputs',
  'on_dataset_outputs/reverse_kl': 'kl_on_dataset_outputs',
}


def rows(sections: Sequence[Section]) -> dict[str, Any]:
  """Returns the rows of all sections.

  Returns:
    {'methods': one row per group, 'runs': one row per run}. A row has 'method',
    an identifier such as 'supervised_kd'; 'task' and 'split'; the task's
    metrics, e.g. 'wer' (greedy) and 'sampled_wer'; 'gap_closed', None if
    unknown; 'kl_on_student_outputs' and 'kl_on_dataset_outputs',
    KL(student || teacher) in nats per token; 'steps' and 'seconds' of training.
    Rows of methods have means over 'seeds' runs, and their standard errors as
    '<name>_se'.
  """
  methods, runs = [], []
  for section in sections:
    for group in (*section.groups, *section.also_run):
      common = {
        'method': identifier(group.name),
        'task': section.task,
        'split': section.split,
      }
      methods.append(common | _means(group))
      for run in group.runs:
        values = section.values(run)
        gap = section.gap_closed(run, group.role)
        runs.append(
          common
          | {'seed': run.seed}
          | _renamed({**values, 'gap_closed': gap}, group.role)
        )
  return {'methods': methods, 'runs': runs}


def identifier(name: str) -> str:
  """Returns 'on_policy_gkd_jsd_0.9' for 'on-policy GKD, JSD(0.9)'."""
  return re.sub(r'[^\w.]+', '_', name.lower()).strip('_')


def _means(group: Group) -> dict[str, Any]:
  row = {'seeds': max(1, len(group.runs))}
  means = {name: mean.value for name, mean in group.means.items()}
  errors = {
    f'{name}_se': group.means[metric].error
    for metric, name in _named(group.means)
    if group.means[metric].error is not None
  }
  return row | _renamed({'gap_closed': None} | means, group.role) | errors


def _renamed(values, role) -> dict[str, Any]:
  row = {name: values[metric] for metric, name in _named(values)}
  if role == 'teacher':
    row.pop('gap_closed', None)
  elif role == 'initial student':
    row['gap_closed'] = 0.0
  return row


def _named(values) -> list[tuple[str, str]]:
  """Returns (metric, its name in a row) of the metrics that rows contain."""
  named = []
  for metric in values:
    decoding, _, name = metric.rpartition('/')
    if metric in _NAMES:
      named.append((metric, _NAMES[metric]))
    elif decoding and not decoding.startswith(('on_', 'teacher', 'train')):
      prefix = '' if decoding == 'greedy' else f'{decoding}_'
      named.append((metric, prefix + name))
  return named
