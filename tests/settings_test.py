# SPDX-License-Identifier: Apache-2.0
"""What values of settings are refused, by the annotation of the parameter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from gkd_jax import settings


def takes(
  count: int,
  rate: float | None,
  flag: 'bool',
  later: 'Callable[[int], Mapping[str, float]] | None',
  lengths: Mapping[str, int],
  names: Sequence[str],
  anything: Any,
  other,
):
  """Has a parameter of each kind."""


@pytest.mark.parametrize(
  'name, value',
  [
    ('count', 3),
    ('rate', 3),
    ('rate', 0.5),
    ('rate', None),
    ('flag', False),
    ('later', None),
    ('later', takes),
    ('lengths', {'inputs': 8}),
    ('names', ('a', 'b')),
    ('names', ['a']),
    ('anything', 1 + 2j),
    ('other', 'whatever'),
  ],
)
def test_what_an_annotation_allows_is_accepted(name, value):
  settings.check('SETTING', value, takes.__annotations__.get(name, Any))


@pytest.mark.parametrize(
  'name, value, wanted',
  [
    ('count', True, 'a whole number'),
    ('count', 3.0, 'a whole number'),
    ('count', None, 'a whole number'),
    ('count', 2**31, 'a whole number'),
    ('rate', float('nan'), 'a finite number or None'),
    ('rate', 10**400, 'a finite number or None'),
    ('rate', '0.5', 'a finite number or None'),
    ('flag', 1, 'True or False'),
    ('later', 0.5, 'a function (@module.name) or None'),
    ('lengths', [8], '{name: value}'),
    ('names', 'a', 'a list'),
  ],
)
def test_what_it_does_not_is_refused_by_the_name_of_the_setting(
  name, value, wanted
):
  with pytest.raises(ValueError) as e:
    settings.check('SETTING', value, takes.__annotations__[name])

  assert str(e.value).startswith(f'SETTING must be {wanted}, got ')


def test_a_long_value_is_told_in_short():
  with pytest.raises(ValueError) as e:
    settings.check('SETTING', 'x' * 1000, int)

  assert len(str(e.value)) < 150
