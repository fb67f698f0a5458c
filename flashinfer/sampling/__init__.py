# SPDX-License-Identifier: Apache-2.0
"""Sampling of tokens from logits or probabilities, and the filters that go with it: exact, and without sorting.

Conventions of this module:

- Rows are `[num_rows, vocab_size]` of fp32, fp16 or bf16, unit stride in the last axis, any stride between rows; at
  most 2^24 tokens, 2^28 rows. Arithmetic is fp32. Tokens come back as int32.
- **Filters cut by value.** Top-k keeps every token with fewer than k tokens strictly more probable; top-p keeps every
  token for which the strictly more probable ones weigh less than `top_p` of the whole; min-p keeps what reaches `min_p`
  times the largest. So tokens of equal probability stay or go together (top-k may keep more than k), the most probable
  one always stays, and a token outside the set is never drawn. `top_k >= vocab_size` and `top_p >= 1` keep all.
- **Parameters** (`top_k`, `top_p`, `min_p`, `temperature`) are finite numbers, or tensors with one entry per output row
  (one element stands for all). Beyond the ends of its range a value means the end: `top_k < 1` is 1, `top_p < 0` is 0,
  `min_p > 1` is 1. What stands in tensors is not looked at: there NaN is no limit to top-p, and min-p's strictest.
- **`indices`** `[num_rows]`, int32 or int64, names the input row of each output row; without it they correspond. One
  that names no row is an IndexError where the host looks (on the CPU; elsewhere with FLASHINFER_CHECK_INDICES=1).
  Otherwise nothing is read for it, and there is nothing to draw.
- **Rows with nothing to draw** (all probabilities zero, all logits −inf, a NaN, a probability or logit of +inf) give
  token 0, and `valid` False with `return_valid=True`. `check_nan=True` raises ValueError for NaN instead, at the cost
  of a synchronization, which a CUDA graph cannot hold. Negative probabilities are not looked for: some token is drawn.
- **Random numbers** are Philox words of (seed, row, offset). On CUDA, seed and offset are the generator's, whose offset
  advances as PyTorch's own kernels advance it; in a CUDA graph they are drawn by a kernel of the graph, so that each
  replay draws anew. Under torch.compile a generator moves on as in eager calls. Equal states give equal tokens on equal
  devices; sums have a fixed order, so `deterministic=False` is no faster and changes nothing. A row consumes 8 words of
  the offset: top-p on CUDA, which may need several attempts at a token, takes them from subsequences
  `row + 2^32 * attempt`.
- **`seed` and `offset`** replace the generator; one without the other takes that as 0. Each is a number of 64 bits (a
  seed may be negative, an offset is a multiple of 4), or a tensor of an integer type on the device, of one element or
  `[num_rows]`. Tensors are read when the kernel runs: a captured call draws anew once their values have changed.

No function here synchronizes with the device unless `check_nan` asks for it.
"""

from __future__ import annotations

from typing import Optional, Union

import torch

from flashinfer.sampling.launch import Samples, normalize, sample
from flashinfer.sampling.randomness import Seed
from flashinfer.sampling.speculate import speculate

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


# ----------------------------------------------------------------------------------------------------------- whole rows


def softmax(
    logits: torch.Tensor, temperature: Union[torch.Tensor, float, None] = None, enable_pdl: Optional[bool] = None
) -> torch.Tensor:
    """`softmax(logits / temperature)` over the last axis, in one reading and one writing of the row.

    Args:
        logits: `[num_rows, vocab_size]`.
        temperature: positive number or `[num_rows]` tensor; 1 when None. The smallest leave the largest logit alone.
        enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).

    Returns:
        Probabilities, `[num_rows, vocab_size]` fp32. A row of −inf, or with NaN or +inf, becomes NaN, as does one whose
        temperature in a tensor is not positive.

    Raises:
        ValueError: a shape, dtype, device, stride or number does not fit.
        TypeError: an argument is of another kind altogether.
        UnsupportedConfig: no kernel for this dtype or device.
    """
    return normalize("softmax", logits, temperature=temperature, pdl=enable_pdl)


def top_p_renorm_probs(
    probs: torch.Tensor, top_p: Union[torch.Tensor, float], is_deterministic: bool = False
) -> torch.Tensor:
    """Keep each row's top-p set and scale it to sum 1; zero elsewhere.

    Args:
        probs: `[num_rows, vocab_size]`.
        top_p: number or `[num_rows]` tensor.
        is_deterministic: accepted for compatibility; the result is always deterministic.

    Returns:
        Shape and dtype of probs. A row of zeros stays zero, a row with NaN or infinity becomes NaN.

    Raises: as `softmax`.
    """
    return normalize("top_p_renorm_probs", probs, top_p=top_p)


def top_k_renorm_probs(
    probs: torch.Tensor, top_k: Union[torch.Tensor, int], is_deterministic: bool = False
) -> torch.Tensor:
    """Keep each row's top-k set and scale it to sum 1; zero elsewhere. Otherwise as `top_p_renorm_probs`.

    The result is deterministic, whatever is_deterministic says.
    """
    return normalize("top_k_renorm_probs", probs, top_k=top_k)


def top_k_mask_logits(logits: torch.Tensor, top_k: Union[torch.Tensor, int]) -> torch.Tensor:
    """Set every logit outside its row's top-k set to −inf. NaN counts as outside.

    Args:
        logits: `[num_rows, vocab_size]`.
        top_k: number or `[num_rows]` tensor.

    Returns:
        Shape and dtype of logits.

    Raises: as `softmax`.
    """
    return normalize("top_k_mask_logits", logits, top_k=top_k)


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
        ValueError: a shape, dtype, device, stride or number does not fit, or `check_nan` found NaN.
        TypeError: an argument is of another kind altogether.
        IndexError: an index names no row (see the module).
        UnsupportedConfig: no kernel for this dtype or device.
    """
    return sample("sampling_from_logits", logits, indices, generator, check_nan, seed, offset, return_valid)


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
    return sample("sampling_from_probs", probs, indices, generator, check_nan, seed, offset, return_valid)


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
    return sample(
        "top_p_sampling_from_probs", probs, indices, generator, check_nan, seed, offset, return_valid, top_p=top_p
    )


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
    return sample(
        "top_k_sampling_from_probs", probs, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k
    )


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
    return sample(
        "min_p_sampling_from_probs", probs, indices, generator, check_nan, seed, offset, return_valid, min_p=min_p
    )


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
    return sample(
        op, logits, indices, generator, check_nan, seed, offset, return_valid, top_k, top_p, top_k_first=top_k_first
    )


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
    return sample(
        op, probs, indices, generator, check_nan, seed, offset, return_valid, top_k, top_p, top_k_first=top_k_first
    )


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
        draft_token_ids: `[num_rows, num_draft]` int32 or int64 (other integers are converted); an id outside the
            vocabulary fails.
        target_probs: `[num_rows, num_draft + 1, vocab_size]`, dtype of draft_probs.
        maybe_output_accepted_token_num: `[num_rows]` int32, added to in place; zeros when None.
        maybe_output_emitted_draft_token_num: likewise, in memory of its own.
        deterministic, generator, seed, offset: see the module.

    Returns:
        `(output_token_ids, accepted, emitted)`: tokens `[num_rows, num_draft + 1]` int32, −1 behind the last one; the
        number of draft tokens that pass their own test, whether or not one before them failed; and the number of draft
        tokens emitted, which leaves out the one drawn last. A row whose target holds NaN or no weight draws token 0.

    Raises: as `sampling_from_logits`.
    """
    counts = maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num
    op = "chain_speculative_sampling"
    return speculate(op, draft_probs, draft_token_ids, target_probs, *counts, generator, seed, offset)


def _is_top_k_first(op: str, order: str) -> bool:
    if order == "top_k_first":
        return True
    if order == "joint":
        return False
    raise ValueError(f'{op}: filter_apply_order is {order!r:.60}; expected "top_k_first" or "joint"')
