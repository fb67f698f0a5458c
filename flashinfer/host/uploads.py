# SPDX-License-Identifier: Apache-2.0
"""From the host to a device, without waiting for it."""

from __future__ import annotations

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device: itself if it is there, else an asynchronous copy.

    The caller's may be overwritten at once: what is copied from is pinned memory of our own, which the allocator keeps
    until the copy is done.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    staging = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return staging.copy_(tensor).to(device, non_blocking=True)
