"""Prefill attention of one sequence."""

from __future__ import annotations

import functools
import threading
from typing import Any, Optional, Union

import torch

from flashinfer.attention.prefill import launch as launches
from flashinfer.attention.prefill.launch import Launch, Schedule
from flashinfer.attention.prefill.plan import extent_of
from flashinfer.attention.variant import Variant
from flashinfer.families.attention import prefill as families
from flashinfer.host import checks, memo, paged_cache, traced
from flashinfer.host.rows import require_rows
from flashinfer.quantization import packbits

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
    scale_q: Optional[float] = None,
    scale_k: Optional[float] = None,
    scale_v: Optional[float] = None,
    k_scale: Optional[float] = None,
    v_scale: Optional[float] = None,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Attention of the queries of one sequence over its keys and values (FlashAttention-2, Dao 2023, arXiv:2307.08691).

    Query i stands at position `kv_len - qo_len + i`.

    Args:
        q: `[qo_len, num_qo_heads, head_dim_qk]`, fp16 or bf16 (fp32 on the CPU).
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
        return_lse: also return the base-2 logarithm of the sum of exponentials.
        scale_q, scale_k, scale_v, k_scale, v_scale: factors of quantized q, k and v.
        use_fp16_qk_reduction, backend: accepted for compatibility.

    Returns:
        `[qo_len, num_qo_heads, head_dim_vo]`, dtype of q; with return_lse also fp32 `[qo_len, num_qo_heads]`. A query
        that sees no key gives zeros and -inf.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit.
        UnsupportedConfig: no kernel for this dtype or head_dim.
    """
    given = (
        custom_mask, packed_custom_mask, causal, kv_layout, pos_encoding_mode, window_left, logits_soft_cap, sm_scale,
        rope_scale, rope_theta, scale_q, scale_k, scale_v, k_scale, v_scale,
    )  # fmt: skip
    if torch.compiler.is_dynamo_compiling():
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) if return_lse else None
        _compiled(q, k, v, out, lse, *given)
        return out if lse is None else (out, lse)
    return _run(q, k, v, None, None, return_lse, *given)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: Optional[torch.Tensor],
    lse: Optional[torch.Tensor],
    return_lse: bool,
    custom_mask: Optional[torch.Tensor],
    packed_custom_mask: Optional[torch.Tensor],
    causal: bool,
    kv_layout: str,
    *options: Any,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    mask, mask_bits = "causal" if causal else "none", None
    if custom_mask is not None or packed_custom_mask is not None:
        mask, mask_bits = "custom", _mask_bits(q, k, custom_mask, packed_custom_mask, kv_layout)
    q_ptr, k_ptr, v_ptr = q.data_ptr(), k.data_ptr(), v.data_ptr()
    key = (
        q.dtype, q.shape, q.stride(), q.device, k.dtype, k.shape, k.stride(), k.device,
        v.dtype, v.shape, v.stride(), v.device, kv_layout, mask, options, (q_ptr | k_ptr | v_ptr) & 15,
    )  # fmt: skip
    single = _singles.get(key)
    if single is None:
        single = _singles.remember(key, _Single(q, k, v, kv_layout, mask, options))
    if out is None:
        out = single.new_out()
    if return_lse and lse is None:
        lse = single.new_lse()
    single.launch(
        q_ptr, out.data_ptr(), 0 if lse is None else lse.data_ptr(), k_ptr, v_ptr,
        0 if mask_bits is None else mask_bits.data_ptr(),
    )  # fmt: skip
    return out if lse is None else (out, lse)


_compiled = traced.compiled_op(
    "single_prefill(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!)? lse, Tensor? custom_mask, "
    "Tensor? packed_custom_mask, bool causal, str kv_layout, str pos_encoding_mode, int window_left, "
    "float? logits_soft_cap, float? sm_scale, float? rope_scale, float? rope_theta, float? scale_q, float? scale_k, "
    "float? scale_v, float? k_scale, float? v_scale) -> ()",
    lambda q, k, v, out, lse, *given: _run(q, k, v, out, lse, False, *given),
)


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)


def _product(*factors: Optional[float]) -> float:
    product = 1.0
    for factor in factors:
        product *= 1.0 if factor is None else float(factor)
    return product


def _mask_bits(
    q: torch.Tensor,
    k: torch.Tensor,
    custom_mask: Optional[torch.Tensor],
    packed: Optional[torch.Tensor],
    kv_layout: str,
) -> torch.Tensor:
    num_bits = q.shape[0] * k.shape[0 if kv_layout == "NHD" else 1]
    if packed is None:
        assert custom_mask is not None
        checks.require(
            custom_mask.numel() == num_bits, _OP,
            f"custom_mask has shape {list(custom_mask.shape)}; expected [qo_len, kv_len] of {num_bits} elements",
        )  # fmt: skip
        return packbits(custom_mask.to(q.device, non_blocking=True).contiguous().view(-1), bitorder="little")
    checks.require(
        packed.dtype == torch.uint8 and packed.numel() * 8 >= num_bits, _OP,
        f"packed_custom_mask is {packed.dtype} of {packed.numel()} elements; expected uint8, {-(-num_bits // 8)} bytes",
    )  # fmt: skip
    return packed.to(q.device, non_blocking=True).contiguous()


class _Single:
    """single_prefill_with_kv_cache for one signature: checked, laid out but for the addresses."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_layout: str, mask: str, options: tuple[Any, ...]
    ) -> None:
        paged_cache.require_layout(_OP, kv_layout)
        checks.require(q.dim() == 3, _OP, f"q has shape {list(q.shape)}; expected [qo_len, num_qo_heads, head_dim]")
        kv_strides = launches.row_strides(_OP, k, v, kv_layout)
        require_rows(_OP, "q", q)
        checks.require_device(_OP, "k", k, q, "q")
        checks.require(
            k.shape[2] == q.shape[2], _OP, f"k dim 2 (head_dim) is {k.shape[2]}, q has {q.shape[2]}; they must be equal"
        )
        rows, heads = (0, 1) if kv_layout == "NHD" else (1, 0)
        qo_len, num_qo_heads, head_dim_qk = q.shape
        kv_len, num_kv_heads, head_dim_vo = v.shape[rows], v.shape[heads], v.shape[2]
        paged_cache.require_heads(_OP, num_qo_heads, num_kv_heads)
        device = q.device
        variant = Variant.of(_OP, head_dim_qk, *options[:6])
        scale_q, scale_k, scale_v, k_scale, v_scale = options[6:]
        scales = (_product(scale_q, scale_k, k_scale), _product(scale_v, v_scale))
        kernel = launches.load_kernel(
            device, q.dtype, k.dtype, head_dim_qk, head_dim_vo, "single", mask, tuple(variant.spec_args.items()),
            qo_len * num_qo_heads <= families.SHORT_ROWS * num_kv_heads,
        )  # fmt: skip
        self.new_out = memo.allocator((qo_len, num_qo_heads, head_dim_vo), q.dtype, device)
        self.new_lse = memo.allocator((qo_len, num_qo_heads), torch.float32, device)
        self.device, self.kernel, self.num_kv_heads, self.head_dim_vo = device, kernel, num_kv_heads, head_dim_vo
        row_strides = (q.stride(0), q.stride(1), num_qo_heads * head_dim_vo, head_dim_vo)
        lengths, group_size = (qo_len, kv_len), num_qo_heads // num_kv_heads

        def bind(grid_size: int, schedule: dict[str, int]) -> Launch:
            return launches.bind_launch(
                kernel, device, grid_size, row_strides, kv_strides, 1, schedule, 1,
                (num_qo_heads, num_kv_heads), lengths, variant, scales,
            )  # fmt: skip

        def bind_planned(schedule: Schedule) -> Launch:
            plan = schedule.bind_planner(device, "single", 1, 1, num_kv_heads, group_size, lengths)
            launch = bind(kernel.num_ctas, schedule.values)
            extent = extent_of(kernel, mask, variant)

            def plan_and_launch(*addresses: Any) -> None:
                with _planning:
                    plan(extent, 0, 0, 0)
                    launch(*addresses)

            return plan_and_launch

        self.bind_planned = bind_planned
        self.planned: dict[int, Launch] = {}  # by stream
        self.is_planned = False
        num_tiles = 1
        if device.type == "cuda" and qo_len > 0:
            num_tiles = -(-qo_len * group_size // kernel.block_m) * num_kv_heads
            # Too few query tiles to fill the device, and KV long enough that splitting it pays for the planner.
            self.is_planned = num_tiles < kernel.num_ctas and kv_len >= 16 * kernel.block_n
        self.direct = bind(num_tiles, launches.NO_SCHEDULE) if qo_len > 0 else launches.no_launch

    def launch(self, q: int, out: int, lse: int, k: int, v: int, mask_bits: int) -> None:
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
        launch(0, mask_bits, 0, q, out, lse, k, v, 0, 0, 0)

    def bind_on(self, stream: int) -> Launch:
        kernel = self.kernel
        key = (self.device.index, stream, self.num_kv_heads, self.head_dim_vo, kernel.block_m, kernel.num_ctas)
        schedule = _schedules.get(key) or _schedules.setdefault(key, self.make_schedule())
        launch = self.planned[stream] = self.bind_planned(schedule)
        return launch

    def make_schedule(self) -> Schedule:
        # Two chunks a CTA, each of a full tile of query rows, are more than any plan of one sequence takes.
        kernel = self.kernel
        partial_bytes = 2 * kernel.num_ctas * kernel.block_m * (self.head_dim_vo + 1) * 4 + 1024
        items_bytes = (8 * kernel.num_ctas + 64) * families.ITEM_BYTES
        int_workspace = torch.empty((1 << 18) + items_bytes, dtype=torch.uint8, device=self.device)
        float_workspace = torch.empty(partial_bytes, dtype=torch.uint8, device=self.device)
        return Schedule.of(_OP, int_workspace, float_workspace, 1, self.num_kv_heads, self.head_dim_vo)


_singles: memo.Memo[_Single] = memo.Memo()
# A kernel follows its planner at once: on a stream that threads share, another plan would come between.
_planning = threading.Lock()
# (device, stream, KV heads, head_dim, tile) -> the schedule of unplanned calls there, and its scratch.
_schedules: dict[tuple[int, ...], Schedule] = {}
