# SPDX-License-Identifier: Apache-2.0
"""Writes t5x_fixtures/*.tar.xz with T5X's own network and checkpointers.

Needs an importable t5x:
python -m tests.checkpoints.formats.make_t5x_fixtures. The numbers follow
from the parameters' names, see `numbers`, so tests need no second copy.
"""

import pathlib
import tarfile
import tempfile
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / 't5x_fixtures'
SHAPE = {
  'vocab_size': 24,
  'emb_dim': 8,
  'num_heads': 2,
  'head_dim': 3,
  'mlp_dim': 10,
  'num_encoder_layers': 3,
  'num_decoder_layers': 2,
}
V1_0 = {'mlp_activations': ('relu',), 'logits_via_embedding': True}
V1_1 = {'mlp_activations': ('gelu', 'linear'), 'logits_via_embedding': False}
STEP = 7


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Returns numbers, different for each parameter, and exact in bfloat16."""
  size = int(np.prod(shape))
  start = zlib.crc32(name.encode()) % 251
  return np.float32(((np.arange(size) * 7 + start) % 251) - 125).reshape(
    shape
  ) / np.float32(64)


def flat(tree) -> dict[str, np.ndarray]:
  """{'encoder/layers_0/mlp/wo/kernel': array} of a tree of parameters."""
  import jax

  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def main() -> None:
  FOLDER.mkdir(exist_ok=True)
  for name, state, write in (
    ('legacy_v1_1', train_state(V1_1), write_legacy),
    ('legacy_v1_0', train_state(V1_0), write_legacy),
    ('legacy_bfloat16', train_state(V1_1), write_bfloat16),
    ('legacy_inference', train_state(V1_1, train=False), write_legacy),
    ('scanned', train_state(V1_1, scanned=True), write_legacy),
    ('orbax', train_state(V1_1), write_orbax),
    ('orbax_without_ocdbt', train_state(V1_1), write_orbax_without_ocdbt),
  ):
    with tempfile.TemporaryDirectory() as folder:
      write(state, folder)
      with tarfile.open(FOLDER / f'{name}.tar.xz', 'w:xz') as tar:
        step = f'checkpoint_{STEP}'
        tar.add(pathlib.Path(folder) / step, step, filter=_without_owner)


def transformer(*, scanned: bool = False, **changes):
  """T5X's network; scanned: that of scalable_t5."""
  from t5x.examples.scalable_t5 import network as scalable
  from t5x.examples.t5 import network

  module = scalable if scanned else network
  return module.Transformer(
    module.T5Config(**(SHAPE | {'dropout_rate': 0.0} | changes))
  )


def train_state(
  version, *, train: bool = True, scanned: bool = False, **kwargs
):
  """Returns a state with `numbers` as parameters, after optimizer steps."""
  import jax
  from flax import core, traverse_util
  from t5x import adafactor, train_state

  ones = np.ones((1, 2), np.int32)
  module = transformer(scanned=scanned, **version, **kwargs)
  variables = core.freeze(
    jax.eval_shape(
      lambda: module.init(
        jax.random.key(0), ones, ones, ones, enable_dropout=False
      )
    )
  )
  params = {
    key: jax.numpy.asarray(numbers('/'.join(key), value.shape))
    for key, value in traverse_util.flatten_dict(
      core.unfreeze(variables['params'])
    ).items()
  }
  variables = variables.copy(
    {'params': core.freeze(traverse_util.unflatten_dict(params))}
  )
  if not train:
    return train_state.InferenceState.create(variables).replace_step(
      jax.numpy.int32(STEP)
    )
  optimizer = adafactor.Adafactor(
    logical_factor_rules=adafactor.standard_logical_factor_rules()
  )
  state = train_state.FlaxOptimTrainState.create(optimizer, variables)
  return state.replace_step(jax.numpy.int32(STEP))


def partitioner():
  from t5x import partitioning

  return partitioning.PjitPartitioner(num_partitions=1)


def write_legacy(state, folder, **kwargs) -> None:
  from t5x import checkpoints

  checkpoints.Checkpointer(state, partitioner(), folder, **kwargs).save(state)


def write_bfloat16(state, folder) -> None:
  import jax.numpy as jnp

  write_legacy(state, folder, save_dtype=jnp.bfloat16)


def write_orbax(state, folder) -> None:
  """Saves as T5X does with use_orbax, its default."""
  import jax.numpy as jnp
  from t5x import checkpoints

  manager = checkpoints.OrbaxCheckpointManagerInterface(
    folder, state, partitioner(), save_dtype=jnp.float32
  )
  manager.save(state)
  manager.close()


def write_orbax_without_ocdbt(state, folder) -> None:
  """Saves as T5X did before Orbax wrote small arrays into one file."""
  import orbax.checkpoint as ocp

  checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
  checkpointer.save(
    pathlib.Path(folder) / f'checkpoint_{STEP}' / 'state', state.state_dict()
  )


def _without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
  info.uid = info.gid = info.mtime = 0
  info.uname = info.gname = ''
  return info


if __name__ == '__main__':
  main()
