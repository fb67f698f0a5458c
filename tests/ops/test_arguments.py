# SPDX-License-Identifier: Apache-2.0
"""Arguments that are not what an operator takes: numbers out of range, other kinds of things, tensors without memory.

Each is one line that names the operator and the argument, and leaves what was given as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flashinfer
from flashinfer import utils
from flashinfer.cascade import merge_state, merge_state_in_place, merge_states, variable_length_merge_states
from flashinfer.causal_conv1d import causal_conv1d_update
from flashinfer.errors import UnsupportedConfig
from flashinfer.gdn_prefill import chunk_gated_delta_rule
from flashinfer.quantization import packbits, segment_packbits, segment_packbits_padded
from tests.public_calls.inputs import SHAPES, Inputs

HIDDEN = 16


def operands(device: torch.device) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A legal call of each operator: the function and its arguments by name."""
    x, weight = torch.ones(3, HIDDEN, device=device), torch.ones(HIDDEN, device=device)
    gated, fp8 = torch.ones(3, 2 * HIDDEN, device=device), torch.zeros(3, HIDDEN, device=device).to(torch.float8_e4m3fn)
    v, s = torch.ones(3, 2, 64, device=device), torch.zeros(3, 2, device=device)
    bits, indptr = torch.ones(20, dtype=torch.bool, device=device), torch.tensor([0, 3, 20], device=device)
    pair = {"v_a": v, "s_a": s, "v_b": v.clone(), "s_b": s.clone()}
    in_place = {"v": v.clone(), "s": s.clone(), "v_other": v.clone(), "s_other": s.clone()}
    return {
        "rmsnorm": (flashinfer.rmsnorm, {"input": x, "weight": weight, "out": x.clone()}),
        "gemma_rmsnorm": (flashinfer.gemma_rmsnorm, {"input": x, "weight": weight, "out": x.clone()}),
        "fused_add_rmsnorm": (
            flashinfer.fused_add_rmsnorm, {"input": x.clone(), "residual": x.clone(), "weight": weight}
        ),
        "gemma_fused_add_rmsnorm": (
            flashinfer.gemma_fused_add_rmsnorm, {"input": x.clone(), "residual": x.clone(), "weight": weight}
        ),
        "layernorm": (flashinfer.layernorm, {"input": x, "gemma": weight, "beta": weight}),
        "rmsnorm_quant": (flashinfer.rmsnorm_quant, {"out": fp8, "input": x, "weight": weight, "scale": 0.5}),
        "fused_add_rmsnorm_quant": (
            flashinfer.fused_add_rmsnorm_quant,
            {"out": fp8.clone(), "input": x, "residual": x.clone(), "weight": weight, "scale": 0.5},
        ),
        "silu_and_mul": (flashinfer.silu_and_mul, {"input": gated, "out": x.clone()}),
        "gelu_and_mul": (flashinfer.gelu_and_mul, {"input": gated, "out": x.clone()}),
        "gelu_tanh_and_mul": (flashinfer.gelu_tanh_and_mul, {"input": gated, "out": x.clone()}),
        "silu_and_mul_quant": (flashinfer.silu_and_mul_quant, {"out": fp8.clone(), "input": gated, "scale": 0.5}),
        "packbits": (packbits, {"x": bits}),
        "segment_packbits": (segment_packbits, {"x": bits, "indptr": indptr}),
        "merge_state": (merge_state, pair),
        "merge_state_in_place": (merge_state_in_place, in_place),
        "merge_states": (merge_states, {"v": v[:, None], "s": s[:, None]}),
        "variable_length_merge_states": (
            variable_length_merge_states,
            {"v": v, "s": s, "indptr": torch.tensor([0, 1, 3], dtype=torch.int32, device=device)},
        ),
    }  # fmt: skip


NAMES = tuple(operands(torch.device("cpu")))
NORMS = [name for name in NAMES if "norm" in name]
QUANTS = [name for name in NAMES if name.endswith("_quant")]


def refuses(function: Callable[..., Any], given: dict[str, Any], *errors: type[Exception], match: str) -> None:
    """It raises, and no tensor changed."""
    tensors = {name: value for name, value in given.items() if type(value) is Tensor and not value.is_meta}
    tensors = {name: value for name, value in tensors.items() if value.layout is torch.strided}
    before = {name: value.clone() for name, value in tensors.items()}
    with pytest.raises(errors, match=match):
        function(**given)
    for name, value in tensors.items():
        assert torch.equal(value.reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("name", NAMES)
def test_the_calls_are_legal(device: torch.device, name: str) -> None:
    function, given = operands(device)[name]
    function(**given)


NO_NUMBER = ["1e-6", b"1", [1.0], None, 1j, True, object()]
OUT_OF_RANGE = [-1e-6, -1, math.nan, math.inf, -math.inf, 1e300, 1 << 200]


@pytest.mark.parametrize("name", NORMS)
def test_eps(device: torch.device, name: str) -> None:
    function, given = operands(device)[name]
    for eps in (0, 0.0, 1e-45, 1, 1 << 70):
        function(**given, eps=eps)
    for eps in NO_NUMBER:
        if not isinstance(eps, (list, bool)):  # no key of a dictionary: Python's own TypeError; True is found as 1
            refuses(function, {**given, "eps": eps}, TypeError, match=rf"^{name}: eps is .*; expected a number")
    refuses(function, {**given, "eps": [1.0]}, TypeError, match="unhashable")
    refuses(function, {**given, "eps": torch.tensor(1e-6)}, TypeError, match=rf"^{name}: eps is a tensor")
    for eps in OUT_OF_RANGE:
        match = rf"^{name}: eps is .*; expected a finite number of 32 bits, at least 0"
        refuses(function, {**given, "eps": eps}, ValueError, TypeError, match=match)


@pytest.mark.parametrize("name", QUANTS)
def test_scale(device: torch.device, name: str) -> None:
    """A number is another in each call: the check is not only of the first one."""
    function, given = operands(device)[name]
    for scale in (None, 1, 2.0**-126, 1e38, torch.ones(1, device=device), torch.ones((), device=device)):
        function(**{**given, "scale": scale})
    for scale in NO_NUMBER:
        if scale is not None:
            refuses(function, {**given, "scale": scale}, TypeError, match=rf"^{name}: scale is .*; expected a number")
    for scale in (*OUT_OF_RANGE, 0, 0.0, 1e-39):
        refuses(function, {**given, "scale": scale}, ValueError, match=rf"^{name}: scale is .*; expected a finite")
    for scale in (torch.ones(2), torch.ones(0), torch.ones(1).double()):
        scale = scale.to(device)
        refuses(function, {**given, "scale": scale}, ValueError, match=rf"^{name}: scale is .*one float32 in a tensor")


@pytest.mark.parametrize("name", [*NORMS, *(name for name in NAMES if "_and_mul" in name)])
def test_enable_pdl(device: torch.device, name: str) -> None:
    function, given = operands(device)[name]
    if name == "layernorm":
        return
    for pdl in (True, False, None):
        function(**given, enable_pdl=pdl)
    for wrong in ("yes", 2, 0.5):
        match = rf"^{name}: enable_pdl is .*; expected True, False or None"
        refuses(function, {**given, "enable_pdl": wrong}, TypeError, match=match)


@pytest.mark.parametrize("name", ["packbits", "segment_packbits"])
def test_bitorder(device: torch.device, name: str) -> None:
    function, given = operands(device)[name]
    for wrong in ("Big", "", None, 1, ["big"], b"big"):
        refuses(function, {**given, "bitorder": wrong}, ValueError, match=rf"^{name}: bitorder is .*'big' or 'little'")


def tensor_arguments(name: str, device: torch.device) -> list[str]:
    return [argument for argument, value in operands(device)[name][1].items() if isinstance(value, Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_not_a_tensor(device: torch.device, name: str) -> None:
    for argument in tensor_arguments(name, device):
        for wrong in (None, 1.0, "x", [1.0], (), object()):
            if argument == "out" and wrong is None and not name.endswith("_quant"):
                continue
            function, given = operands(device)[name]
            refuses(function, {**given, argument: wrong}, TypeError, match=rf"^{name}: .*; expected a tensor")


@pytest.mark.parametrize("name", NAMES)
def test_another_rank(device: torch.device, name: str) -> None:
    """No axes, one, or one more than there should be."""
    for argument in tensor_arguments(name, device):
        function, given = operands(device)[name]
        tensor = given[argument]
        for other in (tensor.flatten()[0], tensor.flatten(), tensor[..., None], tensor[None]):
            one_more_row = name == "layernorm" and argument == "input" and other.shape[1:] == tensor.shape
            if other.shape == tensor.shape or one_more_row:
                continue
            refuses(function, {**given, argument: other}, ValueError, match=rf"^{name}: ")
    function, given = operands(device)[name]
    scalars = {k: value.flatten()[0] if isinstance(value, Tensor) else value for k, value in given.items()}
    refuses(function, scalars, ValueError, match=rf"^{name}: ")


@pytest.mark.parametrize("name", NAMES)
def test_another_dtype(device: torch.device, name: str) -> None:
    """Refused, but where it is converted: booleans of any dtype, an LSE that is only read, offsets of int64."""
    for argument in tensor_arguments(name, device):
        for dtype in (torch.int32, torch.float64, torch.bool, torch.complex64, torch.float8_e5m2):
            function, given = operands(device)[name]
            converted = {
                "x": True,
                "indptr": dtype == torch.int32,
                "out": name.endswith("_quant") and dtype == torch.float8_e5m2,
                "s": name != "merge_state_in_place" and dtype.is_floating_point,
                **dict.fromkeys(("s_a", "s_b", "s_other"), dtype.is_floating_point),
            }
            other = {**given, argument: given[argument].float().to(dtype)}
            if converted.get(argument):
                function(**other)
            elif dtype != given[argument].dtype:
                refuses(function, other, ValueError, match=rf"^{name}: .*; expected")


@pytest.mark.parametrize("name", NAMES)
def test_meta(device: torch.device, name: str) -> None:
    """The result of a call on meta tensors has the shapes of the real one, the first time and behind a real call. What
    needs values is refused."""
    function, given = operands(device)[name]
    result = function(**given)
    if "scale" in given:
        given["scale"] = torch.ones(1, device=device)
    arguments = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    if name == "segment_packbits":
        refuses(function, arguments, UnsupportedConfig, match=r"^segment_packbits: x is on meta.*_padded")
        function, result = segment_packbits_padded, segment_packbits_padded(**given)
    for real, meta in zip(as_tensors(result), as_tensors(function(**arguments)), strict=True):
        assert meta.is_meta and (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def as_tensors(result: Any) -> tuple[Tensor, ...]:
    return () if result is None else (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("name", NAMES)
def test_one_operand_on_meta(device: torch.device, name: str) -> None:
    for argument in tensor_arguments(name, device):
        function, given = operands(device)[name]
        if len(tensor_arguments(name, device)) > 1:
            function(**given)  # a launch for this signature is kept, where devices are compared by number
            given[argument] = given[argument].to("meta")
            refuses(function, given, ValueError, match=rf"^{name}: .* on (meta|{device})")


@pytest.mark.parametrize("name", NAMES)
def test_tensors_without_memory(device: torch.device, name: str) -> None:
    for argument in tensor_arguments(name, device):
        function, given = operands(device)[name]
        tensor = given[argument]
        with FakeTensorMode():
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        match = rf"^{name}: .* without memory; expected a dense tensor on a cuda or cpu device"
        refuses(function, {**given, argument: fake}, UnsupportedConfig, match=match)
        if tensor.dtype != torch.float8_e4m3fn:
            refuses(function, {**given, argument: tensor.to_sparse()}, UnsupportedConfig, match=match)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_one_operand_on_another_device(name: str) -> None:
    device = torch.device("cuda")
    for argument in tensor_arguments(name, device):
        function, given = operands(device)[name]
        if len(tensor_arguments(name, device)) > 1:
            given[argument] = given[argument].cpu()
            refuses(function, given, ValueError, match=rf"^{name}: .* on (cpu|cuda:0)")


# Numbers that a launch keeps, across operators and wrappers.
KEPT: dict[str, Callable[[Inputs, Any], Any]] = {
    "single_decode: sm_scale": lambda i, x: flashinfer.single_decode_with_kv_cache(i.q[0], *i.kv, sm_scale=x),
    "single_prefill: window_left": lambda i, x: flashinfer.single_prefill_with_kv_cache(i.q, *i.kv, window_left=x),
    "single_prefill: rope_theta": lambda i, x: flashinfer.single_prefill_with_kv_cache(
        i.q, *i.kv, pos_encoding_mode="ROPE_LLAMA", rope_theta=x
    ),
    "batch_decode: sm_scale": lambda i, x: flashinfer.BatchDecodeWithPagedKVCacheWrapper(i.workspace).plan(
        *i.paged, *SHAPES, sm_scale=x
    ),
    "batch_prefill_paged: logits_soft_cap": lambda i, x: (
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(i.workspace).plan(
            i.qo_indptr, *i.paged, *SHAPES, logits_soft_cap=x
        )
    ),
    "get_seq_lens: page_size": lambda i, x: flashinfer.get_seq_lens(i.kv_indptr, i.last_page_len, x),
    "apply_rope: rotary_dim": lambda i, x: flashinfer.apply_rope(
        i.q, i.k, i.qo_indptr, i.last_page_len, rotary_dim=x
    ),
    "fused_qk_rmsnorm_rope: num_qo_heads": lambda i, x: flashinfer.fused_qk_rmsnorm_rope(
        i.qkv, i.head_weight, i.head_weight, i.positions, x, 1
    ),
    "causal_conv1d_update: pad_slot_id": lambda i, x: causal_conv1d_update(
        i.x, i.x[:, :, None].repeat(1, 1, 3), i.gated[0].repeat(2).view(32, 4), None, "silu", i.pages, pad_slot_id=x
    ),
    "chunk_gated_delta_rule: scale": lambda i, x: chunk_gated_delta_rule(*[i.delta_rows] * 3, scale=x),
    "sparse_mla_prefill: sm_scale": lambda i, x: flashinfer.sparse_mla_prefill(
        i.latent_q, i.latent_rows.flatten(0, 1), i.rows, x
    ),
}  # fmt: skip


@pytest.mark.parametrize("argument", KEPT)
def test_numbers_that_are_tensors(device: torch.device, argument: str) -> None:
    """A prepared launch is found by the numbers in it. A tensor may change, and would be found by what it was."""
    op, name = argument.split(": ")
    for tensor in (torch.tensor(1), torch.tensor(0.5, device=device)):
        with pytest.raises(TypeError, match=rf"^{op}.*: {name} is a tensor; expected an? (number|integer), call .item"):
            KEPT[argument](Inputs(device), tensor)


# -------------------------------------------------------------------------------------------------- helpers of engines


def test_alibi_slopes() -> None:
    for wrong in (0, -1, 1 << 31):
        with pytest.raises(ValueError, match=r"get_alibi_slopes: n_heads is .*; expected at least 1"):
            utils.get_alibi_slopes(wrong)
    for no_number in (1.5, "8", None, torch.ones(2)):
        with pytest.raises(TypeError, match=r"get_alibi_slopes: n_heads is .*; expected an integer"):
            utils.get_alibi_slopes(no_number)  # type: ignore[arg-type]
    assert utils.get_alibi_slopes(1).tolist() == [2.0**-8]
    assert utils.get_alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]


def test_indptr(device: torch.device) -> None:
    assert utils.get_indptr(torch.tensor([3, 5], device=device)).tolist() == [0, 3, 8]
    assert utils.get_indptr(torch.zeros(0, dtype=torch.int32, device=device)).tolist() == [0]
    for wrong in (torch.tensor(3), torch.ones(2, 2).int(), torch.ones(2)):
        with pytest.raises(ValueError, match=r"get_indptr: x is .*; expected lengths"):
            utils.get_indptr(wrong.to(device))
    with pytest.raises(TypeError, match=r"get_indptr: x is .*; expected a tensor"):
        utils.get_indptr([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="get_indptr: x sums to 4294967294; expected at most 2147483647"):
        utils.get_indptr(torch.tensor([(1 << 31) - 1] * 2))
    with pytest.raises(IndexError, match=r"get_indptr: x\[1\] is -1"):
        utils.get_indptr(torch.tensor([3, -1, 3]))


def test_names_of_dtypes_and_devices() -> None:
    assert utils.canonicalize_torch_dtype("half") is torch.float16
    for wrong in (5, None, ["float16"]):
        with pytest.raises(TypeError, match=r"dtype is .*; expected a torch.dtype or its name"):
            utils.canonicalize_torch_dtype(wrong)  # type: ignore[arg-type]
    for unknown in ("", "Tensor", "float17"):
        with pytest.raises(ValueError, match=r"dtype .* is unknown"):
            utils.canonicalize_torch_dtype(unknown)
    for function in (utils.determine_gemm_backend, utils.determine_mla_backend, utils.is_sm90a_supported):
        function("cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device is cpu; expected a CUDA device"):
        utils.get_compute_capability("cpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x is NoneType; expected a tensor"):
        utils.is_float8(None)  # type: ignore[arg-type]
