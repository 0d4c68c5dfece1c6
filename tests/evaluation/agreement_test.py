# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from gkd_jax import build
from gkd_jax.batch import mask_unused_ids
from gkd_jax.decoding import sampler
from gkd_jax.decoding.speculative import Drafting
from gkd_jax.distill import grading, teachers
from gkd_jax.evaluation import agreement, drafting
from gkd_jax.experiment import Draft
from tests.letter_models import (
  IDS,
  SETTINGS,
  TEACHER,
  logits_of,
  write_all,
  write_one,
)

T = 7


def test_rounds_are_those_of_a_position_independent_rate():
  # DistillSpec's formula, far from the end: (1 - a ** (n + 1)) / (1 - a).
  accepts = np.full((1, 4000), 0.4742430437)

  for length, want in ((3, 1.8058098343), (5, 1.8803813490), (7, 1.8971529647)):
    rounds = agreement.expected_rounds(accepts, np.array([4000]), length)
    assert 4000 / rounds[0] == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize(
  ('accepts', 'length', 'rounds'),
  [
    ([1, 1, 1, 1, 1, 1, 1], 7, 2),  # four tokens a round
    ([1, 1, 1, 1, 1, 1, 1], 3, 1),
    ([0, 0, 0, 0, 0, 0, 0], 5, 5),
    ([1, 0, 1, 1, 1, 1, 1], 6, 2),  # two, then four
    ([0.5, 0, 0, 0, 0, 0, 0], 2, 1.5),
  ],
)
def test_rounds_of_an_output(accepts, length, rounds):
  got = agreement.expected_rounds(np.array([accepts]), np.array([length]), 3)

  assert got == pytest.approx([rounds])


@pytest.mark.slow
def test_a_student_near_its_teacher_is_measured_as_its_draft(
  dataset, teacher_params
):
  near = jax.tree.map(lambda x: x * 1.1 + 0.01, teacher_params)
  teacher = build.Model(TEACHER, teacher_params)
  grader = grading.make_grader(teachers.checkpoint(), TEACHER, TEACHER)
  measure = agreement.Agreement(
    TEACHER,
    teacher,
    grader,
    max_decode_len=T,
    ids=IDS,
    is_timed=True,
    **SETTINGS,
  )

  values = measure(near, dataset)

  assert [*values] == agreement.names(is_timed=True)
  batches = [batch for _, batch in dataset.batches()]
  inputs = np.concatenate([x.encoder_input_tokens for x in batches])
  inputs = inputs[: len(dataset)]
  for name, config in (
    ('greedy', sampler.GREEDY),
    ('sampled', sampler.ANCESTRAL),
  ):
    tokens = write_all(dataset, write_one(config, TEACHER), teacher_params)
    both = [
      np.float64(
        mask_unused_ids(logits_of(TEACHER, params, inputs, tokens), IDS)
      )
      for params in (teacher_params, near)
    ]
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in both)
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    overlap = np.minimum(p, q).sum(-1)
    if name == 'greedy':
      overlap = p.argmax(-1) == q.argmax(-1)
    want = overlap[tokens != 0].mean()
    # float32 softmax against float64.
    assert values[f'as_draft/acceptance_{name}'] == pytest.approx(
      want, abs=1e-5
    )
    assert 0.3 < want < 1.0
    assert values[f'as_draft/predicted_speedup_3_{name}'] > 0.0

  # What it predicts is what greedy decoding with this draft does.
  writer = drafting.Writer(
    TEACHER,
    drafting.Drafter(
      build.Model(TEACHER, near),
      Draft(checkpoint_path='x', drafting=Drafting(3), compared_batches=0),
      {},
    ),
    sampler.GREEDY,
    num_outputs=1,
    max_decode_len=T,
    ids=IDS,
    **SETTINGS,
  )
  dataset.predict(
    lambda rows, batch: writer(
      teacher_params, rows, batch.encoder_input_tokens
    )[:, 0]
  )
  assert writer.take_metrics()['block_efficiency'] == pytest.approx(
    values['as_draft/block_efficiency_3_greedy']
  )
