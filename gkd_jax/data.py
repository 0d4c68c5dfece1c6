# SPDX-License-Identifier: Apache-2.0
"""From a seqio task to batches and metrics.

Only this module and `tasks` use seqio and TensorFlow. This one imports them
when they are first used: they take 10 seconds, which a misspelt setting need
not wait for.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import os
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath, epy

from gkd_jax import metrics as metrics_lib
from gkd_jax import predictions as predictions_lib
from gkd_jax.batch import EOS_ID, PAD_ID, Batch

with epy.lazy_imports():
  import seqio
  import tensorflow as tf

_FEATURES = ('inputs', 'targets')


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
  """Which examples, and how they become a batch. Names as in T5X.

  Attributes:
    mixture_or_task_name: a seqio task or mixture.
    task_feature_lengths: {'inputs': S, 'targets': T} in tokens, EOS included;
      longer examples are cut.
    batch_size: rows of the global batch.
    split: of the task, e.g. 'train'.
    shuffle: in an order that the seed determines.
    mixture_or_task_module: imported first, to register the task; None for the
      tasks that come with gkd_jax.
    use_cached: read seqio's offline cache of the task.
    num_examples: at most so many, from the split's start; None takes all. For
      training these are a task's examples before they are preprocessed.
    vocabulary: of inputs and targets; None: the task's own.
    task_arguments: of the function make_task in the task's module, for a task
      that is not the same for everyone: where its files are, say.
    predictions: path, or glob of several, of outputs that a model wrote (see
      `predictions`); they and their inputs replace the split's examples.
  """

  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  batch_size: int
  split: str = 'train'
  shuffle: bool = True
  mixture_or_task_module: str | None = None
  use_cached: bool = False
  num_examples: int | None = None
  vocabulary: seqio.Vocabulary | None = None
  task_arguments: Mapping[str, Any] | None = None
  predictions: str | None = None

  def __post_init__(self):
    lengths = dict(self.task_feature_lengths)
    if sorted(lengths) != sorted(_FEATURES) or not all(
      isinstance(n, int) and n > 0 for n in lengths.values()
    ):
      raise ValueError(
        "TASK_FEATURE_LENGTHS must be {'inputs': tokens, 'targets': tokens} "
        f'with positive whole numbers, got {lengths}.'
      )
    if not isinstance(self.batch_size, int) or self.batch_size < 1:
      raise ValueError(
        f'BATCH_SIZE must be a positive whole number, got {self.batch_size!r}.'
      )
    arguments = self.task_arguments
    if arguments is not None and not isinstance(arguments, Mapping):
      raise ValueError(
        f'TASK_ARGUMENTS must be {{name: value}}, or None; got {arguments!r}.'
      )
    n = self.num_examples
    if n is not None and (not isinstance(n, int) or n < 1):
      raise ValueError(
        f'{self.split}: the number of examples must be a positive whole '
        f'number, or None for all of them; got {n!r}.'
      )


def get_task(config: DatasetConfig) -> seqio.Task | seqio.Mixture:
  """Returns the task, after importing what registers it.

  Raises:
    ValueError: it is not registered, lacks the split, or has none of the
      features of an encoder-decoder; there is no such module; the file of the
      vocabulary cannot be read; or the predictions are of no use for it.
  """
  name = config.mixture_or_task_name
  module = _import_module(config)
  registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if config.task_arguments is not None or (
    name not in registered and hasattr(module, 'make_task')
  ):
    task = _make_task(module, name, config.task_arguments or {})
  elif name in registered:
    task = seqio.get_mixture_or_task(name)
  else:
    names = sorted({*registered, *_our_tasks()})
    near = difflib.get_close_matches(name, names, n=1)
    raise ValueError(
      f'MIXTURE_OR_TASK_NAME: no task or mixture {name!r} is registered.'
      + (f' Did you mean {near[0]!r}?' if near else '')
      + f' Registered: {", ".join(names)}. To use your own, set '
      'MIXTURE_OR_TASK_MODULE to the Python module that registers it.'
    )
  if config.split not in task.splits:
    raise ValueError(
      f'Task {name!r} has no split {config.split!r}. It has: '
      f'{", ".join(sorted(task.splits))}.'
    )
  if missing := set(_FEATURES) - set(task.output_features):
    raise ValueError(
      f'Task {name!r} has no output feature {sorted(missing)}; an '
      'encoder-decoder reads inputs and targets.'
    )
  if config.vocabulary is not None:
    task = _with_vocabulary(task, config.vocabulary)
  else:
    for feature in task.output_features.values():
      _check_vocabulary_can_be_read(name, feature.vocabulary)
  if config.predictions is not None:
    task = _with_predictions(task, config)
  return task


def _import_module(config: DatasetConfig) -> types.ModuleType | None:
  """Imports the task's module; None if nothing says which it is."""
  module = config.mixture_or_task_module
  if module is None:
    name = config.mixture_or_task_name
    if _comes_with_us(name):
      return importlib.import_module(f'gkd_jax.tasks.{name}')
    return None
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as e:
    if e.name is None or not f'{module}.'.startswith(f'{e.name}.'):
      raise  # it is there, and lacks something itself
    raise ValueError(
      f'MIXTURE_OR_TASK_MODULE: there is no Python module {module!r}. It is '
      'looked for where Python is started, on PYTHONPATH, and among the '
      'installed packages.'
    ) from e


def _make_task(
  module: types.ModuleType | None, name: str, arguments: Mapping[str, Any]
) -> seqio.Task | seqio.Mixture:
  """Returns make_task(name, **arguments), registered under a name of its own.

  seqio's evaluator knows tasks by name, so other arguments need another name.
  """
  make_task = getattr(module, 'make_task', None)
  if make_task is None:
    raise ValueError(
      f'TASK_ARGUMENTS is set, but task {name!r} takes none: its module has no '
      'function make_task.'
    )
  signature = inspect.signature(make_task)
  try:
    signature.bind(name, **arguments)
  except TypeError as e:
    raise ValueError(
      f'TASK_ARGUMENTS of task {name!r}: {e}. It takes '
      f'{", ".join([*signature.parameters][1:])}; where there is a '
      f'gin/tasks/{name}.gin, its macros set them.'
    ) from e
  if arguments:
    name += f'__{_digest(json.dumps(arguments, sort_keys=True, default=str))}'
  if name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
    return seqio.get_mixture_or_task(name)
  return _register(make_task(name, **arguments))


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _register(task: seqio.Task | seqio.Mixture) -> seqio.Task | seqio.Mixture:
  is_mixture = isinstance(task, seqio.Mixture)
  registry = seqio.MixtureRegistry if is_mixture else seqio.TaskRegistry
  registry.add_provider(task.name, task)
  return task


def _with_vocabulary(
  task: seqio.Task | seqio.Mixture, vocabulary: seqio.Vocabulary
) -> seqio.Task | seqio.Mixture:
  """Returns it with another vocabulary, registered under a new name.

  A mixture keeps its rates, and how it samples.
  """
  name = f'{task.name}__vocabulary_{_digest(describe_vocabulary(vocabulary))}'
  if name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
    return seqio.get_mixture_or_task(name)
  if isinstance(task, seqio.Mixture):
    parts = {part.name: part for part in task.tasks}
    changed = []
    for part_name, rate in task.rate_per_task_name.items():
      part = parts.get(part_name) or seqio.MixtureRegistry.get(part_name)
      # A rate may be a function of the task: of the one it was written for.
      if callable(rate):
        rate = functools.partial(_rate_of, rate, part)
      changed.append((_with_vocabulary(part, vocabulary), rate))
    # seqio has no accessor for how a mixture samples.
    return _register(seqio.Mixture(name, changed, sample_fn=task._sample_fn))
  features = {
    feature: dataclasses.replace(value, vocabulary=vocabulary)
    for feature, value in task.output_features.items()
  }
  return _register(task.replace(name=name, output_features=features))


def _rate_of(rate: Callable, original: seqio.Task, changed: seqio.Task):
  del changed
  return rate(original)


def _with_predictions(
  task: seqio.Task | seqio.Mixture, config: DatasetConfig
) -> seqio.Task:
  """Returns a task of a model's outputs, registered under a name of its own."""
  lengths = dict(config.task_feature_lengths)
  files = [
    (path, os.stat(path).st_size, os.stat(path).st_mtime_ns)
    for path in predictions_lib.find(config.predictions)
  ]
  what = repr((files, config.split, sorted(lengths.items())))
  digest = hashlib.sha256(what.encode()).hexdigest()
  name = f'{task.name}__predictions_{digest[:8]}'
  if name in seqio.TaskRegistry.names():
    return seqio.TaskRegistry.get(name)
  features = {name: task.output_features[name] for name in _FEATURES}
  vocabulary = features['targets'].vocabulary
  examples = predictions_lib.read(
    config.predictions,
    task=config.mixture_or_task_name,
    vocabulary=describe_vocabulary(vocabulary),
    num_ids=vocabulary.vocab_size,
    encode=vocabulary.encode,
    lengths=lengths,
    add_eos={name: feature.add_eos for name, feature in features.items()},
  )
  metrics_lib.say(f'Trains on {examples.summary}')

  def dataset(split, shuffle_files, seed=None):
    del split
    order = np.arange(len(examples.offsets['inputs']) - 1)
    if shuffle_files:
      # Predictions for one input lie side by side: farther apart than seqio's
      # buffer, which shuffles after this, would take them.
      order = np.random.default_rng(seed).permutation(order)
    ids = {name: tf.constant(x) for name, x in examples.ids.items()}
    offsets = {name: tf.constant(x) for name, x in examples.offsets.items()}

    def row(i):
      return {
        name: ids[name][offsets[name][i] : offsets[name][i + 1]]
        for name in _FEATURES
      }

    return tf.data.Dataset.from_tensor_slices(order).map(row)

  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(dataset, splits=[config.split]),
    preprocessors=[],
    output_features=features,
  )
  return seqio.TaskRegistry.get(name)


def _first_examples(
  task: seqio.Task | seqio.Mixture, config: DatasetConfig
) -> seqio.Task:
  """Returns the task with the first examples alone, under a new name."""
  num_examples = config.num_examples
  if isinstance(task, seqio.Mixture) or config.use_cached:
    raise ValueError(
      f'TRAIN_NUM_EXAMPLES is {num_examples}, but the examples of '
      f'{task.name!r} '
      + (
        'come from a cache (USE_CACHED_TASKS).'
        if config.use_cached
        else 'are mixed from several tasks.'
      )
      + ' Register a task that has the examples you want.'
    )

  name = f'{task.name}__first_{num_examples}'
  if name in seqio.TaskRegistry.names():
    return seqio.TaskRegistry.get(name)

  def first_examples(split, shuffle_files, seed=None):
    del shuffle_files, seed  # in their own order: these are always the same
    return task.source.get_dataset(split, shuffle=False).take(num_examples)

  source = seqio.FunctionDataSource(
    first_examples,
    splits=task.splits,
    num_input_examples={
      split: min(num_examples, task.num_input_examples(split) or num_examples)
      for split in task.splits
    },
  )
  return _register(task.replace(name=name, source=source))


def _check_vocabulary_can_be_read(
  task_name: str, vocabulary: seqio.Vocabulary
) -> None:
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return
  path = vocabulary.sentencepiece_model_file
  try:
    if str(path).startswith('gs://'):
      _check_google_storage_answers()
    vocabulary.load_model()
  except Exception as e:  # of TensorFlow, protobuf, sentencepiece, urllib
    raise ValueError(
      f'The vocabulary of task {task_name!r}, {path}, cannot be read: {e}. If '
      'you have the file (Hugging Face calls it spiece.model), add --gin_file='
      'gin/vocabularies/sentencepiece.gin --gin.VOCABULARY_PATH=FILE.'
    ) from e


@functools.cache
def _check_google_storage_answers() -> None:
  """Raises OSError after seconds, where TensorFlow would try for minutes."""
  try:
    urllib.request.urlopen('https://storage.googleapis.com', timeout=10)
  except urllib.error.HTTPError:
    pass  # an answer: it is there


def sentencepiece_vocabulary(
  path: str, extra_ids: int = 100
) -> seqio.Vocabulary:
  """Returns the vocabulary of a SentencePiece model.

  Args:
    path: of the `.model` file; Hugging Face calls it spiece.model.
    extra_ids: sentinels after the model's pieces; 100 in T5.

  Raises:
    ValueError: the file is not there, or is no SentencePiece model.
  """
  if not epath.Path(path).exists():
    raise ValueError(f'VOCABULARY_PATH {path} is not there.')
  vocabulary = seqio.SentencePieceVocabulary(str(path), extra_ids)
  try:
    vocabulary.load_model()
  except Exception as e:  # protobuf's and sentencepiece's, of many types
    raise ValueError(
      f'VOCABULARY_PATH {path} is no SentencePiece model: {e}'
    ) from e
  return vocabulary


def byte_vocabulary(extra_ids: int = 0) -> seqio.Vocabulary:
  """Returns ByT5's vocabulary: pad, EOS, unknown, and the 256 bytes."""
  return seqio.ByteVocabulary(extra_ids)


def check_not_empty(config: DatasetConfig) -> None:
  """Raises ValueError if the split has no examples. Reads one."""
  ds = get_task(config).get_dataset(
    sequence_length=dict(config.task_feature_lengths),
    split=config.split,
    shuffle=False,
    use_cached=config.use_cached,
  )
  if not list(ds.take(1)):
    raise ValueError(
      f'Split {config.split!r} of task {config.mixture_or_task_name!r} is '
      'empty.'
    )


def get_vocabulary(config: DatasetConfig) -> seqio.Vocabulary:
  """Returns the vocabulary of the task's inputs and targets.

  Raises:
    ValueError: they differ, or its special ids are not T5's.
  """
  features = get_task(config).output_features
  vocabulary = features['targets'].vocabulary
  if features['inputs'].vocabulary != vocabulary:
    raise ValueError(
      f'Task {config.mixture_or_task_name!r} has different vocabularies for '
      'inputs and targets; a T5 embeds both with one table.'
    )
  ids = (vocabulary.pad_id, vocabulary.eos_id)
  if ids != (PAD_ID, EOS_ID):
    raise ValueError(
      f'The vocabulary of task {config.mixture_or_task_name!r} has pad and EOS '
      f'ids {ids}; T5 needs ({PAD_ID}, {EOS_ID}).'
    )
  return vocabulary


def describe_vocabulary(vocabulary: seqio.Vocabulary) -> str:
  """Returns a line that is equal for equal vocabularies; saved with models."""
  kind, size = type(vocabulary).__name__, vocabulary.vocab_size
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    # Of the file, not of what seqio makes of it: other systems have the file.
    model = epath.Path(vocabulary.sentencepiece_model_file).read_bytes()
    digest = hashlib.sha256(model).hexdigest()
    return f'{kind} {size} ids, model sha256 {digest}'
  return f'{kind} {size} ids'


class TrainIterator(Iterator[Batch]):
  """Endless shuffled batches of one host's rows; can be saved and restored.

  The order is a function of the seed. A batch handed out is consumed: what is
  read ahead stays in the iterator and is saved with it.
  """

  def __init__(
    self,
    config: DatasetConfig,
    *,
    seed: int,
    shard: int = 0,
    num_shards: int = 1,
  ):
    """Args: the dataset, the seed of its order, and which host this is of."""
    task = get_task(config)
    if config.num_examples is not None:
      task = _first_examples(task, config)
    ds = seqio.get_dataset(
      task,
      task_feature_lengths=dict(config.task_feature_lengths),
      feature_converter=seqio.EncDecFeatureConverter(pack=False),
      dataset_split=config.split,
      use_cached=config.use_cached,
      shuffle=config.shuffle,
      num_epochs=None,
      seed=seed,
      shard_info=seqio.ShardInfo(index=shard, num_shards=num_shards),
      verbose=False,
    )
    ds = ds.batch(config.batch_size // num_shards, drop_remainder=True)
    self._iterator = iter(ds.prefetch(2).with_options(_reading_options()))
    self._name = f'process_{shard}_of_{num_shards}'

  def __next__(self) -> Batch:
    """Returns numpy arrays [rows of this host, ...]."""
    return _to_batch(
      {name: x.numpy() for name, x in next(self._iterator).items()}
    )

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the position into a folder."""
    tf.train.Checkpoint(iterator=self._iterator).write(
      os.path.join(directory, self._name)
    )

  def restore(self, directory: str | os.PathLike) -> None:
    """Goes to the position that `save` wrote."""
    path = os.path.join(directory, self._name)
    if not os.path.exists(path + '.index'):
      raise ValueError(
        f'{directory} holds no position of data shard {self._name}: it was '
        'saved by another number of hosts.'
      )
    tf.train.Checkpoint(iterator=self._iterator).read(path).assert_consumed()


def _reading_options() -> tf.data.Options:
  options = tf.data.Options()
  # Reading is cheap; the cores belong to the model.
  options.threading.private_threadpool_size = 2
  options.deterministic = True
  return options


def _to_batch(features: Mapping[str, np.ndarray]) -> Batch:
  return Batch(
    features['encoder_input_tokens'].astype(np.int32),
    features['decoder_target_tokens'].astype(np.int32),
    features['decoder_loss_weights'].astype(np.float32),
  )


# Rows of a batch [n, ...] -> tokens written for them [n, T].
Predict = Callable[[Batch], np.ndarray]


class EvalDataset:
  """A split in memory, with the task's metrics (through seqio.Evaluator)."""

  def __init__(self, config: DatasetConfig):
    """Reads the split.

    Raises:
      ValueError: it is empty, or the task has no metrics.
    """
    check_not_empty(config)
    task = get_task(config)
    self.batch_size = config.batch_size
    self._name = config.mixture_or_task_name
    self._evaluator = seqio.Evaluator(
      task.name,
      feature_converter=seqio.EncDecFeatureConverter(pack=False),
      eval_split=config.split,
      use_cached=config.use_cached,
      sequence_length=dict(config.task_feature_lengths),
      num_examples=config.num_examples,
      logger_cls=(),
    )
    if not self._evaluator.eval_tasks:
      raise ValueError(
        f'Task {self._name!r} has no metric_fns: there is nothing to evaluate.'
      )
    if len(self._evaluator.eval_tasks) > 1:
      raise ValueError(
        f'{self._name!r} is a mixture of several tasks; evaluate them one by '
        'one.'
      )
    self._task = self._evaluator.eval_tasks[0]
    self.vocabulary = task.output_features['targets'].vocabulary
    rows = list(
      self._evaluator.cached_model_datasets[self._task.name].as_numpy_iterator()
    )
    # (row number, features) pairs; the numbers are seqio's.
    self._indices = [int(i) for i, _ in rows]
    self._rows = _to_batch(
      {k: np.stack([f[k] for _, f in rows]) for k in rows[0][1]}
    )

  def __len__(self) -> int:
    """The number of examples."""
    return len(self._indices)

  def batches(self) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields (row numbers [B], batch); rows that fill the last one up weigh 0.

    All batches have the same shape, so that one compiled program serves.
    """
    for start in range(0, len(self), self.batch_size):
      part = Batch(*(x[start : start + self.batch_size] for x in self._rows))
      fill = self.batch_size - len(part.encoder_input_tokens)
      yield (
        np.arange(start, start + self.batch_size, dtype=np.int32),
        Batch(*(np.pad(x, ((0, fill), (0, 0))) for x in part)),
      )

  def predict(
    self, write: Callable[[np.ndarray, Batch], np.ndarray]
  ) -> np.ndarray:
    """Returns the tokens [N, T] that write(row numbers, batch) gives."""
    written = [np.asarray(write(rows, batch)) for rows, batch in self.batches()]
    return np.concatenate(written)[: len(self)]

  def metrics(self, tokens: np.ndarray) -> dict[str, float]:
    """Returns the task's metrics of outputs [N, T]."""
    return self.metrics_and_notes(tokens)[0]

  def metrics_and_notes(
    self, tokens: np.ndarray
  ) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the task's metrics of outputs [N, T], and what else they say.

    A metric function may return texts and mappings beside its numbers, such
    as sacreBLEU's signature or the accuracy on each subject: the notes.
    """
    predictions = [
      (index, row) for index, row in zip(self._indices, tokens, strict=True)
    ]
    results, _ = self._evaluator.evaluate(
      compute_metrics=True, predict_fn=lambda ds: predictions
    )
    # seqio names the metric's class or function in the task's results.
    numbers, notes = {}, {}
    for name, value in results.result()[self._task.name].items():
      if isinstance(value, str | Mapping):
        notes[name] = value
      else:
        numbers[name] = float(value)
    return numbers, notes

  def metric_names(self) -> list[str]:
    """Returns the names of the task's metrics: those of the references."""
    return list(self.metrics(self._rows.decoder_target_tokens))

  def decode(self, tokens: np.ndarray) -> list[str]:
    """Returns the texts of outputs [N, T], as the task postprocesses them."""
    return [decode(self.vocabulary, row) for row in tokens]

  def pieces(self, tokens: Sequence[int]) -> list[str]:
    """Returns the text that each token [T] adds; joined they are `decode`'s.

    A token adds none where it is the end, or one of several bytes of a letter:
    the letter comes with the last of them.
    """
    ids = [int(t) for t in tokens]
    (whole,) = self.decode([ids])
    ends = [0]
    for i in range(1, len(ids)):
      (text,) = self.decode([ids[:i]])
      # A vocabulary may write an unfinished letter as a letter of its own.
      ends.append(max(ends[-1], len(os.path.commonprefix([text, whole]))))
    ends.append(len(whole))
    return [whole[a:b] for a, b in itertools.pairwise(ends)]

  def piece_after(self, tokens: Sequence[int], token: int) -> str:
    """Returns the text that one more token would add; of bytes, which."""
    ids = [int(t) for t in tokens]
    before, after = self.decode([ids, [*ids, int(token)]])
    added = after[len(os.path.commonprefix([before, after])) :]
    if added or token == EOS_ID:
      return added
    byte = token - 3  # after pad, EOS and unknown
    if isinstance(self.vocabulary, seqio.ByteVocabulary) and 0 <= byte < 256:
      return f'\\x{byte:02x}'
    return f'<{token}>'

  def examples(self, num: int | None = None) -> list[dict[str, str]]:
    """Returns {'inputs', 'targets'} of the first examples, or all, as text."""
    return [
      {'inputs': x, 'targets': y}
      for x, y in zip(
        self.decode(self._rows.encoder_input_tokens[:num]),
        self.decode(self._rows.decoder_target_tokens[:num]),
        strict=True,
      )
    ]


class InferenceDataset:
  """The inputs of a split in order, read when they are needed.

  It takes any split of any task: one too large for the memory, too, and one
  without metrics.
  """

  def __init__(self, config: DatasetConfig):
    """Opens the split.

    Raises:
      ValueError: it is empty, or of several tasks.
    """
    check_not_empty(config)
    self._config = config
    self.vocabulary = get_vocabulary(config)
    self._task, *others = seqio.get_subtasks(get_task(config))
    if others:
      raise ValueError(
        f'{config.mixture_or_task_name!r} is a mixture of several tasks; write '
        'outputs for one after the other.'
      )

  def size(self) -> int | None:
    """Returns the number of examples, None where the task does not tell."""
    sizes = (
      self._task.num_input_examples(self._config.split),
      self._config.num_examples,
    )
    return None if sizes[0] is None else min(filter(None, sizes))

  def batches(
    self, first_example: int = 0
  ) -> Iterator[tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]]:
    """Yields (row numbers [B], encoder_input_tokens [B, S], examples).

    All batches have the same shape: rows of padding fill the last one up. The
    same rows have the same numbers as in `EvalDataset.batches`. An example is
    {'inputs': text, 'targets': text, 'input_ids': those of its row}.

    Args:
      first_example: where to begin.
    """
    config = self._config
    ds = self._task.get_dataset(
      dict(config.task_feature_lengths),
      split=config.split,
      shuffle=False,
      use_cached=config.use_cached,
      seed=42,  # as seqio.Evaluator: some preprocessors draw
    )
    if config.num_examples is not None:
      ds = ds.take(config.num_examples)
    ds = ds.skip(first_example).with_options(_reading_options())
    size = config.batch_size
    rows = ds.as_numpy_iterator()
    while part := list(itertools.islice(rows, size)):
      shape = (size, config.task_feature_lengths['inputs'])
      inputs = np.full(shape, PAD_ID, np.int32)
      for row, features in zip(inputs, part, strict=False):
        row[: len(features['inputs'])] = features['inputs']
      yield (
        np.arange(first_example, first_example + size, dtype=np.int32),
        inputs,
        [self._describe(features) for features in part],
      )
      first_example += len(part)

  def _describe(self, features: Mapping[str, Any]) -> dict[str, Any]:
    texts = {}
    for name in _FEATURES:
      # What seqio keeps of the text before it was tokenized (and cut).
      text = features.get(f'{name}_pretokenized')
      texts[name] = (
        text.decode(errors='replace')
        if isinstance(text, bytes)
        else decode(self.vocabulary, features[name])
      )
    return {**texts, 'input_ids': features['inputs'].tolist()}


def decode(vocabulary: seqio.Vocabulary, tokens: Iterable[int]) -> str:
  """Returns the text of a row of tokens, up to its EOS."""
  return str(vocabulary.decode([int(t) for t in tokens]))


def _our_tasks() -> Sequence[str]:
  folder = os.path.join(os.path.dirname(__file__), 'tasks')
  return [
    name[:-3]
    for name in sorted(os.listdir(folder))
    if name.endswith('.py') and not name.startswith('_')
  ]


def _comes_with_us(name: str) -> bool:
  return name in _our_tasks()
