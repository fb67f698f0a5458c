# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on both targets against the FP64 oracle under the same mask, dense."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer
from flashinfer import page, sparse
from flashinfer.attention.sparse import SparsePlan
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention import prefill as families
from tests.attention.named_cases import named
from tests.attention.prefill_kit import BF16, E4M3, FP16, check, make_plan, offsets
from tests.oracles.attention import attention


@dataclass(frozen=True)
class Case:
    """Rows of blocks without any block, and with all of them, are there wherever there are two rows."""

    name: str
    sizes: tuple[int, int] = (512, 768)  # M, N
    block: tuple[int, int] = (64, 64)
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 128
    density: float = 0.3
    dtype: torch.dtype = BF16
    kv_dtype: torch.dtype | None = None
    mask: str = ""  # "bool" or "packed"
    strided: bool = False
    on_host: bool = False  # where indptr and indices are
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("ordinary"),
    Case("128_by_128", sizes=(1024, 1024), block=(128, 128)),
    Case("16_by_16", sizes=(256, 512), block=(16, 16)),
    Case("16_by_16_mha", sizes=(256, 512), block=(16, 16), heads=(2, 2)),
    Case("1_by_1", sizes=(37, 29), block=(1, 1), heads=(6, 2)),
    Case("wide", sizes=(64, 2048), block=(8, 256)),
    Case("tall", sizes=(700, 96), block=(350, 3)),
    Case("last_row_cut_off", sizes=(150, 320)),
    Case("one_row", sizes=(30, 640)),
    Case("no_queries", sizes=(0, 128)),
    Case("no_keys", sizes=(128, 0)),
    Case("group_7", heads=(14, 2), head_dim=64, dtype=FP16),
    Case("head_dim_256", head_dim=256, sizes=(256, 256)),
    Case("mask", mask="bool"),
    Case("mask_packed", sizes=(150, 320), block=(32, 40), mask="packed"),
    Case("mask_16_by_16", sizes=(200, 256), block=(16, 16), mask="bool", on_host=True),
    Case("strided", strided=True),
    Case("on_host", on_host=True),
    Case("fp8_kv", kv_dtype=E4M3),
    Case("scale_soft_cap", options={"sm_scale": 0.2, "logits_soft_cap": 5.0}),
    # By 2^32 and more: on Hopper a tile of few rows does not go by the maximum of those before.
    Case("scores_far_apart", sizes=(96, 1024), block=(16, 16), density=0.5, options={"sm_scale": 4.0}),
    Case("long_lists", sizes=(32, 16384), block=(16, 64), density=0.5, heads=(2, 1)),
)


class Problem:
    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.draw = torch.Generator().manual_seed(0)
        (m, n), (r, c) = case.sizes, case.block
        self.blocks = torch.rand(-(-m // r), n // c, generator=self.draw) < case.density
        if len(self.blocks) > 1:
            self.blocks[0], self.blocks[-1] = False, True
        self.q, self.k, self.v = (
            torch.randn(rows, heads, case.head_dim, generator=self.draw).to(dtype)
            for rows, heads, dtype in zip((m, n, n), (case.heads[0], *[case.heads[1]] * 2), self.dtypes)
        )
        # In any order within a row.
        listed = [torch.nonzero(row).flatten() for row in self.blocks]
        listed = [row[torch.randperm(len(row), generator=self.draw)] for row in listed]
        self.indptr = offsets(tuple(map(len, listed)))
        self.indices = torch.cat([*listed, torch.zeros(0, dtype=torch.long)]).int()
        self.mask = torch.rand(len(self.indices), r, c, generator=self.draw) < 0.6 if case.mask else None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.case.dtype, *[self.case.kv_dtype or self.case.dtype] * 2)

    def place(self, x: Tensor) -> Tensor:
        if not self.case.strided:
            return x.to(self.device)
        wide = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 8), math.nan).to(x.dtype).to(self.device)
        wide[:, 1:, :-8] = x.to(self.device)
        return wide[:, 1:, :-8]

    def plan(self, wrapper: sparse.BlockSparseAttentionWrapper) -> None:
        case, where = self.case, torch.device("cpu") if self.case.on_host else self.device
        masks: dict[str, Any] = {}
        if case.mask == "bool" and self.mask is not None:
            masks["mask"] = self.mask.to(where)
        if case.mask == "packed" and self.mask is not None:
            flat = sparse.convert_bsr_mask_layout(self.mask, self.indptr)
            (m, _), (r, c) = case.sizes, case.block
            cut = offsets(tuple(min(r, m - i * r) * int(row.sum()) * c for i, row in enumerate(self.blocks)))
            masks["packed_mask"] = flashinfer.segment_packbits(flat[: cut[-1]], cut, bitorder="little")[0].to(where)
        wrapper.plan(
            self.indptr.to(where), self.indices.to(where), *case.sizes, *case.block, *case.heads, case.head_dim,
            q_data_type=case.dtype, kv_data_type=case.kv_dtype, **masks, **case.options,
        )  # fmt: skip

    def run(self, wrapper: Any, **options: Any) -> tuple[Tensor, Tensor]:
        q, k, v = (self.place(x) for x in (self.q, self.k, self.v))
        out = torch.full_like(q, math.nan, memory_format=torch.contiguous_format)
        lse = torch.full(q.shape[:2], math.nan, device=q.device)
        result = wrapper.run(q, k, v, out=out, lse=lse, return_lse=True, **options)
        assert result[0] is out and result[1] is lse
        return out, lse

    def dense(self) -> Tensor:
        (m, n), (r, c) = self.case.sizes, self.case.block
        visible = self.blocks.repeat_interleave(r, 0).repeat_interleave(c, 1)
        if self.mask is not None:
            visible = torch.zeros(len(self.blocks) * r, n, dtype=torch.bool)
            for row in range(len(self.blocks)):
                for i in range(int(self.indptr[row]), int(self.indptr[row + 1])):
                    column = int(self.indices[i])
                    visible[row * r : (row + 1) * r, column * c : (column + 1) * c] = self.mask[i]
        return visible[:m]


def make_wrapper(device: torch.device, kind: str = "Block") -> Any:
    size = (64 << 20) if device.type == "cuda" else 8
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=device)
    return getattr(flashinfer, f"{kind}SparseAttentionWrapper")(workspace)


@pytest.mark.parametrize("case", named(CASES, sanitized={"16_by_16", "last_row_cut_off", "mask"}))
def test_blocks(case: Case, device: torch.device) -> None:
    problem, wrapper = Problem(case, device), make_wrapper(device)
    problem.plan(wrapper)
    expected = attention(problem.q, problem.k, problem.v, custom_mask=problem.dense(), **case.options)
    for _ in range(2):  # counters are back at zero
        check(problem.run(wrapper), expected)


@pytest.mark.parametrize("block", [(64, 64), (32, 16), (128, 64)])
def test_causal_is_that_of_the_matrix_where_the_diagonal_is_listed_last(
    block: tuple[int, int], device: torch.device
) -> None:
    length, (r, c) = 256, block
    lists = [[j for j in range((i + 1) * r // c) if j * c >= i * r or j % 2 == 0] for i in range(length // r)]
    q, k, v = torch.randn(3, length, 2, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    visible = torch.zeros(length // r, length // c, dtype=torch.bool)
    for row, listed in zip(visible, lists):
        row[listed] = True
    visible = visible.repeat_interleave(r, 0).repeat_interleave(c, 1) & torch.ones(length, length).tril().bool()
    wrapper = make_wrapper(device)
    indices = torch.tensor([j for row in lists for j in row], dtype=torch.int32)
    indptr = offsets(tuple(map(len, lists)))
    wrapper.plan(indptr.to(device), indices.to(device), length, length, *block, 2, 2, 64, causal=True, q_data_type=BF16)
    result = wrapper.run(*(x.to(device) for x in (q, k, v)), return_lse=True)
    check(result, attention(q, k, v, custom_mask=visible))


def test_a_plan_after_another_and_forward(device: torch.device) -> None:
    wrapper = make_wrapper(device)
    for case in (CASES[0], CASES[1], CASES[0]):
        problem = Problem(case, device)
        problem.plan(wrapper)
        given = [problem.place(x) for x in (problem.q, problem.k, problem.v)]
        out = wrapper.forward(*given, sm_scale=0.1, logits_soft_cap=4.0)
        expected = attention(
            problem.q, problem.k, problem.v, custom_mask=problem.dense(), sm_scale=0.1, logits_soft_cap=4.0
        )
        check((out, wrapper.run(*given, return_lse=True)[1]), (expected[0], problem_lse(problem)))


def problem_lse(problem: Problem) -> Tensor:
    return attention(problem.q, problem.k, problem.v, custom_mask=problem.dense())[1]


@pytest.mark.gpu
def test_captured() -> None:
    """Plan and run in one graph, replayed with other blocks."""
    device = torch.device("cuda")
    problem, wrapper = Problem(CASES[0], device), make_wrapper(device)
    problem.plan(wrapper)
    q, k, v = (problem.place(x) for x in (problem.q, problem.k, problem.v))
    indptr, indices = problem.indptr.to(device), problem.indices.to(device)
    case = problem.case

    def both() -> Any:
        wrapper.plan(indptr, indices, *case.sizes, *case.block, *case.heads, case.head_dim, q_data_type=case.dtype)
        return wrapper.run(q, k, v, return_lse=True)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = both()
    problem.blocks = problem.blocks.roll(1, 0)
    listed = [torch.nonzero(row).flatten() for row in problem.blocks]
    indptr.copy_(offsets(tuple(map(len, listed))))
    indices[: len(torch.cat(listed))].copy_(torch.cat(listed))
    for poisoned in result:
        poisoned.fill_(math.nan)
    graph.replay()
    check(result, attention(problem.q, problem.k, problem.v, custom_mask=problem.dense()))


# ------------------------------------------------------------------------------------------------------ variable blocks


@dataclass(frozen=True)
class Variable:
    name: str
    rows: tuple[tuple[int, ...], ...] = ((100, 28, 0, 129), (1, 63, 130, 63))
    columns: tuple[tuple[int, ...], ...] = ((7, 90, 203, 0, 33), (111, 1, 111, 70, 40))
    group: int = 1
    head_dim: int = 128
    dtype: torch.dtype = BF16
    transposed: bool = False
    on_host: bool = True


PAGED = ((64, 0, 128, 192), (8, 120, 56, 200))
VARIABLE_CASES = (
    Variable("ordinary"),
    Variable("group_3", group=3, head_dim=64, dtype=FP16),
    Variable("pages_of_8", columns=PAGED),
    Variable("pages_of_64", columns=((64, 128, 192), (128, 64, 192)), group=2),
    Variable("on_device", columns=PAGED, on_host=False),
    Variable("transposed", transposed=True, group=2),
    Variable("no_keys", columns=((0, 0), (0, 0))),
    Variable("no_rows", rows=((), ())),
    Variable("no_columns", columns=((), ())),
)


@pytest.mark.parametrize("case", named(VARIABLE_CASES, sanitized={"ordinary"}))
@pytest.mark.parametrize("given", [False, True], ids=["new", "given"])
def test_variable_blocks(case: Variable, given: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    heads, qo_len, kv_len = len(case.rows), sum(case.rows[0]), sum(case.columns[0])
    blocks = torch.rand(heads, len(case.rows[0]), len(case.columns[0]), generator=generator) < 0.5

    def draw(num_heads: int, length: int) -> Tensor:
        if case.transposed:
            return torch.randn(length, num_heads, case.head_dim, generator=generator).to(case.dtype).transpose(0, 1)
        return torch.randn(num_heads, length, case.head_dim, generator=generator).to(case.dtype)

    q, k, v = draw(heads * case.group, qo_len), draw(heads, kv_len), draw(heads, kv_len)
    wrapper, where = make_wrapper(device, "VariableBlock"), torch.device("cpu") if case.on_host else device
    sizes = [torch.tensor(of_heads, dtype=torch.int32).to(where) for of_heads in (case.rows, case.columns)]
    wrapper.plan(blocks.to(where), *sizes, heads * case.group, heads, case.head_dim, q_data_type=case.dtype)
    outputs: dict[str, Tensor] = {}
    if given:
        out = torch.full(q.shape, math.nan, dtype=case.dtype, device=device)
        outputs = {"out": out, "lse": torch.full(q.shape[:2], math.nan, device=device)}
    out, lse = wrapper.run(q.to(device), k.to(device), v.to(device), return_lse=True, **outputs)
    assert not given or (out is outputs["out"] and lse is outputs["lse"])
    for head in range(heads):
        rows, columns = (torch.tensor(of_heads[head], dtype=torch.long) for of_heads in (case.rows, case.columns))
        visible = blocks[head].repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        own = slice(head * case.group, (head + 1) * case.group)
        expected = attention(
            q[own].transpose(0, 1), k[head][:, None], v[head][:, None], custom_mask=visible.view(qo_len, kv_len)
        )
        check((out[own].transpose(0, 1), lse[own].T), expected)


# -------------------------------------------------------------------------------------------------------------- helpers


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_convert_bsr_mask_layout(dtype: torch.dtype, index: torch.dtype, device: torch.device) -> None:
    mask, counts = torch.arange(5 * 3 * 2).view(5, 3, 2).to(dtype), (2, 0, 3)
    flat = sparse.convert_bsr_mask_layout(mask.to(device), offsets(counts).to(index).to(device))
    rows = [mask[:2].transpose(0, 1).flatten(), mask[2:].transpose(0, 1).flatten()]
    assert torch.equal(flat.cpu(), torch.cat(rows)) and flat.dtype == dtype


def test_convert_bsr_mask_layout_refuses() -> None:
    with pytest.raises(ValueError, match=r"mask has shape \[2, 3\]"):
        sparse.convert_bsr_mask_layout(torch.zeros(2, 3), offsets((1,)))
    with pytest.raises(IndexError, match="ends at 7"):
        sparse.convert_bsr_mask_layout(torch.zeros(2, 3, 4), offsets((7,)))


def test_vector_sparse_offsets(device: torch.device) -> None:
    blocks, indptr = torch.tensor([5, 2, 9, 0, 3]), offsets((2, 0, 3))
    lens, starts = torch.tensor([7, 0, 9]), offsets((8, 0, 12))
    rows = [
        block * 40 + row * 10 for request, length in ((blocks[:2], 7), (blocks[2:], 9)) for block in request.tolist()
        for row in range(4)
    ]  # fmt: skip
    expected = torch.full((23,), -1)
    expected[:7], expected[8:17] = torch.tensor(rows[:7]), torch.tensor(rows[8:17])
    for dtype in (torch.int32, torch.int64):
        given = [x.to(dtype).to(device) for x in (blocks, indptr, torch.full((23,), -1), starts, lens)]
        result = page.block_sparse_indices_to_vector_sparse_offsets(*given, 40, 10, 4)
        assert result is given[2] and torch.equal(result.cpu(), expected.to(dtype))


def test_vector_sparse_offsets_refuses() -> None:
    given = [offsets((2, 2)), offsets((1, 2)), torch.zeros(9, dtype=torch.int32), offsets((4, 5))]
    with pytest.raises(IndexError, match=r"kv_lens\[1\] is 7; expected 0 to 5"):
        page.block_sparse_indices_to_vector_sparse_offsets(*given, torch.tensor([4, 7]), 4, 1, 4)
    with pytest.raises(ValueError, match="block_size is 0"):
        page.block_sparse_indices_to_vector_sparse_offsets(*given, torch.tensor([4, 5]), 4, 1, 0)


def test_refusals() -> None:
    wrapper = make_wrapper(torch.device("cpu"))
    q, k = torch.zeros(32, 2, 64), torch.zeros(48, 2, 64)
    with pytest.raises(ValueError, match="before plan"):
        wrapper.run(q, k, k)
    blocks: tuple[Any, ...] = (offsets((1, 2)), torch.tensor([0, 1, 2], dtype=torch.int32))
    sizes, shapes = (32, 48, 16, 16), {"num_qo_heads": 2, "num_kv_heads": 2, "head_dim": 64, "q_data_type": "float32"}
    with pytest.raises(ValueError, match="multiple of C"):
        wrapper.plan(*blocks, 32, 50, 16, 16, **shapes)
    with pytest.raises(ValueError, match=r"indptr has shape \[3\]; expected \[4\]"):
        wrapper.plan(*blocks, 33, 48, 16, 16, **shapes)
    with pytest.raises(IndexError, match=r"indices\[2\] is 3; expected 0 to 2"):
        wrapper.plan(blocks[0], blocks[1] + 1, *sizes, **shapes)
    for name, given in (("indptr", (blocks[0].cfloat(), blocks[1])), ("indices", (blocks[0], blocks[1].float()))):
        with pytest.raises(ValueError, match=rf"{name} is torch\.\w+; expected torch.int32"):
            wrapper.plan(*given, *sizes, **shapes)
    with pytest.raises(ValueError, match=r"mask has shape \[3, 16, 8\]"):
        wrapper.plan(*blocks, *sizes, mask=torch.ones(3, 16, 8), **shapes)
    with pytest.raises(UnsupportedConfig, match=r"block_mask is Tensor; expected None\. Next step: Variable"):
        wrapper.plan(*blocks, *sizes, block_mask=torch.ones(2, 2, 3), **shapes)
    with pytest.raises(UnsupportedConfig, match="o_data_type is bfloat16"):
        wrapper.plan(*blocks, *sizes, o_data_type="bfloat16", **shapes)
    wrapper.plan(*blocks, *sizes, **shapes)
    with pytest.raises(ValueError, match=r"q has shape \[48, 2, 64\]; planned for \[32, \*, \*\]"):
        wrapper.run(k, k, k)
    with pytest.raises(ValueError, match=r"v has shape \[32, 2, 64\]; planned for \[48, \*, \*\]"):
        wrapper.run(q, k, q)
    with pytest.raises(UnsupportedConfig, match="q_scale is a tensor of shape"):
        wrapper.run(q, k, k, torch.ones(2))
    assert wrapper.run(q, k, k).shape == q.shape  # what failed has changed nothing


def test_refusals_of_variable_blocks() -> None:
    wrapper = make_wrapper(torch.device("cpu"), "VariableBlock")
    blocks, rows, columns = torch.ones(1, 2, 2), torch.tensor([[3, 4]]), torch.tensor([[8, 16]])
    with pytest.raises(ValueError, match="before plan"):
        wrapper.run(torch.zeros(1, 7, 64), torch.zeros(1, 24, 64), torch.zeros(1, 24, 64))
    with pytest.raises(ValueError, match=r"block_col_sz is torch.int64 \[1, 1\]; expected int32 \[1, 2\]"):
        wrapper.plan(blocks, rows, columns[:, :1], 1, 1, 64)
    with pytest.raises(ValueError, match=r"block_row_sz adds up to \[7, 8\]"):
        wrapper.plan(blocks.repeat(2, 1, 1), torch.tensor([[3, 4], [4, 4]]), columns.repeat(2, 1), 2, 2, 64)
    with pytest.raises(UnsupportedConfig, match="ALIBI"):
        wrapper.plan(blocks, rows, columns, 1, 1, 64, pos_encoding_mode="ALIBI")
    wrapper.plan(blocks, rows, columns, 1, 1, 64, q_data_type="float32")
    with pytest.raises(ValueError, match=r"k has shape \[1, 23, 64\]; planned for \[1, 24, \*\]"):
        wrapper.run(torch.zeros(1, 7, 64), torch.zeros(1, 23, 64), torch.zeros(1, 24, 64))
    with pytest.raises(ValueError, match=r"out has shape \[1, 8, 64\]"):
        wrapper.run(*(torch.zeros(1, n, 64) for n in (7, 24, 24)), out=torch.zeros(1, 8, 64))


def test_rows_of_blocks_of_few_rows_share_their_keys() -> None:
    plan = make_plan(SparsePlan, 512, (0, 0), None)  # of 4 query heads a KV head
    assert [plan.queries_of(512 * r) for r in (16, 17, 128)] == ["shared", "medium", "medium"]
    shape = {"q_dtype": "bf16", "kv_dtype": "bf16", "head_dim": 128, "page_size": 16, "mask": "none"}
    spec = families.prefill("sm_90a", **shape, queries="shared")
    constants = families.PREFILL.implementation(spec).config(spec).constants
    assert constants["kSharesKv"] and constants["kBlockM"] == 64 and not constants["kGathersKv"]
    for target, more in (
        ("sm_80", {}),
        ("sm_90a", {"head_dim": 64}),
        ("sm_90a", {"kv_dtype": "fp8_e4m3"}),
        ("sm_90a", {"page_size": 1}),
    ):
        same = [families.prefill(target, **{**shape, **more}, queries=queries) for queries in ("shared", "short")]
        assert same[0] == same[1]
