# SPDX-License-Identifier: Apache-2.0
"""Distillation in T5X's training loop."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core

from gkd_jax.batch import Batch
from gkd_jax.checkpoints.formats import huggingface, t5x, tensors
from gkd_jax.distill import credit, divergences, objectives, policies, rewards
from gkd_jax.distill import state as state_lib
from gkd_jax.distill import step as step_lib
from gkd_jax.distill.methods import Method
from gkd_jax.models.t5 import T5, T5Config
from tests import conftest, tiny
from tests.checkpoints.formats.make_t5x_fixtures import flat

pytestmark = pytest.mark.interop


def imported(name):
  return pytest.importorskip(name, reason=f'T5X: {name} cannot be imported')


t5x_train = imported('t5x.train')
t5x_trainer = imported('t5x.trainer')
t5x_bridge = imported('gkd_jax.interop.t5x_bridge')
adafactor = imported('t5x.adafactor')
models = imported('t5x.models')
network = imported('t5x.examples.t5.network')
partitioning = imported('t5x.partitioning')
scalable_network = imported('t5x.examples.scalable_t5.network')
seqio = imported('seqio')
utils = imported('t5x.utils')

VOCABULARY = seqio.ByteVocabulary()
NUM_IDS = VOCABULARY.vocab_size
# With the vocabulary of the task `letters`.
STUDENT = T5Config(264, 16, 2, 8, 24, 1, 1)
TEACHER = T5Config(264, 24, 4, 8, 32, 2, 1)
GKD = objectives.Objective(divergence=divergences.forward_kl)
STEPS = 24


def t5x_model(config=STUDENT, module=network, **changes):
  fields = dataclasses.asdict(config)
  shape = {
    f.name: fields[f.name]
    for f in dataclasses.fields(module.T5Config)
    if f.name in fields
  }
  return models.EncoderDecoderModel(
    module=module.Transformer(module.T5Config(**(shape | changes))),
    input_vocabulary=VOCABULARY,
    output_vocabulary=VOCABULARY,
    optimizer_def=adafactor.Adafactor(
      logical_factor_rules=adafactor.standard_logical_factor_rules()
    ),
  )


def batch(with_segments=False):
  ours = tiny.batch()
  theirs = {
    'encoder_input_tokens': ours.encoder_input_tokens,
    'decoder_input_tokens': jnp.pad(
      ours.decoder_target_tokens[:, :-1], ((0, 0), (1, 0))
    ),
    'decoder_target_tokens': ours.decoder_target_tokens,
    # T5X's are integers.
    'decoder_loss_weights': jnp.int32(ours.decoder_loss_weights),
  }
  if with_segments:
    theirs['decoder_segment_ids'] = jnp.ones_like(ours.decoder_target_tokens)
  return theirs


@pytest.fixture(scope='module')
def teacher_path(tmp_path_factory):
  """A teacher's checkpoint in the form of T5X."""
  params = flat(tiny.params(T5(TEACHER), 1))
  folder = tmp_path_factory.mktemp('teacher')
  return str(t5x.save(folder, TEACHER, params, step=3))


def bytes_of(folder) -> str:
  digest = hashlib.sha256()
  for path in sorted(pathlib.Path(folder).rglob('*')):
    if path.is_file():
      digest.update(str(path).encode() + path.read_bytes())
  return digest.hexdigest()


# --- The loss ---------------------------------------------------------------


def our_step(policy, objective, params, teacher_params):
  """Returns the metrics of one step of gkd_jax."""
  train_step = step_lib.make_train_step(
    student=T5(STUDENT),
    teacher=T5(TEACHER),
    method=Method(policy=policy, objective=objective),
    optimizer=optax.sgd(0.0),
    ids=tiny.special_ids(NUM_IDS),
    seed=0,
  )
  state = state_lib.init_state(params, optax.sgd(0.0))
  ours = batch()
  return jax.jit(train_step)(
    state,
    state_lib.Frozen(teacher_params),
    Batch(
      ours['encoder_input_tokens'],
      ours['decoder_target_tokens'],
      jnp.float32(ours['decoder_loss_weights']),
    ),
  )[1]


@pytest.mark.parametrize('reduction', objectives.REDUCTIONS)
@pytest.mark.parametrize(
  'divergence',
  [
    divergences.forward_kl,
    functools.partial(divergences.generalized_jsd, beta=0.1),
  ],
  ids=['forward_kl', 'jsd_0.1'],
)
def test_loss_and_gradient_are_those_of_our_own_step(divergence, reduction):
  objective = objectives.Objective(
    divergence=divergence, likelihood_weight=0.5, reduction=reduction
  )
  params = tiny.params(T5(STUDENT), 0)
  teacher_params = tiny.params(T5(TEACHER), 1)
  model = t5x_bridge.GKDModel(
    t5x_model(),
    Method(policy=policies.dataset(), objective=objective),
    'unread',
  )

  with model.with_teacher(T5(TEACHER), teacher_params):
    (loss, metrics), grads = jax.jit(
      jax.value_and_grad(model.loss_fn, has_aux=True)
    )(core.freeze(params), batch(), jax.random.key(0))

  want = our_step(policies.dataset(), objective, params, teacher_params)
  got = {
    'loss': loss,
    'grad_norm': optax.tree.norm(grads),
    **{n: metrics[n].compute() for n in ('nll', 'divergence', 'on_policy')},
  }
  for name, value in got.items():
    # The same sums, compiled by themselves.
    np.testing.assert_allclose(value, want[name], rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(metrics['loss'].compute(), loss, rtol=1e-6)


def loss_metrics(policy, rng, seed=0):
  model = t5x_bridge.GKDModel(
    t5x_model(), Method(policy=policy, objective=GKD), 'unread'
  )
  with model.with_teacher(T5(TEACHER), tiny.params(T5(TEACHER), 1)):
    _, metrics = jax.jit(model.loss_fn)(
      tiny.params(T5(STUDENT), seed), batch(), rng
    )
  return {n: m.compute() for n, m in metrics.items() if 'timing' not in n}


def test_the_student_writes_what_the_policy_gives_to_it():
  key = jax.random.PRNGKey(0)  # the kind that T5X has

  written = loss_metrics(policies.student(), key)

  assert written['on_policy'] == 1.0
  assert np.isfinite(written['loss'])
  again = loss_metrics(policies.student(), key)
  other = loss_metrics(policies.student(), jax.random.PRNGKey(1))
  assert again['loss'] == written['loss'] != other['loss']


def test_a_mixture_draws_for_each_row():
  policy = policies.mixture(0.5, per='sequence')

  shares = {
    float(loss_metrics(policy, jax.random.PRNGKey(seed))['on_policy'])
    for seed in range(6)
  }

  assert shares <= {0.0, 0.25, 0.5, 0.75, 1.0}
  assert shares - {0.0, 1.0}


def test_evaluation_is_on_the_outputs_of_the_dataset():
  evaluated = loss_metrics(policies.student(), None)

  assert evaluated['on_policy'] == 0.0
  assert evaluated == loss_metrics(policies.dataset(), None)


def test_dropout_is_on_in_training_alone():
  noisy = t5x_bridge.GKDModel(
    t5x_model(dropout_rate=0.5),
    Method(policy=policies.dataset(), objective=GKD),
    'unread',
  )
  params = tiny.params(T5(STUDENT), 0)

  with noisy.with_teacher(T5(TEACHER), tiny.params(T5(TEACHER), 1)):
    losses = [
      float(jax.jit(noisy.loss_fn)(params, batch(), rng)[0])
      for rng in (jax.random.PRNGKey(0), jax.random.PRNGKey(1), None)
    ]

  assert len(set(losses)) == 3
  assert losses[2] == loss_metrics(policies.dataset(), None)['loss']


# --- What does not fit ------------------------------------------------------


def test_packed_batches_are_refused():
  model = t5x_bridge.GKDModel(
    t5x_model(), Method(policy=policies.dataset(), objective=GKD), 'unread'
  )

  with pytest.raises(ValueError, match='DatasetConfig.pack = False'):
    model.loss_fn({}, batch(with_segments=True), None)


def test_a_trainer_that_knows_no_teacher_is_refused():
  model = t5x_bridge.GKDModel(
    t5x_model(), Method(policy=policies.dataset(), objective=GKD), 'unread'
  )

  with pytest.raises(ValueError, match='trainer_cls = @t5x_bridge.trainer'):
    model.loss_fn({}, batch(), None)


def test_a_method_without_its_teacher_is_refused():
  with pytest.raises(ValueError, match='set TEACHER_CHECKPOINT_PATH'):
    t5x_bridge.GKDModel(
      t5x_model(), Method(policy=policies.dataset(), objective=GKD)
    )


def test_likelihood_of_what_the_student_writes_is_refused():
  objective = dataclasses.replace(GKD, likelihood_weight=1.0)

  with pytest.raises(ValueError, match='reinforce its mistakes'):
    t5x_bridge.GKDModel(
      t5x_model(),
      Method(policy=policies.student(), objective=objective),
      'unread',
    )


def test_a_reward_is_refused():
  reward = rewards.exact_match()
  method = Method(
    policy=policies.student(),
    objective=GKD,
    credit=credit.reinforce(reward, 0.5),
  )

  with pytest.raises(ValueError, match="credit is set, but T5X's trainer"):
    t5x_bridge.GKDModel(t5x_model(), method, 'unread')


def test_state_is_refused():
  method = Method(
    policy=policies.Policy(
      policies.dataset().write, 0.0, init=lambda batch: jnp.int32(0)
    ),
    objective=GKD,
  )

  with pytest.raises(ValueError, match='needs a `TrainState`'):
    t5x_bridge.GKDModel(t5x_model(), method, 'unread')


def test_another_network_is_refused():
  model = t5x_model(module=scalable_network)

  with pytest.raises(ValueError, match='scalable_t5.network.Transformer has o'):
    t5x_bridge.GKDModel(
      model, Method(policy=policies.dataset(), objective=GKD), 'unread'
    )


def test_the_trainer_is_for_our_model_alone():
  with pytest.raises(ValueError, match='gkd.gin after all other gin files'):
    t5x_bridge.trainer(t5x_model(), partitioner())


# --- The teacher ------------------------------------------------------------


def partitioner():
  return partitioning.PjitPartitioner(num_partitions=1)


def save_huggingface(folder, params):
  folder.mkdir()
  huggingface.save(folder, TEACHER, params)


@pytest.mark.parametrize('kind', ['t5x', 'huggingface', 'gkd_jax'])
def test_the_teacher_is_whatever_gkd_jax_reads(kind, teacher_path, tmp_path):
  params = flat(tiny.params(T5(TEACHER), 1))
  if kind == 'huggingface':
    save_huggingface(tmp_path / 'hf', params)
    teacher_path = str(tmp_path / 'hf')
  elif kind == 'gkd_jax':
    conftest.save_model(tmp_path, TEACHER)
    teacher_path = str(tmp_path)
  model = t5x_bridge.GKDModel(
    t5x_model(), Method(policy=policies.dataset(), objective=GKD), teacher_path
  )

  teacher, loaded = model.load_teacher(partitioner().mesh)

  assert teacher.config == TEACHER
  got = flat(loaded)
  assert got.keys() == params.keys()
  if kind != 'gkd_jax':
    for name, array in got.items():
      np.testing.assert_array_equal(array, params[name])


def test_the_teacher_is_an_argument_of_the_step_and_no_constant(teacher_path):
  model = t5x_bridge.GKDModel(
    t5x_model(), Method(policy=policies.dataset(), objective=GKD), teacher_path
  )
  teacher, params = model.load_teacher(partitioner().mesh)
  with_teacher = t5x_bridge._WithTeacher(partitioner(), model, teacher, params)
  student_params = tiny.params(T5(STUDENT), 0)

  partitioned = with_teacher.partition(
    lambda params, batch: model.loss_fn(params, batch, None)[0],
    in_axis_resources=(None, None),
    out_axis_resources=None,
  )

  text = partitioned.fn.lower(student_params, batch(), params).as_text()
  # As constants the embedding alone would be 264 * 24 numbers of 8 digits.
  assert len(text) < 8 * 264 * 24 * 10
  longest = max(
    (len(line) for line in text.splitlines() if 'constant' in line), default=0
  )
  assert longest < 2000
  compiled = with_teacher.compile(partitioned, student_params, batch())
  np.testing.assert_allclose(
    compiled(student_params, batch()),
    loss_metrics(policies.dataset(), None)['loss'],
    rtol=1e-5,
  )


def spread_over_four_devices():
  """Returns the loss, and the share of the embedding on each device."""
  spread = partitioning.PjitPartitioner(num_partitions=4)
  with tempfile.TemporaryDirectory() as folder:
    params = flat(tiny.params(T5(TEACHER), 1))
    model = t5x_bridge.GKDModel(
      t5x_model(),
      Method(policy=policies.dataset(), objective=GKD),
      str(t5x.save(folder, TEACHER, params)),
    )
    teacher, params = model.load_teacher(spread.mesh)
  with_teacher = t5x_bridge._WithTeacher(spread, model, teacher, params)
  student_params = tiny.params(T5(STUDENT), 0)

  def loss(params, batch):
    return model.loss_fn(params, batch, None)[0]

  # As T5X's trainer does.
  partitioned = with_teacher.partition(
    loss,
    in_axis_resources=(None, with_teacher.data_partition_spec),
    out_axis_resources=None,
    donate_argnums=(0,),
  )
  compiled = with_teacher.compile(partitioned, student_params, batch())
  embedding = params['token_embedder']['embedding']
  held = embedding.addressable_shards[0].data.size / embedding.size
  return float(compiled(student_params, batch())), held


def test_the_teacher_is_spread_as_t5x_spreads_the_student():
  loss, held = tiny.on_simulated_devices(
    4, __name__, spread_over_four_devices.__name__
  )

  assert held == 0.25  # on CPU all devices are of the model axis
  np.testing.assert_allclose(
    loss, loss_metrics(policies.dataset(), None)['loss'], rtol=1e-5
  )


# --- T5X's training loop ----------------------------------------------------


def dataset(letters, split, **changes):
  return utils.DatasetConfig(
    **{
      'mixture_or_task_name': letters,
      'task_feature_lengths': conftest.LENGTHS,
      'split': split,
      'batch_size': 8,
      'shuffle': False,
      'seed': 0,
    }
    | changes
  )


def train(run_dir, model, letters, student_path, **changes):
  """Trains with T5X; returns the state and its metrics of all steps."""
  logged = []

  class Recorder(t5x_trainer.BaseAction):
    def run(self, train_state, metrics_by_task):
      del train_state
      logged.append(
        {
          name: float(value.value)
          for name, value in metrics_by_task['train'].items()
          if hasattr(value, 'value')
        }
      )
      return False

  settings = {
    'model': model,
    'train_dataset_cfg': dataset(letters, 'train'),
    'train_eval_dataset_cfg': dataset(letters, 'validation'),
    'infer_eval_dataset_cfg': dataset(letters, 'validation'),
    'checkpoint_cfg': utils.CheckpointConfig(
      save=utils.SaveCheckpointConfig(period=STEPS),
      restore=utils.RestoreCheckpointConfig(path=student_path, mode='specific'),
    ),
    'partitioner': partitioner(),
    'trainer_cls': functools.partial(
      t5x_bridge.trainer,
      trainer_cls=functools.partial(
        t5x_trainer.Trainer,
        learning_rate_fn=lambda step: 0.05,
        num_microbatches=None,
      ),
    ),
    'model_dir': str(run_dir),
    'total_steps': 5 + STEPS,
    'eval_steps': 1,
    'eval_period': STEPS,
    'stats_period': 1,
    'random_seed': 0,
    'summarize_config_fn': lambda *_: None,
    'concurrent_metrics': False,
    'actions': {'TRAIN': [Recorder()]},
  }
  _, state = t5x_train.train(**(settings | changes))
  return state, logged


@pytest.fixture(scope='module')
def student_path(tmp_path_factory):
  params = flat(tiny.params(T5(STUDENT), 0))
  folder = tmp_path_factory.mktemp('student')
  return str(t5x.save(folder, STUDENT, params, step=5))


@pytest.mark.parametrize(
  'policy', [policies.dataset(), policies.student()], ids=['data', 'student']
)
def test_a_student_learns_from_its_teacher_in_t5x(
  policy, letters, teacher_path, student_path, tmp_path
):
  before = bytes_of(teacher_path)
  model = t5x_bridge.GKDModel(
    t5x_model(), Method(policy=policy, objective=GKD), teacher_path
  )

  state, logged = train(tmp_path, model, letters, student_path)

  assert int(state.step) == 5 + STEPS
  losses = [metrics['loss'] for metrics in logged]
  assert len(losses) == STEPS
  assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
  on_policy = policy.student_data_fraction
  assert {metrics['on_policy'] for metrics in logged} == {on_policy}
  assert {'divergence', 'nll', 'truncated', 'target_tokens'} <= logged[0].keys()
  # The teacher is as it was, and in no checkpoint of the student.
  assert bytes_of(teacher_path) == before
  config, saved = t5x.open_folder(tmp_path / f'checkpoint_{5 + STEPS}')
  assert config == STUDENT
  got = flat(state.params.unfreeze())
  for name, tensor in saved.items():
    np.testing.assert_array_equal(tensors.read_all(tensor), got[name])


def test_microbatches_leave_the_metrics_as_they_are(
  letters, teacher_path, student_path, tmp_path
):
  model = t5x_bridge.GKDModel(
    t5x_model(), Method(policy=policies.dataset(), objective=GKD), teacher_path
  )

  def first_metrics(num_microbatches):
    trainer_cls = functools.partial(
      t5x_trainer.Trainer,
      learning_rate_fn=lambda step: 0.0,
      num_microbatches=num_microbatches,
    )
    _, logged = train(
      tmp_path / str(num_microbatches),
      model,
      letters,
      student_path,
      trainer_cls=functools.partial(
        t5x_bridge.trainer, trainer_cls=trainer_cls
      ),
      total_steps=6,
      train_eval_dataset_cfg=None,
      infer_eval_dataset_cfg=None,
    )
    return logged[0]

  whole, parts = first_metrics(None), first_metrics(4)

  for name in ('loss', 'divergence', 'nll', 'target_tokens'):
    np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)


def test_one_gin_file_turns_a_run_of_t5x_into_distillation(
  teacher_path, student_path, tmp_path
):
  (tmp_path / 'letters_task.py').write_text(
    'from tests import conftest\n'
    'conftest.register(conftest.LETTERS, conftest.letter_words)\n'
  )
  # A run as T5X users have it: a network, a vocabulary and an optimizer, and
  # T5X's own finetune.gin.
  (tmp_path / 'run.gin').write_text(f"""
from __gin__ import dynamic_registration
import letters_task
import seqio
from t5x import adafactor
from t5x import models
from t5x import utils
from t5x.examples.t5 import network

include 't5x/configs/runs/finetune.gin'

MIXTURE_OR_TASK_NAME = '{conftest.LETTERS}'
TASK_FEATURE_LENGTHS = {conftest.LENGTHS}
TRAIN_STEPS = 7
EVAL_STEPS = 1
EVAL_PERIOD = 2
BATCH_SIZE = 8
USE_CACHED_TASKS = False
RANDOM_SEED = 0
MODEL_DIR = '{tmp_path / 'run'}'
INITIAL_CHECKPOINT_PATH = '{student_path}'

MODEL = @models.EncoderDecoderModel()
models.EncoderDecoderModel:
  module = @network.Transformer()
  input_vocabulary = @seqio.ByteVocabulary()
  output_vocabulary = @seqio.ByteVocabulary()
  optimizer_def = @adafactor.Adafactor()
  z_loss = 0.0001
adafactor.Adafactor.logical_factor_rules = \\
    @adafactor.standard_logical_factor_rules()
models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 2
utils.SaveCheckpointConfig.period = 2
network.Transformer.config = @network.T5Config()
network.T5Config:
  vocab_size = {STUDENT.vocab_size}
  emb_dim = {STUDENT.emb_dim}
  num_heads = {STUDENT.num_heads}
  head_dim = {STUDENT.head_dim}
  mlp_dim = {STUDENT.mlp_dim}
  num_encoder_layers = 1
  num_decoder_layers = 1
  mlp_activations = ('gelu', 'linear')
  dtype = 'bfloat16'
""")
  root = pathlib.Path(t5x_train.__file__).parents[1]
  finished = subprocess.run(
    [
      sys.executable,
      '-m',
      't5x.train',
      f'--gin_search_paths={root},{conftest.ROOT}',
      f'--gin_file={tmp_path / "run.gin"}',
      '--gin_file=gin/t5x/gkd.gin',
      f'--gin.TEACHER_CHECKPOINT_PATH="{teacher_path}"',
    ],
    env=os.environ
    | {'PYTHONPATH': f'{tmp_path}:{conftest.ROOT}', 'JAX_PLATFORMS': 'cpu'},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )

  assert finished.returncode == 0, finished.stderr[-4000:]
  config, _ = t5x.open_folder(tmp_path / 'run' / 'checkpoint_7')
  assert config == STUDENT
  text = (tmp_path / 'run' / 'config.gin').read_text()
  assert 't5x_bridge.GKDModel' in text
