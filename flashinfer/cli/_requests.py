# SPDX-License-Identifier: Apache-2.0
"""`--config` and `--target`: which kernels a command is about."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flashinfer import target as targets
from flashinfer.cli import UsageError
from flashinfer.jit.spec import KernelSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        metavar="FILE",
        help="TOML file of models and kernels, or the name of one that comes along (core, smoke); may be repeated",
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="NAME",
        help="such as sm_90a or x86-64-v3; several with commas (default: each visible GPU, or the CPU without one)",
    )
    parser.add_argument("--cpu", action="store_true", help="this machine's CPU as well")


def requested(args: argparse.Namespace) -> list[KernelSpec]:
    """The kernels of the configs on the targets. Raises UnsupportedConfig, or ConfigError naming file and line."""
    from flashinfer.aot.config import read_specs

    return read_specs(args.config, _targets(args.target, args.cpu))


def _targets(chosen: Sequence[str] | None, cpu: bool) -> list[str]:
    if chosen:
        names = targets.named(",".join(chosen))
    else:
        try:
            names = gpu_targets()
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise UsageError("torch, which sees the GPUs, is not installed; name a --target or install torch") from None
        cpu = cpu or not names
    return list(dict.fromkeys([*names, targets.host()] if cpu else names))


def gpu_targets() -> list[str]:
    """The target of each visible GPU, by device index."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [targets.of_device(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
