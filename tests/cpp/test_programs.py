"""Programs a user would compile: the examples, by a compiler alone, give what Python's operators give."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import flashinfer
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


def test_program_of_the_page(tmp_path: Path) -> None:
    """docs/cpp.md, compiled as it stands: attention as its comments say, tokens as Python draws them."""
    (source,) = re.findall(r"^```cpp\n(.*?)^```", (ROOT / "docs" / "cpp.md").read_text(), re.M | re.S)
    (tmp_path / "decode.cpp").write_text(source)
    program = compile_program(tmp_path / "decode.cpp", tmp_path / "decode")
    families.register_all()
    root = write_set(tmp_path / "set", read_specs([EXAMPLES / "engine.toml"], [HOST]))
    q = (torch.arange(2 * 8 * 64) % 7 - 3).float().view(2, 8, 64)
    weight = (q[0].sum(-1) * 0.5 / 8).exp()  # of the newest of five keys; the others are zeros
    out = torch.stack(((3 * weight / (weight + 4))[:, None].expand(8, 64), torch.full((8, 64), 3.0)))
    drawn = flashinfer.sampling.top_k_top_p_sampling_from_logits(
        out.reshape(2, 512), 40, 0.9, seed=1, offset=0, filter_apply_order="joint"
    )
    found = re.fullmatch(r"([\d.]+) ([\d.]+), tokens (\d+) (\d+)\n", run_program(program, root))
    assert found is not None
    assert float(found[1]) == pytest.approx(out[0, 0, 0].item(), abs=1e-3) and found[2] == "3.000"
    assert [int(found[3]) // 64, 0 <= int(found[4]) < 512] == [int(drawn[0]) // 64, True]


@pytest.mark.gpu
def test_engine_on_a_gpu(engine: Path) -> None:
    """Of the sets in FLASHINFER_AOT_PATH."""
    if "FLASHINFER_AOT_PATH" not in os.environ:
        pytest.skip("needs a set in FLASHINFER_AOT_PATH")
    found = tokens_of(run_program(engine / "engine", os.environ["FLASHINFER_AOT_PATH"], "cuda"))
    assert found == Engine(torch.device("cuda"), torch.bfloat16).run()
