# SPDX-License-Identifier: Apache-2.0
"""What the pages say exists: links, anchors, paths of files. Headers of kernels begin with equations and shapes. The
first example of README.md runs as it is printed."""

from __future__ import annotations

import importlib
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashinfer import cli, families
from flashinfer.jit import spec
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    *("aot_configs", "benchmarks", "csrc", "docs", "examples", "flashinfer", "flashinfer_aot", "flashinfer_tvm"),
    *("scripts", "tests"),
)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "flashinfer_aot").glob("*.md")])
# A path from the root of the repository, as pages and comments write it. What holds a placeholder or a glob is not one,
# nor is an #include.
PATH = re.compile(rf"(?<![\w/.$<-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w(?![\w$<*{{…-])")
# A header by its path from csrc/, or by the end of it.
HEADER = re.compile(r"(?<![\w/.-])(?:\w+/)*\w+\.cuh\b")
# Made by a build, or by whoever follows docs/add_a_kernel.md.
MADE = re.compile(
    r"flashinfer_aot/flashinfer_aot/(registry|kernels)|flashinfer/precompiled|(csrc(/cpu)?|flashinfer(/families)?|^)/?toy(_sm90)?\b"
)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[str]:
    """To files of the repository, without code, where brackets mean something else."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text_of(page), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(file), f"{target}: expected one of {sorted(anchors(file))}"


def stale_paths(text: str) -> list[str]:
    paths = {path for path in PATH.findall(text) if not (ROOT / path).exists()}
    headers = {name for name in HEADER.findall(text) if not any((ROOT / "csrc").rglob(name)) and name not in paths}
    return sorted(path for path in paths | headers if not MADE.search(path) and not (ROOT / path).exists())


def sources() -> Iterator[Path]:
    # Tests write of packages' insides.
    for folder in ("benchmarks", "csrc", "examples", "flashinfer", "flashinfer_tvm", "scripts"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cuh", ".h", ".sh"}:
                yield path


def test_paths_in_pages_exist() -> None:
    stale = {str(page.relative_to(ROOT)): stale_paths(text_of(page)) for page in PAGES}
    assert {page: paths for page, paths in stale.items() if paths} == {}


def test_paths_in_comments_exist() -> None:
    """Also in strings: messages name files too."""
    stale = {str(path.relative_to(ROOT)): stale_paths(text_of(path)) for path in sources()}
    assert {path: paths for path, paths in stale.items() if paths} == {}


@pytest.mark.parametrize(
    ("text", "stale"),
    [
        ("see `csrc/no/such.cuh`.", ["csrc/no/such.cuh"]),
        ("flashinfer/kernels/norm.py and flashinfer/norm.py", ["flashinfer/kernels/norm.py"]),
        ("attention/merge_states.cuh, prefill/tile.cuh, tile.cuh, prefill_tile.cuh", ["prefill_tile.cuh"]),
        ("docs/<page>.md, benchmarks/results/*.json, csrc/toy/params.h, the tests/", []),
    ],
)
def test_stale_paths_are_found(text: str, stale: list[str]) -> None:
    assert stale_paths(text) == stale


def unknown_names(text: str) -> list[str]:
    """Files and identifiers in the code spans of a page that the repository does not have. Comments do not count: they
    may be as old as the page. Single letters are mathematics."""
    files = [f"/{path.relative_to(ROOT)}/" for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    words = {word for path in sources() for word in re.findall(r"\w+", re.sub(r"//.*|#.*", "", text_of(path)))}
    unknown = []
    for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
        for name in re.findall(r"[\w./-]*\w\.(?:cuh|h|py|md|sh)\b|(?:\w+/)+|[A-Za-z_]\w+", span, flags=re.A):
            is_file = re.search(r"\W", name) is not None
            if not any(f"/{name.strip('/')}/" in file for file in files) if is_file else name not in words:
                unknown.append(name)
    return unknown


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("reading_*.md")), ids=lambda page: page.name)
def test_names_in_pages_to_read_beside_a_kernel_exist(page: Path) -> None:
    assert unknown_names(text_of(page)) == []


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        (
            "`walk.cuh` and `stroll.cuh`, `csrc/attention/prefill/`, `prefill/nowhere/`",
            ["stroll.cuh", "prefill/nowhere/"],
        ),
        ("`PrefillItem`, `take_next()`, `Visibility::of_yore`, `attend<Config, false>`", ["of_yore"]),
        ("`S = Q Kᵀ` in `rows[t & 1]`; ```no_such_name```; PlainWords", []),
    ],
)
def test_unknown_names_are_found(text: str, unknown: list[str]) -> None:
    assert unknown_names(text) == unknown


def test_what_is_left_out_of_upstream_is_not_there() -> None:
    section = text_of(ROOT / "docs" / "engines.md").partition("## What of upstream is left out")[2]
    names = [
        name for row in re.findall(r"^\| (.*?) \|", section, flags=re.M) for name in re.findall(r"`(flash[\w.]+)`", row)
    ]
    assert len(names) > 5
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert not hasattr(importlib.import_module(module), attribute), f"{name} is there"


def commands(text: str) -> Iterator[tuple[bool, str]]:
    """What a page tells to type of the command `flashinfer`, of which scripts/build_aot.py is one: whether it stands in
    a block, and its arguments. Of alternatives and of what is optional, all; what ends in an ellipsis is left out."""
    fenced = re.findall(r"```.*?```", text, flags=re.S)
    blocks = [*re.findall(r"^ {4}.*$", text, flags=re.M), *"\n".join(fenced).splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for is_whole, text in [*((True, line) for line in blocks), *((False, span) for span in spans)]:
        line = re.split(" #| &&", re.sub(r"\[[^]]*…\]", "", text.replace("\\|", "|")))[0]
        found = re.match(r"\s*(?:flashinfer|(?:.venv/bin/python )?scripts/build_aot.py)( .*|$)", line)
        if found is None or "…" in line:
            continue
        words = ("aot build" if "build_aot.py" in line else "") + re.sub(r"[][]", "", found[1])
        alternatives = re.search(r"\w+(?:\|\w+)+", words)
        for choice in alternatives[0].split("|") if alternatives else [""]:
            yield is_whole, words.replace(alternatives[0], choice) if alternatives else words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_pages_are_understood(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for is_whole, command in commands(text_of(page)):
        try:
            cli._parser().parse_args(shlex.split(command))
        except SystemExit:
            said = capsys.readouterr().err
            assert not is_whole and "are required" in said, f"flashinfer {command}: {said}"


def test_commands_are_found() -> None:
    text = """
Type `flashinfer cache list\\|gc` or

    flashinfer misses report [PATH…]   # of a fleet
    flashinfer aot build --nonsense …

```
scripts/build_aot.py --config core && rm -r /
```
"""
    found = [" ".join(command.split()) for _, command in commands(text)]
    assert found == ["misses report", "aot build --config core", "cache list", "cache gc"]
    assert sum(len(list(commands(text_of(page)))) for page in PAGES) > 20


def opening(header: str) -> str:
    return text_of(ROOT / "csrc" / header).partition("#pragma once")[0]


def test_kernel_headers_open_with_what_they_compute() -> None:
    """Before how: an equation and shapes on lines of their own. A twin on the CPU names the header that has them."""
    families.register_all()
    headers = {each.header for family in spec._families.values() for each in family.implementations}
    for header in sorted(headers):
        if header.startswith("cpu/"):
            expected = header.removeprefix("cpu/").removesuffix(".h")
            named = [expected + ".cuh", expected + "/kernel.cuh", expected + "/params.h"]
            assert any(name in opening(header) for name in named), f"{header} names neither of {named}"
        elif not header.startswith("attention/"):
            formulas = "".join(re.findall(r"^//   .*\n", opening(header), flags=re.M))
            assert re.search(r" = | <- |if ", formulas), f"{header} opens without an equation"
            assert re.search(r"\[(num_\w+|batch_size)\b", formulas), f"{header} opens without shapes"


def test_every_note_is_in_the_index_and_says_what_notes_say() -> None:
    notes = ROOT / "docs" / "notes"
    index = text_of(notes / "README.md")
    for page in sorted(notes.glob("*.md")):
        if page.name == "README.md":
            continue
        assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])-[a-z0-9-]+\.md", page.name), page.name
        assert f"]({page.name})" in index, f"{page.name} has no line in docs/notes/README.md"
        headings = re.findall(r"^## (.+)$", text_of(page), flags=re.M)
        assert headings == ["Question", "Setup", "Result", "Conclusion"], page.name


def test_the_first_example_runs_as_printed(tmp_path: Path) -> None:
    """On the CPU; scripts/try_readme.sh runs it in an environment that the README's own commands made."""
    example = re.search(r"^```python\n(.*?)^```", text_of(ROOT / "README.md"), flags=re.S | re.M)
    assert example is not None
    check = "\nassert y.shape == x.shape and out.shape == q.shape and out.isfinite().all() and y.isfinite().all()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = warm.run(["-c", example[1] + check], environment, tmp_path)
    assert done.returncode == 0, done.stderr
