# SPDX-License-Identifier: Apache-2.0
"""Checks the type of a setting against the annotation of its parameter."""

import inspect
import math
import re
import types
import typing
from typing import Any

# Type in an annotation -> its description in error messages.
_DESCRIPTIONS = {
  'bool': 'True or False',
  'int': 'a whole number',
  'float': 'a finite number',
  'str': 'a text',
  'NoneType': 'None',
  'None': 'None',
  'Mapping': '{name: value}',
  'dict': '{name: value}',
  'Sequence': 'a list',
  'list': 'a list',
  'tuple': 'a list',
  'Callable': 'a function (@module.name)',
  'Policy': 'a policy, such as @policies.student()',
  'Teacher': 'a teacher, such as @teachers.checkpoint()',
  'Several': 'several teachers, such as @teachers.averaged()',
  'Divergence': 'a divergence, such as @divergences.forward_kl',
  'Credit': 'a credit, such as @credit.reinforce()',
  'Method': 'a method, such as @methods.Method()',
  'ModelConfig': 'the shape of a model, such as @t5.T5Config()',
  'DatasetConfig': 'examples, such as @eval/datasets.DatasetConfig()',
  'Objective': 'an objective, such as @objectives.Objective()',
  'SamplerConfig': 'a sampler, such as @sampler.SamplerConfig()',
  'BeamConfig': 'a beam search, such as @beam_search.BeamConfig()',
  'seqio.Vocabulary': 'a vocabulary, such as @seqio.ByteVocabulary()',
  'Reward': 'a reward, such as @rewards.exact_match()',
}
_LITERALS = (
  *(bool, int, float, complex, str, bytes),
  *(list, tuple, dict, set, type(None)),
)
# A gin file has no syntax for values of these types.
_ARRAYS = {'Array', 'ndarray', 'number'}
# Larger integers overflow JAX's int32.
_MAX_INT = 2**31 - 1


def check(setting: str, value: Any, annotation: Any) -> None:
  """Raises ValueError if a value does not have the type of its parameter.

  Args:
    setting: its name in gin.
    value: a literal; any other value is a reference to a function.
    annotation: of the parameter, from `inspect.signature`. If it has a type
      that this module does not handle, every value is accepted.
  """
  kinds = _kinds(annotation)
  if 'complex' in kinds:  # jax.typing.ArrayLike; in gin: a number
    kinds = [kind for kind in kinds if kind not in ('bool', 'int', 'complex')]
  kinds = [kind for kind in kinds if kind not in _ARRAYS]
  if not _DESCRIPTIONS.keys() >= {*kinds}:
    return
  if any(_is_of_kind(value, kind) for kind in kinds):
    return
  expected = dict.fromkeys(_DESCRIPTIONS[kind] for kind in kinds)
  if 'int' in kinds and type(value) is int:
    expected = [f'from {-_MAX_INT} to {_MAX_INT}']
  hint = ''
  if 'str' in kinds and isinstance(value, int | float | list | tuple | dict):
    hint = f' For a text put it in quotes: --gin.{setting}="\'{value}\'".'
  raise ValueError(
    f'{setting} must be {" or ".join(expected)}, got {_shortened(value)}.{hint}'
  )


def _kinds(annotation: Any) -> list[str]:
  """Returns the names of the types in an annotation."""
  if annotation in (inspect.Parameter.empty, Any):
    return ['Any']
  if isinstance(annotation, str):  # not evaluated, which could import modules
    while '[' in annotation:  # innermost brackets first
      annotation = re.sub(r'\[[^\[\]]*\]', '', annotation)
    return annotation.split(' | ')
  origin = typing.get_origin(annotation)
  if origin in (typing.Union, types.UnionType):
    return [k for part in typing.get_args(annotation) for k in _kinds(part)]
  name = getattr(origin or annotation, '__name__', 'Any')
  return [name.rsplit('.', 1)[-1]]


def _is_of_kind(value: Any, kind: str) -> bool:
  """Whether a value has the type that `kind` names."""
  if kind == 'int':
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and abs(value) <= _MAX_INT
  if kind == 'float':
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # An int may be too large for a float32.
    return is_number and abs(value) < 2**127 and math.isfinite(value)
  types_of = {
    'bool': bool,
    'str': str,
    'NoneType': type(None),
    'None': type(None),
    'Mapping': dict,
    'dict': dict,
    'Sequence': list | tuple,
    'list': list | tuple,
    'tuple': list | tuple,
  }
  if kind in types_of:
    return isinstance(value, types_of[kind])
  return kind == 'Callable' and not isinstance(value, _LITERALS)


def _shortened(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}...'
