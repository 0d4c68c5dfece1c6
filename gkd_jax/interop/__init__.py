# SPDX-License-Identifier: Apache-2.0
"""gkd_jax inside other systems' trainers."""
