# SPDX-License-Identifier: Apache-2.0
"""How a kernel comes to exist. Knows no operator by name.

spec.py       what can be asked for            source.py     spec -> translation unit -> digest
toolchain.py  translation unit -> machine code stores.py     where machine code is found again
resolver.py   the order of the stores          misses.py     what AOT could not answer
driver.py     the CUDA driver calls we make    loader.py     machine code -> something to launch
cache_dir.py  where all of it is kept          trust.py       who signed a registry
"""

from __future__ import annotations

import importlib
from typing import Any

from flashinfer import packages
from flashinfer.jit.resolver import default_resolver
from flashinfer.jit.spec import ArgValue, Config, CxxType, Family, Implementation, KernelSpec, Launch, register, twins

__all__ = [
    "ArgValue",
    "Config",
    "CxxType",
    "Family",
    "Implementation",
    "KernelSpec",
    "Launch",
    "register",
    "default_resolver",
    "twins",
    "has_prebuilt_ops",
]


# What TVM's compiler imports from here: flashinfer_tvm, of the extra `tvm`, answers.
_OF_TVM = ("gen_customize_batch_prefill_module", "gen_customize_batch_decode_module", "gen_batch_mla_module")


def __getattr__(name: str) -> Any:
    # Upstream's flag, read by serving engines: true when precompiled kernels are installed.
    if name == "has_prebuilt_ops":
        return bool(default_resolver().aot.registries)
    if name in _OF_TVM:
        try:
            return getattr(importlib.import_module("flashinfer_tvm.modules"), name)
        except ModuleNotFoundError as error:
            raise AttributeError(
                f"flashinfer.jit.{name} is for TVM, and there is no {error.name}; next step: "
                f"{packages.pip_install(packages.TVM.values())}, as the extra flashinfer[tvm] does"
            ) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
