"""Every public function: a generator of cases under its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.fuzz.call import Call
from tests.fuzz.draw import Draw

Case = Callable[[Draw], Iterator[Call]]


def cases() -> dict[str, Case]:
    from tests.fuzz.table import activation, norm, page, quantization, rope, sampling

    table: dict[str, Case] = {}
    for module in (norm, activation, page, quantization, rope, sampling):
        table.update(module.CASES)
    return table
