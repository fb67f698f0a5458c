# SPDX-License-Identifier: Apache-2.0
"""Families of the gated delta rule."""
