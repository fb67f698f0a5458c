# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels have in common: parameters, legal dtypes, head dimensions and options."""

from __future__ import annotations

import ctypes

from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention.variants.tree import EXTRAS_BYTES
from flashinfer.families.layout import DTYPES, F32, FAST_DIVISOR, FP8_DTYPES, I32, I64, Fields, P, nested

Q_DTYPES = (*DTYPES, "fp8_e4m3")
KV_DTYPES = (*DTYPES, *FP8_DTYPES)
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
# The enumerations of attention/kv_view.cuh, visibility.cuh and score.cuh.
KV_STORAGE = {"single": 0, "ragged": 1, "paged": 2, "paged_lens": 3}
MASKS = {"none": 0, "causal": 1, "custom": 2, "draft": 3, "items": 4}
MASKS_OF_BITS = ("custom", "draft", "items")
# Classes of batches by the queries of a request, each of which a tile serves best.
QUERIES = ("medium", "short", "long")
POS_ENCODINGS = {"none": 0, "rope": 1, "alibi": 2}


DEVICE_SCALES = ("device_q_scale", "device_k_scale", "device_v_scale")
EXTRAS = ("extras", ctypes.c_uint8 * EXTRAS_BYTES)  # of functions of scores and masks


# Mirrors of the structs in csrc/attention/params.h, nested ones laid out flat.
KV_INDEX: Fields = [
    *[(name, P) for name in ("indptr", "last_page_len", "indices")],
    ("len", I32),
    *nested("page_size", FAST_DIVISOR),
]
KV: Fields = [
    *[(name, P) for name in ("k", "v")],
    *nested("index", KV_INDEX),
    *[(f"{half}_{axis}_stride", I64) for half in "kv" for axis in ("page", "entry", "head")],
]
ATTENTION: Fields = [
    *[(name, P) for name in ("sinks", "q", "out", "lse")],
    *nested("kv", KV),
    *[(name, P) for name in ("alibi_slopes", "rope_frequencies", *DEVICE_SCALES)],
    *[(f"{name}_stride", I64) for name in ("q_token", "q_head", "out_token", "out_head")],
    EXTRAS,
    *[(name, I32) for name in ("batch_size", "num_qo_heads", "num_kv_heads", "window_left")],
    *[(name, F32) for name in ("sm_scale", "v_scale", "logits_soft_cap")],
]
# What changes from call to call.
ADDRESSES = (
    *("sinks", "q", "out", "lse", "kv.k", "kv.v"),
    *(f"kv.index.{name}" for name in ("indptr", "last_page_len", "indices")),
)


def require_dtypes(op: str, q_dtype: str, kv_dtype: str, is_cuda: bool) -> None:
    """What holds of every kernel. Raises UnsupportedConfig."""
    if is_cuda and "fp32" in (q_dtype, kv_dtype):
        raise UnsupportedConfig(f"{op}: fp32 is supported on the CPU alone; use float16 or bfloat16 on CUDA")
    if q_dtype in FP8_DTYPES and q_dtype != kv_dtype:
        raise UnsupportedConfig(
            f"{op}: q is {q_dtype} and KV {kv_dtype}; expected fp8 queries over KV of their dtype. Next step: leave q "
            "in 16 bits"
        )
