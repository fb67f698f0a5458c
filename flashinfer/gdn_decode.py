# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule of Qwen3-Next, 3.5 and 3.6 (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464): the next tokens
of each request, one or several.

Each value head has a state S. With α = exp(−exp(A_log) · softplus(a + dt_bias)) and β = sigmoid(b), a token does

    S ← α S + β (v − α S k) kᵀ,        o = scale · S q.

Prefill is `flashinfer.gdn_prefill`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.gdn import decode as families
from flashinfer.families.layout import DTYPES, fast_divisor
from flashinfer.host import checks, indices, memo, traced
from flashinfer.host.rows import require_distinct, require_rows
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.jit import ArgValue, default_resolver
from flashinfer.jit.loader import PreparedLaunch, Value

__all__ = ["gated_delta_rule_decode", "gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp"]


def gated_delta_rule_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    A_log: torch.Tensor,  # noqa: N803
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: Optional[float] = None,
    output: Optional[torch.Tensor] = None,
    use_qk_l2norm: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each request, on states that lie K-major.

    Args:
        q, k: `[batch, 1, num_heads, K]`, fp16, bf16 or fp32. Of q, k, v and the state the last axis is dense; rows
            start at multiples of 16 bytes on a GPU; other strides are free.
        v: `[batch, 1, num_v_heads, V]`; num_v_heads is a multiple of num_heads, and consecutive value heads share a
            head of q and k. K and V are 64 or 128.
        state: `[batch, num_v_heads, K, V]`, fp32, bf16 or fp16; updated in place.
        A_log: `[num_v_heads]`, fp32.
        a, b: `[batch, 1, num_v_heads]`, dtype of q: inputs of the gates.
        dt_bias: `[num_v_heads]`, fp32, bf16 or fp16.
        scale: of q; None: `1 / sqrt(K)`.
        output: `[batch, 1, num_v_heads, V]`, dtype of q. Allocated when None.
        use_qk_l2norm: divide q and k by `sqrt(sum of squares + 1e-6)` first.
        backend: "auto".

    Returns:
        `(output, state)`.

    Raises:
        ValueError: a shape, dtype, device, stride or number does not fit, or elements of what is written share memory.
        TypeError: an argument is of another kind.
        UnsupportedConfig: no kernel for this dtype, device, size or option.
    """
    op = "gated_delta_rule_decode"
    _require_backend(op, backend)
    inputs = _Inputs(q, k, v, A_log, a, dt_bias, b)
    return _decode(op, inputs, _States(state), output, scale, use_qk_l2norm, True), state


def gated_delta_rule_decode_pretranspose(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: Optional[torch.Tensor],
    A_log: torch.Tensor,  # noqa: N803
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: Optional[float] = None,
    output: Optional[torch.Tensor] = None,
    use_qk_l2norm: bool = True,
    initial_state: Optional[torch.Tensor] = None,
    initial_state_indices: Optional[torch.Tensor] = None,
    output_state_indices: Optional[torch.Tensor] = None,
    intermediate_states_buffer: Optional[torch.Tensor] = None,
    disable_state_update: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next T tokens of each request, on states that lie V-major: of a batch, or in a pool.

    Args:
        q, k, v, A_log, a, dt_bias, b, scale, output, use_qk_l2norm, backend: as in `gated_delta_rule_decode`, with T
            tokens in the place of one.
        state: `[batch, num_v_heads, V, K]`, fp32, bf16 or fp16; updated in place. None with a pool.
        initial_state: the pool, `[slots, num_v_heads, V, K]`; updated in place.
        initial_state_indices: `[batch]`, int32 or int64, the slot of each request. A negative one is padding: the
            output is 0, and no state is read or written.
        output_state_indices: `[batch]`, dtype of initial_state_indices, the slot that the state after the last token
            goes to; a negative one: to none. None: where it came from. No two requests may have one slot, and none that
            another one reads.
        intermediate_states_buffer: `[batch or more, T or more, num_v_heads, V, K]`, dtype of the state: takes the state
            of request i after token t at `[i, t]`, for going back to it where a draft is refused.
        disable_state_update: leave the state as it is.

    Returns:
        `(output, state)`, or the pool as the second.

    Raises: as `gated_delta_rule_decode`; IndexError: a slot past the pool (docs/safety.md).
    """
    op = "gated_delta_rule_decode_pretranspose"
    _require_backend(op, backend)
    states = state if initial_state is None else initial_state
    if states is None or (state is not None and initial_state is not None):
        both = "None" if states is None else "both given"
        raise ValueError(f"{op}: state and initial_state are {both}; expected one of them")
    if (initial_state is None) != (initial_state_indices is None):
        raise ValueError(f"{op}: expected initial_state and initial_state_indices together; got one of them")
    if initial_state is None and output_state_indices is not None:
        raise ValueError(f"{op}: output_state_indices are slots of a pool; expected initial_state too")
    update = not checks.boolean(op, "disable_state_update", disable_state_update)
    inputs = _Inputs(q, k, v, A_log, a, dt_bias, b)
    pool = _States(states, initial_state_indices, output_state_indices, intermediate_states_buffer)
    return _decode(op, inputs, pool, output, scale, use_qk_l2norm, update), states


def gated_delta_rule_mtp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    A_log: torch.Tensor,  # noqa: N803
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: Optional[float] = None,
    output: Optional[torch.Tensor] = None,
    intermediate_states_buffer: Optional[torch.Tensor] = None,
    ssm_state_indices: Optional[torch.Tensor] = None,
    disable_state_update: Optional[bool] = None,
    use_qk_l2norm: bool = True,
    output_state_indices: Optional[torch.Tensor] = None,
    cache_replayssm: bool = False,
    replayssm_rawv: Optional[torch.Tensor] = None,
    replayssm_rawk: Optional[torch.Tensor] = None,
    replayssm_g: Optional[torch.Tensor] = None,
    replayssm_beta: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T tokens of each request, on a pool of states that lie V-major: the tokens of a draft, to be verified.

    Args:
        q, k, v, A_log, a, dt_bias, b, scale, output, use_qk_l2norm: as in `gated_delta_rule_decode_pretranspose`.
        initial_state, initial_state_indices, output_state_indices, intermediate_states_buffer: as there.
        ssm_state_indices: `[batch, T]`, int32: the state after each token goes to this slot of the pool, a negative
            one: to none. Takes the place of intermediate_states_buffer and of the update at the end; wants
            disable_state_update=False.
        disable_state_update: leave the state of the pool as it is. None counts as True, as upstream has it up to 0.8.
        cache_replayssm, replayssm_rawv, replayssm_rawk, replayssm_g, replayssm_beta: not supported.

    Returns:
        `(output, initial_state)`.

    Raises: as `gated_delta_rule_decode_pretranspose`.
    """
    op = "gated_delta_rule_mtp"
    replay = (replayssm_rawv, replayssm_rawk, replayssm_g, replayssm_beta)
    if cache_replayssm or any(tensor is not None for tensor in replay):
        raise UnsupportedConfig(
            f"{op}: cache_replayssm is not supported; keep states in intermediate_states_buffer or ssm_state_indices"
        )
    if initial_state_indices is None:
        raise checks.not_tensors(op, initial_state_indices=None)
    if disable_state_update is None:
        disable_state_update = True
    update = not checks.boolean(op, "disable_state_update", disable_state_update)
    if ssm_state_indices is not None:
        if intermediate_states_buffer is not None:
            raise ValueError(f"{op}: ssm_state_indices and intermediate_states_buffer are both given; expected one")
        if not update:
            raise ValueError(f"{op}: ssm_state_indices writes states; expected disable_state_update=False")
        update = False  # the state after the last token has its slot
    inputs = _Inputs(q, k, v, A_log, a, dt_bias, b)
    slots = initial_state_indices, output_state_indices
    pool = _States(initial_state, *slots, intermediate_states_buffer, ssm_state_indices)
    return _decode(op, inputs, pool, output, scale, use_qk_l2norm, update), initial_state


# ----------------------------------------------------------------------------------------------------------- one launch


class _Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    a_log: torch.Tensor
    a: torch.Tensor
    dt_bias: torch.Tensor
    b: torch.Tensor


class _States(NamedTuple):
    states: torch.Tensor
    input_slots: Optional[torch.Tensor] = None
    output_slots: Optional[torch.Tensor] = None
    token_states: Optional[torch.Tensor] = None  # [request, token, …]
    token_slots: Optional[torch.Tensor] = None  # of states, for each token


_INPUT_NAMES = ("q", "k", "v", "A_log", "a", "dt_bias", "b")
_STATE_NAMES = {
    "gated_delta_rule_decode": "state",
    "gated_delta_rule_decode_pretranspose": "state",
    "gated_delta_rule_mtp": "initial_state",
}
_SLOT_NAMES = ("initial_state_indices", "output_state_indices", "intermediate_states_buffer", "ssm_state_indices")


class _Prepared(NamedTuple):
    launch: PreparedLaunch  # takes addresses: _ADDRESSES
    new_output: memo.Allocate
    check: Optional[Callable[[_States], None]]  # of the values of index tensors, where they may be visible


_ADDRESSES = (
    *("q", "k", "v", "a_log", "a", "dt_bias", "b", "states", "input_slots", "output_slots", "token_states"),
    *("token_slots", "output"),
)
_memo: memo.Memo[_Prepared] = memo.Memo()


def _require_backend(op: str, backend: str) -> None:
    if backend not in ("auto", "flashinfer"):
        raise UnsupportedConfig(f"{op}: backend={backend!r:.60} is not supported; expected 'auto'")


def _identify(
    op: str, names: tuple[str, ...], tensors: tuple[Optional[torch.Tensor], ...]
) -> tuple[list[int], list[object]]:
    """Addresses, and what a prepared launch depends on."""
    addresses: list[int] = []
    likes: list[object] = []
    for tensor in tensors:
        if tensor is None:
            addresses.append(0)
            likes.append(None)
        else:
            addresses.append(tensor.data_ptr() or checks.no_address(op, names[len(addresses)], tensor))
            likes.append((tensor.dtype, tensor.shape, tensor.stride(), tensor.device))
    return addresses, likes


def _decode(
    op: str,
    inputs: _Inputs,
    pool: _States,
    output: Optional[torch.Tensor],
    scale: Optional[float],
    use_qk_l2norm: bool,
    update: bool,
) -> torch.Tensor:
    """Returns the output, allocated if it is None."""
    if is_dynamo_compiling():
        if output is None:
            output = torch.empty(inputs.v.shape, dtype=inputs.q.dtype, device=inputs.q.device)
        _door(op, inputs, pool, output, scale, use_qk_l2norm, update)
        return output
    names = (*_INPUT_NAMES, _STATE_NAMES[op], *_SLOT_NAMES, "output")
    try:
        addresses, likes = _identify(op, names, (*inputs, *pool, output))
        misaligned = 0
        for address in addresses:
            misaligned |= address
        key = op, scale, use_qk_l2norm, update, misaligned & 15, *likes
        prepared = _memo.get(key)
    except (AttributeError, RuntimeError, TypeError):
        given = zip(names, (*inputs, *pool, output))
        checks.require_addresses(op, **{name: x for name, x in given if x is not None or name in names[:8]})
        raise
    if prepared is None:
        prepared = _memo.remember(key, _prepare(op, inputs, pool, output, scale, use_qk_l2norm, update))
    if prepared.check is not None:
        prepared.check(pool)
    if output is None:
        output = prepared.new_output()
        addresses[-1] = output.data_ptr()
    prepared.launch(*addresses)
    return output


_door = traced.door(
    "gated_delta_rule",
    _decode,
    {
        "op": "str",
        "inputs": traced.fields(_Inputs, *(f"Tensor {name}" for name in _Inputs._fields)),
        "pool": traced.fields(
            _States,
            *("Tensor(!) states", "Tensor? input_slots", "Tensor? output_slots"),
            *("Tensor(!)? token_states", "Tensor? token_slots"),
        ),
        "output": "Tensor(!)",
        "scale": "float?",
        "use_qk_l2norm": "bool",
        "update": "bool",
    },
)


def _prepare(
    op: str,
    inputs: _Inputs,
    pool: _States,
    output: Optional[torch.Tensor],
    scale: Optional[float],
    use_qk_l2norm: bool,
    update: bool,
) -> _Prepared:
    given = {**dict(zip(_INPUT_NAMES, inputs)), _STATE_NAMES[op]: pool.states}
    optional = {**dict(zip(_SLOT_NAMES, pool[1:])), "output": output}
    given |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    checks.require_tensors(op, **given)
    q, v, states = inputs.q, inputs.v, pool.states
    _check_inputs(op, inputs)
    use_qk_l2norm = checks.boolean(op, "use_qk_l2norm", use_qk_l2norm)
    new_output = memo.allocator(v.shape, q.dtype, q.device)
    output = new_output() if output is None else output
    checks.require_shape(op, "output", output, v, "v")
    checks.require_dtype_device(op, "output", output, q, "q")
    require_rows(op, "output", output)
    require_distinct(op, "output", output)
    _check_states(op, inputs, pool)
    (batch_size, num_tokens, num_heads, key_dim), (num_v_heads, value_dim) = q.shape, v.shape[2:]
    scale = key_dim**-0.5 if scale is None else checks.real(op, "scale", scale)

    is_k_major = op == "gated_delta_rule_decode"
    index = torch.int32 if pool.input_slots is None else pool.input_slots.dtype
    axes: dict[str, ArgValue] = {
        "dtype": dtypes.short_name(q.dtype),
        "state_dtype": dtypes.short_name(states.dtype),
        "bias_dtype": dtypes.short_name(inputs.dt_bias.dtype),
        "index": str(index)[6:],
        "key_dim": key_dim,
        "value_dim": value_dim,
    }
    on = target.of_device(q.device)
    if is_k_major:
        spec = families.GDN_DECODE_K_MAJOR.spec(on, **axes)
    else:
        keeps_tokens = pool.token_states is not None or pool.token_slots is not None
        spec = families.GDN_DECODE.spec(on, **axes, one_token=num_tokens == 1 and not keeps_tokens)
    check = functools.partial(_require_slots, op) if indices.may_be_visible(*pool[1:3], pool.token_slots) else None
    if output.numel() == 0:
        return _Prepared(memo.no_launch, new_output, check)

    device_index = q.get_device()
    launcher = default_resolver().load(spec).on(device_index)
    grid = (1, 1, 1)
    if device_index >= 0:
        if is_k_major:
            values_per_block = families.k_major_values_per_block(spec)
        else:
            constants = launcher.config.constants
            num_threads, rows_per_lane = launcher.config.launch.num_threads, int(constants["kRowsPerLane"])
            values_per_block = families.rows_per_block(spec, num_threads, rows_per_lane)
        grid = (-(-batch_size * num_v_heads * value_dim // values_per_block), 1, 1)
    token_states = pool.token_states
    values: dict[str, Value] = {
        **_token_strides("q_strides", q),
        **_token_strides("k_strides", inputs.k),
        **_token_strides("v_strides", v),
        **_token_strides("output_strides", output),
        **_token_strides("a_strides", inputs.a),
        **_token_strides("b_strides", inputs.b),
        **_state_strides("state_strides", states),
        **_state_strides("token_state_strides", states if token_states is None else token_states[0]),
        "token_state_request_stride": 0 if token_states is None else token_states.stride(0),
        **fast_divisor("num_v_heads", num_v_heads),
        **fast_divisor("v_heads_per_head", num_v_heads // num_heads),
        "batch_size": batch_size,
        "num_tokens": num_tokens,
        "num_slots": states.shape[0],
        "num_token_slots": states.shape[0],
        "update_state": int(update),
        "use_qk_l2norm": int(use_qk_l2norm),
        "scale": scale,
    }
    launch = launcher.prepare(grid, values, varying=_ADDRESSES)
    if pool.token_slots is not None:
        launch = _with_own_states(launch)
    return _Prepared(launch, new_output, check)


def _with_own_states(launch: PreparedLaunch) -> PreparedLaunch:
    """States after each token go to slots of the pool."""
    states, token_states = _ADDRESSES.index("states"), _ADDRESSES.index("token_states")

    def launch_in_pool(*addresses: Value) -> None:
        launch(*addresses[:token_states], addresses[states], *addresses[token_states + 1 :])

    return launch_in_pool


def _token_strides(field: str, tensor: torch.Tensor) -> dict[str, int]:
    return dict(zip((f"{field}.{name}" for name, _ in families.TOKEN_STRIDES), tensor.stride()))


def _state_strides(field: str, tensor: torch.Tensor) -> dict[str, int]:
    return dict(zip((f"{field}.{name}" for name, _ in families.STATE_STRIDES), tensor.stride()))


def _check_inputs(op: str, inputs: _Inputs) -> None:
    q, v = inputs.q, inputs.v
    checks.require_supported(op, "q", q, DTYPES)
    for name, tensor in (("q", q), ("v", v)):
        checks.require(
            tensor.dim() == 4, op, f"{name} has shape {list(tensor.shape)}; expected [batch, tokens, heads, head_dim]"
        )
    batch_size, num_tokens, num_heads, _ = q.shape
    num_v_heads = v.shape[2]
    checks.require_shape(op, "k", inputs.k, q, "q")
    checks.require(
        v.shape[:2] == q.shape[:2] and num_heads > 0 and num_v_heads % num_heads == 0,
        op,
        f"v has shape {list(v.shape)}, q {list(q.shape)}; expected the same batch and tokens, and a multiple of the "
        f"{num_heads} heads of q",
    )
    one_token = op == "gated_delta_rule_decode"
    checks.require(num_tokens == 1 or not one_token, op, f"q has {num_tokens} tokens a request; expected 1")
    for name, tensor in (("a", inputs.a), ("b", inputs.b)):
        expected = (batch_size, num_tokens, num_v_heads)
        checks.require(
            tensor.shape == expected, op, f"{name} has shape {list(tensor.shape)}; expected {list(expected)}"
        )
    for name, tensor in (("A_log", inputs.a_log), ("dt_bias", inputs.dt_bias)):
        checks.require(
            tensor.shape == (num_v_heads,) and tensor.is_contiguous(),
            op,
            f"{name} has shape {list(tensor.shape)}, strides {list(tensor.stride())}; expected a contiguous "
            f"[{num_v_heads}]",
        )
        checks.require_device(op, name, tensor, q, "q")
    checks.require_supported(op, "A_log", inputs.a_log, ("fp32",))
    checks.require_supported(op, "dt_bias", inputs.dt_bias, DTYPES)
    for name in ("k", "v", "a", "b"):
        checks.require_dtype_device(op, name, getattr(inputs, name), q, "q")
    for name in ("q", "k", "v"):
        require_rows(op, name, getattr(inputs, name))


def _check_states(op: str, inputs: _Inputs, pool: _States) -> None:
    q, v, states = inputs.q, inputs.v, pool.states
    (batch_size, num_tokens), key_dim, (num_v_heads, value_dim) = q.shape[:2], q.shape[3], v.shape[2:]
    rows = (key_dim, value_dim) if op == "gated_delta_rule_decode" else (value_dim, key_dim)
    name = "initial_state" if pool.input_slots is not None else _STATE_NAMES[op]
    num_slots = states.shape[0] if pool.input_slots is not None and states.dim() else batch_size
    expected = (num_slots, num_v_heads, *rows)
    checks.require(states.shape == expected, op, f"{name} has shape {list(states.shape)}; expected {list(expected)}")
    checks.require_supported(op, name, states, DTYPES)
    written = {name: states}
    if pool.token_states is not None:
        token_states, token_name = pool.token_states, "intermediate_states_buffer"
        checks.require(
            token_states.dim() == 5
            and token_states.shape[0] >= batch_size
            and token_states.shape[1] >= num_tokens
            and token_states.shape[2:] == states.shape[1:],
            op,
            f"{token_name} has shape {list(token_states.shape)}; expected at least {[batch_size, num_tokens]}, and "
            f"{list(states.shape[1:])} behind it",
        )
        checks.require_dtype_device(op, token_name, token_states, states, name)
        written[token_name] = token_states
    for written_name, tensor in written.items():
        checks.require_device(op, written_name, tensor, q, "q")
        require_rows(op, written_name, tensor)
        require_distinct(op, written_name, tensor)
    if pool.input_slots is not None:
        checks.check_index(op, "initial_state_indices", pool.input_slots, batch_size)
        checks.require_device(op, "initial_state_indices", pool.input_slots, q, "q")
    if pool.output_slots is not None:
        checks.check_index(op, "output_state_indices", pool.output_slots, batch_size)
        if pool.input_slots is not None:
            reference = pool.input_slots, "initial_state_indices"
            checks.require_dtype_device(op, "output_state_indices", pool.output_slots, *reference)
    if pool.token_slots is not None:
        slots = pool.token_slots
        checks.require(
            slots.shape == (batch_size, num_tokens) and slots.is_contiguous() and slots.dtype == torch.int32,
            op,
            f"ssm_state_indices is {slots.dtype} of shape {list(slots.shape)}, strides {list(slots.stride())}; "
            f"expected a contiguous torch.int32 of {[batch_size, num_tokens]}",
        )
        checks.require_device(op, "ssm_state_indices", slots, q, "q")


def _require_slots(op: str, pool: _States) -> None:
    """Check the values: every slot is one of the pool, or negative."""
    num_slots = pool.states.shape[0]
    named = zip(_SLOT_NAMES, (pool.input_slots, pool.output_slots, None, pool.token_slots))
    for name, slots in named:
        if slots is not None and indices.are_visible(slots):
            is_slot = functools.partial(torch.ge, slots, 0)
            indices.require_within(op, name, slots, 0, num_slots, f"one of the pool's {num_slots} slots", is_slot)
