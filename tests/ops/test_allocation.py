# SPDX-License-Identifier: Apache-2.0
"""Where results are allocated, on machines of one GPU and of several that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashinfer.host import memo


@pytest.mark.parametrize("num_devices, current, around", [(1, 0, True), (2, 1, True), (2, 0, False)])
def test_results_are_on_the_device_of_the_operands(
    num_devices: int, current: int, around: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's short way allocates on the current device, which may be another one where there are several."""
    device = torch.device("cuda", num_devices - 1)

    def fast(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        return "current device", shape, strides, dtype

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
        return device, shape, dtype

    monkeypatch.setattr(torch._C._dynamo.guards, "_empty_strided_cuda", fast, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    monkeypatch.setattr(torch, "empty", empty)
    allocated: object = memo.allocator((2, 3), torch.float32, device)()
    if around:
        assert allocated == ("current device", (2, 3), (3, 1), torch.float32)
    else:
        assert allocated == (device, (2, 3), torch.float32)
