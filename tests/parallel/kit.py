# SPDX-License-Identifier: Apache-2.0
"""Ranks for tests: a process forks them, set after set; every rank of a set runs the same cases in the same order, and
what failed is told by name.

    python -m tests.parallel.kit MODULE cpu|cuda FOLDER NUM_RANKS[:CASE,…] …
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests import warm
from tests.kit import PATIENCE_SECONDS, ROOT, python_path


@dataclass(frozen=True)
class Rank:
    """What a case is given."""

    rank: int
    size: int
    device: torch.device

    def draw(self, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
        """The same numbers on every rank."""
        generator = torch.Generator().manual_seed(seed + sum(shape))
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device, dtype)

    def workspace(self) -> Tensor:
        return torch.empty(64 << 20 if self.device.type == "cuda" else 8, dtype=torch.uint8, device=self.device)


Case = Callable[[Rank], None]


def run(module: str, device: str, *sets: str) -> dict[str, list[str]]:
    """Have sets of ranks run the cases of a module, all of them or those that are named.

    Returns for each set and case what its ranks said: "" where it passed.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "tests.parallel.kit", module, device, folder, *sets]
        environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        if device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        out, err = warm.Process(arguments, environment, ROOT).communicate(2 * PATIENCE_SECONDS)
        found: dict[str, list[str]] = {}
        for one in sets:
            said = [_read(Path(folder) / one / f"{rank}.json") for rank in range(_num_ranks(one))]
            names = dict.fromkeys(name for each in said for name in each)
            assert names, out + err
            for name in names:
                found[f"{one}: {name}"] = [each.get(name, "did not get there") for each in said]
        return found


def _num_ranks(one: str) -> int:
    return int(one.partition(":")[0])


def _read(path: Path) -> dict[str, str]:
    return json.loads(path.read_text()) if path.exists() else {}


def _run_rank(rank: Rank, folder: Path, cases: dict[str, Case]) -> None:
    if rank.device.type == "cuda":
        torch.cuda.set_device(rank.device)
    store = dist.FileStore(str(folder / "store"), rank.size)
    backend = "nccl" if rank.device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"device_id": rank.device} if rank.device.type == "cuda" else {}
    timeout = timedelta(seconds=PATIENCE_SECONDS)
    dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.size, timeout=timeout, **options)
    said: dict[str, str] = {}
    path = folder / f"{rank.rank}.json"
    for name, case in cases.items():
        path.write_text(json.dumps({**said, name: "died"}))
        try:
            case(rank)
            said[name] = ""
        except BaseException:
            said[name] = traceback.format_exc()
            if "ExchangeFailed" in said[name]:  # the ranks are apart
                break
        finally:
            path.write_text(json.dumps(said))
    os._exit(0)


def main(module_name: str, kind: str, folder: str, *sets: str) -> None:
    module = importlib.import_module(module_name)
    for one in sets:
        names = one.partition(":")[2].split(",") if ":" in one else module.CASES
        cases: dict[str, Case] = {name: module.CASES[name] for name in names}
        place = Path(folder) / one
        place.mkdir()
        children = []
        for rank in range(_num_ranks(one)):
            child = os.fork()
            if child == 0:
                try:
                    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", rank)
                    _run_rank(Rank(rank, _num_ranks(one), device), place, cases)
                finally:  # of what went wrong around the cases
                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
