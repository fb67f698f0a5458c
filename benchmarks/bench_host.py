# SPDX-License-Identifier: Apache-2.0
"""Host costs: importing, the first call, a warm load, and one call of an operator beside torch.add(out=).

python benchmarks/bench_host.py [--device cuda|cpu] [--only prefill] [--no-start] [--peer FOLDER] [--json]

Calls are timed 200 at a time into an empty queue of the GPU, which holds more: however long a kernel runs, no call
waits for it. What a call returns is allocated in it unless it says out=. We and the peer live in a process each; every
call is timed in one and the other in turn, the list twice over, and again in processes begun anew. The best time of
each counts: a machine that is slow for some seconds is so for both, and a process whose memory happens to lie badly, by
several per cent of a call, does not decide.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import (
    DEVICE,
    Times,
    add_peer,
    environment,
    host_table,
    host_us,
    library_name,
    parse,
    peer_environment,
    print_failures,
    print_table,
    table,
    write_results,
)

import flashinfer
from flashinfer import sampling

ADD, LOAD = "torch.add(out=)", "resolver.load, warm"
PROCESSES, TURNS = 4, 2  # of ours and of a peer, one of theirs behind one of ours
ROOT = Path(flashinfer.__file__).parent.parent

# In a process of its own: from the request to the launch of the first kernel, torch being initialized.
FIRST_CALL = """
import time, torch, flashinfer.norm
x = torch.randn(4, 4096).to("{device}", torch.bfloat16)
weight, out = torch.ones_like(x[0]), torch.empty_like(x)
torch.add(x, x, out=out)
start = time.perf_counter()
flashinfer.norm.rmsnorm(x, weight, out=out)
print((time.perf_counter() - start) * 1e3)
"""
IMPORT = """
import time, torch
start = time.perf_counter()
import flashinfer
print((time.perf_counter() - start) * 1e3)
"""


def in_process(code: str) -> float:
    """The number a fresh Python process prints, best of five."""
    run = lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: E731
    return min(float(run().stdout) for _ in range(5))


def operators(device: torch.device) -> dict[str, Callable[[], object]]:
    """Calls that are nearly free of work, so that the host is what they cost."""
    x, gated = torch.randn(4, 4096).to(device, torch.bfloat16), torch.randn(4, 8192).to(device, torch.bfloat16)
    weight, out = torch.ones(4096).to(device, torch.bfloat16), torch.empty_like(x)
    q, k = torch.randn(4, 32, 128).to(device, torch.bfloat16), torch.randn(4, 8, 128).to(device, torch.bfloat16)
    positions = torch.arange(4, dtype=torch.int32, device=device)
    qkv = torch.randn(4, 48, 128).to(device, torch.bfloat16)
    packed_q, packed_k, packed_v = qkv.split([32, 8, 8], dim=1)
    pages, zeros, head_weight = torch.zeros(1, 2, 16, 8, 128).to(device, torch.bfloat16), positions * 0, weight[:128]
    table = (zeros[:1], positions[:2])  # one page
    logits = torch.randn(4, 1000, device=device)
    probs = torch.softmax(logits, -1)
    top_k, top_p = positions + 40, torch.full((4,), 0.9, device=device)
    drafts, chain = torch.zeros(4, 2, dtype=torch.int32, device=device), probs[:, None].repeat(1, 3, 1)
    drafted = chain[:, :2].contiguous()
    return {
        ADD: lambda: torch.add(x, x, out=out),
        "torch.add": lambda: torch.add(x, x),
        "rmsnorm(out=)": lambda: flashinfer.rmsnorm(x, weight, out=out),
        "rmsnorm": lambda: flashinfer.rmsnorm(x, weight),
        "silu_and_mul(out=)": lambda: flashinfer.silu_and_mul(gated, out=out),
        "apply_rope_pos_ids_inplace": lambda: flashinfer.apply_rope_pos_ids_inplace(q, k, positions),
        "fused_qk_rmsnorm_rope": lambda: flashinfer.fused_qk_rmsnorm_rope(
            qkv, head_weight, head_weight, positions, 32, 8
        ),
        "rope_append_paged_kv_cache": lambda: flashinfer.rope_append_paged_kv_cache(
            packed_q, packed_k, packed_v, zeros, positions, pages, *table, q_out=packed_q
        ),
        "softmax": lambda: sampling.softmax(logits),
        "top_k_renorm_probs": lambda: sampling.top_k_renorm_probs(probs, 50),
        "sampling_from_logits": lambda: sampling.sampling_from_logits(logits),
        "sampling_from_probs": lambda: sampling.sampling_from_probs(probs),
        "top_p": lambda: sampling.top_p_sampling_from_probs(probs, 0.9),
        "top_k": lambda: sampling.top_k_sampling_from_probs(probs, 50),
        "min_p": lambda: sampling.min_p_sampling_from_probs(probs, 0.1),
        "top_k + top_p": lambda: sampling.top_k_top_p_sampling_from_probs(probs, 50, 0.9, None, "joint"),
        "the same, tensors": lambda: sampling.top_k_top_p_sampling_from_probs(probs, top_k, top_p, None, "joint"),
        "chain_speculative_sampling": lambda: sampling.chain_speculative_sampling(drafted, drafts, chain),
    }


def attention(device: torch.device) -> dict[str, Callable[[], object]]:
    """Four requests of 64 tokens, 32 query heads on 8 KV heads."""
    bf16 = torch.bfloat16
    indptr, each = (torch.arange(5, dtype=torch.int32, device=device) * n for n in (4, 1))
    indices = torch.arange(16, dtype=torch.int32, device=device)
    last_page_len = torch.full((4,), 16, dtype=torch.int32, device=device)
    table, shapes = (indptr, indices, last_page_len), (32, 8, 128, 16)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    q, cache = torch.randn(4, 32, 128).to(device, bf16), torch.randn(16, 2, 16, 8, 128).to(device, bf16)
    k, v = torch.randn(2, 4096, 8, 128).to(device, bf16)
    one_q, short_k, short_v = q[0], k[:64], v[:64]  # a view of a tensor costs its caller 1 us

    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
    cascade = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace)
    plan_decode = lambda: decode.plan(*table, *shapes, q_data_type=bf16)  # noqa: E731
    plan_prefill = lambda: prefill.plan(each, *table, *shapes, causal=True, q_data_type=bf16)  # noqa: E731
    plan_decode()
    plan_prefill()
    ends, first_pages = indptr[::4].contiguous() // 4, indices[:4]  # level 0: all queries over the first four pages
    cascade.plan(
        [ends, each], [ends, indptr], [first_pages, indices], [last_page_len[:1], last_page_len], *shapes,
        q_data_type=bf16,
    )  # fmt: skip
    out, lse = prefill.run(q, cache, return_lse=True)
    other, other_lse = prefill.run(q, cache, return_lse=True)
    outs, lses = torch.stack([out, other], 1), torch.stack([lse, other_lse], 1)
    slots, new_k, new_v = (each[:4], each[:4] * 0), k[:4], v[:4]
    return {
        "decode.plan": plan_decode,
        "decode.run(out=)": lambda: decode.run(q, cache, out=out),
        "decode.run": lambda: decode.run(q, cache),
        "decode.run(return_lse=True)": lambda: decode.run(q, cache, return_lse=True),
        "single_decode_with_kv_cache, 64 keys": lambda: flashinfer.single_decode_with_kv_cache(one_q, short_k, short_v),
        "the same, 4096 keys": lambda: flashinfer.single_decode_with_kv_cache(one_q, k, v),
        "prefill.plan": plan_prefill,
        "prefill.run(out=)": lambda: prefill.run(q, cache, out=out),
        "prefill.run": lambda: prefill.run(q, cache),
        "single_prefill_with_kv_cache, 64 keys": lambda: flashinfer.single_prefill_with_kv_cache(q, short_k, short_v),
        "the same, 4096 keys, two launches": lambda: flashinfer.single_prefill_with_kv_cache(q, k, v),
        "merge_state_in_place": lambda: flashinfer.merge_state_in_place(out, lse, other, other_lse),
        "merge_state": lambda: flashinfer.merge_state(out, lse, other, other_lse),
        "merge_states": lambda: flashinfer.merge_states(outs, lses),
        "cascade.run, two levels": lambda: cascade.run(q, cache),
        "append_paged_kv_cache": lambda: flashinfer.append_paged_kv_cache(
            new_k, new_v, *slots, cache, indices, indptr, last_page_len
        ),
    }


class Library:
    """A flashinfer in a process that this same script serves: a name in, its microseconds out."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        self._command = [sys.executable, __file__, "--device", args.device, "--only", args.only, "--serve"]
        self._folder = folder
        self.start()
        self.times = Times(self._about["library"], is_peer=True)
        self.names: list[str] = self._about["names"]

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            env=peer_environment(self._folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._about = self._answer()

    def measure(self, name: str) -> None:
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        answer = self._answer()
        if "failure" in answer:
            if answer["failure"] not in self.times.failures:
                self.times.failures.append(answer["failure"])
        else:
            column = self.times.columns.setdefault("host", {})
            column[name] = min(answer["us"], column.get(name, math.inf))

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that is timed ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.communicate()


def serve(calls: dict[str, Callable[[], object]]) -> None:
    """What `Library` talks to."""
    print(json.dumps({"library": library_name(), "names": list(calls)}), flush=True)
    for line in sys.stdin:
        name, times = line.rstrip("\n"), Times("", is_peer=True)
        times.measure(name, "host", lambda name=name: warm_us(calls[name]))
        us = times.us(name, "host")
        print(json.dumps({"failure": times.failures[0]} if math.isnan(us) else {"us": us}), flush=True)


def warm_us(call: Callable[[], object]) -> float:
    """Of a call that finds the memory of what it returns in one and the same place, whatever the process has allocated
    and freed before: one process would find a free block of the size, the other cut one and join it again at every
    call, which takes 0.3 to 0.6 us and is no merit of either library."""
    filling = fill_small_segments() if DEVICE == "cuda" else []
    results = [call(), call(), call()]
    results[1] = None
    us = host_us(call)
    del filling
    return us


def fill_small_segments() -> list[torch.Tensor]:
    """In every free place of torch's segments for small tensors: the next ones lie side by side in a new segment."""
    torch.cuda.empty_cache()  # of the segment of the call before, or there would be one more to fill at every call
    filling: list[torch.Tensor] = []
    reserved = torch.cuda.memory_reserved()
    while torch.cuda.memory_reserved() == reserved:
        filling += [torch.empty(1, device=DEVICE) for _ in range(256)]
    return filling


def warm_load_us(device: torch.device) -> float:
    """Of the resolver, for a kernel that is loaded."""
    from flashinfer import target
    from flashinfer.families.layout import vec_size
    from flashinfer.families.norm import RMSNORM
    from flashinfer.jit import default_resolver

    spec = RMSNORM.spec(
        target.of_device(device),
        dtype="bf16",
        hidden_size=4096,
        vec_size=vec_size("bf16", 4096),
        add_residual=False,
        gemma=False,
    )
    load = default_resolver().load
    load(spec)
    start = time.perf_counter()
    for _ in range(100_000):
        load(spec)
    return (time.perf_counter() - start) * 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="calls whose name contains this text")
    parser.add_argument("--no-start", action="store_true", help="leave out what takes processes of its own")
    add_peer(parser)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # in the process of a library
    args = parse(parser)
    device = torch.device(args.device)

    if args.serve:
        calls = operators(device) | attention(device)
        return serve({name: call for name, call in calls.items() if args.only in name or name == ADD})
    libraries = [Library(folder, args) for folder in (str(ROOT), args.peer) if folder]
    for process in range(PROCESSES if args.peer else 1):
        for library in libraries:
            if process:
                library.start()
        for _ in range(TURNS if args.peer else 1):
            for name in libraries[0].names:
                for library in libraries:
                    library.measure(name)
        for library in libraries:
            library.close()
    ours, *peers = (library.times for library in libraries)
    if ours.failures:
        raise SystemExit("\n".join(ours.failures))
    us = ours.columns["host"]
    if args.only in LOAD:
        us[LOAD] = warm_load_us(device)
    rows: list[list[object]] = [
        [name, us[name], us[name] / us[ADD], *(peer.us(name, "host") for peer in peers)] for name in us
    ]
    print_table(environment(), ["call", "host µs", "of torch.add", *(peer.library for peer in peers)], rows)
    print_failures(peers)
    tables = {"host": replace(host_table(ours, peers), partial=args.only)}
    if not args.no_start:
        starts = {
            "import flashinfer after torch": in_process(IMPORT),
            "first rmsnorm": in_process(FIRST_CALL.format(device=device)),
        }
        print_table("In a fresh process, ms", ["what", "ms"], [[what, ms] for what, ms in starts.items()])
        tables["start"] = table("ms", [(what, ms, {}, {}) for what, ms in starts.items()])
    write_results(args, tables, device=device.type)


if __name__ == "__main__":
    main()
