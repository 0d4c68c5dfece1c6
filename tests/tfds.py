# SPDX-License-Identifier: Apache-2.0
"""Data of ours in the place and format where TFDS would keep the real data."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock


def prepare_like(
  name: str,
  data_dir: str | pathlib.Path,
  splits: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
  """Prepares examples under a real builder's name, with its features.

  So all that reads the real data runs, without a download.
  """
  import tensorflow_datasets as tfds

  builder = tfds.builder(name, data_dir=str(data_dir))

  def generators(self, dl_manager):
    del self, dl_manager
    return {split: iter(enumerate(rows)) for split, rows in splits.items()}

  config = tfds.download.DownloadConfig(
    compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
  )
  with mock.patch.object(type(builder), '_split_generators', generators):
    builder.download_and_prepare(download_config=config)
