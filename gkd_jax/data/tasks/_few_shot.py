# SPDX-License-Identifier: Apache-2.0
"""Few-shot prompts, and tasks that consist of several groups.

A prompt is head + shots + query. If it exceeds the length of the inputs, the
last shots are dropped: truncation would remove the query.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import seqio
import tensorflow as tf

from gkd_jax.data.tasks import _common


def fit_shots(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int] | None,
  output_features: Mapping[str, seqio.Feature],
) -> tf.data.Dataset:
  """Replaces `head` [], `shots` [K] and `query` [] by `inputs` [], all texts.

  Keeps as many of the first shots as fit, with EOS, into
  sequence_length['inputs']; all shots if sequence_length is None.
  """
  vocabulary = output_features['inputs'].vocabulary

  def join(example):
    head, shots, query = (example.pop(k) for k in ('head', 'shots', 'query'))

    def prompt(num_shots):
      chosen = tf.strings.reduce_join(shots[:num_shots])
      return tf.strings.join([head, chosen, query])

    def too_long(num_shots):
      num_tokens = tf.size(vocabulary.encode_tf(prompt(num_shots))) + 1
      return num_tokens > sequence_length['inputs']

    num_shots = tf.size(shots)
    if sequence_length is not None:
      (num_shots,) = tf.while_loop(
        lambda n: tf.logical_and(n > 0, too_long(n)),
        lambda n: (n - 1,),
        (num_shots,),
      )
    return {**example, 'inputs': prompt(num_shots)}

  return dataset.map(
    lambda example: join(dict(example)), num_parallel_calls=tf.data.AUTOTUNE
  )


@dataclasses.dataclass(frozen=True)
class Group:
  """Questions of one kind with their own shots, e.g. a subject of MMLU.

  Attributes:
    head: the start of a prompt.
    shots: worked examples, each with its separator at the end.
    queries: one per question.
    answers: to the queries.
  """

  head: str
  shots: Sequence[str]
  queries: Sequence[str]
  answers: Sequence[str]


def grouped_task(
  name: str,
  groups: Callable[[str], Mapping[str, Group]],
  splits: Collection[str],
  postprocess: Callable[[str], str],
  metric: Callable[..., dict],
) -> seqio.Task:
  """Returns a task of the questions of all groups.

  Args:
    name: of the task.
    groups: split -> {name of the group: Group}, all with equally many shots.
    splits: names of the splits.
    postprocess: output text -> answer.
    metric: of targets (group, answer) and predictions, see `accuracy`.
  """

  def columns(split):
    columns = {'group': [], 'head': [], 'shots': [], 'query': [], 'targets': []}
    # Groups take turns, so that the first examples cover all groups.
    for rows in itertools.zip_longest(
      *(
        [
          (name, group, *row)
          for row in zip(group.queries, group.answers, strict=True)
        ]
        for name, group in groups(split).items()
      )
    ):
      for group_name, group, query, answer in filter(None, rows):
        columns['group'].append(group_name)
        columns['head'].append(group.head)
        columns['shots'].append(list(group.shots))
        columns['query'].append(query)
        columns['targets'].append(answer)
    return columns

  def postprocess_fn(text, example=None, is_target=False):
    if is_target:
      return example['group'].decode(), text
    return postprocess(text)

  return seqio.Task(
    name,
    source=_common.RowsSource(columns, splits),
    preprocessors=[fit_shots, *_common.TOKENIZE],
    output_features=_common.T5_FEATURES,
    postprocess_fn=postprocess_fn,
    metric_fns=[metric],
  )


def accuracy(
  targets: Sequence[tuple[str, str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns {group: percentage of predictions that equal the answer}."""
  right = collections.defaultdict(list)
  for (group, answer), prediction in zip(targets, predictions, strict=True):
    right[group].append(prediction == answer)
  return {
    group: 100 * sum(of_group) / len(of_group)
    for group, of_group in sorted(right.items())
  }


def mean(values: Collection[float]) -> float:
  """Returns the unweighted mean."""
  return sum(values) / len(values)
