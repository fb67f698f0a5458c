# SPDX-License-Identifier: Apache-2.0
"""The process of one engine of vllm_compare.py: answers a line of JSON with another, by the methods of Worker."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import statistics
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

# Mean and deviation of what decides how fast the gated delta rule forgets: some hundredths of a state with each token.
VECTORS = {"A_log": (0.0, 0.5), "dt_bias": (-4.0, 1.0)}


def draw_weights(model: Any) -> int:
    """With vLLM's own dummy weights attention hardly matters. These keep activations of unit size, and scores apart."""
    import torch

    with torch.no_grad():
        for prefix, module in model.named_modules():
            norm = (0.0 if "Gemma" in type(module).__name__ else 1.0, 0.1)  # Gemma's adds 1 itself
            for name, parameter in module.named_parameters(prefix, recurse=False):
                generator = torch.Generator(device=parameter.device).manual_seed(zlib.crc32(name.encode()))
                mean, deviation = VECTORS.get(name.rpartition(".")[2], norm)
                if parameter.dim() > 1:
                    mean, deviation = 0.0, 1.0 if "embed" in name else 1.28 / parameter.shape[-1] ** 0.5
                parameter.normal_(mean, deviation, generator=generator)
    return sum(parameter.numel() for parameter in model.parameters())


Event = tuple[str, bool, int, int]  # name, whether it is the GPU's, begin and end in nanoseconds


def busy_of(events: Sequence[Event], first: int, last: int) -> int:
    """Nanoseconds between two moments in which the GPU works."""
    busy = reached = 0
    for begin, end in sorted((begin, end) for _, is_gpu, begin, end in events if is_gpu and first <= begin < last):
        busy += max(0, min(end, last) - max(begin, reached))
        reached = max(reached, end)
    return busy


def steps_of(events: Sequence[Event]) -> Optional[dict[str, Any]]:
    """Of one step of decode, which is one replay of a graph: milliseconds from one to the next, in which the GPU works,
    in which it has nothing to do, and in which the host waits in calls of CUDA; and how many kernels and copies run."""
    replays = sorted(begin for name, _, begin, _ in events if name.startswith("cudaGraphLaunch"))
    if len(replays) < 6:
        return None
    first, last, count = replays[3], replays[-1], len(replays) - 4  # the first steps are not yet in step
    waits: dict[str, float] = {}
    for name, is_gpu, begin, end in events:
        if not is_gpu and first <= begin < last and ("Synchronize" in name or "Memcpy" in name):
            waits[name] = waits.get(name, 0.0) + (end - begin) / 1e6 / count
    span, busy = (last - first) / 1e6 / count, busy_of(events, first, last) / 1e6 / count
    return {
        "step": span, "gpu": busy, "idle": span - busy,
        "on_gpu": sum(is_gpu and first <= begin < last for _, is_gpu, begin, _ in events) / count,
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


KERNELS = {  # words in the names of kernels; the first that has one
    "delta_rule": ("gdn_", "delta_rule", "chunk_fwd", "chunk_scaled", "chunk_local", "recompute_w_u", "inverse_kernel"),
    "attention": ("flash", "attention", "prefill", "decode", "merge", "combine", "plan"),
}


class Worker:
    """What the other process asks for, by name."""

    def __init__(self) -> None:
        import vllm  # before there is anything to time
        import vllm.entrypoints.llm
        import vllm.v1.engine.llm_engine
        import vllm.v1.worker.gpu_worker

        self.version = vllm.__version__
        self.llm: Any = None

    def start(self, has_plugin: bool = False, **options: Any) -> dict[str, Any]:
        """has_plugin: with vllm_plugin, as if it were installed; `options` are vllm.LLM's."""
        from vllm import LLM

        if has_plugin:
            sys.path.append(str(Path(__file__).parent / "vllm_plugin"))
            plugin = importlib.import_module("vllm_flashinfer")
            plugin.register()
            options["ir_op_priority"] = plugin.PRIORITY
        self.kernels: list[dict[str, Any]] = []
        begin = time.perf_counter()
        self.note_kernels(begin)
        self.llm = LLM(**options)
        seconds = time.perf_counter() - begin
        # On the host, of every step: all of it, the layout of its batch for attention, and of that the plan of decode.
        self.times = {"step": noted(self.llm.llm_engine, "step")}
        groups = list(itertools.chain.from_iterable(self.runner().attn_groups))
        for i, group in enumerate(groups):
            name = f"layout {i}, {group.backend.get_name()}" if len(groups) > 1 else "layout"
            self.times[name] = noted(group.get_metadata_builder(0), "build")
        backend = sys.modules.get("vllm.v1.attention.backends.flashinfer")
        if backend is not None:
            self.times["plan"] = noted(backend, "fast_plan_decode")
        return {"seconds": seconds}

    def note_kernels(self, begin: float) -> None:
        """What each kernel took that had to be found: when that had ended, seconds from `begin`, and how long it was
        waited for, or compiled."""
        try:
            from flashinfer import events
        except ImportError:  # upstream has none
            return

        def note(event: events.Event) -> None:
            if event.kind != "hit":
                at = time.perf_counter() - begin
                self.kernels.append({"kind": event.kind, "kernel": event.kernel, "at": at, "seconds": event.seconds})

        events.subscribe(note)

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
        """GPU time, milliseconds: of everything, and of the kernels of attention and of the gated delta rule; `idle`
        is what lies between the first and the last of it."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        there = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
        with profile(activities=[there]) as profiled:
            self.generate(prompts, tokens)
        kernels = {event.key: event.self_device_time_total / 1e3 for event in profiled.key_averages()}
        parts = dict.fromkeys(KERNELS, 0.0)
        for kernel, ms in kernels.items():
            of = [part for part, words in KERNELS.items() if any(word in kernel.lower() for word in words)]
            if of:
                parts[of[0]] += ms
        longest = sorted(kernels.items(), key=lambda item: -item[1])[:8]
        events = [
            (event.name(), "CUDA" in str(event.device_type()), event.start_ns(), event.start_ns() + event.duration_ns())
            for event in profiled.profiler.kineto_results.events()
        ]
        first = min((begin for _, is_gpu, begin, _ in events if is_gpu), default=0)
        last = max((end for _, is_gpu, _, end in events if is_gpu), default=0)
        return {
            "steps": steps_of(events),
            "idle": (last - first - busy_of(events, first, last)) / 1e6,
            "total": sum(kernels.values()),
            **parts,
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
                "kernels": self.kernels,
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


if __name__ == "__main__":
    serve()
