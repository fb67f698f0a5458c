# SPDX-License-Identifier: Apache-2.0
"""Links of a built site that lead nowhere, and what it would load from elsewhere; `main` prints them."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

_LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: set[tuple[str, bool]] = set()  # and whether the page itself loads it

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.targets.add((value, (tag, name) in _LOADED))


@functools.cache
def _read(page: Path) -> _Links:
    links = _Links()
    links.feed(page.read_text(encoding="utf-8"))
    return links


def dead(site: Path) -> Iterator[str]:
    """`page: link: what is wrong`."""
    for page in sorted(site.rglob("*.html")):
        for target, is_loaded in sorted(_read(page).targets):
            name, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:|//", target):
                wrong = "is loaded from elsewhere" if is_loaded and not target.startswith("data:") else ""
            else:
                wrong = _fault(site, page, unquote(name), unquote(anchor))
            if wrong:
                yield f"{page.relative_to(site)}: {target}: {wrong}"


def _fault(site: Path, page: Path, name: str, anchor: str) -> str:
    file = page
    if name:
        file = site / name.lstrip("/") if name.startswith("/") else page.parent / name
        if file.is_dir():
            file /= "index.html"
    if not file.exists():
        return "there is no such file"
    is_missing = anchor and file.suffix == ".html" and anchor not in _read(file.resolve()).anchors
    return "there is no such anchor" if is_missing else ""


def main() -> int:
    found = list(dead(Path(sys.argv[1])))
    print("\n".join(found) or f"{sys.argv[1]}: every link leads somewhere")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
