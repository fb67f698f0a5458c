# SPDX-License-Identifier: Apache-2.0
"""What single and planned decode share: the kernel for a device, and the schedule a plan leaves there."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Optional

import torch

from flashinfer import target
from flashinfer.attention import workspace
from flashinfer.attention.plan import short_names
from flashinfer.attention.served import beside_decode
from flashinfer.attention.variant import Variant
from flashinfer.attention.workspace import Memory
from flashinfer.families.attention import decode as families
from flashinfer.host import memo
from flashinfer.jit import KernelSpec, default_resolver
from flashinfer.jit.loader import Launcher, PreparedLaunch
from flashinfer.variants import NO_RANGES


@dataclass(frozen=True)
class DecodeKernel:
    """A decode kernel on a device, and how its grid follows from the head counts."""

    launcher: Launcher
    tile_len: int  # KV rows a chunk is counted in
    num_head_blocks: int
    num_chunks: int  # that fill the device once; none on the CPU


def load_kernel(
    device: torch.device,
    types: tuple[torch.dtype, torch.dtype, torch.dtype],
    head_dims: tuple[int, int],
    num_heads: tuple[int, int],
    kv_storage: str,
    variant: Variant,
    pdl: Optional[bool] = None,
    device_scales: bool = False,
    page_size: int = 1,
    mixed: bool = False,
) -> DecodeKernel:
    """types: of q, KV and output; head_dims: of queries and keys, and of values; num_heads: of queries and KV. Raises
    UnsupportedConfig where there is no kernel, or what `Resolver.load` does."""
    q_dtype, kv_dtype, o_dtype = short_names("decode", types)
    machine = target.of_device(device)
    axes = {
        "q_dtype": q_dtype, "kv_dtype": kv_dtype, "o_dtype": o_dtype,
        "head_dim": head_dims[0], "head_dim_vo": head_dims[1], **variant.spec_args,
    }  # fmt: skip
    spec = families.decode(
        machine, group_size=num_heads[0] // num_heads[1], kv_storage=kv_storage, device_scales=device_scales,
        mixed=mixed, **axes,
    )  # fmt: skip
    if kv_storage == "paged" and device.type == "cuda" and not default_resolver().holds(spec):
        planner = families.DECODE_PLAN.spec(machine, variant=variant.ranges[0], mixed=mixed)
        served = [] if mixed else beside_decode(machine, page_size, axes)
        default_resolver().expect([planner, *served])
    return _load(device, spec, *num_heads, pdl)


@functools.cache
def _load(
    device: torch.device, spec: KernelSpec, num_qo_heads: int, num_kv_heads: int, pdl: Optional[bool]
) -> DecodeKernel:
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
        families.decode_num_chunks(resident_blocks, num_head_blocks, spec.arg("mixed")),
    )


@functools.cache
def load_planner(device: torch.device, ranges: str = "none", mixed: bool = False) -> Launcher:
    """ranges: canonical text of functions with a range of keys."""
    spec = families.DECODE_PLAN.spec(target.of_device(device), variant=ranges, mixed=mixed)
    return default_resolver().load(spec).on(device.index)


# Sizes of the structs in csrc/attention/decode/params.h, which asserts them.
_CHUNK_BYTES, _REQUEST_BYTES = 48, 32


def partial_bytes(num_chunks: int, num_qo_heads: int, head_dim_vo: int) -> tuple[int, int]:
    """Bytes of partial_out and partial_lse: for each chunk, two slots and two of the groups that begin with it
    (csrc/attention/decode/schedule.cuh)."""
    slots = 4 * num_chunks * num_qo_heads
    return slots * head_dim_vo * 4, slots * 4


def num_counters(batch_size: int, num_chunks: int, num_head_blocks: int) -> int:
    """One for each request, and two for the groups of partial results that begin with each chunk."""
    return (batch_size + 2 * num_chunks) * num_head_blocks


@dataclass(frozen=True)
class Schedule:
    """Addresses of a decode's schedule and scratch; all 0 on the CPU."""

    chunks: int = 0
    requests: int = 0
    empty: int = 0
    counters: int = 0
    partial_out: int = 0
    partial_lse: int = 0
    tile_indptr: int = 0  # of the planner alone

    @staticmethod
    def of(
        op: str,
        int_workspace: Memory,
        float_workspace: Memory,
        batch_size: int,
        kernel: DecodeKernel,
        num_qo_heads: int,
        head_dim_vo: int,
    ) -> Schedule:
        """Lay out the workspaces of a plan. Depends on shapes alone, so that a captured launch stays valid."""
        num_chunks = kernel.num_chunks
        chunks, requests, empty, counters, tile_indptr = workspace.carve(
            op,
            "the int workspace",
            int_workspace,
            (
                num_chunks * _CHUNK_BYTES,
                batch_size * _REQUEST_BYTES,
                batch_size * 4,
                num_counters(batch_size, num_chunks, kernel.num_head_blocks) * 4,
                (batch_size + 1) * 4,
            ),
        )
        partial_out, partial_lse = workspace.carve(
            op, "float_workspace_buffer", float_workspace, partial_bytes(num_chunks, num_qo_heads, head_dim_vo)
        )
        return Schedule(chunks, requests, empty, counters, partial_out, partial_lse, tile_indptr)

    @property
    def values(self) -> dict[str, int]:
        """The fields of DecodeParams."""
        return {name: address for name, address in vars(self).items() if name != "tile_indptr"}

    def bind_planner(
        self,
        device: torch.device,
        batch_size: int,
        kernel: DecodeKernel,
        page_size: int,
        window_left: int,
        table_len: int = 0,
        ranges: tuple[str, bytes] = NO_RANGES,
        mixed: bool = False,
        has_lengths: bool = False,
    ) -> PreparedLaunch:
        """The planner, which takes the addresses of kv_indptr and last_page_len; table_len: entries of a row of the
        block table, where there is no kv_indptr. mixed: of a batch whose other requests are prefilled, which takes
        that of qo_indptr too; has_lengths: and last_page_len has the lengths of whole requests."""
        values: dict[str, int | bytes] = {
            "chunks": self.chunks,
            "requests": self.requests,
            "empty": self.empty,
            "tile_indptr": self.tile_indptr,
            "counters": self.counters,
            "batch_size": batch_size,
            "num_chunks": kernel.num_chunks,
            "num_head_blocks": kernel.num_head_blocks,
            "page_size": page_size,
            "table_len": table_len,
            "tile_len": kernel.tile_len,
            "window_left": window_left,
            "has_lengths": has_lengths,
            "extras": ranges[1],
        }
        varying: tuple[str, ...] = ("kv_indptr", "last_page_len", "qo_indptr")
        if not mixed:
            values, varying = {**values, "qo_indptr": 0}, varying[:2]
        return load_planner(device, ranges[0], mixed).prepare((1, 1, 1), values, varying=varying)
