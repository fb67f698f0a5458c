# SPDX-License-Identifier: Apache-2.0
"""What cases of planned attention share: sequences of calls on one wrapper, beside a model of what it has to know.

A plan that fails leaves the old one, or a wrapper that says it has none. What a plan was given is the caller's again.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import torch

from tests.fuzz.call import Call, Check, Refused, Unspecified, has_values, near, nothing, tensors_in
from tests.fuzz.draw import Draw
from tests.fuzz.table import attention as unplanned
from tests.fuzz.table.indices import LARGEST, integers, offsets, whole
from tests.fuzz.table.page import cache_halves
from tests.oracles.attention import attention

I32 = torch.int32
_TAKEN = (torch.int32, torch.int64, torch.bool, torch.uint8)  # of what plan() is given: indices and masks


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
    origin: tuple[str, ...] = ()  # changes of the constructor
    has_failed: bool = False  # the last plan() raised: the wrapper may have forgotten the one before
    is_overwritten: bool = False  # what the last plan() was given
    is_unknown: bool = False  # the last plan() was one whose meaning is not specified
    batch_size: Optional[int] = None  # that of a wrapper for CUDA graphs
    capacity: int = LARGEST  # entries of its buffer of pages
    buffers: tuple[torch.Tensor, ...] = ()  # which its plans fill
    given: list[torch.Tensor] = field(default_factory=list)  # index tensors of the last plan()

    def settle_plan(
        self, plan: Optional[Plan], given: list[Any], changes: tuple[str, ...], raised: Optional[BaseException]
    ) -> None:
        self.has_failed = raised is not None
        if raised is None:
            self.plan, self.is_unknown, self.is_overwritten = plan, plan is None, False
            self.changes = tuple(f"planned with {change}" for change in changes)
            self.given = [t for value in given for t in tensors_in(value) if has_values(t) and t.dtype in _TAKEN]

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


def read_dtype(given: Any) -> torch.dtype:
    """A dtype or its name."""
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype):
        raise Refused(f"{given!r} is no dtype")
    return found


def read_count(name: str, given: Any) -> int:
    number = whole(name, given)
    if not 0 < number < LARGEST:
        raise Refused(f"{name} is {number}")
    return number


def read_page_table(
    indptr: Any, indices: Any, last_page_len: Any, page_size: Any
) -> tuple[list[list[int]], list[int], int]:
    """Pages and lengths of the requests, and the page size."""
    page_size = read_count("page_size", page_size)
    numbers = integers("indices", indices)
    starts = offsets("indptr", indptr)
    if len(starts) > 1 and starts[-1] > len(numbers):
        raise Refused(f"indptr ends at {starts[-1]}, past {len(numbers)} page numbers")
    last = integers("last_page_len", last_page_len, len(starts) - 1)
    pages = [numbers[begin:end] for begin, end in itertools.pairwise(starts)]
    if any(of_request and not 0 <= entries <= page_size for of_request, entries in zip(pages, last)):
        raise Refused("more entries in the last page than a page has")
    lens = [
        (len(of_request) - 1) * page_size + entries if of_request else 0 for of_request, entries in zip(pages, last)
    ]
    if any(length >= LARGEST for length in lens):
        raise Refused("more keys than int32 counts")
    return pages, lens, page_size


# ------------------------------------------------------------------------------------------------------------ arguments


@dataclass(frozen=True)
class Shape:
    """What the plans and runs of a case have in common, so that kernels are few."""

    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype


def draw_shape(d: Draw) -> Shape:
    heads = d.random.randint(1, 2)
    dtype, kv_dtype = d.kernel(*unplanned.DTYPES)
    return Shape((heads * d.choice((1, 3)), heads), d.kernel(32, 64), dtype, kv_dtype)


def draw_lengths(d: Draw, model: Model) -> list[int]:
    count = d.random.randint(0, 3) if model.batch_size is None else model.batch_size
    return d.lengths(count, 12) if d.chance(0.9) else [300] * count


def draw_page_table(
    d: Draw, lens: list[int], page_size: int, is_exact: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


def draw_dtype(d: Draw, dtype: torch.dtype) -> Any:
    return str(dtype)[6:] if d.chance(0.3) else dtype


def draw_cache(d: Draw, model: Model, shape: Shape) -> Any:
    """A cache in which only what the plan says holds numbers."""
    plan = model.plan
    page_size = plan.page_size if plan is not None and plan.page_size else 4
    highest = max(
        (page for of_request in (plan.pages if plan else []) for page in of_request if 0 <= page < 1000), default=0
    )
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


def draw_outputs(d: Draw, rows: int, shape: Shape) -> dict[str, Any]:
    return {
        "out": d.blank(rows, shape.heads[0], shape.head_dim, dtype=shape.dtype, groups=0) if d.chance(0.4) else None,
        "lse": d.dense(torch.full((rows, shape.heads[0]), math.nan)) if d.chance(0.3) else None,
        "return_lse": d.chance(0.5),
    }


def draw_scales(d: Draw) -> dict[str, Any]:
    return {"q_scale": d.choice((None, 0.5)), "k_scale": d.choice((None, 2.0)), "v_scale": d.choice((None, 0.25))}


# ---------------------------------------------------------------------------------------------------------- expectation


def attend(
    plan: Plan, q: Any, halves: tuple[torch.Tensor, torch.Tensor], options: dict[str, Any], causal: Any
) -> tuple[Any, Any]:
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


def results(
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
        if (
            not isinstance(got, tuple)
            or len(got) != (2 if return_lse else 1)
            or any(len(part) != len(q) for part in got)
        ):
            raise AssertionError("another number of results, or of their rows")
        for part, one in zip(got, checks):
            one(part[rows])

    expected: dict[str, Check] = {"return": check}
    if out is not None:
        expected["out"] = lambda actual: checks[0](actual[rows])
    if lse is not None and return_lse:
        expected["lse"] = lambda actual: checks[1](actual[rows])
    return expected


def paged_halves(plan: Plan, cache: Any, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = cache_halves(cache, layout)
    if plan.pages and k.shape[1] != plan.page_size:
        raise Refused("pages of another size than planned")
    return k, v


# --------------------------------------------------------------------------------------------------------- what happens


def life(d: Draw, model: Model, make: Any, plan: Any, run: Any, engine: Any = None) -> Iterator[Any]:
    """A wrapper's. `make`, `plan` and `run` draw a call; so does `engine`, of what engines do with a wrapper for CUDA
    graphs: fill its buffers, then call upstream's planner."""
    made = make()
    steps = d.maybe_hostile(made) if d.chance(0.2) else [made]
    yield steps
    if model.wrapper is None:
        return
    model.origin = tuple(f"made with {change}" for change in steps[-1].changes)
    first = True
    for _ in range(d.random.randint(2, 6)):
        what = d.choice(("plan", "plan", "run", "run", "run", "run", "overwrite", "copy", "reset", "engine"))
        if first and d.chance(0.9):
            what = "plan"
        first = False
        if what == "plan":
            call = plan()
            call = replace(call, changes=(*model.origin, *call.changes))
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
        elif model.batch_size is not None and model.plan is not None and model.plan.page_size and not model.doubts:
            yield (engine or _planned_by_engine)(d, model)


def _reset(d: Draw, model: Model) -> Call:
    def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
        if raised is None:
            model.changes = (*model.changes, "with another workspace")

    def expect(float_workspace_buffer: Any, **given: Any) -> Mapping[str, Check]:
        require_workspace(float_workspace_buffer)
        for buffer in tensors_in(list(given.values())):
            require_workspace(buffer)
        return {"return": nothing}

    buffers = [torch.zeros(16, dtype=torch.uint8) for _ in range(2)]
    is_cascade = hasattr(model.wrapper, "_levels")
    name, int_buffer = (
        ("int_workspace_buffers", [buffers[1]] * 3) if is_cascade else ("int_workspace_buffer", buffers[1])
    )
    arguments = {"float_workspace_buffer": buffers[0], name: int_buffer}
    call = Call(
        "wrapper.reset_workspace_buffer", model.wrapper.reset_workspace_buffer, arguments, expect, settle=settle
    )
    return d.hostile(call) if d.chance(0.5) else call


def _planned_by_engine(d: Draw, model: Model) -> Call:
    plan, wrapper = model.plan, model.wrapper
    assert plan is not None
    table = draw_page_table(d, draw_lengths(d, model), plan.page_size, is_exact=True)
    shape = (len(plan.pages), plan.num_qo_heads, plan.num_kv_heads, plan.page_size, True, *plan.head_dims)
    return planned_by_engine(d, model, table, read_page_table, lambda: wrapper._cached_module.plan(*[None] * 7, *shape))


def planned_by_engine(
    d: Draw, model: Model, table: tuple[torch.Tensor, torch.Tensor, torch.Tensor], read: Any, function: Any
) -> Call:
    """table: what the last three buffers are filled with, or something hostile; read: pages and lengths of them.
    function: upstream's planner."""
    plan = model.plan
    assert plan is not None
    change = ""
    if d.chance(0.5):
        at = d.random.randrange(3)
        if table[at].numel():
            hostile, change = d.hostile_index(table[at].to(I32))
            table = (*table[:at], hostile, *table[at + 1 :])
    kept = model.buffers[-3:]
    for buffer, tensor in zip(kept, table):
        buffer[: tensor.numel()] = tensor[: buffer.numel()].to(I32)
    described: list[Optional[Plan]] = [None]

    def expect() -> Mapping[str, Check]:
        described[0] = None
        pages, lens, _ = read(*kept, plan.page_size)
        described[0] = replace(plan, pages=pages, kv_lens=lens)
        return {}

    def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
        model.settle_plan(described[0], [], call.changes, raised)

    too_much = table[1].numel() > len(kept[1])
    changes = (f"a buffer whose {change}",) if change else ("too much for its buffers",) if too_much else ()
    return Call("wrapper._cached_module.plan", function, {}, expect, changes=changes, settle=settle)


def _overwrite(d: Draw, model: Model) -> None:
    """The index tensors that the last plan was given, by what would lead a kernel astray."""
    for tensor in model.given:
        model.is_overwritten = True
        if tensor.numel() and d.chance(0.7):
            tensor.fill_(d.choice((-1, 0, 3, 1 << 20, (1 << 31) - 1)) if tensor.dtype in (I32, torch.int64) else 255)


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


def made(model: Model, name: str, function: Any, arguments: dict[str, Any], expect: Any) -> Call:
    def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
        model.wrapper = result
        buffers = [value for name, value in call.arguments.items() if "buf" in name and "workspace" not in name]
        model.buffers = tuple(tensor for tensor in tensors_in(buffers) if has_values(tensor))

    return Call(name, function, arguments, expect, settle=settle)


def require_workspace(buffer: Any) -> None:
    if not isinstance(buffer, torch.Tensor) or not buffer.is_contiguous():
        raise Refused("no contiguous workspace")


def planned(model: Model, name: str, function: Any, arguments: dict[str, Any], describe: Any) -> Call:
    """A plan; `describe` makes the Plan of its arguments or refuses them."""
    described: list[Optional[Plan]] = [None]

    def fits(plan: Plan) -> bool:
        return model.batch_size in (None, len(plan.pages)) and sum(map(len, plan.pages)) <= model.capacity

    def expect(**given: Any) -> Mapping[str, Check]:
        described[0] = None
        plan = describe(**given)
        if not fits(plan):
            if model.origin:
                raise Unspecified  # nobody knows what it was made for
            raise Refused("another batch than the wrapper was made for, or more pages than its buffer holds")
        described[0] = plan
        return {"return": nothing}

    def settle(call: Call, raised: Optional[BaseException], result: Any) -> None:
        model.settle_plan(described[0], list(call.arguments.values()), call.changes, raised)

    changes = () if fits(describe(**arguments)) else ("too much for its buffers",)
    return Call(name, function, arguments, expect, fills=model.buffers, changes=changes, settle=settle)


def draw_buffers(d: Draw, model: Model, names: tuple[str, ...]) -> dict[str, Any]:
    """Index buffers of a wrapper for CUDA graphs, which on the CPU keeps its plans in them alike."""
    model.batch_size, model.capacity = d.random.randint(1, 3), 30
    sizes = {"indices": model.capacity, "last_page_len": model.batch_size, "kv_len_arr": model.batch_size}
    size_of = lambda name: next((size for part, size in sizes.items() if part in name), model.batch_size + 1)  # noqa: E731
    buffers = {name: d.blank(size_of(name), dtype=I32) for name in names}
    model.buffers = tuple(buffers.values())
    return buffers


def require_buffers(model: Model, is_graph: Any, given: dict[str, Any], kv_layout: Any) -> None:
    """Of a constructor."""
    if kv_layout not in ("NHD", "HND"):
        raise Refused("an unknown layout")
    buffers = {
        name: value for name, value in given.items() if "buf" in name and "workspace" not in name and "mask" not in name
    }
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
