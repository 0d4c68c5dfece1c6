# SPDX-License-Identifier: Apache-2.0
"""Parses gin files and `--gin.NAME=VALUE` flags; checks names and types."""

import ast
import contextlib
import io
import os
import pathlib
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gin

from gkd_jax.config import annotations, gin_errors

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def expand_flags(args: Sequence[str]) -> list[str]:
  """Rewrites `--gin.NAME=VALUE` to `--gin_bindings=NAME=VALUE`, as T5X does."""
  return [re.sub(r'^--?gin\.', '--gin_bindings=', arg) for arg in args]


def quote_strings(binding: str) -> str:
  """Returns NAME = VALUE with VALUE as gin reads it."""
  name, equals, value = binding.partition('=')
  name, value = name.strip(), value.strip()
  if not equals or not name:
    raise ValueError(f'{binding!r} is not of the form NAME=VALUE.')
  is_reference = re.match(r'[@%]\w|[\[({].*[@%]\w', value)
  if not is_reference:
    try:
      ast.literal_eval(value)
    except (ValueError, SyntaxError):
      value = repr(value)
  return f'{name} = {value}'


def parse(
  files: Sequence[str],
  bindings: Sequence[str],
  search_paths: Sequence[str],
  *,
  needs_files: bool = True,
) -> None:
  """Parses files and bindings, in place of what was parsed before.

  Args:
    files: gin files; later ones override earlier ones.
    bindings: what `quote_strings` returned; they override the files.
    search_paths: folders that files are looked for in, before gkd_jax's own.
    needs_files: if False, settings that name files need not be set.

  Raises:
    ValueError: a file is missing; a name is unknown, misspelt or read by
      nothing; or a value is of another type than its parameter.
  """
  gin_errors.keep_exceptions()
  gin.clear_config()
  # gin would also look inside Python packages, and takes folders for some.
  gin.config._FILE_READERS[:] = [(_open_gin_file, os.path.isfile)]
  folders = [*search_paths, str(_ROOT)]
  for folder in folders:
    gin.add_config_file_search_path(folder)
  for file in files:
    _check_exists(file, folders)
  try:
    gin.parse_config_files_and_bindings(files, [], finalize_config=False)
    # A flag may name whatever the modules that the files import define.
    imports = re.findall(r'^(?:from|import) .+', gin.config_str(), re.MULTILINE)
    for binding in bindings:
      _parse_binding(imports, binding)
    _check_types()
    if not needs_files:
      gin.parse_config(_without_files(gin.config_str()))
    gin.finalize()
  except (
    ValueError,
    SyntaxError,
    tokenize.TokenError,
    AttributeError,
    NameError,
  ) as e:
    is_name = isinstance(e, AttributeError | NameError)
    if is_name and gin_errors.raised_in(e).parent.name != 'gin':
      raise  # an imported module has a bug
    message = '\n'.join([str(e), *getattr(e, '__notes__', ())])
    raise ValueError(gin_errors.explain(message)) from e
  _check_macros_are_read()


def _check_exists(file: str, folders: Sequence[str]) -> None:
  if any((pathlib.Path(folder) / file).is_file() for folder in folders):
    return
  existing = [
    str(path.relative_to(folder))
    for folder in folders
    for path in pathlib.Path(folder).glob('configs/**/*.gin')
  ]
  raise ValueError(
    f'--gin_file={file} does not exist (looked in {", ".join(folders)}).'
    + gin_errors.nearest(file, existing)
  )


def _open_gin_file(path: str) -> io.TextIOBase:
  try:
    file = io.StringIO(pathlib.Path(path).read_text(encoding='utf-8'))
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f'The gin file {path} cannot be read: {e}.') from e
  file.name = path  # for gin's messages
  return file


def _parse_binding(imports: Sequence[str], binding: str) -> None:
  try:
    gin.parse_config([*imports, binding])
  except (SyntaxError, tokenize.TokenError) as e:
    raise ValueError(
      f'--gin.{binding.replace(" = ", "=", 1)} is not a gin value: numbers, '
      'strings, True, False, None, lists, {...}, @names and %MACROS are.'
    ) from e


def _check_types() -> None:
  """Raises ValueError if a value's type is not that of its parameter.

  The result of a call (@name()) is not known yet, and checked where it is used.
  """
  for (_, selector), bindings in gin.config._CONFIG.items():
    if selector == 'gin.macro':
      continue
    parameters = gin_errors.parameters(gin.get_configurable(selector))
    for name, value in bindings.items():
      setting = f'{".".join(selector.split(".")[-2:])}.{name}'
      setting, value = resolve(setting, value)
      if name in parameters and not getattr(value, 'evaluate', False):
        annotations.check(setting, value, parameters[name].annotation)


def _check_macros_are_read() -> None:
  """Raises ValueError for a macro that no setting reads, a misspelt one, say.

  gin accepts any.
  """
  config = gin.config_str()
  defined = set(re.findall(r'^([A-Za-z_]\w*) =', config, re.MULTILINE))
  used = set(re.findall(r'%([A-Za-z_]\w*)', config))
  for name in sorted(defined - used):
    raise ValueError(
      f'{name} changes nothing: no setting of this experiment reads it.'
      + (
        " (SETTINGS and GRID set the macros of a sweep's runs.)"
        if 'sweep.sweep.' in config
        else ''
      )
      + gin_errors.nearest(name, used)
    )


def resolve(setting: str, value: Any) -> tuple[str, Any]:
  """Follows macros: returns the last one's name, and its value."""
  seen = [setting]
  while isinstance(value, gin.config.ConfigurableReference):
    macro = gin.config._CONFIG.get(value.config_key, {})
    if value.selector != 'gin.macro' or 'value' not in macro:
      break
    setting, value = '/'.join(value.scopes), macro['value']
    if setting in seen:
      raise ValueError(f'{setting} is set to itself: %{" = %".join(seen[1:])}.')
    seen.append(setting)
  return setting, value


def macro(name: str) -> Any:
  """Returns a macro's value, None where it is not set."""
  return parameter(f'{name}/gin.macro.value')


def parameter(name: str) -> Any:
  """Returns the value of a parameter, None where it is not set."""
  try:
    value = gin.query_parameter(name)
  except ValueError:
    return None
  return resolve(name, value)[1]


def bound(configurable: str) -> dict[str, Any]:
  """Returns what is bound to a configurable's parameters, macros included."""
  return gin.config._CONFIG.get(('', configurable), {})


def text() -> str:
  """Returns the configuration as it was parsed, macros resolved by name."""
  return gin.config_str()


def operative_text(bindings: Sequence[str]) -> str:
  """Returns the settings that were read, once all parts have been built.

  Raises:
    ValueError: an override from the command line was not among them.
  """
  config = gin.operative_config_str()
  for binding in bindings:
    name = binding.split(' = ', 1)[0]
    if not re.search(rf'^{re.escape(name)} =', config, re.MULTILINE):
      raise ValueError(
        f'{name} changes nothing in this experiment: the parts that are '
        'chosen do not read it (only generalized_jsd reads BETA, say).'
      )
  return config


def _without_files(config: str) -> list[str]:
  """Returns bindings that leave out files: names, and the vocabulary in one."""
  named = re.findall(r'^(\w+_(?:DIR|PATH)) = +%gin\.REQUIRED', config, re.M)
  vocabulary = re.findall(r'^(datasets\.\w+\.vocabulary) =', config, re.M)
  imports = re.findall(r'^(?:from|import) .+', config, re.MULTILINE)
  return [*imports, *(f'{name} = None' for name in named + vocabulary)]


@contextlib.contextmanager
def output_folder(configurable: str, *, may_be_remote: bool) -> Iterator[None]:
  """Checks the folder that a configurable writes to; see `run_folder`.

  Args:
    configurable: its full name; `model_dir` or `output_dir` is the folder.
    may_be_remote: whether it may be at gs://.
  """
  # It imports JAX, which must not happen before the process is set up.
  from gkd_jax.runtime import run_folder

  bindings = bound(configurable)
  for name in bindings.keys() & {'model_dir', 'output_dir'}:
    setting, folder = resolve(name, bindings[name])
    if isinstance(folder, str):
      break
  else:  # it chooses one itself
    yield
    return
  if not may_be_remote:
    run_folder.check_folder(folder, setting)
  with run_folder.explained_write_errors(folder, setting):
    yield


def build(function: Callable) -> Callable:
  """Returns a function that gets the arguments that gin binds to it, if any."""
  try:
    return gin.get_configurable(function)
  except ValueError:  # no file names it
    return function
