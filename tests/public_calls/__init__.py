# SPDX-License-Identifier: Apache-2.0
"""One small call of every public function and wrapper, for what has to hold for all of them.

A call takes its tensors from `Inputs`, which are made before it, and returns what it returned or wrote. Functions are
looked up by their public names when the call is made.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import flashinfer
from flashinfer import utils
from flashinfer.host.memo import Memo
from tests.public_calls import attention, rows  # noqa: F401  # which fill CALLS
from tests.public_calls.inputs import CALLS, Inputs, tensors

__all__ = [
    "ALIASES", "CALLS", "NO_OPERATORS", "Inputs", "forget_prepared_launches", "prepared_launches", "public_names",
    "tensors",
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


NO_OPERATORS = {"TopKTieBreak", "autotune_v2", "mask", "tag", "variant"}  # an enumeration, contexts, decorators


@functools.cache
def public_names() -> frozenset[str]:
    """What the package exports, and what its modules export besides."""
    names = set(flashinfer._EXPORTS)
    modules: tuple[str, ...] = ("cascade", "decode", "mla", "pod", "prefill", "sparse")
    modules += ("activation", "concat_ops", "gemm", "norm", "page", "quantization", "rope", "sampling", "topk")
    for module in modules:
        exported = getattr(flashinfer, module).__all__
        names |= {f"{module}.{name}" for name in exported if name not in flashinfer._EXPORTS}
    return frozenset(names - NO_OPERATORS)


ALIASES = {
    "mla.BatchDecodeMlaWithPagedKVCacheWrapper",
    "sampling.top_p_renorm_prob",
    "sampling.top_k_renorm_prob",
}  # upstream's older names
