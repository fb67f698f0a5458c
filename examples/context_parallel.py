# SPDX-License-Identifier: Apache-2.0
"""One long request on several GPUs: its prompt by ring prefill, its cache spread over them page by page, then decode
and drafts over all of it.

    torchrun --nproc-per-node 4 examples/context_parallel.py [--tokens 1024] [--device cpu|cuda]

Keys, values and queries are random. Each step is compared with attention over the whole request, which rank 0 keeps.
Runs over NCCL where there is a GPU for each rank, else over gloo on the CPU.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

import flashinfer
from flashinfer.parallel import ContextParallel, all_to_all_heads, ring_prefill, zigzag_positions

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
NUM_DRAFTS = 4
MOST_OFF = 0.01  # relative difference that bf16 explains
DTYPE = torch.bfloat16


class Cache:
    """The pages of one request that this rank has: page p is on rank p mod W."""

    def __init__(self, most_tokens: int, rank: int, num_ranks: int, device: torch.device) -> None:
        self.rank, self.num_ranks, self.device = rank, num_ranks, device
        num_pages = -(-most_tokens // (PAGE_SIZE * num_ranks)) + 1
        shape = (num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.k, self.v = (torch.zeros(shape, dtype=DTYPE, device=device) for _ in range(2))

    def append(self, k: torch.Tensor, v: torch.Tensor, first: int) -> None:
        """Of tokens [first, first + len(k)), those that are of this rank."""
        tokens = torch.arange(first, first + len(k), device=self.device)
        pages = tokens // PAGE_SIZE
        mine = pages % self.num_ranks == self.rank
        at = pages[mine] // self.num_ranks, tokens[mine] % PAGE_SIZE
        self.k[at], self.v[at] = k[mine], v[mine]

    def table(self, num_local: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_pages = -(-num_local // PAGE_SIZE)
        last_page_len = (num_local - 1) % PAGE_SIZE + 1
        tables = [0, num_pages], list(range(num_pages)), [last_page_len]
        indptr, indices, last = (torch.tensor(one, dtype=torch.int32) for one in tables)
        return indptr, indices, last


def draw(seed: int, num_tokens: int, device: torch.device) -> list[torch.Tensor]:
    """q, k and v, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    heads = (NUM_QO_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    return [torch.randn(num_tokens, n, HEAD_DIM, generator=generator).to(device, DTYPE) for n in heads]


def check(what: str, found: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Against attention over the whole request."""
    expected = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True).float()
    off = float((found.float() - expected).norm() / expected.norm())
    if dist.get_rank() == 0:
        print(f"{what}: off by {off:.5f}", flush=True)
    assert off < MOST_OFF, f"{what} differs by {off}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt, rounded to two chunks a rank")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    args = parser.parse_args()
    num_ranks, local_rank = int(os.environ.get("WORLD_SIZE", 0)), int(os.environ.get("LOCAL_RANK", 0))
    if not num_ranks:
        parser.error("start it as torchrun --nproc-per-node 4 examples/context_parallel.py")
    on_gpu = torch.cuda.device_count() >= num_ranks if args.device is None else args.device == "cuda"
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    rank = dist.get_rank()
    num_tokens = -(-args.tokens // (2 * num_ranks)) * 2 * num_ranks

    # The prompt: every rank computes as much, on two chunks of the tokens.
    q, k, v = draw(0, num_tokens, device)
    own = zigzag_positions(num_tokens, num_ranks, rank).to(device)
    out = ring_prefill(q[own], k[own], v[own])
    everyone = [torch.empty_like(out) for _ in range(num_ranks)]
    dist.all_gather(everyone, out)
    order = torch.cat([zigzag_positions(num_tokens, num_ranks, one) for one in range(num_ranks)]).to(device)
    whole = torch.empty_like(q)
    whole[order] = torch.cat(everyone)
    check(f"ring prefill of {num_tokens} tokens", whole, q, k, v)

    # The same where each rank has all tokens of some heads (Ulysses), and back.
    parts = [all_to_all_heads(x.chunk(num_ranks)[rank]) for x in (q, k, v)]
    out = all_to_all_heads(flashinfer.single_prefill_with_kv_cache(*parts, causal=True), scatter="tokens")
    dist.all_gather(everyone, out)
    check("the same by an exchange of heads", torch.cat(everyone), q, k, v)

    # The cache: a page in num_ranks is here.
    parallel = ContextParallel()
    cache = Cache(num_tokens + 2 * (NUM_DRAFTS + 1), rank, num_ranks, device)
    cache.append(k, v, 0)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    decode, append = parallel.decode(workspace), parallel.append(workspace)
    shape = (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE)

    for step, num_new in enumerate((1, NUM_DRAFTS, 1), 1):
        q_new, k_new, v_new = draw(step, num_new, device)
        cache.append(k_new, v_new, len(k))
        k, v = torch.cat([k, k_new]), torch.cat([v, v_new])
        table = cache.table(int(parallel.local_lens([len(k)], PAGE_SIZE)))
        if num_new == 1:
            decode.plan(*table, *shape, q_data_type=DTYPE)
            result = decode.run(q_new, (cache.k, cache.v))
        else:
            qo_indptr = torch.tensor([0, num_new], dtype=torch.int32)
            append.plan(qo_indptr, *table, *shape, kv_lens=[len(k)], q_data_type=DTYPE)
            result = append.run(q_new, (cache.k, cache.v))
        assert isinstance(result, torch.Tensor)
        check(f"{num_new} new token{'s' * (num_new > 1)} over {len(k)}", result, q_new, k, v)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
