# SPDX-License-Identifier: Apache-2.0
"""vLLM with FlashInfer's attention and sampler (B) beside vLLM with FlashAttention and its own sampler (A).

    python examples/engines/vllm_compare.py [--stages cold,agree,plugin,speed,xqa,v1,fp8,ngram] [--models llama,qwen3]
    python examples/engines/vllm_compare.py --stages agree,gdn,speed --models qwen3.5 --rows prefill

Models of the true shapes of Llama-3-8B, Qwen3-8B and Qwen3.5-9B, a few layers, random weights: nothing is downloaded.
Every engine is a process of its own (vllm_engine.py beside this file); those that are compared are alive together and
take turns. README.md says how to install, and what it showed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import importlib.util
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

from vllm_engine import Engine, clock

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    },
    "qwen3.5": {  # of four layers one has attention, the others the gated delta rule
        "architectures": ["Qwen3_5ForConditionalGeneration"], "hidden_size": 4096, "intermediate_size": 12288,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "mamba_ssm_dtype": "float32", "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
    },
}  # fmt: skip
COMMON = {
    "hidden_act": "silu", "max_position_embeddings": 32768, "attention_bias": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = (5, 17, 33, 64, 100, 129, 200, 257, 400, 512, 777, 1024, 1500, 2047, 2500, 3000)
SHARED = 1000  # prompts longer than this begin alike: later ones find the beginning in the prefix cache
NEW_TOKENS = 48
# In log-probability, how far two kernels may be apart, and with it how near a tie is that they may choose differently:
# three steps of bf16, twice that where norms, rotary embedding and SwiGLU round at other places too, and more with keys
# and values in 8 bits.
NEAR, NEAR_BY_OTHER_OPERATORS, NEAR_IN_8_BITS = 0.1, 0.2, 0.4
OURS = {"backend": "FLASHINFER", "use_trtllm_attention": False}  # attention_config
HYBRID = "qwen3.5"  # on Hopper vLLM takes FlashInfer's gated delta rule unless told otherwise, as A is
GRAPHS = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}
STAGES = ("cold", "agree", "plugin", "speed", "fp8", "ngram", "xqa", "v1", "gdn")
STEPS = 32  # of decode, in a profile


def say(*parts: Any) -> None:
    print(f"[{clock.now():6.1f} s]", *parts, flush=True)


def prompts_of(vocab: int, seed: int, lengths: Iterable[int], shared: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    tokens = range(3, vocab)
    head = draw.choices(tokens, k=shared)
    rows = [draw.choices(tokens, k=length) for length in lengths]
    return [head + row[shared:] if shared and len(row) > shared else row for row in rows]


def repetitive(vocab: int, seed: int, lengths: Iterable[int]) -> list[list[int]]:
    """Of a few dozen phrases that come again and again, so that an n-gram proposes what followed the last time."""
    draw = random.Random(seed)
    phrases = [[draw.randrange(3, vocab) for _ in range(8)] for _ in range(12)]
    return [list(itertools.chain(*(draw.choice(phrases) for _ in range(length // 8 + 1)))) for length in lengths]


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Up to the first token of each prompt that differs: until there the contexts are the same."""
    equal = firsts = 0
    apart: list[float] = []
    gaps: list[float] = []
    for a, b in zip(theirs, ours):
        equal += a["tokens"] == b["tokens"]
        firsts += a["tokens"][:1] == b["tokens"][:1]
        for token_a, token_b, of_a, of_b in zip(a["tokens"], b["tokens"], a["logprobs"], b["logprobs"]):
            apart += [abs(of_a[token] - of_b[token]) for token in of_a.keys() & of_b.keys()] or [float("inf")]
            if token_a != token_b:
                best = sorted(of_a.values())[-2:]
                gaps.append(best[1] - best[0])
                break
    apart.sort()
    return {
        "prompts": len(theirs), "equal": equal, "first": firsts, "mean": statistics.fmean(apart),
        "p99": apart[int(0.99 * (len(apart) - 1))], "worst": apart[-1], "gap": max(gaps, default=0.0),
    }  # fmt: skip


class Comparison:
    """The engines of a run, and what came of it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.logs = Path(arguments.logs or folder / "logs")
        self.logs.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = {"stages": {}}
        self.engines: dict[str, Engine] = {}
        for model, shape in SHAPES.items():
            (folder / model).mkdir()
            config = {**COMMON, **shape, "num_hidden_layers": arguments.layers}
            if model == HYBRID:
                names = config.pop("architectures")
                config["model_type"] = "qwen3_5_text"
                config = {"architectures": names, "model_type": "qwen3_5", "text_config": config}
            (folder / model / "config.json").write_text(json.dumps(config))

    def engine(
        self, name: str, model: str, ours: bool, environment: Optional[dict[str, str]] = None, **options: Any
    ) -> Engine:
        """Options beyond those that all have; `attention` adds to attention_config."""
        attention = options.pop("attention", OURS if ours else {"backend": "FLASH_ATTN"})
        if model == HYBRID:
            options["language_model_only"] = True
            if not ours:
                options["additional_config"] = {"gdn_prefill_backend": "triton"}
        given: dict[str, Any] = {
            "model": str(self.folder / model), "load_format": "dummy", "skip_tokenizer_init": True,
            "dtype": "bfloat16", "max_model_len": 20480, "max_num_batched_tokens": 8192, "max_num_seqs": 64,
            "gpu_memory_utilization": 0.12, "kv_cache_memory_bytes": (self.arguments.layers * 3) << 29,
            "seed": 0, "disable_log_stats": True,
            "compilation_config": GRAPHS if self.arguments.compile else {"mode": 0, **GRAPHS},
            "attention_config": attention, **options,
        }  # fmt: skip
        if self.arguments.eager:
            given["enforce_eager"] = True
            del given["compilation_config"]
        if not environment or "VLLM_HAS_FLASHINFER_CUBIN" not in environment:
            given.setdefault("kernel_config", {"enable_flashinfer_autotune": False})
        own = {"VLLM_USE_FLASHINFER_SAMPLER": str(int(ours)), **(environment or {})}
        made = self.engines[name] = Engine(name, given, own, self.logs, ours)
        return made

    def plan(self) -> dict[str, list[Engine]]:
        """The engines of every stage; one may serve several."""
        stages, models = self.arguments.stages, self.arguments.models
        found: dict[str, list[Engine]] = {stage: [] for stage in STAGES}
        first = models[0]
        for model in models:
            a = self.engine(f"{model} A", model, ours=False, environment=self.empty_caches(f"{model}-a"))
            cold = self.empty_caches(f"{model}-b") if model == first and "cold" in stages else {}
            b = self.engine(f"{model} B", model, ours=True, environment=cold)
            found["agree"] += [a, b]
        if "cold" in stages:
            a, b = found["agree"][:2]
            b.environment["FLASHINFER_DISABLE_AOT"] = "1"
            strict = {**self.empty_caches("aot"), "FLASHINFER_DISABLE_JIT": "1"}
            found["cold"] = [a, b, self.engine(f"{first} B, AOT", first, ours=True, environment=strict)]
            if self.arguments.upstream:
                paths = os.pathsep.join([self.arguments.upstream, os.environ.get("PYTHONPATH", "")])
                upstream = {**self.empty_caches("upstream"), "PYTHONPATH": paths}
                found["cold"].append(self.engine(f"{first} B, upstream", first, ours=True, environment=upstream))
        ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
        if "ngram" in stages:
            for side in "AB":
                made = self.engine(f"{first} {side} ngram", first, ours=side == "B", speculative_config=ngram)
                found["ngram"].append(made)
        if "fp8" in stages:
            fp8: dict[str, Any] = {"kv_cache_dtype": "fp8"}
            wide = {**OURS, "disable_flashinfer_q_quantization": True}
            # Unless it is compiled, queries of Llama are cut out of wider rows, which vLLM's own backend asserts
            # against; those of Qwen3 are normalized into rows of their own.
            found["fp8"] = [
                self.engine("qwen3 A fp8", "qwen3", ours=False, **fp8),
                self.engine("qwen3 B fp8 queries in 16 bits", "qwen3", ours=True, attention=wide, **fp8),
                self.engine("qwen3 B fp8", "qwen3", ours=True, **fp8),
            ]
        # What vLLM does on Hopper when NVIDIA's servers, or its cubins, are within reach.
        cubins, attention = {"VLLM_HAS_FLASHINFER_CUBIN": "1"}, {"backend": "FLASHINFER"}
        if "xqa" in stages:
            made = self.engine(f"{first} B xqa", first, True, cubins, attention=attention)
            found["xqa"] = [self.engines[f"{first} A"], made]
        if "plugin" in stages:  # of vllm_plugin, by wrappers and with that decode
            found["plugin"] = [
                self.engines[f"{first} A"],
                self.engine(f"{first} B plugin", first, True, has_plugin=True),
                self.engine(f"{first} B xqa plugin", first, True, cubins, attention=attention, has_plugin=True),
            ]
        if "v1" in stages:  # vLLM's older model runner, which knows the lengths of the batch on the host
            older = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
            found["v1"] = [self.engine(f"{first} {side} v1", first, side == "B", older) for side in "AB"]
        if "gdn" in stages:  # the gated delta rule alone
            alone = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
            made = self.engine(f"{HYBRID} B gdn", HYBRID, True, alone, attention={"backend": "FLASH_ATTN"})
            found["gdn"] = [self.engines[f"{HYBRID} A"], made]
        speed = found["agree"] + found["xqa"][1:] + found["plugin"][1:] + found["v1"] + found["gdn"][1:]
        if self.arguments.engines:
            speed = [engine for engine in speed if engine.name.partition(" ")[2] in self.arguments.engines]
        found["speed"] = sorted(speed, key=lambda engine: models.index(Path(engine.options["model"]).name))
        return {stage: engines for stage, engines in found.items() if stage in stages}

    def empty_caches(self, name: str) -> dict[str, str]:
        root = self.folder / "caches" / name
        return {
            "FLASHINFER_CACHE_DIR": str(root / "flashinfer"), "FLASHINFER_WORKSPACE_BASE": str(root),
            "TRITON_CACHE_DIR": str(root / "triton"), "CUDA_CACHE_PATH": str(root / "nvrtc"),
        }  # fmt: skip

    def run(self) -> None:
        stages = self.plan()
        used = {id(engine): engine for engines in stages.values() for engine in engines}
        needed = collections.Counter(id(engine) for engines in stages.values() for engine in engines)
        for engine in used.values():
            engine.launch()
        for engine in used.values():
            self.attempt(engine.name, engine.answer, clock.left())
        say(f"{len(used)} processes have imported vLLM")
        if "cold" not in stages:
            self.started([*used.values()])
        for stage, engines in stages.items():
            if clock.left() < 15:
                self.note(stage, error="not run: out of time")
                continue
            say(f"---- {stage}")
            self.attempt(stage, getattr(self, f"stage_{stage}"), engines)
            needed.subtract(id(engine) for engine in engines)
            for engine in engines:
                if not needed[id(engine)]:
                    engine.stop()

    def attempt(self, what: str, do: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return do(*arguments)
        except Exception as error:  # the other stages go on
            self.note(what, error=f"{type(error).__name__}: {error}")
            return None

    def note(self, what: str, **found: Any) -> None:
        self.results["stages"].setdefault(what, []).append(found)
        say(what, " ".join(f"{key}={self.shown(value)}" for key, value in found.items()))

    @staticmethod
    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {Comparison.shown(x)}" for key, x in value.items()) + "}"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    def vocab(self, engine: Engine) -> int:
        config = json.loads((Path(engine.options["model"]) / "config.json").read_text())
        return int(config.get("text_config", config)["vocab_size"])

    def started(self, engines: Sequence[Engine]) -> None:
        """Those that are not yet, side by side. What is timed does not begin before all have."""
        missing = [engine for engine in engines if not engine.was_asked]
        with concurrent.futures.ThreadPoolExecutor(len(missing) or 1) as pool:
            list(pool.map(lambda engine: self.attempt(engine.name, engine.start), missing))
            undrawn = [engine for engine in engines if engine.ran and "drawn" not in engine.ran]
            for engine, drawn in zip(undrawn, pool.map(lambda engine: engine.ask("draw"), undrawn)):
                engine.ran["drawn"] = drawn

    # ------------------------------------------------------------------------------------------------------- the stages

    def stage_cold(self, engines: Sequence[Engine]) -> None:
        """From LLM() to the first tokens of 16 prompts, with empty caches. A is first, and warms up the files."""
        for engine in engines:
            self.attempt("cold", self.first_tokens, engine)
            if engine.name.endswith((", AOT", ", upstream")):
                engine.stop()

    def first_tokens(self, engine: Engine) -> None:
        seconds = engine.start()
        first = engine.ask("generate", prompts=prompts_of(self.vocab(engine), 11, LENGTHS), tokens=1)["seconds"]
        second = engine.ask("generate", prompts=prompts_of(self.vocab(engine), 12, LENGTHS), tokens=1)["seconds"]
        described = engine.ask("describe")
        flashinfer = described["flashinfer"] or {}
        counters = flashinfer.get("counters") or {}
        wanted = ("hits", "misses", "compiles", "compile_seconds", "miss_seconds")
        self.note(
            "cold", engine=engine.name, start=seconds, first=first, sum=seconds + first, second=second,
            backends=described["backends"], graphs=described["graphs"],
            counters={name: counters.get(name) for name in wanted},
        )  # fmt: skip
        self.results.setdefault("versions", {})[engine.name] = described

    def agreement(self, stage: str, a: Engine, b: Engine, prompts: list[list[int]], near: float = NEAR) -> None:
        """A and B, each of them with pages in the prefix cache, and with no more than that between the two."""
        if not (a.ran and b.ran):
            return  # which was noted as they were started
        rows: dict[str, list[list[dict[str, Any]]]] = {}
        for engine in (a, b):
            asked: dict[str, Any] = {"prompts": prompts, "tokens": NEW_TOKENS, "logprobs": 5}
            rows[engine.name] = [engine.ask("generate", **asked)["rows"] for _ in range(2)]
        (a1, a2), (b1, b2) = rows[a.name], rows[b.name]
        for what, ours, theirs in (("B v A", b1, a1), ("A cached v A", a2, a1), ("B cached v B", b2, b1)):
            found = compare(ours, theirs)
            ok = found["gap"] <= near and found["p99"] <= near
            self.note(stage, pair=f"{b.name}: {what}", ok=ok, **found)

    def stage_agree(self, engines: Sequence[Engine]) -> None:
        for a, b in zip(engines[::2], engines[1::2]):
            self.attempt("agree", self.pair, a, b)

    def pair(self, a: Engine, b: Engine) -> None:
        self.started([a, b])
        self.agreement("agree", a, b, prompts_of(self.vocab(a), 1, LENGTHS, SHARED))
        for engine in (engine for engine in (a, b) if engine.ran):
            described = engine.ask("describe")
            self.results.setdefault("versions", {})[engine.name] = described
            say(engine.name, described["backends"], described["graphs"])

    def stage_speed(self, engines: Sequence[Engine]) -> None:
        for _, group in itertools.groupby(engines, key=lambda engine: str(engine.options["model"])):
            those = list(group)
            self.started(those)
            those = [engine for engine in those if engine.ran]
            self.attempt("speed", self.in_turns, those)
            self.attempt("profile", self.profiles, those)

    def in_turns(self, engines: Sequence[Engine]) -> None:
        vocab, repeats = self.vocab(engines[0]), self.arguments.repeats
        seeds = itertools.count(100)

        def prefill(engine: Engine, count: int, length: int, seed: int) -> float:
            rows = prompts_of(vocab, seed, [length] * count)
            return count * length / float(engine.ask("generate", prompts=rows, tokens=1)["seconds"])

        def decode(engine: Engine, count: int, sampled: bool) -> float:
            """By the median step: the prompts are in the prefix cache, and what is not decode does not count."""
            rows = prompts_of(vocab, 7, [4096] * count)
            ran = engine.ask("generate", prompts=rows, tokens=130, sampled=sampled)
            engine.ran["host"] = {name: 1e3 * seconds for name, seconds in ran["host"].items()}
            return count / float(ran["step"])

        def row(name: str, time_one: Callable[[Engine, int], float]) -> None:
            if not name.startswith(tuple(self.arguments.rows)) or clock.left() < 10:
                return
            speeds: dict[str, list[float]] = {engine.name: [] for engine in engines}
            for turn in range(repeats + 1):
                seed = next(seeds)  # other tokens each time, or the prefix cache would answer
                for engine in engines if turn % 2 else engines[::-1]:
                    speed = time_one(engine, seed)
                    if turn:  # the first warms up
                        speeds[engine.name].append(speed)
            medians = {name: statistics.median(values) for name, values in speeds.items()}
            beside = engines[0].name
            for engine in engines:
                host = {"host_ms": engine.ran.pop("host")} if "host" in engine.ran else {}
                values = speeds[engine.name]
                beside = beside if engine.is_ours else engine.name  # each B beside the A ahead of it
                self.note(
                    "speed", engine=engine.name, row=name, unit="tokens/s", median=medians[engine.name],
                    best=max(values), worst=min(values), ratio=medians[engine.name] / medians[beside],
                    ratio_of_best=max(values) / max(speeds[beside]), **host,
                )  # fmt: skip

        row("prefill 32 x 2048", lambda engine, seed: prefill(engine, 32, 2048, seed))
        row("prefill 4 x 16384", lambda engine, seed: prefill(engine, 4, 16384, seed))
        row("decode 1 at 4096", lambda engine, _: decode(engine, 1, False))
        row("decode 64 at 4096", lambda engine, _: decode(engine, 64, False))
        row("top-k top-p, decode 64 at 4096", lambda engine, _: decode(engine, 64, True))

    def profiles(self, engines: Sequence[Engine]) -> None:
        vocab = self.vocab(engines[0])
        for name, rows, tokens in (
            ("prefill 32 x 2048", prompts_of(vocab, 98, [2048] * 32), 1),
            ("prefill 4 x 16384", prompts_of(vocab, 99, [16384] * 4), 1),
            (f"decode 64 at 4096, {STEPS} steps, and the prefix", prompts_of(vocab, 7, [4096] * 64), STEPS + 1),
            (f"decode 1 at 4096, {STEPS} steps, and the prefix", prompts_of(vocab, 7, [4096]), STEPS + 1),
        ):
            for engine in engines if name.startswith(tuple(self.arguments.rows)) and clock.left() > 20 else ():
                found = engine.ask("profile", prompts=rows, tokens=tokens)
                self.note("profile", engine=engine.name, row=name, unit="ms of GPU", **found)

    def stage_fp8(self, engines: Sequence[Engine]) -> None:
        self.started(engines)
        prompts = prompts_of(self.vocab(engines[0]), 1, LENGTHS, SHARED)
        for b in engines[1:]:
            self.attempt("fp8", self.agreement, "fp8", engines[0], b, prompts, NEAR_IN_8_BITS)

    def stage_ngram(self, engines: Sequence[Engine]) -> None:
        self.started(engines)
        a, b = engines
        self.agreement("ngram", a, b, repetitive(self.vocab(a), 1, LENGTHS))

    def stage_xqa(self, engines: Sequence[Engine]) -> None:
        self.beside("xqa", *engines)

    def stage_plugin(self, engines: Sequence[Engine]) -> None:
        for engine in engines[1:]:
            self.beside("plugin", engines[0], engine, NEAR_BY_OTHER_OPERATORS)

    def stage_v1(self, engines: Sequence[Engine]) -> None:
        self.beside("v1", *engines)

    def stage_gdn(self, engines: Sequence[Engine]) -> None:
        self.beside("gdn", *engines)

    def beside(self, stage: str, a: Engine, b: Engine, near: float = NEAR) -> None:
        self.started([a, b])
        self.agreement(stage, a, b, prompts_of(self.vocab(a), 1, LENGTHS, SHARED), near)
        if b.ran:
            self.note(stage, engine=b.name, **b.ask("describe"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--stages", type=names, default=list(STAGES[:-1]), help=f"of {','.join(STAGES)}")
    parser.add_argument("--models", type=names, default=["llama", "qwen3"], help=f"of {','.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each row")
    parser.add_argument("--rows", type=names, default=[""], help="of speed, those that begin so: decode,prefill 32")
    parser.add_argument("--engines", type=names, default=[], help="of speed, these: A,B xqa")
    parser.add_argument("--compile", action="store_true", help="torch.compile, as vLLM does by default")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--upstream", metavar="DIR", help="upstream's flashinfer (pip install --target DIR), for cold")
    parser.add_argument("--budget", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--json", metavar="FILE", help="also write everything here")
    parser.add_argument("--logs", metavar="DIR", help="keep what the engines print here")
    arguments = parser.parse_args()
    for given, known in ((arguments.stages, STAGES), (arguments.models, SHAPES)):
        if set(given) - set(known):
            parser.error(f"got {','.join(given)}; expected some of {','.join(known)}")
    if "gdn" in arguments.stages and HYBRID not in arguments.models:
        parser.error(f"got stage gdn of models {','.join(arguments.models)}; expected {HYBRID} among them")
    if importlib.util.find_spec("vllm") is None:
        parser.error("vllm is not installed here; next step: README.md beside this file")
    clock.budget = arguments.budget
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        comparison = Comparison(arguments, Path(folder))
        try:
            comparison.run()
        finally:
            for engine in comparison.engines.values():
                if hasattr(engine, "process"):
                    engine.stop()
            if arguments.json:
                Path(arguments.json).write_text(json.dumps(comparison.results, indent=1))
    stages = comparison.results["stages"].values()
    if any("error" in found or found.get("ok") is False for rows in stages for found in rows):
        sys.exit("something differs or failed: see above, and --logs")


if __name__ == "__main__":
    main()
