"""Bandwidth of rmsnorm, fused_add_rmsnorm and silu_and_mul beside torch's own kernels.

python benchmarks/bench_norm.py [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import copies_for, environment, gpu_us, print_table

import flashinfer

NORM_SHAPES = [(1, 4096), (16, 4096), (128, 8192), (2048, 4096), (8192, 4096), (8192, 8192), (65536, 128)]
ACTIVATION_SHAPES = [(1, 14336), (128, 14336), (8192, 14336)]


def rows_for(
    name: str, shape: tuple[int, int], num_bytes: int, ours: list[Callable[[], Any]], peer: list[Callable[[], Any]]
) -> list[object]:
    mine, other = gpu_us(ours), gpu_us(peer)
    return [name, f"{shape[0]}x{shape[1]}", mine, num_bytes / mine * 1e-6, other, other / mine]


def norm_rows(shape: tuple[int, int], dtype: torch.dtype) -> list[list[object]]:
    num_bytes = 2 * shape[0] * shape[1] * dtype.itemsize
    sets = [(make(shape, dtype), make(shape, dtype)) for _ in range(copies_for(num_bytes))]
    weight = make(shape[1:], dtype)
    ours = [lambda x=x, out=out: flashinfer.rmsnorm(x, weight, out=out) for x, out in sets]
    peer = [lambda x=x: torch.nn.functional.rms_norm(x, shape[1:], weight, 1e-6) for x, _ in sets]
    fused = [lambda x=x, r=r: flashinfer.fused_add_rmsnorm(x, r, weight) for x, r in sets]
    unfused = [lambda x=x, r=r: torch.nn.functional.rms_norm(r.add_(x), shape[1:], weight, 1e-6) for x, r in sets]
    return [
        rows_for("rmsnorm", shape, num_bytes, ours, peer),
        rows_for("fused_add_rmsnorm", shape, 2 * num_bytes, fused, unfused),
    ]


def activation_row(shape: tuple[int, int], dtype: torch.dtype) -> list[object]:
    num_bytes = 3 * shape[0] * shape[1] * dtype.itemsize
    sets = [(make((shape[0], 2 * shape[1]), dtype), make(shape, dtype)) for _ in range(copies_for(num_bytes))]
    silu = torch.nn.functional.silu
    ours = [lambda x=x, out=out: flashinfer.silu_and_mul(x, out=out) for x, out in sets]
    peer = [lambda x=x, out=out: torch.mul(silu(x[:, : shape[1]]), x[:, shape[1] :], out=out) for x, out in sets]
    return rows_for("silu_and_mul", shape, num_bytes, ours, peer)


def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    dtype = getattr(torch, parser.parse_args().dtype)
    rows = [row for shape in NORM_SHAPES for row in norm_rows(shape, dtype)]
    rows += [activation_row(shape, dtype) for shape in ACTIVATION_SHAPES]
    source, target = (
        torch.empty(1 << 30, dtype=torch.int8, device="cuda"),
        torch.empty(1 << 30, dtype=torch.int8, device="cuda"),
    )
    copy = gpu_us([lambda: target.copy_(source)])
    rows.append(["copy (ceiling)", "1 GiB", copy, (2 << 30) / copy * 1e-6, copy, 1.0])
    print_table(environment(), ["op", "shape", "µs", "TB/s", "torch µs", "speed-up"], rows)


if __name__ == "__main__":
    main()
