# SPDX-License-Identifier: Apache-2.0
"""Keys of many heads, put together from a part of each head and one that all share."""

from __future__ import annotations

import ctypes

from flashinfer.families.layout import DTYPES, FP8_DTYPES, I32, I64, P, nested
from flashinfer.families.page import HEAD_STRIDES, VEC_SIZES
from flashinfer.jit.spec import Config, CxxType, Family, KernelSpec, Launch, register, twins

HEADS_PER_THREAD = 4


class ConcatParams(ctypes.Structure):
    """Mirror of csrc/concat/params.h."""

    _fields_ = [
        *[(name, P) for name in ("k_nope", "k_rope", "k")],
        *nested("k_nope_strides", HEAD_STRIDES),
        *nested("k_strides", HEAD_STRIDES),
        ("k_rope_stride", I64),
        ("num_tokens", I32),
        ("num_heads", I32),
    ]


def num_lanes(spec: KernelSpec) -> int:
    """Threads for one vector each of a head's key."""
    return int((spec.arg("nope_dim") + spec.arg("rope_dim")) // spec.arg("vec_size"))


def _config(spec: KernelSpec) -> Config:
    constants = {
        "T": CxxType(spec.arg("dtype")),
        "kNopeDim": spec.arg("nope_dim"),
        "kRopeDim": spec.arg("rope_dim"),
        "kVecSize": spec.arg("vec_size"),
        "kHeadsPerThread": HEADS_PER_THREAD,
    }
    lanes = num_lanes(spec)
    return Config(constants, Launch(num_threads=-(-max(lanes, 256 // lanes * lanes) // 32) * 32))


CONCAT_MLA_K = Family(
    name="concat_mla_k",
    axes={
        "dtype": (*DTYPES, *FP8_DTYPES),
        "nope_dim": range(1, 513),
        "rope_dim": range(1, 513),
        "vec_size": VEC_SIZES,
    },
    implementations=twins(ConcatParams, _config, cuda="concat/concat_mla_k.cuh", cpu="cpu/concat/concat_mla_k.h"),
)
register(CONCAT_MLA_K)
