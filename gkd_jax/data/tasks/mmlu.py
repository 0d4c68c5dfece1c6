# SPDX-License-Identifier: Apache-2.0
"""The task `mmlu`: multiple-choice questions on 57 subjects, 5-shot.

Questions and answers are read from a folder with the layout of the authors'
archive (Hendrycks et al., 2021): `dev`, `val` and `test`, with one file
`<subject>_<split>.csv` per subject. The prompt is the authors'; the five
questions of `dev` are the shots. The answer is a letter.

Importing this module imports TensorFlow; data is read when the first dataset
is built.
"""

import csv
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import seqio

from gkd_jax.data.tasks import _few_shot
from gkd_jax.runtime import paths

SUBJECTS: Sequence[str] = tuple(
  """
  abstract_algebra anatomy astronomy business_ethics clinical_knowledge
  college_biology college_chemistry college_computer_science
  college_mathematics college_medicine college_physics computer_security
  conceptual_physics econometrics electrical_engineering
  elementary_mathematics formal_logic global_facts high_school_biology
  high_school_chemistry high_school_computer_science
  high_school_european_history high_school_geography
  high_school_government_and_politics high_school_macroeconomics
  high_school_mathematics high_school_microeconomics high_school_physics
  high_school_psychology high_school_statistics high_school_us_history
  high_school_world_history human_aging human_sexuality international_law
  jurisprudence logical_fallacies machine_learning management marketing
  medical_genetics miscellaneous moral_disputes moral_scenarios nutrition
  philosophy prehistory professional_accounting professional_law
  professional_medicine professional_psychology public_relations
  security_studies sociology us_foreign_policy virology world_religions
  """.split()
)
_LETTERS = ('A', 'B', 'C', 'D')
_NUM_SHOTS = 5
_FOLDERS = {'validation': 'val', 'test': 'test'}


def letter(text: str) -> str:
  """Returns the letter A to D without parentheses and period; else the text."""
  match = re.fullmatch(r'\(?([A-D])\)?\.?', text.strip())
  return match[1] if match else text


def accuracy(
  targets: Sequence[tuple[str, str]], predictions: Sequence[str]
) -> dict[str, Any]:
  """Returns the accuracy in percent, as the unweighted mean over subjects.

  A note has the accuracy on each subject.
  """
  by_subject = _few_shot.accuracy(targets, predictions)
  return {
    'accuracy': _few_shot.mean(by_subject.values()),
    'accuracy_by_subject': by_subject,
  }


def make_task(name: str, folder: str) -> seqio.Task:
  """Returns the task, with the splits `validation` and `test`.

  Args:
    name: of the task.
    folder: contains dev, val and test.

  Raises:
    ValueError: a file is missing.
  """
  root = paths.resolve(folder, 'MMLU_DIR')
  files = {
    (part, subject): root / part / f'{subject}_{part}.csv'
    for part in ('dev', *_FOLDERS.values())
    for subject in SUBJECTS
  }
  missing = [str(path) for path in files.values() if not path.is_file()]
  if missing:
    raise ValueError(
      f'MMLU_DIR {folder} lacks {len(missing)} of {len(files)} files, such as '
      f'{missing[0]}. Set it to the folder `data` of the archive data.tar from '
      'https://github.com/hendrycks/test, which contains dev, val and test.'
    )

  def groups(split) -> Mapping[str, _few_shot.Group]:
    result = {}
    for subject in SUBJECTS:
      dev = _read(files['dev', subject])
      if len(dev) < _NUM_SHOTS:
        raise ValueError(
          f'{files["dev", subject]} has {len(dev)} questions, not {_NUM_SHOTS}.'
        )
      rows = _read(files[_FOLDERS[split], subject])
      result[subject] = _few_shot.Group(
        head=(
          'The following are multiple choice questions (with answers) about '
          f'{subject.replace("_", " ")}.\n\n'
        ),
        shots=[f'{_query(r)} {r[-1]}\n\n' for r in dev[:_NUM_SHOTS]],
        queries=[_query(r) for r in rows],
        answers=[r[-1] for r in rows],
      )
    return result

  return _few_shot.grouped_task(name, groups, _FOLDERS, letter, accuracy)


def _read(path: pathlib.Path) -> list[list[str]]:
  """Returns rows of question, four choices, and the letter of the answer."""
  with path.open(encoding='utf-8', newline='') as file:
    rows = list(csv.reader(file))
  for number, row in enumerate(rows, start=1):
    if len(row) != 2 + len(_LETTERS) or row[-1] not in _LETTERS:
      raise ValueError(
        f'{path}: row {number} is not a question, four choices and a letter: '
        f'{row}.'
      )
  return rows


def _query(row: Sequence[str]) -> str:
  question, *choices, _ = row
  lines = [f'{c}. {text}' for c, text in zip(_LETTERS, choices, strict=True)]
  return '\n'.join([question, *lines, 'Answer:'])
