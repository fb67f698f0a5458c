# SPDX-License-Identifier: Apache-2.0
"""From a model's config.json, as Hugging Face hosts it, to a [[model]] row: what of it decides kernels, and what of
that a row cannot say.

No key is dropped: it is in the row, or of no consequence for a kernel (`_IRRELEVANT`), or in the notes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from flashinfer.errors import FlashInferError
from flashinfer.families.gemm import SCALE_BLOCK

_LINEAR = (
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)
_LATENT = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


class NotAModel(FlashInferError, ValueError):
    """A config.json has no row. The message says what it lacks."""


@dataclass(frozen=True)
class Kind:
    """What the code of a kind of model does and its config.json does not say."""

    qk_norm: Optional[bool] = False  # None: where `use_qk_norm` says so
    gemma_norm: bool = False
    interleave: bool = False
    delta_rule: bool = False  # layers of linear attention are gated delta networks
    alternates: bool = False  # some of its layers have the window, where the file does not tell which
    notes: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of keys that published files leave out


_LAYER_NORM = "norms are LayerNorm with a bias: the row has RMSNorm"
_NO_GATE = "MLPs have no gate: the row's act_and_mul serves none of them"
_OUTPUT_GATE = "attention's output is gated by a sigmoid: no kernel of this library"

_PLAIN = Kind()
_QWEN_NEXT = Kind(qk_norm=True, gemma_norm=True, delta_rule=True, notes=(_OUTPUT_GATE,))
# By model_type, that of the language model where there are several.
_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "ministral", "ministral3", "phi3"), _PLAIN),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text"), Kind(alternates=True)),
    **dict.fromkeys(("qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text"), Kind(qk_norm=True, alternates=True)),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _QWEN_NEXT),
    "llama4_text": Kind(
        notes=("rotary pairs are neighbours in its code: the row has halves, for which engines permute the weights",)
    ),
    # Latent attention: rows take interleaved rotary pairs for granted.
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe_lite", "glm_moe_dsa"), _PLAIN),
    **dict.fromkeys(("glm", "glm4", "chatglm"), Kind(interleave=True)),
    "glm4_moe": Kind(qk_norm=None),
    "gemma2": Kind(
        gemma_norm=True,
        alternates=True,
        defaults={"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096},
    ),
    "gemma3_text": Kind(
        qk_norm=True,
        gemma_norm=True,
        alternates=True,
        defaults={
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4096,
        },
    ),
    "phi": Kind(notes=(_LAYER_NORM, _NO_GATE)),
    "phimoe": Kind(notes=(_LAYER_NORM,)),
    "gpt_oss": Kind(
        notes=(
            "attention has a sink for each head: the row's decode and prefill serve none of them",
            "MLPs are clamped SwiGLU: the row's act_and_mul serves none of them",
        )
    ),
}

# Keys that decide no kernel of this library: tokens, training, sizes of matrices and tables, scales that are arguments
# of a call, and how experts are chosen and multiplied, which it has no kernels for.
_IRRELEVANT = re.compile(
    r"""
    _.* | architectures | auto_map | model_type | transformers_version | use_cache | cache_implementation | tie_.*
    | .*_token(_id|_ids|_index)? | initializer_range | .*_(dropout|pdrop|loss_coef|loss_alpha|noise)
    | .*(_eps|_epsilon) | .*_bias | add_.*_linear | apply_.* | rmsnorm | post_layer_norm | .*_in_fp32 | fp32_.*
    | num_hidden_layers | num_layers | (original_)?max_position_embeddings | seq_length | pretraining_tp
    | rope_theta | rope_ratio | rope_local_base_freq | original_rope | final_logit_softcapping | query_pre_attn_scalar
    | attn_temperature_tuning | attn_scale | floor_scale | for_llm_compressor | mamba_ssm_dtype
    | num_experts_per_tok | experts_per_token | topk_.* | n_group | norm_topk_prob | routed_scaling_factor
    | scoring_func | seq_aux | router_.* | output_router_logits | ep_size | num_nextn_predict_layers | mtp_.*
    | is_decoder | is_encoder_decoder | return_dict | output_.* | chunk_size_feed_forward | id2label | label2id
    """,
    re.VERBOSE,
)


# Keys beside the config of the language model that are its own.
_SHARED = ("vocab_size", "dtype", "torch_dtype", "quantization_config")


@dataclass(frozen=True)
class Translation:
    values: dict[str, Any]  # of the row, by its keys
    notes: list[str]  # what the row does not say, or not as the model has it


def translate(config: Mapping[str, Any], name: str, degrees: Sequence[int] = (1,)) -> Translation:
    """The row of a model.

    Args:
        config: the content of its config.json.
        name: of the row.
        degrees: of tensor parallelism to serve. Those that divide its heads or MLPs unevenly are left out and noted.

    Raises:
        NotAModel: a number that every row has is missing or no positive number, or no degree remains.
    """
    keys = _Keys(config)
    values: dict[str, Any] = {"name": name, "hidden_size": keys.size("hidden_size")}
    values["num_qo_heads"] = keys.size("num_attention_heads")
    if keys.get("kv_lora_rank"):
        values.update({key: keys.size(key) for key in _LATENT if key != "q_lora_rank" or keys.get(key)})
        keys.ignore("num_key_value_heads", "head_dim", "qk_head_dim")  # of what is not absorbed, or nothing
    else:
        values["num_kv_heads"] = _num_kv_heads(keys, values["num_qo_heads"])
        values["head_dim"] = _head_dim(keys, values)
    values["intermediate_sizes"] = list(dict.fromkeys(_intermediate_sizes(keys)))
    values["vocab_size"] = keys.size("vocab_size", "padded_vocab_size")
    values.update(_variants(keys, values))
    values["tensor_parallel"] = _degrees(keys, values, degrees)
    for note in _NOTES:
        note(keys, values)
    keys.note_the_rest()
    return Translation(values, keys.notes)


class _Keys:
    """A config that notes which of its keys were looked at."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.notes: list[str] = []
        outer = dict(config)
        inner = next((key for key in ("text_config", "llm_config", "language_config") if key in outer), None)
        if inner is None:
            self._values = outer
        else:
            others = [key for key in outer if key.endswith("_config") and key not in (inner, "quantization_config")]
            if others:
                self.note(f"{', '.join(others)}: the row is of the language model alone")
            if not isinstance(outer[inner], dict):
                raise NotAModel(f"{inner} is {outer[inner]!r}; expected an object")
            self._values = {key: outer[key] for key in _SHARED if key in outer} | dict(outer[inner])
        self._seen: set[str] = set()
        model_type = str(self._values.get("model_type"))
        self.kind = _KINDS.get(model_type, _PLAIN)
        if model_type not in _KINDS:
            self.note(f"model_type {model_type} is unknown here: the row says what keys say, not what its code does")
        for note in self.kind.notes:
            self.note(note)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def ignore(self, *keys: str) -> None:
        self._seen.update(keys)

    def get(self, *keys: str) -> Any:
        """The value of the first of these that says anything, or its default; None where none does."""
        self.ignore(*keys)
        for key in keys:
            if self._values.get(key) is not None:
                return self._values[key]
        for key in keys:
            if key in self.kind.defaults and key not in self._values:
                value = self.kind.defaults[key]
                text = f"{key} is not in the file; {value} is what {self._values.get('model_type')} has then"
                if text not in self.notes:
                    self.note(text)
                return value
        return None

    def matching(self, pattern: str) -> list[str]:
        """Keys whose name matches and that say anything."""
        return [key for key, value in self._values.items() if value and re.fullmatch(pattern, key)]

    def size(self, *keys: str) -> int:
        """A number that every row has. Raises NotAModel."""
        value = self.get(*keys)
        if value is None:
            present = ", ".join(sorted(self._values)[:12])
            raise NotAModel(
                f"{' or '.join(keys)} is missing; expected the config.json of a language model, got {present}"
            )
        return _positive(keys[0], value)

    def note_the_rest(self) -> None:
        for key in sorted(self._values.keys() - self._seen):
            value = self._values[key]
            if value not in (None, False, [], {}, "") and not _IRRELEVANT.fullmatch(key):
                self.note(f"{key} = {_short(value)}: unknown here; whether a kernel depends on it is for you to see")


def _positive(key: str, value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise NotAModel(f"{key} is {value!r}; expected a positive number")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --------------------------------------------------------------------------------------------------------------- shapes


def _num_kv_heads(keys: _Keys, num_qo_heads: int) -> int:
    given = keys.get("num_key_value_heads")
    if keys.get("multi_query_attention"):
        given = keys.get("multi_query_group_num")
    return num_qo_heads if given is None else _positive("num_key_value_heads", given)


def _head_dim(keys: _Keys, values: Mapping[str, Any]) -> int:
    given = keys.get("head_dim", "kv_channels")
    if given is not None:
        return _positive("head_dim", given)
    hidden_size, num_qo_heads = values["hidden_size"], values["num_qo_heads"]
    if hidden_size % num_qo_heads:
        raise NotAModel(f"head_dim is missing, and {num_qo_heads} heads do not divide hidden_size {hidden_size}")
    return int(hidden_size // num_qo_heads)


def _intermediate_sizes(keys: _Keys) -> Iterator[int]:
    """Dense, expert, shared expert: those that there are."""
    num_experts = keys.get("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    dense_layers = keys.get("intermediate_size_mlp")  # Llama 4, whose intermediate_size is of its experts
    step = keys.get("interleave_moe_layer_step")
    if not num_experts or num_experts == 1:
        yield keys.size("intermediate_size", "ffn_hidden_size")
        keys.ignore("moe_intermediate_size", "n_shared_experts")
        return
    if dense_layers is not None:
        if step != 1:
            yield _positive("intermediate_size_mlp", dense_layers)
        yield keys.size("intermediate_size")
        keys.ignore("moe_layers")
        return
    if keys.get("moe_intermediate_size") is None:  # every layer has experts
        yield keys.size("intermediate_size")
        return
    expert = keys.size("moe_intermediate_size")
    dense = keys.get("intermediate_size")
    layers = keys.get("mlp_layer_types") or []
    freq = keys.get("moe_layer_freq")
    some_are_dense = [
        keys.get("first_k_dense_replace") not in (None, 0),
        bool(keys.get("mlp_only_layers")),
        keys.get("decoder_sparse_step") not in (None, 1),
        0 in freq if isinstance(freq, list) else freq not in (None, 1),
        "dense" in layers,
    ]
    if any(some_are_dense) and dense is not None:
        yield _positive("intermediate_size", dense)
    yield expert
    shared = keys.get("shared_expert_intermediate_size")
    if shared is None:
        shared = (keys.get("n_shared_experts", "num_shared_experts") or 0) * expert
    if shared:
        yield _positive("shared_expert_intermediate_size", shared)


def _variants(keys: _Keys, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys of the row that are other than in most models."""
    if _qk_norm(keys):
        yield "qk_norm", True
    if keys.kind.gemma_norm:
        yield "gemma_norm", True
    gate = _gate(keys)
    if gate != "silu":
        yield "activation", gate
    if _has_fp8_blocks(keys):
        yield "fp8_blocks", True
    windows = _windowed_layers(keys)
    if "head_dim" not in values:
        if windows != "none":
            keys.note("sliding_window: latent attention has no kernels with one")
        if keys.get("index_topk") and (values["kv_lora_rank"], values["qk_rope_head_dim"]) == (512, 64):
            yield "scaled_rows", True  # as engines keep them for its lists
        keys.ignore("rope_parameters", "rope_scaling")
        return
    rotary_dim = _rotary_dim(keys, values["head_dim"])
    if rotary_dim != values["head_dim"]:
        yield "rotary_dim", rotary_dim
    if keys.kind.interleave:
        yield "interleave", True
    if windows != "none":
        yield "windowed_layers", windows
    if keys.get("attn_logit_softcapping"):
        yield "soft_cap", True
    if _has_delta_rule(keys):
        for key in _LINEAR:
            yield key, keys.size(key)


def _has_fp8_blocks(keys: _Keys) -> bool:
    quantization = keys.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("weight_block_size") == [SCALE_BLOCK, SCALE_BLOCK]


def _has_delta_rule(keys: _Keys) -> bool:
    return keys.kind.delta_rule and all(keys.get(key) for key in _LINEAR)


def _qk_norm(keys: _Keys) -> bool:
    given = keys.get("use_qk_norm", "qk_layernorm")
    if keys.kind.qk_norm is None:
        return bool(given)
    if given and not keys.kind.qk_norm:
        keys.note("queries and keys are normalised, not by RMSNorm with a weight over head_dim: no such kernel here")
    return keys.kind.qk_norm


_GATES: Mapping[Optional[str], str] = {
    **dict.fromkeys((None, "silu", "swish"), "silu"),
    "gelu": "gelu",
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_tanh"), "gelu_tanh"),
}


def _gate(keys: _Keys) -> str:
    name = keys.get("hidden_activation", "hidden_act")
    keys.ignore("swiglu", "swiglu_limit", "swiglu_limits")  # see the kinds that have it
    gate = _GATES.get(name)
    if gate is None:
        keys.note(f"hidden_act = {name}: no kernel of this library; the row has that of silu")
    return gate or "silu"


def _windowed_layers(keys: _Keys) -> str:
    layer_types = keys.get("layer_types") or []
    pattern = keys.get("sliding_window_pattern", "_sliding_window_pattern")
    window, is_used = keys.get("sliding_window"), keys.get("use_sliding_window")
    keys.ignore("max_window_layers")
    if window is None or is_used is False or pattern == 1:
        return "none"
    if layer_types:
        count = layer_types.count("sliding_attention")
        return "none" if count == 0 else "all" if count == len(layer_types) else "some"
    return "some" if keys.kind.alternates or pattern else "all"


def _rotary_dim(keys: _Keys, head_dim: int) -> int:
    scaling = keys.get("rope_parameters", "rope_scaling") or {}
    parts = [scaling, *(part for part in scaling.values() if isinstance(part, dict))]  # by kind of layer, in some
    if any("mrope_section" in part for part in parts):
        keys.note("positions have three parts (mrope): the engine makes the table of cos and sin, or turns by itself")
    factors = [part["partial_rotary_factor"] for part in parts if part.get("partial_rotary_factor") is not None]
    factor, given = keys.get("partial_rotary_factor"), keys.get("rotary_dim")
    factors = list(dict.fromkeys([*factors, *([] if factor is None else [factor])]))
    if len(factors) > 1:
        keys.note(f"partial_rotary_factor is {' or '.join(map(str, factors))}: the row has the first")
    return int(head_dim * factors[0]) if factors else int(given or head_dim)


def _degrees(keys: _Keys, values: Mapping[str, Any], degrees: Sequence[int]) -> list[int]:
    fitting = []
    for degree in degrees:
        uneven = _uneven(values, degree)
        if uneven is None:
            fitting.append(degree)
        else:
            keys.note(f"tensor_parallel {degree} is left out: it divides {uneven} unevenly")
    if not fitting:
        raise NotAModel(f"no degree of tensor parallelism remains: {keys.notes[-1]}")
    return fitting


def _uneven(values: Mapping[str, Any], degree: int) -> Optional[str]:
    """What a degree does not divide. Where ranks outnumber KV heads, each head is held by as many ranks."""
    for key in ("num_qo_heads", "intermediate_sizes", "linear_num_key_heads", "linear_num_value_heads"):
        given = values.get(key, [])
        for size in given if isinstance(given, list) else [given]:
            if size % degree:
                return f"{key} {size}"
    num_kv_heads = values.get("num_kv_heads", 1)
    return f"num_kv_heads {num_kv_heads}" if num_kv_heads % degree and degree % num_kv_heads else None


# ---------------------------------------------------------------------------------------------------------------- notes


def _masks(keys: _Keys, values: Mapping[str, Any]) -> None:
    chunk = keys.get("attention_chunk_size")
    if chunk is not None:
        keys.note(f"attention_chunk_size = {chunk}: no kernel of this library attends within chunks")
    no_rope = keys.get("no_rope_layers", "no_rope_layer_interval")
    if no_rope:
        keys.note(f"no_rope_layers = {_short(no_rope)}: layers without positions need no other kernels")


def _other_layers(keys: _Keys, values: Mapping[str, Any]) -> None:
    """Layers that are no attention over all of the sequence."""
    linear = {key: keys.get(key) for key in keys.matching(r"linear_.*|full_attention_interval|attn_output_gate")}
    count = (keys.get("layer_types") or []).count("linear_attention")
    interval = linear.get("full_attention_interval")
    if (count or any(key.startswith("linear_") for key in linear)) and not _has_delta_rule(keys):
        where = f"{count} layers" if count else f"all layers but each {interval}th" if interval else "layers"
        keys.note(f"{where} of linear attention: no kernels of this library")
    shared = keys.get("num_kv_shared_layers", "cross_attention_layers")
    if shared:
        keys.note(f"num_kv_shared_layers or cross_attention_layers = {_short(shared)}: need no other kernels")
    sparse = {key: keys.get(key) for key in keys.matching(r"index_.*|indexer_.*")}
    if sparse:
        keys.note(
            f"index_topk = {sparse.get('index_topk')}: the indexer of sparse attention is no kernel of this library"
        )


def _numbers(keys: _Keys, values: Mapping[str, Any]) -> None:
    quantization = keys.get("quantization_config")
    if quantization and not values.get("fp8_blocks"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        keys.note(f"quantization_config ({method}): of weights, for matrix products; the row has fp8 outputs by tensor")
    dtype = keys.get("dtype", "torch_dtype")
    if dtype not in (None, "auto", "bfloat16", "float16"):
        keys.note(f"dtype = {dtype}: the row is built for bf16 and fp16 on GPUs unless it says dtypes")


_NOTES: tuple[Callable[[_Keys, Mapping[str, Any]], None], ...] = (_masks, _other_layers, _numbers)


# ---------------------------------------------------------------------------------------------------------------- files


def read(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a config.json, or of the one in a folder, and the model's name. Raises NotAModel."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotAModel(f"{file}: {error}; expected the config.json of a model, or the folder it is in") from None
    if not isinstance(config, dict):
        raise NotAModel(f"{file} holds no object; expected the config.json of a model")
    return config, _name(config, file)


def _name(config: Mapping[str, Any], file: Path) -> str:
    given = config.get("_name_or_path")
    if isinstance(given, str) and (last := given.rstrip("/").rpartition("/")[2]):
        return last
    folder = file.resolve().parent
    if folder.parent.name == "snapshots":  # of the cache that Hugging Face's library keeps
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name or str(config.get("model_type", "model"))


def toml(translation: Translation) -> str:
    """The row, and below it as comments what it does not say."""
    lines = ["[[model]]"]
    for key, value in translation.values.items():
        lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    if translation.notes:
        lines += ["# Not in this row:", *(f"# - {note}" for note in translation.notes)]
    return "\n".join(lines) + "\n"
