# SPDX-License-Identifier: Apache-2.0
"""Functions of scores and masks of the examples, with extras, and a launch of them beside themselves in FP64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashinfer.utils import get_alibi_slopes
from flashinfer.variants import BoundFunction, Function
from tests.attention import decode_kit, fp8_kit, prefill_kit
from tests.attention.prefill_kit import Case

BATCH, LONGEST, HEADS = 4, 5000, 8


def bound(function: Function, device: torch.device, heads: int = HEADS, batch: int = BATCH) -> BoundFunction:
    """With extras that hide something, and not all."""
    generator = torch.Generator().manual_seed(7)
    L = 5  # noqa: N806

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    document = torch.arange(LONGEST).div(37, rounding_mode="floor").int().expand(batch, -1).contiguous()
    values: dict[str, dict[str, Any]] = {
        "t5": {"bias": draw(heads, 2 * L + 1), "L": L},
        "alibi": {"slopes": get_alibi_slopes(heads, device)},
        "soft_cap": {"cap": 3.0},
        "causal": {},
        "window_and_first": {"window": 40, "num_first": 4},
        "prefix_lm": {"prefix_len": torch.tensor([0, 50, 7, 300][:batch], dtype=torch.int32).to(device)},
        "documents": {"document": document.to(device)},
        "documents_from": {"start": (document * 37).to(device)},
        "chunked": {"chunk": 32},
        "head_scale": {"scale": draw(heads).abs()},
        "key_bias": {"bias": draw(batch, LONGEST)},
        "some_heads_local": {"is_local": (torch.arange(heads) % 2 == 0).to(device), "window": 20},
    }
    return function(**values[function.name])


def given(device: torch.device, *functions: Function, **shape: int) -> dict[str, BoundFunction]:
    return {"mask" if one.is_mask else "variant": bound(one, device, **shape) for one in functions}


def of_names(value: object) -> str:
    return "-".join(function.name for function in value) if isinstance(value, tuple) else getattr(value, "name", "")


def run_prefill(case: Case, device: torch.device, **options: Any) -> None:
    case = replace(case, options={**case.options, **options})
    batch = prefill_kit.make_batch(case, device)
    wrapper = prefill_kit.make_wrapper(case, device)
    prefill_kit.plan(wrapper, batch)
    fp8_kit.check(device, batch, prefill_kit.run(wrapper, batch))


def run_decode(case: decode_kit.Case, device: torch.device) -> None:
    batch = decode_kit.Batch(case, device)
    wrapper = decode_kit.make_wrapper(device, case.layout)
    batch.plan(wrapper)
    decode_kit.check(batch.run(wrapper), batch.expected(), case)
