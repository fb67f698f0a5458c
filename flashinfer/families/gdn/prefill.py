"""The gated delta rule over sequences of tokens."""

from __future__ import annotations

import ctypes

from flashinfer import target as targets
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.arch import arch
from flashinfer.families.layout import DTYPES, F32, I32, I64, Fields, P, nested
from flashinfer.jit.spec import Config, Constants, CxxType, Family, Implementation, KernelSpec, Launch, register, twins

HEAD_DIM = 128
STATE_DTYPES = ("fp32", "bf16")
ADDRESSES = (
    "q", "k", "v", "gate", "beta", "cu_seqlens", "initial_state", "initial_indices", "final_indices", "output",
    "final_state", "chunks",
)  # fmt: skip
_ROW: Fields = [("token", I64), ("head", I64)]
_STATE: Fields = [("slot", I64), ("head", I64)]


class GdnPrefillParams(ctypes.Structure):
    """Mirror of csrc/gdn/prefill/params.h."""

    _fields_ = [
        *[(name, P) for name in ADDRESSES],
        *[field for name in ("q", "k", "v", "output", "gate", "beta") for field in nested(f"{name}_strides", _ROW)],
        *nested("initial_strides", _STATE),
        *nested("final_strides", _STATE),
        *[(name, I32) for name in ("num_seqs", "num_tokens", "num_heads")],
        *[(name, I32) for name in ("heads_per_q", "heads_per_k", "heads_per_v")],
        *[(name, I32) for name in ("num_initial_slots", "num_final_slots", "has_long_seqlens", "has_long_indices")],
        ("scale", F32),
        ("reserved", I32),
    ]


# csrc/gdn/prefill/tile.cuh: tokens of a chunk, and sizeof(GdnChunk).
CHUNK = 64
CHUNK_BYTES = CHUNK * CHUNK * 2 + 4 * CHUNK * 4


def num_chunk_slots(num_tokens: int, num_seqs: int) -> int:
    """Beyond the last that a sequence has: first_chunk_slot, in csrc/gdn/prefill/tile.cuh."""
    return num_tokens // CHUNK + num_seqs


# Columns of the values that a block takes, stages of keys and values; the first that fits.
_TILES = ((64, 3), (32, 4), (32, 2))


def _smem_bytes(block_v: int, num_stages: int) -> int:
    """GdnSmem in csrc/gdn/prefill/block.cuh."""
    stage = CHUNK * (HEAD_DIM + block_v) * 2 + CHUNK_BYTES
    handed_over = block_v * (HEAD_DIM + CHUNK) * 2
    return num_stages * stage + CHUNK * HEAD_DIM * 2 + 2 * handed_over


def _sm90_smem_bytes(num_stages: int) -> int:
    """GdnSmem in csrc/gdn/sm90/tile.cuh."""
    panel = CHUNK * 128
    return num_stages * (5 * panel + CHUNK_BYTES) + 2 * 3 * panel


def _require_16_bits(spec: KernelSpec) -> None:
    if spec.arg("dtype") == "fp32":
        raise UnsupportedConfig(f"{spec.family}: dtype=fp32 is for the CPU; expected fp16 or bf16")


def _constants(spec: KernelSpec) -> Constants:
    return {
        "T": CxxType(spec.arg("dtype")),
        "State": CxxType(spec.arg("state_dtype")),
        "kLogGate": spec.arg("log_gate"),
        "kNormalize": spec.arg("normalize"),
    }


def _config(spec: KernelSpec) -> Config:
    constants = _constants(spec)
    if targets.kind(spec.target) == "cpu":
        return Config(constants)
    _require_16_bits(spec)
    limit = arch(spec.target).smem_per_block
    for width, num_stages in _TILES:
        if width <= spec.arg("block_v") and _smem_bytes(width, num_stages) <= limit:
            break
    tile = {"kBlockV": width, "kNumStages": num_stages}
    return Config({**constants, **tile}, Launch(128 + 2 * width, 1, _smem_bytes(width, num_stages)))


def _sm90_config(spec: KernelSpec) -> Config:
    _require_16_bits(spec)
    tile = {"kBlockV": 64, "kNumStages": 3}
    return Config({**_constants(spec), **tile}, Launch(256, 1, _sm90_smem_bytes(3)))


def _chunks_config(spec: KernelSpec) -> Config:
    constants = {
        "T": CxxType(spec.arg("dtype")),
        "kLogGate": spec.arg("log_gate"),
        "kNormalize": spec.arg("normalize"),
    }
    return Config(constants, Launch(128, 4))


def blocks_v(target: str) -> tuple[int, ...]:
    """How many columns of the values a block may take."""
    is_wide = targets.kind(target) == "cpu" or "sm_90a" in targets.candidates(target)
    return (64,) if is_wide else (32, 64)


def block_v(target: str, num_units: int, num_sms: int) -> int:
    """How many it takes, of so many heads of sequences in all."""
    return blocks_v(target)[-1 if num_units * (HEAD_DIM // 64) >= num_sms else 0]


GDN_PREFILL = Family(
    name="gdn_prefill",
    axes={
        "dtype": DTYPES,
        "state_dtype": STATE_DTYPES,
        "log_gate": (False, True),  # gates are logarithms; on the CPU
        "normalize": (False, True),  # rows of q and k, to length 1
        "block_v": (32, 64),  # columns of the values that a block takes; the results are the same
    },
    implementations=(
        Implementation(
            "sm_90a",
            "gdn/sm90/prefill.cuh",
            GdnPrefillParams,
            _sm90_config,
            serves=lambda spec: spec.arg("block_v") == 64,
        ),
        *twins(GdnPrefillParams, _config, cuda="gdn/prefill/kernel.cuh", cpu="cpu/gdn/prefill.h"),
    ),
)
# What a GPU does before, of all chunks at once.
GDN_PREFILL_CHUNKS = Family(
    name="gdn_prefill_chunks",
    axes={"dtype": DTYPES[:2], "log_gate": (False, True), "normalize": (False, True)},
    implementations=(Implementation("cuda", "gdn/prefill/chunks.cuh", GdnPrefillParams, _chunks_config),),
)
register(GDN_PREFILL, GDN_PREFILL_CHUNKS)
