# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from gkd_jax.data import predictions
from gkd_jax.runtime import pins

PROVENANCE = {
  'checkpoint': '/runs/teacher/checkpoint_7',
  'task': 'letters',
  'split': 'train',
  'vocabulary': '30 letters',
  'task_feature_lengths': {'inputs': 6, 'targets': 4},
  'decoding': 'greedy',
}
# Ids with EOS (1), without it, and EOS alone.
ROWS = [([5, 6, 7, 1], [8, 9, 1]), ([5, 1], [8, 9, 10, 11]), ([7, 1], [1])]


def fields(inputs, outputs):
  return {
    'inputs': f'in {inputs}',
    'prediction': f'out {outputs}',
    'input_ids': list(inputs),
    'prediction_ids': list(outputs),
  }


def write(path, rows=ROWS, **changes):
  writer = predictions.Writer(path, PROVENANCE | changes, batch_size=2)
  writer.append([[fields(*row)] for row in rows])
  writer.close()
  return str(path)


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'predictions_train.jsonl'


def test_an_interrupted_file_has_the_pins_of_its_start(path):
  pin = pins.Pin({'a.jsonl': '3 bytes, ab'})
  assert predictions.pins_of_partial(path) is None
  predictions.Writer(
    path, PROVENANCE | {'pins': pins.to_json({'data': pin})}, batch_size=2
  )

  assert predictions.pins_of_partial(path) == {'data': pin}
  with pytest.raises(ValueError, match='data: a.jsonl was 3 bytes, ab, is abs'):
    predictions.Writer(path, PROVENANCE, batch_size=2)


def read(pattern, **changes):
  settings = {
    'task': 'letters',
    'vocabulary': '30 letters',
    'num_ids': 30,
    'eos_id': 1,
    'encode': lambda text: [ord(c) - 90 for c in text],
    'lengths': {'inputs': 6, 'targets': 4},
    'add_eos': {'inputs': True, 'targets': True},
  }
  return predictions.read(str(pattern), **(settings | changes))


def rows_of(examples):
  """[(ids of inputs, ids of targets)] of what was read."""
  parts = [
    np.split(examples.ids[name], examples.offsets[name][1:-1])
    for name in ('inputs', 'targets')
  ]
  return [(x.tolist(), y.tolist()) for x, y in zip(*parts, strict=True)]


def write_text(path, *lines):
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


# --- What a student is given -------------------------------------------------


def test_the_ids_that_were_written_are_those_that_are_read(path):
  examples = read(write(path))

  assert rows_of(examples) == ROWS
  assert examples.ids['inputs'].dtype == np.int32


def write_weighted(path, weights):
  writer = predictions.Writer(path, PROVENANCE, batch_size=2)
  writer.append(
    [
      [fields(*row) | ({} if weight is None else {'weight': weight})]
      for row, weight in zip(ROWS, weights, strict=True)
    ]
  )
  writer.close()
  return path


def test_weights_are_read_if_they_are_asked_for(path):
  examples = read(write_weighted(path, [1, -0.8, 0.25]), with_weights=True)

  assert examples.weights.tolist() == np.float32([1, -0.8, 0.25]).tolist()
  assert rows_of(examples) == ROWS


def test_weights_that_would_be_ignored_are_refused(path):
  write_weighted(path, [None, 1.0, None])

  with pytest.raises(ValueError, match='prediction 2 in .* has a "weight"'):
    read(path)


@pytest.mark.parametrize(
  ('weight', 'said'),
  [
    (None, 'has nothing'),
    (float('nan'), 'has NaN'),
    (float('inf'), 'has Infinity'),
    ('1', 'has "1"'),
    (True, 'has true'),
  ],
)
def test_a_weight_that_is_no_finite_number_is_refused(path, weight, said):
  write_weighted(path, [1.0, 1.0, weight])

  with pytest.raises(
    ValueError, match=f'"weight" of prediction 3 in .* finite number.* {said}'
  ):
    read(path, with_weights=True)


PAIRS = [([5, 6, 1], [7, 1]), ([5, 6, 1], [8, 9, 1])]


def test_pairs_are_two_outputs_of_one_input(path):
  assert rows_of(read(write(path, PAIRS), pairs=True)) == PAIRS


@pytest.mark.parametrize(
  ('rows', 'said'),
  [
    ([*PAIRS, PAIRS[0]], 'line 3 has no second line of the same input'),
    ([PAIRS[0], ([4, 1], [8, 1])], 'line 1 has no second line'),
    ([PAIRS[0], PAIRS[0]], 'lines 1 and 2 have the same output'),
  ],
)
def test_lines_that_are_no_pairs_are_refused(path, rows, said):
  with pytest.raises(ValueError, match=said):
    read(write(path, rows), pairs=True)


def test_an_output_that_had_not_ended_gets_no_eos(path):
  (row,) = rows_of(read(write(path, [([5, 1], [8, 9, 10, 11])])))

  assert row[1] == [8, 9, 10, 11]


def test_what_is_longer_than_this_run_takes_is_cut_as_the_task_cuts(path):
  write(path)

  cut = rows_of(read(path, lengths={'inputs': 3, 'targets': 2}))

  assert cut == [([5, 6, 1], [8, 1]), ([5, 1], [8, 1]), ([7, 1], [1])]


def test_a_task_without_eos_is_cut_without(path):
  write(path)

  cut = rows_of(
    read(
      path,
      lengths={'inputs': 3, 'targets': 2},
      add_eos={'inputs': False, 'targets': True},
    )
  )

  assert cut[0] == ([5, 6, 7], [8, 1])


def test_longer_targets_than_were_written_change_nothing(path):
  write(path)

  examples = read(path, lengths={'inputs': 6, 'targets': 40})

  assert rows_of(examples) == ROWS


def test_several_files_are_read_one_after_the_other(tmp_path):
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    write(tmp_path / name / 'predictions_train.jsonl')

  examples = read(f'{tmp_path}/*/predictions_train.jsonl')

  assert rows_of(examples) == ROWS + ROWS


def test_it_says_what_was_read(path):
  summary = read(write(path)).summary

  assert summary == (
    '3 predictions, 1 of them empty and 1 without EOS: '
    '/runs/teacher/checkpoint_7 with greedy'
  )


def test_texts_alone_are_tokenized(path):
  write_text(
    path,
    {'inputs': 'abcdefgh', 'prediction': 'ab'},
    {'inputs': 'c', 'prediction': ''},
  )

  examples = read(path)

  # Cut to 6 and 4 ids, EOS last. No provenance is asked for.
  assert rows_of(examples) == [([7, 8, 9, 10, 11, 1], [7, 8, 1]), ([9, 1], [1])]
  assert 'texts of' in examples.summary


def test_of_texts_the_task_says_whether_eos_ends_them(path):
  write_text(path, {'inputs': 'abc', 'prediction': 'ab'})

  examples = read(path, add_eos={'inputs': False, 'targets': True})

  assert rows_of(examples) == [([7, 8, 9], [7, 8, 1])]


# --- What is refused --------------------------------------------------------


@pytest.mark.parametrize(
  ['changes', 'said'],
  [
    ({'task': 'numbers'}, "written for task 'numbers'; this run has 'letters'"),
    ({'vocabulary': '31 letters'}, "written for vocabulary '31 letters'"),
    (
      {'task_feature_lengths': {'inputs': 5, 'targets': 4}},
      r"truncated to 5 tokens.*TASK_FEATURE_LENGTHS has 6. Set 'inputs' to 5",
    ),
  ],
)
def test_what_was_written_for_another_run_is_refused(path, changes, said):
  write(path, **changes)

  with pytest.raises(ValueError, match=f'TRAIN_ON_PREDICTIONS: .*{said}'):
    read(path)


def test_ids_of_which_nobody_knows_the_vocabulary_are_refused(path):
  write(path)
  path.with_suffix('.json').unlink()

  with pytest.raises(ValueError, match='predictions_train.json, which records'):
    read(path)


def test_ids_outside_the_vocabulary_are_refused(path):
  write(path, [([5, 1], [8, 30, 1])])

  with pytest.raises(ValueError, match='ids from 1 to 30 in its targets'):
    read(path)


@pytest.mark.parametrize('token', [7.5, '7', True])
def test_ids_that_are_no_whole_numbers_are_refused(path, token):
  write(path, [([5, 1], [8, 1]), ([5, 1], [token, 1])])

  with pytest.raises(ValueError, match='"prediction_ids" of prediction 2 in'):
    read(path)


@pytest.mark.parametrize(
  ['line', 'said'],
  [
    ({'inputs': 'a', 'targets': 'b'}, 'line 1 .* has no "prediction"'),
    ({'text': 'a'}, 'line 1 .* has no "inputs". It has: text'),
    (
      {'input_ids': [1], 'prediction': 'a'},
      'line 1 .*no "prediction_ids"',
    ),
  ],
)
def test_a_file_of_something_else_is_refused(path, line, said):
  path.with_suffix('.json').write_text(json.dumps(PROVENANCE))
  write_text(path, line)

  with pytest.raises(ValueError, match=f'TRAIN_ON_PREDICTIONS: {said}'):
    read(path)


def test_a_line_without_ids_among_others_is_refused(path):
  write(path)
  with path.open('a') as file:
    file.write('{"inputs": "a", "prediction": "b"}\n')

  with pytest.raises(ValueError, match='line 4 .* has no "input_ids"'):
    read(path)


def test_an_empty_file_is_refused(path):
  path.touch()

  with pytest.raises(ValueError, match='holds no predictions'):
    read(path)


def test_no_file_is_refused(path):
  with pytest.raises(ValueError, match='TRAIN_ON_PREDICTIONS: .* is not there'):
    read(path)


# --- Writing ----------------------------------------------------------------


def test_a_line_says_which_example_and_sample_it_is(path):
  writer = predictions.Writer(path, PROVENANCE, batch_size=2)
  several = [fields([5, 1], [i, 1]) for i in (8, 9)]
  writer.append([several, several[:1]])
  writer.append([several])
  writer.close()

  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [(line['example'], line['sample']) for line in lines] == [
    (0, 0),
    (0, 1),
    (1, 0),
    (2, 0),
    (2, 1),
  ]
  about = json.loads(path.with_suffix('.json').read_text())
  assert about == {**PROVENANCE, 'num_examples': 3, 'num_predictions': 5}


@pytest.mark.parametrize('num_written', [1, 2, 3, 4])
def test_batches_without_outputs_may_be_anywhere(path, num_written):
  batches = [
    [[], []],
    [[fields(*ROWS[0])], []],
    [[], []],
    [[], [fields(*ROWS[1])]],
  ]
  writer = predictions.Writer(path, PROVENANCE, batch_size=2)
  for batch in batches[:num_written]:
    writer.append(batch)

  resumed = predictions.Writer(path, PROVENANCE, batch_size=2)
  assert resumed.num_examples <= 2 * (num_written - 1)
  for batch in batches[resumed.num_examples // 2 :]:
    resumed.append(batch)
  resumed.close()

  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line['example'] for line in lines] == [2, 7]
  assert (resumed.num_predictions, resumed.num_with_output) == (2, 2)


def test_until_all_is_written_the_file_has_another_name(path):
  writer = predictions.Writer(path, PROVENANCE, batch_size=2)
  writer.append([[fields([5, 1], [8, 1])]])

  assert not path.exists()
  assert path.with_name(f'{path.name}.partial').read_text().count('\n') == 1


def test_what_is_there_is_replaced_if_that_is_wanted(path):
  write(path)
  started = predictions.Writer(
    path, PROVENANCE | {'seed': 1}, batch_size=2, overwrite=True
  )
  started.append([[fields([5, 1], [8, 1])]] * 2)
  started.append([[fields([5, 1], [8, 1])]])  # may be incomplete
  # Of the same settings: it goes on.
  again = predictions.Writer(
    path, PROVENANCE | {'seed': 1}, batch_size=2, overwrite=True
  )
  assert again.num_examples == 2
  # Of others: from the start.
  other = predictions.Writer(path, PROVENANCE, batch_size=2, overwrite=True)
  assert other.num_examples == 0
  other.close()

  assert path.read_text() == ''


def test_a_file_of_another_program_is_not_replaced(path):
  path.with_suffix('.json').write_text('{"mine": 1}')

  with pytest.raises(ValueError, match='train.json exists and would be over'):
    predictions.Writer(path, PROVENANCE, batch_size=2)


def test_the_split_of_the_inputs_is_known(path):
  assert predictions.splits_of(write(path, split='extra')) == {'extra'}
