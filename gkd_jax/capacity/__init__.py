# SPDX-License-Identifier: Apache-2.0
"""Capacity planning: memory and a lower bound of the step time on TPUs."""
