# SPDX-License-Identifier: Apache-2.0
"""One compile process: `python -m flashinfer.aot.worker PLAN BUILD INDEX` compiles one batch of a plan.

Starting Python and NVRTC takes about as long as compiling one small kernel, so a process takes several kernels. It
imports neither torch nor any operator.

It ends with its build, however that ends. BUILD is its end of a pair of sockets whose other end the build alone holds:
reading it ends when the build has, even by SIGKILL, and the build sees that all compile processes are gone when nobody
holds this end any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Optional

from flashinfer import families
from flashinfer.errors import FlashInferError
from flashinfer.jit import description
from flashinfer.jit.source import render
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import Entry
from flashinfer.jit.toolchain import toolchain

RESULTS = "build.jsonl"  # beside the registry: a line per kernel built or failed; the newest line of a kernel holds
SCRATCH = ".flashinfer-build"  # beside it too, so that a finished file moves to its place in one step


def main(plan: Path, build: int, index: int) -> int:
    """Compile a batch; returns 1 when a kernel of it failed."""
    # The build gave ninja a session of its own, which ninja leads; alive it would start the next batch.
    end_with(build, leader=os.getsid(0))
    families.register_all()
    batch = json.loads(plan.read_text())
    out = Path(batch["out"])
    failed = False
    for spec in batch["batches"][index]:
        failed |= not _attempt(out, spec)
    return int(failed)


def end_with(build: int, leader: Optional[int] = None) -> None:
    """Have this process and its compilers killed once nothing holds the other end of a pipe or socket any more.

    Args:
        build: descriptor of this end.
        leader: another process to be killed, before this one.
    """
    with contextlib.suppress(OSError):  # it leads one already
        os.setpgid(0, 0)  # a group of its own, in which its compilers stay

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(build, 1)
        if leader is not None:
            with contextlib.suppress(OSError):
                os.kill(leader, signal.SIGKILL)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, name="end with the build", daemon=True).start()


def _attempt(out: Path, request: dict[str, Any]) -> bool:
    """Compile one kernel into kernels/<target>/ and report it; whether that worked."""
    started = _cpu_seconds()
    partial = out / SCRATCH / str(os.getpid())
    try:
        entry, spill_bytes = compile_kernel(KernelSpec.from_dict(request), partial)
        path = out / entry.file
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FlashInferError, OSError) as error:
        _report(out, {"request": request, "error": str(error)})
        return False
    seconds = round(_cpu_seconds() - started, 3)
    # In this order, so that a killed build leaves no machine code that no note names. Notes without it are found out by
    # its sha256.
    _report(out, {"entry": vars(entry), "seconds": seconds, "spill_bytes": spill_bytes})
    partial.replace(path)
    return True


def _cpu_seconds() -> float:
    """Of this process and the compilers it has run: what else the machine does is no property of a kernel."""
    return time.process_time() + sum(os.times()[2:4])


def compile_kernel(spec: KernelSpec, file: Path) -> tuple[Entry, int]:
    """Compile one kernel into a file. Returns its registry entry and the bytes it spills."""
    source = render(spec)
    compiler = toolchain(source.kind)
    compiled = compiler.compile(source)
    file.write_bytes(compiled.machine_code)
    sha256 = hashlib.sha256(compiled.machine_code).hexdigest()
    entry = Entry(
        name=spec.name,
        family=spec.family,
        args=dict(spec.args),
        target=spec.target,
        digest=source.digest,
        # By content: whatever is compiled now, an earlier registry still finds what it speaks of.
        file=f"kernels/{spec.target}/{spec.family}-{sha256[:20]}{compiler.suffix}",
        sha256=sha256,
        bytes=len(compiled.machine_code),
        compiler=compiler.identity,
        cuda=cuda_version(compiler.identity),
        launch=description.launch(source),
    )
    return entry, sum(map(int, re.findall(r"(\d+) bytes spill stores", compiled.log)))


def cuda_version(compiler: str) -> Optional[str]:
    """`"nvrtc-13.0-…"` -> `"13.0"`; None for a host compiler."""
    match = re.match(r"nv(?:rtc|cc)-(\d+\.\d+)", compiler)
    return match[1] if match else None


def _report(out: Path, result: dict[str, Any]) -> None:
    # One write of one line to a file opened for appending: lines of several processes do not mix.
    descriptor = os.open(out / RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(result) + "\n").encode())
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
