# SPDX-License-Identifier: Apache-2.0
"""What the Hopper implementation of latent attention computes, and its tile table."""

from __future__ import annotations

from flashinfer.families.attention.prefill_sm90 import MIN_BOX_ROWS as MIN_BOX_ROWS
from flashinfer.jit.spec import Config, Constants, KernelSpec, Launch

BLOCK_M, BLOCK_N = 64, 128
# KV tiles in shared memory, by head_dim_ckv: as many as fit.
NUM_STAGES = {512: 1, 256: 2}


def serves(spec: KernelSpec) -> bool:
    q_dtype, kv_dtype = spec.arg("q_dtype"), spec.arg("kv_dtype")
    if q_dtype == "fp32" or spec.arg("short_queries"):
        return False
    return bool(kv_dtype == q_dtype or not spec.arg("large_pages"))  # those of 8 bits row by row


def config(spec: KernelSpec, constants: Constants) -> Config:
    """`constants`: what the compiler is told of the spec for every target."""
    dim_ckv, dim_kpe = spec.arg("head_dim_ckv"), spec.arg("head_dim_kpe")
    num_stages = NUM_STAGES[dim_ckv]
    # sm90::mla::Smem: queries, KV with room for the probabilities, and what is small (2 KB are scales).
    smem_bytes = 2 * BLOCK_M * (dim_ckv + dim_kpe) + 2 * num_stages * BLOCK_N * (dim_ckv + 64) + 4096
    gathers = not spec.arg("large_pages")
    tile: Constants = {"kBlockM": BLOCK_M, "kBlockN": BLOCK_N, "kNumStages": num_stages, "kGathersKv": gathers}
    return Config({**constants, **tile}, Launch(384, 1, smem_bytes))
