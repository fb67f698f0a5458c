# SPDX-License-Identifier: Apache-2.0
"""Both distributions are packed by setuptools, from a copy of what goes in: the same bytes from every checkout, which
may be read-only and in which nothing is left behind. flashinfer_aot/ has this file by a link."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from setuptools import Distribution, build_meta
from setuptools.command.bdist_wheel import bdist_wheel

REGISTRY = "registry.json"
PROJECT_URL = "FLASHINFER_PROJECT_URL"
_EPOCH = "1580601600"  # 2020-02-02, of all files unless SOURCE_DATE_EPOCH says otherwise
_LEFT_BEHIND = ("__pycache__", "build", "dist", "precompiled")  # folders that no distribution is made of
# A word in the name of a code host -> what its addresses have between a repository and its files or issues.
_LAYOUTS = {"github": "", "gitlab": "/-"}
# machine of a CPU kernel's target -> as platform tags spell it
_ARCHITECTURES = {"x86-64": "x86_64", "armv8": "aarch64"}


def files_of(root: Path, *names: str) -> dict[str, Path]:
    """These files, and all of these folders, by their place below root. Names that are not there are left out."""
    found = {}
    for name in names:
        path = root / name
        for file in [path] if path.is_file() else path.rglob("*"):
            folders = file.relative_to(root).parts[:-1]
            hidden = file.name.startswith(".") or any(folder.startswith(".") for folder in folders)
            left = any(folder in _LEFT_BEHIND or folder.endswith(".egg-info") for folder in folders)
            if file.is_file() and not hidden and not left:
                found[file.relative_to(root).as_posix()] = file
    return found


@contextlib.contextmanager
def copied(files: Mapping[str, Path]) -> Iterator[Path]:
    """A folder that holds copies of these files at these places; the current one for as long as it is there."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", _EPOCH)
    with tempfile.TemporaryDirectory(prefix="flashinfer-packing-") as name:
        folder = Path(name).resolve()
        for place, path in files.items():
            copy = folder / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            copy.chmod(_mode(path))
        before, umask = Path.cwd(), os.umask(0o022)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)
            os.umask(umask)


def _mode(path: Path) -> int:
    return 0o755 if path.stat().st_mode & 0o100 else 0o644


def write_sdist(files: Mapping[str, Path], directory: Path) -> str:
    """An archive of these files and of the metadata that setuptools makes of them. Returns its name."""
    with copied(files) as folder:
        made = folder / "metadata"
        made.mkdir()
        info = build_meta.prepare_metadata_for_build_wheel(str(made))
        metadata = (made / info / "METADATA").read_bytes()
    stem, seconds = info.removesuffix(".dist-info"), int(os.environ["SOURCE_DATE_EPOCH"])
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        contents = {place: (path.read_bytes(), _mode(path)) for place, path in files.items()}
        for place, (content, mode) in sorted({**contents, "PKG-INFO": (metadata, 0o644)}.items()):
            member = tarfile.TarInfo(f"{stem}/{place}")
            member.size, member.mode, member.mtime = len(content), mode, seconds
            tar.addfile(member, io.BytesIO(content))
    (directory / f"{stem}.tar.gz").write_bytes(gzip.compress(archive.getvalue(), mtime=seconds))
    return f"{stem}.tar.gz"


# ------------------------------------------------------------------------------------------- the repository on the web


def project_url(*roots: Path) -> str:
    """Where the repository is on the web, as `https://host/owner/name`; empty where nobody says.

    An sdist says what it was made with. Of a checkout FLASHINFER_PROJECT_URL does, where it is set, else the remote
    `origin`: what a fork packs leads to the fork.

    Args:
        roots: where the metadata of an sdist or the repository of a checkout may lie, nearest first.

    Raises:
        ValueError: FLASHINFER_PROJECT_URL is neither empty nor such an address.
    """
    for info in (root / "PKG-INFO" for root in roots):
        if info.is_file():
            said = re.search(r"^Project-URL: Source, (\S+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
            return said[1] if said else ""
    named = os.environ.get(PROJECT_URL)
    if named is not None:
        if named and not web_address(named):  # which may hold a password: not repeated
            raise ValueError(
                f"{PROJECT_URL} is no address of a repository; expected https://host/owner/name, or nothing"
            )
        return web_address(named)
    return next((web_address(_origin(root)) for root in roots if (root / ".git").exists()), "")


def _origin(checkout: Path) -> str:
    # Named, or git would look in the folders above, and where a hook's variables say.
    command = ["git", "--git-dir", str(checkout / ".git"), "config", "--get", "remote.origin.url"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git
        return ""


def web_address(remote: str) -> str:
    """The page of a repository that is cloned from there by HTTP or SSH, without credentials; empty where it has none:
    folders, and hosts that are numbers or have no domain, which others cannot reach."""
    short = re.fullmatch(r"(?:[\w.-]+@)?([\w.-]+):(?!/)(.+)", remote)  # git@host:owner/name.git
    try:
        parts = urlsplit(f"ssh://{short[1]}/{short[2]}" if short else remote)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return ""
    web_port = f":{port}" if port and parts.scheme in ("http", "https") else ""
    url = f"{parts.scheme.replace('ssh', 'https')}://{host}{web_port}{parts.path.rstrip('/').removesuffix('.git')}"
    # What is left of credentials that were spelt wrongly is no such path either.
    return url if re.fullmatch(r"https?://([a-z\d-]+\.)+[a-z][a-z\d-]*(:\d+)?(/[\w.~+-]+)+", url, re.ASCII) else ""


def project_urls(url: str) -> dict[str, str]:
    """The links of a package's page, by their labels; those into the repository where its host is one we know."""
    links, inside = {"Homepage": url, "Source": url} if url else {}, _inside(url)
    if inside is not None:
        links["Documentation"] = f"{inside}/tree/HEAD/docs"
        links["Changelog"] = f"{inside}/blob/HEAD/CHANGELOG.md"
        links["Issues"] = f"{inside}/issues"
    return links


def _inside(url: str) -> str | None:
    host = url.partition("://")[2].partition("/")[0]
    return next((url + layout for name, layout in _LAYOUTS.items() if name in host), None)


def description(readme: str, url: str) -> str:
    """A README as a package index shows it, where links to files beside it would lead nowhere: they lead into the
    repository at `url`. Where that is not known the path stands beside the text."""
    inside = _inside(url)

    def link(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if target is None or re.match(r"[a-z]+:|#", target):  # code, or complete as it is
            return match[0]
        return f"{text} (`{target.partition('#')[0]}`)" if inside is None else f"[{text}]({inside}/blob/HEAD/{target})"

    return re.sub(r"```.*?```|`[^`]*`|\[(?P<text>[^]]*)\]\((?P<target>[^)\s]+)\)", link, readme, flags=re.DOTALL)


# ----------------------------------------------------------------------------------------------------- a set in a wheel


def read_registry(folder: Path) -> dict[str, Any] | None:
    """The registry of the set in a folder; None where there is none. Raises ValueError for a file that is none."""
    path = folder / REGISTRY
    if not path.exists():
        return None
    try:
        registry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = registry["format"] == 1 and isinstance(registry["version"], str)
        whole = whole and all({"file", "sha256", "target"} <= entry.keys() for entry in registry["kernels"])
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is not the registry of a set; delete it and run scripts/build_aot.py again")
    return registry


def files_of_set(folder: Path, registry: Mapping[str, Any]) -> dict[str, Path]:
    """The registry and what it names, each file checked. Raises ValueError for one that it does not describe."""
    named = {entry["file"]: checked(folder, entry) for entry in registry["kernels"]}
    signature = folder / f"{REGISTRY}.sig"
    signed = {signature.name: signature} if signature.is_file() else {}
    return {REGISTRY: folder / REGISTRY, **signed, **named}


def checked(folder: Path, entry: Mapping[str, Any]) -> Path:
    path = (folder / entry["file"]).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"the registry names a file outside its folder: {entry['file']}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise ValueError(
            f"{path} is not the file the registry describes (sha256 differs); run scripts/build_aot.py again"
        )
    return path


def platform(registry: Mapping[str, Any] | None) -> str:
    """Cubins run wherever their GPU does; CPU libraries tie the wheel to Linux on their architecture."""
    machines = set()
    for entry in registry["kernels"] if registry else ():
        for prefix, machine in _ARCHITECTURES.items():
            if entry["target"].startswith(prefix):
                machines.add(machine)
    if len(machines) > 1:
        raise ValueError(f"the set holds CPU libraries for {' and '.join(sorted(machines))}; build one set for each")
    return f"linux_{machines.pop()}" if machines else "any"


def _compress(wheel: Path) -> None:
    """Pack a wheel as tightly as deflate can; setuptools knows zlib's default level alone."""
    tight = wheel.with_suffix(".tight")
    with zipfile.ZipFile(wheel) as given, zipfile.ZipFile(tight, "w") as packed:
        for member in given.infolist():
            packed.writestr(member, given.read(member), zipfile.ZIP_DEFLATED, compresslevel=9)
    tight.replace(wheel)


def setup_options(folder_of_set: Path) -> dict[str, Any]:
    """What setup() needs to know of the set that is packed, if one is."""
    tag = "py3", "none", platform(read_registry(folder_of_set))

    class Wheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return tag

        def run(self) -> None:
            super().run()
            _compress(Path(self.distribution.dist_files[-1][2]))

    class WithLibraries(Distribution):
        def has_ext_modules(self) -> bool:
            return tag[2] != "any"

    return {"cmdclass": {"bdist_wheel": Wheel}, "distclass": WithLibraries}
