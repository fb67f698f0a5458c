# SPDX-License-Identifier: Apache-2.0
"""Decode over one sequence, without a plan: the schedule follows from the length."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

import torch

from flashinfer.attention.decode import launch as launches
from flashinfer.attention.decode.launch import Schedule
from flashinfer.attention.plan import dtype_of
from flashinfer.attention.planned import DataType
from flashinfer.attention.sequence import check_sequence
from flashinfer.attention.variant import (
    Factors,
    Functional,
    GivenScale,
    Variant,
    are_plain,
    functions_are_planned,
    read_scales,
    require_sinks,
    signature_of_sinks,
)
from flashinfer.families.attention.params import ADDRESSES
from flashinfer.families.layout import fast_divisor
from flashinfer.host import checks, memo, traced
from flashinfer.host.checks import LOWEST_ADDRESS
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.jit.loader import PreparedLaunch
from flashinfer.variants import launch_functions

_OP = "single_decode"


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: GivenScale = None,
    k_scale: GivenScale = None,
    v_scale: GivenScale = None,
    window_left: int = -1,
    logits_soft_cap: Optional[float] = None,
    sm_scale: Optional[float] = None,
    rope_scale: Optional[float] = None,
    rope_theta: Optional[float] = None,
    return_lse: bool = False,
    *,
    sinks: Optional[torch.Tensor] = None,
    o_dtype: Optional[DataType] = None,
    variant: Optional[Functional] = None,
    mask: Optional[Functional] = None,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Attention of one query token over one sequence (split along the KV as in Flash-Decoding, Dao et al. 2023).

    Args:
        q: `[num_qo_heads, head_dim]`, fp16 or bf16 (fp32 on the CPU), or fp8 e4m3 where k and v are too.
        k, v: `[kv_len, num_kv_heads, head_dim]` (NHD) or `[num_kv_heads, kv_len, head_dim]` (HND); the dtype of q, or
            fp8 e4m3 or e5m2. The head dimension of v may differ. kv_len may be 0.
        pos_encoding_mode: "NONE", "ROPE_LLAMA" (q and k are rotated on the fly, q at position kv_len - 1) or "ALIBI".
        use_tensor_cores: accepted for compatibility; one kernel serves every group size.
        q_scale, k_scale, v_scale: factors of quantized q, k and v, numbers or one float32 on the device, which
            the kernel alone reads; those of q and k are positive.
        window_left: keys seen before the query's own position; -1 for all.
        logits_soft_cap: logits become `cap * tanh(logits / cap)`; None or 0 for none.
        sm_scale: factor of q·k; default `1 / sqrt(head_dim)`.
        rope_scale, rope_theta: of ROPE_LLAMA; default 1 and 1e4.
        sinks: fp32 `[num_qo_heads]`, a logit for each query head that takes part in the softmax as a key without a
            value would (GPT-OSS): one more term exp(sinks[h]) of the denominator, on which no scale and no soft cap has
            an effect. -inf for none.
        o_dtype: of the output; default that of q. Needed where q is fp8.
        variant, mask: as in `single_prefill_with_kv_cache`.

    Returns:
        `[num_qo_heads, head_dim]`, dtype of q or o_dtype; with return_lse also the base-2 logarithm of the sum of
        exponentials, that of the sink included, fp32 `[num_qo_heads]`. Without keys: zeros and -inf, or the LSE of the
        sink alone.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit.
        UnsupportedConfig: no kernel for this dtype or head_dim.
    """
    try:
        if q.dim() != 2 or k.dim() != 3 or v.dim() != 3:
            raise ValueError(
                f"{_OP}: q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dimensions; expected 2, 3 and 3"
            )
    except AttributeError:
        raise checks.not_tensors(_OP, q=q, k=k, v=v) from None
    options = (kv_layout, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
    scales = (q_scale, k_scale, v_scale)
    if is_dynamo_compiling():
        if variant is not None or mask is not None:
            raise functions_are_planned(_OP)
        out_dtype = q.dtype if o_dtype is None else dtype_of(_OP, "o_dtype", o_dtype)
        out = torch.empty((q.shape[0], v.shape[2]), dtype=out_dtype, device=q.device)
        lse = torch.empty(q.shape[:1], dtype=torch.float32, device=q.device) if return_lse else None
        _door(q, k, v, out, lse, sinks, options, *scales)
        return out if lse is None else (out, lse)
    return _run(q, k, v, None, None, return_lse, o_dtype, sinks, options, scales, (variant, mask))


# kv_layout; arguments of Variant.of after head_dim.
_Options = tuple[Any, ...]


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
    return_lse: bool,
    o_dtype: Optional[DataType],
    sinks: Optional[torch.Tensor],
    options: _Options,
    scales: tuple[Any, ...],
    functions: tuple[Any, Any] = (None, None),
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    rows, heads = (0, 1) if options[0] == "NHD" else (1, 0)
    q_ptr, k_ptr, v_ptr, k_shape, v_shape = q.data_ptr(), k.data_ptr(), v.data_ptr(), k.shape, v.shape
    if q_ptr < LOWEST_ADDRESS or k_ptr < LOWEST_ADDRESS or v_ptr < LOWEST_ADDRESS:
        q_ptr, k_ptr, v_ptr = (checks.low_address(_OP, name, x) for name, x in {"q": q, "k": k, "v": v}.items())
    sinks_ptr, sinks_key = (0, None) if sinks is None else signature_of_sinks(_OP, sinks)
    if scales != _NO_SCALES and not are_plain(scales):
        scales = read_scales(_OP, dict(zip(_SCALES, scales)), q.device)
    kv_len = k_shape[rows]  # no part of the key: it grows from call to call
    key = (
        q.dtype, q.shape, q.stride(), q.device, k.dtype, k_shape[heads], k_shape[2], k.stride(), k.get_device(),
        v.dtype, v_shape[heads], v_shape[2], v.stride(), v.get_device(), sinks_key, options, scales, o_dtype,
        functions, (q_ptr | k_ptr | v_ptr) & 15,
    )  # fmt: skip
    single = _singles.find(key)
    if single is None or v_shape[rows] != kv_len:
        single = _BoundSingle(q, k, v, sinks, options, scales, o_dtype, functions)
        keep = _singles.hold if single.holds_tensors else _singles.remember
        keep(key, single)
    if out is None:
        out = single.new_out()
    if return_lse and lse is None:
        lse = single.new_lse()
    single.launch(sinks_ptr, q_ptr, out.data_ptr(), 0 if lse is None else lse.data_ptr(), k_ptr, v_ptr, kv_len)
    return out if lse is None else (out, lse)


_SCALES = ("q_scale", "k_scale", "v_scale")
_NO_SCALES = (None,) * len(_SCALES)
_OPTIONS = {
    "kv_layout": "str",
    "pos_encoding_mode": "str",
    "window_left": "int",
    **dict.fromkeys(("logits_soft_cap", "sm_scale", "rope_scale", "rope_theta"), "float?"),
}
_door = traced.door(
    "single_decode",
    lambda q, k, v, out, lse, sinks, options, *scales: _run(
        q, k, v, out, lse, False, out.dtype, sinks, options, scales
    ),
    {
        **dict.fromkeys("qkv", "Tensor"),
        "out": "Tensor(!)",
        "lse": "Tensor(!)?",
        "sinks": "Tensor?",
        "options": traced.fields(lambda *options: options, *(f"{kind} {name}" for name, kind in _OPTIONS.items())),
        **dict.fromkeys(_SCALES, traced.REAL),
    },
)


class _BoundSingle:
    """single_decode_with_kv_cache for one signature; the length may differ from call to call."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: Optional[torch.Tensor],
        options: _Options,
        scales: tuple[Any, ...],
        o_dtype: Optional[DataType],
        functions: tuple[Any, Any],
    ) -> None:
        op, (kv_layout, *variant_options) = _OP, options
        factors = Factors.of(op, *((scale,) for scale in scales))
        sequence, device = check_sequence(op, q, k, v, kv_layout), q.device
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, _, kv_strides = sequence
        launched = launch_functions(
            op, *functions, device, batch_size=1, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads
        )
        variant = Variant.of(op, head_dim_qk, *variant_options, has_sinks=sinks is not None, functions=launched)
        self.holds_tensors = launched is not None and launched.holds_tensors
        if sinks is not None:
            require_sinks(op, sinks, num_qo_heads, device)
        out_dtype = q.dtype if o_dtype is None else dtype_of(op, "o_dtype", o_dtype)
        self.kernel = launches.load_kernel(
            device, (q.dtype, k.dtype, out_dtype), (head_dim_qk, head_dim_vo), (num_qo_heads, num_kv_heads), "single",
            variant, device_scales=factors.device_scales,
        )  # fmt: skip
        self.new_out = memo.allocator((num_qo_heads, head_dim_vo), out_dtype, device)
        self.new_lse = memo.allocator((num_qo_heads,), torch.float32, device)
        self.device, self.num_qo_heads, self.head_dim_vo = device, num_qo_heads, head_dim_vo
        self.window_left = variant.window_left
        self.values = {
            **fast_divisor("kv.index.page_size", 1),
            **kv_strides.values,
            "q_token_stride": 0,
            "q_head_stride": q.stride(0),
            "out_token_stride": 0,
            "out_head_stride": head_dim_vo,
            "batch_size": 1,
            "num_qo_heads": num_qo_heads,
            "num_kv_heads": num_kv_heads,
            **variant.values(num_qo_heads, head_dim_qk, device, factors),
            "num_tokens": 0,  # of mixed batches
            "plan_is_settled": launched is None,  # what bounds of a mask read, the kernel before may write
        }
        self.launch_whole = self.prepare(1)
        self.launches: dict[tuple[int, int], PreparedLaunch] = {}  # (stream, number of chunks)

    def launch(self, sinks: int, q: int, out: int, lse: int, k: int, v: int, kv_len: int) -> None:
        """On the current stream; every tensor by its address."""
        visible = kv_len if self.window_left < 0 else min(kv_len, self.window_left + 1)
        num_chunks = min(self.kernel.num_chunks, -(-visible // self.kernel.tile_len))
        if num_chunks <= 1:
            launch = self.launch_whole
        elif torch.cuda.is_current_stream_capturing():
            # A graph has scratch of its own, zeroed by the graph, so that a replay disturbs no other launch.
            scratch = self.make_scratch(num_chunks)
            launch = self.prepare(num_chunks, scratch)
        else:
            stream = memo.current_stream(self.device.index)
            launch = self.launches.get((stream, num_chunks)) or self.prepare_on(stream, num_chunks)
        launch(sinks, q, out, lse, k, v, 0, 0, 0, kv_len)

    def prepare(self, num_chunks: int, scratch: Optional[_Scratch] = None) -> PreparedLaunch:
        """A launch that takes addresses and the length. It does not keep the scratch alive."""
        schedule = Schedule()
        if scratch is not None:
            schedule = scratch.as_schedule(self.partial_bytes(num_chunks)[0])
        grid = (self.kernel.num_head_blocks, num_chunks, 1)
        return self.kernel.launcher.prepare(
            grid, {**self.values, **schedule.values}, varying=(*ADDRESSES, "kv.index.len")
        )

    def prepare_on(self, stream: int, num_chunks: int) -> PreparedLaunch:
        out_bytes, lse_bytes = self.partial_bytes(num_chunks)
        size_class = (out_bytes + lse_bytes).bit_length()
        key = (self.device.index, stream, self.kernel.num_chunks, self.kernel.num_head_blocks, size_class)
        scratch = _scratches.get(key) or _scratches.setdefault(key, self.make_scratch(num_chunks, 1 << size_class))
        launch = self.launches[stream, num_chunks] = self.prepare(num_chunks, scratch)
        return launch

    def partial_bytes(self, num_chunks: int) -> tuple[int, int]:
        return launches.partial_bytes(num_chunks, self.num_qo_heads, self.head_dim_vo)

    def make_scratch(self, num_chunks: int, num_bytes: int = 0) -> _Scratch:
        num_counters = launches.num_counters(1, self.kernel.num_chunks, self.kernel.num_head_blocks)
        counters = torch.zeros(num_counters, dtype=torch.int32, device=self.device)
        num_bytes = max(num_bytes, sum(self.partial_bytes(num_chunks)))
        return _Scratch(counters, torch.empty(num_bytes, dtype=torch.uint8, device=self.device))


class _Scratch(NamedTuple):
    """Of unplanned decodes on one stream."""

    counters: torch.Tensor  # zero between launches
    partials: torch.Tensor  # outputs, then their LSE

    def as_schedule(self, out_bytes: int) -> Schedule:
        partials = self.partials.data_ptr()
        return Schedule(counters=self.counters.data_ptr(), partial_out=partials, partial_lse=partials + out_bytes)


# (device, stream, chunks, head blocks, log2 of bytes) -> scratch. Never freed, so that addresses stay valid; sizes are
# powers of two.
_scratches: dict[tuple[int, int, int, int, int], _Scratch] = {}
_singles: memo.Memo[_BoundSingle] = memo.Memo()
