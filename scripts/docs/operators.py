# SPDX-License-Identifier: Apache-2.0
"""Which kernel families each public operator asks for; `main` prints them as JSON.

Every operator is called once on the CPU, in a process of its own, since operators remember what they launch. Kernels do
nothing there, so that only the asking takes time, and memory that they would write holds zeros.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from flashinfer.host import memo
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.spec import KernelSpec
from tests.aot.pretended_gpus import Idle
from tests.public_calls import CALLS, Inputs


class Asked(NamedTuple):
    families: list[str]
    error: str  # of an operator that found zeros where a kernel would have written something else


def asked_by(call: Callable[[], Any]) -> Asked:
    """Of a call in a child of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _ask(call, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("an operator ended its process")
    return Asked(*json.loads(said))


def _ask(call: Callable[[], Any], writing: int) -> None:
    families, error = set(), ""

    def load(resolver: Resolver, spec: KernelSpec) -> Idle:
        families.add(spec.family)
        return Idle(spec)

    def zeros(shape: Any, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
        return lambda: torch.zeros(shape, dtype=dtype, device=device)

    Resolver.load, Resolver.expect = load, lambda resolver, requests: None
    torch.empty, torch.empty_like, memo.allocator = torch.zeros, torch.zeros_like, zeros
    try:
        call()
    except ValueError as refusal:
        error = str(refusal)
    except BaseException as fault:
        error = repr(fault)
        os._exit(1)
    finally:
        os.write(writing, json.dumps([sorted(families), error]).encode())
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    inputs = Inputs(torch.device("cpu"))
    print(json.dumps({name: asked_by(lambda call=call: call(inputs)) for name, call in CALLS.items()}))


if __name__ == "__main__":
    main()
