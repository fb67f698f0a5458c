# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention: a wrapper that is made, planned and run once, in one call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import flashinfer
from flashinfer.page import block_sparse_indices_to_vector_sparse_offsets
from flashinfer.sparse import convert_bsr_mask_layout
from tests.fuzz.call import Call, Check, Refused, Unspecified, equal
from tests.fuzz.draw import Draw
from tests.fuzz.table import Case, planned
from tests.fuzz.table import attention as unplanned
from tests.fuzz.table.indices import LARGEST, integers, offsets, whole
from tests.fuzz.table.planned import I32
from tests.oracles.attention import attention


def _starts(d: Draw, counts: list[int]) -> torch.Tensor:
    return d.index([sum(counts[:i]) for i in range(len(counts) + 1)], d.choice((I32, torch.int64)))


def _workspace() -> torch.Tensor:
    return torch.zeros(8, dtype=torch.uint8, device="cpu")


def _run_blocks(indptr: Any, indices: Any, q: Any, k: Any, v: Any, return_lse: Any, **plan: Any) -> Any:
    wrapper = flashinfer.BlockSparseAttentionWrapper(_workspace())
    wrapper.plan(indptr, indices, **plan)
    return wrapper.run(q, k, v, return_lse=return_lse)


def _blocks(d: Draw) -> Iterator[Call]:
    shape, (r, c) = planned.draw_shape(d), (d.random.randint(1, 5), d.random.randint(1, 5))
    m, num_columns = d.random.randint(0, 12), d.random.randint(0, 4)
    lists = [[j for j in range(num_columns) if d.chance(0.5)] for _ in range(-(-m // r))]
    for row in lists:
        d.random.shuffle(row)
    kind, num_blocks = d.kernel("none", "causal", "bool"), sum(map(len, lists))
    rows = [(m, shape.heads[0]), *[(num_columns * c, shape.heads[1])] * 2]
    dtypes = (shape.dtype, shape.kv_dtype, shape.kv_dtype)
    q, k, v = (d.normal(*size, shape.head_dim, dtype=dtype, groups=0) for size, dtype in zip(rows, dtypes))
    arguments: dict[str, Any] = {
        "indptr": _starts(d, list(map(len, lists))), "indices": d.index([j for row in lists for j in row], I32),
        "M": m, "N": num_columns * c, "R": r, "C": c, "num_qo_heads": shape.heads[0], "num_kv_heads": shape.heads[1],
        "head_dim": shape.head_dim, "q_data_type": shape.dtype, "kv_data_type": shape.kv_dtype,
        "causal": kind == "causal", "sm_scale": d.choice((None, 0.2)), "logits_soft_cap": d.choice((None, 3.0)),
        "mask": d.dense(torch.rand(num_blocks, r, c, generator=d.torch) < 0.6) if kind == "bool" else None,
        "q": q, "k": k, "v": v, "return_lse": d.chance(0.5),
    }  # fmt: skip

    def expect(
        indptr: Any, indices: Any, q: Any, k: Any, v: Any, return_lse: Any, num_qo_heads: Any, num_kv_heads: Any,
        head_dim: Any, q_data_type: Any, kv_data_type: Any, causal: Any, mask: Any, sm_scale: Any,
        logits_soft_cap: Any, **sizes: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        m, n, r, c = (whole(name, sizes[name]) for name in "MNRC")
        if m < 0 or n < 0 or r < 1 or c < 1 or max(m, n, r, c) >= LARGEST or n % c:
            raise Refused("sizes that no blocks add up to")
        heads = planned.read_count("num_qo_heads", num_qo_heads), planned.read_count("num_kv_heads", num_kv_heads)
        unplanned.require_heads(*heads)
        dim, options = whole("head_dim", head_dim), {"sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap}
        options = unplanned.read_options(**options)
        q_dtype = planned.read_dtype(q_data_type)
        unplanned.require_prefill(
            q_dtype, q_dtype if kv_data_type is None else planned.read_dtype(kv_data_type), dim, dim
        )
        unplanned.require_prefill(q.dtype, k.dtype, dim, dim)
        starts = offsets("indptr", indptr, -(-m // r) + 1, indices.shape[0])
        listed = integers("indices", indices)
        if any(not 0 <= j < n // c for j in listed[: starts[-1]]):
            raise Refused("a block outside of the matrix")
        if q.shape != (m, heads[0], dim) or k.shape != (n, heads[1], dim) or v.shape != k.shape or v.dtype != k.dtype:
            raise Refused("operands of other shapes than planned")
        if causal not in (True, False):
            raise Refused("causal is neither True nor False")
        if mask is not None and (mask.shape[1:] != (r, c) or mask.dim() != 3 or len(mask) < starts[-1]):
            raise Refused("a mask of other blocks")
        if starts[0] or (mask is not None and len(mask) != starts[-1]):
            raise Unspecified  # blocks of no row
        unplanned.require_finite(q, k, v)
        outs, lses = [q.new_zeros(0, heads[0], dim).double()], [torch.zeros(0, heads[0]).double()]
        for row, (begin, end) in enumerate(itertools.pairwise(starts)):
            keys = torch.tensor([j * c + i for j in listed[begin:end] for i in range(c)], dtype=torch.int64)
            rows = q[row * r : (row + 1) * r]
            visible = None
            if mask is not None:
                visible = (mask[begin:end] != 0).transpose(0, 1).reshape(r, -1)[: len(rows)]
            out, lse = attention(rows, k[keys], v[keys], causal=bool(causal), custom_mask=visible, **options)
            outs, lses = [*outs, out], [*lses, lse]
        return {"return": unplanned.state(torch.cat(outs), torch.cat(lses), q.dtype, return_lse)}

    yield from d.maybe_hostile(Call("BlockSparseAttentionWrapper", _run_blocks, arguments, expect))


def _run_variable(block_mask_map: Any, block_row_sz: Any, block_col_sz: Any, **given: Any) -> Any:
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(_workspace())
    operands = [given.pop(name) for name in ("q", "k", "v")]
    return_lse = given.pop("return_lse")
    wrapper.plan(block_mask_map, block_row_sz, block_col_sz, **given)
    return wrapper.run(*operands, return_lse=return_lse)


def _sizes(d: Draw, heads: int, count: int, multiple: int) -> torch.Tensor:
    """Of blocks that add up to the same for each head."""
    first = [d.random.randint(0, 4) * multiple for _ in range(count)]
    rows = [d.random.sample(first, count) for _ in range(heads)]
    return d.place(torch.tensor(rows, dtype=d.choice((I32, torch.int64))).view(heads, count), 0)


def _variable(d: Draw) -> Iterator[Call]:
    shape = planned.draw_shape(d)
    heads, (num_rows, num_columns) = shape.heads[1], (d.random.randint(0, 3), d.random.randint(0, 3))
    rows, columns = _sizes(d, heads, num_rows, 1), _sizes(d, heads, num_columns, d.choice((1, 1, 2)))
    lengths = [int(sizes[0].sum()) for sizes in (rows, columns)]
    kinds = ((shape.heads[0], lengths[0]), *[(heads, lengths[1])] * 2)
    dtypes = (shape.dtype, shape.kv_dtype, shape.kv_dtype)
    q, k, v = (d.normal(*size, shape.head_dim, dtype=dtype, groups=0) for size, dtype in zip(kinds, dtypes))
    blocks = torch.rand(heads, num_rows, num_columns, generator=d.torch) < 0.5
    arguments: dict[str, Any] = {
        "block_mask_map": d.place(blocks, 0), "block_row_sz": rows, "block_col_sz": columns,
        "num_qo_heads": shape.heads[0], "num_kv_heads": heads, "head_dim": shape.head_dim,
        "causal": d.kernel(False, True), "sm_scale": d.choice((None, 0.2)), "q_data_type": shape.dtype,
        "kv_data_type": shape.kv_dtype, "q": q, "k": k, "v": v, "return_lse": d.chance(0.5),
    }  # fmt: skip

    def expect(
        block_mask_map: Any, block_row_sz: Any, block_col_sz: Any, num_qo_heads: Any, num_kv_heads: Any, head_dim: Any,
        causal: Any, sm_scale: Any, q_data_type: Any, kv_data_type: Any, q: Any, k: Any, v: Any, return_lse: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        heads = planned.read_count("num_qo_heads", num_qo_heads), planned.read_count("num_kv_heads", num_kv_heads)
        unplanned.require_heads(*heads)
        dim, group = whole("head_dim", head_dim), heads[0] // heads[1]
        q_dtype = planned.read_dtype(q_data_type)
        unplanned.require_prefill(
            q_dtype, q_dtype if kv_data_type is None else planned.read_dtype(kv_data_type), dim, dim
        )
        unplanned.require_prefill(q.dtype, k.dtype, dim, dim)
        options = unplanned.read_options(sm_scale=sm_scale)
        if causal not in (True, False):
            raise Refused("causal is neither True nor False")
        counts = block_mask_map.shape[1:]
        sums = []
        for sizes, count in ((block_row_sz, counts[0]), (block_col_sz, counts[1])):
            if sizes.shape != (heads[1], count) or sizes.dtype not in (I32, torch.int64):
                raise Refused("sizes of other blocks")
            if sizes.numel() and not 0 <= int(sizes.min()) <= int(sizes.max()) < LARGEST:
                raise Refused("a size that no block has")
            sums.append({int(row.sum()) for row in sizes} or {0})
        if block_mask_map.shape[0] != heads[1] or any(len(of_heads) > 1 for of_heads in sums):
            raise Refused("heads of other lengths")
        (qo_len,), (kv_len,) = sums
        if q.shape != (heads[0], qo_len, dim) or k.shape != (heads[1], kv_len, dim) or v.shape != k.shape:
            raise Refused("operands of other shapes than planned")
        if v.dtype != k.dtype:
            raise Refused("k and v of different dtypes")
        unplanned.require_finite(q, k, v)
        out, lse = torch.zeros(heads[0], qo_len, dim).double(), torch.zeros(heads[0], qo_len).double()
        for head in range(heads[1]):
            key_blocks = torch.arange(counts[1]).repeat_interleave(block_col_sz[head].long())
            begin, own = 0, slice(head * group, (head + 1) * group)
            for row, length in enumerate(block_row_sz[head].tolist()):
                keys = (block_mask_map[head, row] != 0)[key_blocks]
                rows = slice(begin, begin + length)
                part, sum_ = attention(
                    q[own, rows].transpose(0, 1), k[head, keys][:, None], v[head, keys][:, None], causal=bool(causal),
                    **options,
                )  # fmt: skip
                out[own, rows], lse[own, rows], begin = part.transpose(0, 1), sum_.T, begin + length
        return {"return": unplanned.state(out, lse, q.dtype, return_lse)}

    yield from d.maybe_hostile(Call("VariableBlockSparseAttentionWrapper", _run_variable, arguments, expect))


def _convert(d: Draw) -> Iterator[Call]:
    counts, (r, c) = d.lengths(d.random.randint(0, 4), 3), (d.random.randint(1, 3), d.random.randint(1, 3))
    dtype = d.choice((torch.bool, torch.uint8, torch.float32))
    mask = (torch.rand(sum(counts), r, c, generator=d.torch) < 0.5).to(dtype)

    def expect(mask: Any, indptr: Any) -> Mapping[str, Check]:
        if mask.dim() != 3:
            raise Refused("no mask of blocks")
        starts = offsets("indptr", indptr, None, len(mask))
        if (starts[0], starts[-1]) != (0, len(mask)):
            raise Unspecified  # blocks of no row
        parts = [mask[begin:end].transpose(0, 1).reshape(-1) for begin, end in itertools.pairwise(starts)]
        return {"return": equal(torch.cat([mask.new_zeros(0), *parts]))}

    arguments = {"mask": d.place(mask, 0), "indptr": _starts(d, counts)}
    yield from d.maybe_hostile(Call("convert_bsr_mask_layout", convert_bsr_mask_layout, arguments, expect))


def _vector_offsets(d: Draw) -> Iterator[Call]:
    size, counts = d.random.randint(1, 4), d.lengths(d.random.randint(0, 3), 3)
    lens = [d.random.randint(0, count * size) for count in counts]
    rooms = [length + d.random.randint(0, 2) for length in lens]
    indptr = _starts(d, counts)
    arguments: dict[str, Any] = {
        "block_sparse_indices": d.index([d.random.randint(0, 9) for _ in range(sum(counts) + 1)], indptr.dtype),
        "block_sparse_indptr": indptr,
        "vector_sparse_offsets": d.index([-1] * (sum(rooms) + d.choice((0, 2))), indptr.dtype),
        "vector_sparse_indptr": d.index([sum(rooms[:i]) for i in range(len(rooms) + 1)], indptr.dtype),
        "kv_lens": d.index(lens, indptr.dtype), "stride_block": 7, "stride_n": 2, "block_size": size,
    }  # fmt: skip

    def expect(
        block_sparse_indices: Any, block_sparse_indptr: Any, vector_sparse_offsets: Any, vector_sparse_indptr: Any,
        kv_lens: Any, stride_block: Any, stride_n: Any, block_size: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        blocks, found = integers("blocks", block_sparse_indices), integers("offsets", vector_sparse_offsets)
        starts = offsets("block_sparse_indptr", block_sparse_indptr, None, len(blocks))
        places = offsets("vector_sparse_indptr", vector_sparse_indptr, len(starts), len(found))
        lens, size = integers("kv_lens", kv_lens, len(starts) - 1), whole("block_size", block_size)
        strides = whole("stride_block", stride_block), whole("stride_n", stride_n)
        if not 0 < size < LARGEST or any(not -LARGEST <= stride < LARGEST for stride in strides):
            raise Refused("a block without rows, or a stride beyond 32 bits")
        for i, length in enumerate(lens):
            if not 0 <= length <= min((starts[i + 1] - starts[i]) * size, places[i + 1] - places[i]):
                raise Refused("more rows than its blocks, or its place, hold")
            for row in range(length):
                found[places[i] + row] = blocks[starts[i] + row // size] * strides[0] + row % size * strides[1]
        if any(not -LARGEST <= offset < LARGEST for offset in found):
            raise Unspecified  # that do not fit
        expected = equal(torch.tensor(found, dtype=vector_sparse_offsets.dtype))
        return {"return": expected, "vector_sparse_offsets": expected}

    name, function = "block_sparse_indices_to_vector_sparse_offsets", block_sparse_indices_to_vector_sparse_offsets
    yield from d.maybe_hostile(Call(name, function, arguments, expect, ("vector_sparse_offsets",)))


CASES: dict[str, Case] = {
    "BlockSparseAttentionWrapper": _blocks,
    "VariableBlockSparseAttentionWrapper": _variable,
    "block_sparse_indices_to_vector_sparse_offsets": _vector_offsets,
    "convert_bsr_mask_layout": _convert,
}
