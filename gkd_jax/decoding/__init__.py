# SPDX-License-Identifier: Apache-2.0
"""Generating outputs: sampling, beam search, the calculator."""
