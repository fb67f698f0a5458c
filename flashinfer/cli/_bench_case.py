# SPDX-License-Identifier: Apache-2.0
"""One case of `flashinfer bench`, timed: also run as a script, with another installation of flashinfer to import, which
prints what it measured as JSON. Of flashinfer it takes the public operators alone."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_L2_BYTES = 256 << 20  # twice that of any GPU we know


class Case(NamedTuple):
    """As the options name it (`flashinfer bench --help`)."""

    benchmark: str
    device: str
    batch_size: int
    qo_len: int
    kv_len: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    kv_dtype: str
    causal: bool
    repeats: int

    @property
    def is_batch(self) -> bool:
        return self.benchmark.startswith("batch")

    @property
    def is_prefill(self) -> bool:
        return self.benchmark.endswith("prefill")

    @property
    def name(self) -> str:
        pages = f", p{self.page_size}" if self.is_batch else ""
        mask = ", causal" if self.is_prefill and self.causal else ""
        heads = f"{self.num_qo_heads}/{self.num_kv_heads}, d{self.head_dim}"
        return f"{self.batch_size} x {self.qo_len} on {self.kv_len}, {heads}{pages}{mask}, {self.kv_dtype}"

    @property
    def num_bytes(self) -> int:
        """K and V once, q and the output."""
        kv = 2 * self.kv_len * self.num_kv_heads * DTYPES[self.kv_dtype].itemsize
        return (
            self.batch_size * self.head_dim * (kv + 2 * self.qo_len * self.num_qo_heads * DTYPES[self.dtype].itemsize)
        )

    @property
    def num_flops(self) -> int:
        """Two products of each query with each key that it sees."""
        pairs = self.qo_len * self.kv_len
        if self.is_prefill and self.causal and self.kv_len >= self.qo_len:
            pairs -= self.qo_len * (self.qo_len - 1) // 2
        return 4 * self.batch_size * pairs * self.num_qo_heads * self.head_dim


def measure(case: Case) -> float:
    """Microseconds of a call, the median."""
    device = torch.device(case.device)
    num_copies = max(2, min(32, -(-_L2_BYTES // case.num_bytes))) if device.type == "cuda" else 1
    calls = [_call(case, device) for _ in range(num_copies)]
    for call in calls:
        call()
    if device.type == "cpu":
        times = [_seconds(calls) * 1e6 for _ in range(case.repeats)]
        return statistics.median(times) / num_copies
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(case.repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:]) / num_copies


def _seconds(calls: list[Callable[[], Any]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def _call(case: Case, device: torch.device) -> Callable[[], Any]:
    """A call on tensors of its own."""
    import flashinfer

    dtype, kv_dtype = DTYPES[case.dtype], DTYPES[case.kv_dtype]

    def rows(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device).to(of)

    heads, dim = (case.num_qo_heads, case.num_kv_heads), case.head_dim
    if not case.is_batch:
        k, v = (rows(case.kv_len, heads[1], dim, of=kv_dtype) for _ in range(2))
        if not case.is_prefill:
            q = rows(heads[0], dim)
            return lambda: flashinfer.single_decode_with_kv_cache(q, k, v)
        q = rows(case.qo_len, heads[0], dim)
        return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=case.causal)
    num_pages = -(-case.kv_len // case.page_size)

    def ints(values: range | list[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    every = range(case.batch_size + 1)
    pages = (
        ints([i * num_pages for i in every]),
        ints(range(case.batch_size * num_pages)),
        ints([(case.kv_len - 1) % case.page_size + 1] * case.batch_size),
    )
    cache = rows(case.batch_size * num_pages, 2, case.page_size, heads[1], dim, of=kv_dtype)
    q = rows(case.batch_size * case.qo_len, heads[0], dim)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    sizes, types = (*heads, dim, case.page_size), {"q_data_type": dtype, "kv_data_type": kv_dtype}
    wrapper: Any
    if case.is_prefill:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
        wrapper.plan(ints([i * case.qo_len for i in every]), *pages, *sizes, causal=case.causal, **types)
    else:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
        wrapper.plan(*pages, *sizes, **types)
    return lambda: wrapper.run(q, cache)


if __name__ == "__main__":
    print(json.dumps({"us": measure(Case(*json.loads(sys.argv[1])))}))
