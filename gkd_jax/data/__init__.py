# SPDX-License-Identifier: Apache-2.0
"""Datasets: seqio tasks to batches. Only this package imports TensorFlow."""
