"""No attention kernel of the core set spills registers, nor one of the other head dimensions that models have."""

from __future__ import annotations

import pytest

from flashinfer.aot import config
from flashinfer.errors import ToolchainMissing
from flashinfer.families.attention import decode, prefill
from flashinfer.jit import source, toolchain
from flashinfer.jit.spec import KernelSpec

TARGETS = ["sm_80", "sm_90a"]
BF16 = {"q_dtype": "bf16", "kv_dtype": "bf16"}
OTHER_HEAD_DIMS = [
    {"head_dim": 256},
    {"head_dim": 192, "head_dim_vo": 128, "kv_storage": "ragged"},
    {"head_dim": 32, "kv_storage": "ragged", "mask": "none"},
]


def attention_specs() -> list[KernelSpec]:
    """Of bf16 queries; fp16 takes the same registers."""
    core = config.read_specs(["core"], TARGETS)
    specs = [spec for spec in core if spec.family in ("decode", "prefill") and spec.arg("q_dtype") == "bf16"]
    for target in TARGETS:
        specs += [prefill.prefill(target, **BF16, **axes) for axes in OTHER_HEAD_DIMS]
        specs.append(decode.decode(target, **BF16, head_dim=256, group_size=4))
    return specs


@pytest.mark.parametrize("spec", attention_specs(), ids=lambda spec: f"{spec.name}-{spec.target}")
def test_no_register_spills(spec: KernelSpec) -> None:
    try:
        compiled = toolchain.Nvrtc().compile(source.render(spec))
    except ToolchainMissing as missing:
        pytest.skip(str(missing))
    assert " 0 bytes spill stores, 0 bytes spill loads" in compiled.log, compiled.log
