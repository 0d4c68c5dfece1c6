# SPDX-License-Identifier: Apache-2.0
"""Modules that tests.processes imports before it forks."""

import seqio  # noqa: F401

import gkd_jax.evaluation.infer  # noqa: F401
import gkd_jax.train  # noqa: F401
from gkd_jax.data.tasks import cmudict_g2p

cmudict_g2p.words()
