# SPDX-License-Identifier: Apache-2.0
"""Prefill attention of one sequence."""

from __future__ import annotations

import functools
from typing import Any, Optional, Union

import torch

from flashinfer import locks
from flashinfer.attention.plan import BoundLaunch, dtype_of, no_launch
from flashinfer.attention.planned import DataType
from flashinfer.attention.prefill import launch as launches
from flashinfer.attention.prefill.launch import Extent, Schedule
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
from flashinfer.families.attention import prefill as families
from flashinfer.host import checks, memo, traced
from flashinfer.host.checks import LOWEST_ADDRESS
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.host.uploads import upload
from flashinfer.quantization import packbits
from flashinfer.variants import launch_functions

_OP = "single_prefill"


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    custom_mask: Optional[torch.Tensor] = None,
    packed_custom_mask: Optional[torch.Tensor] = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: Optional[float] = None,
    window_left: int = -1,
    logits_soft_cap: Optional[float] = None,
    rope_scale: Optional[float] = None,
    rope_theta: Optional[float] = None,
    return_lse: bool = False,
    backend: str = "auto",
    *,
    scale_q: GivenScale = None,
    scale_k: GivenScale = None,
    scale_v: GivenScale = None,
    k_scale: GivenScale = None,
    v_scale: GivenScale = None,
    o_dtype: Optional[DataType] = None,
    sinks: Optional[torch.Tensor] = None,
    variant: Optional[Functional] = None,
    mask: Optional[Functional] = None,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Attention of the queries of one sequence over its keys and values (FlashAttention-2, Dao 2023, arXiv:2307.08691).

    Query i stands at position `kv_len - qo_len + i`.

    Args:
        q: `[qo_len, num_qo_heads, head_dim_qk]`, fp16 or bf16 (fp32 on the CPU), or fp8 e4m3 where k and v are too.
        k, v: `[kv_len, num_kv_heads, head_dim]` (NHD) or `[num_kv_heads, kv_len, head_dim]` (HND); the dtype of q, or
            fp8 e4m3 or e5m2. head_dim is 32, 64, 96, 128, 192 or 256, or 192 of k and 128 of v. kv_len may be 0.
        custom_mask: bool `[qo_len, kv_len]`, True = visible. Takes the place of causal.
        packed_custom_mask: the same flattened and packed eight to a byte, little-endian (`packbits`).
        causal: query i sees keys up to its own position.
        pos_encoding_mode: "NONE", "ROPE_LLAMA" (q and k are rotated on the fly) or "ALIBI".
        sm_scale: factor of q·k; default `1 / sqrt(head_dim_qk)`.
        window_left: keys seen before the query's own position; -1 for all.
        logits_soft_cap: logits become `cap * tanh(logits / cap)`; None or 0 for none.
        rope_scale, rope_theta: of ROPE_LLAMA; default 1 and 1e4.
        return_lse: also return the base-2 logarithm of the sum of exponentials, that of the sink included.
        scale_q, scale_k, scale_v, k_scale, v_scale: factors of quantized q, k and v, numbers or one float32 on the
            device, which the kernel alone reads; those of q and k are positive.
        o_dtype: of the output, fp16 or bf16, where q is fp8; else None, or that of q.
        sinks: fp32 `[num_qo_heads]`, a logit for each query head that takes part in the softmax as a key without a
            value would (GPT-OSS): one more term exp(sinks[h]) of the denominator, on which no scale and no soft cap has
            an effect. -inf for none.
        variant, mask: functions of scores and of masks that flashinfer.variant and flashinfer.mask made
            (docs/variants.md), of one request. Not under torch.compile, where a wrapper takes them.
        use_fp16_qk_reduction, backend: accepted for compatibility.

    Returns:
        `[qo_len, num_qo_heads, head_dim_vo]`, dtype of q; with return_lse also fp32 `[qo_len, num_qo_heads]`. A query
        that sees no key gives zeros and -inf, or the LSE of the sink alone.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit.
        UnsupportedConfig: no kernel for this dtype or head_dim.
    """
    given = (
        custom_mask, packed_custom_mask, causal, kv_layout, pos_encoding_mode, window_left, logits_soft_cap, sm_scale,
        rope_scale, rope_theta,
    )  # fmt: skip
    scales = (scale_q, scale_k, scale_v, k_scale, v_scale)
    if is_dynamo_compiling():
        if variant is not None or mask is not None:
            raise functions_are_planned(_OP)
        out_dtype = q.dtype if o_dtype is None else dtype_of(_OP, "o_dtype", o_dtype)
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype, device=q.device)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) if return_lse else None
        _door(q, k, v, out, lse, sinks, *given, *scales)
        return out if lse is None else (out, lse)
    return _run(q, k, v, None, None, return_lse, o_dtype, sinks, *given, *scales, functions=(variant, mask))


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
    return_lse: bool,
    o_dtype: Optional[DataType],
    sinks: Optional[torch.Tensor],
    custom_mask: Optional[torch.Tensor],
    packed_custom_mask: Optional[torch.Tensor],
    causal: bool,
    kv_layout: str,
    *given: Any,
    functions: tuple[Any, Any] = (None, None),
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    is_custom = custom_mask is not None or packed_custom_mask is not None
    mask = "custom" if is_custom else "causal" if causal else "none"
    try:
        q_ptr, k_ptr, v_ptr = q.data_ptr(), k.data_ptr(), v.data_ptr()
    except AttributeError:
        raise checks.not_tensors(_OP, q=q, k=k, v=v) from None
    if q_ptr < LOWEST_ADDRESS or k_ptr < LOWEST_ADDRESS or v_ptr < LOWEST_ADDRESS:
        q_ptr, k_ptr, v_ptr = (checks.low_address(_OP, name, x) for name, x in {"q": q, "k": k, "v": v}.items())
    sinks_ptr, sinks_key = (0, None) if sinks is None else signature_of_sinks(_OP, sinks)
    options, scales = given[: -len(_SCALES)], given[-len(_SCALES) :]
    if scales != _NO_SCALES and not are_plain(scales):
        scales = read_scales(_OP, dict(zip(_SCALES, scales)), q.device)
    key = (
        q.dtype, q.shape, q.stride(), q.device, k.dtype, k.shape, k.stride(), k.get_device(), v.dtype, v.shape,
        v.stride(), v.get_device(), kv_layout, mask, sinks_key, options, scales, o_dtype, functions,
        (q_ptr | k_ptr | v_ptr) & 15,
    )  # fmt: skip
    single = _singles.find(key)
    if single is None:
        single = _BoundSingle(q, k, v, sinks, kv_layout, mask, options, scales, o_dtype, functions)
        keep = _singles.hold if single.holds_tensors else _singles.remember
        keep(key, single)
    mask_bits = _mask_bits(q, k, custom_mask, packed_custom_mask, kv_layout) if is_custom else None
    if out is None:
        out = single.new_out()
    if return_lse and lse is None:
        lse = single.new_lse()
    single.launch(
        sinks_ptr, q_ptr, out.data_ptr(), 0 if lse is None else lse.data_ptr(), k_ptr, v_ptr,
        0 if mask_bits is None else mask_bits.data_ptr(),
    )  # fmt: skip
    return out if lse is None else (out, lse)


def prefill_into(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    sm_scale: Optional[float],
    logits_soft_cap: Optional[float],
) -> None:
    """`single_prefill_with_kv_cache` into contiguous memory of the caller, which is not checked."""
    options = (causal, "NHD", "NONE", -1, logits_soft_cap, sm_scale, None, None)
    _run(q, k, v, out, lse, True, out.dtype, None, None, None, *options, *[None] * len(_SCALES))


_SCALES = ("scale_q", "scale_k", "scale_v", "k_scale", "v_scale")
_NO_SCALES = (None,) * len(_SCALES)
_door = traced.door(
    "single_prefill",
    lambda q, k, v, out, lse, sinks, *given: _run(q, k, v, out, lse, False, out.dtype, sinks, *given),
    {
        **dict.fromkeys("qkv", "Tensor"),
        "out": "Tensor(!)",
        "lse": "Tensor(!)?",
        "sinks": "Tensor?",
        "custom_mask": "Tensor?",
        "packed_custom_mask": "Tensor?",
        "causal": "bool",
        "kv_layout": "str",
        "pos_encoding_mode": "str",
        "window_left": "int",
        **dict.fromkeys(("logits_soft_cap", "sm_scale", "rope_scale", "rope_theta"), "float?"),
        **dict.fromkeys(_SCALES, traced.REAL),
    },
)


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)
"""`single_prefill_with_kv_cache` with return_lse=True."""


def _mask_bits(
    q: torch.Tensor,
    k: torch.Tensor,
    custom_mask: Optional[torch.Tensor],
    packed: Optional[torch.Tensor],
    kv_layout: str,
) -> torch.Tensor:
    num_bits = q.shape[0] * k.shape[0 if kv_layout == "NHD" else 1]
    given = custom_mask if packed is None else packed
    if not isinstance(given, torch.Tensor):
        raise checks.not_tensors(_OP, custom_mask=given)
    checks.require_memory(_OP, custom_mask=given)
    checks.require_addresses(_OP, custom_mask=given)
    if packed is None:
        checks.require(
            given.numel() == num_bits, _OP,
            f"custom_mask has shape {list(given.shape)}; expected [qo_len, kv_len] of {num_bits} elements",
        )  # fmt: skip
        return packbits(upload(given, q.device).contiguous().view(-1), bitorder="little")
    checks.require(
        given.dtype == torch.uint8 and given.numel() * 8 >= num_bits, _OP,
        f"packed_custom_mask is {given.dtype} of {given.numel()} elements; expected uint8, {-(-num_bits // 8)} bytes",
    )  # fmt: skip
    return upload(given, q.device).contiguous()


class _BoundSingle:
    """single_prefill_with_kv_cache for one signature: checked, laid out but for the addresses."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: Optional[torch.Tensor],
        kv_layout: str,
        mask: str,
        options: tuple[Any, ...],
        scales: tuple[Any, ...],
        o_dtype: Optional[DataType],
        functions: tuple[Any, Any],
    ) -> None:
        """options: arguments of `Variant.of` after head_dim; functions: variant and mask."""
        checks.require(q.dim() == 3, _OP, f"q has shape {list(q.shape)}; expected [qo_len, num_qo_heads, head_dim]")
        sequence, qo_len, device = check_sequence(_OP, q, k, v, kv_layout), q.shape[0], q.device
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, kv_len, kv_strides = sequence
        launched = launch_functions(
            _OP, *functions, device, batch_size=1, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads
        )
        variant = Variant.of(_OP, head_dim_qk, *options, has_sinks=sinks is not None, functions=launched)
        self.holds_tensors = launched is not None and launched.holds_tensors
        if sinks is not None:
            require_sinks(_OP, sinks, num_qo_heads, device)
        scale_q, scale_k, scale_v, k_scale, v_scale = scales
        factors = Factors.of(_OP, (scale_q,), (scale_k, k_scale), (scale_v, v_scale))
        out_dtype = q.dtype if o_dtype is None else dtype_of(_OP, "o_dtype", o_dtype)
        queries = families.queries_of(qo_len * sequence.group_size, 1, num_kv_heads)
        kernel = launches.load_kernel(
            device, (q.dtype, k.dtype, out_dtype), (head_dim_qk, head_dim_vo), "single", mask, variant, queries,
            device_scales=factors.device_scales,
        )  # fmt: skip
        self.new_out = memo.allocator((qo_len, num_qo_heads, head_dim_vo), out_dtype, device)
        self.new_lse = memo.allocator((qo_len, num_qo_heads), torch.float32, device)
        self.device, self.kernel, self.num_kv_heads, self.head_dim_vo = device, kernel, num_kv_heads, head_dim_vo
        strides = (q.stride(0), q.stride(1), num_qo_heads * head_dim_vo, head_dim_vo)
        values = variant.values(num_qo_heads, head_dim_qk, device, factors)
        lengths, group_size = (qo_len, kv_len), sequence.group_size

        def bind(grid_size: int, schedule: Optional[Schedule]) -> BoundLaunch:
            return launches.bind_launch(
                kernel, grid_size, strides, kv_strides, schedule, values,
                batch_size=1, num_tokens=qo_len, num_heads=(num_qo_heads, num_kv_heads), lengths=lengths,
            )  # fmt: skip

        def bind_planned(schedule: Schedule) -> BoundLaunch:
            extent = Extent.of(kernel, mask, variant)
            plan = schedule.bind_planner(device, "single", extent, 1, 1, num_kv_heads, group_size, lengths)
            launch = bind(kernel.num_blocks, schedule)

            def plan_and_launch(*addresses: Any) -> None:
                with _planning:
                    plan(0, 0, 0)
                    launch(*addresses)

            return plan_and_launch

        self.bind_planned = bind_planned
        self.planned: dict[int, BoundLaunch] = {}  # by stream
        self.is_planned = False
        num_tiles = 1
        if device.type == "cuda" and qo_len > 0:
            num_tiles = -(-qo_len * group_size // kernel.block_m) * num_kv_heads
            # Too few query tiles to fill the device, and KV long enough that splitting it pays for the planner.
            self.is_planned = num_tiles < kernel.num_blocks and kv_len >= 16 * kernel.block_n
        self.direct = bind(num_tiles, None) if qo_len > 0 else no_launch

    def launch(self, sinks: int, q: int, out: int, lse: int, k: int, v: int, mask_bits: int) -> None:
        """On the current stream; every tensor by its address."""
        if not self.is_planned:
            launch = self.direct
        elif torch.cuda.is_current_stream_capturing():
            # A captured graph has scratch of its own, so that a replay disturbs no other launch.
            schedule = self.make_schedule()
            launch = self.bind_planned(schedule)
        else:
            stream = memo.current_stream(self.device.index)
            launch = self.planned.get(stream) or self.bind_on(stream)
        launch(0, mask_bits, 0, sinks, q, out, lse, k, v, 0, 0, 0)

    def bind_on(self, stream: int) -> BoundLaunch:
        kernel = self.kernel
        key = (self.device.index, stream, self.num_kv_heads, self.head_dim_vo, kernel.block_m, kernel.num_blocks)
        schedule = _schedules.get(key) or _schedules.setdefault(key, self.make_schedule())
        launch = self.planned[stream] = self.bind_planned(schedule)
        return launch

    def make_schedule(self) -> Schedule:
        # Two splits a block, each of a full tile of query rows, are more than any plan of one sequence takes.
        kernel = self.kernel
        partial_bytes = 2 * kernel.num_blocks * kernel.block_m * (self.head_dim_vo + 1) * 4 + 1024
        items_bytes = (8 * kernel.num_blocks + 64) * families.ITEM_BYTES
        int_workspace = torch.empty((1 << 18) + items_bytes, dtype=torch.uint8, device=self.device)
        float_workspace = torch.empty(partial_bytes, dtype=torch.uint8, device=self.device)
        return Schedule.of(_OP, int_workspace, float_workspace, 1, self.num_kv_heads, self.head_dim_vo)


_singles: memo.Memo[_BoundSingle] = memo.Memo()
# A kernel follows its planner at once: on a stream that threads share, another plan would come between.
_planning = locks.lock()
# (device, stream, KV heads, head_dim, tile) -> the schedule of unplanned calls there, and its scratch.
_schedules: dict[tuple[int, ...], Schedule] = {}
