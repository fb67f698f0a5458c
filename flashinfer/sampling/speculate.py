# SPDX-License-Identifier: Apache-2.0
"""Chain speculative sampling: from a call to its launch, one prepared for each signature."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from flashinfer.families import sampling as families
from flashinfer.host import checks, memo, traced
from flashinfer.host.traced import is_dynamo_compiling
from flashinfer.jit.loader import PreparedLaunch
from flashinfer.sampling import randomness
from flashinfer.sampling.launch import check_dtype, check_sizes, kernel, nothing
from flashinfer.sampling.randomness import Seed

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Chain(NamedTuple):
    """What `speculate` takes, in its order: what was drafted, what the target makes of it, where draft tokens are
    counted, and random numbers."""

    draft_probs: torch.Tensor
    draft_token_ids: torch.Tensor
    target_probs: torch.Tensor
    accepted: Optional[torch.Tensor]
    emitted: Optional[torch.Tensor]
    generator: Optional[torch.Generator]
    seed: Seed
    offset: Seed


# As the caller knows them.
_PUBLIC_NAMES = {"accepted": "maybe_output_accepted_token_num", "emitted": "maybe_output_emitted_draft_token_num"}


class _Speculator(NamedTuple):
    launch: PreparedLaunch
    new_token_ids: memo.Allocate
    new_count: memo.Allocate
    num_words: int  # of Philox, a row


_speculators: memo.Memo[_Speculator] = memo.Memo()
_VARYING = (
    *("draft_probs", "target_probs", "draft_ids", "output_ids", "num_accepted", "num_emitted"),
    *randomness.FIELDS,
)


def speculate(
    op: str,
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_probs: torch.Tensor,
    accepted: Optional[torch.Tensor],
    emitted: Optional[torch.Tensor],
    generator: Optional[torch.Generator],
    seed: Seed,
    offset: Seed,
    out: Optional[torch.Tensor] = None,
) -> Triple:
    """Tokens go to `out` if given. Arguments are passed on one by one, as by `sample`."""
    if is_dynamo_compiling():
        chain = Chain(draft_probs, draft_token_ids, target_probs, accepted, emitted, generator, seed, offset)
        return _traced_speculate(op, chain)
    state = words = words_like = None
    if seed is not None or offset is not None:
        state, words_like = randomness.given(op, seed, offset)
    try:
        draft_ptr = draft_probs.data_ptr() or checks.no_address(op, "draft_probs", draft_probs)
        target_ptr = target_probs.data_ptr() or checks.no_address(op, "target_probs", target_probs)
        ids_ptr = draft_token_ids.data_ptr() or checks.no_address(op, "draft_token_ids", draft_token_ids)
        counts_like = None
        if accepted is not None or emitted is not None:
            counts_like = tuple(None if count is None else memo.signature(count) for count in (accepted, emitted))
        key = (
            draft_probs.dtype, draft_probs.shape, draft_probs.stride(), draft_probs.device,
            target_probs.dtype, target_probs.shape, target_probs.stride(),
            target_probs.get_device() if target_ptr else target_probs.device,
            draft_token_ids.dtype, draft_token_ids.shape, draft_token_ids.stride(),
            draft_token_ids.get_device() if ids_ptr else draft_token_ids.device,
            counts_like, words_like,
        )  # fmt: skip
    except AttributeError:
        rows = {"draft_probs": draft_probs, "draft_token_ids": draft_token_ids, "target_probs": target_probs}
        counts = zip(_PUBLIC_NAMES.values(), (accepted, emitted))
        raise checks.not_tensors(op, **rows, **{name: count for name, count in counts if count is not None}) from None
    prepared = _speculators.find(key)
    if prepared is None:
        chain = Chain(draft_probs, draft_token_ids, target_probs, accepted, emitted, generator, seed, offset)
        _check(op, chain)
        readable = _readable(op, chain)
        if readable is not chain:
            return speculate(op, *readable, out)
        prepared = _speculators.remember(key, _prepare(chain))
    launch, new_token_ids, new_count, num_words = prepared
    token_ids = new_token_ids() if out is None else out
    are_given = accepted is not None and emitted is not None
    if accepted is None:
        accepted = new_count()
    if emitted is None:
        emitted = new_count()
    accepted_ptr = accepted.data_ptr() or checks.no_address(op, _PUBLIC_NAMES["accepted"], accepted)
    emitted_ptr = emitted.data_ptr() or checks.no_address(op, _PUBLIC_NAMES["emitted"], emitted)
    if are_given and abs(accepted_ptr - emitted_ptr) < emitted.nbytes:
        raise ValueError(f"{op}: {' and '.join(_PUBLIC_NAMES.values())} share memory; expected a place for each count")
    if state is None:
        state, words = randomness.drawn(op, draft_probs, generator, num_words)
    launch(draft_ptr, target_ptr, ids_ptr, token_ids.data_ptr(), accepted_ptr, emitted_ptr, *state)
    del words  # they were there until now
    return token_ids, accepted, emitted


def _traced_speculate(op: str, chain: Chain) -> Triple:
    shape, device = chain.target_probs.shape[:2], chain.target_probs.device
    accepted, emitted = (
        torch.zeros(shape[0], dtype=torch.int32, device=device) if count is None else count
        for count in (chain.accepted, chain.emitted)
    )
    token_ids = torch.empty(shape, dtype=torch.int32, device=device)
    _door(op, *chain._replace(accepted=accepted, emitted=emitted), token_ids)
    return token_ids, accepted, emitted


_door = traced.door(
    "speculate",
    speculate,
    {
        "op": "str",
        **{"draft_probs": "Tensor", "draft_token_ids": "Tensor", "target_probs": "Tensor"},
        **{"accepted": "Tensor(!)", "emitted": "Tensor(!)", "generator": randomness.GENERATOR},
        **{"seed": randomness.SEED, "offset": traced.INTEGER},
        "out": "Tensor(!)",
    },
)


def _check(op: str, chain: Chain) -> None:
    draft_probs, draft_token_ids, target_probs = chain[:3]
    check_dtype(op, "draft_probs", draft_probs)
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
    check_sizes(op, num_rows, vocab_size)
    device = draft_probs.device
    for name, count in ((_PUBLIC_NAMES["accepted"], chain.accepted), (_PUBLIC_NAMES["emitted"], chain.emitted)):
        if count is not None:
            fits = count.dtype == torch.int32 and count.shape == (num_rows,) and count.is_contiguous()
            checks.require(
                fits and count.device == device,
                op,
                f"{name} is {count.dtype} {list(count.shape)} on {count.device}; expected contiguous int32 "
                f"[{num_rows}] on {device}",
            )


def _readable(op: str, chain: Chain) -> Chain:
    """The same with tensors as a kernel can read them; the same object if they are so already."""
    ids, num_rows = chain.draft_token_ids, chain.target_probs.shape[0]
    is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    checks.require(is_integer, op, f"draft_token_ids is {ids.dtype}; expected an integer type")
    read_ids = (ids if ids.dtype in (torch.int32, torch.int64) else ids.to(torch.int64)).contiguous()
    seed, offset = randomness.readable(op, chain.seed, chain.offset, num_rows, chain.draft_probs)
    if read_ids is ids and seed is chain.seed and offset is chain.offset:
        return chain
    return chain._replace(draft_token_ids=read_ids, seed=seed, offset=offset)


def _prepare(chain: Chain) -> _Speculator:
    draft_probs, draft_token_ids, target_probs = chain[:3]
    num_rows, num_steps, vocab_size = target_probs.shape
    device = draft_probs.device
    launch: PreparedLaunch = nothing
    if num_rows > 0:
        launcher, grid = kernel(families.CHAIN_SPECULATIVE, {}, target_probs, num_rows)
        launch = launcher.prepare(
            grid,
            {
                "draft_row_stride": draft_probs.stride(0),
                "draft_step_stride": draft_probs.stride(1),
                "target_row_stride": target_probs.stride(0),
                "target_step_stride": target_probs.stride(1),
                "num_rows": num_rows,
                "num_draft": num_steps - 1,
                "vocab_size": vocab_size,
                "draft_ids_are_int64": draft_token_ids.dtype is torch.int64,
                "adds_accepted": chain.accepted is not None,
                "adds_emitted": chain.emitted is not None,
                **randomness.per_row(chain.seed, chain.offset),
            },
            varying=_VARYING,
        )
    return _Speculator(
        launch,
        memo.allocator((num_rows, num_steps), torch.int32, device),
        memo.allocator((num_rows,), torch.int32, device),
        8 + 4 * -(-(num_steps - 1) // 2),
    )
