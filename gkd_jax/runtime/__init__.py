# SPDX-License-Identifier: Apache-2.0
"""Services of a running process: console, metrics, files, signals."""
