"""What the operators of sampling share: arguments, random numbers, and one prepared launch per signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, Union

import torch

from flashinfer import _op, dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.jit import resolver
from flashinfer.kernels import sampling as kernels

Number = Union[int, float]
PerRow = Union[torch.Tensor, int, float, None]
Seed = Union[int, torch.Tensor, None]
Samples = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]

# ----------------------------------------------------------------------------------------------------------- one launch

_Launch = Callable[..., None]
memo: _op.Memo[_Launch] = _op.Memo()
_NO_FILTER: tuple[Number, Number, Number] = (0, 1.0, 0.0)  # top_k (unread), top_p, min_p
_WORDS_PER_SAMPLE = 8  # Philox words a row consumes


def normalize(
    op: str,
    kernel_op: str,
    input: torch.Tensor,
    top_k: PerRow,
    top_p: PerRow,
    temperature: PerRow,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    out = torch.empty(input.shape, dtype=torch.float32 if kernel_op == "softmax" else input.dtype, device=input.device)
    if torch.compiler.is_dynamo_compiling():
        _compiled_normalize(op, kernel_op, input, *_split(top_k), *_split(top_p), *_split(temperature), enable_pdl, out)
    else:
        _normalize_into(op, kernel_op, input, top_k, top_p, temperature, enable_pdl, out)
    return out


def _normalize_into(
    op: str,
    kernel_op: str,
    input: torch.Tensor,
    top_k: PerRow,
    top_p: PerRow,
    temperature: PerRow,
    enable_pdl: Optional[bool],
    out: torch.Tensor,
) -> None:
    key = (op, enable_pdl, *_op.signature(input))
    launch = memo.get(key)
    if launch is None:
        launch = memo.remember(key, _prepare(op, "normalize_row", {"op": kernel_op}, input, None, bool(enable_pdl)))
    num_rows = input.shape[0]
    k_value, k_tensor = _per_row(op, "top_k", top_k, 0, num_rows, input)
    p_value, p_tensor = _per_row(op, "top_p", top_p, 1.0, num_rows, input)
    t_value, t_tensor = _per_row(op, "temperature", temperature, 1.0, num_rows, input)
    launch(
        input.data_ptr(), out.data_ptr(), 0, 0, None, k_tensor, p_tensor, None, t_tensor, 0, 0, 0,
        k_value, p_value, 0.0, t_value, 0,
    )  # fmt: skip


def sample(
    op: str,
    kind: str,
    filter: str,
    input: torch.Tensor,
    top_k: PerRow,
    top_p: PerRow,
    min_p: PerRow,
    top_k_first: bool,
    options: tuple[Any, ...],
) -> Samples:
    indices, generator, check_nan, seed, offset, return_valid = options
    num_rows = input.shape[0] if indices is None else indices.shape[0]
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=input.device)
    valid = torch.empty(num_rows, dtype=torch.bool, device=input.device) if return_valid else None
    if torch.compiler.is_dynamo_compiling():
        if generator is not None:
            raise ValueError(f"{op}: torch.compile cannot trace a generator; leave it out, or pass seed and offset")
        split = (*_split(top_k), *_split(top_p), *_split(min_p), top_k_first)
        start = (*_split(seed), *_split(offset))
        _compiled_sample(op, kind, filter, input, *split, indices, check_nan, *start, token_ids, valid)
    else:
        filters, random = (top_k, top_p, min_p, top_k_first), (generator, seed, offset)
        _sample_into(op, kind, filter, input, filters, indices, check_nan, random, token_ids, valid)
    return token_ids if valid is None else (token_ids, valid)


def _sample_into(
    op: str,
    kind: str,
    filter: str,
    input: torch.Tensor,
    filters: tuple[PerRow, PerRow, PerRow, bool],
    indices: Optional[torch.Tensor],
    check_nan: bool,
    random: tuple[Optional[torch.Generator], Seed, Seed],
    token_ids: torch.Tensor,
    valid: Optional[torch.Tensor],
) -> None:
    """filters: top_k, top_p, min_p, top_k_first; random: generator, seed, offset."""
    top_k, top_p, min_p, top_k_first = filters
    key = (op, *_op.signature(input), None if indices is None else _op.signature(indices))
    launch = memo.get(key)
    if launch is None:
        args = {"input": kind, "filter": filter}
        launch = memo.remember(key, _prepare(op, "sample_row", args, input, indices, False))
    if check_nan and bool(torch.isnan(input).any()):
        raise ValueError(f"{op}: the input holds NaN; find where the {kind} come from, or pass check_nan=False")
    num_rows = token_ids.shape[0]
    k_value, p_value, m_value = _NO_FILTER
    k_tensor = p_tensor = m_tensor = None
    if top_k is not None:
        k_value, k_tensor = _per_row(op, "top_k", top_k, 0, num_rows, input)
    if top_p is not None:
        p_value, p_tensor = _per_row(op, "top_p", top_p, 1.0, num_rows, input)
    if min_p is not None:
        m_value, m_tensor = _per_row(op, "min_p", min_p, 0.0, num_rows, input)
    state, seed_value, offset_value = random_state(op, input.device, *random, _WORDS_PER_SAMPLE)
    launch(
        input.data_ptr(), 0, token_ids.data_ptr(), 0 if valid is None else valid.data_ptr(), indices,
        k_tensor, p_tensor, m_tensor, None, 0 if state is None else state.data_ptr(), seed_value, offset_value,
        k_value, p_value, m_value, 1.0, top_k_first,
    )  # fmt: skip


def _split(value: Union[torch.Tensor, Number, None]) -> tuple[Optional[torch.Tensor], Optional[Number]]:
    """(tensor, None) or (None, number): a library operator takes the two as arguments of their own."""
    return (value, None) if isinstance(value, torch.Tensor) else (None, value)


def _join(pairs: tuple[Any, ...]) -> Any:
    """The inverse of `_split` over consecutive pairs."""
    return tuple(number if tensor is None else tensor for tensor, number in zip(pairs[::2], pairs[1::2]))


_compiled_normalize = _op.compiled_op(
    "normalize_rows(str op, str kernel_op, Tensor input, Tensor? top_k, int? top_k_value, Tensor? top_p, "
    "float? top_p_value, Tensor? temperature, float? temperature_value, bool? enable_pdl, Tensor(a!) out) -> ()",
    lambda op, kernel_op, input, *rest: _normalize_into(op, kernel_op, input, *_join(rest[:6]), *rest[6:]),
)
_compiled_sample = _op.compiled_op(
    "sample_rows(str op, str kind, str filter, Tensor input, Tensor? top_k, int? top_k_value, Tensor? top_p, "
    "float? top_p_value, Tensor? min_p, float? min_p_value, bool top_k_first, Tensor? indices, bool check_nan, "
    "Tensor? seed, int? seed_value, Tensor? offset, int? offset_value, Tensor(a!) token_ids, Tensor(b!)? valid) -> ()",
    lambda op, kind, filter, input, *rest: _sample_into(
        op,
        kind,
        filter,
        input,
        (*_join(rest[:6]), rest[6]),
        rest[7],
        rest[8],
        (None, *_join(rest[9:13])),
        rest[13],
        rest[14],
    ),
)


def _prepare(
    op: str, family: str, args: dict[str, Any], input: torch.Tensor, indices: Optional[torch.Tensor], pdl: bool
) -> _Launch:
    dtype = _check_rows(op, input, indices)
    num_rows = input.shape[0] if indices is None else indices.shape[0]
    vocab_size, device_index = input.shape[1], input.get_device()
    if num_rows == 0:
        return lambda *_: None
    machine = target.of_device(input.device)
    keeps_row = args.get("filter") != "none"
    place = kernels.placement(
        dtype, vocab_size, num_rows, _op.num_sms(device_index) if device_index >= 0 else 1, machine, keeps_row
    )
    chosen = kernels.SAMPLE_ROW if family == "sample_row" else kernels.NORMALIZE_ROW
    launcher = resolver().load(chosen.spec(machine, dtype=dtype, **args, **place)).on(device_index, pdl=pdl)
    grid = (num_rows * place["cluster_size"], 1, 1)
    input_stride = input.stride(0)
    current_stream = _op.current_stream
    indices_are_int64 = int(indices is not None and indices.dtype == torch.int64)

    def launch(
        input_ptr: int,
        output_ptr: int,
        token_ids_ptr: int,
        valid_ptr: int,
        indices: Optional[torch.Tensor],
        top_k: Optional[torch.Tensor],
        top_p: Optional[torch.Tensor],
        min_p: Optional[torch.Tensor],
        temperature: Optional[torch.Tensor],
        state_ptr: int,
        seed: int,
        offset: int,
        top_k_value: int,
        top_p_value: float,
        min_p_value: float,
        temperature_value: float,
        top_k_first: bool,
    ) -> None:
        launcher(
            grid,
            current_stream(device_index),
            input_ptr,
            output_ptr,
            token_ids_ptr,
            valid_ptr,
            0 if indices is None else indices.data_ptr(),
            0 if top_k is None else top_k.data_ptr(),
            0 if top_p is None else top_p.data_ptr(),
            0 if min_p is None else min_p.data_ptr(),
            0 if temperature is None else temperature.data_ptr(),
            state_ptr,
            seed,
            offset,
            input_stride,
            vocab_size,  # the output is contiguous
            num_rows,
            vocab_size,
            top_k_value,
            top_p_value,
            min_p_value,
            temperature_value,
            indices_are_int64,
            top_k is not None and top_k.dtype is torch.int64,
            top_k_first,
        )

    return launch


def prepare_speculative(
    op: str, draft_probs: torch.Tensor, draft_token_ids: torch.Tensor, target_probs: torch.Tensor
) -> _Launch:
    dtype = _check_dtype(op, "draft_probs", draft_probs)
    _op.require_dtype_device(op, "target_probs", target_probs, draft_probs, "draft_probs")
    _op.require_device(op, "draft_token_ids", draft_token_ids, draft_probs, "draft_probs")
    _op.require(
        target_probs.dim() == 3 and target_probs.shape[1] >= 1 and target_probs.shape[2] >= 1,
        op,
        f"target_probs is {list(target_probs.shape)}; expected [num_rows, num_draft + 1, vocab_size]",
    )
    num_rows, num_steps, vocab_size = target_probs.shape
    for name, tensor, expected in (
        ("draft_probs", draft_probs, (num_rows, num_steps - 1, vocab_size)),
        ("draft_token_ids", draft_token_ids, (num_rows, num_steps - 1)),
    ):
        _op.require(
            tensor.shape == expected,
            op,
            f"{name} is {list(tensor.shape)}; expected {list(expected)}, one step less than target_probs",
        )
    _op.require_unit_stride(op, "draft_probs", draft_probs)
    _op.require_unit_stride(op, "target_probs", target_probs)
    if num_rows == 0:
        return lambda *_: None
    machine, device_index = target.of_device(draft_probs.device), draft_probs.get_device()
    num_sms = _op.num_sms(device_index) if device_index >= 0 else 1
    place = kernels.placement(dtype, vocab_size, num_rows, num_sms, machine, keeps_row=False)
    spec = kernels.CHAIN_SPECULATIVE.spec(machine, dtype=dtype, cluster_size=place["cluster_size"])
    launcher = resolver().load(spec).on(device_index)
    grid = (num_rows * place["cluster_size"], 1, 1)
    strides = (*draft_probs.stride()[:2], *target_probs.stride()[:2])

    def launch(*values: int) -> None:
        launcher(grid, _op.current_stream(device_index), *values, *strides, num_rows, num_steps - 1, vocab_size)

    return launch


# ------------------------------------------------------------------------------------------------------------ arguments


def _check_dtype(op: str, name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedConfig(f"{op}: {name} is {tensor.dtype}; expected float32, float16 or bfloat16")
    return dtypes.short_name(tensor.dtype)


def _check_rows(op: str, input: torch.Tensor, indices: Optional[torch.Tensor]) -> str:
    dtype = _check_dtype(op, "the input", input)
    _op.require(
        input.dim() == 2 and input.shape[1] >= 1,
        op,
        f"the input is {list(input.shape)}; expected [num_rows, vocab_size] with at least one token",
    )
    _op.require_unit_stride(op, "the input", input)
    if indices is not None:
        _op.require_device(op, "indices", indices, input)
        _op.require(
            indices.dtype in (torch.int32, torch.int64) and indices.dim() == 1 and indices.is_contiguous(),
            op,
            f"indices is {indices.dtype} {list(indices.shape)}; expected contiguous int32 or int64 [num_rows]",
        )
        _op.require(input.shape[0] > 0 or indices.shape[0] == 0, op, "indices names rows of an empty input")
    return dtype


def is_top_k_first(op: str, order: str) -> bool:
    _op.require(
        order in ("top_k_first", "joint"), op, f'filter_apply_order is {order!r}; expected "top_k_first" or "joint"'
    )
    return order == "top_k_first"


def _per_row(
    op: str, name: str, value: PerRow, default: Number, num_rows: int, input: torch.Tensor
) -> tuple[Number, Optional[torch.Tensor]]:
    """(number, None), or (default, a tensor the kernel can read: one contiguous entry per row)."""
    if value is None:
        return default, None
    if not isinstance(value, torch.Tensor):
        # A count beyond int32 keeps all, as does any beyond the vocabulary.
        return (min(max(int(value), 1), 0x7FFFFFFF) if name == "top_k" else float(value)), None
    wanted = (torch.int32, torch.int64) if name == "top_k" else (torch.float32,)
    if value.dtype not in wanted:
        value = value.to(wanted[0])
    if value.numel() == 1 and num_rows != 1:
        value = value.reshape(1).expand(num_rows).contiguous()
    _op.require(
        value.numel() == num_rows,
        op,
        f"{name} is a tensor {list(value.shape)}; expected a number or [{num_rows}], one entry per output row",
    )
    _op.require_device(op, name, value, input)
    return default, value if value.is_contiguous() else value.contiguous()


# ------------------------------------------------------------------------------------------------------- random numbers

_is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
_MASK = 0xFFFFFFFFFFFFFFFF


def random_state(
    op: str, device: torch.device, generator: Optional[torch.Generator], seed: Seed, offset: Seed, num_words: int
) -> tuple[Optional[torch.Tensor], int, int]:
    """(state on the device or None, seed, offset) for one launch that consumes `num_words` Philox words a row."""
    if seed is not None or offset is not None:
        if isinstance(seed, torch.Tensor) or isinstance(offset, torch.Tensor):
            parts = [torch.as_tensor(0 if part is None else part, device=device) for part in (seed, offset)]
            return torch.stack([part.reshape(-1)[0].to(torch.int64) for part in parts]), 0, 0
        return None, int(seed or 0) & _MASK, int(offset or 0) & _MASK
    if device.type == "cuda":
        if generator is None:
            generator = torch.cuda.default_generators[device.index]
        elif generator.device.type != "cuda":
            raise _wrong_generator(op, generator, device)
        if _is_capturing():
            # The generator's state lives on the device while a graph is captured: draw our seed there, once a replay.
            return torch.empty(2, dtype=torch.int64, device=device).random_(generator=generator), 0, 0
        position = generator.get_offset()
        generator.set_offset(position + num_words)
        return None, generator.initial_seed(), position
    if generator is not None and generator.device.type != "cpu":
        raise _wrong_generator(op, generator, device)
    return None, int(torch.empty((), dtype=torch.int64).random_(generator=generator).item()), 0


def _wrong_generator(op: str, generator: torch.Generator, device: torch.device) -> ValueError:
    return ValueError(f"{op}: generator is on {generator.device}, the input on {device}; make one for that device")
