# SPDX-License-Identifier: Apache-2.0
"""Products of segments of rows with weights of their own: adapters of requests (LoRA), experts of a mixture."""

from __future__ import annotations

from typing import Optional

import torch

from flashinfer.families.layout import DTYPES
from flashinfer.gemm.launch import Operands, multiply
from flashinfer.host import checks
from flashinfer.host.traced import is_dynamo_compiling

_OP = "SegmentGEMMWrapper.run"
_HALF = torch.float16, torch.bfloat16


class SegmentGEMMWrapper:
    """Multiplies segments of rows, of any lengths, each with one of many matrices. Keeps nothing between runs."""

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        """
        Args:
            float_workspace_buffer: accepted for compatibility; no kernel needs memory besides its operands.
            backend: "auto"; "sm80" and "sm90" choose nothing.

        Raises ValueError for another backend.
        """
        expected = "auto", "sm80", "sm90"
        checks.require(
            backend in expected, "SegmentGEMMWrapper", f"backend is {backend!r:.40}; expected one of {expected}"
        )

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Accepted for compatibility."""

    def run(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        batch_size: int,
        weight_column_major: bool,
        out: Optional[torch.Tensor] = None,
        seg_lens: Optional[torch.Tensor] = None,
        seg_indptr: Optional[torch.Tensor] = None,
        weight_indices: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """`out[segment i] = x[segment i] @ W[i]`, or `W[weight_indices[i]]`, summed in fp32.

        Args:
            x: `[num_rows, d_in]`, fp16 or bf16 (fp32 on the CPU).
            weights: `[num_weights, d_out, d_in]` if weight_column_major, else `[num_weights, d_in, d_out]`, the dtype
                of x. On a GPU d_in and d_out are multiples of 8.
            batch_size: the number of segments.
            weight_column_major: whether the rows of a weight run along d_in.
            out: `[num_rows, d_out]`, the dtype of x; rows of no segment are left as they are. Allocated when None, zero
                where no segment is.
            seg_lens: int32 or int64 `[batch_size]`: rows of each segment, one after the other. Unread with seg_indptr.
            seg_indptr: int32 or int64 `[batch_size + 1]`: segment i has the rows seg_indptr[i] to seg_indptr[i + 1].
            weight_indices: int32 or int64 `[batch_size]`; None: segment i has weight i. Below 0: its rows of out are
                left as they are.

        Returns:
            out.

        Raises:
            ValueError, TypeError: a shape, dtype, device or stride does not fit, or neither lengths nor offsets are
                given.
            IndexError: an offset or a weight past the end, where the host looks at them (docs/safety.md).
            UnsupportedConfig: a dtype or size without a kernel.
        """
        # Messages are made where there is a fault: every call passes here.
        if type(batch_size) is not int or batch_size < 0:
            batch_size = checks.integer(_OP, "batch_size", batch_size, 0)
        depth_major = checks.boolean(_OP, "weight_column_major", weight_column_major)
        for name, tensor in (("x", x), ("weights", weights)):
            if not isinstance(tensor, torch.Tensor):
                raise checks.not_tensors(_OP, **{name: tensor})
        if x.dim() != 2 or weights.dim() != 3:
            shapes = f"x has shape {list(x.shape)}, weights {list(weights.shape)}"
            raise ValueError(f"{_OP}: {shapes}; expected [num_rows, d_in] and 3 dimensions")
        if not is_dynamo_compiling() and x.dtype not in _HALF:
            checks.require_supported(_OP, "x", x, DTYPES if x.is_cpu else DTYPES[:2])
        indptr = self._offsets(batch_size, seg_lens, seg_indptr)
        if out is None:
            out = x.new_zeros((x.shape[0], weights.shape[1 if depth_major else 2]))
        elif not isinstance(out, torch.Tensor):
            raise checks.not_tensors(_OP, out=out)
        if out.dtype != x.dtype:
            checks.require_dtype_device(_OP, "out", out, x, "x")
        multiply(_OP, Operands(x, weights, None, None, indptr, weight_indices), out, depth_major)
        return out

    forward = run

    @staticmethod
    def _offsets(batch_size: int, lengths: Optional[torch.Tensor], offsets: Optional[torch.Tensor]) -> torch.Tensor:
        if offsets is not None:
            if not isinstance(offsets, torch.Tensor):
                raise checks.not_tensors(_OP, seg_indptr=offsets)
            if offsets.shape != (batch_size + 1,):
                checks.check_index(_OP, "seg_indptr", offsets, batch_size + 1)
            return offsets
        if lengths is None:
            raise ValueError(f"{_OP}: seg_lens and seg_indptr are None; expected one of them")
        if not isinstance(lengths, torch.Tensor):
            raise checks.not_tensors(_OP, seg_lens=lengths)
        checks.check_index(_OP, "seg_lens", lengths, batch_size)
        if not is_dynamo_compiling():
            checks.require_memory(_OP, seg_lens=lengths)
        return torch.nn.functional.pad(lengths.cumsum(0, dtype=lengths.dtype), (1, 0))
