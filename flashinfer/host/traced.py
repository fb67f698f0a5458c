# SPDX-License-Identifier: Apache-2.0
"""Doors for torch.compile: library operators that a traced call goes through, so that a graph holds it as one node.

A library operator takes tensors and plain values. What our functions take beyond these, a tensor or a number, a cache
of one tensor or two, is a `Bundle`: declared once, taken apart on the traced side of a door, put together on the other.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Union

import torch

is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # two look-ups less in every call

# Held for the life of the process: what a Library defines disappears with it.
_library = torch.library.Library("flashinfer", "FRAGMENT")


class Bundle(NamedTuple):
    """One value of a function as several arguments of an operator.

    parts   their schema, `{}` standing for the argument's name, `(!)` for the mark of a tensor that is written
    split   value -> one value for each part
    join    the inverse
    """

    parts: tuple[str, ...]
    split: Callable[[Any], Sequence[Any]]
    join: Callable[..., Any]

    def written(self) -> Bundle:
        """The same of tensors that the operator writes."""
        return self._replace(parts=tuple(part.replace("Tensor", "Tensor(!)") for part in self.parts))


def _tensor_or_number(value: Any) -> tuple[Any, Any]:
    return (value, None) if isinstance(value, torch.Tensor) else (None, value)


def _either(tensor: Any, number: Any) -> Any:
    return number if tensor is None else tensor


REAL = Bundle(("Tensor? {}", "float? {}_value"), _tensor_or_number, _either)  # a tensor, a float or None
INTEGER = Bundle(("Tensor? {}", "int? {}_value"), _tensor_or_number, _either)
TENSORS = Bundle(  # one tensor or a pair, such as a paged cache
    ("Tensor {}", "Tensor? {}_second"),
    lambda value: (value, None) if isinstance(value, torch.Tensor) else value,
    lambda first, second: first if second is None else (first, second),
)


def together(*parts: str) -> Bundle:
    """A tuple, by the schema of each of its items."""
    return fields(lambda *values: values, *parts)


def fields(of: Callable[..., Any], *parts: str) -> Bundle:
    """A tuple, made by `of`, by the schema of each of its fields."""
    return Bundle(parts, lambda value: value, of)


def door(name: str, eager: Callable[..., object], arguments: Mapping[str, Union[str, Bundle]]) -> Callable[..., None]:
    """Define `torch.ops.flashinfer.<name>` and return the function that a traced call goes through.

    Only a traced call does (`if torch.compiler.is_dynamo_compiling()`), so that eager calls stay lean. `eager` and the
    door take the same values in the order of `arguments`, each a type of PyTorch's operator schemas ("Tensor",
    "float?", "Tensor(!)" for one that is written) or a Bundle. An operator returns nothing: its traced caller
    allocates results, so that shapes need no second description in a fake kernel.
    """
    kinds = [
        Bundle((f"{kind} {{}}",), lambda value: (value,), lambda value: value) if isinstance(kind, str) else kind
        for kind in arguments.values()
    ]
    parts = [part.format(argument) for argument, kind in zip(arguments, kinds) for part in kind.parts]
    letters = iter(string.ascii_lowercase)
    parts = [part.replace("(!)", f"({next(letters)}!)") if "(!)" in part else part for part in parts]
    ends = list(itertools.accumulate(len(kind.parts) for kind in kinds))
    spans = list(zip(kinds, [0, *ends], ends))

    def run(*given: Any) -> None:
        eager(*(kind.join(*given[begin:end]) for kind, begin, end in spans))

    _library.define(f"{name}({', '.join(parts)}) -> ()")
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashinfer::{name}", lambda *args, **kwargs: None, lib=_library)
    operator = getattr(torch.ops.flashinfer, name).default
    splits = [kind.split for kind in kinds]

    def enter(*values: Any) -> None:
        operator(*[part for split, value in zip(splits, values) for part in split(value)])

    return enter
