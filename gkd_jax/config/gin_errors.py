# SPDX-License-Identifier: Apache-2.0
"""Decides which errors are about a setting, and formats them as one line.

An error about a setting is printed as one line without a traceback. An
exception in the user's own code (divergence, reward, policy, task) keeps its
traceback, because the user needs the file and the line.
"""

import dataclasses
import difflib
import inspect
import pathlib
import re
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping

import gin

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PACKAGE = _ROOT / 'gkd_jax'
# Code that parses and builds a configuration, before a run mode is called.
_BUILDERS = (_PACKAGE / 'main.py', _PACKAGE / 'config')
_LIBRARIES = tuple(
  {
    pathlib.Path(sysconfig.get_path(name)).resolve()
    for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')
  }
)
# Name in the paper or in other programs -> macro.
_OTHER_NAMES = {
  'LAMBDA': 'STUDENT_DATA_FRACTION',
  'LMBDA': 'STUDENT_DATA_FRACTION',
  'EPOCHS': 'TRAIN_STEPS',
  'NUM_EPOCHS': 'TRAIN_STEPS',
  'NUM_TRAIN_EPOCHS': 'TRAIN_STEPS',
  'MAX_STEPS': 'TRAIN_STEPS',
  'LR': 'LEARNING_RATE',
  'SEED': 'RANDOM_SEED',
  'TEMPERATURE': 'SAMPLING_TEMPERATURE',
  'TASK': 'MIXTURE_OR_TASK_NAME',
  'TEACHER': 'TEACHER_CHECKPOINT_PATH',
  'OUTPUT_DIR': 'MODEL_DIR',
  'SAVE_STEPS': 'CHECKPOINT_PERIOD',
  'EVAL_STEPS': 'EVAL_PERIOD',
  'PER_DEVICE_TRAIN_BATCH_SIZE': 'BATCH_SIZE',
  'LOGGING_STEPS': 'experiment.Schedule.log_period',
  'SAVE_TOTAL_LIMIT': 'experiment.Keep.last',
  'GRADIENT_ACCUMULATION_STEPS': 'experiment.Optimization.num_microbatches',
}
_CALL = '\n  In call to configurable '


def keep_exceptions() -> None:
  """Makes gin re-raise the original exception, with its messages as notes.

  By default gin raises a copy, which lacks the cause of the original.
  """
  gin.config.utils.augment_exception_message_and_reraise = _add_note_and_raise


def _add_note_and_raise(exception: BaseException, message: str) -> None:
  exception.add_note(message)
  raise exception


def message_of(error: BaseException) -> str:
  """Returns the message of an error, with the macros that it depends on."""
  calls = [
    note.partition(_CALL)[2]
    for note in getattr(error, '__notes__', ())
    if _CALL in note
  ]
  message = str(error)
  # Messages of gkd_jax name the setting; those of libraries do not.
  if calls and not _is_in(raised_in(error), _PACKAGE):
    message = (
      message.rstrip('.') + '.' + _macros_of(calls[0].split()[0].strip("'"))
    )
  return message


def is_about_a_setting(error: BaseException) -> bool:
  """Whether an error is printed without its traceback.

  True if gkd_jax or gin raised it, or if any library raised it while gin built
  the experiment. False if the traceback contains the user's code; and for a
  TypeError during a run, which is a bug: gkd_jax never raises one on purpose.
  """
  if any(_is_users(file) for e in _chain(error) for file in _files(e)):
    return False
  file = raised_in(error)
  if not isinstance(error, TypeError) and (
    _is_in(file, _PACKAGE) or file.parent.name == 'gin'
  ):
    return True
  ours = {file for file in _files(error) if _is_in(file, _PACKAGE)}
  return all(any(_is_in(file, b) for b in _BUILDERS) for file in ours)


def raised_in(error: BaseException) -> pathlib.Path:
  """Returns the file that raised an exception."""
  return list(_files(error))[-1]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error and its explicit causes."""
  while error is not None:
    yield error
    error = error.__cause__


def _files(error: BaseException) -> Iterator[pathlib.Path]:
  """Yields the file of each stack frame, outermost first."""
  for frame in traceback.extract_tb(error.__traceback__):
    yield pathlib.Path(frame.filename)


def _is_users(file: pathlib.Path) -> bool:
  """Whether a file belongs neither to gkd_jax nor to a library."""
  if file.name.startswith('<') or not file.is_absolute():
    return False  # generated or frozen code
  return not any(_is_in(file, folder) for folder in (_PACKAGE, *_LIBRARIES))


def _is_in(file: pathlib.Path, folder: pathlib.Path) -> bool:
  return file.is_relative_to(folder) or file.resolve().is_relative_to(folder)


def explain(message: str) -> str:
  """Returns a message of gin, shortened, with the closest valid name."""
  # gin may append the whole configuration, or the line number of a flag.
  message = re.split(' in config string: |\n  In bindings string', message)[0]
  config = gin.config_str()
  if match := re.match(r'(\w+)/macro.value set to `%gin.REQUIRED`', message):
    return f'{match[1]} must be set: --gin.{match[1]}=VALUE.'
  if match := re.match(r"No bindings specified for '(.+)/gin.macro'", message):
    message = f'%{match[1]} is not defined.'
    names = re.findall(r'^(\w+) =', config, re.MULTILINE)
  elif match := re.match(r"'(\w+)' was not provided by an import", message):
    message = message.strip()
    if near := _in_modules(match[1], config):
      return f'{message} Did you mean @{near}?'
    names = re.findall(r'^(?:from|import) .*?(\w+)$', config, re.MULTILINE)
  elif match := re.match(r"No configurable matching \D*?'@?([\w./]+)", message):
    names = re.findall(r'^# Parameters for (.+):$', config, re.MULTILINE)
  elif match := re.match(r"Couldn't resolve selector (.+)\.(\w+);", message):
    package = match[1]
    message = f'{package}.{match[2]} does not exist.'
    names = _callables(package)
  elif match := re.match(r".*'(.+)' doesn't have a .* named '(.+)'", message):
    names = parameters(gin.get_configurable(match[1]))
  else:
    return message
  return message + nearest(match[match.lastindex], names)


def _in_modules(name: str, config: str) -> str | None:
  """Returns module.name for the name of a function of an imported module."""
  modules = re.findall(r'^(?:from|import) .*?(\w+)$', config, re.MULTILINE)
  of_name = {}
  for module in modules:
    of_name |= {function: module for function in _callables(module)}
  near = difflib.get_close_matches(name, of_name, n=1, cutoff=0.8)
  return f'{of_name[near[0]]}.{near[0]}' if near else None


def fields() -> set[str]:
  """Returns module.Class.field of the dataclasses of imported modules."""
  imports = re.findall(
    r'^(?:from|import) .*?(\w+)$', gin.config_str(), re.MULTILINE
  )
  return {
    f'{module}.{name}.{field.name}'
    for module in imports
    for name in _callables(module)
    if dataclasses.is_dataclass(part := getattr(_module(module), name))
    for field in dataclasses.fields(part)
  }


def _module(package: str) -> types.ModuleType | None:
  """Returns an imported module by the name that gin files have for it."""
  return next(
    (
      module
      for name, module in sys.modules.items()
      if name == package
      or (name.startswith('gkd_jax.') and name.endswith(f'.{package}'))
    ),
    None,
  )


def _callables(package: str) -> list[str]:
  """Returns the names of an imported module that a gin file can use."""
  module = _module(package)
  return [
    name
    for name, value in (vars(module) if module else {}).items()
    if callable(value)
    and not name.startswith('_')
    and (module.__name__ == package or value.__module__ == module.__name__)
  ]


def parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
  """Returns the parameters of a configurable."""
  if inspect.isclass(function):  # gin wraps the class and hides its signature
    function = function.__init__
  return inspect.signature(function).parameters


def _macros_of(function: str) -> str:
  """Returns a sentence with the macros that set a function's parameters."""
  config = gin.config_str()
  binding = rf'^(?:.*/)?(?:\w+\.)?{function}\.\w+ =\s+%(\w+)'
  given = [
    f'{macro} = {value}'
    for macro in re.findall(binding, config, re.MULTILINE)
    for value in re.findall(rf'^{macro} =\s+(.+)', config, re.MULTILINE)
  ]
  if not given:
    return ''
  return f' {function} gets {", ".join(given)}.'


def meant(name: str) -> str:
  """Returns our name of a setting of the paper or of another program."""
  return _OTHER_NAMES.get(name.upper(), name)


def nearest(name: str, names: Iterable[str], same: Iterable[str] = ()) -> str:
  """Returns ' Did you mean ...?' for an unknown name, else all valid names.

  Args:
    name: that is unknown.
    names: that are valid.
    same: parameters of this name, e.g. sampler.SamplerConfig.top_p; suggested
      unless the name stands for one of `names` in other programs.
  """
  # Compared in capitals, because the user may have typed a macro in lower case.
  of_upper = {other.upper(): other for other in names}
  meant_name = meant(name).upper()
  if meant_name not in of_upper and (parameters := sorted(same)):
    return f' Did you mean {parameters[0]}?'
  near = difflib.get_close_matches(meant_name, list(of_upper), n=1, cutoff=0.6)
  near = [of_upper[other] for other in near]
  if near:
    return f' Did you mean {near[0]}?'
  return f' Valid names: {", ".join(sorted(set(names)))}.' if names else ''
