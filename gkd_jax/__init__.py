# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation of T5 encoder-decoders in JAX."""
