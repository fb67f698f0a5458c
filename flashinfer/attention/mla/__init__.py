"""Queries over a latent cache (multi-head latent attention)."""
