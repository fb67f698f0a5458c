"""Arguments of the operators of sampling: rows, parameters of one value or of one a row, random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, Union

import torch

from flashinfer import dtypes
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks, memo

Number = Union[int, float]
PerRow = Union[torch.Tensor, int, float, None]
Seed = Union[int, torch.Tensor, None]


def check_dtype(op: str, name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedConfig(f"{op}: {name} is {tensor.dtype}; expected float32, float16 or bfloat16")
    return dtypes.short_name(tensor.dtype)


def check_rows(op: str, input: torch.Tensor, indices: Optional[torch.Tensor]) -> str:
    dtype = check_dtype(op, "the input", input)
    checks.require(
        input.dim() == 2 and input.shape[1] >= 1,
        op,
        f"the input is {list(input.shape)}; expected [num_rows, vocab_size] with at least one token",
    )
    checks.require_unit_stride(op, "the input", input)
    if indices is not None:
        checks.require_device(op, "indices", indices, input)
        checks.require(
            indices.dtype in (torch.int32, torch.int64) and indices.dim() == 1 and indices.is_contiguous(),
            op,
            f"indices is {indices.dtype} {list(indices.shape)}; expected contiguous int32 or int64 [num_rows]",
        )
        checks.require(input.shape[0] > 0 or indices.shape[0] == 0, op, "indices names rows of an empty input")
    return dtype


def is_top_k_first(op: str, order: str) -> bool:
    if order == "top_k_first":
        return True
    if order == "joint":
        return False
    raise ValueError(f'{op}: filter_apply_order is {order!r}; expected "top_k_first" or "joint"')


# What a launch takes of a parameter: a number for all rows, or the address of one for each; and the signature of the
# tensor at that address, which decides whether the kernel can read it.
Parameter = tuple[Number, int, Optional[tuple[object, ...]]]
NO_TOP_K: Parameter = (0, 0, None)
ONE: Parameter = (1.0, 0, None)
ZERO: Parameter = (0.0, 0, None)
_LARGEST_COUNT = 0x7FFFFFFF  # keeps all, as does any count beyond the vocabulary


def count(value: Union[torch.Tensor, Number]) -> Parameter:
    if isinstance(value, torch.Tensor):
        return 0, value.data_ptr(), memo.signature(value)
    return min(max(int(value), 1), _LARGEST_COUNT), 0, None


def fraction(value: Union[torch.Tensor, Number]) -> Parameter:
    if isinstance(value, torch.Tensor):
        return 0.0, value.data_ptr(), memo.signature(value)
    return float(value), 0, None


def readable(
    op: str, names: tuple[str, ...], values: tuple[PerRow, ...], num_rows: int, input: torch.Tensor
) -> Optional[tuple[Any, ...]]:
    """The parameters as a kernel can read them, one contiguous entry per row; None if that is how they are."""
    converted = tuple(_readable_parameter(op, name, value, num_rows, input) for name, value in zip(names, values))
    return None if all(new is old for new, old in zip(converted, values)) else converted


def _readable_parameter(op: str, name: str, value: PerRow, num_rows: int, input: torch.Tensor) -> PerRow:
    if not isinstance(value, torch.Tensor):
        return value
    wanted = (torch.int32, torch.int64) if name == "top_k" else (torch.float32,)
    if value.dtype not in wanted:
        value = value.to(wanted[0])
    if value.numel() == 1 and num_rows != 1:
        value = value.reshape(1).expand(num_rows)
    checks.require(
        value.numel() == num_rows,
        op,
        f"{name} is a tensor {list(value.shape)}; expected a number or [{num_rows}], one entry per output row",
    )
    checks.require_device(op, name, value, input)
    return value.contiguous()


# ------------------------------------------------------------------------------------------------------- random numbers

_is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
_MASK = 0xFFFFFFFFFFFFFFFF


def random_state(
    op: str, input: torch.Tensor, random: tuple[Optional[torch.Generator], Seed, Seed], num_words: int
) -> tuple[Optional[torch.Tensor], int, int]:
    """(state on the device or None, seed, offset) for one launch that consumes `num_words` Philox words a row.

    random: generator, seed, offset.
    """
    generator, seed, offset = random
    if seed is not None or offset is not None:
        if isinstance(seed, torch.Tensor) or isinstance(offset, torch.Tensor):
            parts = [torch.as_tensor(0 if part is None else part, device=input.device) for part in (seed, offset)]
            return torch.stack([part.reshape(-1)[0].to(torch.int64) for part in parts]), 0, 0
        return None, int(seed or 0) & _MASK, int(offset or 0) & _MASK
    if not input.is_cuda:
        if generator is not None and generator.device.type != "cpu":
            raise _wrong_generator(op, generator, input)
        return None, int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator).item()), 0
    if generator is None:
        generator = torch.cuda.default_generators[input.get_device()]
    try:
        position = generator.get_offset()
    except RuntimeError:
        # It has none, or refuses because the stream is being captured: asking first would cost each call as much.
        if generator.device.type != "cuda":
            raise _wrong_generator(op, generator, input) from None
        if not _is_capturing():
            raise
        # The generator's state lives on the device while a graph is captured: draw our seed there, once a replay.
        return torch.empty(2, dtype=torch.int64, device=input.device).random_(generator=generator), 0, 0
    generator.set_offset(position + num_words)
    return None, generator.initial_seed(), position


def untraceable_generator(op: str) -> ValueError:
    return ValueError(f"{op}: torch.compile cannot trace a generator; leave it out, or pass seed and offset")


def _wrong_generator(op: str, generator: torch.Generator, input: torch.Tensor) -> ValueError:
    return ValueError(
        f"{op}: generator is on {generator.device}, the input on {input.device}; make one for that device"
    )
