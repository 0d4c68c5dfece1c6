# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation of encoder-decoders in JAX.

The names below are imported when they are first used (PEP 562), so that
`import gkd_jax` is quick. None of them imports TensorFlow. README.md has a
distillation step written with them.
"""

import importlib

# Name -> the module that has it; a module where both end alike.
_PLACES = {
  'load_model': 'gkd_jax.checkpoints.pretrained',
  'generate': 'gkd_jax.decoding.generation',
  'SamplerConfig': 'gkd_jax.decoding.sampler',
  'BeamConfig': 'gkd_jax.decoding.beam_search',
  'make_train_step': 'gkd_jax.distill.step',
  'init_state': 'gkd_jax.distill.state',
  'Frozen': 'gkd_jax.distill.state',
  'Method': 'gkd_jax.distill.methods',
  'Objective': 'gkd_jax.distill.objectives',
  'Batch': 'gkd_jax.batch',
  'SpecialIds': 'gkd_jax.batch',
  'divergences': 'gkd_jax.distill.divergences',
  'policies': 'gkd_jax.distill.policies',
  'teachers': 'gkd_jax.distill.teachers',
  'credit': 'gkd_jax.distill.credit',
}

__all__ = sorted(_PLACES)


def __getattr__(name):
  if name not in _PLACES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(_PLACES[name])
  value = module
  if _PLACES[name].rpartition('.')[2] != name:
    value = getattr(module, name)
  globals()[name] = value  # found at once from now on
  return value


def __dir__():
  return sorted({*globals(), *_PLACES})
