# SPDX-License-Identifier: Apache-2.0
"""Which part of a mask is a range of keys: tiles outside of it are left out, and those inside need no masking.

A comparison whose sides differ by the key's position and something else, k <= q + x.n say, is one end of a range, if
that end does not fall from one query to the next and is the same for all heads. So are & of such ends, and | of two
ends of one kind. Under | of two parts the keys behind the end of the one and before the begin of the other are a gap,
as between the first tokens and a window: tiles inside of it are left out as well. What else a mask consists of are
holes, of which tile by tile is proved what can be (tiles.py). A range and a gap need no visit to a tile: planners count
on the one, and a request of a million keys has sixteen thousand tiles beyond a window.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention.variants.tree import BOOL, COMPARISONS, INT, Node, Variants, constant

_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
_ZERO, _ONE = constant(0), constant(1)


class KeyRange(NamedTuple):
    """The first and the last key that may be seen, of b and q, and the condition on those between; None: no such. gap:
    the last key before it and the first one behind, which where there are no holes is all that is hidden."""

    first: Optional[Node] = None
    last: Optional[Node] = None
    holes: Optional[Node] = None
    gap: Optional[tuple[Node, Node]] = None


def range_of(variants: Variants) -> KeyRange:
    """Of the mask and its declared bounds. Raises UnsupportedConfig for bounds that fall from query to query."""
    found = KeyRange() if variants.sees is None else _of(variants.sees, variants)
    first, last = found.first, found.last
    for name, bound in (("first", variants.first_key), ("last", variants.last_key)):
        if bound is not None and _slope(bound, variants) == -1:
            raise UnsupportedConfig(
                f"bounds: the {name} key falls from one query to the next; expected bounds that stay or rise with q"
            )
    if variants.first_key is not None and not _is_at_most_zero(variants.first_key):
        first = variants.first_key if first is None else _make("max", first, variants.first_key)
    if variants.last_key is not None:
        last = variants.last_key if last is None else _make("min", last, variants.last_key)
    return KeyRange(first, last, found.holes, found.gap)


def _of(node: Node, variants: Variants) -> KeyRange:
    if node.op == "&":
        a, b = (_of(arg, variants) for arg in node.args)
        if [a.gap, b.gap, a.holes, b.holes].count(None) < 3:  # of two gaps one is kept, and beside holes no gap is all
            a, b = (
                part._replace(holes=arg) if part.gap is not None and part.holes is None else part
                for part, arg in zip((a, b), node.args)
            )
        return KeyRange(
            _joined("max", a.first, b.first), _joined("min", a.last, b.last), _joined("&", a.holes, b.holes),
            a.gap or b.gap,
        )  # fmt: skip
    if node.op == "|":
        a, b = (_of(arg, variants) for arg in node.args)
        if a.holes is b.holes is None and a.gap is b.gap is None:
            if a.first is b.first is None and a.last is not None and b.last is not None:
                return KeyRange(last=_make("max", a.last, b.last))
            if a.last is b.last is None and a.first is not None and b.first is not None:
                return KeyRange(first=_make("min", a.first, b.first))
        return _of_either(node, a, b)
    if node.op == "not":
        negated = _negation(node.args[0])
        if negated is not None:
            return _of(negated, variants)
    if node.op in COMPARISONS and node.op != "!=" and node.args[0].type == INT:
        found = _ends(node, variants)
        if found is not None:
            return found
    return KeyRange(holes=node)


def _of_either(node: Node, a: KeyRange, b: KeyRange) -> KeyRange:
    """Of a | b, which stays to be looked at unless it is the ends of a gap alone."""
    first = None if a.first is None or b.first is None else _make("min", a.first, b.first)
    last = None if a.last is None or b.last is None else _make("max", a.last, b.last)
    gaps = [(one.last, other.first) for one, other in ((a, b), (b, a)) if one.last and other.first]
    # Where either may be the one before, that which ends at the same key for all queries, or the first as written.
    gaps.sort(key=lambda gap: "q" in gap[0].arguments)
    is_gap_alone = any(
        one.last and other.first and one == KeyRange(last=one.last) and other == KeyRange(first=other.first)
        for one, other in ((a, b), (b, a))
    )
    return KeyRange(first, last, None if is_gap_alone else node, gaps[0] if gaps else None)


def _joined(op: str, a: Optional[Node], b: Optional[Node]) -> Optional[Node]:
    return a if b is None else b if a is None else _make(op, a, b)


def _make(op: str, a: Node, b: Node) -> Node:
    return a if a == b else Node(op, a.type, (a, b))


def _negation(node: Node) -> Optional[Node]:
    if node.op in _NEGATED and node.args[0].type == INT:
        return Node(_NEGATED[node.op], BOOL, node.args)
    if node.op == "not":
        return node.args[0]
    if node.op in ("&", "|") and node.type == BOOL:
        return Node("|" if node.op == "&" else "&", BOOL, tuple(Node("not", BOOL, (arg,)) for arg in node.args))
    return None


def _ends(node: Node, variants: Variants) -> Optional[KeyRange]:
    """k + rest OP 0, or -k + rest OP 0."""
    split = _split(Node("-", INT, node.args))
    if split is None or split[0] not in (1, -1) or split[1].arguments - {"b", "q"}:
        return None
    sign, rest = split
    at = _minus(_ZERO, rest) if sign == 1 else rest  # k OP at
    op = node.op if sign == 1 else {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(node.op, node.op)
    if _slope(at, variants) not in (0, 1):
        return None
    if op == "==":
        return KeyRange(at, at)
    if op in (">", ">="):
        first = at if op == ">=" else _plus(at, _ONE)
        return KeyRange() if _is_at_most_zero(first) else KeyRange(first=first)
    return KeyRange(last=at if op == "<=" else _minus(at, _ONE))


def _split(node: Node) -> Optional[tuple[int, Node]]:
    """How often k is in it, and what is left without: node = count * k + rest."""
    if "k" not in node.arguments:
        return 0, node
    if node.op == "argument":
        return 1, _ZERO
    parts = [_split(arg) for arg in node.args]
    if node.op in ("+", "-") and parts[0] is not None and parts[1] is not None:
        (m, a), (n, b) = parts[0], parts[1]
        return (m + n, _plus(a, b)) if node.op == "+" else (m - n, _minus(a, b))
    if node.op == "negative" and parts[0] is not None:
        return -parts[0][0], _minus(_ZERO, parts[0][1])
    return None


def _number(node: Node) -> Optional[int]:
    return node.value if node.op == "constant" and isinstance(node.value, int) else None


def _plus(a: Node, b: Node) -> Node:
    m, n = _number(a), _number(b)
    if m is not None and n is not None:
        return constant(m + n)
    return b if m == 0 else a if n == 0 else Node("+", INT, (a, b))


def _minus(a: Node, b: Node) -> Node:
    m, n = _number(a), _number(b)
    if m is not None and n is not None:
        return constant(m - n)
    if n == 0:
        return a
    if m == 0 and b.op == "-":
        return _minus(b.args[1], b.args[0])
    if m == 0 and b.op == "negative":
        return b.args[0]
    return Node("negative", INT, (b,)) if m == 0 else Node("-", INT, (a, b))


def _is_at_most_zero(node: Node) -> bool:
    number = _number(node)
    return number is not None and number <= 0


def _is_positive(node: Node, variants: Variants) -> bool:
    if node.op == "extra":
        return variants.extras[str(node.value)].is_positive
    number = _number(node)
    return number is not None and number > 0


def _slope(node: Node, variants: Variants) -> Optional[int]:
    """1: it stays or rises from query to query, -1: it stays or falls, 0: it stays; None: unknown."""
    if "q" not in node.arguments:
        return 0
    if node.op == "argument":
        return 1
    slopes = [_slope(arg, variants) for arg in node.args]
    if node.op == "negative" and slopes[0] is not None:
        return -slopes[0]
    if node.op == "-" and slopes[1] is not None:
        slopes[1] = -slopes[1]
    if node.op in ("+", "-", "min", "max", "clamp"):
        found = set(slopes) - {0}
        return found.pop() if len(found) == 1 else None
    if node.op == "*":
        for slope, factor in zip(slopes, reversed(node.args)):
            if slope is not None and _is_positive(factor, variants):
                return slope
    if node.op == "//" and _is_positive(node.args[1], variants):
        return slopes[0]
    return None
