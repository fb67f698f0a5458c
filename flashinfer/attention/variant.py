"""The options of one attention call, normalised once."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch

from flashinfer.errors import UnsupportedConfig
from flashinfer.families.rope import frequency_table
from flashinfer.host import checks, constants, traced
from flashinfer.utils import get_alibi_slopes

# upstream's names -> the names of the kernels' axis
POS_ENCODING_MODES = {"NONE": "none", "ROPE_LLAMA": "rope", "ALIBI": "alibi"}
# A window that long hides nothing: no memory holds more rows of KV. Kernels subtract it from positions, of which those
# ahead of the first key are negative, in 32 bits.
_LONGEST = 1 << 30


def require_positive(op: str, name: str, scale: object) -> float:
    """The online softmax keeps the largest product q·k of a row, which is the largest logit under a positive scale
    alone.
    """
    number = _number(op, name, scale)
    if not 0.0 < number < math.inf:
        raise ValueError(
            f"{op}: {name} is {number}; expected a positive number (for a negative one, negate q and the scale)"
        )
    return number


class Overrides(NamedTuple):
    """What a call of run() or forward() gave besides the plan; None keeps what was planned."""

    causal: Optional[bool] = None
    pos_encoding_mode: Optional[str] = None
    window_left: Optional[int] = None
    logits_soft_cap: Optional[float] = None
    sm_scale: Optional[float] = None
    rope_scale: Optional[float] = None
    rope_theta: Optional[float] = None

    @staticmethod
    def of_forward(
        causal: Optional[bool],
        pos_encoding_mode: str,
        window_left: int,
        logits_soft_cap: Optional[float],
        sm_scale: Optional[float],
        rope_scale: Optional[float],
        rope_theta: Optional[float],
        head_dim: int,
    ) -> Overrides:
        """forward() takes every option from its own arguments, defaults included, whatever was planned."""
        return Overrides(
            causal,
            pos_encoding_mode,
            window_left,
            0.0 if logits_soft_cap is None else logits_soft_cap,
            1.0 / math.sqrt(max(head_dim, 1)) if sm_scale is None else sm_scale,
            1.0 if rope_scale is None else rope_scale,
            1e4 if rope_theta is None else rope_theta,
        )


_NONE = Overrides()
TRACED_OVERRIDES = traced.Bundle(  # None, or an Overrides
    (
        *("bool? causal", "str? pos_encoding_mode", "int? window_left", "float? logits_soft_cap"),
        *("float? sm_scale", "float? rope_scale", "float? rope_theta"),
    ),
    lambda overrides: overrides or _NONE,
    lambda *values: None if values == _NONE else Overrides(*values),
)


@dataclass(frozen=True)
class Variant:
    """What happens to a score besides the mask: kinds are compiled into the kernel, values are parameters."""

    pos_encoding: str  # "none", "rope" or "alibi"
    window_left: int  # -1: no window
    logits_soft_cap: float  # 0: none
    sm_scale: float
    rope_scale: float
    rope_theta: float
    has_sinks: bool

    @staticmethod
    def of(
        op: str,
        head_dim: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
        *,
        has_sinks: bool = False,
    ) -> Variant:
        """From the public arguments; None takes the default. Raises UnsupportedConfig, ValueError or TypeError."""
        if not isinstance(pos_encoding_mode, str) or pos_encoding_mode not in POS_ENCODING_MODES:
            known = ", ".join(POS_ENCODING_MODES)
            raise UnsupportedConfig(f"{op}: pos_encoding_mode={pos_encoding_mode!r} is unknown; allowed: {known}")
        checks.integer(op, "head_dim", head_dim, 1)
        window = checks.integer(op, "window_left", window_left, -(1 << 63), (1 << 63) - 1)
        soft_cap = 0.0 if logits_soft_cap is None else checks.real(op, "logits_soft_cap", logits_soft_cap, at_least=0.0)
        return Variant(
            POS_ENCODING_MODES[pos_encoding_mode],
            -1 if window < 0 or window >= _LONGEST else window,
            soft_cap,
            1.0 / math.sqrt(head_dim) if sm_scale is None else require_positive(op, "sm_scale", sm_scale),
            1.0 if rope_scale is None else checks.real(op, "rope_scale", rope_scale, above=0.0),
            1e4 if rope_theta is None else checks.real(op, "rope_theta", rope_theta, above=0.0),
            has_sinks,
        )

    def updated(self, op: str, head_dim: int, overrides: Overrides) -> Variant:
        """This variant with what a call gave besides the plan."""
        arguments: dict[str, Any] = {**vars(self), "pos_encoding_mode": self.pos_encoding_mode}
        del arguments["pos_encoding"]
        given = {name: value for name, value in overrides._asdict().items() if value is not None and name != "causal"}
        return Variant.of(op, head_dim, **{**arguments, **given})

    @property
    def pos_encoding_mode(self) -> str:
        """Upstream's name."""
        return next(mode for mode, kind in POS_ENCODING_MODES.items() if kind == self.pos_encoding)

    @property
    def spec_args(self) -> dict[str, Any]:
        """The part of the variant that selects a kernel."""
        return {
            "pos_encoding": self.pos_encoding,
            "has_window": self.window_left >= 0,
            "has_soft_cap": self.logits_soft_cap > 0,
            "has_sinks": self.has_sinks,
        }

    def values(
        self, num_qo_heads: int, head_dim: int, device: torch.device, qk_scale: float, v_scale: float
    ) -> dict[str, float]:
        """The fields of AttentionParams that hold options."""
        slopes = frequencies = b""
        if self.pos_encoding == "alibi":
            values = get_alibi_slopes(num_qo_heads, torch.device("cpu")).tolist()
            slopes = struct.pack(f"{num_qo_heads}f", *values)
        if self.pos_encoding == "rope":
            frequencies = frequency_table(head_dim, self.rope_scale, self.rope_theta)
        return {
            "alibi_slopes": constants.address_of(slopes, device) if slopes else 0,
            "rope_frequencies": constants.address_of(frequencies, device) if frequencies else 0,
            "window_left": self.window_left,
            "sm_scale": self.sm_scale * qk_scale,
            "v_scale": v_scale,
            "logits_soft_cap": self.logits_soft_cap,
        }


def signature_of_sinks(op: str, sinks: Optional[torch.Tensor]) -> tuple[int, Any]:
    """The address, 0 of none, and what a memo knows the tensor by. Raises TypeError or UnsupportedConfig."""
    if sinks is None:
        return 0, None
    try:
        address = sinks.data_ptr()
    except (AttributeError, RuntimeError):
        checks.require_addresses(op, sinks=sinks)
        raise
    if address < checks.LOWEST_ADDRESS:
        address = checks.low_address(op, "sinks", sinks)
    return address, (sinks.dtype, sinks.shape, sinks.stride(), sinks.device)


def require_sinks(op: str, sinks: torch.Tensor, num_qo_heads: int, device: torch.device) -> None:
    """A logit for each query head, as the kernels read them. Raises ValueError."""
    checks.require_memory(op, sinks=sinks)
    if sinks.shape != (num_qo_heads,) or sinks.dtype != torch.float32 or not sinks.is_contiguous():
        raise ValueError(
            f"{op}: sinks is {sinks.dtype} {list(sinks.shape)} of strides {list(sinks.stride())}; expected "
            f"torch.float32 [{num_qo_heads}], contiguous: a logit for each query head. Next step: convert it once, as "
            "the model is loaded"
        )
    checks.require(sinks.device == device, op, f"sinks is on {sinks.device}; expected {device}, that of q")


def factors(op: str, qk_scales: tuple[object, ...], v_scales: tuple[object, ...]) -> tuple[float, float]:
    """The products of the scales of quantized q and k, and of v; None is 1. Raises where one is a tensor, whose value a
    launch would read once, or where the first is not positive."""
    for scale in (*qk_scales, *v_scales):
        if isinstance(scale, torch.Tensor):
            next_step = "pass scale.item() once, ahead of a capture"
            if scale.dim() > 0 and scale.shape.numel() > 1:
                next_step = "fold the scales of heads into q or its norm, those of values into the output"
            raise UnsupportedConfig(
                f"{op}: a scale is a tensor of shape {list(scale.shape)}; expected a number for all heads, which a "
                f"launch keeps without asking the device. Next step: {next_step}"
            )
    qk = math.prod(1.0 if scale is None else _number(op, "q_scale * k_scale", scale) for scale in qk_scales)
    v = math.prod(1.0 if scale is None else checks.real(op, "v_scale", scale) for scale in v_scales)
    return require_positive(op, "q_scale * k_scale", qk), v


def _number(op: str, name: str, value: object) -> float:
    return value if isinstance(value, float) else checks.real(op, name, value)
