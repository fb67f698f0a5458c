# SPDX-License-Identifier: Apache-2.0
"""The newest results of every device, and how many times as fast as its peers each case is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import results
from results import Case, Run, Table

SLOWER = 0.99  # times as fast; what is closer to 1 is noise
ELEMENTWISE = ("norm", "activation", "rope", "append", "fused", "quant", "pack", "merge")
GDN_STEP = ("gdn decode", "gdn draft", "gdn conv", "gdn norm")  # beside Triton
HOST = ("decode host", "prefill host", "mla host", "sampling host")
# What the summary tells, and the tables behind it.
AREAS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Decode", ("decode",)),
    ("Prefill and append", ("prefill",)),
    ("Latent attention", ("mla",)),
    ("Gated delta rule", ("gdn prefill", *GDN_STEP)),
    ("Functions of scores and masks", ("variants",)),
    ("Mixed batches", ("mixed", "mixed drawn")),
    ("Block-sparse attention", ("sparse",)),
    ("Matrix products", ("gemm",)),
    ("Sampling", ("sampling",)),
    ("Norms, RoPE, cache, …", ELEMENTWISE),
    ("Host time of a call", HOST),
)
REPLACED = "what it replaces"
PARTS = ("prefill", "decode")  # of a mixed batch, each by itself: in the files for their reader


def number(value: float | None) -> str:
    """Three digits; a dash where nothing was timed."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def unit(table: Table) -> str:
    return table.unit.replace("us", "µs")


@dataclass(frozen=True)
class Measured:
    """A device's newest table of one name."""

    device: str
    commit: str
    run: Run
    table: Table

    def case(self, name: str) -> Case | None:
        return self.table.cases.get(name)


Newest = dict[str, dict[str, Measured]]  # by table, by device


def newest(files: Iterable[results.Results]) -> Newest:
    found: Newest = {}
    dated = [(run.date, one.file_name, one, run) for one in files for run in one.runs]
    for *_, one, run in sorted(dated, key=lambda entry: entry[:2]):
        for name, table in run.tables.items():
            if not table.partial:
                held = found.setdefault(name, {})
                held.pop(one.device, None)
                held[one.device] = Measured(one.device, one.commit, run, table)
    order = devices_of(found)
    return {name: {device: held[device] for device in order if device in held} for name, held in found.items()}


def devices_of(found: Newest) -> list[str]:
    """The one that was measured last first."""
    last: dict[str, str] = {}
    for held in found.values():
        for device, one in held.items():
            last[device] = max(last.get(device, ""), one.run.date)
    return sorted(last, key=lambda device: (last[device], device), reverse=True)


# -------------------------------------------------------------------------------------------------------------- ratios


def peer_label(peer: str) -> str:
    """Without the version, which the list of runs tells; empty for an earlier state of ourselves, and for a part."""
    if peer.startswith("peer ") or peer in PARTS:
        return ""
    return REPLACED if peer == "replaced" else re.sub(r"^upstream \S+", "upstream", peer)


def peers(tables: Iterable[Measured]) -> list[str]:
    found = [peer_label(peer) for one in tables for case in one.table.cases.values() for peer in case.peers]
    return [label for label in dict.fromkeys(found) if label]


def ratio(table: Table, case: Case | None, label: str) -> float:
    """How many times as fast as a peer we are; NaN where either was not timed."""
    if case is None or case.figure is None:
        return math.nan
    for peer, figure in case.peers.items():
        if peer_label(peer) == label and figure is not None:
            return figure / case.figure if results.LOWER_IS_BETTER[table.unit] else case.figure / figure
    return math.nan


@dataclass(frozen=True)
class Comparison:
    """An area beside a peer on a device: cases with their ratios, and figures for the words about them."""

    area: str
    peer: str
    device: str
    ratios: dict[str, float]
    words: dict[str, str]

    @property
    def slower(self) -> dict[str, float]:
        return {case: value for case, value in self.ratios.items() if value < SLOWER}


def comparisons(found: Newest) -> Iterator[Comparison]:
    for area, names in AREAS:
        tables = [measured for name in names for measured in found.get(name, {}).values()]
        for label in peers(tables):
            for device in dict.fromkeys(one.device for one in tables):
                ratios, words = {}, {}
                for one in tables:
                    for name, case in one.table.cases.items():
                        value = ratio(one.table, case, label)
                        if one.device == device and not math.isnan(value) and not name.startswith("torch."):
                            other = next(f for p, f in case.peers.items() if peer_label(p) == label)
                            ratios[name] = value
                            words[name] = f"{number(case.figure)} against {number(other)} {unit(one.table)}"
                if ratios:
                    yield Comparison(area, label, device, ratios, words)
