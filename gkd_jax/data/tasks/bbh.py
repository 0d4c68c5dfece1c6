# SPDX-License-Identifier: Apache-2.0
"""The task `bbh`: the 23 tasks of BIG-Bench Hard, 3-shot.

Questions and prompts are read from a copy of the authors' repository (Suzgun et
al., 2022): `bbh/<task>.json` and `cot-prompts/<task>.txt`. The shots are those
of the prompts, with their chains of thought or only their answers ("direct").

Importing this module imports TensorFlow; data is read when the first dataset
is built.
"""

import collections
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import seqio

from gkd_jax.data.tasks import _few_shot
from gkd_jax.runtime import paths

# Two of the 23 tasks have three files each, one per size.
FILES: Sequence[str] = tuple(
  """
  boolean_expressions causal_judgement date_understanding disambiguation_qa
  dyck_languages formal_fallacies geometric_shapes hyperbaton
  logical_deduction_five_objects logical_deduction_seven_objects
  logical_deduction_three_objects movie_recommendation
  multistep_arithmetic_two navigate object_counting penguins_in_a_table
  reasoning_about_colored_objects ruin_names
  salient_translation_error_detection snarks sports_understanding
  temporal_sequences tracking_shuffled_objects_five_objects
  tracking_shuffled_objects_seven_objects
  tracking_shuffled_objects_three_objects web_of_lies word_sorting
  """.split()
)
_NUM_SHOTS = 3
_THINK = "Let's think step by step."


def answer(text: str) -> str:
  """Returns the text after the last `answer is`, or all, without its period."""
  text = ' '.join(text.split())
  return text.rpartition('answer is ')[2].removesuffix('.').strip()


def accuracy(
  targets: Sequence[tuple[str, str]], predictions: Sequence[str]
) -> dict[str, Any]:
  """Returns the accuracy in percent, as the unweighted mean over the 23 tasks.

  A note has the accuracy on each of the 27 files.
  """
  by_file = _few_shot.accuracy(targets, predictions)
  of_task = collections.defaultdict(list)
  for file, value in by_file.items():
    task = re.sub('_(three|five|seven)_objects$', '', file)
    of_task[task].append(value)
  return {
    'accuracy': _few_shot.mean(
      [_few_shot.mean(values) for values in of_task.values()]
    ),
    'accuracy_by_task': by_file,
  }


def make_task(
  name: str, folder: str, chain_of_thought: bool = False
) -> seqio.Task:
  """Returns the task, with the split `test`.

  Args:
    name: of the task.
    folder: that holds bbh and cot-prompts.
    chain_of_thought: whether the shots contain chains of thought.

  Raises:
    ValueError: a file is missing.
  """
  root = paths.resolve(folder, 'BBH_DIR')
  questions = {file: root / 'bbh' / f'{file}.json' for file in FILES}
  prompts = {file: root / 'cot-prompts' / f'{file}.txt' for file in FILES}
  files = [*questions.values(), *prompts.values()]
  missing = [str(path) for path in files if not path.is_file()]
  if missing:
    raise ValueError(
      f'BBH_DIR {folder} lacks {len(missing)} of {len(files)} files, such as '
      f'{missing[0]}. It must be a copy of '
      'https://github.com/suzgunmirac/BIG-Bench-Hard: it holds bbh and '
      'cot-prompts.'
    )
  think = f' {_THINK}' if chain_of_thought else ''

  def groups(split) -> Mapping[str, _few_shot.Group]:
    del split  # there is one
    result = {}
    for file in FILES:
      head, shots = _read_prompt(prompts[file], chain_of_thought)
      rows = _read_examples(questions[file])
      result[file] = _few_shot.Group(
        head=head,
        shots=shots,
        queries=[f'Q: {question}\nA:{think}' for question, _ in rows],
        answers=[' '.join(target.split()) for _, target in rows],
      )
    return result

  return _few_shot.grouped_task(name, groups, ['test'], answer, accuracy)


def _read_examples(path: pathlib.Path) -> list[tuple[str, str]]:
  try:
    examples = json.loads(path.read_text(encoding='utf-8'))['examples']
    return [(row['input'], row['target']) for row in examples]
  except (json.JSONDecodeError, KeyError, TypeError) as e:
    raise ValueError(
      f'{path} does not hold "examples" of "input" and "target": {e!r}'
    ) from e


def _read_prompt(
  path: pathlib.Path, chain_of_thought: bool
) -> tuple[str, list[str]]:
  """Returns the description of a task, and its shots.

  A file has a warning against its use as training data, a line of dashes, and
  the prompt: a description of the task and three questions with answers.
  """
  prompt = path.read_text(encoding='utf-8').partition('-----\n')[2]
  head, *shots = re.split(r'\n\n(?=Q: )', prompt.strip())
  if len(shots) != _NUM_SHOTS or not all(_THINK in shot for shot in shots):
    raise ValueError(
      f'{path} does not hold a description and {_NUM_SHOTS} questions with '
      f'"{_THINK}" after a line of dashes.'
    )
  if not chain_of_thought:
    if not all('answer is ' in shot for shot in shots):
      raise ValueError(
        f'{path} has a shot without "answer is ", so its answer cannot be '
        'separated from its chain of thought. Set BBH_CHAIN_OF_THOUGHT = True '
        'to keep both.'
      )
    parts = [shot.partition(_THINK) for shot in shots]
    shots = [question + answer(text) for question, _, text in parts]
  return f'{head}\n\n', [f'{shot}\n\n' for shot in shots]
