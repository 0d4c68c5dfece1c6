# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and several hosts of one run."""
