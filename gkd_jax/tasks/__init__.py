# SPDX-License-Identifier: Apache-2.0
"""Seqio tasks: importing a module loads TensorFlow and registers its task."""
