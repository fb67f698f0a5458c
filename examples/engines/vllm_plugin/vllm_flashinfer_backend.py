# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashInfer backend without a wait for the device: in every step that plans a wrapper it copies the lengths of
the batch back. The host knows them, unless drafts are being speculated."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.flashinfer import FlashInferBackend, FlashInferMetadataBuilder


class Builder(FlashInferMetadataBuilder):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._lengths_are_known = vllm_config.speculative_config is None and not self.use_dcp
        self._copied = torch.cuda.Event()

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        lengths = common_attn_metadata.seq_lens_cpu_upper_bound  # a bound because of drafts
        if self._lengths_are_known and lengths is not None and common_attn_metadata._seq_lens_cpu is None:
            # What the last build left in pinned memory was to be copied before the step that the host has the tokens
            # of by now: nobody waits here, but that is to be certain.
            self._copied.synchronize()
            common_attn_metadata._seq_lens_cpu = lengths
        built = super().build(common_prefix_len, common_attn_metadata, fast_build)
        self._copied.record()
        return built


class Backend(FlashInferBackend):
    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder
