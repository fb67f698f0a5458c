# SPDX-License-Identifier: Apache-2.0
"""What TVM's compiler gets from `flashinfer.jit`, as `tvm.relax.backend.cuda.flashinfer` of 0.27 asks for it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from flashinfer.errors import UnsupportedConfig
from tests.kit import ROOT
from tests.tvm.kit import Decode, Workspaces, check

PREFILL: dict[str, Any] = {
    "backend": "fa2",
    "uri": "batch_prefill_tvm_…",
    **dict.fromkeys(("dtype_q", "dtype_kv", "dtype_o"), torch.float16),
    "idtype": torch.int32,
    "head_dim_qk": 128,
    "head_dim_vo": 128,
    "pos_encoding_mode": 0,
    "additional_tensor_names": [],
    "additional_tensor_dtypes": [],
    "additional_scalar_names": ["sm_scale", "rope_rcp_scale", "rope_rcp_theta"],
    "additional_scalar_dtypes": ["double", "double", "double"],
    "variant_name": "DefaultAttention<false, false, false, false>",
    "variant_decl": "#include <flashinfer/attention/variants.cuh>",
}
DECODE = {name: value for name, value in PREFILL.items() if name != "backend"}
MLA = {"backend": "fa2", "head_dim_ckv": 512, "head_dim_kpe": 64, "use_profiler": False}


def test_there_is_nothing_to_link() -> None:
    from flashinfer.jit import (
        gen_batch_mla_module,
        gen_customize_batch_decode_module,
        gen_customize_batch_prefill_module,
    )

    expected = {
        "batch_prefill": {"batch_prefill_plan", "batch_prefill_paged_run", "batch_prefill_ragged_run"},
        "batch_decode": {"batch_decode_plan", "batch_decode_run"},
        "batch_mla": {"batch_mla_plan", "batch_mla_run"},
    }
    specs = (
        gen_customize_batch_prefill_module(**PREFILL),
        gen_customize_batch_decode_module(**DECODE),
        gen_batch_mla_module(**MLA),
    )
    for spec, names in zip(specs, expected.values()):
        assert list(spec.sources) == []
        spec.build(verbose=False)
        assert spec.get_object_paths() == []
        assert set(spec.build_and_load()) == names


def test_what_is_loaded_computes() -> None:
    from flashinfer.jit import gen_customize_batch_decode_module

    module = gen_customize_batch_decode_module(**DECODE).build_and_load()
    step = Decode(Workspaces(torch.device("cpu")))
    info = module["batch_decode_plan"](*step.workspaces, *step.planned)
    module["batch_decode_run"](*step.workspaces[:2], info, *step.run_with)
    check((step.out, step.lse), step.expected())


@pytest.mark.parametrize(
    "asked",
    [
        {"pos_encoding_mode": 1},
        {"variant_name": "DefaultAttention<true, false, false, false>"},
        {"variant_name": "MyVariant"},
        {"additional_tensor_names": ["sink"]},
        {"additional_scalar_names": ["sm_scale"]},
    ],
    ids=str,
)
def test_what_is_refused(asked: dict[str, Any]) -> None:
    from flashinfer.jit import gen_customize_batch_prefill_module

    with pytest.raises(UnsupportedConfig, match="Next step"):
        gen_customize_batch_prefill_module(**{**PREFILL, **asked})


def test_without_the_extra() -> None:
    """An import that fails is how TVM knows; nothing else of the library is in the way."""
    program = """
import sys
sys.modules["tvm_ffi"] = None
import flashinfer.jit
assert not hasattr(flashinfer.jit, "gen_batch_mla_module")
try:
    from flashinfer.jit import gen_customize_batch_prefill_module
except ImportError:
    pass
else:
    raise AssertionError
try:
    flashinfer.jit.gen_batch_mla_module
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "there is no tvm_ffi; next step: pip install 'apache-tvm-ffi>=0.1.11,<0.2'" in done.stdout
