# SPDX-License-Identifier: Apache-2.0
"""Environments that lack packages: a message names what is missing and how to get it, and no traceback appears."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashinfer import packages
from flashinfer import target as targets
from flashinfer.aot import tools
from flashinfer.errors import ToolchainMissing, UnsupportedConfig
from tests.aot.kit import HOST, build_set, made_once, rmsnorm_rows, run_cli
from tests.kit import PATIENCE_SECONDS, ROOT

# of what the library imports, what a build takes
BARE = [text for module, text in packages.RUNTIME.items() if module != "torch"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with nothing in it, not even pip."""

    def make(folder: Path) -> None:
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=PATIENCE_SECONDS
        )

    return made_once(tmp_path_factory, "bare", make) / "venv" / "bin" / "python"


@pytest.fixture
def bare(bare_python: Path, tmp_path: Path) -> Run:
    """Run the checkout there: no programs on the path, no variables but a home."""

    def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/nowhere", "HOME": str(tmp_path)}
        command = [str(bare_python), "-B", *map(str, argv)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_a_build_names_all_that_is_missing(bare: Run, tmp_path: Path) -> None:
    script, out = ROOT / "scripts" / "build_aot.py", tmp_path / "set"
    done = bare(script, "--config", "smoke", "--target", f"sm_90a,{HOST}", "--out", out)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    what, _, step = done.stderr.partition("Next step: ")
    missing = ["ninja", "tqdm", "cuda-pathfinder", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime"]
    for name in missing:
        assert name in what and name in step
    assert "no C++ compiler was found" in what and "apt-get install g++" in step
    assert "torch" not in what and "pip install ninja" in step
    assert not out.exists()


def test_only_what_the_targets_need_is_missed(bare: Run, tmp_path: Path) -> None:
    done = bare(ROOT / "scripts" / "build_aot.py", "--config", "smoke", "--target", HOST, "--out", tmp_path / "set")
    assert "C++ compiler" in done.stderr and "nvidia" not in done.stderr and "cuda" not in done.stderr


def test_a_dry_run_works_and_warns(bare: Run, tmp_path: Path) -> None:
    options = ("--config", "smoke", "--target", "sm_90a", "--out", tmp_path / "set", "--dry-run")
    done = bare("-m", "flashinfer", "aot", "build", *options)
    if sys.version_info < (3, 11):
        assert done.returncode == 1 and "tomli" in done.stderr
    else:
        assert done.returncode == 0 and "4 to compile" in done.stdout
        assert "warning: building takes more than is here: no ninja, tqdm, cuda-pathfinder" in done.stderr


def test_doctor_names_packages(bare: Run) -> None:
    done = bare("-m", "flashinfer", "doctor")
    assert done.returncode == 1
    found = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "platformdirs, filelock, cuda-pathfinder" in found["packages"] and "FAILED" in found["packages"]
    assert "pip install platformdirs filelock 'cuda-pathfinder>=1.3'" in done.stdout
    assert "ninja, tqdm are not installed" in found["building sets"]
    assert "platformdirs" in found["cache"]
    assert "home directory" not in done.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("resolve --config smoke", "torch, which sees the GPUs, is not installed; name a --target"),
        ("warmup --config smoke", "torch, which sees the GPUs, is not installed; name a --target"),
        ("cache list", "platformdirs, which knows where users' caches are, is not installed; next step: pip install"),
        ("misses report", "platformdirs, which knows where users' caches are, is not installed"),
    ],
)
def test_commands_name_the_package_they_miss(argv: str, message: str, bare: Run) -> None:
    done = bare("-m", "flashinfer", *argv.split())
    assert done.returncode in (1, 2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("flashinfer: ")]
    if sys.version_info >= (3, 11) or "smoke" not in argv:
        assert message in line


@pytest.mark.parametrize("module", packages.RUNTIME)
def test_an_import_that_fails_anywhere_is_told(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what this library needs; any other is a fault of its own and stays one."""

    def missing(name: str) -> Callable[..., None]:
        def run(*_: object) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return run

    monkeypatch.setattr("flashinfer.cli.doctor.run", missing(module))
    assert run_cli("doctor") == 1
    assert re.fullmatch(r"flashinfer: \S+ is not installed; next step: pip install \S+\n", capsys.readouterr().err)
    monkeypatch.setattr("flashinfer.cli.doctor.run", missing("flashinfer.no_such_module"))
    with pytest.raises(ModuleNotFoundError):
        run_cli("doctor")


def test_a_set_that_is_whole_needs_no_tools(host_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "missing", lambda: ["ninja"])
    config = host_copy.parent / "more.toml"
    config.write_text(rmsnorm_rows(64, 128))
    assert build_set(config, host_copy).num_compiled == 0
    config.write_text(rmsnorm_rows(64, 128, 192))
    with pytest.raises(ToolchainMissing, match=r"no ninja\. Next step: pip install ninja"):
        build_set(config, host_copy)


def test_nvidia_packages_that_are_there_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cuda-pathfinder, which alone could load them."""
    monkeypatch.setattr(packages, "is_missing", lambda module: module == "cuda.pathfinder")

    def version(name: str) -> str:
        if name == "nvidia-cuda-nvrtc-cu12":
            return "12.9"
        raise tools.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tools.importlib.metadata, "version", version)
    with pytest.raises(ToolchainMissing) as caught:
        tools.check(["sm_90a"])
    assert "no cuda-pathfinder, nvidia-cuda-runtime." in str(caught.value)


def test_native_is_what_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> list[tuple[int, int]]:
        raise OSError("no libcuda.so.1")

    monkeypatch.setattr(tools.driver, "capabilities", no_driver)
    assert tools.target_names("native") == [targets.host()]
    assert tools.requirements("native") == tools.requirements(targets.host()) == [*packages.BUILD.values(), *BARE]
    monkeypatch.setattr(tools.driver, "capabilities", lambda: [(9, 0), (8, 0), (9, 0)])
    assert tools.target_names("native") == ["sm_90a", "sm_80"]
    assert tools.target_names("x86-64, native") == ["x86-64", "sm_90a", "sm_80"]
    for release, nvidia in ((13, (packages.NVRTC, packages.CUDA_HEADERS)), (12, packages.CU12)):
        monkeypatch.setattr(tools.driver, "version", lambda release=release: (release, 0))
        assert set(tools.requirements("native")) == {*BARE, *packages.BUILD.values(), *nvidia}
    with pytest.raises(UnsupportedConfig, match="names no target"):
        tools.target_names(",")


def test_the_recipe_of_the_docs_is_what_a_bare_machine_is_told() -> None:
    text = (ROOT / "docs" / "packaging.md").read_text()
    (line,) = re.findall(r"^    pip install (ninja .*?)(?: +#.*)?$", text, re.MULTILINE)
    assert "tqdm" in line
    for requirement in (packages.RUNTIME["cuda.pathfinder"], packages.NVRTC, packages.CUDA_HEADERS):
        assert f'"{requirement}"' in line
