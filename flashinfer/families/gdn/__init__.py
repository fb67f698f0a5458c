"""Families of the gated delta rule."""
