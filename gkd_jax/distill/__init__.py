# SPDX-License-Identifier: Apache-2.0
"""The method: policies, teachers, divergences, credit, and the fused step."""
