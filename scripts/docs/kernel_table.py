# SPDX-License-Identifier: Apache-2.0
"""The table operator × dtype × target × AOT, from the families, core.toml and the targets that CI builds sets of."""

from __future__ import annotations

import functools
import html
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flashinfer import dtypes, families
from flashinfer import target as targets
from flashinfer.aot import config
from flashinfer.errors import UnsupportedConfig
from flashinfer.jit import spec as specs
from flashinfer.jit.spec import ArgValue, Family, KernelSpec

ROOT = Path(__file__).resolve().parents[2]
Args = tuple[tuple[str, ArgValue], ...]


@functools.cache
def built_targets() -> tuple[str, ...]:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    return tuple(workflow["jobs"]["build"]["strategy"]["matrix"]["target"])


@functools.cache
def asked() -> dict[str, tuple[list[str], str]]:
    """Operator -> its families, and what stopped it before its end."""
    command = [sys.executable, "-m", "scripts.docs.operators"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{said.stderr}")
    return {name: tuple(found) for name, found in json.loads(said.stdout).items()}


def operators_of(family: str) -> list[str]:
    """Functions before wrappers."""
    names = [name for name, (found, _) in asked().items() if family in found]
    return sorted(names, key=lambda name: name.rpartition(".")[2][0].isupper())


@dataclass(frozen=True)
class Row:
    family: str
    dtypes: tuple[tuple[str, str], ...]  # axis -> dtype
    kernels: dict[str, int]  # target that can have it -> how many kernels of it the core set holds there


def rows(names: Sequence[str]) -> Iterator[Row]:
    """One for each family and each choice of dtypes that some of these targets can have."""
    core = config.read_specs(["core"], list(names))  # which knows all families from then on
    for family in specs._families.values():
        own = [spec for spec in core if spec.family == family.name]
        axes = [axis for axis in family.axes if axis.endswith("dtype")]
        for values in itertools.product(*(family.axes[axis] for axis in axes)):
            chosen = tuple(zip(axes, values))
            kernels = {
                target: sum(spec.target == target and set(chosen) <= set(spec.args) for spec in own)
                for target in names
                if family.runs_on(target) and _can_have(family, target, chosen, own)
            }
            if kernels:
                yield Row(family.name, chosen, kernels)


def _can_have(family: Family, target: str, chosen: Args, core: Sequence[KernelSpec]) -> bool:
    """Whether it has a kernel of these dtypes, in one of the shapes of the core set or, where that has none, in any."""
    for rest in _shapes(family, targets.kind(target), chosen, core):
        try:
            family.config(family.spec(target, **dict(chosen), **rest))
            return True
        except UnsupportedConfig:
            continue
    return False


def _shapes(family: Family, kind: str, chosen: Args, core: Sequence[KernelSpec]) -> Iterator[dict[str, Any]]:
    dtype_axes = {axis for axis, _ in chosen}
    of_core = {
        tuple(arg for arg in spec.args if arg[0] not in dtype_axes)
        for spec in core
        if targets.kind(spec.target) == kind
    }
    if of_core:
        yield from map(dict, of_core)
        return
    rest = {axis: legal for axis, legal in family.axes.items() if axis not in dtype_axes}
    some = [
        [n for n in (1, 8, 64, 512) if n in legal] if isinstance(legal, range) else legal for legal in rest.values()
    ]
    for values in itertools.product(*some):
        yield dict(zip(rest, values))


# ---------------------------------------------------------------------------------------------------------------- page

_OPENING = """\
---
hide: [toc]
---
# Kernels

Which operator has a kernel for which dtypes on which target, and which of them are precompiled. A cell says **AOT**
with the number of kernels that the core set (`aot_configs/core.toml`, what `flashinfer-aot` ships) has of that row for
that target; **JIT** where a kernel is compiled when it is first asked for; – where there is none. An operator of many
kernels asks for all of them, or for what suits its arguments. Made of the families, the config and the targets that CI
builds, together with this site.

Words narrow the table down, in any order: `decode fp8 sm_90a`, `bfloat16 top_p`, `rope sm_80=aot`.
"""


def page() -> str:
    names = built_targets()
    found = list(rows(names))
    columns = "".join(f"<th>{name}</th>" for name in names)
    body = "\n".join(_html_row(row, names) for row in found if not _is_helper(row.family))
    helpers = sorted({row.family for row in found if _is_helper(row.family)})
    without = [name for name, (families_asked, _) in asked().items() if not families_asked]
    return f"""\
{_OPENING}
<div class="kernels" data-search-exclude>
<form class="kernels-filter">
<input type="search" placeholder="Operator, dtype, target, …" aria-label="Words that rows have to have">
<output></output>
</form>
<table>
<thead><tr><th>operators</th><th>kernel</th><th>dtypes</th>{columns}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>

Not in the table: {_listed(helpers)}, which plan the work of attention on a GPU, and {_listed(without)}, which ask for
no kernel.

## What a kernel is specialized for

Everything else is a run-time value. A request for anything else is refused with `UnsupportedConfig`, and nothing is
compiled.

{_axes_table()}
"""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _is_helper(family: str) -> bool:
    return not operators_of(family)


def _html_row(row: Row, names: Sequence[str]) -> str:
    operators = operators_of(row.family)
    torch_names = [str(dtypes._TORCH_NAMES.get(dtype, "")) for _, dtype in row.dtypes]
    on = [f"{name}={'aot' if row.kernels[name] else 'jit'}" for name in names if name in row.kernels]
    words = " ".join([*operators, row.family, *(dtype for _, dtype in row.dtypes), *torch_names, *on]).lower()
    shown = "<br>".join(f"<code>{name}</code>" for name in operators)
    chosen = "<br>".join(
        f"{axis.removesuffix('dtype').rstrip('_')} <b>{dtype}</b>".strip() for axis, dtype in row.dtypes
    )
    cells = "".join(_cell(row.kernels.get(name)) for name in names)
    cells = f"<td>{shown}</td><td>{row.family}</td><td>{chosen or 'any'}</td>{cells}"
    return f'<tr data-words="{html.escape(words)}">{cells}</tr>'


def _cell(number: int | None) -> str:
    if number is None:
        return "<td>–</td>"
    return f'<td class="aot">AOT {number}</td>' if number else '<td class="jit">JIT</td>'


def _axes_table() -> str:
    lines = ["| kernel | arguments | implementations |", "| --- | --- | --- |"]
    families.register_all()
    for family in specs._families.values():
        axes = "<br>".join(f"`{axis}`: {specs._allowed(legal)}" for axis, legal in family.axes.items())
        headers = "<br>".join(f"{each.on}: `csrc/{each.header}`" for each in family.implementations)
        lines.append(f"| {family.name} | {axes or '–'} | {headers} |")
    return "\n".join(lines)
