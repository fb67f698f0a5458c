"""Gated activations of a transformer's feed-forward layer, reading a fused gate-and-up projection."""

from __future__ import annotations

from typing import Optional

import torch

from flashinfer import dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.activation import ACT_AND_MUL, ACT_AND_MUL_QUANT
from flashinfer.families.layout import FP8_DTYPES, inside, vec_size
from flashinfer.host import checks, memo, quant_scale, traced
from flashinfer.host.quant_scale import Scale
from flashinfer.host.rows import even_rows
from flashinfer.jit import ArgValue, default_resolver
from flashinfer.jit.loader import PreparedLaunch, Value

__all__ = ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul_quant"]


def silu_and_mul(
    input: torch.Tensor, out: Optional[torch.Tensor] = None, enable_pdl: Optional[bool] = None
) -> torch.Tensor:
    """SwiGLU's gating (Shazeer 2020, arXiv:2002.05202): `silu(input[..., :d]) * input[..., d:]`, computed in fp32.

    Args:
        input: `[..., 2 * d]`, fp16, bf16 or fp32; unit stride in the last axis, rows evenly spaced.
        out: `[..., d]`, dtype and device of input. Allocated when None.
        enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit.
        UnsupportedConfig: no kernel for this dtype.
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
        scale: a number, or a float32 tensor of one element on the device of input.

    Returns:
        `out`.

    Raises: as `silu_and_mul`.
    """
    if torch.compiler.is_dynamo_compiling():
        _quant_door(out, input, scale, enable_pdl)
    else:
        _run_quant(out, input, scale, enable_pdl)
    return out


def _run_quant(out: torch.Tensor, input: torch.Tensor, scale: Scale, enable_pdl: Optional[bool]) -> None:
    op = "silu_and_mul_quant"
    input_ptr, output_ptr = input.data_ptr(), out.data_ptr()
    alignment = (input_ptr | output_ptr) & 15
    key = (
        op,
        enable_pdl,
        alignment,
        memo.signature(input),
        memo.signature(out),
        quant_scale.signature(scale),
    )
    launch = _memo.get(key)
    if launch is None:
        quant_scale.check(op, "scale", scale, input)
        launch = _memo.remember(key, _prepare(op, "silu", input, out, enable_pdl))
    launch(*quant_scale.values(scale), input_ptr, output_ptr)


_quant_door = traced.door(
    "silu_and_mul_quant", _run_quant, {"out": "Tensor(!)", "input": "Tensor", "scale": traced.REAL, "pdl": "bool?"}
)


# Called with the addresses of input and output, after the scale of an fp8 output.
_memo: memo.Memo[PreparedLaunch] = memo.Memo()


def _act_and_mul(
    op: str, gate: str, input: torch.Tensor, out: Optional[torch.Tensor], pdl: Optional[bool]
) -> torch.Tensor:
    if out is None:
        out = input.new_empty(*input.shape[:-1], input.shape[-1] // 2)
    if torch.compiler.is_dynamo_compiling():
        _door(op, gate, input, out, pdl)
    else:
        _run(op, gate, input, out, pdl)
    return out


def _run(op: str, gate: str, input: torch.Tensor, out: torch.Tensor, pdl: Optional[bool]) -> None:
    input_ptr, output_ptr = input.data_ptr(), out.data_ptr()
    key = (op, pdl, (input_ptr | output_ptr) & 15, *memo.signature(input), *memo.signature(out))
    launch = _memo.get(key)
    if launch is None:
        launch = _memo.remember(key, _prepare(op, gate, input, out, pdl))
    launch(input_ptr, output_ptr)


_door = traced.door(
    "act_and_mul", _run, {"op": "str", "gate": "str", "input": "Tensor", "out": "Tensor(!)", "pdl": "bool?"}
)


def _prepare(op: str, gate: str, input: torch.Tensor, out: torch.Tensor, pdl: Optional[bool]) -> PreparedLaunch:
    checks.require(
        input.dim() >= 1 and input.shape[-1] % 2 == 0,
        op,
        f"input has shape {list(input.shape)}; expected [..., 2 * hidden_size], an even last dimension",
    )
    hidden_size = input.shape[-1] // 2
    expected = [*input.shape[:-1], hidden_size]
    checks.require(list(out.shape) == expected, op, f"out has shape {list(out.shape)}; expected {expected}")
    is_quant = op.endswith("_quant")
    if is_quant:
        checks.require_device(op, "out", out, input)
        if dtypes.short_name(out.dtype) not in FP8_DTYPES:
            raise UnsupportedConfig(f"{op}: out is {out.dtype}; expected float8_e4m3fn or float8_e5m2")
    else:
        checks.require_dtype_device(op, "out", out, input)
    dtype = dtypes.short_name(input.dtype)
    if dtype not in ACT_AND_MUL.axes["dtype"]:
        raise UnsupportedConfig(f"{op}: input is {input.dtype}; expected float16, bfloat16 or float32")
    input_stride, output_stride = even_rows(op, "input", input), even_rows(op, "out", out)
    if out.numel() == 0:
        return lambda *_: None

    device_index = input.get_device()
    alignment = 0
    if device_index >= 0:  # vectors of the CPU kernels need no alignment
        # In bytes of input: an fp8 output is written in shorter vectors, as many elements as are read.
        output_alignment = out.data_ptr() * input.element_size() // out.element_size()
        alignment = (input.data_ptr() | output_alignment | (input_stride | output_stride) * input.element_size()) & 15
    width = vec_size(dtype, hidden_size, alignment)
    family = ACT_AND_MUL_QUANT if is_quant else ACT_AND_MUL
    axes: dict[str, ArgValue] = {"dtype": dtype, "gate": gate, "vec_size": width}
    if is_quant:
        axes["out_dtype"] = dtypes.short_name(out.dtype)
    launcher = default_resolver().load(family.spec(target.of_device(input.device), **axes)).on(device_index, pdl=pdl)
    num_rows = out.numel() // hidden_size
    columns_per_block = launcher.config.launch.num_threads * int(launcher.config.constants["kVecsPerThread"]) * width
    grid = (num_rows, -(-hidden_size // columns_per_block), 1)
    values: dict[str, Value] = {
        "input_stride": input_stride, "output_stride": output_stride, "num_rows": num_rows, "hidden_size": hidden_size,
    }  # fmt: skip
    addresses: tuple[str, ...] = ("input", "output")
    if is_quant:
        values = inside("act_and_mul", values)
        addresses = (*quant_scale.names("output_scale"), *(f"act_and_mul.{name}" for name in addresses))
    return launcher.prepare(grid, values, varying=addresses)
