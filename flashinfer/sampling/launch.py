"""What the operators of sampling share: one prepared launch per signature."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

import torch

from flashinfer import target
from flashinfer.families import sampling as families
from flashinfer.host import checks, memo, traced
from flashinfer.jit import Family, default_resolver
from flashinfer.jit.loader import PreparedLaunch
from flashinfer.sampling import arguments
from flashinfer.sampling.arguments import Number, PerRow, Seed

Samples = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# operator: (what it does to a row, axis `op` of the family)
_NORMALIZERS = {
    "softmax": "softmax",
    "top_p_renorm_probs": "top_p_renorm",
    "top_k_renorm_probs": "top_k_renorm",
    "top_k_mask_logits": "top_k_mask",
}
# operator: (what its rows hold, its filter), axes of the family
_SAMPLERS = {
    "sampling_from_logits": ("logits", "none"),
    "sampling_from_probs": ("probs", "none"),
    "top_p_sampling_from_probs": ("probs", "top_p"),
    "top_k_sampling_from_probs": ("probs", "top_k"),
    "min_p_sampling_from_probs": ("probs", "min_p"),
    "top_k_top_p_sampling_from_logits": ("logits", "top_k_top_p"),
    "top_k_top_p_sampling_from_probs": ("probs", "top_k_top_p"),
}
# Fields of SamplingParams that change from call to call.
_VARYING = (
    *("input", "output", "token_ids", "valid", "row_indices", "top_k", "top_p", "min_p", "temperature", "random_state"),
    *("seed", "offset", "top_k_value", "top_p_value", "min_p_value", "temperature_value"),
)
_SPECULATIVE_VARYING = (
    *("draft_probs", "target_probs", "draft_ids", "output_ids", "num_accepted", "num_emitted"),
    *("random_state", "seed", "offset"),
)
_WORDS_PER_SAMPLE = 8  # Philox words a row consumes


# ----------------------------------------------------------------------------------------------------------- whole rows


class _Normalizer(NamedTuple):
    launch: PreparedLaunch
    new_output: memo.Allocate


_normalizers: memo.Memo[_Normalizer] = memo.Memo()


def normalize(
    op: str,
    input: torch.Tensor,
    parameters: tuple[PerRow, PerRow, PerRow],
    enable_pdl: Optional[bool] = None,
    out: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """parameters: top_k, top_p, temperature."""
    top_k, top_p, temperature = parameters
    if torch.compiler.is_dynamo_compiling():
        out = torch.empty(input.shape, dtype=_output_dtype(op, input), device=input.device)
        _compiled_normalize(op, input, *_split(top_k), *_split(top_p), *_split(temperature), enable_pdl, out)
        return out
    k_value, k_ptr, k_like = arguments.NO_TOP_K if top_k is None else arguments.count(top_k)
    p_value, p_ptr, p_like = arguments.ONE if top_p is None else arguments.fraction(top_p)
    t_value, t_ptr, t_like = arguments.ONE if temperature is None else arguments.fraction(temperature)
    key = (
        op, enable_pdl, input.dtype, input.shape, input.stride(), input.device, k_like, p_like, t_like,
    )  # fmt: skip
    prepared = _normalizers.get(key)
    if prepared is None:
        dtype = arguments.check_rows(op, input, None)
        readable = arguments.readable(op, ("top_k", "top_p", "temperature"), parameters, input.shape[0], input)
        if readable is not None:
            return normalize(op, input, readable, enable_pdl, out)
        args = {"op": _NORMALIZERS[op]}
        launch = _prepare(families.NORMALIZE_ROW, args, dtype, input, None, (top_k, False), enable_pdl)
        new_output = memo.allocator(input.shape, _output_dtype(op, input), input.device)
        prepared = _normalizers.remember(key, _Normalizer(launch, new_output))
    launch, new_output = prepared
    if out is None:
        out = new_output()
    launch(
        input.data_ptr(), out.data_ptr(), 0, 0, 0, k_ptr, p_ptr, 0, t_ptr, 0, 0, 0, k_value, p_value, 0.0, t_value
    )  # fmt: skip
    return out


def _output_dtype(op: str, input: torch.Tensor) -> torch.dtype:
    return torch.float32 if op == "softmax" else input.dtype


_compiled_normalize = traced.compiled_op(
    "normalize_rows(str op, Tensor input, Tensor? top_k, int? top_k_value, Tensor? top_p, float? top_p_value, "
    "Tensor? temperature, float? temperature_value, bool? enable_pdl, Tensor(a!) out) -> ()",
    lambda op, input, *rest: normalize(op, input, _join(rest[:6]), *rest[6:]),
)

# -------------------------------------------------------------------------------------------------------------- samples


class _Sampler(NamedTuple):
    launch: PreparedLaunch
    new_token_ids: memo.Allocate
    new_valid: memo.Allocate


_samplers: memo.Memo[_Sampler] = memo.Memo()


def sample(
    op: str,
    input: torch.Tensor,
    filters: tuple[PerRow, PerRow, PerRow],
    top_k_first: bool,
    options: tuple[Any, ...],
    out: Optional[tuple[torch.Tensor, Optional[torch.Tensor]]] = None,
) -> Samples:
    """filters: top_k, top_p, min_p; options: indices, generator, check_nan, seed, offset, return_valid; out: where
    tokens and, if wanted, their validity go."""
    if torch.compiler.is_dynamo_compiling():
        return _traced_sample(op, input, filters, top_k_first, options)
    top_k, top_p, min_p = filters
    indices, generator, check_nan, seed, offset, return_valid = options
    k_value, k_ptr, k_like = arguments.NO_TOP_K if top_k is None else arguments.count(top_k)
    p_value, p_ptr, p_like = arguments.ONE if top_p is None else arguments.fraction(top_p)
    m_value, m_ptr, m_like = arguments.ZERO if min_p is None else arguments.fraction(min_p)
    key = (
        op, top_k_first, input.dtype, input.shape, input.stride(), input.device, k_like, p_like, m_like,
        None if indices is None else memo.signature(indices),
    )  # fmt: skip
    prepared = _samplers.get(key)
    if prepared is None:
        dtype = arguments.check_rows(op, input, indices)
        num_rows = (input if indices is None else indices).shape[0]
        readable = arguments.readable(op, ("top_k", "top_p", "min_p"), filters, num_rows, input)
        if readable is not None:
            return sample(op, input, readable, top_k_first, options, out)
        kind, filter = _SAMPLERS[op]
        args = {"input": kind, "filter": filter}
        prepared = _Sampler(
            _prepare(families.SAMPLE_ROW, args, dtype, input, indices, (top_k, top_k_first)),
            memo.allocator((num_rows,), torch.int32, input.device),
            memo.allocator((num_rows,), torch.bool, input.device),
        )
        _samplers.remember(key, prepared)
    if check_nan and bool(torch.isnan(input).any()):
        kind, _ = _SAMPLERS[op]
        raise ValueError(f"{op}: the input holds NaN; find where the {kind} come from, or pass check_nan=False")
    launch, new_token_ids, new_valid = prepared
    token_ids, valid = (new_token_ids(), new_valid() if return_valid else None) if out is None else out
    state, seed, offset = arguments.random_state(op, input, (generator, seed, offset), _WORDS_PER_SAMPLE)
    launch(
        input.data_ptr(), 0, token_ids.data_ptr(), 0 if valid is None else valid.data_ptr(),
        0 if indices is None else indices.data_ptr(), k_ptr, p_ptr, m_ptr, 0,
        0 if state is None else state.data_ptr(), seed, offset, k_value, p_value, m_value, 1.0,
    )  # fmt: skip
    return token_ids if valid is None else (token_ids, valid)


def _traced_sample(
    op: str, input: torch.Tensor, filters: tuple[PerRow, PerRow, PerRow], top_k_first: bool, options: tuple[Any, ...]
) -> Samples:
    indices, generator, check_nan, seed, offset, return_valid = options
    if generator is not None:
        raise arguments.untraceable_generator(op)
    num_rows = input.shape[0] if indices is None else indices.shape[0]
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=input.device)
    valid = torch.empty(num_rows, dtype=torch.bool, device=input.device) if return_valid else None
    top_k, top_p, min_p = filters
    numbers = (*_split(top_k), *_split(top_p), *_split(min_p), top_k_first)
    _compiled_sample(op, input, *numbers, indices, check_nan, *_split(seed), *_split(offset), token_ids, valid)
    return token_ids if valid is None else (token_ids, valid)


def _run_compiled_sample(op: str, input: torch.Tensor, *rest: Any) -> None:
    top_k_first, indices, check_nan = rest[6:9]
    options = (indices, None, check_nan, *_join(rest[9:13]), False)
    sample(op, input, _join(rest[:6]), top_k_first, options, rest[13:])


_compiled_sample = traced.compiled_op(
    "sample_rows(str op, Tensor input, Tensor? top_k, int? top_k_value, Tensor? top_p, float? top_p_value, "
    "Tensor? min_p, float? min_p_value, bool top_k_first, Tensor? indices, bool check_nan, Tensor? seed, "
    "int? seed_value, Tensor? offset, int? offset_value, Tensor(a!) token_ids, Tensor(b!)? valid) -> ()",
    _run_compiled_sample,
)


def _split(value: Union[torch.Tensor, Number, None]) -> tuple[Optional[torch.Tensor], Optional[Number]]:
    """(tensor, None) or (None, number): a library operator takes the two as arguments of their own."""
    return (value, None) if isinstance(value, torch.Tensor) else (None, value)


def _join(pairs: tuple[Any, ...]) -> Any:
    """The inverse of `_split` over consecutive pairs."""
    return tuple(number if tensor is None else tensor for tensor, number in zip(pairs[::2], pairs[1::2]))


def _nothing(*_: object) -> None:
    """The launch of an operator on an empty batch."""


def _prepare(
    family: Family,
    args: dict[str, Any],
    dtype: str,
    input: torch.Tensor,
    indices: Optional[torch.Tensor],
    order: tuple[PerRow, bool],
    pdl: Optional[bool] = None,
) -> PreparedLaunch:
    """order: top_k, and whether it comes before top_p."""
    num_rows = (input if indices is None else indices).shape[0]
    if num_rows == 0:
        return _nothing
    vocab_size, device_index = input.shape[1], input.get_device()
    machine = target.of_device(input.device)
    keeps_row = args.get("filter") != "none"
    place = families.placement(dtype, vocab_size, num_rows, _num_sms(device_index), machine, keeps_row)
    launcher = default_resolver().load(family.spec(machine, dtype=dtype, **args, **place)).on(device_index, pdl=pdl)
    top_k, top_k_first = order
    return launcher.prepare(
        (num_rows * place["cluster_size"], 1, 1),
        {
            "input_stride": input.stride(0),
            "output_stride": vocab_size,  # the output is contiguous
            "num_rows": num_rows,
            "vocab_size": vocab_size,
            "row_indices_are_int64": indices is not None and indices.dtype is torch.int64,
            "top_k_is_int64": isinstance(top_k, torch.Tensor) and top_k.dtype is torch.int64,
            "top_k_first": top_k_first,
        },
        varying=_VARYING,
    )


def _num_sms(device_index: int) -> int:
    return memo.num_sms(device_index) if device_index >= 0 else 1


# ---------------------------------------------------------------------------------------------------------- speculative


class _Speculator(NamedTuple):
    launch: PreparedLaunch
    new_token_ids: memo.Allocate
    new_count: memo.Allocate
    num_words: int  # of Philox, a row


_speculators: memo.Memo[_Speculator] = memo.Memo()


def speculate(
    op: str,
    drafts: tuple[torch.Tensor, torch.Tensor],
    target_probs: torch.Tensor,
    counts: tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
    random: tuple[Optional[torch.Generator], Seed, Seed],
    out: Optional[torch.Tensor] = None,
) -> Triple:
    """drafts: probabilities and tokens; counts: of accepted and of emitted drafts; random: generator, seed, offset.

    Tokens go to `out` if given."""
    if torch.compiler.is_dynamo_compiling():
        return _traced_speculate(op, drafts, target_probs, counts, random)
    draft_probs, draft_ids = drafts
    accepted, emitted = counts
    key = (
        *memo.signature(draft_probs),
        *memo.signature(target_probs),
        *memo.signature(draft_ids),
        None if accepted is None else memo.signature(accepted),
        None if emitted is None else memo.signature(emitted),
    )
    prepared = _speculators.get(key)
    if prepared is None:
        if draft_ids.dtype != torch.int32 or not draft_ids.is_contiguous():
            drafts = (draft_probs, draft_ids.to(torch.int32).contiguous())
            return speculate(op, drafts, target_probs, counts, random, out)
        prepared = _speculators.remember(key, _prepare_speculative(op, drafts, target_probs, counts))
    launch, new_token_ids, new_count, num_words = prepared
    token_ids = new_token_ids() if out is None else out
    if accepted is None:
        accepted = new_count()
    if emitted is None:
        emitted = new_count()
    state, seed, offset = arguments.random_state(op, draft_probs, random, num_words)
    launch(
        draft_probs.data_ptr(),
        target_probs.data_ptr(),
        draft_ids.data_ptr(),
        token_ids.data_ptr(),
        accepted.data_ptr(),
        emitted.data_ptr(),
        0 if state is None else state.data_ptr(),
        seed,
        offset,
    )
    return token_ids, accepted, emitted


def _traced_speculate(
    op: str,
    drafts: tuple[torch.Tensor, torch.Tensor],
    target_probs: torch.Tensor,
    counts: tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
    random: tuple[Optional[torch.Generator], Seed, Seed],
) -> Triple:
    generator, seed, offset = random
    if generator is not None:
        raise arguments.untraceable_generator(op)
    shape, device = target_probs.shape[:2], target_probs.device
    accepted, emitted = (
        torch.zeros(shape[0], dtype=torch.int32, device=device) if count is None else count for count in counts
    )
    token_ids = torch.empty(shape, dtype=torch.int32, device=device)
    _compiled_speculate(op, *drafts, target_probs, accepted, emitted, *_split(seed), *_split(offset), token_ids)
    return token_ids, accepted, emitted


_compiled_speculate = traced.compiled_op(
    "speculate(str op, Tensor draft_probs, Tensor draft_ids, Tensor target_probs, Tensor(a!) accepted, "
    "Tensor(b!) emitted, Tensor? seed, int? seed_value, Tensor? offset, int? offset_value, Tensor(c!) out) -> ()",
    lambda op, draft_probs, draft_ids, target_probs, accepted, emitted, *rest: speculate(
        op, (draft_probs, draft_ids), target_probs, (accepted, emitted), (None, *_join(rest[:4])), rest[4]
    ),
)


def _prepare_speculative(
    op: str,
    drafts: tuple[torch.Tensor, torch.Tensor],
    target_probs: torch.Tensor,
    counts: tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
) -> _Speculator:
    draft_probs, draft_token_ids = drafts
    dtype = arguments.check_dtype(op, "draft_probs", draft_probs)
    checks.require_dtype_device(op, "target_probs", target_probs, draft_probs, "draft_probs")
    checks.require_device(op, "draft_token_ids", draft_token_ids, draft_probs, "draft_probs")
    checks.require(
        target_probs.dim() == 3 and target_probs.shape[1] >= 1 and target_probs.shape[2] >= 1,
        op,
        f"target_probs is {list(target_probs.shape)}; expected [num_rows, num_draft + 1, vocab_size]",
    )
    num_rows, num_steps, vocab_size = target_probs.shape
    for name, tensor, expected in (
        ("draft_probs", draft_probs, (num_rows, num_steps - 1, vocab_size)),
        ("draft_token_ids", draft_token_ids, (num_rows, num_steps - 1)),
    ):
        checks.require(
            tensor.shape == expected,
            op,
            f"{name} is {list(tensor.shape)}; expected {list(expected)}, one step less than target_probs",
        )
    checks.require_unit_stride(op, "draft_probs", draft_probs)
    checks.require_unit_stride(op, "target_probs", target_probs)
    device = draft_probs.device
    for name, count in zip(("maybe_output_accepted_token_num", "maybe_output_emitted_draft_token_num"), counts):
        if count is not None:
            fits = count.dtype == torch.int32 and count.shape == (num_rows,) and count.is_contiguous()
            checks.require(
                fits and count.device == device,
                op,
                f"{name} is {count.dtype} {list(count.shape)} on {count.device}; expected contiguous int32 "
                f"[{num_rows}] on {device}",
            )
    machine, device_index = target.of_device(device), draft_probs.get_device()
    launch: PreparedLaunch = _nothing
    if num_rows > 0:
        place = families.placement(dtype, vocab_size, num_rows, _num_sms(device_index), machine, keeps_row=False)
        spec = families.CHAIN_SPECULATIVE.spec(machine, dtype=dtype, cluster_size=place["cluster_size"])
        launch = (
            default_resolver()
            .load(spec)
            .on(device_index)
            .prepare(
                (num_rows * place["cluster_size"], 1, 1),
                {
                    "draft_row_stride": draft_probs.stride(0),
                    "draft_step_stride": draft_probs.stride(1),
                    "target_row_stride": target_probs.stride(0),
                    "target_step_stride": target_probs.stride(1),
                    "num_rows": num_rows,
                    "num_draft": num_steps - 1,
                    "vocab_size": vocab_size,
                    "adds_accepted": counts[0] is not None,
                    "adds_emitted": counts[1] is not None,
                },
                varying=_SPECULATIVE_VARYING,
            )
        )
    return _Speculator(
        launch,
        memo.allocator((num_rows, num_steps), torch.int32, device),
        memo.allocator((num_rows,), torch.int32, device),
        8 + 4 * -(-(num_steps - 1) // 2),
    )
