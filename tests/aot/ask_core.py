"""What operators ask for when they serve the models of a config on a CPU; `main` prints one JSON array of specs.

Kernels do nothing here, so that only the asking takes time. Run it in a process of its own: operators remember what
they launch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

import flashinfer
from flashinfer import prefill, rope
from flashinfer.aot.config import find_config, read_config
from flashinfer.aot.models import WINDOWED_LAYERS, Model
from flashinfer.attention.mla import sparse
from flashinfer.jit import spec as specs
from flashinfer.jit.loader import Grid, Values
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.spec import KernelSpec

PAGE_SIZE = 16


class Idle:
    """A kernel that does nothing, and its launcher."""

    is_dependent = False

    def __init__(self, spec: KernelSpec) -> None:
        implementation = specs.family(spec.family).implementation(spec)
        self.spec, self.config, self.params = spec, implementation.config(spec), implementation.params

    def on(self, device_index: int | None, *, pdl: bool = False) -> Idle:
        return self

    def max_blocks_per_sm(self) -> int:
        return 1

    def __call__(self, grid: Grid, stream: int, values: Values) -> None: ...

    def prepare(self, grid: Grid, values: Values, *, varying: Sequence[str]) -> Callable[..., None]:
        return lambda *first_values: None


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def serve(model: Model, rank: int, dtype: torch.dtype) -> None:
    """One layer of one prefill step and one decode step, on one of `rank` GPUs, and the sampling of a token."""
    x = torch.zeros(3, model.hidden_size, dtype=dtype)
    rmsnorm(model)(x, x[0])
    add_rmsnorm = flashinfer.gemma_fused_add_rmsnorm if model.gemma_norm else flashinfer.fused_add_rmsnorm
    add_rmsnorm(x, x.clone(), x[0].clone())
    for size in model.intermediate_sizes:
        act_and_mul = getattr(flashinfer, f"{model.activation}_and_mul")
        act_and_mul(torch.zeros(3, 2 * size // rank, dtype=dtype))
    (attend_latent if model.kv_lora_rank else attend)(model, rank, dtype)

    probs = torch.zeros(2, model.vocab_size)
    flashinfer.sampling.softmax(probs)
    for sample in (flashinfer.sampling_from_probs, flashinfer.sampling_from_logits):
        sample(probs)
    flashinfer.top_p_sampling_from_probs(probs, 0.9)
    flashinfer.top_k_sampling_from_probs(probs, 50)
    flashinfer.min_p_sampling_from_probs(probs, 0.1)
    flashinfer.top_k_top_p_sampling_from_probs(probs, 50, 0.9)
    flashinfer.top_k_top_p_sampling_from_logits(probs, 50, 0.9)
    flashinfer.top_p_renorm_probs(probs, 0.9)
    flashinfer.top_k_renorm_probs(probs, 50)
    flashinfer.top_k_mask_logits(probs, 50)


def rmsnorm(model: Model) -> Callable[..., torch.Tensor]:
    return flashinfer.gemma_rmsnorm if model.gemma_norm else flashinfer.rmsnorm


def attend(model: Model, rank: int, dtype: torch.dtype) -> None:
    num_qo, num_kv, dim = model.num_qo_heads // rank, max(1, model.num_kv_heads // rank), model.head_dim

    def tensor(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of)

    qkv = tensor(3, num_qo + 2 * num_kv, dim)
    q, k, v = qkv.split([num_qo, num_kv, num_kv], dim=1)
    rotary_dim = model.rotary_dim or dim
    turns: dict[str, Any] = {"rotary_dim": rotary_dim, "interleave": model.interleave}
    if model.qk_norm:
        rmsnorm(model)(q, tensor(dim))
        rmsnorm(model)(k, tensor(dim))
        heads_of = (num_qo, num_kv)
        rope.fused_qk_rmsnorm_rope(qkv.flatten(1), tensor(dim), tensor(dim), int32(0, 1, 2), *heads_of, **turns)
    for positions in (int32(0, 1, 2), int32(0, 1, 2).long()):
        flashinfer.apply_rope_pos_ids(q, k, positions, **turns)
        flashinfer.apply_llama31_rope_pos_ids_inplace(q, k, positions, **turns)
        for table in (tensor(8, rotary_dim, of=torch.float32), tensor(8, rotary_dim)):
            with_table = (positions, q.flatten(1), k.flatten(1), dim, table, not model.interleave)
            flashinfer.apply_rope_with_cos_sin_cache(*with_table)
            flashinfer.apply_rope_with_cos_sin_cache_inplace(*with_table)
    flashinfer.apply_rope(q, k, int32(0, 3), int32(0), **turns)
    flashinfer.apply_rope_inplace(q, k, int32(0, 3), int32(0), **turns)

    cache = tensor(2, 2, PAGE_SIZE, num_kv, dim)
    qo_indptr, kv_indptr, kv_indices, last_page_len = int32(0, 3), int32(0, 1), int32(1), int32(3)
    flashinfer.get_seq_lens(kv_indptr, last_page_len, PAGE_SIZE)
    flashinfer.get_batch_indices_positions(qo_indptr, int32(3), 3)  # what an idle kernel leaves there is no index
    slots = (int32(0, 0, 0), int32(0, 1, 2), cache, kv_indices, kv_indptr, last_page_len)
    flashinfer.append_paged_kv_cache(k, v, *slots)
    rope.rope_append_paged_kv_cache(q, k, v, *slots, **turns)

    workspace = torch.empty(1 << 20, dtype=torch.uint8)
    heads = (num_qo, num_kv, dim)
    for has_window in WINDOWED_LAYERS[model.windowed_layers]:
        score: dict[str, Any] = {
            "window_left": 1024 if has_window else -1,
            "logits_soft_cap": 50.0 if model.soft_cap else 0.0,
        }
        batch = {"q_data_type": dtype, **score}
        decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
        decode.plan(kv_indptr, kv_indices, last_page_len, *heads, PAGE_SIZE, **batch)
        decode.run(tensor(1, num_qo, dim), cache)
        paged = prefill.BatchPrefillWithPagedKVCacheWrapper(workspace)
        for causal in (True,) if has_window else (True, False):
            shape = (*heads, PAGE_SIZE)
            paged.plan(qo_indptr, kv_indptr, kv_indices, last_page_len, *shape, causal=causal, **batch)
            paged.run(q.contiguous(), cache)
        ragged = prefill.BatchPrefillWithRaggedKVCacheWrapper(workspace)
        ragged.plan(qo_indptr, qo_indptr, *heads, causal=True, **batch)
        ragged.run(q.contiguous(), k.contiguous(), v.contiguous())
        flashinfer.single_decode_with_kv_cache(q[0].contiguous(), k.contiguous(), v.contiguous(), **score)
        flashinfer.single_prefill_with_kv_cache(q.contiguous(), k.contiguous(), v.contiguous(), causal=True, **score)

    state = tensor(3, num_qo, dim), tensor(3, num_qo, of=torch.float32)
    flashinfer.merge_state(*state, *state)
    flashinfer.merge_states(tensor(3, 2, num_qo, dim), tensor(3, 2, num_qo, of=torch.float32))


def attend_latent(model: Model, rank: int, dtype: torch.dtype) -> None:
    num_heads, dims = model.num_qo_heads // rank, (model.kv_lora_rank, model.qk_rope_head_dim)

    def tensor(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of)

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

    cache, qo_indptr, kv_indptr, pages, last = (
        tensor(2, PAGE_SIZE, sum(dims)),
        int32(0, 3),
        int32(0, 1),
        int32(1),
        int32(3),
    )
    caches = cache[..., : dims[0]], cache[..., dims[0] :]
    flashinfer.get_seq_lens(kv_indptr, last, PAGE_SIZE)
    flashinfer.get_batch_indices_positions(qo_indptr, int32(3), 3)
    rows = row[:, : dims[0]], row[:, dims[0] :]
    flashinfer.append_paged_mla_kv_cache(*rows, int32(0, 0, 0), int32(0, 1, 2), *caches, pages, kv_indptr, last)

    workspace = torch.empty(1 << 20, dtype=torch.uint8)
    absorbed = flashinfer.BatchMLAPagedAttentionWrapper(workspace)
    for causal in (True, False):
        shape = (num_heads, *dims, PAGE_SIZE, causal, 0.1, dtype, dtype)
        absorbed.plan(qo_indptr, kv_indptr, pages, last, *shape)
        absorbed.run(tensor(3, num_heads, dims[0]), q_pe, *caches)
    sparse._compact("sparse_mla_prefill", int32(0, 1, 2)[:, None], 32)  # an idle kernel leaves no lengths to plan for

    k, projected = torch.empty_like(q), tensor(3, num_heads, model.qk_nope_head_dim + model.v_head_dim)
    flashinfer.concat_mla_k(k, projected[..., : model.qk_nope_head_dim], kpe)
    ragged = prefill.BatchPrefillWithRaggedKVCacheWrapper(workspace)
    for causal in (True, False):
        heads = (num_heads, num_heads, model.head_dim, model.v_head_dim)
        ragged.plan(qo_indptr, qo_indptr, *heads, causal=causal, q_data_type=dtype)
        ragged.run(q, k, projected[..., model.qk_nope_head_dim :])
    for dim in (dims[0], model.v_head_dim):
        state = tensor(3, num_heads, dim), tensor(3, num_heads, of=torch.float32)
        flashinfer.merge_state(*state, *state)
        flashinfer.merge_states(tensor(3, 2, num_heads, dim), tensor(3, 2, num_heads, of=torch.float32))


def main(config: str = "core") -> None:
    asked: dict[KernelSpec, None] = {}

    def load(resolver: Resolver, spec: KernelSpec) -> Idle:
        asked[spec] = None
        return Idle(spec)

    Resolver.load = load  # type: ignore[assignment, method-assign]
    for row in read_config(find_config(config)):
        assert isinstance(row.content, Model)
        for rank in row.content.tensor_parallel:
            for dtype in (torch.float32, torch.bfloat16):
                serve(row.content, rank, dtype)
    print(json.dumps([spec.to_dict() for spec in asked]))


if __name__ == "__main__":
    main()
