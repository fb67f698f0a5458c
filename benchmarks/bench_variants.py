# SPDX-License-Identifier: Apache-2.0
"""Functions of scores and masks: beside the option that does the same, and beside FlexAttention on the same function.

python benchmarks/bench_variants.py [--only documents] [--flex documents,strides] [--json]

bf16, 32 query heads on 8, head_dim 128. Prefill over rows, decode over pages of 16, FlexAttention over contiguous KV,
in decode also over pages of 128 by its PagedAttention, compiled with dynamic=False, which takes seconds a case, its
block masks made ahead. All of a case are timed in turns inside CUDA graphs, and the median of the rounds is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, Times, device_us_in_turns, environment, parser_of, print_table, run, table, write_results

import flashinfer

sys.path.append(str(Path(__file__).resolve().parent.parent))
from examples import attention_variants as examples

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, FLEX_PAGE_SIZE = 32, 8, 128, 16, 128
PEERS = ("option", "FlexAttention", "FlexAttention over pages")
DISTANCE, WINDOW, NUM_FIRST, CHUNK, DOCUMENT, BLOCK, DRAFTS = 128, 1024, 4, 2048, 1024, 128, 32


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    length: int
    functions: Callable[[Tables], dict[str, Any]]
    option: dict[str, Any] = field(default_factory=dict)  # that does the same; none: nothing does
    num_queries: int = 0  # of a request: 0, as many as keys

    @property
    def is_decode(self) -> bool:
        return self.num_queries == 1


class Tables:
    """Tensors of the functions of one case."""

    def __init__(self, batch: int, length: int) -> None:
        self.bias = torch.randn(HEADS, 2 * DISTANCE + 1, device=DEVICE)
        self.slopes = flashinfer.utils.get_alibi_slopes(HEADS, torch.device(DEVICE))
        documents = torch.arange(length, device=DEVICE) // DOCUMENT
        self.documents = documents.int().expand(batch, -1).contiguous()
        self.starts = (documents * DOCUMENT).int().expand(batch, -1).contiguous()
        self.prefix_len = torch.full((batch,), length // 4, dtype=torch.int32, device=DEVICE)
        num_blocks = -(-length // BLOCK)
        self.blocks = torch.rand(num_blocks, num_blocks, device=DEVICE) < 0.25
        self.blocks.fill_diagonal_(True)
        self.num_seen = torch.full((batch,), length - DRAFTS, dtype=torch.int32, device=DEVICE)
        parents = [max(0, i // 2 * 2 - 1) for i in range(DRAFTS)]  # a tree of twos
        words = [1] * DRAFTS
        for i in range(1, DRAFTS):
            words[i] = words[parents[i]] | 1 << i
        ancestors = torch.tensor(words).to(DEVICE).to(torch.int32)
        self.ancestors = ancestors.expand(batch, -1).contiguous()


@flashinfer.mask(n=int)
def window(b, h, q, k, x):
    return (k <= q) & (q - k <= x.n)


@flashinfer.mask(is_seen="bool[n, m]")
def blocks(b, h, q, k, x):
    """A quarter of the blocks, and those of the diagonal."""
    return (k <= q) & x.is_seen[q // 128, k // 128]


@flashinfer.mask(n=int)
def strides(b, h, q, k, x):
    """A window, and behind it one of four blocks (Sparse Transformers)."""
    return (k <= q) & ((q - k <= x.n) | (k // 128 % 4 == 3))


def t5(t: Tables) -> Any:
    return examples.t5(bias=t.bias, L=DISTANCE)


CAUSAL: dict[str, Any] = {"mask": examples.causal}
CASES = [
    Case("causal", 4, 4096, lambda t: CAUSAL, {"causal": True}),
    Case("ALiBi", 4, 4096, lambda t: {**CAUSAL, "variant": examples.alibi(slopes=t.slopes)},
         {"causal": True, "pos_encoding_mode": "ALIBI"}),
    Case("soft cap", 4, 4096, lambda t: {**CAUSAL, "variant": examples.soft_cap(cap=30.0)},
         {"causal": True, "logits_soft_cap": 30.0}),
    Case("window", 1, 16384, lambda t: {"mask": window(n=WINDOW)}, {"causal": True, "window_left": WINDOW}),
    Case("T5", 4, 4096, lambda t: {**CAUSAL, "variant": t5(t)}),
    Case("prefix-LM", 4, 4096, lambda t: {"mask": examples.prefix_lm(prefix_len=t.prefix_len)}),
    Case("documents", 1, 16384, lambda t: {"mask": examples.documents(document=t.documents)}),
    Case("documents by start", 1, 16384, lambda t: {"mask": examples.documents_from(start=t.starts)}),
    Case("window and first", 1, 16384,
         lambda t: {"mask": examples.window_and_first(window=WINDOW, num_first=NUM_FIRST)}),
    Case("chunks", 1, 16384, lambda t: {"mask": examples.chunked(chunk=CHUNK)}),
    Case("blocks", 1, 16384, lambda t: {"mask": blocks(is_seen=t.blocks)}),
    Case("strides", 1, 16384, lambda t: {"mask": strides(n=WINDOW)}),
    Case("tree", 64, 4096, lambda t: {"mask": examples.tree(num_seen=t.num_seen, ancestors=t.ancestors)},
         num_queries=DRAFTS),
    Case("decode, ALiBi", 64, 4096, lambda t: {"variant": examples.alibi(slopes=t.slopes)},
         {"pos_encoding_mode": "ALIBI"}, num_queries=1),
    Case("decode, T5", 64, 4096, lambda t: {"variant": t5(t)}, num_queries=1),
]  # fmt: skip
if DEVICE == "cpu":  # that they run
    CASES = [Case(c.name, 1, 64, c.functions, c.option, c.num_queries) for c in CASES]


class Problem:
    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.tables = case, Tables(case.batch, case.length)
        self.num_queries = case.num_queries or case.length
        self.q = torch.randn(case.batch * self.num_queries, HEADS, HEAD_DIM, device=DEVICE).bfloat16()
        self.k, self.v = (
            torch.randn(case.batch * case.length, KV_HEADS, HEAD_DIM, device=DEVICE).bfloat16() for _ in "kv"
        )
        self.out = torch.empty_like(self.q)

    def launch(self, options: dict[str, Any]) -> Callable[[], Any]:
        case, size = self.case, 256 << 20 if DEVICE == "cuda" else 8
        workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        steps = torch.arange(case.batch + 1, dtype=torch.int32, device=DEVICE)
        wrapper: Any
        if case.is_decode:
            num_pages = case.length // PAGE_SIZE
            pages = torch.arange(case.batch * num_pages, dtype=torch.int32, device=DEVICE)
            last = torch.full((case.batch,), PAGE_SIZE, dtype=torch.int32, device=DEVICE)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
            wrapper.plan(
                steps * num_pages,
                pages,
                last,
                HEADS,
                KV_HEADS,
                HEAD_DIM,
                PAGE_SIZE,
                q_data_type=torch.bfloat16,
                **options,
            )
            cache = tuple(x.view(-1, PAGE_SIZE, KV_HEADS, HEAD_DIM) for x in (self.k, self.v))
            return lambda: wrapper.run(self.q, cache, out=self.out)
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace)
        qo_indptr, kv_indptr = steps * self.num_queries, steps * case.length
        wrapper.plan(qo_indptr, kv_indptr, HEADS, KV_HEADS, HEAD_DIM, q_data_type=torch.bfloat16, **options)
        return lambda: wrapper.run(self.q, self.k, self.v, out=self.out)

    def flex(self, compiled: Callable[..., Any]) -> Callable[[], Any]:
        from torch.nn.attention.flex_attention import create_block_mask

        case, tables = self.case, self.tables
        q, k, v = (x.view(case.batch, -1, x.shape[1], HEAD_DIM).transpose(1, 2) for x in (self.q, self.k, self.v))
        score_mod, mask_mod = flex_functions(case.name, tables)
        mask = None
        if mask_mod is not None:
            batch = case.batch if case.name in ("prefix-LM", "tree") else None
            mask = create_block_mask(mask_mod, batch, None, self.num_queries, case.length, DEVICE)
        return lambda: compiled(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=True)

    def flex_over_pages(self, compiled: Callable[..., Any]) -> Callable[[], Any]:
        """Of decode. A page of theirs is a block of the mask; blocks of 16 would be slower."""
        from torch.nn.attention.experimental._paged_attention import PagedAttention
        from torch.nn.attention.flex_attention import create_block_mask, noop_mask

        batch, length = self.case.batch, self.case.length
        pages = PagedAttention(batch * length // FLEX_PAGE_SIZE, FLEX_PAGE_SIZE, batch, DEVICE)
        for request in torch.arange(batch, device=DEVICE):
            pages.reserve(request, torch.tensor(length, device=DEVICE))
        q, k, v = (x.view(batch, -1, x.shape[1], HEAD_DIM).transpose(1, 2) for x in (self.q, self.k, self.v))
        k_cache, v_cache = (self.q.new_empty(1, KV_HEADS, batch * length, HEAD_DIM) for _ in "kv")
        positions = torch.arange(length, device=DEVICE).expand(batch, -1)
        pages.assign(torch.arange(batch, device=DEVICE), positions, k, v, k_cache, v_cache)
        score_mod, _ = flex_functions(self.case.name, self.tables)
        mask = create_block_mask(noop_mask, batch, None, 1, length, DEVICE, BLOCK_SIZE=(128, FLEX_PAGE_SIZE))
        mask, score_mod = pages.convert_logical_block_mask(mask), pages.get_score_mod(score_mod)
        return lambda: compiled(q, k_cache, v_cache, score_mod=score_mod, block_mask=mask, enable_gqa=True)


def flex_functions(name: str, t: Tables) -> tuple[Any, Any]:
    """The same, as FlexAttention takes them: tensors of the closure, numbers compiled in."""
    length = t.documents.shape[1]

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k <= q

    masks = {
        "window": lambda b, h, q, k: (k <= q) & (q - k <= WINDOW),
        "prefix-LM": lambda b, h, q, k: (k <= q) | (k < t.prefix_len[b]),
        "documents": lambda b, h, q, k: (k <= q) & (t.documents[0, q] == t.documents[0, k]),
        "documents by start": lambda b, h, q, k: (k <= q) & (k >= t.starts[0, q]),
        "window and first": lambda b, h, q, k: (k <= q) & ((q - k <= WINDOW) | (k < NUM_FIRST)),
        "chunks": lambda b, h, q, k: (k <= q) & (q // CHUNK == k // CHUNK),
        "blocks": lambda b, h, q, k: (k <= q) & t.blocks[q // BLOCK, k // BLOCK],
        "strides": lambda b, h, q, k: (k <= q) & ((q - k <= WINDOW) | (k // BLOCK % 4 == 3)),
        "tree": lambda b, h, q, k: (
            (k < t.num_seen[b]) | ((t.ancestors[b, q] >> (k - t.num_seen[b]).clamp(0, DRAFTS - 1) & 1) == 1)
        ),
        **dict.fromkeys(("decode, ALiBi", "decode, T5")),
    }
    at = length - 1 if name.startswith("decode") else 0
    scores = {
        "ALiBi": lambda score, b, h, q, k: score + t.slopes[h] * (k - q - at),
        "T5": lambda score, b, h, q, k: score + t.bias[h, (q + at - k).clamp(-DISTANCE, DISTANCE) + DISTANCE],
        "soft cap": lambda score, b, h, q, k: 30.0 * torch.tanh(score / 30.0),
    }
    return scores.get(name.removeprefix("decode, ")), masks.get(name, causal)


def is_named(names: str, case: Case) -> bool:
    """By one of several texts with commas between them."""
    return any(name in case.name for name in names.split(","))


def prepare(case: Case) -> tuple[Problem, dict[str, Callable[[], Any]]]:
    problem = Problem(case)
    calls = {"function": problem.launch(case.functions(problem.tables))}
    if case.option:
        calls["option"] = problem.launch(case.option)
    for call in calls.values():
        call()
    return problem, calls


def measure(args: argparse.Namespace, times: Times) -> None:
    compiled = None
    if DEVICE == "cuda" and args.flex:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.config.recompile_limit = 64
        compiled = torch.compile(flex_attention, dynamic=False)
    chosen = [case for case in CASES if is_named(args.only, case)]
    with ThreadPoolExecutor(8) as pool:  # kernels compile side by side
        prepared = list(pool.map(prepare, chosen))
    for case, (problem, calls) in zip(chosen, prepared):
        calls["function"]()
        if case.option:
            ours = problem.out.clone()
            calls["option"]()
            torch.testing.assert_close(ours, problem.out, atol=3e-2, rtol=3e-2)
        if compiled is not None and (args.flex == "all" or is_named(args.flex, case)):
            calls["function"]()
            peers = {"FlexAttention": problem.flex}
            if case.is_decode:
                peers["FlexAttention over pages"] = problem.flex_over_pages
            for name, peer in peers.items():
                try:
                    flex = peer(compiled)
                    theirs = flex().transpose(1, 2).reshape(problem.out.shape)
                except RuntimeError as error:  # what it does not compile
                    print(f"{name}, {case.name}: {str(error).splitlines()[0]:.200}", file=sys.stderr)
                else:
                    torch.testing.assert_close(problem.out, theirs, atol=3e-2, rtol=3e-2)
                    calls[name] = flex
    for case, (_, calls) in zip(chosen, prepared):  # when nothing compiles any more
        kinds, rounds = {name: [call] for name, call in calls.items()}, 6 if case.option else 2  # options are closer
        for name, us in device_us_in_turns(kinds, rounds=rounds).items():
            times.measure(case.name, name, lambda us=us: us)


def main() -> None:
    parser = parser_of(__doc__, only=False, host=False)
    parser.add_argument("--only", default="", help="cases whose name contains this text, or one of several with commas")
    parser.add_argument(
        "--flex",
        default="",
        help="likewise, of these, which are timed beside FlexAttention, whose compiles take long; or all",
    )
    args, ours, _ = run(parser, measure)
    print(environment())
    rows: list[list[object]] = []
    timed = []
    for case in CASES:
        if not is_named(args.only, case):
            continue
        us, option, flex, paged = (ours.us(case.name, name) for name in ("function", *PEERS))
        size = f"{case.batch} x {case.length}"
        rows.append([case.name, size, us, option, us / option, flex, flex / us, paged, paged / us])
        moved = {"bytes": 2.0 * case.batch * case.length * KV_HEADS * HEAD_DIM * 2} if case.is_decode else {}
        timed.append((f"{case.name}, {size}", us, dict(zip(PEERS, (option, flex, paged))), moved))
    columns = ["case", "batch x length", "us", "option us", "of the option", "FlexAttention us", "times as fast"]
    columns += ["over pages us", "times as fast"]
    print_table("Variants, bf16", columns, rows)
    write_results(args, {"variants": table("us", timed, partial=args.only)})


if __name__ == "__main__":
    main()
