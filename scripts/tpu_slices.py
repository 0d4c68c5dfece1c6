# SPDX-License-Identifier: Apache-2.0
"""Finds the smallest TPU slice for the paper's pairs of models, and others.

    python scripts/tpu_slices.py

It compiles the step of each pair (`--run_mode=precompile`) for larger and
larger slices until it fits, and prints a table. It needs `.[tpu]`, but no TPU.
A compilation takes one to three minutes. Reports are kept in --output_dir and
reused.
"""

import hashlib
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Iterator

from absl import app, flags

_GENERATIONS = flags.DEFINE_list(
  'generations', ['v5e', 'v6e', 'v5p'], 'TPU generations to try.'
)
_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir', 'runs/tpu_slices', 'Folder of the reports of compilations.'
)

_HERE = pathlib.Path(__file__).resolve().parent

# Chips along each axis, from the smallest slice on.
SLICES = {
  'v5e': ('1x1', '2x2', '2x4', '4x4', '4x8'),
  'v6e': ('1x1', '2x2', '2x4', '4x4', '4x8'),
  'v4': ('2x2x1', '2x2x2', '2x2x4', '2x4x4'),
  'v5p': ('2x2x1', '2x2x2', '2x2x4', '2x4x4'),
}
XSUM = ('--gin_file=configs/xsum/gkd.gin',)
# Name: (batch, arguments).
PAIRS = {
  'XL → small, XSum': (32, (*XSUM, '--gin.SIZE=t5_1_1_small')),
  'XL → base, XSum': (32, (*XSUM, '--gin.SIZE=t5_1_1_base')),
  'XL → large, XSum': (32, (*XSUM, '--gin.SIZE=t5_1_1_large')),
  'XL → base, instructions': (
    128,
    ('--gin_file=configs/instruction/gkd.gin', '--gin.SIZE=t5_1_1_base'),
  ),
  'XXL → XL, XSum': (
    32,
    (*XSUM, '--gin.SIZE=t5_1_1_xl', '--gin.TEACHER_SIZE=t5_1_1_xxl'),
  ),
  'T5Gemma 2 4B → 270M, XSum': (
    32,
    (
      *XSUM,
      '--gin.SIZE=t5gemma_2_270m_270m',
      '--gin.TEACHER_SIZE=t5gemma_2_4b_4b',
    ),
  ),
  'T5Gemma 9B-2B → 2B-2B, XSum': (
    32,
    (
      *XSUM,
      '--gin.SIZE=t5gemma_2b_2b',
      '--gin.TEACHER_SIZE=t5gemma_9b_2b',
    ),
  ),
}
# Settings of all pairs: bfloat16 products, and all parameters sharded.
SETTINGS = (
  '--gin.ACTIVATION_DTYPE=bfloat16',
  '--gin.experiment.Teacher.dtype=bfloat16',
  '--gin.experiment.Student.parameter_partitioning_dims=2',
  '--gin.experiment.Teacher.parameter_partitioning_dims=2',
  '--gin.SCAN_LAYERS=True',
)


def main(argv: list[str]) -> None:
  """Compiles the steps, and prints the table."""
  del argv
  rows = []
  for generation in _GENERATIONS.value:
    for pair, (batch_size, arguments) in PAIRS.items():
      report = _smallest(arguments, batch_size, generation)
      rows.append(_row(pair, generation, report))
      print(rows[-1], file=sys.stderr, flush=True)
  print(
    '| teacher → student | batch, tokens in / out | slice | to fit | GiB of a '
    'device | ms a step, at the least | sampling | received a step, GiB |'
  )
  print('|---' * 8 + '|')
  print('\n'.join(rows))


def _smallest(arguments, batch_size, generation) -> dict | None:
  """Returns the report of the first slice and settings that fit."""
  for chips in SLICES[generation]:
    num_chips = math.prod(map(int, chips.split('x')))
    for settings in _settings(batch_size, num_chips):
      report = _precompile(f'{generation}:{chips}', (*arguments, *settings))
      if report['fits']:
        return report | {'sparing': settings}
      if _is_hopeless(report):
        break
  return None


def _settings(batch_size: int, num_chips: int) -> Iterator[tuple[str, ...]]:
  """Yields settings in order of decreasing memory and increasing time."""
  yield ()
  yield ('--gin.REMAT=True',)
  for mesh_model in (1, 4):
    if num_chips % mesh_model == 0:
      rows = batch_size * mesh_model // num_chips
      yield (
        '--gin.REMAT=True',
        f'--gin.experiment.Optimization.num_microbatches={min(rows, 8)}',
        *(
          (f'--gin.experiment.MeshConfig.model={mesh_model}',)
          if mesh_model > 1
          else ()
        ),
      )


def _is_hopeless(report) -> bool:
  """Returns whether parameters and optimizer alone exceed the memory."""
  memory = report['memory']
  parts = ('student_params', 'optimizer_state', 'teacher_params')
  return sum(memory[name] for name in parts) > memory['available']


def _precompile(topology, arguments) -> dict:
  settings = (*arguments, *SETTINGS)
  digest = hashlib.sha256(' '.join(settings).encode()).hexdigest()[:12]
  path = (
    pathlib.Path(_OUTPUT_DIR.value).expanduser()
    / f'{topology.replace(":", "_")}_{digest}.json'
  )
  if path.exists():
    return json.loads(path.read_text(encoding='utf-8'))
  finished = subprocess.run(
    [
      *(sys.executable, '-m', 'gkd_jax.main', '--run_mode=precompile'),
      *(f'--topology={topology}', f'--output={path}', *settings),
    ],
    cwd=_HERE.parent,
    capture_output=True,
    text=True,
    check=False,
    encoding='utf-8',
  )
  if finished.returncode:
    raise SystemExit(finished.stderr[-3000:])
  return json.loads(path.read_text(encoding='utf-8'))


def _row(pair, generation, report) -> str:
  if report is None:
    return f'| {pair} | | none of {generation} {SLICES[generation]} |'
  lengths = report['feature_lengths']
  memory = report['memory']
  received = sum(phase['received'] for phase in report['phases'].values())
  sparing = [s.removeprefix('--gin.') for s in report['sparing']]
  cells = (
    pair,
    f'{report["batch_size"]}, {lengths["inputs"]} / {lengths["targets"]}',
    report['topology'],
    ', '.join(sparing) or '–',
    f'{memory["total"] / 2**30:.1f} of {memory["available"] / 2**30:.1f}',
    f'{1e3 * report["step_seconds"]:.0f}',
    f'{report["sampling_share"]:.0%}',
    f'{received / 2**30:.1f}',
  )
  return '| ' + ' | '.join(cells) + ' |'


if __name__ == '__main__':
  app.run(main)
