# SPDX-License-Identifier: Apache-2.0
"""Queries over a latent cache (multi-head latent attention)."""
