# SPDX-License-Identifier: Apache-2.0
"""The families of models. To add one, write its module and list it here.

The names of its arrays in checkpoint files are in a module of
`checkpoints/formats`, such as `t5_names`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from gkd_jax.models import t5, t5gemma
from gkd_jax.models.interface import (
  EXECUTION_FIELDS,
  ID_FIELDS,
  Model,
  ModelConfig,
)
from gkd_jax.parallel.partitioning import Placement


class Family(NamedTuple):
  """One kind of encoder-decoder.

  Attributes:
    config: class of its configs.
    model: class of its models, called as model(config, placement).
    sizes: published shapes, {name: config}; no two families share a name.
  """

  config: type[ModelConfig]
  model: type[Model]
  sizes: Mapping[str, ModelConfig]


FAMILIES: dict[str, Family] = {
  't5': Family(t5.T5Config, t5.T5, t5.SIZES),
  't5gemma': Family(t5gemma.T5GemmaConfig, t5gemma.T5Gemma, t5gemma.SIZES),
}
SIZES: dict[str, ModelConfig] = {
  name: config
  for family in FAMILIES.values()
  for name, config in family.sizes.items()
}


def make_model(
  config: ModelConfig, placement: Placement | None = None
) -> Model:
  """Returns the model of a config.

  Args:
    config: of a family that is listed here.
    placement: the sharding of its arrays; None: one device.
  """
  return FAMILIES[config.family].model(config, placement)


def make_config(family: str, **fields: Any) -> ModelConfig:
  """Returns a config of a family.

  Raises:
    ValueError: there is no such family, or a field is wrong.
  """
  if family not in FAMILIES:
    raise ValueError(
      f'No model family {family!r}. There are: {", ".join(FAMILIES)}.'
    )
  return FAMILIES[family].config(**fields)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
  """Returns a config as JSON values, for `config_from_json`."""
  return {'family': config.family, **dataclasses.asdict(config)}


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
  """Returns the config that `config_to_json` wrote.

  Raises:
    ValueError: its family is not known.
  """
  # Files written before there were several families have no 'family'.
  return make_config(**{'family': 't5', **values})


def published(size: str, **changes: Any) -> ModelConfig:
  """Returns a published size, with some fields changed.

  Args:
    size: a key of SIZES, e.g. 't5_1_1_small'.
    **changes: fields of the config, e.g. dropout_rate=0.1; None: as published.

  Raises:
    ValueError: there is no such size.
  """
  if size not in SIZES:
    raise ValueError(
      f'No model of size {size!r}. There are: {", ".join(SIZES)}.'
    )
  changes = {name: x for name, x in changes.items() if x is not None}
  return dataclasses.replace(SIZES[size], **changes)


def describe(config: ModelConfig) -> str:
  """Returns a short description of a shape: its published size, if any."""
  free = ('vocab_size', *EXECUTION_FIELDS, *ID_FIELDS)
  ignored = {name: getattr(config, name) for name in free}
  names = [
    name
    for name, size in SIZES.items()
    if size.family == config.family
    and dataclasses.replace(size, **ignored) == config
  ]
  # The vocabulary tells mT5 from T5 1.1.
  same = [n for n in names if SIZES[n].vocab_size == config.vocab_size]
  return (*same, *names, config.describe())[0]
