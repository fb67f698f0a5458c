"""Packing of booleans, eight to a byte, as attention masks are passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashinfer import _op, target
from flashinfer._kv import check_index
from flashinfer.jit import resolver
from flashinfer.kernels import quantization as kernels

__all__ = ["packbits", "segment_packbits"]


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """Pack booleans into bytes, the last byte filled up with zeros; the same as `numpy.packbits`.

    Args:
        x: `[n]`, bool; other dtypes are compared with 0 first.
        bitorder: "big": the first boolean of eight is the highest bit; "little": the lowest.

    Returns:
        `[ceil(n / 8)]`, uint8.

    Raises:
        ValueError: x is not a vector, or bitorder is unknown.
    """
    x = _check("packbits", x, bitorder)
    packed = torch.empty((x.shape[0] + 7) // 8, dtype=torch.uint8, device=x.device)
    if x.shape[0] == 0:
        return packed
    address = x.data_ptr()
    key = ("packbits", bitorder, address & 15, x.shape[0], x.get_device())
    launch = _memo.get(key)
    if launch is None:
        launch = _memo.remember(key, _prepare_packbits(x, bitorder))
    launch(address, packed.data_ptr())
    return packed


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big") -> tuple[torch.Tensor, torch.Tensor]:
    """Pack the booleans of every segment, each from a byte of its own.

    The size of the result depends on indptr, so a call on the GPU waits for the stream (as upstream's does). While a
    CUDA graph is captured it cannot; then the result has its largest possible size, zeros at the end.

    Args:
        x: `[n]`, bool; other dtypes are compared with 0 first.
        indptr: `[num_segments + 1]`, int32 or int64; where each segment starts in x. `indptr[-1] <= n`.
        bitorder: as in `packbits`.

    Returns:
        `(packed, packed_indptr)`: uint8, and where each segment starts in it, dtype of indptr.

    Raises:
        ValueError: a shape, dtype or device does not fit, or bitorder is unknown.
    """
    op = "segment_packbits"
    x = _check(op, x, bitorder)
    packed_indptr = torch.empty_like(indptr)
    num_segments = indptr.shape[0] - 1
    # Every segment adds at most seven bits of filling.
    packed = torch.empty(
        0 if num_segments < 1 else (x.shape[0] + 7 * num_segments) // 8, dtype=torch.uint8, device=x.device
    )
    address = x.data_ptr()
    key = (op, bitorder, address & 15, x.shape[0], *_op.signature(indptr), x.get_device())
    launch = _memo.get(key)
    if launch is None:
        launch = _memo.remember(key, _prepare_segments(op, x, indptr, packed.shape[0], bitorder))
    launch(address, indptr.data_ptr(), packed.data_ptr(), packed_indptr.data_ptr())
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return packed, packed_indptr
    return packed[: int(packed_indptr[-1])], packed_indptr


_memo: _op.Memo[Callable[..., None]] = _op.Memo()


def _check(op: str, x: torch.Tensor, bitorder: str) -> torch.Tensor:
    """x as contiguous bytes of 0 or 1."""
    if bitorder not in ("big", "little"):
        raise ValueError(f"{op}: bitorder is {bitorder!r}; expected 'big' or 'little'")
    if x.dim() != 1:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; expected one dimension, call .flatten()")
    if x.dtype != torch.bool:
        x = x != 0
    return x.contiguous()


def _prepare_packbits(x: torch.Tensor, bitorder: str) -> Callable[..., None]:
    num_elements, device_index = x.shape[0], x.get_device()
    spec = kernels.PACKBITS.spec(
        target.of_device(x.device), big_endian=bitorder == "big", aligned=device_index < 0 or x.data_ptr() % 16 == 0
    )
    launcher, config = _load(spec, device_index)
    elements_per_block = config.launch.num_threads * int(config.constants["kVectorsPerThread"]) * 16
    grid = (-(-num_elements // elements_per_block), 1, 1)

    def launch(x_ptr: int, packed_ptr: int) -> None:
        launcher(grid, _op.current_stream(device_index), x_ptr, packed_ptr, num_elements)

    return launch


def _prepare_segments(
    op: str, x: torch.Tensor, indptr: torch.Tensor, num_bytes: int, bitorder: str
) -> Callable[..., None]:
    check_index(op, "indptr", indptr)
    _op.require_device(op, "indptr", indptr, x, "x")
    _op.require(indptr.shape[0] >= 1, op, "indptr is empty; expected [num_segments + 1]")
    num_elements, num_segments, device_index = x.shape[0], indptr.shape[0] - 1, x.get_device()
    index, of = str(indptr.dtype)[6:], target.of_device(x.device)
    aligned = device_index < 0 or x.data_ptr() % 16 == 0
    scan, _ = _load(kernels.PACKED_INDPTR.spec(of, index=index), device_index)
    pack, config = _load(
        kernels.SEGMENT_PACKBITS.spec(of, index=index, big_endian=bitorder == "big", aligned=aligned), device_index
    )
    grid = (max(1, -(-num_bytes // config.launch.num_threads)), 1, 1)

    def launch(x_ptr: int, indptr_ptr: int, packed_ptr: int, packed_indptr_ptr: int) -> None:
        stream = _op.current_stream(device_index)
        scan((1, 1, 1), stream, indptr_ptr, packed_indptr_ptr, num_segments)
        pack(
            grid,
            stream,
            x_ptr,
            packed_ptr,
            indptr_ptr,
            packed_indptr_ptr,
            num_elements,
            num_bytes,
            num_segments,
        )

    return launch


def _load(spec: Any, device_index: int) -> tuple[Any, Any]:
    kernel = resolver().load(spec)
    return kernel.on(device_index), kernel.config
