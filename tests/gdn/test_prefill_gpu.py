# SPDX-License-Identifier: Apache-2.0
"""What only a GPU does of the gated delta rule over sequences, against the recurrence in FP64: kernels of other GPUs,
sequences that are split, graphs, values that the host does not see."""

from __future__ import annotations

import functools
import math
from typing import Optional

import pytest
import torch

from flashinfer import gdn_prefill
from flashinfer import target as targets
from flashinfer.host import memo
from tests.gdn.prefill_kit import BF16, DIM, FP16, FP32, call, check, draw
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu


def test_a_long_sequence_that_forgets_nothing() -> None:
    x = draw(torch.device("cuda"), (30_000,), (1, 1, 1), decay=0.0)
    check(x, *call(x, output_final_state=True), x.expected())


@pytest.mark.parametrize("segment", [None, 64])
def test_graph_capture(segment: Optional[int]) -> None:
    """Lengths, slots and values change between replays."""
    device = torch.device("cuda")
    x = draw(device, (100, 60))
    pool = torch.zeros(5, 4, DIM, DIM, device=device)
    slots, offsets = torch.tensor([1, 2], dtype=torch.int32, device=device), x.cu_seqlens
    output = torch.empty(160, 4, DIM, dtype=BF16, device=device)
    options = {
        "initial_state": pool, "output_state": pool, "state_indices": slots, "cu_seqlens": offsets, "output": output,
        "output_final_state": True, "_cp_chunk_len": segment,
    }  # fmt: skip
    run = functools.partial(call, x, g=x.g.exp(), **options)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths, where in (((100, 60), (1, 2)), ((5, 155), (0, 4)), ((160, 0), (3, 1))):
        again = x._replace(lengths=lengths)
        offsets.copy_(again.cu_seqlens), slots.copy_(torch.tensor(where)), pool.copy_(torch.randn_like(pool))
        expected = again._replace(state=pool[list(where)].clone()).expected()
        graph.replay()
        check(again, output, pool[list(where)], expected)


@pytest.mark.parametrize("segment", [None, 64])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("lengths", [(1,), (64,), (193,), (0, 5, 300, 70, 0)], ids=str)
def test_kernels_of_other_gpus(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], dtype: torch.dtype, segment: Optional[int]
) -> None:
    """On Hopper too, as code without wgmma."""
    machine = targets.of_device(torch.device("cuda")).rstrip("af")
    monkeypatch.setattr(targets, "of_device", lambda device: machine)
    monkeypatch.setattr(gdn_prefill, "_memo", memo.Memo())
    x = draw(torch.device("cuda"), lengths, (1, 2, 4), dtype, unit=False)
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True, "_cp_chunk_len": segment}
    check(x, *call(x, **options), x.expected(use_qk_l2norm=True))


@pytest.mark.parametrize(
    "segment, lengths",
    [
        (64, (65,)), (64, (128,)), (64, (193,)), (64, (1, 300, 0, 64, 129)), (128, (0, 5, 0, 700, 128)), (192, (2000,)),
        (1024, (900, 1100)),
    ],
    ids=str,
)  # fmt: skip
def test_segments(segment: int, lengths: tuple[int, ...]) -> None:
    """One, two and many, and sequences that have but one beside them."""
    x = draw(torch.device("cuda"), lengths, (1, 1, 4))
    check(x, *call(x, output_final_state=True, _cp_chunk_len=segment), x.expected())


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_segments_that_forget_nothing(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """Over 16 borders, from a state in a pool that the same launch overwrites."""
    x = draw(torch.device("cuda"), (4096, 70), (1, 2, 2), dtype, state_dtype, decay=0.0, unit=False)
    pool = torch.full((4, 2, DIM, DIM), 3.0, dtype=state_dtype, device="cuda")
    slots = torch.tensor([2, 0], dtype=torch.int32, device="cuda")
    pool[slots.long()] = x.state
    expected = x.expected(use_qk_l2norm=True)
    output, _ = call(
        x, initial_state=pool, output_state=pool, state_indices=slots, output_final_state=True, _cp_chunk_len=256,
        use_qk_l2norm_in_kernel=True, g=x.g, gate_domain="log",
    )  # fmt: skip
    assert_close(output, expected[0])
    assert_close(pool[slots.long()].to(BF16), expected[1])
    assert (pool[[1, 3]] == 3).all()


@pytest.mark.parametrize("alpha", [0.0, 1e-30, 0.5])
def test_segments_that_forget(alpha: float) -> None:
    """Transitions that are zero, or near it."""
    x = draw(torch.device("cuda"), (300,), (1, 1, 1))
    x = x._replace(g=torch.full_like(x.g, math.log(alpha) if alpha else -math.inf))
    check(x, *call(x, output_final_state=True, _cp_chunk_len=64), x.expected())


def test_values_that_the_host_does_not_see() -> None:
    """Nothing is written outside of the tensors given: tokens past the end are none, slots past the pool count as
    negative ones."""
    device = torch.device("cuda")
    x = draw(device, (70, 33))
    memory = torch.full((5, 4, DIM, DIM), 5.0, device=device)
    pool = memory[1:4]
    pool[:] = torch.randn_like(pool)
    before = memory.clone()
    slots = torch.tensor([7, 2], dtype=torch.int64, device=device)
    output, _ = call(x, initial_state=pool, output_state=pool, output_final_state=True, state_indices=slots)
    states = torch.stack([torch.zeros_like(pool[0]), before[3]])
    expected = x._replace(state=states).expected()
    check(x, output, pool[2:], (expected[0], expected[1][1:]))
    assert torch.equal(memory[:3], before[:3]) and torch.equal(memory[4:], before[4:])

    rows = torch.full((200, 4, DIM), 3.0, dtype=BF16, device=device)
    for offsets in ([0, 70, 5000], [-5, 70, 1 << 40], [50, 20, 103], [1 << 31, 1 << 32, 1 << 33]):
        wrong = torch.tensor(offsets, dtype=torch.int64, device=device)
        for segment in (None, 64):
            call(x, cu_seqlens=wrong, output=rows[50:153], output_final_state=True, _cp_chunk_len=segment)
        assert (rows[:50] == 3).all() and (rows[153:] == 3).all()
