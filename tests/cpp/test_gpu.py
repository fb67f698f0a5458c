# SPDX-License-Identifier: Apache-2.0
"""The C++ headers on a GPU compute, to the bit, what Python's operators compute.

Also a script, for programs and a set built elsewhere: python -m tests.cpp.test_gpu LIBRARY SET [ENGINE]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flashinfer.jit import default_resolver
from tests.cpp import calls
from tests.cpp.engine_loop import Engine
from tests.cpp.kit import Api, run_program, write_set


def compare(case: calls.Case, api: Api, root: Path) -> str:
    """What differs, if anything does. The set is asked for after Python's call."""
    before = [x.clone() for x in case.in_place]
    expected = [x.clone() for x in case.by_python()]
    for x, was in zip(case.in_place, before):
        x.copy_(was)
    kernels = api.open([root], 0)
    found = _poisoned(case, kernels)
    torch.cuda.synchronize()
    for number, (a, b) in enumerate(zip(found, expected)):
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            off = (a.float() - b.float()).abs()
            return (
                f"result {number}: {int((off != 0).sum())} of {off.numel()} elements differ, by {off.max().item():.3g}"
            )
        if b.is_floating_point() and not b.float().isfinite().all():
            return f"result {number} is not finite"
    return ""


def _poisoned(case: calls.Case, kernels: object) -> calls.Tensors:
    """Twice: what the first call wrote is poisoned ahead of the second, where a call does not add to what is there."""
    found = case.by_cpp(kernels)  # type: ignore[arg-type]
    if case.in_place:
        return found
    for x in found:
        x.fill_(float("nan") if x.is_floating_point() else -1)
    return case.by_cpp(kernels)  # type: ignore[arg-type]


def differences(api: Api, root: Path | None) -> Iterator[tuple[str, str]]:
    for number, case in enumerate(calls.cases()):
        if root is not None:
            yield case.name, compare(case, api, root)
            continue
        case.by_python()
        folder = Path(api.library._name).parent / f"gpu-set-{number}"
        yield case.name, compare(case, api, write_set(folder, list(default_resolver().answered_by)))


@pytest.mark.gpu
@pytest.mark.slow  # some sixty kernels, unless a set has them
def test_results(api: Api) -> None:
    wrong = {name: what for name, what in differences(api, None) if what}
    assert not wrong


def main(library: Path, root: Path, engine: Path | None = None) -> int:
    failed = 0
    for name, what in differences(Api(library), root):
        failed += bool(what)
        print(f"{name}: {what or 'alike'}", flush=True)
    if engine is not None:
        output = run_program(engine, root, "cuda")
        found = [list(map(int, line.split())) for line in output.splitlines()]
        is_alike = found == Engine(torch.device("cuda"), torch.bfloat16).run()
        failed += not is_alike
        print(f"engine: {'alike' if is_alike else 'tokens differ'}", flush=True)
    print(f"{failed} differ", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
