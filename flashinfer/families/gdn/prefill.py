# SPDX-License-Identifier: Apache-2.0
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
    "final_state", "chunks", "segments",
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
        ("segment_tokens", I32),
        ("has_bf16_states", I32),
    ]


# csrc/gdn/prefill/tile.cuh: tokens of a chunk, sizeof(GdnChunk) and sizeof(GdnSegment).
CHUNK = 64
CHUNK_BYTES = CHUNK * CHUNK * 2 + 4 * CHUNK * 4
SEGMENT_BYTES = 2 * HEAD_DIM * HEAD_DIM * 4


def num_slots(num_tokens: int, num_seqs: int, size: int) -> int:
    """Of pieces of so many tokens, beyond the last that a sequence has: GdnPiece, in csrc/gdn/prefill/tile.cuh."""
    return num_tokens // size + num_seqs


SEGMENTS_V = 128  # columns of a state, or rows of a transition, that a block takes through a segment
SCAN_ROWS = 8  # of a state, that a block follows from segment to segment: csrc/gdn/prefill/scan.cuh
# Columns of the values that a block takes, stages of keys and values; the first that fits.
_TILES = ((64, 3), (32, 4), (32, 2))


def _stages_bytes(block_v: int, num_stages: int) -> int:
    """GdnStages in csrc/gdn/prefill/block.cuh."""
    return num_stages * (CHUNK * (HEAD_DIM + block_v) * 2 + CHUNK_BYTES)


_BARRIERS_BYTES = 1024  # beside the stages in csrc/gdn/sm90/tile.cuh, aligned


def _smem_bytes(block_v: int, num_stages: int, num_q_stages: int = 1) -> int:
    """GdnSmem with an output, there and in csrc/gdn/sm90/tile.cuh."""
    q = num_q_stages * CHUNK * HEAD_DIM * 2
    handed_over = block_v * (HEAD_DIM + CHUNK) * 2
    return _stages_bytes(block_v, num_stages) + q + 2 * handed_over


def _require_16_bits(spec: KernelSpec) -> None:
    if spec.arg("dtype") == "fp32":
        raise UnsupportedConfig(f"{spec.family}: dtype=fp32 is for the CPU; expected fp16 or bf16")


def _constants_of_rows(spec: KernelSpec) -> Constants:
    return {
        "T": CxxType(spec.arg("dtype")),
        "kLogGate": spec.arg("log_gate"),
        "kNormalize": spec.arg("normalize"),
    }


def _constants(spec: KernelSpec) -> Constants:
    return {**_constants_of_rows(spec), "State": CxxType(spec.arg("state_dtype"))}


def _config(spec: KernelSpec) -> Config:
    constants = _constants(spec)
    if targets.kind(spec.target) == "cpu":
        return Config(constants)
    _require_16_bits(spec)
    limit = arch(spec.target).smem_per_block
    for width, num_stages in _TILES:
        if width <= spec.arg("block_v") and _smem_bytes(width, num_stages) <= limit:
            break
    tile = {"kHasOutput": True, "kBlockV": width, "kNumStages": num_stages}
    return Config({**constants, **tile}, Launch(128 + 2 * width, 1, _smem_bytes(width, num_stages)))


def _sm90_config(spec: KernelSpec) -> Config:
    _require_16_bits(spec)
    tile = {"kHasOutput": True, "kBlockV": 64, "kNumStages": 3}
    return Config({**_constants(spec), **tile}, Launch(384, 1, _BARRIERS_BYTES + _smem_bytes(64, 3, num_q_stages=3)))


def _states_config(spec: KernelSpec, feed_threads: int) -> Config:
    def num_bytes(num_stages: int) -> int:
        return _BARRIERS_BYTES + _stages_bytes(SEGMENTS_V, num_stages)

    num_stages = 4 if num_bytes(4) <= arch(spec.target).smem_per_block else 2
    tile = {"kHasOutput": False, "kBlockV": SEGMENTS_V, "kNumStages": num_stages}
    launch = Launch(feed_threads + 2 * SEGMENTS_V, 1, num_bytes(num_stages))
    return Config({"T": CxxType(spec.arg("dtype")), **tile}, launch)


def _segments_config(spec: KernelSpec) -> Config:
    return _states_config(spec, 32)


def _sm90_segments_config(spec: KernelSpec) -> Config:
    return _states_config(spec, 128)


def _scan_config(spec: KernelSpec) -> Config:
    return Config({}, Launch(2 * HEAD_DIM))


def _chunks_config(spec: KernelSpec) -> Config:
    return Config(_constants_of_rows(spec), Launch(32, 13))


def blocks_v(target: str) -> tuple[int, ...]:
    """How many columns of the values a block may take."""
    is_wide = targets.kind(target) == "cpu" or "sm_90a" in targets.candidates(target)
    return (64,) if is_wide else (32, 64)


def block_v(target: str, num_units: int, num_sms: int) -> int:
    """How many it takes, of so many heads of sequences in all."""
    return blocks_v(target)[-1 if num_units * (HEAD_DIM // 64) >= num_sms else 0]


# Microseconds of a chunk, in blocks with an output and in those without; of the scan, for each segment but the first
# and last; and of a split for the two launches more, and blocks that begin and end:
# docs/notes/2026-11-gated-delta-rule.md.
_WHOLE_US, _STATE_US, _SCAN_US, _SPLIT_US = 1.4, 1.1, 2.6, 6.5
_MAX_SEGMENTS, _LEAST_GAIN = 32, 0.95


def segment_tokens(num_tokens: int, longest: int, num_seqs: int, num_heads: int, num_sms: int) -> int:
    """Tokens of the segments that sequences are split into, whole chunks; 0: they stay whole.

    A sequence is a chain of chunks that each of its blocks goes along, and two blocks of 64 columns a head leave most
    SMs idle where there are few sequences of few heads. Split into n segments, chains are n times shorter and blocks n
    times as many, for the price of another pass before, without the output: of all segments but the last a block a
    head for what they add, and of all but the first another for their transition, 2 n - 3 of 128 columns. One of these
    has 2.6 M multiplications a chunk, as has a block of 64 columns with its output. So it pays up to about the n that
    fills the SMs, and never where they are full.

    longest: tokens of the longest sequence; the others are taken to be as long.
    """
    chunks = -(-longest // CHUNK)
    heads = num_heads * max(1, -(-num_tokens // max(1, longest)))  # of sequences with tokens

    def rounds(blocks: int) -> int:
        return -(-blocks // num_sms)

    best_us, best = _LEAST_GAIN * chunks * rounds(2 * heads) * _WHOLE_US, 0
    for wanted in range(2, min(_MAX_SEGMENTS, chunks) + 1):
        each = -(-chunks // wanted)
        segments = -(-chunks // each)
        chain_us = rounds((2 * segments - 3) * heads) * _STATE_US + rounds(2 * segments * heads) * _WHOLE_US
        scan_us = (segments - 2) * rounds(heads * HEAD_DIM // SCAN_ROWS) * _SCAN_US
        us = each * chain_us + scan_us + _SPLIT_US
        if us < best_us:
            best_us, best = us, each * CHUNK
    return best


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
# And of sequences that are split: their segments, all at once, and the states between these.
GDN_PREFILL_SEGMENTS = Family(
    name="gdn_prefill_segments",
    axes={"dtype": DTYPES[:2]},
    implementations=(
        Implementation("sm_90a", "gdn/sm90/prefill.cuh", GdnPrefillParams, _sm90_segments_config),
        Implementation("cuda", "gdn/prefill/kernel.cuh", GdnPrefillParams, _segments_config),
    ),
)
GDN_PREFILL_SCAN = Family(
    name="gdn_prefill_scan",
    axes={},
    implementations=(Implementation("cuda", "gdn/prefill/scan.cuh", GdnPrefillParams, _scan_config),),
)
register(GDN_PREFILL, GDN_PREFILL_CHUNKS, GDN_PREFILL_SEGMENTS, GDN_PREFILL_SCAN)
