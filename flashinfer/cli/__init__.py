# SPDX-License-Identifier: Apache-2.0
"""The command line: `flashinfer doctor | resolve | warmup | misses | cache | aot | variants | bench | cpp`.

Each command is a module with `add_parser(subparsers)`, which adds its parser and sets `run`, a function from the parsed
arguments to the exit code: 0 for yes, 1 for no or failed, 2 for bad usage. Results go to stdout, progress and errors to
stderr. A command imports torch only when it has to look at the machine.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from flashinfer import packages
from flashinfer.aot.config import ConfigError
from flashinfer.errors import FlashInferError, InvalidSetting, UnsupportedConfig
from flashinfer.version import __version__

_COMMANDS = ("doctor", "resolve", "warmup", "misses", "cache", "aot", "variants", "bench", "cpp")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: sys.argv) and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does, for µ where only ASCII can be written
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args) or 0
        sys.stdout.flush()
        return code
    except (UsageError, UnsupportedConfig, ConfigError, InvalidSetting) as error:
        return _fail(error, 2)
    except (FlashInferError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader has seen enough: flashinfer misses report | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        return _fail(_of_files(error), 1)
    except ModuleNotFoundError as error:  # of an environment with a part of what the library needs
        needed = packages.requirement(error.name or "")
        if needed is None:
            raise
        return _fail(f"{packages.names([needed])} is not installed; next step: {packages.pip_install([needed])}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


class UsageError(Exception):
    """The command line asks for something that does not exist or makes no sense."""


class _Parser(argparse.ArgumentParser):
    """Its help ends with examples: command lines, without the word flashinfer."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.examples = examples

    def format_help(self) -> str:
        examples = "".join(f"  flashinfer {example}\n" for example in self.examples)
        return super().format_help() + (f"\nexamples:\n{examples}" if examples else "")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flashinfer",
        description="Look at this machine, at the kernels it has, and at those it lacks.",
        epilog="Exit code: 0 yes or done, 1 no or failed, 2 bad usage. Settings: docs/operations.md.",
        examples=("doctor", "warmup --config core", "misses report", "misses report --help"),
    )
    parser.add_argument("--version", action="version", version=f"flashinfer {__version__}")
    parser.set_defaults(run=lambda args: parser.print_help())  # of no command
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name in _COMMANDS:
        importlib.import_module(f"flashinfer.cli.{name}").add_parser(subparsers)
    return parser


def _of_files(error: Exception) -> object:
    """`/no/folder/x.html: No such file or directory`, without the number that the system has for it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return error


def _fail(error: object, code: int) -> int:
    print(f"flashinfer: {error}", file=sys.stderr)
    return code
