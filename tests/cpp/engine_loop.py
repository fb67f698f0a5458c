# SPDX-License-Identifier: Apache-2.0
"""The serving loop of examples/cpp/engine.cpp by Python's operators: what its tokens are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import flashinfer

QO_HEADS, KV_HEADS, DIM, PAGE, NUM_PAGES, MAX_BATCH = 8, 2, 64, 4, 14, 3
VOCAB, SEED = QO_HEADS * DIM, 7
LENGTHS, BUDGETS = (5, 9, 2, 13, 1, 7), (12, 6, 9, 4, 10, 5)


@dataclass
class Running:
    tokens: list[int]
    budget: int
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def num_pages(self) -> int:
        return -(-(len(self.tokens) + self.budget) // PAGE)


def table(which: int, length: int) -> torch.Tensor:
    """Rows of all tokens, as element_of() of the example makes them."""
    bits = (1 << 32) - 1
    x = (torch.arange(VOCAB * length) + which * 1000003) * 2654435761 & bits
    x = (x ^ x >> 15) * 2246822519 & bits
    x ^= x >> 13
    return ((x >> 8).float() / (1 << 23) - 1).view(VOCAB, length)


class Engine:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.tables = [
            table(which, heads * DIM).view(VOCAB, heads, DIM).to(device, dtype)
            for which, heads in enumerate((QO_HEADS, KV_HEADS, KV_HEADS))
        ]
        self.cache = torch.zeros(NUM_PAGES, 2, PAGE, KV_HEADS, DIM, dtype=dtype, device=device)
        workspace = torch.empty(32 << 20, dtype=torch.uint8, device=device)
        self.prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
        self.decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
        self.free_pages = list(range(NUM_PAGES - 1, -1, -1))
        self.num_drawn = 0

    def run(self) -> list[list[int]]:
        requests = [
            Running([(i * 37 + j * 11) % VOCAB for j in range(length)], budget)
            for i, (length, budget) in enumerate(zip(LENGTHS, BUDGETS))
        ]
        waiting, running = list(requests), []
        while waiting or running:
            while waiting and len(running) < MAX_BATCH and waiting[0].num_pages <= len(self.free_pages):
                request = waiting.pop(0)
                request.pages = [self.free_pages.pop() for _ in range(request.num_pages)]
                running.append(request)
            admitted = [request for request in running if request.num_cached == 0]
            self.forward(admitted or running, bool(admitted))
            for request in [request for request in reversed(running) if request.budget == 0]:
                self.free_pages += request.pages
                running.remove(request)
        return [request.tokens for request in requests]

    def forward(self, requests: list[Running], is_prefill: bool) -> None:
        tokens, batch, positions, pages, last, qo_indptr, indptr = [], [], [], [], [], [0], [0]
        for i, request in enumerate(requests):
            new = range(request.num_cached, len(request.tokens))
            tokens += [request.tokens[at] for at in new]
            batch += [i] * len(new)
            positions += list(new)
            request.num_cached = len(request.tokens)
            pages += request.pages[: -(-request.num_cached // PAGE)]
            qo_indptr.append(len(tokens))
            indptr.append(len(pages))
            last.append((request.num_cached - 1) % PAGE + 1)
        given = [self._ints(x) for x in (indptr, pages, last)]
        q, k, v = (rows[self._ints(tokens).long()] for rows in self.tables)
        flashinfer.apply_rope_pos_ids_inplace(q, k, self._ints(positions))
        slots = (self._ints(batch), self._ints(positions), self.cache, given[1], given[0], given[2])
        flashinfer.append_paged_kv_cache(k, v, *slots)
        sizes, types = (QO_HEADS, KV_HEADS, DIM, PAGE), {"q_data_type": q.dtype, "kv_data_type": q.dtype}
        if is_prefill:
            self.prefill.plan(self._ints(qo_indptr), *given, *sizes, causal=True, sm_scale=0.5, **types)
            out = self.prefill.run(q, self.cache)
        else:
            self.decode.plan(*given, *sizes, sm_scale=0.5, **types)
            out = self.decode.run(q, self.cache)
        rows = self._ints(qo_indptr[1:]) - 1
        drawn = flashinfer.sampling.top_k_top_p_sampling_from_logits(
            out.view(-1, VOCAB), 40, 0.9, indices=rows, seed=SEED, offset=self.num_drawn
        )
        self.num_drawn += 8
        for request, token in zip(requests, drawn.tolist()):
            request.tokens.append(token)
            request.budget -= 1

    def _ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)
