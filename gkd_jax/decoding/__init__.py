# SPDX-License-Identifier: Apache-2.0
"""How a model writes: sampling, beam search, the calculator."""
