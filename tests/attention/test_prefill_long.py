# SPDX-License-Identifier: Apache-2.0
"""Which of its tiles prefill takes, by the queries of a request on average: chosen without waiting for the device, and
on Hopper one of its own for long ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashinfer.attention.prefill.plan import PrefillPlan, UniformPlan
from flashinfer.families.attention import prefill as families
from flashinfer.families.attention import prefill_sm90
from flashinfer.families.attention.params import QUERIES
from flashinfer.jit import default_resolver
from tests.attention.named_cases import named
from tests.attention.prefill_kit import (
    CAUSAL,
    FP16,
    LENGTHS_AND_HEADS,
    Case,
    check,
    expect,
    make_batch,
    make_plan,
    make_wrapper,
    plan,
    replay_other_lengths,
    run,
)

PLAIN: dict[str, Any] = {"q_dtype": "bf16", "kv_dtype": "bf16", "head_dim": 128, "kv_storage": "ragged"}
ON_HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


# ---------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_class_follows_the_average(batch_size: int) -> None:
    short, long = families.SHORT_ROWS * batch_size, families.LONG_ROWS * batch_size
    rows = {"short": (0, short), "medium": (short + 1, long - 1), "long": (long, 1 << 40)}
    for queries, found in rows.items():
        assert {families.queries_of(count, batch_size, 128) for count in found} == {queries}


def test_a_batch_of_few_units_is_not_long() -> None:
    """Those of one KV head of a model that many GPUs share."""
    assert (
        families.queries_of(families.MANY_ROWS - 1, 1, 1) == families.queries_of(families.LONG_ROWS, 1, 1) == "medium"
    )
    assert families.queries_of(families.MANY_ROWS, 1, 1) == "long"


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"mask": "none"},
        {"q_dtype": "fp16", "kv_dtype": "fp16"},
        {"kv_storage": "single"},
        {"kv_storage": "paged", "page_size": 16},
        {"kv_storage": "paged", "page_size": 1},
        {"has_sinks": True, "device_scales": True},
    ],
)
def test_long_queries_have_a_tile_of_three_consumers(axes: dict[str, Any]) -> None:
    specs = [families.prefill("sm_90a", **{**PLAIN, **axes}, queries=queries) for queries in QUERIES]
    assert len(set(specs)) == 3
    configs = [families.PREFILL.implementation(spec).config(spec) for spec in specs]
    assert dict(zip(QUERIES, (config.launch.num_threads // 128 - 1 for config in configs))) == {
        "medium": 2, "short": 1, "long": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "axes"),
    [
        ("sm_80", {}),
        ("sm_100a", {}),
        ("x86-64-v3", {}),
        ("sm_90a", {"head_dim": 64}),
        ("sm_90a", {"head_dim": 256}),
        ("sm_90a", {"head_dim": 192, "head_dim_vo": 128}),
        ("sm_90a", {"kv_dtype": "fp8_e4m3"}),
        ("sm_90a", {"q_dtype": "fp8_e4m3", "kv_dtype": "fp8_e4m3", "o_dtype": "bf16"}),
        ("sm_90a", {"has_window": True}),
        ("sm_90a", {"has_soft_cap": True}),
        ("sm_90a", {"mask": "custom"}),
        ("sm_90a", {"pos_encoding": "alibi"}),
        ("sm_90a", {"pos_encoding": "rope"}),
    ],
)
def test_where_it_gains_nothing_there_is_no_kernel_of_its_own(target: str, axes: dict[str, Any]) -> None:
    long, medium = (families.prefill(target, **{**PLAIN, **axes}, queries=queries) for queries in ("long", "medium"))
    assert long == medium


def test_a_row_of_a_config_that_asks_for_it_all_the_same_has_the_medium_tile() -> None:
    spec = families.prefill("sm_90a", **{**PLAIN, "head_dim": 256})
    named = families.PREFILL.spec("sm_90a", **{**dict(spec.args), "queries": "long"})
    assert not prefill_sm90.has_long_tile(named)
    implementation = families.PREFILL.implementation(named)
    assert implementation.config(named) == families.PREFILL.implementation(spec).config(spec)


def test_a_plan_goes_by_shapes_alone() -> None:
    tokens = max(families.LONG_ROWS, families.MANY_ROWS // 8 // 2) // 4  # of 32 heads on 8
    found = make_plan(PrefillPlan, 2, (0, 0), None)
    assert [found.queries_of(n) for n in (0, 32, 33, 2 * tokens - 1, 2 * tokens)] == [
        "short", "short", "medium", "medium", "long",
    ]  # fmt: skip


def test_a_plan_that_others_do_not_decide_goes_by_its_own_lengths() -> None:
    """Whatever else is in the batch: of a request that is like all of them, or the tile between the others."""
    tokens = max(families.LONG_ROWS, families.MANY_ROWS // 8) // 4  # of 32 heads on 8
    for fixed in (0, 4096):
        assert {make_plan(PrefillPlan, 3, (0, 0), fixed).queries_of(n) for n in (1, 1000, 1 << 30)} == {"medium"}
        for length, queries in ((1, "short"), (17, "medium"), (tokens, "long")):
            assert make_plan(PrefillPlan, 3, (length, 0), fixed).queries_of(1) == queries
            assert make_plan(UniformPlan, 3, (length, 0), fixed).queries_of(1) == queries


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.fixture
def every_batch_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those that are short."""
    monkeypatch.setattr(families, "LONG_ROWS", 0)
    monkeypatch.setattr(families, "MANY_ROWS", 0)


@pytest.fixture
def few_units_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "MANY_ROWS", 0)


LENGTHS = (700, 1, 300), (900, 1000, 300)
CASES = [
    Case("paged", *LENGTHS),
    Case("ragged", *LENGTHS, storage="ragged"),
    Case("not_causal", *LENGTHS, options={}),
    Case("ragged_not_causal", *LENGTHS, storage="ragged", options={}),
    Case("fp16_hnd", *LENGTHS, q_dtype=FP16, layout="HND"),
    Case("far_apart", (300, 400), (900, 400), options={"causal": True, "sm_scale": 1.0}),
    Case("farther_apart", (300, 400), (900, 400), options={"causal": True, "sm_scale": 4.0}, storage="ragged"),
    *[Case(f"page_{size}", (200, 70), (600, 70), page_size=size) for size in (1, 3, 8, 24, 256)],
    Case("page_1_not_causal", *LENGTHS, page_size=1, options={}),
    # Of a unit's last tiles the first consumers may see nothing, and the last may have no rows: both pass them by.
    Case("rows_see_less_than_their_unit", (200, 130, 65, 64, 400), (200, 130, 65, 64, 400), (2, 2), storage="ragged"),
    Case("some_see_nothing_of_a_split", (192, 1), (20000, 500), (1, 1)),
    Case("ends_of_tiles", (48, 96, 49, 95, 47), (128, 256, 129, 255, 127), (4, 1)),
    Case("group_7", (300, 40), (500, 600), heads=(14, 2), storage="ragged"),
    *LENGTHS_AND_HEADS,
]


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.usefixtures("every_batch_is_long")
@pytest.mark.parametrize("case", named(CASES, sanitized={"paged", "ragged_not_causal"}))
def test_against_the_oracle(case: Case) -> None:
    device = torch.device("cuda")
    batch = make_batch(case, device)
    wrapper = make_wrapper(case, device)
    plan(wrapper, batch)
    check(run(wrapper, batch), expect(batch))


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.usefixtures("few_units_are_enough")
def test_long_queries_by_their_number() -> None:
    """As it is chosen: one request of so many rows, a batch whose average they are, and what is shorter."""
    device, tokens = torch.device("cuda"), families.LONG_ROWS // 256
    for qo_lens, is_long in (
        ((tokens,), True),
        ((2 * tokens, 0, 20, 2 * tokens - 20), True),
        ((tokens, tokens - 1), False),
    ):
        case = Case("chosen", qo_lens, tuple(n + 70 for n in qo_lens), heads=(256, 1), storage="ragged")
        batch = make_batch(case, device)
        wrapper = make_wrapper(case, device)
        plan(wrapper, batch)
        check(run(wrapper, batch), expect(batch))
        spec = families.prefill("sm_90a", **PLAIN, queries="long")
        assert (wrapper._extent.block_m == 192) == is_long
        assert default_resolver().holds(spec) or not is_long


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.usefixtures("every_batch_is_long")
def test_a_graph_is_replayed_with_other_lengths() -> None:
    case = Case("graph", heads=(16, 2), options=CAUSAL)
    replay_other_lengths(case, lambda batch, actual: check(actual, expect(batch)))


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.usefixtures("few_units_are_enough")
@pytest.mark.parametrize("long_first", [True, False])
def test_lengths_that_only_the_device_knows(long_first: bool) -> None:
    """A plan guesses the class of the run before; the run, which sees its queries, plans again. Also while captured."""
    device = torch.device("cuda")
    lengths = [families.LONG_ROWS // 256, families.LONG_ROWS // 512]
    lengths = lengths if long_first else lengths[::-1]
    cases = [Case(f"{n}", (n,), (300,), heads=(256, 1), storage="ragged") for n in lengths]
    batches = [make_batch(case, device) for case in cases]
    wrapper = make_wrapper(cases[0], device)
    for batch in (*batches, batches[0]):
        batch.indices = tuple(index.to(device) for index in batch.indices)
        plan(wrapper, batch)
        check(run(wrapper, batch), expect(batch))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan(wrapper, batches[1])
        result = wrapper.run(batches[1].q, *batches[1].kv, return_lse=True)
    for poisoned in result:
        poisoned.fill_(float("nan"))
    graph.replay()
    check(result, expect(batches[1]))
