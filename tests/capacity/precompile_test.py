# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gkd_jax import build
from gkd_jax.capacity import costs, precompile, roofline
from gkd_jax.data import datasets
from gkd_jax.decoding import sampler
from gkd_jax.distill import (
  credit,
  divergences,
  entailment,
  objectives,
  policies,
  teachers,
)
from gkd_jax.models.params import count_params
from gkd_jax.models.t5 import T5Config
from tests import conftest, experiments

pytestmark = pytest.mark.slow  # compiles models

STUDENT = T5Config(259, 12, 2, 4, 10, 1, 1, dropout_rate=0.1)
LARGER_STUDENT = dataclasses.replace(STUDENT, vocab_size=264)
TEACHER = T5Config(262, 16, 2, 6, 14, 1, 1)
JSD = '--gin_file=configs/cmudict_g2p/on_policy_jsd_0.9.gin'
SFT = '--gin_file=configs/cmudict_g2p/sft.gin'
TINY_TEACHER = (
  '--gin.experiment.Teacher.config=@teacher/t5.T5Config()',
  *(
    f'--gin.teacher/t5.T5Config.{name}={value}'
    for name, value in {
      'vocab_size': 390,
      'emb_dim': 20,
      'num_heads': 2,
      'head_dim': 6,
      'mlp_dim': 24,
      'num_encoder_layers': 1,
      'num_decoder_layers': 2,
    }.items()
  ),
)

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu is not installed: pip install -e ".[tpu]" (Linux, x86-64)',
)


# --- It is the program that train runs ----------------------------------------


SETTINGS = {
  'student': STUDENT,
  'policy': policies.mixture(0.5, per='sequence'),
  'objective': objectives.Objective(
    functools.partial(divergences.generalized_jsd, beta=0.3)
  ),
  'optimizer': optax.adamw,
  'learning_rate': optax.linear_schedule(3e-2, 1e-2, 7),
  'seed': 5,
  'max_grad_norm': 0.7,
  'num_microbatches': 2,
  'student_sampler': sampler.SamplerConfig(temperature=0.6),
  'teacher_sampler': sampler.SamplerConfig(temperature=0.8),
}
# No task is looked up: of a dataset its sizes are read.
DATASET = datasets.DatasetConfig('none', conftest.LENGTHS, batch_size=8)
FOR_CPU = {'train_dataset': DATASET, 'topology': 'cpu:1'}


def plan(topology, output=None, **settings):
  """Calls precompile with an experiment of these settings."""
  return precompile.precompile(
    experiments.experiment(total_steps=7, **settings), topology, output
  )


class Stop(Exception):
  pass


@pytest.fixture
def what_is_compiled(monkeypatch):
  """Calls what compiles a step; returns step and arguments, and stops there."""

  def run(function, *arguments, **keywords):
    given = []

    def stop(*step_and_arguments):
      given.extend(step_and_arguments)
      raise Stop

    with monkeypatch.context() as patch:
      patch.setattr(build, 'compile_step', stop)
      with pytest.raises(Stop):
        function(*arguments, **keywords)
    return given

  return run


@pytest.mark.parametrize('scan_layers', [False, True])
def test_the_program_is_the_one_that_train_runs(
  what_is_compiled, train_letters, tmp_path, scan_layers
):
  settings = SETTINGS | {
    'student': dataclasses.replace(STUDENT, scan_layers=scan_layers)
  }
  conftest.save_model(tmp_path / 'teacher', TEACHER)
  run, *placed = what_is_compiled(
    train_letters,
    tmp_path / 'run',
    **settings,
    teacher_checkpoint_path=str(tmp_path / 'teacher'),
  )
  precompiled, *abstract = what_is_compiled(
    plan, **settings, **FOR_CPU, teacher=TEACHER
  )

  def describe(x):
    return x.shape, x.dtype, x.sharding

  assert jax.tree.map(describe, abstract) == jax.tree.map(describe, placed)
  if scan_layers:  # the same function makes both steps
    want, got = (
      jax.jit(f).lower(*abstract).as_text() for f in (run, precompiled)
    )
    assert got == want


def reported(**settings):
  """Returns the description and the costs of a step that is not compiled."""
  experiment = experiments.experiment(
    **SETTINGS
    | {'policy': policies.student(), 'train_dataset': DATASET}
    | settings,
    total_steps=7,
  )
  plan = precompile._plan(experiment, experiment.mesh.make())
  return precompile._describe_run(experiment, plan) | precompile._costs(
    experiment, plan, None, 'cpu:1'
  )


def test_the_passes_of_all_teachers_are_counted():
  names = {'a': None, 'b': None}
  shapes = {'a': TEACHER, 'b': STUDENT}
  alone = [
    reported(method_teacher=teachers.checkpoint(), teacher=x)
    for x in shapes.values()
  ]
  both = reported(
    method_teacher=teachers.averaged(names),
    teacher=shapes,
    teacher_checkpoint_path=names,
  )

  passes = [x['phases']['teacher']['flops'] for x in (*alone, both)]
  assert passes[2] == passes[0] + passes[1]
  assert both['teacher a']['num_params'] == num_params(TEACHER)
  assert both['teacher b']['num_params'] == num_params(STUDENT)


B, S, T = DATASET.batch_size, *conftest.LENGTHS.values()


def by_hand(c: T5Config, rows: int) -> dict[str, int]:
  """FLOPs of the matrix products of one layer each."""
  width = c.num_heads * c.head_dim
  attention, mlp = 4 * c.emb_dim * width, 3 * c.emb_dim * c.mlp_dim
  keys = 2 * rows * S * attention // 2
  of_targets = 2 * rows * T * (attention + attention // 2 + mlp)
  head = 2 * rows * T * c.emb_dim * c.vocab_size
  cross = 4 * rows * T * S * width
  return {
    'encoder': 2 * rows * S * (attention + mlp) + 4 * rows * S * S * width,
    # Each token attends to itself and those before it.
    'rollout': keys
    + of_targets
    + head
    + cross
    + 2 * rows * T * (T + 1) * width,
    'decoder': keys + of_targets + cross + 4 * rows * T * T * width,
    'head': head,
  }


STUDENTS, TEACHERS = by_hand(STUDENT, B), by_hand(TEACHER, B)


def forward(of):
  return of['encoder'] + of['decoder'] + of['head']


@pytest.mark.parametrize(
  ('policy', 'want'),
  [
    (policies.dataset(), {}),
    (policies.student(), {'sampling': STUDENTS['rollout']}),
    (
      policies.teacher(),
      {
        'teacher_encoder': TEACHERS['encoder'],
        'sampling': TEACHERS['rollout'],
      },
    ),
    (
      policies.interleaved(),
      {
        'teacher_encoder': TEACHERS['encoder'],
        'sampling': STUDENTS['rollout'] + TEACHERS['rollout'],
      },
    ),
    (
      policies.corrected(2),
      {
        'sampling': 3 * STUDENTS['rollout'],
        'compare': 2 * (forward(STUDENTS) + forward(TEACHERS)),
      },
    ),
  ],
)
def test_all_that_write_and_compare_are_counted(policy, want):
  report = reported(policy=policy, teacher=TEACHER)

  got = {name: phase['flops'] for name, phase in report['phases'].items()}
  of_policy = got.keys() & {'teacher_encoder', 'sampling', 'compare'}
  assert {name: got[name] for name in of_policy} == want
  assert report['not_counted'] == []


def test_all_outputs_of_an_input_are_counted():
  phases = reported(policy=policies.paired(), teacher=TEACHER)['phases']

  assert phases['sampling']['flops'] == (
    STUDENTS['rollout'] + TEACHERS['rollout']
  )
  assert phases['teacher_encoder']['flops'] == TEACHERS['encoder']
  # The encoder reads each input once.
  assert phases['teacher']['flops'] == (
    TEACHERS['encoder'] + 2 * TEACHERS['decoder']
  )


def test_rewards_and_the_greedy_outputs_for_comparison_are_counted():
  judge = T5Config(261, 8, 2, 4, 10, 1, 1)
  report = reported(
    student=dataclasses.replace(STUDENT, dropout_rate=0.0),
    student_sampler=sampler.ANCESTRAL,
    teacher=TEACHER,
    credit=credit.reinforce(entailment.entailment(), 0.5, 'self_critical'),
    reward_model=judge,
  )

  got = {name: phase['flops'] for name, phase in report['phases'].items()}
  # In microbatches the encoder runs again for the greedy outputs.
  assert got['sampling'] == 2 * STUDENTS['rollout'] + STUDENTS['encoder']
  # It reads input, output, two words and EOS, and answers with a token.
  length = S + T + 3
  width = judge.num_heads * judge.head_dim
  attention, mlp = 4 * judge.emb_dim * width, 3 * judge.emb_dim * judge.mlp_dim
  of_inputs = length * (2 * (attention + mlp) + attention + 4 * length * width)
  of_token = 2 * (attention + attention // 2 + mlp) + 4 * (length + 1) * width
  one = of_inputs + of_token + 2 * judge.emb_dim * judge.vocab_size
  assert got['reward'] == 2 * B * one
  assert report['not_counted'] == []


def test_a_pass_for_log_probabilities_is_counted():
  report = reported(
    student=dataclasses.replace(STUDENT, dropout_rate=0.0),
    student_sampler=sampler.ANCESTRAL,
    teacher=TEACHER,
    objective=objectives.Objective(divergences.reverse_kl),
    credit=credit.minillm_long_term(),
  )

  assert report['phases']['credit']['flops'] == (
    STUDENTS['head'] + TEACHERS['head']
  )


def test_a_rewards_model_is_compiled_in(what_is_compiled):
  judge = T5Config(261, 8, 2, 4, 10, 1, 1)
  settings = {
    **SETTINGS,
    'student': dataclasses.replace(STUDENT, dropout_rate=0.0),
    'policy': policies.student(),
    'student_sampler': sampler.ANCESTRAL,
    'credit': credit.reinforce(
      entailment.entailment(task_prefix='summarize: '), 0.5, 'self_critical'
    ),
  }

  step, *arguments = what_is_compiled(
    plan,
    **settings,
    **FOR_CPU,
    teacher=TEACHER,
    reward_model=judge,
    reward_dtype='bfloat16',
  )

  of_reward = arguments[1].reward
  assert count_params(of_reward) == num_params(judge)
  assert {x.dtype.name for x in jax.tree.leaves(of_reward)} == {'bfloat16'}
  _, metrics = jax.eval_shape(step, *arguments)
  assert {'divergence', 'reward', 'reward_baseline'} <= metrics.keys()


# --- What it reports ----------------------------------------------------------


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  output = tmp_path_factory.mktemp('report') / 'new' / 'report.json'
  returned = plan(
    **{
      **SETTINGS,
      'student': LARGER_STUDENT,
      'policy': policies.dataset(),
      'num_microbatches': 1,
    },
    **FOR_CPU,
    teacher=TEACHER,
    teacher_dtype='bfloat16',
    output=str(output),
  )
  assert json.loads(output.read_text()) == returned
  return returned


def num_params(c: T5Config) -> int:
  """Counted by hand, for one layer each."""
  attention = 4 * c.emb_dim * c.num_heads * c.head_dim
  mlp = 3 * c.emb_dim * c.mlp_dim
  norms = 7 * c.emb_dim  # two and three in the layers, one after each stack
  biases = 2 * c.num_heads * c.relpos_buckets
  embeddings = 2 * c.vocab_size * c.emb_dim
  return 3 * attention + 2 * mlp + norms + biases + embeddings


def test_parameters_and_optimizer_state_are_counted_in_bytes(report):
  memory = report['memory']

  assert report['student']['num_params'] == num_params(LARGER_STUDENT)
  assert report['teacher']['num_params'] == num_params(TEACHER)
  assert memory['student_params'] == 4 * num_params(LARGER_STUDENT)
  assert memory['teacher_params'] == 2 * num_params(TEACHER)
  # Two moments, and two counts: of AdamW and of the schedule.
  assert memory['optimizer_state'] == 8 * num_params(LARGER_STUDENT) + 8
  assert memory['batch'] == 8 * (6 + 7 + 7) * 4


def test_the_total_is_the_sum_of_the_parts(report):
  parts = dict(report['memory'])
  assert parts.pop('available') is None  # of a host nothing is claimed

  assert parts.pop('total') == sum(parts.values())
  assert parts['temporaries'] > 0
  assert report['fits'] is None


def test_it_says_what_was_compiled(report):
  assert report['mesh'] == {'data': 1, 'model': 1}
  assert report['num_ids'] == 262  # the student embeds more
  assert report['feature_lengths'] == conftest.LENGTHS
  assert report['compile_seconds'] > 0.0


def test_a_teacher_for_evaluation_alone_takes_its_room_too():
  alone, beside = (
    plan(
      **{
        **SETTINGS,
        'num_microbatches': 1,
        'policy': policies.dataset(),
        'objective': objectives.Objective(
          divergence_weight=0.0, likelihood_weight=1.0
        ),
      },
      **FOR_CPU,
      teacher=teacher,
    )['memory']
    for teacher in (None, TEACHER)
  )

  assert beside['total'] - alone['total'] == 4 * num_params(TEACHER)


@pytest.mark.parametrize(
  'refusal, want',
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (17.91G) exceeds available HBM (15.75G).',
      17.91 * 2**30,
    ),
    (
      'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory '
      'in memory space hbm. Used 16.51G of 15.75G hbm. Exceeded hbm capacity '
      'by 782.50M.',
      16.51 * 2**30,
    ),
    ('RESOURCE_EXHAUSTED: no more registers', None),
  ],
)
def test_what_is_needed_is_read_from_the_compilers_refusal(refusal, want):
  assert precompile._needed(refusal) == (want and int(want))


def test_a_program_that_does_not_fit_is_said_to_miss_memory(report):
  refused = report | {
    'memory': report['memory'] | {'temporaries': None, 'total': 5 * 2**30},
    'left': -3 * 2**29,
    'fits': False,
    'refusal': 'RESOURCE_EXHAUSTED: so it is',
  }

  text = precompile.format_report(refused)

  assert '  temporaries            not known\n' in text
  assert 'It does not fit: 1.50 GiB are missing on each device.' in text
  assert text.endswith('The compiler: RESOURCE_EXHAUSTED: so it is')


# --- From the command line ----------------------------------------------------


@pytest.fixture(scope='module')
def simulated(tmp_path_factory):
  """A finished run for eight simulated devices, and its report."""
  output = tmp_path_factory.mktemp('simulated') / 'report.json'
  finished = subprocess.run(
    [
      *(sys.executable, '-X', 'importtime', '-m', 'gkd_jax.main'),
      *('--run_mode=precompile', '--topology=cpu:8', f'--output={output}'),
      *(JSD, *TINY_TEACHER, '--gin.experiment.MeshConfig.model=2'),
    ],
    cwd=conftest.ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert finished.returncode == 0, finished.stderr
  return finished, json.loads(output.read_text())


@pytest.mark.slow
def test_parameters_are_spread_over_model_and_the_batch_over_data(simulated):
  _, report = simulated
  memory = report['memory']

  assert report['mesh'] == {'data': 4, 'model': 2}
  assert memory['batch'] == 64 // 4 * (16 + 16 + 16) * 4
  # Norms, and no others, are on every device.
  whole = 4 * report['student']['num_params']
  norms = 4 * 7 * 16
  assert memory['student_params'] == (whole - norms) // 2 + norms
  # The optimizer's state with them: Adafactor's second moments, which it does
  # not factor in a model so small, beside a number for what it might factor.
  assert memory['optimizer_state'] < 1.1 * memory['student_params']


@pytest.mark.slow
def test_each_phase_says_what_it_computes_reads_and_receives(simulated):
  _, report = simulated
  phases = report['phases']

  unused = {'teacher_encoder', 'compare', 'credit', 'reward'}
  assert phases.keys() == {*roofline.PHASES, 'other'} - unused
  lengths = {'input_length': 16, 'target_length': 16}
  student = T5Config(384, 16, 2, 8, 32, 1, 1)
  whole = costs.of_step(student, None, batch_size=64, **lengths)
  assert phases['sampling']['flops'] == whole['sampling'].flops / 8
  # Rows over 4, weights over 2.
  assert phases['sampling']['bytes'] > whole['sampling'].bytes / 8
  # The sum over its heads, of every layer.
  assert phases['teacher']['received'] > 0
  # Of time, simulated devices say nothing.
  assert report['step_seconds'] is None
  assert 'seconds' not in phases['teacher']


@pytest.mark.slow
def test_what_is_exchanged_for_each_token_is_told_apart(simulated):
  finished, report = simulated

  in_loop = [one for one in report['collectives'] if one['in_decode_loop']]
  assert {one['phase'] for one in in_loop} == {'sampling'}
  assert all(one['times'] % 16 == 0 for one in in_loop)
  assert '  in sampling\n' in finished.stdout


@pytest.mark.slow
def test_what_is_printed_is_the_report_and_a_verdict(simulated):
  finished, report = simulated

  assert finished.stdout == precompile.format_report(report) + '\n'
  assert 'cpu:8: 8 x cpu, mesh data 4 x model 2\n' in finished.stdout
  assert finished.stdout.splitlines()[-1].startswith('It compiles.')


@pytest.mark.slow
def test_neither_tensorflow_nor_seqio_is_loaded(simulated):
  finished, _ = simulated
  modules = {
    line.rpartition('|')[2].strip() for line in finished.stderr.splitlines()
  }

  assert 'gkd_jax.data.datasets' in modules
  assert not modules & {'tensorflow', 'seqio', 'tensorflow_datasets'}


PRETRAINED = """
from __gin__ import dynamic_registration
from gkd_jax import experiment
from gkd_jax.distill import divergences
from gkd_jax.models import registry
include 'gin/runs/train.gin'
include 'gin/models/published.gin'
include 'gin/methods/on_policy_gkd.gin'
include 'gin/vocabularies/sentencepiece.gin'
MIXTURE_OR_TASK_NAME = 'xsum'
TASK_FEATURE_LENGTHS = {'inputs': 1024, 'targets': 64}
INITIAL_CHECKPOINT_PATH = %gin.REQUIRED
TEACHER_CHECKPOINT_PATH = %gin.REQUIRED
SIZE = 't5_1_1_small'
DROPOUT_RATE = 0.1
REMAT = True
ACTIVATION_DTYPE = 'bfloat16'
TEACHER_SIZE = 't5_1_1_base'
experiment.Teacher.dtype = 'bfloat16'
experiment.Teacher.config = @teacher/registry.published()
DIVERGENCE = @divergences.reverse_kl
LEARNING_RATE = 3e-4
TRAIN_STEPS = 10
BATCH_SIZE = 32
"""


def test_no_file_need_be_named_where_the_shapes_are(
  what_is_compiled, run_main, tmp_path
):
  (tmp_path / 'mine.gin').write_text(PRETRAINED)

  _, state, frozen, batch = what_is_compiled(
    run_main,
    '--run_mode=precompile',
    f'--gin_file={tmp_path}/mine.gin',
    '--topology=cpu:1',
  )

  # Published counts; see tests/model_test.py.
  assert count_params(state.params) == 76_961_152
  assert count_params(frozen.teacher) == 247_577_856
  assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {'float32'}
  assert {x.dtype.name for x in jax.tree.leaves(frozen.teacher)} == {'bfloat16'}
  assert [x.shape for x in jax.tree.leaves(batch)] == [
    (32, 1024),
    (32, 64),
    (32, 64),
  ]


@pytest.fixture
def refused(run_main):
  """Runs main, which must refuse; returns what it says."""

  def refused(*arguments):
    finished = run_main('--run_mode=precompile', *arguments)
    assert finished.code == 1
    assert finished.err.startswith('Error: ')
    assert 'Compiling' not in finished.err
    return finished.err

  return refused


@pytest.mark.parametrize(
  'arguments, parts',
  [
    ([SFT], ['--topology is missing', 'v5e:4x4']),
    (
      [SFT, '--run_mode=train', '--topology=v5e:4x4'],
      ['--topology is for --run_mode=precompile'],
    ),
    (
      [SFT, '--run_mode=train', '--output=x'],
      ['--output is for --run_mode=precompile'],
    ),
    (
      [SFT, '--topology=v5e'],
      ['--topology=v5e is invalid', 'v5e:4x4', 'cpu:8'],
    ),
    ([SFT, '--topology=h100:8'], ['is invalid', 'v4, v5e, v5p, v6e']),
    ([SFT, '--topology=cpu:0'], ['--topology=cpu:0 is invalid']),
    (
      [SFT, '--topology=cpu:1', '--gin.experiment.MeshConfig.model=3'],
      ['does not match the 1'],
    ),
    ([JSD, '--topology=cpu:1'], ['needs a teacher', 'TEACHER_SIZE']),
    (
      [JSD, '--topology=cpu:1', '--gin.experiment.Teacher.dtype=bf16'],
      ['experiment.Teacher.dtype must be'],
    ),
    (
      [
        '--gin_file=configs/xsum/rl_gkd.gin',
        '--topology=cpu:1',
        '--gin.experiment.RewardModel.config=None',
      ],
      ['REWARD needs a model', 'RewardModel.config'],
    ),
    (
      [SFT, '--topology=cpu:1', '--gin_file=gin/models/from_checkpoint.gin'],
      ['INITIAL_CHECKPOINT_PATH, which is not set'],
    ),
    (
      ['--gin_file=configs/from_pretrained.gin', '--topology=cpu:1'],
      ['MIXTURE_OR_TASK_NAME must be set'],
    ),
    (
      ['--gin_file=configs/quickstart.gin', '--topology=cpu:1'],
      ['sets no parameter of run_folder.Run', 'gin/runs/train.gin'],
    ),
  ],
)
def test_what_cannot_be_compiled_is_refused(refused, arguments, parts):
  message = refused(*arguments)

  for part in parts:
    assert part in message


def test_a_teachers_shape_may_come_from_its_checkpoint(
  what_is_compiled, run_main, tmp_path
):
  conftest.save_model(tmp_path / 'teacher', TEACHER)

  _, _, frozen, _ = what_is_compiled(
    run_main,
    '--run_mode=precompile',
    JSD,
    '--topology=cpu:1',
    f'--gin.TEACHER_CHECKPOINT_PATH={tmp_path}/teacher',
  )

  assert count_params(frozen.teacher) == num_params(TEACHER)


def test_without_libtpu_it_says_how_to_get_it(refused, monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *rest: None if name == 'libtpu' else find_spec(name, *rest),
  )

  message = refused(SFT, '--topology=v5e:4x4')

  assert 'pip install -e ".[tpu]"' in message
  assert '--topology=cpu:8 works without it' in message


# --- With libtpu --------------------------------------------------------------


@needs_libtpu
@pytest.mark.parametrize('generation', roofline.CHIPS)
def test_the_compiler_leaves_so_much_of_a_chip_to_a_program(generation):
  layout = '2x2' if generation in ('v5e', 'v6e') else '2x2x1'
  devices = precompile.find_devices(f'{generation}:{layout}')
  assert len(devices) == 4  # one a chip

  everywhere = NamedSharding(Mesh(np.asarray(devices), 'x'), PartitionSpec())
  huge = jax.ShapeDtypeStruct((2**18, 2**18), jnp.float32, sharding=everywhere)
  with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
    jax.jit(jnp.sum).lower(huge).compile()

  available = roofline.CHIPS[generation].available
  assert f'exceeds available HBM ({available:.2f}G)' in str(refusal.value)
  assert precompile._needed(str(refusal.value)) >= 2**38


@needs_libtpu
@pytest.mark.parametrize('topology, chips', [('v5e:1x1', 1), ('v5e:2x4', 8)])
def test_a_slice_has_as_many_devices_as_chips(topology, chips):
  assert len(precompile.find_devices(topology)) == chips


@needs_libtpu
def test_a_slice_that_libtpu_does_not_know_is_refused():
  with pytest.raises(ValueError, match='--topology=v5e:3x5: libtpu failed'):
    precompile.find_devices('v5e:3x5')


@needs_libtpu
@pytest.mark.slow
def test_a_step_is_compiled_for_a_slice_and_fits(run_main, tmp_path):
  finished = run_main(
    '--run_mode=precompile',
    *(JSD, *TINY_TEACHER, '--gin.experiment.MeshConfig.model=2'),
    *('--topology=v5e:2x2', f'--output={tmp_path}/report.json'),
  )

  assert finished.code == 0, finished.err
  assert 'It fits: 15.7' in finished.out
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['fits']
  assert report['device_kind'] == 'TPU v5 lite'
  assert report['left'] == int(15.75 * 2**30) - report['memory']['total']
  seconds = [phase['seconds'] for phase in report['phases'].values()]
  assert report['step_seconds'] == sum(seconds)
  assert 0.0 < report['sampling_share'] < 1.0


@needs_libtpu
@pytest.mark.parametrize(
  ('width', 'refusal'),
  [
    # Parameters and two moments alone are 18.1 GiB,
    (2**14, 'not compiled'),
    # and 13.8: the gradient is too much.
    (14336, 'RESOURCE_EXHAUSTED'),
  ],
)
def test_a_student_larger_than_the_chips_does_not_fit(width, refusal):
  report = plan(
    **SETTINGS
    | {
      'student': T5Config(259, width, 1, 4, width, 1, 1),
      'policy': policies.dataset(),
      'num_microbatches': 1,
    },
    train_dataset=DATASET,
    teacher=TEACHER,
    topology='v5e:2x2',
  )

  assert report['fits'] is False
  assert report['left'] < 0
  assert report['refusal'].startswith(refusal)
  assert report['memory']['temporaries'] is None
