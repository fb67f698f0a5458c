# SPDX-License-Identifier: Apache-2.0
"""Batches of products of fp8 matrices: PyTorch's scaled product, one after the other."""

from __future__ import annotations

from typing import Optional

import torch

from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks
from flashinfer.host.rows import require_distinct
from flashinfer.host.traced import is_dynamo_compiling

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def bmm_fp8(
    A: torch.Tensor,  # noqa: N803
    B: torch.Tensor,  # noqa: N803
    A_scale: torch.Tensor,  # noqa: N803
    B_scale: torch.Tensor,  # noqa: N803
    dtype: torch.dtype,
    out: Optional[torch.Tensor] = None,
    backend: str = "cublas",
) -> torch.Tensor:
    """`A_scale * B_scale * A @ B`, `[batch, m, n]`, summed in fp32 and rounded once; on a GPU the sums are those of its
    matrix unit, which on Hopper keeps some 14 bits of the products that it adds (DeepSeek-V3's report, section 3.3.2).

    Args:
        A: `[batch, m, k]` of fp8, each matrix row-major.
        B: `[batch, k, n]` of fp8, each matrix column-major. Not both e5m2; on a GPU k and n are multiples of 16.
        A_scale, B_scale: fp32, one element.
        dtype: of the result, fp16 or bf16.
        out: written if given, `[batch, m, n]` of that dtype.
        backend: chooses nothing.

    Raises TypeError or ValueError, UnsupportedConfig for other dtypes and sizes.
    """
    if not is_dynamo_compiling():  # which has tensors without memory
        _check("bmm_fp8", A, B, A_scale, B_scale, dtype, out)
    if torch.is_autocast_enabled(A.device.type):  # would give the CPU's product another dtype on the way
        with torch.autocast(A.device.type, enabled=False):
            return _product(A, B, A_scale, B_scale, dtype, out)
    return _product(A, B, A_scale, B_scale, dtype, out)


def _product(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    dtype: torch.dtype,
    out: Optional[torch.Tensor],
) -> torch.Tensor:
    scales = a_scale.reshape(()), b_scale.reshape(())
    products = (torch._scaled_mm(x, y, *scales, out_dtype=dtype) for x, y in zip(a.unbind(), b.unbind()))
    if out is None:
        if a.shape[0] == 1:
            return next(products)[None]
        out = torch.empty((a.shape[0], a.shape[1], b.shape[2]), dtype=dtype, device=a.device)
    for i, product in enumerate(products):
        out[i].copy_(product)
    return out


def _check(
    op: str,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    dtype: torch.dtype,
    out: Optional[torch.Tensor],
) -> None:
    checks.require_tensors(op, A=a, B=b, A_scale=a_scale, B_scale=b_scale)
    if a.dtype not in _FP8 or b.dtype not in _FP8 or a.dtype == b.dtype == torch.float8_e5m2:
        raise UnsupportedConfig(f"{op}: A is {a.dtype}, B {b.dtype}; expected fp8, one of them float8_e4m3fn")
    if dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedConfig(f"{op}: dtype is {dtype!r:.60}; expected torch.float16 or torch.bfloat16")
    fits = a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1] > 0
    checks.require(fits, op, f"A is {list(a.shape)}, B {list(b.shape)}; expected [batch, m, k] and [batch, k, n]")
    (m, k), n = a.shape[1:], b.shape[2]
    _require_dense_rows(op, "A", a, "row-major, call .contiguous()")
    _require_dense_rows(op, "B", b.mT, "column-major, call .mT.contiguous().mT")
    checks.require_device(op, "B", b, a, "A")
    if a.is_cuda and (k % 16 or n % 16):
        raise UnsupportedConfig(f"{op}: A is {list(a.shape)}, B {list(b.shape)}; expected k and n in multiples of 16")
    for name, scale in (("A_scale", a_scale), ("B_scale", b_scale)):
        is_one = scale.dtype == torch.float32 and scale.numel() == 1
        checks.require(is_one, op, f"{name} is {scale.dtype} {list(scale.shape)}; expected one element of float32")
        checks.require_device(op, name, scale, a, "A")
    if out is not None:
        checks.require_tensors(op, out=out)
        wanted = (a.shape[0], m, n)
        is_like = out.shape == wanted and out.dtype == dtype
        checks.require(is_like, op, f"out is {out.dtype} {list(out.shape)}; expected {dtype} {list(wanted)}")
        checks.require_device(op, "out", out, a, "A")
        require_distinct(op, "out", out)


def _require_dense_rows(op: str, name: str, matrices: torch.Tensor, expected: str) -> None:
    num_rows, width = matrices.shape[1:]
    is_dense = (width == 1 or matrices.stride(2) == 1) and (num_rows <= 1 or matrices.stride(1) >= width)
    checks.require(is_dense, op, f"{name} has strides {list(matrices.stride())}; expected each matrix {expected}")
