# SPDX-License-Identifier: Apache-2.0
"""A tensor whose storage was freed (`x.untyped_storage().resize_(0)`, as FSDP does between uses) has its shape and no
memory. Every operand of an operator is refused then, in a call whose launch is prepared as in a first one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from flashinfer.errors import UnsupportedConfig
from tests.fuzz.call import Call
from tests.fuzz.draw import Draw
from tests.fuzz.memory import Memory
from tests.fuzz.table import activation, attention, cases, gdn, gemm, norm, page, quantization, rope, sampling
from tests.public_calls import prepared_launches

NAMES = [
    *(name for module in (activation, gdn, gemm, norm, page, quantization, rope, sampling) for name in module.CASES),
    *attention.CASES,
]


_WITHOUT_MEMORY = "without memory|out of bounds for storage of size 0"  # ours; torch's own, of views


def plain(value: Any) -> Any:
    """Out of the fenced memory of the fuzzer, which is nobody's to free."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = plain(tensor)
    tensor.untyped_storage().resize_(0)
    return tensor


def replaced(call: Call) -> list[tuple[str, dict[str, Any]]]:
    """The same arguments, each tensor in turn without its memory; of a pair, one of the two."""
    arguments, others = call.arguments, []
    for name, value in arguments.items():
        is_read = name != "kv_last_page_len" or "append" not in call.name
        if isinstance(value, torch.Tensor) and value.numel() and is_read:
            others.append((name, {**arguments, name: freed(value)}))
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, torch.Tensor) and item.numel():
                    others.append((f"{name}[{i}]", {**arguments, name: (*value[:i], freed(item), *value[i + 1 :])}))
    return others


def legal_calls(name: str) -> Iterator[Call]:
    """Drawn by the fuzzer, in which sooner or later every operand is given."""
    for seed in range(40):
        memory = Memory()
        for step in cases()[name](Draw(name, seed, memory, narrow=True)):
            for call in step if isinstance(step, list) else [step]:
                if not call.changes:
                    yield replace(call, arguments={key: plain(value) for key, value in call.arguments.items()})
        memory.release()


@pytest.mark.parametrize("name", NAMES)
def test_an_operand_whose_storage_was_freed_is_refused(name: str) -> None:
    memos = prepared_launches()
    tried = set()
    for call in legal_calls(name):
        for argument, arguments in replaced(call):
            if argument in tried:
                continue
            tried.add(argument)
            for is_prepared in (False, True):
                for memo in memos:
                    memo.clear()
                if is_prepared:
                    call.function(**call.arguments)
                with pytest.raises((UnsupportedConfig, RuntimeError), match=_WITHOUT_MEMORY):
                    call.function(**arguments)
    assert tried
