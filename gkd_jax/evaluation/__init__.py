# SPDX-License-Identifier: Apache-2.0
"""Evaluation and inference of checkpoints."""
