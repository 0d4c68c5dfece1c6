# SPDX-License-Identifier: Apache-2.0
"""Registers `gsm8k_cot`: word problems with chain-of-thought solutions.

Inputs are four worked examples and the question, each as `Q: ... A:`. Targets
are the steps and `#### 72`. Data: GSM8K (Cobbe et al., 2021) from TFDS's
gsm8k:1.0.0, which must be prepared in advance, or from JSON lines. Metric:
accuracy.

- One training question in 20 (by the hash of its text) is `validation`.
- The worked examples are four training questions with short solutions, the
  same in all prompts, and excluded from training; or the examples of a file.
- GSM8K's calculator annotations, `<<48/2=24>>`, are removed if the vocabulary
  has no `<`, as T5's.

Importing this module imports TensorFlow; data is read when the first dataset
is built.
"""

import decimal
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

from gkd_jax.data.tasks import _common, _few_shot

_FIELDS = ('question', 'answer')
_ANNOTATION = '<<[^<>]*>>'
_WHOLE = '(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)'
_NUMBER = rf'(-?\s*\$?|\$\s*-)\s*({_WHOLE}(?:\.[0-9]+)?|\.[0-9]+)'

# Of the worked examples. 250 characters are about 75 tokens of T5. With four
# such examples all but one of GSM8K's questions fit into 512 tokens.
_NUM_SHOTS = 4
_SHOT_CHARACTERS = 250
_SHOT_STEPS = range(2, 5)
_SHOT_SEED = 0

Row = tuple[str, str]  # question, answer


def strip_annotations(answer: str) -> str:
  """Returns an answer without its calculator annotations."""
  return re.sub(_ANNOTATION, '', answer)


def final_answer(text: str) -> decimal.Decimal | None:
  """Returns the number after the last `####`, None if there is none.

  `#### 1,000`, `#### $1000` and `####1000.0 apples` are the same number. A text
  with further digits, such as `1/2`, is not a number.
  """
  _, marker, answer = text.rpartition('####')
  answer = answer.strip().partition('\n')[0]
  match = re.fullmatch(_NUMBER + r'\D*', answer)
  if not marker or match is None:
    return None
  before, digits = match.groups()
  number = decimal.Decimal(digits.replace(',', ''))
  return -number if '-' in before else number


def accuracy(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns the percentage of predictions whose final answer is the target's.

  Numbers are compared as numbers; a prediction without a readable one is wrong.
  """
  answers = [final_answer(p) for p in predictions]
  right = sum(
    answer is not None and answer == final_answer(target)
    for answer, target in zip(answers, targets, strict=True)
  )
  return {'accuracy': 100 * right / len(targets)}


def draw_shots(rows: Sequence[Row]) -> list[Row]:
  """Returns the worked examples; they do not depend on the order of rows.

  They are the questions with the smallest hashes among those with two to four
  steps and at most 250 characters, including the solution but not its
  annotations.
  """

  def is_short(row):
    question, answer = row[0], strip_annotations(row[1])
    return (
      len(question) + len(answer) <= _SHOT_CHARACTERS
      and answer.count('\n') in _SHOT_STEPS
    )

  def rank(row):
    return hashlib.sha256(f'{_SHOT_SEED} {row[0]}'.encode()).digest()

  return sorted(filter(is_short, rows), key=rank)[:_NUM_SHOTS]


def make_task(
  name: str,
  files: Mapping[str, str] | None = None,
  shots_file: str | None = None,
) -> seqio.Task:
  """Returns the task.

  Args:
    name: of the task.
    files: {'train': path, 'test': path}, JSON lines of {question, answer} in
      place of TFDS's data. Any of train, validation and test may be left out;
      without a validation file, part of train is held out for it.
    shots_file: JSON lines of {question, answer}: all worked examples of the
      prompt, in this order.
  """
  splits = _common.SPLITS
  if files is not None:
    _common.check_splits('GSM8K_FILES', files)
    if 'train' not in files and shots_file is None:
      raise ValueError(
        "GSM8K_FILES has no 'train', from which the worked examples of the "
        'prompt are drawn. Add it, or set GSM8K_SHOTS_FILE.'
      )
    _common.check_files('GSM8K_FILES', files)
    has_validation = 'validation' in files or 'train' in files
    splits = [s for s in splits if s in files]
    if has_validation and 'validation' not in splits:
      splits.append('validation')
  if shots_file is not None:
    _common.check_files('GSM8K_SHOTS_FILE', {'shots': shots_file})
  tfds = _common.TfdsSource('gsm8k:1.0.0', {s: s for s in ('train', 'test')})

  @functools.cache
  def read(split) -> list[Row]:
    if files is not None:
      columns = _common.read_json_lines('GSM8K_FILES', files[split], _FIELDS)
      return list(zip(*columns.values(), strict=True))
    return [
      (row['question'].decode(), row['answer'].decode())
      for row in tfds.get_dataset(split, shuffle=False).as_numpy_iterator()
    ]

  def rows(split) -> list[Row]:
    holds_out = files is None or 'validation' not in files
    if split == 'train':
      left_out = set() if shots_file else set(shots())
      return [
        row
        for row in read('train')
        if row not in left_out and not (holds_out and _is_held_out(row))
      ]
    if split == 'validation' and holds_out:
      return [row for row in read('train') if _is_held_out(row)]
    return read(split)

  @functools.cache
  def shots() -> tuple[Row, ...]:
    if shots_file is not None:
      columns = _common.read_json_lines('GSM8K_SHOTS_FILE', shots_file, _FIELDS)
      return tuple(zip(*columns.values(), strict=True))
    drawn = draw_shots([row for row in read('train') if not _is_held_out(row)])
    if len(drawn) < _NUM_SHOTS:
      raise ValueError(
        f'The prompt needs {_NUM_SHOTS} worked examples with two to four steps '
        f'and at most {_SHOT_CHARACTERS} characters, but {name!r} has only '
        f'{len(drawn)} such training questions. Set GSM8K_SHOTS_FILE.'
      )
    return tuple(drawn)

  def columns(split):
    of_split = rows(split)
    return {
      'question': [question for question, _ in of_split],
      'answer': [answer for _, answer in of_split],
    }

  def prompt(dataset, output_features):
    worked = tf.constant([f'Q: {q}\nA: {a}\n\n' for q, a in shots()])
    keep = _can_write_annotations(output_features['targets'].vocabulary)

    def example(row):
      texts = {
        'head': tf.constant(''),
        'shots': worked,
        'query': tf.strings.join(['Q: ', row['question'], '\nA:']),
        'targets': row['answer'],
      }
      if keep:
        return texts
      return {
        name: tf.strings.regex_replace(text, _ANNOTATION, '')
        for name, text in texts.items()
      }

    return dataset.map(example, num_parallel_calls=tf.data.AUTOTUNE)

  return seqio.Task(
    name,
    source=_common.RowsSource(columns, splits),
    preprocessors=[prompt, _few_shot.fit_shots, *_common.TOKENIZE],
    output_features=_common.T5_FEATURES,
    metric_fns=[accuracy],
  )


def _is_held_out(row: Row) -> bool:
  return hashlib.sha256(row[0].encode()).digest()[0] % 20 == 0


def _can_write_annotations(vocabulary: seqio.Vocabulary) -> bool:
  text = '<<48/2=24>>'
  return vocabulary.decode(vocabulary.encode(text)) == text


seqio.TaskRegistry.add_provider('gsm8k_cot', make_task('gsm8k_cot'))
