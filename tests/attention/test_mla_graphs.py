# SPDX-License-Identifier: Apache-2.0
"""Latent attention in CUDA graphs, under torch.compile, and planned by engines behind a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashinfer.errors import UnsupportedConfig
from tests.attention.graph_kit import replay_long_and_short
from tests.attention.mla_kit import (
    Batch,
    Case,
    check,
    each_kernel,
    expect,
    make_batch,
    make_wrapper,
    plan,
    run,
)
from tests.attention.prefill_kit import BF16

device = each_kernel  # in place of that of conftest.py


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads, page_size", [(16, 64), (128, 64), (128, 1)])
def test_graph_captured_short_and_replayed_long(num_heads: int, page_size: int) -> None:
    """Padding requests have neither tokens nor KV."""
    device = torch.device("cuda")
    long = Case("long", (1, 2, 0, 3), (4000, 700, 0, 90), num_heads, page_size=page_size)
    short = replace(long, name="short", qo_lens=(2, 2, 1, 1), kv_lens=(16, 17, 18, 19))
    num_pages = 4900 // page_size + 8
    batches = {case.name: make_batch(case, device, seed=3, num_pages=num_pages) for case in (short, long)}
    q = tuple(x.clone() for x in batches["short"].q)
    cache = torch.zeros(num_pages, page_size, 576, dtype=BF16, device=device)
    views = cache[..., :512], cache[..., 512:]
    buffers = {name: torch.zeros(5, dtype=torch.int32, device=device) for name in ("qo_indptr", "kv_indptr")}
    buffers["kv_indices"] = torch.zeros(num_pages + 8, dtype=torch.int32, device=device)
    buffers["kv_len_arr"] = torch.zeros(4, dtype=torch.int32, device=device)
    wrapper = make_wrapper(device, use_cuda_graph=True, **buffers)

    def load(batch: Batch) -> None:
        for target, source in zip((*q, *views), (*batch.q, *batch.caches)):
            target[: len(source)].copy_(source)

    replay_long_and_short(
        batches["short"],
        batches["long"],
        load=load,
        plan=lambda batch: plan(wrapper, batch),
        launch=lambda: wrapper.run(*q, *views, return_lse=True),
        check=lambda batch, result: check(result, expect(batch)),
        max_pages=num_pages + 8,
    )


@pytest.mark.gpu
def test_plan_does_not_wait() -> None:
    device = torch.device("cuda")
    batch = make_batch(Case("plan"), device)
    batch = replace(batch, indices=tuple(x.to(device) for x in batch.indices))
    wrapper = make_wrapper(device)
    plan(wrapper, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan(wrapper, batch)
        result = wrapper.run(*batch.q, *batch.caches, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check((result[0], result[1]), expect(batch))


def test_torch_compile(device: torch.device) -> None:
    """Traced without a graph break, with the same result; a new plan needs no new trace."""
    wrapper = make_wrapper(device)

    def layer(q_nope: Tensor, q_pe: Tensor, ckv: Tensor, kpe: Tensor) -> tuple[Tensor, ...]:
        out, lse = wrapper.run(q_nope * 2, q_pe, ckv, kpe, return_lse=True)
        return out + 1, lse

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        batch = make_batch(Case("compiled"), device, seed)
        plan(wrapper, batch)
        for ours, eager in zip(compiled(*batch.q, *batch.caches), layer(*batch.q, *batch.caches)):
            assert torch.equal(ours, eager)


# -------------------------------------------------------------------------------------------------- as engines call it


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_planning_through_the_cached_module(device: torch.device, graph: bool) -> None:
    """As SGLang plans a captured decode: it fills the buffer of pages, then calls upstream's planner with offsets and
    lengths on the host, which no buffer holds."""
    buffers: dict[str, Tensor] = {}
    if graph:
        sizes = {"qo_indptr": 5, "kv_indptr": 5, "kv_indices": 1024, "kv_len_arr": 4}
        buffers = {name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in sizes.items()}
    wrapper = make_wrapper(device, use_cuda_graph=graph, **buffers)
    first, second = (
        make_batch(Case("sglang", kv_lens=lens, page_size=1), device) for lens in ((5,) * 4, (3, 70, 9, 8))
    )
    plan(wrapper, first)
    check(run(wrapper, first), expect(first))
    qo_indptr, kv_indptr, kv_indices, kv_len = second.indices
    if graph:
        wrapper._kv_indices_buf[: len(kv_indices)].copy_(kv_indices)
    else:
        wrapper._kv_indices_buf = kv_indices.to(device)
    wrapper._causal, wrapper._page_size, wrapper._sm_scale = True, 1, second.case.sm_scale
    workspaces = (
        wrapper._float_workspace_buffer,
        wrapper._int_workspace_buffer,
        wrapper._pin_memory_int_workspace_buffer,
    )
    wrapper._cached_module.plan(*workspaces, qo_indptr, kv_indptr, kv_len.long(), 16, 512, True)
    check(run(wrapper, second), expect(second))
    if graph:
        for name, tensor in (("_qo_indptr_buf", qo_indptr), ("_kv_indptr_buf", kv_indptr), ("_kv_len_arr_buf", kv_len)):
            assert torch.equal(getattr(wrapper, name).cpu(), tensor)
    with pytest.raises(ValueError, match=r"kv_len_arr\[0\] is 70"):
        wrapper._cached_module.plan(*workspaces, qo_indptr, kv_indptr, kv_len.flip(0) + 62, 16, 512, True)
    check(run(wrapper, second), expect(second))
    for other in ((20, 512, True), (16, 256, True), (16, 512, False)):
        with pytest.raises(UnsupportedConfig, match=r"call plan\(\)"):
            wrapper._cached_module.plan(*workspaces, qo_indptr, kv_indptr, kv_len, *other)
    with pytest.raises(UnsupportedConfig, match="_causal was planned as True"):
        wrapper._causal = False
    with pytest.raises(UnsupportedConfig, match="_sm_scale was planned"):
        wrapper._sm_scale = 0.5
