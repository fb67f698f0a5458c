# SPDX-License-Identifier: Apache-2.0
"""Rotation inside of attention has the accuracy of the standalone operator: keys far from their query, at positions
where a frequency in fp32 is off by hundredths of a radian."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flashinfer
from tests.oracles.attention import rotate
from tests.tolerances import assert_close

Tensor = torch.Tensor
PAGE_SIZE, HEAD_DIM = 16, 64


class FarKeys:
    """One request whose keys and values are zeros but for those of the first and of the last page: a long context of
    which little is stored."""

    def __init__(self, position: int, qo_len: int, device: torch.device) -> None:
        self.kv_len, self.qo_len, self.device = position + 1, qo_len, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.float16
        generator = torch.Generator().manual_seed(position)
        self.cache = torch.zeros(3, 2, PAGE_SIZE, 1, HEAD_DIM)  # the first page, all between, the last
        self.cache[::2] = torch.randn(2, 2, PAGE_SIZE, 1, HEAD_DIM, generator=generator)
        self.q = torch.randn(qo_len, 2, HEAD_DIM, generator=generator)
        self.cache, self.q = self.cache.to(device, self.dtype), self.q.to(device, self.dtype)
        num_pages = -(-self.kv_len // PAGE_SIZE)
        pages = torch.ones(num_pages, dtype=torch.int32)
        pages[0], pages[-1] = 0, 2
        self.index = [torch.tensor([0, num_pages]), pages, torch.tensor([(self.kv_len - 1) % PAGE_SIZE + 1])]
        # Logits of several times log(kv_len): the zeros, however many, leave most of the weight to these keys.
        sm_scale = 1.5 * math.log(self.kv_len) / math.sqrt(HEAD_DIM)
        self.options = {"sm_scale": sm_scale, "rope_theta": 1e4, "rope_scale": 1.0}

    def expected(self) -> tuple[Tensor, Tensor]:
        """Keys of zeros have a logit of zero and add nothing but their number."""
        first = torch.arange(PAGE_SIZE)
        last = torch.arange((self.kv_len - 1) // PAGE_SIZE * PAGE_SIZE, self.kv_len)
        k, v = (self.cache[::2, half].double().cpu() for half in (0, 1))
        k, v = (torch.cat([x[0], x[1, : len(last)]]) for x in (k, v))
        positions = torch.cat([first, last])
        scale, theta = self.options["rope_scale"], self.options["rope_theta"]
        queries = torch.arange(self.kv_len - self.qo_len, self.kv_len)
        q = rotate(self.q.double().cpu(), queries, scale, theta)
        logits = torch.einsum("qhd,kd->qhk", q, rotate(k, positions, scale, theta)[:, 0]) * self.options["sm_scale"]
        logits = logits.masked_fill(positions[None, None] > queries[:, None, None], -math.inf)
        num_zeros = (queries + 1 - (positions[None] <= queries[:, None]).sum(-1))[:, None]
        weights = logits.exp()
        total = weights.sum(-1) + num_zeros
        return torch.einsum("qhk,kd->qhd", weights, v[:, 0]) / total[..., None], total.log2()

    def check(self, out: Tensor, lse: Tensor) -> None:
        expected, expected_lse = self.expected()
        assert expected.abs().max() > 0.1, "the far keys weigh nothing"
        # Logits are as large as 60: fp32 rounds them to 8e-6, a GPU rotated queries and keys to fp16, 2^-11 of that.
        scale = 8.0 if self.dtype == torch.float32 else 32.0
        assert_close(out, expected, scale=scale)
        assert_close(lse, expected_lse, scale=10 * scale if self.device.type == "cuda" else 1.0)


POSITIONS = (4095, 131071, 1_000_000)


@pytest.mark.parametrize("position", POSITIONS)
def test_decode(position: int, device: torch.device) -> None:
    case = FarKeys(position, 1, device)
    workspace = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
    wrapper.plan(
        *case.index, 2, 1, HEAD_DIM, PAGE_SIZE, pos_encoding_mode="ROPE_LLAMA", q_data_type=case.dtype, **case.options
    )
    case.check(*wrapper.run(case.q, case.cache, return_lse=True))


@pytest.mark.parametrize("position", POSITIONS)
def test_prefill(position: int, device: torch.device) -> None:
    case = FarKeys(position, 3, device)
    workspace = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
    options: dict[str, Any] = {"causal": True, "pos_encoding_mode": "ROPE_LLAMA", "q_data_type": case.dtype}
    wrapper.plan(torch.tensor([0, 3]), *case.index, 2, 1, HEAD_DIM, PAGE_SIZE, **options, **case.options)
    case.check(*wrapper.run(case.q, case.cache, return_lse=True))


@pytest.mark.gpu
def test_first_use_in_a_graph_capture() -> None:
    """The table of frequencies, and that of ALiBi's slopes, is made while the stream is being captured."""
    from flashinfer.host import constants

    q, k = torch.randn(4, 64, device="cuda").half(), torch.randn(20, 4, 64, device="cuda").half()
    for mode in ("ROPE_LLAMA", "ALIBI"):
        expected = flashinfer.single_decode_with_kv_cache(q, k, k, pos_encoding_mode=mode, rope_theta=5e4)
        constants.address_of.cache_clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            options = {
                "pos_encoding_mode": mode,
                "rope_theta": 5e4,
                "sm_scale": 1 / 8 * (1 + 1e-7),
            }  # another signature
            out = flashinfer.single_decode_with_kv_cache(q, k, k, **options)
        out.zero_()
        graph.replay()
        torch.testing.assert_close(out, expected)
