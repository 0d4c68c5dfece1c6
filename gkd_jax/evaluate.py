# SPDX-License-Identifier: Apache-2.0
"""Measures a student, alone and against its teacher.

Task metrics on what a model writes (greedy, sampled, by beam search), its mean
reward where there is one, and the divergences between the two on the dataset's
outputs and on the student's own.
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkd_jax import (
  beam_search,
  data,
  divergences,
  diversity,
  objectives,
  partitioning,
  policies,
  pretrained,
  rewards,
  sampler,
)
from gkd_jax import metrics as metrics_lib
from gkd_jax import step as step_lib
from gkd_jax.batch import EOS_ID, Batch, Outputs, mask_unused_ids
from gkd_jax.calculator import Calculator
from gkd_jax.model import T5

Params = Any
Decoding = sampler.SamplerConfig | beam_search.BeamConfig
# (dataset, tokens [N, T] written for it) -> mean reward
Judge = Callable[[data.EvalDataset, np.ndarray], float]

# Reported under these names, in nats per token, reduced as in Eq. 2.
_DIVERGENCES = {
  'forward_kl': divergences.forward_kl,
  'reverse_kl': divergences.reverse_kl,
  'jsd_0.5': functools.partial(divergences.generalized_jsd, beta=0.5),
  'total_variation': divergences.total_variation,
}
_SCORED_ON = ('on_dataset_outputs', 'on_student_outputs')
_NUM_SHOWN = 16  # examples of samples_<split>.json


def make_write(
  model: T5,
  decoding: Decoding,
  *,
  num_outputs: int = 1,
  max_decode_len: int,
  num_ids: int,
  seed: int,
  mesh: Mesh,
  vocabulary: Any = None,
) -> Callable[[Params, np.ndarray, np.ndarray], np.ndarray]:
  """Returns (params, row numbers [B], inputs [B, S]) -> tokens [B, n, T].

  Compiled once. Samples differ in their draws; the first is the same whatever n
  is. Of a beam they are the best hypotheses, best first; one that was not found
  is all padding (of those kept fewer ended in time).

  Args:
    model: that writes.
    decoding: a SamplerConfig or a BeamConfig.
    num_outputs: n, for each row.
    max_decode_len: T.
    num_ids: size of the tokenizer's vocabulary.
    seed: of sampling; the same rows get the same draws each time.
    mesh: rows are spread over its data axis.
    vocabulary: the tokenizer's; read where the decoding has a calculator.

  Raises:
    ValueError: it cannot write so many different ones.
  """
  is_beam = isinstance(decoding, beam_search.BeamConfig)
  if num_outputs < 1:
    raise ValueError(f'NUM_SAMPLES must be 1 or more, got {num_outputs}.')
  if is_beam and num_outputs > decoding.num_beams:
    raise ValueError(
      f'NUM_SAMPLES is {num_outputs}, but a beam of {decoding.num_beams} has '
      'no more hypotheses. Raise BeamConfig.num_beams.'
    )
  if num_outputs > 1 and not is_beam and decoding.temperature == 0.0:
    raise ValueError(
      f'NUM_SAMPLES is {num_outputs}, but greedy decoding writes the same each '
      'time. Set TEMPERATURE above 0, or search with a beam.'
    )
  calculator = None
  if not is_beam and decoding.calculator and vocabulary is not None:
    calculator = Calculator(vocabulary)

  def sample(params, key, row_ids_B, inputs):
    return policies.rollout(
      model,
      params,
      inputs,
      key,
      decoding,
      row_ids_B=row_ids_B,
      max_decode_len=max_decode_len,
      num_ids=num_ids,
      calculator=calculator,
    ).tokens

  def beam(params, inputs):
    apply = functools.partial(model.apply, {'params': params})
    width = decoding.num_beams
    encoded = jnp.repeat(apply(inputs, method='encode'), width, axis=0)
    inputs = jnp.repeat(inputs, width, axis=0)
    cache = apply(encoded, inputs, max_decode_len, method='start_cache')

    def decode_step(cache, tokens):
      logits, cache = apply(cache, tokens, method='decode_step')
      return mask_unused_ids(logits, num_ids), cache

    return beam_search.beam_search(
      decode_step,
      cache,
      decoding,
      batch_size=inputs.shape[0] // width,
      max_decode_len=max_decode_len,
    ).tokens[:, :num_outputs]

  write = jax.jit(beam if is_beam else sample)
  first = jax.random.key(seed)
  keys = [first, *(jax.random.fold_in(first, i) for i in range(1, num_outputs))]

  def place_and_write(params, row_ids_B, inputs):
    row_ids_B, inputs = partitioning.put_batch((row_ids_B, inputs), mesh)
    if is_beam:
      return np.asarray(write(params, inputs))
    drawn = [write(params, key, row_ids_B, inputs) for key in keys]
    return np.stack(jax.device_get(drawn), axis=1)

  return place_and_write


def make_score(
  student: T5, teacher: T5, *, num_ids: int, seed: int, mesh: Mesh
) -> Callable[[Params, Params, data.EvalDataset], dict[str, float]]:
  """Returns (student params, teacher params, dataset) -> divergences.

  Their names are `on_dataset_outputs/<divergence>` and
  `on_student_outputs/<divergence>`; the latter are drawn at temperature 1. In
  nats per token: the mean over each output, then over outputs (Eq. 2).
  """

  def terms(student_logits, teacher_logits, tokens):
    student_logits, teacher_logits = objectives.comparable_logits(
      student_logits, teacher_logits, num_ids
    )
    return {
      'nll': objectives.negative_log_likelihood(student_logits, tokens),
      **{
        name: divergence(
          teacher_logits=teacher_logits, student_logits=student_logits
        )
        for name, divergence in _DIVERGENCES.items()
      },
    }

  def sums_on(student_params, teacher_params, inputs, outputs):
    weights_BT, count = objectives.coefficients(outputs.weights, 'sequence')
    sums = objectives.weighted_sums(
      terms,
      step_lib.unembed(student),
      step_lib.unembed(teacher),
      objectives.Objective.chunk_tokens,
      student.head_params(student_params),
      step_lib.hidden_states(student, student_params, inputs, outputs.tokens),
      teacher.head_params(teacher_params),
      step_lib.hidden_states(teacher, teacher_params, inputs, outputs.tokens),
      outputs.tokens,
      weights_BT,
    )
    return {'count': count, **sums}

  @jax.jit
  def score_batch(student_params, teacher_params, row_ids_B, batch):
    inputs = batch.encoder_input_tokens
    drawn = policies.rollout(
      student,
      student_params,
      inputs,
      jax.random.key(seed),
      sampler.ANCESTRAL,
      row_ids_B=row_ids_B,
      max_decode_len=batch.decoder_target_tokens.shape[1],
      num_ids=num_ids,
    )
    # The student writes for rows that only fill the batch up, too.
    is_example_B = batch.decoder_loss_weights.any(axis=1, keepdims=True)
    drawn = Outputs(drawn.tokens, drawn.weights * is_example_B)
    return {
      on: sums_on(student_params, teacher_params, inputs, outputs)
      for on, outputs in zip(_SCORED_ON, (batch.outputs, drawn), strict=True)
    }

  def score(student_params, teacher_params, dataset):
    totals = None
    for row_ids_B, batch in dataset.batches():
      row_ids_B, batch = partitioning.put_batch((row_ids_B, batch), mesh)
      sums = score_batch(student_params, teacher_params, row_ids_B, batch)
      totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    return {
      f'{on}/{name}': float(total / sums['count'])
      for on, sums in totals.items()
      for name, total in sums.items()
      if name != 'count'
    }

  return score


def make_disagreement(
  student: T5, teacher: T5, *, num_ids: int, mesh: Mesh
) -> Callable[..., dict[str, np.ndarray]]:
  """Returns a function that shows, token by token, where the two disagree.

  It maps (student params, teacher params, batch, tokens [B, T]) to arrays
  [B, T], at each place given the tokens before it: `kl`, KL(student || teacher)
  in nats over the whole vocabulary at temperature 1; `student_probability` and
  `teacher_probability` of the token that is there; `teacher_id`, the token that
  the teacher finds most probable, and `teacher_id_probability`.
  """
  student_unembed = step_lib.unembed(student)
  teacher_unembed = step_lib.unembed(teacher)

  @jax.jit
  def disagreement(student_params, teacher_params, inputs, tokens):
    def at_place(place):
      student_hidden_BD, teacher_hidden_BD, tokens_B = place
      student_logits, teacher_logits = objectives.comparable_logits(
        student_unembed(student.head_params(student_params), student_hidden_BD),
        teacher_unembed(teacher.head_params(teacher_params), teacher_hidden_BD),
        num_ids,
      )
      teacher_id_B = jnp.argmax(teacher_logits, axis=-1)

      def probability(logits, ids_B):
        return jnp.exp(-objectives.negative_log_likelihood(logits, ids_B))

      return {
        'kl': divergences.reverse_kl(
          teacher_logits=teacher_logits, student_logits=student_logits
        ),
        'student_probability': probability(student_logits, tokens_B),
        'teacher_probability': probability(teacher_logits, tokens_B),
        'teacher_id': teacher_id_B,
        'teacher_id_probability': probability(teacher_logits, teacher_id_B),
      }

    places = jax.tree.map(
      lambda x: x.swapaxes(0, 1),
      (
        step_lib.hidden_states(student, student_params, inputs, tokens),
        step_lib.hidden_states(teacher, teacher_params, inputs, tokens),
        tokens,
      ),
    )
    # One place at a time: the logits that exist are [B, V].
    return jax.tree.map(
      lambda x: x.swapaxes(0, 1), jax.lax.map(at_place, places)
    )

  def place_and_compare(student_params, teacher_params, batch, tokens):
    inputs, tokens = partitioning.put_batch(
      (batch.encoder_input_tokens, tokens), mesh
    )
    values = disagreement(student_params, teacher_params, inputs, tokens)
    return jax.tree.map(np.asarray, values)

  return place_and_compare


def make_judge(
  reward: rewards.Reward, score: rewards.Score, params: Params, mesh: Mesh
) -> Judge:
  """Returns (dataset, tokens [N, T]) -> mean reward, compiled once.

  Args:
    reward: which one.
    score: what its `make_score` returned.
    params: of its model; None if it has none.
    mesh: rows are spread over its data axis.
  """

  @jax.jit
  def sums(params, batch, tokens):
    ends = jnp.int32(tokens == EOS_ID)
    weights = jnp.float32(jnp.cumsum(ends, axis=1) - ends == 0)
    rewards_B = rewards.score(score, batch, Outputs(tokens, weights), params)
    is_example_B = batch.decoder_loss_weights.any(axis=1)
    return jnp.sum(rewards_B, where=is_example_B)

  def judge(dataset, tokens):
    fill = -len(tokens) % dataset.batch_size
    tokens = np.pad(tokens, ((0, fill), (0, 0)))
    total = 0.0
    for row_ids_B, batch in dataset.batches():
      placed = partitioning.put_batch((batch, tokens[row_ids_B]), mesh)
      total += float(sums(params, *placed))
      reward.raise_failure()
    return total / len(dataset)

  return judge


def task_metrics(
  writes: Mapping[str, Callable[..., np.ndarray]],
  params: Params,
  dataset: data.EvalDataset,
  *,
  self_bleu_tokenize: str = diversity.WORDS,
  judge: Judge | None = None,
) -> tuple[dict[str, float], dict[str, list[str]], dict[str, Any]]:
  """Lets a model write with each decoding, and applies the task's metrics.

  Args:
    writes: {decoding: (params, row numbers [B], batch) -> tokens [B, n, T]}.
    params: of the model.
    dataset: split with its metrics.
    self_bleu_tokenize: see `diversity.self_bleu`.
    judge: adds the mean reward, as '<decoding>/reward'.

  Returns:
    {'<decoding>/<metric>': value}, means over the outputs for an input, with
    '<decoding>/self_bleu' where there are several; {decoding: texts written,
    the first for each input}; and {'<decoding>/<name>': note}: what the metrics
    say that is no number.
  """
  values, texts, notes = {}, {}, {}
  for decoding, write in writes.items():
    written = dataset.predict(functools.partial(write, params)).swapaxes(0, 1)
    drawn = [dataset.decode(tokens) for tokens in written]
    texts[decoding] = drawn[0]
    measured = [dataset.metrics_and_notes(tokens) for tokens in written]
    if judge is not None:
      for (numbers, _), tokens in zip(measured, written, strict=True):
        numbers['reward'] = judge(dataset, tokens)
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


class Evaluation:
  """One split, and all that is measured on it; compiled at its first call.

  Attributes:
    notes: what the task's metrics said of the student at the last call that is
      no number, {'<decoding>/<name>': text or mapping}.
  """

  def __init__(
    self,
    config: data.DatasetConfig,
    student: T5,
    teacher: T5 | None,
    teacher_params: Params | None,
    decodings: Mapping[str, Decoding],
    *,
    seed: int,
    mesh: Mesh,
    num_samples: int = 1,
    self_bleu_tokenize: str = diversity.WORDS,
    judge: Judge | None = None,
  ):
    """Reads the split.

    Args:
      config: task and split.
      student: the model that is measured.
      teacher: adds its own metrics and the divergences; may be None.
      teacher_params: of the teacher.
      decodings: {name: how outputs are drawn}.
      seed: of sampling.
      mesh: of devices.
      num_samples: outputs that a decoding which samples draws for each input.
        Its metrics are means over them, and it gets a 'self_bleu'.
      self_bleu_tokenize: see `diversity.self_bleu`.
      judge: adds the mean reward of what is written.

    Raises:
      ValueError: several outputs are to be drawn, and no decoding samples.
    """
    self.notes: dict[str, Any] = {}
    self._self_bleu_tokenize = self_bleu_tokenize
    self._dataset = data.EvalDataset(config)
    self._judge = judge
    self._teacher_params = teacher_params
    shape = {
      'num_ids': self._dataset.vocabulary.vocab_size,
      'seed': seed,
      'mesh': mesh,
    }

    self._num_outputs = _num_outputs(decodings, num_samples)

    def make(model, name):
      write = make_write(
        model,
        decodings[name],
        num_outputs=self._num_outputs[name],
        max_decode_len=config.task_feature_lengths['targets'],
        vocabulary=self._dataset.vocabulary,
        **shape,
      )
      return lambda params, row_ids_B, batch: write(
        params, row_ids_B, batch.encoder_input_tokens
      )

    def writes(model):
      return {name: make(model, name) for name in decodings}

    self._student_writes = writes(student)
    self._score = self._of_teacher = None
    if teacher is not None:
      self._score = make_score(student, teacher, **shape)
      self._teacher_writes = writes(teacher)
      self._disagreement = make_disagreement(
        student, teacher, num_ids=shape['num_ids'], mesh=mesh
      )
    # Rows of a batch that are enough for the samples, on every device some.
    spread = mesh.shape['data']
    self._few = min(config.batch_size, -(-_NUM_SHOWN // spread) * spread)

  def names(self) -> list[str]:
    """Returns the names of what a call measures, without a model's work."""
    metrics = self._dataset.metric_names()
    if self._judge is not None:
      metrics.append('reward')
    of_task = [
      f'{decoding}/{name}'
      for decoding, num in self._num_outputs.items()
      for name in (metrics if num == 1 else [*metrics, 'self_bleu'])
    ]
    if self._score is None:
      return of_task
    divergences_on = [
      f'{on}/{name}' for on in _SCORED_ON for name in ('nll', *_DIVERGENCES)
    ]
    return [*of_task, *divergences_on, *(f'teacher/{n}' for n in of_task)]

  def __call__(
    self, params: Params, *, with_teacher: bool = True
  ) -> tuple[dict[str, float], str]:
    """Measures a student.

    Args:
      params: of the student.
      with_teacher: let the teacher write, too (it does so once: it does not
        change). The divergences from it are measured in any case.

    Returns:
      {name: value}, and a Markdown table of samples.
    """
    values, texts, self.notes = self._task_metrics(self._student_writes, params)
    teacher_texts = None
    if self._score is not None:
      values |= self._score(params, self._teacher_params, self._dataset)
      if with_teacher:
        if self._of_teacher is None:
          self._of_teacher = self._task_metrics(
            self._teacher_writes, self._teacher_params
          )
        teacher_values, all_texts, _ = self._of_teacher
        values |= {f'teacher/{k}': v for k, v in teacher_values.items()}
        teacher_texts = next(iter(all_texts.values()))
    table = sample_table(
      self._dataset.examples(), next(iter(texts.values())), teacher_texts
    )
    return values, table

  def samples(self, params: Params) -> dict[str, Any]:
    """Returns what is written for the first examples, and for JSON to keep.

    The decoding is 'greedy', or the first where there is none of this name.

    Args:
      params: of the student.

    Returns:
      {'decoding', 'eos_id', 'examples': [{'input', 'reference', 'student'}]}.
      With a teacher an example has 'teacher', its output, too, and 'tokens':
      the student's output token by token, with `make_disagreement`'s numbers.
      A token's 'text' is what it adds to the output, 'teacher_text' what the
      teacher's most probable one would.
    """
    names = list(self._student_writes)
    decoding = 'greedy' if 'greedy' in names else names[0]
    written = []
    for row_ids_B, batch in self._dataset.batches():
      # The whole batch: that program is compiled.
      tokens = self._student_writes[decoding](params, row_ids_B, batch)
      tokens = tokens[: self._few, 0]
      texts = self._dataset.decode(tokens)
      new = [{'student': text} for text in texts]
      if self._score is not None:
        few = Batch(*(x[: self._few] for x in batch))
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
      'eos_id': EOS_ID,
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
    """Returns what the teacher writes for some rows, or wrote already."""
    if self._of_teacher is not None:
      _, texts, _ = self._of_teacher
      return texts[decoding][row_ids_B[0] : row_ids_B[-1] + 1]
    write = self._teacher_writes[decoding]
    tokens = write(self._teacher_params, row_ids_B, batch)[:, 0]
    return self._dataset.decode(tokens)

  def _tokens(
    self, tokens_T: np.ndarray, values: Mapping[str, np.ndarray]
  ) -> list[dict[str, Any]]:
    """Returns one entry a token, up to the end of the output."""
    ended = np.flatnonzero(tokens_T == EOS_ID)
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
      judge=self._judge,
    )


def _num_outputs(
  decodings: Mapping[str, Decoding], num_samples: int
) -> dict[str, int]:
  """Returns {decoding: outputs for each input}."""
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


def _samples(decoding: Decoding) -> bool:
  """Whether its outputs for an input can differ."""
  is_sampler = isinstance(decoding, sampler.SamplerConfig)
  return is_sampler and decoding.temperature > 0.0


def at_temperatures(
  decodings: Mapping[str, Decoding], temperatures: Sequence[float]
) -> dict[str, Decoding]:
  """Returns the decodings, each that samples at each of the temperatures.

  What is named 'sampled' becomes 'sampled_0.1', 'sampled_0.3' and so on.

  Raises:
    ValueError: a temperature is not above 0, or there twice.
  """
  temperatures = [float(t) for t in temperatures]
  is_repeated = len({*temperatures}) < len(temperatures)
  if is_repeated or min(temperatures, default=0.0) <= 0.0:
    raise ValueError(
      'EVAL_TEMPERATURES must be different numbers above 0, such as (0.1, '
      f'0.3, 0.5, 1.0), got {temperatures}. Greedy decoding is there anyway.'
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
  dataset: data.DatasetConfig,
  decodings: Mapping[str, Decoding],
  teacher_checkpoint_path: str | None = None,
  seed: int = 0,
  temperatures: Sequence[float] | None = None,
  num_samples: int = 1,
  self_bleu_tokenize: str = diversity.WORDS,
  reward: rewards.Reward | None = None,
  reward_checkpoint_path: str | None = None,
  reward_dtype: str | None = None,
) -> None:
  """Evaluates a checkpoint: `eval_<split>.json` and `samples_<split>.json`.

  Args:
    checkpoint_path: see `pretrained.open_checkpoint`.
    output_dir: made if it is not there.
    dataset: task and split.
    decodings: {name: SamplerConfig or BeamConfig}.
    teacher_checkpoint_path: adds this teacher and the divergences from it.
    seed: of sampling.
    temperatures: sample at each of these, see `at_temperatures`; None: as the
      decodings say.
    num_samples: outputs that a decoding which samples draws for each input;
      see `Evaluation`.
    self_bleu_tokenize: see `diversity.self_bleu`.
    reward: adds the mean reward of what is written.
    reward_checkpoint_path: its model, if it has one.
    reward_dtype: of that model's parameters, 'float32' or 'bfloat16'; None: as
      saved.

  Raises:
    ValueError: a setting, or the checkpoint, cannot be.
  """
  if temperatures is not None:
    decodings = at_temperatures(decodings, temperatures)
  _num_outputs(decodings, num_samples)  # raises before anything is loaded
  diversity.check_tokenizer(self_bleu_tokenize)
  rewards.check_model(reward, reward_checkpoint_path, reward_dtype)
  pretrained.check_dtype('REWARD_DTYPE', reward_dtype)
  vocabulary = data.get_vocabulary(dataset)
  mesh = partitioning.make_mesh()
  load = functools.partial(
    pretrained.load_model,
    vocabulary=data.describe_vocabulary(vocabulary),
    num_ids=vocabulary.vocab_size,
    mesh=mesh,
  )
  student, params, folder = load(checkpoint_path)
  teacher = teacher_params = None
  origin = {
    'checkpoint': str(folder),
    'task': dataset.mixture_or_task_name,
  }
  if teacher_checkpoint_path is not None:
    teacher, teacher_params, folder = load(teacher_checkpoint_path)
    origin['teacher_checkpoint'] = str(folder)
  judge = None
  if reward is not None:
    reward_model = reward_params = None
    if reward_checkpoint_path is not None:
      reward_model, reward_params, _ = load(
        reward_checkpoint_path, dtype=reward_dtype
      )
    score = reward.make_score(vocabulary, reward_model)
    judge = make_judge(reward, score, reward_params, mesh)
  evaluation = Evaluation(
    dataset,
    student,
    teacher,
    teacher_params,
    decodings,
    seed=seed,
    mesh=mesh,
    num_samples=num_samples,
    self_bleu_tokenize=self_bleu_tokenize,
    judge=judge,
  )
  values, table = evaluation(params)
  write_samples(output_dir, dataset.split, evaluation.samples(params))
  path = write_results(
    output_dir, dataset.split, {**origin, **values, **evaluation.notes}
  )
  texts = {k: v for k, v in evaluation.notes.items() if isinstance(v, str)}
  metrics_lib.say(
    '\n'.join(
      [
        table,
        format_metrics(values),
        *(f'{name} {text}' for name, text in texts.items()),
        f'Written: {path}',
      ]
    )
  )


def write_results(
  output_dir: str | os.PathLike, split: str, values: Mapping[str, Any]
) -> pathlib.Path:
  """Writes `eval_<split>.json`, whole or not at all; returns its path."""
  path = pathlib.Path(output_dir) / f'eval_{split}.json'
  metrics_lib.write_whole(path, json.dumps(values, indent=2) + '\n')
  return path


def write_samples(
  output_dir: str | os.PathLike, split: str, samples: Mapping[str, Any]
) -> None:
  """Writes `samples_<split>.json`, what `Evaluation.samples` returned."""
  metrics_lib.write_whole(
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
  """Returns a Markdown table of inputs, references and what was written."""
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
