# SPDX-License-Identifier: Apache-2.0
"""Times one step of on-policy distillation in gkd_jax and other systems.

    python scripts/bench_step.py --peers=torch --torch_python=PATH

It prints, for gkd_jax and its peers on this machine: the time of each phase and
of the step, with the share of the floor (FLOPs over the measured peak of matrix
products, or bytes over the measured bandwidth), compile time and peak memory.

All systems do the same work: random weights of the same shapes, inputs and
outputs without padding (EOS is never drawn), sampling at temperature 1 from the
full vocabulary, one divergence, AdamW. The systems take turns, each in a new
process. Times are medians over all processes of a system, after warm-up.
"""

import dataclasses
import functools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

from absl import app, flags

_STUDENT = flags.DEFINE_string(
  'student',
  't5_1_1_small',
  'A published size, or six numbers: vocab_size,emb_dim,num_heads,head_dim,'
  'mlp_dim,num_layers, such as 384,16,2,8,32,1.',
)
_TEACHER = flags.DEFINE_string('teacher', 't5_1_1_base', 'See --student.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Number of inputs.')
_INPUTS = flags.DEFINE_integer('inputs', 128, 'Tokens per input.')
_TARGETS = flags.DEFINE_integer('targets', 64, 'Tokens per output.')
_DIVERGENCE = flags.DEFINE_enum(
  'divergence',
  'generalized_jsd',
  ['forward_kl', 'reverse_kl', 'generalized_jsd'],
  'Divergence to minimise; the JSD has beta 0.5.',
)
_CHUNK_TOKENS = flags.DEFINE_integer(
  'chunk_tokens', 256, 'Objective.chunk_tokens of gkd_jax; 256 is best on CPU.'
)
_DTYPES = flags.DEFINE_list(
  'dtypes', 'float32,bfloat16', 'Types of operands; weights are float32.'
)
_PEERS = flags.DEFINE_list('peers', [], 'Systems to compare: torch, t5x.')
_TORCH_PYTHON = flags.DEFINE_string(
  'torch_python', sys.executable, 'A Python with torch, transformers and trl.'
)
_T5X_PYTHON = flags.DEFINE_string(
  't5x_python', sys.executable, 'A Python that can import t5x.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Processes per system.')
_STEPS = flags.DEFINE_integer('steps', 5, 'Timed steps per process.')
_WARMUP = flags.DEFINE_integer('warmup', 2, 'Steps before the timed ones.')
_JSON = flags.DEFINE_string('json', None, 'File to write all figures to.')
_WORKER = flags.DEFINE_string('worker', None, 'Internal.')

_HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent))  # gkd_jax of this checkout
_PHASES = ('student_encoder', 'sampling', 'teacher', 'student', 'optimizer')
# glibc allocates large buffers in huge pages and does not return them to the
# operating system, which makes all systems faster by tens of percent. There is
# one arena, because additional arenas return large buffers.
_MALLOC = (
  'glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:'
  'glibc.malloc.trim_threshold=34359738368:glibc.malloc.top_pad=268435456'
)


def main(argv: list[str]) -> None:
  """Measures all systems in turn and prints the table."""
  del argv
  if _WORKER.value:
    print(json.dumps(_measure(json.loads(_WORKER.value))))
    return
  work = _work()
  contenders = _contenders()
  results = {name: [] for name in contenders}
  machine = _run(
    [sys.executable, __file__, '--worker', json.dumps({'machine': True})]
  )
  for i in range(_ROUNDS.value):
    for name, (program, dtype) in contenders.items():
      print(f'round {i + 1}: {name}', file=sys.stderr, flush=True)
      results[name].append(
        _run([*program, json.dumps(work | {'dtype': dtype})])
      )
  report = _report(work, machine, results)
  print(_table(work, report))
  if _JSON.value:
    pathlib.Path(_JSON.value).expanduser().write_text(
      json.dumps(report, indent=2) + '\n', encoding='utf-8'
    )


def _work() -> dict:
  """Returns the work of a step as JSON values."""
  from gkd_jax.models import registry

  def shape(size):
    if size in registry.SIZES:
      config = registry.published(size)
    else:
      *numbers, num_layers = map(int, size.split(','))
      config = registry.FAMILIES['t5'].config(*numbers, num_layers, num_layers)
    if _PEERS.value and config.family != 't5':
      raise app.UsageError(f'--peers run T5 alone, not {size}.')
    return registry.config_to_json(config)

  return {
    'student': shape(_STUDENT.value),
    'teacher': shape(_TEACHER.value),
    'batch': _BATCH.value,
    'inputs': _INPUTS.value,
    'targets': _TARGETS.value,
    'divergence': _DIVERGENCE.value,
    'chunk_tokens': _CHUNK_TOKENS.value,
    'warmup': _WARMUP.value,
    'steps': _STEPS.value,
  }


def _contenders() -> dict:
  """Returns {name: (command without the work, dtype)}, in order of turns."""
  programs = {
    'ours': [sys.executable, __file__, '--worker'],
    'torch': [_TORCH_PYTHON.value, str(_HERE / 'bench_torch.py')],
    't5x': [_T5X_PYTHON.value, str(_HERE / 'bench_t5x.py')],
  }
  if unknown := set(_PEERS.value) - set(programs):
    raise app.UsageError(
      f'--peers must be torch or t5x, got {sorted(unknown)}.'
    )
  return {
    f'{name}_{dtype}': (programs[name], dtype)
    for dtype in _DTYPES.value
    for name in ('ours', *_PEERS.value)
  }


def _run(command: list[str]) -> dict:
  """Runs a process, and returns the JSON in the last line of its output."""
  environment = os.environ | {'GLIBC_TUNABLES': _MALLOC}
  environment['TRL_EXPERIMENTAL_SILENCE'] = '1'
  finished = subprocess.run(
    command,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
    encoding='utf-8',
  )
  if finished.returncode:
    raise SystemExit(f'{command[:2]} failed:\n{finished.stderr[-4000:]}')
  return json.loads(finished.stdout.strip().splitlines()[-1])


# --- Measurement, in a separate process ---------------------------------------


def _measure(work: dict) -> dict:
  if 'machine' in work:
    return _measure_machine()
  return _measure_ours(work)


def _measure_machine() -> dict:
  """Measures peak FLOP/s and bandwidth, from which floors are computed.

  Each is the best of several shapes and runs.
  """
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

  peaks = {}
  for dtype in ('float32', 'bfloat16'):
    rates = []
    for m, k, n in ((2048, 2048, 2048), (1024, 768, 2048), (512, 768, 32128)):
      x, w = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
      product = functools.partial(
        jnp.matmul, preferred_element_type=jnp.float32
      )
      rates.append(2.0 * m * k * n / best(product, x, w))
    peaks[dtype] = max(rates)
  x = jnp.ones(2**28, jnp.float32)  # 1 GiB: larger than any cache
  return {
    'peak_flops': peaks,
    'bandwidth': 4.0 * x.size / best(jnp.sum, x),
    'device': jax.devices()[0].device_kind,
    'cores': os.cpu_count(),
    'jax': jax.__version__,
  }


def _measure_ours(work: dict) -> dict:
  import jax
  import jax.numpy as jnp
  import optax

  from gkd_jax.batch import MASKED_LOGIT, Batch
  from gkd_jax.decoding import rollout as rollout_lib
  from gkd_jax.decoding import sampler
  from gkd_jax.distill import chunked_sums, divergences, objectives, policies
  from gkd_jax.distill import state as state_lib
  from gkd_jax.distill import step as step_lib
  from gkd_jax.distill.methods import Method
  from gkd_jax.models import registry
  from gkd_jax.models.params import init_params

  def shape(name):
    config = registry.config_from_json(work[name])
    return dataclasses.replace(config, dtype=work['dtype'])

  class Endless(registry.FAMILIES[work['student']['family']].model):
    """Never draws EOS, so that every output has full length."""

    def decode_step(self, cache, tokens_B):
      logits, cache = super().decode_step(cache, tokens_B)
      return logits.at[:, self.config.eos_id].set(MASKED_LOGIT), cache

  student, teacher = (
    Endless(shape('student')),
    registry.make_model(shape('teacher')),
  )
  divergence = getattr(divergences, work['divergence'])
  if work['divergence'] == 'generalized_jsd':
    divergence = functools.partial(divergence, beta=0.5)
  objective = objectives.Objective(
    divergence, chunk_tokens=work['chunk_tokens']
  )
  optimizer = optax.adamw(1e-4)
  ids = student.config.special_ids(work['student']['vocab_size'])
  size = (work['batch'], work['inputs'])
  inputs = jax.random.randint(jax.random.key(0), size, 2, ids.num_ids)
  # Only the shape of the outputs is used: it is the maximum length of rollouts.
  targets = jnp.ones((work['batch'], work['targets']), jnp.int32)
  batch = Batch(inputs, targets, jnp.ones(targets.shape, jnp.float32))

  def init(model, seed):
    return jax.jit(functools.partial(init_params, model))(jax.random.key(seed))

  teacher_params = jax.tree.map(
    lambda x: x.astype(work['dtype']), init(teacher, 1)
  )
  state = state_lib.init_state(init(student, 2), optimizer)
  train_step = step_lib.make_train_step(
    student=student,
    teacher=teacher,
    method=Method(policy=policies.student(), objective=objective),
    optimizer=optimizer,
    ids=ids,
    seed=0,
  )
  frozen = state_lib.Frozen(teacher_params)
  start = time.perf_counter()
  compiled = (
    jax.jit(train_step, donate_argnums=0).lower(state, frozen, batch).compile()
  )
  compile_seconds = time.perf_counter() - start

  def run(function, *args, carried=0):
    """Times calls; `carried` results of a call are arguments of the next."""
    seconds = []
    for i in range(work['warmup'] + work['steps']):
      start = time.perf_counter()
      results = jax.block_until_ready(function(*args))
      if i >= work['warmup']:
        seconds.append(time.perf_counter() - start)
      if carried:
        args = (*results[:carried], *args[carried:])
    return seconds, results

  steps, (state, metrics) = run(compiled, state, frozen, batch, carried=1)
  assert metrics['target_tokens'] == targets.size, metrics
  assert metrics['on_policy'] == metrics['truncated'] == 1.0, metrics
  assert jnp.isfinite(metrics['loss'])
  peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

  # The phases, compiled separately.
  def encode(params, inputs):
    return student.apply({'params': params}, inputs, method='encode')

  def sample(params, encoded, inputs):
    return rollout_lib.rollout(
      rollout_lib.Writer(student, params, inputs, sampler.ANCESTRAL, encoded),
      jax.random.key(0),
      row_ids_B=jnp.arange(work['batch']),
      max_decode_len=work['targets'],
      ids=ids,
    ).tokens

  def loss(params, teacher_params, teacher_hidden, inputs, tokens):
    weights, _ = objectives.coefficients(
      jnp.ones(tokens.shape, jnp.float32), 'sequence'
    )
    return chunked_sums.weighted_sums(
      objective.terms(ids),
      step_lib.unembed(student),
      step_lib.unembed(teacher),
      objective.chunk_tokens,
      student.head_params(params),
      step_lib.hidden_states(student, params, inputs, tokens),
      teacher.head_params(teacher_params),
      teacher_hidden,
      tokens,
      weights,
    )['loss']

  def update(params, opt_state, grads):
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  phases = {}
  params = state.params
  phases['student_encoder'], encoded = run(jax.jit(encode), params, inputs)
  phases['sampling'], tokens = run(jax.jit(sample), params, encoded, inputs)
  phases['teacher'], teacher_hidden = run(
    jax.jit(functools.partial(step_lib.hidden_states, teacher)),
    teacher_params,
    inputs,
    tokens,
  )
  phases['student'], grads = run(
    jax.jit(jax.grad(loss)),
    params,
    teacher_params,
    teacher_hidden,
    inputs,
    tokens,
  )
  phases['optimizer'], _ = run(
    jax.jit(update, donate_argnums=(0, 1)),
    params,
    state.opt_state,
    grads,
    carried=2,
  )
  return {
    'step': steps,
    'phases': phases,
    'compile': compile_seconds,
    'peak_memory': peak_memory,
    'setting': f'jax {jax.__version__}: one program; {work["dtype"]} operands, '
    'float32 sums and master weights',
  }


# --- The report ---------------------------------------------------------------


def _report(work, machine, results) -> dict:
  """Returns every figure: medians in seconds, floors, and speedups."""
  report = {'work': work, 'machine': machine, 'contenders': {}}
  for name, rounds in results.items():
    dtype = name.rpartition('_')[2]
    floors = _floors(work, machine, dtype)
    medians = {
      phase: statistics.median(t for r in rounds for t in r['phases'][phase])
      for phase in rounds[0]['phases']
    }
    step = statistics.median(t for r in rounds for t in r['step'])
    report['contenders'][name] = {
      'step': step,
      'phases': medians,
      'floors': floors,
      'share_of_floor': floors['step'] / step,
      'tokens_per_second': work['batch'] * work['targets'] / step,
      'compile': rounds[0]['compile'],
      'peak_memory': max(r['peak_memory'] for r in rounds),
      'setting': rounds[0]['setting'],
      'rounds': rounds,
    }
  steps = {name: c['step'] for name, c in report['contenders'].items()}
  report['speedup'] = {
    name: seconds / steps[f'ours_{name.rpartition("_")[2]}']
    for name, seconds in steps.items()
    if not name.startswith('ours')
  }
  return report


def _floors(work, machine, dtype) -> dict:
  """Returns the minimum seconds of each phase, and of the step.

  The measured phase 'student' includes the encoder, which a step runs once.
  """
  from gkd_jax.capacity import costs
  from gkd_jax.models import registry

  width = {'float32': 4, 'bfloat16': 2}[dtype]
  cost = costs.of_step(
    registry.config_from_json(work['student']),
    registry.config_from_json(work['teacher']),
    batch_size=work['batch'],
    input_length=work['inputs'],
    target_length=work['targets'],
    weight_bytes=width,
    teacher_weight_bytes=width,
  )
  peak = machine['peak_flops'][dtype], machine['bandwidth']
  floors = {phase: cost[phase].seconds(*peak) for phase in _PHASES}
  floors['step'] = sum(floors.values())
  floors['student'] += floors['student_encoder']
  return floors


def _table(work, report) -> str:
  """Returns the figures as a Markdown table."""
  machine = report['machine']
  lines = [
    f'Batch {work["batch"]}, {work["inputs"]} tokens in, {work["targets"]} out,'
    f' {work["divergence"]}; {machine["cores"]} cores ({machine["device"]}), '
    f'jax {machine["jax"]}; peaks: '
    + ', '.join(
      f'{flops / 1e9:.0f} GFLOP/s {dtype}'
      for dtype, flops in machine['peak_flops'].items()
    )
    + f', {machine["bandwidth"] / 1e9:.0f} GB/s.',
    '',
    '| ms (share of its floor) | ' + ' | '.join(report['contenders']) + ' |',
    '|---' * (len(report['contenders']) + 1) + '|',
  ]

  def cell(contender, phase):
    seconds = contender['phases'].get(phase)
    if seconds is None:
      return ''
    share = contender['floors'][phase] / seconds
    return f'{1e3 * seconds:.0f} ({share:.0%})'

  contenders = report['contenders'].values()
  for phase in _PHASES:
    cells = ' | '.join(cell(c, phase) for c in contenders)
    lines.append(f'| {phase.replace("_", " ")} | {cells} |')
  rows = {
    '**step**': lambda c: (
      f'**{1e3 * c["step"]:.0f}** ({c["share_of_floor"]:.0%})'
    ),
    'target tokens/s': lambda c: f'{c["tokens_per_second"]:.0f}',
    'compile, s': lambda c: f'{c["compile"]:.1f}' if c['compile'] else '',
    'peak memory, GB': lambda c: f'{c["peak_memory"] / 1e9:.2f}',
  }
  for name, show in rows.items():
    lines.append(f'| {name} | {" | ".join(show(c) for c in contenders)} |')
  lines += [
    '',
    'The phase `student` is the forward and backward pass of the student with '
    'the objective, including its encoder.',
    *(f'- {name}: {c["setting"]}' for name, c in report['contenders'].items()),
    *(
      f'- {speedup:.2f} times as fast as {name}'
      for name, speedup in report['speedup'].items()
    ),
  ]
  return '\n'.join(lines)


if __name__ == '__main__':
  app.run(main)
