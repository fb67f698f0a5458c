# SPDX-License-Identifier: Apache-2.0
"""What .github/workflows run exists: scripts and their options, commands of `flashinfer`, configs, targets, extras and
jobs. They themselves run where this repository is hosted."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashinfer import cli, target
from flashinfer.aot.config import ConfigError, find_config
from flashinfer.errors import UnsupportedConfig

yaml = pytest.importorskip("yaml", reason="needs the group test")

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items():
            yield f"{path.name}: {name}", job


def combinations(job: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The values that a job's matrix stands for."""
    matrix = job.get("strategy", {}).get("matrix", {})
    included = matrix.get("include", [])
    axes = {name: values for name, values in matrix.items() if name != "include"}
    if axes or not included:
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values))
    yield from included


def filled(text: str, values: dict[str, str]) -> str:
    """A line as a job of the matrix gets it; a name that its matrix lacks stays, and is no word of any command."""
    return re.sub(r"\$\{\{ *matrix\.([\w-]+) *}}", lambda found: str(values.get(found[1], found[0])), text)


def commands() -> Iterator[tuple[str, str]]:
    for name, job in jobs():
        for values in combinations(job):
            for step in job["steps"]:
                for line in filled(step.get("run", ""), values).splitlines():
                    yield name, line


def complaint(line: str) -> str:
    """What is wrong with a line of a shell; empty for nothing."""
    if "${{" in line:
        return "an expression that the matrix does not fill in"
    words = shlex.split(line)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, *arguments = words
    if program.startswith("scripts/"):
        script = ROOT / program
        if not script.exists() or not os.access(script, os.X_OK):
            return f"{program} is no program"
        if program == "scripts/build_aot.py":
            return _of_flashinfer(["aot", "build", *arguments])
        if program == "scripts/test.sh":
            return _of_pytest(arguments)
        return _of_usage(program, arguments)
    if program in ("flashinfer", ".venv/bin/flashinfer"):
        return _of_flashinfer(arguments)
    if program == "pip":
        return _of_pip(arguments)
    return f"{program} is unknown to this test"


def _of_flashinfer(arguments: list[str]) -> str:
    try:
        args = cli._parser().parse_args(arguments)
    except SystemExit:
        return f"flashinfer {' '.join(arguments)} is not understood"
    try:
        for config in getattr(args, "config", None) or []:
            find_config(config)
        if getattr(args, "target", None):
            target.named(args.target)
    except (ConfigError, UnsupportedConfig) as error:
        return str(error)
    return ""


def _of_pytest(arguments: list[str]) -> str:
    markers = re.findall(r'^  "(\w+): ', PROJECT, flags=re.M)
    for name, argument in zip(["", *arguments], arguments):
        if name == "-m":
            unknown = set(re.findall(r"\w+", argument)) - {*markers, "and", "or", "not"}
            if unknown:
                return f"{sorted(unknown)} are no markers"
        elif argument.startswith("-"):
            if argument not in ("-m", "-k", "-n", "-x", "-q"):
                return f"{argument} is unknown to this test"
        elif name not in ("-k", "-n") and not (ROOT / argument).exists():
            return f"there is no {argument}"
    return ""


def _of_usage(program: str, arguments: list[str]) -> str:
    options = [argument for argument in arguments if argument.startswith("-")]
    text = (ROOT / program).read_text(encoding="utf-8")
    unknown = [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", text)]
    return f"{program} has no {unknown}" if unknown else ""


def _of_pip(arguments: list[str]) -> str:
    command, *rest = arguments
    usage = _usage_of_pip(command)
    if not usage:
        return f"pip has no {command}"
    for argument in rest:
        if argument.startswith("-") and not re.search(rf"(?<![\w-]){argument}(?![\w-])", usage):
            return f"pip {command} has no {argument}"
        if re.match(r"\.{1,2}(/|\[|$)", argument):
            folder, _, extras = argument.partition("[")
            if not (ROOT / folder / "pyproject.toml").exists():
                return f"there is nothing to install in {folder}"
            for extra in filter(None, extras.rstrip("]").split(",")):
                if not re.search(rf"^{extra} = \[", PROJECT, flags=re.M):
                    return f"there is no extra {extra}"
    return ""


@functools.cache
def _usage_of_pip(command: str) -> str:
    asked = [sys.executable, "-m", "pip", command, "--help"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize(("job", "line"), sorted(set(commands())))
def test_commands_exist(job: str, line: str) -> None:
    assert complaint(line) == "", job


def test_commands_are_found() -> None:
    lines = {line for _, line in commands()}
    for expected in (
        "scripts/test.sh",
        "scripts/lint.sh",
        "scripts/demo.sh",
        "--target sm_90a",
        "scripts/test.sh -m gpu",
    ):
        assert any(expected in line for line in lines), expected


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("scripts/test.sh -m gpu", ""),
        ("A=1 scripts/demo.sh --full", ""),
        ("scripts/no_such.sh", "is no program"),
        ("scripts/common.sh", "is no program"),
        ("scripts/demo.sh --fast", "has no"),
        ("scripts/build_index.py a.whl --out index --standin 1", "has no"),
        ("scripts/test.sh -m tpu", "no markers"),
        ("scripts/test.sh tests/nowhere", "there is no"),
        ("scripts/build_aot.py --config core --target sm_99 --out x", "sm_99"),
        ("scripts/build_aot.py --config kernels --target sm_80 --out x", "no such config"),
        ("scripts/build_aot.py --config core --exactly --out x", "not understood"),
        ("scripts/build_aot.py --config core --target ${{ matrix.gpu }} --out x", "does not fill in"),
        ("flashinfer aot join a b", "not understood"),
        ("pip install '.[tests]'", "no extra"),
        ("pip install ./flashinfer_jit", "nothing to install"),
        ("pip wheel --no-dependants .", "pip wheel has no"),
        ("pip build .", "pip has no build"),
        ("make", "unknown"),
    ],
)
def test_commands_that_do_not_exist_are_found(line: str, wrong: str) -> None:
    said = complaint(line)
    assert wrong in said if wrong else not said, said


def test_every_python_of_the_metadata_is_tested() -> None:
    tested = next(job for name, job in jobs() if name.endswith(": test"))["strategy"]["matrix"]["python"]
    assert tested == PYTHONS  # as text: 3.10 unquoted is 3.1
    assert re.search(r'requires-python = ">=(.*)"', PROJECT)[1] == tested[0]  # type: ignore[index]
    assert set(re.findall(r"Python :: (3\.\d+)", PROJECT)) <= set(tested)


def test_jobs_wait_for_jobs_and_use_what_they_are_given() -> None:
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, job in workflow["jobs"].items():
            needs = job.get("needs", [])
            for needed in [needs] if isinstance(needs, str) else needs:
                assert needed in workflow["jobs"], f"{name} needs {needed}"
            set_variables = {*workflow.get("env", {}), *job.get("env", {})}
            for step in job["steps"]:
                assert ("run" in step) != ("uses" in step), step
                used = set(re.findall(r"\$\{?([A-Z_]+)", step.get("run", "")))
                assert used <= set_variables, f"{name} uses {sorted(used - set_variables)}, which nothing sets"
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1")), step


def test_the_release_has_every_target_that_is_built() -> None:
    of = dict(jobs())
    built = {f"sets/{values['target']}" for values in combinations(of["ci.yml: build"])}
    joined = " ".join(values["sets"] for values in combinations(of["ci.yml: release"])).split()
    assert sorted(joined) == sorted(built)


def test_the_gpu_job_waits_for_a_label() -> None:
    job = dict(jobs())["ci.yml: gpu"]
    assert "labels.*.name, 'gpu'" in job["if"] and "gpu" in job["runs-on"]
