"""Build hooks of the distribution `flashinfer` (hatchling runs them; see pyproject.toml)."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

# Folders of the source tree that live inside the installed package. An editable install finds them where they are.
_PACKAGE_DATA = {"csrc": "flashinfer/csrc", "aot_configs": "flashinfer/aot_configs"}


class Extras(MetadataHookInterface):
    """The extras of pyproject.toml, and `aot`: the companion of exactly this version."""

    def update(self, metadata: dict[str, Any]) -> None:
        extras = dict(self.config["extras"])
        # Matches flashinfer-aot 0.1.0 and 0.1.0+cu130 alike: a local version never enters an == without one (PEP 440).
        extras["aot"] = [f"flashinfer-aot=={metadata['version']}"]
        metadata["optional-dependencies"] = extras


class PackageData(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name == "wheel" and version != "editable":
            build_data["force_include"].update(_PACKAGE_DATA)
