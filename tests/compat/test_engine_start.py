# SPDX-License-Identifier: Apache-2.0
"""What engines touch of upstream's JIT and autotuner as they start, in the order in which they do."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

import flashinfer
from flashinfer import autotuner
from flashinfer.fused_moe.utils import get_hybrid_num_tokens_buckets
from flashinfer.jit import cache_dir
from flashinfer.version import __version__
from tests.kit import finish, fork


def test_the_autotune_pass_of_an_engine(tmp_path: Path) -> None:
    tuner = autotuner.AutoTuner.get()
    assert tuner is autotuner.AutoTuner.get()
    group = object()
    autotuner.set_autotune_process_group(group)
    assert autotuner.get_autotune_process_group() is group
    ran = []
    try:
        buckets = get_hybrid_num_tokens_buckets(48)
        with (
            torch.inference_mode(),
            autotuner.autotune(tune_mode=True, skip_ops={"fp4_gemm"}, cache=str(tmp_path / "x")),
            autotuner.autotune(tuning_buckets=buckets, round_up=True),
        ):
            ran.append(flashinfer.rmsnorm(torch.ones(2, 64), torch.ones(64)))
    finally:
        autotuner.set_autotune_process_group(None)
    assert len(ran) == 1 and autotuner.get_autotune_process_group() is None
    assert not tuner._dirty, "an engine would write a file, and leave out the pass the next time"
    assert list(tmp_path.iterdir()) == []


def test_the_autotune_pass_of_another_engine(tmp_path: Path) -> None:
    from flashinfer import autotune_v2

    path, ran = tmp_path / "tp0.json", []
    with autotuner.autotune(True, cache=None, skip_ops=set()), autotune_v2(mode="tune", persistent_cache=False):
        ran.append(True)
    tuner = autotuner.AutoTuner.get()
    tuner.save_configs(str(path))
    assert ran and tuner.load_configs(str(path))
    assert not hasattr(flashinfer, "autotune_v2_reload"), "vLLM would take this way"


def test_an_exception_leaves_the_autotune_pass() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), autotuner.autotune():
        raise RuntimeError("out of memory")


def test_saved_configs_are_those_of_this_version(tmp_path: Path) -> None:
    tuner, path = autotuner.AutoTuner.get(), tmp_path / "configs.json"
    assert not tuner.load_configs(str(path))
    tuner.save_configs(str(path))
    assert tuner.load_configs(str(path))
    tuner.clear_cache()
    for other in ("", "[]", "{}", json.dumps({"_metadata": {"flashinfer_version": "0.7.2"}})):
        path.write_text(other)
        assert not tuner.load_configs(str(path))


@pytest.mark.parametrize("most, least, buckets", [(48, 1, (1, 2, 4, 8, 16, 32, 48)), (1, 1, (1,)), (8, 4, (4, 8))])
def test_token_counts(most: int, least: int, buckets: tuple[int, ...]) -> None:
    assert get_hybrid_num_tokens_buckets(most, least) == buckets


def test_the_workspace_folder_is_of_this_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer.jit import env

    monkeypatch.setenv("FLASHINFER_CACHE_DIR", str(tmp_path / "flashinfer"))
    assert tmp_path / "flashinfer" / __version__ == env.FLASHINFER_WORKSPACE_DIR
    monkeypatch.setattr(cache_dir, "preferred", lambda: None)  # no home directory
    assert env.FLASHINFER_WORKSPACE_DIR.parts[-2:] == ("flashinfer", __version__)
    assert not hasattr(env, "FLASHINFER_CUBIN_DIR")
    assert not (tmp_path / "flashinfer").exists()


def test_an_engine_that_silences_builds_does_not_silence_a_compile(tmp_path: Path) -> None:
    code = """
    import logging, torch, flashinfer
    from flashinfer.jit.core import logger
    logger.setLevel(logging.ERROR)
    flashinfer.rmsnorm(torch.ones(2, 72), torch.ones(72))
    """
    _, err = finish(fork(code, FLASHINFER_CACHE_DIR=tmp_path, FLASHINFER_DISABLE_AOT="1", FLASHINFER_LOG_LEVEL=None))
    assert "compiled rmsnorm" in err
    assert not hasattr(__import__("flashinfer.jit.core").jit.core, "check_cuda_arch"), "vLLM's sampler would call it"
    assert logging.getLogger("flashinfer.jit").parent is logging.getLogger("flashinfer")


def test_the_other_path_to_cascade() -> None:
    from flashinfer import cascade
    from flashinfer.triton import cascade as other

    assert {name: getattr(other, name) for name in other.__all__} == {
        name: getattr(cascade, name)
        for name in ("merge_state", "merge_state_in_place", "merge_states", "variable_length_merge_states")
    }
