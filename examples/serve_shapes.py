# SPDX-License-Identifier: Apache-2.0
"""Continuous batching in miniature: every model of the core set, at full width, with random weights.

Requests of different lengths arrive, are prefilled into a paged KV cache, decode together, and leave. Two layers of
each model run through flashinfer's normalization, rotary embedding, paged cache, attention and gated activation; the
projections are torch's. Models with latent attention (DeepSeek, Kimi) prefill whole prompts with keys and values of
every head, and decode in the latent space; both are compared with the equations as published. Qwen3-Next, 3.5 and 3.6
have four layers, three of a gated delta rule and one of attention with a gated output; the rule is compared too. Where
a precompiled set is installed, no kernel is compiled. At the end one model outside the core set shows what a miss looks
like. Runs on a GPU where there is one, and on any CPU.

    python examples/serve_shapes.py [--device cpu|cuda] [--config core] [--model NAME …] [--quick]

On a CPU most of the time goes into the projections. --quick makes them small there: one layer of each model, and of a
large one the share of one of as many GPUs as the config has it on. The kernels are of the core set all the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional

import flashinfer
from flashinfer import causal_conv1d, gdn_decode, gdn_prefill
from flashinfer.aot.config import Model, find_config, read_config
from flashinfer.jit import default_resolver

NUM_LAYERS = 2  # with --quick 1; of a model with a gated delta rule four
VOCABULARY = 4096  # tokens with an embedding; the others of a model's vocabulary have no probability
PAGE_SIZE = 16
MAX_BATCH = 3
# (arrives at step, prompt length, tokens to generate)
REQUESTS = [(0, 5, 4), (0, 19, 2), (1, 3, 3), (2, 7, 2)]
# Phi-3-mini: head_dim 96 is in no core model.
OUTSIDE_CORE = Model("Phi-3-mini (outside the core set)", 3072, 32, 32, 96, (8192,))
LARGE = 3584  # hidden size from which --quick serves a share
MOST_OFF = 0.02  # relative difference from the equations that bf16 explains
Tensors = tuple[torch.Tensor, ...]


# ------------------------------------------------------------------------------------------------------------ requests


@dataclass
class Request:
    prompt: list[int]
    num_to_generate: int
    generated: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0  # tokens whose keys and values are in the cache
    slot: int = -1  # of its states

    @property
    def pending(self) -> list[int]:
        """Tokens that the next step computes: the prompt first, then the token generated last."""
        return self.prompt if self.num_cached == 0 else self.generated[-1:]

    @property
    def is_finished(self) -> bool:
        return len(self.generated) == self.num_to_generate


@dataclass(frozen=True)
class Batch:
    """What one step computes, as the index tensors the operators take."""

    tokens: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens], in the request
    batch_indices: torch.Tensor  # [num_tokens], of the request in the batch
    qo_indptr: torch.Tensor  # [batch_size + 1]
    kv_indptr: torch.Tensor  # [batch_size + 1], into kv_indices
    kv_indices: torch.Tensor  # pages of every request
    kv_last_page_len: torch.Tensor  # [batch_size]
    kv_lens: torch.Tensor  # [batch_size], with the tokens of this step
    slots: torch.Tensor  # [batch_size]
    has_state: torch.Tensor  # [batch_size], bool
    is_new: bool  # no request has anything in the cache yet

    @staticmethod
    def of(requests: list[Request], device: str) -> Batch:
        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        def indptr(lengths: list[int]) -> torch.Tensor:
            return tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)])

        pending = [request.pending for request in requests]
        kv_lens = [request.num_cached + len(tokens) for request, tokens in zip(requests, pending)]
        return Batch(
            tokens=tensor([token for tokens in pending for token in tokens]),
            positions=tensor([r.num_cached + i for r, tokens in zip(requests, pending) for i in range(len(tokens))]),
            batch_indices=tensor([b for b, tokens in enumerate(pending) for _ in tokens]),
            qo_indptr=indptr([len(tokens) for tokens in pending]),
            kv_indptr=indptr([len(request.pages) for request in requests]),
            kv_indices=tensor([page for request in requests for page in request.pages]),
            kv_last_page_len=tensor([(kv_len - 1) % PAGE_SIZE + 1 for kv_len in kv_lens]),
            kv_lens=tensor(kv_lens),
            slots=tensor([request.slot for request in requests]),
            has_state=torch.tensor([request.num_cached > 0 for request in requests], device=device),
            is_new=all(request.num_cached == 0 for request in requests),
        )

    @property
    def is_decode(self) -> bool:
        """One token each."""
        return self.tokens.numel() == self.slots.numel()


class Scheduler:
    """Admits requests as they arrive, gives them pages and a slot, and takes those back."""

    def __init__(self, num_pages: int) -> None:
        self._waiting = [(step, Request(list(range(1, length + 1)), count)) for step, length, count in REQUESTS]
        self._free_pages, self._free_slots = list(range(num_pages)), list(range(MAX_BATCH))
        self.running: list[Request] = []
        self.num_finished = 0

    @property
    def is_done(self) -> bool:
        return not self.running and not self._waiting

    def admit(self, step: int) -> None:
        while self._waiting and self._waiting[0][0] <= step and len(self.running) < MAX_BATCH:
            self.running.append(self._waiting.pop(0)[1])
            self.running[-1].slot = self._free_slots.pop()
        for request in self.running:
            needed = -(-(request.num_cached + len(request.pending)) // PAGE_SIZE)
            while len(request.pages) < needed:
                request.pages.append(self._free_pages.pop())

    def accept(self, next_tokens: list[int]) -> None:
        for request, token in zip(self.running, next_tokens):
            request.num_cached += len(request.pending)
            request.generated.append(token)
            if request.is_finished:
                self._free_pages += request.pages
                self._free_slots.append(request.slot)
                self.num_finished += 1
        self.running = [request for request in self.running if not request.is_finished]


# --------------------------------------------------------------------------------------------------------------- model


class Weights:
    """Random weights as views of one block: enough to compute at full width, without the memory of a model."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._block = torch.empty(0)

    def matrix(self, num_outputs: int, num_inputs: int) -> torch.Tensor:
        count = num_outputs * num_inputs
        if self._block.numel() < count:
            tile = torch.randn(1 << 20, device=self.device).mul_(0.02).to(self.dtype)
            self._block = tile.repeat(-(-count // tile.numel()))
        return self._block[:count].view(num_outputs, num_inputs)

    def vector(self, size: int, value: float = 1.0) -> torch.Tensor:
        return torch.full((size,), value, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, device=self.device, dtype=dtype or self.dtype)


class Norm:
    """RMSNorm as the model has it: Gemma's, and that of Qwen from 3-Next on, multiplies by 1 + weight."""

    def __init__(self, model: Model, weights: Weights, size: int) -> None:
        self._weight = weights.vector(size, 0.0 if model.gemma_norm else 1.0)
        self._norm = flashinfer.gemma_rmsnorm if model.gemma_norm else flashinfer.rmsnorm
        self._add_norm = flashinfer.gemma_fused_add_rmsnorm if model.gemma_norm else flashinfer.fused_add_rmsnorm

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._norm(x, self._weight, out=out)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> None:
        """x becomes the norm of the sum, residual the sum."""
        self._add_norm(x, residual, self._weight)


class GroupedQueryAttention:
    """Rotary attention of query heads in groups that share keys and values."""

    def __init__(self, model: Model, weights: Weights, num_layers: int, num_pages: int) -> None:
        ranks = model.tensor_parallel[0]
        self.model, self.dtype = model, weights.dtype
        self.num_qo_heads, self.num_kv_heads = model.num_qo_heads // ranks, max(1, model.num_kv_heads // ranks)
        hidden_size, head_dim = model.hidden_size, model.head_dim
        gate_size = self.num_qo_heads * head_dim if model.linear_num_value_heads else 0
        self.gate = weights.matrix(gate_size, hidden_size) if gate_size else None
        self.qkv = weights.matrix((self.num_qo_heads + 2 * self.num_kv_heads) * head_dim, hidden_size)
        self.output = weights.matrix(hidden_size, self.num_qo_heads * head_dim)
        self.head_norm = Norm(model, weights, head_dim)
        cache_shape = (num_pages, 2, PAGE_SIZE, self.num_kv_heads, head_dim)
        self.caches = [weights.zeros(*cache_shape) for _ in range(num_layers)]
        workspace = weights.zeros(32 << 20, dtype=torch.uint8)
        self.prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
        self.decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
        self.planned: object = None

    def __str__(self) -> str:
        return f"{self.num_qo_heads}/{self.num_kv_heads} heads x {self.model.head_dim}"

    def plan(self, batch: Batch) -> None:
        heads = (self.num_qo_heads, self.num_kv_heads, self.model.head_dim, PAGE_SIZE)
        pages = (batch.kv_indptr, batch.kv_indices, batch.kv_last_page_len)
        if batch.is_decode:
            self.decode.plan(*pages, *heads, q_data_type=self.dtype)
            self.planned = self.decode
        else:
            self.prefill.plan(batch.qo_indptr, *pages, *heads, causal=True, q_data_type=self.dtype)
            self.planned = self.prefill

    def run(self, x: torch.Tensor, layer: int, batch: Batch) -> torch.Tensor:
        head_dim, cache = self.model.head_dim, self.caches[layer]
        qkv = functional.linear(x, self.qkv).unflatten(-1, (-1, head_dim))
        q, k, v = qkv.split([self.num_qo_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.model.qk_norm:
            self.head_norm(q, out=q)
            self.head_norm(k, out=k)
        turns = {"rotary_dim": self.model.rotary_dim or head_dim, "interleave": self.model.interleave}
        flashinfer.apply_rope_pos_ids_inplace(q, k, batch.positions, rope_theta=5e5, **turns)
        pages = (batch.kv_indices, batch.kv_indptr, batch.kv_last_page_len)
        flashinfer.append_paged_kv_cache(k, v, batch.batch_indices, batch.positions, cache, *pages)
        out = self.planned.run(q, cache).flatten(1)
        if self.gate is not None:
            out = out * torch.sigmoid(functional.linear(x, self.gate))
        return functional.linear(out, self.output)


class GatedDeltaNet:
    """A gated delta rule: what a layer keeps of a request is a matrix a head, and the last rows of a convolution."""

    def __init__(self, model: Model, weights: Weights, num_layers: int) -> None:
        ranks = model.tensor_parallel[0]
        self.model, self.most_off = model, 0.0
        num_k, num_v = model.linear_num_key_heads // ranks, model.linear_num_value_heads // ranks
        self.dims = model.linear_key_head_dim, model.linear_key_head_dim, model.linear_value_head_dim
        self.widths = [heads * dim for heads, dim in zip((num_k, num_k, num_v), self.dims)]
        hidden_size, width = model.hidden_size, model.linear_conv_kernel_dim
        self.qkv = weights.matrix(sum(self.widths), hidden_size)
        self.z = weights.matrix(self.widths[2], hidden_size)
        self.ba = weights.matrix(2 * num_v, hidden_size)
        self.conv = (weights.matrix(sum(self.widths), width) * 25).contiguous()
        self.A_log = torch.linspace(-1, 1, num_v, device=weights.device)
        self.dt_bias = -self.A_log
        self.norm = weights.vector(self.dims[2])
        self.output = weights.matrix(hidden_size, self.widths[2])
        # Rows of the convolution with dense channels; states V-major and in fp32.
        dense, state = (MAX_BATCH, width - 1, sum(self.widths)), (MAX_BATCH, num_v, self.dims[2], self.dims[0])
        self.rows = [weights.zeros(*dense).transpose(1, 2) for _ in range(num_layers)]
        self.states = [weights.zeros(*state, dtype=torch.float32) for _ in range(num_layers)]

    def run(self, x: torch.Tensor, layer: int, batch: Batch) -> torch.Tensor:
        rows, states = self.rows[layer], self.states[layer]
        qkv, z = functional.linear(x, self.qkv), functional.linear(x, self.z)
        b, a = functional.linear(x, self.ba).chunk(2, dim=-1)
        states[batch.slots[~batch.has_state].long()] = 0.0  # left by those who had the slots before
        before = rows.clone(), states.clone()
        if batch.is_decode:
            mixed = causal_conv1d.causal_conv1d_update(qkv, rows, self.conv, None, "silu", batch.slots)
            q, k, v = self._heads(mixed[:, None])
            gates = self.A_log, a[:, None], self.dt_bias, b[:, None]
            out, _ = gdn_decode.gated_delta_rule_decode_pretranspose(
                q, k, v, None, *gates, initial_state=states, initial_state_indices=batch.slots
            )
            out = out[:, 0]
        else:
            sequences = batch.qo_indptr, batch.slots, batch.has_state
            mixed = causal_conv1d.causal_conv1d_fn(qkv.T, self.conv, None, rows, *sequences).T
            alpha = torch.exp(-torch.exp(self.A_log) * torch.log1p(torch.exp(a.float() + self.dt_bias)))
            out, _ = gdn_prefill.chunk_gated_delta_rule(
                *self._heads(mixed),
                alpha,
                torch.sigmoid(b.float()),
                initial_state=states,
                output_final_state=True,
                cu_seqlens=batch.qo_indptr,
                use_qk_l2norm_in_kernel=True,
                output_state=states,
                state_indices=batch.slots,
            )
        gated = flashinfer.gated_rmsnorm(out, z.view_as(out), self.norm)
        self._compare((out, gated), (qkv, z, a, b), before, states, batch)
        return functional.linear(gated.flatten(1), self.output)

    def _heads(self, mixed: torch.Tensor) -> list[torch.Tensor]:
        return [part.unflatten(-1, (-1, dim)) for part, dim in zip(mixed.split(self.widths, dim=-1), self.dims)]

    def _compare(self, results: Tensors, inputs: Tensors, before: Tensors, states: torch.Tensor, batch: Batch) -> None:
        """With the recurrence, token by token in fp32, from the states that the step began with. The norm behind it by
        itself: it would raise the rounding of heads that have next to nothing to say."""
        (out, gated), (qkv, z, a, b) = results, (x.float() for x in inputs)
        alpha = torch.exp(-torch.exp(self.A_log) * torch.log1p(torch.exp(a + self.dt_bias)))
        for request, slot in enumerate(batch.slots.tolist()):
            begin, end = batch.qo_indptr[request : request + 2].tolist()
            history, s = before[0][slot].T.float() * batch.has_state[request], before[1][slot].clone()
            window, expected = torch.cat([history, qkv[begin:end]]), []
            for t in range(begin, end):
                taps = window[t - begin : t - begin + self.conv.shape[1]]
                q, k, v = self._heads(torch.nn.functional.silu((taps * self.conv.T.float()).sum(0)))
                q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
                q, k = (x.repeat_interleave(len(v) // len(x), dim=0) for x in (q, k))
                s = alpha[t, :, None, None] * s
                u = torch.sigmoid(b[t])[:, None] * (v - torch.einsum("hvk,hk->hv", s, k))
                s = s + torch.einsum("hv,hk->hvk", u, k)
                expected.append(torch.einsum("hvk,hk->hv", s, q) * self.dims[0] ** -0.5)
            pairs = ((out[begin:end].float(), torch.stack(expected)), (states[slot], s))
            self.most_off = max(self.most_off, *(float((ours - x).norm() / x.norm()) for ours, x in pairs))
        o = out.float()
        normed = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * torch.nn.functional.silu(z.view_as(o))
        self.most_off = max(self.most_off, float((gated.float() - normed).norm() / normed.norm()))
        if not self.most_off < MOST_OFF:
            sys.exit(f"{self.model.name}: the gated delta rule is {self.most_off:.1%} off the equations")


class LatentAttention:
    """Multi-head latent attention: the cache holds one row a token, of which keys and values of all heads are made.

    Where nothing is cached yet they are made, and every head attends by itself. Over the cache that would be too much
    work: there the projection of keys is absorbed into the queries, and that of values into the output.
    """

    def __init__(self, model: Model, weights: Weights, num_layers: int, num_pages: int) -> None:
        self.model, self.dtype = model, weights.dtype
        self.num_heads = model.num_qo_heads // model.tensor_parallel[0]
        hidden_size, latent, nope = model.hidden_size, model.kv_lora_rank, model.qk_nope_head_dim
        self.row_dims, self.scale = (latent, model.qk_rope_head_dim), model.head_dim**-0.5
        self.q_down = weights.matrix(model.q_lora_rank, hidden_size) if model.q_lora_rank else None
        self.q_up = weights.matrix(self.num_heads * model.head_dim, model.q_lora_rank or hidden_size)
        self.kv_down = weights.matrix(sum(self.row_dims), hidden_size)
        self.kv_up = weights.matrix(self.num_heads * (nope + model.v_head_dim), latent)
        of_heads = self.kv_up.view(self.num_heads, nope + model.v_head_dim, latent)
        self.key_up, self.value_up = of_heads.split([nope, model.v_head_dim], dim=1)  # [num_heads, dim, latent]
        self.output = weights.matrix(hidden_size, self.num_heads * model.v_head_dim)
        self.q_norm, self.kv_norm = weights.vector(model.q_lora_rank or 1), weights.vector(latent)
        self.caches = [weights.zeros(num_pages, PAGE_SIZE, sum(self.row_dims)) for _ in range(num_layers)]
        workspace = weights.zeros(32 << 20, dtype=torch.uint8)
        self.unabsorbed = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace)
        self.absorbed = flashinfer.BatchMLAPagedAttentionWrapper(workspace)
        self.most_off = 0.0

    def __str__(self) -> str:
        return f"{self.num_heads} heads on {self.row_dims[0]} + {self.row_dims[1]}"

    def plan(self, batch: Batch) -> None:
        if batch.is_new:
            heads = (self.num_heads, self.num_heads, self.model.head_dim, self.model.v_head_dim)
            options = {"causal": True, "sm_scale": self.scale, "q_data_type": self.dtype}
            self.unabsorbed.plan(batch.qo_indptr, batch.qo_indptr, *heads, **options)
        else:
            pages = (batch.qo_indptr, batch.kv_indptr, batch.kv_indices, batch.kv_lens)
            shape = (self.num_heads, *self.row_dims, PAGE_SIZE)
            self.absorbed.plan(*pages, *shape, True, self.scale, self.dtype, self.dtype)

    def run(self, x: torch.Tensor, layer: int, batch: Batch) -> torch.Tensor:
        x_of_q = x
        if self.q_down is not None:
            x_of_q = flashinfer.rmsnorm(functional.linear(x, self.q_down), self.q_norm)
        q = functional.linear(x_of_q, self.q_up).unflatten(-1, (self.num_heads, -1))
        row = functional.linear(x, self.kv_down)
        ckv, kpe = row.split(self.row_dims, dim=-1)
        flashinfer.rmsnorm(ckv, self.kv_norm, out=ckv)
        q_nope, q_pe = q.split([self.model.qk_nope_head_dim, self.row_dims[1]], dim=-1)
        flashinfer.apply_rope_pos_ids_inplace(q_pe, kpe[:, None], batch.positions, interleave=True)
        caches = self.caches[layer].split(self.row_dims, dim=-1)
        pages = (batch.kv_indices, batch.kv_indptr, batch.kv_last_page_len)
        flashinfer.append_paged_mla_kv_cache(ckv, kpe, batch.batch_indices, batch.positions, *caches, *pages)
        if batch.is_new:
            k_nope, v = self._keys_and_values(ckv)
            k = torch.empty_like(q)
            flashinfer.concat_mla_k(k, k_nope, kpe[:, None])
            out = self.unabsorbed.run(q, k, v)
        else:
            q_latent = torch.einsum("thd,hdl->thl", q_nope, self.key_up)
            out = torch.einsum("thl,hdl->thd", self.absorbed.run(q_latent, q_pe, *caches), self.value_up)
        self._compare(out, q, layer, batch)
        return functional.linear(out.flatten(1), self.output)

    def _keys_and_values(self, ckv: torch.Tensor) -> list[torch.Tensor]:
        both = functional.linear(ckv, self.kv_up.to(ckv.dtype)).unflatten(-1, (self.num_heads, -1))
        return list(both.split([self.model.qk_nope_head_dim, self.model.v_head_dim], dim=-1))

    def _compare(self, out: torch.Tensor, q: torch.Tensor, layer: int, batch: Batch) -> None:
        """With softmax(q [k_nope, k_pe]) v of every head, in fp32 from the rows of the cache."""
        for b, kv_len in enumerate(batch.kv_lens.tolist()):
            (begin, end), (first, last) = (indptr[b : b + 2].tolist() for indptr in (batch.qo_indptr, batch.kv_indptr))
            rows = self.caches[layer][batch.kv_indices[first:last].long()].flatten(0, 1)[:kv_len].float()
            k_nope, v = self._keys_and_values(rows[:, : self.row_dims[0]])
            k_pe = rows[:, None, self.row_dims[0] :].expand(-1, self.num_heads, -1)
            logits = torch.einsum("ihd,jhd->hij", q[begin:end].float(), torch.cat([k_nope, k_pe], -1)) * self.scale
            visible = torch.ones_like(logits[0]).tril(kv_len - (end - begin)).bool()
            weights = torch.softmax(logits.masked_fill(~visible, -torch.inf), dim=-1)
            expected = torch.einsum("hij,jhd->ihd", weights, v)
            off = float((out[begin:end].float() - expected).norm() / expected.norm())
            self.most_off = max(self.most_off, off)
        if not self.most_off < MOST_OFF:
            sys.exit(f"{self.model.name}: attention is {self.most_off:.1%} off the equations")


class Decoder:
    """A decoder in Llama's style: RMSNorm, attention over a paged cache, SwiGLU; in three of four layers a gated delta
    rule in the place of attention, if the model has one."""

    def __init__(self, model: Model, weights: Weights, num_layers: int, num_pages: int) -> None:
        ranks = model.tensor_parallel[0]  # the share of one GPU, where a model needs several
        kind = LatentAttention if model.kv_lora_rank else GroupedQueryAttention
        self.num_layers, self.vocab_size = num_layers, model.vocab_size or VOCABULARY
        self.delta_net: GatedDeltaNet | None = None
        if model.linear_num_value_heads:
            self.num_layers = 4
            self.delta_net = GatedDeltaNet(model, weights, 3)
        self.attention = kind(model, weights, self.num_layers, num_pages)
        intermediate_size, hidden_size = model.intermediate_sizes[0] // ranks, model.hidden_size
        self.embedding = weights.matrix(min(VOCABULARY, self.vocab_size), hidden_size)
        self.gate_up = weights.matrix(2 * intermediate_size, hidden_size)
        self.down = weights.matrix(hidden_size, intermediate_size)
        self.norm = Norm(model, weights, hidden_size)

    def step(self, batch: Batch) -> list[int]:
        """Compute a batch; returns the next token of every request."""
        self.attention.plan(batch)
        residual = functional.embedding(batch.tokens, self.embedding)
        x = self.norm(residual)
        for layer in range(self.num_layers):
            is_attention = self.delta_net is None or layer == self.num_layers - 1
            x = (self.attention if is_attention else self.delta_net).run(x, layer, batch)
            self.norm.add(x, residual)
            x = functional.linear(flashinfer.silu_and_mul(functional.linear(x, self.gate_up)), self.down)
            self.norm.add(x, residual)
        last = x[batch.qo_indptr[1:].long() - 1]
        return self._sample(functional.linear(last, self.embedding).float())

    def _sample(self, logits: torch.Tensor) -> list[int]:
        probs = functional.pad(torch.softmax(logits, dim=-1), (0, self.vocab_size - logits.shape[-1]))
        return flashinfer.top_k_top_p_sampling_from_probs(probs, 50, 0.9).tolist()


# ---------------------------------------------------------------------------------------------------------------- demo


def serve(model: Model, weights: Weights, num_layers: int, number: str = "") -> None:
    answered = default_resolver().answered_by
    known = set(answered)
    num_pages = 2 * MAX_BATCH
    decoder, scheduler = Decoder(model, weights, num_layers, num_pages), Scheduler(num_pages)
    started, step, num_tokens = time.perf_counter(), 0, 0
    while not scheduler.is_done:
        scheduler.admit(step)
        batch = Batch.of(scheduler.running, weights.device)
        scheduler.accept(decoder.step(batch))
        num_tokens += batch.tokens.numel()
        step += 1
    seconds = time.perf_counter() - started
    stores = Counter(store for spec, store in answered.items() if spec not in known)
    new = ", ".join(f"{count} from {store}" for store, count in sorted(stores.items())) or "none new"
    shape = f"{model.hidden_size} wide, {decoder.attention}"
    line = f"{number}{model.name:34} {shape:34} {num_tokens:3} tokens in {seconds:5.1f} s   kernels: {new}"
    compared = decoder.attention if isinstance(decoder.attention, LatentAttention) else decoder.delta_net
    if compared is not None:
        line += f"   off the equations: {compared.most_off:.2%}"
    print(line, flush=True)


def core_models(config: str, names: list[str]) -> list[Model]:
    models = [row.content for row in read_config(find_config(config)) if isinstance(row.content, Model)]
    chosen = [model for model in models if not names or model.name in names]
    if not chosen:
        sys.exit(f"no such model in {config}; it has {', '.join(model.name for model in models)}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", default="core", help="a file of aot_configs/ (default: core)")
    parser.add_argument("--model", action="append", default=[], help="only this model (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="on a CPU: one layer of each, and a share of large models")
    args = parser.parse_args()
    torch.manual_seed(0)
    weights = Weights(args.device, torch.bfloat16)
    quick = args.quick and args.device == "cpu"
    num_layers = 1 if quick else NUM_LAYERS
    models = core_models(args.config, args.model)
    for number, model in enumerate(models, 1):
        if quick and model.hidden_size >= LARGE:
            model = replace(model, tensor_parallel=model.tensor_parallel[-1:])
        serve(model, weights, num_layers, f"{number:2}/{len(models)} ")
    print("\nNow a shape that no precompiled set holds:", flush=True)
    serve(OUTSIDE_CORE, weights, num_layers)


if __name__ == "__main__":
    main()
