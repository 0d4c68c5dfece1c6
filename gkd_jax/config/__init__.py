# SPDX-License-Identifier: Apache-2.0
"""gin: parsing, checks of values, errors that name the setting."""
