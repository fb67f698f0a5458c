# SPDX-License-Identifier: Apache-2.0
"""What serving engines pass and reach for beyond the documented API: arguments of later releases, and private names of
upstream's wrappers. docs/engines.md says which and why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch

from flashinfer.attention.variant import Variant
from flashinfer.errors import UnsupportedConfig
from flashinfer.host import checks

if TYPE_CHECKING:
    from flashinfer.attention.lengths import Lengths
    from flashinfer.attention.plan import Plan

# ------------------------------------------------------------------------------------------------------------ arguments

# Arguments of plan() and run() that say what is known already, or how fast to go.
_HINTS = {
    "non_blocking", "block_tables", "seq_lens", "seq_lens_q", "max_token_per_sequence", "max_sequence_kv",
    "uniform_q_len", "length_aware_schedule", "bf16q_fp8kv_transform_mode", "multi_ctas_kv_counter_buffer",
}  # fmt: skip


@dataclass(frozen=True)
class _Request:
    """An argument that would change the result. None and `neutral` leave it as it is."""

    neutral: object
    what: str
    next_step: str


_MULTI_ITEM = _Request(None, "multi-item scoring", "plan() of prefill takes it, with token_pos_in_items_ptr")
_PLANNED = _Request(-1, "what plan() of another wrapper settles", "pass it to plan() of decode, or of prefill")
_FP4_OUTPUT = _Request(None, "an output in fp4", "quantize the output afterwards")
_RANGES = _Request(None, "a range of keys for each query", "BatchPrefillWithPagedKVCacheWrapper takes a custom_mask")
_FUNCTIONS = _Request(None, "a function of scores or of a mask", "plan() of decode and prefill takes it, no other call")
_OWN_OFFSETS = _Request(None, "rows of v or out at other offsets than those of k and q", "copy them to the same ones")
_REQUESTS = {
    "prefix_len_ptr": _MULTI_ITEM,
    "token_pos_in_items_ptr": _MULTI_ITEM,
    "token_pos_in_items_len": _Request(0, _MULTI_ITEM.what, _MULTI_ITEM.next_step),
    "max_item_len_ptr": _MULTI_ITEM,
    **dict.fromkeys(("variant", "mask"), _FUNCTIONS),
    "v_indptr": _OWN_OFFSETS,
    "o_indptr": _OWN_OFFSETS,
    "fixed_split_size": _PLANNED,
    "disable_split_kv": _Request(False, _PLANNED.what, _PLANNED.next_step),
    "q_len_per_req": _Request(1, _PLANNED.what, _PLANNED.next_step),
    "window_right": _Request(-1, "keys behind the query's position", "BatchPrefillWithPagedKVCacheWrapper takes masks"),
    "sinks": _Request(
        None,
        "attention sinks",
        "run() of decode and prefill takes them; to that of latent attention, merge a state of zeros with the LSE "
        "sink * log2(e) (merge_state)",
    ),
    "kv_cache_sf": _Request(None, "a cache with block scales", "use a cache of fp8 or 16 bits"),
    "ckv_scale_arr": _Request(None, "a scale for each token of the cache", "scale rows before they are appended"),
    "skip_softmax_threshold_scale_factor": _Request(None, "an approximate softmax", "leave it out"),
    "o_sf_scale": _FP4_OUTPUT,
    "o_sf_vec_size": _FP4_OUTPUT,
    "uses_shared_paged_kv_idx": _Request(True, "other pages for values than for keys", "lay them out alike"),
    "bmm1_scale_log2": _Request(None, "a scale times log2(e)", "pass bmm1_scale"),
    "enable_block_sparse_attention": _Request(False, "other pages for each KV head", "call it for each head"),
    "sparse_top_k": _Request(0, "a list of tokens for each query", "use block tables of pages of one token"),
    "causal_seqlens_kv_global": _Request(None, "a cache that several ranks share token by token", "merge_state"),
    "request_order": _Request(None, "requests in another order", "leave it out; the planner orders them"),
    "request_order_plan": _Request(None, "requests in another order", "leave it out; the planner orders them"),
    "variable_window_token_starts": _RANGES,
    "variable_window_token_ends": _RANGES,
    "use_fp16_softmax": _Request(False, "an approximate softmax", "leave it out"),
    "uses_spcompress": _Request(False, "compressed scores", "leave it out"),
    "lse_base": _Request("log2", "an LSE of another base", "multiply it by ln(2)"),
    "lse_layout": _Request("NH", "an LSE of another layout", "transpose it"),
}


def check_later_arguments(op: str, later: dict[str, Any]) -> None:
    """Accept what later releases of upstream added, as far as it asks for nothing that is not here."""
    for name, value in later.items():
        request = _REQUESTS.get(name)
        if request is None:
            if name not in _HINTS:
                raise TypeError(f"{op}: unexpected argument {name!r}")
        elif value is not None and (isinstance(value, torch.Tensor) or value != request.neutral):
            got = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise UnsupportedConfig(
                f"{op}: {name} asks for {request.what}, which is not supported; expected {request.neutral!r}, got "
                f"{got}. Next step: {request.next_step}"
            )


def causal_by_window(op: str, later: dict[str, Any], causal: bool) -> bool:
    """Whether a plan is causal, by `window_right` of later arguments too, which are left without it: a causal mask
    hides all that it could, and without one 0 is causal."""
    right = later.pop("window_right", None)
    if right is None or checks.integer(op, "window_right", right, -1) < 0 or causal:
        return causal
    if right > 0:
        check_later_arguments(op, {"window_right": right})
    return True


# What the C++ of upstream's known variants is called or reads, and the same here.
_KNOWN_VARIANTS: dict[tuple[str, ...], str] = {
    ("sink",): "run(..., sinks=sink), of an fp32 logit for each head",
    ("alibi",): """plan(..., pos_encoding_mode="ALIBI"), or
    @flashinfer.variant(slopes="f32[num_heads]")
    def alibi(score, b, h, q, k, x): return score + x.slopes[h] * (k - q)""",
    ("softcap", "soft_cap", "logits_cap"): """plan(..., logits_soft_cap=cap), or
    @flashinfer.variant(cap="float > 0")
    def soft_cap(score, b, h, q, k, x): return x.cap * tanh(score / x.cap)""",
    ("window", "sliding"): """plan(..., window_left=n), or
    @flashinfer.mask(n=int)
    def window(b, h, q, k, x): return (k <= q) & (q - k <= x.n)""",
    ("mask",): """plan(..., custom_mask=bits), or
    @flashinfer.mask()
    def causal(b, h, q, k): return k <= q""",
    ("sigmoid",): "there is none: these kernels are made of a softmax, which it replaces",
    ("scale",): """plan(..., sm_scale=s), or
    @flashinfer.variant(s=float)
    def scaled(score, b, h, q, k, x): return score * x.s""",
}


def require_no_jit_args(op: str, jit_args: object) -> None:
    """Upstream's C++ does not compile against these kernels; a variant that it is known for is shown in our form."""
    if jit_args is None:
        return
    uri = str(jit_args[0]).lower() if isinstance(jit_args, (list, tuple)) and jit_args else ""
    known = next((ours for words, ours in _KNOWN_VARIANTS.items() if any(word in uri for word in words)), "")
    shown = f"the same here: {known}" if known else "write it in Python: docs/variants.md"
    raise UnsupportedConfig(
        f"{op}: jit_args brings C++ written for upstream's kernels; expected None. Next step: {shown}"
    )


# ---------------------------------------------------------------------------------------------------------------- names


class _PlannedOption:
    """An option under upstream's private name. Reads what was planned; may be assigned nothing else, since a run takes
    its options from the plan."""

    def __init__(self, option: str) -> None:
        self._option = option

    def __get__(self, wrapper: Optional[EngineNames], owner: type) -> Any:
        if wrapper is None:
            return self
        return getattr(self._plan(wrapper).variant, self._option)

    def __set__(self, wrapper: EngineNames, value: Any) -> None:
        plan = self._plan(wrapper)
        old = getattr(plan.variant, self._option)
        if value == old:
            return
        given = Variant.of(wrapper._op_name, plan.shape.head_dim_qk, **{self._option: value})
        if getattr(given, self._option) != old:
            raise UnsupportedConfig(
                f"{wrapper._op_name}: _{self._option} was planned as {old!r} and cannot be assigned; got {value!r}. "
                "Next step: call plan() with it"
            )

    def _plan(self, wrapper: EngineNames) -> Plan:
        if wrapper._plan is None:
            raise AttributeError(f"{wrapper._op_name}: _{self._option} is known after plan()")
        return wrapper._plan


class IndexBuffer:
    """An index tensor under upstream's private name: what the kernels read, the caller's own under use_cuda_graph.
    Engines fill or replace it, and then plan through `_cached_module`."""

    def __init__(self, role: str) -> None:
        self._role = role

    def __get__(self, wrapper: Optional[EngineNames], owner: type) -> Any:
        return self if wrapper is None else wrapper._buffer(self._role)

    def __set__(self, wrapper: EngineNames, value: Optional[torch.Tensor]) -> None:
        wrapper._buffers[self._role] = value


class _CachedModule:
    """Stands for upstream's loaded planner, which engines call with host copies of index tensors after they have filled
    the wrapper's index buffers themselves."""

    def __init__(self, wrapper: EngineNames, plan: Plan) -> None:
        self._wrapper, self._plan = wrapper, plan

    def plan(self, *arguments: Any) -> None:
        """Launch the planner on the wrapper's index buffers, in stream order behind whatever fills them. Of the
        arguments, which are those of upstream's fa2 planner, shapes are compared with those of the plan; the others
        repeat what is in the buffers, or concern upstream's schedule. Engines fill all buffers but for latent
        attention, which takes offsets and lengths from the arguments."""
        op = self._wrapper._op_name
        first, what, expected = self._wrapper._planner_arguments(self._plan)
        given = arguments[first : first + len(expected)]
        if given != expected:
            raise UnsupportedConfig(
                f"{op}: _cached_module.plan() plans anew what plan() described; expected {what} as arguments {first} "
                f"to {first + len(expected) - 1} to be {list(expected)}, got {list(given)}. Next step: call plan()"
            )
        splitting = tuple(arguments[16:18])
        if splitting not in ((), self._plan.splitting[:1], self._plan.splitting):
            raise UnsupportedConfig(
                f"{op}: _cached_module.plan() plans anew what plan() described, with fixed_split_size and "
                f"disable_split_kv {self._plan.splitting}; got {splitting}. Next step: call plan()"
            )
        self._wrapper._plan_by_engine(arguments)


class EngineNames(ABC):
    """Private names of upstream's wrappers that serving engines read, assign or pass back."""

    _op_name: str
    _use_cuda_graph: bool
    _plan: Optional[Plan]
    _lengths: Optional[Lengths]
    _pin_memory_int_workspace_buffer: Optional[torch.Tensor] = None  # schedules are made on the device
    _max_total_num_rows: Optional[int] = None
    _pos_encoding_mode = _PlannedOption("pos_encoding_mode")
    _window_left = _PlannedOption("window_left")
    _logits_soft_cap = _PlannedOption("logits_soft_cap")
    _sm_scale = _PlannedOption("sm_scale")
    _rope_scale = _PlannedOption("rope_scale")
    _rope_theta = _PlannedOption("rope_theta")

    def __init__(self, backend: str) -> None:
        self._backend = "fa2" if backend == "auto" else backend  # whose planner's arguments _cached_module takes
        # Index tensors by role, where they are not those of the last plan: the caller's buffers under use_cuda_graph,
        # and what an engine assigned.
        self._buffers: dict[str, Any] = {}

    def _buffer(self, role: str) -> Any:
        return self._buffers[role] if role in self._buffers else getattr(self._lengths, role, None)

    def _planner_arguments(self, plan: Plan) -> tuple[int, str, tuple[Any, ...]]:
        """Arguments of upstream's planner that must agree with the plan: place of the first, what they are, values."""
        what = "batch size, query heads, KV heads, page size, use_cuda_graph and head dimensions"
        return 7, what, (*plan.shape[:4], self._use_cuda_graph, *plan.shape[4:])

    def _plan_by_engine(self, arguments: tuple[Any, ...]) -> None:
        """Plan again what was planned last; arguments: of upstream's planner."""
        self._plan_from_buffers()

    @property
    def _fixed_batch_size(self) -> int:
        """Under use_cuda_graph; 0 otherwise."""
        return self._buffers["kv_indptr"].numel() - 1 if self._use_cuda_graph else 0

    @property
    def _cached_module(self) -> Optional[_CachedModule]:
        return None if self._plan is None else _CachedModule(self, self._plan)

    @abstractmethod
    def _plan_from_buffers(self) -> None:
        """Plan again what was planned last, for whatever the index buffers hold now."""
