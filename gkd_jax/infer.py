# SPDX-License-Identifier: Apache-2.0
"""Lets a model write outputs for a split, into a JSON lines file."""

import json
import pathlib

from gkd_jax import data, evaluate, partitioning, pretrained, sampler
from gkd_jax import metrics as metrics_lib


def infer(
  checkpoint_path: str,
  output_dir: str,
  dataset: data.DatasetConfig,
  decoding: evaluate.Decoding = sampler.GREEDY,
  seed: int = 0,
) -> None:
  """Writes `<output_dir>/predictions_<split>.jsonl`, a line per example.

  A line is {"inputs", "targets", "prediction"}; the file beside it, ending in
  `.json`, says which checkpoint wrote it, and how.

  Args:
    checkpoint_path: see `pretrained.open_checkpoint`.
    output_dir: made if it is not there.
    dataset: task and split.
    decoding: a SamplerConfig or a BeamConfig.
    seed: of sampling.
  """
  path = pathlib.Path(output_dir) / f'predictions_{dataset.split}.jsonl'
  if path.exists():
    raise ValueError(
      f'{path} is there already, and would be lost. Choose another '
      'INFER_OUTPUT_DIR, or remove it.'
    )
  split = data.EvalDataset(dataset)
  mesh = partitioning.make_mesh()
  model, params, folder = pretrained.load_model(
    checkpoint_path,
    data.describe_vocabulary(split.vocabulary),
    split.vocabulary.vocab_size,
    mesh,
  )
  write = evaluate.make_write(
    model,
    decoding,
    max_decode_len=dataset.task_feature_lengths['targets'],
    num_ids=split.vocabulary.vocab_size,
    seed=seed,
    mesh=mesh,
  )
  predictions = split.decode(
    split.predict(lambda rows, batch: write(params, rows, batch))
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.partial')
  with partial.open('w') as file:
    for example, prediction in zip(split.examples(), predictions, strict=True):
      file.write(
        json.dumps({**example, 'prediction': prediction}, ensure_ascii=False)
        + '\n'
      )
  path.with_suffix('.json').write_text(
    json.dumps(
      {
        'checkpoint': str(folder),
        'task': dataset.mixture_or_task_name,
        'split': dataset.split,
        'num_examples': len(split),
        'decoding': repr(decoding),
        'seed': seed,
      },
      indent=2,
    )
    + '\n'
  )
  partial.rename(path)
  metrics_lib.say(f'{len(split):,} predictions written: {path}')
