# SPDX-License-Identifier: Apache-2.0
"""Rows from config.json: the numbers are those that models are published with, shortened to what they say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashinfer.aot import hf
from flashinfer.aot.config import find_config, read_config, read_specs, why_unbuildable
from flashinfer.aot.models import Model
from tests.aot.kit import run_cli

COMMON = {
    "architectures": ["SomeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 48,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
}


def config(model_type: str, hidden: int, heads: int, kv: int, mlp: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        **COMMON,
        "model_type": model_type,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        **more,
    }


LLAMA_31_8B = config("llama", 4096, 32, 8, 14336, 128256, rope_scaling={"factor": 8.0, "rope_type": "llama3"})
SCOUT = config(
    "llama4_text", 5120, 40, 8, 8192, 202048, head_dim=128, intermediate_size_mlp=16384, interleave_moe_layer_step=1,
    num_local_experts=16, num_experts_per_tok=1, attention_chunk_size=8192, attn_temperature_tuning=4, attn_scale=0.1,
    floor_scale=8192, for_llm_compressor=False, no_rope_layers=[], use_qk_norm=True, router_aux_loss_coef=0.001,
    router_jitter_noise=0.0, output_router_logits=False,
)  # fmt: skip
QWEN3_NEXT = config(
    "qwen3_next", 2048, 16, 2, 5120, 151936, head_dim=256, num_experts=512, moe_intermediate_size=512,
    shared_expert_intermediate_size=512, num_experts_per_tok=10, decoder_sparse_step=1, mlp_only_layers=[],
    norm_topk_prob=True, full_attention_interval=4, partial_rotary_factor=0.25, linear_conv_kernel_dim=4,
    linear_key_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=32, linear_value_head_dim=128,
    router_aux_loss_coef=0.001, output_router_logits=False,
)  # fmt: skip
QWEN_NEXT = {
    "qk_norm": True, "gemma_norm": True, "rotary_dim": 64, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
}  # fmt: skip
QWEN35_35B = config(
    "qwen3_5_moe_text", 2048, 16, 2, 512, 248320, head_dim=256, num_experts=256, moe_intermediate_size=512,
    shared_expert_intermediate_size=512, num_experts_per_tok=8, attn_output_gate=True, full_attention_interval=4,
    layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 10, linear_key_head_dim=128, linear_conv_kernel_dim=4,
    linear_num_key_heads=16, linear_num_value_heads=32, linear_value_head_dim=128,
    rope_parameters={
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25, "rope_type": "default",
    },
    mtp_num_hidden_layers=1, mamba_ssm_dtype="float32",
)  # fmt: skip
DEEPSEEK_V3 = config(
    "deepseek_v3", 7168, 128, 128, 18432, 129280, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
    first_k_dense_replace=3, moe_layer_freq=1, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, n_group=8, topk_group=4, topk_method="noaux_tc", norm_topk_prob=True,
    num_experts_per_tok=8, routed_scaling_factor=2.5, scoring_func="sigmoid", ep_size=1, num_nextn_predict_layers=1,
    quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    rope_scaling={"type": "yarn", "factor": 40},
)  # fmt: skip
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
GEMMA_3_27B = config(
    "gemma3_text", 5376, 32, 16, 21504, 262208, head_dim=128, sliding_window=1024, query_pre_attn_scalar=168,
    rope_local_base_freq=10000.0, sliding_window_pattern=6,
)  # fmt: skip
del GEMMA_3_27B["hidden_act"]
GPT_OSS_20B = config(
    "gpt_oss", 2880, 64, 8, 2880, 201088, head_dim=64, num_local_experts=32, num_experts_per_tok=4, experts_per_token=4,
    sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 12, swiglu_limit=7.0, attention_bias=True,
    initial_context_length=4096, router_aux_loss_coef=0.9, output_router_logits=False,
    rope_scaling={"rope_type": "yarn", "factor": 32.0, "truncate": False},
    quantization_config={"quant_method": "mxfp4"},
)  # fmt: skip
CHATGLM = {
    "model_type": "chatglm", "hidden_size": 4096, "num_attention_heads": 32, "num_layers": 40, "kv_channels": 128,
    "multi_query_attention": True, "multi_query_group_num": 2, "ffn_hidden_size": 13696, "padded_vocab_size": 151552,
    "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True, "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "layernorm_epsilon": 1e-5,
    "fp32_residual_connection": False, "original_rope": True, "post_layer_norm": True, "rope_ratio": 500,
    "seq_length": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip

GEMMA = {"gemma_norm": True, "activation": "gelu_tanh", "windowed_layers": "some"}
# config; hidden_size, num_qo_heads, num_kv_heads, head_dim, intermediate_sizes, vocab_size, other keys; notes, in order
ROWS: dict[str, tuple[dict[str, Any], tuple[Any, ...], list[str]]] = {
    "Llama-2-7B": (config("llama", 4096, 32, 32, 11008, 32000), (4096, 32, 32, 128, [11008], 32000, {}), []),
    "Llama-3-8B": (LLAMA_31_8B, (4096, 32, 8, 128, [14336], 128256, {}), []),
    "Llama-3.2-1B": (
        config("llama", 2048, 32, 8, 8192, 128256, head_dim=64, tie_word_embeddings=True),
        (2048, 32, 8, 64, [8192], 128256, {}),
        [],
    ),
    "Llama-4-Scout": (
        {"model_type": "llama4", "text_config": SCOUT, "vision_config": {"hidden_size": 1408}, "boi_token_index": 20},
        (5120, 40, 8, 128, [8192], 202048, {}),
        ["vision_config: .*language model", "neighbours", "normalised, not by RMSNorm", "chunk_size = 8192"],
    ),
    "Llama-4-Maverick": (
        {**SCOUT, "interleave_moe_layer_step": 2, "num_local_experts": 128, "use_qk_norm": False},
        (5120, 40, 8, 128, [16384, 8192], 202048, {}),
        ["neighbours", "chunk_size = 8192"],
    ),
    "Mistral-7B-v0.1": (
        config("mistral", 4096, 32, 8, 14336, 32000, sliding_window=4096),
        (4096, 32, 8, 128, [14336], 32000, {"windowed_layers": "all"}),
        [],
    ),
    "Mistral-Small-3.1-24B": (
        {
            "model_type": "mistral3", "image_token_index": 10, "projector_hidden_act": "gelu", "vision_config": {},
            "text_config": config("mistral", 5120, 32, 8, 32768, 131072, head_dim=128, sliding_window=None),
        },
        (5120, 32, 8, 128, [32768], 131072, {}),
        ["vision_config"],
    ),
    "Mixtral-8x7B": (
        config("mixtral", 4096, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
        (4096, 32, 8, 128, [14336], 32000, {}),
        [],
    ),
    "Qwen2.5-7B": (
        config("qwen2", 3584, 28, 4, 18944, 152064, use_sliding_window=False, sliding_window=131072),
        (3584, 28, 4, 128, [18944], 152064, {}),
        [],
    ),
    "Qwen2-57B-A14B": (
        config(
            "qwen2_moe", 3584, 28, 4, 18944, 151936, num_experts=64, moe_intermediate_size=2560, num_experts_per_tok=8,
            shared_expert_intermediate_size=20480, decoder_sparse_step=1, norm_topk_prob=False,
            use_sliding_window=False, sliding_window=65536, max_window_layers=28, router_aux_loss_coef=0.001,
        ),
        (3584, 28, 4, 128, [2560, 20480], 151936, {}),
        [],
    ),
    "Qwen3-8B": (
        config("qwen3", 4096, 32, 8, 12288, 151936, head_dim=128, use_sliding_window=False, sliding_window=None),
        (4096, 32, 8, 128, [12288], 151936, {"qk_norm": True}),
        [],
    ),
    "Qwen3-30B-A3B": (
        config(
            "qwen3_moe", 2048, 32, 4, 6144, 151936, head_dim=128, num_experts=128, moe_intermediate_size=768,
            decoder_sparse_step=1, mlp_only_layers=[], num_experts_per_tok=8, norm_topk_prob=True,
        ),
        (2048, 32, 4, 128, [768], 151936, {"qk_norm": True}),
        [],
    ),
    "Qwen3-Next-80B-A3B": (
        QWEN3_NEXT,
        (2048, 16, 2, 256, [512], 151936, QWEN_NEXT),
        ["gated"],
    ),
    "Qwen3.5-35B-A3B": (
        {"model_type": "qwen3_5_moe", "text_config": QWEN35_35B, "vision_config": {}, "vision_end_token_id": 5},
        (2048, 16, 2, 256, [512], 248320, QWEN_NEXT),
        ["vision", "gated", "mrope"],
    ),
    "GLM-4-9B": (CHATGLM, (4096, 32, 2, 128, [13696], 151552, {"interleave": True}), []),
    "GLM-4-9B-0414": (
        config("glm4", 4096, 32, 2, 13696, 151552, head_dim=128, partial_rotary_factor=0.5),
        (4096, 32, 2, 128, [13696], 151552, {"rotary_dim": 64, "interleave": True}),
        [],
    ),
    "GLM-4.5": (
        config(
            "glm4_moe", 5120, 96, 8, 12288, 151552, head_dim=128, partial_rotary_factor=0.5, use_qk_norm=True,
            n_routed_experts=160, n_shared_experts=1, moe_intermediate_size=1536, first_k_dense_replace=3, n_group=1,
            topk_group=1, num_experts_per_tok=8, routed_scaling_factor=2.5, num_nextn_predict_layers=1,
        ),
        (5120, 96, 8, 128, [12288, 1536], 151552, {"qk_norm": True, "rotary_dim": 64}),
        [],
    ),
    "Gemma-2-9B": (
        config(
            "gemma2", 3584, 16, 8, 14336, 256000, head_dim=256, attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
            sliding_window=4096, query_pre_attn_scalar=256, cache_implementation="hybrid",
        ),
        (3584, 16, 8, 256, [14336], 256000, {**GEMMA, "soft_cap": True}),
        [],
    ),
    "Gemma-3-27B": (
        {"model_type": "gemma3", "text_config": GEMMA_3_27B, "vision_config": {}, "mm_tokens_per_image": 256},
        (5376, 32, 16, 128, [21504], 262208, {**GEMMA, "qk_norm": True}),
        ["vision", "hidden_activation is not in the file; gelu_pytorch_tanh"],
    ),
    "Gemma-3-4B": (  # which leaves out most
        {
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
            },
            "vision_config": {},
        },
        (2560, 8, 4, 256, [10240], 262208, {**GEMMA, "qk_norm": True}),
        [
            "vision", "num_attention_heads is not in the file; 8", "num_key_value_heads is not", "head_dim is not",
            "vocab_size is not", "hidden_activation is not",
        ],
    ),
    "Phi-4": (
        config("phi3", 5120, 40, 10, 17920, 100352, embd_pdrop=0.0, resid_pdrop=0.0, sliding_window=None),
        (5120, 40, 10, 128, [17920], 100352, {}),
        [],
    ),
    "Phi-4-mini": (
        config("phi3", 3072, 24, 8, 8192, 200064, partial_rotary_factor=0.75, sliding_window=262144),
        (3072, 24, 8, 128, [8192], 200064, {"rotary_dim": 96, "windowed_layers": "all"}),
        [],
    ),
    "Phi-3.5-mini": (config("phi3", 3072, 32, 32, 8192, 32064), (3072, 32, 32, 96, [8192], 32064, {}), []),
    "gpt-oss-20b": (
        GPT_OSS_20B,
        (2880, 64, 8, 64, [2880], 201088, {"windowed_layers": "some"}),
        [
            "sink", "clamped SwiGLU", r"quantization_config \(mxfp4\)",
            "initial_context_length = 4096: unknown here",
        ],
    ),
}  # fmt: skip

KEYS = ("hidden_size", "num_qo_heads", "num_kv_heads", "head_dim", "intermediate_sizes", "vocab_size")


def assert_notes(notes: list[str], patterns: list[str]) -> None:
    assert len(notes) == len(patterns), "\n".join(notes)
    for note, pattern in zip(notes, patterns):
        assert re.search(pattern, note), f"{pattern!r} is not in {note!r}"


@pytest.mark.parametrize("name", ROWS)
def test_row_of_a_published_model(name: str) -> None:
    published, (*numbers, others), notes = ROWS[name]
    row = hf.translate(published, name)
    assert row.values == {"name": name, **dict(zip(KEYS, numbers)), **others, "tensor_parallel": [1]}
    assert_notes(row.notes, notes)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_builds(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ROWS[name][0]))
    assert run_cli("aot", "config", "--from-hf", folder, "--tp", "1,2") == 0
    out, err = capsys.readouterr()
    (tmp_path / "mine.toml").write_text(out)
    (row,) = read_config(tmp_path / "mine.toml")
    assert isinstance(row.content, Model) and row.content.name == name
    assert row.content.tensor_parallel == (1, 2)
    assert read_specs([tmp_path / "mine.toml"], ["sm_80", "sm_90a"])
    for pattern in ROWS[name][2]:
        assert re.search(f"^# - .*{pattern}", out, re.MULTILINE), "in the file"
        assert re.search(f"^not in this row: .*{pattern}", err, re.MULTILINE), "and told"


def test_rows_are_those_of_the_core_set() -> None:
    core = {row.content.name: row.content for row in read_config(find_config("core")) if isinstance(row.content, Model)}
    compared = 0
    for name, (published, _, notes) in ROWS.items():
        if name in core and not notes and name != "Qwen2-57B-A14B":  # whose row has a dense MLP that no layer has
            values = hf.translate(published, name, core[name].tensor_parallel).values
            as_model = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            assert Model(**as_model) == replace(core[name], mixed_batches=False)  # which no config.json tells
            compared += 1
    assert compared >= 6


def test_fp8_weights_of_other_scales() -> None:
    for weights in ({"quant_method": "fp8"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}):
        row = hf.translate({**DEEPSEEK_V3, "quantization_config": weights}, "m", [8])
        assert "fp8_blocks" not in row.values
        assert_notes(row.notes, [r"quantization_config \(fp8\)"])


@pytest.mark.parametrize(
    ("changes", "expected", "notes"),
    [
        ({}, {**LATENT, "q_lora_rank": 1536, "num_qo_heads": 128, "intermediate_sizes": [18432, 2048]}, []),
        (  # V2-Lite
            {
                "model_type": "deepseek_v2", "hidden_size": 2048, "num_attention_heads": 16, "q_lora_rank": None,
                "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1408,
                "intermediate_size": 10944, "vocab_size": 102400,
            },
            {**LATENT, "num_qo_heads": 16, "intermediate_sizes": [10944, 1408, 2816], "vocab_size": 102400},
            [],
        ),
        (
            {"model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048},
            {**LATENT, "q_lora_rank": 1536, "scaled_rows": True},
            ["index_topk = 2048: the indexer"],
        ),
        (
            {"model_type": "kimi_k2", "num_attention_heads": 64, "n_routed_experts": 384, "vocab_size": 163840},
            {**LATENT, "q_lora_rank": 1536, "num_qo_heads": 64, "vocab_size": 163840},
            [],
        ),
    ],
    ids=["DeepSeek-V3", "DeepSeek-V2-Lite", "DeepSeek-V3.2", "Kimi-K2"],
)  # fmt: skip
def test_latent_attention(changes: dict[str, Any], expected: dict[str, Any], notes: list[str], tmp_path: Path) -> None:
    row = hf.translate({**DEEPSEEK_V3, **changes}, "m", [1, 8])
    assert {key: row.values.get(key) for key in expected} == expected
    assert ("q_lora_rank" in row.values) == ("q_lora_rank" in expected)
    assert not {"num_kv_heads", "head_dim"} & row.values.keys()
    assert row.values["fp8_blocks"] is True
    assert_notes(row.notes, notes)
    (tmp_path / "row.toml").write_text(hf.toml(row))
    (read,) = read_config(tmp_path / "row.toml")
    assert isinstance(read.content, Model) and read.content.kv_lora_rank == 512 and read.content.num_kv_heads == 1
    assert why_unbuildable(hf.toml(row)) is None


def test_a_row_that_cannot_be_built_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is shown, with what it does not say, but on stderr: nobody appends it to a config."""
    (tmp_path / "config.json").write_text(json.dumps(config("llama", 4096, 32, 8, 14336, 128256, head_dim=80)))
    assert run_cli("aot", "config", "--from-hf", tmp_path) == 1
    out, err = capsys.readouterr()
    assert out == "" and "[[model]]" in err
    assert "head_dim" in err.partition("a build of this row fails: ")[2]


# --------------------------------------------------------------------------------------------------- nothing is dropped


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ({"new_trick": 5}, "new_trick = 5: unknown here"),
        ({"new_tricks": {"a": list(range(100))}}, r"new_tricks = .*\.\.\.: unknown here"),
        ({"model_type": "nameless"}, "model_type nameless is unknown here"),
        ({"torch_dtype": "float32"}, "dtype = float32"),
        ({"hidden_act": "relu2"}, "hidden_act = relu2"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = true: unknown here"),
        ({"cross_attention_layers": [3, 8]}, r"cross_attention_layers = \[3, 8\]"),
        (
            {"rope_parameters": {"full": {"partial_rotary_factor": 0.5}, "sliding": {"partial_rotary_factor": 1}}},
            "0.5 or 1",
        ),
        ({"use_qk_norm": True}, "normalised"),
        ({"layer_types": ["linear_attention"] * 3, "linear_key_head_dim": 128}, "3 layers of linear attention"),
    ],
)
def test_what_the_row_cannot_say_is_said(more: dict[str, Any], note: str) -> None:
    assert_notes(hf.translate({**LLAMA_31_8B, **more}, "m").notes, [note])


@pytest.mark.parametrize(
    "more",
    [
        {"new_trick": None},
        {"new_trick": False},
        {"layer_types": ["full_attention"] * 2, "sliding_window": 7},
        {"partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"num_local_experts": 1},
        {"dtype": "float16"},
    ],
)
def test_what_changes_nothing_is_not_said(more: dict[str, Any]) -> None:
    assert hf.translate({**LLAMA_31_8B, **more}, "m").notes == []


@pytest.mark.parametrize(
    ("model_type", "more", "windowed"),
    [
        ("mistral", {"sliding_window": 7}, "all"),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 20}, "some"),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": False}, None),
        ("gemma3_text", {"sliding_window": 7, "sliding_window_pattern": 6}, "some"),
        ("gemma3_text", {"sliding_window": 7, "sliding_window_pattern": 1}, None),
        ("llama", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 7}, "all"),
        ("llama", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}, "some"),
        ("llama", {"layer_types": ["full_attention"] * 2, "sliding_window": 7}, None),
    ],
)
def test_which_layers_have_a_window(model_type: str, more: dict[str, Any], windowed: str | None) -> None:
    row = hf.translate({**LLAMA_31_8B, "model_type": model_type, **more}, "m")
    assert row.values.get("windowed_layers") == windowed


def test_degrees_that_divide_unevenly_are_left_out() -> None:
    row = hf.translate(config("phi3", 5120, 40, 10, 17920, 100352), "Phi-4", [1, 2, 3, 4, 5, 16])
    assert row.values["tensor_parallel"] == [1, 2, 5]
    assert_notes(
        row.notes,
        [
            "tensor_parallel 3 is left out: it divides num_qo_heads 40 unevenly",
            "tensor_parallel 4 is left out: it divides num_kv_heads 10 unevenly",
            "tensor_parallel 16 is left out: it divides num_qo_heads 40",
        ],
    )
    replicated = hf.translate(config("qwen2", 3584, 28, 4, 17920, 152064), "m", [7, 8, 28])
    assert replicated.values["tensor_parallel"] == [28], "more ranks than KV heads, each of which goes to seven"


# ---------------------------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected the config.json of a model, or the folder it is in"),
        ("[1]", "holds no object"),
        ("{}", "hidden_size is missing; expected the config.json of a language model"),
        (json.dumps({"hidden_size": "4096"}), "hidden_size is '4096'; expected a positive number"),
        (json.dumps({**LLAMA_31_8B, "num_key_value_heads": 0}), "num_key_value_heads is 0; expected a positive"),
        (json.dumps({**LLAMA_31_8B, "num_attention_heads": 24}), "24 heads do not divide hidden_size 4096"),
        (json.dumps({**LLAMA_31_8B, "text_config": 5}), "text_config is 5; expected an object"),
    ],
)
def test_what_is_no_model(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    assert run_cli("aot", "config", "--from-hf", tmp_path) == 1
    assert message in capsys.readouterr().err
    assert run_cli("aot", "config", "--from-hf", tmp_path / "nowhere") == 1


@pytest.mark.parametrize("degrees", ["", "0", "1,,2", "two", "1;2"])
def test_degrees_that_are_none(degrees: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B))
    assert run_cli("aot", "config", "--from-hf", tmp_path, "--tp", degrees) == 2
    assert "--tp is" in capsys.readouterr().err
    assert run_cli("aot", "config", "--from-hf", tmp_path, "--tp", "7") == 1
    assert "no degree of tensor parallelism remains: tensor_parallel 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "more", "name"),
    [
        ("Llama-3.1-8B", {}, "Llama-3.1-8B"),
        ("models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a16976", {}, "Llama-3.1-8B"),
        ("x", {"_name_or_path": "meta-llama/Llama-3.1-8B"}, "Llama-3.1-8B"),
        ("x", {"_name_or_path": ""}, "x"),
        ('odd "name" ü', {}, 'odd "name" ü'),
    ],
)
def test_names(where: str, more: dict[str, Any], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / where
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA_31_8B, **more}))
    for chosen, options in ((name, []), ("mine", ["--name", "mine"])):
        assert run_cli("aot", "config", "--from-hf", folder / "config.json", *options) == 0
        (tmp_path / "row.toml").write_text(capsys.readouterr().out)
        (row,) = read_config(tmp_path / "row.toml")
        assert isinstance(row.content, Model) and row.content.name == chosen
