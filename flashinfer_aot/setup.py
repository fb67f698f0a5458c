"""What pyproject.toml cannot say by itself; build_backend.py runs it."""

from pathlib import Path

from setuptools import setup

import build_backend
from packing import setup_options

setup(version=build_backend.version(), **setup_options(Path(build_backend.PACKAGE)))
