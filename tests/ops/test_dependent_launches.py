# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch, the default from sm_90 on: a kernel starts while the one before it still runs, which
nobody may notice. Chains of operators with hazards (read after write, write after read) against the same operators one
at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Optional

import pytest
import torch

import flashinfer
from flashinfer import families, sampling
from flashinfer.gdn_prefill import chunk_gated_delta_rule
from flashinfer.jit import spec as specs
from flashinfer.jit.source import include_root
from flashinfer.quantization import packbits, segment_packbits_padded

Step = Callable[[], object]


families.register_all()


@pytest.mark.parametrize("family", sorted(specs._families))
def test_every_kernel_waits_and_then_lets_the_next_one_start(family: str) -> None:
    """No kernel without a wait, and none that lets the next one start, or returns, ahead of it."""
    for implementation in specs.family(family).implementations:
        if implementation.on != "cpu":
            _check_order(implementation.header)


def _check_order(header: str) -> None:
    text = _kernel_text(header)
    wait = text.index("wait_for_previous_kernel();")
    assert "allow_next_kernel();" not in text[:wait], f"{header} lets the next kernel start before it has waited"
    beginning = text[text.rindex("__device__", 0, wait) : wait]
    assert "return" not in beginning, f"{header} may return before it has waited"


def _kernel_text(header: str) -> str:
    """The header that waits: the family's own, or one of its folder that it includes for a shared body."""
    text = (include_root() / header).read_text()
    if "wait_for_previous_kernel();" in text:
        return text
    included = re.findall(r'#include "(' + header.split("/")[0] + r'/[^"]+\.cuh)"', text)
    assert len(included) == 1, f"{header} does not call wait_for_previous_kernel()"
    return _kernel_text(included[0])


def _norms(device: torch.device) -> tuple[list[Step], list[torch.Tensor]]:
    """Large and small ones in turn; what one reads, the next but one overwrites."""
    x, y, residual = (torch.randn(4096, 4096, device=device).bfloat16() for _ in range(3))
    few, few_out = x[:3], torch.empty(3, 4096, device=device).bfloat16()
    gated, weight = torch.randn(4096, 8192, device=device).bfloat16(), torch.rand(4096, device=device).bfloat16() + 0.5
    fp8 = torch.empty(4096, 4096, device=device).to(torch.float8_e4m3fn)
    steps: list[Step] = [
        lambda: flashinfer.rmsnorm(x, weight, out=y),
        lambda: flashinfer.rmsnorm(few, weight, out=few_out),
        lambda: flashinfer.gemma_rmsnorm(y, weight, out=x),
        lambda: flashinfer.fused_add_rmsnorm(x, residual, weight),
        lambda: flashinfer.silu_and_mul(gated, out=y),
        lambda: flashinfer.fused_add_rmsnorm(few_out, few, weight),
        lambda: flashinfer.rmsnorm(y, weight, out=gated[:, 4096:]),
        lambda: flashinfer.norm.rmsnorm_quant(fp8, gated[:, 4096:], weight, 0.05),
        lambda: flashinfer.rmsnorm(x[:1], weight, out=x[1:2]),
        lambda: flashinfer.gelu_tanh_and_mul(gated, out=x),
    ]
    return steps, [x, y, residual, gated, few_out, fp8]


def _attention(device: torch.device) -> tuple[list[Step], list[torch.Tensor]]:
    """Rotation and append write what decode and prefill read right after; merges read what those wrote."""
    num_requests, page_size, num_pages = 24, 16, 512
    tensor = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    kv_indptr = tensor([i * num_pages // num_requests for i in range(num_requests + 1)])
    kv_indices = torch.randperm(num_pages, device=device).int()
    last_page_len = tensor([5] * num_requests)
    seq_lens = flashinfer.get_seq_lens(kv_indptr, last_page_len, page_size)
    one_each = tensor(range(num_requests + 1))
    cache = torch.randn(num_pages, 2, page_size, 8, 128, device=device).bfloat16()
    qkv = torch.randn(num_requests, 48, 128, device=device).bfloat16()
    q, k, v = qkv.split([32, 8, 8], dim=1)
    weight = torch.rand(128, device=device).bfloat16() + 0.5
    out, other = torch.empty(num_requests, 32, 128, device=device).bfloat16(), torch.zeros_like(q)
    lse, other_lse = (torch.zeros(num_requests, 32, device=device) for _ in range(2))
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(64 << 20, dtype=torch.uint8, device=device))
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(64 << 20, dtype=torch.uint8, device=device))
    table = (kv_indptr, kv_indices, last_page_len)

    def append() -> None:
        slots = flashinfer.get_batch_indices_positions(one_each, seq_lens, num_requests)
        flashinfer.rope_append_paged_kv_cache(q, k, v, *slots, cache, kv_indices, kv_indptr, q_out=q)
        flashinfer.append_paged_kv_cache(k, v, *slots, cache, kv_indices, kv_indptr, last_page_len)

    steps: list[Step] = [
        lambda: decode.plan(*table, 32, 8, 128, page_size, q_data_type=torch.bfloat16),
        lambda: prefill.plan(one_each, *table, 32, 8, 128, page_size, causal=True, q_data_type=torch.bfloat16),
        lambda: flashinfer.fused_qk_rmsnorm_rope(qkv, weight, weight, seq_lens, 32, 8),
        append,
        lambda: decode.run(q, cache, out=out, lse=lse, return_lse=True),
        lambda: flashinfer.apply_rope_pos_ids_inplace(q, k, seq_lens),
        append,
        lambda: prefill.run(q, cache, out=other, lse=other_lse, return_lse=True),
        lambda: flashinfer.merge_state_in_place(out, lse, other, other_lse),
        lambda: q.copy_(out),
        append,
        lambda: decode.run(q, cache, out=out, lse=lse, return_lse=True),
    ]
    return steps, [qkv, cache, out, lse, other, other_lse]


def _samplers(device: torch.device) -> tuple[list[Step], list[torch.Tensor]]:
    """Probabilities of a softmax are filtered, drawn from, and written over by the next one."""
    logits = torch.randn(64, 32000, device=device) * 3
    probs, ids = torch.zeros_like(logits), torch.zeros(5, 64, dtype=torch.int32, device=device)
    bits, state = torch.zeros(64 * 32000 // 8, dtype=torch.uint8, device=device), {"seed": 5, "offset": 0}
    segments = torch.tensor([0, 1001, 640000], device=device)
    segment_bits = segment_packbits_padded(probs.flatten()[:640000] > 1e-5, segments)[0].zero_()

    def pack() -> None:
        bits.copy_(packbits(probs.flatten() > 1e-5))
        segment_bits.copy_(segment_packbits_padded(probs.flatten()[:640000] > 1e-5, segments)[0])

    steps: list[Step] = [
        lambda: probs.copy_(sampling.softmax(logits)),
        lambda: ids[0].copy_(sampling.sampling_from_probs(probs, **state)),
        lambda: probs.copy_(sampling.top_p_renorm_probs(sampling.softmax(logits, 0.5), 0.95)),
        lambda: ids[1].copy_(sampling.top_p_sampling_from_probs(probs, 0.8, **state)),
        lambda: ids[2].copy_(
            sampling.top_k_top_p_sampling_from_logits(sampling.top_k_mask_logits(logits, 40), 9, 0.9, **state)
        ),
        lambda: ids[3].copy_(sampling.min_p_sampling_from_probs(sampling.top_k_renorm_probs(probs, 60), 0.1, **state)),
        pack,
        lambda: logits.mul_(probs * 100),
        lambda: ids[4].copy_(sampling.sampling_from_logits(logits, **state)),
    ]
    return steps, [logits, probs, ids, bits, segment_bits]


def _delta_rule(device: torch.device) -> tuple[list[Step], list[torch.Tensor]]:
    """Rows, offsets and states are what was written right before, by sequences that are split and such that are not:
    kernels behind the first one of a call read them ahead of their waits."""
    q, k = (torch.randn(700, 2, 128, device=device).bfloat16() for _ in range(2))
    v, out = (torch.randn(700, 4, 128, device=device).bfloat16() for _ in range(2))
    alpha, beta = (torch.rand(700, 4, device=device) * 0.1 + 0.9 * i for i in (1, 0.5))
    pool, weight = torch.zeros(2, 4, 128, 128, device=device), torch.rand(128, device=device).bfloat16() + 0.5
    offsets, others = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 300, 700], [0, 65, 600]))

    def rule(segment: Optional[int]) -> None:
        chunk_gated_delta_rule(
            q, k, v, alpha, beta, None, pool, True, offsets, True, output=out, output_state=pool,
            use_cp=segment is not None, _cp_chunk_len=segment,
        )  # fmt: skip

    def feed_back() -> None:
        for x in (v, q, k):
            flashinfer.rmsnorm(out.view(-1, 128)[: x.shape[0] * x.shape[1]], weight, out=x.view(-1, 128))

    steps: list[Step] = [lambda: rule(64), feed_back, lambda: rule(None), feed_back, lambda: rule(128)]
    steps += [lambda: offsets.copy_(others), lambda: rule(64), lambda: pool.mul_(0.5), lambda: rule(None)]
    return steps, [q, k, v, out, pool, offsets]


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    "chain", [_norms, _attention, _samplers, _delta_rule], ids=lambda chain: chain.__name__.strip("_")
)
def test_chains_are_as_their_steps_one_at_a_time(
    chain: Callable[[torch.device], tuple[list[Step], list[torch.Tensor]]], captured: bool
) -> None:
    torch.manual_seed(0)
    steps, tensors = chain(torch.device("cuda"))
    start = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        for tensor, value in zip(tensors, start):
            tensor.copy_(value)

    def one_at_a_time() -> None:
        for step in steps:
            step()
            torch.cuda.synchronize()

    def together() -> None:
        for step in steps:
            step()

    one_at_a_time()
    restore()
    one_at_a_time()
    expected = [tensor.clone() for tensor in tensors]
    run: Step = together
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            together()
        run = graph.replay
    for _ in range(20):
        restore()
        run()
        for tensor, value in zip(tensors, expected):
            assert torch.equal(tensor.view(torch.uint8), value.view(torch.uint8))
