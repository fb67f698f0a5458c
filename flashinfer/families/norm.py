# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm: one row per block, or several short rows."""

from __future__ import annotations

import ctypes

from flashinfer.families.layout import DTYPES, FAST_DIVISOR, FP8_DTYPES, QUANT_SCALE, nested
from flashinfer.jit.spec import Config, CxxType, Family, KernelSpec, Launch, register, twins

VEC_SIZES = (1, 2, 4, 8)
# A row lives in registers: 1024 threads × 32 elements.
HIDDEN_SIZES = range(1, 32769)


class NormParams(ctypes.Structure):
    """Mirror of csrc/norm/params.h."""

    _fields_ = [
        ("input", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("input_row_stride", ctypes.c_int64),
        ("input_group_stride", ctypes.c_int64),
        ("residual_row_stride", ctypes.c_int64),
        ("residual_group_stride", ctypes.c_int64),
        ("output_row_stride", ctypes.c_int64),
        ("output_group_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int32),
        *nested("rows_per_group", FAST_DIVISOR),
        ("eps", ctypes.c_float),
    ]


class NormQuantParams(ctypes.Structure):
    """Mirror of csrc/norm/params.h."""

    _fields_ = [*nested("output_scale", QUANT_SCALE), *nested("norm", NormParams._fields_)]


def _tile(spec: KernelSpec, vecs_per_thread: int = 4) -> tuple[dict[str, int], Launch]:
    num_vecs = spec.arg("hidden_size") // spec.arg("vec_size")
    # Four vectors a thread: 8192×8192 bf16 on H100 took 93 µs; two 102, one 115, eight 93. Asking for more
    # blocks an SM through the launch bounds makes them spill.
    threads_per_row = 1
    while threads_per_row < 1024 and threads_per_row * vecs_per_thread < num_vecs:
        threads_per_row *= 2
    num_threads = max(128, threads_per_row) if threads_per_row <= 32 else threads_per_row
    launch = Launch(num_threads=num_threads, units_per_block=num_threads // threads_per_row)
    return {"kThreadsPerRow": threads_per_row}, launch


def _rmsnorm_config(spec: KernelSpec) -> Config:
    tile, launch = _tile(spec)
    is_quant = spec.family == "rmsnorm_quant"
    constants = {
        "T": CxxType(spec.arg("dtype")),
        "OutT": CxxType(spec.arg("out_dtype" if is_quant else "dtype")),
        "kHiddenSize": spec.arg("hidden_size"),
        "kVecSize": spec.arg("vec_size"),
        "kAddResidual": spec.arg("add_residual"),
        "kGemma": not is_quant and spec.arg("gemma"),
    }
    return Config({**constants, **tile}, launch)


def _gated_config(spec: KernelSpec) -> Config:
    # Two vectors of each operand: 8192×32×128 bf16 on H200 took 53 µs; four 65, one 56.
    tile, launch = _tile(spec, vecs_per_thread=2)
    constants = {
        "T": CxxType(spec.arg("dtype")),
        "OutT": CxxType(spec.arg("out_dtype" if spec.family == "gated_rmsnorm_quant" else "dtype")),
        "kHiddenSize": spec.arg("hidden_size"),
        "kVecSize": spec.arg("vec_size"),
    }
    return Config({**constants, **tile}, launch)


def _layernorm_config(spec: KernelSpec) -> Config:
    tile, launch = _tile(spec)
    constants = {
        "T": CxxType(spec.arg("dtype")),
        "TWeight": CxxType(spec.arg("weight_dtype")),
        "kHiddenSize": spec.arg("hidden_size"),
        "kVecSize": spec.arg("vec_size"),
    }
    return Config({**constants, **tile}, launch)


RMSNORM = Family(
    name="rmsnorm",
    axes={
        "dtype": DTYPES,
        "hidden_size": HIDDEN_SIZES,
        "vec_size": VEC_SIZES,
        "add_residual": (False, True),
        "gemma": (False, True),
    },
    implementations=twins(NormParams, _rmsnorm_config, cuda="norm/rmsnorm.cuh", cpu="cpu/norm/rmsnorm.h"),
)
RMSNORM_QUANT = Family(
    name="rmsnorm_quant",
    axes={
        "dtype": DTYPES,
        "out_dtype": FP8_DTYPES,
        "hidden_size": HIDDEN_SIZES,
        "vec_size": VEC_SIZES,
        "add_residual": (False, True),
    },
    implementations=twins(
        NormQuantParams, _rmsnorm_config, cuda="norm/rmsnorm_quant.cuh", cpu="cpu/norm/rmsnorm_quant.h"
    ),
)
LAYERNORM = Family(
    name="layernorm",
    axes={"dtype": DTYPES, "weight_dtype": DTYPES, "hidden_size": HIDDEN_SIZES, "vec_size": VEC_SIZES},
    implementations=twins(NormParams, _layernorm_config, cuda="norm/layernorm.cuh", cpu="cpu/norm/layernorm.h"),
)
GATED_RMSNORM = Family(
    name="gated_rmsnorm",
    axes={"dtype": DTYPES, "hidden_size": HIDDEN_SIZES, "vec_size": VEC_SIZES},
    implementations=twins(NormParams, _gated_config, cuda="norm/gated_rmsnorm.cuh", cpu="cpu/norm/gated_rmsnorm.h"),
)
GATED_RMSNORM_QUANT = Family(
    name="gated_rmsnorm_quant",
    axes={"dtype": DTYPES, "out_dtype": FP8_DTYPES, "hidden_size": HIDDEN_SIZES, "vec_size": VEC_SIZES},
    implementations=twins(
        NormQuantParams, _gated_config, cuda="norm/gated_rmsnorm_quant.cuh", cpu="cpu/norm/gated_rmsnorm_quant.h"
    ),
)
register(RMSNORM, RMSNORM_QUANT, LAYERNORM, GATED_RMSNORM, GATED_RMSNORM_QUANT)
