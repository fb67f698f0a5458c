# SPDX-License-Identifier: Apache-2.0
"""The way of a call through the files: how many it passes, and how often it comes back to one that it had left.

Counted on calls like the one before, which are what a server makes.
"""

from __future__ import annotations

import json

from tests.kit import finish, fork

# In a process with a GPU that is not there, whose kernels do nothing.
WALK = """
    import json, sys, torch
    from pathlib import Path
    from flashinfer.jit.resolver import Resolver
    from tests.aot.pretended_gpus import GPUS, Idle, install

    Resolver.load = lambda self, spec: Idle(spec)
    Resolver.expect = lambda self, specs: None
    install(GPUS["sm_90a"][:1])
    import flashinfer

    device = torch.device("cuda:0")
    torch.cuda.device_count = lambda: 1
    torch._C._dynamo.guards._empty_strided_cuda = lambda shape, strides, dtype: torch.empty(
        shape, dtype=dtype, device=device
    )

    PACKAGE = str(Path(flashinfer.__file__).parent)

    def stays(call):
        files = []

        def note(frame, event, arg):
            if event not in ("call", "return"):
                return
            if event == "return":  # to whoever of the package called
                frame = frame.f_back
                while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
                    frame = frame.f_back
            name = "" if frame is None else frame.f_code.co_filename
            if name.startswith(PACKAGE) and name not in files[-1:]:
                files.append(name)

        sys.setprofile(note)
        call()
        sys.setprofile(None)
        return files

    int32 = lambda *values: torch.tensor(values, dtype=torch.int32, device=device)
    rows = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16, device=device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(128 << 20, dtype=torch.uint8, device=device))
    table = int32(0, 4, 8), int32(0, 4, 8), int32(*range(8)), int32(16, 16)
    q, k, probs = rows(8, 32, 128), rows(8, 8, 128), torch.ones(4, 1000, device=device)
    ends, starts = int32(0, 4, 8), int32(0, 0)
    calls = {
        "single_prefill": lambda: flashinfer.single_prefill_with_kv_cache(q, k, k, causal=True),
        "prefill.plan": lambda: wrapper.plan(*table, 32, 8, 128, 16, causal=True, q_data_type=torch.bfloat16),
        "apply_rope_inplace": lambda: flashinfer.apply_rope_inplace(q, k, ends, starts),
        "top_p": lambda: flashinfer.sampling.top_p_sampling_from_probs(probs, 0.9),
    }
    ways = {}
    for name, call in calls.items():
        call(), call()
        files = stays(call)
        ways[name] = len(set(files)), len(files) - len(set(files))
    print(json.dumps(ways))
"""


def test_calls_pass_few_files() -> None:
    """files, returns to a file that was left, the way back included."""
    out, _ = finish(fork(WALK))
    assert json.loads(out) == {
        "single_prefill": [2, 1],
        "prefill.plan": [4, 3],
        "apply_rope_inplace": [3, 2],
        "top_p": [4, 3],
    }
