"""Families of attention kernels."""
