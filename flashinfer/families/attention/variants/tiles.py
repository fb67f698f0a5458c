# SPDX-License-Identifier: Apache-2.0
"""From a mask to C++ that bounds it over a tile of queries and keys: full, empty, or neither is proved.

One call of csrc/attention/function_tile.cuh for each node, which says what an integer is between, and whether a
condition holds everywhere or nowhere. What does not depend on a place in the tile is computed as it stands; of what
does, comparisons of affine functions are decided exactly, all else soundly. Of a tensor, the entries that the tile
reads are looked at where they are few; nothing is known of floats.
"""

from __future__ import annotations

from typing import Optional, Protocol

from flashinfer.families.attention.variants.tree import BOOL, COMPARISONS, FLOAT, INT, Node

_TYPES = {INT: "tile::Affine", BOOL: "tile::Truth"}
_AXES = {"h": "tile::qo_head_idx(at)", "q": "tile::q(at)", "k": "tile::k(at)"}
_SUMS = ("+", "-", "negative", "not")
_OF_ENDS = {"//": "floor_divide", "%": "modulo", "min": "min", "max": "max", "clamp": "clamp", "abs": "abs"}
_OF_POINTS = {"&": "&", "|": "|", "^": "^", "<<": "function::shift_left", ">>": "function::shift_right"}
_POSITION, _INT = (1 << 28) - 1, 1 << 31  # farthest from zero: TileAt::is_near(); any other integer


class Scalars(Protocol):
    """Statements of what is the same all over the tile, to which those of this module are added."""

    lines: list[str]

    def value(self, node: Node) -> str: ...
    def load(self, node: Node, indices: list[str]) -> str: ...
    def address(self, node: Node, indices: list[str]) -> str: ...
    def length(self, node: Node) -> str: ...


_MOST_LOOKS_BY_KEYS = 2  # of which what they find is remembered


def proof(scalars: Scalars, sees: Node, looks_at_entries: bool = True) -> tuple[Optional[str], int]:
    """What the queries of a tile see, an expression, and how many looks at entries depend on keys alone. None where
    neither full nor empty can ever be proved, or not without a look at several entries of a tensor."""
    writer = _Writer(scalars, looks_at_entries)
    found = writer.value(sees)
    return found and f"{found}.seen()", writer.num_looks_by_keys


class _Writer:
    """Values are names, or expressions without cost; None of what nothing is known of, whatever the tile."""

    def __init__(self, scalars: Scalars, looks_at_entries: bool) -> None:
        self._scalars, self._looks_at_entries = scalars, looks_at_entries
        self._names: dict[Node, Optional[str]] = {}
        self._ends: dict[Node, str] = {}
        self.num_looks_by_keys = 0

    def value(self, node: Node) -> Optional[str]:
        """Of a bool a Truth, of an int an Affine."""
        if node.type == FLOAT:
            return None
        if node not in self._names:
            text = self._text(node)
            self._names[node] = text and self._named(_TYPES[node.type], text)
        return self._names[node]

    def _named(self, kind: str, text: str) -> str:
        name = f"t{len(self._scalars.lines)}"
        self._scalars.lines.append(f"const {kind} {name} = {text};")
        return name

    def _text(self, node: Node) -> Optional[str]:
        if _is_everywhere(node):
            return f"tile::everywhere({self._scalars.value(node)})"
        if node.op == "argument":
            return _AXES[str(node.value)]
        if node.op == "load":
            return self._load(node)
        if node.op in COMPARISONS:
            return self._comparison(node)
        if node.op == "where":
            return self._where(node)
        if node.type == BOOL:
            return self._condition(node)
        if node.op == "int":
            condition = self.value(node.args[0])
            return condition and f"tile::to_int({condition})"
        if node.op == "*":
            return self._product(node)
        if node.op in _SUMS:
            return self._sum(node)
        return self._of_ends(node)

    def _sum(self, node: Node) -> Optional[str]:
        args = [self.value(arg) for arg in node.args]
        if None in args or not _is_held(node):
            return None
        if node.op == "not":
            return f"tile::everywhere(-1) - {args[0]}"
        return f"-{args[0]}" if node.op == "negative" else f"{args[0]} {node.op} {args[1]}"

    def _product(self, node: Node) -> Optional[str]:
        if not _is_held(node):
            return None
        a, b = node.args if _is_everywhere(node.args[1]) else node.args[::-1]
        if _is_everywhere(b):
            value = self.value(a)
            return value and f"{value} * {self._scalars.value(b)}"
        ends = [self._ends_of(arg) for arg in node.args]
        return None if None in ends else f"tile::multiply({ends[0]}, {ends[1]})"

    def _of_ends(self, node: Node) -> Optional[str]:
        ends = [self._ends_of(arg) for arg in node.args]
        if None in ends:
            return None
        if node.op in _OF_ENDS:
            return f"tile::{_OF_ENDS[node.op]}({', '.join(map(str, ends))})"
        a, b = ends
        op = _OF_POINTS[node.op]
        exact = f"{op}({a}.low, {b}.low)" if "::" in op else f"{a}.low {op} {b}.low"
        return f"{a}.is_point() && {b}.is_point() ? tile::everywhere({exact}) : tile::Affine::unknown()"

    def _comparison(self, node: Node) -> Optional[str]:
        a, b = (self.value(arg) for arg in node.args)
        if a is None or b is None:
            return None
        fit = str(all(map(_fits, node.args))).lower()
        if node.op in ("==", "!="):
            return f"{'!' * (node.op == '!=')}tile::is_equal<{fit}>({a}, {b}, at)"
        if node.op in (">", "<="):
            a, b = b, a
        return f"{'!' * (node.op in ('<=', '>='))}tile::is_less<{fit}>({a}, {b}, at)"

    def _condition(self, node: Node) -> Optional[str]:
        args = [self.value(arg) for arg in node.args]
        if node.op == "not":
            return args[0] and f"!{args[0]}"
        if args == [None, None] or (node.op == "^" and None in args):
            return None
        a, b = (arg or "tile::Truth::unknown()" for arg in args)
        return f"{a} {node.op} {b}"

    def _where(self, node: Node) -> Optional[str]:
        unknown = "tile::Truth::unknown()"
        condition, *either = (self.value(arg) if arg.type == BOOL else self._ends_of(arg) for arg in node.args)
        if either == [None, None]:
            return None
        if node.type == INT:
            unknown = "tile::Ends::unknown()"
        a, b = (arg or unknown for arg in either)
        return f"tile::where({condition or 'tile::Truth::unknown()'}, {a}, {b})"

    def _load(self, node: Node) -> Optional[str]:
        """What the entries are between that the tile reads."""
        moving = list(dict.fromkeys(index for index in node.args if not _is_everywhere(index)))
        ends = [self._ends_of(index) for index in moving]
        if not self._looks_at_entries and any(map(_moves_with_key, moving)):
            return None
        if None in ends or len(moving) > 2:
            return None
        names = dict(zip(reversed(moving), ("column", "row")))
        places = [names.get(index) or self._scalars.value(index) for index in node.args]
        rows, columns = ["tile::Ends{0, 0}", *map(str, ends)][-2:]
        if node.args[-1] == moving[-1] and node.args.count(moving[-1]) == 1:  # side by side
            row = f"[&](int32_t row) {{ return {self._scalars.address(node, places[:-1])}; }}"
            look = f"tile::entries_between({rows}, {columns}, at, {self._scalars.length(node)}, {row})"
        else:
            read = f"[&](int32_t row, int32_t column) {{ return {self._scalars.load(node, places)}; }}"
            look = f"tile::entries_between({rows}, {columns}, at, {read})"
        if node.arguments <= {"b", "k"} and self.num_looks_by_keys < _MOST_LOOKS_BY_KEYS:
            look = f"at.template of_keys<{self.num_looks_by_keys}>([&] {{ return {look}; }})"
            self.num_looks_by_keys += 1
        return f"tile::over({look})"

    def _ends_of(self, node: Node) -> Optional[str]:
        value = self.value(node)
        if value is not None and node not in self._ends:
            self._ends[node] = self._named("tile::Ends", f"tile::ends_of<{str(_fits(node)).lower()}>({value}, at)")
        return self._ends.get(node)


def _is_everywhere(node: Node) -> bool:
    return not node.arguments - {"b"}


def _moves_with_key(node: Node) -> bool:
    """From one key to the next, in all but odd cases."""
    if node.op == "argument":
        return node.value == "k"
    return node.op in (*_SUMS, "*") and any(map(_moves_with_key, node.args))


def _reach(node: Node) -> tuple[int, int]:
    """How far from zero it may be, as sums and products are before they wrap around, and how far one end of the tile
    from the other."""
    if node.op == "argument" and node.value != "b":
        return _POSITION, 2 * _POSITION
    if node.op == "constant":
        return abs(int(node.value or 0)), 0
    if not _is_sum_or_product(node):
        return _INT, 0
    reaches = [_reach(arg) for arg in node.args]
    if node.op != "*":
        return sum(reach for reach, _ in reaches) + (node.op == "not"), sum(steps for _, steps in reaches)
    (a, steps_a), (b, steps_b) = reaches
    if any(map(_is_everywhere, node.args)):
        return a * b, max(steps_a * b, steps_b * a)
    return min(a, _INT) * min(b, _INT), 0


def _is_sum_or_product(node: Node) -> bool:
    return node.op in (*_SUMS, "*") and not _is_everywhere(node)


def _is_held(node: Node) -> bool:
    """By 64 bits, with all that its ends are the sum of."""
    return sum(_reach(node)) < 1 << 63


def _fits(node: Node) -> bool:
    """Whether it is known not to wrap around."""
    return _reach(node)[0] < _INT or not _is_sum_or_product(node)
