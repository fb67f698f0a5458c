"""Decode over one sequence, without a plan: the schedule follows from the length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Union

import torch

from flashinfer import _op
from flashinfer.attention import decode_launch as launching
from flashinfer.attention import kv_cache
from flashinfer.attention import plan as planning
from flashinfer.attention.variant import Variant, alibi_slopes_ptr
from flashinfer.kernels import attention as families

_ONE_ROW_PAGES = families.fast_divisor(1)


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: Optional[float] = None,
    k_scale: Optional[float] = None,
    v_scale: Optional[float] = None,
    window_left: int = -1,
    logits_soft_cap: Optional[float] = None,
    sm_scale: Optional[float] = None,
    rope_scale: Optional[float] = None,
    rope_theta: Optional[float] = None,
    return_lse: bool = False,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Attention of one query token over one sequence (split along the KV as in Flash-Decoding, Dao et al. 2023).

    Args:
        q: `[num_qo_heads, head_dim]`, fp16 or bf16 (fp32 on the CPU).
        k, v: `[kv_len, num_kv_heads, head_dim]` (NHD) or `[num_kv_heads, kv_len, head_dim]` (HND); the dtype of q, or
            fp8 e4m3 or e5m2. The head dimension of v may differ. kv_len may be 0.
        pos_encoding_mode: "NONE", "ROPE_LLAMA" (q and k are rotated on the fly, q at position kv_len - 1) or "ALIBI".
        use_tensor_cores: accepted for compatibility; one kernel serves every group size.
        q_scale, k_scale, v_scale: factors of quantized q, k and v.
        window_left: keys seen before the query's own position; -1 for all.
        logits_soft_cap: logits become `cap * tanh(logits / cap)`; None or 0 for none.
        sm_scale: factor of q·k; default `1 / sqrt(head_dim)`.
        rope_scale, rope_theta: of ROPE_LLAMA; default 1 and 1e4.

    Returns:
        `[num_qo_heads, head_dim]`, dtype of q; with return_lse also the base-2 logarithm of the sum of exponentials,
        fp32 `[num_qo_heads]`. Without keys: zeros and -inf.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit.
        UnsupportedConfig: no kernel for this dtype or head_dim.
    """
    if q.dim() != 2 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"single_decode: q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dimensions; expected 2, 3 and 3"
        )
    out = torch.empty((q.shape[0], v.shape[2]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) if return_lse else None
    options = (kv_layout, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
    run = _compiled if torch.compiler.is_dynamo_compiling() else _run
    run(q, k, v, out, lse, *options, q_scale, k_scale, v_scale)
    return out if lse is None else (out, lse)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: Optional[torch.Tensor],
    kv_layout: str,
    pos_encoding_mode: str,
    window_left: int,
    logits_soft_cap: Optional[float],
    sm_scale: Optional[float],
    rope_scale: Optional[float],
    rope_theta: Optional[float],
    q_scale: Optional[float],
    k_scale: Optional[float],
    v_scale: Optional[float],
) -> None:
    device_index = q.get_device()
    rows_axis = 0 if kv_layout == "NHD" else 1
    key = (
        q.dtype, q.shape, q.stride(), k.dtype, k.stride(), k.shape[1 - rows_axis], k.shape[-1], k.get_device(),
        v.dtype, v.stride(), v.shape[-1], v.get_device(), device_index, kv_layout, pos_encoding_mode, window_left,
        logits_soft_cap, sm_scale, rope_scale, rope_theta, q_scale, k_scale, v_scale,
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
    )  # fmt: skip
    single = _singles.get(key)
    if single is None or k.shape[rows_axis] != v.shape[rows_axis]:
        variant = Variant.of(
            "single_decode",
            q.shape[-1],
            pos_encoding_mode,
            window_left,
            logits_soft_cap,
            sm_scale,
            rope_scale,
            rope_theta,
        )
        scales = launching.qk_and_v_scale("single_decode", q_scale, k_scale, v_scale)
        single = _singles.remember(key, _Single(q, k, v, kv_layout, variant, scales))
    single.launch(q, k, v, out, lse, k.shape[rows_axis])


_compiled = _op.compiled_op(
    "single_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!)? lse, str kv_layout, "
    "str pos_encoding_mode, int window_left, float? logits_soft_cap, float? sm_scale, float? rope_scale, "
    "float? rope_theta, float? q_scale, float? k_scale, float? v_scale) -> ()",
    _run,
)


class _Single:
    """single_decode_with_kv_cache for one signature; the length may differ from call to call."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_layout: str,
        variant: Variant,
        scales: tuple[float, float],
    ) -> None:
        op = "single_decode"
        kv_cache.require_layout(op, kv_layout)
        rows, heads = (0, 1) if kv_layout == "NHD" else (1, 0)
        num_qo_heads, num_kv_heads = q.shape[0], k.shape[heads]
        _op.require(
            k.shape[-1] == q.shape[-1],
            op,
            f"k dim 2 (head_dim) is {k.shape[-1]}, q has {q.shape[-1]}; they must be equal",
        )
        _op.require(
            k.shape[:2] == v.shape[:2],
            op,
            f"k has shape {list(k.shape)}, v {list(v.shape)}; lengths and heads must agree",
        )
        _op.require(k.dtype == v.dtype, op, f"k is {k.dtype}, v {v.dtype}; expected one dtype")
        launching.require_heads(op, num_qo_heads, num_kv_heads)
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            _op.require_device(op, name, tensor, q, "q")
            launching.require_rows(op, name, tensor)
        device = launching.with_index(q.device)
        self.kernel = launching.load_kernel(
            device, q.dtype, k.dtype, q.dtype, q.shape[1], v.shape[2], num_qo_heads, num_kv_heads, "single",
            tuple(variant.spec_args.items()), launching.launches_dependent(device),
        )  # fmt: skip
        self.device, self.num_qo_heads, self.head_dim_vo = device, num_qo_heads, v.shape[2]
        self.scratches: dict[tuple[int, int], tuple[int, int, int]] = {}
        strides = (k.stride(rows), 0, k.stride(heads), v.stride(rows), 0, v.stride(heads))
        self.kv_values = (0, 0, 0, *strides, *_ONE_ROW_PAGES)
        self.pointers = (0, 0, 0, alibi_slopes_ptr(variant, num_qo_heads, device), 0, 0, 0)
        self.strides = (0, q.stride(0), 0, self.head_dim_vo)
        self.counts = (1, num_qo_heads, num_kv_heads, 1)
        self.window_left = variant.window_left
        self.scalars = (variant.window_left, *variant.scalars(*scales, plan_is_settled=True))

    def launch(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: Optional[torch.Tensor],
        kv_len: int,
    ) -> None:
        kernel, stream, grid, num_chunks, scratch = self.kernel, 0, (1, 1, 1), 0, (0, 0, 0)
        if self.device.type == "cuda":
            stream = _op.current_stream(self.device.index)
            visible = kv_len if self.window_left < 0 else min(kv_len, self.window_left + 1)
            num_chunks = max(1, min(kernel.num_chunks, -(-visible // kernel.tile_len)))
            grid = (kernel.num_head_blocks, num_chunks, 1)
            if num_chunks > 1:
                if torch.cuda.is_current_stream_capturing():
                    # A graph has scratch of its own, zeroed by the graph, so that a replay disturbs no other launch.
                    graph_scratch = self.make_scratch(num_chunks)
                    scratch = graph_scratch.addresses
                else:
                    scratch = self.scratches.get((stream, num_chunks)) or self.find_scratch(stream, num_chunks)
        kernel.launcher(
            grid, stream, q.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(), k.data_ptr(),
            v.data_ptr(), *self.kv_values, kv_len, *self.pointers, *scratch, *self.strides, *self.counts, num_chunks,
            *self.scalars,
        )  # fmt: skip

    def find_scratch(self, stream: int, num_chunks: int) -> tuple[int, int, int]:
        out_bytes, lse_bytes = planning.decode_partial_bytes(num_chunks, self.num_qo_heads, self.head_dim_vo)
        size_class = (out_bytes + lse_bytes).bit_length()
        key = (self.device.index, stream, self.kernel.num_head_blocks, size_class)
        found = _scratches.get(key)
        if found is None:
            found = _scratches[key] = self.make_scratch(num_chunks, 1 << size_class)
        counters, partial_out, _ = found.addresses
        self.scratches[stream, num_chunks] = (counters, partial_out, partial_out + out_bytes)
        return self.scratches[stream, num_chunks]

    def make_scratch(self, num_chunks: int, num_bytes: int = 0) -> _Scratch:
        out_bytes, lse_bytes = planning.decode_partial_bytes(num_chunks, self.num_qo_heads, self.head_dim_vo)
        counters = torch.zeros(self.kernel.num_head_blocks, dtype=torch.int32, device=self.device)
        partials = torch.empty(max(num_bytes, out_bytes + lse_bytes), dtype=torch.uint8, device=self.device)
        address = partials.data_ptr()
        return _Scratch(counters, partials, (counters.data_ptr(), address, address + out_bytes))


@dataclass(frozen=True)
class _Scratch:
    """Counters (zero between launches) and partial results of unplanned decodes on one stream."""

    counters: torch.Tensor
    partials: torch.Tensor
    addresses: tuple[int, int, int]  # counters, partial_out, partial_lse


# (device, stream, counters, log2 of bytes) -> scratch. Never freed, so that addresses stay valid; sizes are powers of
# two.
_scratches: dict[tuple[int, int, int, int], _Scratch] = {}
_singles: _op.Memo[_Single] = _op.Memo()
