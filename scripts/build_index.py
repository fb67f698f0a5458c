#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Lay wheels and sdists out as static package indexes (PEP 503), to be served by any web server or from a file system.

    scripts/build_index.py dist/*.whl --out index
    pip install "flashinfer[aot]" --index-url file://$PWD/index/simple

    scripts/build_index.py dist/*.whl --out index --stand-in 0.7.2.post1 --stand-in flashinfer-cubin==0.6.13

    index/files/                 every file once; beside each wheel its metadata (PEP 658) and its bill of materials
    index/simple/                index of the files without a local version
    index/cu130/                 index of those and the files of local version +cu130; one such folder per local version

A folder per local version lets one project be built for several CUDA versions: the user's choice of index is the choice
of CUDA, and `flashinfer[aot]` needs no other spelling. Adding to an index that exists keeps what it holds.

A stand-in answers an engine's pin of an upstream distribution, flashinfer-python unless another is named. Its version,
0.7.2.post1+0.1.0, satisfies `==0.7.2.post1`; it is metadata alone and requires flashinfer 0.1.0, whose wheel is given.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import re
import shutil
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from pathlib import Path
from urllib.parse import quote

DEFAULT_INDEX = "simple"
BILL = ".cdx.json"  # ends the name of the bill of materials beside a wheel
PUBLIC_VERSION = r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?"  # of PEP 440, as pip writes it
PINNED = ("flashinfer-python", "flashinfer-cubin", "flashinfer-jit-cache")  # upstream's, which engines require by ==


@dataclass(frozen=True)
class Distribution:
    """One file of the index."""

    path: Path
    project: str  # normalized as in PEP 503
    local: str  # local version of an index of its own, "" when it is in every index
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
    local = "" if project in PINNED else version.partition("+")[2]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Distribution(path, project, local, sha256, metadata)


def write_stand_in(pin: str, front: Distribution, folder: Path) -> Path:
    """The wheel that stands in for a pinned distribution of upstream, `0.7.2` or `flashinfer-cubin==0.6.13`.

    Raises ValueError for another distribution and for what is no public version.
    """
    name, _, public = pin.rpartition("==")
    name = name or PINNED[0]
    if name not in PINNED:
        raise ValueError(f"--stand-in {pin}: expected one of {', '.join(PINNED)}")
    if not re.fullmatch(PUBLIC_VERSION, public):
        raise ValueError(f"--stand-in {pin}: expected a version as engines pin it, such as 0.7.2.post1")
    ours = BytesHeaderParser().parsebytes(front.metadata or b"")
    version = f"{public}+{ours['Version'].replace('+', '.')}"
    extras = ours.get_all("Provides-Extra", [])
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        f"Summary: Stands in for {name} {public} where flashinfer {ours['Version']} serves; no modules of its own",
        *(f"Project-URL: {url}" for url in ours.get_all("Project-URL", [])),
        f"Requires-Python: {ours['Requires-Python']}",
        f"Requires-Dist: flashinfer=={ours['Version']}",
        *(f"Provides-Extra: {extra}" for extra in extras),
        *(f'Requires-Dist: flashinfer[{extra}]=={ours["Version"]}; extra == "{extra}"' for extra in extras),
    ]
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    contents = {
        f"{info}/METADATA": "\n".join(lines) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: build_index\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},{_record_hash(text)},{len(text.encode())}\n" for path, text in contents.items())
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for member, text in {**contents, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(zipfile.ZipInfo(member), text)  # without the time: the same bytes every time
    return path


def _record_hash(text: str) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def build_index(paths: Iterable[Path], out: Path, stand_ins: Sequence[str] = ()) -> dict[str, list[Distribution]]:
    """Copy the files, add stand-ins for these pins and write every page anew. Returns what each index holds."""
    files = out / "files"
    given = [read(path) for path in paths]  # refuse before copying
    fronts = [one for one in given if one.project == "flashinfer" and one.metadata is not None]
    if stand_ins and len(fronts) != 1:
        raise ValueError(f"--stand-in: {len(fronts)} wheels of flashinfer are given; expected the one it requires")
    with tempfile.TemporaryDirectory() as folder:
        made = [read(write_stand_in(pin, fronts[0], Path(folder))) for pin in stand_ins]
        files.mkdir(parents=True, exist_ok=True)
        for one in (*given, *made):
            shutil.copy2(one.path, files / one.path.name)
            bill = one.path.with_name(one.path.name + BILL)
            if bill.exists():
                shutil.copy2(bill, files / bill.name)
    indexes: dict[str, list[Distribution]] = {DEFAULT_INDEX: []}
    distributions = [read(path) for path in sorted(files.iterdir()) if not path.name.endswith((".metadata", BILL))]
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
    parser.add_argument(
        "--stand-in",
        action="append",
        default=[],
        metavar="VERSION",
        dest="stand_ins",
        help="a version of upstream that an engine pins, or NAME==VERSION; repeat it for several",
    )
    args = parser.parse_args()
    try:
        indexes = build_index(args.files, args.out, args.stand_ins)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, held in indexes.items():
        print(f"{(args.out / name).resolve().as_uri()}: {', '.join(one.path.name for one in held)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
