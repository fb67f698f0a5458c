# SPDX-License-Identifier: Apache-2.0
"""Gated activations of a transformer's feed-forward layer, reading a fused gate-and-up projection."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.families.activation import ACT_AND_MUL, ACT_AND_MUL_QUANT
from flashinfer.families.layout import DTYPES, FP8_DTYPES, inside, vec_size
from flashinfer.host import checks, memo, quant_scale, traced
from flashinfer.host.quant_scale import Scale
from flashinfer.host.rows import common_rows, require_distinct
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.jit import ArgValue, default_resolver
from flashinfer.jit.loader import PreparedLaunch, Value

__all__ = ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul_quant"]


def silu_and_mul(
    input: torch.Tensor, out: Optional[torch.Tensor] = None, enable_pdl: Optional[bool] = None
) -> torch.Tensor:
    """SwiGLU's gating (Shazeer 2020, arXiv:2002.05202): `silu(input[..., :d]) * input[..., d:]`, computed in fp32.

    Args:
        input: `[..., 2 * d]`, fp16, bf16 or fp32; unit stride in the last axis. Rows lie evenly in memory, or in even
            groups.
        out: `[..., d]`, dtype and device of input; rows in the same groups or evenly. Shares no memory with input.
            Allocated when None.
        enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, device, stride or number does not fit, or elements of out share memory.
        TypeError: an argument is of another kind.
        UnsupportedConfig: no kernel for this dtype or device.
    """
    return _act_and_mul("silu_and_mul", "silu", input, out, enable_pdl)


def gelu_and_mul(
    input: torch.Tensor, out: Optional[torch.Tensor] = None, enable_pdl: Optional[bool] = None
) -> torch.Tensor:
    """`gelu(input[..., :d]) * input[..., d:]` with the exact GELU, x·Φ(x). Otherwise as `silu_and_mul`."""
    return _act_and_mul("gelu_and_mul", "gelu", input, out, enable_pdl)


def gelu_tanh_and_mul(
    input: torch.Tensor, out: Optional[torch.Tensor] = None, enable_pdl: Optional[bool] = None
) -> torch.Tensor:
    """`gelu(input[..., :d]) * input[..., d:]` with the tanh approximation of GELU. Otherwise as `silu_and_mul`."""
    return _act_and_mul("gelu_tanh_and_mul", "gelu_tanh", input, out, enable_pdl)


def silu_and_mul_quant(
    out: torch.Tensor, input: torch.Tensor, scale: Scale, enable_pdl: Optional[bool] = None
) -> torch.Tensor:
    """`silu_and_mul(input) / scale`, rounded to nearest even and saturated to fp8.

    Args:
        out: `[..., d]`, float8_e4m3fn or float8_e5m2.
        input, enable_pdl: as in `silu_and_mul`.
        scale: a positive number, or a float32 tensor of one element on the device of input.

    Returns:
        `out`.

    Raises: as `silu_and_mul`.
    """
    _act_and_mul_quant(out, input, scale, enable_pdl)
    return out


# ----------------------------------------------------------------------------------------------------------- one launch


class _Prepared(NamedTuple):
    launch: PreparedLaunch  # takes the addresses of input and output, after the scale of an fp8 output
    new_output: memo.Allocate


_memo: memo.Memo[_Prepared] = memo.Memo()


def _act_and_mul(
    op: str, gate: str, input: torch.Tensor, out: Optional[torch.Tensor], pdl: Optional[bool]
) -> torch.Tensor:
    """Returns the output, allocated if it is None."""
    if is_dynamo_compiling():
        if out is None:
            out = input.new_empty(_output_shape(op, input))
        _door(op, gate, input, out, pdl)
        return out
    try:
        input_ptr = input.data_ptr() or checks.no_address(op, "input", input)
        device = input.device
        output_ptr, output_like = 0, None  # a new output is aligned
        if out is not None:
            output_ptr = out.data_ptr() or checks.no_address(op, "out", out)
            output_like = out.dtype, out.shape, out.stride(), out.device == device
        # Written out: a call of memo.signature costs what these do.
        key = op, pdl, (input_ptr | output_ptr) & 15, input.dtype, input.shape, input.stride(), device, output_like
    except (AttributeError, RuntimeError):
        checks.require_addresses(op, input=input, **({} if out is None else {"out": out}))
        raise
    prepared = _memo.get(key)
    if prepared is None:
        prepared = _memo.remember(key, _prepare(op, gate, input, out, pdl))
    launch, new_output = prepared
    if out is None:
        out = new_output()
        output_ptr = out.data_ptr()
    launch(input_ptr, output_ptr)
    return out


def _act_and_mul_quant(out: torch.Tensor, input: torch.Tensor, scale: Scale, pdl: Optional[bool]) -> None:
    if is_dynamo_compiling():
        _door_quant(out, input, scale, pdl)
        return
    op = "silu_and_mul_quant"
    try:
        input_ptr = input.data_ptr() or checks.no_address(op, "input", input)
        output_ptr = out.data_ptr() or checks.no_address(op, "out", out)
        device = input.device
        key = (
            op, pdl, (input_ptr | output_ptr) & 15, input.dtype, input.shape, input.stride(), device,
            out.dtype, out.shape, out.stride(), out.device == device, quant_scale.signature(scale),
        )  # fmt: skip
    except (AttributeError, RuntimeError):
        checks.require_addresses(op, input=input, out=out)
        raise
    prepared = _memo.get(key)
    if prepared is None:
        quant_scale.check(op, "scale", scale, input.device, "input")
        prepared = _memo.remember(key, _prepare(op, "silu", input, out, pdl))
    prepared.launch(*quant_scale.values(scale, op), input_ptr, output_ptr)


_door = traced.door(
    "act_and_mul", _act_and_mul, {"op": "str", "gate": "str", "input": "Tensor", "out": "Tensor(!)", "pdl": "bool?"}
)
_door_quant = traced.door(
    "silu_and_mul_quant",
    _act_and_mul_quant,
    {"out": "Tensor(!)", "input": "Tensor", "scale": traced.REAL, "pdl": "bool?"},
)


def _output_shape(op: str, input: torch.Tensor) -> tuple[int, ...]:
    checks.require(
        input.dim() >= 1 and input.shape[-1] % 2 == 0,
        op,
        f"input has shape {list(input.shape)}; expected [..., 2 * hidden_size], an even last dimension",
    )
    return (*input.shape[:-1], input.shape[-1] // 2)


def _prepare(op: str, gate: str, input: torch.Tensor, out: Optional[torch.Tensor], pdl: Optional[bool]) -> _Prepared:
    checks.require_flag(op, "enable_pdl", pdl)
    shape, is_quant = _output_shape(op, input), op.endswith("_quant")
    new_output = memo.allocator(shape, input.dtype, input.device)
    out = new_output() if out is None else out
    checks.require_supported(op, "input", input, DTYPES)
    checks.require(out.shape == shape, op, f"out has shape {list(out.shape)}; expected {list(shape)}")
    checks.require_device(op, "out", out, input)
    if is_quant:
        checks.require_supported(op, "out", out, FP8_DTYPES)
    else:
        checks.require_dtype_device(op, "out", out, input)
    require_distinct(op, "out", out)
    num_rows, rows_per_group, (input_strides, output_strides) = common_rows(op, {"input": input, "out": out})
    if out.numel() == 0 or input.is_meta:
        return _Prepared(memo.no_launch, new_output)

    num_groups, hidden_size = num_rows // rows_per_group, shape[-1]
    checks.require(hidden_size < 1 << 31, op, f"hidden_size is {hidden_size}; expected at most {(1 << 31) - 1}")
    if rows_per_group > 65535:  # more than the third axis of a grid holds; in which order rows are visited is all one
        num_groups, rows_per_group = rows_per_group, num_groups
        input_strides, output_strides = input_strides[::-1], output_strides[::-1]
    device_index = input.get_device()
    alignment = 0
    if device_index >= 0:  # vectors of the CPU kernels need no alignment
        # In bytes of input: an fp8 output is written in shorter vectors, as many elements as are read.
        alignment = input.data_ptr() | out.data_ptr() * input.element_size() // out.element_size()
        for stride in (*input_strides, *output_strides):
            alignment |= stride * input.element_size()
    dtype = dtypes.short_name(input.dtype)
    width = vec_size(dtype, hidden_size, alignment & 15)
    axes: dict[str, ArgValue] = {"dtype": dtype, "gate": gate, "vec_size": width}
    if is_quant:
        axes["out_dtype"] = dtypes.short_name(out.dtype)
    spec = (ACT_AND_MUL_QUANT if is_quant else ACT_AND_MUL).spec(target.of_device(input.device), **axes)
    launcher = default_resolver().load(spec).on(device_index, pdl=pdl)
    columns_per_block = launcher.config.launch.num_threads * int(launcher.config.constants["kVecsPerThread"]) * width
    grid = (num_groups, -(-hidden_size // columns_per_block), rows_per_group)
    values: dict[str, Value] = {
        "input_row_stride": input_strides[0],
        "input_group_stride": input_strides[1],
        "output_row_stride": output_strides[0],
        "output_group_stride": output_strides[1],
        "num_groups": num_groups,
        "rows_per_group": rows_per_group,
        "hidden_size": hidden_size,
    }
    addresses: tuple[str, ...] = ("input", "output")
    if is_quant:
        values = inside("act_and_mul", values)
        addresses = (*quant_scale.names("output_scale"), *(f"act_and_mul.{name}" for name in addresses))
    return _Prepared(launcher.prepare(grid, values, varying=addresses), new_output)
