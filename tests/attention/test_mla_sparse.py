# SPDX-License-Identifier: Apache-2.0
"""Latent attention over a list of rows for each query, against the FP64 oracle over the rows that the list names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer.attention.mla import sparse
from flashinfer.errors import UnsupportedConfig
from tests.attention.mla_kit import DEEPSEEK_SCALE, check, check_scaled, pack_rows, unpack_rows
from tests.attention.prefill_kit import BF16, E4M3, FP16, FP32
from tests.oracles.attention import attention


def draw_lists(num_lists: int, top_k: int, num_rows: int, holes: str, seed: int = 0) -> Tensor:
    """Rows in no order, each named once. holes: where a list has -1."""
    generator = torch.Generator().manual_seed(seed)
    lists = torch.stack([torch.randperm(num_rows, generator=generator)[:top_k] for _ in range(num_lists)]).int()
    if holes == "none" or top_k == 0:
        return lists
    counts = torch.randint(0, top_k + 1, (num_lists,), generator=generator)
    counts[0] = 0  # and one list of nothing
    place = torch.arange(top_k).expand(num_lists, -1)
    if holes == "anywhere":
        place = torch.stack([torch.randperm(top_k, generator=generator) for _ in range(num_lists)])
    return torch.where(place < counts[:, None], lists, -1)


def expect(q: Tensor, rows: Tensor, lists: Tensor, dim_ckv: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    states = []
    for token, chosen in zip(q, lists.cpu().long()):
        k = rows.cpu().view(torch.uint8 if rows.dtype == E4M3 else rows.dtype)[chosen[chosen >= 0]].view(rows.dtype)
        k = k[:, None].to(q.device)
        scales = {"k_scale": scale, "v_scale": scale}
        states.append(attention(token[None], k, k[..., :dim_ckv], sm_scale=DEEPSEEK_SCALE, **scales))
    outs, lses = zip(*states)
    return torch.cat(outs), torch.cat(lses)


def draw(device: torch.device, num_tokens: int, num_heads: int, num_rows: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Queries and rows. Rows that no list names are not NaN: a list may name any."""
    dim, dtype, kv_dtype = (options.get(name, x) for name, x in (("dim", 576), ("dtype", BF16), ("kv_dtype", None)))
    generator = torch.Generator().manual_seed(num_tokens)
    q = torch.randn(num_tokens, num_heads, dim, generator=generator).to(device, dtype)
    return q, torch.randn(num_rows, dim, generator=generator).to(device, kv_dtype or dtype)


@pytest.mark.parametrize("holes", ["none", "end", "anywhere"])
@pytest.mark.parametrize(
    "num_tokens, num_heads, top_k",
    [(5, 16, 64), (3, 128, 200), (40, 20, 7), (1, 64, 1), (4, 16, 0), (2, 8, 1500)],
    ids=str,
)
def test_prefill_against_the_oracle(
    device: torch.device, num_tokens: int, num_heads: int, top_k: int, holes: str
) -> None:
    q, rows = draw(device, num_tokens, num_heads, 2000)
    lists = draw_lists(num_tokens, top_k, 2000, holes)
    out, lse = flashinfer.sparse_mla_prefill(q, rows, lists.to(device), DEEPSEEK_SCALE, return_lse=True)
    check((out, lse), expect(q, rows, lists, 512))


@pytest.mark.parametrize(
    "options, dim_ckv",
    [
        ({"dtype": FP16}, 512),
        ({"kv_dtype": E4M3}, 512),
        ({"dim": 320}, 256),
        ({"dim": 512}, 512),
        ({"dtype": FP16, "kv_dtype": E4M3, "dim": 512}, 512),
    ],
    ids=str,
)
def test_dtypes_and_dimensions(device: torch.device, options: dict[str, Any], dim_ckv: int) -> None:
    q, rows = draw(device, 6, 16, 300, **options)
    lists = draw_lists(6, 100, 300, "anywhere")
    scale = 0.7 if "kv_dtype" in options else 1.0
    given = {"kv_scale": scale} if "kv_dtype" in options else {}
    result = flashinfer.sparse_mla_prefill(q, rows, lists.to(device), DEEPSEEK_SCALE, dim_ckv, return_lse=True, **given)
    check((result[0], result[1]), expect(q, rows, lists, dim_ckv, scale))


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("has_head_axis", [False, True])
def test_decode_over_pages(device: torch.device, page_size: int, has_head_axis: bool) -> None:
    """Row numbers are page * page_size + entry; rows are cut out of wider ones."""
    (batch_size, q_len, num_heads, top_k), num_pages = (3, 2, 16, 90), 640 // page_size
    q, _ = draw(device, batch_size * q_len, num_heads, 1)
    wide = torch.full((num_pages * page_size, 640), math.nan, dtype=BF16, device=device)
    rows = wide[:, :576]
    rows.copy_(draw(device, 6, 1, len(rows))[1])
    lists = draw_lists(batch_size * q_len, top_k, len(rows), "anywhere", seed=1)
    cache, given = rows.view(num_pages, page_size, 576), lists.view(batch_size, q_len, top_k).to(device)
    if has_head_axis:
        cache = cache[:, :, None]
    q_batch = q.view(batch_size, q_len, num_heads, 576)
    out, lse = flashinfer.sparse_mla_decode(q_batch, cache, given, DEEPSEEK_SCALE, return_lse=True)
    assert out.shape == (batch_size, q_len, num_heads, 512) and lse.shape == (batch_size, q_len, num_heads)
    check((out.flatten(0, 1), lse.flatten(0, 1)), expect(q, rows, lists, 512))
    own = torch.full_like(out, math.nan), torch.full_like(lse, math.nan)
    again = flashinfer.sparse_mla_decode(q_batch, cache, given, DEEPSEEK_SCALE, out=own[0], lse=own[1], return_lse=True)
    assert again[0] is own[0] and again[1] is own[1]
    assert torch.equal(own[0], out) and torch.equal(own[1], lse)
    assert torch.equal(flashinfer.sparse_mla_decode(q_batch, cache, given, DEEPSEEK_SCALE), out)


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("page_size", [1, 64])
def test_rows_with_scales(device: torch.device, page_size: int, num_heads: int) -> None:
    q, rows = draw(device, 5, num_heads, 640)
    packed = pack_rows(rows.cpu(), torch.Generator().manual_seed(3))
    lists = draw_lists(5, 200, 640, "anywhere")
    expected = expect(q, unpack_rows(packed), lists, 512)
    packed = packed.to(device)
    result = flashinfer.sparse_mla_prefill(q, packed, lists.to(device), DEEPSEEK_SCALE, return_lse=True)
    check_scaled((result[0], result[1]), expected, num_heads, device)
    cache, given = packed.view(-1, page_size, 1, 656), lists.to(device)[:, None]
    out, lse = flashinfer.sparse_mla_decode(q[:, None], cache, given, DEEPSEEK_SCALE, return_lse=True)
    check_scaled((out[:, 0], lse[:, 0]), expected, num_heads, device)
    with pytest.raises(ValueError, match=r"dim 2 \(head_dim\) is 655"):
        flashinfer.sparse_mla_prefill(q, packed[:, :655], lists.to(device), DEEPSEEK_SCALE)


def test_all_rows_are_dense_attention(device: torch.device) -> None:
    q, rows = draw(device, 4, 16, 333)
    lists = torch.arange(333, dtype=torch.int32, device=device).expand(4, -1).contiguous()
    out, lse = flashinfer.sparse_mla_prefill(q, rows[:, None], lists[:, None], DEEPSEEK_SCALE, return_lse=True)
    check((out, lse), attention(q, rows[:, None], rows[:, None, :512], sm_scale=DEEPSEEK_SCALE))


def test_rows_that_no_list_names_may_be_anything(device: torch.device) -> None:
    q, rows = draw(device, 3, 16, 200)
    lists = draw_lists(3, 50, 100, "end")
    expected = expect(q, rows, lists, 512)
    rows[100:] = math.nan
    result = flashinfer.sparse_mla_prefill(q, rows, lists.to(device), DEEPSEEK_SCALE, return_lse=True)
    check((result[0], result[1]), expected)


@pytest.mark.parametrize("has_out", [False, True])
def test_more_tokens_than_a_plan_has_room_for(
    device: torch.device, has_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, rows = draw(device, 7, 20, 300)
    lists = draw_lists(7, 90, 300, "anywhere").to(device)
    arguments = {"q": q, "kv": rows, "indices": lists, "sm_scale": DEEPSEEK_SCALE}
    expected = expect(q, rows, lists, 512)
    monkeypatch.setattr(sparse, "_MAX_ITEMS", 10)  # three tokens of 20 heads
    out, lse = torch.full((7, 20, 512), math.nan, dtype=BF16, device=device), torch.full((7, 20), math.nan).to(device)
    given = {"out": out, "lse": lse} if has_out else {}
    result = flashinfer.sparse_mla_prefill(**arguments, **given, return_lse=True)
    check((result[0], result[1]), expected)
    assert not has_out or (result[0] is out and result[1] is lse)
    assert torch.equal(flashinfer.sparse_mla_prefill(**arguments), result[0])
    batch = flashinfer.sparse_mla_decode(q[:, None], rows[:, None], lists[:, None], DEEPSEEK_SCALE, return_lse=True)
    assert torch.equal(batch[0][:, 0], result[0]) and torch.equal(batch[1][:, 0], result[1])
    with pytest.raises(ValueError, match=r"out is \[6, 20, 512\]; expected \[7, 20, 512\]"):
        flashinfer.sparse_mla_prefill(**arguments, out=out[:6])


def test_no_tokens(device: torch.device) -> None:
    q, rows = draw(device, 0, 16, 10)
    out = flashinfer.sparse_mla_prefill(q, rows, torch.zeros(0, 5, dtype=torch.int32, device=device), DEEPSEEK_SCALE)
    assert isinstance(out, Tensor) and out.shape == (0, 16, 512)


def test_fp32_on_the_cpu() -> None:
    q, rows = draw(torch.device("cpu"), 3, 4, 50, dtype=FP32)
    lists = draw_lists(3, 20, 50, "anywhere")
    result = flashinfer.sparse_mla_prefill(q, rows, lists, DEEPSEEK_SCALE, return_lse=True)
    check((result[0], result[1]), expect(q, rows, lists, 512), scale=2.0)  # sums of 500 products in fp32


def test_an_index_past_the_rows() -> None:
    q, rows = draw(torch.device("cpu"), 2, 4, 50)
    lists = draw_lists(2, 20, 50, "none")
    lists[1, 3] = 50
    with pytest.raises(IndexError, match=r"sparse_mla_prefill: indices\[23\] is 50; expected .* to 49"):
        flashinfer.sparse_mla_prefill(q, rows, lists, DEEPSEEK_SCALE)


@pytest.mark.gpu
def test_an_index_past_the_rows_counts_as_none() -> None:
    device = torch.device("cuda")
    q, rows = draw(device, 2, 4, 50)
    lists = draw_lists(2, 20, 50, "anywhere")
    expected = expect(q, rows, lists, 512)
    lists[lists < 0] = torch.tensor([50, (1 << 31) - 1, -(1 << 31)], dtype=torch.int32).repeat(14)[: (lists < 0).sum()]
    result = flashinfer.sparse_mla_prefill(q, rows, lists.to(device), DEEPSEEK_SCALE, return_lse=True)
    check((result[0], result[1]), expected)


@pytest.mark.gpu
def test_graph() -> None:
    """Captured with short lists and replayed with long ones, while other calls go on."""
    device = torch.device("cuda")
    q, rows = draw(device, 4, 16, 3000)
    short, long = (draw_lists(4, 2048, 3000, holes, seed=2) for holes in ("end", "none"))
    lists = short.to(device)
    flashinfer.sparse_mla_prefill(q, rows, lists, DEEPSEEK_SCALE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flashinfer.sparse_mla_prefill(q, rows, lists, DEEPSEEK_SCALE, return_lse=True)
    for each in (long, short, long):
        lists.copy_(each)
        graph.replay()
        flashinfer.sparse_mla_prefill(q[:1], rows, lists[:1], DEEPSEEK_SCALE)
        check((result[0], result[1]), expect(q, rows, each, 512))


def test_torch_compile(device: torch.device) -> None:
    q, rows = draw(device, 4, 16, 100)
    lists = draw_lists(4, 30, 100, "anywhere").to(device)

    def layer(q: Tensor, rows: Tensor, lists: Tensor) -> tuple[Tensor, ...]:
        out, lse = flashinfer.sparse_mla_prefill(q * 2, rows, lists, 0.1, return_lse=True)
        batch = flashinfer.sparse_mla_decode(q[:, None], rows[:, None], lists[:, None], 0.1)
        return out + 1, lse, batch

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(q, rows, lists), layer(q, rows, lists)):
        assert torch.equal(ours, eager)


def test_errors_name_the_argument(device: torch.device) -> None:
    q, rows = draw(device, 4, 16, 100)
    lists = draw_lists(4, 30, 100, "end").to(device)
    good = {"q": q, "kv": rows, "indices": lists, "sm_scale": DEEPSEEK_SCALE}
    expected = flashinfer.sparse_mla_prefill(**good)
    for changed, message in (
        ({"q": q[..., :512]}, r"q has rows of 512, kv of 576"),
        ({"q": q[0]}, "q has shape"),
        ({"kv": rows[None, None]}, "kv has shape"),
        ({"kv": rows.to("meta")}, "no memory"),
        ({"kv": None}, "kv is NoneType"),
        ({"indices": lists[:3]}, r"indices has shape \[3, 30\]"),
        ({"indices": lists.long()}, r"indices is torch\.int64"),
        ({"indices": lists.T.contiguous().T}, "indices has stride"),
        ({"sm_scale": -1.0}, "sm_scale"),
        ({"head_dim_ckv": 577}, "at least head_dim_ckv 577"),
        ({"head_dim_ckv": 500}, "head_dim_ckv"),
        ({"kv_scale": 0.0}, "positive"),
        ({"out": torch.empty(4, 16, 500, dtype=BF16, device=device)}, "out is"),
        ({"lse": torch.empty(4, 8, device=device), "return_lse": True}, "lse is"),
    ):
        with pytest.raises((ValueError, TypeError, UnsupportedConfig), match=message):
            flashinfer.sparse_mla_prefill(**{**good, **changed})
    wide = torch.zeros(8, 3, 4, 576, dtype=BF16, device=device)
    for options, message in (
        ({"kv_cache": wide[:, 1]}, "evenly apart"),
        ({"kv_cache": rows}, "kv has shape"),
        ({"out": torch.empty(2, 2, 16, 1024, dtype=BF16, device=device)[..., :512]}, "expected dense"),
    ):
        given = {"q": q.view(2, 2, 16, 576), "kv_cache": rows[:, None], "indices": lists.view(2, 2, 30), **options}
        with pytest.raises(ValueError, match=message):
            flashinfer.sparse_mla_decode(**given, sm_scale=1.0)
    assert torch.equal(flashinfer.sparse_mla_prefill(**good), expected)
