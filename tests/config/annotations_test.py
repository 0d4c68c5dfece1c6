# SPDX-License-Identifier: Apache-2.0
"""Values of settings that the annotation of the parameter excludes."""

import inspect
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import optax
import pytest

from gkd_jax.config import annotations

T = TypeVar('T')


def ours(
  count: int,
  rate: float | None,
  flag: 'bool',
  later: 'Callable[[int], Mapping[str, float]] | None',
  lengths: Mapping[str, int],
  names: Sequence[str],
  words: list[str],
  table: dict[str, float],
):
  """Has a parameter of each kind that is known."""


def theirs(
  untyped,
  anything: Any,
  whatever: Any | None,
  way: Literal['a', 'b'],
  path: pathlib.Path,
  generic: T,
  several: Iterable[str],
  text: 'Optional[int]',  # noqa: F821, UP045
  dotted: 'typing.Sequence[str]',  # noqa: F821
  thing: object,
  mixed: float | Literal['auto'],
):
  """Has parameters as users may write them."""


def check(function, name, value):
  parameter = inspect.signature(function).parameters[name]
  annotations.check('SETTING', value, parameter.annotation)


@pytest.mark.parametrize(
  'name, value',
  [
    ('count', 3),
    ('rate', 3),
    ('rate', 0.5),
    ('rate', None),
    ('flag', False),
    ('later', None),
    ('later', ours),
    ('lengths', {'inputs': 8}),
    ('names', ('a', 'b')),
    ('names', ['a']),
    ('words', ['a']),
    ('table', {1: 0.1}),
  ],
)
def test_what_an_annotation_allows_is_accepted(name, value):
  check(ours, name, value)


@pytest.mark.parametrize('name', inspect.signature(theirs).parameters)
def test_where_a_type_is_not_known_all_is_accepted(name):
  check(theirs, name, 1 + 2j)


@pytest.mark.parametrize(
  'function, name, value',
  [
    (optax.adamw, 'mu_dtype', 'bfloat16'),
    (optax.adamw, 'mask', {'decoder': True}),
    (optax.adamw, 'weight_decay', 0.1),
    (optax.adamw, 'learning_rate', optax.constant_schedule),
    (optax.adafactor, 'dtype_momentum', 'bfloat16'),
    (optax.adafactor, 'clipping_threshold', None),
    (optax.piecewise_constant_schedule, 'boundaries_and_scales', {1: 0.1}),
  ],
)
def test_what_optax_takes_is_accepted(function, name, value):
  check(function, name, value)


@pytest.mark.parametrize(
  'name, value, wanted',
  [
    ('count', True, 'a whole number'),
    ('count', 3.0, 'a whole number'),
    ('count', None, 'a whole number'),
    ('count', 2**31, 'from -2147483647 to 2147483647'),
    ('rate', float('nan'), 'a finite number or None'),
    ('rate', 10**400, 'a finite number or None'),
    ('rate', '0.5', 'a finite number or None'),
    ('flag', 1, 'True or False'),
    ('later', 0.5, 'a function (@module.name) or None'),
    ('lengths', [8], '{name: value}'),
    ('names', 'a', 'a list'),
    ('table', [8], '{name: value}'),
  ],
)
def test_what_it_does_not_is_refused_by_the_name_of_the_setting(
  name, value, wanted
):
  with pytest.raises(ValueError) as e:
    check(ours, name, value)

  assert str(e.value).startswith(f'SETTING must be {wanted}, got ')


@pytest.mark.parametrize('value', ['x', True, 1 + 2j, [0.1]])
def test_a_number_that_optax_takes_is_one(value):
  with pytest.raises(ValueError, match='SETTING must be a finite number, got'):
    check(optax.constant_schedule, 'value', value)


def test_a_long_value_is_told_in_short():
  with pytest.raises(ValueError) as e:
    check(ours, 'count', 'x' * 1000)

  assert len(str(e.value)) < 150
