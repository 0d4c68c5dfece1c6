# SPDX-License-Identifier: Apache-2.0
"""Reads finished runs: settings, results, and their teacher and initial run.

A run's folder has config.gin, eval_<split>.json, samples_<split>.json and
metrics.jsonl. An evaluation in another folder (--run_mode=eval) belongs to the
run whose checkpoint it names.
"""

import ast
import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gkd_jax.runtime import files, paths, run_folder
from gkd_jax.runtime import metrics as metrics_lib

# Settings that affect neither training nor the final evaluation, and the seed.
IGNORED_SETTINGS = (
  'BEST_METRIC',
  'BEST_MODE',
  'CHECKPOINT_PERIOD',
  'EVALUATOR_NUM_EXAMPLES',
  'EVAL_BATCH_SIZE',
  'EVAL_PERIOD',
  'MODEL_DIR',
  'OVERWRITE',
  'RANDOM_SEED',
  'REMAT',
  'datasets.DatasetConfig.use_cached',
  'experiment.Data.num_shards',
  'experiment.Keep.best_metric',
  'experiment.Keep.best_mode',
  'experiment.Keep.last',
  'experiment.MeshConfig.data',
  'experiment.MeshConfig.model',
  'experiment.Optimization.num_microbatches',
  'experiment.Schedule.log_period',
  'experiment.Schedule.max_skipped_steps',
  'run_folder.Run.overwrite',
)
_INITIAL = 'INITIAL_CHECKPOINT_PATH'
_TEACHER = 'TEACHER_CHECKPOINT_PATH'
_EVALUATION = re.compile(r'eval_\w+\.json')

_LOST = 'data/'
REWARD = 'train/reward'  # of the student's own outputs during training

TaskSplit = tuple[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A finished run, or an evaluated checkpoint that is not of a run.

  Attributes:
    folder: of the run, or of the checkpoint.
    settings: {macro or parameter: value} of config.gin; references to functions
      are texts such as '@divergences.forward_kl'. Empty without a config.gin.
    results: {(task, split): {name: number}}.
    samples: {(task, split): content of samples_<split>.json}.
    curve: lines of metrics.jsonl with validation metrics.
    lost: shares of the training data that tokenizing lost, {metric: share}; see
      `data.tokenization`.
    teacher: folder of the run or checkpoint of its teacher, or of the teacher
      that an evaluation compared it with.
    initial: folder of the run or checkpoint of its initial student.
    teachers: {name: folder} of several teachers; `teacher` is then None.
  """

  folder: pathlib.Path
  settings: Mapping[str, Any]
  results: Mapping[TaskSplit, Mapping[str, float]]
  samples: Mapping[TaskSplit, Mapping[str, Any]]
  curve: Sequence[Mapping[str, float]] = ()
  lost: Mapping[str, float] = dataclasses.field(default_factory=dict)
  teacher: pathlib.Path | None = None
  initial: pathlib.Path | None = None
  teachers: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)

  @property
  def seed(self) -> int | None:
    return self.settings.get('RANDOM_SEED')

  @property
  def task(self) -> str:
    return self.settings.get('MIXTURE_OR_TASK_NAME', 'unknown task')


# --- Finding runs -------------------------------------------------------------


def find(
  patterns: str | Sequence[str],
) -> tuple[list[Run], list[tuple[pathlib.Path, str]]]:
  """Reads the runs that a glob matches.

  Args:
    patterns: one or several paths or globs, see `paths.find`. A matched folder
      that is not a run is replaced by all runs below it.

  Returns:
    The runs, sorted by folder; and (folder, reason) of unused folders.

  Raises:
    ValueError: no folder matches, or no run is done.
  """
  if isinstance(patterns, str):
    patterns = (patterns,)
  for pattern in patterns:
    if not isinstance(pattern, str) or not pattern:
      raise ValueError(f'RUNS must be paths or globs, not {pattern!r}.')
  folders = sorted({f for pattern in patterns for f in _matched(pattern)})
  if not folders:
    raise ValueError(
      f'RUNS matches no run folder: {", ".join(map(repr, patterns))} (from '
      f'{pathlib.Path.cwd()}). Set it to folders that contain a config.gin, or '
      'to their parents; quote the glob, so that the shell does not expand it.'
    )
  loose = [f for f in folders if not (f / 'config.gin').is_file()]
  runs, left_out = {}, []
  for folder in folders:
    if folder in loose:
      continue
    try:
      run = _read(folder)
    except ValueError as e:
      left_out.append((folder, f'it is damaged: {str(e).rstrip(".")}'))
      continue
    if run.results:
      runs[folder] = run
    else:
      left_out.append((folder, _why_unfinished(run)))
  # Evaluations in other folders than the run of their checkpoint.
  for folder in loose:
    try:
      run = _run_of_evaluation(folder, runs)
      runs[run.folder] = _with_evaluation(run, folder)
    except (_NotUsed, ValueError) as e:
      left_out.append((folder, str(e).rstrip('.')))
  if not any(run.results for run in runs.values()):
    reasons = '\n  '.join(f'{folder}: {why}' for folder, why in left_out)
    raise ValueError(f'RUNS: none of these runs is done.\n  {reasons}')
  return [runs[folder] for folder in sorted(runs)], left_out


def _matched(pattern: str) -> Iterator[pathlib.Path]:
  """Yields the folders of runs and of evaluations."""
  for top in paths.find(pattern):
    for folder, below, names in os.walk(top):
      # Checkpoints have many files, none of which is needed here.
      below[:] = [name for name in below if not name.startswith('checkpoint_')]
      if 'config.gin' in names or any(map(_EVALUATION.fullmatch, names)):
        yield pathlib.Path(folder).resolve()


class _NotUsed(Exception):
  """An evaluation cannot be used; the message is the reason."""


def _run_of_evaluation(
  folder: pathlib.Path, runs: Mapping[pathlib.Path, Run]
) -> Run:
  """Returns the run whose checkpoint was evaluated, or a new run for it."""
  for values in _evaluations(folder).values():
    checkpoint = pathlib.Path(values.get('checkpoint', ''))
    of = _without_step(checkpoint)
    if of not in runs:  # the runs may have been moved since
      of = next((f for f in runs if folder.is_relative_to(f)), of)
    if of not in runs and 'task' not in values:
      raise _NotUsed('its eval_<split>.json has no task')
    run = runs.get(of, Run(of, {}, {}, {}))
    own = {r['step'] for r in run.results.values() if 'step' in r}
    step = run_folder.step_of(checkpoint)
    if own and step is not None and step not in own:
      raise _NotUsed(f'is of {checkpoint.name}, not of the end of the run')
    return run
  raise AssertionError(folder)


def _read(folder: pathlib.Path) -> Run:
  settings = read_settings((folder / 'config.gin').read_text(encoding='utf-8'))
  lines = metrics_lib.read(folder)
  run = Run(
    folder,
    settings,
    {},
    {},
    tuple(
      line
      for line in lines
      if any(name.startswith('validation/') for name in line)
    ),
    {
      name: value
      for line in lines
      for name, value in line.items()
      if name.startswith(_LOST)
    },
    _resolve(folder, settings, _TEACHER),
    _resolve(folder, settings, _INITIAL),
    _resolve_several(folder, settings),
  )
  run = _with_evaluation(run, folder)
  steps = settings.get('TRAIN_STEPS')
  if not run.results and run.curve and run.curve[-1]['step'] == steps:
    # No evaluation after training: use the validation metrics of the last step.
    values = {
      name.removeprefix('validation/'): value
      for name, value in run.curve[-1].items()
      if name.startswith('validation/')
    }
    split = settings.get('eval/datasets.DatasetConfig.split', 'validation')
    where = (run.task, split)
    run = dataclasses.replace(run, results={where: {'step': steps, **values}})
  rewards = [line[REWARD] for line in lines if REWARD in line]
  if rewards:  # mean over the last tenth of training
    last = rewards[-max(1, len(rewards) // 10) :]
    of_training = {REWARD: sum(last) / len(last)}
    results = {key: of_training | run.results[key] for key in run.results}
    run = dataclasses.replace(run, results=results)
  return run


def _why_unfinished(run: Run) -> str:
  steps = run.curve[-1]['step'] if run.curve else 0
  return (
    f'not done: evaluated last after step {steps} of '
    f'{run.settings.get("TRAIN_STEPS", "?")}; no eval_<split>.json'
  )


def _with_evaluation(run: Run, folder: pathlib.Path) -> Run:
  """Adds the results of an evaluation; keeps results that the run has."""
  samples = _samples(folder)
  results, all_samples = dict(run.results), dict(run.samples)
  teacher, teachers = run.teacher, run.teachers
  for split, values in _evaluations(folder).items():
    where = (values.get('task', run.task), split)
    numbers = {
      name: value
      for name, value in values.items()
      if metrics_lib.is_number(value) and math.isfinite(value)
    }
    results[where] = numbers | results.get(where, {})
    if split in samples:
      known = all_samples.get(where, {'examples': []})['examples']
      if not any('tokens' in example for example in known):
        all_samples[where] = samples[split]
    compared = values.get('teacher_checkpoint')
    if teacher is None and not teachers and compared is not None:
      if isinstance(compared, Mapping):
        teachers = {
          name: _without_step(pathlib.Path(path))
          for name, path in compared.items()
        }
      else:
        teacher = _without_step(pathlib.Path(compared))
  return dataclasses.replace(
    run,
    results=results,
    samples=all_samples,
    teacher=teacher,
    teachers=teachers,
  )


def _evaluations(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns {split: content} of eval_<split>.json.

  Raises:
    ValueError: a file is damaged.
  """
  found = {}
  for split, path in _files(folder, 'eval'):
    values = found[split] = files.read_json(path)
    texts = {name: values.get(name, '') for name in ('task', 'checkpoint')}
    compared = values.get('teacher_checkpoint') or ''
    # Of several teachers {name: path}.
    texts |= compared if isinstance(compared, dict) else {'teacher': compared}
    for name in texts:
      if '\0' in files.field(texts, name, str, path):
        raise ValueError(f'{path}: {name} has a null character')
    files.field(values, 'step', int, path, 0)
  return found


# Fields of a token of samples_<split>.json; see `evaluate`.
_TOKEN = {
  'text': str,
  'id': int,
  'teacher_text': str,
  'teacher_id': int,
  **dict.fromkeys(
    (
      'kl',
      'student_probability',
      'teacher_probability',
      'teacher_id_probability',
    ),
    float,
  ),
}


def _samples(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns {split: content} of samples_<split>.json.

  Raises:
    ValueError: a file is damaged.
  """
  found = {}
  for split, path in _files(folder, 'samples'):
    values = found[split] = files.read_json(path)
    files.field(values, 'decoding', str, path)
    files.field(values, 'eos_id', int, path)
    for example in _objects(values, 'examples', path):
      names = ['input', 'reference', 'student']
      if 'tokens' in example:
        names.append('teacher')
        for token in _objects(example, 'tokens', path):
          for name, kind in _TOKEN.items():
            if kind is float:
              if not metrics_lib.is_number(token.get(name)):
                raise ValueError(f'{path}: a token has no number {name!r}')
            else:
              files.field(token, name, kind, path)
      for name in names:
        files.field(example, name, str, path)
  return found


def _objects(
  values: Mapping[str, Any], name: str, path: pathlib.Path
) -> list[Mapping[str, Any]]:
  """Returns a field that is a list of objects, checked."""
  objects = files.field(values, name, list, path)
  if not all(isinstance(x, dict) for x in objects):
    raise ValueError(f'{path}: {name} must hold objects {{...}}')
  return objects


def _files(
  folder: pathlib.Path, kind: str
) -> Iterator[tuple[str, pathlib.Path]]:
  """Yields (split, path) of the files <kind>_<split>.json."""
  for path in sorted(folder.glob(f'{kind}_*.json')):
    yield path.stem.removeprefix(f'{kind}_'), path


# --- Settings -----------------------------------------------------------------


def read_settings(config: str) -> dict[str, Any]:
  """Returns {name: value} of a config.gin; non-literals are texts."""
  settings = {}
  # gin puts a long value on the following, indented lines.
  statement = re.compile(
    r'^([\w./]+) = (?:\\\n)?(.+(?:\n[ ].*)*)', re.MULTILINE
  )
  for name, text in statement.findall(config):
    text = text.strip()
    try:
      settings[name] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      settings[name] = text
  for name, value in settings.items():  # a macro may refer to another macro
    if is_macro(name) and isinstance(value, str) and value.startswith('%'):
      settings[name] = settings.get(value[1:], value)
  return settings


def is_macro(name: str) -> bool:
  """Whether a setting is a macro, not a parameter of a function."""
  return name.isupper() and '.' not in name


def _resolve(
  folder: pathlib.Path, settings: Mapping[str, Any], name: str
) -> pathlib.Path | None:
  """Returns the current location of a folder that a setting of a run names.

  The path may be relative to the working directory of the run, and the runs may
  have been moved since. Therefore the location relative to this run is tried
  first.
  """
  path = settings.get(name)
  if path is None or isinstance(path, Mapping):
    return None
  path = _without_step(pathlib.Path(os.path.expanduser(path)))
  candidates = [path]
  own = pathlib.Path(os.path.expanduser(settings.get('MODEL_DIR', '')))
  if own.is_absolute() == path.is_absolute():
    candidates.insert(0, folder / os.path.relpath(path, own))
  found = [c.resolve() for c in candidates if c.exists()]
  return found[0] if found else path


def _resolve_several(
  folder: pathlib.Path, settings: Mapping[str, Any]
) -> dict[str, pathlib.Path]:
  """Returns {name: folder} of several teachers; empty for one."""
  teachers = settings.get(_TEACHER)
  if not isinstance(teachers, Mapping):
    return {}
  found = {
    name: _resolve(folder, {**settings, _TEACHER: path}, _TEACHER)
    for name, path in sorted(teachers.items())
  }
  return {name: path for name, path in found.items() if path is not None}


def _without_step(path: pathlib.Path) -> pathlib.Path:
  """Returns the run's folder for one of its checkpoints."""
  return path if run_folder.step_of(path) is None else path.parent


@functools.lru_cache(maxsize=4096)
def experiment_key(
  run: Run, without: frozenset[str] = frozenset()
) -> frozenset[tuple[str, str]]:
  """Returns a key that is equal for runs that differ only in their seed.

  It contains the settings of the run, and of the runs of its teacher and
  initial student. A teacher or initial student that is not a run contributes
  its path, with the seed masked.

  Args:
    run: any run.
    without: settings to ignore, also of teacher and initial student.
  """
  return _key(run.folder, run.settings, without=without)


def repeat_key(run: Run) -> frozenset[tuple[str, str]]:
  """Returns a key that only runs with equal settings and seeds share."""
  return _key(run.folder, run.settings, with_seeds=True)


def _key(
  folder, settings, with_seeds=False, without=frozenset()
) -> frozenset[tuple[str, str]]:
  free = {*IGNORED_SETTINGS, *without, _INITIAL, _TEACHER}
  if with_seeds:
    free.remove('RANDOM_SEED')
  parts = {
    (name, repr(value if with_seeds else _mask_seed(value, settings)))
    for name, value in settings.items()
    if value is not None and name not in free
  }
  origins = {
    _INITIAL: _resolve(folder, settings, _INITIAL),
    _TEACHER: _resolve(folder, settings, _TEACHER),
    **_resolve_several(folder, settings),
  }
  for name, origin in origins.items():
    if origin is None:
      continue
    path = origin / 'config.gin'
    if path.is_file():
      own = sorted(_key(origin, _read_file(path), with_seeds, without))
    else:
      own = str(origin) if with_seeds else _mask_seed(str(origin), settings)
    parts.add((name, repr(own)))
  if not settings:
    parts.add(('folder', str(folder)))
  return frozenset(parts)


@functools.lru_cache(maxsize=4096)
def _read_file(path: pathlib.Path) -> dict[str, Any]:
  return read_settings(path.read_text(encoding='utf-8'))


def _mask_seed(value: Any, settings: Mapping[str, Any]) -> Any:
  """Masks the run's seed in a path; returns other values unchanged.

  Only a number after 'seed' is masked: 't5_1_1_base' stays the same for seed 1.
  """
  if not isinstance(value, str) or '/' not in value or value.startswith('@'):
    return value
  seed = settings.get('RANDOM_SEED')
  return re.sub(rf'(seed[_=-]?){seed}(?!\d|\.\d)', r'\1*', value, flags=re.I)


# --- Methods ------------------------------------------------------------------


# Policy -> the method that it is known by.
_METHODS = {
  'interleaved': 'SKD',
  'mixed_tokens': 'mixed tokens',
  'corrected': 'SCRG',
  'paired': 'DistiLLM-2',
  'replay': 'DistiLLM',
}


def _method_of_policy(settings: Mapping[str, Any]) -> str | None:
  """Returns the method of a policy that is no mixture; None for the others."""
  policy = str(settings.get('POLICY')).strip('@()').rpartition('.')[2]
  fraction = settings.get('STUDENT_DATA_FRACTION')
  if policy == 'mixture' and isinstance(fraction, str):
    return 'GKD λ(step)'
  return _METHODS.get(policy)


def student_data_fraction(settings: Mapping[str, Any]) -> float | None:
  """Returns lambda.

  None if it changes during training, if models write outputs together, or if
  the teacher writes outputs during training.
  """
  fraction = settings.get('STUDENT_DATA_FRACTION')
  policy = str(settings.get('POLICY'))
  if _method_of_policy(settings) is not None:
    return None
  if 'mixture' in policy and fraction is not None:
    return float(fraction)
  if 'teacher' in policy:
    return None
  return 1.0 if 'student' in policy else 0.0


def divergence(settings: Mapping[str, Any]) -> str | None:
  """Returns the name of the divergence, e.g. 'JSD(0.9)'; None without one."""
  reference = settings.get('DIVERGENCE')
  if reference is None or not settings.get('DIVERGENCE_WEIGHT', 1.0):
    return None
  name = reference.strip('@()').rpartition('.')[2]
  if name == 'generalized_jsd':
    return f'JSD({settings.get("BETA")})'
  words = {'kl': 'KL', 'taid': 'TAID', 'todi': 'ToDi'}
  return ' '.join(words.get(word, word) for word in name.split('_'))


def alpha(settings: Mapping[str, Any]) -> float | None:
  """Returns alpha of the paper's Eq. 5; None without a reward."""
  reward_weight = settings.get('REWARD_WEIGHT')
  if settings.get('ALPHA') is not None:
    return float(settings['ALPHA'])
  if not isinstance(reward_weight, int | float) or not reward_weight:
    return None
  divergence_weight = settings.get('DIVERGENCE_WEIGHT', 1.0)
  return divergence_weight / (divergence_weight + reward_weight)


def method(run: Run) -> str:
  """Returns the name of a run's method in the paper."""
  settings = run.settings
  if not settings:
    return run.folder.name
  fraction, of = student_data_fraction(settings), divergence(settings)
  weight = alpha(settings)
  if weight is not None:
    if of is None or weight == 0.0:
      return 'RL'
    # The paper's RLEF*: regularized towards the initial student.
    own = run.initial is not None and run.teacher == run.initial
    return f'{"RLEF*" if own else "RL+GKD"} α={weight:g}, {of}'
  if 'minillm' in str(settings.get('methods.Method.credit')):
    return 'MiniLLM'
  by_teacher = settings.get('TRAIN_ON_PREDICTIONS') or fraction is None
  if known := _method_of_policy(settings):
    return known if of is None else f'{known}, {of}'
  if of is None:
    return 'SeqKD' if by_teacher else 'SFT'
  if fraction in (0.0, None):
    name = 'supervised KD' if of == 'forward KL' else f'supervised KD, {of}'
  elif fraction == 1.0:
    name = f'on-policy GKD, {of}'
  else:
    paper = {'forward KL': 'ImitKD', 'total variation': 'f-distill'}
    name = f'GKD λ={fraction:g}, {of}'
    if fraction == 0.5:
      name = paper.get(of, name)
  if by_teacher and fraction != 1.0:
    name += " on the teacher's outputs"
  if likelihood := settings.get('LIKELIHOOD_WEIGHT'):
    name += f' + {likelihood:g} likelihood'
  if run.teachers:
    how = str(settings.get('methods.Method.teacher', '')).strip('@()')
    how = f'{how.rpartition(".")[2]} teachers'.strip()
    name += f', {how} {", ".join(run.teachers)}'
  return name
