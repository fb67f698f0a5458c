# SPDX-License-Identifier: Apache-2.0
"""One small legal call of every function of `flashinfer.page` and `flashinfer.rope`, for tests that change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import flashinfer
from flashinfer.host import indices
from flashinfer.page import append as page_append
from flashinfer.page import lengths as page_lengths
from flashinfer.rope import append as rope_append
from flashinfer.rope import launch as rope_launch

MEMOS = (
    page_append._appends,
    page_append._mla_appends,
    page_lengths._index_launches,
    rope_launch._ropes,
    rope_launch._qk_norms,
    rope_append._appends,
)
PAGE_SIZE, NUM_PAGES, NUM_POSITIONS, NUM_ROWS, HEAD_DIM = 4, 5, 16, 5, 32


@dataclass
class Call:
    name: str
    arguments: dict[str, Any]
    written: tuple[str, ...]  # names of arguments

    def run(self, **changed: Any) -> Any:
        return getattr(flashinfer, self.name)(**{**self.arguments, **changed})

    def bits(self) -> list[torch.Tensor]:
        """Of every tensor, as bytes: what a call that fails must leave alone."""
        values = [x for value in self.arguments.values() for x in (value if isinstance(value, tuple) else (value,))]
        return [x.detach().cpu().contiguous().view(torch.uint8).clone() for x in values if isinstance(x, torch.Tensor)]


def _index(device: torch.device, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _rows(device: torch.device, seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _slots(device: torch.device) -> dict[str, torch.Tensor]:
    """Two requests of 6 and 3 entries, two rows of padding."""
    return {
        "batch_indices": _index(device, 0, 0, 1, -1, -1),
        "positions": _index(device, 4, 5, 2, 0, -1),
        "kv_indices": _index(device, 3, 0, 4, 2),
        "kv_indptr": _index(device, 0, 2, 3),
    }


def _heads(device: torch.device) -> dict[str, torch.Tensor]:
    return {"q": _rows(device, 0, NUM_ROWS, 2, HEAD_DIM), "k": _rows(device, 1, NUM_ROWS, 1, HEAD_DIM)}


def _table(device: torch.device) -> torch.Tensor:
    return _rows(device, 2, NUM_POSITIONS, HEAD_DIM)


def _pos_ids(device: torch.device) -> dict[str, Any]:
    return {**_heads(device), "pos_ids": _index(device, 0, 7, 3, 15, 2)}


def _ragged(device: torch.device) -> dict[str, Any]:
    return {**_heads(device), "indptr": _index(device, 0, 2, 5), "offsets": _index(device, 3, 9)}


def _by_table(device: torch.device) -> dict[str, Any]:
    heads = _heads(device)
    return {
        "positions": _index(device, 0, 7, 3, 15, 2),
        "query": heads["q"].flatten(1),
        "key": heads["k"].flatten(1),
        "head_size": HEAD_DIM,
        "cos_sin_cache": _table(device),
    }


def _append(device: torch.device) -> dict[str, Any]:
    return {
        "append_key": _rows(device, 3, NUM_ROWS, 2, HEAD_DIM),
        "append_value": _rows(device, 4, NUM_ROWS, 2, HEAD_DIM),
        **_slots(device),
        "paged_kv_cache": torch.zeros(NUM_PAGES, 2, PAGE_SIZE, 2, HEAD_DIM, device=device),
        "kv_last_page_len": None,
    }


def _append_fp8(device: torch.device) -> dict[str, Any]:
    cache = torch.zeros(NUM_PAGES, PAGE_SIZE, 2, HEAD_DIM, device=device).to(torch.float8_e4m3fn)
    scales = {"k_scale": 0.5, "v_scale": torch.full((1,), 2.0, device=device)}
    return {**_append(device), "paged_kv_cache": (cache, cache.clone()), **scales}


def _append_mla(device: torch.device) -> dict[str, Any]:
    return {
        "append_ckv": _rows(device, 3, NUM_ROWS, 64),
        "append_kpe": _rows(device, 4, NUM_ROWS, 16),
        **_slots(device),
        "ckv_cache": torch.zeros(NUM_PAGES, PAGE_SIZE, 64, device=device),
        "kpe_cache": torch.zeros(NUM_PAGES, PAGE_SIZE, 16, device=device),
        "kv_last_page_len": None,
    }


def _rope_append(device: torch.device) -> dict[str, Any]:
    q, k = _heads(device).values()
    slots = _slots(device)
    return {
        "q": q,
        "k": k,
        "v": _rows(device, 4, NUM_ROWS, 1, HEAD_DIM),
        **slots,
        "paged_kv_cache": torch.zeros(NUM_PAGES, 2, PAGE_SIZE, 1, HEAD_DIM, device=device),
        "q_out": torch.zeros_like(q),
    }


def _qk_norm(device: torch.device) -> dict[str, Any]:
    weight = 1 + _rows(device, 5, HEAD_DIM) / 8
    return {
        "qkv": _rows(device, 0, NUM_ROWS, 4, HEAD_DIM),
        "q_weight": weight,
        "k_weight": weight + 1,
        "pos_ids": _index(device, 0, 7, 3, 15, 2),
        "num_qo_heads": 2,
        "num_kv_heads": 1,
    }


def _positions(device: torch.device) -> dict[str, Any]:
    return {
        "append_indptr": _index(device, 0, 2, 3),
        "seq_lens": _index(device, 6, 3),
        "nnz": NUM_ROWS,
        "batch_indices": _index(device, *[7] * NUM_ROWS),
        "positions": _index(device, *[7] * NUM_ROWS),
    }


def _seq_lens(device: torch.device) -> dict[str, Any]:
    return {"kv_indptr": _index(device, 0, 2, 3), "kv_last_page_len": _index(device, 2, 3), "page_size": PAGE_SIZE}


_ARGUMENTS: dict[str, tuple[Callable[[torch.device], dict[str, Any]], tuple[str, ...]]] = {
    "apply_rope": (_ragged, ()),
    "apply_rope_inplace": (_ragged, ("q", "k")),
    "apply_rope_pos_ids": (_pos_ids, ()),
    "apply_rope_pos_ids_inplace": (_pos_ids, ("q", "k")),
    "apply_llama31_rope": (_ragged, ()),
    "apply_llama31_rope_inplace": (_ragged, ("q", "k")),
    "apply_llama31_rope_pos_ids": (_pos_ids, ()),
    "apply_llama31_rope_pos_ids_inplace": (_pos_ids, ("q", "k")),
    "apply_rope_with_cos_sin_cache": (_by_table, ()),
    "apply_rope_with_cos_sin_cache_inplace": (_by_table, ("query", "key")),
    "rope_append_paged_kv_cache": (_rope_append, ("paged_kv_cache", "q_out")),
    "fused_qk_rmsnorm_rope": (_qk_norm, ("qkv",)),
    "append_paged_kv_cache": (_append, ("paged_kv_cache",)),
    "append_paged_kv_cache, fp8": (_append_fp8, ("paged_kv_cache",)),
    "append_paged_mla_kv_cache": (_append_mla, ("ckv_cache", "kpe_cache")),
    "get_batch_indices_positions": (_positions, ("batch_indices", "positions")),
    "get_seq_lens": (_seq_lens, ()),
}
NAMES = tuple(_ARGUMENTS)


def make_call(name: str, device: torch.device) -> Call:
    arguments, written = _ARGUMENTS[name]
    return Call(name.partition(",")[0], arguments(device), written)


@contextmanager
def fresh_memos() -> Iterator[None]:
    """No launch is prepared, nor stays so."""
    for kept in MEMOS:
        kept.clear()
    try:
        yield
    finally:
        for kept in MEMOS:
            kept.clear()


@contextmanager
def values_not_seen() -> Iterator[None]:
    """As on a GPU: the host knows nothing of the values of index tensors, and kernels have to bound them."""
    looks = indices.may_be_visible
    indices.may_be_visible = lambda *tensors: False
    try:
        with fresh_memos():
            yield
    finally:
        indices.may_be_visible = looks
