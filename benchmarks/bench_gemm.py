# SPDX-License-Identifier: Apache-2.0
"""Matrix products: microseconds beside PyTorch's, DeepGEMM's and another installation of flashinfer.

python benchmarks/bench_gemm.py [--only "4096 x 7168"] [--peer FOLDER] [--no-host] [--json]

fp8 with scales of 1 x 128 by 128 x 128 elements, of sizes that DeepSeek-V3's layers have; groups of such rows, and
segments of bf16 rows, with weights of their own. DeepGEMM is timed where `deep_gemm` can be imported, its scales laid
out beforehand, and with dependent launch as our kernels have it. Calls are timed inside a CUDA graph.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from common import (
    DEVICE,
    Times,
    conclude,
    copies_for,
    device_us_in_turns,
    environment,
    measure_host,
    parser_of,
    print_table,
    run,
    table,
)

import flashinfer
from flashinfer import gemm

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
TORCH, DEEP_GEMM = "PyTorch", "DeepGEMM"
Calls = list[Callable[[], Any]]


@dataclass(frozen=True)
class Scaled:
    """fp8 with scales: rows by a weight of [columns, depth]."""

    rows: int
    columns: int
    depth: int

    @property
    def name(self) -> str:
        return f"{self.columns} x {self.depth}: {self.rows} rows"

    @property
    def num_bytes(self) -> int:
        return self.columns * self.depth + self.rows * (self.depth + 2 * self.columns)

    @property
    def num_flops(self) -> int:
        return 2 * self.rows * self.columns * self.depth

    def draw(self) -> tuple[torch.Tensor, ...]:
        blocks = self.depth // 128
        return (
            torch.randn(self.rows, self.depth, device=DEVICE).to(E4M3),
            torch.randn(self.columns, self.depth, device=DEVICE).to(E4M3),
            torch.rand(blocks, self.rows, device=DEVICE).T + 0.1,  # rows side by side, as PyTorch wants them
            torch.rand(-(-self.columns // 128), blocks, device=DEVICE) + 0.1,
            torch.empty(self.rows, self.columns, device=DEVICE, dtype=BF16),
        )

    def ours(self, a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, out: Any) -> Any:
        return gemm.gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, "K", out=out)

    def torchs(self, sets: list[Any]) -> Optional[Calls]:
        def padded(scale: torch.Tensor) -> torch.Tensor:  # rows at multiples of 16 bytes
            width = scale.shape[1]
            return torch.nn.functional.pad(scale, (0, -width % 4))[:, :width]

        return [
            functools.partial(torch._scaled_mm, a, b.T, a_scale, padded(b_scale).T, out_dtype=BF16)
            for a, b, a_scale, b_scale, _ in sets
        ]

    def deep_gemms(self, library: Any, sets: list[Any]) -> Optional[Calls]:
        return [
            functools.partial(
                library.fp8_gemm_nt, (a, laid_out(library, a_scale)), (b, b_scale), out, disable_ue8m0_cast=True
            )
            for a, b, a_scale, b_scale, out in sets
        ]


@dataclass(frozen=True)
class Groups:
    """fp8 with scales: groups of so many rows, each by a weight of [columns, depth]."""

    groups: int
    rows: int
    columns: int
    depth: int

    @property
    def name(self) -> str:
        return f"{self.groups} groups, {self.columns} x {self.depth}: {self.rows} rows"

    @property
    def num_bytes(self) -> int:
        return self.groups * Scaled(self.rows, self.columns, self.depth).num_bytes

    @property
    def num_flops(self) -> int:
        return self.groups * Scaled(self.rows, self.columns, self.depth).num_flops

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        return torch.arange(self.groups + 1, device=DEVICE, dtype=torch.int32) * self.rows

    def draw(self) -> tuple[torch.Tensor, ...]:
        num_rows, blocks = self.groups * self.rows, self.depth // 128
        return (
            torch.randn(num_rows, self.depth, device=DEVICE).to(E4M3),
            torch.randn(self.groups * self.columns, self.depth, device=DEVICE)
            .to(E4M3)
            .view(self.groups, -1, self.depth),
            torch.rand(blocks, num_rows, device=DEVICE) + 0.1,
            torch.rand(self.groups, blocks, -(-self.columns // 128), device=DEVICE) + 0.1,
            torch.empty(num_rows, self.columns, device=DEVICE, dtype=BF16),
        )

    def ours(self, a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, out: Any) -> Any:
        return gemm.group_gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, self.offsets, out=out)

    def torchs(self, sets: list[Any]) -> Optional[Calls]:
        return None

    def deep_gemms(self, library: Any, sets: list[Any]) -> Optional[Calls]:
        group_of_row = torch.arange(self.groups, device=DEVICE, dtype=torch.int32).repeat_interleave(self.rows)
        return [
            functools.partial(
                library.m_grouped_fp8_gemm_nt_contiguous, (a, laid_out(library, a_scale.T)),
                (b, b_scale.mT.contiguous()), out, group_of_row, disable_ue8m0_cast=True,
            )
            for a, b, a_scale, b_scale, out in sets
        ]  # fmt: skip


@dataclass(frozen=True)
class Segments:
    """Segments of so many rows by weights of [columns, depth]."""

    segments: int
    rows: int
    columns: int
    depth: int

    @property
    def name(self) -> str:
        return f"{self.segments} segments of bf16, {self.columns} x {self.depth}: {self.rows} rows"

    @property
    def num_bytes(self) -> int:
        return 2 * self.segments * (self.columns * self.depth + self.rows * (self.depth + self.columns))

    @property
    def num_flops(self) -> int:
        return 2 * self.segments * self.rows * self.columns * self.depth

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        return torch.arange(self.segments + 1, device=DEVICE, dtype=torch.int32) * self.rows

    def draw(self) -> tuple[torch.Tensor, ...]:
        num_rows = self.segments * self.rows
        return (
            torch.randn(num_rows, self.depth, device=DEVICE, dtype=BF16),
            torch.randn(self.segments, self.columns, self.depth, device=DEVICE, dtype=BF16),
            torch.empty(num_rows, self.columns, device=DEVICE, dtype=BF16),
        )

    def ours(self, x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> Any:
        wrapper = flashinfer.SegmentGEMMWrapper(out.view(-1)[:1])
        return wrapper.run(x, weights, self.segments, True, out=out, seg_indptr=self.offsets)

    def torchs(self, sets: list[Any]) -> Optional[Calls]:
        return [functools.partial(torch._grouped_mm, x, weights.mT, offs=self.offsets[1:]) for x, weights, _ in sets]

    def deep_gemms(self, library: Any, sets: list[Any]) -> Optional[Calls]:
        return None


def deep_gemm() -> Any:
    """None where it cannot be imported."""
    try:
        library = importlib.import_module("deep_gemm")
    except ImportError:
        return None
    library.set_pdl(True)
    return library


def laid_out(library: Any, scale: torch.Tensor) -> torch.Tensor:
    """Scales of rows, [rows, blocks], as DeepGEMM takes them."""
    return library.get_mn_major_tma_aligned_tensor(scale.contiguous())


# Projections of DeepSeek-V3's layers, of eight GPUs or one.
SHAPES = ((4096, 7168), (7168, 2048), (2112, 7168), (24576, 1536))
CASES: list[Any] = [
    *(Scaled(rows, *shape) for shape in SHAPES for rows in (1, 16, 64, 128, 4096)),
    *(Groups(32, 128, 4096, 7168), Groups(8, 4096, 4096, 7168), Groups(8, 4096, 7168, 2048)),
    *(Segments(64, 1, 4096, 4096), Segments(64, 16, 4096, 2048), Segments(8, 4096, 4096, 4096)),
]


def measure(args: argparse.Namespace, times: Times) -> None:
    library = None if times.is_peer or DEVICE == "cpu" else deep_gemm()
    for case in CASES:
        if args.only not in case.name:
            continue
        torch.manual_seed(0)
        sets = [case.draw() for _ in range(min(12, copies_for(case.num_bytes)))]
        kinds: dict[str, Calls] = {"": [functools.partial(case.ours, *one) for one in sets]}
        if not times.is_peer and DEVICE == "cuda":
            others = {TORCH: case.torchs(sets), DEEP_GEMM: case.deep_gemms(library, sets) if library else None}
            for name, other in others.items():
                with times.noting(f"{case.name}, {name}", is_other=True):
                    if other:
                        other[0]()  # raises where the library does not serve the case
                        kinds[name] = other
        with times.noting(case.name):
            for column, us in device_us_in_turns(kinds, rounds=2).items():
                times.columns.setdefault(column, {})[case.name] = us
    if not args.no_host:
        with times.noting("host costs"):
            small, segments = Scaled(16, 256, 256), Segments(4, 4, 256, 256)
            operands, rows = small.draw(), segments.draw()
            x = torch.randn(16, 256, device=DEVICE, dtype=BF16)
            calls: dict[str, Callable[[], Any]] = {
                "gemm_fp8_nt_groupwise": lambda: small.ours(*operands),
                "fp8_blockscale_gemm_sm90": lambda: gemm.fp8_blockscale_gemm_sm90(x, operands[1], None, operands[3]),
                "SegmentGEMMWrapper.run": lambda: segments.ours(*rows),
            }
            measure_host(times, calls)


def main() -> None:
    args, ours, peers = run(parser_of(__doc__), measure)
    print(environment())
    rows: list[list[object]] = []
    timed = []
    others = [TORCH, DEEP_GEMM, *(peer.library for peer in peers)]
    for case in CASES:
        if args.only not in case.name:
            continue
        us = [ours.us(case.name), *(ours.us(case.name, column) for column in others[:2])]
        us += [peer.us(case.name) for peer in peers]
        rows.append([case.name, us[0], case.num_flops / us[0] / 1e6, case.num_bytes / us[0] / 1e6, *us[1:]])
        amounts = {"bytes": case.num_bytes, "flops": case.num_flops}
        timed.append((case.name, us[0], dict(zip(others, us[1:])), amounts))
    columns = ["us", "TFLOP/s", "TB/s", *(f"{other} us" for other in others)]
    print_table("Matrix products", ["columns x depth, fp8 with scales or bf16", *columns], rows)
    conclude(args, ours, peers, {"gemm": table("us", timed, partial=args.only)})


if __name__ == "__main__":
    main()
