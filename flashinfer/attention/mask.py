# SPDX-License-Identifier: Apache-2.0
"""Custom masks of a batch: one bit per (query, key), every request from a byte of its own."""

from __future__ import annotations

from typing import Optional

import torch

from flashinfer import quantization
from flashinfer.host import checks, indices
from flashinfer.host.uploads import upload

Lengths = tuple[torch.Tensor, torch.Tensor]  # qo_indptr [batch_size + 1], kv_lens [batch_size]


def take_mask(
    op: str,
    device: torch.device,
    custom_mask: Optional[torch.Tensor],
    packed_custom_mask: Optional[torch.Tensor],
    qo_indptr: torch.Tensor,  # int32 [batch_size + 1], on the device
    kv_lens: torch.Tensor,  # int32 [batch_size], on the device
    buffers: Optional[tuple[Optional[torch.Tensor], Optional[torch.Tensor]]],  # where a CUDA graph finds the results
    on_host: Optional[Lengths] = None,  # the same lengths on the CPU, where the plan was given them there
) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed bits and int32 `[batch_size + 1]` byte offsets. Lengths stay on the device.

    A mask may be longer than needed. One that is too short is a ValueError where the lengths are known on the host;
    where they are not, what is missing counts as invisible of a mask that is packed here. Packed bits that are on the
    device are returned as they are; everything else is the plan's own. Raises before it writes to the buffers.
    """
    given, name = (
        (custom_mask, "custom_mask") if packed_custom_mask is None else (packed_custom_mask, "packed_custom_mask")
    )
    checks.require_addresses(op, **{name: given})
    assert given is not None
    checks.require(
        given.device == device or given.is_cpu, op, f"{name} is on {given.device}; expected {device} or the CPU"
    )
    is_packed = given is packed_custom_mask
    checks.require(
        not is_packed or (given.dtype == torch.uint8 and given.dim() == 1),
        op,
        f"{name} is {given.dtype} {list(given.shape)}; expected a uint8 vector",
    )
    num_bits = _num_bits(qo_indptr, kv_lens)
    known = num_bits if indices.are_visible(num_bits) else None if on_host is None else _num_bits(*on_host)
    least_bytes = given.numel() if is_packed else -(-given.numel() // 8)  # what the mask takes, or more
    if known is not None:
        least_bytes = int(_num_bytes(known).sum())
        _require_length(
            op, name, given, least_bytes if is_packed else int(known.sum()), "bytes" if is_packed else "booleans"
        )
    if buffers is not None:
        _require_buffers(op, device, *buffers, least_bytes, num_bits.numel() + 1)

    if is_packed:
        packed, indptr = upload(given, device).contiguous(), _offsets(_num_bytes(num_bits))
    else:
        flat = upload(given, device).reshape(-1)
        packed, indptr = _pack(op, flat if flat.dtype == torch.bool else flat != 0, _offsets(num_bits))
    indptr = indptr.int()
    if buffers is None:
        return packed, indptr
    mask_buf, indptr_buf = buffers
    assert mask_buf is not None and indptr_buf is not None
    num_bytes = min(packed.numel(), mask_buf.numel())
    mask_buf[:num_bytes].copy_(packed[:num_bytes], non_blocking=True)
    indptr_buf[: indptr.numel()].copy_(indptr, non_blocking=True)
    return mask_buf, indptr_buf


def _num_bits(qo_indptr: torch.Tensor, kv_lens: torch.Tensor) -> torch.Tensor:
    """Of each request's mask."""
    return (qo_indptr[1:] - qo_indptr[:-1]).long() * kv_lens.long()


def _num_bytes(num_bits: torch.Tensor) -> torch.Tensor:
    return (num_bits + 7) // 8


def _require_length(op: str, name: str, given: torch.Tensor, needed: int, unit: str) -> None:
    each = "qo_len * kv_len of all requests" + (", each from a byte of its own" if unit == "bytes" else "")
    checks.require(given.numel() >= needed, op, f"{name} holds {given.numel()} {unit}; expected {needed}, {each}")


def _require_buffers(
    op: str,
    device: torch.device,
    mask_buf: Optional[torch.Tensor],
    indptr_buf: Optional[torch.Tensor],
    num_bytes: int,
    num_offsets: int,
) -> None:
    if mask_buf is None or indptr_buf is None:
        raise ValueError(
            f"{op}: a plan with a custom mask under use_cuda_graph needs custom_mask_buf and mask_indptr_buf"
        )
    for name, buffer, dtype in (
        ("custom_mask_buf", mask_buf, torch.uint8),
        ("mask_indptr_buf", indptr_buf, torch.int32),
    ):
        checks.require_addresses(op, **{name: buffer})
        checks.require(
            buffer.dtype == dtype and buffer.device == device and buffer.dim() == 1 and buffer.is_contiguous(),
            op,
            f"{name} is {buffer.dtype} {list(buffer.shape)} of strides {list(buffer.stride())} on {buffer.device}; "
            f"expected a contiguous vector of {dtype} on {device}",
        )
    checks.require(
        num_bytes <= mask_buf.numel(),
        op,
        f"custom_mask_buf holds {mask_buf.numel()} bytes, the mask takes {num_bytes} or more",
    )
    checks.require(
        num_offsets <= indptr_buf.numel(),
        op,
        f"mask_indptr_buf holds {indptr_buf.numel()} entries; expected at least {num_offsets}, batch_size + 1",
    )


def _pack(op: str, mask: torch.Tensor, bit_indptr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """segment_packbits into the largest result there could be, so that nobody has to wait for the offsets."""
    num_bytes = quantization.most_bytes(mask.numel(), bit_indptr.numel() - 1)
    packed = torch.empty(num_bytes, dtype=torch.uint8, device=mask.device)
    indptr = torch.empty_like(bit_indptr)
    quantization._pack_segments(op, mask.contiguous(), bit_indptr, packed, indptr, "little")
    return packed, indptr


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
