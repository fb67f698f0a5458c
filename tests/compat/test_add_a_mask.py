# SPDX-License-Identifier: Apache-2.0
"""docs/add_a_mask.md is followed to the letter: its edits, and what they compute."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from tests import warm
from tests.compat import pages

PROGRAM = """
import sys

import torch

import flashinfer
from flashinfer.families.attention import prefill as families
from flashinfer.jit import source, toolchain

assert flashinfer.__file__.startswith(sys.argv[1])
qo_lens, kv_lens = (70, 9, 1), (200, 4, 1)
q, k, v = (torch.randn(sum(lengths), heads, 64) for lengths, heads in ((qo_lens, 4), (kv_lens, 2), (kv_lens, 2)))
indptrs = [torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32) for lengths in (qo_lens, kv_lens)]
seen = [torch.ones(n, m).tril(m - n - 1).bool().flatten() for n, m in zip(qo_lens, kv_lens)]


def run(mask, **options):
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    wrapper.plan(*indptrs, 4, 2, 64, q_data_type=torch.float32, **options)
    wrapper._plan.mask = mask
    return wrapper.run(q, k, v, return_lse=True)


for ours, expected in zip(run("strict", causal=True), run("custom", custom_mask=torch.cat(seen))):
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
assert not torch.equal(ours, run("causal", causal=True)[1])

for target in sys.argv[2:]:
    spec = families.prefill(target, q_dtype="bf16", kv_dtype="bf16", head_dim=128, kv_storage="ragged", mask="strict")
    assert toolchain.Nvrtc().compile(source.render(spec)).machine_code.startswith(b"\\x7fELF")
    print(families.PREFILL.implementation(spec).header)
"""


def _apply(diff: str, text: str) -> str:
    """A block of a page whose lines begin with a space, - or +."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(before) == 1, before
    return text.replace(before, after)


def test_the_page_works(tmp_path: Path) -> None:
    for name in ("csrc", "flashinfer"):
        shutil.copytree(pages.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    edited = []
    for heading, blocks in pages.sections("add_a_mask.md").items():
        name = re.search(r"`(\S+\.\w+)`$", heading)
        if name:
            path = tmp_path / name[1]
            text = path.read_text()
            for block in blocks:
                text = _apply(block, text)
            path.write_text(text)
            edited.append(name[1])
    assert edited == ["csrc/attention/visibility.cuh", "flashinfer/families/attention/params.py"]
    program = ["-c", PROGRAM, str(tmp_path), "sm_90a", "sm_80"]
    done = warm.run(program, {**os.environ, "PYTHONPATH": str(tmp_path)}, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["attention/sm90/prefill.cuh", "attention/prefill/kernel.cuh"]
