# SPDX-License-Identifier: Apache-2.0
"""Folders as finished runs leave them, without training anything."""

import json
import pathlib
import pprint

# Of gin/runs/train.gin and gin/methods/, as far as they matter here.
MACROS = {
  'BEST_METRIC': 'greedy/wer',
  'BEST_MODE': 'min',
  'EMB_DIM': 16,
  'EVAL_PERIOD': 250,
  'INITIAL_CHECKPOINT_PATH': None,
  'LEARNING_RATE': 0.01,
  'LIKELIHOOD_WEIGHT': 0.0,
  'MIXTURE_OR_TASK_NAME': 'cmudict_g2p',
  'RANDOM_SEED': 0,
  'TASK_FEATURE_LENGTHS': {'inputs': 16, 'targets': 16},
  'TEACHER_CHECKPOINT_PATH': None,
  'TRAIN_STEPS': 1000,
}
SFT = {
  'POLICY': '@policies.dataset()',
  'DIVERGENCE_WEIGHT': 0.0,
  'LIKELIHOOD_WEIGHT': 1.0,
}


def gkd(fraction: float, divergence: str = 'forward_kl', beta=None) -> dict:
  """The macros of gin/methods/gkd.gin."""
  macros = {
    'POLICY': '@policies.mixture()',
    'STUDENT_DATA_FRACTION': fraction,
    'MIXTURE_PER': 'batch',
    'DIVERGENCE': f'@divergences.{divergence}',
    'DIVERGENCE_WEIGHT': 1.0,
  }
  return macros if beta is None else macros | {'BETA': beta}


def config(**macros) -> str:
  """A config.gin, formatted as gin does: see gin.config.config_str."""
  lines = ['from gkd_jax import experiment', '', '# Macros:', f'# {"=" * 78}']
  for name, value in sorted(macros.items()):
    reference = isinstance(value, str) and value[:1] in ('@', '%')
    text = value if reference else pprint.pformat(value, width=76)
    if '\n' in text or len(name + text) > 80:
      text = '\\\n    ' + text.replace('\n', '\n    ')
    lines.append(f'{name} = {text}')
  lines += ['', '# Parameters for experiment.Schedule:', f'# {"=" * 78}']
  lines += ['experiment.Schedule.seed = %RANDOM_SEED', '# None.', '']
  return '\n'.join(lines)


def write(
  folder: pathlib.Path,
  values: dict | None = None,
  curve: dict | None = None,
  split: str = 'test',
  samples: dict | None = None,
  lines: list | None = None,
  **macros,
) -> pathlib.Path:
  """Leaves what a run leaves; without `values` one that is not done.

  Args:
    folder: of the run.
    values: {metric: number} of eval_<split>.json.
    curve: {step: greedy/wer on the validation split}.
    split: that was evaluated at the end.
    samples: of samples_<split>.json.
    lines: more of metrics.jsonl.
    **macros: of config.gin, over MACROS.
  """
  folder.mkdir(parents=True)
  macros = MACROS | {'MODEL_DIR': str(folder)} | macros
  macros = {
    name: str(value) if isinstance(value, pathlib.Path) else value
    for name, value in macros.items()
  }
  (folder / 'config.gin').write_text(config(**macros))
  command = ['gkd_jax/main.py', '--gin_file=a.gin', f'--gin.MODEL_DIR={folder}']
  (folder / 'versions.json').write_text(json.dumps({'command': command}))
  measured = [
    {'step': step, 'validation/greedy/wer': value}
    for step, value in (curve or {}).items()
  ]
  (folder / 'metrics.jsonl').write_text(
    ''.join(json.dumps(line) + '\n' for line in (lines or []) + measured)
  )
  if values is not None:
    evaluation(
      folder, {'step': 1000, 'train_seconds': 9.5, **values}, split, samples
    )
  return folder


def evaluation(folder, values, split='test', samples=None) -> None:
  """Leaves what an evaluation leaves."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f'eval_{split}.json').write_text(json.dumps(values))
  if samples is not None:
    (folder / f'samples_{split}.json').write_text(json.dumps(samples))


def token(text, kl=0.1, id=5, teacher_text=None, teacher_id=None) -> dict:
  """An entry of a sample's tokens; the teacher agrees unless it is said."""
  return {
    'text': text,
    'id': id,
    'kl': kl,
    'student_probability': 0.625,
    'teacher_probability': 0.125,
    'teacher_text': text if teacher_text is None else teacher_text,
    'teacher_id': id if teacher_id is None else teacher_id,
    'teacher_id_probability': 0.75,
  }


def samples(*examples, decoding='greedy') -> dict:
  """What samples_<split>.json holds; examples are (input, tokens)."""
  return {
    'decoding': decoding,
    'eos_id': 1,
    'examples': [
      {
        'input': x,
        'reference': f'ref of {x}',
        'teacher': f'teacher on {x}',
        'student': ''.join(token['text'] for token in tokens),
        'tokens': tokens,
      }
      for x, tokens in examples
    ],
  }


def study(top: pathlib.Path, wer: dict, **shared) -> pathlib.Path:
  """A teacher, and for each seed an initial student and methods from it.

  Args:
    top: folder of all; seed_<seed>/<name> are the runs.
    wer: {'teacher': value, name: ({macro: value}, [value by seed])}; the name
      'initial' is the initial student.
    **shared: macros of all methods.
  """
  teacher = write(
    top / 'teacher', {'greedy/wer': wer['teacher']}, **SFT, EMB_DIM=192
  )
  for name, (macros, by_seed) in list(wer.items())[1:]:
    for seed, value in enumerate(by_seed):
      values = {'greedy/wer': value, 'sampled/wer': value + 10}
      origin = {}
      if name != 'initial':
        values['on_student_outputs/reverse_kl'] = value / 100
        origin = {
          'INITIAL_CHECKPOINT_PATH': top / f'seed_{seed}' / 'initial',
          'TEACHER_CHECKPOINT_PATH': teacher,
          **shared,
        }
      write(
        top / f'seed_{seed}' / name,
        values,
        {500: value + 5, 1000: value + 1},
        RANDOM_SEED=seed,
        **origin | macros,
      )
  return top
