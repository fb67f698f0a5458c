# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm over the last axis, with the residual addition of a transformer block fused in."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.families.layout import DTYPES, FP8_DTYPES, fast_divisor, inside, vec_size
from flashinfer.families.norm import GATED_RMSNORM, GATED_RMSNORM_QUANT, LAYERNORM, RMSNORM, RMSNORM_QUANT
from flashinfer.host import checks, memo, quant_scale, traced
from flashinfer.host.quant_scale import Scale
from flashinfer.host.rows import common_rows, require_distinct
from flashinfer.host.traced import is_dynamo_compiling
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
    "gated_rmsnorm",
    "gated_rmsnorm_quant",
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
        input: `[..., hidden_size]`, fp16, bf16 or fp32; unit stride in the last axis. Rows lie evenly in memory, or in
            even groups, as the heads of a packed projection do.
        weight: `[hidden_size]`, dtype and device of input.
        eps: added to the mean of squares; not negative.
        out: shape and dtype of input; rows as there, in the same groups or evenly. May be input itself, but not
            overlap it otherwise. Allocated when None.
        enable_pdl: programmatic dependent launch: the start of this kernel overlaps the end of the one before it; None:
            where the hardware has it (sm_90 and later).

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, device, stride or number does not fit, or elements of what is written share memory.
        TypeError: an argument is of another kind.
        UnsupportedConfig: no kernel for this dtype, device or hidden_size (at most 32768).
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
    to the dtype of residual.

    Args:
        input: `[..., hidden_size]`, as in `rmsnorm`; overwritten with the normalized sum.
        residual: shape, dtype and device of input, in other memory; overwritten with the sum.
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
        scale: a positive number, or a float32 tensor of one element on the device of input.

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


def gated_rmsnorm(
    input: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: Optional[torch.Tensor] = None,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    """RMSNorm and the output gate of a linear attention: `rmsnorm(input, weight) * silu(gate)`, computed in fp32.

    Args:
        input, weight, eps, enable_pdl: as in `rmsnorm`; for a norm of each head, `[tokens, heads, head_dim]`.
        gate: shape, dtype and device of input; rows as there, in the same groups or evenly.
        out: as in `rmsnorm`; may be input or gate itself, but not overlap them otherwise.

    Returns:
        `out`.

    Raises: as `rmsnorm`.
    """
    return _normalize("gated_rmsnorm", (input, gate, weight, None), out, eps, enable_pdl)


def gated_rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    scale: Scale,
    eps: float = 1e-6,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    """`gated_rmsnorm(input, gate, weight) / scale`, rounded to nearest even and saturated to fp8.

    Arguments as in `rmsnorm_quant` and `gated_rmsnorm`. Returns `out`.
    """
    _normalize_quant("gated_rmsnorm_quant", (input, gate, weight, None), out, scale, eps, enable_pdl)
    return out


def layernorm(input: torch.Tensor, gemma: torch.Tensor, beta: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Layer normalization (Ba, Kiros & Hinton 2016, arXiv:1607.06450), computed in fp32.

    `out[..., i] = (input[..., i] - mean) / sqrt(var + eps) * gemma[i] + beta[i]`, var being the biased variance.

    Args:
        input: `[..., hidden_size]`, fp16, bf16 or fp32.
        gemma: scale, `[hidden_size]`; fp32 or any supported dtype.
        beta: shift, `[hidden_size]`, dtype of gemma.
        eps: added to the variance; not negative.

    Returns:
        A new tensor, shape and dtype of input.

    Raises: as `rmsnorm`.
    """
    return _normalize("layernorm", (input, None, gemma, beta), None, eps, None)


# ----------------------------------------------------------------------------------------------------------- one launch

_Operands = tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, Optional[torch.Tensor]]
"""input, residual or gate, weight, bias: with the output, the first fields of NormParams"""

_KERNELS: dict[str, tuple[Family, dict[str, ArgValue]]] = {
    "rmsnorm": (RMSNORM, {"add_residual": False, "gemma": False}),
    "gemma_rmsnorm": (RMSNORM, {"add_residual": False, "gemma": True}),
    "fused_add_rmsnorm": (RMSNORM, {"add_residual": True, "gemma": False}),
    "gemma_fused_add_rmsnorm": (RMSNORM, {"add_residual": True, "gemma": True}),
    "rmsnorm_quant": (RMSNORM_QUANT, {"add_residual": False}),
    "fused_add_rmsnorm_quant": (RMSNORM_QUANT, {"add_residual": True}),
    "gated_rmsnorm": (GATED_RMSNORM, {}),
    "gated_rmsnorm_quant": (GATED_RMSNORM_QUANT, {}),
    "layernorm": (LAYERNORM, {}),
}


def _second(op: str) -> str:
    """What the second operand is called."""
    return "gate" if op.startswith("gated") else "residual"


class _Prepared(NamedTuple):
    launch: PreparedLaunch  # takes the addresses of operands and output, after the scale of one that is quantized
    new_output: memo.Allocate


_memo: memo.Memo[_Prepared] = memo.Memo()


def _normalize(
    op: str, operands: _Operands, output: Optional[torch.Tensor], eps: float, pdl: Optional[bool]
) -> torch.Tensor:
    """Returns the output, allocated if it is None."""
    if is_dynamo_compiling():
        return _trace(op, operands, output, eps, pdl)
    input, residual, weight, bias = operands
    try:
        input_ptr = input.data_ptr() or checks.no_address(op, "input", input)
        weight_ptr = weight.data_ptr() or checks.no_address(op, "weight", weight)
        # What a launch depends on, written out rather than through memo.signature: three calls of it cost as much as
        # the rest of this function. To compare costs less than two more in the key, and what does not fit is refused.
        # Where there is an address the number of a device names it (memo.Memo).
        dtype, shape, device = input.dtype, input.shape, input.device
        output_ptr = residual_ptr = bias_ptr = 0  # a new output is aligned
        output_like: object = None
        residual_like: object = None
        bias_like: object = None
        if output is input:
            output_ptr, output_like = input_ptr, True
        elif output is not None:
            output_ptr = output.data_ptr() or checks.no_address(op, "out", output)
            fits = output_ptr and output.dtype is dtype and output.shape == shape
            output_like = (output.stride(), output.get_device()) if fits else memo.signature(output)
        if residual is not None:
            residual_ptr = residual.data_ptr() or checks.no_address(op, _second(op), residual)
            fits = residual_ptr and residual.dtype is dtype and residual.shape == shape
            like = (residual.stride(), residual.get_device()) if fits else memo.signature(residual)
            residual_like = residual_ptr == output_ptr, like
        if bias is not None:
            bias_ptr = bias.data_ptr() or checks.no_address(op, "beta", bias)
            bias_like = memo.signature(bias)
        key = (
            op, pdl, eps, (input_ptr | weight_ptr | output_ptr | residual_ptr) & 15, dtype, shape, input.stride(),
            device, weight.dtype, weight.shape, weight.is_contiguous(),
            weight.get_device() if weight_ptr else weight.device, output_like, residual_like, bias_like,
        )  # fmt: skip
    except (AttributeError, RuntimeError):
        _require_operands(op, operands, output)
        raise
    prepared = _memo.get(key)
    if prepared is None:
        prepared = _memo.remember(key, _prepare(op, operands, output, eps, pdl))
    launch, new_output = prepared
    if output is None:
        output = new_output()
        output_ptr = output.data_ptr()
    launch(input_ptr, residual_ptr, weight_ptr, bias_ptr, output_ptr)
    return output


def _trace(
    op: str, operands: _Operands, output: Optional[torch.Tensor], eps: float, pdl: Optional[bool]
) -> torch.Tensor:
    input = operands[0]
    if output is input:
        _door_in_place(op, operands, eps, pdl)
        return input
    if output is None:
        output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if op == "gated_rmsnorm":
        if output is operands[1]:
            output.copy_(_trace(op, operands, None, eps, pdl))
        else:
            _door_gated(op, operands, output, eps, pdl)
        return output
    _door(op, operands, output, eps, pdl)
    return output


def _normalize_quant(
    op: str, operands: _Operands, output: torch.Tensor, scale: Scale, eps: float, pdl: Optional[bool]
) -> None:
    if is_dynamo_compiling():
        (_door_gated_quant if op == "gated_rmsnorm_quant" else _door_quant)(op, operands, output, scale, eps, pdl)
        return
    input, residual, weight, _ = operands
    try:
        input_ptr = input.data_ptr() or checks.no_address(op, "input", input)
        weight_ptr = weight.data_ptr() or checks.no_address(op, "weight", weight)
        output_ptr = output.data_ptr() or checks.no_address(op, "out", output)
        device = input.device
        residual_ptr, residual_like = 0, None
        if residual is not None:
            residual_ptr = residual.data_ptr() or checks.no_address(op, _second(op), residual)
            shared = residual_ptr == output_ptr
            residual_like = shared, residual.dtype, residual.shape, residual.stride(), residual.device == device
        key = (
            op, pdl, eps, (input_ptr | weight_ptr | output_ptr | residual_ptr) & 15,
            input.dtype, input.shape, input.stride(), device,
            weight.dtype, weight.shape, weight.is_contiguous(), weight.device == device,
            output.dtype, output.shape, output.stride(), output.device == device,
            residual_like, quant_scale.signature(scale),
        )  # fmt: skip
    except (AttributeError, RuntimeError):
        _require_operands(op, operands, output)
        raise
    prepared = _memo.get(key)
    if prepared is None:
        quant_scale.check(op, "scale", scale, input.device, "input")
        prepared = _memo.remember(key, _prepare(op, operands, output, eps, pdl))
    prepared.launch(*quant_scale.values(scale, op), input_ptr, residual_ptr, weight_ptr, 0, output_ptr)


def _bundle(input: str, second: str = "Tensor(!)? residual") -> traced.Bundle:
    """Operands, the input being a tensor or, with (!), one that is written."""
    parts = (f"{input} input", second, "Tensor weight", "Tensor? bias")
    return traced.Bundle(parts, lambda operands: operands, lambda *operands: operands)


_SETTINGS = {"eps": "float", "pdl": "bool?"}
_door = traced.door(
    "normalize", _normalize, {"op": "str", "operands": _bundle("Tensor"), "output": "Tensor(!)", **_SETTINGS}
)
_door_in_place = traced.door(
    "normalize_in_place",
    lambda op, operands, eps, pdl: _normalize(op, operands, operands[0], eps, pdl),
    {"op": "str", "operands": _bundle("Tensor(!)"), **_SETTINGS},
)
_door_quant = traced.door(
    "normalize_quant",
    _normalize_quant,
    {"op": "str", "operands": _bundle("Tensor"), "output": "Tensor(!)", "scale": traced.REAL, **_SETTINGS},
)
_GATED = _bundle("Tensor", "Tensor gate")
_door_gated = traced.door(
    "normalize_gated", _normalize, {"op": "str", "operands": _GATED, "output": "Tensor(!)", **_SETTINGS}
)
_door_gated_quant = traced.door(
    "normalize_gated_quant",
    _normalize_quant,
    {"op": "str", "operands": _GATED, "output": "Tensor(!)", "scale": traced.REAL, **_SETTINGS},
)


def _prepare(
    op: str, operands: _Operands, output: Optional[torch.Tensor], eps: float, pdl: Optional[bool]
) -> _Prepared:
    _require_operands(op, operands, output)
    input, residual, weight, _ = operands
    new_output = memo.allocator(input.shape, input.dtype, input.device)
    output = new_output() if output is None else output
    _check(op, operands, output)
    eps = checks.real(op, "eps", eps, at_least=0.0)
    checks.require_flag(op, "enable_pdl", pdl)
    strided = {"input": input, "out": output} | ({} if residual is None else {_second(op): residual})
    num_rows, rows_per_group, (input_strides, output_strides, *residual_strides) = common_rows(op, strided)
    residual_row, residual_group = residual_strides[0] if residual_strides else (0, 0)
    if input.numel() == 0 or input.is_meta:
        return _Prepared(memo.no_launch, new_output)

    device_index = input.get_device()
    alignment = 0
    if device_index >= 0:  # vectors of the CPU kernels need no alignment
        for tensor in (input, weight, input if residual is None else residual):
            alignment |= tensor.data_ptr()
        # An fp8 output is written in shorter vectors: as many elements as are read.
        alignment |= output.data_ptr() * input.element_size() // output.element_size()
        for stride in (*input_strides, *output_strides, residual_row, residual_group):
            alignment |= stride * input.element_size()
    launcher = default_resolver().load(_spec(op, operands, output, alignment & 15)).on(device_index, pdl=pdl)
    grid = (1, 1, 1)
    if device_index >= 0:
        grid = (-(-num_rows // launcher.config.launch.units_per_block), 1, 1)
    values: dict[str, Value] = {
        "input_row_stride": input_strides[0],
        "input_group_stride": input_strides[1],
        "residual_row_stride": residual_row,
        "residual_group_stride": residual_group,
        "output_row_stride": output_strides[0],
        "output_group_stride": output_strides[1],
        "num_rows": num_rows,
        **fast_divisor("rows_per_group", rows_per_group),
        "eps": eps,
    }
    addresses: tuple[str, ...] = ("input", "residual", "weight", "bias", "output")
    if op.endswith("_quant"):
        values = inside("norm", values)
        addresses = (*quant_scale.names("output_scale"), *(f"norm.{name}" for name in addresses))
    return _Prepared(launcher.prepare(grid, values, varying=addresses), new_output)


def _spec(op: str, operands: _Operands, output: torch.Tensor, alignment: int) -> KernelSpec:
    input, _, weight, _ = operands
    family, axes = _KERNELS[op]
    dtype, hidden_size = dtypes.short_name(input.dtype), input.shape[-1]
    if family is LAYERNORM:
        axes = {"weight_dtype": dtypes.short_name(weight.dtype)}
    elif op.endswith("_quant"):
        axes = {**axes, "out_dtype": dtypes.short_name(output.dtype)}
    width = vec_size(dtype, hidden_size, alignment)
    return family.spec(target.of_device(input.device), dtype=dtype, hidden_size=hidden_size, vec_size=width, **axes)


def _require_operands(op: str, operands: _Operands, output: Optional[torch.Tensor]) -> None:
    """All that the operator cannot do without, and what else is given."""
    input, residual, weight, bias = operands
    family, axes = _KERNELS[op]
    named: dict[str, object] = {"input": input, "gemma" if family is LAYERNORM else "weight": weight}
    if residual is not None or axes.get("add_residual") or _second(op) == "gate":
        named[_second(op)] = residual
    if family is LAYERNORM:
        named["beta"] = bias
    if output is not None or op.endswith("_quant"):
        named["out"] = output
    checks.require_addresses(op, **named)


def _check(op: str, operands: _Operands, output: torch.Tensor) -> None:
    input, residual, weight, bias = operands
    checks.require(input.dim() >= 1, op, "input has no dimensions; expected [..., hidden_size]")
    hidden_size = input.shape[-1]
    if bias is None:
        weight_name = "weight"
        checks.require_dtype_device(op, "weight", weight, input)
    else:
        weight_name = "gemma"
        checks.require_device(op, "gemma", weight, input)
        checks.require_like(op, "beta", bias, weight, "gemma")
        checks.require(bias.is_contiguous(), op, "beta is not contiguous; call .contiguous()")
    checks.require(
        weight.shape == (hidden_size,) and weight.is_contiguous(),
        op,
        f"{weight_name} has shape {list(weight.shape)}, strides {list(weight.stride())}; expected a contiguous "
        f"[{hidden_size}], the last dimension of input",
    )
    checks.require_supported(op, "input", input, DTYPES)
    checks.require_supported(op, weight_name, weight, DTYPES)
    checks.require_shape(op, "out", output, input)
    if op.endswith("_quant"):
        checks.require_device(op, "out", output, input)
        checks.require_supported(op, "out", output, FP8_DTYPES)
    else:
        checks.require_dtype_device(op, "out", output, input)
    written = "input" if output is input else "out"
    require_distinct(op, written, output)
    if residual is not None and _second(op) == "gate":
        checks.require_like(op, "gate", residual, input)
    elif residual is not None:
        checks.require_like(op, "residual", residual, input)
        require_distinct(op, "residual", residual)
        shared = residual.data_ptr() == output.data_ptr() and residual.numel() > 0 and not residual.is_meta
        checks.require(
            not shared, op, f"{written} and residual are one tensor; expected memory for each, call .clone()"
        )
