# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import math

import pytest

from gkd_jax.models import interface, registry
from gkd_jax.models.params import param_shapes
from tests import tiny


@pytest.mark.parametrize(
  'size, number',
  [
    ('t5_1_0_small', 60_506_624),
    ('t5_1_0_base', 222_903_552),
    ('t5_1_0_large', 737_668_096),
    ('t5_1_0_3b', 2_851_598_336),
    ('t5_1_0_11b', 11_307_321_344),
    ('t5_1_1_small', 76_961_152),
    ('t5_1_1_base', 247_577_856),
    ('t5_1_1_large', 783_150_080),
    ('t5_1_1_xl', 2_849_757_184),
    ('t5_1_1_xxl', 11_135_332_352),
    ('mt5_small', 300_176_768),
    ('mt5_base', 582_401_280),
    ('mt5_large', 1_229_581_312),
    ('mt5_xl', 3_742_619_648),
    ('mt5_xxl', 12_921_057_280),
    ('ul2', 19_459_613_696),
    # The text model; those of T5Gemma 1 have two embeddings.
    ('t5gemma_s_s', 312_517_632),
    ('t5gemma_b_b', 591_490_560),
    ('t5gemma_l_l', 1_241_761_792),
    ('t5gemma_ml_ml', 2_200_345_344),
    ('t5gemma_xl_xl', 3_766_980_608),
    ('t5gemma_2b_2b', 5_596_853_760),
    ('t5gemma_9b_2b', 12_292_375_296),
    ('t5gemma_9b_9b', 20_333_401_088),
    ('t5gemma_2_270m_270m', 368_424_832),
    ('t5gemma_2_1b_1b', 1_697_783_168),
    ('t5gemma_2_4b_4b', 7_089_112_576),
  ],
)
def test_published_sizes_have_the_published_number_of_parameters(size, number):
  config = registry.published(size)
  one_layer = registry.make_model(
    dataclasses.replace(config, num_encoder_layers=1, num_decoder_layers=1)
  )

  shapes = param_shapes(one_layer)

  # Layers are alike: to trace all of them takes long.
  depths = {
    'encoder/layers_0': config.num_encoder_layers,
    'decoder/layers_0': config.num_decoder_layers,
  }
  counted = sum(
    math.prod(shape) * depths.get('/'.join(name.split('/')[:2]), 1)
    for name, shape in shapes.items()
  )
  assert counted == number


def test_published_refuses_unknown_sizes():
  with pytest.raises(ValueError, match="'t5_1_1_tiny'.*t5_1_1_small"):
    registry.published('t5_1_1_tiny')


def test_published_changes_the_fields_named_and_no_other():
  config = registry.published('t5_1_1_small', dropout_rate=0.1)

  assert config.dropout_rate == 0.1
  assert config.mlp_dim == registry.SIZES['t5_1_1_small'].mlp_dim
  assert registry.SIZES['t5_1_1_small'].dropout_rate == 0.0


@pytest.mark.parametrize('family', registry.FAMILIES)
def test_a_family_implements_the_protocol(family):
  classes = registry.FAMILIES[family]
  methods = {
    name
    for name, value in vars(interface.Model).items()
    if callable(value) and (not name.startswith('_') or name == '__call__')
  }
  fields = {field.name for field in dataclasses.fields(classes.config)}

  assert all(callable(getattr(classes.model, name)) for name in methods)
  assert all(
    name in fields or hasattr(classes.config, name)
    for name in interface.ModelConfig.__annotations__
  )
  assert {*interface.EXECUTION_FIELDS, *interface.ID_FIELDS} <= fields
  assert classes.config.family == family


@pytest.mark.parametrize(
  'config',
  [
    tiny.config(eos_id=2, mlp_activations=('relu',)),
    tiny.t5gemma_config(1, never_written=(4, 5)),
  ],
  ids=lambda config: config.family,
)
def test_a_config_comes_back_from_json(config):
  values = json.loads(json.dumps(registry.config_to_json(config)))

  assert registry.config_from_json(values) == config


def test_an_unknown_family_is_refused():
  values = registry.config_to_json(tiny.config()) | {'family': 't6'}

  with pytest.raises(ValueError, match="'t6'. There are: t5"):
    registry.config_from_json(values)


def test_a_shape_that_is_not_published_is_described():
  assert registry.describe(registry.SIZES['t5_1_1_xl']) == 't5_1_1_xl'
  assert registry.describe(tiny.config()) == (
    'T5 1.1 of width 16 with 1 + 1 layers'
  )
  assert registry.describe(tiny.t5gemma_config(1)) == (
    'T5Gemma 1 of width 12 + 16 with 2 + 2 layers'
  )
