# SPDX-License-Identifier: Apache-2.0
"""A student and a teacher of random parameters, for the tiny task's letters."""

import jax
import numpy as np

from gkd_jax.batch import mask_unused_ids
from gkd_jax.evaluation import programs
from gkd_jax.models.t5 import T5, T5Config
from gkd_jax.parallel import partitioning
from tests import tiny

# The byte vocabulary has 259 ids; the embeddings have 264 rows.
IDS = tiny.special_ids(259)
STUDENT = T5(T5Config(264, 12, 2, 4, 10, 1, 1))
TEACHER = T5(T5Config(264, 8, 1, 6, 14, 1, 2))
SETTINGS = {'seed': 3, 'mesh': partitioning.make_mesh()}


def make_write(decoding, model=STUDENT, num_outputs=1):
  """Returns (params, row numbers, batch) -> tokens [B, n, T]."""
  write = programs.make_write(
    model,
    decoding,
    num_outputs=num_outputs,
    max_decode_len=7,
    ids=IDS,
    **SETTINGS,
  )
  return lambda params, row_ids_B, batch: write(
    params, row_ids_B, batch.encoder_input_tokens
  )


def write_one(decoding, model=STUDENT):
  """Returns (params, row numbers, batch) -> tokens [B, T]."""
  write = make_write(decoding, model)
  return lambda *arguments: write(*arguments)[:, 0]


def write_all(dataset, write, params):
  return dataset.predict(lambda rows, batch: write(params, rows, batch))


def logits_of(model, params, inputs, targets):
  """The model's distribution at each place, as float64."""
  logits = jax.jit(model.apply)({'params': params}, inputs, targets)
  return np.float64(mask_unused_ids(logits, IDS))
