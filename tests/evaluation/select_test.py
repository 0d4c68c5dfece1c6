# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from gkd_jax.data import predictions
from gkd_jax.evaluation import select, similarity

PROVENANCE = {
  'checkpoint': '/runs/teacher/checkpoint_7',
  'task': 'letters',
  'split': 'train',
  'vocabulary': '30 letters',
  'task_feature_lengths': {'inputs': 6, 'targets': 4},
  'decoding': 'greedy',
}
# Outputs of three inputs, with the reference first.
TEXTS = {
  'x': ['a b c', 'a b c', 'a b', 'a b', 'q'],
  'y': ['a b', 'a', 'b a b', 'a b'],
  'z': ['c', 'd', 'e'],
}


def lines_of(texts=TEXTS):
  return [
    [
      {'inputs': name, 'targets': target, 'prediction': text, 'input_ids': [i]}
      for text in outputs
    ]
    for i, (name, (target, *outputs)) in enumerate(texts.items())
  ]


def write(folder, texts=TEXTS, **provenance):
  path = folder / 'predictions_train.jsonl'
  writer = predictions.Writer(path, PROVENANCE | provenance, batch_size=1)
  writer.append(lines_of(texts))
  writer.close()
  return path


@pytest.fixture
def source(tmp_path):
  return write(tmp_path)


@pytest.fixture
def run(source, tmp_path):
  """Applies rules to the source; returns the lines."""

  def run(*rules, path=source, folder='out', **keywords):
    out = tmp_path / folder
    select.select(str(path), str(out), rules, **keywords)
    text = (out / 'predictions_train.jsonl').read_text()
    return [json.loads(line) for line in text.splitlines()]

  return run


def texts_of(lines):
  return [(line['inputs'], line['prediction']) for line in lines]


def about(tmp_path, folder='out'):
  return json.loads((tmp_path / folder / 'predictions_train.json').read_text())


def outputs(*texts, targets='t', **fields):
  lines = [
    {
      'inputs': 'x',
      'targets': targets,
      'prediction': text,
      **{name: values[i] for name, values in fields.items()},
    }
    for i, text in enumerate(texts)
  ]
  return select.Outputs('x', lines, 'example 5')


def chosen(rule, *texts, **fields):
  return [x['prediction'] for x in rule.choose(outputs(*texts, **fields))]


# --- Rules --------------------------------------------------------------------


def test_mbr_keeps_the_highest_mean_utility():
  # From the vectors of the paper's method: rows hypothesis, columns reference.
  table = np.array(
    [
      [1.0, 0.5, 0.4, 0.3],
      [0.5, 1.0, 0.7, 0.3],
      [0.5, 0.7, 1.0, 0.1],
      [0.1, 0.2, 0.1, 1.0],
    ]
  )

  def utility(output, reference):
    return table['abcd'.index(output), 'abcd'.index(reference)]

  kept = select.mbr(utility, keep=2).choose(outputs(*'abcd'))

  assert [(x['prediction'], x['score']) for x in kept] == [
    ('b', pytest.approx(table[1].mean(), rel=1e-15)),
    ('c', pytest.approx(table[2].mean(), rel=1e-15)),
  ]


def test_in_mbr_duplicates_are_references_and_one_hypothesis():
  rule = select.mbr(similarity.exact_match(), keep=3)

  kept = rule.choose(outputs('b', 'a', 'a', 'c', 'a'))

  assert [(x['prediction'], x['score']) for x in kept] == [
    ('a', 3 / 5),
    ('b', 1 / 5),
    ('c', 1 / 5),
  ]


def test_best_of_n_keeps_the_highest_scores_once():
  rule = select.best(select.to_targets(similarity.edit_distance()), keep=2)

  kept = chosen(rule, 'a', 'a b', 'a b', 'a b c', targets='a b')

  assert kept == ['a b', 'a b c']


def test_a_filter_keeps_what_is_within_its_bounds():
  rule = select.within(select.field('nll'), at_least=0.5, at_most=2)

  assert chosen(rule, *'abcd', nll=[0.4, 0.5, 2, 3.0]) == ['b', 'c']


def test_distinct_keeps_the_first_of_equal_texts():
  kept = select.distinct().choose(outputs(*'aba', n=[1, 2, 3]))

  assert [(x['prediction'], x['n']) for x in kept] == [('a', 1), ('b', 2)]


@pytest.mark.parametrize(
  ('settings', 'want'),
  [
    ({}, [2 / 2, 0.0, 6 / 2]),
    ({'to': 'targets'}, [2 / 1, 0.0, 6 / 1]),
    ({'unit': 'characters'}, [3 / 3, 0.0, 11 / 3]),
  ],
)
def test_lengths_are_relative_to_those_of_another_text(settings, want):
  texts = outputs('a b', '', 'a b a b a b', targets='')

  got = select.length_ratio(**settings)(texts._replace(inputs='x y'))

  assert got == want


@pytest.mark.parametrize(
  ('settings', 'want'),
  [
    ({}, [0.0, 0.0, 3 / 5, 1 / 2]),
    ({'n': 1}, [0.0, 0.0, 5 / 7, 3 / 4]),
    # Of 'aaaa' one of three pairs is the first.
    ({'n': 2, 'unit': 'characters'}, [0.0, 0.0, 8 / 12, 4 / 6]),
  ],
)
def test_repetition_is_the_share_of_ngrams_that_came_before(settings, want):
  texts = outputs('a b', '', 'a b a b a b a', 'a a a a')

  assert select.repetition(**settings)(texts) == pytest.approx(want)


def test_a_field_may_be_the_difference_of_two():
  score = select.field('nll', minus='other')

  assert score(outputs(*'ab', nll=[1.0, 2.0], other=[0.5, 3])) == [0.5, -1.0]


PASSES = select.pass_rate(select.field('r'), at_least=0.5)


def test_a_pass_rate_is_of_all_outputs_of_an_input():
  assert PASSES(outputs(*'abcd', r=[1, 0.5, 0.4, 0])) == [0.5] * 4


# From the vectors of the papers' methods.
@pytest.mark.parametrize(
  ('rejected', 'want'), [('two_sigma', '27'), ('worst', '27')]
)
def test_a_pair_has_the_best_output_and_a_worse_one(rejected, want):
  rewards = [0.1, 0.2, 0.9, 0.5, 0.45, 0.55, 0.6, -1.5]

  pair = select.pairs(select.field('r'), rejected).choose(
    outputs(*'01234567', r=rewards)
  )

  assert [x['prediction'] for x in pair] == list(want)
  assert [x['preference'] for x in pair] == ['chosen', 'rejected']
  assert 'weight' not in pair[0]


def test_two_sigma_is_not_the_worst_of_many():
  rewards = [1.0] * 10 + [0.9] * 10 + [0.7, -3.0, -0.6]
  texts = [str(i) for i in range(len(rewards))]
  mean, sigma = np.mean(rewards), np.std(rewards)
  assert abs(rewards[-1] - (mean - 2 * sigma)) < 0.5

  of = outputs(*texts, r=rewards)

  def rejected(rule):
    return rule.choose(of)[1]['score']

  assert rejected(select.pairs(select.field('r'), 'two_sigma')) == -0.6
  assert rejected(select.pairs(select.field('r'), 'worst')) == -3.0


def test_equal_outputs_are_no_pair():
  rule = select.pairs(select.field('r'))

  assert rule.choose(outputs('a', 'b', 'b', r=[1, 1, 1])) == []
  assert rule.choose(outputs('a', 'a', r=[1, 0])) == []


def test_a_pair_may_have_signed_weights():
  rule = select.pairs(select.field('r'), rejected_weight=-0.8)

  pair = rule.choose(outputs('a', 'b', r=[0, 1]))

  assert [(x['prediction'], x['weight']) for x in pair] == [
    ('b', 1.0),
    ('a', -0.8),
  ]


@pytest.mark.parametrize(
  ('num_right', 'want'), [(1, 0.109375), (2, 0.1875), (4, 0.25), (7, 0.109375)]
)
def test_weights_are_those_of_the_pass_rate(num_right, want):
  rewards = [1.0] * num_right + [0.0] * (8 - num_right)
  of = outputs(*'abcdefgh', r=rewards)

  lines = select.weigh(PASSES).choose(of)
  normalized = select.weigh(PASSES, normalized=True).choose(of)

  assert {x['weight'] for x in lines} == {want}
  assert {x['weight'] for x in normalized} == {4 * want}


def test_exponents_weigh_easy_and_hard_inputs():
  rewards = outputs(*'abcd', r=[1, 0, 0, 0])

  def weight(**settings):
    return select.weigh(PASSES, **settings).choose(rewards)[0]['weight']

  assert weight(a=2.0, b=3.0) == pytest.approx(0.25**2 * 0.75**3, rel=1e-15)
  # The largest is at p = 0.4.
  assert weight(a=2.0, b=3.0, normalized=True) == pytest.approx(
    0.25**2 * 0.75**3 / (0.4**2 * 0.6**3), rel=1e-15
  )
  assert weight(a=0.0, b=0.0, normalized=True) == 1.0


def test_a_function_of_a_user_scores_the_outputs_of_an_input():
  def longest(inputs, outputs, targets):
    assert inputs == ['x', 'x'] and targets == ['t', 't']
    return [len(text) for text in outputs]

  rule = select.best(select.python_function(longest))

  assert chosen(rule, 'a', 'abc') == ['abc']


@pytest.mark.parametrize(
  ('values', 'said'),
  [
    ([1.0], r'finite number for each of the 2 outputs of example 5'),
    ([1.0, float('nan')], 'finite number for each'),
  ],
)
def test_a_score_is_a_finite_number_for_each_output(values, said):
  score = select.python_function(lambda inputs, outputs, targets: values)

  with pytest.raises(ValueError, match=said):
    select.best(score).choose(outputs('a', 'b'))


@pytest.mark.parametrize(
  ('value', 'said'),
  [
    (None, '"nll" of an output of example 5 must be a number, got None'),
    (True, 'must be a number, got True'),
    (float('nan'), '"nll" of an output of example 5 is nan'),
  ],
)
def test_a_field_must_be_a_number(value, said):
  with pytest.raises(ValueError, match=said):
    select.field('nll')(outputs('a', nll=[value]))


def test_without_a_reference_there_is_nothing_to_compare_with():
  with pytest.raises(ValueError, match='example 5 has no text "targets"'):
    select.to_targets(similarity.exact_match())(outputs('a', targets=None))


@pytest.mark.parametrize(
  ('make', 'said'),
  [
    (lambda: select.mbr(similarity.chrf(), keep=0), 'select.mbr.keep must be'),
    (lambda: select.best(similarity.chrf()), 'select.best.score must be'),
    (lambda: select.within(select.field('x')), 'at_least, at_most or both'),
    (lambda: select.within(select.field('x'), 2.0, 1.0), 'no score is within'),
    (lambda: select.top_share(select.field('x'), 0.0), 'top_share.share must'),
    (lambda: select.length_ratio('x'), 'length_ratio.to must be'),
    (lambda: select.length_ratio(unit='x'), 'length_ratio.unit must be one'),
    (lambda: select.repetition(0), 'repetition.n must be'),
    (lambda: select.pairs(select.field('x'), 'x'), 'pairs.rejected must be'),
    (lambda: select.weigh(select.field('x'), a=-1.0), 'weigh.a must not be'),
    (
      lambda: select.weigh(select.field('r')).choose(outputs('a', r=[1.5])),
      'weigh.score must be between 0 and 1',
    ),
  ],
)
def test_a_rule_that_makes_no_sense_is_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()


# --- Files --------------------------------------------------------------------

MBR = select.mbr(similarity.edit_distance())
SHORT = select.within(
  select.to_targets(similarity.edit_distance()), at_least=0.5
)


def test_rules_are_applied_one_after_another(run):
  lines = run(SHORT, MBR)

  # Of z no output is left.
  assert texts_of(lines) == [('x', 'a b'), ('y', 'a b')]


def test_lines_keep_their_fields_and_numbers(run):
  lines = run(SHORT)

  assert lines[-2:] == [
    {'example': 1, 'sample': i, **lines_of()[1][i]} for i in (1, 2)
  ]


def test_a_field_that_is_no_text_of_unicode_stays_as_it_is(tmp_path):
  path = tmp_path / 'mine.jsonl'
  line = '{"inputs": "é", "prediction": "b", "id": "\\ud83d"}\n'
  path.write_text(line)

  select.select(str(path), str(tmp_path / 'out'), [select.distinct()])

  kept = (tmp_path / 'out' / 'mine.jsonl').read_text()
  assert json.loads(kept) == {'example': 0, 'sample': 0, **json.loads(line)}


def test_the_file_beside_it_says_how_it_was_selected(run, source, tmp_path):
  run(SHORT, MBR)

  of = about(tmp_path)
  assert {name: of[name] for name in PROVENANCE} == PROVENANCE
  assert of['selected'] == [SHORT.description, MBR.description]
  assert str(source) in of['pins']['PREDICTIONS']['files']
  assert (of['num_examples'], of['num_predictions']) == (3, 2)
  assert of['num_examples_without_output'] == 1


def test_it_says_how_many_inputs_lost_all_outputs(run, capsys):
  run(SHORT)

  err = capsys.readouterr().err
  assert '6 of 9 outputs selected' in err
  assert '1 of 3 inputs lost all outputs.' in err


def test_what_was_selected_may_be_selected_again(run, tmp_path):
  run(SHORT)
  lines = run(MBR, path=tmp_path / 'out' / '*.jsonl', folder='again')

  assert texts_of(lines) == [('x', 'a b'), ('y', 'a b')]
  selected = about(tmp_path, 'again')['selected']
  assert selected == [SHORT.description, MBR.description]


def test_outputs_of_several_files_compete(run, tmp_path):
  (tmp_path / 'other').mkdir()
  other = {'x': ['a b c', 'a b c'], 'z': ['c', 'c']}
  path = write(tmp_path / 'other', other, checkpoint='/runs/other')
  # There z is number 1; here 2.
  path.write_text(path.read_text().replace('"example": 1', '"example": 2'))

  best = select.best(select.to_targets(similarity.edit_distance()))
  lines = run(best, path=tmp_path / '**' / 'predictions_train.jsonl')

  assert texts_of(lines) == [('x', 'a b c'), ('y', 'a b'), ('z', 'c')]
  assert about(tmp_path)['checkpoint'] == (
    '/runs/other and /runs/teacher/checkpoint_7'
  )


def test_texts_of_other_programs_are_grouped_by_their_inputs(run, tmp_path):
  path = tmp_path / 'mine.jsonl'
  path.write_text(
    ''.join(
      json.dumps({'inputs': line['inputs'], 'prediction': line['prediction']})
      + '\n'
      for group in lines_of()
      for line in group
    )
  )

  select.select(str(path), str(tmp_path / 'out'), [MBR])

  kept = predictions.examples([str(tmp_path / 'out' / 'mine.jsonl')], 'X')
  assert [(x.number, len(x.lines)) for x in kept] == [(0, 1), (1, 1), (2, 1)]


# Of the vectors of MiniPLM: NLL under the small and the large model.
SMALL, LARGE = [3.0, 2.2, 2.9, 1.8], [2.0, 2.0, 1.5, 2.0]


def scored(folder, small=SMALL, large=LARGE):
  folder.mkdir()
  path = folder / 'scored.jsonl'
  lines = [
    {'inputs': str(i // 2), 'prediction': str(i), 'small': a, 'large': b}
    for i, (a, b) in enumerate(zip(small, large, strict=True))
  ]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


def top(folder, *rules, share=0.5, **nlls):
  score = select.field('small', minus='large')
  path = scored(folder, **nlls)
  select.select(
    str(path), str(folder / 'out'), [*rules, select.top_share(score, share)]
  )
  text = (folder / 'out' / 'scored.jsonl').read_text()
  return [json.loads(line)['prediction'] for line in text.splitlines()]


def test_the_top_share_is_of_all_inputs_together_in_their_order(tmp_path):
  assert top(tmp_path / 'a') == ['0', '2']
  assert top(tmp_path / 'b', share=0.75) == ['0', '1', '2']


def test_outputs_that_tie_with_the_last_are_kept(tmp_path):
  kept = top(tmp_path / 'a', small=[1, 2, 1, 0], large=[0, 0, 0, 0])

  assert kept == ['0', '1', '2']


def test_the_top_share_is_of_what_earlier_rules_leave(tmp_path):
  of_first = select.Rule('first', lambda outputs: outputs.lines[:1])

  assert top(tmp_path / 'a', of_first) == ['2']


def test_what_a_rule_refuses_is_refused_before_anything_is_written(
  run, tmp_path
):
  with pytest.raises(ValueError, match='"nll" of an output of example 0'):
    run(select.within(select.field('nll'), at_least=0))
  with pytest.raises(ValueError, match='"nll" of an output of example 0'):
    run(select.top_share(select.field('nll')))
  assert not (tmp_path / 'out').exists()


class Stop(Exception):
  pass


@pytest.mark.parametrize('stop_at', ['x', 'y', 'z'])
def test_an_interrupted_selection_goes_on_and_writes_the_same(
  run, tmp_path, stop_at
):
  whole = run(SHORT)

  def choose(outputs):
    if outputs.inputs == stop_at:
      raise Stop
    return SHORT.choose(outputs)

  stops = select.Rule(SHORT.description, choose)
  with pytest.raises(Stop):
    run(stops, folder='part')

  assert run(SHORT, folder='part') == whole
  assert about(tmp_path, 'part') == about(tmp_path)


def test_a_selection_does_not_go_on_with_other_rules(run):
  def stop(outputs):
    if outputs.inputs == 'y':
      raise Stop
    return outputs.lines

  with pytest.raises(Stop):
    run(select.Rule('other', stop))

  with pytest.raises(ValueError, match=r"selected: \['other'\] there"):
    run(SHORT)


def test_a_student_trains_on_what_was_selected(run, tmp_path):
  def with_ids(outputs):
    return [{**line, 'prediction_ids': [7, 1]} for line in outputs.lines]

  run(SHORT, select.Rule('with_ids()', with_ids))

  examples = predictions.read(
    str(tmp_path / 'out' / '*.jsonl'),
    task='letters',
    vocabulary='30 letters',
    num_ids=30,
    eos_id=1,
    encode=None,
    lengths=PROVENANCE['task_feature_lengths'],
    add_eos={'inputs': True, 'targets': True},
  )
  assert len(examples.offsets['inputs']) == 6 + 1
  assert f'selected by {SHORT.description}, with_ids()' in examples.summary


@pytest.mark.parametrize('rules', [[], MBR, ['mbr']])
def test_what_is_no_list_of_rules_is_refused(source, tmp_path, rules):
  with pytest.raises(ValueError, match='RULES must be a list of rules'):
    select.select(str(source), str(tmp_path / 'out'), rules)


def test_one_output_for_each_input_is_refused(run, tmp_path):
  (tmp_path / 'one').mkdir()
  path = write(tmp_path / 'one', {'x': ['a', 'b'], 'y': ['a', 'b']})

  with pytest.raises(ValueError, match=r'one output for each input, but mbr'):
    run(MBR, path=path)
  assert not (tmp_path / 'out').exists()


def test_files_without_predictions_are_refused(run, tmp_path):
  (tmp_path / 'empty.jsonl').touch()

  with pytest.raises(ValueError, match='PREDICTIONS: .* holds no predictions'):
    run(MBR, path=tmp_path / 'empty.jsonl')


def test_the_folder_of_the_predictions_is_refused(run, source):
  with pytest.raises(ValueError, match='is among the PREDICTIONS to read'):
    run(MBR, folder='.', overwrite=True)
  assert source.exists()


def test_what_is_there_is_not_overwritten(run):
  run(MBR)

  with pytest.raises(ValueError, match='SELECT_OUTPUT_DIR: .* exists'):
    run(MBR)


@pytest.mark.parametrize(
  ('texts', 'provenance', 'said'),
  [
    (TEXTS, {'task': 'digits'}, "written for task .* for 'digits': they"),
    ({'y': TEXTS['x']}, {}, "example 0 in .* different inputs, 'x' and 'y'"),
  ],
)
def test_files_of_different_data_are_refused(
  run, tmp_path, texts, provenance, said
):
  (tmp_path / 'other').mkdir()
  write(tmp_path / 'other', texts, **provenance)

  with pytest.raises(ValueError, match=said):
    run(MBR, path=tmp_path / '**' / 'predictions_train.jsonl')


def test_lines_must_be_in_the_order_of_their_examples(run, source):
  lines = source.read_text().splitlines(keepends=True)
  source.write_text(''.join(reversed(lines)))

  with pytest.raises(ValueError, match='follows one with 2: the lines must be'):
    run(MBR)


# --- From the command line ----------------------------------------------------


def test_rules_are_named_on_the_command_line(run_main, source, tmp_path):
  finished = run_main(
    '--run_mode=select',
    f'--gin.PREDICTIONS={source}',
    f'--gin.SELECT_OUTPUT_DIR={tmp_path}/out',
    '--gin.RULES=[@select.within(), @select.mbr()]',
    '--gin.select.within.score=@select.to_targets()',
    '--gin.select.within.at_least=0.7',
    '--gin.METRIC=@similarity.edit_distance()',
    '--gin.UTILITY=@similarity.edit_distance()',
  )

  assert finished.code == 0, finished.err
  lines = (tmp_path / 'out' / 'predictions_train.jsonl').read_text()
  kept = [json.loads(line) for line in lines.splitlines()]
  assert texts_of(kept) == [('x', 'a b c'), ('y', 'a b')]


def test_an_error_is_one_line(run_main, tmp_path):
  path = write(tmp_path, {'x': ['a', 'b']})

  finished = run_main(
    '--run_mode=select',
    f'--gin.PREDICTIONS={path}',
    f'--gin.SELECT_OUTPUT_DIR={tmp_path}/out',
  )

  assert finished.code == 1
  assert finished.err.startswith('Error: PREDICTIONS: ')
  assert 'one output for each input' in finished.err
  assert len(finished.err.splitlines()) == 1
