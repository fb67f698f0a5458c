# SPDX-License-Identifier: Apache-2.0
"""Registries as the C++ headers read them: what a build writes, and everything that must not be used."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashinfer import families
from flashinfer.aot import build
from flashinfer.aot.config import read_specs
from flashinfer.jit import description
from flashinfer.jit import spec as specs
from flashinfer.jit.stores import Registry
from flashinfer.version import __version__
from tests.aot.kit import HOST, change_entries, change_registry, registry_of, rmsnorm_rows, write_config
from tests.cpp.kit import Api, CError, CTensor, Kernels, tensor
from tests.kit import ROOT

X, WEIGHT = torch.ones(2, 64), torch.ones(64)


def normalize(kernels: Kernels, hidden_size: int = 64) -> torch.Tensor:
    out = torch.zeros(2, hidden_size)
    kernels.rmsnorm(torch.ones(2, hidden_size), torch.ones(hidden_size), out, ctypes.c_float(1e-6), 0)
    return out


def refusal(api: Api, root: Path, status: int = 1) -> str:
    with pytest.raises(CError) as caught:
        normalize(api.open([root]))
    assert caught.value.status == status
    return str(caught.value)


def test_set_of_a_build(api: Api, host_copy: Path) -> None:
    """As `flashinfer aot build` writes it; of another set, which lacks the kernel, the next is asked."""
    torch.testing.assert_close(normalize(api.open([host_copy])), torch.ones(2, 64))
    torch.testing.assert_close(normalize(api.open([host_copy]), 128), torch.ones(2, 128))


def test_roots_of_the_environment(api: Api, host_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctypes.CDLL(None).setenv(b"FLASHINFER_AOT_PATH", str(host_copy).encode(), 1)
    try:
        torch.testing.assert_close(normalize(api.open(None)), torch.ones(2, 64))
    finally:
        ctypes.CDLL(None).unsetenv(b"FLASHINFER_AOT_PATH")
    with pytest.raises(CError, match="no folder with a registry"):
        api.open(None)


def test_missing_kernel_prints_its_row(api: Api, host_copy: Path, tmp_path: Path) -> None:
    """What the error prints builds the kernel, into the same set."""
    with pytest.raises(CError) as caught:
        normalize(api.open([host_copy]), 32)
    assert caught.value.status == 2
    message, _, row = str(caught.value).partition("\n\n")
    assert f"no kernel rmsnorm for {HOST}:\n  {host_copy}: not in the registry" in message
    config = write_config(tmp_path, row)
    build.build(read_specs([config], [HOST]), host_copy)
    torch.testing.assert_close(normalize(api.open([host_copy]), 32), torch.ones(2, 32))


def test_no_machine_code_for_this_machine(api: Api, host_copy: Path) -> None:
    change_entries(host_copy, target="armv8.2-a" if HOST.startswith("x86") else "x86-64-v3")
    assert f"no machine code for {HOST}, only for" in refusal(api, host_copy, status=2)


def test_damaged_file(api: Api, host_copy: Path) -> None:
    for entry in registry_of(host_copy)["kernels"]:
        (host_copy / entry["file"]).write_bytes(b"\x7fELF")
    message = refusal(api, host_copy)
    assert "sha256 mismatch" in message and "Next step: build the set anew" in message


def test_another_layout_of_the_parameters(api: Api, host_copy: Path) -> None:
    launch = {**registry_of(host_copy)["kernels"][0]["launch"], "abi": "0123456789abcdef"}
    change_entries(host_copy, launch=launch)
    assert "takes NormParams of the layout 123456789abcdef; given NormParams of the layout" in refusal(api, host_copy)


def test_registry_of_an_early_build(api: Api, host_copy: Path) -> None:
    change_entries(host_copy, launch=None)
    assert "does not tell how it is launched (flashinfer aot build --refresh)" in refusal(api, host_copy, status=2)
    build.build([], host_copy, refresh=True)
    torch.testing.assert_close(normalize(api.open([host_copy])), torch.ones(2, 64))


def test_another_version(api: Api, host_copy: Path) -> None:
    change_registry(host_copy, version="9.9.9")
    message = refusal(api, host_copy)
    assert f"is of version 9.9.9, this program was compiled for {__version__}" in message and "pip install" in message


MALFORMED = {
    "no JSON": "{",
    "binary": "\x00\x01",
    "a list": "[]",
    "more than JSON": "{} {}",
    "a number cut short": '{"format": 1e',
    "a string cut short": '{"format": "\\u00',
    "a bad escape": '{"format": "\\q"}',
    "deep": "[" * 10000,
    "another format": json.dumps({"format": 2, "version": "1", "kernels": []}),
    "format a text": json.dumps({"format": "1", "version": "1", "kernels": []}),
    "no version": json.dumps({"format": 1, "kernels": []}),
    "no kernels": json.dumps({"format": 1, "version": __version__}),
    "an entry no table": json.dumps({"format": 1, "version": __version__, "kernels": [5]}),
    "an entry too short": json.dumps({"format": 1, "version": __version__, "kernels": [{"name": "n"}]}),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, api: Api, tmp_path: Path) -> None:
    (tmp_path / "registry.json").write_text(MALFORMED[case])
    with pytest.raises(CError, match="is not usable"):
        api.open([tmp_path])


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "threads": lambda launch: launch.update(num_threads=0),
    "cluster": lambda launch: launch.update(cluster_size=-1),
    "params": lambda launch: launch.pop("params"),
    "constants": lambda launch: launch.update(constants=[]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_malformed_launch(case: str, api: Api, host_copy: Path) -> None:
    launch = dict(registry_of(host_copy)["kernels"][0]["launch"])
    CHANGES[case](launch)
    change_entries(host_copy, launch=launch)
    with pytest.raises(CError, match="is not usable"):
        api.open([host_copy])


def test_no_registry(api: Api, tmp_path: Path) -> None:
    with pytest.raises(CError, match=r"registry.json cannot be read. Next step: name the folder of a set"):
        api.open([tmp_path / "nowhere"])


def test_nothing_in_the_place_of_an_object(api: Api, host_copy: Path) -> None:
    kernels = api.open([host_copy])
    for call in (
        lambda: api.call("rmsnorm", None, X, WEIGHT, X, ctypes.c_float(0), 0, None),
        lambda: api.call("rmsnorm", kernels.handle, X, None, X, ctypes.c_float(0), 0, None),
        lambda: api.call("kernels_open", str(host_copy).encode(), -1, None),
        lambda: api.call("batch_decode_plan", None, None, None, None, None),
        lambda: api.call("mla_run", None, X, X, X, X, X, None, None),
    ):
        with pytest.raises(CError, match="is null"):
            call()
    assert api.library.flashinfer_kernels_target(None) is None


def test_sizes_that_are_none(api: Api, host_copy: Path) -> None:
    """Below 0, and a tensor that was made of no shape."""
    negative, shapeless = tensor(X), api.library.flashinfer_tensor_of
    negative.shape[0], shapeless.restype = -2, CTensor
    refused = {r"fp32 \[-2, 64\]; expected sizes of 0": negative, "rank is -1": shapeless(None, 0, 2, None)}
    for message, given in refused.items():
        with pytest.raises(CError, match=message):
            api.open([host_copy]).rmsnorm(given, WEIGHT, X, ctypes.c_float(1e-6), 0)


def test_description_follows_the_family(tmp_path: Path) -> None:
    """Layouts of the registry are those of the structs; a set without descriptions gets them without a compile."""
    config = write_config(tmp_path, rmsnorm_rows(64))
    requests = read_specs([config], [HOST])
    build.build(requests, tmp_path / "set")
    data = registry_of(tmp_path / "set")
    (entry,) = data["kernels"]
    implementation = specs.family("rmsnorm").implementation(requests[0])
    assert data["layouts"][entry["launch"]["abi"]] == description.layout(implementation.params)
    assert entry["launch"]["constants"]["kHiddenSize"] == 64 and entry["launch"]["constants"]["T"] == "fp32"
    change_entries(tmp_path / "set", launch=None)
    report = build.build(requests, tmp_path / "set")
    assert report.num_compiled == 0
    assert Registry(tmp_path / "set").entries[0].launch == entry["launch"]


def test_contract_is_current() -> None:
    """include/flashinfer/contract.hpp is what scripts/cpp_contract.py writes."""
    families.register_all()
    command = [sys.executable, str(ROOT / "scripts" / "cpp_contract.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
