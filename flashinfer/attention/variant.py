# SPDX-License-Identifier: Apache-2.0
"""The options of one attention call, normalised once."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import torch

from flashinfer.errors import UnsupportedConfig
from flashinfer.families.attention.params import DEVICE_SCALES
from flashinfer.families.rope import frequency_table
from flashinfer.host import checks, constants, quant_scale, traced
from flashinfer.utils import get_alibi_slopes
from flashinfer.variants import NO_RANGES, BoundFunction, Function, LaunchFunctions

Functional = Union[Function, BoundFunction]  # of scores or of a mask; without extras, as it is
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
    functions: Optional[LaunchFunctions] = None  # of scores and masks, that a caller wrote

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
        functions: Optional[LaunchFunctions] = None,
    ) -> Variant:
        """From the public arguments; None takes the default. Raises UnsupportedConfig, ValueError or TypeError."""
        if not isinstance(pos_encoding_mode, str) or pos_encoding_mode not in POS_ENCODING_MODES:
            known = ", ".join(POS_ENCODING_MODES)
            raise UnsupportedConfig(f"{op}: pos_encoding_mode={pos_encoding_mode!r} is unknown; allowed: {known}")
        checks.integer(op, "head_dim", head_dim, 1)
        window = checks.integer(op, "window_left", window_left, -(1 << 63), (1 << 63) - 1)
        soft_cap = 0.0 if logits_soft_cap is None else checks.real(op, "logits_soft_cap", logits_soft_cap, at_least=0.0)
        if functions is not None and functions.has_score and (soft_cap > 0 or pos_encoding_mode == "ALIBI"):
            raise UnsupportedConfig(
                f"{op}: variant with pos_encoding_mode={pos_encoding_mode!r}, logits_soft_cap={soft_cap}; expected "
                "neither ALIBI nor a soft cap beside it. Next step: write them into the function (docs/variants.md)"
            )
        return Variant(
            POS_ENCODING_MODES[pos_encoding_mode],
            -1 if window < 0 or window >= _LONGEST else window,
            soft_cap,
            1.0 / math.sqrt(head_dim) if sm_scale is None else require_positive(op, "sm_scale", sm_scale),
            1.0 if rope_scale is None else checks.real(op, "rope_scale", rope_scale, above=0.0),
            1e4 if rope_theta is None else checks.real(op, "rope_theta", rope_theta, above=0.0),
            has_sinks,
            functions,
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
            "variant": "none" if self.functions is None else self.functions.text,
        }

    @property
    def ranges(self) -> tuple[str, bytes]:
        """What a planner takes of the functions."""
        return NO_RANGES if self.functions is None else self.functions.ranges

    def values(self, num_qo_heads: int, head_dim: int, device: torch.device, factors: Factors) -> dict[str, Any]:
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
            "extras": b"" if self.functions is None else self.functions.extras,
            "window_left": self.window_left,
            **factors.values(device),
            "sm_scale": self.sm_scale * factors.qk,
            "v_scale": factors.v,
            "logits_soft_cap": self.logits_soft_cap,
        }


def functions_are_planned(op: str) -> UnsupportedConfig:
    """The error of a single call with functions that torch.compile traces."""
    return UnsupportedConfig(
        f"{op}: variant or mask under torch.compile; expected neither. Next step: plan a wrapper with them ahead of "
        "the compiled code, which may run it"
    )


def signature_of_sinks(op: str, sinks: torch.Tensor) -> tuple[int, Any]:
    """The address, and what a memo knows the tensor by. Raises TypeError or UnsupportedConfig."""
    try:
        address = sinks.data_ptr()
    except (AttributeError, RuntimeError):
        checks.require_addresses(op, sinks=sinks)
        raise
    if address < checks.LOWEST_ADDRESS:
        address = checks.low_address(op, "sinks", sinks)
    return address, (sinks.dtype, sinks.shape, sinks.stride(), sinks.get_device())


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


class DeviceScale(NamedTuple):
    """The address of a scale that only the kernel reads."""

    address: int


GivenScale = quant_scale.Scale  # a number, one float32 on the device, or None: 1
Scale = Union[float, DeviceScale, None]
Scales = tuple[Scale, Scale, Scale]  # of q, k and v


def are_plain(scales: tuple[Any, ...]) -> bool:
    """Whether a launch takes them as they are."""
    return all(scale is None or scale.__class__ is float for scale in scales)


def read_scales(op: str, scales: Mapping[str, GivenScale], device: torch.device) -> tuple[Scale, ...]:
    """What a launch takes of scales by name, without asking the device. Raises ValueError, TypeError or
    UnsupportedConfig."""
    return tuple(_read_scale(op, name, scale, device) for name, scale in scales.items())


def _read_scale(op: str, name: str, scale: GivenScale, device: torch.device) -> Scale:
    if not isinstance(scale, torch.Tensor):
        return None if scale is None else checks.real(op, name, scale)
    if scale.numel() != 1:
        raise UnsupportedConfig(
            f"{op}: {name} is a tensor of shape {list(scale.shape)}; expected one number for all heads. Next step: "
            "fold the scales of heads into q or its norm, those of values into the output"
        )
    quant_scale.check(op, name, scale, device)
    if device.type == "cpu":
        number = checks.real(op, name, scale.item())
        if "v" not in name.split("_"):
            require_positive(op, name, number)
    return DeviceScale(scale.data_ptr())


class Factors(NamedTuple):
    """The products of the scales of q and k, and of v, as far as the host knows them; addresses of the others."""

    qk: float
    v: float
    on_device: tuple[int, int, int] = (0, 0, 0)  # of q, k and v

    @staticmethod
    def of(op: str, q: tuple[Scale, ...], k: tuple[Scale, ...], v: tuple[Scale, ...]) -> Factors:
        """Raises ValueError where the first product is not positive, and UnsupportedConfig for two scales of one tensor
        that are both on the device."""
        (q_known, q_address), (k_known, k_address), (v_known, v_address) = (_split(op, x) for x in (q, k, v))
        qk = math.prod(_number(op, "q_scale * k_scale", scale) for scale in (*q_known, *k_known))
        product = checks.real(
            op, "scale_v * v_scale", math.prod(checks.real(op, "v_scale", scale) for scale in v_known)
        )
        return Factors(require_positive(op, "q_scale * k_scale", qk), product, (q_address, k_address, v_address))

    @property
    def device_scales(self) -> bool:
        return self.on_device != (0, 0, 0)

    def require_known(self, op: str) -> None:
        """Raises UnsupportedConfig for an operator whose kernel does not read scales."""
        if self.device_scales:
            raise UnsupportedConfig(
                f"{op}: a scale is a tensor; expected a number, which a launch keeps. Next step: pass scale.item(), "
                "once, ahead of a capture"
            )

    def values(self, device: torch.device) -> dict[str, int]:
        """The fields of AttentionParams that hold addresses."""
        one = constants.address_of(struct.pack("f", 1.0), device) if self.device_scales else 0
        return dict(zip(DEVICE_SCALES, (address or one for address in self.on_device)))


def _split(op: str, scales: tuple[Scale, ...]) -> tuple[list[float], int]:
    """The factors of one tensor that are known, and the address of one that is not, or 0."""
    addresses = [scale.address for scale in scales if isinstance(scale, DeviceScale)]
    if len(addresses) > 1:
        raise UnsupportedConfig(f"{op}: two scales of one tensor are tensors; expected one. Next step: multiply them")
    return [scale for scale in scales if scale is not None and not isinstance(scale, DeviceScale)], sum(addresses)


def _number(op: str, name: str, value: object) -> float:
    return value if isinstance(value, float) else checks.real(op, name, value)
