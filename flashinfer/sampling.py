"""Sampling of tokens from logits or probabilities, and the filters that go with it: exact, and without sorting.

Conventions of this module:

- Rows are `[num_rows, vocab_size]` of fp32, fp16 or bf16, unit stride in the last axis, any stride between rows.
  Arithmetic is fp32. Tokens come back as int32.
- **Filters cut by value.** Top-k keeps every token with fewer than k tokens strictly more probable; top-p keeps every
  token for which the strictly more probable ones weigh less than `top_p` of the whole; min-p keeps what reaches `min_p`
  times the largest. So tokens of equal probability stay or go together (top-k may keep more than k), the most probable
  one always stays, and a token outside the set is never drawn. `top_k >= vocab_size` and `top_p >= 1` keep all.
- **Parameters** (`top_k`, `top_p`, `min_p`, `temperature`) are numbers, or tensors with one entry per output row.
- **`indices`** `[num_rows]`, int32 or int64, names the input row of each output row; without it they correspond.
- **Rows with nothing to draw** (all probabilities zero, all logits −inf, a NaN, a logit of +inf) give token 0, and
  `valid` False with `return_valid=True`. `check_nan=True` raises ValueError for NaN instead, at the cost of a
  synchronization.
- **Random numbers** are Philox words of (seed, row, offset). On CUDA, seed and offset are the generator's, whose offset
  advances as PyTorch's own kernels advance it; in a CUDA graph they are drawn by a kernel of the graph, so that each
  replay draws anew. `seed` and `offset` replace the generator. Equal states give equal tokens on equal devices; sums
  have a fixed order, so `deterministic=False` is no faster and changes nothing.

No function here synchronizes with the device unless `check_nan` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, Union

import torch

from flashinfer import _op, dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.jit import resolver
from flashinfer.kernels import sampling as kernels

__all__ = [
    "softmax",
    "sampling_from_logits",
    "sampling_from_probs",
    "top_p_sampling_from_probs",
    "top_k_sampling_from_probs",
    "min_p_sampling_from_probs",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
    "top_p_renorm_probs",
    "top_p_renorm_prob",
    "top_k_renorm_probs",
    "top_k_renorm_prob",
    "top_k_mask_logits",
    "chain_speculative_sampling",
]

Number = Union[int, float]
PerRow = Union[torch.Tensor, int, float, None]
Seed = Union[int, torch.Tensor, None]
Samples = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]

# ----------------------------------------------------------------------------------------------------------- whole rows


def softmax(
    logits: torch.Tensor, temperature: Union[torch.Tensor, float, None] = None, enable_pdl: Optional[bool] = None
) -> torch.Tensor:
    """`softmax(logits / temperature)` over the last axis, in one reading and one writing of the row.

    Args:
        logits: `[num_rows, vocab_size]`.
        temperature: positive number or `[num_rows]` tensor; 1 when None.
        enable_pdl: launch with programmatic dependent launch (sm_90 and later).

    Returns:
        Probabilities, `[num_rows, vocab_size]` fp32. A row of −inf, or with NaN or +inf, becomes NaN.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit.
        UnsupportedConfig: no kernel for this dtype.
    """
    return _normalize("softmax", "softmax", logits, None, None, 1.0 if temperature is None else temperature, enable_pdl)


def top_p_renorm_probs(
    probs: torch.Tensor, top_p: Union[torch.Tensor, float], is_deterministic: bool = False
) -> torch.Tensor:
    """Keep each row's top-p set and scale it to sum 1; zero elsewhere.

    Args:
        probs: `[num_rows, vocab_size]`.
        top_p: number or `[num_rows]` tensor.
        is_deterministic: accepted for compatibility; the result is always deterministic.

    Returns:
        Shape and dtype of probs. A row of zeros stays zero, a row with NaN becomes NaN.

    Raises: as `softmax`.
    """
    return _normalize("top_p_renorm_probs", "top_p_renorm", probs, None, top_p, 1.0)


def top_k_renorm_probs(probs: torch.Tensor, top_k: Union[torch.Tensor, int]) -> torch.Tensor:
    """Keep each row's top-k set and scale it to sum 1; zero elsewhere. Otherwise as `top_p_renorm_probs`."""
    return _normalize("top_k_renorm_probs", "top_k_renorm", probs, top_k, None, 1.0)


def top_k_mask_logits(logits: torch.Tensor, top_k: Union[torch.Tensor, int]) -> torch.Tensor:
    """Set every logit outside its row's top-k set to −inf. NaN counts as outside.

    Args:
        logits: `[num_rows, vocab_size]`.
        top_k: number or `[num_rows]` tensor.

    Returns:
        Shape and dtype of logits.

    Raises: as `softmax`.
    """
    return _normalize("top_k_mask_logits", "top_k_mask", logits, top_k, None, 1.0)


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs

# -------------------------------------------------------------------------------------------------------------- samples


def sampling_from_logits(
    logits: torch.Tensor,
    indices: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Samples:
    """Draw one token per row from `softmax(logits)`, in one reading of the logits.

    Args:
        logits: `[num_inputs, vocab_size]`.
        indices, deterministic, generator, check_nan, seed, offset, return_valid: see the module.

    Returns:
        Tokens `[num_rows]` int32; with `return_valid`, also `[num_rows]` bool.

    Raises:
        ValueError: a shape, dtype, device or stride does not fit, or `check_nan` found NaN.
        UnsupportedConfig: no kernel for this dtype.
    """
    options = (indices, generator, check_nan, seed, offset, return_valid)
    return _sample("sampling_from_logits", "logits", "none", logits, None, None, None, False, options)


def sampling_from_probs(
    probs: torch.Tensor,
    indices: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Samples:
    """Draw one token per row in proportion to `probs` `[num_inputs, vocab_size]`, which need not sum to 1.

    Arguments, returns and errors otherwise as `sampling_from_logits`.
    """
    options = (indices, generator, check_nan, seed, offset, return_valid)
    return _sample("sampling_from_probs", "probs", "none", probs, None, None, None, False, options)


def top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_p: Union[torch.Tensor, float],
    indices: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Samples:
    """Draw one token per row from its top-p (nucleus) set (Holtzman et al. 2020, arXiv:1904.09751).

    Args:
        top_p: number or `[num_rows]` tensor, a part of the row's own sum.

    Otherwise as `sampling_from_probs`.
    """
    options = (indices, generator, check_nan, seed, offset, return_valid)
    return _sample("top_p_sampling_from_probs", "probs", "top_p", probs, None, top_p, None, False, options)


def top_k_sampling_from_probs(
    probs: torch.Tensor,
    top_k: Union[torch.Tensor, int],
    indices: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Samples:
    """Draw one token per row from its top-k set (Fan, Lewis & Dauphin 2018, arXiv:1805.04833).

    Args:
        top_k: number or `[num_rows]` tensor of int32 or int64.

    Otherwise as `sampling_from_probs`.
    """
    options = (indices, generator, check_nan, seed, offset, return_valid)
    return _sample("top_k_sampling_from_probs", "probs", "top_k", probs, top_k, None, None, False, options)


def min_p_sampling_from_probs(
    probs: torch.Tensor,
    min_p: Union[torch.Tensor, float],
    indices: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Samples:
    """Draw one token per row among those at least `min_p` times as probable as the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082).

    Args:
        min_p: number or `[num_rows]` tensor.

    Otherwise as `sampling_from_probs`.
    """
    options = (indices, generator, check_nan, seed, offset, return_valid)
    return _sample("min_p_sampling_from_probs", "probs", "min_p", probs, None, None, min_p, False, options)


def top_k_top_p_sampling_from_logits(
    logits: torch.Tensor,
    top_k: Union[torch.Tensor, int],
    top_p: Union[torch.Tensor, float],
    indices: Optional[torch.Tensor] = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Samples:
    """Draw one token per row of `softmax(logits)` after top-k and top-p; softmax, filters and draw are one kernel.

    Args:
        filter_apply_order: "top_k_first": top-p acts on the renormalized top-k set; "joint": a token must pass both
            filters on the given distribution.

    Otherwise as `sampling_from_logits`, `top_k_sampling_from_probs` and `top_p_sampling_from_probs`.
    """
    op = "top_k_top_p_sampling_from_logits"
    top_k_first = _is_top_k_first(op, filter_apply_order)
    options = (indices, generator, check_nan, seed, offset, return_valid)
    return _sample(op, "logits", "top_k_top_p", logits, top_k, top_p, None, top_k_first, options)


def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_k: Union[torch.Tensor, int],
    top_p: Union[torch.Tensor, float],
    indices: Optional[torch.Tensor] = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Samples:
    """Draw one token per row of `probs` after top-k and top-p, in the order of `top_k_top_p_sampling_from_logits`."""
    op = "top_k_top_p_sampling_from_probs"
    top_k_first = _is_top_k_first(op, filter_apply_order)
    options = (indices, generator, check_nan, seed, offset, return_valid)
    return _sample(op, "probs", "top_k_top_p", probs, top_k, top_p, None, top_k_first, options)


def chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_probs: torch.Tensor,
    maybe_output_accepted_token_num: Optional[torch.Tensor] = None,
    maybe_output_emitted_draft_token_num: Optional[torch.Tensor] = None,
    deterministic: bool = True,
    generator: Optional[torch.Generator] = None,
    seed: Seed = None,
    offset: Seed = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept a prefix of a chain of draft tokens and draw one token more, so that what is emitted follows the target
    (Leviathan, Kalman & Matias 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).

    Draft token x passes if `u < target(x) / draft(x)`, u uniform. The tokens before the first that fails are emitted,
    then one from `max(target − draft, 0)` at the step that failed, or from the last target if none did.

    Args:
        draft_probs: `[num_rows, num_draft, vocab_size]`; rows sum to 1.
        draft_token_ids: `[num_rows, num_draft]` int32 (others are converted); an id outside the vocabulary fails.
        target_probs: `[num_rows, num_draft + 1, vocab_size]`, dtype of draft_probs.
        maybe_output_accepted_token_num: `[num_rows]` int32, added to in place; zeros when None.
        maybe_output_emitted_draft_token_num: likewise.
        deterministic, generator, seed, offset: see the module.

    Returns:
        `(output_token_ids, accepted, emitted)`: tokens `[num_rows, num_draft + 1]` int32, −1 behind the last one; the
        number of draft tokens that pass their own test, whether or not one before them failed; and the number of draft
        tokens emitted, which leaves out the one drawn last. A row whose target holds NaN or no weight draws token 0.

    Raises: as `sampling_from_logits`.
    """
    op = "chain_speculative_sampling"
    if draft_token_ids.dtype != torch.int32 or not draft_token_ids.is_contiguous():
        draft_token_ids = draft_token_ids.to(torch.int32).contiguous()
    key = (op, *_signature(draft_probs), *_signature(target_probs), *_signature(draft_token_ids))
    launch = _memo.get(key)
    if launch is None:
        launch = _memo.remember(key, _prepare_speculative(op, draft_probs, draft_token_ids, target_probs))
    num_rows, num_draft = draft_token_ids.shape
    device = draft_probs.device
    counts = []
    for name, count in (
        ("maybe_output_accepted_token_num", maybe_output_accepted_token_num),
        ("maybe_output_emitted_draft_token_num", maybe_output_emitted_draft_token_num),
    ):
        if count is None:
            count = torch.zeros(num_rows, dtype=torch.int32, device=device)
        fits = count.dtype == torch.int32 and count.shape == (num_rows,) and count.is_contiguous()
        _op.require(
            fits and count.device == device,
            op,
            f"{name} is {count.dtype} {list(count.shape)} on {count.device}; expected contiguous int32 [{num_rows}] on "
            f"{device}",
        )
        counts.append(count)
    output_ids = torch.empty((num_rows, num_draft + 1), dtype=torch.int32, device=device)
    state, *seed_and_offset = _random(op, device, generator, seed, offset, 8 + 4 * -(-num_draft // 2))
    launch(
        draft_probs.data_ptr(),
        target_probs.data_ptr(),
        draft_token_ids.data_ptr(),
        output_ids.data_ptr(),
        counts[0].data_ptr(),
        counts[1].data_ptr(),
        0 if state is None else state.data_ptr(),
        *seed_and_offset,
    )
    return output_ids, counts[0], counts[1]


# ----------------------------------------------------------------------------------------------------------- one launch

_Launch = Callable[..., None]
_memo: _op.Memo[_Launch] = _op.Memo()
_NO_FILTER: tuple[Number, Number, Number] = (0, 1.0, 0.0)  # top_k (unread), top_p, min_p
_WORDS_PER_SAMPLE = 8  # Philox words a row consumes


def _signature(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.get_device()


def _normalize(
    op: str,
    kernel_op: str,
    input: torch.Tensor,
    top_k: PerRow,
    top_p: PerRow,
    temperature: PerRow,
    enable_pdl: Optional[bool] = None,
) -> torch.Tensor:
    out = torch.empty(input.shape, dtype=torch.float32 if kernel_op == "softmax" else input.dtype, device=input.device)
    if torch.compiler.is_dynamo_compiling():
        _compiled_normalize(op, kernel_op, input, *_split(top_k), *_split(top_p), *_split(temperature), enable_pdl, out)
    else:
        _normalize_into(op, kernel_op, input, top_k, top_p, temperature, enable_pdl, out)
    return out


def _normalize_into(
    op: str,
    kernel_op: str,
    input: torch.Tensor,
    top_k: PerRow,
    top_p: PerRow,
    temperature: PerRow,
    enable_pdl: Optional[bool],
    out: torch.Tensor,
) -> None:
    key = (op, enable_pdl, *_signature(input))
    launch = _memo.get(key)
    if launch is None:
        launch = _memo.remember(key, _prepare(op, "normalize_row", {"op": kernel_op}, input, None, bool(enable_pdl)))
    num_rows = input.shape[0]
    k_value, k_tensor = _per_row(op, "top_k", top_k, 0, num_rows, input)
    p_value, p_tensor = _per_row(op, "top_p", top_p, 1.0, num_rows, input)
    t_value, t_tensor = _per_row(op, "temperature", temperature, 1.0, num_rows, input)
    launch(
        input.data_ptr(), out.data_ptr(), 0, 0, None, k_tensor, p_tensor, None, t_tensor, 0, 0, 0,
        k_value, p_value, 0.0, t_value, 0,
    )  # fmt: skip


def _sample(
    op: str,
    kind: str,
    filter: str,
    input: torch.Tensor,
    top_k: PerRow,
    top_p: PerRow,
    min_p: PerRow,
    top_k_first: bool,
    options: tuple[Any, ...],
) -> Samples:
    indices, generator, check_nan, seed, offset, return_valid = options
    num_rows = input.shape[0] if indices is None else indices.shape[0]
    token_ids = torch.empty(num_rows, dtype=torch.int32, device=input.device)
    valid = torch.empty(num_rows, dtype=torch.bool, device=input.device) if return_valid else None
    if torch.compiler.is_dynamo_compiling():
        if generator is not None:
            raise ValueError(f"{op}: torch.compile cannot trace a generator; leave it out, or pass seed and offset")
        split = (*_split(top_k), *_split(top_p), *_split(min_p), top_k_first)
        start = (*_split(seed), *_split(offset))
        _compiled_sample(op, kind, filter, input, *split, indices, check_nan, *start, token_ids, valid)
    else:
        filters, random = (top_k, top_p, min_p, top_k_first), (generator, seed, offset)
        _sample_into(op, kind, filter, input, filters, indices, check_nan, random, token_ids, valid)
    return token_ids if valid is None else (token_ids, valid)


def _sample_into(
    op: str,
    kind: str,
    filter: str,
    input: torch.Tensor,
    filters: tuple[PerRow, PerRow, PerRow, bool],
    indices: Optional[torch.Tensor],
    check_nan: bool,
    random: tuple[Optional[torch.Generator], Seed, Seed],
    token_ids: torch.Tensor,
    valid: Optional[torch.Tensor],
) -> None:
    """filters: top_k, top_p, min_p, top_k_first; random: generator, seed, offset."""
    top_k, top_p, min_p, top_k_first = filters
    key = (op, *_signature(input), None if indices is None else _signature(indices))
    launch = _memo.get(key)
    if launch is None:
        args = {"input": kind, "filter": filter}
        launch = _memo.remember(key, _prepare(op, "sample_row", args, input, indices, False))
    if check_nan and bool(torch.isnan(input).any()):
        raise ValueError(f"{op}: the input holds NaN; find where the {kind} come from, or pass check_nan=False")
    num_rows = token_ids.shape[0]
    k_value, p_value, m_value = _NO_FILTER
    k_tensor = p_tensor = m_tensor = None
    if top_k is not None:
        k_value, k_tensor = _per_row(op, "top_k", top_k, 0, num_rows, input)
    if top_p is not None:
        p_value, p_tensor = _per_row(op, "top_p", top_p, 1.0, num_rows, input)
    if min_p is not None:
        m_value, m_tensor = _per_row(op, "min_p", min_p, 0.0, num_rows, input)
    state, seed_value, offset_value = _random(op, input.device, *random, _WORDS_PER_SAMPLE)
    launch(
        input.data_ptr(), 0, token_ids.data_ptr(), 0 if valid is None else valid.data_ptr(), indices,
        k_tensor, p_tensor, m_tensor, None, 0 if state is None else state.data_ptr(), seed_value, offset_value,
        k_value, p_value, m_value, 1.0, top_k_first,
    )  # fmt: skip


def _split(value: Union[torch.Tensor, Number, None]) -> tuple[Optional[torch.Tensor], Optional[Number]]:
    """(tensor, None) or (None, number): a library operator takes the two as arguments of their own."""
    return (value, None) if isinstance(value, torch.Tensor) else (None, value)


def _join(pairs: tuple[Any, ...]) -> Any:
    """The inverse of `_split` over consecutive pairs."""
    return tuple(number if tensor is None else tensor for tensor, number in zip(pairs[::2], pairs[1::2]))


_compiled_normalize = _op.compiled_op(
    "normalize_rows(str op, str kernel_op, Tensor input, Tensor? top_k, int? top_k_value, Tensor? top_p, "
    "float? top_p_value, Tensor? temperature, float? temperature_value, bool? enable_pdl, Tensor(a!) out) -> ()",
    lambda op, kernel_op, input, *rest: _normalize_into(op, kernel_op, input, *_join(rest[:6]), *rest[6:]),
)
_compiled_sample = _op.compiled_op(
    "sample_rows(str op, str kind, str filter, Tensor input, Tensor? top_k, int? top_k_value, Tensor? top_p, "
    "float? top_p_value, Tensor? min_p, float? min_p_value, bool top_k_first, Tensor? indices, bool check_nan, "
    "Tensor? seed, int? seed_value, Tensor? offset, int? offset_value, Tensor(a!) token_ids, Tensor(b!)? valid) -> ()",
    lambda op, kind, filter, input, *rest: _sample_into(
        op,
        kind,
        filter,
        input,
        (*_join(rest[:6]), rest[6]),
        rest[7],
        rest[8],
        (None, *_join(rest[9:13])),
        rest[13],
        rest[14],
    ),
)


def _prepare(
    op: str, family: str, args: dict[str, Any], input: torch.Tensor, indices: Optional[torch.Tensor], pdl: bool
) -> _Launch:
    dtype = _check_rows(op, input, indices)
    num_rows = input.shape[0] if indices is None else indices.shape[0]
    vocab_size, device_index = input.shape[1], input.get_device()
    if num_rows == 0:
        return lambda *_: None
    machine = target.of_device(input.device)
    keeps_row = args.get("filter") != "none"
    place = kernels.placement(
        dtype, vocab_size, num_rows, _op.num_sms(device_index) if device_index >= 0 else 1, machine, keeps_row
    )
    chosen = kernels.SAMPLE_ROW if family == "sample_row" else kernels.NORMALIZE_ROW
    launcher = resolver().load(chosen.spec(machine, dtype=dtype, **args, **place)).on(device_index, pdl=pdl)
    grid = (num_rows * place["cluster_size"], 1, 1)
    input_stride = input.stride(0)
    current_stream = _op.current_stream
    indices_are_int64 = int(indices is not None and indices.dtype == torch.int64)

    def launch(
        input_ptr: int,
        output_ptr: int,
        token_ids_ptr: int,
        valid_ptr: int,
        indices: Optional[torch.Tensor],
        top_k: Optional[torch.Tensor],
        top_p: Optional[torch.Tensor],
        min_p: Optional[torch.Tensor],
        temperature: Optional[torch.Tensor],
        state_ptr: int,
        seed: int,
        offset: int,
        top_k_value: int,
        top_p_value: float,
        min_p_value: float,
        temperature_value: float,
        top_k_first: bool,
    ) -> None:
        launcher(
            grid,
            current_stream(device_index),
            input_ptr,
            output_ptr,
            token_ids_ptr,
            valid_ptr,
            0 if indices is None else indices.data_ptr(),
            0 if top_k is None else top_k.data_ptr(),
            0 if top_p is None else top_p.data_ptr(),
            0 if min_p is None else min_p.data_ptr(),
            0 if temperature is None else temperature.data_ptr(),
            state_ptr,
            seed,
            offset,
            input_stride,
            vocab_size,  # the output is contiguous
            num_rows,
            vocab_size,
            top_k_value,
            top_p_value,
            min_p_value,
            temperature_value,
            indices_are_int64,
            top_k is not None and top_k.dtype is torch.int64,
            top_k_first,
        )

    return launch


def _prepare_speculative(
    op: str, draft_probs: torch.Tensor, draft_token_ids: torch.Tensor, target_probs: torch.Tensor
) -> _Launch:
    dtype = _check_dtype(op, "draft_probs", draft_probs)
    _op.require_dtype_device(op, "target_probs", target_probs, draft_probs, "draft_probs")
    _op.require_device(op, "draft_token_ids", draft_token_ids, draft_probs, "draft_probs")
    _op.require(
        target_probs.dim() == 3 and target_probs.shape[1] >= 1 and target_probs.shape[2] >= 1,
        op,
        f"target_probs is {list(target_probs.shape)}; expected [num_rows, num_draft + 1, vocab_size]",
    )
    num_rows, num_steps, vocab_size = target_probs.shape
    for name, tensor, expected in (
        ("draft_probs", draft_probs, (num_rows, num_steps - 1, vocab_size)),
        ("draft_token_ids", draft_token_ids, (num_rows, num_steps - 1)),
    ):
        _op.require(
            tensor.shape == expected,
            op,
            f"{name} is {list(tensor.shape)}; expected {list(expected)}, one step less than target_probs",
        )
    _op.require_unit_stride(op, "draft_probs", draft_probs)
    _op.require_unit_stride(op, "target_probs", target_probs)
    if num_rows == 0:
        return lambda *_: None
    machine, device_index = target.of_device(draft_probs.device), draft_probs.get_device()
    num_sms = _op.num_sms(device_index) if device_index >= 0 else 1
    place = kernels.placement(dtype, vocab_size, num_rows, num_sms, machine, keeps_row=False)
    spec = kernels.CHAIN_SPECULATIVE.spec(machine, dtype=dtype, cluster_size=place["cluster_size"])
    launcher = resolver().load(spec).on(device_index)
    grid = (num_rows * place["cluster_size"], 1, 1)
    strides = (*draft_probs.stride()[:2], *target_probs.stride()[:2])

    def launch(*values: int) -> None:
        launcher(grid, _op.current_stream(device_index), *values, *strides, num_rows, num_steps - 1, vocab_size)

    return launch


# ------------------------------------------------------------------------------------------------------------ arguments


def _check_dtype(op: str, name: str, tensor: torch.Tensor) -> str:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UnsupportedConfig(f"{op}: {name} is {tensor.dtype}; expected float32, float16 or bfloat16")
    return dtypes.short_name(tensor.dtype)


def _check_rows(op: str, input: torch.Tensor, indices: Optional[torch.Tensor]) -> str:
    dtype = _check_dtype(op, "the input", input)
    _op.require(
        input.dim() == 2 and input.shape[1] >= 1,
        op,
        f"the input is {list(input.shape)}; expected [num_rows, vocab_size] with at least one token",
    )
    _op.require_unit_stride(op, "the input", input)
    if indices is not None:
        _op.require_device(op, "indices", indices, input)
        _op.require(
            indices.dtype in (torch.int32, torch.int64) and indices.dim() == 1 and indices.is_contiguous(),
            op,
            f"indices is {indices.dtype} {list(indices.shape)}; expected contiguous int32 or int64 [num_rows]",
        )
        _op.require(input.shape[0] > 0 or indices.shape[0] == 0, op, "indices names rows of an empty input")
    return dtype


def _is_top_k_first(op: str, order: str) -> bool:
    _op.require(
        order in ("top_k_first", "joint"), op, f'filter_apply_order is {order!r}; expected "top_k_first" or "joint"'
    )
    return order == "top_k_first"


def _per_row(
    op: str, name: str, value: PerRow, default: Number, num_rows: int, input: torch.Tensor
) -> tuple[Number, Optional[torch.Tensor]]:
    """(number, None), or (default, a tensor the kernel can read: one contiguous entry per row)."""
    if value is None:
        return default, None
    if not isinstance(value, torch.Tensor):
        # A count beyond int32 keeps all, as does any beyond the vocabulary.
        return (min(max(int(value), 1), 0x7FFFFFFF) if name == "top_k" else float(value)), None
    wanted = (torch.int32, torch.int64) if name == "top_k" else (torch.float32,)
    if value.dtype not in wanted:
        value = value.to(wanted[0])
    if value.numel() == 1 and num_rows != 1:
        value = value.reshape(1).expand(num_rows).contiguous()
    _op.require(
        value.numel() == num_rows,
        op,
        f"{name} is a tensor {list(value.shape)}; expected a number or [{num_rows}], one entry per output row",
    )
    _op.require_device(op, name, value, input)
    return default, value if value.is_contiguous() else value.contiguous()


# ------------------------------------------------------------------------------------------------------- random numbers

_is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
_MASK = 0xFFFFFFFFFFFFFFFF


def _random(
    op: str, device: torch.device, generator: Optional[torch.Generator], seed: Seed, offset: Seed, num_words: int
) -> tuple[Optional[torch.Tensor], int, int]:
    """(state on the device or None, seed, offset) for one launch that consumes `num_words` Philox words a row."""
    if seed is not None or offset is not None:
        if isinstance(seed, torch.Tensor) or isinstance(offset, torch.Tensor):
            parts = [torch.as_tensor(0 if part is None else part, device=device) for part in (seed, offset)]
            return torch.stack([part.reshape(-1)[0].to(torch.int64) for part in parts]), 0, 0
        return None, int(seed or 0) & _MASK, int(offset or 0) & _MASK
    if device.type == "cuda":
        if generator is None:
            generator = torch.cuda.default_generators[device.index]
        elif generator.device.type != "cuda":
            raise _wrong_generator(op, generator, device)
        if _is_capturing():
            # The generator's state lives on the device while a graph is captured: draw our seed there, once a replay.
            return torch.empty(2, dtype=torch.int64, device=device).random_(generator=generator), 0, 0
        position = generator.get_offset()
        generator.set_offset(position + num_words)
        return None, generator.initial_seed(), position
    if generator is not None and generator.device.type != "cpu":
        raise _wrong_generator(op, generator, device)
    return None, int(torch.empty((), dtype=torch.int64).random_(generator=generator).item()), 0


def _wrong_generator(op: str, generator: torch.Generator, device: torch.device) -> ValueError:
    return ValueError(f"{op}: generator is on {generator.device}, the input on {device}; make one for that device")
