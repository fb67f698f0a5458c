"""RMSNorm and LayerNorm over the last axis, with the residual addition of a transformer block fused in."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.layout import FP8_DTYPES, inside, vec_size
from flashinfer.families.norm import LAYERNORM, RMSNORM, RMSNORM_QUANT
from flashinfer.host import checks, memo, quant_scale, traced
from flashinfer.host.quant_scale import Scale
from flashinfer.host.rows import even_rows, grouped_rows
from flashinfer.jit import ArgValue, Family, KernelSpec, default_resolver
from flashinfer.jit.loader import PreparedLaunch, Value

__all__ = [
    "rmsnorm",
    "fused_add_rmsnorm",
    "gemma_rmsnorm",
    "gemma_fused_add_rmsnorm",
    "layernorm",
    "rmsnorm_quant",
    "fused_add_rmsnorm_quant",
]


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: Optional[torch.Tensor] = None,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    """Root-mean-square normalization (Zhang & Sennrich 2019, arXiv:1910.07467).

    `out[..., i] = input[..., i] / sqrt(mean(input²) + eps) * weight[i]`, computed in fp32.

    Args:
        input: `[..., hidden_size]`, fp16, bf16 or fp32; unit stride in the last axis, at most two uneven leading axes.
        weight: `[hidden_size]`, dtype and device of input.
        eps: added to the mean of squares.
        out: shape and dtype of input; may be input itself. Allocated when None.
        enable_pdl: programmatic dependent launch: the start of this kernel overlaps the end of the one before it; None:
            where the hardware has it (sm_90 and later).

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit.
        UnsupportedConfig: no kernel for this dtype or hidden_size (at most 32768).
    """
    return _normalize("rmsnorm", (input, None, weight, None), out, eps, enable_pdl)


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: Optional[torch.Tensor] = None,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    """RMSNorm as Gemma defines it: the normalized row is multiplied by `1 + weight`. Otherwise as `rmsnorm`."""
    return _normalize("gemma_rmsnorm", (input, None, weight, None), out, eps, enable_pdl)


def fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: Optional[bool] = None,
) -> None:
    """Residual addition and RMSNorm in one pass, both in place.

    `residual += input`, then `input = rmsnorm(residual) * weight`. The norm is taken of the sum before it is rounded
    to the
    dtype of residual.

    Args:
        input: `[num_tokens, hidden_size]`; overwritten with the normalized sum.
        residual: shape, dtype and device of input; overwritten with the sum.
        weight, eps, enable_pdl: as in `rmsnorm`.

    Raises: as `rmsnorm`.
    """
    _normalize("fused_add_rmsnorm", (input, residual, weight, None), input, eps, enable_pdl)


def gemma_fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: Optional[bool] = None,
) -> None:
    """`fused_add_rmsnorm` with Gemma's `1 + weight`."""
    _normalize("gemma_fused_add_rmsnorm", (input, residual, weight, None), input, eps, enable_pdl)


def rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: Scale,
    eps: float = 1e-6,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    """`rmsnorm(input, weight) / scale`, rounded to nearest even and saturated to fp8.

    Args:
        out: shape of input, float8_e4m3fn or float8_e5m2.
        input, weight, eps, enable_pdl: as in `rmsnorm`.
        scale: a number, or a float32 tensor of one element on the device of input.

    Returns:
        `out`.

    Raises: as `rmsnorm`.
    """
    _normalize_quant("rmsnorm_quant", (input, None, weight, None), out, scale, eps, enable_pdl)
    return out


def fused_add_rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: Scale,
    eps: float = 1e-6,
    enable_pdl: Optional[bool] = None,
) -> None:
    """`residual += input`, then `out = rmsnorm(residual, weight) / scale`, in one pass.

    Unlike `fused_add_rmsnorm` it leaves input as it is. The norm is taken of the sum before it is rounded to the dtype
    of residual. Arguments as in `rmsnorm_quant` and `fused_add_rmsnorm`.
    """
    _normalize_quant("fused_add_rmsnorm_quant", (input, residual, weight, None), out, scale, eps, enable_pdl)


def layernorm(input: torch.Tensor, gemma: torch.Tensor, beta: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Layer normalization (Ba, Kiros & Hinton 2016, arXiv:1607.06450), computed in fp32.

    `out[..., i] = (input[..., i] - mean) / sqrt(var + eps) * gemma[i] + beta[i]`, var being the biased variance.

    Args:
        input: `[..., hidden_size]`, fp16, bf16 or fp32.
        gemma: scale, `[hidden_size]`; fp32 or any supported dtype.
        beta: shift, `[hidden_size]`, dtype of gemma.
        eps: added to the variance.

    Returns:
        A new tensor, shape and dtype of input.

    Raises: as `rmsnorm`.
    """
    return _normalize("layernorm", (input, None, gemma, beta), None, eps, None)


# ----------------------------------------------------------------------------------------------------------- one launch

_Inputs = tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, Optional[torch.Tensor]]
"""input, residual, weight, bias: with the output, the first fields of NormParams"""


class _Prepared(NamedTuple):
    launch: PreparedLaunch  # takes the addresses of inputs and output, after those of the scale if that is quantized
    new_output: memo.Allocate


_memo: memo.Memo[_Prepared] = memo.Memo()


def _normalize(
    op: str, inputs: _Inputs, output: Optional[torch.Tensor], eps: float, pdl: Optional[bool]
) -> torch.Tensor:
    """Returns the output, allocated if it is None."""
    input, residual, weight, bias = inputs
    if torch.compiler.is_dynamo_compiling():
        if output is None:
            output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
        if residual is None:
            _compiled(op, input, weight, bias, output, eps, pdl)
        else:
            _compiled_add(op, input, residual, weight, eps, pdl)
        return output
    input_ptr, weight_ptr = input.data_ptr(), weight.data_ptr()
    residual_ptr = 0 if residual is None else residual.data_ptr()
    output_ptr = 0 if output is None else output.data_ptr()  # a new output is aligned
    # Written out rather than through quant_scale.signature: three calls cost as much as the rest of this function.
    key = (
        op,
        pdl,
        eps,
        (input_ptr | weight_ptr | output_ptr | residual_ptr) & 15,
        input.dtype,
        input.shape,
        input.stride(),
        input.device,
        weight.dtype,
        weight.shape,
        weight.stride(),
        weight.device,
        output is input if output is input or output is None else memo.signature(output),
        None if residual is None else memo.signature(residual),
        None if bias is None else memo.signature(bias),
    )
    prepared = _memo.get(key)
    if prepared is None:
        prepared = _memo.remember(key, _prepare(op, inputs, output, eps, pdl))
    launch, new_output = prepared
    if output is None:
        output = new_output()
        output_ptr = output.data_ptr()
    launch(input_ptr, residual_ptr, weight_ptr, 0 if bias is None else bias.data_ptr(), output_ptr)
    return output


def _normalize_quant(
    op: str, inputs: _Inputs, output: torch.Tensor, scale: Scale, eps: float, pdl: Optional[bool]
) -> None:
    input, residual, weight, _ = inputs
    if torch.compiler.is_dynamo_compiling():
        _compiled_quant(op, output, input, residual, weight, *quant_scale.split(scale), eps, pdl)
        return
    input_ptr, weight_ptr, output_ptr = input.data_ptr(), weight.data_ptr(), output.data_ptr()
    residual_ptr = 0 if residual is None else residual.data_ptr()
    key = (
        op,
        pdl,
        eps,
        (input_ptr | weight_ptr | output_ptr | residual_ptr) & 15,
        memo.signature(input),
        memo.signature(weight),
        memo.signature(output),
        None if residual is None else memo.signature(residual),
        quant_scale.signature(scale),
    )
    prepared = _memo.get(key)
    if prepared is None:
        quant_scale.check(op, "scale", scale, input)
        prepared = _memo.remember(key, _prepare(op, inputs, output, eps, pdl))
    prepared.launch(*quant_scale.values(scale), input_ptr, residual_ptr, weight_ptr, 0, output_ptr)


_compiled = traced.compiled_op(
    "normalize(str op, Tensor input, Tensor weight, Tensor? bias, Tensor(a!) output, float eps, bool? pdl) -> ()",
    lambda op, input, weight, bias, output, *rest: _normalize(op, (input, None, weight, bias), output, *rest),
)
_compiled_add = traced.compiled_op(
    "add_and_normalize(str op, Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps, bool? pdl) -> ()",
    lambda op, input, residual, weight, *rest: _normalize(op, (input, residual, weight, None), input, *rest),
)
_compiled_quant = traced.compiled_op(
    "normalize_quant(str op, Tensor(a!) output, Tensor input, Tensor(b!)? residual, Tensor weight, "
    f"{quant_scale.SCHEMA.format('scale')}, float eps, bool? pdl) -> ()",
    lambda op, output, input, residual, weight, scale, scale_value, *rest: _normalize_quant(
        op, (input, residual, weight, None), output, quant_scale.join(scale, scale_value), *rest
    ),
)


def _prepare(op: str, inputs: _Inputs, output: Optional[torch.Tensor], eps: float, pdl: Optional[bool]) -> _Prepared:
    input, residual, weight, _ = inputs
    new_output = memo.allocator(input.shape, input.dtype, input.device)
    if output is None:
        output = new_output()
    _check(op, inputs, output)
    num_rows = input.numel() // max(1, input.shape[-1])
    if input.numel() == 0:
        return _Prepared(lambda *_: None, new_output)
    rows_per_group, input_row, input_group = grouped_rows(op, "input", input)
    output_rows_per_group, output_row, output_group = grouped_rows(op, "out", output)
    if rows_per_group == 1 and output_rows_per_group > 1:  # let both walk by the finer grouping
        rows_per_group, input_row, input_group = output_rows_per_group, input_group, input_group * output_rows_per_group
    elif output_rows_per_group == 1 and rows_per_group > 1:
        output_row, output_group = output_group, output_group * rows_per_group
    residual_row = 0
    if residual is not None:
        residual_row = even_rows(op, "residual", residual)

    tensors = [tensor for tensor in (input, residual, weight) if tensor is not None]
    device_index = input.get_device()
    alignment = 0
    if device_index >= 0:  # vectors of the CPU kernels need no alignment
        for tensor in tensors:
            alignment |= tensor.data_ptr()
        # An fp8 output is written in shorter vectors: as many elements as are read.
        alignment |= output.data_ptr() * input.element_size() // output.element_size()
        for stride in (input_row, input_group, output_row, output_group, residual_row):
            alignment |= stride * input.element_size()
    launcher = default_resolver().load(_spec(op, inputs, output, alignment & 15)).on(device_index, pdl=pdl)
    grid = (1, 1, 1)
    if device_index >= 0:
        rows_per_block = launcher.config.launch.num_threads // int(launcher.config.constants["kThreadsPerRow"])
        grid = (-(-num_rows // rows_per_block), 1, 1)
    values: dict[str, Value] = {
        "input_row_stride": input_row,
        "input_group_stride": input_group,
        "residual_row_stride": residual_row,
        "output_row_stride": output_row,
        "output_group_stride": output_group,
        "num_rows": num_rows,
        "rows_per_group": rows_per_group,
        "eps": eps,
    }
    addresses: tuple[str, ...] = ("input", "residual", "weight", "bias", "output")
    if op.endswith("_quant"):
        values = inside("norm", values)
        addresses = (*quant_scale.names("output_scale"), *(f"norm.{name}" for name in addresses))
    launch = launcher.prepare(grid, values, varying=addresses)
    return _Prepared(launch, new_output)


def _spec(op: str, inputs: _Inputs, output: torch.Tensor, alignment: int) -> KernelSpec:
    input, _, weight, _ = inputs
    dtype, hidden_size = dtypes.short_name(input.dtype), input.shape[-1]
    family: Family = LAYERNORM if op == "layernorm" else RMSNORM_QUANT if op.endswith("_quant") else RMSNORM
    if dtype not in family.axes["dtype"]:
        raise UnsupportedConfig(f"{op}: input is {input.dtype}; expected float16, bfloat16 or float32")
    args: dict[str, ArgValue] = {
        "dtype": dtype,
        "hidden_size": hidden_size,
        "vec_size": vec_size(dtype, hidden_size, alignment),
    }
    if family is LAYERNORM:
        args["weight_dtype"] = dtypes.short_name(weight.dtype)
    else:
        args["add_residual"] = "fused_add" in op
        if family is RMSNORM:
            args["gemma"] = op.startswith("gemma")
        else:
            args["out_dtype"] = dtypes.short_name(output.dtype)
            if args["out_dtype"] not in FP8_DTYPES:
                raise UnsupportedConfig(f"{op}: out is {output.dtype}; expected float8_e4m3fn or float8_e5m2")
    return family.spec(target.of_device(input.device), **args)


def _check(op: str, inputs: _Inputs, output: torch.Tensor) -> None:
    input, residual, weight, bias = inputs
    checks.require(input.dim() >= 1, op, "input has no dimensions; expected [..., hidden_size]")
    hidden_size = input.shape[-1]
    if bias is None:
        checks.require_dtype_device(op, "weight", weight, input)
    else:
        checks.require_device(op, "gemma", weight, input)
        checks.require_like(op, "beta", bias, weight, "gemma")
        checks.require(bias.is_contiguous(), op, "beta is not contiguous; call .contiguous()")
    checks.require(
        weight.shape == (hidden_size,) and weight.is_contiguous(),
        op,
        f"weight has shape {list(weight.shape)}, strides {list(weight.stride())}; expected a contiguous "
        f"[{hidden_size}], the last dimension of input",
    )
    if op.endswith("_quant"):
        checks.require_shape(op, "out", output, input)
        checks.require_device(op, "out", output, input)
    else:
        checks.require_like(op, "out", output, input)
    if residual is not None:
        checks.require_like(op, "residual", residual, input)
