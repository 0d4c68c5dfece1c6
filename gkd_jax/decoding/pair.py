# SPDX-License-Identifier: Apache-2.0
"""Samples outputs that student and teacher write together, token by token.

One traced loop decodes both models: each reads the token that was chosen,
whoever wrote it. A function chooses it from the logits of both.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gkd_jax.batch import SpecialIds
from gkd_jax.decoding import sampler


class Side(NamedTuple):
  """One of the two models at one position."""

  logits_BV: jax.Array  # ids that may not occur are masked
  config: sampler.SamplerConfig


Uniform = Callable[[int], jax.Array]  # number of a stream -> [B] in [0, 1)

# (student, teacher, uniform) -> Drawn, with by_student_B. Stream 0 is the one
# that `sampler.sample` uses.
Choose = Callable[[Side, Side, Uniform], sampler.Drawn]


class PairRollout(NamedTuple):
  """Sampled outputs of two models."""

  rollout: sampler.Rollout
  by_student: jax.Array  # [B, T] bool; False where the weight is 0


def sample(
  decode_steps: tuple[sampler.DecodeStep, sampler.DecodeStep],
  caches: tuple[sampler.Cache, sampler.Cache],
  rng: jax.Array,
  configs: tuple[sampler.SamplerConfig, sampler.SamplerConfig],
  choose: Choose,
  *,
  row_ids_B: jax.Array,
  max_decode_len: int,
  ids: SpecialIds,
) -> PairRollout:
  """Draws one output per row; stops when every row has ended.

  Args:
    decode_steps: of the student and of the teacher; see `sampler.sample`. Their
      embeddings may have different sizes.
    caches: of both, before the first token.
    rng: key of this batch.
    configs: how each of them draws.
    choose: chooses the token of each row.
    row_ids_B: [B] int32 number of each row in the global batch.
    max_decode_len: T, at most.
    ids: what begins, ends and pads a row.
  """
  uniform = sampler.uniforms(rng, row_ids_B)

  def decode_step(caches, token_B):
    stepped = [
      step(cache, token_B)
      for step, cache in zip(decode_steps, caches, strict=True)
    ]
    return tuple(x for x, _ in stepped), tuple(cache for _, cache in stepped)

  def draw(logits, s):
    student, teacher = map(Side, logits, configs)
    return choose(student, teacher, lambda i: uniform(s.step, i)), s.queue

  end = sampler.run(
    decode_step,
    caches,
    draw,
    batch_size=row_ids_B.shape[0],
    max_decode_len=max_decode_len,
    ids=ids,
    records_author=True,
  )
  return PairRollout(end.rollout, end.by_student)


def interleave(top_k: int) -> Choose:
  """The student's token stands if the teacher ranks it among its top k.

  Otherwise the teacher draws (speculative knowledge distillation). The emitted
  token has the distribution r(v) = Q(v) [v in topK(P)] + (1 - Q(topK(P))) P(v).
  Its log-probability is that of the model that drew it.

  Args:
    top_k: ranks are those of the teacher's logits before temperature and
      cut-offs; ids that tie with the k-th are among the top k.
  """

  def choose(student, teacher, uniform):
    (ours_B, our_log_prob_B), (theirs_B, their_log_prob_B) = _draw_both(
      student, teacher, uniform
    )
    ours_BV = jnp.take_along_axis(teacher.logits_BV, ours_B[:, None], axis=1)
    # Counting needs no sort.
    rank_B = jnp.sum(teacher.logits_BV > ours_BV, axis=1)
    stands_B = rank_B < top_k
    return sampler.Drawn(
      jnp.where(stands_B, ours_B, theirs_B),
      jnp.where(stands_B, our_log_prob_B, their_log_prob_B),
      stands_B,
    )

  return choose


def mix(teacher_share: float, of_mixture: bool) -> Choose:
  """Each token is drawn from the teacher with probability a, or the student.

  The emitted token has the distribution a P + (1 - a) Q.

  Args:
    teacher_share: a, between 0 and 1.
    of_mixture: whether log-probabilities are those of the mixture, or of the
      model that drew the token.
  """

  def choose(student, teacher, uniform):
    (ours_B, our_log_prob_B), (theirs_B, their_log_prob_B) = _draw_both(
      student, teacher, uniform
    )
    by_student_B = uniform(2) >= teacher_share
    token_B = jnp.where(by_student_B, ours_B, theirs_B)
    if of_mixture:
      log_prob_B = jnp.logaddexp(
        jnp.log1p(-teacher_share) + sampler.log_probs_of(*student, token_B),
        jnp.log(teacher_share) + sampler.log_probs_of(*teacher, token_B),
      )
    else:
      log_prob_B = jnp.where(by_student_B, our_log_prob_B, their_log_prob_B)
    return sampler.Drawn(token_B, log_prob_B, by_student_B)

  return choose


def _draw_both(student: Side, teacher: Side, uniform: Uniform):
  """Returns (tokens [B], log-probabilities [B]) that each model draws."""
  return [
    sampler.draw_tokens(*side, functools.partial(uniform, i))
    for i, side in enumerate((student, teacher))
  ]
