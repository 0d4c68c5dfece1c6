# SPDX-License-Identifier: Apache-2.0
"""Puts gin/ and configs/ into a wheel; the rest is in pyproject.toml."""

import os
import pathlib

import setuptools
from setuptools.command import build_py

# In the package, where gkd_jax.runtime.paths.gin_folders finds them.
_TARGET = 'gkd_jax/_assets'


class BuildPy(build_py.build_py):
  """Copies the gin files, too; an editable install reads them in the clone."""

  def run(self):
    """Builds the package."""
    super().run()
    if self.editable_mode:
      return
    for folder in ('gin', 'configs'):
      for file in sorted(pathlib.Path(folder).rglob('*.gin')):
        target = os.path.join(self.build_lib, _TARGET, file)
        self.mkpath(os.path.dirname(target))
        self.copy_file(str(file), target)


setuptools.setup(cmdclass={'build_py': BuildPy})
