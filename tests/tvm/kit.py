# SPDX-License-Identifier: Apache-2.0
"""What the tests of flashinfer_tvm share: calls through the FFI in the order of TVM's arguments, and their tensors.

tvm_ffi is imported where it is used: without it these tests fail, and no others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.attention import decode_kit, mla_kit, prefill_kit

DECODE = decode_kit.Case("decode", kv_lens=(33, 0, 200, 1), layout="HND")
PAGED = prefill_kit.Case("paged", qo_lens=(5, 1, 0, 40), kv_lens=(33, 90, 7, 120), layout="HND")
RAGGED = prefill_kit.Case("ragged", qo_lens=(5, 1, 40), kv_lens=(33, 1, 40), storage="ragged")
LATENT = mla_kit.Case("latent", qo_lens=(1, 3, 1), kv_lens=(33, 90, 0), causal=True)


def call(name: str, *arguments: Any) -> Any:
    """A global function of the FFI, on tensors of the FFI."""
    import tvm_ffi

    import flashinfer_tvm

    flashinfer_tvm.register()
    given = [tvm_ffi.from_dlpack(one) if isinstance(one, Tensor) else one for one in arguments]
    return tvm_ffi.get_global_func(name)(*given)


class Workspaces(list[Tensor]):
    """Of floats, of integers, and on the host, as plan functions take them. Runs take the first two."""

    def __init__(self, device: torch.device, floats: Tensor | None = None) -> None:
        is_gpu = device.type == "cuda"
        sizes = (64 << 20, 8 << 20) if is_gpu else (64, 64)
        made = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes]
        super().__init__([made[0] if floats is None else floats, made[1], torch.empty(64, dtype=torch.uint8)])


class Step:
    """A batch of one kind: arguments of its plan function and of a run, by position, and what the oracle says."""

    names: tuple[str, str]
    out: Tensor
    lse: Tensor

    def __init__(self, workspaces: Workspaces) -> None:
        self.workspaces = workspaces
        self.planned: list[Any] = []
        self.run_with: list[Any] = []  # behind the workspaces and plan_info

    def outputs(self, like: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        device = like.device
        self.out = torch.full((*like.shape[:2], head_dim), math.nan, dtype=like.dtype, device=device)
        self.lse = torch.full(like.shape[:2], math.nan, device=device)
        return self.out, self.lse

    def plan(self, **changes: Any) -> Any:
        return call(self.names[0], *changed(self, "planned", [*self.workspaces, *self.planned], changes))

    def run(self, info: Any, **changes: Any) -> tuple[Tensor, Tensor]:
        arguments = [*self.workspaces[:2], info, *self.run_with]
        call(self.names[1], *changed(self, "run", arguments, changes))
        return self.out, self.lse

    def expected(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def changed(step: Step, which: str, arguments: list[Any], changes: dict[str, Any]) -> list[Any]:
    """Some of them replaced, by the names of the function's parameters."""
    import inspect

    import flashinfer_tvm

    places = list(inspect.signature(flashinfer_tvm.FUNCTIONS[step.names[0 if which == "planned" else 1]]).parameters)
    arguments = list(arguments)
    for name, value in changes.items():
        arguments[places.index(name)] = value
    return arguments


class Decode(Step):
    names = ("batch_decode_plan", "batch_decode_run")

    def __init__(self, workspaces: Workspaces, case: decode_kit.Case = DECODE, seed: int = 0) -> None:
        super().__init__(workspaces)
        device = workspaces[0].device
        self.batch = batch = decode_kit.Batch(case, device, seed)
        empty = torch.empty(0, dtype=case.q_dtype, device=device)
        self.planned = [
            batch.indptr, len(case.kv_lens), *case.heads, case.page_size, False, -1, 0.0, case.head_dim, case.head_dim,
            empty, empty,
        ]  # fmt: skip
        assert isinstance(batch.cache, Tensor)
        q = batch.q.to(device)
        indices = [x.to(device) for x in (batch.indptr, batch.indices, batch.last_page_len)]
        self.run_with = [
            q, batch.cache[:, 0], batch.cache[:, 1], *indices, *self.outputs(q, case.head_dim), 1, -1, False,
            case.head_dim**-0.5, 1.0, 1e-4,
        ]  # fmt: skip

    def expected(self) -> tuple[Tensor, Tensor]:
        return self.batch.expected()


class Prefill(Step):
    def __init__(self, workspaces: Workspaces, case: prefill_kit.Case = PAGED, seed: int = 0) -> None:
        super().__init__(workspaces)
        device, is_causal = workspaces[0].device, bool(case.options.get("causal"))
        self.batch = batch = prefill_kit.make_batch(case, device, seed)
        self.names = ("batch_prefill_plan", f"batch_prefill_{case.storage}_run")
        is_paged, lengths = case.storage == "paged", torch.tensor(case.kv_lens, dtype=torch.int32)
        dims = (case.head_dim, case.head_dim_vo or case.head_dim)
        self.planned = [
            *batch.indices[:2], lengths, len(batch.q), len(case.qo_lens), *case.heads,
            case.page_size if is_paged else 1, False, *dims, is_causal, -1, -1, False, 0,
        ]  # fmt: skip
        kv = batch.kv if isinstance(batch.kv, tuple) else (batch.kv[:, 0], batch.kv[:, 1])
        window = case.options.get("window_left", -1)
        self.run_with = [
            batch.q, *kv, *(x.to(device) for x in batch.indices), *self.outputs(batch.q, dims[1]), int(is_causal),
            int(case.layout == "HND"), window, False, case.head_dim**-0.5, 1.0, 1e-4,
        ]  # fmt: skip

    def expected(self) -> tuple[Tensor, Tensor]:
        return prefill_kit.expect(self.batch)


class Latent(Step):
    names = ("batch_mla_plan", "batch_mla_run")

    def __init__(self, workspaces: Workspaces, case: mla_kit.Case = LATENT, seed: int = 0) -> None:
        super().__init__(workspaces)
        device = workspaces[0].device
        self.batch = batch = mla_kit.make_batch(case, device, seed)
        rows, offsets, pages, lengths = batch.indices
        self.planned = [rows, offsets, lengths, case.num_heads, case.dims[0], case.causal]
        self.run_with = [
            *batch.q, *batch.caches, pages.to(device), *self.outputs(batch.q[0], case.dims[0]), int(case.causal),
            case.num_heads, case.page_size, case.sm_scale, False,
        ]  # fmt: skip

    def expected(self) -> tuple[Tensor, Tensor]:
        return mla_kit.expect(self.batch)


def check(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    prefill_kit.check(actual, expected)
