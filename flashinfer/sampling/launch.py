# SPDX-License-Identifier: Apache-2.0
"""Rows of logits or probabilities: from a call to its launch, one prepared for each signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional, Union

import torch

from flashinfer import dtypes, env, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import sampling as families
from flashinfer.host import checks, memo, traced
from flashinfer.host import indices as index_values
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.jit import Family, KernelSpec, default_resolver
from flashinfer.jit.loader import Grid, Launcher, PreparedLaunch
from flashinfer.sampling import randomness
from flashinfer.sampling.randomness import Seed

Number = Union[int, float]
PerRow = Union[torch.Tensor, int, float]
Samples = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]

# operator: (what it does to a row, axis `op` of the family)
_NORMALIZERS = {
    "softmax": "softmax",
    "top_p_renorm_probs": "top_p_renorm",
    "top_k_renorm_probs": "top_k_renorm",
    "top_k_mask_logits": "top_k_mask",
}
# operator: (what its rows hold, its filter), axes of the family
_SAMPLERS = {
    "sampling_from_logits": ("logits", "none"),
    "sampling_from_probs": ("probs", "none"),
    "top_p_sampling_from_probs": ("probs", "top_p"),
    "top_k_sampling_from_probs": ("probs", "top_k"),
    "min_p_sampling_from_probs": ("probs", "min_p"),
    "top_k_top_p_sampling_from_logits": ("logits", "top_k_top_p"),
    "top_k_top_p_sampling_from_probs": ("probs", "top_k_top_p"),
}
_WORDS_PER_SAMPLE = 8  # Philox words a row consumes
# Counts of elements are sums of floats in the kernels, exact so far. Blocks of a grid are numbered in 31 bits.
_LARGEST_VOCAB, _LARGEST_BATCH = 1 << 24, 1 << 28
_LARGEST_COUNT = 0x7FFFFFFF
# Parameters that limit nothing: any count beyond the vocabulary, the whole weight, none of the largest probability.
_EVERY, _WHOLE, _NONE = _LARGEST_COUNT, 1.0, 0.0


class Draw(NamedTuple):
    """What `sample` takes besides rows, in its order: what all samplers do, then limits on what may be drawn."""

    indices: Optional[torch.Tensor]
    generator: Optional[torch.Generator]
    check_nan: bool
    seed: Seed
    offset: Seed
    return_valid: bool
    top_k: PerRow = _EVERY
    top_p: PerRow = _WHOLE
    min_p: PerRow = _NONE
    top_k_first: bool = False  # top-p acts on what top-k leaves


# ----------------------------------------------------------------------------------------------------------- parameters

# What a launch takes of a parameter: a number for all rows, or the address of one for each; and the signature of the
# tensor at that address, which decides whether the kernel can read it. A number within its range is all of it; these
# functions are for the rest.
Parameter = tuple[Number, int, Optional[tuple[object, ...]]]
_INT64 = -(1 << 63), (1 << 63) - 1
_LEAST_TEMPERATURE, _LARGEST_TEMPERATURE = 2.0**-126, float(torch.finfo(torch.float32).max)


def _count(op: str, value: Any) -> Parameter:
    if isinstance(value, torch.Tensor):
        return 0, value.data_ptr() or checks.no_address(op, "top_k", value), memo.signature(value)
    return min(max(checks.integer(op, "top_k", value, *_INT64), 1), _LARGEST_COUNT), 0, None


def _fraction(op: str, name: str, value: Any) -> Parameter:
    if isinstance(value, torch.Tensor):
        return 0.0, value.data_ptr() or checks.no_address(op, name, value), memo.signature(value)
    return min(max(checks.real(op, name, value), 0.0), 1.0), 0, None


def _temperature(op: str, value: Any) -> Parameter:
    if isinstance(value, torch.Tensor):
        return 0.0, value.data_ptr() or checks.no_address(op, "temperature", value), memo.signature(value)
    number = checks.real(op, "temperature", value, above=0.0)
    return min(max(number, _LEAST_TEMPERATURE), _LARGEST_TEMPERATURE), 0, None


def _readable(op: str, name: str, value: PerRow, num_rows: int, input: torch.Tensor) -> PerRow:
    """A parameter as a kernel can read it, one contiguous entry per row; the same object if it is so already."""
    if not isinstance(value, torch.Tensor):
        return value
    is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    fits = is_integer if name == "top_k" else is_integer or value.is_floating_point()
    kind = "an integer type" if name == "top_k" else "float32"
    checks.require(fits, op, f"{name} is a tensor of {value.dtype}; expected {kind}")
    checks.require(
        value.numel() == 1 or value.numel() == num_rows == max(value.shape),
        op,
        f"{name} is a tensor {list(value.shape)}; expected a number or [{num_rows}], one entry per output row",
    )
    checks.require_device(op, name, value, input)
    if name == "top_k":
        value = value if value.dtype in (torch.int32, torch.int64) else value.to(torch.int64)
    else:
        value = value.float()
    return (value if value.numel() == num_rows else value.reshape(1).expand(num_rows)).contiguous()


def check_dtype(op: str, name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedConfig(f"{op}: {name} is {tensor.dtype}; expected float32, float16 or bfloat16")
    return dtypes.short_name(tensor.dtype)


def check_sizes(op: str, num_rows: int, vocab_size: int) -> None:
    fits = num_rows <= _LARGEST_BATCH and vocab_size <= _LARGEST_VOCAB
    checks.require(
        fits, op, f"{num_rows} rows of {vocab_size} tokens; at most {_LARGEST_BATCH} of {_LARGEST_VOCAB} are supported"
    )


def _check_rows(op: str, input: torch.Tensor, indices: Optional[torch.Tensor]) -> int:
    """The number of output rows."""
    check_dtype(op, "the input", input)
    checks.require(
        input.dim() == 2 and input.shape[1] >= 1,
        op,
        f"the input is {list(input.shape)}; expected [num_rows, vocab_size] with at least one token",
    )
    checks.require_unit_stride(op, "the input", input)
    num_inputs, vocab_size = input.shape
    num_rows = num_inputs
    if indices is not None:
        checks.require_device(op, "indices", indices, input)
        checks.require(
            indices.dtype in (torch.int32, torch.int64) and indices.dim() == 1 and indices.is_contiguous(),
            op,
            f"indices is {indices.dtype} {list(indices.shape)}; expected contiguous int32 or int64 [num_rows]",
        )
        num_rows = indices.shape[0]
        if num_inputs == 0 and num_rows > 0:
            raise IndexError(f"{op}: indices names {num_rows} rows of an empty input; expected none")
    check_sizes(op, num_rows, vocab_size)
    return num_rows


# -------------------------------------------------------------------------------------------------------------- samples


class _Sampler(NamedTuple):
    launch: PreparedLaunch
    new_token_ids: memo.Allocate
    new_valid: memo.Allocate
    looks_at_indices: bool


_samplers: memo.Memo[_Sampler] = memo.Memo()
_SAMPLE_VARYING = (
    *("input", "token_ids", "valid", "row_indices", "top_k", "top_p", "min_p"),
    *randomness.FIELDS,
    *("top_k_value", "top_p_value", "min_p_value"),
)


def sample(
    op: str,
    input: torch.Tensor,
    indices: Optional[torch.Tensor],
    generator: Optional[torch.Generator],
    check_nan: bool,
    seed: Seed,
    offset: Seed,
    return_valid: bool,
    top_k: PerRow = _EVERY,
    top_p: PerRow = _WHOLE,
    min_p: PerRow = _NONE,
    top_k_first: bool = False,
    out: Optional[tuple[torch.Tensor, Optional[torch.Tensor]]] = None,
) -> Samples:
    """Tokens and, if wanted, their validity go to `out` if given.

    A call passes its arguments on one by one: to bundle them first would cost it 0.3 µs.
    """
    if is_dynamo_compiling():
        draw = Draw(indices, generator, check_nan, seed, offset, return_valid, top_k, top_p, min_p, top_k_first)
        return _traced_sample(op, input, draw)
    k_value, k_ptr, k_like = top_k, 0, None
    if top_k is not _EVERY and not (top_k.__class__ is int and 1 <= top_k <= _LARGEST_COUNT):
        k_value, k_ptr, k_like = _count(op, top_k)
    p_value, p_ptr, p_like = top_p, 0, None
    if top_p is not _WHOLE and not (top_p.__class__ is float and 0.0 <= top_p <= 1.0):
        p_value, p_ptr, p_like = _fraction(op, "top_p", top_p)
    m_value, m_ptr, m_like = min_p, 0, None
    if min_p is not _NONE and not (min_p.__class__ is float and 0.0 <= min_p <= 1.0):
        m_value, m_ptr, m_like = _fraction(op, "min_p", min_p)
    state = words = words_like = None
    if seed is not None or offset is not None:
        state, words_like = randomness.given(op, seed, offset)
    try:
        key = (
            op, top_k_first, input.dtype, input.shape, input.stride(), input.device, k_like, p_like, m_like, words_like,
            None if indices is None else memo.signature(indices),
        )  # fmt: skip
        input_ptr = input.data_ptr() or checks.no_address(op, "the input", input)
        indices_ptr = 0 if indices is None else indices.data_ptr() or checks.no_address(op, "indices", indices)
    except AttributeError:
        given = {"the input": input} if indices is None else {"the input": input, "indices": indices}
        raise checks.not_tensors(op, **given) from None
    prepared = _samplers.find(key)
    if prepared is None:
        num_rows = _check_rows(op, input, indices)
        draw = Draw(indices, generator, check_nan, seed, offset, return_valid, top_k, top_p, min_p, top_k_first)
        readable = _readable_draw(op, draw, num_rows, input)
        if readable is not draw:
            return sample(op, input, *readable, out)
        prepared = _samplers.remember(key, _prepare_sampler(op, input, num_rows, draw))
    launch, new_token_ids, new_valid, looks_at_indices = prepared
    if looks_at_indices and indices is not None and index_values.are_visible(indices):
        index_values.require_within(op, "indices", indices, 0, input.shape[0], f"the input has {input.shape[0]} rows")
    if check_nan:
        _require_no_nan(op, input)
    token_ids, valid = (new_token_ids(), new_valid() if return_valid else None) if out is None else out
    if state is None:
        state, words = randomness.drawn(op, input, generator, _WORDS_PER_SAMPLE)
    launch(
        input_ptr, token_ids.data_ptr(), 0 if valid is None else valid.data_ptr(), indices_ptr, k_ptr, p_ptr, m_ptr,
        *state, k_value, p_value, m_value,
    )  # fmt: skip
    del words  # they were there until now
    return token_ids if valid is None else (token_ids, valid)


def _traced_sample(op: str, input: torch.Tensor, draw: Draw) -> Samples:
    num_rows = (input if draw.indices is None else draw.indices).shape[0]
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=input.device)
    valid = torch.empty(num_rows, dtype=torch.bool, device=input.device) if draw.return_valid else None
    _sample_door(op, input, *draw, token_ids, valid)
    return token_ids if valid is None else (token_ids, valid)


def _run_traced_sample(op: str, input: torch.Tensor, *rest: Any) -> None:
    *draw, token_ids, valid = rest
    sample(op, input, *Draw(*draw), out=(token_ids, valid))


_sample_door = traced.door(
    "sample_rows",
    _run_traced_sample,
    {
        **{"op": "str", "input": "Tensor"},
        # Draw
        **{"indices": "Tensor?", "generator": randomness.GENERATOR, "check_nan": "bool"},
        **{"seed": randomness.SEED, "offset": traced.INTEGER, "return_valid": "bool"},
        **{"top_k": traced.INTEGER, "top_p": traced.REAL, "min_p": traced.REAL, "top_k_first": "bool"},
        **{"token_ids": "Tensor(!)", "valid": "Tensor(!)?"},
    },
)


def _readable_draw(op: str, draw: Draw, num_rows: int, input: torch.Tensor) -> Draw:
    """The same with tensors as a kernel can read them; the same object if they are so already."""
    read: dict[str, Any] = {
        name: _readable(op, name, getattr(draw, name), num_rows, input) for name in ("top_k", "top_p", "min_p")
    }
    if draw.seed is not None or draw.offset is not None:
        read["seed"], read["offset"] = randomness.readable(op, draw.seed, draw.offset, num_rows, input)
    return draw if all(value is getattr(draw, name) for name, value in read.items()) else draw._replace(**read)


def _require_no_nan(op: str, input: torch.Tensor) -> None:
    if memo.is_capturing(input):
        raise ValueError(f"{op}: check_nan waits for the device, which a captured stream cannot; pass check_nan=False")
    if bool(torch.isnan(input).any()):
        kind, _ = _SAMPLERS[op]
        raise ValueError(f"{op}: the input holds NaN; find where the {kind} come from, or pass check_nan=False")


def _prepare_sampler(op: str, input: torch.Tensor, num_rows: int, draw: Draw) -> _Sampler:
    kind, filter = _SAMPLERS[op]
    indices, top_k = draw.indices, draw.top_k
    launch: PreparedLaunch = nothing
    if num_rows > 0:
        launcher, grid = kernel(families.SAMPLE_ROW, {"input": kind, "filter": filter}, input, num_rows)
        launch = launcher.prepare(
            grid,
            {
                "row_indices_are_int64": indices is not None and indices.dtype is torch.int64,
                "num_inputs": input.shape[0],
                "input_stride": input.stride(0),
                "num_rows": num_rows,
                "vocab_size": input.shape[1],
                "top_k_is_int64": isinstance(top_k, torch.Tensor) and top_k.dtype is torch.int64,
                "top_k_first": draw.top_k_first,
                **randomness.per_row(draw.seed, draw.offset),
            },
            varying=_SAMPLE_VARYING,
        )
    return _Sampler(
        launch,
        memo.allocator((num_rows,), torch.int32, input.device),
        memo.allocator((num_rows,), torch.bool, input.device),
        indices is not None and (indices.is_cpu or env.CHECK_INDICES.get()),
    )


def kernel(
    family: Family, axes: Mapping[str, str], rows: torch.Tensor, num_rows: int, pdl: Optional[bool] = None
) -> tuple[Launcher, Grid]:
    """The kernel of a family for rows of this kind, and its grid."""
    dtype, machine, device_index = dtypes.short_name(rows.dtype), target.of_device(rows.device), rows.get_device()
    num_sms = memo.num_sms(device_index) if device_index >= 0 else 1
    keeps_row = "row_kib" in family.axes and axes.get("filter") != "none"

    def request(num_rows: int) -> tuple[KernelSpec, int]:
        place = families.placement(dtype, rows.shape[-1], num_rows, num_sms, machine, keeps_row)
        where = {axis: size for axis, size in place.items() if axis in family.axes}
        return family.spec(machine, dtype=dtype, **axes, **where), place["cluster_size"]

    (spec, cluster_size), resolver = request(num_rows), default_resolver()
    if device_index >= 0 and not resolver.holds(spec):  # the batches of a server have every size
        others = map(request, families.rows_of_each_placement(num_sms))
        resolver.expect(other for other, _ in others if other != spec)
    launcher = resolver.load(spec).on(device_index, pdl=pdl)
    return launcher, (num_rows * cluster_size, 1, 1)


def nothing(*_: object) -> None:
    """The launch of an operator on an empty batch."""


# ----------------------------------------------------------------------------------------------------------- whole rows


class _Normalizer(NamedTuple):
    launch: PreparedLaunch
    new_output: memo.Allocate


_normalizers: memo.Memo[_Normalizer] = memo.Memo()
_NORMALIZE_VARYING = (
    *("input", "output", "top_k", "top_p", "temperature"),
    *("top_k_value", "top_p_value", "temperature_value"),
)


def normalize(
    op: str,
    input: torch.Tensor,
    top_k: PerRow = _EVERY,
    top_p: PerRow = _WHOLE,
    temperature: Optional[PerRow] = None,
    pdl: Optional[bool] = None,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    if is_dynamo_compiling():
        out = torch.empty(input.shape, dtype=_output_dtype(op, input), device=input.device)
        _normalize_door(op, input, top_k, top_p, temperature, pdl, out)
        return out
    k_value, k_ptr, k_like = top_k, 0, None
    if top_k is not _EVERY and not (top_k.__class__ is int and 1 <= top_k <= _LARGEST_COUNT):
        k_value, k_ptr, k_like = _count(op, top_k)
    p_value, p_ptr, p_like = top_p, 0, None
    if top_p is not _WHOLE and not (top_p.__class__ is float and 0.0 <= top_p <= 1.0):
        p_value, p_ptr, p_like = _fraction(op, "top_p", top_p)
    t_value, t_ptr, t_like = (1.0, 0, None) if temperature is None else _temperature(op, temperature)
    try:
        key = op, pdl, input.dtype, input.shape, input.stride(), input.device, k_like, p_like, t_like
        input_ptr = input.data_ptr() or checks.no_address(op, "the input", input)
    except AttributeError:
        raise checks.not_tensors(op, **{"the input": input}) from None
    prepared = _normalizers.find(key)
    if prepared is None:
        num_rows = _check_rows(op, input, None)
        given: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
        readable = {name: _readable(op, name, value, num_rows, input) for name, value in given.items()}
        if any(readable[name] is not value for name, value in given.items()):
            return normalize(op, input, **readable, pdl=pdl, out=out)
        prepared = _normalizers.remember(key, _prepare_normalizer(op, input, top_k, pdl))
    launch, new_output = prepared
    if out is None:
        out = new_output()
    launch(input_ptr, out.data_ptr(), k_ptr, p_ptr, t_ptr, k_value, p_value, t_value)
    return out


_normalize_door = traced.door(
    "normalize_rows",
    normalize,
    {
        **{"op": "str", "input": "Tensor"},
        **{"top_k": traced.INTEGER, "top_p": traced.REAL, "temperature": traced.REAL},
        **{"pdl": "bool?", "out": "Tensor(!)"},
    },
)


def _prepare_normalizer(op: str, input: torch.Tensor, top_k: PerRow, pdl: Optional[bool]) -> _Normalizer:
    num_rows, vocab_size = input.shape
    launch: PreparedLaunch = nothing
    if num_rows > 0:
        launcher, grid = kernel(families.NORMALIZE_ROW, {"op": _NORMALIZERS[op]}, input, num_rows, pdl)
        launch = launcher.prepare(
            grid,
            {
                "top_k_is_int64": isinstance(top_k, torch.Tensor) and top_k.dtype is torch.int64,
                "input_stride": input.stride(0),
                "num_rows": num_rows,
                "vocab_size": vocab_size,
            },
            varying=_NORMALIZE_VARYING,
        )
    return _Normalizer(launch, memo.allocator(input.shape, _output_dtype(op, input), input.device))


def _output_dtype(op: str, input: torch.Tensor) -> torch.dtype:
    return torch.float32 if op == "softmax" else input.dtype
