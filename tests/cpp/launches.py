"""What Python and C++ launch on a GPU that is not there: run in a process of its own by test_launches.py, with a driver
that writes launches down (pretended_driver.cpp) and tensors that say they are on `cuda:0` (tests/aot/pretended_gpus.py).

Each case calls an operator of Python, then the same through the C interface, on the same tensors and workspaces, and the
lines that the driver wrote must be the same, byte by byte of the parameters. The set holds what Python asked for, and
what it expected to be asked for next; so C++ has to choose as Python does.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import flashinfer
from flashinfer.attention import tma
from flashinfer.families.attention.decode import DecodeParams
from flashinfer.families.attention.prefill import PrefillParams, Sm90PrefillParams
from flashinfer.families.sampling import SampleParams
from flashinfer.jit import KernelSpec, loader, resolver
from flashinfer.jit.source import render
from flashinfer.jit.stores import Entry, Registry
from tests.aot import pretended_gpus
from tests.cpp.kit import (
    Api,
    Kernels,
    MlaShape,
    RopeOptions,
    SampleOptions,
    Shape,
    Workspace,
    entry_of,
    options,
    page_table,
)

BF16, FP8, INT32 = torch.bfloat16, torch.float8_e4m3fn, torch.int32
CODES = {BF16: 2, FP8: 3, torch.float16: 1}
CUDA = torch.device("cuda", 0)


def idle_code(spec: KernelSpec) -> bytes:
    """What the driver takes for machine code."""
    source = render(spec)
    header = struct.pack("<4sB27xQQ6xHHHH2x", b"\x7fELF", 2, 0, 0, 0, 0, 64, 0)
    size = ctypes.sizeof(source.implementation.params)
    return header + f"{spec.family} {size} {source.config.launch.min_blocks_per_sm}\0".encode()


class Set:
    """Kernels that Python asks for, in a folder for C++."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.entries: dict[KernelSpec, Entry] = {}
        self.loaded: dict[KernelSpec, loader.Kernel] = {}

    def add(self, spec: KernelSpec) -> bytes:
        code = idle_code(spec)
        if spec not in self.entries:
            self.entries[spec] = entry_of(self.root, spec, code)
            Registry.write(self.root, list(self.entries.values()))
        return code

    def load(self, spec: KernelSpec) -> loader.Kernel:
        if spec not in self.loaded:
            self.loaded[spec] = loader.load(render(spec), self.add(spec), None, _no_successor)
        return self.loaded[spec]

    def expect(self, specs: Iterable[KernelSpec]) -> None:
        for spec in specs:
            self.add(spec)


def _no_successor(why: str) -> loader.Kernel:
    raise AssertionError(why)


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    return pretended_gpus._on(x, 0)


def ints(*values: int) -> torch.Tensor:
    return on_gpu(torch.tensor(values, dtype=INT32))


def rows(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return on_gpu(torch.zeros(shape, dtype=dtype))


def empty_like(x: torch.Tensor) -> torch.Tensor:
    return on_gpu(torch.zeros(tuple(x.shape), dtype=x.dtype))


def workspaces(wrapper: Any) -> Workspace:
    """Those of a wrapper of Python's."""
    whole, own = wrapper._float_workspace_buffer, wrapper._int_workspace_buffer
    return Workspace(
        own.data_ptr(), own.numel() * own.element_size(), whole.data_ptr(), whole.numel() * whole.element_size()
    )


# --------------------------------------------------------------------------------------------------------------- cases

Call = Callable[[], object]
Pair = tuple[Call, Callable[[Kernels], object]]  # by Python, by C++


def elementwise() -> Iterator[tuple[str, Pair]]:
    eps = ctypes.c_float(1e-6)
    for hidden, offset in ((4096, 0), (128, 0), (128, 1)):
        packed, weight = rows(3, 5, hidden + 8), rows(hidden)
        x, out = packed[:, :4, offset : offset + hidden], rows(3, 4, hidden)
        yield (
            f"rmsnorm {hidden} +{offset}",
            (
                lambda x=x, w=weight, o=out: flashinfer.rmsnorm(x, w, out=o),
                lambda k, x=x, w=weight, o=out: k.rmsnorm(x, w, o, eps, 0),
            ),
        )
    x, residual, weight = rows(70, 4096), rows(70, 4096), rows(4096)
    yield (
        "fused_add_rmsnorm",
        (
            lambda: flashinfer.fused_add_rmsnorm(x, residual, weight),
            lambda k: k.fused_add_rmsnorm(x, residual, weight, eps, 0),
        ),
    )
    indptr, indices, last = ints(0, 2, 4), ints(5, 0, 3, 1), ints(1, 4)
    for num_heads, dim, dtype in ((8, 128, BF16), (1, 64, BF16), (2, 128, FP8)):
        key, value = rows(300, num_heads, dim), rows(300, num_heads, dim)
        batch, positions = on_gpu(torch.zeros(300, dtype=INT32)), on_gpu(torch.zeros(300, dtype=INT32))
        cache = rows(6, 2, 16, num_heads, dim, dtype=dtype)
        scales = {"k_scale": 0.5, "v_scale": 2.0} if dtype is FP8 else {}
        numbers = [ctypes.c_float(x) for x in scales.values()] or [ctypes.c_float(1)] * 2
        yield (
            f"append {num_heads} x {dim} {dtype}",
            (
                lambda a=(key, value, batch, positions, cache), s=scales: flashinfer.append_paged_kv_cache(
                    *a, indices, indptr, last, **s
                ),
                lambda k, a=(key, value, batch, positions, cache[:, 0], cache[:, 1]), n=numbers: k.append(
                    *a, page_table(indptr, indices, last), *n
                ),
            ),
        )
    for dim, rotary in ((128, 128), (96, 96), (128, 64)):
        q, key, positions = rows(50, 32, dim), rows(50, 8, dim), on_gpu(torch.zeros(50, dtype=INT32))
        in_place = {"rotary_dim": rotary, "rope_theta": 5e5}
        yield (
            f"rope {rotary} of {dim} in place",
            (
                lambda a=(q, key, positions), s=in_place: flashinfer.apply_rope_pos_ids_inplace(*a, **s),
                lambda k, q=q, key=key, p=positions, r=rotary: k.rope(
                    q, key, p, q, key, RopeOptions(r, 0, 1.0, 5e5, 1.0, 4.0, 0)
                ),
            ),
        )
    for num_rows, vocab in ((1, 128256), (64, 128256), (512, 32000), (3, 1000)):
        probs, out, words = (
            rows(num_rows, vocab, dtype=torch.float32),
            on_gpu(torch.zeros(num_rows, dtype=INT32)),
            (7, 8),
        )

        def top_p(probs: torch.Tensor, out: torch.Tensor) -> None:
            flashinfer.sampling.top_p_sampling_from_probs(probs, 0.875, seed=7, offset=8)

        def logits(probs: torch.Tensor, out: torch.Tensor) -> None:
            flashinfer.sampling.sampling_from_logits(probs, seed=7, offset=8)

        yield (
            f"top_p_sample {num_rows} x {vocab}",
            (
                lambda a=(probs, out): top_p(*a),
                lambda k, a=(probs, out): k.sample(*a, SampleOptions(0, 0, 0.875, 0.0, 0, *words)),
            ),
        )
        yield (
            f"sample logits {num_rows} x {vocab}",
            (
                lambda a=(probs, out): logits(*a),
                lambda k, a=(probs, out): k.sample(*a, SampleOptions(1, 0, 1.0, 0.0, 0, *words)),
            ),
        )


DECODES: dict[str, dict[str, Any]] = {
    "8 of 32 heads": {},
    "groups of 12": {"heads": (24, 2)},
    "head_dim 256, page_size 1": {"dim": 256, "page": 1, "heads": (16, 8)},
    "fp8 cache with a scale, window": {"kv": FP8, "options": {"window_left": 100}, "scale": 0.5},
    "soft cap": {"options": {"logits_soft_cap": 30.0, "sm_scale": 0.1}},
    "a large batch": {"batch": 200},
}


def attention() -> Iterator[tuple[str, Pair]]:
    for name, case in DECODES.items():
        yield f"decode, {name}", decode_case(**case)
    for kv_len in (100, 5000, 100000):
        yield f"single decode of {kv_len}", single_decode_case(kv_len)
    for name, case in PREFILLS.items():
        yield f"prefill, {name}", prefill_case(**case)
    for name, case in {"long": (4096, 4096), "few on many": (16, 8192), "short": (4, 100)}.items():
        yield f"single prefill, {name}", single_prefill_case(*case)
    for name, case in MLAS.items():
        yield f"mla, {name}", mla_case(**case)


def tables(batch: int, page: int, kv_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    each = -(-kv_len // page)
    indptr = ints(*(each * i for i in range(batch + 1)))
    return indptr, ints(*range(each * batch)), ints(*[(kv_len - 1) % page + 1] * batch), each * batch


def of_shape(heads: tuple[int, int], dim: int, page: int, q: torch.dtype, kv: torch.dtype) -> Shape:
    return Shape(*heads, dim, 0, page, CODES[q], CODES[kv], CODES[BF16])


def decode_case(
    heads: tuple[int, int] = (32, 8),
    dim: int = 128,
    page: int = 16,
    batch: int = 5,
    kv: torch.dtype = BF16,
    scale: float = 1.0,
    options: dict[str, Any] | None = None,
) -> Pair:
    given = options or {}
    indptr, indices, last, num_pages = tables(batch, page, 40)
    q, cache = rows(batch, heads[0], dim), rows(num_pages, 2, page, heads[1], dim, dtype=kv)
    out, lse = empty_like(q), rows(batch, heads[0], dtype=torch.float32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(rows(64 << 20, dtype=torch.uint8))

    def by_python() -> None:
        wrapper.plan(indptr, indices, last, *heads, dim, page, q_data_type=BF16, kv_data_type=kv, **given)
        for _ in range(2):  # the second may read its plan ahead of the kernel before it
            wrapper.run(q, cache, k_scale=scale, v_scale=scale, out=out, lse=lse, return_lse=True)

    def by_cpp(kernels: Kernels) -> None:
        made = kernels.make("batch_decode", workspaces(wrapper))
        how = c_options(k_scale=scale, v_scale=scale, **given)
        made.plan(page_table(indptr, indices, last), of_shape(heads, dim, page, BF16, kv), how)
        for _ in range(2):
            made.run(q, cache[:, 0], cache[:, 1], out, lse)

    return by_python, by_cpp


c_options = options


def single_decode_case(kv_len: int) -> Pair:
    from flashinfer.attention.decode import single

    q, k, v = rows(32, 128), rows(kv_len, 8, 128), rows(kv_len, 8, 128)

    def by_python() -> None:
        single._scratches.clear()
        single._singles = type(single._singles)()
        flashinfer.single_decode_with_kv_cache(q, k, v)

    def by_cpp(kernels: Kernels) -> None:
        workspace = Workspace()
        if single._scratches:
            ((counters, partials),) = single._scratches.values()
            sizes = (counters.numel() * 4, partials.numel())
            workspace = Workspace(counters.data_ptr(), sizes[0] + 512, partials.data_ptr(), sizes[1] + 512)
        kernels.single_decode(workspace, q, k, v, rows(32, 128), options())

    return by_python, by_cpp


PREFILLS: dict[str, dict[str, Any]] = {
    "4 x 512": {},
    "16 queries each": {"qo_len": 16},
    "long": {"qo_len": 8192, "kv_len": 8192, "batch": 2},
    "page_size 1, no mask": {"page": 1, "causal": False},
    "page_size 12": {"page": 12},
    "fp8 cache": {"kv": FP8, "scale": 0.5},
    "window, soft cap": {"options": {"window_left": 64, "logits_soft_cap": 20.0}},
    "head_dim 64": {"dim": 64},
    "ragged": {"ragged": True},
    "ragged, no mask": {"ragged": True, "causal": False, "heads": (8, 8)},
}


def prefill_case(
    heads: tuple[int, int] = (32, 8),
    dim: int = 128,
    page: int = 16,
    batch: int = 4,
    qo_len: int = 512,
    kv_len: int = 1024,
    kv: torch.dtype = BF16,
    scale: float = 1.0,
    causal: bool = True,
    ragged: bool = False,
    options: dict[str, Any] | None = None,
) -> Pair:
    given, num_tokens = options or {}, batch * qo_len
    qo_indptr = ints(*(qo_len * i for i in range(batch + 1)))
    q = rows(num_tokens, heads[0], dim)
    out, lse = empty_like(q), rows(num_tokens, heads[0], dtype=torch.float32)
    how = c_options(is_causal=causal, k_scale=scale, v_scale=scale, **given)
    buffer = rows(64 << 20, dtype=torch.uint8)
    if ragged:
        kv_indptr = ints(*(kv_len * i for i in range(batch + 1)))
        k, v = rows(batch * kv_len, heads[1], dim), rows(batch * kv_len, heads[1], dim)
        of_rows = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(buffer)

        def ragged_by_python() -> None:
            of_rows.plan(qo_indptr, kv_indptr, *heads, dim, causal=causal, q_data_type=BF16, **given)
            of_rows.run(q, k, v, out=out, lse=lse, return_lse=True)

        def ragged_by_cpp(kernels: Kernels) -> None:
            made = kernels.make("batch_prefill", workspaces(of_rows))
            made.plan_ragged(qo_indptr, num_tokens, kv_indptr, of_shape(heads, dim, 1, BF16, kv), how)
            made.run_ragged(q, k, v, out, lse)

        return ragged_by_python, ragged_by_cpp

    indptr, indices, last, num_pages = tables(batch, page, kv_len)
    cache = rows(num_pages, 2, page, heads[1], dim, dtype=kv)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(buffer)

    def by_python() -> None:
        wrapper.plan(
            qo_indptr, indptr, indices, last, *heads, dim, page, causal=causal, q_data_type=BF16, kv_data_type=kv,
            **given,
        )  # fmt: skip
        wrapper.run(q, cache, k_scale=scale, v_scale=scale, out=out, lse=lse, return_lse=True)

    def by_cpp(kernels: Kernels) -> None:
        made = kernels.make("batch_prefill", workspaces(wrapper))
        table = page_table(indptr, indices, last)
        made.plan(qo_indptr, num_tokens, table, of_shape(heads, dim, page, BF16, kv), how)
        made.run(q, cache[:, 0], cache[:, 1], out, lse)

    return by_python, by_cpp


def single_prefill_case(qo_len: int, kv_len: int) -> Pair:
    from flashinfer.attention.prefill import single

    q, k, v = rows(qo_len, 32, 128), rows(kv_len, 8, 128), rows(kv_len, 8, 128)

    def by_python() -> None:
        single._schedules.clear()
        single._singles = type(single._singles)()
        flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)

    def by_cpp(kernels: Kernels) -> None:
        workspace = Workspace()
        if single._schedules:
            (schedule,) = single._schedules.values()
            own, whole = schedule.workspaces
            workspace = Workspace(own.data_ptr(), own.numel(), whole.data_ptr(), whole.numel())
        kernels.single_prefill(workspace, q, k, v, rows(qo_len, 32, 128), options(is_causal=1))

    return by_python, by_cpp


MLAS: dict[str, dict[str, Any]] = {
    "decode of 128 heads": {},
    "decode of 16 heads": {"num_heads": 16},
    "page_size 1": {"page": 1},
    "prefill": {"qo_len": 64},
    "fp8": {"kv": FP8, "scale": 0.5},
}


def mla_case(
    num_heads: int = 128,
    page: int = 64,
    batch: int = 4,
    qo_len: int = 1,
    kv: torch.dtype = BF16,
    scale: float = 1.0,
) -> Pair:
    num_tokens = batch * qo_len
    qo_indptr = ints(*(qo_len * i for i in range(batch + 1)))
    indptr, indices, _, num_pages = tables(batch, page, 1000)
    lens = ints(*[1000] * batch)
    q_nope, q_pe = rows(num_tokens, num_heads, 512), rows(num_tokens, num_heads, 64)
    ckv, kpe = rows(num_pages, page, 576, dtype=kv).split((512, 64), dim=-1)
    out, lse = empty_like(q_nope), rows(num_tokens, num_heads, dtype=torch.float32)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(rows(64 << 20, dtype=torch.uint8))

    def by_python() -> None:
        wrapper.plan(qo_indptr, indptr, indices, lens, num_heads, 512, 64, page, True, 0.1, BF16, kv)
        wrapper.run(q_nope, q_pe, ckv, kpe, out=out, lse=lse, return_lse=True, ckv_scale=scale)

    def by_cpp(kernels: Kernels) -> None:
        made = kernels.make("mla", workspaces(wrapper))
        shape = MlaShape(num_heads, 512, 64, page, CODES[BF16], CODES[kv])
        made.plan(qo_indptr, num_tokens, page_table(indptr, indices, lens), shape, 1, 0.1, scale)
        made.run(q_nope, q_pe, ckv, kpe, out, lse)

    return by_python, by_cpp


# ----------------------------------------------------------------------------------------------------------- comparison


def launches(log: Path) -> list[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def difference(python: str, cpp: str) -> str:
    """Where two lines first differ, with the field of the parameters."""
    heads, params = zip(*(line.split(" params ") for line in (python, cpp)))
    if heads[0] != heads[1]:
        return f"{heads[0]}\n    {heads[1]}"
    at = next(i for i in range(len(params[0])) if params[0][i : i + 1] != params[1][i : i + 1]) // 2
    return (
        f"{heads[0]}: byte {at} of the parameters: {params[0][2 * at : 2 * at + 16]}, {params[1][2 * at : 2 * at + 16]}"
    )


def main(library: Path, folder: Path, log: Path) -> int:
    capability = divmod(int(os.environ["PRETENDED_CAPABILITY"]), 10)
    encode = tma.driver.tensor_map_of_16_bit
    pretended_gpus.install((pretended_gpus.Gpu("of the test", capability, int(os.environ["PRETENDED_SMS"])),))
    tma.driver.tensor_map_of_16_bit = encode
    flashinfer.families.register_all()
    api, failed, num_launches = Api(library), 0, 0
    asked, made = Set(folder), resolver.default_resolver()
    made.load, made.expect = asked.load, asked.expect  # type: ignore[method-assign]
    for name, (by_python, by_cpp) in (*elementwise(), *attention()):
        by_python()
        found = launches(log)
        by_cpp(api.open([folder], 0))
        others = launches(log)
        # Python plans again where a run finds the guess of the queries wrong; the last plan is what it ran with.
        found = found[-len(others) :] if name.startswith(("prefill", "mla")) else found
        found, others = ([without_results(name, line) for line in lines] for lines in (found, others))
        wrong = [difference(a, b) for a, b in zip(found, others) if a != b]
        if len(found) != len(others) or not found:
            wrong.append(f"{len(found)} launches by Python, {len(others)} by C++")
        for what in wrong:
            print(f"{name}: {what}")
        failed += bool(wrong)
        num_launches += len(found)
    print(f"{num_launches} launches alike" if failed == 0 else f"{failed} cases differ")
    return 1 if failed else 0


def without_results(name: str, line: str) -> str:
    """Of a call whose result, or scratch, Python allocates: without the addresses."""
    if not name.startswith(("single", "sample", "top_p")):
        return line
    how, params = line.split(" params ")
    known = {ctypes.sizeof(struct): struct for struct in (SampleParams, DecodeParams, PrefillParams, Sm90PrefillParams)}
    struct = known.get(len(params) // 2)
    if struct is None:  # a planner
        return line
    fields = ["token_ids"] if struct is SampleParams else ["out"]
    if name.startswith("single decode"):
        fields += ["counters", "partial_out", "partial_lse"]
    for field in fields:
        at = 2 * getattr(struct, field).offset
        params = f"{params[:at]}{'-' * 16}{params[at + 16 :]}"
    return f"{how} params {params}"


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:4])))
