# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoders: their interface, layers, families and sizes."""
