# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats of other systems: read and written."""
