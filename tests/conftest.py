# SPDX-License-Identifier: Apache-2.0
"""What several test files share: a tiny task, tiny runs, and main in process.

Importing this must stay cheap: seqio and TensorFlow take 15 seconds, which the
tests of the core need not wait for. So they are imported inside fixtures.
"""

import atexit
import contextlib
import dataclasses
import gc
import io
import itertools
import logging
import os
import pathlib
import random
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Tests compile for seconds what runs for milliseconds. These flags make XLA's
# CPU compiler five times as fast; jit_as_users_do of tests.tiny undoes them.
# JAX reads them when it starts, here and in the processes that tests start.
QUICK_TO_COMPILE = (
  '--xla_backend_optimization_level=0',
  '--xla_cpu_use_fusion_emitters=false',
  '--xla_cpu_parallel_codegen_split_count=1',
)


def configure_jax() -> None:
  """Sets the compiler's flags and a cache that all test processes share."""
  given = os.environ.get('XLA_FLAGS', '')
  if QUICK_TO_COMPILE[0] not in given:  # else a worker of pytest-xdist
    os.environ['XLA_FLAGS'] = ' '.join([*QUICK_TO_COMPILE, given])
  # No program needs the Python lines that its operations come from.
  os.environ['JAX_TRACEBACK_IN_LOCATIONS_LIMIT'] = '0'
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    folder = tempfile.mkdtemp(prefix='gkd_jax_tests_')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


configure_jax()
# Tracing makes millions of short-lived objects beside the libraries' lasting
# ones; with Python's thresholds the collector takes 6 % of a test's time.
gc.set_threshold(200_000, 50, 1000)


def pytest_collection_finish() -> None:
  """Takes what the imports left out of all later collections."""
  gc.collect()
  gc.freeze()


@pytest.fixture(autouse=True)
def settings_end_with_the_test():
  """Clears gin's settings, which would change a later test of the process."""
  yield
  if 'gin' in sys.modules:
    sys.modules['gin'].clear_config()


# A tiny model of Hugging Face's; stands for the models that a command names.
BYT5 = ROOT / 'tests/checkpoints/formats/huggingface_fixtures/byt5'

# Beside the project; what needs them skips where they are not.
SHARED_DATA = ROOT.parent / 'shared' / 'data'
T5_VOCABULARY = SHARED_DATA / 't5_sentencepiece.model'
GSM8K_TRAIN = SHARED_DATA / 'gsm8k_train.jsonl'

# A name of a folder with all that means something to a shell, a glob, a URL or
# a library.
ODD_NAME = 'a[1] *?\\{b}\'"%20#&|:;<>$()!~x=ñ日本'

LETTERS = 'letters'  # the tiny task, once the fixture of this name was used
NUM_LETTERS = {'train': 48, 'validation': 10, 'test': 7}
LENGTHS = {'inputs': 6, 'targets': 7}


def letter_words(split: str) -> list[str]:
  """Different words of 1 to 5 letters, so that they end at different places."""
  rng = random.Random(split)
  words = {}
  while len(words) < NUM_LETTERS.get(split, 0):
    words[''.join(rng.choices('abcdef', k=rng.randint(1, 5)))] = None
  return list(words)


def error_rate(targets: Sequence[str], predictions: Sequence[str]):
  wrong = sum(t != p for t, p in zip(targets, predictions, strict=True))
  # A text beside the number: a note.
  return {'error': 100 * wrong / len(targets), 'error_of': 'whole words'}


def register(name: str, words: Callable[[str], list[str]], **changes) -> str:
  """Registers a task in which every word is to be written backwards."""
  import seqio
  import tensorflow as tf

  def dataset(split, shuffle_files, seed=None):
    del shuffle_files, seed
    # Without a dtype an empty list would be one of floats.
    chosen = tf.constant(words(split), tf.string)
    reverse = tf.constant([word[::-1] for word in words(split)], tf.string)
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': chosen, 'targets': reverse}
    )

  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  settings = {
    'source': seqio.FunctionDataSource(dataset, splits=[*NUM_LETTERS, 'empty']),
    'preprocessors': [
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
    'output_features': {'inputs': feature, 'targets': feature},
    'metric_fns': [error_rate],
  }
  seqio.TaskRegistry.add(name, **(settings | changes))
  return name


def as_tokens(vocabulary, texts: Sequence[str], length: int):
  """What a model that writes these texts returns: [N, length], int32."""
  import numpy as np

  tokens = np.zeros((len(texts), length), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    ids = [*vocabulary.encode(text), vocabulary.eos_id]
    row[: len(ids)] = ids
  return tokens


def board_events(path: pathlib.Path) -> list:
  """Returns the events of a TensorBoard file."""
  from tensorboardX.proto import event_pb2

  events, rest = [], path.read_bytes()
  while rest:  # TFRecord: length, its checksum, data, its checksum
    (length,) = struct.unpack('<Q', rest[:8])
    events.append(event_pb2.Event.FromString(rest[12 : 12 + length]))
    rest = rest[16 + length :]
  return events


def read_board(run_dir: pathlib.Path) -> list[tuple[int, str, float | str]]:
  """Returns (step, tag, scalar or text) of a folder's TensorBoard files."""
  return [
    (
      event.step,
      value.tag,
      value.simple_value
      if value.HasField('simple_value')
      else value.tensor.string_val[0].decode(),
    )
    for path in sorted(run_dir.glob('events.out.tfevents.*'))
    for event in board_events(path)
    for value in event.summary.value
  ]


def save_model(
  run_dir: pathlib.Path,
  config,
  vocabulary: str = 'ByteVocabulary 259 ids',
  seed: int = 5,
) -> None:
  """Leaves what a run leaves: a checkpoint, here of random parameters."""
  import optax

  from gkd_jax.checkpoints import checkpoint
  from gkd_jax.distill import state as state_lib
  from gkd_jax.models.registry import make_model
  from tests import tiny

  params = tiny.params(make_model(config), seed)
  checkpoints = checkpoint.Checkpoints(
    run_dir, checkpoint.ModelDescription(config, vocabulary)
  )
  state = state_lib.init_state(params, optax.sgd(1.0))
  checkpoints.save(state, tiny.NoData(), train_seconds=0.0)
  checkpoints.close()


def write_predictions(path, rows, config, split='train'):
  """Writes what infer writes, for rows of (input ids, output ids).

  Returns:
    The dataset of them.
  """
  from gkd_jax.data import datasets, predictions, vocabularies

  vocabulary = datasets.get_vocabulary(config)
  writer = predictions.Writer(
    path,
    {
      'checkpoint': 'teacher',
      'task': config.mixture_or_task_name,
      'split': split,
      'vocabulary': vocabularies.describe(vocabulary),
      'task_feature_lengths': config.task_feature_lengths,
      'decoding': 'sampled',
    },
    batch_size=8,
  )
  writer.append(
    [
      [
        {
          'inputs': vocabularies.decode(vocabulary, inputs),
          'prediction': vocabularies.decode(vocabulary, outputs),
          'input_ids': inputs,
          'prediction_ids': outputs,
        }
      ]
      for inputs, outputs in rows
    ]
  )
  writer.close()
  return dataclasses.replace(config, predictions=str(path))


def take(iterator, num_batches):
  """The next batches of an iterator."""
  return list(itertools.islice(iterator, num_batches))


def words(batches):
  """What the inputs of some batches say, row by row."""
  import seqio

  vocabulary = seqio.ByteVocabulary()
  return [
    vocabulary.decode([int(t) for t in row])
    for batch in batches
    for row in batch.encoder_input_tokens
  ]


def tree_of(folder):
  """{path: content} of all files below a folder."""
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


@contextlib.contextmanager
def names_of_compiled():
  """Gives a list that gets the name of every function that jax compiles."""
  import jax

  names = []

  class Listener(logging.Handler):
    def emit(self, record):
      if match := re.match(r'Compiling jit\((.+?)\)', record.getMessage()):
        names.append(match[1])

  listener, logger = Listener(), logging.getLogger('jax')
  logger.addHandler(listener)
  with jax.log_compiles():
    yield names
  logger.removeHandler(listener)


@pytest.fixture(scope='session')
def letters() -> str:
  """The name of a task of short words; its split 'empty' is empty."""
  return register(LETTERS, letter_words)


@pytest.fixture(scope='session')
def tfds_dir(tmp_path_factory) -> pathlib.Path:
  """Where TFDS keeps its data, for all tests; see tests.tfds.prepare_like."""
  import seqio

  folder = tmp_path_factory.mktemp('tfds')
  seqio.set_tfds_data_dir_override(str(folder))
  yield folder
  seqio.set_tfds_data_dir_override(None)


@pytest.fixture(scope='session')
def t5_vocabulary():
  """T5's own vocabulary."""
  from gkd_jax.data import vocabularies

  if not T5_VOCABULARY.is_file():
    pytest.skip(f'{T5_VOCABULARY} is not there')
  return vocabularies.sentencepiece(T5_VOCABULARY)


@pytest.fixture(scope='session')
def small_vocabulary(tmp_path_factory):
  """A SentencePiece vocabulary that writes ASCII but `<`, as T5's does not."""
  from gkd_jax.data import vocabularies

  sentences = [
    'summarize: the answer is a number',
    *map(chr, {*range(33, 127)} - {ord('<')}),
  ]
  path = tmp_path_factory.mktemp('vocabulary') / 'small.model'
  train_sentencepiece(
    path,
    sentences,
    vocab_size=110,
    hard_vocab_limit=False,
    character_coverage=1.0,
  )
  return vocabularies.sentencepiece(path)


@pytest.fixture(scope='session')
def sentencepiece_models(tmp_path_factory):
  """Three vocabularies of one size; the first two are equal."""
  folder = tmp_path_factory.mktemp('vocabularies')
  paths = [folder / f'{i}.model' for i in range(3)]
  for path, text in zip(paths, ('ab', 'ab', 'cd'), strict=True):
    train_sentencepiece(path, [text] * 9, vocab_size=6)
  return paths


def train_sentencepiece(path, sentences, model_type='char', **settings) -> None:
  """Writes a model, of single letters by default, with T5's special ids."""
  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences),
    model_writer=model,
    model_type=model_type,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
    **settings,
  )
  path.write_bytes(model.getvalue())


@pytest.fixture(scope='session')
def train_letters(letters) -> Callable[..., str]:
  """Runs train.train on the tiny task; returns what it logged on stderr."""
  import optax

  from gkd_jax import train
  from gkd_jax.data import datasets
  from gkd_jax.distill import objectives, policies
  from gkd_jax.models.t5 import T5Config
  from gkd_jax.runtime import run_folder
  from tests import experiments

  def dataset(split, **changes):
    return datasets.DatasetConfig(
      letters, LENGTHS, **({'batch_size': 8, 'split': split} | changes)
    )

  settings = {
    'student': T5Config(264, 12, 2, 4, 10, 1, 1),
    'train_dataset': dataset('train'),
    'policy': policies.dataset(),
    'objective': objectives.Objective(
      divergence_weight=0.0, likelihood_weight=1.0
    ),
    'optimizer': optax.adamw,
    'learning_rate': optax.constant_schedule(1e-2),
    'total_steps': 1,
    'seed': 0,
    'log_period': 1,
  }

  def run(run_dir, **changes) -> str:
    of_run = {
      name: changes.pop(name) for name in ('config_text',) if name in changes
    }
    said = io.StringIO()
    experiment = experiments.experiment(**(settings | changes))
    with (
      contextlib.redirect_stderr(said),
      experiments.steps_compiled_once(made_by_gin=False),
    ):
      train.train(experiment, run_folder.Run(model_dir=str(run_dir), **of_run))
    return said.getvalue()

  run.dataset = dataset
  return run


@dataclasses.dataclass(frozen=True)
class Finished:
  """What a run of main ended with, as a shell would see it."""

  code: int
  out: str
  err: str


def call_main(*arguments: str) -> Finished:
  """Runs `python -m gkd_jax.main ARGUMENTS`, but in this process."""
  import gin
  from absl import flags
  from absl.testing import flagsaver

  from gkd_jax import main
  from tests import experiments

  out, err = io.StringIO(), io.StringIO()
  gin.clear_config()
  with (
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    flagsaver.flagsaver(),
    experiments.steps_compiled_once(made_by_gin=True),
  ):
    rest = flags.FLAGS(main.expand_gin_flags(['main', *arguments]))
    code = 0
    try:
      main.main(rest)
    except SystemExit as e:  # Python prints the text, and exits with 1
      print(e.code, file=err)
      code = 1
  gin.clear_config()
  return Finished(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope='session')
def run_main() -> Callable[..., Finished]:
  """Returns `call_main`."""
  return call_main


@pytest.fixture(scope='session')
def start_main():
  """Starts `python -m gkd_jax.main ARGUMENTS`; see tests.processes.Process."""
  from tests import processes

  return processes.Process


def pytest_sessionfinish() -> None:
  """Ends the processes that serve several tests."""
  for module, function in (
    ('tests.processes', 'stop'),
    ('tests.tiny', 'stop_servers'),
  ):
    if module in sys.modules:
      getattr(sys.modules[module], function)()


def gin_flags(**macros) -> tuple[str, ...]:
  """Returns the flags of main that set some macros."""
  return tuple(f'--gin.{name}={value}' for name, value in macros.items())


@pytest.fixture
def refused(run_main, tmp_path):
  """Runs main, which must refuse; returns what it says."""
  folder = tmp_path / 'run'

  def refused(*arguments):
    finished = run_main(*arguments, *gin_flags(MODEL_DIR=folder))
    assert finished.code == 1
    assert re.search('^Error: ', finished.err, re.MULTILINE)
    assert finished.out == ''
    assert 'Traceback' not in finished.err
    assert not folder.exists()
    return finished.err

  return refused


@pytest.fixture(scope='module')
def teacher_run(tmp_path_factory) -> pathlib.Path:
  """A run folder with a teacher of the shape of `experiments.STUDENT`."""
  from tests import experiments

  folder = tmp_path_factory.mktemp('teacher')
  save_model(folder, dataclasses.replace(experiments.STUDENT, dropout_rate=0.0))
  return folder
