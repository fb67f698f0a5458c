# SPDX-License-Identifier: Apache-2.0
"""TVM's own paged KV cache on these functions: prompts, decode, shared prefixes and removed tokens. `pip install
apache-tvm`, which the other tests do without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.oracles.attention import attention
from tests.tolerances import assert_close

pytestmark = pytest.mark.slow
NUM_LAYERS, PAGE_SIZE, HEAD_DIM, DTYPE = 2, 16, 128, torch.float16


class Cache:
    """A cache of TVM, and the keys and values that it should hold."""

    def __init__(self, heads: tuple[int, int], device: torch.device) -> None:
        tvm = pytest.importorskip("tvm", reason="needs apache-tvm")
        import tvm_ffi
        from tvm.relax.frontend.nn.llm import kv_cache as parts
        from tvm.s_tir import dlight

        import flashinfer_tvm

        flashinfer_tvm.register()
        self.heads, self.device = heads, device
        self.ffi, self.tvm = tvm_ffi, tvm
        where = tvm.cpu() if device.type == "cpu" else tvm.cuda()
        target = tvm.target.Target.from_device(where)
        num_qo_heads, num_kv_heads = heads

        def built(function: Any) -> Any:
            module = tvm.IRModule({"main": function})
            with target:
                module = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(module)
            return tvm.tirx.build(module["main"], target=target).main

        of_kv, name = (num_kv_heads, HEAD_DIM, "float16"), str(DTYPE)[6:]
        if device.type == "cpu":
            merge = parts._merge_state_inplace_cpu(name)
            copy_page = parts._copy_single_page_cpu(num_kv_heads, PAGE_SIZE, HEAD_DIM, name)
            compact = parts._compact_kv_copy_cpu(*of_kv)
        else:
            merge = parts._merge_state_inplace(num_qo_heads, HEAD_DIM, name, target)
            copy_page = parts._copy_single_page(num_kv_heads, PAGE_SIZE, HEAD_DIM, name, target)
            compact = parts._compact_kv_copy(*of_kv, target)
        rotate = parts.llama_rope_with_position_map(1e4, 1.0, HEAD_DIM, *heads, name, {})
        pairs = [
            ["flashinfer", *(tvm_ffi.get_global_func(f"batch_{one}") for one in names)]
            for names in (
                ("prefill_ragged_run", "prefill_plan"),
                ("prefill_paged_run", "prefill_plan"),
                ("decode_run", "decode_plan"),
            )
        ]
        self.cache = tvm_ffi.get_global_func("vm.builtin.paged_attention_kv_cache_create")(
            tvm_ffi.Shape([8, 1024, 256, PAGE_SIZE, 0]), tvm_ffi.Shape([0, NUM_LAYERS]), *heads, HEAD_DIM, HEAD_DIM,
            tvm_ffi.Shape([int(parts.AttnKind.MHA)] * NUM_LAYERS), False, int(parts.RopeMode.NONE), 1.0, 1e4, None,
            tvm.runtime.empty((), name, device=where), built(parts._kv_cache_transpose_append(*of_kv)), None, *pairs,
            *[[] for _ in range(5)], [built(merge)], built(rotate), built(copy_page),
            built(parts._kv_cache_debug_get_kv(NUM_LAYERS, *of_kv)), built(compact),
        )  # fmt: skip
        self.kv: dict[int, torch.Tensor] = {}  # [layers, tokens, 2, num_kv_heads, head_dim]
        self.generator = torch.Generator().manual_seed(0)

    def call(self, name: str, *arguments: Any) -> None:
        self.ffi.get_global_func(f"vm.builtin.{name}")(self.cache, *arguments)

    def add(self, sequence: int) -> None:
        self.call("kv_state_add_sequence", sequence)
        self.kv[sequence] = torch.empty(NUM_LAYERS, 0, 2, self.heads[1], HEAD_DIM, dtype=DTYPE)

    def fork(self, parent: int, child: int, position: int) -> None:
        self.call("kv_state_fork_sequence", parent, child, position)
        self.kv[child] = self.kv[parent][:, :position]

    def forget(self, sequence: int, num_tokens: int) -> None:
        self.call("kv_state_popn", sequence, num_tokens)
        self.kv[sequence] = self.kv[sequence][:, :-num_tokens]

    def step(self, appended: dict[int, int]) -> None:
        """So many new tokens of each of these sequences, through every layer, against the oracle."""
        num_qo_heads, num_kv_heads = self.heads
        self.call("kv_state_begin_forward", self.ffi.Shape(list(appended)), self.ffi.Shape(list(appended.values())))
        rows = torch.randn(
            NUM_LAYERS, sum(appended.values()), num_qo_heads + 2 * num_kv_heads, HEAD_DIM, generator=self.generator
        ).to(DTYPE)
        places = dict(zip(appended, rows.split(list(appended.values()), dim=1)))
        for sequence, new in places.items():
            kv = new[:, :, num_qo_heads:].unflatten(2, (2, num_kv_heads))
            self.kv[sequence] = torch.cat([self.kv[sequence], kv], dim=1)
        for layer in range(NUM_LAYERS):
            qkv = rows[layer].to(self.device)
            out = torch.full((len(qkv), num_qo_heads, HEAD_DIM), torch.nan, dtype=DTYPE, device=self.device)
            self.call("attention_kv_cache_attention_with_fused_qkv", layer, HEAD_DIM**-0.5, qkv, out)
            expected = [
                attention(new[layer, :, :num_qo_heads], *self.kv[sequence][layer].unbind(1), causal=True)[0]
                for sequence, new in places.items()
            ]
            # A cascade rounds the state of each of its depths to 16 bits before they are merged.
            assert_close(out, torch.cat(expected), scale=3.0)
        self.call("kv_state_end_forward")


@pytest.mark.parametrize("heads", [(8, 1), (4, 2)], ids=["decodes_by_prefill", "decodes_by_decode"])
def test_the_cache(heads: tuple[int, int], device: torch.device) -> None:
    cache = Cache(heads, device)
    for sequence in range(3):
        cache.add(sequence)
    cache.step({0: 20, 1: 33, 2: 1})
    cache.step({1: 5, 2: 40})
    for _ in range(3):
        cache.step({0: 1, 1: 1, 2: 1})
    cache.fork(1, 3, 30)
    cache.fork(1, 4, 41)
    cache.step({3: 7, 4: 2})
    cache.step({0: 1, 1: 1, 3: 1, 4: 1})
    cache.forget(2, 17)
    cache.step({2: 1, 4: 1})
    cache.step({2: 3, 0: 16})
