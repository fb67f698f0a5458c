# SPDX-License-Identifier: Apache-2.0
"""docs/add_an_architecture.md is followed to the letter, on top of the kernel of docs/add_a_kernel.md."""

from __future__ import annotations

import re
from pathlib import Path

from flashinfer.families import arch
from flashinfer.families.attention import decode, prefill
from tests.compat import pages

FOLLOW = """
import sys
from pathlib import Path

import flashinfer.families
from flashinfer.jit import source, toolchain

added = Path(sys.argv[1])
flashinfer.families.__path__.append(str(added / "flashinfer" / "families"))
source.include_root = toolchain.include_root = lambda: added / "csrc"

from flashinfer.aot.config import read_specs
from flashinfer.cli import main
from flashinfer.families import toy, toy_sm90
from flashinfer.jit import loader, spec as specs

scope = {}
exec((added / "host.py").read_text(), scope)
headers = {"sm_90a": "toy/sm90/scale.cuh", "sm_80": "toy/scale.cuh", "x86-64-v3": "cpu/toy/scale.h"}
for target, header in headers.items():
    for dtype in ("bf16", "fp32"):
        rendered = source.render(specs.family("scale").spec(target, dtype=dtype))
        expected = "toy/scale.cuh" if (target, dtype) == ("sm_90a", "fp32") else header
        assert rendered.implementation.header == expected, (target, dtype, rendered.implementation.header)
        launcher = loader.CpuLauncher("", rendered.config, rendered.implementation.params, lambda packed: True)
        launcher((1, 1, 1), 0, scope["values"](launcher, 0, 0, 2.0))  # every field by its name
        if target.startswith("sm_"):
            assert toolchain.Nvrtc().compile(rendered).machine_code.startswith(b"\\x7fELF")
main(["resolve", "--config", str(added / "mine.toml"), "--target", "sm_90a,sm_80"])
"""


def test_the_page_works(tmp_path: Path) -> None:
    own = pages.files("add_an_architecture.md")
    assert list(own) == ["csrc/toy/sm90/scale.cuh", "csrc/toy/sm90/params.h", "flashinfer/families/toy_sm90.py"]
    (host,) = pages.sections("add_an_architecture.md")["The host"]
    toml = pages.sections("add_a_kernel.md")["7. Precompile it"][0]
    added = {**pages.files("add_a_kernel.md"), **own, "host.py": host, "mine.toml": toml}
    printed = pages.follow(tmp_path, added, FOLLOW)
    for target, header in (("sm_90a", "toy/sm90/scale.cuh"), ("sm_80", "toy/scale.cuh")):
        assert re.search(rf"{target} +{header}", printed), printed


def test_a_row_is_enough_for_a_gpu_that_the_kernels_serve(monkeypatch) -> None:
    (row,) = pages.sections("add_an_architecture.md")["A new GPU, the kernels we have"]
    scope = {"Arch": arch.Arch}
    exec(row, scope)

    def tiles() -> list[int]:
        specs = [
            decode.decode("sm_130a", q_dtype="bf16", kv_dtype="bf16", head_dim=dim, group_size=4) for dim in (64, 256)
        ]
        specs += [prefill.prefill("sm_130a", q_dtype="bf16", kv_dtype="bf16", head_dim=dim) for dim in (64, 256)]
        families = {"decode": decode.DECODE, "prefill": prefill.PREFILL}
        return [families[spec.family].config(spec).launch.smem_bytes for spec in specs]

    before = tiles()  # of the newest architecture with a row
    monkeypatch.setattr(arch, "_ARCHS", {**arch._ARCHS, **scope["ROW"]})
    after = tiles()
    assert all(smem > 0 for smem in before + after) and max(after) > max(before)
