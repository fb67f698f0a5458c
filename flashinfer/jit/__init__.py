"""How a kernel comes to exist. Knows no operator by name.

spec.py       what can be asked for            source.py     spec -> translation unit -> digest
toolchain.py  translation unit -> machine code stores.py     where machine code is found again
resolver.py   the order of the stores          misses.py     what AOT could not answer
driver.py     the CUDA driver calls we make    loader.py     machine code -> something to launch
cache_dir.py  where all of it is kept          trust.py       who signed a registry
"""

from __future__ import annotations

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


def __getattr__(name: str) -> bool:
    # Upstream's flag, read by serving engines: true when precompiled kernels are installed.
    if name == "has_prebuilt_ops":
        return bool(default_resolver().aot.registries)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
