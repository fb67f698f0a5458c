# SPDX-License-Identifier: Apache-2.0
"""Small helpers and enumerations that serving engines import from `flashinfer.utils`."""

from __future__ import annotations

from enum import Enum
from typing import Optional, Union

import torch

from flashinfer import absent, dtypes
from flashinfer.host import checks, indices


class PosEncodingMode(Enum):
    NONE = 0
    ROPE_LLAMA = 1
    ALIBI = 2


class MaskMode(Enum):
    NON_CAUSAL = 0
    CAUSAL = 1
    CUSTOM = 2


class TensorLayout(Enum):
    NHD = 0
    HND = 1


def is_float8(x: torch.Tensor) -> bool:
    if not isinstance(x, torch.Tensor):
        checks.require_addresses("is_float8", x=x)
    return x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def get_indptr(x: torch.Tensor) -> torch.Tensor:
    """Lengths `[n]` to offsets `[n + 1]`, int32: `[3, 5]` gives `[0, 3, 8]`.

    Raises ValueError or TypeError if x is something else, and, where its values are on the CPU, IndexError for a
    negative length and ValueError for a sum that int32 does not hold.
    """
    op = "get_indptr"
    if not isinstance(x, torch.Tensor):
        checks.require_addresses(op, x=x)
    is_integral = not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool
    checks.require(
        x.dim() == 1 and is_integral, op, f"x is {x.dtype} of shape {list(x.shape)}; expected lengths, integers [n]"
    )
    if not x.is_meta and indices.are_visible(x):
        indices.require_within(op, "x", x, 0, 1 << 31, "lengths")
        total, most = int(x.sum(dtype=torch.int64)), (1 << 31) - 1
        checks.require(total <= most, op, f"x sums to {total}; expected at most {most}")
    return torch.nn.functional.pad(x.cumsum(dim=0, dtype=torch.int32), (1, 0))


def get_alibi_slopes(n_heads: int, device: Optional[torch.device] = None) -> torch.Tensor:
    """The slopes of ALiBi (Press et al. 2021, arXiv:2108.12409), fp32 `[n_heads]`, on the CPU unless told otherwise.

    2^(-8 i / n) for a power of two n; other counts take the power of two below, then every other one of the next.
    Raises ValueError or TypeError unless n_heads is from 1 to 65536.
    """
    n_heads = checks.integer("get_alibi_slopes", "n_heads", n_heads, 1, 1 << 16)
    power = 1 << (n_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu" if device is None else device)


def canonicalize_torch_dtype(dtype: Union[torch.dtype, str]) -> torch.dtype:
    """A `torch.dtype` from itself or from its name."""
    return dtypes.torch_dtype(dtype)


def get_compute_capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a CUDA device. Raises ValueError for another kind of device."""
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"get_compute_capability: device is {device}; expected a CUDA device")
    return torch.cuda.get_device_capability(device.index)


def get_device_sm_count(device: torch.device) -> int:
    """The number of multiprocessors of a CUDA device. Raises ValueError for another kind of device."""
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"get_device_sm_count: device is {device}; expected a CUDA device")
    return torch.cuda.get_device_properties(device).multi_processor_count


def get_trtllm_gen_multi_ctas_kv_counter_bytes(batch_size: int, num_qo_heads: int, sm_count: int) -> int:
    """Bytes of the buffer that attention over block tables counts in: 0, as the counters are in its workspace. Engines
    allocate it when they start. Raises ValueError or TypeError for sizes below 0, or that are none."""
    for name, size in {"batch_size": batch_size, "num_qo_heads": num_qo_heads, "sm_count": sm_count}.items():
        checks.integer("get_trtllm_gen_multi_ctas_kv_counter_bytes", name, size, 0)
    return 0


def is_sm90a_supported(device: torch.device) -> bool:
    """Whether the device runs kernels built for sm_90a (Hopper)."""
    return torch.device(device).type == "cuda" and get_compute_capability(device)[0] == 9


def is_fa3_backend_supported(
    pos_encoding_mode: int,
    use_fp16_qk_reductions: bool,
    use_custom_mask: bool,
    dtype_q: torch.dtype,
    dtype_kv: torch.dtype,
) -> bool:
    """Whether upstream's Hopper kernels cover these options: no position encoding, custom mask or fp8. Here the kernels
    for sm_80 and up take all of them, on Hopper too."""
    plain = not use_custom_mask and not use_fp16_qk_reductions and pos_encoding_mode == PosEncodingMode.NONE.value
    return plain and dtype_q == dtype_kv and dtype_q in (torch.float16, torch.bfloat16)


def determine_attention_backend(
    device: torch.device,
    pos_encoding_mode: int,
    use_fp16_qk_reductions: bool,
    use_custom_mask: bool,
    dtype_q: torch.dtype,
    dtype_kv: torch.dtype,
    *,
    head_dim_qk: Optional[int] = None,
    head_dim_vo: Optional[int] = None,
) -> str:
    """`"fa2"` on every device, which wrappers of backend "auto" call themselves too. Engines read it as a way of
    calling, and there is one; which kernel answers, on Hopper one of its own, the shapes decide (`flashinfer resolve`).
    """
    return "fa2"


def determine_gemm_backend(device: torch.device) -> str:
    return "sm90" if is_sm90a_supported(device) else "sm80"


def determine_mla_backend(device: torch.device) -> str:
    """As `determine_attention_backend`."""
    return "fa2"


__getattr__ = absent.names_of(__name__)
