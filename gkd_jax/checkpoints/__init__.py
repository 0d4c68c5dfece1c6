# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run, and of other systems, in and out."""
