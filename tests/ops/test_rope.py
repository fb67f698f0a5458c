# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding against the FP64 oracle, on both targets."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.oracles import rope as oracle
from tests.tolerances import assert_close

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class Case(NamedTuple):
    num_tokens: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int


CASES = {
    "llama": Case(9, 32, 8, 128, 128),
    "one token": Case(1, 32, 8, 128, 128),
    "group of 7": Case(5, 28, 4, 128, 128),
    "odd heads": Case(6, 5, 1, 64, 64),
    "head_dim 256": Case(4, 8, 2, 256, 256),
    "head_dim 96": Case(7, 6, 3, 96, 96),
    "partial": Case(7, 8, 2, 128, 64),
    "partial, GLM": Case(3, 4, 2, 80, 20),
    "rotary part of MLA": Case(5, 16, 1, 64, 64),
    "partial of a wide head": Case(3, 2, 1, 512, 64),
    "no tokens": Case(0, 4, 2, 64, 64),
}
# Short and long: at 131072 an angle formed in fp32 is off by up to 0.01 rad.
POSITIONS = [0, 1, 131071, 5, 1000003, 131072, 7, 99999, 2]


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def make_qk(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    q = make((case.num_tokens, case.num_qo_heads, case.head_dim), dtype, device, 0)
    return q, make((case.num_tokens, case.num_kv_heads, case.head_dim), dtype, device, 1)


def make_positions(case: Case, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(POSITIONS[: case.num_tokens], dtype=dtype, device=device)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_pos_ids(device: torch.device, name: str, interleave: bool, dtype: torch.dtype) -> None:
    case = CASES[name]
    q, k = make_qk(case, dtype, device)
    positions = make_positions(case, torch.int32, device)
    angles = oracle.angles_of(positions, oracle.frequencies(case.rotary_dim, 2.0, 5e5))
    expected = [oracle.rotate(x, angles, interleave) for x in (q, k)]
    before = q.clone(), k.clone()
    got = flashinfer.apply_rope_pos_ids(q, k, positions, case.rotary_dim, interleave, 2.0, 5e5)
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    for x, y in zip(got, expected):
        assert_close(x, y)
    assert flashinfer.apply_rope_pos_ids_inplace(q, k, positions, case.rotary_dim, interleave, 2.0, 5e5) is None
    assert_close(q, expected[0])
    assert_close(k, expected[1])
    if case.rotary_dim < case.head_dim:
        assert torch.equal(q[..., case.rotary_dim :], before[0][..., case.rotary_dim :])


@pytest.mark.sanitizer
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_ragged_rope(device: torch.device, interleave: bool, index_dtype: torch.dtype) -> None:
    """Requests of length zero at both ends, and two rows of padding past the batch."""
    indptr = torch.tensor([0, 0, 4, 5, 5, 12, 12], dtype=index_dtype, device=device)
    offsets = torch.tensor([3, 131000, 7, 9, 0, 4], dtype=index_dtype, device=device)
    q, k = make((14, 4, 128), torch.float32, device, 0), make((14, 2, 128), torch.float32, device, 1)
    positions = oracle.ragged_positions(indptr, offsets, 14)
    for rotary_dim in (None, 32):
        angles = oracle.angles_of(positions, oracle.frequencies(rotary_dim or 128))
        expected = [oracle.rotate(x, angles, interleave) for x in (q, k)]
        for x, y in zip(flashinfer.apply_rope(q, k, indptr, offsets, rotary_dim, interleave), expected):
            assert_close(x, y)
        turned = q.clone(), k.clone()
        flashinfer.apply_rope_inplace(*turned, indptr, offsets, rotary_dim, interleave)
        for x, y in zip(turned, expected):
            assert_close(x, y)


@pytest.mark.parametrize("interleave", [False, True])
def test_llama31(device: torch.device, interleave: bool) -> None:
    case = CASES["llama"]
    q, k = make_qk(case, torch.float32, device)
    positions = make_positions(case, torch.int64, device)
    angles = oracle.angles_of(positions, oracle.llama31_frequencies(128))
    expected = [oracle.rotate(x, angles, interleave) for x in (q, k)]
    # One request per row, so that the ragged operators see the same positions.
    indptr = torch.arange(case.num_tokens + 1, device=device)
    for got in (
        flashinfer.apply_llama31_rope_pos_ids(q, k, positions, interleave=interleave),
        flashinfer.apply_llama31_rope(q, k, indptr, positions, interleave=interleave),
    ):
        for x, y in zip(got, expected):
            assert_close(x, y)
    for inplace, where in (
        (flashinfer.apply_llama31_rope_pos_ids_inplace, (positions,)),
        (flashinfer.apply_llama31_rope_inplace, (indptr, positions)),
    ):
        turned = q.clone(), k.clone()
        inplace(*turned, *where, interleave=interleave)
        for x, y in zip(turned, expected):
            assert_close(x, y)


def test_llama31_arguments(device: torch.device) -> None:
    q, k = make_qk(CASES["one token"], torch.float32, device)
    positions = torch.tensor([20000], device=device)
    angles = oracle.angles_of(positions, oracle.llama31_frequencies(128, 32.0, 1e6, 2.0, 8.0, 4096))
    got = flashinfer.apply_llama31_rope_pos_ids(q, k, positions, None, False, 32.0, 1e6, 2.0, 8.0, 4096)
    assert_close(got[0], oracle.rotate(q, angles))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_cos_sin_cache(device: torch.device, name: str, is_neox: bool, table_dtype: torch.dtype) -> None:
    """Heads flat in the last axis, as engines pass them; the table's own rounding is part of the input."""
    case = CASES[name]
    q, k = make_qk(case, torch.bfloat16, device)
    positions = (make_positions(case, torch.int64, device) % 50).contiguous()
    angles = oracle.angles_of(torch.arange(50), oracle.frequencies(case.rotary_dim))
    table = torch.cat([angles.cos(), angles.sin()], dim=1).to(device, table_dtype)
    rows = table[positions].cpu().double()
    half = case.rotary_dim // 2
    expected = [oracle.rotate_by(x, rows[:, :half], rows[:, half:], not is_neox) for x in (q, k)]
    flat = (
        q.view(case.num_tokens, case.num_qo_heads * case.head_dim),
        k.view(case.num_tokens, case.num_kv_heads * case.head_dim),
    )
    got = flashinfer.apply_rope_with_cos_sin_cache(positions, *flat, case.head_dim, table, is_neox)
    for x, out, y in zip(flat, got, expected):
        assert out.shape == x.shape
        assert_close(out.view(y.shape), y)
    flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, *flat, case.head_dim, table, is_neox)
    assert_close(q, expected[0])
    assert_close(k, expected[1])


@pytest.mark.sanitizer
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
@pytest.mark.parametrize("interleave", [False, True])
def test_strided_and_misaligned(device: torch.device, offset: int, interleave: bool) -> None:
    """q and k cut out of a packed projection; v and the gaps between must not change."""
    if interleave and offset == 1:
        pytest.skip("an odd offset and interleaved pairs do not go together; test_errors covers it")
    qkv = make((7, 8 * 72 + 8), torch.bfloat16, device, 0)
    before = qkv.clone()
    view = qkv[:, offset : offset + 8 * 72].view(7, 8, 72)
    q, k = view[:, :5, :64], view[:, 5:7, :64]
    positions = make_positions(Case(7, 5, 2, 64, 64), torch.int32, device)
    angles = oracle.angles_of(positions, oracle.frequencies(64))
    expected = [oracle.rotate(x, angles, interleave) for x in (q, k)]
    for x, y in zip(flashinfer.apply_rope_pos_ids(q, k, positions, None, interleave), expected):
        assert_close(x, y)
    flashinfer.apply_rope_pos_ids_inplace(q, k, positions, None, interleave)
    assert_close(q, expected[0])
    assert_close(k, expected[1])
    q.zero_(), k.zero_()
    before_view = before[:, offset : offset + 8 * 72].view(7, 8, 72)
    before_view[:, :5, :64].zero_(), before_view[:, 5:7, :64].zero_()
    assert torch.equal(qkv, before)


def test_heads_before_tokens(device: torch.device) -> None:
    """A transposed [heads, tokens, dim] tensor."""
    q, k = make((4, 9, 64), torch.float16, device, 0), make((2, 9, 64), torch.float16, device, 1)
    positions = make_positions(CASES["llama"], torch.int32, device)
    angles = oracle.angles_of(positions, oracle.frequencies(64))
    got = flashinfer.apply_rope_pos_ids(q.transpose(0, 1), k.transpose(0, 1), positions)
    assert_close(got[0], oracle.rotate(q.transpose(0, 1), angles))
    assert_close(got[1], oracle.rotate(k.transpose(0, 1), angles))


def test_nan_stays_in_its_pair(device: torch.device) -> None:
    q, k = make_qk(CASES["llama"], torch.bfloat16, device)
    q[3, 2, 5] = float("nan")
    out, _ = flashinfer.apply_rope_pos_ids(q, k, make_positions(CASES["llama"], torch.int32, device))
    assert out.isnan().nonzero().tolist() == [[3, 2, 5], [3, 2, 69]]


def test_queries_or_keys_may_have_no_heads(device: torch.device) -> None:
    q, k = make_qk(CASES["llama"], torch.bfloat16, device)
    positions = make_positions(CASES["llama"], torch.int32, device)
    angles = oracle.angles_of(positions, oracle.frequencies(128))
    out, none = flashinfer.apply_rope_pos_ids(q, k[:, :0], positions)
    assert_close(out, oracle.rotate(q, angles))
    assert none.shape == (9, 0, 128)
    assert_close(flashinfer.apply_rope_pos_ids(q[:, :0], k, positions)[1], oracle.rotate(k, angles))
    flashinfer.apply_rope_pos_ids_inplace(q[:, :0], k[:, :0], positions)


def test_many_tokens(device: torch.device) -> None:
    q, k = make((3001, 3, 64), torch.bfloat16, device, 0), make((3001, 1, 64), torch.bfloat16, device, 1)
    positions = torch.randint(0, 1 << 20, (3001,), generator=torch.Generator().manual_seed(0)).to(device)
    angles = oracle.angles_of(positions, oracle.frequencies(64))
    for x, y in zip(flashinfer.apply_rope_pos_ids(q, k, positions), (q, k)):
        assert_close(x, oracle.rotate(y, angles))


def test_errors_name_the_argument(device: torch.device) -> None:
    q, k = make_qk(CASES["llama"], torch.bfloat16, device)
    positions = make_positions(CASES["llama"], torch.int32, device)
    with pytest.raises(ValueError, match=r"rotary_dim is 256; expected a multiple of 4, at most 128"):
        flashinfer.apply_rope_pos_ids(q, k, positions, 256)
    with pytest.raises(ValueError, match=r"rope_scale is 0.0; expected a finite number of 32 bits, above 0"):
        flashinfer.apply_rope_pos_ids(q, k, positions, rope_scale=0)
    with pytest.raises(ValueError, match=r"high_freq_factor is 1; expected more than low_freq_factor, 1"):
        flashinfer.apply_llama31_rope_pos_ids(q, k, positions, high_freq_factor=1)
    with pytest.raises(ValueError, match=r"rotary_dim is 30; expected a multiple of 4"):
        flashinfer.apply_rope_pos_ids(q, k, positions, 30)
    with pytest.raises(ValueError, match=r"k has shape \[9, 8, 64\]; expected \[9, num_heads, 128\]"):
        flashinfer.apply_rope_pos_ids(q, k[..., :64], positions)
    with pytest.raises(ValueError, match=r"positions has shape \[8\]; expected \[9\]"):
        flashinfer.apply_rope_pos_ids(q, k, positions[:8])
    with pytest.raises(ValueError, match=r"positions is torch.float32; expected torch.int32 or torch.int64"):
        flashinfer.apply_rope_pos_ids(q, k, positions.float())
    with pytest.raises(ValueError, match=r"k is torch.float16; expected torch.bfloat16, the dtype of q"):
        flashinfer.apply_rope_pos_ids(q, k.half(), positions)
    with pytest.raises(UnsupportedConfig, match=r"q is torch.int32; expected float16, bfloat16 or float32"):
        flashinfer.apply_rope_pos_ids(q.int(), k.int(), positions)
    with pytest.raises(ValueError, match=r"indptr has shape \[9\]; expected \[10\]"):
        flashinfer.apply_rope(q, k, positions, positions)
    with pytest.raises(ValueError, match=r"q has shape \[9, 4096\]; expected \[num_tokens, num_heads \* 100\]"):
        flashinfer.apply_rope_with_cos_sin_cache(
            positions, q.flatten(1), k.flatten(1), 100, torch.zeros(9, 64, device=device)
        )
    if device.type == "cuda":
        odd = torch.zeros(9 * 4096 + 1, dtype=torch.bfloat16, device=device)[1:].view(9, 32, 128)
        with pytest.raises(ValueError, match=r"odd stride or offset, which interleave=True does not allow"):
            flashinfer.apply_rope_pos_ids(odd, k, positions, interleave=True)


@pytest.mark.gpu
def test_cuda_graph() -> None:
    device = torch.device("cuda")
    q, k = make_qk(CASES["llama"], torch.bfloat16, device)
    positions = torch.zeros(9, dtype=torch.int32, device=device)
    out = flashinfer.apply_rope_pos_ids(q, k, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashinfer.apply_rope_pos_ids(q, k, positions)
    positions.copy_(make_positions(CASES["llama"], torch.int32, device))
    graph.replay()
    angles = oracle.angles_of(positions, oracle.frequencies(128))
    assert_close(out[0], oracle.rotate(q, angles))
    assert_close(out[1], oracle.rotate(k, angles))
