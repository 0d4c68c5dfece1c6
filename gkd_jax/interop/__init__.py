# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other systems, read and written with their own file formats."""
