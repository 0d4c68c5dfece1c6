# SPDX-License-Identifier: Apache-2.0
"""What a process needs while it runs: console, metrics, files, signals."""
