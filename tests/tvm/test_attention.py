# SPDX-License-Identifier: Apache-2.0
"""What TVM's paged KV cache calls, through the FFI and against the FP64 oracle, in the order in which it calls."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flashinfer.attention.planned import PlannedAttention
from tests.tvm.kit import DECODE, PAGED, RAGGED, Decode, Latent, Prefill, Step, Workspaces, call, check

WINDOW = {"causal": True, "window_left": 20}
# name -> a step of the kind
STEPS: dict[str, Callable[[Workspaces], Step]] = {
    "decode": Decode,
    "decode_nhd": lambda spaces: Decode(spaces, replace(DECODE, layout="NHD")),
    "paged": Prefill,
    "paged_no_mask": lambda spaces: Prefill(spaces, replace(PAGED, options={}, layout="NHD")),
    "paged_window": lambda spaces: Prefill(spaces, replace(PAGED, options=WINDOW)),
    "ragged": lambda spaces: Prefill(spaces, RAGGED),
    "ragged_hnd": lambda spaces: Prefill(spaces, replace(RAGGED, layout="HND")),
    "latent": Latent,
    "empty_batch": lambda spaces: Prefill(spaces, replace(PAGED, qo_lens=(), kv_lens=())),
}
KINDS = ("decode", "paged", "ragged", "latent")


@pytest.fixture
def planners(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The wrappers that have planned."""
    found: list[str] = []
    settle = PlannedAttention._settle

    def noting(self: PlannedAttention, *arguments: Any, **options: Any) -> None:
        found.append(type(self).__name__)
        settle(self, *arguments, **options)

    monkeypatch.setattr(PlannedAttention, "_settle", noting)
    return found


@pytest.mark.parametrize("name", STEPS)
def test_a_step(name: str, device: torch.device) -> None:
    step = STEPS[name](Workspaces(device))
    if name.endswith("nhd"):
        step.run_with[8] = 0
    check(step.run(step.plan()), step.expected())


@pytest.mark.parametrize("name", KINDS)
def test_layers_share_a_plan(name: str, device: torch.device, planners: list[str]) -> None:
    """One planner for the runs of a step; one more where a layer asks for something else."""
    step = STEPS[name](Workspaces(device))
    info = step.plan()
    assert planners == [], "plan functions take note alone"
    for _ in range(3):
        step.run(info)
    assert len(planners) == 1
    check((step.out, step.lse), step.expected())
    scale = 0.5
    step.run(info, sm_scale=scale)
    assert len(planners) == 2
    if isinstance(step, Latent):
        step.batch.case = replace(step.batch.case, sm_scale=scale)
    else:
        step.batch.case.options["sm_scale"] = scale  # type: ignore[attr-defined]
    try:
        check((step.out, step.lse), step.expected())
    finally:
        if not isinstance(step, Latent):
            del step.batch.case.options["sm_scale"]  # type: ignore[attr-defined]


def test_depths_share_a_float_workspace(device: torch.device, planners: list[str]) -> None:
    """As those of a cascade: planned one after the other, and run by turns, a layer at a time."""
    first = Workspaces(device)
    steps = [Decode(first), Prefill(Workspaces(device, first[0])), Decode(Workspaces(device, first[0]), seed=1)]
    infos = [step.plan() for step in steps]
    for _ in range(2):
        for step, info in zip(steps, infos):
            step.out.fill_(math.nan)
            check(step.run(info), step.expected())
    assert len(planners) == 3


def test_steps_share_a_workspace(device: torch.device) -> None:
    """An int workspace holds the plan that was made last: of prefill, of decode, of other lengths."""
    spaces = Workspaces(device)
    prefill, decode, longer = Prefill(spaces), Decode(spaces), Decode(spaces, replace(DECODE, kv_lens=(7, 600)))
    for step in (decode, prefill, longer, decode):
        stale = step.plan()
        check(step.run(stale), step.expected())
        info = step.plan()
        with pytest.raises(ValueError, match="expected what the last batch_"):
            step.run(stale)
        step.out.fill_(math.nan)
        check(step.run(info), step.expected())


def test_natural_logarithms(device: torch.device) -> None:
    step = Latent(Workspaces(device))
    out, lse = step.run(step.plan(), return_lse_base_on_e=True)
    check((out, lse / math.log(2)), step.expected())


@pytest.mark.parametrize("name", KINDS)
def test_without_lse(name: str, device: torch.device) -> None:
    step = STEPS[name](Workspaces(device))
    step.run(step.plan(), lse=None)
    assert torch.isnan(step.lse).all()
    check((step.out, step.expected()[1].float()), step.expected())


def test_arrays_may_be_longer(device: torch.device) -> None:
    """Their front is what counts, on the host and on the device."""
    step = Decode(Workspaces(device))
    indptr, last = step.planned[0], step.run_with[5]
    longer = torch.cat([indptr, torch.tensor([-1, 1 << 30], dtype=torch.int32)])
    ended = torch.cat([last, torch.tensor([99, -5], dtype=torch.int32, device=device)])
    info = step.plan(kv_indptr=longer)
    check(step.run(info, kv_indptr=longer.to(device), last_page_len=ended), step.expected())


def test_host_arrays_are_read_while_planning(device: torch.device) -> None:
    """TVM fills the next step's arrays into the same memory."""
    step = Latent(Workspaces(device))
    given = [array.clone() for array in step.planned[:3]]
    info = step.plan(qo_indptr=given[0], kv_indptr=given[1], kv_len=given[2])
    for array in given:
        array.fill_(-7)
    check(step.run(info), step.expected())


def test_workspaces_are_not_kept(device: torch.device) -> None:
    """The memory of a cache is given back with it, whatever was planned there."""
    spaces, arrays = Workspaces(device), []
    if device.type == "cpu":
        owners = [np.zeros(64, dtype=np.uint8) for _ in range(2)]
        arrays = [weakref.ref(owner) for owner in owners]
        spaces[:2] = [torch.from_numpy(owner) for owner in owners]
        del owners
    step = Prefill(spaces)
    step.run(step.plan())
    gc.collect()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    size = sum(space.nbytes for space in spaces[:2])
    spaces.clear()
    assert all(array() is None for array in arrays)
    assert device.type == "cpu" or torch.cuda.memory_allocated() <= before - size


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm_ffi

    import flashinfer_tvm

    flashinfer_tvm.register()
    flashinfer_tvm.register()
    name = "batch_decode_plan"
    with monkeypatch.context() as patch:
        patch.delitem(flashinfer_tvm._registered, name)  # as if another library had come first
        with pytest.raises(ValueError, match="batch_decode_plan of another library are registered"):
            flashinfer_tvm.register()
        tvm_ffi.register_global_func(name, lambda: "theirs", override=True)
        assert tvm_ffi.get_global_func(name)() == "theirs"
        flashinfer_tvm.register(override=True)
    with pytest.raises(TypeError):
        call(name)
