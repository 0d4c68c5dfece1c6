# SPDX-License-Identifier: Apache-2.0
"""Batches of a task, for training, evaluation and inference."""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epy

from gkd_jax.batch import Batch, Outputs
from gkd_jax.data import datasets, seqio_tasks, vocabularies
from gkd_jax.runtime import files

with epy.lazy_imports():
  import seqio
  import tensorflow as tf


class TrainIterator(Iterator[Batch]):
  """Endless shuffled batches of one host's rows, with a saveable position.

  The data is split into `num_shards` shards. Each shard provides
  batch_size / num_shards rows of every batch, in an order that the seed
  determines. Prefetched batches are part of the saved position.
  """

  def __init__(
    self,
    config: datasets.DatasetConfig,
    *,
    seed: int,
    shards: Sequence[int] = (0,),
    num_shards: int = 1,
    saves: bool = True,
    pad_id: int = 0,
  ):
    """Opens the data.

    Args:
      config: of the dataset.
      seed: of the order.
      shards: indices of this host's shards.
      num_shards: on all hosts. The batches depend on this number, not on the
        number of hosts.
      saves: whether `save` writes. Of the hosts with the same shards, only one
        must write.
      pad_id: of the model.
    """
    task = datasets.get_task(config)
    if config.num_examples is not None:
      task = seqio_tasks.first_examples(
        task, config.num_examples, config.use_cached
      )

    def open_shard(shard):
      ds = seqio.get_dataset(
        task,
        task_feature_lengths=config.lengths,
        feature_converter=_feature_converter(config.lengths),
        dataset_split=config.split,
        use_cached=config.use_cached,
        shuffle=config.shuffle,
        num_epochs=None,
        seed=seed,
        shard_info=seqio.ShardInfo(index=shard, num_shards=num_shards),
        verbose=False,
      )
      ds = ds.batch(config.batch_size // num_shards, drop_remainder=True)
      return iter(ds.prefetch(2).with_options(_reading_options()))

    self._iterators = {
      f'shard_{shard}_of_{num_shards}': open_shard(shard) for shard in shards
    }
    self._num_shards = num_shards
    self._saves = saves
    self._task_name = config.mixture_or_task_name
    self._pad_id = pad_id
    self._was_read = False

  def __next__(self) -> Batch:
    """Returns numpy arrays [rows of this host, ...].

    Raises:
      ValueError: a row has the pad id before other ids; or, in the first call,
        the position cannot be saved.
    """
    try:
      parts = [next(iterator) for iterator in self._iterators.values()]
    except StopIteration as e:  # the examples repeat, if there are any
      raise ValueError(
        f'A data shard of task {self._task_name!r} has no example; the data is '
        f'split into {self._num_shards} shards. Set experiment.Data.num_shards '
        'to fewer.'
      ) from e
    batch = _to_batch(
      {
        name: np.concatenate([part[name].numpy() for part in parts])
        for name in parts[0]
      },
      self._pad_id,
      self._task_name,
    )
    if not self._was_read:
      # TensorFlow detects only while saving that a dataset cannot be saved.
      # Without this, the run would fail at its first checkpoint.
      with tempfile.TemporaryDirectory() as folder:
        self.save(folder)
      self._was_read = True
    return batch

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the position into a folder.

    Raises:
      ValueError: the task has operations whose state TensorFlow cannot save.
    """
    if not self._saves:
      return
    try:
      for name, iterator in self._iterators.items():
        tf.train.Checkpoint(iterator=iterator).write(
          os.path.join(directory, name)
        )
    except tf.errors.FailedPreconditionError as e:
      raise ValueError(
        f'The position in the data of task {self._task_name!r} cannot be '
        'saved, so runs could not resume. Its preprocessors must not use '
        'tf.py_function, tf.numpy_function, or random operations without a '
        'seed. (For JSON lines use gin/tasks/json_lines.gin.) TensorFlow '
        f'reports: {e.message.splitlines()[0]}'
      ) from e

  def restore(self, directory: str | os.PathLike) -> None:
    """Restores the position that `save` wrote.

    Raises:
      files.CheckpointMismatch: it was saved with another number of shards.
      ValueError: a file is damaged.
    """
    for name, iterator in self._iterators.items():
      path = os.path.join(directory, name)
      if not os.path.exists(path + '.index'):
        saved = sorted(
          name.removesuffix('.index')
          for name in os.listdir(directory)
          if name.endswith('.index')
        )
        raise files.CheckpointMismatch(
          f'{directory} has positions of the data shards '
          f'{", ".join(saved) or "(none)"}, but not of {name}: this run has '
          f'{self._num_shards} shard(s). Set experiment.Data.num_shards to the '
          'saved number of shards.'
        )
      try:
        tf.train.Checkpoint(iterator=iterator).read(path).assert_consumed()
      except (tf.errors.OpError, IndexError, AssertionError) as e:
        raise ValueError(f'{path} is damaged: {e}') from e


def _reading_options() -> tf.data.Options:
  options = tf.data.Options()
  # Few threads: reading is cheap, and the model needs the cores.
  options.threading.private_threadpool_size = 2
  # Autotune's thread sleeps for up to a minute, and deleting the dataset, as at
  # the end of a run, waits for that thread.
  options.autotune.enabled = False
  options.deterministic = True
  return options


# Optional features of a task -> their names in a batch.
_OPTIONAL = {
  seqio_tasks.TEACHER_INPUTS: 'teacher_input_tokens',
  seqio_tasks.TEACHER_IDS: 'teacher_ids',
  seqio_tasks.REJECTED: 'rejected_tokens',
}


def _feature_converter(lengths: Mapping[str, int]) -> seqio.FeatureConverter:
  """Returns seqio's feature converter, for vocabularies with any pad id.

  seqio pads with 0 and treats every 0 as padding, but 0 is a token in some
  vocabularies. Therefore all ids are incremented here before seqio pads them,
  and decremented by `_to_batch`.
  """

  ids = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
  optional = {k: v for k, v in _OPTIONAL.items() if k in lengths}
  names = (*seqio_tasks.FEATURES, *optional)
  # Not an id, so it is not incremented.
  weights = {k: k for k in (seqio_tasks.ROW_WEIGHTS,) if k in lengths}
  number = seqio.FeatureConverter.FeatureSpec(dtype=tf.float32)

  class FeatureConverter(seqio.EncDecFeatureConverter):
    TASK_FEATURES = {
      **seqio.EncDecFeatureConverter.TASK_FEATURES,
      **dict.fromkeys(optional, ids),
      **dict.fromkeys(weights, number),
    }
    MODEL_FEATURES = {
      **seqio.EncDecFeatureConverter.MODEL_FEATURES,
      **dict.fromkeys(optional.values(), ids),
      **dict.fromkeys(weights, number),
    }

    def _convert_example(self, features):
      converted = super()._convert_example(features)
      return converted | {
        in_batch: features[name]
        for name, in_batch in (optional | weights).items()
      }

    def _convert_features(self, ds, task_feature_lengths):
      def shift(features):
        return {**features, **{name: features[name] + 1 for name in names}}

      return super()._convert_features(ds.map(shift), task_feature_lengths)

    def get_model_feature_lengths(self, task_feature_lengths):
      lengths = super().get_model_feature_lengths(task_feature_lengths)
      return lengths | {
        in_batch: task_feature_lengths[name]
        for name, in_batch in (optional | weights).items()
      }

  return FeatureConverter(pack=False)


def _to_batch(
  features: Mapping[str, np.ndarray], pad_id: int, task_name: str
) -> Batch:
  """Converts results of `_feature_converter`; pads with the model's pad id.

  Raises:
    ValueError: see `_check_padding`; or a row has no known teacher.
  """

  def ids(name):
    shifted = features[name].astype(np.int32)
    tokens = np.where(shifted == 0, pad_id, shifted - 1).astype(np.int32)
    _check_padding(tokens, pad_id, task_name)
    return tokens

  inputs, targets = ids('encoder_input_tokens'), ids('decoder_target_tokens')
  # The task's own rows may end with padding.
  weights = features['decoder_loss_weights'] * (targets != pad_id)
  teacher_inputs = None
  if 'teacher_input_tokens' in features:
    teacher_inputs = ids('teacher_input_tokens')
  teacher_ids = None
  if 'teacher_ids' in features:
    teacher_ids = features['teacher_ids'][:, 0].astype(np.int32) - 1
    if (teacher_ids < 0).any():
      raise ValueError(
        f'An example of task {task_name!r} names a teacher that is not in '
        'datasets.DatasetConfig.teachers.'
      )
  weights = weights.astype(np.float32)
  row_weights = None
  if seqio_tasks.ROW_WEIGHTS in features:
    row_weights = features[seqio_tasks.ROW_WEIGHTS][:, 0]
    if not np.isfinite(row_weights).all():
      raise ValueError(
        f'The "weight" of an example of task {task_name!r} is not a finite '
        'number.'
      )
  rejected = None
  if 'rejected_tokens' in features:
    tokens = ids('rejected_tokens')
    is_token = (features['rejected_tokens'] != 0) & (tokens != pad_id)
    rejected = Outputs(tokens, is_token.astype(np.float32))
  return Batch(
    inputs, targets, weights, teacher_inputs, teacher_ids, row_weights, rejected
  )


def _check_padding(tokens: np.ndarray, pad_id: int, task_name: str) -> None:
  """Raises ValueError if a row has the pad id before other ids."""
  is_pad = tokens == pad_id
  if (is_pad[..., :-1] & ~is_pad[..., 1:]).any():
    raise ValueError(
      f'A row of task {task_name!r} has the id {pad_id} before other ids. The '
      "model masks this id as padding. Set the task's vocabulary to the "
      "model's."
    )


class EvalDataset:
  """A split in memory, with the task's metrics; uses seqio.Evaluator."""

  def __init__(
    self,
    config: datasets.DatasetConfig,
    before_batch: Callable[[], None] = lambda: None,
    pad_id: int = 0,
  ):
    """Reads the split.

    Args:
      config: of the dataset.
      before_batch: called before each batch; may raise an exception to stop.
      pad_id: of the model.

    Raises:
      ValueError: the split is empty, or the task has no metrics.
    """
    datasets.check_not_empty(config)
    self._before_batch = before_batch
    self._pad_id = pad_id
    task = datasets.get_task(config)
    self.batch_size = config.batch_size
    self._name = config.mixture_or_task_name
    self._evaluator, self._indices, self._rows = _read_split(
      task.name,
      self._name,
      config.split,
      tuple(config.lengths.items()),
      config.num_examples,
      config.use_cached,
      pad_id,
    )
    self._task = self._evaluator.eval_tasks[0]
    self.vocabulary = task.output_features['targets'].vocabulary

  def __len__(self) -> int:
    """The number of examples."""
    return len(self._indices)

  def batches(self) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields (row numbers [B], batch).

    All batches have the same shape, so that one compiled program suffices: the
    last batch is filled up with rows of weight 0.
    """
    for start in range(0, len(self), self.batch_size):
      self._before_batch()
      yield (
        np.arange(start, start + self.batch_size, dtype=np.int32),
        self._filled_up(start),
      )

  def _filled_up(self, start: int) -> Batch:
    """Returns the batch whose first row is `start`."""

    def cut(x, fill):
      if x is None:
        return None
      x = x[start : start + self.batch_size]
      missing = self.batch_size - len(x)
      widths = ((0, missing), *((0, 0) for _ in x.shape[1:]))
      return np.pad(x, widths, constant_values=fill)

    rows, pad = self._rows, self._pad_id
    return Batch(
      cut(rows.encoder_input_tokens, pad),
      cut(rows.decoder_target_tokens, pad),
      cut(rows.decoder_loss_weights, 0.0),
      cut(rows.teacher_input_tokens, pad),
      cut(rows.teacher_ids, -1),
      cut(rows.row_weights, 0.0),
    )

  def predict(
    self, write: Callable[[np.ndarray, Batch], np.ndarray]
  ) -> np.ndarray:
    """Returns the outputs [N, T] of write(row numbers, batch) for all rows."""
    written = [np.asarray(write(rows, batch)) for rows, batch in self.batches()]
    return np.concatenate(written)[: len(self)]

  def metrics(self, tokens: np.ndarray) -> dict[str, float]:
    """Returns the task's metrics of outputs [N, T]."""
    return self.metrics_and_notes(tokens)[0]

  def metrics_and_notes(
    self, tokens: np.ndarray
  ) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the task's metrics of outputs [N, T], and notes.

    Notes are the texts and mappings that a metric function returns beside its
    numbers, such as sacreBLEU's signature or the accuracy on each subject.
    """
    predictions = [
      (index, row) for index, row in zip(self._indices, tokens, strict=True)
    ]
    results, _ = self._evaluator.evaluate(
      compute_metrics=True, predict_fn=lambda ds: predictions
    )
    numbers, notes = {}, {}
    for name, value in results.result()[self._task.name].items():
      if isinstance(value, str | Mapping):
        notes[name] = value
      else:
        numbers[name] = float(value)
    return numbers, notes

  def metric_names(self) -> list[str]:
    """Returns the names of the task's metrics, by scoring the references."""
    return list(self.metrics(self._rows.decoder_target_tokens))

  def decode(self, tokens: np.ndarray) -> list[str]:
    """Returns the texts of outputs [N, T], each up to its EOS."""
    return [vocabularies.decode(self.vocabulary, row) for row in tokens]

  def pieces(self, tokens: Sequence[int]) -> list[str]:
    """Returns the text that each token [T] adds; joined they equal `decode`.

    EOS adds no text. Of several bytes that encode one character, the last byte
    adds the character and the others add no text.
    """
    ids = [int(t) for t in tokens]
    (whole,) = self.decode([ids])
    ends = [0]
    for i in range(1, len(ids)):
      (text,) = self.decode([ids[:i]])
      # A vocabulary may decode an incomplete character to a placeholder.
      ends.append(max(ends[-1], len(os.path.commonprefix([text, whole]))))
    ends.append(len(whole))
    return [whole[a:b] for a, b in itertools.pairwise(ends)]

  def piece_after(self, tokens: Sequence[int], token: int) -> str:
    """Returns the text that one more token would add, or \\xNN for a byte."""
    ids = [int(t) for t in tokens]
    before, after = self.decode([ids, [*ids, int(token)]])
    added = after[len(os.path.commonprefix([before, after])) :]
    if added or token == self.vocabulary.eos_id:
      return added
    byte = token - 3  # after pad, EOS and unknown
    if isinstance(self.vocabulary, seqio.ByteVocabulary) and 0 <= byte < 256:
      return f'\\x{byte:02x}'
    return f'<{token}>'

  def examples(self, num: int | None = None) -> list[dict[str, str]]:
    """Returns {'inputs', 'targets'} of the first examples (None: all)."""
    return [
      {'inputs': x, 'targets': y}
      for x, y in zip(
        self.decode(self._rows.encoder_input_tokens[:num]),
        self.decode(self._rows.decoder_target_tokens[:num]),
        strict=True,
      )
    ]


@functools.lru_cache(maxsize=4)
def _read_split(
  registered_name: str,
  name: str,
  split: str,
  lengths: Sequence[tuple[str, int]],
  num_examples: int | None,
  use_cached: bool,
  pad_id: int,
) -> tuple[seqio.Evaluator, Sequence[int], Batch]:
  """Reads a split; cached for all runs of this process.

  The registered name identifies the task's vocabulary, arguments and
  predictions: see `seqio_tasks`.

  Returns:
    The evaluator, seqio's index of each row, and the rows [N, ...].

  Raises:
    ValueError: see `EvalDataset`.
  """
  evaluator = seqio.Evaluator(
    registered_name,
    feature_converter=_feature_converter(dict(lengths)),
    eval_split=split,
    use_cached=use_cached,
    sequence_length=dict(lengths),
    num_examples=num_examples,
    logger_cls=(),
  )
  if not evaluator.eval_tasks:
    raise ValueError(
      f'Task {name!r} has no metric_fns, so it cannot be evaluated.'
    )
  if len(evaluator.eval_tasks) > 1:
    raise ValueError(
      f'{name!r} is a mixture of several tasks. Evaluate each task separately.'
    )
  dataset = evaluator.cached_model_datasets[evaluator.eval_tasks[0].name]
  # Pairs of (seqio's index, features).
  rows = list(dataset.as_numpy_iterator())
  return (
    evaluator,
    [int(i) for i, _ in rows],
    _to_batch(
      {k: np.stack([f[k] for _, f in rows]) for k in rows[0][1]}, pad_id, name
    ),
  )


class InferenceDataset:
  """The inputs of a split in order, streamed.

  Unlike `EvalDataset` it needs no metrics, and the split may exceed memory.
  """

  def __init__(self, config: datasets.DatasetConfig, pad_id: int = 0):
    """Opens the split.

    Args:
      config: of the dataset.
      pad_id: of the model.

    Raises:
      ValueError: the split is empty, or the task is a mixture of several tasks.
    """
    datasets.check_not_empty(config)
    self._config = config
    self._pad_id = pad_id
    self.vocabulary = datasets.get_vocabulary(config)
    self._task, *others = seqio.get_subtasks(datasets.get_task(config))
    if others:
      raise ValueError(
        f'{config.mixture_or_task_name!r} is a mixture of several tasks. Run '
        'inference on each task separately.'
      )

  def size(self) -> int | None:
    """Returns the number of examples; None if the task does not define it."""
    sizes = (
      self._task.num_input_examples(self._config.split),
      self._config.num_examples,
    )
    return None if sizes[0] is None else min(filter(None, sizes))

  def batches(
    self, first_example: int = 0
  ) -> Iterator[tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]]:
    """Yields (row numbers [B], encoder_input_tokens [B, S], examples).

    All batches have the same shape: the last batch is filled up with rows of
    padding. Row numbers are those of `EvalDataset.batches`. An example is
    {'inputs': text, 'targets': text, 'input_ids': ids without padding}.

    Args:
      first_example: the first example to yield.
    """
    config = self._config
    ds = self._task.get_dataset(
      config.lengths,
      split=config.split,
      shuffle=False,
      use_cached=config.use_cached,
      seed=42,  # of random preprocessors, as in seqio.Evaluator
    )
    if config.num_examples is not None:
      ds = ds.take(config.num_examples)
    ds = ds.skip(first_example).with_options(_reading_options())
    size = config.batch_size
    rows = ds.as_numpy_iterator()
    while part := list(itertools.islice(rows, size)):
      shape = (size, config.task_feature_lengths['inputs'])
      inputs = np.full(shape, self._pad_id, np.int32)
      for row, features in zip(inputs, part, strict=False):
        row[: len(features['inputs'])] = features['inputs']
      _check_padding(inputs, self._pad_id, config.mixture_or_task_name)
      yield (
        np.arange(first_example, first_example + size, dtype=np.int32),
        inputs,
        [self._describe(features) for features in part],
      )
      first_example += len(part)

  def _describe(self, features: Mapping[str, Any]) -> dict[str, Any]:
    texts = {}
    for name in seqio_tasks.FEATURES:
      # seqio keeps the text before tokenization and truncation.
      text = features.get(f'{name}_pretokenized')
      texts[name] = (
        text.decode(errors='replace')
        if isinstance(text, bytes)
        else vocabularies.decode(self.vocabulary, features[name])
      )
    return {**texts, 'input_ids': features['inputs'].tolist()}
