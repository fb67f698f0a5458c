# SPDX-License-Identifier: Apache-2.0
"""The documentation site, without building it: what it shows is all there is, and links mean the same on it. The slow
test builds it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashinfer import families
from flashinfer.aot import config
from flashinfer.jit import spec as specs
from scripts.docs import kernel_table, links
from tests.compat.test_docs import anchors
from tests.public_calls import CALLS, NO_OPERATORS, public_names

yaml = pytest.importorskip("yaml", reason="needs the group test")

from scripts.docs import pages  # noqa: E402  (which needs it too)

ROOT = Path(__file__).resolve().parents[2]


def in_navigation(items: list[Any]) -> Iterator[str]:
    for item in items:
        if isinstance(item, dict):
            for below in item.values():
                yield from in_navigation(below if isinstance(below, list) else [below])
        else:
            yield item


def test_every_page_is_in_the_navigation_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    written = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    expected = [*written, *pages.ROOT_PAGES.values(), *pages.reference()]
    assert Counter(in_navigation(pages.expanded(nav))) == Counter(expected)
    assert set(pages.ROOT_PAGES) == {page.name for page in ROOT.glob("*.md")}


def test_every_public_name_is_in_the_reference_and_says_what_it_is() -> None:
    text = "".join(pages.reference().values())
    exported = {f"{module}.{name}" for module, names in pages.exports().items() for name in names}
    for name in public_names() | NO_OPERATORS:
        place = name if "." in name else f"{pages.flashinfer._EXPORTS[name]}.{name}"
        assert place in exported
        assert f"::: flashinfer.{place}\n" in text
        value = getattr(sys.modules[f"flashinfer.{place.rpartition('.')[0]}"], place.rpartition(".")[2])
        assert inspect.getdoc(value), name


@pytest.mark.parametrize(
    ("here", "text", "expected"),
    [
        ("README.md", "[x](docs/safety.md#a) `[y](docs/no.md)`", "[x](safety.md#a) `[y](docs/no.md)`"),
        ("README.md", "[x](SECURITY.md), [y](https://a.b/c.md), [z](#use-it)", None),
        ("docs/testing.md", "[x](../CONTRIBUTING.md), ![y](a.png)", "[x](contributing.md), ![y](a.png)"),
        ("docs/notes/README.md", "[x](../performance.md)", "[x](../performance.md)"),
        ("docs/notes/README.md", "[x](../../README.md#run-it)", "[x](../index.md#run-it)"),
        ("docs/packaging.md", "[x](../scripts/demo.sh)", "[x](source/scripts/demo.sh.md)"),
        ("docs/engines.md", "[x](../examples/engines/README.md#a)", "[x](source/examples/engines/README.md#a)"),
        (
            "examples/engines/README.md",
            "[x](compare.py), [y](../../docs/a.md)",
            "[x](compare.py.md), [y](../../../a.md)",
        ),
        ("CONTRIBUTING.md", "[x](.github/workflows/ci.yml)", "[x](source/github/workflows/ci.yml.md)"),
    ],
)
def test_links_lead_to_the_same_place(here: str, text: str, expected: str | None) -> None:
    expected = text.replace("SECURITY", "security") if expected is None else expected
    assert pages.rewritten(text, here, pages.place_of(here)) == expected


def test_files_that_pages_lead_to_are_shown() -> None:
    assert pages.sources({"docs/a.md": "[x](../setup.py) [y](b.md) `[z](../packing.py)`"}) == ["setup.py"]
    assert pages.source_page("setup.py").count("from setuptools import setup") == 1
    led_to = pages.sources({"docs/a.md": "[x](../examples/engines/README.md)"})
    assert "examples/engines/README.md" in led_to, "which is a page itself"
    assert "\n# Serving engines with our kernels\n" in pages.source_page("examples/engines/README.md")


def test_every_entry_of_a_docstring_has_a_name() -> None:
    """`name: description`, what is longer indented: the reference is made of such entries, and building it fails on
    others."""
    for module, names in pages.exports().items():
        for name in names:
            value = getattr(sys.modules[f"flashinfer.{module}"], name)
            members = vars(value).values() if inspect.isclass(value) else ()
            for documented in (value, *members):
                text = inspect.getdoc(documented) or "" if callable(documented) else ""
                sections = re.findall(r"^(?:Args|Raises|Attributes):.*\n((?:(?: {4}.*)?\n?)+)", text, flags=re.M)
                entries = [line for section in sections for line in section.splitlines() if re.match(r" {4}\S", line)]
                wrong = [entry for entry in entries if ":" not in entry]
                assert not wrong, f"{module}.{name}: {wrong}"


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], ids=lambda page: page.name)
def test_files_that_are_shown_have_no_anchors(page: Path) -> None:
    """Markdown is a page, with headings to lead to; any other file is a listing, such as source/setup.py.md."""
    here = page.relative_to(ROOT).as_posix()
    text = pages.rewritten(page.read_text(encoding="utf-8"), here, pages.place_of(here))
    assert re.findall(r"\]\(((?:\.\./)*source/[^)#]*\.\w+\.md#[^)]*)\)", text) == []


def test_anchors_are_those_of_the_repository() -> None:
    for page in (ROOT / "docs" / "add_a_kernel.md", ROOT / "docs" / "performance.md"):
        headings = [
            line.lstrip("# ") for line in page.read_text(encoding="utf-8").splitlines() if line[:2] in ("# ", "##")
        ]
        assert {pages.slug(heading, "-") for heading in headings} >= anchors(page)


def test_tables_that_go_on_beside_themselves_go_on_below() -> None:
    head, rule = "| a | b | a | b |\n", "| --- | --- | --- | --- |\n"
    table = head + rule + "| 1 | x\\|y | 3 | z |\n| 2 | y |  |  |\n"
    assert pages.stacked(f"{table}\nend") == "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n| 2 | y |\n| 3 | z |\n\nend"
    assert pages.stacked(table.replace("| a | b |\n", "| a | c |\n")) == table.replace("| a | b |\n", "| a | c |\n")


def test_dead_links_of_a_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text('<a href="a/b.html#here">x</a><a href="#top">y</a><a href="https://c.d">z</a>')
    (tmp_path / "a" / "b.html").write_text(
        '<p id="here"><a href="../index.html">x</a><a href="../no.html">y</a><script src="https://c.d/e.js"></script>'
    )
    assert list(links.dead(tmp_path)) == [
        "a/b.html: ../no.html: there is no such file",
        "a/b.html: https://c.d/e.js: is loaded from elsewhere",
        "index.html: #top: there is no such anchor",
    ]


# ----------------------------------------------------------------------------------------------------- table of kernels


@pytest.fixture(scope="module")
def rows() -> list[kernel_table.Row]:
    return list(kernel_table.rows(kernel_table.built_targets()))


def test_the_table_has_every_kernel_of_the_core_set_once(rows: list[kernel_table.Row]) -> None:
    targets = kernel_table.built_targets()
    core = Counter((spec.family, spec.target) for spec in config.read_specs(["core"], targets))
    shown: Counter[tuple[str, str]] = Counter()
    for row in rows:
        shown.update({(row.family, target): number for target, number in row.kernels.items()})
    assert +shown == core


def test_the_table_has_every_family_and_dtype(rows: list[kernel_table.Row]) -> None:
    families.register_all()
    for family in specs._families.values():
        own = [row for row in rows if row.family == family.name]
        assert own, f"{family.name} has no row"
        for axis, legal in family.axes.items():
            if axis.endswith("dtype"):
                assert {dict(row.dtypes)[axis] for row in own} == set(legal), (family.name, axis)  # type: ignore[call-overload]


def test_cells_are_what_families_allow(rows: list[kernel_table.Row]) -> None:
    of = {(row.family, *(dtype for _, dtype in row.dtypes)): row.kernels for row in rows}
    assert set(of["decode", "fp32", "fp32", "fp32"]) == {"x86-64-v3", "x86-64-v4"}
    assert set(of["prefill", "fp8_e4m3", "fp8_e4m3", "bf16"]) == set(of["prefill", "bf16", "fp8_e5m2", "bf16"])
    assert ("prefill", "fp8_e4m3", "fp8_e5m2", "bf16") not in of
    assert ("prefill", "fp16", "bf16", "fp16") not in of
    assert set(of["rmsnorm", "bf16"]) == set(kernel_table.built_targets())
    assert all(of["rmsnorm", "bf16"].values()) and not any(of["layernorm", "fp16", "fp16"].values())


def test_operators_of_the_table_are_those_that_ask_for_a_kernel() -> None:
    asked = kernel_table.asked()
    assert set(asked) == set(CALLS)
    assert {name for name, (_, error) in asked.items() if error} == {"get_batch_indices_positions"}  # at its end
    assert kernel_table.operators_of("layernorm") == ["layernorm"]
    assert kernel_table.operators_of("merge_states")[:2] == ["merge_state", "merge_states"]
    families.register_all()
    without = {name for name in specs._families if not kernel_table.operators_of(name)}
    assert without == {name for name, family in specs._families.items() if not family.runs_on("x86-64-v3")}


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_or_a_dead_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the group docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(links.dead(tmp_path)) == []
    for name in public_names():
        place = name if "." in name else f"{pages.flashinfer._EXPORTS[name]}.{name}"
        page = tmp_path / "reference" / f"{place.rpartition('.')[0]}.html"
        assert f'id="flashinfer.{place}"' in page.read_text(encoding="utf-8"), name
