# SPDX-License-Identifier: Apache-2.0
"""From trees to C++: the struct that kernels know as Config::Function (csrc/attention/function.cuh)."""

from __future__ import annotations

import functools
import math
import re
import struct

from flashinfer.families.attention.variants import tiles
from flashinfer.families.attention.variants.parse import read
from flashinfer.families.attention.variants.ranges import KeyRange, range_of
from flashinfer.families.attention.variants.tree import BOOL, FLOAT, FUNCTIONS, INT, NONE, Node, Variants, constant
from flashinfer.jit.spec import CxxMember, CxxType

_TYPES = {INT: "int32_t", FLOAT: "float", BOOL: "bool"}
_ELEMENTS = {"f32": "float", "i32": "int32_t", "bool": "uint8_t"}
_INT_FUNCTIONS = {
    "+": "add", "-": "subtract", "*": "multiply", "//": "floor_divide", "%": "modulo", "<<": "shift_left",
    ">>": "shift_right",
}  # fmt: skip
_PLACES = {"b": "request_idx", "h": "qo_head_idx", "q": "q", "k": "k"}
_QK, _SM_SCALE = Node("qk", FLOAT), Node("sm_scale", FLOAT)


def function_of(text: str) -> dict[str, CxxType | CxxMember]:
    """The constant of a Config that holds the functions of a canonical text."""
    if text == NONE:
        return {"Function": CxxType("NoFunction")}
    return {"Function": _member(text)}


def has_range(text: str) -> bool:
    """Whether it leaves tiles out: a planner then asks it which."""
    found = _range(text)
    return found.first is not None or found.last is not None


def has_begin(text: str) -> bool:
    return _range(text).first is not None


def has_holes(text: str) -> bool:
    return _range(text).holes is not None


def has_gap(text: str) -> bool:
    """Whether tiles between others are left out."""
    return _range(text).gap is not None


def proves_tiles(text: str) -> bool:
    """Whether of keys that may be hidden inside of the range whole tiles may be proved seen, or hidden."""
    return "kProvesTiles" in function_of(text)["Function"]


def num_looks_by_keys(text: str) -> int:
    """Of a proof, those at entries that keys alone lead to."""
    found = re.search(r"kNumLooksByKeys = (\d+)", str(function_of(text)["Function"]))
    return int(found[1]) if found else 0


def changes_scores(text: str) -> bool:
    """Whether more happens to a score than a range of keys asks for."""
    return has_holes(text) or read(text).score is not None


@functools.lru_cache(maxsize=256)
def num_operations(text: str) -> int:
    """Of a score and of a key that may be hidden, about."""
    parts = (read(text).score, _range(text).holes)
    return sum(sum(1 for node in part.walk() if node.args) for part in parts if part is not None)


@functools.lru_cache(maxsize=256)
def _range(text: str) -> KeyRange:
    return range_of(read(text))


@functools.lru_cache(maxsize=256)
def _member(text: str) -> CxxMember:
    variants, found = read(text), _range(text)
    lines = ["struct Function : flashinfer::NoFunction {"]
    flags = {
        "kHasScore": variants.score is not None,
        "kHasBegin": found.first is not None,
        "kHasEnd": found.last is not None,
        "kHasHoles": found.holes is not None,
        "kHasGap": found.gap is not None,
    }
    lines += [f"  static constexpr bool {name} = true;" for name, is_set in flags.items() if is_set]
    if variants.score is not None:
        factors = _Factors.of(variants.score)
        scale, rest = factors.pulled_out(variants)
        lines += _function(variants, "float scale(const Extras& x, float sm_scale)", scale, "")
        arguments = "const Extras& x, float sm_scale, float qk, const ScoreAt& at"
        lines += _function(variants, f"float score({arguments})", rest, "at.")
    if found.holes is not None:
        lines += _function(variants, "bool sees(const Extras& x, const ScoreAt& at)", found.holes, "at.")
        lines += _proof(variants, found.holes)
    last_before_gap, first_behind_gap = found.gap or (None, None)
    ends = {"first_key": found.first, "last_key": found.last}
    for name, end in {**ends, "last_before_gap": last_before_gap, "first_behind_gap": first_behind_gap}.items():
        if end is not None:
            lines += _function(variants, f"int32_t {name}(const Extras& x, int32_t request_idx, int32_t q)", end, "")
    return CxxMember("\n".join(f"  {line}" for line in [*lines, "};"]))


def _function(variants: Variants, signature: str, node: Node, at: str) -> list[str]:
    writer = _Writer(variants, at)
    result = writer.value(node)
    return _defined(signature, [*writer.lines, f"return {result};"])


def _proof(variants: Variants, sees: Node) -> list[str]:
    writer = _Writer(variants, "at.")
    result, num_looks_by_keys = tiles.proof(writer, sees)
    if result is None:
        return []
    statements = ["if (!at.is_near()) return kSeesSome;", *writer.lines, f"return {result};"]
    by_entries = tiles.proof(_Writer(variants, "at."), sees, looks_at_entries=False)[0] is None
    return [
        "  static constexpr bool kProvesTiles = true;",
        *["  static constexpr bool kProvesByEntries = true;"] * by_entries,
        *[f"  static constexpr int kNumLooksByKeys = {num_looks_by_keys};"] * (num_looks_by_keys > 0),
        "  template <class At>",
        *_defined("Seen sees_tile(const Extras& x, const At& at)", statements),
    ]


def _defined(signature: str, statements: list[str]) -> list[str]:
    kind, _, rest = re.sub(r"Extras|ScoreAt|TileAt|Seen|int32_t", r"flashinfer::\g<0>", signature).partition(" ")
    body = [f"  {line}" for line in ["using namespace flashinfer;", *statements]]
    return [f"  FLASHINFER_FN static {kind} {rest} {{", *(f"  {line}" for line in body), "  }"]


class _Writer:
    """Statements, one a node, so that what occurs twice is computed once."""

    def __init__(self, variants: Variants, at: str) -> None:
        self._extras, self._offsets, self._at = variants.extras, variants.layout(), at
        self._names: dict[Node, str] = {}
        self.lines: list[str] = []

    def value(self, node: Node) -> str:
        """An expression without side effects or cost."""
        if node.op == "constant":
            return _literal(node)
        if node.op == "argument" and node.value != "score":
            return f"{self._at}{_PLACES[str(node.value)]}"
        if node.op in ("qk", "sm_scale"):
            return node.op
        if node not in self._names:
            text = self._text(node)
            name = self._names[node] = f"v{len(self._names)}"
            self.lines.append(f"const {_TYPES[node.type]} {name} = {text};")
        return self._names[node]

    def _text(self, node: Node) -> str:
        if node.op == "extra":
            return f"x.at<{_TYPES[node.type]}>({self._offsets[str(node.value)]})"
        if node.op == "load":
            return self.load(node, [self.value(index) for index in node.args])
        if node.op in ("*", "/", "argument") and node.type == FLOAT:
            return _Factors.of(node).text(self)
        args = [self.value(arg) for arg in node.args]
        if node.op == "float":
            return f"{args[0]} ? 1.f : 0.f" if node.args[0].type == BOOL else f"float({args[0]})"
        if node.op == "int":
            return f"int32_t({args[0]})" if node.args[0].type == BOOL else f"function::to_int({args[0]})"
        if node.op == "where":
            return f"{args[0]} ? {args[1]} : {args[2]}"
        if node.op == "clamp":
            return f"function::min(function::max({args[0]}, {args[1]}), {args[2]})"
        if node.op == "negative":
            return f"function::subtract(0, {args[0]})" if node.type == INT else f"-{args[0]}"
        if node.op == "not":
            return f"!{args[0]}" if node.type == BOOL else f"~{args[0]}"
        if node.op in FUNCTIONS:
            return f"function::{node.op}({', '.join(args)})"
        if node.op in ("//", "%") and node.args[1].op == "constant" and _is_power_of_two(node.args[1].value):
            power = int(node.args[1].value or 1)
            return f"({args[0]} >> {power.bit_length() - 1})" if node.op == "//" else f"({args[0]} & {power - 1})"
        if node.type == INT and node.op in _INT_FUNCTIONS:
            return f"function::{_INT_FUNCTIONS[node.op]}({args[0]}, {args[1]})"
        # & and | of bools as of ints: both sides are there, and a branch would cost more than either.
        return f"({args[0]} {node.op} {args[1]})"

    def load(self, node: Node, indices: list[str]) -> str:
        """An entry of a tensor, where the indices have been computed."""
        read_it = f"function::read({self.address(node, indices)})"
        return f"{read_it} != 0" if node.type == BOOL else read_it

    def length(self, node: Node) -> str:
        """Of the last axis of a tensor."""
        name = str(node.value)
        return f"x.at<int32_t>({-(-self._offsets[name] // 8) * 8 + 8 + 4 * (len(self._extras[name].shape) - 1)})"

    def address(self, node: Node, indices: list[str]) -> str:
        """Of an entry; of as many axes as there are indices."""
        name = str(node.value)
        extra, offset = self._extras[name], -(-self._offsets[name] // 8) * 8
        num_axes, terms = len(extra.shape), []
        for axis, (index, text, length) in enumerate(zip(node.args, indices, extra.shape)):
            if not _is_within(index, length):
                text = f"function::inside({text}, x.at<int32_t>({offset + 8 + 4 * axis}))"
            else:
                text = f"uint32_t({text})"
            if axis + 1 < num_axes:
                text = f"{text} * x.at<uint32_t>({offset + 8 + 4 * (num_axes + axis)})"
            terms.append(text)
        element = _ELEMENTS[extra.kind]
        return f"x.at<const {element}*>({offset}) + ({' + '.join(terms) or 0})"


def _is_within(index: Node, length: str) -> bool:
    """A request or head is always one of the plan's, whose number is the axis's length."""
    return index.op == "argument" and (index.value, length) in (("h", "num_heads"), ("b", "batch_size"))


def _is_power_of_two(value: object) -> bool:
    return isinstance(value, int) and value > 0 and value & (value - 1) == 0


class _Factors:
    """A product of floats, taken apart: those that are the same for the whole launch are multiplied first, once."""

    def __init__(self, above: list[Node], below: list[Node]) -> None:
        self.above, self.below = above, below

    @staticmethod
    def of(node: Node) -> _Factors:
        if node.op == "*" and node.type == FLOAT:
            a, b = (_Factors.of(arg) for arg in node.args)
            return _Factors(a.above + b.above, a.below + b.below)
        if node.op == "/":
            above = _Factors.of(node.args[0])
            return _Factors(above.above, [*above.below, node.args[1]])
        if node.op == "argument" and node.value == "score":
            return _Factors([_SM_SCALE, _QK], [])
        return _Factors([node], [])

    def pulled_out(self, variants: Variants) -> tuple[Node, Node]:
        """Factors of the launch that are positive, for the exponent, and the product of all others."""
        scale = _Factors([n for n in self.above if _is_positive(n, variants)], [])
        scale.below = [n for n in self.below if _is_positive(n, variants)]
        rest = _Factors(
            [n for n in self.above if n not in scale.above], [n for n in self.below if n not in scale.below]
        )
        return scale.node(), rest.node()

    def node(self) -> Node:
        found = functools.reduce(_times, self.above) if self.above else constant(1.0)
        return functools.reduce(_over, self.below, found)

    def text(self, writer: _Writer) -> str:
        once = [writer.value(node) for node in self.above if _is_uniform(node)]
        once_below = [writer.value(node) for node in self.below if _is_uniform(node)]
        each = [writer.value(node) for node in self.above if not _is_uniform(node)]
        each_below = [writer.value(node) for node in self.below if not _is_uniform(node)]
        if once_below:
            once.append(f"(1.f / ({' * '.join(once_below)}))")
        if once and each and len(once) > 1:
            once = [f"({' * '.join(once)})"]
        text = " * ".join([*once, *each]) or "1.f"
        return f"function::divide({text}, {' * '.join(each_below)})" if each_below else text


def _times(a: Node, b: Node) -> Node:
    return Node("*", FLOAT, (a, b))


def _over(a: Node, b: Node) -> Node:
    return Node("/", FLOAT, (a, b))


def _is_uniform(node: Node) -> bool:
    return node is _SM_SCALE or (node is not _QK and node.is_uniform)


def _is_positive(node: Node, variants: Variants) -> bool:
    if node is _SM_SCALE:
        return True
    if node.op == "extra":
        return variants.extras[str(node.value)].is_positive
    if node.op == "float" and node.args[0].op == "extra":
        return _is_positive(node.args[0], variants)
    return node.op == "constant" and 0 < float(node.value or 0) < math.inf


def _literal(node: Node) -> str:
    value = node.value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"int32_t({value})" if value > -(1 << 31) else "int32_t(-2147483647 - 1)"
    assert isinstance(value, float)
    try:
        single: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        single = math.copysign(math.inf, value)
    if math.isinf(single):
        return "(-kMinusInfinity)" if single > 0 else "kMinusInfinity"
    return f"({single!r}f)" if single < 0 else f"{single!r}f"
