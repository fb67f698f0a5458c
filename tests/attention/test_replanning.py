# SPDX-License-Identifier: Apache-2.0
"""What one call of a wrapper keeps for the next: the last plan with its arguments, the last run with its signature.
Whatever comes in between, a run is that of the plan before it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from flashinfer.attention.plan import Plan
from flashinfer.host import indices
from tests.attention.hostile_kit import KINDS, Batch

# The batch, and its first two requests; each with and without options.
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"window_left": 1}, {"sm_scale": 0.3}, {"logits_soft_cap": 2.0})
WRONG: tuple[tuple[dict[str, Any], type[Exception]], ...] = (
    ({"sm_scale": -1.0}, ValueError),
    ({"logits_soft_cap": "2.0"}, TypeError),
    ({"q_data_type": "nonsense"}, ValueError),
    ({"window_left": []}, TypeError),
    ({"max_token_per_sequence": -1}, ValueError),  # found wrong when all else is settled; not read by decode
)


class Requests:
    """The first requests of a batch, all of them or two."""

    def __init__(self, batch: Batch, count: int) -> None:
        self.batch, self.num_tokens = batch, sum(batch.qo_lens[:count])
        sizes = [count if index is batch.last_page_len else count + 1 for index in batch.index]
        self.index = [
            index if index is batch.pages else index[:size] for index, size in zip(batch.index, sizes, strict=True)
        ]

    def run(self, wrapper: Any, **options: Any) -> torch.Tensor:
        kv = self.batch.kv if self.batch.kind == "ragged" else (self.batch.kv,)
        out: torch.Tensor = wrapper.run(self.batch.q[: self.num_tokens], *kv, **options)
        return out

    def expected(self, planned: dict[str, Any], **options: Any) -> torch.Tensor:
        """By a wrapper that has seen nothing else."""
        wrapper, used = self.batch.make(), self.batch.wrapper
        self.batch.wrapper = wrapper
        self.batch.plan(*self.index, **planned)
        self.batch.wrapper = used
        return self.run(wrapper, **options)


def note_planners(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The extents for which planners are launched from now on, also where a device needs no schedule."""
    launched: list[Any] = []

    def planner(plan: Plan, extent: Any) -> Any:
        launch = found(plan, extent)

        def note_and_launch(*addresses: int) -> None:
            launched.append(extent)
            launch(*addresses)

        return note_and_launch

    found = Plan.planner
    monkeypatch.setattr(Plan, "planner", planner)
    return launched


@pytest.mark.parametrize("values_are_seen", (True, False), ids=("seen", "not_seen"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_that_of_the_last_plan_that_succeeded(
    kind: str, values_are_seen: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not values_are_seen:  # as on a GPU, on the CPU too: then a plan keeps more of the one before
        monkeypatch.setattr(indices, "may_be_visible", lambda *tensors: False)
    launched = note_planners(monkeypatch)
    batch, dice = Batch(kind, device), random.Random(kind)
    batch.index = [index.to(device) for index in batch.index]
    batch.pages = batch.index[-2] if kind != "ragged" else batch.pages
    batch.last_page_len = batch.index[-1] if kind != "ragged" else batch.last_page_len
    planned: list[tuple[Requests, dict[str, Any]]] = [
        (Requests(batch, count), options) for count in (3, 2) for options in OPTIONS
    ]
    overrides: list[dict[str, Any]] = [{}, {}, {"return_lse": True}]
    if kind != "ragged":
        overrides += [{"window_left": 0}, {"window_left": -1}]
    last, override = planned[0], overrides[0]
    batch.plan(*last[0].index)
    for _ in range(150):
        step = dice.random()
        requests, options = dice.choice(planned)
        if step < 0.3:
            batch.plan(*requests.index, **options)
            last = requests, options
        elif step < 0.5:
            wrong, error = dice.choice(WRONG[:-1] if kind == "decode" else WRONG)
            with pytest.raises(error):
                batch.plan(*requests.index, **{**options, **wrong})
        elif step < 0.7:
            batch.plan(*last[0].index, **last[1])
        requests, options = last
        override = override if dice.random() < 0.5 else dice.choice(overrides)
        got = requests.run(batch.wrapper, **override)
        assert launched[-1].suits(batch.wrapper._followed[1].extent, False)
        num_launched, expected = len(launched), requests.expected(options, **override)
        del launched[num_launched:]  # by the other wrapper
        for one, other in zip(got, expected) if isinstance(got, tuple) else ((got, expected),):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ("sm_scale", "logits_soft_cap"))
def test_arguments_that_do_not_compare_as_one_value_are_refused(kind: str, option: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    for wrong in (torch.ones(2), torch.ones(2).numpy(), [1.0, 1.0]):
        batch.plan(**{option: 0.5})
        with pytest.raises(TypeError, match=f"{option} is .*; expected a number"):
            batch.plan(**{option: wrong})


@pytest.mark.parametrize("kind", KINDS)
def test_other_workspaces_are_in_use_from_the_next_plan_on(kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    wrapper = batch.wrapper
    batch.plan()
    before = wrapper._plan
    batch.plan()
    assert wrapper._plan is before
    other = torch.empty_like(wrapper._float_workspace_buffer)
    wrapper.reset_workspace_buffer(other, wrapper._int_workspace_buffer)
    batch.plan()
    assert wrapper._plan is not before
    batch.check()
    before = wrapper._plan
    if device.type == "cuda":  # on the CPU it is empty, and has no address
        wrapper._int_workspace_buffer = torch.empty_like(wrapper._int_workspace_buffer)  # as engines do
        batch.plan()
        assert wrapper._plan is not before
        batch.check()


@pytest.mark.parametrize("kind", ("decode", "paged"))
def test_lengths_that_grew_are_held_against_the_tensors_again(kind: str) -> None:
    """Values that the host sees: a run whose signature is that of the last one still has to reach far enough."""
    batch = Batch(kind, torch.device("cpu"))
    batch.plan()
    batch.run()
    far = [index if index is not batch.pages else index + 8 for index in batch.index]
    batch.plan(*far)
    with pytest.raises(IndexError, match="pages"):
        batch.run()
    batch.plan()
    batch.check()
