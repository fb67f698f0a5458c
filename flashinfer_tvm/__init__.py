# SPDX-License-Identifier: Apache-2.0
"""The functions of TVM's paged KV cache, and of MLC's sampler, on the kernels of flashinfer (docs/tvm.md).

    import flashinfer_tvm

    flashinfer_tvm.register()  # batch_prefill_plan, batch_decode_run, … are global functions of tvm_ffi from here on

Names and arguments are those that TVM 0.27 calls; tensors come by DLPack, on CUDA devices and on the CPU. A call runs
on the stream that the FFI has for the device, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi

from flashinfer.errors import CompileError, KernelMissing, ToolchainMissing, UnsupportedConfig
from flashinfer_tvm.latent import batch_mla_plan, batch_mla_run
from flashinfer_tvm.paged import (
    batch_decode_plan,
    batch_decode_run,
    batch_prefill_paged_run,
    batch_prefill_plan,
    batch_prefill_ragged_run,
)
from flashinfer_tvm.sampling import parallel_sampling_from_prob

__all__ = ["FUNCTIONS", "register"]

# name in the FFI -> what it calls
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "batch_prefill_plan": batch_prefill_plan,
    "batch_prefill_paged_run": batch_prefill_paged_run,
    "batch_prefill_ragged_run": batch_prefill_ragged_run,
    "batch_decode_plan": batch_decode_plan,
    "batch_decode_run": batch_decode_run,
    "batch_mla_plan": batch_mla_plan,
    "batch_mla_run": batch_mla_run,
    "flashinfer.sampling.parallel_sampling_from_prob": parallel_sampling_from_prob,
}
# Errors that arrive as what they are where Python calls; by their names, as all do, elsewhere.
_ERRORS = (UnsupportedConfig, KernelMissing, ToolchainMissing, CompileError)
_registered: dict[str, Any] = {}


def register(override: bool = False) -> None:
    """Make every function of `FUNCTIONS` a global function of tvm_ffi: once in a process, before it loads a model.

    Args:
        override: take the place of functions that somebody else registered under these names.

    Raises:
        ValueError: somebody else did, and override is False. Nothing is registered then.
    """
    names = [name for name in FUNCTIONS if name not in _registered]
    taken = [name for name in names if tvm_ffi.get_global_func(name, allow_missing=True) is not None]
    if taken and not override:
        raise ValueError(
            f"flashinfer_tvm.register: {', '.join(taken)} of another library are registered; expected none. Next step: "
            "register(override=True) takes their place"
        )
    for error in _ERRORS:
        tvm_ffi.register_error(error)
    for name in names:
        _registered[name] = tvm_ffi.register_global_func(name, FUNCTIONS[name], override=override)
