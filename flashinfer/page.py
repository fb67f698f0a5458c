"""Paged KV cache: appending keys and values, and the indices that say where they go.

A paged cache is one 5-D tensor with K and V on dim 1, or a `(k_cache, v_cache)` pair of 4-D tensors; `"NHD"` is
`[num_pages, page_size, num_kv_heads, head_dim]`, `"HND"` swaps the two middle axes. Any strides do, as long as the
last axis is dense.
"""

from __future__ import annotations

from typing import Any, Optional

import torch

from flashinfer import dtypes, target
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import page as families
from flashinfer.host import checks, memo, quant_scale, traced
from flashinfer.host.checks import check_index
from flashinfer.host.paged_cache import (
    PagedCache,
    cache_addresses,
    cache_signature,
    cache_strides,
    check_cache,
    check_conversion,
    check_scales,
    check_slots,
    head_strides,
    split_cache,
)
from flashinfer.host.quant_scale import Scale
from flashinfer.host.rows import alignment_of
from flashinfer.jit import default_resolver
from flashinfer.jit.loader import PreparedLaunch

__all__ = [
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "get_batch_indices_positions",
    "get_seq_lens",
]


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: Optional[torch.Tensor],
    kv_layout: str = "NHD",
    *,
    k_scale: Scale = None,
    v_scale: Scale = None,
    enable_pdl: Optional[bool] = None,
) -> None:
    """Write rows of keys and values to their slots in a paged cache.

    Row `i` goes to slot `positions[i] % page_size` of page `kv_indices[kv_indptr[b] + positions[i] // page_size]`, with
    `b = batch_indices[i]`. Rows with `b` outside `[0, batch_size)`, a negative position, or a position past the
    request's last page are
    padding: they are skipped, so a captured CUDA graph may be replayed with fewer rows.

    Args:
        append_key: `[nnz, num_kv_heads, head_dim]`.
        append_value: `[nnz, num_kv_heads, head_dim_v]`.
        batch_indices: `[nnz]`, int32 or int64; the request of each row.
        positions: `[nnz]`, dtype of batch_indices; the row's position in its request, counted from 0.
        paged_kv_cache: see the module's docstring; the dtype of append_key, or fp8, to which fp16, bf16 and fp32 rows
            are converted.
        kv_indices: page numbers of all requests, one after the other, int32 or int64; may be longer than needed.
        kv_indptr: `[batch_size + 1]`, dtype of kv_indices; where each request's pages start in kv_indices.
        kv_last_page_len: accepted for compatibility; positions already say where rows go.
        kv_layout: "NHD" or "HND".
        k_scale, v_scale: an fp8 cache holds `key / k_scale` and `value / v_scale`, rounded to nearest even and
            saturated; a number, or an fp32 tensor of one element on the same device. Only where rows are converted.
        enable_pdl: programmatic dependent launch; None: where the hardware has it (sm_90 and later).

    Raises:
        ValueError: a shape, dtype, device or stride does not fit.
        UnsupportedConfig: no kernel for these dtypes or head dimensions.
    """
    if torch.compiler.is_dynamo_compiling():
        pair = (paged_kv_cache, None) if isinstance(paged_kv_cache, torch.Tensor) else paged_kv_cache
        slots = (batch_indices, positions, kv_indices, kv_indptr)
        scales = (*quant_scale.split(k_scale), *quant_scale.split(v_scale))
        _compiled_append(append_key, append_value, *slots, *pair, kv_layout, *scales, enable_pdl)
        return
    key = (
        kv_layout,
        enable_pdl,
        memo.signature(append_key),
        memo.signature(append_value),
        memo.signature(batch_indices),
        memo.signature(positions),
        cache_signature(paged_kv_cache),
        memo.signature(kv_indices),
        memo.signature(kv_indptr),
        quant_scale.signature(k_scale),
        quant_scale.signature(v_scale),
    )
    key_ptr, value_ptr = append_key.data_ptr(), append_value.data_ptr()
    key_cache_ptr, value_cache_ptr = cache_addresses(paged_kv_cache)
    alignment = (key_ptr | value_ptr | key_cache_ptr | value_cache_ptr) & 15
    launch = _memo.get((key, alignment))
    if launch is None:
        op = "append_paged_kv_cache"
        k_cache, v_cache = split_cache(op, paged_kv_cache, kv_layout)
        check_scales(op, k_scale, v_scale, append_key, k_cache)
        checks.require(
            append_key.dim() == 3,
            op,
            f"append_key has shape {list(append_key.shape)}; expected [nnz, num_kv_heads, head_dim]",
        )
        checks.require(
            append_value.dim() == 3,
            op,
            f"append_value has shape {list(append_value.shape)}; expected [nnz, num_kv_heads, head_dim]",
        )
        launch = _prepare_append(
            op,
            (append_key, append_value),
            (k_cache, v_cache),
            (batch_indices, positions, kv_indices, kv_indptr),
            enable_pdl,
        )
        _memo.remember((key, alignment), launch)
    launch(
        key_ptr,
        value_ptr,
        key_cache_ptr,
        value_cache_ptr,
        *quant_scale.values(k_scale),
        *quant_scale.values(v_scale),
        batch_indices.data_ptr(),
        positions.data_ptr(),
        kv_indices.data_ptr(),
        kv_indptr.data_ptr(),
    )


def append_paged_mla_kv_cache(
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    ckv_cache: Optional[torch.Tensor],
    kpe_cache: Optional[torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: Optional[torch.Tensor],
) -> None:
    """Write rows of compressed KV and of its rotary part (multi-head latent attention, DeepSeek-V2) to a paged cache.

    Args:
        append_ckv: `[nnz, ckv_dim]`.
        append_kpe: `[nnz, kpe_dim]`.
        ckv_cache: `[num_pages, page_size, ckv_dim]`, or None: compressed KV is not stored.
        kpe_cache: `[num_pages, page_size, kpe_dim]`, or None: the rotary part is not stored. Both may be slices of
            one tensor.
        batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len: as in `append_paged_kv_cache`, as are
            padding and errors.
    """
    if torch.compiler.is_dynamo_compiling():
        slots = (batch_indices, positions, kv_indices, kv_indptr)
        _compiled_append_mla(append_ckv, append_kpe, *slots, ckv_cache, kpe_cache)
        return
    key = (
        "mla",
        memo.signature(append_ckv),
        memo.signature(append_kpe),
        memo.signature(batch_indices),
        memo.signature(positions),
        None if ckv_cache is None else memo.signature(ckv_cache),
        None if kpe_cache is None else memo.signature(kpe_cache),
        memo.signature(kv_indices),
        memo.signature(kv_indptr),
    )
    ckv_ptr, kpe_ptr = append_ckv.data_ptr(), append_kpe.data_ptr()
    ckv_cache_ptr = 0 if ckv_cache is None else ckv_cache.data_ptr()
    kpe_cache_ptr = 0 if kpe_cache is None else kpe_cache.data_ptr()
    alignment = (ckv_ptr | kpe_ptr | ckv_cache_ptr | kpe_cache_ptr) & 15
    launch = _memo.get((key, alignment))
    if launch is None:
        op = "append_paged_mla_kv_cache"
        for name, rows, cache in (("ckv", append_ckv, ckv_cache), ("kpe", append_kpe, kpe_cache)):
            checks.require(
                rows.dim() == 2, op, f"append_{name} has shape {list(rows.shape)}; expected [nnz, {name}_dim]"
            )
            checks.require(
                cache is None or cache.dim() == 3,
                op,
                f"{name}_cache does not have three dimensions; expected [num_pages, page_size, {name}_dim]",
            )
        checks.require(
            ckv_cache is not None or kpe_cache is not None,
            op,
            "ckv_cache and kpe_cache are both None; pass at least one",
        )
        launch = _prepare_append(
            op,
            (append_ckv.unsqueeze(1), append_kpe.unsqueeze(1)),
            (
                None if ckv_cache is None else ckv_cache.unsqueeze(2),
                None if kpe_cache is None else kpe_cache.unsqueeze(2),
            ),
            (batch_indices, positions, kv_indices, kv_indptr),
            None,
        )
        _memo.remember((key, alignment), launch)
    launch(
        ckv_ptr,
        kpe_ptr,
        ckv_cache_ptr,
        kpe_cache_ptr,
        *quant_scale.NO_VALUES,
        *quant_scale.NO_VALUES,
        batch_indices.data_ptr(),
        positions.data_ptr(),
        kv_indices.data_ptr(),
        kv_indptr.data_ptr(),
    )


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: Optional[torch.Tensor] = None,
    positions: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The request and the position of every row of a ragged batch.

    Args:
        append_indptr: `[batch_size + 1]`, int32 or int64; where each request's rows start.
        seq_lens: `[batch_size]`; length of each request with the appended rows, which are its last ones.
        nnz: rows to fill in; may exceed `append_indptr[-1]` (a padded batch).
        batch_indices, positions: `[nnz]` int32 outputs; allocated when None.

    Returns:
        `(batch_indices, positions)`, int32, `[nnz]`. Row `i` of request `b` has position
        `seq_lens[b] - append_indptr[b + 1] + i`. Rows past `append_indptr[-1]` get batch index -1, which
        `append_paged_kv_cache` skips, and position 0.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if batch_indices is None:
        batch_indices = torch.empty(nnz, dtype=torch.int32, device=append_indptr.device)
    if positions is None:
        positions = torch.empty(nnz, dtype=torch.int32, device=append_indptr.device)
    if seq_lens.dtype != append_indptr.dtype:
        seq_lens = seq_lens.to(append_indptr.dtype)
    if torch.compiler.is_dynamo_compiling():
        _compiled_positions(append_indptr, seq_lens, nnz, batch_indices, positions)
    else:
        _run_positions(append_indptr, seq_lens, nnz, batch_indices, positions)
    return batch_indices, positions


def _run_positions(
    append_indptr: torch.Tensor, seq_lens: torch.Tensor, nnz: int, batch_indices: torch.Tensor, positions: torch.Tensor
) -> None:
    op = "get_batch_indices_positions"
    key = (
        op,
        memo.signature(append_indptr),
        memo.signature(seq_lens),
        memo.signature(batch_indices),
        memo.signature(positions),
        nnz,
    )
    launch = _memo.get(key)
    if launch is None:
        batch_size = seq_lens.shape[0]
        check_index(op, "append_indptr", append_indptr, batch_size + 1)
        check_index(op, "seq_lens", seq_lens, batch_size)
        for name, tensor in (("batch_indices", batch_indices), ("positions", positions)):
            check_index(op, name, tensor, nnz)
            checks.require(tensor.dtype == torch.int32, op, f"{name} is {tensor.dtype}; expected torch.int32")
            checks.require_device(op, name, tensor, append_indptr, "append_indptr")
        checks.require_device(op, "seq_lens", seq_lens, append_indptr, "append_indptr")
        counts = {"num_tokens": nnz, "batch_size": batch_size}
        launch = _memo.remember(key, _prepare_index(families.TOKEN_POSITIONS, append_indptr, nnz, counts))
    launch(append_indptr.data_ptr(), seq_lens.data_ptr(), batch_indices.data_ptr(), positions.data_ptr())


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Length of every request of a paged cache.

    Args:
        kv_indptr: `[batch_size + 1]`, int32 or int64; where each request's pages start.
        kv_last_page_len: `[batch_size]`; entries used in each request's last page.
        page_size: entries of a page.

    Returns:
        `[batch_size]` int32: `(num_pages - 1) * page_size + kv_last_page_len`, and 0 for a request without pages.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if kv_last_page_len.dtype != kv_indptr.dtype:
        kv_last_page_len = kv_last_page_len.to(kv_indptr.dtype)
    seq_lens = torch.empty(kv_last_page_len.shape, dtype=torch.int32, device=kv_indptr.device)
    if torch.compiler.is_dynamo_compiling():
        _compiled_seq_lens(kv_indptr, kv_last_page_len, page_size, seq_lens)
    else:
        _run_seq_lens(kv_indptr, kv_last_page_len, page_size, seq_lens)
    return seq_lens


def _run_seq_lens(
    kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int, seq_lens: torch.Tensor
) -> None:
    op = "get_seq_lens"
    key = (op, memo.signature(kv_indptr), memo.signature(kv_last_page_len), page_size)
    launch = _memo.get(key)
    if launch is None:
        batch_size = kv_last_page_len.shape[0]
        check_index(op, "kv_indptr", kv_indptr, batch_size + 1)
        check_index(op, "kv_last_page_len", kv_last_page_len, batch_size)
        checks.require_device(op, "kv_last_page_len", kv_last_page_len, kv_indptr, "kv_indptr")
        counts = {"batch_size": batch_size, "page_size": page_size}
        launch = _memo.remember(key, _prepare_index(families.SEQ_LENS, kv_indptr, batch_size, counts))
    launch(kv_indptr.data_ptr(), kv_last_page_len.data_ptr(), seq_lens.data_ptr())


# ------------------------------------------------------------------------------------------------------ torch.compile


def _run_compiled_append(*arguments: Any) -> None:
    key, value, batch_indices, positions, kv_indices, kv_indptr, k_cache, v_cache, kv_layout = arguments[:9]
    append_paged_kv_cache(
        key,
        value,
        batch_indices,
        positions,
        k_cache if v_cache is None else (k_cache, v_cache),
        kv_indices,
        kv_indptr,
        None,
        kv_layout,
        k_scale=quant_scale.join(*arguments[9:11]),
        v_scale=quant_scale.join(*arguments[11:13]),
        enable_pdl=arguments[13],
    )


_SLOTS = "Tensor batch_indices, Tensor positions, Tensor kv_indices, Tensor kv_indptr"
_compiled_append = traced.compiled_op(
    f"append_paged_kv(Tensor key, Tensor value, {_SLOTS}, Tensor(a!) k_cache, Tensor(b!)? v_cache, str kv_layout, "
    f"{quant_scale.SCHEMA.format('k_scale')}, {quant_scale.SCHEMA.format('v_scale')}, bool? pdl) -> ()",
    _run_compiled_append,
)
_compiled_append_mla = traced.compiled_op(
    f"append_paged_mla_kv(Tensor ckv, Tensor kpe, {_SLOTS}, Tensor(a!)? ckv_cache, Tensor(b!)? kpe_cache) -> ()",
    lambda ckv, kpe, batch_indices, positions, kv_indices, kv_indptr, ckv_cache, kpe_cache: append_paged_mla_kv_cache(
        ckv, kpe, batch_indices, positions, ckv_cache, kpe_cache, kv_indices, kv_indptr, None
    ),
)
_compiled_positions = traced.compiled_op(
    "batch_indices_positions(Tensor append_indptr, Tensor seq_lens, int nnz, Tensor(a!) batch_indices, "
    "Tensor(b!) positions) -> ()",
    _run_positions,
)
_compiled_seq_lens = traced.compiled_op(
    "seq_lens(Tensor kv_indptr, Tensor kv_last_page_len, int page_size, Tensor(a!) seq_lens) -> ()", _run_seq_lens
)


# ---------------------------------------------------------------------------------------------------- prepared launches

_memo: memo.Memo[PreparedLaunch] = memo.Memo()


def _prepare_append(
    op: str,
    rows: tuple[torch.Tensor, torch.Tensor],
    both_caches: tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
    slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    pdl: Optional[bool],
) -> PreparedLaunch:
    """Rows `[nnz, num_heads, dim]` of keys and values to caches `[num_pages, page_size, num_heads, dim]`.

    slots: batch_indices, positions, kv_indices, kv_indptr.
    """
    (key, value), (key_cache, value_cache) = rows, both_caches
    checks.require_dtype_device(op, "the values", value, key, "the keys")
    checks.require(
        value.shape[:2] == key.shape[:2],
        op,
        f"keys and values have shapes {list(key.shape)} and {list(value.shape)}; expected the same rows and heads",
    )
    slot_axes = check_slots(op, key, *slots)
    caches = [cache for cache in (key_cache, value_cache) if cache is not None]
    for name, tensor, cache in (("key", key, key_cache), ("value", value, value_cache)):
        checks.require_unit_stride(op, f"the {name} rows", tensor)
        if cache is not None:
            check_cache(op, name, tensor, cache, caches[0])
    num_tokens, num_heads = key.shape[:2]
    page_size, batch_size = caches[0].shape[1], slots[3].shape[0] - 1
    if num_tokens == 0 or batch_size == 0 or caches[0].numel() == 0:
        return lambda *_: None

    device_index = key.get_device()
    key_dim, value_dim = key.shape[2], value.shape[2]
    dtype, cache_dtype = dtypes.short_name(key.dtype), dtypes.short_name(caches[0].dtype)
    check_conversion(op, dtype, cache_dtype)
    # A vector is read in one type and written in another: each side must be aligned for its own.
    lengths = (key_dim, value_dim)
    vec = min(
        families.vec_size(dtype, lengths, alignment_of(key, value)),
        families.vec_size(cache_dtype, lengths, alignment_of(*caches)),
    )
    if device_index >= 0 and (key_dim + value_dim) // vec > 1024:
        raise UnsupportedConfig(
            f"{op}: {key_dim} + {value_dim} elements in vectors of {vec} need more than 1024 threads; align the rows"
        )
    heads_per_thread = families.heads_per_thread(num_heads)
    kernel = default_resolver().load(
        families.APPEND_PAGED_KV.spec(
            target.of_device(key.device),
            dtype=dtype,
            cache_dtype=cache_dtype,
            key_dim=key_dim,
            value_dim=value_dim,
            vec_size=vec if device_index >= 0 else 1,
            heads_per_thread=heads_per_thread if device_index >= 0 else 1,
            **slot_axes,
        )
    )
    launcher = kernel.on(device_index, pdl=pdl)
    groups_per_block = launcher.config.launch.num_threads // ((key_dim + value_dim) // vec)
    num_groups = num_tokens * -(-num_heads // heads_per_thread)
    return launcher.prepare(
        (-(-num_groups // groups_per_block), 1, 1),
        {
            "slots.batch_size": batch_size,
            "slots.page_size": page_size,
            **head_strides("key_strides", key),
            **head_strides("value_strides", value),
            **cache_strides("key_cache_strides", key_cache),
            **cache_strides("value_cache_strides", value_cache),
            "num_tokens": num_tokens,
            "num_heads": num_heads,
        },
        varying=(
            *("key", "value", "key_cache", "value_cache"),
            *quant_scale.names("key_scale"),
            *quant_scale.names("value_scale"),
            *families.SLOT_ADDRESSES,
        ),
    )


def _prepare_index(family: Any, reference: torch.Tensor, num_threads: int, counts: dict[str, int]) -> PreparedLaunch:
    """A launch of one thread per entry, whose parameters are addresses and then `counts`."""
    if num_threads == 0:
        return lambda *_: None
    device_index = reference.get_device()
    spec = family.spec(target.of_device(reference.device), index=str(reference.dtype)[6:])
    launcher = default_resolver().load(spec).on(device_index)
    grid = (-(-num_threads // launcher.config.launch.num_threads), 1, 1)
    addresses = [field[0] for field in launcher.params._fields_ if field[0] not in counts]
    return launcher.prepare(grid, counts, varying=addresses)
