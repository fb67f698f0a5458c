# SPDX-License-Identifier: Apache-2.0
"""examples/engines/vllm_compare.py and vllm_worker.py with an engine that answers at once: what they ask, and what they
make of answers.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kit import PATIENCE_SECONDS, ROOT

ENGINE = """
import json, os, random, time
from types import SimpleNamespace as Some

__version__ = "0"
SamplingParams = Some
now = time.perf_counter()
time.perf_counter = lambda: now  # whatever else the machine does


def take(seconds):
    global now
    now += seconds


class LLM:
    def __init__(self, attention_config, kv_cache_dtype="auto", **options):
        config = json.load(open(options["model"] + "/config.json"))
        assert config.get("text_config", config)["num_hidden_layers"] == 4
        self.is_ours = attention_config["backend"] == "FLASHINFER"
        assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == str(int(self.is_ours))
        if kv_cache_dtype == "fp8" and self.is_ours:
            raise NotImplementedError("no fp8 here\\nfor two reasons")
        self.is_off = self.is_ours and os.environ.get("OFF") == "1"
        self.builder = Some(build=lambda: take(0.0005))
        backend = Some(get_name=lambda: attention_config["backend"])
        group = Some(backend=backend, get_metadata_builder=lambda ubatch: self.builder)
        runner = Some(attn_groups=[[group]])
        self.llm_engine = Some(
            vllm_config=Some(compilation_config=Some(cudagraph_mode="NONE")),
            model_executor=Some(driver_worker=Some(worker=Some(model_runner=runner))),
            step=lambda: (self.builder.build(), take(0.002 if self.is_ours else 0.004)),
        )
        print("started", options)

    def apply_model(self, change):
        return [0]

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, params, use_tqdm):
        for _ in range(params.max_tokens):
            self.llm_engine.step()
        return [self._answer(prompt["prompt_token_ids"], params) for prompt in prompts]

    def _answer(self, ids, params):
        draw = random.Random(len(ids) + ids[0])
        tokens = [draw.randrange(9) + (9 if self.is_off and i > 2 else 0) for i in range(params.max_tokens)]
        logprobs = [{token: Some(logprob=-1.0), token + 20: Some(logprob=-2.0)} for token in tokens]
        return Some(outputs=[Some(token_ids=tokens, logprobs=logprobs if params.logprobs else None)])
"""


TORCH = """
from types import SimpleNamespace as Some

cuda = Some(is_available=lambda: False)
"""
PROFILER = """
from types import SimpleNamespace as Some

KERNELS = ("prefill", "gemm", "FlashAttention", "gdn_prefill", "chunk_fwd_kernel_o")
ProfilerActivity = Some(CPU=0)


class profile:
    def __init__(self, activities):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass

    @property
    def profiler(self):
        events = [
            Some(name=lambda i=i, name=name: name, device_type=lambda kind=kind: f"DeviceType.{kind}",
                 start_ns=lambda i=i, at=at: 1000000 * i + at, duration_ns=lambda took=took: took)
            for i in range(8)
            for name, kind, at, took in (
                ("cudaGraphLaunch", "CPU", 0, 10000), ("cudaMemcpyAsync", "CPU", 20000, 500000),
                ("attention", "CUDA", 100000, 300000), ("gemm", "CUDA", 300000, 200000),
            )
        ]
        return Some(kineto_results=Some(events=lambda: events))

    def key_averages(self):
        return [Some(key=name, self_device_time_total=1e3) for name in KERNELS]
"""


def compare(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, str, dict[str, Any]]:
    for module in ("entrypoints/llm", "v1/engine/llm_engine", "v1/worker/gpu_worker"):
        file = folder / "vllm" / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (folder / "torch").mkdir()
    for file, text in {"vllm/__init__": ENGINE, "torch/__init__": TORCH, "torch/profiler": PROFILER}.items():
        (folder / f"{file}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    command = [sys.executable, "examples/engines/vllm_compare.py", "--json", str(folder / "all.json"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    return done.returncode, done.stdout + done.stderr, json.loads((folder / "all.json").read_text())["stages"]


def test_engines_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, stages = compare(
        tmp_path, monkeypatch, "--stages", "cold,agree,speed,ngram,xqa,v1", "--models", "llama", "--repeats", "1"
    )
    names = [row.get("engine") for row in stages["cold"]]
    assert names == ["llama A", "llama B", "llama B, AOT"], output
    assert [(row["ok"], row["equal"], row["prompts"]) for row in stages["agree"]] == [(True, 16, 16)] * 3, output
    decode = {(row["engine"], row["row"]): row["ratio"] for row in stages["speed"] if "decode" in row["row"]}
    assert len(decode) == 3 * 5, output
    for (engine, _), ratio in decode.items():
        assert ratio == pytest.approx(1.0 if engine.startswith("llama A") else 1.8), output
    for row in (row for row in stages["speed"] if "decode" in row["row"]):
        step = 4.5 if row["engine"].startswith("llama A") else 2.5
        assert row["host_ms"] == pytest.approx({"layout": 0.5, "step": step}), output
    assert all(row["ok"] for row in stages["ngram"]) and stages["xqa"][0]["ok"], output
    assert {(row["attention"], row["delta_rule"], row["total"]) for row in stages["profile"]} == {(2, 2, 5)}, output
    assert [row["idle"] for row in stages["profile"]] == pytest.approx([4.2] * 5 * 4), output
    for step in (row["steps"] for row in stages["profile"]):
        assert step.pop("host") == {"cudaMemcpyAsync": 0.5}
        assert step == pytest.approx({"step": 1.0, "gpu": 0.4, "idle": 0.6, "on_gpu": 2.0})
    assert code == 0, output


def test_the_gated_delta_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A has vLLM's own, one B that of FlashInfer beside FlashAttention, another all of FlashInfer."""
    options = ("--models", "llama,qwen3.5", "--rows", "prefill 32", "--repeats", "1", "--logs", str(tmp_path / "logs"))
    code, output, stages = compare(tmp_path, monkeypatch, "--stages", "agree,gdn,speed", *options)
    assert code == 0, output
    assert [row["ok"] for row in stages["gdn"] if "pair" in row] == [True] * 3, output
    beside = {row["engine"]: row["ratio"] == 1 for row in stages["speed"]}  # steps here take what FlashAttention's do
    assert beside == {"llama A": True, "llama B": False, "qwen3.5 A": True, "qwen3.5 B": False, "qwen3.5 B gdn": True}
    for engine in beside:
        said = (tmp_path / "logs" / f"{engine.replace(' ', '-')}.log").read_text()
        assert ("'language_model_only': True" in said) == engine.startswith("qwen3.5"), said
        assert ("'gdn_prefill_backend': 'triton'" in said) == (engine == "qwen3.5 A"), said


def test_a_difference_and_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference where there is no tie fails; so does an engine that does not start, and the rest goes on."""
    monkeypatch.setenv("OFF", "1")
    code, output, stages = compare(tmp_path, monkeypatch, "--stages", "fp8,agree", "--models", "llama")
    ours, *themselves = stages["agree"]
    assert code == 1 and not ours["ok"] and ours["equal"] == 0 and ours["first"] == 16, output
    assert all(row["ok"] for row in themselves), output
    assert "fp8" not in stages, output
    for name in ("qwen3 B fp8", "qwen3 B fp8 queries in 16 bits"):
        (row,) = stages[name]
        said = f"Failed: {name}: NotImplementedError: no fp8 here for two reasons (__init__.py:"
        assert row["error"].startswith(said) and "raise NotImplementedError" in row["error"], output


def test_weights_are_the_same_for_all_engines_and_of_some_size() -> None:
    spec = importlib.util.spec_from_file_location("vllm_worker", ROOT / "examples" / "engines" / "vllm_worker.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    models = [torch.nn.Sequential(torch.nn.Linear(1024, 64, bias=False), torch.nn.LayerNorm(64)) for _ in range(2)]
    assert [module.draw_weights(model) for model in models] == [64 * 1024 + 128] * 2
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
    assert 1.2 < (models[0][0](torch.randn(50, 1024))).std() < 1.36

    class GemmaRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.A_log, self.dt_bias = (torch.nn.Parameter(torch.empty(1000)) for _ in range(3))

    norm = GemmaRMSNorm()
    module.draw_weights(norm)
    assert [round(float(x.detach().mean())) for x in (norm.weight, norm.A_log, norm.dt_bias)] == [0, 0, -4]
    forgotten = 1 - (-norm.A_log.exp() * torch.nn.functional.softplus(norm.dt_bias)).exp()
    assert 0.01 < forgotten.mean() < 0.1


def test_out_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, stages = compare(tmp_path, monkeypatch, "--stages", "agree", "--models", "llama", "--budget", "5")
    assert code == 1 and stages["agree"] == [{"error": "not run: out of time"}], output


def test_without_the_engine() -> None:
    """Nothing is begun, instead of a failure in every stage."""
    command = [sys.executable, "examples/engines/vllm_compare.py", "--stages", "agree"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    assert done.returncode == 2 and "vllm is not installed here" in done.stderr
