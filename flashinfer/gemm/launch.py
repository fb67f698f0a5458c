# SPDX-License-Identifier: Apache-2.0
"""One launch of products of segments of rows with weights (csrc/gemm/params.h)."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import gemm as families
from flashinfer.gemm import sm90
from flashinfer.host import checks, indices, memo, traced
from flashinfer.host.rows import require_distinct
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch, Value


class Operands(NamedTuple):
    """What is multiplied, as the kernels have it.

    a: [num_rows, depth]
    b: [num_weights, num_columns, depth], or with depth_major False [num_weights, depth, num_columns]
    a_scale: [num_rows, depth blocks]; b_scale: [num_weights, columns or blocks of 128, depth blocks]; both or none
    indptr: [num_groups + 1]; None: one group of all rows
    weight_indices: [num_groups], below 0: the group's rows are left as they are; None: group i has weight i
    """

    a: torch.Tensor
    b: torch.Tensor
    a_scale: Optional[torch.Tensor] = None
    b_scale: Optional[torch.Tensor] = None
    indptr: Optional[torch.Tensor] = None
    weight_indices: Optional[torch.Tensor] = None


class _Prepared(NamedTuple):
    launch: PreparedLaunch  # takes the addresses of operands and output
    num_absent: int  # of operands: None, or empty, which have the address 0
    checks_values: bool


_memo: memo.Memo[_Prepared] = memo.Memo()


def multiply(op: str, operands: Operands, output: torch.Tensor, depth_major: bool = True) -> None:
    """Checks everything but that there are tensors where there must be. Raises as the public functions say."""
    if traced.is_dynamo_compiling():
        _door(op, operands, output, depth_major)
        return
    tensors = (*operands, output)
    try:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        is_aligned = not (addresses[0] | addresses[1] | addresses[6]) & 15
        key = op, depth_major, is_aligned, *(None if tensor is None else memo.signature(tensor) for tensor in tensors)
        prepared = _memo.get(key)
    except (AttributeError, RuntimeError, TypeError):
        checks.require_addresses(op, **_named(operands, output))
        raise
    if prepared is None:
        prepared = _memo.remember(key, _prepare(op, operands, output, depth_major, addresses.count(0)))
    # Of the same signature, but in memory that was given back.
    if addresses.count(0) != prepared.num_absent or min(filter(None, addresses), default=0) < checks.LOWEST_ADDRESS:
        for name, tensor in _named(operands, output).items():
            if tensor.data_ptr() < checks.LOWEST_ADDRESS:
                checks.low_address(op, name, tensor)
    if prepared.checks_values and indices.are_visible(*operands[4:]):
        _check_values(op, operands)
    prepared.launch(*addresses)


_OPERANDS = traced.fields(
    Operands, "Tensor a", "Tensor b", "Tensor? a_scale", "Tensor? b_scale", "Tensor? indptr", "Tensor? weight_indices"
)
_door = traced.door(
    "group_gemm", multiply, {"op": "str", "operands": _OPERANDS, "output": "Tensor(!)", "depth_major": "bool"}
)


def _named(operands: Operands, output: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: x for name, x in (*operands._asdict().items(), ("output", output)) if x is not None}


def _prepare(op: str, operands: Operands, output: torch.Tensor, depth_major: bool, num_absent: int) -> _Prepared:
    _check(op, operands, output, depth_major)
    a, b, a_scale, b_scale, indptr, weight_indices = operands
    num_rows, depth = a.shape
    num_weights, num_columns = b.shape[0], b.shape[1 if depth_major else 2]
    num_groups = 1 if indptr is None else indptr.shape[0] - 1
    checks_values = indices.may_be_visible(indptr, weight_indices)
    if output.numel() == 0 or num_groups == 0 or num_weights == 0:
        return _Prepared(memo.no_launch, num_absent, checks_values)
    device_index = a.get_device()
    spec = families.group_gemm(
        target.of_device(a.device),
        dtype=dtypes.short_name(a.dtype),
        out_dtype=dtypes.short_name(output.dtype),
        depth_major=depth_major,
        scale_columns=_scale_columns(b_scale, num_columns),
        num_rows=num_rows,
        num_groups=None if indptr is None else num_groups,
        num_columns=num_columns,
        depth=depth,
        num_sms=memo.num_sms(device_index) if device_index >= 0 else 1,
    )
    values: dict[str, Value] = {
        "a_row_stride": a.stride(0),
        "b_weight_stride": b.stride(0),
        "b_row_stride": b.stride(1),
        "output_row_stride": output.stride(0),
        **dict(zip(("a_scale_row_stride", "a_scale_block_stride"), _strides(a_scale, 2))),
        **dict(
            zip(("b_scale_weight_stride", "b_scale_row_stride", "b_scale_block_stride"), _strides(b_scale, 3)),
        ),
        "num_rows": num_rows,
        "num_columns": num_columns,
        "depth": depth,
        "num_groups": num_groups,
        "num_weights": num_weights,
        "has_long_indptr": int(indptr is not None and indptr.dtype == torch.int64),
        "has_long_indices": int(weight_indices is not None and weight_indices.dtype == torch.int64),
        "reserved": 0,
    }
    launcher = default_resolver().load(spec).on(device_index)
    if device_index < 0:
        return _Prepared(launcher.prepare((1, 1, 1), values, varying=families.ADDRESSES), num_absent, checks_values)
    grid = families.grid(launcher.config, num_rows, num_groups, num_columns, memo.num_sms(device_index))
    checks.require(grid < 1 << 31, op, f"{num_rows} rows of {num_columns} columns are too many tiles")
    if launcher.params is families.Sm90GroupGemmParams:
        return _Prepared(sm90.bind_launch(launcher, grid, values), num_absent, checks_values)
    return _Prepared(launcher.prepare((grid, 1, 1), values, varying=families.ADDRESSES), num_absent, checks_values)


def _strides(tensor: Optional[torch.Tensor], num: int) -> tuple[int, ...]:
    return (0,) * num if tensor is None else tensor.stride()


def _scale_columns(b_scale: Optional[torch.Tensor], num_columns: int) -> int:
    """Columns that have a scale in common. Of a single block of 128 columns, one of one column is such a block."""
    if b_scale is None:
        return 0
    return 1 if b_scale.shape[1] == num_columns > 1 else families.SCALE_BLOCK


def _check(op: str, operands: Operands, output: torch.Tensor, depth_major: bool) -> None:
    checks.require_tensors(op, **_named(operands, output))
    a, b, a_scale, b_scale, indptr, weight_indices = operands
    shapes = f"a is {list(a.shape)}, b {list(b.shape)}"
    expected = "[num_rows, k] and [num_weights, " + ("n, k]" if depth_major else "k, n]")
    fits = a.dim() == 2 and b.dim() == 3 and a.shape[1] == b.shape[2 if depth_major else 1] > 0
    checks.require(fits, op, f"{shapes}; expected {expected}")
    num_rows, depth = a.shape
    num_columns = b.shape[1 if depth_major else 2]
    checks.require_dtype_device(op, "b", b, a, "a")
    checks.require(
        output.shape == (num_rows, num_columns), op,
        f"output has shape {list(output.shape)}; expected {[num_rows, num_columns]}",
    )  # fmt: skip
    for name, tensor in _named(operands, output).items():
        checks.require_device(op, name, tensor, a, "a")
    for name, tensor in (("a", a), ("b", b), ("output", output)):
        _require_dense_rows(op, name, tensor)
    if a.is_cuda and (depth * a.element_size() % 16 or num_columns % 8):
        raise UnsupportedConfig(
            f"{op}: {shapes}; expected k in multiples of {16 // a.element_size()} and n in multiples of 8 on a GPU"
        )
    require_distinct(op, "output", output)
    if a_scale is not None and b_scale is not None:
        blocks = -(-depth // families.SCALE_BLOCK)
        rows = (-(-num_columns // families.SCALE_BLOCK), num_columns)
        wanted = f"[{num_rows}, {blocks}] and [{b.shape[0]}, {rows[0]} or {rows[1]}, {blocks}]"
        fits = a_scale.shape == (num_rows, blocks) and b_scale.dim() == 3 and b_scale.shape[1] in rows
        fits = fits and b_scale.shape == (b.shape[0], b_scale.shape[1], blocks)
        checks.require(
            fits and a_scale.dtype == b_scale.dtype == torch.float32, op,
            f"scales are {a_scale.dtype} {list(a_scale.shape)} and {b_scale.dtype} {list(b_scale.shape)}, rows and "
            f"weights first; expected torch.float32 {wanted}",
        )  # fmt: skip
    num_groups = 1
    if indptr is not None:
        checks.check_index(op, "indptr", indptr)
        checks.require(indptr.shape[0] > 0, op, "indptr is empty; expected [num_groups + 1]")
        num_groups = indptr.shape[0] - 1
    if weight_indices is not None:
        checks.check_index(op, "weight_indices", weight_indices, num_groups)
    else:
        checks.require(
            b.shape[0] >= num_groups, op, f"{num_groups} groups have {b.shape[0]} weights; expected one for each"
        )


def _require_dense_rows(op: str, name: str, tensor: torch.Tensor) -> None:
    """Rows that do not overlap, at multiples of 16 bytes on a GPU."""
    *_, num_rows, width = tensor.shape
    row_stride, stride = tensor.stride()[-2:]
    is_dense = (width <= 1 or stride == 1) and (num_rows <= 1 or row_stride >= width)
    found = f"{name} has strides {list(tensor.stride())} at shape {list(tensor.shape)}"
    checks.require(is_dense, op, f"{found}; expected dense rows, call .contiguous()")
    if tensor.is_cuda and tensor.numel():
        size = tensor.element_size()
        strides = [stride for length, stride in zip(tensor.shape[:-1], tensor.stride()) if length > 1]
        is_aligned = tensor.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 and stride > 0 for stride in strides)
        checks.require(is_aligned, op, f"{found}; expected rows at multiples of 16 bytes, call .contiguous()")


def _check_values(op: str, operands: Operands) -> None:
    if operands.indptr is not None:
        indices.require_offsets(op, "indptr", operands.indptr, operands.a.shape[0], "the rows of a")
    chosen, num_weights = operands.weight_indices, operands.b.shape[0]
    if chosen is not None:
        indices.require_within(
            op, "weight_indices", chosen, 0, num_weights, f"{num_weights} weights", where=lambda: chosen >= 0
        )
