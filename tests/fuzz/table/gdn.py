# SPDX-License-Identifier: Apache-2.0
"""Gated delta networks: the rule over the next tokens, and the convolution before it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import torch

from flashinfer import causal_conv1d, gdn_decode, gdn_prefill
from tests.fuzz.call import Call, Check, Unspecified, lenient, near
from tests.fuzz.draw import FLOATS, INDICES, Draw
from tests.fuzz.table import Case
from tests.gdn import oracle
from tests.oracles.conv import causal_conv1d as convolve


def _slots(d: Draw, count: int, num_slots: int, dtype: torch.dtype) -> torch.Tensor:
    """Of different requests, some of them padding."""
    order = list(range(num_slots))
    d.random.shuffle(order)
    return d.index([d.choice((-1, -5)) if d.chance(0.2) else order[i] for i in range(count)], dtype)


def _distinct(slots: torch.Tensor, num_slots: int) -> list[int]:
    numbers = [int(slot) for slot in slots]
    real = [slot for slot in numbers if slot >= 0]
    assert len(set(real)) == len(real) and all(slot < num_slots for slot in real)
    return numbers


# ------------------------------------------------------------------------------------------------------------- the rule


def _rule_arguments(d: Draw, tokens: int) -> dict[str, Any]:
    batch, heads, per_head, dim = d.size(3), d.choice((1, 2)), d.choice((1, 3)), d.kernel(64, 128)
    dtype, v_heads = d.kernel(*FLOATS), heads * per_head
    return {
        "q": d.normal(batch, tokens, heads, dim, dtype=dtype, groups=0),
        "k": d.normal(batch, tokens, heads, dim, dtype=dtype, groups=0),
        "v": d.normal(batch, tokens, v_heads, dim, dtype=dtype, groups=0),
        "A_log": d.dense(d.values(v_heads)), "a": d.normal(batch, tokens, v_heads, dtype=dtype, groups=0),
        "dt_bias": d.dense(d.values(v_heads, dtype=d.kernel(*FLOATS))),
        "b": d.normal(batch, tokens, v_heads, dtype=dtype, groups=0), "scale": d.choice((None, 0.5)),
        "output": d.blank(batch, tokens, v_heads, dim, dtype=dtype, groups=0) if d.chance(0.5) else None,
        "use_qk_l2norm": True,
    }  # fmt: skip


def _rule(request: int, state: torch.Tensor, given: Mapping[str, Any]) -> oracle.Rule:
    q, k, v, a, b = (given[name][request] for name in ("q", "k", "v", "a", "b"))
    assert given["use_qk_l2norm"] is True and v.shape[1] % q.shape[1] == 0 and q.shape == k.shape
    assert len({given[name].dtype for name in ("q", "k", "v", "a", "b")}) == 1
    gates = oracle.log_decay(given["A_log"], a, given["dt_bias"]), oracle.write_strength(b)
    options: dict[str, Any] = {"scale": given["scale"], "use_qk_l2norm": True, "keep_states": True}
    return oracle.gated_delta_rule(q, k, v, *gates, state, **options)


def _gated_delta_rule_decode(is_k_major: bool, d: Draw) -> Iterator[Call]:
    arguments = _rule_arguments(d, 1 if is_k_major else d.size(3))
    batch, _, v_heads, dim = arguments["v"].shape
    arguments["state"] = d.normal(batch, v_heads, dim, dim, dtype=d.kernel(*FLOATS), groups=0)

    def expect(state: Any, output: Any, **given: Any) -> Mapping[str, Check]:
        tokens = given["q"].shape[1]
        v_major = state.transpose(-1, -2) if is_k_major else state
        rules = [_rule(i, v_major[i], given) for i in range(batch if tokens else 0)]
        after = torch.stack([rule.final_state for rule in rules]) if rules else v_major.double()
        after = after.transpose(-1, -2) if is_k_major else after
        outputs = torch.stack([rule.output for rule in rules]) if rules else given["v"].double()
        checks = {"state": near(after, state.dtype)}
        return checks if output is None else {**checks, "output": near(outputs, output.dtype)}

    name = "gated_delta_rule_decode" if is_k_major else "gated_delta_rule_decode_pretranspose"
    call = Call(name, getattr(gdn_decode, name), arguments, lenient(expect), ("state", "output"))
    yield from d.maybe_hostile(call)


def _gated_delta_rule_mtp(d: Draw) -> Iterator[Call]:
    tokens = d.size(3)
    arguments = _rule_arguments(d, tokens)
    batch, _, v_heads, dim = arguments["v"].shape
    num_slots, index = batch + d.size(2), d.kernel(*INDICES)
    arguments["initial_state"] = d.normal(num_slots, v_heads, dim, dim, dtype=d.kernel(*FLOATS), groups=0)
    arguments["initial_state_indices"] = _slots(d, batch, num_slots, index)
    arguments["disable_state_update"] = d.choice((True, False))
    kept = None
    if d.chance(0.4):
        kept = d.blank(batch, tokens, v_heads, dim, dim, dtype=arguments["initial_state"].dtype, groups=0)
    arguments["intermediate_states_buffer"] = kept

    def expect(
        initial_state: Any, initial_state_indices: Any, disable_state_update: Any, intermediate_states_buffer: Any,
        output: Any, **given: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        assert disable_state_update in (True, False, None)
        slots = _distinct(initial_state_indices, len(initial_state))
        after, outputs = initial_state.double().clone(), torch.zeros(given["v"].shape, dtype=torch.float64)
        for request, slot in enumerate(slots):
            if slot >= 0 and given["q"].shape[1]:
                rule = _rule(request, initial_state[slot], given)
                outputs[request] = rule.output
                if disable_state_update is False:
                    after[slot] = rule.final_state
        checks = {"initial_state": near(after, initial_state.dtype)}
        return checks if output is None else {**checks, "output": near(outputs, output.dtype)}

    written = ("initial_state", "output", "intermediate_states_buffer")
    function = gdn_decode.gated_delta_rule_mtp
    yield from d.maybe_hostile(Call("gated_delta_rule_mtp", function, arguments, lenient(expect), written))


def _chunk_gated_delta_rule(d: Draw) -> Iterator[Call]:
    dim, dtype, state_dtype = 128, d.kernel(*FLOATS), d.kernel(torch.float32, torch.bfloat16)
    lengths, index = d.lengths(d.size(3), 40), d.kernel(*INDICES)
    tokens, heads, num_seqs = sum(lengths), d.choice(((1, 1, 1), (1, 2, 4), (4, 1, 2))), len(lengths)
    num_heads, is_log = max(heads), d.kernel(False, True)
    rows = {name: d.normal(tokens, n, dim, dtype=dtype, groups=0, scale=0.1) for name, n in zip("qkv", heads)}
    alpha = torch.rand(tokens, num_heads, generator=d.torch)
    num_slots = num_seqs + d.size(2) if d.chance(0.5) else num_seqs
    states = d.normal(num_slots, num_heads, dim * dim, dtype=state_dtype, groups=0).unflatten(-1, (dim, dim))
    is_pool, keeps = num_slots > num_seqs, d.choice((True, False))
    arguments: dict[str, Any] = {
        **rows, "g": d.choice((None, d.dense(alpha.log() if is_log else alpha))),
        "beta": d.choice((None, d.dense(torch.rand(tokens, num_heads, generator=d.torch)))),
        "scale": d.choice((None, 0.5)), "initial_state": states, "output_final_state": keeps,
        "cu_seqlens": d.index([sum(lengths[:i]) for i in range(num_seqs + 1)], index),
        "use_qk_l2norm_in_kernel": d.kernel(True, False),
        "output": d.blank(tokens, num_heads, dim, dtype=dtype, groups=0) if d.chance(0.5) else None,
        "output_state": states if is_pool and keeps else None,
        "state_indices": _slots(d, num_seqs, num_slots, index) if is_pool else None,
        "gate_domain": "log" if is_log else "linear",
    }  # fmt: skip

    def expect(
        q: Any, k: Any, v: Any, g: Any, beta: Any, scale: Any, initial_state: Any, cu_seqlens: Any, output: Any,
        output_state: Any, state_indices: Any, gate_domain: Any, output_final_state: Any, use_qk_l2norm_in_kernel: Any,
    ) -> Mapping[str, Check]:  # fmt: skip
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == len(q)  # or rows of the output are anything
        ones = torch.ones(len(q), max(x.shape[1] for x in (q, k, v)), dtype=torch.float64)
        log_alpha = torch.zeros_like(ones) if g is None else g.double() if gate_domain == "log" else g.double().log()
        count = len(cu_seqlens) - 1
        slots = list(range(count)) if state_indices is None else _distinct(state_indices, len(initial_state))
        reads = torch.stack([initial_state[slot].double() * (slot >= 0) for slot in slots]) if count else initial_state
        rule = oracle.packed_sequences(
            q, k, v, log_alpha, ones if beta is None else beta, cu_seqlens.tolist(), reads,
            scale=scale or dim**-0.5, use_qk_l2norm=use_qk_l2norm_in_kernel,
        )  # fmt: skip
        checks: dict[str, Check] = {} if output is None else {"output": near(rule[0], output.dtype)}
        if output_state is not None:
            after = output_state.double().clone()
            for i, slot in enumerate(slots):
                if slot >= 0:
                    after[slot] = rule[1][i]
            checks["output_state"] = near(after, output_state.dtype)
        return checks

    function = gdn_prefill.chunk_gated_delta_rule
    written = ("output", "output_state", "initial_state")
    call = Call("chunk_gated_delta_rule", function, arguments, lenient(expect), written)
    call.in_place = (("output_state", "initial_state"), ("initial_state", "output_state"))
    yield from d.maybe_hostile(call)


# ------------------------------------------------------------------------------------------------------ the convolution


def _states(d: Draw, num_slots: int, dim: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    if d.chance(0.5):
        return d.normal(num_slots, length, dim, dtype=dtype, groups=0).transpose(1, 2)
    return d.normal(num_slots, dim, length, dtype=dtype, groups=0)


def _conv_arguments(d: Draw, tokens: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    width = d.kernel(4, 2, 3)
    return {
        "x": d.normal(tokens, dim, dtype=dtype), "weight": d.dense(d.values(dim, width, dtype=dtype)),
        "bias": d.dense(d.values(dim, dtype=dtype)) if d.chance(0.5) else None,
        "activation": d.kernel("silu", None),
    }  # fmt: skip


def _conv(
    rows: slice, state: Optional[torch.Tensor], x: torch.Tensor, given: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    assert given["activation"] in ("silu", "swish", True, None, False) and x.dtype == given["weight"].dtype
    if any(bool(tensor.isinf().any()) for tensor in (x, given["weight"], given["bias"], state) if tensor is not None):
        raise Unspecified  # the limit of silu, or what the formula gives: NaN
    return convolve(x[rows], given["weight"], given["bias"], state, bool(given["activation"]))


def _causal_conv1d_fn(d: Draw) -> Iterator[Call]:
    lengths, dim, dtype = d.lengths(d.size(4), 9), d.kernel(64, 33, 8), d.kernel(*FLOATS)
    arguments = _conv_arguments(d, sum(lengths), dim, dtype)
    arguments["x"] = arguments["x"].T
    history, num_slots, index = arguments["weight"].shape[1] - 1, len(lengths) + d.size(2), d.kernel(*INDICES)
    arguments["conv_states"] = _states(d, num_slots, dim, history + d.choice((0, 1)), dtype)
    arguments["query_start_loc"] = d.index([sum(lengths[:i]) for i in range(len(lengths) + 1)], index)
    arguments["cache_indices"] = _slots(d, len(lengths), num_slots, index)
    begun = torch.tensor([d.chance(0.5) for _ in lengths], dtype=torch.bool)
    arguments["has_initial_state"] = d.dense(begun) if d.chance(0.8) else None

    def expect(
        x: Any, conv_states: Any, query_start_loc: Any, cache_indices: Any, has_initial_state: Any, **given: Any
    ) -> Mapping[str, Check]:
        offsets, slots = query_start_loc.tolist(), _distinct(cache_indices, len(conv_states))
        assert len(slots) == len(offsets) - 1 and x.shape[1] == offsets[-1] and offsets[0] == 0
        output, after = torch.zeros(x.T.shape, dtype=torch.float64), conv_states.double().clone()
        for i, slot in enumerate(slots):
            begin, end = offsets[i : i + 2]
            assert begin <= end
            if slot >= 0 and begin < end:
                taps = given["weight"].shape[1] - 1
                goes_on = has_initial_state is not None and bool(has_initial_state[i])
                before = conv_states[slot, :, :taps].T if goes_on else None
                output[begin:end], inputs = _conv(slice(begin, end), before, x.T, given)
                after[slot, :, :taps] = inputs[-taps:].T
        return {"return": near(output.T, x.dtype), "conv_states": near(after, conv_states.dtype)}

    function = causal_conv1d.causal_conv1d_fn
    yield from d.maybe_hostile(Call("causal_conv1d_fn", function, arguments, lenient(expect), ("conv_states",)))


def _causal_conv1d_update(d: Draw) -> Iterator[Call]:
    batch, dim, dtype = d.size(4), d.kernel(64, 33, 8), d.kernel(*FLOATS)
    arguments = _conv_arguments(d, batch, dim, dtype)
    history, num_slots = arguments["weight"].shape[1] - 1, batch + d.size(2)
    arguments["conv_state"] = _states(d, num_slots, dim, history, dtype)
    arguments["conv_state_indices"] = _slots(d, batch, num_slots, d.kernel(*INDICES))

    def expect(x: Any, conv_state: Any, conv_state_indices: Any, **given: Any) -> Mapping[str, Check]:
        slots = _distinct(conv_state_indices, len(conv_state))
        assert len(slots) == len(x) and conv_state.shape[2] == given["weight"].shape[1] - 1 and x.dim() == 2
        output, after = torch.zeros(x.shape, dtype=torch.float64), conv_state.double().clone()
        for i, slot in enumerate(slots):
            if slot >= 0:
                output[i : i + 1], inputs = _conv(slice(i, i + 1), conv_state[slot].T, x, given)
                after[slot] = inputs[1:].T
        return {"return": near(output, x.dtype), "conv_state": near(after, conv_state.dtype)}

    function = causal_conv1d.causal_conv1d_update
    yield from d.maybe_hostile(Call("causal_conv1d_update", function, arguments, lenient(expect), ("conv_state",)))


CASES: dict[str, Case] = {
    "gated_delta_rule_decode": functools.partial(_gated_delta_rule_decode, True),
    "gated_delta_rule_decode_pretranspose": functools.partial(_gated_delta_rule_decode, False),
    "gated_delta_rule_mtp": _gated_delta_rule_mtp,
    "chunk_gated_delta_rule": _chunk_gated_delta_rule,
    "causal_conv1d_fn": _causal_conv1d_fn,
    "causal_conv1d_update": _causal_conv1d_update,
}
