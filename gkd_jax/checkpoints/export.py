# SPDX-License-Identifier: Apache-2.0
"""Exports a model in the format of another system."""

from etils import epath

from gkd_jax.checkpoints import pretrained
from gkd_jax.checkpoints.formats import huggingface, t5x
from gkd_jax.models.params import abstract_params, named_params
from gkd_jax.models.registry import make_model
from gkd_jax.parallel import partitioning
from gkd_jax.runtime import console, files, paths, run_folder

_FORMATS = {'huggingface': huggingface, 't5x': t5x}


def export(
  checkpoint_path: str,
  export_format: str,
  output_dir: str,
  dtype: str | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a checkpoint's model for Hugging Face `transformers` or for T5X.

  Args:
    checkpoint_path: see `pretrained.open_checkpoint`.
    export_format: 'huggingface': a folder with config.json and safetensors,
      and the tokenizer's files where the model came with them. 't5x': a
      `checkpoint_<step>` folder is made in `output_dir`.
    output_dir: must not be there, or be empty.
    dtype: of the parameters, 'float32' or 'bfloat16'; None: as saved.
    overwrite: replace the files of an earlier export in `output_dir`.

  Raises:
    ValueError: an unknown format or dtype, no checkpoint, a full folder, or a
      model that the other system does not have.
  """
  if export_format not in _FORMATS:
    raise ValueError(
      f'EXPORT_FORMAT must be one of {", ".join(_FORMATS)}, got '
      f'{export_format!r}.'
    )
  pretrained.check_dtype('EXPORT_DTYPE', dtype)
  folder = epath.Path(
    output_dir
    if paths.is_remote(output_dir)
    else paths.resolve(output_dir, 'OUTPUT_DIR')
  )
  if str(folder).startswith('gs://') and export_format == 'huggingface':
    raise ValueError(
      f'OUTPUT_DIR {output_dir}: safetensors files are written to a local disk '
      'only. Copy them from there: gcloud storage cp -r.'
    )
  if folder.exists() and not folder.is_dir():
    raise ValueError(f'OUTPUT_DIR {output_dir} is a file, not a folder.')
  if folder.exists():
    files.check_free(folder.iterdir(), 'OUTPUT_DIR', overwrite)
  source = pretrained.open_checkpoint(checkpoint_path)
  module = _FORMATS[export_format]
  module.check_can_hold(source.config)
  if dtype is None:
    dtype = 'bfloat16' if source.dtype == 'bfloat16' else 'float32'
  console.log(f'Exporting {source}')
  on_host = partitioning.Placement(partitioning.cpu_mesh())
  abstract = abstract_params(make_model(source.config, on_host))
  params = named_params(source.load(abstract, None))
  partial = folder.parent / f'{folder.name}.partial'
  if partial.exists():
    partial.rmtree()  # of an export that was interrupted
  partial.mkdir(parents=True)
  if export_format == 'huggingface':
    beside = pretrained.side_files(source.folder)
    note = huggingface.save(
      partial, source.config, params, dtype=dtype, source=beside
    )
    tokenizer = huggingface.tokenizer_file_names(partial)
    if not tokenizer and 'ByteVocabulary' in (source.vocabulary or ''):
      huggingface.write_byte_tokenizer(partial, source.config.vocab_size)
      tokenizer = huggingface.tokenizer_file_names(partial)
    console.log(
      f'Tokenizer: {", ".join(tokenizer)}'
      if tokenizer
      else 'No tokenizer files: the checkpoint came without.'
    )
    if note:
      console.log(f'Note: {note}')
  else:
    t5x.save(
      partial,
      source.config,
      params,
      step=run_folder.step_of(source.folder) or 0,
      dtype=dtype,
    )
  _move(partial, folder)
  console.log(f'Written: {folder}')


def _move(partial: epath.Path, folder: epath.Path) -> None:
  """Gives an export its name; replaces the files of an earlier one there."""
  if not folder.exists():
    partial.rename(folder)
    return
  new = {path.name for path in partial.iterdir()}
  for old in list(folder.iterdir()):
    if old.name not in new and not huggingface.is_weights(old.name):
      continue
    if old.is_dir():
      old.rmtree()
    else:
      old.unlink()
  for path in list(partial.iterdir()):
    path.rename(folder / path.name)
  partial.rmdir()
