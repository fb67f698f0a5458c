# SPDX-License-Identifier: Apache-2.0
"""A small batch as the arguments of each planned wrapper, for tests of hostile calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import flashinfer
from tests.oracles import attention as oracle
from tests.tolerances import assert_close

Tensor = torch.Tensor
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 4, 2, 64, 4
QO_LENS, KV_LENS = (2, 3, 1), (5, 9, 4)
NUM_PAGES = 8
KINDS = ("decode", "paged", "ragged")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets(lengths: Any) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


class Batch:
    """One small batch, as the arguments of one kind of wrapper."""

    def __init__(self, kind: str, device: torch.device, seed: int = 0, graph: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        self.kind, self.device = kind, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.float16
        self.qo_lens = (1, 1, 1) if kind == "decode" else QO_LENS
        self.q = draw(sum(self.qo_lens), HEADS, HEAD_DIM)
        self.pages = torch.randperm(NUM_PAGES, generator=generator)[: sum(-(-n // PAGE_SIZE) for n in KV_LENS)].int()
        self.page_indptr = offsets([-(-n // PAGE_SIZE) for n in KV_LENS])
        self.last_page_len = int32(*[(n - 1) % PAGE_SIZE + 1 for n in KV_LENS])
        if kind == "ragged":
            self.kv: Any = (draw(sum(KV_LENS), KV_HEADS, HEAD_DIM), draw(sum(KV_LENS), KV_HEADS, HEAD_DIM))
            self.index = [offsets(QO_LENS), offsets(KV_LENS)]
        else:
            self.kv = draw(NUM_PAGES, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM)
            self.index = [self.page_indptr, self.pages, self.last_page_len]
            if kind == "paged":
                self.index.insert(0, offsets(QO_LENS))
        self.sizes = (HEADS, KV_HEADS, HEAD_DIM) if kind == "ragged" else (HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE)
        self.wrapper = self.make(graph)

    def make(self, graph: bool = False) -> Any:
        names = {
            "decode": "BatchDecodeWithPagedKVCacheWrapper",
            "paged": "BatchPrefillWithPagedKVCacheWrapper",
            "ragged": "BatchPrefillWithRaggedKVCacheWrapper",
        }
        workspace = torch.empty(16 << 20, dtype=torch.uint8, device=self.device)
        options: dict[str, Any] = {}
        if graph:
            buffers = [
                torch.zeros(32 if i.numel() == len(self.pages) else i.numel(), dtype=torch.int32) for i in self.index
            ]
            roles = {
                "decode": ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer"),
                "paged": ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf"),
                "ragged": ("qo_indptr_buf", "kv_indptr_buf"),
            }
            options = {name: buffer.to(self.device) for name, buffer in zip(roles[self.kind], buffers)}
            options["use_cuda_graph"] = True
            if self.kind != "decode":
                options["custom_mask_buf"] = torch.zeros(64, dtype=torch.uint8, device=self.device)
                options["mask_indptr_buf"] = torch.zeros(4, dtype=torch.int32, device=self.device)
        return getattr(flashinfer, names[self.kind])(workspace, **options)

    def plan(self, *index: Tensor, **options: Any) -> None:
        if self.kind != "decode" and "custom_mask" not in options:
            options.setdefault("causal", True)
        self.wrapper.plan(*(index or self.index), *self.sizes, **{"q_data_type": self.dtype, **options})

    def run(self, **options: Any) -> Tensor:
        kv = self.kv if self.kind == "ragged" else (self.kv,)
        out: Tensor = self.wrapper.run(self.q, *kv, **options)
        return out

    def expected(self) -> Tensor:
        ends = offsets(KV_LENS).tolist()
        rows, outs = self.q.double().cpu().split(self.qo_lens), []
        for i, (q, length) in enumerate(zip(rows, KV_LENS)):
            if self.kind == "ragged":
                k, v = (half[ends[i] : ends[i + 1]].double().cpu() for half in self.kv)
            else:
                begin, end = self.page_indptr[i : i + 2].tolist()
                cache = self.kv[self.pages[begin:end].long().to(self.device)].double().cpu()
                k, v = (cache[:, half].reshape(-1, KV_HEADS, HEAD_DIM)[:length] for half in (0, 1))
            outs.append(oracle.attention(q, k, v, causal=True)[0])
        return torch.cat(outs)

    def check(self) -> None:
        assert_close(self.run(), self.expected())


def single_call(name: str, device: torch.device) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    k = torch.randn(9, KV_HEADS, HEAD_DIM).to(device, dtype)
    q = torch.randn(*((HEADS, HEAD_DIM) if name == "decode" else (3, HEADS, HEAD_DIM))).to(device, dtype)
    return getattr(flashinfer, f"single_{name}_with_kv_cache"), {"q": q, "k": k, "v": k.flip(0)}
