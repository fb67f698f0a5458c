"""The options of one attention call, normalised once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Optional

import torch

from flashinfer.errors import UnsupportedConfig
from flashinfer.utils import get_alibi_slopes

# upstream's names -> the names of the kernels' axis
POS_ENCODING_MODES = {"NONE": "none", "ROPE_LLAMA": "rope", "ALIBI": "alibi"}


def require_positive(op: str, name: str, scale: float) -> float:
    """The online softmax keeps the largest product q·k of a row, which is the largest logit under a positive scale
    alone.
    """
    if not 0.0 < scale < math.inf:
        raise ValueError(
            f"{op}: {name} is {scale}; expected a positive number (for a negative one, negate q and the scale)"
        )
    return scale


@dataclass(frozen=True)
class Variant:
    """What happens to a score besides the mask: kinds are compiled into the kernel, values are parameters."""

    pos_encoding: str  # "none", "rope" or "alibi"
    window_left: int  # -1: no window
    logits_soft_cap: float  # 0: none
    sm_scale: float
    rope_scale: float
    rope_theta: float

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
    ) -> Variant:
        """From the public arguments; None takes the default. Raises UnsupportedConfig or ValueError."""
        if pos_encoding_mode not in POS_ENCODING_MODES:
            known = ", ".join(POS_ENCODING_MODES)
            raise UnsupportedConfig(f"{op}: pos_encoding_mode={pos_encoding_mode!r} is unknown; allowed: {known}")
        soft_cap = logits_soft_cap or 0.0
        if soft_cap < 0:
            raise ValueError(
                f"{op}: logits_soft_cap is {soft_cap}; expected a positive number, or 0 or None for no cap"
            )
        return Variant(
            POS_ENCODING_MODES[pos_encoding_mode],
            max(window_left, -1),
            soft_cap,
            1.0 / math.sqrt(head_dim) if sm_scale is None else require_positive(op, "sm_scale", float(sm_scale)),
            1.0 if rope_scale is None else float(rope_scale),
            1e4 if rope_theta is None else float(rope_theta),
        )

    def updated(
        self,
        op: str,
        head_dim: int,
        pos_encoding_mode: Optional[str] = None,
        window_left: Optional[int] = None,
        logits_soft_cap: Optional[float] = None,
        sm_scale: Optional[float] = None,
        rope_scale: Optional[float] = None,
        rope_theta: Optional[float] = None,
    ) -> Variant:
        """This variant with the arguments that a call gave besides the plan; None keeps what was planned."""
        given = Variant.of(op, head_dim, pos_encoding_mode or "NONE", -1 if window_left is None else window_left)
        return replace(
            self,
            pos_encoding=self.pos_encoding if pos_encoding_mode is None else given.pos_encoding,
            window_left=self.window_left if window_left is None else given.window_left,
            logits_soft_cap=self.logits_soft_cap if logits_soft_cap is None else float(logits_soft_cap),
            sm_scale=self.sm_scale if sm_scale is None else require_positive(op, "sm_scale", float(sm_scale)),
            rope_scale=self.rope_scale if rope_scale is None else float(rope_scale),
            rope_theta=self.rope_theta if rope_theta is None else float(rope_theta),
        )

    @property
    def pos_encoding_mode(self) -> str:
        """Upstream's name."""
        return next(mode for mode, kind in POS_ENCODING_MODES.items() if kind == self.pos_encoding)

    @property
    def spec_args(self) -> dict[str, str | bool]:
        """The part of the variant that selects a kernel."""
        return {
            "pos_encoding": self.pos_encoding,
            "has_window": self.window_left >= 0,
            "has_soft_cap": self.logits_soft_cap > 0,
        }

    def values(self, num_qo_heads: int, device: torch.device, qk_scale: float, v_scale: float) -> dict[str, float]:
        """The fields of AttentionParams that hold options."""
        return {
            "alibi_slopes": alibi_slopes(num_qo_heads, device).data_ptr() if self.pos_encoding == "alibi" else 0,
            "window_left": self.window_left,
            "sm_scale": self.sm_scale * qk_scale,
            "v_scale": v_scale,
            "logits_soft_cap": self.logits_soft_cap,
            "rope_rcp_scale": 1.0 / self.rope_scale,
            "rope_log2_theta": math.log2(self.rope_theta),
        }


@functools.cache
def alibi_slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    """Kept alive for the process, as launches hold their address."""
    return get_alibi_slopes(num_heads, device)
