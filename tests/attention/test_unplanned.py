# SPDX-License-Identifier: Apache-2.0
"""Attention over one sequence, which keeps its scratch between calls: lengths that grow, streams, threads, graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flashinfer
from tests.oracles.attention import attention
from tests.tolerances import assert_close

BF16 = torch.bfloat16


def decode(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = flashinfer.single_decode_with_kv_cache(q[0], k, v, return_lse=True)
    return out, lse


def prefill(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = flashinfer.single_prefill_with_kv_cache_return_lse(q, k, v, causal=True)
    return out, lse


OPERATORS = pytest.mark.parametrize("operator", [decode, prefill], ids=["decode", "prefill"])


def random_inputs(device: torch.device, max_len: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 8, 128, generator=generator).to(device, BF16)
    k, v = torch.randn(2, max_len, 2, 128, generator=generator).to(device, BF16)
    return q, k, v


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("window_left", [-1, 600])
def test_decode_of_a_sequence_that_grows(device: torch.device, layout: str, window_left: int) -> None:
    """Rows of a cache allocated once, more of them at every call."""
    q, k_cache, v_cache = random_inputs(device, 5000)
    for kv_len in (0, 1, 2, 127, 128, 129, 640, 1500, 5000, 3):
        k, v = k_cache[:kv_len], v_cache[:kv_len]
        expected = attention(q[:1], k, v, window_left=window_left)
        if layout == "HND":
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        out, lse = flashinfer.single_decode_with_kv_cache(q[0], k, v, layout, window_left=window_left, return_lse=True)
        assert_close(out[None], expected[0])
        assert_close(lse[None], expected[1])


def test_what_a_known_signature_does_not_excuse(device: torch.device) -> None:
    """Values that are shorter or have fewer heads than the keys, with the strides of an earlier, good call."""
    q, k, v = random_inputs(device, 100)
    for operator in (decode, prefill):
        operator(q, k, v)
        for bad in (v[:99], v[:, :1], v[1:, :1]):
            with pytest.raises(ValueError, match="lengths and heads must agree"):
                operator(q, k, bad)


@pytest.mark.gpu
@OPERATORS
def test_streams_and_threads(operator: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Calls of several lengths at a time, on streams of their own and on one that two threads share."""
    device = torch.device("cuda", 0)
    q, k, v = random_inputs(device, 16000)
    lengths = (16000, 900, 7000, 2100)
    expected = [operator(q, k[:kv_len], v[:kv_len]) for kv_len in lengths]
    shared = torch.cuda.Stream(device)
    streams = [torch.cuda.Stream(device), torch.cuda.Stream(device), shared, shared]
    results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in lengths]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.stream(streams[i]):
            results[i] += [operator(q, k[: lengths[i]], v[: lengths[i]]) for _ in range(100)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(lengths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for i, calls in enumerate(results):
        assert len(calls) == 100
        for call in calls:
            assert_same(call, expected[i])


@pytest.mark.gpu
@OPERATORS
def test_graphs(operator: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Two graphs of two lengths each and calls outside of them, all at a time: none shares scratch with another. A
    replay computes with what the tensors hold then."""
    device = torch.device("cuda", 0)
    q, k, v = random_inputs(device, 9000)
    lengths = (9000, 1100)

    def step() -> list[tuple[Tensor, Tensor]]:
        return [operator(q, k[:kv_len], v[:kv_len]) for kv_len in lengths]

    step()  # load the kernels
    graphs, captured = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            captured.append(step())
    streams = [torch.cuda.Stream(device) for _ in range(3)]
    for scale in (0.5, -2.0):
        q.mul_(scale)
        expected = step()
        torch.cuda.synchronize()
        for _ in range(20):
            for graph, stream in zip(graphs, streams):
                with torch.cuda.stream(stream):
                    graph.replay()
            with torch.cuda.stream(streams[2]):
                outside = step()
        torch.cuda.synchronize()
        for results in (*captured, outside):
            for actual, wanted in zip(results, expected):
                assert_same(actual, wanted)
