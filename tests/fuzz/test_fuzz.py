# SPDX-License-Identifier: Apache-2.0
"""The fuzzer has a case for every public function, finds the faults planted here, and in a short campaign no others."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flashinfer
from flashinfer import utils
from tests.fuzz import runner, table
from tests.fuzz.call import Call, Check, Refused, equal, judge
from tests.fuzz.draw import Draw
from tests.fuzz.memory import Memory
from tests.kit import ROOT
from tests.public_calls import NO_OPERATORS, public_modules


def campaign(*arguments: str) -> None:
    # More than one thread, so that kernels share their work; what else it would start itself anew with.
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_PERTURB_": "165"}
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_a_short_campaign_finds_nothing() -> None:
    campaign("--narrow", "--count", "3")


@pytest.mark.fuzz
def test_a_campaign_finds_nothing() -> None:
    campaign("--minutes", "5", "--seed", "20000")


def test_every_public_function_has_a_case() -> None:
    public = {name for exported in public_modules().values() for name in exported}
    public |= {name for name, value in vars(utils).items() if getattr(value, "__module__", "") == utils.__name__}
    aliases = {"top_p_renorm_prob", "top_k_renorm_prob"}
    enumerations = {"MaskMode", "PosEncodingMode", "TensorLayout"}
    assert set(flashinfer.__all__) - {"__version__"} - NO_OPERATORS <= public
    assert public - aliases - enumerations - NO_OPERATORS == set(table.cases())


# ------------------------------------------------------------------------------------------------------- planted faults


def twice(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What the planted functions should do."""
    return torch.add(x, x, out=out)


def expect_twice(x: Any, out: Any) -> Mapping[str, Check]:
    if x.dim() != 1:
        raise Refused("no vector")
    return {"return": equal(2 * x), "out": equal(2 * x)}


def verdict_on(function: Callable[..., Any], *, changes: tuple[str, ...] = (), rank: int = 1) -> str:
    """Of a call of the planted function on four numbers, with poison around them."""
    memory = Memory()
    draw = Draw("planted", 0, memory)
    shape = (4,) if rank == 1 else (2, 2)
    x = memory.place(torch.arange(4.0).view(shape), None, slack=2)
    out = memory.place(draw.blank(*shape).clone(), None, slack=2)
    try:
        return judge(
            Call("planted", function, {"x": x, "out": out}, expect_twice, ("out",), changes=changes), memory
        ).kind
    finally:
        memory.release()


def writes_behind(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    ctypes.memset(out.data_ptr() + 16, 0, 1)
    return twice(x, out)


def writes_in_front(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    ctypes.memset(out.data_ptr() - 1, 0, 1)
    return twice(x, out)


def writes_its_input(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    twice(x, out)
    x[0] = 7
    return out


def reads_behind(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    twice(x, out)[3] += x.as_strided((1,), (1,), x.storage_offset() + 4)[0]
    return out


def leaves_one_out(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    twice(x[:3], out[:3])
    return out


def is_off_by_a_bit(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return twice(x * (1 + 2**-22), out)


def returns_another_dtype(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return twice(x, out).double()


def raises(error: BaseException, first: Callable[..., Any] = lambda x, out: None) -> Callable[..., Any]:
    def function(x: torch.Tensor, out: torch.Tensor) -> None:
        first(x, out)
        raise error

    return function


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (twice, ""),
        (writes_behind, "wrote outside"),
        (writes_in_front, "wrote outside"),
        (writes_its_input, "wrote outside"),
        (reads_behind, "wrong"),
        (leaves_one_out, "wrong"),
        (is_off_by_a_bit, "wrong"),
        (returns_another_dtype, "wrong"),
        (raises(ValueError("no")), "refused"),
        (raises(KeyError("no")), "KeyError"),
        (raises(AttributeError("no")), "AttributeError"),
        (raises(OverflowError("no")), "OverflowError"),
        (raises(RecursionError("no")), "RecursionError"),
    ],
)
def test_faults_of_legal_calls_are_found(function: Callable[..., Any], kind: str) -> None:
    assert verdict_on(function) == kind


@pytest.mark.parametrize(
    ("function", "rank", "kind"),
    [
        (twice, 2, "accepted"),
        (twice, 1, ""),  # as the oracle says
        (leaves_one_out, 1, "wrong"),
        (raises(ValueError("no")), 2, ""),
        (raises(IndexError("no")), 2, ""),
        (raises(RuntimeError("no")), 2, ""),
        (raises(AssertionError("no")), 2, "AssertionError"),
        (raises(ValueError("no"), twice), 2, "failed but wrote"),
    ],
)
def test_faults_of_hostile_calls_are_found(function: Callable[..., Any], rank: int, kind: str) -> None:
    assert verdict_on(function, changes=("x: changed",), rank=rank) == kind


def test_overlapping_outputs_have_to_be_refused() -> None:
    memory = Memory()
    arguments = {"x": torch.zeros(2, 3), "out": memory.place(torch.zeros(2, 3), (1, 1))}
    changes = ("out: overlapping",)
    call = Call("planted", lambda x, out: None, arguments, expect_twice, ("out",), changes=changes)
    assert judge(call, memory).kind == "accepted"
    memory.release()


def dies(x: torch.Tensor, out: torch.Tensor) -> None:
    ctypes.memset(out.data_ptr() + mmap.PAGESIZE, 0, 1)  # in the page without access behind the tensor's only one


def test_a_crash_and_a_hang_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    hung, hangs = os.pipe()

    def hang(x: torch.Tensor, out: torch.Tensor) -> None:
        os.write(hangs, b".")
        time.sleep(60)

    def wait(pipes: list[Any], _: Sequence[int], __: Sequence[int], seconds: float) -> tuple[list[Any], ...]:
        """select.select where a child that hangs has been silent for long, and no other has."""
        assert seconds == runner.SILENCE
        ready, _, _ = select.select([*pipes, hung], [], [])
        heard = [pipe for pipe in ready if pipe in pipes]
        if not heard:
            os.read(hung, 1)
        return heard, [], []

    deaths: dict[int, Callable[..., Any]] = {1: dies, 3: hang, 4: writes_behind}

    def planted(draw: Draw) -> Iterator[Call]:
        seed = next(seeds)
        x, out = draw.memory.place(torch.arange(4.0)), draw.memory.place(torch.zeros(4), None, slack=1)
        yield Call("planted", deaths.get(seed, twice), {"x": x, "out": out}, expect_twice, ("out",))

    monkeypatch.setattr(runner, "cases", lambda: {"planted": planted})
    monkeypatch.setattr(runner, "select", SimpleNamespace(select=wait))
    report, left = runner.Report(), list(range(6))
    while left:  # as run_batch does, but that the planted case has to know its seed
        seeds = iter(left)
        death = runner._run_child("planted", left, False, report)
        if death is None:
            break
        report.findings.append(death)
        left = left[left.index(death.seed) + 1 :]
    assert [(finding.seed, finding.kind) for finding in report.findings] == [
        (1, "SIGSEGV"),
        (3, "hang"),
        (4, "wrote outside"),
    ]
    assert report.findings[0].call.startswith("planted(x=float32[4]")
    assert report.findings[0].command == "python -m tests.fuzz --only planted --seed 1"
    assert report.counts["legal"] == 4  # 0, 2, 4 and 5
    os.close(hung), os.close(hangs)


def test_a_case_is_drawn_from_its_name_and_seed_alone() -> None:
    def told(seed: int) -> list[str]:
        calls: list[str] = []
        runner.run_case("packbits", seed, True, lambda call, text: calls.append(text), lambda verdict: None)
        return calls

    assert told(5) == told(5) != told(6)
