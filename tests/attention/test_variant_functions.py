# SPDX-License-Identifier: Apache-2.0
"""What becomes of functions before a kernel: what is refused and where, the text that names kernels, ranges of keys,
and how they get into configs, records and the command line."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import flashinfer
from examples import attention_variants as examples
from flashinfer import target, variants
from flashinfer.aot.config import ConfigError, read_specs
from flashinfer.cli import main
from flashinfer.errors import ToolchainMissing, UnsupportedConfig
from flashinfer.families.attention.decode import decode
from flashinfer.families.attention.params import QUERIES
from flashinfer.families.attention.prefill import PREFILL, prefill
from flashinfer.families.attention.variants import VARIANT_TEXTS, read
from flashinfer.families.attention.variants.cxx import function_of, has_gap, has_holes, has_range
from flashinfer.families.attention.variants.parse import Refused
from flashinfer.jit import source, toolchain
from flashinfer.jit.spec import KernelSpec
from flashinfer.jit.stores import AotStore, Hit, Rejected
from flashinfer.variants import Function, clamp, tanh, where

# ruff: noqa: F821  # names of the vocabulary need no import
NUMBER, TENSOR = 0.25, torch.zeros(3)


def text(*functions: Function) -> str:
    of = {function.is_mask: function for function in functions}
    return variants.canonical(of.get(False), of.get(True)).text


# --------------------------------------------------------------------------------------------------------- refusals


def scores() -> list[tuple[Any, str, str]]:
    """Functions, the piece of source that the error points at, and what it says."""
    other = object()

    def branch(score, b, h, q, k, x):
        return score if k > q else 0.0

    def chain(score, b, h, q, k, x):
        return where(0 < k < q, score, 0.0)

    def short_circuit(score, b, h, q, k, x):
        return where(k > q and q > 3, score, 0.0)

    def loop(score, b, h, q, k, x):
        for i in range(3):
            score = score + i
        return score

    def call(score, b, h, q, k, x):
        return score + print(q)

    def method(score, b, h, q, k, x):
        return score + score.sum()

    def capture(score, b, h, q, k, x):
        return score + other

    def tensor(score, b, h, q, k, x):
        return score + TENSOR[k]

    def undeclared(score, b, h, q, k, x):
        return score + x.missing[h]

    def too_few(score, b, h, q, k, x):
        return score + x.table[h, 1]

    def not_int(score, b, h, q, k, x):
        return score + x.table[score]

    def power(score, b, h, q, k, x):
        return score**2

    def of_bool(score, b, h, q, k, x):
        return score + (k > q)

    def no_return(score, b, h, q, k, x):
        score = score + 1

    def keyword(score, b, h, q, k, x):
        return clamp(score, low=0.0, high=1.0)

    def dead(score, b, h, q, k, x):
        return score
        score = 1

    def unknown(score, b, h, q, k, x):
        return score + kk

    def wide(score, b, h, q, k, x):
        return score + 5_000_000_000

    def mask(score, b, h, q, k, x):
        return k <= q

    def attribute(score, b, h, q, k, x):
        return score + x.table

    def comprehension(score, b, h, q, k, x):
        return score + sum([q])

    return [
        (branch, "score if", "where(condition, a, b)"),
        (chain, "0 < k", "(a < b) & (b < c)"),
        (short_circuit, "k > q and", "& and |"),
        (loop, "for i", "write an expression"),
        (call, "print(q)", "print is not a function of variants"),
        (method, "score.sum()", "score.sum is not a function of variants"),
        (capture, "other", "declare a tensor as an extra"),
        (tensor, "TENSOR[k]", "x.name[index"),
        (undeclared, "x.missing", "x.missing is not declared; declared: table"),
        (too_few, "x.table[h, 1]", "2 indices into x.table, f32[num_heads]"),
        (not_int, "score]", "an index is a float"),
        (power, "score**2", "exp2"),
        (of_bool, "score + (k", "int(…) or where"),
        (no_return, "def no_return", "no return"),
        (keyword, "clamp(score", "by keyword"),
        (dead, "score = 1", "after return"),
        (unknown, "kk", "kk is not known here"),
        (wide, "5_000_000_000", "32 bits"),
        (mask, "def mask", "returns a bool"),
        (attribute, "x.table", "is a tensor"),
        (comprehension, "sum([q])", "sum is not a function"),
    ]


@pytest.mark.parametrize(("function", "at", "said"), scores(), ids=lambda value: getattr(value, "__name__", ""))
def test_refused_with_file_line_and_column(function: Any, at: str, said: str) -> None:
    with pytest.raises(Refused) as caught:
        flashinfer.variant(table="f32[num_heads]")(function)
    file, line, column, message = str(caught.value).split(":", 3)
    lines, first = inspect.getsourcelines(function)
    assert Path(file) == Path(__file__)
    assert lines[int(line) - first][int(column) - 1 :].startswith(at)
    assert said in message


def test_signatures_and_declarations_are_refused() -> None:
    for function in (lambda score, b, h, q, k, x: score, abs):
        with pytest.raises((Refused, TypeError), match="by def"):
            flashinfer.variant()(function)

    def few(score, q, k):
        return score

    with pytest.raises(Refused, match=r"expected \(score, b, h, q, k, x\)"):
        flashinfer.variant()(few)
    for kind in ("f64[n]", "f32", "int >= 0", bool, 3, "f32[]", "f32[n", "f32[__import__('os')]", "f32[1.5]"):
        with pytest.raises(UnsupportedConfig, match=r"expected"):
            flashinfer.variant(a=kind)
    # evaluated where the function is known
    with pytest.raises(UnsupportedConfig, match="length"):

        @flashinfer.variant(a="f32[q(1)]")
        def odd(score, b, h, q, k, x):
            return score + x.a[0]


def test_bounds_that_fall_are_refused() -> None:
    with pytest.raises(UnsupportedConfig, match="falls from one query to the next"):

        @flashinfer.mask(bounds=lambda q: (-q, q))
        def falling(b, h, q, k):
            return k <= q

    with pytest.raises(Refused, match="no pair"):

        @flashinfer.mask(bounds=lambda q: q)
        def single(b, h, q, k):
            return k <= q


# ----------------------------------------------------------------------------------------------------------- one text


def test_one_text_for_what_is_the_same() -> None:
    @flashinfer.variant(unused=int, slopes="f32[num_heads]")
    def other(logit, request, head, query, key, extra):
        """In other words, with constants of the module."""
        distance = key - query
        return logit + extra.slopes[head] * distance * (4 * NUMBER)

    @flashinfer.variant(s="f32[num_heads]")
    def same(score, b, h, q, k, x):
        return score + x.s[h] * (k - q) * 1.0

    assert text(other) == text(same) != text(examples.alibi)
    assert read(text(other)).text == text(other)


def every_example() -> list[Function]:
    return [value for value in vars(examples).values() if isinstance(value, Function)]


@pytest.mark.parametrize("function", every_example(), ids=lambda function: function.name)
def test_texts_are_read_again(function: Function) -> None:
    made = text(function)
    assert made in VARIANT_TEXTS and read(made).canonical().text == made
    spec = decode("sm_90a", q_dtype="bf16", kv_dtype="bf16", head_dim=128, group_size=4, variant=made)
    assert KernelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert len(spec.name) < 250 and re.fullmatch(r"[\w.=-]+", spec.name)
    plain = decode("sm_90a", q_dtype="bf16", kv_dtype="bf16", head_dim=128, group_size=4)
    assert "variant" not in plain.name and plain.arg("variant") == "none"


@pytest.mark.parametrize(
    "hostile",
    [
        "", "score", "score = ", "score = score;", "sees = k", "score = __import__('os')", "score = x.a", "q = q",
        "x0: f32[n]", "x0: f32[n]; score = score + x.x0[k]; system('x')", "score = (score + x.x0[h])",
        "score = 1.5 /* */", "score = score\nint main()", "score = " + "(" * 5000, "score = " + "-" * 5000 + "score",
        "score = " + "+".join(["score"] * 5000), "score = score; score = score", "sees = (k <= q) ",
        *[f"x{i}: f32[a, b, c]; " * 9 + "score = score" for i in (0,)],
    ],
)  # fmt: skip
def test_hostile_texts_are_refused(hostile: str) -> None:
    """They come from records and configs."""
    assert hostile not in VARIANT_TEXTS
    with pytest.raises(UnsupportedConfig):
        decode("sm_90a", q_dtype="bf16", kv_dtype="bf16", head_dim=128, group_size=4, variant=hostile)


def test_planners_are_those_of_masks() -> None:
    """Whatever happens to scores, and not where no tile is left out."""
    sizes = {"batch_size": 2, "num_qo_heads": 8, "num_kv_heads": 2}

    def ranges(variant: Any, mask: Any) -> tuple[str, bytes]:
        made = variants.launch_functions("op", variant, mask, torch.device("cpu"), **sizes)
        assert made is not None
        return made.ranges

    cap, scale, chunked = (
        examples.soft_cap(cap=2.0),
        examples.head_scale(scale=torch.ones(8)),
        examples.chunked(chunk=9),
    )
    assert ranges(cap, chunked) == ranges(scale, chunked) == ranges(None, chunked)
    assert ranges(None, chunked) == (text(examples.chunked), (9).to_bytes(4, sys.byteorder))
    assert ranges(cap, None) == variants.NO_RANGES
    tree = examples.tree(num_seen=torch.zeros(2).int(), ancestors=torch.zeros(2, 5).int())
    assert ranges(cap, tree) == variants.NO_RANGES


def test_too_many_extras_are_refused() -> None:
    @flashinfer.variant(**{f"t{i}": "f32[a, b, c]" for i in range(5)})
    def many(score, b, h, q, k, x):
        return score + x.t0[h, q, k] + x.t1[h, q, k] + x.t2[h, q, k] + x.t3[h, q, k] + x.t4[h, q, k]

    made = many(**{f"t{i}": torch.zeros(1, 1, 1) for i in range(5)})
    with pytest.raises(UnsupportedConfig, match="at most 128"):
        variants.launch_functions("op", made, None, torch.device("cpu"), batch_size=1, num_qo_heads=1, num_kv_heads=1)


# -------------------------------------------------------------------------------------------------------------- ranges


def test_what_is_a_range() -> None:
    @flashinfer.mask(w=int, n="i32[batch_size]")
    def several(b, h, q, k, x):
        return ~((k > q) | (q - k > x.w)) & (x.n[b] > k) & (2 + k >= q - 30) & ((k < 5) | (k <= q - 3))

    @flashinfer.mask(w=int)
    def equal(b, h, q, k, x):
        return k - q == x.w

    @flashinfer.mask(w=int)
    def rising_or_not(b, h, q, k, x):
        return k <= q * x.w

    @flashinfer.mask(w="f32[n]")
    def of_head(b, h, q, k, x):
        return k <= q + h

    whole = [
        several,
        equal,
        *(getattr(examples, name) for name in ("causal", "chunked", "prefix_lm", "documents_from")),
    ]
    whole.append(examples.window_and_first)  # but for a gap
    holes = [examples.documents, examples.some_heads_local]
    for function in whole:
        assert has_range(text(function)) and not has_holes(text(function)), function
    for function in holes:
        assert has_range(text(function)) and has_holes(text(function)), function
    for function in (rising_or_not, of_head, examples.tree):
        assert not has_range(text(function)) and has_holes(text(function)), function


def test_factors_of_a_launch_are_multiplied_once() -> None:
    """The cap of a soft cap goes to the exponent, sm_scale / cap is one number."""
    code = str(function_of(text(examples.soft_cap))["Function"])
    assert "return v0;" in code and "(sm_scale * (1.f / (v0))) * qk" in code

    @flashinfer.variant(a=float)
    def signed(score, b, h, q, k, x):
        return x.a * tanh(score)

    assert "return 1.0f;" in str(function_of(text(signed))["Function"])


# ------------------------------------------------------------------------------------- configs, records, command line


CONFIG = """
[[kernel]]
family = "decode"
q_dtype = "bf16"
kv_dtype = "bf16"
o_dtype = "bf16"
head_dim_qk = 64
head_dim_vo = 64
kv_storage = "paged"
pos_encoding = "none"
has_window = false
has_soft_cap = false
has_sinks = false
device_scales = false
group_tile = 8
variant = "{}"
"""


def test_configs_name_functions(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    module = "examples.attention_variants"
    config.write_text(CONFIG.format(f"{module}:t5, {module}:chunked"))
    (spec,) = read_specs([config], ["sm_90a"])
    assert spec.arg("variant") == text(examples.t5, examples.chunked)
    config.write_text(CONFIG.format(spec.arg("variant")))  # as a report of misses has it
    assert read_specs([config], ["sm_90a"]) == [spec]
    for wrong, said in (("examples.attention_variants:nothing", "nothing"), ("no_module:f", "no_module"),
                        (f"{module}:t5, {module}:alibi", "at most one"), ("score = 1", "variant")):  # fmt: skip
        config.write_text(CONFIG.format(wrong))
        with pytest.raises(ConfigError, match=said):
            read_specs([config], ["sm_90a"])


def test_precompiled_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a config that names functions to a registry that answers, for the text alone."""
    config, out, host = tmp_path / "mine.toml", tmp_path / "set", target.host()
    config.write_text(CONFIG.format("examples.attention_variants:t5").replace("bf16", "fp32"))
    assert main(["aot", "build", "--config", str(config), "--target", host, "--out", str(out)]) == 0
    (spec,) = read_specs([config], [host])
    answer = AotStore([out]).find(spec)
    assert isinstance(answer, Hit) and answer.store == "aot"
    assert isinstance(AotStore([out]).find(spec._replace(args=spec.args[:-1])), Rejected)
    assert main(["aot", "verify", str(out)]) == 0


def test_functions_of_many_operations_have_the_kernel_for_every_gpu() -> None:
    def header(function: Function) -> str:
        made = prefill("sm_90a", q_dtype="bf16", kv_dtype="bf16", head_dim=128, variant=text(function))
        return PREFILL.implementation(made).header

    @flashinfer.variant()
    def long(score, b, h, q, k):
        s = tanh(score) * (q - k) + exp(-abs(score)) * (q + k)
        t = where(s > 1, tanh(s) * h, exp2(-s)) + where(q % 3 == k % 5, 1.5, -2.5) + sqrt(abs(s * h + k))
        return tanh(t - 3) + where(t > h, exp2(-t), log(1 + abs(t))) + (q + k) / (1 + t) + (q * k % 7) * (h // 3)

    assert header(examples.t5) == header(examples.window_and_first) == "attention/sm90/prefill.cuh"
    assert header(long) == "attention/prefill/kernel.cuh"


HOPPER = [
    (64, 16, "long", (examples.t5, examples.window_and_first)),
    (64, 16, "short", (examples.soft_cap, examples.prefix_lm)),
    (128, 16, "long", (examples.causal,)),  # in the tile of long queries
    (256, 16, "long", (examples.prefix_lm,)),
    (128, 16, "long", (examples.alibi, examples.causal)),
    (128, 16, "medium", (examples.causal,)),
    (128, 16, "long", (examples.key_bias, examples.documents_from)),
    (128, 1, "long", (examples.t5, examples.window_and_first)),
    (128, 1, "short", (examples.head_scale, examples.documents)),
    (256, 16, "long", (examples.soft_cap, examples.chunked)),
    (256, 1, "long", (examples.t5, examples.window_and_first)),
    (256, 16, "short", (examples.some_heads_local,)),
    (128, 16, "long", (examples.t5, examples.window_and_first)),
]


@pytest.mark.parametrize(
    ("head_dim", "page_size", "queries", "functions"),
    [pytest.param(*case, marks=[] if case is HOPPER[-1] else [pytest.mark.slow]) for case in HOPPER],
)
def test_products_overlap_and_no_register_spills(
    head_dim: int, page_size: int, queries: str, functions: tuple[Function, ...]
) -> None:
    spec = prefill(
        "sm_90a", q_dtype="bf16", kv_dtype="bf16", head_dim=head_dim, page_size=page_size, queries=queries,
        mask="none", variant=text(*functions),
    )  # fmt: skip
    log = compiled(spec).log
    assert " 0 bytes spill stores, 0 bytes spill loads" in log and "C75" not in log, log


@pytest.mark.parametrize(
    ("on", "queries"),
    [
        ("sm_80", "short"),
        *(pytest.param(on, queries, marks=pytest.mark.slow) for on in ("sm_80", "sm_90a") for queries in QUERIES),
    ],
)
def test_a_gap_fits_beside_rotated_keys(on: str, queries: str) -> None:
    """Which leave no rounding in the shared memory that the kernel is given; its size is asserted there."""
    spec = prefill(
        on, q_dtype="fp16", kv_dtype="fp16", head_dim=128, page_size=16, queries=queries, mask="none",
        pos_encoding="rope", variant=text(examples.window_and_first),
    )  # fmt: skip
    assert has_gap(spec.arg("variant")) and " 0 bytes spill stores" in compiled(spec).log


@pytest.mark.slow
@pytest.mark.parametrize("on", ["sm_90a", "sm_80"])
def test_by_hand_takes_the_instructions_of_the_option(on: str) -> None:
    for functions, option in (
        ((examples.causal,), {}),
        ((examples.alibi, examples.causal), {"pos_encoding": "alibi"}),
        ((examples.soft_cap, examples.causal), {"has_soft_cap": True}),
    ):
        shape: dict[str, Any] = {"q_dtype": "bf16", "kv_dtype": "bf16", "head_dim": 128, "page_size": 16}
        ours = compiled(prefill(on, **shape, mask="none", variant=text(*functions)))
        theirs = compiled(prefill(on, **shape, mask="causal", **option))
        assert len(ours.machine_code) < 1.03 * len(theirs.machine_code)


def compiled(spec: KernelSpec) -> toolchain.Compiled:
    try:
        return toolchain.Nvrtc().compile(source.render(spec))
    except ToolchainMissing as missing:
        pytest.skip(str(missing))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(CONFIG.format("examples.attention_variants:t5"))
    assert main(["resolve", "--config", str(config), "--target", "sm_90a", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["kernels"]
    assert row["args"]["variant"] == text(examples.t5)
    for mask, said in {
        "window_and_first": ("in a gap are left out; the others are masked at the ends", "kHasGap"),
        "documents": ("key by key unless proved full or empty\n", "kProvesTiles", "entries_between"),
    }.items():
        assert main(["variants", "show", f"examples.attention_variants:{mask}"]) == 0
        shown = capsys.readouterr().out
        assert all(part in shown for part in (text(getattr(examples, mask)), *said))
    (tmp_path / "wrong_bounds.py").write_text(
        "import flashinfer\n@flashinfer.mask(bounds=lambda q: (q % 50, q))\ndef mask(b, h, q, k): return k <= q\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["variants", "check", "wrong_bounds:mask"]) == 1
    assert "falls from one query" in capsys.readouterr().out
    assert main(["variants", "check", "wrong_bounds:nothing"]) == 2
    assert "expected module:function" in capsys.readouterr().err
    (tmp_path / "broken.py").write_text("import torch\ntorch.no_such_name\n")
    assert main(["variants", "check", "broken:mask"]) == 2
    assert "broken does not import: AttributeError: module 'torch' has no" in capsys.readouterr().err
    (tmp_path / "refused.py").write_text(
        "import flashinfer\n@flashinfer.mask()\ndef mask(b, h, q, k): return open(k)\n"
    )
    assert main(["variants", "check", "refused:another"]) == 2  # which is not the one that is refused
    err = capsys.readouterr().err
    assert "refused does not import" in err and "refused.py:3:" in err and "expected module:function" not in err


@pytest.mark.parametrize("name", ["documents_from"])
def test_check_agrees(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants", "check", "examples.attention_variants:t5", f"examples.attention_variants:{name}"]) == 0
    assert capsys.readouterr().out.count("agrees") >= 2


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("batch_prefill_alibi_bf16", "slopes"),
        ("single_prefill_attention_sink", "sinks=sink"),
        ("my_own", "variants.md"),
    ],
)
def test_jit_args_show_the_same_variant_here(uri: str, said: str) -> None:
    workspace = torch.empty(8, dtype=torch.uint8)
    with pytest.raises(UnsupportedConfig, match=said):
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, jit_args=[uri, torch.float16, "struct A {};"])
