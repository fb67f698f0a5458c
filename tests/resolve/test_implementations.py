# SPDX-License-Identifier: Apache-2.0
"""A family may have several implementations: the most specific that serves a request computes it, on the targets whose
machine code runs it, and the launcher tells the host whose parameters it takes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashinfer.cli import main
from flashinfer.errors import UnsupportedConfig
from flashinfer.jit import source, toolchain
from flashinfer.jit import spec as specs
from flashinfer.jit.spec import Config, CxxType, Family, Implementation, KernelSpec, Launch, twins


class FillParams(ctypes.Structure):
    _fields_ = [("output", ctypes.c_void_p), ("num_elements", ctypes.c_int64)]


class WideFillParams(ctypes.Structure):
    _fields_ = [("output", ctypes.c_void_p), ("num_elements", ctypes.c_int64), ("num_tiles", ctypes.c_int64)]


def _config(spec: KernelSpec) -> Config:
    return Config({"T": CxxType(spec.arg("dtype"))}, Launch(num_threads=128))


def _wide_config(spec: KernelSpec) -> Config:
    return Config({"T": CxxType(spec.arg("dtype"))}, Launch(num_threads=384))


FILL = Family(
    name="fill",
    axes={"dtype": ("fp16", "fp32")},
    implementations=(
        Implementation(
            "sm_90a", "fill/sm90.cuh", WideFillParams, _wide_config, serves=lambda spec: spec.arg("dtype") == "fp16"
        ),
        *twins(FillParams, _config, cuda="fill/fill.cuh", cpu="cpu/fill/fill.h"),
    ),
)

_HEADER = """#pragma once
#include "{types}"
namespace flashinfer {{
struct {params} {{ void* output; int64_t num_elements; {extra} }};
{open}
template <class Config> {function} void fill(const {params}& params) {{}}
{close}
}}
"""


@pytest.fixture(autouse=True)
def fill_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = source.include_root()
    csrc = tmp_path / "csrc"
    for folder in (csrc / "fill", csrc / "cpu" / "fill"):
        folder.mkdir(parents=True)
    for path in root.rglob("*"):
        if path.is_file():
            target = csrc / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    device = {"types": "device/types.cuh", "open": "", "close": "", "function": "__device__"}
    host = {"types": "cpu/types.h", "open": "namespace cpu {", "close": "}", "function": ""}
    narrow, wide = {"params": "FillParams", "extra": ""}, {"params": "WideFillParams", "extra": "int64_t num_tiles;"}
    (csrc / "fill" / "fill.cuh").write_text(_HEADER.format(**device, **narrow))
    (csrc / "fill" / "sm90.cuh").write_text(_HEADER.format(**device, **wide))
    (csrc / "cpu" / "fill" / "fill.h").write_text(_HEADER.format(**host, **narrow))
    monkeypatch.setattr(source, "include_root", lambda: csrc)
    monkeypatch.setattr(toolchain, "include_root", lambda: csrc, raising=False)
    monkeypatch.setitem(specs._families, "fill", FILL)
    caches = (source.transitive_includes, source._read_header, source.header_digest)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    "target, dtype, header",
    [
        ("sm_90a", "fp16", "fill/sm90.cuh"),
        ("sm_90a", "fp32", "fill/fill.cuh"),  # it does not serve these
        ("sm_90", "fp16", "fill/fill.cuh"),  # machine code of sm_90a does not run there
        ("sm_80", "fp16", "fill/fill.cuh"),
        ("sm_120a", "fp16", "fill/fill.cuh"),
        ("x86-64-v3", "fp16", "cpu/fill/fill.h"),
    ],
)
def test_the_most_specific_that_serves(target: str, dtype: str, header: str) -> None:
    spec = FILL.spec(target, dtype=dtype)
    rendered = source.render(spec)
    assert rendered.implementation.header == header
    assert f'#include "{header}"' in rendered.text
    params = "WideFillParams" if header == "fill/sm90.cuh" else "FillParams"
    assert f"flashinfer::{params}" in rendered.text
    assert rendered.config.launch.num_threads == (384 if params == "WideFillParams" else 128)


def test_the_digest_covers_the_implementation_alone() -> None:
    """Another implementation's header may change without making machine code stale."""
    spec = FILL.spec("sm_90a", dtype="fp16")
    digests = {target: source.render(spec.with_target(target)).digest for target in ("sm_90a", "sm_80")}
    header = source.include_root() / "fill" / "sm90.cuh"
    header.write_text(header.read_text() + "\n")
    for cache in (source.transitive_includes, source._read_header, source.header_digest):
        cache.cache_clear()
    assert source.render(spec).digest != digests["sm_90a"]
    assert source.render(spec.with_target("sm_80")).digest == digests["sm_80"]


def test_both_compile() -> None:
    try:
        compiler = toolchain.Nvrtc()
        compiler.identity  # noqa: B018
    except toolchain.ToolchainMissing as error:
        pytest.skip(str(error))
    for dtype in ("fp16", "fp32"):
        assert compiler.compile(source.render(FILL.spec("sm_90a", dtype=dtype))).machine_code


def test_a_family_without_one_for_the_target() -> None:
    only_hopper = Family("fill", FILL.axes, FILL.implementations[:1])
    with pytest.raises(UnsupportedConfig, match="no kernel for target sm_80; this family has sm_90a"):
        only_hopper.spec("sm_80", dtype="fp16")
    with pytest.raises(UnsupportedConfig, match="no implementation for fill-dtype=fp32 on sm_90a"):
        only_hopper.config(only_hopper.spec("sm_90a", dtype="fp32"))


def test_resolve_names_the_implementation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "fill.toml"
    config.write_text('[[kernel]]\nfamily = "fill"\ndtype = "fp16"\n')
    for target, shown in (("sm_90a", "fill/sm90.cuh"), ("sm_80", "fill/fill.cuh")):
        main(["resolve", "--config", str(config), "--target", target])
        assert shown in capsys.readouterr().out
