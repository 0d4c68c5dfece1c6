# SPDX-License-Identifier: Apache-2.0
"""Evaluates a student, alone and against its teacher.

Metrics: the task's metrics on generated outputs (greedy, sampled, beam search),
their mean reward if there is a reward, and the divergences between student and
teacher on the dataset's outputs and on the student's own.
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gkd_jax import build
from gkd_jax.batch import Batch
from gkd_jax.data import datasets, iterators, tokenization
from gkd_jax.decoding import sampler
from gkd_jax.distill import divergences, grading, rewards, teachers
from gkd_jax.evaluation import agreement, diversity, drafting, programs
from gkd_jax.experiment import (
  Draft,
  RewardModel,
  Teacher,
  check_as_draft,
  check_decodings,
  check_drafted,
  check_paths,
  check_reward_model,
  check_teachers,
  setting_of,
)
from gkd_jax.models.interface import Model
from gkd_jax.parallel import partitioning
from gkd_jax.runtime import console, files, paths, run_folder

_RESULTS = ('eval', 'samples')  # names of files: <name>_<split>.json
_NO_REWARD_MODEL = RewardModel()
_NO_DRAFT = Draft()
_ONE_TEACHER = teachers.checkpoint()
_NUM_SHOWN = 16  # examples of samples_<split>.json


def task_metrics(
  writes: Mapping[str, Callable[..., np.ndarray]],
  params: programs.Params,
  dataset: iterators.EvalDataset,
  *,
  self_bleu_tokenize: str = diversity.WORDS,
  mean_reward: programs.MeanReward | None = None,
) -> tuple[dict[str, float], dict[str, list[str]], dict[str, Any]]:
  """Generates outputs with each decoding, and applies the task's metrics.

  Args:
    writes: {decoding: (params, row numbers [B], batch) -> tokens [B, n, T]}.
    params: of the model.
    dataset: split with its metrics.
    self_bleu_tokenize: see `diversity.self_bleu`.
    mean_reward: adds the mean reward, as '<decoding>/reward'.

  Returns:
    {'<decoding>/<metric>': value}, means over the outputs of each input, with
    '<decoding>/self_bleu' if there are several outputs per input; {decoding:
    [text of the first output of each input]}; and {'<decoding>/<name>': note},
    non-numeric results of the task's metrics.
  """
  values, texts, notes = {}, {}, {}
  for decoding, write in writes.items():
    written = dataset.predict(functools.partial(write, params)).swapaxes(0, 1)
    drawn = [dataset.decode(tokens) for tokens in written]
    texts[decoding] = drawn[0]
    measured = [dataset.metrics_and_notes(tokens) for tokens in written]
    if mean_reward is not None:
      for (numbers, _), tokens in zip(measured, written, strict=True):
        numbers['reward'] = mean_reward(dataset, tokens)
    for name in measured[0][0]:
      values[f'{decoding}/{name}'] = statistics.fmean(
        numbers[name] for numbers, _ in measured
      )
    for name, note in measured[0][1].items():
      notes[f'{decoding}/{name}'] = note
    if len(drawn) > 1:
      values[f'{decoding}/self_bleu'] = diversity.self_bleu(
        zip(*drawn, strict=True), self_bleu_tokenize
      )
  return values, texts, notes


class Samples(NamedTuple):
  """The outputs of decodings that sample.

  Attributes:
    num: outputs per input. Metrics are means over them, and 'self_bleu' is
      added if there are several.
    self_bleu_tokenize: see `diversity.self_bleu`.
  """

  num: int = 1
  self_bleu_tokenize: str = diversity.WORDS


_ONE_SAMPLE = Samples()


class Evaluation:
  """All measurements on one split; compiled at the first call.

  Attributes:
    notes: non-numeric results of the task's metrics for the student at the last
      call, {'<decoding>/<name>': text or mapping}.
  """

  def __init__(
    self,
    config: datasets.DatasetConfig,
    student: Model,
    teacher: build.Model,
    decodings: Mapping[str, programs.Decoding],
    *,
    seed: int,
    mesh: Mesh,
    samples: Samples = _ONE_SAMPLE,
    drafts: drafting.Drafts = drafting.NO_DRAFTS,
    mean_reward: programs.MeanReward | None = None,
    divergence: divergences.Divergence | None = None,
    grades: teachers.Teacher | teachers.Several = _ONE_TEACHER,
    before_batch: Callable[[], None] = lambda: None,
  ):
    """Reads the split.

    Args:
      config: task and split.
      student: the model to evaluate.
      teacher: adds its task metrics and the divergences, of several teachers
        those of each; `build.NO_MODEL`: no teacher.
      decodings: {name: SamplerConfig or BeamConfig}.
      seed: of sampling.
      mesh: of devices.
      samples: outputs per input of each decoding that samples.
      drafts: the draft of the student's outputs adds what it saved, and the
        student as the teacher's draft its acceptance.
      mean_reward: adds the mean reward of the outputs.
      divergence: the method's own, measured beside the standard ones.
      grades: how `teacher` is used, see `teachers.without_student`.
      before_batch: called before each batch is read; it may raise an exception
        to stop the evaluation.

    Raises:
      ValueError: there are several samples, but no decoding samples.
    """
    self.notes: dict[str, Any] = {}
    self._self_bleu_tokenize = samples.self_bleu_tokenize
    vocabulary = datasets.get_vocabulary(config)
    self._ids = datasets.special_ids(config, vocabulary, student.config)
    self._dataset = iterators.EvalDataset(
      config, before_batch, pad_id=self._ids.pad
    )
    self._mean_reward = mean_reward
    shape = {
      'ids': self._ids,
      'seed': seed,
      'mesh': mesh,
    }

    self._num_outputs = _num_outputs(decodings, samples.num)

    def writes(model, inputs_of, drafter=None):
      made = {
        name: drafting.make_write(
          model,
          decoding,
          drafter,
          vocabulary=vocabulary,
          num_outputs=self._num_outputs[name],
          max_decode_len=config.task_feature_lengths['targets'],
          **shape,
        )
        for name, decoding in decodings.items()
      }
      return made, {
        name: functools.partial(_write_batch, write, inputs_of)
        for name, write in made.items()
      }

    made, self._student_writes = writes(
      student, lambda batch: batch.encoder_input_tokens, drafts.drafter
    )
    self._drafted = made if drafts.drafter else {}
    self._divergences = self._of_teachers = self._agreement = None
    if teacher.module is not None:
      grader = grading.make_grader(grades, student, teacher.module)
      self._divergence_names = programs.divergence_names(
        divergence, grader.names
      )
      self._teacher_params = grades.params(teacher.params, None, ())
      self._divergences = programs.make_divergences(
        student, grader, own=divergence, **shape
      )
      self._disagreement = programs.make_disagreement(
        student, grader, ids=self._ids, mesh=mesh
      )
      # {name: (writes, params)} of each checkpoint; '' is the only one.
      self._teachers = {
        name: (
          writes(one.module, lambda batch: batch.teacher_inputs)[1],
          one.params,
        )
        for name, one in build.apart(teacher).items()
      }
    if drafts.as_draft:
      self._agreement = agreement.Agreement(
        student,
        teacher,
        grader,
        max_decode_len=config.task_feature_lengths['targets'],
        is_timed=drafts.is_timed,
        **shape,
      )
      self._is_timed = drafts.is_timed
    # Rows of a batch for the samples: a multiple of the number of data shards.
    spread = mesh.shape['data']
    self._few = min(config.batch_size, -(-_NUM_SHOWN // spread) * spread)

  def names(self) -> list[str]:
    """Returns the metric names of a call; runs no model."""
    metrics = self._dataset.metric_names()
    if self._mean_reward is not None:
      metrics.append('reward')
    of_task = [
      f'{decoding}/{name}'
      for decoding, num in self._num_outputs.items()
      for name in (metrics if num == 1 else [*metrics, 'self_bleu'])
    ]
    drafted = [
      f'{decoding}/{name}'
      for decoding, write in self._drafted.items()
      for name in write.names()
    ]
    if self._divergences is None:
      return [*of_task, *drafted]
    as_draft = []
    if self._agreement is not None:
      as_draft = agreement.names(is_timed=self._is_timed)
    return [
      *of_task,
      *drafted,
      *self._divergence_names,
      *as_draft,
      *(f'{_prefix(name)}{n}' for name in self._teachers for n in of_task),
    ]

  def __call__(
    self, params: programs.Params, *, with_teacher: bool = True
  ) -> tuple[dict[str, float], str]:
    """Evaluates a student.

    Args:
      params: of the student.
      with_teacher: include the teacher's task metrics (computed once, since the
        teacher is frozen). The divergences are always included.

    Returns:
      {name: value}, and a Markdown table of samples.
    """
    values, texts, self.notes = self._task_metrics(self._student_writes, params)
    for decoding, write in self._drafted.items():
      of_draft = write.take_metrics()
      values |= {f'{decoding}/{k}': v for k, v in of_draft.items()}
      console.log(f'{decoding}: {drafting.describe(of_draft, write.settings)}')
    teacher_texts = None
    if self._divergences is not None:
      values |= self._divergences(params, self._teacher_params, self._dataset)
      if self._agreement is not None:
        values |= self._agreement(params, self._dataset)
      if with_teacher:
        if self._of_teachers is None:
          self._of_teachers = {
            name: self._task_metrics(*teacher)
            for name, teacher in self._teachers.items()
          }
        for name, (of_teacher, _, _) in self._of_teachers.items():
          values |= {f'{_prefix(name)}{k}': v for k, v in of_teacher.items()}
        teacher_texts = _side_by_side(
          {
            name: next(iter(all_texts.values()))
            for name, (_, all_texts, _) in self._of_teachers.items()
          }
        )
    table = sample_table(
      self._dataset.examples(), next(iter(texts.values())), teacher_texts
    )
    return values, table

  def samples(self, params: programs.Params) -> dict[str, Any]:
    """Returns the outputs for the first examples, ready for JSON.

    Uses the decoding 'greedy', or the first decoding if there is no 'greedy'.

    Args:
      params: of the student.

    Returns:
      {'decoding', 'eos_id', 'examples': [{'input', 'reference', 'student'}]}.
      With a teacher an example also has 'teacher', the teacher's output, and
      'tokens', the student's tokens with the values of
      `programs.make_disagreement`. A token's 'text' is the text that it adds to
      the output, 'teacher_text' the text that the teacher's most probable token
      would add.
    """
    names = list(self._student_writes)
    decoding = 'greedy' if 'greedy' in names else names[0]
    written = []
    for row_ids_B, batch in self._dataset.batches():
      # The full batch, because that program is already compiled.
      tokens = self._student_writes[decoding](params, row_ids_B, batch)
      tokens = tokens[: self._few, 0]
      texts = self._dataset.decode(tokens)
      new = [{'student': text} for text in texts]
      if self._divergences is not None:
        few = jax.tree.map(lambda x: x[: self._few], batch)
        by_teacher = self._teacher_texts(decoding, row_ids_B[: self._few], few)
        values = self._disagreement(params, self._teacher_params, few, tokens)
        for i, text in enumerate(by_teacher):
          of_row = {name: x[i] for name, x in values.items()}
          new[i] |= {'teacher': text, 'tokens': self._tokens(tokens[i], of_row)}
      written += new
      if len(written) >= _NUM_SHOWN:
        break
    return {
      'decoding': decoding,
      'eos_id': self._ids.eos,
      'examples': [
        {'input': example['inputs'], 'reference': example['targets'], **outputs}
        for example, outputs in zip(
          self._dataset.examples(_NUM_SHOWN), written, strict=False
        )
      ],
    }

  def _teacher_texts(
    self, decoding: str, row_ids_B: np.ndarray, batch: Batch
  ) -> list[str]:
    """Returns the teachers' outputs for some rows; reuses earlier ones."""

    def of(name, writes, params):
      if self._of_teachers is not None:
        _, texts, _ = self._of_teachers[name]
        return texts[decoding][row_ids_B[0] : row_ids_B[-1] + 1]
      tokens = writes[decoding](params, row_ids_B, batch)[:, 0]
      return self._dataset.decode(tokens)

    return _side_by_side(
      {name: of(name, *teacher) for name, teacher in self._teachers.items()}
    )

  def _tokens(
    self, tokens_T: np.ndarray, values: Mapping[str, np.ndarray]
  ) -> list[dict[str, Any]]:
    """Returns one entry per token, up to and including EOS."""
    ended = np.flatnonzero(tokens_T == self._ids.eos)
    length = ended[0] + 1 if len(ended) else len(tokens_T)
    entries = []
    for i, text in enumerate(self._dataset.pieces(tokens_T[:length])):
      of_token = {name: x[i].item() for name, x in values.items()}
      teacher_text = text
      if of_token['teacher_id'] != tokens_T[i]:
        teacher_text = self._dataset.piece_after(
          tokens_T[:i], of_token['teacher_id']
        )
      entries.append(
        {
          'text': text,
          'id': int(tokens_T[i]),
          'teacher_text': teacher_text,
          **{name: round(value, 6) for name, value in of_token.items()},
        }
      )
    return entries

  def _task_metrics(self, writes, params):
    return task_metrics(
      writes,
      params,
      self._dataset,
      self_bleu_tokenize=self._self_bleu_tokenize,
      mean_reward=self._mean_reward,
    )


def _write_batch(write, inputs_of, params, row_ids_B, batch):
  return write(params, row_ids_B, inputs_of(batch))


def _prefix(teacher: str) -> str:
  """Returns what the names of a teacher's task metrics start with."""
  return f'teacher/{teacher}/' if teacher else 'teacher/'


def _side_by_side(texts: Mapping[str, Sequence[str]]) -> list[str]:
  """Returns one text per row from {teacher: texts}."""
  if [*texts] == ['']:
    return list(texts[''])
  return [
    '; '.join(f'{name}: {text}' for name, text in zip(texts, row, strict=True))
    for row in zip(*texts.values(), strict=True)
  ]


def _num_outputs(
  decodings: Mapping[str, programs.Decoding], num_samples: int
) -> dict[str, int]:
  """Returns {decoding: outputs for each input}."""
  check_decodings(decodings)
  if num_samples < 1:
    raise ValueError(f'NUM_SAMPLES must be 1 or more, got {num_samples}.')
  num = {
    name: num_samples if _samples(decoding) else 1
    for name, decoding in decodings.items()
  }
  if num_samples > 1 and max(num.values()) == 1:
    raise ValueError(
      f'NUM_SAMPLES is {num_samples}, but no decoding samples: '
      f'{", ".join(decodings)}. Add one, or set NUM_SAMPLES = 1.'
    )
  return num


def _samples(decoding: programs.Decoding) -> bool:
  """Returns whether two outputs for one input can differ."""
  is_sampler = isinstance(decoding, sampler.SamplerConfig)
  return is_sampler and decoding.temperature > 0.0


def at_temperatures(
  decodings: Mapping[str, programs.Decoding],
  temperatures: Sequence[float] | None = None,
) -> Mapping[str, programs.Decoding]:
  """Returns the decodings, with one copy per temperature of those that sample.

  For example, 'sampled' becomes 'sampled_0.1', 'sampled_0.3'.

  Args:
    decodings: {name: SamplerConfig or BeamConfig}.
    temperatures: None: those of the decodings.

  Raises:
    ValueError: a temperature is not above 0, or occurs twice.
  """
  if temperatures is None:
    return decodings
  temperatures = [float(t) for t in temperatures]
  is_repeated = len({*temperatures}) < len(temperatures)
  if is_repeated or min(temperatures, default=0.0) <= 0.0:
    raise ValueError(
      'EVAL_TEMPERATURES must be different numbers above 0, such as (0.1, '
      f'0.3, 0.5, 1.0), got {temperatures}. Leave out 0: greedy decoding is a '
      'decoding of its own.'
    )
  result = {}
  for name, decoding in decodings.items():
    if _samples(decoding):
      result |= {
        f'{name}_{t}': dataclasses.replace(decoding, temperature=t)
        for t in temperatures
      }
    else:
      result[name] = decoding
  return result


def evaluate_checkpoint(
  checkpoint_path: str,
  output_dir: str,
  dataset: datasets.DatasetConfig,
  decodings: Mapping[str, programs.Decoding],
  teacher_checkpoint_path: str | Mapping[str, str] | None = None,
  seed: int = 0,
  draft: Draft = _NO_DRAFT,
  num_samples: int = 1,
  self_bleu_tokenize: str = diversity.WORDS,
  reward: rewards.Reward | None = None,
  reward_model: RewardModel = _NO_REWARD_MODEL,
  overwrite: bool = False,
) -> None:
  """Evaluates a checkpoint: `eval_<split>.json` and `samples_<split>.json`.

  Args:
    checkpoint_path: see `pretrained.open_checkpoint`.
    output_dir: created if it does not exist.
    dataset: task and split.
    decodings: {name: SamplerConfig or BeamConfig}.
    teacher_checkpoint_path: adds this teacher and the divergences from it. Of
      several, {name: path}: the divergences from each and from the mean of
      their probabilities.
    seed: of sampling.
    draft: a smaller model that drafts the outputs of all decodings; adds what
      it saved.
    num_samples: outputs per input of each decoding that samples; see
      `Evaluation`.
    self_bleu_tokenize: see `diversity.self_bleu`.
    reward: adds the mean reward of the outputs.
    reward_model: its model, if it has one.
    overwrite: replace the results of an earlier evaluation.

  Raises:
    ValueError: a setting is invalid, a checkpoint does not fit the task, or
      there are results already.
  """
  folder = _free_folder(output_dir, dataset.split, overwrite)
  _num_outputs(decodings, num_samples)  # raises before anything is loaded
  check_drafted(draft, decodings)
  check_as_draft('AS_DRAFT', draft.measures_student, teacher_checkpoint_path)
  diversity.check_tokenizer(self_bleu_tokenize)
  check_reward_model(reward, reward_model)
  of_teacher = Teacher(checkpoint_path=teacher_checkpoint_path)
  check_paths(of_teacher)
  grades = teachers.without_student(teachers.checkpoint(), of_teacher.names)
  check_teachers(grades, of_teacher.names, [dataset])
  mesh = partitioning.make_mesh()
  partitioning.check_rows_divide('EVAL_BATCH_SIZE', dataset.batch_size, mesh)
  source, task = build.open_model_and_task(checkpoint_path, dataset)
  tokenization.log(dataset)

  drafter = drafting.open_drafter(draft, task, dataset, mesh)

  def load(path, setting, dtype=None, config=None):
    if path is None:
      return build.NO_MODEL
    source = build.open_source(path, task, setting, config)
    return build.load_model(source, mesh, dtype)

  student = build.load_model(source, mesh)
  origin = {
    'checkpoint': str(student.folder),
    'task': dataset.mixture_or_task_name,
  }
  teacher = build.together(
    {
      name: load(
        one.checkpoint_path, setting_of('TEACHER_CHECKPOINT_PATH', name)
      )
      for name, one in of_teacher.named.items()
    }
  )
  if teacher.folder is not None:
    origin['teacher_checkpoint'] = jax.tree.map(str, teacher.folder)
  origin |= drafter.provenance if drafter else {}
  mean_reward = None
  if reward is not None:
    model = load(
      reward_model.checkpoint_path,
      'REWARD_CHECKPOINT_PATH',
      reward_model.dtype,
      reward_model.config,
    )
    reward_fn = build.make_reward_fn(reward, task, model, dataset)
    mean_reward = programs.make_mean_reward(
      reward, reward_fn, model.params, ids=task.ids, mesh=mesh
    )
  evaluation = Evaluation(
    dataset,
    student.module,
    teacher,
    decodings,
    seed=seed,
    mesh=mesh,
    samples=Samples(num_samples, self_bleu_tokenize),
    drafts=drafting.Drafts(drafter, draft.measures_student),
    mean_reward=mean_reward,
    grades=grades,
  )
  values, table = evaluation(student.params)
  write_samples(folder, dataset.split, evaluation.samples(student.params))
  path = write_results(
    folder, dataset.split, {**origin, **values, **evaluation.notes}
  )
  console.log(
    f'{table}\n{_format_all(values, evaluation.notes)}\nWritten: {path}'
  )


def _format_all(values: Mapping[str, float], notes: Mapping[str, Any]) -> str:
  """Returns a line of the metrics, and one for each note that is a text."""
  texts = (f'{k} {v}' for k, v in notes.items() if isinstance(v, str))
  return '\n'.join([format_metrics(values), *texts])


def _free_folder(output_dir: str, split: str, overwrite: bool) -> pathlib.Path:
  """Returns the folder of an evaluation.

  Raises:
    ValueError: results are there already.
  """
  folder = paths.resolve(output_dir, 'EVAL_OUTPUT_DIR')
  if run_folder.has_run(folder) and not overwrite:
    raise ValueError(
      f'EVAL_OUTPUT_DIR {output_dir} is the folder of a run, which has its own '
      f'results. Choose another, such as {output_dir}/eval, or set '
      '--gin.OVERWRITE=True.'
    )
  results = [folder / f'{name}_{split}.json' for name in _RESULTS]
  files.check_free(results, 'EVAL_OUTPUT_DIR', overwrite)
  return folder


def write_results(
  output_dir: str | os.PathLike, split: str, values: Mapping[str, Any]
) -> pathlib.Path:
  """Writes `eval_<split>.json` atomically; returns its path."""
  path = pathlib.Path(output_dir) / f'eval_{split}.json'
  files.write_atomically(path, json.dumps(values, indent=2) + '\n')
  return path


def write_samples(
  output_dir: str | os.PathLike, split: str, samples: Mapping[str, Any]
) -> None:
  """Writes the result of `Evaluation.samples` to `samples_<split>.json`."""
  files.write_atomically(
    pathlib.Path(output_dir) / f'samples_{split}.json',
    json.dumps(samples, ensure_ascii=False, indent=1) + '\n',
  )


def format_metrics(values: Mapping[str, float]) -> str:
  """Returns one line of names and values."""
  return '  '.join(f'{name} {value:.4g}' for name, value in values.items())


def sample_table(
  examples: list[dict[str, str]],
  student_texts: list[str],
  teacher_texts: list[str] | None,
  num_rows: int = 8,
) -> str:
  """Returns a Markdown table of inputs, references and outputs."""
  heads = ['input', 'reference', 'teacher', 'student']
  if teacher_texts is None:
    heads.remove('teacher')
    teacher_texts = [''] * len(student_texts)
  rows = [heads, ['---'] * len(heads)]
  for example, teacher, student in zip(
    examples[:num_rows], teacher_texts, student_texts, strict=False
  ):
    cells = {
      'input': example['inputs'],
      'reference': example['targets'],
      'teacher': teacher,
      'student': student,
    }
    rows.append(
      [cells[head].replace('|', '\\|').replace('\n', ' ') for head in heads]
    )
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)
