# SPDX-License-Identifier: Apache-2.0
"""What engines may give to wrappers and is not here, or not there, is refused; names of theirs are what they expect."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.compat.engine_kit import (
    BF16,
    HEAD_DIM,
    NUM_QO_HEADS,
    SHAPES,
    Pool,
    decode_wrapper,
    offsets,
    prefill_wrapper,
)

ON_CPU = torch.device("cpu")
ANY_TENSOR = torch.zeros(1)


def planned_wrappers() -> list[Any]:
    pool = Pool(ON_CPU, 16, 8)
    decode, prefill = decode_wrapper(pool, 1), prefill_wrapper(pool, 1)
    ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(pool.workspace())
    table = pool.table((5,))
    for wrapper, index in (
        (decode, (*table, *SHAPES, 16)),
        (prefill, (offsets((1,)), *table, *SHAPES, 16)),
        (ragged, (offsets((1,)), offsets((5,)), *SHAPES)),
    ):
        wrapper.plan_again = functools.partial(wrapper.plan, *index, q_data_type=BF16)
        wrapper.plan_again()
    return [decode, prefill, ragged]


@pytest.fixture(scope="module")
def wrappers() -> list[Any]:
    return planned_wrappers()


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_item_len_ptr", ANY_TENSOR), ("token_pos_in_items_len", 3),
        ("kv_cache_sf", (ANY_TENSOR, ANY_TENSOR)), ("lse_base", "ln"),
        ("skip_softmax_threshold_scale_factor", 0.5), ("v_indptr", ANY_TENSOR),
    ],
)  # fmt: skip
def test_what_is_not_here_is_refused(name: str, value: Any, wrappers: list[Any]) -> None:
    for wrapper in wrappers:
        run = functools.partial(wrapper.run, *[None] * (3 if "ragged" in wrapper._op_name else 2))
        for call in (wrapper.plan_again, run):
            with pytest.raises(UnsupportedConfig, match=rf"{name} asks for .* expected .* got .* Next step"):
                call(**{name: value})


def test_what_plans_settle_is_no_argument_of_runs(wrappers: list[Any]) -> None:
    for wrapper in wrappers:
        run = functools.partial(wrapper.run, *[None] * (3 if "ragged" in wrapper._op_name else 2))
        for given in ({"fixed_split_size": 2048}, {"q_len_per_req": 2}, {"disable_split_kv": True}):
            with pytest.raises(UnsupportedConfig, match=r"Next step: pass it to plan\(\)"):
                run(**given)


def test_windows_to_the_right(wrappers: list[Any]) -> None:
    """No key is behind a query that decodes, nor behind a causal one; without a mask 0 is causal, and -1 is none."""
    decode, *prefills = wrappers
    decode.plan_again(window_right=8)
    for wrapper in prefills:
        wrapper.plan_again(window_right=-1)
        assert not wrapper._causal
        wrapper.plan_again(window_right=0)
        assert wrapper._causal
        wrapper.plan_again(causal=True, window_right=8)
        assert wrapper._causal
        with pytest.raises(UnsupportedConfig, match=r"window_right asks for keys behind the query's position"):
            wrapper.plan_again(window_right=8)
        wrapper.plan_again()


def test_unknown_arguments_are_refused(wrappers: list[Any]) -> None:
    for wrapper in wrappers:
        with pytest.raises(TypeError, match="unexpected argument 'window_lift'"):
            wrapper.plan_again(window_lift=3)


def test_output_dtype_of_prefill(wrappers: list[Any]) -> None:
    for wrapper in wrappers[1:]:
        with pytest.raises(UnsupportedConfig, match=r"o_data_type is .*expected that of q"):
            wrapper.plan_again(o_data_type=torch.float32)


def test_scales_of_heads_are_refused(wrappers: list[Any]) -> None:
    decode, prefill, _ = wrappers
    for wrapper in (decode, prefill):
        q, cache = torch.zeros(1, NUM_QO_HEADS, HEAD_DIM, dtype=BF16), Pool(ON_CPU, 16, 8).cache
        with pytest.raises(UnsupportedConfig, match=r"k_scale is a tensor of shape \[8\]; expected one number"):
            wrapper.run(q, cache, k_scale=torch.ones(8))


def test_private_names(wrappers: list[Any]) -> None:
    for wrapper in wrappers:
        wrapper._sm_scale = wrapper._logits_soft_cap = None  # the defaults, as planned
        with pytest.raises(UnsupportedConfig, match=r"_window_left was planned as -1 .* got 5\. Next step: call plan"):
            wrapper._window_left = 5
        with pytest.raises(UnsupportedConfig, match=r"plans anew what plan\(\) described"):
            wrapper._cached_module.plan(*[None] * 7, 17, *SHAPES[:2], 16, True, HEAD_DIM, HEAD_DIM, False)
    fresh = decode_wrapper(Pool(ON_CPU, 16, 8), 1)
    assert fresh._cached_module is None and not hasattr(fresh, "_sm_scale")


def test_backend_where_later_releases_have_it() -> None:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(0), "NHD", False, True, None, None, None, "fa3"
    )  # fmt: skip
    assert wrapper._backend == "fa3"


@pytest.mark.parametrize("dtype_kv", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_backend_asked_for_is_that_of_the_wrappers(
    dtype_kv: torch.dtype, wrappers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper too: engines take the order of `_cached_module.plan`'s arguments from either."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    device = torch.device("cuda")
    asked = flashinfer.utils.determine_attention_backend(device, 0, False, False, torch.bfloat16, dtype_kv)
    assert {asked} == {wrapper._backend for wrapper in wrappers}
