# SPDX-License-Identifier: Apache-2.0
"""Softmax, filters and sampling over the vocabulary: one thread-block cluster per row."""

from __future__ import annotations

import ctypes

from flashinfer import target as targets
from flashinfer.dtypes import ITEMSIZE
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.arch import arch
from flashinfer.families.layout import F32, I32, I64, P, nested
from flashinfer.jit.spec import Config, CxxType, Family, KernelSpec, Launch, register, twins

DTYPES = ("fp32", "fp16", "bf16")
CLUSTER_SIZES = (1, 2, 4, 8)
# Shared memory for the part of a row that one block holds, in KiB; 0 reads the row again instead.
ROW_KIB = (0, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 208)
INPUTS = {"logits": 0, "probs": 1, "order_only": 2}
FILTERS = ("none", "top_k", "top_p", "min_p", "top_k_top_p")
NORMALIZE_OPS = ("softmax", "top_p_renorm", "top_k_renorm", "top_k_mask")

_NUM_THREADS = 256
# Shared memory besides the row. With a search, three blocks with 64 KiB of row just fit an SM of Hopper.
_SEARCH_BYTES, _NUCLEUS_BYTES, _PLAIN_BYTES = 11264, 3328, 1152
# Of top-p, checked in one look at the row. At top_p 0.9 two fail one time in a hundred, and each costs a comparison and
# an addition an element: three are 2 to 5% slower. docs/notes/2026-11-sampling-placement.md
_NUM_CANDIDATES = 2


U64 = ctypes.c_uint64
RANDOM_STATE = nested("random", [("seeds", P), ("offsets", P), ("seed", U64), ("offset", U64)])


class SampleParams(ctypes.Structure):
    """Mirror of csrc/sampling/params.h, its nested struct laid out flat."""

    _fields_ = [
        *[(name, P) for name in ("input", "token_ids", "valid", "row_indices", "top_k", "top_p", "min_p")],
        *RANDOM_STATE,
        ("top_k_value", I32),
        ("top_p_value", F32),
        ("min_p_value", F32),
        ("row_indices_are_int64", I32),
        *[(name, I64) for name in ("num_inputs", "input_stride")],
        *[(name, I32) for name in ("num_rows", "vocab_size", "top_k_is_int64", "top_k_first")],
        *[(name, I32) for name in ("seeds_per_row", "offsets_per_row")],
    ]


class NormalizeParams(ctypes.Structure):
    """Mirror of csrc/sampling/params.h."""

    _fields_ = [
        *[(name, P) for name in ("input", "output", "top_k", "top_p", "temperature")],
        ("top_k_value", I32),
        ("top_p_value", F32),
        ("temperature_value", F32),
        ("top_k_is_int64", I32),
        ("input_stride", I64),
        ("num_rows", I32),
        ("vocab_size", I32),
    ]


class SpeculativeParams(ctypes.Structure):
    """Mirror of csrc/sampling/params.h, its nested struct laid out flat."""

    _fields_ = [
        *[(name, P) for name in ("draft_probs", "target_probs", "draft_ids")],
        *[(name, P) for name in ("output_ids", "num_accepted", "num_emitted")],
        *RANDOM_STATE,
        *[(name, I64) for name in ("draft_row_stride", "draft_step_stride")],
        *[(name, I64) for name in ("target_row_stride", "target_step_stride")],
        *[(name, I32) for name in ("num_rows", "num_draft", "vocab_size", "draft_ids_are_int64")],
        *[(name, I32) for name in ("adds_accepted", "adds_emitted", "seeds_per_row", "offsets_per_row")],
    ]


def placement(dtype: str, vocab_size: int, num_rows: int, num_sms: int, target: str, keeps_row: bool) -> dict[str, int]:
    """cluster_size and row_kib for a call.

    Enough blocks to fill the machine while rows are few; for a row that stays in shared memory, also blocks small
    enough that three fit an SM, so that one loads while others search.

    On an H100 one row of 128256 takes 6.0 µs by eight blocks and 16.2 by one; 512 rows do not care. Eight granules in
    flight a thread beat four by up to 20% where blocks are few. docs/notes/2026-11-sampling-placement.md
    """
    if targets.kind(target) == "cpu":
        return {"cluster_size": 1, "row_kib": 0}
    machine = arch(target)
    row_bytes = vocab_size * ITEMSIZE[dtype] + 32
    useful = row_bytes / (_NUM_THREADS * 16)  # blocks beyond this would have nothing to read
    if not keeps_row:
        cluster_size = 1
        while (
            machine.has_clusters
            and cluster_size < 8
            and cluster_size * num_rows < 3 * num_sms
            and cluster_size < useful
        ):
            cluster_size *= 2
        return {"cluster_size": cluster_size, "row_kib": 0}
    cluster_size = 1
    if machine.has_clusters:
        while (
            cluster_size < 8
            and cluster_size < useful
            and (cluster_size * num_rows < 3 * num_sms or _block_kib(row_bytes, cluster_size) > 64)
        ):
            cluster_size *= 2
    needed = _block_kib(row_bytes, cluster_size)
    fitting = [k for k in ROW_KIB if k >= needed and (k << 10) + _SEARCH_BYTES <= machine.smem_per_block]
    return {"cluster_size": cluster_size, "row_kib": min(fitting, default=0)}


def rows_of_each_placement(num_sms: int) -> tuple[int, ...]:
    """Numbers of rows that have every cluster size between them, which doubles while its blocks are below 3 an SM."""
    return 1, num_sms, 2 * num_sms, 3 * num_sms


def _block_kib(row_bytes: int, cluster_size: int) -> int:
    """KiB of a row that one block holds: whole slots of one granule a thread."""
    slot_bytes = _NUM_THREADS * 16
    return -(-row_bytes // (slot_bytes * cluster_size)) * slot_bytes // 1024


def _launch(spec: KernelSpec, shared: int, streams: bool) -> tuple[dict[str, int], Launch]:
    # 256 threads: 512 take 25% longer to stream 512 rows of logits. Resident rows come by plain loads: bulk copies win
    # 5% at many rows and lose 0.4 µs at few; a later row prefetched into L2 costs softmax 30%.
    # docs/notes/2026-11-sampling-placement.md
    row_kib = spec.arg("row_kib")
    num_threads = _NUM_THREADS
    # Granules of 16-bit elements hold twice as many: half as many in flight, or their floats spill.
    in_flight = (8 if streams else 4) * ITEMSIZE[spec.arg("dtype")] // 4
    tile = {"kRowSlots": row_kib * 1024 // (num_threads * 16), "kUnroll": in_flight}
    # Registers for as many blocks as shared memory admits.
    blocks = 4 if streams else 3 if 0 < row_kib <= 64 else 2 if row_kib <= 96 else 1
    launch = Launch(
        num_threads=num_threads,
        min_blocks_per_sm=blocks,
        smem_bytes=row_kib * 1024 + shared,
        cluster_size=spec.arg("cluster_size"),
    )
    return tile, _fitting(spec, launch)


def _fitting(spec: KernelSpec, launch: Launch) -> Launch:
    """The launch, where the target has room for it. Raises UnsupportedConfig elsewhere: a row of a config that one GPU
    asked for is then left out of a build's other targets, and fails on none."""
    on_cpu = targets.kind(spec.target) == "cpu"
    if launch.cluster_size > 1 and (on_cpu or not arch(spec.target).has_clusters):
        raise UnsupportedConfig(
            f"{spec.family}: cluster_size={launch.cluster_size} is not supported on {spec.target}, where no row is "
            "spread over a cluster; expected 1"
        )
    if not on_cpu and launch.smem_bytes > arch(spec.target).smem_per_block:
        raise UnsupportedConfig(
            f"{spec.family}: row_kib={spec.arg('row_kib')} takes {launch.smem_bytes} bytes of shared memory; a block "
            f"of {spec.target} has {arch(spec.target).smem_per_block}"
        )
    return launch


def _sample_config(spec: KernelSpec) -> Config:
    chosen = spec.arg("filter")
    searches = "top_k" in chosen
    shared = _SEARCH_BYTES if searches else _NUCLEUS_BYTES if chosen == "top_p" else _PLAIN_BYTES
    tile, launch = _launch(spec, shared, chosen == "none")
    return Config(
        {
            "T": CxxType(spec.arg("dtype")),
            "kInput": INPUTS[spec.arg("input")],
            "kTopK": "top_k" in chosen,
            "kTopP": "top_p" in chosen,
            "kMinP": chosen == "min_p",
            "kNumCandidates": _NUM_CANDIDATES,
            **tile,
        },
        launch,
    )


def _normalize_config(spec: KernelSpec) -> Config:
    op = spec.arg("op")
    tile, launch = _launch(spec, _PLAIN_BYTES if op == "softmax" else _SEARCH_BYTES, False)
    inputs = {"softmax": "logits", "top_k_mask": "order_only"}
    return Config(
        {
            "T": CxxType(spec.arg("dtype")),
            "TOut": CxxType("fp32" if op == "softmax" else spec.arg("dtype")),
            "kInput": INPUTS[inputs.get(op, "probs")],
            "kTopK": op.startswith("top_k"),
            "kTopP": op.startswith("top_p"),
            "kMinP": False,
            **tile,
        },
        launch,
    )


def _speculative_config(spec: KernelSpec) -> Config:
    launch = Launch(_NUM_THREADS, min_blocks_per_sm=4, smem_bytes=_PLAIN_BYTES, cluster_size=spec.arg("cluster_size"))
    return Config(
        {"T": CxxType(spec.arg("dtype")), "kInput": INPUTS["probs"], "kRowSlots": 0, "kUnroll": 4},
        _fitting(spec, launch),
    )


SAMPLE_ROW = Family(
    name="sample_row",
    axes={
        "dtype": DTYPES,
        "input": ("logits", "probs"),
        "filter": FILTERS,
        "cluster_size": CLUSTER_SIZES,
        "row_kib": ROW_KIB,
    },
    implementations=twins(
        SampleParams, _sample_config, cuda="sampling/sample_row.cuh", cpu="cpu/sampling/sample_row.h"
    ),
)
NORMALIZE_ROW = Family(
    name="normalize_row",
    axes={"dtype": DTYPES, "op": NORMALIZE_OPS, "cluster_size": CLUSTER_SIZES, "row_kib": ROW_KIB},
    implementations=twins(
        NormalizeParams, _normalize_config, cuda="sampling/normalize_row.cuh", cpu="cpu/sampling/normalize_row.h"
    ),
)
CHAIN_SPECULATIVE = Family(
    name="chain_speculative",
    axes={"dtype": DTYPES, "cluster_size": CLUSTER_SIZES},
    implementations=twins(
        SpeculativeParams,
        _speculative_config,
        cuda="sampling/chain_speculative.cuh",
        cpu="cpu/sampling/chain_speculative.h",
    ),
)
register(SAMPLE_ROW, NORMALIZE_ROW, CHAIN_SPECULATIVE)
