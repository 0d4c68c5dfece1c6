# SPDX-License-Identifier: Apache-2.0
"""Atomic writes of text files."""

import os
import pathlib

from gkd_jax.parallel import hosts


def write_atomically(path: str | os.PathLike, text: str) -> None:
  """Writes a file atomically and creates its folder. First host only."""
  if not hosts.is_first_host():
    return
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.partial')
  try:
    partial.write_text(text)
  except OSError:
    partial.unlink(missing_ok=True)
    raise
  partial.rename(path)


class CheckpointMismatch(ValueError):
  """A checkpoint is intact but belongs to a run with other settings."""
