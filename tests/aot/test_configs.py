# SPDX-License-Identifier: Apache-2.0
"""What configs and miss records ask for, what the core set holds, and what is said where nothing is asked for."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashinfer import families
from flashinfer import target as targets
from flashinfer.aot import build, estimate, models
from flashinfer.aot.config import ConfigError, read_config, read_specs
from flashinfer.errors import FlashInferError
from flashinfer.families import sampling
from flashinfer.jit import spec as specs
from flashinfer.jit.resolver import Resolver
from flashinfer.jit.source import render
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import AotStore
from tests.aot import core_table
from tests.aot.kit import (
    BOTH,
    CUDA_TARGETS,
    HOST,
    OTHER,
    command,
    kernels_of,
    rmsnorm_rows,
    run_cli,
    tree,
    write_config,
)
from tests.aot.pretended_gpus import GPUS
from tests.kit import ROOT, CountingCxx, finish, fork, rmsnorm_spec

MODEL = """[[model]]
name = "tiny"
hidden_size = 256
num_qo_heads = 4
num_kv_heads = 2
head_dim = 64
intermediate_sizes = [512]
"""


LATENT = """[[model]]
name = "latent"
hidden_size = 256
num_qo_heads = 16
q_lora_rank = 96
kv_lora_rank = 512
qk_rope_head_dim = 64
qk_nope_head_dim = 128
v_head_dim = 128
intermediate_sizes = [256]
"""


def test_a_model_with_latent_attention(tmp_path: Path) -> None:
    found = read_specs([write_config(tmp_path, LATENT)], [HOST])
    args = {spec.family: dict(spec.args) for spec in found}
    assert args["mla"] | {"head_dim_ckv": 512, "head_dim_kpe": 64} == args["mla"]
    assert args["prefill"] | {"head_dim_qk": 192, "head_dim_vo": 128, "kv_storage": "ragged"} == args["prefill"]
    assert args["append_paged_kv"] | {"key_dim": 512, "value_dim": 64} == args["append_paged_kv"]
    assert args["concat_mla_k"] | {"nope_dim": 128, "rope_dim": 64} == args["concat_mla_k"]
    assert args["rope"] | {"head_dim": 64, "interleave": True} == args["rope"]
    assert {spec.arg("head_dim") for spec in found if spec.family == "merge_states"} == {512, 128}
    assert {spec.arg("hidden_size") for spec in found if spec.family == "rmsnorm"} == {256, 96, 512}
    assert not {"decode", "rope_append"} & args.keys()


def test_rows_with_scales_have_lists_of_bf16_queries(tmp_path: Path) -> None:
    config = write_config(tmp_path, LATENT + "scaled_rows = true\n")
    found = [spec for spec in read_specs([config], ["sm_80", "sm_90a", HOST]) if spec.family == "mla"]
    scaled = [spec for spec in found if spec.arg("kv_dtype") == "fp8_ds_mla"]
    assert {spec.arg("short_queries") for spec in scaled} == {False, True} and len(scaled) == 2
    assert {(spec.target, spec.arg("q_dtype"), spec.arg("mask")) for spec in scaled} == {("sm_90a", "bf16", "none")}


def test_model_expands_to_its_kernels_once(tmp_path: Path) -> None:
    twice = write_config(tmp_path, MODEL + MODEL.replace("tiny", "twin"))
    found = read_specs([twice], ["sm_90a", "x86-64-v3"])
    assert len(found) == len(set(found))
    norms = {(spec.arg("dtype"), spec.arg("add_residual")) for spec in found if spec.family == "rmsnorm"}
    assert norms == {(dtype, add) for dtype in ("bf16", "fp16", "fp32") for add in (False, True)}
    assert {spec.arg("dtype") for spec in found if spec.family == "rmsnorm" and spec.target == "sm_90a"} == {
        "bf16",
        "fp16",
    }


def test_a_cache_of_fp8_has_queries_of_both_kinds(tmp_path: Path) -> None:
    found = read_specs([write_config(tmp_path, MODEL)], ["sm_90a", "x86-64-v3"])
    for family in ("decode", "prefill"):
        kinds = {
            (spec.arg("q_dtype"), spec.arg("o_dtype"))
            for spec in found
            if spec.family == family and spec.arg("kv_dtype") == "fp8_e4m3"
        }
        assert kinds == {(q, "bf16") for q in ("bf16", "fp8_e4m3")}  # of the first of the model's dtypes
    assert not any("fp8" in spec.name for spec in found if spec.target == "x86-64-v3" and spec.family == "decode")


def test_defaults_hold_where_a_row_is_silent(tmp_path: Path) -> None:
    path = write_config(tmp_path, '[defaults]\ndtypes = ["fp16"]\n' + MODEL + MODEL + 'dtypes = ["bf16"]\n')
    contents = [row.content for row in read_config(path)]
    assert [model.dtypes for model in contents if isinstance(model, models.Model)] == [("fp16",), ("bf16",)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[model]\n", "config.toml: "),
        ("[[modle]]\n", "config.toml: unknown table modle; expected [defaults], [[model]] and [[kernel]]"),
        ("[model]\nname = 'x'\n", "config.toml: model is not a list of tables; write [[model]] above each row"),
        (
            MODEL + MODEL.replace("hidden_size", "hiden_size"),
            "config.toml:8: [[model]] row 2 (tiny): unknown key 'hiden_size'",
        ),
        (MODEL.replace("head_dim = 64\n", ""), "config.toml:1: [[model]] row 1 (tiny): head_dim is missing"),
        (
            LATENT.replace("v_head_dim = 128\n", "").replace("qk_rope_head_dim = 64\n", ""),
            "row 1 (latent): qk_rope_head_dim, v_head_dim is missing",
        ),
        (LATENT + "head_dim = 192\n", "row 1 (latent): head_dim is given; a model with kv_lora_rank has none"),
        (MODEL + "q_lora_rank = 64\n", "row 1 (tiny): q_lora_rank is given; a model without kv_lora_rank has none"),
        (MODEL + "scaled_rows = true\n", "row 1 (tiny): scaled_rows is given; a model without kv_lora_rank has none"),
        (LATENT.replace("512", "500"), "row 1 (latent): mla: head_dim_ckv=500 is not supported"),
        ("[defaults]\nkv_lora_rank = 512\n" + LATENT, "config.toml: [defaults]: unknown key 'kv_lora_rank'"),
        (MODEL.replace("256", "'256'"), "row 1 (tiny): hidden_size is '256'; expected int"),
        (MODEL.replace("256", "true"), "row 1 (tiny): hidden_size is True; expected int"),
        (MODEL.replace("256", "0"), "row 1 (tiny): hidden_size is 0; expected a positive number"),
        (MODEL.replace("[512]", "512"), "row 1 (tiny): intermediate_sizes is 512; expected a list of int"),
        (MODEL.replace("= 2", "= 3"), "row 1 (tiny): num_qo_heads is 4; expected a multiple of num_kv_heads 3"),
        (MODEL + "tensor_parallel = [3]\n", "row 1 (tiny): num_qo_heads [4] is not divisible by tensor_parallel 3"),
        (MODEL + "dtypes = ['bfloat']\n", "row 1 (tiny): dtypes has bfloat; expected fp16, bf16, fp32"),
        (MODEL.replace("64", "60"), "row 1 (tiny): decode: head_dim_qk=60 is not supported"),
        (MODEL + "activation = 'relu'\n", "row 1 (tiny): activation is 'relu'; expected silu, gelu, gelu_tanh"),
        (MODEL + "windowed_layers = 'few'\n", "row 1 (tiny): windowed_layers is 'few'; expected none, some, all"),
        (MODEL + "rotary_dim = 128\n", "row 1 (tiny): rotary_dim is 128; expected at most head_dim 64"),
        (LATENT + "soft_cap = true\n", "row 1 (latent): soft_cap is given; a model with kv_lora_rank has none"),
        ("[defaults]\nname = 'x'\n", "config.toml: [defaults]: unknown key 'name'"),
        ("[[kernel]]\ndtype = 'fp32'\n", "config.toml:1: [[kernel]] row 1 (?): family is missing"),
        ("\n[[kernel]]\nfamily = 'nrom'\n", "config.toml:2: [[kernel]] row 1 (nrom): kernel family 'nrom' is unknown"),
        (rmsnorm_rows(64) + rmsnorm_rows(0), "config.toml:8: [[kernel]] row 2 (rmsnorm): rmsnorm: hidden_size=0"),
        (rmsnorm_rows(64).replace("gemma = false", ""), "rmsnorm: expected arguments dtype, hidden_size"),
    ],
)
def test_wrong_config_names_file_and_row(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_specs([write_config(tmp_path, text)], ["x86-64-v3"])
    assert message in str(caught.value)


def test_unknown_config_lists_those_that_come_along() -> None:
    with pytest.raises(ConfigError, match=r"nothing: no such config; expected a file, or one of core, smoke"):
        read_specs(["nothing"], ["sm_80"])


def test_core_is_legal_everywhere(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture) -> None:
    found = read_specs(["core", "smoke"], [*CUDA_TARGETS, "x86-64-v3", "armv8.2-a"])
    digests = [render(spec).digest for spec in found]
    assert len(set(digests)) == len(digests)
    assert not caplog.records, "a kernel was left out for a target"


@pytest.fixture(scope="module")
def _families() -> None:
    families.register_all()


def asked_for(*arguments: str) -> set[KernelSpec]:
    out, _ = finish(fork(f"from tests.aot import ask_core; ask_core.main(*{arguments})"))
    return {KernelSpec.from_dict(spec) for spec in json.loads(out)}


def test_core_answers_what_operators_ask_for() -> None:
    """Both sides compute their arguments apart: operators from tensors, the core set from shapes in a file."""
    asked = asked_for("core")
    core = set(read_specs(["core"], [HOST]))
    assert not sorted(spec.name for spec in asked - core)
    assert {spec.family for spec in core} <= {spec.family for spec in asked}, "families nobody asks for"


@pytest.mark.usefixtures("_families")
@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=[] if name in ("sm_80", "sm_90a") else pytest.mark.slow) for name in GPUS]
)
def test_core_holds_what_is_asked_for_on_gpus(target: str) -> None:
    """By operators, by examples/serve_shapes.py and by the calls of engines, latent attention included, for every
    model; and nothing else. Nothing is compiled."""
    asked, core = asked_for("core", target), set(read_specs(["core"], [target]))
    assert len({spec.target for spec in asked}) in (1, 2), "the GPUs of the target"
    answers = {spec: [spec.with_target(name) for name in targets.candidates(spec.target)] for spec in asked}
    missed = [spec.name for spec, machine_code in answers.items() if not core.intersection(machine_code)]
    assert not sorted(missed)
    idle = core.difference(itertools.chain.from_iterable(answers.values()))
    assert not sorted(spec.name for spec in idle), "kernels that nobody asks for"


def test_rows_of_core_that_add_no_kernel_say_so() -> None:
    text = (ROOT / "aot_configs" / "core.toml").read_text()
    says_so = set(re.findall(r'^name = "(.+)"  #.*\badds no kernel$', text, flags=re.M))
    assert says_so == {model.name for model, new in core_table.rows() if not new}


def test_core_models_are_in_the_docs() -> None:
    """`python -m tests.aot.core_table` prints the lines."""
    page = (ROOT / "docs" / "packaging.md").read_text().splitlines()
    assert [line for line in core_table.lines() if line not in page] == []


def test_core_keeps_its_budget() -> None:
    """Of all CUDA targets: a wheel of 25 MB, built by two cores in ten minutes."""
    estimated = estimate.forecast(read_specs(["core"], list(GPUS)), [])
    assert estimated.packed_bytes < 25e6
    assert estimated.seconds < 2 * 600


VARIANTS = {
    "Gemma 2": """windowed_layers = "some"
soft_cap = true
gemma_norm = true
activation = "gelu_tanh"
""",
    "Gemma 3": """windowed_layers = "some"
gemma_norm = true
qk_norm = true
activation = "gelu"
""",
    "Mistral": 'windowed_layers = "all"\n',
    "Phi 4": "rotary_dim = 48\n",
    "GLM 4": "rotary_dim = 32\ninterleave = true\nqk_norm = true\n",
    "Llama 4": "interleave = true\n",
    "mixed": "mixed_batches = true\n",
    "mixed with a soft cap": "mixed_batches = true\nsoft_cap = true\n",
}


def variant_row(name: str) -> str:
    return f"{MODEL}vocab_size = 512\n{VARIANTS.get(name, '')}"


@pytest.mark.usefixtures("_families")
@pytest.mark.parametrize("target", ["", "sm_90a"])
def test_rows_answer_what_operators_ask_for(target: str, tmp_path: Path) -> None:
    """Of each key that a row may have, on models as they have them."""
    here = target or HOST
    config = write_config(tmp_path, "\n".join(map(variant_row, VARIANTS)))
    asked = asked_for(str(config), target)
    assert not sorted(spec.name for spec in asked - set(read_specs([config], [here])))
    plain = set(read_specs([write_config(tmp_path, variant_row("plain"))], [here]))
    for name in VARIANTS:
        own = set(read_specs([write_config(tmp_path, variant_row(name))], [here])) - plain
        assert own, f"{name}: its keys make no difference"
        assert not sorted(spec.name for spec in own - asked), f"{name}: kernels nobody asks for"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_every_key_has_kernels_on_gpus(variant: str, target: str, tmp_path: Path) -> None:
    for spec in read_specs([write_config(tmp_path, variant_row(variant))], [target]):
        specs.family(spec.family).config(spec)


def test_core_holds_every_placement_of_a_row_of_the_vocabulary() -> None:
    """How many blocks share a row depends on the number of rows, which is known at run time alone."""
    core = {spec for spec in read_specs(["core"], list(GPUS)) if spec.family == "sample_row"}
    held = {(spec.target, spec.arg("cluster_size"), spec.arg("row_kib")) for spec in core}
    contents = [row.content for row in read_config(ROOT / "aot_configs" / "core.toml")]
    vocabularies = {model.vocab_size for model in contents if isinstance(model, models.Model)}
    for target_name, gpu in ((name, gpu) for name, gpus in GPUS.items() for gpu in gpus):
        here = targets.of_capability(*gpu.capability)
        for vocab_size, num_rows, keeps_row in itertools.product(vocabularies, range(1, 600), (False, True)):
            place = sampling.placement("fp32", vocab_size, num_rows, gpu.num_sms, here, keeps_row)
            assert (target_name, place["cluster_size"], place["row_kib"]) in held, (gpu, vocab_size, num_rows)


def test_every_family_is_known_by_name() -> None:
    families.register_all()
    for spec in read_specs(["core", "smoke"], ["sm_90a", HOST]):
        assert KernelSpec.from_dict(spec.to_dict()) == spec
        assert specs.family(spec.family).name == spec.family


# ------------------------------------------------------------------------------------------------------------- misses


def test_misses_are_added(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resolver = Resolver(AotStore([]), tmp_path / "cache", lambda kind: CountingCxx())
    resolver.load(rmsnorm_spec(hidden_size=320))
    (record,) = (tmp_path / "cache" / "misses").iterdir()
    unknown = json.loads(record.read_text())
    unknown["spec"]["family"] = "of a later version"
    with open(record, "a") as file:
        file.write(json.dumps(unknown) + "\n" + '{"spec": {"fam')
    assert read_specs([], [HOST, "sm_80"], [record]) == [rmsnorm_spec(hidden_size=320)], (
        "a miss on a CPU is one for CPUs"
    )
    assert any(f"{record}:2 is skipped" in line.getMessage() for line in caplog.records)


def record(file: Path, *targets: str, **changes: Any) -> Path:
    """A file with a miss record of rmsnorm 64 for each target."""
    lines = [{"spec": {**rmsnorm_spec(64, on=target).to_dict(), **changes}} for target in targets]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


# ---------------------------------------------------------------------------------------------------- nothing to build


@pytest.mark.parametrize("how", [[], ["--exact"], ["--dry-run"]])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (",", "target ',' names no target"),
        ("", "target '' names no target"),
        (" , ", "names no target"),
        ("sm_99", "target 'sm_99' is unknown; expected one of sm_75, sm_80"),
        ("sm_80,sm_80a", "target 'sm_80a' is unknown"),
        (f"{HOST},sm_90f", "target 'sm_90f' is unknown"),
        ("x86", "target 'x86' is unknown; expected sm_<capability>"),
        ("../../etc", "is unknown"),
    ],
)
def test_no_target_or_an_unknown_one(
    target: str, message: str, how: list[str], host_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(host_copy)
    assert run_cli("aot", "build", "--config", "smoke", "--target", target, "--out", host_copy, *how) == 2
    assert message in capsys.readouterr().err
    assert tree(host_copy) == before


@pytest.mark.parametrize("name", ["resolve", "warmup"])
def test_other_commands_know_the_same_targets(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for target in (",", "sm_99"):
        assert run_cli(name, "--config", "smoke", "--target", target) == 2
        assert f"target {target!r}" in capsys.readouterr().err


def misses(case: str, folder: Path) -> Path:
    path = folder / "records.jsonl"
    if case == "of a CPU":
        return record(path, HOST, OTHER)
    if case == "of an unknown family":
        return record(path, "sm_90a", family="of a later version")
    if case == "of an unknown argument":
        return record(path, "sm_90a", args={"target": "sm_90a"})
    if case == "of odd types":
        return record(path, "sm_90a", family=["rmsnorm"], args=[["a", "b"]])
    if case == "cut short":
        path.write_text('{"spec": {"fam')
        return path
    path.touch()
    return folder if case == "an empty folder" else path


@pytest.mark.parametrize("how", [[], ["--exact"], ["--dry-run"]])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("of a CPU", f"holds records of {', '.join(sorted((HOST, OTHER)))} alone"),
        ("of an unknown family", "holds no usable record"),
        ("of an unknown argument", "holds no usable record"),
        ("of odd types", "holds no usable record"),
        ("cut short", "holds no usable record"),
        ("empty", "holds no usable record"),
        ("an empty folder", "holds no usable record"),
    ],
)
def test_records_that_ask_for_nothing(
    case: str, message: str, how: list[str], host_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "misses").mkdir()
    records, before = misses(case, tmp_path / "misses"), tree(host_copy)
    assert run_cli("aot", "build", "--add", records, "--target", "sm_90a", "--out", host_copy, *how) == 2
    assert f"no kernel is asked for on sm_90a: {records} {message}" in capsys.readouterr().err
    assert tree(host_copy) == before


@pytest.mark.parametrize("text", ["", "[defaults]\n", '[[kernel]]\nfamily = "decode_plan"\n'])
def test_configs_that_ask_for_nothing(
    text: str, host_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, before = write_config(tmp_path, text), tree(host_copy)
    assert run_cli("aot", "build", *command(config, host_copy, "--exact")) == 2
    assert f"no kernel is asked for on {HOST}: {config} has no row for {HOST}" in capsys.readouterr().err
    assert tree(host_copy) == before


def test_the_half_that_asks_for_nothing_is_said(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    records = record(tmp_path / "records.jsonl", HOST)
    assert {spec.target for spec in read_specs(["smoke"], ["sm_90a"], [records])} == {"sm_90a"}
    assert f"{records} holds records of {HOST} alone: nothing of it is built for sm_90a" in warnings()
    read_specs([], ["sm_80", HOST], [records])
    assert "nothing is asked for on sm_80" in warnings()


def test_usage(host_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["--target", HOST], "nothing to build: name a --config"),
        (["--config", "smoke"], "--target is missing"),
        (["--refresh", "--target", HOST], "--refresh is about every target of the set"),
    ):
        assert run_cli("aot", "build", *argv, "--out", host_copy) == 2
        assert message in capsys.readouterr().err
    assert run_cli("aot", "build", "--refresh", "--out", tmp_path / "nowhere") == 1
    assert "holds no kernel that this version has" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    for how in ({}, {"exact": True}):
        with pytest.raises(FlashInferError, match="nothing to build"):
            build.build([], host_copy, **how)
    assert kernels_of(host_copy) == BOTH
