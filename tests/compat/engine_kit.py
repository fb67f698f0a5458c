# SPDX-License-Identifier: Apache-2.0
"""What calls of serving engines are made on: shapes, a cache, wrappers over buffers that the engine fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flashinfer
from tests.oracles.attention import attention, paged_request

BF16 = torch.bfloat16
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 128
SHAPES = (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM)
NUM_LATENT_HEADS, LATENT_DIMS, OWN_DIMS = 16, (512, 64), (192, 128)
SM_SCALE = 0.07


class Pool:
    """A paged cache that several batches live in, one at a time."""

    def __init__(self, device: torch.device, page_size: int, num_pages: int = 400) -> None:
        self.device, self.page_size, self.num_pages = device, page_size, num_pages
        self.generator = torch.Generator().manual_seed(page_size)
        shape = (num_pages, 2, page_size, NUM_KV_HEADS, HEAD_DIM)
        self.cache = self.draw(*shape)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, BF16)

    def empty(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=self.device)

    def workspace(self) -> Tensor:
        return torch.empty(32 << 20 if self.device.type == "cuda" else 0, dtype=torch.uint8, device=self.device)

    def table(self, kv_lens: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """indptr, indices and last_page_len, on the CPU."""
        pages = torch.tensor([-(-n // self.page_size) for n in kv_lens])
        order = torch.randperm(self.num_pages, generator=self.generator)[: int(pages.sum())].int()
        last = torch.tensor([(n - 1) % self.page_size + 1 if n else 1 for n in kv_lens], dtype=torch.int32)
        return offsets(pages.tolist()), order, last

    def expected(
        self, q: Tensor, qo_lens: tuple[int, ...], table: tuple[Tensor, Tensor, Tensor], **options: Any
    ) -> Tensor:
        indptr, indices, last = table
        masks, outs, begin = options.pop("masks", None), [], 0
        for i, qo_len in enumerate(qo_lens):
            k, v = paged_request(self.cache, "NHD", indices[indptr[i] : indptr[i + 1]].tolist(), int(last[i]))
            mask = {} if masks is None else {"custom_mask": masks[i]}
            outs.append(attention(q[begin : begin + qo_len], k, v, **options, **mask)[0])
            begin += qo_len
        return torch.cat(outs)


def offsets(lengths: Any) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """What repeats the call: a replay of its CUDA graph, or the call itself on the CPU."""
    call()
    if device.type == "cpu":
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def decode_wrapper(pool: Pool, batch_size: int, **options: Any) -> flashinfer.BatchDecodeWithPagedKVCacheWrapper:
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        pool.workspace(), "NHD", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=pool.empty(batch_size + 1), paged_kv_indices_buffer=pool.empty(pool.num_pages),
        paged_kv_last_page_len_buffer=pool.empty(batch_size), **options,
    )  # fmt: skip


def prefill_wrapper(pool: Pool, batch_size: int, **options: Any) -> flashinfer.BatchPrefillWithPagedKVCacheWrapper:
    return flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        pool.workspace(), "NHD", use_cuda_graph=True, backend="fa2", qo_indptr_buf=pool.empty(batch_size + 1),
        paged_kv_indptr_buf=pool.empty(batch_size + 1), paged_kv_indices_buf=pool.empty(pool.num_pages),
        paged_kv_last_page_len_buf=pool.empty(batch_size), **options,
    )  # fmt: skip
