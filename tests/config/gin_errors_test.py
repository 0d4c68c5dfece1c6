# SPDX-License-Identifier: Apache-2.0
"""A user's exception keeps its traceback; an error of a setting is one line."""

import textwrap
import traceback

import pytest

MODULE = """
from gkd_jax.distill import policies, rewards

def broken(*arguments, **keywords):
  raise ValueError('mine is broken')

def divergence(*, teacher_logits, student_logits):
  return broken()

def forgets(*, teacher_logits, student_logits):
  return undefined_name

def wrong_type(*, teacher_logits, student_logits):
  return teacher_logits + 'a'

def other_arguments(logits):
  return logits

def policy():
  return policies.mixture(2.0)

def reward():
  return rewards.exact_match(undefined_name)
"""
EXPERIMENT = """
from __gin__ import dynamic_registration

import users_module
include 'configs/cmudict_g2p/gkd.gin'
MODEL_DIR = 'unused'
INITIAL_CHECKPOINT_PATH = None
TEACHER_CHECKPOINT_PATH = 'unused'
"""


@pytest.fixture
def start(run_main, tmp_path, monkeypatch):
  """Runs an experiment that uses a user's module, with one more line."""
  (tmp_path / 'users_module.py').write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(__import__('sys').modules, 'users_module', raising=False)

  def start(line):
    path = tmp_path / 'mine.gin'
    path.write_text(EXPERIMENT + textwrap.dedent(line) + '\n')
    return run_main(f'--gin_file={path}')

  return start


@pytest.mark.parametrize(
  ('line', 'error', 'function'),
  [
    ('DIVERGENCE = @users_module.divergence', ValueError, 'broken'),
    ('DIVERGENCE = @users_module.forgets', NameError, 'forgets'),
    ('DIVERGENCE = @users_module.wrong_type', Exception, 'wrong_type'),
    ('POLICY = @users_module.policy()', ValueError, 'policy'),
    ('methods.Method.credit = @users_module.reward()', NameError, 'reward'),
    ('POLICY = @users_module.broken()', ValueError, 'broken'),
  ],
)
def test_an_exception_in_a_users_module_keeps_its_traceback(
  start, line, error, function
):
  with pytest.raises(error) as raised:
    start(f'from gkd_jax.distill import methods\n{line}')

  shown = ''.join(traceback.format_exception(raised.value))
  assert 'users_module.py", line ' in shown
  assert f', in {function}\n' in shown


def test_a_divergence_of_other_arguments_is_one_line(start):
  finished = start('DIVERGENCE = @users_module.other_arguments')

  assert finished.code == 1
  assert 'must be a function of teacher_logits and student_logits' in (
    finished.err
  )
  assert 'Traceback' not in finished.err
  assert finished.err.count('\n') == 1
