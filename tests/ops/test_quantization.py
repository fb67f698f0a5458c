# SPDX-License-Identifier: Apache-2.0
"""packbits and segment_packbits: exact, on both targets."""

from __future__ import annotations

import itertools

import pytest
import torch

import flashinfer
from flashinfer import quantization
from tests.oracles import quantization as oracle

SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 127, 1000, 16384, 70001]
SEGMENTS = {
    "even": [8, 16, 24],
    "odd": [3, 5, 1, 9, 17, 130],
    "some empty": [0, 0, 7, 0, 12, 0],
    "all empty": [0, 0],
    "one": [1001],
    "none": [],
    "many": [i * 7919 % 41 for i in range(700)],
}


def make(size: int, device: torch.device) -> torch.Tensor:
    return (torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.4).to(device)


@pytest.mark.parametrize("bitorder", ["big", "little"])
def test_packbits(device: torch.device, bitorder: str) -> None:
    for size in SIZES:
        x = make(size, device)
        packed = flashinfer.packbits(x, bitorder)
        assert packed.dtype == torch.uint8 and packed.tolist() == oracle.packbits(x.tolist(), bitorder), size


def test_packbits_from_any_offset_and_dtype(device: torch.device) -> None:
    x = make(1000, device)
    for offset in (1, 4, 8, 16):
        expected = oracle.packbits(x[offset:].tolist(), "big")
        assert flashinfer.packbits(x[offset:]).tolist() == expected
    assert flashinfer.packbits(x[::3]).tolist() == oracle.packbits(x[::3].tolist(), "big")
    assert flashinfer.packbits(x.int() * 5).tolist() == oracle.packbits(x.tolist(), "big")


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_segment_packbits(device: torch.device, name: str, bitorder: str, dtype: torch.dtype) -> None:
    lengths = SEGMENTS[name]
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for offset in (0, 5):  # aligned and not
        x = make(bounds[-1] + offset, device)[offset:]
        packed, packed_indptr = flashinfer.segment_packbits(
            x, torch.tensor(bounds, dtype=dtype, device=device), bitorder
        )
        pieces = [oracle.packbits(x[a:b].tolist(), bitorder) for a, b in itertools.pairwise(bounds)]
        assert packed.tolist() == [byte for piece in pieces for byte in piece]
        assert packed_indptr.dtype == dtype
        assert packed_indptr.tolist() == [sum(map(len, pieces[:i])) for i in range(len(pieces) + 1)]


def test_errors_name_the_argument(device: torch.device) -> None:
    x = make(16, device)
    with pytest.raises(ValueError, match="bitorder is 'middle'; expected 'big' or 'little'"):
        flashinfer.packbits(x, "middle")
    with pytest.raises(ValueError, match=r"x has shape \[4, 4\]; expected one dimension"):
        flashinfer.packbits(x.view(4, 4))
    with pytest.raises(ValueError, match=r"indptr is torch.float32; expected torch.int32 or torch.int64"):
        flashinfer.segment_packbits(x, torch.tensor([0.0, 16.0], device=device))


# name -> offsets into 40 booleans, of which no segment may be read or written past the ends
HOSTILE = {
    "past the end": [0, 3, 41],
    "far past the end": [0, 3, 1 << 20],
    "begins past the end": [41, 60, 80],
    "descends": [0, 30, 10, 40],
    "ends below its begin": [40, 0],
    "far down": [0, -(1 << 30), 40],
    "begins below zero": [-1, 8, 40],
    "all below zero": [-40, -20, -1],
    "jumps": [0, 1 << 30, 0, 40],
    "falls further than an int32 says": [0, 5, -(1 << 31)],
    "overflows": [0, (1 << 31) - 1, -(1 << 31), 40],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_wrong_offsets_are_errors_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    """Every time: offsets are no part of a signature."""
    x, right = make(40, torch.device("cpu")), torch.tensor([0, 8, 30, 40][: len(HOSTILE[name])], dtype=dtype)
    wrong = torch.tensor(HOSTILE[name], dtype=dtype)
    expected = "starts? at 0 or above and never descend; got|indptr ends at .*; expected at most 40, the length of x"
    for function in (flashinfer.segment_packbits, quantization.segment_packbits_padded):
        function(x, right)
        with pytest.raises((ValueError, IndexError), match=rf"^segment_packbits: .*({expected})"):
            function(x, wrong)


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_wrong_offsets_write_nothing_outside(name: str, dtype: torch.dtype) -> None:
    """On a GPU offsets are not looked at: what is made of them is anything, and stays within the result."""
    device = torch.device("cuda")
    x, indptr = make(56, device)[16:], torch.tensor(HOSTILE[name], dtype=dtype, device=device)
    num_segments = indptr.shape[0] - 1
    for num_bytes in (quantization.most_bytes(40, num_segments), 5, 3, 1):
        around = torch.full((num_bytes + 64,), 7, dtype=torch.uint8, device=device)
        offsets = torch.full((num_segments + 9,), 7, dtype=dtype, device=device)
        packed, packed_indptr = around[32 : 32 + num_bytes], offsets[4 : 5 + num_segments]
        quantization._pack_segments("segment_packbits", x, indptr, packed, packed_indptr, "little")
        torch.cuda.synchronize()
        assert (around[:32] == 7).all() and (around[32 + num_bytes :] == 7).all()
        assert (offsets[:4] == 7).all() and (offsets[5 + num_segments :] == 7).all()
        ascending = packed_indptr.tolist()
        assert ascending[0] == 0 and (name == "overflows" or ascending == sorted(ascending))


@pytest.mark.gpu
def test_offsets_far_past_the_end_are_an_error_where_the_size_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    x, indptr = make(40, torch.device("cuda")), torch.tensor([0, 3, 1 << 20], device="cuda")
    with pytest.raises(IndexError, match="segment_packbits: indptr ends past x, which has 40 booleans"):
        flashinfer.segment_packbits(x, indptr)
    monkeypatch.setattr(quantization.indices, "_checks_devices", lambda: True)  # FLASHINFER_CHECK_INDICES=1
    with pytest.raises(IndexError, match="indptr ends at 41; expected at most 40, the length of x"):
        flashinfer.segment_packbits(x, torch.tensor([0, 3, 41], device="cuda"))


def test_shapes_of_offsets(device: torch.device) -> None:
    x = make(16, device)
    for wrong in (torch.tensor(16), torch.zeros(0).int(), torch.zeros(2, 2).int(), torch.zeros(4).int()[::2]):
        with pytest.raises(ValueError, match=r"segment_packbits: indptr (has shape|is empty|has stride)"):
            flashinfer.segment_packbits(x, wrong.to(device) if wrong.dim() != 1 or wrong.numel() != 2 else wrong)


@pytest.mark.gpu
def test_segment_packbits_in_a_cuda_graph() -> None:
    """The size is not known while capturing: the result is as long as it can get, with zeros at the end."""
    device = torch.device("cuda")
    x, indptr = make(40, device), torch.tensor([0, 3, 21, 40], dtype=torch.int32, device=device)
    flashinfer.segment_packbits(x, indptr)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed, packed_indptr = flashinfer.segment_packbits(x, indptr)
    indptr.copy_(torch.tensor([0, 16, 16, 40], dtype=torch.int32))
    packed.fill_(255)
    graph.replay()
    assert packed_indptr.tolist() == [0, 2, 2, 5]
    assert packed.tolist() == oracle.packbits(x.tolist(), "big") + [0] * (len(packed) - 5)
