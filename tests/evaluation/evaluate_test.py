# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import build
from gkd_jax.batch import Outputs
from gkd_jax.decoding import beam_search, sampler
from gkd_jax.distill import entailment, rewards
from gkd_jax.evaluation import diversity, evaluate, programs
from gkd_jax.experiment import RewardModel
from gkd_jax.parallel import partitioning
from tests import conftest, references
from tests.letter_models import (
  IDS,
  SETTINGS,
  STUDENT,
  TEACHER,
  logits_of,
  make_write,
  write_all,
  write_one,
)

pytestmark = pytest.mark.slow  # compiles models

GREEDY = {'greedy': sampler.GREEDY}


@pytest.fixture(scope='module')
def greedy(dataset, student_params):
  return write_all(dataset, write_one(sampler.GREEDY), student_params)


# --- An evaluation ------------------------------------------------------------


@pytest.fixture(scope='module')
def with_teacher(config, teacher_params):
  return evaluate.Evaluation(
    config, STUDENT, build.Model(TEACHER, teacher_params), GREEDY, **SETTINGS
  )


def test_the_metrics_are_those_of_what_was_written(
  with_teacher, student_params, teacher_params, dataset, greedy
):
  values, _ = with_teacher(student_params)

  assert values['greedy/error'] == dataset.metrics(greedy)['error']
  by_teacher = write_all(
    dataset, write_one(sampler.GREEDY, TEACHER), teacher_params
  )
  assert values['teacher/greedy/error'] == dataset.metrics(by_teacher)['error']


def test_the_table_shows_what_student_and_teacher_wrote(
  with_teacher, student_params, teacher_params, dataset, greedy
):
  _, table = with_teacher(student_params)

  by_teacher = write_all(
    dataset, write_one(sampler.GREEDY, TEACHER), teacher_params
  )
  word = conftest.letter_words('validation')[0]
  cells = (
    word,
    word[::-1],
    dataset.decode(by_teacher)[0].replace('|', '\\|').replace('\n', ' '),
    dataset.decode(greedy)[0].replace('|', '\\|').replace('\n', ' '),
  )
  assert f'| {" | ".join(cells)} |' in table


def test_the_teacher_writes_once_because_it_does_not_change(
  with_teacher, student_params, teacher_params, monkeypatch
):
  with_teacher(student_params)
  whose = []

  def task_metrics(writes, params, *rest, **settings):
    whose.append('teacher' if params is teacher_params else 'student')
    return kept(writes, params, *rest, **settings)

  kept = evaluate.task_metrics
  monkeypatch.setattr(evaluate, 'task_metrics', task_metrics)
  values, _ = with_teacher(student_params)

  assert whose == ['student']
  assert 'teacher/greedy/error' in values


def test_the_teachers_own_metrics_can_be_left_out(with_teacher, student_params):
  values, table = with_teacher(student_params, with_teacher=False)

  assert not any(name.startswith('teacher/') for name in values)
  assert 'on_student_outputs/reverse_kl' in values
  assert '| teacher |' not in table


def test_the_names_of_what_is_measured_are_known_before(
  with_teacher, student_params
):
  values, _ = with_teacher(student_params)

  assert {*with_teacher.names()} == values.keys()


def test_without_a_teacher_there_are_task_metrics_alone(config, student_params):
  alone = evaluate.Evaluation(
    config, STUDENT, build.NO_MODEL, GREEDY, **SETTINGS
  )

  values, table = alone(student_params)

  assert values.keys() == {'greedy/error'} == {*alone.names()}
  assert table.startswith('| input | reference | student |\n')


def test_what_a_metric_says_beside_numbers_is_noted_with_the_results(
  config, tmp_path, capsys
):
  conftest.save_model(tmp_path / 'model', STUDENT.config)

  evaluate.evaluate_checkpoint(
    str(tmp_path / 'model'), str(tmp_path / 'results'), config, GREEDY
  )

  path = tmp_path / 'results' / 'eval_validation.json'
  assert json.loads(path.read_text())['greedy/error_of'] == 'whole words'
  assert '\ngreedy/error_of whole words\n' in capsys.readouterr().err


# --- Samples, token by token --------------------------------------------------


@pytest.fixture(scope='module')
def samples(with_teacher, student_params):
  return with_teacher.samples(student_params)


def test_samples_show_what_everybody_wrote(
  samples, dataset, greedy, teacher_params
):
  by_teacher = write_all(
    dataset, write_one(sampler.GREEDY, TEACHER), teacher_params
  )

  assert samples['decoding'] == 'greedy'
  assert [
    (e['input'], e['reference'], e['teacher'], e['student'])
    for e in samples['examples']
  ] == [
    (x['inputs'], x['targets'], teacher, student)
    for x, teacher, student in zip(
      dataset.examples(),
      dataset.decode(by_teacher),
      dataset.decode(greedy),
      strict=True,
    )
  ]


def test_tokens_joined_are_the_output(samples):
  for example in samples['examples']:
    texts = [token['text'] for token in example['tokens']]
    assert ''.join(texts) == example['student']
  assert any(example['student'] for example in samples['examples'])


def test_the_end_is_the_last_token(with_teacher):
  ids = np.array([100, 101, 1, 0, 0])
  values = {'kl': np.full(5, 0.5), 'teacher_id': np.array([100, 1, 102, 9, 9])}

  tokens = with_teacher._tokens(ids, values)

  assert [(t['text'], t['id'], t['teacher_text']) for t in tokens] == [
    ('a', 100, 'a'),
    ('b', 101, ''),
    ('', 1, 'c'),
  ]


def test_what_the_teacher_wrote_already_is_not_written_again(
  with_teacher, student_params, samples
):
  with_teacher(student_params)

  with conftest.names_of_compiled() as compiled:
    again = with_teacher.samples(student_params)

  assert compiled == []
  assert again == samples


def test_tokens_go_up_to_the_end_of_the_output(samples, greedy):
  for example, row in zip(samples['examples'], greedy, strict=True):
    ids = [token['id'] for token in example['tokens']]
    assert ids == row[: len(ids)].tolist()
    assert samples['eos_id'] not in ids[:-1]
    assert ids[-1] == samples['eos_id'] or len(ids) == len(row)


def test_the_numbers_of_tokens_are_those_of_the_float64_reference(
  samples, examples, greedy, student_params, teacher_params
):
  inputs = examples.encoder_input_tokens
  student = logits_of(STUDENT, student_params, inputs, greedy)
  teacher = logits_of(TEACHER, teacher_params, inputs, greedy)
  kl = references.reverse_kl(teacher_logits=teacher, student_logits=student)
  q, p = (np.exp(references.log_softmax(x)) for x in (student, teacher))

  for i, example in enumerate(samples['examples']):
    for t, token in enumerate(example['tokens']):
      favourite = teacher[i, t].argmax()
      want = {
        'kl': kl[i, t],
        'student_probability': q[i, t, greedy[i, t]],
        'teacher_probability': p[i, t, greedy[i, t]],
        'teacher_id_probability': p[i, t, favourite],
      }
      assert token['teacher_id'] == favourite
      for name, value in want.items():
        # float32 logits of size 10; rounded to 6 digits behind the point.
        assert token[name] == pytest.approx(value, rel=1e-4, abs=2e-6), name


def test_what_the_teacher_prefers_is_said_in_text(samples, dataset):
  disagreements = 0
  for example in samples['examples']:
    ids = [token['id'] for token in example['tokens']]
    for t, token in enumerate(example['tokens']):
      if token['teacher_id'] == token['id']:
        assert token['teacher_text'] == token['text']
        continue
      disagreements += 1
      assert token['teacher_text'] == dataset.piece_after(
        ids[:t], token['teacher_id']
      )
  assert disagreements > 10  # models of random parameters seldom agree


def test_tokens_do_not_depend_on_the_size_of_the_batches(
  samples, config, student_params, teacher_params
):
  larger = evaluate.Evaluation(
    dataclasses.replace(config, batch_size=20),  # 16 rows are enough
    STUDENT,
    build.Model(TEACHER, teacher_params),
    GREEDY,
    **SETTINGS,
  )

  again = larger.samples(student_params)

  assert len(again['examples']) == 10
  for one, other in zip(samples['examples'], again['examples'], strict=True):
    assert one['student'] == other['student']
    assert one['teacher'] == other['teacher']
    for a, b in zip(one['tokens'], other['tokens'], strict=True):
      assert a['kl'] == pytest.approx(b['kl'], rel=1e-4, abs=2e-6)


def test_without_a_teacher_samples_compile_nothing_new(config, student_params):
  alone = evaluate.Evaluation(
    config, STUDENT, build.NO_MODEL, GREEDY, **SETTINGS
  )
  alone(student_params)

  with conftest.names_of_compiled() as compiled:
    samples = alone.samples(student_params)

  assert compiled == []
  assert len(samples['examples']) == 10
  assert all(
    example.keys() == {'input', 'reference', 'student'}
    for example in samples['examples']
  )


# --- Several outputs for one input --------------------------------------------


@pytest.fixture(scope='module')
def several(config):
  """Three sampled outputs per input, and one of greedy and beam search."""
  return evaluate.Evaluation(
    config,
    STUDENT,
    build.NO_MODEL,
    {
      'greedy': sampler.GREEDY,
      'sampled': sampler.ANCESTRAL,
      'beam': beam_search.BeamConfig(num_beams=2),
    },
    **SETTINGS,
    samples=evaluate.Samples(3, 'char'),
  )


@pytest.fixture(scope='module')
def draws(dataset, student_params):
  written = write_all(
    dataset, make_write(sampler.ANCESTRAL, num_outputs=3), student_params
  )
  return list(written.swapaxes(0, 1))


def test_metrics_are_means_over_the_draws(dataset):
  def write(params, row_ids_B, batch, num_outputs):
    # The first is right, the others are empty.
    outputs = [np.ones((4, 7), int)] * num_outputs
    outputs[0] = batch.decoder_target_tokens
    return np.stack(outputs, axis=1)

  values, texts, _ = evaluate.task_metrics(
    {
      'sampled': functools.partial(write, num_outputs=4),
      'other': functools.partial(write, num_outputs=1),
    },
    None,
    dataset,
    self_bleu_tokenize='char',
  )

  # Each of the empty ones has an equal, the first has nothing in common.
  assert values == {
    'sampled/error': 75.0,
    'sampled/self_bleu': 75.0,
    'other/error': 0.0,
  }
  assert texts['sampled'] == [word['targets'] for word in dataset.examples()]


def test_self_bleu_is_that_of_the_texts(
  several, student_params, dataset, draws
):
  values, _ = several(student_params)

  texts = zip(*map(dataset.decode, draws), strict=True)
  assert values['sampled/self_bleu'] == diversity.self_bleu(texts, 'char')
  assert 0.0 < values['sampled/self_bleu'] < 50.0  # it is not trained


def test_what_is_drawn_once_has_no_self_bleu(several, student_params):
  values, _ = several(student_params)

  assert {*values} == {*several.names()}
  assert {*values} == {
    'greedy/error',
    'sampled/error',
    'sampled/self_bleu',
    'beam/error',
  }


def test_several_draws_of_nothing_that_samples_are_refused(config):
  with pytest.raises(ValueError, match='NUM_SAMPLES is 2, but no decoding'):
    evaluate.Evaluation(
      config,
      STUDENT,
      build.NO_MODEL,
      GREEDY,
      **SETTINGS,
      samples=evaluate.Samples(2),
    )


def test_an_evaluation_without_decodings_is_refused(config, tmp_path):
  with pytest.raises(ValueError, match='DECODINGS is empty'):
    evaluate.evaluate_checkpoint('unread', str(tmp_path), config, {})


@pytest.fixture
def two_devices(monkeypatch):
  mesh = types.SimpleNamespace(shape={'data': 2, 'model': 1})
  monkeypatch.setattr(partitioning, 'make_mesh', lambda: mesh)


def test_a_batch_must_be_divisible_by_the_devices(
  config, tmp_path, two_devices
):
  odd = dataclasses.replace(config, batch_size=5)

  with pytest.raises(ValueError, match='EVAL_BATCH_SIZE 5 .* the 2 devices'):
    evaluate.evaluate_checkpoint('unread', str(tmp_path), odd, GREEDY)


def test_what_samples_does_so_at_each_temperature():
  decodings = {
    'greedy': sampler.GREEDY,
    'sampled': sampler.SamplerConfig(top_p=0.9),
    'beam': beam_search.BeamConfig(),
  }

  assert evaluate.at_temperatures(decodings, (0.1, 1)) == {
    'greedy': sampler.GREEDY,
    'sampled_0.1': sampler.SamplerConfig(temperature=0.1, top_p=0.9),
    'sampled_1.0': sampler.SamplerConfig(temperature=1.0, top_p=0.9),
    'beam': beam_search.BeamConfig(),
  }


@pytest.mark.parametrize('wrong', [(), (0.0, 1.0), (-1.0,), (0.5, 0.5)])
def test_temperatures_that_cannot_be_are_refused(wrong):
  with pytest.raises(ValueError, match='EVAL_TEMPERATURES must be different'):
    evaluate.at_temperatures({'sampled': sampler.ANCESTRAL}, wrong)


# --- Rewards ------------------------------------------------------------------


def test_the_mean_reward_is_that_of_what_was_written(
  config, student_params, examples, greedy
):
  reward = rewards.rouge_n(1)
  reward_fn = reward.make_reward_fn(None, IDS, None)
  mean_reward = programs.make_mean_reward(
    reward, reward_fn, None, ids=IDS, mesh=SETTINGS['mesh']
  )

  judged = evaluate.Evaluation(
    config, STUDENT, build.NO_MODEL, GREEDY, mean_reward=mean_reward, **SETTINGS
  )
  values, _ = judged(student_params)

  # Up to the end. The last batch has two rows that are no examples.
  weights = np.cumsum(np.cumsum(greedy == 1, axis=1), axis=1) <= 1
  want = rewards.compute(
    reward_fn, examples, Outputs(greedy, np.float32(weights)), None
  )
  assert want.shape == (10,) and want.max() > 0.0
  # Sums of 10 float32 numbers.
  assert values['greedy/reward'] == pytest.approx(float(want.mean()), rel=1e-5)
  assert {*judged.names()} == values.keys() == {'greedy/error', 'greedy/reward'}


def test_a_checkpoint_may_be_judged_by_a_model(config, tmp_path):
  conftest.save_model(tmp_path / 'student', STUDENT.config)
  conftest.save_model(tmp_path / 'judge', TEACHER.config)

  evaluate.evaluate_checkpoint(
    str(tmp_path / 'student'),
    str(tmp_path / 'eval'),
    config,
    GREEDY,
    reward=entailment.entailment(),
    reward_model=RewardModel(checkpoint_path=str(tmp_path / 'judge')),
  )

  values = json.loads((tmp_path / 'eval/eval_validation.json').read_text())
  assert 0.0 < values['greedy/reward'] < 1.0


def test_a_limit_that_would_cut_an_output_is_told_before_one_is_written(
  config, tmp_path, monkeypatch
):
  monkeypatch.setattr(evaluate, 'Evaluation', None)
  conftest.save_model(tmp_path / 'student', STUDENT.config)
  conftest.save_model(tmp_path / 'judge', TEACHER.config)

  with pytest.raises(ValueError, match='max_input_len is 12, but an output'):
    evaluate.evaluate_checkpoint(
      str(tmp_path / 'student'),
      str(tmp_path / 'eval'),
      config,
      GREEDY,
      reward=entailment.entailment(max_input_len=12),
      reward_model=RewardModel(checkpoint_path=str(tmp_path / 'judge')),
    )


def test_a_model_that_nobody_asks_is_refused(config, tmp_path):
  with pytest.raises(ValueError, match='REWARD uses no model'):
    evaluate.evaluate_checkpoint(
      'unread',
      str(tmp_path),
      config,
      GREEDY,
      reward_model=RewardModel(checkpoint_path='unread'),
    )


# --- How it is shown and kept -------------------------------------------------


EXAMPLES = [{'inputs': f'x{i}', 'targets': f'y{i}'} for i in range(9)]


def test_a_table_has_a_row_for_each_of_the_first_examples():
  table = evaluate.sample_table(EXAMPLES, ['s'] * 9, ['t'] * 9, num_rows=2)

  assert table.splitlines() == [
    '| input | reference | teacher | student |',
    '| --- | --- | --- | --- |',
    '| x0 | y0 | t | s |',
    '| x1 | y1 | t | s |',
  ]


def test_bars_and_line_ends_do_not_break_a_table():
  table = evaluate.sample_table(EXAMPLES[:1], ['a|b\nc'], None)

  assert table.splitlines()[-1] == '| x0 | y0 | a\\|b c |'


def test_results_that_cannot_be_written_leave_the_old_ones(tmp_path):
  evaluate.write_results(tmp_path, 'test', {'wer': 1.0})

  with pytest.raises(TypeError):
    evaluate.write_results(tmp_path, 'test', {'wer': jnp.float32(2.0)})

  path = tmp_path / 'eval_test.json'
  assert json.loads(path.read_text()) == {'wer': 1.0}
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('name', ['eval', 'samples'])
def test_results_are_not_overwritten(config, tmp_path, name):
  (tmp_path / f'{name}_validation.json').touch()

  with pytest.raises(ValueError, match=f'{name}_validation.json exists and wo'):
    evaluate.evaluate_checkpoint('unread', str(tmp_path), config, GREEDY)


def test_the_results_of_a_run_are_its_own(config, tmp_path):
  (tmp_path / 'config.gin').touch()

  with pytest.raises(ValueError, match='is the folder of a run, which has its'):
    evaluate.evaluate_checkpoint('unread', str(tmp_path), config, GREEDY)


def test_results_are_replaced_if_that_is_wanted(config, tmp_path):
  (tmp_path / 'eval_validation.json').touch()

  with pytest.raises(ValueError, match='nowhere is not there'):  # so it goes on
    evaluate.evaluate_checkpoint(
      'nowhere', str(tmp_path), config, GREEDY, overwrite=True
    )


def test_metrics_are_one_line():
  line = evaluate.format_metrics({'wer': 12.3456, 'kl': 0.000123})

  assert line == 'wer 12.35  kl 0.000123'
