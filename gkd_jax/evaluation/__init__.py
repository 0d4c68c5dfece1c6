# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint writes, and how good it is."""
