# SPDX-License-Identifier: Apache-2.0
"""What Python and C++ launch on a GPU that is not there: run by test_launches.py in a process of its own, with a driver
that writes launches down (pretended_driver.cpp) and tensors that say they are on cuda:0 (tests/aot/pretended_gpus.py).

Each case of calls.py is called both ways, and the lines that the driver wrote must be the same, byte by byte of the
parameters. The set holds what Python asked for, and what it expected to be asked for next: of kernels that differ in
speed alone, C++ has to choose Python's.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import flashinfer
from flashinfer.attention import tma
from flashinfer.families.attention.decode import DecodeParams
from flashinfer.families.attention.prefill import PrefillParams, Sm90PrefillParams
from flashinfer.families.sampling import SampleParams
from flashinfer.jit import KernelSpec, loader, resolver
from flashinfer.jit.source import render
from flashinfer.jit.stores import Entry, JitCache, Registry
from tests.aot import pretended_gpus
from tests.cpp import calls
from tests.cpp.kit import Api, CError, Kernels, entry_of


def idle_code(spec: KernelSpec) -> bytes:
    """What the driver takes for machine code."""
    source = render(spec)
    header = struct.pack("<4sB27xQQ6xHHHH2x", b"\x7fELF", 2, 0, 0, 0, 0, 64, 0)
    size = ctypes.sizeof(source.implementation.params)
    return header + f"{spec.family} {size} {source.config.launch.min_blocks_per_sm}\0".encode()


class Set:
    """Kernels that Python asks for, in a folder for C++."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entries: dict[KernelSpec, Entry] = {}
        self.loaded: dict[KernelSpec, loader.Kernel] = {}

    def add(self, spec: KernelSpec) -> bytes:
        code = idle_code(spec)
        if spec not in self.entries:
            self.entries[spec] = entry_of(self.root, spec, code)
            Registry.write(self.root, list(self.entries.values()))
            JitCache(Path(os.environ["FLASHINFER_CACHE_DIR"], "jit")).publish(render(spec), "any", ".cubin", code, "")
        return code

    def load(self, spec: KernelSpec) -> loader.Kernel:
        if spec not in self.loaded:
            self.loaded[spec] = loader.load(render(spec), self.add(spec), None, _no_successor)
        return self.loaded[spec]

    def expect(self, specs: Iterable[KernelSpec]) -> None:
        for spec in specs:
            self.add(spec)


def _no_successor(why: str) -> loader.Kernel:
    raise AssertionError(why)


def launches(log: Path) -> list[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def difference(python: str, cpp: str) -> str:
    """Where two lines first differ, with the field of the parameters."""
    heads, params = zip(*(line.split(" params ") for line in (python, cpp)))
    if heads[0] != heads[1]:
        return f"{heads[0]}\n    {heads[1]}"
    at = next(i for i in range(len(params[0])) if params[0][i : i + 1] != params[1][i : i + 1]) // 2
    return (
        f"{heads[0]}: byte {at} of the parameters: {params[0][2 * at : 2 * at + 16]}, {params[1][2 * at : 2 * at + 16]}"
    )


def main(library: Path, folder: Path, log: Path, recipes: Path) -> int:
    capability = divmod(int(os.environ["PRETENDED_CAPABILITY"]), 10)
    encode = tma.driver.tensor_map_of_16_bit
    pretended_gpus.install((pretended_gpus.Gpu("of the test", capability, int(os.environ["PRETENDED_SMS"])),))
    tma.driver.tensor_map_of_16_bit = encode
    flashinfer.families.register_all()
    api, failed, num_launches = Api(library), 0, 0
    asked, made = Set(folder), resolver.default_resolver()
    made.load, made.expect = asked.load, asked.expect  # type: ignore[method-assign]
    calls.draw = lambda shape: torch.zeros(shape, device="cuda")
    for case in calls.cases():
        name = case.name
        if name.startswith(("decode,", "prefill,", "mla,")):
            require_all_rows(case, api.open([empty_set(folder.parent)], 0))
        case.by_python()
        found = launches(log)
        case.by_cpp(api.open([folder], 0))
        others = launches(log)
        case.by_cpp(api.open([], 0, recipes))  # what it would compile is in the cache, if Python compiled it
        compiled = launches(log)
        # Python plans again where a run finds the guess of the queries wrong; the last plan is what it ran with.
        found = found[-len(others) :] if name.startswith(("prefill", "mla")) else found
        found, others = ([without_results(name, line) for line in lines] for lines in (found, others))
        wrong = [difference(a, b) for a, b in zip(found, others) if a != b]
        if len(found) != len(others) or not found:
            wrong.append(f"{len(found)} launches by Python, {len(others)} by C++")
        if [line.split(" params ")[0] for line in compiled] != [line.split(" params ")[0] for line in others]:
            wrong.append("other launches where kernels come from the JIT cache")
        for what in wrong:
            print(f"{name}: {what}")
        failed += bool(wrong)
        num_launches += len(found)
    print(f"{num_launches} launches alike" if failed == 0 else f"{failed} cases differ")
    return 1 if failed else 0


def empty_set(folder: Path) -> Path:
    root = folder / "empty"
    root.mkdir(exist_ok=True)
    Registry.write(root, [])
    return root


def require_all_rows(case: calls.Case, kernels: Kernels) -> None:
    """Of a set that holds nothing, one error tells the kernel and its planner."""
    try:
        case.by_cpp(kernels)
    except CError as error:
        rows = re.findall(r'family = "(\w+)"', str(error))
        kernel = re.match(r"\w+", case.name)[0]  # type: ignore[index]
        assert rows == [kernel, "decode_plan" if kernel == "decode" else "prefill_plan"], rows
    else:
        raise AssertionError(f"{case.name}: nothing is missing of an empty set")


def without_results(name: str, line: str) -> str:
    """Of a call whose result, or scratch, Python allocates: without the addresses."""
    if not name.startswith(("single", "sample")):
        return line
    how, params = line.split(" params ")
    known = {ctypes.sizeof(struct): struct for struct in (SampleParams, DecodeParams, PrefillParams, Sm90PrefillParams)}
    struct = known.get(len(params) // 2)
    if struct is None:  # a planner
        return line
    fields = ["token_ids"] if struct is SampleParams else ["out"]
    if name.startswith("single decode"):
        fields += ["counters", "partial_out", "partial_lse"]
    for field in fields:
        at = 2 * getattr(struct, field).offset
        params = f"{params[:at]}{'-' * 16}{params[at + 16 :]}"
    return f"{how} params {params}"


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:5])))
