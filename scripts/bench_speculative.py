# SPDX-License-Identifier: Apache-2.0
"""Times speculative decoding beside plain decoding, at given acceptance rates.

    python scripts/bench_speculative.py --torch_python=PATH

Random weights of real widths, greedy decoding without EOS. The draft computes
as always, but at each position it proposes the target's token with the given
probability, else another one. Plain and drafted decoding take turns in one
process, and the times are the least of all rounds, which other work on the
machine disturbs least. With --torch_python the same work is done by
transformers' generate(), alone and with assistant_model (one row only: it takes
no more).

The table has the time per token, the speed-up over plain decoding of the same
system, and the floor: FLOPs over the measured peak of matrix products, or
bytes over the measured bandwidth.
"""

import functools
import json
import pathlib
import subprocess
import sys
import time

from absl import app, flags

_TARGET = flags.DEFINE_string('target', 't5_1_1_base', 'A published size.')
_DRAFT = flags.DEFINE_string('draft', 't5_1_1_small', 'A published size.')
_BATCHES = flags.DEFINE_list('batches', '1,8', 'Numbers of rows.')
_RATES = flags.DEFINE_list('rates', '0.5,0.7,0.9', 'Acceptance rates.')
_LENGTHS = flags.DEFINE_list('lengths', '5', 'Tokens that are drafted.')
_INPUTS = flags.DEFINE_integer('inputs', 64, 'Tokens per input.')
_TARGETS = flags.DEFINE_integer('targets', 64, 'Tokens per output.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns of each program.')
_TORCH_PYTHON = flags.DEFINE_string(
  'torch_python', None, 'A Python with torch and transformers.'
)
_JSON = flags.DEFINE_string('json', None, 'File to write all figures to.')

_HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent))  # gkd_jax of this checkout


def main(argv: list[str]) -> None:
  """Measures, and prints the table."""
  del argv
  peak, bandwidth = _measure_machine()
  rows = []
  for batch_size in map(int, _BATCHES.value):
    rows += _measure(batch_size, peak, bandwidth)
    if _TORCH_PYTHON.value and batch_size == 1:
      print(*map(_cells, rows), sep='\n', file=sys.stderr)
      rows += _measure_torch()
  heads = ('system', 'rows', 'draft', 'acceptance', 'tokens/call')
  heads += ('ms/token', 'speed-up', 'floor ms/token')
  table = [heads, ('---',) * len(heads), *(_cells(row) for row in rows)]
  print('\n'.join(f'| {" | ".join(cells)} |' for cells in table))
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(
      json.dumps(rows, indent=2) + '\n', encoding='utf-8'
    )


def _cells(row: dict) -> tuple[str, ...]:
  def number(name, digits):
    return f'{row[name]:.{digits}f}' if row.get(name) is not None else ''

  return (
    row['system'],
    str(row['rows']),
    str(row['length'] or 'none'),
    number('rate', 1),
    number('block_efficiency', 2),
    number('ms', 2),
    number('speedup', 2),
    number('floor_ms', 2),
  )


def _measure_machine() -> tuple[float, float]:
  """Returns the peak FLOP/s in float32 and the bandwidth in bytes/s."""
  import jax
  import jax.numpy as jnp

  def best(function, *args, runs=8):
    compiled = jax.jit(function).lower(*args).compile()
    seconds = []
    for _ in range(runs):
      start = time.perf_counter()
      jax.block_until_ready(compiled(*args))
      seconds.append(time.perf_counter() - start)
    return min(seconds)

  x = jnp.ones((2048, 2048))
  peak = 2.0 * 2048**3 / best(jnp.matmul, x, x)
  x = jnp.ones(2**27)  # half a GiB: larger than any cache
  return peak, 4.0 * x.size / best(jnp.sum, x)


# --- gkd_jax ------------------------------------------------------------------


def _measure(batch_size: int, peak: float, bandwidth: float) -> list[dict]:
  """Returns a row for plain decoding, and one for each draft."""
  import numpy as np

  from gkd_jax.capacity import costs
  from gkd_jax.decoding import sampler, speculative
  from gkd_jax.evaluation import programs
  from gkd_jax.models import registry
  from gkd_jax.parallel import partitioning

  mesh = partitioning.make_mesh()
  target = _endless()(registry.published(_TARGET.value))
  draft = _oracle()(registry.published(_DRAFT.value))
  params = [_random_params(model) for model in (target, draft)]
  ids = target.config.special_ids(target.config.vocab_size)
  shape = {
    'max_decode_len': _TARGETS.value,
    'ids': ids,
    'seed': 0,
    'mesh': mesh,
  }
  plain = programs.make_write(target, sampler.GREEDY, **shape)
  numbers = np.arange(batch_size, dtype=np.int32)
  rng = np.random.default_rng(0)
  inputs = rng.integers(2, ids.num_ids, (batch_size, _INPUTS.value), np.int32)
  tokens = plain(params[0], numbers, inputs)[:, 0]

  # {(length, rate): function}
  drafted, efficiency = {}, {}
  for length in map(int, _LENGTHS.value):
    write = programs.make_drafted_write(
      target,
      draft,
      sampler.GREEDY,
      speculative.Drafting(length),
      **shape,
    )
    for rate in map(float, _RATES.value):
      both = (params[0], params[1] | {'oracle': _proposals(tokens, rate)})
      run = functools.partial(write, both, numbers, inputs)
      written, (counts,) = run()
      np.testing.assert_array_equal(written[:, 0], tokens)
      drafted[length, rate] = run
      efficiency[length, rate] = tokens.size / counts.rounds.sum()

  seconds = {None: []} | {key: [] for key in drafted}
  runs = {None: functools.partial(plain, params[0], numbers, inputs)} | drafted
  for _ in range(_ROUNDS.value):
    for key, run in runs.items():
      start = time.perf_counter()
      run()
      seconds[key].append(time.perf_counter() - start)
  shape = {
    'batch_size': batch_size,
    'input_length': _INPUTS.value,
    'target_length': _TARGETS.value,
  }
  rows = []
  for key, of_key in seconds.items():
    length, rate = key or (None, None)
    if key is None:
      cost = costs.of_rollout(target.config, **shape)
    else:
      cost = costs.of_drafted(
        target.config,
        draft.config,
        draft_length=length,
        block_efficiency=efficiency[key],
        **shape,
      )
    rows.append(
      {
        'system': 'gkd_jax',
        'rows': batch_size,
        'length': length,
        'rate': rate,
        'block_efficiency': efficiency.get(key),
        'ms': 1e3 * min(of_key) / _TARGETS.value,
        'speedup': min(seconds[None]) / min(of_key),
        'floor_ms': 1e3 * cost.seconds(peak, bandwidth) / _TARGETS.value,
      }
    )
  return rows


def _random_params(model):
  """Returns random parameters, made by NumPy: to compile them takes longer."""
  import jax
  import numpy as np

  from gkd_jax.models.params import init_params

  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

  def draw(leaf):
    noise = rng.standard_normal(leaf.shape, np.float32)
    return jax.device_put(noise * np.float32(leaf.shape[0] ** -0.5))

  return jax.tree.map(draw, shapes)


def _proposals(tokens, rate: float):
  """Returns the draft's tokens [B, T]: those of the target at this rate."""
  import numpy as np

  is_right = np.random.default_rng(1).random(tokens.shape) < rate
  return np.where(is_right, tokens, tokens % 1000 + 2).astype(np.int32)


def _endless():
  """Returns a class of T5s that never write EOS."""
  from gkd_jax.batch import MASKED_LOGIT
  from gkd_jax.models import registry

  class Endless(registry.FAMILIES['t5'].model):
    """Never writes EOS, so that every output has full length."""

    def unembed(self, hidden):
      logits = super().unembed(hidden)
      return logits.at[..., self.config.eos_id].set(MASKED_LOGIT)

  return Endless


def _oracle():
  """Returns a class of T5s that propose given tokens."""
  import jax
  import jax.numpy as jnp

  from gkd_jax.models import registry

  class Oracle(registry.FAMILIES['t5'].model):
    """Computes as always; then the token of params['oracle'] is the best."""

    def decode_block(self, cache, offsets_B, tokens_BN):
      logits, cache = super().decode_block(cache, offsets_B, tokens_BN)
      oracle_BT = self.variables['params']['oracle']
      at_BN = offsets_B[:, None] + jnp.arange(tokens_BN.shape[1])
      at_BN = jnp.minimum(at_BN, oracle_BT.shape[1] - 1)
      best_BN = jnp.take_along_axis(oracle_BT, at_BN, axis=1)
      is_best = jax.nn.one_hot(best_BN, logits.shape[-1], dtype=bool)
      return jnp.where(is_best, 1e6, logits), cache

  return Oracle


# --- transformers -------------------------------------------------------------


def _measure_torch() -> list[dict]:
  """Returns the rows of transformers, from a process of its own."""
  from gkd_jax.models import registry

  work = {
    name: {
      'vocab_size': c.vocab_size,
      'd_model': c.emb_dim,
      'd_kv': c.head_dim,
      'd_ff': c.mlp_dim,
      'num_layers': c.num_encoder_layers,
      'num_decoder_layers': c.num_decoder_layers,
      'num_heads': c.num_heads,
    }
    for name, c in (
      ('target', registry.published(_TARGET.value)),
      ('draft', registry.published(_DRAFT.value)),
    )
  }
  work |= {
    'inputs': _INPUTS.value,
    'targets': _TARGETS.value,
    'lengths': [*map(int, _LENGTHS.value)],
    'rates': [*map(float, _RATES.value)],
    'rounds': _ROUNDS.value,
  }
  finished = subprocess.run(
    [
      _TORCH_PYTHON.value,
      str(_HERE / 'bench_assisted.py'),
      json.dumps(work),
    ],
    capture_output=True,
    text=True,
    check=False,
    encoding='utf-8',
  )
  if finished.returncode:
    raise SystemExit(f'transformers failed:\n{finished.stderr[-4000:]}')
  return json.loads(finished.stdout.strip().splitlines()[-1])


if __name__ == '__main__':
  app.run(main)
