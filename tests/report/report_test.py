# SPDX-License-Identifier: Apache-2.0
import json
import math
import re
import shutil

import PIL.Image
import pytest

from gkd_jax.report import report, runs, sections
from tests import run_folders
from tests.report.page_test import Tree
from tests.run_folders import SFT, gkd, samples, token

WER = {
  'teacher': 20.0,
  'initial': (SFT, [60.0, 70.0, 80.0]),
  'skd': (gkd(0.0), [50.0, 50.0, 65.0]),
  'skd_rkl': (gkd(0.0, 'reverse_kl'), [51.0, 52.0, 66.0]),
  'imitkd': (gkd(0.5), [30.0, 40.0, 20.0]),
}


def read_json(path):
  """Reads JSON; NaN and Infinity are none."""

  def refuse(constant):
    raise AssertionError(f'{path} holds {constant}')

  return json.loads(path.read_text(), parse_constant=refuse)


def sections_of(folder):
  return read_json(folder / 'report.json')['sections']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """The report of a study by the command line: its folder, and the run."""
  top = run_folders.study(tmp_path_factory.mktemp('study'), WER)
  for name in ('skd', 'imitkd'):
    path = top / 'seed_0' / name / 'samples_test.json'
    path.write_text(
      json.dumps(samples(('a word', [token('x'), token('', id=1)])))
    )
  run_folders.write(top / 'seed_3' / 'skd', None, {500: 55.0}, **gkd(0.0))
  return top


@pytest.fixture(scope='module')
def finished(made, run_main):
  done = run_main('--run_mode=report', f'--gin.RUNS={made}/**')
  assert done.code == 0, done.err
  return done


@pytest.fixture(scope='module')
def folder(made, finished):
  return made / 'report'


def test_the_files_are_where_it_says(finished, folder):
  for name in ('report.md', 'report.json', 'report.html'):
    assert str(folder / name) in finished.out
    assert (folder / name).is_file()
  assert sorted(path.name for path in folder.glob('*.png')) == [
    'lambda_divergence.png',
    'methods.png',
    'training.png',
  ]
  for path in folder.glob('*.png'):
    with PIL.Image.open(path) as picture:
      picture.verify()
  assert not list(folder.glob('*.partial'))


def test_means_and_errors_are_in_the_results(folder):
  (section,) = sections_of(folder)
  group = next(g for g in section['groups'] if g['name'] == 'ImitKD')

  assert (section['task'], section['split']) == ('cmudict_g2p', 'test')
  assert (section['metric'], section['mode']) == ('greedy/wer', 'min')
  assert group['role'] == 'method'
  assert group['means']['greedy/wer'] == {
    'mean': 30.0,
    'standard_error': pytest.approx(10.0 / math.sqrt(3.0)),
    'runs': 3,
  }
  assert group['means']['gap_closed']['mean'] == pytest.approx(
    (30 / 40 + 30 / 50 + 60 / 60) / 3
  )
  assert [run['seed'] for run in group['runs']] == [0, 1, 2]
  assert [run['values']['greedy/wer'] for run in group['runs']] == [30, 40, 20]
  assert group['settings']['STUDENT_DATA_FRACTION'] == 0.5


def test_figures_and_what_was_left_out_are_in_the_results(folder):
  (section,) = sections_of(folder)

  assert [figure['name'] for figure in section['figures']] == [
    'methods',
    'lambda_divergence',
    'training',
  ]
  heat_map = section['figures'][1]['data']
  assert heat_map['rows']['forward KL'][1] == [30.0, pytest.approx(5.7735), 3]
  assert len(section['left_out']) == 4


def rows_of(markdown):
  """The cells of the tables of a Markdown text."""
  return [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in markdown.splitlines()
    if line.startswith('|')
  ]


def test_the_table_has_each_experiment_and_the_best_stands_out(folder):
  text = (folder / 'report.md').read_text()
  head, _, *rows = rows_of(text)[:7]

  assert head == [
    'method',
    'WER %',
    'WER % at T=1',
    'gap closed %',
    'KL(student‖teacher)',
    'steps',
    'seconds',
  ]
  assert rows == [
    ['teacher', '20.00', '', '', '', '1000', '10'],
    ['initial student', '70.00 ± 5.77', '80.00 ± 5.77', '', '', '1000', '10'],
    ['supervised KD']
    + ['55.00 ± 5.00', '65.00 ± 5.00', '30.0 ± 5.0', '0.5500 ± 0.0500']
    + ['1000', '10'],
    ['supervised KD, reverse KL']
    + ['56.33 ± 4.84', '66.33 ± 4.84', '27.3 ± 4.4', '0.5633 ± 0.0484']
    + ['1000', '10'],
    ['ImitKD', '**30.00 ± 5.77**', '**40.00 ± 5.77**', '**78.3 ± 11.7**']
    + ['**0.3000 ± 0.0577**', '1000', '10'],
  ]


def test_the_report_says_what_was_compared_and_what_not(folder):
  text = (folder / 'report.md').read_text()

  assert text.startswith('# Distillation on cmudict_g2p\n')
  assert '13 runs of cmudict_g2p, measured on its test split.' in text
  assert 'Main metric: WER %, greedy, lower is better.' in text
  assert 'Means ± standard errors over 3 seeds.' in text
  assert 'Found: ImitKD closes 78.3 ± 11.7 % of the gap' in text
  assert '![Methods](methods.png)' in text
  assert '- Data efficiency: needs a method trained on two or more' in text
  assert re.search(r'- \S+/seed_3/skd: not done: .* step 500 of 1000', text)
  assert '| ImitKD                    | 2    |' in text  # every run is listed


def test_the_page_has_the_same_table_figures_and_samples(folder):
  tree = Tree((folder / 'report.html').read_text())
  texts = [text for _, text in tree.texts]

  assert 'Distillation on cmudict_g2p' in texts
  assert '30.00 ± 5.77' in [text for tag, text in tree.texts if tag == 'b']
  assert len(tree.all('svg')) == 3
  assert [text for tag, text in tree.texts if tag == 'dt'] == [
    'input',
    'reference',
    'teacher',
    'supervised KD',
    'ImitKD',
  ]
  assert len(tree.tokens()) == 4
  command = 'python -m gkd_jax.main --gin_file=a.gin --gin.MODEL_DIR='
  assert sum(text.startswith(command) for text in texts) == 13


def test_what_is_printed_is_the_table_and_where_it_is(finished):
  assert '| ImitKD                    | 30.00 ± 5.77 ' in finished.out
  first, *_, last, _ = finished.out.splitlines()
  assert re.fullmatch(r'Report: +\S+/report\.html', first)
  assert last.startswith('Found: ImitKD closes 78.3 ± 11.7 % of the gap')
  assert 'seed_3/skd: not done' in finished.out


# --- What can be chosen -------------------------------------------------------


@pytest.fixture
def two_tasks(tmp_path):
  for task, values in (
    ('xsum', {'greedy/rouge2': 16.0, 'greedy/rouge1': 30.0}),
    ('gsm8k', {'greedy/accuracy': 10.0}),
  ):
    for name, macros in (('a', SFT), ('b', gkd(1.0))):
      run_folders.write(
        tmp_path / 'runs' / task / name,
        {metric: value + (name == 'b') for metric, value in values.items()},
        MIXTURE_OR_TASK_NAME=task,
        BEST_METRIC=None,
        **macros,
      )
  return tmp_path


def test_each_task_has_its_part(two_tasks):
  report.report(f'{two_tasks}/runs/*/*', output_dir=str(two_tasks / 'out'))

  text = (two_tasks / 'out' / 'report.md').read_text()
  assert text.startswith('# Distillation on gsm8k, xsum\n')
  assert re.findall('^## (.+)$', text, re.MULTILINE) == [
    'gsm8k, test split',
    'xsum, test split',
  ]
  assert {path.name for path in (two_tasks / 'out').glob('*.png')} == {
    'gsm8k_test_methods.png',
    'xsum_test_methods.png',
  }
  assert [s['metric'] for s in sections_of(two_tasks / 'out')] == [
    'greedy/accuracy',
    'greedy/rouge2',
  ]


def test_why_there_is_no_gap_closed_is_said(two_tasks):
  report.report(f'{two_tasks}/runs/xsum/*', output_dir=str(two_tasks / 'out'))

  text = (two_tasks / 'out' / 'report.md').read_text()
  assert '- "gap closed": needs the runs of the initial student' in text


def test_title_metric_and_mode_can_be_chosen(two_tasks, run_main):
  done = run_main(
    '--run_mode=report',
    f'--gin.RUNS={two_tasks}/runs/xsum',
    f'--gin.OUTPUT_DIR={two_tasks}/out',
    '--gin.TITLE=My <own> title',
    '--gin.METRIC=greedy/rouge1',
    '--gin.MODE=min',
  )

  assert done.code == 0, done.err
  (section,) = sections_of(two_tasks / 'out')
  assert (section['metric'], section['mode']) == ('greedy/rouge1', 'min')
  page = (two_tasks / 'out' / 'report.html').read_text()
  assert '<title>My &lt;own&gt; title</title>' in page


def test_many_metrics_are_not_all_in_the_table(tmp_path):
  values = {f'greedy/subject_{i}': float(i) for i in range(57)}
  run_folders.write(tmp_path / 'a', values, BEST_METRIC=None, **SFT)

  report.report(str(tmp_path), output_dir=str(tmp_path / 'out'))

  text = (tmp_path / 'out' / 'report.md').read_text()
  assert len(rows_of(text)[0]) < 10
  assert 'Only in report.json: subject_4, subject_5' in text
  (group,) = sections_of(tmp_path / 'out')[0]['groups']
  assert group['means']['greedy/subject_56']['mean'] == 56.0


def test_runs_with_other_learning_rates_are_in_a_table_of_their_own(tmp_path):
  for rate, validation in ((0.01, 50.0), (0.03, 60.0)):
    run_folders.write(
      tmp_path / str(rate),
      {'greedy/wer': validation + 1},
      {1000: validation},
      LEARNING_RATE=rate,
      **SFT,
    )

  report.report(str(tmp_path), output_dir=str(tmp_path / 'out'))

  text = (tmp_path / 'out' / 'report.md').read_text()
  main, also = text.split('Also run:')
  assert '| SFT    | 51.00 |' in main
  assert 'shows learning rate 0.01, the best of 2' in main
  assert '| SFT, learning rate 0.03 | 61.00 |' in also
  assert 'Also run' in (tmp_path / 'out' / 'report.html').read_text()


def test_the_report_of_one_run_is_beside_it(tmp_path):
  run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0}, **SFT)

  report.report(f'{tmp_path}/a')

  assert (tmp_path / 'report' / 'report.html').is_file()


def test_making_it_again_replaces_it(tmp_path):
  run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0}, **SFT)
  report.report(str(tmp_path), output_dir=str(tmp_path / 'report'))
  run_folders.write(tmp_path / 'b', {'greedy/wer': 40.0}, **gkd(0.5))

  report.report(str(tmp_path), output_dir=str(tmp_path / 'report'))

  assert len(sections_of(tmp_path / 'report')[0]['groups']) == 2


def test_a_file_of_another_program_is_not_replaced(tmp_path):
  run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0}, **SFT)
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'report.json').write_text('{"mine": 1}')

  with pytest.raises(ValueError, match='report.json exists and would be over'):
    report.report(str(tmp_path / 'a'), output_dir=str(tmp_path / 'out'))
  assert [path.name for path in (tmp_path / 'out').iterdir()] == ['report.json']

  report.report(
    str(tmp_path / 'a'), output_dir=str(tmp_path / 'out'), overwrite=True
  )
  assert len(sections_of(tmp_path / 'out')) == 1


# --- What is refused ----------------------------------------------------------


def refused(run_main, tmp_path, *flags):
  done = run_main(
    '--run_mode=report', f'--gin.OUTPUT_DIR={tmp_path}/out', *flags
  )
  assert done.code == 1
  assert not (tmp_path / 'out').exists()
  return done.err


def test_runs_must_be_named(run_main, tmp_path):
  assert 'RUNS must be set: --gin.RUNS=VALUE.' in refused(run_main, tmp_path)


def test_a_glob_that_matches_nothing_is_refused(run_main, tmp_path):
  err = refused(run_main, tmp_path, f'--gin.RUNS={tmp_path}/no/*')

  assert err.startswith(f"Error: RUNS matches no run folder: '{tmp_path}/no/*'")


def test_runs_of_which_none_is_done_are_refused(run_main, tmp_path):
  run_folders.write(tmp_path / 'a', None, {500: 50.0}, **SFT)

  err = refused(run_main, tmp_path, f'--gin.RUNS={tmp_path}/*')

  assert err.startswith('Error: RUNS: none of these runs is done.')


@pytest.mark.parametrize(
  'flag, want',
  [
    ('METRIC=greedy/bleu', "No run has METRIC 'greedy/bleu'"),
    ('MODE=smallest', "MODE must be 'min', 'max' or None, got 'smallest'"),
  ],
)
def test_a_metric_or_mode_that_is_none_is_refused(
  run_main, tmp_path, flag, want
):
  run_folders.write(tmp_path / 'a', {'greedy/wer': 50.0}, **SFT)

  err = refused(run_main, tmp_path, f'--gin.RUNS={tmp_path}/a', f'--gin.{flag}')

  assert err.startswith(f'Error: {want}')


# --- Real runs ----------------------------------------------------------------


@pytest.fixture(scope='module')
def real(run_main, tmp_path_factory):
  """Teacher, student, and a method with two seeds, trained for a few steps."""
  top = tmp_path_factory.mktemp('real')
  small = {
    'EMB_DIM': 16,
    'NUM_HEADS': 2,
    'HEAD_DIM': 8,
    'MLP_DIM': 32,
    'NUM_ENCODER_LAYERS': 1,
    'NUM_DECODER_LAYERS': 1,
    'TRAIN_STEPS': 4,
    'WARMUP_STEPS': 2,
    'BATCH_SIZE': 8,
    'EVAL_PERIOD': 2,
    'EVAL_BATCH_SIZE': 20,
    'EVALUATOR_NUM_EXAMPLES': 20,
    'final_eval/datasets.DatasetConfig.num_examples': 20,
    # Short outputs are quick to write.
    'TASK_FEATURE_LENGTHS': {'inputs': 16, 'targets': 8},
  }

  def train(name, config, **macros):
    flags = {**small, 'MODEL_DIR': top / name, **macros}
    done = run_main(
      f'--gin_file=configs/cmudict_g2p/{config}.gin',
      *(f'--gin.{macro}={value}' for macro, value in flags.items()),
    )
    assert done.code == 0, done.err
    return top / name

  origin = {
    'TEACHER_CHECKPOINT_PATH': train('teacher', 'teacher', EMB_DIM=24),
    'INITIAL_CHECKPOINT_PATH': train('student', 'student'),
  }
  trained = train('jsd_0', 'on_policy_jsd_0.9', **origin)
  other_seed = top / 'jsd_1'  # as it would be
  shutil.copytree(trained, other_seed)
  config = (trained / 'config.gin').read_text()
  assert config.count('RANDOM_SEED = 0\n') == 1
  (other_seed / 'config.gin').write_text(
    config.replace('RANDOM_SEED = 0\n', 'RANDOM_SEED = 1\n')
  )
  results = read_json(trained / 'eval_test.json')
  (other_seed / 'eval_test.json').write_text(
    json.dumps(results | {'sampled/per': results['sampled/per'] + 1.0})
  )
  return top


@pytest.mark.slow
def test_real_runs_are_told_from_each_other(real, run_main):
  done = run_main('--run_mode=report', f'--gin.RUNS={real}/*')
  assert done.code == 0, done.err

  (section,) = sections_of(real / 'report')
  groups = {group['name']: group for group in section['groups']}

  assert {name: (g['role'], len(g['runs'])) for name, g in groups.items()} == {
    'teacher': ('teacher', 1),
    'initial student': ('initial student', 1),
    'on-policy GKD, JSD(0.9)': ('method', 2),
  }
  values = [
    read_json(real / f'jsd_{seed}' / 'eval_test.json')['sampled/per']
    for seed in (0, 1)
  ]
  mean = groups['on-policy GKD, JSD(0.9)']['means']['sampled/per']
  assert mean['mean'] == pytest.approx(sum(values) / 2)
  assert mean['standard_error'] == pytest.approx(abs(values[0] - values[1]) / 2)
  assert {figure['name'] for figure in section['figures']} >= {
    'methods',
    'training',
  }


@pytest.mark.slow
def test_real_samples_are_on_the_page(real, run_main):
  done = run_main(
    '--run_mode=report', f'--gin.RUNS={real}/*', f'--gin.OUTPUT_DIR={real}/out'
  )
  assert done.code == 0, done.err

  tree = Tree((real / 'out' / 'report.html').read_text())

  written = read_json(real / 'jsd_0' / 'samples_test.json')['examples']
  assert len(written) == len(tree.all('article')) == 16
  assert len(tree.tokens()) == sum(len(e['tokens']) for e in written)
  shown = {text for _, text in tree.texts}
  for example in written:
    assert {example['input'], example['reference']} <= shown


# --- What tokenizing lost -----------------------------------------------------


def losses(top, *lost):
  """The notes on runs that lost this of their training data."""
  for i, (of_run, method) in enumerate(zip(lost, (SFT, gkd(1.0)), strict=True)):
    line = {'step': 0} | {f'data/{k}': v for k, v in of_run.items()}
    run_folders.write(
      top / f'run_{i}', {'greedy/wer': 20.0}, lines=[line], **method
    )
  found, _ = runs.find(f'{top}/*')
  (section,) = sections.make(found, None, None, ('LEARNING_RATE',))
  return report._losses(section)


def test_a_loss_of_all_methods_is_noted_once(tmp_path):
  lost = {'targets_cut': 0.25, 'inputs_unknown': 0.02}

  assert losses(tmp_path, lost, lost) == [
    'Lost by tokenizing the training data: 25.0% of the examples have their '
    "targets cut to length, 2.0% of the inputs' tokens are unknown to the "
    'vocabulary.'
  ]


def test_a_loss_of_one_method_is_noted_with_its_name(tmp_path):
  (note,) = losses(tmp_path, {'inputs_cut': 0.5}, {})

  assert note.endswith(
    '50.0% of the examples have their inputs cut to length (SFT).'
  )


def test_a_loss_of_one_percent_is_not_noted(tmp_path):
  assert losses(tmp_path, {'inputs_cut': 0.01}, {'targets_unknown': 0.0}) == []
