"""packbits and segment_packbits: exact, on both targets."""

from __future__ import annotations

import itertools

import pytest
import torch

import flashinfer
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
