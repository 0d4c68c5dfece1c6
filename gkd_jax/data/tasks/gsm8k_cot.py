# SPDX-License-Identifier: Apache-2.0
"""Registers `gsm8k_cot`: a word problem in, its solution step by step out.

`Q: ... A:` in, after four worked examples in the same form; the steps and
`#### 72` out. Data: GSM8K (Cobbe et al., 2021) from TFDS's gsm8k:1.0.0, which
must be prepared before, or from JSON lines. Metric: share of right answers.

- One training question in 20 (by the hash of its text) is `validation`.
- The worked examples are four training questions with short solutions, the
  same for all prompts, and not trained on; or those of a file.
- GSM8K's annotations for a calculator, `<<48/2=24>>`, are left out where the
  vocabulary has no `<`, as T5's.

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

# Of the worked examples. 250 characters are 75 of T5's tokens: four of them
# leave room for all but one of GSM8K's questions in 512 tokens.
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

  `#### 1,000`, `#### $1000` and `####1000.0 apples` are the same number. What
  holds other digits than the number's, such as `1/2`, is none.
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
  """Returns the worked examples: the same whatever the rows' order.

  Those questions of all with two to four steps and at most 250 characters,
  solution included and annotations not, whose hashes are the least.
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
    shots_file: JSON lines of {question, answer}: the worked examples of the
      prompt, all of them, in this order.
  """
  splits = _common.SPLITS
  if files is not None:
    _common.check_splits('GSM8K_FILES', files)
    if 'train' not in files and shots_file is None:
      raise ValueError(
        "GSM8K_FILES has no 'train' to take the worked examples of the prompt "
        'from: add it, or set GSM8K_SHOTS_FILE.'
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
        f'Only {len(drawn)} of the training questions of {name!r} have two to '
        f'four steps and {_SHOT_CHARACTERS} characters, to be worked examples '
        f'of the prompt; {_NUM_SHOTS} are needed. Set GSM8K_SHOTS_FILE.'
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
