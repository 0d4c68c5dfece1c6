# SPDX-License-Identifier: Apache-2.0
import json
import math
import pathlib
import shlex
import statistics

import PIL.Image
import pytest

from gkd_jax.sweeps import compare, jobs

FILES = {
  'teacher': 'configs/cmudict_g2p/teacher.gin',
  'initial_student': 'configs/cmudict_g2p/student.gin',
  'evaluation': 'configs/cmudict_g2p/eval.gin',
}
METHODS = {
  'sft': 'configs/cmudict_g2p/sft.gin',
  'imitkd': 'configs/cmudict_g2p/imitkd.gin',
}
METRICS = ('wer', 'per')

# Greedy WER of the test split, {seed: {method: value}}; the teacher's is 20.
WER = {
  0: {'initial_student': 60.0, 'sft': 50.0, 'imitkd': 30.0},
  1: {'initial_student': 70.0, 'sft': 50.0, 'imitkd': 40.0},
  2: {'initial_student': 80.0, 'sft': 65.0, 'imitkd': 20.0},
}


def finish(folder, wer, teacher_known=True, steps=100):
  """Leaves what a finished run leaves."""
  folder.mkdir(parents=True, exist_ok=True)
  results = {
    'step': steps,
    'train_seconds': 12.5,
    'greedy/wer': wer,
    'greedy/per': wer / 4,
    'sampled/wer': wer + 10,
    'sampled/per': wer / 2,
  }
  if teacher_known:
    results['on_student_outputs/reverse_kl'] = wer / 100
    results['on_dataset_outputs/reverse_kl'] = wer / 200
  (folder / 'eval_test.json').write_text(json.dumps(results))
  lines = [
    {'step': step, 'validation/greedy/wer': wer + steps - step}
    for step in (steps // 2, steps)
  ]
  (folder / 'metrics.jsonl').write_text(
    ''.join(json.dumps(line) + '\n' for line in lines)
  )


def finish_all(folder, seeds=(0,)):
  finish(folder / 'teacher', 20.0, teacher_known=False)
  for seed in seeds:
    for name, wer in WER[seed].items():
      of_method = folder / f'seed_{seed}' / name
      finish(of_method, wer, teacher_known=name != 'initial_student')
    initial = folder / f'seed_{seed}' / 'initial_student'
    finish(initial / 'with_teacher', WER[seed]['initial_student'])


def run_compare(folder, **changes):
  settings = {
    **FILES,
    'methods': METHODS,
    'metrics': METRICS,
    'title': 'Two methods',
  }
  compare.compare(output_dir=str(folder), **(settings | changes))


def rows_of(folder):
  results = json.loads((folder / 'results.json').read_text())
  return {row['method']: row for row in results['methods']}


@pytest.fixture
def start(monkeypatch):
  """Runs are not started, but finished at once; records what happened."""

  class Process:
    returncode = None

    def __init__(self, job):
      self.job = job
      self.polls_left = 2

    def poll(self):
      self.polls_left -= 1
      if self.polls_left == 0:
        start.running.remove(self.job.name)
        self.returncode = start.exit_codes.get(self.job.name, 0)
        if self.job.name not in start.without_result:
          finish(self.job.folder, 50.0)
          start.finished.append(self.job.name)
      return self.returncode

    def terminate(self):
      start.terminated.append(self.job.name)

    def wait(self):
      pass

  def start(job):
    assert set(job.needs) <= set(start.finished)
    start.jobs.append(job)
    start.running.append(job.name)
    start.most_running = max(start.most_running, len(start.running))
    job.folder.mkdir(parents=True, exist_ok=True)
    pathlib.Path(f'{job.folder}.log').write_text('one\n\ntwo\n')
    return Process(job)

  start.jobs, start.running, start.finished, start.terminated = [], [], [], []
  start.without_result, start.exit_codes = set(), {}
  start.most_running = 0
  monkeypatch.setattr(jobs, '_start', start)
  monkeypatch.setattr(jobs.time, 'sleep', lambda seconds: None)
  return start


# --- The numbers of the table -------------------------------------------------


def test_the_gap_closed_is_what_is_won_of_what_could_be_won(tmp_path):
  finish_all(tmp_path)

  run_compare(tmp_path)

  rows = rows_of(tmp_path)
  # 60 at first, 20 the teacher's: 40 to be won.
  assert rows['initial_student']['gap_closed'] == 0.0
  assert rows['sft']['gap_closed'] == (60 - 50) / 40
  assert rows['imitkd']['gap_closed'] == (60 - 30) / 40
  assert 'gap_closed' not in rows['teacher']


def test_a_method_that_does_harm_closes_less_than_nothing(tmp_path):
  finish_all(tmp_path)
  finish(tmp_path / 'seed_0' / 'sft', 70.0)

  run_compare(tmp_path)

  assert rows_of(tmp_path)['sft']['gap_closed'] == -0.25


def test_without_a_gap_there_is_no_share_of_it(tmp_path, capsys):
  finish_all(tmp_path)
  finish(tmp_path / 'teacher', 60.0, teacher_known=False)

  run_compare(tmp_path)

  assert rows_of(tmp_path)['sft']['gap_closed'] is None
  (line,) = (x for x in capsys.readouterr().out.splitlines() if '| sft' in x)
  assert 'nan' not in line.lower()


def test_a_row_has_what_its_run_measured(tmp_path):
  finish_all(tmp_path)

  run_compare(tmp_path)

  row = rows_of(tmp_path)['imitkd']
  assert row == {
    'method': 'imitkd',
    'seeds': 1,
    'wer': 30.0,
    'per': 7.5,
    'sampled_wer': 40.0,
    'sampled_per': 15.0,
    'kl_on_student_outputs': 0.3,
    'kl_on_dataset_outputs': 0.15,
    'steps': 100,
    'seconds': 12.5,
    'gap_closed': 0.75,
  }


def test_the_initial_students_divergence_is_from_its_own_evaluation(tmp_path):
  finish_all(tmp_path)

  run_compare(tmp_path)

  rows = rows_of(tmp_path)
  assert rows['initial_student']['kl_on_student_outputs'] == 0.6
  assert 'kl_on_student_outputs' not in rows['teacher']


def test_rows_are_in_the_order_of_the_methods(tmp_path):
  finish_all(tmp_path)

  run_compare(tmp_path, methods=dict(reversed(METHODS.items())))

  assert list(rows_of(tmp_path)) == [
    'teacher',
    'initial_student',
    'imitkd',
    'sft',
  ]


def test_several_seeds_give_means_and_standard_errors(tmp_path):
  finish_all(tmp_path, seeds=(0, 1, 2))

  run_compare(tmp_path, seeds=(0, 1, 2))

  row = rows_of(tmp_path)['imitkd']
  assert row['seeds'] == 3
  # 30, 40, 20: mean 30, squared deviations 0 + 100 + 100 over n - 1 = 2.
  assert row['wer'] == 30.0
  assert row['wer_se'] == pytest.approx(10.0 / math.sqrt(3))
  # Shares are taken seed by seed: 30/40, 30/50, 60/60.
  assert row['gap_closed'] == pytest.approx((0.75 + 0.6 + 1.0) / 3)
  assert row['gap_closed_se'] == pytest.approx(
    statistics.stdev([0.75, 0.6, 1.0]) / math.sqrt(3)
  )
  assert rows_of(tmp_path)['teacher']['seeds'] == 1


def test_every_single_run_is_in_the_results_too(tmp_path):
  finish_all(tmp_path, seeds=(0, 1))

  run_compare(tmp_path, seeds=(0, 1))

  runs = json.loads((tmp_path / 'results.json').read_text())['runs']
  assert [(r['method'], r['seed'], r['wer']) for r in runs] == [
    ('teacher', None, 20.0),
    ('initial_student', 0, 60.0),
    ('sft', 0, 50.0),
    ('imitkd', 0, 30.0),
    ('initial_student', 1, 70.0),
    ('sft', 1, 50.0),
    ('imitkd', 1, 40.0),
  ]


# --- The table, the report, the plots -----------------------------------------


def test_the_table_is_printed_and_its_cells_are_the_numbers(tmp_path, capsys):
  finish_all(tmp_path)

  run_compare(tmp_path)

  lines = capsys.readouterr().out.splitlines()
  table = [line for line in lines if line.startswith('|')]
  assert len({len(line) for line in table}) == 1  # aligned
  cells = [[c.strip() for c in line.strip('|').split('|')] for line in table]
  head, _, teacher, initial, _, imitkd = cells
  assert head == [
    'method',
    'WER %',
    'WER % at T=1',
    'PER %',
    'PER % at T=1',
    'gap closed %',
    'KL(student‖teacher)',
    'steps',
    'seconds',
  ]
  assert imitkd[:7] == [
    'imitkd',
    '30.00',
    '40.00',
    '7.50',
    '15.00',
    '75.0',
    '0.3000',
  ]
  # The teacher has no gap, nor a divergence from itself.
  assert teacher[:3] == ['teacher', '20.00', '30.00']
  assert teacher[5:7] == ['', '']
  assert initial[5] == '0.0'


def test_the_table_of_several_seeds_has_standard_errors(tmp_path, capsys):
  finish_all(tmp_path, seeds=(0, 1, 2))

  run_compare(tmp_path, seeds=(0, 1, 2))

  out = capsys.readouterr().out
  (line,) = (line for line in out.splitlines() if '| imitkd' in line)
  assert '| 30.00 ± 5.77 |' in line  # 10 / sqrt(3)
  (line,) = (line for line in out.splitlines() if '| teacher' in line)
  assert '±' not in line


def test_the_report_has_the_table_the_plots_and_every_command(tmp_path, capsys):
  finish_all(tmp_path, seeds=(0, 1))

  run_compare(tmp_path, seeds=(0, 1))

  report = (tmp_path / 'report.md').read_text()
  out = capsys.readouterr().out
  assert report.startswith('# Two methods\n')
  (row,) = (line for line in out.splitlines() if '| imitkd' in line)
  assert row in report
  for plot in ('wer_by_step.png', 'wer_final.png'):
    assert f']({plot})' in report
    assert str(tmp_path / plot) in out
  assert str(tmp_path / 'report.md') in out
  assert str(tmp_path / 'results.json') in out
  # One teacher; a student, its evaluation and two methods for each seed.
  assert report.count('python -m gkd_jax.main') == 1 + 2 * 4


def test_the_commands_of_the_report_can_be_pasted(tmp_path, start):
  folder = tmp_path / 'a b'
  lengths = {'TASK_FEATURE_LENGTHS': {'inputs': 16, 'targets': 16}}

  run_compare(folder, settings={'methods': lengths})

  lines = [
    shlex.split(line)
    for line in (folder / 'report.md').read_text().splitlines()
    if line.startswith('python')
  ]
  assert {tuple(line[:3]) for line in lines} == {
    ('python', '-m', 'gkd_jax.main')
  }
  assert {tuple(line[3:]) for line in lines} == {
    job.arguments for job in start.jobs
  }


def test_the_plots_are_pictures(tmp_path):
  finish_all(tmp_path, seeds=(0, 1))

  run_compare(tmp_path, seeds=(0, 1))

  for name in ('wer_by_step.png', 'wer_final.png'):
    with PIL.Image.open(tmp_path / name) as picture:
      assert picture.format == 'PNG'
      assert min(picture.size) > 300
      # Not blank: axes, curves, and colours for two methods at the least.
      assert len(picture.convert('RGB').getcolors(1 << 20)) > 10


# --- Which runs there are -----------------------------------------------------


def flags_of(job):
  pairs = (a.removeprefix('--').split('=', 1) for a in job.arguments)
  return dict(pairs)


def test_all_runs_are_made_each_after_what_it_needs(tmp_path, start):
  run_compare(tmp_path, seeds=(0, 1))  # `start` checks what each one needs

  assert sorted(start.finished) == sorted(
    ['teacher']
    + [
      f'seed_{seed}/{name}'
      for seed in (0, 1)
      for name in (
        'initial_student',
        'initial_student/with_teacher',
        'sft',
        'imitkd',
      )
    ]
  )


def test_a_method_waits_for_the_teacher_and_its_own_student(tmp_path, start):
  run_compare(tmp_path, seeds=(0, 1))

  needs = {job.name: set(job.needs) for job in start.jobs}
  assert needs['seed_1/sft'] == {'teacher', 'seed_1/initial_student'}
  assert needs['teacher'] == needs['seed_0/initial_student'] == set()


@pytest.mark.parametrize('num_parallel', [1, 3])
def test_so_many_runs_at_a_time_and_no_more(tmp_path, start, num_parallel):
  run_compare(tmp_path, seeds=(0, 1), num_parallel=num_parallel)

  assert start.most_running == num_parallel


def test_every_method_starts_from_the_same_student_and_teacher(tmp_path, start):
  run_compare(tmp_path, seeds=(4,))

  flags = {job.name: flags_of(job) for job in start.jobs}
  for method, file in METHODS.items():
    assert flags[f'seed_4/{method}'] == {
      'run_mode': 'train',
      'gin_file': file,
      'gin.MODEL_DIR': f'{tmp_path}/seed_4/{method}',
      'gin.INITIAL_CHECKPOINT_PATH': f'{tmp_path}/seed_4/initial_student',
      'gin.TEACHER_CHECKPOINT_PATH': f'{tmp_path}/teacher',
      'gin.RANDOM_SEED': '4',
    }
  assert flags['seed_4/initial_student']['gin.RANDOM_SEED'] == '4'
  assert flags['seed_4/initial_student/with_teacher'] == {
    'run_mode': 'eval',
    'gin_file': FILES['evaluation'],
    'gin.CHECKPOINT_PATH': f'{tmp_path}/seed_4/initial_student',
    'gin.TEACHER_CHECKPOINT_PATH': f'{tmp_path}/teacher',
    'gin.EVAL_OUTPUT_DIR': f'{tmp_path}/seed_4/initial_student/with_teacher',
  }


def test_settings_reach_the_runs_they_are_for(tmp_path, start):
  run_compare(
    tmp_path,
    settings={'teacher': {'TRAIN_STEPS': 7}, 'methods': {'TRAIN_STEPS': 9}},
  )

  flags = {job.name: flags_of(job) for job in start.jobs}
  assert flags['teacher']['gin.TRAIN_STEPS'] == '7'
  assert 'gin.TRAIN_STEPS' not in flags['seed_0/initial_student']
  assert flags['seed_0/sft']['gin.TRAIN_STEPS'] == '9'
  assert flags['seed_0/imitkd']['gin.TRAIN_STEPS'] == '9'


def test_all_runs_get_the_flags_of_the_comparison(tmp_path, start):
  run_compare(tmp_path, flags=['--tfds_data_dir=/data'])

  assert {job.arguments[-1] for job in start.jobs} == {'--tfds_data_dir=/data'}


def test_what_is_done_is_not_run_again(tmp_path, start):
  run_compare(tmp_path)
  start.jobs.clear()

  run_compare(tmp_path)

  assert start.jobs == []


def test_only_what_is_left_is_run(tmp_path, start):
  run_compare(tmp_path)
  (tmp_path / 'seed_0' / 'sft' / 'eval_test.json').unlink()
  start.jobs.clear()

  run_compare(tmp_path)

  assert [job.name for job in start.jobs] == ['seed_0/sft']


def test_a_method_can_be_added_later(tmp_path, start):
  run_compare(tmp_path, methods={'sft': METHODS['sft']})
  start.jobs.clear()

  run_compare(tmp_path)

  assert [job.name for job in start.jobs] == ['seed_0/imitkd']
  assert list(rows_of(tmp_path))[2:] == ['sft', 'imitkd']


# --- Runs that fail -----------------------------------------------------------


def test_a_run_that_fails_ends_the_comparison_with_its_log(tmp_path, start):
  start.exit_codes['seed_0/sft'] = 1

  with pytest.raises(ValueError) as error:
    run_compare(tmp_path)

  message = str(error.value)
  assert message.startswith('seed_0/sft failed.')
  assert f'{tmp_path}/seed_0/sft.log' in message
  assert message.endswith('\none\ntwo')
  assert not (tmp_path / 'results.json').exists()


def test_a_run_that_leaves_no_result_has_failed(tmp_path, start):
  start.without_result.add('teacher')

  with pytest.raises(ValueError, match='^teacher failed'):
    run_compare(tmp_path)


def test_when_one_fails_those_beside_it_are_ended(tmp_path, start):
  start.exit_codes['teacher'] = 1

  with pytest.raises(ValueError, match='^teacher failed'):
    run_compare(tmp_path, num_parallel=2)

  assert start.terminated == ['seed_0/initial_student']


# --- What is refused ----------------------------------------------------------


def test_runs_of_other_settings_are_not_mixed(tmp_path, start):
  run_compare(tmp_path, settings={'methods': {'TRAIN_STEPS': 9}})
  start.jobs.clear()
  before = (tmp_path / 'results.json').read_text()

  with pytest.raises(ValueError, match='other settings.*seed_0/sft') as error:
    run_compare(tmp_path, settings={'methods': {'TRAIN_STEPS': 10}})

  assert 'teacher' not in str(error.value).partition(':')[2]
  assert start.jobs == []
  assert (tmp_path / 'results.json').read_text() == before


def test_runs_of_a_gin_file_that_was_changed_are_not_mixed(tmp_path, start):
  (tmp_path / 'size.gin').write_text('EMB_DIM = 8\n')
  method = tmp_path / 'method.gin'
  method.write_text(f"include '{tmp_path}/size.gin'\n")
  run_compare(tmp_path / 'out', methods={'mine': str(method)})

  (tmp_path / 'size.gin').write_text('EMB_DIM = 16\n')  # it is included

  with pytest.raises(ValueError, match='gin files: seed_0/mine'):
    run_compare(tmp_path / 'out', methods={'mine': str(method)})


def test_a_gin_file_that_is_not_there_is_refused(tmp_path, start):
  with pytest.raises(ValueError, match='no gin file configs/my_method.gin'):
    run_compare(tmp_path / 'out', methods={'my': 'configs/my_method.gin'})

  assert start.jobs == [] and not (tmp_path / 'out').exists()


def test_settings_for_nobody_are_refused(tmp_path, start):
  with pytest.raises(ValueError, match=r"settings may name.*not \['student'\]"):
    run_compare(tmp_path / 'out', settings={'student': {'TRAIN_STEPS': 3}})

  assert start.jobs == [] and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'seeds': 3}, 'SEEDS must be whole numbers, each once'),
    ({'seeds': ()}, 'SEEDS must be whole numbers, each once'),
    ({'seeds': (0, 0)}, 'SEEDS must be whole numbers, each once'),
    ({'seeds': (0.5,)}, 'SEEDS must be whole numbers, each once'),
    ({'metrics': 'wer'}, "METRICS must be like .* got 'wer'"),
    ({'metrics': ()}, 'METRICS must be like'),
    ({'methods': {}}, 'METHODS must be'),
    ({'methods': ('sft.gin',)}, 'METHODS must be'),
    ({'methods': {'teacher': METHODS['sft']}}, "METHODS: 'teacher' cannot be"),
    ({'methods': {'a/b': METHODS['sft']}}, "METHODS: 'a/b' cannot be"),
  ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, start, changes, message):
  with pytest.raises(ValueError, match=message):
    run_compare(tmp_path / 'out', **changes)

  assert start.jobs == [] and not (tmp_path / 'out').exists()


def test_settings_that_gin_does_not_take_are_refused_at_once(tmp_path, start):
  def check(arguments, result):
    del result
    if '--gin.TRAIN_STEP=3' in arguments:
      raise ValueError('TRAIN_STEP changes nothing')

  with pytest.raises(ValueError, match='seed_0/sft cannot be run: TRAIN_STEP'):
    run_compare(
      tmp_path / 'out', settings={'methods': {'TRAIN_STEP': 3}}, check=check
    )

  assert start.jobs == [] and not (tmp_path / 'out').exists()


def test_a_metric_that_the_runs_lack_is_named(tmp_path):
  finish_all(tmp_path)

  with pytest.raises(ValueError, match="no 'greedy/cer'. It has: .*greedy/wer"):
    run_compare(tmp_path, metrics=('wer', 'cer'))


def test_no_run_at_a_time_is_refused(tmp_path, start):
  with pytest.raises(ValueError, match='NUM_PARALLEL must be'):
    run_compare(tmp_path / 'out', num_parallel=0)
