# SPDX-License-Identifier: Apache-2.0
"""What is asked for when the models of a config are served, on a CPU or on GPUs; `main` prints one JSON array of specs.

Kernels do nothing here, so that only the asking takes time. Run it in a process of its own: operators remember what
they launch, and GPUs are pretended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

import flashinfer
from flashinfer import causal_conv1d, gdn_decode, gdn_prefill, prefill, rope
from flashinfer import target as targets
from flashinfer.aot.config import find_config, read_config
from flashinfer.aot.models import WINDOWED_LAYERS, Model
from flashinfer.attention.mla import sparse
from flashinfer.dtypes import torch_dtype
from flashinfer.families.attention.prefill import LONG_ROWS, MANY_ROWS
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.spec import KernelSpec
from tests.aot.pretended_gpus import GPUS, Idle, install

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True)
class Place:
    """Where a model is served, in which dtype, and whether some of it is fp8."""

    device: torch.device
    dtype: torch.dtype
    has_fp8: bool

    def tensor(self, *shape: int, of: torch.dtype | None = None) -> torch.Tensor:
        make = torch.empty if self.is_gpu else torch.zeros
        return make(shape, dtype=of or self.dtype, device=self.device)

    def int32(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def multiplies_fp8(self) -> bool:
        return self.is_gpu and self.has_fp8 and torch.cuda.get_device_capability(self.device.index) >= (8, 9)

    @property
    def has_indexer(self) -> bool:
        """Whether engines pick lists of rows there."""
        return self.is_gpu and torch.cuda.get_device_capability(self.device.index)[0] in (9, 10)

    @property
    def mixes(self) -> bool:
        """Whether the core set is for mixed batches there."""
        return not self.is_gpu or (self.has_fp8 and torch.cuda.get_device_capability(self.device.index) == (9, 0))

    @property
    def cache_dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.dtype, FP8) if self.is_gpu and self.has_fp8 else (self.dtype,)

    def caches(self, num_heads: int, dim: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """A cache as engines have it, three pages, and what its wrappers are told: SGLang's pages of one token, keys
        and values apart; vLLM's, both in one row."""
        for dtype in self.cache_dtypes:
            halves = self.tensor(3, 1, num_heads, dim, of=dtype), self.tensor(3, 1, num_heads, dim, of=dtype)
            yield halves, {"kv_layout": "NHD", "page_size": 1}
            row = self.tensor(3, num_heads, 16, 2 * dim, of=dtype)
            yield row.split(dim, dim=-1), {"kv_layout": "HND", "page_size": 16}


# --------------------------------------------------------------------------------------------------------------- models


def serve(model: Model, rank: int, place: Place) -> None:
    """One layer of some prefill steps and one decode step, on one of `rank` GPUs."""
    norm(model.hidden_size, model.gemma_norm, place)
    for size in model.intermediate_sizes:
        activate(size // rank, model.activation, place)
    if model.fp8_blocks and place.multiplies_fp8:
        multiply(model.hidden_size, model.intermediate_sizes[-1], place)
    share = {"num_qo_heads": model.num_qo_heads // rank, "num_kv_heads": max(1, model.num_kv_heads // rank)}
    rest = {"name": "", "hidden_size": 0, "intermediate_sizes": (), "vocab_size": 0, "tensor_parallel": ()}
    if model.linear_num_value_heads:
        share |= {name: getattr(model, name) // rank for name in ("linear_num_key_heads", "linear_num_value_heads")}
        of_rank = dataclasses.replace(model, **share)
        advance(of_rank.linear_num_key_heads, of_rank.linear_num_value_heads, of_rank, place)
    (attend_latent if model.kv_lora_rank else attend)(dataclasses.replace(model, **share, **rest), place)


# Each of these asks for the same when it is called again.


@functools.cache
def norm(hidden_size: int, is_gemma: bool, place: Place) -> None:
    x = place.tensor(3, hidden_size)
    rmsnorm(is_gemma)(x, x[0])
    add_rmsnorm = flashinfer.gemma_fused_add_rmsnorm if is_gemma else flashinfer.fused_add_rmsnorm
    add_rmsnorm(x, x.clone(), x[0].clone())
    if place.multiplies_fp8 and not is_gemma:
        flashinfer.norm.rmsnorm_quant(x.to(FP8), x, x[0], 1.0)
        flashinfer.norm.fused_add_rmsnorm_quant(x.to(FP8), x, x.clone(), x[0], 1.0)


def rmsnorm(is_gemma: bool) -> Callable[..., torch.Tensor]:
    return flashinfer.gemma_rmsnorm if is_gemma else flashinfer.rmsnorm


@functools.cache
def activate(size: int, activation: str, place: Place) -> None:
    gate_up = place.tensor(3, 2 * size)
    getattr(flashinfer, f"{activation}_and_mul")(gate_up)
    if place.multiplies_fp8 and activation == "silu":
        flashinfer.activation.silu_and_mul_quant(place.tensor(3, size, of=FP8), gate_up, 1.0)


@functools.cache
def multiply(hidden_size: int, intermediate_size: int, place: Place) -> None:
    """Projections up and down, of latent rows and of one head, of few rows and of many; experts of the same."""
    sizes = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size), (2112, hidden_size), (128, 512)
    for (n, k), num_rows in itertools.product(sizes, (1, 100, 300, 5000)):
        weight, scale = place.tensor(n, k, of=FP8), place.tensor(-(-n // 128), k // 128, of=torch.float32)
        flashinfer.gemm.fp8_blockscale_gemm_sm90(place.tensor(num_rows, k), weight, None, scale, None, place.dtype)
    x, x_scale = place.tensor(4000, k, of=FP8), place.tensor(k // 128, 4000, of=torch.float32)
    for num_experts in (2, 16, 100):
        weights = place.tensor(num_experts, n, k, of=FP8), place.tensor(num_experts, k // 128, 1, of=torch.float32)
        offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=place.device)
        flashinfer.group_gemm_fp8_nt_groupwise(x, weights[0], x_scale, weights[1], offsets, out_dtype=place.dtype)


def sample(vocab_size: int, device: torch.device) -> None:
    for num_rows in (2,) if device.type == "cpu" else (1, 2, 64, 100, 160, 300, 600):
        probs = torch.empty(num_rows, vocab_size, device=device)
        flashinfer.sampling.softmax(probs)
        for draw in (flashinfer.sampling_from_probs, flashinfer.sampling_from_logits):
            draw(probs)
        flashinfer.top_p_sampling_from_probs(probs, 0.9)
        flashinfer.top_k_sampling_from_probs(probs, 50)
        flashinfer.min_p_sampling_from_probs(probs, 0.1)
        for order in ("joint", "top_k_first"):
            flashinfer.top_k_top_p_sampling_from_probs(probs, 50, 0.9, filter_apply_order=order)
            flashinfer.top_k_top_p_sampling_from_logits(probs, 50, 0.9, filter_apply_order=order)
        flashinfer.top_p_renorm_probs(probs, 0.9)
        flashinfer.top_k_renorm_probs(probs, 50)
        flashinfer.top_k_mask_logits(probs, 50)


@functools.cache
def attend(model: Model, place: Place) -> None:
    """With the heads of one rank."""
    num_qo, num_kv, dim = model.num_qo_heads, model.num_kv_heads, model.head_dim
    tensor, int32 = place.tensor, place.int32
    qkv = tensor(3, num_qo + 2 * num_kv, dim)
    q, k, v = qkv.split([num_qo, num_kv, num_kv], dim=1)
    gated = tensor(3, num_qo, 2 * dim)[..., :dim]  # as projected beside the gates of the output
    rotary_dim = model.rotary_dim or dim
    turns: dict[str, Any] = {"rotary_dim": rotary_dim, "interleave": model.interleave}
    if model.qk_norm:
        for heads in (q, k, gated):
            rmsnorm(model.gemma_norm)(heads, tensor(dim))
        heads_of = (num_qo, num_kv)
        for positions in (int32(0, 1, 2), int32(0, 1, 2).long()):
            for table in (None, tensor(8, rotary_dim, of=torch.float32), tensor(8, rotary_dim)):
                given = (qkv.flatten(1), tensor(dim), tensor(dim), positions, *heads_of)
                rope.fused_qk_rmsnorm_rope(*given, **turns, cos_sin_cache=table)
    for positions in (int32(0, 1, 2), int32(0, 1, 2).long()):
        flashinfer.apply_rope_pos_ids(q, k, positions, **turns)
        flashinfer.apply_llama31_rope_pos_ids_inplace(q, k, positions, **turns)
        for table in (tensor(8, rotary_dim, of=torch.float32), tensor(8, rotary_dim)):
            with_table = (positions, q.flatten(1), k.flatten(1), dim, table, not model.interleave)
            flashinfer.apply_rope_with_cos_sin_cache(*with_table)
            flashinfer.apply_rope_with_cos_sin_cache_inplace(*with_table)
    flashinfer.apply_rope(q, k, int32(0, 3), int32(0), **turns)
    flashinfer.apply_rope_inplace(q, k, int32(0, 3), int32(0), **turns)

    qo_indptr, kv_indptr, kv_indices, last = int32(0, 3), int32(0, 1), int32(1), int32(1)
    for indices in ((qo_indptr, int32(3)), (qo_indptr.long(), int32(3).long())):
        flashinfer.get_batch_indices_positions(*indices, 3)  # what an idle kernel leaves there is no index
    for indices in ((kv_indptr, last), (kv_indptr.long(), last.long())):
        flashinfer.get_seq_lens(*indices, 16)
    for cache, how in place.caches(num_kv, dim):
        slots = (int32(0, 0, 0), int32(0, 0, 0), cache, kv_indices, kv_indptr, last, how["kv_layout"])
        flashinfer.append_paged_kv_cache(k, v, *slots)
        rope.rope_append_paged_kv_cache(q, k, v, *slots, **turns)
    workspace = tensor(128 << 20 if place.is_gpu else 1 << 20, of=torch.uint8)
    for has_window in WINDOWED_LAYERS[model.windowed_layers]:
        score: dict[str, Any] = {
            "window_left": 1024 if has_window else -1,
            "logits_soft_cap": 50.0 if model.soft_cap else 0.0,
        }
        for cache, how in place.caches(num_kv, dim):
            attend_paged(workspace, (num_qo, num_kv, dim), cache, how, score, place)
            if model.mixed_batches and not has_window and cache[0].dtype == place.dtype and place.mixes:
                attend_mixed(workspace, (num_qo, num_kv, dim), cache, how, score, place)
        # A prompt of each class.
        long = -(-max(LONG_ROWS * num_kv, MANY_ROWS) // num_qo)
        for num_tokens in (3, 3 + 64 * num_kv, long) if place.is_gpu else (3,):
            own = [tensor(num_tokens, heads, dim) for heads in (num_qo, num_kv, num_kv)]
            offsets = int32(0, num_tokens)
            ragged = prefill.BatchPrefillWithRaggedKVCacheWrapper(workspace)
            ragged.plan(offsets, offsets, num_qo, num_kv, dim, causal=True, q_data_type=place.dtype, **score)
            ragged.run(*own)
            flashinfer.single_prefill_with_kv_cache(*own, causal=True, **score)
        flashinfer.single_decode_with_kv_cache(own[0][0], *own[1:], **score)
        if place.is_gpu:  # of so many keys that they are shared out
            many = tensor(1 << 14, num_kv, dim), tensor(1 << 14, num_kv, dim)
            flashinfer.single_prefill_with_kv_cache(own[0][:3], *many, causal=True, **score)
            flashinfer.single_decode_with_kv_cache(own[0][0], *many, **score)

    state = tensor(3, num_qo, dim), tensor(3, num_qo, of=torch.float32)
    flashinfer.merge_state(*state, *state)
    flashinfer.merge_states(tensor(3, 2, num_qo, dim), tensor(3, 2, num_qo, of=torch.float32))


def attend_paged(
    workspace: torch.Tensor, heads: tuple[int, int, int], cache: Any, how: dict[str, Any], score: Any, place: Place
) -> None:
    (num_qo, num_kv, dim), page_size = heads, how["page_size"]
    cache_dtype = cache.dtype if isinstance(cache, torch.Tensor) else cache[0].dtype
    batch = {"q_data_type": place.dtype, "kv_data_type": cache_dtype, **score}
    pages = place.int32(0, 1), place.int32(1), place.int32(1)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, how["kv_layout"])
    decode.plan(*pages, *heads, page_size, **batch)
    decode.run(place.tensor(1, num_qo, dim), cache)
    paged = prefill.BatchPrefillWithPagedKVCacheWrapper(workspace, how["kv_layout"])
    # A short request, and a long one; not causal: what every token sees of a shared prefix, which is no window.
    for num_tokens in (3, 3 + 64 * num_kv) if place.is_gpu else (3,):
        for causal in (True, False) if score["window_left"] < 0 else (True,):
            paged.plan(place.int32(0, num_tokens), *pages, *heads, page_size, causal=causal, **batch)
            paged.run(place.tensor(num_tokens, num_qo, dim), cache)
    if cache_dtype == FP8 and page_size > 1:  # vLLM's, with its q in fp8
        options = {"o_data_type": place.dtype, **batch, "q_data_type": FP8}
        decode.plan(*pages, *heads, page_size, **options)
        decode.run(place.tensor(1, num_qo, dim, of=FP8), cache)
        for num_tokens in (3, 3 + 64 * num_kv):
            paged.plan(place.int32(0, num_tokens), *pages, *heads, page_size, causal=True, **options)
            paged.run(place.tensor(num_tokens, num_qo, dim, of=FP8), cache)


def attend_mixed(
    workspace: torch.Tensor, heads: tuple[int, int, int], cache: Any, how: dict[str, Any], score: Any, place: Place
) -> None:
    """A request to decode beside a prompt of each class, or of no tokens: as one batch, and by the wrapper of POD."""
    (num_qo, num_kv, dim), page_size, int32 = heads, how["page_size"], place.int32
    if page_size == 1:
        return
    attention = flashinfer.BatchAttention(how["kv_layout"], place.device)
    pod = flashinfer.BatchPODWithPagedKVCacheWrapper(workspace, how["kv_layout"])
    long = -(-max(LONG_ROWS * num_kv, MANY_ROWS) // num_qo)
    for num_tokens in (0, 3 + 64 * num_kv, long) if place.is_gpu else (3,):
        q, offsets = place.tensor(num_tokens + 1, num_qo, dim), int32(0, num_tokens, num_tokens + 1)
        attention.plan(
            offsets, int32(0, 1, 2), int32(1, 2), int32(1, 1), *heads[:2], dim, dim, page_size, causal=True,
            logits_soft_cap=score["logits_soft_cap"], q_data_type=place.dtype, kv_data_type=place.dtype,
        )  # fmt: skip
        attention.run(q, cache)
        if num_tokens and not score["logits_soft_cap"]:  # of which that of POD has none
            pages, one_each = (int32(0, 1), int32(1), int32(1)), torch.tensor([0, 1], dtype=torch.int32)
            pod.plan(offsets[:2], *pages, one_each, *pages, *heads, page_size, q_data_type=place.dtype)
            pod.run(q[:-1], cache, q[-1:], cache, causal_p=True)


@functools.cache
def advance(num_heads: int, num_v_heads: int, model: Model, place: Place) -> None:
    """A layer of a gated delta rule: the next tokens of requests, one of each or a draft."""
    tensor, int32 = place.tensor, place.int32
    dims = model.linear_key_head_dim, model.linear_key_head_dim, model.linear_value_head_dim
    widths = [heads * dim for heads, dim in zip((num_heads, num_heads, num_v_heads), dims)]
    weight, history = tensor(sum(widths), model.linear_conv_kernel_dim), model.linear_conv_kernel_dim - 1
    slots = int32(1, 0)
    for states in (tensor(3, sum(widths), history), tensor(3, history, sum(widths)).transpose(1, 2)):
        prompt = tensor(6, sum(widths)).T
        causal_conv1d.causal_conv1d_fn(prompt, weight, None, states, int32(0, 2, 6), slots)
        causal_conv1d.causal_conv1d_update(tensor(2, sum(widths)), states, weight, None, "silu", slots)
    a_log = tensor(num_v_heads, of=torch.float32)
    for num_tokens, state_dtype in itertools.product((1, 3), dict.fromkeys((torch.float32, place.dtype))):
        parts = tensor(2, num_tokens, sum(widths)).split(widths, dim=-1)
        rows = [part.unflatten(-1, (-1, dim)) for part, dim in zip(parts, dims)]
        a, b = tensor(2, num_tokens, num_v_heads), tensor(2, num_tokens, num_v_heads)
        pool = tensor(3, num_v_heads, dims[2], dims[0], of=state_dtype)
        for bias_dtype in dict.fromkeys((torch.float32, place.dtype)):
            gates = a_log, a, tensor(num_v_heads, of=bias_dtype), b
            gdn_decode.gated_delta_rule_decode_pretranspose(
                *rows, None, *gates, initial_state=pool, initial_state_indices=slots
            )
            kept = tensor(2, num_tokens, *pool.shape[1:], of=state_dtype)
            gdn_decode.gated_delta_rule_mtp(*rows, pool, slots, *gates, intermediate_states_buffer=kept)
    for num_requests, state_dtype, normalize in itertools.product((1, 200), (torch.float32, BF16), (False, True)):
        q, k, v = (tensor(num_requests, heads, 128) for heads in (num_heads, num_heads, num_v_heads))
        gates = tensor(num_requests, num_v_heads, of=torch.float32)
        pool = tensor(3, num_v_heads, 128, 128, of=state_dtype)
        gdn_prefill.chunk_gated_delta_rule(
            q, k, v, gates, gates, None, pool, False, int32(*range(num_requests + 1)), normalize,
            state_indices=int32(*[1] * num_requests), _cp_chunk_len=64 if num_requests > 64 else None,
        )  # fmt: skip
    x = tensor(3, num_v_heads, dims[2])
    flashinfer.gated_rmsnorm(x, x, x[0, 0])
    if place.multiplies_fp8:
        flashinfer.gated_rmsnorm_quant(x.to(FP8), x, x, x[0, 0], 1.0)


@functools.cache
def attend_latent(model: Model, place: Place) -> None:
    num_heads, dims = model.num_qo_heads, (model.kv_lora_rank, model.qk_rope_head_dim)
    tensor, int32 = place.tensor, place.int32
    for latent in filter(None, (model.q_lora_rank, model.kv_lora_rank)):
        flashinfer.rmsnorm(tensor(3, latent), tensor(latent))
    row, q = tensor(3, sum(dims)), tensor(3, num_heads, model.qk_nope_head_dim + dims[1])
    q_pe, kpe = q[..., model.qk_nope_head_dim :], row[:, None, dims[0] :]
    for positions in (int32(0, 1, 2), int32(0, 1, 2).long()):
        flashinfer.apply_rope_pos_ids(q_pe, kpe, positions, interleave=True)
        for table in (tensor(8, dims[1], of=torch.float32), tensor(8, dims[1])):
            flat = q_pe.flatten(1), kpe.flatten(1)
            flashinfer.apply_rope_with_cos_sin_cache(positions, *flat, dims[1], table, is_neox=False)
    flashinfer.apply_rope(q_pe, kpe, int32(0, 3), int32(0), interleave=True)

    flashinfer.get_seq_lens(int32(0, 1), int32(3), 64)
    flashinfer.get_batch_indices_positions(int32(0, 3), int32(3), 3)
    workspace = tensor(128 << 20 if place.is_gpu else 1 << 20, of=torch.uint8)
    absorbed = flashinfer.BatchMLAPagedAttentionWrapper(workspace)
    for cache_dtype, page_size in itertools.product(place.cache_dtypes, (1, 64)):
        cache = tensor(4, page_size, sum(dims), of=cache_dtype)
        caches, pages = (cache[..., : dims[0]], cache[..., dims[0] :]), int32(1, 2, 3)
        rows, where = (row[:, : dims[0]], row[:, dims[0] :]), (int32(0, 0, 0), int32(0, 0, 0))
        flashinfer.append_paged_mla_kv_cache(*rows, *where, *caches, pages, int32(0, 3), int32(1))
        for num_tokens, causal in itertools.product((1, 40) if place.is_gpu else (3,), (True, False)):
            shape = (num_heads, *dims, page_size, causal, 0.1, place.dtype, cache_dtype)
            absorbed.plan(int32(0, num_tokens), int32(0, 3), pages, int32(3), *shape)
            absorbed.run(tensor(num_tokens, num_heads, dims[0]), tensor(num_tokens, num_heads, dims[1]), *caches)
        if place.is_gpu:  # on a CPU an idle kernel leaves no lengths to plan for
            for num_tokens in (1, 40):
                queries, lists = tensor(num_tokens, num_heads, sum(dims)), tensor(num_tokens, 32, of=torch.int32)
                flashinfer.mla.sparse_mla_prefill(queries, cache.flatten(0, 1), lists, 0.1, dims[0])
    if place.has_indexer and model.scaled_rows:
        packed = tensor(4, 64, 656, of=torch.uint8)
        for num_tokens in (1, 40):
            queries, lists = tensor(num_tokens, num_heads, sum(dims)), tensor(num_tokens, 32, of=torch.int32)
            flashinfer.mla.sparse_mla_prefill(queries, packed.flatten(0, 1), lists, 0.1, dims[0])
            flashinfer.mla.sparse_mla_decode(queries[:, None], packed, lists[:, None], 0.1)
    if not place.is_gpu:
        sparse._launch_on_cpu(sparse._OfLists((3, 1), 1, 32))

    for num_tokens in (3, 80) if place.is_gpu else (3,):
        q, k = (tensor(num_tokens, num_heads, model.head_dim) for _ in range(2))
        projected = tensor(num_tokens, num_heads, model.qk_nope_head_dim + model.v_head_dim)
        flashinfer.concat_mla_k(
            k, projected[..., : model.qk_nope_head_dim], tensor(num_tokens, 1, sum(dims))[..., dims[0] :]
        )
        ragged = prefill.BatchPrefillWithRaggedKVCacheWrapper(workspace)
        for causal in (True, False):
            heads = (num_heads, num_heads, model.head_dim, model.v_head_dim)
            ragged.plan(int32(0, num_tokens), int32(0, num_tokens), *heads, causal=causal, q_data_type=place.dtype)
            ragged.run(q, k, projected[..., model.qk_nope_head_dim :])
    for dim in (dims[0], model.v_head_dim):
        state = tensor(3, num_heads, dim), tensor(3, num_heads, of=torch.float32)
        flashinfer.merge_state(*state, *state)
        flashinfer.merge_states(tensor(3, 2, num_heads, dim), tensor(3, 2, num_heads, of=torch.float32))


# -------------------------------------------------------------------------------------------------------- other callers


def run_example(models: Sequence[Model], place: Place) -> None:
    """examples/serve_shapes.py, but for its arithmetic."""
    from examples import serve_shapes

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    example: Any = serve_shapes
    example.functional = SimpleNamespace(
        linear=linear,
        embedding=lambda tokens, weight: place.tensor(len(tokens), weight.shape[1]),
        pad=torch.nn.functional.pad,
    )
    example.Weights.matrix = lambda self, *shape: place.tensor(1).expand(shape)
    example.LatentAttention._compare = example.GatedDeltaNet._compare = lambda *_: None
    weights = example.Weights(str(place.device), place.dtype)
    with contextlib.redirect_stdout(sys.stderr):
        for model in models:
            example.serve(model, weights, 1)


def is_plain(model: Model) -> bool:
    """Whether the example has all that it has."""
    return model.windowed_layers == "none" and not model.soft_cap and model.activation == "silu"


def call_as_engines(models: Sequence[Model], place: Place) -> None:
    """tests/compat/test_engine_calls.py, but for what it compares, with the shapes of models: of those that differ in
    how many groups of heads they have, one. `serve` has all."""
    from tests.compat import engine_kit, test_engine_calls

    def set_constants(**values: Any) -> None:
        vars(engine_kit).update(values)
        vars(calls).update(values)

    calls: Any = test_engine_calls
    set_constants(BF16=place.dtype)
    calls.captured = lambda call, device: (call(), call)[1]  # twice, as a capture after a warm-up
    calls.assert_close = calls.check = calls.expect = lambda *_, **__: None
    calls.attention = lambda q, k, v, **_: (q, q)
    calls.Pool.expected = lambda *_, **__: None
    calls.Pool.draw = lambda self, *shape: place.tensor(*shape)
    tests = [test for name, test in vars(calls).items() if name.startswith("test_")]
    done = set()
    for model in models:
        for rank in model.tensor_parallel:
            shape = (model.num_qo_heads // rank, max(1, model.num_kv_heads // rank), model.head_dim)
            set_constants(
                SHAPES=shape, NUM_QO_HEADS=shape[0], NUM_KV_HEADS=shape[1], HEAD_DIM=shape[2],
                NUM_LATENT_HEADS=shape[0], LATENT_DIMS=(model.kv_lora_rank, model.qk_rope_head_dim),
                OWN_DIMS=(model.head_dim, model.v_head_dim),
            )  # fmt: skip
            for test in tests:
                is_latent = test.__name__.startswith("test_latent")
                if test is calls.test_drafts_over_a_block_table or ("fp8" in test.__name__ and not place.has_fp8):
                    continue  # which the core set leaves out: docs/packaging.md
                for arguments in cases_of(test):
                    of_model = is_latent == bool(model.kv_lora_rank) and suits(arguments, model, place)
                    heads = shape[0] if is_latent else shape[0] // shape[1]
                    key = (test, tuple(arguments.values()), heads, shape[2], calls.LATENT_DIMS)
                    if of_model and key not in done:
                        done.add(key)
                        test(**arguments, device=place.device)


def cases_of(test: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """What pytest would call a test with, apart from the device; nothing for one that does not take a device alone."""
    parameters = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    names = [name.strip() for given, _ in parameters for name in given.split(",")]
    if set(inspect.signature(test).parameters) != {*names, "device"}:
        return
    for chosen in itertools.product(*(values for _, values in parameters)):
        one_by_one = [value if "," in given else (value,) for (given, _), value in zip(parameters, chosen)]
        yield dict(zip(names, itertools.chain(*one_by_one)))


def suits(arguments: dict[str, Any], model: Model, place: Place) -> bool:
    """Whether the model, as it is served here, has the window, the soft cap and the dtype of these arguments."""
    has_window, has_soft_cap = arguments.get("window_left", -1) >= 0, arguments.get("soft_cap", 0.0) > 0
    same_dtype = arguments.get("o_dtype", place.dtype) == place.dtype
    return has_window in WINDOWED_LAYERS[model.windowed_layers] and has_soft_cap == model.soft_cap and same_dtype


def main(config: str = "core", target_name: str = "") -> None:
    """target_name: on its GPUs; "" for a CPU."""
    asked: dict[KernelSpec, None] = {}

    def load(resolver: Resolver, spec: KernelSpec) -> Idle:
        asked[spec] = None
        return Idle(spec)

    def expect(resolver: Resolver, requests: Iterable[KernelSpec]) -> None:
        asked.update(dict.fromkeys(requests))

    def holds(resolver: Resolver, spec: KernelSpec) -> bool:
        return spec in asked

    Resolver.load, Resolver.expect, Resolver.holds = load, expect, holds  # type: ignore[assignment, method-assign]
    rows = [row.content for row in read_config(find_config(config))]
    models = [model for model in rows if isinstance(model, Model)]
    assert len(models) == len(rows)
    devices = [torch.device("cpu")]
    if target_name:
        install(GPUS[target_name])
        devices = [torch.device("cuda", index) for index in range(len(GPUS[target_name]))]
    for dtype, has_fp8 in itertools.product(("fp16", "bf16", "fp32"), (False, True)):
        place = Place(devices[0], torch_dtype(dtype), has_fp8)
        here = []
        for model in models:
            dtypes = model.dtypes if place.is_gpu else model.cpu_dtypes
            if dtype in dtypes and has_fp8 == (dtype == dtypes[0]):
                here.append(model)
        for model in here:
            for rank in model.tensor_parallel:
                serve(model, rank, place)
        if place.is_gpu:
            run_example([model for model in here if is_plain(model)], place)
            call_as_engines(here, place)
    for device in devices:
        for vocab_size in {model.vocab_size for model in models} - {0}:
            sample(vocab_size, device)
    print(json.dumps([spec.to_dict() for spec in asked if targets.kind(spec.target) == devices[0].type]))


if __name__ == "__main__":
    main(*sys.argv[1:])
