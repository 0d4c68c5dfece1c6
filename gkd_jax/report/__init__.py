# SPDX-License-Identifier: Apache-2.0
"""Finished runs to tables, figures and a page."""
