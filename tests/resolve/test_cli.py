# SPDX-License-Identifier: Apache-2.0
"""The command line, run as its users run it: real kernels, real folders, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashinfer import cli, env, target
from flashinfer.aot.config import read_specs
from flashinfer.cli import _text, warmup
from flashinfer.jit import misses
from flashinfer.jit.stores import PARTIAL, Entry, JitCache, Registry
from flashinfer.version import __version__
from tests.kit import ROOT, compiler_script, cpu_resolver, rmsnorm_spec

# Sizes that the core set lacks: warmup's processes see an installed companion, which the tests hide from themselves.
CONFIG = """
[[kernel]]
family = "rmsnorm"
dtype = "fp32"
hidden_size = 64
vec_size = 4
add_residual = false
gemma = false

[[kernel]]
family = "rmsnorm"
dtype = "fp32"
hidden_size = 72
vec_size = 4
add_residual = false
gemma = false
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(CONFIG)
    return str(path)


Call = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("own_settings")


def test_without_a_command_it_tells_which_there_are(call: Call) -> None:
    assert call() == call("--help")
    code, out, err = call()
    assert code == 0 and err == "" and all(command in out for command in ("doctor", "resolve", "warmup", "misses"))


# ------------------------------------------------------------------------------------------------------------ bad usage


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["cache"], "required: COMMAND"),
        (["cache", "gc"], "required: --max-size"),
        (["cache", "gc", "--max-size", "much"], "size 'much' is not understood; expected a number with K, M, G or T"),
        (["resolve"], "required: --config"),
        (["resolve", "--config", "/no/such.toml"], "/no/such.toml: no such config; expected a file, or one of core"),
        (["resolve", "--config", "smoke", "--target", "sm_9x"], "target 'sm_9x' is unknown; expected sm_<capability>"),
        (["warmup", "--config", "smoke", "--jobs", "some"], "invalid int value: 'some'"),
        (["warmup", "--config", "smoke", "--jobs", "-1"], "--jobs is -1; expected a positive number"),
        (["misses", "report", "/no/such/file"], "/no/such/file does not exist; expected a .jsonl file"),
        (["misses", "report", "--format", "xml"], "invalid choice: 'xml'"),
        (["misses", "report", "--since", "lately"], "time 'lately' is not understood; expected an age such as 30min"),
        (["misses", "report", "--top", "-1"], "--top is -1; expected a number of rows, or 0 for all"),
        (["misses", "report", "--by", "model", "--format", "toml"], "--format toml is a row for each kernel"),
        (
            ["misses", "compact", ".", "--out", "x.csv"],
            "expected a name that ends in .jsonl or .parquet",
        ),
        (["misses", "compact", "docs", "--out", "docs/x.jsonl"], "lies in docs, whose records would then count twice"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(argv: list[str], expected: str, call: Call) -> None:
    code, out, err = call(*argv)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("flashinfer"), err
    assert expected in err


def test_a_broken_config_names_file_and_line(call: Call, tmp_path: Path) -> None:
    (tmp_path / "odd.toml").write_text('\n\n[[kernel]]\nfamily = "rmsnorm"\n')
    code, _, err = call("resolve", "--config", str(tmp_path / "odd.toml"))
    assert code == 2 and "odd.toml:3: [[kernel]] row 1 (rmsnorm)" in err and err.count("\n") == 1


def test_a_broken_setting_is_bad_usage(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_DISABLE_AOT", "maybe")
    code, _, err = call("resolve", "--config", "smoke")
    assert (code, err) == (2, "flashinfer: FLASHINFER_DISABLE_AOT='maybe': expected 0, 1, true or false\n")


def test_help(call: Call) -> None:
    code, out, _ = call("misses", "report", "--help")
    assert code == 0 and out.startswith("usage: flashinfer misses report")
    assert "\nexamples:\n  flashinfer misses report --since 7d\n" in out


def test_every_command_has_a_description_and_examples() -> None:
    """Which are command lines of that command: they parse."""
    top = cli._parser()

    def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
        below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        yield from (leaf for action in below for one in action.choices.values() for leaf in leaves(one))
        if not below:
            yield parser

    found = list(leaves(top))
    assert len(found) > 20
    for parser in found:
        assert parser.description and isinstance(parser, cli._Parser) and parser.examples, parser.prog
        for example in parser.examples:
            assert f"flashinfer {example} ".startswith(f"{parser.prog} ")
            top.parse_args(re.sub(r" >>? \S+$", "", example).split())


def test_a_file_that_cannot_be_written_is_one_line(call: Call, cache: Path) -> None:
    cpu_resolver(cache).load(rmsnorm_spec())
    code, _, err = call("misses", "suggest", "--budget", "1M", "--out", "/no/folder/mine.toml")
    assert (code, err) == (1, "flashinfer: /no/folder/mine.toml: No such file or directory\n")


def test_python_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "flashinfer", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"flashinfer {__version__}\n"


def test_a_reader_that_stops_early_is_no_error(cache: Path) -> None:
    resolver = cpu_resolver(cache)
    for _ in range(2000):
        resolver.misses._recorded.clear()
        resolver.misses.record(rmsnorm_spec(), "why " * 20, "failed", misses.Spent(), 0)
    command = f"{sys.executable} -m flashinfer misses report --format json | head -n 1; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.stderr == ""


# ----------------------------------------------------------------------------------------------------- resolve, warmup


def test_resolve_warmup_resolve(call: Call, config: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = ("--config", config, "--target", target.host())
    code, out, _ = call("resolve", *cpu)
    assert code == 1
    assert out.endswith("2 kernels: 2 to be compiled\n")
    assert "aot: flashinfer_aot is not installed; jit-cache: not in JIT cache" in out
    assert not (cache / "jit").exists()

    code, out, err = call("warmup", *cpu)
    assert code == 0
    assert "2 kernels: 0 ready, 2 to compile\n2 kernels compiled in" in out
    assert not (cache / "misses").exists(), "nobody has missed anything yet"
    code, out, err = call("warmup", *cpu)
    assert (code, out, err) == (0, "2 kernels: 2 ready, 0 to compile\n", "")

    code, out, _ = call("resolve", *cpu)
    assert code == 0 and out.endswith("2 kernels: 2 in the JIT cache\n")
    code, out, _ = call("resolve", *cpu, "--require", "aot", "--json")
    report = json.loads(out)
    assert code == 1 and report["answers"] == {"jit-cache": 2}
    assert report["kernels"][0]["reasons"] == ["aot: flashinfer_aot is not installed"]
    assert report["kernels"][0]["args"]["hidden_size"] == 64

    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    cpu_resolver(cache).load(rmsnorm_spec(64))


def test_resolve_prefers_precompiled_kernels(
    call: Call, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    from flashinfer.jit.source import render

    spec, code_ = rmsnorm_spec(), b"machine code"
    (tmp_path / "aot").mkdir()
    (tmp_path / "aot" / "k.so").write_bytes(code_)
    sha256, digest = hashlib.sha256(code_).hexdigest(), render(spec).digest
    entry = Entry(spec.name, **spec.to_dict(), digest=digest, file="k.so", sha256=sha256, bytes=12, compiler="g++")
    Registry.write(tmp_path / "aot", [entry])
    monkeypatch.setenv("FLASHINFER_AOT_PATH", str(tmp_path / "aot"))
    code, out, _ = call("resolve", "--config", config, "--target", target.host(), "--problems")
    assert code == 1
    assert out.endswith("2 kernels: 1 precompiled, 1 to be compiled\n")
    assert out.count(target.host()) == 1 and "aot: not in registry; jit-cache: not in JIT cache" in out


def test_resolve_for_a_machine_that_is_not_here(call: Call, config: str) -> None:
    code, out, _ = call("resolve", "--config", config, "--target", "sm_80,sm_90a", "--json")
    assert code == 1
    assert {kernel["target"] for kernel in json.loads(out)["kernels"]} == {"sm_80", "sm_90a"}


def test_default_target_is_this_machine(call: Call, config: str) -> None:
    _, out, _ = call("resolve", "--config", config, "--json", "--cpu")
    assert target.host() in {kernel["target"] for kernel in json.loads(out)["kernels"]}


def test_warmup_goes_on_after_a_failure_and_says_so(
    call: Call, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, _ = compiler_script(tmp_path)
    text = script.read_text().replace(
        'exec g++ "$@"', 'grep -q "kHiddenSize = 64" rmsnorm.cpp && exit 3\nexec g++ "$@"'
    )
    script.write_text(text)
    monkeypatch.setenv("FLASHINFER_CXX", str(script))
    code, out, err = call("warmup", "--config", config, "--target", target.host())
    assert code == 1
    assert "1 kernel compiled in" in out
    failed = re.search(rf"{rmsnorm_spec(64).name} for {target.host()} failed: (.*)\n  source and log: (.*)\n", err)
    assert failed is not None, err
    assert failed[1].endswith("exit status 3, no message")
    assert (Path(failed[2]) / "log.txt").exists()
    assert err.endswith("flashinfer: 1 kernel would still be compiled at run time; see the errors above\n")


def test_warmup_that_could_keep_nothing(call: Call, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", "/proc/flashinfer")
    code, _, err = call("warmup", "--config", config, "--target", target.host())
    assert code == 1
    assert err.endswith("flashinfer: nothing would be kept; set FLASHINFER_CACHE_DIR to a writable folder\n")


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bar = warmup._Bar(2, visible=True)
    bar.advance(rmsnorm_spec())
    bar.advance(rmsnorm_spec())
    bar.close()
    _, halfway, full = capsys.readouterr().err.split("\r\033[K")[1:]
    assert re.fullmatch(rf"\[#{{12}}-{{12}}\] 1/2  ETA \d+ s  rmsnorm {target.host()}", halfway)
    assert full == f"[{'#' * 24}] 2/2  rmsnorm {target.host()}\n"


# --------------------------------------------------------------------------------------------------------------- misses


def test_misses_report(call: Call, cache: Path, tmp_path: Path) -> None:
    assert call("misses", "report")[:2] == (0, f"no misses recorded in {cache / 'misses'}\n")
    resolver = cpu_resolver(cache)
    resolver.load(rmsnorm_spec(64))
    cpu_resolver(cache).load(rmsnorm_spec(64))
    resolver.load(rmsnorm_spec(128))
    (file,) = (cache / "misses").iterdir()
    with open(file, "a") as records:
        records.write('{"spec": {"fam')  # killed while writing

    code, out, _ = call("misses", "report")
    assert code == 0
    header, _, first, _, _, summary, broken = out.splitlines()[:7]
    assert header.split()[:5] == ["seconds", "compile", "processes", "size", "target"], "nobody waited"
    assert "jit-cache, jit-compile" in out and "test_cli.py:" in first
    assert re.fullmatch(r"2 kernels, 1 process, \d+\.\d\d s lost in all", summary)
    assert broken.startswith("1 line could not be read")

    report = json.loads(call("misses", "report", "--format", "json")[1])
    assert report["broken_lines"] == 1
    seconds = [miss["seconds"] for miss in report["misses"]]
    assert seconds == sorted(seconds, reverse=True)

    _, toml, _ = call("misses", "report", str(file), "--format", "toml")
    assert toml.startswith("# 1 unreadable line left out\n# 1 process, ")
    (tmp_path / "holes.toml").write_text(toml)
    code, _, _ = call("warmup", "--config", str(tmp_path / "holes.toml"), "--target", target.host())
    assert code == 0

    assert call("misses", "clear") == (0, "1 record file deleted\n", "")
    assert call("misses", "report")[1].startswith("no misses recorded")


def test_the_command_that_a_report_ends_with_works(call: Call, cache: Path, tmp_path: Path) -> None:
    cpu_resolver(cache).load(rmsnorm_spec())
    _, out, _ = call("misses", "report")
    (command,) = re.findall(r"^  flashinfer (aot build .*)$", out, re.MULTILINE)
    argv = [word.replace("my_kernels", str(tmp_path / "out")) for word in shlex.split(command)]
    code, out, _ = call(*argv, "--dry-run")
    assert code == 0 and "1 to compile" in out
    assert "--target" in argv and argv[argv.index("--target") + 1] == target.host()


def test_a_report_of_a_fleet_suggests_from_the_same_records(
    call: Call, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from those of the machine that it is read on, nor of another time."""
    cpu_resolver(tmp_path / "a b").load(rmsnorm_spec())
    (file,) = (tmp_path / "a b" / "misses").iterdir()
    file.write_text(file.read_text().replace("flashinfer_aot is not installed", "not in registry"))
    _, out, _ = call("misses", "report", str(tmp_path / "a b"), "--since", "2h")
    (command,) = re.findall(r"^   flashinfer (misses suggest .*)$", out, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(*shlex.split(command))
    assert code == 0 and re.search(r"^1 kernel of 1, ", out, re.MULTILINE)
    assert "--since 2h" in command and (tmp_path / "mine.toml").exists()


def test_clearing_records_spares_other_files(call: Call, tmp_path: Path) -> None:
    """A folder that is named by mistake may hold anybody's .jsonl files: notes of a build, data sets."""
    cpu_resolver(tmp_path).load(rmsnorm_spec())
    (record,) = (tmp_path / "misses").iterdir()
    others = [tmp_path / "train.jsonl", tmp_path / "misses" / "empty.jsonl"]
    others[0].write_text('{"text": "a data set"}\n')
    others[1].touch()
    damaged, gone = tmp_path / "data.parquet", tmp_path / "gone.jsonl"  # which cannot be read
    damaged.write_bytes(b"no Parquet")
    gone.symlink_to(tmp_path / "nowhere")
    code, out, _ = call("misses", "clear", str(tmp_path), str(tmp_path / "misses"))
    assert (code, out.splitlines()[0]) == (0, "1 record file deleted")
    assert out.splitlines()[1].startswith("left alone, for no miss record begins it: ")
    assert all(file.exists() for file in (*others, damaged)) and gone.is_symlink() and not record.exists()
    assert sum(str(file) in out for file in (*others, damaged, gone)) == 3 and out.rstrip().endswith("and 1 more")


def test_records_of_a_fleet_merge_by_naming_them(call: Call, tmp_path: Path) -> None:
    for machine in ("a", "b"):
        cpu_resolver(tmp_path / machine).load(rmsnorm_spec())
    files = [next((tmp_path / machine / "misses").iterdir()) for machine in ("a", "b")]
    text = files[1].read_text().replace(misses._process_name(os.getpid()), "another-2-2")
    files[1].write_text(text)
    _, out, _ = call("misses", "report", str(tmp_path / "a"), str(files[1]), "--format", "json")
    (hole,) = json.loads(out)["misses"]
    assert hole["processes"] == 2


def test_a_report_says_what_to_do(call: Call, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_TAG", "llama-3-8b/prefill")
    resolver = cpu_resolver(cache)
    core = next(spec for spec in read_specs(["core"], [target.host()]) if spec.family == "rmsnorm")
    for spec in (rmsnorm_spec(64), rmsnorm_spec(72), core):
        resolver.load(spec)
    code, out, _ = call("misses", "report", "--top", "1")
    assert code == 0
    lines = out.splitlines()
    assert "llama-3-8b/prefill" in lines[2]
    assert re.fullmatch(r"and 2 more, \d+\.\d\d s \(--top 0 shows all\)", lines[3])
    assert '1. pip install "flashinfer[aot]"' in lines
    assert re.search(r"its core set has 1 of these 3, \d+\.\d\d s", out)
    by_model = call("misses", "report", "--by", "model")[1]
    assert re.search(r" 1 +3  llama-3-8b/prefill$", by_model, re.MULTILINE)
    groups = json.loads(call("misses", "report", "--by", "family", "--format", "json")[1])
    assert [group["name"] for group in groups["family"]] == ["rmsnorm"]
    assert call("misses", "report", "--format", "toml", "--top", "2")[1].count("[[kernel]]") == 2
    assert call("misses", "report", "--since", "1h")[1].count("rmsnorm-") == 3
    assert "since 2999-01-01" in call("misses", "report", "--since", "2999-01-01")[1]


def test_a_fleet_is_compacted(call: Call, tmp_path: Path) -> None:
    cpu_resolver(tmp_path / "a").load(rmsnorm_spec())
    code, out, _ = call("misses", "compact", str(tmp_path / "a"), "--out", str(tmp_path / "fleet.jsonl"))
    assert code == 0 and re.match(r"1 record in 1 row of \S+/fleet.jsonl: \d+ B -> \d+ B\n", out)
    report = [call("misses", "report", str(path), "--format", "json")[1] for path in tmp_path.iterdir()]
    assert len(set(report)) == 1


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def three_kernels(cache: Path) -> list[Path]:
    """Least recently used first."""
    resolver = cpu_resolver(cache)
    for age, hidden_size in enumerate((64, 128, 256)):
        resolver.load(rmsnorm_spec(hidden_size))
        folder = next(path for path in resolver.jit.folders() if f"={hidden_size}-" in _name(path))
        os.utime(folder, (time.time() - 7200 * (3 - age),) * 2)
    return list(resolver.jit.folders())


def _name(folder: Path) -> str:
    return (folder / "source.cpp").read_text().splitlines()[0]


def test_cache_list(call: Call, cache: Path, three_kernels: list[Path]) -> None:
    code, out, _ = call("cache", "list")
    assert code == 0
    assert [re.findall(r"\d h ago", line) for line in out.splitlines()[2:5]] == [["2 h ago"], ["4 h ago"], ["6 h ago"]]
    assert re.search(rf"3 kernels, [\d.]+ KiB in {re.escape(str(cache / 'jit'))}\n", out)
    report = json.loads(call("cache", "list", "--json")[1])
    assert report["bytes"] == sum(kernel["bytes"] for kernel in report["kernels"])
    for damage in ("{", "[]", '{"family": 1, "args": [], "target": null, "compiler": {}}'):
        (three_kernels[0] / "spec.json").write_text(damage)
        assert "(damaged)" in call("cache", "list")[1]


def test_cache_list_of_nothing_makes_nothing(call: Call, cache: Path) -> None:
    assert call("cache", "list") == (0, f"0 kernels, 0 B in {cache / 'jit'}\n", "")
    assert not cache.exists()


def test_cache_gc_evicts_the_least_recently_used(call: Call, cache: Path, three_kernels: list[Path]) -> None:
    sizes = [kernel["bytes"] for kernel in json.loads(call("cache", "list", "--json")[1])["kernels"]]
    abandoned, fresh = cache / "jit" / f"{PARTIAL}old", cache / "jit" / f"{PARTIAL}new"
    for folder in (abandoned, fresh):
        folder.mkdir()
    os.utime(abandoned, (time.time() - 7200,) * 2)
    limit = str(sum(sizes) - 1)
    code, out, _ = call("cache", "gc", "--max-size", limit, "--dry-run")
    assert code == 0 and "would be removed" in out
    assert all(folder.exists() for folder in (*three_kernels, abandoned))

    code, out, _ = call("cache", "gc", "--max-size", limit)
    assert code == 0 and "1 kernel and 4 leftovers removed" in out, out  # an abandoned folder and three lock files
    assert [folder.exists() for folder in three_kernels] == [False, True, True]
    assert fresh.exists() and not abandoned.exists()
    assert not list((cache / "jit").glob("*.lock"))
    assert "0 kernels and 0 leftovers removed" in call("cache", "gc", "--max-size", "1G")[1]


def test_cache_gc_leaves_a_held_lock(call: Call, cache: Path) -> None:
    import filelock

    (cache / "jit").mkdir(parents=True)
    lock = cache / "jit" / ".busy.lock"
    with filelock.FileLock(str(lock)):
        call("cache", "gc", "--max-size", "0")
        assert lock.exists()


def test_cache_clear(call: Call, cache: Path, three_kernels: list[Path]) -> None:
    (cache / "failed" / "x").mkdir(parents=True)
    assert call("cache", "clear") == (0, f"3 kernels removed from {cache / 'jit'}\n", "")
    assert list(JitCache(cache / "jit").folders()) == []
    assert not (cache / "failed").exists()
    assert (cache / "misses").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1k", 1024),
        ("500M", 500 * 1024**2),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("2TB", 2 * 1024**4),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert _text.parse_size(text) == expected


# ------------------------------------------------------------------------------------------------------- documentation


def test_operations_page_lists_every_setting() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    rows = dict(re.findall(r"^\| `(FLASHINFER_\w+)` \|[^|]*\| (.*?) \|$", page, re.MULTILINE))
    assert rows == {setting.name: setting.doc for setting in env.ALL}
