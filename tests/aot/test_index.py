# SPDX-License-Identifier: Apache-2.0
"""The two distributions as users get them: from a package index, without a network.

The installs run in an environment of their own, from an index that also holds empty wheels for torch and the other
dependencies; what is run there finds the real ones behind it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from flashinfer.version import __version__
from tests.aot.kit import (
    BOTH,
    HOST,
    copy_set,
    has_nvrtc,
    kernels_of,
    rmsnorm_rows,
    tree,
    write_config,
)
from tests.aot.wheels_kit import (
    Environment,
    build_index,
    built_by_hook,
    pip,
)
from tests.kit import ROOT

pytest.importorskip("setuptools", minversion="77", reason="building wheels offline needs setuptools (group test)")


USE = """
import sys, torch, flashinfer, flashinfer_aot
assert flashinfer.__file__.startswith(sys.prefix) == INSTALLED, flashinfer.__file__
x, weight = torch.randn(2, 64), torch.randn(64)
expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight
assert torch.allclose(flashinfer.rmsnorm(x, weight), expected, atol=1e-5)
assert flashinfer_aot.registry()["version"] == flashinfer.__version__
print(flashinfer_aot.root())
"""


def test_install_from_the_index(installed: Environment, tmp_path: Path) -> None:
    """The extra brings the companion; a kernel then comes from it, where nothing may compile."""
    root = installed.run("-c", USE.replace("INSTALLED", "True"), cwd=tmp_path, FLASHINFER_DISABLE_JIT="1").strip()
    assert Path(root).is_relative_to(installed.site)
    assert "all sound" in installed.run("-m", "flashinfer", "aot", "verify", cwd=tmp_path)
    script = installed.python.with_name("flashinfer")
    assert HOST in installed.run(script, "aot", "list", cwd=tmp_path)


def test_installed_package_compiles_and_builds(installed: Environment, tmp_path: Path) -> None:
    """Sources and configs are inside the wheel: it compiles without the checkout, and builds a set."""
    config = write_config(tmp_path, rmsnorm_rows(64))
    options = ["--config", config, "--target", HOST, "--out", tmp_path / "set"]
    assert "1 compiled" in installed.run("-m", "flashinfer", "aot", "build", *options, cwd=tmp_path)
    dry = ["--config", "core", "--target", "sm_90a", "--out", tmp_path / "core", "--dry-run"]
    assert "decode" in installed.run("-m", "flashinfer", "aot", "build", *dry, cwd=tmp_path)


def test_the_builder_alone_needs_no_torch(front_wheel: Path, tmp_path: Path) -> None:
    """As docs/packaging.md installs it: nothing of what the library needs at run time."""
    if not has_nvrtc():
        pytest.skip("needs NVRTC")
    brought = ("ninja", "tqdm", "cuda", "nvidia", "tomli")
    environment = Environment(tmp_path / "venv")
    environment.make(borrows=False)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.startswith(brought):
            (environment.site / entry.name).symlink_to(entry)
    environment.install("--no-deps", front_wheel)
    config = write_config(tmp_path, rmsnorm_rows(64))
    options = ["--config", config, "--target", f"{HOST},sm_90a", "--out", tmp_path / "set"]
    assert "2 compiled" in environment.run("-m", "flashinfer", "aot", "build", *options, cwd=tmp_path)
    code = "import importlib.util as u; print([n for n in ('torch', 'platformdirs', 'filelock') if u.find_spec(n)])"
    assert environment.run("-c", code, cwd=tmp_path).strip() == "[]"
    assert "all sound" in environment.run("-m", "flashinfer", "aot", "verify", tmp_path / "set", cwd=tmp_path)


def test_adding_to_an_installed_companion_keeps_it(installed: Environment, tmp_path: Path) -> None:
    """It came without notes of its build; what was installed is there afterwards, file by file."""
    companion = copy_set(installed.site / "flashinfer_aot", tmp_path / "companion")
    before = tree(companion)
    options = ["--config", write_config(tmp_path, rmsnorm_rows(192)), "--target", HOST, "--out", companion]
    assert "2 others kept" in installed.run("-m", "flashinfer", "aot", "build", *options, cwd=tmp_path)
    after = tree(companion)
    kept = {name: content for name, content in before.items() if name != "registry.json"}
    assert {name: after[name] for name in kept} == kept
    assert kernels_of(companion) == BOTH | {(192, HOST)}
    assert "all sound" in installed.run("-m", "flashinfer", "aot", "verify", companion, cwd=tmp_path)


def test_editable_installs(tmp_path: Path) -> None:
    """Everything is used where it lies. The companion needs no set yet: it is found once it is built."""
    environment = Environment(tmp_path / "venv")
    environment.make()
    projects = (ROOT, ROOT / "flashinfer_aot")
    wheels = [built_by_hook("build_editable", project, tmp_path / project.name) for project in projects]
    environment.install("--no-deps", *wheels)
    assert not (environment.site / "flashinfer").exists()
    code = """
import flashinfer, flashinfer_aot
from flashinfer.jit.source import include_root
print(flashinfer.__file__, flashinfer_aot.root(), include_root(), sep="\\n")
"""
    where = (ROOT / "flashinfer" / "__init__.py", ROOT / "flashinfer_aot" / "flashinfer_aot", ROOT / "csrc")
    assert environment.run("-c", code, cwd=tmp_path).split() == [str(path) for path in where]


def test_index_has_a_folder_per_cuda_version(index: Path, cuda_wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    files = sorted((index / "files").glob("flashinfer*.whl"))
    build_index(*files, out=out)
    build_index(cuda_wheel, out=out)  # adding to an index
    local = cuda_wheel.name.split("+")[1].split("-")[0]
    pages = {name: (out / name / "flashinfer-aot" / "index.html").read_text() for name in ("simple", local)}
    assert "%2Bcu" not in pages["simple"] and "%2Bcu" in pages[local]
    digest = hashlib.sha256(cuda_wheel.read_bytes()).hexdigest()
    assert f"{cuda_wheel.name.replace('+', '%2B')}#sha256={digest}" in pages[local]
    assert (out / local / "flashinfer" / "index.html").exists()
    report = pip(
        "install", "--dry-run", "--no-deps", "--ignore-installed", "--index-url", (out / local).as_uri(),
        f"flashinfer-aot=={__version__}",
    )  # fmt: skip
    assert f"Would install flashinfer-aot-{__version__}+{local}" in report, (
        "what the extra asks for takes the CUDA build"
    )


def test_index_has_the_bills_of_materials(front_wheel: Path, tmp_path: Path) -> None:
    wheel = shutil.copy(front_wheel, tmp_path)
    Path(f"{wheel}.cdx.json").write_text("{}")
    for _ in range(2):
        build_index(wheel, out=tmp_path / "index")
    names = {path.name for path in (tmp_path / "index" / "files").iterdir()}
    assert names == {front_wheel.name, f"{front_wheel.name}.cdx.json", f"{front_wheel.name}.metadata"}


def test_index_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build_index(tmp_path / "notes.txt", out=tmp_path / "index")
    assert "is neither a wheel (.whl) nor an sdist (.tar.gz)" in caught.value.stderr
