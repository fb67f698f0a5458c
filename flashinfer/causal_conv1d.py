# SPDX-License-Identifier: Apache-2.0
"""Causal convolutions of the channels of a projection, as state-space models and gated delta networks have them before
their recurrence (Gu & Dao 2023, arXiv:2312.00752): over whole sequences, and over the next tokens of each request.

Names and arguments are those of the `causal_conv1d` package, as vLLM and SGLang call it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Optional, Union

import torch

from flashinfer import dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import conv as families
from flashinfer.families.layout import DTYPES
from flashinfer.host import checks, indices, memo, traced
from flashinfer.host.rows import require_distinct
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch, Value

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]

Activation = Union[str, bool, None]


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    conv_states: Optional[torch.Tensor],
    query_start_loc: torch.Tensor,
    cache_indices: Optional[torch.Tensor] = None,
    has_initial_state: Optional[torch.Tensor] = None,
    activation: Activation = "silu",
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """Sequences one behind the other: `out[c, t] = silu(bias[c] + sum_j weight[c, j] * x[c, t - width + 1 + j])`.

    Before the first token of a sequence are the inputs in its state, or zeros. Its last width - 1 inputs become its
    state; one of no tokens leaves it as it is.

    Args:
        x: `[dim, tokens]`, fp16, bf16 or fp32, channels dense: a transposed `[tokens, dim]`.
        weight: `[dim, width]`, contiguous, dtype of x; width 2 to 4.
        bias: `[dim]`, dtype of x, or None.
        conv_states: `[slots, dim, width - 1 or more]`, dtype of x, any strides, fastest with dense channels: the inputs
            that each sequence saw last, oldest first; updated in place. None: there are none.
        query_start_loc: `[sequences + 1]`, int32 or int64: where sequences begin, and the end of the last.
        cache_indices: `[sequences]`, dtype of query_start_loc: the slot of each sequence. A negative one, or
            pad_slot_id, is padding: an output of 0 and no state. None: sequence i has slot i.
        has_initial_state: `[sequences]`, bool: whether a sequence continues its state. None: none does.
        activation: "silu", "swish" or True; None or False: none.
        pad_slot_id: a slot that stands for padding.

    Returns:
        `[dim, tokens]`, channels dense. Tokens of no sequence are 0.

    Raises:
        ValueError: a shape, dtype, device, stride or number does not fit, or elements of conv_states share memory.
        TypeError: an argument is of another kind.
        IndexError: a slot past the states, or sequences past the tokens (docs/safety.md).
        UnsupportedConfig: no kernel for this dtype, device or width.
    """
    op = "causal_conv1d_fn"
    if not isinstance(x, torch.Tensor):
        raise checks.not_tensors(op, x=x)
    operands = _Operands(x.transpose(-2, -1) if x.dim() == 2 else x, weight, bias, conv_states)
    settings = _Settings(_is_silu(op, activation), pad_slot_id)
    index = _Index(query_start_loc, cache_indices, has_initial_state, None)
    return _convolve(op, operands, index, settings).transpose(-2, -1)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor] = None,
    activation: Activation = None,
    conv_state_indices: Optional[torch.Tensor] = None,
    num_accepted_tokens: Optional[torch.Tensor] = None,
    query_start_loc: Optional[torch.Tensor] = None,
    max_query_len: int = -1,
    pad_slot_id: int = -1,
) -> torch.Tensor:
    """The next tokens of each request, whose state is moved on.

    Args:
        x: `[batch, dim]`; or `[batch, dim, tokens]`, channels dense; or with query_start_loc `[all tokens, dim]`.
        conv_state: `[slots, dim, width - 1 or more]`, as in `causal_conv1d_fn`.
        weight, bias, activation, pad_slot_id: as in `causal_conv1d_fn`.
        conv_state_indices: `[batch]`, int32 or int64: as cache_indices there.
        num_accepted_tokens: `[batch]`, dtype of conv_state_indices, for drafts: how many of the tokens of the call
            before stay, at least 1. The state then has room for `width - 2 + tokens` inputs, keeps all of a draft, and
            its history begins at `num_accepted_tokens - 1`.
        query_start_loc: `[batch + 1]`, dtype of conv_state_indices: where the tokens of each request begin.
        max_query_len: accepted, and not needed.

    Returns:
        Shape of x.

    Raises: as `causal_conv1d_fn`.
    """
    op = "causal_conv1d_update"
    if not isinstance(x, torch.Tensor):
        raise checks.not_tensors(op, x=x)
    settings = _Settings(_is_silu(op, activation), pad_slot_id)
    index = _Index(query_start_loc, conv_state_indices, None, num_accepted_tokens)
    rows = x.transpose(-2, -1) if x.dim() == 3 else x
    output = _convolve(op, _Operands(rows, weight, bias, conv_state), index, settings)
    return output.transpose(-2, -1) if x.dim() == 3 else output


# ----------------------------------------------------------------------------------------------------------- one launch


class _Operands(NamedTuple):
    x: torch.Tensor  # channels last
    weight: torch.Tensor
    bias: Optional[torch.Tensor]
    states: Optional[torch.Tensor]


class _Index(NamedTuple):
    offsets: Optional[torch.Tensor]
    slots: Optional[torch.Tensor]
    has_initial_state: Optional[torch.Tensor]  # of causal_conv1d_fn alone
    num_accepted: Optional[torch.Tensor]  # of causal_conv1d_update alone


class _Settings(NamedTuple):
    silu: bool
    pad_slot: int


class _Prepared(NamedTuple):
    launch: PreparedLaunch  # takes the addresses of operands and indices, and of the output
    new_output: memo.Allocate
    check: Optional[Callable[[_Index], None]]  # of the values of index tensors, where they may be visible


_NAMES = {
    "causal_conv1d_fn": (
        *("x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices", "has_initial_state"),
        "num_accepted_tokens",
    ),
    "causal_conv1d_update": (
        *("x", "weight", "bias", "conv_state", "query_start_loc", "conv_state_indices", "has_initial_state"),
        "num_accepted_tokens",
    ),
}
_memo: memo.Memo[_Prepared] = memo.Memo()


def _is_silu(op: str, activation: Activation) -> bool:
    if activation is None or isinstance(activation, bool):
        return bool(activation)
    if activation not in ("silu", "swish"):
        raise UnsupportedConfig(f"{op}: activation={activation!r:.60} is not supported; expected 'silu' or None")
    return True


def _convolve(op: str, operands: _Operands, index: _Index, settings: _Settings) -> torch.Tensor:
    if is_dynamo_compiling():
        output = torch.empty(operands.x.shape, dtype=operands.x.dtype, device=operands.x.device)
        _door(op, operands, index, settings, output)
        return output
    return _run(op, operands, index, settings, None)


def _run(
    op: str, operands: _Operands, index: _Index, settings: _Settings, output: Optional[torch.Tensor]
) -> torch.Tensor:
    """Returns the output, allocated if it is None; one that is given comes from a traced call."""
    names, given = _NAMES[op], (*operands, *index)
    addresses: list[int] = []
    likes: list[object] = []
    misaligned = 0
    try:
        for tensor in given:
            if tensor is None:
                addresses.append(0)
                likes.append(None)
            else:
                addresses.append(tensor.data_ptr() or checks.no_address(op, names[len(addresses)], tensor))
                likes.append((tensor.dtype, tensor.shape, tensor.stride(), tensor.device))
        for address in addresses[:4]:  # of those that are read in vectors
            misaligned |= address
        key = op, settings, misaligned & 15, *likes
        prepared = _memo.get(key)
    except (AttributeError, RuntimeError, TypeError):
        required = ("x", "weight", "conv_state", *(["query_start_loc"] if op == "causal_conv1d_fn" else []))
        named = {name: tensor for name, tensor in zip(names, given) if tensor is not None or name in required}
        checks.require_addresses(op, **named)
        raise
    if prepared is None:
        prepared = _memo.remember(key, _prepare(op, operands, index, settings))
    if prepared.check is not None:
        prepared.check(index)
    if output is None:
        output = prepared.new_output()
    elif prepared.launch is memo.no_launch:
        output.zero_()
    if op == "causal_conv1d_fn":
        prepared.launch(*addresses[:7], output.data_ptr())
    else:
        prepared.launch(*addresses[:6], addresses[7], output.data_ptr())
    return output


_door = traced.door(
    "causal_conv1d",
    _run,
    {
        "op": "str",
        "operands": traced.fields(_Operands, "Tensor x", "Tensor weight", "Tensor? bias", "Tensor(!)? states"),
        "index": traced.fields(
            _Index, "Tensor? offsets", "Tensor? slots", "Tensor? has_initial_state", "Tensor? num_accepted"
        ),
        "settings": traced.fields(_Settings, "bool silu", "int pad_slot"),
        "output": "Tensor(!)",
    },
)


def _prepare(op: str, operands: _Operands, index: _Index, settings: _Settings) -> _Prepared:
    is_update = op == "causal_conv1d_update"
    names = _NAMES[op]
    named = {name: tensor for name, tensor in zip(names, (*operands, *index)) if tensor is not None}
    for name in ("weight", "conv_state") if is_update else ("weight", "query_start_loc"):
        if name not in named:
            raise checks.not_tensors(op, **{name: None})
    checks.require_tensors(op, **named)
    pad_slot = checks.integer(op, "pad_slot_id", settings.pad_slot)
    _check_operands(op, names, operands)
    num_requests = _check_index(op, names, operands, index)
    x, weight, _, states = operands
    new_output = memo.allocator(x.shape, x.dtype, x.device)
    check = None
    if indices.may_be_visible(*index[:2], index.num_accepted):
        num_slots, room = (None, 0) if states is None else (states.shape[0], states.shape[2] - weight.shape[1] + 2)
        limits = num_slots, x.shape[:-1].numel(), pad_slot, room
        check = functools.partial(_require_values, op, names, limits)
    if x.numel() == 0 or num_requests == 0:
        # Of tokens of no sequence, the output is zeros.
        return _Prepared(memo.no_launch, functools.partial(torch.zeros, x.shape, dtype=x.dtype, device=x.device), check)

    device_index, num_channels = x.get_device(), x.shape[-1]
    channels_last = states is None or states.stride(1) == 1
    alignment = 0
    if device_index >= 0:
        strides = x.stride()[:-1]
        if states is not None and channels_last:
            strides += states.stride(0), states.stride(2)
            alignment |= states.data_ptr()
        for stride in strides:
            alignment |= stride * x.element_size()
        for tensor in (x, weight, operands.bias):
            alignment |= 0 if tensor is None else tensor.data_ptr()
    dtype = dtypes.short_name(x.dtype)
    some_index = index.offsets if index.offsets is not None else index.slots
    if some_index is None:
        some_index = index.num_accepted
    family = families.CAUSAL_CONV1D_UPDATE if is_update else families.CAUSAL_CONV1D
    spec = family.spec(
        target.of_device(x.device),
        dtype=dtype,
        index="int32" if some_index is None else str(some_index.dtype)[6:],
        width=weight.shape[1],
        vec_size=families.vec_size(dtype, num_channels, alignment & 15) if device_index >= 0 else 1,
        silu=settings.silu,
        channels_last=channels_last,
    )
    launcher = default_resolver().load(spec).on(device_index)
    layout = (0, 0, 0, 1 << 30, 0) if states is None else (*states.stride(), states.shape[0], states.shape[2])
    values: dict[str, Value] = dict(zip((f"layout.{name}" for name, _ in families.CONV_STATES), (*layout, pad_slot, 0)))
    values["num_channels"] = num_channels
    columns = launcher.config.launch.num_threads * spec.arg("vec_size")
    blocks_per_row = -(-num_channels // columns)
    if is_update:
        grid = (blocks_per_row * num_requests, 1, 1)
        requests_apart = x.dim() == 3 or index.offsets is None
        values |= {
            "x_request_stride": x.stride(0) if requests_apart else 0,
            "x_stride": x.stride(-2),
            "output_request_stride": x.shape[-2] * num_channels if x.dim() == 3 else num_channels * requests_apart,
            "output_stride": num_channels,
            "batch_size": num_requests,
            "num_tokens": x.shape[1] if x.dim() == 3 else 1 if requests_apart else x.shape[0],
        }
        varying = ("x", "weight", "bias", "states", "offsets", "slots", "num_accepted", "output")
    else:
        grid = (blocks_per_row * -(-x.shape[0] // int(launcher.config.constants["kTokens"])), 1, 1)
        values |= {
            "x_stride": x.stride(0),
            "output_stride": num_channels,
            "num_tokens": x.shape[0],
            "num_sequences": num_requests,
        }
        varying = ("x", "weight", "bias", "states", "offsets", "slots", "has_initial_state", "output")
    if device_index < 0:
        grid = (1, 1, 1)
    return _Prepared(launcher.prepare(grid, values, varying=varying), new_output, check)


def _check_operands(op: str, names: tuple[str, ...], operands: _Operands) -> None:
    x, weight, bias, states = operands
    is_update = op == "causal_conv1d_update"
    expected = "[batch, dim] or [batch, dim, tokens]" if is_update else "[dim, tokens]"
    shape = [*x.shape[:-2], *x.shape[-2:][::-1]] if x.dim() == 3 or not is_update else [*x.shape]
    checks.require(x.dim() in ((2, 3) if is_update else (2,)), op, f"x has shape {shape}; expected {expected}")
    checks.require_supported(op, "x", x, DTYPES)
    checks.require(
        x.numel() <= 1 or x.shape[-1] <= 1 or x.stride(-1) == 1,
        op,
        f"x of shape {shape} has stride {x.stride(-1)} between channels; expected 1, a transposed [tokens, dim]",
    )
    num_channels = x.shape[-1]
    checks.require(
        weight.dim() == 2 and weight.shape[0] == num_channels and weight.is_contiguous(),
        op,
        f"weight has shape {list(weight.shape)}, strides {list(weight.stride())}; expected a contiguous "
        f"[{num_channels}, width]",
    )
    checks.require_dtype_device(op, "weight", weight, x, "x")
    if bias is not None:
        checks.require(
            bias.shape == (num_channels,) and bias.is_contiguous(),
            op,
            f"bias has shape {list(bias.shape)}, strides {list(bias.stride())}; expected a contiguous [{num_channels}]",
        )
        checks.require_dtype_device(op, "bias", bias, x, "x")
    if states is not None:
        name = names[3]
        history = weight.shape[1] - 1
        checks.require(
            states.dim() == 3 and states.shape[1] == num_channels and states.shape[2] >= history,
            op,
            f"{name} has shape {list(states.shape)}; expected [slots, {num_channels}, {history} or more]",
        )
        checks.require_dtype_device(op, name, states, x, "x")
        require_distinct(op, name, states)


def _check_index(op: str, names: tuple[str, ...], operands: _Operands, index: _Index) -> int:
    """Check all but the values; the number of sequences or requests."""
    x, states = operands.x, operands.states
    offsets_name, slots_name, initial_name, accepted_name = names[4:]
    if index.offsets is None:
        num_requests = x.shape[0]
    else:
        checks.check_index(op, offsets_name, index.offsets)
        checks.require(index.offsets.shape[0] >= 1, op, f"{offsets_name} is empty; expected [sequences + 1]")
        checks.require(x.dim() == 2, op, f"x has 3 dimensions beside {offsets_name}; expected [all tokens, dim]")
        num_requests = index.offsets.shape[0] - 1
    given = {offsets_name: index.offsets, slots_name: index.slots, accepted_name: index.num_accepted}
    present = [(name, tensor) for name, tensor in given.items() if tensor is not None]
    for name, tensor in present:
        if name != offsets_name:
            checks.check_index(op, name, tensor, num_requests)
        checks.require_dtype_device(op, name, tensor, present[0][1], present[0][0])
        checks.require_device(op, name, tensor, x, "x")
    if index.has_initial_state is not None:
        initial = index.has_initial_state
        checks.require(
            initial.shape == (num_requests,) and initial.dtype == torch.bool and initial.is_contiguous(),
            op,
            f"{initial_name} is {initial.dtype} of shape {list(initial.shape)}; expected a dense torch.bool of "
            f"[{num_requests}]",
        )
        checks.require_device(op, initial_name, initial, x, "x")
        checks.require(states is not None, op, f"{initial_name} is given, {names[3]} is None; expected both")
    if states is not None and index.slots is None:
        checks.require(
            states.shape[0] >= num_requests,
            op,
            f"{names[3]} has {states.shape[0]} slots for {num_requests} sequences; expected one for each, or "
            f"{slots_name}",
        )
    if index.num_accepted is not None and states is not None and index.offsets is None:
        num_tokens = x.shape[1] if x.dim() == 3 else 1
        least = operands.weight.shape[1] - 2 + num_tokens
        checks.require(
            states.shape[2] >= least,
            op,
            f"{names[3]} has room for {states.shape[2]} inputs; a draft of {num_tokens} needs {least}",
        )
    return num_requests


def _require_values(
    op: str, names: tuple[str, ...], limits: tuple[Optional[int], int, int, int], index: _Index
) -> None:
    num_slots, num_tokens, pad_slot, max_accepted = limits
    if index.offsets is not None and indices.are_visible(index.offsets):
        indices.require_offsets(op, names[4], index.offsets, num_tokens, "the number of tokens")
    if index.slots is not None and num_slots is not None and indices.are_visible(index.slots):
        slots = index.slots
        is_slot = functools.partial(torch.logical_and, slots >= 0, slots != pad_slot)
        indices.require_within(op, names[5], slots, 0, num_slots, f"one of {num_slots} slots", is_slot)
    if index.num_accepted is not None and indices.are_visible(index.num_accepted):
        is_real = None if index.slots is None else functools.partial(torch.ge, index.slots, 0)
        meaning = "tokens that the state has room for"
        indices.require_within(op, names[7], index.num_accepted, 1, max_accepted + 1, meaning, is_real)
