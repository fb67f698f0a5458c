# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say by itself; build_backend.py runs it."""

from pathlib import Path

from setuptools import setup

import build_backend
from packing import project_url, project_urls, setup_options

here = build_backend.here()
setup(
    version=build_backend.version(),
    project_urls=project_urls(project_url(here, here.parent)),
    **setup_options(Path(build_backend.PACKAGE)),
)
