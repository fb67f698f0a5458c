# SPDX-License-Identifier: Apache-2.0
"""Programs in C++ that compile what no set holds: source text, machine code and cache are those of Python."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashinfer import families
from flashinfer.aot import recipes as aot_recipes
from flashinfer.cli import main
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.norm import RMSNORM
from flashinfer.jit import KernelSpec, description
from flashinfer.jit.source import Source, render
from flashinfer.jit.stores import Hit, JitCache
from flashinfer.jit.toolchain import Nvrtc
from tests.aot.kit import has_nvrtc, made_once
from tests.cpp.kit import Api, CError, compile_program, pretended_gpu
from tests.kit import ROOT

TARGET = "sm_90a"
SPEC = RMSNORM.spec(TARGET, dtype="bf16", hidden_size=4096, vec_size=8, add_residual=False, gemma=False)
needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC and the headers of CUDA")


# ------------------------------------------------------------------------------------------------------------- sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        compile_program(ROOT / "tests" / "cpp" / "sources.cpp", folder / "sources")

    return made_once(tmp_path_factory, "sources", make) / "sources"


def line_of(spec: KernelSpec) -> str:
    values = {axis: str(value).lower() if isinstance(value, bool) else value for axis, value in spec.args}
    return " ".join([spec.family, *(f"{axis}={value}" for axis, value in values.items())])


def described(program: Path, file: Path, lines: list[str]) -> list[str]:
    done = subprocess.run(
        [program, file, TARGET], input="\n".join(lines), capture_output=True, text=True, check=True
    )  # fmt: skip
    return done.stdout.splitlines()


def expected(source: Source) -> str:
    launch = description.launch(source)
    numbers = [launch[name] for name in ("num_threads", "smem_bytes", "cluster_size", "units_per_block")]
    abi = f"{int(launch['abi'], 16):x}"
    return " ".join(map(str, [source.digest, source.spec.name, *numbers, launch["params"], abi]))


def test_sources_are_those_of_python(sources: Path, recipes: Callable[[str], Path]) -> None:
    """Text, flags and headers, by the digest, and how it is launched: of kernels of every family, drawn at random."""
    families.register_all()
    by_operator: dict[Any, list[dict[str, Any]]] = {}
    for ask, axes in aot_recipes.asked(TARGET):
        by_operator.setdefault(ask, []).append(axes)
    drawn = []
    for ask, some in by_operator.items():
        for axes in random.Random(1).sample(some, min(100, len(some))):
            with contextlib.suppress(UnsupportedConfig):
                spec = ask(TARGET, **axes)
                drawn.append(render(spec))
    found = described(sources, recipes(TARGET), [line_of(one.spec) for one in drawn])
    assert len({one.entry for one in drawn}) == 9 and len(drawn) > 300
    assert found == [expected(one) for one in drawn]


@pytest.mark.parametrize(
    "line",
    [
        "rmsnorm dtype=bf16 hidden_size=4097 vec_size=8 add_residual=false gemma=false",  # a value of no recipe
        "rmsnorm dtype=bf16 hidden_size=4096 vec_size=8 add_residual=false",  # an axis too few
        line_of(SPEC) + " more=true",
        "prefill_plan kv_storage=nowhere",
        "nothing",
        # Values of recipes that no kernel has together: bf16 queries over a cache of fp16.
        "mla q_dtype=bf16 kv_dtype=fp16 head_dim_ckv=512 head_dim_kpe=64 short_queries=false large_pages=false "
        "mask=none",
    ],
)
def test_no_recipe(line: str, sources: Path, recipes: Callable[[str], Path]) -> None:
    assert described(sources, recipes(TARGET), [line]) == ["none"]


def test_recipes_are_for_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["aot", "recipes", "--target", "x86-64-v3", "--out", str(tmp_path / "recipes.json")]) != 0
    assert "recipes are for NVRTC, which compiles for GPUs; got x86-64-v3" in capsys.readouterr().err


def test_not_for_a_cpu(api: Api, recipes: Callable[[str], Path]) -> None:
    with pytest.raises(CError, match="kernels are compiled for GPUs alone; expected none for a CPU"):
        api.open([], -1, recipes(TARGET))


# ---------------------------------------------------------------------------------------------- the program of the page


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """jit.cpp of docs/cpp.md, as it stands."""

    def make(folder: Path) -> None:
        (source,) = re.findall(r"^```cpp\n([^`]*?jit\.hpp.*?)^```", (ROOT / "docs" / "cpp.md").read_text(), re.M | re.S)
        (folder / "jit.cpp").write_text(source)
        compile_program(folder / "jit.cpp", folder / "jit")

    return made_once(tmp_path_factory, "jit-program", make) / "jit"


class Runs:
    """Of the program, on a GPU that is not there, with a cache of its own."""

    def __init__(self, program: Path, driver: Path, recipes: Path, folder: Path) -> None:
        self.program, self.recipes, self.folder = program, recipes, folder
        self.cache = JitCache(folder / "cache" / "jit")
        self.variables = pretended_gpu(driver, folder / "launches.txt")
        self.variables["FLASHINFER_CACHE_DIR"] = str(folder / "cache")

    def start(self, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.program, self.recipes], stderr=subprocess.PIPE, text=True,
            env={**os.environ, **self.variables, **variables},
        )  # fmt: skip

    def __call__(self, status: int = 0, **variables: str) -> str:
        done = self.start(**variables)
        told = done.communicate()[1]
        assert done.returncode == status, told
        return told

    def changed(self, change: Callable[[str], str]) -> None:
        """Other recipes from now on."""
        path = self.folder / "recipes.json"
        path.write_text(change(self.recipes.read_text()))
        self.recipes = path


@pytest.fixture
def run(program: Path, driver: Path, recipes: Callable[[str], Path], tmp_path: Path) -> Runs:
    return Runs(program, driver, recipes(TARGET), tmp_path)


@needs_nvrtc
def test_machine_code_is_that_of_python(run: Runs) -> None:
    """To the byte; each finds what the other compiled, and the compile is told."""
    told = run()
    assert f"compiling {SPEC.name} for {TARGET}: no kernel rmsnorm for {TARGET}: no set is given" in told
    assert re.search(rf"compiled {SPEC.name} for {TARGET} in \d\.\d\d s, \d+ bytes, {run.folder}", told)
    source, compiler = render(SPEC), Nvrtc()
    found, compiled = run.cache.find(source, compiler.identity), compiler.compile(source)
    assert isinstance(found, Hit) and found.machine_code == compiled.machine_code
    assert found.path is not None
    meta = json.loads((found.path.parent / "spec.json").read_text())
    log = (found.path.parent / "log.txt").read_text()
    assert (found.path.parent / "source.cu").read_text() == source.text and "registers" in log
    launched = (run.folder / "launches.txt").read_text()
    assert launched.startswith("rmsnorm grid 8,1,1 block 128,1,1") and launched.count("\n") == 1, "rehearsed, launched"

    run.cache.remove(found.path.parent)
    by_python = run.cache.publish(source, compiler.identity, ".cubin", compiled.machine_code, compiled.log)
    assert json.loads((by_python.parent / "spec.json").read_text()) == meta
    assert f"{SPEC.name} for {TARGET} is from the JIT cache, {by_python}" in run()
    assert "is from the JIT cache" in run(FLASHINFER_NVRTC="/nowhere"), "what is there needs no compiler"

    by_python.write_bytes(b"damaged")
    assert "compiled" in run()
    assert by_python.read_bytes() == compiled.machine_code
    (by_python.parent / "spec.json").unlink()
    (by_python.parent / "spec.json").mkdir()
    assert "compiled" in run(), "what cannot be read is damaged too"
    assert json.loads((by_python.parent / "spec.json").read_text()) == meta
    assert [path.name for path in run.cache.root.iterdir() if path.name.startswith(".partial")] == []


@needs_nvrtc
def test_two_programs_compile_once(run: Runs) -> None:
    both = [run.start() for _ in range(2)]
    told = [one.communicate()[1] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert sum("compiled" in text for text in told) == 1 and sum("from the JIT cache" in text for text in told) == 1


@needs_nvrtc
def test_cache_that_cannot_be_written(run: Runs) -> None:
    (run.folder / "file").write_text("")
    assert "bytes, kept in this process alone: " in run(FLASHINFER_CACHE_DIR=str(run.folder / "file"))


@needs_nvrtc
def test_cache_at_home(run: Runs) -> None:
    """As Python spells it."""
    told = run(FLASHINFER_CACHE_DIR="~/kernels", HOME=str(run.folder))
    assert f"bytes, {run.folder / 'kernels' / 'jit'}/" in told


@needs_nvrtc
def test_text_that_does_not_compile(run: Runs) -> None:
    run.changed(lambda text: text.replace("struct Config {", "struct Config { no;"))
    told = run(1)
    assert f"{SPEC.name} ({TARGET}) did not compile" in told and "error" in told


@needs_nvrtc
def test_headers_of_another_version(run: Runs) -> None:
    """Else their machine code would lie in the cache under a digest that is not theirs."""
    run.changed(lambda text: re.sub(r'("norm/rmsnorm.cuh":)"\w{8}', r'\1"00000000', text))
    told = run(1)
    assert "rmsnorm.cuh is not the one that" in told and "Next step: write it anew, by flashinfer aot recipes" in told
    assert not list(run.cache.folders())


@needs_nvrtc
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda text: re.sub(r'"csrc":"[^"]*"', '"csrc":"/nowhere"', text),
            "are not in /nowhere. Next step: name their",
        ),
        (lambda text: text.replace("{}", ""), "is damaged"),
        (lambda text: re.sub(r'"by":\[', '"by":[],"was":[', text), "is damaged. Next step: write it anew"),
    ],
    ids=["csrc elsewhere", "no places", "no implementations"],
)
def test_recipes_that_do_not_fit(change: Callable[[str], str], said: str, run: Runs) -> None:
    run.changed(change)
    assert said in run(1)


def test_without_nvrtc(run: Runs) -> None:
    """What is missing, as without a compiler, and what to install."""
    told = run(1, FLASHINFER_NVRTC="/nowhere/libnvrtc.so")
    assert f"no kernel rmsnorm for {TARGET}:" in told and 'family = "rmsnorm"' in told
    assert "was not found (tried /nowhere/libnvrtc.so). Install it by pip install nvidia-cuda-nvrtc" in told


def test_recipes_of_another_target(run: Runs) -> None:
    assert "no recipes for sm_120a (flashinfer aot recipes)" in run(1, PRETENDED_CAPABILITY="120")


def test_recipes_of_another_version(run: Runs) -> None:
    run.changed(lambda text: re.sub(r'"version":"[^"]*"', '"version":"9.9.9"', text))
    assert "is not usable: of version 9.9.9; this program was compiled for" in run(1)


def test_no_recipes(run: Runs) -> None:
    run.recipes = run.folder / "nowhere.json"
    assert "nowhere.json is not usable: " in run(1)
