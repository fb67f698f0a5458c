"""One compile process: `python -m flashinfer.aot.worker PLAN INDEX` compiles one batch of a plan.

Starting Python and NVRTC takes about as long as compiling one small kernel, so a process takes several kernels. It
imports neither torch nor any operator. Each kernel is on disk before its result is reported, so whatever a killed build
had reported need not be built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, Optional

from flashinfer import families
from flashinfer.errors import FlashInferError
from flashinfer.jit.source import render
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import Entry
from flashinfer.jit.toolchain import Toolchain, toolchain

RESULTS = "build.jsonl"  # beside the registry: a line per kernel built or failed; the newest line of a kernel holds


def main(plan: Path, index: int) -> int:
    """Compile a batch; returns 1 when a kernel of it failed."""
    families.register_all()
    batch = json.loads(plan.read_text())
    out = Path(batch["out"])
    failed = False
    for spec in batch["batches"][index]:
        result = _attempt(out, spec)
        failed |= "error" in result
        _report(out, result)
    return int(failed)


def _attempt(out: Path, request: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        entry, spill_bytes = compile_kernel(out, KernelSpec.from_dict(request))
    except (FlashInferError, OSError) as error:
        return {"request": request, "error": str(error)}
    seconds = round(time.perf_counter() - started, 3)
    return {"entry": vars(entry), "seconds": seconds, "spill_bytes": spill_bytes}


def compile_kernel(out: Path, spec: KernelSpec) -> tuple[Entry, int]:
    """Compile one kernel into kernels/<target>/ of a folder. Returns its registry entry and the bytes it spills."""
    source = render(spec)
    compiler = toolchain(source.kind)
    compiled = compiler.compile(source)
    path = out / artifact_name(spec, source.digest, compiler)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(compiled.machine_code)
    partial.replace(path)
    entry = Entry(
        name=spec.name,
        family=spec.family,
        args=dict(spec.args),
        target=spec.target,
        digest=source.digest,
        file=path.relative_to(out).as_posix(),
        sha256=hashlib.sha256(compiled.machine_code).hexdigest(),
        bytes=len(compiled.machine_code),
        compiler=compiler.identity,
        cuda=cuda_version(compiler.identity),
    )
    return entry, sum(map(int, re.findall(r"(\d+) bytes spill stores", compiled.log)))


def artifact_name(spec: KernelSpec, digest: str, compiler: Toolchain) -> str:
    """Relative to the registry. Named by content: a rebuild never touches the files an older registry speaks of."""
    return f"kernels/{spec.target}/{spec.family}-{digest[:20]}{compiler.suffix}"


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
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
