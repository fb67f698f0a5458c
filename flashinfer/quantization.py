# SPDX-License-Identifier: Apache-2.0
"""Packing of booleans, eight to a byte, as attention masks are passed."""

from __future__ import annotations

import torch

from flashinfer import target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import quantization as families
from flashinfer.host import checks, indices, memo, traced
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch

__all__ = ["packbits", "segment_packbits", "segment_packbits_padded"]


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """Pack booleans into bytes, the last byte filled up with zeros; the same as `numpy.packbits`.

    Args:
        x: `[n]`, bool; other dtypes are compared with 0 first.
        bitorder: "big": the first boolean of eight is the highest bit; "little": the lowest.

    Returns:
        `[ceil(n / 8)]`, uint8.

    Raises:
        ValueError: x is not a vector, or bitorder is unknown.
        TypeError: x is no tensor.
        UnsupportedConfig: no kernels for the device of x.
    """
    x = _as_booleans("packbits", x, bitorder)
    packed = torch.empty((x.shape[0] + 7) // 8, dtype=torch.uint8, device=x.device)
    if is_dynamo_compiling():
        _door(x, packed, bitorder)
    else:
        _pack(x, packed, bitorder)
    return packed


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big") -> tuple[torch.Tensor, torch.Tensor]:
    """Pack the booleans of every segment, each from a byte of its own.

    The size of the result depends on indptr, so a call on the GPU waits for the stream (as upstream's does). While a
    CUDA graph is captured, or under torch.compile, it cannot, and returns what `segment_packbits_padded` does.

    Args:
        x: `[n]`, bool; other dtypes are compared with 0 first.
        indptr: `[num_segments + 1]`, int32 or int64; where each segment starts in x: from 0 or above, never falling,
            `indptr[-1] <= n`.
        bitorder: as in `packbits`.

    Returns:
        `(packed, packed_indptr)`: uint8, and where each segment starts in it, dtype of indptr.

    Raises:
        ValueError: a shape, dtype or device does not fit, bitorder is unknown, or indptr descends. The last, and the
            following, on the CPU, and where FLASHINFER_CHECK_INDICES=1; otherwise booleans past the end of x count as
            zero on a GPU, and a segment whose end lies before its begin as empty.
        IndexError: indptr ends past x.
        TypeError: x or indptr is no tensor.
        UnsupportedConfig: no kernels for the device of x, or no values (meta), on which the size depends.
    """
    op = "segment_packbits"
    packed, packed_indptr = segment_packbits_padded(x, indptr, bitorder)
    if is_dynamo_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return packed, packed_indptr
    if x.is_meta:
        raise UnsupportedConfig(
            f"{op}: x is on meta, and the size of the result depends on the values of indptr; expected a cuda or cpu "
            "device. segment_packbits_padded needs shapes alone"
        )
    num_bytes = int(packed_indptr[-1])
    if not 0 <= num_bytes <= packed.shape[0]:
        raise IndexError(f"{op}: indptr ends past x, which has {x.shape[0]} booleans, or descends")
    return packed[:num_bytes], packed_indptr


def segment_packbits_padded(
    x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`segment_packbits` without waiting: packed has the largest size possible for its inputs, zeros at the end."""
    op = "segment_packbits"
    x = _as_booleans(op, x, bitorder)
    _require_indptr(op, indptr)
    num_segments = indptr.shape[0] - 1
    packed_indptr = torch.empty_like(indptr)
    packed = torch.empty(most_bytes(x.shape[0], num_segments), dtype=torch.uint8, device=x.device)
    if is_dynamo_compiling():
        _segments_door(op, x, indptr, packed, packed_indptr, bitorder)
    else:
        _pack_segments(op, x, indptr, packed, packed_indptr, bitorder)
    return packed, packed_indptr


# ------------------------------------------------------------------------------------------------------------- launches

_memo: memo.Memo[PreparedLaunch] = memo.Memo()


def _pack(x: torch.Tensor, packed: torch.Tensor, bitorder: str) -> None:
    address = x.data_ptr() or checks.no_address("packbits", "x", x)
    key = ("packbits", bitorder, address & 15, x.shape[0], x.device)
    launch = _memo.get(key)
    if launch is None:
        launch = _memo.remember(key, _prepare_packbits(x, bitorder))
    launch(address, packed.data_ptr())


def _pack_segments(
    op: str, x: torch.Tensor, indptr: torch.Tensor, packed: torch.Tensor, packed_indptr: torch.Tensor, bitorder: str
) -> None:
    address = x.data_ptr() or checks.no_address(op, "x", x)
    indptr_address = indptr.data_ptr() or checks.no_address(op, "indptr", indptr)
    num_bytes = packed.shape[0]
    key = (op, bitorder, address & 15, x.shape[0], num_bytes, *memo.signature(indptr), x.device)
    launch = _memo.get(key)
    if launch is None:
        launch = _memo.remember(key, _prepare_segments(op, x, indptr, num_bytes, bitorder))
    if indices.are_visible(indptr):
        indices.require_offsets(op, "indptr", indptr, x.shape[0], "the length of x")
    launch(address, indptr_address, packed.data_ptr(), packed_indptr.data_ptr())


_door = traced.door("packbits", _pack, {"x": "Tensor", "packed": "Tensor(!)", "bitorder": "str"})
_segments_door = traced.door(
    "segment_packbits",
    _pack_segments,
    {
        "op": "str",
        "x": "Tensor",
        "indptr": "Tensor",
        "packed": "Tensor(!)",
        "packed_indptr": "Tensor(!)",
        "bitorder": "str",
    },
)


def most_bytes(num_booleans: int, num_segments: int) -> int:
    """What the segments of so many booleans take at most: each adds up to seven bits of filling."""
    return (num_booleans + 7 * num_segments) // 8 if num_segments > 0 else 0


def _as_booleans(op: str, x: torch.Tensor, bitorder: str) -> torch.Tensor:
    """x as contiguous bytes of 0 or 1."""
    _require_memory(op, "x", x)
    if bitorder not in ("big", "little"):
        raise ValueError(f"{op}: bitorder is {bitorder!r}; expected 'big' or 'little'")
    if x.dim() != 1:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; expected one dimension, call .flatten()")
    if x.dtype != torch.bool:
        x = x != 0
    return x.contiguous()


def _require_memory(op: str, name: str, tensor: torch.Tensor) -> None:
    """Before torch reads it. A traced tensor has no address, and needs none."""
    is_plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    if not is_plain or not (is_dynamo_compiling() or tensor.data_ptr()):
        checks.require_addresses(op, **{name: tensor})


def _require_indptr(op: str, indptr: torch.Tensor) -> None:
    _require_memory(op, "indptr", indptr)
    checks.check_index(op, "indptr", indptr)
    checks.require(indptr.shape[0] >= 1, op, "indptr is empty; expected [num_segments + 1]")


def _prepare_packbits(x: torch.Tensor, bitorder: str) -> PreparedLaunch:
    num_elements, device_index = x.shape[0], x.get_device()
    if num_elements == 0 or x.is_meta:
        return memo.no_launch
    spec = families.PACKBITS.spec(
        target.of_device(x.device), big_endian=bitorder == "big", aligned=device_index < 0 or x.data_ptr() % 16 == 0
    )
    launcher = default_resolver().load(spec).on(device_index)
    config = launcher.config
    elements_per_block = config.launch.num_threads * int(config.constants["kVectorsPerThread"]) * 16
    grid = (-(-num_elements // elements_per_block), 1, 1)
    return launcher.prepare(grid, {"num_elements": num_elements}, varying=("input", "output"))


def _prepare_segments(op: str, x: torch.Tensor, indptr: torch.Tensor, num_bytes: int, bitorder: str) -> PreparedLaunch:
    checks.require_device(op, "indptr", indptr, x, "x")
    num_elements, num_segments, device_index = x.shape[0], indptr.shape[0] - 1, x.get_device()
    checks.integer(op, "the number of segments", num_segments)
    if x.is_meta:
        return memo.no_launch
    index, of = str(indptr.dtype)[6:], target.of_device(x.device)
    aligned = device_index < 0 or x.data_ptr() % 16 == 0
    scan_launcher = default_resolver().load(families.PACKED_INDPTR.spec(of, index=index)).on(device_index)
    pack_spec = families.SEGMENT_PACKBITS.spec(of, index=index, big_endian=bitorder == "big", aligned=aligned)
    pack_launcher = default_resolver().load(pack_spec).on(device_index)
    config = pack_launcher.config
    bytes_per_block = config.launch.num_threads * int(config.constants["kBytesPerThread"])
    grid = (max(1, -(-num_bytes // bytes_per_block)), 1, 1)
    scan = scan_launcher.prepare((1, 1, 1), {"num_segments": num_segments}, varying=("indptr", "packed_indptr"))
    counts = {"num_elements": num_elements, "num_bytes": num_bytes, "num_segments": num_segments}
    pack = pack_launcher.prepare(grid, counts, varying=("input", "output", "indptr", "packed_indptr"))

    def launch(x_ptr: int, indptr_ptr: int, packed_ptr: int, packed_indptr_ptr: int) -> None:
        scan(indptr_ptr, packed_indptr_ptr)
        pack(x_ptr, packed_ptr, indptr_ptr, packed_indptr_ptr)

    return launch
