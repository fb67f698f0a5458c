# SPDX-License-Identifier: Apache-2.0
"""Typed expressions, and the text that stands for them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Union

from flashinfer.errors import UnsupportedConfig

NONE = "none"  # the text of no function
INT, FLOAT, BOOL = "int", "float", "bool"
ARGUMENTS = {"score": FLOAT, "b": INT, "h": INT, "q": INT, "k": INT}
ELEMENT_TYPES = {"f32": FLOAT, "i32": INT, "bool": BOOL}
EXTRAS_BYTES = 128  # Extras in csrc/attention/params.h
# Lengths of axes that a plan knows.
SIZES = ("batch_size", "num_heads", "num_kv_heads")

# name -> types of arguments, of the result; "number" stands for int or float, the same in all of its places.
OPERATORS = {
    **dict.fromkeys(("+", "-", "*"), ("number", "number")),
    "/": (FLOAT, FLOAT),
    **dict.fromkeys(("//", "%", "<<", ">>"), (INT, INT)),
    **dict.fromkeys(("&", "|", "^"), ("bits", "bits")),
    **dict.fromkeys(("<", "<=", ">", ">=", "==", "!="), ("number", "number")),
}
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
FUNCTIONS = {
    **dict.fromkeys(("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh"), (FLOAT,)),
    "abs": ("number",),
    **dict.fromkeys(("min", "max"), ("number", "number")),
    "clamp": ("number", "number", "number"),
    "where": (BOOL, "any", "any"),
    "int": ("any",),
    "float": ("any",),
}


@dataclass(frozen=True, eq=False)
class Node:
    """op: "constant" (value), "argument" (its name), "extra" (a number's name), "load" (a tensor's name, indices), a
    key of OPERATORS or FUNCTIONS, "negative" or "not"."""

    op: str
    type: str
    args: tuple[Node, ...] = ()
    value: Union[str, int, float, bool, None] = None

    @functools.cached_property
    def size(self) -> int:
        """Of its text, about: nodes, of which one that is used twice counts twice."""
        return 1 + sum(node.size for node in self.args)

    @functools.cached_property
    def depth(self) -> int:
        return 1 + max((node.depth for node in self.args), default=0)

    def walk(self) -> Iterator[Node]:
        """This node and all below, a node that occurs twice once."""
        seen: dict[Node, None] = {}
        stack = [self]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen[node] = None
                stack.extend(reversed(node.args))
        yield from seen

    @functools.cached_property
    def arguments(self) -> frozenset[str]:
        """Of the function, on which the value depends."""
        if self.op == "argument":
            return frozenset((str(self.value),))
        return frozenset().union(*(node.arguments for node in self.args))

    @property
    def is_uniform(self) -> bool:
        """Whether it is a number of the launch: neither of a place nor read from memory."""
        return self.op in ("constant", "extra") or (
            self.op not in ("argument", "load") and all(node.is_uniform for node in self.args)
        )

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.op, self.type, self.args, self.value, self.value.__class__))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Node)
            and self._hash == other._hash
            and (self.op, self.type, self.args) == (other.op, other.type, other.args)
            and self.value.__class__ is other.value.__class__
            and repr(self.value) == repr(other.value)  # 0.0 is not -0.0
        )


def constant(value: Union[int, float, bool]) -> Node:
    return Node("constant", {bool: BOOL, int: INT, float: FLOAT}[type(value)], value=value)


@dataclass(frozen=True)
class Extra:
    """What a function declares besides its arguments.

    kind: "int" or "float", a number, or of ELEMENT_TYPES, a tensor with a text for the length of each axis: one of
    SIZES, a number, an expression of extras that are ints, or a name that stands for any length.
    """

    kind: str
    is_positive: bool = False
    shape: tuple[str, ...] = ()

    @property
    def is_tensor(self) -> bool:
        return self.kind in ELEMENT_TYPES

    @property
    def text(self) -> str:
        if not self.is_tensor:
            return self.kind + (" > 0" if self.is_positive else "")
        return f"{self.kind}[{', '.join(self.shape)}]"

    def places(self, offset: int) -> tuple[int, int]:
        """Where in Extras it begins, and ends."""
        if not self.is_tensor:
            return offset, offset + 4
        offset = -(-offset // 8) * 8
        return offset, offset + 8 + 4 * (2 * len(self.shape) - 1)


_NO_NAMES: dict[str, str] = {}


@dataclass(frozen=True)
class Variants:
    """At most one function of scores and one of masks, with what both declare. Names of extras are of one space."""

    extras: Mapping[str, Extra]
    score: Union[Node, None] = None
    sees: Union[Node, None] = None
    first_key: Union[Node, None] = None  # declared bounds of the mask, beyond which nothing is seen
    last_key: Union[Node, None] = None
    renamed: Mapping[str, str] = field(default_factory=dict)  # names of extras -> those that they had before

    @staticmethod
    def of(extras: Mapping[str, Extra], parts: Mapping[str, Node], renamed: Mapping[str, str] = _NO_NAMES) -> Variants:
        """The inverse of `parts`."""
        score, sees, first, last = (parts.get(name) for name in ("score", "sees", "first_key", "last_key"))
        return Variants(extras, score, sees, first, last, renamed)

    @property
    def parts(self) -> dict[str, Node]:
        found = {"score": self.score, "sees": self.sees, "first_key": self.first_key, "last_key": self.last_key}
        return {name: node for name, node in found.items() if node is not None}

    @functools.cached_property
    def text(self) -> str:
        declared = [f"{name}: {extra.text}" for name, extra in self.extras.items()]
        return "; ".join([*declared, *(f"{name} = {show(node)}" for name, node in self.parts.items())])

    def canonical(self) -> Variants:
        """The same with extras named in the order in which they occur, without those that do not, and with the names of
        lengths that nothing depends on left out."""
        order: dict[str, str] = {}
        for part in self.parts.values():
            for node in part.walk():
                if node.op in ("extra", "load"):
                    order.setdefault(str(node.value), f"x{len(order)}")
        extras = {}
        for old, new in order.items():
            extra = self.extras[old]
            # What the code depends on: an index h or b needs no check where the axis has that length.
            shape = tuple(length if length in ("num_heads", "batch_size") else "_" for length in extra.shape)
            extras[new] = Extra(extra.kind, extra.is_positive, shape)
        parts = {name: _rename(node, order) for name, node in self.parts.items()}
        return Variants.of(extras, parts, {new: old for old, new in order.items()})

    def layout(self) -> dict[str, int]:
        """Where in Extras each is. Raises UnsupportedConfig where they do not fit."""
        offsets, end = {}, 0
        for name, extra in self.extras.items():
            offsets[name], end = extra.places(end)
        if end > EXTRAS_BYTES:
            raise UnsupportedConfig(
                f"the extras of these functions take {end} bytes of a launch; expected at most {EXTRAS_BYTES}: 4 a "
                "number, 12 to 28 a tensor of one to three axes. Next step: put several tensors into one"
            )
        return offsets


def joined(parts: Mapping[str, Variants]) -> Variants:
    """Of several, whose extras get the key as a prefix."""
    extras = {f"{key}.{name}": extra for key, one in parts.items() for name, extra in one.extras.items()}
    nodes = {}
    for key, one in parts.items():
        names = {name: f"{key}.{name}" for name in one.extras}
        nodes.update({part: _rename(node, names) for part, node in one.parts.items()})
    return Variants.of(extras, nodes)


def _rename(node: Node, names: Mapping[str, str]) -> Node:
    value = names[str(node.value)] if node.op in ("extra", "load") else node.value
    return Node(node.op, node.type, tuple(_rename(arg, names) for arg in node.args), value)


def show(node: Node) -> str:
    """As Python of the grammar, whose parse is the node."""
    args = [show(arg) for arg in node.args]
    if node.op == "constant":
        return "inf" if node.value == math.inf else repr(node.value)
    if node.op == "argument":
        return str(node.value)
    if node.op == "extra":
        return f"x.{node.value}"
    if node.op == "load":
        return f"x.{node.value}[{', '.join(args)}]"
    if node.op == "negative":
        return f"(-{args[0]})"
    if node.op == "not":
        return f"(~{args[0]})"
    if node.op in OPERATORS:
        return f"({args[0]} {node.op} {args[1]})"
    return f"{node.op}({', '.join(args)})"
