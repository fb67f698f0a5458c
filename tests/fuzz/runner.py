# SPDX-License-Identifier: Apache-2.0
"""Cases in child processes.

The parent imports the library and computes nothing: a fork of it has no threads to lose, starts in milliseconds, and
has prepared no launch yet. A child tells of each call before it makes it, so that the parent knows what a crash or a
silence belongs to, and goes on behind it.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import re
import resource
import select
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional, TextIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flashinfer
from tests.fuzz.call import AMBIENTS, Call, Verdict, judge
from tests.fuzz.draw import Draw
from tests.fuzz.memory import Memory
from tests.fuzz.table import cases

BATCH = 25  # seeds of one function in one child
# Seconds without a word from a child that count as a hang: a kernel may have to be compiled, or another process to be
# waited for that compiles it, which takes a minute at most, on a machine that has other work.
SILENCE = 180.0
ADDRESS_SPACE = 12 << 30  # bytes a child may ask for: a huge allocation is refused, as on any machine it would be


_DEATH = re.compile(r"runtime error:|ERROR: AddressSanitizer|Fatal Python error|^Traceback")


@dataclass
class Finding:
    name: str
    seed: int
    kind: str
    detail: str
    call: str
    changes: tuple[str, ...]
    narrow: bool
    alone: bool = True  # the case shows it by itself, without those before it

    @property
    def command(self) -> str:
        return f"python -m tests.fuzz --only {self.name} --seed {self.seed}{' --narrow' if self.narrow else ''}"

    def __str__(self) -> str:
        changes = "; ".join(self.changes) or "a legal call"
        command = self.command + ("" if self.alone else f"  # not by itself: --count {BATCH} from a seed before it")
        return f"{self.name}: {self.kind}: {self.detail}\n    {self.call}\n    {changes}\n    {command}"


@dataclass
class Report:
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # legal, refused, returned: calls

    def groups(self) -> list[list[Finding]]:
        """Findings that look like one, the simplest of each group first: of a function, and with the same exception or
        the same change; a call with two changes goes to the group of one of them."""
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in sorted(self.findings, key=lambda finding: (len(finding.changes), len(finding.call))):
            labels = [_without_values(change) for change in finding.changes] or [""]
            if finding.kind.endswith("Error") or finding.kind == "error":
                labels = [_without_values(finding.detail)]
            keys = [(finding.name, finding.kind, label) for label in labels]
            groups.setdefault(next((key for key in keys if key in groups), keys[0]), []).append(finding)
        return [groups[key] for key in sorted(groups)]


def _without_values(text: str) -> str:
    return re.sub(r"'[^']*'|-?\d[\d.e+]*", "#", re.sub(r"[^ ]* became .*", "became", text))


def run_case(
    name: str, seed: int, narrow: bool, before: Callable[[Call, str], None], after: Callable[[Verdict], None]
) -> None:
    """In this process. `before` is told of each call, with its text, `after` of what came of it."""
    memory = Memory()
    draw = Draw(name, seed, memory, narrow)
    ambient = draw.choice(AMBIENTS) if draw.chance(0.15) else "none"
    steps = cases()[name](draw)
    try:
        for step in steps:
            for call in step if isinstance(step, list) else [step]:
                if ambient != "none":
                    call = replace(call, ambient=ambient)
                before(call, str(call))  # now: the call may change its arguments
                verdict = judge(call, memory)
                after(verdict)
                if verdict.kind:
                    return
    finally:
        steps.close()
        del steps
        gc.collect()  # wrappers that hold tensors in memory that goes now
        memory.release()


def run_batch(name: str, seeds: Sequence[int], narrow: bool) -> Report:
    """In children, a new one behind each that died."""
    report, left = Report(), list(seeds)
    while left:
        death = _run_child(name, left, narrow, report)
        if death is None:
            break
        report.findings.append(death)
        left = left[left.index(death.seed) + 1 :]
    return report


def _run_child(name: str, seeds: Sequence[int], narrow: bool, report: Report) -> Optional[Finding]:
    """What ended the child early."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.close(reader)
            _be_child(name, seeds, narrow, writer, errors)
        os.close(writer)
        at: dict[str, Any] = {"seed": seeds[0], "call": "", "changes": []}
        kind = ""
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            for line in _lines(pipe):
                if line is None:
                    kind = "hang"
                    os.kill(child, signal.SIGKILL)
                elif "outcome" in line:
                    report.counts[line["outcome"]] += 1
                    if line["kind"]:
                        report.findings.append(_finding(name, at, line["kind"], line["detail"], narrow))
                else:
                    at = line
        _, status = os.waitpid(child, 0)
        if status == 0:
            return None
        if not kind:
            kind = signal.Signals(status & 127).name if os.WIFSIGNALED(status) else f"exit status {status >> 8}"
        errors.seek(0)
        return _finding(name, at, kind, _interesting(errors.read()), narrow)


def _finding(name: str, at: dict[str, Any], kind: str, detail: str, narrow: bool) -> Finding:
    return Finding(name, at["seed"], kind, detail, at["call"], tuple(at["changes"]), narrow)


def _lines(pipe: Any) -> Iterator[Optional[dict[str, Any]]]:
    """What a child says; None, once, if it falls silent."""
    text = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], SILENCE)
        if not ready:
            yield None
            return
        chunk = pipe.read(65536)
        if not chunk:
            return
        *lines, text = (text + chunk).split(b"\n")
        yield from map(json.loads, lines)


def _be_child(name: str, seeds: Sequence[int], narrow: bool, writer: int, errors: TextIO) -> None:
    """Never returns."""
    status = 1

    def say(**what: Any) -> None:
        os.write(writer, json.dumps(what).encode() + b"\n")

    try:
        os.dup2(errors.fileno(), 2)
        faulthandler.enable(errors.fileno(), all_threads=False)
        limit_resources()
        warnings.simplefilter("ignore")

        def after(verdict: Verdict) -> None:
            say(outcome=verdict.outcome, kind=verdict.kind, detail=verdict.detail[:400])

        for seed in seeds:
            say(seed=seed, call="", changes=[])
            run_case(
                name, seed, narrow, lambda call, text, seed=seed: say(seed=seed, call=text, changes=call.changes), after
            )
        status = 0
    except BaseException:
        traceback.print_exc(file=errors)
        errors.flush()
    finally:
        os._exit(status)


def limit_resources() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if "asan" not in os.environ.get("LD_PRELOAD", ""):  # whose shadow memory is larger
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


def _interesting(text: str) -> str:
    """Of what a child wrote as it died: what a sanitizer or the interpreter says, without the frames of this folder."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if "/tests/fuzz/" not in line and "flashinfer] " not in line]
    begin = next((i for i, line in enumerate(lines) if _DEATH.search(line)), max(0, len(lines) - 12))
    return " | ".join(lines[begin : begin + 12])[:600]


def _prepare() -> None:
    """What every child would do anew: import on first use. Objects so far are left out of its garbage collections."""
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))
    with FakeTensorMode():
        torch.zeros(1)
    cases()
    gc.collect()
    gc.freeze()


def run(
    names: Sequence[str], first_seed: int, deadline: float, count: int, narrow: bool, progress: Optional[TextIO]
) -> Report:
    """Batches of every function in turn, until `count` seeds each are done or the time is over."""
    _prepare()
    report = Report()
    for begin in range(first_seed, first_seed + count, BATCH):
        seeds = range(begin, min(begin + BATCH, first_seed + count))
        for name in names:
            if time.monotonic() > deadline:
                return _confirmed(report, narrow)
            batch = run_batch(name, seeds, narrow)
            report.counts.update(batch.counts)
            report.findings += batch.findings
        if progress:
            print(
                f"seeds to {seeds[-1]}: {dict(report.counts)}, {len(report.groups())} findings",
                file=progress,
                flush=True,
            )
    return _confirmed(report, narrow)


def _confirmed(report: Report, narrow: bool) -> Report:
    """Each group's simplest case run by itself, which says whether it needs those before it."""
    for first, *_ in report.groups():
        first.alone = bool(run_batch(first.name, [first.seed], narrow).findings)
    return report


def version() -> str:
    return f"flashinfer {flashinfer.__version__}, torch {torch.__version__}"
