# SPDX-License-Identifier: Apache-2.0
"""Custom masks of batch prefill: lengths that disagree with the plan, buffers that do not fit, who owns the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.attention.mask import take_mask
from tests.oracles.attention import attention
from tests.oracles.quantization import packbits
from tests.tolerances import assert_close

OP = "plan"
QO_LENS, KV_LENS = [2, 0, 5, 1], [3, 4, 7, 9]
NUM_BITS = [qo * kv for qo, kv in zip(QO_LENS, KV_LENS)]  # 6, 0, 35, 9: none but the 0 is a whole number of bytes
NUM_BYTES = [-(-bits // 8) for bits in NUM_BITS]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """With its number, as a wrapper takes it from its workspace."""
    return torch.empty(0, device=request.param).device


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def lengths(device: torch.device) -> tuple[Tensor, Tensor]:
    return offsets(QO_LENS).to(device), torch.tensor(KV_LENS, dtype=torch.int32, device=device)


def booleans() -> Tensor:
    return torch.rand(sum(NUM_BITS), generator=torch.Generator().manual_seed(0)) < 0.5


def packed_bytes(mask: Tensor) -> list[int]:
    return [byte for piece in mask.split(NUM_BITS) for byte in packbits(piece.tolist(), "little")]


@pytest.mark.parametrize("extra", [0, 1, 40])
def test_a_mask_and_where_each_request_begins(device: torch.device, extra: int) -> None:
    """As long as needed, or longer."""
    mask = booleans()
    longer = torch.cat([mask, torch.ones(extra).bool()])
    as_bytes = torch.tensor([*packed_bytes(mask), *[255] * extra], dtype=torch.uint8)
    for source in {torch.device("cpu"), device}:
        for given in ((longer.to(source), None), (longer.float().to(source), None), (None, as_bytes.to(source))):
            packed, indptr = take_mask(OP, device, *given, *lengths(device), None)
            assert (packed.device.type, packed.dtype, indptr.dtype) == (device.type, torch.uint8, torch.int32)
            assert indptr.tolist() == offsets(NUM_BYTES).tolist()
            assert packed.tolist()[: sum(NUM_BYTES)] == packed_bytes(mask)


@pytest.mark.parametrize("missing", [1, 8, 25, sum(NUM_BITS)])
def test_a_mask_shorter_than_the_lengths(device: torch.device, missing: int) -> None:
    """Known on the CPU, and on a GPU where the lengths were given on the host."""
    mask, bits, num_bytes = booleans(), sum(NUM_BITS), sum(NUM_BYTES)
    on_host = None if device.type == "cpu" else lengths(torch.device("cpu"))
    short = mask[: bits - missing].to(device)
    with pytest.raises(
        ValueError, match=rf"^plan: custom_mask holds {bits - missing} booleans; expected {bits}, qo_len"
    ):
        take_mask(OP, device, short, None, *lengths(device), None, on_host)
    with pytest.raises(
        ValueError, match=rf"^plan: custom_mask holds {bits - missing} booleans; expected {bits}, qo_len"
    ):
        take_mask(OP, device, short[None, :, None], None, *lengths(device), None, on_host)
    missing = min(missing, num_bytes)
    as_bytes = torch.zeros(num_bytes - missing, dtype=torch.uint8, device=device)
    with pytest.raises(
        ValueError, match=rf"packed_custom_mask holds {num_bytes - missing} bytes; expected {num_bytes}"
    ):
        take_mask(OP, device, None, as_bytes, *lengths(device), None, on_host)


def test_packed_lengths_are_rounded_up_request_by_request(device: torch.device) -> None:
    """Seven bytes hold all the bits, but not each request from a byte of its own."""
    assert -(-sum(NUM_BITS) // 8) == 7 < sum(NUM_BYTES) == 8
    on_host = lengths(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"packed_custom_mask holds 7 bytes; expected 8"):
        take_mask(OP, device, None, torch.zeros(7, dtype=torch.uint8), *lengths(device), None, on_host)


@pytest.mark.gpu
def test_a_short_mask_of_unknown_lengths_is_packed_within_its_memory() -> None:
    """Nobody waits to find out; what lies behind the mask is neither read nor is anything else written."""
    device = torch.empty(0, device="cuda").device
    buffer = torch.full((64,), 255, dtype=torch.uint8, device=device)
    mask = buffer[:16].zero_().view(torch.bool)
    packed, indptr = take_mask(OP, device, mask, None, *lengths(device), None)
    assert indptr.tolist() == offsets(NUM_BYTES).tolist()
    assert not packed.any()


def test_kinds_of_masks(device: torch.device) -> None:
    def take(custom: Any, packed: Any = None) -> None:
        take_mask(OP, device, custom, packed, *lengths(device), None)

    for wrong in ([True] * 50, "mask", 1.0):
        with pytest.raises(TypeError, match=r"plan: custom_mask is .*; expected a tensor"):
            take(wrong)
        with pytest.raises(TypeError, match=r"plan: packed_custom_mask is .*; expected a tensor"):
            take(None, wrong)
    for wrong in (torch.zeros(8).bool(), torch.zeros(8).int(), torch.zeros(2, 4).byte(), torch.tensor(1).byte()):
        with pytest.raises(ValueError, match=r"packed_custom_mask is torch\..*; expected a uint8 vector"):
            take(None, wrong.to(device))
    with pytest.raises(ValueError, match=r"custom_mask is on meta; expected"):
        take(torch.ones(50, device="meta").bool())
    with pytest.raises(ValueError, match=r"custom_mask is on meta; expected"):
        take(None, torch.ones(50, device="meta").byte())


def test_buffers_of_a_graph(device: torch.device) -> None:
    """What does not fit is an error that leaves both buffers as they are."""
    byte = lambda n: torch.full((n,), 7, dtype=torch.uint8, device=device)  # noqa: E731
    index = lambda n: torch.full((n,), 7, dtype=torch.int32, device=device)  # noqa: E731
    mask, num_bytes = booleans(), sum(NUM_BYTES)
    on_host = lengths(torch.device("cpu"))
    buffers = (byte(20), index(5))
    packed, indptr = take_mask(OP, device, mask, None, *lengths(device), buffers, on_host)
    assert packed is buffers[0] and indptr is buffers[1] and indptr.tolist() == offsets(NUM_BYTES).tolist()
    assert packed.tolist()[:num_bytes] == packed_bytes(mask)

    wrong: list[tuple[Tensor | None, Tensor | None, str]] = [
        (None, index(5), "needs custom_mask_buf and mask_indptr_buf"),
        (byte(20), None, "needs custom_mask_buf and mask_indptr_buf"),
        (byte(num_bytes - 1), index(5), f"custom_mask_buf holds {num_bytes - 1} bytes, the mask takes {num_bytes}"),
        (byte(20), index(4), r"mask_indptr_buf holds 4 entries; expected at least 5"),
        (byte(20).view(torch.bool), index(5), r"custom_mask_buf is torch.bool"),
        (byte(40)[::2], index(5), r"custom_mask_buf is torch.uint8 .* strides \[2\]"),
        (byte(20), index(5).long(), r"mask_indptr_buf is torch.int64"),
        (byte(20), index(10)[::2], r"mask_indptr_buf is torch.int32 .* strides \[2\]"),
        (byte(20).to("meta"), index(5), "custom_mask_buf is .* on meta"),
    ]
    for mask_buf, indptr_buf, match in wrong:
        with pytest.raises(ValueError, match=match):
            take_mask(OP, device, mask, None, *lengths(device), (mask_buf, indptr_buf), on_host)
        for buffer in (mask_buf, indptr_buf):
            assert buffer is None or buffer.is_meta or (buffer == (1 if buffer.dtype == torch.bool else 7)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bool", "packed"])
def test_a_plan_owns_a_pinned_mask(kind: str) -> None:
    """The copy to the device is behind other work; the caller's memory is not read by then."""
    device, mask = torch.empty(0, device="cuda").device, booleans()
    as_bytes = torch.tensor(packed_bytes(mask), dtype=torch.uint8)
    given = mask.pin_memory() if kind == "bool" else as_bytes.pin_memory()
    take_mask(OP, device, *((given, None) if kind == "bool" else (None, given)), *lengths(device), None)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    packed, _ = take_mask(OP, device, *((given, None) if kind == "bool" else (None, given)), *lengths(device), None)
    given.zero_()
    assert packed.tolist()[: sum(NUM_BYTES)] == packed_bytes(mask)


# ------------------------------------------------------------------------------------------------------ through plan()


def plan(
    device: torch.device, custom: Tensor | None, packed: Tensor | None
) -> tuple[flashinfer.BatchPrefillWithPagedKVCacheWrapper, Tensor]:
    """Two requests of two queries over seven keys, in pages of four; index tensors on the host."""
    tensor = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    num_bytes = 8 if device.type == "cpu" else 64 << 20
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(num_bytes, dtype=torch.uint8, device=device))
    wrapper.plan(
        tensor(0, 2, 4), tensor(0, 2, 4), tensor(0, 1, 2, 3), tensor(3, 3), 4, 2, 64, 4, custom_mask=custom,
        packed_custom_mask=packed, q_data_type=torch.float16,
    )  # fmt: skip
    return wrapper, torch.randn(4, 2, 4, 2, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)


def assert_masked(wrapper: flashinfer.BatchPrefillWithPagedKVCacheWrapper, cache: Tensor, mask: Tensor) -> None:
    q = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(2)).to(cache)
    out = wrapper.run(q, cache)
    assert isinstance(out, Tensor)
    for request, pages in enumerate(((0, 1), (2, 3))):
        k, v = (cache[list(pages), half].reshape(8, 2, 64)[:7] for half in (0, 1))
        rows, visible = slice(2 * request, 2 * request + 2), mask[14 * request : 14 * request + 14].view(2, 7)
        assert_close(out[rows], attention(q[rows], k, v, custom_mask=visible)[0])


def test_a_plan_of_a_short_mask(device: torch.device) -> None:
    with pytest.raises(
        ValueError, match=r"custom_mask holds 14 booleans; expected 28, qo_len \* kv_len of all requests"
    ):
        plan(device, torch.ones(14, dtype=torch.bool), None)
    with pytest.raises(ValueError, match=r"packed_custom_mask holds 3 bytes; expected 4"):
        plan(device, None, torch.ones(3, dtype=torch.uint8))
    mask = torch.rand(28, generator=torch.Generator().manual_seed(1)) < 0.6
    assert_masked(*plan(device, mask, None), mask)


def test_a_plan_owns_its_mask(device: torch.device) -> None:
    """What was given on the host may be overwritten as soon as the plan returns."""
    mask = torch.rand(28, generator=torch.Generator().manual_seed(1)) < 0.6
    bytes_ = [byte for piece in mask.split(14) for byte in packbits(piece.tolist(), "little")]
    for given in ((mask.clone(), None), (None, torch.tensor(bytes_, dtype=torch.uint8))):
        planned = plan(device, *given)
        for tensor in given:
            if tensor is not None:
                tensor.fill_(0)
        assert_masked(*planned, mask)
