# SPDX-License-Identifier: Apache-2.0
"""The table of architectures: what each target gets, and that a new one is a row of it."""

from __future__ import annotations

import pytest

from flashinfer import target as targets
from flashinfer.errors import UnsupportedConfig
from flashinfer.families import arch as archs
from flashinfer.families import sampling
from flashinfer.families.arch import Arch, arch
from flashinfer.families.attention.decode import DECODE

# KiB of shared memory of an SM and of a block, by NVIDIA's table of compute capabilities.
HARDWARE = {
    **{"sm_80": (164, 163), "sm_86": (100, 99), "sm_87": (164, 163), "sm_89": (100, 99), "sm_90a": (228, 227)},
    **{"sm_100a": (228, 227), "sm_103": (228, 227), "sm_110a": (228, 227), "sm_120a": (100, 99), "sm_121": (100, 99)},
}


@pytest.mark.parametrize("target", HARDWARE)
def test_a_kernel_fits_wherever_its_machine_code_runs(target: str) -> None:
    """A target gets no more than it has, nor than any later one that runs the same cubin."""
    row = arch(target)
    assert row.smem_per_sm <= HARDWARE[target][0] << 10
    for other, (_, per_block) in HARDWARE.items():
        if target in targets.candidates(other):
            assert row.smem_per_block <= per_block << 10, other


@pytest.mark.parametrize(
    ("target", "like"), [("sm_87", "sm_86"), ("sm_103a", "sm_100"), ("sm_121a", "sm_120"), ("sm_130a", "sm_120")]
)
def test_without_a_row_the_one_before_it_counts(target: str, like: str) -> None:
    assert arch(target) == arch(like)


def test_before_the_first_row() -> None:
    with pytest.raises(UnsupportedConfig, match="target sm_75: kernels need sm_80 or later"):
        arch("sm_75")
    with pytest.raises(UnsupportedConfig, match="x86-64-v3"):
        arch("x86-64-v3")


def test_a_new_gpu_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tile tables and placements ask is answered by the row, whatever the number of the architecture."""
    axes = {
        **dict.fromkeys(("q_dtype", "kv_dtype", "o_dtype"), "bf16"),
        **dict.fromkeys(("head_dim_qk", "head_dim_vo"), 128),
        **{"kv_storage": "paged", "pos_encoding": "none", "has_window": False, "has_soft_cap": False},
        **{"has_sinks": False, "device_scales": False, "group_tile": 8},
    }

    def choices(target: str) -> tuple[object, ...]:
        place = sampling.placement("fp32", 128256, 1, 132, target, keeps_row=True)
        return place, DECODE.config(DECODE.spec(target, **axes)).launch

    assert choices("sm_130a") == choices("sm_120a") != choices("sm_90a")
    monkeypatch.setitem(archs._ARCHS, (13, 0), Arch(228 << 10, 227 << 10, True))
    assert choices("sm_130a") == choices("sm_90a")


def test_samplers_of_one_gpu_are_no_kernels_of_another() -> None:
    """Rows of records and configs are for every target of a build: what one GPU has room for may not fail on others."""
    spread = {"dtype": "fp32", "input": "probs", "filter": "top_p", "cluster_size": 8, "row_kib": 40}
    kept = {**spread, "cluster_size": 1, "row_kib": 208}
    for target in (*HARDWARE, "x86-64-v3"):
        has_clusters = target in ("sm_90a", "sm_100a", "sm_103")
        for family in (sampling.SAMPLE_ROW, sampling.NORMALIZE_ROW, sampling.CHAIN_SPECULATIVE):
            axes = {"op": "softmax"} | {axis: value for axis, value in spread.items() if axis in family.axes}
            spec = family.spec(target, **{axis: axes[axis] for axis in family.axes})
            if has_clusters:
                assert family.config(spec).launch.cluster_size == 8
            else:
                with pytest.raises(UnsupportedConfig, match=f"cluster_size=8 is not supported on {target}"):
                    family.config(spec)
        spec = sampling.SAMPLE_ROW.spec(target, **kept)
        if target.startswith("sm_") and arch(target).smem_per_block < 208 << 10:
            with pytest.raises(UnsupportedConfig, match=f"row_kib=208 takes .* a block of {target} has"):
                sampling.SAMPLE_ROW.config(spec)
        else:
            sampling.SAMPLE_ROW.config(spec)


def test_clusters_and_dependent_launch() -> None:
    """Both began with Hopper; a row is spread over a cluster where that was tried."""
    for target in HARDWARE:
        cluster_size = sampling.placement("fp32", 128256, 1, 132, target, keeps_row=False)["cluster_size"]
        assert (cluster_size > 1) == (target in ("sm_90a", "sm_100a", "sm_103"))
        assert targets.launches_dependent(target) == (targets.capability(target)[0] >= 9)
    assert not targets.launches_dependent("x86-64-v3")
