# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: legal axes, tile table. Its planner is that of prefill."""

from __future__ import annotations

import ctypes

from flashinfer import target as targets
from flashinfer.dtypes import ITEMSIZE
from flashinfer.errors import UnsupportedConfig
from flashinfer.families.arch import arch
from flashinfer.families.attention import mla_sm90
from flashinfer.families.attention.params import KV_INDEX, KV_STORAGE, MASKS
from flashinfer.families.attention.prefill import PREFILL_PLAN, ROWS, SCRATCH, PlanCosts
from flashinfer.families.layout import DTYPES, F32, I32, I64, Fields, P, nested
from flashinfer.jit.spec import Config, Constants, CxxType, Family, Implementation, KernelSpec, Launch, register, twins

# In KV tiles: one takes longer than in prefill, or, in those for short queries, not so long.
_COSTS, _SHORT_COSTS = PlanCosts(0.6, 2.4, 1), PlanCosts(2.0, 2.5, 4)
_SM90_COSTS = PlanCosts(0.9, 0.5, 1, fills_gaps=True)
# Blocks of a grid: PrefillSchedule has a bit for each (csrc/attention/prefill/params.h), and one reads the item of its
# place before it knows how many there are.
MAX_BLOCKS = 960
STORAGE = "paged_lens"  # of the KV, to the planner and to the kernels
HEAD_DIMS_CKV = (512, 256)
HEAD_DIMS_KPE = (64, 0)
# A cache as DeepSeek-V3.2 stores it, by the name that vLLM has for it: a row is 512 elements of fp8 e4m3, a float32 for
# every SCALE_BLOCK of them, and 64 of bf16 that have positions. Tensors of it are bytes.
SCALED_ROWS = "fp8_ds_mla"
SCALE_BLOCK = 128
SCALED_ROW_BYTES, SCALED_KPE_OFFSET = 656, 528

# Mirrors of the structs in csrc/attention/mla/params.h, nested ones laid out flat.
_LATENT_KV: Fields = [
    *[(name, P) for name in ("ckv", "kpe")],
    *nested("index", KV_INDEX),
    *[(f"{part}_{axis}_stride", I64) for part in ("ckv", "kpe") for axis in ("page", "entry")],
]
_LATENT_ATTENTION: Fields = [
    *[(name, P) for name in ("q_pe", "q_nope", "out", "lse")],
    *nested("kv", _LATENT_KV),
    *[(f"{name}_{axis}_stride", I64) for name in ("q_nope", "q_pe", "out") for axis in ("token", "head")],
    *[(name, I32) for name in ("batch_size", "num_qo_heads")],
    *[(name, F32) for name in ("sm_scale", "v_scale")],
]
# What changes from call to call.
ADDRESSES = (
    *(*ROWS, "q_pe", "q_nope", "out", "lse", "kv.ckv", "kv.kpe"),
    *(f"kv.index.{name}" for name in ("indptr", "last_page_len", "indices")),
)


class MlaParams(ctypes.Structure):
    """Mirror of csrc/attention/mla/params.h."""

    _fields_ = [*[(name, P) for name in ROWS], *_LATENT_ATTENTION, *SCRATCH, ("num_tokens", I32)]


class Sm90MlaParams(ctypes.Structure):
    """Mirror of csrc/attention/sm90/mla/params.h. The descriptors of ckv and kpe hold their addresses."""

    _fields_ = [
        ("ckv_map", ctypes.c_uint8 * 128),
        ("kpe_map", ctypes.c_uint8 * 128),
        *MlaParams._fields_,
        ("box_rows", I32),
        ("reserved", ctypes.c_uint8 * 8),
    ]


def _constants(spec: KernelSpec) -> Constants:
    """What the compiler is told of a spec on every target."""
    q_dtype, kv_dtype = spec.arg("q_dtype"), spec.arg("kv_dtype")
    dim_ckv, dim_kpe = spec.arg("head_dim_ckv"), spec.arg("head_dim_kpe")
    if targets.kind(spec.target) == "cuda" and q_dtype == "fp32":
        raise UnsupportedConfig("mla: fp32 is supported on the CPU alone; use float16 or bfloat16 on CUDA")
    has_scales = kv_dtype == SCALED_ROWS
    if has_scales and (q_dtype, dim_ckv, dim_kpe) != ("bf16", 512, 64):
        raise UnsupportedConfig(
            f"mla: a cache of {SCALED_ROWS} under {q_dtype} queries of {dim_ckv} + {dim_kpe}; "
            "expected bf16 and 512 + 64"
        )
    if kv_dtype not in (q_dtype, "fp8_e4m3", SCALED_ROWS):
        raise UnsupportedConfig(f"mla: q is {q_dtype} and the cache {kv_dtype}; expected the same dtype, or fp8_e4m3")
    return {
        "Q": CxxType(q_dtype),
        "Kv": CxxType("fp8_e4m3" if has_scales else kv_dtype),
        "Kpe": CxxType("bf16" if has_scales else kv_dtype),
        "kScaleBlock": SCALE_BLOCK if has_scales else 0,
        "Out": CxxType(q_dtype),
        "kHeadDimCkv": dim_ckv,
        "kHeadDimKpe": dim_kpe,
        "kHeadDimQk": dim_ckv + dim_kpe,
        "kHeadDimVo": dim_ckv,
        "kKvStorage": KV_STORAGE[STORAGE],
        "kMask": MASKS[spec.arg("mask")],
    }


# Query rows of a request (tokens times heads) up to which the tile for short queries is faster.
SHORT_ROWS = 16
# A tile: query rows, KV rows, stages of KV, whether the queries are kept in registers. The first that fits; of 256
# threads, eight warps, since that is how many hold 64 rows of an output of 512 columns.
Tile = tuple[int, int, int, bool]
_TILES: tuple[Tile, ...] = (
    (64, 64, 3, False),
    (64, 64, 2, False),
    (32, 32, 3, False),
    (32, 32, 2, False),
    (32, 32, 2, True),
)
_SHORT_TILES: tuple[Tile, ...] = (
    (16, 128, 2, False),
    (16, 64, 4, False),
    (16, 64, 3, False),
    (16, 64, 2, False),
    (16, 32, 2, False),
)
_NUM_THREADS = 256


def _suits(spec: KernelSpec, tile: Tile) -> bool:
    """Whether eight warps can share out its scores (MlaSplit): a load of fp8 keys is of 32 rows."""
    return tile[0] > 16 or tile[1] >= 64 or ITEMSIZE.get(spec.arg("kv_dtype")) == 2


def costs(block_m: int, params: type[ctypes.Structure]) -> PlanCosts:
    """Of the kernel of that tile that takes these parameters."""
    if params is Sm90MlaParams:
        return _SM90_COSTS
    return _SHORT_COSTS if block_m <= SHORT_ROWS else _COSTS


def _smem_bytes(spec: KernelSpec, tile: Tile) -> int:
    """MlaSmem in csrc/attention/mla/tile.cuh."""
    block_m, block_n, num_stages, keeps_q = tile
    dim, kv_dtype = spec.arg("head_dim_ckv") + spec.arg("head_dim_kpe"), spec.arg("kv_dtype")
    size = 128 if keeps_q else block_m * dim * 2
    size += num_stages * block_n * (SCALED_ROW_BYTES if kv_dtype == SCALED_ROWS else dim * ITEMSIZE[kv_dtype])
    size += 8 << 10 if block_m == 64 else 14 * block_m * block_n  # exchange
    return int(size + 256 + block_m * 12 + 512)


def _config(spec: KernelSpec) -> Config:
    constants = _constants(spec)
    if targets.kind(spec.target) == "cpu":
        return Config(constants)
    per_block = arch(spec.target).smem_per_block
    for tile in (*(_SHORT_TILES if spec.arg("short_queries") else ()), *_TILES):
        smem_bytes = _smem_bytes(spec, tile)
        if smem_bytes <= per_block and _suits(spec, tile):
            break
    else:
        raise UnsupportedConfig(f"mla: {spec.name} needs {smem_bytes} bytes of shared memory on {spec.target}")
    sizes = dict(zip(("kBlockM", "kBlockN", "kNumStages", "kKeepsQ"), tile))
    return Config({**constants, **sizes}, Launch(_NUM_THREADS, 1, smem_bytes))


def _sm90_config(spec: KernelSpec) -> Config:
    return mla_sm90.config(spec, _constants(spec))


MLA = Family(
    name="mla",
    axes={
        "q_dtype": DTYPES,
        "kv_dtype": (*DTYPES, "fp8_e4m3", SCALED_ROWS),
        "head_dim_ckv": HEAD_DIMS_CKV,
        "head_dim_kpe": HEAD_DIMS_KPE,
        "short_queries": (False, True),
        "large_pages": (False, True),
        "mask": ("none", "causal"),
    },
    # A kernel of an architecture is a row before these. Of its Config, the host asks kBlockM, the query rows of a tile,
    # and kBlockN, those of the KV.
    implementations=(
        Implementation("sm_90a", "attention/sm90/mla/mla.cuh", Sm90MlaParams, _sm90_config, serves=mla_sm90.serves),
        *twins(MlaParams, _config, cuda="attention/mla/kernel.cuh", cpu="cpu/attention/mla.h"),
    ),
)


def mla(
    target: str,
    *,
    q_dtype: str,
    kv_dtype: str = "",
    head_dim_ckv: int = 512,
    head_dim_kpe: int = 64,
    short_queries: bool = False,
    page_size: int = 1,
    mask: str = "causal",
) -> KernelSpec:
    """Queries over a paged cache of latent rows. `kv_dtype` "": that of q.

    `short_queries` picks the tile for requests of at most SHORT_ROWS query rows on average, `page_size` the kernel that
    reads pages of that size fastest; the results are the same up to rounding.
    """
    axes: dict[str, str | int | bool] = {
        "q_dtype": q_dtype,
        "kv_dtype": kv_dtype or q_dtype,
        "head_dim_ckv": head_dim_ckv,
        "head_dim_kpe": head_dim_kpe,
        "short_queries": short_queries and targets.kind(target) == "cuda",
        "mask": mask,
    }
    if page_size % mla_sm90.MIN_BOX_ROWS == 0:
        spec = MLA.spec(target, **axes, large_pages=True)
        if MLA.implementation(spec).params is not MlaParams:  # nobody else minds
            return spec
    return MLA.spec(target, **axes, large_pages=False)


def mla_plan(target: str) -> KernelSpec:
    return PREFILL_PLAN.spec(target, kv_storage=STORAGE)


class CompactIndicesParams(ctypes.Structure):
    """Mirror of csrc/attention/mla/compact_params.h."""

    _fields_ = [
        *[(name, P) for name in ("indices", "qo_indptr", "kv_indptr", "compacted", "lengths")],
        *[(name, P) for name in ("items", "schedule", "counters")],
        ("list_stride", I64),
        *[
            (name, I32)
            for name in ("num_lists", "max_len", "num_rows", "num_heads", "block_m", "block_n", "num_splits")
        ],
    ]


COMPACT_INDICES = Family(
    name="compact_indices",
    axes={},
    implementations=twins(
        CompactIndicesParams,
        lambda spec: Config({}, Launch(num_threads=512)),
        cuda="attention/mla/compact_indices.cuh",
        cpu="cpu/attention/mla/compact_indices.h",
    ),
)
register(MLA, COMPACT_INDICES)
