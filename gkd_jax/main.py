# SPDX-License-Identifier: Apache-2.0
r"""Runs the experiment that a gin file describes.

    python -m gkd_jax.main --run_mode=train \
        --gin_file=configs/cmudict_g2p/student.gin --gin.MODEL_DIR=runs/student

Later files and `--gin.NAME=VALUE` flags override earlier ones. A value that is
no gin literal is taken as a string, so paths need no quotes. Add `--dry_run` to
print the resolved configuration and stop.

Run modes:
  train    train a student; a run that was interrupted goes on
  eval     evaluate a checkpoint (CHECKPOINT_PATH) into EVAL_OUTPUT_DIR
  infer    write a checkpoint's outputs into INFER_OUTPUT_DIR
  export   write a checkpoint for Hugging Face transformers or T5X; needs no
           --gin_file
  sweep    run every point of a grid, and compare them in a report; or print the
           commands of the runs
  report   gather finished runs (RUNS, a glob) into tables, figures and a page;
           needs no --gin_file
  precompile  compile the step of a file for `train` for a TPU slice that is not
           at hand (--topology), and say whether it fits; reads no files, so
           settings that name some need not be set
"""

import ast
import contextlib
import ctypes
import difflib
import functools
import importlib
import importlib.util
import inspect
import io
import logging as std_logging
import os
import pathlib
import re
import sys
import time
import tokenize
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

_START = time.monotonic()

# Run mode -> the function that gin configures and main calls.
_RUN_MODES = {
  'train': 'gkd_jax.train.train',
  'eval': 'gkd_jax.evaluation.evaluate.evaluate_checkpoint',
  'infer': 'gkd_jax.evaluation.infer.infer',
  'export': 'gkd_jax.checkpoints.export.export',
  'sweep': 'gkd_jax.sweeps.sweep.sweep',
  'report': 'gkd_jax.report.report.report',
  'precompile': 'gkd_jax.capacity.precompile.precompile',
}
# What is run where no file is named: a mode without an experiment.
_GIN_FILE_OF_MODE = {
  'export': 'gin/runs/export.gin',
  'report': 'gin/runs/report.gin',
}

# What the paper calls a setting -> what we call it.
_FROM_PAPER = {'LAMBDA': 'STUDENT_DATA_FRACTION'}

# A sweep starts such processes, and writes command lines to their stdin.
_WORKER = 'worker'

_RUN_MODE = flags.DEFINE_string(
  'run_mode', 'train', f'One of: {", ".join(_RUN_MODES)}.'
)
_GIN_FILE = flags.DEFINE_multi_string(
  'gin_file', None, 'Experiment to run, e.g. configs/cmudict_g2p/sft.gin.'
)
_GIN_BINDINGS = flags.DEFINE_multi_string(
  'gin_bindings', [], 'One override each; --gin.NAME=VALUE is short for this.'
)
_GIN_SEARCH_PATHS = flags.DEFINE_list(
  'gin_search_paths', ['.'], 'Where gin files are looked for; then in gkd_jax.'
)
_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'Of --run_mode=precompile: a TPU slice, e.g. v5e:4x4.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Of --run_mode=precompile: JSON file for its report.'
)
_TFDS_DATA_DIR = flags.DEFINE_string(
  'tfds_data_dir', None, 'Where TFDS keeps its data; its default otherwise.'
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  'coordinator_address',
  None,
  'Of a run on several hosts: host:port of the first process. This and the '
  'next two are found automatically on TPUs.',
)
_PROCESS_COUNT = flags.DEFINE_integer(
  'process_count', None, 'Of such a run: its processes, one on each host.'
)
_PROCESS_INDEX = flags.DEFINE_integer(
  'process_index', None, 'Of such a run: the number of this one, from 0.'
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run',
  False,
  'Print the resolved configuration and stop. Builds nothing: what does not '
  'fit together is told by a run.',
)

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def main(argv: Sequence[str]) -> None:
  """Resolves the configuration, then hands over to the run mode."""
  try:
    _run_and_say_errors(argv)
  except BaseException as e:
    _leave_other_hosts(e)
    raise


def _leave_other_hosts(error: BaseException) -> None:
  """Ends the process at once, if there are others and they do not end, too.

  They notice. Python's own way out would wait for them first.
  """
  hosts = sys.modules.get('gkd_jax.parallel.hosts')
  if hosts is None or not hosts.are_several():
    return
  if isinstance(error, SystemExit):
    if error.code == os.EX_TEMPFAIL:  # all have saved
      return
    print(error.code, file=sys.stderr)
  else:
    traceback.print_exception(error)
  sys.stderr.flush()
  os._exit(1)


def _run_and_say_errors(argv: Sequence[str]) -> None:
  # TensorFlow only reads data here: it need not talk, nor look for GPUs.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  logging.set_verbosity(logging.ERROR)
  # Orbax writes in many tasks, and each would tell of a full disk at length.
  for name in ('absl', 'asyncio'):
    std_logging.getLogger(name).addFilter(_is_news)
  try:
    _run(argv)
  except (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
  ) as e:
    if not _is_ours(e):
      raise
    # gin adds which functions it was calling. Our messages say what to change;
    # a library's do not know of gin.
    message, *calls = re.split(r'\n  In call to configurable ', str(e))
    if calls and not _raised_in(e).is_relative_to(_ROOT / 'gkd_jax'):
      message = (
        message.rstrip('.') + '.' + _who_sets(calls[0].split()[0].strip("'"))
      )
    sys.exit(f'Error: {message}')
  except KeyboardInterrupt as e:
    print(
      str(e)
      or 'Interrupted. A training run goes on from its last checkpoint '
      '(CHECKPOINT_PERIOD) with the same command.',
      file=sys.stderr,
    )
    sys.exit(getattr(e, 'exit_code', 130))


def _is_news(record: std_logging.LogRecord) -> bool:
  """Whether a library logs something else than that the disk is full."""
  from gkd_jax.runtime import run_folder

  return not (record.exc_info and run_folder.is_full(record.exc_info[1]))


def _keep_compiled_programs() -> None:
  """Lets JAX keep what it compiles, for later runs and those beside this one.

  Whoever sets JAX's own variables is obeyed: JAX_COMPILATION_CACHE_DIR, or
  JAX_ENABLE_COMPILATION_CACHE=false.
  """
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    folder = os.path.join(home, 'gkd_jax', 'compiled')
    try:
      os.makedirs(folder, exist_ok=True)
    except OSError as e:
      print(f'Compiled programs are not kept: {e}', file=sys.stderr)
      return
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
  # By default those are not kept that took less than a second; there are many.
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')


def _keep_memory() -> None:
  """Lets the process keep the memory it frees, where the CPU does the work.

  A step's buffers are large. The C library would give them back to the system
  after each step, and the system would fill them with zeros again: a fifth of
  the time of a step of T5 small. With an accelerator they lie there.
  """
  accelerators = ('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin')
  if os.environ.get('JAX_PLATFORMS') != 'cpu' and any(
    map(importlib.util.find_spec, accelerators)
  ):
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:  # glibc has it
    return
  trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
  mallopt(arena_max, 1)  # in others large buffers are given back all the same
  mallopt(mmap_max, 0)
  mallopt(trim_threshold, 2**31 - 1)
  mallopt(top_pad, 2**26)


def _run(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise ValueError(f'Unexpected arguments {argv[1:]}. Flags begin with --.')
  mode = _RUN_MODE.value
  if mode == _WORKER:
    from gkd_jax.sweeps import worker

    worker.serve(_run_again)
    return
  if mode not in _RUN_MODES:
    raise ValueError(
      f'There is no --run_mode={mode}.' + _nearest(mode, _RUN_MODES)
    )
  files = _GIN_FILE.value or []
  if not files and mode in _GIN_FILE_OF_MODE:
    files = [_GIN_FILE_OF_MODE[mode]]
  if not files:
    raise ValueError(
      '--gin_file is missing. Name an experiment, e.g. '
      '--gin_file=configs/cmudict_g2p/sft.gin.'
    )
  if mode == 'precompile' and _TOPOLOGY.value is None:
    raise ValueError('--topology is missing. Name a slice, e.g. v5e:4x4.')
  for flag in (_TOPOLOGY, _OUTPUT):
    if mode != 'precompile' and flag.value is not None:
      raise ValueError(f'--{flag.name} is for --run_mode=precompile.')
  if mode != 'precompile':  # which says how long compiling takes
    _keep_compiled_programs()
  if mode in ('train', 'eval', 'infer'):
    _keep_memory()
  import gin

  bindings = [_quote_strings(binding) for binding in _GIN_BINDINGS.value]
  _parse(gin, files, bindings, needs_files=mode != 'precompile')
  if _DRY_RUN.value:
    print(gin.config_str())
    return
  starts_runs = mode == 'sweep'
  if _TFDS_DATA_DIR.value and not starts_runs:
    import seqio

    seqio.set_tfds_data_dir_override(_TFDS_DATA_DIR.value)
  _check_mode(gin, mode, files)
  _start_hosts(mode)
  module_name, function_name = _RUN_MODES[mode].rsplit('.', 1)
  function = getattr(importlib.import_module(module_name), function_name)
  if mode == 'precompile':
    settings = gin.get_bindings(_RUN_MODES['train'])
    names = inspect.signature(function).parameters.keys() & settings.keys()
    function(
      topology=_TOPOLOGY.value,
      output=_OUTPUT.value,
      **{name: settings[name] for name in names},
    )
    return
  keywords = {}
  if mode == 'train':
    keywords['started'] = _START
    keywords['import_seconds'] = time.monotonic() - _START
    keywords['config_text'] = lambda: _operative_config(gin, bindings)
  if _TFDS_DATA_DIR.value and starts_runs:
    keywords['flags'] = [f'--tfds_data_dir={_TFDS_DATA_DIR.value}']
  if starts_runs:
    keywords['check'] = functools.partial(_check_arguments, gin)
  with _output_folder(gin, mode):
    gin.get_configurable(function)(**keywords)


def _run_again(arguments: Sequence[str]) -> None:
  """Runs main with other arguments, as a new process would."""
  import gin

  from gkd_jax.data import vocabularies

  global _START
  _START = time.monotonic()
  vocabularies.import_libraries.cache_clear()  # the seconds are the first run's
  gin.clear_config()
  flags.FLAGS.unparse_flags()
  sys.argv[1:] = arguments
  main(flags.FLAGS(expand_gin_flags(sys.argv)))


@contextlib.contextmanager
def _output_folder(gin, mode: str) -> Iterator[None]:
  """Checks the folder that a run mode writes to; see `interruption`."""
  from gkd_jax.runtime import run_folder

  bindings = gin.config._CONFIG.get(('', _RUN_MODES[mode]), {})
  for name in bindings.keys() & {'model_dir', 'output_dir'}:
    setting, folder = _resolve(gin, name, bindings[name])
    if isinstance(folder, str):
      break
  else:  # it chooses one itself
    yield
    return
  if mode != 'export':  # which can write to gs://
    run_folder.check_folder(folder, setting)
  with run_folder.written(folder, setting):
    yield


def _start_hosts(mode: str) -> None:
  from gkd_jax.parallel import hosts

  given = [_COORDINATOR_ADDRESS, _PROCESS_COUNT, _PROCESS_INDEX]
  if mode in ('train', 'eval', 'infer'):
    hosts.start(*(flag.value for flag in given))
    return
  for flag in given:
    if flag.value is not None:
      raise ValueError(
        f'--{flag.name} is for --run_mode=train, eval and infer, not {mode}.'
      )


def _check_mode(gin, mode: str, files: Sequence[str]) -> None:
  """Raises ValueError if the files that were parsed are for another mode."""
  # What is compiled is what train would run.
  configured_as = 'train' if mode == 'precompile' else mode
  config = gin.config_str()
  configured = [name for name in _RUN_MODES if f'{_selector(name)}.' in config]
  if configured_as not in configured:
    raise ValueError(
      f'{", ".join(files)} does not configure --run_mode={mode}: it sets '
      f'nothing of {_selector(configured_as)}.'
      + (f' It is for --run_mode={configured[0]}.' if configured else '')
      + f' Files for this mode include gin/runs/{configured_as}.gin.'
    )


def _selector(mode: str) -> str:
  """Returns what gin calls the function of a mode: train.train."""
  return '.'.join(_RUN_MODES[mode].split('.')[-2:])


def _check_arguments(gin, arguments: Sequence[str], result: str) -> None:
  """Raises ValueError if gin would not take another run's arguments.

  Or if that run would not write the file, `result`, that says it is done.

  It parses them, in place of what this run was configured with (and which it
  has by now).
  """
  gin.clear_config()
  flag = [argument.partition('=') for argument in expand_gin_flags(arguments)]
  of = {
    name: [value for given, _, value in flag if given == name]
    for name in ('--run_mode', '--gin_file', '--gin_bindings')
  }
  _parse(
    gin,
    of['--gin_file'],
    [_quote_strings(binding) for binding in of['--gin_bindings']],
    needs_files=True,
  )
  mode = of['--run_mode'][-1]
  _check_mode(gin, mode, of['--gin_file'])
  if mode == 'train' and result.startswith('eval_'):
    written = None
    if _macro(gin, 'FINAL_EVAL') is not None:
      written = f'eval_{_macro(gin, "TEST_SPLIT")}.json'
    if written != result:
      raise ValueError(
        f'it is done when it has written {result}, but FINAL_EVAL and '
        f'TEST_SPLIT make it write {written or "none"}. Set FINAL_EVAL = '
        "'@final_eval/datasets.DatasetConfig()' and TEST_SPLIT, or say which "
        "file it ends with: {'result': 'eval_validation.json'}."
      )


def _macro(gin, name: str) -> Any:
  """Returns a macro's value, None where it is not set."""
  try:
    value = gin.query_parameter(f'{name}/gin.macro.value')
  except ValueError:
    return None
  is_macro = str(value).startswith('%')
  return _macro(gin, str(value)[1:]) if is_macro else value


def _parse(
  gin, files: Sequence[str], bindings: Sequence[str], needs_files: bool
) -> None:
  """Parses files and bindings; an unknown name is an error, and names one.

  Without a need for files, settings that name files need not be set.
  """
  # gin would also look inside Python packages, and takes folders for some.
  gin.config._FILE_READERS[:] = [(_open_gin_file, os.path.isfile)]
  folders = [*_GIN_SEARCH_PATHS.value, str(_ROOT)]
  for folder in folders:
    gin.add_config_file_search_path(folder)
  for file in files:
    if not any((pathlib.Path(folder) / file).is_file() for folder in folders):
      there = [
        str(path.relative_to(folder))
        for folder in folders
        for path in pathlib.Path(folder).glob('configs/**/*.gin')
      ]
      raise ValueError(
        f'--gin_file={file} is not there (looked in {", ".join(folders)}).'
        + _nearest(file, there)
      )
  try:
    gin.parse_config_files_and_bindings(files, [], finalize_config=False)
    # A flag may name whatever the modules that the files import hold.
    imports = re.findall(r'^(?:from|import) .+', gin.config_str(), re.MULTILINE)
    for binding in bindings:
      _parse_binding(gin, imports, binding)
    _check_types(gin)
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
    if is_name and _raised_in(e).name != 'gin':
      raise  # some module has a bug
    raise ValueError(_explain(gin, str(e))) from e
  config = gin.config_str()
  defined = set(re.findall(r'^([A-Za-z_]\w*) =', config, re.MULTILINE))
  used = set(re.findall(r'%([A-Za-z_]\w*)', config))
  # gin takes any macro, so a misspelt one would be ignored in silence.
  for name in sorted(defined - used):
    raise ValueError(
      f'{name} changes nothing: no setting of this experiment reads it.'
      + (
        " (Of a sweep's runs, SETTINGS and GRID set what is in them.)"
        if 'sweep.sweep.' in config
        else ''
      )
      + _nearest(name, used)
    )


def _open_gin_file(path: str) -> io.TextIOBase:
  try:
    file = io.StringIO(pathlib.Path(path).read_text(encoding='utf-8'))
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f'The gin file {path} cannot be read: {e}.') from e
  file.name = path  # for gin's messages
  return file


def _parse_binding(gin, imports: Sequence[str], binding: str) -> None:
  try:
    gin.parse_config([*imports, binding])
  except (SyntaxError, tokenize.TokenError) as e:
    raise ValueError(
      f'--gin.{binding.replace(" = ", "=", 1)} is no value for gin: it takes '
      'numbers, texts, True, False, None, lists, {...}, @names and %MACROS.'
    ) from e


def _check_types(gin) -> None:
  """Raises ValueError if a value is of another type than what takes it says.

  What a call (@name()) gives is not known yet, and checked where it is used.
  """
  from gkd_jax.config import annotations

  for (_, selector), bindings in gin.config._CONFIG.items():
    if selector == 'gin.macro':
      continue
    parameters = _parameters(gin.get_configurable(selector))
    for name, value in bindings.items():
      setting = f'{".".join(selector.split(".")[-2:])}.{name}'
      setting, value = _resolve(gin, setting, value)
      if name in parameters and not getattr(value, 'evaluate', False):
        annotations.check(setting, value, parameters[name].annotation)


def _resolve(gin, setting: str, value: Any) -> tuple[str, Any]:
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


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
  if inspect.isclass(function):  # gin hides what the class is called with
    function = function.__init__
  return inspect.signature(function).parameters


def _without_files(config: str) -> list[str]:
  """Returns bindings that leave out files: names, and the vocabulary in one."""
  named = re.findall(r'^(\w+_(?:DIR|PATH)) = +%gin\.REQUIRED', config, re.M)
  vocabulary = re.findall(r'^(VOCABULARY) =', config, re.M)
  return [f'{name} = None' for name in named + vocabulary]


def _operative_config(gin, bindings: Sequence[str]) -> str:
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
        'chosen do not read it (BETA, say, is read by generalized_jsd alone).'
      )
  return config


def _quote_strings(binding: str) -> str:
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


def _explain(gin, message: str) -> str:
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
    module = sys.modules.get(f'gkd_jax.{package}', sys.modules.get(package))
    names = [
      name
      for name, value in (vars(module) if module else {}).items()
      if callable(value)
      and not name.startswith('_')
      and (module.__name__ == package or value.__module__ == module.__name__)
    ]
  elif match := re.match(r".*'(.+)' doesn't have a .* named '(.+)'", message):
    names = _parameters(gin.get_configurable(match[1]))
  else:
    return message
  return message + _nearest(match[match.lastindex], names)


def _who_sets(function: str) -> str:
  """Says which macros a function's arguments come from, and their values."""
  import gin

  config = gin.config_str()
  binding = rf'^(?:.*/)?(?:\w+\.)?{function}\.\w+ =\s+%(\w+)'
  given = [
    f'{macro} = {value}'
    for macro in re.findall(binding, config, re.MULTILINE)
    for value in re.findall(rf'^{macro} =\s+(.+)', config, re.MULTILINE)
  ]
  if not given:
    return ''
  return f' Look at what {function} is given: {", ".join(given)}.'


def _nearest(name: str, names: Iterable[str]) -> str:
  # The case of a name says nothing about which one was meant.
  of_upper = {other.upper(): other for other in names}
  meant = _FROM_PAPER.get(name.upper(), name.upper())
  near = difflib.get_close_matches(meant, list(of_upper), n=1, cutoff=0.5)
  near = [of_upper[other] for other in near]
  if near:
    return f' Did you mean {near[0]}?'
  return f' There are: {", ".join(sorted(set(names)))}.' if names else ''


def _is_ours(error: BaseException) -> bool:
  """Whether it is about a setting; else its traceback is wanted.

  It is if we raised it on purpose, or gin did, or any library while gin builds
  the parts, before the run itself has begun. A TypeError we never raise on
  purpose.
  """
  folder = _raised_in(error)
  if not isinstance(error, TypeError) and (
    folder.is_relative_to(_ROOT / 'gkd_jax') or folder.name == 'gin'
  ):
    return True
  frames = traceback.extract_tb(error.__traceback__)
  files = {pathlib.Path(frame.filename) for frame in frames}
  ours = {file for file in files if file.is_relative_to(_ROOT / 'gkd_jax')}
  return ours <= {pathlib.Path(__file__)}


def _raised_in(error: BaseException) -> pathlib.Path:
  """Returns the folder of the file that raised it."""
  *_, last = traceback.extract_tb(error.__traceback__)
  return pathlib.Path(last.filename).parent


def expand_gin_flags(args: Sequence[str]) -> list[str]:
  """Rewrites `--gin.NAME=VALUE` to `--gin_bindings=NAME=VALUE`, as T5X does."""
  return [re.sub(r'^--?gin\.', '--gin_bindings=', arg) for arg in args]


if __name__ == '__main__':
  app.run(main, argv=expand_gin_flags(sys.argv))
