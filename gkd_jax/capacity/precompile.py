# SPDX-License-Identifier: Apache-2.0
"""Compiles an experiment's train step for a TPU slice, without a TPU.

Reports whether the step compiles and fits into memory, the communication
between devices, and a lower bound of the step time. Nothing is executed, and
neither data nor parameters are read: libtpu's compiler needs only shapes.

The program is the one that `train` runs; `build` makes both. Facts that a run
reads from files are assumed: the vocabulary has as many ids as the models'
embeddings and one token for each word of a reward's settings; parameters of
teacher and reward model are float32 unless a dtype is set.
"""

import functools
import importlib.metadata
import importlib.util
import json
import math
import operator
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from gkd_jax import build
from gkd_jax.batch import Batch, SpecialIds
from gkd_jax.capacity import calls, collectives, costs, roofline
from gkd_jax.checkpoints import pretrained
from gkd_jax.distill.grading import make_grader
from gkd_jax.distill.methods import Method
from gkd_jax.distill.state import Frozen
from gkd_jax.experiment import (
  Experiment,
  RewardModel,
  Teacher,
  check,
  setting_of,
)
from gkd_jax.models import registry
from gkd_jax.models.interface import ModelConfig
from gkd_jax.models.params import count_params
from gkd_jax.parallel import partitioning
from gkd_jax.runtime import console, files, paths

# Takes the place of the compiler's error message.
_NOT_COMPILED = 'not compiled: the arguments of the program alone are too large'
_NO_COST = costs.Cost(0.0, 0.0)
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def precompile(
  experiment: Experiment,
  topology: str,
  output: str | None = None,
  overwrite: bool = False,
) -> dict[str, Any]:
  """Compiles the train step; prints and returns memory and time per device.

  Args:
    experiment: the experiment, as for `train`. If the shape of the teacher or
      of the reward model is not set, it is read from the checkpoint's config.
    topology: see `find_devices`.
    output: JSON file for the returned report; None: no file.
    overwrite: replace the file if it exists.

  Returns:
    A description of the program; bytes on each device (see `_memory`); and the
    figures of each phase (see `_times`).

  Raises:
    ValueError: settings contradict each other, there is no such topology, or
      libtpu is missing.
  """
  # Must precede JAX's initialisation, so that a TPU of this machine stays free.
  jax.config.update('jax_platforms', 'cpu')
  devices = find_devices(topology)
  check(experiment, with_checkpoints=False)
  if output is not None:
    output = paths.resolve(output, '--output')
    files.check_free([output], '--output', overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
  planned = _plan(experiment, experiment.mesh.make(devices))
  console.log(
    f'Compiling the step for {len(devices)} x {devices[0].device_kind}.'
  )
  start = time.monotonic()
  given = {
    'student_params': _bytes_on_a_device(planned.plan.state.params),
    'optimizer_state': _bytes_on_a_device(planned.plan.state.opt_state),
    'teacher_params': _bytes_on_a_device(planned.teacher.params),
    'reward_params': _bytes_on_a_device(planned.reward.params),
    'batch': _bytes_on_a_device(planned.batch),
  }
  compiled, refusal = _compile(
    _available(topology),
    sum(given.values()),
    planned.train_step,
    planned.plan.state,
    Frozen(planned.teacher.params, planned.reward.params),
    planned.batch,
  )
  compile_seconds = time.monotonic() - start
  needs_teacher = experiment.method.needs_teacher_checkpoint
  report = {
    'topology': topology,
    'device_kind': devices[0].device_kind,
    'num_devices': len(devices),
    **_describe_run(experiment, planned),
    'compile_seconds': round(compile_seconds, 1),
    **_memory(topology, compiled, refusal, given, needs_teacher),
    **_costs(experiment, planned, compiled, topology),
    'versions': _versions(),
  }
  if output is not None:
    files.write_atomically(output, json.dumps(report, indent=2) + '\n')
  print(format_report(report))
  return report


class _Planned(NamedTuple):
  """A step and its arguments: shapes, dtypes and shardings."""

  plan: build.Plan
  teacher: build.Model
  reward: build.Model
  batch: Batch
  train_step: Callable[..., Any]
  ids: SpecialIds
  mesh: jax.sharding.Mesh


def _plan(experiment: Experiment, mesh: jax.sharding.Mesh) -> _Planned:
  """Builds the step of `train` without reading data or parameters."""
  plan = build.make_plan(experiment, mesh)
  student = experiment.student.config
  teachers, reward_model = _shapes(experiment)
  ids = student.special_ids(
    min(model.vocab_size for model in (student, *teachers.values()) if model)
  )
  settings = experiment.teacher.named
  teacher = build.together(
    {
      name: build.plan_frozen(
        config, settings[name].dtype, experiment, mesh, settings[name]
      )
      for name, config in teachers.items()
    }
  )
  reward_model = build.plan_frozen(
    reward_model,
    experiment.reward_model.dtype,
    experiment,
    mesh,
    experiment.teacher.of_the_reward,
  )
  reward_fn = None
  if experiment.method.reward is not None:
    reward_fn = experiment.method.reward.make_reward_fn(
      _WordVocabulary(), ids, reward_model.module
    )
  train_step = build.make_train_step(
    experiment, plan, teacher=teacher.module, ids=ids, reward_fn=reward_fn
  )
  batch = build.abstract_batch(experiment.data.train, mesh)
  return _Planned(plan, teacher, reward_model, batch, train_step, ids, mesh)


def _shapes(
  experiment: Experiment,
) -> tuple[dict[str, ModelConfig | None], ModelConfig | None]:
  """Returns the shapes of the teachers, by name, and of the reward's model.

  Raises:
    ValueError: one is needed, and neither its shape nor a checkpoint is named.
  """
  method = experiment.method
  teachers = {
    name: _shape(one, setting_of('TEACHER_CHECKPOINT_PATH', name))
    for name, one in experiment.teacher.named.items()
  }
  if None in teachers.values() and method.needs_teacher_checkpoint:
    raise ValueError(
      'This method needs a teacher: set its shape, experiment.Teacher.config '
      '(see TEACHER_SIZE in gin/models/published.gin), or '
      'TEACHER_CHECKPOINT_PATH.'
    )
  if method.reward is None or not method.reward.needs_model:
    return teachers, None
  reward = _shape(experiment.reward_model, 'REWARD_CHECKPOINT_PATH')
  if reward is None:
    raise ValueError(
      'This REWARD needs a model: set its shape, experiment.RewardModel.config '
      '(see configs/xsum/rl_gkd.gin), or REWARD_CHECKPOINT_PATH.'
    )
  return teachers, reward


def _shape(part: Teacher | RewardModel, setting: str) -> ModelConfig | None:
  if part.config is not None or part.checkpoint_path is None:
    return part.config
  return pretrained.open_checkpoint(part.checkpoint_path, setting).config


def _describe_run(experiment: Experiment, planned: _Planned) -> dict[str, Any]:
  """Returns the part of the report that describes the program."""
  dataset = experiment.data.train
  teacher = planned.teacher
  models = {
    'student': (planned.plan.student, planned.plan.state.params),
    **(
      {
        f'teacher {name}': (module, teacher.params[name])
        for name, module in teacher.module.items()
      }
      if experiment.teacher.names
      else {'teacher': teacher[:2]}
    ),
    'reward': planned.reward[:2],
  }
  return {
    'mesh': dict(planned.mesh.shape),
    **{
      role: module and _describe(module.config, params)
      for role, (module, params) in models.items()
    },
    'batch_size': dataset.batch_size,
    'num_microbatches': experiment.optimization.num_microbatches,
    'feature_lengths': dict(dataset.task_feature_lengths),
    'num_ids': planned.ids.num_ids,
  }


def _costs(
  experiment: Experiment,
  planned: _Planned,
  compiled: jax.stages.Compiled | None,
  topology: str,
) -> dict[str, Any]:
  """Returns the parts of the report about caches and times."""
  dataset = experiment.data.train
  data = planned.mesh.shape['data']
  student = planned.plan.student
  caches = costs.cache_bytes(
    student.config,
    batch_size=dataset.batch_size // data,
    input_length=dataset.task_feature_lengths['inputs'],
    target_length=dataset.task_feature_lengths['targets'],
  )
  graders = [
    _reader(model, input_length)
    for model, input_length in _graders(experiment.method, planned)
  ]
  called, not_counted = _called(experiment, planned, graders)
  # Reads gradient, parameters and optimizer state; writes the latter two.
  optimizer_bytes = 3 * _bytes_on_a_device(
    planned.plan.state.params
  ) + 2 * _bytes_on_a_device(planned.plan.state.opt_state)
  phases = {
    **_of_comparison(experiment, planned, graders),
    **called,
    'optimizer': costs.Cost(0.0, optimizer_bytes),
  }
  return {
    'caches': caches // student.placement.num_shards('heads'),
    **_times(
      compiled,
      {name: phases[name] for name in roofline.PHASES if name in phases},
      topology,
      dataset.task_feature_lengths['targets'],
    ),
    'not_counted': not_counted,
  }


class _Reader(NamedTuple):
  """A model on one device, as `costs` counts it."""

  config: ModelConfig
  shards: int  # devices that share each matrix product
  weight_bytes: int
  input_length: int

  def cost(self, function: Callable[..., costs.Cost], **sizes) -> costs.Cost:
    """Returns the cost on one device by a function of `costs`."""
    whole = function(
      self.config,
      input_length=self.input_length,
      weight_bytes=self.weight_bytes,
      **sizes,
    )
    return whole.times(1 / self.shards)


def _reader(model: build.Model, input_length: int) -> _Reader:
  return _Reader(
    model.module.config,
    model.module.placement.num_shards('mlp'),
    _itemsize(model.params),
    input_length,
  )


def _of_comparison(
  experiment: Experiment, planned: _Planned, graders: Sequence[_Reader]
) -> dict[str, costs.Cost]:
  """Returns the phases that compare given outputs, on one device."""
  dataset, student = experiment.data.train, planned.plan.student

  def with_teacher(teacher: _Reader | None):
    phases = roofline.on_a_device(
      student.config,
      teacher and teacher.config,
      batch_size=dataset.batch_size,
      input_length=dataset.task_feature_lengths['inputs'],
      target_length=dataset.task_feature_lengths['targets'],
      num_microbatches=experiment.optimization.num_microbatches,
      data=planned.mesh.shape['data'],
      student_model=student.placement.num_shards('mlp'),
      teacher_model=teacher.shards if teacher else 1,
      teacher_weight_bytes=teacher.weight_bytes if teacher else 4,
      teacher_input_length=teacher and teacher.input_length,
      num_outputs=experiment.method.policy.num_outputs,
    )
    del phases['sampling']  # see `_called`
    return phases

  alone = with_teacher(None)
  if not experiment.method.needs_grades:
    return alone
  total, *others = map(with_teacher, graders)
  for more in others:
    total = {
      name: cost + more[name] + alone.get(name, _NO_COST).times(-1)
      for name, cost in total.items()
    }
  return total


def _called(
  experiment: Experiment, planned: _Planned, graders: Sequence[_Reader]
) -> tuple[dict[str, costs.Cost], list[str]]:
  """Returns the phases that policy and credit call, and what has no cost.

  Costs are those on one device; see `calls`. In a step without dropout and
  microbatches the student's encoder runs in a phase of its own.
  """
  dataset, method = experiment.data.train, experiment.method
  student = planned.plan.student.config
  parts = experiment.optimization.num_microbatches
  data = planned.mesh.shape['data']
  num_rows = dataset.batch_size * method.policy.num_outputs // parts
  target_length = dataset.task_feature_lengths['targets']
  ours = _Reader(
    student,
    planned.plan.student.placement.num_shards('mlp'),
    costs.WIDTHS[student.dtype],
    dataset.task_feature_lengths['inputs'],
  )
  shares_encoder = (
    parts == 1
    and student.dropout_rate == 0.0
    and method.policy.buffer_rows is None
  )

  def rollout(reader, rows, with_encoder):
    # Sampling reads weights and cache in the dtype of the activations.
    width = min(reader.weight_bytes, costs.WIDTHS[reader.config.dtype])
    return reader._replace(weight_bytes=width).cost(
      costs.of_rollout,
      batch_size=rows,
      target_length=target_length,
      with_encoder=with_encoder,
    )

  def forward(reader, with_encoder):
    return reader.cost(
      costs.of_forward,
      batch_size=dataset.batch_size // data // parts,
      target_length=target_length,
      with_encoder=with_encoder,
    ).times(parts)

  def unembed(reader):
    tokens = num_rows // data * target_length
    cost = costs.of_unembed(reader.config, tokens, reader.weight_bytes)
    return cost.times(parts / reader.shards)

  def flops(number):
    return sum(cost.flops for cost in _of_phases(of, number).values())

  rows = dataset.batch_size // data
  of = {'sample_student': {'sampling': rollout(ours, rows, False)}}
  if method.policy.needs_teacher:
    theirs = graders[0]
    with_encoder = rollout(theirs, rows, True)
    alone = rollout(theirs, rows, False)
    sampling = alone
    if (drafting := method.teacher_drafting) is not None:
      # At best the teacher accepts all tokens that the student drafts.
      sampling = alone._replace(bytes=alone.bytes / (drafting.length + 1))
    both = forward(ours, not shares_encoder) + forward(theirs, True)
    of['sample_teacher'] = {
      'teacher_encoder': with_encoder + alone.times(-1),
      'sampling': sampling,
    }
    of['compare'] = {'compare': both}
    of['sample_pair'] = _of_phases(
      of, {'sample_student': 1, 'sample_teacher': 1}
    )
  found = calls.of_policy(
    method.policy,
    planned.batch,
    planned.plan.state.carried.policy,
    flops,
  )
  not_counted = []
  if method.credit is not None:
    of_reward, not_counted = _of_reward(experiment, planned, num_rows)
    readers = [ours, *(graders if method.needs_grades else [])]
    of |= {
      'compute_rewards': {'reward': of_reward},
      'log_probs': {
        'credit': functools.reduce(operator.add, map(unembed, readers))
      },
      'sample_greedy': {
        'sampling': rollout(ours, num_rows // data, not shares_encoder).times(
          parts
        )
      },
    }
    found += calls.of_credit(
      method.credit,
      num_rows,
      target_length,
      all_by_student=method.policy.student_data_fraction == 1.0,
      has_teacher=method.needs_grades,
      outputs_per_input=method.policy.num_outputs,
      weigh=flops,
    )
  return _of_phases(of, found), not_counted


def _of_phases(
  of: Mapping[str, Mapping[str, costs.Cost]], calls: Mapping[str, int]
) -> dict[str, costs.Cost]:
  """Returns {phase: cost} of calls.

  Args:
    of: {what is called: {phase: cost of one call}}.
    calls: {what is called: how often}.
  """
  phases = {}
  for name, number in calls.items():
    for phase, cost in of[name].items():
      phases[phase] = phases.get(phase, _NO_COST) + cost.times(number)
  return phases


def _of_reward(
  experiment: Experiment, planned: _Planned, num_rows: int
) -> tuple[costs.Cost, list[str]]:
  """Returns the cost of a reward on one device, and what it lacks.

  Args:
    experiment: whose method's credit may have a reward.
    planned: its models.
    num_rows: outputs in a microbatch, on all devices.
  """
  reward, (module, params, _) = experiment.method.reward, planned.reward
  if reward is None:
    return _NO_COST, []
  if module is None:
    return _NO_COST, ['the reward']
  data = planned.mesh.shape['data']
  total, not_counted = _NO_COST, []
  for call in calls.of_reward(
    lambda model: reward.make_reward_fn(_WordVocabulary(), planned.ids, model),
    module,
    params,
    batch_size=num_rows,
    lengths=experiment.data.train.task_feature_lengths,
  ):
    cost = costs.of_call(
      module.config,
      call.method,
      [(rows // data, *rest) for rows, *rest in call.shapes],
      _itemsize(params),
    )
    if cost is None:
      not_counted.append(f"{call.method} of the reward's model")
    else:
      total += cost
  parts = experiment.optimization.num_microbatches
  return total.times(parts / module.placement.num_shards('mlp')), not_counted


def _graders(
  method: Method, planned: _Planned
) -> list[tuple[build.Model, int]]:
  """Returns (model, tokens of its inputs) of each pass of a teacher."""
  if not method.needs_teacher:
    return []
  state, teacher = planned.plan.state, planned.teacher
  params = method.teacher.params(
    teacher.params, state.params, state.carried.teacher
  )
  grader = make_grader(method.teacher, planned.plan.student, teacher.module)
  return [
    (
      build.Model(reading.model, reading.params_of(params)),
      getattr(planned.batch, reading.reads).shape[1],
    )
    for reading in grader.readings
  ]


def find_devices(topology: str) -> Sequence[jax.Device]:
  """Returns the devices of a slice, for compilation only.

  Args:
    topology: generation and chips along each axis: 'v5e:4x4', 'v4:2x2x4'. Or
      'cpu:8': eight simulated devices, which check a mesh and its shardings on
      any machine, but not the memory of a TPU.

  Raises:
    ValueError: the topology is invalid, or libtpu is missing.
  """
  generation, _, layout = topology.partition(':')
  if generation == 'cpu' and re.fullmatch('[1-9][0-9]*', layout):
    return _simulated_devices(int(layout))
  if generation not in roofline.CHIPS or not re.fullmatch(
    r'\d+(x\d+){1,2}', layout
  ):
    raise ValueError(
      f'--topology={topology} is invalid: it must be one of '
      f'{", ".join(roofline.CHIPS)} with the chips along each axis, e.g. '
      'v5e:4x4 or v4:2x2x4; or cpu:8, eight simulated devices.'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      f'--topology={topology} needs the TPU compiler: pip install -e ".[tpu]" '
      'in the folder of gkd_jax (libtpu; Linux on x86-64, no TPU needed). '
      '--topology=cpu:8 works without it.'
    )
  # libtpu queries the TPU host's metadata, takes a lock on the host and writes
  # logs, unless these are set.
  for name, value in {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',  # any valid type
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_LOG_DIR': 'disabled',
  }.items():
    os.environ.setdefault(name, value)
  options = {}
  if roofline.CHIPS[generation].config is not None:
    options['chip_config_name'] = roofline.CHIPS[generation].config
  if layout == '1x1':  # libtpu's default is four chips per host
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **options
    ).devices
  except jax.errors.JaxRuntimeError as e:
    raise ValueError(f'--topology={topology}: libtpu failed: {e}') from e


def _simulated_devices(number: int) -> Sequence[jax.Device]:
  try:
    jax.config.update('jax_num_cpu_devices', number)
  except RuntimeError:
    pass  # JAX is initialised: its number of devices is fixed
  devices = partitioning.available_devices('cpu')
  if len(devices) < number:
    raise ValueError(
      f'--topology=cpu:{number}: JAX is already initialised with '
      f'{len(devices)} devices.'
    )
  return devices[:number]


class _WordVocabulary:
  """A stand-in for the task's vocabulary: each word is one token."""

  unk_id = 2
  vocab_size = 2**31 - 1  # accepts all ids in a reward's settings

  def __init__(self):
    self._ids = {}

  def encode(self, text: str) -> list[int]:
    return [
      self._ids.setdefault(word, len(self._ids) + 3) for word in text.split()
    ]


def _compile(
  available, given, *arguments
) -> tuple[jax.stages.Compiled | None, str | None]:
  """Returns the program, or the compiler's out-of-memory message."""
  if available is not None and given > available:
    return None, _NOT_COMPILED
  try:
    return build.compile_step(*arguments), None
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return None, str(e)


def _memory(topology, compiled, refusal, given, needs_teacher):
  """Returns the part of the report about memory.

  memory: bytes on each device; None if unknown. `total` is the peak of a run:
    arguments, temporaries and program. If the compiler failed, it is the size
    in its message; if it was not called, the size of the arguments.
  fits: None for simulated devices, which have no memory limit.
  """
  if compiled is None:
    rest = dict.fromkeys(('padding', 'outputs', 'temporaries', 'program'))
    total = _needed(refusal)
    if refusal == _NOT_COMPILED:
      total = sum(given.values())
  else:
    stats = compiled.memory_analysis()
    arguments = sum(given.values())
    if not needs_teacher:
      arguments -= given['teacher_params']  # in memory for evaluations only
    rest = {
      # Of the arguments' layouts; the program drops unused arguments.
      'padding': max(0, stats.argument_size_in_bytes - arguments),
      'outputs': stats.output_size_in_bytes - stats.alias_size_in_bytes,
      'temporaries': stats.temp_size_in_bytes,
      'program': stats.generated_code_size_in_bytes,
    }
    total = sum(given.values()) + sum(rest.values())
  available = _available(topology)
  left = fits = None
  if available is not None:
    left = None if total is None else available - total
    fits = compiled is not None and left >= 0
  return {
    'memory': {**given, **rest, 'total': total, 'available': available},
    'left': left,
    'fits': fits,
    'refusal': refusal,
  }


def _chip(topology: str) -> roofline.Chip | None:
  return roofline.CHIPS.get(topology.partition(':')[0])


def _available(topology: str) -> int | None:
  """Returns the bytes that a device has; None for simulated devices."""
  chip = _chip(topology)
  return None if chip is None else int(chip.available * 2**30)


def _times(compiled, cost, topology, max_decode_len):
  """Returns the part of the report about times.

  phases: see `roofline.of_phases`.
  step_seconds: lower bound of a step that takes the costliest way through its
    policy; None for simulated devices.
  sampling_share: fraction of `step_seconds` spent on sampling.
  collectives: see `roofline.summary`; None if nothing was compiled.
  """
  found = None
  if compiled is not None:
    found = collectives.find(compiled.as_text(), max_decode_len)
  phases = roofline.of_phases(cost, found, _chip(topology))
  step_seconds = sampling_share = None
  if found is not None and _chip(topology) is not None:
    step_seconds = sum(phase['seconds'] for phase in phases.values())
    sampling = phases.get('sampling', {'seconds': 0.0})
    sampling_share = sampling['seconds'] / step_seconds
  return {
    'phases': phases,
    'step_seconds': step_seconds,
    'sampling_share': sampling_share,
    'collectives': None
    if compiled is None
    else roofline.summary(found, phases),
  }


def _itemsize(params) -> int:
  leaves = jax.tree.leaves(params)
  return leaves[0].dtype.itemsize if leaves else 4


def _bytes_on_a_device(tree) -> int:
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _needed(refusal: str) -> int | None:
  """Returns the bytes that a program needs, from the compiler's message."""
  match = re.search(
    r'\(([\d.]+)([KMGT]?)\) exceeds available HBM|Used ([\d.]+)([KMGT]?) of',
    refusal,
  )
  if match is None:
    return None
  number, unit = (x for x in match.groups() if x is not None)
  return int(float(number) * _UNITS.get(unit, 1))


def _describe(config: ModelConfig, params) -> dict[str, Any]:
  return {
    'architecture': registry.describe(config),
    'num_params': count_params(params),
    'dtype': jax.tree.leaves(params)[0].dtype.name,
  }


def _versions() -> dict[str, str]:
  installed = {'jax', 'jaxlib'}
  if importlib.util.find_spec('libtpu') is not None:
    installed.add('libtpu')
  return {name: importlib.metadata.version(name) for name in sorted(installed)}


def format_report(report: dict[str, Any]) -> str:
  """Returns a report of `precompile` as text."""
  mesh = ' x '.join(f'{name} {size}' for name, size in report['mesh'].items())
  lines = [
    f'{report["topology"]}: {report["num_devices"]} x '
    f'{report["device_kind"]}, mesh {mesh}'
  ]
  for role, model in report.items():
    if isinstance(model, dict) and 'architecture' in model:
      lines.append(
        f'{role}: {model["architecture"]}, {model["num_params"]:,} '
        f'{model["dtype"]} parameters'
      )
  lengths = report['feature_lengths']
  lines += [
    f'batch: {report["batch_size"]} in {report["num_microbatches"]} part(s), '
    f'{lengths["inputs"]} tokens in, {lengths["targets"]} out',
    f'compiled in {report["compile_seconds"]} s',
    '',
    'memory of each device',
  ]
  for name, size in report['memory'].items():
    lines.append(f'  {name.replace("_", " "):20}{_size(size):>12}')
  lines += [
    f'  of the temporaries, KV cache {_size(report["caches"])}',
    '',
    'each device, per step',
    f'  {"":16}{"TFLOP":>10}{"GiB read":>10}{"GiB received":>14}'
    + ('' if report['step_seconds'] is None else f'{"ms at least":>13}'),
  ]
  for name, phase in report['phases'].items():
    row = (
      f'  {name.replace("_", " "):16}{phase["flops"] / 1e12:>10.3f}'
      f'{phase["bytes"] / 2**30:>10.3f}{_gib(phase["received"]):>14}'
    )
    if 'seconds' in phase:
      row += f'{1e3 * phase["seconds"]:>13.2f}  {phase["bound_by"]}'
    lines.append(row)
  if report['not_counted']:
    lines.append(f'  not counted: {", ".join(report["not_counted"])}')
  if report['step_seconds'] is not None:
    lines.append(
      f'  {"step":50}{1e3 * report["step_seconds"]:>13.2f}  sampling: '
      f'{report["sampling_share"]:.0%}'
    )
  if report['collectives']:
    lines += ['', 'communication between devices, per step']
    for one in report['collectives']:
      row = (
        f'  {one["phase"].replace("_", " "):16}{one["kind"]:20}'
        f'{one["times"]:>6} times{_size(int(one["received"])):>13}'
      )
      lines.append(row + ('  in sampling' if one['in_decode_loop'] else ''))
  lines += ['', _verdict(report)]
  return '\n'.join(lines)


def _gib(num_bytes: float | None) -> str:
  return '' if num_bytes is None else f'{num_bytes / 2**30:.3f}'


def _verdict(report: dict[str, Any]) -> str:
  if report['fits'] is None:
    return (
      'It compiles. Simulated devices have no memory limit to check against.'
    )
  if report['fits']:
    return f'It fits: {_size(report["left"])} are left on each device.'
  missing = report['left'] and -report['left']
  return (
    f'It does not fit: {_size(missing)} are missing on each device. To save '
    'memory use a larger slice or experiment.MeshConfig.model, more\n'
    'experiment.Optimization.num_microbatches, REMAT=True, '
    'ACTIVATION_DTYPE=bfloat16, or experiment.Teacher.dtype=bfloat16.'
    + (f'\nThe compiler: {report["refusal"]}' if report['refusal'] else '')
  )


def _size(num_bytes: int | None) -> str:
  """Returns e.g. '1.50 GiB'."""
  if num_bytes is None:
    return 'not known'
  for unit in ('GiB', 'MiB'):
    if num_bytes >= (one := _UNITS[unit[0]]):
      return f'{num_bytes / one:.2f} {unit}'
  return f'{num_bytes / 2**10:.2f} KiB'
