# SPDX-License-Identifier: Apache-2.0
"""Products of fp8 operands with scales of blocks: 1 x 128 of activations, 128 x 128 of weights, as DeepSeek's models
have them (DeepSeek-V3's report, section 3.3)."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.gemm import QUANTIZE_GROUPS, SCALE_BLOCK
from flashinfer.gemm.launch import Operands, multiply
from flashinfer.host import checks, memo, traced
from flashinfer.host.rows import require_rows
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch, Value

_FP8 = torch.float8_e4m3fn
_HALF = torch.float16, torch.bfloat16
_GRANULARITY = 1, SCALE_BLOCK, SCALE_BLOCK


def gemm_fp8_nt_groupwise(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    scale_major_mode: Optional[str] = None,
    mma_sm: int = 1,
    scale_granularity_mnk: tuple[int, int, int] = _GRANULARITY,
    out: Optional[torch.Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
    backend: str = "cutlass",
) -> torch.Tensor:
    """`a @ b.T` of fp8 operands, each block of 128 products times the scales of its row and of its 128 columns. Sums
    are fp32, within a block those of the matrix unit, which on Hopper keeps some 14 bits.

    Args:
        a: `[m, k]`, float8_e4m3fn, rows at multiples of 16 bytes on a GPU.
        b: `[n, k]`, likewise. On a GPU k is a multiple of 16 and n of 8.
        a_scale: fp32, `[m, ceil(k / 128)]` with scale_major_mode "K", `[ceil(k / 128), m]` with "MN", at any strides.
        b_scale: fp32, `[ceil(n / 128), ceil(k / 128)]` with "K", the transpose of that with "MN".
        scale_major_mode: None: with backend "trtllm" a_scale as "K" and b_scale as "MN" has it, else whichever fits
            their shapes.
        scale_granularity_mnk: (1, 128, 128).
        out: `[m, n]`, written if given.
        out_dtype: torch.float16 or torch.bfloat16, the default, or that of out.
        mma_sm: chooses nothing, nor does backend otherwise.

    Returns:
        out.

    Raises:
        ValueError, TypeError: a shape, dtype, device or stride does not fit.
        UnsupportedConfig: a dtype, granularity or size without a kernel.
    """
    op = "gemm_fp8_nt_groupwise"
    _require_fp8(op, a=a, b=b)
    _require_matrices(op, 2, a=a, b=b, a_scale=a_scale, b_scale=b_scale)
    _require_granularity(op, scale_granularity_mnk)
    if scale_major_mode is None and backend == "trtllm":
        a_mode, b_mode = "K", "MN"
    else:
        a_mode = b_mode = _mode(op, scale_major_mode, a, b, a_scale, b_scale)
    out = _output(op, a.shape[0], b.shape[0], a, out, out_dtype)
    a_scale, b_scale = (x.mT if mode == "MN" else x for x, mode in ((a_scale, a_mode), (b_scale, b_mode)))
    multiply(op, Operands(a, b[None], a_scale, b_scale[None]), out)
    return out


def group_gemm_fp8_nt_groupwise(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    m_indptr: torch.Tensor,
    scale_granularity_mnk: tuple[int, int, int] = _GRANULARITY,
    scale_major_mode: str = "MN",
    mma_sm: int = 1,
    out: Optional[torch.Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
    backend: str = "trtllm",
    segment_alignment: int = 1,
) -> torch.Tensor:
    """As `gemm_fp8_nt_groupwise`, of segments of rows, each with a matrix of its own: the experts of a mixture.

    Args:
        a: `[m, k]`, float8_e4m3fn.
        b: `[num_groups, n, k]`, float8_e4m3fn.
        a_scale: fp32, `[ceil(k / 128), m]` with scale_major_mode "MN", `[m, ceil(k / 128)]` with "K".
        b_scale: fp32, `[num_groups, ceil(k / 128), ceil(n / 128)]` with "MN",
            `[num_groups, ceil(n / 128), ceil(k / 128)]` with "K".
        m_indptr: int32 or int64 `[num_groups + 1]`: group i has rows m_indptr[i] to m_indptr[i + 1], at any multiple.
        out: `[m, n]`; rows of no group are left as they are. Allocated when None.
        scale_granularity_mnk: (1, 128, 128).
        out_dtype: torch.float16 or torch.bfloat16, the default, or that of out.
        mma_sm, backend, segment_alignment: choose nothing.

    Returns:
        out.

    Raises: as `gemm_fp8_nt_groupwise`; IndexError for offsets past the end, where the host sees them (docs/safety.md).
    """
    op = "group_gemm_fp8_nt_groupwise"
    _require_fp8(op, a=a, b=b)
    _require_matrices(op, 2, a=a, a_scale=a_scale)
    _require_matrices(op, 3, b=b, b_scale=b_scale)
    _require_granularity(op, scale_granularity_mnk)
    if scale_major_mode not in ("MN", "K"):
        raise ValueError(f"{op}: scale_major_mode is {scale_major_mode!r:.20}; expected 'MN' or 'K'")
    checks.require(isinstance(m_indptr, torch.Tensor), op, "m_indptr is no tensor; expected [num_groups + 1]")
    out = _output(op, a.shape[0], b.shape[1], a, out, out_dtype)
    if scale_major_mode == "MN":
        a_scale, b_scale = a_scale.mT, b_scale.mT
    multiply(op, Operands(a, b, a_scale, b_scale, m_indptr), out)
    return out


def fp8_blockscale_gemm_sm90(
    input: torch.Tensor,
    weight: torch.Tensor,
    input_scale: Optional[torch.Tensor] = None,
    weight_scale: Optional[torch.Tensor] = None,
    out: Optional[torch.Tensor] = None,
    out_dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """`input @ weight.T` in fp8 with scales of blocks. What comes in 16 bits is quantized first: 1 x 128 elements have
    a scale, their largest over 448. On every GPU, and the CPU.

    Args:
        input: `[m, k]`: fp16 or bf16, k a multiple of 128; or float8_e4m3fn with input_scale.
        weight: `[n, k]`: float8_e4m3fn with weight_scale; or fp16 or bf16, quantized anew in every call.
        input_scale: fp32 `[m, ceil(k / 128)]`, at any strides.
        weight_scale: fp32 `[ceil(n / 128), ceil(k / 128)]`, or `[n, ceil(k / 128)]`, which no Hopper kernel has.
        out: `[m, n]`, written if given.
        out_dtype: torch.float16 or torch.bfloat16, the default, or that of out.

    Returns:
        out.

    Raises: as `gemm_fp8_nt_groupwise`.
    """
    op = "fp8_blockscale_gemm_sm90"
    _require_matrices(op, 2, input=input, weight=weight)
    if input.shape[1] != weight.shape[1]:
        shapes = f"input has shape {list(input.shape)}, weight {list(weight.shape)}"
        raise ValueError(f"{op}: {shapes}; expected [m, k] and [n, k]")
    if input.dtype == _FP8 and weight.dtype != _FP8:
        raise UnsupportedConfig(f"{op}: input is {input.dtype}, weight {weight.dtype}; expected a weight of 8 bits too")
    out = _output(op, input.shape[0], weight.shape[0], input, out, out_dtype)
    a, a_scale = _quantized(op, "input", input, input_scale)
    b, b_scale = _quantized(op, "weight", weight, weight_scale)
    multiply(op, Operands(a, b[None], a_scale, b_scale[None]), out)
    return out


# Every call passes through what follows: messages are made where there is a fault.


def _require_matrices(op: str, num_axes: int, **given: torch.Tensor) -> None:
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise checks.not_tensors(op, **{name: tensor})
        if tensor.dim() != num_axes:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected {num_axes} dimensions")


def _require_fp8(op: str, **given: torch.Tensor) -> None:
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise checks.not_tensors(op, **{name: tensor})
        if tensor.dtype != _FP8:
            raise UnsupportedConfig(f"{op}: {name} is {tensor.dtype}; expected {_FP8}")


def _require_granularity(op: str, granularity: tuple[int, int, int]) -> None:
    if not isinstance(granularity, (tuple, list)) or tuple(granularity) != _GRANULARITY:
        raise UnsupportedConfig(f"{op}: scale_granularity_mnk is {granularity!r:.60}; expected {_GRANULARITY}")


def _mode(
    op: str, mode: Optional[str], a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor
) -> str:
    if mode in ("MN", "K"):
        return mode
    checks.require(mode is None, op, f"scale_major_mode is {mode!r:.20}; expected 'MN', 'K' or None")
    blocks = -(-a.shape[1] // SCALE_BLOCK)
    by_depth = (a.shape[0], blocks), (-(-b.shape[0] // SCALE_BLOCK), blocks)
    found = tuple(a_scale.shape), tuple(b_scale.shape)
    is_either = by_depth == tuple(shape[::-1] for shape in by_depth)
    checks.require(
        not is_either, op, f"scales of shapes {found} may be either way; expected scale_major_mode 'MN' or 'K'"
    )
    return "K" if found == by_depth else "MN"


def _output(
    op: str,
    num_rows: int,
    num_columns: int,
    like: torch.Tensor,
    out: Optional[torch.Tensor],
    dtype: Optional[torch.dtype],
) -> torch.Tensor:
    if out is None:
        dtype = torch.bfloat16 if dtype is None else dtype
        if dtype not in _HALF:
            raise UnsupportedConfig(f"{op}: out_dtype is {dtype!r:.60}; expected torch.float16 or torch.bfloat16")
        return torch.empty((num_rows, num_columns), dtype=dtype, device=like.device)
    if not isinstance(out, torch.Tensor):
        raise checks.not_tensors(op, out=out)
    if dtype is not None and out.dtype != dtype:
        raise ValueError(f"{op}: out is {out.dtype}, out_dtype {dtype!r:.60}; expected one dtype")
    if out.dtype not in _HALF:
        raise UnsupportedConfig(f"{op}: out is {out.dtype}; expected torch.float16 or torch.bfloat16")
    return out


# --------------------------------------------------------------------------------------------------------- quantization


class _Quantizer(NamedTuple):
    launch: PreparedLaunch  # takes the addresses of input, output and scales
    new_output: memo.Allocate
    new_scale: memo.Allocate


_memo: memo.Memo[_Quantizer] = memo.Memo()


def _quantized(op: str, name: str, x: torch.Tensor, scale: Optional[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix in 8 bits, and its scales by row and block of the depth."""
    if x.dtype == _FP8:
        if scale is None:
            raise ValueError(f"{op}: {name}_scale is None; expected the scales of a {name} of 8 bits")
        _require_matrices(op, 2, **{f"{name}_scale": scale})
        return x, scale
    if x.dtype not in _HALF:
        raise UnsupportedConfig(f"{op}: {name} is {x.dtype}; expected {_FP8}, torch.float16 or torch.bfloat16")
    if scale is not None:
        raise ValueError(f"{op}: {name}_scale is given, and {name} {x.dtype}; expected None, or a {_FP8}")
    if traced.is_dynamo_compiling():
        output = torch.empty(x.shape, dtype=_FP8, device=x.device)
        scale = torch.empty((x.shape[1] // SCALE_BLOCK, x.shape[0]), dtype=torch.float32, device=x.device)
        _door(op, name, x, output, scale)
        return output, scale.mT
    address = _address(op, name, x)
    key = op, name, address & 15, memo.signature(x)
    quantizer = _memo.get(key)
    if quantizer is None:
        quantizer = _memo.remember(key, _prepare(op, name, x))
    output, scale = quantizer.new_output(), quantizer.new_scale()
    quantizer.launch(address, output.data_ptr(), scale.data_ptr())
    return output, scale.mT


def _quantize_into(op: str, name: str, x: torch.Tensor, output: torch.Tensor, scale: torch.Tensor) -> None:
    _prepare(op, name, x).launch(_address(op, name, x), output.data_ptr(), scale.data_ptr())


_door = traced.door(
    "quantize_groups",
    _quantize_into,
    {"op": "str", "name": "str", "x": "Tensor", "output": "Tensor(!)", "scale": "Tensor(!)"},
)


def _address(op: str, name: str, x: torch.Tensor) -> int:
    try:
        address = x.data_ptr()
    except RuntimeError:
        checks.require_addresses(op, **{name: x})
        raise
    return address if address >= checks.LOWEST_ADDRESS else checks.low_address(op, name, x)


def _prepare(op: str, name: str, x: torch.Tensor) -> _Quantizer:
    checks.require_tensors(op, **{name: x})
    num_rows, num_columns = x.shape
    if num_columns % SCALE_BLOCK:
        raise UnsupportedConfig(f"{op}: {name} has shape {list(x.shape)}; expected k in multiples of {SCALE_BLOCK}")
    require_rows(op, name, x)
    new_output = memo.allocator((num_rows, num_columns), _FP8, x.device)
    new_scale = memo.allocator((num_columns // SCALE_BLOCK, num_rows), torch.float32, x.device)
    if x.numel() == 0:
        return _Quantizer(memo.no_launch, new_output, new_scale)
    device_index = x.get_device()
    spec = QUANTIZE_GROUPS.spec(target.of_device(x.device), dtype=dtypes.short_name(x.dtype))
    launcher = default_resolver().load(spec).on(device_index)
    values: dict[str, Value] = {
        "input_row_stride": x.stride(0) if num_rows > 1 else 0,
        "num_rows": num_rows,
        "num_columns": num_columns,
    }
    grid = -(-x.numel() // (8 * launcher.config.launch.num_threads))
    launch = launcher.prepare((grid, 1, 1), values, varying=("input", "output", "scale"))
    return _Quantizer(launch, new_output, new_scale)
