# SPDX-License-Identifier: Apache-2.0
"""Paged KV cache: appending rows, positions of ragged rows, lengths."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from flashinfer.families.layout import DTYPES, FP8_DTYPES, I32, I64, QUANT_SCALE, Fields, P, nested
from flashinfer.jit.spec import Config, CxxType, Family, KernelSpec, Launch, register, twins

INDEX_TYPES = ("int32", "int64")
VEC_SIZES = (1, 2, 4, 8, 16)
HEAD_STRIDES: Fields = [("token", I64), ("head", I64)]
CACHE_STRIDES: Fields = [("page", I64), ("slot", I64), ("head", I64)]
TOKEN_SLOTS: Fields = [
    ("batch_indices", P),
    ("positions", P),
    ("page_indices", P),
    ("page_indptr", P),
]
SLOT_BOUNDS: Fields = [
    ("batch_size", I32),
    ("num_page_indices", I32),
    ("num_pages", I32),
    ("page_size", I32),
]


def strides(field: str, of: Sequence[int]) -> dict[str, int]:
    """The values of HeadStrides, of `[num_tokens, num_heads, head_dim]`, or of CacheStrides, of `[num_pages, page_size,
    num_heads, head_dim]`, in a field of that name."""
    names = [name for name, _ in (HEAD_STRIDES if len(of) == 3 else CACHE_STRIDES)]
    return {f"{field}.{name}": stride for name, stride in zip(names, of)}


class AppendParams(ctypes.Structure):
    """Mirror of csrc/page/params.h."""

    _fields_ = [
        ("key", P),
        ("value", P),
        ("key_cache", P),
        ("value_cache", P),
        *nested("slots", TOKEN_SLOTS),
        *nested("key_scale", QUANT_SCALE),
        *nested("value_scale", QUANT_SCALE),
        *nested("bounds", SLOT_BOUNDS),
        *nested("key_strides", HEAD_STRIDES),
        *nested("value_strides", HEAD_STRIDES),
        *nested("key_cache_strides", CACHE_STRIDES),
        *nested("value_cache_strides", CACHE_STRIDES),
        ("num_tokens", I32),
        ("num_heads", I32),
    ]


class TokenPositionsParams(ctypes.Structure):
    """Mirror of csrc/page/params.h."""

    _fields_ = [
        ("append_indptr", P),
        ("seq_lens", P),
        ("batch_indices", P),
        ("positions", P),
        ("num_tokens", I32),
        ("batch_size", I32),
    ]


class SeqLensParams(ctypes.Structure):
    """Mirror of csrc/page/params.h."""

    _fields_ = [
        ("page_indptr", P),
        ("last_page_len", P),
        ("seq_lens", P),
        ("batch_size", I32),
        ("page_size", I32),
    ]


def heads_per_thread(num_heads: int) -> int:
    """A thread moves the same vector of several heads: their slot is looked up once, and their loads overlap."""
    return 4 if num_heads >= 4 else 2 if num_heads >= 2 else 1


def _append_config(spec: KernelSpec) -> Config:
    key_dim, value_dim, vec = spec.arg("key_dim"), spec.arg("value_dim"), spec.arg("vec_size")
    num_lanes = (key_dim + value_dim) // vec
    # Whole tokens to a block: the width that leaves fewest threads without work, 128 unless another is better.
    widths = range(128, 513, 32) if num_lanes <= 512 else range(1024, 1025)
    num_threads = max(widths, key=lambda width: (width // num_lanes * num_lanes / width, -width))
    constants = {
        "InT": CxxType(spec.arg("dtype")),
        "CacheT": CxxType(spec.arg("cache_dtype")),
        "TokenIndex": CxxType(spec.arg("token_index") + "_t"),
        "PageIndex": CxxType(spec.arg("page_index") + "_t"),
        "kKeyDim": key_dim,
        "kValueDim": value_dim,
        "kVecSize": vec,
        "kHeadsPerThread": spec.arg("heads_per_thread"),
        "kConvert": spec.arg("dtype") != spec.arg("cache_dtype"),
    }
    groups = max(1, num_threads // num_lanes)  # more than 1024 lanes the CPU alone has
    return Config(constants, Launch(num_threads=num_threads, units_per_block=groups))


def _index_config(spec: KernelSpec) -> Config:
    return Config({"Index": CxxType(spec.arg("index") + "_t")}, Launch(num_threads=128))


APPEND_PAGED_KV = Family(
    name="append_paged_kv",
    axes={
        "dtype": (*DTYPES, *FP8_DTYPES),
        "cache_dtype": (*DTYPES, *FP8_DTYPES),
        "key_dim": range(1, 1025),
        "value_dim": range(1, 1025),
        "token_index": INDEX_TYPES,
        "page_index": INDEX_TYPES,
        "vec_size": VEC_SIZES,
        "heads_per_thread": (1, 2, 4),
    },
    implementations=twins(AppendParams, _append_config, cuda="page/append.cuh", cpu="cpu/page/append.h"),
)
TOKEN_POSITIONS = Family(
    name="token_positions",
    axes={"index": INDEX_TYPES},
    implementations=twins(
        TokenPositionsParams, _index_config, cuda="page/token_positions.cuh", cpu="cpu/page/token_positions.h"
    ),
)
SEQ_LENS = Family(
    name="seq_lens",
    axes={"index": INDEX_TYPES},
    implementations=twins(SeqLensParams, _index_config, cuda="page/seq_lens.cuh", cpu="cpu/page/seq_lens.h"),
)
register(APPEND_PAGED_KV, TOKEN_POSITIONS, SEQ_LENS)
