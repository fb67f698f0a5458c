# SPDX-License-Identifier: Apache-2.0
"""A plugin of vLLM: its RMSNorm, rotary embedding and SwiGLU by flashinfer, in every model that has them, and its
FlashInfer backend without a wait in every step (vllm_flashinfer_backend.py).

    pip install ./examples/engines/vllm_plugin
    vllm serve MODEL --attention-backend FLASHINFER \
        --ir-op-priority '{"rms_norm": ["flashinfer"], "fused_add_rms_norm": ["flashinfer"]}'

vLLM calls `register` in each of its processes, unless VLLM_PLUGINS names others. Without --ir-op-priority the norms
stay vLLM's own; custom_ops of --compilation-config, which torch.compile sets to none, decide of rotary embedding and
SwiGLU.
"""

from typing import Any, Optional  # not from __future__ import annotations: vLLM reads these of the norms

import torch

import flashinfer

PRIORITY = {"rms_norm": ["flashinfer"], "fused_add_rms_norm": ["flashinfer"]}  # ir_op_priority of vllm.LLM


def register() -> None:
    """Of models that are made from now on. A process may call it again."""
    from vllm import ir
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if "flashinfer" not in ir.ops.rms_norm.impls:
        ir.ops.rms_norm.register_impl("flashinfer", supports_args=takes)(rms_norm)
        register_sum = ir.ops.fused_add_rms_norm.register_impl("flashinfer", supports_args=takes_sum, inplace=True)
        register_sum(fused_add_rms_norm)
        register_layers()
        register_backend(AttentionBackendEnum.FLASHINFER, "vllm_flashinfer_backend.Backend")


def rms_norm(
    x: torch.Tensor, weight: Optional[torch.Tensor], epsilon: float, variance_size: Optional[int] = None
) -> torch.Tensor:
    assert weight is not None
    return flashinfer.rmsnorm(x, weight, epsilon)


def fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: Optional[torch.Tensor],
    epsilon: float,
    variance_size: Optional[int] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert weight is not None
    flashinfer.fused_add_rmsnorm(x, x_residual, weight, epsilon)
    return x, x_residual


def takes(x: Any, weight: Any, epsilon: Any, variance_size: Any = None) -> bool:
    is_served = x.dtype in (torch.float16, torch.bfloat16) and x.shape[-1] <= 32768
    return is_served and variance_size is None and weight is not None and weight.dtype == x.dtype


def takes_sum(x: Any, x_residual: Any, weight: Any, epsilon: Any, variance_size: Any = None) -> bool:
    return takes(x, weight, epsilon, variance_size) and x_residual.dtype == x.dtype


def register_layers() -> None:
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    class FlashInferSiluAndMul(SiluAndMul):
        def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
            return flashinfer.silu_and_mul(x)

    class FlashInferRotaryEmbedding(RotaryEmbedding):
        use_flashinfer = True  # which vLLM knows but never sets: it calls us, with cosines in fp32

    SiluAndMul.register_oot(name="SiluAndMul")(FlashInferSiluAndMul)
    RotaryEmbedding.register_oot(name="RotaryEmbedding")(FlashInferRotaryEmbedding)
