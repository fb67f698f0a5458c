# SPDX-License-Identifier: Apache-2.0
"""One small call of every public function and wrapper, for what has to hold for all of them.

A call takes its tensors from `Inputs`, which are made before it, and returns what it returned or wrote. Functions are
looked up by their public names when the call is made.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from typing import Any

import flashinfer
from flashinfer import utils
from flashinfer.host.memo import Memo
from tests.public_calls import attention, rows  # noqa: F401  # which fill CALLS
from tests.public_calls.inputs import CALLS, Inputs, tensors

__all__ = [
    "ALIASES", "CALLS", "NO_OPERATORS", "Inputs", "forget_prepared_launches", "prepared_launches", "public_modules",
    "public_names", "tensors",
]  # fmt: skip

CALLS["utils.get_alibi_slopes"] = lambda i: [utils.get_alibi_slopes(6), utils.get_alibi_slopes(6, i.device)]
CALLS["utils.get_indptr"] = lambda i: utils.get_indptr(i.last_page_len)


def prepared_launches() -> list[Memo[Any]]:
    """The memos of all operators, each a global of its module; those of wrappers end with them."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("flashinfer.")]
    return [found for module in modules for found in vars(module).values() if type(found) is Memo]


def forget_prepared_launches() -> None:
    """So that the next call is the first of its kind."""
    for memo in prepared_launches():
        memo.clear()


# Modules with public names that are no operators, and operators that take several processes.
_OTHER_MODULES = {"autotuner", "events", "jit", "parallel"}
NO_OPERATORS = {"TopKTieBreak", "autotune_v2", "mask", "tag", "variant"}  # an enumeration, contexts, decorators


@functools.cache
def public_modules() -> dict[str, list[str]]:
    """Of the package, those with operators, and what each exports."""
    found = [module.name for module in pkgutil.iter_modules(flashinfer.__path__)]
    modules = {name: importlib.import_module(f"flashinfer.{name}") for name in found if name not in _OTHER_MODULES}
    return {name: module.__all__ for name, module in modules.items() if hasattr(module, "__all__")}


@functools.cache
def public_names() -> frozenset[str]:
    """What the package exports, and what its modules export besides."""
    names = set(flashinfer._EXPORTS)
    for module, exported in public_modules().items():
        names |= {f"{module}.{name}" for name in exported if name not in flashinfer._EXPORTS}
    return frozenset(names - NO_OPERATORS)


ALIASES = {
    "mla.BatchDecodeMlaWithPagedKVCacheWrapper",
    "sampling.top_p_renorm_prob",
    "sampling.top_k_renorm_prob",
}  # upstream's older names
