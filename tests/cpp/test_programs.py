# SPDX-License-Identifier: Apache-2.0
"""Programs a user would compile: the examples, by a compiler alone, give what Python's operators give."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import flashinfer
from flashinfer import families, target
from flashinfer.aot.config import read_specs
from tests.aot.kit import made_once
from tests.cpp.engine_loop import BUDGETS, DIM, KV_HEADS, LENGTHS, QO_HEADS, Engine, table
from tests.cpp.kit import compile_program, run_program, write_set
from tests.kit import ROOT

EXAMPLES = ROOT / "examples" / "cpp"
HOST = target.host()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(
        tmp_path_factory, "engine", lambda folder: compile_program(EXAMPLES / "engine.cpp", folder / "engine")
    )


def ranks(tokens: list[int], num_prompt: int, dtype: torch.dtype) -> list[int]:
    """Of each drawn token, how many had a larger logit: by FP64 from the equations, given the tokens before it."""
    x = torch.tensor(tokens)
    q, k, v = (
        table(which, heads * DIM).view(-1, heads, DIM).to(dtype).double()[x]
        for which, heads in enumerate((QO_HEADS, KV_HEADS, KV_HEADS))
    )
    angles = torch.arange(len(x)).double()[:, None] * 1e4 ** (-2 * torch.arange(DIM // 2).double() / DIM)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    q, k = (
        torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (rows.split(DIM // 2, -1) for rows in (q, k))
    )
    k, v = (rows.repeat_interleave(QO_HEADS // KV_HEADS, 1) for rows in (k, v))
    scores = 0.5 * torch.einsum("ihd,jhd->hij", q, k)
    hidden = torch.ones(len(x), len(x)).triu(1).bool()
    logits = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).reshape(len(x), -1)
    return [int((logits[i] > logits[i, x[i + 1]]).sum()) for i in range(num_prompt - 1, len(x) - 1)]


def require_allowed(found: list[list[int]], dtype: torch.dtype) -> None:
    """Every token is among the 40 likeliest, which are a twelfth of all; of logits that rounding makes equal, 41."""
    drawn = [rank for tokens, length in zip(found, LENGTHS) for rank in ranks(tokens, length, dtype)]
    assert len(drawn) == sum(BUDGETS) and max(drawn) <= 40 and len(set(drawn)) > 10


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
    require_allowed(found, torch.float32)


def test_engine_says_what_is_missing(engine: Path, tmp_path: Path) -> None:
    """All of it at once, as rows that build it, and nothing is served."""
    families.register_all()
    wanted = read_specs([EXAMPLES / "engine.toml"], [HOST])
    root = write_set(tmp_path / "set", wanted[1:2])
    done = subprocess.run([engine / "engine", root], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stdout
    reasons, _, rows = done.stderr.partition("\n\n")
    assert reasons.count(f"for {HOST}:\n  {root}: not in the registry") == 4
    assert "Next step: add these rows to a config" in reasons
    (tmp_path / "mine.toml").write_text(rows)
    assert set(read_specs([tmp_path / "mine.toml"], [HOST])) == {*wanted} - {wanted[1]}


def test_program_of_the_page(tmp_path: Path) -> None:
    """decode.cpp of docs/cpp.md, compiled as it stands: attention as its comments say, tokens as Python draws them."""
    source, _ = re.findall(r"^```cpp\n(.*?)^```", (ROOT / "docs" / "cpp.md").read_text(), re.M | re.S)
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
    lost = subprocess.run([program, tmp_path / "nowhere"], capture_output=True, text=True, check=False)
    assert lost.returncode == 1 and "cannot be read. Next step: name the folder of a set" in lost.stderr


@pytest.mark.gpu
def test_engine_on_a_gpu(engine: Path) -> None:
    """Of the sets in FLASHINFER_AOT_PATH."""
    if "FLASHINFER_AOT_PATH" not in os.environ:
        pytest.skip("needs a set in FLASHINFER_AOT_PATH")
    found = tokens_of(run_program(engine / "engine", os.environ["FLASHINFER_AOT_PATH"], "cuda"))
    require_allowed(found, torch.bfloat16)
    assert found == Engine(torch.device("cuda"), torch.bfloat16).run()


def test_the_plan_of_a_rehearsal_is_not_run(tmp_path: Path) -> None:
    """Its planner was not launched; nor is a plan before it in force."""
    compile_program(ROOT / "tests" / "cpp" / "rehearsals.cpp", tmp_path / "rehearsals")
    command = [tmp_path / "rehearsals", write_set(tmp_path / "empty", [])]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    errors = re.findall(r"^(?:batch_\w+: .*|no kernel .*)", told, re.M)
    assert [error.partition(f" for {HOST}")[0] for error in errors] == [
        "batch_decode: nothing is planned. Next step: plan()",
        "no kernel decode",
        "batch_decode: the last plan was a rehearsal. Next step: plan()",
        "no kernel prefill",
        "batch_prefill: the last plan was a rehearsal. Next step: plan()",
    ], told
