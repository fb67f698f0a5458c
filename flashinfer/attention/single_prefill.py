"""Prefill attention of one sequence."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch

from flashinfer import _op
from flashinfer.attention import kv_cache
from flashinfer.attention import prefill_launch as launches
from flashinfer.attention.prefill_launch import Extent, PrefillKernel, Schedule
from flashinfer.attention.variant import Variant
from flashinfer.kernels import prefill as families
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
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) if return_lse else None
    run = _compiled if torch.compiler.is_dynamo_compiling() else _run
    run(
        q, k, v, out, lse, custom_mask, packed_custom_mask, causal, kv_layout, pos_encoding_mode, window_left,
        logits_soft_cap, sm_scale, rope_scale, rope_theta, scale_q, scale_k, scale_v, k_scale, v_scale,
    )  # fmt: skip
    return out if lse is None else (out, lse)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: Optional[torch.Tensor],
    custom_mask: Optional[torch.Tensor],
    packed_custom_mask: Optional[torch.Tensor],
    causal: bool,
    kv_layout: str,
    *options: Any,
) -> None:
    mask, mask_bits = "causal" if causal else "none", None
    if custom_mask is not None or packed_custom_mask is not None:
        mask, mask_bits = "custom", _mask_bits(q, k, custom_mask, packed_custom_mask, kv_layout)
    key = (
        q.dtype, q.shape, q.stride(), q.get_device(), kv_cache.signature((k, v)), kv_layout, mask, options,
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
    )  # fmt: skip
    single = _singles.get(key)
    if single is None:
        variant = Variant.of(_OP, q.shape[-1], *options[:6])
        scale_q, scale_k, scale_v, k_scale, v_scale = options[6:]
        scales = (_product(scale_q, scale_k, k_scale), _product(scale_v, v_scale))
        single = _singles.remember(key, _Single(q, k, v, kv_layout, mask, variant, scales))
    single.launch(q, k, v, out, lse, mask_bits)


_compiled = _op.compiled_op(
    "single_prefill(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!)? lse, Tensor? custom_mask, "
    "Tensor? packed_custom_mask, bool causal, str kv_layout, str pos_encoding_mode, int window_left, "
    "float? logits_soft_cap, float? sm_scale, float? rope_scale, float? rope_theta, float? scale_q, float? scale_k, "
    "float? scale_v, float? k_scale, float? v_scale) -> ()",
    _run,
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
        _op.require(
            custom_mask.numel() == num_bits, _OP,
            f"custom_mask has shape {list(custom_mask.shape)}; expected [qo_len, kv_len] of {num_bits} elements",
        )  # fmt: skip
        return packbits(custom_mask.to(q.device, non_blocking=True).contiguous().view(-1), bitorder="little")
    _op.require(
        packed.dtype == torch.uint8 and packed.numel() * 8 >= num_bits, _OP,
        f"packed_custom_mask is {packed.dtype} of {packed.numel()} elements; expected uint8, {-(-num_bits // 8)} bytes",
    )  # fmt: skip
    return packed.to(q.device, non_blocking=True).contiguous()


class _Single:
    """single_prefill_with_kv_cache for one signature: checked, laid out but for the addresses."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_layout: str,
        mask: str,
        variant: Variant,
        scales: tuple[float, float],
    ) -> None:
        kv_cache.require_layout(_OP, kv_layout)
        _op.require(q.dim() == 3, _OP, f"q has shape {list(q.shape)}; expected [qo_len, num_qo_heads, head_dim]")
        strides = launches.row_strides(_OP, k, v, kv_layout)
        launches.require_rows(_OP, "q", q)
        _op.require_device(_OP, "k", k, q, "q")
        _op.require(
            k.shape[2] == q.shape[2], _OP, f"k dim 2 (head_dim) is {k.shape[2]}, q has {q.shape[2]}; they must be equal"
        )
        rows, heads = (0, 1) if kv_layout == "NHD" else (1, 0)
        qo_len, num_qo_heads, _ = q.shape
        kv_len, num_kv_heads = k.shape[rows], k.shape[heads]
        launches.require_heads(_OP, num_qo_heads, num_kv_heads)
        self.is_empty = qo_len == 0
        self.device = launches.indexed(q.device)
        self.kernel = launches.load_kernel(
            self.device, q.dtype, k.dtype, q.shape[2], v.shape[2], "single", mask, tuple(variant.spec_args.items()),
            qo_len * num_qo_heads <= families.SHORT_ROWS * num_kv_heads,
        )  # fmt: skip
        self.heads, self.lengths, self.head_dim_vo = (num_qo_heads, num_kv_heads), (qo_len, kv_len), v.shape[2]
        self.extent = Extent(
            mask == "causal", variant.window_left, self.kernel.block_m, self.kernel.block_n, self.kernel.num_ctas
        )
        grid_size = 1
        self.is_planned = False
        if self.device.type == "cuda" and not self.is_empty:
            num_tiles = -(-qo_len * num_qo_heads // num_kv_heads // self.kernel.block_m)
            grid_size = num_tiles * num_kv_heads
            # Too few query tiles to fill the device, and KV long enough that splitting it pays for the planner.
            self.is_planned = grid_size < self.kernel.num_ctas and kv_len >= 16 * self.kernel.block_n
            grid_size = self.kernel.num_ctas if self.is_planned else grid_size
        out = torch.empty((qo_len, num_qo_heads, v.shape[2]), device="meta")

        def bind(schedule: tuple[int, ...]) -> launches.Launch:
            return launches.bind_launch(
                self.kernel, self.device, grid_size, q, out, strides, launches.ONE_ROW_PAGES, schedule, 1, num_kv_heads,
                self.lengths, variant, scales,
            )  # fmt: skip

        self.bind = bind
        self.direct = bind(launches.NO_SCHEDULE)

    def launch(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: Optional[torch.Tensor],
        mask_bits: Optional[torch.Tensor],
    ) -> None:
        if self.is_empty:
            return
        launch = self.direct
        if self.is_planned:
            scratch = _scratch(self.device, self.kernel, self.heads[1], self.head_dim_vo)
            planner = scratch.schedule.bind_planner(
                self.device, "single", 1, 1, self.heads[1], self.heads[0] // self.heads[1], self.lengths
            )
            planner(self.extent, 0, 0, 0)
            launch = self.bind(scratch.schedule.values)
        launch(
            q.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(), k.data_ptr(), v.data_ptr(), (0, 0, 0),
            (0, 0 if mask_bits is None else mask_bits.data_ptr(), 0),
        )  # fmt: skip


_singles: _op.Memo[_Single] = _op.Memo()


@dataclass(frozen=True)
class _Scratch:
    """Workspaces of unplanned calls on one stream."""

    schedule: Schedule
    tensors: tuple[torch.Tensor, ...]


_scratches: dict[tuple[Any, ...], _Scratch] = {}


def _scratch(device: torch.device, kernel: PrefillKernel, num_kv_heads: int, head_dim_vo: int) -> _Scratch:
    key = (device.index, _op.current_stream(device.index), num_kv_heads, head_dim_vo, kernel.block_m)
    capturing = torch.cuda.is_current_stream_capturing()
    found = _scratches.get(key)
    if found is not None and not capturing:
        return found
    # Two chunks a CTA, each of a full tile of query rows, are more than any plan of one sequence takes.
    partial_bytes = 2 * kernel.num_ctas * kernel.block_m * (head_dim_vo + 1) * 4 + 1024
    items_bytes = (8 * kernel.num_ctas + 64) * families.ITEM_BYTES
    int_workspace = torch.empty((1 << 18) + items_bytes, dtype=torch.uint8, device=device)
    float_workspace = torch.empty(partial_bytes, dtype=torch.uint8, device=device)
    schedule = Schedule.of(_OP, int_workspace, float_workspace, 1, num_kv_heads, head_dim_vo)
    made = _Scratch(schedule, (int_workspace, float_workspace))
    # A captured graph has scratch of its own, so that a replay disturbs no other launch.
    if not capturing:
        _scratches[key] = made
    return made
