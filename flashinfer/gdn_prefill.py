# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule (Gated DeltaNet) over sequences: the linear attention of Qwen3-Next, Qwen3.5 and Qwen3.6."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import torch

from flashinfer import dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.gdn import prefill as families
from flashinfer.families.layout import DTYPES
from flashinfer.host import checks, indices, memo, traced
from flashinfer.host.rows import require_distinct, require_rows
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch, Value

__all__ = ["chunk_gated_delta_rule"]

_OP = "chunk_gated_delta_rule"
_DIM = families.HEAD_DIM
_AUTO = -1
_SCANS = _DIM // families.SCAN_ROWS  # blocks of a head


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: Optional[torch.Tensor] = None,
    beta: Optional[torch.Tensor] = None,
    scale: Optional[float] = None,
    initial_state: Optional[torch.Tensor] = None,
    output_final_state: bool = False,
    cu_seqlens: Optional[torch.Tensor] = None,
    use_qk_l2norm_in_kernel: bool = False,
    output: Optional[torch.Tensor] = None,
    output_state: Optional[torch.Tensor] = None,
    state_checkpoints: Optional[torch.Tensor] = None,
    checkpoint_cu_starts: Optional[torch.Tensor] = None,
    checkpoint_every_n_tokens: int = 0,
    use_cp: Union[str, bool] = "auto",
    state_indices: Optional[torch.Tensor] = None,
    _cp_chunk_len: Optional[int] = None,
    backend: str = "auto",
    max_seqlen: Optional[int] = None,
    *,
    gate_domain: str = "linear",
    use_gate_in_kernel: bool = False,
    A_log: Optional[torch.Tensor] = None,  # noqa: N803
    dt_bias: Optional[torch.Tensor] = None,
    beta_is_logit: bool = False,
    cu_seqlens_cpu: Union[Sequence[int], torch.Tensor, None] = None,
    output_state_indices: Optional[torch.Tensor] = None,
    checkpoint_state_indices: Optional[torch.Tensor] = None,
    prefix_lens: Optional[torch.Tensor] = None,
) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The gated delta rule (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464) over packed sequences.

    For each head with its state S `[K, V]` and each token, `u = beta (v - alpha Sᵀk)`, `S = alpha S + k uᵀ` and
    `output = scale Sᵀq`. The longest of q, k and v in heads says how many there are; the heads of the others are shared
    by runs of consecutive ones.

    Args:
        q, k: `[num_tokens, heads of q or k, 128]`, fp16 or bf16 (fp32 on the CPU); unit stride in the last axis.
        v: `[num_tokens, heads of v, 128]`, the dtype of q.
        g: alpha, fp32 `[num_tokens, num_heads]`, from 0 to 1; None: 1.
        beta: fp32 `[num_tokens, num_heads]`; None: 1.
        scale: default `1 / sqrt(128)`, for None and for 0.
        initial_state: `[num_seqs, num_heads, 128 (V), 128 (K)]`, fp32 or bf16, or with state_indices a pool of any
            number of slots; None: zero.
        output_final_state: also return the states after the last tokens, of sequences without tokens as well.
        cu_seqlens: int32 or int64 `[num_seqs + 1]`: sequence i has the tokens from cu_seqlens[i] to cu_seqlens[i + 1],
            none if they are equal. None: one sequence.
        use_qk_l2norm_in_kernel: divide each row of q and k by the root of its sum of squares + 1e-6.
        output: `[num_tokens, num_heads, 128]`, the dtype of q; tokens of no sequence are left as they are. Allocated
            when None.
        output_state: as initial_state, which it may be itself; written with output_final_state alone. Allocated when
            None, unless there are state_indices.
        state_indices: int32 or int64 `[num_seqs]`: the slots of initial_state and output_state that sequences read and
            write. Below 0: zero is read, nothing is written. No slot is written by two sequences, or written by one
            and read by another.
        output_state_indices: slots of output_state, where they differ.
        gate_domain: "linear"; "log": g is the natural logarithm of alpha.
        use_cp: False: no sequence is split, so that bits do not depend on the number of tokens. Else long ones of few
            heads are, on a GPU, into segments that are worked on at the same time, where that is faster.
        max_seqlen: tokens of the longest sequence, which say whether that is so; taken for their mean when None.
        _cp_chunk_len: tokens of a segment, a multiple of 64, in place of what is fastest.
        cu_seqlens_cpu: accepted for compatibility.
        state_checkpoints, checkpoint_cu_starts, checkpoint_every_n_tokens, checkpoint_state_indices: None, or 0.
        prefix_lens, use_gate_in_kernel, A_log, dt_bias, beta_is_logit: None, or False.
        backend: "auto" or "flashinfer".

    Returns:
        output, or with output_final_state output and output_state.

    Raises:
        ValueError, TypeError: a shape, dtype, device, stride or number does not fit, or elements of what is written
            share memory.
        IndexError: offsets or slots past the end, where the host looks at them (docs/safety.md).
        UnsupportedConfig: an option, dtype, head size or device without a kernel.
    """
    unsupported = {
        "state_checkpoints": state_checkpoints, "checkpoint_cu_starts": checkpoint_cu_starts,
        "checkpoint_every_n_tokens": checkpoint_every_n_tokens or None,
        "checkpoint_state_indices": checkpoint_state_indices, "prefix_lens": prefix_lens,
        "use_gate_in_kernel": use_gate_in_kernel or None, "A_log": A_log, "dt_bias": dt_bias,
        "beta_is_logit": beta_is_logit or None,
    }  # fmt: skip
    for name, value in unsupported.items():
        if value is not None:
            raise UnsupportedConfig(f"{_OP}: {name} is given; {_INSTEAD.get(name, _NO_CHECKPOINTS)}")
    if backend not in ("auto", "flashinfer"):
        raise UnsupportedConfig(f"{_OP}: backend is {backend!r}; expected 'auto' or 'flashinfer'")
    checks.require(gate_domain in ("linear", "log"), _OP, f"gate_domain is {gate_domain!r}; expected 'linear' or 'log'")
    checks.require(
        state_indices is not None or output_state_indices is None, _OP,
        "output_state_indices without state_indices; expected both, or output_state in the order of sequences",
    )  # fmt: skip
    checks.require(use_cp in ("auto", True, False), _OP, f"use_cp is {use_cp!r}; expected 'auto', True or False")
    segment = _AUTO if use_cp else 0
    if use_cp and _cp_chunk_len is not None:
        segment = _cp_chunk_len
        checks.require(
            isinstance(segment, int) and segment > 0 and segment % families.CHUNK == 0, _OP,
            f"_cp_chunk_len is {segment!r}; expected None or a multiple of {families.CHUNK}",
        )  # fmt: skip
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise checks.not_tensors(_OP, **{name: tensor})
        checks.require(
            tensor.dim() == 3, _OP, f"{name} has shape {list(tensor.shape)}; expected [num_tokens, heads, {_DIM}]"
        )
    for name, given in (("cu_seqlens", cu_seqlens), ("initial_state", initial_state)):
        if not (given is None or isinstance(given, torch.Tensor)):
            raise checks.not_tensors(_OP, **{name: given})
    num_heads = max(q.shape[1], k.shape[1], v.shape[1])
    if output is None:
        output = torch.empty((q.shape[0], num_heads, _DIM), dtype=q.dtype, device=q.device)
    if not checks.boolean(_OP, "output_final_state", output_final_state):
        output_state = None
    elif output_state is None:
        checks.require(
            state_indices is None, _OP,
            "output_state is None; expected the pool that state_indices point into, initial_state itself or another",
        )  # fmt: skip
        num_seqs = 1 if cu_seqlens is None else max(cu_seqlens.numel() - 1, 0)
        state_dtype = torch.float32 if initial_state is None else initial_state.dtype
        output_state = torch.empty((num_seqs, num_heads, _DIM, _DIM), dtype=state_dtype, device=q.device)
    final_indices = state_indices if output_state_indices is None else output_state_indices
    longest = 0 if max_seqlen is None else checks.integer(_OP, "max_seqlen", max_seqlen, 0)
    normalize = checks.boolean(_OP, "use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel)
    options = _Options(scale, normalize, gate_domain == "log", segment, longest)
    operands = _Operands(q, k, v, g, beta, cu_seqlens, initial_state, state_indices, final_indices)
    if is_dynamo_compiling():
        if output_state is not None and output_state is initial_state:
            _door_in_place(operands._replace(initial_state=None), output, output_state, options)
        else:
            _door(operands, output, output_state, options)
    else:
        _run(operands, output, output_state, options)
    return output if output_state is None else (output, output_state)


_NO_CHECKPOINTS = "expected None: states between the tokens of a sequence are not kept"
_GATES = "expected None or False: compute alpha and beta before the call, alpha or its logarithm as g"
_INSTEAD = dict.fromkeys(("use_gate_in_kernel", "A_log", "dt_bias", "beta_is_logit"), _GATES)


class _Operands(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gate: Optional[torch.Tensor]
    beta: Optional[torch.Tensor]
    cu_seqlens: Optional[torch.Tensor]
    initial_state: Optional[torch.Tensor]
    initial_indices: Optional[torch.Tensor]
    final_indices: Optional[torch.Tensor]


class _Options(NamedTuple):
    scale: Optional[float]
    normalize: bool
    log_gate: bool
    segment: int  # tokens, 0: no sequence is split; or _AUTO
    longest: int  # tokens of a sequence, or 0


class _Prepared(NamedTuple):
    launches: tuple[PreparedLaunch, ...]  # take the addresses of operands, output, final state and scratch
    new_scratch: Optional[memo.Allocate]
    segments_offset: int  # in it
    checks_values: bool


_memo: memo.Memo[_Prepared] = memo.Memo()


def _run(operands: _Operands, output: torch.Tensor, final_state: Optional[torch.Tensor], options: _Options) -> None:
    tensors = (*operands, output, final_state)
    try:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        is_aligned = not any(address & 15 for address in addresses)
        key = options, is_aligned, *(None if tensor is None else memo.signature(tensor) for tensor in tensors)
        prepared = _memo.get(key)
    except (AttributeError, RuntimeError, TypeError):
        checks.require_addresses(_OP, **_named(operands, output, final_state))
        raise
    if prepared is None:
        prepared = _memo.remember(key, _prepare(operands, output, final_state, options))
    for name, tensor, address in zip((*operands._fields, "output", "output_state"), tensors, addresses):
        if tensor is not None and address < checks.LOWEST_ADDRESS:
            checks.low_address(_OP, name, tensor)
    if prepared.checks_values and indices.are_visible(*operands[5:]):
        _check_values(operands, final_state)
    scratch = None if prepared.new_scratch is None else prepared.new_scratch()
    first = 0 if scratch is None else scratch.data_ptr()
    addresses += (first, first + prepared.segments_offset)
    for launch in prepared.launches:
        launch(*addresses)


_OPERANDS = traced.fields(
    _Operands, "Tensor q", "Tensor k", "Tensor v", "Tensor? gate", "Tensor? beta", "Tensor? cu_seqlens",
    "Tensor? initial_state", "Tensor? initial_indices", "Tensor? final_indices",
)  # fmt: skip
_OPTIONS = traced.fields(_Options, "float? scale", "bool normalize", "bool log_gate", "int segment", "int longest")
_door = traced.door(
    _OP, _run, {"operands": _OPERANDS, "output": "Tensor(!)", "final_state": "Tensor(!)?", "options": _OPTIONS}
)
_door_in_place = traced.door(
    f"{_OP}_in_place",
    lambda operands, output, state, options: _run(operands._replace(initial_state=state), output, state, options),
    {"operands": _OPERANDS, "output": "Tensor(!)", "state": "Tensor(!)", "options": _OPTIONS},
)


def _named(operands: _Operands, output: torch.Tensor, final_state: Optional[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is given, by the names of the public function."""
    named = {**operands._asdict(), "output": output, "output_state": final_state}
    if operands.final_indices is operands.initial_indices:
        del named["final_indices"]
    public = {"gate": "g", "initial_indices": "state_indices", "final_indices": "output_state_indices"}
    return {public.get(name, name): tensor for name, tensor in named.items() if tensor is not None}


def _prepare(
    operands: _Operands, output: torch.Tensor, final_state: Optional[torch.Tensor], options: _Options
) -> _Prepared:
    num_seqs, num_heads = _check(operands, output, final_state)
    q, k, v, gate, beta, cu_seqlens, initial_state, initial_indices, final_indices = operands
    scale = 0.0 if options.scale is None else checks.real(_OP, "scale", options.scale)
    state = initial_state if initial_state is not None else final_state
    device_index, units = q.get_device(), num_seqs * num_heads
    segment = _segment_tokens(options, q.shape[0], num_seqs, num_heads, device_index) if units else 0
    if segment:
        units = families.num_slots(q.shape[0], num_seqs, segment) * num_heads
    log_gate = options.log_gate and gate is not None  # of which, on a GPU, the kernel of chunks makes decays
    machine = target.of_device(q.device)
    spec = families.GDN_PREFILL.spec(
        machine,
        dtype=dtypes.short_name(q.dtype),
        state_dtype="fp32" if state is None else dtypes.short_name(state.dtype),
        log_gate=log_gate and device_index < 0,
        normalize=options.normalize,
        block_v=families.block_v(machine, units, memo.num_sms(device_index) if device_index >= 0 else 1),
    )
    if units == 0:
        return _Prepared((), None, 0, True)
    rows: dict[str, Optional[torch.Tensor]] = {"q": q, "k": k, "v": v, "output": output, "gate": gate, "beta": beta}
    states = {"initial": initial_state, "final": final_state}
    index = initial_indices if initial_indices is not None else final_indices
    values: dict[str, Value] = {
        **{f"{name}_strides.token": 0 if x is None else x.stride(0) for name, x in rows.items()},
        **{f"{name}_strides.head": 0 if x is None else x.stride(1) for name, x in rows.items()},
        **{f"{name}_strides.slot": 0 if x is None else x.stride(0) for name, x in states.items()},
        **{f"{name}_strides.head": 0 if x is None else x.stride(1) for name, x in states.items()},
        "num_seqs": num_seqs,
        "num_tokens": q.shape[0],
        "num_heads": num_heads,
        **{f"heads_per_{name}": num_heads // x.shape[1] for name, x in (("q", q), ("k", k), ("v", v))},
        **{f"num_{name}_slots": 0 if x is None else x.shape[0] for name, x in states.items()},
        "has_long_seqlens": int(cu_seqlens is not None and cu_seqlens.dtype == torch.int64),
        "has_long_indices": int(index is not None and index.dtype == torch.int64),
        "scale": scale or _DIM**-0.5,
        "segment_tokens": segment,
        "has_bf16_states": int(state is not None and state.dtype == torch.bfloat16),
    }
    checks_values = indices.may_be_visible(*operands[5:])
    launcher = default_resolver().load(spec).on(device_index)
    if device_index < 0:
        return _Prepared((launcher.prepare((1, 1, 1), values, varying=families.ADDRESSES),), None, 0, checks_values)
    chunk_slots = families.num_slots(q.shape[0], num_seqs, families.CHUNK) * num_heads
    chunks = families.GDN_PREFILL_CHUNKS.spec(
        machine, dtype=spec.arg("dtype"), log_gate=log_gate, normalize=options.normalize
    )
    steps = [(chunks, chunk_slots)]
    if segment:
        segments = families.GDN_PREFILL_SEGMENTS.spec(machine, dtype=spec.arg("dtype"))
        steps.append((segments, units * 2 * _DIM // families.SEGMENTS_V))
        steps.append((families.GDN_PREFILL_SCAN.spec(machine), num_seqs * num_heads * _SCANS))
    steps.append((spec, units * _DIM // int(launcher.config.constants["kBlockV"])))
    launches = tuple(
        default_resolver().load(each).on(device_index).prepare((grid, 1, 1), values, varying=families.ADDRESSES)
        for each, grid in steps
    )
    num_bytes = chunk_slots * families.CHUNK_BYTES
    segments_bytes = units * families.SEGMENT_BYTES if segment else 0
    scratch = memo.allocator((num_bytes + segments_bytes,), torch.uint8, q.device)
    return _Prepared(launches, scratch, num_bytes, checks_values)


def _segment_tokens(options: _Options, num_tokens: int, num_seqs: int, num_heads: int, device_index: int) -> int:
    if device_index < 0:
        return 0
    if options.segment != _AUTO:
        return options.segment if num_tokens > options.segment else 0
    longest = min(options.longest or -(-num_tokens // num_seqs), num_tokens)
    return families.segment_tokens(num_tokens, longest, num_seqs, num_heads, memo.num_sms(device_index))


def _check(operands: _Operands, output: torch.Tensor, final_state: Optional[torch.Tensor]) -> tuple[int, int]:
    """The number of sequences and of heads."""
    named: dict[str, Any] = _named(operands, output, final_state)
    checks.require_tensors(_OP, **named)
    q, k, v = operands[:3]
    num_tokens = q.shape[0]
    num_heads = max(x.shape[1] for x in (q, k, v))
    for name, tensor in named.items():
        checks.require_device(_OP, name, tensor, q, "q")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        heads = tensor.shape[1]
        checks.require(
            tensor.shape[0] == num_tokens and heads > 0 and num_heads % heads == 0, _OP,
            f"{name} has shape {list(tensor.shape)}; expected {num_tokens} tokens, as q has, and heads that divide "
            f"{num_heads}, the most of q, k and v",
        )  # fmt: skip
        if tensor.shape[2] != _DIM:
            raise UnsupportedConfig(f"{_OP}: {name} has shape {list(tensor.shape)}; expected head size {_DIM}")
        checks.require_dtype_device(_OP, name, tensor, q, "q")
        require_rows(_OP, name, tensor)
    checks.require_supported(_OP, "q", q, DTYPES if q.is_cpu else DTYPES[:2])
    expected = (num_tokens, num_heads, _DIM)
    checks.require(output.shape == expected, _OP, f"output has shape {list(output.shape)}; expected {list(expected)}")
    checks.require_dtype_device(_OP, "output", output, q, "q")
    require_rows(_OP, "output", output)
    require_distinct(_OP, "output", output)
    for name in ("g", "beta"):
        if name in named:
            gate = named[name]
            checks.require(
                gate.shape == expected[:2] and gate.dtype == torch.float32, _OP,
                f"{name} is {gate.dtype} of shape {list(gate.shape)}; expected torch.float32 of shape "
                f"{list(expected[:2])}",
            )  # fmt: skip
    num_seqs = 1
    if operands.cu_seqlens is not None:
        checks.check_index(_OP, "cu_seqlens", operands.cu_seqlens)
        checks.require(operands.cu_seqlens.shape[0] > 0, _OP, "cu_seqlens is empty; expected [num_seqs + 1]")
        num_seqs = operands.cu_seqlens.shape[0] - 1
    checks.require(num_seqs * num_heads < 1 << 28, _OP, f"{num_seqs} sequences of {num_heads} heads are too many")
    pool = operands.initial_indices is not None
    for name in ("state_indices", "output_state_indices"):
        if name in named:
            checks.check_index(_OP, name, named[name], num_seqs)
            checks.require(
                named[name].dtype == named["state_indices"].dtype, _OP,
                f"{name} is {named[name].dtype}, state_indices {named['state_indices'].dtype}; expected one dtype",
            )  # fmt: skip
    states = {name: named[name] for name in ("initial_state", "output_state") if name in named}
    checks.require(not pool or bool(states), _OP, "state_indices without a pool; expected initial_state, output_state")
    for name, state in states.items():
        slots = state.shape[0] if pool and state.dim() else num_seqs
        checks.require(
            state.shape == (slots, num_heads, _DIM, _DIM) and state.stride()[2:] == (_DIM, 1), _OP,
            f"{name} has shape {list(state.shape)}, strides {list(state.stride())}; expected "
            f"[{slots}, {num_heads}, {_DIM}, {_DIM}], the last two dimensions contiguous",
        )  # fmt: skip
        checks.require_supported(_OP, name, state, families.STATE_DTYPES)
        require_rows(_OP, name, state)
    if final_state is not None:
        require_distinct(_OP, "output_state", final_state)
        if operands.initial_state is not None:
            checks.require_dtype_device(_OP, "output_state", final_state, operands.initial_state, "initial_state")
    return num_seqs, num_heads


def _check_values(operands: _Operands, final_state: Optional[torch.Tensor]) -> None:
    if operands.cu_seqlens is not None:
        indices.require_offsets(_OP, "cu_seqlens", operands.cu_seqlens, operands.q.shape[0], "the tokens of q")
    initial, initial_indices, final_indices = operands[6:]
    if initial_indices is None or final_indices is None:
        return
    reads, writes = initial_indices.tolist(), final_indices.tolist()
    both = (("state_indices", reads, initial), ("output_state_indices", writes, final_state))
    for name, slots, state in both:
        if state is not None and max(slots, default=-1) >= state.shape[0]:
            shown = "state_indices" if final_indices is initial_indices else name
            raise IndexError(
                f"{_OP}: {shown} has {max(slots)}; expected at most {state.shape[0] - 1}, slots of the pool"
            )
    if final_state is None:
        return
    written = sorted(slot for slot in writes if slot >= 0)
    for slot, other in itertools.pairwise(written):
        checks.require(slot != other, _OP, f"slot {slot} is written by two sequences; expected one for each")
    if initial is not None and initial.data_ptr() == final_state.data_ptr():
        owner = {slot: i for i, slot in enumerate(writes) if slot >= 0}
        for i, slot in enumerate(reads):
            checks.require(
                owner.get(slot, i) == i, _OP, f"slot {slot} is read by one sequence and written by another; they race"
            )
