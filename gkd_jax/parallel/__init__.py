# SPDX-License-Identifier: Apache-2.0
"""The device mesh, sharding rules, and multi-host runs."""
