# SPDX-License-Identifier: Apache-2.0
"""`flashinfer variants`: functions of scores and masks as kernels see them, and kernels against the functions."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from flashinfer.cli import UsageError

if TYPE_CHECKING:
    import torch

    from flashinfer.variants import BoundFunction, Function

_HEADS, _HEAD_DIM = (8, 2), 64
_QO_LENS, _KV_LENS = (70, 1, 9, 130), (200, 333, 9, 100)
_LENGTH = 400  # of axes that may have any
# Of outputs of about 1, in fp32 on the CPU and in fp16 on a GPU.
_TOLERANCES = {"cpu": 1e-4, "cuda": 4e-3}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "variants",
        help="functions of scores and masks: what they compile to, whether kernels agree with them",
        description="Functions made by flashinfer.variant and flashinfer.mask, at most one of each: docs/variants.md.",
    )
    actions = parser.add_subparsers(metavar="ACTION")
    parser.set_defaults(run=lambda args: parser.print_help())
    for name, run, what in (
        ("show", _show, "the text that names the kernels, what is a range of keys, and the C++"),
        ("check", _check, "run the kernels of this machine's targets on random input, and compare with the functions "
         "on tensors in FP64. Exit code 1 if they differ"),
    ):  # fmt: skip
        action = actions.add_parser(
            name,
            help=what,
            description=what[0].upper() + what[1:] + ".",
            examples=(
                f"variants {name} examples.attention_variants:t5",
                f"variants {name} my_model:score my_model:mask",
            ),
        )
        action.add_argument("functions", nargs="+", metavar="MODULE:FUNCTION", help="importable from here")
        action.set_defaults(run=run)


def _given(args: argparse.Namespace) -> list[Function | BoundFunction]:
    from flashinfer.variants import load

    given = [load(name) for name in args.functions]
    kinds = [_function(one).is_mask for one in given]
    if len(set(kinds)) < len(kinds):
        raise UsageError("two functions of scores, or two masks; expected at most one of each")
    return given


def _function(given: Function | BoundFunction) -> Function:
    from flashinfer.variants import BoundFunction

    return given.function if isinstance(given, BoundFunction) else given


def _show(args: argparse.Namespace) -> int:
    from flashinfer.families.attention.variants.cxx import function_of
    from flashinfer.variants import text_of

    text = text_of(args.functions)
    print(f"{text}\n")
    if "sees = " in text:
        print(f"{_described(text)}\n")
    print("\n".join(line[2:] for line in str(function_of(text)["Function"]).splitlines()))
    return 0


def _described(text: str) -> str:
    from flashinfer.families.attention.variants.cxx import has_gap, has_holes, has_range, proves_tiles

    where = [*["outside of a range"] * has_range(text), *["in a gap"] * has_gap(text)]
    tiles = f"tiles of keys {' or '.join(where)} are left out" if where else "no tile of keys is left out"
    keys = "looked at key by key" if has_holes(text) else "masked at the ends of the range alone"
    if proves_tiles(text):
        keys += " unless proved full or empty"
    return f"mask: {tiles}; the others are {keys}"


def _check(args: argparse.Namespace) -> int:
    import torch

    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    given, worst = _given(args), 0
    for device in devices:
        bound = [_with_extras(one, device) for one in given]
        for one in bound:
            fallen = _falls(one, device)
            if fallen:
                print(f"{one.function.name}: {fallen}")
                worst = 1
        for of, error, kernel in _differences(bound, device):
            agrees = error <= _TOLERANCES[device.type]
            verdict = "agrees" if agrees else f"DIFFERS, expected at most {_TOLERANCES[device.type]:g}"
            print(f"{device.type}: {of} of {kernel}: largest error {error:.1e}: {verdict}")
            worst |= not agrees
    return worst


def _with_extras(given: Function | BoundFunction, device: torch.device) -> BoundFunction:
    """Random ones, where there are none: integers in a tensor rise along its last axis."""
    import torch

    from flashinfer.variants import BoundFunction, axis_length

    if isinstance(given, BoundFunction):
        return given
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Any] = {}
    extras = given.variants.extras
    for name, extra in extras.items():
        if not extra.is_tensor:
            values[name] = 16 if extra.kind == "int" else 0.5
    sizes = {"batch_size": len(_QO_LENS), "num_heads": _HEADS[0], "num_kv_heads": _HEADS[1]}
    known = {**sizes, **{name: value for name, value in values.items() if isinstance(value, int)}}
    for name, extra in extras.items():
        if extra.is_tensor:
            shape = [axis_length(text, known) or _LENGTH for text in extra.shape]
            values[name] = {
                "f32": lambda shape=shape: torch.randn(shape, generator=generator),
                "bool": lambda shape=shape: torch.rand(shape, generator=generator) < 0.5,
                "i32": lambda shape=shape: torch.randint(0, _LENGTH, shape, generator=generator).sort().values.int(),
            }[extra.kind]().to(device)  # fmt: skip
    return given(**values)


def _falls(bound: BoundFunction, device: torch.device) -> str:
    """What is wrong with declared bounds, on these extras."""
    import torch

    positions = torch.arange(-max(_QO_LENS), max(_KV_LENS), device=device)
    for b in range(len(_QO_LENS)):
        for name, end in zip(("first", "last"), bound.bounds(b, positions)):
            if bool((end[1:] < end[:-1]).any()):
                return f"the {name} key of its bounds falls from one query of request {b} to the next"
    return ""


def _differences(bound: list[BoundFunction], device: torch.device) -> list[tuple[str, float, str]]:
    import torch

    import flashinfer

    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if device.type == "cpu" else torch.float16

    def draw(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, _HEAD_DIM, generator=generator).to(device, dtype)

    q, k, v = draw(sum(_QO_LENS), _HEADS[0]), draw(sum(_KV_LENS), _HEADS[1]), draw(sum(_KV_LENS), _HEADS[1])
    qo, kv = ([0, *torch.tensor(lengths).cumsum(0).tolist()] for lengths in (_QO_LENS, _KV_LENS))
    options: dict[str, Any] = {"mask" if one.function.is_mask else "variant": one for one in bound}
    workspace = torch.empty(64 << 20 if device.type == "cuda" else 8, dtype=torch.uint8, device=device)
    prefill: Any = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace)
    offsets = [torch.tensor(each, dtype=torch.int32) for each in (qo, kv)]
    prefill.plan(*offsets, *_HEADS, _HEAD_DIM, q_data_type=dtype, **options)
    decode: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
    pages = torch.arange(sum(_KV_LENS), dtype=torch.int32)
    ones = torch.ones(len(_KV_LENS), dtype=torch.int32)
    decode.plan(offsets[1], pages, ones, *_HEADS, _HEAD_DIM, 1, q_data_type=dtype, **options)
    last = [end - 1 for end in qo[1:]]
    results = {"prefill": prefill.run(q, k, v), "decode": decode.run(q[last], (k[:, None], v[:, None]))}
    expected = torch.cat(
        [_reference(q[qo[b] : qo[b + 1]], k[kv[b] : kv[b + 1]], v[kv[b] : kv[b + 1]], b, options)
         for b in range(len(_QO_LENS))]
    )  # fmt: skip
    return [
        ("the output", float((result.double() - (expected if of == "prefill" else expected[last])).abs().max()), of)
        for of, result in results.items()
    ]


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, request_idx: int, options: dict[str, Any]
) -> torch.Tensor:
    import torch

    (qo_len, num_heads, head_dim), kv_len, device = q.shape, len(k), q.device
    k, v = (x.double().repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
    score = torch.einsum("ihd,jhd->hij", q.double(), k) * head_dim**-0.5
    heads, keys = torch.arange(num_heads, device=device)[:, None, None], torch.arange(kv_len, device=device)
    place = (request_idx, heads, torch.arange(kv_len - qo_len, kv_len, device=device)[:, None], keys)
    if "variant" in options:
        score = options["variant"].evaluate(score, *place).expand(score.shape)
    seen = torch.ones_like(score, dtype=torch.bool)
    if "mask" in options:
        seen &= options["mask"].evaluate(*place)
    weights = score.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hij,jhd->ihd", weights, v)
