# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of an evaluation: generation, divergences, rewards.

Each `make_...` returns a function that compiles at its first call. All batches
must have the same shape.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gkd_jax.batch import Batch, Outputs, SpecialIds, mask_unused_ids
from gkd_jax.data import iterators
from gkd_jax.decoding import beam_search, generation, sampler, speculative
from gkd_jax.decoding import rollout as rollout_lib
from gkd_jax.decoding.calculator import Calculator
from gkd_jax.distill import (
  chunked_sums,
  divergences,
  grading,
  objectives,
  rewards,
)
from gkd_jax.distill.grading import Grader
from gkd_jax.models.interface import Model
from gkd_jax.parallel import partitioning

Params = Any
Decoding = sampler.SamplerConfig | beam_search.BeamConfig
# (params, batch, outputs) -> a score of each output, [B] float32
Scores = Callable[[Params, Batch, Outputs], np.ndarray]
# (dataset, output tokens [N, T]) -> mean reward
MeanReward = Callable[[iterators.EvalDataset, np.ndarray], float]

_MEASURED_ON = ('on_dataset_outputs', 'on_student_outputs')


def divergence_names(
  own: divergences.Divergence | None = None, teachers: Sequence[str] = ()
) -> list[str]:
  """Returns the metric names of `make_divergences`."""
  names = [*divergences.reported(own)]
  of_each = [f'{teacher}/{name}' for teacher in teachers for name in names]
  return [
    f'{on}/{name}' for on in _MEASURED_ON for name in ('nll', *names, *of_each)
  ]


def make_write(
  model: Model,
  decoding: Decoding,
  *,
  num_outputs: int = 1,
  max_decode_len: int,
  ids: SpecialIds,
  seed: int,
  mesh: Mesh,
  vocabulary: Any = None,
) -> Callable[[Params, np.ndarray, np.ndarray], np.ndarray]:
  """Returns (params, row numbers [B], inputs [B, S]) -> tokens [B, n, T].

  Samples of a row are independent; the first does not depend on n. Beam search
  returns the n best hypotheses, best first. If fewer hypotheses reached EOS,
  the remaining ones are all padding.

  Args:
    model: generates the outputs.
    decoding: a SamplerConfig or a BeamConfig.
    num_outputs: n, outputs per row.
    max_decode_len: T.
    ids: the special ids of model and vocabulary.
    seed: of sampling; a row always gets the same samples.
    mesh: rows are sharded over its data axis.
    vocabulary: of the task; used only by a decoding with a calculator.

  Raises:
    ValueError: the decoding cannot produce n different outputs.
  """
  is_beam = isinstance(decoding, beam_search.BeamConfig)
  if num_outputs < 1:
    raise ValueError(f'NUM_SAMPLES must be 1 or more, got {num_outputs}.')
  if is_beam and num_outputs > decoding.num_beams:
    raise ValueError(
      f'NUM_SAMPLES is {num_outputs}, but BeamConfig.num_beams is '
      f'{decoding.num_beams}. Raise num_beams to NUM_SAMPLES or more.'
    )
  if num_outputs > 1 and not is_beam and decoding.temperature == 0.0:
    raise ValueError(
      f'NUM_SAMPLES is {num_outputs}, but greedy decoding has one output per '
      'input. Set TEMPERATURE above 0, or use beam search.'
    )
  calculator = None
  if not is_beam and decoding.calculator and vocabulary is not None:
    calculator = Calculator(vocabulary, ids)

  write = _write_program(
    model, decoding, num_outputs, max_decode_len, ids, mesh, calculator
  )
  keys = _keys(seed, num_outputs)

  def place_and_write(params, row_ids_B, inputs):
    row_ids_B, inputs = partitioning.put_global_batch((row_ids_B, inputs), mesh)
    if is_beam:
      return np.asarray(write(params, inputs))
    drawn = [write(params, key, row_ids_B, inputs) for key in keys]
    return np.stack(jax.device_get(drawn), axis=1)

  return place_and_write


def _keys(seed: int, num_outputs: int) -> list[jax.Array]:
  """Returns the key of each output; the first does not depend on n."""
  first = jax.random.key(seed)
  return [first, *(jax.random.fold_in(first, i) for i in range(1, num_outputs))]


@functools.lru_cache(maxsize=16)
def _write_program(
  model: Model,
  decoding: Decoding,
  num_outputs: int,
  max_decode_len: int,
  ids: SpecialIds,
  mesh: Mesh,
  calculator: Calculator | None,
) -> Callable[..., jax.Array]:
  """Returns the jitted function of `make_write`, shared by a process's runs.

  Its arguments are (params, inputs) for beam search, and (params, key, row
  numbers, inputs) for sampling.
  """

  def sample(params, key, row_ids_B, inputs):
    return rollout_lib.rollout(
      rollout_lib.Writer(model, params, inputs, decoding),
      key,
      row_ids_B=row_ids_B,
      max_decode_len=max_decode_len,
      ids=ids,
      calculator=calculator,
    ).tokens

  def beam(params, inputs):
    return generation.search(
      model, params, inputs, decoding, max_decode_len=max_decode_len, ids=ids
    ).tokens[:, :num_outputs]

  return jax.jit(
    beam if isinstance(decoding, beam_search.BeamConfig) else sample,
    out_shardings=partitioning.replicated(mesh),
  )


def make_drafted_write(
  target: Model,
  draft: Model,
  config: sampler.SamplerConfig,
  drafting: speculative.Drafting,
  *,
  num_outputs: int = 1,
  max_decode_len: int,
  ids: SpecialIds,
  seed: int,
  mesh: Mesh,
) -> Callable[..., tuple[np.ndarray, list[speculative.Counts]]]:
  """Returns a function that writes as that of `make_write`, with a draft.

  It maps ((params, params of the draft), row numbers [B], inputs [B, S]) to
  tokens [B, n, T] and the counts of each of the n outputs.

  Args:
    target: whose outputs are written.
    draft: proposes their tokens.
    config: how to draw.
    drafting: how to draft.
    num_outputs: n, outputs per row.
    max_decode_len: T.
    ids: the special ids of both models and their vocabulary.
    seed: of sampling.
    mesh: rows are sharded over its data axis.
  """
  write = _drafted_program(
    target, draft, config, drafting, max_decode_len, ids, mesh
  )
  keys = _keys(seed, num_outputs)

  def place_and_write(params, row_ids_B, inputs):
    row_ids_B, inputs = partitioning.put_global_batch((row_ids_B, inputs), mesh)
    drawn = jax.device_get([write(params, k, row_ids_B, inputs) for k in keys])
    tokens, counts = zip(*drawn, strict=True)
    return np.stack(tokens, axis=1), list(counts)

  return place_and_write


@functools.lru_cache(maxsize=16)
def _drafted_program(
  target: Model,
  draft: Model,
  config: sampler.SamplerConfig,
  drafting: speculative.Drafting,
  max_decode_len: int,
  ids: SpecialIds,
  mesh: Mesh,
) -> Callable[..., tuple[jax.Array, speculative.Counts]]:
  """Returns the jitted function of `make_drafted_write`."""

  def sample(params, key, row_ids_B, inputs):
    writers = [
      rollout_lib.Writer(model, of_model, inputs, config)
      for model, of_model in zip((target, draft), params, strict=True)
    ]
    drafted = rollout_lib.rollout_drafted(
      *writers,
      key,
      drafting,
      row_ids_B=row_ids_B,
      max_decode_len=max_decode_len,
      ids=ids,
    )
    return drafted.rollout.tokens, drafted.counts

  return jax.jit(
    sample,
    out_shardings=partitioning.replicated(mesh),
    compiler_options=_compiler_options(mesh),
  )


def _compiler_options(mesh: Mesh) -> dict[str, str] | None:
  """Returns XLA's options for products of few rows, as a block has."""
  if mesh.devices.flat[0].platform != 'cpu':
    return None
  # YNNPACK repacks the weights for each product. With 6 rows of width 768 that
  # takes 2.4 times as long as Eigen, which XLA uses otherwise.
  return {'xla_cpu_experimental_ynn_fusion_type': ''}


def make_divergences(
  student: Model,
  grader: Grader,
  *,
  own: divergences.Divergence | None = None,
  ids: SpecialIds,
  seed: int,
  mesh: Mesh,
) -> Callable[[Params, Params, iterators.EvalDataset], dict[str, float]]:
  """Returns (student params, teacher params, dataset) -> divergences.

  Their names are `on_dataset_outputs/<divergence>` and
  `on_student_outputs/<divergence>`. The student's outputs are drawn at
  temperature 1. The unit is nats per token: the mean over each output's tokens,
  then over outputs (Eq. 2). `own` is the method's divergence, measured in
  addition under its own name.

  Several teachers are compared as their combination, and each by itself as
  `on_student_outputs/<teacher>/<divergence>`: on all rows, or on the rows that
  are routed to it (NaN without any).
  """
  if divergences.reported(own).keys() == divergences.reported().keys():
    return _make_divergences(student, grader, None, ids, seed, mesh)
  # Not cached: a user's function may not be hashable.
  make = _make_divergences.__wrapped__
  return make(student, grader, own, ids, seed, mesh)


@functools.lru_cache(maxsize=16)
def _make_divergences(student, grader, own, ids, seed, mesh):
  """See `make_divergences`; all runs of a process share the result."""
  measured = divergences.reported(own)

  def terms(student_logits, graded, tokens):
    def compare(teacher_logits):
      both = objectives.comparable_logits(student_logits, teacher_logits, ids)
      values = {
        name: divergence(teacher_logits=both[1], student_logits=both[0])
        for name, divergence in measured.items()
      }
      return both[0], values

    masked, values = compare(graded.combined)
    of_each = {name: compare(x)[1] for name, x in graded.members.items()} | {
      name: {k: jnp.where(is_own, v, 0.0) for k, v in values.items()}
      for name, is_own in graded.own_rows.items()
    }
    return {
      'nll': objectives.negative_log_likelihood(masked, tokens),
      **values,
      **{
        f'{name}/{k}': v for name, of in of_each.items() for k, v in of.items()
      },
    }

  def counts_of(batch, outputs):
    """Returns the number of outputs; of a routed teacher those of its rows."""
    counts = {'count': objectives.coefficients(outputs.weights, 'sequence')[1]}
    for i, name in enumerate(grader.names if grader.is_routed else []):
      of_teacher = outputs.weights * (batch.teacher_ids == i)[:, None]
      _, counts[f'{name}/count'] = objectives.coefficients(
        of_teacher, 'sequence'
      )
    return counts

  def sums_on(student_params, teacher_params, batch, outputs):
    inputs = batch.encoder_input_tokens
    weights_BT, _ = objectives.coefficients(outputs.weights, 'sequence')
    sums = chunked_sums.weighted_sums(
      terms,
      grading.unembed(student),
      grader.unembed_each(ids),
      objectives.Objective.chunk_tokens,
      student.head_params(student_params),
      grading.hidden_states(student, student_params, inputs, outputs.tokens),
      grader.heads(teacher_params),
      grader.hidden_states(teacher_params, batch, outputs.tokens),
      outputs.tokens,
      weights_BT,
    )
    return {**counts_of(batch, outputs), **sums}

  @jax.jit
  def measure_batch(student_params, teacher_params, row_ids_B, batch):
    inputs = batch.encoder_input_tokens
    drawn = rollout_lib.rollout(
      rollout_lib.Writer(student, student_params, inputs, sampler.ANCESTRAL),
      jax.random.key(seed),
      row_ids_B=row_ids_B,
      max_decode_len=batch.decoder_target_tokens.shape[1],
      ids=ids,
    )
    # Rows that only pad the batch also have student outputs: weight 0.
    is_example_B = batch.decoder_loss_weights.any(axis=1, keepdims=True)
    drawn = Outputs(drawn.tokens, drawn.weights * is_example_B)
    return {
      on: sums_on(student_params, teacher_params, batch, outputs)
      for on, outputs in zip(_MEASURED_ON, (batch.outputs, drawn), strict=True)
    }

  def measure(student_params, teacher_params, dataset):
    totals = None
    for row_ids_B, batch in dataset.batches():
      row_ids_B, batch = partitioning.put_global_batch((row_ids_B, batch), mesh)
      sums = measure_batch(student_params, teacher_params, row_ids_B, batch)
      totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)

    def mean(sums, name):
      of_teacher = f'{name.partition("/")[0]}/count'
      return float(sums[name] / sums.get(of_teacher, sums['count']))

    return {
      f'{on}/{name}': mean(sums, name)
      for on, sums in totals.items()
      for name in sums
      if name.rpartition('/')[2] != 'count'
    }

  return measure


@functools.lru_cache(maxsize=16)
def make_disagreement(
  student: Model, grader: Grader, *, ids: SpecialIds, mesh: Mesh
) -> Callable[..., dict[str, np.ndarray]]:
  """Returns a function that compares student and teacher token by token.

  Several teachers are compared as their combination.

  It maps (student params, teacher params, batch, tokens [B, T]) to arrays
  [B, T], one value per token given the tokens before it: `kl`, KL(student ||
  teacher) in nats over the full vocabulary at temperature 1;
  `student_probability` and `teacher_probability` of the token; `teacher_id`,
  the teacher's most probable token, and its `teacher_id_probability`.
  """
  student_unembed = grading.unembed(student)
  teacher_unembed = grader.unembed(ids)

  @functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
  def disagreement(student_params, teacher_params, batch, tokens):
    def at_place(place):
      student_hidden_BD, teacher_hidden_BD, tokens_B = place
      student_logits, teacher_logits = objectives.comparable_logits(
        student_unembed(student.head_params(student_params), student_hidden_BD),
        teacher_unembed(grader.heads(teacher_params), teacher_hidden_BD),
        ids,
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

    student_hidden = grading.hidden_states(
      student, student_params, batch.encoder_input_tokens, tokens
    )
    teacher_hidden = grader.hidden_states(teacher_params, batch, tokens)
    return _at_each_place(at_place, (student_hidden, teacher_hidden, tokens))

  return _of_rows_on_hosts(disagreement, mesh)


def _at_each_place(at_place, arrays: Any) -> Any:
  """Returns at_place of arrays [B, ...] at each position, as [B, T, ...].

  One position at a time: only logits [B, V] are in memory.

  Args:
    at_place: tree of arrays [B, ...] -> tree of arrays [B, ...].
    arrays: tree of arrays [B, T, ...].
  """

  def swap(tree):
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)

  return swap(jax.lax.map(at_place, swap(arrays)))


def _of_rows_on_hosts(compare, mesh: Mesh):
  """Returns a compiled comparison that takes and returns arrays of the host."""

  def place_and_compare(student_params, teacher_params, batch, tokens):
    placed = partitioning.put_global_batch((batch, tokens), mesh)
    values = compare(student_params, teacher_params, *placed)
    return jax.tree.map(np.asarray, values)

  return place_and_compare


@functools.lru_cache(maxsize=16)
def make_mean_nll(model: Model, *, ids: SpecialIds, mesh: Mesh) -> Scores:
  """Returns a function that scores outputs by their likelihood.

  The score is the mean negative log-likelihood of an output's tokens in nats.
  """

  def values(logits, _, tokens):
    logits = mask_unused_ids(logits, ids)
    return {'nll': objectives.negative_log_likelihood(logits, tokens)}

  @functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
  def mean_nll(params, batch, outputs):
    nll_BT = chunked_sums.token_values(
      values,
      grading.unembed(model),
      None,
      objectives.Objective.chunk_tokens,
      model.head_params(params),
      grading.hidden_states(
        model, params, batch.encoder_input_tokens, outputs.tokens
      ),
      None,
      None,
      outputs.tokens,
    )['nll']
    weights_BT = outputs.weights
    return jnp.sum(nll_BT * weights_BT, axis=1) / weights_BT.sum(axis=1)

  def place_and_score(params, *of_rows):
    placed = partitioning.put_global_batch(of_rows, mesh)
    return np.asarray(mean_nll(params, *placed))

  return place_and_score


def make_rewards(
  reward: rewards.Reward, reward_fn: rewards.RewardFn, *, mesh: Mesh
) -> Scores:
  """Returns a function that scores outputs by a reward.

  Args:
    reward: the reward.
    reward_fn: from its `make_reward_fn`.
    mesh: rows are sharded over its data axis.
  """

  @functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
  def compute(params, batch, outputs):
    return rewards.compute(reward_fn, batch, outputs, params)

  def place_and_score(params, *of_rows):
    placed = partitioning.put_global_batch(of_rows, mesh)
    values = np.asarray(compute(params, *placed))
    reward.raise_failure()
    return values

  return place_and_score


@functools.lru_cache(maxsize=16)
def make_agreement(
  student: Model, grader: Grader, *, ids: SpecialIds, mesh: Mesh
) -> Callable[..., dict[str, np.ndarray]]:
  """Returns a function that measures the student as the teacher's draft.

  It maps (student params, teacher params, batch, tokens [B, T] that the teacher
  wrote) to arrays [B, T], one value per token given the tokens before it:
  `overlap`, the sum of min(P, Q), which is the probability that a drafted token
  is accepted; `accepts`, the probability that this token was drafted and
  accepted, min(1, Q / P); and `agrees`, whether both have the same most
  probable token.
  """
  student_unembed = grading.unembed(student)
  teacher_unembed = grader.unembed(ids)

  @functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
  def agreement(student_params, teacher_params, batch, tokens):
    def at_place(place):
      student_hidden_BD, teacher_hidden_BD, tokens_B = place
      student_logits, teacher_logits = objectives.comparable_logits(
        student_unembed(student.head_params(student_params), student_hidden_BD),
        teacher_unembed(grader.heads(teacher_params), teacher_hidden_BD),
        ids,
      )
      log_ratio_B = objectives.negative_log_likelihood(
        teacher_logits, tokens_B
      ) - objectives.negative_log_likelihood(student_logits, tokens_B)
      return {
        'overlap': 1.0
        - divergences.total_variation(
          teacher_logits=teacher_logits, student_logits=student_logits
        ),
        'accepts': jnp.exp(jnp.minimum(log_ratio_B, 0.0)),
        'agrees': jnp.argmax(student_logits, axis=-1)
        == jnp.argmax(teacher_logits, axis=-1),
      }

    student_hidden = grading.hidden_states(
      student, student_params, batch.encoder_input_tokens, tokens
    )
    teacher_hidden = grader.hidden_states(teacher_params, batch, tokens)
    return _at_each_place(at_place, (student_hidden, teacher_hidden, tokens))

  return _of_rows_on_hosts(agreement, mesh)


@functools.lru_cache(maxsize=16)
def make_decode_blocks(
  model: Model, num_positions: int, max_decode_len: int, mesh: Mesh
) -> Callable[[Params, np.ndarray, int], np.ndarray]:
  """Returns a program to time decoding with.

  It maps (params, inputs [B, S], number of calls, up to T) to the tokens of the
  last call. All calls decode `num_positions` positions from another offset.

  Args:
    model: any.
    num_positions: N.
    max_decode_len: T.
    mesh: rows are sharded over its data axis.
  """

  @functools.partial(
    jax.jit,
    out_shardings=partitioning.replicated(mesh),
    compiler_options=_compiler_options(mesh),
  )
  def decode(params, inputs, num_calls):
    encoded = model.apply({'params': params}, inputs, method='encode')
    variables = {'params': model.gather_params(params)}
    cache = model.apply(
      variables,
      encoded,
      inputs,
      max_decode_len + num_positions,
      method='start_cache',
    )

    def body(i, state):
      tokens_BN, cache = state
      offsets_B = jnp.full(tokens_BN.shape[0], i % max_decode_len)
      logits, cache = model.apply(
        variables, cache, offsets_B, tokens_BN, method='decode_block'
      )
      return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    tokens_BN = jnp.zeros((inputs.shape[0], num_positions), jnp.int32)
    return jax.lax.fori_loop(0, num_calls, body, (tokens_BN, cache))[0]

  def place_and_decode(params, inputs, num_calls):
    inputs = partitioning.put_global_batch(inputs, mesh)
    return np.asarray(decode(params, inputs, num_calls))

  return place_and_decode


def make_mean_reward(
  reward: rewards.Reward,
  reward_fn: rewards.RewardFn,
  params: Params,
  *,
  ids: SpecialIds,
  mesh: Mesh,
) -> MeanReward:
  """Returns (dataset, tokens [N, T]) -> mean reward.

  Args:
    reward: the reward.
    reward_fn: from its `make_reward_fn`.
    params: of its model; None if it has none.
    ids: of the student; EOS ends an output.
    mesh: rows are sharded over its data axis.
  """

  @jax.jit
  def sums(params, batch, tokens, is_example_B):
    ends = jnp.int32(tokens == ids.eos)
    weights = jnp.float32(jnp.cumsum(ends, axis=1) - ends == 0)
    rewards_B = rewards.compute(
      reward_fn, batch, Outputs(tokens, weights), params
    )
    return jnp.sum(rewards_B, where=is_example_B)

  def mean_reward(dataset, tokens):
    total = 0.0
    for row_ids_B, batch in dataset.batches():
      # Padding rows repeat the last example: a reward may reject empty ones.
      existing_B = np.minimum(row_ids_B, len(dataset) - 1)
      rows_B = existing_B - row_ids_B[0]
      batch = jax.tree.map(lambda x, rows_B=rows_B: x[rows_B], batch)
      placed = partitioning.put_global_batch(
        (batch, tokens[existing_B], row_ids_B < len(dataset)), mesh
      )
      total += float(sums(params, *placed))
      reward.raise_failure()
    return total / len(dataset)

  return mean_reward
