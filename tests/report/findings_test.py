# SPDX-License-Identifier: Apache-2.0
from gkd_jax.report import findings, runs, sections
from tests import run_folders
from tests.run_folders import SFT, gkd

WER = {
  'teacher': 20.0,
  'initial': (SFT, [60.0]),
  'sft': (SFT, [58.0]),
  'skd': (gkd(0.0), [50.0]),
  'imitkd': (gkd(0.5), [44.0]),
  'on_policy': (gkd(1.0), [40.0]),
}


def finding(folder, wer, leave_out=()):
  run_folders.study(folder, wer)
  found, _ = runs.find(str(folder))
  found = [run for run in found if run.folder.name not in leave_out]
  (section,) = sections.make(found)
  return findings.describe(section)


def test_the_finding_ranks_the_methods_by_the_gap_they_close(tmp_path):
  assert finding(tmp_path, WER) == (
    'Found: on-policy GKD, forward KL closes 50.0 % of the gap between the '
    'initial student and the teacher, ImitKD 40.0 %, supervised KD 25.0 %, SFT '
    '5.0 % (one seed): the larger the share of outputs that the student '
    'writes, the better, as in the GKD paper.'
  )


def test_another_order_than_the_papers_is_reported_as_such(tmp_path):
  said = finding(tmp_path, WER | {'imitkd': (gkd(0.5), [38.0])})

  assert said.startswith('Found: ImitKD closes 55.0 % of the gap')
  assert said.endswith(
    'a larger share of outputs that the student writes was not always better '
    'here, unlike in the GKD paper.'
  )


def test_several_methods_of_one_share_have_no_trend(tmp_path):
  said = finding(tmp_path, WER | {'jsd': (gkd(1.0, 'reverse_kl'), [41.0])})

  assert said.endswith('SFT 5.0 % (one seed).')


def test_without_a_gap_the_main_metric_ranks(tmp_path):
  said = finding(tmp_path, WER, leave_out=('teacher', 'initial'))

  assert said.startswith(
    'Found: on-policy GKD, forward KL ends at 40.00 (WER %, greedy), ImitKD '
    '44.00, supervised KD 50.00'
  )


def test_a_method_without_a_gap_is_ranked_with_the_others(tmp_path):
  several = {'TEACHER_CHECKPOINT_PATH': {'a': 'x', 'b': 'y'}}

  said = finding(tmp_path, WER | {'two': (gkd(1.0) | several, [45.0])})

  assert said.startswith(
    'Found: on-policy GKD, forward KL ends at 40.00 (WER %, greedy), ImitKD '
    '44.00'
  )
  assert 'teachers a, b 45.00' in said


def test_one_method_is_no_comparison(tmp_path):
  wer = {name: WER[name] for name in ('teacher', 'initial', 'sft')}

  assert finding(tmp_path, wer) == ''


def test_means_have_errors_and_the_number_of_seeds(tmp_path):
  wer = {
    name: value if name == 'teacher' else (value[0], value[1] * 3)
    for name, value in WER.items()
  }

  said = finding(tmp_path, wer)

  assert 'ImitKD 40.0 ± 0.0 %' in said
  assert '(3 seeds): the larger' in said
