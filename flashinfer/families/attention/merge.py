# SPDX-License-Identifier: Apache-2.0
"""Merging of attention states."""

from __future__ import annotations

import ctypes

from flashinfer import target as targets
from flashinfer.dtypes import ITEMSIZE
from flashinfer.errors import UnsupportedConfig
from flashinfer.jit.spec import Config, CxxType, Family, KernelSpec, Launch, register, twins

DTYPES = ("fp16", "bf16", "fp32")
HEAD_DIMS = range(8, 1025, 8)


ADDRESSES = ("v", "s", "v_other", "s_other", "mask", "indptr", "v_out", "s_out")  # change from call to call
STRIDES = ("v_row_stride", "v_state_stride", "s_row_stride", "s_state_stride")


class MergeParams(ctypes.Structure):
    """Mirror of csrc/attention/merge_params.h."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ADDRESSES],
        ("num_rows", ctypes.c_int64),
        *[(name, ctypes.c_int64) for name in STRIDES],
        ("num_heads", ctypes.c_int32),
        ("num_states", ctypes.c_int32),
    ]


def _config(spec: KernelSpec) -> Config:
    head_dim = spec.arg("head_dim")
    constants: dict[str, CxxType | int | bool | float] = {
        "T": CxxType(spec.arg("dtype")),
        "kHeadDim": head_dim,
        "kPair": spec.arg("pair"),
    }
    if targets.kind(spec.target) == "cpu":
        return Config(constants)
    vec_size = 16 // ITEMSIZE[spec.arg("dtype")]
    threads_per_row = head_dim // vec_size
    if head_dim % vec_size:
        raise UnsupportedConfig(f"merge_states: head_dim {head_dim} is not a multiple of {vec_size}")
    rows_per_block = 1
    while rows_per_block * 2 * threads_per_row <= 256:
        rows_per_block *= 2
    return Config({**constants, "kVecSize": vec_size}, Launch(num_threads=rows_per_block * threads_per_row))


def rows_per_block(config: Config) -> int:
    """(row, head) pairs that one block merges."""
    return config.launch.num_threads * int(config.constants["kVecSize"]) // int(config.constants["kHeadDim"])


MERGE_STATES = Family(
    name="merge_states",
    axes={"dtype": DTYPES, "head_dim": HEAD_DIMS, "pair": (False, True)},
    implementations=twins(MergeParams, _config, cuda="attention/merge_states.cuh", cpu="cpu/attention/merge_states.h"),
)
register(MERGE_STATES)
