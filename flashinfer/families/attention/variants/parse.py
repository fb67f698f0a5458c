# SPDX-License-Identifier: Apache-2.0
"""From Python's syntax to typed trees. What is outside the grammar is refused, with file, line and column."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import operator
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NoReturn, Union

from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention.variants.tree import (
    ARGUMENTS,
    BOOL,
    COMPARISONS,
    ELEMENT_TYPES,
    FLOAT,
    FUNCTIONS,
    INT,
    NONE,
    OPERATORS,
    Extra,
    Node,
    Variants,
    constant,
)

SCORE_ARGUMENTS, MASK_ARGUMENTS = ("score", "b", "h", "q", "k"), ("b", "h", "q", "k")
_MAX_SIZE, _MAX_DEPTH, _MAX_TEXT = 1000, 60, 1 << 16
_INT32 = range(-(1 << 31), 1 << 31)

_BINARY = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.BitAnd: "&",
    ast.BitOr: "|", ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">",
    ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
}  # fmt: skip
_TORCH_NAMES = {
    "minimum": "min",
    "maximum": "max",
    **{name: name for name in FUNCTIONS if name not in ("int", "float")},
}
# What to write instead of what Python has, and tensors do not take.
_INSTEAD: dict[type[ast.AST], str] = {
    ast.BoolOp: "& and | with parentheses around comparisons",
    ast.IfExp: "where(condition, a, b)",
    ast.Pow: "products, or exp2",
    ast.Call: f"one of {', '.join(FUNCTIONS)}",
    ast.Subscript: "x.name[index, …] of a tensor that is declared",
    ast.Attribute: "x.name of an extra that is declared",
    ast.If: "where(condition, a, b)",
    ast.For: "an expression; a sum over keys is the softmax's",
    ast.While: "an expression",
}

_FOLD: dict[str, Callable[..., Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "<<": operator.lshift, ">>": operator.rshift, "&": operator.and_, "|": operator.or_,
    "^": operator.xor, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq,
    "!=": operator.ne, "negative": operator.neg, "int": int, "float": float, "abs": abs, "min": min, "max": max,
}  # fmt: skip


class Refused(UnsupportedConfig):
    """Outside of the grammar. The message starts with file, line and column."""


class _Place:
    """Where a piece of source stands in its file."""

    def __init__(self, file: str, first_line: int, indent: int) -> None:
        self._file, self._first_line, self._indent = file, first_line, indent

    def refuse(self, node: ast.AST, what: str) -> NoReturn:
        line, column = getattr(node, "lineno", 1), getattr(node, "col_offset", 0)
        raise Refused(f"{self._file}:{self._first_line + line - 1}:{self._indent + column + 1}: {what}") from None


class _Parser:
    """Expressions of one function."""

    def __init__(
        self,
        place: _Place,
        arguments: Mapping[str, str],
        x: str,
        extras: Mapping[str, Extra],
        constants: Callable[[str], object],
    ) -> None:
        """arguments: names in the source -> of ARGUMENTS; x: the name of the extras, or ""; constants: looks up names
        of the surroundings, or raises KeyError."""
        self._refuse, self._arguments, self._x, self._extras = place.refuse, arguments, x, extras
        self._constants = constants
        self._locals: dict[str, Node] = {}

    def body(self, statements: Sequence[ast.stmt], at: ast.AST) -> Node:
        """Assignments, then one return."""
        if statements and isinstance(statements[0], ast.Expr) and isinstance(statements[0].value, ast.Constant):
            statements = statements[1:]  # its docstring
        for i, statement in enumerate(statements):
            if isinstance(statement, ast.Return) and statement.value is not None:
                if i + 1 < len(statements):
                    self._refuse(statements[i + 1], "there is more after return; expected it to come last")
                return self.expression(statement.value)
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target = statement.targets[0]
                if isinstance(target, ast.Name):
                    if target.id == self._x:
                        self._refuse(target, f"{target.id} holds the extras; expected another name for a value")
                    self._locals[target.id] = self.expression(statement.value)
                    continue
            instead = _INSTEAD.get(type(statement))
            hint = f". Next step: write {instead}" if instead else ""
            self._refuse(
                statement,
                f"{type(statement).__name__} is not supported; expected assignments to names and one return{hint}",
            )
        self._refuse(at, "there is no return of a value")

    def expression(self, node: ast.expr) -> Node:
        made = self._expression(node)
        if made.size > _MAX_SIZE or made.depth > _MAX_DEPTH:
            self._refuse(
                node,
                f"the expression is too long; expected at most {_MAX_SIZE} operations, {_MAX_DEPTH} deep, where a name "
                "that is used twice counts twice",
            )
        return made

    def _expression(self, node: ast.expr) -> Node:
        if isinstance(node, ast.Constant):
            return self._constant(node, node.value)
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.UnaryOp):
            return self._unary(node)
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return self._apply(node, _BINARY[type(node.op)], (node.left, node.right))
        if isinstance(node, ast.Compare):
            if len(node.ops) > 1:
                self._refuse(node, "a chain of comparisons; expected (a < b) & (b < c)")
            if type(node.ops[0]) in _BINARY:
                return self._apply(node, _BINARY[type(node.ops[0])], (node.left, node.comparators[0]))
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Attribute):
            name, extra = self._extra(node)
            if extra.is_tensor:
                self._refuse(node, f"x.{name} is a tensor, {extra.text}; expected x.{name}[index, …]")
            return Node("extra", extra.kind, value=name)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
            return self._load(node, node.value)
        what: ast.AST = node.op if isinstance(node, ast.BinOp) else node
        what = node.ops[0] if isinstance(node, ast.Compare) else what
        instead = _INSTEAD.get(type(what))
        hint = f"; expected {instead}" if instead else "; expected arithmetic, comparisons, & | ~, calls and x.name"
        self._refuse(node, f"{type(what).__name__} is not supported{hint}")

    def _constant(self, node: ast.AST, value: object) -> Node:
        if value.__class__ is int and value not in _INT32:
            self._refuse(node, f"{value} does not fit 32 bits")
        if value.__class__ in (bool, int) or (isinstance(value, float) and not math.isnan(value)):
            return constant(value)
        self._refuse(node, f"{value!r:.40} is no number; expected an int, a float, True or False")

    def _name(self, node: ast.Name) -> Node:
        name = node.id
        if name in self._locals:
            return self._locals[name]
        if name in self._arguments:
            argument = self._arguments[name]
            return Node("argument", ARGUMENTS[argument], value=argument)
        if name == self._x:
            self._refuse(node, f"{name} is not a value; expected {name}.name of an extra that is declared")
        try:
            value = self._constants(name)
        except KeyError:
            if name == "inf":
                return constant(math.inf)
            known = ", ".join((*self._arguments, *self._locals))
            self._refuse(node, f"{name} is not known here; expected {known}, or a constant of the module")
        if value.__class__ in (bool, int, float):
            return self._constant(node, value)
        self._refuse(
            node, f"{name} is {type(value).__name__}; expected a number. Next step: declare a tensor as an extra, "
            "and use it as x.name"
        )  # fmt: skip

    def _unary(self, node: ast.UnaryOp) -> Node:
        operand = self.expression(node.operand)
        if isinstance(node.op, ast.UAdd):
            return operand
        if isinstance(node.op, ast.USub):
            if operand.type == BOOL:
                self._refuse(node, "minus of a bool; expected a number")
            return _folded(Node("negative", operand.type, (operand,)))
        if isinstance(node.op, ast.Invert):
            if operand.type == FLOAT:
                self._refuse(node, "~ of a float; expected a bool or an int")
            return Node("not", operand.type, (operand,))
        self._refuse(node, "not is not supported; expected ~")

    def _apply(self, node: ast.expr, op: str, operands: Sequence[ast.expr]) -> Node:
        args = [self.expression(operand) for operand in operands]
        wanted = OPERATORS[op] if op in OPERATORS else FUNCTIONS[op]
        if len(args) != len(wanted):
            self._refuse(node, f"{op} takes {len(wanted)} arguments, got {len(args)}")
        args = self._typed(node, op, args, wanted)
        result = BOOL if op in COMPARISONS else args[-1].type
        result = {"int": INT, "float": FLOAT, "where": args[-1].type}.get(op, result)
        if op in ("int", "float") and args[0].type == op:
            return args[0]
        if op in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh"):
            result = FLOAT
        return _folded(Node(op, result, tuple(args)))

    def _typed(self, node: ast.expr, op: str, args: list[Node], wanted: tuple[str, ...]) -> list[Node]:
        """With ints made floats where that is needed."""
        shared = [arg.type for arg, want in zip(args, wanted) if want in ("number", "bits", "any")]
        common = FLOAT if FLOAT in shared and BOOL not in shared else shared[0] if shared else ""
        typed = []
        for arg, want in zip(args, wanted):
            kind = want if want in (INT, FLOAT, BOOL) else common
            legal = {"number": (INT, FLOAT), "bits": (INT, BOOL), "any": (INT, FLOAT, BOOL)}.get(want, (want,))
            if op in ("int", "float"):
                kind = arg.type
            if arg.type == INT and kind == FLOAT:
                arg = _folded(Node("float", FLOAT, (arg,)))
            if arg.type not in legal or arg.type != kind:
                got = " and ".join(argument.type for argument in args)
                hint = ". Next step: int(…) or where(…, 1, 0) of a bool" if arg.type == BOOL else ""
                self._refuse(node, f"{op} of {got}; expected {' and '.join(wanted)}{hint}")
            typed.append(arg)
        return typed

    def _call(self, node: ast.Call) -> Node:
        function = node.func
        name = ""
        if isinstance(function, ast.Name) and function.id in FUNCTIONS:
            name = function.id
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            name = _TORCH_NAMES.get(function.attr, "") if function.value.id == "torch" else ""
        if not name:
            self._refuse(
                node, f"{ast.unparse(function):.40} is not a function of variants; expected {_INSTEAD[ast.Call]}"
            )
        if node.keywords or any(isinstance(arg, ast.Starred) for arg in node.args):
            self._refuse(node, f"{name} by keyword or *; expected its arguments one by one")
        return self._apply(node, name, node.args)

    def _extra(self, node: ast.Attribute) -> tuple[str, Extra]:
        if not isinstance(node.value, ast.Name) or node.value.id != self._x or not self._x:
            self._refuse(node, f"{ast.unparse(node):.40} is not supported; expected {_INSTEAD[ast.Attribute]}")
        extra = self._extras.get(node.attr)
        if extra is None:
            known = ", ".join(self._extras) or "none"
            self._refuse(node, f"{self._x}.{node.attr} is not declared; declared: {known}")
        return node.attr, extra

    def _load(self, node: ast.Subscript, tensor: ast.Attribute) -> Node:
        name, extra = self._extra(tensor)
        given = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if not extra.is_tensor or len(given) != len(extra.shape):
            self._refuse(node, f"{len(given)} indices into {self._x}.{name}, {extra.text}; expected one an axis")
        indices = []
        for one in given:
            index = self.expression(one)
            if index.type != INT:
                self._refuse(one, f"an index is a {index.type}; expected an int")
            indices.append(index)
        return Node("load", ELEMENT_TYPES[extra.kind], tuple(indices), name)


def _no_constants(name: str) -> object:
    raise KeyError(name)


def _folded(node: Node) -> Node:
    """A number where all below are."""
    fold = _FOLD.get(node.op)
    if fold is None or any(arg.op != "constant" for arg in node.args):
        return node
    try:
        value = fold(*(arg.value for arg in node.args))
    except (ArithmeticError, ValueError):
        return node
    value = {INT: int, FLOAT: float, BOOL: bool}[node.type](value)
    if (node.type == INT and value not in _INT32) or value != value:
        return node
    return constant(value)


# ---------------------------------------------------------------------------------------------------------- functions


def score(function: FunctionType, extras: Mapping[str, Extra]) -> Variants:
    """The variant of a function (score, b, h, q, k, x) -> score. Raises Refused."""
    parser, definition, place, _ = _of_function(function, SCORE_ARGUMENTS, extras)
    node = parser.body(definition.body, definition)
    if node.type == BOOL:
        place.refuse(definition, "the function returns a bool; expected a score. Next step: flashinfer.mask")
    if node.type == INT:
        node = _folded(Node("float", FLOAT, (node,)))
    return Variants(extras, score=node)


def mask(function: FunctionType, extras: Mapping[str, Extra], bounds: Union[FunctionType, None]) -> Variants:
    """The variant of a function (b, h, q, k, x) -> bool, and of its bounds, a lambda (q, x) or (b, q, x) -> (first key,
    last key) among the decorator's arguments, or a function. Raises Refused."""
    parser, definition, place, constants = _of_function(function, MASK_ARGUMENTS, extras)
    node = parser.body(definition.body, definition)
    if node.type != BOOL:
        place.refuse(definition, f"the function returns {node.type}; expected a bool, True where a key is seen")
    first = last = None
    if bounds is not None:
        first, last = _bounds(bounds, definition, place, extras, constants)
    return Variants(extras, sees=node, first_key=first, last_key=last)


def _of_function(
    function: FunctionType, arguments: tuple[str, ...], extras: Mapping[str, Extra]
) -> tuple[_Parser, ast.FunctionDef, _Place, Callable[[str], object]]:
    definition, place = _source(function)
    names = _names_of(definition.args, place, definition, (arguments,))
    constants = _surroundings(function)
    parser = _Parser(place, dict(zip(names, arguments)), _x_of(names, arguments), extras, constants)
    return parser, definition, place, constants


def _source(function: FunctionType) -> tuple[ast.FunctionDef, _Place]:
    name = getattr(function, "__qualname__", repr(function))
    try:
        lines, first_line = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise Refused(f"{name}: its source is not to be had ({error}); expected a function of a file") from None
    text = textwrap.dedent("".join(lines))
    indent = len(lines[0]) - len(text.split("\n", 1)[0]) - lines[0].endswith("\n")
    place = _Place(inspect.getsourcefile(function) or "?", first_line, indent)
    try:
        definition = ast.parse(text).body[0]
    except SyntaxError:
        definition = ast.Pass()
    if not isinstance(definition, ast.FunctionDef):
        place.refuse(definition, f"{name} is no function by def; expected def and one return")
    return definition, place


def _names_of(args: ast.arguments, place: _Place, at: ast.AST, expected: Sequence[tuple[str, ...]]) -> list[str]:
    """Names of arguments in the source: as one of `expected`, and x behind them."""
    names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    lengths = {length for one in expected for length in (len(one), len(one) + 1)}
    if args.vararg or args.kwarg or args.kwonlyargs or args.defaults or len(names) not in lengths:
        shown = " or ".join(f"({', '.join((*one, 'x'))})" for one in expected)
        place.refuse(at, f"the arguments are ({ast.unparse(args)}); expected {shown}")
    return names


def _x_of(names: Sequence[str], arguments: Sequence[str]) -> str:
    return names[-1] if len(names) > len(arguments) else ""


def _surroundings(function: FunctionType) -> Callable[[str], object]:
    closure = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))

    def look_up(name: str) -> object:
        if name in closure:
            try:
                return closure[name].cell_contents
            except ValueError:
                raise KeyError(name) from None
        return function.__globals__[name]

    return look_up


def _bounds(
    bounds: FunctionType,
    definition: ast.FunctionDef,
    place: _Place,
    extras: Mapping[str, Extra],
    constants: Callable[[str], object],
) -> tuple[Node, Node]:
    found = None
    for decorator in definition.decorator_list:
        for keyword in decorator.keywords if isinstance(decorator, ast.Call) else ():
            if keyword.arg == "bounds" and isinstance(keyword.value, ast.Lambda):
                found = keyword.value
    at: ast.AST
    if found is not None:
        at, args, result = found, found.args, found.body
    else:
        other, place = _source(bounds)
        constants = _surroundings(bounds)
        at, args = other, other.args
        last = other.body[-1]
        if len(other.body) > 1 or not isinstance(last, ast.Return) or last.value is None:
            place.refuse(other, "bounds are more than one return; expected return first, last")
        result = last.value
    names = _names_of(args, place, at, (("q",), ("b", "q")))
    if not isinstance(result, ast.Tuple) or len(result.elts) != 2:
        place.refuse(result, "bounds are no pair; expected (first key, last key), both included")
    # (q), (q, x) or (b, q, x)
    arguments = ("b", "q") if len(names) == 3 else ("q",)
    parser = _Parser(place, dict(zip(names, arguments)), _x_of(names, arguments), extras, constants)
    first, last_key = (parser.expression(one) for one in result.elts)
    for node, one in zip((first, last_key), result.elts):
        if node.type != INT:
            place.refuse(one, f"a bound is a {node.type}; expected an int")
    return first, last_key


# --------------------------------------------------------------------------------------------------------------- texts

_TENSOR = re.compile(r"(\w+)\[(.*)\]")
_NUMBER = re.compile(r"(int|float)( > 0)?")


def declared(name: str, kind: object) -> Extra:
    """An extra as a decorator takes it: int, float, or a text such as "int > 0" or "f32[num_heads, 2*L+1]". Raises
    UnsupportedConfig."""
    text = kind.__name__ if kind in (int, float) else kind
    if isinstance(text, str) and name.isidentifier() and not name.startswith("__"):
        text = " ".join(text.split())
        number, tensor = _NUMBER.fullmatch(text.replace(">0", " > 0").replace("  ", " ")), _TENSOR.fullmatch(text)
        if number:
            return Extra(number[1], bool(number[2]))
        if tensor and tensor[1] in ELEMENT_TYPES and tensor[2]:
            return Extra(tensor[1], shape=tuple(length.strip() for length in tensor[2].split(",")))
    raise UnsupportedConfig(
        f"extra {name} is declared as {kind!r:.60}; expected int, float, 'int > 0', 'float > 0', or a tensor such as "
        f"'f32[num_heads, n]' of {', '.join(ELEMENT_TYPES)}"
    )


def read(text: str) -> Variants:
    """The inverse of `Variants.text`. Raises UnsupportedConfig for anything else, however hostile."""
    try:
        return _read(text)
    except (SyntaxError, RecursionError, MemoryError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise UnsupportedConfig(f"variant {text!r:.80} is not the text of one: {error}") from None


@functools.lru_cache(maxsize=256)
def _read(text: str) -> Variants:
    if text == NONE:
        return Variants({})
    if len(text) > _MAX_TEXT:
        raise UnsupportedConfig(f"variant: {len(text)} characters; expected at most {_MAX_TEXT}")
    extras: dict[str, Extra] = {}
    parts: dict[str, Node] = {}
    arguments: Mapping[str, tuple[tuple[str, ...], str]] = {
        "score": (SCORE_ARGUMENTS, FLOAT),
        "sees": (MASK_ARGUMENTS, BOOL),
        "first_key": (("b", "q"), INT),
        "last_key": (("b", "q"), INT),
    }
    for item in text.split("; "):
        name, equals, expression = item.partition(" = ")
        if not equals:
            name, _, kind = item.partition(": ")
            extras[name] = declared(name, kind)
            continue
        names, kind = arguments[name]
        parser = _Parser(_Place(f"variant, {name}", 1, 0), dict(zip(names, names)), "x", extras, _no_constants)
        parts[name] = parser.expression(ast.parse(expression, mode="eval").body)
        if parts[name].type != kind:
            raise UnsupportedConfig(f"variant: {name} is {parts[name].type}; expected {kind}")
    if not parts.keys() & {"score", "sees"}:
        raise UnsupportedConfig("variant: neither a score nor a mask")
    variants = Variants.of(extras, parts)
    variants.layout()
    return variants
