# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule over sequences, against the recurrence in FP64."""

from __future__ import annotations

import math
from typing import Any, Optional

import pytest
import torch

from flashinfer.errors import UnsupportedConfig
from flashinfer.families.gdn import prefill as families
from flashinfer.gdn_prefill import chunk_gated_delta_rule
from tests.gdn.prefill_kit import BF16, DIM, FP16, FP32, call, check, draw
from tests.tolerances import assert_close

LENGTHS = [(1,), (2,), (63,), (64,), (65,), (128,), (193,), (15, 16, 17), (0, 5, 0, 70, 0), (64, 64, 1, 200)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(device: torch.device, lengths: tuple[int, ...]) -> None:
    """Around the borders of chunks, and none at all."""
    x = draw(device, lengths)
    check(x, *call(x, output_final_state=True), x.expected())


@pytest.mark.parametrize("heads", [(1, 1, 1), (2, 2, 2), (2, 2, 6), (1, 1, 4), (4, 2, 2), (4, 1, 2)], ids=str)
def test_heads(device: torch.device, heads: tuple[int, int, int]) -> None:
    """As many values as keys, more values, more queries."""
    x = draw(device, (70, 9), heads)
    check(x, *call(x, output_final_state=True), x.expected())


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_dtypes(device: torch.device, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    x = draw(device, (100, 31), dtype=dtype, state_dtype=state_dtype)
    output, state = call(x, output_final_state=True)
    assert state.dtype == state_dtype
    expected, states = x.expected()
    assert_close(output, expected)
    assert_close(state.to(BF16), states)


def test_fp32_on_the_cpu() -> None:
    x = draw(torch.device("cpu"), (100, 31), dtype=FP32)
    check(x, *call(x, output_final_state=True), x.expected())


def test_defaults(device: torch.device) -> None:
    """One sequence from zero, without gates: alpha and beta are 1."""
    x = draw(device, (90,), (2, 2, 2))
    ones = x._replace(g=torch.zeros_like(x.g), beta=torch.ones_like(x.beta))
    expected = ones.expected(with_state=False)
    output = chunk_gated_delta_rule(x.q, x.k, x.v)
    check(x, output, None, expected)
    returned = chunk_gated_delta_rule(x.q, x.k, x.v, output_final_state=True)
    check(x, *returned, expected)
    assert returned[1].dtype == FP32


@pytest.mark.parametrize("scale", [None, 0.0, 1.0, -0.3], ids=str)
def test_scale(device: torch.device, scale: Optional[float]) -> None:
    x = draw(device, (40, 80))
    expected = x.expected(scale=scale or DIM**-0.5)
    check(x, *call(x, scale=scale, output_final_state=True), expected)


@pytest.mark.parametrize("size", [0.01, 1.0, 20.0])
def test_l2norm(device: torch.device, size: float) -> None:
    x = draw(device, (130, 3), (1, 2, 4), unit=False)
    x = x._replace(q=x.q * size, k=x.k * size)
    x.q[5], x.k[5] = 0, 0
    expected = x.expected(use_qk_l2norm=True)
    check(x, *call(x, use_qk_l2norm_in_kernel=True, output_final_state=True), expected)


def test_log_gates(device: torch.device) -> None:
    x = draw(device, (130, 3))
    check(x, *call(x, g=x.g, gate_domain="log", output_final_state=True), x.expected())


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 1e-30, 1e-3, 0.5, 0.999, 1.0])
def test_gates_at_their_ends(device: torch.device, alpha: float, beta: float) -> None:
    x = draw(device, (150,), (1, 1, 1))
    g = torch.full_like(x.g, math.log(alpha) if alpha else -math.inf)
    x = x._replace(g=g, beta=torch.full_like(x.beta, beta))
    expected = x.expected()
    check(x, *call(x, output_final_state=True), expected)
    check(x, *call(x, g=g, gate_domain="log", output_final_state=True), expected)


def test_gates_that_change(device: torch.device) -> None:
    """Tokens that forget everything, and such that write nothing, among others."""
    x = draw(device, (200, 70))
    g, beta = x.g.clone(), x.beta.clone()
    g[::7], g[100], beta[::3], beta[1::11] = -60.0, -math.inf, 0.0, 1.0
    x = x._replace(g=g, beta=beta)
    check(x, *call(x, output_final_state=True), x.expected())


def test_the_same_key_again(device: torch.device) -> None:
    """A run of equal tokens, written in full and never forgotten: the triangular system at its worst."""
    x = draw(device, (150,), (1, 1, 2))
    k = x.k.clone()
    k[10:140] = k[10]
    x = x._replace(k=k, g=torch.zeros_like(x.g), beta=torch.ones_like(x.beta))
    output, state = call(x, output_final_state=True)
    expected = x.expected()
    check(x, output, state, expected)


def test_strides(device: torch.device) -> None:
    """q, k and v as views of one projection, gates and output as views, a state with room between slots."""
    x = draw(device, (70, 20), (2, 2, 4))
    packed = torch.cat([x.q, x.k, x.v], dim=1)
    gates = torch.stack([x.g.exp(), x.beta], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)
    output = torch.full((90, 4, 2 * DIM), 7.0, dtype=BF16, device=device)
    states = torch.full((2, 2, 4, DIM, DIM), 7.0, device=device)
    states[0, 1], states[1, 1] = x.state[0], x.state[1]
    returned, final = chunk_gated_delta_rule(
        packed[:, :2], packed[:, 2:4], packed[:, 4:], gates[..., 0], gates[..., 1], None, states[:, 1], True,
        x.cu_seqlens, output=output[..., :DIM], output_state=states[:, 1],
    )  # fmt: skip
    assert returned.data_ptr() == output.data_ptr() and final.data_ptr() == states[:, 1].data_ptr()
    check(x, returned, final, x.expected())
    assert (output[..., DIM:] == 7).all() and (states[:, 0] == 7).all()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_pool(device: torch.device, index_dtype: torch.dtype, in_place: bool) -> None:
    """A padding sequence reads zero and leaves the pool alone."""
    x = draw(device, (70, 0, 33, 12))
    slots = torch.tensor([4, 2, -1, 0], dtype=index_dtype, device=device)
    pool = torch.randn(6, 4, DIM, DIM, generator=torch.Generator().manual_seed(1)).to(device)
    states = torch.where((slots < 0)[:, None, None, None], 0.0, pool[slots.clamp(0).long()])
    expected = x._replace(state=states).expected()
    before = pool.clone()
    out_pool = pool if in_place else torch.full_like(pool, torch.nan)
    output, state = call(
        x, initial_state=pool, state_indices=slots, output_final_state=True, output_state=out_pool,
        cu_seqlens=x.cu_seqlens.to(index_dtype),
    )  # fmt: skip
    assert state is out_pool
    check(x, output, state[[4, 2, 0]], (expected[0], expected[1][[0, 1, 3]]))
    others = [1, 3, 5]
    assert torch.equal(pool[others], before[others]) and (in_place or torch.isnan(out_pool[others]).all())


def test_pool_written_elsewhere(device: torch.device) -> None:
    x = draw(device, (70, 33))
    pool = torch.randn(4, 4, DIM, DIM, generator=torch.Generator().manual_seed(2)).to(device)
    reads, writes = (torch.tensor(slots, dtype=torch.int32, device=device) for slots in ([3, 3], [0, -1]))
    expected = x._replace(state=pool[[3, 3]].clone()).expected()
    before = pool.clone()
    output, _ = call(
        x, initial_state=pool, state_indices=reads, output_state_indices=writes, output_state=pool,
        output_final_state=True,
    )  # fmt: skip
    check(x, output, pool[:1], (expected[0], expected[1][:1]))
    assert torch.equal(pool[1:], before[1:])


def test_nothing_else_is_touched(device: torch.device) -> None:
    """NaN before the first token, between what sequences read, and behind the last one."""
    x = draw(device, (100, 70))
    pad = lambda t: torch.cat([torch.full_like(t[:9], torch.nan), t, torch.full_like(t[:80], torch.nan)])  # noqa: E731
    padded = x._replace(q=pad(x.q), k=pad(x.k), v=pad(x.v), g=pad(x.g), beta=pad(x.beta))
    output = torch.full((259, 4, DIM), 3.0, dtype=BF16, device=device)
    _, state = call(padded, cu_seqlens=x.cu_seqlens + 9, output=output, output_final_state=True)
    check(x, output[9:179], state, x.expected())
    assert (output[:9] == 3).all() and (output[179:] == 3).all()


def test_nan_stays_in_its_sequence(device: torch.device) -> None:
    x = draw(device, (70, 70, 70))
    clean = call(x, output_final_state=True)
    x.v[75] = torch.nan
    output, state = call(x, output_final_state=True)
    for mine, others in ((output.split(70), clean[0].split(70)), (state, clean[1])):
        assert torch.equal(mine[0], others[0]) and torch.equal(mine[2], others[2]) and torch.isnan(mine[1]).any()
    if device.type == "cpu":  # elsewhere NaN reaches all tokens of a chunk, as products with what is zero
        assert torch.equal(output[70:75], clean[0][70:75])


def test_without_tokens(device: torch.device) -> None:
    x = draw(device, (0, 0))
    output, state = call(x, output_final_state=True)
    assert output.shape == (0, 4, DIM) and torch.equal(state, x.state)
    _, zero = call(x, initial_state=None, output_final_state=True)
    assert torch.equal(zero, torch.zeros_like(x.state))
    none = call(draw(device, (5,)), cu_seqlens=x.cu_seqlens[:1], initial_state=None, output_final_state=True)
    assert none[1].shape == (0, 4, DIM, DIM)


def test_a_long_sequence(device: torch.device) -> None:
    """Errors do not grow with the sequence: what a token adds is corrected or forgotten."""
    tokens = 3000 if device.type == "cpu" else 100_000
    x = draw(device, (tokens,), (1, 1, 1), decay=0.02)
    output, state = call(x, output_final_state=True)
    expected, states = x.expected()
    for part in (slice(0, 1000), slice(tokens - 1000, tokens)):
        assert_close(output[part], expected[part])
    assert_close(state.to(BF16), states)


def test_many_sequences(device: torch.device) -> None:
    """More than a GPU holds at a time, in no order of length."""
    lengths = tuple((37 * i) % 150 for i in range(9 if device.type == "cpu" else 60))
    x = draw(device, lengths, (2, 2, 8))
    check(x, *call(x, output_final_state=True), x.expected())


def test_deterministic(device: torch.device) -> None:
    x = draw(device, (300, 20), (2, 2, 4))
    first, again = (call(x, output_final_state=True) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_torch_compile(device: torch.device) -> None:
    x = draw(device, (70, 20))
    slots, alpha = torch.tensor([2, 0], dtype=torch.int32, device=device), x.g.exp()

    def layer(q: torch.Tensor, state: torch.Tensor, pool: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = (x.k, x.v, alpha, x.beta)
        fresh = chunk_gated_delta_rule(q * 1.0, *given, None, state, True, x.cu_seqlens)
        output, _ = chunk_gated_delta_rule(
            q * 1.0, *given, None, pool, True, x.cu_seqlens, output_state=pool, state_indices=slots
        )
        return (*fresh, output)

    pools = [torch.ones(3, 4, DIM, DIM, device=device) for _ in range(2)]
    eager = layer(x.q, x.state, pools[0])
    compiled = torch.compile(layer, fullgraph=True)(x.q, x.state, pools[1])
    for a, b in zip((*eager, pools[0]), (*compiled, pools[1])):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoint_every_n_tokens": 64}, "checkpoint_every_n_tokens is given"),
        ({"state_checkpoints": torch.zeros(1)}, "state_checkpoints is given"),
        ({"prefix_lens": torch.zeros(1)}, "prefix_lens is given"),
        ({"use_gate_in_kernel": True}, "compute alpha and beta before the call"),
        ({"A_log": torch.zeros(1)}, "compute alpha and beta before the call"),
        ({"beta_is_logit": True}, "compute alpha and beta before the call"),
        ({"backend": "cudnn"}, "backend is 'cudnn'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_without_a_kernel(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        call(draw(torch.device("cpu"), (3,)), **options)


def test_other_head_sizes_and_dtypes(device: torch.device) -> None:
    x = draw(device, (3,))
    with pytest.raises(UnsupportedConfig, match="expected head size 128"):
        chunk_gated_delta_rule(x.q[..., :64], x.k[..., :64], x.v[..., :64])
    with pytest.raises(UnsupportedConfig, match=r"initial_state is torch\.float16; expected float32 or bfloat16"):
        call(x, initial_state=x.state.half())
    with pytest.raises(UnsupportedConfig, match=r"q is torch\.float64"):
        chunk_gated_delta_rule(x.q.double(), x.k.double(), x.v.double())


STATE = {"output_final_state": True}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: {"g": x.g.bfloat16()}, "g is torch.bfloat16"),
        (lambda x: {"beta": x.beta[:, :2]}, r"beta is torch.float32 of shape \[5, 2\]"),
        (lambda x: {"gate_domain": "square"}, "gate_domain is 'square'"),
        (lambda x: {"scale": math.nan}, "scale is nan"),
        (lambda x: {"use_cp": "always"}, "use_cp is 'always'"),
        (lambda x: {"_cp_chunk_len": 65}, "_cp_chunk_len is 65"),
        (lambda x: {"_cp_chunk_len": -64}, "_cp_chunk_len is -64"),
        (lambda x: {"max_seqlen": -1}, "max_seqlen is -1; expected at least 0"),
        (lambda x: {"cu_seqlens": x.cu_seqlens.float()}, "cu_seqlens is torch.float32"),
        (lambda x: {"cu_seqlens": x.cu_seqlens[:0]}, "cu_seqlens is empty"),
        (lambda x: {"cu_seqlens": x.cu_seqlens[:0], "initial_state": None, **STATE}, "cu_seqlens is empty"),
        (lambda x: {"cu_seqlens": x.cu_seqlens[0], **STATE}, r"cu_seqlens has shape \[\]"),
        (lambda x: {"initial_state": x.state[:, :2]}, "initial_state has shape"),
        (lambda x: {"initial_state": x.state.transpose(2, 3)}, "the last two dimensions contiguous"),
        (lambda x: {"output": x.q}, "output has shape"),
        (lambda x: {"output": x.v[:, :1].expand(-1, 4, -1)}, "elements of output overlap"),
        (lambda x: {"output_state": x.state.bfloat16(), "output_final_state": True}, "output_state is torch.bfloat16"),
        (lambda x: {"output_state_indices": x.cu_seqlens[:1]}, "without state_indices"),
        (lambda x: {"state_indices": x.cu_seqlens[:1], "output_final_state": True}, "output_state is None"),
        (lambda x: {"state_indices": x.cu_seqlens[:1], "initial_state": None}, "without a pool"),
        (lambda x: {"state_indices": x.cu_seqlens}, "state_indices has shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit(device: torch.device, change: Any, message: str) -> None:
    x = draw(device, (5,))
    with pytest.raises(ValueError, match=message):
        call(x, **change(x))


def test_segments_change_nothing_on_the_cpu() -> None:
    x = draw(torch.device("cpu"), (150,))
    whole, split = (
        call(x, output_final_state=True, **options) for options in ({"use_cp": False}, {"_cp_chunk_len": 64})
    )
    assert torch.equal(whole[0], split[0]) and torch.equal(whole[1], split[1])


def test_what_is_split() -> None:
    """Long sequences of few heads, into whole chunks; none where the GPU is full, or the pieces would be too short."""
    for num_heads in (8, 16):
        for tokens in (8192, 65536):
            segment = families.segment_tokens(tokens, tokens, 1, num_heads, 132)
            assert segment % families.CHUNK == 0 and tokens / 32 <= segment <= tokens / 2
    assert families.segment_tokens(65536 + 15 * 64, 65536, 16, 8, 132)  # the others hardly count
    for num_tokens, num_seqs, num_heads in ((0, 1, 8), (64, 1, 8), (128, 1, 8), (16384, 16, 32), (65536, 64, 8)):
        assert families.segment_tokens(num_tokens, num_tokens // num_seqs, num_seqs, num_heads, 132) == 0


def test_heads_that_do_not_divide(device: torch.device) -> None:
    x = draw(device, (5,), (2, 2, 3))
    with pytest.raises(ValueError, match="heads that divide 3"):
        call(x)
    with pytest.raises(TypeError, match="k is list; expected a tensor"):
        chunk_gated_delta_rule(x.q, [1], x.v)


@pytest.mark.parametrize("wrong", ["x", [0, 5], 1.5])
@pytest.mark.parametrize("name", ["cu_seqlens", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"])
def test_arguments_of_other_kinds(name: str, wrong: Any) -> None:
    x = draw(torch.device("cpu"), (5,))
    with pytest.raises(TypeError, match=rf"^chunk_gated_delta_rule: {name} is .*; expected"):
        call(x, **{**STATE, name: wrong})


def test_values_that_the_host_sees() -> None:
    """On the CPU every call looks."""
    x = draw(torch.device("cpu"), (5, 3))
    for offsets, error in (([0, 5, 9], IndexError), ([0, 5, 3], ValueError), ([-1, 5, 8], ValueError)):
        with pytest.raises(error, match="cu_seqlens"):
            call(x, cu_seqlens=torch.tensor(offsets))
    pool = torch.zeros(3, 4, DIM, DIM)
    options = {"initial_state": pool, "output_state": pool, "output_final_state": True}
    for slots, error, message in (
        ([0, 3], IndexError, "state_indices has 3; expected at most 2"),
        ([1, 1], ValueError, "slot 1 is written by two sequences"),
    ):
        with pytest.raises(error, match=message):
            call(x, state_indices=torch.tensor(slots), **options)
    with pytest.raises(ValueError, match="read by one sequence and written by another"):
        call(x, state_indices=torch.tensor([0, 1]), output_state_indices=torch.tensor([1, 2]), **options)
