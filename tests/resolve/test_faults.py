# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on real machines: file systems that are full, read-only or absent, killed processes, damaged files,
missing compilers, many processes at once, forks."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashinfer.errors import ToolchainMissing
from flashinfer.jit import cache_dir, loader, stores, toolchain
from flashinfer.jit import resolver as resolver_module
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.source import render
from flashinfer.jit.stores import AotStore, Hit, JitCache, Rejected
from flashinfer.jit.toolchain import HostCxx, Nvrtc
from tests.kit import (
    PATIENCE_SECONDS,
    CountingCxx,
    compiler_script,
    cpu_resolver,
    finish,
    fork,
    miss_records,
    mounted_tmpfs,
    only_artifact,
    read_only,
    rmsnorm_spec,
    run_rmsnorm,
    set_field,
    wait_until,
)

# The whole path of a user's process: an operator on CPU tensors.
CALL = """
    import torch, flashinfer
    x, weight = torch.randn(2, 64), torch.randn(64)
    out = flashinfer.rmsnorm(x, weight)
    assert torch.allclose(out, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight, atol=1e-5)
    from flashinfer.jit import default_resolver
    print(default_resolver().cache_dir)
"""


# ------------------------------------------------------------------------------------------------- the cache directory


def test_missing_cache_directory_is_made(tmp_path: Path) -> None:
    cache = tmp_path / "not" / "yet"
    out, _ = finish(fork(CALL, FLASHINFER_CACHE_DIR=cache))
    assert out.strip() == str(cache)
    only_artifact(cache)


@pytest.mark.parametrize("obstacle", ["a file in the way", "a folder nobody may write"])
def test_unusable_cache_directory_costs_a_warning(obstacle: str, tmp_path: Path) -> None:
    if obstacle == "a file in the way":
        (tmp_path / "file").touch()
        cache = tmp_path / "file" / "cache"
    else:
        cache = Path("/proc/flashinfer")  # making a folder there fails for root too
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    out, err = finish(fork(CALL, FLASHINFER_CACHE_DIR=cache, TMPDIR=temporary))
    used = Path(out.strip())
    assert used.parent == temporary
    assert err.count("WARNING") == 1 and f"the cache directory {cache} cannot be made" in err, err
    assert "set FLASHINFER_CACHE_DIR to a writable folder" in err
    assert [path.name for path in used.iterdir()] == ["misses"], "the temporary cache is gone, the records are not"


def test_read_only_cache_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container image with a warm cache inside."""
    with mounted_tmpfs(tmp_path / "image", "8m") as cache:
        cpu_resolver(cache).load(rmsnorm_spec())
        with read_only(cache):
            monkeypatch.setenv("FLASHINFER_CACHE_DIR", str(cache))
            monkeypatch.setenv("FLASHINFER_DISABLE_AOT", "1")
            resolver = resolver_module.make_resolver()
            assert resolver.cache_dir != cache
            monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
            run_rmsnorm(resolver.load(rmsnorm_spec()))
            monkeypatch.delenv("FLASHINFER_DISABLE_JIT")
            run_rmsnorm(resolver.load(rmsnorm_spec(128)), 128)


def test_cache_directory_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # what the system says of it to anyone but root
    assert cache_dir.usable() != tmp_path
    assert f"the cache directory {tmp_path} is not writable" in warnings()[0]


def test_full_disk(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    with mounted_tmpfs(tmp_path / "full", "64k") as cache:
        (cache / "jit").mkdir()
        (cache / "misses").mkdir()
        with pytest.raises(OSError), open(cache / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        resolver = cpu_resolver(cache)
        run_rmsnorm(resolver.load(rmsnorm_spec()))
        assert any("cannot be written (No space left on device)" in line for line in warnings()), warnings()
        assert not [path for path in (cache / "jit").iterdir() if path.is_dir()], "nothing unfinished is left"


def test_disk_that_fills_up_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    run_rmsnorm(cpu_resolver(tmp_path).load(rmsnorm_spec()))
    assert (
        len(warnings()) == 1 and "No space left on device" in warnings()[0] and "flashinfer cache gc" in warnings()[0]
    )
    assert not [path for path in (tmp_path / "jit").iterdir() if path.is_dir()]
    monkeypatch.undo()
    run_rmsnorm(cpu_resolver(tmp_path).load(rmsnorm_spec()))
    only_artifact(tmp_path)


def test_nothing_at_all_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a temporary folder; precompiled kernels load all the same."""

    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    warm = cpu_resolver(tmp_path / "warm")
    warm.load(rmsnorm_spec())
    monkeypatch.setenv("FLASHINFER_CACHE_DIR", "/proc/flashinfer")
    monkeypatch.setattr(cache_dir.tempfile, "mkdtemp", refuse)
    resolver = resolver_module.make_resolver()
    resolver.jit.also_read = (warm.jit.root,)
    run_rmsnorm(resolver.load(rmsnorm_spec()))


def test_no_home_directory(tmp_path: Path) -> None:
    """HOME is unset and the system does not know the user: no folder named ~ may appear."""
    code = f"""
    import os, pwd
    os.chdir({str(tmp_path)!r})
    def unknown(uid):
        raise KeyError(uid)
    pwd.getpwuid = unknown
    {CALL}
    """
    nowhere = {"HOME": None, "XDG_CACHE_HOME": None, "FLASHINFER_CACHE_DIR": None}
    _, err = finish(fork(code, **nowhere))
    assert "no home directory" in err
    assert not list(tmp_path.iterdir())


def test_home_unset_but_known_to_the_system(tmp_path: Path) -> None:
    pytest.importorskip("platformdirs")
    code = f"""
    import os, pwd, types
    pwd.getpwuid = lambda uid: types.SimpleNamespace(pw_dir={str(tmp_path)!r})
    {CALL}
    """
    out, _ = finish(fork(code, HOME=None, XDG_CACHE_HOME=None, FLASHINFER_CACHE_DIR=None))
    assert out.strip() == str(tmp_path / ".cache" / "flashinfer")


def test_relative_cache_directory_stays_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    code = f"""
    import os
    os.chdir({str(tmp_path)!r})
    from flashinfer.jit import default_resolver
    default_resolver()
    os.chdir("elsewhere")
    {CALL}
    """
    finish(fork(code, FLASHINFER_CACHE_DIR="cache"))
    only_artifact(tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------- killed processes


def test_killed_in_the_middle_of_a_compile(tmp_path: Path) -> None:
    script, uses = compiler_script(tmp_path)
    cache = tmp_path / "cache"
    process = fork(CALL, FLASHINFER_CXX=script, FLASHINFER_CACHE_DIR=cache, COMPILE_HELD=script)
    wait_until(lambda: uses.exists() or process.poll() is not None)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not [path for path in (cache / "jit").iterdir() if path.is_dir()]

    _, err = finish(fork(CALL, FLASHINFER_CXX=script, FLASHINFER_CACHE_DIR=cache))
    assert "waiting for another process" not in err, "the lock of a killed process is free"
    only_artifact(cache)
    assert len(uses.read_text().split()) == 2


def test_killed_while_writing_to_the_cache(tmp_path: Path) -> None:
    killed = f"""
    import os, signal
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    {CALL}
    """
    process = fork(killed, FLASHINFER_CACHE_DIR=tmp_path)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGKILL
    (partial,) = [path for path in (tmp_path / "jit").iterdir() if path.is_dir()]
    assert partial.name.startswith(stores.PARTIAL)
    assert list(JitCache(tmp_path / "jit").folders()) == []

    finish(fork(CALL, FLASHINFER_CACHE_DIR=tmp_path))
    assert len(list(JitCache(tmp_path / "jit").folders())) == 1
    cache = JitCache(tmp_path / "jit")
    assert partial not in cache.leftovers(older_than=3600)
    assert partial in cache.leftovers(older_than=0)


# --------------------------------------------------------------------------------------------------- many at one time


def test_several_processes_on_one_cold_cache(tmp_path: Path) -> None:
    script, uses = compiler_script(tmp_path)
    cache, held = tmp_path / "cache", tmp_path / "held"
    held.touch()
    processes = [fork(CALL, FLASHINFER_CXX=script, FLASHINFER_CACHE_DIR=cache, COMPILE_HELD=held) for _ in range(4)]
    wait_until(lambda: sum("waiting for another process" in process.errors() for process in processes) == 3)
    held.unlink()
    logs = [finish(process)[1] for process in processes]
    only_artifact(cache)
    assert len(uses.read_text().split()) == 1, "one process compiles, the others wait for it"
    assert sum("compiled" in text for text in logs) == 1
    records = miss_records(cache / "misses")
    assert sorted(record.resolved_by for record in records) == ["jit-cache"] * 3 + ["jit-compile"]
    for record in records:  # the time of those who wait is not that of the compiler
        if record.resolved_by == "jit-compile":
            assert record.compiled > 0.0 and record.waited == 0.0
        else:
            assert record.compiled == 0.0 and record.waited > 0.0
        assert record.compiled + record.waited <= record.seconds + 0.001


def test_processes_without_locks_still_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks: work is done twice, and that is all."""
    import filelock

    def unsupported(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(filelock.FileLock, "acquire", unsupported)
    together = threading.Barrier(2)

    class TogetherCxx(CountingCxx):
        def compile(self, source: object) -> object:
            together.wait()
            return super().compile(source)

    compiler = TogetherCxx()
    threads = [threading.Thread(target=cpu_resolver(tmp_path, compiler).load, args=(rmsnorm_spec(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.num_compiles == 2
    only_artifact(tmp_path)


def test_a_lock_held_too_long_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    monkeypatch.setattr(resolver_module, "_LOCK_TIMEOUT_SECONDS", 0.1)
    (tmp_path / "jit").mkdir()
    digest = render(rmsnorm_spec()).digest
    with filelock.FileLock(str(tmp_path / "jit" / f".{digest[:32]}.lock")):
        run_rmsnorm(cpu_resolver(tmp_path).load(rmsnorm_spec()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_keeps_records_apart_and_does_not_hang(tmp_path: Path) -> None:
    """The child is forked while another thread of the parent is in the middle of a compile."""
    script, uses = compiler_script(tmp_path)
    cache, held = tmp_path / "cache", tmp_path / "held"
    held.touch()
    code = f"""
    import os, sys, threading, torch, flashinfer
    from tests.kit import wait_until
    def call(size):
        flashinfer.rmsnorm(torch.randn(2, size), torch.randn(size))
    call(64)
    os.environ["COMPILE_HELD"] = {str(held)!r}
    busy = threading.Thread(target=call, args=(128,))
    busy.start()
    wait_until(lambda: len(open({str(uses)!r}).readlines()) == 2)
    child = os.fork()
    torch.set_num_threads(1)
    if child == 0:
        from flashinfer.jit import default_resolver
        from flashinfer.jit.spec import KernelSpec
        from tests.kit import rmsnorm_spec
        default_resolver().load(rmsnorm_spec(128))
        default_resolver().load(rmsnorm_spec(256))
        os._exit(0)
    os.unlink({str(held)!r})
    busy.join()
    print(child)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    process = fork(code, FLASHINFER_CXX=script, FLASHINFER_CACHE_DIR=cache)
    out, _ = finish(process)
    records = miss_records(cache / "misses")
    by_process: dict[str, list[int]] = {}
    for record in records:
        by_process.setdefault(record.process.split("-")[-2], []).append(record.spec["args"]["hidden_size"])
    assert by_process == {str(process.pid): [64, 128], out.strip(): [128, 256]}


# ------------------------------------------------------------------------------------------------------- damaged files

DAMAGES: dict[str, Callable[[Path], object]] = {
    "kernel truncated": lambda folder: _rewrite(folder / "kernel.so", lambda content: content[:100]),
    "kernel empty": lambda folder: _rewrite(folder / "kernel.so", lambda content: b""),
    "kernel tampered with": lambda folder: _rewrite(folder / "kernel.so", _flip_byte),
    "kernel gone": lambda folder: (folder / "kernel.so").unlink(),
    "description truncated": lambda folder: os.truncate(folder / "spec.json", 50),
    "description empty": lambda folder: os.truncate(folder / "spec.json", 0),
    "description of another shape": lambda folder: (folder / "spec.json").write_text("[1, 2]"),
    "description without a field": lambda folder: (folder / "spec.json").write_text('{"file": "kernel.so"}'),
    "description not text": lambda folder: (folder / "spec.json").write_bytes(b"\xff\xfe\x00"),
    "description of another kernel": lambda folder: set_field(folder / "spec.json", "digest", "0" * 64),
    "a file instead of the folder": lambda folder: _replace_by_file(folder),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_entry_is_compiled_again(damage: str, tmp_path: Path) -> None:
    compiler, spec = CountingCxx(), rmsnorm_spec()
    cpu_resolver(tmp_path, compiler).load(spec)
    DAMAGES[damage](only_artifact(tmp_path))
    resolver = cpu_resolver(tmp_path, compiler)
    assert isinstance(resolver.explain(spec)[1][1], Rejected)
    run_rmsnorm(resolver.load(spec))
    assert compiler.num_compiles == 2
    only_artifact(tmp_path)
    run_rmsnorm(cpu_resolver(tmp_path, compiler).load(spec))
    assert compiler.num_compiles == 2, "the damaged entry has been replaced"


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    content = path.read_bytes()
    path.unlink()  # this process has the file mapped, and a mapped file must not change under it
    path.write_bytes(change(content))


def _flip_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _replace_by_file(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.touch()


def test_a_library_that_vanishes_before_it_is_loaded(tmp_path: Path) -> None:
    """`flashinfer cache clear` in between, or a file system that forbids execution."""
    spec = rmsnorm_spec()
    resolver = cpu_resolver(tmp_path)
    resolver.load(spec)
    (_, hit) = resolver.explain(spec)[1]
    assert isinstance(hit, Hit) and hit.path is not None
    hit.path.unlink()
    run_rmsnorm(loader.load(hit.source, hit.machine_code, hit.path, pytest.fail))


# -------------------------------------------------------------------------------------------------- missing compilers


@pytest.fixture
def no_cuda_packages(monkeypatch: pytest.MonkeyPatch, nothing_located: None) -> None:
    """A machine without toolkit, conda and pip's nvidia packages."""
    monkeypatch.setattr(toolchain, "_installed", lambda distribution, file_name: None)


@pytest.fixture
def nothing_located(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NVIDIA's locator finds nothing."""
    from cuda import pathfinder

    def not_found(name: str) -> object:
        raise pathfinder.DynamicLibNotFoundError(name)

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", not_found)
    monkeypatch.setattr(pathfinder, "locate_nvidia_header_directory", lambda name: None)
    toolchain.nvrtc_library.cache_clear()
    toolchain.cuda_include.cache_clear()
    yield
    toolchain.nvrtc_library.cache_clear()
    toolchain.cuda_include.cache_clear()


@pytest.mark.usefixtures("no_cuda_packages")
def test_no_nvrtc_and_no_companion(tmp_path: Path) -> None:
    resolver = Resolver(AotStore(roots=[]), tmp_path, lambda kind: Nvrtc())
    with pytest.raises(ToolchainMissing) as error:
        resolver.load(rmsnorm_spec(on="sm_90a"))
    message = str(error.value)
    for part in (
        "rmsnorm-dtype=fp32-hidden_size=64",
        "for sm_90a",
        "AOT: flashinfer_aot is not installed",
        "NVRTC, the compiler of CUDA kernels, was not found",
        "pip install 'flashinfer[cu13]'",
        "'flashinfer[cu12]'",
        "pip install 'flashinfer[aot]'",
    ):
        assert part in message, message
    (record,) = miss_records(tmp_path / "misses")
    assert record.resolved_by == "failed"


@pytest.mark.usefixtures("nothing_located")
def test_packages_outside_of_site_packages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the environment that pip builds in, where NVIDIA's locator does not look."""
    (tmp_path / "nvidia/include").mkdir(parents=True)
    (tmp_path / "nvidia/include/cuda_fp16.h").touch()
    info = tmp_path / "nvidia_cuda_runtime-13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-runtime\nVersion: 13.0\n")
    (info / "RECORD").write_text("nvidia/include/cuda_fp16.hpp,,\nnvidia/include/cuda_fp16.h,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert toolchain.cuda_include() == tmp_path / "nvidia/include"


@pytest.mark.usefixtures("no_cuda_packages")
def test_no_cuda_headers() -> None:
    with pytest.raises(ToolchainMissing, match=r"cuda_fp16\.h.*flashinfer\[cu13\]"):
        toolchain.cuda_include()


def test_no_locator_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.pathfinder", None)
    toolchain.nvrtc_library.cache_clear()
    with pytest.raises(ToolchainMissing, match=r"flashinfer\[cu13\]"):
        toolchain.nvrtc_library()


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "not-a-compiler"])
def test_no_host_compiler(compiler: str, tmp_path: Path) -> None:
    with pytest.raises(ToolchainMissing, match=r"apt-get install g\+\+.*FLASHINFER_CXX"):
        cpu_resolver(tmp_path, HostCxx(compiler)).load(rmsnorm_spec())


def test_a_host_compiler_that_is_no_program(tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_bytes(b"\x00\x01\x02")
    broken.chmod(0o755)
    with pytest.raises(ToolchainMissing, match="cannot be run"):
        cpu_resolver(tmp_path, HostCxx(str(broken))).load(rmsnorm_spec())


def test_no_compiler_but_a_warm_cache(tmp_path: Path) -> None:
    """What one image compiled, another without compiler runs."""
    cpu_resolver(tmp_path).load(rmsnorm_spec())
    run_rmsnorm(cpu_resolver(tmp_path, HostCxx("/no/such/compiler")).load(rmsnorm_spec()))


def test_no_room_for_temporary_files(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "tmp", "8k") as temporary:
        process = fork(CALL, TMPDIR=temporary, FLASHINFER_CACHE_DIR=tmp_path / "cache")
        _, err = process.communicate(timeout=PATIENCE_SECONDS)
        last = err.strip().splitlines()[-1]
        assert process.returncode == 1
        assert "CompileError" in err and ("No space left" in last or "error" in last), err
