# SPDX-License-Identifier: Apache-2.0
"""Does a config fit a TPU slice, and how long is a step at the least?"""
