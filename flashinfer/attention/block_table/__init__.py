# SPDX-License-Identifier: Apache-2.0
"""Attention over a block table: a row of page numbers for each request, and its length, both on the device. Nothing is
planned by the caller: every call launches the planner of its kernel ahead of it, without waiting for the device.
"""
