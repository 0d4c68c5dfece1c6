# SPDX-License-Identifier: Apache-2.0
"""Sections (task and split) of groups (runs that differ only in the seed).

The name of a group is its method; groups with the same method also have their
distinct settings in the name.
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gkd_jax.report import runs as runs_lib
from gkd_jax.report import tables
from gkd_jax.report.runs import Run
from gkd_jax.runtime import metrics as metrics_lib

ROLES = ('teacher', 'initial student', 'method')
KL = 'on_student_outputs/reverse_kl'  # KL(student || teacher)
# These depend on the model's width, EMB_DIM.
_OF_WIDTH = ('NUM_HEADS', 'HEAD_DIM', 'MLP_DIM')
_DIVERGENCES = ('forward KL', 'JSD', 'reverse KL', 'total variation')


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Runs that differ only in the seed.

  Attributes:
    name: unique in the section.
    role: one of ROLES.
    method: its name in the paper.
    runs: one per seed; empty for a teacher that was only evaluated beside its
      students.
    means: {metric: mean over the runs}, including 'gap_closed', the fraction of
      the gap between initial student and teacher.
  """

  name: str
  role: str
  method: str
  runs: tuple[Run, ...]
  means: Mapping[str, tables.Mean]

  @property
  def settings(self) -> Mapping[str, Any]:
    return self.runs[0].settings if self.runs else {}


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
  """All results on one split of one task.

  Attributes:
    task: name of the task.
    split: of the task.
    metric: the main metric, e.g. 'greedy/wer'.
    mode: 'min' or 'max', which is better; None: unknown.
    groups: teachers, initial students, methods, in the order of the tables.
    also_run: methods whose tuned settings are not the best on validation.
    notes: for readers, on the selection of groups.
    tuned: macros in which groups of `also_run` differ from one of `groups`.
  """

  task: str
  split: str
  metric: str
  mode: str | None
  groups: tuple[Group, ...]
  also_run: tuple[Group, ...] = ()
  notes: tuple[str, ...] = ()
  tuned: tuple[str, ...] = ()

  @property
  def methods(self) -> list[Group]:
    return self.of_role('method')

  def of_role(self, role: str) -> list[Group]:
    return [group for group in self.groups if group.role == role]

  def values(self, run: Run) -> Mapping[str, float]:
    """Returns the metrics of a run in this section."""
    return run.results.get((self.task, self.split), {})

  def reference(self, run: Run, role: str, metric: str) -> float | None:
    """Returns a metric of a run's teacher or initial student; None: unknown."""
    folder = run.teacher if role == 'teacher' else run.initial
    if folder is None:
      return None
    for other in self.runs:
      if other.folder == folder and metric in self.values(other):
        return self.values(other)[metric]
    if role == 'teacher':  # evaluations of its students may have it
      for other in self.runs:
        if other.teacher == folder:
          if (value := self.values(other).get(f'teacher/{metric}')) is not None:
            return value
    return None

  def gap_closed(self, run: Run, role: str) -> float | None:
    """Returns (initial - after) / (initial - teacher) on the main metric."""
    after = self.values(run).get(self.metric)
    initial = self.reference(run, 'initial student', self.metric)
    teacher = self.reference(run, 'teacher', self.metric)
    if role != 'method' or None in (after, initial, teacher):
      return None
    gap = initial - teacher
    return (initial - after) / gap if gap else None

  @property
  def runs(self) -> list[Run]:
    groups = (*self.groups, *self.also_run)
    return [run for group in groups for run in group.runs]

  def decodings(self) -> list[str]:
    """Returns the decodings that have the main metric, the main one first."""
    main, _, base = self.metric.rpartition('/')
    there = {
      name.rpartition('/')[0]: None
      for group in self.groups
      for name in group.means
      if name.rpartition('/')[2] == base and not name.startswith('teacher/')
    }
    return sorted(there, key=lambda name: (name != main, name))

  def usual_decodings(self) -> list[str]:
    """Returns `decodings` without sampling at temperatures other than 1."""
    usual = {}
    for name in self.decodings():
      temperature = tables.temperature_of(name)
      if temperature in (None, 1.0):
        # 'sampled' and 'sampled_1.0' are the same decoding: keep one.
        usual.setdefault('sampled' if temperature else name, name)
    return list(usual.values())


# --- From runs to sections ----------------------------------------------------


def make(
  all_runs: Sequence[Run],
  metric: str | None = None,
  mode: str | None = None,
  tuned: Sequence[str] = ('LEARNING_RATE',),
) -> list[Section]:
  """Sorts runs into sections and groups.

  Args:
    all_runs: finished runs.
    metric: the main metric, e.g. 'greedy/wer' or 'wer'; None: BEST_METRIC of
      the runs, or their first metric.
    mode: 'min' or 'max'; None: BEST_MODE of the runs, or else
      `metrics.better`.
    tuned: macros. Of groups that differ only in these, the best group on the
      validation split represents all.

  Raises:
    ValueError: no run has the metric.
  """
  where = {key: None for run in all_runs for key in run.results}
  measured = {
    name.rpartition('/')[2] if '/' not in (metric or '') else name
    for run in all_runs
    for values in run.results.values()
    for name in values
  }
  if metric is not None and metric not in measured:
    raise ValueError(
      f'No run has METRIC {metric!r}. Their metrics: '
      f'{", ".join(sorted(measured))}.'
    )
  return [
    _section(
      [run for run in all_runs if key in run.results], key, metric, mode, tuned
    )
    for key in sorted(where)
  ]


def _section(runs, where, metric, mode, tuned) -> Section:
  task, split = where
  metric, mode = _main_metric(runs, where, metric, mode)
  section = Section(task, split, metric, mode, ())
  runs, notes = _without_repeats(runs)
  by_folder = _roles(runs)
  by_kind = collections.defaultdict(list)
  for run in runs:
    by_kind[runs_lib.experiment_key(run)].append(run)
  # Groups that differ only in tuned settings share a name at first.
  shared = collections.defaultdict(list)
  for kind, of_kind in by_kind.items():
    # All seeds have the role of the one with the foremost role.
    role = min((by_folder[run.folder] for run in of_kind), key=ROLES.index)
    rest = frozenset(part for part in kind if part[0] not in tuned)
    shared[role, rest].append(tuple(of_kind))
  names = unique_names(
    [
      (runs_lib.method(kinds[0][0]) if role == 'method' else role, kinds[0][0])
      for (role, _), kinds in shared.items()
    ],
    ignore=tuned,
  )
  groups, also_run, tuned_is_known = [], [], True
  for name, ((role, _), kinds) in zip(names, shared.items(), strict=True):
    best = _best_on_validation(kinds, metric, mode)
    if len(kinds) > 1:
      longer = unique_names([(name, kind[0]) for kind in kinds])
      if best is None:
        tuned_is_known = False
        notes.append(
          f'{name}: shows all {len(kinds)} settings of {", ".join(tuned)}, '
          'because no validation metric can select one.'
        )
      else:
        words = longer[kinds.index(best)].removeprefix(f'{name}, ')
        notes.append(
          f'{name}: shows {words}, the best of {len(kinds)} on the validation '
          'split.'
        )
    for i, kind in enumerate(kinds):
      is_best = kind is best or len(kinds) == 1
      group = Group(
        name if is_best else longer[i],
        role,
        runs_lib.method(kind[0]),
        kind,
        {},
      )
      (groups if is_best or best is None else also_run).append(group)
  groups.sort(key=_sort_key)
  also_run.sort(key=_sort_key)
  section = dataclasses.replace(section, groups=(*groups, *also_run))
  groups, also_run = (
    tuple(
      dataclasses.replace(group, means=_means(section, group)) for group in some
    )
    for some in (groups, also_run)
  )
  if not any(group.role == 'teacher' for group in groups):
    groups = (*_teacher_from_students(section), *groups)
  return dataclasses.replace(
    section,
    groups=groups,
    also_run=also_run,
    notes=tuple(notes),
    tuned=tuple(tuned) if tuned_is_known else (),
  )


def _main_metric(runs, where, metric, mode) -> tuple[str, str | None]:
  """Returns the main metric of a section and its mode ('min' or 'max')."""
  names = {
    name: None
    for run in runs
    for name in run.results[where]
    if '/' in name and not name.startswith('teacher/')
  }
  votes = collections.Counter(
    (run.settings.get('BEST_METRIC'), run.settings.get('BEST_MODE'))
    for run in runs
    if run.settings.get('BEST_METRIC') in names
  )
  best, best_mode = votes.most_common(1)[0][0] if votes else (None, None)
  if metric is None:
    metric = best or next(iter(names))
  elif metric not in names:  # 'wer': greedy, or the first decoding that has it
    having = [n for n in names if n.rpartition('/')[2] == metric]
    if not having:  # only other tasks have it
      metric = best or next(iter(names))
    else:
      metric = next((n for n in having if n.startswith('greedy/')), having[0])
  base = metric.rpartition('/')[2]
  if mode is None:
    is_best = best is not None and best.rpartition('/')[2] == base
    mode = (best_mode if is_best else None) or metrics_lib.better(base)
  return metric, mode


def _without_repeats(runs) -> tuple[list[Run], list[str]]:
  """Drops runs with the same settings and seed as another run."""
  first: dict[Any, pathlib.Path] = {}
  stands_for = {
    run.folder: first.setdefault(runs_lib.repeat_key(run), run.folder)
    for run in runs
    if run.settings
  }
  repeats = {a: b for a, b in stands_for.items() if a != b}
  # Runs that started from a dropped run refer to the kept run instead.
  kept = [
    dataclasses.replace(
      run,
      initial=repeats.get(run.initial, run.initial),
      teacher=repeats.get(run.teacher, run.teacher),
      teachers={n: repeats.get(x, x) for n, x in run.teachers.items()},
    )
    for run in runs
    if run.folder not in repeats
  ]
  notes = [f'{a} repeats {b} and is ignored.' for a, b in repeats.items()]
  return kept, notes


def _roles(runs: Sequence[Run]) -> dict[Any, str]:
  """Returns {folder: role}. A run that starts from a student is a method."""
  teachers = {x for run in runs for x in (run.teacher, *run.teachers.values())}
  started_from = {
    run.initial
    for run in runs
    if run.folder not in teachers or run.teacher is not None or run.teachers
  } - {None}
  roles = {}
  for run in runs:
    roles[run.folder] = 'method'
    if run.folder in started_from and run.initial not in started_from:
      roles[run.folder] = 'initial student'
    elif run.folder in teachers:
      roles[run.folder] = 'teacher'
  return roles


def _best_on_validation(kinds, metric, mode):
  """Returns the runs with the best mean of the last validation metric.

  The mean is over the seeds that all settings share, if any, because seeds
  differ in difficulty.
  """
  if len(kinds) == 1:
    return kinds[0]
  shared = set.intersection(*({run.seed for run in kind} for kind in kinds))
  scores = [
    tables.mean(
      [
        last_on_validation(run, metric)
        for run in kind
        if not shared or run.seed in shared
      ]
    )
    for kind in kinds
  ]
  if mode is None or None in scores:
    return None
  best = min if mode == 'min' else max
  return kinds[best(range(len(kinds)), key=lambda i: scores[i].value)]


def last_on_validation(run: Run, metric: str) -> float | None:
  """Returns the last value of a metric on the validation split."""
  lines = [line for line in run.curve if f'validation/{metric}' in line]
  return lines[-1][f'validation/{metric}'] if lines else None


def _means(section: Section, group: Group) -> dict[str, tables.Mean]:
  rows = []
  for run in group.runs:
    values = section.values(run)
    rows.append({**values, 'gap_closed': section.gap_closed(run, group.role)})
  names = {name: None for row in rows for name in row}
  means = {name: tables.mean([row.get(name) for row in rows]) for name in names}
  return {name: mean for name, mean in means.items() if mean is not None}


def _teacher_from_students(section: Section) -> list[Group]:
  """Returns teachers that are not runs of the section, from their students."""
  found = {}
  for group in section.groups:
    for run in group.runs:
      origins = {f'teacher/{name}/': x for name, x in run.teachers.items()}
      for prefix, folder in (origins or {'teacher/': run.teacher}).items():
        values = {
          name.removeprefix(prefix): value
          for name, value in section.values(run).items()
          if name.startswith(prefix)
        }
        if values:
          found.setdefault(folder, values)
  return [
    Group(
      'teacher' if len(found) == 1 else f'teacher {folder.name}',
      'teacher',
      'teacher',
      (),
      {name: tables.mean([value]) for name, value in values.items()},
    )
    for folder, values in found.items()
  ]


# --- Names and order ----------------------------------------------------------


def unique_names(
  named: Sequence[tuple[str, Run]], ignore: Sequence[str] = ()
) -> list[str]:
  """Returns unique names: appends differing settings to equal names.

  Args:
    named: (name, a run with the settings).
    ignore: settings that are not appended.
  """
  alike = collections.defaultdict(list)
  for i, (name, _) in enumerate(named):
    alike[name].append(i)
  names = [name for name, _ in named]
  for name, places in alike.items():
    if len(places) == 1:
      continue
    settings = [_named_settings(named[i][1]) for i in places]
    every = sorted({key for s in settings for key in s} - {*ignore})
    differ = [
      key for key in every if len({repr(s.get(key)) for s in settings}) > 1
    ]
    if 'EMB_DIM' in differ:
      differ = [key for key in differ if key not in _OF_WIDTH]
    count = collections.Counter()
    for i, s in zip(places, settings, strict=True):
      words = [_describe_setting(key, s.get(key)) for key in differ[:3]]
      names[i] = ', '.join([name, *filter(None, words)])
      count[names[i]] += 1
      if count[names[i]] > 1:
        names[i] += f' #{count[names[i]]}'
  return names


def _named_settings(run: Run) -> dict[str, Any]:
  """Returns the settings of a run that may appear in its name."""
  ignored = {
    *runs_lib.IGNORED_SETTINGS,
    'INITIAL_CHECKPOINT_PATH',
    'TEACHER_CHECKPOINT_PATH',
  }
  settings = {
    name: value
    for name, value in run.settings.items()
    if runs_lib.is_macro(name) and name not in ignored
  }
  settings['from'] = run.initial and run.initial.name
  settings['teacher'] = run.teacher and run.teacher.name
  if run.teachers:
    settings['teacher'] = ' and '.join(
      f'{name} ({folder.name})' for name, folder in run.teachers.items()
    )
  if not run.settings:
    settings['folder'] = str(run.folder)
  return settings


def _describe_setting(name: str, value: Any) -> str:
  """Returns a setting in words."""
  if name == 'TRAIN_NUM_EXAMPLES':
    return 'all examples' if value is None else f'{value:,} examples'
  if name == 'from' and value is None:
    return 'from scratch'
  if value is None:
    return ''
  forms = {
    'BATCH_SIZE': 'batches of {}',
    'CALCULATOR': 'calculator: {}',
    'EMB_DIM': 'width {}',
    'LEARNING_RATE': 'learning rate {:g}',
    'SAMPLING_TEMPERATURE': 'sampled at T={:g}',
    'SIZE': '{}',
    'TEACHER_TEMPERATURE': 'teacher at T={:g}',
    'TRAIN_STEPS': '{:,} steps',
    'folder': '{}',
    'from': 'from {}',
    'teacher': 'teacher {}',
  }
  return forms.get(name, f'{name}={{}}').format(value)


def divergence_order(name: str) -> tuple[int, str]:
  """Sort key: the paper's order of divergences; JSD by beta."""
  kind = name.partition('(')[0]
  place = _DIVERGENCES.index(kind) if kind in _DIVERGENCES else 9
  return place, name


def _sort_key(group: Group) -> tuple:
  """Sort key of the tables: role, policy, divergence, amounts."""
  settings = group.settings
  divergence = runs_lib.divergence(settings)
  fraction = runs_lib.student_data_fraction(settings)
  alpha = runs_lib.alpha(settings)
  return (
    ROLES.index(group.role),
    alpha is not None,
    divergence is not None,
    group.method == 'SeqKD',
    fraction or 0.0,
    divergence_order(divergence or ''),
    alpha or 0.0,
    settings.get('TRAIN_NUM_EXAMPLES') or math.inf,
    group.name,
  )


# --- Groups that differ only in some settings ---------------------------------


def strata(
  groups: Sequence[Group],
  vary: Sequence[str],
  name: Callable[[Group], str],
  before: Sequence[str] = (),
) -> dict[str, list[Group]]:
  """Collects groups that differ only in some settings.

  Args:
    groups: to collect.
    vary: macros that may differ.
    name: group -> name of its stratum.
    before: those of `vary` that may also differ in the initial student and the
      teacher.

  Returns:
    {unique name: groups}.
  """
  together = collections.defaultdict(list)
  for group in groups:
    together[name(group), other_settings(group, vary, before)].append(group)
  names = unique_names(
    [(name, some[0].runs[0]) for (name, _), some in together.items()],
    ignore=vary,
  )
  return dict(zip(names, together.values(), strict=True))


def other_settings(
  group: Group, vary: Sequence[str], before: Sequence[str] = ()
) -> frozenset[tuple[str, str]]:
  """Returns the settings of a group without some macros.

  With DIVERGENCE the parameters of divergences are also removed.

  Args:
    group: of runs.
    vary: macros to remove.
    before: those of `vary` to remove also from the settings of the initial
      student and the teacher.
  """
  of_divergence = 'DIVERGENCE' in vary
  return frozenset(
    (name, value)
    for name, value in runs_lib.experiment_key(group.runs[0], frozenset(before))
    if name not in vary
    and not (of_divergence and name.startswith('divergences.'))
  )
