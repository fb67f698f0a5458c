"""Planned attention under hostile calls: plans that fail half-way, index values that lie, tensors that change after the
call, tensors without memory. The right result, or an error that says which argument is off, and never another state."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashinfer
from tests.oracles import attention as oracle
from tests.tolerances import assert_close

Tensor = torch.Tensor
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 4, 2, 64, 4
QO_LENS, KV_LENS = (2, 3, 1), (5, 9, 4)
NUM_PAGES = 8
KINDS = ("decode", "paged", "ragged")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets(lengths: Any) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


class Batch:
    """One small batch, as the arguments of one kind of wrapper."""

    def __init__(self, kind: str, device: torch.device, seed: int = 0, graph: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        self.kind, self.device = kind, device
        self.dtype = torch.float32 if device.type == "cpu" else torch.float16
        self.qo_lens = (1, 1, 1) if kind == "decode" else QO_LENS
        self.q = draw(sum(self.qo_lens), HEADS, HEAD_DIM)
        self.pages = torch.randperm(NUM_PAGES, generator=generator)[: sum(-(-n // PAGE_SIZE) for n in KV_LENS)].int()
        self.page_indptr = offsets([-(-n // PAGE_SIZE) for n in KV_LENS])
        self.last_page_len = int32(*[(n - 1) % PAGE_SIZE + 1 for n in KV_LENS])
        if kind == "ragged":
            self.kv: Any = (draw(sum(KV_LENS), KV_HEADS, HEAD_DIM), draw(sum(KV_LENS), KV_HEADS, HEAD_DIM))
            self.index = [offsets(QO_LENS), offsets(KV_LENS)]
        else:
            self.kv = draw(NUM_PAGES, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM)
            self.index = [self.page_indptr, self.pages, self.last_page_len]
            if kind == "paged":
                self.index.insert(0, offsets(QO_LENS))
        self.sizes = (HEADS, KV_HEADS, HEAD_DIM) if kind == "ragged" else (HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE)
        self.wrapper = self.make(graph)

    def make(self, graph: bool = False) -> Any:
        names = {
            "decode": "BatchDecodeWithPagedKVCacheWrapper",
            "paged": "BatchPrefillWithPagedKVCacheWrapper",
            "ragged": "BatchPrefillWithRaggedKVCacheWrapper",
        }
        workspace = torch.empty(16 << 20, dtype=torch.uint8, device=self.device)
        options: dict[str, Any] = {}
        if graph:
            buffers = [
                torch.zeros(32 if i.numel() == len(self.pages) else i.numel(), dtype=torch.int32) for i in self.index
            ]
            roles = {
                "decode": ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer"),
                "paged": ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf"),
                "ragged": ("qo_indptr_buf", "kv_indptr_buf"),
            }
            options = {name: buffer.to(self.device) for name, buffer in zip(roles[self.kind], buffers)}
            options["use_cuda_graph"] = True
            if self.kind != "decode":
                options["custom_mask_buf"] = torch.zeros(64, dtype=torch.uint8, device=self.device)
                options["mask_indptr_buf"] = torch.zeros(4, dtype=torch.int32, device=self.device)
        return getattr(flashinfer, names[self.kind])(workspace, **options)

    def plan(self, *index: Tensor, **options: Any) -> None:
        if self.kind != "decode" and "custom_mask" not in options:
            options.setdefault("causal", True)
        self.wrapper.plan(*(index or self.index), *self.sizes, **{"q_data_type": self.dtype, **options})

    def run(self, **options: Any) -> Tensor:
        kv = self.kv if self.kind == "ragged" else (self.kv,)
        out: Tensor = self.wrapper.run(self.q, *kv, **options)
        return out

    def expected(self) -> Tensor:
        ends = offsets(KV_LENS).tolist()
        rows, outs = self.q.double().cpu().split(self.qo_lens), []
        for i, (q, length) in enumerate(zip(rows, KV_LENS)):
            if self.kind == "ragged":
                k, v = (half[ends[i] : ends[i + 1]].double().cpu() for half in self.kv)
            else:
                begin, end = self.page_indptr[i : i + 2].tolist()
                cache = self.kv[self.pages[begin:end].long().to(self.device)].double().cpu()
                k, v = (cache[:, half].reshape(-1, KV_HEADS, HEAD_DIM)[:length] for half in (0, 1))
            outs.append(oracle.attention(q, k, v, causal=True)[0])
        return torch.cat(outs)

    def check(self) -> None:
        assert_close(self.run(), self.expected())


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ------------------------------------------------------------------------------------ a call that fails changes nothing

# What makes a plan fail, after which steps: (index tensors of the batch -> others, options, error).
FAILING_PLANS: dict[str, tuple[Callable[[Batch], list[Any]], dict[str, Any], type[Exception]]] = {
    "later argument": (lambda batch: batch.index, {"sinks": torch.zeros(4)}, ValueError),
    "unknown argument": (lambda batch: batch.index, {"windowleft": 3}, TypeError),
    "offsets descend": (lambda batch: [batch.index[0].flip(0), *batch.index[1:]], {}, ValueError),
    "offsets begin below 0": (lambda batch: [batch.index[0] - 1, *batch.index[1:]], {}, ValueError),
    "float offsets": (lambda batch: [batch.index[0].float(), *batch.index[1:]], {}, ValueError),
    "last tensor too short": (lambda batch: [*batch.index[:-1], batch.index[-1][:-1]], {}, ValueError),
    "last tensor of two dimensions": (lambda batch: [*batch.index[:-1], batch.index[-1][None]], {}, ValueError),
    "no tensor": (lambda batch: [*batch.index[:-1], batch.index[-1].tolist()], {}, TypeError),
    "None": (lambda batch: [None, *batch.index[1:]], {}, TypeError),
    "negative window text": (lambda batch: batch.index, {"window_left": "3"}, TypeError),
    "soft cap": (lambda batch: batch.index, {"logits_soft_cap": -1.0}, ValueError),
    "position encoding": (lambda batch: batch.index, {"pos_encoding_mode": "ROPE"}, ValueError),
    "dtype": (lambda batch: batch.index, {"q_data_type": "int8"}, ValueError),
}


def _index_is_sound_here(name: str) -> bool:
    return not name.startswith(("offsets", "last tensor of"))


@pytest.mark.parametrize("name", FAILING_PLANS)
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_a_failing_plan_leaves_the_old_one(name: str, graph: bool, kind: str, device: torch.device) -> None:
    change, options, error = FAILING_PLANS[name]
    batch = Batch(kind, device, graph=graph)
    with pytest.raises(error):  # the first plan of a wrapper: it has none afterwards
        batch.plan(*change(batch), **options)
    with pytest.raises(ValueError, match="before plan"):
        batch.run()
    batch.plan()
    batch.check()
    other = Batch(kind, device, seed=1)  # other page numbers
    other.wrapper, other.kv, other.q = batch.wrapper, batch.kv, batch.q
    with pytest.raises(error):
        other.plan(*change(other), **options)
    batch.check()


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_a_plan_with_a_bad_mask_leaves_the_old_one(kind: str, graph: bool, device: torch.device) -> None:
    batch = Batch(kind, device, graph=graph)
    batch.plan()
    other = Batch(kind, device, seed=1)
    other.wrapper, other.kv, other.q = batch.wrapper, batch.kv, batch.q
    num_bits = sum(q * kv for q, kv in zip(QO_LENS, KV_LENS))
    for short in (0, 1, num_bits // 2, num_bits - 1):
        with pytest.raises(ValueError, match="mask"):
            other.plan(custom_mask=torch.ones(short, dtype=torch.bool))
    num_bytes = sum(-(-q * kv // 8) for q, kv in zip(QO_LENS, KV_LENS))
    for packed in (torch.zeros(num_bytes - 1, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.int32)):
        with pytest.raises(ValueError, match="mask"):
            other.plan(packed_custom_mask=packed)
    batch.check()


def test_a_failing_run_changes_nothing(kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    batch.plan()
    kv = batch.kv if kind == "ragged" else (batch.kv,)
    for options, error in (
        ({"out": torch.empty(1)}, ValueError),
        ({"out": torch.empty_like(batch.q[:1]).expand_as(batch.q)}, ValueError),
        ({"lse": torch.empty(1, device=device), "return_lse": True}, ValueError),
        ({"k_scale": -1.0}, ValueError),
        ({"k_scale": "1"}, TypeError),
        ({"v_scale": math.nan}, ValueError),
        ({"v_scale": torch.ones(1)}, ValueError),
        ({"sinks": torch.ones(4)}, ValueError),
        ({"nothing": 1}, TypeError),
    ):
        with pytest.raises(error):
            batch.wrapper.run(batch.q, *kv, **options)
    batch.check()


# ------------------------------------------------------------------------------------------------ lengths that disagree


def _lies(batch: Batch) -> dict[str, tuple[list[Tensor], str]]:
    """Index tensors that contradict each other, and what the error says."""
    lies: dict[str, tuple[list[Tensor], str]] = {}
    if batch.kind != "ragged":
        *qo, indptr, pages, last = batch.index
        lies |= {
            "offsets past the page numbers": ([*qo, indptr + int32(0, 0, 0, 9), pages, last], "ends at"),
            "last_page_len above the page size": ([*qo, indptr, pages, last + 4], "expected 1 to 4, the page size"),
            "last_page_len zero": ([*qo, indptr, pages, last * 0], "expected 1 to 4, the page size"),
            "last_page_len negative": ([*qo, indptr, pages, -last], "expected 1 to 4, the page size"),
            "negative page": ([*qo, indptr, pages - 8, last], r"is -\d+; expected"),
            "pages that wrap around": ([*qo, indptr.long() * (1 << 30), pages, last], "expected below|ends at"),
        }
    if batch.kind != "decode":
        lies["descending queries"] = ([batch.index[0].flip(0), *batch.index[1:]], "never descend")
    return lies


@pytest.mark.parametrize("name", _lies(Batch("paged", torch.device("cpu"))))
@pytest.mark.parametrize("as_int64", [False, True], ids=["int32", "int64"])
def test_index_tensors_that_contradict_each_other(name: str, as_int64: bool, kind: str, device: torch.device) -> None:
    """On the host, whatever the device of the wrapper."""
    batch = Batch(kind, device)
    if name not in _lies(batch):
        return  # these index tensors do not exist here
    index, message = _lies(batch)[name]
    with pytest.raises((ValueError, IndexError), match=message):
        batch.plan(*[tensor.long() if as_int64 else tensor for tensor in index])
    batch.plan()
    batch.check()


def test_what_padding_requests_hold_is_of_no_matter(device: torch.device) -> None:
    """Requests without pages have any last_page_len, entries of `indices` that nobody names are any number."""
    for kind in ("decode", "paged"):
        batch = Batch(kind, device)
        *qo, indptr, pages, last = batch.index
        expected = batch.expected()
        batch.q = torch.cat([batch.q, batch.q[:2] if kind == "decode" else batch.q[:0]])
        qo = [torch.cat([qo[0], qo[0][-1:].repeat(2)])] if qo else []
        index = [torch.cat([indptr, indptr[-1:].repeat(2)]), torch.cat([pages, int32(-7, 1 << 30)])]
        batch.plan(*qo, *index, torch.cat([last, int32(-3, 99)]))
        out = batch.run()
        assert_close(out[: len(expected)], expected)
        assert (out[len(expected) :] == 0).all()


def test_tensors_that_end_before_the_plan_does(kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    batch.plan()
    short = {
        "paged": lambda: batch.wrapper.run(batch.q[:-1], batch.kv),
        "ragged": lambda: batch.wrapper.run(batch.q[:-1], *batch.kv),
    }
    if kind in short:
        with pytest.raises(IndexError, match="q has 5 tokens; the planned qo_indptr ends at 6"):
            short[kind]()
    if kind == "ragged":
        with pytest.raises(IndexError, match="k has 17 rows; the planned kv_indptr ends at 18"):
            batch.wrapper.run(batch.q, batch.kv[0][:-1], batch.kv[1][:-1])
    else:
        last = int(batch.pages.max())
        with pytest.raises(IndexError, match=f"the cache has {last} pages; the planned page numbers go up to {last}"):
            batch.wrapper.run(batch.q, batch.kv[:last])
    batch.check()


# ------------------------------------------------------------------------------------ what was given stays the caller's


@pytest.mark.parametrize("pinned", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["pageable", "pinned"])
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_host_index_tensors_may_be_overwritten_after_plan(
    pinned: bool, graph: bool, kind: str, device: torch.device
) -> None:
    batch = Batch(kind, device, graph=graph)
    if device.type == "cuda":  # something for the copies to wait behind
        torch.cuda._sleep(20_000_000)
    index = [tensor.pin_memory() if pinned else tensor.clone() for tensor in batch.index]
    batch.plan(*index)
    for tensor in index:
        tensor.fill_(1 << 28)
    batch.check()


@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_a_host_mask_may_be_overwritten_after_plan(kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    causal = [torch.ones(q, kv).tril(kv - q).bool().flatten() for q, kv in zip(QO_LENS, KV_LENS)]
    packed = torch.cat([flashinfer.packbits(mask, bitorder="little") for mask in causal])
    for name, mask in (("custom_mask", torch.cat(causal)), ("packed_custom_mask", packed)):
        batch.plan(causal=False, **{name: mask})
        mask.zero_()
        batch.check()


# ----------------------------------------------------------------------------------------------- tensors without memory


@pytest.mark.parametrize("which", ["q", "k", "v", "out", "index"])
def test_meta_and_fake_tensors_are_refused(which: str, kind: str, device: torch.device) -> None:
    """Also after a call of the same signature with real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = Batch(kind, device)
    batch.plan()
    batch.check()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    pair = [*batch.kv] if kind == "ragged" else [*batch.kv.unbind(1)]
    given = {"q": batch.q, "k": pair[0], "v": pair[1], "out": torch.empty_like(batch.q)}
    _run(batch, given)
    for pretend in (lambda tensor: tensor.to("meta"), mode.from_tensor):
        if which == "index":
            with pytest.raises((ValueError, RuntimeError)):
                batch.plan(*[pretend(tensor) for tensor in batch.index])
        else:
            with pytest.raises((ValueError, RuntimeError)):
                _run(batch, {**given, which: pretend(given[which])})
        batch.check()


def _run(batch: Batch, given: dict[str, Tensor]) -> Tensor:
    kv = (given["k"], given["v"])
    out: Tensor = batch.wrapper.run(given["q"], *(kv if batch.kind == "ragged" else (kv,)), out=given["out"])
    return out


@pytest.mark.parametrize("value", [None, 3, "q", [1.0], object()], ids=["None", "int", "str", "list", "object"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_arguments_that_are_no_tensors(which: str, value: Any, kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    batch.plan()
    pair = [*batch.kv] if kind == "ragged" else [*batch.kv.unbind(1)]
    given = {"q": batch.q, "k": pair[0], "v": pair[1], "out": None, which: value}
    with pytest.raises(TypeError, match=f"{which} is {type(value).__name__}; expected a tensor"):
        _run(batch, given)
    if kind != "ragged":
        for cache in (value, (), (pair[0],), (*pair, pair[0])):
            with pytest.raises((TypeError, ValueError), match="expected"):
                batch.wrapper.run(batch.q, cache)
    batch.check()


def _give_back(tensor: Tensor, at_offset: bool) -> Tensor:
    """Shaped like it, of a storage that was given back; from its start, or from an offset that its address then is."""
    memory = torch.zeros(64 * at_offset + tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    view = memory[64 * at_offset :].view(tensor.shape)
    memory.untyped_storage().resize_(0)
    return view


WHERE = pytest.mark.parametrize("at_offset", [False, True], ids=["start", "offset"])
NO_MEMORY = pytest.raises(flashinfer.errors.UnsupportedConfig, match="without memory")


@WHERE
@pytest.mark.parametrize("which", ["q", "k", "v", "cache", "out", "lse"])
def test_runs_of_tensors_without_storage(which: str, at_offset: bool, kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    batch.plan()
    pair = [*batch.kv] if kind == "ragged" else [half.contiguous() for half in batch.kv.unbind(1)]
    given = {"q": batch.q, "k": pair[0], "v": pair[1]}
    given |= {"out": torch.empty_like(batch.q), "lse": torch.empty(batch.q.shape[:2], device=device)}
    for is_warm in (False, True):
        gone = given if which == "cache" else {**given, which: _give_back(given[which], at_offset)}
        kv: Any = (gone["k"], gone["v"]) if kind == "ragged" else ((gone["k"], gone["v"]),)
        if which == "cache":
            if kind == "ragged":
                return  # there is none
            kv = (_give_back(batch.kv, at_offset),)
        with NO_MEMORY:
            batch.wrapper.run(gone["q"], *kv, out=gone["out"], lse=gone["lse"], return_lse=True)
        if not is_warm:
            good = batch.kv if kind == "ragged" else (batch.kv,) if which == "cache" else (tuple(pair),)
            batch.wrapper.run(batch.q, *good, out=given["out"], lse=given["lse"], return_lse=True)
    batch.check()


@WHERE
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("on_host", [False, True], ids=["on device", "on host"])
def test_plans_of_tensors_without_storage(
    on_host: bool, graph: bool, at_offset: bool, kind: str, device: torch.device
) -> None:
    batch = Batch(kind, device, graph=graph)
    batch.plan()
    index = batch.index if on_host else [tensor.to(device) for tensor in batch.index]
    for i, tensor in enumerate(index):
        with NO_MEMORY:
            batch.plan(*index[:i], _give_back(tensor, at_offset), *index[i + 1 :])
        batch.check()
    if kind != "decode":
        num_bits = sum(q * kv for q, kv in zip(QO_LENS, KV_LENS))
        mask, packed = torch.ones(num_bits, dtype=torch.bool), torch.zeros(num_bits, dtype=torch.uint8)
        for given in ({"custom_mask": mask}, {"packed_custom_mask": packed}):
            ((name, tensor),) = given.items()
            with NO_MEMORY:
                batch.plan(*index, **{name: _give_back(tensor.to("cpu" if on_host else device), at_offset)})
            batch.check()


@pytest.mark.parametrize("buffer", range(6))
def test_buffers_for_graphs_without_storage(buffer: int, kind: str, device: torch.device) -> None:
    batch = Batch(kind, device, graph=True)
    mask = {} if kind == "decode" else {"custom_mask": torch.ones(6 * 9 * 3, dtype=torch.bool)}
    names = [name for name in batch.wrapper._buffers if mask or "mask" not in name]
    if buffer >= len(names):
        return
    batch.plan(**mask)
    batch.wrapper._buffers[names[buffer]].untyped_storage().resize_(0)
    with NO_MEMORY:
        batch.plan(**mask)


@WHERE
@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize("op", ["single_decode", "single_prefill"])
def test_single_calls_of_tensors_without_storage(op: str, which: str, at_offset: bool, device: torch.device) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    q_shape = (HEADS, HEAD_DIM) if op == "single_decode" else (3, HEADS, HEAD_DIM)
    given = {"q": torch.zeros(q_shape, dtype=dtype, device=device)}
    given |= {name: torch.zeros(9, KV_HEADS, HEAD_DIM, dtype=dtype, device=device) for name in "kv"}
    call = getattr(flashinfer, f"{op}_with_kv_cache")
    gone = {**given, which: _give_back(given[which], at_offset)}
    for _ in range(2):
        with NO_MEMORY:
            call(**gone)
        call(**given)  # from here on, the signature is known
    if op == "single_prefill":
        for name, dtype in (("custom_mask", torch.bool), ("packed_custom_mask", torch.uint8)):
            with NO_MEMORY:
                call(**given, **{name: _give_back(torch.zeros(27, dtype=dtype, device=device), at_offset)})


@WHERE
@pytest.mark.parametrize(
    "call", ["merge_state", "merge_state_in_place", "merge_states", "variable_length_merge_states"]
)
def test_merges_of_tensors_without_storage(call: str, at_offset: bool, device: torch.device) -> None:
    v, s = torch.zeros(3, 2, HEADS, HEAD_DIM, device=device), torch.zeros(3, 2, HEADS, device=device)
    given: list[Tensor] = [v[:, 0].contiguous(), s[:, 0].contiguous()] * 2
    if call == "merge_state_in_place":
        given.append(torch.ones(3, dtype=torch.bool, device=device))
    elif call == "merge_states":
        given = [v, s]
    elif call == "variable_length_merge_states":
        given = [v[:, 0].contiguous(), s[:, 0].contiguous(), int32(0, 1, 3).to(device)]
    merge = getattr(importlib.import_module("flashinfer.cascade"), call)
    for _ in range(2):
        for i, tensor in enumerate(given):
            with NO_MEMORY:
                merge(*given[:i], _give_back(tensor, at_offset), *given[i + 1 :])
        merge(*[tensor.clone() for tensor in given])  # from here on, the signature is known


@WHERE
def test_cascades_of_tensors_without_storage(at_offset: bool) -> None:
    cascade = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(0, dtype=torch.uint8))
    index = [[int32(0, 3), int32(0, 1, 2, 3)], [int32(0, 1), int32(0, 1, 2, 3)], [int32(0), int32(1, 2, 3)]]
    index.append([int32(4), int32(1, 2, 3)])
    for given in index:
        for level, tensor in enumerate(given):
            given[level] = _give_back(tensor, at_offset)
            with NO_MEMORY:
                cascade.plan(*index, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, q_data_type=torch.float32)
            given[level] = tensor
    cascade.plan(*index, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, q_data_type=torch.float32)


def test_empty_tensors_need_no_storage(kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    batch.plan(*[int32(*[0] * ("indptr" in name)) for name in batch.wrapper._index_names])
    kv = [half[:0] for half in batch.kv] if kind == "ragged" else [batch.kv[:0]]
    out = batch.wrapper.run(_give_back(batch.q[:0], False), *[_give_back(half, False) for half in kv])
    assert out.shape == batch.q[:0].shape


# --------------------------------------------------------------------------------------------------------------- copies


def test_copies_are_refused(kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    batch.plan()
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            duplicate(batch.wrapper)
    batch.check()


# ---------------------------------------------------------------------------------------------------- ranges of scalars

BAD_SCALARS: dict[str, tuple[Any, ...]] = {
    "window_left": ("3", 1.5, None),
    "logits_soft_cap": (-1.0, math.nan, math.inf, "30"),
    "sm_scale": (0.0, -1.0, math.nan, math.inf, "1"),
    "rope_scale": (0.0, -2.0, math.nan, math.inf, "1"),
    "rope_theta": (0, -1e4, math.nan, math.inf, "1e4"),
    "pos_encoding_mode": ("", "rope", 3, None),
}
CASES = [(name, value) for name, values in BAD_SCALARS.items() for value in values]


@pytest.mark.parametrize("name, value", CASES, ids=[f"{name}={value!r}" for name, value in CASES])
def test_options_out_of_range(name: str, value: Any, kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    one_line = pytest.raises((ValueError, TypeError), match=rf"^\w+: {name}")
    with one_line:
        batch.plan(**{name: value})
    batch.plan()
    if value is not None:
        kv = batch.kv if kind == "ragged" else (batch.kv,)
        with pytest.raises((ValueError, TypeError), match=rf"^\w+: {name}"):
            batch.wrapper.forward(batch.q, *kv, **{name: value})
    batch.check()


@pytest.mark.parametrize("window", [1 << 31, (1 << 63) - 1, (1 << 31) - 1, 1 << 30, (1 << 30) - 1, 100])
def test_a_window_longer_than_any_kv_is_none(window: int, kind: str, device: torch.device) -> None:
    batch = Batch(kind, device)
    batch.plan(window_left=window)
    batch.check()
    batch.plan()
    if kind != "ragged":
        assert_close(batch.run(window_left=window), batch.expected())


@pytest.mark.parametrize("value", ["", "float17", 3, ["float16"], torch.zeros(2)], ids=repr)
@pytest.mark.parametrize("name", ["q_data_type", "kv_data_type", "o_data_type", "data_type"])
def test_dtypes_that_are_none(name: str, value: Any, kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    options = {"q_data_type": torch.float32, "kv_data_type": torch.float32, name: value}
    if kind == "decode" or name != "data_type":
        with pytest.raises((ValueError, TypeError), match=rf"^\w+: {name}"):
            batch.plan(**options)
    if kind != "decode" and name == "q_data_type":
        with pytest.raises(TypeError, match=r"^\w+: q_data_type"):
            batch.plan(q_data_type=None)
    batch.plan()
    batch.check()


def test_options_without_a_hash(kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    names = ["window_left", "sm_scale", "pos_encoding_mode", *(["disable_split_kv"] if kind != "decode" else [])]
    for name in names:
        with pytest.raises((ValueError, TypeError), match=rf"^\w+: {name}"):
            batch.plan(**{name: [1]})
    batch.plan()
    kv = batch.kv if kind == "ragged" else (batch.kv,)
    for name, value in (("enable_pdl", "no"), ("enable_pdl", [1]), ("v_scale", [1.0])):
        with pytest.raises((ValueError, TypeError), match=r"^\w+: "):
            batch.wrapper.run(batch.q, *kv, **{name: value})
    batch.check()


@pytest.mark.parametrize("shape", [(), (2,)], ids=str)
@pytest.mark.parametrize("name", ["q_scale", "k_scale", "v_scale"])
def test_a_tensor_that_equals_the_last_scale_is_refused(name: str, shape: tuple[int, ...], kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    batch.plan()
    kv = batch.kv if kind == "ragged" else (batch.kv,)
    for scale in (0.5, None):
        batch.wrapper.run(batch.q, *kv, **{name: scale})
        with pytest.raises(flashinfer.errors.UnsupportedConfig, match="a scale is a tensor"):
            batch.wrapper.run(batch.q, *kv, **{name: torch.full(shape, 0.5)})
    batch.check()


@pytest.mark.parametrize("longest", ["4", 1.5, -1, [4]], ids=repr)
@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_a_longest_request_that_is_no_length(kind: str, longest: Any) -> None:
    batch = Batch(kind, torch.device("cpu"))
    with pytest.raises((ValueError, TypeError), match=r"^\w+: max_token_per_sequence"):
        batch.plan(max_token_per_sequence=longest)
    batch.plan(max_token_per_sequence=3)
    batch.check()


def test_buffers_for_graphs_that_hold_nothing(kind: str) -> None:
    roles = {
        "decode": ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer"),
        "paged": ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf"),
        "ragged": ("qo_indptr_buf", "kv_indptr_buf"),
    }[kind]
    make = type(Batch(kind, torch.device("cpu")).wrapper)
    sound = {name: int32(0) if "indptr" in name else int32() for name in roles}
    make(torch.empty(0, dtype=torch.uint8), use_cuda_graph=True, **sound)
    for name in roles:
        if "indptr" in name:
            with pytest.raises(ValueError, match=rf"^\w+: {name} is empty; expected batch_size \+ 1 entries"):
                make(torch.empty(0, dtype=torch.uint8), use_cuda_graph=True, **{**sound, name: int32()})


SIZES = {"num_qo_heads": 0, "num_kv_heads": 1, "head_dim": 2, "page_size": 3}


@pytest.mark.parametrize("value", [0, -1, -4, 1 << 31, 1.5, "4", None], ids=repr)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_out_of_range(name: str, value: Any, kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    if SIZES[name] >= len(batch.sizes):
        return
    good, bad = batch.sizes, list(batch.sizes)
    bad[SIZES[name]] = value
    batch.sizes = tuple(bad)  # type: ignore[assignment]
    with pytest.raises((ValueError, TypeError), match=rf"{name}|head_dim"):
        batch.plan()
    batch.sizes = good
    batch.plan()
    batch.check()


def test_sizes_may_be_any_integers(kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    batch.sizes = tuple(torch.tensor(size) for size in batch.sizes)  # type: ignore[assignment]
    batch.plan()
    batch.check()


@pytest.mark.parametrize("q", [None, "q", (), [1.0], torch.zeros(())], ids=repr)
@pytest.mark.parametrize("is_planned", [False, True])
def test_forward_of_no_tensor(q: Any, is_planned: bool, kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    if is_planned:
        batch.plan()
    kv = batch.kv if kind == "ragged" else (batch.kv,)
    with pytest.raises((TypeError, ValueError), match=": q "):
        batch.wrapper.forward(q, *kv)


# -------------------------------------------------------------------------------------------------------- torch.compile


def test_a_compiled_run_before_plan_raises_as_an_eager_one(kind: str) -> None:
    batch = Batch(kind, torch.device("cpu"))
    kv = batch.kv if kind == "ragged" else (batch.kv,)
    compiled = torch.compile(lambda q, *kv: batch.wrapper.run(q, *kv), fullgraph=True, backend="eager")
    for call in (batch.wrapper.run, compiled):
        with pytest.raises(ValueError, match=r"run\(\) before plan\(\)"):
            call(batch.q, *kv)
    batch.plan()
    assert torch.equal(compiled(batch.q, *kv), batch.run())


# ---------------------------------------------------------------------------------------------------- checks on request


@pytest.mark.gpu
def test_indices_on_a_gpu_are_checked_on_request(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer.host import indices

    monkeypatch.setenv("FLASHINFER_CHECK_INDICES", "1")
    indices._checks_devices.cache_clear()
    try:
        batch = Batch(kind, torch.device("cuda", 0))
        index, message = next(iter(_lies(batch).values()))
        with pytest.raises((ValueError, IndexError), match=message):
            batch.plan(*[tensor.cuda() for tensor in index])
        batch.plan(*[tensor.cuda() for tensor in batch.index])
        batch.check()
    finally:
        monkeypatch.undo()
        indices._checks_devices.cache_clear()


# ------------------------------------------------------------------------------------- what a GPU writes without checks

I32_MAX, I32_MIN = (1 << 31) - 1, -(1 << 31)
# Offsets of three requests that lie, unseen on the device.
LYING_OFFSETS = {
    "past the end": (0, 2, 5, 600),
    "far past the end": (0, 2, 5, I32_MAX),
    "all of them huge": (I32_MAX, I32_MAX, I32_MAX, I32_MAX),
    "below zero": (-9, 2, 5, 6),
    "far below zero": (I32_MIN, 2, 5, 6),
    "descending": (0, 6, 2, 4),
    "wrapping": (I32_MAX, I32_MIN, I32_MAX, I32_MIN),
    "sum beyond int32": (0, I32_MAX, I32_MIN, I32_MAX),
}
GUARD = 4096  # elements before and after a tensor


class Guarded:
    """A tensor within a larger one, the rest of which must stay as it is."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        self.memory = torch.full((math.prod(shape) + 2 * GUARD,), 77, dtype=dtype, device="cuda")
        self.tensor = self.memory[GUARD:-GUARD].view(shape)

    def check(self) -> None:
        assert bool((self.memory[:GUARD] == 77).all()), "written before the tensor"
        assert bool((self.memory[-GUARD:] == 77).all()), "written behind the tensor"


def _guard_workspaces(batch: Batch) -> tuple[Guarded, Guarded]:
    float_workspace, int_workspace = (Guarded(size << 20, dtype=torch.uint8) for size in (4, 8))
    batch.wrapper.reset_workspace_buffer(float_workspace.tensor, int_workspace.tensor)
    return float_workspace, int_workspace


@pytest.mark.gpu
@pytest.mark.parametrize("lie", LYING_OFFSETS)
@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_offsets_of_queries_that_lie_write_nothing_elsewhere(kind: str, lie: str) -> None:
    batch = Batch(kind, torch.device("cuda", 0))
    index = [tensor.cuda() for tensor in batch.index]
    num_tokens = batch.q.shape[0]
    out = Guarded(num_tokens, HEADS, HEAD_DIM, dtype=batch.dtype)
    lse = Guarded(num_tokens, HEADS, dtype=torch.float32)
    guarded = (*_guard_workspaces(batch), out, lse)
    batch.plan(int32(*LYING_OFFSETS[lie]).cuda(), *index[1:])
    batch.run(out=out.tensor, lse=lse.tensor)
    torch.cuda.synchronize()
    for each in guarded:
        each.check()
    batch.plan(*index)
    batch.check()


@pytest.mark.gpu
@pytest.mark.parametrize("last_page_len", [None, I32_MAX, I32_MIN, -100000])
@pytest.mark.parametrize("lie", LYING_OFFSETS)
def test_offsets_of_keys_that_lie_make_planners_write_nothing_elsewhere(
    kind: str, lie: str, last_page_len: Any
) -> None:
    """The plan alone: a run would read whatever the offsets point to."""
    batch = Batch(kind, torch.device("cuda", 0))
    index = [tensor.cuda() for tensor in batch.index]
    guarded = _guard_workspaces(batch)
    lying = list(index)
    lying[0 if kind == "decode" else 1] = int32(*LYING_OFFSETS[lie]).cuda()
    if last_page_len is not None and kind != "ragged":
        lying[-1] = torch.full_like(index[-1], last_page_len)
    batch.plan(*lying)
    torch.cuda.synchronize()
    for each in guarded:
        each.check()
    batch.plan(*index)
    batch.check()


# ------------------------------------------------------------------------------------------------------- without a plan


def _single(name: str, device: torch.device) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    k = torch.randn(9, KV_HEADS, HEAD_DIM).to(device, dtype)
    q = torch.randn(*((HEADS, HEAD_DIM) if name == "decode" else (3, HEADS, HEAD_DIM))).to(device, dtype)
    return getattr(flashinfer, f"single_{name}_with_kv_cache"), {"q": q, "k": k, "v": k.flip(0)}


@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_single_refuses_what_is_no_tensor_in_memory(name: str, which: str, device: torch.device) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    function, given = _single(name, device)
    expected = function(**given)
    fake = FakeTensorMode(allow_non_fake_inputs=True).from_tensor
    for value in (None, 3, "q", [1.0]):
        with pytest.raises(TypeError, match=f"{which} is {type(value).__name__}; expected a tensor"):
            function(**{**given, which: value})
    for pretended in (given[which].to("meta"), fake(given[which])):
        with pytest.raises((ValueError, RuntimeError)):
            function(**{**given, which: pretended})
    for shape in ((), (3,), (2, 2, 2, 2)):
        with pytest.raises(ValueError):
            function(**{**given, which: torch.zeros(shape, device=device, dtype=given["q"].dtype)})
    assert torch.equal(function(**given), expected)


@pytest.mark.parametrize("name, value", CASES, ids=[f"{name}={value!r}" for name, value in CASES])
@pytest.mark.parametrize("operator", ["decode", "prefill"])
def test_single_options_out_of_range(operator: str, name: str, value: Any) -> None:
    function, given = _single(operator, torch.device("cpu"))
    with pytest.raises((ValueError, TypeError), match=rf"^\w+: {name}"):
        function(**given, **{name: value})


def test_single_masks_that_do_not_fit(device: torch.device) -> None:
    function, given = _single("prefill", device)
    expected = function(**given, causal=True)
    mask = torch.ones(3, 9, device=device).tril(6).bool()
    for bad in (mask[:2], mask[:, :8], mask[None, :, :, None][..., :0], mask.flatten()[:-1]):
        with pytest.raises(ValueError, match="custom_mask"):
            function(**given, custom_mask=bad)
    packed = flashinfer.packbits(mask.flatten(), bitorder="little")
    for bad in (packed[:-1], packed.int(), packed[:0]):
        with pytest.raises(ValueError, match="packed_custom_mask"):
            function(**given, packed_custom_mask=bad)
    with pytest.raises(TypeError, match="custom_mask is list; expected a tensor"):
        function(**given, custom_mask=[True])
    for options in ({"custom_mask": mask}, {"custom_mask": mask.cpu()}, {"packed_custom_mask": packed.cpu()}):
        assert torch.equal(function(**given, **options), expected)
