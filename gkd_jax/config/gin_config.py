# SPDX-License-Identifier: Apache-2.0
"""Parses gin files and `--gin.NAME=VALUE` flags, and checks names and types."""

import ast
import contextlib
import io
import os
import pathlib
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import gin

from gkd_jax.config import annotations, gin_errors
from gkd_jax.runtime import paths


def expand_flags(args: Sequence[str]) -> list[str]:
  """Rewrites `--gin.NAME=VALUE` to `--gin_bindings=NAME=VALUE`, as T5X does."""
  return [re.sub(r'^--?gin\.', '--gin_bindings=', arg) for arg in args]


def quote_strings(binding: str) -> str:
  """Returns NAME = VALUE; a VALUE that is no gin literal becomes a string."""
  name, equals, text = binding.partition('=')
  # A file name may begin or end with spaces: NAME = VALUE has others.
  if name != name.rstrip():
    text = text.strip()
  name, value = name.strip(), text.strip()
  if not equals or not name:
    raise ValueError(f'{binding!r} is not of the form NAME=VALUE.')
  is_reference = re.match(r'[@%]\w|[\[({].*[@%]\w', value)
  if not is_reference:
    try:
      ast.literal_eval(value)
    except (ValueError, SyntaxError):
      value = repr(text)
  return f'{name} = {value}'


def parse(
  files: Sequence[str],
  bindings: Sequence[str],
  search_paths: Sequence[str],
  *,
  needs_files: bool = True,
) -> None:
  """Parses files and bindings. Replaces the previous configuration.

  Args:
    files: gin files; later files override earlier ones.
    bindings: results of `quote_strings`; they override the files.
    search_paths: folders to search for files, before `paths.gin_folders`.
    needs_files: if False, settings that name files may be unset.

  Raises:
    ValueError: a file is missing; a name is unknown; no setting reads a macro;
      two bindings set one parameter; or a value does not have the type of its
      parameter.
  """
  gin_errors.keep_exceptions()
  gin.clear_config()
  # gin would also search Python packages, and would treat folders as packages.
  gin.config._FILE_READERS[:] = [(_open_gin_file, os.path.isfile)]
  files = [os.path.expanduser(file) for file in files]
  folders = [*map(os.path.expanduser, search_paths), *paths.gin_folders()]
  for folder in folders:
    gin.add_config_file_search_path(folder)
  for file in files:
    _check_exists(file, folders)
  try:
    gin.parse_config_files_and_bindings(files, [], finalize_config=False)
    # A flag may use the names of modules that the files import.
    imports = re.findall(r'^(?:from|import) .+', gin.config_str(), re.MULTILINE)
    _parse_overrides(imports, bindings)
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
  file.name = path  # gin's error messages read it
  return file


_Key = tuple[tuple[str, str], str]  # ((scope, configurable), parameter)


class _Override(NamedTuple):
  """A `--gin.NAME=VALUE` flag."""

  flag: str
  value: Any


def _parse_overrides(imports: Sequence[str], bindings: Sequence[str]) -> None:
  """Adds overrides to the configuration of the files.

  If a name is repeated, as in a script's `--gin.X=1 "$@"`, the last value is
  used, and this is printed.

  Raises:
    ValueError: a parameter and the macro that sets it are given different
      values.
  """
  config = gin.config._CONFIG
  of_files = {key: dict(values) for key, values in config.items()}
  given: dict[_Key, _Override] = {}
  try:
    for binding in bindings:
      # Alone, because a parameter may have several names: Schedule.seed and
      # experiment.Schedule.seed.
      config.clear()
      _parse_binding(imports, binding)
      for key, value in _flat(config).items():
        override = _Override(_flag(binding), value)
        before = given.get(key)
        if before is not None and before.value != value:
          print(f'{override.flag} replaces {before.flag}.', file=sys.stderr)
        given[key] = override
  finally:
    config.clear()
    config.update(of_files)
  for key, override in given.items():
    macro = _macro_of(of_files, key)
    if macro in given and given[macro].value != override.value:
      raise ValueError(
        f'{given[macro].flag} and {override.flag} set the same parameter. '
        'Remove one of them.'
      )
  for (key, name), override in given.items():
    config.setdefault(key, {})[name] = override.value


def _flat(
  config: Mapping[tuple[str, str], Mapping[str, Any]],
) -> dict[_Key, Any]:
  return {
    (key, name): value
    for key, values in config.items()
    for name, value in values.items()
  }


def _macro_of(config: Mapping[tuple[str, str], Any], key: _Key) -> _Key | None:
  """Returns the macro that sets a parameter; None if it has a value.

  A macro that another one sets is a setting of its own, with a default.
  """
  configurable, name = key
  value = config.get(configurable, {}).get(name)
  is_reference = isinstance(value, gin.config.ConfigurableReference)
  if configurable[1] == 'gin.macro' or not is_reference:
    return None
  return value.config_key, 'value'


def _parse_binding(imports: Sequence[str], binding: str) -> None:
  try:
    gin.parse_config([*imports, binding])
  except (SyntaxError, tokenize.TokenError) as e:
    raise ValueError(
      f'{_flag(binding)} is not a gin value. Use a '
      'number, string, True, False, None, list, {...}, @name or %MACRO.'
    ) from e


def _flag(binding: str) -> str:
  return f'--gin.{binding.replace(" = ", "=", 1)}'


def _check_types() -> None:
  """Raises ValueError if a value does not have the type of its parameter.

  Results of calls (@name()) are not known yet. Their users check them.
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
  """Raises ValueError for a macro that no setting reads, e.g. a misspelt one.

  gin itself accepts any macro.
  """
  config = gin.config_str()
  defined = set(re.findall(r'^([A-Za-z_]\w*) =', config, re.MULTILINE))
  used = set(re.findall(r'%([A-Za-z_]\w*)', config))
  for name in sorted(defined - used):
    raise ValueError(
      f'{name} has no effect: no setting of this experiment reads it.'
      + (
        " (SETTINGS and GRID set the macros of a sweep's runs.)"
        if 'sweep.sweep.' in config
        else ''
      )
      + gin_errors.nearest(name, used, _parameters_named(name))
    )


def _parameters_named(name: str) -> set[str]:
  """Returns the parameters of this name, e.g. experiment.Keep.last.

  The name may have that of the class, as in TEACHER_DTYPE.
  """
  meant = gin_errors.meant(name).removeprefix('experiment.').lower()
  words = sorted(re.split('[._]', meant))
  bound = {
    f'{".".join(selector.split(".")[-2:])}.{parameter}'
    for _, selector in gin.config._CONFIG
    if selector != 'gin.macro'
    for parameter in gin_errors.parameters(gin.get_configurable(selector))
  }
  return {
    setting
    for setting in bound | gin_errors.fields()
    for _, part, parameter in [setting.rsplit('.', 2)]
    if parameter == name.lower()
    or sorted([part.lower(), *parameter.split('_')]) == words
  }


def resolve(setting: str, value: Any) -> tuple[str, Any]:
  """Follows macros: returns the name of the last macro and its value."""
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
  """Returns the value of a macro; None if it is not set."""
  return parameter(f'{name}/gin.macro.value')


def parameter(name: str) -> Any:
  """Returns the value of a parameter; None if it is not set."""
  try:
    value = gin.query_parameter(name)
  except ValueError:
    return None
  return resolve(name, value)[1]


def bound(configurable: str) -> dict[str, Any]:
  """Returns the bindings of a configurable; macros are not resolved."""
  return gin.config._CONFIG.get(('', configurable), {})


def text() -> str:
  """Returns the configuration that was parsed."""
  return gin.config_str()


def operative_text(bindings: Sequence[str]) -> str:
  """Returns the settings that were read while the experiment was built.

  Args:
    bindings: overrides from the command line.

  Raises:
    ValueError: an override was not read.
  """
  config = gin.operative_config_str()
  for binding in bindings:
    name = binding.split(' = ', 1)[0]
    if not _is_read(name, config):
      raise ValueError(
        f'{name} has no effect in this experiment: none of its parts reads it '
        '(for example, only generalized_jsd reads BETA).'
      )
  return config


def _is_read(name: str, operative: str) -> bool:
  """Returns whether a part read a parameter where a setting of it applies.

  What a macro makes, as POLICY = @policies.replay() does, gin lists in a scope
  of the macro's name: POLICY/policies.replay.capacity. It read the setting of
  policies.replay.capacity, unless it has one of its own.
  """
  scope, slash, parameter = name.rpartition('/')
  of_parameter = re.escape(parameter) + ' ='
  for inner in re.findall(
    rf'^{re.escape(scope + slash)}((?:\w+/)*){of_parameter}', operative, re.M
  ):
    own = [
      rf'^{re.escape(scope + slash + inner[: match.end()])}{of_parameter}'
      for match in re.finditer('/', inner)
    ]
    if not any(re.search(setting, text(), re.M) for setting in own):
      return True
  return False


def _without_files(config: str) -> list[str]:
  """Returns bindings that set required paths and vocabularies to None."""
  named = re.findall(r'^(\w+_(?:DIR|PATH)) = +%gin\.REQUIRED', config, re.M)
  vocabulary = re.findall(r'^(datasets\.\w+\.vocabulary) =', config, re.M)
  imports = re.findall(r'^(?:from|import) .+', config, re.MULTILINE)
  return [*imports, *(f'{name} = None' for name in named + vocabulary)]


@contextlib.contextmanager
def output_folder(configurable: str, *, may_be_remote: bool) -> Iterator[None]:
  """Checks the output folder of a configurable, and explains write errors.

  Args:
    configurable: its full name. Its parameter `model_dir` or `output_dir` is
      the folder.
    may_be_remote: whether the folder may be at gs://.
  """
  # It imports JAX, which must follow the settings of `runtime.process`.
  from gkd_jax.runtime import run_folder

  bindings = bound(configurable)
  for name in bindings.keys() & {'model_dir', 'output_dir'}:
    setting, folder = resolve(name, bindings[name])
    if isinstance(folder, str):
      break
  else:  # the configurable chooses a folder itself
    yield
    return
  if not (may_be_remote and paths.is_remote(folder)):
    run_folder.check_folder(folder, setting)
  with run_folder.explained_write_errors(folder, setting):
    yield


def build(function: Callable) -> Callable:
  """Returns a function with the arguments that gin binds to it, if any.

  gin keeps the functions that earlier configurations of the process named, and
  would record their defaults as settings of this one.
  """
  if not bound(f'{function.__module__}.{function.__qualname__}'):
    return function
  return gin.get_configurable(function)
