# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of evaluation: two models and ten examples."""

import numpy as np
import pytest

from gkd_jax.batch import Batch
from gkd_jax.data import datasets, iterators
from tests import conftest, tiny
from tests.letter_models import STUDENT, TEACHER


@pytest.fixture(scope='module')
def student_params():
  return tiny.params(STUDENT, seed=0)


@pytest.fixture(scope='module')
def teacher_params():
  return tiny.params(TEACHER, seed=1)


@pytest.fixture(scope='module')
def config(letters):
  """10 examples in batches of 4; the last batch has 2 rows of padding."""
  return datasets.DatasetConfig(
    letters, conftest.LENGTHS, batch_size=4, split='validation'
  )


@pytest.fixture(scope='module')
def dataset(config):
  return iterators.EvalDataset(config)


@pytest.fixture(scope='module')
def examples(dataset):
  """All examples in one batch, as arrays."""
  columns = zip(*(batch[:3] for _, batch in dataset.batches()), strict=True)
  return Batch(*(np.concatenate(c)[: len(dataset)] for c in columns))
