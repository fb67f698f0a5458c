# SPDX-License-Identifier: Apache-2.0
"""One call, and the judgement of what came of it."""

from __future__ import annotations

import contextlib
import functools
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch

from flashinfer.errors import CompileError, FlashInferError
from tests.fuzz.memory import Memory, overlap, overlaps_itself
from tests.tolerances import ELEMENTWISE, assert_close

Check = Callable[[Any], None]  # raises Wrong


class Refused(Exception):
    """Of an oracle: these arguments have no meaning, so the call has to raise."""


class Unspecified(Exception):
    """Of an oracle: any result will do, as long as nothing but the outputs is touched."""


class Wrong(Exception):
    """A result is not what the oracle says."""


@dataclass
class Call:
    """`function(**arguments)`. `expect` takes the arguments as they are before the call and says what becomes of each
    output, and of "return"."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    expect: Callable[..., Mapping[str, Check]]
    outputs: tuple[str, ...] = ()  # arguments that are written
    in_place: tuple[tuple[str, str], ...] = ()  # pairs (output, input) that may be the same memory
    fills: tuple[torch.Tensor, ...] = ()  # other memory that a call which succeeds may write
    changes: tuple[str, ...] = ()  # how this differs from a legal call; none: it is one
    settle: Callable[[Call, Optional[BaseException], Any], None] = lambda call, raised, result: None  # told how it went
    ambient: str = "none"  # of AMBIENTS

    def with_argument(self, name: str, value: Any, change: str) -> Call:
        return replace(self, arguments={**self.arguments, name: value}, changes=(*self.changes, f"{name}: {change}"))

    def again(self, memory: Memory) -> Call:
        """The same call on equal tensors elsewhere in memory."""

        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            if isinstance(value, list):
                return list(map(moved, value))
            return memory.place(value, value.stride()) if isinstance(value, torch.Tensor) else value

        placed: dict[int, Any] = {}
        arguments = {}
        for name, value in self.arguments.items():
            arguments[name] = placed.setdefault(id(value), moved(value))  # what was one tensor stays one
        return replace(self, arguments=arguments)

    def __str__(self) -> str:
        text = f"{self.name}({', '.join(f'{name}={show(value)}' for name, value in self.arguments.items())})"
        return text if self.ambient == "none" else f"{text} under {self.ambient}"


@dataclass
class Verdict:
    legal: bool
    raised: Optional[BaseException] = None
    kind: str = ""  # of a finding
    detail: str = ""

    @property
    def outcome(self) -> str:
        return "legal" if self.legal else "returned" if self.raised is None else "refused"


def judge(call: Call, memory: Memory) -> Verdict:
    """Make the call and compare."""
    verdict = Verdict(legal=not call.changes)
    before = {name: _copied(value) for name, value in call.arguments.items()}
    expected: Optional[Mapping[str, Check]] = None
    refused = ""
    try:
        _refuse_overlaps(call)
        if not all(has_values(tensor) for value in before.values() for tensor in tensors_in(value)):
            raise Unspecified
        expected = call.expect(**before)
    except Refused as reason:
        refused = f"the oracle: {reason}"
    except Unspecified:
        pass
    except (ArithmeticError, AttributeError, IndexError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if verdict.legal:
            raise
        refused = f"the oracle fails on it: {type(error).__name__}: {error}"
    memory.remember()
    result: Any = None
    try:
        with _AMBIENT[call.ambient]():
            result = call.function(**call.arguments)
    except Exception as error:
        verdict.raised = error
    call.settle(call, verdict.raised, result)
    tensors = [*call.fills, *(tensor for name in call.outputs for tensor in tensors_in(call.arguments[name]))]
    written = memory.differences([] if verdict.raised else [tensor for tensor in tensors if has_values(tensor)])
    error = verdict.raised
    if error is not None and not is_for_callers(error):
        verdict.kind, verdict.detail = type(error).__name__, str(error)
    elif error is not None and verdict.legal:
        verdict.kind, verdict.detail = "refused", f"{type(error).__name__}: {error}"
    elif written:
        verdict.kind, verdict.detail = "failed but wrote" if error else "wrote outside", written
    elif error is None and refused:
        verdict.kind, verdict.detail = "accepted", refused
    elif error is None and expected is not None:
        try:
            _compare(call, expected, result)
        except (Wrong, AssertionError) as wrong:
            verdict.kind, verdict.detail = "wrong", str(wrong)
    return verdict


def is_for_callers(error: BaseException) -> bool:
    """Whether an exception tells a caller what is wrong with a call: ours, or torch's own."""
    if isinstance(error, (CompileError, UnicodeError, RecursionError, struct.error)):
        return False
    if isinstance(error, (FlashInferError, ValueError, TypeError)):
        return True
    is_of_torch = isinstance(error, RuntimeError) and type(error).__module__.startswith("torch.")
    return is_of_torch or type(error) in (IndexError, RuntimeError, NotImplementedError)


def _compare(call: Call, expected: Mapping[str, Check], result: Any) -> None:
    inputs = [tensor for value in call.arguments.values() for tensor in tensors_in(value)]
    if not all(map(has_values, inputs)):  # a meta tensor has no values; its results have none either
        strange = [show(tensor) for tensor in tensors_in(result) if has_values(tensor)]
        if strange:
            raise Wrong(f"returns {strange[0]} for an argument without values")
        return
    if not all(map(has_values, tensors_in(result))):
        raise Wrong(f"returns {show(result)}, which has no values")
    for name, check in expected.items():
        try:
            check(result if name == "return" else call.arguments[name])
        except (Wrong, AssertionError) as wrong:
            raise Wrong(f"{name}: {wrong}") from None


def _refuse_overlaps(call: Call) -> None:
    """An output whose elements share memory cannot hold a result. One that shares memory with another argument can, but
    only where an operator says so is it defined which."""
    plain = {name: [t for t in tensors_in(value) if has_values(t)] for name, value in call.arguments.items()}
    for output in call.outputs:
        if any(map(overlaps_itself, plain[output])):
            raise Refused(f"elements of {output} share memory")
    for output in call.outputs:
        for name, tensors in plain.items():
            for a in plain[output]:
                for b in tensors:
                    if (a is b and name == output) or not overlap(a, b):
                        continue
                    same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
                    if not (same and a.dtype == b.dtype and (output, name) in call.in_place):
                        raise Unspecified


# --------------------------------------------------------------------------------------------------------------- checks


Expect = Callable[..., Mapping[str, Check]]


def lenient(expect: Expect) -> Expect:
    """What a hostile call means is left open, as long as it raises as it should or writes nothing but its outputs."""

    @functools.wraps(expect)
    def checked(**arguments: Any) -> Mapping[str, Check]:
        try:
            return expect(**arguments)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            raise Unspecified from None

    return checked


def near(expected: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> Check:
    """Of this dtype, and close to the FP64 oracle."""

    def check(actual: Any) -> None:
        require_tensor(actual, expected.shape, dtype)
        held = expected.abs() <= torch.finfo(dtype).max
        assert_close(actual, torch.where(held | expected.isnan(), expected, expected.sign() * math.inf), scale=scale)

    return check


def near_each(expected: torch.Tensor, dtype: torch.dtype) -> Check:
    """As `near`, element by element alone: where small results are differences, their norm says nothing."""

    def check(actual: Any) -> None:
        require_tensor(actual, expected.shape, dtype)
        tolerance = ELEMENTWISE[dtype]
        torch.testing.assert_close(actual.detach().double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)

    return check


def near_fp8(expected: torch.Tensor, dtype: torch.dtype) -> Check:
    """Saturated and rounded once: within half a unit in the last place, and what fp32 arithmetic may move it."""
    mantissa_bits, largest, smallest = {
        torch.float8_e4m3fn: (3, 448.0, 2.0**-9),
        torch.float8_e5m2: (2, 57344.0, 2.0**-16),
    }[dtype]

    def check(actual: Any) -> None:
        require_tensor(actual, expected.shape, dtype)
        ours, exact = actual.float().double(), expected.clamp(-largest, largest)
        if not torch.equal(ours.isnan(), exact.isnan()):
            raise Wrong("NaN at other positions than in the oracle")
        allowed = exact.abs() * 2.0 ** -(mantissa_bits + 1) * 1.001 + smallest / 2 * 1.001
        off = ((ours - exact).abs() > allowed) & ~exact.isnan()
        if bool(off.any()):
            raise Wrong(f"{ours[off][0].item()}; the oracle has {exact[off][0].item()}")

    return check


def equal(expected: torch.Tensor) -> Check:
    """Bit by bit, dtype included; NaN is a value."""

    def check(actual: Any) -> None:
        require_tensor(actual, expected.shape, expected.dtype)
        ours, theirs = (
            x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
            for x in (actual, expected)
        )
        if not torch.equal(ours, theirs):
            raise Wrong(f"{actual.flatten()[:8].tolist()}; the oracle has {expected.flatten()[:8].tolist()}")

    return check


def pair(*checks: Optional[Check]) -> Check:
    """Of a tuple."""

    def check(actual: Any) -> None:
        if not isinstance(actual, tuple) or len(actual) != len(checks):
            raise Wrong(f"{show(actual)}; expected a tuple of {len(checks)}")
        for one, value in zip(checks, actual):
            if one is not None:
                one(value)

    return check


def nothing(actual: Any) -> None:
    if actual is not None:
        raise Wrong(f"{show(actual)}; expected None")


def require_tensor(actual: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    if not isinstance(actual, torch.Tensor) or actual.shape != shape or actual.dtype != dtype:
        raise Wrong(f"{show(actual)}; expected {str(dtype)[6:]}{list(shape)}")


# ---------------------------------------------------------------------------------------------------------------- parts


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def has_values(tensor: torch.Tensor) -> bool:
    """With values in memory, which may have been freed."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and (tensor.numel() == 0 or tensor.data_ptr() != 0)
    )


def _copied(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_copied, value))
    return value.detach().clone() if isinstance(value, torch.Tensor) and has_values(value) else value


def show(value: Any) -> str:
    """Short, and enough to write the call down again."""
    if isinstance(value, tuple):
        return f"({', '.join(map(show, value))},)"
    if isinstance(value, list) and any(isinstance(item, torch.Tensor) for item in value):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, torch.Generator):
        return "generator"
    if not isinstance(value, torch.Tensor):
        return repr(value)[:80]
    text = f"{str(value.dtype)[6:]}{list(value.shape)}"
    if not has_values(value):
        return f"{text} on {type(value).__name__} {value.device} {value.layout}"
    if not value.is_contiguous():
        text += f" strides {list(value.stride())}"
    if value.dim() == 1 and value.dtype in (torch.int32, torch.int64, torch.bool) and value.numel() <= 12:
        text += f" {value.tolist()}"
    return text


# What may be set around a call, and must not matter to it.
@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


_AMBIENT: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "none": contextlib.nullcontext,
    "inference_mode": torch.inference_mode,
    "default device meta": lambda: torch.device("meta"),
    "default dtype float64": lambda: _default_dtype(torch.float64),
    "default dtype bfloat16": lambda: _default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: _deterministic(),
}
AMBIENTS = tuple(_AMBIENT)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
