# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule over the next tokens of each request, by the layout of the states."""

from __future__ import annotations

import ctypes

from flashinfer.dtypes import ITEMSIZE
from flashinfer.families.layout import DTYPES, F32, FAST_DIVISOR, I32, I64, Fields, P, nested
from flashinfer.families.page import INDEX_TYPES
from flashinfer.jit.spec import Config, CxxType, Family, KernelSpec, Launch, register, twins

HEAD_DIMS = (64, 128)
TOKEN_STRIDES: Fields = [("request", I64), ("token", I64), ("head", I64)]
STATE_STRIDES: Fields = [("slot", I64), ("head", I64), ("row", I64)]


class GdnDecodeParams(ctypes.Structure):
    """Mirror of csrc/gdn/decode_params.h."""

    _fields_ = [
        *[(name, P) for name in ("q", "k", "v", "a_log", "a", "dt_bias", "b", "states")],
        *[(name, P) for name in ("input_slots", "output_slots", "token_states", "token_slots", "output")],
        *[
            field
            for name in ("q_strides", "k_strides", "v_strides", "output_strides", "a_strides", "b_strides")
            for field in nested(name, TOKEN_STRIDES)
        ],
        *nested("state_strides", STATE_STRIDES),
        *nested("token_state_strides", STATE_STRIDES),
        ("token_state_request_stride", I64),
        *nested("num_v_heads", FAST_DIVISOR),
        *nested("v_heads_per_head", FAST_DIVISOR),
        ("batch_size", I32),
        ("num_tokens", I32),
        ("num_slots", I32),
        ("num_token_slots", I32),
        ("update_state", I32),
        ("use_qk_l2norm", I32),
        ("scale", F32),
    ]


def _constants(spec: KernelSpec) -> dict[str, CxxType | int | bool]:
    return {
        "T": CxxType(spec.arg("dtype")),
        "StateT": CxxType(spec.arg("state_dtype")),
        "BiasT": CxxType(spec.arg("bias_dtype")),
        "Index": CxxType(spec.arg("index") + "_t"),
        "kKeyDim": spec.arg("key_dim"),
        "kValueDim": spec.arg("value_dim"),
    }


def _lanes_per_row(spec: KernelSpec) -> int:
    """16 bytes each."""
    lanes: int = spec.arg("key_dim") * ITEMSIZE[spec.arg("state_dtype")] // 16
    return lanes


def _config(spec: KernelSpec) -> Config:
    # 16-bit states take as many registers again as fp32: of one token, half as many rows and twice as many warps are
    # 3.89 TB/s of 256x32 states on H200, 3.70 before. At least six blocks an SM of fp32 ones 277 µs, as many as the
    # compiler leaves room for 287. More of several tokens would spill.
    is_fp32, one_token = ITEMSIZE[spec.arg("state_dtype")] == 4, spec.arg("one_token")
    rows_per_lane = min(4 if one_token and not is_fp32 else 8, _lanes_per_row(spec) // 2)
    constants = _constants(spec)
    tile = {"kOneToken": one_token, "kRowsPerLane": rows_per_lane, "kKMajor": False}
    min_blocks = (6 if is_fp32 else 8) if one_token else (4 if is_fp32 else 3)
    return Config({**constants, **tile}, Launch(num_threads=128, min_blocks_per_sm=min_blocks))


def rows_per_block(spec: KernelSpec, num_threads: int, rows_per_lane: int) -> int:
    """Values of a head that a block has; a fraction of all."""
    return num_threads // _lanes_per_row(spec) * rows_per_lane


def _k_major_config(spec: KernelSpec) -> Config:
    # 256x32 states of 16 bits on H200: at least five blocks an SM 142 µs, as many as the compiler leaves room for 171.
    min_blocks = 1 if ITEMSIZE[spec.arg("state_dtype")] == 4 else 5
    return Config({**_constants(spec), "kKMajor": True}, Launch(num_threads=128, min_blocks_per_sm=min_blocks))


def k_major_values_per_block(spec: KernelSpec) -> int:
    return 128 // ITEMSIZE[spec.arg("state_dtype")]


_AXES = {
    "dtype": DTYPES,
    "state_dtype": DTYPES,
    "bias_dtype": DTYPES,
    "index": INDEX_TYPES,
    "key_dim": HEAD_DIMS,
    "value_dim": HEAD_DIMS,
}
GDN_DECODE = Family(
    name="gdn_decode",
    axes={**_AXES, "one_token": (False, True)},
    implementations=twins(GdnDecodeParams, _config, cuda="gdn/decode.cuh", cpu="cpu/gdn/decode.h"),
)
GDN_DECODE_K_MAJOR = Family(
    name="gdn_decode_k_major",
    axes=_AXES,
    implementations=twins(GdnDecodeParams, _k_major_config, cuda="gdn/decode_k_major.cuh", cpu="cpu/gdn/decode.h"),
)
register(GDN_DECODE, GDN_DECODE_K_MAJOR)
