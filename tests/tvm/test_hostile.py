# SPDX-License-Identifier: Apache-2.0
"""Arguments that are wrong arrive at the FFI's caller as errors that say which, what was expected, and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashinfer.errors import UnsupportedConfig
from tests.tvm.kit import RAGGED, Decode, Latent, Prefill, Step, Workspaces, check

INT32, INT64 = torch.int32, torch.int64
KINDS: dict[str, Callable[[Workspaces], Step]] = {
    "decode": Decode,
    "paged": Prefill,
    "ragged": lambda spaces: Prefill(spaces, RAGGED),
    "latent": Latent,
}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=INT32)


# kind, argument of its plan function, what takes its place, error and its message
PLANS: list[tuple[str, str, Any, type[Exception], str]] = [
    ("decode", "kv_indptr", ints(0, 3, 3, 16), ValueError, "kv_indptr has 4 entries; expected 5"),
    ("decode", "kv_indptr", ints(0, 3, 2, 16, 17), ValueError, "kv_indptr must start at 0 or above and never descend"),
    ("decode", "kv_indptr", ints(-1, 3, 3, 16, 17), ValueError, "kv_indptr must start at 0 .*; got -1"),
    ("decode", "kv_indptr", torch.zeros(5, dtype=INT64), ValueError, r"kv_indptr is torch.int64 \[5\] on cpu;"),
    ("decode", "kv_indptr", torch.zeros(5, 1, dtype=INT32), ValueError, r"int32 \[5, 1\] on cpu; expected contiguous"),
    ("decode", "kv_indptr", torch.zeros(10, dtype=INT32)[::2], ValueError, "expected contiguous int32"),
    ("decode", "kv_indptr", [0, 3, 3, 16, 17], TypeError, "kv_indptr is Array; expected a tensor"),
    ("decode", "kv_indptr", None, TypeError, "kv_indptr is NoneType; expected a tensor"),
    ("decode", "batch_size", -1, ValueError, "batch_size is -1; expected at least 0"),
    ("decode", "num_kv_heads", 0, ValueError, "num_kv_heads is 0; expected at least 1"),
    ("decode", "page_size", 1 << 40, ValueError, "page_size is 1099511627776; expected"),
    ("decode", "head_dim_vo", 64, UnsupportedConfig, "head_dim_qk is 128, head_dim_vo 64; expected one"),
    ("decode", "enable_cuda_graph", True, UnsupportedConfig, "enable_cuda_graph is True; expected False"),
    ("decode", "logits_soft_cap", float("nan"), ValueError, "logits_soft_cap is nan; expected a finite number"),
    ("decode", "empty_q", 3, TypeError, "empty_q is int; expected a tensor"),
    ("decode", "int_workspace", None, TypeError, "int_workspace is NoneType; expected a tensor"),
    ("decode", "int_workspace", torch.empty(0), ValueError, "int_workspace is empty"),
    ("decode", "float_workspace", torch.empty(8, 8)[:, :4], ValueError, "float_workspace is not contiguous"),
    ("paged", "qo_indptr", ints(0, 5, 6), ValueError, "qo_indptr has 3 entries; expected 5"),
    ("paged", "kv_len", ints(33, 90, 7), ValueError, "kv_len has 3 entries; expected 4"),
    ("paged", "kv_len", ints(33, -90, 7, 120), ValueError, r"kv_len\[1\] is -90; expected 0 to 96, what its pages"),
    ("paged", "kv_len", ints(33, 90, 17, 120), ValueError, r"kv_len\[2\] is 17; expected 0 to 16"),
    ("paged", "total_num_rows", 45, ValueError, "qo_indptr ends at 46; expected at most total_num_rows, 45"),
    ("paged", "fixed_split_size", -2, ValueError, "fixed_split_size is -2; expected at least -1"),
    ("latent", "kv_len", ints(33, -1, 0), ValueError, r"kv_len\[1\] is -1"),
    ("latent", "qo_indptr", ints(), ValueError, "qo_indptr is empty"),
    ("latent", "num_heads", 0, ValueError, "num_qo_heads is 0; expected at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value", "error", "message"), PLANS)
def test_plans(kind: str, name: str, value: Any, error: type[Exception], message: str) -> None:
    """And what was planned before goes on."""
    step = KINDS[kind](Workspaces(torch.device("cpu")))
    info = step.plan()
    with pytest.raises(error, match=f"{step.names[0]}: .*{message}"):
        step.plan(**{name: value})
    check(step.run(info), step.expected())


# kind, argument of its run function, what is made of it, error and its message
RUNS: list[tuple[str, str, Callable[[Any], Any], type[Exception], str]] = [
    ("decode", "q", lambda q: q.half(), ValueError, "q is torch.float16; planned with q_data_type torch.bfloat16"),
    ("decode", "q", lambda q: q[:3], ValueError, r"q has shape \[3, 8, 128\]; planned for \[4, 8, 128\]"),
    ("decode", "out", lambda out: out.double(), UnsupportedConfig, "float64"),
    ("decode", "out", lambda out: out[:, :4], ValueError, "out is"),
    ("decode", "lse", lambda lse: lse.half(), ValueError, r"lse is torch.float16 \[4, 8\]; expected torch.float32"),
    ("decode", "lse", lambda lse: 1.0, TypeError, "lse is float; expected a tensor"),
    ("decode", "kv_indices", lambda pages: pages[:16].clone(), ValueError, "kv_indices has 16 entries; expected 17"),
    ("decode", "kv_indices", lambda pages: pages + 3, IndexError, "the cache has 20 pages"),
    ("decode", "kv_indices", lambda pages: -pages - 1, IndexError, r"indices\[0\] is -"),
    ("decode", "kv_indptr", lambda offsets: offsets.long(), ValueError, r"kv_indptr is torch.int64 \[5\]"),
    ("decode", "last_page_len", lambda last: last - 20, ValueError, r"last_page_len\[0\] is -19; expected 1 to 16"),
    ("decode", "k_pages", lambda k: k[:, :1], ValueError, "heads"),
    ("decode", "v_pages", lambda v: v.float(), ValueError, "dtype"),
    ("decode", "kv_layout_code", lambda code: 2, ValueError, "kv_layout_code is 2; expected at least 0 and at most 1"),
    ("decode", "enable_pdl", lambda flag: 2, TypeError, "enable_pdl is 2; expected True or False"),
    ("decode", "sm_scale", lambda scale: -1.0, ValueError, "sm_scale is -1.0; expected a positive number"),
    ("decode", "plan_info", lambda info: [], ValueError, r"plan_info has 0 entries, first \[\]; expected what"),
    ("decode", "plan_info", lambda info: [info[0] - 1], ValueError, "Next step: call batch_decode_plan again"),
    ("decode", "plan_info", lambda info: [*info, 0], ValueError, "plan_info has 2 entries"),
    ("decode", "plan_info", lambda info: 7, TypeError, "plan_info is int; expected what batch_decode_plan returned"),
    ("decode", "int_workspace", lambda ints: torch.empty(64), ValueError, "this int workspace"),
    ("decode", "float_workspace", lambda floats: None, TypeError, "float_workspace is NoneType"),
    ("paged", "q", lambda q: q[:45], ValueError, "q has 45 rows; batch_prefill_plan was given offsets that end at 46"),
    ("paged", "q", lambda q: q[0], ValueError, r"q has shape \[8, 128\]; expected three dimensions"),
    ("paged", "mask_mode_code", lambda code: 2, UnsupportedConfig, "mask_mode_code is 2; expected 0 .* or 1"),
    ("paged", "qo_indptr", lambda offsets: offsets[:4].clone(), ValueError, "qo_indptr has 4 entries; expected 5"),
    ("ragged", "k", lambda k: k[:70], ValueError, "k has 70 rows; batch_prefill_plan was given offsets that end at 74"),
    ("ragged", "v", lambda v: v[:70], ValueError, "v"),
    ("ragged", "v", lambda v: v[..., :64], ValueError, "planned for 2 of 128 and 128"),
    ("latent", "num_heads", lambda heads: 8, ValueError, "num_heads is 8; planned for 16"),
    ("latent", "q_pe", lambda q: q[..., 0], ValueError, r"q_pe has shape \[5, 16\]; expected three dimensions"),
    ("latent", "page_size", lambda size: 32, ValueError, r"kv_len_arr\[0\] is 33; expected 0 to 32"),
    ("latent", "kpe_cache", lambda kpe: kpe[:1], ValueError, "kpe_cache"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "change", "error", "message"), RUNS)
def test_runs(kind: str, name: str, change: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    """Before anything ran and after, and what was planned goes on."""
    step = KINDS[kind](Workspaces(torch.device("cpu")))
    info = step.plan()
    for _ in range(2):
        with pytest.raises(error, match=message):
            step.run(info, **{name: change(value_of(step, info, name))})
        check(step.run(info), step.expected())


def value_of(step: Step, info: Any, name: str) -> Any:
    import inspect

    import flashinfer_tvm

    places = list(inspect.signature(flashinfer_tvm.FUNCTIONS[step.names[1]]).parameters)
    return [*step.workspaces[:2], list(info), *step.run_with][places.index(name)]


def test_a_plan_of_another_function(device: torch.device) -> None:
    spaces = Workspaces(device)
    decode, prefill = Decode(spaces), Prefill(spaces)
    info = prefill.plan()
    with pytest.raises(ValueError, match="expected what the last batch_decode_plan"):
        decode.run(info)
    check(prefill.run(info), prefill.expected())


def test_pages_are_not_rows(device: torch.device) -> None:
    spaces = Workspaces(device)
    ragged, paged = Prefill(spaces, RAGGED), Prefill(spaces)
    with pytest.raises(ValueError, match="planned for pages of 16; expected page_size 1"):
        ragged.run(paged.plan())


@pytest.mark.gpu
def test_devices() -> None:
    """Workspaces that are too small, and arrays on the wrong side."""
    cuda = torch.device("cuda")
    step = Decode(Workspaces(cuda))
    with pytest.raises(ValueError, match=r"kv_indptr is torch.int32 .* on cuda:0; expected .* on cpu"):
        step.plan(kv_indptr=step.planned[0].cuda())
    with pytest.raises(ValueError, match="int_workspace is on cpu, float_workspace on cuda:0"):
        step.plan(int_workspace=torch.empty(64))
    info = step.plan()
    with pytest.raises(ValueError, match=r"kv_indices is torch.int32 .* on cpu; expected .* on cuda:0"):
        step.run(info, kv_indices=step.run_with[4].cpu())
    check(step.run(info), step.expected())
    small = Workspaces(cuda)
    small[1] = torch.empty(256, dtype=torch.uint8, device=cuda)
    step = Decode(small)
    with pytest.raises(ValueError, match="the int workspace holds 256 bytes; this plan needs"):
        step.run(step.plan())


def test_an_offset_that_torch_ignores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As early releases read a tensor that starts behind its address: from the address on."""
    import tvm_ffi

    from flashinfer_tvm import tensors

    given = tvm_ffi.from_dlpack(torch.arange(8)[2:])
    assert tensors.tensor("op", "x", given).tolist() == [2, 3, 4, 5, 6, 7]
    monkeypatch.setattr(tensors, "_MAY_IGNORE_OFFSETS", True)
    assert tensors.tensor("op", "x", given).tolist() == [2, 3, 4, 5, 6, 7]
    monkeypatch.setattr(tensors, "from_dlpack", lambda capsule: torch.arange(8)[:6])
    with pytest.raises(UnsupportedConfig, match=r"op: x starts behind .* Next step: PyTorch 2.11"):
        tensors.tensor("op", "x", given)
