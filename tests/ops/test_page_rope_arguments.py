# SPDX-License-Identifier: Apache-2.0
"""Arguments that no call of `flashinfer.page` and `flashinfer.rope` can mean: one line that names them, at the first
call and after right ones of nearly the same signature, and nothing written. And what may surround a call and must not
matter."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flashinfer
from flashinfer.errors import FlashInferError
from flashinfer.host import paged_cache
from tests.ops.slots_kit import HEAD_DIM, NAMES, NUM_ROWS, Call, fresh_memos, make_call
from tests.oracles import rope as oracle
from tests.tolerances import assert_close

CPU = torch.device("cpu")


def expect_error(call: Call, **changed: Any) -> str:
    """The call fails with a line meant for callers, and changes nothing. Returns the line."""
    before = call.bits()
    with pytest.raises((ValueError, TypeError, IndexError, FlashInferError)) as caught:
        call.run(**changed)
    assert all(torch.equal(x, y) for x, y in zip(call.bits(), before))
    message = str(caught.value)
    assert "\n" not in message and message
    return message


def in_fake_memory(tensor: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(tensor)


TENSORS: dict[str, Callable[[torch.Tensor], object]] = {
    "None": lambda x: None,
    "a number": lambda x: 3.5,
    "text": lambda x: "text",
    "a list": lambda x: [x],
    "0-d": lambda x: x.reshape(-1)[0],
    "one axis more": lambda x: x.unsqueeze(0),
    "no axis but the first": lambda x: x.reshape(x.shape[0], -1)[:, 0] if x.dim() > 1 else x[:0].reshape(0, 2),
    "a row less": lambda x: x[:-1],
    "complex": lambda x: x.float().to(torch.complex64),
    "bool": lambda x: x.bool(),
    "float64": lambda x: x.double(),
    "on meta": lambda x: x.to("meta"),
    "fake": in_fake_memory,
    "every other entry": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
}
# Legal, or ignored, as it happens.
EXCEPTIONS = {
    *{(name, "kv_indices", kind) for name in NAMES for kind in ("a row less",)},  # the list may be longer than needed
    *{(name, "cos_sin_cache", "a row less") for name in NAMES},  # positions are what matters
    *{(name, argument, "None") for name in NAMES for argument in ("ckv_cache", "kpe_cache", "q_out")},  # optional
    ("get_batch_indices_positions", "batch_indices", "None"),
    ("get_batch_indices_positions", "positions", "None"),
    ("append_paged_kv_cache, fp8", "v_scale", "None"),
    ("append_paged_kv_cache, fp8", "v_scale", "a number"),
    ("append_paged_kv_cache, fp8", "v_scale", "0-d"),
    ("append_paged_kv_cache, fp8", "v_scale", "one axis more"),
    ("append_paged_kv_cache, fp8", "v_scale", "every other entry"),
    *{("append_paged_kv_cache", "paged_kv_cache", kind) for kind in ("a row less",)},
    *{("rope_append_paged_kv_cache", "paged_kv_cache", kind) for kind in ("a row less",)},
}
EACH = [
    (name, argument, kind)
    for name in NAMES
    for argument, value in make_call(name, CPU).arguments.items()
    for kind in TENSORS
    if isinstance(value, torch.Tensor) and (name, argument, kind) not in EXCEPTIONS
]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", NAMES)
def test_tensors(name: str) -> None:
    for _, argument, kind in [each for each in EACH if each[0] == name]:
        for prepared in (False, True):
            call = make_call(name, CPU)
            with fresh_memos():
                if prepared:
                    call.run()
                value = TENSORS[kind](call.arguments[argument])
                try:
                    message = expect_error(call, **{argument: value})
                except BaseException as error:
                    error.add_note(f"{argument}: {kind}, {'a later' if prepared else 'the first'} call")
                    raise
                assert message.startswith(call.name), f"{argument}: {kind}: {message}"


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["on meta", "fake"])
def test_all_tensors_without_memory(name: str, kind: str) -> None:
    """After a right call of the same signature."""
    call = make_call(name, CPU)
    with fresh_memos():
        call.run()
        moved = {
            argument: TENSORS[kind](value)
            for argument, value in call.arguments.items()
            if isinstance(value, torch.Tensor)
        }
        assert re.search("(has no memory here|without memory); expected a", expect_error(call, **moved))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_has_a_place_for_every_element(name: str) -> None:
    call = make_call(name, CPU)
    for argument in call.written:
        value = call.arguments[argument]
        if isinstance(value, tuple):
            for half in range(2):
                pair = [*value]
                pair[half] = pair[half][:1].expand_as(pair[half])
                assert "overlap in memory" in expect_error(call, **{argument: tuple(pair)})
            continue
        for axis in range(value.dim() - 1) if value.dim() > 1 else ():
            if value.shape[axis] > 1:
                once = value.narrow(axis, 0, 1).clone().expand_as(value)
                assert "overlap in memory" in expect_error(call, **{argument: once})
        if value.dim() == 1:
            assert "stride 0; expected 1" in expect_error(call, **{argument: value[:1].clone().expand_as(value)})


RAGGED = "apply_rope"
LLAMA = "apply_llama31_rope_pos_ids_inplace"
TABLE = "apply_rope_with_cos_sin_cache"
NORM, APPEND, FUSED = "fused_qk_rmsnorm_rope", "append_paged_kv_cache", "rope_append_paged_kv_cache"
NAN, INF = math.nan, math.inf
TURNS, LLAMAS = (RAGGED, LLAMA, NORM, FUSED), (LLAMA, NORM, FUSED)
FP8, POSITIONS, LENS = "append_paged_kv_cache, fp8", "get_batch_indices_positions", "get_seq_lens"
SCALARS: list[tuple[tuple[str, ...], str, str, tuple[object, ...]]] = [
    (TURNS, "rope_theta", "rope_theta is", (0, -1, NAN, INF, "1e4", None, [1e4], 1j, torch.tensor(1e4))),
    (TURNS, "rope_scale", "rope_scale is", (0, -8.0, NAN, INF, "1", 10**400)),
    (TURNS, "rotary_dim", "rotary_dim is", (0, -4, 3, 6, 36, 2**40, 4.0, "4", True)),
    (TURNS, "interleave", "interleave is", (2, "yes", None, 0.5, [True])),
    (LLAMAS, "low_freq_factor", "low_freq_factor is", (NAN, "1", -INF)),
    (LLAMAS, "high_freq_factor", "high_freq_factor is", (NAN, None, INF)),
    (LLAMAS, "old_context_len", "old_context_len is", (-1, 2**31, 8192.5, "8192")),
    ((TABLE,), "head_size", "expected", (0, -32, 7, 2**40, "32", None)),
    ((TABLE,), "is_neox", "is_neox is", (2, "neox", None, torch.tensor([1, 0]))),
    ((NORM,), "num_qo_heads", "num_qo_heads is", (-1, -(2**40), "2", 2.5, None)),
    ((NORM,), "num_kv_heads", "num_kv_heads is", (-1, "1", 0.5, NAN)),
    ((NORM,), "num_kv_heads", "qkv has 4 heads of 32; expected at least", (3, 2**31 - 1)),
    ((NORM,), "eps", "eps is", (NAN, INF, "1e-6", None, 1e39, 1j, -1e-6, torch.tensor(1e-6))),
    ((NORM,), "weight_bias", "weight_bias is", (NAN, -INF, "1", -1e300, torch.tensor(1.0))),
    ((FP8,), "k_scale", "k_scale is", (NAN, INF, "0.5", 1j, 1e39, 10**400, [0.5])),
    ((APPEND, FP8, FUSED, NORM), "enable_pdl", "enable_pdl is", (2, "none", 0.5)),
    ((APPEND, FUSED), "kv_layout", "expected 'NHD' or 'HND'", ("nhd", "", None, 0, ["NHD"])),
    ((POSITIONS,), "nnz", "nnz is", (-1, 2**31, "5", 5.5, None)),
    ((LENS,), "page_size", "page_size is", (0, -4, 2**31, "4", 4.5, None)),
]


@pytest.mark.parametrize("names, argument, message, values", SCALARS, ids=lambda value: str(value)[:20])
def test_scalars(names: tuple[str, ...], argument: str, message: str, values: tuple[object, ...]) -> None:
    for name, value, prepared in itertools.product(names, values, (False, True)):
        call = make_call(name, CPU)
        with fresh_memos():
            if prepared:
                call.run()
            line = expect_error(call, **{argument: value})
            assert message in line and line.startswith(f"{call.name}: "), line


def test_a_frequency_that_overflows() -> None:
    for changed in ({"rope_theta": 1e-320}, {"rope_scale": 5e-324}, {"rope_theta": 1e-38, "rope_scale": 1e-300}):
        assert "rope_theta is" in expect_error(make_call("apply_rope_pos_ids", CPU), **changed)


def test_a_number_is_not_known_by_its_identity() -> None:
    """A memo that held a tensor would find it again after its value has changed."""
    call, theta = make_call("apply_rope_pos_ids", CPU), torch.tensor(1e4)
    assert "rope_theta is a tensor; expected a number" in expect_error(call, rope_theta=theta)


def test_the_width_of_a_table_and_rotary_dim_agree() -> None:
    table = torch.zeros(16, 16)
    for name in (FUSED, NORM):
        call = make_call(name, CPU)
        call.run(cos_sin_cache=table)
        call.run(cos_sin_cache=table, rotary_dim=16)
        assert "expected [max_position, 32]" in expect_error(call, cos_sin_cache=table, rotary_dim=32)
    assert "cos_sin_cache has no rows" in expect_error(make_call(TABLE, CPU), cos_sin_cache=table[:0])


CACHES: dict[str, tuple[Callable[[torch.Tensor], object], str]] = {
    "one of three": (lambda x: (x[:, 0], x[:, 1], x[:, 1]), "paged_kv_cache is a tuple of 3; expected"),
    "one of one": (lambda x: (x[:, 0],), "paged_kv_cache is a tuple of 1; expected"),
    "none": (lambda x: None, "paged_kv_cache is a NoneType; expected a tensor or a pair"),
    "half a pair": (lambda x: (x[:, 0], None), "v_cache is NoneType; expected a tensor"),
    "numbers": (lambda x: (1, 2), "k_cache is int; expected a tensor"),
    "three on axis 1": (lambda x: x[:, :1].expand(-1, 3, -1, -1, -1), "expected [pages, 2, page_size"),
    "other heads": (lambda x: x[..., :1, :].repeat(1, 1, 1, 5, 1), "dim 3 (num_kv_heads) is 5, the rows have"),
    "other head_dim": (lambda x: x[..., :8], "dim 4 (head_dim) is 8, the rows have 32; pass a cache in layout NHD"),
    "other pages in V": (lambda x: (x[:, 0], x[:-1, 1]), "the v cache dim 0 (pages) is 4, the k cache has 5"),
    "other page_size in V": (lambda x: (x[:, 0], x[:, 1, :3]), "the v cache dim 1 (page_size) is 3, the k cache has 4"),
    "other dtype in V": (lambda x: (x[:, 0], x[:, 1].half()), "the v cache is torch.float16; expected torch.float32"),
    "pages of nothing": (lambda x: x[:, :, :0], "expected a page_size of at least 1"),
    "V elsewhere": (lambda x: (x[:, 0], x[:, 1].to("meta")), "v_cache is a Tensor on meta, which has no memory"),
}


@pytest.mark.parametrize("name", [APPEND, FUSED])
@pytest.mark.parametrize("kind", CACHES)
def test_caches(name: str, kind: str) -> None:
    for prepared in (False, True):
        call = make_call(name, CPU)
        with fresh_memos():
            if prepared:
                call.run()
            change, message = CACHES[kind]
            assert message in expect_error(call, paged_kv_cache=change(call.arguments["paged_kv_cache"]))


def test_heads_of_an_attention() -> None:
    for heads in ((-8, 2), (8, 0), (7, 2), (8, -2), (8.0, 2), ("8", 2), (8, None), (2**40, 2)):
        with pytest.raises((TypeError, ValueError), match=r"^op: num_(qo|kv)_heads is .*; expected"):
            paged_cache.require_heads("op", *heads)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_prepared_launch_keeps_no_tensor_alive(name: str) -> None:
    call = make_call(name, CPU)
    call.run()
    alive = [
        weakref.ref(x)
        for value in call.arguments.values()
        for x in (value if isinstance(value, tuple) else (value,))
        if isinstance(x, torch.Tensor)
    ]
    del call
    gc.collect()
    assert alive and not any(reference() is not None for reference in alive)


# --------------------------------------------------------------------------------------------------- strides of outputs


def test_outputs_of_other_strides_than_the_inputs() -> None:
    """torch.compile chooses the strides of what a traced call allocates; so does a caller of q_out."""
    call = make_call("apply_rope_pos_ids", CPU)
    q, k, positions = call.arguments.values()
    expected = call.run()
    run = torch.ops.flashinfer.rope
    frequencies = (None, False, positions, None, None, None, 1.0, 1e4, 1.0, 4.0, 0)
    for strides in ((64, 32, 1), (32, 160, 1), (96, 32, 1)):
        q_out = torch.full((1000,), torch.nan).as_strided(q.shape, strides)
        k_out = torch.full((1000,), torch.nan).as_strided(k.shape, (strides[0], 32, 1))
        run("apply_rope_pos_ids", q, k, q_out, k_out, *frequencies, None)
        assert torch.equal(q_out, expected[0]) and torch.equal(k_out, expected[1])
    call = make_call(FUSED, CPU)
    expected_q = call.run(q_out=None)
    for strides in ((64, 32, 1), (32, 160, 1), (96, 32, 1)):
        q_out = torch.full((1000,), torch.nan).as_strided(q.shape, strides)
        assert call.run(q_out=q_out) is q_out and torch.equal(q_out, expected_q)
    transposed = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(call.run(q=transposed, q_out=None), expected_q)


def test_strides_of_second_operands(device: torch.device) -> None:
    """q beside k, v beside k, weights: each by strides of its own, in an order that would find another's launch."""
    q, k, positions = make_call("apply_rope_pos_ids", device).arguments.values()
    angles = oracle.angles_of(positions, oracle.frequencies(HEAD_DIM))
    wide = torch.zeros(NUM_ROWS, 3, 2 * HEAD_DIM, device=device)
    for dest in (
        wide[:, :1, :HEAD_DIM],
        wide[:, 1:2, HEAD_DIM:],
        wide.transpose(0, 1)[:1, :, :HEAD_DIM].transpose(0, 1),
    ):
        dest.copy_(k)
        for x, y in zip(flashinfer.apply_rope_pos_ids(q, dest, positions), (q, k)):
            assert_close(x, oracle.rotate(y, angles))
    for name in (APPEND, FUSED):
        call = make_call(name, device)
        call.run()
        expected = call.arguments["paged_kv_cache"].clone()
        value = "append_value" if name == APPEND else "v"
        spread = torch.stack([call.arguments[value]] * 3, dim=1)[:, 1]
        call.arguments["paged_kv_cache"].zero_()
        call.run(**{value: spread})
        assert torch.equal(call.arguments["paged_kv_cache"], expected)


# ------------------------------------------------------------------------------------------------------- what surrounds


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AMBIENT: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "default device meta": lambda: torch.device("meta"),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ambient", AMBIENT)
def test_ambient_state(name: str, ambient: str) -> None:
    """What a call returns and writes, and the error of a wrong index, is the same at the first call and later."""
    plain, call = make_call(name, CPU), make_call(name, CPU)
    expected = plain.run()
    with fresh_memos(), AMBIENT[ambient]():
        returned = [call.run()]
        if not any(name.endswith(end) for end in ("inplace", "rope")):  # which would turn twice
            returned.append(call.run())
    for got in returned:
        for x, y in zip(*((value if isinstance(value, tuple) else (value,)) for value in (got, expected))):
            assert x is y is None or (x.dtype == y.dtype and torch.equal(x, y))
    assert all(torch.equal(x, y) for x, y in zip(call.bits(), plain.bits()))


# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_function_in_the_place_of_the_public_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library operator reaches its kernel by a name of its own."""
    plain, call = make_call(name, CPU), make_call(name, CPU)
    expected = plain.run()
    torch.compiler.reset()
    compiled = torch.compile(getattr(flashinfer, call.name), fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flashinfer, call.name, compiled)
    module = flashinfer.page if hasattr(flashinfer.page, call.name) else flashinfer.rope
    monkeypatch.setattr(module, call.name, compiled)
    got = call.run()
    for x, y in zip(*((value if isinstance(value, tuple) else (value,)) for value in (got, expected))):
        assert x is y is None or torch.equal(x, y)
    assert all(torch.equal(x, y) for x, y in zip(call.bits(), plain.bits()))


def test_compiled_in_place_of_q() -> None:
    plain, call = make_call(FUSED, CPU), make_call(FUSED, CPU)
    expected = plain.run(q_out=plain.arguments["q"])
    torch.compiler.reset()
    function = torch.compile(flashinfer.rope_append_paged_kv_cache, fullgraph=True, backend="aot_eager")
    got = function(**{**call.arguments, "q_out": call.arguments["q"]})
    assert torch.equal(got, expected) and torch.equal(call.arguments["q"], expected)
    assert torch.equal(call.arguments["paged_kv_cache"], plain.arguments["paged_kv_cache"])
