# SPDX-License-Identifier: Apache-2.0
"""`flashinfer bench`: how long an attention kernel takes here. The programs of cpp/bench have the same options."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flashinfer.cli._text import table
from flashinfer.errors import FlashInferError

_ABOUT = {
    "single_decode": "one query token over one sequence",
    "single_prefill": "query tokens of one sequence over its keys",
    "batch_decode": "one query token of each request over a paged cache",
    "batch_prefill": "query tokens of each request over a paged cache",
}
_EXAMPLES = {
    "single_decode": ("bench single_decode --kv-len 8192",),
    "single_prefill": ("bench single_prefill --qo-len 512 --kv-len 4096",),
    "batch_decode": (
        "bench batch_decode --batch-size 64",
        "bench batch_decode --kv-dtype fp8_e4m3 --peer /tmp/upstream",
    ),
    "batch_prefill": ("bench batch_prefill --batch-size 4 --qo-len 1024 --no-causal",),
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time attention on this machine, beside another installation",
        description="Time one case of attention, by the median of several runs whose data is not in the L2 cache, and "
        "beside another installation of flashinfer. Programs with the same options, without Python: docs/cpp.md.",
    )
    parser.set_defaults(run=lambda args: parser.print_help())
    benchmarks = parser.add_subparsers(metavar="BENCHMARK")
    for name, about in _ABOUT.items():
        one = benchmarks.add_parser(
            name, help=about, description=f"Time attention of {about}.", examples=_EXAMPLES[name]
        )
        is_batch, is_prefill = name.startswith("batch"), name.endswith("prefill")
        one.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
        if is_batch:
            one.add_argument("--batch-size", type=_positive, default=1, help="requests (default: 1)")
        if is_prefill:
            one.add_argument("--qo-len", type=_positive, default=4096, help="query tokens of each (default: 4096)")
        one.add_argument("--kv-len", type=_positive, default=4096, help="keys and values of each (default: 4096)")
        one.add_argument("--num-qo-heads", type=_positive, default=32, help="default: 32")
        one.add_argument("--num-kv-heads", type=_positive, default=8, help="default: 8")
        one.add_argument("--head-dim", type=_positive, default=128, help="default: 128")
        if is_batch:
            one.add_argument("--page-size", type=_positive, default=16, help="default: 16")
        one.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of q (default: bf16)")
        one.add_argument(
            "--kv-dtype", choices=("bf16", "fp16", "fp32", "fp8_e4m3", "fp8_e5m2"), help="default: that of q"
        )
        if is_prefill:
            one.add_argument("--no-causal", action="store_true", help="every query sees every key")
        one.add_argument(
            "--repeats", type=_positive, default=20, help="timings, the median of which counts (default: 20)"
        )
        one.add_argument("--json", action="store_true", help="one JSON object in the place of a table")
        one.add_argument(
            "--peer", type=Path, metavar="DIR", help="folder of another installation to time beside this one"
        )
        one.set_defaults(run=run, benchmark=name)


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return number


def run(args: argparse.Namespace) -> int:
    import torch

    from flashinfer.cli import _bench_case

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {"batch_size": 1, "qo_len": 1, "page_size": 1, "no_causal": False, **vars(args), "device": device}
    given.update(kv_dtype=args.kv_dtype or args.dtype, causal=not given["no_causal"])
    case = _bench_case.Case(**{name: given[name] for name in _bench_case.Case._fields})
    times = {"flashinfer": _bench_case.measure(case)}
    if args.peer is not None:
        times[str(args.peer)] = _of_peer(args.peer, case)
    if args.json:
        of_case = {"case": case.name, "bytes": case.num_bytes, "flops": case.num_flops}
        print(json.dumps({"benchmark": case.benchmark, **of_case, "device": _name_of(device), "us": times}))
        return 0
    rows = [
        [case.name, library, f"{us:.1f}", f"{case.num_bytes / us * 1e-6:.3f}", f"{case.num_flops / us * 1e-6:.1f}"]
        for library, us in times.items()
    ]
    print(table([f"{case.benchmark}, {_name_of(device)}", "by", "us", "TB/s", "TFLOP/s"], rows))
    return 0


def _name_of(device: str) -> str:
    import torch

    from flashinfer import target

    return torch.cuda.get_device_name() if device == "cuda" else target.host()


def _of_peer(folder: Path, case: tuple[Any, ...]) -> float:
    """By the same code in a process of its own, which imports the other library of our name."""
    if not (folder / "flashinfer" / "__init__.py").is_file():
        raise FlashInferError(
            f"{folder} holds no flashinfer; expected the folder of pip install --target, or a checkout"
        )
    script = Path(__file__).with_name("_bench_case.py")
    start = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", start, str(script), json.dumps(case)],
        env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FlashInferError(f"the installation in {folder} does not run this case: {last}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["us"])
