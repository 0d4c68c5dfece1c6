# SPDX-License-Identifier: Apache-2.0
"""What finished runs amount to: tables, figures, and a page of them."""
