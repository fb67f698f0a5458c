# SPDX-License-Identifier: Apache-2.0
"""What is in a wheel of ours, for those that keep track of software: CycloneDX 1.6 in JSON, beside the wheel.

Everything is read from the wheel. The same wheel gives the same bytes; the time is in it only where SOURCE_DATE_EPOCH
says one.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import uuid
import zipfile
from email.message import Message
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flashinfer.errors import FlashInferError
from flashinfer.version import __version__

SUFFIX = ".cdx.json"

_COMPANION = "flashinfer_aot"
_REGISTRY = f"{_COMPANION}/registry.json"
_SIGNATURE = f"{_REGISTRY}.sig"
Component = dict[str, Any]


def write(wheel: Path) -> Path:
    """Write the bill of a wheel of flashinfer or flashinfer-aot beside it; returns its path.

    Raises:
        FlashInferError: the file is no wheel of these, a kernel of it is not what its registry says, or
            SOURCE_DATE_EPOCH is no number.
        OSError: it cannot be read, or nothing can be written beside it.
    """
    path = wheel.with_name(wheel.name + SUFFIX)
    path.write_text(json.dumps(bill(wheel), indent=1) + "\n", encoding="utf-8")
    return path


def bill(wheel: Path) -> dict[str, Any]:
    """The document of `write`; raises what it does."""
    content = wheel.read_bytes()
    try:
        with zipfile.ZipFile(wheel) as file:
            (name,) = (name for name in file.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            metadata = BytesHeaderParser().parsebytes(file.read(name))
            components = _requirements(metadata)
            if metadata["Name"] == "flashinfer-aot":
                components += _kernels(file)
            elif metadata["Name"] != "flashinfer":
                raise ValueError(f"it is of {metadata['Name']}")
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise FlashInferError(f"{wheel} is no wheel of flashinfer or flashinfer-aot: {error}") from None
    sha256 = hashlib.sha256(content).hexdigest()
    product = {
        **_package(metadata["Name"], metadata["Version"]),
        "description": metadata["Summary"],
        "licenses": [{"expression": metadata["License-Expression"]}],
        "hashes": [{"alg": "SHA-256", "content": sha256}],
        "properties": [_property("file", wheel.name)],
    }
    shipped = [one["bom-ref"] for one in components if one.get("scope") != "excluded"]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'sha256:{sha256}')}",
        "version": 1,
        "metadata": {
            **_timestamp(),
            "tools": {"components": [{"type": "application", "name": "flashinfer aot sbom", "version": __version__}]},
            "component": product,
        },
        "components": components,
        "dependencies": [{"ref": product["bom-ref"], "dependsOn": shipped}],
    }


def _timestamp() -> dict[str, str]:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return {}
    try:
        moment = datetime.datetime.fromtimestamp(int(epoch), datetime.timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise FlashInferError(f"SOURCE_DATE_EPOCH is {epoch!r:.40}; expected seconds since 1970") from None
    return {"timestamp": moment.strftime("%Y-%m-%dT%H:%M:%SZ")}


def _package(name: str, version: str | None) -> Component:
    purl = f"pkg:pypi/{name}" + (f"@{quote(version, safe='')}" if version else "")
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        **({"version": version} if version else {}),
        "purl": purl,
    }


def _property(name: str, value: str) -> dict[str, str]:
    return {"name": f"flashinfer:{name}", "value": value}


def _requirements(metadata: Message) -> list[Component]:
    """What pip installs with the wheel, always or with an extra: one component a package. A version is that of an exact
    pin; what else is required is a property."""
    lines: dict[str, list[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        match = re.match(r"[A-Za-z0-9][\w.-]*", line)
        if match is None:
            raise ValueError(f"Requires-Dist {line!r:.60}")
        lines.setdefault(re.sub(r"[-_.]+", "-", match[0]).lower(), []).append(line)
    components = []
    for name, required in sorted(lines.items()):
        pins = {match[1] for line in required if (match := re.search(r"==\s*([^\s,;]+)", line.partition(";")[0]))}
        is_optional = all("extra ==" in line for line in required)
        components.append(
            {
                **_package(name, pins.pop() if len(pins) == 1 else None),
                "scope": "optional" if is_optional else "required",
                "properties": [_property("requires", line) for line in required],
            }
        )
    return components


def _kernels(wheel: zipfile.ZipFile) -> list[Component]:
    """The files of a set, what compiled them, and the package that they are compiled from and that loads them."""
    content = wheel.read(_REGISTRY)
    registry = json.loads(content)
    files = {"registry.json": _file("registry.json", content)}
    if _SIGNATURE in wheel.namelist():
        files["registry.json.sig"] = _file("registry.json.sig", wheel.read(_SIGNATURE))
    compiled: dict[str, set[str]] = {}  # compiler -> targets
    for entry in registry["kernels"]:
        name = entry["file"]
        if name not in files:
            files[name] = _file(name, wheel.read(f"flashinfer_aot/{name}"))
            if files[name]["hashes"][0]["content"] != entry["sha256"]:
                raise ValueError(f"{name} is not what its registry says")
        about = {"kernel": entry["name"], "target": entry["target"], "compiler": entry["compiler"]}
        files[name].setdefault("properties", []).extend(_property(key, value) for key, value in about.items())
        compiled.setdefault(entry["compiler"], set()).add(entry["target"])
    compilers = [_compiler(text, targets) for text, targets in sorted(compiled.items())]
    front = {**_package("flashinfer", registry["version"]), "scope": "required"}
    return [front, *compilers, *(files[name] for name in sorted(files))]


def _file(name: str, content: bytes) -> Component:
    return {
        "type": "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}],
    }


def _compiler(text: str, targets: set[str]) -> Component:
    """`nvrtc-13.0-109338064` is NVRTC 13.0, build 109338064; `g++-12.2.0-glibc-2.36` is g++ 12.2.0 on that libc."""
    match = re.fullmatch(r"(.+?)-(\d+\.\d.*)", text)
    return {
        "type": "application",
        "bom-ref": f"compiler:{text}",
        "name": match[1] if match else text,
        **({"version": match[2]} if match else {}),
        "scope": "excluded",  # it is in no wheel
        "properties": [_property("target", target) for target in sorted(targets)],
    }
