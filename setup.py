"""What pyproject.toml cannot say by itself; build_backend.py runs it."""

import re
import sys
from pathlib import Path

from setuptools import setup

from packing import description, setup_options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

(version,) = re.findall(r'^__version__ = "([^"]+)"$', Path("flashinfer/version.py").read_text(), re.MULTILINE)
settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["flashinfer"]
extras = settings["extras"]
# Matches flashinfer-aot 0.1.0 and 0.1.0+cu130 alike: a local version never enters an == without one (PEP 440).
extras["aot"] = [f"flashinfer-aot=={version}"]
setup(
    version=version,
    extras_require=extras,
    long_description=description(Path("README.md").read_text(encoding="utf-8"), settings["files_url"]),
    long_description_content_type="text/markdown",
    **setup_options(Path("flashinfer/precompiled")),
)
