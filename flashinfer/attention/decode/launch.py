"""What single and batch decode share: the kernel for a device, its grid, and checks of q and the outputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.attention import workspace
from flashinfer.attention.compat import require_number_scales
from flashinfer.attention.variant import require_positive
from flashinfer.families.attention import decode as families
from flashinfer.host import memo
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import Launcher


@dataclass(frozen=True)
class DecodeKernel:
    """A decode kernel on a device, and how its grid follows from the head counts."""

    launcher: Launcher
    tile_len: int  # KV rows a chunk is counted in
    num_head_blocks: int
    num_chunks: int  # that fill the device once; none on the CPU


@functools.cache
def load_kernel(
    device: torch.device,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    num_qo_heads: int,
    num_kv_heads: int,
    kv_storage: str,
    spec_args: tuple[tuple[str, Any], ...],
    pdl: bool,
) -> DecodeKernel:
    spec = families.decode(
        target.of_device(device),
        q_dtype=dtypes.short_name(q_dtype),
        kv_dtype=dtypes.short_name(kv_dtype),
        o_dtype=dtypes.short_name(o_dtype),
        head_dim=head_dim_qk,
        head_dim_vo=head_dim_vo,
        group_size=num_qo_heads // num_kv_heads,
        kv_storage=kv_storage,
        **dict(spec_args),
    )
    kernel = default_resolver().load(spec)
    if device.type == "cpu":
        return DecodeKernel(kernel.on(-1), 1, 0, 0)
    launcher = kernel.on(device.index, pdl=pdl)
    num_head_blocks = num_kv_heads * -(-(num_qo_heads // num_kv_heads) // spec.arg("group_tile"))
    resident_blocks = memo.num_sms(device.index) * launcher.max_blocks_per_sm()
    return DecodeKernel(
        launcher,
        families.decode_tile_len(launcher.config),
        num_head_blocks,
        families.decode_num_chunks(resident_blocks, num_head_blocks),
    )


@functools.cache
def load_planner(device: torch.device) -> Launcher:
    pdl = launches_dependent(device)
    return default_resolver().load(families.DECODE_PLAN.spec(target.of_device(device))).on(device.index, pdl=pdl)


@functools.cache
def launches_dependent(device: torch.device) -> bool:
    """Programmatic dependent launch is the default where the hardware has it: our kernels wait for the one before them
    ahead of their first memory access, so only the cost of the launch overlaps."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def qk_and_v_scale(
    op: str, q_scale: Optional[float], k_scale: Optional[float], v_scale: Optional[float]
) -> tuple[float, float]:
    """Factors of q·k and of the output."""
    require_number_scales(op, q_scale, k_scale, v_scale)
    q, k, v = (1.0 if scale is None else float(scale) for scale in (q_scale, k_scale, v_scale))
    return require_positive(op, "q_scale * k_scale", q * k), v


def require_output(
    op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{op}: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected {dtype} {list(shape)} "
            f"on {device}"
        )


@dataclass(frozen=True)
class DecodeSchedule:
    """Addresses of a decode's schedule and scratch; all 0 on the CPU."""

    chunks: int = 0
    requests: int = 0
    empty: int = 0
    counters: int = 0
    partial_out: int = 0
    partial_lse: int = 0
    tile_indptr: int = 0

    @property
    def values(self) -> dict[str, int]:
        """The fields of DecodeParams."""
        return {name: address for name, address in vars(self).items() if name != "tile_indptr"}


# Sizes of the structs in csrc/attention/params.h, which asserts them.
DECODE_CHUNK_BYTES, DECODE_REQUEST_BYTES = 48, 32


def decode_partial_bytes(num_chunks: int, num_qo_heads: int, head_dim_vo: int) -> tuple[int, int]:
    """Bytes of partial_out and partial_lse: for each chunk, two slots and two of the groups that begin with it
    (csrc/attention/decode/schedule.cuh)."""
    slots = 4 * num_chunks * num_qo_heads
    return slots * head_dim_vo * 4, slots * 4


def decode_num_counters(batch_size: int, num_chunks: int, num_head_blocks: int) -> int:
    """One for each request, and two for the groups of partial results that begin with each chunk."""
    return (batch_size + 2 * num_chunks) * num_head_blocks


def decode_schedule(
    op: str,
    int_workspace: torch.Tensor,
    float_workspace: torch.Tensor,
    batch_size: int,
    num_chunks: int,
    num_head_blocks: int,
    num_qo_heads: int,
    head_dim_vo: int,
) -> DecodeSchedule:
    """Lay out the workspaces of a planned decode. Depends on shapes alone, so that a captured launch stays valid."""
    chunks, requests, empty, counters, tile_indptr = workspace.carve(
        op,
        "the int workspace",
        int_workspace,
        (
            num_chunks * DECODE_CHUNK_BYTES,
            batch_size * DECODE_REQUEST_BYTES,
            batch_size * 4,
            decode_num_counters(batch_size, num_chunks, num_head_blocks) * 4,
            (batch_size + 1) * 4,
        ),
    )
    partial_out, partial_lse = workspace.carve(
        op, "float_workspace_buffer", float_workspace, decode_partial_bytes(num_chunks, num_qo_heads, head_dim_vo)
    )
    return DecodeSchedule(chunks, requests, empty, counters, partial_out, partial_lse, tile_indptr)
