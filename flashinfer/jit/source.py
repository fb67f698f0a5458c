# SPDX-License-Identifier: Apache-2.0
"""From a spec to source text, and from source text to a digest.

The rendered translation unit names one header, the constants of this kernel, and the entry point. It also asserts the
size and every field offset of the parameter struct against the Python mirror, so that the two cannot drift apart.

The digest covers everything that decides the machine code except the compiler: the rendered text, every header it
includes (transitively, from csrc/), the flags with a meaning, and the target. It holds no path, time or version number.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from flashinfer import env
from flashinfer import target as targets
from flashinfer.jit import spec as specs
from flashinfer.jit.spec import Config, CxxMember, CxxType, Implementation, KernelSpec

# Flags that change what the code means, in the spelling all compilers of a kind share.
FLAGS = {
    "cuda": ("-std=c++20", "-DNDEBUG"),
    # No -ffast-math: NaN and infinity are part of the contract. Kernels ask for reassociation with `omp simd
    # reduction`.
    "cpu": ("-std=c++17", "-O3", "-DNDEBUG", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
}
# Of a CPU kernel under FLASHINFER_SANITIZE: a report names the line. -O1, because optimizing the checks away takes
# several times as long as all the rest.
_SANITIZER_FLAGS = {
    "address": ("-fsanitize=address",),
    "undefined": ("-fsanitize=undefined,float-cast-overflow",),
}
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One translation unit, ready to compile."""

    spec: KernelSpec
    implementation: Implementation
    config: Config
    text: str
    flags: tuple[str, ...]
    digest: str

    @property
    def entry(self) -> str:
        return self.spec.family

    @property
    def kind(self) -> str:
        return targets.kind(self.spec.target)


@functools.cache
def include_root() -> Path:
    """The csrc/ folder: inside the package when installed, beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def render(spec: KernelSpec) -> Source:
    """The translation unit of a spec. Raises UnsupportedConfig when the family is unknown."""
    family = specs.family(spec.family)
    implementation = family.implementation(spec)
    config = implementation.config(spec)
    kind, header, params = targets.kind(spec.target), implementation.header, implementation.params
    standard = ["#include <type_traits>"] if kind == "cpu" else []
    lines = [
        f"// {spec.name}",
        *standard,
        f'#include "{header}"',
        "",
        "struct Config {",
        *constant_lines(config),
        "};",
        "",
    ]
    lines += _layout_asserts(params)
    lines += ["", *(_cuda_entry if kind == "cuda" else _cpu_entry)(family.name, f"flashinfer::{params.__name__}"), ""]
    text = "\n".join(lines)
    flags = FLAGS[kind]
    if kind == "cpu" and (sanitizers := env.SANITIZE.get()):
        chosen = [flag for name in sanitizers for flag in _SANITIZER_FLAGS[name]]
        flags += ("-O1", "-g1", "-fno-omit-frame-pointer", *chosen)
    return Source(spec, implementation, config, text, flags, _digest(text, header, flags, spec.target))


def constants(config: Config) -> dict[str, CxxType | CxxMember | int | bool | float]:
    """What `Config` holds on the device, in its order."""
    launch = config.launch
    return {
        **config.constants,
        "kNumThreads": launch.num_threads,
        "kMinBlocksPerSm": launch.min_blocks_per_sm,
        "kSmemBytes": launch.smem_bytes,
        "kClusterSize": launch.cluster_size,
    }


def constant_lines(config: Config) -> list[str]:
    return [f"  {_constant(name, value)}" for name, value in constants(config).items()]


def _constant(name: str, value: CxxType | CxxMember | int | bool | float) -> str:
    if isinstance(value, CxxMember):
        return value.strip()
    if isinstance(value, CxxType):
        return f"using {name} = flashinfer::{value};"
    if isinstance(value, bool):
        return f"static constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, int):
        return f"static constexpr int {name} = {value};"
    return f"static constexpr float {name} = {value!r}f;"


def _layout_asserts(params: type[ctypes.Structure]) -> list[str]:
    struct = f"flashinfer::{params.__name__}"
    hint = "the Python mirror differs from the C++ struct"
    asserts = [f'static_assert(sizeof({struct}) == {ctypes.sizeof(params)}, "{hint}");']
    for field in params._fields_:
        offset = getattr(params, field[0]).offset
        asserts.append(f'static_assert(FLASHINFER_OFFSETOF({struct}, {field[0]}) == {offset}, "{hint}");')
    return asserts


def _cuda_entry(name: str, params: str) -> list[str]:
    return [
        'extern "C" __global__ void __launch_bounds__(Config::kNumThreads, Config::kMinBlocksPerSm)',
        f"{name}(const __grid_constant__ {params} params) {{",
        f"  flashinfer::{name}<Config>(params);",
        "}",
    ]


def _cpu_entry(name: str, params: str) -> list[str]:
    """Returns whether the kernel had the memory it takes (csrc/cpu/scratch.h)."""
    return [
        f'extern "C" __attribute__((visibility("default"))) bool {name}(const {params}* params) {{',
        "  return [](const auto& given) {",
        f"    if constexpr (std::is_void_v<decltype(flashinfer::cpu::{name}<Config>(given))>) {{",
        f"      flashinfer::cpu::{name}<Config>(given);",
        "      return true;",
        "    } else {",
        f"      return flashinfer::cpu::{name}<Config>(given);",
        "    }",
        "  }(*params);",
        "}",
    ]


def _digest(text: str, header: str, flags: tuple[str, ...], target: str) -> str:
    digest = hashlib.sha256()
    for part in (text, *flags, target, *(header_digest(path) for path in transitive_includes(header))):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


@functools.cache
def transitive_includes(header: str) -> tuple[str, ...]:
    """A header and all it includes from csrc/, sorted."""
    found: dict[str, None] = {header: None}
    queue = [header]
    while queue:
        for included in _INCLUDE.findall(_read_header(queue.pop())):
            if included not in found:
                found[included] = None
                queue.append(included)
    return tuple(sorted(found))


@functools.cache
def _read_header(header: str) -> str:
    return (include_root() / header).read_text(encoding="utf-8")


@functools.cache
def header_digest(header: str) -> str:
    return f"{header}:{hashlib.sha256(_read_header(header).encode()).hexdigest()}"
