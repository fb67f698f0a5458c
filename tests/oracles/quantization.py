# SPDX-License-Identifier: Apache-2.0
"""Packing bit by bit in Python."""

from __future__ import annotations


def packbits(booleans: list[bool], bitorder: str) -> list[int]:
    packed = []
    for begin in range(0, len(booleans), 8):
        byte = 0
        for i, boolean in enumerate(booleans[begin : begin + 8]):
            byte |= int(boolean) << (i if bitorder == "little" else 7 - i)
        packed.append(byte)
    return packed
