# SPDX-License-Identifier: Apache-2.0
"""Kernels of upstream that are not here, though engines import their names: one row a name.

An engine that imports a name as it starts, whether or not it will call it, has to find it; the call says which option
of the engine leaves it out. A name that an engine looks for to choose a kernel is no row, unless one that it looks for
beside it stays absent: what is found is taken. `tests/compat/test_engine_imports.py` holds both, by what
`scripts/engine_imports.py` reads from the engines' wheels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from flashinfer.errors import UnsupportedConfig

_FP4_CACHE = "a KV cache in fp4", "vLLM: --kv-cache-dtype auto or fp8"
_FP4_OUTPUT = "attention with its output in fp4", "vLLM: --compilation-config.pass_config.fuse_attn_quant=false"
_MXFP8_GEMM = "matrix products in mxfp8", "SGLang: --fp8-gemm-backend triton or deep_gemm"
_MOE = "mixture-of-experts kernels", "SGLang: --moe-runner-backend triton or marlin"
_VISION = "attention of vision encoders by cuDNN", "SGLang: --mm-attention-backend fa3 or triton_attn"
_MNNVL = "communication over multi-node NVLink", "vLLM: another --all2all-backend; SGLang: another --moe-a2a-backend"

# name -> what it is, and the option that avoids it
ROWS: dict[str, tuple[str, str]] = {
    "flashinfer.SfLayout": _MXFP8_GEMM,
    "flashinfer.comm.mnnvl.CommBackend": _MNNVL,
    "flashinfer.fp4_quantization.block_scale_interleave": _MOE,
    "flashinfer.fused_moe.convert_to_block_layout": _MOE,
    "flashinfer.fused_moe.core._maybe_get_cached_w3_w1_permute_indices": _MOE,
    "flashinfer.fused_moe.core.get_w2_permute_indices_with_cache": _MOE,
    "flashinfer.fused_moe.trtllm_fp4_block_scale_moe": _MOE,
    "flashinfer.fused_moe.trtllm_fp4_block_scale_routed_moe": _MOE,
    "flashinfer.fused_moe.trtllm_mxint4_block_scale_moe": _MOE,
    "flashinfer.mm_mxfp8": _MXFP8_GEMM,
    "flashinfer.mxfp8_quantize": _MXFP8_GEMM,
    "flashinfer.nvfp4_block_scale_interleave": _MOE,
    "flashinfer.nvfp4_quantize_append_paged_kv_cache_with_slot_mapping": _FP4_CACHE,
    "flashinfer.prefill.cudnn_batch_prefill_with_kv_cache": _VISION,
    "flashinfer.shuffle_matrix_a": _MOE,
    "flashinfer.shuffle_matrix_sf_a": _MOE,
    "flashinfer.trtllm_fp4_block_scale_moe": _MOE,
    "flashinfer.utils.FP4Tensor": _FP4_OUTPUT,
}


@functools.cache
def kernel(name: str) -> type:
    """What stands at that name: a class, as engines subclass it or ask isinstance. Making one or calling it raises
    UnsupportedConfig. Raises KeyError for a name that has no row."""
    what, instead = ROWS[name]
    message = f"{name}: there is no such kernel here ({what}). To do without, {instead}"

    def refuse(cls: type, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedConfig(message)

    module, _, attribute = name.rpartition(".")
    return type(attribute, (), {"__new__": refuse, "__doc__": message, "__module__": module})


def names_of(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that has rows."""

    def look_up(attribute: str) -> Any:
        name = f"{module}.{attribute}"
        if name in ROWS:
            return kernel(name)
        raise AttributeError(f"module {module!r} has no attribute {attribute!r}")

    return look_up
