# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: of queries and keys, with an append to a paged cache, and after an RMSNorm of heads."""

from __future__ import annotations

import ctypes
import functools
import math

from flashinfer.families.layout import DTYPES, F32, FP8_DTYPES, I32, I64, QUANT_SCALE, Fields, P, nested
from flashinfer.families.page import CACHE_STRIDES, HEAD_STRIDES, INDEX_TYPES, SLOT_BOUNDS, TOKEN_SLOTS, VEC_SIZES
from flashinfer.jit.spec import Config, CxxType, Family, KernelSpec, Launch, register, twins

MAX_ROTARY_DIM = 256
ROTATION: Fields = [
    ("positions", P),
    ("indptr", P),
    ("offsets", P),
    ("cos_sin_cache", P),
]
ROTATION_SETUP: Fields = [
    ("cos_sin_stride", I64),
    ("num_positions", I32),
    ("batch_size", I32),
    ("frequencies", ctypes.c_uint8 * (MAX_ROTARY_DIM // 2 * 8)),  # packed by `frequency_table`
]


class RopeParams(ctypes.Structure):
    """Mirror of csrc/rope/params.h."""

    _fields_ = [
        ("q", P),
        ("k", P),
        ("q_out", P),
        ("k_out", P),
        *nested("rotation", ROTATION),
        *nested("setup", ROTATION_SETUP),
        *nested("q_strides", HEAD_STRIDES),
        *nested("k_strides", HEAD_STRIDES),
        *nested("q_out_strides", HEAD_STRIDES),
        *nested("k_out_strides", HEAD_STRIDES),
        ("num_tokens", I32),
        ("num_qo_heads", I32),
        ("num_kv_heads", I32),
    ]


class RopeAppendParams(ctypes.Structure):
    """Mirror of csrc/rope/params.h."""

    _fields_ = [
        ("q", P),
        ("k", P),
        ("v", P),
        ("q_out", P),
        ("key_cache", P),
        ("value_cache", P),
        *nested("slots", TOKEN_SLOTS),
        *nested("rotation", ROTATION),
        *nested("key_scale", QUANT_SCALE),
        *nested("value_scale", QUANT_SCALE),
        *nested("bounds", SLOT_BOUNDS),
        *nested("setup", ROTATION_SETUP),
        *nested("q_strides", HEAD_STRIDES),
        *nested("k_strides", HEAD_STRIDES),
        *nested("v_strides", HEAD_STRIDES),
        *nested("q_out_strides", HEAD_STRIDES),
        *nested("key_cache_strides", CACHE_STRIDES),
        *nested("value_cache_strides", CACHE_STRIDES),
        ("num_tokens", I32),
        ("num_qo_heads", I32),
        ("num_kv_heads", I32),
    ]


class QkNormRopeParams(ctypes.Structure):
    """Mirror of csrc/rope/params.h."""

    _fields_ = [
        ("q", P),
        ("k", P),
        ("q_weight", P),
        ("k_weight", P),
        *nested("rotation", ROTATION),
        *nested("setup", ROTATION_SETUP),
        *nested("qkv_strides", HEAD_STRIDES),
        ("eps", F32),
        ("weight_bias", F32),
        ("num_tokens", I32),
        ("num_qo_heads", I32),
        ("num_kv_heads", I32),
    ]


@functools.lru_cache(maxsize=64)
def frequency_table(
    rotary_dim: int,
    rope_scale: float,
    rope_theta: float,
    low_freq_factor: float = 0.0,
    high_freq_factor: float = 0.0,
    old_context_len: int = 0,
) -> bytes:
    """What `RotationSetup.frequencies` holds: turns per position of each pair, as 64-bit binary fractions.

    Pair `i` of Su et al. 2021 (arXiv:2104.09864) turns by `rope_theta ** (-2 i / rotary_dim) / rope_scale` radians
    per position. With `old_context_len`, frequencies are scaled as in Llama 3.1: those with fewer than
    `low_freq_factor` turns in the old context are divided by rope_scale, those with more than `high_freq_factor` are
    kept, and between the two the division fades in linearly.

    Raises OverflowError or ValueError where a frequency is not finite.
    """
    table = bytearray(MAX_ROTARY_DIM // 2 * 8)
    for i in range(rotary_dim // 2):
        turns = rope_theta ** (-2.0 * i / rotary_dim) / (2.0 * math.pi)
        kept = 0.0
        if old_context_len:
            kept = (old_context_len * turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
            kept = min(1.0, max(0.0, kept))
        turns *= (1.0 - kept) / rope_scale + kept
        table[8 * i : 8 * i + 8] = (int(turns * 2.0**64) % 2**64).to_bytes(8, "little")
    return bytes(table)


def _rotary_constants(spec: KernelSpec) -> dict[str, CxxType | int | bool | float]:
    cos_sin = spec.arg("cos_sin")
    return {
        "T": CxxType(spec.arg("dtype")),
        "PositionIndex": CxxType(spec.arg("position_index") + "_t"),
        "CosSinT": CxxType("fp32" if cos_sin == "computed" else cos_sin),
        "kHeadDim": spec.arg("head_dim"),
        "kRotaryDim": spec.arg("rotary_dim"),
        "kInterleave": spec.arg("interleave"),
        "kCosSinCache": cos_sin != "computed",
        "kRagged": False,
        "kRotaryPartOnly": False,
        "kVecSize": spec.arg("vec_size"),
        "kHeadsPerThread": HEADS_PER_THREAD,
    }


def lanes_per_head(spec: KernelSpec) -> int:
    """Threads that share a head: the power of two that HeadLanes (csrc/rope/head_pairs.cuh) counts."""
    dim: int = (
        spec.arg("rotary_dim") if spec.family == "rope" and spec.arg("rotary_part_only") else spec.arg("head_dim")
    )
    num_used = dim // (2 * int(spec.arg("vec_size")))
    return 1 << (num_used - 1).bit_length()


# With 128 threads and 6 blocks an SM: rope of 8192 tokens within 2% of torch.neg_ over the same bytes, no spills. One
# head a thread is 17% slower, four spill within that bound. docs/notes/2026-11-rope-tiles.md
HEADS_PER_THREAD = 2


def _launch(spec: KernelSpec, num_blocks: int = 6) -> Launch:
    num_lanes = lanes_per_head(spec)
    num_threads = max(128, num_lanes)
    return Launch(
        num_threads=num_threads,
        min_blocks_per_sm=num_blocks * 128 // num_threads,
        units_per_block=num_threads // num_lanes,
    )


def _rope_config(spec: KernelSpec) -> Config:
    own = {"kRagged": spec.arg("ragged"), "kRotaryPartOnly": spec.arg("rotary_part_only")}
    return Config({**_rotary_constants(spec), **own}, _launch(spec))


def _rope_append_config(spec: KernelSpec) -> Config:
    own = {
        "CacheT": CxxType(spec.arg("cache_dtype")),
        "TokenIndex": CxxType(spec.arg("token_index") + "_t"),
        "PageIndex": CxxType(spec.arg("page_index") + "_t"),
        "kConvert": spec.arg("cache_dtype") != spec.arg("dtype"),
    }
    return Config({**_rotary_constants(spec), **own}, _launch(spec))


def _qk_norm_rope_config(spec: KernelSpec) -> Config:
    return Config(_rotary_constants(spec), _launch(spec, 5))  # 6 spill with a table, and are no faster


_ROTARY_AXES = {
    "dtype": DTYPES,
    "head_dim": range(4, 513, 4),
    "rotary_dim": range(4, MAX_ROTARY_DIM + 1, 4),
    "interleave": (False, True),
    "cos_sin": ("computed", *DTYPES),  # "computed", or the dtype of a table of cos and sin
    "position_index": INDEX_TYPES,
    "vec_size": VEC_SIZES,
}
ROPE = Family(
    name="rope",
    axes={**_ROTARY_AXES, "ragged": (False, True), "rotary_part_only": (False, True)},
    implementations=twins(RopeParams, _rope_config, cuda="rope/rope.cuh", cpu="cpu/rope/rope.h"),
)
ROPE_APPEND = Family(
    name="rope_append",
    axes={
        **_ROTARY_AXES,
        "cache_dtype": (*DTYPES, *FP8_DTYPES),
        "token_index": INDEX_TYPES,
        "page_index": INDEX_TYPES,
    },
    implementations=twins(
        RopeAppendParams, _rope_append_config, cuda="rope/rope_append.cuh", cpu="cpu/rope/rope_append.h"
    ),
)
QK_NORM_ROPE = Family(
    name="qk_norm_rope",
    axes=_ROTARY_AXES,
    implementations=twins(
        QkNormRopeParams, _qk_norm_rope_config, cuda="rope/qk_norm_rope.cuh", cpu="cpu/rope/qk_norm_rope.h"
    ),
)
register(ROPE, ROPE_APPEND, QK_NORM_ROPE)
