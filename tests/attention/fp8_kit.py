# SPDX-License-Identifier: Apache-2.0
"""What prefill of fp8 queries may be off by, whichever kernel answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashinfer import target
from flashinfer.families.attention import prefill as families
from tests.attention import prefill_kit as kit
from tests.attention.prefill_kit import E4M3, Batch
from tests.oracles.attention import LOG2_E
from tests.tolerances import ELEMENTWISE


def multiplies_in_8_bits(device: torch.device, case: kit.Case) -> bool:
    """Whether the kernel that answers rounds probabilities to 8 bits; the others widen all they are given."""
    if device.type == "cpu" or case.q_dtype != E4M3:
        return False
    num_rows = sum(case.qo_lens) * case.heads[0] // case.heads[1]
    pos_encoding = case.options.get("pos_encoding_mode", "NONE")
    spec = families.prefill(
        target.of_device(device), q_dtype="fp8_e4m3", kv_dtype="fp8_e4m3", o_dtype="bf16", head_dim=case.head_dim,
        head_dim_vo=case.head_dim_vo, kv_storage=case.storage, page_size=case.page_size,
        queries=families.queries_of(num_rows, len(case.qo_lens), case.heads[1]),
        pos_encoding="rope" if pos_encoding == "ROPE_LLAMA" else "none",
    )  # fmt: skip
    return families.PREFILL.implementation(spec).params is families.Sm90PrefillParams


def check(
    device: torch.device,
    batch: Batch,
    actual: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> None:
    """As any other prefill, unless the tensor cores multiply in 8 bits. Then:

    Probabilities are rounded to e4m3, by at most 2^-4 of themselves, those below 2^-14 of the largest by 2^-18 of it;
    sums of products keep about 13 bits below the largest of them, over the scores' dimensions and the keys of a tile.
    So element-wise the output is off by (2^-4 + what the scores' error does) of the sum of p |v|, besides the rounding
    of the output. Norm-wise, rounding errors are independent: 2^-4 / sqrt(3) for a significand of 1, 0.74 times that
    over all of them, or 2.7%; 30% more are left to what accumulates.
    """
    expected = kit.expect(batch, **options) if expected is None else expected
    if not multiplies_in_8_bits(device, batch.case):
        kit.check(actual, expected, kit.tolerance_of(batch.case, device))
        return
    absolute, _ = kit.expect(replace(batch, v=[v.float().abs() for v in batch.v]), **options)
    case = batch.case
    sm_scale = case.options.get("sm_scale", case.head_dim**-0.5) * LOG2_E
    score_error = 0.0
    if len(batch.q) and any(map(len, batch.k)):
        q, k = (x.cpu().float().abs().amax((0, 1)) for x in (batch.q, torch.cat([k.float() for k in batch.k])))
        score_error = 2.0**-14 * float(q @ k) * sm_scale
    out, lse = actual[0].cpu().double(), actual[1].cpu().double()
    assert out.isfinite().all()
    rounding = ELEMENTWISE[actual[0].dtype] * (expected[0].abs() + 1e-2)
    error = (out - expected[0]).abs()
    bound = (2.0**-4 + 2.0**-8 + score_error) * absolute + rounding
    assert (error <= bound).all(), f"off by up to {(error / bound).max():.2f} of the bound"
    norm = torch.linalg.vector_norm(expected[0])
    assert torch.linalg.vector_norm(out - expected[0]) <= (0.035 + score_error) * norm + 1e-12
    infinite = expected[1].isinf()
    assert torch.equal(lse[infinite], expected[1][infinite])
    torch.testing.assert_close(lse[~infinite], expected[1][~infinite], atol=1e-3 + score_error, rtol=1e-4)
