# SPDX-License-Identifier: Apache-2.0
"""`flashinfer doctor`: what this machine has, whether a kernel compiles and runs on it, and what to install if not."""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from flashinfer import env, families, packages
from flashinfer import target as targets
from flashinfer.aot import tools
from flashinfer.cli._text import count, size, table
from flashinfer.errors import FlashInferError, ToolchainMissing, UnsupportedConfig
from flashinfer.jit import cache_dir, driver, loader, toolchain, trust
from flashinfer.jit.source import render
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import AotStore, Entry, JitCache, Registry
from flashinfer.version import __version__

OK, NOTE, WARNING, FAILURE = "ok", "note", "warning", "FAILED"

_UPSTREAM = ("flashinfer-python", "flashinfer-cubin", "flashinfer-jit-cache")
_LOW_SPACE = 100 * 1024**2


@dataclass(frozen=True)
class Finding:
    name: str
    status: str
    text: str
    fix: str = ""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="what was found on this machine, and what is missing",
        description="Look at this machine, compile and run one tiny kernel on each target it has, and say what to "
        "install when something is missing. Writes nothing. Exit code 1 if something failed.",
        examples=("doctor", "doctor --json"),
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    findings = [finding for check in _CHECKS for finding in _guarded(check)]
    failed = any(finding.status == FAILURE for finding in findings)
    settings = [_setting_in_force(setting) for setting in env.ALL]
    if args.json:
        report = {"ok": not failed, "findings": list(map(asdict, findings)), "settings": settings}
        print(json.dumps(report, indent=1))
    else:
        _print(findings, settings)
    return 1 if failed else 0


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """One broken part of a machine must not hide the others."""
    try:
        yield from check()
    except (FlashInferError, OSError) as error:
        yield Finding(check.__name__.strip("_").replace("_", " "), FAILURE, str(error))


def _print(findings: list[Finding], settings: list[dict[str, Any]]) -> None:
    name_width = max(len(finding.name) for finding in findings)
    status_width = max(len(finding.status) for finding in findings)
    for finding in findings:
        print(f"{finding.name:{name_width}}  {finding.status:{status_width}}  {finding.text}")
        if finding.fix:
            print(f"{'':{name_width}}  {'':{status_width}}  -> {finding.fix}")
    rows = [[entry["name"], entry["value"], "set" if entry["set"] else "default"] for entry in settings]
    print("\n" + table(["setting", "value", "from"], rows))
    bad = [finding for finding in findings if finding.status in (WARNING, FAILURE)]
    print(
        "\nall is well" if not bad else f"\n{count(len(bad), 'finding')} to look at: {', '.join(f.name for f in bad)}"
    )


def _setting_in_force(setting: env.Setting[object]) -> dict[str, Any]:
    try:
        value = setting.get()
    except FlashInferError as error:
        return {"name": setting.name, "value": f"invalid: {error}", "set": True}
    text = os.pathsep.join(map(str, value)) if isinstance(value, tuple) else str(value)
    return {"name": setting.name, "value": text if value not in (None, ()) else "", "set": setting.name in os.environ}


# ------------------------------------------------------------------------------------------------------------- versions


def _settings() -> Iterator[Finding]:
    for setting in env.ALL:
        try:
            setting.get()
        except FlashInferError as error:
            yield Finding("setting", FAILURE, str(error))
    known = {setting.name for setting in env.ALL}
    for name in sorted(os.environ):
        if name.startswith("FLASHINFER_") and name not in known:
            what = "is for installing" if name in env.OF_INSTALLING else "is not a variable of this library"
            yield Finding("setting", NOTE, f"{name} {what} and has no effect")


def _versions() -> Iterator[Finding]:
    yield Finding("Python", OK, f"{platform.python_version()} ({sys.executable})")
    yield Finding("flashinfer", OK, f"{__version__} ({Path(families.__file__).parent.parent})")
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", FAILURE, f"cannot be imported: {error}", "pip install torch")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch", OK, f"{torch.__version__} ({build})")


def _packages() -> Iterator[Finding]:
    """What the library imports but torch, of which _versions speaks; and what building sets takes."""
    needed = {module: text for module, text in packages.RUNTIME.items() if module != "torch"}
    missing = [text for module, text in needed.items() if packages.is_missing(module)]
    yield _installed("packages", FAILURE, missing, needed.values())
    yield _installed("building sets", NOTE, tools.missing(), packages.BUILD.values())


def _installed(name: str, status: str, missing: list[str], needed: Iterable[str]) -> Finding:
    if not missing:
        return Finding(name, OK, packages.names(needed))
    verb = "is" if len(missing) == 1 else "are"
    return Finding(name, status, f"{packages.names(missing)} {verb} not installed", packages.pip_install(missing))


def _upstream() -> Iterator[Finding]:
    """What is installed under upstream's names: stand-ins of this version, or upstream itself."""
    foreign = []
    for name in _UPSTREAM:
        distribution = _distribution(name)
        if distribution is None:
            continue
        installed = f"{name} {distribution.version}"
        public, _, ours = distribution.version.partition("+")
        if any(_is_module(file) for file in distribution.files or ()):
            foreign.append(installed)
        elif ours == _LABEL:
            yield Finding("upstream", OK, f"{installed} stands in for {name} {public}")
        else:
            text = f"{installed} has no modules, and is no stand-in of flashinfer {__version__}"
            yield Finding("upstream", WARNING, text, f"pip install --no-deps {name}=={public}+{_LABEL}, from our index")
    if foreign:
        text = f"{', '.join(foreign)} installed beside this library, which engines take for it"
        names = " ".join(entry.split()[0] for entry in foreign)
        yield Finding("upstream", WARNING, text, f"pip uninstall {names}, then {_REINSTALL}")


_LABEL = __version__.replace("+", ".")  # of a stand-in, as scripts/build_index.py writes it
_REINSTALL = f"pip install --force-reinstall --no-deps flashinfer=={__version__}"


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_module(file: importlib.metadata.PackagePath) -> bool:
    return not file.parts[0].endswith((".dist-info", ".egg-info"))


def _files() -> Iterator[Finding]:
    """Whether the installed folder holds what was installed and nothing else: upstream has the same one."""
    distribution = _distribution("flashinfer")
    recorded = {Path(str(file.locate())).resolve(): file for file in (distribution and distribution.files) or ()}
    ours = {path: file for path, file in recorded.items() if path.is_relative_to(_PACKAGE) and path.suffix != ".pyc"}
    if not ours:  # a checkout
        return
    damaged = [path for path, file in ours.items() if not _is_as_recorded(path, file)]
    found = (path for path in _PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    foreign = sorted({path.relative_to(_PACKAGE).parts[0] for path in found if path not in ours})
    if damaged:
        text = f"{count(len(damaged), 'file')} of {len(ours)} missing or of something else, {_some(damaged)} among them"
        yield Finding("files", FAILURE, text, _REINSTALL)
    if foreign:
        text = f"{_PACKAGE} holds what is not of this library, and engines find it: {_some(foreign)}"
        fix = f"pip uninstall {_UPSTREAM[0]} flashinfer, rm -r {_PACKAGE}, then {_REINSTALL}"
        yield Finding("files", WARNING, text, fix)
    if not damaged and not foreign:
        yield Finding("files", OK, f"{count(len(ours), 'file')}, all as installed")


_PACKAGE = Path(families.__file__).resolve().parent.parent


def _is_as_recorded(path: Path, file: importlib.metadata.PackagePath) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    return file.hash is None or file.hash.mode != "sha256" or file.hash.value == digest


def _some(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _precompiled_kernels() -> Iterator[Finding]:
    if env.DISABLE_AOT.get():
        yield Finding("precompiled kernels", WARNING, f"ignored ({env.DISABLE_AOT.name})")
        return
    store = AotStore()
    if not store.roots():
        text = "flashinfer_aot is not installed; every kernel is compiled on first use"
        yield Finding("precompiled kernels", NOTE, text, f"pip install 'flashinfer[aot]=={__version__}'")
    families.register_all()
    for root in store.roots():
        yield _registry(root)


def _registry(root: Path) -> Finding:
    try:
        registry = Registry(root, env.AOT_TRUST.get())
    except trust.Untrusted as error:
        return Finding("precompiled kernels", FAILURE, f"{root} is not trusted: {error}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Finding("precompiled kernels", FAILURE, f"{root} is not usable: {error}", _COMPANION_FIX)
    matching = sum(_is_current(entry) for entry in registry.entries)
    for_targets = ", ".join(sorted({entry.target for entry in registry.entries})) or "no target"
    text = f"version {registry.version}, {count(len(registry.entries), 'kernel')} for {for_targets} in {root}"
    text += "" if registry.signer is None else f", signed with {registry.signer}"
    if matching == len(registry.entries):
        return Finding("precompiled kernels", OK, text)
    stale = len(registry.entries) - matching
    return Finding(
        "precompiled kernels", WARNING, f"{text}; {stale} built from other sources and not used", _COMPANION_FIX
    )


_COMPANION_FIX = f"pip install --force-reinstall 'flashinfer-aot=={__version__}', or build the set again"


def _is_current(entry: Entry) -> bool:
    try:
        spec = KernelSpec.from_dict({"family": entry.family, "args": entry.args, "target": entry.target})
        return render(spec).digest == entry.digest
    except UnsupportedConfig:  # a family or value this version does not have
        return False


# ------------------------------------------------------------------------------------------------------------------ GPU


def _gpus() -> Iterator[Finding]:
    release, supports = _driver_release(), _driver_version()
    if supports is None:
        yield Finding("driver", NOTE, "no NVIDIA driver; the CPU is the only target")
        return
    yield Finding("driver", OK, f"{release or 'release unknown'}, CUDA up to {supports[0]}.{supports[1]}")
    torch = _torch()
    if torch is None:
        return
    if not torch.cuda.is_available():
        why = "torch is a CPU build" if torch.version.cuda is None else "torch sees no GPU (CUDA_VISIBLE_DEVICES?)"
        fix = f"install a CUDA {supports[0]} build of torch: https://pytorch.org/get-started/locally/"
        yield Finding("GPU", WARNING, why, fix if torch.version.cuda is None else "")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        target = targets.of_device(torch.device("cuda", index))
        memory = size(properties.total_memory)
        text = f"{properties.name}, {target}, {properties.multi_processor_count} SMs, {memory}"
        yield Finding(f"GPU {index}", OK, text)


def _driver_version() -> tuple[int, int] | None:
    try:
        return driver.version()
    except (OSError, FlashInferError):
        return None


def _driver_release() -> str | None:
    try:
        match = re.search(
            r"\s(\d{3}\.\d+(?:\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        )
    except OSError:
        return None
    return match[1] if match else None


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch


def _has_gpu() -> bool:
    torch = _torch()
    return torch is not None and bool(torch.cuda.is_available())


# ----------------------------------------------------------------------------------------------------------- toolchains


def _nvrtc() -> Iterator[Finding]:
    needed = FAILURE if _has_gpu() and env.CUDA_TOOLCHAIN.get() == "nvrtc" else NOTE
    try:
        library = toolchain.nvrtc_library()
    except ToolchainMissing as error:
        yield _missing("NVRTC", needed, error)
    else:
        supports = _driver_version()
        how = "loaded by torch" if library.found_via.startswith("was-already-loaded") else library.found_via
        text = f"{library.version}, {library.path} ({how})"
        if supports is not None and int(library.version.split(".")[0]) > supports[0]:
            fix = f"pip install 'flashinfer[cu{supports[0]}]', or a driver for CUDA {library.version}"
            yield Finding("NVRTC", needed, f"{text}: newer than the driver, which cannot load what it compiles", fix)
        else:
            yield Finding("NVRTC", OK, text)
    try:
        yield Finding("CUDA headers", OK, str(toolchain.cuda_include()))
    except ToolchainMissing as error:
        yield _missing("CUDA headers", needed, error)
    if env.CUDA_TOOLCHAIN.get() == "nvcc":
        try:
            yield Finding("nvcc", OK, toolchain.Nvcc().identity)
        except ToolchainMissing as error:
            yield Finding("nvcc", FAILURE, str(error))


def _missing(name: str, status: str, error: ToolchainMissing) -> Finding:
    what, _, fix = str(error).partition("; ")
    return Finding(name, status, what, fix)


def _host_compiler() -> Iterator[Finding]:
    needed = NOTE if _has_gpu() else FAILURE
    try:
        compiler = toolchain.HostCxx(env.CXX.get())
        yield Finding("host C++", OK, f"{compiler.identity}, {compiler.executable()}")
    except ToolchainMissing as error:
        yield _missing("host C++", needed, error)
    if _torch() is not None:
        try:
            yield Finding("OpenMP", OK, loader.share_openmp())
        except FlashInferError as error:
            yield Finding("OpenMP", needed, str(error), "apt-get install libgomp1")


def _cache() -> Iterator[Finding]:
    folder = cache_dir.preferred()
    if folder is None:
        yield Finding("cache", WARNING, *cache_dir.unknown())
        return
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    cache = JitCache(folder / "jit")
    kernel_folders = list(cache.folders())
    used = sum(file.stat().st_size for kernel in kernel_folders for file in kernel.iterdir())
    free = shutil.disk_usage(existing).free
    text = f"{folder}, {count(len(kernel_folders), 'kernel')}, {size(used)}; {size(free)} free"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        fix = f"set {env.CACHE_DIR.name} to a writable folder; until then each process compiles for itself"
        yield Finding("cache", WARNING, f"{text}; not writable: {error.strerror}", fix)
        return
    if folder.exists() and folder.stat().st_mode & stat.S_IWOTH:
        fix = f"chmod o-w {folder}"
        yield Finding("cache", WARNING, f"{text}; anyone may put kernels there, which your processes would run", fix)
        return
    low = free < _LOW_SPACE
    yield Finding("cache", WARNING if low else OK, text, "free space on that disk" if low else "")


# -------------------------------------------------------------------------------------------------------- a tiny kernel


def _kernels() -> Iterator[Finding]:
    torch = _torch()
    if torch is None:
        return
    if env.DISABLE_JIT.get():
        yield Finding("JIT", NOTE, f"compiling is disabled ({env.DISABLE_JIT.name}); it is tried here all the same")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count() if _has_gpu() else 0)]
    for device in [*devices, torch.device("cpu")]:
        target = targets.of_device(device)
        name = f"kernel on {device}"
        try:
            yield Finding(name, OK, _compile_and_run(device, target))
        except ToolchainMissing as error:
            # A missing compiler was reported above; precompiled kernels may do without.
            yield Finding(name, NOTE if device.type == "cpu" and devices else WARNING, f"not tried: {error}")
        except (FlashInferError, OSError, RuntimeError) as error:
            yield Finding(name, FAILURE, f"{target}: {error}")


def _refused(why: str) -> NoReturn:
    raise FlashInferError(f"what was compiled does not load: {why}")


def _compile_and_run(device: Any, target: str) -> str:
    """Compile RMSNorm, run it, compare with the definition. Bypasses every store, so that the compiler itself is tried
    and nothing is written or recorded."""
    import torch

    from flashinfer.families.layout import fast_divisor
    from flashinfer.families.norm import RMSNORM

    num_rows, hidden_size, eps = 8, 1024, 1e-6
    spec = RMSNORM.spec(target, dtype="fp32", hidden_size=hidden_size, vec_size=4, add_residual=False, gemma=False)
    source = render(spec)
    started = time.perf_counter()
    compiled = toolchain.toolchain(source.kind).compile(source)
    compile_seconds = time.perf_counter() - started

    x = torch.randn(num_rows, hidden_size, dtype=torch.float32, device="cpu")
    weight = torch.randn(hidden_size, dtype=torch.float32, device="cpu")
    ours, on_device, scale = (tensor.to(device) for tensor in (torch.full_like(x, torch.nan), x, weight))
    launcher = loader.load(source, compiled.machine_code, None, _refused).on(device.index)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    values = {
        "input": on_device.data_ptr(),
        "weight": scale.data_ptr(),
        "output": ours.data_ptr(),
        **dict.fromkeys(("residual", "bias", "input_row_stride", "output_row_stride"), 0),
        **dict.fromkeys(("residual_row_stride", "residual_group_stride"), 0),
        **dict.fromkeys(("input_group_stride", "output_group_stride"), hidden_size),
        "num_rows": num_rows,
        **fast_divisor("rows_per_group", 1),
        "eps": eps,
    }
    run_seconds = []
    for _ in range(20):
        started = time.perf_counter()
        launcher((num_rows, 1, 1), stream, values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        run_seconds.append(time.perf_counter() - started)

    wide = x.double()
    expected = wide / (wide.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()
    error = (ours.cpu().double() - expected).abs().max().item()
    if not error < 1e-4:  # NaN too
        raise FlashInferError(f"the kernel ran but its result is off by {error:.1e}; expected less than 1e-4")
    return f"{target}: compiled in {compile_seconds:.2f} s, ran in {min(run_seconds) * 1e6:.0f} µs, result correct"


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _settings,
    _versions,
    _packages,
    _upstream,
    _files,
    _precompiled_kernels,
    _gpus,
    _nvrtc,
    _host_compiler,
    _cache,
    _kernels,
)
