# SPDX-License-Identifier: Apache-2.0
"""Writes text files: whole, and never over what is there."""

import os
import pathlib
from collections.abc import Iterable

from gkd_jax.parallel import hosts


def check_free(
  files: Iterable[str | os.PathLike], setting: str, overwrite: bool
) -> None:
  """Raises ValueError if results would replace files.

  Every command that writes results calls it, before it computes them.

  Args:
    files: that will be written.
    setting: name of their folder in gin, for errors.
    overwrite: whether OVERWRITE allows it.
  """
  there = [file for file in files if os.path.lexists(file)]
  if there and not overwrite:
    raise ValueError(
      f'{setting}: {os.fspath(there[0])} exists and would be overwritten. '
      f'Choose another {setting}, remove the file, or set --gin.OVERWRITE=True.'
    )


def write_atomically(path: str | os.PathLike, text: str) -> None:
  """Writes a file atomically and creates its folder. First host only."""
  if not hosts.is_first_host():
    return
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.partial')
  try:
    partial.write_text(text, encoding='utf-8')
  except OSError:
    partial.unlink(missing_ok=True)
    raise
  partial.rename(path)


class CheckpointMismatch(ValueError):
  """A checkpoint is intact but belongs to a run with other settings."""
