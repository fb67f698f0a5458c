# SPDX-License-Identifier: Apache-2.0
"""What engines import of us as they start is there; what they look for to choose a kernel is there only if it works.

engine_imports.json is what scripts/engine_imports.py reads from their wheels; make it anew with a new release.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashinfer import absent
from flashinfer.errors import UnsupportedConfig
from tests.kit import PATIENCE_SECONDS, ROOT, finish, fork

ENGINES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "engine_imports.json").read_text())

# Modules of engines that may fail to import us, because the engine then does without or nobody here can use them.
LEFT_OUT = {
    "vllm.v1.attention.backends.mla.flashinfer_mla": "of Blackwell; vLLM passes over a backend that fails to import",
    "vllm.models.deepseek_v41.nvidia.specialized_decode": "kernels in CuTe DSL for Blackwell",
    "vllm.models.kimi_k3.nvidia.specialized_decode": "kernels in CuTe DSL for Blackwell",
    "vllm.distributed.device_communicators.all2all": "asks has_flashinfer_nvlink_… first, which answer no",
    "sglang.kernels.ops": "kernels in CuTe DSL, imported where they are used",
    "sglang.srt.layers.moe.flashinfer_cutedsl_moe": "imported with --moe-runner-backend flashinfer_cutedsl",
}
# Attempts to import a row that succeed, and why that chooses nothing.
HARMLESS = {
    "vllm.models.deepseek_v41.nvidia.specialized_decode.attention.mxfp8": "asks it for is_backend_supported, in `try`",
    "sglang.srt.layers.flashinfer_comm_fusion": "asks for comm.allreduce_fusion first",
    "sglang.srt.layers.moe.token_dispatcher.standard": "asks for fp4_quantize besides",
}


def wanted() -> Iterator[Any]:
    for engine, found in ENGINES.items():
        for name, places in found["imports"].items():
            if not all(place["by"].startswith(tuple(LEFT_OUT)) for place in places):
                yield pytest.param(name, id=f"{engine}-{name}")


def imported(name: str) -> Any:
    """What `import name` or `from module import attribute` gives. Raises ImportError."""
    module, _, attribute = name.rpartition(".")
    space: dict[str, Any] = {}
    exec(f"from {module} import {attribute} as found" if module else f"import {name} as found", space)
    return space["found"]


@pytest.mark.parametrize("name", list(wanted()))
def test_what_engines_import_is_there(name: str) -> None:
    imported(name)


@pytest.mark.parametrize("prefix", LEFT_OUT)
def test_what_is_left_out_is_still_wanted_and_absent(prefix: str) -> None:
    def is_absent(name: str) -> bool:
        try:
            return imported(name) is None
        except ImportError:
            return True

    places = [(name, at["by"]) for found in ENGINES.values() for name, all_ in found["imports"].items() for at in all_]
    assert any(is_absent(name) for name, by in places if by.startswith(prefix))


@pytest.mark.parametrize("name", absent.ROWS)
def test_a_call_of_an_absent_kernel_says_which_option_avoids_it(name: str) -> None:
    assert any(name in found["imports"] for found in ENGINES.values()), "nobody imports it"
    kernel = imported(name)
    assert kernel is absent.kernel(name) and inspect.isclass(kernel) and kernel.__name__ == name.rpartition(".")[2]
    with pytest.raises(UnsupportedConfig, match=re.escape(name) + r".* (vLLM|SGLang): .*(--|SGLANG_)\w+"):
        kernel(1, out=None)
    subclass = type("OfAnEngine", (kernel,), {"__init__": lambda self, group: None})
    with pytest.raises(UnsupportedConfig):
        subclass(group=None)
    assert not isinstance(1, kernel)


def test_absent_kernels_hide_nothing() -> None:
    """A row whose name is there would never be seen."""
    for name in absent.ROWS:
        module, _, attribute = name.rpartition(".")
        assert attribute not in vars(importlib.import_module(module)) or imported(name) is absent.kernel(name)


def test_other_names_stay_absent() -> None:
    with pytest.raises(ImportError, match="cannot import name 'cutlass_fused_moe'"):
        imported("flashinfer.fused_moe.cutlass_fused_moe")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = importlib.import_module("flashinfer.decode").nothing


# What each probe looks for that is found, in a process where nothing was imported yet, by the means that engines have.
FOUND = """
import importlib, importlib.util, json
def module(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
def found(name, modules):
    if name.startswith("flashinfer"):
        parent, _, attribute = name.rpartition(".")
        return module(name) is not None or parent and hasattr(module(parent), attribute)
    return any(hasattr(module(one), name) for one in modules)
for probe, names in asked.items():
    asked[probe] = [name for name in names if found(name, [one for one in names if one.startswith("flashinfer")])]
print(json.dumps(asked))
"""


def test_probes_find_no_absent_kernel_for_a_kernel() -> None:
    """Where a function that looks for several names finds an absent kernel, it misses another."""
    asked = {probe: names for found in ENGINES.values() for probe, names in found["probes"].items()}
    out, _ = finish(fork(f"asked = {asked}\n{FOUND}"))
    rows = {name.rpartition(".")[2] for name in absent.ROWS}
    assert len(asked) > 20
    for probe, found in json.loads(out).items():
        assert not rows & set(found) or set(found) != set(asked[probe]), f"{probe} takes an absent kernel for one"


def test_attempts_to_import_an_absent_kernel_fail_or_are_harmless() -> None:
    missing = {
        module
        for found in ENGINES.values()
        for module, attempts in found["guarded"].items()
        for names in attempts
        if set(names) & set(absent.ROWS) and all(name in absent.ROWS for name in names)
    }
    assert missing == set(HARMLESS)


ENGINE = {
    "engine/a.py": """
import os
from typing import TYPE_CHECKING
import flashinfer.rope
from flashinfer import rmsnorm, layernorm as norm
from flashinfer_cubin import something
from .flashinfer import local
if TYPE_CHECKING:
    from flashinfer import only_for_types
else:
    from flashinfer import otherwise
if os.name == "posix":
    from flashinfer.decode import conditional
try:
    from flashinfer import attempted
    from flashinfer.comm import attempted_too
except ImportError:
    from flashinfer import instead
class Holder:
    from flashinfer import in_a_class
def later():
    from flashinfer import in_a_function
    try:
        from flashinfer import attempted_later
    except ImportError:
        pass
""",
    "engine/probes/__init__.py": """
def has_moe():
    return hasattr(importlib.import_module("flashinfer.fused_moe"), "cutlass_fused_moe")
def is_mla_there():
    try:
        from flashinfer.mla import Wrapper
    except ImportError:
        return False
    return True
def has_something_else():
    return hasattr(object(), "name")
def chooses():
    return hasattr(flashinfer, "name")
""",
    "engine/tests/test_a.py": "from flashinfer import of_a_test\n",
    "engine/data.txt": "from flashinfer import no_source\n",
}


def engine_imports(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "engine_imports.py", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)


def test_reading_an_engine(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some_engine-1.2-py3-none-any.whl", "w") as wheel:
        for name, text in ENGINE.items():
            wheel.writestr(name, text)
    done = engine_imports("some-engine==1.2", "--wheels", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["some-engine==1.2"]
    at = {"by": "engine.a"}
    assert found["imports"] == {
        "flashinfer.decode.conditional": [{**at, "if": "os.name == 'posix'"}],
        "flashinfer.in_a_class": [at],
        "flashinfer.instead": [at],
        "flashinfer.layernorm": [at],
        "flashinfer.otherwise": [{**at, "if": "not (TYPE_CHECKING)"}],
        "flashinfer.rmsnorm": [at],
        "flashinfer.rope": [at],
    }
    assert found["guarded"] == {
        "engine.a": [["flashinfer.attempted", "flashinfer.comm.attempted_too"], ["flashinfer.attempted_later"]],
        "engine.probes": [["flashinfer.mla.Wrapper"]],
    }
    assert found["probes"] == {
        "engine.probes.has_moe": ["cutlass_fused_moe", "flashinfer.fused_moe"],
        "engine.probes.is_mla_there": ["flashinfer.mla.Wrapper"],
    }


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    done = engine_imports("some-engine==1.2", "--wheels", tmp_path)
    assert done.returncode == 1
    assert "has 0 files some_engine-1.2-*.whl; expected one" in done.stderr
