# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say by itself; build_backend.py runs it."""

import re
import sys
from pathlib import Path

from setuptools import setup

import build_backend
from packing import description, project_url, project_urls, setup_options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

(version,) = re.findall(r'^__version__ = "([^"]+)"$', Path("flashinfer/version.py").read_text(), re.MULTILINE)
extras = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["flashinfer"]["extras"]
# Matches flashinfer-aot 0.1.0 and 0.1.0+cu130 alike: a local version never enters an == without one (PEP 440).
extras["aot"] = [f"flashinfer-aot=={version}"]
url = project_url(build_backend.ROOT)
setup(
    version=version,
    extras_require=extras,
    long_description=description(Path("README.md").read_text(encoding="utf-8"), url),
    long_description_content_type="text/markdown",
    project_urls=project_urls(url),
    **setup_options(Path("flashinfer/precompiled")),
)
