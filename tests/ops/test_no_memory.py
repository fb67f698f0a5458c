# SPDX-License-Identifier: Apache-2.0
"""A kernel of the CPU that gets no memory for its scratch raises MemoryError, and the next call works."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from flashinfer.jit.toolchain import HostCxx
from tests.kit import finish, spawn

# Stands before the C library in a process of its own. torch allocates by another name.
SHIM = """
#include <stdlib.h>
static int refuses;
void set_refuses(int value) { refuses = value; }
void *aligned_alloc(size_t alignment, size_t size) {
  void *memory = NULL;
  return refuses || posix_memalign(&memory, alignment, size) ? NULL : memory;
}
"""
CALLS = """
import ctypes, os, torch, flashinfer
from flashinfer import sampling

set_refuses = ctypes.CDLL(os.environ["LD_PRELOAD"]).set_refuses
probs = torch.softmax(torch.randn(3, 100), -1)
q, k, v = torch.randn(4, 4, 64), torch.randn(2000, 2, 64), torch.randn(2000, 2, 64)
cache, table = torch.stack([k, v], 1).view(125, 16, 2, 2, 64).transpose(1, 2), torch.arange(125).int()
index = lambda *values: torch.tensor(values).int()
workspace = torch.empty(1 << 20, dtype=torch.uint8)
decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
decode.plan(index(0, 100, 125), table, index(16, 16), 4, 2, 64, 16, q_data_type=torch.float32)
prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
prefill.plan(index(0, 2, 4), index(0, 100, 125), table, index(16, 16), 4, 2, 64, 16, q_data_type=torch.float32)
calls = {
    "decode": lambda: decode.run(q[:2], cache),
    "single_decode": lambda: flashinfer.single_decode_with_kv_cache(q[0], k, v),
    "prefill": lambda: prefill.run(q, cache),
    "single_prefill": lambda: flashinfer.single_prefill_with_kv_cache(q, k, v),
    "sample_row": lambda: sampling.top_p_sampling_from_probs(probs, 0.9, seed=1),
    "normalize_row": lambda: sampling.top_p_renorm_probs(probs, 0.9),
}
for name, call in calls.items():
    expected = call()
    set_refuses(1)
    try:
        call()
        raise SystemExit(f"{name}: no error")
    except MemoryError as error:
        assert "no memory" in str(error) and "Next step" in str(error), error
    finally:
        set_refuses(0)
    assert torch.equal(call(), expected), name
"""


def test_no_memory_is_an_error(tmp_path: Path) -> None:
    shim = tmp_path / "shim.so"
    (tmp_path / "shim.c").write_text(SHIM)
    command = [HostCxx().executable(), "-x", "c", "-shared", "-fPIC", "-O1", "-o", str(shim), str(tmp_path / "shim.c")]
    subprocess.run(command, check=True)
    finish(spawn(CALLS, LD_PRELOAD=shim, FLASHINFER_CACHE_DIR=os.environ.get("FLASHINFER_CACHE_DIR")))
