# SPDX-License-Identifier: Apache-2.0
"""Decode refuses what does not fit, and says what, expected, got."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.attention.decode_kit import BF16, E4M3, Batch, Case, make_wrapper

FP8: dict[str, Any] = {"q_dtype": E4M3, "o_dtype": BF16}


def _planned(device: torch.device, **changes: Any) -> tuple[Batch, flashinfer.BatchDecodeWithPagedKVCacheWrapper]:
    batch = Batch(Case("bad"), device)
    wrapper = make_wrapper(device)
    batch.plan(wrapper, **changes)
    return batch, wrapper


def test_bad_run_arguments(device: torch.device) -> None:
    batch, wrapper = _planned(device)
    q, cache = batch.q.to(device), batch.cache
    assert isinstance(cache, Tensor)
    with pytest.raises(ValueError, match=r"paged_kv_cache dim 4 \(head_dim\) is 96, q has 128"):
        wrapper.run(q, cache[..., :96])
    with pytest.raises(ValueError, match=r"dim 3 \(num_kv_heads\) is 1, the plan says 2"):
        wrapper.run(q, cache[:, :, :, :1])
    with pytest.raises(ValueError, match=r"dim 1 \(page_size\) is 8, the plan says 16"):
        wrapper.run(q, (cache[:, 0, :8], cache[:, 1, :8]))
    with pytest.raises(ValueError, match=r"expected \[pages, 2, page_size"):
        wrapper.run(q, cache[:, 0])
    with pytest.raises(ValueError, match=r"is torch\.float16; planned with kv_data_type torch.bfloat16"):
        wrapper.run(q, cache.half())
    with pytest.raises(ValueError, match=r"q is torch\.float16; planned with"):
        wrapper.run(q.half(), cache)
    with pytest.raises(ValueError, match=r"q has shape \[4, 8, 128\]; planned for \[5, 8, 128\]"):
        wrapper.run(q[:4], cache)
    with pytest.raises(ValueError, match="q has stride"):
        wrapper.run(q.transpose(1, 2).contiguous().transpose(1, 2), cache)
    with pytest.raises(ValueError, match=r"out is torch\.float32"):
        wrapper.run(q, cache, out=torch.empty(q.shape, device=device))
    with pytest.raises(ValueError, match=r"lse is torch\.bfloat16"):
        wrapper.run(q, cache, lse=q[..., 0].contiguous(), return_lse=True)
    with pytest.raises(TypeError, match="by keyword"):
        wrapper.run(q, cache, 0.5)
    wrapper.run(q, cache)  # and still works


@pytest.mark.parametrize("scale", [0.0, -0.5, math.nan, math.inf])
def test_a_scale_that_is_not_positive_is_refused(device: torch.device, scale: float) -> None:
    """The kernels keep the largest q·k, which a negative scale would make the smallest logit."""
    batch, wrapper = _planned(device)
    q = batch.q.to(device)
    with pytest.raises(ValueError, match=r"sm_scale is .*; expected a positive number"):
        batch.plan(wrapper, sm_scale=scale)
    with pytest.raises(ValueError, match=r"sm_scale is .*; expected a positive number"):
        wrapper.forward(q, batch.cache, sm_scale=scale)
    with pytest.raises(ValueError, match=r"q_scale \* k_scale is .*; expected a positive number"):
        wrapper.run(q, batch.cache, k_scale=scale)
    k = torch.zeros(10, 2, 128, dtype=BF16, device=device)
    with pytest.raises(ValueError, match=r"sm_scale is .*; expected a positive number"):
        flashinfer.single_decode_with_kv_cache(q[0], k, k, sm_scale=scale)
    with pytest.raises(ValueError, match=r"q_scale \* k_scale is .*; expected a positive number"):
        flashinfer.single_decode_with_kv_cache(q[0], k, k, q_scale=scale)


def test_bad_plan_arguments(device: torch.device) -> None:
    batch = Batch(Case("bad"), device)
    wrapper = make_wrapper(device)
    with pytest.raises(ValueError, match=r"run\(\) before plan\(\)"):
        wrapper.run(batch.q.to(device), batch.cache)
    with pytest.raises(ValueError, match=r"run\(\) before plan\(\)"):
        wrapper.run(batch.q.to(device), batch.cache, window_left=3)
    indices = (batch.indptr, batch.indices, batch.last_page_len)
    with pytest.raises(UnsupportedConfig, match="head_dim_qk=80 is not supported; allowed: 32, 64"):
        wrapper.plan(*indices, 8, 2, 80, 16)
    with pytest.raises(UnsupportedConfig, match="num_qo_heads is 7, num_kv_heads 2"):
        wrapper.plan(*indices, 7, 2, 128, 16)
    with pytest.raises(UnsupportedConfig, match="pos_encoding_mode='ROPE' is unknown"):
        wrapper.plan(*indices, 8, 2, 128, 16, "ROPE")
    with pytest.raises(UnsupportedConfig, match="q_dtype='int8' is not supported"):
        wrapper.plan(*indices, 8, 2, 128, 16, q_data_type="int8")
    with pytest.raises(ValueError, match="page_size is 0"):
        wrapper.plan(*indices, 8, 2, 128, 0)
    with pytest.raises(ValueError, match="indptr has shape"):
        wrapper.plan(batch.indptr[:-1], *indices[1:], 8, 2, 128, 16)
    with pytest.raises(ValueError, match="indptr must start at 0 or above and never descend"):
        wrapper.plan(batch.indptr.flip(0), *indices[1:], 8, 2, 128, 16)
    with pytest.raises(ValueError, match="never descend"):
        wrapper.plan(batch.indptr - 1, *indices[1:], 8, 2, 128, 16)
    with pytest.raises(ValueError, match=r"indices is torch\.float32; expected int32"):
        wrapper.plan(batch.indptr, batch.indices.float(), batch.last_page_len, 8, 2, 128, 16)
    with pytest.raises(ValueError, match="kv_layout is 'NDH'"):
        make_wrapper(device, "NDH")
    with pytest.raises(UnsupportedConfig, match="jit_args brings C\\+\\+"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0, device=device), jit_args=["name"])
    with pytest.raises(ValueError, match="needs paged_kv_indptr_buffer"):
        flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(0, device=device), use_cuda_graph=True)


def test_bad_single_arguments(device: torch.device) -> None:
    q, k = torch.zeros(8, 128, dtype=BF16, device=device), torch.zeros(10, 2, 128, dtype=BF16, device=device)
    decode = flashinfer.single_decode_with_kv_cache
    with pytest.raises(ValueError, match="lengths and heads must agree"):
        decode(q, k, k[:9])
    with pytest.raises(ValueError, match=r"k dim 2 \(head_dim\) is 64, q has 128"):
        decode(q, k[..., :64], k[..., :64])
    with pytest.raises(UnsupportedConfig, match="num_qo_heads is 7"):
        decode(q[:7], k, k)
    with pytest.raises(ValueError, match="have 3, 3 and 3 dimensions"):
        decode(q[None], k, k)
    with pytest.raises(UnsupportedConfig, match="kv_dtype='int8'"):
        decode(q, k.to(torch.int8), k.to(torch.int8))
    if device.type == "cuda":
        with pytest.raises(ValueError, match="k is on cpu"):
            decode(q, k.cpu(), k.cpu())
        with pytest.raises(UnsupportedConfig, match="fp32 is supported on the CPU alone"):
            decode(q.float(), k.float(), k.float())
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            shifted = torch.zeros(10 * 256 + 1, dtype=BF16, device=device)[1:].view(10, 2, 128)
            decode(q, shifted, shifted)


@pytest.mark.gpu
def test_workspace_too_small() -> None:
    device = torch.device("cuda", 0)
    batch = Batch(Case("small"), device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1000, dtype=torch.uint8, device=device))
    with pytest.raises(ValueError, match="float_workspace_buffer holds 1000 bytes; this plan needs"):
        batch.plan(wrapper)
