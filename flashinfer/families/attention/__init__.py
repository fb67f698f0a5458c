# SPDX-License-Identifier: Apache-2.0
"""Families of attention kernels."""
