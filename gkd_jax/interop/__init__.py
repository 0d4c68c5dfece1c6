# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other systems, read and written in their own formats."""
