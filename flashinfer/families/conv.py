# SPDX-License-Identifier: Apache-2.0
"""Causal convolutions of channels, over sequences and over the next tokens of requests."""

from __future__ import annotations

import ctypes

from flashinfer.families import layout
from flashinfer.families.layout import DTYPES, I32, I64, Fields, P, nested
from flashinfer.families.page import INDEX_TYPES
from flashinfer.jit.spec import Config, CxxType, Family, KernelSpec, Launch, register, twins

CONV_STATES: Fields = [
    *[(name, I64) for name in ("slot_stride", "channel_stride", "time_stride")],
    *[(name, I32) for name in ("num_slots", "length", "pad_slot", "reserved")],
]


class CausalConv1dParams(ctypes.Structure):
    """Mirror of csrc/conv/params.h."""

    _fields_ = [
        *[(name, P) for name in ("x", "weight", "bias", "states", "offsets", "slots", "has_initial_state", "output")],
        *nested("layout", CONV_STATES),
        ("x_stride", I64),
        ("output_stride", I64),
        ("num_tokens", I32),
        ("num_sequences", I32),
        ("num_channels", I32),
    ]


class CausalConv1dUpdateParams(ctypes.Structure):
    """Mirror of csrc/conv/params.h."""

    _fields_ = [
        *[(name, P) for name in ("x", "weight", "bias", "states", "offsets", "slots", "num_accepted", "output")],
        *nested("layout", CONV_STATES),
        *[(name, I64) for name in ("x_request_stride", "x_stride", "output_request_stride", "output_stride")],
        ("batch_size", I32),
        ("num_tokens", I32),
        ("num_channels", I32),
    ]


# Over sequences a thread has so many tokens, and the loads of so many in flight while it computes as many before. With
# more registers than six blocks leave it the compiler does but compute several tokens at once.
TOKENS, AHEAD, BLOCKS_PER_SM = 16, 4, 6


def vec_size(dtype: str, num_channels: int, alignment: int = 0) -> int:
    """Of 8 bytes at most: a thread of 16 has twice the registers, of which few are loads in flight."""
    return layout.vec_size(dtype, num_channels, alignment | 8)


def _config(spec: KernelSpec) -> Config:
    constants = {
        "T": CxxType(spec.arg("dtype")),
        "Index": CxxType(spec.arg("index") + "_t"),
        "kWidth": spec.arg("width"),
        "kVecSize": spec.arg("vec_size"),
        "kSilu": spec.arg("silu"),
        "kChannelsLast": spec.arg("channels_last"),
        "kTokens": TOKENS,
        "kAhead": AHEAD,
    }
    return Config(constants, Launch(128, BLOCKS_PER_SM))


_AXES = {
    "dtype": DTYPES,
    "index": INDEX_TYPES,
    "width": (2, 3, 4),
    "vec_size": (1, 2, 4),
    "silu": (False, True),
    "channels_last": (False, True),
}
CAUSAL_CONV1D = Family(
    name="causal_conv1d",
    axes=_AXES,
    implementations=twins(CausalConv1dParams, _config, cuda="conv/causal_conv1d.cuh", cpu="cpu/conv/causal_conv1d.h"),
)
CAUSAL_CONV1D_UPDATE = Family(
    name="causal_conv1d_update",
    axes=_AXES,
    implementations=twins(
        CausalConv1dUpdateParams, _config, cuda="conv/causal_conv1d_update.cuh", cpu="cpu/conv/causal_conv1d_update.h"
    ),
)
register(CAUSAL_CONV1D, CAUSAL_CONV1D_UPDATE)
