"""What the attention kernels have in common: the parameter struct, legal dtypes, head dimensions and options."""

from __future__ import annotations

import ctypes

from flashinfer.families.layout import F32, I32, I64, U32, P

Q_DTYPES = ("fp16", "bf16", "fp32")
KV_DTYPES = ("fp16", "bf16", "fp32", "fp8_e4m3", "fp8_e5m2")
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
# The enumerations of attention/variant.cuh and attention/kv_view.cuh.
KV_STORAGE = {"single": 0, "ragged": 1, "paged": 2}
MASKS = {"none": 0, "causal": 1, "custom": 2}
POS_ENCODINGS = {"none": 0, "rope": 1, "alibi": 2}


class AttentionParams(ctypes.Structure):
    """Mirror of csrc/attention/params.h, nested structs laid out flat. What changes from call to call comes first."""

    _fields_ = [
        *[(name, P) for name in ("q", "out", "lse", "kv.k", "kv.v")],
        *[(name, P) for name in ("kv.indptr", "kv.indices", "kv.last_page_len")],
        *[(f"kv.{half}_{axis}_stride", I64) for half in "kv" for axis in ("page", "entry", "head")],
        *[(f"kv.page_size.{name}", U32) for name in ("divisor", "magic", "shift")],
        ("kv.len", I32),
        *[(name, P) for name in ("qo_indptr", "mask", "mask_indptr", "alibi_slopes")],
        *[(name, P) for name in ("chunks", "requests", "empty", "counters", "partial_out", "partial_lse")],
        *[(f"{name}_stride", I64) for name in ("q_token", "q_head", "out_token", "out_head")],
        *[
            (name, I32)
            for name in ("batch_size", "num_qo_heads", "num_kv_heads", "qo_len", "num_chunks", "window_left")
        ],
        *[(name, F32) for name in ("sm_scale", "v_scale", "logits_soft_cap", "rope_rcp_scale", "rope_log2_theta")],
        ("plan_is_settled", I32),
    ]


def fast_divisor(divisor: int) -> tuple[int, int, int]:
    """(divisor, magic, shift) of FastDivisor in csrc/attention/params.h."""
    shift = (divisor - 1).bit_length()
    return divisor, ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1, shift
