# SPDX-License-Identifier: Apache-2.0
"""`flashinfer aot verify` and `list`: what a set says of itself, and what its machine code says."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from flashinfer.aot import elf, verify
from flashinfer.jit.stores import Registry
from tests.aot.kit import HOST, artifacts, change_entries, copy_set, registry_of, run_cli
from tests.kit import rmsnorm_spec


def test_verify_finds_a_sound_set_sound(cubins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("aot", "verify", cubins) == 0
    assert f"{cubins}: 5 kernels, all sound" in capsys.readouterr().out


def test_list(cubins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("aot", "list", cubins) == 0
    assert "sm_90a" in capsys.readouterr().out
    assert run_cli("aot", "list", "--kernels", cubins) == 0
    assert rmsnorm_spec().name in capsys.readouterr().out


def test_commands_without_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("aot", "verify", tmp_path) == 1
    assert "no usable registry: it holds no registry.json; expected" in capsys.readouterr().err


def problems(root: Path) -> list[str]:
    return [f"{problem.what}: {problem.why}" for problem in verify.verify(Registry(root))]


def swap_targets(root: Path, first: str, second: str) -> None:
    """Say in the registry that the machine code of each target is for the other."""
    data = registry_of(root)
    for entry in data["kernels"]:
        entry["target"] = {first: second, second: first}.get(entry["target"], entry["target"])
    (root / "registry.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("sm_80", "sm_90a", "is machine code for sm_80; the registry says sm_90a"),
        ("sm_100a", "sm_120a", "is machine code for sm_120; the registry says sm_100a"),
        ("sm_80", HOST, f"is machine code for cuda; the registry says {HOST}"),
        (HOST, "sm_80", "is machine code for x86-64; the registry says sm_80"),
    ],
)
def test_verify_reads_the_target_from_the_machine_code(
    first: str, second: str, message: str, cubins: Path, tmp_path: Path
) -> None:
    root = copy_set(cubins, tmp_path / "set")
    swap_targets(root, first, second)
    assert any(message in problem for problem in problems(root))


def test_verify_tells_architecture_specific_code_apart(cubins: Path, tmp_path: Path) -> None:
    """sm_90 and sm_90a are one number in the ELF header; the arguments ptxas notes tell which it was."""
    root = copy_set(cubins, tmp_path / "set")
    data = registry_of(root)
    for entry in data["kernels"]:
        entry["target"] = "sm_90" if entry["target"] == "sm_90a" else entry["target"]
    (root / "registry.json").write_text(json.dumps(data))
    assert any("was compiled for sm_90a; the registry says sm_90" in problem for problem in problems(root))


@pytest.mark.skipif(HOST not in ("x86-64-v3", "x86-64-v4"), reason="needs an x86 CPU with AVX2, and its linker's note")
def test_verify_reads_the_level_of_a_cpu_library(host_copy: Path) -> None:
    root = host_copy
    change_entries(root, target="x86-64-v2")
    assert any(f"was compiled for {HOST}; the registry says x86-64-v2" in problem for problem in problems(root))


@pytest.mark.parametrize(
    ("version", "flags", "target"),
    [
        (7, 0x00500550, "sm_80"),  # as NVRTC 12.9 writes them
        (7, 0x005A0D5A, "sm_90a"),
        (8, 0x0600640A, "sm_100a"),
        (8, 0x06006402, None),
    ],
)
def test_target_in_elf_headers_of_cuda_12(version: int, flags: int, target: str | None) -> None:
    header = bytearray(64)
    header[:9] = b"\x7fELF\x02\x01\x01\x33" + bytes([version])
    struct.pack_into("<H", header, 18, 190)
    struct.pack_into("<I", header, 48, flags)
    code = elf.inspect(bytes(header))
    assert (code.machine, code.target) == ("cuda", target)
    assert code.capability == ((10, 0) if version == 8 else (8, 0) if target == "sm_80" else (9, 0))


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", b"\x7fELF\x02\x01\x01", b"\x7fELF\x01\x01" + bytes(60), b"#!" * 40]
)
def test_no_machine_code(content: bytes) -> None:
    with pytest.raises(ValueError, match="ELF file"):
        elf.inspect(content)


def test_verify_finds_damage_and_strangers(host_copy: Path) -> None:
    root = host_copy
    first, second = artifacts(root)
    first.write_bytes(first.read_bytes()[:-500])
    second.unlink()
    (second.parent / "stranger.so").write_bytes(b"")
    found = problems(root)
    name = first.relative_to(root).as_posix()
    assert any(problem.startswith(f"{name}: has ") for problem in found)
    assert f"{name}: sha256 differs from the registry's" in found
    assert any(problem.startswith(f"{name}: the ELF file is cut short") for problem in found)
    assert f"{second.relative_to(root).as_posix()}: is unreadable: No such file or directory" in found
    assert any(problem.endswith("stranger.so: is not in the registry") for problem in found)


def test_verify_finds_other_sources_and_outside_files(host_copy: Path) -> None:
    root = host_copy
    change_entries(root, digest="0" * 64, file="../registry.json")
    found = problems(root)
    assert any("digest differs: it was built from other sources" in problem for problem in found)
    assert any("lies outside the folder of the registry" in problem for problem in found)
