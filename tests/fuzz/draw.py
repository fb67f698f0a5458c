# SPDX-License-Identifier: Apache-2.0
"""What cases are drawn with: seeded choices, tensors in fenced memory, hostile changes to a call."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Optional, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashinfer import env
from tests.fuzz.call import Call, has_values, show, tensors_in
from tests.fuzz.memory import Memory

T = TypeVar("T")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INDICES = (torch.int32, torch.int64)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Draw:
    """`narrow` keeps to a few kernels, for a run that has no time to compile many."""

    def __init__(self, name: str, seed: int, memory: Memory, narrow: bool = False) -> None:
        self.random = random.Random(f"{name}/{seed}")
        self.torch = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.memory, self.narrow = memory, narrow
        self.split = self.random.randrange(6)  # where rows in two groups are parted, alike in all tensors of a case

    # ---------------------------------------------------------------------------------------------------------- numbers

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choice(self, values: Sequence[T]) -> T:
        return self.random.choice(values)

    def kernel(self, *values: T) -> T:
        """A choice for which a kernel is compiled; the first one alone where time is short."""
        return self.choice(values[:1] if self.narrow else values)

    def size(self, largest: int = 4) -> int:
        """A length, sometimes 0."""
        return 0 if self.chance(0.05) else self.random.randint(1, largest)

    def lengths(self, count: int, largest: int) -> list[int]:
        return [0 if self.chance(0.2) else self.random.randint(1, largest) for _ in range(count)]

    # ---------------------------------------------------------------------------------------------------------- tensors

    def values(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self.torch) * scale).to(dtype)

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.float32, groups: int = 1, scale: float = 1.0
    ) -> torch.Tensor:
        return self.place(self.values(*shape, dtype=dtype, scale=scale), groups)

    def blank(self, *shape: int, dtype: torch.dtype = torch.float32, groups: int = 1) -> torch.Tensor:
        """An output: poison."""
        return self.place(torch.full(shape, 255, dtype=torch.uint8).repeat_interleave(dtype.itemsize, -1).view(dtype)
                          if shape and shape[-1] else torch.empty(shape, dtype=dtype), groups)  # fmt: skip

    def index(self, values: Sequence[int], dtype: Optional[torch.dtype] = None) -> torch.Tensor:
        return self.dense(torch.tensor(values, dtype=dtype or self.kernel(*INDICES)))

    def dense(self, values: torch.Tensor) -> torch.Tensor:
        return self.memory.place(values, None, self.choice((0, 0, 1, 3, 16)))

    def place(self, values: torch.Tensor, groups: int = 1) -> torch.Tensor:
        """Anywhere, with a dense last axis. groups: 1, rows evenly spaced; 2, in groups that are; 0, anyhow."""
        if values.dim() < 2 or self.chance(0.4):
            return self.dense(values)
        shape, strides = values.shape, [1] * values.dim()
        leading = list(range(values.dim() - 2, -1, -1))
        if groups == 0 and self.chance(0.3):
            self.random.shuffle(leading)
        uneven = set(leading) if groups == 0 else {leading[0]}
        if groups == 2:
            uneven.add(leading[self.split % len(leading)])
        distance = max(shape[-1], 1)
        for axis in leading:
            if axis in uneven and self.chance(0.5):
                distance += self.choice((1, 2, 8, 24))
            strides[axis] = distance
            distance *= max(shape[axis], 1)
        strides = [self.choice((s, s, 1, 7919)) if n == 1 and a < len(shape) - 1 else s
                   for a, (n, s) in enumerate(zip(shape, strides))]  # fmt: skip
        return self.memory.place(values, strides, self.choice((0, 0, 1, 16)))

    # -------------------------------------------------------------------------------------------------------- hostility

    def maybe_hostile(self, call: Call, more: Sequence[Callable[[Call], Call]] = ()) -> list[Call]:
        """The call, its repetition on equal tensors elsewhere, or it and a hostile variation of itself."""
        if self.chance(0.35):
            return [call] if self.chance(0.6) else [call, call.again(self.memory)]
        first = (
            [call.again(self.memory)] if self.chance(0.4) else []
        )  # so that the hostile one finds what that one left
        for _ in range(2 if self.chance(0.12) else 1):
            call = self.choice(more)(call) if more and self.chance(0.3) else self.hostile(call)
        return [*first, call]

    def hostile(self, call: Call) -> Call:
        """One argument replaced."""
        name = self.choice(
            [*call.arguments, *[n for n, v in call.arguments.items() if isinstance(v, (torch.Tensor, tuple, list))]]
        )
        value = call.arguments[name]
        if not all(map(has_values, tensors_in(value))):
            return call  # hostile enough already
        value, change = self._hostile_value(value, call)
        return call.with_argument(name, value, change)

    def _hostile_value(self, value: Any, call: Call) -> tuple[Any, str]:
        if isinstance(value, torch.Tensor):
            return self._hostile_tensor(value, call)
        if isinstance(value, (tuple, list)) and value and not isinstance(value[0], (int, float)):
            kind = type(value)
            if self.chance(0.15):
                other = self.choice((kind(value[:1]), kind((*value, value[0])), kind(), None, value[0]))
                return other, f"{len(value)} items became {type(other).__name__}"
            i = self.random.randrange(len(value))
            item, change = self._hostile_value(value[i], call)
            return kind((*value[:i], item, *value[i + 1 :])), f"[{i}] {change}"
        if isinstance(value, bool):
            other = self.choice((not value, None, 2, "yes"))
        elif isinstance(value, int):
            near = (0, -1, value + 1, value - 1, 2 * value)
            far = (1 << 31, -(1 << 31) - 1, (1 << 31) - 1, 1 << 63, 1 << 70)
            as_tensor = torch.tensor(value) if abs(value) < 1 << 63 else "none"
            of_other_types = (float(value), value + 0.5, str(value), None, math.nan, math.inf, as_tensor)
            other = self.choice((*near, *far, *of_other_types))
        elif isinstance(value, float):
            of_other_types = (1 << 70, str(value), None, b"1", 1j, torch.tensor(value))
            far = (math.nan, math.inf, -math.inf, 1e-45, 1e38, 1e300)
            other = self.choice((0.0, -value, -1.0, *far, *of_other_types))
        elif isinstance(value, (str, torch.dtype)):
            other = self.choice(("", "nhd", "ROPE", f"{value} ", 3, None, b"NHD", torch.float64, torch.int32))
        else:  # None: an optional argument that was left out
            other = self.choice((0, -1, 1.0, math.nan, "none", self.normal(2), self.index([0])))
        return other, f"{show(value)} became {show(other)}"[:90]

    def _hostile_tensor(self, tensor: torch.Tensor, call: Call) -> tuple[Any, str]:
        if tensor.dtype in INDICES and tensor.numel() and self.chance(0.45):
            return self.hostile_index(tensor)
        change = self.choice(_CHANGES)
        changed = change(self, tensor, call)
        return changed if changed is not None else (None, "not a tensor")

    def hostile_index(self, tensor: torch.Tensor) -> tuple[Any, str]:
        values = tensor.clone(memory_format=torch.contiguous_format)
        at, largest = self.random.randrange(values.numel()), torch.iinfo(values.dtype).max
        old = int(values.view(-1)[at])
        new = self.choice(
            (-1, old + 1, old - 1, old + 7, 1000, 1 << 20, (1 << 31) - 1, largest, -(1 << 31), -largest - 1)
        )
        new = min(max(new, torch.iinfo(values.dtype).min), largest)
        values.view(-1)[at] = new
        return self.dense(values), f"entry {at} became {new}"


Changed = Optional[tuple[Any, str]]


def _meta(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), "on meta"


def _fake(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    with FakeTensorMode():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype), "fake"


def _other_dtype(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    others = (
        *FLOATS,
        torch.float64,
        torch.int32,
        torch.int64,
        torch.int16,
        torch.uint8,
        torch.bool,
        *FP8,
        torch.complex64,
    )
    dtype = d.choice([dtype for dtype in others if dtype != x.dtype])
    values = x.float() if x.dtype in FP8 else x
    return d.memory.place(values.to(dtype), x.stride()), f"{str(dtype)[6:]}"


def _other_rank(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    options: list[tuple[torch.Tensor, str]] = [
        (x.unsqueeze(0), "one axis more in front"), (x.unsqueeze(-1), "one axis more behind"), (x.flatten(), "flat"),
        (torch.zeros((), dtype=x.dtype), "no axes"),
    ]  # fmt: skip
    if x.dim() and x.shape[0]:
        options.append((x[0], "first axis dropped"))
    values, what = d.choice(options)
    return d.dense(values.clone()), what


def _other_length(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    if x.dim() == 0:
        return None
    axis = d.random.randrange(x.dim())
    size = x.shape[axis]
    new = d.choice([n for n in (0, 1, size - 1, size + 1, 2 * size) if n >= 0 and n != size])
    values = torch.zeros((*x.shape[:axis], new, *x.shape[axis + 1 :]), dtype=x.dtype)
    both = min(new, size)
    values.narrow(axis, 0, both).copy_(x.narrow(axis, 0, both))
    return d.dense(values), f"axis {axis} of {size} is {new} long"


def _other_strides(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    if x.dim() == 0:
        return None
    kind = d.choice(("last axis strided", "axes reversed", "expanded", "overlapping", "gaps"))
    if kind == "last axis strided":
        return d.memory.place(x, [2 * s for s in torch.empty(x.shape, device="meta").stride()]), kind
    if kind == "axes reversed":
        backwards = torch.empty(x.shape[::-1], device="meta").stride()[::-1]
        return d.memory.place(x, backwards), kind
    if kind == "gaps":
        return d.place(x.clone(), groups=0), kind
    axis = d.random.randrange(x.dim())
    strides = list(torch.empty(x.shape, device="meta").stride())
    strides[axis] = 0 if kind == "expanded" else 1
    return d.memory.place(x, strides), f"{kind} along axis {axis}"


def _misaligned(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    # What kernels do then works on the machines we know, and is no C++: a sanitizer would report little else.
    if x.element_size() == 1 or x.numel() == 0 or "undefined" in env.SANITIZE.get():
        return None
    return d.memory.place(x, torch.empty(x.shape, device="meta").stride(), odd_bytes=1), "at an odd address"


def _no_tensor(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    other: Any = d.choice((None, 1.0, "x", [1.0], ()))
    return other, "not a tensor"


def _other_values(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    if not x.dtype.is_floating_point or x.numel() == 0 or x.dtype in FP8:
        return None
    values = x.detach().clone(memory_format=torch.contiguous_format)
    special = d.choice((math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-40))
    if d.chance(0.3):
        values.fill_(special)
    else:
        values.view(-1)[d.random.randrange(values.numel())] = special
    return d.memory.place(values, x.stride()), f"holds {special}"


def _alias(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    others = [other for other in call.arguments.values()
              if isinstance(other, torch.Tensor) and other is not x and has_values(other)]  # fmt: skip
    if not others:
        return None
    other = d.choice(others)
    if other.dtype == x.dtype and other.numel() >= x.numel() and other.is_contiguous() and d.chance(0.5):
        return other.view(-1)[: x.numel()].view(x.shape), "the memory of another argument"
    return other, "another argument"


def _gradient(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    if not x.dtype.is_floating_point or x.dtype in FP8:
        return None
    return x.detach().requires_grad_(), "requires grad"


def _sparse(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    if x.dim() == 0 or x.dtype in FP8:
        return None
    return x.detach().clone().to_sparse(), "sparse"


def _freed(d: Draw, x: torch.Tensor, call: Call) -> Changed:
    if x.numel() == 0:
        return None
    x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    x.untyped_storage().resize_(0)
    return x, "freed"


_CHANGES = (
    *[_meta, _fake, _freed, _sparse, _no_tensor, _gradient, _alias, _misaligned, _other_values],
    *[_other_dtype] * 2,
    *[_other_rank] * 2,
    *[_other_length] * 3,
    *[_other_strides] * 3,
)
