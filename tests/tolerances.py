# SPDX-License-Identifier: Apache-2.0
"""The one table of tolerances. A test that needs more states its reason beside the call."""

from __future__ import annotations

import torch

# Element-wise: |actual − expected| ≤ atol + rtol·|expected|. Norm-wise: ‖actual − expected‖ ≤ norm·‖expected‖.
# Half an ulp of the output dtype is 2^-11 (fp16), 2^-8 … 2^-9 (bf16); the rest is room for fp32 accumulation order.
ELEMENTWISE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NORMWISE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, scale: float = 1.0) -> None:
    """Compare with the FP64 oracle: NaN and infinities by position, the rest element-wise and by norm.

    `scale` multiplies both tolerances; give the reason where you use it.
    """
    assert expected.dtype == torch.float64, "the oracle computes in float64"
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}; expected {list(expected.shape)}"
    ours = actual.detach().to("cpu", torch.float64)
    expected = expected.to("cpu")
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isnan(ours), torch.isnan(expected)), "NaN at other positions than in the oracle"
    infinite = torch.isinf(expected)
    assert torch.equal(ours[infinite], expected[infinite]), "infinities differ from the oracle"
    assert torch.isfinite(ours[finite]).all(), "not finite where the oracle is"
    tolerance = scale * ELEMENTWISE[actual.dtype]
    torch.testing.assert_close(ours[finite], expected[finite], rtol=tolerance, atol=tolerance)
    error, norm = torch.linalg.vector_norm(ours[finite] - expected[finite]), torch.linalg.vector_norm(expected[finite])
    assert error <= scale * NORMWISE[actual.dtype] * norm + 1e-12, f"norm-wise error {error / norm:.2e}"
