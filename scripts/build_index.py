#!/usr/bin/env python3
"""Lay wheels and sdists out as static package indexes (PEP 503), to be served by any web server or from a file system.

    scripts/build_index.py dist/*.whl --out index
    pip install "flashinfer[aot]" --index-url file://$PWD/index/simple

    index/files/                 every file once, and the metadata of each wheel beside it (PEP 658)
    index/simple/                index of the files without a local version
    index/cu130/                 index of those and the files of local version +cu130; one such folder per local version

A folder per local version lets one project be built for several CUDA versions: the user's choice of index is the choice
of CUDA, and `flashinfer[aot]` needs no other spelling. Adding to an index that exists keeps what it holds.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import re
import shutil
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from pathlib import Path
from urllib.parse import quote

DEFAULT_INDEX = "simple"


@dataclass(frozen=True)
class Distribution:
    """One file of the index."""

    path: Path
    project: str  # normalized as in PEP 503
    local: str  # local version, "" when it has none
    sha256: str
    metadata: bytes | None  # of a wheel

    @property
    def link(self) -> str:
        attributes = ""
        if self.metadata is not None:
            digest = hashlib.sha256(self.metadata).hexdigest()
            attributes = f' data-core-metadata="sha256={digest}" data-dist-info-metadata="sha256={digest}"'
            requires_python = BytesHeaderParser().parsebytes(self.metadata).get("Requires-Python")
            if requires_python:
                attributes += f' data-requires-python="{html.escape(requires_python)}"'
        href = f"../../files/{quote(self.path.name)}#sha256={self.sha256}"
        return f'<a href="{href}"{attributes}>{html.escape(self.path.name)}</a><br>'


def read(path: Path) -> Distribution:
    """Raises OSError, or ValueError for a file that is neither a wheel nor an sdist."""
    if re.fullmatch(r"[^-]+-[^-]+(-[^-]+){3,4}\.whl", path.name):
        project, version = path.name.split("-")[:2]
        with zipfile.ZipFile(path) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = wheel.read(name)
    elif path.name.endswith(".tar.gz"):
        project, _, version = path.name.removesuffix(".tar.gz").rpartition("-")
        metadata = None
    else:
        raise ValueError(f"{path} is neither a wheel (.whl) nor an sdist (.tar.gz)")
    project = re.sub(r"[-_.]+", "-", project).lower()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Distribution(path, project, version.partition("+")[2], sha256, metadata)


def build_index(paths: Iterable[Path], out: Path) -> dict[str, list[Distribution]]:
    """Copy the files and write every page anew. Returns what each index holds."""
    files = out / "files"
    files.mkdir(parents=True, exist_ok=True)
    for path in paths:
        read(path)  # refuse before copying
        shutil.copy2(path, files / path.name)
    indexes: dict[str, list[Distribution]] = {DEFAULT_INDEX: []}
    distributions = [read(path) for path in sorted(files.iterdir()) if not path.name.endswith(".metadata")]
    for one in distributions:
        if one.metadata is not None:
            (files / f"{one.path.name}.metadata").write_bytes(one.metadata)
        if one.local:
            indexes.setdefault(one.local, [])
    for local, held in indexes.items():
        held += [one for one in distributions if one.local in ("", local)]
        _write_pages(out / local, held)
    return indexes


def _write_pages(folder: Path, held: list[Distribution]) -> None:
    projects = defaultdict(list)
    for one in held:
        projects[one.project].append(one.link)
    folder.mkdir(parents=True, exist_ok=True)
    _write_page(folder / "index.html", [f'<a href="{name}/">{name}</a><br>' for name in sorted(projects)])
    for name, links in projects.items():
        (folder / name).mkdir(exist_ok=True)
        _write_page(folder / name / "index.html", links)


def _write_page(path: Path, links: list[str]) -> None:
    body = "\n".join(links)
    head = '<meta charset="utf-8"><meta name="pypi:repository-version" content="1.0">'
    path.write_text(f"<!DOCTYPE html>\n<html><head>{head}</head><body>\n{body}\n</body></html>\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="wheels and sdists")
    parser.add_argument("--out", required=True, type=Path, help="folder of the indexes")
    args = parser.parse_args()
    try:
        indexes = build_index(args.files, args.out)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, held in indexes.items():
        print(f"{(args.out / name).resolve().as_uri()}: {', '.join(one.path.name for one in held)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
