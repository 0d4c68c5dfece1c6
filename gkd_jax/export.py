# SPDX-License-Identifier: Apache-2.0
"""Writes a model in the format of the system that will serve it."""

import jax
from etils import epath

from gkd_jax import metrics as metrics_lib
from gkd_jax import partitioning, pretrained
from gkd_jax.interop import huggingface, t5x
from gkd_jax.model import T5, abstract_params

_FORMATS = ('huggingface', 't5x')


def export(
  checkpoint_path: str,
  export_format: str,
  output_dir: str,
  dtype: str = 'float32',
) -> None:
  """Writes a checkpoint's model for Hugging Face `transformers` or for T5X.

  Args:
    checkpoint_path: see `pretrained.open_checkpoint`.
    export_format: 'huggingface': a folder with config.json and safetensors,
      and the tokenizer's files where the model came with them. 't5x': a
      `checkpoint_<step>` folder is made in `output_dir`.
    output_dir: must not be there, or be empty.
    dtype: of the parameters, 'float32' or 'bfloat16'.

  Raises:
    ValueError: an unknown format or dtype, no checkpoint, or a full folder.
  """
  if export_format not in _FORMATS:
    raise ValueError(
      f'EXPORT_FORMAT must be one of {", ".join(_FORMATS)}, got '
      f'{export_format!r}.'
    )
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(
      f"EXPORT_DTYPE must be 'float32' or 'bfloat16', got {dtype!r}."
    )
  folder = epath.Path(output_dir)
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(
      f'OUTPUT_DIR {output_dir} is not empty. Nothing is overwritten: choose '
      'another.'
    )
  source = pretrained.open_checkpoint(checkpoint_path)
  metrics_lib.say(f'Exporting {source}')
  abstract = abstract_params(T5(source.config), partitioning.make_mesh())
  params = {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in jax.tree_util.tree_leaves_with_path(
      source.load(abstract, None)
    )
  }
  partial = folder.parent / f'{folder.name}.partial'
  if partial.exists():
    partial.rmtree()  # of an export that was interrupted
  partial.mkdir(parents=True)
  if export_format == 'huggingface':
    huggingface.save(
      partial,
      source.config,
      params,
      dtype=dtype,
      source=pretrained.side_files(source.folder),
    )
  else:
    digits = source.folder.name.rpartition('_')[2]
    step = int(digits) if digits.isdigit() else 0
    t5x.save(partial, source.config, params, step=step, dtype=dtype)
  if folder.exists():
    folder.rmdir()
  partial.rename(folder)
  metrics_lib.say(f'Written: {folder}')
