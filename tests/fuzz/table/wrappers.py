"""Planned attention: sequences of calls on one wrapper, beside a model of what the wrapper has to know.

A plan that fails leaves the old one, or a wrapper that says it has none; nobody's later writes to what a plan was given change it.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch

import flashinfer
from tests.fuzz.call import Call, Check, Refused, Unspecified, has_values, near, nothing, tensors_in
from tests.fuzz.draw import Draw
from tests.fuzz.table import Case
from tests.fuzz.table import attention as unplanned
from tests.fuzz.table.indices import LARGEST, integers, offsets, whole
from tests.fuzz.table.page import cache_halves
from tests.oracles.attention import attention

I32 = torch.int32


@dataclass(frozen=True)
class Plan:
    """What was planned, by value."""

    pages: list[list[int]]  # of each request; of ragged KV: its rows
    kv_lens: list[int]
    qo_indptr: list[int]
    num_qo_heads: int
    num_kv_heads: int
    head_dims: tuple[int, int]
    page_size: int  # 0: ragged
    q_dtype: Optional[torch.dtype]  # None: that of the run
    kv_dtype: Optional[torch.dtype]
    o_dtype: Optional[torch.dtype]
    options: dict[str, Any]
    causal: bool = False
    masks: Optional[list[torch.Tensor]] = None


@dataclass
class Model:
    """A wrapper, and what it knows."""

    layout: str
    wrapper: Any = None
    plan: Optional[Plan] = None
    changes: tuple[str, ...] = ()  # of the call that made it
    has_failed: bool = False  # the last plan() raised: the wrapper may have forgotten the one before
    is_overwritten: bool = False  # what the last plan() was given
    is_unknown: bool = False  # the last plan() was one whose meaning is not specified
    batch_size: Optional[int] = None  # that of a wrapper for CUDA graphs
    capacity: int = LARGEST  # entries of its buffer of pages
    buffers: tuple[torch.Tensor, ...] = ()  # which its plans fill
    given: list[torch.Tensor] = field(default_factory=list)  # index tensors of the last plan()

    def settle_plan(self, plan: Optional[Plan], given: list[Any], changes: tuple[str, ...], raised: Optional[BaseException]) -> None:
        self.has_failed = raised is not None
        if raised is None:
            self.plan, self.is_unknown, self.is_overwritten = plan, plan is None, False
            self.changes = tuple(f"planned with {change}" for change in changes)
            self.given = [t for value in given for t in tensors_in(value) if has_values(t) and t.dtype in (I32, torch.int64)]

    def planned(self) -> Plan:
        if self.is_unknown:
            raise Unspecified
        if self.plan is None:
            raise Refused("nothing is planned")
        return self.plan

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why a legal run may be refused after all."""
        if self.plan is None and not self.is_unknown:
            return ("before any plan",)
        failed = ("after a plan that failed",) if self.has_failed else ()
        overwritten = ("after what the plan was given was overwritten",) if self.is_overwritten else ()
        return (*self.changes, *failed, *overwritten)


def _dtype(given: Any) -> torch.dtype:
    """A dtype or its name."""
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype):
        raise Refused(f"{given!r} is no dtype")
    return found


def _count(name: str, given: Any) -> int:
    number = whole(name, given)
    if not 0 < number < LARGEST:
        raise Refused(f"{name} is {number}")
    return number


def _page_table(indptr: Any, indices: Any, last_page_len: Any, page_size: Any) -> tuple[list[list[int]], list[int], int]:
    """Pages and lengths of the requests, and the page size."""
    page_size = _count("page_size", page_size)
    numbers = integers("indices", indices)
    starts = offsets("indptr", indptr)
    if len(starts) > 1 and starts[-1] > len(numbers):
        raise Refused(f"indptr ends at {starts[-1]}, past {len(numbers)} page numbers")
    last = integers("last_page_len", last_page_len, len(starts) - 1)
    pages = [numbers[begin:end] for begin, end in zip(starts, starts[1:])]
    if any(of_request and not 0 <= entries <= page_size for of_request, entries in zip(pages, last)):
        raise Refused("more entries in the last page than a page has")
    lens = [(len(of_request) - 1) * page_size + entries if of_request else 0 for of_request, entries in zip(pages, last)]
    if any(length >= LARGEST for length in lens):
        raise Refused("more keys than int32 counts")
    return pages, lens, page_size


# ---------------------------------------------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class Shape:
    """What the plans and runs of a case have in common, so that kernels are few."""

    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype


def _draw_shape(d: Draw) -> Shape:
    heads = d.random.randint(1, 2)
    dtype, kv_dtype = d.kernel(*unplanned.DTYPES)
    return Shape((heads * d.choice((1, 3)), heads), d.kernel(32, 64), dtype, kv_dtype)


def _draw_lengths(d: Draw, model: Model) -> list[int]:
    count = d.random.randint(0, 3) if model.batch_size is None else model.batch_size
    return d.lengths(count, 12) if d.chance(0.9) else [300] * count


def _draw_table(d: Draw, lens: list[int], page_size: int, is_exact: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    counts = [-(-length // page_size) for length in lens]
    order = list(range(sum(counts) + 2))
    d.random.shuffle(order)
    # As plan() takes them; int64 on the CPU is converted.
    dtype = d.choice((I32, I32, torch.int64))
    return (
        d.index([sum(counts[:i]) for i in range(len(counts) + 1)], dtype),
        d.index(order[: sum(counts)] if d.chance(0.7) or is_exact else order, dtype),
        d.index([(length - 1) % page_size + 1 if length else d.choice((0, 1)) for length in lens], dtype),
    )


def _dtype_name(d: Draw, dtype: torch.dtype) -> Any:
    return str(dtype)[6:] if d.chance(0.3) else dtype


def _cache_for(d: Draw, model: Model, shape: Shape) -> Any:
    """A cache in which only what the plan says holds numbers."""
    plan = model.plan
    page_size = plan.page_size if plan is not None and plan.page_size else 4
    highest = max((page for of_request in (plan.pages if plan else []) for page in of_request if 0 <= page < 1000), default=0)
    num_pages = highest + d.random.randint(1, 3)
    page_size = min(page_size, 64)
    used = torch.zeros(num_pages, page_size, dtype=torch.bool)
    if plan is not None:
        for of_request, length in zip(plan.pages, plan.kv_lens):
            for i, page in enumerate(of_request):
                if 0 <= page < num_pages:
                    used[page, : max(0, length - i * page_size)] = True
    halves = []
    for _ in range(2):
        half = torch.randn(num_pages, page_size, shape.heads[1], shape.head_dim, generator=d.torch)
        half[~used] = math.nan
        half = half.to(shape.kv_dtype)
        halves.append(half if model.layout == "NHD" else half.transpose(1, 2).contiguous())
    if d.chance(0.5):
        both = torch.stack([half.float() for half in halves], dim=1).to(shape.kv_dtype)
        return d.place(both, 0)
    return tuple(d.place(half, 0) for half in halves)


def _draw_outputs(d: Draw, rows: int, shape: Shape) -> dict[str, Any]:
    return {
        "out": d.blank(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0) if d.chance(0.4) else None,
        "lse": d.dense(torch.full((rows, shape.heads[0]), math.nan)) if d.chance(0.3) else None,
        "return_lse": d.chance(0.5),
    }


def _draw_scales(d: Draw) -> dict[str, Any]:
    return {"q_scale": d.choice((None, 0.5)), "k_scale": d.choice((None, 2.0)), "v_scale": d.choice((None, 0.25))}


# --------------------------------------------------------------------------------------------------------------------- expectation


def _attend(plan: Plan, q: Any, halves: tuple[torch.Tensor, torch.Tensor], options: dict[str, Any], causal: Any) -> tuple[Any, Any]:
    """Outputs and LSE of the rows that belong to a request, FP64. halves: of pages, or of rows."""
    k_half, v_half = halves
    if q.dim() != 3 or q.shape[1:] != (plan.num_qo_heads, plan.head_dims[0]):
        raise Refused("queries of other heads than planned")
    if k_half.shape[-2] != plan.num_kv_heads or (k_half.shape[-1], v_half.shape[-1]) != plan.head_dims:
        raise Refused("keys of other heads than planned")
    if plan.qo_indptr[-1] > len(q):
        raise Refused("offsets past the rows of q")
    outs, lses = [], []
    for i, (pages, kv_len) in enumerate(zip(plan.pages, plan.kv_lens)):
        if any(not 0 <= page < len(k_half) for page in pages):
            raise Refused("a page, or row, outside the cache")
        chosen = torch.tensor(pages, dtype=torch.int64)
        k, v = (half[chosen].flatten(0, 1)[:kv_len] if plan.page_size else half[chosen] for half in halves)
        rows = q[plan.qo_indptr[i] : plan.qo_indptr[i + 1]]
        unplanned.require_finite(rows, k, v)
        mask = None if plan.masks is None else plan.masks[i]
        out, lse = attention(rows, k, v, causal=bool(causal), custom_mask=mask, **options)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return torch.zeros(0, plan.num_qo_heads, plan.head_dims[1]).double(), torch.zeros(0, plan.num_qo_heads).double()
    return torch.cat(outs), torch.cat(lses)


def _results(
    plan: Plan, q: torch.Tensor, state: tuple[Any, Any], out: Any, lse: Any, return_lse: Any, scale: float = 1.0
) -> Mapping[str, Check]:
    """Of a run: rows of no request are anything."""
    dtype = plan.o_dtype or q.dtype
    shape = (*q.shape[:2], plan.head_dims[1])
    if out is not None and (out.shape != shape or out.dtype != dtype):
        raise Refused("out does not fit the plan")
    if lse is not None and (lse.shape != shape[:2] or lse.dtype != torch.float32):
        raise Refused("lse does not fit the plan")
    rows = slice(plan.qo_indptr[0], plan.qo_indptr[-1])
    checks = near(state[0], dtype, scale), unplanned.near_lse(state[1], scale)

    def check(actual: Any) -> None:
        got = actual if return_lse else (actual,)
        if not isinstance(got, tuple) or len(got) != (2 if return_lse else 1) or any(len(part) != len(q) for part in got):
            raise AssertionError("another number of results, or of their rows")
        for part, one in zip(got, checks):
            one(part[rows])

    expected: dict[str, Check] = {"return": check}
    if out is not None:
        expected["out"] = lambda actual: checks[0](actual[rows])
    if lse is not None and return_lse:
        expected["lse"] = lambda actual: checks[1](actual[rows])
    return expected


def _paged_halves(plan: Plan, cache: Any, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = cache_halves(cache, layout)
    if plan.pages and k.shape[1] != plan.page_size:
        raise Refused("pages of another size than planned")
    return k, v


# --------------------------------------------------------------------------------------------------------------------- what happens


def _life(d: Draw, model: Model, make: Any, plan: Any, run: Any) -> Iterator[Any]:
    """A wrapper's. `make`, `plan` and `run` draw a call."""
    made = make()
    steps = d.maybe_hostile(made) if d.chance(0.2) else [made]
    yield steps
    if model.wrapper is None:
        return
    first = True
    for _ in range(d.random.randint(2, 6)):
        what = d.choice(("plan", "plan", "run", "run", "run", "run", "overwrite", "copy", "reset", "engine"))
        if first and d.chance(0.9):
            what = "plan"
        first = False
        if what == "plan":
            call = plan()
            yield d.hostile(call) if d.chance(0.35) else call
        elif what == "run":
            call = replace(run(), changes=model.doubts)
            yield d.hostile(call) if d.chance(0.35) else call
        elif what == "overwrite":
            _overwrite(d, model)
        elif what == "copy":
            yield _copied(d, model)
        elif what == "reset":
            yield _reset(d, model)
        elif model.buffers and model.plan is not None and model.plan.page_size and not model.doubts and not model.is_unknown:
            yield _planned_by_engine(d, model)


def _reset(d: Draw, model: Model) -> Call:
    def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
        if raised is None:
            model.changes = (*model.changes, "with another workspace")

    def expect(float_workspace_buffer: Any, **given: Any) -> Mapping[str, Check]:
        _require_workspace(float_workspace_buffer)
        for buffer in tensors_in(list(given.values())):
            _require_workspace(buffer)
        return {"return": nothing}

    buffers = [torch.zeros(16, dtype=torch.uint8) for _ in range(2)]
    is_cascade = hasattr(model.wrapper, "_levels")
    name, int_buffer = ("int_workspace_buffers", [buffers[1]] * 3) if is_cascade else ("int_workspace_buffer", buffers[1])
    arguments = {"float_workspace_buffer": buffers[0], name: int_buffer}
    call = Call("wrapper.reset_workspace_buffer", model.wrapper.reset_workspace_buffer, arguments, expect, settle=settle)
    return d.hostile(call) if d.chance(0.5) else call


def _planned_by_engine(d: Draw, model: Model) -> Call:
    """What engines do with a wrapper for CUDA graphs: fill its buffers, then call upstream's planner."""
    plan, wrapper = model.plan, model.wrapper
    assert plan is not None
    table = _draw_table(d, _draw_lengths(d, model), plan.page_size, is_exact=True)
    change = ""
    if d.chance(0.5):
        at = d.random.randrange(3)
        if table[at].numel():
            hostile, change = d.hostile_index(table[at].to(I32))
            table = (*table[:at], hostile, *table[at + 1 :])
    kept = model.buffers[-3:]
    for buffer, tensor in zip(kept, table):
        buffer[: tensor.numel()] = tensor[: buffer.numel()].to(I32)
    shape = (len(plan.pages), plan.num_qo_heads, plan.num_kv_heads, plan.page_size, True, *plan.head_dims)
    described: list[Optional[Plan]] = [None]

    def expect() -> Mapping[str, Check]:
        described[0] = None
        pages, lens, _ = _page_table(*kept, plan.page_size)
        described[0] = replace(plan, pages=pages, kv_lens=lens)
        return {}

    def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
        model.settle_plan(described[0], [], call.changes, raised)

    changes = (f"a buffer whose {change}",) if change else ()
    return Call("wrapper._cached_module.plan", lambda: wrapper._cached_module.plan(*[None] * 7, *shape), {}, expect, changes=changes,
                settle=settle)  # fmt: skip


def _overwrite(d: Draw, model: Model) -> None:
    """The index tensors that the last plan was given, by what would lead a kernel astray."""
    for tensor in model.given:
        model.is_overwritten = True
        if tensor.numel() and d.chance(0.7):
            tensor.fill_(d.choice((-1, 0, 3, 1 << 20, (1 << 31) - 1)))


def _copied(d: Draw, model: Model) -> Call:
    def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
        if raised is None:
            model.wrapper = result  # the original goes; the copy must not need it
            model.changes = (*model.changes, *call.changes)

    def deep(wrapper: Any) -> Any:
        return copy.deepcopy(wrapper)

    def pickled(wrapper: Any) -> Any:
        return pickle.loads(pickle.dumps(wrapper))

    name, function = d.choice((("copy.deepcopy", deep), ("copy.copy", copy.copy), ("pickle", pickled)))
    wrapper = model.wrapper
    return Call(name, lambda: function(wrapper), {}, lambda: {}, changes=(f"copied by {name}",), settle=settle)


def _made(model: Model, name: str, function: Any, arguments: dict[str, Any], expect: Any) -> Call:
    def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
        model.wrapper = result
        buffers = [value for name, value in call.arguments.items() if "buf" in name and "workspace" not in name]
        model.buffers = tuple(tensor for tensor in tensors_in(buffers) if has_values(tensor))

    return Call(name, function, arguments, expect, settle=settle)


def _require_workspace(buffer: Any) -> None:
    if not isinstance(buffer, torch.Tensor) or not buffer.is_contiguous():
        raise Refused("no contiguous workspace")


def _planned(model: Model, name: str, function: Any, arguments: dict[str, Any], describe: Any) -> Call:
    """A plan; `describe` makes the Plan of its arguments or refuses them."""
    described: list[Optional[Plan]] = [None]

    def fits(plan: Plan) -> bool:
        return model.batch_size in (None, len(plan.pages)) and sum(map(len, plan.pages)) <= model.capacity

    def expect(**given: Any) -> Mapping[str, Check]:
        described[0] = None
        plan = describe(**given)
        if not fits(plan):
            raise Refused("another batch than the wrapper was made for, or more pages than its buffer holds")
        described[0] = plan
        return {"return": nothing}

    def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
        model.settle_plan(described[0], list(call.arguments.values()), call.changes, raised)

    changes = () if fits(describe(**arguments)) else ("too much for its buffers",)
    return Call(name, function, arguments, expect, fills=model.buffers, changes=changes, settle=settle)


# -------------------------------------------------------------------------------------------------------------------------- decode


def _decode_plan(d: Draw, model: Model, shape: Shape, name: str) -> Call:
    page_size = d.choice((1, 4, 5))
    table = _draw_table(d, _draw_lengths(d, model), page_size, is_exact=model.batch_size is not None)
    options = unplanned.draw_options(d)
    kinds = {"q_data_type": _dtype_name(d, shape.dtype), "kv_data_type": _dtype_name(d, shape.kv_dtype)}
    if shape.dtype == shape.kv_dtype and d.chance(0.2):
        kinds = {"data_type": shape.dtype}
    arguments = {
        "indptr": table[0], "indices": table[1], "last_page_len": table[2], "num_qo_heads": shape.heads[0],
        "num_kv_heads": shape.heads[1], "head_dim": shape.head_dim, "page_size": page_size, **options, **kinds,
    }  # fmt: skip
    wrapper = model.wrapper
    function = wrapper.plan if name != "fast_decode_plan" else functools.partial(flashinfer.fast_decode_plan, wrapper)
    if name != "fast_decode_plan" and d.chance(0.2):
        function = wrapper.begin_forward

    def describe(
        indptr: Any, indices: Any, last_page_len: Any, num_qo_heads: Any, num_kv_heads: Any, head_dim: Any, page_size: Any,
        q_data_type: Any = None, kv_data_type: Any = None, data_type: Any = None, **options: Any,
    ) -> Plan:  # fmt: skip
        pages, lens, page_size = _page_table(indptr, indices, last_page_len, page_size)
        heads = _count("num_qo_heads", num_qo_heads), _count("num_kv_heads", num_kv_heads)
        unplanned.require_heads(*heads)
        q_dtype = _dtype(q_data_type or data_type or "float16")
        kv_dtype = _dtype(kv_data_type or data_type or q_dtype)
        unplanned.require_dtypes(q_dtype, kv_dtype)
        if whole("head_dim", head_dim) not in unplanned.HEAD_DIMS:
            raise Refused("a head dimension without a kernel")
        dims = (int(head_dim), int(head_dim))
        rows = list(range(len(pages) + 1))
        return Plan(pages, lens, rows, *heads, dims, page_size, q_dtype, kv_dtype, q_dtype, unplanned.read_options(**options))

    return _planned(model, f"{name}.plan", function, arguments, describe)


def _decode_run(d: Draw, model: Model, shape: Shape) -> Call:
    rows = len(model.plan.pages) if model.plan else 2
    as_forward = d.chance(0.25)
    arguments: dict[str, Any] = {
        "q": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0),
        "paged_kv_cache": _cache_for(d, model, shape), **_draw_scales(d),
    }  # fmt: skip
    arguments.update(unplanned.draw_options(d) if as_forward else {**_draw_outputs(d, rows, shape), "window_left": d.choice((None, None, 3))})
    wrapper, layout = model.wrapper, model.layout
    method = d.choice(("forward", "forward_return_lse")) if as_forward else "run"

    def expect(
        q: Any, paged_kv_cache: Any, q_scale: Any, k_scale: Any, v_scale: Any, out: Any = None, lse: Any = None,
        return_lse: Any = method == "forward_return_lse", window_left: Any = None, **options: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        plan = model.planned()
        given = dict(plan.options)
        if as_forward:
            given = unplanned.read_options(window_left=window_left, **options)
        elif window_left is not None:
            given["window_left"] = unplanned.read_options(window_left=window_left)["window_left"]
        if q.dtype != plan.q_dtype or len(q) != len(plan.pages):
            raise Refused("queries of another number or dtype than planned")
        halves = _paged_halves(plan, paged_kv_cache, layout)
        if halves[0].dtype != plan.kv_dtype:
            raise Refused("a cache of another dtype than planned")
        scales = unplanned.read_scales(q_scale, k_scale, v_scale)
        return _results(plan, q, _attend(plan, q, halves, {**given, **scales}, False), out, lse, return_lse)

    return Call(f"wrapper.{method}", getattr(wrapper, method), arguments, expect, ("out", "lse") if not as_forward else ())


def _graph_buffers(d: Draw, model: Model, names: tuple[str, ...]) -> dict[str, Any]:
    """Index buffers of a wrapper for CUDA graphs, which on the CPU keeps its plans in them alike."""
    model.batch_size, model.capacity = d.random.randint(1, 3), 30
    sizes = {"indices": model.capacity, "last_page_len": model.batch_size}
    size_of = lambda name: next((size for part, size in sizes.items() if part in name), model.batch_size + 1)  # noqa: E731
    buffers = {name: d.blank(size_of(name), dtype=I32) for name in names}
    model.buffers = tuple(buffers.values())
    return buffers


def _decode_wrapper(name: str, d: Draw) -> Iterator[Any]:
    shape, model = _draw_shape(d), Model(d.choice(("NHD", "HND")))
    workspace = torch.zeros(d.choice((0, 16)), dtype=torch.uint8)
    is_graph = name.startswith("CUDAGraph") or d.chance(0.25)
    if name.startswith("CUDAGraph"):
        buffers = _graph_buffers(d, model, ("indptr_buffer", "indices_buffer", "last_page_len_buffer"))
        arguments = {"workspace_buffer": workspace, **buffers, "kv_layout": model.layout, "use_tensor_cores": False}
    else:
        arguments = {"float_workspace_buffer": workspace, "kv_layout": model.layout, "use_cuda_graph": is_graph}
        if is_graph:
            names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
            arguments.update(_graph_buffers(d, model, names))

    def expect(kv_layout: Any, **given: Any) -> Mapping[str, Check]:
        _require_workspace(given.get("workspace_buffer", given.get("float_workspace_buffer")))
        _require_buffers(model, is_graph and given.get("use_cuda_graph", True), given, kv_layout)
        return {}

    make_name = "BatchDecodeWithPagedKVCacheWrapper" if name == "fast_decode_plan" else name
    yield from _life(
        d, model, lambda: _made(model, make_name, getattr(flashinfer, make_name), arguments, expect),
        lambda: _decode_plan(d, model, shape, name), lambda: _decode_run(d, model, shape),
    )  # fmt: skip


def _require_buffers(model: Model, is_graph: Any, given: dict[str, Any], kv_layout: Any) -> None:
    """Of a constructor."""
    if kv_layout not in ("NHD", "HND"):
        raise Refused("an unknown layout")
    buffers = {name: value for name, value in given.items() if "buf" in name and "workspace" not in name and "mask" not in name}
    if not is_graph:
        model.batch_size = None
        return
    for name, buffer in buffers.items():
        if not isinstance(buffer, torch.Tensor) or buffer.dtype != I32 or not buffer.is_contiguous():
            raise Refused(f"{name} is no contiguous int32 vector")
    lengths = {name: buffer.numel() for name, buffer in buffers.items()}
    batch_sizes = {size - ("indptr" in name) for name, size in lengths.items() if "indices" not in name}
    if len(batch_sizes) != 1:
        raise Unspecified  # a plan has to tell
    model.batch_size = batch_sizes.pop()
    model.capacity = next((size for name, size in lengths.items() if "indices" in name), LARGEST)


# ------------------------------------------------------------------------------------------------------------------------- prefill


def _prefill_plan(d: Draw, model: Model, shape: Shape, is_paged: bool) -> Call:
    kv_lens = _draw_lengths(d, model)
    qo_lens = [d.random.randint(0, 4) for _ in kv_lens]
    qo_indptr = d.index([sum(qo_lens[:i]) for i in range(len(qo_lens) + 1)], d.choice((I32, I32, torch.int64)))
    kind = "none" if model.batch_size is not None else d.kernel("causal", "none", "bool", "packed")
    common: dict[str, Any] = {
        "num_qo_heads": shape.heads[0], "num_kv_heads": shape.heads[1], "head_dim_qk": shape.head_dim,
        **unplanned.draw_mask(d, kind, list(zip(qo_lens, kv_lens))), "causal": kind == "causal", **unplanned.draw_options(d),
        "q_data_type": _dtype_name(d, shape.dtype), "kv_data_type": _dtype_name(d, shape.kv_dtype),
    }  # fmt: skip
    arguments: dict[str, Any] = {"qo_indptr": qo_indptr}
    if is_paged:
        page_size = d.choice((1, 4, 5))
        table = _draw_table(d, kv_lens, page_size, is_exact=model.batch_size is not None)
        arguments.update(paged_kv_indptr=table[0], paged_kv_indices=table[1], paged_kv_last_page_len=table[2], page_size=page_size)
    else:
        arguments["kv_indptr"] = d.index([sum(kv_lens[:i]) for i in range(len(kv_lens) + 1)], I32)
    arguments.update(common)

    def describe(qo_indptr: Any, num_qo_heads: Any, num_kv_heads: Any, head_dim_qk: Any, **given: Any) -> Plan:
        if is_paged:
            pages, kv_lens, page_size = _page_table(
                given["paged_kv_indptr"], given["paged_kv_indices"], given["paged_kv_last_page_len"], given["page_size"]
            )
        else:
            starts = offsets("kv_indptr", given["kv_indptr"])
            if starts[-1] > 1 << 16:
                pages, kv_lens, page_size = [[1 << 16]] * (len(starts) - 1), [1] * (len(starts) - 1), 0  # past any rows here
            else:
                pages = [list(range(begin, end)) for begin, end in zip(starts, starts[1:])]
                kv_lens, page_size = [len(rows) for rows in pages], 0
        rows = offsets("qo_indptr", qo_indptr, len(pages) + 1)
        heads = _count("num_qo_heads", num_qo_heads), _count("num_kv_heads", num_kv_heads)
        unplanned.require_heads(*heads)
        q_dtype, kv_dtype = _dtype(given["q_data_type"]), given["kv_data_type"]
        dim = whole("head_dim_qk", head_dim_qk)
        unplanned.require_prefill(q_dtype, q_dtype if kv_dtype is None else _dtype(kv_dtype), dim, dim)
        lengths = [(end - begin, kv_len) for begin, end, kv_len in zip(rows, rows[1:], kv_lens)]
        masks = unplanned.read_mask(given["custom_mask"], given["packed_custom_mask"], lengths) if rows[-1] < LARGEST >> 8 else None
        options = unplanned.read_options(**given)
        return Plan(pages, kv_lens, rows, *heads, (dim, dim), page_size, None, None, None, options, bool(given["causal"]), masks)

    function = model.wrapper.begin_forward if d.chance(0.2) else model.wrapper.plan
    return _planned(model, "wrapper.plan", function, arguments, describe)


def _prefill_run(d: Draw, model: Model, shape: Shape, is_paged: bool) -> Call:
    plan = model.plan
    rows = (plan.qo_indptr[-1] if plan and plan.qo_indptr[-1] < 1000 else 3) + d.choice((0, 0, 2))
    as_forward = d.chance(0.25)
    arguments: dict[str, Any] = {"q": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0)}
    if is_paged:
        arguments["paged_kv_cache"] = _cache_for(d, model, shape)
    else:
        length = max((row + 1 for of_request in (plan.pages if plan else []) for row in of_request if row < 1000), default=0)
        dims = (shape.head_dim, shape.head_dim)
        length += d.choice((0, 2))
        arguments["k"], arguments["v"] = unplanned.draw_kv_rows(d, length, shape.heads[1], dims, shape.kv_dtype, model.layout)
    if as_forward:
        arguments.update(causal=d.chance(0.5), **unplanned.draw_options(d))
    else:
        arguments.update(**_draw_scales(d), **_draw_outputs(d, rows, shape))
        if is_paged:
            arguments["window_left"] = d.choice((None, None, 3))
    wrapper, layout = model.wrapper, model.layout
    method = d.choice(("forward", "forward_return_lse")) if as_forward else "run"

    def expect(
        q: Any, paged_kv_cache: Any = None, k: Any = None, v: Any = None, q_scale: Any = None, k_scale: Any = None, v_scale: Any = None,
        out: Any = None, lse: Any = None, return_lse: Any = method == "forward_return_lse", window_left: Any = None,
        causal: Any = None, **options: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        plan = model.planned()
        given = dict(plan.options)
        if as_forward:
            given = unplanned.read_options(window_left=window_left, **options)
        elif window_left is not None:
            given["window_left"] = unplanned.read_options(window_left=window_left)["window_left"]
        halves = _paged_halves(plan, paged_kv_cache, layout) if is_paged else unplanned.rows_of(k, v, layout)
        unplanned.require_prefill(q.dtype, halves[0].dtype, *plan.head_dims)
        scales = unplanned.read_scales(q_scale, k_scale, v_scale)
        state = _attend(plan, q, halves, {**given, **scales}, causal if as_forward else plan.causal)
        return _results(plan, q, state, out, lse, return_lse)

    return Call(f"wrapper.{method}", getattr(wrapper, method), arguments, expect, ("out", "lse") if not as_forward else ())


def _prefill_wrapper(name: str, is_paged: bool, d: Draw) -> Iterator[Any]:
    shape, model = _draw_shape(d), Model(d.choice(("NHD", "HND")))
    is_graph = d.chance(0.25)
    arguments: dict[str, Any] = {
        "float_workspace_buffer": torch.zeros(8, dtype=torch.uint8), "kv_layout": model.layout, "use_cuda_graph": is_graph
    }  # fmt: skip
    if is_graph:
        paged = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
        arguments.update(_graph_buffers(d, model, paged if is_paged else ("qo_indptr_buf", "kv_indptr_buf")))
        if not is_paged:
            model.capacity = LARGEST  # of rows, which no buffer lists

    def expect(float_workspace_buffer: Any, kv_layout: Any, use_cuda_graph: Any, **given: Any) -> Mapping[str, Check]:
        _require_workspace(float_workspace_buffer)
        _require_buffers(model, use_cuda_graph, given, kv_layout)
        return {}

    yield from _life(
        d, model, lambda: _made(model, name, getattr(flashinfer, name), arguments, expect),
        lambda: _prefill_plan(d, model, shape, is_paged), lambda: _prefill_run(d, model, shape, is_paged),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------------- cascade


def _cascade_wrapper(d: Draw) -> Iterator[Any]:
    name, num_levels = "MultiLevelCascadeAttentionWrapper", d.random.randint(1, 3)
    shape, model = _draw_shape(d), Model(d.choice(("NHD", "HND")))
    arguments = {"num_levels": num_levels, "float_workspace_buffer": torch.zeros(8, dtype=torch.uint8), "kv_layout": model.layout}

    def expect(num_levels: Any, float_workspace_buffer: Any, kv_layout: Any) -> Mapping[str, Check]:
        if whole("num_levels", num_levels) < 1 or kv_layout not in ("NHD", "HND"):
            raise Refused("no level, or an unknown layout")
        _require_workspace(float_workspace_buffer)
        return {}

    levels: list[list[Plan]] = [[]]

    def plan() -> Call:
        page_size, num_tokens = d.choice((1, 4)), d.random.randint(1, 5)
        arrays: dict[str, list[torch.Tensor]] = {"qo_indptr_arr": [], "paged_kv_indptr_arr": [], "paged_kv_indices_arr": [], "paged_kv_last_page_len": []}
        for level in range(num_levels):
            cuts = [0, num_tokens] if level < num_levels - 1 else sorted({0, num_tokens, d.random.randint(0, num_tokens)})
            table = _draw_table(d, d.lengths(len(cuts) - 1, 10), page_size)
            for array, tensor in zip(arrays.values(), (d.index(cuts, I32), *table)):
                array.append(tensor)
        options = unplanned.draw_options(d)
        given = {
            **arrays, "num_qo_heads": shape.heads[0], "num_kv_heads": shape.heads[1], "head_dim": shape.head_dim,
            "page_size": page_size, "causal": d.chance(0.5), **options, "q_data_type": shape.dtype, "kv_data_type": shape.kv_dtype,
        }  # fmt: skip
        described: list[list[Plan]] = [[]]

        def expect(
            num_qo_heads: Any, num_kv_heads: Any, head_dim: Any, page_size: Any, causal: Any, q_data_type: Any, kv_data_type: Any,
            **given: Any,
        ) -> Mapping[str, Check]:  # fmt: skip
            described[0] = []
            arrays = [given[name] for name in ("qo_indptr_arr", "paged_kv_indptr_arr", "paged_kv_indices_arr", "paged_kv_last_page_len")]
            if any(not isinstance(array, (list, tuple)) or len(array) != num_levels for array in arrays):
                raise Refused("another number of levels")
            heads = _count("num_qo_heads", num_qo_heads), _count("num_kv_heads", num_kv_heads)
            unplanned.require_heads(*heads)
            dim, q_dtype = whole("head_dim", head_dim), _dtype(q_data_type)
            unplanned.require_prefill(q_dtype, q_dtype if kv_data_type is None else _dtype(kv_data_type), dim, dim)
            plans = []
            for i, (rows, *table) in enumerate(zip(*arrays)):
                pages, lens, size = _page_table(*table, page_size)
                qo_indptr = offsets("qo_indptr", rows, len(pages) + 1)
                is_causal = bool(causal) and i == num_levels - 1
                plans.append(Plan(pages, lens, qo_indptr, *heads, (dim, dim), size, None, None, None, unplanned.read_options(**given), is_causal))
            if len({(plan.qo_indptr[0], plan.qo_indptr[-1]) for plan in plans}) > 1:
                raise Unspecified  # levels of different tokens
            described[0] = plans
            return {"return": nothing}

        def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
            plans = described[0]
            model.settle_plan(_joined(plans) if plans else None, list(call.arguments.values()), call.changes, raised)
            if raised is None:
                levels[0] = plans

        return Call(f"{name}.plan", model.wrapper.plan, given, expect, settle=settle)

    def run() -> Call:
        rows = model.plan.qo_indptr[-1] if model.plan and model.plan.qo_indptr[-1] < 1000 else 3
        arguments = {
            "q": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0),
            "paged_kv_cache": _cache_for(d, model, shape),
        }  # fmt: skip
        wrapper, layout = model.wrapper, model.layout

        def expect(q: Any, paged_kv_cache: Any) -> Mapping[str, Check]:
            model.planned()
            states = []
            for plan in levels[0]:
                halves = _paged_halves(plan, paged_kv_cache, layout)
                unplanned.require_prefill(q.dtype, halves[0].dtype, *plan.head_dims)
                states.append(_attend(plan, q, halves, plan.options, plan.causal))
            out, lse = unplanned.merged(states)
            # Each level rounds its output once more on the way into the merged one.
            return _results(levels[0][-1], q, (out, lse), None, None, False, scale=float(num_levels))

        return Call("wrapper.run", wrapper.run, arguments, expect)

    yield from _life(d, model, lambda: _made(model, name, getattr(flashinfer, name), arguments, expect), plan, run)


def _joined(plans: list[Plan]) -> Plan:
    """For drawing a cache: the pages of all levels."""
    pages = [page for plan in plans for page in plan.pages]
    return replace(plans[-1], pages=pages, kv_lens=[length for plan in plans for length in plan.kv_lens])


def _shared_prefix(name: str, is_decode: bool, d: Draw) -> Iterator[Any]:
    """A shared prefix as one prefill, the rest paged."""
    shape, model = _draw_shape(d), Model(d.choice(("NHD", "HND")))
    shape = replace(shape, kv_dtype=shape.dtype)
    arguments = {"float_workspace_buffer": torch.zeros(8, dtype=torch.uint8), "kv_layout": model.layout}

    def expect(float_workspace_buffer: Any, kv_layout: Any) -> Mapping[str, Check]:
        _require_workspace(float_workspace_buffer)
        if kv_layout not in ("NHD", "HND"):
            raise Refused("an unknown layout")
        return {}

    def plan() -> Call:
        page_size, lens = d.choice((1, 4)), d.lengths(d.random.randint(1, 3), 10)
        table = _draw_table(d, lens, page_size)
        sizes = {"num_qo_heads": shape.heads[0], "num_kv_heads": shape.heads[1], "head_dim": shape.head_dim, "page_size": page_size}
        if is_decode:
            names = ("unique_kv_indptr", "unique_kv_indices", "unique_kv_last_page_len")
            given: dict[str, Any] = {**dict(zip(names, table)), **sizes, "data_type": shape.dtype}
        else:
            names = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
            qo_lens = [d.random.randint(0, 4) for _ in lens]
            rows = d.index([sum(qo_lens[:i]) for i in range(len(qo_lens) + 1)], I32)
            given = {"qo_indptr": rows, **dict(zip(names, table)), **sizes, "q_data_type": shape.dtype}

        def describe(num_qo_heads: Any, num_kv_heads: Any, head_dim: Any, page_size: Any, **given: Any) -> Plan:
            pages, lens, size = _page_table(*(given[name] for name in names), page_size)
            rows = list(range(len(pages) + 1)) if is_decode else offsets("qo_indptr", given["qo_indptr"], len(pages) + 1)
            heads = _count("num_qo_heads", num_qo_heads), _count("num_kv_heads", num_kv_heads)
            unplanned.require_heads(*heads)
            dim, dtype = whole("head_dim", head_dim), _dtype(given["data_type" if is_decode else "q_data_type"])
            unplanned.require_prefill(dtype, dtype, dim, dim)
            return Plan(pages, lens, rows, *heads, (dim, dim), size, dtype, dtype, None, unplanned.read_options())

        return _planned(model, f"{name}.begin_forward", model.wrapper.begin_forward, given, describe)

    def run() -> Call:
        rows = model.plan.qo_indptr[-1] if model.plan and model.plan.qo_indptr[-1] < 1000 else 3
        shared = unplanned.draw_kv_rows(d, d.size(9), shape.heads[1], (shape.head_dim, shape.head_dim), shape.dtype, model.layout)
        given: dict[str, Any] = {
            "q": d.normal(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0), "k_shared": shared[0],
            "v_shared": shared[1], "unique_kv_cache": _cache_for(d, model, shape),
        }  # fmt: skip
        if not is_decode:
            given.update(causal=d.chance(0.5), sm_scale=d.choice((None, 0.2)))
        wrapper, layout = model.wrapper, model.layout

        def expect(q: Any, k_shared: Any, v_shared: Any, unique_kv_cache: Any, causal: Any = False, sm_scale: Any = None) -> Mapping[str, Check]:
            plan = model.planned()
            options = unplanned.read_options(sm_scale=sm_scale)
            halves = _paged_halves(plan, unique_kv_cache, layout)
            k, v = unplanned.rows_of(k_shared, v_shared, layout)
            if q.dtype != halves[0].dtype or q.dtype != k.dtype or (k.shape[2], v.shape[2]) != plan.head_dims or k.shape[1] != plan.num_kv_heads:
                raise Refused("a prefix of another dtype or of other heads")
            if is_decode and (q.dtype != plan.q_dtype or len(q) != len(plan.pages)):
                raise Refused("queries of another number or dtype than planned")
            unplanned.require_prefill(q.dtype, k.dtype, *plan.head_dims)
            unique = _attend(plan, q, halves, options, causal)
            rows = q[plan.qo_indptr[0] : plan.qo_indptr[-1]]
            unplanned.require_finite(k, v)
            prefix = attention(rows, k, v, **options)
            return _results(plan, q, unplanned.merged([prefix, unique]), None, None, False, scale=2.0)

        return Call(f"{name}.forward", wrapper.forward, given, expect)

    yield from _life(d, model, lambda: _made(model, name, getattr(flashinfer, name), arguments, expect), plan, run)


CASES: dict[str, Case] = {
    **{
        name: functools.partial(_decode_wrapper, name)
        for name in ("BatchDecodeWithPagedKVCacheWrapper", "CUDAGraphBatchDecodeWithPagedKVCacheWrapper", "fast_decode_plan")
    },
    "BatchPrefillWithPagedKVCacheWrapper": functools.partial(_prefill_wrapper, "BatchPrefillWithPagedKVCacheWrapper", True),
    "BatchPrefillWithRaggedKVCacheWrapper": functools.partial(_prefill_wrapper, "BatchPrefillWithRaggedKVCacheWrapper", False),
    "MultiLevelCascadeAttentionWrapper": _cascade_wrapper,
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper": functools.partial(
        _shared_prefix, "BatchDecodeWithSharedPrefixPagedKVCacheWrapper", True
    ),
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper": functools.partial(
        _shared_prefix, "BatchPrefillWithSharedPrefixPagedKVCacheWrapper", False
    ),
}
