# SPDX-License-Identifier: Apache-2.0
r"""Runs an experiment that gin files describe.

    python -m gkd_jax.main --run_mode=train \
        --gin_file=configs/cmudict_g2p/student.gin --gin.MODEL_DIR=runs/student

Later files override earlier ones; `--gin.NAME=VALUE` flags override all files.
A value that is no gin literal is a string: paths need no quotes. `--dry_run`
prints the resolved configuration and exits.

Run modes:
  train    train a student; the same command resumes an interrupted run
  eval     evaluate a checkpoint (CHECKPOINT_PATH) into EVAL_OUTPUT_DIR
  infer    write the outputs of a checkpoint into INFER_OUTPUT_DIR
  select   select outputs to learn from, among several that infer wrote for each
           input; needs no --gin_file
  export   convert a checkpoint to Hugging Face transformers or T5X; needs no
           --gin_file
  sweep    run every point of a grid and compare the runs in a report; or print
           the commands of the runs
  report   make tables, figures and an HTML page of finished runs (RUNS, a
           glob); needs no --gin_file
  precompile  compile the training step for a TPU slice (--topology) on any
           machine, and report whether it fits; reads no checkpoint and no data,
           so their paths may be unset
"""

import functools
import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from gkd_jax.runtime import process

if __name__ == '__main__':
  process.end_on_signals()  # before the imports that take long

from absl import app, flags  # noqa: E402

from gkd_jax.config import gin_config, gin_errors  # noqa: E402

_START = time.monotonic()

# Run mode -> the function that gin configures and main calls.
_RUN_MODES = {
  'train': 'gkd_jax.train.train',
  'eval': 'gkd_jax.evaluation.evaluate.evaluate_checkpoint',
  'infer': 'gkd_jax.evaluation.infer.infer',
  'select': 'gkd_jax.evaluation.select.select',
  'export': 'gkd_jax.checkpoints.export.export',
  'sweep': 'gkd_jax.sweeps.sweep.sweep',
  'report': 'gkd_jax.report.report.report',
  'precompile': 'gkd_jax.capacity.precompile.precompile',
}
# Run mode -> the configurable that its gin files must bind.
_RUN = 'gkd_jax.runtime.run_folder.Run'
_CONFIGURES = _RUN_MODES | {'train': _RUN, 'precompile': _RUN}
# Default gin files of the modes that need no experiment.
_GIN_FILE_OF_MODE = {
  'export': 'gin/runs/export.gin',
  'report': 'gin/runs/report.gin',
  'select': 'gin/runs/select.gin',
}
_TEST_SPLIT = 'final_eval/datasets.DatasetConfig.split'
# Not for users: a sweep starts workers and writes commands to their stdin.
_WORKER = 'worker'
_MULTIHOST_MODES = ('train', 'eval', 'infer')

_RUN_MODE = flags.DEFINE_string(
  'run_mode', 'train', f'One of: {", ".join(_RUN_MODES)}.'
)
_GIN_FILE = flags.DEFINE_multi_string(
  'gin_file', None, 'Gin file to parse, e.g. configs/cmudict_g2p/sft.gin.'
)
_GIN_BINDINGS = flags.DEFINE_multi_string(
  'gin_bindings', [], 'Override NAME=VALUE; --gin.NAME=VALUE is its short form.'
)
_GIN_SEARCH_PATHS = flags.DEFINE_list(
  'gin_search_paths',
  ['.'],
  'Folders to search for gin files, before the clone or the installed files.',
)
_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'For --run_mode=precompile: a TPU slice, e.g. v5e:4x4.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'For --run_mode=precompile: JSON file for its report.'
)
_TFDS_DATA_DIR = flags.DEFINE_string(
  'tfds_data_dir', None, "Data folder of TFDS; default: TFDS's own default."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  'coordinator_address',
  None,
  'For a run on several hosts: host:port of the first process. This flag, '
  '--process_count and --process_index are detected on TPU.',
)
_PROCESS_COUNT = flags.DEFINE_integer(
  'process_count',
  None,
  'For a run on several hosts: number of processes, one per host.',
)
_PROCESS_INDEX = flags.DEFINE_integer(
  'process_index',
  None,
  'For a run on several hosts: index of this process, from 0.',
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run',
  False,
  'Print the resolved configuration and exit. Builds nothing: only a run '
  'detects settings that contradict each other.',
)

expand_gin_flags = gin_config.expand_flags


def main(argv: Sequence[str]) -> None:
  """Parses the configuration and calls the function of the run mode."""
  process.quiet_libraries()
  try:
    try:
      _run(argv)
    except Exception as e:
      if not _is_expected(e) or not gin_errors.is_about_a_setting(e):
        raise
      sys.exit(f'Error: {gin_errors.message_of(e)}')
    except KeyboardInterrupt as e:
      print(
        str(e)
        or 'Interrupted. The same command resumes a training run from its last '
        'checkpoint.',
        file=sys.stderr,
      )
      sys.exit(getattr(e, 'exit_code', 130))
  except BaseException as e:
    process.exit_if_multihost(e)
    raise


def _is_expected(error: Exception) -> bool:
  expected = ValueError, TypeError, OSError, ImportError, FloatingPointError
  return isinstance(error, expected)


def _run(argv: Sequence[str]) -> None:
  if _RUN_MODE.value == _WORKER:
    from gkd_jax.sweeps import worker

    process.enable_compilation_cache()
    process.retain_freed_memory()
    worker.serve(_run_in_worker)
    return
  files = _check_flags(argv)
  mode = _RUN_MODE.value
  if mode != 'precompile':  # it measures compilation time
    process.enable_compilation_cache()
  if mode in _MULTIHOST_MODES:
    process.retain_freed_memory()
  bindings = [gin_config.quote_strings(b) for b in _GIN_BINDINGS.value]
  gin_config.parse(
    files,
    bindings,
    _GIN_SEARCH_PATHS.value,
    needs_files=mode != 'precompile',
  )
  if _DRY_RUN.value:
    print(gin_config.text())
    return
  if _TFDS_DATA_DIR.value and mode != 'sweep':
    from gkd_jax.data import seqio_tasks

    seqio_tasks.set_tfds_data_dir(_TFDS_DATA_DIR.value)
  _check_mode(mode, files)
  _start_hosts(mode)
  module_name, function_name = _RUN_MODES[mode].rsplit('.', 1)
  function = getattr(importlib.import_module(module_name), function_name)
  keywords = _keywords(mode, bindings)
  with gin_config.output_folder(
    _CONFIGURES[mode], may_be_remote=mode == 'export'
  ):
    gin_config.build(function)(**keywords)


def _run_in_worker(arguments: Sequence[str]) -> None:
  """Runs main with other arguments, as a new process would."""
  from gkd_jax.data import vocabularies

  global _START
  _START = time.monotonic()
  # Only the first run of this process spends time on imports.
  vocabularies.import_libraries.cache_clear()
  flags.FLAGS.unparse_flags()
  sys.argv[1:] = arguments
  main(flags.FLAGS(expand_gin_flags(sys.argv)))


def _check_flags(argv: Sequence[str]) -> Sequence[str]:
  """Returns the gin files.

  Raises:
    ValueError: flags are unknown, missing, or for another run mode.
  """
  if len(argv) > 1:
    raise ValueError(
      f'Unexpected arguments {argv[1:]}. Flags start with --, and settings are '
      'written with =, as in --gin.NAME=VALUE.'
    )
  mode = _RUN_MODE.value
  if mode not in _RUN_MODES:
    raise ValueError(
      f'Unknown --run_mode={mode}.' + gin_errors.nearest(mode, _RUN_MODES)
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
  return files


def _keywords(mode: str, bindings: Sequence[str]) -> dict[str, Any]:
  """Returns the arguments of a run mode that gin does not bind."""
  keywords = {}
  if mode in ('train', 'precompile'):
    keywords['experiment'] = _experiment()
  if mode == 'train':
    from gkd_jax.runtime import run_folder

    keywords['run'] = gin_config.build(run_folder.Run)(
      config_text=functools.partial(gin_config.operative_text, bindings),
      started=_START,
      import_seconds=time.monotonic() - _START,
    )
  elif mode == 'precompile':
    keywords |= {
      'topology': _TOPOLOGY.value,
      'output': _OUTPUT.value,
      'overwrite': bool(gin_config.macro('OVERWRITE')),
    }
  elif mode == 'sweep':
    keywords['check'] = _check_arguments
    if _TFDS_DATA_DIR.value:
      keywords['flags'] = [f'--tfds_data_dir={_TFDS_DATA_DIR.value}']
  return keywords


def _experiment() -> Any:
  """Builds an experiment from its parts, with the arguments that gin binds."""
  from gkd_jax import experiment

  parts = {
    name: gin_config.build(part)() for name, part in experiment.PARTS.items()
  }
  return experiment.Experiment(**parts)


def _start_hosts(mode: str) -> None:
  from gkd_jax.parallel import hosts

  if mode in (*_MULTIHOST_MODES, 'export', 'precompile'):
    hosts.check_jax_settings()
  given = [_COORDINATOR_ADDRESS, _PROCESS_COUNT, _PROCESS_INDEX]
  if mode in _MULTIHOST_MODES:
    hosts.initialize(*(flag.value for flag in given))
    return
  for flag in given:
    if flag.value is not None:
      raise ValueError(
        f'--{flag.name} is for --run_mode=train, eval and infer, not {mode}.'
      )


def _check_mode(mode: str, files: Sequence[str]) -> None:
  """Raises ValueError if the parsed files do not configure a run mode."""
  config = gin_config.text()
  configured = [name for name in _RUN_MODES if f'{_selector(name)}.' in config]
  if mode not in configured:
    raise ValueError(
      f'{", ".join(files)} does not configure --run_mode={mode}: it sets '
      f'no parameter of {_selector(mode)}.'
      + (f' It is for --run_mode={configured[0]}.' if configured else '')
      + ' Files for this mode include gin/runs/'
      f'{"train" if mode == "precompile" else mode}.gin.'
    )


def _selector(mode: str) -> str:
  """Returns gin's name of a mode's configurable, e.g. run_folder.Run."""
  return '.'.join(_CONFIGURES[mode].split('.')[-2:])


def _check_arguments(arguments: Sequence[str], result: str) -> None:
  """Raises ValueError if the arguments of a sweep's run are invalid.

  They are also invalid if the run would not write `result`, the file by which
  the sweep detects that it is done. Replaces the configuration of this process.
  """
  flag = [argument.partition('=') for argument in expand_gin_flags(arguments)]
  of = {
    name: [value for given, _, value in flag if given == name]
    for name in ('--run_mode', '--gin_file', '--gin_bindings')
  }
  gin_config.parse(
    of['--gin_file'],
    [gin_config.quote_strings(b) for b in of['--gin_bindings']],
    _GIN_SEARCH_PATHS.value,
  )
  mode = of['--run_mode'][-1]
  _check_mode(mode, of['--gin_file'])
  if mode == 'train' and result.startswith('eval_'):
    written = None
    if gin_config.macro('FINAL_EVAL') is not None:
      written = f'eval_{gin_config.parameter(_TEST_SPLIT)}.json'
    if written != result:
      raise ValueError(
        f'the sweep waits for {result}, but with this FINAL_EVAL and '
        f'{_TEST_SPLIT} the run writes {written or "no such file"}. Set '
        "FINAL_EVAL = '@final_eval/datasets.DatasetConfig()' and the split, or "
        "set the last file of the run: {'result': 'eval_validation.json'}."
      )


if __name__ == '__main__':
  if sys.stdout is not None:
    # Where the locale has no such character, an escape is printed.
    sys.stdout.reconfigure(errors='backslashreplace')
  app.run(main, argv=expand_gin_flags(sys.argv))
