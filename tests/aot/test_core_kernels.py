# SPDX-License-Identifier: Apache-2.0
"""No attention kernel of the core set spills registers, nor one of the other head dimensions that models have.

Of kernels of one tile, which differ in the target, the options and where K and V lie, one is compiled in every run; the
others carry the marker `slow`. It is the one with every option where test_prefill_sm90.py has it, which keeps most in
registers, else mostly the causal one over pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashinfer.aot import config
from flashinfer.errors import ToolchainMissing
from flashinfer.families.attention import prefill
from flashinfer.jit import spec as specs
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import AotStore
from flashinfer.jit.toolchain import Nvrtc
from tests.attention import test_prefill_sm90

TARGETS = ["sm_80", "sm_90a"]
BF16 = {"q_dtype": "bf16", "kv_dtype": "bf16"}
OTHER_HEAD_DIMS = [{"head_dim": 32, "kv_storage": "ragged", "mask": "none"}]
OPTIONS = {"kMask", "kKvStorage", "kPosEncoding", *(f"kHas{name}" for name in ("Window", "SoftCap", "Sinks"))}
OPTIONS |= {"kHasDeviceScales", "Function"}


def attention_specs() -> list[KernelSpec]:
    """Of bf16 queries; fp16 takes the same registers."""
    core = config.read_specs(["core"], TARGETS)
    specs = [spec for spec in core if spec.family in ("decode", "prefill", "mla") and spec.arg("q_dtype") == "bf16"]
    for target in TARGETS:
        specs += [prefill.prefill(target, **BF16, **axes) for axes in OTHER_HEAD_DIMS]
    return list(dict.fromkeys(specs))


def cases() -> list[Any]:
    found, seen = [], {tile_of(spec) for spec in test_prefill_sm90.stand_ins()}
    for spec in attention_specs():
        marks = [pytest.mark.slow] if tile_of(spec) in seen else []
        found.append(pytest.param(spec, id=f"{spec.name}-{spec.target}", marks=marks))
        seen.add(tile_of(spec))
    return found


def tile_of(spec: KernelSpec) -> tuple[Any, ...]:
    """The header and its constants but for the options."""
    implementation = specs.family(spec.family).implementation(spec)
    constants = implementation.config(spec).constants
    return implementation.header, *(item for item in constants.items() if item[0] not in OPTIONS)


@pytest.fixture(scope="module")
def resolver(_session_cache: Path) -> Resolver:
    """Keeps the compiler's log beside each kernel: where the cache is kept between runs, what did not change is not
    compiled again."""
    return Resolver(AotStore([]), _session_cache, lambda kind: Nvrtc())


@pytest.mark.parametrize("spec", cases())
def test_no_register_spills(spec: KernelSpec, resolver: Resolver) -> None:
    try:
        kernel = resolver.ensure(spec)
    except ToolchainMissing as missing:
        pytest.skip(str(missing))
    assert kernel.path is not None, "the cache cannot be written"
    log = (kernel.path.parent / "log.txt").read_text()
    assert " 0 bytes spill stores, 0 bytes spill loads" in log, log
    if spec.family == "prefill":
        assert "C75" not in log, log  # ptxas serializes wgmma, or ignores setmaxnreg
