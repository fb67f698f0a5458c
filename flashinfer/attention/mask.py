"""Custom masks of a batch: one bit per (query, key), every request from a byte of its own."""

from __future__ import annotations

from typing import Optional

import torch

from flashinfer import quantization
from flashinfer.host import checks


def take_mask(
    op: str,
    device: torch.device,
    custom_mask: Optional[torch.Tensor],
    packed_custom_mask: Optional[torch.Tensor],
    qo_indptr: torch.Tensor,  # int32 [batch_size + 1], on the device
    kv_lens: torch.Tensor,  # int32 [batch_size], on the device
    buffers: Optional[tuple[Optional[torch.Tensor], Optional[torch.Tensor]]],  # where a CUDA graph finds the results
) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed bits and int32 `[batch_size + 1]` byte offsets. Lengths stay on the device."""
    num_bits = (qo_indptr[1:] - qo_indptr[:-1]).long() * kv_lens.long()
    if packed_custom_mask is not None:
        checks.require(
            packed_custom_mask.dtype == torch.uint8 and packed_custom_mask.dim() == 1,
            op,
            f"packed_custom_mask is {packed_custom_mask.dtype} {list(packed_custom_mask.shape)}; "
            "expected a uint8 vector",
        )
        packed = packed_custom_mask.to(device, non_blocking=True).contiguous()
        indptr = _offsets((num_bits + 7) // 8)
    else:
        assert custom_mask is not None
        flat = custom_mask.to(device, non_blocking=True).reshape(-1)
        packed, indptr = _pack(op, flat if flat.dtype == torch.bool else flat != 0, _offsets(num_bits))
    indptr = indptr.int()
    if buffers is None:
        return packed, indptr
    mask_buf, indptr_buf = buffers
    if mask_buf is None or indptr_buf is None:
        raise ValueError(
            f"{op}: a plan with a custom mask under use_cuda_graph needs custom_mask_buf and mask_indptr_buf"
        )
    given = packed_custom_mask if packed_custom_mask is not None else custom_mask
    assert given is not None
    num_bytes = given.numel() if packed_custom_mask is not None else -(-given.numel() // 8)
    checks.require(
        num_bytes <= mask_buf.numel(),
        op,
        f"custom_mask_buf holds {mask_buf.numel()} bytes, the mask takes {num_bytes} or more",
    )
    num_bytes = min(packed.numel(), mask_buf.numel())
    mask_buf[:num_bytes].copy_(packed[:num_bytes], non_blocking=True)
    indptr_buf[: indptr.numel()].copy_(indptr, non_blocking=True)
    return mask_buf, indptr_buf


def _pack(op: str, mask: torch.Tensor, bit_indptr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """segment_packbits into the largest result there could be, so that nobody has to wait for the offsets."""
    num_segments = bit_indptr.numel() - 1
    packed = torch.empty((mask.numel() + 7 * num_segments) // 8, dtype=torch.uint8, device=mask.device)
    indptr = torch.empty_like(bit_indptr)
    mask = mask.contiguous()
    launch = quantization._prepare_segments(op, mask, bit_indptr, packed.numel(), "little")
    launch(mask.data_ptr(), bit_indptr.data_ptr(), packed.data_ptr(), indptr.data_ptr())
    return packed, indptr


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
