# SPDX-License-Identifier: Apache-2.0
"""Files of model outputs: `infer` and `select` write them, datasets read them.

`predictions_<split>.jsonl` has a line for each output:

    {"example": 0, "sample": 0, "inputs": "through", "targets": "Tru",
     "prediction": "Tru", "input_ids": [119, ..., 1], "prediction_ids": [...]}

A student trains on the ids; the texts are for readers. The ids are exactly what
the model read and wrote, without padding, and with EOS only if the model wrote
it. Tokenizing the texts would not always restore them: text loses invalid
UTF-8, the segmentation, spaces, unknown pieces, and whether an output ended.
`predictions_<split>.json` beside the file records the checkpoint, the decoding
and the vocabulary.

A file without ids, with {"inputs", "prediction"} on each line, may come from
any program; its texts are tokenized when it is read.
"""

import heapq
import itertools
import json
import math
import operator
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gkd_jax.data import json_lines
from gkd_jax.runtime import files, paths, pins

_SETTING = 'TRAIN_ON_PREDICTIONS'
OUTPUT_SETTING = 'INFER_OUTPUT_DIR'
# Fields of the provenance that may differ when an interrupted write resumes.
_CHANGING = (
  *('num_examples', 'num_predictions', 'num_examples_without_output'),
  *('versions', 'pins'),
)
# Fields of a line: of all files, and of those with ids.
_TEXTS = {'inputs': str, 'prediction': str}
_IDS = {'input_ids': list, 'prediction_ids': list}
# Fields of a line that a model or its task gave it.
FIELDS = (*('inputs', 'targets', 'prediction'), 'input_ids', 'prediction_ids')
# Fields that files must share whose outputs are read together.
_SHARED = ('task', 'split', 'vocabulary', 'task_feature_lengths')


def pins_of_partial(path: pathlib.Path) -> dict[str, pins.Pin] | None:
  """Returns the pins of an interrupted file; None if there is none."""
  side_file = _side_file(path)
  if not _partial(path).exists() or not side_file.exists():
    return None
  return pins.from_json(_read_json(side_file).get('pins', {}))


def _partial(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f'{path.name}.partial')


class Writer:
  """Writes predictions batch by batch; resumes an interrupted file.

  Until `close` the name of the file ends in `.partial`.

  Attributes:
    path: of the file once it is closed.
    num_examples: examples so far.
    num_predictions: predictions so far.
    num_with_output: examples with a prediction so far.
  """

  def __init__(
    self,
    path: pathlib.Path,
    provenance: Mapping[str, Any],
    batch_size: int,
    overwrite: bool = False,
    setting: str = OUTPUT_SETTING,
  ):
    """Opens the file, and creates its folder if it does not exist.

    Args:
      path: of the `.jsonl` file.
      provenance: checkpoint, decoding, vocabulary etc.; written beside it.
      batch_size: number of examples per call of `append`.
      overwrite: start anew if the file is complete, or was started with
        another provenance.
      setting: name of the folder in gin, for errors.

    Raises:
      ValueError: the file is complete, or was started with another provenance.
    """
    files.check_free([path], setting, overwrite)
    self._setting = setting
    self.path = path
    self._partial = _partial(path)
    # As JSON represents it: a tuple would not equal the list read back.
    self._provenance = json.loads(json.dumps(dict(provenance), default=str))
    self.num_examples = self.num_predictions = self.num_with_output = 0
    if overwrite and (path.exists() or self._differences()):
      path.unlink(missing_ok=True)
      self._partial.unlink(missing_ok=True)
    elif not self._partial.exists():
      # An interrupted writer may have left only the side file.
      self._check_is_side_file()
    if self._partial.exists():
      self._check_same_provenance()
      self._keep_whole_batches(batch_size)
    _write_side_file(path, self._provenance)
    self._file = self._partial.open('a', encoding='utf-8')

  def append(self, examples: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Writes a batch: a list of predictions for each example.

    Fields `example` and `sample` of a prediction replace the numbers that are
    counted here.
    """
    for predictions in examples:
      for sample, fields in enumerate(predictions):
        line = {'example': self.num_examples, 'sample': sample, **fields}
        text = json.dumps(line, ensure_ascii=False)
        if not files.is_unicode(text):  # half of a surrogate pair, of a user
          text = json.dumps(line)
        self._file.write(text + '\n')
      self.num_examples += 1
      self.num_predictions += len(predictions)
      self.num_with_output += bool(predictions)
    self._file.flush()

  def close(
    self,
    num_examples: int | None = None,
    results: Mapping[str, Any] | None = None,
  ) -> None:
    """Closes the file and gives it its final name.

    Args:
      num_examples: number of examples; None: those that were appended.
      results: measurements that are written beside it.
    """
    self._file.close()
    if num_examples is None:
      num_examples = self.num_examples
    counts = {
      'num_examples': num_examples,
      'num_predictions': self.num_predictions,
    }
    if without := num_examples - self.num_with_output:
      counts['num_examples_without_output'] = without
    _write_side_file(
      self.path, {**self._provenance, **counts, **(results or {})}
    )
    self._partial.rename(self.path)

  def _check_is_side_file(self):
    """Raises ValueError if another file has the name of the side file."""
    side_file = _side_file(self.path)
    try:
      is_ours = not side_file.exists() or 'vocabulary' in _read_json(side_file)
    except ValueError:
      is_ours = False
    if not is_ours:
      files.check_free([side_file], self._setting, overwrite=False)

  def _differences(self):
    side_file = _side_file(self.path)
    was = files.read_json(side_file) if side_file.exists() else {}
    differences = [
      f'{name}: {was.get(name)!r} there, {self._provenance.get(name)!r} here'
      for name in {**was, **self._provenance}
      if name not in _CHANGING and was.get(name) != self._provenance.get(name)
    ]
    return differences + pins.differences(
      *(pins.from_json(of.get('pins', {})) for of in (was, self._provenance))
    )

  def _check_same_provenance(self):
    if differences := self._differences():
      raise ValueError(
        f'{self._partial} was started with other settings or files:\n  '
        + '\n  '.join(differences)
        + f'\nChoose another {self._setting}, remove the file, or set '
        '--gin.OVERWRITE=True.'
      )

  def _keep_whole_batches(self, batch_size):
    """Truncates the file before its last batch, which may be incomplete.

    Batches without predictions leave no line. Where one may be missing before
    the last one, the batch before them is written again, too: a damaged number
    looks the same.
    """
    before = last = _BatchStart(0, 0, 0, 0)
    offset = num_lines = num_examples = 0
    previous = None
    with self._partial.open('rb') as file:
      for line in file:
        number = _example_of(line)
        if number is None or number < (previous or 0):
          break  # it was not written in full, or is damaged
        if number // batch_size > last.batch:
          before = last
          last = _BatchStart(
            number // batch_size, offset, num_lines, num_examples
          )
        offset += len(line)
        num_lines += 1
        num_examples += number != previous
        previous = number
    if last.batch > before.batch + 1:
      last = before
    self.num_predictions, self.num_with_output = last.num_lines, last.num_with
    self.num_examples = last.batch * batch_size
    os.truncate(self._partial, last.offset)


class _BatchStart(NamedTuple):
  """Where a batch starts in a file: its number, and what precedes it."""

  batch: int
  offset: int
  num_lines: int
  num_with: int  # examples with a line


def _example_of(line: bytes) -> int | None:
  """Returns the example of a line that `Writer` wrote; None if damaged."""
  if not line.endswith(b'\n'):
    return None
  try:
    number = files.parse_json(line)['example']
  except (ValueError, TypeError, KeyError):
    return None
  return number if type(number) is int else None


def find(pattern: str, setting: str = _SETTING) -> list[str]:
  """Returns the files that a pattern matches; ValueError if none does."""
  return json_lines.find(pattern, setting)


def files_of(pattern: str, setting: str = _SETTING) -> list[str]:
  """Returns the files that a pattern matches, and those beside them."""
  paths = [pathlib.Path(path) for path in find(pattern, setting)]
  side_files = [path for path in map(_side_file, paths) if path.exists()]
  return [str(path) for path in (*paths, *side_files)]


class Examples(NamedTuple):
  """Token ids of training pairs, concatenated.

  Attributes:
    ids: {'inputs' and 'targets': int32 ids of all rows}.
    offsets: {feature: offset in `ids` of each row, and the end [N + 1]}.
    cut: {feature: whether each row was longer than the maximum length [N]}.
    weights: float32 weight of each row [N]; None: they were not asked for.
    summary: a description in one line.
  """

  ids: Mapping[str, np.ndarray]
  offsets: Mapping[str, np.ndarray]
  cut: Mapping[str, np.ndarray]
  weights: np.ndarray | None
  summary: str


def read(
  pattern: str,
  *,
  task: str,
  vocabulary: str,
  num_ids: int,
  eos_id: int,
  encode: Callable[[str], Sequence[int]],
  lengths: Mapping[str, int],
  add_eos: Mapping[str, bool],
  with_weights: bool = False,
  pairs: bool = False,
) -> Examples:
  """Reads predictions as training pairs of inputs and outputs.

  Ids are used unchanged. A row longer than `lengths` is truncated like the
  task's own rows: its last id becomes EOS if the task adds EOS. An output that
  reached the maximum length has no EOS, so the student does not learn to end
  there. Empty outputs (only EOS) are kept.

  Args:
    pattern: path or glob of the files.
    task: that the student is trained on.
    vocabulary: description of the task's, see `vocabularies.describe`.
    num_ids: size of the vocabulary.
    eos_id: of the vocabulary.
    encode: text -> ids, for files without ids.
    lengths: maximum lengths {'inputs': S, 'targets': T}.
    add_eos: {feature: whether the task appends EOS}.
    with_weights: whether the lines have a number `weight`.
    pairs: whether two adjacent lines must be different outputs of one input.

  Raises:
    ValueError: there is no such file, or it was written for another task,
      vocabulary or length; lines have no weight, or one that is not read; or
      lines are not pairs.
  """
  rows = {'inputs': [], 'targets': []}
  weights = []
  cut = {'inputs': [], 'targets': []}
  end = {name: [eos_id] if adds else [] for name, adds in add_eos.items()}
  sources = []
  num_unfinished = num_empty = 0
  for path in find(pattern):
    has_ids = _has_ids(path)
    sources.append(
      _check_provenance(path, task, vocabulary, lengths)
      if has_ids
      else f'texts of {path}'
    )
    for number, (inputs, outputs, weight) in enumerate(
      _read_rows(path, None if has_ids else Texts(encode, end)), 1
    ):
      where = f'prediction {number} in {path}'
      weights.append(_weight(weight, with_weights, where))
      num_unfinished += add_eos['targets'] and outputs[-1:] != [eos_id]
      num_empty += outputs in ([], [eos_id])
      for name, row in (('inputs', inputs), ('targets', outputs)):
        cut[name].append(len(row) > lengths[name])
        if len(row) > lengths[name]:
          row = row[: lengths[name]]
          if add_eos[name]:
            row[-1] = eos_id
        rows[name].append(np.asarray(row, np.int32))
  if not rows['inputs']:
    raise ValueError(f'{_SETTING}: {pattern} holds no predictions.')
  if pairs:
    _check_pairs(pattern, rows['inputs'], rows['targets'])
  ids = {name: np.concatenate(of) for name, of in rows.items()}
  for name, values in ids.items():
    if values.size and not 0 <= values.min() <= values.max() < num_ids:
      raise ValueError(
        f'{_SETTING}: {pattern} has ids from {values.min()} to {values.max()} '
        f'in its {name}; those of the vocabulary are 0 to {num_ids - 1}.'
      )
  return Examples(
    ids,
    {
      name: np.cumsum([0, *(len(row) for row in of)])
      for name, of in rows.items()
    },
    {name: np.asarray(of) for name, of in cut.items()},
    np.asarray(weights, np.float32) if with_weights else None,
    f'{len(rows["inputs"]):,} predictions, {num_empty:,} of them empty and '
    f'{num_unfinished:,} without EOS: {"; ".join(sources)}',
  )


def _check_pairs(
  pattern: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
) -> None:
  """Raises ValueError unless lines are two different outputs for each input."""
  for i in range(0, len(inputs), 2):
    if i + 1 == len(inputs) or not np.array_equal(inputs[i], inputs[i + 1]):
      problem = f'line {i + 1} has no second line of the same input after it'
    elif np.array_equal(outputs[i], outputs[i + 1]):
      problem = f'lines {i + 1} and {i + 2} have the same output'
    else:
      continue
    raise ValueError(
      f'{_SETTING}: {pattern} must have two different outputs of each input in '
      f'adjacent lines, the better one first; {problem}. --run_mode=select '
      'with @select.pairs() writes such a file.'
    )


def output_path(
  sources: Sequence[str],
  about: Mapping[str, Any] | None,
  output_dir: str,
  setting: str,
  output_setting: str,
) -> pathlib.Path:
  """Returns the path of a file that is made from others.

  Args:
    sources: paths of the others.
    about: see `shared_provenance`.
    output_dir: folder of the file.
    setting: name of the pattern of `sources` in gin, for errors.
    output_setting: name of the folder.

  Raises:
    ValueError: it is one of the sources.
  """
  split = None if about is None else about.get('split')
  name = (
    f'predictions_{split}.jsonl' if split else pathlib.Path(sources[0]).name
  )
  path = paths.resolve(output_dir, output_setting) / name
  if any(path.resolve() == pathlib.Path(x).resolve() for x in sources):
    raise ValueError(
      f'{output_setting}: {path} is among the {setting} to read. Choose '
      f'another {output_setting}.'
    )
  return path


class Example(NamedTuple):
  """An input, and all that was written for it.

  Attributes:
    number: of the input in its split, or in the files.
    lines: JSON objects with the texts `inputs` and `prediction`.
  """

  number: int
  lines: Sequence[Mapping[str, Any]]


def examples(paths: Sequence[str], setting: str) -> Iterator[Example]:
  """Yields the inputs of files in order, each with all of its outputs.

  Lines of one input have the same number `example`, as `Writer` counts them;
  outputs of several files for one number are read together. In files without
  numbers successive lines with the same `inputs` belong together. At most one
  input of each file is in memory.

  Args:
    paths: of the files.
    setting: name of their pattern in gin, for errors.

  Raises:
    ValueError: a line is not a prediction, or lines are not in order.
  """
  first = (next(json_lines.read(path, {}, setting), {}) for path in paths)
  is_numbered = any('example' in line for line in first)
  if is_numbered:
    numbered = [_numbered(path, setting) for path in paths]
    lines = heapq.merge(*numbered, key=operator.itemgetter(0))
  else:
    texts = itertools.chain.from_iterable(
      json_lines.read(path, _TEXTS, setting) for path in paths
    )
    same_inputs = itertools.groupby(texts, operator.itemgetter('inputs'))
    lines = (
      (number, line)
      for number, (_, group) in enumerate(same_inputs)
      for line in group
    )
  for number, group in itertools.groupby(lines, operator.itemgetter(0)):
    example = Example(number, [line for _, line in group])
    inputs = {line['inputs'] for line in example.lines}
    if len(inputs) > 1:
      one, other = sorted(inputs)[:2]
      raise ValueError(
        f'{setting}: the lines of example {number} in {", ".join(paths)} have '
        f'different inputs, {json_lines.printable(one)[:60]!r} and '
        f'{json_lines.printable(other)[:60]!r}: the files are of different '
        'data.'
      )
    yield example


def _numbered(path: str, setting: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (number of the example, line) of a file."""
  last = 0
  fields = {**_TEXTS, 'example': int}
  for line in json_lines.read(path, fields, setting):
    number = line['example']
    if isinstance(number, bool) or number < last:
      raise ValueError(
        f'{setting}: in {path} a line with "example": {json.dumps(number)} '
        f'follows one with {last}: the lines must be in the order of the '
        'examples, as --run_mode=infer writes them.'
      )
    last = number
    yield number, line


def shared_provenance(
  paths: Sequence[str], setting: str
) -> dict[str, Any] | None:
  """Returns what is known about files that are read together.

  Args:
    paths: of the files.
    setting: name of their pattern in gin, for errors.

  Returns:
    The fields of the files beside them that are the same for all; `checkpoint`
    and `decoding` name those of each. None if the files have no ids.

  Raises:
    ValueError: they are of different tasks, splits, vocabularies or lengths; or
      some have ids and others do not.
  """
  with_ids = [path for path in paths if _has_ids(path, setting)]
  if not with_ids:
    return None
  if len(with_ids) < len(paths):
    other = next(path for path in paths if path not in with_ids)
    raise ValueError(
      f'{setting}: {with_ids[0]} has token ids and {other} has none: they '
      'cannot be read together.'
    )
  all_about = [_provenance(path, setting) for path in paths]
  for path, about in zip(paths, all_about, strict=True):
    for name in _SHARED:
      if about.get(name) != all_about[0].get(name):
        raise ValueError(
          f'{setting}: {path} was written for {name} {about.get(name)!r}, '
          f'{paths[0]} for {all_about[0].get(name)!r}: they cannot be read '
          'together.'
        )
  same = {
    name: value
    for name, value in all_about[0].items()
    if name not in _CHANGING
    and all(about.get(name) == value for about in all_about)
  }
  for name in ('checkpoint', 'decoding'):
    values = dict.fromkeys(str(about.get(name)) for about in all_about)
    same[name] = ' and '.join(values)
  return same


def splits_of(pattern: str) -> set[str]:
  """Returns the splits for which files with ids were written."""
  splits = set()
  for path in find(pattern):
    if _has_ids(path):
      splits.add(_about(path, _provenance(path), 'split', str))
  return splits


class Texts(NamedTuple):
  """How the texts of a file without ids are tokenized.

  Attributes:
    encode: text -> ids.
    end: {'inputs' and 'targets': ids that end each, EOS or none}.
  """

  encode: Callable[[str], Sequence[int]]
  end: Mapping[str, Sequence[int]]


def ids_of_line(
  line: Mapping[str, Any], texts: Texts | None, where: str, setting: str
) -> tuple[list[int], list[int]]:
  """Returns the ids of a line's input, and those of its output.

  Args:
    line: with the fields of its kind of file.
    texts: None: the file has ids.
    where: description of the line, for errors.
    setting: name of the files in gin, for errors.

  Raises:
    ValueError: ids are missing or no whole numbers.
  """
  if texts is not None:
    return (
      [*texts.encode(line['inputs']), *texts.end['inputs']],
      [*texts.encode(line['prediction']), *texts.end['targets']],
    )
  for name in _IDS:
    if not isinstance(line.get(name), list):
      raise ValueError(
        f'{setting}: {where} has no list "{name}", as other lines have.'
      )
    for token in line[name]:
      if type(token) is not int or abs(token) >= 2**31:
        raise ValueError(
          f'{setting}: "{name}" of {where} must be ids, but has '
          f'{str(token)[:60]}.'
        )
  return line['input_ids'], line['prediction_ids']


def _read_rows(
  path: str, texts: Texts | None
) -> Iterable[tuple[list[int], list[int], Any]]:
  """Yields (ids of the inputs, ids of the output, its weight or None)."""
  fields = _IDS if texts is None else _TEXTS
  for i, line in enumerate(json_lines.read(path, fields, _SETTING), 1):
    row = ids_of_line(line, texts, f'prediction {i} in {path}', _SETTING)
    yield (*row, line.get('weight'))


def _weight(value: Any, is_read: bool, where: str) -> float:
  """Returns the weight of a row.

  Raises:
    ValueError: see `read`.
  """
  if value is None and not is_read:
    return 1.0
  if not is_read:
    raise ValueError(
      f'{_SETTING}: {where} has a "weight", which this run would ignore. Set '
      'train/datasets.DatasetConfig.row_weights = True, or remove "weight" '
      'from all lines.'
    )
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not math.isfinite(value):
    got = 'nothing' if value is None else json.dumps(value)[:60]
    raise ValueError(
      f'{_SETTING}: "weight" of {where} must be a finite number, as '
      f'datasets.DatasetConfig.row_weights = True reads it, but has {got}.'
    )
  return float(value)


def _has_ids(path: str, setting: str = _SETTING) -> bool:
  """Whether the first line of a file has token ids."""
  first = next(json_lines.read(path, {}, setting), {})
  return 'input_ids' in first or 'prediction_ids' in first


def _provenance(path: str, setting: str = _SETTING) -> dict[str, Any]:
  side_file = _side_file(pathlib.Path(path))
  if not side_file.exists():
    raise ValueError(
      f'{setting}: {path} has token ids, but {side_file.name}, which records '
      'their vocabulary, is not beside it. Copy it there, or remove '
      '"input_ids" and "prediction_ids" from all lines to tokenize the texts '
      'instead.'
    )
  return _read_json(side_file, setting)


def _check_provenance(
  path: str, task: str, vocabulary: str, lengths: Mapping[str, int]
) -> str:
  """Returns the checkpoint and decoding that wrote a file.

  Raises:
    ValueError: it was written for another task, vocabulary or input length.
  """
  about = _provenance(path)
  for name, wanted in (('task', task), ('vocabulary', vocabulary)):
    if about.get(name) != wanted:
      raise ValueError(
        f'{_SETTING}: {path} was written for {name} {about.get(name)!r}; this '
        f'run has {wanted!r}.'
      )
  of_features = _about(path, about, 'task_feature_lengths', dict)
  max_inputs = _about(path, of_features, 'inputs', int)
  if lengths['inputs'] > max_inputs:
    raise ValueError(
      f'{_SETTING}: the inputs of {path} were truncated to {max_inputs} '
      f"tokens; this run's TASK_FEATURE_LENGTHS has {lengths['inputs']}. Set "
      f"'inputs' to {max_inputs} or less, or run --run_mode=infer again."
    )
  checkpoint, decoding = (
    _about(path, about, name, str) for name in ('checkpoint', 'decoding')
  )
  rules = ', '.join(_about(path, about, 'selected', list, default=[]))
  return f'{checkpoint} with {decoding}' + (rules and f', selected by {rules}')


def _about(
  path: str,
  values: Mapping[str, Any],
  name: str,
  kind: type,
  default: Any = files.REQUIRED,
) -> Any:
  """Returns a field of the side file of a file."""
  side_file = f'{_SETTING}: {_side_file(pathlib.Path(path))}'
  return files.field(values, name, kind, side_file, default)


def _side_file(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix('.json')


def _read_json(path: pathlib.Path, setting: str = _SETTING) -> dict[str, Any]:
  try:
    return files.read_json(path)
  except ValueError as e:
    raise ValueError(f'{setting}: {e}') from e


def _write_side_file(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  files.write_atomically(_side_file(path), json.dumps(values, indent=2) + '\n')
