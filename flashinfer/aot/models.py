# SPDX-License-Identifier: Apache-2.0
"""From a model's public shape to the kernels that serve it: the one place that knows which those are.

An expansion is a generator `(model, dtype, target) -> specs`; `EXPANSIONS` lists them. To make the core set cover a new
family, write one and add it to the list. What two models share comes out equal and is built once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flashinfer import target as targets
from flashinfer.families import activation, concat, conv, gemm, layout, norm, page, quantization, rope, sampling
from flashinfer.families.attention import decode, merge, mla, prefill
from flashinfer.families.attention.params import QUERIES
from flashinfer.families.gdn import decode as gdn_decode
from flashinfer.families.gdn import prefill as gdn_prefill
from flashinfer.jit.spec import ArgValue, KernelSpec

WINDOWED_LAYERS = {"none": (False,), "some": (False, True), "all": (True,)}


@dataclass(frozen=True)
class Model:
    """A transformer as its published config.json describes it."""

    name: str
    hidden_size: int
    num_qo_heads: int
    num_kv_heads: int  # of latent attention: 1
    head_dim: int  # of latent attention: qk_nope_head_dim + qk_rope_head_dim
    intermediate_sizes: tuple[int, ...]  # of each gated MLP: dense, expert, shared expert
    vocab_size: int = 0  # 0: tokens are sampled by something else
    qk_norm: bool = False  # RMSNorm over the head_dim of queries and keys
    gemma_norm: bool = False  # norms multiply by 1 + weight
    activation: str = "silu"  # of the gate of MLPs: silu, gelu or gelu_tanh
    rotary_dim: int = 0  # the part of a head that positions turn; 0: all of it
    interleave: bool = False  # rotary pairs are neighbours, as they always are in latent attention
    windowed_layers: str = "none"  # which layers attend to a sliding window alone: none, some or all
    soft_cap: bool = False  # of attention's logits
    mixed_batches: bool = False  # `BatchAttention`, on Hopper of the first dtype and pages of 16
    kv_lora_rank: int = 0  # latent attention: the part of a cached row that is values too; 0: ordinary attention
    q_lora_rank: int = 0  # the latent part of queries; 0: they have none
    qk_rope_head_dim: int = 0  # the other part of a cached row
    qk_nope_head_dim: int = 0  # of a head's queries and keys, where these are not absorbed, the part without positions
    v_head_dim: int = 0  # of a head's values, likewise
    scaled_rows: bool = False  # of a latent cache, fp8 with scales, attended to by lists: DeepSeek-V3.2's fp8_ds_mla
    linear_num_key_heads: int = 0  # layers of a gated delta rule, beside those of attention; 0: there are none
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0  # width of the convolution before the rule
    fp8_blocks: bool = False  # weights are published in fp8 with scales of 128 x 128 elements
    tensor_parallel: tuple[int, ...] = (1,)  # degrees to serve; heads and intermediate sizes are divided by them
    dtypes: tuple[str, ...] = ("bf16", "fp16")  # on CUDA targets; what is fp8 there goes with the first
    cpu_dtypes: tuple[str, ...] = ("fp32", "bf16")

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """KV heads on one rank, at each degree."""
        return tuple(dict.fromkeys(max(1, self.num_kv_heads // degree) for degree in self.tensor_parallel))

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Query heads per KV head on one rank, at each degree; KV heads are replicated when ranks outnumber them."""
        heads = [(self.num_qo_heads // degree, max(1, self.num_kv_heads // degree)) for degree in self.tensor_parallel]
        return tuple(dict.fromkeys(num_qo // num_kv for num_qo, num_kv in heads))


def expand(model: Model, target: str) -> Iterator[KernelSpec]:
    """The kernels that serve a model on a target; the same spec may come more than once."""
    for dtype in model.dtypes if targets.kind(target) == "cuda" else model.cpu_dtypes:
        for expansion in EXPANSIONS:
            yield from expansion(model, dtype, target)


def _norms(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    def rmsnorm(hidden_size: int, add_residual: bool) -> KernelSpec:
        return norm.RMSNORM.spec(
            target,
            dtype=dtype,
            hidden_size=hidden_size,
            vec_size=layout.vec_size(dtype, hidden_size),
            add_residual=add_residual,
            gemma=model.gemma_norm,
        )

    yield rmsnorm(model.hidden_size, add_residual=False)
    yield rmsnorm(model.hidden_size, add_residual=True)
    if model.qk_norm:
        yield rmsnorm(model.head_dim, add_residual=False)
    for rank in filter(None, (model.q_lora_rank, model.kv_lora_rank)):
        yield rmsnorm(rank, add_residual=False)


def _activations(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    for degree in model.tensor_parallel:
        for size in model.intermediate_sizes:
            vec_size = layout.vec_size(dtype, size // degree)
            yield activation.ACT_AND_MUL.spec(target, dtype=dtype, gate=model.activation, vec_size=vec_size)


def _fp8_outputs(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    """Norms and activations that write the fp8 input of the next projection, on GPUs whose tensor cores multiply it."""
    if targets.kind(target) == "cpu" or targets.capability(target) < (8, 9) or dtype != model.dtypes[0]:
        return
    for add_residual in () if model.gemma_norm else (False, True):  # no kernel writes fp8 of Gemma's
        yield norm.RMSNORM_QUANT.spec(
            target,
            dtype=dtype,
            out_dtype="fp8_e4m3",
            hidden_size=model.hidden_size,
            vec_size=layout.vec_size(dtype, model.hidden_size),
            add_residual=add_residual,
        )
    for spec in _activations(model, dtype, target) if model.activation == "silu" else ():
        yield activation.ACT_AND_MUL_QUANT.spec(target, **dict(spec.args), out_dtype="fp8_e4m3")


def _products(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    """By weights in fp8 with scales of blocks, on GPUs that multiply it. Sizes are no part of a kernel."""
    is_first = dtype == model.dtypes[0]
    if not (model.fp8_blocks and is_first and targets.kind(target) == "cuda" and targets.capability(target) >= (8, 9)):
        return
    yield gemm.QUANTIZE_GROUPS.spec(target, dtype=dtype)
    yield from gemm.scaled(target, dtype)


def _kv_dtypes(model: Model, dtype: str, target: str) -> tuple[str, ...]:
    """Of caches: that of the rest, and on a GPU fp8."""
    return (dtype, "fp8_e4m3") if targets.kind(target) == "cuda" and dtype == model.dtypes[0] else (dtype,)


def _attention(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    if model.kv_lora_rank:
        return
    windows = WINDOWED_LAYERS[model.windowed_layers]
    # none: the shared prefix of a cascade, which is no window
    masks: list[tuple[str, dict[str, Any]]] = [
        *(("causal", {"has_window": has_window}) for has_window in windows),
        ("none", {}),
    ]
    shape: dict[str, Any] = {"head_dim": model.head_dim, "has_soft_cap": model.soft_cap}
    own: dict[str, Any] = {"q_dtype": dtype, "kv_dtype": dtype, **shape}
    tiles = QUERIES if targets.kind(target) == "cuda" else QUERIES[:1]
    for kv_dtype in _kv_dtypes(model, dtype, target):
        common: dict[str, Any] = {**own, "kv_dtype": kv_dtype}
        for group_size in model.group_sizes:
            for kv_storage in ("paged", "single") if kv_dtype == dtype else ("paged",):
                for has_window in windows:
                    heads: dict[str, Any] = {"group_size": group_size, "kv_storage": kv_storage}
                    yield decode.decode(target, **common, **heads, has_window=has_window)
        for queries in tiles:
            for mask, window in masks:
                for page_size in (1, 16):  # one for each kernel that there may be
                    pages: dict[str, Any] = {"queries": queries, "page_size": page_size}
                    yield prefill.prefill(target, **common, mask=mask, **pages, **window)
    for kv_storage, has_window, queries in itertools.product(("ragged", "single"), windows, tiles):
        rows: dict[str, Any] = {"kv_storage": kv_storage, "queries": queries}
        yield prefill.prefill(target, **own, **rows, has_window=has_window)
    if dtype == model.dtypes[0] and targets.kind(target) == "cuda":  # vLLM's over a cache of fp8: it quantizes q too
        fp8: dict[str, Any] = {"q_dtype": "fp8_e4m3", "kv_dtype": "fp8_e4m3", "o_dtype": dtype, **shape}
        for has_window in windows:
            for group_size in model.group_sizes:
                yield decode.decode(target, **fp8, group_size=group_size, has_window=has_window)
            for queries in tiles:
                yield prefill.prefill(
                    target, **fp8, queries=queries, page_size=16, has_window=has_window
                )  # fmt: skip
    for pair in (False, True):
        yield merge.MERGE_STATES.spec(target, dtype=dtype, head_dim=model.head_dim, pair=pair)
    if targets.kind(target) == "cuda":
        for queries in tiles:  # trees of draft tokens, in SGLang's pages of one
            yield prefill.prefill(target, **own, mask="custom", queries=queries)
        yield quantization.PACKED_INDPTR.spec(target, index="int64")
        yield quantization.SEGMENT_PACKBITS.spec(target, index="int64", big_endian=False, aligned=True)
        yield decode.DECODE_PLAN.spec(target)
        for kv_storage in ("paged", "ragged", "single"):
            yield prefill.PREFILL_PLAN.spec(target, kv_storage=kv_storage)


def _mixed_batches(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    """Beside those of `_attention`, which compute batches of few rows alone. On GPUs where the two launches run beside
    each other. No window: `BatchAttention` takes none."""
    if not model.mixed_batches:
        return
    common: dict[str, Any] = {"q_dtype": dtype, "kv_dtype": dtype, "head_dim": model.head_dim}
    common |= {"has_soft_cap": model.soft_cap}
    if targets.kind(target) == "cpu":
        yield prefill.prefill(target, **common, kv_storage="paged_lens")
    elif target == "sm_90a" and dtype == model.dtypes[0]:
        for queries in QUERIES:
            yield prefill.prefill(target, **common, queries=queries, page_size=16, mixed=True)
        for group_size in model.group_sizes:
            yield decode.decode(target, **common, group_size=group_size, mixed=True)
        yield decode.DECODE_PLAN.spec(target, mixed=True)
        for kv_storage in ("paged_lens", "paged"):  # paged: of the wrapper of POD
            yield prefill.PREFILL_PLAN.spec(target, kv_storage=kv_storage, mixed=True)
        yield prefill.PREFILL_PLAN.spec(target, kv_storage="paged_lens")  # of few rows alone


def _latent_attention(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    """Absorbed over the cache, dense and sparse, and prefill of what is not; both leave states to be merged."""
    if not model.kv_lora_rank:
        return
    is_cuda, head_dims = targets.kind(target) == "cuda", (model.head_dim, model.v_head_dim)
    for kv_dtype in _kv_dtypes(model, dtype, target):
        common: dict[str, Any] = {
            "q_dtype": dtype,
            "kv_dtype": kv_dtype,
            "head_dim_ckv": model.kv_lora_rank,
            "head_dim_kpe": model.qk_rope_head_dim,
        }
        for mask in ("causal", "none"):  # none: one query a request, a shared prefix, lists of rows
            for page_size in (1, 64):  # one for each kernel that there may be
                for short_queries in (False, True):
                    yield mla.mla(target, **common, short_queries=short_queries, page_size=page_size, mask=mask)
    # Of lists: one query a request, pages of one row. On the GPUs of which engines have an indexer.
    if model.scaled_rows and is_cuda and targets.capability(target) in ((9, 0), (10, 0)) and dtype == "bf16":
        for short_queries in (False, True):
            yield mla.mla(
                target, q_dtype=dtype, kv_dtype=mla.SCALED_ROWS, head_dim_ckv=model.kv_lora_rank,
                head_dim_kpe=model.qk_rope_head_dim, short_queries=short_queries, mask="none",
            )  # fmt: skip
    yield mla.COMPACT_INDICES.spec(target)
    if is_cuda:
        yield mla.mla_plan(target)
    for queries in QUERIES if is_cuda else QUERIES[:1]:
        for mask in ("causal", "none"):  # none: a part of the prompt that is in the cache
            yield prefill.prefill(
                target, q_dtype=dtype, kv_dtype=dtype, head_dim=head_dims[0], head_dim_vo=head_dims[1],
                kv_storage="ragged", mask=mask, queries=queries,
            )  # fmt: skip
    parts = model.qk_nope_head_dim, model.qk_rope_head_dim
    vec_size = layout.vec_size(dtype, math.gcd(*parts)) if is_cuda else 1
    yield concat.CONCAT_MLA_K.spec(target, dtype=dtype, nope_dim=parts[0], rope_dim=parts[1], vec_size=vec_size)
    for head_dim in (model.kv_lora_rank, model.v_head_dim):
        for pair in (False, True):
            yield merge.MERGE_STATES.spec(target, dtype=dtype, head_dim=head_dim, pair=pair)
    if is_cuda:
        yield prefill.PREFILL_PLAN.spec(target, kv_storage="ragged")


def _gated_delta_rule(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    """Sequences, and the next tokens of requests by states that lie V-major; the convolution and the gated norm around
    the rule."""
    if not model.linear_num_value_heads:
        return
    is_cuda, value_dim = targets.kind(target) == "cuda", model.linear_value_head_dim
    for state_dtype, bias_dtype in itertools.product(dict.fromkeys(("fp32", dtype)), repeat=2):
        for one_token in (False, True):
            yield gdn_decode.GDN_DECODE.spec(
                target, dtype=dtype, state_dtype=state_dtype, bias_dtype=bias_dtype, index="int32",
                key_dim=model.linear_key_head_dim, value_dim=value_dim, one_token=one_token,
            )  # fmt: skip
    if model.linear_key_head_dim == value_dim == gdn_prefill.HEAD_DIM:
        for normalize in (False, True):
            rule: dict[str, Any] = {"dtype": dtype, "log_gate": False, "normalize": normalize}
            for state_dtype, block_v in itertools.product(gdn_prefill.STATE_DTYPES, gdn_prefill.blocks_v(target)):
                yield gdn_prefill.GDN_PREFILL.spec(target, **rule, state_dtype=state_dtype, block_v=block_v)
            if is_cuda:
                yield gdn_prefill.GDN_PREFILL_CHUNKS.spec(target, **rule)
        if is_cuda:
            yield gdn_prefill.GDN_PREFILL_SEGMENTS.spec(target, dtype=dtype)
            yield gdn_prefill.GDN_PREFILL_SCAN.spec(target)
    for family in (conv.CAUSAL_CONV1D, conv.CAUSAL_CONV1D_UPDATE):
        for channels_last in (False, True):  # SGLang's states, and vLLM's
            yield family.spec(
                target, dtype=dtype, index="int32", width=model.linear_conv_kernel_dim, silu=True,
                vec_size=conv.vec_size(dtype, value_dim) if is_cuda else 1, channels_last=channels_last,
            )  # fmt: skip
    row: dict[str, Any] = {"dtype": dtype, "hidden_size": value_dim, "vec_size": layout.vec_size(dtype, value_dim)}
    yield norm.GATED_RMSNORM.spec(target, **row)
    if is_cuda and targets.capability(target) >= (8, 9) and dtype == model.dtypes[0]:
        yield norm.GATED_RMSNORM_QUANT.spec(target, **row, out_dtype="fp8_e4m3")


def _paged_cache(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    is_cuda = targets.kind(target) == "cuda"
    indices = {"token_index": "int32", "page_index": "int32"}
    is_latent = model.kv_lora_rank > 0
    dims = (model.kv_lora_rank, model.qk_rope_head_dim) if is_latent else (model.head_dim,) * 2
    for cache_dtype in _kv_dtypes(model, dtype, target):
        for num_kv_heads in model.kv_heads if is_cuda else (1,):
            yield page.APPEND_PAGED_KV.spec(
                target,
                dtype=dtype,
                cache_dtype=cache_dtype,
                key_dim=dims[0],
                value_dim=dims[1],
                vec_size=layout.vec_size(dtype, math.gcd(*dims)) if is_cuda else 1,
                heads_per_thread=page.heads_per_thread(num_kv_heads) if is_cuda else 1,
                **indices,
            )
        if not is_latent:
            rotary = _rotary_axes(model, dtype, target, "computed", "int32")
            yield rope.ROPE_APPEND.spec(target, **rotary, cache_dtype=cache_dtype, **indices)
    for index in ("int32", "int64"):
        yield page.TOKEN_POSITIONS.spec(target, index=index)
        yield page.SEQ_LENS.spec(target, index=index)


def _rotary_axes(
    model: Model, dtype: str, target: str, cos_sin: str, position_index: str, *, part_only: bool = False
) -> dict[str, ArgValue]:
    """`part_only`: what is not turned is not touched either, in place."""
    is_cuda, is_latent = targets.kind(target) == "cuda", model.kv_lora_rank > 0
    head_dim = model.qk_rope_head_dim if is_latent else model.head_dim
    rotary_dim = model.rotary_dim or head_dim
    touched = rotary_dim if part_only else head_dim
    return {
        "dtype": dtype,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "interleave": is_latent or model.interleave,
        "cos_sin": cos_sin,
        "position_index": position_index,
        "vec_size": layout.vec_size(dtype, math.gcd(rotary_dim // 2, touched // 2)) if is_cuda else 1,
    }


def _rotary(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    """Angles computed, or from a table in fp32 or the model's dtype, as serving engines pass them; positions of both
    widths."""
    parts = (False, True) if model.rotary_dim not in (0, model.head_dim) else (False,)
    for cos_sin in dict.fromkeys(("computed", "fp32", dtype)):
        for position_index in ("int32", "int64"):
            for part_only in parts:
                rotary = _rotary_axes(model, dtype, target, cos_sin, position_index, part_only=part_only)
                yield rope.ROPE.spec(target, **rotary, ragged=False, rotary_part_only=part_only)
            if model.qk_norm:
                fused = _rotary_axes(model, dtype, target, cos_sin, position_index)
                yield rope.QK_NORM_ROPE.spec(target, **fused)
    for part_only in parts:
        ragged = _rotary_axes(model, dtype, target, "computed", "int32", part_only=part_only)
        yield rope.ROPE.spec(target, **ragged, ragged=True, rotary_part_only=part_only)


def _sampling(model: Model, dtype: str, target: str) -> Iterator[KernelSpec]:
    """Over fp32 logits or probabilities, at every number of rows: those decide how many blocks share a row."""
    if not model.vocab_size:
        return

    def places(keeps_row: bool) -> Iterator[dict[str, int]]:
        for num_rows in (1, 64, 128, 256, 1024):  # one of every placement there is
            yield sampling.placement("fp32", model.vocab_size, num_rows, _TYPICAL_SMS, target, keeps_row)

    for place in places(keeps_row=False):
        for kind in ("logits", "probs"):
            yield sampling.SAMPLE_ROW.spec(target, dtype="fp32", input=kind, filter="none", **place)
    for place in places(keeps_row=True):
        for chosen in ("top_k", "top_p", "min_p", "top_k_top_p"):
            yield sampling.SAMPLE_ROW.spec(target, dtype="fp32", input="probs", filter=chosen, **place)
        yield sampling.SAMPLE_ROW.spec(target, dtype="fp32", input="logits", filter="top_k_top_p", **place)
        for op in sampling.NORMALIZE_OPS:
            yield sampling.NORMALIZE_ROW.spec(target, dtype="fp32", op=op, **place)


_TYPICAL_SMS = 132
EXPANSIONS: tuple[Callable[[Model, str, str], Iterator[KernelSpec]], ...] = (
    _norms,
    _activations,
    _fp8_outputs,
    _products,
    _attention,
    _mixed_batches,
    _latent_attention,
    _gated_delta_rule,
    _paged_cache,
    _rotary,
    _sampling,
)
