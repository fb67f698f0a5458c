# SPDX-License-Identifier: Apache-2.0
"""Attention variants in Python: functions of scores and of masks, compiled into the attention kernels.

    @flashinfer.variant(bias="f32[num_heads, 2*L + 1]", L=int)
    def t5(score, b, h, q, k, x):
        return score + x.bias[h, clamp(q - k, -x.L, x.L) + x.L]

    @flashinfer.mask(window=int, num_first=int)
    def window_and_first(b, h, q, k, x):
        return (k <= q) & ((q - k <= x.window) | (k < x.num_first))

    wrapper.plan(..., variant=t5(bias=table, L=128), mask=window_and_first(window=1024, num_first=4))

A function is read, not run: docs/variants.md has the grammar. `evaluate` does run it, on tensors, which is what kernels
are compared with (`flashinfer variants check module:function`).
"""

from __future__ import annotations

import ast
import functools
import importlib
import math
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any, Optional, Union

import torch

from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention.variants import parse
from flashinfer.families.attention.variants.cxx import has_range
from flashinfer.families.attention.variants.ranges import range_of
from flashinfer.families.attention.variants.tree import INT, SIZES, Extra, Variants, joined
from flashinfer.host import checks

_DTYPES = {"f32": torch.float32, "i32": torch.int32, "bool": torch.bool}
_MOST = 1 << 30  # of a number, so that sums of a few stay within 32 bits
Value = Union[int, float, torch.Tensor]


class Function:
    """A function of scores or of a mask, made by `variant` or `mask`. Called with its extras it is ready for plan()."""

    def __init__(self, function: FunctionType, variants: Variants, bounds: Optional[FunctionType] = None) -> None:
        functools.update_wrapper(self, function)
        self._function, self._bounds, self.variants = function, bounds, variants

    @property
    def is_mask(self) -> bool:
        return self.variants.sees is not None

    @property
    def name(self) -> str:
        return self._function.__name__

    def __call__(self, **extras: Value) -> BoundFunction:
        """With a value for every extra that is declared. Raises TypeError or ValueError."""
        return BoundFunction(self, extras)

    def __repr__(self) -> str:
        declared = ", ".join(f"{name}: {extra.text}" for name, extra in self.variants.extras.items())
        return f"<{'mask' if self.is_mask else 'variant'} {self.name}({declared})>"


class BoundFunction:
    """A function with its extras. Tensors are used in place: what they hold when a kernel runs counts."""

    def __init__(self, function: Function, values: Mapping[str, Value]) -> None:
        self.function = function
        op, extras = function.name, function.variants.extras
        wrong = {"is not declared": values.keys() - extras.keys(), "is missing": extras.keys() - values.keys()}
        for what, names in wrong.items():
            if names:
                known = ", ".join(f"{name}: {extra.text}" for name, extra in extras.items()) or "none"
                raise TypeError(f"{op}: {', '.join(sorted(names))} {what}; the extras are {known}")
        self.values = {name: _checked(op, name, values[name], extra) for name, extra in extras.items()}
        self._key = (function, *(_key(value) for value in self.values.values()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BoundFunction) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _x(self) -> SimpleNamespace:
        of = {name: _Indexed(v) if isinstance(v, torch.Tensor) else v for name, v in self.values.items()}
        return SimpleNamespace(**of)

    def lengths(self, op: str, sizes: Mapping[str, int]) -> None:
        """Check the shapes of tensors. sizes: batch_size, num_heads, num_kv_heads. Raises ValueError."""
        known = {**sizes, **{name: value for name, value in self.values.items() if isinstance(value, int)}}
        for name, extra in self.function.variants.extras.items():
            value = self.values[name]
            if isinstance(value, torch.Tensor):
                expected = [axis_length(text, known) for text in extra.shape]
                shape = [size if length is None else length for length, size in zip(expected, value.shape)]
                if list(value.shape) != shape:
                    raise ValueError(
                        f"{op}: {name} of {self.function.name} is {list(value.shape)}; expected {shape}, {extra.text}"
                    )
                free = {text: size for text, length, size in zip(extra.shape, expected, value.shape) if length is None}
                known.update(free)

    def evaluate(self, *arguments: Any) -> Any:
        """The function itself on tensors that broadcast: (score, b, h, q, k), or (b, h, q, k) of a mask, whose declared
        bounds count as well. Floats are computed as they come, fp64 say; an index outside of a tensor stands for the
        entry nearest to it, as in kernels."""
        function = self.function
        plain = function._function
        result = _on_tensors(plain)(*arguments, *_x_if_taken(plain, len(arguments), self._x))
        if function._bounds is None:
            return result
        b, _, q, k = arguments
        first, last = self.bounds(b, q)
        return result & (k >= first) & (k <= last)

    def bounds(self, b: Any, q: Any) -> tuple[Any, ...]:
        """The first and the last key that declared bounds leave; nothing where there are none."""
        function = self.function._bounds
        if function is None:
            return ()
        given = (q,) if function.__code__.co_argcount < 3 else (b, q)
        pair = _on_tensors(function)(*given, *_x_if_taken(function, len(given), self._x))
        return tuple(_tensor(end) + torch.zeros_like(_tensor(q)) for end in pair)


def variant(**extras: Any) -> Callable[[Callable[..., Any]], Function]:
    """Makes a function (score, b, h, q, k, x) -> score a variant of attention, to be given to plan() or to a single
    call as `variant=`.

    Its arguments are the logit, sm_scale included; request, query head, and the positions of query and key in the
    request, ints; and the extras. It takes the place of logits_soft_cap and ALiBi.

    Args:
        extras: what it uses besides, as `x.name`: int, float, "int > 0", "float > 0", or a tensor by element type (f32,
            i32, bool) and lengths, such as "f32[num_heads, 2*L + 1]". Lengths are numbers, batch_size, num_heads,
            num_kv_heads, ints among the extras, sums and products of these, or a name for any length.

    Raises:
        UnsupportedConfig: what is outside of the grammar, with file, line and column.
    """
    return functools.partial(_make_variant, _declared(extras))


def mask(*, bounds: Optional[Callable[..., Any]] = None, **extras: Any) -> Callable[[Callable[..., Any]], Function]:
    """Makes a function (b, h, q, k, x) -> bool a mask, True where query q sees key k, to be given to plan() or to a
    single call as `mask=`. What causal, a window or a custom mask hide stays hidden.

    Comparisons of k with what does not fall from one query to the next leave out the tiles of keys beyond; all others
    are looked at key by key, but for tiles that are proved full or empty.

    Args:
        bounds: (q, x) or (b, q, x) -> (first, last): keys before the first and after the last are not seen and not
            loaded. Neither may fall from one query to the next. A lambda within the decorator, or a function.
        extras: as of `variant`.

    Raises:
        UnsupportedConfig: what is outside of the grammar, with file, line and column.
    """
    return functools.partial(_make_mask, bounds, _declared(extras))


def load(name: str) -> Union[Function, BoundFunction]:
    """By "module:function"; the module is looked for in the current folder too. Raises UnsupportedConfig."""
    module, _, attribute = name.strip().partition(":")
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        imported = importlib.import_module(module)
    except UnsupportedConfig as error:  # of any function of the module, by its file and line
        raise UnsupportedConfig(f"{name}: {module} does not import: {error}") from None
    except (ImportError, ValueError) as error:
        raise UnsupportedConfig(f"{name}: {error}; expected module:function, importable from {folder}") from None
    except Exception as error:
        raise UnsupportedConfig(f"{name}: {module} does not import: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    try:
        found = functools.reduce(getattr, attribute.split("."), imported)
    except AttributeError as error:
        raise UnsupportedConfig(f"{name}: {error}; expected module:function, importable from {folder}") from None
    if not isinstance(found, (Function, BoundFunction)):
        raise UnsupportedConfig(f"{name} is {found!r:.60}; expected what flashinfer.variant or flashinfer.mask made")
    return found


def text_of(names: Sequence[str]) -> str:
    """Of at most one function of scores and one mask, by "module:function": as kernels are named by them. Raises
    UnsupportedConfig."""
    of: dict[bool, Function] = {}
    for name in names:
        found = load(name)
        function = found.function if isinstance(found, BoundFunction) else found
        if function.is_mask in of:
            raise UnsupportedConfig(f"{', '.join(names)}: expected at most one function of scores and one mask")
        of[function.is_mask] = function
    return canonical(of.get(False), of.get(True)).text


def _make_variant(extras: Mapping[str, Extra], function: Callable[..., Any]) -> Function:
    plain = _plain(function)
    return Function(plain, parse.score(plain, extras))


def _make_mask(bounds: Any, extras: Mapping[str, Extra], function: Callable[..., Any]) -> Function:
    plain = _plain(function)
    made = Function(plain, parse.mask(plain, extras, bounds if bounds is None else _plain(bounds)), bounds)
    range_of(made.variants)
    return made


def _plain(function: Callable[..., Any]) -> FunctionType:
    if not isinstance(function, FunctionType):
        raise TypeError(f"{function!r:.60} is no function by def; expected one")
    return function


def _declared(extras: Mapping[str, Any]) -> dict[str, Extra]:
    found = {name: parse.declared(name, kind) for name, kind in extras.items()}
    ints = {name: 1 for name, extra in found.items() if extra.kind == INT}
    for extra in found.values():
        for text in extra.shape:
            axis_length(text, {**dict.fromkeys(SIZES, 1), **ints})
    return found


def axis_length(text: str, known: Mapping[str, int]) -> Optional[int]:
    """Of an axis, by what it is declared to be; None: any. Raises UnsupportedConfig."""
    try:
        tree = ast.parse(text, mode="eval").body
        if isinstance(tree, ast.Name) and tree.id not in known:
            return None
        return _evaluated(tree, known)
    except (SyntaxError, KeyError, ArithmeticError, TypeError):
        raise UnsupportedConfig(
            f"length {text!r:.60} of an axis; expected a number, {', '.join(SIZES)}, an extra that is an int, sums and "
            "products of these, or a name for any length"
        ) from None


def _evaluated(tree: ast.expr, known: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return tree.value
    if isinstance(tree, ast.Name):
        return known[tree.id]
    if isinstance(tree, ast.BinOp):
        a, b = _evaluated(tree.left, known), _evaluated(tree.right, known)
        if isinstance(tree.op, (ast.Add, ast.Sub)):
            return a + b if isinstance(tree.op, ast.Add) else a - b
        if isinstance(tree.op, (ast.Mult, ast.FloorDiv)):
            return a * b if isinstance(tree.op, ast.Mult) else a // b
    raise TypeError


def _checked(op: str, name: str, value: object, extra: Extra) -> Value:
    if not extra.is_tensor:
        if extra.kind == INT:
            return checks.integer(op, name, value, 1 if extra.is_positive else -_MOST, _MOST)
        return checks.real(op, name, value, above=0.0 if extra.is_positive else -math.inf)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}; expected a tensor, {extra.text}")
    checks.require_memory(op, **{name: value})
    if value.dtype != _DTYPES[extra.kind] or value.dim() != len(extra.shape):
        raise ValueError(
            f"{op}: {name} is {value.dtype} {list(value.shape)}; expected {_DTYPES[extra.kind]}, {extra.text}"
        )
    checks.require(min(value.shape) > 0, op, f"{name} is {list(value.shape)}; expected an entry at least on every axis")
    checks.require(value.shape[-1] == 1 or value.stride(-1) == 1, op, f"{name} is strided; call .contiguous()")
    reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
    checks.require(reach < 1 << 31, op, f"{name} has entries {reach} elements apart; expected less than 2^31")
    return value


def _key(value: Value) -> object:
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.dtype, value.shape, value.stride(), value.device
    return value.__class__, value


# ------------------------------------------------------------------------------------------------------------ launches


@dataclass(frozen=True)
class LaunchFunctions:
    """What kernels take of the functions that a plan or a call was given."""

    text: str  # of the axis `variant` of specs
    extras: bytes  # AttentionParams::extras
    has_score: bool
    ranges: tuple[str, bytes]  # the same of a mask with a range alone, for planners
    held: tuple[BoundFunction, ...] = field(compare=False)  # whose tensors are read

    @property
    def holds_tensors(self) -> bool:
        """A memo of whatever was planned or called would keep them alive."""
        return any(isinstance(value, torch.Tensor) for one in self.held for value in one.values.values())


NO_RANGES = ("none", b"")


def launch_functions(
    op: str,
    variant: object,
    mask: object,
    device: torch.device,
    *,
    batch_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
) -> Optional[LaunchFunctions]:
    """Of the arguments `variant` and `mask` of a plan or a call. Raises TypeError, ValueError or UnsupportedConfig."""
    if variant is None and mask is None:
        return None
    score_of, mask_of = _given(op, "variant", variant), _given(op, "mask", mask)
    held = tuple(one for one in (score_of, mask_of) if one is not None)
    sizes = {"batch_size": batch_size, "num_heads": num_qo_heads, "num_kv_heads": num_kv_heads}
    for one in held:
        one.lengths(op, sizes)
        for name, value in one.values.items():
            if isinstance(value, torch.Tensor) and value.device != device:
                raise ValueError(f"{op}: {name} of {one.function.name} is on {value.device}; expected {device}")
    text, extras = _laid_out(score_of, mask_of)
    ranges = NO_RANGES
    if mask_of is not None and has_range(text):
        ranges = _laid_out(None, mask_of)  # whatever the scores, the planner is the same
    return LaunchFunctions(text, extras, score_of is not None, ranges, held)


def _laid_out(score_of: Optional[BoundFunction], mask_of: Optional[BoundFunction]) -> tuple[str, bytes]:
    """The text, and what AttentionParams::extras hold."""
    joint = canonical(*(None if one is None else one.function for one in (score_of, mask_of)))
    extras = bytearray()
    for new, offset in joint.layout().items():
        of, _, name = joint.renamed[new].partition(".")
        bound = score_of if of == "score" else mask_of
        assert bound is not None
        packed = _packed(bound.values[name], joint.extras[new])
        begin = -(-offset // 8) * 8 if joint.extras[new].is_tensor else offset
        extras.extend(bytes(begin - len(extras)))
        extras += packed
    return joint.text, bytes(extras)


@functools.lru_cache(maxsize=256)
def canonical(score_of: Optional[Function], mask_of: Optional[Function]) -> Variants:
    """Of both together, as they name a kernel."""
    given = {"score": score_of, "mask": mask_of}
    return joined({of: function.variants for of, function in given.items() if function is not None}).canonical()


def _given(op: str, name: str, value: object) -> Optional[BoundFunction]:
    if isinstance(value, Function):
        value = value()  # which has no extras
    if value is None:
        return None
    if isinstance(value, BoundFunction) and value.function.is_mask == (name == "mask"):
        return value
    got = f"a {'mask' if value.function.is_mask else 'variant'}" if isinstance(value, BoundFunction) else repr(value)
    hint = ". Next step: custom_mask takes tensors" if isinstance(value, torch.Tensor) else ""
    raise TypeError(f"{op}: {name} is {got:.60}; expected what flashinfer.{name} makes of a function{hint}")


def _packed(value: Value, extra: Extra) -> bytes:
    """As Extras in csrc/attention/params.h."""
    if isinstance(value, torch.Tensor):
        return struct.pack(f"P{2 * value.dim() - 1}i", value.data_ptr(), *value.shape, *value.stride()[:-1])
    return struct.pack("i" if extra.kind == INT else "f", value)


# --------------------------------------------------------------------------------------------------------- on tensors


class _Indexed:
    """A tensor as functions index it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.double() if tensor.is_floating_point() else tensor
        self._tensor = self._tensor.long() if tensor.dtype == torch.int32 else self._tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        indices = index if isinstance(index, tuple) else (index,)
        device, sizes = self._tensor.device, self._tensor.shape
        places = [torch.as_tensor(one, device=device).long() for one in indices]
        return self._tensor[tuple(at.clamp(0, size - 1) for at, size in zip(places, sizes))]


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value)


def where(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b."""
    return torch.where(_tensor(condition), a, b)


def clamp(value: Any, low: Any, high: Any) -> Any:
    """The value, or the limit that it is beyond."""
    return minimum(maximum(value, low), high)


def minimum(a: Any, b: Any) -> Any:
    """`min` in functions."""
    return torch.where(_tensor(b < a), b, a)


def maximum(a: Any, b: Any) -> Any:
    """`max` in functions."""
    return torch.where(_tensor(a < b), b, a)


def _cast(dtype: torch.dtype) -> Callable[[Any], torch.Tensor]:
    return lambda value: _tensor(value).to(dtype)


def _elementwise(name: str) -> Callable[[Any], torch.Tensor]:
    function: Callable[[torch.Tensor], torch.Tensor] = getattr(torch, name)
    return lambda value: function(_tensor(value))


exp, exp2, log, log2, sqrt, rsqrt, tanh = map(_elementwise, ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh"))
_VOCABULARY = {
    **{"where": where, "clamp": clamp, "min": minimum, "max": maximum, "inf": math.inf},
    **{"exp": exp, "exp2": exp2, "log": log, "log2": log2, "sqrt": sqrt, "rsqrt": rsqrt, "tanh": tanh},
    **{"int": _cast(torch.int64), "float": _cast(torch.float64)},
}


@functools.lru_cache(maxsize=256)
def _on_tensors(function: FunctionType) -> Callable[..., Any]:
    """The function with the vocabulary in place of names that it lacks, and of builtins that tensors do not take."""
    scope = {**function.__globals__, **_VOCABULARY}
    return FunctionType(function.__code__, scope, function.__name__, None, function.__closure__)


def _x_if_taken(function: FunctionType, num_others: int, x: object) -> tuple[object, ...]:
    return (x,) if function.__code__.co_argcount > num_others else ()
