"""Operators under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Held for the life of the process: what a Library defines disappears with it.
_library = torch.library.Library("flashinfer", "FRAGMENT")


def compiled_op(schema: str, eager: Callable[..., object]) -> Any:
    """Define `torch.ops.flashinfer.<name>` for torch.compile, and return it.

    Only a traced call goes through it (`if torch.compiler.is_dynamo_compiling()`), so that eager calls stay lean. The
    schema returns nothing and marks what the operator writes, `Tensor(a!) output`; results are allocated by the traced
    caller, so that shapes need no second description in a fake kernel.
    """
    name = schema.partition("(")[0]

    def run(*args: Any) -> None:
        eager(*args)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashinfer::{name}", lambda *args, **kwargs: None, lib=_library)
    return getattr(torch.ops.flashinfer, name).default
