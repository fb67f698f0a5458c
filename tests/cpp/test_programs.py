"""Programs a user would compile: the examples, by a compiler alone, give what Python's operators give."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from flashinfer import families, target
from flashinfer.aot.config import read_specs
from tests.aot.kit import made_once
from tests.cpp.engine_loop import Engine
from tests.cpp.kit import compile_program, run_program, write_set
from tests.kit import ROOT

EXAMPLES = ROOT / "examples" / "cpp"
HOST = target.host()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(
        tmp_path_factory, "engine", lambda folder: compile_program(EXAMPLES / "engine.cpp", folder / "engine")
    )


def tokens_of(output: str) -> list[list[int]]:
    return [list(map(int, line.split())) for line in output.splitlines()]


def test_engine(engine: Path, tmp_path: Path) -> None:
    """Of the set that engine.toml describes."""
    families.register_all()
    root = write_set(tmp_path / "set", read_specs([EXAMPLES / "engine.toml"], [HOST]))
    found = tokens_of(run_program(engine / "engine", root))
    assert found == Engine(torch.device("cpu"), torch.float32).run()
    drawn = {token for tokens in found for token in tokens}
    assert len(found) == 6 and len(drawn) > 20


def test_engine_says_what_is_missing(engine: Path, tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", read_specs([EXAMPLES / "engine.toml"], [HOST])[:3])
    with pytest.raises(AssertionError, match='family = "sample_row"'):
        run_program(engine / "engine", root)


@pytest.mark.gpu
def test_engine_on_a_gpu(engine: Path) -> None:
    """Of the sets in FLASHINFER_AOT_PATH."""
    if "FLASHINFER_AOT_PATH" not in os.environ:
        pytest.skip("needs a set in FLASHINFER_AOT_PATH")
    found = tokens_of(run_program(engine / "engine", os.environ["FLASHINFER_AOT_PATH"], "cuda"))
    assert found == Engine(torch.device("cuda"), torch.bfloat16).run()
