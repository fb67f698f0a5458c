# SPDX-License-Identifier: Apache-2.0
"""The Hopper implementation of prefill, as far as no GPU is needed: what it answers, that it compiles well, and how a
launch of it describes K and V to TMA. What it computes, test_prefill.py compares with the oracle on a Hopper GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from flashinfer.aot import config as aot_config
from flashinfer.attention.prefill import sm90
from flashinfer.errors import ToolchainMissing, UnsupportedConfig
from flashinfer.families.attention import prefill as families
from flashinfer.families.attention import prefill_sm90
from flashinfer.families.attention.params import ADDRESSES
from flashinfer.jit import driver, loader, source, toolchain
from flashinfer.jit.spec import KernelSpec

BF16: dict[str, Any] = {"q_dtype": "bf16", "kv_dtype": "bf16", "head_dim": 128, "kv_storage": "ragged"}
FP8: dict[str, Any] = {"q_dtype": "fp8_e4m3", "kv_dtype": "fp8_e4m3", "o_dtype": "bf16"}
WIDENED: dict[str, Any] = {"kv_dtype": "fp8_e4m3"}
HOPPER, EVERYWHERE = "attention/sm90/prefill.cuh", "attention/prefill/kernel.cuh"


def header_of(target: str, **axes: Any) -> str:
    return families.PREFILL.implementation(families.prefill(target, **{**BF16, **axes})).header


# ---------------------------------------------------------------------------------------------------- what it answers


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"q_dtype": "fp16", "kv_dtype": "fp16"},
        {"mask": "none"},
        {"kv_storage": "single"},
        {"kv_storage": "paged", "page_size": 8},
        {"kv_storage": "paged", "page_size": 48},
        {"kv_storage": "paged", "page_size": 1},
        {"kv_storage": "paged", "page_size": 12},
        {"head_dim": 64},
        {"head_dim": 256},
        {"head_dim": 192, "head_dim_vo": 128},
        {"has_window": True},
        {"has_soft_cap": True},
        {"has_sinks": True},
        {"mask": "custom"},
        {"pos_encoding": "alibi"},
        FP8,
        {**FP8, "o_dtype": "fp16", "kv_storage": "paged", "page_size": 8, "mask": "none", "has_window": True},
        {**FP8, "queries": "short"},
        {**FP8, "queries": "short", "head_dim": 256, "kv_storage": "paged", "page_size": 1},
        {"kv_dtype": "fp8_e4m3", "queries": "short"},
        {"kv_dtype": "fp8_e5m2", "queries": "short", "head_dim": 64, "kv_storage": "paged", "page_size": 1},
        {"queries": "short"},
        {"queries": "short", "kv_storage": "paged", "page_size": 16},
        {"queries": "short", "kv_storage": "paged", "page_size": 1},
        {"queries": "short", "head_dim": 192, "head_dim_vo": 128},
        {"queries": "short", "mask": "custom", "pos_encoding": "alibi"},
        {**FP8, "kv_storage": "paged", "page_size": 1},
        {**FP8, "head_dim": 64},
        {**FP8, "head_dim": 192, "head_dim_vo": 128},
        {"kv_dtype": "fp8_e4m3"},
        {"kv_dtype": "fp8_e4m3", "kv_storage": "paged", "page_size": 1},
        {"kv_dtype": "fp8_e4m3", "head_dim": 64, "mask": "custom", "pos_encoding": "alibi"},
        {"q_dtype": "fp16", "kv_dtype": "fp8_e5m2", "head_dim": 256, "kv_storage": "paged", "page_size": 16},
    ],
)
def test_serves(axes: dict[str, Any]) -> None:
    assert header_of("sm_90a", **axes) == HOPPER
    assert header_of("sm_80", **axes) == header_of("sm_100a", **axes) == EVERYWHERE


@pytest.mark.parametrize(
    "axes",
    [
        {"kv_dtype": "fp8_e4m3", "head_dim": 192, "head_dim_vo": 128},
        {"kv_dtype": "fp8_e4m3", "queries": "short", "head_dim": 192, "head_dim_vo": 128},
        {"head_dim": 96},
        {"head_dim": 192},
        {"head_dim": 96, "queries": "short"},
        {"pos_encoding": "rope"},
        {"pos_encoding": "rope", "queries": "short"},
        {**FP8, "pos_encoding": "rope"},
        {**FP8, "head_dim": 96},
        {**FP8, "head_dim": 256, "kv_storage": "paged", "page_size": 1},
        {**FP8, "head_dim": 256, "kv_storage": "paged", "page_size": 12},
    ],
)
def test_leaves_to_the_other(axes: dict[str, Any]) -> None:
    assert header_of("sm_90a", **axes) == EVERYWHERE


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "x86-64-v3"])
@pytest.mark.parametrize(
    "axes", [{"kv_dtype": "bf16"}, {"kv_dtype": "fp8_e5m2"}, {"q_dtype": "bf16", "kv_dtype": "bf16", "o_dtype": "fp16"}]
)
def test_dtypes_without_a_kernel_are_refused(target: str, axes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedConfig, match="prefill: q is"):
        source.render(families.prefill(target, **{**BF16, **FP8, **axes}))


def test_the_page_size_makes_no_two_kernels_where_none_minds() -> None:
    paged: dict[str, Any] = {**BF16, "kv_storage": "paged"}
    for target, axes in (
        ("sm_80", {}),
        ("sm_90a", {"queries": "short"}),
        ("sm_90a", {"pos_encoding": "rope"}),
        ("x86-64-v3", {}),
    ):
        small, large = (families.prefill(target, **paged, **axes, page_size=size) for size in (1, 16))
        assert small == large, target


def test_core_holds_the_kernels_of_small_and_of_large_pages() -> None:
    specs = [spec for spec in aot_config.read_specs(["core"], ["sm_90a"]) if spec.family == "prefill"]
    paged = [spec for spec in specs if spec.arg("kv_storage") == "paged" and spec.arg("head_dim_qk") == 128]
    assert {families.PREFILL.implementation(spec).header for spec in paged} == {HOPPER}
    assert {spec.arg("large_pages") for spec in paged} == {False, True}


# ----------------------------------------------------------------------------------------------------- that it compiles


def compiled_specs() -> list[KernelSpec]:
    specs = []
    for dim_qk, dim_vo in prefill_sm90.TILES:
        dims = {"head_dim": dim_qk, "head_dim_vo": dim_vo}
        specs.append(families.prefill("sm_90a", **{**BF16, **dims}))
        specs.append(families.prefill("sm_90a", **{**BF16, **dims}, mask="none", has_window=True))
        specs.append(families.prefill("sm_90a", **{**BF16, **dims, "kv_storage": "paged"}, page_size=1))
        changed: dict[str, Any] = {"mask": "custom", "pos_encoding": "alibi", "has_soft_cap": True, "has_window": True}
        specs.append(families.prefill("sm_90a", **{**BF16, **dims}, **changed))
        short = {**BF16, **dims, "queries": "short"}
        drafts = {**short, "kv_storage": "paged", "mask": "draft"}
        specs.append(families.prefill("sm_90a", **drafts, has_window=True))
        specs.append(families.prefill("sm_90a", **{**drafts, "mask": "causal"}, device_scales=True))
        specs.append(families.prefill("sm_90a", **{**drafts, "queries": "medium", "page_size": 16}))
        specs.append(families.prefill("sm_90a", **{**short, "kv_storage": "paged"}))
        specs.append(families.prefill("sm_90a", **short, **changed))
        specs.append(families.prefill("sm_90a", **{**BF16, **dims}, has_window=True, has_sinks=True))
        specs.append(families.prefill("sm_90a", **short, has_sinks=True))
    paged = {"kv_storage": "paged", "page_size": 16}
    rows = {**paged, "page_size": 1}
    for long in ({}, {"mask": "none"}, {"kv_storage": "single"}, paged, {**paged, "has_sinks": True}, rows):
        specs.append(families.prefill("sm_90a", **{**BF16, **long}, queries="long"))
    fp16 = {"q_dtype": "fp16", "kv_dtype": "fp16"}
    specs.append(families.prefill("sm_90a", **{**BF16, **fp16, **paged}, device_scales=True, queries="long"))
    specs.append(families.prefill("sm_90a", **{**BF16, "q_dtype": "fp16", "kv_dtype": "fp16", **paged}))
    for dim_qk, dim_vo in prefill_sm90.FP8_TILES:
        fp8 = {**BF16, **FP8, "head_dim": dim_qk, "head_dim_vo": dim_vo}
        specs.append(families.prefill("sm_90a", **fp8))
        specs.append(families.prefill("sm_90a", **{**fp8, **paged}, mask="none", has_window=True))
        specs.append(families.prefill("sm_90a", **fp8, **changed))
        specs.append(families.prefill("sm_90a", **{**fp8, **paged}, queries="short"))
        specs.append(families.prefill("sm_90a", **{**fp8, **paged, "page_size": 1}, **changed, queries="short"))
        if dim_qk != 256:
            specs.append(families.prefill("sm_90a", **{**fp8, **paged, "page_size": 1}, **changed))
    for dim, _ in prefill_sm90.WIDENING_TILES:
        widened = {**BF16, "kv_dtype": "fp8_e4m3", "head_dim": dim}
        specs.append(families.prefill("sm_90a", **{**widened, **paged}))
        specs.append(families.prefill("sm_90a", **{**widened, "q_dtype": "fp16", "kv_dtype": "fp8_e5m2"}, mask="none"))
        specs.append(families.prefill("sm_90a", **{**widened, **paged}, **changed))
        specs.append(families.prefill("sm_90a", **{**widened, **paged, "page_size": 1}, **changed))
        specs.append(families.prefill("sm_90a", **{**widened, **paged}, queries="short"))
        specs.append(families.prefill("sm_90a", **{**widened, **paged, "page_size": 1}, **changed, queries="short"))
    scaled = {**paged, **changed, "device_scales": True}
    for dtypes in ({}, FP8, WIDENED):
        specs.append(families.prefill("sm_90a", **{**BF16, **dtypes, **scaled}))
        specs.append(families.prefill("sm_90a", **{**BF16, **dtypes, **scaled}, queries="short"))
    return specs


def stand_ins() -> list[KernelSpec]:
    """Of each tile and pair of dtypes, the kernel with every option, which keeps most in registers."""
    found: dict[Any, KernelSpec] = {}
    for spec in compiled_specs():
        tile = tuple(spec.arg(axis) for axis in ("q_dtype", "kv_dtype", "head_dim_qk", "head_dim_vo", "queries"))
        if spec.arg("mask") == "custom":
            found.setdefault(tile, spec)
    return list(found.values())


def cases() -> list[Any]:
    """Those that stand for others are compiled in every run, the others are slow. tests/aot/test_core_kernels.py has
    plain ones."""
    in_every_run = stand_ins()
    return [
        pytest.param(spec, id=spec.name, marks=[] if spec in in_every_run else [pytest.mark.slow])
        for spec in compiled_specs()
    ]


@pytest.mark.parametrize("spec", cases())
def test_products_overlap_and_no_register_spills(spec: KernelSpec) -> None:
    try:
        compiled = toolchain.Nvrtc().compile(source.render(spec))
    except ToolchainMissing as missing:
        pytest.skip(str(missing))
    assert " 0 bytes spill stores, 0 bytes spill loads" in compiled.log, compiled.log
    assert "C75" not in compiled.log, compiled.log  # ptxas serializes wgmma, or ignores setmaxnreg


@pytest.mark.parametrize("spec", compiled_specs(), ids=lambda spec: spec.name)
def test_an_sm_holds_the_blocks_it_is_meant_to(spec: KernelSpec) -> None:
    launch = families.PREFILL.implementation(spec).config(spec).launch
    assert launch.smem_bytes <= 227 << 10
    assert launch.min_blocks_per_sm * (launch.smem_bytes + 1024) <= 228 << 10


@pytest.mark.parametrize("dims", prefill_sm90.TILES)
@pytest.mark.parametrize("axes", [{}, FP8, WIDENED], ids=["bf16", "fp8", "bf16 over fp8"])
def test_short_queries_have_a_tile_of_one_consumer(axes: dict[str, Any], dims: tuple[int, int]) -> None:
    """Whose rows are as many as SHORT_ROWS, and of whose keys a tile is more than one load ahead."""
    given = {**BF16, **axes, "head_dim": dims[0], "head_dim_vo": dims[1], "queries": "short"}
    spec = families.prefill("sm_90a", **given)
    constants = families.PREFILL.implementation(spec).config(spec).constants
    assert constants["kBlockM"] == families.SHORT_ROWS
    assert int(constants["kNumStages"]) >= 2


def test_short_queries_take_8_bit_kv_in_boxes_and_16_bit_kv_in_rows() -> None:
    for dtypes, page_size, gathers in (({}, 16, True), (FP8, 16, False), (FP8, 1, True), (WIDENED, 8, False)):
        given: dict[str, Any] = {**BF16, **dtypes, "kv_storage": "paged", "page_size": page_size}
        spec = families.prefill("sm_90a", **given, queries="short")
        assert families.PREFILL.implementation(spec).config(spec).constants["kGathersKv"] == gathers


# --------------------------------------------------------------------------------------------------- how it is launched


class FakeDriver:
    """Keeps what cuTensorMapEncodeTiled and cuLaunchKernelEx are given."""

    def __init__(self, params: type[ctypes.Structure]) -> None:
        self.params, self.maps, self.swizzles, self.launched = params, [], [], []  # type: ignore[var-annotated]

    def cuTensorMapEncodeTiled(  # noqa: N802
        self, storage: Any, dtype: int, rank: int, address: Any, dims: Any, strides: Any, box: Any, *rest: Any
    ) -> int:
        self.maps.append((address.value, list(dims), list(strides), list(box)))
        self.swizzles.append(rest[2])
        ctypes.memset(storage, len(self.maps), driver.TENSOR_MAP_BYTES)
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: Any, extra: Any) -> int:  # noqa: N802
        address = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))[0]
        assert address is not None
        copy = ctypes.string_at(address, ctypes.sizeof(self.params))
        self.launched.append((list(config._obj.grid), self.params.from_buffer_copy(copy)))
        return 0


def bind(monkeypatch: pytest.MonkeyPatch, strides: tuple[int, int, int], page_size: int = 1, **axes: Any) -> Any:
    """(launch, fake driver) of a kernel with these strides of pages, entries and heads, in elements."""
    found = source.render(families.prefill("sm_90a", **{**BF16, **axes, "page_size": page_size}))
    params = found.implementation.params
    fake = FakeDriver(params)
    monkeypatch.setattr(driver, "library", lambda: fake)
    monkeypatch.setattr(loader, "stream_getter", lambda: lambda device: 0)
    launcher = loader.CudaLauncher("prefill", found.config, params, ctypes.c_void_p(1), 0, True)
    varying = (*families.ROWS, *ADDRESSES)
    values: dict[str, Any] = {name: 0 for name, *_ in families.PrefillParams._fields_ if name not in varying}
    values["extras"] = b""
    values["num_kv_heads"] = 8
    for half in "kv":
        values |= {f"kv.{half}_{axis}_stride": stride for axis, stride in zip(("page", "entry", "head"), strides)}
    return sm90.bind_launch(launcher, 132, values, page_size), fake


def addresses(k: int, v: int) -> tuple[int, ...]:
    return (1, 0, 0, 0, 0x1000, 0x2000, 0, k, v, 5, 0, 0)


def test_ragged_rows_are_one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, fake = bind(monkeypatch, (8 * 128, 0, 128))
    launch(*addresses(1 << 40, 1 << 41))
    block_n, row = prefill_sm90.TILES[128, 128].block_n, 8 * 128 * 2
    unbounded = 1 << 31
    assert fake.maps == [
        (start - block_n * row, [128, block_n, 8, 1, unbounded], [row, 256, 16, row], [64, block_n, 1, 1, 1])
        for start in (1 << 40, 1 << 41)
    ]
    grid, params = fake.launched[0]
    assert grid == [132, 1, 1]
    assert (params.box_rows, bytes(params.k_map), bytes(params.v_map)) == (block_n, b"\1" * 128, b"\2" * 128)
    assert (params.q, params.out, getattr(params, "kv.k"), getattr(params, "kv.index.indptr")) == (
        0x1000, 0x2000, 1 << 40, 5,
    )  # fmt: skip


def test_bytes_are_described_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, fake = bind(monkeypatch, (8 * 128, 0, 128), **FP8)
    launch(*addresses(1 << 40, 1 << 41))
    block_n, row = prefill_sm90.FP8_TILES[128, 128].block_n, 8 * 128
    start, dims, strides, box = fake.maps[0]
    assert start == (1 << 40) - block_n * row
    assert (dims, strides, box) == (
        [64, block_n, 8, 1, 1 << 31], [row, 128, 16, row], [64, block_n, 1, 1, 1],
    )  # fmt: skip


def test_bytes_that_are_widened_come_in_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a tile at a time, not swizzled."""
    launch, fake = bind(monkeypatch, (8 * 128, 0, 128), kv_dtype="fp8_e4m3")
    launch(*addresses(1 << 40, 1 << 41))
    box_rows, row = prefill_sm90.WIDENING_TILES[128, 128].block_n // 4, 8 * 128
    start, dims, strides, box = fake.maps[0]
    assert start == (1 << 40) - box_rows * row
    assert (dims, strides, box) == (
        [64, box_rows, 8, 1, 1 << 31], [row, 128, 16, row], [64, box_rows, 1, 1, 1],
    )  # fmt: skip
    assert fake.swizzles == [driver.TENSOR_MAP_NO_SWIZZLE] * 2
    assert fake.launched[0][1].box_rows == box_rows


@pytest.mark.parametrize(("page_size", "box_rows"), [(8, 8), (16, 16), (48, 16), (128, 128), (256, 128)])
def test_a_box_is_within_a_page_and_divides_a_tile(
    monkeypatch: pytest.MonkeyPatch, page_size: int, box_rows: int
) -> None:
    entry = 8 * 128
    launch, fake = bind(monkeypatch, (page_size * entry, entry, 128), page_size, kv_storage="paged")
    launch(*addresses(1 << 40, 1 << 41))
    start, dims, strides, box = fake.maps[0]
    assert start == (1 << 40) - box_rows * entry * 2
    assert (dims[:3], box) == ([128, box_rows, 8], [64, box_rows, 1, 1, 1])
    assert strides == [entry * 2, 256, page_size * entry * 2, entry * 2]
    assert fake.launched[0][1].box_rows == box_rows


@pytest.mark.parametrize("axes", [{"queries": "short"}, {"kv_storage": "paged"}], ids=str)
def test_rows_that_are_gathered_need_no_description(monkeypatch: pytest.MonkeyPatch, axes: dict[str, Any]) -> None:
    launch, fake = bind(monkeypatch, (8 * 128, 8 * 128, 128), **axes)
    launch(*addresses(1 << 40, 1 << 41))
    grid, params = fake.launched[0]
    assert fake.maps == [] and grid == [132, 1, 1]
    assert (params.q, getattr(params, "kv.k"), getattr(params, "kv.v")) == (0x1000, 1 << 40, 1 << 41)


def test_an_address_is_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, fake = bind(monkeypatch, (8 * 128, 0, 128))
    for k, v in ((1 << 40, 1 << 41), (1 << 40, 1 << 42), (1 << 40, 1 << 41)):
        launch(*addresses(k, v))
    assert len(fake.maps) == 3
    assert [bytes(params.v_map)[0] for _, params in fake.launched] == [2, 3, 2]


def test_of_an_empty_tensor_and_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address to speak of, and strides that no multiple of 16 bytes need be where an axis has one element."""
    launch, fake = bind(monkeypatch, (3, 0, 5), head_dim=64)
    launch(*addresses(0, 0))
    for start, _, strides, _ in fake.maps:
        assert start > 0 and start % 16 == 0
        assert all(stride % 16 == 0 for stride in strides)
