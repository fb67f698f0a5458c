# SPDX-License-Identifier: Apache-2.0
"""Gated activations. The hidden size is a run-time value: nothing is gained by compiling it in."""

from __future__ import annotations

import ctypes

from flashinfer.families.layout import DTYPES, FP8_DTYPES, QUANT_SCALE, nested
from flashinfer.jit.spec import Config, CxxType, Family, KernelSpec, Launch, register, twins

GATES = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # enum Gate in csrc/activation/gate.h
VECS_PER_THREAD = 2


class ActAndMulParams(ctypes.Structure):
    """Mirror of csrc/activation/params.h."""

    _fields_ = [
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("input_row_stride", ctypes.c_int64),
        ("input_group_stride", ctypes.c_int64),
        ("output_row_stride", ctypes.c_int64),
        ("output_group_stride", ctypes.c_int64),
        ("num_groups", ctypes.c_int32),
        ("rows_per_group", ctypes.c_int32),
        ("hidden_size", ctypes.c_int32),
    ]


class ActAndMulQuantParams(ctypes.Structure):
    """Mirror of csrc/activation/params.h."""

    _fields_ = [*nested("output_scale", QUANT_SCALE), *nested("act_and_mul", ActAndMulParams._fields_)]


def _config(spec: KernelSpec) -> Config:
    constants = {
        "T": CxxType(spec.arg("dtype")),
        "OutT": CxxType(spec.arg("out_dtype" if spec.family == "act_and_mul_quant" else "dtype")),
        "kGate": GATES[spec.arg("gate")],
        "kVecSize": spec.arg("vec_size"),
        "kVecsPerThread": VECS_PER_THREAD,
    }
    return Config(constants, Launch(num_threads=256))


ACT_AND_MUL = Family(
    name="act_and_mul",
    axes={"dtype": DTYPES, "gate": tuple(GATES), "vec_size": (1, 2, 4, 8)},
    implementations=twins(
        ActAndMulParams, _config, cuda="activation/act_and_mul.cuh", cpu="cpu/activation/act_and_mul.h"
    ),
)
ACT_AND_MUL_QUANT = Family(
    name="act_and_mul_quant",
    axes={"dtype": DTYPES, "out_dtype": FP8_DTYPES, "gate": tuple(GATES), "vec_size": (1, 2, 4, 8)},
    implementations=twins(
        ActAndMulQuantParams, _config, cuda="activation/act_and_mul_quant.cuh", cpu="cpu/activation/act_and_mul_quant.h"
    ),
)
register(ACT_AND_MUL, ACT_AND_MUL_QUANT)
