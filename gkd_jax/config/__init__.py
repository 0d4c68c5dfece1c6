# SPDX-License-Identifier: Apache-2.0
"""gin: parsing, type checks, and errors that name the setting."""
