# SPDX-License-Identifier: Apache-2.0
"""The paged cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

import flashinfer
from tests.fuzz.call import Call, Check, Refused, Unspecified, equal, near_fp8, nothing, pair
from tests.fuzz.draw import FLOATS, FP8, INDICES, Draw
from tests.fuzz.table import Case
from tests.fuzz.table.indices import LARGEST, integers, offsets, whole
from tests.fuzz.table.norm import scale_of


class Pages(NamedTuple):
    """A batch in a paged cache, page numbers shuffled and some unused."""

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    lengths: list[int]
    num_pages: int
    page_size: int


def draw_pages(d: Draw, dtype: torch.dtype | None = None, most: int = 12, shortest: int = 0) -> Pages:
    page_size = d.choice((1, 2, 4, 5))
    lengths = [max(n, shortest) for n in d.lengths(d.random.randint(0 if shortest == 0 else 1, 4), most)]
    counts = [-(-length // page_size) for length in lengths]
    num_pages = sum(counts) + d.random.randint(1, 3)
    order = list(range(num_pages))
    d.random.shuffle(order)
    dtype = dtype or d.kernel(*INDICES)
    return Pages(
        d.index([sum(counts[:i]) for i in range(len(counts) + 1)], dtype),
        d.index(order[: sum(counts)] if d.chance(0.7) else order, dtype),
        d.index([(length - 1) % page_size + 1 if length else d.choice((0, 1)) for length in lengths], dtype),
        lengths, num_pages, page_size,
    )  # fmt: skip


def cache_halves(cache: Any, kv_layout: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, each `[num_pages, page_size, num_heads, head_dim]`."""
    if kv_layout not in ("NHD", "HND"):
        raise Refused("an unknown layout")
    if isinstance(cache, torch.Tensor):
        if cache.dim() != 5 or cache.shape[1] != 2:
            raise Refused("a cache that is no K and V")
        halves = [cache[:, 0], cache[:, 1]]
    elif isinstance(cache, (tuple, list)) and len(cache) == 2 and all(isinstance(half, torch.Tensor) for half in cache):
        halves = list(cache)
    else:
        raise Refused("a cache that is neither a tensor nor two")
    if any(half.dim() != 4 for half in halves) or halves[0].dtype != halves[1].dtype:
        raise Refused("halves of other ranks or dtypes")
    k, v = (half if kv_layout == "NHD" else half.transpose(1, 2) for half in halves)
    if k.shape[:3] != v.shape[:3]:
        raise Refused("halves of different shapes")
    return k, v


def draw_cache(d: Draw, pages: Pages, heads: int, dims: tuple[int, int], dtype: torch.dtype, layout: str) -> Any:
    """Of random values."""

    def half(dim: int) -> torch.Tensor:
        middle = (pages.page_size, heads) if layout == "NHD" else (heads, pages.page_size)
        return torch.randn(pages.num_pages, *middle, dim, generator=d.torch).to(dtype)

    if dims[0] == dims[1] and d.chance(0.5):
        both = torch.stack([half(dims[0]).float(), half(dims[1]).float()], dim=1).to(dtype)
        return d.place(both, 0)
    return (d.place(half(dims[0]), 0), d.place(half(dims[1]), 0))


class Slots(NamedTuple):
    batch_indices: torch.Tensor
    positions: torch.Tensor


def draw_slots(d: Draw, pages: Pages) -> Slots:
    """New rows at the ends of the requests, and padding."""
    places = [
        (request, length - 1 - i) for request, length in enumerate(pages.lengths) for i in range(min(length, d.size(3)))
    ]
    places += [d.choice(((-1, 0), (-7, 5), (-1, -1)))] * d.choice((0, 0, 1, 2))
    dtype = d.kernel(*INDICES)
    return Slots(d.index([b for b, _ in places], dtype), d.index([p for _, p in places], dtype))


def find_slots(
    batch_indices: Any, positions: Any, kv_indices: Any, kv_indptr: Any, num_rows: int, num_pages: int, page_size: int
) -> list[tuple[int, int, int]]:
    """(row, page, entry) of every row that is no padding."""
    requests, places = integers("batch_indices", batch_indices, num_rows), integers("positions", positions, num_rows)
    page_numbers, starts = integers("kv_indices", kv_indices), integers("kv_indptr", kv_indptr)
    if not starts:
        raise Refused("kv_indptr is empty")
    found = []
    for row, (request, position) in enumerate(zip(requests, places)):
        if request < 0 or position < 0:
            continue
        if request >= len(starts) - 1:
            raise Refused(f"row {row} belongs to request {request} of {len(starts) - 1}")
        at = starts[request] + position // page_size
        if at >= starts[request + 1]:
            raise Refused(f"row {row} lies behind the pages of its request")
        if not 0 <= at < len(page_numbers) or page_numbers[at] >= num_pages:
            raise Refused(f"row {row} leads to entry {at} of {len(page_numbers)} page numbers, or to no page")
        if page_numbers[at] >= 0:
            found.append((row, page_numbers[at], position % page_size))
    if len({(page, entry) for _, page, entry in found}) < len(found):
        raise Unspecified  # several rows for one slot: any may be the last
    return found


def check_appended(
    cache: Any,
    kv_layout: Any,
    rows: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[Any, Any],
    slots: list[tuple[int, int, int]],
) -> Check:
    """Of the cache after rows `[nnz, heads, dim]` were stored; `cache` is what it was before."""
    halves = zip(cache_halves(cache, kv_layout), rows, scales)
    checks = [_check_half(half, values, scale, slots) for half, values, scale in halves]

    def check(actual: Any) -> None:
        for now, check_half in zip(cache_halves(actual, kv_layout), checks):
            check_half(now)

    return check


def _check_half(half: torch.Tensor, values: torch.Tensor, scale: Any, slots: list[tuple[int, int, int]]) -> Check:
    """Of keys or values alone."""
    if values.shape[1:] != half.shape[2:]:
        raise Refused("rows that do not fit the cache")
    is_converted = half.dtype in FP8 and values.dtype in (*FLOATS, torch.float64)
    if not is_converted and (half.dtype != values.dtype or scale is not None):
        raise Refused("another dtype than the cache's, or a scale where nothing is converted")
    after = half.float().double() if is_converted else half.clone()
    written = torch.zeros(half.shape, dtype=torch.bool)
    for row, page, entry in slots:
        after[page, entry] = values[row].double() / scale_of(scale) if is_converted else values[row]
        written[page, entry] = True
    check_written = near_fp8(after[written], half.dtype) if is_converted else equal(after[written])

    def check(actual: Any) -> None:
        equal(half[~written])(actual[~written])
        check_written(actual[written])

    return check


def _append(d: Draw) -> Iterator[Call]:
    pages, heads, layout = draw_pages(d), d.random.randint(1, 3), d.choice(("NHD", "HND"))
    dims = (d.kernel(16, 20, 8), 0)
    dims = (dims[0], dims[0] if d.narrow or d.chance(0.7) else 8)
    dtype = d.kernel(*FLOATS, *FP8)
    cache_dtype = d.choice(FP8) if not d.narrow and dtype not in FP8 and d.chance(0.4) else dtype
    slots = draw_slots(d, pages)
    scaled = cache_dtype != dtype
    draw_scale = lambda: (d.dense(torch.tensor([0.25])) if d.chance(0.4) else 0.5) if scaled and d.chance(0.7) else None  # noqa: E731
    arguments = {
        "append_key": d.normal(len(slots.positions), heads, dims[0], dtype=dtype, groups=0),
        "append_value": d.normal(len(slots.positions), heads, dims[1], dtype=dtype, groups=0),
        "batch_indices": slots.batch_indices, "positions": slots.positions,
        "paged_kv_cache": draw_cache(d, pages, heads, dims, cache_dtype, layout),
        "kv_indices": pages.indices, "kv_indptr": pages.indptr,
        "kv_last_page_len": pages.last_page_len if d.chance(0.8) else None, "kv_layout": layout,
        "k_scale": draw_scale(), "v_scale": draw_scale(), "enable_pdl": None,
    }  # fmt: skip

    def expect(
        append_key: Any, append_value: Any, batch_indices: Any, positions: Any, paged_kv_cache: Any, kv_indices: Any,
        kv_indptr: Any, kv_last_page_len: Any, kv_layout: Any, k_scale: Any, v_scale: Any, enable_pdl: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        if append_key.dim() != 3 or append_value.dim() != 3 or append_key.shape[:2] != append_value.shape[:2]:
            raise Refused("keys and values of different rows")
        k, _ = cache_halves(paged_kv_cache, kv_layout)
        places = find_slots(batch_indices, positions, kv_indices, kv_indptr, len(append_key), *k.shape[:2])
        rows = (append_key, append_value)
        return {
            "return": nothing,
            "paged_kv_cache": check_appended(paged_kv_cache, kv_layout, rows, (k_scale, v_scale), places),
        }

    yield from d.maybe_hostile(
        Call("append_paged_kv_cache", flashinfer.append_paged_kv_cache, arguments, expect, ("paged_kv_cache",))
    )


def _append_mla(d: Draw) -> Iterator[Call]:
    pages, dims, dtype = draw_pages(d), (d.kernel(32, 64), d.kernel(16, 8)), d.kernel(*FLOATS)
    slots = draw_slots(d, pages)
    caches = [
        d.place(torch.randn(pages.num_pages, pages.page_size, dim, generator=d.torch).to(dtype), 0) for dim in dims
    ]
    left_out = d.choice((None, None, 0, 1))
    arguments = {
        "append_ckv": d.normal(len(slots.positions), dims[0], dtype=dtype),
        "append_kpe": d.normal(len(slots.positions), dims[1], dtype=dtype),
        "batch_indices": slots.batch_indices, "positions": slots.positions,
        "ckv_cache": None if left_out == 0 else caches[0], "kpe_cache": None if left_out == 1 else caches[1],
        "kv_indices": pages.indices, "kv_indptr": pages.indptr, "kv_last_page_len": pages.last_page_len,
    }  # fmt: skip

    def expect(
        append_ckv: Any, append_kpe: Any, batch_indices: Any, positions: Any, ckv_cache: Any, kpe_cache: Any,
        kv_indices: Any, kv_indptr: Any, kv_last_page_len: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        caches = {"ckv_cache": (ckv_cache, append_ckv), "kpe_cache": (kpe_cache, append_kpe)}
        caches = {name: both for name, both in caches.items() if both[0] is not None}
        if not caches:
            raise Refused("nowhere to store")
        if append_ckv.dim() != 2 or append_kpe.dim() != 2 or len(append_ckv) != len(append_kpe):
            raise Refused("ckv and kpe of different rows")
        shape = next(iter(caches.values()))[0].shape[:2]
        places = find_slots(batch_indices, positions, kv_indices, kv_indptr, len(append_ckv), *shape)
        checks: dict[str, Check] = {"return": nothing}
        for name, (cache, rows) in caches.items():
            if cache.dim() != 3 or cache.shape[:2] != shape:
                raise Refused("caches of other pages")
            checks[name] = _check_half(cache, rows, None, places)
        return checks

    function = flashinfer.append_paged_mla_kv_cache
    yield from d.maybe_hostile(
        Call("append_paged_mla_kv_cache", function, arguments, expect, ("ckv_cache", "kpe_cache"))
    )


def _positions(d: Draw) -> Iterator[Call]:
    appended = d.lengths(d.random.randint(0, 5), 4)
    dtype, nnz = d.kernel(*INDICES), sum(appended) + d.choice((0, 0, 3))
    lens_dtype = dtype if d.chance(0.8) else d.choice((torch.int32, torch.int64))
    arguments: dict[str, Any] = {
        "append_indptr": d.index([sum(appended[:i]) for i in range(len(appended) + 1)], dtype),
        "seq_lens": d.index([n + d.random.randint(0, 9) for n in appended], lens_dtype), "nnz": nnz,
        "batch_indices": d.blank(nnz, dtype=torch.int32) if d.chance(0.5) else None,
        "positions": d.blank(nnz, dtype=torch.int32) if d.chance(0.5) else None,
    }  # fmt: skip

    def expect(append_indptr: Any, seq_lens: Any, nnz: Any, batch_indices: Any, positions: Any) -> Mapping[str, Check]:
        starts, nnz = offsets("append_indptr", append_indptr), whole("nnz", nnz)
        if not 0 <= nnz < LARGEST:
            raise Refused("a count that no index holds")
        if nnz > 1 << 20:
            raise Unspecified  # too many to list
        lens = integers("seq_lens", seq_lens, len(starts) - 1)
        requests, places = [-1] * nnz, [0] * nnz
        for request, (begin, end) in enumerate(itertools.pairwise(starts)):
            for i in range(begin, min(end, nnz)):
                requests[i], places[i] = request, lens[request] - end + i
        if any(not 0 <= place < LARGEST for place in places[: starts[-1]]) or starts[-1] > nnz:
            raise Refused("positions below 0 or beyond int32, or more rows than places")
        if starts[0] > 0:
            raise Unspecified  # rows of no request
        outputs = {"batch_indices": (batch_indices, requests), "positions": (positions, places)}
        checks = {name: equal(torch.tensor(values, dtype=torch.int32)) for name, (_, values) in outputs.items()}
        return {
            "return": pair(*checks.values()),
            **{name: checks[name] for name, (given, _) in outputs.items() if given is not None},
        }  # fmt: skip

    function = flashinfer.get_batch_indices_positions
    yield from d.maybe_hostile(
        Call("get_batch_indices_positions", function, arguments, expect, ("batch_indices", "positions"))
    )


def _seq_lens(d: Draw) -> Iterator[Call]:
    pages = draw_pages(d)

    def expect(kv_indptr: Any, kv_last_page_len: Any, page_size: Any) -> Mapping[str, Check]:
        starts, page_size = offsets("kv_indptr", kv_indptr), whole("page_size", page_size)
        last = integers("kv_last_page_len", kv_last_page_len, len(starts) - 1)
        if page_size < 1:
            raise Refused("no entries in a page")
        lens = []
        for begin, end, entries in zip(starts, starts[1:], last):
            lens.append((end - begin - 1) * page_size + entries if end > begin else 0)
            if (end > begin and not 0 <= entries <= page_size) or lens[-1] >= LARGEST:
                raise Refused("more entries in the last page than a page has, or more than int32 counts")
        return {"return": equal(torch.tensor(lens, dtype=torch.int32))}

    arguments = {"kv_indptr": pages.indptr, "kv_last_page_len": pages.last_page_len, "page_size": pages.page_size}
    yield from d.maybe_hostile(Call("get_seq_lens", flashinfer.get_seq_lens, arguments, expect))


CASES: dict[str, Case] = {
    "append_paged_kv_cache": _append,
    "append_paged_mla_kv_cache": _append_mla,
    "get_batch_indices_positions": _positions,
    "get_seq_lens": _seq_lens,
}
