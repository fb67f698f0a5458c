# SPDX-License-Identifier: Apache-2.0
"""Attention over a KV cache that several GPUs share: microseconds beside one GPU's, and what an exchange takes.

torchrun --nproc-per-node N benchmarks/bench_parallel.py [--only "decode"] [--json]
python benchmarks/bench_parallel.py --predict FILE

Efficiency is one GPU's time, over all of the KV, by N times that of N GPUs. `local` is a rank's attention without the
exchange. Heads are 32/8 of 128, bf16, of latent attention 128 over rows of 576. Calls are timed inside a CUDA graph,
but for ring prefill; of all ranks the slowest counts. On CPUs, over gloo, the cases are small.

--predict reads what two GPUs wrote (--json) and prints what more of them would reach by the model of
docs/notes/2026-11-context-parallel.md.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import results
import torch
import torch.distributed as dist
from common import DEVICE, Row, environment, parse, print_table, table, write_results

import flashinfer
from flashinfer.parallel import ContextParallel, ring_prefill, zigzag_positions
from flashinfer.parallel.exchange import STEP_US, gather_limit
from flashinfer.parallel.ranks import all_gather

ON_GPU = DEVICE == "cuda"
HEADS, KV_HEADS, DIM = 32, 8, 128
DIM_CKV, DIM_KPE, LATENT_HEADS = 512, 64, 128
PAGE = 64
DTYPE = torch.bfloat16
# Requests and tokens of KV of each.
DECODE = [(1, 1 << 20), (1, 1 << 17), (16, 1 << 16), (64, 8192)] if ON_GPU else [(2, 512)]
LATENT = [(1, 1 << 20), (16, 1 << 16)] if ON_GPU else [(2, 512)]
RING = [1 << 15, 1 << 17] if ON_GPU else [256]
STATES = [1 << power for power in (13, 16, 18, 20, 22, 24, 26)] if ON_GPU else [1 << 13]

Call = Callable[[], Any]


def slowest(us: float) -> float:
    """Of all ranks."""
    found = torch.tensor([us], device=DEVICE, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def time_us(call: Call, *, rounds: int = 5, calls: int = 10, captured: bool = True) -> float:
    """Median microseconds of a call that all ranks make together."""
    call()
    if not ON_GPU:
        times = []
        for _ in range(3):
            dist.barrier()
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e6)
        return slowest(statistics.median(times))
    repeat = _captured(call, calls) if captured else lambda: [call() for _ in range(calls)]
    repeat()
    times = []
    for _ in range(rounds):
        dist.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        repeat()  # so that none is ahead
        start.record()
        repeat()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return slowest(statistics.median(times))


def _captured(call: Call, calls: int) -> Call:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    return graph.replay


# ------------------------------------------------------------------------------------------------------------- paged KV


class Pages:
    """Requests of one length, all of their pages on this GPU, or the slice that a rank has."""

    def __init__(self, batch: int, kv_len: int, widths: Sequence[Sequence[int]], num_ranks: int = 1) -> None:
        self.batch, pages = batch, kv_len // PAGE // num_ranks
        self.indptr = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * pages
        self.indices = torch.randperm(batch * pages, device=DEVICE).int()
        self.last_page_len = torch.full((batch,), PAGE, dtype=torch.int32, device=DEVICE)
        self.lens = torch.full((batch,), pages * PAGE, dtype=torch.int32, device=DEVICE)
        self.caches = tuple(torch.randn(batch * pages, PAGE, *width, dtype=DTYPE, device=DEVICE) for width in widths)


def workspace() -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)


def of_decode(attention: Any, pages: Pages, first: int = 0, end: int | None = None) -> Call:
    """A run over some of the requests."""
    end = pages.batch if end is None else end
    indptr = pages.indptr[first : end + 1]
    shape = (HEADS, KV_HEADS, DIM, PAGE)
    attention.plan(indptr, pages.indices, pages.last_page_len[first:end], *shape, q_data_type=DTYPE)
    q = torch.randn(end - first, HEADS, DIM, dtype=DTYPE, device=DEVICE)
    return lambda **options: attention.run(q, pages.caches, **options)


def of_latent(attention: Any, pages: Pages) -> Call:
    qo_indptr = torch.arange(pages.batch + 1, dtype=torch.int32, device=DEVICE)
    given = (qo_indptr, pages.indptr, pages.indices, pages.lens)
    options = (False, (128 + 64) ** -0.5, DTYPE, DTYPE)
    attention.plan(*given, LATENT_HEADS, DIM_CKV, DIM_KPE, PAGE, *options)
    q = [torch.randn(pages.batch, LATENT_HEADS, dim, dtype=DTYPE, device=DEVICE) for dim in (DIM_CKV, DIM_KPE)]
    ckv, kpe = pages.caches[0].split([DIM_CKV, DIM_KPE], dim=-1)
    return lambda **options: attention.run(*q, ckv, kpe, **options)


def measure_paged(name: str, batch: int, kv_len: int) -> tuple[list[object], Row]:
    num_ranks, parallel = dist.get_world_size(), ContextParallel(check=False)
    widths = [(DIM_CKV + DIM_KPE,)] if name == "latent" else [(KV_HEADS, DIM)] * 2
    num_bytes = batch * kv_len * sum(map(torch.Size.numel, map(torch.Size, widths))) * DTYPE.itemsize
    of = of_latent if name == "latent" else of_decode

    def wrapper() -> Any:
        if name == "latent":
            return flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace())
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace())

    one = time_us(of(wrapper(), Pages(batch, kv_len, widths)))
    pages = Pages(batch, kv_len, widths, num_ranks)
    local = time_us(of(wrapper(), pages))
    sharded = of(parallel.mla(workspace()) if name == "latent" else parallel.decode(workspace()), pages)
    times = {heads: time_us(lambda heads=heads: sharded(heads=heads)) for heads in ("all", "own")}
    overlapped = float("nan")
    if name == "decode" and batch > 1:
        first = of_decode(parallel.decode(workspace()), pages, 0, batch // 2)
        second = of_decode(parallel.decode(workspace()), pages, batch // 2)

        def both() -> None:
            pending = [first(async_op=True), second(async_op=True)]
            for each in pending:
                each.wait()

        overlapped = time_us(both)
    case = f"{name}, {batch} x {kv_len}"
    best = min(times.values())
    cells = [case, one, local, times["all"], times["own"], overlapped, num_bytes / best / 1e6]
    figures = {"one GPU": one, "local": local, "own heads": times["own"], "in two halves": overlapped}
    return [*cells, _percent(one, times["all"])], (case, times["all"], figures, {"bytes": num_bytes})


def _percent(one: float, all_ranks: float) -> str:
    return f"{100 * one / all_ranks / dist.get_world_size():.1f}%"


# ------------------------------------------------------------------------------------------------- sequences, exchanges


def measure_ring(num_tokens: int) -> tuple[list[object], Row]:
    num_ranks, rank = dist.get_world_size(), dist.get_rank()
    whole = [torch.randn(num_tokens, heads, DIM, dtype=DTYPE, device=DEVICE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    own = zigzag_positions(num_tokens, num_ranks, rank).to(DEVICE)
    mine = [x[own] for x in whole]
    options: dict[str, Any] = {"rounds": 3, "calls": 2, "captured": False}
    one = time_us(lambda: flashinfer.single_prefill_with_kv_cache(*whole, causal=True), **options)
    ring = time_us(lambda: ring_prefill(*mine), **options)
    flops = 2 * num_tokens**2 * DIM * HEADS
    case = f"ring, {num_tokens}"
    return [case, one, ring, flops / ring / 1e6, _percent(one, ring)], (case, ring, {"one GPU": one}, {"flops": flops})


def measure_exchange(num_bytes: int) -> tuple[list[object], Row]:
    num_ranks = dist.get_world_size()
    send = torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE)
    receive = torch.empty(num_ranks * num_bytes, dtype=torch.uint8, device=DEVICE)
    gather = time_us(lambda: all_gather(receive, send))
    scatter = time_us(lambda: dist.all_to_all_single(receive[:num_bytes], send))
    arrived = num_bytes * (num_ranks - 1)
    case = f"exchange, {num_bytes}"
    rates = [arrived / gather / 1e3, arrived / num_ranks / scatter / 1e3]
    return [num_bytes, gather, rates[0], scatter, rates[1]], (
        case,
        gather,
        {"all-to-all": scatter},
        {"bytes": num_bytes},
    )


# ----------------------------------------------------------------------------------------------------------- prediction

RANKS = (2, 4, 8, 16, 32, 64)


def predict(path: Path, step_us: float) -> None:
    """One GPU's time over W, what halving it added beside that, an exchange, and its merge."""
    found = {name: one for run in results.read(path).runs for name, one in run.tables.items()}
    exchanges = found["exchange, 2 ranks"].cases.values()
    gathers = [(case.bytes or 0, case.figure or 0.0) for case in exchanges]
    scatters = [((case.bytes or 0) // 2, case.peers["all-to-all"] or 0.0) for case in exchanges]
    rows: list[list[object]] = []
    for kind, (heads, dim) in {"decode": (HEADS, DIM), "latent": (LATENT_HEADS, DIM_CKV)}.items():
        for name, case in found[f"{kind}, 2 ranks"].cases.items() if f"{kind}, 2 ranks" in found else ():
            one, local = case.peers["one GPU"] or 0.0, case.peers["local"] or 0.0
            batch = int(name.split(", ")[1].split(" x ")[0])
            state = batch * heads * (dim * DTYPE.itemsize + 4)
            cells: list[object] = [name, "-" if case.figure is None else f"{100 * one / 2 / case.figure:.1f}%"]
            for ranks in RANKS:
                exchange = _exchange_us(ranks, state, gathers, scatters, (ranks - 2) * step_us)
                us = one / ranks + max(0.0, local - one / 2) + exchange
                cells.append(f"{100 * one / ranks / us:.0f}%")
            rows.append(cells)
    print_table("Efficiency", ["batch x KV", "2, measured", *map(str, RANKS)], rows)


def _exchange_us(
    ranks: int, state: int, gathers: list[tuple[int, float]], scatters: list[tuple[int, float]], further: float
) -> float:
    """As `flashinfer.parallel.exchange` chooses it, for all heads. further: microseconds that ranks beyond two add."""
    merge = 1.0 + state / 3.5e6  # states come in at 3.5 TB/s
    if state <= gather_limit(ranks):
        return _interpolated(gathers, state * (ranks - 1)) + further + merge * ranks / 2
    received = state * (ranks - 1) // ranks
    return _interpolated(scatters, received) + _interpolated(gathers, received) + further + 5.0 + merge


def _interpolated(curve: list[tuple[int, float]], num_bytes: int) -> float:
    """Microseconds for so many bytes received: between two that were timed, or on the line of the last two."""
    if num_bytes <= curve[0][0]:
        return curve[0][1]
    (low, at_low), (high, at_high) = next(
        (pair for pair in itertools.pairwise(curve) if num_bytes <= pair[1][0]), (curve[-2], curve[-1])
    )
    return at_low + (at_high - at_low) * (num_bytes - low) / (high - low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="decode, latent, ring or exchange")
    parser.add_argument("--predict", type=Path, metavar="FILE", help="a file of results of two GPUs; times nothing")
    parser.add_argument("--step-us", type=float, default=STEP_US, help="what --predict has each further rank add")
    args = parse(parser)
    if args.predict:
        predict(args.predict, args.step_us)
        return
    if "RANK" not in os.environ:
        parser.error("no rank in the environment; start it as torchrun --nproc-per-node N benchmarks/bench_parallel.py")
    options: dict[str, Any] = {}
    if ON_GPU:
        options = {"device_id": torch.device("cuda", int(os.environ["LOCAL_RANK"]))}
        torch.cuda.set_device(options["device_id"])
    dist.init_process_group("nccl" if ON_GPU else "gloo", **options)
    num_ranks = dist.get_world_size()
    ranks = f"{num_ranks} ranks"
    paged = [
        "batch x KV",
        "one GPU us",
        "local us",
        "all heads us",
        "own heads us",
        "in two halves us",
        "TB/s",
        "efficiency",
    ]
    kinds: list[tuple[str, list[str], list[Any]]] = [
        ("exchange", ["bytes of a state", "all-gather us", "GB/s", "all-to-all us", "GB/s"], STATES),
        ("decode", paged, DECODE),
        ("latent", paged, LATENT),
        ("ring", ["tokens", "one GPU us", f"{ranks} us", "TFLOP/s", "efficiency"], RING),
    ]
    if dist.get_rank() == 0:
        print(environment(), f"{ranks}, {dist.get_backend()}", sep=", ", flush=True)
    tables = {}
    for kind, header, cases in kinds:
        if args.only not in kind:
            continue
        measure = {"exchange": measure_exchange, "ring": measure_ring}.get(kind)
        found = [measure(case) if measure else measure_paged(kind, *case) for case in cases]
        tables[f"{kind}, {ranks}"] = table("us", [timed for _, timed in found], partial=args.only)
        if dist.get_rank() == 0:
            print_table(f"{kind.capitalize()}, {ranks}", header, [cells for cells, _ in found])
    if dist.get_rank() == 0:
        write_results(args, tables)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
