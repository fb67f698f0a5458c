# SPDX-License-Identifier: Apache-2.0
"""The table of core models in docs/packaging.md: `python -m tests.aot.core_table` prints it."""

from __future__ import annotations

from collections.abc import Iterator

from flashinfer import families
from flashinfer.aot.config import find_config, read_config
from flashinfer.aot.models import Model
from flashinfer.jit.spec import KernelSpec
from tests.aot.pretended_gpus import GPUS

TARGETS = (*GPUS, "x86-64-v3")


def rows() -> Iterator[tuple[Model, set[KernelSpec]]]:
    """The models, and which kernels each needs that none before it does."""
    families.register_all()
    seen: set[KernelSpec] = set()
    for row in read_config(find_config("core")):
        assert isinstance(row.content, Model)
        own = {spec for target in TARGETS for spec in row.specs(target)}
        yield row.content, own - seen
        seen |= own


def lines() -> Iterator[str]:
    yield "| model | hidden | heads | of | vocabulary | GPUs | dtypes | adds kernels |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for model, new in rows():
        heads, dims = f"{model.num_qo_heads} / {model.num_kv_heads}", str(model.head_dim)
        if model.kv_lora_rank:
            heads, dims = str(model.num_qo_heads), f"{model.kv_lora_rank} + {model.qk_rope_head_dim}"
        degrees, dtypes = ", ".join(map(str, model.tensor_parallel)), ", ".join(model.dtypes)
        cells = (model.name, model.hidden_size, heads, dims, model.vocab_size, degrees, dtypes, "yes" if new else "no")
        yield f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    print("\n".join(lines()))
