"""What this library tells an application about itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from flashinfer import env

_MAX_TAG = 200

_tag: ContextVar[str] = ContextVar("flashinfer_tag", default="")


@contextlib.contextmanager
def tag(name: str) -> Iterator[None]:
    """Name the model, or the role, that kernels are asked for by: records of misses, and events, carry it.

        with flashinfer.tag("llama-3-8b/prefill"):
            model(batch)

    The innermost name counts. It holds in this thread, or asyncio task, alone; FLASHINFER_TAG names a whole process.
    Nothing reads it but a request that no precompiled kernel answers, once per kernel and process.

    Raises:
        TypeError: the name is no str.
        ValueError: it is empty, longer than 200 characters, or not printable.
    """
    if not isinstance(name, str):
        raise TypeError(f'tag: name is a {type(name).__name__}; expected a str such as "llama-3-8b/prefill"')
    if not name or len(name) > _MAX_TAG or not name.isprintable():
        raise ValueError(f"tag: name is {name!r:.60}; expected 1 to {_MAX_TAG} printable characters")
    token = _tag.set(name)
    try:
        yield
    finally:
        _tag.reset(token)


def current_tag() -> str:
    """The tag in force; "" without one."""
    return _tag.get() or env.TAG.get()
