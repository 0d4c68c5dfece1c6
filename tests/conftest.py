# SPDX-License-Identifier: Apache-2.0
"""What several test files share: a tiny task, tiny runs, and main in process.

Importing this must stay cheap: seqio and TensorFlow take 15 seconds, which the
tests of the core need not wait for. So they are imported inside fixtures.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

import pytest

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
  return {'error': 100 * wrong / len(targets)}


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


@pytest.fixture(scope='session')
def letters() -> str:
  """The name of a task of short words, written backwards; has an empty split."""
  return register(LETTERS, letter_words)


@dataclasses.dataclass(frozen=True)
class Finished:
  """What a run of main ended with, as a shell would see it."""

  code: int
  out: str
  err: str


@pytest.fixture
def run_main(capsys, monkeypatch) -> Callable[..., Finished]:
  """Runs `python -m gkd_jax.main ARGUMENTS`, but in this process."""
  import gin
  from absl import flags
  from absl.testing import flagsaver

  from gkd_jax import main

  def run(*arguments: str) -> Finished:
    monkeypatch.setattr('sys.argv', ['main', *arguments])
    gin.clear_config()
    capsys.readouterr()
    code, message = 0, ''
    with flagsaver.flagsaver():
      rest = flags.FLAGS(main.expand_gin_flags(['main', *arguments]))
      try:
        main.main(rest)
      except SystemExit as e:  # Python prints a text and exits with 1
        code, message = 1, e.code
    written = capsys.readouterr()
    return Finished(code, written.out, f'{written.err}{message}')

  yield run
  gin.clear_config()
