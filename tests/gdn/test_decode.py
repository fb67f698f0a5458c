# SPDX-License-Identifier: Apache-2.0
"""The next tokens through the gated delta rule, beside the recurrence in FP64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import pytest
import torch

from flashinfer.errors import UnsupportedConfig
from flashinfer.gdn_decode import (
    gated_delta_rule_decode,
    gated_delta_rule_decode_pretranspose,
    gated_delta_rule_mtp,
)
from tests.gdn import oracle
from tests.tolerances import assert_close

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")


class Tokens(NamedTuple):
    """Of a batch, as the functions take them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    A_log: torch.Tensor
    a: torch.Tensor
    dt_bias: torch.Tensor
    b: torch.Tensor

    def expect(self, request: int, state: torch.Tensor, **options: Any) -> oracle.Rule:
        q, k, v, a, b = (x[request] for x in (self.q, self.k, self.v, self.a, self.b))
        g, beta = oracle.log_decay(self.A_log, a, self.dt_bias), oracle.write_strength(b)
        return oracle.gated_delta_rule(q, k, v, g, beta, state, keep_states=True, **{"use_qk_l2norm": True, **options})


def draw(
    device: torch.device,
    batch: int,
    tokens: int = 1,
    heads: tuple[int, int] = (2, 4),
    dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = BF16,
    bias_dtype: torch.dtype = FP32,
    packed: bool = False,
) -> Tokens:
    """packed: q, k and v are parts of one row of a projection, as are a and b."""
    random = torch.Generator().manual_seed(batch * 100 + tokens)
    sizes = (heads[0] * dims[0], heads[0] * dims[0], heads[1] * dims[1])
    qkv = torch.randn(batch, tokens, sum(sizes), generator=random).to(device, dtype)
    ba = torch.randn(batch, tokens, 2 * heads[1], generator=random).to(device, dtype)
    q, k, v = (x.unflatten(-1, (-1, dim)) for x, dim in zip(qkv.split(sizes, dim=-1), (dims[0], dims[0], dims[1])))
    b, a = ba.split(heads[1], dim=-1)
    if not packed:
        q, k, v, a, b = (x.contiguous() for x in (q, k, v, a, b))
    a_log = torch.rand(heads[1], generator=random).to(device) * 2 - 1
    dt_bias = torch.randn(heads[1], generator=random).to(device, bias_dtype)
    return Tokens(q, k, v, a_log, a, dt_bias, b)


def draw_states(device: torch.device, slots: int, x: Tokens, dtype: torch.dtype = FP32) -> torch.Tensor:
    """V-major, `[slots, num_v_heads, V, K]`."""
    shape = slots, x.v.shape[2], x.v.shape[3], x.q.shape[3]
    return torch.randn(shape, generator=torch.Generator().manual_seed(slots)).to(device, dtype)


def assert_rule(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # fp32 states: sums of 128 products, after norms; the oracle has neither's rounding.
    assert_close(actual, expected, scale=2.0 if actual.dtype is FP32 else 1.0)


def check(
    x: Tokens,
    before: torch.Tensor,
    after: torch.Tensor,
    output: torch.Tensor,
    sources: Optional[list[int]] = None,
    targets: Optional[list[int]] = None,
    **options: Any,
) -> None:
    """Outputs, and what became of every slot: those no request has are as they were."""
    sources = list(range(len(before))) if sources is None else sources
    targets = sources if targets is None else targets
    untouched = set(range(len(before)))
    for request, (source, goes_to) in enumerate(zip(sources, targets)):
        if source < 0:
            assert torch.equal(output[request], torch.zeros_like(output[request]))
            continue
        rule = x.expect(request, before[source], **options)
        assert_rule(output[request], rule.output)
        if goes_to >= 0:
            assert_rule(after[goes_to], rule.final_state)
            untouched.discard(goes_to)
    for slot in untouched:
        assert torch.equal(before[slot].nan_to_num(), after[slot].nan_to_num())


@pytest.mark.parametrize("layout", ["k-major", "v-major"])
@pytest.mark.parametrize(
    "batch, heads, dims, dtype, state_dtype, bias_dtype, packed",
    [
        (3, (2, 4), (128, 128), BF16, FP32, FP32, False),
        (1, (16, 32), (128, 128), BF16, FP32, FP32, True),
        (2, (2, 2), (128, 128), BF16, BF16, BF16, True),
        (2, (1, 3), (128, 128), FP16, FP32, FP16, False),
        (2, (2, 6), (64, 128), FP32, FP32, FP32, False),
        (2, (2, 2), (128, 64), BF16, FP16, FP32, False),
        (5, (1, 1), (64, 64), BF16, BF16, FP32, False),
        (2, (1, 1), (64, 64), FP32, FP32, FP32, True),
    ],
    ids=str,
)
def test_one_token(
    device: torch.device, layout: str, batch: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype,
    state_dtype: torch.dtype, bias_dtype: torch.dtype, packed: bool,
) -> None:  # fmt: skip
    x = draw(device, batch, 1, heads, dims, dtype, bias_dtype, packed)
    before = draw_states(device, batch, x, state_dtype)
    if layout == "k-major":
        state = before.transpose(-1, -2).contiguous()
        output, same = gated_delta_rule_decode(x.q, x.k, x.v, state, *x[3:])
    else:
        state = before.clone()
        output, same = gated_delta_rule_decode_pretranspose(x.q, x.k, x.v, state, *x[3:])
    assert same is state and output.dtype == dtype and output.shape == x.v.shape
    check(x, before, state.transpose(-1, -2) if layout == "k-major" else state, output)


@pytest.mark.parametrize("layout", ["k-major", "v-major"])
def test_options(device: torch.device, layout: str) -> None:
    """A scale, no norms (of small vectors: the rule diverges for |k| > 1), an output of our own."""
    x = draw(device, 2)
    x = x._replace(q=x.q / 12, k=x.k / 12)
    before = draw_states(device, 2, x)
    output = torch.full((2, 1, 4, 256), NAN, dtype=BF16, device=device)[..., 128:]
    options: dict[str, Any] = {"scale": 0.37, "use_qk_l2norm": False}
    if layout == "k-major":
        state = before.transpose(-1, -2).contiguous()
        gated_delta_rule_decode(x.q, x.k, x.v, state, *x[3:], output=output, **options)
        state = state.transpose(-1, -2)
    else:
        state = before.clone()
        gated_delta_rule_decode_pretranspose(x.q, x.k, x.v, state, *x[3:], output=output, **options)
    check(x, before, state, output, **options)


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("moves", [False, True])
def test_pool(device: torch.device, state_dtype: torch.dtype, index_dtype: torch.dtype, moves: bool) -> None:
    """Slots in any order, padding, slots of NaN that no request has, and states that lie apart, as a page of an engine
    has them beside those of the convolution."""
    x = draw(device, 5, packed=True)
    sources, targets = [7, -1, 0, 3, -9], [6, 1, -1, 3, 2]
    pages = torch.full((9, 4 * 128 * 128 + 64), NAN, device=device).to(state_dtype)
    pool = pages[:, : 4 * 128 * 128].view(9, 4, 128, 128)
    pool[[0, 3, 7]] = draw_states(device, 3, x, state_dtype)
    before = pool.clone()
    tensor = lambda values: torch.tensor(values, dtype=index_dtype, device=device)  # noqa: E731
    output = torch.full_like(x.v, NAN)
    _, same = gated_delta_rule_decode_pretranspose(
        x.q, x.k, x.v, None, *x[3:], output=output, initial_state=pool, initial_state_indices=tensor(sources),
        output_state_indices=tensor(targets) if moves else None,
    )  # fmt: skip
    assert same is pool
    check(x, before, pool, output, sources, targets if moves else None)
    assert pages[:, 4 * 128 * 128 :].isnan().all()


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("update", [False, True])
def test_draft(device: torch.device, state_dtype: torch.dtype, tokens: int, update: bool) -> None:
    """Several tokens, every state kept: a draft can be taken back to any of them."""
    x = draw(device, 3, tokens, packed=True)
    sources = [2, -1, 1]
    pool = draw_states(device, 4, x, state_dtype)
    before = pool.clone()
    kept = torch.full((4, tokens + 1, 4, 128, 128), NAN, device=device).to(state_dtype)
    indices = torch.tensor(sources, dtype=torch.int32, device=device)
    output, _ = gated_delta_rule_mtp(
        x.q, x.k, x.v, pool, indices, *x[3:], intermediate_states_buffer=kept, disable_state_update=not update
    )
    check(x, before, pool, output, sources, None if update else [-1] * 3)
    for request in (0, 2):
        rule = x.expect(request, before[sources[request]])
        for token in range(tokens):
            assert_rule(kept[request, token], rule.states[token + 1])
    assert kept[1].isnan().all() and kept[3].isnan().all() and kept[:, tokens].isnan().all()

    # The first token is accepted, the others are drafted anew: the next call begins at the state after it.
    rest = Tokens(*(y if y.dim() == 1 else y[[0, 2], 1:] for y in x))
    state = kept[[0, 2], 0]
    output, _ = gated_delta_rule_decode_pretranspose(rest.q, rest.k, rest.v, state, *rest[3:])
    for i, request in enumerate((0, 2)):
        rule = x.expect(request, before[sources[request]])
        assert_rule(output[i], rule.output[1:])
        assert_rule(state[i], rule.final_state)


def test_draft_in_slots(device: torch.device) -> None:
    """The state after each token has a slot of the pool."""
    x, sources = draw(device, 2, 3), [4, 0]
    slots = torch.tensor([[1, -1, 5], [3, 2, 6]], dtype=torch.int32, device=device)
    pool = draw_states(device, 8, x)
    before = pool.clone()
    indices = torch.tensor(sources, device=device)
    output, _ = gated_delta_rule_mtp(
        x.q, x.k, x.v, pool, indices, *x[3:], ssm_state_indices=slots, disable_state_update=False
    )
    for request, source in enumerate(sources):
        rule = x.expect(request, before[source])
        assert_rule(output[request], rule.output)
        for token, slot in enumerate(slots[request].tolist()):
            if slot >= 0:
                assert_rule(pool[slot], rule.states[token + 1])
    for slot in (0, 4, 7):
        assert torch.equal(pool[slot], before[slot])


def test_mtp_keeps_the_state_by_default(device: torch.device) -> None:
    x = draw(device, 2, 2)
    pool = draw_states(device, 2, x)
    before = pool.clone()
    gated_delta_rule_mtp(x.q, x.k, x.v, pool, torch.arange(2, device=device), *x[3:])
    assert torch.equal(pool, before)


@pytest.mark.parametrize("layout", ["k-major", "v-major"])
@pytest.mark.parametrize("gate, strength", [(-90.0, -90.0), (-90.0, 60.0), (80.0, 60.0), (80.0, -90.0)])
def test_extreme_gates(device: torch.device, layout: str, gate: float, strength: float) -> None:
    """α and β of 0 and 1, and inputs whose exponentials overflow."""
    x = draw(device, 2)
    x = x._replace(a=torch.full_like(x.a, gate), b=torch.full_like(x.b, strength), A_log=torch.full_like(x.A_log, 2.0))
    before = draw_states(device, 2, x)
    if layout == "k-major":
        state = before.transpose(-1, -2).contiguous()
        output, _ = gated_delta_rule_decode(x.q, x.k, x.v, state, *x[3:])
        state = state.transpose(-1, -2)
    else:
        state = before.clone()
        output, _ = gated_delta_rule_decode_pretranspose(x.q, x.k, x.v, state, *x[3:])
    check(x, before, state, output)


def test_zero_vectors(device: torch.device) -> None:
    """A token of zeros has a norm of 0, and leaves a decayed state."""
    x = draw(device, 2)
    x = x._replace(q=torch.zeros_like(x.q), k=torch.zeros_like(x.k))
    before = draw_states(device, 2, x)
    state = before.clone()
    output, _ = gated_delta_rule_decode_pretranspose(x.q, x.k, x.v, state, *x[3:])
    check(x, before, state, output)
    assert not output.any()


def test_many_steps(device: torch.device) -> None:
    """Five hundred steps one by one are the recurrence over five hundred tokens."""
    x = draw(device, 1, 500, (1, 2))
    state = draw_states(device, 1, x)
    rule = x.expect(0, state[0])
    outputs = []
    for t in range(500):
        one = Tokens(*(y if y.dim() == 1 else y[:, t : t + 1] for y in x))
        outputs.append(gated_delta_rule_decode_pretranspose(one.q, one.k, one.v, state, *one[3:])[0])
    assert_close(torch.cat(outputs, dim=1)[0], rule.output)
    assert_rule(state[0], rule.final_state)


@pytest.mark.parametrize("batch, slots, tokens", [(0, 3, 1), (2, 0, 1), (2, 3, 0)])
def test_nothing_to_do(device: torch.device, batch: int, slots: int, tokens: int) -> None:
    x = draw(device, batch, tokens)
    pool = draw_states(device, slots, x)
    before = pool.clone()
    indices = torch.full((batch,), -1 if slots == 0 else 0, dtype=torch.int32, device=device)
    output, _ = gated_delta_rule_mtp(x.q, x.k, x.v, pool, indices, *x[3:], disable_state_update=False)
    assert output.shape == x.v.shape and not output.any() and torch.equal(pool, before)


@pytest.mark.gpu
def test_slots_outside_of_the_pool_are_padding() -> None:
    device = torch.device("cuda")
    x = draw(device, 3, 2)
    memory = draw_states(device, 6, x)
    pool, before = memory[2:4], memory.clone()
    sources = torch.tensor([2, 1, -3], device=device)
    slots = torch.tensor([[0, 1], [-1, 2], [0, 0]], dtype=torch.int32, device=device)
    output, _ = gated_delta_rule_mtp(
        x.q, x.k, x.v, pool, sources, *x[3:], ssm_state_indices=slots, disable_state_update=False
    )
    assert torch.equal(memory, before) and not output[[0, 2]].any()
    assert_rule(output[1], x.expect(1, before[3]).output)


@pytest.mark.gpu
def test_cuda_graph() -> None:
    device = torch.device("cuda")
    x = draw(device, 4)
    pool, indices = draw_states(device, 6, x), torch.tensor([5, 0, -1, 2], dtype=torch.int32, device=device)
    arguments: dict[str, Any] = {
        "initial_state": pool,
        "initial_state_indices": indices,
        "output": torch.empty_like(x.v),
    }
    before = pool.clone()
    gated_delta_rule_decode_pretranspose(x.q, x.k, x.v, None, *x[3:], **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gated_delta_rule_decode_pretranspose(x.q, x.k, x.v, None, *x[3:], **arguments)
    sources = [1, -1, 4, 3]
    indices.copy_(torch.tensor(sources))
    pool.copy_(before)
    graph.replay()
    check(x, before, pool, arguments["output"], sources)


def test_torch_compile(device: torch.device) -> None:
    x = draw(device, 2, 2)
    pool = draw_states(device, 3, x)
    indices = torch.tensor([2, 0], device=device)

    def layer(x: Tokens, pool: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        output, _ = gated_delta_rule_mtp(x.q, x.k, x.v, pool, indices, *x[3:], disable_state_update=False)
        return output * 2

    eager, compiled = pool.clone(), pool.clone()
    expected = layer(x, eager, indices)
    torch._dynamo.reset()
    actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, compiled, indices)
    assert torch.equal(actual, expected) and torch.equal(compiled, eager)


# ------------------------------------------------------------------------------------------------------------- refusals


def _call(**changes: Any) -> None:
    x = draw(torch.device("cpu"), 2, 2)
    arguments: dict[str, Any] = {
        **x._asdict(),
        "initial_state": torch.zeros(3, 4, 128, 128),
        "initial_state_indices": torch.tensor([0, 2]),
        "disable_state_update": False,
    }
    arguments |= {name: change(arguments.get(name)) if callable(change) else change for name, change in changes.items()}
    gated_delta_rule_mtp(**arguments)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": lambda q: q[..., :96]}, ValueError, "k has shape"),
    ({"k": lambda k: k.half()}, ValueError, "k is torch.float16; expected torch.bfloat16"),
    ({"v": lambda v: v[:, :, :3]}, ValueError, "a multiple of the 2 heads of q"),
    ({"v": None}, TypeError, "v is NoneType; expected a tensor"),
    ({"a": lambda a: a[:, :1]}, ValueError, "a has shape"),
    ({"b": lambda b: b.float()}, ValueError, "b is torch.float32"),
    ({"A_log": lambda a: a.bfloat16()}, UnsupportedConfig, "A_log is torch.bfloat16; expected float32"),
    ({"dt_bias": lambda b: b[:1]}, ValueError, "dt_bias has shape"),
    ({"initial_state": lambda s: s[:, :, :64]}, ValueError, "initial_state has shape"),
    ({"initial_state": lambda s: s.double()}, UnsupportedConfig, "initial_state is torch.float64"),
    ({"initial_state": lambda s: s[:1].expand(3, -1, -1, -1)}, ValueError, "overlap in memory"),
    ({"initial_state": lambda s: s.transpose(-1, -2)}, ValueError, "stride 128 in its last dimension"),
    ({"initial_state_indices": torch.tensor([0, 3])}, IndexError, r"initial_state_indices\[1\] is 3"),
    ({"initial_state_indices": torch.tensor([0])}, ValueError, "initial_state_indices has shape"),
    ({"initial_state_indices": torch.tensor([0.0, 1.0])}, ValueError, "expected torch.int32 or torch.int64"),
    ({"initial_state_indices": None}, TypeError, "initial_state_indices is NoneType"),
    ({"output_state_indices": torch.tensor([7, 0])}, IndexError, r"output_state_indices\[0\] is 7"),
    ({"output_state_indices": torch.tensor([1, 0], dtype=torch.int32)}, ValueError, "dtype of initial_state_indices"),
    ({"ssm_state_indices": torch.full((2, 2), 9, dtype=torch.int32)}, IndexError, r"ssm_state_indices\[0\] is 9"),
    ({"ssm_state_indices": torch.zeros(2, 2)}, ValueError, "ssm_state_indices is torch.float32"),
    (
        {"ssm_state_indices": torch.zeros(2, 2, dtype=torch.int32), "disable_state_update": True},
        ValueError,
        "expected disable_state_update=False",
    ),
    ({"intermediate_states_buffer": torch.zeros(2, 1, 4, 128, 128)}, ValueError, "expected at least"),
    ({"intermediate_states_buffer": torch.zeros(2, 2, 4, 128, 128).half()}, ValueError, "dtype of initial_state"),
    ({"cache_replayssm": True}, UnsupportedConfig, "cache_replayssm is not supported"),
    ({"scale": "much"}, TypeError, "expected a number"),
    ({"use_qk_l2norm": "yes"}, TypeError, "expected True or False"),
    ({"output": torch.zeros(2, 2, 4, 128)}, ValueError, "output is torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", WRONG, ids=[f"{next(iter(c))}-{m}" for c, _, m in WRONG])
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _call(**changes)


@pytest.mark.parametrize(
    "function, changes, error",
    [
        (gated_delta_rule_decode, {"backend": "rubin"}, UnsupportedConfig),
        (gated_delta_rule_decode_pretranspose, {"backend": "rubin"}, UnsupportedConfig),
        (gated_delta_rule_decode_pretranspose, {"state": None}, ValueError),
        (gated_delta_rule_decode_pretranspose, {"initial_state": torch.zeros(2, 4, 128, 128)}, ValueError),
        (gated_delta_rule_decode_pretranspose, {"output_state_indices": torch.tensor([0, 1])}, ValueError),
    ],
)
def test_refusals_of_one_token(function: Callable[..., Any], changes: dict[str, Any], error: type[Exception]) -> None:
    x = draw(torch.device("cpu"), 2)
    with pytest.raises(error):
        function(**{**x._asdict(), "state": torch.zeros(2, 4, 128, 128), **changes})


def test_one_token_alone() -> None:
    x = draw(torch.device("cpu"), 2, 2)
    with pytest.raises(ValueError, match="q has 2 tokens a request; expected 1"):
        gated_delta_rule_decode(x.q, x.k, x.v, torch.zeros(2, 4, 128, 128), *x[3:])
    with pytest.raises(UnsupportedConfig, match="key_dim=32"):
        y = draw(torch.device("cpu"), 2, dims=(32, 64))
        gated_delta_rule_decode(y.q, y.k, y.v, torch.zeros(2, 4, 32, 64), *y[3:])


@pytest.mark.gpu
def test_misaligned_rows() -> None:
    device = torch.device("cuda")
    x = draw(device, 2)
    shifted = torch.zeros(2 * 2 * 128 + 1, dtype=BF16, device=device)[1:].view(2, 1, 2, 128)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        gated_delta_rule_decode(shifted, x.k, x.v, torch.zeros(2, 4, 128, 128, device=device), *x[3:])
