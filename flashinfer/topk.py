"""The largest elements of each row, and where they are.

By PyTorch's selection, which sorts nothing but what it found: no kernel of this library.
"""

from __future__ import annotations

from enum import IntEnum

import torch

from flashinfer.host import checks
from flashinfer.host.traced import is_dynamo_compiling

__all__ = ["TopKTieBreak", "top_k"]


class TopKTieBreak(IntEnum):
    """Which of equal elements are taken where not all can be."""

    NONE = 0  # any
    SMALL = 1  # those of smaller index
    LARGE = 2  # those of larger index


def top_k(
    input: torch.Tensor,
    k: int,
    sorted: bool = False,
    deterministic: bool = False,
    tie_break: int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[num_rows, k]`, of the input's dtype, and indices `[num_rows, k]`, int64, of each row's k largest.

    Args:
        input: `[num_rows, num_columns]` of fp32, fp16 or bf16, any strides. NaN is larger than everything.
        k: from 1 to num_columns.
        sorted: descending; in any order otherwise.
        deterministic, dsa_graph_safe: change nothing. Equal inputs give equal results on equal devices, and no call
            waits for the device.
        tie_break: of `TopKTieBreak`. SMALL and LARGE select among keys of 64 bits, which costs a pass over such.

    Raises TypeError or ValueError, UnsupportedConfig for another dtype.
    """
    if not is_dynamo_compiling():  # which has tensors without memory
        flags = {"sorted": sorted, "deterministic": deterministic, "dsa_graph_safe": dsa_graph_safe}
        k, tie_break = _checked("top_k", input, k, tie_break, flags)
    input = input.detach()
    if tie_break == TopKTieBreak.NONE:
        values, indices = torch.topk(input, k, dim=-1, sorted=bool(sorted))
        return values, indices
    indices = torch.topk(_keys(input, tie_break), k, dim=-1, sorted=bool(sorted)).indices
    return input.gather(-1, indices), indices


def _checked(op: str, input: torch.Tensor, k: int, tie_break: int, flags: dict[str, bool]) -> tuple[int, int]:
    checks.require_tensors(op, input=input)
    checks.require_supported(op, "input", input, ("fp32", "fp16", "bf16"))
    checks.require(input.dim() == 2, op, f"input is {list(input.shape)}; expected [num_rows, num_columns]")
    for name, flag in flags.items():
        checks.boolean(op, name, flag)
    k = checks.integer(op, "k", k, 1, input.shape[1])
    return k, checks.integer(op, "tie_break", tie_break, TopKTieBreak.NONE, TopKTieBreak.LARGE)


def _keys(input: torch.Tensor, tie_break: int) -> torch.Tensor:
    """Integers in the order of the elements, equal ones in that of preference; no two alike."""
    scores = input.float()
    scores = torch.where(scores.isnan(), torch.nan, scores)  # one NaN, above infinity
    bits = scores.view(torch.int32).long()
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # -0 is 0
    columns = torch.arange(input.shape[1], dtype=torch.int64, device=input.device)
    preference = columns if tie_break == TopKTieBreak.LARGE else input.shape[1] - 1 - columns
    return (ordered << 31) | preference
