# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm against the FP64 oracle, on both targets."""

from __future__ import annotations

import pytest
import torch

import flashinfer
from flashinfer.errors import UnsupportedConfig
from tests.oracles import norm as oracle
from tests.tolerances import assert_close

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-5
# name -> (leading shape, hidden_size)
SHAPES = {
    "ordinary": ((7,), 4096),
    "one row": ((1,), 2048),
    "head_dim of qk norm": ((33, 4), 128),
    "odd": ((5,), 111),
    "one column": ((3,), 1),
    "widest core": ((2,), 16384),
    "not a multiple of a block": ((4,), 3584),
    "empty batch": ((0,), 4096),
    "vector": ((), 1024),
    "four axes": ((2, 3, 5), 64),
}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm(device: torch.device, dtype: torch.dtype, name: str) -> None:
    leading, hidden_size = SHAPES[name]
    x, weight = make((*leading, hidden_size), dtype, device), make((hidden_size,), dtype, device, 1)
    out = torch.full_like(x, float("nan"))
    assert flashinfer.rmsnorm(x, weight, EPS, out=out) is out
    assert_close(out, oracle.rmsnorm(x, weight, EPS))
    assert_close(flashinfer.gemma_rmsnorm(x, weight, EPS), oracle.rmsnorm(x, weight, EPS, gemma=True))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("gemma", [False, True])
def test_fused_add_rmsnorm(device: torch.device, name: str, gemma: bool) -> None:
    leading, hidden_size = SHAPES[name]
    dtype = torch.bfloat16
    x, residual = make((*leading, hidden_size), dtype, device), make((*leading, hidden_size), dtype, device, 2)
    weight = make((hidden_size,), dtype, device, 1)
    total = x.cpu().double() + residual.cpu().double()
    op = flashinfer.gemma_fused_add_rmsnorm if gemma else flashinfer.fused_add_rmsnorm
    assert op(x, residual, weight, EPS) is None
    assert_close(residual, total)
    assert_close(x, oracle.rmsnorm(total, weight, EPS, gemma=gemma))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_rmsnorm(device: torch.device, dtype: torch.dtype, name: str) -> None:
    leading, hidden_size = SHAPES[name]
    x, gate = make((*leading, hidden_size), dtype, device), make((*leading, hidden_size), dtype, device, 2) * 3
    weight = make((hidden_size,), dtype, device, 1)
    expected = oracle.gated_rmsnorm(x, gate, weight, EPS)
    out = torch.full_like(x, float("nan"))
    assert flashinfer.gated_rmsnorm(x, gate, weight, EPS, out=out) is out
    assert_close(out, expected)
    for over in (x.clone(), gate.clone()):  # in place of either operand
        inputs = (over, gate) if torch.equal(over, x) else (x, over)
        assert_close(flashinfer.gated_rmsnorm(*inputs, weight, EPS, out=over), expected)


@pytest.mark.parametrize("out_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_gated_rmsnorm_to_fp8(device: torch.device, out_dtype: torch.dtype) -> None:
    """The heads of GDN, whose gate is a part of a packed projection."""
    x, packed = make((9, 32, 128), torch.bfloat16, device), make((9, 96, 128), torch.bfloat16, device, 2)
    gate, weight = packed[:, 64:], make((128,), torch.bfloat16, device, 1)
    expected = oracle.gated_rmsnorm(x, gate, weight, EPS) / 0.25
    scale = torch.full((1,), 0.25, device=device)
    for given in (scale, 0.25):
        out = torch.empty(9, 32, 128, device=device, dtype=torch.float32).to(out_dtype)
        assert flashinfer.gated_rmsnorm_quant(out, x, gate, weight, given, EPS) is out
        exact = expected.clamp(-torch.finfo(out_dtype).max, torch.finfo(out_dtype).max)
        steps = exact.abs().clamp_min(torch.finfo(out_dtype).tiny) * torch.finfo(out_dtype).eps
        assert ((out.cpu().double() - exact).abs() <= 0.51 * steps).all()


def test_gate_of_extreme_values(device: torch.device) -> None:
    x, weight = make((3, 64), torch.bfloat16, device), make((64,), torch.bfloat16, device, 1)
    gate = torch.tensor([[-200.0], [0.0], [300.0]], device=device).to(torch.bfloat16).expand(3, 64).contiguous()
    out = flashinfer.gated_rmsnorm(x, gate, weight, EPS)
    assert_close(out, oracle.gated_rmsnorm(x, gate, weight, EPS))
    assert not out[1].any()


def test_errors_name_the_gate(device: torch.device) -> None:
    x, weight = make((4, 64), torch.bfloat16, device), make((64,), torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"gate has shape \[3, 64\]; expected \[4, 64\]"):
        flashinfer.gated_rmsnorm(x, x[:3], weight)
    with pytest.raises(ValueError, match=r"gate is torch.float16"):
        flashinfer.gated_rmsnorm(x, x.half(), weight)
    with pytest.raises(TypeError, match=r"gate is NoneType; expected a tensor"):
        flashinfer.gated_rmsnorm(x, None, weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_layernorm(device: torch.device, weight_dtype: torch.dtype, name: str) -> None:
    leading, hidden_size = SHAPES[name]
    x = make((*leading, hidden_size), torch.bfloat16, device) + 3  # a mean that is not zero
    weight, bias = make((hidden_size,), weight_dtype, device, 1), make((hidden_size,), weight_dtype, device, 2)
    assert_close(flashinfer.layernorm(x, weight, bias, EPS), oracle.layernorm(x, weight, bias, EPS))


def test_many_rows(device: torch.device) -> None:
    """More rows than a persistent grid holds, so that blocks walk."""
    x, weight = make((5000, 256), torch.bfloat16, device), make((256,), torch.bfloat16, device, 1)
    assert_close(flashinfer.rmsnorm(x, weight, EPS), oracle.rmsnorm(x, weight, EPS))
    x = make((3001, 1024), torch.bfloat16, device)
    weight = make((1024,), torch.bfloat16, device, 1)
    assert_close(flashinfer.rmsnorm(x, weight, EPS), oracle.rmsnorm(x, weight, EPS))


@pytest.mark.sanitizer
def test_heads_of_a_packed_projection_in_place(device: torch.device) -> None:
    """q cut out of qkv has rows in groups; its neighbours k and v must not change."""
    qkv = make((9, 12, 128), torch.bfloat16, device)
    before, weight = qkv.clone(), make((128,), torch.bfloat16, device, 1)
    q = qkv[:, :8]
    flashinfer.rmsnorm(q, weight, EPS, out=q)
    assert_close(q, oracle.rmsnorm(before[:, :8], weight, EPS))
    assert torch.equal(qkv[:, 8:], before[:, 8:])


@pytest.mark.sanitizer
def test_grouped_input_to_even_output_and_back(device: torch.device) -> None:
    qkv, weight = make((6, 10, 64), torch.float16, device), make((64,), torch.float16, device, 1)
    expected = oracle.rmsnorm(qkv[:, 2:6], weight, EPS)
    assert_close(flashinfer.rmsnorm(qkv[:, 2:6], weight, EPS), expected)
    wide = torch.zeros(6, 10, 64, dtype=torch.float16, device=device)
    flashinfer.rmsnorm(qkv[:, 2:6].contiguous(), weight, EPS, out=wide[:, 1:5])
    assert_close(wide[:, 1:5], expected)
    assert wide[:, 0].eq(0).all() and wide[:, 5:].eq(0).all()


@pytest.mark.sanitizer
def test_strided_and_misaligned_rows(device: torch.device) -> None:
    wide, weight = make((6, 300), torch.bfloat16, device), make((256,), torch.bfloat16, device, 1)
    for offset in (0, 1, 2, 4, 8):  # element offsets: 16-byte aligned only at 0 and 8
        x = wide[:, offset : offset + 256]
        assert_close(flashinfer.rmsnorm(x, weight, EPS), oracle.rmsnorm(x, weight, EPS))


def test_nan_and_infinity_stay_in_their_row(device: torch.device) -> None:
    x, weight = make((4, 512), torch.bfloat16, device), make((512,), torch.bfloat16, device, 1)
    x[1, 7], x[2, 3] = float("nan"), float("inf")
    out = flashinfer.rmsnorm(x, weight, EPS)
    assert out[1].isnan().all() and out[2].isnan().any()
    assert_close(out[[0, 3]], oracle.rmsnorm(x[[0, 3]], weight, EPS))


def test_large_values_do_not_overflow(device: torch.device) -> None:
    x = make((2, 1024), torch.float16, device) * 2000
    weight = torch.ones(1024, dtype=torch.float16, device=device)
    assert_close(flashinfer.rmsnorm(x, weight, EPS), oracle.rmsnorm(x, weight, EPS))


@pytest.mark.gpu
def test_programmatic_dependent_launch() -> None:
    x, weight = make((64, 4096), torch.bfloat16, torch.device("cuda")), torch.ones(4096).to("cuda", torch.bfloat16)
    y = x
    for _ in range(20):  # each launch depends on the one before it
        y = flashinfer.rmsnorm(y, weight, EPS, enable_pdl=True)
    expected = x
    for _ in range(20):
        expected = flashinfer.rmsnorm(expected, weight, EPS)
    assert torch.equal(y, expected)


def test_each_call_returns_a_tensor_of_its_own(device: torch.device) -> None:
    """As torch.empty would have made it: in inference mode too, and when another device is the current one."""
    x, weight = make((3, 64), torch.bfloat16, device, 0), make((64,), torch.bfloat16, device, 1)
    first, second = flashinfer.rmsnorm(x, weight), flashinfer.rmsnorm(x * 2, weight)
    assert first.data_ptr() != second.data_ptr() and first.is_contiguous() and not first.requires_grad
    assert (first.shape, first.dtype, first.device) == (x.shape, x.dtype, x.device)
    assert_close(first, oracle.rmsnorm(x, weight, 1e-6))
    with torch.inference_mode():
        assert flashinfer.rmsnorm(x, weight).is_inference()
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        with torch.cuda.device(1):
            assert flashinfer.rmsnorm(x, weight).device == x.device


@pytest.mark.gpu
def test_cuda_graph() -> None:
    x = make((8, 4096), torch.bfloat16, torch.device("cuda"))
    weight, out = torch.ones(4096).to("cuda", torch.bfloat16), torch.empty_like(x)
    flashinfer.rmsnorm(x, weight, EPS, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flashinfer.rmsnorm(x, weight, EPS, out=out)
    x.copy_(make((8, 4096), torch.bfloat16, torch.device("cuda"), 5))
    out.fill_(float("nan"))
    graph.replay()
    assert_close(out, oracle.rmsnorm(x, weight, EPS))


@pytest.mark.gpu
def test_launch_from_a_fresh_thread() -> None:
    """A thread that has made no CUDA call has no current context."""
    import threading

    x, weight = make((8, 4096), torch.bfloat16, torch.device("cuda")), torch.ones(4096).to("cuda", torch.bfloat16)
    out = torch.empty_like(x)
    flashinfer.rmsnorm(x, weight, EPS, out=out)
    out.fill_(float("nan"))
    thread = threading.Thread(target=flashinfer.rmsnorm, args=(x, weight, EPS, out))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert_close(out, oracle.rmsnorm(x, weight, EPS))


def test_errors_name_the_argument(device: torch.device) -> None:
    x, weight = make((4, 64), torch.bfloat16, device), make((64,), torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"weight has shape \[32\].*expected a contiguous \[64\]"):
        flashinfer.rmsnorm(x, weight[:32].contiguous())
    with pytest.raises(ValueError, match=r"weight is torch.float32; expected torch.bfloat16"):
        flashinfer.rmsnorm(x, weight.float())
    with pytest.raises(ValueError, match=r"out has shape \[4, 32\]; expected \[4, 64\]"):
        flashinfer.rmsnorm(x, weight, out=x[:, :32])
    with pytest.raises(ValueError, match=r"input has stride 4 in its last dimension; expected 1"):
        flashinfer.rmsnorm(make((64, 4), torch.bfloat16, device).t(), weight)
    with pytest.raises(ValueError, match=r"residual has shape \[3, 64\]"):
        flashinfer.fused_add_rmsnorm(x, x[:3].clone(), weight)
    with pytest.raises(UnsupportedConfig, match=r"input is torch.int32; expected float16"):
        flashinfer.rmsnorm(x.int(), weight.int())
    with pytest.raises(UnsupportedConfig, match=r"hidden_size=40000 is not supported; allowed: 1 to 32768"):
        flashinfer.rmsnorm(make((1, 40000), torch.bfloat16, device), make((40000,), torch.bfloat16, device))
    with pytest.raises(ValueError, match=r"no dimensions"):
        flashinfer.rmsnorm(torch.tensor(1.0, device=device), torch.tensor(1.0, device=device))


@pytest.mark.gpu
def test_mixed_devices() -> None:
    x = make((4, 64), torch.bfloat16, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"weight is on cpu, input on cuda:0; move them to one device"):
        flashinfer.rmsnorm(x, torch.ones(64, dtype=torch.bfloat16))
