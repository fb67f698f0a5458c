# SPDX-License-Identifier: Apache-2.0
"""What the documentation site has beside the files of docs/: MkDocs runs these hooks (mkdocs.yml).

Pages of docs/ and of the repository's root are shown as they are; links between them, and from them to files of the
repository, lead to the same place on the site. The reference is made of what the package exports, its commands and its
kernel families.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import pkgutil
import posixpath
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import flashinfer  # noqa: E402
from flashinfer import cli, errors  # noqa: E402
from packing import project_url  # noqa: E402
from scripts.docs import kernel_table  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

# Pages of the root -> their place on the site.
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
ASSETS = ("site.css", "kernels.js")
# Modules that are documented whole, beside what the package exports.
WHOLE = ("parallel", "errors", "utils", "jit.spec")


# ------------------------------------------------------------------------------------------------------------ reference


def exports() -> dict[str, list[str]]:
    """Module of the public API -> the names it is documented with, those of the package first."""
    found: dict[str, list[str]] = {}
    for name, module in flashinfer._EXPORTS.items():
        found.setdefault(module, []).append(name)
    for module in (module.name for module in pkgutil.iter_modules(flashinfer.__path__)):
        own = () if module in (*WHOLE, "jit", "__main__") else _all_of(module)
        if own:
            names = found.setdefault(module, [])
            names += [name for name in own if name not in names]
    return found


def _all_of(module: str) -> Sequence[str]:
    return getattr(importlib.import_module(f"flashinfer.{module}"), "__all__", ())


def reference() -> dict[str, str]:
    """Page -> its text, in the order of the navigation; of the table of kernels, which takes a while, none."""
    pages = {"reference/index.md": _at_a_glance(), "reference/kernels.md": "", "reference/cli.md": _commands()}
    for module, names in exports().items():
        of_package = [name for name in names if flashinfer._EXPORTS.get(name) == module]
        whence = f"`flashinfer` and `flashinfer.{module}` export these"
        if not of_package:
            whence = f"`flashinfer.{module}` exports these"
        elif len(of_package) < len(names):
            others = ", ".join(f"`{name}`" for name in names if name not in of_package)
            whence = f"`flashinfer.{module}` exports these, and `flashinfer` all but {others}"
        pages[f"reference/{module}.md"] = _module_page(module, f"{whence}.", names)
    for module in WHOLE:
        pages[f"reference/{module}.md"] = _module_page(module, "", None)
    return pages


def _module_page(module: str, whence: str, names: list[str] | None) -> str:
    whole = f"# flashinfer.{module}\n\n::: flashinfer.{module}\n"
    if names is None:
        return whole
    root = "    options: {show_root_heading: true, show_root_toc_entry: true}\n"
    each = "\n".join(f"::: flashinfer.{module}.{name}\n{root}" for name in names)
    return f"{whole}    options: {{members: false}}\n\n{whence}\n\n{each}"


def _at_a_glance() -> str:
    lines = ["# The API at a glance\n", "Every name, and the first line of what is said of it.\n"]
    for module, names in exports().items():
        lines += [f"## [flashinfer.{module}]({module}.md)\n", "| name | what it does |", "| --- | --- |"]
        for name in names:
            summary = _summary(getattr(importlib.import_module(f"flashinfer.{module}"), name))
            lines.append(f"| [`{name}`]({module}.md#flashinfer.{module}.{name}) | {summary} |")
        lines.append("")
    return "\n".join(lines)


def _summary(value: object) -> str:
    if isinstance(value, functools.partial):
        return f"`{value.func.__name__}` with {', '.join(f'{name}={given}' for name, given in value.keywords.items())}."
    paragraph = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0]


def _commands() -> str:
    text = ["# Commands\n", "What each command says of itself: `flashinfer COMMAND --help`.\n"]

    def add(parser: argparse.ArgumentParser, level: int) -> None:
        parser.formatter_class = functools.partial(parser.formatter_class, width=100)
        text.extend([f"{'#' * level} {parser.prog}\n", f"```text\n{parser.format_help()}```\n"])
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for below in action.choices.values():
                    add(below, min(level + 1, 3))

    add(cli._parser(), 2)
    return "\n".join(text)


# ----------------------------------------------------------------------------------------------------------- navigation


def pages_of(folder: str) -> list[str]:
    """What stands for a folder in the navigation of mkdocs.yml: its pages, or those of the reference."""
    if folder == "reference/":
        return list(reference())
    pages = sorted((ROOT / "docs" / folder).glob("*.md"))
    return [f"{folder}{page.name}" for page in sorted(pages, key=lambda page: page.name != "README.md")]


def expanded(nav: list[Any]) -> list[Any]:
    """The navigation with the pages of each folder in the folder's place."""
    items: list[Any] = []
    for item in nav:
        if isinstance(item, dict):
            items.append(
                {title: expanded(below) if isinstance(below, list) else below for title, below in item.items()}
            )
        elif item.endswith("/"):
            items += pages_of(item)
        else:
            items.append(item)
    return items


# ---------------------------------------------------------------------------------------------------------------- links


def rewritten(text: str, here: str, there: str) -> str:
    """A page's text with links as the site has them. `here`: its path in the repository; `there`: on the site."""

    def link(match: re.Match[str]) -> str:
        if match[1] is not None or re.match(r"[a-z]+:|#", match[2]):
            return match[0]
        name, hash_sign, anchor = match[2].partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(here), name))
        return f"]({posixpath.relpath(place_of(file), posixpath.dirname(there) or '.')}{hash_sign}{anchor})"

    return _CODE_OR_LINK.sub(link, text)


_CODE_OR_LINK = re.compile(r"(```.*?```|`[^`\n]*`)|\]\(([^)\s]+)\)", flags=re.S)


def place_of(file: str) -> str:
    """The place of a file of the repository."""
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    if file.endswith(".md") and file not in ROOT_PAGES:
        return f"source/{file}"
    return ROOT_PAGES.get(file, f"source/{file.removeprefix('.')}.md")  # MkDocs leaves out what begins with a dot


def sources(texts: dict[str, str]) -> list[str]:
    """The files of the repository that pages (path in the repository -> text) lead to and that are no pages, and those
    that Markdown among them leads to."""
    found: set[str] = set()
    unread = list(texts.items())
    while unread:
        here, text = unread.pop()
        for code, target in _CODE_OR_LINK.findall(text):
            file = posixpath.normpath(posixpath.join(posixpath.dirname(here), target.partition("#")[0]))
            if code or re.match(r"[a-z]+:|#", target) or file in found or not (ROOT / file).is_file():
                continue
            if place_of(file).startswith("source/"):
                found.add(file)
                if file.endswith(".md"):
                    unread.append((file, (ROOT / file).read_text(encoding="utf-8")))
    return sorted(found)


def source_page(file: str) -> str:
    """Markdown as a page, anything else as a listing."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".md"):
        return f"---\nhide: [navigation]\n---\n{text}"
    language = {".py": "python", ".sh": "bash", ".yml": "yaml", ".toml": "toml"}.get(Path(file).suffix, "text")
    return f"---\nhide: [navigation, toc]\nsearch: {{exclude: true}}\n---\n# {file}\n\n````{language}\n{text}\n````\n"


def stacked(text: str) -> str:
    """Text whose tables that go on beside themselves, with the same head again, go on below."""

    def table(match: re.Match[str]) -> str:
        rows = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in match[0].splitlines()]
        half = len(rows[0]) // 2
        if not half or [cell.strip() for cell in rows[0][:half]] != [cell.strip() for cell in rows[0][half:]]:
            return match[0]
        below = [row[half:] for row in rows[2:] if any(cell.strip() for cell in row[half:])]
        return "".join(f"|{'|'.join(row)}|\n" for row in [*(row[:half] for row in rows), *below])

    return re.sub(r"^\|.*\|\n\|[ :|-]+\|\n(\|.*\|\n)+", table, text, flags=re.M)


def slug(heading: str, separator: str) -> str:
    """The anchor of a heading, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


# ---------------------------------------------------------------------------------------------------------------- hooks


def on_config(config: MkDocsConfig) -> None:
    config.nav = expanded(config.nav or [])
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    if url := project_url(ROOT):
        # Not as MkDocs' repo_url: the theme would ask its host for stars, and the site loads nothing from elsewhere.
        config.extra["social"] = [{"icon": "fontawesome/brands/git-alt", "link": url, "name": "The repository"}]


def on_files(files: Files, config: MkDocsConfig) -> None:
    from mkdocs.structure.files import File

    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in ROOT_PAGES}
    pages = {there: texts[here] for here, there in ROOT_PAGES.items()}
    pages["index.md"] = "---\nhide: [navigation]\n---\n" + pages["index.md"]
    texts |= {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    pages |= {place_of(file): source_page(file) for file in sources(texts)}
    pages |= {**reference(), "reference/kernels.md": kernel_table.page()}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    for name in ASSETS:
        files.append(File.generated(config, f"assets/{name}", abs_src_path=str(ROOT / "scripts" / "docs" / name)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    there = page.file.src_uri
    shown = there.removeprefix("source/")
    if there.startswith("reference/") or (there != shown and not (ROOT / shown).is_file()):  # the latter: a listing
        return markdown
    here = next((root for root, place in ROOT_PAGES.items() if place == there), f"docs/{there}")
    return stacked(rewritten(markdown, shown if there != shown else here, there))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Names of the API in the text lead to the reference."""
    return _CODE.sub(_reference_link, html)


_MODULES = "|".join(["flashinfer", *dict.fromkeys(flashinfer._EXPORTS.values())])
_CODE = re.compile(rf"<(h\d|a|pre)\b.*?</\1>|<code>(?:(?:{_MODULES})\.)*(\w+)((?:\.\w+)?)</code>", flags=re.S)


def _reference_link(match: re.Match[str]) -> str:
    place = _places().get(match[2])
    return f'<autoref identifier="{place}{match[3]}" optional>{match[0]}</autoref>' if place else match[0]


@functools.cache
def _places() -> dict[str, str]:
    """Name of the API, or of an exception -> its anchor, but for names that are those of arguments too."""
    places = {name: f"flashinfer.{module}.{name}" for module, names in exports().items() for name in names}
    functions = [getattr(importlib.import_module(place.rpartition(".")[0]), name) for name, place in places.items()]
    arguments = {name for each in functions if inspect.isfunction(each) for name in inspect.signature(each).parameters}
    places |= {name: f"flashinfer.errors.{name}" for name in vars(errors) if name[0].isupper()}
    return {name: place for name, place in places.items() if name not in arguments}
