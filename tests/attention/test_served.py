# SPDX-License-Identifier: Apache-2.0
"""Decode over pages has the kernels of prefill over them compiled ahead, and the other way round."""

from __future__ import annotations

import json

from tests.kit import finish, fork

# In a process with GPUs that are not there, whose kernels do nothing.
PLAN_BOTH = """
    import json, torch
    from flashinfer.jit.resolver import Resolver
    from tests.aot.pretended_gpus import GPUS, Idle, install

    loaded, expected = [], []
    Resolver.holds = lambda self, spec: spec in loaded
    Resolver.load = lambda self, spec: (loaded.append(spec), Idle(spec))[1]
    Resolver.expect = lambda self, specs: expected.extend(specs)
    install((GPUS["sm_90a"][0], GPUS["sm_80"][0]))
    import flashinfer

    shapes = (32, 8, 128, 16)

    def plan(what, device, **options):
        int32 = lambda *values: torch.tensor(values, dtype=torch.int32, device=device)
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
        table = int32(0, 200), int32(*range(200)), int32(5)
        if what == "decode":
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
            wrapper.plan(*table, *shapes, q_data_type=torch.bfloat16, **options)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
            wrapper.plan(int32(0, 3000), *table, *shapes, causal=True, q_data_type=torch.bfloat16, **options)

    found = []
    for index in (0, 1):
        for first, second, options in (
            ("decode", "prefill", {}), ("prefill", "decode", {"window_left": 512, "logits_soft_cap": 30.0}),
            ("decode", "prefill", {"pos_encoding_mode": "ALIBI"}),
        ):
            plan(first, torch.device("cuda", index), **options)
            known = {*loaded, *expected}
            begin = len(loaded)
            plan(second, torch.device("cuda", index), **options)
            assert loaded[begin].family == second
            found.append(loaded[begin] in known and known.issuperset(loaded))
    print(json.dumps(found))
"""


def test_what_a_server_plans_next_is_under_way() -> None:
    """Where the options are those that models have; what is tried for once is not."""
    out, _ = finish(fork(PLAN_BOTH))
    assert json.loads(out) == [True, True, False] * 2
