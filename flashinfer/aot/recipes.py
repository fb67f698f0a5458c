# SPDX-License-Identifier: Apache-2.0
"""Recipes: how the source text of a kernel follows from what it is asked for, for hosts that compile without Python.

The text that an implementation renders (jit/source.py) is the same for all specs but for constants and its first line.
A recipe is that text with a place for them, and for each constant a tree, which asks for values of axes one after the
other. Both come from rendering every spec of the operators of include/flashinfer: tile tables stay where they are, and
nothing of them is written twice. include/flashinfer/jit.hpp follows recipes; docs/registry.md is the format.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from flashinfer import dtypes, families
from flashinfer import target as targets
from flashinfer.errors import FlashInferError, ToolchainMissing, UnsupportedConfig
from flashinfer.families import norm, page, rope, sampling
from flashinfer.families.attention import decode, mla, prefill
from flashinfer.families.attention.params import HEAD_DIMS, KV_DTYPES, Q_DTYPES, QUERIES
from flashinfer.families.layout import DTYPES, FP8_DTYPES
from flashinfer.jit import description, source, toolchain
from flashinfer.jit import spec as specs
from flashinfer.jit.spec import Config, Implementation, KernelSpec
from flashinfer.version import __version__

FORMAT = 1
_HIDDEN_SIZES = range(64, 16385, 64)
_HEAD_DIMS = range(16, 257, 16)
# Of keys and values that an append moves: equal, and those of DeepSeek's models.
_APPENDED = (*((dim, dim) for dim in _HEAD_DIMS), (192, 128), (512, 64), (256, 64))
_ATTENDED = (*((dim, dim) for dim in HEAD_DIMS), (192, 128))
_BOTH = (False, True)

# A text; `(axis,)`, the value of an axis; or `(axis, (values, tree), …)`, what follows from them.
Tree = Union[str, tuple[Any, ...]]
Asked = tuple[Callable[..., KernelSpec], dict[str, Any]]  # of a target, and these arguments


def write(path: Path, target_names: Sequence[str]) -> int:
    """Write the recipes of these targets, all of GPUs; how many kernels they are of.

    Raises UnsupportedConfig for another target, FlashInferError where the file cannot be written.
    """
    families.register_all()
    for name in target_names:
        if targets.kind(name) != "cuda":
            raise UnsupportedConfig(
                f"recipes are for NVRTC, which compiles for GPUs; got {name}, expected sm_90a or so"
            )
    wanted = {name: _configs(name) for name in target_names}
    recipes = {name: _by_family(configs) for name, configs in wanted.items()}
    headers = {name for of in recipes.values() for one in of.values() for how in one["by"] for name in how["headers"]}
    data = {
        "format": FORMAT,
        "version": __version__,
        "flags": source.FLAGS["cuda"],
        "options": toolchain.Nvrtc.OPTIONS,
        "places": _places(),
        "headers": dict(source.header_digest(name).split(":") for name in sorted(headers)),
        "targets": recipes,
    }
    try:
        partial = path.with_name(f"{path.name}.partial")  # programs may read the file that is there
        partial.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise FlashInferError(f"{path} cannot be written: {error.strerror}") from error
    return sum(map(len, wanted.values()))


def _places() -> dict[str, str]:
    """Where this machine has what a compile takes: of another, a program is told."""
    places = {"csrc": str(source.include_root())}
    with contextlib.suppress(ToolchainMissing):
        places.update(nvrtc=toolchain.nvrtc_library().path, cuda_include=str(toolchain.cuda_include()))
    return places


# ------------------------------------------------------------------------------------------------ what may be asked for


def asked(target: str) -> Iterator[Asked]:
    """How the operators of include/flashinfer may ask for kernels, in the words of Python's own; some of it nobody
    serves."""
    return itertools.chain(_elementwise(), _sampled(target), _attention())


def _configs(target: str) -> dict[KernelSpec, Config]:
    """Of each kernel that is there, what the compiler is told."""
    configs = {}
    for ask, axes in asked(target):
        with contextlib.suppress(UnsupportedConfig):
            spec = ask(target, **axes)
            configs[spec] = specs.family(spec.family).config(spec)
    return configs


def _elementwise() -> Iterator[Asked]:
    for dtype, size, vec, add, gemma in itertools.product(DTYPES, _HIDDEN_SIZES, norm.VEC_SIZES, _BOTH, _BOTH):
        if vec * dtypes.ITEMSIZE[dtype] <= 16:
            axes = {"dtype": dtype, "hidden_size": size, "vec_size": vec, "add_residual": add, "gemma": gemma}
            yield norm.RMSNORM.spec, axes
    caches = [(dtype, cache) for dtype in DTYPES for cache in (dtype, *FP8_DTYPES)] + [(one, one) for one in FP8_DTYPES]
    for (dtype, cache), (key, value), token_index, page_index, vec, heads in itertools.product(
        caches, _APPENDED, page.INDEX_TYPES, page.INDEX_TYPES, page.VEC_SIZES, (1, 2, 4)
    ):
        if vec * max(dtypes.ITEMSIZE[dtype], dtypes.ITEMSIZE[cache]) <= 16 and (key + value) // vec <= 1024:
            axes = {
                **{"dtype": dtype, "cache_dtype": cache, "key_dim": key, "value_dim": value, "vec_size": vec},
                **{"token_index": token_index, "page_index": page_index, "heads_per_thread": heads},
            }
            yield page.APPEND_PAGED_KV.spec, axes
    for dtype, dim, interleave, index, vec in itertools.product(
        DTYPES, _HEAD_DIMS, _BOTH, page.INDEX_TYPES, page.VEC_SIZES[:-1]
    ):
        for rotary_dim, part_only in itertools.product(range(16, dim + 1, 16), _BOTH):
            fits = vec * dtypes.ITEMSIZE[dtype] <= 16 and rotary_dim // 2 % vec == 0 and (dim // 2 % vec == 0)
            if fits and (not interleave or vec >= 2) and (not part_only or rotary_dim < dim):
                axes = {
                    **{"dtype": dtype, "head_dim": dim, "rotary_dim": rotary_dim, "interleave": interleave},
                    **{"cos_sin": "computed", "position_index": index, "vec_size": vec, "ragged": False},
                    "rotary_part_only": part_only,
                }
                yield rope.ROPE.spec, axes


def _sampled(target: str) -> Iterator[Asked]:
    # On one SM, so few rows have every cluster size.
    rows = itertools.product(DTYPES, _BOTH, range(1024, (1 << 18) + 1, 1024), range(4))
    places = {
        (dtype, keeps_row, *sampling.placement(dtype, vocab_size, num_rows, 1, target, keeps_row).values())
        for dtype, keeps_row, vocab_size, num_rows in rows
    }
    for dtype, keeps_row, cluster_size, row_kib in sorted(places):
        for input, filter in itertools.product(("logits", "probs"), sampling.FILTERS):
            if keeps_row == (filter != "none"):
                axes = {"dtype": dtype, "input": input, "filter": filter}
                yield sampling.SAMPLE_ROW.spec, {**axes, "cluster_size": cluster_size, "row_kib": row_kib}


def _attention() -> Iterator[Asked]:
    of_both = itertools.product(Q_DTYPES, KV_DTYPES, DTYPES, _ATTENDED, _BOTH, _BOTH, _BOTH)
    for q, kv, o, (dim, dim_vo), window, cap, sinks in of_both:
        if "fp32" in (q, kv, o) or kv not in (q, *FP8_DTYPES):
            continue  # which nobody serves
        axes: dict[str, Any] = {
            **{"q_dtype": q, "kv_dtype": kv, "o_dtype": o, "head_dim": dim, "head_dim_vo": dim_vo},
            **{"has_window": window, "has_soft_cap": cap, "has_sinks": sinks},
        }
        for storage, group_size in itertools.product(("single", "paged"), (8, 16)):
            yield decode.decode, {**axes, "kv_storage": storage, "group_size": group_size}
        for storage, queries, page_size, mask in itertools.product(
            ("single", "ragged", "paged"), QUERIES, (1, 16), ("none", "causal")
        ):
            if storage == "paged" or page_size == 1:
                own = {"kv_storage": storage, "queries": queries, "page_size": page_size, "mask": mask}
                yield prefill.prefill, {**axes, **own}
    yield decode.DECODE_PLAN.spec, {}
    for storage in ("single", "ragged", "paged", mla.STORAGE):
        yield prefill.PREFILL_PLAN.spec, {"kv_storage": storage}
    for q, kv, ckv, kpe, short, page_size, mask in itertools.product(
        ("fp16", "bf16"), ("", "fp8_e4m3"), mla.HEAD_DIMS_CKV, mla.HEAD_DIMS_KPE, _BOTH, (1, 16), ("none", "causal")
    ):
        axes = {"q_dtype": q, "kv_dtype": kv, "head_dim_ckv": ckv, "head_dim_kpe": kpe}
        yield mla.mla, {**axes, "short_queries": short, "page_size": page_size, "mask": mask}


# ------------------------------------------------------------------------------------------------------ how they look


def _by_family(configs: Mapping[KernelSpec, Config]) -> dict[str, Any]:
    """The recipe of each family: `{"axes": [[name, value, …], …], "which": tree, "by": [an implementation, …]}`."""
    grouped: dict[str, list[KernelSpec]] = {}
    for spec in configs:
        grouped.setdefault(spec.family, []).append(spec)
    return {name: _recipe(of_family, configs) for name, of_family in grouped.items()}


def _recipe(requests: Sequence[KernelSpec], all_configs: Mapping[KernelSpec, Config]) -> dict[str, Any]:
    axes = [axis for axis, _ in requests[0].args]
    family = specs.family(requests[0].family)
    of_each: dict[int, list[KernelSpec]] = {}
    for spec in requests:
        of_each.setdefault(family.implementations.index(family.implementation(spec)), []).append(spec)
    numbers = {spec: str(i) for i, of_one in enumerate(of_each.values()) for spec in of_one}
    values = [dict.fromkeys(map(_text, of_axis)) for of_axis in zip(*(dict(spec.args).values() for spec in requests))]
    (which,) = _Trees(axes, requests, list(map(len, values))).of([(numbers[spec],) for spec in requests])
    return {
        "axes": [[axis, *of_axis] for axis, of_axis in zip(axes, values)],
        "which": which,
        "by": [
            _by(axes, family.implementations[i], of_one, [all_configs[spec] for spec in of_one])
            for i, of_one in of_each.items()
        ],
    }


def _by(
    axes: Sequence[str], implementation: Implementation, requests: Sequence[KernelSpec], configs: Sequence[Config]
) -> dict[str, Any]:
    values = [{name: _text(value) for name, value in source.constants(config).items()} for config in configs]
    lines = source.constant_lines(configs[0])
    head, _, tail = source.render(requests[0]).text.partition("\n".join(lines))
    places = [_with_place(line, value) for line, value in zip(lines, values[0].values())]
    rows = [(*of_one.values(), str(config.launch.units_per_block)) for of_one, config in zip(values, configs)]
    *trees, units_per_block = _Trees(axes, requests).of(rows)
    return {
        "text": [head.partition("\n")[2], tail],  # but for the first line, which names the spec
        "constants": [[name, line, tree] for name, line, tree in zip(values[0], places, trees)],
        "units_per_block": units_per_block,
        "params": implementation.params.__name__,
        "abi": description.abi(implementation.params),
        "headers": source.transitive_includes(implementation.header),
    }


def _text(value: Any) -> str:
    """As C++ spells a value of an axis, and the source one of a constant."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def _with_place(line: str, value: str) -> str:
    """The line of a constant with `{}` in the place of its value."""
    head, _, tail = line.rpartition(value)
    return f"{head}{{}}{tail}"


class _Trees:
    """Trees over the values of axes, of any number of things that follow from them: an axis that decides nothing is in
    none. num_values: of each axis, for trees without a leaf for requests that are not there; others may have some."""

    def __init__(self, axes: Sequence[str], requests: Sequence[KernelSpec], num_values: Sequence[int] = ()) -> None:
        self._axes, self._num_values = axes, num_values
        self._keys = [tuple(_text(value) for _, value in spec.args) for spec in requests]
        self._known: dict[Any, Tree] = {}  # equal trees are one object, so that comparing them is cheap

    def of(self, rows: Sequence[tuple[str, ...]]) -> tuple[Tree, ...]:
        return self._fold(list(zip(self._keys, rows)), 0)

    def _fold(self, rows: list[tuple[tuple[str, ...], tuple[str, ...]]], depth: int) -> tuple[Tree, ...]:
        if depth == len(self._axes):
            return rows[0][1]
        groups: dict[str, list[Any]] = {}
        for row in rows:
            groups.setdefault(row[0][depth], []).append(row)
        below = [self._fold(group, depth + 1) for group in groups.values()]
        is_whole = not self._num_values or len(groups) == self._num_values[depth]
        return tuple(self._node(depth, list(zip(groups, trees)), is_whole) for trees in zip(*below))

    def _node(self, depth: int, children: Sequence[tuple[str, Tree]], is_whole: bool) -> Tree:
        alike: dict[Any, tuple[list[str], Tree]] = {}
        for value, tree in children:
            alike.setdefault(tree if isinstance(tree, str) else id(tree), ([], tree))[0].append(value)
        if is_whole and len(alike) == 1:
            return children[0][1]
        if is_whole and all(value == tree for value, tree in children):
            return self._known.setdefault(depth, (self._axes[depth],))
        key = depth, tuple((same, *values) for same, (values, _) in alike.items())
        return self._known.setdefault(key, (self._axes[depth], *alike.values()))
