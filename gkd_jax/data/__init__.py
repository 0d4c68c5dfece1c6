# SPDX-License-Identifier: Apache-2.0
"""From a seqio task to batches; the one place that imports TensorFlow."""
