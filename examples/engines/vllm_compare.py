"""vLLM with FlashInfer's attention and sampler (B) beside vLLM with FlashAttention and its own sampler (A).

    python examples/engines/vllm_compare.py [--stages cold,agree,speed,v1,xqa,fp8,ngram] [--models llama,qwen3]

Models of the true shapes of Llama-3-8B and Qwen3-8B, a few layers, random weights: nothing is downloaded. Every engine
is a process of its own; two that are compared are alive together and take turns. README.md beside this file says how to
install, and what it showed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

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
}  # fmt: skip
COMMON = {
    "hidden_act": "silu", "max_position_embeddings": 32768, "attention_bias": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = (5, 17, 33, 64, 100, 129, 200, 257, 400, 512, 777, 1024, 1500, 2047, 2500, 3000)
SHARED = 1000  # prompts longer than this begin alike: later ones find the beginning in the prefix cache
NEW_TOKENS = 48
# In log-probability, how far two kernels may be apart, and with it how near a tie is that they may choose differently:
# three steps of bf16, and with keys and values in 8 bits.
NEAR, NEAR_IN_8_BITS = 0.1, 0.4
OURS = {"backend": "FLASHINFER", "use_trtllm_attention": False}  # attention_config
GRAPHS = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}
STAGES = ("cold", "agree", "speed", "fp8", "ngram", "xqa", "v1")
STEPS = 32  # of decode, in a profile


# ----------------------------------------------------------------------------------------------- in an engine's process


def draw_weights(model: Any) -> int:
    """With vLLM's own dummy weights attention hardly matters. These keep activations of unit size, and scores apart."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator(device=parameter.device).manual_seed(zlib.crc32(name.encode()))
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.1, generator=generator)
            else:
                deviation = 1.0 if "embed" in name else 1.28 / parameter.shape[-1] ** 0.5
                parameter.normal_(0.0, deviation, generator=generator)
    return sum(parameter.numel() for parameter in model.parameters())


def steps_of(events: Sequence[tuple[str, bool, int, int]]) -> Optional[dict[str, Any]]:
    """Of one step of decode, which is one replay of a graph: milliseconds from one to the next, in which the GPU works,
    in which it has nothing to do, and in which the host waits in calls of CUDA; and how many kernels and copies run.

    events: name, whether it is the GPU's, begin and end in nanoseconds.
    """
    replays = sorted(begin for name, _, begin, _ in events if name.startswith("cudaGraphLaunch"))
    if len(replays) < 6:
        return None
    first, last, count = replays[3], replays[-1], len(replays) - 4  # the first steps are not yet in step
    of_gpu = sorted((begin, end) for _, is_gpu, begin, end in events if is_gpu and first <= begin < last)
    busy = reached = 0
    for begin, end in of_gpu:
        busy += max(0, min(end, last) - max(begin, reached))
        reached = max(reached, end)
    waits: dict[str, float] = {}
    for name, is_gpu, begin, end in events:
        if not is_gpu and first <= begin < last and ("Synchronize" in name or "Memcpy" in name):
            waits[name] = waits.get(name, 0.0) + (end - begin) / 1e6 / count
    span = (last - first) / 1e6 / count
    return {
        "step": span, "gpu": busy / 1e6 / count, "idle": span - busy / 1e6 / count, "on_gpu": len(of_gpu) / count,
        "host": {name: round(ms, 4) for name, ms in waits.items()},
    }  # fmt: skip


def wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def noted(holder: Any, name: str) -> list[tuple[float, float]]:
    """When calls of a function begin and end, from now on."""
    call, times = getattr(holder, name), []

    def timed(*given: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        result = call(*given, **named)
        times.append((begin, time.perf_counter()))
        return result

    setattr(holder, name, timed)
    return times


class Worker:
    """What the other process asks for, by name."""

    def __init__(self) -> None:
        import vllm  # before there is anything to time
        import vllm.entrypoints.llm
        import vllm.v1.engine.llm_engine
        import vllm.v1.worker.gpu_worker

        self.version = vllm.__version__
        self.llm: Any = None

    def start(self, **options: Any) -> dict[str, Any]:
        from vllm import LLM

        begin = time.perf_counter()
        self.llm = LLM(**options)
        seconds = time.perf_counter() - begin
        # On the host, of every step: all of it, the layout of its batch for attention, and of that the plan of decode.
        self.times = {"step": noted(self.llm.llm_engine, "step")}
        for group in itertools.chain.from_iterable(self.runner().attn_groups):
            self.times["layout"] = noted(group.get_metadata_builder(0), "build")
        backend = sys.modules.get("vllm.v1.attention.backends.flashinfer")
        if backend is not None:
            self.times["plan"] = noted(backend, "fast_plan_decode")
        return {"seconds": seconds}

    def runner(self) -> Any:
        worker = self.llm.llm_engine.model_executor.driver_worker
        return getattr(worker, "worker", worker).model_runner

    def draw(self) -> dict[str, Any]:
        if hasattr(os, "sched_setaffinity"):  # this thread, of every engine on the same processor: they take turns
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        parameters = self.llm.apply_model(draw_weights)
        self.llm.reset_prefix_cache()  # of other weights
        return {"parameters": parameters}

    def generate(
        self, prompts: list[list[int]], tokens: int, logprobs: Optional[int] = None, sampled: bool = False
    ) -> dict[str, Any]:
        from vllm import SamplingParams

        how = {"temperature": 0.8, "top_k": 50, "top_p": 0.9} if sampled else {"temperature": 0.0}
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs, **how)
        for times in self.times.values():
            times.clear()
        wait()
        begin = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        wait()
        seconds, rows = time.perf_counter() - begin, []
        for output in outputs if logprobs else ():
            best = output.outputs[0]
            rows.append(
                {
                    "tokens": list(best.token_ids),
                    "logprobs": [{str(t): p.logprob for t, p in step.items()} for step in best.logprobs],
                }
            )
        host = {
            name: statistics.median(end - begin for begin, end in times) for name, times in self.times.items() if times
        }
        ends = [end for _, end in self.times["step"]][4:]  # the first are not yet in step
        between = [after - before for before, after in itertools.pairwise(ends)]
        return {"seconds": seconds, "rows": rows, "host": host, "step": statistics.median(between) if between else 0.0}

    def profile(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """GPU time, milliseconds: of everything, and of the kernels of attention."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        there = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
        with profile(activities=[there]) as profiled:
            self.generate(prompts, tokens)
        kernels = {event.key: event.self_device_time_total / 1e3 for event in profiled.key_averages()}
        words = ("flash", "attention", "prefill", "decode", "merge", "combine", "plan")
        of_attention = {name: ms for name, ms in kernels.items() if any(word in name.lower() for word in words) and ms}
        longest = sorted(kernels.items(), key=lambda item: -item[1])[:8]
        events = [
            (event.name(), "CUDA" in str(event.device_type()), event.start_ns(), event.start_ns() + event.duration_ns())
            for event in profiled.profiler.kineto_results.events()
        ]
        return {
            "steps": steps_of(events),
            "total": sum(kernels.values()),
            "attention": sum(of_attention.values()),
            "longest": [(name[:90], ms) for name, ms in longest],
        }

    def describe(self) -> dict[str, Any]:
        config = self.llm.llm_engine.vllm_config
        groups = itertools.chain.from_iterable(self.runner().attn_groups)
        found: dict[str, Any] = {
            "vllm": self.version,
            "backends": sorted({group.backend.get_name() for group in groups}),
            "graphs": str(config.compilation_config.cudagraph_mode),
            "flashinfer": None,
        }
        flashinfer = sys.modules.get("flashinfer")
        if flashinfer is not None:
            events = getattr(flashinfer, "events", None)  # upstream has none
            found["flashinfer"] = {
                "version": flashinfer.__version__,
                "file": flashinfer.__file__,
                "counters": events.counters() if events else None,
            }
        return found


def serve() -> None:
    """Answers one JSON line with another. What vLLM prints goes where the parent process has it go."""
    answers = os.fdopen(int(sys.argv[sys.argv.index("--worker") + 1]), "w", buffering=1)
    worker: Optional[Worker] = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if worker is None:
                worker = Worker()
            answer = getattr(worker, asked.pop("do"))(**asked) if asked["do"] != "import" else {"vllm": worker.version}
        except Exception as error:
            import traceback

            traceback.print_exc()
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
            answer = {"error": " ".join(f"{type(error).__name__}: {error} ({where})".split())[:400]}
        answers.write(json.dumps(answer) + "\n")


# ------------------------------------------------------------------------------------------------- in the one that asks


class Failed(Exception):
    pass


@dataclass
class Engine:
    """A process with vLLM in it."""

    name: str
    options: dict[str, Any]  # of vllm.LLM
    environment: dict[str, str]
    logs: Path
    ran: dict[str, Any] = field(default_factory=dict)
    was_asked: bool = False  # to start

    @property
    def is_ours(self) -> bool:
        return bool(self.options["attention_config"]["backend"] == "FLASHINFER")

    def launch(self) -> Engine:
        """Begin to import vLLM, without waiting for it."""
        read_end, write_end = os.pipe()
        self.log = self.logs / f"{self.name.replace(' ', '-')}.log"
        defaults = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where the model can be reached
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", os.path.abspath(__file__), "--worker", str(write_end)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True, pass_fds=(write_end,),
                env={**defaults, **os.environ, **self.environment}, start_new_session=True,
            )  # fmt: skip
        os.close(write_end)
        self.answers = os.fdopen(read_end)
        self._send({"do": "import"})
        return self

    def _send(self, asked: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()

    def answer(self, limit: float) -> dict[str, Any]:
        """Of what was asked last. Raises Failed."""
        ready, _, _ = select.select([self.answers], [], [], max(limit, 1))
        line = self.answers.readline() if ready else None
        if not line:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
            why = f"no answer in {limit:.0f} s" if line is None else f"the process ended: {tail[0][:200]}"
            raise Failed(f"{self.name}: {why}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, do: str, limit: float = 300, **arguments: Any) -> dict[str, Any]:
        self._send({"do": do, **arguments})
        return self.answer(min(limit, clock.left()))

    def start(self) -> float:
        self.was_asked = True
        self.ran = self.ask("start", **self.options)
        return float(self.ran["seconds"])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Clock:
    budget = 3600.0
    begin = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self.begin

    def left(self) -> float:
        return self.budget - self.now()


clock = Clock()


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
            (folder / model / "config.json").write_text(json.dumps(config))

    def engine(
        self, name: str, model: str, ours: bool, environment: Optional[dict[str, str]] = None, **options: Any
    ) -> Engine:
        """Options beyond those that all have; `attention` adds to attention_config."""
        attention = options.pop("attention", OURS if ours else {"backend": "FLASH_ATTN"})
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
        made = self.engines[name] = Engine(name, given, own, self.logs)
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
        if "xqa" in stages:  # what vLLM does on Hopper when NVIDIA's servers, or its cubins, are within reach
            cubins, attention = {"VLLM_HAS_FLASHINFER_CUBIN": "1"}, {"backend": "FLASHINFER"}
            found["xqa"] = [self.engine(f"{first} B xqa", first, True, cubins, attention=attention)]
        if "v1" in stages:  # vLLM's older model runner, which knows the lengths of the batch on the host
            older = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
            found["v1"] = [self.engine(f"{first} {side} v1", first, side == "B", older) for side in "AB"]
        found["speed"] = found["agree"][:2] + found["xqa"] + found["v1"] + found["agree"][2:]
        return {stage: engines for stage, engines in found.items() if stage in stages}

    def empty_caches(self, name: str) -> dict[str, str]:
        root = self.folder / "caches" / name
        return {
            "FLASHINFER_CACHE_DIR": str(root / "flashinfer"), "FLASHINFER_WORKSPACE_BASE": str(root),
            "TRITON_CACHE_DIR": str(root / "triton"),
        }  # fmt: skip

    def run(self) -> None:
        stages = self.plan()
        used = {id(engine): engine for engines in stages.values() for engine in engines}
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
            if stage not in ("cold", "agree", "v1"):
                for engine in engines:
                    if stage != "speed" or not engine.name.startswith(self.arguments.models[0]):
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
        return int(json.loads((Path(engine.options["model"]) / "config.json").read_text())["vocab_size"])

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
        row("decode 64 at 4096", lambda engine, _: decode(engine, 64, False))
        row("decode 1 at 4096", lambda engine, _: decode(engine, 1, False))
        row("top-k top-p, decode 64 at 4096", lambda engine, _: decode(engine, 64, True))

    def profiles(self, engines: Sequence[Engine]) -> None:
        vocab = self.vocab(engines[0])
        for name, rows, tokens in (
            ("prefill 4 x 16384", prompts_of(vocab, 99, [16384] * 4), 1),
            (f"decode 64 at 4096, {STEPS} steps, and the prefix", prompts_of(vocab, 7, [4096] * 64), STEPS + 1),
            (f"decode 1 at 4096, {STEPS} steps, and the prefix", prompts_of(vocab, 7, [4096]), STEPS + 1),
        ):
            for engine in engines if name.startswith(tuple(self.arguments.rows)) else ():
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

    def stage_v1(self, engines: Sequence[Engine]) -> None:
        self.started(engines)
        self.agreement("v1", *engines, prompts_of(self.vocab(engines[0]), 1, LENGTHS, SHARED))

    def stage_xqa(self, engines: Sequence[Engine]) -> None:
        (b,) = engines
        self.started(engines)
        if not b.ran:
            return
        others = [engine for engine in self.engines.values() if engine.name.endswith(" A") and engine.ran]
        asked: dict[str, Any] = {"tokens": NEW_TOKENS, "logprobs": 5}
        asked["prompts"] = prompts_of(self.vocab(b), 1, LENGTHS, SHARED)
        rows = b.ask("generate", **asked)["rows"]
        if others and others[0].process.poll() is None:
            found = compare(rows, others[0].ask("generate", **asked)["rows"])
            self.note("xqa", pair=f"{b.name} v {others[0].name}", ok=found["gap"] <= NEAR, **found)
        self.note("xqa", engine=b.name, **b.ask("describe"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--stages", type=names, default=list(STAGES), help=f"of {','.join(STAGES)}")
    parser.add_argument("--models", type=names, default=list(SHAPES), help=f"of {','.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each row")
    parser.add_argument("--rows", type=names, default=[""], help="of speed, those that begin so: decode,prefill 32")
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
    serve() if "--worker" in sys.argv else main()
