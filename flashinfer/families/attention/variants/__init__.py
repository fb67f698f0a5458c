# SPDX-License-Identifier: Apache-2.0
"""Functions of scores and masks that a caller writes in Python: from source to a typed tree, to a canonical text that
names the kernel, to C++.

    tree.py    the tree, and the text
    parse.py   Python's syntax -> tree; everything outside the grammar is refused with file, line and column
    ranges.py  which part of a mask is a range of keys
    tiles.py   what is proved of a mask over a tile of queries and keys
    cxx.py     tree -> the struct that kernels know as Config::Function

The text is itself Python of this grammar. It is the value of the axis `variant` of a spec, so that records, configs and
registries hold all that it takes to build the kernel, and it is parsed again, and checked, wherever it is read.
"""

from __future__ import annotations

from flashinfer.families.attention.variants.parse import read
from flashinfer.families.attention.variants.tree import NONE, Variants

__all__ = ["NONE", "Variants", "VariantTexts", "VARIANT_TEXTS", "read"]


class VariantTexts:
    """The legal values of the axis `variant`: "none", and the canonical texts."""

    def __contains__(self, value: object) -> bool:
        if value == NONE:
            return True
        try:
            return isinstance(value, str) and read(value).text == value
        except ValueError:
            return False

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from (NONE, "what flashinfer.variant and flashinfer.mask make of functions")


VARIANT_TEXTS = VariantTexts()
