# SPDX-License-Identifier: Apache-2.0
"""Which errors are about a setting, and what they print in one line.

An error about a setting is one line without a traceback. An exception in code
that is neither ours nor a library's, such as a user's divergence, reward,
policy or task, keeps its traceback: the file and the line are the message.
"""

import difflib
import inspect
import pathlib
import re
import sys
import sysconfig
import traceback
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
# What the paper calls a setting -> what it is called here.
_FROM_PAPER = {'LAMBDA': 'STUDENT_DATA_FRACTION'}
_CALL = '\n  In call to configurable '


def keep_exceptions() -> None:
  """Makes gin raise a configurable's own exception, with its calls as notes.

  gin raises a copy instead, which lacks what caused it.
  """
  gin.config.utils.augment_exception_message_and_reraise = _add_note_and_raise


def _add_note_and_raise(exception: BaseException, message: str) -> None:
  exception.add_note(message)
  raise exception


def message_of(error: BaseException) -> str:
  """Returns an error's message as one line for whoever set the setting."""
  calls = [
    note.partition(_CALL)[2]
    for note in getattr(error, '__notes__', ())
    if _CALL in note
  ]
  message = str(error)
  # Our messages name the setting; a library's do not know of gin.
  if calls and not _is_in(raised_in(error), _PACKAGE):
    message = (
      message.rstrip('.') + '.' + _macros_of(calls[0].split()[0].strip("'"))
    )
  return message


def is_about_a_setting(error: BaseException) -> bool:
  """Whether an error needs no traceback.

  True if our code or gin raised it on purpose, or any library while gin builds
  the experiment, before the run itself has begun. False if a user's code is
  involved, and for a TypeError in a run, which we never raise on purpose.
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
  """Yields an error, and those that it was raised from."""
  while error is not None:
    yield error
    error = error.__cause__


def _files(error: BaseException) -> Iterator[pathlib.Path]:
  """Yields the file of each frame, the outermost first."""
  for frame in traceback.extract_tb(error.__traceback__):
    yield pathlib.Path(frame.filename)


def _is_users(file: pathlib.Path) -> bool:
  """Whether a frame's file is neither ours nor a library's."""
  if file.name.startswith('<') or not file.is_absolute():
    return False  # generated or frozen code
  return not any(_is_in(file, folder) for folder in (_PACKAGE, *_LIBRARIES))


def _is_in(file: pathlib.Path, folder: pathlib.Path) -> bool:
  return file.is_relative_to(folder) or file.resolve().is_relative_to(folder)


def explain(message: str) -> str:
  """Returns gin's own message, shortened, and the nearest right name."""
  # gin may add the whole configuration, and the line among all flags.
  message = re.split(' in config string: |\n  In bindings string', message)[0]
  config = gin.config_str()
  if match := re.match(r'(\w+)/macro.value set to `%gin.REQUIRED`', message):
    return f'{match[1]} must be set: --gin.{match[1]}=VALUE.'
  if match := re.match(r"No bindings specified for '(.+)/gin.macro'", message):
    message = f'%{match[1]} is not defined.'
    names = re.findall(r'^(\w+) =', config, re.MULTILINE)
  elif match := re.match(r"'(\w+)' was not provided by an import", message):
    names = re.findall(r'^(?:from|import) .*?(\w+)$', config, re.MULTILINE)
  elif match := re.match(r"No configurable matching \D*?'@?([\w./]+)", message):
    names = re.findall(r'^# Parameters for (.+):$', config, re.MULTILINE)
  elif match := re.match(r"Couldn't resolve selector (.+)\.(\w+);", message):
    package = match[1]
    message = f'There is no {package}.{match[2]}.'
    names = _callables(package)
  elif match := re.match(r".*'(.+)' doesn't have a .* named '(.+)'", message):
    names = parameters(gin.get_configurable(match[1]))
  else:
    return message
  return message + nearest(match[match.lastindex], names)


def _callables(package: str) -> list[str]:
  """Returns what a module that gin imported offers for a configuration."""
  module = next(
    (
      module
      for name, module in sys.modules.items()
      if name == package
      or (name.startswith('gkd_jax.') and name.endswith(f'.{package}'))
    ),
    None,
  )
  return [
    name
    for name, value in (vars(module) if module else {}).items()
    if callable(value)
    and not name.startswith('_')
    and (module.__name__ == package or value.__module__ == module.__name__)
  ]


def parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
  """Returns what a configurable takes."""
  if inspect.isclass(function):  # gin hides what the class is called with
    function = function.__init__
  return inspect.signature(function).parameters


def _macros_of(function: str) -> str:
  """Returns which macros a function's arguments come from, and their values."""
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


def nearest(name: str, names: Iterable[str]) -> str:
  """Returns ' Did you mean ...?' for a name that does not exist."""
  # Macros are in capitals, whatever was typed.
  of_upper = {other.upper(): other for other in names}
  meant = _FROM_PAPER.get(name.upper(), name.upper())
  near = difflib.get_close_matches(meant, list(of_upper), n=1, cutoff=0.5)
  near = [of_upper[other] for other in near]
  if near:
    return f' Did you mean {near[0]}?'
  return f' There are: {", ".join(sorted(set(names)))}.' if names else ''
