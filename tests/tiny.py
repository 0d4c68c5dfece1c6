# SPDX-License-Identifier: Apache-2.0
"""Tiny models and batches: quick to compile, and no two sizes alike."""

import dataclasses
import functools
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax.batch import Batch, SpecialIds
from gkd_jax.distill.methods import Method
from gkd_jax.models.interface import Model
from gkd_jax.models.params import init_params
from gkd_jax.models.t5 import T5, T5Config
from gkd_jax.models.t5gemma import T5Gemma, T5GemmaConfig

VOCAB_SIZE = 24
NUM_IDS = 19  # of the tokenizer, so to speak; the rest fills the embedding up


def special_ids(num_ids: int = NUM_IDS) -> SpecialIds:
  """T5's, with a vocabulary of so many ids."""
  return SpecialIds(0, start=0, eos=1, never_written=(0,), num_ids=num_ids)


IDS = special_ids()


def with_method(settings: dict) -> dict:
  """Returns settings of a run or a step, those of the method in a Method."""
  names = {field.name for field in dataclasses.fields(Method)} - {'teacher'}
  parts = {k: v for k, v in settings.items() if k in names}
  rest = {k: v for k, v in settings.items() if k not in names}
  return {'method': Method(**parts), **rest}


def config(version='1.1', **changes) -> T5Config:
  """A T5 with num_heads * head_dim != emb_dim, to tell the two apart."""
  shape = {
    'vocab_size': VOCAB_SIZE,
    'emb_dim': 16,
    'num_heads': 2,
    'head_dim': 6,
    'mlp_dim': 20,
    'num_encoder_layers': 1,
    'num_decoder_layers': 1,
    'mlp_activations': {'1.0': ('relu',), '1.1': ('gelu', 'linear')}[version],
    'logits_via_embedding': version == '1.0',
  }
  return T5Config(**(shape | changes))


def t5gemma_config(version: int, **changes) -> T5GemmaConfig:
  """A T5Gemma whose window is shorter than most rows; see `config`.

  In version 1 encoder and decoder differ in every size.
  """
  shape = {
    'vocab_size': VOCAB_SIZE,
    'emb_dim': 16,
    'num_heads': 4,
    'num_kv_heads': 2,
    'head_dim': 6,
    'mlp_dim': 20,
    'num_encoder_layers': 2,
    'num_decoder_layers': 2,
    'window': 3,
    'full_period': 2,
    'eoi_id': 18,
  }
  own = {
    1: {
      'encoder_emb_dim': 12,
      'encoder_num_heads': 2,
      'encoder_num_kv_heads': 1,
      'encoder_mlp_dim': 14,
      'attention_soft_cap': 2.0,
      'final_soft_cap': 3.0,
    },
    2: {'rope_theta': 1e6, 'rope_factor': 8.0},
  }
  return T5GemmaConfig(version=version, **(shape | own[version] | changes))


def params(model: Model, seed: int):
  """Random parameters of the usual size, no norm's scale left at 1.

  Made with NumPy: to initialise a model would take longer than most tests do.
  """
  rng = np.random.default_rng(seed)
  is_t5 = model.config.family == 't5'

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape)
    kind = path[-1].key
    if kind == 'scale':
      return jnp.float32((1.0 if is_t5 else 0.0) + 0.2 * noise)
    if kind == 'kernel':
      noise /= leaf.shape[0] ** 0.5
    if kind == 'embedding' and not is_t5:
      noise /= leaf.shape[1] ** 0.5
    return jnp.float32(noise)

  return jax.tree_util.tree_map_with_path(draw, _shapes(model))


@functools.cache
def _shapes(model: Model):
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def model_and_params(seed: int, version='1.1', **changes):
  model = T5(config(version, **changes))
  return model, params(model, seed)


def t5gemma_and_params(seed: int, version: int, **changes):
  model = T5Gemma(t5gemma_config(version, **changes))
  return model, params(model, seed)


# Programs that compute the same in another order, or on a CPU that multiplies
# in another order, differ by rounding: a sum of 24 products by about
# sqrt(24) * 2**-24 of its largest value, 5 layers and their gradients by 10
# times that: 3e-6. The rest is room for sums that cancel.
ROUNDING = 2e-5


def assert_equal_but_for_rounding(got, want) -> None:
  """Compares trees of arrays that two float32 programs of tiny models return.

  Each array may be off by ROUNDING of its largest value. The bound has a floor,
  because gradients are read as differences of parameters near 1.
  """

  def check(a, b):
    scale = max(float(np.max(np.abs(b), initial=0.0)), 0.05)
    np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING * scale)

  jax.tree.map(check, got, want)


# For what a test reads from the optimised program; see conftest.
jit_as_users_do = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 3,
    'xla_cpu_use_fusion_emitters': True,
  },
)


@functools.partial(jax.jit, static_argnums=0)
def logits(model: Model, params, inputs, targets):
  """Teacher-forced logits [B, T, V]."""
  return model.apply({'params': params}, inputs, targets)


def tokens(seed: int, lengths, max_len: int) -> np.ndarray:
  """Random ids [len(lengths), max_len], EOS last, pad after it."""
  rng = np.random.default_rng(seed)
  rows = np.zeros((len(lengths), max_len), np.int32)
  for row, length in zip(rows, lengths, strict=True):
    row[:length] = rng.integers(2, NUM_IDS, length)
    row[length - 1] = 1
  return rows


def batch(
  seed: int = 0,
  input_lengths=(7, 3, 5, 6),
  target_lengths=(5, 2, 6, 4),
  max_input_len: int = 7,
  max_target_len: int = 6,
) -> Batch:
  """A batch of rows of different lengths."""
  targets = tokens(seed + 1, target_lengths, max_target_len)
  return Batch(
    jnp.asarray(tokens(seed, input_lengths, max_input_len)),
    jnp.asarray(targets),
    jnp.float32(targets != 0),
  )


class NoData:
  """A fake iterator that is always at the same place, to save and restore."""

  def save(self, directory):
    (pathlib.Path(directory) / 'nothing').touch()

  def restore(self, directory):
    assert (pathlib.Path(directory) / 'nothing').exists()


# A process that calls functions by name, and returns their results.
SERVE = """
import importlib, os, pickle, sys
results = os.fdopen(os.dup(1), 'wb')
os.dup2(2, 1)  # what is printed is no result
while sys.stdin.buffer.peek(1):
  module, function, arguments = pickle.load(sys.stdin.buffer)
  result = getattr(importlib.import_module(module), function)(*arguments)
  pickle.dump(result, results)
  results.flush()
"""
_servers = {}


def environ_of_simulated_devices(num_devices: int) -> dict[str, str]:
  """The environment of a process that sees so many CPU devices."""
  flags = f'--xla_force_host_platform_device_count={num_devices}'
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flags}',
  }


def on_simulated_devices(
  num_devices: int, module: str, function: str, *arguments
):
  """Calls module.function() in a process that sees so many CPU devices.

  The number of devices is fixed when JAX starts, hence another process: one for
  all calls, until `stop_servers`.

  Returns:
    What the function returned.
  """
  if num_devices not in _servers:
    _servers[num_devices] = subprocess.Popen(
      [sys.executable, '-c', SERVE],
      cwd=pathlib.Path(__file__).parents[1],
      env=environ_of_simulated_devices(num_devices),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
  server = _servers[num_devices]
  pickle.dump((module, function, arguments), server.stdin)
  server.stdin.flush()
  try:
    return pickle.load(server.stdout)
  except EOFError as e:  # its traceback is on stderr
    del _servers[num_devices]
    raise RuntimeError(f'{module}.{function} failed') from e


def stop_servers() -> None:
  """Ends the processes of `on_simulated_devices`."""
  for server in _servers.values():
    server.communicate()
  _servers.clear()
